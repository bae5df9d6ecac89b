"""A whole host over the virtual USB bus, beside usbredirect: ``bench/host.py --peer-root DIR``. See README.md."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from goals import Figure, limit
from machine import cpu_seconds, interpreter
from processes import compiled, output

__all__ = ["HOST_ROWS", "SOURCES", "TESTS", "Bed", "Outcome", "Pairs", "Test", "compare"]

SOURCES = Path(__file__).resolve().parents[2] / "shared" / "vusb"
SIZES = (512, 16 * 1024, 64 * 1024, 1024 * 1024)
LARGE = 16 * 1024
"""From here on a transfer is a large one."""
GUEST_LIMIT = 30.0
"""Seconds that the measuring guest may take in addition to those it measures."""


class Test(NamedTuple):
    """What guestbench does. *goal*: the row of the goals that its rate belongs to; "": it is only shown."""

    name: str
    size: int
    depth: int
    goal: str = ""
    interrupt_period: int = 1000

    def __str__(self) -> str:
        free = ", free-running" if not self.interrupt_period else ""
        return f"{self.name} {self.size} B x {self.depth}{free}"

    @property
    def cpu_goal(self) -> str:
        """The row of the goals that its CPU time belongs to."""
        return ("host-cpu-large" if self.size >= LARGE else "host-cpu-small") if self.goal else ""


TESTS = (
    *(
        Test(name, size, depth, f"host-{depth}")
        for name in ("bulkin", "bulkout")
        for size in SIZES
        for depth in (1, 16)
    ),
    *(Test("control", 8, depth, f"host-{depth}") for depth in (1, 16)),
    *(Test("bulkrecv", size, 16, "host-16") for size in SIZES),
    Test("isoin", 8, 8),
    Test("interrupt", 8, 5),
    Test("interrupt", 8, 5, interrupt_period=0),
)


class Outcome(NamedTuple):
    """Transfers per second, and the host's CPU time per transfer in microseconds."""

    rate: float
    cpu: float


Pairs = Sequence[tuple[Outcome, "Outcome | None"]]
"""Rounds: our outcome and that of C, if there is one."""


class Bed:
    """The bus and the measuring guest, and how hosts are started on it."""

    def __init__(self, preload: Path, guest: Path) -> None:
        self._preload = preload
        self.guest = guest

    @classmethod
    @contextmanager
    def up(cls, sources: Path) -> Iterator[Bed]:
        """Compile into a temporary directory. Raises RuntimeError."""
        if not sources.is_dir():
            raise RuntimeError(f"{sources} is not there")
        with tempfile.TemporaryDirectory() as folder:
            bus = (sources / "usbfs_preload.c", sources / "vdev.c")
            preload = compiled(Path(folder, "libvusbfs.so"), *bus, flags=["-fPIC", "-shared"])
            yield cls(preload, compiled(Path(folder, "guestbench"), sources / "guestbench.c"))

    def ours(self, python: str) -> list[str]:
        """The command of our host, with {port} for the port."""
        return ["env", f"LD_PRELOAD={self._preload}", python, "-m", "usbredir", "export", *ARGUMENTS]

    def peer(self, root: Path) -> list[str]:
        """The command of the C host in a Debian tree, on the same bus and the same libusb. Raises RuntimeError."""
        import libusb_package

        if os.geteuid() or not (root / "usr/bin/usbredirect").exists():
            raise RuntimeError(f"no usbredirect in {root}, or not root, which chroot takes")
        inside = root / "opt" / "usbredir-bench"
        inside.mkdir(parents=True, exist_ok=True)
        shutil.copy(self._preload, inside)
        shutil.copy(str(libusb_package.get_library_path()), inside / "libusb-1.0.so.0")
        where = "/opt/usbredir-bench"
        env = ["env", f"LD_PRELOAD={where}/libvusbfs.so", f"LD_LIBRARY_PATH={where}"]
        return ["chroot", str(root), *env, "usbredirect", *ARGUMENTS]


ARGUMENTS = ["--device", "1209:0001", "--as", "127.0.0.1:{port}"]


def measure(bed: Bed, command: Sequence[str], test: Test, seconds: float) -> Outcome:
    """Start a host, let the guest do *test*, and read the host's CPU time before and after."""
    port = _free_port()
    env = {**os.environ, "VUSB_INT_PERIOD_US": str(test.interrupt_period)}
    arguments = [part.replace("{port}", str(port)) for part in command]
    host = subprocess.Popen(arguments, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_until_ready(host)
        before = cpu_seconds(host.pid)
        guest = [str(bed.guest), "127.0.0.1", str(port), test.name, str(test.size), str(test.depth), str(seconds)]
        written = output(guest, GUEST_LIMIT + seconds)
        used = cpu_seconds(host.pid) - before
    finally:
        host.send_signal(signal.SIGKILL)
        host.wait()
    match = re.search(r"([\d.]+) transfers/s", written)
    if match is None:
        raise RuntimeError(f"{test}: {written}")
    rate = float(match[1])
    return Outcome(rate, used / (rate * seconds) * 1e6)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_ready(host: subprocess.Popen[bytes]) -> None:
    """Until it has done what it does at its start: its CPU time stands still. A connection would use its only guest."""
    before, still, end = -1.0, 0, time.monotonic() + GUEST_LIMIT
    while still < 5 and host.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
        now = cpu_seconds(host.pid)
        still = still + 1 if now == before else 0
        before = now


def compare(
    bed: Bed, ours: Sequence[str], peer: Sequence[str] | None, test: Test, rounds: int, seconds: float
) -> Pairs:
    """Interleaved rounds of one test. Raises RuntimeError."""
    pairs = []
    for turn in range(rounds):
        first = measure(bed, peer, test, seconds) if peer is not None and turn % 2 else None
        mine = measure(bed, ours, test, seconds)
        pairs.append((mine, measure(bed, peer, test, seconds) if peer is not None and first is None else first))
    return pairs


# ---------------------------------------------------------------- what is shown


def _column(pairs: Pairs, figure: Callable[[Outcome], float]) -> tuple[float, float | None, float | None]:
    """Medians of ours, of C's, and of the rounds' ratios."""
    both = [(figure(mine), figure(peer)) for mine, peer in pairs if peer is not None]
    ours = statistics.median(figure(mine) for mine, _ in pairs)
    if not both:
        return ours, None, None
    ratio = statistics.median(mine / max(peer, 1e-9) for mine, peer in both)
    return ours, statistics.median(peer for _, peer in both), ratio


def _rate(test: Test, pairs: Pairs) -> Figure:
    ours, c, ratio = _column(pairs, lambda outcome: outcome.rate)
    return _figure(test, f"{ours:,.0f} per s", "" if c is None else f"{c:,.0f}", ratio)


def _cpu(test: Test, pairs: Pairs) -> Figure:
    ours, c, ratio = _column(pairs, lambda outcome: outcome.cpu)
    return _figure(test, f"{ours:.1f} us", "" if c is None else f"{c:.1f}", ratio)


def _figure(test: Test, ours: str, c: str, ratio: float | None) -> Figure:
    return Figure(str(test), {} if ratio is None else {"x C": ratio}, f"{ours}{f', C {c}' * bool(c)}")


def _rates(results: Mapping[Test, Pairs], goal: str) -> Iterator[Figure]:
    return (_rate(test, pairs) for test, pairs in results.items() if test.goal == goal)


def _cpus(results: Mapping[Test, Pairs], goal: str) -> Iterator[Figure]:
    return (_cpu(test, pairs) for test, pairs in results.items() if test.cpu_goal == goal)


HOST_ROWS: dict[str, Callable[[Mapping[Test, Pairs], str], Iterator[Figure]]] = {
    "host-16": _rates,
    "host-1": _rates,
    "host-cpu-large": _cpus,
    "host-cpu-small": _cpus,
}
"""By key of the table's rows."""


def line(test: Test, pairs: Pairs) -> str:
    """A line of a table."""
    cells = [str(test)]
    for goal, figure in ((test.goal, _rate(test, pairs)), (test.cpu_goal, _cpu(test, pairs))):
        ratio = figure.values.get("x C")
        asked = f", {limit(goal, 'x C')}" if goal and ratio is not None else ""
        missed = " (not met)" if asked and ratio is not None and not limit(goal, "x C").met(ratio) else ""
        cells += [figure.text, "" if ratio is None else f"{ratio:.2f}{asked}{missed}"]
    return f"| {' | '.join(cells)} |"


def main() -> int:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer-root", type=Path, help="a Debian tree with usbredirect 0.15; needs root, for chroot")
    parser.add_argument("--vusb", type=Path, default=SOURCES, help="the virtual bus (default ../shared/vusb)")
    parser.add_argument("--python", default=sys.executable, help="the interpreter that runs our host")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.7)
    parser.add_argument("--only", default="", help="a part of the row's name")
    arguments = parser.parse_args()
    print(interpreter())
    with Bed.up(arguments.vusb) as bed:
        peer = None if arguments.peer_root is None else bed.peer(arguments.peer_root)
        print("| transfers | rate | x C | CPU each | x C |\n|---|---|---|---|---|")
        for test in TESTS:
            if arguments.only in str(test):
                pairs = compare(bed, bed.ours(arguments.python), peer, test, arguments.rounds, arguments.seconds)
                print(line(test, pairs), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
