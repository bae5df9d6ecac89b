"""usbredir._device_layout: what a guest is told about interfaces and endpoints."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import pytest

from usbredir._device_layout import DeviceLayout, EndpointSlot
from usbredir.descriptors import Configuration, Endpoint, Interface
from usbredir.packets import DeviceConnect, EpInfo
from usbredir.proto import Speed, TransferType, endpoint_address, endpoint_index

from .host_bed import ALTERNATE_INTERRUPT_IN, BULK_IN, INTERRUPT_IN, ISO_IN, ISO_OUT, FakeDevice

MISSING = EndpointSlot(TransferType.INVALID)
CONTROL = EndpointSlot(TransferType.CONTROL)


def layout_of(*interfaces: Interface, speed: Speed = Speed.HIGH) -> DeviceLayout:
    return DeviceLayout(FakeDevice([Configuration(1, interfaces=interfaces)], speed=speed))


def in_use(layout: DeviceLayout) -> dict[int, EndpointSlot]:
    """Every slot that is not as in a device without interfaces."""
    slots = {endpoint_address(index): layout.endpoint(endpoint_address(index)) for index in range(32)}
    assert slots.pop(0x00) == slots.pop(0x80) == CONTROL
    return {address: slot for address, slot in slots.items() if slot != MISSING}


def test_slots() -> None:
    """Address, type, interval, interface and sizes of the alternate settings 0."""
    assert in_use(DeviceLayout(FakeDevice())) == {
        0x01: EndpointSlot(TransferType.BULK, 0, 0, 512, 0),
        0x81: EndpointSlot(TransferType.BULK, 0, 0, 512, 0),
        0x83: EndpointSlot(TransferType.BULK, 0, 0, 512, 0),
        0x02: EndpointSlot(TransferType.INTERRUPT, 4, 0, 64, 0),
        0x82: EndpointSlot(TransferType.INTERRUPT, 4, 0, 64, 0),
    }


def test_unconfigured() -> None:
    """No interfaces; slots 0 and 16 are control all the same."""
    layout = DeviceLayout(FakeDevice(active=0))
    assert in_use(layout) == {}
    assert layout.configuration.value == 0
    assert layout.alternates == {}
    assert layout.interface_info().interface_count == 0


def test_alternates_are_found_by_number() -> None:
    """They are numbered 0, 5, 2 here, in this order; what the old one had and the new one lacks goes."""
    layout = DeviceLayout(FakeDevice())
    before = in_use(layout)
    assert layout.alternates == {0: 0, 7: 0}
    layout.select(7, 2)
    assert in_use(layout) == {
        **before,
        ISO_OUT: EndpointSlot(TransferType.ISO, 1, 7, 3072, 0),
        ISO_IN: EndpointSlot(TransferType.ISO, 1, 7, 1023, 0),
    }
    assert layout.addresses(7) == [ISO_OUT, ISO_IN]
    layout.select(7, 5)
    assert in_use(layout) == {**before, ALTERNATE_INTERRUPT_IN: EndpointSlot(TransferType.INTERRUPT, 1, 7, 8, 0)}
    assert layout.addresses(7) == [ALTERNATE_INTERRUPT_IN]
    assert layout.alternates == {0: 0, 7: 5}
    layout.select(7, 0)
    assert in_use(layout) == before
    assert layout.addresses(7) == []
    assert layout.addresses(9) == []


def test_an_interface_without_alternate_0() -> None:
    """Its first one is taken."""
    layout = layout_of(
        Interface(1, 3, 0x0A, endpoints=(Endpoint(0x83, 3, 8),)),
        Interface(1, 4, 0x0B, endpoints=(Endpoint(0x84, 3, 8),)),
    )
    assert set(in_use(layout)) == {0x83}
    assert layout.interface_info().interface_class[0] == 0x0A
    assert layout.addresses(1) == [0x83]


@pytest.mark.parametrize(
    ("speed", "raw", "expected"), [(Speed.HIGH, 0x1400, 3072), (Speed.HIGH, 0x1C00, 1024), (Speed.FULL, 0x1400, 1024)]
)
def test_size_follows_the_speed(speed: Speed, raw: int, expected: int) -> None:
    layout = layout_of(Interface(0, 0, 1, endpoints=(Endpoint(0x84, 1, raw, 1),)), speed=speed)
    assert layout.endpoint(0x84).max_packet_size == expected


def test_streams() -> None:
    layout = layout_of(
        Interface(
            0, 0, 1, endpoints=(Endpoint(0x81, 2, 1024, companion=True, max_streams=16), Endpoint(0x02, 2, 1024))
        ),
        speed=Speed.SUPER,
    )
    assert layout.endpoint(0x81).max_streams == 16
    told = layout.ep_info().max_streams
    assert told is not None
    assert [index for index in range(32) if told[index]] == [endpoint_index(0x81)]
    assert layout.endpoint(0x02).max_streams == 0


@pytest.mark.parametrize("address", [0x00, 0x80])
def test_endpoint_0_stays_control(address: int) -> None:
    """Whatever a descriptor says of it."""
    assert in_use(layout_of(Interface(0, 0, 1, endpoints=(Endpoint(address, 2, 512, 9),)))) == {}


def test_ep_info() -> None:
    """Types are USB's, 255 for what is not there; everything else of such slots is zero."""
    info = DeviceLayout(FakeDevice()).ep_info()
    expected = {
        "type": {0x00: 0, 0x80: 0, 0x01: 2, 0x81: 2, 0x83: 2, 0x02: 3, 0x82: 3},
        "interval": {0x02: 4, 0x82: 4},
        "interface": {},
        "max_packet_size": {0x01: 512, 0x81: 512, 0x83: 512, 0x02: 64, 0x82: 64},
        "max_streams": {},
    }
    tables = {
        name: tuple(values.get(endpoint_address(index), 255 if name == "type" else 0) for index in range(32))
        for name, values in expected.items()
    }
    assert info == EpInfo(**tables)  # type: ignore[arg-type]  # each table has its field's type


def test_ep_info_tells_interface_numbers() -> None:
    info = layout_of(Interface(9, 0, 1, endpoints=(Endpoint(0x85, 3, 8, 7),))).ep_info()
    index = endpoint_index(0x85)
    assert (info.interface[index], info.interval[index]) == (9, 7)
    assert sum(info.interface) == 9


def test_interface_info() -> None:
    """Numbers, classes, subclasses and protocols of the present alternate settings; the rest is zero."""
    layout = DeviceLayout(FakeDevice())
    assert_interfaces(layout, (0, 0xFF, 1, 2), (7, 1, 0, 0))
    layout.select(7, 5)
    assert_interfaces(layout, (0, 0xFF, 1, 2), (7, 3, 4, 5))


def assert_interfaces(layout: DeviceLayout, *interfaces: tuple[int, int, int, int]) -> None:
    info = layout.interface_info()
    assert info.interface_count == len(interfaces)
    slots = zip(info.interface, info.interface_class, info.interface_subclass, info.interface_protocol, strict=True)
    assert list(slots) == [*interfaces, *[(0, 0, 0, 0)] * (32 - len(interfaces))]


def test_most_interfaces() -> None:
    layout = layout_of(*(Interface(200 + n, 0, n) for n in range(32)))
    info = layout.interface_info()
    assert info.interface_count == 32
    assert info.interface == tuple(range(200, 232))
    with pytest.raises(ValueError, match="33 interfaces"):
        layout_of(*(Interface(n, 0, n) for n in range(33)))


@pytest.mark.parametrize(
    ("speed", "told"), [*((speed, speed) for speed in Speed), (cast(Speed, 4), 255), (cast(Speed, 5), 255)]
)
def test_device_connect(speed: Speed, told: int) -> None:
    """Speeds beyond super are unknown ones to a guest."""
    layout = DeviceLayout(FakeDevice(speed=speed, device_class=0xEF))
    assert layout.device_connect() == DeviceConnect(
        speed=told,
        device_class=0xEF,
        device_subclass=0xDD,
        device_protocol=0xEE,
        vendor_id=0x1234,
        product_id=0x5678,
        device_version_bcd=0x0102,
    )


@pytest.mark.parametrize("broken", ["device", "configuration"])
def test_descriptors_that_make_no_sense(broken: str) -> None:
    device = FakeDevice()
    if broken == "device":
        device.device_descriptor = b"\x12\x01"
    else:
        device.raw_configuration = b"\x09\x04" + bytes(7)
    with pytest.raises(ValueError, match="not a"):
        DeviceLayout(device)


@pytest.mark.parametrize("alias", range(0x00, 0x80, 0x10))
def test_only_number_and_direction_of_an_address_count(alias: int) -> None:
    """As in the arrays on the wire."""
    layout = DeviceLayout(FakeDevice())
    assert layout.endpoint(BULK_IN | alias) == layout.endpoint(BULK_IN)
    assert layout.endpoint(INTERRUPT_IN | alias) == layout.endpoint(INTERRUPT_IN)


def test_a_layout_keeps_its_descriptors() -> None:
    """What the device changes later does not change it."""
    device = FakeDevice()
    layout = DeviceLayout(device)
    device.configurations[1] = replace(device.configurations[1], interfaces=())
    assert len(layout.alternates) == 2
    assert DeviceLayout(device).alternates == {}
