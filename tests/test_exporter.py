"""Exporting that heals: devices and guests that come and go, in every order.

Each exporter runs in the test's own thread: whoever waits, runs it. Its clock is the test's; sockets are real.
"""

from __future__ import annotations

import contextlib
import gc
import socket
import struct
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import usbredir.device
from usbredir import exporter, filter, transport
from usbredir.device import UsbDevice
from usbredir.errors import (
    ConnectionClosed,
    DeviceClaimError,
    DeviceError,
    DeviceLostError,
    DeviceNotFoundError,
    DeviceRejectedError,
    RemoteProtocolError,
)
from usbredir.exporter import (
    CHECK_DEVICE,
    CONNECT_LIMIT,
    RETRY_LONGEST,
    Connecting,
    Event,
    Exporter,
    ExportSettings,
    FactorySource,
    Listening,
    run,
)
from usbredir.filter import FilterRule
from usbredir.guest import Guest
from usbredir.packets import GetAltSetting, GetConfiguration
from usbredir.parser import LogLevel
from usbredir.proto import PacketType, Status
from usbredir.transport import POLLIN, POLLOUT, Connection, GuestConnection, connect, listen, poll
from usbredir.virtual import LoopbackDevice, MassStorage

from .strategies import raw_hello, raw_packet

PATIENCE = 30.0
"""Seconds after which something that should have happened counts as never."""
STEP = 0.02
"""Seconds that one round waits at most, as nothing tells when the test's clock has moved."""
ALL_CAPABILITIES = 0xFF


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Source:
    """A device source that follows a script: devices, and errors to raise; the last entry repeats."""

    def __init__(self, *script: UsbDevice | DeviceError) -> None:
        self.script = list(script)
        self.opened = 0
        self.reader, self.writer = socket.socketpair()

    def open(self) -> UsbDevice:
        self.opened += 1
        entry = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        if isinstance(entry, DeviceError):
            raise entry
        return entry

    def pollfds(self) -> Sequence[tuple[int, int]]:
        return ((self.reader.fileno(), POLLIN),)

    def has_news(self) -> bool:
        return self.reader.recv(100) != b"false alarm"

    def close(self) -> None:
        self.reader.close()
        self.writer.close()


class Bench:
    """Exporters, run by whoever waits; what they report is kept."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.exporters: list[Exporter] = []
        self.events: list[tuple[Event, LogLevel, str]] = []
        self.closing = contextlib.ExitStack()

    def add(
        self,
        source: exporter.DeviceSource,
        peer: Listening | Connecting | None = None,
        settings: ExportSettings | None = None,
    ) -> Exporter:
        """An exporter, started."""
        added = Exporter(
            source,
            peer or Listening("127.0.0.1:0"),
            lambda *event: self.events.append(event),
            settings or ExportSettings(),
            clock=self.clock,
        )
        self.closing.callback(added.close)
        if isinstance(source, Source):
            self.closing.callback(source.close)
        self.exporters.append(added)
        added.start()
        return added

    def loopback(self, peer: Listening | Connecting | None = None, **settings: Any) -> Exporter:
        """An exporter of a loopback device, that is made anew after it was unplugged."""
        return self.add(FactorySource(LoopbackDevice), peer, ExportSettings(**settings))

    def round(self, timeout: float = STEP, *others: tuple[int, int]) -> None:
        """One round of every exporter."""
        running = [one for one in self.exporters if not one.ended]
        waits = [wait for one in running if (wait := one.timeout()) is not None]
        ready = poll([*others, *(pair for one in running for pair in one.wanted())], min([timeout, STEP, *waits]))
        for one in running:
            one.step(ready)

    def until(self, done: Callable[[], object]) -> None:
        """Run until *done*."""
        end = time.monotonic() + PATIENCE
        while not done():
            assert time.monotonic() < end, f"it did not happen; events: {self.events}"
            self.round()

    def until_event(self, event: Event, count: int = 1) -> str:
        """Run until *event* was reported; its latest message."""
        self.until(lambda: len(self.messages(event)) >= count)
        return self.messages(event)[-1]

    def messages(self, event: Event) -> list[str]:
        """What was reported of a kind."""
        return [message for kind, _, message in self.events if kind is event]

    @property
    def kinds(self) -> list[Event]:
        """What was reported, in order, without log messages."""
        return [kind for kind, _, _ in self.events if kind is not Event.LOG]

    def guest(self, address: str | None = None, **options: Any) -> Guest:
        """A guest whose calls run the exporters."""
        return self.guest_on(connect(address or self.exporters[0].address, PATIENCE), **options)

    def guest_on(self, connection: Connection, **options: Any) -> Guest:
        self.closing.callback(connection.close)
        guest = Guest(GuestEnd(connection, self), **options)
        self.closing.callback(guest.close)
        return guest


class GuestEnd(GuestConnection):
    """The end of a guest in the same thread as the exporters."""

    def __init__(self, connection: Connection, bench: Bench) -> None:
        super().__init__(connection)
        self.bench = bench

    def wait(self, timeout: float | None, *, writing: bool) -> None:
        events = POLLIN | (POLLOUT if writing else 0)
        self.bench.round(STEP if timeout is None else timeout, (self.connection.fileno(), events))


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    with bench.closing:
        yield bench


def leave(guest: Guest) -> None:
    guest._callbacks.connection.close()  # type: ignore[attr-defined]


def works(guest: Guest) -> None:
    """The guest has a device, and it answers."""
    guest.wait_for_device(PATIENCE)
    assert guest.bulk_out(0x01, b"hello", timeout=PATIENCE).status == Status.SUCCESS
    assert guest.bulk_in(0x81, 64, timeout=PATIENCE).data == b"hello"


def greeted(bench: Bench, guest: Guest) -> None:
    """The guest has had the hello."""

    def done() -> str:
        guest.process()
        return guest.host_version

    bench.until(done)


# ================================================================ guests come and go


def test_one_guest_after_the_other(bench: Bench) -> None:
    """The device stays ours, reset for each of them."""
    device = LoopbackDevice()
    source = Source(device)
    bench.add(source)
    for number in range(3):
        guest = bench.guest()
        works(guest)
        leave(guest)
        bench.until_event(Event.LEFT, number + 1)
    assert source.opened == 1
    assert device.counters["resets"] >= 3
    assert bench.kinds == [Event.LISTENING, *[Event.CONNECTED, Event.LEFT] * 3]


def test_another_guest_is_turned_away(bench: Bench) -> None:
    """At once; the first one does not notice."""
    bench.loopback()
    first = bench.guest()
    works(first)
    second = bench.guest()
    with pytest.raises((ConnectionClosed, OSError)):
        second.wait_for_device(PATIENCE)
    assert "turned away" in bench.messages(Event.LOG)[-1]
    works(first)


def test_a_guest_that_follows_at_once_is_not_turned_away(bench: Bench) -> None:
    """The former one's last words, its end, and the next one, all in one round."""
    bench.loopback()
    former = bench.guest()
    works(former)
    former._exchange.parser.send(GetConfiguration(id=99))
    former._exchange.parser.do_write()
    leave(former)
    works(bench.guest())
    assert not [message for message in bench.messages(Event.LOG) if "turned away" in message]


def test_a_connection_that_breaks(bench: Bench) -> None:
    """A reset by the peer is told, and the next one is served."""
    bench.loopback()
    guest = bench.guest()
    works(guest)
    connection = guest._callbacks.connection  # type: ignore[attr-defined]
    connection._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    leave(guest)
    assert "reset" in bench.until_event(Event.BROKEN)
    works(bench.guest())


@pytest.mark.parametrize(
    ("act", "told"),
    [
        (lambda guest: guest.reject(), "the guest refuses the device"),
        (lambda guest: guest._callbacks.write(memoryview(raw_packet(99))), "packet"),
    ],
    ids=["refuses", "breaks the protocol"],
)
def test_guests_that_fail(bench: Bench, act: Callable[[Guest], object], told: str) -> None:
    """The connection is closed, the reason told, the next guest served."""
    bench.loopback()
    guest = bench.guest()
    works(guest)
    act(guest)
    assert told in bench.until_event(Event.FAILED)
    with pytest.raises((ConnectionClosed, OSError)):
        bench.until(guest.process)
    works(bench.guest())


def test_a_guest_that_does_not_read_holds_up_nothing(bench: Bench) -> None:
    """It starts streams and goes to sleep: the device's end is noticed, and so is the guest's."""
    device = LoopbackDevice(interrupt_period=0)
    bench.add(Source(device, DeviceNotFoundError("gone")))
    guest = bench.guest()
    guest.wait_for_device(PATIENCE)
    assert guest.start_bulk_receiving(0x82, 1 << 16, 16, timeout=PATIENCE) == Status.SUCCESS
    session = bench.exporters[0]._session
    assert session is not None
    bench.until(lambda: session.host.buffered_output_size() > 1 << 20)
    device.unplug()
    bench.until_event(Event.DEVICE_LOST)
    leave(guest)
    bench.until(lambda: bench.exporters[0]._session is None)


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="no such option here")
def test_a_guest_that_confirms_nothing_is_given_up(bench: Bench) -> None:
    """With a limit: as a paused virtual machine, whose system confirms probes but takes no data."""
    bench.loopback(unanswered=0.2)
    guest = bench.guest()
    guest.wait_for_device(PATIENCE)
    assert guest.start_bulk_receiving(0x82, 1 << 16, 16, timeout=PATIENCE) == Status.SUCCESS
    assert "timed out" in bench.until_event(Event.BROKEN)
    works(bench.guest())


def test_keep_alive_is_on(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the limit that was chosen."""
    seen: list[object] = []
    monkeypatch.setattr(Connection, "keep_alive", lambda self, **options: seen.append(options))
    bench.loopback(unanswered=7.5)
    works(bench.guest())
    assert seen == [{"unanswered": 7.5}]


def test_a_connection_without_keep_alive_is_served(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def keep_alive(self: Connection, **options: object) -> None:
        raise OSError("not here")

    monkeypatch.setattr(Connection, "keep_alive", keep_alive)
    bench.loopback()
    works(bench.guest())


# ================================================================ devices come and go


def test_unplugged_and_plugged_in_again(bench: Bench) -> None:
    """The guest is told, and has it again on the same connection; nothing is restarted."""
    device = LoopbackDevice()
    bench.add(Source(device, LoopbackDevice(serial="again")))
    guest = bench.guest()
    works(guest)
    assert guest.control_out(0x40, 0x10, 0, 0, timeout=PATIENCE).status == Status.SUCCESS
    guest.wait_for_disconnect(PATIENCE)
    bench.until_event(Event.DEVICE_LOST)
    bench.clock.now += CHECK_DEVICE
    works(guest)
    assert bench.kinds == [Event.LISTENING, Event.CONNECTED, Event.DEVICE_LOST, Event.DEVICE_BACK]
    assert device._closed, "the lost one was let go"


@pytest.mark.parametrize("endpoint", [0x86, None], ids=["a transfer under way", "idle"])
def test_unplugged_under_a_guest(bench: Bench, endpoint: int | None) -> None:
    """At any time, whether something is asked of it or not; a request under way is answered or void."""
    device = LoopbackDevice()
    bench.add(Source(device, DeviceNotFoundError("no device")))
    guest = bench.guest()
    works(guest)
    if endpoint is None:
        device.unplug()
        guest.wait_for_disconnect(PATIENCE)
    else:
        device.call_later(0.01, device.unplug)
        with contextlib.suppress(DeviceLostError):
            assert guest.bulk_in(endpoint, 64, timeout=PATIENCE).status == Status.IOERROR
        guest.wait_for_disconnect(PATIENCE)
    bench.until_event(Event.DEVICE_LOST)


def test_unplugged_without_a_guest(bench: Bench) -> None:
    """Noticed all the same; the guest that comes has the new one."""
    first = LoopbackDevice()
    bench.add(Source(first, LoopbackDevice()))
    first.unplug()
    assert "unplugged" in bench.until_event(Event.DEVICE_LOST)
    bench.clock.now += CHECK_DEVICE
    bench.until_event(Event.DEVICE_BACK)
    works(bench.guest())


def test_a_guest_that_comes_while_there_is_no_device(bench: Bench) -> None:
    """It is greeted, and has the device as soon as that is there."""
    first = LoopbackDevice()
    bench.add(Source(first, DeviceNotFoundError("not yet"), LoopbackDevice()))
    first.unplug()
    bench.until_event(Event.DEVICE_LOST)
    guest = bench.guest()
    greeted(bench, guest)
    assert guest.device is None
    for _ in range(2):
        bench.clock.now += CHECK_DEVICE
        bench.round()
    works(guest)


def test_offered_again_only_after_the_guest_has_confirmed(bench: Bench) -> None:
    """A guest that can confirm a disconnection has to, before it is told of another device."""
    first = LoopbackDevice()
    bench.add(Source(first, LoopbackDevice()))
    connection = connect(bench.exporters[0].address, PATIENCE)
    bench.closing.callback(connection.close)
    received = b""

    def types() -> list[int]:
        nonlocal received
        received += connection.read(1 << 16) or b""
        found, position = [], 0
        while position + 12 <= len(received):
            number, length = struct.unpack_from("<II", received, position)
            found.append(number)
            # hello has the narrow header: capabilities are not settled yet
            position += (12 if len(found) == 1 else 16) + length
        return found

    connection.write(memoryview(raw_hello(ALL_CAPABILITIES)))
    bench.until(lambda: PacketType.DEVICE_CONNECT in types())
    first.unplug()
    bench.until(lambda: PacketType.DEVICE_DISCONNECT in types())
    bench.clock.now += CHECK_DEVICE
    bench.until_event(Event.DEVICE_BACK)
    bench.round()
    assert types().count(PacketType.DEVICE_CONNECT) == 1
    connection.write(memoryview(raw_packet(PacketType.DEVICE_DISCONNECT_ACK)))
    bench.until(lambda: types().count(PacketType.DEVICE_CONNECT) == 2)


def test_the_system_tells_of_an_arrival(bench: Bench) -> None:
    """Then it is looked for at once; a false alarm does not count."""
    first = LoopbackDevice()
    source = Source(first, LoopbackDevice())
    bench.add(source)
    first.unplug()
    bench.until_event(Event.DEVICE_LOST)
    for _ in range(3):
        bench.round()
    source.writer.send(b"false alarm")
    for _ in range(3):
        bench.round()
    assert source.opened == 1
    source.writer.send(b"news")
    bench.until_event(Event.DEVICE_BACK)
    assert bench.clock.now == 1000.0


def test_looked_for_now_and_then(bench: Bench) -> None:
    """Not more often than once per interval; what keeps it from being used is told once."""
    first = LoopbackDevice()
    forbidden = DeviceClaimError("not yet ours\x1b", reason="forbidden")
    missing = DeviceNotFoundError("still missing")
    source = Source(first, missing, forbidden, forbidden, forbidden, LoopbackDevice())
    bench.add(source)
    first.unplug()
    bench.until_event(Event.DEVICE_LOST)
    for opened in range(2, 6):
        bench.round()
        bench.round()
        assert source.opened == opened - 1
        bench.clock.now += CHECK_DEVICE
        bench.round()
        assert source.opened == opened
    bench.clock.now += CHECK_DEVICE
    bench.until_event(Event.DEVICE_BACK)
    assert bench.messages(Event.WAITING_FOR_DEVICE) == ["not yet ours\\x1b"]


def test_looking_holds_on_to_nothing(bench: Bench) -> None:
    """Every look at a real bus opens descriptors: what a failed one found must go with it, not with some collection."""
    looked_at: list[weakref.ref[object]] = []

    class Looking(Source):
        def open(self) -> UsbDevice:
            if not self.opened:
                return super().open()
            self.opened += 1
            found = LoopbackDevice()
            looked_at.append(weakref.ref(found))
            error: DeviceError | None = None
            try:
                raise OSError(f"{found} does not open")
            except OSError as cause:
                error = DeviceClaimError("busy")
                raise error from cause  # a cycle: the error, this frame, the error

    first = LoopbackDevice()
    bench.add(Looking(first))
    first.unplug()
    bench.until_event(Event.DEVICE_LOST)
    gc.disable()
    try:
        bench.clock.now += CHECK_DEVICE
        bench.until(lambda: looked_at)
        assert looked_at[0]() is None
    finally:
        gc.enable()


class Stubborn(LoopbackDevice):
    """A device whose claim fails, from a given time on."""

    fails = False

    def claim(self) -> None:
        if self.fails:
            raise DeviceClaimError("taken by another program")
        super().claim()


def test_taken_by_another_program_between_two_guests(bench: Bench) -> None:
    """It counts as lost, and is tried again."""
    device = Stubborn()
    bench.add(Source(device, LoopbackDevice()))
    guest = bench.guest()
    works(guest)
    device.fails = True
    leave(guest)
    assert bench.until_event(Event.DEVICE_LOST) == "taken by another program"
    bench.clock.now += CHECK_DEVICE
    works(bench.guest())


def test_taken_by_another_program_when_the_guest_comes(bench: Bench) -> None:
    """The guest stays, without a device."""
    device = Stubborn()
    bench.add(Source(device, LoopbackDevice()))
    device.fails = True
    guest = bench.guest()
    bench.until_event(Event.DEVICE_LOST)
    bench.clock.now += CHECK_DEVICE
    works(guest)


def test_lost_in_a_reset(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guest resets it, and it does not come back."""
    device = LoopbackDevice()
    bench.add(Source(device, LoopbackDevice()))
    guest = bench.guest()
    works(guest)

    def reset() -> None:
        raise DeviceLostError("it came back as another one")

    monkeypatch.setattr(device, "reset", reset)
    guest.reset()
    guest.wait_for_disconnect(PATIENCE)
    bench.until_event(Event.DEVICE_LOST)
    bench.clock.now += CHECK_DEVICE
    works(guest)


def test_a_missing_device_is_waited_for(bench: Bench) -> None:
    """With *wait*; guests may come before it."""
    bench.add(Source(DeviceNotFoundError("none"), LoopbackDevice()), settings=ExportSettings(wait=True))
    assert bench.kinds == [Event.WAITING_FOR_DEVICE, Event.LISTENING]
    guest = bench.guest()
    greeted(bench, guest)
    bench.clock.now += CHECK_DEVICE
    works(guest)


@pytest.mark.parametrize(
    ("error", "wait"),
    [(DeviceNotFoundError("none"), False), (DeviceClaimError("busy"), True), (DeviceError("unusable"), True)],
)
def test_devices_that_are_not_waited_for(bench: Bench, error: DeviceError, wait: bool) -> None:
    """Without *wait*; and what waiting does not mend."""
    with pytest.raises(DeviceError) as raised:
        bench.add(Source(error), settings=ExportSettings(wait=wait))
    assert raised.value is error


# ================================================================ once


def test_once_ends_with_the_guest(bench: Bench) -> None:
    device = LoopbackDevice()
    one = bench.add(Source(device), settings=ExportSettings(once=True))
    guest = bench.guest()
    works(guest)
    leave(guest)
    bench.until(lambda: one.ended)
    assert one.error is None
    assert device._closed
    with pytest.raises(OSError, match="refused"):
        connect(one.address, PATIENCE)


@pytest.mark.parametrize(
    ("act", "kind"),
    [
        (lambda guest, device: guest.reject(), DeviceRejectedError),
        (lambda guest, device: guest._callbacks.write(memoryview(raw_packet(99))), RemoteProtocolError),
        (lambda guest, device: device.unplug(), DeviceLostError),
    ],
    ids=["refused", "protocol", "lost"],
)
def test_once_ends_with_what_went_wrong(
    bench: Bench, act: Callable[[Guest, LoopbackDevice], object], kind: type[Exception]
) -> None:
    device = LoopbackDevice()
    one = bench.add(Source(device), settings=ExportSettings(once=True))
    guest = bench.guest()
    works(guest)
    act(guest, device)
    bench.until(lambda: one.ended)
    assert isinstance(one.error, kind)


def test_once_with_wait_survives_a_loss(bench: Bench) -> None:
    device = LoopbackDevice()
    bench.add(Source(device, LoopbackDevice()), settings=ExportSettings(once=True, wait=True))
    guest = bench.guest()
    works(guest)
    device.unplug()
    guest.wait_for_disconnect(PATIENCE)
    bench.until_event(Event.DEVICE_LOST)
    bench.clock.now += CHECK_DEVICE
    works(guest)


# ================================================================ filters

EVERYTHING, NOTHING, STORAGE = "-1,-1,-1,-1,1", "-1,-1,-1,-1,0", "0x08,-1,-1,-1,1"


@pytest.mark.parametrize(
    ("rules", "why"), [(EVERYTHING, None), (NOTHING, "a rule denies it"), (STORAGE, "no rule allows it")]
)
def test_our_own_filter(bench: Bench, rules: str, why: str | None) -> None:
    """What may be exported at all."""
    settings = ExportSettings(rules=filter.parse(rules))
    device = LoopbackDevice()
    if why is None:
        bench.add(Source(device), settings=settings)
        works(bench.guest())
        return
    with pytest.raises(DeviceError, match=f"1209:0001.*{why}") as raised:
        bench.add(Source(device), settings=settings)
    assert raised.value.reason == "filtered"
    assert device._closed


class Foreign(LoopbackDevice):
    """Of another vendor."""

    vendor_id = 0x120A


def test_another_device_at_the_same_place_is_filtered_as_well(bench: Bench) -> None:
    """After a loss the rules hold for what comes back."""
    first = LoopbackDevice()
    rules = filter.parse("-1,0x1209,-1,-1,1")
    bench.add(Source(first, Foreign(), LoopbackDevice()), settings=ExportSettings(rules=rules))
    first.unplug()
    bench.until_event(Event.DEVICE_LOST)
    bench.clock.now += CHECK_DEVICE
    assert "120a:0001 may not be exported" in bench.until_event(Event.WAITING_FOR_DEVICE)
    bench.clock.now += CHECK_DEVICE
    bench.until_event(Event.DEVICE_BACK)


@pytest.mark.parametrize(("rules", "allowed"), [(EVERYTHING, True), (NOTHING, False), (STORAGE, False)])
def test_the_guests_filter(bench: Bench, rules: str, allowed: bool) -> None:
    """Rules that a guest tells are honoured."""
    bench.loopback()
    guest = bench.guest(rules=filter.parse(rules))
    if allowed:
        works(guest)
        works(guest)
        return
    with pytest.raises((ConnectionClosed, OSError)):
        bench.until(lambda: guest.process())
    assert bench.messages(Event.FAILED) == ["the guest's filter does not allow the device"]
    works(bench.guest())


# ================================================================ going to the guest


def dead_address() -> str:
    with listen("127.0.0.1:0") as listener:
        return str(listener.address)


def connecting(bench: Bench, address: str) -> Connecting:
    """Waits as long as told, without chance."""
    return Connecting(address, clock=bench.clock, jitter=lambda: 1.0)


def test_connecting_to_a_guest_again_and_again(bench: Bench) -> None:
    """After it has left, not at once."""
    with listen("127.0.0.1:0") as listener:
        bench.loopback(connecting(bench, str(listener.address)))
        for number in range(3):
            bench.until_event(Event.CONNECTED, number + 1)
            connection = listener.accept(PATIENCE)
            assert connection is not None
            guest = bench.guest_on(connection)
            works(guest)
            leave(guest)
            bench.until_event(Event.LEFT, number + 1)
            for _ in range(3):
                bench.round()
            assert len(bench.messages(Event.CONNECTED)) == number + 1, "not at once"
            assert 0 < (bench.exporters[0].timeout() or 0) <= 0.5
            bench.clock.now += 0.5


def test_nobody_answers_at_first(bench: Bench) -> None:
    """Without *wait* that is the end."""
    one = bench.loopback(connecting(bench, dead_address()))
    bench.until(lambda: one.ended)
    assert isinstance(one.error, ConnectionRefusedError)


def test_the_first_attempt_may_fail_while_it_begins(bench: Bench, tmp_path: Path) -> None:
    """A Unix socket that is not there."""
    one = bench.loopback(connecting(bench, f"unix:{tmp_path}/none"))
    bench.until(lambda: one.ended)
    assert isinstance(one.error, FileNotFoundError)


def test_waiting_for_a_guest(bench: Bench) -> None:
    """Less and less often, told once; a success begins anew."""
    where = dead_address()
    one = bench.loopback(connecting(bench, where), wait=True)
    waits: list[float] = []
    for _ in range(7):
        bench.until(lambda: one._peer._connector is None and one.timeout())  # type: ignore[union-attr]
        waits.append(one.timeout() or 0.0)
        bench.clock.now += waits[-1]
        bench.round()
    assert waits == [0.5, 1.0, 2.0, 4.0, 8.0, RETRY_LONGEST, RETRY_LONGEST]
    assert bench.messages(Event.WAITING_FOR_GUEST) == [f"cannot connect to {where}: Connection refused; trying again"]
    with listen(where) as listener:
        bench.clock.now += RETRY_LONGEST
        bench.until_event(Event.CONNECTED)
        connection = listener.accept(PATIENCE)
        assert connection is not None
        guest = bench.guest_on(connection)
        works(guest)
        leave(guest)
        bench.until_event(Event.LEFT)
        assert one.timeout() == 0.5


def test_waits_are_spread() -> None:
    """Up to a quarter longer, by chance."""
    values = {Connecting("127.0.0.1:1")._jitter() for _ in range(50)}
    assert len(values) > 10
    assert all(1.0 <= value <= 1.25 for value in values)


def test_an_attempt_that_takes_too_long(bench: Bench) -> None:
    """Nobody accepts, nobody refuses: given up, and tried again."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        where = "{}:{}".format(*server.getsockname())
        with contextlib.ExitStack() as waiting:
            for _ in range(4):  # as many as fit, and more
                one = waiting.enter_context(socket.socket())
                one.setblocking(False)
                one.connect_ex(server.getsockname())
            exporter = bench.loopback(connecting(bench, where), wait=True)
            bench.round()
            bench.round()
            assert exporter.timeout() == pytest.approx(CONNECT_LIMIT)
            bench.clock.now += CONNECT_LIMIT
            assert "no answer" in bench.until_event(Event.WAITING_FOR_GUEST)


def test_an_attempt_under_way_is_given_up_at_the_end(bench: Bench) -> None:
    peer = connecting(bench, dead_address())
    one = bench.loopback(peer, wait=True)
    peer._connector = transport.Connector(peer.address)
    descriptor = peer._connector._socket
    one.close()
    assert descriptor.fileno() == -1


# ================================================================ several, and the end


def test_several_devices_at_once(bench: Bench, tmp_path: Path) -> None:
    """In one thread; each has its guest."""
    bench.loopback()
    bench.loopback(Listening(f"unix:{tmp_path}/usb.sock"))
    guests = [bench.guest(one.address) for one in bench.exporters]
    for guest in guests * 2:
        works(guest)
    leave(guests[0])
    bench.until_event(Event.LEFT)
    works(guests[1])


def test_running_until_told_to_stop() -> None:
    """The loop, in a thread of its own; everything is closed then."""
    device = LoopbackDevice()
    one = Exporter(FactorySource(lambda: device), Listening("127.0.0.1:0"), lambda *event: None)
    other = Exporter(FactorySource(LoopbackDevice), Listening("127.0.0.1:0"), lambda *event: None)
    reader, writer = socket.socketpair()
    with reader, writer:
        one.start()
        other.start()
        thread = threading.Thread(target=run, args=([one, other],), kwargs={"stop_fd": reader.fileno()}, daemon=True)
        thread.start()
        for address in (one.address, other.address):
            with connect(address, PATIENCE) as connection, Guest(GuestConnection(connection)) as guest:
                works(guest)
        writer.send(b"x")
        thread.join(PATIENCE)
        assert not thread.is_alive()
    assert device._closed
    for address in (one.address, other.address):
        with pytest.raises(OSError, match="refused"):
            connect(address, PATIENCE)


def test_running_until_all_have_ended() -> None:
    settings = ExportSettings(once=True)
    one = Exporter(FactorySource(LoopbackDevice), Listening("127.0.0.1:0"), lambda *event: None, settings)
    one.start()
    thread = threading.Thread(target=run, args=([one],), daemon=True)
    thread.start()
    with connect(one.address, PATIENCE) as connection, Guest(GuestConnection(connection)) as guest:
        works(guest)
    thread.join(PATIENCE)
    assert not thread.is_alive()
    assert one.ended


def test_closing_is_idempotent(bench: Bench) -> None:
    one = bench.loopback()
    guest = bench.guest()
    works(guest)
    one.close()
    one.close()
    bench.exporters.clear()
    with pytest.raises((ConnectionClosed, OSError)):
        guest.wait_for_disconnect(PATIENCE)


# ================================================================ what must not end it


class Failing(LoopbackDevice):
    """A device that raises in handle_events when it is told to."""

    error: DeviceError | None = None

    def handle_events(self, timeout: float | None = 0.0) -> None:
        if self.error is not None:
            raise self.error
        super().handle_events(timeout)


@pytest.mark.parametrize("error", [DeviceLostError("gone"), DeviceError("libusb cannot handle events")], ids=repr)
@pytest.mark.parametrize("served", [True, False])
def test_a_device_whose_events_fail(bench: Bench, error: DeviceError, served: bool) -> None:
    """With a guest and without one: it counts as lost, and the next one is taken."""
    device = Failing()
    bench.add(Source(device, LoopbackDevice()))
    guest = bench.guest()
    works(guest)
    if not served:
        leave(guest)
        bench.until_event(Event.LEFT)
    device.error = error
    assert bench.until_event(Event.DEVICE_LOST) == str(error)
    bench.clock.now += CHECK_DEVICE
    if served:
        guest.wait_for_disconnect(PATIENCE)
    works(guest if served else bench.guest())


def test_a_guest_that_cannot_be_accepted(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too many open files: told once, and nobody is heard for a while; the listener does not keep the loop busy."""
    one = bench.loopback()
    accept = transport.Listener.accept

    def fail(self: transport.Listener, timeout: float | None = None) -> Connection | None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(transport.Listener, "accept", fail)
    guest = bench.guest()
    assert "Too many open files" in bench.until_event(Event.FAILED)
    assert not one.ended
    assert not one.wanted() or not poll(one.wanted(), 0)
    assert one.timeout() is not None
    monkeypatch.setattr(transport.Listener, "accept", accept)
    bench.clock.now += exporter.DEAF
    works(guest)
    assert len(bench.messages(Event.FAILED)) == 1


def test_others_are_turned_away_while_reading_pauses(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest that says no more and reads nothing must not leave the next one waiting, and the loop running."""
    one = bench.loopback()
    works(bench.guest())
    session = one._session
    assert session is not None
    monkeypatch.setattr(type(session.host), "reading_paused", property(lambda self: True))
    monkeypatch.setattr(session.connection, "at_end", lambda: True)
    bench.guest()
    bench.until(lambda: any("turned away" in message for message in bench.messages(Event.LOG)))


def test_messages_are_limited(bench: Bench) -> None:
    """A guest causes one with every wrong request: the rest is counted."""
    bench.loopback()
    guest = bench.guest()
    works(guest)
    for number in range(1000):
        guest._exchange.parser.send(GetAltSetting(id=number, interface=99))
    guest.process()
    assert guest.get_configuration(timeout=PATIENCE)[0] == Status.SUCCESS
    assert len(bench.messages(Event.LOG)) <= exporter.MOST_MESSAGES + 1
    bench.clock.now += exporter.MESSAGE_PERIOD
    guest.get_alt_setting(99, timeout=PATIENCE)
    assert any("more messages were not shown" in message for message in bench.messages(Event.LOG))


def test_the_filter_of_the_guest_holds_for_the_next_device(bench: Bench) -> None:
    """Also when it was told before that device came."""
    first = LoopbackDevice()
    bench.add(Source(first, MassStorage(bytes(1 << 20))))
    rules = [FilterRule(0x08, -1, -1, -1, False), FilterRule(-1, -1, -1, -1, True)]
    guest = bench.guest(rules=rules)
    works(guest)
    first.unplug()
    bench.until_event(Event.DEVICE_LOST)
    bench.clock.now += CHECK_DEVICE
    assert "filter" in bench.until_event(Event.FAILED)


def test_a_device_that_cannot_come_back(bench: Bench) -> None:
    """There is nothing to wait for."""
    device = LoopbackDevice()
    one = bench.add(Source(device, DeviceLostError("cannot come back", reason="final")))
    works(bench.guest())
    device.unplug()
    bench.until_event(Event.DEVICE_LOST)
    bench.clock.now += CHECK_DEVICE
    bench.until(lambda: one.ended)
    assert isinstance(one.error, DeviceLostError)


def test_a_device_that_fails_at_once_is_tried_less_and_less(bench: Bench) -> None:
    """And told once."""

    class Broken(LoopbackDevice):
        def reset(self) -> None:
            raise DeviceLostError("it came back as another one")

    source = Source(LoopbackDevice(), Broken())
    bench.add(source)
    guest = bench.guest()
    works(guest)
    guest.control_out(0x40, 0x10, 0, 0, timeout=PATIENCE)
    bench.until_event(Event.DEVICE_LOST)
    waits = []
    for _ in range(4):
        opened, wait = source.opened, bench.exporters[0].timeout()
        assert wait is not None
        waits.append(round(wait, 3))
        bench.clock.now += wait
        bench.until(lambda opened=opened: source.opened > opened)  # type: ignore[misc]
    assert waits == [CHECK_DEVICE, CHECK_DEVICE, 2 * CHECK_DEVICE, 4 * CHECK_DEVICE]
    assert len(bench.messages(Event.DEVICE_LOST)) == 2
    assert not bench.messages(Event.DEVICE_BACK)


def test_a_fragile_device_is_not_reset_at_the_end(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usbredir.device, "DO_NOT_RESET", {(0x1209, 0x0001)})
    device = LoopbackDevice()
    one = bench.add(Source(device))
    works(bench.guest())
    one.close()
    assert device.counters["resets"] == 0


def test_no_back_off_without_a_hello(bench: Bench) -> None:
    """A peer that accepts and says nothing is tried less and less often."""
    with listen("127.0.0.1:0") as listener:
        peer = Connecting(str(listener.address), clock=bench.clock, jitter=lambda: 1.0)
        one = bench.add(FactorySource(LoopbackDevice), peer)
        waits = []
        for _ in range(3):
            connection = None

            def accepted() -> bool:
                nonlocal connection
                connection = connection or listener.accept(0)
                return one._session is not None and connection is not None

            bench.until(accepted)
            assert connection is not None
            connection.close()
            bench.until(lambda: one._session is None)
            wait = peer.timeout()
            assert wait is not None
            waits.append(wait)
            bench.clock.now += wait
        assert waits == [exporter.RETRY_FIRST, 2 * exporter.RETRY_FIRST, 4 * exporter.RETRY_FIRST]
