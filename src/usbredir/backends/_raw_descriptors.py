"""Descriptors as bytes, from pyusb's objects: no transfer is needed, nor an open device.

pyusb hands out the fields that libusb parsed; put in order again they are what the device sent. A
configuration whose parts cannot all be read ends where reading failed.
"""

from __future__ import annotations

import struct
from typing import Any

__all__ = ["raw_configuration", "raw_device"]

_DEVICE = struct.Struct("<BBHBBBBHHHBBBB")
_CONFIGURATION = struct.Struct("<BBHBBBBB")
_INTERFACE = struct.Struct("<BBBBBBBBB")
_ENDPOINT = struct.Struct("<BBBBHB")


def raw_device(device: Any) -> bytes:
    """The device descriptor of a ``usb.core.Device``, 18 bytes."""
    return _DEVICE.pack(
        _DEVICE.size,
        1,
        device.bcdUSB,
        device.bDeviceClass,
        device.bDeviceSubClass,
        device.bDeviceProtocol,
        device.bMaxPacketSize0,
        device.idVendor,
        device.idProduct,
        device.bcdDevice,
        device.iManufacturer,
        device.iProduct,
        device.iSerialNumber,
        device.bNumConfigurations,
    )


def raw_configuration(configuration: Any) -> bytes:
    """The descriptor of a ``usb.core.Configuration`` with everything that follows it."""
    parts = [_extra(configuration)]
    for interface in configuration:
        parts.append(_interface(interface))
        parts.append(_extra(interface))
        for endpoint in interface:
            parts.append(_endpoint(endpoint))
            parts.append(_extra(endpoint))
    rest = b"".join(parts)
    c = configuration
    return (
        _CONFIGURATION.pack(
            _CONFIGURATION.size,
            2,
            min(_CONFIGURATION.size + len(rest), 0xFFFF),
            c.bNumInterfaces,
            c.bConfigurationValue,
            c.iConfiguration,
            c.bmAttributes,
            c.bMaxPower,
        )
        + rest
    )


def _extra(described: Any) -> bytes:
    return bytes(described.extra_descriptors)


def _interface(i: Any) -> bytes:
    return _INTERFACE.pack(
        _INTERFACE.size,
        4,
        i.bInterfaceNumber,
        i.bAlternateSetting,
        i.bNumEndpoints,
        i.bInterfaceClass,
        i.bInterfaceSubClass,
        i.bInterfaceProtocol,
        i.iInterface,
    )


def _endpoint(e: Any) -> bytes:
    fields = _ENDPOINT.pack(_ENDPOINT.size, 5, e.bEndpointAddress, e.bmAttributes, e.wMaxPacketSize, e.bInterval)
    if e.bLength < 9:
        return fields
    # Audio endpoints are two bytes longer (USB Audio 1.0, 4.6.1.1).
    return bytes((9,)) + fields[1:] + bytes((e.bRefresh, e.bSynchAddress))
