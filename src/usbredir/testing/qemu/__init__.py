"""A Linux guest in QEMU for tests: boots in seconds without root or KVM, takes USB devices, runs shell commands.

::

    with QemuGuest(build_guest()) as guest:
        plugged = guest.plug(MassStorage(bytes(1 << 20)))
        print(guest.run(f"sha256sum {guest.node(plugged, 'sd?')}"))

Linux on x86-64 with Debian's package tools; :func:`missing_tools` tells what lacks.
Source: docs/qemu-tests.md.
"""

from ._agent import CommandResult
from ._guest_error import GuestError
from ._image import BuildError, GuestImage, build_guest, missing_tools
from ._machine import Controller, Plugged, QemuGuest, Running

__all__ = [
    "BuildError",
    "CommandResult",
    "Controller",
    "GuestError",
    "GuestImage",
    "Plugged",
    "QemuGuest",
    "Running",
    "build_guest",
    "missing_tools",
]
