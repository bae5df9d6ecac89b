"""The command, in the test's own process or in one of its own: its exit code and what it printed."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest

from usbredir import cli
from usbredir.guest import Guest
from usbredir.transport import Connection, GuestConnection, connect

__all__ = ["COMMAND", "PATIENCE", "Outcome", "Process", "Run", "call_main", "guest_at", "signals"]

PATIENCE = 60.0
"""Seconds that a process may take to start, answer or end on a busy machine."""
COMMAND = [sys.executable, "-m", "usbredir", "export"]


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


class Process:
    """A running ``usbredir export``; ended by the end of the with block."""

    def __init__(self, *arguments: str, env: dict[str, str] | None = None) -> None:
        self.process = subprocess.Popen(
            [*COMMAND, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
        )
        self.lines: list[str] = []

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def line_with(self, text: str) -> str:
        """The next line of standard error that contains *text*; the process may write others before."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if text in line:
                return line
        raise AssertionError(f"no line with {text!r} in {self.lines}")

    def address(self) -> str:
        return self.line_with("listening on").split()[-1]

    def end(self, number: signal.Signals | None = None) -> int:
        """Send a signal, if one is given, and wait for the end: the exit code."""
        if number is not None:
            self.process.send_signal(number)
        _, err = self.process.communicate(timeout=PATIENCE)
        self.lines += err.splitlines(keepends=True)
        return self.process.returncode


def guest_at(address: str) -> tuple[Connection, Guest]:
    connection = connect(address, PATIENCE)
    return connection, Guest(GuestConnection(connection))
