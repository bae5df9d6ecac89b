"""For tests: a host and a guest joined in memory, without sockets, threads or waiting.

::

    host, guest = linked_pair(LoopbackDevice())
    guest.wait_for_device()
    guest.bulk_out(0x01, b"hello")
    assert guest.bulk_in(0x81, 64).data == b"hello"
"""

from ._pair import linked_pair

__all__ = ["linked_pair"]
