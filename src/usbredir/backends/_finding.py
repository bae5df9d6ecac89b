"""Finding devices: what a user writes, what is plugged in, and what can be told of it without using it."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import usb.core
import usb.util

from ..descriptors import device_ids
from ..errors import DeviceError, DeviceNotFoundError
from ..filter import DeviceIds
from ..proto import Speed
from ._backend import Backend, load_library
from ._base import SPEEDS
from ._exit import register_exit_handler
from ._raw_descriptors import raw_configuration, raw_device
from ._system import attribute_of, driver_of, is_accessible, is_configured, port_path

__all__ = [
    "DeviceInfo",
    "DeviceSpec",
    "find_all",
    "list_devices",
    "new_backend",
    "parse_spec",
    "text_of",
]

FORMS = "VID:PID (hexadecimal), BUS-DEV (decimal), port:BUS-PORT[.PORT...] or serial:TEXT"


class DeviceSpec(NamedTuple):
    """Which device a user means: *kind* tells what *value* holds.

    ``ids`` (vendor, product); ``address`` (bus, address); ``port`` a port path; ``serial`` a serial number.
    """

    kind: str
    value: Any

    def __str__(self) -> str:
        if self.kind == "ids":
            return "{:04x}:{:04x}".format(*self.value)
        if self.kind == "address":
            return "{}-{}".format(*self.value)
        return f"{self.kind}:{self.value}"


def parse_spec(text: str) -> DeviceSpec:
    """Read VID:PID, BUS-DEV, port:PATH or serial:TEXT. Raises ValueError that tells the forms."""
    kind, colon, rest = text.partition(":")
    if kind == "serial" and rest:
        return DeviceSpec("serial", rest)
    if kind == "port" and re.fullmatch(r"\d+-\d+(\.\d+)*", rest, re.ASCII):
        return DeviceSpec("port", rest)
    if colon and re.fullmatch(r"(0[xX])?[0-9a-fA-F]{1,4}:(0[xX])?[0-9a-fA-F]{1,4}", text):
        return DeviceSpec("ids", (int(kind, 16), int(rest, 16)))
    if match := re.fullmatch(r"(\d{1,3})-(\d{1,3})", text, re.ASCII):
        return DeviceSpec("address", (int(match[1]), int(match[2])))
    raise ValueError(f"{text!r} names no device: use {FORMS}")


def new_backend() -> Any:
    """A pyusb backend with a libusb context of its own, which has looked for devices just now.

    A context learns of new devices by events of the system, which do not reach every container. A fresh one always
    looks. Raises DeviceError.
    """
    backend = Backend(load_library())
    try:
        assert backend.ctx is not None, "made now"
    except usb.core.USBError as error:
        raise DeviceError(f"libusb cannot be started: {error}") from error
    register_exit_handler()
    return backend


def find_all(spec: DeviceSpec, backend: Any) -> list[Any]:
    """The devices that *spec* means, in the order of the bus. Raises DeviceNotFoundError when there is none."""
    found = [device for device in usb.core.find(find_all=True, backend=backend) if _matches(spec, device)]
    if not found:
        raise DeviceNotFoundError(f"no device {spec} is plugged in; 'usbredir list' shows what there is")
    return sorted(found, key=lambda device: (device.bus or 0, device.address or 0))


def _matches(spec: DeviceSpec, device: Any) -> bool:
    match spec.kind:
        case "ids":
            return bool(spec.value == (device.idVendor, device.idProduct))
        case "address":
            return bool(spec.value == (device.bus, device.address))
        case "port":
            return bool(spec.value == port_path(device))
    return bool(spec.value == text_of(device, "serial"))


TEXTS = {"manufacturer": "iManufacturer", "product": "iProduct", "serial": "iSerialNumber"}


@contextlib.contextmanager
def _closed_afterwards(device: Any) -> Iterator[None]:
    """pyusb opens a device by itself when it asks it for something; it is closed again, once."""
    was_open = device._ctx.handle is not None
    try:
        yield
    finally:
        if not was_open:
            usb.util.dispose_resources(device)


def text_of(device: Any, name: str) -> str:
    """A device's *manufacturer*, *product* or *serial*; empty when there is none, or it may not be read."""
    with _closed_afterwards(device):
        return _read_text(device, name)


def _read_text(device: Any, name: str) -> str:
    """As :func:`text_of`; may leave *device* open."""
    index = getattr(device, TEXTS[name])
    if not index:
        return ""
    known = attribute_of(device, name)
    if known is not None:
        return known
    try:
        return str(usb.util.get_string(device, index) or "")
    except (usb.core.USBError, ValueError, NotImplementedError):
        return ""


class DeviceInfo(NamedTuple):
    """What can be told of a device that is plugged in.

    ids: for filters; drivers: kernel drivers in use by interface number; accessible: whether this user
    may open it (None: not known); configured: whether it has an active configuration (None: not known).
    """

    bus: int
    address: int
    port: str
    speed: Speed
    ids: DeviceIds
    manufacturer: str
    product: str
    serial: str
    drivers: dict[int, str]
    accessible: bool | None
    configured: bool | None = None


def list_devices(backend: Any = None) -> Iterator[DeviceInfo]:
    """Every device that is plugged in, in the order of the bus. Raises DeviceError without a libusb."""
    devices = usb.core.find(find_all=True, backend=backend or new_backend())
    for device in sorted(devices, key=lambda d: (d.bus or 0, d.address or 0)):
        with contextlib.suppress(usb.core.USBError):  # unplugged meanwhile
            yield _describe(device)


def _describe(device: Any) -> DeviceInfo:
    configuration = next(iter(device), None)
    raw = raw_configuration(configuration) if configuration is not None else None
    ids = device_ids(raw_device(device), raw)
    numbers = dict.fromkeys(i.bInterfaceNumber for i in configuration) if configuration is not None else {}
    drivers = {number: driver for number in numbers if (driver := driver_of(device, number))}
    with _closed_afterwards(device):
        texts = {name: _read_text(device, name) for name in TEXTS}
    return DeviceInfo(
        device.bus or 0,
        device.address or 0,
        port_path(device),
        SPEEDS.get(device.speed or 0, Speed.UNKNOWN),
        ids,
        texts["manufacturer"],
        texts["product"],
        texts["serial"],
        drivers,
        is_accessible(device),
        is_configured(device),
    )
