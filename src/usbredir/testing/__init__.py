"""For tests: a host and a guest joined in memory, a server, a conformance kit for devices, and a log of packets.

::

    host, guest = linked_pair(LoopbackDevice())
    guest.wait_for_device()
    guest.bulk_out(0x01, b"hello")
    assert guest.bulk_in(0x81, 64).data == b"hello"
"""

from ._packet_log import PacketLog
from ._pair import linked_pair
from ._server import Server
from .conformance import ConformanceError, check_device

__all__ = ["ConformanceError", "PacketLog", "Server", "check_device", "linked_pair"]
