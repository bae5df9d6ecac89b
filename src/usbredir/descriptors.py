"""USB descriptors: reading the ones a device sends, and building ones for virtual devices.

Descriptors come from devices and are not trusted: every length is checked, a descriptor that does not fit ends
the reading. Source: USB 2.0, 9.6; USB 3.2, 9.6.7.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

from .filter import DeviceIds
from .proto import MAX_INTERFACES, Speed, TransferType

__all__ = [
    "Configuration",
    "DescriptorType",
    "DeviceDescriptor",
    "Endpoint",
    "Interface",
    "bos_descriptor",
    "build_configuration",
    "device_ids",
    "interval_seconds",
    "max_packet_size",
    "parse_configuration",
    "parse_device",
    "string_descriptor",
]


class DescriptorType(IntEnum):
    """bDescriptorType."""

    DEVICE = 1
    CONFIGURATION = 2
    STRING = 3
    INTERFACE = 4
    ENDPOINT = 5
    DEVICE_QUALIFIER = 6
    OTHER_SPEED_CONFIGURATION = 7
    INTERFACE_ASSOCIATION = 11
    BOS = 15
    DEVICE_CAPABILITY = 16
    COMPANION = 48


@dataclass(frozen=True)
class Endpoint:
    """An endpoint descriptor and, at super speed, what its companion adds.

    Attributes:
        attributes: bmAttributes; the low two bits are the transfer type.
        raw_max_packet_size: wMaxPacketSize as sent, with the bits for high-bandwidth.
        max_burst: packets per burst beyond the first (companion).
        max_streams: 2 to the power of the companion's field for bulk endpoints, 0 for none.
        bytes_per_interval: what a periodic endpoint moves per interval (companion).
        tail: bytes of the endpoint descriptor itself beyond the usual seven, as audio endpoints have.
        extra: class-specific descriptors that follow the endpoint's, as sent.
    """

    address: int
    attributes: int
    raw_max_packet_size: int
    interval: int = 0
    interface: int = 0
    max_burst: int = 0
    max_streams: int = 0
    companion: bool = False
    bytes_per_interval: int = 0
    tail: bytes = b""
    extra: bytes = b""

    @property
    def type(self) -> TransferType:
        """The transfer type."""
        return TransferType(self.attributes & 3)


@dataclass(frozen=True)
class Interface:
    """One alternate setting of an interface.

    Attributes:
        extra: class-specific descriptors between the interface's and its first endpoint's, as sent.
        association: the interface association descriptor before it, as sent.
    """

    number: int
    alternate: int
    interface_class: int
    interface_subclass: int = 0
    interface_protocol: int = 0
    name_index: int = 0
    endpoints: tuple[Endpoint, ...] = ()
    extra: bytes = b""
    association: bytes = b""


@dataclass(frozen=True)
class Configuration:
    """A configuration with all its alternate settings, in the order sent."""

    value: int
    attributes: int = 0x80
    max_power: int = 50
    name_index: int = 0
    interfaces: tuple[Interface, ...] = ()

    def numbers(self) -> list[int]:
        """The interface numbers, each once, in the order sent."""
        return list(dict.fromkeys(interface.number for interface in self.interfaces))

    def find(self, number: int, alternate: int) -> Interface | None:
        """An alternate setting by its values: they need not be consecutive."""
        return next((i for i in self.interfaces if (i.number, i.alternate) == (number, alternate)), None)

    def first(self, number: int) -> Interface:
        """The first alternate setting of an interface. Raises KeyError."""
        for interface in self.interfaces:
            if interface.number == number:
                return interface
        raise KeyError(number)


@dataclass(frozen=True)
class DeviceDescriptor:
    """The device descriptor's fields (USB 2.0, table 9-8)."""

    usb_bcd: int
    device_class: int
    device_subclass: int
    device_protocol: int
    max_packet_size0: int
    vendor_id: int
    product_id: int
    device_version_bcd: int
    manufacturer_index: int
    product_index: int
    serial_index: int
    configurations: int = 1

    _LAYOUT = struct.Struct("<BBHBBBBHHHBBBB")

    def to_bytes(self) -> bytes:
        """The descriptor as it is sent."""
        return self._LAYOUT.pack(
            self._LAYOUT.size,
            DescriptorType.DEVICE,
            self.usb_bcd,
            self.device_class,
            self.device_subclass,
            self.device_protocol,
            self.max_packet_size0,
            self.vendor_id,
            self.product_id,
            self.device_version_bcd,
            self.manufacturer_index,
            self.product_index,
            self.serial_index,
            self.configurations,
        )


def parse_device(raw: bytes) -> DeviceDescriptor:
    """Read a device descriptor. Raises ValueError when it is too short or another one."""
    layout = DeviceDescriptor._LAYOUT
    if len(raw) < layout.size or raw[1] != DescriptorType.DEVICE:
        raise ValueError(f"not a device descriptor: {raw[:18].hex(' ')}")
    return DeviceDescriptor(*layout.unpack_from(raw)[2:])


def _pieces(raw: bytes) -> Iterator[bytes]:
    """The single descriptors in *raw*; stops where a length makes no sense."""
    position = 0
    while position + 2 <= len(raw):
        length = raw[position]
        if length < 2 or position + length > len(raw):
            return
        yield raw[position : position + length]
        position += length


def parse_configuration(raw: bytes) -> Configuration:
    """Read a configuration descriptor and all that follows it.

    Raises ValueError when it does not begin with a configuration descriptor, or has more than 32 interfaces.
    """
    pieces = list(_pieces(raw))
    if not pieces or pieces[0][1] != DescriptorType.CONFIGURATION or len(pieces[0]) < 9:
        raise ValueError(f"not a configuration descriptor: {raw[:9].hex(' ')}")
    head = pieces[0]
    interfaces: list[Interface] = []
    association = b""
    for piece in pieces[1:]:
        if piece[1] == DescriptorType.INTERFACE_ASSOCIATION:
            association = piece
        elif piece[1] == DescriptorType.INTERFACE and len(piece) >= 9:
            interface = Interface(piece[2], piece[3], piece[5], piece[6], piece[7], piece[8], association=association)
            interfaces.append(interface)
            association = b""
        elif interfaces:  # before the first interface: class-specific descriptors of the configuration
            interfaces[-1] = _with_piece(interfaces[-1], piece)
    configuration = Configuration(head[5], head[7], head[8], head[6], tuple(interfaces))
    if len(configuration.numbers()) > MAX_INTERFACES:
        raise ValueError(
            f"a configuration with {len(configuration.numbers())} interfaces: at most {MAX_INTERFACES} work"
        )
    return configuration


def _with_piece(interface: Interface, piece: bytes) -> Interface:
    """The interface with one more of the descriptors that follow it."""
    if piece[1] == DescriptorType.ENDPOINT and len(piece) >= 7:
        address, attributes, low, high, interval = piece[2:7]
        endpoint = Endpoint(address, attributes, low | high << 8, interval, interface.number, tail=piece[7:])
        return replace(interface, endpoints=(*interface.endpoints, endpoint))
    if interface.endpoints:
        *before, last = interface.endpoints
        return replace(interface, endpoints=(*before, _extend_endpoint(last, piece)))
    return replace(interface, extra=interface.extra + piece)


def _extend_endpoint(endpoint: Endpoint, piece: bytes) -> Endpoint:
    if piece[1] != DescriptorType.COMPANION or len(piece) < 6:
        return replace(endpoint, extra=endpoint.extra + piece)
    power = piece[3] & 0x1F if endpoint.type is TransferType.BULK else 0
    return replace(
        endpoint,
        companion=True,
        max_burst=piece[2],
        max_streams=1 << power if power else 0,
        bytes_per_interval=int.from_bytes(piece[4:6], "little"),
    )


def max_packet_size(endpoint: Endpoint, speed: Speed) -> int:
    """Bytes per packet: times 2 or 3 for high-bandwidth isochronous endpoints of high-speed devices only."""
    size = endpoint.raw_max_packet_size & 0x7FF
    if speed is Speed.HIGH and endpoint.type is TransferType.ISO:
        extra = endpoint.raw_max_packet_size >> 11 & 3
        return size * (extra + 1 if extra < 3 else 1)
    return size


FRAME, MICROFRAME = 0.001, 0.000125
"""Seconds between two starts of frames, and of microframes at high and super speed."""


def interval_seconds(endpoint: Endpoint, speed: Speed) -> float:
    """Seconds between two polls of an interrupt or isochronous endpoint; 0 for the others.

    A value outside of what the speed allows counts as the nearest one. Source: USB 2.0, table 9-13; USB 3.2, 9.6.6.
    """
    if endpoint.type not in (TransferType.INTERRUPT, TransferType.ISO):
        return 0.0
    slow = speed in (Speed.LOW, Speed.FULL)
    if slow and endpoint.type is TransferType.INTERRUPT:
        return FRAME * max(1, endpoint.interval)
    exponent = min(max(1, endpoint.interval), 16) - 1
    return (FRAME if slow else MICROFRAME) * (1 << exponent)


def device_ids(device: bytes, configuration: bytes | None) -> DeviceIds:
    """What filter rules look at: the first alternate setting of each interface. Raises ValueError."""
    d = parse_device(device)
    interfaces = []
    if configuration is not None:
        parsed = parse_configuration(configuration)
        for number in parsed.numbers():
            first = parsed.first(number)
            interfaces.append((first.interface_class, first.interface_subclass, first.interface_protocol))
    return DeviceIds(
        d.device_class,
        d.device_subclass,
        d.device_protocol,
        d.vendor_id,
        d.product_id,
        d.device_version_bcd,
        tuple(interfaces),
    )


# ---------------------------------------------------------------- building


def build_configuration(configuration: Configuration) -> bytes:
    """The configuration descriptor and all that follows it, as it is sent."""
    body = b"".join(map(_build_interface, configuration.interfaces))
    head = struct.pack(
        "<BBHBBBBB",
        9,
        DescriptorType.CONFIGURATION,
        9 + len(body),
        len(configuration.numbers()),
        configuration.value,
        configuration.name_index,
        configuration.attributes,
        configuration.max_power,
    )
    return head + body


def _build_interface(interface: Interface) -> bytes:
    head = struct.pack(
        "<BBBBBBBBB",
        9,
        DescriptorType.INTERFACE,
        interface.number,
        interface.alternate,
        len(interface.endpoints),
        interface.interface_class,
        interface.interface_subclass,
        interface.interface_protocol,
        interface.name_index,
    )
    return interface.association + head + interface.extra + b"".join(map(_build_endpoint, interface.endpoints))


def _build_endpoint(endpoint: Endpoint) -> bytes:
    raw = struct.pack(
        "<BBBBHB",
        7 + len(endpoint.tail),
        DescriptorType.ENDPOINT,
        endpoint.address,
        endpoint.attributes,
        endpoint.raw_max_packet_size,
        endpoint.interval,
    )
    raw += endpoint.tail
    if endpoint.companion:
        streams = endpoint.max_streams.bit_length() - 1 if endpoint.max_streams else 0
        raw += struct.pack(
            "<BBBBH", 6, DescriptorType.COMPANION, endpoint.max_burst, streams, endpoint.bytes_per_interval
        )
    return raw + endpoint.extra


def string_descriptor(text: str) -> bytes:
    """A string descriptor; texts above 126 characters are cut."""
    data = text.encode("utf-16-le")[:252].decode("utf-16-le", "ignore").encode("utf-16-le")
    return bytes((len(data) + 2, DescriptorType.STRING)) + data


def bos_descriptor(capabilities: Sequence[bytes]) -> bytes:
    """A BOS descriptor with device capability descriptors (USB 3.2, 9.6.2)."""
    body = b"".join(capabilities)
    return struct.pack("<BBHB", 5, DescriptorType.BOS, 5 + len(body), len(capabilities)) + body
