"""usbredir.host: interrupt and bulk receiving, and what is refused. HOST_BEHAVIOUR 6."""

from __future__ import annotations

import tracemalloc
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

import usbredir.host
from usbredir._streams import INTERRUPT_TRANSFERS, MAX_RECOVERIES
from usbredir.device import Transfer
from usbredir.errors import DeviceLostError
from usbredir.host import MAX_STREAM_BACKLOG
from usbredir.limits import Limits
from usbredir.packets import (
    BufferedBulkPacket,
    BulkPacket,
    BulkReceivingStatus,
    ConfigurationStatus,
    DeviceDisconnect,
    GetConfiguration,
    InterruptPacket,
    InterruptReceivingStatus,
    IsoStreamStatus,
    Packet,
    SetAltSetting,
    SetConfiguration,
    StartBulkReceiving,
    StartInterruptReceiving,
    StartIsoStream,
    StopBulkReceiving,
    StopInterruptReceiving,
    StopIsoStream,
)
from usbredir.parser import LogLevel
from usbredir.proto import Status, TransferType
from usbredir.virtual.loopback import LoopbackDevice

from .host_bed import (
    ALTERNATE_INTERRUPT_IN,
    BULK_IN,
    BULK_IN_2,
    BULK_OUT,
    BULK_SIZE,
    INTERRUPT_IN,
    INTERRUPT_SIZE,
    ISO_IN,
    MISSING_IN,
    MISSING_OUT,
    Bed,
    FakeDevice,
)

START_ID, STOP_ID = 41, 42


@dataclass(frozen=True)
class Receiving:
    """One of the two kinds, and its packets."""

    kind: TransferType
    endpoint: int
    transfers: int
    size: int

    @property
    def start(self) -> Packet:
        if self.kind is TransferType.INTERRUPT:
            return StartInterruptReceiving(id=START_ID, endpoint=self.endpoint)
        return StartBulkReceiving(
            id=START_ID,
            stream_id=3,
            endpoint=self.endpoint,
            bytes_per_transfer=self.size,
            no_transfers=self.transfers,
        )

    @property
    def stop(self) -> Packet:
        if self.kind is TransferType.INTERRUPT:
            return StopInterruptReceiving(id=STOP_ID, endpoint=self.endpoint)
        return StopBulkReceiving(id=STOP_ID, endpoint=self.endpoint, stream_id=3)

    def status(self, status: Status, packet_id: int) -> Packet:
        if self.kind is TransferType.INTERRUPT:
            return InterruptReceivingStatus(id=packet_id, endpoint=self.endpoint, status=status)
        return BulkReceivingStatus(id=packet_id, endpoint=self.endpoint, status=status, stream_id=0)

    def data(self, packet_id: int, data: bytes, status: int = Status.SUCCESS) -> Packet:
        if self.kind is TransferType.INTERRUPT:
            return InterruptPacket(id=packet_id, endpoint=self.endpoint, status=status, data=data)
        return BufferedBulkPacket(id=packet_id, endpoint=self.endpoint, status=status, data=data)


INTERRUPT = Receiving(TransferType.INTERRUPT, INTERRUPT_IN, INTERRUPT_TRANSFERS, INTERRUPT_SIZE)
BULK = Receiving(TransferType.BULK, BULK_IN, 4, 2 * BULK_SIZE)


@pytest.fixture
def device() -> FakeDevice:
    return FakeDevice()


@pytest.fixture
def bed(device: FakeDevice) -> Bed:
    """A guest that has *device*."""
    return Bed(device)


@pytest.fixture(params=[INTERRUPT, BULK], ids=["interrupt", "bulk"])
def receiving(request: pytest.FixtureRequest) -> Receiving:
    """Each kind."""
    return request.param  # type: ignore[no-any-return]


def started(bed: Bed, receiving: Receiving) -> None:
    assert bed.ask(receiving.start) == [receiving.status(Status.SUCCESS, START_ID)]


# ---------------------------------------------------------------- starting


def test_interrupt_receiving_starts(bed: Bed, device: FakeDevice) -> None:
    """Five transfers of one packet each."""
    started(bed, INTERRUPT)
    assert INTERRUPT_TRANSFERS == 5
    assert [(t.kind, t.endpoint, t.length, t.timeout) for t in device.in_flight] == [
        (TransferType.INTERRUPT, INTERRUPT_IN, INTERRUPT_SIZE, 0)
    ] * 5


@pytest.mark.parametrize("size", [BULK_SIZE, 2 * BULK_SIZE, 16 * BULK_SIZE])
@pytest.mark.parametrize("count", [1, 5, 16])
def test_bulk_receiving_starts(bed: Bed, device: FakeDevice, count: int, size: int) -> None:
    """As many and as large as the guest asked; the stream id is ignored, and 0 in the answer."""
    started(bed, Receiving(TransferType.BULK, BULK_IN, count, size))
    assert [(t.kind, t.endpoint, t.length, t.stream_id) for t in device.in_flight] == [
        (TransferType.BULK, BULK_IN, size, 0)
    ] * count


def bulk_start(
    endpoint: int = BULK_IN, size: int = BULK_SIZE, count: int = 4, stream_id: int = 0
) -> StartBulkReceiving:
    return StartBulkReceiving(
        id=START_ID, stream_id=stream_id, endpoint=endpoint, bytes_per_transfer=size, no_transfers=count
    )


def iso_start(endpoint: int, packets: int = 8, transfers: int = 4) -> StartIsoStream:
    return StartIsoStream(id=START_ID, endpoint=endpoint, pkts_per_urb=packets, no_urbs=transfers)


STALL_ISO = [IsoStreamStatus(id=START_ID, endpoint=ISO_IN, status=Status.STALL)]
STALL_BULK = [BulkReceivingStatus(id=START_ID, endpoint=BULK_IN, status=Status.STALL)]
STALL_INTERRUPT = [InterruptReceivingStatus(id=START_ID, endpoint=INTERRUPT_IN, status=Status.STALL)]


@pytest.mark.parametrize(
    ("start", "answer"),
    [
        (bulk_start(count=0), STALL_BULK),
        (bulk_start(count=17), STALL_BULK),
        (bulk_start(count=255), STALL_BULK),
        (bulk_start(size=0), STALL_BULK),
        (bulk_start(size=1), STALL_BULK),
        (bulk_start(size=BULK_SIZE - 1), STALL_BULK),
        (bulk_start(size=BULK_SIZE + 1), STALL_BULK),
        (bulk_start(INTERRUPT_IN, INTERRUPT_SIZE), STALL_INTERRUPT),
        (StartInterruptReceiving(id=START_ID, endpoint=BULK_IN), STALL_BULK),
        (bulk_start(ISO_IN, 1023), STALL_ISO),
        (StartInterruptReceiving(id=START_ID, endpoint=ISO_IN), STALL_ISO),
        (iso_start(BULK_IN), STALL_BULK),
        (iso_start(INTERRUPT_IN), STALL_INTERRUPT),
        # Endpoints that have no streams: there is no packet to answer with.
        (bulk_start(MISSING_IN), []),
        (bulk_start(0x80), []),
        (StartInterruptReceiving(id=START_ID, endpoint=MISSING_IN), []),
        (StartInterruptReceiving(id=START_ID, endpoint=0x80), []),
        (iso_start(MISSING_IN), []),
        (iso_start(MISSING_OUT), []),
        (iso_start(0x00), []),
    ],
    ids=repr,
)
def test_refused_starts(bed: Bed, device: FakeDevice, start: Packet, answer: list[Packet]) -> None:
    """stall, in the status packet of the endpoint's own type; those of isochronous streams are in test_host_iso."""
    bed.ask(SetAltSetting(id=1, interface=7, alt=2))
    assert bed.ask(start) == answer
    assert device.in_flight == []


@pytest.mark.parametrize("endpoint", [BULK_OUT, 0x00, MISSING_OUT])
def test_iso_start_on_an_out_endpoint_that_is_none(bed: Bed, endpoint: int) -> None:
    """A bulk OUT endpoint has no status packet that could say so: it is only logged."""
    assert bed.ask(iso_start(endpoint)) == []


def test_an_endpoint_without_room(device: FakeDevice) -> None:
    """Max packet size 0."""
    configuration = device.configurations[1]
    interface = configuration.interfaces[0]
    empty = tuple(type(e)(e.address, e.attributes, 0, e.interval) for e in interface.endpoints)
    device.configurations[1] = type(configuration)(1, interfaces=(type(interface)(0, 0, 0xFF, endpoints=empty),))
    bed = Bed(device)
    assert bed.ask(INTERRUPT.start, bulk_start()) == [INTERRUPT.status(Status.STALL, START_ID), *STALL_BULK]


def test_start_without_a_device(receiving: Receiving) -> None:
    """There is no endpoint that could tell the type of an answer."""
    assert Bed(None).ask(receiving.start, iso_start(ISO_IN)) == []


def test_start_on_a_lost_device(bed: Bed, device: FakeDevice, receiving: Receiving) -> None:
    bed.ask(BulkPacket(id=1, endpoint=BULK_IN_2, length=1))
    device.complete(lost=True)
    bed.news()
    assert bed.ask(receiving.start) == [receiving.status(Status.STALL, START_ID)]
    assert device.in_flight == []


def test_started_already(bed: Bed, device: FakeDevice, receiving: Receiving) -> None:
    """inval, and the running stream is left alone."""
    started(bed, receiving)
    running = list(device.in_flight)
    assert bed.ask(receiving.start) == [receiving.status(Status.INVAL, START_ID)]
    assert device.in_flight == running
    assert not device.cancelled
    device.complete(data=b"still here")
    assert bed.news() == [receiving.data(0, b"still here")]


def test_started_already_at_the_limit(device: FakeDevice, receiving: Receiving) -> None:
    """A stall would tell the guest that the stream has ended, which it has not."""
    bed = Bed(device, limits=Limits(max_transfer_bytes=receiving.transfers * receiving.size))
    started(bed, receiving)
    assert bed.ask(receiving.start) == [receiving.status(Status.INVAL, START_ID)]


def test_start_beyond_the_limit(device: FakeDevice, receiving: Receiving) -> None:
    limit = receiving.transfers * receiving.size
    bed = Bed(device, limits=Limits(max_transfer_bytes=limit - 1))
    assert bed.ask(receiving.start) == [receiving.status(Status.STALL, START_ID)]
    bed = Bed(device, limits=Limits(max_transfer_bytes=limit))
    started(bed, receiving)


def test_start_beyond_the_limit_of_transfers(device: FakeDevice, receiving: Receiving) -> None:
    bed = Bed(device, limits=Limits(max_transfers=3))
    assert bed.ask(receiving.start) == [receiving.status(Status.STALL, START_ID)]


@pytest.mark.parametrize("successes", range(4))
def test_a_submission_fails_at_the_start(bed: Bed, device: FakeDevice, receiving: Receiving, successes: int) -> None:
    """What was submitted is cancelled, stall is told, no success follows; the guest may try again."""
    device.submissions_left, device.script["submit"] = successes, Status.IOERROR
    assert bed.ask(receiving.start) == [receiving.status(Status.STALL, 0)]
    assert device.cancelled == device.in_flight
    assert len(device.cancelled) == successes
    device.submissions_left = None
    device.script.clear()
    started(bed, receiving)
    for transfer in list(device.cancelled):
        device.complete(transfer, Status.CANCELLED)
    assert bed.news() == []
    device.complete(data=b"new")
    assert bed.news() == [receiving.data(0, b"new")]


@pytest.mark.parametrize("successes", [0, 2])
def test_the_device_is_lost_at_the_start(bed: Bed, device: FakeDevice, receiving: Receiving, successes: int) -> None:
    """device_disconnect only."""
    device.submissions_left, device.script["submit"] = successes, DeviceLostError("gone")
    assert bed.ask(receiving.start) == [DeviceDisconnect()]
    assert len(device.cancelled) == successes


@pytest.mark.parametrize("alias", [0x10, 0x40])
def test_an_endpoint_has_one_stream(bed: Bed, device: FakeDevice, receiving: Receiving, alias: int) -> None:
    """Number and direction make an endpoint; the bits between do not make it another one."""
    started(bed, receiving)
    bed.ask(receiving.start.replace(endpoint=receiving.endpoint | alias))
    assert len(device.in_flight) == receiving.transfers


# ---------------------------------------------------------------- data


def test_data(bed: Bed, device: FakeDevice, receiving: Receiving) -> None:
    """One packet per transfer, ids 0, 1, 2; each transfer is submitted again."""
    started(bed, receiving)
    for number in range(2 * receiving.transfers + 1):
        transfer = device.in_flight[0]
        device.complete(data=b"%d" % number)
        assert bed.news() == [receiving.data(number, b"%d" % number)]
        assert device.in_flight[-1] is transfer
        assert len(device.in_flight) == receiving.transfers


def test_empty_and_full_packets(bed: Bed, device: FakeDevice, receiving: Receiving) -> None:
    started(bed, receiving)
    for number, data in enumerate([b"", b"x" * receiving.size, b"y"]):
        device.complete(data=data)
        assert bed.news() == [receiving.data(number, data)]


@pytest.mark.parametrize("status", [Status.CANCELLED, Status.INVAL, Status.IOERROR, Status.TIMEOUT, Status.BABBLE])
def test_failed_transfers(bed: Bed, device: FakeDevice, receiving: Receiving, status: Status) -> None:
    """Logged, an empty packet with the status, submitted again; also when it was cancelled, but not by us."""
    started(bed, receiving)
    transfer = device.in_flight[0]
    device.complete(status=status)
    assert bed.news() == [receiving.data(0, b"", status)]
    assert bed.logged(LogLevel.ERROR, f"0x{receiving.endpoint:02x}")
    assert device.in_flight[-1] is transfer
    device.complete(data=b"fine")
    assert bed.news() == [receiving.data(1, b"fine")]


def test_the_packet_of_a_failed_transfer_is_empty(bed: Bed, device: FakeDevice, receiving: Receiving) -> None:
    started(bed, receiving)
    device.complete(status=Status.BABBLE, data=b"partial")
    assert bed.news() == [receiving.data(0, b"", Status.BABBLE)]


def test_the_device_is_lost_while_receiving(bed: Bed, device: FakeDevice, receiving: Receiving) -> None:
    """device_disconnect, nothing else, and nothing is submitted again."""
    started(bed, receiving)
    device.complete(lost=True)
    assert bed.news() == [DeviceDisconnect()]
    assert len(device.in_flight) == receiving.transfers - 1
    device.complete(data=b"that came before")
    while device.in_flight:
        device.complete(lost=True)
    assert bed.news() == []


@pytest.mark.parametrize("failure", [Status.IOERROR, Status.INVAL, Status.STALL])
def test_a_transfer_cannot_be_submitted_again(
    bed: Bed, device: FakeDevice, receiving: Receiving, failure: Status
) -> None:
    """The data is delivered, then the stream ends with stall."""
    started(bed, receiving)
    device.script["submit"] = failure
    device.complete(data=b"last")
    assert bed.news() == [receiving.data(0, b"last"), receiving.status(Status.STALL, 0)]
    assert device.cancelled == device.in_flight
    while device.in_flight:
        device.complete(status=Status.CANCELLED)
    assert bed.news() == []


def test_the_device_is_lost_when_a_transfer_is_submitted_again(
    bed: Bed, device: FakeDevice, receiving: Receiving
) -> None:
    started(bed, receiving)
    device.script["submit"] = DeviceLostError("gone")
    device.complete(data=b"last")
    assert bed.news() == [receiving.data(0, b"last"), DeviceDisconnect()]


def test_endpoints_count_for_themselves(bed: Bed, device: FakeDevice) -> None:
    started(bed, INTERRUPT)
    started(bed, BULK)
    bulk = [t for t in device.in_flight if t.kind is TransferType.BULK]
    device.complete(bulk[0], data=b"a")
    device.complete(data=b"b")
    device.complete(bulk[1], data=b"c")
    assert bed.news() == [BULK.data(0, b"a"), INTERRUPT.data(0, b"b"), BULK.data(1, b"c")]


# ---------------------------------------------------------------- stalls


def test_recovery(bed: Bed, device: FakeDevice, receiving: Receiving) -> None:
    """Cancel the rest, clear the halt, start again with the same parameters, ids from 0; the guest sees nothing."""
    started(bed, receiving)
    device.complete(data=b"before")
    bed.news()
    old = list(device.in_flight)
    device.complete(old[0], Status.STALL)
    assert bed.news() == []
    assert bed.logged(LogLevel.WARNING, "stalled")
    assert set(device.cancelled) == set(old[1:])
    assert device.calls[-1] == ("clear_halt", receiving.endpoint)
    new = [transfer for transfer in device.in_flight if transfer not in old]
    assert [transfer.length for transfer in new] == [receiving.size] * receiving.transfers
    for transfer in old[1:]:  # whatever these say, their run is over
        device.complete(transfer, Status.STALL)
    assert bed.news() == []
    device.complete(new[0], data=b"after")
    assert bed.news() == [receiving.data(0, b"after")]


def test_recovery_fails(bed: Bed, device: FakeDevice, receiving: Receiving) -> None:
    """A failed clear-halt ends the stream with stall."""
    started(bed, receiving)
    device.script["clear_halt"] = Status.IOERROR
    device.complete(status=Status.STALL)
    assert bed.news() == [receiving.status(Status.STALL, 0)]
    assert device.cancelled == device.in_flight
    device.script.clear()
    started(bed, receiving)


def test_the_device_is_lost_in_a_recovery(bed: Bed, device: FakeDevice, receiving: Receiving) -> None:
    started(bed, receiving)
    device.script["clear_halt"] = DeviceLostError("gone")
    device.complete(status=Status.STALL)
    assert bed.news() == [DeviceDisconnect()]
    assert bed.ask(receiving.stop) == []


def running(device: FakeDevice) -> list[Transfer]:
    return [transfer for transfer in device.in_flight if transfer not in device.cancelled]


def test_recoveries_are_limited(bed: Bed, device: FakeDevice, receiving: Receiving) -> None:
    """A device that stalls without end ends the stream after 16 recoveries in a row."""
    started(bed, receiving)
    for _ in range(MAX_RECOVERIES):
        device.complete(running(device)[0], Status.STALL)
        assert bed.news() == []
        device.handle_events()
    device.complete(running(device)[0], Status.STALL)
    assert bed.news() == [receiving.status(Status.STALL, 0)]
    assert running(device) == []
    started(bed, receiving)


def test_data_between_makes_a_new_row(bed: Bed, device: FakeDevice, receiving: Receiving) -> None:
    started(bed, receiving)
    for _ in range(MAX_RECOVERIES + 5):
        device.complete(running(device)[0], Status.STALL)
        device.handle_events()
        device.complete(running(device)[0], data=b"x")
        assert bed.news() == [receiving.data(0, b"x")]


def test_failures_between_make_no_new_row(bed: Bed, device: FakeDevice, receiving: Receiving) -> None:
    started(bed, receiving)
    for _ in range(MAX_RECOVERIES + 1):
        device.complete(running(device)[0], Status.IOERROR)
        assert bed.news() == [receiving.data(0, b"", Status.IOERROR)]
        device.complete(running(device)[0], Status.STALL)
        device.handle_events()
    assert bed.news() == [receiving.status(Status.STALL, 0)]


# ---------------------------------------------------------------- stopping


def test_stop(bed: Bed, device: FakeDevice, receiving: Receiving) -> None:
    """Success at once; what the cancelled transfers bring later is swallowed."""
    started(bed, receiving)
    assert bed.ask(receiving.stop) == [receiving.status(Status.SUCCESS, STOP_ID)]
    assert device.cancelled == device.in_flight
    assert len(device.in_flight) == receiving.transfers
    for status in (Status.SUCCESS, Status.STALL, Status.CANCELLED):
        device.complete(status=status, data=b"late")
    device.complete(lost=True)
    assert bed.news() == []
    assert len(device.in_flight) == receiving.transfers - 4
    assert not device.done("clear_halt")


def test_stop_of_nothing(bed: Bed, receiving: Receiving) -> None:
    """Success even though nothing was started."""
    assert bed.ask(receiving.stop, receiving.stop) == [receiving.status(Status.SUCCESS, STOP_ID)] * 2


@pytest.mark.parametrize(
    ("stop", "answer"),
    [
        (
            StopInterruptReceiving(id=STOP_ID, endpoint=BULK_IN),
            [BulkReceivingStatus(id=STOP_ID, endpoint=BULK_IN, status=Status.SUCCESS)],
        ),
        (
            StopIsoStream(id=STOP_ID, endpoint=INTERRUPT_IN),
            [InterruptReceivingStatus(id=STOP_ID, endpoint=INTERRUPT_IN, status=Status.SUCCESS)],
        ),
        (StopIsoStream(id=STOP_ID, endpoint=ISO_IN), [IsoStreamStatus(id=STOP_ID, endpoint=ISO_IN)]),
        (StopIsoStream(id=STOP_ID, endpoint=MISSING_IN), []),
        (StopIsoStream(id=STOP_ID, endpoint=0x00), []),
        (StopBulkReceiving(id=STOP_ID, endpoint=MISSING_IN), []),
    ],
    ids=repr,
)
def test_stop_follows_the_type_of_the_endpoint(bed: Bed, stop: Packet, answer: list[Packet]) -> None:
    bed.ask(SetAltSetting(id=1, interface=7, alt=2))
    assert bed.ask(stop) == answer


def test_stop_without_a_device(bed: Bed, device: FakeDevice, receiving: Receiving) -> None:
    """No answer; neither for a lost one."""
    assert Bed(None).ask(receiving.stop) == []
    started(bed, receiving)
    device.complete(lost=True)
    bed.news()
    assert bed.ask(receiving.stop, StopIsoStream(id=1, endpoint=ISO_IN)) == []


def test_start_while_the_old_stream_is_ending(bed: Bed, device: FakeDevice, receiving: Receiving) -> None:
    """Completions of the old run do not disturb the new one."""
    started(bed, receiving)
    old = list(device.in_flight)
    assert bed.ask(receiving.stop, receiving.start) == [
        receiving.status(Status.SUCCESS, STOP_ID),
        receiving.status(Status.SUCCESS, START_ID),
    ]
    device.complete(data=b"old")
    new = [transfer for transfer in device.in_flight if transfer not in old]
    device.complete(new[0], data=b"new")
    device.handle_events()
    device.complete(new[1], data=b"newer")
    assert bed.news() == [receiving.data(0, b"new"), receiving.data(1, b"newer")]
    assert len(device.in_flight) == receiving.transfers


def test_set_configuration_ends_streams_silently(bed: Bed, device: FakeDevice, receiving: Receiving) -> None:
    started(bed, receiving)
    assert bed.ask(SetConfiguration(id=1, configuration=2))[-1] == ConfigurationStatus(id=1, configuration=2)
    assert device.cancelled == device.in_flight
    device.handle_events()
    assert bed.news() == []


def test_set_alt_setting_ends_only_its_own_streams(bed: Bed, device: FakeDevice) -> None:
    started(bed, BULK)
    alternate = Receiving(TransferType.INTERRUPT, ALTERNATE_INTERRUPT_IN, 5, 8)
    bed.ask(SetAltSetting(id=1, interface=7, alt=5))
    started(bed, alternate)
    bed.ask(SetAltSetting(id=2, interface=7, alt=0))
    assert {transfer.endpoint for transfer in device.cancelled} == {ALTERNATE_INTERRUPT_IN}
    device.handle_events()
    bed.news()
    device.complete(data=b"on")
    assert bed.news() == [BULK.data(0, b"on")]


# ---------------------------------------------------------------- a slow connection


def overload(bed: Bed, packets: int = MAX_STREAM_BACKLOG + 1) -> None:
    """Let so many packets wait to be written."""
    bed.blocked = True
    while bed.host.has_data_to_write() < packets:
        bed.ask(GetConfiguration(id=1000))


def test_interrupt_data_is_dropped_above_the_backlog(bed: Bed, device: FakeDevice) -> None:
    """More than 800 packets: dropped; ids go on, so that the guest sees the gap; one warning; submitted again."""
    started(bed, INTERRUPT)
    overload(bed, MAX_STREAM_BACKLOG - 1)
    for number in range(5):
        device.complete(data=b"%d" % number)
    assert bed.host.has_data_to_write() == MAX_STREAM_BACKLOG + 1
    assert len(bed.logged(LogLevel.WARNING, "too slow")) == 1
    assert len(device.in_flight) == INTERRUPT_TRANSFERS
    received = [packet for packet in bed.unblock() if isinstance(packet, InterruptPacket)]
    assert received == [INTERRUPT.data(0, b"0"), INTERRUPT.data(1, b"1")]
    device.complete(data=b"5")
    assert bed.news() == [INTERRUPT.data(5, b"5")]


def test_failures_are_dropped_above_the_backlog_too(bed: Bed, device: FakeDevice) -> None:
    started(bed, INTERRUPT)
    overload(bed)
    device.complete(status=Status.IOERROR)
    assert bed.host.has_data_to_write() == MAX_STREAM_BACKLOG + 1


def test_the_warning_comes_again_after_the_interface_was_parsed_again(bed: Bed, device: FakeDevice) -> None:
    started(bed, INTERRUPT)
    for warnings in (1, 2):
        overload(bed)
        for _ in range(3):
            device.complete()
        assert len(bed.logged(LogLevel.WARNING, "too slow")) == warnings
        bed.unblock()
        bed.ask(SetAltSetting(id=1, interface=7, alt=0))


def test_replies_are_never_dropped(bed: Bed, device: FakeDevice) -> None:
    """Nor are statuses."""
    started(bed, INTERRUPT)
    overload(bed)
    bed.ask(BulkPacket(id=7, endpoint=BULK_IN, length=4))
    device.complete(device.in_flight[-1], data=b"safe")
    bed.ask(INTERRUPT.stop)
    assert bed.unblock()[-2:] == [
        BulkPacket(id=7, endpoint=BULK_IN, data=b"safe"),
        INTERRUPT.status(Status.SUCCESS, STOP_ID),
    ]


def test_bulk_receiving_pauses(bed: Bed, device: FakeDevice) -> None:
    """Unlike in the original no data is lost: above the backlog nothing more is read, until the guest caught up."""
    started(bed, BULK)
    overload(bed)
    expected = []
    for number in range(BULK.transfers):
        expected.append(BULK.data(number, b"%d" % number))
        device.complete(data=b"%d" % number)
    assert device.in_flight == []
    assert len(bed.logged(LogLevel.WARNING, "too slow")) == 1
    received = [packet for packet in bed.unblock() if isinstance(packet, BufferedBulkPacket)]
    assert received == expected
    assert len(device.in_flight) == BULK.transfers
    device.complete(data=b"on")
    assert bed.news() == [BULK.data(BULK.transfers, b"on")]


def test_bulk_receiving_goes_on_as_soon_as_there_is_room(bed: Bed, device: FakeDevice) -> None:
    """At 800 packets, not only when all are written."""
    started(bed, BULK)
    overload(bed)
    device.complete(data=b"1")
    assert bed.host.has_data_to_write() == MAX_STREAM_BACKLOG + 2
    room = len(bed.received) + 1

    def block(packet: Packet) -> None:
        bed.blocked = len(bed.received) >= room

    bed.on_packet = block
    bed.unblock()
    assert (bed.host.has_data_to_write(), len(device.in_flight)) == (MAX_STREAM_BACKLOG + 1, BULK.transfers - 1)
    room += 1
    bed.unblock()
    assert (bed.host.has_data_to_write(), len(device.in_flight)) == (MAX_STREAM_BACKLOG, BULK.transfers)


def test_a_paused_stream_can_be_stopped_and_started(bed: Bed, device: FakeDevice) -> None:
    started(bed, BULK)
    overload(bed)
    device.complete(data=b"1")
    device.complete(data=b"2")
    bed.ask(BULK.stop, BULK.start)
    assert len(device.cancelled) == BULK.transfers - 2
    assert bed.unblock()[-2:] == [BULK.status(Status.SUCCESS, STOP_ID), BULK.status(Status.SUCCESS, START_ID)]
    device.handle_events()
    assert len(device.in_flight) == BULK.transfers
    device.complete(data=b"new")
    assert bed.news() == [BULK.data(0, b"new")]


def test_a_paused_stream_counts(device: FakeDevice) -> None:
    """Its transfers are submitted again some day: a guest gets no others for them."""
    bed = Bed(device, limits=Limits(max_transfers=BULK.transfers + 1))
    started(bed, BULK)
    overload(bed)
    for _ in range(BULK.transfers):
        device.complete(data=b"1")
    assert not device.in_flight
    requests = [BulkPacket(id=number, endpoint=BULK.endpoint, length=512) for number in (1, 2)]
    bed.ask(*requests)
    assert len(device.in_flight) == 1
    bed.unblock()
    assert len(device.in_flight) == BULK.transfers + 1


@pytest.mark.parametrize("failure", [Status.IOERROR, DeviceLostError("gone")], ids=str)
def test_a_paused_stream_cannot_be_resumed(bed: Bed, device: FakeDevice, failure: Status | DeviceLostError) -> None:
    started(bed, BULK)
    overload(bed)
    device.complete(data=b"1")
    device.complete(data=b"2")
    device.script["submit"] = failure
    end = DeviceDisconnect() if isinstance(failure, DeviceLostError) else BULK.status(Status.STALL, 0)
    assert bed.unblock()[-3:] == [BULK.data(0, b"1"), BULK.data(1, b"2"), end]
    assert device.cancelled == device.in_flight


def test_a_paused_stream_stalls(bed: Bed, device: FakeDevice) -> None:
    """The recovery starts all transfers anew, also those that waited."""
    started(bed, BULK)
    overload(bed)
    device.complete(data=b"1")
    device.complete(status=Status.STALL)
    device.handle_events()
    assert len(device.in_flight) == BULK.transfers
    bed.unblock()
    assert len(device.in_flight) == BULK.transfers


def test_the_device_is_lost_while_a_stream_is_paused(bed: Bed, device: FakeDevice) -> None:
    """Nothing is in flight that could tell: the attempt to go on does."""
    started(bed, BULK)
    overload(bed)
    for _ in range(BULK.transfers):
        device.complete(data=b"x")
    bed.ask(BulkPacket(id=7, endpoint=BULK_IN_2, length=1))
    device.complete(lost=True)
    device.script["submit"] = DeviceLostError("gone")
    end = [DeviceDisconnect(), BulkPacket(id=7, endpoint=BULK_IN_2, status=Status.IOERROR)]
    assert bed.unblock()[-2:] == end
    assert bed.host.has_data_to_write() == 0


@given(st.lists(st.sampled_from(["data", "block", "unblock", "write"]), max_size=60))
def test_bulk_receiving_loses_nothing(steps: list[str]) -> None:
    """Whatever the connection does, the guest gets every byte in order, and reading goes on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(usbredir.host, "MAX_STREAM_BACKLOG", 20)
        receive_with_interruptions(steps)


def receive_with_interruptions(steps: list[str]) -> None:
    device = FakeDevice()
    bed = Bed(device)
    started(bed, BULK)
    sent = 0
    for step in steps:
        if step == "data":
            for _ in range(min(3, len(device.in_flight))):
                device.complete(data=b"%d," % sent)
                sent += 1
        elif step == "block":
            overload(bed, 21)
        else:
            bed.blocked = bed.blocked and step == "write"
            bed.host.write_guest_data()
    bed.unblock()
    assert len(device.in_flight) == BULK.transfers
    received = [packet for packet in bed.received if isinstance(packet, BufferedBulkPacket)]
    assert [packet.id for packet in received] == list(range(sent))
    assert b"".join(packet.data for packet in received) == b"".join(b"%d," % number for number in range(sent))
    bed.host.close()


def test_a_guest_that_never_reads_cannot_fill_the_memory() -> None:
    """Bulk receiving in large pieces: what waits to be written stays within some multiple of what is in flight."""
    device = LoopbackDevice()
    bed = Bed(device, limits=Limits(max_transfer_bytes=1 << 20, max_queued_bytes=1 << 20))
    bed.blocked = True
    bed.ask(StartBulkReceiving(id=1, endpoint=0x82, bytes_per_transfer=1 << 16, no_transfers=16))
    tracemalloc.start()
    try:
        for _ in range(20):
            device.handle_events(0)
        assert bed.host.buffered_output_size() < 4 << 20
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_bulk_receiving_without_the_capability_is_not_started(device: FakeDevice) -> None:
    """Neither status nor data could be sent: the device would be read for nothing, without end."""
    bed = Bed(device, capabilities=[])
    end = len(bed.received)
    # A guest's parser refuses to send it, so it is put on the wire by hand: the guest has 32-bit ids.
    bed.host._packet_received(StartBulkReceiving(id=1, endpoint=BULK_IN, bytes_per_transfer=512, no_transfers=4))
    assert device.in_flight == []
    assert bed.received[end:] == []
    assert any("without that capability" in message for _, message in bed.messages)
