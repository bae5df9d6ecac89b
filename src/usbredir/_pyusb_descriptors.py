"""Descriptors of a remote device as pyusb reads them: objects with the specification's field names.

What a device sends is not trusted: counts are those of the descriptors that are there, whatever the headers say.
Source: USB 2.0, 9.6; the audio class, 4.6.1.1, for the two more bytes of its endpoints.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass, field

from .descriptors import DescriptorType, _pieces, parse_device

__all__ = [
    "ConfigurationDescriptor",
    "DeviceDescriptor",
    "EndpointDescriptor",
    "InterfaceDescriptor",
    "read_configuration",
    "read_device",
]


@dataclass
class EndpointDescriptor:
    """An endpoint descriptor. *extra_descriptors*: the bytes of those that follow it, such as a companion."""

    bLength: int
    bDescriptorType: int
    bEndpointAddress: int
    bmAttributes: int
    wMaxPacketSize: int
    bInterval: int
    bRefresh: int
    bSynchAddress: int
    extra_descriptors: list[int] = field(default_factory=list)


@dataclass
class InterfaceDescriptor:
    """One alternate setting of an interface, and its endpoints."""

    bLength: int
    bDescriptorType: int
    bInterfaceNumber: int
    bAlternateSetting: int
    bNumEndpoints: int
    bInterfaceClass: int
    bInterfaceSubClass: int
    bInterfaceProtocol: int
    iInterface: int
    extra_descriptors: list[int] = field(default_factory=list)
    endpoints: list[EndpointDescriptor] = field(default_factory=list)


@dataclass
class ConfigurationDescriptor:
    """A configuration, and its alternate settings by position: of the interface, then of the setting."""

    bLength: int
    bDescriptorType: int
    wTotalLength: int
    bNumInterfaces: int
    bConfigurationValue: int
    iConfiguration: int
    bmAttributes: int
    bMaxPower: int
    extra_descriptors: list[int] = field(default_factory=list)
    interfaces: list[list[InterfaceDescriptor]] = field(default_factory=list)


@dataclass
class DeviceDescriptor:
    """The device descriptor, and what pyusb wants to know of the device beside it."""

    bLength: int
    bDescriptorType: int
    bcdUSB: int
    bDeviceClass: int
    bDeviceSubClass: int
    bDeviceProtocol: int
    bMaxPacketSize0: int
    idVendor: int
    idProduct: int
    bcdDevice: int
    iManufacturer: int
    iProduct: int
    iSerialNumber: int
    bNumConfigurations: int
    bus: int
    address: int
    port_number: int
    port_numbers: tuple[int, ...]
    speed: int


CONFIGURATION = struct.Struct("<BBHBBBBB")
INTERFACE = struct.Struct("<9B")
ENDPOINT = struct.Struct("<BBBBHBBB")
ENDPOINT_SIZE = 7
DEVICE = struct.Struct("<BBHBBBBHHHBBBB")

Owner = ConfigurationDescriptor | InterfaceDescriptor | EndpointDescriptor
"""What the descriptors of a class that follow it belong to."""


def read_device(raw: bytes, *, bus: int, address: int, speed: int) -> DeviceDescriptor:
    """The device descriptor in *raw*. Raises ValueError."""
    parse_device(raw)
    fields = (*DEVICE.unpack_from(raw), bus, address, 1, (1,), speed)
    return DeviceDescriptor(*fields)


def read_configuration(raw: bytes) -> ConfigurationDescriptor:
    """The configuration in *raw* with all that follows it. Raises ValueError."""
    pieces = list(_pieces(raw))
    if not pieces or len(pieces[0]) < CONFIGURATION.size or pieces[0][1] != DescriptorType.CONFIGURATION:
        raise ValueError(f"not a configuration descriptor: {raw[:9].hex(' ')}")
    configuration = ConfigurationDescriptor(*CONFIGURATION.unpack_from(pieces[0]))
    settings: dict[int, list[InterfaceDescriptor]] = {}  # by interface number
    _read_pieces(configuration, settings, pieces[1:])
    configuration.interfaces = list(settings.values())
    configuration.bNumInterfaces = len(settings)
    return configuration


def _read_pieces(
    configuration: ConfigurationDescriptor, settings: dict[int, list[InterfaceDescriptor]], pieces: Iterable[bytes]
) -> None:
    owner: Owner = configuration
    interface: InterfaceDescriptor | None = None
    for piece in pieces:
        if piece[1] == DescriptorType.INTERFACE and len(piece) >= INTERFACE.size:
            owner = interface = InterfaceDescriptor(*INTERFACE.unpack_from(piece))
            interface.bNumEndpoints = 0
            settings.setdefault(interface.bInterfaceNumber, []).append(interface)
        elif piece[1] == DescriptorType.ENDPOINT and len(piece) >= ENDPOINT_SIZE and interface is not None:
            owner = EndpointDescriptor(*ENDPOINT.unpack_from(piece.ljust(ENDPOINT.size, b"\0")))
            interface.endpoints.append(owner)
            interface.bNumEndpoints += 1
        else:
            owner.extra_descriptors.extend(piece)
