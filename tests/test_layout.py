"""From declarations to bytes: sizes and offsets against the protocol's tables, and the generated functions."""

from __future__ import annotations

import struct
from array import array as number_array
from collections.abc import Callable
from typing import Any, NoReturn

import pytest
from hypothesis import given
from hypothesis import strategies as st

from usbredir import _framing
from usbredir._layout import (
    REPLY,
    SMALL,
    Large,
    Reject,
    Wire,
    array,
    compile_decoder,
    compile_sender,
    describe_layout,
    header_struct,
)
from usbredir.capabilities import ALL, mask_of
from usbredir.packets import (
    PACKET_TYPES,
    BufferedBulkPacket,
    BulkPacket,
    ControlPacket,
    DeviceConnect,
    EpInfo,
    Hello,
    IsoPacket,
    Packet,
    PacketType,
    Reset,
    StartBulkReceiving,
)
from usbredir.proto import MAX_BULK, Capability, Direction

from .strategies import capability_words, packets_of

HOST, GUEST = Direction.HOST_TO_GUEST, Direction.GUEST_TO_HOST
EVERYTHING = mask_of(ALL)


def refuse(error: Exception) -> NoReturn:
    raise error


def encoder_of(*arguments: Any) -> Callable[..., bytes | Large]:
    """What a sender that was compiled with *arguments* would queue."""
    queue: list[bytes | Large] = []
    send = compile_sender(*arguments)(queue.append, refuse)

    def encode(*values: object) -> bytes | Large:
        send(*values)
        return queue.pop()

    return encode


# The TH column of the protocol's table: bytes of the type header; several where capabilities change it.
TYPE_HEADER: dict[int, int] = (
    {0: 64, 2: 0, 3: 0, 4: 132, 6: 1, 7: 0, 8: 2, 9: 2, 10: 1, 11: 3, 12: 3, 13: 1, 14: 2, 15: 1, 16: 1, 17: 2}
    | {18: 8, 19: 4, 20: 9, 21: 0, 22: 0, 23: 0, 24: 0, 25: 10, 26: 5, 27: 6}
    | {100: 10, 102: 4, 103: 4, 104: 10}
)
VARIABLE: list[tuple[int, list[Capability], int]] = [
    (1, [], 8),
    (1, [Capability.CONNECT_DEVICE_VERSION], 10),
    (5, [], 96),
    (5, [Capability.EP_INFO_MAX_PACKET_SIZE], 160),
    (5, [Capability.BULK_STREAMS, Capability.EP_INFO_MAX_PACKET_SIZE], 288),
    (5, [Capability.BULK_STREAMS], 288),  # only a migration state can say so
    (101, [], 8),
    (101, [Capability.BULK_LENGTH_32BITS], 10),
]

# Offsets and widths of the protocol's 1.4, with all capabilities.
OFFSETS: list[tuple[int, str]] = [
    (0, "0:64 version"),
    (
        1,
        "0:1 speed, 1:1 device_class, 2:1 device_subclass, 3:1 device_protocol, 4:2 vendor_id, 6:2 product_id, "
        "8:2 device_version_bcd",
    ),
    (
        4,
        "0:4 interface_count, 4:32 interface, 36:32 interface_class, 68:32 interface_subclass, "
        "100:32 interface_protocol",
    ),
    (5, "0:32 type, 32:32 interval, 64:32 interface, 96:64 max_packet_size, 160:128 max_streams"),
    (8, "0:1 status, 1:1 configuration"),
    (9, "0:1 interface, 1:1 alt"),
    (11, "0:1 status, 1:1 interface, 2:1 alt"),
    (12, "0:1 endpoint, 1:1 pkts_per_urb, 2:1 no_urbs"),
    (14, "0:1 status, 1:1 endpoint"),
    (17, "0:1 status, 1:1 endpoint"),
    (18, "0:4 endpoints, 4:4 no_streams"),
    (20, "0:4 endpoints, 4:4 no_streams, 8:1 status"),
    (25, "0:4 stream_id, 4:4 bytes_per_transfer, 8:1 endpoint, 9:1 no_transfers"),
    (26, "0:4 stream_id, 4:1 endpoint"),
    (27, "0:4 stream_id, 4:1 endpoint, 5:1 status"),
    (100, "0:1 endpoint, 1:1 request, 2:1 requesttype, 3:1 status, 4:2 value, 6:2 index, 8:2 length"),
    (101, "0:1 endpoint, 1:1 status, 2:2 length, 4:4 stream_id, 8:2 length_high"),
    (102, "0:1 endpoint, 1:1 status, 2:2 length"),
    (103, "0:1 endpoint, 1:1 status, 2:2 length"),
    (104, "0:4 stream_id, 4:4 length, 8:1 endpoint, 9:1 status"),
]


def size_of(cls: type[Packet], both: int) -> int:
    """Bytes of the type header according to describe_layout."""
    return sum(size for _, size, _ in describe_layout(cls.declaration, both))


def joined(encoded: bytes | Large) -> bytes:
    """An encoder's result as one."""
    return encoded if isinstance(encoded, bytes) else b"".join(encoded.parts)


def test_the_tables_here_know_every_packet() -> None:
    assert set(TYPE_HEADER) | {number for number, _, _ in VARIABLE} == set(PACKET_TYPES)


@pytest.mark.parametrize(("number", "size"), TYPE_HEADER.items())
def test_fixed_sizes(number: int, size: int) -> None:
    """Whatever the capabilities."""
    for both in (0, EVERYTHING, 2**32 - 1):
        assert size_of(PACKET_TYPES[number], both) == size
        assert compile_decoder(PACKET_TYPES[number].declaration, both, both, HOST, MAX_BULK)[0] == size


@pytest.mark.parametrize(("number", "capabilities", "size"), VARIABLE)
def test_sizes_that_capabilities_change(number: int, capabilities: list[Capability], size: int) -> None:
    """With just these capabilities, and with all others that do not concern the packet beside them."""
    cls = PACKET_TYPES[number]
    both = mask_of(capabilities)
    others = (2**32 - 1) & ~cls.declaration.capabilities
    assert size_of(cls, both) == size_of(cls, both | others) == size


@pytest.mark.parametrize(("number", "expected"), OFFSETS)
def test_offsets(number: int, expected: str) -> None:
    rows = describe_layout(PACKET_TYPES[number].declaration, EVERYTHING)
    assert ", ".join(f"{offset}:{size} {name}" for offset, size, name in rows) == expected


@given(st.sampled_from(list(PACKET_TYPES.values())), capability_words)
def test_rows_follow_one_another(cls: type[Packet], both: int) -> None:
    """No gap, no overlap; fewer capabilities leave out rows and nothing else."""
    end = 0
    for offset, size, _ in describe_layout(cls.declaration, both):
        assert offset == end
        end = offset + size
    all_names = [name for _, _, name in describe_layout(cls.declaration, EVERYTHING)]
    names = [name for _, _, name in describe_layout(cls.declaration, both)]
    assert names == [name for name in all_names if name in names]
    assert end == struct.calcsize("<" + cls.declaration.header_format(both))


def test_packet_headers() -> None:
    assert (header_struct(False).size, header_struct(True).size) == (12, 16)
    assert header_struct(False).pack(1, 2, 3) == bytes.fromhex("01000000 02000000 03000000")
    assert header_struct(True).pack(1, 2, 3) == bytes.fromhex("01000000 02000000 0300000000000000")


# ---------------------------------------------------------------- encoders and decoders


@given(st.data(), capability_words, st.booleans(), st.sampled_from([HOST, GUEST]))
def test_what_is_encoded_has_the_size_it_announces(
    data: st.DataObject, both: int, wide: bool, direction: Direction
) -> None:
    cls = data.draw(st.sampled_from([c for c in PACKET_TYPES.values() if c.declaration.may_travel(direction)]))
    packet = data.draw(packets_of(cls, direction, both))
    if not wide:
        packet = packet.replace(id=packet.id & 0xFFFFFFFF)
    encoded = encoder_of(cls.declaration, wide, both, 2**32 - 1, direction, MAX_BULK)(packet)
    whole = joined(encoded)
    header = header_struct(wide)
    number, length, packet_id = header.unpack_from(whole)
    assert (number, packet_id) == (cls.packet_type, packet.id)
    assert length == len(whole) - header.size
    size, decode = compile_decoder(cls.declaration, both, 2**32 - 1, direction, MAX_BULK)
    decoded = decode(whole, header.size, packet_id, whole[header.size + size :])
    assert (cls.packet_type, size) == (PacketType.HELLO, 64) or size == size_of(cls, both)
    again = encoder_of(cls.declaration, wide, both, 2**32 - 1, direction, MAX_BULK)(decoded)
    assert joined(again) == whole


@pytest.mark.parametrize("size", [0, SMALL, SMALL + 1, 5 * SMALL])
def test_large_payloads_are_not_copied(size: int) -> None:
    encode = encoder_of(BulkPacket.declaration, True, EVERYTHING, 0, GUEST, MAX_BULK)
    data = bytes(size)
    encoded = encode(BulkPacket(endpoint=2, data=data))
    if size > SMALL:
        assert isinstance(encoded, Large)
        assert encoded.parts[1] is data
        assert len(encoded) == 26 + size
    else:
        assert isinstance(encoded, bytes)


@pytest.mark.parametrize("size", [10, SMALL + 10])
def test_other_buffers_are_copied(size: int) -> None:
    encode = encoder_of(BulkPacket.declaration, True, EVERYTHING, 0, GUEST, MAX_BULK)
    for source in (bytearray(size), number_array("H", bytes(size))):
        encoded = encode(BulkPacket(endpoint=2, data=source))  # type: ignore[arg-type]
        before = joined(encoded)
        source[0] = 0xFF
        assert joined(encoded) == before


@pytest.mark.parametrize(
    ("packet", "direction", "peer", "reason"),
    [
        (BulkPacket(endpoint=2, length=3, data=b"12"), GUEST, 0, "data_length_mismatch"),
        (BulkPacket(endpoint=0x82, data=b"12"), GUEST, 0, "unexpected_data"),
        (BulkPacket(endpoint=0x82, length=MAX_BULK + 1), GUEST, 0, "bulk_length_limit"),
        (IsoPacket(endpoint=0x82), GUEST, 0, "wrong_direction"),
        (IsoPacket(endpoint=0x02), HOST, 0, "wrong_direction"),
        (BufferedBulkPacket(endpoint=0x82), HOST, 0, "missing_cap_bulk_receiving"),
        (StartBulkReceiving(endpoint=0x82), GUEST, 0x7F, "missing_cap_bulk_receiving"),
        (StartBulkReceiving(endpoint=0x02), GUEST, 0x80, "endpoint_not_input"),
        (StartBulkReceiving(endpoint=0x82, bytes_per_transfer=MAX_BULK + 1), GUEST, 0x80, "bulk_length_limit"),
    ],
)
def test_rules_are_compiled_in(packet: Packet, direction: Direction, peer: int, reason: str) -> None:
    encode = encoder_of(packet.declaration, True, EVERYTHING, peer, direction, MAX_BULK)
    with pytest.raises(Reject) as caught:
        encode(packet)
    assert caught.value.reason == reason


def test_every_reason_has_its_text() -> None:
    """Whatever a declaration can be rejected for is explained in REASONS."""
    for cls in PACKET_TYPES.values():
        declaration = cls.declaration
        reasons = {f.at_most.reason for f in declaration.fields if f.at_most is not None}
        if declaration.needs is not None:
            with pytest.raises(Reject) as caught:
                encoder_of(declaration, True, 0, 0, GUEST, MAX_BULK)(cls())
            reasons.add(caught.value.reason)
        assert reasons <= set(_framing.REASONS), cls


def test_functions_are_shared() -> None:
    """Connections with the same capabilities use the same functions; capabilities of other packets do not matter."""
    first = compile_decoder(ControlPacket.declaration, EVERYTHING, EVERYTHING, HOST, MAX_BULK)[1]
    assert compile_decoder(ControlPacket.declaration, 0, 0, HOST, MAX_BULK)[1] is first
    assert (
        compile_decoder(BulkPacket.declaration, 0, 0, HOST, MAX_BULK)[1]
        is not (compile_decoder(BulkPacket.declaration, EVERYTHING, 0, HOST, MAX_BULK)[1])
    )


def test_generated_functions_have_names() -> None:
    """For tracebacks."""
    send = compile_sender(Reset.declaration, True, 0, 0, GUEST, MAX_BULK)(print, refuse)
    assert send.__qualname__ == "Reset.send"
    assert Reset.__new__.__qualname__ == "Reset.__new__"


# ---------------------------------------------------------------- declarations


def test_where_fields_are_present() -> None:
    sizes = next(f.wire for f in EpInfo.declaration.fields if f.name == "max_packet_size")
    assert not sizes.present(0)
    assert sizes.present(mask_of([Capability.BULK_STREAMS]))
    assert sizes.present(mask_of([Capability.EP_INFO_MAX_PACKET_SIZE]))
    assert Wire("B").present(0)


def test_capabilities_that_change_a_layout() -> None:
    assert DeviceConnect.declaration.capabilities == mask_of([Capability.CONNECT_DEVICE_VERSION])
    assert EpInfo.declaration.capabilities == mask_of([Capability.BULK_STREAMS, Capability.EP_INFO_MAX_PACKET_SIZE])
    assert BulkPacket.declaration.capabilities == mask_of([Capability.BULK_LENGTH_32BITS])
    assert all(
        cls.declaration.capabilities == 0
        for cls in PACKET_TYPES.values()
        if cls not in (DeviceConnect, EpInfo, BulkPacket)
    )


def test_who_may_send() -> None:
    assert Hello.declaration.may_travel(HOST)
    assert Hello.declaration.may_travel(GUEST)
    assert DeviceConnect.declaration.may_travel(HOST)
    assert not DeviceConnect.declaration.may_travel(GUEST)
    assert not Reset.declaration.may_travel(HOST)


def test_data_is_possible_where_the_table_says() -> None:
    with_data = {number for number, cls in PACKET_TYPES.items() if cls.declaration.has_data}
    assert with_data == {0, 23, 100, 101, 102, 103, 104}


@pytest.mark.parametrize(("code", "size"), [("B", 32), ("H", 64), ("I", 128)])
def test_array(code: str, size: int) -> None:
    """A table travels as 32 numbers and is a tuple again."""
    wire, default = array(code, 3)
    assert default == (3,) * 32
    assert wire.to_wire is not None
    assert wire.from_wire is not None
    packed = wire.to_wire(range(32))
    assert len(packed) == size
    assert wire.from_wire(packed) == tuple(range(32))


def encoder(cls: type[Packet], *given: str) -> Callable[..., bytes | Large]:
    """An encoder of a host that has every capability."""
    return encoder_of(cls.declaration, True, EVERYTHING, EVERYTHING, HOST, MAX_BULK, given or ("packet",))


@given(st.data(), st.sampled_from([ControlPacket, BulkPacket]))
def test_an_encoder_of_replies(data: st.DataObject, cls: type[Packet]) -> None:
    """Status, length and data are replaced, everything else of the request stays."""
    request = data.draw(packets_of(cls, GUEST, EVERYTHING)).replace(endpoint=0x81)
    reply = request.replace(status=4, length=3, data=b"abc")
    assert encoder(cls, *REPLY)(request, 4, 3, b"abc") == encoder(cls)(reply)


def test_a_sender_without_an_id() -> None:
    """It is 0, as in a packet."""
    assert encoder(BulkPacket, "endpoint", "data")(0x81, b"xy") == encoder(BulkPacket)(
        BulkPacket(endpoint=0x81, data=b"xy")
    )


def test_a_sender_of_values_that_a_packet_has_not() -> None:
    with pytest.raises(TypeError, match="BulkPacket has no interval, pid: it has id, endpoint"):
        encoder(BulkPacket, "endpoint", "interval", "pid")


def test_an_encoder_of_some_values() -> None:
    """The rest have their defaults."""
    some = encoder(BufferedBulkPacket, "endpoint", "data", "id", "length")
    assert some(0x81, b"xy", 7, 2) == encoder(BufferedBulkPacket)(BufferedBulkPacket(id=7, endpoint=0x81, data=b"xy"))


@pytest.mark.parametrize("size", [3, SMALL, SMALL + 1])
def test_values_are_not_copied(size: int) -> None:
    """The same bytes as of a packet; large data is the very object."""
    data = memoryview(bytearray(size))
    copied = encoder(BulkPacket)(BulkPacket(id=1, endpoint=0x81, data=data))
    owned = encoder(BulkPacket, "id", "endpoint", "length", "data")(1, 0x81, size, data)
    if isinstance(owned, Large):
        assert owned.parts[1] is data
        assert isinstance(copied, Large)
        assert copied.parts == (owned.parts[0], bytes(data))
    else:
        assert owned == copied
        assert type(owned) is bytes
