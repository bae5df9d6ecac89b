"""libusb's asynchronous interface for ctypes: prototypes, numbers and what they mean here.

pyusb loads libusb for its synchronous calls. The same file is loaded a second time here, which gives the same
library with function objects of our own: neither's prototypes can disturb the other's. Nothing outside this
package uses these names.

Source: the libusb 1.0 API, https://libusb.sourceforge.io/api-1.0/.
"""

from __future__ import annotations

import ctypes
import os
import struct
from ctypes import POINTER, c_char, c_int, c_long, c_short, c_ubyte, c_uint, c_void_p
from functools import cache
from typing import Any

from ..errors import DeviceError
from ..proto import Status, TransferType

__all__ = [
    "ADDRESS",
    "BUFFER_OFFSET",
    "ERROR_INTERRUPTED",
    "ERROR_NO_DEVICE",
    "HEAD",
    "InitOption",
    "NO_ISO_DATA",
    "RESULT",
    "TRANSFER_STATUS",
    "TRANSFER_TYPE",
    "PollFd",
    "TimeVal",
    "error_status",
    "load",
]

ERROR_INVALID_PARAM = -2
ERROR_NO_DEVICE = -4
ERROR_TIMEOUT = -7
ERROR_INTERRUPTED = -10

_ERROR_STATUS = {ERROR_INVALID_PARAM: Status.INVAL, ERROR_TIMEOUT: Status.TIMEOUT}


def error_status(code: int) -> Status:
    """The status that tells a guest of a libusb error; the many without a number of their own are *ioerror*."""
    return _ERROR_STATUS.get(code, Status.IOERROR)


TRANSFER_NO_DEVICE = 5
TRANSFER_STATUS = {
    0: Status.SUCCESS,
    1: Status.IOERROR,
    2: Status.TIMEOUT,
    3: Status.CANCELLED,
    4: Status.STALL,
    TRANSFER_NO_DEVICE: Status.IOERROR,
    6: Status.BABBLE,
}
"""libusb's transfer status as ours."""
NO_ISO_DATA = -18
"""-EXDEV: old systems label good isochronous packets with it."""

TRANSFER_TYPE = {TransferType.CONTROL: 0, TransferType.ISO: 1, TransferType.BULK: 2, TransferType.INTERRUPT: 3}
TYPE_BULK_STREAM = 4

# struct libusb_transfer up to its isochronous packets: dev_handle, flags, endpoint, type, timeout, status, length,
# actual_length, callback, user_data, buffer, num_iso_packets. Callback and user data are plain addresses: pyusb's
# own structure takes a py_object there, which is neither counted nor allowed to be NULL.
HEAD = struct.Struct("@PBBBIiiiPPPi")
STATUS_OFFSET = struct.calcsize("@PBBBIi") - struct.calcsize("i")
RESULT = struct.Struct("@iii")
"""status, length, actual_length, at STATUS_OFFSET."""
BUFFER_OFFSET = struct.calcsize("@PBBBIiiiPPP") - struct.calcsize("P")
ADDRESS = struct.Struct("@P")
"""buffer, at BUFFER_OFFSET."""
assert HEAD.size == (60 if ctypes.sizeof(c_void_p) == 8 else 40), "libusb's structure is not as expected"

HOTPLUG_ARRIVED = 1
HOTPLUG_LEFT = 2
MATCH_ANY = -1
CAP_HAS_HOTPLUG = 1
OPTION_NO_DEVICE_DISCOVERY = 2

_FUNCTYPE: Any = getattr(ctypes, "WINFUNCTYPE", ctypes.CFUNCTYPE) if os.name == "nt" else ctypes.CFUNCTYPE
_LIBRARY: Any = getattr(ctypes, "WinDLL", ctypes.CDLL) if os.name == "nt" else ctypes.CDLL
TransferCallback = _FUNCTYPE(None, c_void_p)
PollFdAdded = _FUNCTYPE(None, c_int, c_short, c_void_p)
PollFdRemoved = _FUNCTYPE(None, c_int, c_void_p)
HotplugCallback = _FUNCTYPE(c_int, c_void_p, c_void_p, c_int, c_void_p)


class PollFd(ctypes.Structure):
    """struct libusb_pollfd."""

    _fields_ = [("fd", c_int), ("events", c_short)]


class TimeVal(ctypes.Structure):
    """struct timeval."""

    _fields_ = [("seconds", c_long), ("microseconds", c_long)]


class InitOption(ctypes.Structure):
    """struct libusb_init_option; the value is a union of an int and a pointer."""

    _fields_ = [("option", c_int), ("value", c_void_p)]


_PROTOTYPES: dict[str, tuple[Any, list[Any]]] = {
    "libusb_alloc_transfer": (c_void_p, [c_int]),
    "libusb_free_transfer": (None, [c_void_p]),
    "libusb_submit_transfer": (c_int, [c_void_p]),
    "libusb_cancel_transfer": (c_int, [c_void_p]),
    "libusb_transfer_set_stream_id": (None, [c_void_p, c_uint]),
    "libusb_handle_events_timeout_completed": (c_int, [c_void_p, POINTER(TimeVal), POINTER(c_int)]),
    "libusb_interrupt_event_handler": (None, [c_void_p]),
    "libusb_get_pollfds": (POINTER(POINTER(PollFd)), [c_void_p]),
    "libusb_free_pollfds": (None, [c_void_p]),
    "libusb_set_pollfd_notifiers": (None, [c_void_p, PollFdAdded, PollFdRemoved, c_void_p]),
    "libusb_pollfds_handle_timeouts": (c_int, [c_void_p]),
    "libusb_get_next_timeout": (c_int, [c_void_p, POINTER(TimeVal)]),
    "libusb_alloc_streams": (c_int, [c_void_p, c_uint, POINTER(c_ubyte), c_int]),
    "libusb_free_streams": (c_int, [c_void_p, POINTER(c_ubyte), c_int]),
    "libusb_set_auto_detach_kernel_driver": (c_int, [c_void_p, c_int]),
    "libusb_has_capability": (c_int, [c_uint]),
    "libusb_hotplug_register_callback": (
        c_int,
        [c_void_p, c_int, c_int, c_int, c_int, c_int, HotplugCallback, c_void_p, POINTER(c_int)],
    ),
    "libusb_wrap_sys_device": (c_int, [c_void_p, c_void_p, POINTER(c_void_p)]),
    "libusb_get_device": (c_void_p, [c_void_p]),
    "libusb_close": (None, [c_void_p]),
    "libusb_strerror": (ctypes.c_char_p, [c_int]),
}
_SINCE_1_0_27: dict[str, tuple[Any, list[Any]]] = {
    "libusb_init_context": (c_int, [POINTER(c_void_p), POINTER(InitOption), c_int]),
}


@cache
def load(path: str) -> ctypes.CDLL:
    """The library at *path* with our prototypes. Raises DeviceError for a libusb before 1.0.23."""
    library: ctypes.CDLL = _LIBRARY(path)
    for name, (result, arguments) in {**_PROTOTYPES, **_SINCE_1_0_27}.items():
        function = getattr(library, name, None)
        if function is not None:
            function.restype = result
            function.argtypes = arguments
        elif name in _PROTOTYPES:
            raise DeviceError(f"the libusb at {path} is too old: 1.0.23 is needed")
    return library


def bytes_at(address: int, count: int) -> memoryview:
    """*count* bytes of C memory, writable. The caller keeps the memory alive for as long as the view."""
    return memoryview((c_char * count).from_address(address)).cast("B")
