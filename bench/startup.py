"""How long a start takes: ``bench/startup.py``. Fresh processes in turns, caches warm, wall clock."""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from goals import Figure

__all__ = ["import_times", "version_times"]

ROUNDS = 21
"""Of each command; a start is short, and the machine busy now and then."""
LIMIT = 60.0
"""Seconds for one of them."""
PROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"
IMPORT = ["-c", "import usbredir.parser"]


def import_times() -> Iterator[Figure]:
    """Of ``usbredir.parser``: in a process of its own, less one that does nothing; and the whole."""
    whole, nothing, extra = _against_nothing([sys.executable, *IMPORT])
    yield Figure(
        "`import usbredir.parser`", {"ms": extra}, f"{whole:.0f} ms in all, `python -c pass` takes {nothing:.0f}"
    )


def version_times() -> Iterator[Figure]:
    """Of the command, as it is installed and as a module: the whole process."""
    with tempfile.TemporaryDirectory() as folder:
        commands = {
            "installed command": [sys.executable, str(_script(Path(folder)))],
            "`python -m usbredir`": [sys.executable, "-m", "usbredir"],
        }
        for name, command in commands.items():
            whole, nothing, _ = _against_nothing([*command, "--version"])
            yield Figure(name, {"ms": whole}, f"in all; `python -c pass` takes {nothing:.0f}")


def _script(folder: Path) -> Path:
    """The command as pip installs it: two lines of Python that call the entry point."""
    found = re.search(r'^usbredir = "([\w.]+):(\w+)"', PROJECT.read_text(), re.MULTILINE)
    assert found is not None
    script = folder / "usbredir"
    script.write_text(f"import sys\nfrom {found[1]} import {found[2]}\nsys.exit({found[2]}())\n")
    return script


def _against_nothing(command: Sequence[str]) -> tuple[float, float, float]:
    """Medians in ms: of the command, of an interpreter that does nothing, and of the difference."""
    nothing = [sys.executable, "-c", "pass"]
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}
    _seconds(command, env)  # writes the caches
    pairs = [(_seconds(command, env), _seconds(nothing, env)) for _ in range(ROUNDS)]
    columns = (*zip(*pairs, strict=True), [a - b for a, b in pairs])
    whole, empty, extra = (statistics.median(values) * 1000 for values in columns)
    return whole, empty, extra


def _seconds(command: Sequence[str], env: Mapping[str, str]) -> float:
    start = time.perf_counter()
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL)
    limit = threading.Timer(LIMIT, process.kill)
    limit.start()
    code = process.wait()  # with a timeout it would look now and then, up to 50 ms late
    spent = time.perf_counter() - start
    limit.cancel()
    if code:
        raise RuntimeError(f"{' '.join(command)}: exit code {code}")
    return spent


def main() -> int:
    """Measure and print; the exit code is 0."""
    for figure in (*import_times(), *version_times()):
        print(f"{figure.case:26}{figure.values['ms']:7.1f} ms  {figure.text}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
