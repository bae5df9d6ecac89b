"""Sockets read and written with time limits."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from usbredir._channel import Channel

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


def in_time() -> float:
    return time.monotonic() + PATIENCE


@given(st.lists(st.binary(max_size=20).filter(lambda line: b"\n" not in line), max_size=5), st.binary(max_size=100))
def test_lines_and_counted_bytes(lines: list[bytes], rest: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"".join(line + b"\n" for line in lines) + rest)
        theirs.close()
        channel = Channel(ours)
        assert [channel.line(in_time()) for _ in lines] == lines
        assert channel.exactly(len(rest), in_time()) == rest
        with pytest.raises(EOFError):
            channel.exactly(1, in_time())


def test_a_line_that_is_cut_short_by_a_limit_is_not_lost(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = ends
    channel = Channel(ours)
    theirs.sendall(b"half a ")
    with pytest.raises(TimeoutError):
        channel.line(time.monotonic() + SOON)
    theirs.sendall(b"line\n")
    assert channel.line(in_time()) == b"half a line"


@pytest.mark.parametrize("descriptors", [[], [0]])
def test_sending_has_a_limit_and_sees_the_end(
    descriptors: list[int], ends: tuple[socket.socket, socket.socket]
) -> None:
    ours, theirs = ends
    channel = Channel(ours)
    with pytest.raises(TimeoutError):
        channel.send(bytes(1 << 24), time.monotonic() + SOON)
    theirs.close()
    with pytest.raises(EOFError):
        channel.send(b"x", in_time(), descriptors=descriptors)
