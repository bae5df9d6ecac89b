"""usbredir._streams: one run of receiving, by itself. What a host does with it is in test_host_streams.py."""

from __future__ import annotations

import pytest

from usbredir._streams import (
    ISO_TIMEOUT,
    TRANSITIONS,
    Shape,
    Stream,
    StreamInput,
    StreamState,
    status_packet,
)
from usbredir.device import Transfer
from usbredir.packets import (
    BufferedBulkPacket,
    BulkReceivingStatus,
    InterruptPacket,
    InterruptReceivingStatus,
    IsoPacket,
    IsoStreamStatus,
    Packet,
)
from usbredir.proto import Status, TransferType


def completed(transfer: Transfer) -> None:
    raise AssertionError("nothing completes here")


def stream(kind: TransferType = TransferType.BULK, count: int = 3, recoveries: int = 0) -> Stream:
    return Stream(Shape(kind, 0x81, count, 512), completed, recoveries)


def after(state: StreamState, event: StreamInput) -> StreamState:
    """The rules in words: an ended run stays ended, an end ends; otherwise overload pauses and relief resumes."""
    if StreamState.ENDED is state or event is StreamInput.END:
        return StreamState.ENDED
    return StreamState.PAUSED if event is StreamInput.OVERLOAD else StreamState.RUNNING


@pytest.mark.parametrize("event", StreamInput)
@pytest.mark.parametrize("state", StreamState)
def test_every_input_in_every_state(state: StreamState, event: StreamInput) -> None:
    run = stream()
    run.state = state
    run.feed(event)
    assert run.state is after(state, event)


def test_the_table_has_nothing_else() -> None:
    assert set(TRANSITIONS) == {(state, event) for state in StreamState for event in StreamInput}


def test_a_new_run() -> None:
    """It runs, with transfers of its own that are ready to be submitted."""
    run = stream(count=3, recoveries=2)
    assert run.state is StreamState.RUNNING
    assert (run.idle, run.recoveries, run.reserved, run.shape.size) == ([], 2, 0, 3 * 512)
    assert run.first_transfers() == run.transfers
    assert len(set(run.transfers)) == 3
    for transfer in run.transfers:
        assert (transfer.kind, transfer.endpoint, transfer.length) == (TransferType.BULK, 0x81, 512)
        assert transfer.context is run
        assert (transfer.timeout, transfer.iso_lengths) == (0, ())
        assert run.id_of(transfer) == 0


def test_runs_share_nothing() -> None:
    """A stop and a new start may overlap."""
    old, new = stream(), stream()
    assert not set(old.transfers) & set(new.transfers)
    old.feed(StreamInput.END)
    assert new.state is StreamState.RUNNING


def test_the_run_after_a_stall() -> None:
    """The same again, one recovery later, with transfers of its own."""
    old = stream(count=3, recoveries=2)
    new = old.again()
    assert (type(new), new.shape, new.recoveries) == (Stream, old.shape, 3)
    assert not set(old.transfers) & set(new.transfers)


def test_isochronous_transfers() -> None:
    """Room for each packet, and a timeout."""
    transfer = Shape(TransferType.ISO, 0x81, 1, 30, 3).transfer(stream(), completed)
    assert (transfer.length, transfer.iso_lengths, transfer.timeout) == (30, (10, 10, 10), ISO_TIMEOUT)


@pytest.mark.parametrize(
    ("transfers", "length", "packets", "fits"),
    [
        (1, 8, 1, True),
        (16, 16, 2, True),
        (1, 8 * 32, 32, True),
        (0, 8, 1, False),
        (17, 8, 1, False),
        (1, 8 * 33, 33, False),
        (1, 0, 0, False),
        (1, 0, 1, False),
        (1, 12, 1, False),
    ],
)
def test_what_fits(transfers: int, length: int, packets: int, fits: bool) -> None:
    """On an endpoint of 8 bytes, nothing on one of none or of another type."""
    shape = Shape(TransferType.ISO, 0x81, transfers, length, packets)
    assert shape.fits(TransferType.ISO, 8) is fits
    assert not shape.fits(TransferType.ISO, 0)
    assert not shape.fits(TransferType.BULK, 8)


def test_ids_count_from_zero() -> None:
    run = stream()
    assert [run.take_id() for _ in range(5)] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("kind", "packet"),
    [
        (TransferType.INTERRUPT, InterruptPacket),
        (TransferType.BULK, BufferedBulkPacket),
        (TransferType.ISO, IsoPacket),
    ],
)
def test_class_of_received_data(kind: TransferType, packet: type[Packet]) -> None:
    assert stream(kind).packet_class is packet


@pytest.mark.parametrize(
    ("kind", "packet"),
    [
        (TransferType.ISO, IsoStreamStatus(id=7, endpoint=0x84, status=Status.STALL)),
        (TransferType.INTERRUPT, InterruptReceivingStatus(id=7, endpoint=0x84, status=Status.STALL)),
        (TransferType.BULK, BulkReceivingStatus(id=7, endpoint=0x84, status=Status.STALL, stream_id=0)),
        (TransferType.CONTROL, None),
        (TransferType.INVALID, None),
    ],
)
def test_status_packet(kind: TransferType, packet: Packet | None) -> None:
    """The endpoint's type decides; what cannot stream gets no answer."""
    assert status_packet(kind, 0x84, Status.STALL, 7) == packet
