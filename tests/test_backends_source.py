"""Finding a device again after it was unplugged: which one it is, and how one hears of it.

Devices are plain objects that look like pyusb's; opening them is replaced. The real way is in test_export.
"""

from __future__ import annotations

import os
import socket
from types import SimpleNamespace
from typing import Any

import pytest

from usbredir.backends import _source, pyusb
from usbredir.backends._finding import DeviceSpec
from usbredir.backends._source import FdSource, PyusbSource, parse_spec
from usbredir.backends._system import port_path
from usbredir.errors import DeviceError, DeviceLostError, DeviceNotFoundError
from usbredir.transport import POLLIN

STICK = (0x0781, 0x5567)


def device(serial: str = "", port: str = "1-1", address: int = 2, ids: tuple[int, int] = STICK) -> SimpleNamespace:
    """What pyusb has of a device, as far as it is looked at."""
    bus, _, ports = port.partition("-")
    return SimpleNamespace(
        idVendor=ids[0],
        idProduct=ids[1],
        bus=int(bus),
        address=address,
        port_numbers=tuple(map(int, ports.split("."))),
        text=serial,
    )


def place_of(one: SimpleNamespace) -> dict[str, object]:
    """What it can be asked for with, by the kind of asking."""
    return {
        "ids": (one.idVendor, one.idProduct),
        "address": (one.bus, one.address),
        "port": port_path(one),
        "serial": one.text,
    }


class Bus:
    """What is plugged in, and what was opened of it."""

    def __init__(self) -> None:
        self.devices: list[SimpleNamespace] = []
        self.offered: list[list[SimpleNamespace]] = []

    def open_device(self, spec: DeviceSpec, **options: object) -> SimpleNamespace:
        return self.open_first(self.find_all(spec, None))

    def open_first(self, candidates: list[SimpleNamespace], **options: object) -> SimpleNamespace:
        self.offered.append(candidates)
        return SimpleNamespace(device=candidates[0])

    def find_all(self, spec: DeviceSpec, backend: object) -> list[SimpleNamespace]:
        found = [one for one in self.devices if spec.value == place_of(one)[spec.kind]]
        if not found:
            raise DeviceNotFoundError(f"no device {spec} is plugged in")
        return found


@pytest.fixture
def bus(monkeypatch: pytest.MonkeyPatch) -> Bus:
    bus = Bus()
    monkeypatch.setattr(pyusb, "open_device", bus.open_device)
    monkeypatch.setattr(pyusb, "open_first", bus.open_first)
    monkeypatch.setattr(_source, "find_all", bus.find_all)
    monkeypatch.setattr(_source, "new_backend", lambda: None)
    monkeypatch.setattr(_source, "text_of", lambda one, name: one.text)
    return bus


SAME = device("A", "1-1", 7)
SAME_PORT = device("B", "1-1", 8)
SAME_SERIAL = device("A", "1-4", 9)
OTHER = device("C", "1-5", 10)
NO_SERIAL = device("", "1-1", 11)
NO_SERIAL_ELSEWHERE = device("", "1-6", 12)


@pytest.mark.parametrize(
    ("spec", "first", "present", "expected"),
    [
        ("0781:5567", device("A"), [OTHER, SAME_PORT, SAME_SERIAL], [SAME_SERIAL, SAME_PORT, OTHER]),
        ("0781:5567", device("A"), [OTHER, SAME_PORT], [SAME_PORT, OTHER]),
        ("0781:5567", device("A"), [OTHER], [OTHER]),
        ("0781:5567", device("A"), [SAME_SERIAL, SAME], [SAME, SAME_SERIAL]),
        ("0781:5567", device(""), [NO_SERIAL_ELSEWHERE, NO_SERIAL], [NO_SERIAL, NO_SERIAL_ELSEWHERE]),
        ("1-2", device("A"), [OTHER, SAME_SERIAL, SAME_PORT], [SAME_SERIAL]),
        ("1-2", device(""), [NO_SERIAL_ELSEWHERE, NO_SERIAL], [NO_SERIAL, NO_SERIAL_ELSEWHERE]),
        ("port:1-1", device("A"), [SAME_SERIAL, SAME_PORT], [SAME_PORT]),
        ("serial:A", device("A"), [SAME_PORT, SAME_SERIAL, SAME], [SAME, SAME_SERIAL]),
    ],
    ids=[
        "serial before port before ids", "port before ids", "ids", "serial and port", "no serial: port",
        "an address means the serial then", "an address without serial: port", "a port means the port", "a serial",
    ],
)  # fmt: skip
def test_which_one_it_is(
    bus: Bus, spec: str, first: SimpleNamespace, present: list[SimpleNamespace], expected: list[SimpleNamespace]
) -> None:
    """After a loss: the same serial number, else the same port, else the same ids."""
    source = PyusbSource(parse_spec(spec))
    bus.devices = [first]
    source.open()
    bus.devices = present
    source.open()
    assert bus.offered[-1] == expected


@pytest.mark.parametrize(
    ("spec", "present"),
    [("0781:5567", []), ("1-2", [OTHER]), ("port:1-1", [SAME_SERIAL]), ("serial:A", [SAME_PORT])],
)
def test_it_has_not_come_back(bus: Bus, spec: str, present: list[SimpleNamespace]) -> None:
    """Another one is not taken for it."""
    source = PyusbSource(parse_spec(spec))
    bus.devices = [device("A")]
    source.open()
    bus.devices = present
    with pytest.raises(DeviceNotFoundError) as raised:
        source.open()
    assert raised.value.reason == "missing"


def test_it_never_was_there(bus: Bus) -> None:
    with pytest.raises(DeviceNotFoundError):
        PyusbSource(parse_spec("0781:5567")).open()


class Watching:
    """A libusb context that tells of arrivals, or cannot."""

    def __init__(self, able: bool) -> None:
        self.able = able
        self.arrivals = 0
        self.fails = False
        self.news = 0

    def watch(self) -> bool:
        return self.able

    def pollfds(self) -> list[tuple[int, int]]:
        return [(3, POLLIN)]

    def poll(self) -> None:
        self.arrivals += self.news
        self.news = 0
        if self.fails:
            raise DeviceError("no events")


@pytest.fixture(params=[True, False], ids=["hotplug", "no hotplug"])
def context(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, bus: Bus) -> Watching:
    context = Watching(request.param)
    monkeypatch.setattr(_source, "Context", SimpleNamespace(of=lambda backend: context))
    monkeypatch.setattr(_source, "new_backend", lambda: object())
    return context


def test_hearing_of_arrivals(context: Watching, bus: Bus) -> None:
    """Where libusb can tell, its descriptors are polled and each arrival is news once."""
    source = PyusbSource(parse_spec("0781:5567"))
    assert list(source.pollfds()) == ([(3, POLLIN)] if context.able else [])
    assert not source.has_news()
    context.news = 1
    assert source.has_news() is context.able
    assert not source.has_news()
    context.news, context.fails = 1, True
    assert source.has_news() is context.able
    bus.devices = [device()]
    source.open()
    assert source._watcher is None, "nobody has to watch any more"


def test_a_file_descriptor_is_opened_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no way back to it."""
    opened: list[int] = []

    def open_fd(fd: int, **options: object) -> Any:
        opened.append(fd)
        return SimpleNamespace()

    monkeypatch.setattr(pyusb, "open_fd", open_fd)
    source = FdSource(7)
    source.open()
    assert opened == [7]
    with pytest.raises(DeviceLostError, match="cannot come back") as gone:
        source.open()
    assert gone.value.reason == "final"
    assert (list(source.pollfds()), source.has_news()) == ([], False)


def test_a_descriptor_that_is_no_devices() -> None:
    reader, writer = socket.socketpair()
    with reader, writer, pytest.raises(DeviceError):
        FdSource(os.dup(reader.fileno())).open()


def test_without_libusb_there_is_no_news(monkeypatch: pytest.MonkeyPatch) -> None:
    """A libusb that cannot be started is no reason to end an exporter."""

    def fail() -> None:
        raise DeviceError("libusb cannot be started")

    monkeypatch.setattr(_source, "new_backend", fail)
    source = PyusbSource(parse_spec("1209:0001"))
    assert (list(source.pollfds()), source.has_news()) == ([], False)
