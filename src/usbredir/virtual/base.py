"""The base of devices written in Python: everything that is the same for every USB device.

A subclass hands descriptors to the constructor and overrides hooks (:meth:`VirtualDevice.data_in`,
:meth:`~VirtualDevice.data_out`, :meth:`~VirtualDevice.control_request`). Standard requests, halts, configurations,
alternate settings, queues of transfers, timeouts and cancellation are done here.

How data flows: a host submits transfers from any thread; they wait in a queue per endpoint. ``handle_events``
asks the hooks, in order of submission, and completes what they answer; isochronous transfers when their time is over.
A hook that answers ``Answer.NAK`` is asked again at the next progress: after any other transfer, after
:meth:`VirtualDevice.notify`, or when a time set with :meth:`VirtualDevice.call_later` has come.

Source: USB 2.0, chapters 8 and 9.
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
from enum import Enum
from typing import NamedTuple

from ..descriptors import (
    DescriptorType,
    Endpoint,
    Interface,
    parse_configuration,
    string_descriptor,
)
from ..device import IsoResult, Transfer
from ..errors import DeviceLostError
from ..proto import Speed, Status, TransferType

__all__ = ["Answer", "Setup", "VirtualDevice"]

Payload = bytes | bytearray | memoryview


class Answer(Enum):
    """What a hook answers in place of data."""

    NAK = "nothing now, ask again"
    STALL = "no"


class Setup(NamedTuple):
    """The setup packet of a control request (USB 2.0, 9.3). *length* is the data stage's, in bytes."""

    request_type: int
    request: int
    value: int
    index: int  # type: ignore[assignment]  # the specification's name; hides tuple.index
    length: int


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
LANGUAGE_ENGLISH = 0x0409

# One request at a time goes through a hook; the rest waits in order.
Hook = Callable[[Transfer], Payload | Answer | None]


class VirtualDevice:
    """A USB device made of Python code.

    Args:
        speed: speed on the bus.
        device_descriptor: 18 bytes.
        configurations: whole configuration descriptors; the first one is active at the start.
        strings: string descriptors by index.
        bos: the BOS descriptor, or None.
        clock: seconds, monotonic.

    Hooks run one at a time, most in the thread that runs :meth:`handle_events`, those that follow a request
    of the host (reset, alternate settings, cleared halts) in the thread that makes it.
    Threads: submit, cancel, notify, wake and unplug from any; otherwise as in :class:`~usbredir.device.UsbDevice`.
    """

    def __init__(
        self,
        *,
        speed: Speed = Speed.HIGH,
        device_descriptor: bytes,
        configurations: Sequence[bytes],
        strings: Mapping[int, str] | None = None,
        bos: bytes | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._speed = speed
        self._device_descriptor = device_descriptor
        self._configurations = {parse_configuration(raw).value: raw for raw in configurations}
        self._strings = dict(strings or {})
        self._bos = bos
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
        self._due: dict[Transfer, float] = {}  # when those of them that are first in their queue are due
        self._last_due: dict[int, float] = {}  # when the last one of an endpoint was
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._halted: set[int] = set()
        self._remote_wakeup = False
        self._configuration = next(iter(self._configurations), 0)
        self._alternates: dict[int, int] = {}
        self._endpoints: dict[int, Endpoint] = {}
        self._find_endpoints()

    # ------------------------------------------------------------ hooks

    def control_request(self, setup: Setup, data: bytes) -> Payload | Answer:
        """A class or vendor request. *data* is the OUT data stage; the result is the IN data stage."""
        return Answer.STALL

    def data_in(self, endpoint: int, length: int) -> Payload | Answer:
        """Data for an IN transfer of *length* bytes on a bulk, interrupt or isochronous endpoint.

        Fewer bytes end the transfer early; more are a babble. STALL halts the endpoint.
        """
        return Answer.NAK

    def data_out(self, endpoint: int, data: bytes | bytearray | memoryview) -> Answer | None:
        """Data of an OUT transfer. None accepts it. STALL halts the endpoint."""
        return None

    def packet_period(self, endpoint: int) -> float:
        """Seconds that a packet of an isochronous endpoint takes; 0: transfers complete as fast as they are submitted.

        A transfer completes when the time of its last packet is over, and only then the data hooks are asked.
        """
        return 0.0

    def halt_cleared(self, endpoint: int) -> None:
        """The host cleared the halt of *endpoint*."""

    def alternate_selected(self, interface: int, alternate: int) -> None:
        """The host selected an alternate setting."""

    def was_reset(self) -> None:
        """The bus was reset, or the configuration changed: forget everything under way."""

    # ------------------------------------------------------------ for subclasses

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
    def speed(self) -> Speed:
        """Speed on the bus."""
        return self._speed

    @property
    def device_descriptor(self) -> bytes:
        """The device descriptor, 18 bytes."""
        return self._device_descriptor

    @property
    def configuration_descriptor(self) -> bytes | None:
        """The active configuration's descriptor with all that follows it, or None when unconfigured."""
        return self._configurations.get(self._configuration)

    @property
    def lost(self) -> bool:
        """Whether :meth:`unplug` was called."""
        return self._gone

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
            self._halted -= {e.address for e in self._endpoints.values() if e.interface == interface}
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
        """Virtual devices have no bulk streams."""
        return Status.IOERROR, 0

    def free_streams(self, endpoints: Sequence[int]) -> int:
        """Virtual devices have no bulk streams."""
        return Status.IOERROR

    def _check_present(self) -> None:
        if self._gone:
            raise DeviceLostError("the virtual device is unplugged")

    def _start_anew(self, *, keep_alternates: bool = False) -> None:
        with self._hooks:
            if not keep_alternates:
                self._alternates.clear()
            self._halted.clear()
            self._find_endpoints()
            self.was_reset()
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

    # ------------------------------------------------------------ UsbDevice: transfers

    def submit(self, transfer: Transfer) -> int:
        """Queue a transfer; it completes inside handle_events."""
        with self._condition:
            if self._gone or self._closed:
                transfer.device_lost = True
                return Status.IOERROR
            if transfer.kind is not TransferType.CONTROL and transfer.endpoint not in self._endpoints:
                return Status.IOERROR
            self._submitted.append(transfer)
            self._signal()
        return Status.SUCCESS

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
        self.handle_events(1.0)
        with self._condition:
            sockets, self._wake_sockets = self._wake_sockets, None
        for end in sockets or ():
            end.close()

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
        return ran or any(due <= now for due in self._due.values())

    # ------------------------------------------------------------ progress

    def _ask_hooks(self) -> None:
        """One round: every endpoint is asked for what was queued when the round began.

        What completions submit waits for the next round, so that a device that always has data
        cannot keep its caller for ever. Rounds go on while other endpoints' answers changed.
        """
        progress = False
        for endpoint, queue in list(self._queues.items()):
            for _ in range(len(queue)):
                # A completion may have handled events itself, and emptied the queue.
                if not queue or not self._ask_hook(endpoint, queue):
                    break
                progress = True
        if progress and any(self._queues.values()):
            self.notify()  # a NAK may have become an answer

    def _ask_hook(self, endpoint: int, queue: deque[Transfer]) -> bool:
        """Ask about the first transfer of an endpoint; True when it completed."""
        transfer = queue[0]
        with self._hooks:
            answer = self._answer(transfer)
            if answer is Answer.NAK:
                return False
            if answer is Answer.STALL and transfer.kind is not TransferType.CONTROL:
                self.halt(endpoint)
        queue.popleft()
        if answer is Answer.STALL:
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
            return Answer.STALL
        if transfer.kind is TransferType.ISO:
            return self._iso(transfer) if self._is_due(transfer) else Answer.NAK
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

    def _iso(self, transfer: Transfer) -> Payload | Answer | None:
        """One hook call per packet; a NAK is an empty packet."""
        results = []
        if transfer.endpoint & 0x80:
            for length in transfer.iso_lengths:
                answer = self.data_in(transfer.endpoint, length)
                if isinstance(answer, Answer):
                    results.append(IsoResult(Status.SUCCESS if answer is Answer.NAK else Status.STALL))
                else:
                    status = Status.SUCCESS if len(answer) <= length else Status.BABBLE
                    results.append(IsoResult(status, answer[:length]))
        else:
            view, offset = memoryview(transfer.data), 0
            for length in transfer.iso_lengths:
                stalled = self.data_out(transfer.endpoint, view[offset : offset + length]) is Answer.STALL
                results.append(IsoResult(Status.STALL if stalled else Status.SUCCESS))
                offset += length
        transfer.iso_results = results
        return None

    def _complete(self, transfer: Transfer, status: Status, actual_length: int = 0) -> None:
        if self._deadlines:
            self._deadlines.pop(transfer, None)
        if transfer.kind is TransferType.ISO:
            del self._queued[transfer]
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
        if setup.request_type & 0x60:
            answer = self.control_request(setup, bytes(transfer.data))
        else:
            answer = self._standard_request(setup)
        if isinstance(answer, Answer):
            return answer
        # The host's data stage is as long as asked for; a device may send less, never more.
        return answer[: setup.length] if transfer.endpoint & 0x80 else None

    def _standard_request(self, setup: Setup) -> Payload | Answer:
        recipient = setup.request_type & 0x1F
        match setup.request, recipient:
            case StandardRequest.GET_DESCRIPTOR, 0:
                return self.descriptor(setup.value >> 8, setup.value & 0xFF)
            case StandardRequest.GET_DESCRIPTOR, 1:
                return self.interface_descriptor(setup.index, setup.value >> 8, setup.value & 0xFF)
            case StandardRequest.GET_STATUS, 0:
                raw = self.configuration_descriptor
                self_powered = bool(raw and raw[7] & CONFIGURATION_SELF_POWERED)
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
        return Answer.STALL

    def _feature(self, setup: Setup, recipient: int) -> Payload | Answer:
        on = setup.request == StandardRequest.SET_FEATURE
        if recipient == 0 and setup.value == REMOTE_WAKEUP:
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
        return Answer.STALL

    def descriptor(self, kind: int, index: int) -> Payload | Answer:
        """A descriptor of the device (USB 2.0, 9.4.3), or STALL."""
        match kind:
            case DescriptorType.DEVICE:
                return self._device_descriptor
            case DescriptorType.CONFIGURATION:
                raws = list(self._configurations.values())
                return raws[index] if index < len(raws) else Answer.STALL
            case DescriptorType.STRING:
                if index == 0:
                    return bytes((4, DescriptorType.STRING)) + LANGUAGE_ENGLISH.to_bytes(2, "little")
                return string_descriptor(self._strings[index]) if index in self._strings else Answer.STALL
            case DescriptorType.BOS:
                return self._bos if self._bos is not None else Answer.STALL
        return Answer.STALL

    def interface_descriptor(self, interface: int, kind: int, index: int) -> Payload | Answer:
        """A descriptor of an interface, such as a HID report descriptor; default STALL."""
        return Answer.STALL
