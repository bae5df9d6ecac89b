"""The other end of the TCP measurements, a process of its own: gives or takes ready-made bytes, no parser.

``python peer.py`` listens on a loopback port and prints its number. A connection begins with one line:

* ``give KIND COUNT``: a hello comes back at once, and after one more byte COUNT packets of the kind with that index.
* ``take``: a hello comes back; then everything up to the end of the stream is taken and one byte answers.

It ends when its standard input ends, so it cannot outlive the benchmark.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
from functools import cache

from wire import KINDS, hello, stream

_PIECE = 256 * 1024


@cache
def _ready_made(kind: int) -> tuple[bytes, int]:
    """Packets of about the size of one write, and how many these are."""
    count = max(1, _PIECE // (KINDS[kind].size + 26))
    return stream(KINDS[kind], count), count


def _give(sock: socket.socket, kind: int, count: int) -> None:
    piece, each = _ready_made(kind)
    sock.sendall(hello())
    sock.recv(1)
    for _ in range(count // each):
        sock.sendall(piece)
    sock.sendall(stream(KINDS[kind], count % each))
    sock.recv(1)  # until the receiver closes: closing first could throw away what it has not read


def _take(sock: socket.socket) -> None:
    sock.sendall(hello())
    buffer = bytearray(_PIECE)
    while sock.recv_into(buffer):
        pass
    sock.sendall(b"!")


def _serve(listener: socket.socket) -> None:
    while True:
        sock, _ = listener.accept()
        with sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            command = b""
            while not command.endswith(b"\n"):
                command += sock.recv(1)
            role, *numbers = command.split()
            try:
                if role == b"give":
                    _give(sock, *map(int, numbers))
                else:
                    _take(sock)
            except ConnectionError:
                continue  # the measurement was interrupted


def main() -> None:
    """Serve until standard input ends."""
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    threading.Thread(target=_serve, args=(listener,), daemon=True).start()
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main()
