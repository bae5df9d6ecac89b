"""Devices of other pyusb backends than libusb 1.0, which have synchronous calls only: a reduced mode.

A thread per endpoint runs its transfers one after the other, in calls with short timeouts, so that a cancelled one
ends soon. What that costs is listed in docs/real-devices.md, "Reduced mode".
"""

from __future__ import annotations

import array
import errno
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import usb.core

from ..device import Transfer
from ..proto import Status, TransferType
from ._base import BaseDevice, is_lost, logger
from ._completions import Completions
from ._native import is_sound

__all__ = ["SynchronousDevice"]

SLICE_IN = 0.02
"""Seconds that one call for an IN transfer lasts at most: a cancelled one is as late."""
SLICE_OUT = 2.0
"""The same for OUT: a backend that does not tell how much had gone out at a timeout would send that twice."""
CONTROL_TIMEOUT = 5.0
"""Seconds for control transfers without a timeout; they cannot be cancelled, nor tried again."""
MAX_SUSPICIOUS = 3
"""Errors in a row, of those that a device that is gone may give, after which it counts as gone."""
SUSPICIOUS = (errno.EIO, errno.EINVAL, getattr(errno, "ESHUTDOWN", 108))
CLOSE_LIMIT = 10.0
"""Seconds that close waits for calls that are running; then the handle is leaked on purpose."""
DRAIN_STEP = 0.05

STATUS = {errno.EPIPE: Status.STALL, getattr(errno, "EOVERFLOW", 75): Status.BABBLE, errno.EINVAL: Status.INVAL}
"""Status of transfers that failed; other errors are *ioerror*."""


class SynchronousDevice(BaseDevice):
    """A device whose transfers are synchronous calls, one at a time per endpoint.

    Args:
        device: pyusb's object, of any backend.

    Raises DeviceClaimError (forbidden, in use), DeviceLostError or DeviceError. Threads: as
    :class:`~usbredir.device.UsbDevice`; close from any.
    """

    def __init__(self, device: usb.core.Device) -> None:
        self._lock = threading.Lock()
        self._workers: dict[int, Worker] = {}
        self._completions: Completions[Transfer] = Completions()
        self._running: set[Transfer] = set()  # submitted, callback not yet run
        self._suspicious = 0
        self._interfaces: dict[int, int] = {}
        super().__init__(device)
        logger.warning(
            "%r works in a reduced mode, because the pyusb backend %s has synchronous calls only: one transfer at a "
            "time per endpoint, no isochronous transfers, no bulk streams, late cancelling",
            self,
            type(device.backend).__module__,
        )

    def claim(self) -> None:
        """As for every device; see :class:`BaseDevice`."""
        super().claim()
        configuration = self._parsed_configuration()
        interfaces = configuration.interfaces if configuration is not None else ()
        self._interfaces = {e.address: i.number for i in interfaces for e in i.endpoints}

    # ------------------------------------------------------------ bulk streams

    def alloc_streams(self, endpoints: Sequence[int], count: int) -> tuple[int, int]:
        """Refused."""
        return Status.IOERROR, 0

    def free_streams(self, endpoints: Sequence[int]) -> int:
        """Refused."""
        return Status.IOERROR

    # ------------------------------------------------------------ transfers

    def submit(self, transfer: Transfer) -> int:
        """Queue *transfer*. SUCCESS: it will complete, in handle_events. Any other status: it was not started."""
        if not is_sound(transfer):
            return Status.INVAL
        if transfer.kind is TransferType.ISO or transfer.stream_id:
            return Status.IOERROR
        key = 0 if transfer.kind is TransferType.CONTROL else transfer.endpoint
        with self._lock:
            if self._closed or self._lost:
                transfer.device_lost = True
                return Status.IOERROR
            if transfer in self._running:
                raise ValueError(f"{transfer!r} has not completed yet")
            worker = self._workers.get(key)
            if worker is None:
                worker = self._workers[key] = Worker(self._run, self._finish, f"usbredir-endpoint-{key:02x}")
            self._running.add(transfer)
            if transfer.endpoint & 0x80:
                transfer.data = b""
            transfer.actual_length = 0
            transfer.device_lost = False
            worker.put(transfer)
        return Status.SUCCESS

    def cancel(self, transfer: Transfer) -> None:
        """Ask for an early end; the transfer still completes. Harmless when it already has."""
        key = 0 if transfer.kind is TransferType.CONTROL else transfer.endpoint
        with self._lock:
            worker = self._workers.get(key) if transfer in self._running else None
        if worker is not None:
            worker.cancel(transfer)

    def _finish(self, transfer: Transfer, status: int) -> None:
        """A worker is done with *transfer*."""
        transfer.status = status
        self._completions.done.append(transfer)
        self._completions.signal()

    def _complete(self, transfer: Transfer) -> None:
        with self._lock:
            self._running.discard(transfer)
        transfer.callback(transfer)

    # ------------------------------------------------------------ in the workers

    def _run(self, transfer: Transfer, cancelled: Callable[[], bool]) -> int:
        """Do *transfer*; its status."""
        try:
            if self._lost:
                raise usb.core.USBError("the device was unplugged", None, errno.ENODEV)
            if transfer.kind is TransferType.CONTROL:
                self._control(transfer)
                status: int = Status.SUCCESS
            else:
                status = self._sliced(transfer, cancelled)
        except (usb.core.USBError, NotImplementedError) as error:
            status = self._failed(transfer, error)
        except Exception:  # a backend's mistake must not end the thread
            logger.exception("%r failed", transfer)
            status = Status.IOERROR
        else:
            self._suspicious = 0
        return status

    def _failed(self, transfer: Transfer, error: BaseException) -> int:
        number = getattr(error, "errno", None)
        if number in SUSPICIOUS:
            self._suspicious += 1
        elif not isinstance(error, NotImplementedError):
            self._suspicious = 0
        if is_lost(error) or self._suspicious >= MAX_SUSPICIOUS:
            self._lost = True
            transfer.device_lost = True
            return Status.IOERROR
        return Status.TIMEOUT if _is_timeout(error) else STATUS.get(number or 0, Status.IOERROR)

    def _control(self, transfer: Transfer) -> None:
        outward = not transfer.endpoint & 0x80
        buffer = array.array("B", bytes(transfer.data) if outward else bytes(transfer.length))
        timeout = _milliseconds(transfer.timeout or CONTROL_TIMEOUT)
        count = self._backend.ctrl_transfer(self._handle, *transfer.setup, buffer, timeout)
        self._moved(transfer, buffer, count)

    def _moved(self, transfer: Transfer, buffer: array.array[int], count: Any) -> None:
        """*count* bytes, says the backend, were moved."""
        transfer.actual_length = min(max(int(count), 0), transfer.length)
        if transfer.endpoint & 0x80:
            transfer.data = buffer[: transfer.actual_length].tobytes()

    def _sliced(self, transfer: Transfer, cancelled: Callable[[], bool]) -> int:
        """A bulk or interrupt transfer, in calls with short timeouts until one has moved something."""
        outward = not transfer.endpoint & 0x80
        call = self._call(transfer.kind, outward)
        interface = self._interfaces.get(transfer.endpoint, 0)
        buffer = array.array("B", bytes(transfer.data) if outward else bytes(transfer.length))
        deadline = time.monotonic() + transfer.timeout if transfer.timeout else math.inf
        done = 0
        while not cancelled():
            wait = min(SLICE_OUT if outward else SLICE_IN, max(deadline - time.monotonic(), 0.0))
            try:
                part = buffer[done:] if done else buffer
                count = int(call(self._handle, transfer.endpoint, interface, part, _milliseconds(wait)))
            except usb.core.USBError as error:
                if not _is_timeout(error):
                    raise
            else:
                if not outward:
                    if cancelled():
                        break  # the guest has its answer: this comes too late
                    self._moved(transfer, buffer, count)
                    return Status.SUCCESS
                done += min(max(count, 0), len(part))
                transfer.actual_length = done
                if done == transfer.length:
                    return Status.SUCCESS
            self._suspicious = 0
            if time.monotonic() >= deadline:
                return Status.TIMEOUT
        return Status.CANCELLED

    def _call(self, kind: TransferType, outward: bool) -> Any:
        names = {
            (TransferType.BULK, True): "bulk_write",
            (TransferType.BULK, False): "bulk_read",
            (TransferType.INTERRUPT, True): "intr_write",
            (TransferType.INTERRUPT, False): "intr_read",
        }
        return getattr(self._backend, names[kind, outward])

    # ------------------------------------------------------------ events

    def handle_events(self, timeout: float | None = 0.0) -> None:
        """Run completions that are due; wait at most *timeout* seconds for one (None: for ever).

        When another thread is doing so, that one does the work and this call only waits. Raises what a completion
        raised; the others run at the next call.
        """
        self._completions.handle(timeout, self._completions.wait, self._complete)

    def wake(self) -> None:
        """Make a waiting handle_events return."""
        self._completions.signal()

    def pollfds(self) -> Sequence[tuple[int, int]]:
        """A socket that is readable when there are completions."""
        return self._completions.pollfds()

    def next_timeout(self) -> float | None:
        """0 when handle_events is due, otherwise None: the socket tells."""
        return 0.0 if self._completions.done else None

    # ------------------------------------------------------------ end

    def close(self) -> None:
        """Cancel what runs, wait for it (10 s at most), and let the device go. Idempotent.

        A call that does not end keeps the handle: closing it would take it from under the call.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
            workers, running = list(self._workers.values()), list(self._running)
        limit = time.monotonic() + CLOSE_LIMIT
        for transfer in running:
            self.cancel(transfer)
        for worker in workers:
            worker.end()
        while any(worker.is_running() for worker in workers) or self._completions.done:
            if time.monotonic() > limit:
                break
            try:
                self.handle_events(DRAIN_STEP)
            except Exception:  # of a completion; the rest has to end as well
                logger.exception("a completion failed while the device was closed")
        if any(worker.is_running() for worker in workers):
            logger.error("%r does not end a transfer: its handle is left open", self)
            self.abandon()
        else:
            self._let_go()
        self._completions.close()


class Worker:
    """A thread that runs the transfers of an endpoint, one after the other. Threads: any."""

    def __init__(
        self,
        run: Callable[[Transfer, Callable[[], bool]], int],
        finish: Callable[[Transfer, int], None],
        name: str,
    ) -> None:
        self._run = run
        self._finish = finish
        self._condition = threading.Condition()
        self._queue: deque[Transfer] = deque()
        self._current: Transfer | None = None
        self._cancelled = False  # the current one
        self._ending = False
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._thread.start()

    def put(self, transfer: Transfer) -> None:
        """Run *transfer* after those before it."""
        with self._condition:
            self._queue.append(transfer)
            self._condition.notify()

    def cancel(self, transfer: Transfer) -> None:
        """End *transfer*: at once when it waits, after its present call when it runs."""
        with self._condition:
            if self._current is transfer:
                self._cancelled = True
                return
            if transfer not in self._queue:
                return
            self._queue.remove(transfer)
        self._finish(transfer, Status.CANCELLED)

    def end(self) -> None:
        """End the thread, when the queue is empty."""
        with self._condition:
            self._ending = True
            self._condition.notify()

    def is_running(self) -> bool:
        """Whether the thread has not ended."""
        return self._thread.is_alive()

    def _main(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._queue or self._ending)
                if not self._queue:
                    return
                transfer = self._current = self._queue.popleft()
                self._cancelled = False
            status = self._run(transfer, lambda: self._cancelled)
            with self._condition:
                self._current = None
            self._finish(transfer, status)


def _milliseconds(seconds: float) -> int:
    """At least 1: 0 waits for ever."""
    return min(max(math.ceil(seconds * 1000), 1), 0x7FFFFFFF)


def _is_timeout(error: BaseException) -> bool:
    return isinstance(error, usb.core.USBTimeoutError) or getattr(error, "errno", None) == errno.ETIMEDOUT
