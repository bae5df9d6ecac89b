"""One libusb context: who runs its events, which descriptors to poll, and which device a completion is for.

pyusb makes the context (an ``IBackend`` of its own); a :class:`Context` goes with each. libusb's callback only puts
the address of what has completed into a list, and is no Python code: an exception of a signal handler cannot get lost
in it. When libusb has returned, :func:`deliver` hands the transfers to their devices. So a completion may do anything,
one that raises loses no other, and devices that share a context may live in different threads.

Two ways to run events: whoever calls :meth:`Context.handle_events` (with :meth:`Context.pollfds` one thread can poll a
socket and libusb together), or a thread of the context's own, for systems whose libusb has no descriptors to poll.

libusb's callbacks may run with libusb's locks held: they take no lock that is held around a call of libusb.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import math
import threading
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from ..errors import DeviceError
from . import _libusb
from ._libusb import TimeVal
from ._native import NativeTransfer, Owner

__all__ = ["COMPLETION_ADDRESS", "Context", "deliver", "is_in_flight", "submit"]

logger = logging.getLogger("usbredir.backends.pyusb")

LONG = 3600.0
"""Seconds that one wait lasts at most."""
NOW = TimeVal(0, 0)

_in_flight: dict[int, NativeTransfer] = {}
"""Submitted transfers by address: keeps structure, buffer and owner alive until libusb is done with them."""
_landed: deque[int] = deque()
"""Addresses of transfers that libusb is done with."""
_delivering = threading.RLock()

# Callbacks of the whole process, never freed: libusb may call them as long as there is a context. _landed.append is
# called without running any Python code.
_completion = _libusb.TransferCallback(_landed.append)
COMPLETION_ADDRESS: int = ctypes.cast(_completion, ctypes.c_void_p).value or 0


def deliver() -> None:
    """Hand transfers that have completed to their devices. Threads: any."""
    if not _landed:
        return
    me = threading.get_ident()
    with _delivering:
        while _landed:
            # Whatever an exception of a signal handler tears apart here: what libusb is done with is not in flight.
            address = _landed[0]
            native = _in_flight.pop(address, None)
            if native is not None and (owner := native.owner) is not None:
                owner.done.append(native)
                if owner.pumper != me:
                    owner.signal()
            if _landed and _landed[0] == address:  # the collector may have closed a device meanwhile
                _landed.popleft()


def submit(library: ctypes.CDLL, native: NativeTransfer) -> int:
    """Start a transfer that was filled; libusb's error code."""
    address = native.address
    _in_flight[address] = native
    code: int = library.libusb_submit_transfer(address)
    if code:
        del _in_flight[address]
    return code


def is_in_flight(native: NativeTransfer) -> bool:
    """Whether libusb may still use the memory of *native*."""
    return native.address in _in_flight


_contexts: weakref.WeakKeyDictionary[Any, Context] = weakref.WeakKeyDictionary()
_contexts_lock = threading.Lock()
_by_address: weakref.WeakValueDictionary[int, Context] = weakref.WeakValueDictionary()
"""For callbacks: contexts by libusb's address of them, which is their user data."""


class Context:
    """The context of a pyusb backend object. Get it with :meth:`of`. Threads: any.

    Attributes:
        arrivals: devices that were plugged in since :meth:`watch`.
    """

    def __init__(self, backend: Any) -> None:
        self.library = _libusb.load(backend.lib._name)
        self._address: int = backend.ctx.value
        self._lock = threading.RLock()
        self.arrivals = 0
        self._backend: Any = None  # while it has devices: it must not be collected before them
        self._devices: dict[int, weakref.ref[Owner]] = {}
        self._fds: dict[int, int] = {}
        self._pollfds: tuple[tuple[int, int], ...] = ()  # the same, made when they change
        self._owners: dict[int, weakref.ref[Owner]] = {}
        self._opening: tuple[int, Owner] | None = None
        self._thread: threading.Thread | None = None
        self._thread_users = 0
        self._stop = ctypes.c_int(0)
        self._watch: int | None = None
        self._timeouts_have_descriptor = bool(self.library.libusb_pollfds_handle_timeouts(self._address))
        _by_address[self._address] = self
        self._read_pollfds()
        self.library.libusb_set_pollfd_notifiers(self._address, _fd_added, _fd_removed, self._address)

    @classmethod
    def of(cls, backend: Any) -> Context:
        """The context of a pyusb libusb1 backend. Raises DeviceError when its libusb is too old."""
        with _contexts_lock:
            context = _contexts.get(backend)
            if context is None:
                context = _contexts[backend] = cls(backend)
            return context

    # ------------------------------------------------------------ devices

    def attach(self, device: Owner, backend: Any) -> None:
        """*device* is in use, and with it *backend*, whose context this is."""
        with self._lock:
            self._devices[id(device)] = weakref.ref(device)
            self._backend = backend

    def detach(self, device: Owner) -> None:
        """*device* is closed."""
        with self._lock:
            self._devices.pop(id(device), None)
            if not self._devices:
                self._backend = None  # not the last reference: the device has one

    def devices(self) -> list[Owner]:
        """What is in use."""
        found = [reference() for reference in list(self._devices.values())]
        return [device for device in found if device is not None]

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
        self._pollfds = tuple(self._fds.items())

    def fd_added(self, fd: int, events: int) -> None:
        """libusb wants *fd* to be polled. In its callback."""
        self._fds[fd] = events
        self._pollfds = tuple(self._fds.items())
        opening = self._opening
        if opening is not None and opening[0] == threading.get_ident():
            self.own(fd, opening[1])

    def fd_removed(self, fd: int) -> None:
        """A device's descriptor goes when it is closed, and when libusb finds the device gone. In libusb's callback."""
        self._fds.pop(fd, None)
        self._pollfds = tuple(self._fds.items())
        owner = self._owners.pop(fd, None)
        device = owner() if owner is not None else None
        if device is not None:
            device.mark_lost()

    def own(self, fd: int, device: Owner) -> None:
        """*fd* is the descriptor of *device*."""
        self._owners[fd] = weakref.ref(device)

    @contextlib.contextmanager
    def opening(self, device: Owner) -> Iterator[None]:
        """What this thread opens meanwhile belongs to *device*."""
        with self._lock:
            self._opening = threading.get_ident(), device
            try:
                yield
            finally:
                self._opening = None

    def pollfds(self) -> Sequence[tuple[int, int]]:
        """(descriptor, events) pairs; none where libusb has no descriptors, or a thread serves them."""
        return () if self._thread is not None else self._pollfds

    @property
    def has_pollfds(self) -> bool:
        """Whether libusb can be polled on this system."""
        return bool(self._fds)

    def next_timeout(self) -> float | None:
        """Seconds until libusb wants to run without a descriptor being ready; None: never."""
        if _landed:  # completed while somebody else, such as a synchronous call of pyusb, ran events
            return 0.0
        if self._timeouts_have_descriptor or self._thread is not None:
            return None
        wait = TimeVal()
        if self.library.libusb_get_next_timeout(self._address, ctypes.byref(wait)) != 1:
            return None
        return float(wait.seconds + wait.microseconds / 1e6)

    # ------------------------------------------------------------ events

    def handle_events(self, timeout: float | None, signalled: ctypes.c_int) -> None:
        """Let libusb work; it returns early when *signalled* is set, after an event, or :meth:`interrupt`.

        *signalled* is set before :meth:`interrupt` is called: another thread may swallow the interruption, but not
        the number.
        """
        wait = NOW
        if timeout != 0 and not _landed:
            seconds = LONG if timeout is None else min(max(timeout, 0.0), LONG)
            wait = TimeVal(*divmod(math.ceil(seconds * 1e6), 1_000_000))
        try:
            code = self.library.libusb_handle_events_timeout_completed(self._address, wait, signalled)
        finally:
            if _landed:
                deliver()
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
                self._stop = ctypes.c_int(0)
                self._thread = threading.Thread(
                    target=self._run, args=(self._stop,), name="usbredir-libusb", daemon=True
                )
                self._thread.start()

    def stop_thread(self) -> None:
        """Undo one :meth:`start_thread`."""
        with self._lock:
            self._thread_users -= 1
            if self._thread_users or self._thread is None:
                return
            thread, self._thread = self._thread, None
            self._stop.value = 1
        self.interrupt()
        if thread is not threading.current_thread():  # where the collector may have found a device
            thread.join()
        for device in self.devices():  # whoever waited for the thread handles events itself from now on
            device.signal()

    def _run(self, stop: ctypes.c_int) -> None:
        try:
            while not stop.value:
                self.handle_events(None, stop)
        except DeviceError as error:
            logger.error("%s", error)
            for device in self.devices():
                device.mark_lost()

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
                    _plugged,
                    self._address,
                    ctypes.byref(handle),
                )
                if code == 0:
                    self._watch = handle.value
            return self._watch is not None

    def plugged(self, device: int, event: int) -> None:
        """A device came or went. In libusb's callback."""
        if event == _libusb.HOTPLUG_ARRIVED:
            self.arrivals += 1
            return
        for ours in self.devices():
            if ours.is_libusb_device(device):
                ours.mark_lost()


def _on_fd_added(fd: int, events: int, address: int) -> None:
    context = _by_address.get(address)
    if context is not None:
        context.fd_added(fd, events)


def _on_fd_removed(fd: int, address: int) -> None:
    context = _by_address.get(address)
    if context is not None:
        context.fd_removed(fd)


def _on_plugged(_libusb_context: int, device: int, event: int, address: int) -> int:
    context = _by_address.get(address)
    if context is not None:
        context.plugged(device, event)
    return 0  # keep the registration


_fd_added = _libusb.PollFdAdded(_on_fd_added)
_fd_removed = _libusb.PollFdRemoved(_on_fd_removed)
_plugged = _libusb.HotplugCallback(_on_plugged)
