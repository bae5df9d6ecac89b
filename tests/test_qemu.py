"""End to end: a Linux guest in QEMU uses a virtual disk that `usbredir export` shares.

Takes about a quarter of a minute for each test, so only with USBREDIR_QEMU=1 in the environment.
"""

import hashlib
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from usbredir.virtual.fat import make_image, read_files

from .qemu.build_guest import GuestImage, build_guest, exclusive_use, missing_tools
from .qemu.guest import QEMU, Controller, LinuxGuest, UsbSource, connect_to, listen_on

pytestmark = pytest.mark.qemu

FILES = {
    "HELLO.TXT": b"Hello from the host.\n",
    "empty": b"",
    "random numbers, about 3 MB.bin": random.Random(1).randbytes(3_000_001),
}
DISK_SIZE = 16 * 1024 * 1024
PATIENCE = 30.0
"""Seconds that an exporter may take to start or to end."""


class Exporter:
    """A running `usbredir export`; a context manager, which always ends it."""

    def __init__(self, disk: Path, log: Path, *arguments: str) -> None:
        self._log = log
        command = [sys.executable, "-m", "usbredir", "export", "--virtual", f"disk:{disk}", *arguments]
        with open(log, "wb") as output:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)

    def __enter__(self) -> "Exporter":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        print(f"--- exporter ---\n{self.output()}")  # pytest shows it after a failure

    def output(self) -> str:
        """Return what it has written up to now."""
        return self._log.read_text(errors="replace")

    def address(self) -> tuple[str, int]:
        """Wait until it listens, and return host and port."""
        end = time.monotonic() + PATIENCE
        while True:
            found = re.search(r"listening on ([0-9.]+):([0-9]+)$", self.output(), re.MULTILINE)
            if found:
                return found[1], int(found[2])
            assert self._process.poll() is None, "the exporter ended"
            assert time.monotonic() < end, "the exporter does not listen"
            time.sleep(0.05)

    def interrupt(self) -> int:
        """Press Ctrl-C, so to say, and return the exit code."""
        self._process.send_signal(signal.SIGINT)
        return self._process.wait(PATIENCE)


@pytest.fixture
def guest_image() -> Iterator[GuestImage]:
    """Give the built guest; no other test has a guest meanwhile."""
    if os.environ.get("USBREDIR_QEMU") != "1":
        pytest.skip("takes long; set USBREDIR_QEMU=1")
    missing = [*missing_tools(), *([] if shutil.which(QEMU) else [QEMU])]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    with exclusive_use() as cache:
        yield build_guest(cache)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def start_exporter(role: str, disk: Path, log: Path, stack: ExitStack) -> tuple[Exporter, UsbSource]:
    """Start an exporter and return it, and how QEMU finds it. *stack* ends what was started.

    Args:
        role: 'listens' or 'connects', said of the exporter.

    """
    if role == "listens":
        exporter = stack.enter_context(Exporter(disk, log, "--as", "127.0.0.1:0"))
        return exporter, connect_to(exporter.address())
    listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    port = listener.getsockname()[1]
    return stack.enter_context(Exporter(disk, log, "--to", f"127.0.0.1:{port}")), listen_on(listener)


@pytest.mark.parametrize(("controller", "role"), [("xhci", "listens"), ("ehci", "listens"), ("xhci", "connects")])
def test_guest_reads_and_writes_an_exported_disk(
    controller: Controller, role: str, guest_image: GuestImage, tmp_path: Path
) -> None:
    """What the guest's own drivers read is what the image holds, and what they write arrives in the image."""
    original = make_image(FILES, size=DISK_SIZE, label="USBREDIR")
    disk = tmp_path / "disk.img"
    disk.write_bytes(original)

    with ExitStack() as stack:
        exporter, source = start_exporter(role, disk, tmp_path / "exporter.log", stack)
        guest = stack.enter_context(LinuxGuest(guest_image, source, tmp_path, controller=controller))
        report = guest.finish()
        assert exporter.interrupt() == 0

    given = {name: sha256(data) for name, data in FILES.items()}
    assert report["size"] == str(DISK_SIZE)
    assert report["write_protected"] == "0"
    assert report["disk"] == sha256(original)
    assert report.checksums("file") == given

    written = report.checksums("written")
    assert set(written) == {"written by the guest.bin", "copy.bin"}
    assert written["copy.bin"] in given.values()
    assert report.checksums("reread") == given | written

    changed = disk.read_bytes()
    assert report["disk_after"] == sha256(changed)
    found = read_files(lambda offset, length: changed[offset : offset + length])
    assert {name: sha256(data) for name, data in found.items()} == given | written
