"""How the command ends: exit codes, failures, and the signals that end it."""

from __future__ import annotations

import signal
from enum import IntEnum
from typing import NoReturn

__all__ = ["ExitCode", "Failure", "ending_signals", "interrupt"]


class ExitCode(IntEnum):
    """What the process tells its caller."""

    OK = 0
    FAILED = 1
    USAGE = 2
    DEVICE = 3
    ADDRESS = 4
    REJECTED = 5
    LOST = 6
    PROTOCOL = 7
    MISSING = 8
    BUSY = 9
    FORBIDDEN = 10
    UNCONFIGURED = 11
    REFUSED = 12
    FILTERED = 13


class Failure(Exception):
    """Ends the command with a message and an exit code."""

    def __init__(self, code: ExitCode, message: str) -> None:
        super().__init__(message)
        self.code = code


def ending_signals() -> list[signal.Signals]:
    """The signals that end the command; one that is ignored, as under nohup, stays so."""
    numbers = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
    return [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]


def interrupt(number: int, frame: object) -> NoReturn:
    """A signal handler: raises KeyboardInterrupt."""
    raise KeyboardInterrupt
