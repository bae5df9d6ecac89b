"""A device as a person wants to see it: descriptors as indented text."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from .descriptors import Configuration, Endpoint, Interface, max_packet_size, parse_configuration, parse_device
from .guest import Guest
from .parser import escape
from .proto import Speed

__all__ = ["CLASS_NAMES", "SPEED_NAMES", "describe_device"]

SPEED_NAMES = {
    Speed.LOW: "low speed (1.5 Mbit/s)",
    Speed.FULL: "full speed (12 Mbit/s)",
    Speed.HIGH: "high speed (480 Mbit/s)",
    Speed.SUPER: "super speed (5 Gbit/s)",
}
CLASS_NAMES = {
    0x01: "audio",
    0x02: "communications",
    0x03: "human interface",
    0x05: "physical",
    0x06: "image",
    0x07: "printer",
    0x08: "mass storage",
    0x09: "hub",
    0x0A: "communications data",
    0x0B: "smart card",
    0x0E: "video",
    0xE0: "wireless controller",
    0xEF: "miscellaneous",
    0xFE: "application specific",
    0xFF: "vendor specific",
}
"""Class names (USB-IF defined class codes)."""


def describe_device(guest: Guest) -> Iterator[str]:
    """Lines that describe the device of *guest*, read from its descriptors."""
    connect = guest.device
    assert connect is not None, "wait_for_device() comes first"
    d = parse_device(guest.get_descriptor(1, 0, 18))

    def text(index: int) -> str:
        raw = guest.get_descriptor(3, index, language=0x0409) if index else b""
        return escape(raw[2 : raw[0]].decode("utf-16-le", "replace")) if len(raw) > 2 else ""

    yield f"Device {d.vendor_id:04x}:{d.product_id:04x}  {text(d.manufacturer_index)} {text(d.product_index)}"
    yield f"  serial number  {text(d.serial_index) or '-'}"
    yield f"  release        {d.device_version_bcd >> 8:x}.{d.device_version_bcd & 0xFF:02x}"
    speed = Speed(connect.speed) if connect.speed in set(Speed) else Speed.UNKNOWN
    yield f"  speed          {SPEED_NAMES.get(speed, 'unknown')}"
    yield from _describe_configuration(guest, speed, text)


def _describe_configuration(guest: Guest, speed: Speed, text: Callable[[int], str]) -> Iterator[str]:
    configuration = parse_configuration(guest.get_descriptor(2, 0, 4096))
    yield f"  Configuration {configuration.value}  {text(configuration.name_index)}".rstrip()
    for interface in _interfaces(configuration):
        name = CLASS_NAMES.get(interface.interface_class, f"class 0x{interface.interface_class:02x}")
        codes = f"{interface.interface_subclass:02x}/{interface.interface_protocol:02x}"
        number = f"{interface.number}.{interface.alternate}"
        yield f"    Interface {number}  {name} {codes}  {text(interface.name_index)}".rstrip()
        for endpoint in interface.endpoints:
            yield f"      {_describe_endpoint(endpoint, speed)}"


def _interfaces(configuration: Configuration) -> list[Interface]:
    return sorted(configuration.interfaces, key=lambda interface: (interface.number, interface.alternate))


def _describe_endpoint(endpoint: Endpoint, speed: Speed) -> str:
    way = "IN " if endpoint.address & 0x80 else "OUT"
    size = max_packet_size(endpoint, speed)
    return f"Endpoint 0x{endpoint.address:02x} {way}  {endpoint.type.name.lower():9}  {size} bytes per packet"
