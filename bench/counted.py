"""What is counted: the same on every machine, however busy it is.

The costs of a long queue and of locks are times, but ratios of times of one and the same operation, taken in turns.
"""

from __future__ import annotations

import socket
import statistics
import sys
import time
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from endpoints import CountingSink, End, MemorySink, UsbredirEnd
from timed import PER_FLUSH, Implementation
from wire import KINDS, Kind, hello, stream

from usbredir.locking import ThreadingLocks
from usbredir.packets import BulkPacket, Packet
from usbredir.parser import Parser, ParserCallbacks

__all__ = ["Count", "counts", "queue_cost"]

SMALL, LARGE = KINDS[0], KINDS[4]
MIB = 1024 * 1024
SATURATED = 20_000
"""Packets for counts per packet."""
SEGMENT = 64 * 1024
"""What a receiver typically finds in a socket."""
QUEUE_ROUNDS = 11
"""Of the queue's cost. Their least counts; with few of them, other work would show."""
DEPTHS = (64, 256, 1024, 4096, 16384, 65536)


@dataclass(frozen=True)
class Count:
    """A counted figure. *key* is its name in the JSON, *other* the value for ctypes where it means something."""

    key: str
    text: str
    value: float
    other: float | None = None


def counts(implementations: Sequence[Implementation]) -> list[Count]:
    """All figures, ours and where there is one that of ctypes."""
    result = []
    for key, text, figure in (
        ("receive_calls", "recv calls per 64 B packet, saturated", _receive_calls),
        ("send_calls", f"send calls per 64 B packet, {PER_FLUSH} per flush", _send_calls),
    ):
        ours, *others = [figure(i) for i in implementations]
        result.append(Count(key, text, ours, others[0] if others else None))
    result += [
        Count("queued_bytes", "memory per queued 64 B packet, bytes", _queued_bytes()),
        Count("queued_blocks", "allocations per queued 64 B packet", _queued_blocks()),
    ]
    for kind in KINDS:
        calls, buffers = _per_flush(kind)
        result.append(Count(f"write_calls {kind.name}", f"write calls per flush of {PER_FLUSH}, {kind.name}", calls))
        result.append(Count(f"buffers {kind.name}", f"buffers per flush of {PER_FLUSH}, {kind.name}", buffers))
    result += [
        Count("receive_copies", "copies of a received 1 MiB payload, all there", _received_copies(2 * MIB)),
        Count("receive_copies_pieces", "copies of a received 1 MiB payload, in pieces", _received_copies(SEGMENT)),
        Count("readinto_copies", "the same with readinto()", _received_copies(SEGMENT, readinto=True)),
        Count("send_copies", "copies of a sent 1 MiB payload", _sent_copies()),
        Count("lock_calls", "lock() calls per packet sent and flushed", _lock_calls()),
        Count("lock_cost", "cost of send and flush with locks / without", _lock_cost()),
    ]
    return result


# ---------------------------------------------------------------- calls


class CountingSocket(socket.socket):
    """Counts the system calls that move data."""

    receives = sends = 0

    def recv(self, *arguments: int) -> bytes:
        self.receives += 1
        return super().recv(*arguments)

    def send(self, data: bytes | memoryview, *arguments: int) -> int:  # type: ignore[override]
        self.sends += 1
        return super().send(data, *arguments)

    def sendmsg(self, *arguments: Sequence[bytes | memoryview]) -> int:  # type: ignore[override]
        self.sends += 1
        return super().sendmsg(*arguments)  # type: ignore[arg-type]


def _pair(implementation: Implementation, *, usb_host: bool) -> tuple[CountingSocket, socket.socket, End]:
    near, far = socket.socketpair()
    counting = CountingSocket(near.family, near.type, near.proto, near.detach())
    far.sendall(hello())
    far.setblocking(False)
    end = implementation.make(implementation.over_socket(counting), usb_host=usb_host)
    while not end.connected:
        end.receive()
    return counting, far, end


def _receive_calls(implementation: Implementation) -> float:
    counting, far, end = _pair(implementation, usb_host=False)
    with counting, far:
        data = memoryview(stream(SMALL, SATURATED))
        before, last = counting.receives, end.count + SATURATED
        while end.count < last:
            try:
                while data:
                    data = data[far.send(data) :]
            except BlockingIOError:
                pass  # full: saturated
            end.receive()
        end.close()
        return (counting.receives - before) / SATURATED


def _send_calls(implementation: Implementation) -> float:
    counting, far, end = _pair(implementation, usb_host=True)
    with counting, far:
        send, count = end.sender(SMALL), SATURATED // PER_FLUSH * PER_FLUSH
        data = SMALL.payload
        for packet_id in range(count):
            send(packet_id, data)
            if packet_id % PER_FLUSH == PER_FLUSH - 1:
                end.flush()
                far.recv(SEGMENT)
        assert not end.pending()
        end.close()
        return counting.sends / count


def _per_flush(kind: Kind) -> tuple[int, int]:
    sink = CountingSink()
    end = UsbredirEnd(sink, usb_host=True)
    end.receive()
    send = end.sender(kind)
    for _ in range(4):  # the library learns what the transport takes at once
        sink.writes = sink.buffers = 0
        for packet_id in range(PER_FLUSH):
            send(packet_id, kind.payload)
        end.flush()
    end.close()
    return sink.writes, sink.buffers


# ---------------------------------------------------------------- memory


def _queued_bytes() -> float:
    tracemalloc.start()
    bytes_each = _queued(lambda: tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    return bytes_each


def _queued_blocks() -> float:
    return _queued(sys.getallocatedblocks)


def _queued(used: Callable[[], int]) -> float:
    """What each of many queued packets adds."""
    end = UsbredirEnd(MemorySink(), usb_host=True)
    end.receive()
    send, data = end.sender(SMALL), SMALL.payload
    send(0, data)
    before = used()
    for packet_id in range(SATURATED):
        send(packet_id, data)
    added = used() - before
    end.flush()
    end.close()
    return added / SATURATED


class _Replay(ParserCallbacks):
    """Gives a stream in pieces. A first run notes them, a second gives the same objects: what is allocated then is
    allocated by the library."""

    def __init__(self, data: bytes, most: int, pieces: list[bytes] | None) -> None:
        self.data = data
        self.most = most
        self.pieces = [] if pieces is None else pieces
        self.replayed = pieces is not None
        self.turn = self.position = 0
        self.wholes = 0

    def read(self, count: int) -> bytes | None:
        if self.replayed:
            piece = self.pieces[self.turn] if self.turn < len(self.pieces) else b""
        else:
            piece = self.data[self.position : self.position + min(count, self.most)]
            self.pieces.append(piece)
        assert len(piece) <= count
        self.turn += 1
        self.position += len(piece)
        return piece or None

    def packet_received(self, packet: Packet) -> None:
        if isinstance(packet, BulkPacket):
            self.wholes += packet.length == len(packet.data) == LARGE.size


class _ReplayInto(_Replay):
    def readinto(self, buffer: memoryview) -> int | None:
        piece = self.read(len(buffer))
        if piece is None:
            return None
        buffer[: len(piece)] = piece
        return len(piece)


def _received_copies(most: int, *, readinto: bool = False) -> float:
    """Memory taken while a payload arrives, over its size. With readinto the memory that is read into is no copy."""
    data = hello() + stream(LARGE, 8)
    make = _ReplayInto if readinto else _Replay
    first = make(data, most, None)
    Parser(first, send_hello=False).do_read()
    second = make(data, most, first.pieces)
    parser = Parser(second, send_hello=False)
    tracemalloc.start()
    parser.do_read()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert first.wholes == second.wholes == 8
    return max(0.0, peak / LARGE.size - (1 if readinto else 0))


class _Looking(MemorySink):
    """Looks whose memory the buffers are."""

    def __init__(self, payload: bytes) -> None:
        super().__init__()
        self.payload = payload
        self.own = self.copied = 0

    def writev(self, buffers: Sequence[memoryview]) -> int:
        for buffer in buffers:
            if buffer.obj is self.payload:
                self.own += len(buffer)
            else:
                self.copied += len(buffer)
        return super().writev(buffers)


def _sent_copies() -> float:
    """Bytes written from other memory than the application's, and memory taken, over the payload's size."""
    payload = LARGE.payload
    sink = _Looking(payload)
    end = UsbredirEnd(sink, usb_host=True)
    end.receive()
    send = end.sender(LARGE)
    send(0, payload)
    end.flush()
    sink.own = sink.copied = 0
    tracemalloc.start()
    send(1, payload)
    end.flush()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sink.own + sink.copied == len(stream(LARGE, 1))
    end.close()
    return max(peak, sink.copied) / LARGE.size


# ---------------------------------------------------------------- queue and locks


def queue_cost(implementation: Implementation, depths: Sequence[int] = DEPTHS) -> dict[int, float]:
    """Nanoseconds to queue one 64 B packet and write it, when so many are queued before the first is written.

    The least of the rounds: other work only adds. All depths move equally many packets, so that it meets all alike.
    """
    end = implementation.make(MemorySink(), usb_host=True)
    end.receive()
    send, flush, data = end.sender(SMALL), end.flush, SMALL.payload
    taken: dict[int, list[float]] = {depth: [] for depth in depths}
    for turn in range(QUEUE_ROUNDS + 1):
        for depth in depths:
            repeat = max(depths) // depth
            start = time.process_time()
            for _ in range(repeat):
                for packet_id in range(depth):
                    send(packet_id, data)
                flush()
            if turn:  # the first warms up
                taken[depth].append((time.process_time() - start) / depth / repeat * 1e9)
    end.close()
    return {depth: min(values) for depth, values in taken.items()}


class _CountingLocks(ThreadingLocks):
    def __init__(self) -> None:
        self.calls = 0

    def lock(self, lock: object, /) -> None:
        self.calls += 1
        super().lock(lock)


def _lock_calls() -> float:
    locks = _CountingLocks()
    end = UsbredirEnd(MemorySink(), usb_host=True, locks=locks)
    end.receive()
    send = end.sender(SMALL)
    before = locks.calls
    for packet_id in range(100):
        send(packet_id, SMALL.payload)
        end.flush()
    calls = (locks.calls - before) / 100
    end.close()
    return calls


def _lock_cost() -> float:
    def sending(locks: ThreadingLocks | None) -> Callable[[], float]:
        end = UsbredirEnd(MemorySink(), usb_host=True, locks=locks)
        end.receive()
        send, flush, data = end.sender(SMALL), end.flush, SMALL.payload

        def measure() -> float:
            start = time.process_time()
            for packet_id in range(500):
                send(packet_id, data)
                flush()
            return time.process_time() - start

        return measure

    with_locks, without = sending(ThreadingLocks()), sending(None)
    return statistics.median(with_locks() / without() for _ in range(51))
