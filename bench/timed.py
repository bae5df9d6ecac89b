"""What is timed: parsing and sending, in memory and over loopback TCP.

In each round the implementations take turns, so that other work on the machine hits all alike: over TCP one transfer
each, in memory many passes of about a millisecond. Ratios are taken within a round, and their median is shown. In
memory the clock is this process's CPU time.
"""

from __future__ import annotations

import json
import select
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from endpoints import CountingSink, End, MemorySink, MemorySource, Received, Transport
from processes import compiled
from wire import KINDS, Kind, stream

from usbredir.transport import Connection

__all__ = ["CReceiver", "Implementation", "Row", "memory_rows", "run_rounds", "tcp_rows"]

HERE = Path(__file__).parent
PER_FLUSH = 32
"""Packets per flush in the rows that gather."""
FLUSHES = (("flush each", 1), (f"{PER_FLUSH} per flush", PER_FLUSH))


@dataclass(frozen=True)
class Implementation:
    """How to make an end of a connection, and how it meets a socket."""

    name: str
    make: Callable[..., End]
    over_socket: Callable[[socket.socket], Transport]


@dataclass
class Row:
    """One line of a table: nanoseconds per packet, one number per round, for each implementation."""

    section: str
    case: str
    kind: Kind
    measure: dict[str, Callable[[], float]]
    passes: int = 1
    values: dict[str, list[float]] = field(default_factory=dict)

    def run(self, turn: int) -> None:
        """One round. Who begins changes from round to round."""
        names = sorted(self.measure, reverse=turn % 2 == 0)
        taken: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(self.passes):
            for name in names:
                taken[name].append(self.measure[name]())
        for name in names:
            self.values.setdefault(name, []).append(statistics.median(taken[name]))

    def median(self, name: str) -> float:
        """Nanoseconds per packet."""
        return statistics.median(self.values[name])

    def spread(self, name: str) -> float:
        """Half the distance between the quartiles, as a part of the median."""
        values = self.values[name]
        if len(values) < 3:
            return 0.0
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
        return (high - low) / 2 / middle

    def ratio(self, other: str, name: str = "usbredir") -> float | None:
        """How many times as fast as *other* we are: the median of the rounds' ratios."""
        if other not in self.values:
            return None
        return statistics.median(b / a for a, b in zip(self.values[name], self.values[other], strict=True))


def run_rounds(rows: list[Row], rounds: int) -> None:
    """Run all rows, round by round."""
    for turn in range(rounds):
        for row in rows:
            row.run(turn)


# ---------------------------------------------------------------- in memory


@contextmanager
def memory_rows(implementations: list[Implementation], passes: int) -> Iterator[list[Row]]:
    """Parse and send in memory, *passes* passes of each implementation per round."""
    with ExitStack() as ends:
        rows = []
        for kind in KINDS:
            runs = {i.name: _parsing(i, kind, ends) for i in implementations}
            rows.append(Row("parse", "", kind, runs, passes))
        for case, gather in FLUSHES:
            for kind in KINDS:
                runs = {i.name: _sending(i, kind, gather, ends) for i in implementations}
                rows.append(Row("send", case, kind, runs, passes))
        yield rows


def _packets(kind: Kind) -> int:
    """Packets per pass."""
    return max(4, min(512, 1024 * 1024 // (kind.size + 26)))


def _timed(run: Callable[[], None], count: int) -> float:
    """Nanoseconds per packet of one pass."""
    clock = time.process_time
    start = clock()
    run()
    return (clock() - start) / count * 1e9


def _parsing(implementation: Implementation, kind: Kind, ends: ExitStack) -> Callable[[], float]:
    count = _packets(kind)
    data = stream(kind, count)

    def prepare(received: Received | None) -> tuple[Callable[[], None], End]:
        source = MemorySource()
        end = implementation.make(source, received=received)
        ends.callback(end.close)
        end.receive()
        assert end.connected
        source.load(data)
        receive = end.receive

        def run() -> None:
            source.position = 0
            receive()

        return run, end

    got: list[tuple[int, bytes]] = []
    checked, _ = prepare(lambda packet_id, payload: got.append((packet_id, bytes(payload))))
    checked()
    assert got == [(i, kind.payload) for i in range(count)], (implementation.name, kind)
    run, end = prepare(None)
    before = end.count
    run()
    assert end.count - before == count, (implementation.name, kind)
    return lambda: _timed(run, count)


def _sending(implementation: Implementation, kind: Kind, gather: int, ends: ExitStack) -> Callable[[], float]:
    count = max(gather, _packets(kind) // gather * gather)
    data = kind.payload

    def prepare(sink: MemorySink) -> Callable[[], None]:
        end = implementation.make(sink, usb_host=True)
        ends.callback(end.close)
        end.receive()
        assert end.connected
        send, flush = end.sender(kind), end.flush

        def run_each() -> None:
            for packet_id in range(count):
                send(packet_id, data)
                flush()

        def run_gathered() -> None:
            for first in range(0, count, gather):
                for packet_id in range(first, first + gather):
                    send(packet_id, data)
                flush()

        return run_each if gather == 1 else run_gathered

    checked = CountingSink()
    prepare(checked)()
    assert checked.bytes == len(stream(kind, 1)) * count, (implementation.name, kind)
    run = prepare(MemorySink())
    run()
    return lambda: _timed(run, count)


# ---------------------------------------------------------------- over TCP


class Peer:
    """The process at the other end; see peer.py."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "peer.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())

    def connect(self, command: str) -> socket.socket:
        """A connection that has begun with *command*."""
        sock = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.sendall(command.encode() + b"\n")
        return sock

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


class PlainSocket:
    """The least a binding needs of a socket."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._recv, self._send = sock.recv, sock.send

    def read(self, count: int) -> bytes | None:
        """Up to *count* bytes; None: nothing there now."""
        try:
            return self._recv(count)
        except BlockingIOError:
            return None

    def write(self, data: bytes | memoryview) -> int | None:
        """Send what the socket takes; None: nothing now."""
        try:
            return self._send(data)
        except BlockingIOError:
            return None


def library_connection(sock: socket.socket) -> Transport:
    """usbredir's own connection."""
    return Connection(sock, "peer")


@contextmanager
def tcp_rows(implementations: list[Implementation], c_receiver: CReceiver | None, scale: float) -> Iterator[list[Row]]:
    """Receive and send over TCP, against one other process."""
    peer = Peer()
    try:
        rows = []
        for index, kind in enumerate(KINDS):
            measure = {i.name: _receiving(i, peer, index, _transfer(i, kind, scale)) for i in implementations}
            if c_receiver is not None:
                measure["C"] = c_receiver.measure(peer.port, index, 3 * _count(kind, scale))
            rows.append(Row("TCP receive", "", kind, measure))
        for case, gather in FLUSHES:
            for kind in KINDS:
                runs = {i.name: _sending_tcp(i, peer, kind, gather, _transfer(i, kind, scale)) for i in implementations}
                rows.append(Row("TCP send", case, kind, runs))
        yield rows
    finally:
        peer.close()


def _count(kind: Kind, scale: float) -> int:
    """Packets of a transfer that takes ctypes some 50 milliseconds."""
    return max(PER_FLUSH, int(scale * min(10_000, 48 * 1024 * 1024 // (kind.size + 4096))))


def _transfer(implementation: Implementation, kind: Kind, scale: float) -> int:
    # Small packets take ctypes several times as long; a number of about the same length suffers alike from others.
    faster = 3 if implementation.name == "usbredir" and kind.size <= 4096 else 1
    return faster * _count(kind, scale) // PER_FLUSH * PER_FLUSH


def _wait(sock: socket.socket, events: int) -> None:
    poller = select.poll()
    poller.register(sock, events)
    if not poller.poll(60_000):
        raise TimeoutError("the other process does nothing")


def _connected(implementation: Implementation, sock: socket.socket, *, usb_host: bool) -> End:
    end = implementation.make(implementation.over_socket(sock), usb_host=usb_host)
    while not end.connected:
        _wait(sock, select.POLLIN)
        end.receive()
    return end


def _receiving(implementation: Implementation, peer: Peer, index: int, count: int) -> Callable[[], float]:
    def measure() -> float:
        with peer.connect(f"give {index} {count}") as sock:
            end = _connected(implementation, sock, usb_host=False)
            last = end.count + count
            poller = select.poll()
            poller.register(sock, select.POLLIN)
            start = time.perf_counter()
            sock.send(b"!")
            while end.count < last:
                poller.poll()
                end.receive()
            elapsed = time.perf_counter() - start
            end.close()
        return elapsed / count * 1e9

    return measure


def _sending_tcp(
    implementation: Implementation, peer: Peer, kind: Kind, gather: int, count: int
) -> Callable[[], float]:
    data = kind.payload

    def measure() -> float:
        with peer.connect("take") as sock:
            end = _connected(implementation, sock, usb_host=True)
            send, flush, pending = end.sender(kind), end.flush, end.pending
            start = time.perf_counter()
            for first in range(0, count, gather):
                for packet_id in range(first, first + gather):
                    send(packet_id, data)
                flush()
                while pending():
                    _wait(sock, select.POLLOUT)
                    flush()
            sock.shutdown(socket.SHUT_WR)
            _wait(sock, select.POLLIN)  # all has arrived
            elapsed = time.perf_counter() - start
            end.close()
        return elapsed / count * 1e9

    return measure


class CReceiver:
    """The C library in C, reading as usbredirect does; see cpeer.c. Needs a compiler and the header."""

    def __init__(self, program: Path) -> None:
        self._program = program

    @classmethod
    @contextmanager
    def compiled(cls) -> Iterator[CReceiver]:
        """Compile it into a temporary directory. Raises RuntimeError that tells what is missing."""
        with tempfile.TemporaryDirectory() as directory:
            yield cls(compiled(Path(directory, "cpeer"), HERE / "cpeer.c", library=True))

    def measure(self, port: int, index: int, count: int) -> Callable[[], float]:
        """A measurement of one transfer."""

        def run() -> float:
            command = [str(self._program), str(port), str(index), str(count)]
            result = subprocess.run(command, check=True, stdout=subprocess.PIPE, timeout=120)
            return float(json.loads(result.stdout)) / count * 1e9

        return run
