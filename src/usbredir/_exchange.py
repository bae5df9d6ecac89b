"""A guest's protocol without waiting: requests sent, answers matched, streams collected, devices that come and go.

:class:`usbredir.guest.Guest` (threads) and :mod:`usbredir.aio` (asyncio) add the waiting: they call
:meth:`Exchange.read` and :meth:`Exchange.write` when bytes can move and :meth:`Exchange.expire` when time has passed.

How data flows: ``start`` files a :class:`Pending` under a new id and queues the packet; ``read`` finds it again by the
answer's id. Data of streams waits in a :class:`Stream` per endpoint until it is taken.

Everything a host sends is checked against what was asked: an answer to nothing is dropped, one of the wrong kind too,
and what a stream delivers counts against :data:`MAX_BACKLOG`. Source: docs/guest.md; docs/protocol.md.
"""

from __future__ import annotations

import copy
import itertools
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from typing import Any, Generic, TypeVar

from ._link import Link
from .device import TransferResult
from .errors import ConnectionClosed, DeviceLostError, LocalProtocolError, RemoteProtocolError
from .filter import FilterRule
from .limits import Limits
from .locking import ThreadingLocks
from .packets import (
    AltSettingStatus,
    BufferedBulkPacket,
    BulkPacket,
    BulkReceivingStatus,
    BulkStreamsStatus,
    CancelDataPacket,
    ConfigurationStatus,
    ControlPacket,
    DeviceConnect,
    DeviceDisconnect,
    EpInfo,
    FilterFilter,
    FilterReject,
    Hello,
    InterfaceInfo,
    InterruptPacket,
    InterruptReceivingStatus,
    IsoPacket,
    IsoStreamStatus,
    Packet,
    Reset,
)
from .parser import LogLevel, Parser, StreamCallbacks
from .proto import Capability, Status, TransferType, endpoint_index
from .requests import Request, Shape, StreamRequest

__all__ = ["Exchange", "ExchangeView", "Pending", "Stream"]

CANCEL_GRACE = 5.0
"""Seconds that the host has to answer a cancelled request; later answers are dropped."""
MAX_BACKLOG = 64 * 1024 * 1024
"""Received stream data that waits to be taken, in bytes of all endpoints; more ends the stream that it belongs to."""
MAX_WAITING = 4096
"""Packets waiting to be written above which nothing is read."""
MAX_UNWRITTEN = 1 << 62
"""The same in bytes: any number, for they are our own requests."""
READS_AT_ONCE = 16
"""Reads before a call looks at its timeout again."""
PACKET_COST = 128
"""Bytes that a waiting packet counts beside its data."""
FATAL = (ConnectionClosed, RemoteProtocolError, OSError)
"""What ends a connection: raised by reading or writing it."""
MOST_COMPLAINTS = 10
"""Answers to nothing that are logged: a host may send any number."""
STREAM_TYPES = (TransferType.ISO, TransferType.BULK, TransferType.INTERRUPT)
ID_MASK = 0xFFFFFFFF
"""Ids have 32 bits even when the host can do 64: the answer brings back what was sent, whatever was settled."""

T = TypeVar("T")
StreamPacket = InterruptPacket | BufferedBulkPacket | IsoPacket
StreamStatus = IsoStreamStatus | InterruptReceivingStatus | BulkReceivingStatus


class Pending(Generic[T]):
    """A request under way. It is done exactly once: with a result, or with an error.

    Attributes:
        request: what was asked.
        id: its id on the wire.
        deadline: when it is given up, in seconds of time.monotonic(), or None.
        cancelled_as: status of the result should the host confirm the cancellation, None: it was not cancelled.
        done: whether there is a result or an error.
    """

    __slots__ = ("request", "id", "deadline", "cancelled_as", "done", "_when_done", "_value", "_error")

    def __init__(self, request: Request[T], number: int, when_done: Callable[[Pending[T]], None] | None) -> None:
        self.request = request
        self.id = number
        self.deadline = None if request.timeout is None else time.monotonic() + request.timeout
        self.cancelled_as: Status | None = None
        self.done = False
        self._when_done = when_done
        self._error: Exception | None = None

    def result(self) -> T:
        """The result, or its error is raised. Only when it is done."""
        if self._error is not None:
            raise self._error
        return self._value

    def succeed(self, value: T) -> None:
        """It has its result."""
        self._value = value
        self.done = True
        if self._when_done is not None:
            self._when_done(self)

    def fail(self, error: Exception) -> None:
        """It will have none."""
        self._error = error
        self.done = True
        if self._when_done is not None:
            self._when_done(self)


class Phase(Enum):
    """Where a stream is. Data is kept while it runs or is being stopped; before, it is what is left of a former one."""

    STARTING = "the host has not confirmed the start"
    RUNNING = "data comes"
    STOPPING = "the host has not confirmed the stop"
    ENDED = "the host has ended it, or too much waited"


class Stream:
    """An endpoint with a stream: what came and was not taken yet, and what the host said of it.

    Attributes:
        phase: where it is.
        waiting: packets received, in order.
        ended: the status with which the host ended it, or None.
        overflow: more came than may wait; it was dropped.
        reported: OUT: the last failure that the host told of, until it is taken.
    """

    def __init__(self) -> None:
        self.phase = Phase.STARTING
        self.waiting: deque[StreamPacket] = deque()
        self.ended: int | None = None
        self.overflow = False
        self.reported: int = Status.SUCCESS

    @property
    def has_news(self) -> bool:
        """Whether there is something to take."""
        return bool(self.waiting) or self.phase is Phase.ENDED

    def end(self, status: int | None) -> None:
        """No more data: the host said so, or (None) there is no room for it."""
        self.phase = Phase.ENDED
        self.ended = status
        self.overflow = status is None


def _again(error: Exception) -> Exception:
    """The same error for somebody else: each one raises, and extends, its own. Some cannot be copied."""
    try:
        return copy.copy(error)
    except Exception:
        return error


class Exchange:
    """The requests, streams and the device of one connection.

    Args:
        stream: read, write and log of the application.
        hold: asked before every read; True: read nothing now.

    Others as for :class:`~usbredir.guest.Guest`.
    Threads: any; :meth:`read` one caller at a time, who also runs what was given to :meth:`start` as *when_done*.
    """

    def __init__(
        self,
        stream: StreamCallbacks,
        hold: Callable[[], bool],
        *,
        version: str,
        capabilities: Iterable[int],
        rules: Sequence[FilterRule],
        limits: Limits,
    ) -> None:
        self.device: DeviceConnect | None = None
        self.interfaces: InterfaceInfo | None = None
        self.endpoints: EpInfo | None = None
        self.host_filter: tuple[FilterRule, ...] | None = None
        self.host_version = ""
        self.packets_received = 0
        self.disconnected = False  # the host has told that the device is gone
        self.error: Exception | None = None
        self.streams: dict[int, Stream] = {}  # by endpoint
        self.backlog = 0  # what waits in them, in bytes
        self._hold = hold
        self._rules = rules
        self._log = stream.log
        self._lock = threading.Lock()  # what other threads change: requests, streams, the device and the error
        self._numbers = itertools.count(1)
        self._pending: dict[int, Pending[Any]] = {}
        self._unasked = 0
        self._earliest = math.inf  # no deadline of them is before
        self._senders: dict[Shape, Callable[..., None]] = {}  # valid until the host's hello
        self._reads_left = 0
        self._handlers: dict[type[Packet], Callable[[Any], None]] = {
            Hello: self._on_hello,
            DeviceConnect: self._on_connect,
            DeviceDisconnect: self._on_disconnect,
            InterfaceInfo: self._on_interface_info,
            EpInfo: self._on_ep_info,
            ConfigurationStatus: self._on_answer,
            AltSettingStatus: self._on_answer,
            IsoStreamStatus: self._on_stream_status,
            InterruptReceivingStatus: self._on_stream_status,
            BulkStreamsStatus: self._on_answer,
            FilterFilter: self._on_filter,
            BulkReceivingStatus: self._on_stream_status,
            ControlPacket: self._on_answer,
            BulkPacket: self._on_answer,
            IsoPacket: self._on_stream_data,
            InterruptPacket: self._on_interrupt,
            BufferedBulkPacket: self._on_stream_data,
        }
        link = Link(stream, self._has_enough, self._packet_received)
        self.parser = Parser(link, version=version, capabilities=capabilities, limits=limits, locks=ThreadingLocks())
        self.write = self.parser.do_write
        self.has_output = self.parser.has_data_to_write
        self._backlog_exceeds = self.parser.watch_backlog()

    # ------------------------------------------------------------ bytes

    def read(self) -> None:
        """Read what has come, at most 1 MiB of it. Raises what the parser raises; :meth:`fail` is the caller's."""
        self._reads_left = READS_AT_ONCE
        self.parser.do_read()

    def _has_enough(self) -> bool:
        """Asked before each read: no more for now.

        Whoever waits has what it waits for, and what the host sends on stays outside until the next call; or the
        host sends without a pause, and the caller has to look at its timeout.
        """
        if self._hold():
            return True
        self._reads_left -= 1
        # Our own requests, and what cancels them, are no reason: the host may wait until its answers are read.
        # Else it is a host that floods us with what we must confirm, and does not read.
        return self._reads_left < 0 or self._backlog_exceeds(MAX_WAITING + 2 * len(self._pending), MAX_UNWRITTEN)

    # ------------------------------------------------------------ requests

    @property
    def busy(self) -> bool:
        """Whether a request waits for its answer."""
        return bool(self._pending)

    def start(self, request: Request[T], when_done: Callable[[Pending[T]], None] | None = None) -> Pending[T]:
        """Queue a request. *when_done* is called by the thread that reads, and must not wait.

        Raises DeviceLostError without a device, LocalProtocolError and ValueError for a request that cannot be sent,
        and what ended the connection.
        """
        with self._lock:
            if self.error is not None or self.device is None:
                self._check()
            number = next(self._numbers) & ID_MASK
            while not number or number in self._pending:
                number = next(self._numbers) & ID_MASK
            pending = self._pending[number] = Pending(request, number, when_done)
            if pending.deadline is not None and pending.deadline < self._earliest:
                self._earliest = pending.deadline
        try:
            if isinstance(request, StreamRequest) and not self._prepare_stream(request):
                if self._remove(pending):
                    pending.succeed(Status.INVAL)
                return pending
            (self._senders.get(request.shape) or self._sender(request.shape))(number, *request.values)
        except BaseException:
            self._remove(pending)
            self._forget_start(request)
            raise
        return pending

    def _sender(self, shape: Shape) -> Callable[..., None]:
        """What sends requests without making packets: 400 ns less for each."""
        sender = self._senders[shape] = self.parser.sender(shape.packet_type, "id", *shape.names)
        return sender

    def send(self, packet: Packet) -> None:
        """Queue a packet that has no answer. Raises as :meth:`start`."""
        with self._lock:
            self._check()
        self.parser.send(packet)

    def reset(self) -> None:
        """Queue a reset of the device. Raises as :meth:`start`."""
        self.send(Reset())

    def reject(self) -> None:
        """Refuse the device. Raises LocalProtocolError when the host has no filter capability."""
        self.check_connection()
        self.parser.send(FilterReject())
        self._lose("the device was refused")

    def cancel(self, pending: Pending[Any], status: Status = Status.CANCELLED) -> bool:
        """Ask the host to give a transfer up; it is done when the host has answered. False: it cannot be."""
        with self._lock:
            if pending.done or pending.cancelled_as is not None or not pending.request.cancellable:
                return False
            pending.cancelled_as = status
            pending.deadline = time.monotonic() + CANCEL_GRACE
            self._earliest = min(self._earliest, pending.deadline)
        self._insist(CancelDataPacket(id=pending.id))
        return True

    def abandon(self, pending: Pending[Any]) -> None:
        """Whoever wanted it is gone: cancel what can be cancelled, stop what was to be started, forget the rest."""
        if not self.cancel(pending) and self._remove(pending):
            self._undo_start(pending.request)

    def _insist(self, packet: Packet) -> None:
        """Queue what ends a request: no limit of the queue holds it back, which has room for one for each request."""
        self.parser._queue_packet(packet)

    def _remove(self, pending: Pending[Any]) -> bool:
        """It waits no more; whether it did. Whoever removes it may finish it."""
        with self._lock:
            return self._pending.pop(pending.id, None) is not None

    def next_deadline(self) -> float | None:
        """When :meth:`expire` is due, in seconds of time.monotonic(), or None.

        It may be too early, when the request that it was for is done: looking at all of them costs more.
        """
        return self._earliest if self._earliest < math.inf else None

    def expire(self) -> None:
        """Cancel transfers whose time is over, give up what cannot be cancelled, or was not in time."""
        now = time.monotonic()
        with self._lock:
            timed = [p for p in self._pending.values() if p.deadline is not None]
            late = [p for p in timed if p.deadline is not None and p.deadline <= now]
            self._earliest = min(
                (p.deadline for p in timed if p.deadline is not None and p.deadline > now), default=math.inf
            )
        for pending in late:
            if pending.cancelled_as is None and self.cancel(pending, Status.TIMEOUT):
                continue
            if not self._remove(pending):
                continue
            if pending.cancelled_as is not None:
                pending.succeed(pending.request.given_up(pending.cancelled_as))
            else:
                self._undo_start(pending.request)
                pending.fail(TimeoutError(f"no answer to {pending.request.shape.packet_type.__name__} in time"))

    def fail(self, error: Exception) -> None:
        """The connection has ended: so do all requests, and every later call, with this error."""
        with self._lock:
            if self.error is not None:
                return
            self.error = error
            self._forget_device()
            lost, self._pending = list(self._pending.values()), {}
        for pending in lost:
            pending.fail(_again(error))

    def check_connection(self) -> None:
        """Raise what ended the connection."""
        if self.error is not None:
            raise _again(self.error)

    def _check(self) -> None:
        self.check_connection()
        if self.device is None:
            raise DeviceLostError("the host has no device: wait_for_device() first, or it went away")

    def _lose(self, why: str) -> None:
        """The device is gone, with all that was asked of it."""
        with self._lock:
            self._forget_device()
            self.interfaces = None
            self.endpoints = None
            lost, self._pending = list(self._pending.values()), {}
        for pending in lost:
            pending.fail(DeviceLostError(why))

    def _forget_device(self) -> None:
        self.device = None
        self.streams.clear()
        self.backlog = 0

    # ------------------------------------------------------------ streams

    def _prepare_stream(self, request: StreamRequest) -> bool:
        """A start or stop is about to be sent. False: there is no such endpoint, and hosts would not answer."""
        table = self.endpoints
        if table is not None and table.type[endpoint_index(request.endpoint)] not in STREAM_TYPES:
            return False
        with self._lock:
            present = self.streams.get(request.endpoint)
            if not request.shape.stop:
                if present is not None and present.phase is Phase.RUNNING:
                    present.phase = Phase.STOPPING
            elif present is None or present.phase in (Phase.STOPPING, Phase.ENDED):
                self._drop_waiting(present)
                self.streams[request.endpoint] = Stream()
        return True

    def _forget_start(self, request: Request[Any]) -> bool:
        """A stream whose start was not confirmed has no place; whether there was one."""
        if not isinstance(request, StreamRequest) or not request.shape.stop:
            return False
        stream = self.streams.get(request.endpoint)
        if stream is None or stream.phase is not Phase.STARTING:
            return False
        self._drop_stream(request.endpoint)
        return True

    def _undo_start(self, request: Request[Any]) -> None:
        """Nobody waits for a start any more: should the host still carry it out, it has to stop again."""
        if self._forget_start(request) and request.shape.stop is not None:
            self._insist(request.shape.stop(endpoint=request.values[0]))

    def stream(self, endpoint: int) -> Stream:
        """The stream of *endpoint*. Raises LocalProtocolError when it is not started, and as :meth:`start`."""
        with self._lock:
            stream = self.streams.get(endpoint)
            if stream is None:
                self._check()
                raise LocalProtocolError(f"no stream on endpoint 0x{endpoint:02x}: start it first")
            return stream

    def take(self, endpoint: int, stream: Stream) -> TransferResult | None:
        """The next data of a stream; the status that ended it, after all data; None: nothing there.

        Raises LocalProtocolError after data was dropped because too much waited, and as :meth:`start`.
        """
        with self._lock:
            if stream.waiting:
                packet = stream.waiting.popleft()
                if self.streams.get(endpoint) is stream:
                    self.backlog -= len(packet.data) + PACKET_COST
                return TransferResult(packet.status, packet.data)
            if stream.overflow:
                raise LocalProtocolError(
                    f"data of endpoint 0x{endpoint:02x} was dropped, as {MAX_BACKLOG} bytes waited to be taken: "
                    "receive() more often; stop the stream and start it again"
                )
            if stream.ended is not None:
                return TransferResult(stream.ended)
            self._check()
            return None

    def iso_out(self, endpoint: int, data: bytes | bytearray | memoryview) -> int:
        """Queue a packet of an isochronous OUT stream. The last failure that the host told of, or SUCCESS."""
        stream = self.stream(endpoint)
        if stream.ended is not None:
            return stream.ended
        self.send(IsoPacket(endpoint=endpoint, data=data))
        reported, stream.reported = stream.reported, Status.SUCCESS
        return reported

    def _drop_stream(self, endpoint: int) -> None:
        with self._lock:
            self._drop_waiting(self.streams.pop(endpoint, None))

    def _drop_waiting(self, stream: Stream | None) -> None:
        """Nobody will take what waits there. The lock is held."""
        if stream is not None:
            self.backlog -= sum(len(packet.data) + PACKET_COST for packet in stream.waiting)

    # ------------------------------------------------------------ packets from the host

    def _packet_received(self, packet: Packet) -> None:
        self.packets_received += 1
        self._handlers[type(packet)](packet)

    def _on_hello(self, packet: Hello) -> None:
        self.host_version = packet.version
        self._senders = {}
        if self._rules and not self.parser.peer_has_capability(Capability.FILTER):
            self._log(LogLevel.WARNING, "the host knows no filters: it is not told which devices are wanted")
        elif self._rules:
            self.parser.send(FilterFilter(rules=tuple(self._rules)))

    def _on_connect(self, packet: DeviceConnect) -> None:
        if self.device is not None:  # a host that does not tell when a device goes
            interfaces, endpoints = self.interfaces, self.endpoints
            self._lose("the host has announced another device")
            self.interfaces, self.endpoints = interfaces, endpoints
        self.device = packet
        self.disconnected = False

    def _on_disconnect(self, packet: DeviceDisconnect) -> None:
        self.disconnected = True
        self._lose("the device went away before it answered")

    def _on_interface_info(self, packet: InterfaceInfo) -> None:
        self.interfaces = packet

    def _on_ep_info(self, packet: EpInfo) -> None:
        self.endpoints = packet

    def _on_filter(self, packet: FilterFilter) -> None:
        self.host_filter = packet.rules

    def _on_answer(self, packet: Any) -> None:
        with self._lock:
            pending = self._pending.get(packet.id)
            if pending is not None and type(packet) in pending.request.shape.answers:
                del self._pending[packet.id]
            else:
                pending = None
        if pending is None:
            self._unasked += 1
            if self._unasked <= MOST_COMPLAINTS:
                self._log(LogLevel.WARNING, f"an answer that nobody waits for, dropped: {packet!r}")
            return
        if pending.cancelled_as is not None and packet.status == Status.CANCELLED:
            pending.succeed(pending.request.given_up(pending.cancelled_as, packet.data))
        else:
            pending.succeed(pending.request.read(packet))

    def _on_stream_status(self, packet: StreamStatus) -> None:
        pending = self._stream_request(packet)
        if pending is not None:
            self._on_stream_answer(pending, packet)
        elif packet.status != Status.SUCCESS and (stream := self.streams.get(packet.endpoint)) is not None:
            if packet.endpoint & 0x80 or packet.status == Status.STALL:
                stream.end(packet.status)
            else:
                stream.reported = packet.status  # an OUT stream goes on after an error

    def _stream_request(self, packet: StreamStatus) -> Pending[int] | None:
        """The start or stop that *packet* answers.

        A host whose first transfer fails answers a start with the transfer's id, not with the request's.
        """
        pending = self._pending.get(packet.id)
        if pending is not None and isinstance(pending.request, StreamRequest):
            return pending if pending.request.endpoint == packet.endpoint else None
        if packet.status == Status.SUCCESS:
            return None
        with self._lock:
            for pending in self._pending.values():
                request = pending.request
                if isinstance(request, StreamRequest) and request.shape.stop and request.endpoint == packet.endpoint:
                    return pending
        return None

    def _on_stream_answer(self, pending: Pending[int], packet: StreamStatus) -> None:
        if not self._remove(pending):
            return  # given up in this moment
        stream, good = self.streams.get(packet.endpoint), packet.status == Status.SUCCESS
        if pending.request.shape.stop:
            if not good:
                self._forget_start(pending.request)
            elif stream is not None and stream.phase is Phase.STARTING:
                stream.phase = Phase.RUNNING
        elif stream is not None and stream.phase is not Phase.STARTING:  # not one that was started meanwhile
            if good:
                self._drop_stream(packet.endpoint)
            elif stream.phase is Phase.STOPPING:
                stream.phase = Phase.RUNNING
        pending.succeed(packet.status)

    def _on_interrupt(self, packet: InterruptPacket) -> None:
        if packet.endpoint & 0x80:
            self._on_stream_data(packet)
        else:
            self._on_answer(packet)

    def _on_stream_data(self, packet: StreamPacket) -> None:
        cost = len(packet.data) + PACKET_COST
        with self._lock:
            stream = self.streams.get(packet.endpoint)
            if stream is None or stream.phase in (Phase.STARTING, Phase.ENDED):
                return  # still under way when a stream was stopped, or nobody takes it
            if self.backlog + cost > MAX_BACKLOG:
                stream.end(None)
                return
            self.backlog += cost
            stream.waiting.append(packet)


class ExchangeView:
    """What guests show of their exchange, those of threads and those of asyncio."""

    _exchange: Exchange

    @property
    def device(self) -> DeviceConnect | None:
        """The present device, or None."""
        return self._exchange.device

    @property
    def interfaces(self) -> InterfaceInfo | None:
        """The latest InterfaceInfo of the present device."""
        return self._exchange.interfaces

    @property
    def endpoints(self) -> EpInfo | None:
        """The latest EpInfo of the present device."""
        return self._exchange.endpoints

    @property
    def host_filter(self) -> tuple[FilterRule, ...] | None:
        """The rules that the host sent, or None."""
        return self._exchange.host_filter

    @property
    def host_version(self) -> str:
        """What the host calls itself; empty before its hello."""
        return self._exchange.host_version

    @property
    def packets_received(self) -> int:
        """Packets that came, of any kind."""
        return self._exchange.packets_received
