"""Packets as values, and through two parsers: one table of the protocol, and properties over all types."""

from __future__ import annotations

import copy
import operator
import pickle
import re
from array import array
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from usbredir import packets as packets_module
from usbredir import proto
from usbredir._layout import Declaration, constructor
from usbredir.capabilities import ALL, mask_of
from usbredir.filter import FilterRule
from usbredir.packets import (
    PACKET_TYPES,
    BulkPacket,
    CancelDataPacket,
    Capability,
    ConfigurationStatus,
    ControlPacket,
    DataPacket,
    DeviceConnect,
    EpInfo,
    FilterFilter,
    GetConfiguration,
    Hello,
    InterfaceInfo,
    InterruptPacket,
    IsoPacket,
    Packet,
    PacketType,
    Reset,
    Speed,
    Status,
    TransferType,
)
from usbredir.parser import Parser
from usbredir.proto import Direction

from .strategies import (
    BY_ITSELF,
    End,
    as_received,
    bits,
    capability_words,
    carry,
    packets,
    packets_of,
    parser_pair,
    sendable,
    settled,
    valid_packet,
)

HOST, GUEST, BOTH = Direction.HOST_TO_GUEST, Direction.GUEST_TO_HOST, Direction.BOTH
DATA = ("ControlPacket", "BulkPacket", "IsoPacket", "InterruptPacket", "BufferedBulkPacket")

# number, name, who sends it, whether the sender chooses the id, the fields in wire order (spec, 1.3 and 1.4)
PROTOCOL: list[tuple[int, str, Direction, bool, str]] = [
    (0, "Hello", BOTH, False, "version capabilities"),
    (
        1,
        "DeviceConnect",
        HOST,
        False,
        "speed device_class device_subclass device_protocol vendor_id product_id device_version_bcd",
    ),
    (2, "DeviceDisconnect", HOST, False, ""),
    (3, "Reset", GUEST, False, ""),
    (
        4,
        "InterfaceInfo",
        HOST,
        False,
        "interface_count interface interface_class interface_subclass interface_protocol",
    ),
    (5, "EpInfo", HOST, False, "type interval interface max_packet_size max_streams"),
    (6, "SetConfiguration", GUEST, True, "configuration"),
    (7, "GetConfiguration", GUEST, True, ""),
    (8, "ConfigurationStatus", HOST, True, "status configuration"),
    (9, "SetAltSetting", GUEST, True, "interface alt"),
    (10, "GetAltSetting", GUEST, True, "interface"),
    (11, "AltSettingStatus", HOST, True, "status interface alt"),
    (12, "StartIsoStream", GUEST, True, "endpoint pkts_per_urb no_urbs"),
    (13, "StopIsoStream", GUEST, True, "endpoint"),
    (14, "IsoStreamStatus", HOST, True, "status endpoint"),
    (15, "StartInterruptReceiving", GUEST, True, "endpoint"),
    (16, "StopInterruptReceiving", GUEST, True, "endpoint"),
    (17, "InterruptReceivingStatus", HOST, True, "status endpoint"),
    (18, "AllocBulkStreams", GUEST, True, "endpoints no_streams"),
    (19, "FreeBulkStreams", GUEST, True, "endpoints"),
    (20, "BulkStreamsStatus", HOST, True, "endpoints no_streams status"),
    (21, "CancelDataPacket", GUEST, True, ""),
    (22, "FilterReject", GUEST, False, ""),
    (23, "FilterFilter", BOTH, False, "rules"),
    (24, "DeviceDisconnectAck", GUEST, False, ""),
    (25, "StartBulkReceiving", GUEST, True, "stream_id bytes_per_transfer endpoint no_transfers"),
    (26, "StopBulkReceiving", GUEST, True, "stream_id endpoint"),
    (27, "BulkReceivingStatus", HOST, True, "stream_id endpoint status"),
    (100, "ControlPacket", BOTH, True, "endpoint request requesttype status value index length"),
    (101, "BulkPacket", BOTH, True, "endpoint status length stream_id"),
    (102, "IsoPacket", BOTH, True, "endpoint status length"),
    (103, "InterruptPacket", BOTH, True, "endpoint status length"),
    (104, "BufferedBulkPacket", HOST, True, "stream_id length endpoint status"),
]

every_type = pytest.mark.parametrize("cls", PACKET_TYPES.values(), ids=lambda cls: cls.__name__)
data_types = pytest.mark.parametrize("cls", [PACKET_TYPES[n] for n in range(100, 105)], ids=lambda cls: cls.__name__)


def make(cls: type[Packet], **values: Any) -> Any:
    """A packet of a type that is known only at run time."""
    return cls(**values)


@st.composite
def any_packet(draw: st.DrawFn) -> Packet:
    """Any packet at all, the two that parsers send by themselves included."""
    direction = draw(st.sampled_from([HOST, GUEST]))
    both = draw(capability_words)
    cls = draw(st.sampled_from([cls for cls in PACKET_TYPES.values() if cls.declaration.may_travel(direction)]))
    return draw(packets_of(cls, direction, both))


# ---------------------------------------------------------------- the registry


def test_the_registry_has_33_packets_in_order() -> None:
    assert len(PACKET_TYPES) == 33
    assert list(PACKET_TYPES) == sorted(PACKET_TYPES) == [int(member) for member in PacketType]
    assert [(number, cls.__name__) for number, cls in PACKET_TYPES.items()] == [row[:2] for row in PROTOCOL]


def test_the_registry_is_read_only() -> None:
    assert isinstance(PACKET_TYPES, Mapping)
    with pytest.raises(TypeError):
        PACKET_TYPES[200] = Reset  # type: ignore[index]


@pytest.mark.parametrize(
    ("number", "name", "direction", "carries_id", "fields"), PROTOCOL, ids=[r[1] for r in PROTOCOL]
)
def test_a_declaration_is_the_protocol_s(
    number: int, name: str, direction: Direction, carries_id: bool, fields: str
) -> None:
    """Number, class name, member of PacketType, direction, id, field names in wire order."""
    cls = PACKET_TYPES[number]
    declaration = cls.declaration
    assert getattr(packets_module, name) is cls
    assert name in packets_module.__all__
    assert cls.packet_type == number
    assert PacketType(number).name == re.sub(r"(?<!^)(?=[A-Z])", "_", name).upper()
    assert cls.direction is declaration.direction is direction
    assert declaration.carries_id is carries_id
    assert " ".join(f.name for f in declaration.fields) == fields
    assert issubclass(cls, DataPacket) is declaration.transfers is (name in DATA)


def test_the_enums_are_found_beside_the_packets() -> None:
    """API: PacketType, Status, Speed, TransferType and Capability are names of usbredir.packets."""
    for name in ("PacketType", "Status", "Speed", "TransferType", "Capability"):
        assert getattr(packets_module, name) is getattr(proto, name)


# ---------------------------------------------------------------- construction


@every_type
def test_everything_has_a_default(cls: type[Packet]) -> None:
    """Zero, a table of 32 zeros, nothing; and every packet has an id."""
    packet = make(cls)
    expected: dict[str, Any] = dict.fromkeys(cls.declaration.stored, 0)
    for name in ("interface", "type", "interval", "interface_class", "interface_subclass", "interface_protocol"):
        if cls in (InterfaceInfo, EpInfo) and name in expected:
            expected[name] = (0,) * 32
    for name in ("max_packet_size", "max_streams"):
        if name in expected:
            expected[name] = (0,) * 32
    for name, empty in {"data": b"", "version": "", "capabilities": frozenset(), "rules": ()}.items():
        if name in expected:
            expected[name] = empty
    assert packet.as_dict() == expected
    assert packet.id == 0


@every_type
def test_arguments_are_keywords(cls: type[Packet]) -> None:
    with pytest.raises(TypeError):
        make(cls, no_such_field=1)
    with pytest.raises(TypeError):
        cls(1)  # type: ignore[call-arg]


@every_type
def test_values_come_back(cls: type[Packet]) -> None:
    """Each field by its name, whatever its kind."""
    values: dict[str, Any] = {}
    for number, name in enumerate(cls.declaration.stored, 1):
        plain = getattr(make(cls), name)
        values[name] = tuple(range(32)) if isinstance(plain, tuple) and plain else number if plain == 0 else plain
    packet = make(cls, **values)
    assert packet.as_dict() == values
    assert all(getattr(packet, name) == value for name, value in values.items())


@data_types
def test_length_is_that_of_the_data(cls: type[Packet]) -> None:
    assert make(cls, data=b"four").length == 4
    assert make(cls).length == 0
    assert make(cls, data=b"four", length=9).length == 9
    assert make(cls, length=9).length == 9


@data_types
@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, lambda raw: array("H", raw)])
def test_data_is_any_buffer(cls: type[Packet], kind: Any) -> None:
    """*length* counts bytes, not items."""
    packet = make(cls, data=kind(b"abcdef"))
    assert packet.length == 6
    assert bytes(packet.data) == b"abcdef"
    assert packet == make(cls, data=b"abcdef")
    assert hash(packet) == hash(make(cls, data=b"abcdef"))


@data_types
@pytest.mark.parametrize("wrong", ["text", 5, None, [1, 2]])
def test_data_is_a_buffer(cls: type[Packet], wrong: Any) -> None:
    with pytest.raises(TypeError):
        make(cls, data=wrong)


def test_tables_become_tuples_of_32() -> None:
    assert EpInfo(type=list(range(32))).type == tuple(range(32))  # type: ignore[arg-type]
    assert InterfaceInfo(interface=bytes(32)).interface == (0,) * 32  # type: ignore[arg-type]
    assert isinstance(EpInfo().max_streams, tuple)
    assert EpInfo(max_packet_size=None).max_packet_size is None


@pytest.mark.parametrize("size", [0, 31, 33])
def test_tables_have_32_entries(size: int) -> None:
    with pytest.raises(ValueError, match=f"32 entries, not {size}"):
        EpInfo(interval=(0,) * size)


def test_rules_and_capabilities_are_taken_from_any_iterable() -> None:
    packet = FilterFilter(rules=[(8, -1, -1, -1, True)])  # type: ignore[arg-type]
    assert packet.rules == (FilterRule(8, -1, -1, -1, True),)
    assert isinstance(packet.rules[0], FilterRule)
    assert Hello(capabilities=[1, 20]).capabilities == frozenset((1, 20))  # type: ignore[arg-type]
    assert isinstance(Hello(capabilities={1}).capabilities, frozenset)  # type: ignore[arg-type]


def test_a_constructor_is_made_when_it_is_first_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for a class and those derived from it: making all 33 takes 2 ms, and most programs use few."""
    made: list[str] = []

    def counted(declaration: Declaration) -> Any:
        made.append(declaration.name)
        return constructor(declaration)

    monkeypatch.setattr(packets_module, "constructor", counted)
    monkeypatch.setattr(packets_module, "_registry", {})

    class Knock(Packet, packet_type=PacketType.RESET, direction=GUEST):
        pass

    class Loud(Knock):
        pass

    assert not made
    assert isinstance(Loud(id=1), Loud)
    assert Knock(id=2).id == 2
    with pytest.raises(TypeError, match=r"Knock.__new__\(\) got an unexpected keyword argument 'louder'"):
        make(Loud, louder=True)
    assert made == ["Knock"]


# ---------------------------------------------------------------- values


@given(any_packet())
def test_a_packet_is_equal_to_one_with_the_same_values(packet: Packet) -> None:
    same = make(type(packet), **packet.as_dict())
    assert packet == same
    assert operator.ne(packet, same) is False
    assert hash(packet) == hash(same)


@given(any_packet(), st.data())
def test_another_value_makes_another_packet(packet: Packet, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([f.name for f in packet.declaration.fields] + ["id"]))
    value = getattr(packet, name)
    other = value + 1 if isinstance(value, int) else value * 2 + value[:1] if isinstance(value, str) and value else None
    if other is not None:
        assert packet.replace(**{name: other}) != packet


def test_packets_of_different_types_differ() -> None:
    """Also where all their values are the same; a plain tuple is no packet."""
    assert GetConfiguration(id=1) != CancelDataPacket(id=1)
    assert operator.eq(GetConfiguration(id=1), CancelDataPacket(id=1)) is False
    assert IsoPacket(data=b"x") != InterruptPacket(data=b"x")
    assert Reset() != (0,)
    assert operator.ne((0,), Reset())
    assert operator.ne(Reset(), None)
    assert len({GetConfiguration(id=1), CancelDataPacket(id=1), GetConfiguration(id=1)}) == 2


@every_type
def test_packets_cannot_be_changed(cls: type[Packet]) -> None:
    packet = make(cls)
    for name in (*cls.declaration.stored, "anything_else", "packet_type"):
        with pytest.raises(AttributeError):
            setattr(packet, name, 1)
        with pytest.raises(AttributeError):
            delattr(packet, name)
    assert packet == make(cls)
    assert not hasattr(packet, "__dict__")


@given(any_packet())
def test_copies_are_equal(packet: Packet) -> None:
    """Pickle in every protocol, copy, deepcopy, replace."""
    copies = [pickle.loads(pickle.dumps(packet, protocol)) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
    for other in (*copies, copy.copy(packet), copy.deepcopy(packet), packet.replace()):
        assert type(other) is type(packet)
        assert other == packet
        assert hash(other) == hash(packet)


def test_replace_changes_what_it_is_told() -> None:
    packet = BulkPacket(id=5, endpoint=0x81, data=b"abc")
    changed = packet.replace(status=Status.STALL, length=None, data=b"")
    assert changed == BulkPacket(id=5, endpoint=0x81, status=4, length=0)
    assert packet == BulkPacket(id=5, endpoint=0x81, data=b"abc")
    with pytest.raises(TypeError):
        packet.replace(no_such_field=1)


def test_numbers_compare_equal_to_enum_members() -> None:
    assert ConfigurationStatus(status=Status.STALL) == ConfigurationStatus(status=4)
    assert DeviceConnect(speed=3).speed == Speed.SUPER
    assert EpInfo(type=(255,) * 32).type[5] == TransferType.INVALID
    assert Capability.FILTER in Hello(capabilities=frozenset((2,))).capabilities
    assert BulkPacket.packet_type == 101


# ---------------------------------------------------------------- repr


@given(any_packet())
def test_repr_is_for_people(packet: Packet) -> None:
    """The class, every field by its name, on one printable line, short however much data there is."""
    text = repr(packet)
    assert text.startswith(type(packet).__name__ + "(")
    assert text.isprintable()
    for name in packet.declaration.stored:
        assert f"{name}=" in text
    assert len(repr(packet.replace(data=bytes(100000)) if isinstance(packet, DataPacket) else Reset())) < 300


@pytest.mark.parametrize(
    ("packet", "expected"),
    [
        (Reset(), "Reset(id=0)"),
        (
            BulkPacket(id=7, endpoint=0x81, status=4, data=b"USBS"),
            "BulkPacket(id=7, endpoint=0x81, status=STALL, length=4, stream_id=0, data=<4 bytes: 55 53 42 53>)",
        ),
        (
            IsoPacket(endpoint=1, status=77, data=bytearray(17)),
            "IsoPacket(id=0, endpoint=0x01, status=77, length=17, data=<17 bytes: " + "00 " * 16 + "...>)",
        ),
        (InterruptPacket(), "InterruptPacket(id=0, endpoint=0x00, status=SUCCESS, length=0, data=<0 bytes>)"),
        (
            Hello(version="x\n", capabilities=frozenset((Capability.FILTER, 0, 30))),
            "Hello(id=0, version='x\\n', capabilities={0, FILTER, 30})",
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_some_reprs(packet: Packet, expected: str) -> None:
    assert repr(packet) == expected


def test_repr_of_tables_is_short() -> None:
    assert "type=(0,) * 32" in repr(EpInfo())
    assert "max_streams=None" in repr(EpInfo(max_streams=None))


# ---------------------------------------------------------------- through two parsers


@st.composite
def conversations(draw: st.DrawFn) -> tuple[int, int, Direction, list[Packet]]:
    """The capabilities of a host and a guest, a direction, and packets that may travel in it."""
    host, guest = draw(capability_words), draw(capability_words)
    direction = draw(st.sampled_from([HOST, GUEST]))
    sets = settled(host, usb_host=True), settled(guest, usb_host=False)
    own, peer = sets if direction is HOST else sets[::-1]
    return host, guest, direction, draw(st.lists(packets(direction, own, peer), min_size=1, max_size=5))


@given(conversations(), st.sampled_from([1, 3, 1 << 30]))
def test_packets_arrive_as_they_were_sent(conversation: tuple[int, int, Direction, list[Packet]], piece: int) -> None:
    """Every type, no, all and random capabilities, whole and byte by byte; fields off the wire are None."""
    host_word, guest_word, direction, sent = conversation
    host, host_end, guest, guest_end = parser_pair(host_word, guest_word)
    sender, sender_end, receiver, receiver_end = (
        (host, host_end, guest, guest_end) if direction is HOST else (guest, guest_end, host, host_end)
    )
    receiver_end.piece = piece
    for packet in sent:
        sender.send(packet)
    wire = carry(sender, sender_end, receiver, receiver_end)
    both = settled(host_word, usb_host=True) & settled(guest_word, usb_host=False)
    assert receiver_end.received == [as_received(packet, both) for packet in sent]
    assert not receiver_end.messages
    # What arrived can be sent on, and is the same again.
    for received in receiver_end.received:
        sender.send(received)
        for name, value in received.as_dict().items():
            assert name == "data" or not isinstance(value, int) or type(value) is int, "numeric fields are plain ints"
    assert carry(sender, sender_end, receiver, receiver_end) == wire


@pytest.mark.parametrize("words", [(0, 0), (0xFF, 0xFF), (0xFF, 0), (0, 0xFF)])
@pytest.mark.parametrize("direction", [HOST, GUEST])
def test_the_plainest_packet_of_every_type_arrives(words: tuple[int, int], direction: Direction) -> None:
    """So that no type is left to chance."""
    host, host_end, guest, guest_end = parser_pair(*words)
    sets = settled(words[0], usb_host=True), settled(words[1], usb_host=False)
    own, peer = sets if direction is HOST else sets[::-1]
    ends = (host, host_end, guest, guest_end) if direction is HOST else (guest, guest_end, host, host_end)
    sent = [valid_packet(cls, direction) for cls in sendable(direction, own, peer)]
    for packet in sent:
        ends[0].send(packet)
    carry(*ends)
    assert [type(packet) for packet in ends[3].received] == [type(packet) for packet in sent]
    assert len(sent) >= (13 if direction is HOST else 16)


def test_every_packet_is_sent_by_one_side_or_by_the_parser() -> None:
    everything = mask_of(ALL)
    sent = {cls.packet_type for way in (HOST, GUEST) for cls in sendable(way, everything, everything)}
    assert sent | set(BY_ITSELF) == set(PACKET_TYPES)


@given(conversations(), capability_words, capability_words)
def test_a_decoded_packet_can_be_sent_on_to_another_peer(
    conversation: tuple[int, int, Direction, list[Packet]], host_word: int, guest_word: int
) -> None:
    """One that has other capabilities; what it cannot be told is left out, what we were not told is zero."""
    _, _, direction, decoded = conversation
    host, host_end, guest, guest_end = parser_pair(host_word, guest_word)
    sender, sender_end, receiver, receiver_end = (
        (host, host_end, guest, guest_end) if direction is HOST else (guest, guest_end, host, host_end)
    )
    possible = sendable(
        direction,
        *(settled(word, usb_host=usb_host) for word, usb_host in ((host_word, True), (guest_word, False)))
        if direction is HOST
        else (settled(guest_word, usb_host=False), settled(host_word, usb_host=True)),
    )
    sent = [packet for packet in decoded if type(packet) in possible]
    for packet in sent:
        sender.send(packet)
    carry(sender, sender_end, receiver, receiver_end)
    assert [type(packet) for packet in receiver_end.received] == [type(packet) for packet in sent]


@given(st.text(max_size=80), capability_words, capability_words)
def test_hello_tells_who_we_are(version: str, own: int, peer: int) -> None:
    """The text up to NUL, at most 63 bytes; the capabilities after the fix-up, unknown bits as ints."""
    sender_end, receiver_end = End(), End()
    sender = Parser(sender_end, usb_host=True, version=version, capabilities=bits(own))
    carry(sender, sender_end, Parser(receiver_end, capabilities=bits(peer)), receiver_end)
    (hello,) = receiver_end.received
    assert isinstance(hello, Hello)
    expected = version.encode(errors="replace")[:63].partition(b"\0")[0].decode(errors="replace")
    assert hello.version == expected
    assert hello.id == 0
    assert mask_of(hello.capabilities) == settled(own, usb_host=True)
    for capability in hello.capabilities:
        assert isinstance(capability, Capability) is (capability < 8)


@pytest.mark.parametrize("field", ["status", "endpoint", "request", "requesttype", "value", "index"])
def test_unknown_values_survive(field: str) -> None:
    """Nothing is range-checked that the protocol does not check."""
    host, host_end, guest, guest_end = parser_pair()
    guest.send(make(ControlPacket, **{"endpoint": 0x80, field: 0xEE}))
    carry(guest, guest_end, host, host_end)
    assert host_end.received == [make(ControlPacket, **{"endpoint": 0x80, field: 0xEE})]
