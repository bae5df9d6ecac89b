"""Interrupt and bulk receiving: a few transfers kept in flight on an IN endpoint, so that no data waits.

A :class:`Stream` is one run, from a start to its end. Its states are a table; a stop and a new start may overlap,
because each run has transfers of its own. Isochronous streams are not served yet: their start is refused
with *stall*, where the start packet is handled (``usbredir.host``).

Source: docs/host.md, "Streams".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum

from .device import Transfer
from .packets import (
    BufferedBulkPacket,
    BulkReceivingStatus,
    InterruptPacket,
    InterruptReceivingStatus,
    IsoStreamStatus,
    Packet,
)
from .proto import Status, TransferType

__all__ = [
    "INTERRUPT_TRANSFERS",
    "MAX_TRANSFERS",
    "Stream",
    "StreamInput",
    "StreamState",
    "data_packet",
    "status_packet",
]

INTERRUPT_TRANSFERS = 5
"""Transfers of an interrupt IN endpoint, each of one packet."""
MAX_TRANSFERS = 16
"""Most transfers of a stream."""
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


class Stream:
    """One run of interrupt or bulk receiving.

    Attributes:
        kind: INTERRUPT or BULK.
        length: bytes per transfer.
        idle: transfers that completed while the stream was paused.
        recoveries: stalls in a row before this run.
    """

    def __init__(
        self,
        kind: TransferType,
        endpoint: int,
        count: int,
        length: int,
        completed: Callable[[Transfer], None],
        recoveries: int = 0,
    ) -> None:
        self.kind = kind
        self.endpoint = endpoint
        self.length = length
        self.recoveries = recoveries
        self.state = StreamState.RUNNING
        self.idle: list[Transfer] = []
        self._next_id = 0
        self.transfers = [Transfer(kind, endpoint, length, completed, context=self) for _ in range(count)]

    def feed(self, event: StreamInput) -> None:
        """Change the state as the table says."""
        self.state = TRANSITIONS[self.state, event]

    @property
    def size(self) -> int:
        """Bytes of all buffers."""
        return self.length * len(self.transfers)

    def take_id(self) -> int:
        """The id of the next packet; a packet that is dropped takes one as well."""
        packet_id = self._next_id
        self._next_id += 1
        return packet_id


def data_packet(stream: Stream, packet_id: int, status: int, data: bytes | bytearray | memoryview) -> Packet:
    """A completed transfer of *stream* as the packet of its kind."""
    if stream.kind is TransferType.INTERRUPT:
        return InterruptPacket(id=packet_id, endpoint=stream.endpoint, status=status, data=data)
    return BufferedBulkPacket(id=packet_id, endpoint=stream.endpoint, status=status, data=data)


def status_packet(kind: TransferType, endpoint: int, status: Status, packet_id: int) -> Packet | None:
    """The status packet that goes with an endpoint's type; None for types that have no streams."""
    if kind is TransferType.ISO:
        return IsoStreamStatus(id=packet_id, endpoint=endpoint, status=status)
    if kind is TransferType.INTERRUPT:
        return InterruptReceivingStatus(id=packet_id, endpoint=endpoint, status=status)
    if kind is TransferType.BULK:
        return BulkReceivingStatus(id=packet_id, endpoint=endpoint, status=status)
    return None
