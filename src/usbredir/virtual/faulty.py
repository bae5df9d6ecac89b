"""A device with faults: stalls, delays, lost and damaged transfers, and an unplugging, the same in every run.

::

    device = Faulty(LoopbackDevice(), stall={0x81: 0.1}, delay=(0.0, 0.01), seed=7)

It stands between a host and any :class:`~usbredir.device.UsbDevice`, so that a driver can be tested against a
device that misbehaves. Nothing of the device itself is changed.
"""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum
from typing import NamedTuple, TypeVar

from ..descriptors import parse_configuration
from ..device import IsoResult, Transfer, UsbDevice
from ..errors import DeviceLostError
from ..proto import Speed, Status, TransferType

__all__ = ["Chance", "Delay", "Faulty"]

Chance = float | Mapping[int, float]
"""Probability, 0 to 1, for every transfer; or by endpoint address (0: control), others have none."""
Delay = float | tuple[float, float]
"""Seconds, or the least and the most of them."""

_Value = TypeVar("_Value")

MOST_FLIPS = 8
"""Bits of a corrupted transfer that are flipped, at most."""
CLOSE_LIMIT = 1.0
"""Seconds that close waits for another thread to leave handle_events."""
EVERY_ENDPOINT = range(0x100)
CLEAR_ENDPOINT_HALT = (0x02, 1, 0)
"""Request type, request and value of CLEAR_FEATURE(ENDPOINT_HALT). Source: USB 2.0, 9.4.1."""


class _Fault(Enum):
    """What can happen to a transfer, the first one drawn wins. Only a corrupted one reaches the device."""

    DROP = "it never completes by itself"
    STALL = "the endpoint halts"
    BABBLE = "the device sends more than asked for"
    CORRUPT = "bits are flipped"


class _Outcome(NamedTuple):
    """How a transfer ends."""

    status: int
    data: bytes = b""
    iso_results: Sequence[IsoResult] = ()
    actual_length: int = 0
    device_lost: bool = False


_LOST = _Outcome(Status.IOERROR, device_lost=True)


class _Flight:
    """A transfer between its submission and its completion.

    damage: seeds the numbers that its fault needs. due: when it is the device's turn; None: never.
    inner: what the device has, None while it has nothing.
    """

    __slots__ = ("damage", "deadline", "due", "fault", "inner", "outcome", "transfer")

    def __init__(
        self, transfer: Transfer, fault: _Fault | None, damage: int, due: float | None, deadline: float | None
    ) -> None:
        self.transfer = transfer
        self.fault = fault
        self.damage = damage
        self.due = due
        self.deadline = deadline
        self.inner: Transfer | None = None
        self.outcome: _Outcome | None = None


class Faulty:
    """A :class:`~usbredir.device.UsbDevice` that passes transfers on to another one, and lets some of them fail.

    Args:
        device: the device; it is closed with this one.
        stall: chance that a transfer gets STALL. A bulk, interrupt or isochronous endpoint is then halted, and stalls
            until its halt is cleared.
        delay: time before a transfer reaches the device; transfers of an endpoint keep their order.
        drop: chance that a transfer never completes, until it is cancelled or its timeout is over.
        babble: chance that an IN transfer gets BABBLE and random bytes, as many as it has room for.
        unplug_after: the device is gone when so many transfers have completed. None: never.
        corrupt: chance that 1 to 8 bits of a transfer's data are flipped, on the way to or from the device.
        seed: the same seed, faults and order of transfers on an endpoint give the same faults on that endpoint.
        clock: seconds, monotonic.

    A *chance* is one number for all transfers, control transfers too, or a mapping of endpoint addresses, 0 for control
    transfers. A transfer has one fault at most: drop, stall, babble, corrupt, in this order; any can be delayed.
    Transfers that are dropped, stall or babble do not reach the device: nothing is taken from it.

    All completions come from :meth:`handle_events`.
    Raises ValueError for a chance, time or endpoint that makes no sense.
    Threads: submit, cancel, set_faults, unplug and wake from any; otherwise as in :class:`~usbredir.device.UsbDevice`.
    """

    def __init__(
        self,
        device: UsbDevice,
        *,
        stall: Chance = 0.0,
        delay: Delay | Mapping[int, Delay] = 0.0,
        drop: Chance = 0.0,
        babble: Chance = 0.0,
        unplug_after: int | None = None,
        corrupt: Chance = 0.0,
        seed: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if unplug_after is not None and unplug_after < 0:
            raise ValueError(f"unplug_after is a number of transfers, not {unplug_after}")
        self.device = device
        self._seed = seed
        self._clock = clock
        self._left = unplug_after
        self._chances: dict[_Fault, Callable[[int], float]] = {}
        self._delay: Callable[[int], tuple[float, float]] = lambda endpoint: (0.0, 0.0)
        self._turn = threading.RLock()  # held by the thread that handles events
        # Guards what follows. Held while the device is given something, never in a completion.
        self._lock = threading.RLock()
        self._random: dict[int, random.Random] = {}
        self._flights: dict[Transfer, _Flight] = {}
        self._ended: deque[_Flight] = deque()
        self._last_due: dict[int, float] = {}
        self._halted: set[int] = set()
        self._gone = unplug_after == 0
        self._closed = False
        self.set_faults(stall=stall, delay=delay, drop=drop, babble=babble, corrupt=corrupt)

    def __repr__(self) -> str:
        return f"<Faulty {self.device!r}>"

    # ------------------------------------------------------------ faults

    def set_faults(
        self,
        *,
        stall: Chance | None = None,
        delay: Delay | Mapping[int, Delay] | None = None,
        drop: Chance | None = None,
        babble: Chance | None = None,
        corrupt: Chance | None = None,
    ) -> None:
        """Change the faults of transfers that are submitted from now on; None leaves one as it is. Threads: any."""
        chances = {_Fault.STALL: stall, _Fault.DROP: drop, _Fault.BABBLE: babble, _Fault.CORRUPT: corrupt}
        checked = {
            f: _by_endpoint(f.name.lower(), c, _checked_chance, 0.0) for f, c in chances.items() if c is not None
        }
        delays = None if delay is None else _by_endpoint("delay", delay, _checked_delay, (0.0, 0.0))
        with self._lock:
            self._chances.update(checked)
            if delays is not None:
                self._delay = delays

    def unplug(self) -> None:
        """Take the device away now: every transfer ends with loss of the device, as do later ones. Threads: any."""
        with self._lock:
            self._gone = True
            self._end_all(_LOST)
        self.wake()

    def _end_all(self, outcome: _Outcome) -> None:
        """End every transfer: what the device has, when it gives it back. The lock is held."""
        for flight in list(self._flights.values()):
            if flight.inner is not None:
                self.device.cancel(flight.inner)
            else:
                self._end(flight, outcome)

    def _draw(self, endpoint: int) -> tuple[_Fault | None, float, int]:
        """Fault, delay and damage of the next transfer on *endpoint*. The lock is held.

        Each endpoint has numbers of its own, always as many for a transfer, so that neither other endpoints nor
        other chances nor the time of completions change what happens here.
        """
        if endpoint not in self._random:
            self._random[endpoint] = random.Random(f"{self._seed} {endpoint}")
        numbers = self._random[endpoint]
        drawn = [(fault, numbers.random() < self._chances[fault](endpoint)) for fault in _Fault]
        least, most = self._delay(endpoint)
        delay = least + (most - least) * numbers.random()
        return next((fault for fault, happens in drawn if happens), None), delay, numbers.getrandbits(64)

    # ------------------------------------------------------------ UsbDevice: description and control

    @property
    def speed(self) -> Speed:
        """Speed on the bus."""
        return self.device.speed

    @property
    def device_descriptor(self) -> bytes:
        """The device descriptor, 18 bytes."""
        return self.device.device_descriptor

    @property
    def configuration_descriptor(self) -> bytes | None:
        """The active configuration's descriptor with all that follows it, or None when unconfigured."""
        return self.device.configuration_descriptor

    @property
    def lost(self) -> bool:
        """Whether the device is gone, here or really."""
        return self._gone or self.device.lost

    def claim(self) -> None:
        """Take all interfaces. Raises what the device raises."""
        self._check_present()
        self.device.claim()

    def release(self, *, give_back: bool, reset: bool = True) -> None:
        """Give the interfaces up."""
        self.device.release(give_back=give_back, reset=reset)
        if give_back and reset:
            self._forget_halts(EVERY_ENDPOINT)

    def set_configuration(self, value: int) -> int:
        """Select a configuration."""
        self._check_present()
        status = self.device.set_configuration(value)
        if status == Status.SUCCESS:
            self._forget_halts(EVERY_ENDPOINT)
        return status

    def set_alt_setting(self, interface: int, alt: int) -> int:
        """Select an alternate setting; the halts of its interface's endpoints are cleared."""
        self._check_present()
        status = self.device.set_alt_setting(interface, alt)
        raw = self.device.configuration_descriptor
        if status == Status.SUCCESS and raw is not None:
            settings = [i for i in parse_configuration(raw).interfaces if i.number == interface]
            self._forget_halts(endpoint.address for setting in settings for endpoint in setting.endpoints)
        return status

    def reset(self) -> None:
        """Reset the device. Raises what the device raises."""
        self._check_present()
        self.device.reset()
        self._forget_halts(EVERY_ENDPOINT)

    def clear_halt(self, endpoint: int) -> int:
        """Clear the halt of an endpoint, here and on the device."""
        self._check_present()
        status = self.device.clear_halt(endpoint)
        if status == Status.SUCCESS:
            self._forget_halts([endpoint])
        return status

    def alloc_streams(self, endpoints: Sequence[int], count: int) -> tuple[int, int]:
        """Allocate bulk streams."""
        self._check_present()
        return self.device.alloc_streams(endpoints, count)

    def free_streams(self, endpoints: Sequence[int]) -> int:
        """Free bulk streams."""
        self._check_present()
        return self.device.free_streams(endpoints)

    def _check_present(self) -> None:
        if self._gone:
            raise DeviceLostError("the device is unplugged")

    def _forget_halts(self, endpoints: Iterable[int]) -> None:
        with self._lock:
            self._halted.difference_update(endpoints)

    # ------------------------------------------------------------ UsbDevice: transfers

    def submit(self, transfer: Transfer) -> int:
        """Draw what happens to *transfer*, and start it."""
        with self._lock:
            if self._gone or self._closed:
                transfer.device_lost = True
                return Status.IOERROR
            self._start_due()  # what was submitted before comes before
            flight = self._flights[transfer] = self._new_flight(transfer)
            status = self._start(flight) if self._is_due(flight) else Status.SUCCESS
            if status != Status.SUCCESS:
                del self._flights[transfer]
                return status
        if flight.inner is None:  # the device does not know that there is something to do
            self.wake()
        return Status.SUCCESS

    def _new_flight(self, transfer: Transfer) -> _Flight:
        now = self._clock()
        endpoint = _endpoint_of(transfer)
        fault, delay, damage = self._draw(endpoint)
        deadline = now + transfer.timeout if transfer.timeout else None
        if fault is _Fault.DROP:
            return _Flight(transfer, fault, damage, None, deadline)
        due = self._last_due[endpoint] = max(now + delay, self._last_due.get(endpoint, now))
        return _Flight(transfer, fault, damage, due, deadline)

    def _is_due(self, flight: _Flight) -> bool:
        """Whether it is the device's turn."""
        waits = flight.inner is None and flight.outcome is None
        return waits and flight.due is not None and flight.due <= self._clock()

    def _start(self, flight: _Flight) -> int:
        """The device's turn. Returns the status of its submit. The lock is held."""
        transfer, fault = flight.transfer, flight.fault
        endpoint = _endpoint_of(transfer)
        if endpoint in self._halted or fault is _Fault.STALL:
            if endpoint:
                self._halted.add(endpoint)
            self._end(flight, _Outcome(Status.STALL))
            return Status.SUCCESS
        if fault is _Fault.BABBLE and transfer.endpoint & 0x80:
            self._end(flight, _babble(transfer, random.Random(flight.damage)))
            return Status.SUCCESS
        if transfer.kind is TransferType.CONTROL and transfer.setup[:3] == CLEAR_ENDPOINT_HALT:
            self._halted.discard(transfer.setup[3] & 0xFF)
        return self._pass_on(flight)

    def _pass_on(self, flight: _Flight) -> int:
        """Give the device a transfer of its own, whose completion ends *flight*. The lock is held."""
        transfer, data = flight.transfer, flight.transfer.data
        if flight.fault is _Fault.CORRUPT and not transfer.endpoint & 0x80:
            data = _corrupt(data, random.Random(flight.damage))
        timeout = 0.0
        if flight.deadline is not None:
            timeout = flight.deadline - self._clock()
            if timeout <= 0:
                self._end(flight, _Outcome(Status.TIMEOUT))
                return Status.SUCCESS
        flight.inner = Transfer(
            transfer.kind,
            transfer.endpoint,
            transfer.length,
            self._given_back,
            data=data,
            setup=transfer.setup,
            stream_id=transfer.stream_id,
            timeout=timeout,
            iso_lengths=transfer.iso_lengths,
            context=flight,
        )
        status = self.device.submit(flight.inner)
        if status != Status.SUCCESS:
            transfer.device_lost = flight.inner.device_lost
        return status

    def cancel(self, transfer: Transfer) -> None:
        """Ask for an early end; the transfer completes inside handle_events."""
        with self._lock:
            flight = self._flights.get(transfer)
            if flight is None:
                return
            if flight.inner is not None:
                self.device.cancel(flight.inner)
                return
            self._end(flight, _Outcome(Status.CANCELLED))
        self.wake()

    # ------------------------------------------------------------ UsbDevice: events

    def handle_events(self, timeout: float | None = 0.0) -> None:
        """Complete what is due; wait at most *timeout* seconds for something to do."""
        if not self._turn.acquire(timeout=-1 if timeout is None else timeout):
            return
        try:
            own = self._own_timeout()
            self.device.handle_events(min((wait for wait in (timeout, own) if wait is not None), default=None))
            self._end_late()
            self._start_due()
            self._deliver()
        finally:
            self._turn.release()

    def wake(self) -> None:
        """Make a waiting handle_events return."""
        self.device.wake()

    def pollfds(self) -> Sequence[tuple[int, int]]:
        """The device's descriptors."""
        return self.device.pollfds()

    def next_timeout(self) -> float | None:
        """Seconds until handle_events is due, here or for the device."""
        waits = [wait for wait in (self._own_timeout(), self.device.next_timeout()) if wait is not None]
        return min(waits, default=None)

    def close(self) -> None:
        """End every transfer and close the device. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._end_all(_Outcome(Status.CANCELLED))
        self.device.close()
        if self._turn.acquire(timeout=CLOSE_LIMIT):
            try:
                self._deliver()
            finally:
                self._turn.release()

    def _own_timeout(self) -> float | None:
        """Seconds until a transfer that the device does not have is due: 0 when one has ended."""
        with self._lock:
            if self._ended:
                return 0.0
            waiting = [flight for flight in self._flights.values() if flight.inner is None]
        times = [when for flight in waiting for when in (flight.due, flight.deadline) if when is not None]
        return max(0.0, min(times) - self._clock()) if times else None

    def _end_late(self) -> None:
        """Transfers whose timeout was over before the device had them."""
        with self._lock:
            now = self._clock()
            for flight in list(self._flights.values()):
                if flight.inner is None and flight.deadline is not None and flight.deadline <= now:
                    self._end(flight, _Outcome(Status.TIMEOUT))

    def _start_due(self) -> None:
        """Transfers whose delay is over, in the order of their submission."""
        with self._lock:
            for flight in list(self._flights.values()):
                if self._is_due(flight):
                    status = self._start(flight)
                    if status != Status.SUCCESS:
                        self._end(flight, _Outcome(status, device_lost=flight.transfer.device_lost))

    def _given_back(self, inner: Transfer) -> None:
        """The device completed a transfer; its buffers are the device's again afterwards."""
        flight: _Flight = inner.context
        outcome = _Outcome(
            inner.status,
            bytes(inner.data) if inner.endpoint & 0x80 else b"",
            [IsoResult(result.status, bytes(result.data)) for result in inner.iso_results],
            inner.actual_length,
            inner.device_lost,
        )
        with self._lock:
            if flight.fault is _Fault.CORRUPT and inner.endpoint & 0x80:
                outcome = _corrupt_received(outcome, random.Random(flight.damage))
            self._end(flight, _LOST if self._gone else outcome)
        self.wake()  # when this is a thread of the device, nobody may be handling events

    def _end(self, flight: _Flight, outcome: _Outcome) -> None:
        """Let *flight* complete in handle_events, once. The lock is held."""
        if flight.outcome is None:
            flight.outcome = outcome
            self._ended.append(flight)

    def _deliver(self) -> None:
        """Complete what has ended. Completions may submit, cancel, handle events and close."""
        while True:
            with self._lock:
                if not self._ended:
                    return
                flight = self._ended.popleft()
                self._flights.pop(flight.transfer, None)
                self._count()
            self._complete(flight)

    def _count(self) -> None:
        """One more transfer has completed. The lock is held."""
        if self._left:
            self._left -= 1
            if not self._left:
                self.unplug()

    def _complete(self, flight: _Flight) -> None:
        transfer, outcome = flight.transfer, flight.outcome
        assert outcome is not None
        transfer.status = outcome.status
        transfer.actual_length = outcome.actual_length
        transfer.device_lost = outcome.device_lost
        transfer.iso_results = outcome.iso_results
        if transfer.endpoint & 0x80:
            transfer.data = outcome.data
        transfer.callback(transfer)


def _babble(transfer: Transfer, numbers: random.Random) -> _Outcome:
    if transfer.kind is TransferType.ISO:
        results = [IsoResult(Status.BABBLE, numbers.randbytes(length)) for length in transfer.iso_lengths]
        return _Outcome(Status.SUCCESS, iso_results=results, actual_length=transfer.length)
    return _Outcome(Status.BABBLE, numbers.randbytes(transfer.length), actual_length=transfer.length)


def _corrupt_received(outcome: _Outcome, numbers: random.Random) -> _Outcome:
    """What was received, with flipped bits: in one packet when it is isochronous."""
    results = list(outcome.iso_results)
    filled = [index for index, result in enumerate(results) if result.data]
    if filled:
        index = numbers.choice(filled)
        results[index] = IsoResult(results[index].status, _corrupt(results[index].data, numbers))
    return outcome._replace(data=_corrupt(outcome.data, numbers), iso_results=results)


def _corrupt(data: bytes | bytearray | memoryview, numbers: random.Random) -> bytes:
    """A copy of *data* with 1 to 8 different bits flipped; nothing can be flipped in nothing."""
    damaged = bytearray(data)
    for bit in numbers.sample(range(8 * len(damaged)), numbers.randint(1, MOST_FLIPS)) if damaged else ():
        damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


def _endpoint_of(transfer: Transfer) -> int:
    """The endpoint's address, 0 for control transfers of both directions."""
    return 0 if transfer.kind is TransferType.CONTROL else transfer.endpoint


def _checked_chance(name: str, value: object) -> float:
    if not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ValueError(f"{name} is a probability from 0 to 1, not {value!r}")
    return float(value)


def _checked_delay(name: str, value: object) -> tuple[float, float]:
    least, most = value if isinstance(value, tuple) else (value, value)
    if not isinstance(least, (int, float)) or not isinstance(most, (int, float)) or not 0 <= least <= most:
        raise ValueError(f"{name} is seconds, or the least and the most of them, not {value!r}")
    return float(least), float(most)


def _by_endpoint(
    name: str, value: object, check: Callable[[str, object], _Value], none: _Value
) -> Callable[[int], _Value]:
    """What is meant for an endpoint: the one value, or that of a mapping. Raises ValueError."""
    if not isinstance(value, Mapping):
        same = check(name, value)
        return lambda endpoint: same
    strange = [key for key in value if not isinstance(key, int) or key & ~0x8F or key == 0x80]
    if strange:
        raise ValueError(f"{name} by endpoint: {strange[0]!r} is no address; 0 is for control transfers")
    table = {key: check(name, one) for key, one in value.items()}
    return lambda endpoint: table.get(endpoint, none)
