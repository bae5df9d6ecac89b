"""Devices that do something by themselves, for the command."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from ..proto import Speed
from .keyboard import Keyboard
from .mouse import Mouse
from .serial_port import SerialPort

__all__ = ["Circling", "Echo", "Typist"]


class Echo(SerialPort):
    """What the guest writes comes back."""

    def received(self, data: bytes) -> int:
        """As much as there is room for."""
        return self.write(data)


class Typist(Keyboard):
    """Types a text as soon as a driver listens."""

    def __init__(self, text: str, *, speed: Speed = Speed.HIGH) -> None:
        self._text = text
        super().__init__(speed=speed)

    def listening(self) -> None:
        """Type it."""
        self.type(self._text)


class Circling(Mouse):
    """Moves in circles while a driver listens."""

    RADIUS, STEPS, PERIOD = 100, 64, 0.05

    def __init__(self, *, speed: Speed = Speed.HIGH, clock: Callable[[], float] = time.monotonic) -> None:
        self._round = 0
        super().__init__(speed=speed, clock=clock)

    def listening(self) -> None:
        """Begin at the right."""
        self._round += 1  # what an earlier listener started ends
        self._go_on(self._round, 0)

    def _go_on(self, round_: int, step: int) -> None:
        if round_ == self._round:
            (x, y), (to_x, to_y) = self._place(step), self._place(step + 1)
            self.move(to_x - x, to_y - y)
            self.call_later(self.PERIOD, lambda: self._go_on(round_, step + 1))

    def _place(self, step: int) -> tuple[int, int]:
        angle = 2 * math.pi * step / self.STEPS
        return round(self.RADIUS * math.cos(angle)), round(self.RADIUS * math.sin(angle))
