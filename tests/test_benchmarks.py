"""The bench's own rules: what is checked, how the table is written, and that nothing it starts stays behind."""

from __future__ import annotations

import importlib
import json
import os
import select
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parent.parent / "bench"

Module = Callable[[str], ModuleType]


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Iterator[Module]:
    """Imports a file of the bench, and forgets all of them afterwards."""
    monkeypatch.syspath_prepend(BENCH)
    yield importlib.import_module
    for path in BENCH.glob("*.py"):
        sys.modules.pop(path.stem, None)


def kept(*values: float, missing: str = "", where: str = "here") -> dict[str, Any]:
    """A row of two goals as it is kept."""
    figures = [
        {"case": f"case {n}", "values": {"x C": v, "x ctypes": 10 * v}, "text": ""} for n, v in enumerate(values)
    ]
    return {"figures": figures, "missing": missing, "where": where}


# ================================================================ goals


@pytest.mark.parametrize(("value", "least", "most"), [(0.99, False, True), (1.0, True, True), (1.01, True, False)])
def test_a_limit_includes_its_value(module: Module, value: float, least: bool, most: bool) -> None:
    goals = module("goals")
    assert goals.at_least(1).met(value) is least
    assert goals.at_most(1).met(value) is most


def test_every_row_is_measured_and_has_a_key_of_its_own(module: Module) -> None:
    rows = module("goals").ROWS
    assert {row.key for row in rows} == set(module("table").MEASURES)
    assert len({row.key for row in rows}) == len(rows)


def test_the_gate_fails_for_each_figure_that_is_too_bad(module: Module) -> None:
    run = module("run")
    results = run.Results(queue={"usbredir": {64: 1.0, 1024: 1.6, 65536: 1.1}})
    for key, limit in run._count_limits().items():
        results.counts.append(module("counted").Count(key, key, limit.value * 1.01))
    goals = list(run.goals(results))
    assert len(goals) == 1 + len(results.counts)
    assert not any(goal.met for goal in goals)


def test_the_gate_checks_counts_that_exist(module: Module) -> None:
    timed, run = module("timed"), module("run")
    implementation = timed.Implementation("usbredir", module("endpoints").UsbredirEnd, timed.library_connection)
    assert set(run._count_limits()) <= {count.key for count in module("counted").counts([implementation])}


# ================================================================ the table


@pytest.mark.parametrize(
    ("row", "cells"),
    [
        (kept(1.5, 2.0), ["1.5 (case 0) to 2 (case 1) | at least 1.5 x C | yes", "15 (case 0) to 20"]),
        (kept(1.4, 2.0), ["1.4 (case 0) to 2 (case 1) | at least 1.5 x C | no: 1 of 2", "yes"]),
        (kept(2.0), ["2 (case 0) | at least 1.5 x C | yes", "20 (case 0) | at least 6 x ctypes | yes"]),
        (kept(missing="no compiler"), ["not measured: no compiler | at least 1.5 x C |", "not measured: no compiler"]),
    ],
)
def test_a_row_has_a_line_for_each_goal(module: Module, row: dict[str, Any], cells: list[str]) -> None:
    table = module("table")
    lines = list(table.summary(table.ROWS[0], row))
    assert len(lines) == len(cells)
    for line, cell in zip(lines, cells, strict=True):
        assert cell in line


def test_a_row_that_was_measured_in_part_says_so(module: Module) -> None:
    table = module("table")
    row = kept(2.0)
    row["figures"].append({"case": "bulkin: no answer", "values": {}, "text": "not measured"})
    assert all("yes (some not measured)" in line for line in table.summary(table.ROWS[0], row))


def test_writing_keeps_other_rows_and_the_text_around(
    module: Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = module("table")
    monkeypatch.setattr(table, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(table, "RESULTS", tmp_path / "results.json")
    table.PAGE.write_text(f"before\n{table.BEGIN}old\n{table.END}after\n")
    one, other = table.ROWS[1].key, table.ROWS[0].key
    table.write({one: kept(1.25, where="one place")})
    table.write({other: kept(4.5, where="another place")})
    table.write({other: kept(5.5, where="another place")})
    assert list(json.loads(table.RESULTS.read_text())) == [other, one], "in the order of the table"
    text = table.PAGE.read_text()
    assert text.startswith(f"before\n{table.BEGIN}Measured by")
    assert text.endswith(f"{table.END}after\n")
    assert "1.25 (case 0)" in text
    assert "5.5 (case 0)" in text
    assert "4.5 (case 0)" not in text
    assert "old" not in text
    assert f"one place. Rows: {one}." in text


def test_the_page_has_what_was_measured(module: Module) -> None:
    """Nobody wrote into the table by hand. After a change of bench/table.py or goals.py: ``table.write({})``."""
    table = module("table")
    text = table.PAGE.read_text()
    assert text.count(table.BEGIN) == text.count(table.END) == 1
    shown = text.partition(table.BEGIN)[2].partition(table.END)[0]
    assert shown == table.page(json.loads(table.RESULTS.read_text()))


# ================================================================ other programs


def test_a_program_that_takes_too_long_is_ended_with_its_children(module: Module, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    try:
        with pytest.raises(RuntimeError, match=r"nothing within 0\.5 s"):
            module("processes").output(["sh", "-c", f"exec 3> {fifo}; sleep 1000 & wait"], 0.5)
        assert select.select([reader], [], [], 60)[0], "a child still has it open"
        assert os.read(reader, 1) == b""
    finally:
        os.close(reader)


def test_a_program_that_fails_is_told(module: Module) -> None:
    with pytest.raises(RuntimeError, match="exit code 3"):
        module("processes").output(["sh", "-c", "exit 3"], 60)


def test_long_work_is_done_once_and_its_failure_remembered(module: Module) -> None:
    calls = []

    def work(argument: int) -> int:
        calls.append(argument)
        if argument < 0:
            raise RuntimeError("no")
        return argument

    once = module("once").once(work)
    assert [once(1), once(1), once(2)] == [1, 1, 2]
    for _ in range(2):
        with pytest.raises(RuntimeError):
            once(-1)
    assert calls == [1, 2, -1]
