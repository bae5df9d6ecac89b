"""End to end: a Linux guest in QEMU uses a serial port, a keyboard and a mouse of this process.

One boot serves all tests. Takes about a minute, so only with USBREDIR_QEMU=1 in the environment.
"""

from __future__ import annotations

import contextlib
import random
import struct
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from usbredir.device import UsbDevice
from usbredir.proto import Speed
from usbredir.testing.qemu import QemuGuest
from usbredir.virtual import Keyboard, Mouse, SerialPort
from usbredir.virtual.keyboard import KEYS, US_LAYOUT, Leds
from usbredir.virtual.serial_port import ENDLESS_BREAK, LineCoding, Parity
from usbredir.virtual.serial_pty import PtySerialPort

pytestmark = pytest.mark.qemu

PATIENCE = 60.0
"""Seconds that something may take on a busy machine."""
SOME = random.Random(4).randbytes(100_000)
MUCH = random.Random(5).randbytes(300_000)

# Numbers of Linux's linux/input-event-codes.h.
EV_KEY, EV_REL = 1, 2
REL_X, REL_Y, REL_WHEEL = 0, 1, 8
BTN_LEFT, BTN_SIDE = 0x110, 0x113
LINUX_ROWS = {2: "1234567890-=", 16: "qwertyuiop[]", 30: "asdfghjkl;'`", 43: "\\zxcvbnm,./"}
LINUX_KEYS = {KEYS[key]: first + place for first, row in LINUX_ROWS.items() for place, key in enumerate(row)} | {
    KEYS[name]: code
    for name, code in {
        "enter": 28,
        "tab": 15,
        "space": 57,
        "backspace": 14,
        "escape": 1,
        "f12": 88,
        "delete": 111,
    }.items()
}
LEFT_CTRL, LEFT_SHIFT, LEFT_ALT = 29, 42, 56


@pytest.fixture
def guest(qemu_guest: QemuGuest) -> Iterator[QemuGuest]:
    yield qemu_guest
    qemu_guest.run("rm -f /tmp/*")


@contextlib.contextmanager
def plugged_in(guest: QemuGuest, device: UsbDevice, node: str) -> Iterator[str]:
    """Give the device file of *device*."""
    with contextlib.closing(device):
        plugged = guest.plug(device)
        yield guest.node(plugged, node)
        guest.unplug(plugged)


# ================================================================ serial port


class Echo(SerialPort):
    """Sends back what it gets."""

    def received(self, data: bytes) -> int:
        return self.write(data)


class Listener(SerialPort):
    """Keeps what it is told of."""

    def __init__(self) -> None:
        self.breaks: list[int] = []
        self.lines: list[tuple[bool, bool]] = []
        super().__init__()

    def break_received(self, milliseconds: int) -> None:
        self.breaks.append(milliseconds)

    def control_lines_changed(self) -> None:
        self.lines.append((self.dtr, self.rts))


@pytest.mark.parametrize("speed", [Speed.FULL, Speed.HIGH, Speed.SUPER])
def test_bytes_come_back(guest: QemuGuest, speed: Speed) -> None:
    with plugged_in(guest, Echo(speed=speed), "ttyACM*") as tty:
        guest.write_file("/tmp/sent", SOME)
        guest.run(
            f"exec 3<> {tty}; stty raw -echo <&3; head -c {len(SOME)} <&3 > /tmp/back & cat /tmp/sent >&3; wait",
            timeout=PATIENCE,
        )
        assert guest.read_file("/tmp/back") == SOME


def test_the_guest_waits_until_its_bytes_are_read(guest: QemuGuest) -> None:
    """And nothing is lost."""
    port = SerialPort()
    with plugged_in(guest, port, "ttyACM*") as tty:
        guest.write_file("/tmp/sent", MUCH)
        writing = guest.start(f"exec 3<> {tty}; stty raw -echo <&3; cat /tmp/sent >&3; echo done")
        read = port.read(port.buffer_limit, PATIENCE)
        while len(read) < len(MUCH):
            piece = port.read(min(port.buffer_limit, len(MUCH) - len(read)), PATIENCE)
            assert piece
            read += piece
        assert read == MUCH
        assert writing.output(PATIENCE) == "done"


def test_the_device_waits_until_the_guest_reads(guest: QemuGuest) -> None:
    port = SerialPort()
    with plugged_in(guest, port, "ttyACM*") as tty:
        reading = guest.start(f"exec 3<> {tty}; stty raw -echo <&3; echo go >&3; head -c {len(MUCH)} <&3 | sha256sum -")
        assert port.read_until(b"go\n", PATIENCE) == b"go\n"
        assert port.write(MUCH) == port.buffer_limit
        assert port.write(MUCH[port.buffer_limit :], PATIENCE) == len(MUCH) - port.buffer_limit
        guest.write_file("/tmp/expected", MUCH)
        assert reading.output(PATIENCE) == guest.run("sha256sum - < /tmp/expected")


def test_a_program_here_talks_to_a_program_there(guest: QemuGuest) -> None:
    """Through a terminal at either end."""
    port = PtySerialPort()
    with plugged_in(guest, port, "ttyACM*") as tty:
        asking = guest.start(f"exec 3<> {tty}; stty raw -echo <&3; echo name? >&3; head -n 1 <&3")
        with open(port.path, "r+b", buffering=0) as terminal:
            assert b"".join(iter(lambda: terminal.read(1), b"\n")) == b"name?"
            terminal.write(b"usbredir\n")
        assert asking.output(PATIENCE) == "usbredir"


@pytest.mark.parametrize(
    ("settings", "coding"),
    [
        ("115200 cs8 -parenb -cstopb", LineCoding(115200, 1, Parity.NONE, 8)),
        ("19200 cs7 parenb parodd cstopb", LineCoding(19200, 2, Parity.ODD, 7)),
        ("300 cs5 parenb -parodd -cstopb", LineCoding(300, 1, Parity.EVEN, 5)),
    ],
)
def test_the_device_sees_the_line_coding(guest: QemuGuest, settings: str, coding: LineCoding) -> None:
    port = SerialPort()
    with plugged_in(guest, port, "ttyACM*") as tty:
        guest.run(f"stty -F {tty} {settings}")
        assert port.line_coding == coding


def test_the_device_sees_lines_and_breaks(guest: QemuGuest) -> None:
    """Opening raises DTR and RTS, closing drops them; microcom sends a break for a NUL byte."""
    port = Listener()
    with plugged_in(guest, port, "ttyACM*") as tty:
        guest.run(f"printf '\\000\\030' | microcom -t 5000 {tty}", timeout=PATIENCE)
        assert port.breaks == [ENDLESS_BREAK, 0]
        assert (True, True) in port.lines
        assert port.lines[-1] == (False, False)


def test_the_guest_sees_a_lost_carrier(guest: QemuGuest) -> None:
    """It hangs up."""
    port = SerialPort()
    with plugged_in(guest, port, "ttyACM*") as tty:
        reading = guest.start(
            f"trap '' HUP; exec 3<> {tty}; stty raw -echo -clocal <&3; echo go >&3; cat <&3; echo hung up"
        )
        assert port.read_until(b"go\n", PATIENCE) == b"go\n"
        assert port.set_serial_state(carrier=True, dsr=True)
        assert port.set_serial_state(carrier=False)
        assert reading.output(PATIENCE).endswith("hung up")


# ================================================================ keyboard and mouse

Event = tuple[int, int, int]
"""Type, code and value of a struct input_event."""


class Events:
    """What the guest's input layer tells of a device."""

    def __init__(self, guest: QemuGuest, node: str) -> None:
        self._guest = guest
        self._reading = guest.start(f"exec 3< {node}; touch /tmp/ready; exec cat <&3 > /tmp/events")
        guest.wait_for("[ -e /tmp/ready ]")

    def until(self, last: Event) -> list[Event]:
        """All events but repetitions, synchronisation and scan codes, up to *last*."""
        end = time.monotonic() + PATIENCE
        while True:
            raw = self._guest.read_file("/tmp/events")
            unpacked = struct.iter_unpack("<16xHHi", raw[: len(raw) // 24 * 24])
            events: list[Event] = [(kind, code, value) for kind, code, value in unpacked]
            if last in events:
                self._reading.stop()
                wanted = events[: events.index(last) + 1]
                return [event for event in wanted if event[0] in (EV_KEY, EV_REL) and event[::2] != (EV_KEY, 2)]
            assert time.monotonic() < end, events


def keys(*codes: int) -> list[Event]:
    """Events of keys: pressed, or released if negative."""
    return [(EV_KEY, abs(code), int(code > 0)) for code in codes]


def typed(text: str) -> list[Event]:
    """Events of a text, as Linux calls its keys."""
    events = []
    for usage, modifiers in map(US_LAYOUT.__getitem__, text):
        shift = [LEFT_SHIFT] if modifiers else []
        events += keys(*shift, LINUX_KEYS[usage], *(-code for code in shift), -LINUX_KEYS[usage])
    return events


@pytest.mark.parametrize("speed", [Speed.LOW, Speed.HIGH, Speed.SUPER])
def test_typed_text(guest: QemuGuest, speed: Speed) -> None:
    text = "Hello, World!\n" + "".join(US_LAYOUT)
    keyboard = Keyboard(speed=speed)
    with plugged_in(guest, keyboard, "event*") as node:
        events = Events(guest, node)
        assert keyboard.wait_until_listening(PATIENCE)
        assert keyboard.type(text) == len(text)
        keyboard.press("f12")
        assert events.until((EV_KEY, 88, 0)) == typed(text) + keys(88, -88)


def test_keys_that_are_held(guest: QemuGuest) -> None:
    keyboard = Keyboard()
    with plugged_in(guest, keyboard, "event*") as node:
        events = Events(guest, node)
        keyboard.key_down("shift")
        keyboard.type("x")
        keyboard.key_down("a", "b")
        keyboard.key_up()
        keyboard.press("ctrl", "right alt", "f12")
        seen = events.until((EV_KEY, 88, 0))
        held = keys(LEFT_SHIFT, 45, -45, 30, 48, -LEFT_SHIFT, -30, -48)
        assert seen == held + keys(LEFT_CTRL, 100, 88, -LEFT_CTRL, -100, -88)


class Lamps(Keyboard):
    """Tells of its lamps."""

    def __init__(self) -> None:
        self.told = threading.Condition()
        super().__init__()

    def leds_changed(self, leds: Leds) -> None:
        with self.told:
            self.told.notify_all()

    def wait_for(self, wanted: Callable[[Leds], bool]) -> bool:
        with self.told:
            return self.told.wait_for(lambda: wanted(self.leds), PATIENCE)


@pytest.mark.parametrize(("name", "led"), [("capslock", Leds.CAPS_LOCK), ("scrolllock", Leds.SCROLL_LOCK)])
def test_lamps(guest: QemuGuest, name: str, led: Leds) -> None:
    keyboard = Lamps()
    with contextlib.closing(keyboard):
        plugged = guest.plug(keyboard)
        guest.node(plugged, "event*")
        lamp = guest.wait_for(f"ls {plugged.path}/*/*/input/input*/*::{name}/brightness")
        guest.run(f"echo 1 > {lamp}")
        assert keyboard.wait_for(lambda leds: led in leds)
        guest.run(f"echo 0 > {lamp}")
        assert keyboard.wait_for(lambda leds: led not in leds)
        guest.unplug(plugged)


def test_mouse(guest: QemuGuest) -> None:
    """Movements, buttons and the wheel; a long way comes in steps."""
    mouse = Mouse()
    with plugged_in(guest, mouse, "event*") as node:
        events = Events(guest, node)
        mouse.move(5, -3)
        mouse.click()
        mouse.scroll(-2)
        mouse.button_down("back")
        mouse.move(1000, 200)
        mouse.button_up("back")
        seen = [event for event in events.until((EV_KEY, BTN_SIDE, 0)) if event[:2] != (EV_REL, 11)]
    assert seen[:5] == [(EV_REL, REL_X, 5), (EV_REL, REL_Y, -3), *keys(BTN_LEFT, -BTN_LEFT), (EV_REL, REL_WHEEL, -2)]
    assert (seen[5], seen[-1]) == tuple(keys(BTN_SIDE, -BTN_SIDE))
    moved = seen[6:-1]
    assert sum(value for _, code, value in moved if code == REL_X) == 1000
    assert sum(value for _, code, value in moved if code == REL_Y) == 200
    assert len(moved) == 16
