"""PtySerialPort: a guest at one end, a terminal of this machine at the other."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from usbredir.guest import Guest
from usbredir.proto import Speed, Status
from usbredir.testing import check_device, linked_pair
from usbredir.virtual.serial_pty import PtySerialPort

pytestmark = pytest.mark.skipif(not hasattr(os, "openpty"), reason="there are no pseudo-terminals")

PATIENCE = 60.0
MUCH = random.Random(6).randbytes(200_000)
"""More than all buffers on the way hold, with every byte that a terminal could change."""


@pytest.fixture
def port(tmp_path: Path) -> Iterator[PtySerialPort]:
    port = PtySerialPort(tmp_path / "line")
    yield port
    port.close()


@pytest.fixture
def guest(port: PtySerialPort) -> Iterator[Guest]:
    host, guest = linked_pair(port)
    guest.wait_for_device()
    yield guest
    guest.close()
    host.close()


@pytest.fixture
def terminal(port: PtySerialPort) -> Iterator[int]:
    """Give the terminal, opened as another program would."""
    descriptor = os.open(port.path, os.O_RDWR | os.O_NOCTTY)
    yield descriptor
    os.close(descriptor)


def test_to_the_guest(guest: Guest, terminal: int) -> None:
    """All bytes arrive, unchanged, though the guest fetches them slowly."""

    def write() -> None:
        rest = MUCH
        while rest:
            rest = rest[os.write(terminal, rest) :]

    thread = threading.Thread(daemon=True, target=write)
    thread.start()
    fetched = b""
    while len(fetched) < len(MUCH):
        status, data = guest.bulk_in(0x81, 10_000, timeout=PATIENCE)
        assert status == Status.SUCCESS
        fetched += bytes(data)
    thread.join(PATIENCE)
    assert fetched == MUCH


def test_from_the_guest(guest: Guest, terminal: int) -> None:
    """The guest waits until a program reads."""
    read = bytearray()

    def read_all() -> None:
        while len(read) < len(MUCH):
            read.extend(os.read(terminal, 1000))

    thread = threading.Thread(daemon=True, target=read_all)
    thread.start()
    for start in range(0, len(MUCH), 20_000):
        assert guest.bulk_out(0x01, MUCH[start : start + 20_000], timeout=PATIENCE).status == Status.SUCCESS
    thread.join(PATIENCE)
    assert read == MUCH


def test_a_program_may_come_and_go(port: PtySerialPort, guest: Guest) -> None:
    """What the guest wrote meanwhile waits."""
    for number in range(2):
        guest.bulk_out(0x01, b"%d" % number)
        with open(port.path, "rb", buffering=0) as terminal:
            assert terminal.read(1) == b"%d" % number


def test_the_link(tmp_path: Path) -> None:
    """An old link is replaced; what is no link is not. It goes at the end, unless somebody else has made it anew."""
    link = tmp_path / "line"
    link.symlink_to("nowhere")
    first = PtySerialPort(link)
    assert os.readlink(link) == first.path
    second = PtySerialPort(link)
    first.close()
    first.close()
    assert os.readlink(link) == second.path
    second.close()
    assert not link.is_symlink()
    link.touch()
    with pytest.raises(FileExistsError):
        PtySerialPort(link)


def test_closing_with_bytes_on_the_way(tmp_path: Path) -> None:
    """Neither thread keeps it from ending, and no file stays open."""
    before = os.listdir("/proc/self/fd") if os.path.exists("/proc/self/fd") else []
    port = PtySerialPort()
    terminal = os.open(port.path, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
    port.received(bytes(port.buffer_limit))
    os.write(terminal, bytes(1000))
    port.unplug()
    os.close(terminal)
    port.close()
    assert not [thread for thread in threading.enumerate() if port.path in thread.name]
    if before:
        assert len(os.listdir("/proc/self/fd")) <= len(before)


def test_conformance() -> None:
    check_device(lambda: PtySerialPort(speed=Speed.FULL, serial="1"))


def test_low_speed_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="low speed"):
        PtySerialPort(tmp_path / "line", speed=Speed.LOW)
    assert not (tmp_path / "line").is_symlink()
