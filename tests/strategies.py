"""Hypothesis strategies for packets, derived from their declarations, and parsers for them to travel between.

Nothing here names a field: widths, tables, limits, capabilities and directions come from ``Packet.declaration``, so
a packet that is added or changed is tested without a line here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from hypothesis import strategies as st

from usbredir._layout import Declaration, Field, header_struct
from usbredir.capabilities import ALL, fix_up, has, mask_of, members_of
from usbredir.filter import FilterRule
from usbredir.packets import PACKET_TYPES, FilterFilter, Hello, Packet
from usbredir.parser import LogLevel, Parser, ParserCallbacks
from usbredir.proto import MAX_BULK, Capability, Direction, PacketType

BY_ITSELF = (PacketType.HELLO, PacketType.DEVICE_DISCONNECT_ACK)
"""Packets that a parser sends by itself."""
BITS = {"B": 8, "H": 16, "I": 32}
GUEST_ALWAYS = 1 << Capability.DEVICE_DISCONNECT_ACK

# ---------------------------------------------------------------- capability sets

capability_words = st.one_of(st.just(0), st.just(mask_of(ALL)), st.integers(0, 0xFF), st.integers(0, 2**32 - 1))
"""The first word of a hello: nothing, everything known, any."""


def settled(word: int, *, usb_host: bool) -> int:
    """What a parser makes of the capabilities it is given."""
    return fix_up(word if usb_host else word | GUEST_ALWAYS)


# ---------------------------------------------------------------- packets


def sendable(direction: Direction, own: int, peer: int) -> list[type[Packet]]:
    """The packets an application may send in *direction*, from a side with *own* to one with *peer*."""
    return [
        cls
        for number, cls in PACKET_TYPES.items()
        if number not in BY_ITSELF
        and cls.declaration.may_travel(direction)
        and (cls.declaration.needs is None or (has(peer, cls.declaration.needs) and has(own, cls.declaration.needs)))
    ]


def packets(direction: Direction, own: int, peer: int) -> st.SearchStrategy[Packet]:
    """Any packet that may be sent in *direction* from a side with *own* to one with *peer*."""
    return st.sampled_from(sendable(direction, own, peer)).flatmap(lambda cls: packets_of(cls, direction, own & peer))


def packets_of(cls: type[Packet], direction: Direction, both: int) -> st.SearchStrategy[Packet]:
    """Packets of one type that may travel in *direction* when both sides have the capabilities in the mask *both*."""
    declaration = cls.declaration
    values = {f.name: field_values(declaration, f, both) for f in declaration.fields}
    if declaration.carries_id:
        values["id"] = integers(64 if has(both, Capability.IDS_64BITS) else 32)
    if declaration.transfers:
        values["data"] = st.one_of(st.binary(max_size=40), st.integers(0, 20000).map(bytes))
    return st.fixed_dictionaries(values).map(lambda drawn: cls(**_obey(declaration, direction, drawn)))


def field_values(declaration: Declaration, field: Field, both: int) -> st.SearchStrategy[Any]:
    """Values of a field that fit its width and its limit."""
    wire = field.wire
    if wire.in_data:
        return capability_words.map(members_of) if declaration.cls is Hello else filter_rules
    if not wire.code.isalpha():
        return st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=15)
    if wire.count > 1:
        return tables(wire.count, BITS[wire.code]) if wire.present(both) else st.none() | tables(wire.count, 8)
    if not wire.present(both):
        return st.none() | integers(8)
    wide = wire.high_half_since is not None and has(both, wire.high_half_since)
    limit = (1 << (32 if wide else BITS[wire.code])) - 1
    if field.at_most is not None:
        limit = min(limit, MAX_BULK if field.at_most.limit is None else field.at_most.limit)
    return st.one_of(st.sampled_from([0, 1, limit]), st.integers(0, limit))


def integers(bits: int) -> st.SearchStrategy[int]:
    """Numbers of that many bits, the ends more often."""
    return st.one_of(st.sampled_from([0, 1, (1 << bits) - 1]), st.integers(0, (1 << bits) - 1))


def tables(count: int, bits: int) -> st.SearchStrategy[tuple[int, ...]]:
    """Tables: random bytes are cheaper to draw than as many numbers."""
    size = bits // 8
    return st.binary(min_size=count * size, max_size=count * size).map(
        lambda raw: tuple(int.from_bytes(raw[i : i + size], "little") for i in range(0, len(raw), size))
    )


def _any_or(most: int) -> st.SearchStrategy[int]:
    return st.sampled_from([-1, 0, most]) | st.integers(-1, most)


filter_rules: st.SearchStrategy[tuple[FilterRule, ...]] = st.lists(
    st.builds(FilterRule, _any_or(0xFF), _any_or(0xFFFF), _any_or(0xFFFF), _any_or(0xFFFF), st.booleans()), max_size=4
).map(tuple)
"""Any valid rules."""


def _obey(declaration: Declaration, direction: Direction, values: dict[str, Any]) -> dict[str, Any]:
    """Bring the drawn values in line with the rules that concern several fields."""
    if declaration.input_only:
        values["endpoint"] |= 0x80
    if declaration.transfers:
        if declaration.data_only in (direction, Direction.BOTH):
            way = 0x80 if direction is Direction.HOST_TO_GUEST else 0
            values["endpoint"] = values["endpoint"] & 0x7F | way
        if carries_data(values["endpoint"], direction):
            values["length"] = len(values["data"])
        else:
            values["data"] = b""
    return values


def carries_data(endpoint: int, direction: Direction) -> bool:
    """Whether a transfer packet travels with its data in *direction*."""
    return bool(endpoint & 0x80) == (direction is Direction.HOST_TO_GUEST)


def as_received(packet: Packet, both: int) -> Packet:
    """What the other side makes of *packet*: fields that the layout does not carry are None."""
    absent = {f.name: None for f in packet.declaration.fields if not f.wire.present(both)}
    return packet.replace(**absent)


# ---------------------------------------------------------------- parsers


class End(ParserCallbacks):
    """Callbacks in memory: ``incoming`` is read, ``output`` is written, what arrives is kept.

    piece: most bytes that one read gives.
    """

    def __init__(self, incoming: bytes = b"", *, piece: int = 1 << 30) -> None:
        self.incoming = incoming
        self.output = bytearray()
        self.piece = piece
        self.closed = False
        self.received: list[Packet] = []
        self.messages: list[tuple[LogLevel, str]] = []
        self.asked: list[int] = []
        """The counts that read was called with."""

    def log(self, level: LogLevel, message: str) -> None:
        self.messages.append((level, message))

    def read(self, count: int) -> bytes | bytearray | memoryview | None:
        self.asked.append(count)
        count = min(count, self.piece)
        piece, self.incoming = self.incoming[:count], self.incoming[count:]
        return piece or (b"" if self.closed else None)

    def write(self, data: memoryview) -> int | None:
        self.output += data
        return len(data)

    def packet_received(self, packet: Packet) -> None:
        self.received.append(packet)

    def take_output(self) -> bytes:
        """What was written since the last call."""
        output, self.output = bytes(self.output), bytearray()
        return output


def parser_pair(
    host_word: int = mask_of(ALL), guest_word: int = mask_of(ALL), *, ends: Callable[[], End] = End
) -> tuple[Parser, End, Parser, End]:
    """(host parser, its callbacks, guest parser, its callbacks) that have exchanged hello."""
    host_end, guest_end = ends(), ends()
    host = Parser(host_end, usb_host=True, capabilities=bits(host_word))
    guest = Parser(guest_end, capabilities=bits(guest_word))
    carry(host, host_end, guest, guest_end)
    carry(guest, guest_end, host, host_end)
    assert host.have_peer_capabilities()
    assert guest.have_peer_capabilities()
    for end in (host_end, guest_end):
        end.received.clear()
        end.messages.clear()
        end.asked.clear()
    return host, host_end, guest, guest_end


def carry(sender: Parser, sender_end: End, receiver: Parser, receiver_end: End) -> bytes:
    """Move everything queued from one parser to the other; the bytes."""
    sender.do_write()
    moved = sender_end.take_output()
    receiver_end.incoming += moved
    receiver.do_read()
    return moved


def bits(word: int) -> Iterable[int]:
    """The capability numbers of a word."""
    return [bit for bit in range(32) if word >> bit & 1]


def raw_packet(packet_type: int, body: bytes = b"", packet_id: int = 0, *, wide: bool = True) -> bytes:
    """A packet's bytes with the right length, whatever the type."""
    return header_struct(wide).pack(packet_type, len(body), packet_id) + body


def raw_hello(word: int, version: bytes = b"test") -> bytes:
    """A hello's bytes."""
    return raw_packet(PacketType.HELLO, version.ljust(64, b"\0") + word.to_bytes(4, "little"), wide=False)


def valid_packet(cls: type[Packet], direction: Direction, **values: Any) -> Packet:
    """The plainest packet of a type that may travel in *direction*."""
    drawn: dict[str, Any] = {}
    if cls.declaration.transfers:
        drawn = {"endpoint": 0, "data": b"some data"}
        drawn = _obey(cls.declaration, direction, drawn)
    elif cls.declaration.input_only:
        drawn = {"endpoint": 0x81}
    elif cls is FilterFilter:
        drawn = {"rules": [FilterRule(8, -1, -1, -1, True)]}
    return cls(**{**drawn, **values})
