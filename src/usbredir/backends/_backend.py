"""pyusb's libusb1 backend with contexts of our own: made when first needed, ended after their devices.

pyusb keeps the library in a global of its module, which all its objects use, and one backend for everybody, whose
context looks for devices. Here a context is made for each purpose; :func:`load_library` fills pyusb's globals so that
they stay as they are.

:class:`FdBackend` is for one device that somebody else opened: a usbfs file descriptor from Android, a portal, a
helper. Its context looks for no devices (on Android it may not), its only device is the one behind the descriptor, and
its only handle is made around the descriptor.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import usb.backend
import usb.backend.libusb1 as libusb1
import usb.core
import usb.libloader

from ..errors import DeviceError
from . import _libusb

__all__ = ["Backend", "FdBackend", "load_library"]


class Backend(libusb1._LibUSB):  # type: ignore[misc]  # pyusb is not typed
    """A backend on *lib*, pyusb's libusb, with a context of its own."""

    def __init__(self, lib: Any) -> None:
        usb.backend.IBackend.__init__(self)
        self.lib = lib

    @cached_property
    def ctx(self) -> ctypes.c_void_p:
        """The context. Raises usb.core.USBError when it cannot be made."""
        context = ctypes.c_void_p()
        libusb1._check(self.lib.libusb_init(ctypes.byref(context)))
        return context

    def _finalize_object(self) -> None:
        if self.__dict__.get("ctx"):  # not made for this
            super()._finalize_object()

    def enumerate_devices(self) -> Iterator[Any]:
        """What is plugged in."""
        for device in super().enumerate_devices():
            device.backend = self  # pyusb's objects let the backend go before the device
            yield device


def _find_library() -> Any:
    """libusb-package's way to find its library, or None for the system's."""
    try:
        import libusb_package
    except ImportError:
        return None
    return libusb_package.find_library


def _system_library(name: str) -> str:
    """Where there are no tools that could search (a small container): the name under which Linux has it."""
    return "libusb-1.0.so.0"


def load_library() -> Any:
    """pyusb's libusb: what pyusb has loaded already, else libusb-package's, else the system's. Raises DeviceError."""
    if libusb1._lib_object is None:
        for find in dict.fromkeys((_find_library(), None, _system_library)):
            try:
                library = libusb1._load_library(find_library=find)
            except usb.libloader.LibraryException:
                continue
            libusb1._setup_prototypes(library)
            libusb1._lib = library
            libusb1._lib_object = Backend(library)  # otherwise pyusb would load another library one day
            break
        else:
            raise DeviceError("libusb 1.0 cannot be loaded: install the package libusb-package, or the system's libusb")
    return libusb1._lib


class Handle:
    """As pyusb's handles: *handle* is libusb's, *devid* the device."""

    def __init__(self, handle: ctypes.c_void_p, devid: Any) -> None:
        self.handle = handle
        self.devid = devid


class FdBackend(Backend):
    """The backend of the device behind *fd*. Raises DeviceError."""

    def __init__(self, lib: Any, fd: int) -> None:
        super().__init__(lib)
        self._library = _libusb.load(lib._name)
        self._handle: ctypes.c_void_p | None = None
        if not hasattr(self._library, "libusb_init_context"):
            raise DeviceError("this libusb is too old to take a file descriptor: 1.0.27 is needed")
        option = _libusb.InitOption(_libusb.OPTION_NO_DEVICE_DISCOVERY, None)
        context, handle = ctypes.c_void_p(), ctypes.c_void_p()
        self._check(self._library.libusb_init_context(ctypes.byref(context), ctypes.byref(option), 1), fd)
        self.ctx = context
        self._check(self._library.libusb_wrap_sys_device(context, fd, ctypes.byref(handle)), fd)
        self._handle = handle

    def _check(self, code: int, fd: int) -> None:
        if code < 0:
            words = bytes(self._library.libusb_strerror(code)).decode("utf-8", "replace")
            raise DeviceError(f"the file descriptor {fd} cannot be used as a USB device: {words}")

    def _finalize_object(self) -> None:
        if self.__dict__.get("_handle") is not None:  # an error came before anybody took it
            self._library.libusb_close(self._handle)
            self._handle = None
        super()._finalize_object()

    def enumerate_devices(self) -> Iterator[Any]:
        """The one device, while its handle was not taken."""
        if self._handle is not None:
            device = libusb1._Device(self._library.libusb_get_device(self._handle))
            device.backend = self
            yield device

    def open_device(self, dev: Any) -> Handle:
        """The one handle, once: what was closed cannot be opened again."""
        handle, self._handle = self._handle, None
        if handle is None:
            raise usb.core.USBError("a file descriptor can be used once", _libusb.ERROR_NO_DEVICE, None)
        return Handle(handle, dev.devid)
