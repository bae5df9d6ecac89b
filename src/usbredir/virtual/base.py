"""The base of devices written in Python: everything that is the same for every USB device.

A subclass declares what it is (:mod:`usbredir.virtual.description`), overrides hooks (:meth:`VirtualDevice.data_in`,
:meth:`~VirtualDevice.data_out`) and answers requests with methods (:mod:`usbredir.virtual.control`). Standard
requests, halts, configurations, alternate settings, streams, queues of transfers, intervals, timeouts and
cancellation are done here.

How data flows: a host submits transfers from any thread; they wait in a queue per endpoint, or per stream.
``handle_events`` asks the hooks, in order of submission, and completes what they answer; isochronous transfers when
their time is over, interrupt transfers at most once per interval. A hook that answers NAK is asked again at the next
progress: after any other transfer, after :meth:`VirtualDevice.notify`, or when a time set with
:meth:`VirtualDevice.call_later` has come.

Source: USB 2.0, chapters 5, 8 and 9; USB 3.2, 8.12.1.4 for streams.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, ClassVar, TypeVar

from ..descriptors import Endpoint, Interface, interval_seconds, max_packet_size, parse_configuration
from ..device import IsoResult, Transfer
from ..errors import DeviceLostError
from ..proto import Speed, Status, TransferType
from .control import NAK, STALL, Answer, Payload, Setup, declared_requests
from .description import Declaration

__all__ = ["VirtualDevice"]

Device = TypeVar("Device", bound="VirtualDevice")


class StandardRequest:
    """bRequest of the standard requests (USB 2.0, table 9-4)."""

    GET_STATUS = 0
    CLEAR_FEATURE = 1
    SET_FEATURE = 3
    GET_DESCRIPTOR = 6
    GET_CONFIGURATION = 8
    GET_INTERFACE = 10
    SET_ISOCH_DELAY = 49
    SET_SEL = 48


POLLIN = 1
"""poll(2)'s number for "readable"; not every platform's select module has it."""
ENDPOINT_HALT = 0
REMOTE_WAKEUP = 1
CONFIGURATION_SELF_POWERED = 0x40
CONFIGURATION_REMOTE_WAKEUP = 0x20
STREAM_SHIFT = 8
"""A queue has a number: the endpoint's address, and above it the stream."""


class VirtualDevice(Declaration):
    """A USB device made of Python code.

    Args:
        speed: speed on the bus; None: the declared one.
        clock: seconds, monotonic.

    Raises ValueError when the declaration is one that USB forbids at this speed.

    A context manager that closes the device. Hooks run one at a time, most in the thread that runs
    :meth:`handle_events`, those that follow a request of the host (reset, alternate settings, cleared halts) in
    the thread that makes it.
    Threads: submit, cancel, notify, send, wake and unplug from any; otherwise as in
    :class:`~usbredir.device.UsbDevice`.
    """

    send_limit: int = 1024
    """Messages of :meth:`send` that wait for the host, on each endpoint."""

    stream: int = 0
    """While a data hook runs: the bulk stream (USB 3) that it is asked for, 0 for none."""

    _requests: ClassVar[Mapping[tuple[int, int], str]] = {}

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls._requests = declared_requests(cls)

    def __init__(self, *, speed: Speed | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        if speed is not None:
            self.speed = speed
        self._description = self.describe(self.speed)
        self._check_answers()
        self._configurations = {parse_configuration(raw).value: raw for raw in self._description.configurations}
        self._clock = clock
        self._condition = threading.Condition()
        self._turn = threading.RLock()  # held by the thread that handles events
        self._hooks = threading.RLock()  # held while a hook runs, never while a completion does
        # Guarded by the condition: what other threads touch.
        self._submitted: deque[Transfer] = deque()
        self._cancelled: set[Transfer] = set()
        self._work = False
        self._gone = False
        self._closed = False
        self._wake_sockets: tuple[socket.socket, socket.socket] | None = None
        # For the thread that handles events.
        self._queues: dict[int, deque[Transfer]] = {}
        self._deadlines: dict[Transfer, float] = {}
        self._queued: dict[Transfer, float] = {}  # when isochronous transfers came
        self._due: dict[Transfer, float] = {}  # when periodic ones that are first in their queue are due
        self._last_due: dict[int, float] = {}  # when the last isochronous one of an endpoint was
        self._next_slot: dict[int, float] = {}  # when an interrupt endpoint is polled next
        self._outbox: dict[int, deque[Payload]] = {}  # of send, guarded by the condition
        self._streams: dict[int, int] = {}  # streams allocated, by endpoint
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._halted: set[int] = set()
        self._remote_wakeup = False
        self._configuration = next(iter(self._configurations), 0)
        self._alternates: dict[int, int] = {}
        self._endpoints: dict[int, Endpoint] = {}
        self._find_endpoints()
        self.began()

    def _check_answers(self) -> None:
        """A request has one answer."""
        for request_type, request, *_ in self._description.answers:
            method = self._requests.get((request_type, request))
            if method is not None:
                raise ValueError(f"request 0x{request:02x} (0x{request_type:02x}) has an answer beside method {method}")

    # ------------------------------------------------------------ hooks

    def began(self) -> None:
        """The device starts: at the end of the constructor, after every bus reset and change of configuration.

        Here is the place for everything that such a start forgets.
        """

    def control_request(self, setup: Setup, data: bytes) -> Payload | Answer | None:
        """A class or vendor request that no method was declared for.

        *data* is the OUT data stage; the result is the IN data stage, None for an OUT request that is accepted.
        """
        return STALL

    def standard_request(self, setup: Setup, data: bytes) -> Payload | Answer | None:
        """A standard request (USB 2.0, 9.4); answered by the base, for devices that differ."""
        return self._standard_request(setup)

    def data_in(self, endpoint: int, length: int) -> Payload | Answer:
        """Data for an IN transfer of *length* bytes on a bulk, interrupt or isochronous endpoint.

        Fewer bytes end the transfer early; more are a babble. STALL halts the endpoint. By default it gives what
        :meth:`send` was given: a message ends a transfer, and what does not fit into one goes into the next.
        """
        waiting = self._outbox.get(endpoint)
        if not waiting:
            return NAK
        message = waiting.popleft()
        if len(message) > length:
            waiting.appendleft(memoryview(message)[length:])
            message = message[:length]
        return message

    def data_out(self, endpoint: int, data: bytes | bytearray | memoryview) -> Answer | None:
        """Data of an OUT transfer. None accepts it. STALL halts the endpoint."""
        return None

    def packet_period(self, endpoint: int) -> float:
        """Seconds that a packet of an interrupt or isochronous endpoint takes; by default the declared interval.

        0: transfers complete as fast as they are submitted. An isochronous transfer completes when the time of its
        last packet is over, and only then the data hooks are asked. Interrupt endpoints move at most one packet
        per period; data that come after a pause go at once.
        """
        return self._periods.get(endpoint, 0.0)

    def halt_cleared(self, endpoint: int) -> None:
        """The host cleared the halt of *endpoint*."""

    def alternate_selected(self, interface: int, alternate: int) -> None:
        """The host selected an alternate setting."""

    # ------------------------------------------------------------ for subclasses

    def send(self, endpoint: int, data: Payload) -> bool:
        """Queue a message that the next transfers of an IN endpoint get, for devices without a data_in of their own.

        False: it was not queued, because ``send_limit`` messages wait already, or because the endpoint is in no
        alternate setting that is selected, or because the device is gone. Raises ValueError for an endpoint that
        is never there. Threads: any.
        """
        with self._condition:
            if endpoint not in self._endpoints or not endpoint & 0x80:
                self._check_sender(endpoint)
                return False
            if self._gone or self._closed:
                return False
            waiting = self._outbox.setdefault(endpoint, deque())
            if len(waiting) >= self.send_limit:
                return False
            waiting.append(bytes(data))
            self._signal()
        return True

    def _check_sender(self, endpoint: int) -> None:
        everywhere = {e.address for raw in self._configurations.values() for e in _endpoints_of(raw)}
        if endpoint not in everywhere or not endpoint & 0x80:
            raise ValueError(f"the device has no IN endpoint 0x{endpoint:02x}")

    def notify(self) -> None:
        """Something changed: hooks that answered NAK are asked again."""
        with self._condition:
            self._signal()

    def call_later(self, seconds: float, function: Callable[[], None]) -> None:
        """Call *function* in the event thread, *seconds* from now; hooks are asked again afterwards.

        Threads: the event thread, inside a hook.
        """
        heapq.heappush(self._timers, (self._clock() + seconds, next(self._numbers), function))

    def halt(self, endpoint: int) -> None:
        """Halt *endpoint*: its transfers stall until the host clears it."""
        self._halted.add(endpoint)

    def is_halted(self, endpoint: int) -> bool:
        """Whether *endpoint* is halted."""
        return endpoint in self._halted

    def unplug(self) -> None:
        """Take the device away: every transfer ends with loss of the device, as do later ones."""
        with self._condition:
            self._gone = True
            self._signal()

    # ------------------------------------------------------------ UsbDevice: description

    @property
    def device_descriptor(self) -> bytes:
        """The device descriptor, 18 bytes."""
        return self._description.device

    @property
    def configuration_descriptor(self) -> bytes | None:
        """The active configuration's descriptor with all that follows it, or None when unconfigured."""
        return self._configurations.get(self._configuration)

    @property
    def lost(self) -> bool:
        """Whether :meth:`unplug` was called."""
        return self._gone

    @property
    def remote_wakeup_enabled(self) -> bool:
        """Whether the host allows the device to wake it."""
        return self._remote_wakeup

    # ------------------------------------------------------------ UsbDevice: control

    def claim(self) -> None:
        """Nothing else can use a virtual device. Raises DeviceLostError after :meth:`unplug`."""
        self._check_present()

    def release(self, *, give_back: bool, reset: bool = True) -> None:
        """With *give_back* and *reset* the device starts anew, as a real one does for its driver."""
        if give_back and reset and not self._gone:
            self._start_anew()

    def set_configuration(self, value: int) -> int:
        """Select a configuration."""
        self._check_present()
        if value and value not in self._configurations:
            return Status.IOERROR
        self._configuration = value
        self._start_anew()
        return Status.SUCCESS

    def set_alt_setting(self, interface: int, alt: int) -> int:
        """Select an alternate setting; the halts of its endpoints are cleared."""
        self._check_present()
        if not any(i.number == interface and i.alternate == alt for i in self._interfaces()):
            return Status.IOERROR
        with self._hooks:
            self._alternates[interface] = alt
            self._find_endpoints()
            own = {e.address for e in self._endpoints.values() if e.interface == interface}
            self._halted -= own
            self._streams = {e: count for e, count in self._streams.items() if e in self._endpoints and e not in own}
            self.alternate_selected(interface, alt)
        return Status.SUCCESS

    def reset(self) -> None:
        """A bus reset. Configuration and alternate settings stay: libusb selects them again."""
        self._check_present()
        self._start_anew(keep_alternates=True)

    def clear_halt(self, endpoint: int) -> int:
        """Clear the halt of an endpoint."""
        self._check_present()
        if endpoint not in self._endpoints:
            return Status.IOERROR
        with self._hooks:
            self._halted.discard(endpoint)
            self.halt_cleared(endpoint)
        self.notify()
        return Status.SUCCESS

    def alloc_streams(self, endpoints: Sequence[int], count: int) -> tuple[int, int]:
        """Allocate bulk streams 1 to *count* on endpoints, or as many as each of them has."""
        self._check_present()
        limits = [self._endpoints[e].max_streams if e in self._endpoints else 0 for e in endpoints]
        granted = min(count, *limits) if limits else 0
        if granted < 1:
            return Status.IOERROR, 0
        self._streams |= dict.fromkeys(endpoints, granted)
        return Status.SUCCESS, granted

    def free_streams(self, endpoints: Sequence[int]) -> int:
        """Free the bulk streams of endpoints."""
        self._check_present()
        if not endpoints or not self._streams.keys() >= set(endpoints):
            return Status.IOERROR
        self._streams = {e: count for e, count in self._streams.items() if e not in endpoints}
        return Status.SUCCESS

    def _check_present(self) -> None:
        if self._gone:
            raise DeviceLostError("the virtual device is unplugged")

    def _start_anew(self, *, keep_alternates: bool = False) -> None:
        with self._hooks:
            if not keep_alternates:
                self._alternates.clear()
            self._halted.clear()
            self._remote_wakeup = False
            self._streams = {}
            self._next_slot.clear()
            with self._condition:
                self._outbox.clear()
            self._find_endpoints()
            self.began()
        self.notify()

    def _interfaces(self) -> Sequence[Interface]:
        raw = self.configuration_descriptor
        return parse_configuration(raw).interfaces if raw else ()

    def _find_endpoints(self) -> None:
        """The endpoints of the present alternate settings."""
        self._endpoints = {
            endpoint.address: endpoint
            for interface in self._interfaces()
            if self._alternates.get(interface.number, 0) == interface.alternate
            for endpoint in interface.endpoints
        }
        self._periods = {e.address: interval_seconds(e, self.speed) for e in self._endpoints.values()}

    # ------------------------------------------------------------ UsbDevice: transfers

    def submit(self, transfer: Transfer) -> int:
        """Queue a transfer; it completes inside handle_events."""
        with self._condition:
            if self._gone or self._closed:
                transfer.device_lost = True
                return Status.IOERROR
            if transfer.kind is not TransferType.CONTROL and transfer.endpoint not in self._endpoints:
                return Status.IOERROR
            if self._streams and not self._has_stream(transfer):
                return Status.INVAL
            self._submitted.append(transfer)
            self._signal()
        return Status.SUCCESS

    def _has_stream(self, transfer: Transfer) -> bool:
        """An endpoint with streams takes nothing else; one without does not look at the stream."""
        allocated = self._streams.get(transfer.endpoint)
        return allocated is None or 1 <= transfer.stream_id <= allocated

    def cancel(self, transfer: Transfer) -> None:
        """Ask for an early end; the transfer completes inside handle_events."""
        with self._condition:
            self._cancelled.add(transfer)
            self._signal()

    def _signal(self) -> None:
        """There is work. The condition is held."""
        if not self._work:
            self._work = True
            self._condition.notify_all()
            if self._wake_sockets is not None:
                with contextlib.suppress(BlockingIOError):
                    self._wake_sockets[1].send(b"w")

    # ------------------------------------------------------------ UsbDevice: events

    def handle_events(self, timeout: float | None = 0.0) -> None:
        """Complete what can be completed; wait at most *timeout* seconds for something to do.

        When another thread is handling events, that one does the work and this call only waits.
        """
        if not self._turn.acquire(timeout=-1 if timeout is None else timeout):
            return
        try:
            submitted, cancelled, work = self._wait_for_work(timeout)
            for transfer in submitted:
                self._enqueue(transfer)
            if cancelled:
                self._end_cancelled(cancelled)
            work = self._run_timers() or work
            if self._gone or self._closed:
                self._end(lambda transfer: True, Status.IOERROR, device_lost=True)
            elif work:
                self._ask_hooks()
        except BaseException:  # of a completion: what is left goes on at the next call
            self.notify()
            raise
        finally:
            self._turn.release()

    def _wait_for_work(self, timeout: float | None) -> tuple[list[Transfer], set[Transfer], bool]:
        """What was submitted and cancelled, and whether there is anything to do."""
        with self._condition:
            if timeout != 0:
                waits = [wait for wait in (timeout, self.next_timeout()) if wait is not None]
                self._condition.wait_for(lambda: self._work or self._closed, min(waits) if waits else None)
            submitted = list(self._submitted)
            self._submitted.clear()
            cancelled, self._cancelled = self._cancelled, set()
            work, self._work = self._work, False
            if work and self._wake_sockets is not None:
                with contextlib.suppress(BlockingIOError):
                    self._wake_sockets[0].recv(64)
        return submitted, cancelled, work

    def _enqueue(self, transfer: Transfer) -> None:
        key = 0 if transfer.kind is TransferType.CONTROL else transfer.endpoint
        if transfer.stream_id and key in self._streams:
            key |= transfer.stream_id << STREAM_SHIFT
        self._queues.setdefault(key, deque()).append(transfer)
        if transfer.timeout:
            self._deadlines[transfer] = self._clock() + transfer.timeout
        if transfer.kind is TransferType.ISO:
            self._queued[transfer] = self._clock()

    def wake(self) -> None:
        """Make a waiting handle_events return."""
        self.notify()

    def pollfds(self) -> Sequence[tuple[int, int]]:
        """A socket that becomes readable when the device was given something to do."""
        with self._condition:
            if self._wake_sockets is None and not self._closed:
                self._wake_sockets = socket.socketpair()
                for end in self._wake_sockets:
                    end.setblocking(False)
                if self._work:
                    self._wake_sockets[1].send(b"w")
            return [] if self._wake_sockets is None else [(self._wake_sockets[0].fileno(), POLLIN)]

    def next_timeout(self) -> float | None:
        """Seconds until handle_events is due: 0 when there is work, None when there is nothing to wait for."""
        if self._work:
            return 0.0
        due = [self._timers[0][0]] if self._timers else []
        due += self._deadlines.values()
        due += self._due.values()
        return max(0.0, min(due) - self._clock()) if due else None

    def close(self) -> None:
        """End every transfer and release what the device holds. Idempotent."""
        with self._condition:
            if self._closed:
                return
            self._closed = True
            self._signal()
        try:
            self.handle_events(1.0)
        finally:  # whatever a completion raises
            with self._condition:
                sockets, self._wake_sockets = self._wake_sockets, None
            for end in sockets or ():
                end.close()

    def __enter__(self: Device) -> Device:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _run_timers(self) -> bool:
        """Run what is due; True when hooks are to be asked again."""
        ran = False
        now = self._clock()
        while self._timers and self._timers[0][0] <= now:
            _, _, function = heapq.heappop(self._timers)
            with self._hooks:
                function()
            ran = True
        if self._deadlines:
            late = {transfer for transfer, deadline in self._deadlines.items() if deadline <= now}
            self._end(late.__contains__, Status.TIMEOUT)
            ran = ran or bool(late)  # others are the first of their queues now
        return ran or any(due <= now for due in self._due.values())

    # ------------------------------------------------------------ progress

    def _ask_hooks(self) -> None:
        """One round: every endpoint is asked for what was queued when the round began.

        What completions submit waits for the next round, so that a device that always has data
        cannot keep its caller for ever. Rounds go on while other endpoints' answers changed.
        """
        progress = False
        for key, queue in list(self._queues.items()):
            for _ in range(len(queue)):
                self.stream = key >> STREAM_SHIFT
                # A completion may have handled events itself, and emptied the queue.
                if not queue or not self._ask_hook(queue):
                    break
                progress = True
            if key >> STREAM_SHIFT and not self._queues.get(key):  # there may be many streams
                self._queues.pop(key, None)
        if progress and any(self._queues.values()):
            self.notify()  # a NAK may have become an answer

    def _ask_hook(self, queue: deque[Transfer]) -> bool:
        """Ask about the first transfer of a queue; True when it completed."""
        transfer = queue[0]
        with self._hooks:
            answer = self._answer(transfer)
            if answer is NAK:
                return False
            if answer is STALL and transfer.kind is not TransferType.CONTROL:
                self.halt(transfer.endpoint)
        queue.popleft()
        if answer is STALL:
            self._complete(transfer, Status.STALL)
        elif answer is None:
            self._complete(transfer, Status.SUCCESS, transfer.length)
        else:
            self._complete_in(transfer, answer)
        return True

    def _answer(self, transfer: Transfer) -> Payload | Answer | None:
        if transfer.kind is TransferType.CONTROL:
            return self._control(transfer)
        if transfer.endpoint in self._halted:
            return STALL
        if transfer.kind is TransferType.ISO:
            return self._iso(transfer) if self._is_due(transfer) else NAK
        if transfer.kind is TransferType.INTERRUPT:
            return self._poll_interrupt(transfer)
        return self._ask_data(transfer)

    def _ask_data(self, transfer: Transfer) -> Payload | Answer | None:
        if transfer.endpoint & 0x80:
            return self.data_in(transfer.endpoint, transfer.length)
        return self.data_out(transfer.endpoint, transfer.data)

    def _complete_in(self, transfer: Transfer, data: Payload) -> None:
        if len(data) > transfer.length:
            transfer.data = memoryview(data)[: transfer.length]
            self._complete(transfer, Status.BABBLE, transfer.length)
        else:
            transfer.data = data
            self._complete(transfer, Status.SUCCESS, len(data))

    def _is_due(self, transfer: Transfer) -> bool:
        """Whether the packets of an isochronous transfer, the first one in its queue, have had their time.

        They follow those of the transfer before without a gap if they were there in time.
        """
        endpoint = transfer.endpoint
        if transfer not in self._due:
            start = max(self._queued[transfer], self._last_due.get(endpoint, 0.0))
            self._due[transfer] = start + self.packet_period(endpoint) * len(transfer.iso_lengths)
        if self._due[transfer] > self._clock():
            return False
        self._last_due[endpoint] = self._due[transfer]
        return True

    def _poll_interrupt(self, transfer: Transfer) -> Payload | Answer | None:
        """One transfer when its endpoint is polled next; every packet takes a period."""
        endpoint = transfer.endpoint
        waited = self._due.pop(transfer, None) is not None
        period = self.packet_period(endpoint)
        if not period:
            return self._ask_data(transfer)
        now, slot = self._clock(), self._next_slot.get(endpoint, 0.0)
        if now < slot:
            self._due[transfer] = slot
            return NAK
        answer = self._ask_data(transfer)
        if not isinstance(answer, Answer):
            # The rhythm stays when events are handled a little late.
            start = slot if waited and now < slot + period else now
            self._next_slot[endpoint] = start + period * self._packets_of(endpoint, transfer.length, answer)
        return answer

    def _packets_of(self, endpoint: int, length: int, answer: Payload | None) -> int:
        """How many packets an interrupt transfer took: *length* bytes out, or *answer* in."""
        declared = self._endpoints.get(endpoint)
        size = max_packet_size(declared, self.speed) if declared is not None else 0
        return max(1, -(-(length if answer is None else len(answer)) // max(1, size)))

    def _iso(self, transfer: Transfer) -> Payload | Answer | None:
        """One hook call per packet; a NAK is an empty packet."""
        results = []
        if transfer.endpoint & 0x80:
            for length in transfer.iso_lengths:
                answer = self.data_in(transfer.endpoint, length)
                if isinstance(answer, Answer):
                    results.append(IsoResult(Status.SUCCESS if answer is NAK else Status.STALL))
                else:
                    status = Status.SUCCESS if len(answer) <= length else Status.BABBLE
                    results.append(IsoResult(status, answer[:length]))
        else:
            view, offset = memoryview(transfer.data), 0
            for length in transfer.iso_lengths:
                stalled = self.data_out(transfer.endpoint, view[offset : offset + length]) is STALL
                results.append(IsoResult(Status.STALL if stalled else Status.SUCCESS))
                offset += length
        transfer.iso_results = results
        return None

    def _complete(self, transfer: Transfer, status: Status, actual_length: int = 0) -> None:
        if self._deadlines:
            self._deadlines.pop(transfer, None)
        if transfer.kind is TransferType.ISO:
            del self._queued[transfer]
        if self._due:
            self._due.pop(transfer, None)
        if not actual_length and transfer.endpoint & 0x80:
            transfer.data = b""
        transfer.status = status
        transfer.actual_length = actual_length
        transfer.callback(transfer)

    def _end(self, which: Callable[[Transfer], bool], status: Status, *, device_lost: bool = False) -> None:
        """Take transfers out of their queues and complete them with *status*."""
        for queue in list(self._queues.values()):
            for transfer in [transfer for transfer in queue if which(transfer)]:
                if transfer in queue:  # a completion may have handled events itself
                    queue.remove(transfer)
                    transfer.device_lost = device_lost
                    self._complete(transfer, status)

    def _end_cancelled(self, cancelled: set[Transfer]) -> None:
        try:
            self._end(cancelled.__contains__, Status.CANCELLED)
        except BaseException:  # the rest is cancelled at the next call
            with self._condition:
                self._cancelled |= cancelled
            raise

    # ------------------------------------------------------------ control requests

    def _control(self, transfer: Transfer) -> Payload | Answer | None:
        setup = Setup(*transfer.setup, transfer.length)
        data = bytes(transfer.data)
        answer = self._own_request(setup, data) if setup.request_type & 0x60 else self.standard_request(setup, data)
        if isinstance(answer, Answer):
            return answer
        # The host's data stage is as long as asked for; a device may send less, never more.
        return (answer or b"")[: setup.length] if transfer.endpoint & 0x80 else None

    def _own_request(self, setup: Setup, data: bytes) -> Payload | Answer | None:
        """A class or vendor request: to its method, if there is one."""
        name = self._requests.get((setup.request_type, setup.request))
        if name is not None:
            method: Callable[..., Payload | Answer | None] = getattr(self, name)
            return method(setup) if setup.request_type & 0x80 else method(setup, data)
        constant = self._description.answers.get(setup[:4])
        return self.control_request(setup, data) if constant is None else constant

    def _standard_request(self, setup: Setup) -> Payload | Answer:
        recipient = setup.request_type & 0x1F
        match setup.request, recipient:
            case StandardRequest.GET_DESCRIPTOR, 0:
                found = self._description.descriptor(setup.value >> 8, setup.value & 0xFF)
                return STALL if found is None else found
            case StandardRequest.GET_STATUS, 0:
                self_powered = bool(self._attributes() & CONFIGURATION_SELF_POWERED)
                return bytes((self_powered | self._remote_wakeup << 1, 0))
            case StandardRequest.GET_STATUS, 1:
                return b"\0\0"
            case StandardRequest.GET_STATUS, 2:
                return bytes((setup.index & 0xFF in self._halted, 0))
            case StandardRequest.GET_CONFIGURATION, 0:
                return bytes((self._configuration,))
            case StandardRequest.GET_INTERFACE, 1:
                return bytes((self._alternates.get(setup.index & 0xFF, 0),))
            case ((StandardRequest.SET_FEATURE | StandardRequest.CLEAR_FEATURE), _):
                return self._feature(setup, recipient)
            case ((StandardRequest.SET_SEL | StandardRequest.SET_ISOCH_DELAY), 0):
                return b""
        return self._description.answers.get(setup[:4], STALL)

    def _attributes(self) -> int:
        """bmAttributes of the active configuration."""
        raw = self.configuration_descriptor
        return raw[7] if raw else 0

    def _feature(self, setup: Setup, recipient: int) -> Payload | Answer:
        on = setup.request == StandardRequest.SET_FEATURE
        if recipient == 0 and setup.value == REMOTE_WAKEUP and self._attributes() & CONFIGURATION_REMOTE_WAKEUP:
            self._remote_wakeup = on
            return b""
        if recipient == 2 and setup.value == ENDPOINT_HALT and setup.index & 0x8F in self._endpoints:
            if on:
                self.halt(setup.index & 0x8F)
            else:
                self.clear_halt(setup.index & 0x8F)
            return b""
        if recipient == 1:  # function suspend and the like: nothing to do
            return b""
        return STALL


def _endpoints_of(configuration: bytes) -> list[Endpoint]:
    return [e for interface in parse_configuration(configuration).interfaces for e in interface.endpoints]
