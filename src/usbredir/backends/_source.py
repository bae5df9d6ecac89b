"""One real device for an exporter: found at the start, and found again after it was unplugged."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from ..errors import DeviceError, DeviceLostError, DeviceNotFoundError
from . import pyusb
from ._context import Context
from ._finding import DeviceSpec, find_all, new_backend, parse_spec, text_of
from ._system import port_path

__all__ = ["FdSource", "PyusbSource", "parse_spec"]


class Identity(NamedTuple):
    """What tells a device from others of its kind, as far as it has that."""

    ids: tuple[int, int]
    serial: str
    port: str


class PyusbSource:
    """The device that *spec* means.

    After a loss, of the devices that could be the same one, the one with its serial number is preferred, else the one
    at its port, else one with its ids; one with another serial number is only taken when *spec* names ids or a port.
    Threads: one.
    """

    def __init__(self, spec: DeviceSpec, *, event_thread: bool = False) -> None:
        self._spec = spec
        self._event_thread = event_thread
        self._identity: Identity | None = None
        self._watcher: Any = None  # a pyusb backend whose context tells of arrivals
        self._seen = 0

    def open(self) -> pyusb.LibusbDevice:
        """The device, opened. Raises DeviceError and its kinds."""
        if self._identity is None:
            device = pyusb.open_device(self._spec, event_thread=self._event_thread)
            self._identity = _identify(device.device)
        else:
            device = pyusb.open_first(self._candidates(self._identity), event_thread=self._event_thread)
        self._watcher = None
        return device

    def _candidates(self, identity: Identity) -> list[Any]:
        """What could be the lost device, the most likely one first. Raises DeviceNotFoundError."""
        spec = self._spec
        if spec.kind == "address":  # it has another address now
            spec = DeviceSpec("ids", identity.ids)
        found = [(device, _identify(device)) for device in find_all(spec, new_backend())]
        if self._spec.kind == "address" and identity.serial:
            found = [(device, other) for device, other in found if other.serial == identity.serial]
        if not found:
            raise DeviceNotFoundError(f"the device {self._spec} has not come back yet")
        found.sort(key=lambda pair: (pair[1].serial != identity.serial, pair[1].port != identity.port))
        return [device for device, _ in found]

    def pollfds(self) -> Sequence[tuple[int, int]]:
        """libusb's descriptors for arrivals; none where it cannot tell."""
        context = self._watch()
        return () if context is None else context.pollfds()

    def has_news(self) -> bool:
        """Whether something was plugged in."""
        context = self._watch()
        if context is None:
            return False
        with contextlib.suppress(DeviceError):
            context.poll()
        seen, self._seen = self._seen, context.arrivals
        return context.arrivals != seen

    def _watch(self) -> Context | None:
        """The context that tells of arrivals; None where libusb cannot, or not now."""
        try:
            if self._watcher is None:
                self._watcher = new_backend()
                self._seen = 0
            context = Context.of(self._watcher)
            return context if context.watch() else None
        except DeviceError:
            return None


class FdSource:
    """The device behind an open file descriptor. Once it is lost there is no way back to it."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._opened = False

    def open(self) -> pyusb.LibusbDevice:
        """The device. Raises DeviceError."""
        if self._opened:
            raise DeviceLostError("a device that came as a file descriptor cannot come back", reason="final")
        self._opened = True
        return pyusb.open_fd(self._fd)

    def pollfds(self) -> Sequence[tuple[int, int]]:
        """None."""
        return ()

    def has_news(self) -> bool:
        """Never."""
        return False


def _identify(device: Any) -> Identity:
    return Identity((device.idVendor, device.idProduct), text_of(device, "serial"), port_path(device))
