"""The command: help, dispatch, exit codes; the demonstration and what it is made of.

``export`` and ``list`` have their own files. Most tests call main() in this process; what concerns standard streams and
the whole program runs it as a process.
"""

from __future__ import annotations

import io
import os
import re
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from usbredir import __version__, _describe, _listing, cli, demo
from usbredir._disk_client import DiskClient
from usbredir._ending import Failure
from usbredir.cli import ExitCode
from usbredir.errors import (
    DeviceError,
)
from usbredir.guest import Guest
from usbredir.packets import DeviceConnect
from usbredir.proto import Status
from usbredir.testing import linked_pair
from usbredir.virtual import LoopbackDevice, MassStorage

from .command_bed import Process, Run, call_main, guest_at, signals  # noqa: F401 - a fixture

PATIENCE = 60.0
"""Seconds that a process may take to start, answer or end on a busy machine."""
COMMAND = [sys.executable, "-m", "usbredir"]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "stick.img"
    path.write_bytes(bytes(range(256)) * 4096)
    return path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Calls main() in this process."""
    return lambda *arguments: call_main(capsys, *arguments)


# ================================================================ help


def test_help(run: Run) -> None:
    """What it is for, the commands, an example."""
    outcome = run("--help")
    assert outcome.code == ExitCode.OK
    for word in ("export", "list", "demo", "QEMU", "examples:", "127.0.0.1:4000"):
        assert word in outcome.out


def test_help_of_export(run: Run) -> None:
    """The options of usbredirect, the kinds of virtual devices, the exit codes, a word about safety."""
    outcome = run("export", "--help")
    assert outcome.code == ExitCode.OK
    for word in (
        "--device",
        "VID:PID",
        "BUS-DEV",
        "--virtual",
        "--as",
        "--to",
        "-k",
        "-v",
        "--once",
        "--wait",
        "--filter",
        "--log-format",
        "--port",
        "disk:FILE",
        "unix:",
    ):
        assert word in outcome.out
    assert "Anyone who can connect can use the device" in outcome.out
    for code in set(ExitCode) - {ExitCode.FAILED}:
        assert re.search(rf"\b{code:d} \w", outcome.out), f"exit code {code:d} is not told"


@pytest.mark.parametrize("command", ["list", "demo"])
def test_help_of_the_other_commands(run: Run, command: str) -> None:
    outcome = run(command, "--help")
    assert outcome.code == ExitCode.OK
    assert f"usbredir {command}" in outcome.out


def test_version(run: Run) -> None:
    outcome = run("--version")
    assert (outcome.code, outcome.out) == (ExitCode.OK, f"usbredir {__version__}\n")


def test_exit_codes() -> None:
    """Each situation has its own."""
    assert [code.value for code in ExitCode] == list(range(14))


@pytest.mark.parametrize("arguments", [(), ("nonsense",), ("list", "surplus"), ("demo", "--fast")])
def test_wrong_usage(run: Run, arguments: tuple[str, ...]) -> None:
    """Exit code 2; the message on standard error tells what would be right."""
    outcome = run(*arguments)
    assert outcome.code == ExitCode.USAGE
    assert "usage: usbredir" in outcome.err
    assert not outcome.out


def test_commands_that_fail(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their message on one line, their code."""

    def fail(options: object) -> int:
        raise Failure(ExitCode.DEVICE, "no libusb\nhere")

    monkeypatch.setattr(_listing, "list_devices", fail)
    outcome = run("list")
    assert (outcome.code, outcome.err) == (ExitCode.DEVICE, "usbredir: error: no libusb\\nhere\n")


def test_interrupted_while_it_starts(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a command has its own handlers."""

    def interrupt(options: object) -> int:
        signal.raise_signal(signal.SIGTERM)
        return 1

    monkeypatch.setattr(_listing, "list_devices", interrupt)
    outcome = run("list")
    assert (outcome.code, outcome.err) == (ExitCode.OK, "")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["list", "--filter", "-1,-1,-1,-1,0"], ["list", "--filter=-1,-1,-1,-1,0"]),
        (["list", "--filter", "3,-1,-1,-1,0"], ["list", "--filter", "3,-1,-1,-1,0"]),
        (["export", "--filter", "--once"], ["export", "--filter", "--once"]),
        (["-1,0"], ["-1,0"]),
    ],
)
def test_values_that_begin_with_a_minus(arguments: list[str], expected: list[str]) -> None:
    assert cli.joined(arguments) == expected


# ================================================================ as a process


def test_a_killed_exporter_loses_nothing_that_was_synced(image: Path) -> None:
    """WRITE(10), SYNCHRONIZE CACHE(10), SIGKILL: the block is in the file, and a new exporter serves it."""
    block = b"synced! " * 64
    size = image.stat().st_size
    assert block not in image.read_bytes()

    def command(guest: Guest, cdb: bytes, data: bytes = b"") -> None:
        wrapper = struct.pack("<4sIIBBB16s", b"USBC", 1, len(data), 0, 0, len(cdb), cdb)
        for piece in [wrapper, data] if data else [wrapper]:
            assert guest.bulk_out(0x02, piece, timeout=PATIENCE).status == Status.SUCCESS
        assert bytes(guest.bulk_in(0x81, 13, timeout=PATIENCE).data)[12] == 0

    with Process("--virtual", f"disk:{image}", "--as", "127.0.0.1:0") as exporter:
        connection, guest = guest_at(exporter.address())
        with connection, guest:
            guest.wait_for_device(PATIENCE)
            DiskClient(guest).test_unit_ready()  # takes the unit attention of the reset
            command(guest, struct.pack(">BBIBHB", 0x2A, 0, 3, 0, 1, 0), block)
            command(guest, struct.pack(">BBIBHB", 0x35, 0, 0, 0, 0, 0))
            exporter.process.kill()
            exporter.process.wait(PATIENCE)
    assert image.read_bytes()[3 * 512 : 4 * 512] == block
    assert image.stat().st_size == size
    with Process("--virtual", f"disk:{image}", "--as", "127.0.0.1:0") as exporter:
        connection, guest = guest_at(exporter.address())
        with connection, guest:
            guest.wait_for_device(PATIENCE)
            disk = DiskClient(guest)
            disk.test_unit_ready()
            assert disk.read_blocks(3, 1) == block


def test_demo_as_a_process() -> None:
    """Within 15 seconds on a busy machine (5 on an idle one): device, files, MB/s, latency."""
    started = time.monotonic()
    finished = subprocess.run([*COMMAND, "demo"], capture_output=True, text=True, timeout=PATIENCE, check=False)
    spent = time.monotonic() - started
    assert finished.returncode == ExitCode.OK, finished.stderr
    assert not finished.stderr
    for pattern in (
        r"A virtual USB stick of 16 MiB is exported on 127\.0\.0\.1:\d+",
        r"Device 0525:a4a5 ",
        r"Interface 0\.0  mass storage",
        r"README\.TXT +\d+ bytes  sha256 [0-9a-f]{16}",
        r"hello world\.txt +14 bytes",
        r"PICTURE\.BIN +524,288 bytes",
        r"This stick is made of Python",
        r"Sequential reads of 1 MiB: \d+ MB/s",
        r"half within \d+ us, 99 % within \d+ us",
        r"\d+ packets, [\d,]+ bytes received, [\d,]+ sent",
    ):
        assert re.search(pattern, finished.stdout), pattern
    assert "\r" not in finished.stdout, "a progress bar that moves is for terminals"
    assert spent < 15


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a closed pipe is another error there")
def test_output_that_nobody_reads() -> None:
    """``usbredir --help | head -1``: no traceback."""
    finished = subprocess.run(
        f"{sys.executable} -m usbredir --help | head -1",
        shell=True,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert finished.stdout.startswith("usage: usbredir")
    assert "Traceback" not in finished.stderr


# ================================================================ what the demonstration is made of


def test_a_device_as_text() -> None:
    host, guest = linked_pair(LoopbackDevice(serial="S\x1b1"))
    with host, guest:
        lines = list(_describe.describe_device(guest))
    assert lines[:5] == [
        "Device 1209:0001  usbredir Loopback",
        "  serial number  S\\x1b1",
        "  release        12.34",
        "  speed          high speed (480 Mbit/s)",
        "  Configuration 1",
    ]
    assert "    Interface 1.2  vendor specific 00/00" in lines
    assert "      Endpoint 0x84 IN   iso        3072 bytes per packet" in lines
    assert "      Endpoint 0x02 OUT  bulk       512 bytes per packet" in lines


@pytest.mark.parametrize("speed", [7, 200])
def test_a_device_of_unknown_speed_as_text(speed: int) -> None:
    host, guest = linked_pair(LoopbackDevice())
    with host, guest:
        assert guest.device is not None
        guest._exchange.device = DeviceConnect(speed=speed)
        assert "  speed          unknown" in list(_describe.describe_device(guest))


def test_a_disk_client() -> None:
    content = bytes(range(256)) * 256
    host, guest = linked_pair(MassStorage(content))
    with host, guest:
        disk = DiskClient(guest)
        disk.test_unit_ready()
        assert disk.test_unit_ready()
        assert (disk.inquiry().vendor, disk.inquiry().product) == ("usbredir", "Virtual Disk")
        assert disk.capacity() == (128, 512)
        assert disk.read_blocks(3, 2) == content[1536:2560]
        assert disk.read(700, 1000) == content[700:1700]
        with pytest.raises(DeviceError, match="0x28"):
            disk.read_blocks(128, 1)
        assert disk.read_blocks(0, 1) == content[:512], "usable after an error"


def test_a_disk_client_at_another_device() -> None:
    """Something that is no disk: DeviceError, not nonsense."""
    host, guest = linked_pair(LoopbackDevice())
    with host, guest, pytest.raises(DeviceError):
        DiskClient(guest, in_endpoint=0x82).inquiry()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("kind", "lines"), [(Terminal, 3), (io.StringIO, 1)])
def test_progress(kind: type[io.StringIO], lines: int) -> None:
    """On a terminal it moves; elsewhere only its end is shown."""
    output = kind()
    show = demo._progress(output)
    for share in (0.0, 0.5, 1.0):
        show(share, "text")
    assert output.getvalue().count("%") == lines
    assert output.getvalue().endswith("[################################] 100% text")
