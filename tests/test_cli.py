"""The command: help, messages, exit codes; the demonstration and what it is made of.

Most tests call main() in this process, with the serving replaced where only its outcome matters; what concerns
signals, standard streams and the whole program runs it as a process.
"""

from __future__ import annotations

import io
import os
import re
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import libusb_package
import pytest
import usb.core

from usbredir import __version__, _describe, cli, demo, transport
from usbredir._disk_client import DiskClient
from usbredir.cli import ExitCode, main
from usbredir.errors import (
    DeviceClaimError,
    DeviceError,
    DeviceLostError,
    DeviceRejectedError,
    RemoteProtocolError,
)
from usbredir.guest import Guest
from usbredir.packets import DeviceConnect
from usbredir.parser import LogLevel, escape
from usbredir.proto import Speed, Status
from usbredir.testing import linked_pair
from usbredir.transport import Connection, GuestConnection, connect, listen
from usbredir.virtual import LoopbackDevice, MassStorage

from .strategies import raw_packet

PATIENCE = 60.0
"""Seconds that a process may take to start, answer or end on a busy machine."""
COMMAND = [sys.executable, "-m", "usbredir"]


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """main() sets handlers: put back what was there."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "stick.img"
    path.write_bytes(bytes(range(256)) * 4096)
    return path


class Outcome:
    """What a run of the command gave."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code = code
        self.out = out
        self.err = err


Run = Callable[..., Outcome]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Calls main() in this process."""

    def call(*arguments: object) -> Outcome:
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return call


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
        "VID:PID|BUS-DEV",
        "--virtual",
        "--as",
        "--to",
        "-k",
        "-v",
        "--once",
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


def test_exit_codes_are_documented() -> None:
    """In the module's docstring, each with its number."""
    assert cli.__doc__ is not None
    numbers = set(map(int, re.findall(r"(?<![\w./])(\d)(?= [a-z])", cli.__doc__)))
    assert numbers == set(ExitCode)
    assert [code.value for code in ExitCode] == list(range(8))


# ================================================================ wrong usage and things that are not there

LOOP = ("export", "--virtual", "loopback")
HERE = ("--as", "127.0.0.1:0")

USAGE: list[tuple[tuple[str, ...], str]] = [
    ((), "COMMAND"),
    (("nonsense",), "nonsense"),
    (("export",), "--virtual"),
    (("export", *HERE), "--virtual"),
    (LOOP, "--as"),
    ((*LOOP, *HERE, "--to", "127.0.0.1:1"), "not allowed with"),
    ((*LOOP, "--device", "1-1", *HERE), "not allowed with"),
    ((*LOOP, *HERE, "--speed", "warp"), "warp"),
    ((*LOOP, *HERE, "-v", "loud"), "loud"),
    ((*LOOP, *HERE, "surplus"), "surplus"),
    ((*LOOP, "--as", "nonsense"), "HOST:PORT"),
    ((*LOOP, "--to", "nonsense"), "HOST:PORT"),
    ((*LOOP, "--as", "::1:4000"), "[::1]:4000"),
    ((*LOOP, "--as", "unix:"), "unix:/run"),
    ((*LOOP, "--as", "127.0.0.1:70000"), "65535"),
    (("export", "--virtual", "toaster", *HERE), "disk:FILE"),
    (("export", "--virtual", "disk", *HERE), "disk:FILE"),
    (("export", "--virtual", "disk:", *HERE), "disk:FILE"),
    (("export", "--virtual", "loopback:x", *HERE), "loopback"),
]


@pytest.mark.parametrize(("arguments", "told"), USAGE, ids=[" ".join(row[0]) or "nothing" for row in USAGE])
def test_wrong_usage(run: Run, arguments: tuple[str, ...], told: str) -> None:
    """Exit code 2; the message on standard error tells what would be right."""
    outcome = run(*arguments)
    assert outcome.code == ExitCode.USAGE
    assert "usbredir" in outcome.err
    assert told in outcome.err
    assert "Traceback" not in outcome.err
    assert not outcome.out


def test_an_image_that_is_missing(run: Run, tmp_path: Path) -> None:
    """Cause and remedy."""
    path = tmp_path / "no such.img"
    for option in (f"disk:{path}", f"disk:{path},ro"):
        outcome = run("export", "--virtual", option, *HERE)
        assert outcome.code == ExitCode.DEVICE
        assert f"{path}: No such file" in outcome.err
        assert f"truncate -s 64M {path}" in outcome.err
        assert outcome.err.count("\n") == 1


@pytest.mark.parametrize("content", [None, b""])
def test_an_image_that_is_none(run: Run, tmp_path: Path, content: bytes | None) -> None:
    """A directory, an empty file."""
    path = tmp_path / "image"
    path.mkdir() if content is None else path.write_bytes(content)
    outcome = run("export", "--virtual", f"disk:{path}", *HERE)
    assert outcome.code == ExitCode.DEVICE
    assert str(path) in outcome.err


def test_real_devices_are_not_in_this_version(run: Run) -> None:
    outcome = run("export", "--device", "1-1", *HERE)
    assert outcome.code == ExitCode.DEVICE
    assert "--virtual" in outcome.err


def test_a_port_in_use(run: Run) -> None:
    with listen("127.0.0.1:0") as listener:
        outcome = run(*LOOP, "--as", listener.address)
        assert outcome.code == ExitCode.ADDRESS
        assert str(listener.address) in outcome.err
        assert "another port" in outcome.err


def test_nobody_answers(run: Run) -> None:
    with listen("127.0.0.1:0") as listener:
        where = listener.address
    outcome = run(*LOOP, "--to", where)
    assert outcome.code == ExitCode.ADDRESS
    assert "Connection refused" in outcome.err
    assert "is the virtual machine listening there?" in outcome.err


@pytest.mark.parametrize("option", ["--as", "--to"])
def test_a_unix_socket_that_cannot_be_had(run: Run, tmp_path: Path, option: str) -> None:
    outcome = run(*LOOP, option, f"unix:{tmp_path}/missing/usb.sock")
    assert outcome.code == ExitCode.ADDRESS
    assert "No such file" in outcome.err


# ================================================================ how serving ends


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (None, ExitCode.OK),
        (ConnectionResetError(104, "Connection reset by peer"), ExitCode.OK),
        (DeviceRejectedError("the guest refuses"), ExitCode.REJECTED),
        (DeviceLostError("the device is lost"), ExitCode.LOST),
        (DeviceClaimError("busy: close the other program"), ExitCode.DEVICE),
        (DeviceError("its descriptors make no sense"), ExitCode.DEVICE),
        (RemoteProtocolError("bad packet\x1b[31m"), ExitCode.PROTOCOL),
        (KeyboardInterrupt(), ExitCode.OK),
    ],
)
def test_exit_codes_of_serving(
    run: Run, monkeypatch: pytest.MonkeyPatch, error: BaseException | None, code: ExitCode
) -> None:
    """With --once it is that of the first guest; the reason is told, without control characters."""

    def serve(*arguments: object, **options: object) -> None:
        if error is not None:
            raise error

    monkeypatch.setattr(transport, "serve", serve)
    with listen("127.0.0.1:0") as listener:
        outcome = run(*LOOP, "--to", listener.address, "--once")
    assert outcome.code == code
    lines = outcome.err.splitlines()
    assert lines[0] == f"usbredir: connected to {listener.address}"
    assert all(line.startswith("usbredir: ") and line.isprintable() for line in lines)
    if error is not None and not isinstance(error, KeyboardInterrupt):
        assert escape(str(error).partition("] ")[2] or str(error)) in lines[-1]


def test_options_reach_the_device_and_the_connection(run: Run, monkeypatch: pytest.MonkeyPatch, image: Path) -> None:
    seen: list[Any] = []

    def serve(connection: Connection, device: Any, **options: Any) -> None:
        seen.extend((connection, device, options))
        for level in LogLevel:
            options["log"](level, f"level {level:d}")

    monkeypatch.setattr(transport, "serve", serve)
    kept_alive: list[Connection] = []
    monkeypatch.setattr(Connection, "keep_alive", lambda connection: kept_alive.append(connection))
    content = image.read_bytes()
    with listen("127.0.0.1:0") as listener:
        outcome = run(
            *("export", "--virtual", f"disk:{image},ro", "--speed", "super", "--to", listener.address),
            *("--once", "-k", "-v", "3"),
        )
    assert outcome.code == ExitCode.OK
    connection, device, _ = seen
    assert isinstance(device, MassStorage)
    assert device.speed is Speed.SUPER
    assert kept_alive == [connection]
    assert [number for number in range(6) if f"level {number}" in outcome.err] == [0, 1, 2, 3]
    assert connection.fileno() == -1, "the connection is closed"
    assert not device.pollfds(), "the device is closed"
    assert image.read_bytes() == content


def test_connecting_again(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the guest has left; with waits that double, until somebody answers again."""
    where = ""
    waits: list[float] = []
    served = 0
    listener = listen("127.0.0.1:0")
    where = str(listener.address)

    def serve(*arguments: object, **options: object) -> None:
        nonlocal served
        served += 1
        listener.close()
        if served == 2:
            raise KeyboardInterrupt

    def sleep(seconds: float) -> None:
        nonlocal listener
        waits.append(seconds)
        if len(waits) == 7:
            listener = listen(where)

    monkeypatch.setattr(transport, "serve", serve)
    monkeypatch.setattr(cli, "time", SimpleNamespace(sleep=sleep))
    outcome = run(*LOOP, "--to", where)
    listener.close()
    assert outcome.code == ExitCode.OK
    assert served == 2
    for wait, least in zip(waits, [0.5, 1, 2, 4, 8, 10, 10], strict=True):
        assert least <= wait <= least * 1.25


def test_serving_a_guest_that_waits(run: Run) -> None:
    """--to with a real guest, which leaves."""
    results: list[object] = []
    with listen("127.0.0.1:0") as listener:

        def use() -> None:
            connection = listener.accept(PATIENCE)
            assert connection is not None
            with connection, Guest(GuestConnection(connection)) as guest:
                guest.wait_for_device(PATIENCE)
                results.append(guest.bulk_out(0x02, b"x", timeout=PATIENCE).status)

        thread = threading.Thread(target=use)
        thread.start()
        outcome = run(*LOOP, "--to", listener.address, "--once")
        thread.join(PATIENCE)
    assert outcome.code == ExitCode.OK
    assert results == [Status.SUCCESS]
    assert "guest left" in outcome.err


# ================================================================ as a process


class Exporter:
    """A running ``usbredir export``; ended by the end of the with block."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [*COMMAND, "export", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines: list[str] = []

    def __enter__(self) -> Exporter:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def line_with(self, text: str) -> str:
        """The next line of standard error that contains *text*; the process may write others before."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if text in line:
                return line
        raise AssertionError(f"no line with {text!r} in {self.lines}")

    def address(self) -> str:
        return self.line_with("listening on").split()[-1]

    def end(self) -> int:
        """Wait for the end: the exit code."""
        _, err = self.process.communicate(timeout=PATIENCE)
        self.lines += err.splitlines(keepends=True)
        return self.process.returncode


def guest_at(address: str) -> tuple[Connection, Guest]:
    connection = connect(address, PATIENCE)
    return connection, Guest(GuestConnection(connection))


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

    with Exporter("--virtual", f"disk:{image}", "--as", "127.0.0.1:0") as exporter:
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
    with Exporter("--virtual", f"disk:{image}", "--as", "127.0.0.1:0") as exporter:
        connection, guest = guest_at(exporter.address())
        with connection, guest:
            guest.wait_for_device(PATIENCE)
            disk = DiskClient(guest)
            disk.test_unit_ready()
            assert disk.read_blocks(3, 1) == block


def test_once(image: Path) -> None:
    """A guest reads the disk over TCP; the process ends when it has left."""
    with Exporter("--virtual", f"disk:{image}", "--as", "127.0.0.1:0", "--once") as exporter:
        connection, guest = guest_at(exporter.address())
        with connection, guest:
            guest.wait_for_device(PATIENCE)
            disk = DiskClient(guest)
            disk.test_unit_ready()
            assert disk.read(0, 512) == image.read_bytes()[:512]
        assert exporter.end() == ExitCode.OK
    text = "".join(exporter.lines)
    assert "guest connected from 127.0.0.1:" in text
    assert "guest left" in text
    assert "Traceback" not in text


def test_one_guest_after_the_other_and_one_at_a_time() -> None:
    """Without --once; a second guest is turned away, with a message."""
    with Exporter("--virtual", "loopback", "--as", "127.0.0.1:0") as exporter:
        address = exporter.address()
        for _ in range(2):
            connection, guest = guest_at(address)
            with connection, guest:
                guest.wait_for_device(PATIENCE)
                second = connect(address, PATIENCE)
                assert transport.poll([(second.fileno(), 1)], PATIENCE)
                assert second.read(1) == b""
                second.close()
                exporter.line_with("turned away")
                assert guest.bulk_out(0x02, b"x", timeout=PATIENCE).status == Status.SUCCESS
            exporter.line_with("guest left")
        exporter.process.send_signal(signal.SIGTERM)
        assert exporter.end() == ExitCode.OK


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
@pytest.mark.parametrize("serving", [False, True], ids=["while it waits", "while it serves"])
def test_ended_by_a_signal(number: signal.Signals, serving: bool, tmp_path: Path) -> None:
    """Exit code 0, no traceback; the Unix socket is removed; the guest sees the end of the connection."""
    path = tmp_path / "usb.sock"
    with Exporter("--virtual", "loopback", "--as", f"unix:{path}") as exporter:
        assert exporter.address() == f"unix:{path}"
        if serving:
            connection, guest = guest_at(f"unix:{path}")
            guest.wait_for_device(PATIENCE)
        exporter.process.send_signal(number)
        assert exporter.end() == ExitCode.OK
        assert "Traceback" not in "".join(exporter.lines)
        assert not path.exists()
        if serving:
            assert transport.poll([(connection.fileno(), 1)], PATIENCE)
            while connection.read(1 << 16):
                pass
            connection.close()
            guest.close()


@pytest.mark.parametrize(
    ("act", "code"),
    [
        (lambda connection, guest: guest.reject(), ExitCode.REJECTED),
        (lambda connection, guest: connection.write(memoryview(raw_packet(99))), ExitCode.PROTOCOL),
    ],
    ids=["refuses", "breaks the protocol"],
)
def test_guests_that_end_it(act: Callable[[Connection, Guest], object], code: ExitCode) -> None:
    with Exporter("--virtual", "loopback", "--as", "127.0.0.1:0", "--once") as exporter:
        connection, guest = guest_at(exporter.address())
        with connection, guest:
            guest.wait_for_device(PATIENCE)
            act(connection, guest)
            assert exporter.end() == code
    assert exporter.lines[-1].startswith("usbredir: ")


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


def test_list_as_a_process() -> None:
    finished = subprocess.run([*COMMAND, "list"], capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert finished.returncode == ExitCode.OK, finished.stderr
    assert finished.stdout.splitlines()[0].split() == ["bus-dev", "ids", "speed", "class"]
    assert "virtual: disk:FILE  loopback" in finished.stdout


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


# ================================================================ list


def found(*devices: tuple[int, int, int, int, int | None, int]) -> Callable[..., Any]:
    """Stands in for usb.core.find."""
    names = ("bus", "address", "idVendor", "idProduct", "speed", "bDeviceClass")
    return lambda **_: iter([SimpleNamespace(**dict(zip(names, device, strict=True))) for device in devices])


def test_list_of_real_devices(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sorted; speeds and classes by name, also unknown ones."""
    monkeypatch.setattr(libusb_package, "get_libusb1_backend", lambda: object())
    monkeypatch.setattr(
        usb.core,
        "find",
        found((2, 1, 0x1D6B, 3, 4, 9), (1, 12, 0x46D, 0xC31C, 1, 0), (1, 2, 0xABCD, 0xEF01, None, 0x77)),
    )
    outcome = run("list")
    assert outcome.code == ExitCode.OK
    assert outcome.out.splitlines()[1:4] == [
        "1-2      abcd:ef01  unknown                  by interface",
        "1-12     046d:c31c  low speed (1.5 Mbit/s)   by interface",
        "2-1      1d6b:0003  super speed (5 Gbit/s)   hub",
    ]


def test_list_without_devices(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libusb_package, "get_libusb1_backend", lambda: object())
    monkeypatch.setattr(usb.core, "find", found())
    assert "(no real devices)" in run("list").out


def test_list_without_libusb(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libusb_package, "get_libusb1_backend", lambda: None)
    outcome = run("list")
    assert outcome.code == ExitCode.DEVICE
    assert "libusb-package" in outcome.err


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
        guest.device = DeviceConnect(speed=speed)
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
