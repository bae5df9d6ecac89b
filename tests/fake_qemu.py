"""What looks like QEMU with a guest to `usbredir.testing.qemu`: a program, so that starting and killing it are real.

The monitor accepts everything but what REFUSED names; the "guest" runs commands with this machine's shell.
"""

from __future__ import annotations

import base64
import json
import os
import re
import select
import socket
import subprocess
import sys

REFUSED = {"chardev-add": "127.0.0.1", "device_add": "nonsense"}
"""Commands, and a word in their arguments that makes them fail."""
STUCK = set[bytes]()
"""Numbers of commands that cannot be stopped."""
KEPT: list[int] = []
"""Descriptors that came over the monitor: open as long as QEMU runs, so that a device's connection does not end."""


def descriptor(name: str) -> int:
    found = re.search(rf"id={name},fd=(\d+)", " ".join(sys.argv))
    assert found is not None
    return int(found[1])


def answer_monitor(line: bytes, reply: socket.socket, done: list[str]) -> None:
    request = json.loads(line)
    command, arguments = request["execute"], json.dumps(request["arguments"])
    done.append(command)
    answer: dict[str, object] = {"return": {}, "id": request["id"]}
    if command == "query-done":
        answer["return"] = done
    if command in REFUSED and REFUSED[command] in arguments:
        answer = {"error": {"class": "GenericError", "desc": "no such thing"}, "id": request["id"]}
    messages: list[dict[str, object]] = [{"event": "SOMETHING", "data": {}}, answer]
    if command == "device_del":
        messages.append({"event": "DEVICE_DELETED", "data": {"device": request["arguments"]["id"]}})
    reply.sendall(b"".join(json.dumps(message).encode() + b"\r\n" for message in messages))


def answer_agent(line: bytes, agent: socket.socket) -> None:
    verb, number, *rest = line.split()
    if verb == b"stop":
        if number not in STUCK:
            agent.sendall(number + b" 137 4 0\nhalf")
        return
    script = base64.b64decode(rest[1]).decode()
    data = b""
    while len(data) < int(rest[0]):
        data += agent.recv(int(rest[0]) - len(data))
    if script == "die":
        print("qemu: it hurts", file=sys.stderr, flush=True)
        os._exit(3)
    if script == "hang for ever":
        STUCK.add(number)
    elif script != "hang":
        done = subprocess.run(["sh", "-c", script], input=data, capture_output=True, check=False)
        lengths = f" {done.returncode} {len(done.stdout)} {len(done.stderr)}\n".encode()
        agent.sendall(number + lengths + done.stdout + done.stderr)


def read_line(sock: socket.socket) -> bytes:
    line = b""
    while not line.endswith(b"\n"):
        piece, descriptors, _, _ = socket.recv_fds(sock, 1, 4)
        if not piece:
            sys.exit(0)
        KEPT.extend(descriptors)
        line += piece
    return line


def main() -> None:
    monitor = socket.socket(fileno=descriptor("monitor"))
    agent = socket.socket(fileno=descriptor("agent"))
    console = re.search(r"-serial file:(\S+)", " ".join(sys.argv))
    assert console is not None
    with open(console[1], "w", encoding="ascii") as file:
        file.write("[    0.1] a line of the console\r\n")
    monitor.sendall(b'{"QMP": {"version": {}}}\r\n')
    done: list[str] = []
    while True:
        ready, _, _ = select.select([monitor, agent], [], [])
        if monitor in ready:
            answer_monitor(read_line(monitor), monitor, done)
        if agent in ready:
            answer_agent(read_line(agent), agent)


if __name__ == "__main__":
    main()
