"""Round trips of a guest over loopback TCP, beside a C client: ``bench/guest.py``. See README.md."""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from usbredir import requests
from usbredir.guest import Guest, TransferResult
from usbredir.transport import GuestConnection, connect

SIZE = 512
SOURCE = Path(__file__).with_name("cguest.c")


Ask = Callable[[Guest, int, float], float]


def measure(ask: Ask, port: int, depth: int, seconds: float) -> float:
    """Round trips per second of the product's own calls."""
    with connect(f"127.0.0.1:{port}") as connection, Guest(GuestConnection(connection)) as guest:
        guest.wait_for_device(10)
        ask(guest, depth, seconds / 10)
        return ask(guest, depth, seconds)


def ask_one(guest: Guest, depth: int, seconds: float) -> float:
    count, start = 0, time.perf_counter()
    while (spent := time.perf_counter() - start) < seconds:
        for _ in range(20):
            assert len(guest.bulk_in(0x81, SIZE).data) == SIZE
        count += 20
    return count / spent


def ask_many(guest: Guest, depth: int, seconds: float) -> float:
    def wanted() -> Iterator[requests.Request[TransferResult]]:
        while time.perf_counter() - start < seconds:
            for _ in range(20):
                yield requests.bulk_in(0x81, SIZE)

    count, start = 0, time.perf_counter()
    for result in guest.pipeline(wanted(), depth):
        assert len(result.data) == SIZE
        count += 1
    return count / (time.perf_counter() - start)


def ask_futures(guest: Guest, depth: int, seconds: float) -> float:
    flying = deque(guest.submit(requests.bulk_in(0x81, SIZE)) for _ in range(depth))
    count, start = 0, time.perf_counter()
    while (spent := time.perf_counter() - start) < seconds:
        for _ in range(20):
            assert len(flying.popleft().result().data) == SIZE
            flying.append(guest.submit(requests.bulk_in(0x81, SIZE)))
        count += 20
    for future in flying:
        future.result()
    return count / spent


def c_client(program: Path, port: int, depth: int, seconds: float) -> float:
    """The same of the C client."""
    command = [str(program), "ask", str(port), str(SIZE), str(depth), str(seconds)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


class Row(NamedTuple):
    """What is measured. *goal*: the rate that is asked for, times the C client's."""

    name: str
    ask: Ask
    depth: int
    goal: float


ROWS = (
    Row("a call at a time", ask_one, 1, 0.8),
    Row("pipeline of 16", ask_many, 16, 1.0),
    Row("16 futures", ask_futures, 16, 1.0),
)


def compile_peer(folder: Path) -> Path:
    program = folder / "cguest"
    subprocess.run(["cc", "-O2", "-o", str(program), str(SOURCE), "-lusbredirparser"], check=True)
    return program


def main() -> int:
    """Measure and print a table; the exit code is 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds; medians are shown (default 5)")
    parser.add_argument("--seconds", type=float, default=0.5, help="seconds of each measurement (default 0.5)")
    arguments = parser.parse_args()
    print(f"Python {sys.version.split()[0]}, load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as folder:
        program = compile_peer(Path(folder))
        host = subprocess.Popen([str(program), "serve"], stdout=subprocess.PIPE, text=True)
        assert host.stdout is not None
        try:
            port = int(host.stdout.readline())
            for row in ROWS:
                show(row, program, port, arguments.rounds, arguments.seconds)
        finally:
            host.kill()
            host.communicate()
    return 0


def show(row: Row, program: Path, port: int, rounds: int, seconds: float) -> None:
    pairs = []
    for _ in range(rounds):
        theirs = c_client(program, port, row.depth, seconds)
        pairs.append((measure(row.ask, port, row.depth, seconds), theirs))
    ours, c = (statistics.median(values) for values in zip(*pairs, strict=True))
    ratio = statistics.median(a / b for a, b in pairs)
    print(f"{row.name:16} {ours:9,.0f} /s, C {c:9,.0f} /s, {ratio:.2f} x C (asked for: {row.goal})")


if __name__ == "__main__":
    raise SystemExit(main())
