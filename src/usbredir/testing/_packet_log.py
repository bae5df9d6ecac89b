"""The packets of connections in both directions, kept to be shown when a test fails.

What the host's end of a connection reads and writes is kept as bytes; packets are made of it only when they are to be
shown, or when so much came together that only the last ones are to stay.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from .._framing import Decoder
from ..capabilities import fix_up, mask_of
from ..errors import FilterSyntaxError, RemoteProtocolError
from ..limits import Limits
from ..packets import Hello, Packet
from ..proto import Direction

__all__ = ["PacketLog"]

WIDTH = 200
"""Characters of a packet that are shown: the tables of ep_info are longer."""
PENDING = 1 << 20
"""Bytes that may wait to be made into packets."""
TO_GUEST, TO_HOST = Direction.HOST_TO_GUEST, Direction.GUEST_TO_HOST
ARROWS = {TO_GUEST: "host > guest", TO_HOST: "guest > host"}


class PacketLog:
    """The last packets that went both ways on one connection, or on several one after the other.

    ``str(log)`` has one line for each packet: seconds since the first one, who sent it, and the packet with the
    beginning of its data. Memory: *packets* lines, and about 1 MiB of what was not made into packets yet.

    Args:
        packets: how many are kept.
        clock: seconds, monotonic.

    Threads: any.
    """

    def __init__(self, packets: int = 200, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.RLock()
        self._lines: deque[str] = deque(maxlen=packets)
        self._dropped = 0
        self._pending: deque[tuple[float, _Connection, Direction, bytes]] = deque()
        self._size = 0
        self._begin: float | None = None
        self._connections = 0

    def attach(self, stream: Any) -> None:
        """Keep what *stream*, the host's end of a connection, reads and writes from now on.

        Its methods ``read`` and ``writev``, which must not block, are replaced: to be called before a host is made
        with it.
        """
        read, writev = stream.read, stream.writev
        self._connections += 1
        connection = _Connection(self._connections)

        def logged_read(count: int) -> bytes | None:
            data: bytes | None = read(count)
            if data:
                self._keep(connection, TO_HOST, bytes(data))
            return data

        def logged_writev(buffers: Sequence[memoryview]) -> int | None:
            with self._lock:  # who gets these bytes, and fails, is to find them in the log
                count: int | None = writev(buffers)
                if count:
                    self._keep(connection, TO_GUEST, b"".join(buffers)[:count])
            return count

        stream.read, stream.writev = logged_read, logged_writev

    def __str__(self) -> str:
        with self._lock:
            self._make_packets()
            earlier = [f"({self._dropped} earlier packets)"] if self._dropped else []
            return "\n".join([*earlier, *self._lines])

    def _keep(self, connection: _Connection, travel: Direction, data: bytes) -> None:
        with self._lock:
            now = self._clock()
            if self._begin is None:
                self._begin = now
            self._pending.append((now - self._begin, connection, travel, data))
            self._size += len(data)
            if self._size > PENDING:
                self._make_packets()

    def _make_packets(self) -> None:
        """Make lines of what is pending. The lock is held."""
        # Text is made for those only that are kept.
        last: deque[tuple[float, _Connection, Direction, Packet | str]] = deque(maxlen=self._lines.maxlen)
        count = len(self._lines)
        while self._pending:
            when, connection, travel, data = self._pending.popleft()
            for packet in connection.packets(travel, data):
                last.append((when, connection, travel, packet))
                count += 1
        self._size = 0
        for when, connection, travel, packet in last:
            number = f"#{connection.number} " if self._connections > 1 else ""
            text = str(packet)
            shown = text if len(text) <= WIDTH else f"{text[:WIDTH]} ..."
            self._lines.append(f"{when:9.4f} {number}{ARROWS[travel]}  {shown}")
        self._dropped += count - len(self._lines)


class _Connection:
    """Makes packets of both directions: each is laid out as the two hellos settle."""

    def __init__(self, number: int) -> None:
        self.number = number
        self._capabilities: dict[Direction, int] = {}
        self._made: list[Packet | str] = []
        self._decoders = {
            travel: Decoder(travel, Limits(), lambda kind, make, travel=travel: self._special(travel, make))  # type: ignore[misc]
            for travel in ARROWS
        }

    def packets(self, travel: Direction, data: bytes) -> list[Packet | str]:
        """The packets that are complete with *data*; text in place of a bad one."""
        self._made = []
        decoder, left = self._decoders[travel], memoryview(data)
        while left:
            count = decoder.wanted()
            decoder.take(left[:count])
            left = left[count:]
            self._parse(decoder)
        return self._made

    def _parse(self, decoder: Decoder) -> None:
        while True:
            try:
                decoder.parse(self._made.append)
            except RemoteProtocolError as error:
                self._made.append(str(error))
            else:
                return

    def _special(self, travel: Direction, make: Callable[[], Packet]) -> None:
        """A packet that changes what follows."""
        try:
            packet = make()
        except FilterSyntaxError as error:
            self._made.append(f"a filter that does not parse: {error}")
            return
        self._made.append(packet)
        if isinstance(packet, Hello):
            self._capabilities.setdefault(travel, fix_up(mask_of(packet.capabilities)))
            if len(self._capabilities) == len(self._decoders):
                for direction, decoder in self._decoders.items():
                    receiver = self._capabilities[TO_HOST if direction is TO_GUEST else TO_GUEST]
                    decoder.set_capabilities(receiver, self._capabilities[direction])
