"""QMP: what one tells a running QEMU. Source: QEMU's docs/interop/qmp-spec.rst, and qapi/char.json for sockets."""

from __future__ import annotations

import json
import socket
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from ._channel import Channel
from .errors import UsbRedirError

__all__ = ["Qmp", "QmpError", "QmpRefusal", "socket_address"]

MOST_EVENTS = 1000
"""Events that are kept until somebody asks for them; the oldest are dropped."""
MILLISECONDS_SINCE = (9, 2)
"""The version of QEMU that deprecated ``reconnect``, in seconds, for ``reconnect-ms``."""


class QmpError(UsbRedirError):
    """What QEMU's monitor said is no QMP."""


class QmpRefusal(QmpError):
    """QEMU did not do a command. Attributes: *description*, QEMU's own words."""

    def __init__(self, command: str, description: str) -> None:
        super().__init__(f"QEMU refused {command}: {description}")
        self.description = description


class Qmp:
    """QEMU's monitor. Owns the socket. Threads: one.

    Methods raise TimeoutError after *timeout* seconds, EOFError when QEMU has ended, and QmpError: QmpRefusal for a
    refusal.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._channel = Channel(sock)
        self._events: deque[dict[str, Any]] = deque(maxlen=MOST_EVENTS)
        self._last_id = 0
        self._version = (0, 0)

    def greet(self, timeout: float) -> None:
        """Begin: QEMU tells who it is, and is switched to taking commands."""
        greeting = self._receive(time.monotonic() + timeout)
        if "QMP" not in greeting:
            raise QmpError(f"QEMU's monitor did not greet, but said {greeting!r}")
        self._version = _version(greeting)
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
            if "error" in message and message.get("id", self._last_id) == self._last_id:  # no id: it was not understood
                raise QmpRefusal(command, _description(message["error"]))
            if message.get("id") == self._last_id:
                return message.get("return")
            self._keep(message)

    def wait_event(self, name: str, data: Mapping[str, object], timeout: float) -> dict[str, Any]:
        """Wait for an event with these members in its data, or take it if it has already come."""
        end = time.monotonic() + timeout
        while True:
            for event in self._events:
                given = event.get("data")
                if event["event"] == name and isinstance(given, dict) and data.items() <= given.items():
                    self._events.remove(event)
                    return event
            self._keep(self._receive(end))

    def reconnecting(self, seconds: int) -> dict[str, int]:
        """The option of a socket's ``chardev-add`` that makes this QEMU connect, and again when that has ended.

        With it QEMU goes on while it connects; without, the whole machine waits.
        """
        if self._version >= MILLISECONDS_SINCE:
            return {"reconnect-ms": 1000 * seconds}
        return {"reconnect": seconds}

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
        except (ValueError, RecursionError):
            message = None
        if not isinstance(message, dict):
            raise QmpError(f"QEMU's monitor said {line[:80]!r}, which is no message")
        return message


def socket_address(host: str, port: int | None) -> dict[str, object]:
    """A ``SocketAddress`` as QMP has it, from the parts of an address; *port* None: *host* is a Unix socket's path."""
    if port is None:
        return {"type": "unix", "data": {"path": host}}
    return {"type": "inet", "data": {"host": host, "port": str(port)}}


def _version(greeting: Mapping[str, Any]) -> tuple[int, int]:
    """QEMU's version; (0, 0) when it does not tell."""
    try:
        version = greeting["QMP"]["version"]["qemu"]
        return int(version["major"]), int(version["minor"])
    except (KeyError, TypeError, ValueError):
        return 0, 0


def _description(error: object) -> str:
    return str(error.get("desc", error) if isinstance(error, dict) else error)
