"""Messages: text and JSON, levels, one line each, whatever is in them."""

from __future__ import annotations

import io
import json
import logging
import sys

import pytest

from usbredir._ending import ExitCode, Failure
from usbredir._messages import Messages
from usbredir.exporter import Event
from usbredir.parser import LogLevel


def written(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_text(capsys: pytest.CaptureFixture[str]) -> None:
    """Events as they are, log messages with their level, failures as errors."""
    messages = Messages()
    report = messages.reporter()
    report(Event.LISTENING, LogLevel.INFO, "listening on 127.0.0.1:4000")
    report(Event.LOG, LogLevel.WARNING, "careful")
    messages.failure(Failure(ExitCode.BUSY, "in use"))
    assert written(capsys) == [
        "usbredir: listening on 127.0.0.1:4000",
        "usbredir: warning: careful",
        "usbredir: error: in use",
    ]


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    """The same as objects; failures have their code."""
    messages = Messages(as_json=True)
    messages.reporter("1-4")(Event.DEVICE_LOST, LogLevel.WARNING, "unplugged")
    messages.failure(Failure(ExitCode.BUSY, "in use"))
    event, failure = map(json.loads, written(capsys))
    assert event.pop("time").endswith("Z")
    assert event == {"level": "warning", "event": "device-lost", "device": "1-4", "message": "unplugged"}
    assert (failure["event"], failure["code"], failure["message"]) == ("error", 9, "in use")


def test_several_devices_are_told_apart(capsys: pytest.CaptureFixture[str]) -> None:
    messages = Messages()
    for device in ("1-4", "loopback"):
        messages.reporter(device)(Event.LEFT, LogLevel.INFO, "guest left")
    assert written(capsys) == ["usbredir: [1-4] guest left", "usbredir: [loopback] guest left"]


@pytest.mark.parametrize("verbosity", range(6))
def test_levels(capsys: pytest.CaptureFixture[str], verbosity: int) -> None:
    """As usbredirect's -v; what happens to devices and guests is told with any."""
    messages = Messages(verbosity)
    report = messages.reporter()
    report(Event.LEFT, LogLevel.INFO, "guest left")
    for level in list(LogLevel)[1:]:
        report(Event.LOG, level, f"at {level:d}")
    assert [line[-1] for line in written(capsys)] == ["t", *map(str, range(1, verbosity + 1))]


@pytest.mark.parametrize("as_json", [False, True])
def test_everything_is_escaped(capsys: pytest.CaptureFixture[str], as_json: bool) -> None:
    """A message is one line, and nothing in it commands a terminal."""
    messages = Messages(LogLevel.DEBUG_DATA, as_json=as_json)
    evil = "\x1b[2J\r\nusbredir: all is well\u202e\x9b"
    messages.reporter(evil)(Event.LEFT, LogLevel.INFO, evil)
    messages.reporter()(Event.LOG, LogLevel.ERROR, evil)
    messages.failure(Failure(ExitCode.DEVICE, evil))
    with messages.installed():
        logging.getLogger("usbredir.host").error("%s", evil)
    lines = written(capsys)
    assert len(lines) == 4
    assert all(line.isprintable() for line in lines)


def test_log_records_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    """Taken while installed, by level; not shown twice."""
    messages = Messages(LogLevel.INFO)
    logger = logging.getLogger("usbredir.backends.pyusb")
    with messages.installed():
        logger.setLevel(logging.DEBUG)
        logger.error("one %s", "two")
        logger.info("three")
        logger.debug("four")
        logger.setLevel(logging.NOTSET)
    assert logging.getLogger("usbredir").propagate
    assert messages not in logging.getLogger("usbredir").handlers
    assert written(capsys) == ["usbredir: error: one two", "usbredir: info: three"]


def test_nobody_reads_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """A closed pipe is no reason to stop serving."""

    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stderr", Broken())
    Messages().reporter()(Event.LEFT, LogLevel.INFO, "guest left")
