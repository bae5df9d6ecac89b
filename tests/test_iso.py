"""usbredir._iso: ids, dropping and the ring, by themselves. What a host does with them is in test_host_iso.py."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from usbredir._iso import IsoReceiving, IsoSending, new_stream, outcome
from usbredir._streams import Shape, Stream
from usbredir.device import IsoResult, Transfer
from usbredir.proto import Status, TransferType

IN, OUT = 0x84, 0x04
ISO = TransferType.ISO


def completed(transfer: Transfer) -> None:
    raise AssertionError("nothing completes here")


def receiving(packets: int = 4, transfers: int = 3, size: int = 10) -> IsoReceiving:
    return IsoReceiving(Shape(ISO, IN, transfers, packets * size, packets), completed)


def ring(packets: int = 4, transfers: int = 4, size: int = 10) -> IsoSending:
    return IsoSending(Shape(ISO, OUT, transfers, packets * size, packets), completed)


@pytest.mark.parametrize(
    ("shape", "cls"),
    [
        (Shape(ISO, IN, 1, 8), IsoReceiving),
        (Shape(ISO, OUT, 1, 8), IsoSending),
        (Shape(TransferType.BULK, 0x81, 1, 8), Stream),
        (Shape(TransferType.INTERRUPT, 0x81, 1, 8), Stream),
    ],
)
def test_the_class_of_a_stream(shape: Shape, cls: type[Stream]) -> None:
    stream = new_stream(shape, completed)
    assert type(stream) is cls
    assert type(stream.again()) is cls


# ---------------------------------------------------------------- receiving


def test_ids() -> None:
    """The k-th transfer starts at id k x packets; each time it comes again it skips those of the others."""
    stream = receiving(packets=4, transfers=3)
    first, second, third = stream.transfers
    assert [stream.id_of(transfer) for transfer in stream.transfers] == [0, 4, 8]
    order = [first, second, third, first, second, third, first]
    assert [stream.take_ids(transfer) for transfer in order] == [0, 4, 8, 12, 16, 20, 24]
    assert stream.id_of(first) == 36


def test_a_new_run_counts_from_zero() -> None:
    stream = receiving()
    stream.take_ids(stream.transfers[0])
    again = stream.again()
    assert isinstance(again, IsoReceiving)
    assert again.take_ids(again.transfers[0]) == 0


def test_dropping_has_two_marks() -> None:
    """It begins at three times the buffers' size, and ends below half of it."""
    stream = receiving(packets=4, transfers=3, size=10)  # 120 bytes
    waiting = [0, 359, 360, 359, 60, 59, 359, 60, 361, 60]
    assert [stream.is_too_fast(size) for size in waiting] == [
        False,
        False,
        True,
        True,
        True,
        False,
        False,
        False,
        True,
        True,
    ]


def test_streams_drop_for_themselves() -> None:
    small, large = receiving(size=1), receiving(size=1000)
    assert (small.is_too_fast(100), large.is_too_fast(100)) == (True, False)


# ---------------------------------------------------------------- sending


def sent(stream: IsoSending, count: int, first: int = 0) -> list[Transfer]:
    """What *count* packets, each of one byte, bring to be submitted."""
    return [transfer for number in range(first, first + count) for transfer in stream.put(number, bytes((number,)))]


@pytest.mark.parametrize("packets", [1, 2, 3, 4, 31, 32])
@pytest.mark.parametrize("transfers", [1, 2, 3, 4, 5, 15, 16])
def test_it_starts_when_half_is_there(packets: int, transfers: int) -> None:
    """With the first half of the transfers; 1 x 1 at once."""
    stream = ring(packets, transfers)
    assert stream.first_transfers() == ()
    half = max(1, packets * transfers // 2)
    assert sent(stream, half - 1) == []
    assert sent(stream, 1) == stream.transfers[: half // packets]
    rest = -half % packets
    assert sent(stream, rest) == stream.transfers[half // packets :][: rest > 0]


def test_a_transfer_is_ready_with_its_last_packet() -> None:
    """Packets of different lengths lie back to back."""
    stream = ring(packets=3, transfers=2)
    for number, data in enumerate([b"aa", b"", b"cccc"]):
        ready = stream.put(10 + number, data)
    assert ready == [stream.transfers[0]]
    (transfer,) = ready
    assert (transfer.data, transfer.iso_lengths, transfer.length) == (b"aacccc", [2, 0, 4], 6)
    assert stream.id_of(transfer) == 10
    assert sent(stream, 2, 13) == []
    assert sent(stream, 1, 15) == [stream.transfers[1]]
    assert transfer.data == b"aacccc"
    assert stream.id_of(stream.transfers[1]) == 13


def test_too_many_packets() -> None:
    """All transfers are in flight: this packet is dropped, and half a ring's worth of those that follow."""
    stream = ring(packets=2, transfers=4)
    submitted = sent(stream, 8)
    assert submitted == stream.transfers
    assert sent(stream, 1, 8) == []
    stream.take_back(submitted[0])
    assert sent(stream, 4, 9) == []  # dropped, although there is room again
    assert sent(stream, 2, 13) == [submitted[0]]
    assert submitted[0].data == bytes((13, 14))


def test_too_few_packets() -> None:
    """Nothing else is in flight: what was begun is discarded, and half the ring has to come again."""
    stream = ring(packets=2, transfers=4)
    submitted = sent(stream, 5)
    assert len(submitted) == 2
    stream.take_back(submitted[0])
    stream.take_back(submitted[1])
    assert sent(stream, 3, 20) == []
    again = sent(stream, 1, 23)
    assert [bytes(transfer.data) for transfer in again] == [bytes((20, 21)), bytes((22, 23))]
    assert [stream.id_of(transfer) for transfer in again] == [20, 22]


def test_what_is_reserved() -> None:
    """Every transfer that is not in flight."""
    stream = ring(packets=2, transfers=4)
    assert stream.reserved == 4
    stream.put(0, b"")
    stream.put(1, b"")
    stream.put(2, b"")
    assert stream.reserved == 4
    submitted = stream.put(3, b"")
    assert stream.reserved == 2
    stream.take_back(submitted[0])
    assert stream.reserved == 3


@given(
    st.integers(1, 32),
    st.integers(1, 16),
    st.lists(st.one_of(st.integers(1, 100), st.just(0)), max_size=60),
)
def test_whatever_the_guest_does(packets: int, transfers: int, steps: list[int]) -> None:
    """Every transfer that is submitted is whole, made of packets in order, and is not in flight already."""
    stream = ring(packets, transfers)
    flying: deque[Transfer] = deque()
    number, last = 0, -1
    for step in steps:
        for _ in range(step):
            for transfer in stream.put(number, number.to_bytes(4, "big")):
                assert transfer not in flying
                assert transfer.iso_lengths == [4] * packets
                ids = [int.from_bytes(transfer.data[at : at + 4], "big") for at in range(0, 4 * packets, 4)]
                assert ids[0] == stream.id_of(transfer) > last
                assert ids == sorted(set(ids))
                last = ids[-1]
                flying.append(transfer)
            number += 1
        if flying:
            stream.take_back(flying.popleft())
        assert stream.reserved == transfers - len(flying)


@pytest.mark.parametrize(
    ("status", "packets", "expected"),
    [
        (Status.SUCCESS, [], Status.SUCCESS),
        (Status.SUCCESS, [Status.SUCCESS] * 3, Status.SUCCESS),
        (Status.TIMEOUT, [Status.SUCCESS], Status.TIMEOUT),
        (Status.TIMEOUT, [Status.STALL], Status.TIMEOUT),  # packets of the time before
        (Status.SUCCESS, [Status.SUCCESS, Status.BABBLE, Status.IOERROR], Status.BABBLE),
        (Status.SUCCESS, [Status.IOERROR, Status.STALL], Status.STALL),
        (Status.SUCCESS, [Status.SUCCESS, Status.CANCELLED], Status.CANCELLED),
    ],
)
def test_outcome(status: Status, packets: list[Status], expected: Status) -> None:
    transfer = Transfer(ISO, OUT, 0, completed)
    transfer.status = status
    transfer.iso_results = [IsoResult(packet) for packet in packets]
    assert outcome(transfer) == expected
