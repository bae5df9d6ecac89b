"""A keyboard that a BIOS understands, with all the keys of a PC.

::

    keyboard = Keyboard()
    keyboard.type("Hello, World!\\n")
    keyboard.press("ctrl", "alt", "delete")

Source: HID 1.11, appendices B.1 and C; HID Usage Tables 1.12, page 7.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from enum import IntFlag

from ..proto import Speed
from .control import Answer
from .hid import BootProtocol, HidDevice, ReportKind

__all__ = ["KEYS", "Keyboard", "Leds", "US_LAYOUT"]


def _numbered(first: int, names: str, separator: str = " ") -> dict[str, int]:
    return {name: first + number for number, name in enumerate(names.split(separator))}


KEYS: Mapping[str, int] = {
    **_numbered(0x04, "a b c d e f g h i j k l m n o p q r s t u v w x y z 1 2 3 4 5 6 7 8 9 0"),
    **_numbered(0x28, "enter escape backspace tab space - = [ ] \\ # ; ' ` , . /"),
    **_numbered(0x39, "caps lock,f1,f2,f3,f4,f5,f6,f7,f8,f9,f10,f11,f12", ","),
    **_numbered(0x46, "print screen,scroll lock,pause,insert,home,page up,delete,end,page down", ","),
    **_numbered(0x4F, "right left down up"),
    **_numbered(0x53, "num lock,keypad /,keypad *,keypad -,keypad +,keypad enter", ","),
    **_numbered(0x59, "keypad 1,keypad 2,keypad 3,keypad 4,keypad 5,keypad 6,keypad 7,keypad 8,keypad 9", ","),
    **_numbered(0x62, "keypad 0,keypad .,non-us \\,menu,power,keypad =", ","),
    **_numbered(0x68, "f13 f14 f15 f16 f17 f18 f19 f20 f21 f22 f23 f24"),
    **_numbered(0x7F, "mute,volume up,volume down", ","),
    **_numbered(0xE0, "ctrl,shift,alt,gui,right ctrl,right shift,right alt,right gui", ","),
}
"""Usages by the names of keys. Keys with a character are named by what a US keyboard types without shift."""

_SHIFTED: Mapping[str, str] = {
    **dict(zip("ABCDEFGHIJKLMNOPQRSTUVWXYZ", "abcdefghijklmnopqrstuvwxyz", strict=True)),
    **dict(zip('!@#$%^&*()_+{}|:"~<>?', "1234567890-=[]\\;'`,./", strict=True)),
}
_NAMED: Mapping[str, str] = {"\n": "enter", "\t": "tab", " ": "space", "\b": "backspace", "\x1b": "escape"}
_SHIFT = 0x02

US_LAYOUT: Mapping[str, tuple[int, int]] = {
    **{name: (KEYS[name], 0) for name in KEYS if len(name) == 1 and name != "#"},  # that key is on no US keyboard
    **{character: (KEYS[name], _SHIFT) for character, name in _SHIFTED.items()},
    **{character: (KEYS[name], 0) for character, name in _NAMED.items()},
}
"""How to type a character on a US keyboard: usage of the key, and modifiers as bits."""


class Leds(IntFlag):
    """The lamps of a keyboard. Source: HID, appendix B.1."""

    NUM_LOCK = 1
    CAPS_LOCK = 2
    SCROLL_LOCK = 4
    COMPOSE = 8
    KANA = 16


ALL_LEDS = 0x1F
REPORT_DESCRIPTOR = bytes.fromhex(
    "0501 0906 a101"  # a keyboard
    "0507 19e0 29e7 1500 2501 7501 9508 8102"  # modifiers, a bit each
    "9501 7508 8101"  # reserved
    "9505 7501 0508 1901 2905 9102 9501 7503 9101"  # lamps, a bit each, padding
    "9506 7508 1500 26dd00 0507 1900 29dd 8100"  # keys that are held
    "c0"
)
KEYS_AT_ONCE = 6
ROLL_OVER = 1
"""Stands in all six places when more keys are held than there are places. Source: HID, appendix C.3."""
FIRST_MODIFIER, LAST_MODIFIER = 0xE0, 0xE7
FIRST_KEY, LAST_KEY = 4, 0xDD


class Keyboard(HidDevice):
    """A keyboard: keys become reports, which the host takes one per 8 ms.

    Keys are told by their names in :data:`KEYS`, or by their usages: 4 to 0xDD, and 0xE0 to 0xE7 for modifiers.

    Args:
        speed: low, full, high (default) or super.
        clock: seconds, monotonic.

    Threads: any; the hook runs in the thread that handles events.
    """

    product_id, product = 0x0006, "Keyboard"
    report_descriptor = REPORT_DESCRIPTOR
    boot_protocol = BootProtocol.KEYBOARD

    def __init__(self, *, speed: Speed = Speed.HIGH, clock: Callable[[], float] = time.monotonic) -> None:
        self._pressed: tuple[int, ...] = ()
        self._leds = Leds(0)
        self._changing = threading.Lock()
        super().__init__(speed=speed, clock=clock)

    @property
    def leds(self) -> Leds:
        """The lamps that the host has lit."""
        return self._leds

    @property
    def pressed(self) -> tuple[int, ...]:
        """Usages of the keys that are held, in the order in which they were pressed."""
        return self._pressed

    def key_down(self, *keys: str | int) -> bool:
        """Press keys, all in one report, and hold them.

        False: nothing was done, because too many reports wait or the device is gone. Raises ValueError for a key
        that does not exist.
        """
        usages = _usages(keys)
        with self._changing:
            return self._change(_with(self._pressed, usages))

    def key_up(self, *keys: str | int) -> bool:
        """Let keys go, all if none is named. Otherwise as :meth:`key_down`; keys that are not held do not matter."""
        usages = _usages(keys)
        with self._changing:
            return self._change(_without(self._pressed, usages or self._pressed))

    def press(self, *keys: str | int) -> bool:
        """Press keys at the same time and let them go. Otherwise as :meth:`key_down`."""
        usages = _usages(keys)
        with self._changing:
            return self._change(_with(self._pressed, usages), _without(self._pressed, usages))

    def type(self, text: str) -> int:
        """Type a text on a US keyboard; how many characters there was room for, see ``send_limit``.

        Line feed is the enter key, and there are tab, backspace and escape. Keys that are held stay so. Raises
        ValueError, before anything is typed, for a character that is not in :data:`US_LAYOUT`.
        """
        missing = sorted(set(text) - set(US_LAYOUT))
        if missing:
            raise ValueError(f"a US keyboard does not type {', '.join(map(repr, missing))}")
        with self._changing:
            up = _report(self._pressed)
            for count, character in enumerate(text):
                usage, modifiers = US_LAYOUT[character]
                if not self.send_report(_report(_with(self._pressed, (usage,)), modifiers), up):
                    return count
        return len(text)

    def _change(self, *steps: tuple[int, ...]) -> bool:
        """Hold these keys, then those: one report each."""
        if not self.send_report(*map(_report, steps)):
            return False
        self._pressed = steps[-1]
        return True

    # ------------------------------------------------------------ hooks

    def leds_changed(self, leds: Leds) -> None:
        """The host switched lamps, or a reset put them out."""

    def began(self) -> None:
        """All lamps are out."""
        super().began()
        self._light(Leds(0))

    def report_received(self, kind: ReportKind, report: bytes) -> Answer | None:
        """The lamps."""
        self._light(Leds(report[0] & ALL_LEDS))
        return None

    def _light(self, leds: Leds) -> None:
        changed, self._leds = leds != self._leds, leds
        if changed:
            self.leds_changed(leds)


def _usages(keys: tuple[str | int, ...]) -> tuple[int, ...]:
    usages = tuple(KEYS.get(key, 0) if isinstance(key, str) else key for key in keys)
    for key, usage in zip(keys, usages, strict=True):
        if not (FIRST_KEY <= usage <= LAST_KEY or FIRST_MODIFIER <= usage <= LAST_MODIFIER):
            raise ValueError(f"there is no key {key!r}")
    return usages


def _with(pressed: tuple[int, ...], more: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(dict.fromkeys((*pressed, *more)))


def _without(pressed: tuple[int, ...], fewer: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(usage for usage in pressed if usage not in fewer)


def _report(usages: tuple[int, ...], modifiers: int = 0) -> bytes:
    """Modifiers, a reserved byte, and six keys."""
    keys = []
    for usage in usages:
        if usage >= FIRST_MODIFIER:
            modifiers |= 1 << (usage - FIRST_MODIFIER)
        else:
            keys.append(usage)
    if len(keys) > KEYS_AT_ONCE:
        keys = [ROLL_OVER] * KEYS_AT_ONCE
    return bytes((modifiers, 0, *keys)).ljust(2 + KEYS_AT_ONCE, b"\0")
