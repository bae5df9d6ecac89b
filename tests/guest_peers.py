"""The hosts that one suite of guests runs against: in memory, our exporter, and usbredirect 0.15.

The two processes have a real libusb on the virtual USB bus (``vusb``); the device in memory is the same one, written
in Python. What is known to differ is told by :class:`Peer`'s attributes, so that a test that allows it says so.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from usbredir.filter import FilterRule
from usbredir.guest import Guest
from usbredir.parser import VERSION
from usbredir.proto import Speed
from usbredir.testing import linked_pair
from usbredir.transport import Connection, GuestConnection, connect
from usbredir.virtual import LoopbackDevice

from . import odd_peers, vusb
from .command_bed import Process

__all__ = ["PEERS", "PATIENCE", "Exporter", "Memory", "Peer", "Usbredirect", "ProcessPeer"]

PATIENCE = 60.0
"""Seconds that anything may take on a busy machine."""
LOOP_IN = 0x81
_Served = contextlib.AbstractContextManager[tuple[Connection, "subprocess.Popen[str]"]]
SPEEDS = {Speed.FULL: "full", Speed.HIGH: "high", Speed.SUPER: "super"}


class Peer:
    """A host with the test device at some speed.

    Attributes:
        version: what it calls itself.
        product: the device's second string.
        interface_classes: of the device's interfaces.
        forgets: a reset empties the device.
        separates_streams: each bulk stream is a loop of its own.
        heeds_rules: it refuses guests whose rules forbid the device.
    """

    version = VERSION
    product = "virtual test device"
    interface_classes = (0xFF, 0xFE)
    forgets = False
    separates_streams = False
    heeds_rules = True

    def open(self, speed: Speed = Speed.HIGH, *, alone: bool = False) -> contextlib.AbstractContextManager[Guest]:
        """A guest with the device, in its first configuration and its loop empty.

        alone: nobody uses the device later: it may be unplugged, and what serves it be ended.
        """
        raise NotImplementedError

    def close(self) -> None:
        """End what serves."""


class Memory(Peer):
    """``linked_pair``: no socket, no thread, no libusb."""

    product = "Loopback"
    interface_classes = (0xFF, 0xFF)
    forgets = True
    separates_streams = True

    @contextlib.contextmanager
    def open(self, speed: Speed = Speed.HIGH, *, alone: bool = False) -> Iterator[Guest]:
        """A new device."""
        device = LoopbackDevice(speed=speed)
        host, guest = linked_pair(device)
        with contextlib.closing(device), host, guest:
            yield guest


class ProcessPeer(Peer):
    """A peer at the other end of a TCP connection."""

    @contextlib.contextmanager
    def connect(
        self, *, alone: bool = False, background: bool = False, rules: Sequence[FilterRule] = ()
    ) -> Iterator[tuple[Guest, subprocess.Popen[str]]]:
        """A guest with settings of its own, which waits for its device itself; and the process that it talks to."""
        with (
            self._connection(Speed.HIGH, alone) as (connection, process),
            connection,
            Guest(GuestConnection(connection), background=background, rules=rules) as guest,
        ):
            yield guest, process

    @contextlib.contextmanager
    def open(self, speed: Speed = Speed.HIGH, *, alone: bool = False) -> Iterator[Guest]:
        """A guest that finds nothing of former ones."""
        with (
            self._connection(speed, alone) as (connection, _),
            connection,
            Guest(GuestConnection(connection)) as guest,
        ):
            guest.wait_for_device(PATIENCE)
            guest.set_configuration(1, timeout=PATIENCE)
            while not guest.bulk_in(LOOP_IN, 1 << 20, timeout=0).status:
                pass  # messages that nobody took
            yield guest

    def _connection(self, speed: Speed, alone: bool) -> _Served:
        raise NotImplementedError


class Exporter(ProcessPeer):
    """``usbredir export``, for one guest after the other; a process for each speed."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self._shared: dict[Speed, tuple[Process, str]] = {}

    def close(self) -> None:
        """End the processes."""
        self._stack.close()

    @contextlib.contextmanager
    def _connection(self, speed: Speed, alone: bool) -> Iterator[tuple[Connection, subprocess.Popen[str]]]:
        with contextlib.ExitStack() as stack:
            if alone:
                process, address = self._start(stack, speed)
            else:
                if speed not in self._shared:
                    self._shared[speed] = self._start(self._stack, speed)
                process, address = self._shared[speed]
            yield connect(address, PATIENCE), process.process

    def _start(self, stack: contextlib.ExitStack, speed: Speed) -> tuple[Process, str]:
        # The bus keeps files in TMPDIR, which a process that dies leaves behind.
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="usbredir-"))
        environment = {**vusb.environment(speed=SPEEDS[speed]), "TMPDIR": directory}
        process = stack.enter_context(Process("--device", odd_peers.DEVICE, "--as", "127.0.0.1:0", env=environment))
        return process, process.address()


class Usbredirect(ProcessPeer):
    """C usbredirect 0.15, for one guest: a process for each."""

    version = "usbredir 0.15.0"
    heeds_rules = False

    def __init__(self, root: Path) -> None:
        self._root = root
        self._bus = odd_peers.bring_bus(root)

    @contextlib.contextmanager
    def _connection(self, speed: Speed, alone: bool) -> Iterator[tuple[Connection, subprocess.Popen[str]]]:
        with (
            tempfile.TemporaryDirectory(dir=self._root / "tmp", prefix="usbredir-") as directory,
            odd_peers.free_port() as port,
        ):
            command = ["chroot", str(self._root), "/usr/bin/env", f"LD_LIBRARY_PATH={self._bus}"]
            command += [f"VUSB_SPEED={SPEEDS[speed]}", f"TMPDIR=/tmp/{Path(directory).name}"]
            command += [f"LD_PRELOAD={self._bus}/libvusbfs.so"]
            command += ["usbredirect", "--device", odd_peers.DEVICE, "--as", f"127.0.0.1:{port}"]
            with odd_peers.running(command, {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}) as process:
                sock = odd_peers.connect(port, process)
                assert sock is not None, "usbredirect does not serve"
                yield Connection(sock, "usbredirect"), process


def _usbredirect() -> Usbredirect:
    root = os.environ.get("USBREDIR_PEER_ROOT")
    if root is None:
        pytest.skip("needs USBREDIR_PEER_ROOT, a folder with usbredirect 0.15; see tests/odd_peers.py")
    if os.geteuid() != 0 or shutil.which("chroot") is None:
        pytest.skip("usbredirect is started with chroot, as root")
    return Usbredirect(Path(root))


PEERS: dict[str, Callable[[], Peer]] = {"memory": Memory, "exporter": Exporter, "usbredirect": _usbredirect}
"""What the suite runs against. Making usbredirect skips the test where it is not installed."""
