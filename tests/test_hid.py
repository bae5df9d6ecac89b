"""HidDevice: report descriptors, reports each way, and the requests of the class, with a clock that is set."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from usbredir.descriptors import parse_configuration
from usbredir.proto import Speed, Status
from usbredir.testing import check_device, linked_pair
from usbredir.virtual import NAK, STALL, Answer, HidDevice
from usbredir.virtual.hid import BootProtocol, ReportKind, report_sizes

from .device_bed import Clock, DeviceBed

INPUT, OUTPUT, FEATURE = ReportKind.INPUT, ReportKind.OUTPUT, ReportKind.FEATURE
GET_REPORT, GET_IDLE, GET_PROTOCOL, SET_REPORT, SET_IDLE, SET_PROTOCOL = 1, 2, 3, 9, 10, 11
IN, OUT = 0xA1, 0x21

WITH_IDS = bytes.fromhex(
    "0600ff 0901 a101 1500 25ff 7508"
    "8501 9502 0901 8102"  # report 1: two bytes in
    "8502 9503 0901 8102 9501 0901 9102"  # report 2: three bytes in, one out
    "8503 9504 0901 b102"  # report 3: a feature of four bytes
    "c0"
)
SECURITY_KEY = bytes.fromhex("06d0f1 0901 a101 0920 1500 26ff00 7508 9540 8102 0921 1500 26ff00 7508 9540 9102 c0")
"""That of FIDO devices: 64 bytes each way."""


class Device(HidDevice):
    """Writes down what the host sends, and answers ``answer``."""

    report_descriptor = WITH_IDS
    boot_protocol = BootProtocol.KEYBOARD

    def __init__(self, **options: Any) -> None:
        self.events: list[Any] = []
        self.answer: Answer | None = None
        super().__init__(**options)

    def report_received(self, kind: ReportKind, report: bytes) -> Answer | None:
        self.events.append((kind, report))
        return self.answer

    def listening(self) -> None:
        self.events.append("listening")

    def boot_report(self, report: bytes | bytearray | memoryview) -> bytes:
        return b"boot" + bytes(report)


class SecurityKey(HidDevice):
    """Sends back what it gets."""

    report_descriptor = SECURITY_KEY
    output_endpoint = True

    def report_received(self, kind: ReportKind, report: bytes) -> Answer | None:
        return None if self.send_report(report) else NAK


class Bed(DeviceBed):
    device: Device

    def __init__(self, **options: Any) -> None:
        clock = Clock()
        super().__init__(Device(clock=clock, **options), clock)


@pytest.fixture
def bed() -> Iterator[Bed]:
    bed = Bed()
    yield bed
    bed.device.close()


# ================================================================ report descriptors


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("", {}),
        ("7508 9503 8102", {(INPUT, 0): 3}),
        ("7501 9503 8102", {(INPUT, 0): 1}),
        ("7501 9509 8102 9107", {(INPUT, 0): 2, (OUTPUT, 0): 2}),
        ("7504 9503 9102 b101 b101", {(OUTPUT, 0): 2, (FEATURE, 0): 3}),
        ("7508 960001 8102", {(INPUT, 0): 256}),
        ("7508 9700010000 8102", {(INPUT, 0): 256}),
        ("7508 9501 a4 9508 b4 8102", {(INPUT, 0): 1}),
        ("a4 7508 9508 8507 b4 8102", {(INPUT, 0): 0}),
        ("7508 9501 fe02f0aabb 8102 c0", {(INPUT, 0): 1}),
        ("75089501 8102 8102", {(INPUT, 0): 2}),
    ],
)
def test_sizes_of_reports(text: str, sizes: dict[tuple[ReportKind, int], int]) -> None:
    assert report_sizes(bytes.fromhex(text)) == sizes


def test_sizes_of_reports_with_ids() -> None:
    """The byte of the id is counted, once for each report."""
    assert report_sizes(WITH_IDS) == {(INPUT, 1): 3, (INPUT, 2): 4, (OUTPUT, 2): 2, (FEATURE, 3): 5}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("75", "ends inside"),
        ("7508 97000000", "ends inside"),
        ("fe", "ends inside"),
        ("fe02", "ends inside"),
        ("fe02f0aa", "ends inside"),
        ("b4", "pops"),
        ("7508 9501 8102 8501 8102", "has an id"),
        ("7508 9501 860001 8102", "has an id"),
        ("7508 97ffff0100 8102", "at most 65535 bytes"),
    ],
)
def test_descriptors_that_make_no_sense(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        report_sizes(bytes.fromhex(text))


@given(st.binary(max_size=64))
def test_any_descriptor_has_sizes_or_makes_no_sense(descriptor: bytes) -> None:
    try:
        sizes = report_sizes(descriptor)
    except ValueError:
        return
    assert all(0 <= size <= 0xFFFF for size in sizes.values())


# ================================================================ description


def test_description(bed: Bed) -> None:
    """The HID descriptor is behind the interface's, and both it and the report descriptor can be asked for."""
    raw = bed.device.configuration_descriptor
    assert raw is not None
    (interface,) = parse_configuration(raw).interfaces
    assert (interface.interface_class, interface.interface_subclass, interface.interface_protocol) == (3, 1, 1)
    assert [(e.address, e.raw_max_packet_size) for e in interface.endpoints] == [(0x81, 4)]
    hid = b"\x09\x21\x11\x01\x00\x01\x22" + len(WITH_IDS).to_bytes(2, "little")
    assert interface.extra == hid
    assert bed.request(0x81, 6, 0x2200, length=255) == WITH_IDS
    assert bed.request(0x81, 6, 0x2100, length=255) == hid
    assert raw[7] & 0x20  # can wake the host


@pytest.mark.parametrize("speed", [Speed.FULL, Speed.HIGH, Speed.SUPER])
def test_description_of_a_security_key(speed: Speed) -> None:
    device = SecurityKey(speed=speed)
    raw = device.configuration_descriptor
    assert raw is not None
    (interface,) = parse_configuration(raw).interfaces
    assert (interface.interface_subclass, interface.interface_protocol) == (0, 0)
    assert [(e.address, e.raw_max_packet_size) for e in interface.endpoints] == [(0x81, 64), (0x01, 64)]
    device.close()


def test_reports_that_do_not_fit_into_a_packet() -> None:
    with pytest.raises(ValueError, match="at most 8 bytes"):
        SecurityKey(speed=Speed.LOW)


@pytest.mark.parametrize("make", [Device, SecurityKey])
def test_conformance(make: type[HidDevice]) -> None:
    check_device(make)


# ================================================================ input reports


def test_reports_come_in_order_one_per_period(bed: Bed) -> None:
    assert bed.device.send_report(b"\x01ab", b"\x02cde")
    assert bed.device.send_report(bytearray(b"\x01fg"))
    first, second, third = (bed.interrupt(0x81, 4) for _ in range(3))
    assert bed.ended(first) == (Status.SUCCESS, b"\x01ab")
    assert bed.ended(second) is None
    bed.run(0.008)
    assert bed.ended(second) == (Status.SUCCESS, b"\x02cde")
    bed.run(0.0079)
    assert bed.ended(third) is None
    bed.run(0.0001)
    assert bed.ended(third) == (Status.SUCCESS, b"\x01fg")


def test_a_report_for_which_there_is_no_room(bed: Bed) -> None:
    """It is a babble, not two reports."""
    bed.device.send_report(b"\x02abc", b"\x01ab")
    assert bed.ended(bed.interrupt(0x81, 3)) == (Status.BABBLE, b"\x02ab")
    bed.run(1)
    assert bed.ended(bed.interrupt(0x81, 3)) == (Status.SUCCESS, b"\x01ab")


@pytest.mark.parametrize("report", [b"", b"\x01a", b"\x01abc", b"\x03abcd", b"\x04a"])
def test_reports_that_are_not_declared(bed: Bed, report: bytes) -> None:
    """None of those that are sent together is queued."""
    with pytest.raises(ValueError, match="report"):
        bed.device.send_report(b"\x01ab", report)
    assert bed.ended(bed.interrupt(0x81)) is None


def test_too_many_reports(bed: Bed) -> None:
    """All of those that are sent together are queued, or none."""
    bed.device.send_limit = 3
    assert bed.device.send_report(b"\x01aa", b"\x01bb")
    assert not bed.device.send_report(b"\x01cc", b"\x01dd")
    assert bed.device.send_report(b"\x01ee")
    assert not bed.device.send_report(b"\x01ff")
    for expected in (b"\x01aa", b"\x01bb", b"\x01ee"):
        assert bed.ended(bed.interrupt(0x81)) == (Status.SUCCESS, expected)
        bed.run(1)
    assert bed.ended(bed.interrupt(0x81)) is None
    assert bed.request(IN, GET_REPORT, 0x0101, length=3) == b"\x01ee"


def test_reports_of_a_device_that_is_gone(bed: Bed) -> None:
    bed.device.unplug()
    assert not bed.device.send_report(b"\x01ab")


def test_a_reset_forgets_reports(bed: Bed) -> None:
    """The next host gets nothing that was meant for another one."""
    bed.device.send_report(b"\x01ab")
    bed.device.reset()
    assert bed.ended(bed.interrupt(0x81)) is None


def test_listening(bed: Bed) -> None:
    """Told once, then again after a reset."""
    assert not bed.device.wait_until_listening(0)
    waiting = bed.interrupt(0x81)
    bed.run()
    assert bed.device.wait_until_listening(0)
    bed.device.send_report(b"\x01ab")
    assert bed.ended(waiting) is not None
    assert bed.device.events == ["listening"]
    bed.device.reset()
    assert not bed.device.wait_until_listening(0)
    bed.interrupt(0x81)
    bed.run()
    assert bed.device.events == ["listening"] * 2


def test_waiting_for_a_listener(bed: Bed) -> None:
    thread = threading.Thread(daemon=True, target=bed.device.wait_until_listening)
    thread.start()
    bed.interrupt(0x81)
    bed.run()
    thread.join(60)
    assert not thread.is_alive()


# ================================================================ idle rate


def test_unchanged_reports_are_not_repeated(bed: Bed) -> None:
    assert bed.request(IN, GET_IDLE, length=1) == b"\0"
    bed.device.send_report(b"\x01ab")
    bed.ended(bed.interrupt(0x81))
    waiting = bed.interrupt(0x81)
    bed.run(1000)
    assert bed.ended(waiting) is None


def test_the_idle_rate(bed: Bed) -> None:
    """In units of 4 ms, for one report; it is repeated when nothing else was sent for so long."""
    bed.device.send_report(b"\x01ab", b"\x02abc")
    for _ in range(2):
        bed.ended(bed.interrupt(0x81))
        bed.run(0.008)
    assert bed.request(OUT, SET_IDLE, 25 << 8 | 1) == b""
    assert bed.request(IN, GET_IDLE, 1, length=1) == b"\x19"
    assert bed.request(IN, GET_IDLE, 2, length=1) == b"\0"
    for _ in range(3):
        waiting = bed.interrupt(0x81)
        bed.run(0.08)
        assert bed.ended(waiting) is None
        assert bed.device.next_timeout() == pytest.approx(0.02, abs=0.0161)
        bed.run(0.02)
        assert bed.ended(waiting) == (Status.SUCCESS, b"\x01ab")
    waiting = bed.interrupt(0x81)
    bed.run(0.05)
    bed.device.send_report(b"\x01cd")
    assert bed.ended(waiting) == (Status.SUCCESS, b"\x01cd")
    waiting = bed.interrupt(0x81)
    bed.run(0.09)
    assert bed.ended(waiting) is None
    bed.run(0.01)
    assert bed.ended(waiting) == (Status.SUCCESS, b"\x01cd")


def test_the_idle_rate_of_all_reports(bed: Bed) -> None:
    """What was never sent is repeated too: all zeros. A shorter time counts from the last report."""
    assert bed.request(OUT, SET_IDLE, 250 << 8) == b""
    assert [bed.request(IN, GET_IDLE, report_id, length=1) for report_id in (0, 1, 2)] == [b"\xfa"] * 3
    seen = set()
    for _ in range(2):
        seen.add(bed.ended(bed.interrupt(0x81)))
        bed.run(0.008)
    assert seen == {(Status.SUCCESS, b"\x01\0\0"), (Status.SUCCESS, b"\x02\0\0\0")}
    waiting = bed.interrupt(0x81)
    assert bed.ended(waiting) is None
    assert bed.request(OUT, SET_IDLE, 10 << 8) == b""
    bed.run(0.03)
    assert bed.ended(waiting) is not None


def test_a_reset_forgets_the_idle_rate(bed: Bed) -> None:
    bed.request(OUT, SET_IDLE, 5 << 8)
    bed.device.reset()
    assert bed.request(IN, GET_IDLE, length=1) == b"\0"
    assert bed.ended(bed.interrupt(0x81)) is None


# ================================================================ output and feature reports


def test_reports_by_request(bed: Bed) -> None:
    """The latest one can be asked for; at first it is all zeros, behind its id."""
    assert bed.request(IN, GET_REPORT, 0x0202, length=9) == b"\x02\0"
    assert bed.request(OUT, SET_REPORT, 0x0202, data=b"\x02x") == b""
    assert bed.request(OUT, SET_REPORT, 0x0303, data=b"\x03abcdpadding") == b""
    assert bed.device.events == [(OUTPUT, b"\x02x"), (FEATURE, b"\x03abcd")]
    assert bed.request(IN, GET_REPORT, 0x0202, length=9) == b"\x02x"
    assert bed.request(IN, GET_REPORT, 0x0303, length=9) == b"\x03abcd"
    assert bed.request(IN, GET_REPORT, 0x0303, length=2) == b"\x03a"


@pytest.mark.parametrize(
    ("value", "data"),
    [(0x0101, b"\x01ab"), (0x0202, b"\x02"), (0x0202, b"\x03x"), (0x0202, b""), (0x0402, b"\x02x"), (0x0200, b"x")],
)
def test_reports_that_are_refused(bed: Bed, value: int, data: bytes) -> None:
    assert bed.request(OUT, SET_REPORT, value, data=data) is None
    assert not bed.device.events


def test_a_device_may_refuse_reports(bed: Bed) -> None:
    bed.device.answer = STALL
    assert bed.request(OUT, SET_REPORT, 0x0202, data=b"\x02x") is None
    assert bed.request(IN, GET_REPORT, 0x0202, length=9) == b"\x02\0"


@pytest.mark.parametrize("value", [0x0000, 0x0100, 0x0103, 0x0201, 0x0402, 0xFFFF])
def test_reports_that_nobody_has(bed: Bed, value: int) -> None:
    assert bed.request(IN, GET_REPORT, value, length=9) is None


def test_other_idle_rates_do_not_exist(bed: Bed) -> None:
    assert bed.request(OUT, SET_IDLE, 0x0503) is None
    assert bed.request(IN, GET_IDLE, 3, length=1) is None


def test_output_reports_on_an_endpoint() -> None:
    """A guest talks to a security key."""
    host, guest = linked_pair(SecurityKey())
    guest.wait_for_device()
    guest.start_interrupt_receiving(0x81)
    for number in range(3):
        report = bytes([number]) * 64
        assert guest.interrupt_out(0x01, report).status == Status.SUCCESS
        assert guest.receive(0x81, timeout=60) == (Status.SUCCESS, report)
    assert guest.interrupt_out(0x01, b"short").status == Status.STALL
    guest.close()
    host.close()


def test_output_reports_that_have_to_wait() -> None:
    clock = Clock()
    device = SecurityKey(clock=clock)
    device.send_limit = 1
    bed = DeviceBed(device, clock)
    first, second = bytes([1]) * 64, bytes([2]) * 64
    assert bed.ended(bed.interrupt(0x01, data=first)) == (Status.SUCCESS, b"")
    bed.run(1)
    waiting = bed.interrupt(0x01, data=second)
    assert bed.ended(waiting) is None
    assert bed.ended(bed.interrupt(0x81)) == (Status.SUCCESS, first)
    assert bed.ended(waiting) == (Status.SUCCESS, b"")
    device.close()


# ================================================================ boot protocol


def test_the_boot_protocol(bed: Bed) -> None:
    """Until a reset, reports are as the boot protocol has them."""
    assert bed.request(IN, GET_PROTOCOL, length=1) == b"\x01"
    assert not bed.device.in_boot_protocol
    assert bed.request(OUT, SET_PROTOCOL, 0) == b""
    assert bed.device.in_boot_protocol
    assert bed.request(IN, GET_PROTOCOL, length=1) == b"\0"
    bed.device.send_report(b"\x01ab")
    assert bed.ended(bed.interrupt(0x81)) == (Status.SUCCESS, b"boot\x01ab")
    assert bed.request(IN, GET_REPORT, 0x0101, length=9) == b"boot\x01ab"
    assert bed.request(IN, GET_REPORT, 0x0303, length=9) == b"\x03\0\0\0\0"
    bed.device.reset()
    assert bed.request(IN, GET_REPORT, 0x0101, length=9) == b"\x01ab"
    assert bed.request(OUT, SET_PROTOCOL, 2) is None


def test_a_device_without_boot_protocol() -> None:
    clock = Clock()
    bed = DeviceBed(SecurityKey(clock=clock), clock)
    assert bed.request(IN, GET_PROTOCOL, length=1) is None
    assert bed.request(OUT, SET_PROTOCOL, 0) is None
    assert bed.request(IN, GET_REPORT, 0x0100, length=64) == bytes(64)
    bed.device.close()


def test_a_device_that_overrides_nothing() -> None:
    """It takes every report that it has declared, and its reports are the same in both protocols."""

    class Plain(HidDevice):
        report_descriptor = WITH_IDS
        boot_protocol = BootProtocol.MOUSE

    clock = Clock()
    bed = DeviceBed(Plain(clock=clock), clock)
    assert bed.request(OUT, SET_REPORT, 0x0202, data=b"\x02x") == b""
    assert bed.request(IN, GET_REPORT, 0x0202, length=9) == b"\x02x"
    assert bed.request(OUT, SET_PROTOCOL, 0) == b""
    assert bed.request(IN, GET_REPORT, 0x0101, length=9) == b"\x01\0\0"
    bed.device.close()
