"""Keyboard: keys become reports, lamps come from the host."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from usbredir.proto import Speed
from usbredir.testing import check_device, linked_pair
from usbredir.virtual import Keyboard
from usbredir.virtual.hid import ReportKind, report_sizes
from usbredir.virtual.keyboard import KEYS, REPORT_DESCRIPTOR, US_LAYOUT, Leds

from .device_bed import Clock, DeviceBed

NOTHING = bytes(8)


class Lamps(Keyboard):
    """Writes down what its lamps do."""

    def __init__(self, clock: Clock) -> None:
        self.told: list[Leds] = []
        super().__init__(clock=clock)

    def leds_changed(self, leds: Leds) -> None:
        assert leds == self.leds
        self.told.append(leds)


class Bed(DeviceBed):
    device: Lamps

    def __init__(self) -> None:
        clock = Clock()
        super().__init__(Lamps(clock), clock)

    def reports(self) -> list[bytes]:
        return self.waiting(0x81, 8)


@pytest.fixture
def bed() -> Iterator[Bed]:
    bed = Bed()
    yield bed
    bed.device.close()


def report(modifiers: int, *keys: int) -> bytes:
    return bytes((modifiers, 0, *keys)).ljust(8, b"\0")


# ================================================================ description


def test_reports_are_those_of_the_boot_protocol() -> None:
    """Eight bytes in, one out. Source: HID 1.11, appendix B.1."""
    assert report_sizes(REPORT_DESCRIPTOR) == {(ReportKind.INPUT, 0): 8, (ReportKind.OUTPUT, 0): 1}


@pytest.mark.parametrize(
    ("name", "usage"),
    [
        ("a", 0x04),
        ("z", 0x1D),
        ("1", 0x1E),
        ("0", 0x27),
        ("enter", 0x28),
        ("#", 0x32),
        ("/", 0x38),
        ("caps lock", 0x39),
        ("f12", 0x45),
        ("page down", 0x4E),
        ("up", 0x52),
        ("keypad enter", 0x58),
        ("keypad 9", 0x61),
        ("keypad =", 0x67),
        ("f24", 0x73),
        ("volume down", 0x81),
        ("right gui", 0xE7),
    ],
)
def test_usages(name: str, usage: int) -> None:
    """Samples, at the ends of rows. Source: HID Usage Tables 1.12, table 12."""
    assert KEYS[name] == usage


def test_the_layout_has_every_character_once() -> None:
    """All of ASCII that prints, each by a combination of its own, and five keys that have a control character."""
    assert set(US_LAYOUT) == {chr(code) for code in range(0x20, 0x7F)} | set("\n\t\b\x1b")
    assert len(set(US_LAYOUT.values())) == len(US_LAYOUT)


@pytest.mark.parametrize("speed", [Speed.LOW, Speed.FULL, Speed.HIGH, Speed.SUPER])
def test_conformance(speed: Speed) -> None:
    check_device(lambda: Keyboard(speed=speed))


# ================================================================ keys


def test_a_key(bed: Bed) -> None:
    assert bed.device.key_down("a")
    assert list(bed.device.pressed) == [4]
    assert bed.device.key_up("a")
    assert list(bed.device.pressed) == []
    assert bed.reports() == [report(0, 4), NOTHING]


def test_keys_that_are_held(bed: Bed) -> None:
    """In the order in which they were pressed, each once; those that are not held may be let go."""
    bed.device.key_down("b", "a", "b")
    bed.device.key_down("a", 0x1D)
    bed.device.key_up("a", "c")
    bed.device.key_up()
    bed.device.key_up()
    assert bed.reports() == [report(0, 5, 4), report(0, 5, 4, 0x1D), report(0, 5, 0x1D), NOTHING, NOTHING]


def test_modifiers_are_bits(bed: Bed) -> None:
    names = ("ctrl", "shift", "alt", "gui", "right ctrl", "right shift", "right alt", "right gui")
    for name in names:
        bed.device.press(name)
    assert bed.reports() == [piece for bit in range(8) for piece in (report(1 << bit), NOTHING)]


def test_keys_at_the_same_time(bed: Bed) -> None:
    bed.device.key_down("x")
    bed.device.press("ctrl", "alt", "delete")
    assert bed.reports() == [report(0, 0x1B), report(5, 0x1B, 0x4C), report(0, 0x1B)]


def test_more_keys_than_a_report_has_room_for(bed: Bed) -> None:
    """The error "roll over" in all places, until there is room again; modifiers are still told."""
    for key in "abcdef":
        bed.device.key_down(key)
    bed.reports()
    bed.device.key_down("shift", "g")
    bed.device.key_up("a")
    assert bed.reports() == [report(2, *[1] * 6), report(2, *range(5, 11))]


@pytest.mark.parametrize("key", ["A", "ENTER", "", "nonsense", 0, 3, 0xDE, 0xE8, -1])
def test_keys_that_do_not_exist(bed: Bed, key: str | int) -> None:
    for method in (bed.device.key_down, bed.device.key_up, bed.device.press):
        with pytest.raises(ValueError, match="there is no key"):
            method("a", key)
    assert bed.reports() == []


# ================================================================ typing


def test_typing(bed: Bed) -> None:
    assert bed.device.type("aA!\n") == 4
    assert bed.reports() == [
        report(0, 4),
        NOTHING,
        report(2, 4),
        NOTHING,
        report(2, 30),
        NOTHING,
        report(0, 40),
        NOTHING,
    ]


def test_typing_with_a_key_held(bed: Bed) -> None:
    bed.device.key_down("ctrl", "c")
    bed.device.type("xc")
    assert bed.reports() == [report(1, 6), report(1, 6, 0x1B), report(1, 6), report(1, 6), report(1, 6)]


def test_characters_that_the_keyboard_lacks(bed: Bed) -> None:
    with pytest.raises(ValueError, match="'ß', 'ä'"):
        bed.device.type("käße")
    assert bed.reports() == []


def test_a_text_that_is_too_long(bed: Bed) -> None:
    """The count tells how much was taken; a character is typed as a whole or not at all."""
    bed.device.send_limit = 5
    assert bed.device.type("abcd") == 2
    assert not bed.device.press("a")
    assert bed.device.key_down("e")
    assert not bed.device.key_up()
    assert bed.device.pressed == (8,)
    assert bed.reports() == [report(0, 4), NOTHING, report(0, 5), NOTHING, report(0, 8)]


@given(st.text(alphabet=sorted(US_LAYOUT), max_size=40))
def test_what_is_typed_is_what_a_driver_reads(text: str) -> None:
    """Every report with a key is a character, and all keys are let go in between."""
    bed = Bed()
    characters = {combination: character for character, combination in US_LAYOUT.items()}
    bed.device.type(text)
    reports = bed.reports()
    bed.device.close()
    assert reports[1::2] == [NOTHING] * len(text)
    assert "".join(characters[one[2], one[0]] for one in reports[::2]) == text


def test_a_guest_reads_a_text() -> None:
    keyboard = Keyboard()
    host, guest = linked_pair(keyboard)
    guest.wait_for_device()
    guest.start_interrupt_receiving(0x81)
    keyboard.type("hi")
    received = [bytes(guest.receive(0x81, timeout=60).data) for _ in range(4)]
    assert received == [report(0, 11), NOTHING, report(0, 12), NOTHING]
    guest.close()
    host.close()


# ================================================================ lamps


def test_lamps(bed: Bed) -> None:
    """The hook is called when they change; unknown bits are ignored, and a reset puts all out."""
    assert bed.device.leds == Leds(0)
    for value in (2, 2, 0xE7):
        assert bed.request(0x21, 9, 0x0200, data=bytes([value])) == b""
    assert bed.device.leds == Leds.NUM_LOCK | Leds.CAPS_LOCK | Leds.SCROLL_LOCK
    assert bed.request(0xA1, 1, 0x0200, length=1) == b"\xe7"
    bed.device.reset()
    assert bed.device.told == [Leds.CAPS_LOCK, Leds(7), Leds(0)]


def test_lamps_need_a_report(bed: Bed) -> None:
    assert bed.request(0x21, 9, 0x0200) is None
    assert not bed.device.told


def test_the_host_can_ask_for_the_keys(bed: Bed) -> None:
    bed.device.key_down("a")
    assert bed.request(0xA1, 1, 0x0100, length=8) == report(0, 4)
