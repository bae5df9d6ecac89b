"""usbredir for a bench of parsers that drives each through one small class: see README.md, "The table".

What is measured is the public way: :class:`~usbredir.parser.Parser` with packet objects, all checks, the default
limits, and :class:`~usbredir.transport.Connection` on sockets. Packets are sent with ``Parser.sender``; with the option
``objects`` (``adapter_usbredir:objects``) a packet object is made for each.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

from usbredir.locking import ThreadingLocks
from usbredir.packets import BulkPacket, ControlPacket, Hello, InterruptPacket, IsoPacket, Packet
from usbredir.parser import ConnectionClosed, ParserCallbacks
from usbredir.parser import Parser as UsbredirParser
from usbredir.transport import Connection

OPT = ""
DIRECT = True
"""The bench hands its socket over, too."""

KINDS: dict[str, tuple[Any, dict[str, int]]] = {
    "bulk": (BulkPacket, {"endpoint": 0x81}),
    "iso": (IsoPacket, {"endpoint": 0x83}),
    "intr": (InterruptPacket, {"endpoint": 0x82}),
    "ctrl": (ControlPacket, {"endpoint": 0x80, "request": 6, "requesttype": 0x80, "value": 0x100}),
}

Received = Callable[[int, int, int, int, Any], object]


class Parser:
    """What the bench calls. do_read and do_write return 0, or -1 at the end of the stream."""

    def __init__(
        self,
        *,
        on_packet: Received,
        read: Callable[[int], bytes | None],
        write: Any,
        host: bool = False,
        no_hello: bool = True,
        lock: threading.Lock | None = None,
        readinto: object = None,
        sock: Any = None,
    ) -> None:
        application: Any = ParserCallbacks()
        self._application = application
        if hasattr(sock, "sock"):
            connection = Connection(sock.sock, "the bench")
            write, writev = connection.write, connection.writev
            if read == sock.read:  # else hello comes from memory
                read = connection.read
        else:
            writev = getattr(sock, "sendmsg", None)  # type: ignore[assignment]
        application.read = read
        application.write = write
        if writev is not None:
            application.writev = writev
        application.packet_received = self._first

        def received(packet: Any) -> None:
            on_packet(packet.id, packet.endpoint, packet.status, 0, packet.data)

        self._received = received
        self._senders: list[Callable[[], None]] = []
        locks = None if lock is None else ThreadingLocks()
        self._parser = parser = UsbredirParser(application, usb_host=host, send_hello=not no_hello, locks=locks)
        self.hello = False
        self.pending = parser.has_data_to_write
        self._write = parser.do_write
        self.close = parser.close

    def _first(self, packet: Packet) -> None:
        """Until the round is over in which hello comes; then data packets come, and go straight to the bench."""
        if not isinstance(packet, Hello):
            self._received(packet)
            return
        self._request = self._parser.sender(BulkPacket, "id", "endpoint", "length")
        for bind in self._senders:
            bind()
        self._application.packet_received = self._received
        self.hello = True

    @property
    def read(self) -> Any:
        """Where bytes come from: a function, which the bench replaces."""
        return self._application.read

    @read.setter
    def read(self, read: Callable[[int], Any]) -> None:
        self._application.read = read

    def do_write(self) -> int:
        """Write as far as the other end takes it."""
        self._write()
        return 0

    def do_read(self) -> int:
        """Read and deliver until nothing is there."""
        try:
            self._parser.do_read()
        except ConnectionClosed:
            return -1
        return 0

    def sender(self, kind: str) -> Callable[[int, bytes], object]:
        """A function that queues one packet: (id, data)."""
        cls, values = KINDS[kind]
        if "objects" in OPT:
            send, make = self._parser.send, partial(cls, **values)
            return lambda packet_id, data: send(make(id=packet_id, data=data))
        names, fixed = (*values, "id", "data"), tuple(values.values())
        encode: Callable[..., None]

        def bind() -> None:  # a sender is of use until the next hello, and the bench may ask before the first
            nonlocal encode
            encode = self._parser.sender(cls, *names)

        bind()
        self._senders.append(bind)
        if len(fixed) == 1:
            endpoint = fixed[0]
            return lambda packet_id, data: encode(endpoint, packet_id, data)
        return lambda packet_id, data: encode(*fixed, packet_id, data)

    def request(self, packet_id: int, length: int) -> None:
        """Ask for *length* bytes."""
        self._request(packet_id, 0x81, length)
