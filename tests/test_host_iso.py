"""usbredir.host: isochronous streams, IN and OUT. HOST_BEHAVIOUR 6."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from usbredir._streams import MAX_RECOVERIES
from usbredir.device import Transfer
from usbredir.errors import DeviceLostError
from usbredir.host import MAX_STREAM_BACKLOG, READ_BACKLOG_PACKETS
from usbredir.limits import Limits
from usbredir.packets import (
    AltSettingStatus,
    BulkPacket,
    BulkReceivingStatus,
    ConfigurationStatus,
    ControlPacket,
    DeviceDisconnect,
    GetConfiguration,
    InterruptReceivingStatus,
    IsoPacket,
    IsoStreamStatus,
    Packet,
    Reset,
    SetAltSetting,
    SetConfiguration,
    StartInterruptReceiving,
    StartIsoStream,
    StopIsoStream,
)
from usbredir.parser import LogLevel
from usbredir.proto import Status, TransferType
from usbredir.virtual.loopback import LoopbackDevice

from .host_bed import BULK_IN, BULK_OUT, INTERRUPT_IN, ISO_IN, ISO_OUT, MISSING_IN, MISSING_OUT, Bed, FakeDevice

START_ID, STOP_ID = 41, 42
IN_SIZE, OUT_SIZE = 1023, 3072
SIZES = {ISO_IN: IN_SIZE, ISO_OUT: OUT_SIZE}
OK = int(Status.SUCCESS)

both = pytest.mark.parametrize("endpoint", [ISO_IN, ISO_OUT], ids=["in", "out"])
FAILURES = [Status.INVAL, Status.IOERROR, Status.TIMEOUT, Status.BABBLE]


def start(endpoint: int, packets: int = 4, transfers: int = 3) -> StartIsoStream:
    return StartIsoStream(id=START_ID, endpoint=endpoint, pkts_per_urb=packets, no_urbs=transfers)


def stop(endpoint: int) -> StopIsoStream:
    return StopIsoStream(id=STOP_ID, endpoint=endpoint)


def status(endpoint: int, status: int, packet_id: int) -> Packet:
    return IsoStreamStatus(id=packet_id, endpoint=endpoint, status=status)


def packet(packet_id: int, data: bytes = b"", status: int = OK) -> IsoPacket:
    return IsoPacket(id=packet_id, endpoint=ISO_IN, status=status, data=data)


def out(packet_id: int, data: bytes = b"x") -> IsoPacket:
    return IsoPacket(id=packet_id, endpoint=ISO_OUT, data=data)


def packets_of(packets: Sequence[Packet]) -> list[IsoPacket]:
    return [packet for packet in packets if isinstance(packet, IsoPacket)]


def good(count: int, data: bytes = b"d") -> list[tuple[int, bytes]]:
    """The packets of a transfer."""
    return [(OK, data)] * count


@pytest.fixture
def device() -> FakeDevice:
    return FakeDevice()


@pytest.fixture
def bed(device: FakeDevice) -> Bed:
    return ready(device)


def ready(device: FakeDevice, limits: Limits | None = None) -> Bed:
    """A guest that has *device* with its isochronous endpoints."""
    bed = Bed(device, limits=limits)
    bed.ask(SetAltSetting(id=1, interface=7, alt=2))
    return bed


def started(bed: Bed, endpoint: int, packets: int = 4, transfers: int = 3) -> None:
    assert bed.ask(start(endpoint, packets, transfers)) == [status(endpoint, OK, START_ID)]


def running(device: FakeDevice) -> list[Transfer]:
    return [transfer for transfer in device.in_flight if transfer not in device.cancelled]


def data_of(transfers: Sequence[Transfer]) -> list[bytes]:
    return [bytes(transfer.data) for transfer in transfers]


# ---------------------------------------------------------------- starting


@pytest.mark.parametrize("packets", [1, 8, 32])
@pytest.mark.parametrize("transfers", [1, 5, 16])
def test_receiving_starts(bed: Bed, device: FakeDevice, packets: int, transfers: int) -> None:
    """All transfers, with room for the largest packets, and a timeout of a second."""
    started(bed, ISO_IN, packets, transfers)
    assert len(device.in_flight) == transfers
    for transfer in device.in_flight:
        assert (transfer.kind, transfer.endpoint, transfer.timeout) == (TransferType.ISO, ISO_IN, 1.0)
        assert (transfer.length, list(transfer.iso_lengths)) == (packets * IN_SIZE, [IN_SIZE] * packets)


def test_sending_starts(bed: Bed, device: FakeDevice) -> None:
    """Success at once; nothing to submit yet."""
    started(bed, ISO_OUT)
    assert device.in_flight == []


@both
@pytest.mark.parametrize(("packets", "transfers"), [(0, 4), (33, 4), (255, 4), (4, 0), (4, 17), (4, 255), (0, 0)])
def test_parameters_that_do_not_fit(bed: Bed, device: FakeDevice, endpoint: int, packets: int, transfers: int) -> None:
    assert bed.ask(start(endpoint, packets, transfers)) == [status(endpoint, Status.STALL, START_ID)]
    assert device.in_flight == []
    started(bed, endpoint)


def test_endpoints_of_other_types(bed: Bed, device: FakeDevice) -> None:
    """stall, in the status packet of the endpoint's own type; no answer where there is none."""
    assert bed.ask(start(BULK_IN)) == [BulkReceivingStatus(id=START_ID, endpoint=BULK_IN, status=Status.STALL)]
    assert bed.ask(start(INTERRUPT_IN)) == [
        InterruptReceivingStatus(id=START_ID, endpoint=INTERRUPT_IN, status=Status.STALL)
    ]
    assert bed.ask(start(MISSING_IN), start(MISSING_OUT), start(0x00), start(0x80)) == []
    assert bed.ask(StartInterruptReceiving(id=3, endpoint=ISO_IN)) == [status(ISO_IN, Status.STALL, 3)]
    assert device.in_flight == []


@both
def test_an_endpoint_without_room(device: FakeDevice, endpoint: int) -> None:
    """Max packet size 0."""
    configuration = device.configurations[1]
    interface = configuration.interfaces[-1]
    empty = tuple(type(e)(e.address, e.attributes, 0, e.interval) for e in interface.endpoints)
    device.configurations[1] = type(configuration)(1, interfaces=(type(interface)(7, 0, 0x0E, endpoints=empty),))
    bed = Bed(device)
    assert bed.ask(start(endpoint)) == [status(endpoint, Status.STALL, START_ID)]


@both
def test_started_already(bed: Bed, device: FakeDevice, endpoint: int) -> None:
    """inval, and the running stream is left alone; parameters are looked at first."""
    started(bed, endpoint)
    assert bed.ask(start(endpoint, 8, 8)) == [status(endpoint, Status.INVAL, START_ID)]
    assert bed.ask(start(endpoint, 0, 8)) == [status(endpoint, Status.STALL, START_ID)]
    assert not device.cancelled
    if endpoint == ISO_IN:
        device.complete(packets=good(4))
        assert bed.news() == [packet(number, b"d") for number in range(4)]


@both
@pytest.mark.parametrize("alias", [0x10, 0x40, 0x70])
def test_an_endpoint_has_one_stream(bed: Bed, device: FakeDevice, endpoint: int, alias: int) -> None:
    """Number and direction make an endpoint."""
    started(bed, endpoint)
    assert bed.ask(start(endpoint | alias)) == [status(endpoint, Status.INVAL, START_ID)]


@both
def test_start_on_a_lost_device(bed: Bed, device: FakeDevice, endpoint: int) -> None:
    """stall; the parameters do not matter, nor that it was started. A stop has no answer."""
    started(bed, endpoint)
    bed.ask(BulkPacket(id=1, endpoint=BULK_IN, length=1))
    device.complete(device.in_flight[-1], lost=True)
    bed.news()
    assert bed.ask(start(endpoint), start(endpoint, 0)) == [status(endpoint, Status.STALL, START_ID)] * 2
    assert bed.ask(stop(endpoint)) == []


def test_without_a_device() -> None:
    """There is no endpoint that could tell the type of an answer."""
    assert Bed(None).ask(start(ISO_IN), start(ISO_OUT), stop(ISO_IN)) == []


@pytest.mark.parametrize("successes", range(3))
def test_a_submission_fails_at_the_start(bed: Bed, device: FakeDevice, successes: int) -> None:
    """The rest is cancelled; stall with the id of the transfer that failed; no success follows."""
    device.submissions_left, device.script["submit"] = successes, Status.IOERROR
    assert bed.ask(start(ISO_IN)) == [status(ISO_IN, Status.STALL, 4 * successes)]
    assert device.cancelled == device.in_flight
    assert len(device.cancelled) == successes
    device.submissions_left = None
    device.script.clear()
    started(bed, ISO_IN)
    for transfer in list(device.cancelled):
        device.complete(transfer, Status.CANCELLED)
    assert bed.news() == []


@pytest.mark.parametrize("successes", [0, 2])
def test_the_device_is_lost_at_the_start(bed: Bed, device: FakeDevice, successes: int) -> None:
    device.submissions_left, device.script["submit"] = successes, DeviceLostError("gone")
    assert bed.ask(start(ISO_IN)) == [DeviceDisconnect()]
    assert len(device.cancelled) == successes


# ---------------------------------------------------------------- receiving


def test_packets(bed: Bed, device: FakeDevice) -> None:
    """Each packet of a transfer, ids 0, 1, 2 over all transfers; each is submitted again."""
    started(bed, ISO_IN, packets=2, transfers=3)
    for number in range(0, 20, 2):
        transfer = device.in_flight[0]
        device.complete(packets=[(OK, b"%d" % number), (OK, b"%d" % (number + 1))])
        assert bed.news() == [packet(number, b"%d" % number), packet(number + 1, b"%d" % (number + 1))]
        assert device.in_flight[-1] is transfer
        assert len(device.in_flight) == 3


def test_success_comes_before_the_first_packet(bed: Bed, device: FakeDevice) -> None:
    bed.blocked = True
    bed.ask(start(ISO_IN, 1, 1))
    device.complete(packets=good(1))
    assert bed.unblock() == [status(ISO_IN, OK, START_ID), packet(0, b"d")]


def test_empty_full_and_bad_packets(bed: Bed, device: FakeDevice) -> None:
    """Each has its own status; a bad one has no data."""
    started(bed, ISO_IN, packets=7, transfers=2)
    results = [(OK, b""), (OK, b"x" * IN_SIZE), *((int(failure), b"partial") for failure in FAILURES), (OK, b"y")]
    device.complete(packets=results)
    assert bed.news() == [
        packet(0),
        packet(1, b"x" * IN_SIZE),
        *(packet(2 + number, b"", failure) for number, failure in enumerate(FAILURES)),
        packet(6, b"y"),
    ]
    assert len(device.in_flight) == 2


@pytest.mark.parametrize("failure", FAILURES)
def test_a_transfer_fails_as_a_whole(bed: Bed, device: FakeDevice, failure: Status) -> None:
    """One empty packet with the status, ids skip the transfer, and on; packets that it had before do not matter."""
    started(bed, ISO_IN, packets=4, transfers=2)
    transfer = device.in_flight[0]
    device.complete(packets=good(4, b"old"))
    device.complete(packets=good(4))
    bed.news()
    device.complete(status=failure)
    assert bed.news() == [packet(8, b"", failure)]
    assert bed.logged(LogLevel.ERROR, f"0x{ISO_IN:02x}")
    assert device.in_flight[-1] is transfer
    device.complete(packets=good(4))
    assert [p.id for p in packets_of(bed.news())] == [12, 13, 14, 15]
    device.complete(packets=good(4))
    assert [p.id for p in packets_of(bed.news())] == [16, 17, 18, 19]


def test_a_transfer_is_cancelled_but_not_by_us(bed: Bed, device: FakeDevice) -> None:
    """Nothing is told and it is not used any more; the ids of the others go on as if it were."""
    started(bed, ISO_IN, packets=1, transfers=3)
    device.complete(status=Status.CANCELLED)
    assert bed.news() == []
    assert len(device.in_flight) == 2
    for expected in (1, 2, 4, 5):
        device.complete(packets=good(1))
        assert bed.news() == [packet(expected, b"d")]


def test_a_packet_is_cancelled_but_not_by_us(bed: Bed, device: FakeDevice) -> None:
    """What came before it is sent, and the transfer is not used any more."""
    started(bed, ISO_IN, packets=3, transfers=2)
    device.complete(packets=[(OK, b"a"), (Status.CANCELLED, b"b"), (OK, b"c")])
    assert bed.news() == [packet(0, b"a")]
    assert len(device.in_flight) == 1
    device.complete(packets=good(3))
    assert [p.id for p in packets_of(bed.news())] == [3, 4, 5]


def test_the_device_is_lost(bed: Bed, device: FakeDevice) -> None:
    """device_disconnect, nothing else, and nothing is submitted again."""
    started(bed, ISO_IN)
    device.complete(lost=True)
    assert bed.news() == [DeviceDisconnect()]
    assert len(device.in_flight) == 2
    while device.in_flight:
        device.complete(packets=good(4))
    assert bed.news() == []


@pytest.mark.parametrize("failure", [Status.IOERROR, DeviceLostError("gone")], ids=str)
def test_a_transfer_cannot_be_submitted_again(bed: Bed, device: FakeDevice, failure: Status | DeviceLostError) -> None:
    """Its packets are delivered, then the stream ends; stall with the id that it would have had next."""
    started(bed, ISO_IN, packets=1, transfers=3)
    device.script["submit"] = failure
    device.complete(packets=good(1))
    end = DeviceDisconnect() if isinstance(failure, DeviceLostError) else status(ISO_IN, Status.STALL, 3)
    assert bed.news() == [packet(0, b"d"), end]
    assert device.cancelled == device.in_flight


def test_streams_count_for_themselves(device: FakeDevice) -> None:
    bed = ready(device)
    started(bed, ISO_IN, 1, 2)
    bed.ask(StartInterruptReceiving(id=1, endpoint=INTERRUPT_IN))
    device.complete(packets=good(1))
    device.complete(device.in_flight[1], data=b"i")
    device.complete(packets=good(1))
    assert [p.id for p in bed.news()] == [0, 0, 1]


# ---------------------------------------------------------------- stalls


def stall(device: FakeDevice, *, packet: bool) -> None:
    """A transfer of the present run stalls, or its last packet does."""
    transfer = running(device)[0]
    if packet:
        device.complete(transfer, packets=[(Status.IOERROR, b""), (Status.STALL, b"")])
    else:
        device.complete(transfer, Status.STALL)


def test_recovery(bed: Bed, device: FakeDevice) -> None:
    """Cancel the rest, clear the halt, start again with the same parameters, ids from 0, silently."""
    started(bed, ISO_IN, 2, 3)
    device.complete(packets=good(2))
    bed.news()
    old = list(device.in_flight)
    stall(device, packet=False)
    assert bed.news() == []
    assert bed.logged(LogLevel.WARNING, "stalled")
    assert set(device.cancelled) == set(old[1:])
    assert device.calls[-1] == ("clear_halt", ISO_IN)
    assert [list(transfer.iso_lengths) for transfer in running(device)] == [[IN_SIZE] * 2] * 3
    for transfer in old[1:]:
        device.complete(transfer, Status.STALL)
    assert bed.news() == []
    device.complete(packets=good(2))
    assert bed.news() == [packet(0, b"d"), packet(1, b"d")]


def test_recovery_from_a_packet(bed: Bed, device: FakeDevice) -> None:
    """What came before it is sent, what comes after it is not."""
    started(bed, ISO_IN, 3, 2)
    device.complete(packets=[(OK, b"a"), (Status.STALL, b""), (OK, b"c")])
    assert bed.news() == [packet(0, b"a")]
    assert device.done("clear_halt") == [("clear_halt", ISO_IN)]
    device.complete(running(device)[0], packets=good(3))
    assert [p.id for p in packets_of(bed.news())] == [0, 1, 2]


@pytest.mark.parametrize("failure", [Status.IOERROR, DeviceLostError("gone")], ids=str)
def test_recovery_fails(bed: Bed, device: FakeDevice, failure: Status | DeviceLostError) -> None:
    """A failed clear-halt ends the stream with stall; without the device there is only the disconnection."""
    started(bed, ISO_IN)
    device.script["clear_halt"] = failure
    device.complete(status=Status.STALL)
    lost = isinstance(failure, DeviceLostError)
    assert bed.news() == [DeviceDisconnect() if lost else status(ISO_IN, Status.STALL, 0)]
    assert device.cancelled == device.in_flight


@pytest.mark.parametrize("by_packet", [False, True])
def test_recoveries_are_limited(bed: Bed, device: FakeDevice, by_packet: bool) -> None:
    """A device that stalls without end ends the stream after 16 recoveries in a row; failures make no new row."""
    started(bed, ISO_IN, 2, 3)
    for _ in range(MAX_RECOVERIES):
        device.complete(running(device)[0], packets=[(Status.BABBLE, b"")] * 2)
        stall(device, packet=by_packet)
        device.handle_events()
    bed.news()
    stall(device, packet=by_packet)
    assert bed.news()[-1] == status(ISO_IN, Status.STALL, 0)
    assert running(device) == []
    started(bed, ISO_IN)


def test_data_between_makes_a_new_row(bed: Bed, device: FakeDevice) -> None:
    started(bed, ISO_IN, 2, 3)
    for _ in range(MAX_RECOVERIES + 5):
        stall(device, packet=False)
        device.handle_events()
        device.complete(running(device)[0], packets=[(Status.IOERROR, b""), (OK, b"x")])
        assert bed.news() == [packet(0, b"", Status.IOERROR), packet(1, b"x")]


# ---------------------------------------------------------------- a slow connection


def overload(bed: Bed, packets: int = MAX_STREAM_BACKLOG + 1) -> None:
    """Let so many packets wait to be written."""
    bed.blocked = True
    while bed.host.has_data_to_write() < packets:
        bed.ask(GetConfiguration(id=1000))


def test_dropping_above_the_backlog(bed: Bed, device: FakeDevice) -> None:
    """More than 800 packets: dropped; ids go on, so that the guest sees the gap; one warning; submitted again."""
    started(bed, ISO_IN, 1, 16)
    overload(bed, MAX_STREAM_BACKLOG - 1)
    for _ in range(6):
        device.complete(packets=good(1))
    assert bed.host.has_data_to_write() == MAX_STREAM_BACKLOG + 1
    assert len(bed.logged(LogLevel.WARNING, "too slow")) == 1
    assert len(device.in_flight) == 16
    assert packets_of(bed.unblock()) == [packet(0, b"d"), packet(1, b"d")]
    device.complete(packets=good(1))
    assert bed.news() == [packet(6, b"d")]


def test_the_warning_comes_again_after_the_interface_was_parsed_again(bed: Bed, device: FakeDevice) -> None:
    for warnings in (1, 2):
        started(bed, ISO_IN, 1, 4)
        overload(bed)
        for _ in range(3):
            device.complete(running(device)[0], packets=good(1))
        assert len(bed.logged(LogLevel.WARNING, "too slow")) == warnings
        bed.unblock()
        bed.ask(SetAltSetting(id=1, interface=7, alt=2))
        device.handle_events()


def test_dropping_by_bytes(bed: Bed, device: FakeDevice) -> None:
    """It begins at three times the bytes of all buffers, and ends below half of them."""
    started(bed, ISO_IN, 1, 2)
    size = 2 * IN_SIZE
    bed.blocked = True
    while bed.host.buffered_output_size() < 3 * size:
        waiting = bed.host.has_data_to_write()
        device.complete(packets=good(1, bytes(IN_SIZE)))
        assert bed.host.has_data_to_write() == waiting + 1
    assert bed.logged(LogLevel.WARNING, "too slow") == []
    waiting = bed.host.has_data_to_write()
    device.complete(packets=good(1))
    assert bed.host.has_data_to_write() == waiting
    assert len(bed.logged(LogLevel.WARNING, "too slow")) == 1

    def room_for(count: int) -> None:
        """The guest takes *count* packets."""
        end = len(bed.received) + count
        bed.on_packet = lambda packet: setattr(bed, "blocked", len(bed.received) >= end)
        bed.unblock()
        bed.blocked = True

    while bed.host.buffered_output_size() >= size // 2:
        device.complete(packets=good(1))
        assert bed.host.has_data_to_write() == waiting  # still dropping, far below the first mark
        room_for(1)
        waiting -= 1
    device.complete(packets=good(1, b"again"))
    assert bed.host.has_data_to_write() == waiting + 1
    bed.on_packet = lambda packet: None
    assert bed.unblock()[-1] == packet(packets_of(bed.received)[-1].id, b"again")


def test_each_stream_has_its_own_marks() -> None:
    """Unlike in the original, where the stream that was started last sets them for all."""
    device = LoopbackDevice(iso_period=0)
    with Bed(device) as bed:
        bed.ask(SetAltSetting(id=1, interface=1, alt=2))
        bed.ask(start(0x84, 32, 16), start(0x04, 1, 1))
        bed.blocked = True
        device.handle_events(0)
        assert bed.host.buffered_output_size() > 32 * 3072


def test_small_packets_in_one_large_transfer(bed: Bed, device: FakeDevice) -> None:
    """Headers are longer than such packets; what was not even tried to be written makes no connection slow."""
    interface = device.configurations[1].interfaces[-1]
    tiny = type(interface)(7, 0, 1, endpoints=(type(interface.endpoints[0])(ISO_IN, 1, 1, 1),))
    device.configurations[1] = type(device.configurations[1])(1, interfaces=(tiny,))
    bed = Bed(device)
    started(bed, ISO_IN, 32, 1)
    for _ in range(3):
        device.complete(packets=good(32, b"1"))
    assert [p.id for p in packets_of(bed.news())] == list(range(96))
    assert bed.logged(LogLevel.WARNING, "too slow") == []


def test_failed_packets_are_dropped_too(bed: Bed, device: FakeDevice) -> None:
    """But stalls are still noticed."""
    started(bed, ISO_IN, 2, 3)
    overload(bed)
    device.complete(packets=[(Status.IOERROR, b"")] * 2)
    assert bed.host.has_data_to_write() == MAX_STREAM_BACKLOG + 1
    stall(device, packet=True)
    assert device.done("clear_halt") == [("clear_halt", ISO_IN)]


def test_the_packet_of_a_failed_transfer_is_not_dropped(bed: Bed, device: FakeDevice) -> None:
    started(bed, ISO_IN, 4, 3)
    overload(bed)
    device.complete(status=Status.IOERROR)
    assert bed.unblock()[-1] == packet(0, b"", Status.IOERROR)


def test_a_device_that_always_fails_cannot_fill_the_memory(bed: Bed, device: FakeDevice) -> None:
    """Above the limit at which requests are not read any more, these packets are dropped as well."""
    started(bed, ISO_IN, 1, 1)
    bed.blocked = True
    for _ in range(READ_BACKLOG_PACKETS + 100):
        device.complete(status=Status.IOERROR)
    assert bed.host.has_data_to_write() == READ_BACKLOG_PACKETS + 1


def test_statuses_are_never_dropped(bed: Bed, device: FakeDevice) -> None:
    started(bed, ISO_IN)
    overload(bed)
    bed.ask(stop(ISO_IN))
    assert bed.unblock()[-1] == status(ISO_IN, OK, STOP_ID)


# ---------------------------------------------------------------- sending: refusals


@pytest.mark.parametrize("endpoint", [ISO_OUT, BULK_OUT, MISSING_OUT, 0x00])
def test_packets_that_no_stream_takes(bed: Bed, endpoint: int) -> None:
    """inval for an endpoint that is not isochronous, and without a stream; with the packet's id."""
    bed.ask(StartIsoStream(id=1, endpoint=ISO_IN, pkts_per_urb=1, no_urbs=1))
    refused = IsoPacket(id=77, endpoint=endpoint, data=b"x")
    assert bed.ask(refused) == [IsoStreamStatus(id=77, endpoint=endpoint, status=Status.INVAL)]


def test_packets_without_a_device(bed: Bed, device: FakeDevice) -> None:
    started(bed, ISO_OUT)
    bed.ask(BulkPacket(id=1, endpoint=BULK_IN, length=1))
    device.complete(lost=True)
    bed.news()
    assert bed.ask(out(5)) == [status(ISO_OUT, Status.IOERROR, 5)]


def test_packets_that_are_too_long(bed: Bed, device: FakeDevice) -> None:
    """inval; they take no place, so the ring is as full as before."""
    started(bed, ISO_OUT, 1, 2)
    assert bed.ask(out(5, bytes(OUT_SIZE + 1))) == [status(ISO_OUT, Status.INVAL, 5)]
    assert device.in_flight == []
    assert bed.ask(out(6, bytes(OUT_SIZE))) == []
    assert data_of(device.in_flight) == [bytes(OUT_SIZE)]


def test_an_alias_of_the_endpoint(bed: Bed, device: FakeDevice) -> None:
    started(bed, ISO_OUT, 1, 1)
    assert bed.ask(IsoPacket(id=1, endpoint=ISO_OUT | 0x10, data=b"x")) == []
    assert len(device.in_flight) == 1


# ---------------------------------------------------------------- sending: the ring


def test_sending(bed: Bed, device: FakeDevice) -> None:
    """The first half goes when half of all packets are there, then each transfer with its last packet."""
    started(bed, ISO_OUT, packets=2, transfers=4)
    assert bed.ask(*(out(number, b"%d" % number) for number in range(3))) == []
    assert device.in_flight == []
    bed.ask(out(3, b""))
    assert data_of(device.in_flight) == [b"01", b"2"]
    assert [list(transfer.iso_lengths) for transfer in device.in_flight] == [[1, 1], [1, 0]]
    assert [(t.length, t.timeout, t.kind, t.endpoint) for t in device.in_flight] == [
        (2, 1.0, TransferType.ISO, ISO_OUT),
        (1, 1.0, TransferType.ISO, ISO_OUT),
    ]
    bed.ask(out(4, b"abc"))
    assert len(device.in_flight) == 2
    bed.ask(out(5, b"defg"))
    assert data_of(device.in_flight[2:]) == [b"abcdefg"]
    device.complete(packets=good(2, b""))
    bed.ask(out(6), out(7), out(8), out(9))
    assert data_of(device.in_flight[2:]) == [b"xx", b"xx"]
    assert bed.news() == []


def test_one_packet_in_one_transfer(bed: Bed, device: FakeDevice) -> None:
    """This crashes the original. Each packet is submitted at once; those that come before it is through are dropped."""
    started(bed, ISO_OUT, 1, 1)
    for number in range(3):
        assert bed.ask(out(number, b"%d" % number), out(number, b"dropped")) == []
        assert data_of(device.in_flight) == [b"%d" % number]
        device.complete(packets=good(1, b""))
    assert bed.news() == []


def test_overflow(bed: Bed, device: FakeDevice) -> None:
    """A packet for which there is no room is dropped with half a ring's worth of those that follow; silently."""
    started(bed, ISO_OUT, packets=2, transfers=4)
    assert bed.ask(*(out(number) for number in range(8))) == []
    assert len(device.in_flight) == 4
    assert bed.ask(out(8)) == []
    device.complete(packets=good(2, b""))
    assert bed.ask(*(out(number) for number in range(9, 13))) == []
    assert len(device.in_flight) == 3
    bed.ask(out(13, b"a"), out(14, b"b"))
    assert data_of(device.in_flight[3:]) == [b"ab"]


def test_underflow(bed: Bed, device: FakeDevice) -> None:
    """The last transfer in flight completes: what is partly filled is discarded, half a ring is awaited; silently."""
    started(bed, ISO_OUT, packets=2, transfers=4)
    bed.ask(*(out(number) for number in range(5)))
    device.complete(packets=good(2, b""))
    device.complete(packets=good(2, b""))
    assert bed.ask(out(5, b"5"), out(6, b"6"), out(7, b"7")) == []
    assert device.in_flight == []
    bed.ask(out(8, b"8"))
    assert data_of(device.in_flight) == [b"56", b"78"]
    assert bed.news() == []


@pytest.mark.parametrize("failure", FAILURES)
def test_a_transfer_that_failed(bed: Bed, device: FakeDevice, failure: Status) -> None:
    """One status with the id of its first packet; the stream goes on."""
    started(bed, ISO_OUT, packets=2, transfers=4)
    bed.ask(*(out(number) for number in range(100, 106)))
    device.complete(status=failure)
    assert bed.news() == [status(ISO_OUT, failure, 100)]
    device.complete(packets=[(OK, b""), (failure, b"")])
    assert bed.news() == [status(ISO_OUT, failure, 102)]
    assert bed.logged(LogLevel.ERROR, f"0x{ISO_OUT:02x}")
    bed.ask(out(106), out(107))
    assert len(device.in_flight) == 2


def test_one_status_for_several_packets(bed: Bed, device: FakeDevice) -> None:
    started(bed, ISO_OUT, packets=4, transfers=2)
    bed.ask(*(out(number) for number in range(10, 14)))
    device.complete(packets=[(OK, b""), (Status.BABBLE, b""), (Status.IOERROR, b""), (OK, b"")])
    assert bed.news() == [status(ISO_OUT, Status.BABBLE, 10)]


@pytest.mark.parametrize("failure", [Status.IOERROR, Status.CANCELLED])
def test_underflow_after_a_failure(bed: Bed, device: FakeDevice, failure: Status) -> None:
    """Unlike in the original a failed transfer may be the last one as well."""
    started(bed, ISO_OUT, packets=2, transfers=4)
    bed.ask(*(out(number) for number in range(5)))
    device.complete(packets=good(2, b""))
    device.complete(status=failure)
    bed.ask(out(5), out(6), out(7))
    assert device.in_flight == []
    bed.ask(out(8))
    assert len(device.in_flight) == 2


def test_a_cancelled_transfer_can_be_filled_again(bed: Bed, device: FakeDevice) -> None:
    """Unlike in the original; nothing is told."""
    started(bed, ISO_OUT, packets=1, transfers=2)
    for number in range(10):
        assert bed.ask(out(number)) == []
        device.complete(status=Status.CANCELLED)
        assert bed.news() == []


@pytest.mark.parametrize("by_packet", [False, True])
def test_sending_recovers_from_a_stall(bed: Bed, device: FakeDevice, by_packet: bool) -> None:
    """stall would tell the guest that the stream has ended: the ring starts anew, empty."""
    started(bed, ISO_OUT, packets=2, transfers=4)
    bed.ask(*(out(number) for number in range(7)))
    assert len(device.in_flight) == 3
    stall(device, packet=by_packet)
    assert bed.news() == []
    assert device.done("clear_halt") == [("clear_halt", ISO_OUT)]
    assert device.cancelled == device.in_flight
    device.handle_events()
    bed.ask(*(out(number) for number in range(3)))
    assert device.in_flight == []
    bed.ask(out(3))
    assert len(device.in_flight) == 2


def test_recoveries_of_sending_are_limited(bed: Bed, device: FakeDevice) -> None:
    """In a row: a transfer that succeeds makes a new one."""
    started(bed, ISO_OUT, 1, 1)
    for _ in range(MAX_RECOVERIES):
        bed.ask(out(1))
        device.complete(status=Status.STALL)
    bed.ask(out(1))
    device.complete(packets=good(1, b""))
    for _ in range(MAX_RECOVERIES):
        bed.ask(out(1))
        device.complete(status=Status.STALL)
    assert bed.news() == []
    bed.ask(out(1))
    device.complete(status=Status.STALL)
    assert bed.news() == [status(ISO_OUT, Status.STALL, 0)]


def test_the_device_is_lost_while_sending(bed: Bed, device: FakeDevice) -> None:
    started(bed, ISO_OUT, 1, 4)
    bed.ask(out(1), out(2), out(3))
    device.complete(lost=True)
    assert bed.news() == [DeviceDisconnect()]
    assert bed.ask(out(4)) == [status(ISO_OUT, Status.IOERROR, 4)]


@pytest.mark.parametrize("failure", [Status.IOERROR, DeviceLostError("gone")], ids=str)
def test_a_full_transfer_cannot_be_submitted(bed: Bed, device: FakeDevice, failure: Status | DeviceLostError) -> None:
    """The stream ends; stall has the id of the transfer's first packet."""
    started(bed, ISO_OUT, 1, 4)
    device.submissions_left, device.script["submit"] = 1, failure
    end = DeviceDisconnect() if isinstance(failure, DeviceLostError) else status(ISO_OUT, Status.STALL, 8)
    assert bed.ask(out(7), out(8)) == [end]
    assert device.cancelled == device.in_flight
    device.handle_events()
    assert device.in_flight == []


# ---------------------------------------------------------------- memory


def test_receiving_counts_as_in_flight(device: FakeDevice) -> None:
    size = 3 * 4 * IN_SIZE
    assert ready(device, Limits(max_transfer_bytes=size - 1)).ask(start(ISO_IN)) == [
        status(ISO_IN, Status.STALL, START_ID)
    ]
    started(ready(device, Limits(max_transfer_bytes=size)), ISO_IN)
    assert ready(device, Limits(max_transfers=2)).ask(start(ISO_IN)) == [status(ISO_IN, Status.STALL, START_ID)]


def test_a_ring_counts_as_long_as_it_exists(device: FakeDevice) -> None:
    """Whether its transfers are in flight or not: the guest can fill them at any time."""
    bed = ready(device, Limits(max_transfer_bytes=4 * OUT_SIZE + 100, max_transfers=5))
    started(bed, ISO_OUT, 1, 4)
    request = BulkPacket(id=9, endpoint=BULK_IN, length=100)
    refused = BulkPacket(id=9, endpoint=BULK_IN, status=Status.IOERROR)
    assert bed.ask(request, request) == [refused]
    for number in range(8):
        assert bed.ask(out(number, bytes(OUT_SIZE))) == []
        assert bed.ask(request) == [refused]
    assert len(device.in_flight) == 5
    bed.ask(stop(ISO_OUT))
    assert bed.ask(request) == [refused]  # cancelled transfers are still the device's
    device.handle_events()
    assert bed.ask(request) == []


def test_a_ring_beyond_the_limit(device: FakeDevice) -> None:
    bed = ready(device, Limits(max_transfer_bytes=4 * OUT_SIZE - 1))
    assert bed.ask(start(ISO_OUT, 1, 4)) == [status(ISO_OUT, Status.STALL, START_ID)]
    bed = ready(device, Limits(max_transfers=3))
    assert bed.ask(start(ISO_OUT, 1, 4)) == [status(ISO_OUT, Status.STALL, START_ID)]


# ---------------------------------------------------------------- ending


def flowing(bed: Bed, device: FakeDevice) -> None:
    """Both directions run, with transfers in flight."""
    started(bed, ISO_IN)
    started(bed, ISO_OUT, 1, 4)
    bed.ask(out(1), out(2), out(3))
    assert len(device.in_flight) == 3 + 3


@both
def test_stop(bed: Bed, device: FakeDevice, endpoint: int) -> None:
    """Success at once; what the cancelled transfers bring later is swallowed. The other stream goes on."""
    flowing(bed, device)
    assert bed.ask(stop(endpoint)) == [status(endpoint, OK, STOP_ID)]
    assert device.cancelled == [transfer for transfer in device.in_flight if transfer.endpoint == endpoint]
    late = [OK, Status.STALL, Status.CANCELLED]
    for transfer, result in zip(list(device.cancelled), late, strict=True):
        device.complete(transfer, result, packets=good(4))
    assert bed.news() == []
    assert len(device.in_flight) == 3
    assert not device.done("clear_halt")


@both
def test_stop_of_nothing(bed: Bed, endpoint: int) -> None:
    assert bed.ask(stop(endpoint), stop(endpoint)) == [status(endpoint, OK, STOP_ID)] * 2


def test_start_while_the_old_stream_is_ending(bed: Bed, device: FakeDevice) -> None:
    """Ids begin at 0, and completions of the old run do not disturb the new one."""
    started(bed, ISO_IN, 1, 2)
    device.complete(packets=good(1))
    old = list(device.in_flight)
    bed.ask(stop(ISO_IN), start(ISO_IN, 1, 2))
    device.complete(old[0], packets=good(1, b"old"))
    new = [transfer for transfer in device.in_flight if transfer not in old]
    device.complete(new[0], packets=good(1, b"new"))
    device.handle_events()
    device.complete(packets=good(1, b"newer"))
    assert bed.news() == [packet(0, b"new"), packet(1, b"newer")]


def test_a_ring_that_is_started_again_is_empty(bed: Bed, device: FakeDevice) -> None:
    started(bed, ISO_OUT, 2, 4)
    bed.ask(*(out(number) for number in range(3)))
    bed.ask(stop(ISO_OUT), start(ISO_OUT, 2, 4))
    bed.ask(*(out(number) for number in range(3)))
    assert device.in_flight == []


def test_reset(bed: Bed, device: FakeDevice) -> None:
    """stall with id 0 for each stream, by endpoint, so that the guest starts it again; an empty ring too."""
    started(bed, ISO_IN)
    started(bed, ISO_OUT)
    assert bed.ask(Reset()) == [status(ISO_OUT, Status.STALL, 0), status(ISO_IN, Status.STALL, 0)]
    assert device.in_flight == []
    assert device.calls[-1] == ("reset",)
    assert bed.ask(out(1)) == [status(ISO_OUT, Status.INVAL, 1)]
    started(bed, ISO_IN)


def test_set_alt_setting(bed: Bed, device: FakeDevice) -> None:
    """Streams of the interface end without a word."""
    flowing(bed, device)
    assert bed.ask(SetAltSetting(id=9, interface=7, alt=2))[-1] == AltSettingStatus(id=9, interface=7, alt=2)
    assert set(device.cancelled) == set(device.in_flight)
    device.handle_events()
    assert bed.news() == []
    assert bed.ask(out(1)) == [status(ISO_OUT, Status.INVAL, 1)]


def test_set_configuration(bed: Bed, device: FakeDevice) -> None:
    flowing(bed, device)
    assert bed.ask(SetConfiguration(id=1, configuration=2))[-1] == ConfigurationStatus(id=1, configuration=2)
    device.handle_events()
    assert device.in_flight == []
    assert bed.ask(out(1)) == [status(ISO_OUT, Status.INVAL, 1)]


def test_the_device_is_dropped(bed: Bed, device: FakeDevice) -> None:
    flowing(bed, device)
    bed.host.set_device(None)
    assert bed.news() == [DeviceDisconnect()]
    assert device.in_flight == []
    assert bed.ask(out(1)) == [status(ISO_OUT, Status.IOERROR, 1)]


def test_a_start_makes_a_reset_necessary(bed: Bed, device: FakeDevice) -> None:
    """Only a device with which nothing was done is fresh."""
    bed.ask(Reset())
    resets = len(device.done("reset"))
    started(bed, ISO_OUT)
    bed.ask(Reset())
    assert len(device.done("reset")) == resets + 1


# ---------------------------------------------------------------- any guest, any device

sizes = st.sampled_from([0, 1, OUT_SIZE, OUT_SIZE + 1])
actions = st.one_of(
    st.builds(
        StartIsoStream,
        id=st.just(START_ID),
        endpoint=st.sampled_from([ISO_IN, ISO_OUT]),
        pkts_per_urb=st.sampled_from([1, 2, 32]),
        no_urbs=st.sampled_from([1, 2, 16]),
    ),
    st.builds(StopIsoStream, endpoint=st.sampled_from([ISO_IN, ISO_OUT])),
    st.tuples(st.integers(1, 70), sizes),
    st.tuples(
        st.just("complete"), st.integers(0, 15), st.sampled_from(Status), st.lists(st.sampled_from(Status), max_size=40)
    ),
    st.just(Reset()),
)


@given(st.lists(actions, max_size=40))
def test_whatever_happens(steps: list[Packet | tuple[int, int] | tuple[str, int, int, list[int]]]) -> None:
    """No more runs than there are transfers for, failed packets are empty, nothing is left in flight at the end."""
    device = FakeDevice()
    bed = ready(device)
    for step in steps:
        if isinstance(step, Packet):
            bed.ask(step)
        elif len(step) == 4:
            if device.in_flight:
                transfer = device.in_flight[step[1] % len(device.in_flight)]
                device.complete(transfer, step[2], packets=[(status, b"12345678") for status in step[3]])
        else:
            bed.news()
            news = bed.ask(*(out(number, bytes(step[1])) for number in range(step[0])))
            assert {type(packet) for packet in news} <= {IsoStreamStatus}
        assert len(running(device)) <= 32
    bed.host.close()
    assert device.in_flight == []
    for received in packets_of(bed.received):
        assert received.data == b"" or received.status == OK


# ---------------------------------------------------------------- with a virtual device


class Clock:
    """Seconds that pass when told to."""

    now = 10.0

    def __call__(self) -> float:
        return self.now


def advance(device: LoopbackDevice, clock: Clock, seconds: float, step: float = 0.001) -> None:
    end = clock.now + seconds
    while clock.now < end:
        clock.now += step
        device.handle_events(0)


def test_a_camera() -> None:
    """8000 packets a second, none lost, one after the other."""
    clock = Clock()
    device = LoopbackDevice(clock=clock)
    with Bed(device) as bed:
        bed.ask(SetAltSetting(id=1, interface=1, alt=2))
        started(bed, 0x84, packets=8, transfers=4)
        advance(device, clock, 0.1005)
        received = packets_of(bed.news())
        assert 760 <= len(received) <= 808
        assert [p.id for p in received] == list(range(len(received)))
        assert [struct.unpack_from("<Q", p.data)[0] for p in received] == list(range(len(received)))
        assert {len(p.data) for p in received} == {3072}
        assert bed.ask(stop(0x84)) == [status(0x84, OK, STOP_ID)]


def test_a_loudspeaker() -> None:
    """Packets of changing lengths at the device's pace."""
    clock = Clock()
    device = LoopbackDevice(clock=clock, iso_period=0.001)
    with Bed(device) as bed:
        bed.ask(SetAltSetting(id=1, interface=1, alt=1))
        started(bed, 0x04, packets=4, transfers=4)
        total = 0
        for number in range(200):
            data = bytes(176 + number % 2 * 4)
            total += len(data)
            assert bed.ask(IsoPacket(id=number, endpoint=0x04, data=data)) == []
            advance(device, clock, 0.001)
        advance(device, clock, 0.02)
        assert (device.counters["iso_packets"], device.counters["iso_bytes"]) == (200, total)


def test_the_period_can_be_set_by_the_guest() -> None:
    clock = Clock()
    device = LoopbackDevice(clock=clock)
    with Bed(device) as bed:
        bed.ask(SetAltSetting(id=1, interface=1, alt=1))
        bed.ask(ControlPacket(id=2, endpoint=0x00, requesttype=0x40, request=0x13, value=10_000, length=0))
        device.handle_events(0)
        bed.news()
        started(bed, 0x84, 1, 4)
        advance(device, clock, 0.1005)
        assert len(packets_of(bed.news())) in (9, 10)
