"""What every device behind pyusb shares: description, claims, drivers, configurations; all but its transfers.

pyusb's ``Device`` remembers claims and its active configuration, so these are changed through it or forgotten
afterwards; ``Device.reset()`` closes the handle, so the backend's reset is called in its place.

Source: docs/real-devices.md; the order of release and re-attachment is HOST_BEHAVIOUR's, "Taking a device".
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import Any, TypeVar

import usb.core
import usb.util

from ..descriptors import parse_configuration
from ..errors import DeviceClaimError, DeviceError, DeviceLostError, DeviceNotFoundError
from ..proto import Speed, Status
from . import _libusb
from ._raw_descriptors import raw_configuration, raw_device
from ._system import driver_of, permission_hint

__all__ = ["BaseDevice", "translate"]

logger = logging.getLogger("usbredir.backends.pyusb")

SPEEDS = {1: Speed.LOW, 2: Speed.FULL, 3: Speed.HIGH, 4: Speed.SUPER}
"""libusb's numbers for speeds; what is faster than super has none on the wire."""
UNCONFIGURED = -1
"""The value that makes libusb leave a device without configuration; on the wire it is 0."""
LOST_ERRNOS = (19, 5, 22, 108)
"""ENODEV; and EIO, EINVAL, ESHUTDOWN, which other backends give when a device is gone."""

Result = TypeVar("Result")


def is_lost(error: usb.core.USBError) -> bool:
    """Whether an error says that the device is gone."""
    return error.backend_error_code == _libusb.ERROR_NO_DEVICE or error.errno == 19


def status_of(error: usb.core.USBError | NotImplementedError) -> Status:
    """The status that tells the guest of an error. Raises DeviceLostError when the device is gone."""
    if isinstance(error, NotImplementedError):
        return Status.IOERROR
    if is_lost(error):
        raise DeviceLostError("the device was unplugged") from error
    if isinstance(error, usb.core.USBTimeoutError):
        return Status.TIMEOUT
    return _libusb.error_status(error.backend_error_code or 0)


def translate(error: usb.core.USBError, what: str, device: Any) -> DeviceError:
    """An error of pyusb as one of ours: cause and remedy. *what*: what was tried."""
    code, number = error.backend_error_code, error.errno
    if is_lost(error):
        return DeviceLostError(f"{what}: the device was unplugged")
    if code == _libusb.ERROR_ACCESS or number in (1, 13):
        return DeviceClaimError(f"{what}: permission denied; {permission_hint(device)}", reason="forbidden")
    if code == _libusb.ERROR_BUSY or number == 16:
        return DeviceClaimError(
            f"{what}: it is in use by another program or by a virtual machine; end that first"
        )
    if code == _libusb.ERROR_NOT_FOUND:
        return DeviceNotFoundError(f"{what}: not found; was it unplugged?")
    return DeviceError(f"{what}: {error.strerror or error}")


class BaseDevice:
    """A ``usb.core.Device``, opened. Raises DeviceClaimError (forbidden) or DeviceError.

    Attributes:
        device: pyusb's object.
    """

    def __init__(self, device: usb.core.Device) -> None:
        self.device = device
        self._backend: Any = device.backend
        self._restore: int | None = None  # configuration to go back to, once known
        self._claimed: list[int] = []
        self._displaced: list[int] = []  # interfaces whose drivers are to return some day
        self._closed = False
        self._lost = False
        try:
            with self._opening():
                self._handle: Any = device._ctx.managed_open()
        except usb.core.USBError as error:
            raise translate(error, "the device cannot be opened", device) from error

    def _opening(self) -> contextlib.AbstractContextManager[None]:
        """For subclasses: around opening the device."""
        return contextlib.nullcontext()

    # ------------------------------------------------------------ description

    @property
    def speed(self) -> Speed:
        """Speed on the bus; UNKNOWN above super speed, and where the system does not tell."""
        return SPEEDS.get(self.device.speed or 0, Speed.UNKNOWN)

    @property
    def device_descriptor(self) -> bytes:
        """The device descriptor, 18 bytes."""
        return raw_device(self.device)

    @property
    def configuration_descriptor(self) -> bytes | None:
        """The active configuration's descriptor with all that follows it, or None when unconfigured."""
        value = self._active_configuration()
        if value is None:
            return None
        for configuration in self.device:
            if configuration.bConfigurationValue == value:
                return raw_configuration(configuration)
        return None

    def _active_configuration(self) -> int | None:
        try:
            value: int = self._backend.get_configuration(self._handle)
        except usb.core.USBError as error:
            raise translate(error, "the active configuration cannot be read", self.device) from error
        return value or None

    @property
    def lost(self) -> bool:
        """The device was unplugged."""
        return self._lost

    # ------------------------------------------------------------ claims

    def claim(self) -> None:
        """Take all interfaces of the active configuration; the kernel's drivers let go of them first.

        Raises DeviceClaimError (in use, forbidden), DeviceLostError or DeviceError; nothing stays claimed then.
        """
        raw = self.configuration_descriptor
        if self._restore is None:
            self._restore = self._configuration_to_restore(raw)
        numbers = parse_configuration(raw).numbers() if raw else []
        self._displace_drivers(True)
        self._displaced = []
        try:
            for number in numbers:
                self._claimed.append(number)  # first, so that a half-done claim is undone
                self._displaced.append(number)
                self._detach(number)
                self._try(lambda n=number: self.device._ctx.managed_claim_interface(self.device, n))  # type: ignore[misc]
        except usb.core.USBError as error:
            translated = self._claim_error(error, self._claimed[-1])
            # The device did nothing yet that a reset would have to undo.
            self.release(give_back=True, reset=False)
            raise translated from error

    def _configuration_to_restore(self, raw: bytes | None) -> int:
        if raw is not None:
            return raw[5]
        if self.device.bNumConfigurations == 1:
            # "Safely removed" by the user: it is to come back with its only configuration.
            return int(self.device[0].bConfigurationValue)
        return UNCONFIGURED

    def _claim_error(self, error: usb.core.USBError, number: int) -> DeviceError:
        driver = driver_of(self.device, number)
        in_use = f" (kernel driver {driver})" if driver else ""
        return translate(error, f"interface {number}{in_use} cannot be claimed", self.device)

    def _displace_drivers(self, on: bool) -> None:
        """For subclasses that can have the kernel's drivers detached, and attached again, with the claims."""

    def _detach(self, number: int) -> None:
        """Backends that know nothing of drivers have none to detach."""
        with contextlib.suppress(NotImplementedError):
            try:
                if self._backend.is_kernel_driver_active(self._handle, number):
                    self._backend.detach_kernel_driver(self._handle, number)
            except usb.core.USBError as error:
                if error.backend_error_code not in (_libusb.ERROR_NOT_FOUND, _libusb.ERROR_NOT_SUPPORTED):
                    raise

    def release(self, *, give_back: bool, reset: bool = True) -> None:
        """Give the interfaces up; with *give_back* the kernel's drivers return, after a reset if *reset*.

        Without *give_back* they stay away until a later call has it. All interfaces are released before any driver returns: drivers of compound functions need all of them.
        """
        # Off first: no driver may return before all interfaces are free, nor before another configuration is set.
        self._displace_drivers(False)
        claimed, self._claimed = self._claimed, []
        for number in claimed:
            with contextlib.suppress(usb.core.USBError, NotImplementedError):
                self.device._ctx.managed_release_interface(self.device, number)
        if not give_back:
            return
        displaced, self._displaced = self._displaced, []
        if self._lost or (reset and not self._reset_for_driver()):
            return
        restore = self._restore
        with contextlib.suppress(DeviceError):
            if restore is not None and restore != (self._active_configuration() or UNCONFIGURED):
                self.set_configuration(restore)  # the kernel binds drivers by itself
                return
        for number in displaced:
            with contextlib.suppress(usb.core.USBError, NotImplementedError):
                self._backend.attach_kernel_driver(self._handle, number)

    def _reset_for_driver(self) -> bool:
        """So that the driver finds a clean device."""
        try:
            self.reset()
        except DeviceLostError:
            return False
        except DeviceError as error:
            logger.warning("%s", error)
            return False
        return True

    # ------------------------------------------------------------ configuration, halts, reset

    def set_configuration(self, value: int) -> int:
        """Select configuration *value*, 0 = unconfigured. Interfaces have to be released. Returns a status."""
        status = self._attempt(lambda: self._backend.set_configuration(self._handle, value))
        self.device._ctx.dispose(self.device, close_handle=False)  # what pyusb remembers is wrong now
        return status

    def set_alt_setting(self, interface: int, alt: int) -> int:
        """Select alternate setting *alt* of *interface*. Returns a status."""
        return self._attempt(lambda: self._backend.set_interface_altsetting(self._handle, interface, alt))

    def clear_halt(self, endpoint: int) -> int:
        """Clear a halt, at the device and at the host's controller. Returns a status."""
        return self._attempt(lambda: self._backend.clear_halt(self._handle, endpoint))

    def reset(self) -> None:
        """Reset the device; claims and alternate settings survive.

        Raises DeviceLostError: the device is gone, or came back as another one (new firmware).
        """
        try:
            self._try(lambda: self._backend.reset_device(self._handle))
        except NotImplementedError:
            return
        except usb.core.USBError as error:
            if error.backend_error_code == _libusb.ERROR_NOT_FOUND:
                raise DeviceLostError("the device came back from its reset as another one") from error
            raise translate(error, "the device cannot be reset", self.device) from error

    def _attempt(self, call: Callable[[], object]) -> int:
        try:
            self._try(call)
        except (usb.core.USBError, NotImplementedError) as error:
            return status_of(error)
        return Status.SUCCESS

    def _try(self, call: Callable[[], Result]) -> Result:
        """Call pyusb; the loss of the device is noted."""
        try:
            return call()
        except usb.core.USBError as error:
            if is_lost(error):
                self._lost = True
            raise

    def _let_go(self) -> None:
        """Close pyusb's handle."""
        with contextlib.suppress(usb.core.USBError):
            self.device._ctx.dispose(self.device)
