"""One asyncio transport, as the parsers of hosts and guests want it: reading and writing that do not wait.

What arrives waits here, and the owner is told, who then reads it. Whatever is not taken at once makes the other side
wait: the transport is paused while something is left to read, and nothing is given to a transport that has enough.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Sequence

from ._keep_alive import keep_alive
from .guest import CLOSE_PATIENCE
from .host import HostCallbacks
from .parser import LogLevel

__all__ = ["Log", "TransportStream"]

READ_SIZE = 64 * 1024
"""Bytes taken from the transport at once."""

Log = Callable[[LogLevel, str], None]


class TransportStream(HostCallbacks, asyncio.BufferedProtocol):
    """One asyncio transport, as the parsers of hosts and guests want it.

    moved: called when something can be read or written that could not before, or the transport has ended.
    logger: name of the logger, where *log* is None.
    """

    def __init__(self, moved: Callable[[], None], logger: str, log: Log | None) -> None:
        self.closed = asyncio.Event()
        self.lost = False
        """The transport has ended: nothing can be written any more."""
        self.reads = 0
        """Reads that gave something."""
        self.logger = logger
        self._log = log
        self._moved = moved
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray(READ_SIZE)
        self._view = memoryview(self._buffer)
        self._pieces: deque[bytes] = deque()  # received, not read
        self._taken = 0  # bytes of the first one that are read
        self._at_end = False  # nothing comes behind them
        self._error: Exception | None = None  # but this
        self._writable = False
        self._paused = False
        self._loop = asyncio.get_running_loop()
        self._closing: asyncio.TimerHandle | None = None

    # ------------------------------------------------------------ for the owner

    def log(self, level: LogLevel, message: str) -> None:
        """Hand a message to the function that was given, else to the logger."""
        (self._log or super().log)(level, message)

    @property
    def readable(self) -> bool:
        """Whether reading gives something, be it the end."""
        return bool(self._pieces) or self._at_end

    def read(self, count: int) -> bytes | None:
        """Up to *count* bytes that have come; None: nothing there now; b"": end of the stream."""
        if not self._pieces:
            if self._error is not None:
                raise self._error
            return b"" if self._at_end else None
        self.reads += 1
        piece, start = self._pieces[0], self._taken
        self._taken += count
        if self._taken < len(piece):
            return piece[start : self._taken]
        self._pieces.popleft()
        self._taken = 0
        return piece[start:] if start else piece

    def writev(self, buffers: Sequence[memoryview]) -> int | None:
        """Give everything to the transport; None: it has enough."""
        if not self._writable or self._transport is None:
            return None
        # Joined: writelines() does not everywhere say when the transport has enough (CVE-2024-12254).
        data = buffers[0] if len(buffers) == 1 else b"".join(buffers)
        self._transport.write(data)
        return len(data)

    def pace(self) -> None:
        """Let the transport pause while something is left to read."""
        paused = bool(self._pieces)
        if paused is not self._paused and self._transport is not None and not self._at_end:
            self._paused = paused
            if paused:
                self._transport.pause_reading()
            else:
                self._transport.resume_reading()

    def close(self) -> None:
        """Close the transport; what it holds is still written, as long as patience lasts. Idempotent."""
        if self._closing is not None or self.closed.is_set():
            return
        self._writable = False
        if self._transport is None:
            self.closed.set()
            return
        self._transport.close()
        self._closing = self._loop.call_later(CLOSE_PATIENCE, self._transport.abort)

    # ------------------------------------------------------------ for asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The connection is there."""
        assert isinstance(transport, asyncio.Transport)
        if self.closed.is_set():  # closed before
            transport.abort()
            return
        sock = transport.get_extra_info("socket")
        if sock is not None:
            with contextlib.suppress(OSError):  # it goes without
                keep_alive(sock)
        self._transport = transport
        self._writable = True
        self._moved()

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the next bytes go."""
        return self._view

    def buffer_updated(self, nbytes: int) -> None:
        """They have come."""
        self._pieces.append(bytes(self._view[:nbytes]))
        self._moved()

    def eof_received(self) -> None:
        """Nothing more will come; the transport closes itself."""
        self._at_end = True
        self._moved()

    def pause_writing(self) -> None:
        """The transport has enough."""
        self._writable = False

    def resume_writing(self) -> None:
        """It wants more."""
        self._writable = self._closing is None
        self._moved()

    def connection_lost(self, exc: Exception | None) -> None:
        """The transport is closed."""
        self.lost = True
        self._at_end = True
        self._error = exc
        self._writable = False
        if self._closing is not None:
            self._closing.cancel()
        self._moved()
        self.closed.set()
