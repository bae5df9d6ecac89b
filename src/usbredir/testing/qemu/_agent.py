"""Shell commands for the guest: the host's side of what ``guest_init.sh`` does.

We send lines, the guest answers each command when it has ended, in whatever order:

| line | means |
|---|---|
| ``run ID LENGTH SCRIPT`` | run SCRIPT (base64) with the LENGTH bytes that follow as its input |
| ``stop ID`` | end that command and what it started |
| ``ID CODE LENGTH LENGTH`` | answer: exit code; output and error output follow |
"""

from __future__ import annotations

import base64
import itertools
import socket
import time
from typing import NamedTuple

from ..._channel import Channel
from ._guest_error import GuestError

__all__ = ["Agent", "CommandResult"]


class CommandResult(NamedTuple):
    """How a command ended: exit code (137: it was stopped), output and error output."""

    code: int
    output: bytes
    errors: bytes


class Agent:
    """Runs commands in the guest, several at a time if wanted. Threads: one.

    Methods raise TimeoutError after *timeout* seconds, EOFError when QEMU has ended, and GuestError for an answer that
    is none.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._channel = Channel(sock)
        self._numbers = itertools.count(1)
        self._results: dict[int, CommandResult] = {}
        self._running: set[int] = set()
        self._header: bytes | None = None  # of an answer whose rest has not come yet

    def start(self, script: str, data: bytes, timeout: float) -> int:
        """Start a command with *data* as its input, and return its number."""
        number = next(self._numbers)
        encoded = base64.b64encode(script.encode()).decode()
        self._channel.send(f"run {number} {len(data)} {encoded}\n".encode() + data, time.monotonic() + timeout)
        self._running.add(number)
        return number

    def result(self, number: int, timeout: float) -> CommandResult:
        """Wait until a command has ended; its result is given once."""
        end = time.monotonic() + timeout
        while number not in self._results:
            self._receive(end)
        return self._results.pop(number)

    def stop(self, number: int, timeout: float) -> None:
        """Have a command ended; its result still comes, unless it hangs in the guest's kernel."""
        self._channel.send(f"stop {number}\n".encode(), time.monotonic() + timeout)

    def forget(self, number: int) -> None:
        """Nobody waits for this command any more: its result is dropped when it comes."""
        self._running.discard(number)
        self._results.pop(number, None)

    def close(self) -> None:
        """Let the guest go: it powers off by itself. Idempotent."""
        self._channel.close()

    def _receive(self, end: float) -> None:
        """Read one answer, whosever it is. One that is cut short by the end of the time is read on the next call."""
        if self._header is None:
            self._header = self._channel.line(end)
        number, code, output, errors = _parsed(self._header)
        data = self._channel.exactly(output + errors, end)
        self._header = None
        if number in self._running:
            self._running.discard(number)
            self._results[number] = CommandResult(code, data[:output], data[output:])


def _parsed(header: bytes) -> tuple[int, int, int, int]:
    """Number, exit code and the two lengths."""
    words = header.split()
    if len(words) != 4 or not all(word.isdigit() for word in words):
        raise GuestError(f"the guest answered {header[:80]!r}, which is no answer to a command")
    number, code, output, errors = map(int, words)
    return number, code, output, errors
