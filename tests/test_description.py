"""Descriptions: what declarations become at each speed, byte for byte, and what USB forbids."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from usbredir.descriptors import DescriptorType, interval_seconds, max_packet_size, parse_configuration, parse_device
from usbredir.proto import Speed, TransferType
from usbredir.virtual import (
    LoopbackDevice,
    association,
    bulk_in,
    bulk_out,
    configuration,
    interface,
    interrupt_in,
    interrupt_out,
    iso_in,
    iso_out,
)
from usbredir.virtual.declare import EndpointDeclaration, InterfaceDeclaration
from usbredir.virtual.description import Declaration, Description, endpoint_at

LOW, FULL, HIGH, SUPER = Speed.LOW, Speed.FULL, Speed.HIGH, Speed.SUPER
BULK, INTERRUPT, ISO = TransferType.BULK, TransferType.INTERRUPT, TransferType.ISO


def raw(text: str) -> bytes:
    return bytes.fromhex(text)


class Stick(Declaration):
    """Texts, a bulk pair, power."""

    vendor_id, product_id, device_version = 0x1234, 0x5678, 0x0203
    manufacturer, product, serial = "maker", "thing", "42"
    max_power, remote_wakeup = 500, True
    interfaces = (interface(0xFF, bulk_out(0x01), bulk_in(0x82), subclass=1, protocol=2, name="port"),)


# ================================================================ whole devices

STICK = {
    FULL: (
        "12 01 00 02 00 00 00 40 34 12 78 56 03 02 01 02 03 01",
        "09 02 20 00 01 01 00 a0 fa  09 04 00 00 02 ff 01 02 04  07 05 01 02 40 00 00  07 05 82 02 40 00 00",
    ),
    HIGH: (
        "12 01 00 02 00 00 00 40 34 12 78 56 03 02 01 02 03 01",
        "09 02 20 00 01 01 00 a0 fa  09 04 00 00 02 ff 01 02 04  07 05 01 02 00 02 00  07 05 82 02 00 02 00",
    ),
    SUPER: (
        "12 01 00 03 00 00 00 09 34 12 78 56 03 02 01 02 03 01",
        "09 02 2c 00 01 01 00 a0 3f  09 04 00 00 02 ff 01 02 04"
        "07 05 01 02 00 04 00  06 30 00 00 00 00  07 05 82 02 00 04 00  06 30 00 00 00 00",
    ),
}


@pytest.mark.parametrize("speed", STICK)
def test_a_device(speed: Speed) -> None:
    device, configuration_ = map(raw, STICK[speed])
    told = Stick().describe(speed)
    assert (told.device, list(told.configurations)) == (device, [configuration_])
    assert told.strings == {1: "maker", 2: "thing", 3: "42", 4: "port"}


def test_a_device_of_low_speed() -> None:
    """8 bytes on endpoint 0, interrupt endpoints only."""

    class Mouse(Declaration):
        interfaces = (interface(3, interrupt_in(0x81, 4)),)

    told = Mouse().describe(LOW)
    assert parse_device(told.device).max_packet_size0 == 8
    assert told.configurations[0][-7:] == raw("07 05 81 03 04 00 0a")


def test_descriptors_by_number() -> None:
    """What GET_DESCRIPTOR answers."""
    told = Stick().describe(HIGH)
    device, qualifier = told.device, raw("0a 06 00 02 00 00 00 40 01 00")
    other = Stick().describe(FULL).configurations[0]
    expected: dict[tuple[int, int], bytes | None] = {
        (DescriptorType.DEVICE, 0): device,
        (DescriptorType.DEVICE, 1): None,
        (DescriptorType.CONFIGURATION, 0): told.configurations[0],
        (DescriptorType.CONFIGURATION, 1): None,
        (DescriptorType.STRING, 0): raw("04 03 09 04"),
        (DescriptorType.STRING, 3): raw("06 03 34 00 32 00"),
        (DescriptorType.STRING, 5): None,
        (DescriptorType.BOS, 0): None,
        (DescriptorType.DEVICE_QUALIFIER, 0): qualifier,
        (DescriptorType.OTHER_SPEED_CONFIGURATION, 0): other[:1] + b"\x07" + other[2:],
        (DescriptorType.OTHER_SPEED_CONFIGURATION, 1): None,
        (0x22, 0): None,
    }
    assert {key: told.descriptor(*key) for key in expected} == expected


@pytest.mark.parametrize("speed", [FULL, SUPER])
def test_only_high_speed_has_a_qualifier(speed: Speed) -> None:
    told = Stick().describe(speed)
    assert (told.qualifier, list(told.other_speed)) == (None, [])


def test_a_device_for_high_speed_only_has_no_qualifier() -> None:
    class Camera(Declaration):
        interfaces = (interface(0xFF, iso_in(0x81, 3072)),)

    told = Camera().describe(HIGH)
    assert (told.qualifier, list(told.other_speed)) == (None, [])


def test_binary_object_store() -> None:
    """Of super speed: USB 2.0 extension and SuperSpeed capability."""
    assert Stick().describe(SUPER).bos == raw("05 0f 16 00 02  07 10 02 00 00 00 00  0a 10 03 00 0e 00 01 0a 20 00")
    assert Stick().describe(HIGH).bos is None


def test_no_texts() -> None:
    class Quiet(Declaration):
        manufacturer = None

    told = Quiet().describe(HIGH)
    assert told.strings == {}
    assert told.device[14:17] == bytes(3)


def test_a_text_has_one_index() -> None:
    class Same(Declaration):
        manufacturer = product = "same"
        interfaces = (interface(0xFF, name="other"), interface(0xFF, name="same"))

    told = Same().describe(HIGH)
    assert told.strings == {1: "same", 2: "other"}
    assert [i.name_index for i in parse_configuration(told.configurations[0]).interfaces] == [2, 1]


def test_attributes_of_the_object() -> None:
    """Those of the class are defaults."""
    stick = Stick()
    stick.serial = "43"
    stick.interfaces = (interface(0x0A),)
    told = stick.describe(HIGH)
    assert told.strings[3] == "43"
    assert parse_configuration(told.configurations[0]).interfaces[0].interface_class == 0x0A


def test_usb_version() -> None:
    class New(Stick):
        usb_version = 0x0201

    assert parse_device(New().describe(HIGH).device).usb_bcd == 0x0201


# ================================================================ interfaces and configurations


def test_numbers() -> None:
    """Consecutive, but for alternate settings and those that are told."""

    class Many(Declaration):
        interfaces = (
            interface(0xFF),
            interface(0xFF),
            interface(0xFF, alternate=1),
            interface(0xFF, alternate=2),
            interface(0xFF),
            interface(0xFF, number=7),
            interface(0xFF, alternate=1),
            interface(0xFF),
        )

    told = parse_configuration(Many().describe(HIGH).configurations[0])
    assert [(i.number, i.alternate) for i in told.interfaces] == [
        (0, 0),
        (1, 0),
        (1, 1),
        (1, 2),
        (2, 0),
        (7, 0),
        (7, 1),
        (8, 0),
    ]


def test_class_specific_descriptors() -> None:
    """One piece or several; behind the interface, behind an endpoint; and bytes that lengthen an endpoint's."""
    pieces = [raw("05 24 00 10 01"), raw("04 24 02 02")]

    class Sound(Declaration):
        interfaces = (interface(1, iso_out(0x01, 192, tail=bytes(2), extra=raw("07 25 01 00 00 00 00")), extra=pieces),)

    told = Sound().describe(FULL).configurations[0]
    assert told[9:] == raw(
        "09 04 00 00 01 01 00 00 00  05 24 00 10 01  04 24 02 02  09 05 01 01 c0 00 01 00 00  07 25 01 00 00 00 00"
    )


def test_descriptors_of_interfaces() -> None:
    class Keys(Declaration):
        interfaces = (
            interface(0xFF),
            interface(3, interrupt_in(0x81, 8), descriptors={0x22: b"report", 0x21: b"hid"}),
        )

    assert Keys().describe(HIGH).answers == {(0x81, 6, 0x2200, 1): b"report", (0x81, 6, 0x2100, 1): b"hid"}


def test_associations() -> None:
    """In front of their first interface; the device says that it has some."""

    class Serial(Declaration):
        interfaces = (
            interface(0xFF),
            association(
                interface(2, interrupt_in(0x82, 16), subclass=2, protocol=1),
                interface(0x0A, bulk_out(0x01), bulk_in(0x81)),
                name="port",
            ),
        )

    told = Serial().describe(HIGH)
    first, second, third = parse_configuration(told.configurations[0]).interfaces
    assert (first.association, third.association) == (b"", b"")
    assert second.association == raw("08 0b 01 02 02 02 01 02")
    assert told.strings[2] == "port"
    assert told.device[4:7] == raw("ef 02 01")


def test_an_association_says_what_it_is() -> None:
    class Sound(Declaration):
        device_class, device_subclass, device_protocol = 0xFF, 1, 2
        interfaces = (association(interface(1, number=3), function_class=4, subclass=5, protocol=6),)

    told = Sound().describe(HIGH)
    assert parse_configuration(told.configurations[0]).interfaces[0].association == raw("08 0b 03 01 04 05 06 00")
    assert told.device[4:7] == raw("ff 01 02")


def test_configurations() -> None:
    class Two(Declaration):
        max_power = 100
        configurations = (
            configuration(interface(0xFF), name="first"),
            configuration(interface(0xFF), value=7, max_power=7, self_powered=True, remote_wakeup=True),
        )

    told = Two().describe(HIGH)
    assert [raw[5:9] for raw in told.configurations] == [raw("01 02 80 32"), raw("07 00 e0 04")]
    assert told.device[17] == 2


# ================================================================ endpoints


@pytest.mark.parametrize(
    ("declared", "speed", "expected"),
    [
        (bulk_in(0x81), FULL, "07 05 81 02 40 00 00"),
        (bulk_in(0x81, size={FULL: 16}), FULL, "07 05 81 02 10 00 00"),
        (bulk_in(0x81, size={FULL: 16}, max_burst=3, max_streams=4), HIGH, "07 05 81 02 00 02 00"),
        (bulk_out(0x0F, max_burst=15, max_streams=16), SUPER, "07 05 0f 02 00 04 00 06 30 0f 04 00 00"),
        (bulk_out(0x01, max_streams=65536), SUPER, "07 05 01 02 00 04 00 06 30 00 10 00 00"),
        (interrupt_in(0x81), LOW, "07 05 81 03 08 00 0a"),
        (interrupt_in(0x81), FULL, "07 05 81 03 40 00 0a"),
        (interrupt_in(0x81), HIGH, "07 05 81 03 40 00 07"),
        (interrupt_out(0x01, 8, period=0.001), SUPER, "07 05 01 03 08 00 04 06 30 00 00 08 00"),
        (interrupt_in(0x81, 3072, interval=1), HIGH, "07 05 81 03 00 14 01"),
        (interrupt_in(0x81, 3072, interval=1), SUPER, "07 05 81 03 00 04 01 06 30 02 00 00 0c"),
        (interrupt_in(0x81, {HIGH: 100}), FULL, "07 05 81 03 40 00 0a"),
        (iso_in(0x81, 1023), FULL, "07 05 81 01 ff 03 01"),
        (iso_in(0x81, 1024), HIGH, "07 05 81 01 00 04 04"),
        (iso_in(0x81, 1025), HIGH, "07 05 81 01 01 0a 04"),
        (iso_in(0x81, 2049), HIGH, "07 05 81 01 ab 12 04"),
        (iso_in(0x81, 0), HIGH, "07 05 81 01 00 00 04"),
        (iso_in(0x81, 16384, interval=1), SUPER, "07 05 81 01 00 04 01 06 30 0f 00 00 40"),
        (iso_out(0x01, 8, synchronization="adaptive"), FULL, "07 05 01 09 08 00 01"),
        (iso_in(0x81, 3, synchronization="asynchronous", usage="feedback", interval=3), FULL, "07 05 81 15 03 00 03"),
    ],
)
def test_endpoints(declared: EndpointDeclaration, speed: Speed, expected: str) -> None:
    class One(Declaration):
        interfaces = (interface(0xFF, declared),)

    assert One().describe(speed).configurations[0][18:] == raw(expected)


@pytest.mark.parametrize(
    ("kind", "speed", "period", "expected"),
    [
        (INTERRUPT, LOW, 0.001, 10),
        (INTERRUPT, LOW, 0.0109, 10),
        (INTERRUPT, FULL, 0.0, 1),
        (INTERRUPT, FULL, 0.032, 32),
        (INTERRUPT, FULL, 9.0, 255),
        (INTERRUPT, FULL, 43 / 1000, 43),  # a division that gives a little less
        (INTERRUPT, HIGH, 0.0, 1),
        (INTERRUPT, HIGH, 0.000125, 1),
        (INTERRUPT, HIGH, 0.0009, 3),
        (INTERRUPT, HIGH, 0.001, 4),
        (INTERRUPT, SUPER, 100.0, 16),
        (ISO, FULL, 0.001, 1),
        (ISO, FULL, 0.0039, 2),
        (ISO, FULL, 0.004, 3),
        (ISO, HIGH, 0.001, 4),
    ],
)
def test_intervals(kind: TransferType, speed: Speed, period: float, expected: int) -> None:
    """The longest interval that is no longer than the period, or the shortest there is."""
    assert endpoint_at(EndpointDeclaration(0x81, kind, 8, period), speed).interval == expected


@given(
    st.sampled_from([(INTERRUPT, LOW), (INTERRUPT, FULL), (INTERRUPT, HIGH), (ISO, FULL), (ISO, HIGH), (ISO, SUPER)]),
    st.floats(0, 5),
)
def test_any_period(where: tuple[TransferType, Speed], period: float) -> None:
    """No longer than wished where possible, and more than half of it where the speed has so long ones."""
    kind, speed = where
    endpoint = endpoint_at(EndpointDeclaration(0x81, kind, 8, period), speed)
    seconds = interval_seconds(endpoint, speed)
    shortest = endpoint_at(EndpointDeclaration(0x81, kind, 8, 0.0), speed)
    assert seconds <= max(period * 1.001, interval_seconds(shortest, speed))
    longest = endpoint_at(EndpointDeclaration(0x81, kind, 8, 100.0), speed)
    assert seconds > period / 2.001 or endpoint.interval == longest.interval


@given(st.sampled_from([HIGH, SUPER]), st.sampled_from([INTERRUPT, ISO]), st.integers(0, 3072))
def test_any_size(speed: Speed, kind: TransferType, size: int) -> None:
    """What a host makes of the descriptor has room for the size, and fewer than three bytes more."""
    endpoint = endpoint_at(EndpointDeclaration(0x81, kind, size, 0.001), speed)
    packets = (endpoint.raw_max_packet_size >> 11) + 1 + endpoint.max_burst
    room = packets * (endpoint.raw_max_packet_size & 0x7FF)
    if speed is SUPER:
        assert endpoint.bytes_per_interval == size <= room
    else:
        assert size <= room < size + 3
        assert kind is INTERRUPT or max_packet_size(endpoint, speed) == room


# ================================================================ what USB forbids


def described(*interfaces: Any, **attributes: Any) -> Callable[[Speed], Description]:
    device = type("Device", (Declaration,), {"interfaces": interfaces, **attributes})()
    assert isinstance(device, Declaration)
    return device.describe


@pytest.mark.parametrize(
    ("endpoint", "speed", "words"),
    [
        (bulk_in(0x81), LOW, "endpoint 0x81: there are no bulk endpoints at low speed"),
        (iso_out(0x01, 8), LOW, "endpoint 0x01: there are no isochronous endpoints at low speed"),
        (interrupt_in(0x81, 9), LOW, "at low speed at most 8 bytes .* not 9"),
        (interrupt_in(0x81, 65), FULL, "at full speed at most 64 bytes .* not 65"),
        (iso_in(0x81, 1024), FULL, "at full speed at most 1023 bytes .* not 1024"),
        (iso_in(0x81, 3073), HIGH, "at high speed at most 3072 bytes .* not 3073"),
        (interrupt_in(0x81, 3073), SUPER, "at super speed at most 3072"),
        (iso_in(0x81, 16385), SUPER, "at super speed at most 16384"),
        (interrupt_in(0x81, -1), FULL, "not -1"),
        (bulk_in(0x81, size=64), HIGH, "bulk packets of high speed have 512 bytes, not 64"),
        (bulk_in(0x81, size=63), FULL, "have 8, 16, 32, 64 bytes, not 63"),
        (bulk_in(0x81, size=512), SUPER, "have 1024 bytes, not 512"),
        (interrupt_in(0x81, 8, interval=9), LOW, "bInterval is 10 to 255 at low speed, not 9"),
        (interrupt_in(0x81, 8, interval=256), FULL, "1 to 255"),
        (interrupt_in(0x81, 8, interval=17), HIGH, "1 to 16 at high speed, not 17"),
        (iso_in(0x81, 8, interval=0), FULL, "1 to 16"),
    ],
)
def test_endpoints_that_cannot_be(endpoint: EndpointDeclaration, speed: Speed, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        described(interface(0xFF, endpoint))(speed)


@pytest.mark.parametrize(
    ("interfaces", "words"),
    [
        ((interface(1), interface(1, number=0)), "interface 0 has alternate setting 0 twice"),
        ((interface(1, bulk_in(0x81), bulk_in(0x81)),), "0x81 of interface 0 is declared twice"),
        ((interface(1, bulk_in(0x81)), interface(1, bulk_in(0x81))), "0x81 of interface . is declared twice"),
        ((association(interface(1, number=1), interface(1, number=3)),), r"consecutive numbers, not \[1, 3\]"),
    ],
)
def test_interfaces_that_cannot_be(interfaces: tuple[InterfaceDeclaration, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        described(*interfaces)(HIGH)


def test_alternate_settings_share_addresses() -> None:
    described(interface(1, bulk_in(0x81)), interface(1, bulk_in(0x81), alternate=1))(HIGH)


@pytest.mark.parametrize(
    ("attributes", "words"),
    [
        ({"configurations": (configuration(),)}, "either interfaces or configurations"),
        ({"max_power": 501}, "max_power is 0 to 500, not 501"),
        ({"max_power": -1}, "max_power is 0 to 500, not -1"),
        ({"usb_version": 0x10000}, "usb_version"),
        ({"device_protocol": 256}, "device_protocol"),
        ({"vendor_id": 0x10000}, "vendor_id is 0 to 65535, not 65536"),
        ({"device_class": -1}, "device_class is 0 to 255, not -1"),
    ],
)
def test_devices_that_cannot_be(attributes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        described(interface(1), **attributes)(HIGH)


def test_power_at_super_speed() -> None:
    """Up to 900 mA, in units of 8."""
    told = described(interface(1), max_power=900)(SUPER)
    assert told.configurations[0][8] == 113
    with pytest.raises(ValueError, match="0 to 900, not 901"):
        described(interface(1), max_power=901)(SUPER)


def test_speeds_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="low, full, high or super"):
        Stick().describe(Speed.UNKNOWN)


# ================================================================ what is declared in the library

LOOPBACK = """
12 01 00 02 ff 00 00 40 09 12 01 00 34 12 01 02 03 02
09 02 81 00 02 01 00 80 32
09 04 00 00 08 ff 00 00 00
07 05 01 02 00 02 00  07 05 81 02 00 02 00  07 05 02 02 00 02 00  07 05 82 02 00 02 00
07 05 03 03 40 00 04  07 05 83 03 40 00 04  07 05 85 02 00 02 00  07 05 86 02 00 02 00
09 04 01 00 00 ff 00 00 00
09 04 01 01 02 ff 00 00 00  07 05 04 01 ff 03 01  07 05 84 01 ff 03 01
09 04 01 02 02 ff 00 00 00  07 05 04 01 00 14 01  07 05 84 01 00 14 01
09 02 20 00 01 02 00 80 32  09 04 00 00 02 ff 00 00 00  07 05 01 02 00 02 00  07 05 81 02 00 02 00
"""


def test_the_loopback_device_is_what_it_was() -> None:
    """As it stands in recordings of other programs."""
    told = LoopbackDevice.describe(LoopbackDevice(), HIGH)
    assert told.device + b"".join(told.configurations) == raw(LOOPBACK)
