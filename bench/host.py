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
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

SOURCES = Path(__file__).resolve().parents[2] / "shared" / "vusb"
SIZES = (512, 16 * 1024, 64 * 1024, 1024 * 1024)


class Test(NamedTuple):
    """One row: what guestbench does. The rates are those that are asked for, times C's; None: nothing asked."""

    name: str
    size: int
    depth: int
    least_rate: float | None = None
    most_cpu: float | None = None
    interrupt_period: int = 1000

    def __str__(self) -> str:
        free = ", free-running" if not self.interrupt_period else ""
        return f"{self.name} {self.size} B x {self.depth}{free}"


def _bulk(name: str, size: int, depth: int) -> Test:
    if size >= 16 * 1024:
        return Test(name, size, depth, 1.0, 1.5)
    return Test(name, size, depth, 0.8 if depth == 1 else 0.6, 2.0)


TESTS = (
    *(_bulk(name, size, depth) for name in ("bulkin", "bulkout") for size in SIZES for depth in (1, 16)),
    Test("control", 8, 1, 0.8, 2.0),
    Test("control", 8, 16, 0.6, 2.0),
    Test("bulkrecv", 512, 16, 0.6, 2.0),
    Test("bulkrecv", 16 * 1024, 16),
    Test("isoin", 8, 8),
    Test("interrupt", 8, 5),
    Test("interrupt", 8, 5, interrupt_period=0),
)


class Outcome(NamedTuple):
    """Transfers per second, and the host's CPU time per transfer in microseconds."""

    rate: float
    cpu: float


class Bed:
    """The bus and the measuring guest, built from ../shared/vusb into *directory*."""

    def __init__(self, directory: Path) -> None:
        self.preload = directory / "libvusbfs.so"
        self.guest = directory / "guestbench"
        compiler = ["cc", "-O2"]
        bus = [str(SOURCES / name) for name in ("usbfs_preload.c", "vdev.c")]
        libraries = ["-ldl", "-lpthread"]
        subprocess.run([*compiler, "-fPIC", "-shared", "-o", str(self.preload), *bus, *libraries], check=True)
        subprocess.run([*compiler, "-o", str(self.guest), str(SOURCES / "guestbench.c")], check=True)

    def ours(self, python: str) -> list[str]:
        """The command of our host, with {port} for the port."""
        return ["env", f"LD_PRELOAD={self.preload}", python, "-m", "usbredir", "export", *ARGUMENTS]

    def peer(self, root: Path) -> list[str]:
        """The command of the C host in a Debian tree, on the same bus and the same libusb."""
        import libusb_package

        inside = root / "opt" / "usbredir-bench"
        inside.mkdir(parents=True, exist_ok=True)
        shutil.copy(self.preload, inside)
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
        before = _cpu_seconds(host.pid)
        guest = [str(bed.guest), "127.0.0.1", str(port), test.name, str(test.size), str(test.depth), str(seconds)]
        done = subprocess.run(guest, capture_output=True, text=True, timeout=60 + seconds, check=False)
        used = _cpu_seconds(host.pid) - before
    finally:
        host.send_signal(signal.SIGKILL)
        host.wait()
    match = re.search(r"([\d.]+) transfers/s", done.stdout)
    if match is None:
        raise RuntimeError(f"{test}: {done.stdout}{done.stderr}")
    rate = float(match[1])
    return Outcome(rate, used / (rate * seconds) * 1e6)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_ready(host: subprocess.Popen[bytes]) -> None:
    """Until it has done what it does at its start: its CPU time stands still. A connection would use its only guest."""
    before, still = -1.0, 0
    while still < 5 and host.poll() is None:
        time.sleep(0.05)
        now = _cpu_seconds(host.pid)
        still = still + 1 if now == before else 0
        before = now


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def compare(
    bed: Bed, ours: Sequence[str], peer: Sequence[str] | None, test: Test, rounds: int, seconds: float
) -> tuple[Outcome, Outcome | None]:
    """Medians of interleaved rounds."""
    outcomes: dict[bool, list[Outcome]] = {True: [], False: []}
    for number in range(rounds):
        for mine in (True, False) if number % 2 else (False, True):
            command = ours if mine else peer
            if command is not None:
                outcomes[mine].append(measure(bed, command, test, seconds))
    return _median(outcomes[True]), _median(outcomes[False]) if peer is not None else None


def _median(outcomes: Sequence[Outcome]) -> Outcome:
    rates, cpus = zip(*outcomes, strict=True)
    return Outcome(statistics.median(rates), statistics.median(cpus))


def row(test: Test, mine: Outcome, peer: Outcome | None) -> str:
    """A row of the table in docs/performance.md."""
    share = f"{mine.rate * mine.cpu / 1e4:.0f} %"
    cells = [str(test), f"{mine.rate:,.0f}", f"{mine.cpu:.1f}", share]
    if peer is not None:
        rate, cpu = mine.rate / peer.rate, mine.cpu / max(peer.cpu, 1e-9)
        asked = ""
        if test.least_rate is not None and test.most_cpu is not None:
            met = rate >= test.least_rate and cpu <= test.most_cpu
            asked = f"{test.least_rate:g} / {test.most_cpu:g}{'' if met else ' (not met)'}"
        cells += [f"{peer.rate:,.0f}", f"{peer.cpu:.1f}", f"{rate:.2f}", f"{cpu:.2f}", asked]
    return "| " + " | ".join(cells) + " |"


def main() -> int:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer-root", type=Path, help="a Debian tree with usbredirect 0.15; needs root, for chroot")
    parser.add_argument("--python", default=sys.executable, help="the interpreter that runs our host")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.7)
    parser.add_argument("--only", default="", help="a part of the row's name")
    arguments = parser.parse_args()
    head = ["transfers", "per s", "us CPU each", "of a core"]
    if arguments.peer_root is not None:
        head += ["C per s", "C us CPU", "rate / C", "CPU / C", "asked"]
    with tempfile.TemporaryDirectory() as directory:
        bed = Bed(Path(directory))
        peer = None if arguments.peer_root is None else bed.peer(arguments.peer_root)
        print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
        for test in TESTS:
            if arguments.only in str(test):
                results = compare(bed, bed.ours(arguments.python), peer, test, arguments.rounds, arguments.seconds)
                print(row(test, *results), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
