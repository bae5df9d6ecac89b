"""SerialPort: bytes both ways and held back both ways, line coding, control lines, breaks and notifications."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from usbredir.descriptors import parse_configuration
from usbredir.proto import Speed, Status
from usbredir.testing import check_device, linked_pair
from usbredir.virtual import SerialPort
from usbredir.virtual.serial_port import ENDLESS_BREAK, LineCoding, Parity

from .device_bed import Clock, DeviceBed

PATIENCE = 60.0
SET_LINE_CODING, GET_LINE_CODING, SET_CONTROL_LINE_STATE, SEND_BREAK = 0x20, 0x21, 0x22, 0x23
OUT, IN = 0x21, 0xA1


class Port(SerialPort):
    """Writes down what it is told of; small, so that it fills."""

    buffer_limit = 10

    def __init__(self, **options: Any) -> None:
        self.events: list[Any] = []
        super().__init__(**options)

    def line_coding_changed(self, coding: LineCoding) -> None:
        self.events.append(coding)

    def control_lines_changed(self) -> None:
        self.events.append((self.dtr, self.rts))

    def break_received(self, milliseconds: int) -> None:
        self.events.append(milliseconds)


class Picky(Port):
    """Takes as many bytes as it is told, and keeps them."""

    def __init__(self, **options: Any) -> None:
        self.takes: int | None = None
        self.kept = b""
        super().__init__(**options)

    def received(self, data: bytes) -> int | None:
        assert isinstance(data, bytes)
        assert data
        self.kept += data if self.takes is None else data[: self.takes]
        return None if self.takes is None else min(self.takes, len(data))


class Echo(SerialPort):
    buffer_limit = 64

    def received(self, data: bytes) -> int:
        return self.write(data)


class Bed(DeviceBed):
    def __init__(self, make: Callable[..., Port] = Port) -> None:
        clock = Clock()
        self.port = make(clock=clock)
        super().__init__(self.port, clock)

    def notification(self) -> bytes | None:
        transfer = self.interrupt(0x82, 16)
        self.run(1)
        outcome = self.ended(transfer)
        self.device.cancel(transfer)
        self.run()
        return outcome[1] if outcome is not None else None


@pytest.fixture
def bed() -> Iterator[Bed]:
    bed = Bed()
    yield bed
    bed.device.close()


@pytest.fixture
def picky() -> Iterator[tuple[Bed, Picky]]:
    bed = Bed(Picky)
    assert isinstance(bed.port, Picky)
    yield bed, bed.port
    bed.device.close()


# ================================================================ description


def test_description(bed: Bed) -> None:
    """Two interfaces that are one function; drivers look for the functional descriptors. Source: CDC 1.2, 5.2."""
    raw = bed.device.configuration_descriptor
    assert raw is not None
    control, data = parse_configuration(raw).interfaces
    assert (control.interface_class, control.interface_subclass, control.interface_protocol) == (2, 2, 1)
    assert control.association == bytes.fromhex("080b000202020100")
    assert control.extra == bytes.fromhex("0524002001 0524010001 04240206 0524060001")
    assert data.interface_class == 0x0A
    assert [e.address for e in (*control.endpoints, *data.endpoints)] == [0x82, 0x01, 0x81]
    assert bed.device.device_descriptor[4:7] == b"\xef\x02\x01"


@pytest.mark.parametrize("speed", [Speed.FULL, Speed.HIGH, Speed.SUPER])
def test_conformance(speed: Speed) -> None:
    check_device(lambda: SerialPort(speed=speed, serial="1"))


def test_there_are_none_at_low_speed() -> None:
    with pytest.raises(ValueError, match="low speed"):
        SerialPort(speed=Speed.LOW)


# ================================================================ to the guest


def test_bytes_for_the_guest(bed: Bed) -> None:
    """As many as a transfer has room for; it ends early when there are no more."""
    assert bed.port.write(b"hello") == 5
    assert bed.port.write(bytearray(b"you")) == 3
    assert bed.ended(bed.start(0x81, 6)) == (Status.SUCCESS, b"helloy")
    assert bed.ended(bed.start(0x81, 6)) == (Status.SUCCESS, b"ou")
    waiting = bed.start(0x81, 6)
    assert bed.ended(waiting) is None
    assert bed.port.write(memoryview(b"!")) == 1
    assert bed.ended(waiting) == (Status.SUCCESS, b"!")


def test_more_than_there_is_room_for(bed: Bed) -> None:
    """The count tells how much was taken."""
    assert bed.port.write(b"") == 0
    assert bed.port.write(b"12345678") == 8
    assert bed.port.write(b"90abc") == 2
    assert bed.port.write(b"x") == 0
    assert bed.ended(bed.start(0x81)) == (Status.SUCCESS, b"1234567890")
    assert bed.port.write(b"x") == 1


def test_waiting_for_room(bed: Bed) -> None:
    """Another thread fetches what waits."""
    counts: list[int] = []
    thread = threading.Thread(daemon=True, target=lambda: counts.append(bed.port.write(bytes(range(25)), PATIENCE)))
    thread.start()
    fetched, end = b"", time.monotonic() + PATIENCE
    while len(fetched) < 25:
        transfer = bed.start(0x81, 7)
        while not transfer.context:
            assert time.monotonic() < end
            bed.device.handle_events(1)
        fetched += bytes(transfer.data)
    thread.join(PATIENCE)
    assert (fetched, counts) == (bytes(range(25)), [25])


def test_waiting_for_room_that_does_not_come(bed: Bed) -> None:
    assert bed.port.write(bytes(11), 0.01) == 10


@pytest.mark.parametrize("end", [SerialPort.close, SerialPort.unplug])
def test_waiting_for_room_of_a_device_that_goes(bed: Bed, end: Callable[[SerialPort], None]) -> None:
    counts: list[int] = []
    thread = threading.Thread(daemon=True, target=lambda: counts.append(bed.port.write(bytes(11), None)))
    thread.start()
    end(bed.port)
    thread.join(PATIENCE)
    assert counts in ([10], [0])


@pytest.mark.parametrize("end", [SerialPort.close, SerialPort.unplug])
def test_a_device_that_is_gone_takes_nothing(bed: Bed, end: Callable[[SerialPort], None]) -> None:
    end(bed.port)
    assert bed.port.write(b"x", None) == 0
    assert not bed.port.set_serial_state(carrier=True)


def test_a_reset_forgets_what_the_guest_has_not_fetched(bed: Bed) -> None:
    bed.port.write(bytes(10))
    bed.device.reset()
    assert bed.ended(bed.start(0x81)) is None
    assert bed.port.write(bytes(10)) == 10


# ================================================================ from the guest


def test_bytes_of_the_guest(bed: Bed) -> None:
    bed.ended(bed.start(0x01, data=b"hello\nyo"))
    assert bed.port.read(2, 0) == b"he"
    assert bed.port.read_until(b"\n", 0) == b"llo\n"
    assert bed.port.read_until(b"\n", 0) == b"yo"
    assert bed.port.read(5, 0) == b""
    assert bed.port.read(0) == b""


def test_wrong_reads(bed: Bed) -> None:
    with pytest.raises(ValueError, match="-1"):
        bed.port.read(-1)
    with pytest.raises(ValueError, match="where to end"):
        bed.port.read_until(b"")


def test_the_guest_waits_while_nobody_reads(bed: Bed) -> None:
    """Its transfer completes when all of it was taken."""
    first, second = bed.start(0x01, data=b"12345678"), bed.start(0x01, data=memoryview(b"90abc"))
    assert bed.ended(first) is not None
    assert bed.ended(second) is None
    assert bed.port.read_until(b"\n", PATIENCE) == b"1234567890"
    assert bed.ended(second) == (Status.SUCCESS, b"")
    assert bed.port.read(99, 0) == b"abc"


def test_an_empty_transfer(bed: Bed) -> None:
    assert bed.ended(bed.start(0x01, 0)) == (Status.SUCCESS, b"")


def test_waiting_for_bytes(bed: Bed) -> None:
    lines: list[bytes] = []
    thread = threading.Thread(daemon=True, target=lambda: lines.append(bed.port.read_until(b"\n", PATIENCE)))
    thread.start()
    for piece in (b"hel", b"lo\nmo"):
        bed.ended(bed.start(0x01, data=piece))
    thread.join(PATIENCE)
    assert lines == [b"hello\n"]
    assert bed.port.read(2, 0) == b"mo"


@pytest.mark.parametrize("end", [SerialPort.close, SerialPort.unplug])
def test_reading_from_a_device_that_goes(bed: Bed, end: Callable[[SerialPort], None]) -> None:
    """What is there is returned."""
    bed.ended(bed.start(0x01, data=b"last"))
    read: list[bytes] = []
    thread = threading.Thread(daemon=True, target=lambda: read.append(bed.port.read(5)))
    thread.start()
    end(bed.port)
    thread.join(PATIENCE)
    assert read == [b"last"]


def test_a_reset_keeps_what_the_guest_wrote(bed: Bed) -> None:
    bed.ended(bed.start(0x01, data=b"last words"))
    bed.device.reset()
    assert bed.port.read(10, 0) == b"last words"


# ================================================================ a subclass takes the bytes


def test_all_bytes_are_taken(picky: tuple[Bed, Picky]) -> None:
    bed, port = picky
    assert bed.ended(bed.start(0x01, data=memoryview(b"hello"))) == (Status.SUCCESS, b"")
    assert port.kept == b"hello"
    assert port.read(5, 0) == b""


def test_some_bytes_are_taken(picky: tuple[Bed, Picky]) -> None:
    """The others are offered again, each once."""
    bed, port = picky
    port.takes = 2
    waiting = bed.start(0x01, data=b"hello")
    bed.device.handle_events(0)
    assert (port.kept, waiting.context) == (b"he", [])
    assert bed.device.next_timeout() is None
    port.takes = 0
    port.notify()
    assert bed.ended(waiting) is None
    port.takes = None
    port.notify()
    assert bed.ended(waiting) == (Status.SUCCESS, b"")
    assert port.kept == b"hello"


def test_a_transfer_that_is_cancelled_half_way(picky: tuple[Bed, Picky]) -> None:
    """The next one is taken from its beginning."""
    bed, port = picky
    port.takes = 2
    waiting = bed.start(0x01, data=memoryview(b"hello"))
    bed.device.handle_events(0)
    bed.device.cancel(waiting)
    bed.run()
    assert waiting.status == Status.CANCELLED
    port.takes = None
    assert bed.ended(bed.start(0x01, data=memoryview(b"hello"))) == (Status.SUCCESS, b"")
    assert port.kept == b"hehello"


@pytest.mark.parametrize("takes", [-1, 6])
def test_a_wrong_count(bed: Bed, takes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bed.port, "received", lambda data: takes)
    bed.start(0x01, data=b"hello")
    with pytest.raises(ValueError, match=f"took {takes} of 5 bytes"):
        bed.run()


@given(st.binary(min_size=1, max_size=500), st.integers(1, 200))
def test_an_echo(data: bytes, length: int) -> None:
    """Whatever the sizes, and though the buffer is small: all bytes come back in order."""
    clock = Clock()
    bed = DeviceBed(Echo(clock=clock), clock)
    sent = [bed.start(0x01, data=data[start : start + 100]) for start in range(0, len(data), 100)]
    back = b""
    while len(back) < len(data):
        outcome = bed.ended(bed.start(0x81, length))
        assert outcome is not None
        back += outcome[1]
    assert back == data
    assert all(bed.ended(transfer) == (Status.SUCCESS, b"") for transfer in sent)
    bed.device.close()


# ================================================================ line coding, lines, breaks


CODINGS = [
    ("80250000 000008", LineCoding()),
    ("00c20100 000008", LineCoding(115200)),
    ("00000000 010107", LineCoding(0, 1.5, Parity.ODD, 7)),
    ("ffffffff 020410", LineCoding(0xFFFFFFFF, 2, Parity.SPACE, 16)),
]


@pytest.mark.parametrize(("raw", "coding"), CODINGS)
def test_line_coding(bed: Bed, raw: str, coding: LineCoding) -> None:
    assert bed.port.line_coding == LineCoding(9600, 1, Parity.NONE, 8)
    assert bed.request(OUT, SET_LINE_CODING, data=bytes.fromhex(raw)) == b""
    assert bed.port.line_coding == coding
    assert bed.port.events == [coding]
    assert bed.request(IN, GET_LINE_CODING, length=7) == bytes.fromhex(raw)


@pytest.mark.parametrize(
    "raw", ["", "80250000 0000", "80250000 000008 00", *(f"80250000 {x}" for x in ("030008", "000508", "000009"))]
)
def test_a_line_coding_that_does_not_exist(bed: Bed, raw: str) -> None:
    assert bed.request(OUT, SET_LINE_CODING, data=bytes.fromhex(raw)) is None
    assert bed.port.line_coding == LineCoding()
    assert not bed.port.events


def test_control_lines(bed: Bed) -> None:
    """The hook is called when they change; a reset drops them."""
    for value in (1, 3, 0xFFFF, 2):
        assert bed.request(OUT, SET_CONTROL_LINE_STATE, value) == b""
    bed.device.reset()
    assert bed.port.events == [(True, False), (True, True), (False, True), (False, False)]


def test_waiting_until_the_port_is_open(bed: Bed) -> None:
    assert not bed.port.wait_until_open(0)
    opened: list[bool] = []
    thread = threading.Thread(daemon=True, target=lambda: opened.append(bed.port.wait_until_open()))
    thread.start()
    bed.request(OUT, SET_CONTROL_LINE_STATE, 1)
    thread.join(PATIENCE)
    assert opened == [True]
    bed.request(OUT, SET_CONTROL_LINE_STATE, 0)
    bed.device.unplug()
    assert not bed.port.wait_until_open()


@pytest.mark.parametrize("milliseconds", [0, 250, ENDLESS_BREAK])
def test_breaks(bed: Bed, milliseconds: int) -> None:
    assert bed.request(OUT, SEND_BREAK, milliseconds) == b""
    assert bed.port.events == [milliseconds]


def test_requests_that_do_not_exist(bed: Bed) -> None:
    assert bed.request(OUT, 0x24) is None
    assert bed.request(IN, 0x24, length=8) is None


# ================================================================ notifications


def serial_state(bits: int) -> bytes:
    return bytes.fromhex("a120 0000 0000 0200") + bytes([bits, 0])


def test_serial_state(bed: Bed) -> None:
    """Each change is told; what is not named stays."""
    assert bed.notification() is None
    assert bed.port.set_serial_state(carrier=True)
    assert bed.port.set_serial_state(dsr=True, ring=True)
    assert bed.port.set_serial_state(ring=False)
    assert bed.port.set_serial_state(carrier=False, dsr=False)
    assert [bed.notification() for _ in range(4)] == [serial_state(bits) for bits in (1, 11, 3, 0)]
    assert bed.notification() is None


def test_a_reset_tells_the_state_again(bed: Bed) -> None:
    """Once, unless all lines are low."""
    bed.port.set_serial_state(carrier=True)
    bed.device.reset()
    assert bed.notification() == serial_state(1)
    assert bed.notification() is None
    bed.port.set_serial_state(carrier=False)
    bed.device.reset()
    assert bed.notification() is None


def test_states_that_nobody_fetches(bed: Bed) -> None:
    bed.port.send_limit = 2
    assert [bed.port.set_serial_state(ring=bool(number % 2)) for number in range(3)] == [True, True, False]


# ================================================================ a guest


def test_a_guest() -> None:
    port = SerialPort()
    host, guest = linked_pair(port)
    guest.wait_for_device()
    guest.control_out(0x21, SET_CONTROL_LINE_STATE, 1, 0)
    assert port.dtr
    assert not port.rts
    port.write(b"login: ")
    assert guest.bulk_in(0x81, 512).data == b"login: "
    guest.bulk_out(0x01, b"root\n")
    assert port.read_until(b"\n", 0) == b"root\n"
    guest.close()
    host.close()
