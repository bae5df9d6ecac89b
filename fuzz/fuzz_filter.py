"""Fuzz target: A filter text from somewhere. See fuzz/README.md."""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
with atheris.instrument_imports(include=["usbredir"]):
    from fuzz.invariants import check_filter


def one_input(data: bytes) -> None:
    check_filter(data)


if __name__ == "__main__":
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
