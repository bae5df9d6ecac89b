"""Each program in examples/ runs as it is and says nothing on stderr."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))
PATIENCE = 60.0
"""Seconds that an example may take on a busy machine."""
MOST_LINES = 80

every_example = pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)


@every_example
def test_example_runs(example: Path, tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", str(example)],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        cwd=tmp_path,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert not result.stderr
    assert result.stdout.count("\n") >= 3, "it says what it does"
    assert not list(tmp_path.iterdir()), "it leaves nothing behind"


@every_example
def test_example_is_short(example: Path) -> None:
    assert len(example.read_text(encoding="utf-8").splitlines()) <= MOST_LINES


def test_there_are_examples() -> None:
    assert {"asyncio_guest", "embed_three_threads", "export_python_device", "use_remote_device"} <= {
        path.stem for path in EXAMPLES
    }
