"""A connected socket that is read and written with a time limit: lines, and counted bytes."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence

__all__ = ["Channel"]

PIECE = 1 << 16
"""Bytes to read at a time."""


class Channel:
    """A stream of lines and counted bytes. Owns the socket. Threads: one.

    Ends are times of ``time.monotonic()``. Every method raises TimeoutError when its end has passed, and EOFError
    when the other side has closed.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._received = bytearray()

    def send(self, data: bytes, end: float, *, descriptors: Sequence[int] = ()) -> None:
        """Send everything; file descriptors go along with the first byte."""
        rest = memoryview(data)
        try:
            if descriptors:
                self._limit(end)
                rest = rest[socket.send_fds(self._socket, [rest], list(descriptors)) :]
            while rest:
                self._limit(end)
                rest = rest[self._socket.send(rest) :]
        except (BrokenPipeError, ConnectionResetError) as error:
            raise EOFError from error

    def line(self, end: float) -> bytes:
        """The next line, without its end. A line that is cut short by the end of the time is kept for the next call."""
        while (newline := self._received.find(b"\n")) < 0:
            self._receive(end)
        return self._take(newline + 1)[:-1]

    def exactly(self, count: int, end: float) -> bytes:
        """The next *count* bytes; memory grows as they come."""
        while len(self._received) < count:
            self._receive(end)
        return self._take(count)

    def close(self) -> None:
        """Close the socket. Idempotent."""
        self._socket.close()

    def _take(self, count: int) -> bytes:
        data = bytes(self._received[:count])
        del self._received[:count]
        return data

    def _receive(self, end: float) -> None:
        self._limit(end)
        try:
            data = self._socket.recv(PIECE)
        except ConnectionResetError:
            data = b""
        if not data:
            raise EOFError
        self._received += data

    def _limit(self, end: float) -> None:
        left = end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._socket.settimeout(left)
