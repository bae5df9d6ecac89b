"""QEMU's monitor, played by the test. With a real one: test_qemu_attach."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from usbredir._qmp import Qmp, QmpError, QmpRefusal, socket_address

SOON = 0.02
"""Seconds, of a limit that has to pass."""
PATIENCE = 30.0
"""Seconds, of a limit that must not pass on a busy machine."""


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    theirs.settimeout(PATIENCE)
    with ours, theirs:
        yield ours, theirs


def said(*messages: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(message).encode() + b"\r\n" for message in messages)


def test_the_monitor_is_greeted(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = ends
    theirs.sendall(said({"QMP": {}}, {"return": {}, "id": 1}))
    Qmp(ours).greet(PATIENCE)
    assert json.loads(theirs.recv(1000))["execute"] == "qmp_capabilities"


@pytest.mark.parametrize(
    ("greeting", "expected"),
    [
        ({"version": {"qemu": {"micro": 0, "minor": 2, "major": 9}}}, {"reconnect-ms": 2000}),
        ({"version": {"qemu": {"micro": 0, "minor": 0, "major": 10}}}, {"reconnect-ms": 2000}),
        ({"version": {"qemu": {"micro": 9, "minor": 1, "major": 9}}}, {"reconnect": 2}),
        ({"version": {"qemu": {"micro": 0, "minor": 10, "major": 7}}}, {"reconnect": 2}),
        ({"version": {"qemu": {"minor": "x", "major": 9}}}, {"reconnect": 2}),
        ({"version": {"qemu": 9}}, {"reconnect": 2}),
        ("hello", {"reconnect": 2}),
    ],
)
def test_connecting_again(greeting: object, expected: object, ends: tuple[socket.socket, socket.socket]) -> None:
    """The option has another name since QEMU 9.2; a version that is not told counts as an old one."""
    ours, theirs = ends
    qmp = Qmp(ours)
    theirs.sendall(said({"QMP": greeting}, {"return": {}, "id": 1}))
    qmp.greet(PATIENCE)
    assert qmp.reconnecting(2) == expected


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        (("::1", 4000), {"type": "inet", "data": {"host": "::1", "port": "4000"}}),
        (("/run/a", None), {"type": "unix", "data": {"path": "/run/a"}}),
    ],
)
def test_addresses(address: tuple[str, int | None], expected: object) -> None:
    assert socket_address(*address) == expected


def test_answers_and_events_of_the_monitor(ends: tuple[socket.socket, socket.socket]) -> None:
    """Events between are kept; an answer with another id belongs to a command that was given up."""
    ours, theirs = ends
    qmp = Qmp(ours)
    deleted = {"event": "DEVICE_DELETED", "data": {"device": "usb1"}}
    theirs.sendall(said({"event": "X"}, deleted, {"return": 5, "id": 0}, {"return": 6, "id": 1}))
    assert qmp.execute("query-six", {"a": 1}, PATIENCE) == 6
    assert json.loads(theirs.recv(1000)) == {"execute": "query-six", "arguments": {"a": 1}, "id": 1}
    assert qmp.wait_event("DEVICE_DELETED", {"device": "usb1"}, PATIENCE) == deleted
    with pytest.raises(TimeoutError):  # it is given once, and only to who asked for this device
        qmp.wait_event("DEVICE_DELETED", {"device": "usb1"}, SOON)
    theirs.sendall(said(deleted))
    with pytest.raises(TimeoutError):
        qmp.wait_event("DEVICE_DELETED", {"device": "usb2"}, SOON)


@pytest.mark.parametrize("data", [None, [], "usb1", {"device": ["usb1"]}, {}])
def test_events_with_senseless_data(data: object, ends: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = ends
    theirs.sendall(said({"event": "DEVICE_DELETED", "data": data}))
    with pytest.raises(TimeoutError):
        Qmp(ours).wait_event("DEVICE_DELETED", {"device": "usb1"}, SOON)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (said({"error": {"class": "GenericError", "desc": "Bus 'x' not found"}, "id": 1}), "Bus 'x' not found"),
        (said({"error": {"desc": "of before"}, "id": 0}, {"error": {"desc": "JSON"}}), "JSON"),
        (said({"error": {"class": "GenericError"}, "id": 1}), "{'class': 'GenericError'}"),
        (said({"error": 7, "id": 1}), "7"),
    ],
)
def test_refusals_of_the_monitor(line: bytes, message: str, ends: tuple[socket.socket, socket.socket]) -> None:
    """That of a command which was not even understood has no id."""
    ours, theirs = ends
    theirs.sendall(line)
    with pytest.raises(QmpRefusal) as caught:
        Qmp(ours).execute("device_add", {}, PATIENCE)
    assert caught.value.description == message
    assert str(caught.value) == f"QEMU refused device_add: {message}"


@pytest.mark.parametrize("line", [b"qemu: what?", b"[1]", b"[" * 100_000, b"\xff"])
def test_what_is_no_message(line: bytes, ends: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = ends
    theirs.sendall(line + b"\r\n")
    with pytest.raises(QmpError, match="no message"):
        Qmp(ours).execute("device_add", {}, PATIENCE)


def test_descriptors_go_along(ends: tuple[socket.socket, socket.socket], tmp_path: Path) -> None:
    ours, theirs = ends
    theirs.sendall(said({"return": {}, "id": 1}))
    with open(tmp_path / "file", "wb") as file:
        Qmp(ours).execute("getfd", {"fdname": "file"}, PATIENCE, descriptors=[file.fileno()])
        data, descriptors, _, _ = socket.recv_fds(theirs, 1000, 4)
        with open(descriptors[0], "wb") as received:
            assert os.path.sameopenfile(received.fileno(), file.fileno())
    assert json.loads(data)["arguments"] == {"fdname": "file"}


def test_a_monitor_that_does_not_greet(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = ends
    theirs.sendall(said({"return": {}}))
    with pytest.raises(QmpError, match="did not greet"):
        Qmp(ours).greet(PATIENCE)
