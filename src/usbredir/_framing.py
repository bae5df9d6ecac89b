"""From a stream of bytes to packets: sans-IO, no callback of the application, no lock.

Bytes go in with :meth:`Decoder.take`, packets come out of :meth:`Decoder.parse`, and :meth:`Decoder.wanted` says
how many bytes to ask the transport for next. Three situations:

* *small packets*: the transport is asked for 64 KiB; one loop parses what arrived, many at once where packets are
  alike; an open packet's bytes stay in front of the next piece.
* *an open large payload*: asked for exactly what is missing, so that it need not be cut out of anything;
  the pieces are kept as they are and joined once, when the last has come.
* *behind a bad header*: the announced body is thrown away.

Memory follows the bytes received: a header's length only limits how much is asked for, see :data:`FIRST_TRUST`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from ._layout import Reject, compile_decoder, compile_rows, compile_run, header_struct
from .capabilities import has
from .errors import RemoteProtocolError
from .limits import Limits
from .packets import PACKET_TYPES, Packet
from .proto import Capability, Direction, PacketType

__all__ = ["Decoder"]

READ_SIZE = 64 * 1024
"""Bytes asked for while packets are small. More is slower: above 128 KiB each recv() maps and unmaps memory."""
LARGE = 16 * 1024
"""The rest of an open packet of this size is read on its own, without being joined to anything else."""
NEXT_IS_LARGE = 32 * 1024
"""Behind a payload of this size the next is probably as large: only its headers are read, so that the payload
then arrives in pieces of its own, without a copy."""
TINY = 4096
"""Received pieces below this are gathered, so that a peer cannot make us keep one object per byte."""
FIRST_TRUST = 256 * 1024
"""Bytes asked for at once until the peer has sent larger payloads: what is only announced is not allocated."""
MOST_TRUST = 16 * 1024 * 1024

LEAST_ROWS = 32 if sys.implementation.name == "cpython" else sys.maxsize
"""Packets of one length from which they are told apart all at once: as quick at 24, 1.5 times at 64. PyPy is faster one
by one."""
TYPE_AND_LENGTH = 8
"""Bytes of a header without the id."""

# Types that change the parser's state, or may be dropped: not for the fast path.
SPECIAL = (PacketType.HELLO, PacketType.DEVICE_DISCONNECT, PacketType.FILTER_FILTER)

REASONS = {
    "bad_type": "unknown packet type, or one that may not travel in this direction",
    "packet_too_large": "the announced length is above the limit",
    "bad_length": "the announced length does not fit the packet type",
    "data_length_mismatch": "the number of data bytes differs from the length field",
    "unexpected_data": "data on a packet that carries none in this direction",
    "wrong_direction": "this endpoint's packets do not travel in this direction",
    "endpoint_not_input": "the endpoint must be an IN endpoint",
    "interface_count_limit": "more than 32 interfaces",
    "bulk_length_limit": "the bulk length is above the limit",
    "missing_cap_filter": "the filter capability is missing",
    "missing_cap_disconnect_ack": "the device_disconnect_ack capability is missing",
    "missing_cap_bulk_receiving": "the bulk_receiving capability is missing",
    "filter_no_data": "a filter without its text",
    "filter_not_terminated": "a filter text without its final NUL",
    "field_range": "a value does not fit its field",
}
"""What can be wrong with a packet, by the key that errors carry."""

Decode = Callable[[bytes, int, int, bytes], Packet]
Entry = tuple[int, int, Decode, Callable[..., int] | None]
"""Size of the type header, largest length on the fast path, decoder, decoder of rows."""


def packet_name(packet_type: int) -> str:
    """Name of a packet type for messages."""
    known = PACKET_TYPES.get(packet_type)
    return known.__name__ if known else f"packet type {packet_type}"


def skippable(length: int) -> int:
    """Bytes to throw away for a bad header's length; a 32-bit length with the top bit set skips nothing.

    So it is in the original: no real packet is that long, and 2 GiB of silence would be no better.
    """
    return length if length < 1 << 31 else 0


class Decoder:
    """The receiving half of a connection. Threads: one caller at a time.

    special: called for packets of the types in :data:`SPECIAL` with a function that makes the packet.
    """

    __slots__ = (
        "_ask",
        "_chunk",
        "_entries",
        "_header_size",
        "_large",
        "_max_bulk",
        "_max_filter",
        "_max_packet",
        "_missing",
        "_own",
        "_parts",
        "_peer",
        "_received",
        "_rest",
        "_special",
        "travel",
        "_trust",
        "_unpack_header",
        "pos",
        "skip",
    )

    def __init__(self, travel: Direction, limits: Limits, special: Callable[[int, Callable[[], Packet]], None]) -> None:
        self.travel = travel
        self._max_packet = limits.max_packet
        self._max_bulk = limits.max_bulk
        self._max_filter = limits.max_filter_text
        self._special = special
        self._chunk = b""
        self.pos = 0
        self.skip = 0
        """Bytes that are still to be thrown away, as a 32-bit number; see :func:`skippable`."""
        self._large: tuple[int, bytes, int, int] | None = None  # type, type header, id, payload size
        self._parts: list[bytes | bytearray | memoryview] = []
        self._missing = 0
        self._rest: tuple[bytes, int] | None = None  # a piece of which the open packet took the first bytes
        self._received = 0
        self._trust = FIRST_TRUST
        self._ask = READ_SIZE
        self.set_capabilities(0, 0)

    def set_capabilities(self, own: int, peer: int) -> None:
        """Use the layouts that two capability masks settle, from the next packet on."""
        self._own = own
        self._peer = peer
        header = header_struct(has(own & peer, Capability.IDS_64BITS))
        self._header_size = header.size
        self._unpack_header = header.unpack_from
        self._entries: dict[int, Entry] = {}  # by type, filled on first use

    # ------------------------------------------------------------ what came

    def wanted(self) -> int:
        """How many bytes to ask the transport for, at least 1."""
        if self._large is not None:
            return min(self._missing, max(self._trust, self._received))
        if self.skip and skippable(self.skip):
            return min(skippable(self.skip), READ_SIZE)
        return self._ask

    def take(self, piece: bytes | memoryview) -> None:
        """Add received bytes, at most :meth:`wanted` of them, which nobody changes. Call :meth:`parse` next."""
        self._ask = READ_SIZE
        if self.skip:
            dropped = min(skippable(self.skip), len(piece))
            self.skip -= dropped
            piece = piece[dropped:]
        if self._large is not None:
            self._take_payload(piece)
        elif self.pos < len(self._chunk):
            self._complete_open_packet(bytes(piece))
        else:
            self._chunk = bytes(piece)  # no copy for bytes
            self.pos = 0

    def _complete_open_packet(self, piece: bytes) -> None:
        """Put *piece* behind the open packet; where the packet lacks little, only what it lacks is copied."""
        tail = self._chunk[self.pos :]
        self.pos = 0
        size = self._header_size
        head = tail if len(tail) >= size else tail + piece[: size - len(tail)]
        if len(head) >= size:
            lacks = size + self._unpack_header(head, 0)[1] - len(tail)
            if 0 < lacks <= len(piece) // 2:
                self._chunk = tail + piece[:lacks]
                self._rest = piece, lacks
                return
        self._chunk = tail + piece

    def _take_payload(self, piece: bytes | memoryview) -> None:
        self._missing -= len(piece)
        self._received += len(piece)
        parts = self._parts
        if len(piece) >= TINY:
            parts.append(piece)
        elif parts and isinstance(parts[-1], bytearray):
            parts[-1] += piece
        else:
            parts.append(bytearray(piece))

    # ------------------------------------------------------------ packets

    def parse(self, deliver: Callable[[Packet], None]) -> None:
        """Hand every complete packet to *deliver*.

        Raises RemoteProtocolError for a bad packet, and what *deliver* raises; either way the packet counts as
        consumed, and the next call goes on behind it.
        """
        if self._large is not None:
            if self._missing:
                return
            self._finish_large(deliver)
        if self.pos < len(self._chunk):
            self._parse_chunk(deliver)
        if self._rest is not None:
            self._take_rest()
            self._parse_chunk(deliver)

    def _take_rest(self) -> None:
        """The open packet was complete, good or bad, so nothing of it is left: what came behind it is next."""
        assert self._rest is not None
        (self._chunk, self.pos), self._rest = self._rest, None

    def _parse_chunk(self, deliver: Callable[[Packet], None]) -> None:
        buffer, pos = self._chunk, self.pos
        end = len(buffer)
        length = packet_type = before = length_before = 0
        least = LEAST_ROWS
        # Bound to locals: attribute look-ups cost 60 ns a packet here.
        unpack_header, header_size, entries = self._unpack_header, self._header_size, self._entries
        try:
            while end - pos >= header_size:
                packet_type, length, packet_id = unpack_header(buffer, pos)
                entry = entries.get(packet_type)
                if entry is None:
                    entry = self._entry(packet_type, length)
                size, most, decode, run = entry
                start = pos + header_size
                if not size <= length <= most:
                    if packet_type not in SPECIAL or length < size or length > self._most(packet_type, size):
                        raise Reject(self._size_problem(packet_type, length))
                    stop = start + length
                    if stop > end:
                        if length >= LARGE and start + size <= end:
                            pos = self._begin_large(packet_type, start, size, stop, packet_id)
                        break
                    pos = stop
                    self._special(packet_type, _maker(decode, buffer, start, packet_id, buffer[start + size : stop]))
                    unpack_header, header_size, entries = self._unpack_header, self._header_size, self._entries
                    continue
                stop = start + length
                if stop > end:
                    if length >= LARGE and start + size <= end:
                        pos = self._begin_large(packet_type, start, size, stop, packet_id)
                    break
                pos = stop
                deliver(decode(buffer, start, packet_id, buffer[start + size : stop]))
                if run is None or packet_type != before:
                    before, length_before = packet_type, length
                else:  # two of a kind: probably a row of them
                    before = 0
                    self.pos = pos
                    try:
                        stride = header_size + length
                        if length == length_before and end - pos >= least * stride:
                            pos = self._deliver_rows(packet_type, length, deliver)
                            if stop < pos < stop + least * stride:
                                least = sys.maxsize  # a peer that makes it not worth while is not believed again
                        pos = run(self, buffer, pos, end, deliver)
                    except BaseException:
                        pos = self.pos
                        raise
        except Reject as reject:
            # A bad header is known before its body has come; a bad packet was consumed as a whole.
            if reject.reason in ("bad_type", "packet_too_large", "bad_length"):
                pos = self._drop_body(pos + header_size, end, length)
            raise self._error(packet_type, reject.reason) from None
        finally:
            self.pos = pos

    def _deliver_rows(self, packet_type: int, length: int, deliver: Callable[[Packet], None]) -> int:
        """Deliver packets like the one before :attr:`pos`, if many follow; the new position."""
        buffer, pos = self._chunk, self.pos
        stride = self._header_size + length
        start = pos - stride
        head = buffer[start : start + TYPE_AND_LENGTH]
        if not (buffer.startswith(head, pos) and buffer.startswith(head, pos + (LEAST_ROWS - 1) * stride)):
            return pos
        declaration, wide_ids = PACKET_TYPES[packet_type].declaration, self._header_size == 16
        rows = compile_rows(
            declaration, wide_ids, self._own & self._peer, self.travel, self._max_bulk, length, buffer[start:pos]
        )
        return pos if rows is None else rows(self, buffer, pos, len(buffer), deliver)

    def _entry(self, packet_type: int, length: int) -> Entry:
        """What the loop needs of a packet type, made when the type is first met."""
        cls = PACKET_TYPES.get(packet_type)
        if cls is None or not cls.declaration.may_travel(self.travel):
            raise Reject("bad_type")
        size, decode = compile_decoder(cls.declaration, self._own & self._peer, self._own, self.travel, self._max_bulk)
        most = -1 if packet_type in SPECIAL else self._most(packet_type, size)
        run = None
        if most >= 0:
            wide_ids, both = self._header_size == 16, self._own & self._peer
            run = compile_run(cls.declaration, wide_ids, both, self._own, self.travel, self._max_bulk, most)
        entry = self._entries[packet_type] = size, most, decode, run
        return entry

    def _most(self, packet_type: int, size: int) -> int:
        """The largest length that a packet of this type may announce."""
        if packet_type == PacketType.FILTER_FILTER:
            return min(self._max_packet, self._max_filter)
        return self._max_packet if PACKET_TYPES[packet_type].declaration.has_data else min(size, self._max_packet)

    def _size_problem(self, packet_type: int, length: int) -> str:
        too_large = length > self._max_packet or (packet_type == PacketType.FILTER_FILTER and length > self._max_filter)
        return "packet_too_large" if too_large else "bad_length"

    def _drop_body(self, start: int, end: int, length: int) -> int:
        """Throw the body of a bad header away, as far as it has come; the rest when it comes."""
        self.skip = length
        dropped = min(skippable(length), end - start)
        self.skip -= dropped
        return start + dropped

    def _error(self, packet_type: int, reason: str) -> RemoteProtocolError:
        return RemoteProtocolError(
            f"bad packet from the peer: {packet_name(packet_type)}: {REASONS[reason]}",
            packet_type=packet_type,
            reason=reason,
        )

    # ------------------------------------------------------------ large payloads

    def _begin_large(self, packet_type: int, start: int, size: int, stop: int, packet_id: int) -> int:
        chunk = self._chunk
        end = len(chunk)
        data = start + size
        self._large = packet_type, chunk[start:data], packet_id, stop - data
        self._missing = stop - end
        self._received = end - data
        # A view, so that the piece is copied only once, when the parts are joined.
        self._parts = [memoryview(chunk)[data:end]] if end > data else []
        return end

    def _finish_large(self, deliver: Callable[[Packet], None]) -> None:
        assert self._large is not None
        packet_type, head, packet_id, size = self._large
        parts = self._parts
        data = parts[0] if len(parts) == 1 and isinstance(parts[0], bytes) else b"".join(parts)
        self._large = None
        self._parts = []
        if size >= NEXT_IS_LARGE:
            self._ask = self._header_size + len(head)
        self._trust = min(max(self._trust, size), MOST_TRUST)
        decode = self._entries[packet_type][2]
        try:
            if packet_type in SPECIAL:
                self._special(packet_type, _maker(decode, head, 0, packet_id, data))
                return
            packet = decode(head, 0, packet_id, data)
        except Reject as reject:
            raise self._error(packet_type, reject.reason) from None
        deliver(packet)

    # ------------------------------------------------------------ migration

    def open_packet(self) -> tuple[bytes, bytes, bytes] | None:
        """The bytes of the packet that is partly received, as (header, type header, data).

        None when more than one packet's bytes are there: then some were not parsed yet.
        """
        if self._large is not None:
            packet_type, head, packet_id, size = self._large
            header = header_struct(self._header_size == 16).pack(packet_type, len(head) + size, packet_id)
            return header, head, b"".join(self._parts)
        if self._rest is not None:
            self._take_rest()
        rest = self._chunk[self.pos :]
        if len(rest) < self._header_size:
            return rest, b"", b""
        if self.header_problem(rest):
            return None  # its error is still to be raised
        length = self._unpack_header(rest, 0)[1]
        size = self.type_header_size(rest)
        if len(rest) > self._header_size + length:
            return None
        body = self._header_size + size
        return rest[: self._header_size], rest[self._header_size : body], rest[body:]

    def header_problem(self, header: bytes) -> str | None:
        """What is wrong with a complete header, as a key of :data:`REASONS`, or None."""
        packet_type, length, _ = self._unpack_header(header, 0)
        try:
            size = (self._entries.get(packet_type) or self._entry(packet_type, length))[0]
        except Reject as reject:
            return reject.reason
        if not size <= length <= self._most(packet_type, size):
            return self._size_problem(packet_type, length)
        return None

    def type_header_size(self, header: bytes) -> int:
        """Bytes of the type header behind a complete and valid header."""
        packet_type, length, _ = self._unpack_header(header, 0)
        return (self._entries.get(packet_type) or self._entry(packet_type, length))[0]

    @property
    def header_size(self) -> int:
        """Bytes of a packet header under the present capabilities: 12 or 16."""
        return self._header_size

    def load(self, open_packet: bytes, skip: int) -> None:
        """Go on where another decoder was: *open_packet* is what it had of a packet, *skip* as its :attr:`skip`."""
        self._chunk = open_packet
        self.pos = 0
        self.skip = skip


def _maker(decode: Decode, buffer: bytes, start: int, packet_id: int, data: bytes) -> Callable[[], Packet]:
    return lambda: decode(buffer, start, packet_id, data)
