"""The command in the test's own process: its exit code and what it printed."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest

from usbredir import cli

__all__ = ["Outcome", "Run", "call_main", "signals"]


class Outcome(NamedTuple):
    """What a run of the command gave."""

    code: int
    out: str
    err: str


Run = Callable[..., Outcome]


def call_main(capsys: pytest.CaptureFixture[str], *arguments: object) -> Outcome:
    """Call main()."""
    try:
        code = cli.main([str(argument) for argument in arguments])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    captured = capsys.readouterr()
    return Outcome(code, captured.out, captured.err)


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """The command sets handlers: put back what was there. Import it where main() is called."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
