"""What the command tells its user: status lines, log messages and errors, as text or as one JSON object a line.

Everything goes to stderr, escaped: messages carry texts of guests and devices.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import time
from collections.abc import Iterator

from ._ending import ExitCode, Failure
from .exporter import Event, Report
from .parser import LogLevel, escape

__all__ = ["Messages"]


LEVELS = {logging.ERROR: LogLevel.ERROR, logging.WARNING: LogLevel.WARNING, logging.INFO: LogLevel.INFO}


class Messages(logging.Handler):
    """Writes messages. As a logging handler it takes what the package's modules log.

    verbosity: log messages up to this level are written; what happens to devices and guests always is.
    """

    def __init__(self, verbosity: int = LogLevel.WARNING, *, as_json: bool = False) -> None:
        super().__init__()
        self._verbosity = verbosity
        self._json = as_json

    def reporter(self, device: str = "") -> Report:
        """A function for what happens to one device; *device* tells several apart."""

        def report(event: Event, level: LogLevel, message: str) -> None:
            if event is Event.UNREACHABLE:
                self.failure(Failure(ExitCode.REFUSED, message), device)
            elif event is not Event.LOG or level <= self._verbosity:
                self._write(event.value, level, message, device)

        return report

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Take the log messages of the package meanwhile."""
        logger = logging.getLogger("usbredir")
        propagated, logger.propagate = logger.propagate, False
        logger.addHandler(self)
        try:
            yield
        finally:
            logger.removeHandler(self)
            logger.propagate = propagated

    def failure(self, failure: Failure, device: str = "") -> None:
        """Why the command ends, or serving *device* does."""
        if self._json:
            self._write("error", LogLevel.ERROR, str(failure), device, code=int(failure.code))
        else:
            self._write("failed", LogLevel.ERROR, f"error: {failure}", device)

    def emit(self, record: logging.LogRecord) -> None:
        """Write a log record of the package."""
        level = LEVELS.get(record.levelno, LogLevel.DEBUG)
        if level <= self._verbosity:
            self._write(Event.LOG.value, level, record.getMessage())

    def _write(self, event: str, level: LogLevel, message: str, device: str = "", **fields: object) -> None:
        # Whoever it comes from: one line, and nothing that a terminal obeys.
        message, device = escape(message), escape(device)
        if self._json:
            now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            about = {"device": device} if device else {}
            told = {"time": now, "level": level.name.lower(), "event": event, **about, **fields, "message": message}
            text = json.dumps(told)
        else:
            about_text = f"[{device}] " if device else ""
            level_text = f"{level.name.lower()}: " if event == Event.LOG.value else ""
            text = f"usbredir: {about_text}{level_text}{message}"
        with contextlib.suppress(OSError):  # nobody reads it any more: no reason to stop serving
            print(text, file=sys.stderr, flush=True)
