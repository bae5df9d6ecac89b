"""What a peer may make us hold: one object with every limit, each with a safe default."""

from __future__ import annotations

from typing import NamedTuple

from .proto import MAX_BULK, MAX_PACKET

__all__ = ["Limits"]


class Limits(NamedTuple):
    """Limits of a parser, a host or a guest.

    Attributes:
        max_packet: largest length a packet header may announce, in bytes; a larger one is a bad packet.
        max_bulk: longest bulk transfer, in bytes.
        max_queued_packets: packets that may wait to be written before ``send`` raises QueueFullError; None: any number.
        max_queued_bytes: the same in bytes.
        max_filter_text: longest filter text that is accepted, in bytes. Rules take ten times the memory of their text.
        max_transfers: host: transfers in flight at once; a request beyond it is answered with *ioerror*.
        max_transfer_bytes: host: bytes of the buffers of transfers in flight, likewise.
    """

    max_packet: int = MAX_PACKET
    max_bulk: int = MAX_BULK
    max_queued_packets: int | None = None
    max_queued_bytes: int | None = None
    max_filter_text: int = 1024 * 1024
    max_transfers: int = 1024
    max_transfer_bytes: int = 2 * MAX_BULK
