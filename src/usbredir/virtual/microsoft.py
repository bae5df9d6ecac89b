"""Microsoft OS descriptors: they make Windows bind its WinUSB driver to a device, without any installation.

Version 1.0 is asked for by string 0xEE and two vendor requests (Windows 7 and newer), version 2.0 is announced by a
platform capability in the BOS descriptor and fetched by one vendor request (Windows 8.1 and newer).

Source: Microsoft OS 1.0 Descriptors, "Extended Compat ID OS Feature Descriptor" and "Extended Properties OS Feature
Descriptor"; Microsoft OS 2.0 Descriptors Specification, tables 4 to 14.
"""

from __future__ import annotations

import re
import struct
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = [
    "OS_STRING_INDEX",
    "WinUsb",
    "compatible_ids",
    "constant_answers",
    "default_guid",
    "descriptor_set",
    "extended_properties",
    "os_string",
    "platform_capability",
]

OS_STRING_INDEX = 0xEE
"""Of the string that says that a device has descriptors of version 1.0."""

_COMPATIBLE_IDS, _PROPERTIES, _DESCRIPTOR_SET = 4, 5, 7  # wIndex of the vendor request
_VENDOR_IN_DEVICE, _VENDOR_IN_INTERFACE = 0xC0, 0xC1
_REG_SZ, _REG_MULTI_SZ = 1, 7
_WINDOWS_8_1 = 0x06030000
_WINUSB = b"WINUSB"
_PLATFORM = uuid.UUID("D8DD60DF-4589-4CC7-9CD2-659D9E648A9F").bytes_le


@dataclass(frozen=True)
class WinUsb:
    """That Windows shall use WinUSB, and how programs find the device there.

    Args:
        guid: device interface GUID, ``"{xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx}"``; None: one made of the ids.
        interfaces: for composite devices, the first interface of each function that WinUSB is for. None: those
            of class 0xFF.
        request: bRequest of the vendor requests by which Windows asks.

    Raises ValueError when *guid* or *request* is not as above.
    """

    guid: str | None = None
    interfaces: tuple[int, ...] | None = None
    request: int = 0x20

    def __post_init__(self) -> None:
        if self.guid is not None and not re.fullmatch(
            r"\{[\dA-Fa-f]{8}(-[\dA-Fa-f]{4}){3}-[\dA-Fa-f]{12}\}", self.guid
        ):
            raise ValueError(f"a GUID looks like {default_guid(0, 0)}, not like {self.guid!r}")
        if not 1 <= self.request <= 0xFF:
            raise ValueError(f"a vendor request for Microsoft's descriptors is 1 to 255, not {self.request}")


def default_guid(vendor_id: int, product_id: int) -> str:
    """A GUID that is the same for the same ids."""
    return f"{{{uuid.uuid5(uuid.NAMESPACE_OID, f'usb:{vendor_id:04x}:{product_id:04x}')}}}".upper()


def os_string(request: int) -> str:
    """The text of string 0xEE; its last character is the vendor request."""
    return "MSFT100" + chr(request)


def constant_answers(
    request: int, guid: str, functions: Sequence[int], *, composite: bool
) -> dict[tuple[int, int, int, int], bytes]:
    """Answers to the vendor requests by (bmRequestType, bRequest, wValue, wIndex)."""
    properties = extended_properties(guid)
    answers = {
        (_VENDOR_IN_DEVICE, request, 0, _COMPATIBLE_IDS): compatible_ids(functions),
        (_VENDOR_IN_DEVICE, request, 0, _DESCRIPTOR_SET): descriptor_set(guid, functions if composite else ()),
    }
    for function in functions:
        # By Microsoft's text the interface is in the high byte of wValue; in use it is in the low one.
        for value in (function, function << 8):
            answers[_VENDOR_IN_INTERFACE, request, value, _PROPERTIES] = properties
    return answers


def compatible_ids(functions: Sequence[int]) -> bytes:
    """Version 1.0: WINUSB for each of these interfaces."""
    sections = [struct.pack("<BB8s8s6x", function, 1, _WINUSB, b"") for function in functions]
    head = struct.pack("<IHHB7x", 16 + 24 * len(sections), 0x0100, _COMPATIBLE_IDS, len(sections))
    return head + b"".join(sections)


def extended_properties(guid: str) -> bytes:
    """Version 1.0: the registry value DeviceInterfaceGUID."""
    name, data = _text("DeviceInterfaceGUID"), _text(guid)
    section = struct.pack("<IIH", 14 + len(name) + len(data), _REG_SZ, len(name)) + name
    section += struct.pack("<I", len(data)) + data
    return struct.pack("<IHHH", 10 + len(section), 0x0100, _PROPERTIES, 1) + section


def descriptor_set(guid: str, functions: Sequence[int]) -> bytes:
    """Version 2.0: WINUSB and the registry value DeviceInterfaceGUIDs, for the device or for some of its functions.

    Args:
        guid: the device interface GUID.
        functions: first interfaces of functions of a composite device; none: for the device as a whole.
    """
    name, data = _text("DeviceInterfaceGUIDs"), _text(guid + "\0")
    features = struct.pack("<HH8s8s", 20, 3, _WINUSB, b"")
    features += struct.pack("<HHHH", 10 + len(name) + len(data), 4, _REG_MULTI_SZ, len(name)) + name
    features += struct.pack("<H", len(data)) + data
    if functions:
        subsets = (struct.pack("<HHBBH", 8, 2, function, 0, 8 + len(features)) + features for function in functions)
        body = b"".join(subsets)
        # The configuration is told by its index, whatever the field is called.
        features = struct.pack("<HHBBH", 8, 1, 0, 0, 8 + len(body)) + body
    return struct.pack("<HHIH", 10, 0, _WINDOWS_8_1, 10 + len(features)) + features


def platform_capability(set_length: int, request: int) -> bytes:
    """The device capability in the BOS descriptor that announces version 2.0; *set_length* in bytes."""
    return struct.pack("<BBBB16sIHBB", 28, 0x10, 5, 0, _PLATFORM, _WINDOWS_8_1, set_length, request, 0)


def _text(text: str) -> bytes:
    """As Windows keeps it: UTF-16 with a zero at the end."""
    return (text + "\0").encode("utf-16-le")
