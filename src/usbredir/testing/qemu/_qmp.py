"""QMP: what one tells a running QEMU. Source: QEMU's docs/interop/qmp-spec.rst."""

from __future__ import annotations

import json
import socket
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from ._channel import Channel, GuestError

__all__ = ["Qmp"]

MOST_EVENTS = 1000
"""Events that are kept until somebody asks for them; the oldest are dropped."""


class Qmp:
    """QEMU's monitor. Threads: one.

    Methods raise TimeoutError after *timeout* seconds, EOFError when QEMU has ended, and GuestError for a refusal.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._channel = Channel(sock)
        self._events: deque[dict[str, Any]] = deque(maxlen=MOST_EVENTS)
        self._last_id = 0

    def greet(self, timeout: float) -> None:
        """Begin: QEMU tells who it is, and is switched to taking commands."""
        greeting = self._receive(time.monotonic() + timeout)
        if "QMP" not in greeting:
            raise GuestError(f"QEMU's monitor did not greet, but said {greeting!r}")
        self.execute("qmp_capabilities", {}, timeout)

    def execute(
        self, command: str, arguments: Mapping[str, object], timeout: float, *, descriptors: Sequence[int] = ()
    ) -> Any:
        """Run a command and return what it returned; file descriptors are for ``getfd``."""
        end = time.monotonic() + timeout
        self._last_id += 1
        request = {"execute": command, "arguments": arguments, "id": self._last_id}
        self._channel.send(json.dumps(request).encode() + b"\n", end, descriptors=descriptors)
        while True:
            message = self._receive(end)
            if message.get("id") != self._last_id:
                self._keep(message)
            elif "error" in message:
                raise GuestError(f"QEMU refused {command}: {message['error'].get('desc', message['error'])}")
            else:
                return message.get("return")

    def wait_event(self, name: str, data: Mapping[str, object], timeout: float) -> dict[str, Any]:
        """Wait for an event with these members in its data, or take it if it has already come."""
        end = time.monotonic() + timeout
        while True:
            for event in self._events:
                given = event.get("data", {})
                if event["event"] == name and all(given.get(key) == value for key, value in data.items()):
                    self._events.remove(event)
                    return event
            self._keep(self._receive(end))

    def close(self) -> None:
        """Close the connection; QEMU goes on. Idempotent."""
        self._channel.close()

    def _keep(self, message: dict[str, Any]) -> None:
        """Keep an event; the answer to a command that nobody waits for any more is dropped."""
        if "event" in message:
            self._events.append(message)

    def _receive(self, end: float) -> dict[str, Any]:
        line = self._channel.line(end)
        try:
            message = json.loads(line)
        except ValueError:
            message = None
        if not isinstance(message, dict):
            raise GuestError(f"QEMU's monitor said {line[:80]!r}, which is no message")
        return message
