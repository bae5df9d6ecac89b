"""From the declaration of a packet to its bytes: the only module that packs and unpacks packet bodies.

A packet class (``usbredir.packets``) declares annotated fields and a few rules. This module turns the
declaration into three generated functions, the way ``collections.namedtuple`` and ``dataclasses`` do:

* the constructor,
* a *decoder* for one receiving direction and one set of capabilities, and
* a *sender* for one sending direction and one set of capabilities, which encodes and queues,

the latter two with the packet's rules compiled in. They are made when a packet type is first met and
shared by all parsers. Packets of one type that come in a row have decoders of their own (:func:`compile_run`,
:func:`compile_rows`).

Generated because of speed (CPython 3.11, bulk packet with 64 bytes, least of 5 runs): a generic loop over
field objects takes 2.9 us per packet, the generated decoder 0.27 us.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from functools import lru_cache
from itertools import repeat
from operator import length_hint
from typing import Any, NamedTuple, NoReturn

from .capabilities import has
from .proto import MAX_INTERFACES, Capability, Direction, PacketType

__all__ = [
    "SMALL",
    "AtMost",
    "Declaration",
    "Field",
    "Large",
    "Reject",
    "Wire",
    "array",
    "compile_decoder",
    "REPLY",
    "compile_rows",
    "compile_run",
    "compile_sender",
    "constructor",
    "describe_layout",
    "header_struct",
]

SMALL = 8192
"""Payloads up to this many bytes are copied behind their header, longer ones are queued by reference.
Copying up to 8 KiB is cheaper than a second buffer (measured: 593 against 1022 ns for 4 KiB)."""


class Large:
    """A packet whose payload is too large to be copied: header and payload. len() is the size of both, in bytes."""

    __slots__ = ("parts", "size")

    def __init__(self, header: bytes, payload: bytes) -> None:
        self.parts = header, payload
        self.size = len(header) + len(payload)

    def __len__(self) -> int:
        return self.size


class Reject(Exception):
    """A packet breaks a rule. Internal: becomes a Local- or RemoteProtocolError."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Wire(NamedTuple):
    """How a field travels.

    code: struct code of one element. count: elements, more than 1 makes a tuple.
    since: present only when both sides have one of these capabilities.
    high_half_since: a 32-bit number; its upper 16 bits are appended to the type header when both sides have this.
    in_data: the field is the variable part behind the type header.
    to_wire, from_wire: conversions, where the value is not the number on the wire itself.
    """

    code: str = ""
    count: int = 1  # type: ignore[assignment]  # hides tuple.count
    since: tuple[Capability, ...] = ()
    high_half_since: Capability | None = None
    in_data: bool = False
    text: str = ""
    convert: Callable[[Any], Any] | None = None
    to_wire: Callable[[Any], Any] | None = None
    from_wire: Callable[[Any], Any] | None = None

    def present(self, both: int) -> bool:
        """Whether the field travels when both sides have the capabilities in the mask *both*."""
        return not self.since or any(has(both, capability) for capability in self.since)


class AtMost(NamedTuple):
    """The largest value a field may have, and the key of the error. *limit* None: ``Limits.max_bulk``."""

    limit: int | None
    reason: str


class Field(NamedTuple):
    """One declared field."""

    name: str
    wire: Wire
    default: object
    at_most: AtMost | None = None


class Declaration:
    """Everything a packet class declares. Compared by identity, never changed.

    needs: the capability without which the packet may not travel. When sending the peer must have it,
        when receiving we must (so it is in the original).
    input_only: the endpoint must be an IN endpoint.
    carries_id: senders choose the id; otherwise 0 is sent.
    transfers: a data packet: bit 7 of *endpoint* tells in which direction data travels.
    data_only: directions in which the packet may not travel without its data (the wrong way round).
    """

    def __init__(
        self,
        name: str,
        packet_type: PacketType,
        direction: Direction,
        fields: tuple[Field, ...],
        *,
        needs: Capability | None = None,
        input_only: bool = False,
        carries_id: bool = False,
        transfers: bool = False,
        data_only: Direction | None = None,
        cls: type = object,
    ) -> None:
        self.name = name
        self.packet_type = packet_type
        self.direction = direction
        self.fields = fields
        self.needs = needs
        self.input_only = input_only
        self.carries_id = carries_id
        self.transfers = transfers
        self.data_only = data_only
        self.cls = cls
        self.has_data = transfers or any(f.wire.in_data for f in fields)
        """Whether bytes behind the type header are possible."""
        self.stored = ("id", *(f.name for f in fields), *(("data",) if transfers else ()))
        """Names of the stored values: id, the fields, and data for data packets."""
        self.capabilities = _mask(fields)
        """Mask of the capabilities that change the layout."""

    def may_travel(self, direction: Direction) -> bool:
        """Whether the packet may travel in *direction*."""
        return self.direction in (direction, Direction.BOTH)

    def header_fields(self, both: int) -> list[tuple[str, Wire]]:
        """(name on the wire, wire) of the type header's parts under the capabilities *both*, in order."""
        parts = [(f.name, f.wire) for f in self.fields if not f.wire.in_data and f.wire.present(both)]
        parts += [
            (f.name + "_high", Wire("H"))
            for f in self.fields
            if f.wire.high_half_since is not None and has(both, f.wire.high_half_since)
        ]
        return parts

    def header_format(self, both: int) -> str:
        """struct format of the type header, without byte order."""
        return "".join(_format(wire) for _, wire in self.header_fields(both))


def _mask(fields: Iterable[Field]) -> int:
    mask = 0
    for wire in (f.wire for f in fields):
        for capability in (*wire.since, *(() if wire.high_half_since is None else (wire.high_half_since,))):
            mask |= 1 << capability
    return mask


def _format(wire: Wire) -> str:
    # An array travels as one bytes item: unpacking 32 numbers one by one costs 32 objects each time.
    return wire.code if wire.count == 1 else f"{struct.calcsize('<' + wire.code) * wire.count}s"


def header_struct(wide_ids: bool) -> struct.Struct:
    """The packet header: type, length, id (32 or 64 bits)."""
    return struct.Struct("<IIQ" if wide_ids else "<III")


# ---------------------------------------------------------------- generating


def constructor(declaration: Declaration) -> Callable[..., Any]:
    """``__new__`` with one keyword argument per stored value."""
    namespace: dict[str, Any] = {"new": tuple.__new__, "bytes_like": _bytes_like}
    arguments, lines = [], []
    for name in declaration.stored:
        found = next((f for f in declaration.fields if f.name == name), None)
        default = b"" if name == "data" else 0 if found is None else found.default
        namespace["default_" + name] = default
        arguments.append(f"{name}=default_{name}")
        if found is not None and found.wire.convert is not None:
            namespace["convert_" + name] = found.wire.convert
            lines.append(f"    if {name} is not default_{name}: {name} = convert_{name}({name})")
    if declaration.transfers:
        lines.append("    if data.__class__ is not bytes: data = bytes_like(data)")
        lines.append("    if length is None: length = len(data)")
    lines.append(f"    return new(cls, ({', '.join(declaration.stored)},))")
    source = f"def __new__(cls, *, {', '.join(arguments)}):\n" + "\n".join(lines)
    return _execute(source, "__new__", namespace, declaration)


def _bytes_like(data: object) -> memoryview | bytearray:
    """Data as something whose len() is its number of bytes."""
    if isinstance(data, bytearray):
        return data
    view = memoryview(data)  # type: ignore[arg-type]  # a TypeError is what the caller should see
    return view if view.format == "B" and view.ndim == 1 else view.cast("B")


@lru_cache(maxsize=4096)
def _decoder(
    declaration: Declaration, both: int, allowed: bool, travel: Direction, max_bulk: int
) -> Callable[..., Any]:
    parts = declaration.header_fields(both)
    namespace: dict[str, Any] = {
        "new": tuple.__new__,
        "cls": declaration.cls,
        "Reject": Reject,
        "unpack": struct.Struct("<" + declaration.header_format(both)).unpack_from,
    }
    lines = _needs(declaration, allowed)
    if parts:
        lines.append(f"    {', '.join(name for name, _ in parts)}, = unpack(buffer, start)")
    lines += _checked_packet(declaration, both, travel, max_bulk, namespace)
    lines.append(f"    return new(cls, ({', '.join(declaration.stored)},))")
    source = "def decode(buffer, start, id, data):\n" + "\n".join(lines)
    return _execute(source, "decode", namespace, declaration)


def _checked_packet(
    declaration: Declaration, both: int, travel: Direction, max_bulk: int, namespace: dict[str, Any]
) -> list[str]:
    """From unpacked values and *data* to what the packet stores, or a Reject."""
    lines = _conversions(declaration, both, namespace)
    if declaration.transfers:
        lines.append("    size = len(data)")
    return lines + _checks(declaration, travel, max_bulk)


@lru_cache(maxsize=4096)
def _run(
    declaration: Declaration, wide_ids: bool, both: int, travel: Direction, max_bulk: int, most: int
) -> Callable[..., int]:
    header = header_struct(wide_ids)
    layout = struct.Struct(header.format + declaration.header_format(both))
    namespace: dict[str, Any] = {
        "new": tuple.__new__,
        "cls": declaration.cls,
        "Reject": Reject,
        "unpack": layout.unpack_from,
    }
    names = ", ".join(name for name, _ in declaration.header_fields(both))
    body = [
        f"    packet_type, length_, id, {names}, = unpack(buffer, pos)",
        f"    stop = pos + {header.size} + length_",
        f"    if packet_type != {int(declaration.packet_type)} or stop > end "
        f"or not {layout.size - header.size} <= length_ <= {most}: break",
        f"    data = buffer[pos + {layout.size} : stop]",
        "    decoder.pos = pos = stop",
        *_checked_packet(declaration, both, travel, max_bulk, namespace),
        f"    deliver(new(cls, ({', '.join(declaration.stored)},)))",
    ]
    source = "\n".join(
        [
            "def run(decoder, buffer, pos, end, deliver):",
            f"    last = end - {layout.size}",
            "    while pos <= last:",
            *("    " + line for line in body),
            "    return pos",
        ]
    )
    return _execute(source, "run", namespace, declaration)


def compile_run(
    declaration: Declaration, wide_ids: bool, both: int, own: int, travel: Direction, max_bulk: int, most: int
) -> Callable[..., int] | None:
    """``run(decoder, buffer, pos, end, deliver)``: delivers packets of one type until another comes; the new pos.

    For data packets, which come in rows; None for others. ``decoder.pos`` is kept up to date, for exceptions.
    One unpacking for both headers and no call per packet: 448 in place of 565 ns for 64 bytes of data.
    """
    allowed = declaration.needs is None or has(own, declaration.needs)
    if not declaration.transfers or not allowed:
        return None
    return _run(declaration, wide_ids, both & declaration.capabilities, travel, max_bulk, most)


Column = tuple[int, bytes]
"""Where a byte stands in a packet, and which values it may have."""
ADDRESSES = bytes(range(0x80)), bytes(range(0x80, 0x100))
"""Endpoint addresses by direction: OUT, IN."""


def compile_rows(
    declaration: Declaration, wide_ids: bool, both: int, travel: Direction, max_bulk: int, length: int, like: bytes
) -> Callable[..., int] | None:
    """As :func:`compile_run`, for packets that announce *length* and go the way of *like*, a valid one.

    What decides is checked for all of them at once, a byte of each at a time; then a row as it is unpacked is what a
    packet stores. 220 in place of 440 ns for 64 bytes of data; of use from thirty packets on. None: they are not alike
    enough.
    """
    both &= declaration.capabilities
    incoming = like[_endpoint_offset(declaration, wide_ids, both)] >= 0x80
    return _rows(declaration, wide_ids, both, travel, max_bulk, length, incoming)


@lru_cache(maxsize=256)
def _endpoint_offset(declaration: Declaration, wide_ids: bool, both: int) -> int:
    """Where the endpoint stands in a packet."""
    formats = {name: _format(wire) for name, wire in declaration.header_fields(both)}
    before = list(formats.values())[: list(formats).index("endpoint")]
    return struct.calcsize(header_struct(wide_ids).format + "".join(before))


@lru_cache(maxsize=256)
def _rows(
    declaration: Declaration, wide_ids: bool, both: int, travel: Direction, max_bulk: int, length: int, incoming: bool
) -> Callable[..., int] | None:
    size = length - struct.calcsize("<" + declaration.header_format(both))
    carrying = incoming is (travel is Direction.HOST_TO_GUEST)
    if not _alike(declaration, both, max_bulk, size):
        return None
    columns = _constant(0, struct.pack("<II", declaration.packet_type, length))
    layout = "<8x" + header_struct(wide_ids).format[-1]
    for name, wire in declaration.header_fields(both):
        at = struct.calcsize(layout)
        layout += _format(wire) if not name.endswith("_high") else f"{struct.calcsize(wire.code)}x"
        if name == "endpoint":
            columns.append((at, ADDRESSES[incoming]))
        elif name.endswith("_high"):
            columns += _constant(at, bytes(struct.calcsize(layout) - at))
        elif name == "length" and carrying:
            columns += _constant(at, size.to_bytes(struct.calcsize(layout) - at, "little"))
    return _rows_function(declaration.cls, struct.Struct(f"{layout}{size}s"), columns)


def _alike(declaration: Declaration, both: int, max_bulk: int, size: int) -> bool:
    """Whether packets with so much data store what is on the wire, and lengths of 16 bits are within the limit."""
    stored = all(f.wire.present(both) and f.wire.from_wire is None for f in declaration.fields)
    return stored and size <= 0xFFFF <= max_bulk


def _constant(at: int, values: bytes) -> list[Column]:
    return [(at + i, bytes((value,))) for i, value in enumerate(values)]


def _rows_function(cls: type, layout: struct.Struct, columns: list[Column]) -> Callable[..., int]:
    stride, unpack = layout.size, layout.iter_unpack
    new: Callable[..., Any] = tuple.__new__
    classes = repeat(cls)

    def deliver_rows(decoder: Any, buffer: bytes, pos: int, end: int, deliver: Callable[[Any], None]) -> int:
        count = (end - pos) // stride
        for at, allowed in columns:
            if not count:
                return pos
            count -= len(buffer[pos + at : pos + count * stride : stride].lstrip(allowed))
        stop = pos + count * stride
        rows = unpack(memoryview(buffer)[pos:stop])
        try:
            for packet in map(new, classes, rows):
                deliver(packet)
        except BaseException:
            decoder.pos = stop - length_hint(rows) * stride
            raise
        decoder.pos = stop
        return stop

    return deliver_rows


def compile_decoder(
    declaration: Declaration, both: int, own: int, travel: Direction, max_bulk: int
) -> tuple[int, Callable[[bytes, int, int, bytes], Any]]:
    """Size of the type header, and ``decode(buffer, start of the type header, id, data)``.

    The decoder raises :class:`Reject`. *both* and *own* are capability masks, *travel* is the packet's way.
    """
    allowed = declaration.needs is None or has(own, declaration.needs)
    both &= declaration.capabilities
    return struct.calcsize("<" + declaration.header_format(both)), _decoder(
        declaration, both, allowed, travel, max_bulk
    )


def _conversions(declaration: Declaration, both: int, namespace: dict[str, Any]) -> list[str]:
    lines = []
    for f in declaration.fields:
        if not f.wire.present(both):
            lines.append(f"    {f.name} = None")
        elif f.wire.high_half_since is not None and has(both, f.wire.high_half_since):
            lines.append(f"    {f.name} |= {f.name}_high << 16")
        if f.wire.from_wire is not None and f.wire.present(both):
            namespace["from_" + f.name] = f.wire.from_wire
            lines.append(f"    {f.name} = from_{f.name}({'data' if f.wire.in_data else f.name})")
    return lines


FIELD_ERRORS = (struct.error, ValueError, TypeError, OverflowError)
"""What encoding raises when a value has no place in its field."""
REPLY = ("packet", "status", "length", "data")
"""What a sender of replies is given: the request, and what replaces its status, length and data."""


def _values(declaration: Declaration, given: tuple[str, ...], namespace: dict[str, Any]) -> list[str]:
    """From what a sender is given to the values of a packet."""
    stored = declaration.stored
    if given == ("packet",):
        return [f"    {', '.join(stored)}, = packet"]
    if given == REPLY:
        return [f"    {', '.join(f'{name}_' if name in REPLY else name for name in stored)}, = packet"]
    if unknown := [name for name in given if name not in stored]:
        raise TypeError(f"{declaration.name} has no {', '.join(unknown)}: it has {', '.join(stored)}")
    missing = [f for f in declaration.fields if f.name not in given]
    namespace.update({f"given_{f.name}": f.default for f in missing})
    lines = ["    data = b''"] if declaration.has_data and "data" not in given else []
    lines += ["    id = 0"] if "id" not in given else []
    for f in missing:
        length = declaration.transfers and f.name == "length"
        value = "len(data)" if length else f"given_{f.name}"
        lines.append(f"    {f.name} = {value}")
    return lines


@lru_cache(maxsize=4096)
def _sender(
    declaration: Declaration,
    wide_ids: bool,
    both: int,
    allowed: bool,
    travel: Direction,
    max_bulk: int,
    given: tuple[str, ...],
) -> Callable[..., Any]:
    parts = declaration.header_fields(both)
    id_value = "0" if not declaration.carries_id else "id" if wide_ids else "id & 0xFFFFFFFF"
    size = struct.calcsize("<" + declaration.header_format(both))
    namespace: dict[str, Any] = {
        "Reject": Reject,
        "pack": struct.Struct(header_struct(wide_ids).format + declaration.header_format(both)).pack,
        "snapshot": bytes,
        "large": Large,
    }
    lines = _needs(declaration, allowed)
    lines += _values(declaration, given, namespace)
    if declaration.transfers and given == ("packet",):
        lines.append("    if data.__class__ is not bytes: data = snapshot(data)")
    values = []
    for f in declaration.fields:
        if f.wire.high_half_since is not None and not has(both, f.wire.high_half_since):
            lines.append(f"    if not 0 <= {f.name} <= 0xFFFFFFFF: raise Reject('field_range')")
            lines.append(f"    {f.name} &= 0xFFFF")
        if f.wire.since and f.wire.present(both):
            namespace["default_" + f.name] = f.default
            lines.append(f"    if {f.name} is None: {f.name} = default_{f.name}")
        if f.wire.in_data:
            namespace["to_" + f.name] = f.wire.to_wire
            lines.append(f"    data = to_{f.name}({f.name})")
    if declaration.has_data:
        lines.append("    size = len(data)")
    lines += _checks(declaration, travel, max_bulk)
    for name, wire in parts:
        if name.endswith("_high"):
            values.append(f"{name[:-5]} >> 16")
        elif wire.high_half_since is not None:
            values.append(f"{name} & 0xFFFF")
        elif wire.to_wire is not None:
            namespace["to_" + name] = wire.to_wire
            values.append(f"to_{name}({name})")
        else:
            values.append(name)
    length = f"{size} + size" if declaration.has_data else str(size)
    head = f"pack({', '.join([str(int(declaration.packet_type)), length, id_value, *values])})"
    large = f"large({head}, data)"
    entry = f"{head} + data if size <= {SMALL} else {large}" if declaration.has_data else head
    namespace["ERRORS"] = (Reject, *FIELD_ERRORS)
    body = [
        f"def send({', '.join(given)}):",
        "    try:",
        *("    " + line for line in [*lines, f"    entry = {entry}"]),
        "    except ERRORS as error:",
        "        refuse(error)",
        "    else:",
        "        push(entry)",
    ]
    name = f"    send.__qualname__ = {declaration.name + '.send'!r}"
    source = ["def make(push, refuse):", *("    " + line for line in body), name, "    return send"]
    return _execute("\n".join(source), "make", namespace, declaration)


def compile_sender(
    declaration: Declaration,
    wide_ids: bool,
    both: int,
    peer: int,
    travel: Direction,
    max_bulk: int,
    given: tuple[str, ...] = ("packet",),
) -> Callable[[Callable[[bytes | Large], None], Callable[[Exception], NoReturn]], Callable[..., None]]:
    """``make(push, refuse)`` gives ``send(packet)``: it hands the whole packet to *push*.

    That is bytes, or :class:`Large` for a payload above :data:`SMALL`. What must not be sent goes to *refuse*: a
    :class:`Reject`, or struct.error, ValueError or TypeError for a value that has no place in its field.

    *given* tells what ``send`` is called with in place of a packet, for packets that nobody is to see (making one costs
    290 ns): names of values, the rest have their defaults; or :data:`REPLY`. Data is not copied then.
    One call encodes and queues: 100 ns less than two, with a tuple of arguments between them.
    """
    allowed = declaration.needs is None or has(peer, declaration.needs)
    both &= declaration.capabilities
    return _sender(declaration, wide_ids, both, allowed, travel, max_bulk, given)


def _needs(declaration: Declaration, allowed: bool) -> list[str]:
    """The rule that comes before all others: the capability that the packet needs."""
    if allowed or declaration.needs is None:
        return []
    key = "missing_cap_" + declaration.needs.name.lower().replace("device_", "")
    return [f"    raise Reject({key!r})"]


def _checks(declaration: Declaration, travel: Direction, max_bulk: int) -> list[str]:
    """The rules of a packet, the same for both sides, in the original's order. *size* is that of the data."""
    lines = []
    for f in declaration.fields:
        if f.at_most is not None:
            limit = max_bulk if f.at_most.limit is None else f.at_most.limit
            lines.append(f"    if {f.name} > {limit}: raise Reject({f.at_most.reason!r})")
    if declaration.input_only:
        lines.append("    if not endpoint & 0x80: raise Reject('endpoint_not_input')")
    if declaration.transfers:
        data_way = "endpoint & 0x80" if travel is Direction.HOST_TO_GUEST else "not endpoint & 0x80"
        lines.append(f"    if {data_way}:")
        lines.append("        if size != length: raise Reject('data_length_mismatch')")
        lines.append("    elif size: raise Reject('unexpected_data')")
        if declaration.data_only in (travel, Direction.BOTH):
            lines.append("    else: raise Reject('wrong_direction')")
    return lines


def _execute(source: str, name: str, namespace: dict[str, Any], declaration: Declaration) -> Callable[..., Any]:
    exec(compile(source, f"<{name} of {declaration.name}>", "exec"), namespace)
    function: Callable[..., Any] = namespace[name]
    function.__qualname__ = f"{declaration.name}.{name}"
    return function


# ---------------------------------------------------------------- conversions of fields


def array(code: str, default: int = 0, *, since: tuple[Capability, ...] = ()) -> tuple[Wire, tuple[int, ...]]:
    """A table of 32 numbers, one per endpoint or interface slot, and its default."""
    layout = struct.Struct(f"<{MAX_INTERFACES}{code}")

    def convert(values: Any) -> tuple[int, ...]:
        result = tuple(values)
        if len(result) != MAX_INTERFACES:
            raise ValueError(f"a table has {MAX_INTERFACES} entries, not {len(result)}")
        return result

    wire = Wire(
        code,
        MAX_INTERFACES,
        since=since,
        convert=convert if not since else lambda values: None if values is None else convert(values),
        to_wire=lambda values: layout.pack(*values),
        from_wire=layout.unpack,
    )
    return wire, (default,) * MAX_INTERFACES


def describe_layout(declaration: Declaration, both: int) -> list[tuple[int, int, str]]:
    """Rows (offset, bytes, name) of the type header, for docs and tools."""
    rows, offset = [], 0
    for name, wire in declaration.header_fields(both):
        size = struct.calcsize("<" + _format(wire))
        rows.append((offset, size, name))
        offset += size
    return rows
