"""Round trips of the asyncio guest over loopback TCP, beside the blocking guest: ``bench/aio.py``. See README.md."""

from __future__ import annotations

import argparse
import asyncio
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable

from usbredir import aio, requests
from usbredir.guest import Guest
from usbredir.transport import GuestConnection, connect

SIZE = 512
ENDPOINT = 0x82
DEPTHS = (1, 16)
MOST = 1.5
"""Time of a round trip that is allowed, times the blocking guest's."""
EXPORT = ["-m", "usbredir", "export", "--virtual", "loopback", "--as", "127.0.0.1:0"]


def blocking(address: str, depth: int, seconds: float) -> float:
    """Round trips per second of blocking calls, or of futures where several are in flight."""
    with connect(address) as connection, Guest(GuestConnection(connection)) as guest:
        guest.wait_for_device(10)
        ask = ask_one if depth == 1 else ask_futures
        ask(guest, depth, seconds / 10)
        return ask(guest, depth, seconds)


def ask_one(guest: Guest, depth: int, seconds: float) -> float:
    count, start = 0, time.perf_counter()
    while (spent := time.perf_counter() - start) < seconds:
        for _ in range(20):
            assert len(guest.bulk_in(ENDPOINT, SIZE).data) == SIZE
        count += 20
    return count / spent


def ask_futures(guest: Guest, depth: int, seconds: float) -> float:
    flying = deque(guest.submit(requests.bulk_in(ENDPOINT, SIZE)) for _ in range(depth))
    count, start = 0, time.perf_counter()
    while (spent := time.perf_counter() - start) < seconds:
        for _ in range(20):
            assert len(flying.popleft().result().data) == SIZE
            flying.append(guest.submit(requests.bulk_in(ENDPOINT, SIZE)))
        count += 20
    for future in flying:
        future.result()
    return count / spent


def awaiting(address: str, depth: int, seconds: float) -> float:
    """The same of as many tasks, each of which waits for its own."""

    async def measure() -> float:
        async with aio.connect(address) as guest:
            await guest.wait_for_device(10)
            await ask_tasks(guest, depth, seconds / 10)
            return await ask_tasks(guest, depth, seconds)

    return asyncio.run(measure())


async def ask_tasks(guest: aio.Guest, depth: int, seconds: float) -> float:
    start = time.perf_counter()

    async def ask() -> int:
        count = 0
        while time.perf_counter() - start < seconds:
            for _ in range(20):
                assert len((await guest.bulk_in(ENDPOINT, SIZE)).data) == SIZE
            count += 20
        return count

    counts = await asyncio.gather(*[ask() for _ in range(depth)])
    return sum(counts) / (time.perf_counter() - start)


def main() -> int:
    """Measure and print a table; the exit code is 1 when a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds; medians are shown (default 5)")
    parser.add_argument("--seconds", type=float, default=0.5, help="seconds of each measurement (default 0.5)")
    arguments = parser.parse_args()
    missed = 0
    with subprocess.Popen([sys.executable, *EXPORT], stderr=subprocess.PIPE, text=True) as host:
        assert host.stderr is not None
        try:
            address = host.stderr.readline().split()[-1]  # "usbredir: listening on 127.0.0.1:40001"
            for depth in DEPTHS:
                missed += show(depth, *rounds(arguments.rounds, address, depth, arguments.seconds))
        finally:
            host.kill()
    return int(missed > 0)


def rounds(count: int, address: str, depth: int, seconds: float) -> tuple[list[float], list[float]]:
    ours: list[float] = []
    theirs: list[float] = []
    measures: list[tuple[list[float], Callable[[str, int, float], float]]] = [(theirs, blocking), (ours, awaiting)]
    for _ in range(count):
        for values, measure in measures:
            values.append(measure(address, depth, seconds))
    return ours, theirs


def show(depth: int, ours: list[float], theirs: list[float]) -> bool:
    ratio = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
    print(
        f"{depth:2} in flight: asyncio {statistics.median(ours):9,.0f} /s, blocking {statistics.median(theirs):9,.0f} "
        f"/s, {ratio:.2f} of its time (at most {MOST})"
    )
    return ratio > MOST


if __name__ == "__main__":
    raise SystemExit(main())
