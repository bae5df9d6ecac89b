"""Compare usbredir with the C library through ctypes: ``python bench/run.py``. See README.md."""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from counted import DEPTHS, Count, counts, queue_cost
from ctypes_peer import CtypesEnd, load
from endpoints import UsbredirEnd
from goals import Limit, at_least, at_most, limit
from machine import interpreter, machine
from timed import (
    PER_FLUSH,
    CReceiver,
    Implementation,
    PlainSocket,
    Row,
    library_connection,
    memory_rows,
    run_rounds,
    tcp_rows,
)
from wire import KINDS

SECTIONS = ("memory", "tcp", "counts")


@dataclass
class Results:
    """All that was measured."""

    rows: list[Row] = field(default_factory=list)
    counts: list[Count] = field(default_factory=list)
    queue: dict[str, dict[int, float]] = field(default_factory=dict)


class Goal(NamedTuple):
    """What was measured, and what it may be."""

    text: str
    value: float
    limit: Limit

    @property
    def met(self) -> bool:
        """Whether the goal is met."""
        return self.limit.met(self.value)

    def __str__(self) -> str:
        return f"{'ok  ' if self.met else 'FAIL'}  {self.text}: {self.value:.3g}, goal {self.limit}"


def measure(arguments: argparse.Namespace, stack: ExitStack) -> Results:
    """Run the chosen sections."""
    results = Results()
    implementations = [Implementation("usbredir", UsbredirEnd, library_connection)]
    library = load()
    if library is not None:
        implementations.append(Implementation("ctypes", partial(CtypesEnd, library), PlainSocket))
    c_receiver = stack.enter_context(CReceiver.compiled()) if arguments.c else None
    if "memory" in arguments.only:
        rows = stack.enter_context(memory_rows(implementations, 8 if arguments.quick else 25))
        run_rounds(rows, arguments.rounds)
        results.rows += rows
    if "tcp" in arguments.only:
        with tcp_rows(implementations, c_receiver, 0.3 if arguments.quick else 1) as rows:
            run_rounds(rows, arguments.rounds)
            results.rows += rows
    if "counts" in arguments.only:
        results.counts = counts(implementations)
        for implementation in implementations:
            # The C library walks its queue for each packet: a long one would take minutes.
            depths = DEPTHS if implementation.name == "usbredir" else DEPTHS[:4]
            results.queue[implementation.name] = queue_cost(implementation, depths)
    return results


# ---------------------------------------------------------------- goals


PARSE_SMALL = at_least(6)
"""Parsing of up to 512 B, times as fast as ctypes. 8 is the goal; 8.3 to 14 is reached, on a busy machine as well."""
PARSE_MEDIUM, SEND_EACH, SEND_MANY = at_least(3), at_least(1.1), at_least(1.3)
"""Of 4 KiB; with a packet object made for each, as users do. These only catch a step backwards."""
C_QUEUED_BYTES = 144
"""Of a 64 B packet in the C library's queue. Source: ../shared/PERFORMANCE.md, 9."""
SMALL_WRITE, LARGE_WRITE = 64 * 1024, 1024 * 1024
"""Up to here the packets of a flush are one buffer; from here on they may be several writes."""


def goals(results: Results) -> Iterator[Goal]:
    """The goals that a busy machine does not blur: ratios within one process, and counts."""
    for row in results.rows:
        ratio, wanted = row.ratio("ctypes"), _times_ctypes(row)
        if ratio is not None and wanted is not None:
            text = f"{row.section} {row.kind.name}{', ' * bool(row.case)}{row.case}, times as fast as ctypes"
            yield Goal(text, ratio, wanted)
    if results.queue:
        costs = results.queue["usbredir"].values()
        yield Goal("queue: dearest depth over the cheapest", max(costs) / min(costs), limit("flatness", "times"))
    limits = _count_limits()
    for count in results.counts:
        if count.key in limits:
            yield Goal(count.text, count.value, limits[count.key])


def _times_ctypes(row: Row) -> Limit | None:
    if row.section == "send":
        return SEND_EACH if row.case == "flush each" else SEND_MANY
    if row.section == "parse" and row.kind.size <= 4096:
        return PARSE_MEDIUM if row.kind.size == 4096 else PARSE_SMALL
    return None


def _count_limits() -> dict[str, Limit]:
    """By key of the count."""
    calls, memory = limit("calls", "calls"), limit("memory", "x C")
    limits = {
        "receive_calls": calls,
        "send_calls": calls,
        "queued_bytes": at_most(memory.value * C_QUEUED_BYTES),
        "queued_blocks": at_most(1.1),
        "receive_copies": at_most(1.1),
        "receive_copies_pieces": at_most(1.1),
        "send_copies": at_most(0.1),
    }
    for kind in KINDS:
        flush = kind.size * PER_FLUSH
        limits[f"write_calls {kind.name}"] = at_most(max(1, flush // LARGE_WRITE))
        limits[f"buffers {kind.name}"] = at_most(1 if flush < SMALL_WRITE else 2 * PER_FLUSH)
    return limits


# ---------------------------------------------------------------- output


def show(results: Results) -> None:
    """Print the tables."""
    for section in dict.fromkeys(row.section for row in results.rows):
        rows = [row for row in results.rows if row.section == section]
        names = [name for name in ("usbredir", "ctypes", "C") if name in rows[0].values]
        heads = [*(f"{name}, us" for name in names), *(f"x {name}" for name in names[1:])]
        clock = "wall clock" if section.startswith("TCP") else "in memory, CPU time"
        print(f"\n{section}: us per packet, {clock}; 'x ctypes': times as fast as that")
        print(f"  {'':31}" + "".join(f"{head:>17}" for head in heads))
        for row in rows:
            cells = [f"{row.median(name) / 1000:.3f} ±{row.spread(name):3.0%}" for name in names]
            cells += [f"{row.ratio(name):.2f}" for name in names[1:]]
            print(f"  {row.case:16}{row.kind.name:15}" + "".join(f"{cell:>17}" for cell in cells))
    if results.counts:
        print(f"\ncounted{'':50}{'usbredir':>12}{'ctypes':>12}")
        for count in results.counts:
            other = "" if count.other is None else f"{count.other:.4g}"
            print(f"  {count.text:55}{count.value:>12.4g}{other:>12}")
    if results.queue:
        print("\nqueue: us to queue and write one 64 B packet, by packets queued")
        print(f"  {'':20}" + "".join(f"{depth:>10}" for depth in DEPTHS))
        for name, costs in results.queue.items():
            print(f"  {name:20}" + "".join(f"{costs[depth] / 1000:>10.3f}" for depth in DEPTHS if depth in costs))


def as_json(results: Results, where: dict[str, Any]) -> dict[str, Any]:
    """Everything, for programs."""
    return {
        "machine": where,
        "rows": [
            {
                "section": row.section,
                "case": row.case,
                "kind": row.kind.name,
                "ns": {name: round(row.median(name), 1) for name in row.values},
                "rounds": {name: [round(v, 1) for v in values] for name, values in row.values.items()},
                "ratio": {name: round(row.ratio(name) or 0, 3) for name in row.values if name != "usbredir"},
            }
            for row in results.rows
        ],
        "counts": {count.key: {"usbredir": count.value, "ctypes": count.other} for count in results.counts},
        "queue": results.queue,
        "goals": [{"text": goal.text, "value": goal.value, "met": goal.met} for goal in goals(results)],
    }


def main() -> int:
    """The command. Exit codes: 0 done, 1 a goal failed, 2 goals or the C peer cannot be measured here."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, help="rounds (default 5; 3 with --quick)")
    parser.add_argument("--quick", action="store_true", help="shorter runs")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, help="only these sections")
    parser.add_argument("--c", action="store_true", help="compile a receiver in C and compare with it, too")
    parser.add_argument("--gate", action="store_true", help="check the goals; exit code 1 if one fails")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there as well")
    arguments = parser.parse_args()
    arguments.rounds = arguments.rounds or (3 if arguments.quick else 5)
    where = machine()
    print(f"{interpreter()}, {where['system']}, {where['processor']}, {where['cores']} cores")
    print(f"{arguments.rounds} rounds, medians; ± half the distance of the quartiles; load {where['load']}")
    begin = time.monotonic()
    gc.freeze()
    with ExitStack() as stack:
        try:
            results = measure(arguments, stack)
        except RuntimeError as error:
            print(f"--c: {error}", file=sys.stderr)
            return 2
    show(results)
    print(f"\n{time.monotonic() - begin:.0f} s")
    if arguments.json:
        arguments.json.write_text(json.dumps(as_json(results, where), indent=1) + "\n")
    if not arguments.gate:
        return 0
    if load() is None:
        print("the goals need libusbredirparser.so.1 (or USBREDIR_LIB)", file=sys.stderr)
        return 2
    checked = list(goals(results))
    print("\ngoals")
    for goal in checked:
        print(f"  {goal}")
    return 0 if all(goal.met for goal in checked) else 1


if __name__ == "__main__":
    sys.exit(main())
