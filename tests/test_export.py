"""``usbredir export``: whose command lines it takes, what it refuses and with which words, and how it ends."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import usb.core

from usbredir import _export, cli
from usbredir._ending import ExitCode, ending_signals
from usbredir.backends import _source
from usbredir.errors import DeviceClaimError, DeviceError, DeviceLostError, DeviceNotFoundError
from usbredir.exporter import Connecting, FactorySource, Listening
from usbredir.guest import Guest
from usbredir.proto import Speed, Status
from usbredir.transport import POLLIN, Connection, GuestConnection, connect, listen, poll
from usbredir.virtual import LoopbackDevice

from . import vusb
from .command_bed import COMMAND, PATIENCE, Outcome, Process, Run, call_main, guest_at, signals  # noqa: F401 - a fixture
from .strategies import raw_packet

LOOP = ("--virtual", "loopback")
HERE = ("--as", "127.0.0.1:0")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Calls main() in this process."""
    return lambda *arguments: call_main(capsys, "export", *arguments)


def parsed(line: str) -> argparse.Namespace:
    return cli._parser().parse_args(cli.joined(["export", *line.split()]))


def pairs(line: str) -> list[tuple[str, str, str, str]]:
    """(option, device, option, address) as the command understands them."""
    return [(*device, *address) for device, address in _export._pair(parsed(line))]


# ================================================================ the two command lines we take over

D, A, T = "--device", "--as", "--to"
ANY = "[::]" if socket.has_dualstack_ipv6() else "0.0.0.0"

USBREDIRECT = [
    ("--device 0781:5567 --as 127.0.0.1:4000", (D, "0781:5567", A, "127.0.0.1:4000"), 2),
    ("--device=0781:5567 --as=127.0.0.1:4000", (D, "0781:5567", A, "127.0.0.1:4000"), 2),
    ("--device 0x0781:0x5567 --to vm.example:4000", (D, "0x0781:0x5567", T, "vm.example:4000"), 2),
    ("--device 1-4 --to 127.0.0.1:4000 -k", (D, "1-4", T, "127.0.0.1:4000"), 2),
    ("-k --device 1-4 --to=127.0.0.1:4000", (D, "1-4", T, "127.0.0.1:4000"), 2),
    ("--to 127.0.0.1:4000 --keepalive --device 1-4 --verbose 5", (D, "1-4", T, "127.0.0.1:4000"), 5),
    ("--verbose=0 --keepalive --as 10.0.0.1:4000 --device 1-4", (D, "1-4", A, "10.0.0.1:4000"), 0),
    ("-v 3 --device 1-4 --as 127.0.0.1:4000", (D, "1-4", A, "127.0.0.1:4000"), 3),
    ("-v3 --device 1-4 --as 127.0.0.1:4000", (D, "1-4", A, "127.0.0.1:4000"), 3),
    ("--device 1-4 --as 127.0.0.1:1 --to 127.0.0.1:2", (D, "1-4", T, "127.0.0.1:2"), 2),
    ("--device 1-4 --to 127.0.0.1:2 --as 127.0.0.1:1", (D, "1-4", T, "127.0.0.1:2"), 2),
]
USBREDIRSERVER = [
    ("1-4", (D, "1-4", A, f"{ANY}:4000"), 2),
    ("0781:5567", (D, "0781:5567", A, f"{ANY}:4000"), 2),
    ("-p 4001 1-4", (D, "1-4", A, f"{ANY}:4001"), 2),
    ("-p4001 1-4", (D, "1-4", A, f"{ANY}:4001"), 2),
    ("1-4 --port 4001", (D, "1-4", A, f"{ANY}:4001"), 2),
    ("--port=4001 -v 5 1-4", (D, "1-4", A, f"{ANY}:4001"), 5),
    ("-4 127.0.0.1 1-4", (D, "1-4", A, "127.0.0.1:4000"), 2),
    ("--ipv4 127.0.0.1 -p 4001 1-4", (D, "1-4", A, "127.0.0.1:4001"), 2),
    ("-6 ::1 1-4", (D, "1-4", A, "[::1]:4000"), 2),
    ("--ipv6=::1 --port 4001 0781:5567", (D, "0781:5567", A, "[::1]:4001"), 2),
    ("-k 60 1-4", (D, "1-4", A, f"{ANY}:4000"), 2),
    ("--keepalive 60 -p 4001 --verbose 4 -4 127.0.0.1 1-4", (D, "1-4", A, "127.0.0.1:4001"), 4),
]


@pytest.mark.parametrize(("line", "pair", "verbose"), USBREDIRECT + USBREDIRSERVER)
def test_command_lines_of_the_c_tools(line: str, pair: tuple[str, str, str, str], verbose: int) -> None:
    """usbredirect's and usbredirserver's, unchanged."""
    assert pairs(line) == [pair]
    assert parsed(line).verbose == verbose
    device, _ = _export._pair(parsed(line))[0]
    assert isinstance(_export._source(device, parsed(line)), _source.PyusbSource)


def test_several_devices_each_with_its_address() -> None:
    """In the order in which they are written."""
    line = "--device 1-4 --as unix:/a --virtual loopback --to [::1]:1 --fd 7 --as 127.0.0.1:2"
    assert pairs(line) == [
        (D, "1-4", A, "unix:/a"),
        ("--virtual", "loopback", T, "[::1]:1"),
        ("--fd", "7", A, "127.0.0.1:2"),
    ]


@pytest.mark.parametrize("line", ["--filter -1,-1,-1,-1,0", "--filter=-1,-1,-1,-1,0", "--filter 0x08,-1,-1,-1,1"])
def test_filters_may_begin_with_a_minus(line: str) -> None:
    rules = _export._settings(parsed(f"{line} --device 1-4 --as 127.0.0.1:0")).rules
    assert rules is not None
    assert len(rules) == 1


def test_settings() -> None:
    settings = _export._settings(parsed("--once --wait --peer-timeout 7.5 1-4"))
    assert (settings.once, settings.wait, settings.unanswered, settings.rules) == (True, True, 7.5, None)


def test_virtual_devices_are_made_as_asked_for() -> None:
    """Of the kind and speed, a new one each time; which kinds there are is told in test_virtual_kinds."""
    source = _export._source(_export.Wanted("--virtual", "loopback"), parsed("--speed super"))
    assert isinstance(source, FactorySource)
    first, second = source.open(), source.open()
    assert isinstance(first, LoopbackDevice)
    assert first is not second
    assert (first.speed, source.pollfds(), source.has_news()) == (Speed.SUPER, (), False)


def test_addresses_become_ends() -> None:
    listening = _export._peer(_export.Wanted("--as", "127.0.0.1:0"))
    connecting = _export._peer(_export.Wanted("--to", "127.0.0.1:1"))
    assert isinstance(listening, Listening)
    assert isinstance(connecting, Connecting)
    listening.close()


# ================================================================ what is refused

USAGE: list[tuple[tuple[str, ...], str]] = [
    ((), "--virtual"),
    (HERE, "--virtual"),
    (LOOP, "--as"),
    ((*LOOP, *HERE, *HERE), "1 device(s) and 2 address(es)"),
    ((*LOOP, "--device", "1-1", *HERE), "2 device(s) and 1 address(es)"),
    ((*LOOP, *HERE, "surplus"), "surplus"),
    (("--device", "nonsense", *HERE), "VID:PID"),
    (("nonsense",), "VID:PID"),
    (("--device", "1-2-3", *HERE), "BUS-DEV"),
    (("--fd", "x", *HERE), "--fd"),
    ((*LOOP, "--as", "nonsense"), "HOST:PORT"),
    ((*LOOP, "--to", "nonsense"), "HOST:PORT"),
    ((*LOOP, "--as", "::1:4000"), "[::1]:4000"),
    ((*LOOP, "--as", "unix:"), "unix:/run"),
    ((*LOOP, "--as", "127.0.0.1:70000"), "65535"),
    (("--virtual", "toaster", *HERE), "disk:FILE"),
    (("--virtual", "disk", *HERE), "disk:FILE"),
    (("--virtual", "disk:", *HERE), "disk:FILE"),
    (("--virtual", "loopback:x", *HERE), "loopback"),
    (("--virtual", "mouse:x", *HERE), "--virtual mouse:x: use mouse"),
    (("--virtual", "keyboard", *HERE), "keyboard:TEXT"),
    ((*LOOP, *HERE, "--filter", "nonsense"), "--filter: "),
]
ARGPARSE: list[tuple[tuple[str, ...], str]] = [
    ((*LOOP, *HERE, "--speed", "warp"), "warp"),
    ((*LOOP, *HERE, "-v", "loud"), "loud"),
    ((*LOOP, *HERE, "--log-format", "xml"), "xml"),
    ((*LOOP, *HERE, "--onc"), "--onc"),
]


@pytest.mark.parametrize(("arguments", "told"), USAGE + ARGPARSE, ids=lambda value: str(value)[:60])
def test_wrong_usage(run: Run, arguments: tuple[str, ...], told: str) -> None:
    """Exit code 2; the message on standard error tells what would be right."""
    outcome = run(*arguments)
    assert outcome.code == ExitCode.USAGE
    assert told in outcome.err
    assert "Traceback" not in outcome.err
    assert not outcome.out
    if (arguments, told) in USAGE:
        assert_one_line(outcome, ExitCode.USAGE)


def assert_one_line(outcome: Outcome, code: ExitCode) -> None:
    assert outcome.code == code
    assert re.fullmatch(r"usbredir: error: [^\n]+\n", outcome.err)
    assert outcome.err.rstrip("\n").isprintable()
    assert not outcome.out


def test_an_image_that_is_missing(run: Run, tmp_path: Path) -> None:
    """Cause and remedy."""
    path = tmp_path / "no such.img"
    for option in (f"disk:{path}", f"disk:{path},ro"):
        outcome = run("--virtual", option, *HERE)
        assert_one_line(outcome, ExitCode.DEVICE)
        assert f"{path}: No such file" in outcome.err
        assert f"truncate -s 64M {path}" in outcome.err


def test_without_facedancer(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Remedy."""
    monkeypatch.setitem(sys.modules, "facedancer", None)
    outcome = run("--virtual", "facedancer:my_devices:Mine", *HERE)
    assert_one_line(outcome, ExitCode.DEVICE)
    assert "pip install usbredir[facedancer]" in outcome.err


@pytest.mark.parametrize("content", [None, b""])
def test_an_image_that_is_none(run: Run, tmp_path: Path, content: bytes | None) -> None:
    """A directory, an empty file."""
    path = tmp_path / "image"
    path.mkdir() if content is None else path.write_bytes(content)
    outcome = run("--virtual", f"disk:{path}", *HERE)
    assert_one_line(outcome, ExitCode.DEVICE)
    assert str(path) in outcome.err


def test_a_port_in_use(run: Run) -> None:
    with listen("127.0.0.1:0") as listener:
        outcome = run(*LOOP, "--as", listener.address)
        assert_one_line(outcome, ExitCode.ADDRESS)
        assert str(listener.address) in outcome.err
        assert "another port" in outcome.err


def test_nobody_answers(run: Run) -> None:
    with listen("127.0.0.1:0") as listener:
        where = listener.address
    outcome = run(*LOOP, "--to", where)
    assert_one_line(outcome, ExitCode.REFUSED)
    assert "Connection refused" in outcome.err
    assert "is the virtual machine listening there?" in outcome.err


@pytest.mark.parametrize(("option", "code"), [("--as", ExitCode.ADDRESS), ("--to", ExitCode.REFUSED)])
def test_a_unix_socket_that_cannot_be_had(run: Run, tmp_path: Path, option: str, code: ExitCode) -> None:
    outcome = run(*LOOP, option, f"unix:{tmp_path}/missing/usb.sock")
    assert_one_line(outcome, code)
    assert "No such file" in outcome.err


class Pretended:
    """A device source that fails."""

    error: DeviceError = DeviceError("?")

    def __init__(self, spec: object, **options: object) -> None: ...

    def open(self) -> Any:
        raise self.error


DENIED = usb.core.USBError("Access denied", -3, 13)
IN_USE = usb.core.USBError("Resource busy", -6, 16)


class FakeDevice:
    """What a message about a device wants to know of it."""

    idVendor, idProduct, bus, address, port_numbers = 0x1209, 0x0001, 1, 2, (1,)


def translated(error: usb.core.USBError) -> DeviceError:
    from usbredir.backends._base import translate

    return translate(error, "the device cannot be opened", FakeDevice())


@pytest.mark.parametrize(
    ("make", "code", "told"),
    [
        (lambda: DeviceNotFoundError("no device 1234:5678 is plugged in"), ExitCode.MISSING, "plugged in"),
        (lambda: translated(DENIED), ExitCode.FORBIDDEN, "udev rule"),
        (lambda: translated(IN_USE), ExitCode.BUSY, "in use"),
        (lambda: DeviceError("no configuration", reason="unconfigured"), ExitCode.UNCONFIGURED, "configuration"),
        (lambda: DeviceLostError("gone in its reset"), ExitCode.LOST, "reset"),
        (lambda: DeviceClaimError("driver\x1b[31m usbhid"), ExitCode.BUSY, "driver"),
        (lambda: DeviceError("its descriptors make no sense"), ExitCode.DEVICE, "descriptors"),
    ],
)
@pytest.mark.parametrize("log_format", ["text", "json"])
def test_devices_that_cannot_be_had(
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[], DeviceError],
    code: ExitCode,
    told: str,
    log_format: str,
) -> None:
    """One line with cause and remedy, and an exit code for each cause."""
    monkeypatch.setattr(Pretended, "error", make())
    monkeypatch.setattr(_source, "PyusbSource", Pretended)
    outcome = run("--device", "1234:5678", *HERE, "--log-format", log_format)
    if log_format == "text":
        assert_one_line(outcome, code)
        assert told in outcome.err
        return
    assert outcome.code == code
    assert outcome.err.count("\n") == 1
    line = json.loads(outcome.err)
    assert (line["event"], line["level"], line["code"]) == ("error", "error", code)
    assert told in line["message"]


@pytest.mark.parametrize("rules", ["-1,-1,-1,-1,0", "0x08,-1,-1,-1,1"])
def test_a_device_that_may_not_be_exported(run: Run, rules: str) -> None:
    outcome = run(*LOOP, *HERE, "--filter", rules)
    assert_one_line(outcome, ExitCode.FILTERED)
    assert "1209:0001 may not be exported" in outcome.err


def test_a_descriptor_that_is_none(run: Run) -> None:
    """--fd with something that is no device's file."""
    with open(os.devnull, "rb") as file:
        outcome = run("--fd", file.fileno(), *HERE)
    assert_one_line(outcome, ExitCode.DEVICE)


# ================================================================ on the virtual bus, below the real libusb


def on_the_bus(*arguments: str, **variables: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments],
        env=vusb.environment(**variables),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


@pytest.mark.parametrize(
    ("device", "variables", "code", "told"),
    [
        ("1234:5678", {}, ExitCode.MISSING, "no device 1234:5678 is plugged in"),
        ("7-7", {}, ExitCode.MISSING, "usbredir list"),
        ("1209:0001", {"config": 0}, ExitCode.UNCONFIGURED, "no active configuration"),
    ],
)
@pytest.mark.parametrize("log_format", ["text", "json"])
def test_real_devices_that_cannot_be_had(
    device: str, variables: dict[str, object], code: ExitCode, told: str, log_format: str
) -> None:
    done = on_the_bus("--device", device, *HERE, "--log-format", log_format, **variables)
    assert done.returncode == code
    assert done.stderr.count("\n") == 1, done.stderr
    assert told in done.stderr
    if log_format == "json":
        assert json.loads(done.stderr)["code"] == code


# ================================================================ as a process


def works(guest: Guest) -> None:
    guest.wait_for_device(PATIENCE)
    assert guest.bulk_out(0x01, b"hello", timeout=PATIENCE).status == Status.SUCCESS
    assert guest.bulk_in(0x81, 64, timeout=PATIENCE).data == b"hello"


def test_once(tmp_path: Path) -> None:
    """The process ends when the guest has left."""
    with Process(*LOOP, *HERE, "--once") as exporter:
        connection, guest = guest_at(exporter.address())
        with connection, guest:
            works(guest)
        assert exporter.end() == ExitCode.OK
    assert [re.sub(r"[\d.:]+$", "", line.strip()) for line in exporter.lines] == [
        "usbredir: listening on ",
        "usbredir: guest connected from ",
        "usbredir: guest left",
    ]


def test_one_guest_after_the_other_and_one_at_a_time() -> None:
    """Without --once; a second guest is turned away, with a message."""
    with Process(*LOOP, *HERE) as exporter:
        address = exporter.address()
        for _ in range(2):
            connection, guest = guest_at(address)
            with connection, guest:
                guest.wait_for_device(PATIENCE)
                with connect(address, PATIENCE) as second:
                    assert poll([(second.fileno(), POLLIN)], PATIENCE)
                    assert second.read(1) == b""
                exporter.line_with("warning: another guest from")
                works(guest)
            exporter.line_with("guest left")
        assert exporter.end(signal.SIGTERM) == ExitCode.OK


def test_several_devices_in_one_process(tmp_path: Path) -> None:
    """A guest on each at the same time; messages tell which is meant."""
    path = tmp_path / "usb.sock"
    with Process(*LOOP, *HERE, *LOOP, "--as", f"unix:{path}") as exporter:
        addresses = [exporter.address(), exporter.address()]
        assert addresses[1] == f"unix:{path}"
        ends = [guest_at(address) for address in addresses]
        for _, guest in ends * 2:
            works(guest)
        for connection, guest in ends:
            connection.close()
            guest.close()
        assert exporter.end(signal.SIGTERM) == ExitCode.OK
    assert all(line.startswith("usbredir: [loopback] ") for line in exporter.lines)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=["Ctrl-C", "TERM", "HUP"])
@pytest.mark.parametrize("state", ["waits", "serves", "serves one that does not read"])
def test_ended_by_a_signal(number: signal.Signals, state: str, tmp_path: Path) -> None:
    """Exit code 0, no traceback; the Unix socket is removed; the guest sees the end of the connection."""
    path = tmp_path / "usb.sock"
    with Process(*LOOP, "--as", f"unix:{path}") as exporter:
        assert exporter.address() == f"unix:{path}"
        if state != "waits":
            connection, guest = guest_at(f"unix:{path}")
            guest.wait_for_device(PATIENCE)
        if state.endswith("not read"):
            assert guest.start_bulk_receiving(0x82, 1 << 16, 16, timeout=PATIENCE) == Status.SUCCESS
            exporter.line_with("the connection is too slow")
        assert exporter.end(number) == ExitCode.OK
        assert "Traceback" not in "".join(exporter.lines)
        assert not path.exists()
        if state != "waits":
            with connection, guest:
                while connection.read(1 << 20) != b"":
                    assert poll([(connection.fileno(), POLLIN)], PATIENCE)


@pytest.mark.parametrize(
    ("act", "code"),
    [
        (lambda connection, guest: guest.reject(), ExitCode.REJECTED),
        (lambda connection, guest: connection.write(memoryview(raw_packet(99))), ExitCode.PROTOCOL),
        (lambda connection, guest: guest.control_out(0x40, 0x10, 0, 0, timeout=PATIENCE), ExitCode.LOST),
    ],
    ids=["refuses", "breaks the protocol", "unplugs"],
)
def test_guests_that_end_it(act: Callable[[Connection, Guest], object], code: ExitCode) -> None:
    """With --once the code tells what went wrong."""
    with Process(*LOOP, *HERE, "--once") as exporter:
        connection, guest = guest_at(exporter.address())
        with connection, guest:
            guest.wait_for_device(PATIENCE)
            act(connection, guest)
            assert exporter.end() == code
    assert exporter.lines[-1].startswith("usbredir: ")


def test_what_a_guest_says_is_escaped() -> None:
    """Its version, with -v."""
    with Process(*LOOP, *HERE, "-v", "5") as exporter:
        connection = connect(exporter.address(), PATIENCE)
        with connection, Guest(GuestConnection(connection), version="evil\x1b[31m\nusbredir: all is well") as guest:
            guest.wait_for_device(PATIENCE)
            line = exporter.line_with("evil")
    assert "\\x1b[31m\\nusbredir: all is well" in line


def test_json_messages_of_a_session() -> None:
    """One object a line, every one with the same fields."""
    with Process(*LOOP, *HERE, "--once", "--log-format", "json") as exporter:
        address = json.loads(exporter.line_with("listening on"))["message"].split()[-1]
        connection, guest = guest_at(address)
        with connection, guest:
            works(guest)
        assert exporter.end() == ExitCode.OK
    objects = [json.loads(line) for line in exporter.lines]
    assert [one["event"] for one in objects] == ["listening", "connected", "left"]
    assert all(set(one) == {"time", "level", "event", "message"} for one in objects)


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
    assert outcome.err.splitlines() == [f"usbredir: connected to {listener.address}", "usbredir: guest left"]


# ---------------------------------------------------------------- a real device


def test_a_real_device_for_one_guest_after_the_other() -> None:
    """Every kind of naming it; the kernel's driver comes back at the end."""
    for device in ("1209:0001", "0x1209:0x1", "1-2", "port:1-1", "serial:0001"):
        with Process("--device", device, *HERE, env=vusb.environment()) as exporter:
            address = exporter.address()
            for _ in range(2):
                connection, guest = guest_at(address)
                with connection, guest:
                    works(guest)
                exporter.line_with("guest left")
            assert exporter.end(signal.SIGTERM) == ExitCode.OK


def test_the_kernels_driver_comes_back(tmp_path: Path) -> None:
    """Between two guests the device stays ours; at the end the driver has it."""
    log = tmp_path / "log"
    with Process("--device", "1209:0001", *HERE, env=vusb.environment(driver=1, log=log)) as exporter:
        address = exporter.address()
        for _ in range(2):
            connection, guest = guest_at(address)
            with connection, guest:
                works(guest)
            exporter.line_with("guest left")
        assert "attach" not in log.read_text()
        assert exporter.end(signal.SIGTERM) == ExitCode.OK
    assert log.read_text().count("attach") == 2


@pytest.mark.parametrize("state", ["no guest", "idle", "busy"])
def test_a_real_device_that_is_unplugged(state: str) -> None:
    """The guest is told, whether it asks anything of the device or not; the exporter goes on and looks for it."""
    with Process("--device", "1209:0001", *HERE, env=vusb.environment()) as exporter:
        connection, guest = guest_at(exporter.address())
        with connection, guest:
            works(guest)
            if state == "busy":
                assert guest.start_interrupt_receiving(0x83, timeout=PATIENCE) == Status.SUCCESS
            delay = 300 if state == "no guest" else 20
            assert guest.control_out(0x40, 0x10, delay, 0, timeout=PATIENCE).status == Status.SUCCESS
            if state == "busy":
                with contextlib.suppress(DeviceLostError):
                    assert guest.bulk_in(0x86, 64, timeout=PATIENCE).status == Status.IOERROR
            if state != "no guest":
                guest.wait_for_disconnect(PATIENCE)
        exporter.line_with("unplugged")
        assert exporter.process.poll() is None
        assert exporter.end(signal.SIGINT) == ExitCode.OK
    assert "Traceback" not in "".join(exporter.lines)


def test_a_stalled_guest_does_not_hide_an_unplugged_device() -> None:
    """It receives and never reads; SIGINT ends the exporter at once as well."""
    with Process("--device", "1209:0001", *HERE, env=vusb.environment()) as exporter:
        connection, guest = guest_at(exporter.address())
        with connection, guest:
            guest.wait_for_device(PATIENCE)
            assert guest.control_out(0x40, 0x10, 500, 0, timeout=PATIENCE).status == Status.SUCCESS
            assert guest.start_bulk_receiving(0x82, 1 << 16, 16, timeout=PATIENCE) == Status.SUCCESS
            exporter.line_with("unplugged")
            assert exporter.end(signal.SIGINT) == ExitCode.OK


@pytest.mark.parametrize("value", ["inf", "nan", "0", "-1", "1e10", "soon"])
def test_peer_timeouts_that_are_none(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed(f"--peer-timeout={value} 1-4")
    assert "--peer-timeout" in capsys.readouterr().err


def test_ignored_signals_stay_ignored() -> None:
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert signal.SIGHUP not in ending_signals()
        with _export._StopSignal():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert signal.SIGTERM in ending_signals()
