"""What a parser sees of a host or a guest: the application's stream, and a place for the packets."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .packets import Packet
from .parser import LogLevel, ParserCallbacks, StreamCallbacks

__all__ = ["Link"]


class Link(ParserCallbacks):
    """Joins the callbacks of an application to the one who handles packets.

    hold: asked before every read; True: read nothing now. It may raise.
    received: called with every packet.
    """

    readinto: Callable[[memoryview], int | None]
    writev: Callable[[Sequence[memoryview]], int | None]

    def __init__(
        self, application: StreamCallbacks, hold: Callable[[], bool], received: Callable[[Packet], None]
    ) -> None:
        self._application = application
        self._hold = hold
        # No method of its own: one call less for every packet.
        self.packet_received = received  # type: ignore[method-assign, assignment]
        readinto = getattr(application, "readinto", None)
        if readinto is not None:
            self.readinto = lambda buffer: None if hold() else readinto(buffer)
        if hasattr(application, "writev"):
            self.writev = application.writev

    def log(self, level: LogLevel, message: str) -> None:
        """Hand a message on."""
        self._application.log(level, message)

    def read(self, count: int) -> bytes | bytearray | memoryview | None:
        """Read unless it is held back."""
        return None if self._hold() else self._application.read(count)

    def write(self, data: memoryview) -> int | None:
        """Hand bytes on."""
        return self._application.write(data)
