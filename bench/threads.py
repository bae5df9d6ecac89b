"""Two connections in two threads against one: ``python3.13t bench/threads.py``. See README.md.

A pair is a parser that sends packets and one that receives them, in one thread, in memory or over a socket pair. Two
pairs share nothing but the interpreter and the module. A loop that does not use usbredir shows what the machine has to
give: two of its processors may be one core.
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import struct
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from wire import KINDS

from usbredir.packets import BulkPacket, Packet
from usbredir.parser import Parser, ParserCallbacks

GATHERED = 32
"""Packets per flush."""
DATA = KINDS[0].payload


class _End(ParserCallbacks):
    """One end, in memory: what is written goes to the other end."""

    def __init__(self) -> None:
        self.count = 0
        self.waiting: deque[bytes] = deque()
        self.other = self

    def read(self, count: int) -> bytes | None:
        return self.waiting.popleft() if self.waiting else None

    def write(self, data: memoryview) -> int:
        self.other.waiting.append(bytes(data))
        return len(data)

    def writev(self, buffers: Sequence[memoryview]) -> int:
        joined = b"".join(buffers)
        self.other.waiting.append(joined)
        return len(joined)

    def packet_received(self, packet: Packet) -> None:
        self.count += 1


class _SocketEnd(_End):
    """One end of a socket pair."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__()
        sock.setblocking(False)
        self._socket = sock

    def read(self, count: int) -> bytes | None:
        try:
            return self._socket.recv(count)
        except BlockingIOError:
            return None

    def write(self, data: memoryview) -> int:
        return self._socket.send(data)

    def writev(self, buffers: Sequence[memoryview]) -> int:
        return self._socket.sendmsg(buffers)


def in_memory() -> tuple[_End, _End]:
    """Two ends joined in memory."""
    one, other = _End(), _End()
    one.other, other.other = other, one
    return one, other


def over_sockets() -> tuple[_End, _End]:
    """Two ends joined by sockets."""
    one, other = socket.socketpair()
    return _SocketEnd(one), _SocketEnd(other)


class Pair:
    """Makes, sends and receives packets: the public way, with all checks."""

    def __init__(self, join: Callable[[], tuple[_End, _End]]) -> None:
        host, self._guest = join()
        self._sender, self._receiver = Parser(host, usb_host=True), Parser(self._guest)
        for parser in (self._sender, self._receiver, self._sender):
            parser.do_write()
            parser.do_read()

    def run(self, seconds: float) -> float:
        """Packets per second."""
        send, flush, receive, clock = (
            self._sender.send,
            self._sender.do_write,
            self._receiver.do_read,
            time.perf_counter,
        )
        before, start = self._guest.count, clock()
        while (spent := clock() - start) < seconds:
            for packet_id in range(GATHERED):
                send(BulkPacket(id=packet_id, endpoint=0x81, data=DATA))
            flush()
            receive()
        return (self._guest.count - before) / spent


class Loop:
    """Makes and takes tuples and bytes, as a parser does."""

    def run(self, seconds: float) -> float:
        """Rounds of the loop per second."""
        layout, count, clock = struct.Struct("<IIQ"), 0, time.perf_counter
        start = clock()
        while (spent := clock() - start) < seconds:
            for number in range(GATHERED):
                packet = layout.pack(number, number, number) + DATA
                layout.unpack_from(packet), packet[layout.size :]
            count += GATHERED
        return count / spent


WORK: dict[str, Callable[[], Pair | Loop]] = {
    "in memory": lambda: Pair(in_memory),
    "over sockets": lambda: Pair(over_sockets),
    "a loop without usbredir": Loop,
}
"""What a thread does."""


def together(make: Callable[[], Pair | Loop], number: int, seconds: float) -> float:
    """How much so many do per second, each in a thread of its own."""
    rates: list[float] = []
    barrier = threading.Barrier(number)

    def work() -> None:
        pair = make()
        pair.run(seconds / 10)
        barrier.wait(60)
        rates.append(pair.run(seconds))

    threads = [threading.Thread(target=work) for _ in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(rates) == number
    return sum(rates)


def main() -> int:
    """Measure and print JSON: how much one thread and two do per second, and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.5)
    arguments = parser.parse_args()
    rates: dict[str, dict[str, float]] = {}
    for name, make in WORK.items():
        rounds = [[together(make, number, arguments.seconds) for number in (1, 2)] for _ in range(arguments.rounds)]
        one, two = (statistics.median(values) for values in zip(*rounds, strict=True))
        ratio = statistics.median(b / a for a, b in rounds)
        rates[name] = {"one": round(one), "two": round(two), "ratio": round(ratio, 3)}
    gil = getattr(sys, "_is_gil_enabled", lambda: True)()
    print(json.dumps({"python": sys.version.split()[0], "gil": gil, "rates": rates}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
