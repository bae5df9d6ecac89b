"""One libusb context: who runs its events, which descriptors to poll, and which device a completion is for.

pyusb makes the context (an ``IBackend`` of its own); a :class:`Context` goes with each. Completions are never run
inside libusb's callback: they are put into their device's list, and run when libusb has returned. So a completion may
do anything, one that raises loses no other, and devices that share a context may live in different threads.

Two ways to run events: whoever calls :meth:`Context.handle_events` (with :meth:`Context.pollfds` one thread can poll a socket
and libusb together), or a thread of the context's own, for systems whose libusb has no descriptors to poll.

Order at exit: pyusb ends its contexts with an exit handler. Ending one under transfers in flight aborts the
process, so :func:`close_everything` is registered later, and hence runs before.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import DeviceError
from . import _libusb
from ._libusb import TimeVal
from ._native import NativeTransfer

if TYPE_CHECKING:
    from .pyusb import LibusbDevice

__all__ = ["Context", "close_everything"]

LONG = 3600.0
"""Seconds that one wait lasts at most."""
NOW = TimeVal(0, 0)

_in_flight: dict[int, NativeTransfer] = {}
"""Submitted transfers by address: keeps structure, buffer and owner alive until libusb is done with them."""


def _on_completion(address: int) -> None:
    native = _in_flight.pop(address, None)
    if native is not None and native.device is not None:
        native.device._landed(native)


# One for the process, never freed: libusb may call it as long as there are transfers.
_completion = _libusb.TransferCallback(_on_completion)
COMPLETION_ADDRESS: int = ctypes.cast(_completion, ctypes.c_void_p).value or 0

_contexts: weakref.WeakKeyDictionary[Any, Context] = weakref.WeakKeyDictionary()
_contexts_lock = threading.Lock()


class Context:
    """The context of a pyusb backend object. Get it with :meth:`of`. Threads: any."""

    def __init__(self, backend: Any) -> None:
        self.library = _libusb.load(backend.lib._name)
        self._address: int = backend.ctx.value
        self._lock = threading.RLock()
        self.devices: weakref.WeakSet[LibusbDevice] = weakref.WeakSet()
        self.arrivals = 0
        """Devices that were plugged in since :meth:`watch`."""
        self._fds: dict[int, int] = {}
        self._owners: dict[int, weakref.ref[LibusbDevice]] = {}
        self._opening: LibusbDevice | None = None
        self._thread: threading.Thread | None = None
        self._thread_users = 0
        self._watch: int | None = None
        self._timeouts_have_descriptor = bool(self.library.libusb_pollfds_handle_timeouts(self._address))
        # Kept here: libusb holds their addresses.
        itself = weakref.ref(self)
        self._added = _libusb.PollFdAdded(lambda fd, events, user: _with(itself, Context._fd_added, fd, events))
        self._removed = _libusb.PollFdRemoved(lambda fd, user: _with(itself, Context._fd_removed, fd))
        self._plugged = _libusb.HotplugCallback(
            lambda context, device, event, user: _with(itself, Context._hotplug, device, event)
        )
        self._read_pollfds()
        self.library.libusb_set_pollfd_notifiers(self._address, self._added, self._removed, None)
        # Runs when the backend goes, or before pyusb's own finalizer at exit; the callbacks must not outlive us.
        self._finalizer = weakref.finalize(backend, _forget_notifiers, self.library, self._address, self._added)

    @classmethod
    def of(cls, backend: Any) -> Context:
        """The context of a pyusb libusb1 backend."""
        with _contexts_lock:
            context = _contexts.get(backend)
            if context is None:
                context = _contexts[backend] = cls(backend)
            return context

    # ------------------------------------------------------------ descriptors

    def _read_pollfds(self) -> None:
        table = self.library.libusb_get_pollfds(self._address)
        if not table:  # Windows
            return
        index = 0
        while table[index]:
            self._fds[table[index].contents.fd] = table[index].contents.events
            index += 1
        self.library.libusb_free_pollfds(table)

    def _fd_added(self, fd: int, events: int) -> None:
        self._fds[fd] = events
        if self._opening is not None:
            self._owners[fd] = weakref.ref(self._opening)

    def _fd_removed(self, fd: int) -> None:
        """A device's descriptor goes when it is closed, and when libusb finds the device gone."""
        self._fds.pop(fd, None)
        owner = self._owners.pop(fd, None)
        device = owner() if owner is not None else None
        if device is not None:
            device._mark_lost()

    @contextlib.contextmanager
    def opening(self, device: LibusbDevice) -> Iterator[None]:
        """What libusb opens meanwhile belongs to *device*."""
        with self._lock:
            self._opening = device
            try:
                yield
            finally:
                self._opening = None

    def pollfds(self) -> Sequence[tuple[int, int]]:
        """(descriptor, events) pairs; none where libusb has no descriptors, or a thread serves them."""
        return () if self._thread is not None else tuple(self._fds.items())

    @property
    def has_pollfds(self) -> bool:
        """Whether libusb can be polled on this system."""
        return bool(self._fds)

    def next_timeout(self) -> float | None:
        """Seconds until libusb wants to run without a descriptor being ready; None: never."""
        if self._timeouts_have_descriptor or self._thread is not None:
            return None
        wait = TimeVal()
        if self.library.libusb_get_next_timeout(self._address, ctypes.byref(wait)) != 1:
            return None
        return float(wait.seconds + wait.microseconds / 1e6)

    # ------------------------------------------------------------ events

    def handle_events(self, timeout: float | None, landed: ctypes.c_int) -> None:
        """Let libusb work; it returns early once *landed* is set, after an event, or :meth:`interrupt`."""
        wait = NOW
        if timeout != 0:
            seconds = LONG if timeout is None else min(max(timeout, 0.0), LONG)
            wait = TimeVal(int(seconds), int(seconds % 1 * 1e6))
        code = self.library.libusb_handle_events_timeout_completed(
            self._address, ctypes.byref(wait), ctypes.byref(landed)
        )
        if code < 0 and code != _libusb.ERROR_INTERRUPTED:
            raise DeviceError(f"libusb cannot handle events: {self.describe(code)}")

    def poll(self) -> None:
        """Let libusb work without waiting, for a context without open devices."""
        self.handle_events(0, ctypes.c_int(0))

    def interrupt(self) -> None:
        """Make a waiting :meth:`handle_events` return."""
        self.library.libusb_interrupt_event_handler(self._address)

    def describe(self, code: int) -> str:
        """libusb's words for an error."""
        return bytes(self.library.libusb_strerror(code)).decode("utf-8", "replace")

    @property
    def threaded(self) -> bool:
        """Whether the context's own thread handles events."""
        return self._thread is not None

    def start_thread(self) -> None:
        """Handle events in a thread of our own, until as many calls of :meth:`stop_thread` have come."""
        with self._lock:
            self._thread_users += 1
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="usbredir-libusb", daemon=True)
                self._thread.start()

    def stop_thread(self) -> None:
        """Undo one :meth:`start_thread`."""
        with self._lock:
            self._thread_users -= 1
            if self._thread_users or self._thread is None:
                return
            thread, self._thread = self._thread, None
        self.interrupt()
        thread.join()

    def _run(self) -> None:
        landed = ctypes.c_int(0)
        while self._thread is threading.current_thread():
            self.handle_events(None, landed)

    # ------------------------------------------------------------ hotplug

    def watch(self) -> bool:
        """Count arrivals, and notice departures of idle devices. False: this libusb cannot."""
        with self._lock:
            if self._watch is None and self.library.libusb_has_capability(_libusb.CAP_HAS_HOTPLUG):
                handle = ctypes.c_int()
                events = _libusb.HOTPLUG_ARRIVED | _libusb.HOTPLUG_LEFT
                anything = _libusb.MATCH_ANY
                code = self.library.libusb_hotplug_register_callback(
                    self._address,
                    events,
                    0,
                    anything,
                    anything,
                    anything,
                    self._plugged,
                    None,
                    ctypes.byref(handle),
                )
                if code == 0:
                    self._watch = handle.value
            return self._watch is not None

    def _hotplug(self, device: int, event: int) -> int:
        if event == _libusb.HOTPLUG_ARRIVED:
            self.arrivals += 1
        else:
            for ours in list(self.devices):
                if ours.is_libusb_device(device):
                    ours._mark_lost()
        return 0  # keep the registration

    # ------------------------------------------------------------ transfers

    def submit(self, native: NativeTransfer) -> int:
        """Start a transfer that was filled; libusb's error code."""
        address = native.address
        _in_flight[address] = native
        code: int = self.library.libusb_submit_transfer(address)
        if code:
            del _in_flight[address]
        return code


def _with(reference: weakref.ref[Context], method: Callable[..., Any], *arguments: int) -> int:
    context = reference()
    if context is None:
        return 0
    result: int | None = method(context, *arguments)
    return result or 0


def _forget_notifiers(library: ctypes.CDLL, address: int, keep: object) -> None:
    """The backend ends: libusb must not call objects that go with it."""
    nothing = ctypes.cast(None, _libusb.PollFdAdded), ctypes.cast(None, _libusb.PollFdRemoved)
    library.libusb_set_pollfd_notifiers(address, *nothing, None)


def close_everything() -> None:
    """Cancel and end what is open, in every context. Runs at exit, before pyusb ends the contexts."""
    for context in list(_contexts.values()):
        for device in list(context.devices):
            device.close()


def register_exit_handler() -> None:
    """To be called after pyusb made a backend: exit handlers run in the opposite order."""
    atexit.unregister(close_everything)
    atexit.register(close_everything)
