"""Exporting that heals: one device and one address each, kept joined while devices and guests come and go.

An :class:`Exporter` owns two links, the one to its device (a :class:`DeviceSource`) and the one to its guest
(listening, or connecting again and again), each with its own small state; a :class:`~usbredir.transport.Session` exists
while there is a guest. :func:`run` polls any number of exporters in one thread. Nothing in it waits for a peer or a
device.

How data flows in a round: poll; the guest's requests; the device's completions; the answers. Then what has to be
mended: a lost device is taken from the host (the guest is told) and looked for; a guest that left makes place for the
next one.

Source: docs/exporter.md.
"""

from __future__ import annotations

import contextlib
import random
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from . import filter as _filter
from .descriptors import device_ids
from .device import UsbDevice, may_be_reset
from .errors import ConnectionClosed, DeviceError, DeviceLostError, DeviceRejectedError, ProtocolError
from .filter import FilterResult, FilterRule
from .host import check_device_filter
from .limits import Limits
from .parser import VERSION, LogLevel, escape
from .transport import (
    POLLIN,
    POLLOUT,
    TURNED_AWAY,
    Connection,
    Connector,
    Listener,
    Poller,
    Session,
    listen,
    parse_address,
)

__all__ = [
    "Connecting",
    "DeviceSource",
    "Event",
    "Exporter",
    "ExportSettings",
    "FactorySource",
    "Listening",
    "run",
]

CHECK_DEVICE = 1.0
"""Seconds between two looks for a device that is not there; sooner when the system tells of an arrival."""
RETRY_FIRST = 0.5
"""Seconds before connecting again, the first time; the wait doubles."""
RETRY_LONGEST = 10.0
"""Seconds of the longest wait; every wait is up to a quarter longer, by chance, so that many do not come at once."""
DEAF = 1.0
"""Seconds without looking for guests after one could not be accepted."""
LONGEST_CHECK = 30.0
"""Seconds between two looks for a device that fails again and again as soon as it is there."""
MOST_MESSAGES = 100
"""Log messages of a session that are told within :data:`MESSAGE_PERIOD`; a guest could fill a disk with them."""
MESSAGE_PERIOD = 10.0
"""Seconds."""
CONNECT_LIMIT = 10.0
"""Seconds that one attempt to connect may take."""


class Event(Enum):
    """What an exporter tells of."""

    LISTENING = "listening"
    CONNECTED = "connected"
    LEFT = "left"
    BROKEN = "broken"
    WAITING_FOR_DEVICE = "waiting-for-device"
    WAITING_FOR_GUEST = "waiting-for-guest"
    DEVICE_LOST = "device-lost"
    DEVICE_BACK = "device-back"
    FAILED = "failed"
    UNREACHABLE = "error"
    LOG = "log"


Report = Callable[[Event, LogLevel, str], None]


class DeviceSource(Protocol):
    """Where an exporter has its device from. Threads: the exporter's."""

    def open(self) -> UsbDevice:
        """The device, opened. After a loss the same one again, wherever it is plugged in. Raises DeviceError."""
        ...

    def pollfds(self) -> Sequence[tuple[int, int]]:
        """Descriptors that tell of arrivals, to be polled while the device is missing."""
        ...

    def has_news(self) -> bool:
        """Whether something was plugged in since the last call; called when one of its descriptors is ready."""
        ...


class FactorySource:
    """A source of devices that a function makes, for virtual devices. An unplugged one is made anew."""

    def __init__(self, make: Callable[[], UsbDevice]) -> None:
        self._make = make

    def open(self) -> UsbDevice:
        """A new device."""
        return self._make()

    def pollfds(self) -> Sequence[tuple[int, int]]:
        """None: devices are made when asked for."""
        return ()

    def has_news(self) -> bool:
        """Never."""
        return False


@dataclass(frozen=True)
class ExportSettings:
    """How to export.

    Attributes:
        once: end when the first guest has left, or the device is lost for it.
        wait: at the start, wait for a device that is not there and a guest that does not listen, in place of failing.
        rules: what may be exported at all; no rule that fits means no. None: everything.
        unanswered: seconds that sent data may stay unacknowledged, see ``Connection.keep_alive``; None: the system's.
        version: text for hello.
        limits: what a guest may make us hold.
    """

    once: bool = False
    wait: bool = False
    rules: Sequence[FilterRule] | None = None
    unanswered: float | None = None
    version: str = VERSION
    limits: Limits = field(default_factory=Limits)


# ---------------------------------------------------------------- the link to the guest


class Listening:
    """Guests come to us, one at a time. Raises what :func:`~usbredir.transport.listen` raises."""

    def __init__(self, address: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._listener: Listener = listen(address)
        self._wanted = ((self._listener.fileno(), POLLIN),)
        self._clock = clock
        self._deaf_until: float | None = None
        self.address = str(self._listener.address)

    def start(self, report: Report, *, wait: bool) -> None:
        """Tell where."""
        report(Event.LISTENING, LogLevel.INFO, f"listening on {self.address}")

    def wanted(self) -> Sequence[tuple[int, int]]:
        """Descriptors to poll."""
        return self._wanted if self._deaf_until is None else ()

    def wanted_while_busy(self) -> Sequence[tuple[int, int]]:
        """The same: who comes has to be turned away."""
        return self.wanted()

    def timeout(self) -> float | None:
        """Seconds until :meth:`step` is due by itself, or None."""
        return None if self._deaf_until is None else max(0.0, self._deaf_until - self._clock())

    def step(self, ready: Mapping[int, int], report: Report) -> Connection | None:
        """The guest that came, if one did."""
        connection = self._accept(ready, report)
        if connection is not None:
            report(Event.CONNECTED, LogLevel.INFO, f"guest connected from {connection.name}")
        return connection

    def _accept(self, ready: Mapping[int, int], report: Report) -> Connection | None:
        """Who came. An error of the system, such as too many open files, is told, and nobody heard for a while."""
        if self._deaf_until is not None and self._clock() >= self._deaf_until:
            self._deaf_until = None
        if self._listener.fileno() not in ready:
            return None
        try:
            return self._listener.accept(0)
        except OSError as error:
            self._deaf_until = self._clock() + DEAF
            report(Event.FAILED, LogLevel.WARNING, f"a guest cannot be accepted: {error.strerror or error}")
            return None

    def step_while_busy(self, ready: Mapping[int, int], session: Session, report: Report) -> None:
        """Others are turned away, unless the guest has just left: the next one may be there in the same round."""
        if self._listener.fileno() in ready and not session.is_occupied():
            return
        connection = self._accept(ready, report)
        if connection is not None:
            connection.close()
            report(Event.LOG, LogLevel.WARNING, TURNED_AWAY.format(connection.name))

    def left(self, *, served: bool) -> None:
        """The guest has left; the next one may come."""

    def close(self) -> None:
        """Stop listening."""
        self._listener.close()


class Connecting:
    """We go to the guest, again after it has left or when it is not there, less and less often.

    Raises ValueError for the form of *address*.
    """

    def __init__(
        self,
        address: str,
        *,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = lambda: random.uniform(1.0, 1.25),
    ) -> None:
        self.address = str(parse_address(address))
        self._clock = clock
        self._jitter = jitter
        self._wait = RETRY_FIRST
        self._due = 0.0
        self._connector: Connector | None = None
        self._may_fail = False
        self._told = False

    def start(self, report: Report, *, wait: bool) -> None:
        """Without *wait* the first attempt has to succeed."""
        self._may_fail = wait
        self._due = self._clock()

    def wanted(self) -> Sequence[tuple[int, int]]:
        """Descriptors to poll."""
        return () if self._connector is None else ((self._connector.fileno(), POLLOUT),)

    def wanted_while_busy(self) -> Sequence[tuple[int, int]]:
        """None: nobody else can come."""
        return ()

    def timeout(self) -> float | None:
        """Seconds until the next attempt, or until this one has taken too long."""
        return max(0.0, self._due - self._clock())

    def step(self, ready: Mapping[int, int], report: Report) -> Connection | None:
        """Go on connecting. Raises OSError when the first attempt fails, and that is not to be waited for."""
        try:
            connection = self._attempt(ready)
        except OSError as error:
            self._give_up(error, report)
            return None
        if connection is None:
            return None
        self._connector = None
        self._may_fail, self._told = True, False
        report(Event.CONNECTED, LogLevel.INFO, f"connected to {connection.name}")
        return connection

    def _attempt(self, ready: Mapping[int, int]) -> Connection | None:
        if self._connector is None:
            if self._clock() < self._due:
                return None
            self._connector = Connector(self.address)
            self._due = self._clock() + CONNECT_LIMIT
        elif self._connector.fileno() not in ready:
            if self._clock() >= self._due:
                raise TimeoutError(None, "no answer")
            return None
        return self._connector.finish()

    def _give_up(self, error: OSError, report: Report) -> None:
        """This attempt has failed: the next one comes later."""
        if self._connector is not None:
            self._connector.close()
            self._connector = None
        if not self._may_fail:
            raise error
        if not self._told:
            self._told = True
            why = error.strerror or error
            report(Event.WAITING_FOR_GUEST, LogLevel.WARNING, f"cannot connect to {self.address}: {why}; trying again")
        self._pause()

    def _pause(self) -> None:
        self._due = self._clock() + self._wait * self._jitter()
        self._wait = min(2 * self._wait, RETRY_LONGEST)

    def step_while_busy(self, ready: Mapping[int, int], session: Session, report: Report) -> None:
        """Nobody else can come."""

    def left(self, *, served: bool) -> None:
        """The guest has left: connect again, but not at once; later and later if it was none that we *served*."""
        if served:
            self._wait = RETRY_FIRST
        self._pause()

    def close(self) -> None:
        """Give up an attempt under way."""
        if self._connector is not None:
            self._connector.close()


# ---------------------------------------------------------------- an exporter


class Exporter:
    """One device at one address.

    Attributes:
        ended: nothing more will happen (``once``, or a first attempt that failed).
        error: what it ended with; None: the guest left.

    Threads: one.
    """

    def __init__(
        self,
        source: DeviceSource,
        peer: Listening | Connecting,
        report: Report,
        settings: ExportSettings = ExportSettings(),
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._source = source
        self._peer = peer
        self._report = report
        self._settings = settings
        self._clock = clock
        self._device: UsbDevice | None = None
        self._session: Session | None = None
        self._check_at: float | None = None  # when to look for the device again
        self._problem = ""  # what kept us from having it, told once
        self._failures = 0  # how often it failed as soon as it was there
        self._messages = 0  # told in this period
        self._period_ends = 0.0
        self._checked_rules: Sequence[FilterRule] | None = None
        self.ended = False
        self.error: Exception | None = None

    @property
    def address(self) -> str:
        """Where it listens, or connects to."""
        return self._peer.address

    def start(self) -> None:
        """Take the device, then begin to listen or to connect.

        Raises DeviceError unless *wait* is set and the device is only missing.
        """
        try:
            self._take_device()
        except DeviceError as error:
            if not self._settings.wait or error.reason != "missing":
                raise
            self._report(Event.WAITING_FOR_DEVICE, LogLevel.INFO, f"waiting for the device: {error}")
            self._look_later(error)
        self._peer.start(self._report, wait=self._settings.wait)

    # ------------------------------------------------------------ polling

    def wanted(self) -> list[tuple[int, int]]:
        """Descriptors to poll."""
        device = self._device
        if self._session is not None:
            wanted = self._session.wanted()  # with the device's
            wanted += self._peer.wanted_while_busy()
        else:
            wanted = [*self._peer.wanted()]
            if device is not None:
                wanted += device.pollfds()
        if device is None:
            wanted += self._source.pollfds()
        return wanted

    def timeout(self) -> float | None:
        """Seconds until :meth:`step` is due without any descriptor being ready, or None."""
        wait = None if self._device is None else self._device.next_timeout()
        if self._session is None or type(self._peer) is Listening:
            wait = _sooner(wait, self._peer.timeout())
        if self._check_at is not None:
            wait = _sooner(wait, max(0.0, self._check_at - self._clock()))
        return wait

    def step(self, ready: Mapping[int, int]) -> None:
        """One round. Raises nothing that a guest or a device can cause; see *ended* and *error*."""
        if self._session is not None:
            self._serve(self._session, ready)
        else:
            self._wait_for_guest(ready)
        device = self._device
        if device is not None and device.lost:
            self._device_lost(DeviceLostError("the device was unplugged"))
        elif device is None:
            self._look_for_device(ready)

    # ------------------------------------------------------------ the guest

    def _wait_for_guest(self, ready: Mapping[int, int]) -> None:
        try:
            if self._device is not None:
                self._device.handle_events(0)  # an idle device that is unplugged is noticed here
        except DeviceError as error:
            self._device_lost(error)
        try:
            connection = self._peer.step(ready, self._report)
        except OSError as error:  # the first attempt to connect
            why = f"cannot connect to {self.address}: {error.strerror or error}"
            self._report(Event.UNREACHABLE, LogLevel.ERROR, f"{why}; is the virtual machine listening there?")
            self._end(error)
            return
        if connection is None:
            return
        with contextlib.suppress(OSError):  # gone again: the next read tells
            connection.keep_alive(unanswered=self._settings.unanswered)
        session = Session(connection, None, version=self._settings.version, limits=self._settings.limits, log=self._log)
        self._session = session
        self._checked_rules = None
        if self._device is not None:
            self._give_device(session, self._device)

    def _serve(self, session: Session, ready: Mapping[int, int]) -> None:
        try:
            session.step(ready)
            self._check_guest_filter(session)
        except ConnectionClosed:
            self._guest_left(None, Event.LEFT, "guest left")
        except DeviceRejectedError as error:
            self._guest_left(error, Event.FAILED, str(error))
        except DeviceError as error:
            self._device_lost(error)
        except ProtocolError as error:
            self._guest_left(error, Event.FAILED, str(error))
        except OSError as error:
            self._guest_left(None, Event.BROKEN, f"connection lost: {error.strerror or error}")
        else:
            self._peer.step_while_busy(ready, session, self._report)

    def _check_guest_filter(self, session: Session) -> None:
        """The guest may tell which devices it allows; ours goes when it is not among them."""
        rules = session.host.guest_filter
        if rules is self._checked_rules or rules is None or session.host.device is None:
            return
        self._checked_rules = rules
        try:
            result = check_device_filter(rules, session.host.device)
        except ValueError as error:
            raise DeviceError(f"the device cannot be checked against the guest's filter: {error}") from error
        if result is not FilterResult.ALLOW:
            raise DeviceRejectedError("the guest's filter does not allow the device")

    def _guest_left(self, error: Exception | None, event: Event, message: str) -> None:
        self._report(event, LogLevel.INFO if error is None else LogLevel.WARNING, escape(message))
        served = self._session is not None and self._session.host.has_greeted
        self._end_session()
        if self._settings.once:
            self._end(error)
            return
        self._peer.left(served=served)
        if self._device is not None and not self._device.lost:
            try:
                self._device.claim()  # kept for the next guest
            except DeviceError as problem:
                self._device_lost(problem)

    def _end_session(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            session.close(give_back=False)
            session.connection.close()

    # ------------------------------------------------------------ the device

    def _take_device(self) -> None:
        """Open and claim the device. Raises DeviceError."""
        device = self._source.open()
        try:
            self._check_own_filter(device)
            device.claim()
        except BaseException:
            device.close()
            raise
        self._device = device
        self._check_at = None

    def _check_own_filter(self, device: UsbDevice) -> None:
        rules = self._settings.rules
        if rules is None:
            return
        try:
            ids = device_ids(device.device_descriptor, device.configuration_descriptor)
            result = _filter.check(rules, ids)
        except ValueError as error:
            raise DeviceError(f"the device cannot be checked against --filter: {error}") from error
        if result is not FilterResult.ALLOW:
            why = "a rule denies it" if result is FilterResult.DENY else "no rule allows it"
            raise DeviceError(
                f"the device {ids.vendor_id:04x}:{ids.product_id:04x} may not be exported: {why} (--filter)",
                reason="filtered",
            )

    def _give_device(self, session: Session, device: UsbDevice) -> bool:
        """Announce *device* to the guest. False: it cannot be used."""
        self._checked_rules = None
        try:
            session.host.set_device(device)
        except DeviceError as error:
            self._failures += 1
            self._device_lost(error)
            return False
        self._failures = 0
        self._problem = ""
        return True

    def _device_lost(self, error: DeviceError) -> None:
        """Tell the guest, let the device go, and look for it from now on."""
        if str(error) != self._problem:  # the same failure, again and again, is told once
            self._report(Event.DEVICE_LOST, LogLevel.WARNING, escape(str(error)))
        session = self._session
        if session is not None:
            session.host.set_device(None)
        self._let_device_go()
        if self._settings.once and not self._settings.wait and session is not None:
            self._end_session()
            self._end(error)
            return
        self._look_later(error)

    def _let_device_go(self) -> None:
        device, self._device = self._device, None
        if device is not None:
            with contextlib.suppress(DeviceError):
                device.release(give_back=True, reset=may_be_reset(device.device_descriptor))
            with contextlib.suppress(DeviceError):
                device.close()

    def _look_later(self, error: DeviceError) -> None:
        self._check_at = self._clock() + min(CHECK_DEVICE * 2 ** max(0, self._failures - 1), LONGEST_CHECK)
        self._problem = str(error)

    def _look_for_device(self, ready: Mapping[int, int]) -> None:
        """Take the device as soon as it is back."""
        if self._check_at is None or self.ended:
            return
        fds = {descriptor for descriptor, _ in self._source.pollfds()}
        arrived = not fds.isdisjoint(ready) and self._source.has_news()
        if not arrived and self._clock() < self._check_at:
            return
        try:
            self._take_device()
        except DeviceError as error:
            if error.reason == "final":
                self._report(Event.FAILED, LogLevel.WARNING, escape(str(error)))
                self._end(error)
                return
            if error.reason != "missing" and str(error) != self._problem:
                # Just plugged in, perhaps, and its file not yet ours: told once, tried again.
                self._report(Event.WAITING_FOR_DEVICE, LogLevel.WARNING, escape(str(error)))
            self._look_later(error)
            _clear_frames(error)
            return
        session, device = self._session, self._device
        if session is None or device is None or self._give_device(session, device):
            self._report(Event.DEVICE_BACK, LogLevel.INFO, "the device is there")

    # ------------------------------------------------------------ the end

    def _end(self, error: Exception | None) -> None:
        self.ended = True
        self.error = error
        self.close()

    def close(self) -> None:
        """End the session and give the device back. Idempotent."""
        self._end_session()
        self._let_device_go()
        self._peer.close()
        self._check_at = None

    def _log(self, level: LogLevel, message: str) -> None:
        """A message of the host, unless there are too many: a guest causes most of them."""
        now = self._clock()
        if now >= self._period_ends:
            suppressed, self._messages = self._messages - MOST_MESSAGES, 0
            self._period_ends = now + MESSAGE_PERIOD
            if suppressed > 0:
                self._report(Event.LOG, LogLevel.WARNING, f"{suppressed} more messages were not shown")
        self._messages += 1
        if self._messages <= MOST_MESSAGES:
            self._report(Event.LOG, level, message)


def _clear_frames(error: BaseException | None) -> None:
    """The frames that an error came through hold what was tried, and with that descriptors, until some collection."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _sooner(one: float | None, other: float | None) -> float | None:
    """The shorter of two waits; None is for ever."""
    if one is None or other is None:
        return other if one is None else one
    return min(one, other)


def run(exporters: Sequence[Exporter], *, stop_fd: int | None = None) -> None:
    """Run *exporters*, which were started, until all have ended or *stop_fd* becomes readable; then close them.

    Raises nothing that guests or devices can cause. Threads: one.
    """
    poller = Poller()
    stop = [] if stop_fd is None else [(stop_fd, POLLIN)]
    try:
        running = list(exporters)
        while running:
            wanted, wait = stop[:], None
            for exporter in running:
                wanted += exporter.wanted()
                wait = _sooner(wait, exporter.timeout())
            ready = poller.wait(wanted, wait)
            if stop_fd is not None and stop_fd in ready:
                return
            for exporter in running:
                exporter.step(ready)
                if exporter.ended:
                    running = [one for one in running if one is not exporter]
    finally:
        with contextlib.ExitStack() as stack:  # one that cannot be closed does not keep the others open
            for exporter in exporters:
                stack.callback(exporter.close)
