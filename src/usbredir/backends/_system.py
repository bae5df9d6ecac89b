"""What the operating system knows beside libusb: drivers in use, permissions. Linux; elsewhere nothing is known."""

from __future__ import annotations

import os
from typing import Any

__all__ = ["attribute_of", "driver_of", "is_accessible", "is_configured", "node_of", "permission_hint", "port_path"]

SYSFS = "/sys/bus/usb/devices"
DEV = "/dev/bus/usb"


def port_path(device: Any) -> str:
    """Bus and ports on the way to a device, as in ``1-1.4``; empty where the system does not tell."""
    ports = device.port_numbers
    return f"{device.bus}-{'.'.join(map(str, ports))}" if ports else ""


def node_of(device: Any) -> str:
    """The device's file on Linux; empty where the backend does not tell which it is."""
    return f"{DEV}/{device.bus:03}/{device.address:03}" if device.bus and device.address else ""


def driver_of(device: Any, interface: int, configuration: int | None = None) -> str:
    """The kernel driver bound to an interface, or an empty text."""
    path = port_path(device)
    if not path:
        return ""
    for value in [configuration] if configuration is not None else range(1, 9):
        try:
            return os.path.basename(os.readlink(f"{SYSFS}/{path}:{value}.{interface}/driver"))
        except OSError:
            continue
    return ""


def is_accessible(device: Any) -> bool | None:
    """Whether this process may open a device; None: not known."""
    node = node_of(device)
    return os.access(node, os.R_OK | os.W_OK) if node and os.path.exists(node) else None


def permission_hint(device: Any) -> str:
    """What to do when a device may not be opened."""
    rule = (
        f'SUBSYSTEM=="usb", ATTR{{idVendor}}=="{device.idVendor:04x}", ATTR{{idProduct}}=="{device.idProduct:04x}", '
        'TAG+="uaccess"'
    )
    return (
        f"may this user write {node_of(device) or 'its device file'}? A udev rule allows it, in "
        f"/etc/udev/rules.d/70-usbredir.rules: {rule}; or join the group that owns the file"
    )


def is_configured(device: Any) -> bool | None:
    """Whether a device has an active configuration; None: not known."""
    value = attribute_of(device, "bConfigurationValue")
    return None if value is None else bool(value.strip())


def attribute_of(device: Any, name: str) -> str | None:
    """One of the texts that the kernel keeps (*manufacturer*, *product*, *serial*), or None."""
    path = port_path(device)
    if not path:
        return None
    try:
        with open(f"{SYSFS}/{path}/{name}", encoding="utf-8", errors="replace") as file:
            return file.read().rstrip("\n")
    except OSError:
        return None
