"""Remote devices for pyusb: a back end whose devices are at the other end of a connection.

::

    backend = usbredir.pyusb_backend.get_backend("host:4000")
    device = usb.core.find(backend=backend, idVendor=0x1209)
    device.write(0x01, b"hello")

No kernel module and no rights are needed: every transfer goes through :class:`usbredir.guest.Guest`. Errors are those
of pyusb's back end for libusb 1.0, with the same numbers. Source: docs/drive-a-remote-device.md; usb.backend.IBackend.
"""

from __future__ import annotations

import array
import errno
import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

import usb.backend
from usb.core import USBError, USBTimeoutError

from ._pyusb_descriptors import (
    ConfigurationDescriptor,
    DeviceDescriptor,
    EndpointDescriptor,
    InterfaceDescriptor,
)
from ._pyusb_device import RemoteDevice, Transferred
from ._pyusb_hosts import Bus, BusAt, BusOf
from .errors import LocalProtocolError, UsbRedirError
from .guest import Guest
from .proto import Status
from .transport import Connection

__all__ = ["Backend", "get_backend"]

PATIENCE = 5.0
"""Seconds that connecting, and waiting for the device, may take."""
FOR_EVER = 1 << 30
"""Milliseconds, 12 days: as good as no timeout."""


class _Failure(NamedTuple):
    """libusb's number for an error of a call, the system's, and the text."""

    code: int
    errno: int
    text: str


IO = _Failure(-1, errno.EIO, "Input/output error")
INVALID = _Failure(-2, errno.EINVAL, "Invalid parameter")
NO_DEVICE = _Failure(-4, errno.ENODEV, "No such device (it may have been disconnected)")
NOT_FOUND = _Failure(-5, errno.ENOENT, "Entity not found")
TIMED_OUT = _Failure(-7, errno.ETIMEDOUT, "Operation timed out")

FAILURES: Mapping[int, _Failure] = {
    Status.STALL: _Failure(-9, errno.EPIPE, "Pipe error"),
    Status.TIMEOUT: TIMED_OUT,
    Status.BABBLE: _Failure(-8, errno.EOVERFLOW, "Overflow"),
}
"""What a status means in libusb's synchronous calls; all others are I/O errors."""
ISO_FAILURES: Mapping[int, _Failure] = {
    Status.CANCELLED: _Failure(3, errno.EAGAIN, "Transfer was cancelled"),
    Status.STALL: _Failure(4, errno.EIO, "Endpoint stalled"),
    Status.TIMEOUT: _Failure(2, errno.ETIMEDOUT, "Transfer timed out"),
    Status.BABBLE: _Failure(6, errno.EOVERFLOW, "Device sent more data than requested"),
}
"""The same for isochronous transfers, for which pyusb gives the numbers of libusb's transfers."""
ISO_FAILED = _Failure(1, errno.EIO, "Transfer failed")

F = TypeVar("F", bound=Callable[..., Any])


def _error(failure: _Failure, text: str = "") -> USBError:
    kind = USBTimeoutError if failure is TIMED_OUT else USBError
    return kind(text or failure.text, failure.code, failure.errno)


def _check(status: int) -> None:
    """Raise the USBError of a status."""
    if status != Status.SUCCESS:
        raise _error(FAILURES.get(status, IO))


def _moved(result: Transferred) -> int:
    """Bytes moved. A transfer whose time was over, but that moved something, is none that failed."""
    if result.status != Status.TIMEOUT or not result.length:
        _check(result.status)
    return result.length


def _iso_moved(result: Transferred) -> int:
    if result.status != Status.SUCCESS and not (result.status == Status.TIMEOUT and result.length):
        raise _error(ISO_FAILURES.get(result.status, ISO_FAILED))
    return result.length


def _in_usb_errors(method: F) -> F:
    """Raise what pyusb's users expect: USBError."""

    @functools.wraps(method)
    def wrapped(*args: Any) -> Any:
        try:
            return method(*args)
        except USBError:
            raise
        except TimeoutError as error:
            raise _error(TIMED_OUT) from error
        except (LocalProtocolError, ValueError) as error:
            raise _error(INVALID, str(error)) from error
        except (UsbRedirError, OSError) as error:  # the device is gone, or the connection is
            raise _error(NO_DEVICE) from error

    return wrapped  # type: ignore[return-value]


def _seconds(timeout: int) -> float | None:
    """pyusb's timeout; 0 waits for ever, and so does what poll(2) cannot count."""
    return timeout / 1000 if 0 < timeout < FOR_EVER else None


class _Room:
    """An array that a transfer fills, as bytes. Elements that are not bytes are put back at the end."""

    def __init__(self, buffer: array.array[Any]) -> None:
        self._buffer = buffer
        self._copy = None if buffer.itemsize == 1 else bytearray(buffer.tobytes())
        self._view = memoryview(buffer if self._copy is None else self._copy).cast("B")

    def __enter__(self) -> memoryview:
        return self._view

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None, /
    ) -> None:
        self._view.release()
        if self._copy is not None:
            self._buffer[:] = array.array(self._buffer.typecode, bytes(self._copy))


Read = Callable[[int, memoryview, "float | None"], Transferred]


def _read(transfer: Read, endpoint: int, buffer: array.array[Any], timeout: int) -> Transferred:
    with _Room(buffer) as room:
        return transfer(endpoint, room, _seconds(timeout))


class Backend(usb.backend.IBackend):  # type: ignore[misc]  # pyusb has no types
    """pyusb's back end for devices of hosts; made by :func:`get_backend`.

    Every host is a bus of its own, numbered from 1 in the order given, with at most one device on port 1. A device that
    comes again is a new one, with the next address; objects of the former one raise USBError with ENODEV, as they do
    when the connection breaks.

    No kernel driver is ever active, interfaces are claimed without asking anybody: a host serves one guest at a time.

    Threads: any; one at a time for an endpoint. A context manager, which closes it at the end.
    """

    def __init__(self, buses: Sequence[Bus]) -> None:
        super().__init__()
        self._buses = buses

    def close(self) -> None:
        """End the connections. There are no devices any more. Guests that were given stay open. Idempotent."""
        with _CHANGING:
            for addresses, backend in list(_KNOWN.items()):
                if backend is self:
                    del _KNOWN[addresses]
        for bus in self._buses:
            bus.close()

    def _finalize_object(self) -> None:
        """Run at exit, or by the garbage collector in any thread: nothing here waits for another one."""
        for bus in self._buses:
            bus.disconnect()

    def __enter__(self) -> Backend:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None, /
    ) -> None:
        self.close()

    # ------------------------------------------------------------ devices and their descriptors

    @_in_usb_errors
    def enumerate_devices(self) -> Iterator[RemoteDevice]:
        """The devices that are there now. Connects again where the connection is lost; who is not there has none."""
        return iter([device for bus in self._buses if (device := bus.device()) is not None])

    def get_parent(self, dev: RemoteDevice) -> None:
        """No device has a hub that could be seen."""
        return

    def get_device_descriptor(self, dev: RemoteDevice) -> DeviceDescriptor:
        """The device descriptor, with bus, address, port and speed."""
        return dev.descriptor

    @_in_usb_errors
    def get_configuration_descriptor(self, dev: RemoteDevice, config: int) -> ConfigurationDescriptor:
        """A configuration by position. Raises USBError with ENOENT when there is none, as for all descriptors."""
        try:
            if not 0 <= config < dev.descriptor.bNumConfigurations:
                raise ValueError(f"the device has {dev.descriptor.bNumConfigurations} configurations")
            return dev.configuration(config)
        except ValueError as error:
            raise _error(NOT_FOUND) from error

    def get_interface_descriptor(self, dev: RemoteDevice, intf: int, alt: int, config: int) -> InterfaceDescriptor:
        """An alternate setting by positions. Raises IndexError."""
        return self.get_configuration_descriptor(dev, config).interfaces[intf][alt]

    def get_endpoint_descriptor(
        self, dev: RemoteDevice, ep: int, intf: int, alt: int, config: int
    ) -> EndpointDescriptor:
        """An endpoint by positions. Raises IndexError."""
        return self.get_interface_descriptor(dev, intf, alt, config).endpoints[ep]

    # ------------------------------------------------------------ open devices

    @_in_usb_errors
    def open_device(self, dev: RemoteDevice) -> RemoteDevice:
        """The handle is the device itself."""
        dev.open()
        return dev

    def close_device(self, dev_handle: RemoteDevice) -> None:
        """Stop its streams, if nobody else has it open."""
        dev_handle.close()

    @_in_usb_errors
    def set_configuration(self, dev_handle: RemoteDevice, config_value: int) -> None:
        """Select a configuration by its value."""
        _check(dev_handle.set_configuration(config_value))

    @_in_usb_errors
    def get_configuration(self, dev_handle: RemoteDevice) -> int:
        """The value of the active configuration, 0: none."""
        status, value = dev_handle.get_configuration()
        _check(status)
        return value

    @_in_usb_errors
    def set_interface_altsetting(self, dev_handle: RemoteDevice, intf: int, altsetting: int) -> None:
        """Select an alternate setting."""
        _check(dev_handle.set_alt_setting(intf, altsetting))

    @_in_usb_errors
    def claim_interface(self, dev_handle: RemoteDevice, intf: int) -> None:
        """The host has claimed it."""
        dev_handle.claim(intf)

    def release_interface(self, dev_handle: RemoteDevice, intf: int) -> None:
        """Stop its streams, if nobody else has claimed it."""
        dev_handle.release(intf)

    @_in_usb_errors
    def clear_halt(self, dev_handle: RemoteDevice, ep: int) -> None:
        """Clear the halt of an endpoint."""
        _check(dev_handle.clear_halt(ep))

    @_in_usb_errors
    def reset_device(self, dev_handle: RemoteDevice) -> None:
        """Reset the device."""
        dev_handle.reset()

    @_in_usb_errors
    def is_kernel_driver_active(self, dev_handle: RemoteDevice, intf: int) -> bool:
        """False: the host has taken the device from its drivers."""
        dev_handle.check()
        return False

    @_in_usb_errors
    def detach_kernel_driver(self, dev_handle: RemoteDevice, intf: int) -> None:
        """Nothing to do."""
        dev_handle.check()

    @_in_usb_errors
    def attach_kernel_driver(self, dev_handle: RemoteDevice, intf: int) -> None:
        """Nothing to do: the host does it when the guest has left."""
        dev_handle.check()

    # ------------------------------------------------------------ transfers

    @_in_usb_errors
    def ctrl_transfer(
        self,
        dev_handle: RemoteDevice,
        bmRequestType: int,
        bRequest: int,
        wValue: int,
        wIndex: int,
        data: array.array[Any],
        timeout: int,
    ) -> int:
        """A control transfer; bytes moved."""
        setup = bmRequestType, bRequest, wValue, wIndex
        if not bmRequestType & 0x80:
            result = dev_handle.control_out(*setup, data.tobytes(), _seconds(timeout))
        else:
            with _Room(data) as room:
                result = dev_handle.control_in(*setup, room, _seconds(timeout))
        _check(result.status)
        return result.length

    @_in_usb_errors
    def bulk_write(self, dev_handle: RemoteDevice, ep: int, intf: int, data: array.array[Any], timeout: int) -> int:
        """Write to a bulk endpoint; bytes moved."""
        return _moved(dev_handle.bulk_out(ep, data.tobytes(), _seconds(timeout)))

    @_in_usb_errors
    def bulk_read(self, dev_handle: RemoteDevice, ep: int, intf: int, buff: array.array[Any], timeout: int) -> int:
        """Read from a bulk endpoint; bytes moved."""
        return _moved(_read(dev_handle.bulk_in, ep, buff, timeout))

    @_in_usb_errors
    def intr_write(self, dev_handle: RemoteDevice, ep: int, intf: int, data: array.array[Any], timeout: int) -> int:
        """Write to an interrupt endpoint; bytes moved."""
        return _moved(dev_handle.interrupt_out(ep, data.tobytes(), _seconds(timeout)))

    @_in_usb_errors
    def intr_read(self, dev_handle: RemoteDevice, ep: int, intf: int, buff: array.array[Any], timeout: int) -> int:
        """Read from an interrupt endpoint; bytes moved."""
        return _moved(_read(dev_handle.interrupt_in, ep, buff, timeout))

    @_in_usb_errors
    def iso_write(self, dev_handle: RemoteDevice, ep: int, intf: int, data: array.array[Any], timeout: int) -> int:
        """Write to an isochronous endpoint; bytes moved."""
        return _iso_moved(dev_handle.iso_out(ep, data.tobytes(), _seconds(timeout)))

    @_in_usb_errors
    def iso_read(self, dev_handle: RemoteDevice, ep: int, intf: int, buff: array.array[Any], timeout: int) -> int:
        """Read from an isochronous endpoint, packet after packet without gaps; bytes moved."""
        return _iso_moved(_read(dev_handle.iso_in, ep, buff, timeout))


_KNOWN: dict[tuple[str, ...], Backend] = {}
_CONNECTING: dict[tuple[str, ...], threading.Lock] = {}
"""Held while these addresses are connected: a host that does not answer keeps nobody from the others."""
_CHANGING = threading.RLock()
"""Held to change the two, never while anybody waits. Reentrant: the garbage collector may close a back end."""


def get_backend(
    *addresses: str,
    guest: Guest | Sequence[Guest] = (),
    patience: float = PATIENCE,
    connections: Mapping[str, Connection] | None = None,
) -> Backend:
    """A back end with the devices of the hosts at *addresses*, for ``usb.core.find(backend=...)``.

    Connects at once, and again in :func:`usb.core.find` after the connection has broken. The same addresses give the
    same back end until it is closed, since a host serves one guest at a time.

    Args:
        addresses: ``host:port``, ``[v6 address]:port``, ``unix:/path``.
        guest: guests that are connected already, in place of addresses, or beside them. They are not closed.
        patience: seconds that connecting to a host, and waiting for its device, may take.
        connections: connections by address that were made already, to be used first. They are owned, and closed
            when they are not needed.

    Raises ValueError for the form of an address, USBError when nobody answers. A host that has no device yet is no
    error. Threads: any.
    """
    guests = (guest,) if isinstance(guest, Guest) else tuple(guest)
    given = dict(connections or {})
    try:
        if not addresses and not guests:
            raise ValueError("an address or a guest is needed")
        at = [BusAt(number, address, patience) for number, address in enumerate(addresses, 1)]
        if guests:
            return _connected(at, [BusOf(number, one) for number, one in enumerate(guests, len(at) + 1)], given)
        with _CHANGING:
            connecting = _CONNECTING.setdefault(addresses, threading.Lock())
        with connecting:
            known = _KNOWN.get(addresses)
            if known is None:
                known = _connected(at, [], given)
                with _CHANGING:
                    _KNOWN[addresses] = known
            return known
    finally:
        for connection in given.values():
            connection.close()


def _connected(at: Sequence[BusAt], of: Sequence[BusOf], given: dict[str, Connection]) -> Backend:
    """A back end whose addresses are connected. Takes what it uses out of *given*."""
    backend = Backend([*at, *of])
    try:
        for bus in at:
            bus.connect(given.pop(bus.address, None))
    except (UsbRedirError, OSError) as error:  # RemoteProtocolError: something else answers there
        backend.close()
        why = getattr(error, "strerror", None) or error
        raise USBError(f"no connection to {bus.address}: {why}", None, getattr(error, "errno", None)) from error
    return backend
