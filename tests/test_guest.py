"""Guest: its calls against a real host with the loopback device, and against hosts that mean harm."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest

from usbredir import _exchange, requests
from usbredir import guest as guest_module
from usbredir.device import TransferResult
from usbredir.errors import (
    ConnectionClosed,
    DeviceLostError,
    DeviceRejectedError,
    LocalProtocolError,
    QueueFullError,
    RemoteProtocolError,
)
from usbredir.filter import FilterRule
from usbredir.guest import Guest, GuestCallbacks
from usbredir.host import Host
from usbredir.limits import Limits
from usbredir.packets import (
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
    GetConfiguration,
    InterfaceInfo,
    InterruptPacket,
    InterruptReceivingStatus,
    IsoPacket,
    IsoStreamStatus,
    Packet,
    Reset,
    StartBulkReceiving,
    StartInterruptReceiving,
    StopInterruptReceiving,
)
from usbredir.parser import LogLevel, Parser
from usbredir.proto import Capability, Status, TransferType, endpoint_address, endpoint_index
from usbredir.testing import linked_pair
from usbredir.virtual import LoopbackDevice

from .strategies import End, raw_packet

LOOP_OUT, LOOP_IN, SINK, SOURCE = 0x01, 0x81, 0x02, 0x82
INTERRUPT_OUT, INTERRUPT_IN, STALLING, SILENT = 0x03, 0x83, 0x85, 0x86


PATIENCE = 20.0
"""Seconds that an answer may take on a busy machine."""
MOMENT = 0.02
"""Seconds to wait for what does not come."""


@pytest.fixture
def device() -> Iterator[LoopbackDevice]:
    """A loopback device whose interrupt endpoint always has data."""
    device = LoopbackDevice(interrupt_period=0)
    yield device
    device.close()


@pytest.fixture
def pair(device: LoopbackDevice) -> Iterator[tuple[Host, Guest]]:
    host, guest = linked_pair(device)
    with host, guest:
        yield host, guest


@pytest.fixture
def guest(pair: tuple[Host, Guest]) -> Guest:
    return pair[1]


# ================================================================ against a real host


def test_linked_pair_has_exchanged_hello(pair: tuple[Host, Guest]) -> None:
    """The device is announced without another call."""
    _, guest = pair
    connect = guest.wait_for_device(0)
    assert connect is guest.device
    assert (connect.vendor_id, connect.product_id, connect.device_version_bcd) == (0x1209, 0x0001, 0x1234)
    assert guest.host_version
    assert guest.interfaces is not None
    assert guest.interfaces.interface_count == 2
    assert guest.endpoints is not None
    assert guest.endpoints.type[endpoint_index(SOURCE)] == TransferType.BULK
    assert guest.endpoints.type[endpoint_index(INTERRUPT_OUT)] == TransferType.INTERRUPT
    assert guest.has_data_to_write() == 0


@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, 100_000])
def test_bulk_loopback(guest: Guest, size: int) -> None:
    data = bytes(i % 253 for i in range(size))
    assert guest.bulk_out(LOOP_OUT, data, timeout=PATIENCE) == TransferResult(Status.SUCCESS, b"")
    result = guest.bulk_in(LOOP_IN, size + 10, timeout=PATIENCE)
    assert (result.status, bytes(result.data)) == (Status.SUCCESS, data)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_data_may_be_any_buffer(guest: Guest, kind: Callable[[bytes], Any]) -> None:
    guest.bulk_out(LOOP_OUT, kind(b"hello"))
    assert guest.bulk_in(LOOP_IN, 64).data == b"hello"
    assert guest.control_out(0x40, 2, 0, 0, kind(b"stored")).status == Status.SUCCESS
    assert guest.control_in(0xC0, 3, 0, 0, 64).data == b"stored"
    assert guest.interrupt_out(INTERRUPT_OUT, kind(b"12345678")).status == Status.SUCCESS


def test_a_babble_is_a_result(guest: Guest) -> None:
    """A message that is too long for the transfer."""
    guest.bulk_out(LOOP_OUT, bytes(100))
    assert guest.bulk_in(LOOP_IN, 64).status == Status.BABBLE


def test_a_stall_is_a_result(guest: Guest) -> None:
    """Until the halt is cleared; other endpoints are not concerned."""
    assert guest.bulk_in(STALLING, 64).status == Status.STALL
    assert guest.bulk_in(STALLING, 64).status == Status.STALL
    assert guest.bulk_out(SINK, b"x").status == Status.SUCCESS
    assert guest.clear_halt(STALLING).status == Status.SUCCESS
    assert guest.bulk_in(STALLING, 64) == TransferResult(Status.SUCCESS, bytes(range(64)))
    assert guest.control_in(0xC0, 0x99, 0, 0, 4).status == Status.STALL
    assert guest.control_out(0x40, 0x99, 0, 0, b"x").status == Status.STALL


def test_control_requests(guest: Guest) -> None:
    assert guest.control_in(0xC0, 1, 250, 0, 10) == TransferResult(0, bytes((250 + i) & 0xFF for i in range(10)))
    assert guest.control_in(0xC0, 1, 0, 0, 0).status == Status.SUCCESS
    assert guest.control_out(0x40, 2, 0, 0).status == Status.SUCCESS


def test_descriptors(guest: Guest) -> None:
    assert guest.get_descriptor(1, 0, 18)[8:12] == bytes.fromhex("09120100")
    assert guest.get_descriptor(3, 2, language=0x0409)[2:].decode("utf-16-le") == "Loopback"
    assert len(guest.get_descriptor(2, 0, 9)) == 9
    assert guest.get_descriptor(3, 200) == b""


def test_configurations(guest: Guest) -> None:
    """A change announces the new endpoints."""
    assert guest.get_configuration() == (Status.SUCCESS, 1)
    assert guest.set_configuration(1) == (Status.SUCCESS, 1)
    assert guest.set_configuration(2, timeout=PATIENCE) == (Status.SUCCESS, 2)
    assert guest.get_configuration() == (Status.SUCCESS, 2)
    assert guest.endpoints is not None
    assert guest.endpoints.type[endpoint_index(LOOP_IN)] == TransferType.BULK
    assert guest.endpoints.type[endpoint_index(SOURCE)] == TransferType.INVALID
    assert guest.bulk_in(SOURCE, 8).status == Status.INVAL
    status, value = guest.set_configuration(77)
    assert (status != Status.SUCCESS, value) == (True, 2)


def test_alternate_settings(guest: Guest) -> None:
    assert guest.get_alt_setting(1) == (Status.SUCCESS, 0)
    assert guest.set_alt_setting(1, 2, timeout=PATIENCE) == (Status.SUCCESS, 2)
    assert guest.get_alt_setting(1) == (Status.SUCCESS, 2)
    assert guest.endpoints is not None
    assert guest.endpoints.type[endpoint_index(0x84)] == TransferType.ISO
    assert guest.get_alt_setting(9) == (Status.INVAL, 255)
    status, alternate = guest.set_alt_setting(1, 9)
    assert (status != Status.SUCCESS, alternate) == (True, 2)


def test_reset(guest: Guest, device: LoopbackDevice) -> None:
    """Not the first one: the device is fresh then."""
    before = device.counters["resets"]
    guest.bulk_out(LOOP_OUT, b"forgotten")
    guest.reset()
    assert guest.get_configuration() == (Status.SUCCESS, 1)
    assert device.counters["resets"] == before + 1
    assert guest.bulk_in(LOOP_IN, 64, timeout=MOMENT).status == Status.TIMEOUT


def test_a_timeout_cancels(guest: Guest, device: LoopbackDevice) -> None:
    """TIMEOUT is the result; the device's transfer ends; the next call is not disturbed."""
    result = guest.bulk_in(SILENT, 64, timeout=MOMENT)
    assert result == TransferResult(Status.TIMEOUT, b"")
    assert device.counters["cancelled"] == 1
    for _ in range(3):
        assert guest.bulk_in(SILENT, 64, timeout=0).status == Status.TIMEOUT
    guest.bulk_out(LOOP_OUT, b"hello")
    assert guest.bulk_in(LOOP_IN, 64).data == b"hello"


def test_interrupt_receiving(guest: Guest) -> None:
    """Every packet, in order."""
    assert guest.start_interrupt_receiving(INTERRUPT_IN, timeout=PATIENCE) == Status.SUCCESS
    results = [guest.receive(INTERRUPT_IN, timeout=PATIENCE) for _ in range(20)]
    assert results == [TransferResult(Status.SUCCESS, struct.pack("<Q", number)) for number in range(20)]
    assert guest.stop_interrupt_receiving(INTERRUPT_IN, timeout=PATIENCE) == Status.SUCCESS


def test_bulk_receiving(guest: Guest) -> None:
    assert guest.start_bulk_receiving(SOURCE, 512, 4, timeout=PATIENCE) == Status.SUCCESS
    results = [guest.receive(SOURCE, timeout=PATIENCE) for _ in range(20)]
    assert [struct.unpack_from("<Q", result.data)[0] for result in results] == list(range(20))
    assert {(result.status, len(result.data)) for result in results} == {(Status.SUCCESS, 512)}
    assert guest.stop_bulk_receiving(SOURCE, timeout=PATIENCE) == Status.SUCCESS


def test_receiving_when_nothing_comes(device: LoopbackDevice, guest: Guest) -> None:
    assert guest.control_out(0x40, 0x12, 60_000, 0).status == Status.SUCCESS  # a packet every 60 ms
    assert guest.start_bulk_receiving(SILENT, 512, 1) == Status.SUCCESS
    assert guest.receive(SILENT, timeout=0) == TransferResult(Status.TIMEOUT)
    assert guest.receive(SILENT, timeout=MOMENT) == TransferResult(Status.TIMEOUT)


@pytest.mark.parametrize(
    "start",
    [
        lambda guest: guest.start_interrupt_receiving(SOURCE, timeout=0.3),
        lambda guest: guest.start_bulk_receiving(INTERRUPT_IN, 64, timeout=0.3),
        lambda guest: guest.start_bulk_receiving(SOURCE, 100, timeout=1.0),
    ],
)
def test_receiving_that_cannot_start(guest: Guest, start: Callable[[Guest], int]) -> None:
    """The host's answer is of the endpoint's kind, not of the request's: it is understood all the same."""
    assert start(guest) != Status.SUCCESS


@pytest.mark.parametrize(
    ("endpoint", "start"),
    [
        (0x8F, Guest.start_interrupt_receiving),
        (0x80, Guest.start_interrupt_receiving),
        (0x8F, Guest.stop_interrupt_receiving),
        (0x8A, Guest.start_iso_stream),
        (0x0A, Guest.stop_iso_stream),
        (0x8F, Guest.stop_bulk_receiving),
    ],
)
def test_streams_of_endpoints_that_are_not_there(
    guest: Guest, endpoint: int, start: Callable[[Guest, int], int]
) -> None:
    """Hosts do not answer: nothing is sent, and the call ends all the same."""
    assert start(guest, endpoint) == Status.INVAL
    with pytest.raises(LocalProtocolError):
        guest.receive(endpoint)
    assert guest.start_bulk_receiving(0x8F, 512) == Status.INVAL


def test_receiving_that_is_not_started(guest: Guest) -> None:
    with pytest.raises(LocalProtocolError, match="no stream on endpoint 0x83"):
        guest.receive(INTERRUPT_IN)


def test_the_device_is_lost_while_a_call_waits(guest: Guest) -> None:
    """The call ends; so do all later ones."""
    guest.control_out(0x40, 0x10, 1, 0)  # unplugs itself in a millisecond
    try:
        result = guest.bulk_in(SILENT, 64, timeout=PATIENCE)
    except DeviceLostError:
        pass
    else:
        assert result.status == Status.IOERROR
    guest.wait_for_disconnect(PATIENCE)
    assert guest.device is None
    assert guest.interfaces is None
    assert guest.endpoints is None


def test_an_idle_device_is_lost(guest: Guest, device: LoopbackDevice) -> None:
    """Nothing is under way, and it is told all the same."""
    device.unplug()
    guest.wait_for_disconnect(PATIENCE)
    with pytest.raises(DeviceLostError):
        guest.get_configuration()


CALLS: list[Callable[[Guest], object]] = [
    lambda guest: guest.get_configuration(),
    lambda guest: guest.set_configuration(1),
    lambda guest: guest.get_alt_setting(0),
    lambda guest: guest.set_alt_setting(0, 0),
    lambda guest: guest.control_in(0x80, 0, 0, 0, 2),
    lambda guest: guest.control_out(0x00, 0, 0, 0),
    lambda guest: guest.get_descriptor(1),
    lambda guest: guest.clear_halt(0x81),
    lambda guest: guest.bulk_in(0x81, 64),
    lambda guest: guest.bulk_out(0x01, b"x"),
    lambda guest: guest.interrupt_out(0x03, b"x"),
    lambda guest: guest.start_interrupt_receiving(0x83),
    lambda guest: guest.stop_interrupt_receiving(0x83),
    lambda guest: guest.start_bulk_receiving(0x82, 512),
    lambda guest: guest.stop_bulk_receiving(0x82),
    lambda guest: guest.reset(),
]


@pytest.mark.parametrize("call", CALLS)
def test_calls_without_a_device(call: Callable[[Guest], object]) -> None:
    """DeviceLostError, nothing is sent."""
    host, guest = linked_pair(None)
    with host, guest, pytest.raises(DeviceLostError):
        call(guest)
    assert guest.has_data_to_write() == 0


def test_waiting_for_a_device() -> None:
    host, guest = linked_pair(None)
    with host, guest:
        with pytest.raises(TimeoutError):
            guest.wait_for_device(MOMENT)
        host.set_device(LoopbackDevice())
        assert guest.wait_for_device(PATIENCE).vendor_id == 0x1209
        with pytest.raises(TimeoutError):
            guest.wait_for_disconnect(MOMENT)
        host.set_device(None)
        guest.wait_for_disconnect(PATIENCE)
        host.set_device(LoopbackDevice())
        assert guest.wait_for_device(PATIENCE).product_id == 1
        assert guest.bulk_out(LOOP_OUT, b"x").status == Status.SUCCESS


def test_refusing_a_device(pair: tuple[Host, Guest]) -> None:
    host, guest = pair
    guest.reject()
    assert guest.device is None
    with pytest.raises(DeviceRejectedError):
        host.read_guest_data()


def test_close_is_idempotent(guest: Guest) -> None:
    with guest as entered:
        assert entered is guest
    guest.close()
    guest.close()


# ================================================================ against a host that is only a parser


KINDS = {
    0x01: TransferType.BULK,
    0x03: TransferType.INTERRUPT,
    0x81: TransferType.BULK,
    0x82: TransferType.BULK,
    0x83: TransferType.INTERRUPT,
    0x84: TransferType.ISO,
}
ENDPOINTS = EpInfo(type=tuple(KINDS.get(endpoint_address(index), TransferType.INVALID) for index in range(32)))


class FakeTime:
    """Stands in for the module ``time``: passes only when somebody waits."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


class Stuck(Exception):
    """A call would wait for ever."""


class RawHost(GuestCallbacks):
    """A host of which only the parser is real: *answer* says what it sends for each packet.

    Waiting runs it. When it has nothing to say, time passes.

    Attributes:
        readable: reading would not wait, whatever the parser has to say.
    """

    def __init__(self, clock: FakeTime, word: Iterable[int] = range(8)) -> None:
        self.clock = clock
        self.end = End()
        self.parser = Parser(self.end, usb_host=True, capabilities=word)
        self.answer: Callable[[Packet], Iterable[Packet]] = lambda packet: ()
        self.requests: list[Packet] = []
        self.messages: list[tuple[LogLevel, str]] = []
        self.readable = False

    def log(self, level: LogLevel, message: str) -> None:
        self.messages.append((level, message))

    def read(self, count: int) -> bytes | None:
        self.parser.do_write()
        piece = bytes(self.end.output[:count])
        del self.end.output[:count]
        return piece or None

    def write(self, data: memoryview) -> int:
        self.end.incoming += data
        return len(data)

    def wait(self, timeout: float | None, *, writing: bool) -> None:
        self.parser.do_read()
        requests, self.end.received = self.end.received, []
        self.requests += requests
        for request in requests:
            self.send(*self.answer(request))
        if not (self.parser.has_data_to_write() or self.end.output or self.readable):
            if timeout is None:
                raise Stuck
            self.clock.now += timeout + 0.001

    def send(self, *packets: Packet) -> None:
        for packet in packets:
            self.parser.send(packet)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    clock = FakeTime()
    monkeypatch.setattr(guest_module, "time", clock)
    monkeypatch.setattr(_exchange, "time", clock)
    return clock


@pytest.fixture
def raw(clock: FakeTime) -> RawHost:
    return RawHost(clock)


@pytest.fixture
def prey(raw: RawHost) -> Guest:
    """A guest of the raw host, which has announced a device."""
    guest = Guest(raw)
    guest.process()
    raw.wait(0, writing=False)
    raw.send(InterfaceInfo(interface_count=1), ENDPOINTS, DeviceConnect(vendor_id=0x1234))
    guest.wait_for_device()
    raw.requests.clear()
    return guest


def reply_to(request: Any, **values: Any) -> Packet:
    """The plain answer to a data packet."""
    return request.replace(**{"status": 0, "data": b"", "length": 0, **values})  # type: ignore[no-any-return]


def test_filter_rules_are_told(clock: FakeTime, raw: RawHost) -> None:
    """Right behind hello; and those of the host are kept."""
    rules = (FilterRule(8, -1, -1, -1, True),)
    guest = Guest(raw, rules=rules, version="a guest")
    guest.process()
    raw.wait(0, writing=False)
    guest.process()
    raw.wait(0, writing=False)
    assert [type(packet).__name__ for packet in raw.requests] == ["Hello", "FilterFilter"]
    assert raw.requests[1] == FilterFilter(rules=rules)
    raw.send(FilterFilter(rules=rules[:1] * 2))
    guest.process()
    assert guest.host_filter == rules * 2


def test_without_the_capability_nothing_can_be_refused(clock: FakeTime) -> None:
    raw = RawHost(clock, word=())
    guest = Guest(raw)
    guest.process()
    raw.wait(0, writing=False)
    guest.process()
    with pytest.raises(LocalProtocolError):
        guest.reject()


def test_ids_differ(prey: Guest, raw: RawHost) -> None:
    """So that an answer belongs to one request."""
    raw.answer = lambda request: [reply_to(request)]
    for _ in range(5):
        prey.bulk_out(1, b"x")
        prey.control_out(0, 0, 0, 0)
    ids = [request.id for request in raw.requests]
    assert len(set(ids)) == 10
    assert 0 not in ids


@pytest.mark.parametrize(
    "call", [lambda guest: guest.bulk_in(0x81, 4), lambda guest: guest.control_in(0x80, 6, 0, 0, 4)]
)
def test_an_answer_that_is_too_long(prey: Guest, raw: RawHost, call: Callable[[Guest], TransferResult]) -> None:
    """A call gives no more than it was asked for, whatever the host says."""
    raw.answer = lambda request: [reply_to(request, data=bytes(100), length=100)]
    assert len(call(prey).data) <= 4


@pytest.mark.parametrize("status", [*Status, 77, 255])
def test_any_status_is_a_result(prey: Guest, raw: RawHost, status: int) -> None:
    """Also one that the protocol does not know."""
    raw.answer = lambda request: [reply_to(request, status=status, data=b"some", length=4)]
    assert prey.bulk_in(0x81, 64) == TransferResult(status, b"some")


UNASKED: list[Packet] = [
    ConfigurationStatus(id=5, configuration=1),
    AltSettingStatus(id=5),
    IsoStreamStatus(id=5, endpoint=0x84),
    InterruptReceivingStatus(id=5, endpoint=0x83),
    BulkReceivingStatus(id=5, endpoint=0x82),
    BulkStreamsStatus(id=5),
    ControlPacket(id=5, endpoint=0x80, data=b"x"),
    BulkPacket(id=5, endpoint=0x81, data=b"x"),
    BulkPacket(id=5, endpoint=0x01),
    InterruptPacket(id=5, endpoint=0x83, data=b"x"),
    InterruptPacket(id=5, endpoint=0x03),
    IsoPacket(id=5, endpoint=0x84, data=b"x"),
    BufferedBulkPacket(id=5, endpoint=0x82, data=b"x"),
]


@pytest.mark.parametrize("packet", UNASKED, ids=lambda packet: type(packet).__name__)
def test_answers_that_nobody_asked_for(prey: Guest, raw: RawHost, packet: Packet) -> None:
    """Dropped; nothing is kept, and no later call takes them."""
    raw.send(*[packet] * 3)
    prey.process()
    assert all(level == LogLevel.WARNING for level, _ in raw.messages[1:])
    assert not prey._exchange.busy
    assert not prey._exchange.streams
    raw.answer = lambda request: [ConfigurationStatus(id=request.id, configuration=9)]
    while prey.get_configuration() == (Status.SUCCESS, 9):
        if raw.requests[-1].id > packet.id:
            break
    else:
        pytest.fail("an old answer was taken for a new one")


def test_an_answer_counts_once(prey: Guest, raw: RawHost) -> None:
    """The first one with the id; others are dropped, also in later calls."""
    raw.answer = lambda request: [
        reply_to(request, data=b"first", length=5),
        reply_to(request, data=b"again", length=5),
    ]
    assert prey.bulk_in(0x81, 64).data == b"first"
    assert prey.bulk_in(0x81, 64).data == b"first"
    assert not prey._exchange.busy
    assert sum(level == LogLevel.WARNING for level, _ in raw.messages) >= 2


def test_answers_of_another_kind_do_not_count(prey: Guest, raw: RawHost) -> None:
    """Same id, other type."""
    raw.answer = lambda request: [
        ControlPacket(id=request.id, endpoint=0x80, data=b"wrong"),
        ConfigurationStatus(id=request.id),
        InterruptReceivingStatus(id=request.id, endpoint=0x81),
        reply_to(request, data=b"right", length=5),
    ]
    assert prey.bulk_in(0x81, 64).data == b"right"


def test_answers_in_any_order(prey: Guest, raw: RawHost) -> None:
    """Answers to other ids in front of the right one."""
    raw.answer = lambda request: [
        *[reply_to(request, id=request.id + step) for step in range(1, 20)],
        reply_to(request, data=b"right", length=5),
    ]
    for _ in range(3):
        assert prey.bulk_in(0x81, 64).data == b"right"


@pytest.mark.parametrize("call", CALLS[:4] + CALLS[11:15])
def test_requests_that_are_never_answered(prey: Guest, raw: RawHost, call: Any, clock: FakeTime) -> None:
    """TimeoutError when the time is up; an answer that comes later is dropped."""
    name = call.__code__.co_names[0]
    arguments = {"set_configuration": (1,), "get_alt_setting": (0,), "set_alt_setting": (0, 0)}.get(name, ())
    if "receiving" in name:
        arguments = (0x83, 64) if name == "start_bulk_receiving" else (0x83,)
    started = clock.now
    with pytest.raises(TimeoutError):
        getattr(prey, name)(*arguments, timeout=3.0)
    assert 3.0 <= clock.now - started < 4.0
    assert not prey._exchange.busy
    raw.send(ConfigurationStatus(id=raw.requests[-1].id))
    prey.process()
    assert not prey._exchange.busy


@pytest.mark.parametrize("call", CALLS[:15])
def test_without_a_time_calls_wait_for_ever(prey: Guest, call: Callable[[Guest], object]) -> None:
    """Except get_descriptor, which has a time of its own."""
    with contextlib.suppress(Stuck):
        assert call(prey) == b""
    # What was given up by the caller is cancelled at the host, where that is possible.
    left = prey._exchange._pending.values()
    assert all(pending.cancelled_as is not None for pending in left)


def test_a_cancel_that_is_answered(prey: Guest, raw: RawHost, clock: FakeTime) -> None:
    """The result is TIMEOUT; data that came with it is kept; the host got the id."""

    def answer(request: Packet) -> Iterable[Packet]:
        if isinstance(request, CancelDataPacket):
            return [BulkPacket(id=request.id, endpoint=0x81, status=Status.CANCELLED, data=b"half")]
        return []

    raw.answer = answer
    started = clock.now
    assert prey.bulk_in(0x81, 64, timeout=2.0) == TransferResult(Status.TIMEOUT, b"half")
    assert clock.now - started < 3.0
    transfer, cancel = raw.requests
    assert isinstance(cancel, CancelDataPacket)
    assert cancel.id == transfer.id


def test_a_cancel_that_comes_too_late(prey: Guest, raw: RawHost) -> None:
    """The transfer ended by itself meanwhile: its real result."""
    raw.answer = lambda request: (
        [BulkPacket(id=request.id, endpoint=0x81, data=b"done")] if isinstance(request, CancelDataPacket) else []
    )
    assert prey.bulk_in(0x81, 64, timeout=2.0) == TransferResult(Status.SUCCESS, b"done")


def test_a_cancel_that_is_not_answered(prey: Guest, raw: RawHost, clock: FakeTime) -> None:
    """Given up after a while; a late answer is dropped."""
    started = clock.now
    assert prey.bulk_in(0x81, 64, timeout=2.0) == TransferResult(Status.TIMEOUT, b"")
    assert clock.now - started <= 2.0 + _exchange.CANCEL_GRACE + 1
    assert not prey._exchange.busy
    raw.send(BulkPacket(id=raw.requests[0].id, endpoint=0x81, data=b"late"))
    prey.process()
    assert not prey._exchange.busy


def test_a_cancellation_by_the_host_is_a_result(prey: Guest, raw: RawHost) -> None:
    raw.answer = lambda request: [reply_to(request, status=Status.CANCELLED)]
    assert prey.bulk_in(0x81, 64, timeout=2.0).status == Status.CANCELLED


@pytest.mark.parametrize("call", [*CALLS[:9], *CALLS[9:15]])
def test_the_device_goes_instead_of_an_answer(prey: Guest, raw: RawHost, call: Callable[[Guest], object]) -> None:
    raw.answer = lambda request: [DeviceDisconnect()]
    with pytest.raises(DeviceLostError):
        call(prey)
    assert prey.device is None
    assert not prey._exchange.busy
    with pytest.raises(DeviceLostError):
        call(prey)


def test_the_device_goes_during_a_cancellation(prey: Guest, raw: RawHost) -> None:
    raw.answer = lambda request: [DeviceDisconnect()] if isinstance(request, CancelDataPacket) else []
    with contextlib.suppress(DeviceLostError):
        assert prey.bulk_in(0x81, 64, timeout=2.0).status == Status.TIMEOUT
    assert prey.device is None


# ---------------------------------------------------------------- receiving


def start_receiving(prey: Guest, raw: RawHost) -> None:
    """Interrupt receiving on 0x83 and bulk receiving on 0x82."""

    def answer(request: Packet) -> Iterable[Packet]:
        if isinstance(request, StartInterruptReceiving):
            return [InterruptReceivingStatus(id=request.id, endpoint=request.endpoint)]
        if isinstance(request, StartBulkReceiving):
            return [BulkReceivingStatus(id=request.id, endpoint=request.endpoint)]
        return []

    raw.answer = answer
    assert prey.start_interrupt_receiving(0x83) == Status.SUCCESS
    assert prey.start_bulk_receiving(0x82, 512) == Status.SUCCESS


def test_each_endpoint_has_its_own_data(prey: Guest, raw: RawHost) -> None:
    """Kept in order while other calls are made."""
    start_receiving(prey, raw)
    raw.send(
        InterruptPacket(endpoint=0x83, data=b"1"),
        BufferedBulkPacket(endpoint=0x82, data=b"a"),
        InterruptPacket(endpoint=0x84, data=b"never started"),
        InterruptPacket(endpoint=0x83, status=Status.IOERROR),
        BufferedBulkPacket(endpoint=0x82, data=b"b"),
    )
    raw.answer = lambda request: [reply_to(request)]
    assert prey.bulk_out(1, b"x").status == Status.SUCCESS
    assert [prey.receive(0x82, timeout=0).data for _ in range(2)] == [b"a", b"b"]
    assert prey.receive(0x83, timeout=0) == TransferResult(Status.SUCCESS, b"1")
    assert prey.receive(0x83, timeout=0) == TransferResult(Status.IOERROR, b"")
    assert prey.receive(0x83, timeout=1).status == Status.TIMEOUT


def test_the_host_ends_a_stream(prey: Guest, raw: RawHost) -> None:
    """Its status, after all data, and again."""
    start_receiving(prey, raw)
    raw.send(
        InterruptPacket(endpoint=0x83, data=b"1"),
        InterruptReceivingStatus(endpoint=0x83, status=Status.STALL),
        BulkReceivingStatus(endpoint=0x82, status=77),
    )
    assert prey.receive(0x83).data == b"1"
    for _ in range(2):
        assert prey.receive(0x83) == TransferResult(Status.STALL)
    assert prey.receive(0x82) == TransferResult(77)
    start_receiving(prey, raw)
    raw.send(InterruptPacket(endpoint=0x83, data=b"2"))
    assert prey.receive(0x83).data == b"2"


def test_the_device_goes_while_data_is_awaited(prey: Guest, raw: RawHost) -> None:
    start_receiving(prey, raw)
    raw.send(DeviceDisconnect())
    with pytest.raises(DeviceLostError):
        prey.receive(0x83)


def test_data_and_the_end_of_the_device_in_one_read(prey: Guest, raw: RawHost) -> None:
    """The data is delivered, or the loss is told: nothing else."""
    start_receiving(prey, raw)
    raw.send(InterruptPacket(endpoint=0x83, data=b"last"), DeviceDisconnect())
    with contextlib.suppress(DeviceLostError):
        assert prey.receive(0x83).data == b"last"
    assert prey.device is None


def test_receiving_after_the_device_is_gone(prey: Guest, raw: RawHost) -> None:
    start_receiving(prey, raw)
    raw.send(DeviceDisconnect())
    prey.process()
    with pytest.raises(DeviceLostError):
        prey.receive(0x83)


def test_starting_again_loses_no_data(prey: Guest, raw: RawHost) -> None:
    """The host refuses the second start; what has come stays."""
    start_receiving(prey, raw)
    raw.send(InterruptPacket(endpoint=0x83, data=b"kept"))
    prey.process()
    raw.answer = lambda request: [InterruptReceivingStatus(id=request.id, endpoint=0x83, status=Status.INVAL)]
    assert prey.start_interrupt_receiving(0x83) == Status.INVAL
    assert prey.receive(0x83, timeout=0).data == b"kept"


def test_receiving_that_did_not_start(prey: Guest, raw: RawHost) -> None:
    """Then there is nothing to wait for."""
    raw.answer = lambda request: [InterruptReceivingStatus(id=request.id, endpoint=0x83, status=Status.STALL)]
    assert prey.start_interrupt_receiving(0x83) == Status.STALL
    with pytest.raises(LocalProtocolError):
        prey.receive(0x83)


def test_receiving_that_was_stopped(prey: Guest, raw: RawHost) -> None:
    start_receiving(prey, raw)
    raw.answer = lambda request: [InterruptReceivingStatus(id=request.id, endpoint=0x83)]
    assert prey.stop_interrupt_receiving(0x83) == Status.SUCCESS
    with pytest.raises(LocalProtocolError):
        prey.receive(0x83)


def test_a_start_right_behind_a_stop(prey: Guest, raw: RawHost) -> None:
    """The stop's answer ends the stream that was there, not the one that was started since."""
    start_receiving(prey, raw)
    raw.send(InterruptPacket(endpoint=0x83, data=b"old"))
    prey.process()
    raw.answer = lambda request: [InterruptReceivingStatus(id=request.id, endpoint=0x83)]
    stop = prey.submit(requests.stop_interrupt_receiving(0x83))
    start = prey.submit(requests.start_interrupt_receiving(0x83))
    assert (stop.result(), start.result()) == (Status.SUCCESS, Status.SUCCESS)
    assert prey._exchange.backlog == 0
    raw.send(InterruptPacket(endpoint=0x83, data=b"new"))
    assert prey.receive(0x83).data == b"new"
    assert prey.stop_interrupt_receiving(0x83) == Status.SUCCESS
    assert not prey._exchange.streams.keys() - {0x82}


def test_a_stop_that_fails_ends_nothing(prey: Guest, raw: RawHost) -> None:
    start_receiving(prey, raw)
    raw.answer = lambda request: [InterruptReceivingStatus(id=request.id, endpoint=0x83, status=Status.IOERROR)]
    assert prey.stop_interrupt_receiving(0x83) == Status.IOERROR
    raw.send(InterruptPacket(endpoint=0x83, data=b"more"))
    assert prey.receive(0x83).data == b"more"


def test_a_descriptor_in_no_time(prey: Guest, raw: RawHost) -> None:
    """Empty when it does not come, and when the cancellation is confirmed."""
    assert prey.get_descriptor(1) == b""
    assert isinstance(raw.requests[-1], CancelDataPacket)
    raw.answer = lambda request: (
        [ControlPacket(id=request.id, endpoint=0x80, status=Status.CANCELLED)]
        if isinstance(request, CancelDataPacket)
        else []
    )
    assert prey.get_descriptor(1) == b""
    raw.answer = lambda request: [ControlPacket(id=request.id, endpoint=0x80, data=b"much too long")]
    assert prey.get_descriptor(1, 0, 4) == b"much"


def test_replaced_streams_leave_no_backlog(prey: Guest, raw: RawHost) -> None:
    """What was not taken from a stream that ended counts no more when it is started again."""
    for _ in range(3):
        start_receiving(prey, raw)
        raw.send(InterruptPacket(endpoint=0x83, data=bytes(1000)), InterruptReceivingStatus(endpoint=0x83, status=3))
        prey.process()
    assert prey._exchange.backlog == 1000 + _exchange.PACKET_COST


@pytest.mark.parametrize("size", [0, 1000])
def test_endless_stream_data_is_bounded(prey: Guest, raw: RawHost, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packets without data count as well. What came before is there, then the error says what to do."""
    monkeypatch.setattr(_exchange, "MAX_BACKLOG", 100_000)
    start_receiving(prey, raw)
    for _ in range(20):
        raw.send(*[InterruptPacket(endpoint=0x83, data=bytes(size))] * 100)
        prey.process()
    assert prey._exchange.backlog <= 100_000
    raw.send(BufferedBulkPacket(endpoint=0x82, data=bytes(1000)))
    prey.process()
    for _ in range(100_000 // (size + _exchange.PACKET_COST)):
        assert prey.receive(0x83, timeout=0).status == Status.SUCCESS
    with pytest.raises(LocalProtocolError, match="receive"):
        prey.receive(0x83, timeout=0)
    assert prey._exchange.backlog == 0
    for endpoint in (0x83, 0x82):
        with pytest.raises(LocalProtocolError, match="dropped"):
            prey.receive(endpoint, timeout=0)
    start_receiving(prey, raw)
    raw.send(InterruptPacket(endpoint=0x83, data=b"more"))
    assert prey.receive(0x83, timeout=1).data == b"more"


def test_a_stream_that_never_pauses(prey: Guest, raw: RawHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device faster than the guest: calls end as soon as they have their answer; what is not read waits outside."""
    monkeypatch.setattr(_exchange, "MAX_BACKLOG", 10_000_000)
    start_receiving(prey, raw)
    plain_read = raw.read

    def read(count: int) -> bytes | None:
        raw.send(*[BufferedBulkPacket(endpoint=0x82, data=bytes(512))] * 10)
        return plain_read(count)

    monkeypatch.setattr(raw, "read", read)
    raw.readable = True
    for _ in range(100):
        assert len(prey.receive(0x82).data) == 512
    assert prey._exchange.backlog < 1_000_000
    raw.answer = lambda request: [reply_to(request)]
    assert prey.bulk_out(1, b"x").status == Status.SUCCESS


def test_stream_data_that_nobody_wants_is_dropped(prey: Guest, raw: RawHost) -> None:
    for _ in range(20):
        raw.send(*[BufferedBulkPacket(endpoint=endpoint, data=bytes(100)) for endpoint in range(0x80, 0x90)])
        raw.send(*[IsoPacket(endpoint=0x84, data=bytes(100))] * 10)
        prey.process()
    assert not prey._exchange.streams


def test_data_of_a_former_stream_is_not_the_next_ones(prey: Guest, raw: RawHost) -> None:
    """What was under way when the stop was sent."""
    start_receiving(prey, raw)
    stop = prey.submit(requests.stop_interrupt_receiving(0x83))
    start = prey.submit(requests.start_interrupt_receiving(0x83))
    raw.answer = lambda request: [
        InterruptPacket(endpoint=0x83, data=b"of the old one"),
        InterruptReceivingStatus(id=request.id, endpoint=0x83),
    ]
    assert (stop.result(), start.result()) == (Status.SUCCESS, Status.SUCCESS)
    assert prey.receive(0x83, timeout=0).status == Status.TIMEOUT


def test_a_status_that_crosses_a_stop(prey: Guest, raw: RawHost) -> None:
    """It ends the stream; the stop has an answer of its own."""
    start_receiving(prey, raw)
    raw.answer = lambda request: [
        InterruptReceivingStatus(endpoint=0x83, status=Status.STALL),
        InterruptReceivingStatus(id=request.id, endpoint=0x83),
    ]
    assert prey.stop_interrupt_receiving(0x83) == Status.SUCCESS
    with pytest.raises(LocalProtocolError):
        prey.receive(0x83)


@pytest.mark.parametrize(
    "make",
    [
        requests.start_interrupt_receiving(0x83, timeout=1.0),
        requests.start_bulk_receiving(0x82, 512, timeout=1.0),
        requests.start_iso_stream(0x84, timeout=1.0),
    ],
    ids=repr,
)
def test_a_start_that_is_not_answered_in_time_is_undone(prey: Guest, raw: RawHost, make: requests.Request[int]) -> None:
    """Should the host carry it out after all, it is told to stop; its data is not kept."""
    with pytest.raises(TimeoutError):
        prey.call(make)
    endpoint = make.values[0]
    prey.process()
    raw.wait(0, writing=False)
    assert [type(request).__name__[:4] for request in raw.requests] == ["Star", "Stop"]
    assert raw.requests[1].endpoint == endpoint  # type: ignore[attr-defined]
    raw.send(InterruptReceivingStatus(id=raw.requests[0].id, endpoint=0x83), InterruptPacket(endpoint=0x83, data=b"x"))
    prey.process()
    assert not prey._exchange.streams
    assert prey._exchange.backlog == 0


def test_a_start_that_its_caller_gives_up(prey: Guest, raw: RawHost, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(timeout: float | None, *, writing: bool) -> None:
        raise KeyboardInterrupt

    wait = raw.wait
    monkeypatch.setattr(raw, "wait", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prey.start_interrupt_receiving(0x83)
    wait(0, writing=False)
    assert [type(request) for request in raw.requests] == [StartInterruptReceiving, StopInterruptReceiving]
    assert not prey._exchange.streams


def test_isochronous_packets_that_nobody_takes(prey: Guest, raw: RawHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that does not read holds a sender for its timeout, not longer."""
    raw.answer = lambda request: [IsoStreamStatus(id=request.id, endpoint=0x04)]
    raw.send(ENDPOINTS.replace(type=(TransferType.ISO,) * 32))
    prey.process()
    assert prey.start_iso_stream(0x04) == Status.SUCCESS
    monkeypatch.setattr(raw, "write", lambda data: None)
    results = [prey.iso_out(0x04, b"x", timeout=1.0) for _ in range(guest_module.ISO_PACKETS_AHEAD + 1)]
    assert results == [Status.SUCCESS] * guest_module.ISO_PACKETS_AHEAD + [Status.TIMEOUT]


# ---------------------------------------------------------------- limits, and errors of the application


def test_cancellations_pass_a_full_queue(raw: RawHost, clock: FakeTime, monkeypatch: pytest.MonkeyPatch) -> None:
    """They end requests, one for each: a timeout is a result also when nothing else may be queued."""
    guest = Guest(raw, limits=Limits(max_queued_packets=2))
    guest.process()
    raw.wait(0, writing=False)
    raw.send(ENDPOINTS, DeviceConnect())
    guest.wait_for_device()
    monkeypatch.setattr(raw, "write", lambda data: None)
    futures = [guest.submit(requests.bulk_in(0x81, 64, timeout=1.0)) for _ in range(2)]
    with pytest.raises(QueueFullError):
        guest.submit(requests.bulk_in(0x81, 64))
    assert [future.result().status for future in futures] == [Status.TIMEOUT] * 2
    assert not guest._exchange.busy


class OddError(OSError):
    """One that copy.copy() cannot copy."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__(first)


def test_after_a_refusal_requests_are_written_again(prey: Guest, raw: RawHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream that takes nothing is not asked again for every request, until somebody has waited."""
    asked: list[int] = []
    write = raw.write

    def refuse(data: memoryview) -> None:
        asked.append(len(data))

    with monkeypatch.context() as patch:
        patch.setattr(prey._exchange.parser._queue, "_write", refuse)
        for _ in range(100):
            prey.submit(requests.bulk_out(0x01, b"x"))
    assert len(asked) == 1
    raw.answer = lambda request: [reply_to(request)]
    assert prey.bulk_out(0x01, b"x").status == Status.SUCCESS
    prey.submit(requests.bulk_out(0x01, b"x"))
    assert write == raw.write
    assert prey.has_data_to_write() == 0


def test_a_device_that_left_before_the_connection_ended(prey: Guest, raw: RawHost) -> None:
    """The host has told so: waiting for it succeeds; after the end of the connection alone it does not."""
    raw.send(DeviceDisconnect())
    prey.process()
    prey._exchange.fail(ConnectionClosed("gone"))
    prey.wait_for_disconnect()
    with pytest.raises(ConnectionClosed):
        prey.wait_for_device()


def test_errors_that_cannot_be_copied(prey: Guest, raw: RawHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """They end all requests all the same."""

    def fail(count: int) -> bytes:
        raise OddError(1, 2)

    futures = [prey.submit(requests.bulk_in(0x81, 64)) for _ in range(3)]
    monkeypatch.setattr(raw, "read", fail)
    raw.readable = True
    for future in futures:
        with pytest.raises(OddError):
            future.result()
    with pytest.raises(OddError):
        prey.get_configuration()


def test_rules_for_a_host_without_filters(clock: FakeTime) -> None:
    """It cannot be told; the connection goes on."""
    raw = RawHost(clock, word=())
    guest = Guest(raw, rules=(FilterRule(8, -1, -1, -1, True),))
    guest.process()
    raw.wait(0, writing=False)
    raw.send(DeviceConnect())
    assert guest.wait_for_device() is not None
    assert any("filter" in message for _, message in raw.messages)


def test_a_pipeline_whose_requests_fail(prey: Guest, raw: RawHost) -> None:
    """What was started before is cancelled; the error is the caller's."""

    def wanted() -> Iterator[requests.Request[TransferResult]]:
        yield requests.bulk_in(0x81, 64)
        yield requests.bulk_in(0x81, 64)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        next(prey.pipeline(wanted()))
    raw.wait(0, writing=False)
    assert [type(request).__name__ for request in raw.requests] == ["BulkPacket"] * 2 + ["CancelDataPacket"] * 2


def test_a_pipeline_that_is_left(prey: Guest, raw: RawHost) -> None:
    raw.answer = lambda request: [reply_to(request, data=b"x" * 4, length=4)] if request.id < 4 else []
    results = prey.pipeline((requests.bulk_in(0x81, 4) for _ in range(100)), depth=8)
    assert next(results).data == b"xxxx"
    results.close()  # type: ignore[attr-defined]
    raw.wait(0, writing=False)
    cancelled = [request.id for request in raw.requests if isinstance(request, CancelDataPacket)]
    asked = [request.id for request in raw.requests if isinstance(request, BulkPacket)]
    assert set(cancelled) <= set(asked)
    assert all(pending.cancelled_as is not None for pending in prey._exchange._pending.values())


@pytest.mark.parametrize("depth", [0, -1])
def test_depths_that_make_no_sense(prey: Guest, depth: int) -> None:
    with pytest.raises(ValueError, match="depth"):
        prey.pipeline([], depth)


def test_a_cancelled_transfer_with_too_much_data(prey: Guest, raw: RawHost) -> None:
    """It is cut to what was asked for."""
    raw.answer = lambda request: (
        [BulkPacket(id=request.id, endpoint=0x81, status=Status.CANCELLED, data=bytes(5000))]
        if isinstance(request, CancelDataPacket)
        else []
    )
    assert prey.bulk_in(0x81, 16, timeout=1.0) == TransferResult(Status.TIMEOUT, bytes(16))


def test_unasked_answers_are_not_logged_without_end(prey: Guest, raw: RawHost) -> None:
    raw.send(*[BulkPacket(id=99, endpoint=0x81, data=b"x")] * 1000)
    prey.process()
    complaints = [message for _, message in raw.messages if "nobody waits" in message]
    assert len(complaints) == _exchange.MOST_COMPLAINTS


def test_an_endpoint_that_is_no_number(prey: Guest) -> None:
    with pytest.raises((TypeError, ValueError)):
        prey.start_interrupt_receiving("0x83")  # type: ignore[arg-type]
    assert not prey._exchange.busy


def test_another_device_without_a_goodbye(prey: Guest, raw: RawHost) -> None:
    """What was asked of the former one has no answer any more."""
    future = prey.submit(requests.bulk_in(0x81, 64))
    raw.send(ENDPOINTS, DeviceConnect(vendor_id=2))
    with pytest.raises(DeviceLostError, match="another device"):
        future.result()
    assert prey.device is not None
    assert (prey.device.vendor_id, prey.endpoints) == (2, ENDPOINTS)


# ---------------------------------------------------------------- hosts that break the protocol


def test_a_bad_packet_ends_the_connection(prey: Guest, raw: RawHost) -> None:
    """RemoteProtocolError for this call and for every later one: who knows what the next bytes are."""
    raw.end.output += raw_packet(99, b"junk")
    for call in (*CALLS, Guest.wait_for_device, Guest.wait_for_disconnect, Guest.reject):
        with pytest.raises(RemoteProtocolError) as caught:
            call(prey)
        assert caught.value.packet_type == 99
    assert not prey._exchange.busy


def test_the_connection_closes(prey: Guest, raw: RawHost, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(raw, "read", lambda count: b"")
    raw.readable = True
    with pytest.raises(ConnectionClosed):
        prey.bulk_in(0x81, 64)
    assert not prey._exchange.busy


def test_an_exception_of_the_stream_passes_through(prey: Guest, raw: RawHost, monkeypatch: pytest.MonkeyPatch) -> None:
    def reset(count: int) -> bytes:
        raise ConnectionResetError

    monkeypatch.setattr(raw, "read", reset)
    raw.readable = True
    with pytest.raises(ConnectionResetError):
        prey.get_configuration()
    assert not prey._exchange.busy


def test_devices_that_come_and_go(prey: Guest, raw: RawHost) -> None:
    """In any order, announced twice, gone twice."""
    for packets in (
        [DeviceConnect(vendor_id=1), DeviceConnect(vendor_id=2)],
        [DeviceDisconnect(), DeviceDisconnect()],
        [EpInfo(), InterfaceInfo(interface_count=32)],
        [DeviceDisconnect(), DeviceConnect(vendor_id=3, speed=200)],
    ):
        raw.send(*packets)
        prey.process()
    assert prey.wait_for_device().vendor_id == 3
    prey.process()
    raw.wait(0, writing=False)
    assert sum(type(request).__name__ == "DeviceDisconnectAck" for request in raw.requests) == 3


def test_requests_that_cannot_be_sent(prey: Guest, raw: RawHost) -> None:
    """The caller's mistakes are LocalProtocolError, and nothing is left waiting."""
    mistakes: list[Callable[[], object]] = [
        lambda: prey.control_in(0x80, 6, 0, 0, 70_000),
        lambda: prey.bulk_in(0x81, 1 << 28),
        lambda: prey.bulk_in(0x181, 4),
        lambda: prey.bulk_in(0x81, -1),
        lambda: prey.start_interrupt_receiving(0x03),
        lambda: prey.interrupt_out(0x83, b"x"),
        lambda: prey.set_configuration(256),
    ]
    for mistake in mistakes:
        with pytest.raises((LocalProtocolError, ValueError)):
            mistake()
        assert not prey._exchange.busy
    prey.process()
    raw.wait(0, writing=False)
    assert not raw.requests


def test_capabilities_and_limits_are_passed_on(clock: FakeTime) -> None:
    raw = RawHost(clock)
    guest = Guest(raw, capabilities=[Capability.FILTER], limits=Limits(max_packet=100))
    guest.process()
    raw.wait(0, writing=False)
    assert raw.parser.peer_has_capability(Capability.FILTER)
    assert not raw.parser.peer_has_capability(Capability.IDS_64BITS)
    raw.send(DeviceConnect())
    raw.send(BulkPacket(endpoint=0x81, data=bytes(200)))
    with pytest.raises(RemoteProtocolError):
        guest.process()


def test_optional_methods_are_used(clock: FakeTime) -> None:
    """readinto and writev of the application reach the parser."""
    used: set[str] = set()

    class Fast(RawHost):
        def read(self, count: int) -> bytes | None:
            raise AssertionError("read was called although there is readinto")

        def readinto(self, buffer: memoryview) -> int | None:
            used.add("readinto")
            piece = super().read(len(buffer)) or b""
            buffer[: len(piece)] = piece
            return len(piece) or None

        def writev(self, buffers: Iterable[memoryview]) -> int:
            used.add("writev")
            return super().write(memoryview(b"".join(buffers)))

        def write(self, data: memoryview) -> int:
            raise AssertionError("write was called although there is writev")

    raw = Fast(clock)
    guest = Guest(raw)
    guest.process()
    raw.wait(0, writing=False)
    raw.send(DeviceConnect())
    guest.wait_for_device()
    assert used == {"readinto", "writev"}


def test_waiting_must_be_provided() -> None:
    with pytest.raises(NotImplementedError):
        GuestCallbacks().wait(0, writing=False)


def test_a_request_asks_for_writing_until_it_is_written(
    prey: Guest, raw: RawHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """wait is told whether there is something to write."""
    asked: list[bool] = []
    monkeypatch.setattr(raw, "write", lambda data: None)

    def wait(timeout: float | None, *, writing: bool) -> None:
        asked.append(writing)
        raise Stuck

    monkeypatch.setattr(raw, "wait", wait)
    with pytest.raises(Stuck):
        prey.get_configuration()
    assert asked == [True]
    assert prey.has_data_to_write() == 1
    assert Reset() != GetConfiguration()


def test_endless_disconnects_do_not_fill_the_queue(prey: Guest, raw: RawHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each wants to be confirmed; a host that does not read the confirmations is not read either."""
    monkeypatch.setattr(prey._exchange.parser._queue, "_drain", lambda: True)  # the host takes nothing
    for _ in range(20):
        raw.send(*[DeviceDisconnect()] * 1000)
        prey.process()
    assert prey.has_data_to_write() <= _exchange.MAX_WAITING + 65536 // 16
