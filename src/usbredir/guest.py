"""The side that uses a device: requests to a host as blocking calls and as futures, from any number of threads.

How data flows: a call queues its request and waits. One of the threads that wait reads for all of them (the *reader*):
it hands every answer to whom it belongs, and the next thread takes over when it has its own. With ``background=True``
a thread of the guest reads all the time, so that futures progress while nobody waits.

Stall, babble, timeout and cancellation are results (:class:`~usbredir.device.TransferResult`), not exceptions.
Source: docs/guest.md.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from types import TracebackType
from typing import Concatenate, ParamSpec, TypeVar

from . import requests
from ._exchange import FATAL, Exchange, ExchangeView, Pending
from .capabilities import ALL
from .device import TransferResult
from .errors import ConnectionClosed, LocalProtocolError
from .filter import FilterRule
from .limits import Limits
from .packets import DeviceConnect
from .parser import VERSION, StreamCallbacks
from .proto import Status
from .requests import Request

__all__ = ["Guest", "GuestCallbacks", "TransferResult"]

ISO_PACKETS_AHEAD = 64
"""Isochronous packets that may wait to be written before ``iso_out`` waits."""
HIGH_BACKLOG = 1024 * 1024
"""Received stream data above which the background thread reads no more while no request waits, in bytes."""
CLOSE_PATIENCE = 10.0
"""Seconds that another thread may need to notice that the guest is closed."""

P = ParamSpec("P")
T = TypeVar("T")


class GuestCallbacks(StreamCallbacks):
    """What an application provides to a :class:`Guest`.

    Threads: those that call the guest; ``read`` and ``wait`` are called by one at a time, ``write`` too.
    """

    logger = "usbredir.guest"

    def wait(self, timeout: float | None, *, writing: bool) -> None:
        """Block until the stream can be read (or, with *writing*, written), at most *timeout* seconds."""
        raise NotImplementedError("override wait() to use blocking calls")

    def wake(self) -> None:
        """Make a ``wait`` of another thread return, now or the next time. Needed for guests of several threads."""


def _blocking(make: Callable[P, Request[T]]) -> Callable[Concatenate[Guest, P], T]:
    """The method that sends a request and waits for its answer."""

    def method(self: Guest, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self.call(make(*args, **kwargs))

    requests.like(make, method)
    return method


class Guest(ExchangeView):
    """Uses the device of one host.

    Args:
        callbacks: the application: stream, log, ``wait`` and ``wake``.
        version: text for hello.
        capabilities: what to announce.
        rules: filter rules to tell the host.
        limits: what the host may make us hold.
        background: start a thread that reads all the time; :meth:`close` ends it.

    Every call may raise ConnectionClosed, RemoteProtocolError, and what the callbacks raise; once the connection has
    ended, all calls that wait and all later ones raise what ended it. Calls that need a device raise DeviceLostError
    when there is none. *timeout* is in seconds, None waits for ever.
    Threads: any number of callers.
    """

    def __init__(
        self,
        callbacks: GuestCallbacks,
        *,
        version: str = VERSION,
        capabilities: Iterable[int] = ALL,
        rules: Sequence[FilterRule] = (),
        limits: Limits = Limits(),  # noqa: B008 - immutable
        background: bool = False,
    ) -> None:
        self._callbacks = callbacks
        self._exchange = Exchange(
            callbacks, self._hold, version=version, capabilities=capabilities, rules=rules, limits=limits
        )
        self._turn = threading.Lock()  # held by the reader
        self._reader = 0  # its thread's number
        self._wants: Callable[[], bool] | None = None  # what the reader waits for; None: whatever comes
        self._changed = threading.Condition()  # told to all others after what the reader has read
        self._followers: list[Callable[[], bool]] = []  # what others wait for; changed while holding it
        self._refused = False  # the stream took less than there was, and nobody has waited since
        self._thread: threading.Thread | None = None
        if background:
            self._thread = threading.Thread(target=self._run, name="usbredir guest", daemon=True)
            self._thread.start()

    # ------------------------------------------------------------ the connection

    def wait_for_device(self, timeout: float | None = None) -> DeviceConnect:
        """The device, as soon as the host has announced one. Raises TimeoutError."""
        limit = None if timeout is None else time.monotonic() + timeout
        while True:
            remaining = None if limit is None else limit - time.monotonic()
            if not self._until(lambda: self._exchange.device is not None, remaining):
                raise TimeoutError("the host has announced no device in time")
            device = self._exchange.device
            if device is not None:  # it may have gone again
                return device

    def wait_for_disconnect(self, timeout: float | None = None) -> None:
        """Return when the device is gone. Raises TimeoutError."""
        if not self._until(lambda: self._exchange.device is None, timeout):
            raise TimeoutError("the device is still there")
        if not self._exchange.disconnected:
            self._exchange.check_connection()

    def process(self) -> None:
        """Write what is queued and read what has arrived, without waiting, at most 1 MiB of it.

        For an application with a loop of its own; not with ``background``.
        Threads: one caller at a time, nobody waiting.
        """
        self._exchange.check_connection()
        with self._turn:
            self._wants = None
            self._refused = False
            self._write()
            try:
                self._exchange.read()
            except FATAL as error:
                self._exchange.fail(error)
                raise
            self._exchange.expire()
            self._write()
        self._tell()

    def has_data_to_write(self) -> int:
        """Packets queued."""
        return self._exchange.has_output()

    def reject(self) -> None:
        """Refuse the device. Raises LocalProtocolError when the host has no filter capability."""
        self._exchange.reject()
        self._flush()

    def reset(self) -> None:
        """Reset the device. There is no answer."""
        self._exchange.reset()
        self._flush()

    def close(self) -> None:
        """End all calls that wait, with ConnectionClosed, and release what the guest holds. Idempotent.

        The stream is the application's to close. Threads: any number of callers, but no callback of a future.
        """
        self._exchange.fail(ConnectionClosed("the guest was closed"))
        self._tell()
        self._callbacks.wake()
        if self._thread is not None:
            self._thread.join(CLOSE_PATIENCE)
        if self._turn.acquire(timeout=CLOSE_PATIENCE):
            self._exchange.parser.close()
            self._turn.release()

    def __enter__(self) -> Guest:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None, /
    ) -> None:
        self.close()

    # ------------------------------------------------------------ requests

    get_configuration = _blocking(requests.get_configuration)
    set_configuration = _blocking(requests.set_configuration)
    get_alt_setting = _blocking(requests.get_alt_setting)
    set_alt_setting = _blocking(requests.set_alt_setting)
    control_in = _blocking(requests.control_in)
    control_out = _blocking(requests.control_out)
    get_descriptor = _blocking(requests.get_descriptor)
    clear_halt = _blocking(requests.clear_halt)
    bulk_in = _blocking(requests.bulk_in)
    bulk_out = _blocking(requests.bulk_out)
    interrupt_out = _blocking(requests.interrupt_out)
    start_interrupt_receiving = _blocking(requests.start_interrupt_receiving)
    stop_interrupt_receiving = _blocking(requests.stop_interrupt_receiving)
    start_bulk_receiving = _blocking(requests.start_bulk_receiving)
    stop_bulk_receiving = _blocking(requests.stop_bulk_receiving)
    start_iso_stream = _blocking(requests.start_iso_stream)
    stop_iso_stream = _blocking(requests.stop_iso_stream)
    alloc_streams = _blocking(requests.alloc_streams)
    free_streams = _blocking(requests.free_streams)

    def call(self, request: Request[T]) -> T:
        """Send a request and wait for its answer."""
        pending = self._exchange.start(request)
        try:
            self._write()
            self._until(lambda: pending.done, None)
        except BaseException:
            if not pending.done:
                self._exchange.abandon(pending)
                with contextlib.suppress(Exception):
                    self._write()
            raise
        return pending.result()

    def submit(self, request: Request[T]) -> concurrent.futures.Future[T]:
        """Send a request: the future of its answer, as in ``guest.submit(requests.bulk_in(0x81, 512)).result()``.

        Raises as a call does when it cannot be sent. Cancelling the future cancels the transfer at the host: the
        future's result follows, with status CANCELLED, or what the transfer has become meanwhile.

        Callbacks of the future run in the thread that reads and must not wait for the guest. Without ``background``
        it progresses while some thread waits for it or for anything else of the guest.
        """
        future: _Future[T] = _Future(self)
        future.pending = self._exchange.start(request, future.complete)
        self._flush()
        return future

    def pipeline(self, wanted: Iterable[Request[T]], depth: int = 16) -> Iterator[T]:
        """The answers of many requests, in their order, *depth* of them under way at a time.

        The quickest way to move much: requests are written together and answers read together. The next requests
        are taken from *wanted* as answers are taken. Raises as a call does, and cancels the rest then; so does
        closing the iterator. ::

            image = b"".join(r.data for r in guest.pipeline(requests.bulk_in(0x82, 4096) for _ in range(100)))
        """
        if depth < 1:
            raise ValueError(f"a pipeline of depth {depth}: 1 is the least")
        return self._pipeline(iter(wanted), depth)

    def _pipeline(self, wanted: Iterator[Request[T]], depth: int) -> Iterator[T]:
        start = self._exchange.start
        flying: deque[Pending[T]] = deque()
        try:
            for request in islice(wanted, depth):
                flying.append(start(request))
            while flying:
                first = flying[0]
                if not first.done:
                    self._flush()
                    self._until(lambda first=first: first.done, None)  # type: ignore[misc]
                flying.popleft()
                yield first.result()
                for request in wanted:
                    flying.append(start(request))
                    break
        finally:
            for pending in flying:
                if not pending.done:
                    self._exchange.abandon(pending)
            if flying:
                with contextlib.suppress(Exception):
                    self._flush()

    # ------------------------------------------------------------ streams

    def receive(self, endpoint: int, *, timeout: float | None = None) -> TransferResult:
        """The next data of an endpoint with a stream; status TIMEOUT when none came in time.

        Isochronous: one packet. When the host has ended the stream, its status, after all data. Raises
        LocalProtocolError when it is not started, or when data was dropped because nobody took it.
        """
        exchange = self._exchange
        stream = exchange.stream(endpoint)
        present = exchange.streams
        in_time = self._until(lambda: stream.has_news or present.get(endpoint) is not stream, timeout)
        result = exchange.take(endpoint, stream)
        if self._thread is not None and exchange.backlog < HIGH_BACKLOG:
            self._tell()  # it may have stopped reading
        if result is not None:
            return result
        if in_time:
            raise LocalProtocolError(f"the stream on endpoint 0x{endpoint:02x} was stopped")
        return TransferResult(Status.TIMEOUT)

    def iso_out(self, endpoint: int, data: bytes | bytearray | memoryview, *, timeout: float | None = None) -> int:
        """Send one packet of an isochronous stream; waits while too many are unwritten.

        Status TIMEOUT when that takes longer than *timeout* seconds; the packet stays queued.

        There is no answer: the last failure that the host told of on this endpoint, or SUCCESS. The host takes
        packets at the device's pace and drops what its buffer cannot hold: send as fast as the device consumes.
        """
        status = self._exchange.iso_out(endpoint, data)
        self._flush()
        has_output = self._exchange.has_output
        if status == Status.SUCCESS and not self._until(lambda: has_output() <= ISO_PACKETS_AHEAD, timeout):
            return Status.TIMEOUT
        return status

    # ------------------------------------------------------------ waiting

    def _until(self, done: Callable[[], bool], timeout: float | None) -> bool:
        """Wait until *done*; False when time is up. Whoever finds nobody reading reads."""
        limit = None if timeout is None else time.monotonic() + timeout
        while not done():
            self._exchange.check_connection()
            if self._thread is None and self._turn.acquire(blocking=False):
                try:
                    self._reader = threading.get_ident()
                    in_time = self._lead(done, limit)
                finally:
                    self._reader = 0
                    self._turn.release()
                    if self._followers:
                        self._tell()
            else:
                in_time = self._follow(done, limit)
            if not in_time:
                return done()
        return True

    def _lead(self, done: Callable[[], bool], limit: float | None) -> bool:
        """Read for everybody until *done*, or the connection has ended; False when time is up."""
        exchange, wait = self._exchange, self._callbacks.wait
        has_output = exchange.has_output
        self._wants = done
        try:
            while not done() and exchange.error is None:
                remaining = self._remaining(limit)
                # A read before waiting would mostly say that there is nothing: a system call less for every answer.
                if remaining is None or remaining > 0:
                    unwritten = has_output()
                    wait(remaining, writing=unwritten > 0)
                    self._refused = False
                    if unwritten:
                        exchange.write()
                exchange.read()
                if has_output():
                    exchange.write()
                if self._followers:
                    self._tell()
                if remaining is not None and remaining <= 0 and not done():
                    exchange.expire()
                    exchange.write()
                    if limit is not None and limit <= time.monotonic():
                        return False
        except FATAL as error:  # it ends for everybody
            exchange.fail(error)
            if not done():
                raise
        return True

    def _remaining(self, limit: float | None) -> float | None:
        """Seconds until *limit* or the deadline of a request, or None."""
        deadline = self._exchange.next_deadline()
        if deadline is not None and (limit is None or deadline < limit):
            limit = deadline
        return None if limit is None else limit - time.monotonic()

    def _follow(self, done: Callable[[], bool], limit: float | None) -> bool:
        """Wait while another thread reads; False when time is up."""
        if self._reader == threading.get_ident():
            raise LocalProtocolError("a callback must not wait for the guest: it runs in the thread that reads")
        with self._changed:
            self._followers.append(done)
            try:
                self._wake_reader()
                self._changed.notify_all()  # the background thread reads on when somebody waits
                while not done() and self._exchange.error is None and (self._thread or self._turn.locked()):
                    remaining = None if limit is None else limit - time.monotonic()
                    if remaining is not None and remaining <= 0:
                        return False
                    self._changed.wait(remaining)
            finally:
                self._followers.remove(done)
        return True

    def _flush(self) -> None:
        """Write what was queued, as far as the stream takes it; the reader writes the rest.

        When the stream has just refused, it is not asked again before somebody has waited: each attempt costs as
        much as there is to write.
        """
        if not self._refused:
            self._write()
            self._refused = self._exchange.has_output() > 0
        self._wake_reader()
        if self._thread is not None:
            self._tell()  # it reads on when a request waits

    def _wake_reader(self) -> None:
        """What was queued may have to be written by the reader, and its deadline may be the next one."""
        exchange = self._exchange
        if self._turn.locked() and (exchange.has_output() or exchange.next_deadline() is not None):
            self._callbacks.wake()

    def _tell(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _run(self) -> None:
        """The background thread: reads until the connection has ended."""
        exchange = self._exchange
        with self._turn:
            self._reader = threading.get_ident()
            while exchange.error is None:
                try:
                    self._lead(self._has_backlog, None)
                except Exception as error:  # whoever waits is told, and every later call
                    exchange.fail(error)
                self._tell()
                with self._changed:
                    self._changed.wait_for(lambda: exchange.error is not None or not self._has_backlog())
            self._reader = 0
        self._tell()

    def _has_backlog(self) -> bool:
        """The background thread has read enough: all have what they wait for, and data of streams is to be taken."""
        exchange = self._exchange
        return exchange.backlog > HIGH_BACKLOG and not exchange.busy and all(done() for done in tuple(self._followers))

    def _hold(self) -> bool:
        """Asked before each read: the reader has what it waits for."""
        return self._wants is not None and self._wants()

    def _write(self) -> None:
        try:
            self._exchange.write()
        except FATAL as error:
            self._exchange.fail(error)
            raise


class _Future(concurrent.futures.Future[T]):
    """The future of a request: waiting for it reads, and cancelling it cancels the transfer."""

    def __init__(self, guest: Guest) -> None:
        super().__init__()
        self.set_running_or_notify_cancel()  # only the host's answer decides how it ends
        self.pending: Pending[T] | None = None
        self._guest = guest

    def complete(self, pending: Pending[T]) -> None:
        """The request is done."""
        try:
            value = pending.result()
        except Exception as error:
            self.set_exception(error)
        else:
            self.set_result(value)

    def cancel(self) -> bool:
        """Ask the host to give the transfer up. False: it is done, or cannot be cancelled."""
        if self.pending is None or not self._guest._exchange.cancel(self.pending):
            return False
        self._guest._flush()
        return True

    def result(self, timeout: float | None = None) -> T:
        """The answer. Raises TimeoutError when it is not there in *timeout* seconds; the request goes on."""
        self._wait(timeout)
        return super().result(0)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """What it failed with, or None; otherwise as :meth:`result`."""
        self._wait(timeout)
        return super().exception(0)

    def _wait(self, timeout: float | None) -> None:
        try:
            if not self._guest._until(self.done, timeout):
                raise TimeoutError("the request goes on")  # Python 3.10 would raise one of its own kind
        except FATAL:
            if not self.done():
                raise
