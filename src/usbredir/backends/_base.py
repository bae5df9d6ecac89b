"""What every device behind pyusb shares: description, claims, drivers, configurations; all but its transfers.

pyusb's ``Device`` remembers claims and its active configuration, so these are changed through it or forgotten
afterwards; ``Device.reset()`` closes the handle, so the backend's reset is called in its place.

Source: docs/real-devices.md; the order of release and re-attachment is HOST_BEHAVIOUR's, "Taking a device".
"""

from __future__ import annotations

import contextlib
import errno
import logging
import warnings
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import usb.core
import usb.util

from ..descriptors import Configuration, parse_configuration
from ..device import may_be_reset
from ..errors import DeviceClaimError, DeviceError, DeviceLostError, DeviceNotFoundError
from ..proto import Speed, Status
from ._exit import is_closed, is_open, register_exit_handler
from ._raw_descriptors import raw_configuration, raw_device
from ._system import driver_of, permission_hint

__all__ = ["BaseDevice", "translate"]

logger = logging.getLogger("usbredir.backends.pyusb")

SPEEDS = {1: Speed.LOW, 2: Speed.FULL, 3: Speed.HIGH, 4: Speed.SUPER}
"""libusb's numbers for speeds; what is faster than super has none on the wire."""
UNCONFIGURED = -1
"""The value that makes libusb leave a device without configuration; on the wire it is 0."""

# Errors are told apart by errno: every backend has it, where backend_error_code is libusb's number with one and
# something else with the next.
FORBIDDEN = (errno.EPERM, errno.EACCES)
STATUS = {
    errno.EINVAL: Status.INVAL,
    errno.ETIMEDOUT: Status.TIMEOUT,
}
"""Status of errors of calls that are no transfers; the many without a number of their own are *ioerror*."""

Result = TypeVar("Result")

_in_use: weakref.WeakSet[Any] = weakref.WeakSet()
"""The resource managers of pyusb's devices that are open here: one handle has one user."""


def is_lost(error: BaseException) -> bool:
    """Whether an error says that the device is gone."""
    return isinstance(error, usb.core.USBError) and error.errno == errno.ENODEV


def status_of(error: BaseException) -> Status:
    """The status that tells the guest of an error. Raises DeviceLostError when the device is gone."""
    if is_lost(error):
        raise DeviceLostError("the device was unplugged") from error
    if not isinstance(error, usb.core.USBError):
        return Status.IOERROR
    if isinstance(error, usb.core.USBTimeoutError):
        return Status.TIMEOUT
    return STATUS.get(error.errno or 0, Status.IOERROR)


def translate(error: BaseException, what: str, device: Any) -> DeviceError:
    """An error of pyusb as one of ours: cause and remedy. *what*: what was tried."""
    if isinstance(error, NotImplementedError):
        return DeviceError(f"{what}: this system, or the device's driver, does not support it")
    if not isinstance(error, usb.core.USBError):
        return DeviceError(f"{what}: {error}")
    if is_lost(error):
        return DeviceLostError(f"{what}: the device was unplugged")
    if error.errno in FORBIDDEN:
        return DeviceClaimError(f"{what}: permission denied; {permission_hint(device)}", reason="forbidden")
    if error.errno == errno.EBUSY:
        return DeviceClaimError(f"{what}: it is in use by another program or by a virtual machine; end that first")
    if error.errno == errno.ENOENT:
        return DeviceNotFoundError(f"{what}: not found; was it unplugged?")
    return DeviceError(f"{what}: {error.strerror or error}")


class BaseDevice:
    """A ``usb.core.Device``, opened. Raises DeviceClaimError (forbidden, in use) or DeviceError.

    One that pyusb had open is closed first: what was claimed with it is released, and forgotten what pyusb
    remembered of it.

    Attributes:
        device: pyusb's object.
    """

    _closed = True  # until it is open

    def __init__(self, device: usb.core.Device) -> None:
        self.device = device
        self._backend: Any = device.backend
        self._handle: Any = None  # None: not open
        self._restore: int | None = None  # configuration to go back to, once known
        self._taken = False  # claimed; stays so while a release without give_back waits for the next claim
        self._claimed: list[int] = []
        self._displaced: list[int] = []  # interfaces whose drivers are to return some day
        self._lost = False
        if device._ctx in _in_use:
            raise DeviceClaimError("the device is in use by this program: close that first")
        try:
            device._ctx.dispose(device)
            with self._opening():
                self._handle = device._ctx.managed_open()
        except (usb.core.USBError, NotImplementedError) as error:
            raise translate(error, "the device cannot be opened", device) from error
        _in_use.add(device._ctx)
        self._closed = False
        is_open(self)
        register_exit_handler()

    def __repr__(self) -> str:
        d = self.device
        place = "" if d.address is None else f" at {d.bus}-{d.address}"
        return f"<{type(self).__name__} {d.idVendor:04x}:{d.idProduct:04x}{place}>"

    def __del__(self) -> None:
        if not self._closed:
            try:
                warnings.warn(f"{self!r} was not closed", ResourceWarning, stacklevel=2)
            finally:
                self.close()

    def close(self) -> None:
        """Let the device go. Idempotent."""
        raise NotImplementedError

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
        try:
            for configuration in self.device:
                if configuration.bConfigurationValue == value:
                    return raw_configuration(configuration)
        except usb.core.USBError as error:
            raise translate(error, "the configuration descriptor cannot be read", self.device) from error
        return None

    def _active_configuration(self) -> int | None:
        try:
            return self._try(lambda: int(self._backend.get_configuration(self._handle))) or None
        except NotImplementedError:
            return int(self.device[0].bConfigurationValue)  # most devices have one
        except usb.core.USBError as error:
            raise translate(error, "the active configuration cannot be read", self.device) from error

    @property
    def lost(self) -> bool:
        """The device is gone; nothing will work any more."""
        return self._lost

    # ------------------------------------------------------------ claims

    def claim(self) -> None:
        """Take all interfaces of the active configuration; the kernel's drivers let go of them first.

        Raises DeviceClaimError (in use, forbidden), DeviceLostError or DeviceError; nothing stays claimed then.
        """
        configuration = self._parsed_configuration()
        if self._restore is None:
            self._restore = self._configuration_to_restore(configuration)
        numbers = configuration.numbers() if configuration is not None else []
        self._check_open()
        self._taken = True
        self._displace_drivers(True)
        number = 0
        try:
            for number in numbers:
                self._claim(number)
        except (usb.core.USBError, NotImplementedError) as error:
            translated = self._claim_error(error, number)
            # The device did nothing yet that a reset would have to undo.
            self.release(give_back=True, reset=False)
            raise translated from error

    def _claim(self, number: int) -> None:
        # Remembered first, so that a half-done claim is undone.
        for remembered in (self._claimed, self._displaced):
            if number not in remembered:
                remembered.append(number)
        self._detach(number)
        self._try(lambda: self.device._ctx.managed_claim_interface(self.device, number))

    def _parsed_configuration(self) -> Configuration | None:
        raw = self.configuration_descriptor
        try:
            return None if raw is None else parse_configuration(raw)
        except ValueError as error:
            raise DeviceError(f"the configuration descriptor makes no sense: {error}") from error

    def _configuration_to_restore(self, configuration: Configuration | None) -> int:
        if configuration is not None:
            return configuration.value
        if self.device.bNumConfigurations == 1:
            # "Safely removed" by the user: it is to come back with its only configuration.
            with contextlib.suppress(usb.core.USBError):
                return int(self.device[0].bConfigurationValue)
        return UNCONFIGURED

    def _claim_error(self, error: BaseException, number: int) -> DeviceError:
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
                if error.errno not in (errno.ENOENT, errno.ENOSYS):
                    raise

    def release(self, *, give_back: bool, reset: bool = True) -> None:
        """Give the interfaces up; with *give_back* the kernel's drivers return, after a reset if *reset*.

        Without *give_back* they stay away until a later call has it. All interfaces are released before any driver
        returns: drivers of compound functions need all of them. Nothing happens when nothing was claimed.
        """
        if not self._taken or self._handle is None:
            return
        # Off first: no driver may return before all interfaces are free, nor before another configuration is set.
        self._displace_drivers(False)
        claimed, self._claimed = self._claimed, []
        for number in claimed:
            self._quietly(lambda n=number: self.device._ctx.managed_release_interface(self.device, n))  # type: ignore[misc]
        if not give_back:
            return
        self._taken = False
        displaced, self._displaced = self._displaced, []
        if self._lost or (reset and not self._reset_for_driver()):
            return
        try:
            restored = self._restore_configuration()  # the kernel binds drivers by itself then
        except DeviceError as error:
            logger.warning("%s", error)
            return
        if not restored:
            for number in displaced:
                self._quietly(lambda n=number: self._backend.attach_kernel_driver(self._handle, n))  # type: ignore[misc]

    def _restore_configuration(self) -> bool:
        """Go back to the configuration of the first claim; False when it is the present one."""
        restore = self._restore
        if restore is None or restore == (self._active_configuration() or UNCONFIGURED):
            return False
        if self.set_configuration(restore) != Status.SUCCESS:
            logger.warning("%r cannot go back to configuration %d", self, restore)
        return True

    def _quietly(self, call: Callable[[], object]) -> None:
        with contextlib.suppress(usb.core.USBError, NotImplementedError):
            self._try(call)

    def _reset_for_driver(self) -> bool:
        """So that the driver finds a clean device; False: there is no way on."""
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
        self._claimed.clear()  # released with it, if it was not before
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
            if error.errno == errno.ENOENT:
                self._lost = True  # this handle leads nowhere
                raise DeviceLostError("the device came back from its reset as another one") from error
            raise translate(error, "the device cannot be reset", self.device) from error

    def _attempt(self, call: Callable[[], object]) -> int:
        try:
            self._try(call)
        except (usb.core.USBError, NotImplementedError) as error:
            return status_of(error)
        return Status.SUCCESS

    def _try(self, call: Callable[[], Result]) -> Result:
        """Call pyusb; the loss of the device is noted. A closed handle is freed memory: DeviceError."""
        self._check_open()
        try:
            return call()
        except usb.core.USBError as error:
            if is_lost(error):
                self._lost = True
            raise

    def _check_open(self) -> None:
        if self._handle is None:
            raise DeviceError("the device is closed")

    def _let_go(self) -> None:
        """Give everything back and close pyusb's handle."""
        with contextlib.suppress(DeviceError):
            self.release(give_back=True, reset=may_be_reset(self.device_descriptor))
        is_closed(self)
        _in_use.discard(self.device._ctx)
        self._handle = None
        with contextlib.suppress(usb.core.USBError, NotImplementedError):
            self.device._ctx.dispose(self.device)

    def abandon(self) -> None:
        """Forget the handle without closing it: pyusb is not to do so either, now or at exit."""
        is_closed(self)
        self._closed = self._lost = True
        self._handle = None
        self.device._ctx._claimed_intf.clear()
        self.device._ctx.handle = None
