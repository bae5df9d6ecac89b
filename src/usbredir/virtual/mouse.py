"""A mouse with five buttons and a wheel.

::

    mouse = Mouse()
    mouse.move(100, -20)
    mouse.click()

Source: HID 1.11, appendix B.2 (boot protocol); HID Usage Tables 1.12, pages 1 and 9.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Mapping

from ..proto import Speed
from .control import Payload
from .hid import BootProtocol, HidDevice

__all__ = ["BUTTONS", "Mouse"]

BUTTONS: Mapping[str, int] = {"left": 1, "right": 2, "middle": 4, "back": 8, "forward": 16}
"""Bits of the first byte of a report, by name."""
STEP = 127
"""The most that one report can tell of a movement."""
LONGEST_MOVE = 32767
BOOT_BUTTONS, BOOT_SIZE = 0x07, 3
"""What a report has in the boot protocol."""

REPORT_DESCRIPTOR = bytes.fromhex(
    "0501 0902 a101 0901 a100"  # a mouse, a pointer
    "0509 1901 2905 1500 2501 7501 9505 8102 7503 9501 8101"  # five buttons, padding
    "0501 0930 0931 0938 1581 257f 7508 9503 8106"  # X, Y and wheel: -127 to 127, relative
    "c0 c0"
)


class Mouse(HidDevice):
    """A mouse: movements and buttons become reports, which the host takes one per 8 ms.

    Movements are relative, in the host's units; x grows to the right, y downwards. Methods that give a bool: False
    means that nothing was done, because too many reports wait or the device is gone.

    Args:
        speed: low, full, high (default) or super.
        clock: seconds, monotonic.

    Threads: any.
    """

    product_id, product = 0x0007, "Mouse"
    report_descriptor = REPORT_DESCRIPTOR
    boot_protocol = BootProtocol.MOUSE

    def __init__(self, *, speed: Speed = Speed.HIGH, clock: Callable[[], float] = time.monotonic) -> None:
        self._buttons = 0
        self._changing = threading.Lock()
        super().__init__(speed=speed, clock=clock)

    @property
    def pressed(self) -> frozenset[str]:
        """Names of the buttons that are held."""
        return frozenset(name for name, bit in BUTTONS.items() if self._buttons & bit)

    def move(self, dx: int, dy: int) -> bool:
        """Move by so much; beyond 127 it becomes several reports along a straight line.

        Raises ValueError below -32767 and above 32767.
        """
        return self._moved(dx, dy, 0)

    def scroll(self, clicks: int) -> bool:
        """Turn the wheel, away from the user if positive. Raises ValueError as :meth:`move`."""
        return self._moved(0, 0, clicks)

    def button_down(self, button: str = "left") -> bool:
        """Press a button and hold it. Raises ValueError for a name that is not in :data:`BUTTONS`."""
        return self._change(press=_bit(button))

    def button_up(self, button: str = "left") -> bool:
        """Let a button go. Raises ValueError as :meth:`button_down`."""
        return self._change(release=_bit(button))

    def click(self, button: str = "left") -> bool:
        """Press a button and let it go. Raises ValueError as :meth:`button_down`."""
        return self._change(press=_bit(button), release=_bit(button))

    def _change(self, *, press: int = 0, release: int = 0) -> bool:
        """Press buttons, then release some: one report each."""
        with self._changing:
            pressed = self._buttons | press
            steps = [pressed] if press else []
            steps += [pressed & ~release] if release else []
            if not self.send_report(*(bytes((buttons, 0, 0, 0)) for buttons in steps)):
                return False
            self._buttons = steps[-1]
        return True

    def _moved(self, *distances: int) -> bool:
        longest = max(map(abs, distances))
        if longest > LONGEST_MOVE:
            raise ValueError(f"one movement is {-LONGEST_MOVE} to {LONGEST_MOVE}, not {longest}")
        steps = max(1, -(-longest // STEP))
        ways = [_split(distance, steps) for distance in distances]
        with self._changing:
            return self.send_report(*(bytes((self._buttons, *step)) for step in zip(*ways, strict=True)))

    def boot_report(self, report: Payload) -> Payload:
        """Three buttons and no wheel."""
        return bytes([report[0] & BOOT_BUTTONS, *report[1:BOOT_SIZE]])


def _bit(button: str) -> int:
    if button not in BUTTONS:
        raise ValueError(f"a mouse has the buttons {', '.join(BUTTONS)}, not {button!r}")
    return BUTTONS[button]


def _split(distance: int, steps: int) -> list[int]:
    """A distance in steps that differ by 1 at most, as bytes in two's complement."""
    places = [distance * step // steps for step in range(steps + 1)]
    return [(after - before) & 0xFF for before, after in itertools.pairwise(places)]
