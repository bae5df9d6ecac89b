"""Real devices through pyusb, their transfers libusb's own asynchronous ones.

pyusb finds, opens, describes, claims and configures; :class:`LibusbDevice` reaches libusb below it for transfers:
any number in flight, of every kind, cancelled when wanted, each with its partial data. :func:`wrap` takes a ``usb.core.Device``,
:func:`open_device` a text such as ``1209:0001``, :func:`open_fd` an open file descriptor.

With a pyusb backend other than libusb 1.0 a device works in a reduced way (:mod:`usbredir.backends._synchronous`).

Source: docs/real-devices.md.
"""

from __future__ import annotations

import contextlib
import ctypes
import socket
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import usb.core

from ..device import Transfer
from ..errors import DeviceError, DeviceLostError, DeviceNotFoundError
from ..proto import Status, TransferType
from . import _libusb
from ._base import BaseDevice, logger
from ._context import COMPLETION_ADDRESS, Context, register_exit_handler
from ._finding import DeviceInfo, DeviceSpec, find_all, list_devices, new_backend, parse_spec
from ._native import NativeTransfer, Pool
from ._synchronous import SynchronousDevice

__all__ = ["DeviceInfo", "DeviceSpec", "LibusbDevice", "SynchronousDevice", "list_devices", "open_device", "parse_spec", "wrap"]

POLLIN = 1
"""poll(2)'s number; not every platform's select module has it."""
CLOSE_LIMIT = 5.0
"""Seconds to wait for cancelled transfers in close; then the handle is leaked on purpose."""
DRAIN_STEP = 0.05
"""Seconds of one wait meanwhile."""
MAX_CONTROL = 0xFFFF
"""Longest data stage of a control transfer, in bytes."""


class LibusbDevice(BaseDevice):
    """A device whose transfers libusb runs asynchronously.

    Args:
        device: pyusb's object, of its libusb1 backend.
        event_thread: let a thread of the context wait for libusb (Windows has no descriptors to poll). Completions
            still run in handle_events only; ``pollfds`` is then a socket that tells when there are some.

    Raises DeviceClaimError (forbidden), DeviceLostError or DeviceError. Threads: as :class:`~usbredir.device.UsbDevice`.
    """

    def __init__(self, device: usb.core.Device, *, event_thread: bool = False) -> None:
        self._context = Context.of(device.backend)
        register_exit_handler()
        self._library = self._context.library
        self._pool = Pool(self._library)
        self._lock = threading.Lock()  # a transfer that is cancelled must not be reused meanwhile
        self._flying: dict[Transfer, NativeTransfer] = {}
        self._done: deque[NativeTransfer] = deque()  # completed, callback not yet run
        self._turn = threading.RLock()  # held by the thread that runs completions
        self._pumper = 0  # the thread that waits in libusb for this device
        self._landed_flag = ctypes.c_int(0)
        self._condition = threading.Condition()
        self._signalled = False
        self._wake_sockets: tuple[socket.socket, socket.socket] | None = None
        super().__init__(device)
        self._handle_address: int = self._handle.handle.value
        self._event_thread = event_thread or not self._context.has_pollfds
        self._context.devices.add(self)
        if self._event_thread:
            self._context.start_thread()

    def __repr__(self) -> str:
        d = self.device
        return f"<LibusbDevice {d.idVendor:04x}:{d.idProduct:04x} at {d.bus}-{d.address}>"

    def _opening(self) -> contextlib.AbstractContextManager[None]:
        return self._context.opening(self)

    def is_libusb_device(self, address: int) -> bool:
        """Whether libusb's device object at *address* is this one."""
        return bool(self.device._ctx.dev.devid.value == address)

    def _displace_drivers(self, on: bool) -> None:
        # Detaching and claiming is one step for the kernel then; where it is not supported there is nothing to detach.
        self._library.libusb_set_auto_detach_kernel_driver(self._handle_address, int(on))

    def _detach(self, number: int) -> None:
        """libusb does, with the claim."""

    # ------------------------------------------------------------ bulk streams

    def alloc_streams(self, endpoints: Sequence[int], count: int) -> tuple[int, int]:
        """Allocate bulk streams on endpoint addresses. Returns (status, streams granted)."""
        table = (ctypes.c_ubyte * len(endpoints))(*endpoints)
        code = self._library.libusb_alloc_streams(self._handle_address, count, table, len(endpoints))
        return (Status.SUCCESS, code) if code >= 0 else (self._status(code), 0)

    def free_streams(self, endpoints: Sequence[int]) -> int:
        """Free the bulk streams of endpoint addresses. Returns a status."""
        table = (ctypes.c_ubyte * len(endpoints))(*endpoints)
        return self._status(self._library.libusb_free_streams(self._handle_address, table, len(endpoints)))

    def _status(self, code: int) -> int:
        if code >= 0:
            return Status.SUCCESS
        if code == _libusb.ERROR_NO_DEVICE:
            self._lost = True
            raise DeviceLostError("the device was unplugged")
        return _libusb.error_status(code)

    # ------------------------------------------------------------ transfers

    def submit(self, transfer: Transfer) -> int:
        """Start *transfer*. SUCCESS: it will complete, in handle_events. Any other status: it was not started."""
        if self._closed or self._lost:
            transfer.device_lost = True
            return Status.IOERROR
        if not _is_sound(transfer):
            return Status.INVAL
        native = self._pool.take(transfer)
        native.fill(transfer, self._handle_address, COMPLETION_ADDRESS)
        native.device = self
        native.transfer = transfer
        self._flying[transfer] = native
        code = self._context.submit(native)
        if not code:
            return Status.SUCCESS
        del self._flying[transfer]
        self._pool.give(native)
        if code == _libusb.ERROR_NO_DEVICE:
            self._lost = transfer.device_lost = True
        return _libusb.error_status(code)

    def cancel(self, transfer: Transfer) -> None:
        """Ask for an early end; the transfer still completes. Harmless when it already has."""
        with self._lock:
            native = self._flying.get(transfer)
            if native is not None:
                self._library.libusb_cancel_transfer(native.address)

    def _landed(self, native: NativeTransfer) -> None:
        """libusb is done with a transfer. In its callback, in any thread: completions run later."""
        self._done.append(native)
        if self._pumper != threading.get_ident():
            self._signal()

    def _mark_lost(self) -> None:
        """The system said that the device is gone. In any thread."""
        if not self._closed:
            self._lost = True
            self._signal()

    # ------------------------------------------------------------ events

    def handle_events(self, timeout: float | None = 0.0) -> None:
        """Run completions that are due; wait at most *timeout* seconds for one (None: for ever).

        When another thread is doing so, that one does the work and this call only waits.
        """
        if not self._turn.acquire(timeout=-1 if timeout is None else timeout):
            return
        try:
            self._wait(0.0 if self._done else timeout)
            # What completions submit is for the next call: a busy device must not keep its caller for ever.
            for _ in range(len(self._done)):
                self._complete(self._done.popleft())
        finally:
            if self._done:  # a completion raised, or more came: pollers have to hear of it
                self._signal()
            self._turn.release()

    def _wait(self, timeout: float | None) -> None:
        if self._signalled:
            self._clear_signal()
            timeout = 0.0
        if self._context.threaded:
            if timeout != 0:
                with self._condition:
                    self._condition.wait_for(lambda: self._signalled, timeout)
                self._clear_signal()
            return
        self._pumper = threading.get_ident()
        try:
            self._context.handle_events(timeout, self._landed_flag)
        finally:
            self._pumper = 0

    def _complete(self, native: NativeTransfer) -> None:
        transfer = native.transfer
        assert transfer is not None
        native.read(transfer)
        if transfer.device_lost:
            self._lost = True
        with self._lock:
            self._flying.pop(transfer, None)
        self._pool.give(native)
        transfer.callback(transfer)

    def _signal(self) -> None:
        """There is something to do for handle_events. Threads: any."""
        with self._condition:
            self._landed_flag.value = 1
            if self._signalled:
                return
            self._signalled = True
            self._condition.notify_all()
            if self._wake_sockets is not None:
                with contextlib.suppress(OSError):
                    self._wake_sockets[1].send(b"w")

    def _clear_signal(self) -> None:
        with self._condition:
            self._signalled = False
            self._landed_flag.value = 0
            if self._wake_sockets is not None:
                with contextlib.suppress(OSError):
                    self._wake_sockets[0].recv(64)

    def wake(self) -> None:
        """Make a waiting handle_events return."""
        self._signal()
        self._context.interrupt()

    def pollfds(self) -> Sequence[tuple[int, int]]:
        """libusb's descriptors (none with an event thread), and a socket for what other threads bring."""
        with self._condition:
            if self._wake_sockets is None and not self._closed:
                self._wake_sockets = socket.socketpair()
                for end in self._wake_sockets:
                    end.setblocking(False)
                if self._signalled:
                    self._wake_sockets[1].send(b"w")
            own = () if self._wake_sockets is None else ((self._wake_sockets[0].fileno(), POLLIN),)
        return (*own, *self._context.pollfds())

    def next_timeout(self) -> float | None:
        """Seconds until handle_events is due without any descriptor being ready, or None."""
        return 0.0 if self._done else self._context.next_timeout()

    # ------------------------------------------------------------ end

    def close(self) -> None:
        """Cancel what runs, wait for it (5 s at most), and let the device go. Idempotent.

        A device that does not give its transfers back keeps its handle: closing it would free memory in use.
        """
        if self._closed:
            return
        self._closed = True
        drained = self._drain()
        self._context.devices.discard(self)
        if self._event_thread:
            self._context.stop_thread()
        if drained:
            self._pool.close()
            self._let_go()
        else:
            logger.error("%r does not give its transfers back: its handle is left open", self)
        with self._condition:
            sockets, self._wake_sockets = self._wake_sockets, None
        for end in sockets or ():
            end.close()

    def _drain(self) -> bool:
        """Cancel everything and wait until it has completed; False when the time is over."""
        limit = time.monotonic() + CLOSE_LIMIT
        while self._flying and time.monotonic() < limit:
            for transfer in list(self._flying):
                self.cancel(transfer)
            try:
                self.handle_events(DRAIN_STEP)
            except Exception:  # of a completion; the rest has to end as well
                logger.exception("a completion failed while the device was closed")
        return not self._flying


def _is_sound(transfer: Transfer) -> bool:
    """Whether libusb would stay inside the buffers."""
    length = transfer.length
    if length < 0 or (transfer.kind is TransferType.CONTROL and length > MAX_CONTROL):
        return False
    if not transfer.endpoint & 0x80 and len(transfer.data) != length:
        return False
    return transfer.kind is not TransferType.ISO or (
        len(transfer.iso_lengths) > 0 and min(transfer.iso_lengths) >= 0 and sum(transfer.iso_lengths) == length
    )


def wrap(device: usb.core.Device, *, event_thread: bool = False) -> BaseDevice:
    """*device* as a :class:`~usbredir.device.UsbDevice`: asynchronous with libusb 1.0, reduced with other backends.

    *event_thread* as for :class:`LibusbDevice`. Raises DeviceClaimError (forbidden), DeviceLostError or DeviceError.
    """
    if hasattr(device.backend, "lib") and hasattr(device.backend, "ctx"):
        return LibusbDevice(device, event_thread=event_thread)
    return SynchronousDevice(device)


def open_device(spec: str | DeviceSpec, *, event_thread: bool = False) -> LibusbDevice:
    """The device that *spec* names, opened in a libusb context of its own.

    *spec*: VID:PID (hexadecimal), BUS-DEV (decimal), ``port:BUS-PORT.PORT`` or ``serial:TEXT``. Of several, the first
    that can be opened and claimed. Raises ValueError for the form, DeviceNotFoundError, DeviceClaimError (busy,
    forbidden), DeviceError (unconfigured).
    """
    spec = parse_spec(spec) if isinstance(spec, str) else spec
    return open_first(find_all(spec, new_backend()), event_thread=event_thread)


def open_first(candidates: Sequence[usb.core.Device], *, event_thread: bool = False) -> LibusbDevice:
    """The first of *candidates* that can be opened and claimed. Raises the DeviceError of the first when none can."""
    error: DeviceError | None = None
    for candidate in candidates:
        try:
            return _open_candidate(candidate, event_thread=event_thread, probe=len(candidates) > 1)
        except DeviceError as problem:
            error = error or problem
    raise error or DeviceNotFoundError("no such device")


def _open_candidate(candidate: usb.core.Device, *, event_thread: bool, probe: bool) -> LibusbDevice:
    device = LibusbDevice(candidate, event_thread=event_thread)
    try:
        if device.configuration_descriptor is None:
            raise DeviceError(
                "the device has no active configuration (it was safely removed, perhaps): plug it in again, or select one",
                reason="unconfigured",
            )
        if probe:
            device.claim()
            device.release(give_back=True, reset=False)
    except BaseException:
        device.close()
        raise
    return device
