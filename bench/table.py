"""The table of the project's goals, measured and written to docs/performance.md: ``bench/table.py``. See README.md."""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import re
import signal
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import guest
import host
from counted import queue_cost
from endpoints import UsbredirEnd
from goals import ROWS, Figure, Row, number
from machine import interpreter, machine, peers, use_library_of
from once import once
from parsers import PARSER_ROWS, Parsers
from processes import output
from qemu import disk_figures
from startup import import_times, version_times
from timed import Implementation, library_connection

import usbredir

HERE = Path(__file__).resolve().parent
SHARED = HERE.parents[1] / "shared"
PAGE = HERE.parent / "docs" / "performance.md"
RESULTS = HERE / "results.json"
BEGIN, END = "<!-- table: begin -->\n", "<!-- table: end -->\n"
WIDTH = 160
"""Characters of a line of the page, but in tables."""
SECONDS = 0.4
"""Of one measurement of a host or a guest."""
STEPS_LIMIT = THREADS_LIMIT = 300.0
"""Seconds for a program that measures by itself."""


@dataclass(frozen=True)
class Settings:
    """What the command was told."""

    perf: Path
    vusb: Path
    peer_root: Path | None
    free_threaded: str | None
    rounds: int
    build: Path


# ---------------------------------------------------------------- what is measured


@once
def parsers(settings: Settings) -> Parsers:
    """The bench of parsers."""
    return Parsers(settings.perf, settings.rounds, settings.build)


@once
def guests(settings: Settings) -> Mapping[guest.Row, list[guest.Round]]:
    """The rounds of the guests."""
    return guest.compare(settings.rounds, SECONDS)


@once
def hosts(settings: Settings) -> tuple[dict[host.Test, host.Pairs], list[str]]:
    """The rounds of the tests that a goal is about, and which failed."""
    results: dict[host.Test, host.Pairs] = {}
    failed = []
    with host.Bed.up(settings.vusb) as bed:
        if settings.peer_root is None:
            raise RuntimeError("there is no usbredirect to compare with: --peer-root")
        commands = bed.ours(sys.executable), bed.peer(settings.peer_root)
        for test in host.TESTS:
            try:
                results[test] = host.compare(bed, *commands, test, settings.rounds, SECONDS)
            except RuntimeError as error:
                failed.append(f"{test}: {error}")
    return results, failed


def _host_row(key: str) -> Callable[[Settings], Iterator[Figure]]:
    def figures(settings: Settings) -> Iterator[Figure]:
        results, failed = hosts(settings)
        yield from host.HOST_ROWS[key](results, key)
        for test in failed:
            yield Figure(test, {}, "not measured")

    return figures


def _parser_row(key: str) -> Callable[[Settings], Iterator[Figure]]:
    return lambda settings: PARSER_ROWS[key](parsers(settings))


def _round_trips(depth: int) -> Callable[[Settings], Iterator[Figure]]:
    key = f"round-trip-{depth}"
    return lambda settings: chain(parsers(settings).round_trips(str(depth)), guest.rate_figures(guests(settings), key))


def _flatness(settings: Settings) -> Iterator[Figure]:
    costs = queue_cost(Implementation("usbredir", UsbredirEnd, library_connection))
    text = ", ".join(f"{depth:,}: {number(cost)}" for depth, cost in costs.items())
    yield Figure("queue and write 64 B, ns by depth", {"times": max(costs.values()) / min(costs.values())}, text)


def _free_threaded(settings: Settings) -> Iterator[Figure]:
    if settings.free_threaded is None:
        raise RuntimeError("there is no interpreter without GIL: --free-threaded")
    env = {**os.environ, "PYTHONPATH": str(Path(usbredir.__file__).parents[1])}
    program = [settings.free_threaded, str(HERE / "threads.py"), "--rounds", str(settings.rounds)]
    result = json.loads(output(program, THREADS_LIMIT, env))
    if result["gil"]:
        raise RuntimeError(f"{settings.free_threaded} has a GIL")
    for name, rates in result["rates"].items():
        unit = "x one thread" if name == "a loop without usbredir" else "x one pair"
        text = f"{rates['two']:,} per s, one {rates['one']:,}, CPython {result['python']}"
        yield Figure(name, {unit: rates["ratio"]}, text)


def _floor(settings: Settings) -> Iterator[Figure]:
    """What the bench of parsers says about the interpreter."""
    for name, cost in json.loads(output([sys.executable, str(settings.perf / "floor.py")], STEPS_LIMIT))[
        "steps"
    ].items():
        yield Figure(f"`{name.replace('](', '] (')}`", {"ns": cost})  # which is no link


MEASURES: dict[str, Callable[[Settings], Iterable[Figure]]] = {
    **{key: _parser_row(key) for key in PARSER_ROWS},
    **{key: _host_row(key) for key in host.HOST_ROWS},
    "round-trip-1": _round_trips(1),
    "round-trip-16": _round_trips(16),
    "latency": lambda settings: guest.latency_figures(guests(settings)),
    "flatness": _flatness,
    "qemu": lambda settings: disk_figures(settings.rounds),
    "import": lambda settings: import_times(),
    "version": lambda settings: version_times(),
    "free-threaded": _free_threaded,
    "floor": _floor,
}
"""How each row is measured."""


def measure(row: Row, settings: Settings) -> dict[str, Any]:
    """A row as it is kept: its figures, or why there are none, and where they come from."""
    kept: dict[str, Any] = {"figures": [], "missing": "", "where": _where(settings)}
    try:
        kept["figures"] = [vars(figure) for figure in MEASURES[row.key](settings)]
    except (RuntimeError, OSError) as error:
        kept["missing"] = str(error).strip().splitlines()[0]
    return kept


def _where(settings: Settings) -> str:
    """Date, machine, interpreter and peers, for people."""
    on = machine()
    return (
        f"{datetime.date.today()}, medians of {settings.rounds} rounds; {on['processor']}, {on['cores']} cores, "
        f"{on['system']}; {interpreter()}; beside {peers(settings.peer_root)}"
    )


# ---------------------------------------------------------------- what is shown


Kept = Mapping[str, Mapping[str, Any]]
"""Rows by key, as they are kept."""


def _figures(kept: Mapping[str, Any]) -> list[Figure]:
    return [Figure(**figure) for figure in kept["figures"]]


def summary(row: Row, kept: Mapping[str, Any]) -> Iterator[str]:
    """The row's lines in the table: one for each of its goals."""
    figures = _figures(kept)
    for unit, limit in row.limits.items():
        measured = [figure for figure in figures if unit in figure.values]
        missing = kept["missing"] or next((figure.case for figure in figures if not figure.values), "")
        if not measured:
            cells = f"not measured: {missing}", ""
        else:
            missed = len(row.missed(unit, figures))
            met = "yes" if not missed else f"no: {len(measured) - missed} of {len(measured)}"
            cells = _span(unit, measured), met + " (some not measured)" * bool(missing)
        yield f"| {row.what} | {cells[0]} | {limit} {unit} | {cells[1]} |"


def _span(unit: str, figures: Sequence[Figure]) -> str:
    """The least and the greatest."""
    ordered = sorted(figures, key=lambda figure: figure.values[unit])
    ends = ordered if len(ordered) == 1 else (ordered[0], ordered[-1])
    return " to ".join(f"{number(figure.values[unit])} ({figure.case})" for figure in ends)


def details(row: Row, kept: Mapping[str, Any]) -> Iterator[str]:
    """All that was measured for a row."""
    figures = _figures(kept)
    yield f"### {row.what[0].upper()}{row.what[1:]}\n"
    if kept["missing"]:
        yield _filled(f"Not measured: {kept['missing']}\n")
        return
    units = list(dict.fromkeys(chain(row.limits, *(figure.values for figure in figures))))
    heads = [f"{unit}, {row.limits[unit]}" if unit in row.limits else unit for unit in units]
    texts = ["measured"] * any(figure.text for figure in figures)
    yield f"| case | {' | '.join([*texts, *heads])} |"
    yield f"|---|{'---|' * len([*texts, *heads])}"
    for figure in figures:
        cells = [figure.text] * bool(texts) + [_value(row, unit, figure) for unit in units]
        yield f"| {figure.case} | {' | '.join(cells)} |"
    yield ""


def _value(row: Row, unit: str, figure: Figure) -> str:
    value = figure.values.get(unit)
    if value is None:
        return ""
    missed = unit in row.limits and not row.limits[unit].met(value)
    return f"{number(value)}{' (not met)' * missed}"


def origins(kept: Kept) -> Iterator[str]:
    """Where the rows come from: one line if all come from one place."""
    places: dict[str, list[str]] = {}
    for key, row in kept.items():
        places.setdefault(row["where"], []).append(key)
    for where, keys in places.items():
        which = f" Rows: {', '.join(keys)}." if len(places) > 1 else ""
        yield _filled(f"Measured by `python bench/table.py` on {where}.{which}\n")


def _filled(text: str) -> str:
    return textwrap.fill(text, WIDTH, break_on_hyphens=False) + "\n"


def page(kept: Kept) -> str:
    """All of it, in Markdown. A row that has never been measured is told as such."""
    rows = [(row, kept.get(row.key, {"figures": [], "missing": "never yet"})) for row in ROWS]
    lines = [*origins(kept), "| what | measured | goal | met |", "|---|---|---|---|"]
    lines += chain.from_iterable(summary(*row) for row in rows)
    lines += ["", *chain.from_iterable(details(*row) for row in rows)]
    return "\n".join(lines).rstrip() + "\n"


def write(measured: Kept) -> None:
    """Keep what was measured beside what is there of the other rows, and renew the page."""
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    kept = {row.key: {**kept, **measured}[row.key] for row in ROWS if row.key in {**kept, **measured}}
    RESULTS.write_text(json.dumps(kept, indent=1) + "\n")
    text = PAGE.read_text()
    PAGE.write_text(re.sub(f"(?s)(?<={BEGIN}).*?(?={END})", lambda _: page(kept), text))


# ---------------------------------------------------------------- the command


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--perf", type=Path, default=SHARED / "perf", help="the bench of parsers (../shared/perf)")
    parser.add_argument("--vusb", type=Path, default=host.SOURCES, help="the virtual bus (../shared/vusb)")
    parser.add_argument("--peer-root", type=Path, help="a Debian tree with usbredirect; needs root, for chroot")
    parser.add_argument("--python", default=sys.executable, help="the interpreter to measure (default: this one)")
    parser.add_argument("--free-threaded", metavar="PYTHON", help="an interpreter without GIL")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="+", default=[""], metavar="ROW", help="rows whose key begins like this")
    parser.add_argument("--write", action="store_true", help="renew docs/performance.md and bench/results.json")
    return parser.parse_args()


def _chosen(words: Sequence[str]) -> list[Row]:
    rows = [row for row in ROWS if row.key.startswith(tuple(words))]
    if not rows:
        raise SystemExit(f"there is no such row; there are {', '.join(row.key for row in ROWS)}")
    return rows


def main() -> int:
    """Measure, row by row, and print; the exit code is 0, whatever the figures."""
    arguments = _arguments()
    if os.path.abspath(arguments.python) != os.path.abspath(sys.executable):
        os.execv(arguments.python, [arguments.python, *sys.argv])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # what was started is ended
    rows = _chosen(arguments.only)
    measured: dict[str, dict[str, Any]] = {}
    gc.freeze()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.peer_root is not None:
            use_library_of(arguments.peer_root, Path(folder))
        settings = Settings(
            arguments.perf, arguments.vusb, arguments.peer_root, arguments.free_threaded, arguments.rounds, Path(folder)
        )
        print("| what | measured | goal | met |\n|---|---|---|---|")
        for row in rows:
            start = time.monotonic()
            measured[row.key] = measure(row, settings)
            if arguments.write:  # at once: the next row may take long
                write({row.key: measured[row.key]})
            print("\n".join(summary(row, measured[row.key])) or f"| {row.what} | see below | | |", flush=True)
            print(f"{row.key}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    print()
    print("\n".join(chain.from_iterable(details(row, measured[row.key]) for row in rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
