"""Isochronous streams: transfers of several packets, one packet per moment of the bus.

:class:`IsoReceiving` numbers the packets that come from an IN endpoint and knows when the connection is too slow for
them. :class:`IsoSending` is a ring of transfers that the guest's packets fill: half of it is in flight, the other half
is the buffer that makes up for a guest that is early or late.

Neither submits or sends: ``usbredir._stream_host`` does.

Source: docs/host.md, "Isochronous streams".
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from ._streams import Shape, Stream
from .device import Transfer
from .proto import Status, TransferType

__all__ = ["IsoReceiving", "IsoSending", "new_stream", "outcome"]

Payload = bytes | bytearray | memoryview


class IsoReceiving(Stream):
    """One run of an isochronous IN stream."""

    def __init__(self, shape: Shape, completed: Callable[[Transfer], None], recoveries: int = 0) -> None:
        super().__init__(shape, completed, recoveries)
        self._ids = {transfer: number * shape.packets for number, transfer in enumerate(self.transfers)}
        self._dropping = False

    def id_of(self, transfer: Transfer) -> int:
        """The id of the first packet of *transfer*."""
        return self._ids[transfer]

    def take_ids(self, transfer: Transfer) -> int:
        """The id of its first packet, now that it has completed; its next packets come after all other transfers'."""
        first = self._ids[transfer]
        self._ids[transfer] = first + self.shape.packets * self.shape.transfers
        return first

    def is_too_fast(self, waiting: int) -> bool:
        """Whether to drop what came, with so many bytes waiting to be written.

        Dropping begins when three times the stream's buffers wait and ends when less than half of them do, so that
        the guest misses one long piece and not every second packet.
        """
        if waiting >= 3 * self.shape.size:
            self._dropping = True
        elif waiting < self.shape.size // 2:
            self._dropping = False
        return self._dropping


class IsoSending(Stream):
    """One run of an isochronous OUT stream.

    Packets go into one transfer after the other. Nothing is submitted until half of all packets are there; from then
    on each transfer is, as soon as it is full.
    """

    def __init__(self, shape: Shape, completed: Callable[[Transfer], None], recoveries: int = 0) -> None:
        super().__init__(shape, completed, recoveries)
        self.max_packet_size = shape.length // shape.packets
        self._half = shape.packets * shape.transfers // 2
        self._free = deque(self.transfers)
        self._full: list[Transfer] = []  # they wait for the ring to be half full
        self._ids: dict[Transfer, int] = {}
        self._to_drop = 0
        self._sending = False
        self._begin_transfer()

    def _begin_transfer(self) -> None:
        self._buffer = bytearray()
        self._lengths: list[int] = []

    @property
    def reserved(self) -> int:
        """Transfers that are not in flight: their buffers fill up."""
        return len(self._free) + len(self._full)

    def first_transfers(self) -> Sequence[Transfer]:
        """None: the guest's packets come first."""
        return ()

    def id_of(self, transfer: Transfer) -> int:
        """The id that the guest gave to the first packet of *transfer*."""
        return self._ids[transfer]

    def put(self, packet_id: int, data: Payload) -> Sequence[Transfer]:
        """Take a packet; the transfers that are to be submitted now.

        When all transfers are in flight the guest is too fast: this packet and half a ring's worth of those that follow
        are dropped, which brings the buffer back to half.
        """
        if self._to_drop:
            self._to_drop -= 1
            return ()
        if not self._free:
            self._to_drop = self._half
            return ()
        if not self._lengths:
            self._ids[self._free[0]] = packet_id
        self._buffer += data
        self._lengths.append(len(data))
        if len(self._lengths) == self.shape.packets:
            self._finish_transfer()
        return self._ready()

    def _finish_transfer(self) -> None:
        transfer = self._free.popleft()
        transfer.data, transfer.length, transfer.iso_lengths = self._buffer, len(self._buffer), self._lengths
        self._full.append(transfer)
        self._begin_transfer()

    def _ready(self) -> Sequence[Transfer]:
        """The full transfers, unless the ring still waits to be half full."""
        if not self._sending:
            self._sending = len(self._full) * self.shape.packets + len(self._lengths) >= self._half
        if not self._sending:
            return ()
        ready, self._full = self._full, []
        return ready

    def take_back(self, transfer: Transfer) -> None:
        """*transfer* has completed. If it was the last in flight the guest is too slow: the ring fills anew."""
        self._free.append(transfer)
        if len(self._free) == len(self.transfers):
            self._sending = False
            self._to_drop = 0
            self._begin_transfer()


def new_stream(shape: Shape, completed: Callable[[Transfer], None]) -> Stream:
    """A run of the class that *shape* needs."""
    if shape.kind is not TransferType.ISO:
        return Stream(shape, completed)
    return IsoReceiving(shape, completed) if shape.endpoint & 0x80 else IsoSending(shape, completed)


def outcome(transfer: Transfer) -> int:
    """The status of an OUT transfer with all its packets: the first failure, or a stall wherever it is."""
    if transfer.status != Status.SUCCESS:
        return transfer.status
    failures = [result.status for result in transfer.iso_results if result.status != Status.SUCCESS]
    if Status.STALL in failures:
        return Status.STALL
    return failures[0] if failures else Status.SUCCESS
