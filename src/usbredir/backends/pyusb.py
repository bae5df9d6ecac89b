"""Real devices through pyusb, their transfers libusb's own asynchronous ones.

pyusb finds, opens, describes, claims and configures; :class:`LibusbDevice` reaches libusb below it for transfers:
any number in flight, of every kind, cancelled when wanted, each with its partial data. :func:`wrap` takes a
``usb.core.Device``, :func:`open_device` a text such as ``1209:0001``, :func:`open_fd` an open file descriptor.

With a pyusb backend other than libusb 1.0 a device works in a reduced way (:mod:`usbredir.backends._synchronous`).

Source: docs/real-devices.md.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
import time
from collections.abc import Sequence

import usb.core

from ..device import Transfer
from ..errors import DeviceError, DeviceLostError, DeviceNotFoundError
from ..proto import Status
from . import _libusb
from ._backend import FdBackend, load_library
from ._base import BaseDevice, logger
from ._completions import Completions
from ._context import COMPLETION_ADDRESS, Context, deliver, is_in_flight, submit
from ._finding import DeviceInfo, DeviceSpec, find_all, list_devices, new_backend, parse_spec
from ._native import NativeTransfer, Pool, is_sound
from ._synchronous import SynchronousDevice

SUCCESS = Status.SUCCESS

__all__ = [
    "DeviceInfo",
    "DeviceSpec",
    "LibusbDevice",
    "SynchronousDevice",
    "list_devices",
    "open_device",
    "open_fd",
    "open_first",
    "parse_spec",
    "wrap",
]

CLOSE_LIMIT = 5.0
"""Seconds to wait for cancelled transfers in close; then the handle is leaked on purpose."""
DRAIN_STEP = 0.05
"""Seconds of one wait meanwhile."""
LOOK_AGAIN = 1.0
"""Seconds between looks at transfers in flight: a synchronous call of pyusb in another thread may complete them, which
no descriptor tells."""
MAX_IDLE_ROUNDS = 4
"""Such waits for completions that are not libusb's any more."""


class LibusbDevice(BaseDevice):
    """A device whose transfers libusb runs asynchronously.

    Args:
        device: pyusb's object, of its libusb1 backend. One that is open is closed and opened again.
        event_thread: let a thread of the context wait for libusb (Windows has no descriptors to poll). Completions
            still run in handle_events only; ``pollfds`` is then a socket that tells when there are some.

    Raises DeviceClaimError (forbidden, in use), DeviceLostError or DeviceError. Close it: the collector does so with
    a ResourceWarning. Threads: as :class:`~usbredir.device.UsbDevice`; close from any.
    """

    def __init__(self, device: usb.core.Device, *, event_thread: bool = False) -> None:
        self._context = Context.of(device.backend)
        self._library = self._context.library
        self._pool = Pool(self._library)
        # Held around submit, cancel and reuse: a transfer that is cancelled must not be reused meanwhile, and nothing
        # may be submitted once close has begun.
        self._lock = threading.Lock()
        self._flying: dict[Transfer, NativeTransfer] = {}
        self._completions: Completions[NativeTransfer] = Completions()
        self.done = self._completions.done
        self.pumper = 0
        self._event_thread = False
        super().__init__(device)
        self._handle_address: int = self._handle.handle.value
        self._context.attach(self, device.backend)
        if event_thread or not self._context.has_pollfds:
            self._context.start_thread()
            self._event_thread = True

    def _opening(self) -> contextlib.AbstractContextManager[None]:
        return self._context.opening(self)

    def _displace_drivers(self, on: bool) -> None:
        # Detaching and claiming is one step for the kernel then; where it is not supported there is nothing to detach.
        self._library.libusb_set_auto_detach_kernel_driver(self._handle_address, int(on))

    def _detach(self, number: int) -> None:
        """libusb does, with the claim."""

    # ------------------------------------------------------------ bulk streams

    def alloc_streams(self, endpoints: Sequence[int], count: int) -> tuple[int, int]:
        """Allocate bulk streams on endpoint addresses. Returns (status, streams granted)."""
        self._check_open()
        table = (ctypes.c_ubyte * len(endpoints))(*endpoints)
        code = self._library.libusb_alloc_streams(self._handle_address, count, table, len(endpoints))
        return (Status.SUCCESS, code) if code >= 0 else (self._status(code), 0)

    def free_streams(self, endpoints: Sequence[int]) -> int:
        """Free the bulk streams of endpoint addresses. Returns a status."""
        self._check_open()
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
        with self._lock:
            if self._closed or self._lost:
                transfer.device_lost = True
                return Status.IOERROR
            if transfer in self._flying:
                raise ValueError(f"{transfer!r} has not completed yet")
            native = self._pool.take(transfer)
            if native is None or not native.receives(transfer):
                native = self._fill(transfer, native)
                if native is None:
                    return Status.INVAL
            native.owner = self
            native.transfer = transfer
            self._flying[transfer] = native
            code = submit(self._library, native)
            if not code:
                return SUCCESS
            del self._flying[transfer]
            self._pool.give(native)
            if code == _libusb.ERROR_NO_DEVICE:
                self._lost = transfer.device_lost = True
        return _libusb.error_status(code)

    def _fill(self, transfer: Transfer, native: NativeTransfer | None) -> NativeTransfer | None:
        """*native*, or a new one, with *transfer* in it; None when that makes no sense. The lock is held."""
        try:
            if not is_sound(transfer):
                return None
            filled = native = native or self._pool.make(transfer)
            filled.fill(transfer, self._handle_address, COMPLETION_ADDRESS)
            native = None
            return filled
        finally:
            if native is not None:
                self._pool.give(native)

    def cancel(self, transfer: Transfer) -> None:
        """Ask for an early end; the transfer still completes. Harmless when it already has."""
        with self._lock:
            native = self._flying.get(transfer)
            if native is not None and is_in_flight(native):
                self._library.libusb_cancel_transfer(native.address)

    def mark_lost(self) -> None:
        """The system says that the device is gone. Threads: any."""
        if not self._closed:
            self._lost = True
            self.signal()

    def is_libusb_device(self, address: int) -> bool:
        """Whether libusb's device object at *address* is this one. Threads: any."""
        devid = self.device._ctx.dev.devid
        return bool(getattr(devid, "value", devid) == address)

    # ------------------------------------------------------------ events

    def handle_events(self, timeout: float | None = 0.0) -> None:
        """Run completions that are due; wait at most *timeout* seconds for one (None: for ever).

        It may return before that time without having run any. When another thread is doing so, that one does the
        work and this call only waits. Raises what a completion raised; the others run at the next call.
        """
        self._completions.handle(timeout, self._wait, self._complete)

    def _wait(self, timeout: float | None) -> None:
        if self._context.threaded:
            deliver()
            self._completions.wait(timeout)
            return
        # Written before it is asked whether the device is closed; close does it the other way round.
        self.pumper = threading.get_ident()
        try:
            if not self._closed or self._flying:
                self._context.handle_events(timeout, self._completions.signalled)
        finally:
            self.pumper = 0

    def _complete(self, native: NativeTransfer) -> None:
        transfer = native.transfer
        if transfer is None:  # it was completed elsewhere while the device was closed
            return
        self._flying.pop(transfer, None)
        try:
            native.read(transfer)
        finally:
            # Before the callback, which may submit the transfer again: it finds all of it described then.
            if not self._pool.give_small(native):
                with self._lock:
                    self._pool.give(native)
        if transfer.device_lost:
            self._lost = True
        transfer.callback(transfer)

    def signal(self) -> None:
        """There is something to do for handle_events. Threads: any."""
        self._completions.signal()
        if self.pumper:
            self._context.interrupt()

    def wake(self) -> None:
        """Make a waiting handle_events return."""
        self.signal()

    def pollfds(self) -> Sequence[tuple[int, int]]:
        """libusb's descriptors (none with an event thread), and a socket for what other threads bring.

        To be asked again in every round: they change with what is open in the context.
        """
        return () if self._closed else (*self._completions.pollfds(), *self._context.pollfds())

    def next_timeout(self) -> float | None:
        """Seconds until handle_events is due without any descriptor being ready, or None."""
        if self._completions.done:
            return 0.0
        wait = self._context.next_timeout()
        if self._flying and not self._context.threaded:
            return LOOK_AGAIN if wait is None else min(wait, LOOK_AGAIN)
        return wait

    # ------------------------------------------------------------ end

    def close(self) -> None:
        """Cancel what runs, wait for it (5 s at most), and let the device go. Idempotent.

        A device that does not give its transfers back keeps its handle: closing it would free memory in use.
        """
        with self._lock:  # nothing is submitted afterwards
            if self._closed:
                return
            self._closed = True
        limit = time.monotonic() + CLOSE_LIMIT
        drained = self._drain(limit) and self._expel(limit)
        if self._event_thread:
            self._context.stop_thread()
        self._context.detach(self)
        if drained:
            with self._lock:
                self._pool.close()
            self._let_go()
        else:
            logger.error("%r does not give its transfers back: its handle is left open", self)
            self.abandon()
        self._completions.close()

    def _drain(self, limit: float) -> bool:
        """Cancel everything and wait until it has completed; False when libusb still has some after the time."""
        rounds = 0
        while self._flying and time.monotonic() < limit and rounds < MAX_IDLE_ROUNDS:
            for transfer in list(self._flying):
                self.cancel(transfer)
            self._run_completions(DRAIN_STEP)
            # None left in libusb: another thread is completing the last, or was torn out of it by an exception.
            rounds = 0 if self._has_in_flight() else rounds + 1
        if self._has_in_flight():
            return False
        for native in list(self._flying.values()):  # torn out, see above: it completes as well
            self._completions.done.append(native)
            self._run_completions(0)
        return True

    def _run_completions(self, timeout: float) -> None:
        try:
            self.handle_events(timeout)
        except Exception:  # of a completion; the rest has to end as well
            logger.exception("a completion failed while the device was closed")

    def _has_in_flight(self) -> bool:
        with self._lock:
            return any(is_in_flight(native) for native in self._flying.values())

    def _expel(self, limit: float) -> bool:
        """Wait until no other thread is in libusb for this device; False when the time is over."""
        while self.pumper not in (0, threading.get_ident()):
            if time.monotonic() > limit:
                return False
            self.signal()
            self._completions.pause(DRAIN_STEP)
        return True

    def abandon(self) -> None:
        """Forget device and context without touching them, and have pyusb do the same, now and at exit."""
        super().abandon()
        self._backend.ctx = ctypes.c_void_p()


def wrap(device: usb.core.Device, *, event_thread: bool = False) -> LibusbDevice | SynchronousDevice:
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


def open_fd(fd: int, *, event_thread: bool = False) -> LibusbDevice:
    """The device behind *fd*, an open usbfs file descriptor: from Android, a portal or a helper with more rights.

    The descriptor has to be readable and writable, stays the caller's and has to stay open until after close. Nothing
    else is looked at, no /dev and no list of devices. Raises DeviceError.
    """
    backend = FdBackend(load_library(), fd)
    device = LibusbDevice(usb.core.find(backend=backend), event_thread=event_thread)
    Context.of(backend).own(fd, device)
    return device


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
                "the device has no active configuration (it was safely removed, perhaps): "
                "plug it in again, or select one",
                reason="unconfigured",
            )
        if probe:
            device.claim()
            device.release(give_back=True, reset=False)
    except BaseException:
        device.close()
        raise
    return device
