"""Mouse: movements, buttons and the wheel become reports."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from usbredir.proto import Speed, Status
from usbredir.testing import check_device, linked_pair
from usbredir.virtual import Mouse
from usbredir.virtual.hid import ReportKind, report_sizes
from usbredir.virtual.mouse import REPORT_DESCRIPTOR

from .device_bed import Clock, DeviceBed


class Bed(DeviceBed):
    device: Mouse

    def __init__(self) -> None:
        clock = Clock()
        super().__init__(Mouse(clock=clock), clock)

    def reports(self) -> list[bytes]:
        return self.waiting(0x81, 4)


@pytest.fixture
def bed() -> Iterator[Bed]:
    bed = Bed()
    yield bed
    bed.device.close()


def signed(value: int) -> int:
    return value - 256 if value > 127 else value


def test_reports() -> None:
    assert report_sizes(REPORT_DESCRIPTOR) == {(ReportKind.INPUT, 0): 4}


@pytest.mark.parametrize("speed", [Speed.LOW, Speed.FULL, Speed.HIGH, Speed.SUPER])
def test_conformance(speed: Speed) -> None:
    check_device(lambda: Mouse(speed=speed))


# ================================================================ movements


@pytest.mark.parametrize(
    ("dx", "dy", "expected"),
    [
        (0, 0, ["00000000"]),
        (5, -3, ["0005fd00"]),
        (127, -127, ["007f8100"]),
        (128, 0, ["00400000", "00400000"]),
        (-3, 300, ["00ff6400", "00ff6400", "00ff6400"]),
    ],
)
def test_a_movement(bed: Bed, dx: int, dy: int, expected: list[str]) -> None:
    """What is too long for a report is split along a straight line."""
    assert bed.device.move(dx, dy)
    assert [report.hex() for report in bed.reports()] == expected


@pytest.mark.parametrize(("clicks", "expected"), [(1, ["00000001"]), (-2, ["000000fe"]), (200, ["00000064"] * 2)])
def test_the_wheel(bed: Bed, clicks: int, expected: list[str]) -> None:
    assert bed.device.scroll(clicks)
    assert [report.hex() for report in bed.reports()] == expected


@given(st.integers(-2000, 2000), st.integers(-2000, 2000))
def test_movements_add_up(dx: int, dy: int) -> None:
    """In as few reports as possible, each a fair share."""
    bed = Bed()
    bed.device.move(dx, dy)
    reports = bed.reports()
    bed.device.close()
    for position, distance in ((1, dx), (2, dy)):
        steps = [signed(report[position]) for report in reports]
        assert sum(steps) == distance
        assert max(steps) - min(steps) <= 1
    assert len(reports) == max(1, -(-max(abs(dx), abs(dy)) // 127))


@pytest.mark.parametrize("distance", [32768, -32768])
def test_movements_that_are_too_long(bed: Bed, distance: int) -> None:
    with pytest.raises(ValueError, match="-32767 to 32767"):
        bed.device.move(1, distance)
    with pytest.raises(ValueError, match="-32767 to 32767"):
        bed.device.scroll(distance)
    assert bed.device.move(32767, -32767)
    assert len(bed.reports()) == 259


# ================================================================ buttons


def test_buttons(bed: Bed) -> None:
    """They stay while the mouse moves."""
    assert bed.device.button_down()
    assert bed.device.button_down("middle")
    assert bed.device.pressed == {"left", "middle"}
    assert bed.device.move(1, 2)
    assert bed.device.click("forward")
    assert bed.device.button_up()
    assert bed.device.pressed == {"middle"}
    assert [report.hex() for report in bed.reports()] == [
        *("01000000", "05000000", "05010200", "15000000", "05000000", "04000000")
    ]


def test_a_click_of_a_button_that_is_held(bed: Bed) -> None:
    bed.device.button_down("right")
    bed.device.click("right")
    assert bed.device.pressed == frozenset()
    assert [report.hex() for report in bed.reports()] == ["02000000", "02000000", "00000000"]


def test_buttons_that_do_not_exist(bed: Bed) -> None:
    for method in (bed.device.button_down, bed.device.button_up, bed.device.click):
        with pytest.raises(ValueError, match="not 'Left'"):
            method("Left")
    assert bed.reports() == []


def test_too_many_reports(bed: Bed) -> None:
    """Nothing is done by halves."""
    bed.device.send_limit = 3
    assert bed.device.move(1, 1)
    assert not bed.device.move(1000, 1)
    assert bed.device.click()
    assert not bed.device.click("right")
    assert not bed.device.button_down("right")
    assert bed.device.pressed == frozenset()
    assert len(bed.reports()) == 3


# ================================================================ hosts


def test_the_boot_protocol(bed: Bed) -> None:
    """Three bytes: three buttons and the movement."""
    assert bed.request(0x21, 0x0B, 0) == b""
    bed.device.button_down("back")
    bed.device.button_down("left")
    bed.device.move(3, 4)
    bed.device.scroll(1)
    assert [report.hex() for report in bed.reports()] == ["000000", "010000", "010304", "010000"]
    assert bed.request(0xA1, 1, 0x0100, length=8) == b"\x01\0\0"


def test_a_guest_reads_a_movement() -> None:
    mouse = Mouse()
    host, guest = linked_pair(mouse)
    guest.wait_for_device()
    guest.start_interrupt_receiving(0x81)
    mouse.move(1, -1)
    assert guest.receive(0x81, timeout=60) == (Status.SUCCESS, b"\0\x01\xff\0")
    guest.close()
    host.close()
