"""usbredir.descriptors: bytes of real devices and of liars."""

from __future__ import annotations

import struct

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from usbredir.descriptors import (
    Configuration,
    DeviceDescriptor,
    Endpoint,
    Interface,
    bos_descriptor,
    build_configuration,
    device_ids,
    interval_seconds,
    max_packet_size,
    parse_configuration,
    parse_device,
    string_descriptor,
)
from usbredir.filter import DeviceIds
from usbredir.proto import Speed, TransferType

STICK_DEVICE = bytes.fromhex("12 01 00 02 00 00 00 40 81 07 67 55 00 01 01 02 03 01")
"""Device descriptor of a USB stick."""
STICK = bytes.fromhex(
    "09 02 20 00 01 01 00 80 64"  # configuration 1, bus powered, 200 mA
    "09 04 00 00 02 08 06 50 00"  # interface 0: mass storage, SCSI, bulk only
    "07 05 81 02 00 02 00"
    "07 05 02 02 00 02 01"
)
"""Configuration of a USB stick."""
CAMERA = bytes.fromhex(
    "09 02 5b 00 02 01 00 80 fa"
    "08 0b 00 02 0e 03 00 00"  # interface association
    "09 04 00 00 01 0e 01 00 04"
    "0d 24 01 00 01 0d 00 80 8d 5b 00 01 01"  # class-specific, before any endpoint
    "07 05 83 03 10 00 08"
    "05 25 03 10 00"  # class-specific, behind the endpoint
    "09 04 01 00 00 0e 02 00 00"
    "09 04 01 07 01 0e 02 00 00"
    "07 05 82 05 00 14 01"  # isochronous, 3 x 1024
    "09 04 01 02 01 0e 02 00 00"
    "07 05 82 05 80 00 01"
)
"""Configuration in the manner of a camera: an association, class-specific descriptors, alternates 0, 7 and 2."""
SUPER = bytes.fromhex(
    "09 02 39 00 01 02 03 e0 32"
    "09 04 00 00 03 08 06 62 05"
    "07 05 81 02 00 04 00 06 30 0f 04 00 00"  # 16 streams, bursts of 16
    "07 05 02 02 00 04 00 06 30 03 e0 00 00"  # bits that are no stream count
    "07 05 83 03 40 00 04 06 30 00 04 40 00"  # interrupt: no streams whatever the companion says
)
"""Configuration of a super-speed device with companion descriptors."""

# ---------------------------------------------------------------- reading


def test_device() -> None:
    assert parse_device(STICK_DEVICE) == DeviceDescriptor(
        usb_bcd=0x0200,
        device_class=0,
        device_subclass=0,
        device_protocol=0,
        max_packet_size0=64,
        vendor_id=0x0781,
        product_id=0x5567,
        device_version_bcd=0x0100,
        manufacturer_index=1,
        product_index=2,
        serial_index=3,
        configurations=1,
    )


@pytest.mark.parametrize("raw", [b"", STICK_DEVICE[:17], b"\x12\x02" + STICK_DEVICE[2:], STICK])
def test_no_device_descriptor(raw: bytes) -> None:
    with pytest.raises(ValueError, match="not a device descriptor"):
        parse_device(raw)


def test_stick() -> None:
    assert parse_configuration(STICK) == Configuration(
        value=1,
        attributes=0x80,
        max_power=100,
        interfaces=(
            Interface(
                0,
                0,
                8,
                6,
                0x50,
                endpoints=(Endpoint(0x81, 2, 512, 0, interface=0), Endpoint(0x02, 2, 512, 1, interface=0)),
            ),
        ),
    )


def test_camera() -> None:
    """Associations go with the interface behind them, other descriptors stay where they were, alternates keep order."""
    camera = parse_configuration(CAMERA)
    assert camera.numbers() == [0, 1]
    assert [(i.number, i.alternate) for i in camera.interfaces] == [(0, 0), (1, 0), (1, 7), (1, 2)]
    control = camera.first(0)
    assert control.association == bytes.fromhex("08 0b 00 02 0e 03 00 00")
    assert control.extra == bytes.fromhex("0d 24 01 00 01 0d 00 80 8d 5b 00 01 01")
    assert control.name_index == 4
    assert [(e.address, e.extra) for e in control.endpoints] == [(0x83, bytes.fromhex("05 25 03 10 00"))]
    assert camera.first(1).alternate == 0
    wide = camera.find(1, 7)
    assert wide is not None
    assert wide.endpoints == (Endpoint(0x82, 5, 0x1400, 1, interface=1),)
    assert wide.endpoints[0].type is TransferType.ISO
    assert camera.find(1, 1) is None
    with pytest.raises(KeyError):
        camera.first(2)


def test_companions() -> None:
    """Streams are 2 to the power of the low five bits, for bulk endpoints only."""
    (interface,) = parse_configuration(SUPER).interfaces
    assert [(e.max_streams, e.max_burst, e.companion, e.bytes_per_interval) for e in interface.endpoints] == [
        (16, 15, True, 0),
        (0, 3, True, 0),
        (0, 0, True, 64),
    ]


@pytest.mark.parametrize("power", range(32))
def test_stream_counts(power: int) -> None:
    raw = bytearray(SUPER)
    raw[18 + 7 + 3] = power
    endpoint = parse_configuration(bytes(raw)).interfaces[0].endpoints[0]
    assert endpoint.max_streams == (2**power if power else 0)


@pytest.mark.parametrize(
    "raw",
    [b"", b"\x09", STICK[:8], STICK_DEVICE, b"\x08\x02" + STICK[2:], b"\x00\x02" + STICK[2:], b"\x01" + STICK[1:]],
)
def test_no_configuration(raw: bytes) -> None:
    with pytest.raises(ValueError, match="not a configuration descriptor"):
        parse_configuration(raw)


@pytest.mark.parametrize("end", range(9, len(STICK)))
def test_cut_short(end: int) -> None:
    """What is whole before the cut counts."""
    whole = parse_configuration(STICK)
    cut = parse_configuration(STICK[:end])
    endpoints = (end - 18) // 7 if end >= 18 else 0
    assert len(cut.interfaces) == (end >= 18)
    if cut.interfaces:
        assert cut.interfaces[0].endpoints == whole.interfaces[0].endpoints[:endpoints]


@pytest.mark.parametrize("length", [0, 1])
def test_a_length_that_makes_no_sense_ends_the_reading(length: int) -> None:
    raw = STICK[:18] + bytes((length, 5)) + STICK[20:]
    assert parse_configuration(raw).interfaces[0].endpoints == ()


def test_endpoints_before_any_interface_are_passed_over() -> None:
    assert parse_configuration(STICK[:9] + STICK[18:]).interfaces == ()


@pytest.mark.parametrize("short", ["08 04 00 00 00 08 06 50", "06 05 81 02 00 02"])
def test_short_descriptors_are_not_taken_for_real_ones(short: str) -> None:
    """An interface or endpoint descriptor that is too short is kept as something unknown."""
    (interface,) = parse_configuration(STICK[:18] + bytes.fromhex(short)).interfaces
    assert interface.endpoints == ()
    assert interface.extra == bytes.fromhex(short)


def many_interfaces(count: int) -> Configuration:
    return Configuration(1, interfaces=tuple(Interface(n, a, 0xFF) for n in range(count) for a in (0, 1)))


def test_most_interfaces() -> None:
    """Alternate settings do not count."""
    assert len(parse_configuration(build_configuration(many_interfaces(32))).numbers()) == 32
    with pytest.raises(ValueError, match="33 interfaces"):
        parse_configuration(build_configuration(many_interfaces(33)))


@given(st.one_of(st.binary(max_size=80), st.binary(max_size=80).map(lambda tail: STICK[:9] + tail)))
@example(STICK[:18] + b"\x02\x05" * 20)
def test_any_bytes(raw: bytes) -> None:
    """A configuration whose values can be used, or ValueError."""
    try:
        configuration = parse_configuration(raw)
    except ValueError:
        return
    assert len(configuration.numbers()) <= 32
    for interface in configuration.interfaces:
        for endpoint in interface.endpoints:
            assert endpoint.type in set(TransferType)
            assert 0 <= max_packet_size(endpoint, Speed.HIGH) <= 3 * 0x7FF


@given(st.binary(max_size=24), st.one_of(st.none(), st.binary(max_size=60)))
def test_ids_of_any_bytes(device: bytes, configuration: bytes | None) -> None:
    try:
        ids = device_ids(device, configuration)
    except ValueError:
        return
    assert ids.vendor_id == int.from_bytes(device[8:10], "little")


# ---------------------------------------------------------------- sizes

ISO, BULK, INTERRUPT = 1, 2, 3


@pytest.mark.parametrize(
    ("kind", "raw", "speed", "expected"),
    [
        (ISO, 0x0400, Speed.HIGH, 1024),
        (ISO, 0x0C00, Speed.HIGH, 2048),
        (ISO, 0x1400, Speed.HIGH, 3072),
        (ISO, 0x1C00, Speed.HIGH, 1024),  # reserved value
        (ISO, 0xF400, Speed.HIGH, 3072),  # bits above do not matter
        (ISO, 0x1400, Speed.FULL, 1024),
        (ISO, 0x1400, Speed.SUPER, 1024),
        (ISO, 0x1400, Speed.UNKNOWN, 1024),
        (ISO + 0x24, 0x1400, Speed.HIGH, 3072),  # synchronisation and usage bits of bmAttributes
        (INTERRUPT, 0x1400, Speed.HIGH, 1024),
        (BULK, 0x1200, Speed.HIGH, 512),
        (BULK, 0x07FF, Speed.HIGH, 2047),
        (ISO, 0, Speed.HIGH, 0),
    ],
)
def test_max_packet_size(kind: int, raw: int, speed: Speed, expected: int) -> None:
    """Only high-bandwidth isochronous endpoints of high-speed devices are multiplied."""
    assert max_packet_size(Endpoint(0x81, kind, raw), speed) == expected


@pytest.mark.parametrize(
    ("kind", "interval", "speed", "expected"),
    [
        (INTERRUPT, 10, Speed.LOW, 0.01),
        (INTERRUPT, 255, Speed.FULL, 0.255),
        (INTERRUPT, 1, Speed.HIGH, 0.000125),
        (INTERRUPT, 4, Speed.HIGH, 0.001),
        (INTERRUPT, 16, Speed.SUPER, 4.096),
        (ISO, 1, Speed.FULL, 0.001),
        (ISO, 4, Speed.FULL, 0.008),
        (ISO, 1, Speed.HIGH, 0.000125),
        (ISO + 0x24, 2, Speed.SUPER, 0.00025),
        (INTERRUPT, 0, Speed.FULL, 0.001),  # what the specification does not allow
        (INTERRUPT, 0, Speed.HIGH, 0.000125),
        (INTERRUPT, 255, Speed.HIGH, 4.096),
        (BULK, 4, Speed.HIGH, 0.0),
        (0, 4, Speed.HIGH, 0.0),
    ],
)
def test_intervals(kind: int, interval: int, speed: Speed, expected: float) -> None:
    assert interval_seconds(Endpoint(0x81, kind, 8, interval), speed) == pytest.approx(expected)


# ---------------------------------------------------------------- what filters look at


def test_ids() -> None:
    """Interface classes come from the first alternate setting of each interface."""
    configuration = Configuration(
        1, interfaces=(Interface(4, 3, 1, 2, 3), Interface(4, 0, 9, 9, 9), Interface(2, 0, 8))
    )
    device = DeviceDescriptor(0x0200, 0xEF, 2, 1, 64, 0x1234, 0x5678, 0x0102, 0, 0, 0).to_bytes()
    expected = DeviceIds(0xEF, 2, 1, 0x1234, 0x5678, 0x0102, ((1, 2, 3), (8, 0, 0)))
    assert device_ids(device, build_configuration(configuration)) == expected
    assert device_ids(device, None) == expected._replace(interfaces=())


@pytest.mark.parametrize(("device", "configuration"), [(b"", STICK), (STICK_DEVICE, b""), (STICK_DEVICE, STICK_DEVICE)])
def test_ids_of_nonsense(device: bytes, configuration: bytes) -> None:
    with pytest.raises(ValueError, match="descriptor"):
        device_ids(device, configuration)


# ---------------------------------------------------------------- building


def test_built_device_is_the_same() -> None:
    assert parse_device(STICK_DEVICE).to_bytes() == STICK_DEVICE


@pytest.mark.parametrize("raw", [STICK, SUPER[:31]])
def test_built_configuration_is_the_same(raw: bytes) -> None:
    raw = raw[:2] + struct.pack("<H", len(raw)) + raw[4:]
    interfaces = parse_configuration(raw).interfaces
    raw = raw.replace(b"\x09\x04\x00\x00\x03", bytes((9, 4, 0, 0, len(interfaces[0].endpoints))))
    assert build_configuration(parse_configuration(raw)) == raw


u8, u16 = st.integers(0, 255), st.integers(0, 65535)
pieces = st.builds(
    lambda kind, body: bytes((len(body) + 2, kind)) + body, st.integers(0x21, 0x2F), st.binary(max_size=5)
)
extras = st.lists(pieces, max_size=2).map(b"".join)


@st.composite
def endpoints(draw: st.DrawFn, interface: int) -> Endpoint:
    attributes = draw(u8)
    companion = draw(st.booleans())
    power = draw(st.integers(0, 31)) if companion and attributes & 3 == BULK else 0
    return Endpoint(
        draw(u8),
        attributes,
        draw(u16),
        draw(u8),
        interface=interface,
        max_burst=draw(u8) if companion else 0,
        max_streams=1 << power if power else 0,
        companion=companion,
        bytes_per_interval=draw(u16) if companion else 0,
        tail=draw(st.binary(max_size=2)),
        extra=draw(extras),
    )


@st.composite
def interfaces(draw: st.DrawFn) -> Interface:
    number = draw(st.integers(0, 5))
    ends = tuple(draw(st.lists(endpoints(number), max_size=3)))
    association = draw(st.sampled_from([b"", bytes.fromhex("08 0b 00 01 0e 03 00 00")]))
    return Interface(
        number, draw(u8), draw(u8), draw(u8), draw(u8), draw(u8), ends, draw(extras), association=association
    )


configurations = st.builds(Configuration, u8, u8, u8, u8, st.lists(interfaces(), max_size=4).map(tuple))


@given(configurations)
def test_round_trip(configuration: Configuration) -> None:
    """What is built is read back as it was, and the lengths inside are right."""
    raw = build_configuration(configuration)
    assert parse_configuration(raw) == configuration
    assert struct.unpack_from("<H", raw, 2)[0] == len(raw)
    assert raw[4] == len(configuration.numbers())


@pytest.mark.parametrize(
    ("text", "size"),
    [("", 2), ("A", 4), ("é漢", 6), ("x" * 126, 254), ("x" * 127, 254), ("\N{GRINNING FACE}" * 63, 254)],
)
def test_string(text: str, size: int) -> None:
    """UTF-16, cut at what a length byte can say."""
    raw = string_descriptor(text)
    assert raw[:2] == bytes((size, 3))
    assert len(raw) == size
    assert text.startswith(raw[2:].decode("utf-16-le"))


def test_a_long_string_is_cut_between_characters() -> None:
    string_descriptor("x" + "\N{GRINNING FACE}" * 63)[2:].decode("utf-16-le")


def test_bos() -> None:
    capability = bytes.fromhex("07 10 02 02 00 00 00")
    assert bos_descriptor([capability, capability]) == bytes.fromhex("05 0f 13 00 02") + 2 * capability
    assert bos_descriptor([]) == bytes.fromhex("05 0f 05 00 00")
