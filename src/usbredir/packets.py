"""The 33 packets of the protocol, one class each, in order of their numbers.

A class declares its fields in wire order with their widths, and its rules as class arguments; sizes, encoding,
decoding, direction and capability checks, ``repr``, the table in docs/protocol.md and the test strategies all
derive from that.

Packets are constructed with keyword arguments; what is left out is zero, and ``length`` of a data packet
is ``len(data)``. They are immutable and equal only to a packet of the same type with the same values. Every
packet has ``id`` (0 unless chosen), the five data packets have ``data`` (bytes-like).
Fields that the negotiated capabilities leave off the wire are None in a decoded packet and ignored when sent.

Threads: any. Source: docs/protocol.md, "Packets".
"""

from collections import namedtuple
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypeVar

from . import capabilities as _capabilities
from . import filter as _filter
from ._layout import AtMost, Declaration, Field, Reject, Wire, array, constructor
from .filter import FilterRule
from .proto import MAX_INTERFACES, Capability, Direction, PacketType, Speed, Status, TransferType

if TYPE_CHECKING:
    from typing_extensions import dataclass_transform
else:

    def dataclass_transform(**_):
        """Only type checkers need it; typing has it from Python 3.11 on."""
        return lambda cls: cls


__all__ = [
    "PACKET_TYPES",
    "AllocBulkStreams",
    "AltSettingStatus",
    "BufferedBulkPacket",
    "BulkPacket",
    "BulkReceivingStatus",
    "BulkStreamsStatus",
    "CancelDataPacket",
    "Capability",
    "ConfigurationStatus",
    "ControlPacket",
    "DataPacket",
    "DeviceConnect",
    "DeviceDisconnect",
    "DeviceDisconnectAck",
    "EpInfo",
    "FilterFilter",
    "FilterReject",
    "FreeBulkStreams",
    "GetAltSetting",
    "GetConfiguration",
    "Hello",
    "InterfaceInfo",
    "InterruptPacket",
    "InterruptReceivingStatus",
    "IsoPacket",
    "IsoStreamStatus",
    "Packet",
    "PacketType",
    "Reset",
    "SetAltSetting",
    "SetConfiguration",
    "Speed",
    "StartBulkReceiving",
    "StartInterruptReceiving",
    "StartIsoStream",
    "Status",
    "StopBulkReceiving",
    "StopInterruptReceiving",
    "StopIsoStream",
    "TransferType",
]

HOST_TO_GUEST = Direction.HOST_TO_GUEST
GUEST_TO_HOST = Direction.GUEST_TO_HOST
BOTH = Direction.BOTH

Self = TypeVar("Self", bound="Packet")

# ---------------------------------------------------------------- the kinds of fields

U8 = Annotated[int, Wire("B")]
U16 = Annotated[int, Wire("H")]
U32 = Annotated[int, Wire("I")]

_TABLE8, ZEROS = array("B")
_PACKET_SIZES, _ = array("H", since=(Capability.BULK_STREAMS, Capability.EP_INFO_MAX_PACKET_SIZE))
_STREAMS, _ = array("I", since=(Capability.BULK_STREAMS,))
Table8 = Annotated[tuple[int, ...], _TABLE8]

LENGTH_OF_DATA: Any = None
"""Default of *length*: the constructor puts ``len(data)`` in its place."""

HELLO_VERSION_BYTES = 64


def _version_to_wire(version: str) -> bytes:
    return version.encode(errors="replace")[: HELLO_VERSION_BYTES - 1]


def _version_from_wire(field: bytes) -> str:
    return field.partition(b"\0")[0].decode(errors="replace")


def _words_to_wire(members: frozenset[int]) -> bytes:
    return _capabilities.mask_of(members).to_bytes(4, "little")


def _words_from_wire(data: bytes) -> frozenset[int]:
    # Whole words only, and only the first one has a meaning.
    return _capabilities.members_of(int.from_bytes(data[:4], "little") if len(data) >= 4 else 0)


def _rules_to_wire(rules: tuple[FilterRule, ...]) -> bytes:
    return _filter.format(rules).encode() + b"\0"


def _rules_from_wire(data: bytes) -> tuple[FilterRule, ...]:
    if not data:
        raise Reject("filter_no_data")
    if data[-1]:
        raise Reject("filter_not_terminated")
    return tuple(_filter.parse(data.partition(b"\0")[0].decode("latin-1")))


# ---------------------------------------------------------------- the base class


@dataclass_transform(kw_only_default=True, frozen_default=True)
class _PacketMeta(type):
    """Turns the annotations of a packet class into fields of a tuple.

    A tuple subclass, because a receiver makes one object per packet: ``tuple.__new__`` takes 60 ns,
    a frozen dataclass 430 ns.
    """

    def __new__(
        mcls,
        name: str,
        bases: tuple[type, ...],
        namespace: dict[str, Any],
        packet_type: PacketType | None = None,
        **rules: Any,
    ) -> "_PacketMeta":
        namespace.setdefault("__slots__", ())
        cls = super().__new__(mcls, name, bases, namespace)
        if packet_type is not None:
            mcls._declare(cls, packet_type, rules)
        return cls

    def _declare(cls: Any, packet_type: PacketType, rules: dict[str, Any]) -> None:
        fields = []
        for name, annotation in cls.__annotations__.items():
            wire, *at_most = annotation.__metadata__
            fields.append(Field(name, wire, cls.__dict__[name], *at_most))
        declaration = Declaration(
            cls.__name__, packet_type, fields=tuple(fields), transfers=issubclass(cls, _DATA_BASE), cls=cls, **rules
        )
        cls.declaration = declaration
        cls.packet_type = packet_type
        cls.direction = declaration.direction
        for name, getter in zip(declaration.stored, _GETTERS[: len(declaration.stored)], strict=True):
            setattr(cls, name, getter)
        cls.__new__ = _Constructor(declaration)
        _registry[packet_type] = cls


class _Constructor:
    """Stands for a packet class's ``__new__`` until that is first asked for.

    Making one takes 60 us, and most programs use few of the 33 classes.
    """

    def __init__(self, declaration: Declaration) -> None:
        self._declaration = declaration

    def __get__(self, packet: object, cls: type) -> Callable[..., Any]:
        made = constructor(self._declaration)
        self._declaration.cls.__new__ = staticmethod(made)  # type: ignore[method-assign]
        return made


_Values = namedtuple("_Values", "a b c d e f g h i j k l m n o p")
_GETTERS = [vars(_Values)[name] for name in _Values._fields]
"""Descriptors by position, namedtuple's own: reading a field costs 15 ns, through a property 45."""


_registry: dict[int, type["Packet"]] = {}
_DATA_BASE: tuple[type, ...] = ()


class Packet(tuple[Any, ...], metaclass=_PacketMeta):
    """One usbredir packet. See the module's documentation for what all packets have in common."""

    declaration: ClassVar[Declaration]
    packet_type: ClassVar[PacketType]
    direction: ClassVar[Direction]

    id: int = 0

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and tuple.__eq__(self, other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash((self.packet_type, *(value for name, value in self.as_dict().items() if name != "data")))

    def as_dict(self) -> dict[str, Any]:
        """The values by name: id, the fields in wire order, data."""
        return dict(zip(self.declaration.stored, self, strict=True))

    def replace(self: Self, **changes: Any) -> Self:
        """A copy with other values."""
        return type(self)(**{**self.as_dict(), **changes})

    def __reduce__(self) -> tuple[Any, ...]:
        return _remake, (type(self), self.as_dict())

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{n}={_show(n, v)}' for n, v in self.as_dict().items())})"


def _remake(cls: type[Packet], values: dict[str, Any]) -> Packet:
    return cls(**values)


HEXADECIMAL = {"endpoint": 2, "requesttype": 2, "vendor_id": 4, "product_id": 4, "endpoints": 8}
"""Fields that ``repr`` shows in hexadecimal, and how many digits."""


def _show(name: str, value: Any) -> str:
    if name == "data":
        start = bytes(value[:16]).hex(" ")
        return f"<{len(value)} bytes{': ' if len(value) else ''}{start}{' ...' if len(value) > 16 else ''}>"
    if isinstance(value, frozenset):
        return "{" + ", ".join(getattr(member, "name", str(member)) for member in sorted(value)) + "}"
    if isinstance(value, tuple) and len(value) == MAX_INTERFACES and len(set(value)) == 1:
        return f"({value[0]},) * {MAX_INTERFACES}"
    if name == "status" and value in Status._value2member_map_:
        return Status(value).name
    if name in HEXADECIMAL and isinstance(value, int):
        return f"0x{value:0{HEXADECIMAL[name]}x}"
    return repr(value)


class DataPacket(Packet):
    """A packet that carries the data of a transfer."""

    data: bytes | bytearray | memoryview = b""


_DATA_BASE = (DataPacket,)

# ---------------------------------------------------------------- control packets


class Hello(Packet, packet_type=PacketType.HELLO, direction=BOTH):
    """The first packet of each side: who it is, and what it can do."""

    version: Annotated[str, Wire("64s", to_wire=_version_to_wire, from_wire=_version_from_wire)] = ""
    capabilities: Annotated[
        frozenset[int],
        Wire(in_data=True, text="u32 words", convert=frozenset, to_wire=_words_to_wire, from_wire=_words_from_wire),
    ] = frozenset()


class DeviceConnect(Packet, packet_type=PacketType.DEVICE_CONNECT, direction=HOST_TO_GUEST):
    """A device is there. Interfaces and endpoints were told before."""

    speed: U8 = 0
    device_class: U8 = 0
    device_subclass: U8 = 0
    device_protocol: U8 = 0
    vendor_id: U16 = 0
    product_id: U16 = 0
    device_version_bcd: Annotated[int | None, Wire("H", since=(Capability.CONNECT_DEVICE_VERSION,))] = 0


class DeviceDisconnect(Packet, packet_type=PacketType.DEVICE_DISCONNECT, direction=HOST_TO_GUEST):
    """The device is gone."""


class Reset(Packet, packet_type=PacketType.RESET, direction=GUEST_TO_HOST):
    """Reset the device. There is no reply."""


class InterfaceInfo(Packet, packet_type=PacketType.INTERFACE_INFO, direction=HOST_TO_GUEST):
    """The interfaces of the active configuration, in slots 0 to interface_count - 1."""

    interface_count: Annotated[int, Wire("I"), AtMost(MAX_INTERFACES, "interface_count_limit")] = 0
    interface: Table8 = ZEROS
    interface_class: Table8 = ZEROS
    interface_subclass: Table8 = ZEROS
    interface_protocol: Table8 = ZEROS


class EpInfo(Packet, packet_type=PacketType.EP_INFO, direction=HOST_TO_GUEST):
    """The endpoints of the current alternate settings, by endpoint index (OUT 0-15, IN 16-31)."""

    type: Table8 = ZEROS
    interval: Table8 = ZEROS
    interface: Table8 = ZEROS
    max_packet_size: Annotated[tuple[int, ...] | None, _PACKET_SIZES] = ZEROS
    max_streams: Annotated[tuple[int, ...] | None, _STREAMS] = ZEROS


class SetConfiguration(Packet, packet_type=PacketType.SET_CONFIGURATION, direction=GUEST_TO_HOST, carries_id=True):
    """Select a configuration by its value; 0 unconfigures."""

    configuration: U8 = 0


class GetConfiguration(Packet, packet_type=PacketType.GET_CONFIGURATION, direction=GUEST_TO_HOST, carries_id=True):
    """Ask for the active configuration."""


class ConfigurationStatus(
    Packet, packet_type=PacketType.CONFIGURATION_STATUS, direction=HOST_TO_GUEST, carries_id=True
):
    """Answer to SetConfiguration and GetConfiguration."""

    status: U8 = 0
    configuration: U8 = 0


class SetAltSetting(Packet, packet_type=PacketType.SET_ALT_SETTING, direction=GUEST_TO_HOST, carries_id=True):
    """Select an alternate setting of an interface."""

    interface: U8 = 0
    alt: U8 = 0


class GetAltSetting(Packet, packet_type=PacketType.GET_ALT_SETTING, direction=GUEST_TO_HOST, carries_id=True):
    """Ask for the alternate setting of an interface."""

    interface: U8 = 0


class AltSettingStatus(Packet, packet_type=PacketType.ALT_SETTING_STATUS, direction=HOST_TO_GUEST, carries_id=True):
    """Answer to SetAltSetting and GetAltSetting."""

    status: U8 = 0
    interface: U8 = 0
    alt: U8 = 0


class StartIsoStream(Packet, packet_type=PacketType.START_ISO_STREAM, direction=GUEST_TO_HOST, carries_id=True):
    """Start an isochronous stream of *no_urbs* transfers with *pkts_per_urb* packets each."""

    endpoint: U8 = 0
    pkts_per_urb: U8 = 0
    no_urbs: U8 = 0


class StopIsoStream(Packet, packet_type=PacketType.STOP_ISO_STREAM, direction=GUEST_TO_HOST, carries_id=True):
    """Stop an isochronous stream."""

    endpoint: U8 = 0


class IsoStreamStatus(Packet, packet_type=PacketType.ISO_STREAM_STATUS, direction=HOST_TO_GUEST, carries_id=True):
    """Answer to start and stop; unasked: the stream ended (stall) or lost a packet."""

    status: U8 = 0
    endpoint: U8 = 0


class StartInterruptReceiving(
    Packet, packet_type=PacketType.START_INTERRUPT_RECEIVING, direction=GUEST_TO_HOST, carries_id=True, input_only=True
):
    """Start polling an interrupt IN endpoint."""

    endpoint: U8 = 0


class StopInterruptReceiving(
    Packet, packet_type=PacketType.STOP_INTERRUPT_RECEIVING, direction=GUEST_TO_HOST, carries_id=True, input_only=True
):
    """Stop polling an interrupt IN endpoint."""

    endpoint: U8 = 0


class InterruptReceivingStatus(
    Packet, packet_type=PacketType.INTERRUPT_RECEIVING_STATUS, direction=HOST_TO_GUEST, carries_id=True, input_only=True
):
    """Answer to start and stop; unasked: receiving ended."""

    status: U8 = 0
    endpoint: U8 = 0


class AllocBulkStreams(Packet, packet_type=PacketType.ALLOC_BULK_STREAMS, direction=GUEST_TO_HOST, carries_id=True):
    """Allocate bulk streams; bit n of *endpoints* is endpoint index n."""

    endpoints: U32 = 0
    no_streams: U32 = 0


class FreeBulkStreams(Packet, packet_type=PacketType.FREE_BULK_STREAMS, direction=GUEST_TO_HOST, carries_id=True):
    """Free bulk streams; bit n of *endpoints* is endpoint index n."""

    endpoints: U32 = 0


class BulkStreamsStatus(Packet, packet_type=PacketType.BULK_STREAMS_STATUS, direction=HOST_TO_GUEST, carries_id=True):
    """Answer to AllocBulkStreams and FreeBulkStreams."""

    endpoints: U32 = 0
    no_streams: U32 = 0
    status: U8 = 0


class CancelDataPacket(Packet, packet_type=PacketType.CANCEL_DATA_PACKET, direction=GUEST_TO_HOST, carries_id=True):
    """Cancel the data packet with this id."""


class FilterReject(Packet, packet_type=PacketType.FILTER_REJECT, direction=GUEST_TO_HOST, needs=Capability.FILTER):
    """The guest does not accept the device."""


class FilterFilter(Packet, packet_type=PacketType.FILTER_FILTER, direction=BOTH, needs=Capability.FILTER):
    """The sender's filter rules."""

    rules: Annotated[
        tuple[FilterRule, ...],
        Wire(
            in_data=True,
            text="filter text and a NUL",
            convert=lambda rules: tuple(FilterRule(*rule) for rule in rules),
            to_wire=_rules_to_wire,
            from_wire=_rules_from_wire,
        ),
    ] = ()


class DeviceDisconnectAck(
    Packet,
    packet_type=PacketType.DEVICE_DISCONNECT_ACK,
    direction=GUEST_TO_HOST,
    needs=Capability.DEVICE_DISCONNECT_ACK,
):
    """The guest has seen DeviceDisconnect. Sent by the parser itself."""


class StartBulkReceiving(
    Packet,
    packet_type=PacketType.START_BULK_RECEIVING,
    direction=GUEST_TO_HOST,
    carries_id=True,
    needs=Capability.BULK_RECEIVING,
    input_only=True,
):
    """Start reading a bulk IN endpoint ahead, *no_transfers* of *bytes_per_transfer* at a time."""

    stream_id: U32 = 0
    bytes_per_transfer: Annotated[int, Wire("I"), AtMost(None, "bulk_length_limit")] = 0
    endpoint: U8 = 0
    no_transfers: U8 = 0


class StopBulkReceiving(
    Packet,
    packet_type=PacketType.STOP_BULK_RECEIVING,
    direction=GUEST_TO_HOST,
    carries_id=True,
    needs=Capability.BULK_RECEIVING,
    input_only=True,
):
    """Stop reading a bulk IN endpoint ahead."""

    stream_id: U32 = 0
    endpoint: U8 = 0


class BulkReceivingStatus(
    Packet,
    packet_type=PacketType.BULK_RECEIVING_STATUS,
    direction=HOST_TO_GUEST,
    carries_id=True,
    needs=Capability.BULK_RECEIVING,
    input_only=True,
):
    """Answer to start and stop; unasked: receiving ended."""

    stream_id: U32 = 0
    endpoint: U8 = 0
    status: U8 = 0


# ---------------------------------------------------------------- data packets


class ControlPacket(DataPacket, packet_type=PacketType.CONTROL_PACKET, direction=BOTH, carries_id=True):
    """A control transfer, or its result. Bit 7 of *endpoint*, not of *requesttype*, is the direction."""

    endpoint: U8 = 0
    request: U8 = 0
    requesttype: U8 = 0
    status: U8 = 0
    value: U16 = 0
    index: U16 = 0  # type: ignore[assignment]  # the wire's name; hides tuple.index
    length: Annotated[int, Wire("H")] = LENGTH_OF_DATA


class BulkPacket(DataPacket, packet_type=PacketType.BULK_PACKET, direction=BOTH, carries_id=True):
    """A bulk transfer, or its result. *length* is the whole 32-bit number."""

    endpoint: U8 = 0
    status: U8 = 0
    length: Annotated[
        int, Wire("H", high_half_since=Capability.BULK_LENGTH_32BITS), AtMost(None, "bulk_length_limit")
    ] = LENGTH_OF_DATA
    stream_id: U32 = 0


class IsoPacket(DataPacket, packet_type=PacketType.ISO_PACKET, direction=BOTH, carries_id=True, data_only=BOTH):
    """One packet of an isochronous stream."""

    endpoint: U8 = 0
    status: U8 = 0
    length: Annotated[int, Wire("H")] = LENGTH_OF_DATA


class InterruptPacket(
    DataPacket, packet_type=PacketType.INTERRUPT_PACKET, direction=BOTH, carries_id=True, data_only=GUEST_TO_HOST
):
    """An interrupt transfer: received data (IN), or an OUT transfer and its result."""

    endpoint: U8 = 0
    status: U8 = 0
    length: Annotated[int, Wire("H")] = LENGTH_OF_DATA


class BufferedBulkPacket(
    DataPacket,
    packet_type=PacketType.BUFFERED_BULK_PACKET,
    direction=HOST_TO_GUEST,
    carries_id=True,
    needs=Capability.BULK_RECEIVING,
    data_only=HOST_TO_GUEST,
):
    """Data of a bulk IN endpoint that is read ahead."""

    stream_id: U32 = 0
    length: Annotated[int, Wire("I"), AtMost(None, "bulk_length_limit")] = LENGTH_OF_DATA
    endpoint: U8 = 0
    status: U8 = 0


PACKET_TYPES: Mapping[int, type[Packet]] = MappingProxyType(dict(sorted(_registry.items())))
"""All packet classes by type number, in order."""
