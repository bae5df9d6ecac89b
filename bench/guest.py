"""Round trips of a guest over loopback TCP, beside a C client: ``bench/guest.py``. See README.md."""

from __future__ import annotations

import argparse
import select
import socket
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from goals import Figure
from machine import interpreter
from processes import compiled, output, running
from wire import DEVICE_CONNECT, bulk_request, hello

from usbredir import requests
from usbredir.guest import Guest, TransferResult
from usbredir.transport import GuestConnection, connect

__all__ = ["Bed", "Round", "compare", "latency_figures", "rate_figures"]

SIZE = 512
SOURCE = Path(__file__).with_name("cguest.c")
LIMIT = 60.0
"""Seconds for a measurement, at most."""


class Outcome(NamedTuple):
    """Round trips per second, and how long they took in us: half of them, 99 in 100, and the worst one."""

    rate: float
    half: float
    most: float
    worst: float


Ask = Callable[[int, int, float], Outcome]
"""Measures at a port, with so many in flight, for so many seconds."""
Round = tuple[Outcome, Outcome]
"""Our outcome and C's."""


def _outcome(taken: list[float], spent: float) -> Outcome:
    count = len(taken)
    taken.sort()
    return Outcome(count / spent, *(taken[at] * 1e6 for at in (count // 2, count * 99 // 100, -1)))


def _asked(exchange: Callable[[], None], seconds: float) -> Outcome:
    """One round trip after the other."""
    clock, taken = time.perf_counter, []
    now = start = clock()
    while now - start < seconds:
        before = now
        exchange()
        now = clock()
        taken.append(now - before)
    return _outcome(taken, now - start)


def ask_one(guest: Guest, depth: int, seconds: float) -> Outcome:
    """A blocking call at a time."""

    def exchange() -> None:
        assert len(guest.bulk_in(0x81, SIZE).data) == SIZE

    return _asked(exchange, seconds)


def ask_many(guest: Guest, depth: int, seconds: float) -> Outcome:
    """A pipeline. A round trip begins when the pipeline takes the request."""
    clock, taken, asked = time.perf_counter, [], deque[float]()

    def wanted() -> Iterator[requests.Request[TransferResult]]:
        while (now := clock()) - start < seconds:
            asked.append(now)
            yield requests.bulk_in(0x81, SIZE)

    start = clock()
    for result in guest.pipeline(wanted(), depth):
        assert len(result.data) == SIZE
        taken.append(clock() - asked.popleft())  # answers come in the order of the requests
    return _outcome(taken, clock() - start)


def ask_futures(guest: Guest, depth: int, seconds: float) -> Outcome:
    """Futures, the oldest of which is waited for."""
    clock, taken = time.perf_counter, []
    start = clock()
    flying = deque((clock(), guest.submit(requests.bulk_in(0x81, SIZE))) for _ in range(depth))
    while clock() - start < seconds:
        asked, future = flying.popleft()
        assert len(future.result().data) == SIZE
        taken.append(clock() - asked)
        flying.append((clock(), guest.submit(requests.bulk_in(0x81, SIZE))))
    spent = clock() - start
    for _, future in flying:
        future.result()
    return _outcome(taken, spent)


def _guest(ask: Callable[[Guest, int, float], Outcome]) -> Ask:
    """The product's own calls, once they have warmed up."""

    def asking(port: int, depth: int, seconds: float) -> Outcome:
        with connect(f"127.0.0.1:{port}") as connection, Guest(GuestConnection(connection)) as guest:
            guest.wait_for_device(10)
            ask(guest, depth, seconds / 10)
            return ask(guest, depth, seconds)

    return asking


def ask_bare(port: int, depth: int, seconds: float) -> Outcome:
    """What Python's sockets take alone: one request is sent again and again, and nobody looks at the answers."""
    request, expected = bulk_request(0x81, SIZE), len(bulk_request(0x81, SIZE)) + SIZE
    with socket.create_connection(("127.0.0.1", port), LIMIT) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.sendall(hello())
        sock.recv(len(hello()) + len(DEVICE_CONNECT), socket.MSG_WAITALL)
        sock.setblocking(False)
        poller = select.poll()
        poller.register(sock, select.POLLIN)

        def exchange() -> None:
            sock.send(request)
            missing = expected
            while missing:
                poller.poll()
                missing -= len(sock.recv(65536))

        return _asked(exchange, seconds)


class Row(NamedTuple):
    """What is measured. *goal*: the row of the goals that it belongs to, if any; *unit*: what its ratio is called."""

    name: str
    ask: Ask
    depth: int
    goal: str = ""
    unit: str = "x C"


ROWS = (
    Row("`Guest`, a call at a time", _guest(ask_one), 1, "round-trip-1"),
    Row("`Guest`, `pipeline` of 16", _guest(ask_many), 16, "round-trip-16"),
    Row("`Guest`, 16 futures", _guest(ask_futures), 16),
    Row("`send`, `poll`, `recv` alone", ask_bare, 1, "round-trip-1", "x C, without usbredir"),
)


class Bed:
    """The host in C that answers, and the client in C, while the block lasts."""

    def __init__(self, program: Path, port: int) -> None:
        self._program = program
        self._port = port

    @classmethod
    @contextmanager
    def up(cls) -> Iterator[Bed]:
        """Compile and start. Raises RuntimeError."""
        with tempfile.TemporaryDirectory() as folder:
            program = compiled(Path(folder, "cguest"), SOURCE, library=True)
            with running([str(program), "serve"]) as host:
                assert host.stdout is not None
                yield cls(program, int(host.stdout.readline()))

    def ours(self, row: Row, seconds: float) -> Outcome:
        """In Python."""
        return row.ask(self._port, row.depth, seconds)

    def theirs(self, row: Row, seconds: float) -> Outcome:
        """The same of the C client."""
        command = [str(self._program), "ask", str(self._port), str(SIZE), str(row.depth), str(seconds)]
        return Outcome(*map(float, output(command, LIMIT + seconds).split()))


def compare(rounds: int, seconds: float) -> Mapping[Row, list[Round]]:
    """Interleaved rounds of all rows. Raises RuntimeError."""
    results: dict[Row, list[Round]] = {row: [] for row in ROWS}
    with Bed.up() as bed:
        for turn in range(rounds):
            for row, pairs in results.items():
                theirs = bed.theirs(row, seconds) if turn % 2 else None
                ours = bed.ours(row, seconds)
                pairs.append((ours, theirs or bed.theirs(row, seconds)))
    return results


def rate_figures(results: Mapping[Row, list[Round]], goal: str) -> Iterator[Figure]:
    """Rates of the rows that belong to a goal."""
    for row, pairs in results.items():
        if row.goal == goal:
            yield _rate(row, pairs)


def _rate(row: Row, pairs: list[Round]) -> Figure:
    ours, c = (statistics.median(outcome.rate for outcome in side) for side in zip(*pairs, strict=True))
    ratio = statistics.median(ours.rate / theirs.rate for ours, theirs in pairs)
    return Figure(f"{row.name}, bulk {SIZE} B", {row.unit: ratio}, f"{ours:,.0f} per s, C {c:,.0f}")


def latency_figures(results: Mapping[Row, list[Round]]) -> Iterator[Figure]:
    """How long round trips took, in us."""
    for row, pairs in results.items():
        for at, name in enumerate(("50th", "99th", "worst"), 1):
            ours, c = (statistics.median(outcome[at] for outcome in side) for side in zip(*pairs, strict=True))
            ratio = statistics.median(ours[at] / theirs[at] for ours, theirs in pairs)
            yield Figure(f"{row.name}, {name}", {row.unit: ratio}, f"{ours:,.0f} us, C {c:,.0f}")


def main() -> int:
    """Measure and print a table; the exit code is 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds; medians are shown (default 5)")
    parser.add_argument("--seconds", type=float, default=0.5, help="seconds of each measurement (default 0.5)")
    arguments = parser.parse_args()
    print(interpreter())
    results = compare(arguments.rounds, arguments.seconds)
    rates = [_rate(row, pairs) for row, pairs in results.items()]
    for figure in (*rates, *latency_figures(results)):
        ((unit, ratio),) = figure.values.items()
        print(f"{figure.case:42} {figure.text:32} {ratio:.2f} {unit}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
