"""Streams: a few transfers kept in flight on one endpoint, so that no data waits.

A :class:`Stream` is one run, from a start to its end. Its states are a table; a stop and a new start may overlap,
because each run has transfers of its own. This class is for interrupt and bulk receiving, its subclasses in
``usbredir._iso`` for isochronous streams; what a host does with them is in ``usbredir._stream_host``.

Source: docs/host.md, "Streams".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import NamedTuple

from .device import Transfer
from .packets import (
    BufferedBulkPacket,
    BulkReceivingStatus,
    InterruptPacket,
    InterruptReceivingStatus,
    IsoPacket,
    IsoStreamStatus,
    Packet,
)
from .proto import TransferType

__all__ = [
    "INTERRUPT_TRANSFERS",
    "MAX_RECOVERIES",
    "RECEIVED",
    "Shape",
    "Stream",
    "StreamInput",
    "StreamState",
    "status_packet",
]

INTERRUPT_TRANSFERS = 5
"""Transfers of an interrupt IN endpoint, each of one packet."""
MAX_TRANSFERS = 16
"""Most transfers of a stream."""
MAX_PACKETS = 32
"""Most isochronous packets of a transfer."""
ISO_TIMEOUT = 1.0
"""Seconds an isochronous transfer may take."""
MAX_RECOVERIES = 16
"""Stalls in a row, without data between, after which a stream ends: a broken device must not keep us busy."""


class StreamState(Enum):
    """State of one run."""

    RUNNING = "transfers are in flight"
    PAUSED = "the guest reads too slowly; completed transfers wait"
    ENDED = "what still completes is dropped"


class StreamInput(Enum):
    """What can happen to a run."""

    OVERLOAD = "too much waits to be written"
    RELIEF = "the guest has read"
    END = "stopped, stalled, or the device is gone"


TRANSITIONS: Mapping[tuple[StreamState, StreamInput], StreamState] = {
    (StreamState.RUNNING, StreamInput.OVERLOAD): StreamState.PAUSED,
    (StreamState.RUNNING, StreamInput.RELIEF): StreamState.RUNNING,
    (StreamState.RUNNING, StreamInput.END): StreamState.ENDED,
    (StreamState.PAUSED, StreamInput.OVERLOAD): StreamState.PAUSED,
    (StreamState.PAUSED, StreamInput.RELIEF): StreamState.RUNNING,
    (StreamState.PAUSED, StreamInput.END): StreamState.ENDED,
    (StreamState.ENDED, StreamInput.OVERLOAD): StreamState.ENDED,
    (StreamState.ENDED, StreamInput.RELIEF): StreamState.ENDED,
    (StreamState.ENDED, StreamInput.END): StreamState.ENDED,
}


class Shape(NamedTuple):
    """What the guest asks for.

    Attributes:
        kind: ISO, INTERRUPT or BULK.
        transfers: how many.
        length: bytes per transfer.
        packets: packets per transfer; 1 unless isochronous.
    """

    kind: TransferType
    endpoint: int
    transfers: int
    length: int
    packets: int = 1

    def fits(self, kind: TransferType, max_packet_size: int) -> bool:
        """Whether an endpoint of this type and packet size can do it."""
        return (
            kind is self.kind
            and 1 <= self.transfers <= MAX_TRANSFERS
            and 1 <= self.packets <= MAX_PACKETS
            and max_packet_size > 0
            and self.length > 0
            and self.length % max_packet_size == 0
        )

    @property
    def size(self) -> int:
        """Bytes of all buffers."""
        return self.length * self.transfers

    def transfer(self, stream: Stream, completed: Callable[[Transfer], None]) -> Transfer:
        """A new transfer of *stream*."""
        if self.kind is not TransferType.ISO:
            return Transfer(self.kind, self.endpoint, self.length, completed, context=stream)
        lengths = (self.length // self.packets,) * self.packets
        return Transfer(
            self.kind,
            self.endpoint,
            self.length,
            completed,
            timeout=ISO_TIMEOUT,
            iso_lengths=lengths,
            context=stream,
        )


DATA_PACKETS: Mapping[TransferType, type[Packet]] = {
    TransferType.ISO: IsoPacket,
    TransferType.INTERRUPT: InterruptPacket,
    TransferType.BULK: BufferedBulkPacket,
}
"""The packet that carries what a stream receives."""


RECEIVED = ("id", "endpoint", "status", "length", "data")
"""What tells packets of received data apart; all kinds of them have these."""


class Stream:
    """One run of a stream; this class: of interrupt or bulk receiving.

    Attributes:
        packet_class: of the packets with received data.
        idle: transfers that completed while the stream was paused.
        recoveries: stalls in a row before this run.
        send: sends what was received: called with the values of RECEIVED; set when the stream is run.
    """

    def __init__(self, shape: Shape, completed: Callable[[Transfer], None], recoveries: int = 0) -> None:
        self.shape = shape
        self.kind = shape.kind
        self.endpoint = shape.endpoint
        self.packet_class = DATA_PACKETS[shape.kind]
        self.recoveries = recoveries
        self.state = StreamState.RUNNING
        self.idle: list[Transfer] = []
        self.send: Callable[..., None] = _not_running
        self._completed = completed
        self._next_id = 0
        self.transfers = [shape.transfer(self, completed) for _ in range(shape.transfers)]

    def feed(self, event: StreamInput) -> None:
        """Change the state as the table says."""
        self.state = TRANSITIONS[self.state, event]

    @property
    def reserved(self) -> int:
        """Transfers that are not in flight and yet hold memory."""
        return len(self.idle)

    def again(self) -> Stream:
        """The run that follows this one after a stall."""
        return type(self)(self.shape, self._completed, self.recoveries + 1)

    def first_transfers(self) -> Sequence[Transfer]:
        """Those to submit at the start."""
        return self.transfers

    def id_of(self, transfer: Transfer) -> int:
        """The id of a status that *transfer* causes."""
        return 0

    def take_id(self) -> int:
        """The id of the next packet; a packet that is dropped takes one as well."""
        packet_id = self._next_id
        self._next_id += 1
        return packet_id


def _not_running(*_: object) -> None:
    raise AssertionError("the stream does not run")


def status_packet(kind: TransferType, endpoint: int, status: int, packet_id: int) -> Packet | None:
    """The status packet that goes with an endpoint's type; None for types that have no streams."""
    if kind is TransferType.ISO:
        return IsoStreamStatus(id=packet_id, endpoint=endpoint, status=status)
    if kind is TransferType.INTERRUPT:
        return InterruptReceivingStatus(id=packet_id, endpoint=endpoint, status=status)
    if kind is TransferType.BULK:
        return BulkReceivingStatus(id=packet_id, endpoint=endpoint, status=status)
    return None
