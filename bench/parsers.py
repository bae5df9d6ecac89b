"""The bench of parsers in ``../shared/perf``: usbredir, C and ctypes side by side. Run as it is; its JSON is read."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from goals import Figure, number
from once import once
from processes import output

__all__ = ["PARSER_ROWS", "Parsers"]

HERE = Path(__file__).parent
OURS = "adapter_usbredir"
OBJECTS = f"{OURS}:objects"
IMPLEMENTATIONS: dict[str, Sequence[str]] = {
    "mem": ("C", "ctypes", OURS),
    "recv": ("C", "ctypes", OURS),
    "send": ("C", "ctypes", OURS, OBJECTS),
    "rtt": ("C", "ctypes", OURS),
    "queue": ("C", OURS, OBJECTS),
    "lock": ("C", OURS, OBJECTS),
    "syscalls": ("C", OURS),
}
SECONDS_PER_ROUND = 60
"""How long a round of a section may take; some 10 are usual."""
SMALL, LARGE = "bulk64", 16384
LOCKS_OFF, LOCKS_ON, FOUR_SENDERS = "no lock, 1 thread", "lock, 1 thread", "lock, 4 senders + 1 writer"
KINDS = {"bulk": "bulk", "intr": "interrupt", "ctrl": "control", "iso": "iso", "mix": "8 kinds mixed"}


class Parsers:
    """Runs sections, each once."""

    def __init__(self, folder: Path, rounds: int, build: Path) -> None:
        self._program = folder / "bench.py"
        self._rounds = rounds
        self._build = build
        self.section = once(self._section)

    def _section(self, name: str) -> Any:
        """The results of one section, as the bench gives them."""
        if not self._program.exists():
            raise RuntimeError(f"{self._program} is not there")
        results = self._build / f"{name}.json"
        rounds = 1 if name == "syscalls" else self._rounds
        options = ["--impl", *IMPLEMENTATIONS[name], "--path", str(HERE), "--rounds", str(rounds)]
        command = [sys.executable, str(self._program), *options, "--sections", name, "--json", str(results)]
        output(command, SECONDS_PER_ROUND * (rounds + 1), {**os.environ, "BENCH_BUILD": str(self._build)})
        return json.loads(results.read_text())

    # ------------------------------------------------------------ rows of the table

    def receive(self, small: bool) -> Iterator[Figure]:
        """Over TCP."""
        for kind, row in self.section("recv")["recv"]["wall"].items():
            if (_size(kind) <= 4096) is small:
                yield _beside(_kind(kind), row, "us")

    def send(self, small: bool | None, way: str) -> Iterator[Figure]:
        """Over TCP, one packet per flush; None: more than one, of any size."""
        for case, row in self.section("send")["send"]["wall"].items():
            kind, _, gathered = case.partition("/")
            if (small is None) if gathered != "1" else (_size(kind) <= 4096) is small:
                yield _beside(f"{_kind(kind)}{f', {gathered} per flush' * (gathered != '1')}", row, "us", way)

    def round_trips(self, depth: str) -> Iterator[Figure]:
        """Of a bulk IN request and its answer."""
        for case, row in self.section("rtt")["rtt"]["wall"].items():
            side, kind, in_flight = case.split("/")
            if in_flight == depth:
                yield _beside(f"parser, {side}, {_kind(kind)}", row, "us")

    def parse(self, small: bool) -> Iterator[Figure]:
        """From memory."""
        for kind, row in self.section("mem")["mem_parse"].items():
            if (_size(kind) <= 512) is small:
                yield _beside(_kind(kind), row, "ns")

    def serialise(self) -> Iterator[Figure]:
        """To memory."""
        for kind, row in self.section("mem")["mem_ser64"].items():
            yield _beside(_kind(kind), row, "ns")

    def queue(self) -> Iterator[Figure]:
        """The cost to queue one packet behind many."""
        for count in (4096, 16384):
            row = self.section("queue")["queue"][f"{SMALL} x {count}"]
            for way, name in WAYS.items():
                ours, c = row[way]["queue_ns"], row["C"]["queue_ns"]
                unit = "x C" if count == 16384 else "x C, shown only"
                yield Figure(f"{count:,} of 64 B, {name}", {unit: c / ours}, f"{number(ours)} ns, C {number(c)}")

    def memory(self) -> Iterator[Figure]:
        """Of a queued packet, by the growth of the process."""
        for way, name in WAYS.items():
            row = self.section("queue")["queue"][f"{SMALL} x 16384"]
            ours, c = (row[one]["rss_per_packet"] for one in (way, "C"))
            yield Figure(f"16,384 of 64 B, {name}", {"x C": ours / c}, f"{number(ours)} bytes, C {number(c)}")

    def locks(self) -> Iterator[Figure]:
        """What locks cost one thread that queues and writes."""
        for way, name in WAYS.items():
            off, on = (self.section("lock")["lock"][case][way]["median"] for case in (LOCKS_OFF, LOCKS_ON))
            yield Figure(
                f"queue and write 64 B, {name}", {"x locks off": on / off}, f"{number(on)} ns, without {number(off)}"
            )

    def senders(self) -> Iterator[Figure]:
        """Four threads that queue, one that writes."""
        for way, name in WAYS.items():
            yield _beside(f"queue and write 64 B, {name}", self.section("lock")["lock"][FOUR_SENDERS], "ns", way)

    def calls(self) -> Iterator[Figure]:
        """Data system calls per packet, as strace counts them."""
        rows = self.section("syscalls").get("syscalls")
        if rows is None:
            raise RuntimeError("strace is not there")
        for case, row in rows.items():
            unit = "calls" if case in ("receive 64 B", "send 64 B, flush per 32") else "calls, shown only"
            yield Figure(case, {unit: row[OURS]}, f"C {number(row['C'])}")


WAYS = {OURS: "`Parser.sender`", OBJECTS: "objects"}

PARSER_ROWS: dict[str, Callable[[Parsers], Iterator[Figure]]] = {
    "receive-small": lambda parsers: parsers.receive(True),
    "receive-large": lambda parsers: parsers.receive(False),
    "send-many": lambda parsers: parsers.send(None, OURS),
    "send-one-small": lambda parsers: parsers.send(True, OURS),
    "send-one-large": lambda parsers: parsers.send(False, OURS),
    "send-many-objects": lambda parsers: parsers.send(None, OBJECTS),
    "send-one-small-objects": lambda parsers: parsers.send(True, OBJECTS),
    "send-one-large-objects": lambda parsers: parsers.send(False, OBJECTS),
    "parse-small": lambda parsers: parsers.parse(True),
    "parse-large": lambda parsers: parsers.parse(False),
    "serialise": Parsers.serialise,
    "queue": Parsers.queue,
    "locks-one": Parsers.locks,
    "locks-many": Parsers.senders,
    "calls": Parsers.calls,
    "memory": Parsers.memory,
}
"""By key of the table's rows."""


def _beside(case: str, row: dict[str, Any], unit: str, way: str = OURS) -> Figure:
    """Our time and the others', and the medians of the rounds' ratios."""
    ours = row[way]
    others = "".join(f", {name} {number(row[name]['median'])}" for name in ("C", "ctypes") if name in row)
    units = (("vs_c", "x C"), ("vs_ctypes", "x ctypes"))
    ratios = {name: ours[key] for key, name in units if key in ours}
    return Figure(case, ratios, f"{number(ours['median'])} {unit} ±{ours['spread'] / 2:.0%}{others}")


def _split(kind: str) -> tuple[str, int]:
    """Transfer and bytes of a kind such as ``bulk64k``; the packets of the mix have up to 4 KiB."""
    found = re.fullmatch(r"([a-z]+)(\d+)([km]?)", kind)
    if found is None:
        return kind, 4096
    return found[1], int(found[2]) << {"": 0, "k": 10, "m": 20}[found[3]]


def _size(kind: str) -> int:
    return _split(kind)[1]


def _kind(kind: str) -> str:
    """For people: ``bulk 64 KiB``."""
    name, size = _split(kind)
    if name == kind:
        return KINDS[kind]
    number, unit = next((size >> bits, unit) for bits, unit in ((20, "MiB"), (10, "KiB"), (0, "B")) if size >> bits)
    return f"{KINDS[name]} {number} {unit}"
