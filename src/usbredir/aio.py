"""USB redirection with asyncio: a guest whose requests are awaited, and hosts that serve guests.

::

    async with aio.connect("localhost:4000") as guest:
        await guest.wait_for_device(5)
        status, data = await guest.bulk_in(0x81, 512)

How data flows: the protocol of an asyncio transport (:mod:`usbredir._aio_stream`) tells its owner when bytes can move.
A :class:`Guest` moves them with its exchange, the same as below :class:`usbredir.guest.Guest`, a :class:`Session` with
a :class:`~usbredir.host.Host`.

Threads: everything here is for the thread of the event loop. Source: docs/asyncio.md.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import math
import socket
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Iterable, Sequence
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, TypeVar

from . import requests
from ._aio_host import Server, Session, serve
from ._aio_stream import Log, TransportStream
from ._exchange import Exchange, ExchangeView, Pending, Stream
from .capabilities import ALL
from .device import TransferResult
from .errors import ConnectionClosed, LocalProtocolError
from .filter import FilterRule
from .guest import HIGH_BACKLOG, ISO_PACKETS_AHEAD
from .limits import Limits
from .packets import DeviceConnect
from .parser import VERSION
from .proto import Status
from .requests import Request, StreamRequest
from .transport import CONNECT_TIMEOUT, Address, parse_address

__all__ = ["Guest", "Server", "Session", "connect", "serve"]

STOP_TIMEOUT = 5.0
"""Seconds that the host has to confirm that a stream was stopped."""

P = ParamSpec("P")
T = TypeVar("T")


def _awaitable(make: Callable[P, Request[T]]) -> Callable[Concatenate[Guest, P], Coroutine[Any, Any, T]]:
    """The coroutine method that sends a request and waits for its answer."""

    async def method(self: Guest, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self.call(make(*args, **kwargs))

    requests.like(make, method)
    return method


class Guest(ExchangeView):
    """Uses the device of one host, in an event loop.

    Args:
        version: text for hello.
        capabilities: what to announce.
        rules: filter rules to tell the host.
        limits: what the host may make us hold.
        log: gets the messages; None: the logger "usbredir.guest".

    :func:`connect` makes one. For any other transport, such as TLS, make it in a running loop and hand
    :meth:`protocol` to asyncio: ``await loop.create_connection(guest.protocol, host, port, ssl=context)``.

    Every call may raise ConnectionClosed, RemoteProtocolError and OSError; once the connection has ended, all calls
    that wait and all later ones raise what ended it. Calls that need a device raise DeviceLostError when there is
    none. *timeout* is in seconds, None waits for ever. Cancelling a task that waits for a transfer cancels the
    transfer at the host.

    Threads: one, that of the event loop; any number of tasks.
    """

    def __init__(
        self,
        *,
        version: str = VERSION,
        capabilities: Iterable[int] = ALL,
        rules: Sequence[FilterRule] = (),
        limits: Limits = Limits(),  # noqa: B008 - immutable
        log: Log | None = None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._stream = TransportStream(self._progress, "usbredir.guest", log)
        self._exchange = Exchange(
            self._stream, self._hold, version=version, capabilities=capabilities, rules=rules, limits=limits
        )
        self._waiters: dict[asyncio.Future[bool], Callable[[], bool]] = {}  # what each of them waits for
        self._writing: asyncio.Handle | None = None
        self._going_on: asyncio.Handle | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._due = math.inf  # when it goes off, in seconds of time.monotonic()
        self._iterators: dict[int, object] = {}  # by endpoint
        self._stops: dict[int, Pending[int]] = {}  # the latest stop of each endpoint that an iterator sent

    # ------------------------------------------------------------ the connection

    def protocol(self) -> asyncio.BaseProtocol:
        """The protocol for the transport: the factory that ``loop.create_connection`` and others want. For one."""
        return self._stream

    async def wait_for_device(self, timeout: float | None = None) -> DeviceConnect:
        """The device, as soon as the host has announced one. Raises TimeoutError."""
        limit = None if timeout is None else time.monotonic() + timeout
        while True:
            remaining = None if limit is None else limit - time.monotonic()
            if not await self._until(lambda: self._exchange.device is not None, remaining):
                raise TimeoutError("the host has announced no device in time")
            device = self._exchange.device
            if device is not None:  # it may have gone again
                return device

    async def wait_for_disconnect(self, timeout: float | None = None) -> None:
        """Return when the device is gone. Raises TimeoutError."""
        if not await self._until(lambda: self._exchange.device is None, timeout):
            raise TimeoutError("the device is still there")
        if not self._exchange.disconnected:
            self._exchange.check_connection()

    def reject(self) -> None:
        """Refuse the device, without waiting. Raises LocalProtocolError when the host has no filter capability."""
        self._exchange.reject()
        self._write()

    def reset(self) -> None:
        """Reset the device, without waiting: there is no answer."""
        self._exchange.reset()
        self._write()

    def close(self) -> None:
        """End all calls that wait, with ConnectionClosed, and close the connection. Idempotent."""
        self._end(ConnectionClosed("the guest was closed"))

    async def wait_closed(self) -> None:
        """Return when the connection is closed, by whichever side."""
        await self._stream.closed.wait()

    async def __aenter__(self) -> Guest:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None, /
    ) -> None:
        self.close()
        await self.wait_closed()

    # ------------------------------------------------------------ requests

    get_configuration = _awaitable(requests.get_configuration)
    set_configuration = _awaitable(requests.set_configuration)
    get_alt_setting = _awaitable(requests.get_alt_setting)
    set_alt_setting = _awaitable(requests.set_alt_setting)
    control_in = _awaitable(requests.control_in)
    control_out = _awaitable(requests.control_out)
    get_descriptor = _awaitable(requests.get_descriptor)
    clear_halt = _awaitable(requests.clear_halt)
    bulk_in = _awaitable(requests.bulk_in)
    bulk_out = _awaitable(requests.bulk_out)
    interrupt_out = _awaitable(requests.interrupt_out)
    start_interrupt_receiving = _awaitable(requests.start_interrupt_receiving)
    stop_interrupt_receiving = _awaitable(requests.stop_interrupt_receiving)
    start_bulk_receiving = _awaitable(requests.start_bulk_receiving)
    stop_bulk_receiving = _awaitable(requests.stop_bulk_receiving)
    start_iso_stream = _awaitable(requests.start_iso_stream)
    stop_iso_stream = _awaitable(requests.stop_iso_stream)
    alloc_streams = _awaitable(requests.alloc_streams)
    free_streams = _awaitable(requests.free_streams)

    async def call(self, request: Request[T]) -> T:
        """Send a request and wait for its answer."""
        pending, future = self._start(request)
        try:
            return await future
        except asyncio.CancelledError:
            self._abandon(pending)
            raise

    def submit(self, request: Request[T]) -> asyncio.Future[T]:
        """Send a request: the future of its answer, as in ``await guest.submit(requests.bulk_in(0x81, 512))``.

        Many can be under way without a task for each. Raises as a call does when it cannot be sent. Cancelling the
        future cancels the transfer at the host.
        """
        pending, future = self._start(request)
        future.add_done_callback(lambda future: self._abandon(pending) if future.cancelled() else None)
        return future

    def _start(self, request: Request[T]) -> tuple[Pending[T], asyncio.Future[T]]:
        exchange = self._exchange
        alone = not exchange.busy
        future: asyncio.Future[T] = self._loop.create_future()
        pending = exchange.start(request, functools.partial(_settle, future))
        if pending.deadline is not None:
            self._call_at(pending.deadline)
        if self._stream.readable:
            self._go_on()
        if alone:
            self._write()
        elif self._writing is None:
            # The host is at work on others: what the tasks of this round of the loop ask for leaves together.
            self._writing = self._loop.call_soon(self._write)
        return pending, future

    def _abandon(self, pending: Pending[Any]) -> None:
        """Nobody waits for it any more."""
        self._exchange.abandon(pending)
        if pending.deadline is not None:
            self._call_at(pending.deadline)
        self._write()

    # ------------------------------------------------------------ streams

    async def receive(self, endpoint: int, *, timeout: float | None = None) -> TransferResult:
        """The next data of an endpoint with a stream; status TIMEOUT when none came in time.

        Isochronous: one packet. When the host has ended the stream, its status, after all data. Raises
        LocalProtocolError when it is not started, or when data was dropped because nobody took it.
        """
        exchange = self._exchange
        stream = exchange.stream(endpoint)
        in_time = await self._until(self._has_news(endpoint, stream), timeout)
        result = exchange.take(endpoint, stream)
        if self._stream.readable:
            self._go_on()
        if result is not None:
            return result
        if in_time:
            raise LocalProtocolError(f"the stream on endpoint 0x{endpoint:02x} was stopped")
        return TransferResult(Status.TIMEOUT)

    def _has_news(self, endpoint: int, stream: Stream) -> Callable[[], bool]:
        """Whether there is something to take, or nothing more will come."""
        streams = self._exchange.streams
        return lambda: stream.has_news or streams.get(endpoint) is not stream

    async def iso_out(
        self, endpoint: int, data: bytes | bytearray | memoryview, *, timeout: float | None = None
    ) -> int:
        """Send one packet of an isochronous stream; waits while too many are unwritten.

        Status TIMEOUT when that takes longer than *timeout* seconds; the packet stays queued.

        There is no answer: the last failure that the host told of on this endpoint, or SUCCESS. The host takes
        packets at the device's pace and drops what its buffer cannot hold: send as fast as the device consumes.
        """
        status = self._exchange.iso_out(endpoint, data)
        self._write()
        has_output = self._exchange.has_output
        if status == Status.SUCCESS and not await self._until(lambda: has_output() <= ISO_PACKETS_AHEAD, timeout):
            return Status.TIMEOUT
        return status

    def interrupts(self, endpoint: int) -> AsyncGenerator[TransferResult, None]:
        """The packets of an interrupt IN endpoint: starts receiving, and stops it when the loop is left.

        ``async for status, data in guest.interrupts(0x81)``. A status other than SUCCESS ends the iteration behind
        it, when it is the start's or the one with which the host ended the stream. Raises what a call raises when
        the device or the connection is lost, and LocalProtocolError as :meth:`receive` does, or when another
        iteration over this endpoint takes over.
        """
        return self._packets(requests.start_interrupt_receiving(endpoint), requests.stop_interrupt_receiving)

    def bulk_packets(
        self, endpoint: int, bytes_per_transfer: int, transfers: int = 5
    ) -> AsyncGenerator[TransferResult, None]:
        """The data of a bulk IN endpoint that is read ahead, one transfer at a time; see :meth:`interrupts`."""
        start = requests.start_bulk_receiving(endpoint, bytes_per_transfer, transfers)
        return self._packets(start, requests.stop_bulk_receiving)

    def iso_packets(
        self, endpoint: int, packets_per_transfer: int = 8, transfers: int = 4
    ) -> AsyncGenerator[TransferResult, None]:
        """The packets of an isochronous IN endpoint, each with a status of its own; see :meth:`interrupts`."""
        start = requests.start_iso_stream(endpoint, packets_per_transfer, transfers)
        return self._packets(start, requests.stop_iso_stream)

    async def _packets(
        self, start: Request[int], stop: Callable[..., Request[int]]
    ) -> AsyncGenerator[TransferResult, None]:
        assert isinstance(start, StreamRequest)
        endpoint = start.endpoint
        mine = object()
        left, self._iterators[endpoint] = self._iterators.get(endpoint), mine
        try:
            if left is not None:  # left by a break, and not closed yet
                self._stop(endpoint, stop)
            stopping = self._stops.pop(endpoint, None)
            if stopping is not None:
                await self._until(lambda: stopping.done, None)
            status = await self.call(start)
            if status != Status.SUCCESS:
                yield TransferResult(status)
                return
            stream = self._exchange.stream(endpoint)
            has_news, last = self._has_news(endpoint, stream), False
            while not last:
                await self._until(has_news, None)
                last = not stream.waiting  # but the status with which the host ended it
                yield await self.receive(endpoint)
        finally:
            # Without waiting: this may run while the task is cancelled, or when nobody is there any more.
            if self._iterators.get(endpoint) is mine:
                del self._iterators[endpoint]
                self._stop(endpoint, stop)

    def _stop(self, endpoint: int, stop: Callable[..., Request[int]]) -> None:
        """Stop a stream without waiting, if it is there."""
        if endpoint in self._exchange.streams:
            pending = self._stops[endpoint] = self._exchange.start(stop(endpoint, timeout=STOP_TIMEOUT))
            assert pending.deadline is not None
            self._call_at(pending.deadline)
            self._write()

    # ------------------------------------------------------------ waiting

    async def _until(self, done: Callable[[], bool], timeout: float | None) -> bool:
        """Wait until *done*; False when time is up."""
        limit = None if timeout is None else self._loop.time() + timeout
        while not done():
            self._exchange.check_connection()
            waiter: asyncio.Future[bool] = self._loop.create_future()
            self._waiters[waiter] = done
            timer = None if limit is None else self._loop.call_at(limit, _answer, waiter, False)
            if self._stream.readable:
                self._go_on()
            try:
                if not await waiter:
                    return done()
            finally:
                del self._waiters[waiter]
                if timer is not None:
                    timer.cancel()
        return True

    def _tell(self) -> None:
        """Let those go on who have what they wait for, or wait in vain."""
        for waiter, done in self._waiters.items():
            if done() or self._exchange.error is not None:
                _answer(waiter, True)

    def _call_at(self, deadline: float) -> None:
        """Look at the deadlines then."""
        if deadline < self._due and self._exchange.error is None:
            if self._timer is not None:
                self._timer.cancel()
            self._due = deadline
            self._timer = self._loop.call_later(max(0.0, deadline - time.monotonic()), self._expire)

    def _expire(self) -> None:
        self._timer, self._due = None, math.inf
        try:
            self._exchange.expire()
        finally:  # the other requests have their deadlines all the same
            deadline = self._exchange.next_deadline()
            if deadline is not None:
                self._call_at(deadline)
            self._tell()
            self._write()

    # ------------------------------------------------------------ bytes

    def _hold(self) -> bool:
        """Asked before each read: nobody waits, and data of streams has to be taken first."""
        return self._exchange.backlog > HIGH_BACKLOG and not self._exchange.busy and not self._waiters

    def _progress(self) -> None:
        """Read what has come, for 16 reads, and write what waits."""
        stream, exchange = self._stream, self._exchange
        if exchange.error is not None:
            return
        before = stream.reads
        try:
            if exchange.has_output():
                exchange.write()  # first: too much of it keeps the exchange from reading
            exchange.read()
            if exchange.has_output():
                exchange.write()
        except Exception as error:  # whoever waits is told, and every later call
            self._end(error)
            return
        if self._waiters:
            self._tell()
        stream.pace()
        if stream.readable and stream.reads != before:
            self._go_on()  # not at once: others have their turn. Nothing was read: when data is taken, or written

    def _go_on(self) -> None:
        if self._going_on is None:
            self._going_on = self._loop.call_soon(self._read_on)

    def _read_on(self) -> None:
        self._going_on = None
        self._progress()

    def _write(self) -> None:
        if self._writing is not None:
            self._writing.cancel()
            self._writing = None
        self._exchange.write()

    def _end(self, error: Exception) -> None:
        """The connection has ended: for everybody who waits, and for later calls."""
        self._exchange.fail(error)
        if self._timer is not None:
            self._timer.cancel()
        self._stream.close()
        self._tell()


def _settle(future: asyncio.Future[T], pending: Pending[T]) -> None:
    """A request is done: hand its result on, unless nobody waits any more."""
    if future.done():
        return
    try:
        value = pending.result()
    except Exception as error:
        future.set_exception(error)
    else:
        future.set_result(value)


def _answer(waiter: asyncio.Future[bool], value: bool) -> None:
    if not waiter.done():
        waiter.set_result(value)


class _Connecting:
    """A guest on its way: to be awaited, or entered with ``async with``."""

    def __init__(self, connect: Callable[[], Coroutine[Any, Any, Guest]]) -> None:
        self._connect = connect
        self._guest: Guest | None = None

    def __await__(self) -> Generator[Any, None, Guest]:
        return self._connect().__await__()

    async def __aenter__(self) -> Guest:
        self._guest = await self._connect()
        return self._guest

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None, /
    ) -> None:
        assert self._guest is not None
        await self._guest.__aexit__(kind, value, traceback)


def connect(
    address: str | socket.socket,
    *,
    timeout: float = CONNECT_TIMEOUT,
    version: str = VERSION,
    capabilities: Iterable[int] = ALL,
    rules: Sequence[FilterRule] = (),
    limits: Limits = Limits(),  # noqa: B008 - immutable
    log: Log | None = None,
) -> _Connecting:
    """A guest on a new connection: ``async with connect(...) as guest``, or ``guest = await connect(...)``.

    Args:
        address: as in :mod:`usbredir.transport`, or a connected stream socket, which the guest then owns.
        timeout: seconds that connecting may take.

    Others as for :class:`Guest`. Raises ValueError for the form of *address*, OSError when nobody answers (in time:
    TimeoutError).
    """
    target = parse_address(address) if isinstance(address, str) else address

    async def open_guest() -> Guest:
        guest = Guest(version=version, capabilities=capabilities, rules=rules, limits=limits, log=log)
        try:
            await asyncio.wait_for(_attach(guest._stream, target), timeout)
        except asyncio.TimeoutError:  # another one than the built-in before Python 3.11
            guest.close()
            raise TimeoutError(errno.ETIMEDOUT, f"no answer within {timeout:g} seconds") from None
        except BaseException:
            guest.close()
            raise
        return guest

    return _Connecting(open_guest)


async def _attach(stream: TransportStream, target: Address | socket.socket) -> None:
    """Connect a stream. Names are looked up by the loop, in a thread."""
    loop = asyncio.get_running_loop()
    if isinstance(target, socket.socket):
        await loop.create_connection(lambda: stream, sock=target)
    elif target.port is None:
        await loop.create_unix_connection(lambda: stream, target.host)
    else:
        try:
            await loop.create_connection(lambda: stream, target.host, target.port)
        except UnicodeError as error:
            raise OSError(errno.EINVAL, "not a host name") from error
