"""The original C library, libusbredirparser, through ctypes: a reference for tests and benchmarks.

The library is found by the loader under its usual name; ``USBREDIR_LIB`` names another file.
:func:`load` raises :class:`CLibraryMissing` when there is none. Layouts and prototypes follow the
installed headers ``usbredirparser.h``, ``usbredirproto.h`` and ``usbredirfilter.h``.

Memory: what C hands over (packet data, rules, states, write buffers) is copied to Python objects
and given back to C at once; what Python lends to C (callbacks, buffers) is kept alive by the object
that lends it.
"""

from __future__ import annotations

import ctypes as C
import ctypes.util
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from types import TracebackType
from typing import Any, NamedTuple

__all__ = [
    "CLibraryMissing",
    "CParser",
    "Event",
    "HEADERS",
    "Log",
    "PACKETS",
    "PacketShape",
    "Rule",
    "StateRejected",
    "filter_check",
    "filter_parse",
    "filter_to_string",
    "load",
    "log_key",
    "wire_fields",
]

Value = int | bytes | tuple[int, ...]
"""Of a header field: a number, the hello's version bytes, or an array."""


class CLibraryMissing(Exception):
    """There is no libusbredirparser on this machine."""


class StateRejected(Exception):
    """``usbredirparser_unserialize`` returned an error. The parser is fit for destruction only."""


class Rule(NamedTuple):
    """A filter rule with C's five ints; -1 = any."""

    device_class: int
    vendor_id: int
    product_id: int
    device_version_bcd: int
    allow: int


class Event(NamedTuple):
    """A packet callback: only fields that are on the wire under the negotiated capabilities.

    *id* is None for the callbacks without one, *data* for packets that carry none.
    """

    name: str
    id: int | None
    fields: Mapping[str, Value]
    data: bytes | None = None
    rules: tuple[Rule, ...] | None = None


class Log(NamedTuple):
    """A log callback; *key* is the label of :func:`log_key`."""

    level: int
    text: str
    key: str


class PacketShape(NamedTuple):
    """How the C functions of a packet look."""

    has_id: bool
    has_data: bool
    sendable: bool


# Type headers: field, C type (B u8, H u16, I u32), element count if an array. Order and sizes of usbredirproto.h.
HEADERS: Mapping[str, tuple[tuple[str, str, int], ...]] = {
    name: tuple((field, code[0], int(code[1:] or 1)) for field, code in (item.split(":") for item in text.split()))
    for name, text in {
        "hello": "version:c64",
        "device_connect": "speed:B device_class:B device_subclass:B device_protocol:B "
        "vendor_id:H product_id:H device_version_bcd:H",
        "device_disconnect": "",
        "reset": "",
        "interface_info": "interface_count:I interface:B32 interface_class:B32 interface_subclass:B32 "
        "interface_protocol:B32",
        "ep_info": "type:B32 interval:B32 interface:B32 max_packet_size:H32 max_streams:I32",
        "set_configuration": "configuration:B",
        "get_configuration": "",
        "configuration_status": "status:B configuration:B",
        "set_alt_setting": "interface:B alt:B",
        "get_alt_setting": "interface:B",
        "alt_setting_status": "status:B interface:B alt:B",
        "start_iso_stream": "endpoint:B pkts_per_urb:B no_urbs:B",
        "stop_iso_stream": "endpoint:B",
        "iso_stream_status": "status:B endpoint:B",
        "start_interrupt_receiving": "endpoint:B",
        "stop_interrupt_receiving": "endpoint:B",
        "interrupt_receiving_status": "status:B endpoint:B",
        "alloc_bulk_streams": "endpoints:I no_streams:I",
        "free_bulk_streams": "endpoints:I",
        "bulk_streams_status": "endpoints:I no_streams:I status:B",
        "cancel_data_packet": "",
        "filter_reject": "",
        "filter_filter": "",
        "device_disconnect_ack": "",
        "start_bulk_receiving": "stream_id:I bytes_per_transfer:I endpoint:B no_transfers:B",
        "stop_bulk_receiving": "stream_id:I endpoint:B",
        "bulk_receiving_status": "stream_id:I endpoint:B status:B",
        "control_packet": "endpoint:B request:B requesttype:B status:B value:H index:H length:H",
        "bulk_packet": "endpoint:B status:B length:H stream_id:I length_high:H",
        "iso_packet": "endpoint:B status:B length:H",
        "interrupt_packet": "endpoint:B status:B length:H",
        "buffered_bulk_packet": "stream_id:I length:I endpoint:B status:B",
    }.items()
}

_WITHOUT_ID = {
    "hello",
    "device_connect",
    "device_disconnect",
    "reset",
    "interface_info",
    "ep_info",
    "filter_reject",
    "filter_filter",
    "device_disconnect_ack",
}

PACKETS: Mapping[str, PacketShape] = {
    name: PacketShape(
        has_id=name not in _WITHOUT_ID,
        has_data=name.endswith("_packet") and name != "cancel_data_packet",
        sendable=name not in ("hello", "device_disconnect_ack"),
    )
    for name in HEADERS
}

# Members of struct usbredirparser behind priv, log, read and write: versions of the library appended to it.
_NAMES = list(HEADERS)
_MEMBERS = [
    *_NAMES[_NAMES.index("device_connect") : _NAMES.index("filter_reject")],
    *_NAMES[_NAMES.index("control_packet") : _NAMES.index("buffered_bulk_packet")],
    *("alloc_lock", "lock", "unlock", "free_lock", "hello"),
    *_NAMES[_NAMES.index("filter_reject") : _NAMES.index("control_packet")],
    "buffered_bulk_packet",
]

_CTYPES = {"B": C.c_uint8, "H": C.c_uint16, "I": C.c_uint32, "c": C.c_uint8}


def _structure(name: str) -> type[C.LittleEndianStructure]:
    fields = [(field, _CTYPES[code] if count == 1 else _CTYPES[code] * count) for field, code, count in HEADERS[name]]
    members = {"_pack_": 1, "_layout_": "ms", "_fields_": fields}
    return type(name, (C.LittleEndianStructure,), members)


_STRUCTS = {name: _structure(name) for name, fields in HEADERS.items() if fields}


class _Rule(C.Structure):
    _fields_ = tuple((field, C.c_int) for field in Rule._fields)


class _Parser(C.Structure):
    _fields_ = tuple((name, C.c_void_p) for name in ["priv", "log_func", "read_func", "write_func", *_MEMBERS])


_P = C.POINTER(_Parser)
_LOG = C.CFUNCTYPE(None, C.c_void_p, C.c_int, C.c_char_p)
_IO = C.CFUNCTYPE(C.c_int, C.c_void_p, C.c_void_p, C.c_int)
_RULES = C.CFUNCTYPE(None, C.c_void_p, C.c_void_p, C.c_int)
_ALLOC_LOCK = C.CFUNCTYPE(C.c_void_p)
_USE_LOCK = C.CFUNCTYPE(None, C.c_void_p)


def _arguments(name: str) -> list[Any]:
    """Argument types that send function and callback have in common, behind the first one."""
    shape = PACKETS[name]
    types: list[Any] = [C.c_uint64] if shape.has_id else []
    if name in _STRUCTS:
        types.append(C.POINTER(_STRUCTS[name]))
    if shape.has_data:
        types += [C.c_void_p, C.c_int]
    return types


_CALLBACKS: dict[str, Any] = {
    name: _RULES if name == "filter_filter" else C.CFUNCTYPE(None, C.c_void_p, *_arguments(name)) for name in PACKETS
}


@lru_cache(maxsize=1)
def load() -> C.CDLL:
    """The library with its prototypes declared. Raises :class:`CLibraryMissing`."""
    wanted = os.environ.get("USBREDIR_LIB")
    names = [wanted] if wanted else [ctypes.util.find_library("usbredirparser"), "libusbredirparser.so.1"]
    for name in filter(None, names):
        try:
            library = C.CDLL(name)
            break
        except OSError:
            continue
    else:
        raise CLibraryMissing(f"libusbredirparser not found (looked for {', '.join(filter(None, names))})")
    _declare(library)
    return library


def _declare(library: C.CDLL) -> None:
    p8 = C.POINTER(C.c_uint8)
    prototypes: dict[str, tuple[Any, list[Any]]] = {
        "create": (_P, []),
        "init": (None, [_P, C.c_char_p, C.POINTER(C.c_uint32), C.c_int, C.c_int]),
        "destroy": (None, [_P]),
        "have_cap": (C.c_int, [_P, C.c_int]),
        "have_peer_caps": (C.c_int, [_P]),
        "peer_has_cap": (C.c_int, [_P, C.c_int]),
        "do_read": (C.c_int, [_P]),
        "do_write": (C.c_int, [_P]),
        "has_data_to_write": (C.c_int, [_P]),
        "get_bufferered_output_size": (C.c_uint64, [_P]),
        "free_write_buffer": (None, [_P, C.c_void_p]),
        "free_packet_data": (None, [_P, C.c_void_p]),
        "serialize": (C.c_int, [_P, C.POINTER(p8), C.POINTER(C.c_int)]),
        "unserialize": (C.c_int, [_P, C.c_char_p, C.c_int]),
        "send_filter_filter": (None, [_P, C.POINTER(_Rule), C.c_int]),
    }
    for name, shape in PACKETS.items():
        if shape.sendable:
            prototypes.setdefault(f"send_{name}", (None, [_P, *_arguments(name)]))
    for name, (result, arguments) in prototypes.items():
        function = getattr(library, f"usbredirparser_{name}")
        function.restype, function.argtypes = result, arguments
    library.usbredirfilter_free.restype = None
    library.usbredirfilter_free.argtypes = [C.c_void_p]
    library.usbredirfilter_string_to_rules.argtypes = [C.c_char_p] * 3 + [C.POINTER(C.c_void_p), C.POINTER(C.c_int)]
    library.usbredirfilter_rules_to_string.restype = C.c_void_p
    library.usbredirfilter_rules_to_string.argtypes = [C.POINTER(_Rule), C.c_int, C.c_char_p, C.c_char_p]
    check: list[Any] = [
        *(C.POINTER(_Rule), C.c_int, C.c_uint8, C.c_uint8, C.c_uint8, C.c_char_p, C.c_char_p, C.c_char_p, C.c_int),
        *(C.c_uint16, C.c_uint16, C.c_uint16, C.c_int),
    ]
    library.usbredirfilter_check.argtypes = check


@lru_cache(maxsize=1)
def _libc_free() -> Callable[[Any], None]:
    function = C.CDLL(None).free
    function.restype, function.argtypes = None, [C.c_void_p]
    return lambda pointer: function(C.cast(pointer, C.c_void_p))


# -- log messages ------------------------------------------------------------------------------

_KEYS = [
    (key, re.compile(pattern))
    for key, pattern in (
        ("bad_type", "invalid usb-redir packet type"),
        ("packet_too_large", "packet length of .* larger than permitted"),
        ("bad_length", "invalid packet type .* length"),
        ("interface_count_limit", "interface_count > "),
        ("endpoint_not_input", "(on|for) non input ep"),
        ("missing_cap_filter", "without cap_filter"),
        ("missing_cap_disconnect_ack", "without cap_device_disconnect_ack"),
        ("missing_cap_bulk_receiving", "without cap_bulk_receiving"),
        ("filter_no_data", "filter_filter without data"),
        ("filter_not_terminated", "non 0 terminated filter_filter"),
        ("filter_parse_failed", "error parsing filter"),
        ("filter_to_string_failed", "error creating filter string"),
        ("bulk_length_limit", "(transfer|receiving) length exceeds limits"),
        ("data_length_mismatch", "data len .* != header len"),
        ("unexpected_data", "unexpected extra data"),
        ("wrong_direction", "send in wrong direction"),
        ("send_type_not_allowed", "packet type unknown with internal call"),
        ("send_invalid_params", "call invalid params"),
        ("duplicate_hello", "second hello message"),
        ("peer_hello", "Peer version: "),
        ("caps_fixed", "caps contains cap_bulk_streams"),
        ("cap_out_of_bounds", "out of bounds cap"),
        ("state_bad_magic", "magic mismatch"),
        ("state_not_pristine", "must use a pristine parser"),
        ("state_length_mismatch", "unserialize length mismatch"),
        ("state_underrun", "buffer underrun while unserializing"),
        ("state_overrun", "buffer overrun while unserializing"),
        ("state_header_invalid", "packet header invalid"),
        ("state_source_has_extra_caps", "unserialize caps mismatch"),
        ("state_source_lacks_caps", "unserialize missing some caps"),
        ("state_empty_write_buffer", "write buffer .* is empty"),
        ("state_trailing_bytes", "bytes of extraneous state data"),
    )
]


def log_key(text: str) -> str:
    """A short label for a message of the C library, "" for one that is not known."""
    return next((key for key, pattern in _KEYS if pattern.search(text)), "")


# -- the parser --------------------------------------------------------------------------------


def wire_fields(name: str, has: Callable[[int], bool]) -> frozenset[str]:
    """Fields of packet *name* on the wire; has(bit) says whether both sides have a capability."""
    fields = {field for field, _, _ in HEADERS[name]}
    if name == "device_connect" and not has(1):
        fields.discard("device_version_bcd")
    elif name == "ep_info" and not has(0):
        fields.discard("max_streams")
        if not has(4):
            fields.discard("max_packet_size")
    elif name == "bulk_packet" and not has(6):
        fields.discard("length_high")
    return frozenset(fields)


class CParser:
    """One ``struct usbredirparser``. Every packet callback is installed and recorded.

    *caps* is the capability word given to init. What happened is appended to :attr:`records`
    (packets and log messages in their order); with *on_record* it is given to that function instead.
    *lock* switches locking on, with that object's acquire and release.
    """

    def __init__(
        self,
        *,
        host: bool = False,
        caps: int = 0xFF,
        version: bytes = b"test",
        no_hello: bool = False,
        write_owns_buffer: bool = False,
        on_record: Callable[[Event | Log], None] | None = None,
        lock: Any = None,
    ) -> None:
        self._library = library = load()
        self.host = host
        self.records: list[Event | Log] = []
        self._record = on_record or self.records.append
        self._owns_buffer = write_owns_buffer
        self._input = memoryview(b"")
        self._input_end = 0
        self._written = bytearray()
        self._answer: Callable[[int], int] = _accept_all
        self._parser = library.usbredirparser_create()
        if not self._parser:
            raise MemoryError("usbredirparser_create")
        self._alive: list[Any] = []
        self._install(lock)
        words = (C.c_uint32 * 1)(caps)
        flags = (0x01 if host else 0) | (0x02 if write_owns_buffer else 0) | (0x04 if no_hello else 0)
        library.usbredirparser_init(self._parser, version, words, 1, flags)

    def _install(self, lock: Any) -> None:
        callbacks: dict[str, Any] = {
            "log_func": _LOG(self._on_log),
            "read_func": _IO(self._on_read),
            "write_func": _IO(self._on_write),
        }
        for name in PACKETS:
            callbacks[name] = _CALLBACKS[name](self._packet_callback(name))
        if lock is not None:
            callbacks["alloc_lock"] = _ALLOC_LOCK(lambda: 1)
            callbacks["lock"] = _USE_LOCK(lambda _lock: _ignore(lock.acquire()))
            callbacks["unlock"] = _USE_LOCK(lambda _lock: _ignore(lock.release()))
            callbacks["free_lock"] = _USE_LOCK(lambda _: None)
        self._alive += callbacks.values()
        for name, callback in callbacks.items():
            setattr(self._parser.contents, name, C.cast(callback, C.c_void_p))

    def destroy(self) -> None:
        """Free everything. Idempotent."""
        if self._parser:
            self._library.usbredirparser_destroy(self._parser)
            self._parser = None
            self._alive.clear()

    def __enter__(self) -> CParser:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None, /
    ) -> None:
        self.destroy()

    def __del__(self) -> None:
        if getattr(self, "_parser", None):
            self.destroy()

    # callbacks from C

    def _on_log(self, _priv: object, level: int, message: bytes) -> None:
        text = message.decode("utf-8", "replace")
        self._record(Log(level, text, log_key(text) if level <= 3 else ""))

    def _on_read(self, _priv: object, address: int, count: int) -> int:
        if not self._input:
            return self._input_end
        piece = self._input[:count]
        C.memmove(address, bytes(piece), len(piece))
        self._input = self._input[len(piece) :]
        return len(piece)

    def _on_write(self, _priv: object, address: int, count: int) -> int:
        accepted = self._answer(count)
        if accepted <= 0:
            return accepted
        self._written += C.string_at(address, accepted)
        if self._owns_buffer:
            self._library.usbredirparser_free_write_buffer(self._parser, address)
        return accepted

    def _packet_callback(self, name: str) -> Callable[..., None]:
        shape, header = PACKETS[name], name in _STRUCTS
        if name == "filter_filter":

            def rules_received(_priv: object, address: int | None, count: int) -> None:
                rules = self._take_rules(address, count)
                self._record(Event(name, None, {}, rules=rules))

            return rules_received

        def received(_priv: object, *arguments: Any) -> None:
            rest = list(arguments)
            packet_id = rest.pop(0) if shape.has_id else None
            fields = self._fields_of(name, rest.pop(0).contents) if header else {}
            data: bytes | None = None
            if shape.has_data:
                data = self._take_data(*rest)
            self._record(Event(name, packet_id, fields, data))

        return received

    def _take_data(self, address: int | None, count: int) -> bytes:
        if not address:
            return b""
        data = C.string_at(address, count)
        self._library.usbredirparser_free_packet_data(self._parser, address)
        return data

    def _take_rules(self, address: int | None, count: int) -> tuple[Rule, ...]:
        if not address:
            return ()
        rules = _rules_at(address, count)
        self._library.usbredirfilter_free(address)
        return rules

    def _fields_of(self, name: str, header: C.LittleEndianStructure) -> dict[str, Value]:
        values: dict[str, Value] = {}
        present = wire_fields(name, self._both_have)
        for field, code, count in HEADERS[name]:
            value = getattr(header, field)
            if code == "c":
                values[field] = bytes(value)
            elif field in present:
                values[field] = value if count == 1 else tuple(value)
        if name == "hello":
            values["capabilities"] = tuple(cap for cap in range(32) if self.peer_has_cap(cap))
        elif name == "bulk_packet":
            low, high = values["length"], values.pop("length_high", 0)
            assert isinstance(low, int)
            assert isinstance(high, int)
            values["length"] = low | high << 16
        return values

    def _both_have(self, cap: int) -> bool:
        return self.have_cap(cap) and self.peer_has_cap(cap)

    # reading

    def feed(self, data: bytes, sizes: Iterable[int] = (), *, end: int = 0) -> list[int]:
        """Hand *data* over in pieces of *sizes* (what is left: one piece); do_read until it does not complain.

        Returns all results of do_read. *end* is what the read callback answers at the end of a piece.
        """
        results: list[int] = []
        start = 0
        for size in [*sizes, len(data)]:
            piece = data[start : start + size]
            start += len(piece)
            if piece or not data:
                self._input = memoryview(piece)
                self._input_end = end
                results += self._read_all()
        return results

    def _read_all(self) -> list[int]:
        results = []
        while True:
            results.append(self._library.usbredirparser_do_read(self._parser))
            if results[-1] != -2:
                return results

    def do_read_once(self, data: bytes | None = None, *, end: int = 0) -> tuple[int, int]:
        """One do_read call on *data* (None: on what is left). Returns (result, bytes left)."""
        if data is not None:
            self._input, self._input_end = memoryview(data), end
        result = self._library.usbredirparser_do_read(self._parser)
        return result, len(self._input)

    # writing

    def do_write(self, answer: Callable[[int], int] | None = None) -> tuple[int, bytes]:
        """One do_write call. *answer* gives the write callback's result for the count offered (default: all of it).

        Returns (result, bytes accepted).
        """
        self._answer = answer or _accept_all
        self._written = bytearray()
        result: int = self._library.usbredirparser_do_write(self._parser)
        return result, bytes(self._written)

    def has_data_to_write(self) -> int:
        result: int = self._library.usbredirparser_has_data_to_write(self._parser)
        return result

    def buffered_output_size(self) -> int:
        result: int = self._library.usbredirparser_get_bufferered_output_size(self._parser)
        return result

    # sending

    def send(self, name: str, packet_id: int = 0, data: bytes | None = None, **fields: Any) -> None:
        """Call ``send_<name>``. Fields not named are 0; bulk ``length`` is the whole number.

        *data* None is a NULL pointer. For filter_filter the only field is ``rules``.
        """
        function = getattr(self._library, f"usbredirparser_send_{name}")
        if name == "filter_filter":
            rules = fields["rules"]
            function(self._parser, _rule_array(rules), len(rules))
            return
        arguments: list[Any] = [packet_id] if PACKETS[name].has_id else []
        if name in _STRUCTS:
            arguments.append(C.byref(_fill(name, fields)))
        if PACKETS[name].has_data:
            arguments += [data, len(data or b"")]
        function(self._parser, *arguments)

    # capabilities

    def have_cap(self, cap: int) -> bool:
        return bool(self._library.usbredirparser_have_cap(self._parser, cap))

    def peer_has_cap(self, cap: int) -> bool:
        return bool(self._library.usbredirparser_peer_has_cap(self._parser, cap))

    def have_peer_caps(self) -> bool:
        return bool(self._library.usbredirparser_have_peer_caps(self._parser))

    # migration

    def serialize(self) -> bytes:
        state, length = C.POINTER(C.c_uint8)(), C.c_int(0)
        if self._library.usbredirparser_serialize(self._parser, C.byref(state), C.byref(length)) != 0:
            raise MemoryError("usbredirparser_serialize")
        try:
            return C.string_at(state, length.value)
        finally:
            _libc_free()(state)

    def unserialize(self, state: bytes) -> None:
        """Raises :class:`StateRejected`; destroy the parser then."""
        if self._library.usbredirparser_unserialize(self._parser, state, len(state)) != 0:
            raise StateRejected

    # records

    @property
    def events(self) -> list[Event]:
        return [record for record in self.records if isinstance(record, Event)]

    @property
    def logs(self) -> list[Log]:
        return [record for record in self.records if isinstance(record, Log)]

    def take(self) -> list[Event | Log]:
        """The records so far, which are then forgotten."""
        taken = self.records[:]
        self.records.clear()
        return taken


def _accept_all(offered: int) -> int:
    return offered


def _ignore(_value: object) -> None:
    """A callback without a result must give None."""


def _fill(name: str, fields: Mapping[str, Any]) -> C.LittleEndianStructure:
    values = dict(fields)
    if name == "bulk_packet":
        length = values.pop("length", 0)
        values["length"], values["length_high"] = length & 0xFFFF, length >> 16
    header = _STRUCTS[name]()
    for field, _code, count in HEADERS[name]:
        value = values.pop(field, 0)
        if count == 1:
            setattr(header, field, value)
        elif value:
            getattr(header, field)[:] = value
    if values:
        raise TypeError(f"{name} has no field {', '.join(values)}")
    return header


# -- the filter --------------------------------------------------------------------------------


def _rule_array(rules: Sequence[Sequence[int]]) -> Any:
    return (_Rule * max(1, len(rules)))(*[_Rule(*rule) for rule in rules])


def _rules_at(address: int, count: int) -> tuple[Rule, ...]:
    array = (_Rule * count).from_address(address)
    return tuple(Rule(*[getattr(rule, field) for field in Rule._fields]) for rule in array)


def filter_parse(text: bytes, token_sep: bytes = b",", rule_sep: bytes = b"|") -> tuple[Rule, ...] | int:
    """usbredirfilter_string_to_rules: the rules, or the negative error number."""
    library, rules, count = load(), C.c_void_p(), C.c_int(0)
    result: int = library.usbredirfilter_string_to_rules(text, token_sep, rule_sep, C.byref(rules), C.byref(count))
    if result != 0:
        return result
    if not rules.value:
        return ()
    try:
        return _rules_at(rules.value, count.value)
    finally:
        library.usbredirfilter_free(rules)


def filter_to_string(rules: Sequence[Sequence[int]], token_sep: bytes = b",", rule_sep: bytes = b"|") -> bytes | None:
    """usbredirfilter_rules_to_string: the text, or None if the rules are not valid."""
    library = load()
    address = library.usbredirfilter_rules_to_string(_rule_array(rules), len(rules), token_sep, rule_sep)
    if not address:
        return None
    try:
        return C.string_at(address)
    finally:
        library.usbredirfilter_free(address)


def filter_check(
    rules: Sequence[Sequence[int]],
    device: tuple[int, int, int],
    interfaces: Sequence[tuple[int, int, int]],
    ids: tuple[int, int, int],
    flags: int = 0,
) -> int:
    """usbredirfilter_check: 0 or a negative error number. *ids*: vendor, product, version."""
    columns = [bytes(column) for column in zip(*interfaces, strict=True)] or [b""] * 3
    result: int = load().usbredirfilter_check(
        _rule_array(rules), len(rules), *device, *columns, len(interfaces), *ids, flags
    )
    return result
