"""Fuzz target: What a guest sends to a host's parser. See fuzz/README.md."""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
with atheris.instrument_imports(include=["usbredir"]):
    from fuzz.invariants import check_parser


def one_input(data: bytes) -> None:
    check_parser(data, host=True)


if __name__ == "__main__":
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
