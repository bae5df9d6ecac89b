"""A disk of ours in a Linux guest in QEMU, beside QEMU's own ``usb-storage``: ``bench/qemu.py``. See README.md."""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from goals import Figure, number
from machine import cpu_seconds
from processes import compiled, running

from usbredir.testing.qemu import BuildError, GuestError, Plugged, QemuGuest, missing_tools

__all__ = ["compare", "disk_figures"]

SOURCE = Path(__file__).with_name("cdisk.c")
IMAGE = 64 << 20
SECONDS = 0.7
"""Of one measurement."""
LIMIT = 30.0
"""Seconds for what a measurement does, at most."""
STORAGE_PORT = 8
"""Where QEMU's own disk is: the last of the ports, of which ours take the first."""
SPEEDS = ("super", "high")
"""QEMU's own disk is a super-speed device; ours are high-speed ones unless told otherwise."""


class Access(NamedTuple):
    """What is done with a disk."""

    name: str
    how: str
    size: int


ACCESSES = (
    Access("read 1 MiB", "read", 1 << 20),
    Access("write 1 MiB", "write", 1 << 20),
    Access("random read 4 KiB", "random", 4096),
)


class Outcome(NamedTuple):
    """Microseconds per request: wall clock, and CPU time: QEMU's, of its main loop alone, and the exporter's."""

    wall: float
    qemu: float
    loop: float
    exporter: float


class Disk(NamedTuple):
    """A disk in the guest. *exporter*: the process that has it; None: QEMU itself."""

    node: str
    exporter: int | None


Results = Mapping[Access, Mapping[str, list[Outcome]]]
"""Rounds, by access and disk."""


@contextmanager
def _exported(image: Path, speed: str) -> Iterator[tuple[str, int]]:
    """Our exporter: where it listens, and its process."""
    command = [sys.executable, "-m", "usbredir", "export", "--virtual", f"disk:{image}", "--speed", speed]
    with running([*command, "--as", "127.0.0.1:0"], errors=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()  # "usbredir: listening on 127.0.0.1:40001"
        if "listening on" not in line:
            raise RuntimeError(f"the exporter does not listen: {line.strip()}")
        yield line.split()[-1], process.pid


def _own_disk(guest: QemuGuest, image: Path) -> Disk:
    """QEMU's own, on the same image."""
    guest.qmp("blockdev-add", driver="raw", **{"node-name": "own"}, file={"driver": "file", "filename": str(image)})
    guest.qmp("device_add", driver="usb-storage", id="own", drive="own", bus="xhci.0", port=str(STORAGE_PORT))
    plugged = Plugged("own", "xhci", STORAGE_PORT, "", None)
    guest.wait_for_device(plugged)
    return Disk(guest.node(plugged, "sd?"), None)


def _disks(guest: QemuGuest, image: Path, stack: ExitStack) -> dict[str, Disk]:
    disks = {"own": _own_disk(guest, image)}
    for speed in SPEEDS:
        address, pid = stack.enter_context(_exported(image, speed))
        plugged = guest.plug_address(address)
        disks[speed] = Disk(guest.node(plugged, "sd?"), pid)
    return disks


def _measure(guest: QemuGuest, qemu: int, disk: Disk, access: Access) -> Outcome:
    before = _cpu_times(qemu, disk)
    answer = guest.run(f"/tmp/cdisk {access.how} {disk.node} {access.size} {SECONDS}", timeout=LIMIT)
    used = (now - then for now, then in zip(_cpu_times(qemu, disk), before, strict=True))
    count, spent = answer.split()
    return Outcome(*(seconds / int(count) * 1e6 for seconds in (float(spent), *used)))


def _cpu_times(qemu: int, disk: Disk) -> tuple[float, float, float]:
    exporter = 0.0 if disk.exporter is None else cpu_seconds(disk.exporter)
    return cpu_seconds(qemu), cpu_seconds(qemu, main_thread=True), exporter


def compare(rounds: int) -> Results:
    """Interleaved rounds in one guest. Raises RuntimeError."""
    missing = missing_tools()
    if missing:
        raise RuntimeError(f"missing for QEMU's guest: {', '.join(missing)}")
    try:
        return _compared(rounds)
    except (GuestError, BuildError) as error:
        raise RuntimeError(f"QEMU: {error}") from error


def _compared(rounds: int) -> Results:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        program = compiled(folder / "cdisk", SOURCE, flags=["-static"])
        image, pid = folder / "disk.img", folder / "pid"
        image.write_bytes(bytes(range(256)) * (IMAGE // 256))
        guest = stack.enter_context(QemuGuest(options=["-pidfile", str(pid)]))
        guest.write_file("/tmp/cdisk", program.read_bytes())
        guest.run("chmod +x /tmp/cdisk")
        disks = _disks(guest, image, stack)
        results: dict[Access, dict[str, list[Outcome]]] = {access: {name: [] for name in disks} for access in ACCESSES}
        for _ in range(rounds):
            for access, by_disk in results.items():
                for name, outcomes in by_disk.items():
                    outcomes.append(_measure(guest, int(pid.read_text()), disks[name], access))
        return results


def disk_figures(rounds: int) -> Iterator[Figure]:
    """Times of our disks, and of that what QEMU computes, which no exporter can save. Raises RuntimeError."""
    for access, by_disk in compare(rounds).items():
        for speed in SPEEDS:
            pairs = list(zip(by_disk[speed], by_disk["own"], strict=True))
            times = statistics.median(ours.wall / own.wall for ours, own in pairs)
            floor = statistics.median(ours.qemu / own.wall for ours, own in pairs)
            text = f"{_told(by_disk[speed])}; `usb-storage` {_told(by_disk['own'])}"
            yield Figure(f"{access.name}, {speed} speed", {"times": times, "QEMU's own CPU time": floor}, text)


def _told(outcomes: list[Outcome]) -> str:
    middle = Outcome(*map(statistics.median, zip(*outcomes, strict=True)))
    exporter = f", exporter {number(middle.exporter)}" if middle.exporter else ""
    return f"{number(middle.wall)} us (CPU: QEMU {number(middle.qemu)}, its main loop {number(middle.loop)}{exporter})"


def main() -> int:
    """Measure and print; the exit code is 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    for figure in disk_figures(parser.parse_args().rounds):
        values = ", ".join(f"{value:.2f} {unit}" for unit, value in figure.values.items())
        print(f"{figure.case:32} {values}: {figure.text}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
