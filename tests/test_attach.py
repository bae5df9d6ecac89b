"""``usbredir attach``, with a monitor that does as QEMU does. With a real one: test_qemu_attach."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from usbredir.cli import ExitCode

from .command_bed import PATIENCE, Outcome, call_main, signals

__all__ = ["signals"]

SOON = "0.1"
"""Seconds, of a limit that has to pass."""
EXPORTER = "127.0.0.1:4000"
GREETING: dict[str, Any] = {"QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 0}}}}
BACKEND = {
    "addr": {"type": "inet", "data": {"host": "127.0.0.1", "port": "4000"}},
    "server": False,
    "reconnect": 1,
}
OTHER_DEVICE = {"driver": "virtio-net-pci", "id": "net0"}


class Refused(Exception):
    """What the monitor says in place of an answer."""


class Monitor:
    """A QEMU as far as its monitor shows it. Attributes may be changed while nobody is connected.

    refusals: commands, and why they are refused. answers: what is said in place of an answer, as it is; None: nothing.
    exporter_answers, device_comes: what follows when a device was added. running: whether the machine is.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.greeting: bytes | None = json.dumps(GREETING).encode()
        self.refusals: dict[str, str] = {}
        self.answers: dict[str, bytes | None] = {}
        self.exporter_answers = self.device_comes = self.running = True
        self.removes_chardev = True
        self.chardevs: dict[str, dict[str, Any]] = {}
        self.devices: dict[str, dict[str, Any]] = {"net0": OTHER_DEVICE}
        self.commands: list[str] = []
        self._socket = sock
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(PATIENCE)
        self._socket.close()

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection = self._socket.accept()[0]
                with connection, connection.makefile("rwb") as file, contextlib.suppress(OSError):
                    self._serve(file)

    def _serve(self, file: Any) -> None:
        if self.greeting is not None:
            file.write(self.greeting + b"\r\n")
            file.flush()
        for line in file:
            request = json.loads(line)
            command, arguments = request["execute"], request["arguments"]
            self.commands.append(command)
            if command in self.answers:
                answer = self.answers[command]
                if answer == b"":
                    return
                file.write(answer or b"")
            else:
                for message in self._messages(command, arguments):
                    file.write(json.dumps({"id": request["id"], **message}).encode() + b"\r\n")
            file.flush()

    def _messages(self, command: str, arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
        try:
            if command in self.refusals:
                raise Refused(self.refusals[command])
            yield {"return": getattr(self, "_" + command.replace("-", "_"))(**arguments)}
        except Refused as refused:
            yield {"error": {"class": "GenericError", "desc": str(refused)}}
        if command == "device_del":
            yield {"event": "DEVICE_DELETED", "data": {"device": arguments["id"]}}

    def _qmp_capabilities(self) -> dict[str, Any]:
        return {}

    def _chardev_add(self, id: str, backend: dict[str, Any]) -> dict[str, Any]:
        if id in self.chardevs:
            raise Refused(f"Chardev with id '{id}' already exists")
        assert backend["type"] == "socket"
        self.chardevs[id] = backend["data"]
        return {}

    def _chardev_remove(self, id: str) -> dict[str, Any]:
        assert id not in [device.get("chardev") for device in self.devices.values()]
        del self.chardevs[id]
        return {}

    def _query_chardev(self) -> list[dict[str, Any]]:
        state = "tcp:127.0.0.1:50000 <-> " if self.exporter_answers else "disconnected:tcp:"
        addresses = {name: data["addr"]["data"] for name, data in self.chardevs.items()}
        return [
            {"label": name, "filename": f"{state}{':'.join(address.values())}"} for name, address in addresses.items()
        ]

    def _device_add(self, **properties: Any) -> dict[str, Any]:
        if properties["id"] in self.devices:
            raise Refused(f"Duplicate device ID '{properties['id']}'")
        self.devices[properties["id"]] = properties
        return {}

    def _device_del(self, id: str) -> dict[str, Any]:
        device = self.devices.pop(id)
        if self.removes_chardev:
            del self.chardevs[device["chardev"]]
        return {}

    def _qom_list(self, path: str) -> list[dict[str, Any]]:
        assert path == "/machine/peripheral"
        children = [{"name": name, "type": f"child<{one['driver']}>"} for name, one in self.devices.items()]
        return [{"name": "type", "type": "string"}, *children]

    def _qom_get(self, path: str, property: str) -> object:
        device = self.devices[path.rpartition("/")[2]]
        return self.exporter_answers and self.device_comes if property == "attached" else device[property]

    def _query_status(self) -> dict[str, Any]:
        return {"running": self.running}

    def is_as_before(self) -> bool:
        """Whether nothing is left of what was attached."""
        return not self.chardevs and list(self.devices) == ["net0"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "qmp"


@pytest.fixture
def monitor(path: Path) -> Iterator[Monitor]:
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(str(path))
    sock.listen()
    with contextlib.closing(Monitor(sock)) as monitor:
        yield monitor


Attach = Callable[..., Outcome]


@pytest.fixture
def attach(path: Path, capsys: pytest.CaptureFixture[str]) -> Attach:
    """Call the command for the monitor."""
    return lambda *arguments: call_main(capsys, "attach", *arguments, "--qmp", path)


# ================================================================ what it does


def test_attach_list_and_detach(monitor: Monitor, attach: Attach) -> None:
    assert attach(EXPORTER, "--id", "stick") == (0, "stick\n", f"usbredir: [stick] attached: {EXPORTER}\n")
    assert monitor.chardevs == {"stick-chardev": BACKEND}
    assert monitor.devices["stick"] == {"driver": "usb-redir", "id": "stick", "chardev": "stick-chardev"}
    assert attach("--list") == (0, f"stick  attached  {EXPORTER}\n", "")
    assert attach("--detach", "stick") == (0, "", "usbredir: [stick] detached\n")
    assert monitor.is_as_before()
    assert attach("--list") == (0, "(no devices from exporters)\n", "")


def test_as_json(monitor: Monitor, attach: Attach) -> None:
    attached = attach(EXPORTER, "--log-format", "json")
    told = json.loads(attached.err)
    assert (told["event"], told["device"], attached.out) == ("connected", "usbredir1", "usbredir1\n")
    listed = attach("--list", "--log-format", "json")
    assert json.loads(listed.out) == [{"id": "usbredir1", "state": "attached", "exporter": EXPORTER}]
    detached = json.loads(attach("--detach", "usbredir1", "--log-format", "json").err)
    assert (detached["event"], detached["device"]) == ("left", "usbredir1")
    failed = json.loads(attach("--detach", "usbredir1", "--log-format", "json").err)
    assert (failed["event"], failed["code"]) == ("error", ExitCode.MISSING)


def test_names_that_are_free(monitor: Monitor, attach: Attach) -> None:
    """Of devices and of their connections, whosever they are."""
    monitor.devices["usbredir1"] = OTHER_DEVICE
    monitor.chardevs["usbredir2-chardev"] = BACKEND
    assert attach(EXPORTER).out == "usbredir3\n"


def test_options_for_the_device(monitor: Monitor, attach: Attach) -> None:
    rules = "-1,-1,-1,-1,0|0x08,-1,-1,-1,1"
    assert attach(EXPORTER, "--bus", "usb.0", "--filter", rules, "--debug", "4", "--reconnect", "5").code == 0
    device = monitor.devices["usbredir1"]
    assert (device["bus"], device["debug"]) == ("usb.0", 4)
    assert device["filter"] == "-1:-1:-1:-1:0|0x08:-1:-1:-1:1"
    assert monitor.chardevs["usbredir1-chardev"]["reconnect"] == 5


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("[::1]:4000", {"type": "inet", "data": {"host": "::1", "port": "4000"}}),
        ("unix:/run/a.sock", {"type": "unix", "data": {"path": "/run/a.sock"}}),
        ("unix:a.sock", {"type": "unix", "data": {"path": f"{Path.cwd()}/a.sock"}}),
    ],
)
def test_exporters(address: str, expected: dict[str, Any], monitor: Monitor, attach: Attach) -> None:
    """The path of a Unix socket is absolute for QEMU, which has a folder of its own."""
    attach(address, "--id", "stick")
    assert monitor.chardevs["stick-chardev"]["addr"] == expected


def test_an_exporter_that_is_not_there_yet(monitor: Monitor, attach: Attach) -> None:
    monitor.exporter_answers = False
    code, out, err = attach(EXPORTER, "--wait")
    assert (code, out) == (0, "usbredir1\n")
    assert "QEMU connects when the exporter is there" in err
    assert attach("--list").out == f"usbredir1  disconnected  {EXPORTER}\n"
    monitor.exporter_answers, monitor.device_comes = True, False
    assert attach("--list").out == f"usbredir1  connected  {EXPORTER}\n"


def test_a_device_that_takes_its_time(monitor: Monitor, attach: Attach, monkeypatch: pytest.MonkeyPatch) -> None:
    """First the connection, then the device."""
    monitor.exporter_answers = monitor.device_comes = False
    steps = iter(("exporter_answers", "device_comes"))
    monkeypatch.setattr("usbredir._attach.time.sleep", lambda seconds: setattr(monitor, next(steps), True))
    assert attach(EXPORTER, "--id", "stick").code == 0
    assert monitor.commands.count("query-chardev") == monitor.commands.count("qom-get") == 2


def test_a_qemu_that_keeps_connections_of_devices(monitor: Monitor, attach: Attach) -> None:
    """Some versions remove them with the device, others do not."""
    monitor.removes_chardev = False
    attach(EXPORTER)
    assert attach("--detach", "usbredir1").code == 0
    assert monitor.is_as_before()


@pytest.mark.parametrize("form", ["{}", "unix:{}"])
def test_monitors_at_paths(form: str, monitor: Monitor, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call_main(capsys, "attach", "--list", "--qmp", form.format(path)).code == 0


def test_a_path_without_folder(
    monitor: Monitor, path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(path.parent)
    assert call_main(capsys, "attach", "--list", "--qmp", path.name).code == 0


def test_a_monitor_at_a_port(capsys: pytest.CaptureFixture[str]) -> None:
    sock = socket.create_server(("127.0.0.1", 0))
    with contextlib.closing(Monitor(sock)):
        assert call_main(capsys, "attach", "--list", "--qmp", f"127.0.0.1:{sock.getsockname()[1]}").code == 0


# ================================================================ what goes wrong


@pytest.mark.parametrize(
    ("command", "description", "remedy"),
    [
        ("device_add", "No 'usb-bus' bus found for device 'usb-redir'", "-device qemu-xhci"),
        ("device_add", "Bus 'usb.0' not found", "-device qemu-xhci"),
        ("device_add", "'usb-redir' is not a valid device model name", "without USB redirection"),
        ("device_add", "tried to attach usb device usb-redir to a bus with no free ports", "detach something"),
        ("device_add", "Bus 'usb.0' does not support hotplugging", "at the start"),
        ("device_add", "something \x1b[2J new", r"something \x1b[2J new"),
        ("chardev-add", "Chardev with id 'usbredir1-chardev' already exists", "another --id"),
        ("qom-get", "no such property", "no such property"),
    ],
)
def test_what_qemu_refuses(command: str, description: str, remedy: str, monitor: Monitor, attach: Attach) -> None:
    """One line with what to do, and nothing is left."""
    monitor.refusals[command] = description
    code, out, err = attach(EXPORTER)
    assert (code, out) == (ExitCode.DEVICE, "")
    assert err.startswith(f"usbredir: error: QEMU refused {command}: ")
    assert remedy in err
    assert err.count("\n") == 1
    assert err[:-1].isprintable()
    assert monitor.is_as_before()


def test_a_name_that_is_in_use(monitor: Monitor, attach: Attach) -> None:
    """What has it stays as it is."""
    attach(EXPORTER, "--id", "stick")
    before = dict(monitor.chardevs), dict(monitor.devices)
    for name in ("stick", "net0"):
        code, _, err = attach(EXPORTER, "--id", name)
        assert code == ExitCode.DEVICE
        assert "choose another --id" in err
        assert (monitor.chardevs, monitor.devices) == before


@pytest.mark.parametrize(
    ("state", "expected", "message"),
    [
        ({"exporter_answers": False}, ExitCode.REFUSED, "nobody answered QEMU within 0.1 seconds"),
        ({"device_comes": False}, ExitCode.DEVICE, "no device came within 0.1 seconds"),
        ({"device_comes": False, "running": False}, ExitCode.DEVICE, "paused"),
    ],
)
def test_no_device_comes(
    state: dict[str, bool], expected: ExitCode, message: str, monitor: Monitor, attach: Attach
) -> None:
    vars(monitor).update(state)
    code, out, err = attach(EXPORTER, "--timeout", SOON)
    assert (code, out) == (expected, "")
    assert err.startswith(f"usbredir: error: {EXPORTER}: ")
    assert message in err
    assert monitor.is_as_before()


NOTHING: bytes | None = None


@pytest.mark.parametrize(
    ("greeting", "answer", "expected", "message"),
    [
        (None, NOTHING, ExitCode.REFUSED, "does not answer within 0.1 seconds"),
        (b"QEMU 7.2 monitor - type 'help'", NOTHING, ExitCode.PROTOCOL, "is it QEMU's -qmp?"),
        (b'{"hello": 1}', NOTHING, ExitCode.PROTOCOL, "did not greet"),
        (json.dumps(GREETING).encode(), NOTHING, ExitCode.REFUSED, "does not answer within 0.1 seconds"),
        (json.dumps(GREETING).encode(), b"", ExitCode.REFUSED, "QEMU closed the connection"),
        (json.dumps(GREETING).encode(), b'{"return": {}, "id": 2}\n', ExitCode.PROTOCOL, "in place of a list"),
        (json.dumps(GREETING).encode(), b'{"return": [1], "id": 2}\n', ExitCode.PROTOCOL, "in place of a list"),
        (json.dumps(GREETING).encode(), b"[" * 100_000 + b"\n", ExitCode.PROTOCOL, "is no message"),
    ],
)
def test_monitors_that_are_none(
    greeting: bytes | None,
    answer: bytes | None,
    expected: ExitCode,
    message: str,
    monitor: Monitor,
    attach: Attach,
    path: Path,
) -> None:
    monitor.greeting = greeting
    monitor.answers["qom-list"] = answer
    code, _, err = attach("--detach", "stick", "--timeout", SOON)
    assert code == expected
    assert err.startswith(f"usbredir: error: --qmp {path}: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("where", ["/no/such/path", "nowhere", "127.0.0.1:1", "a..b:1"])
def test_nobody_at_the_monitor(where: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call_main(capsys, "attach", EXPORTER, "--qmp", where)
    assert code == ExitCode.REFUSED
    assert err.startswith(f"usbredir: error: --qmp {where}: ")
    assert "is QEMU running" in err


def test_detaching_what_is_not_there(monitor: Monitor, attach: Attach) -> None:
    """Devices that are not from exporters are left alone."""
    code, _, err = attach("--detach", "net0")
    assert (code, "there is none" in err) == (ExitCode.MISSING, True)
    attach(EXPORTER, "--id", "one")
    attach(EXPORTER, "--id", "two")
    code, _, err = attach("--detach", "three")
    assert (code, "there are one, two" in err) == (ExitCode.MISSING, True)


def test_an_interruption_leaves_nothing(monitor: Monitor, attach: Attach, monkeypatch: pytest.MonkeyPatch) -> None:
    """And is no success."""

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monitor.device_comes = False
    monkeypatch.setattr("usbredir._attach.time.sleep", interrupt)
    code, out, err = attach(EXPORTER)
    assert (code, out, "interrupted" in err) == (ExitCode.FAILED, "", True)
    assert monitor.is_as_before()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([EXPORTER], "--qmp"),
        (["--qmp", "/x"], "required"),
        (["127.0.0.1", "--qmp", "/x"], "HOST:PORT"),
        (["unix:", "--qmp", "/x"], "unix: needs a path"),
        ([EXPORTER, "--list", "--qmp", "/x"], "not allowed with"),
        ([EXPORTER, "--qmp", "host:port"], "--qmp 'host:port'"),
        ([EXPORTER, "--qmp", "/x", "--id", "1"], "a letter first"),
        ([EXPORTER, "--qmp", "/x", "--id", ""], "a letter first"),
        ([EXPORTER, "--qmp", "/x", "--filter", "1,2"], "--filter: "),
        ([EXPORTER, "--qmp", "/x", "--debug", "6"], "--debug"),
        ([EXPORTER, "--qmp", "/x", "--reconnect", "0"], "--reconnect"),
        ([EXPORTER, "--qmp", "/x", "--timeout", "0"], "--timeout"),
        ([EXPORTER, "--qmp", "/x", "--timeout", "nan"], "--timeout"),
    ],
)
def test_usage(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call_main(capsys, "attach", *arguments)
    assert code == ExitCode.USAGE
    assert message in err


def test_help_shows_the_monitor(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call_main(capsys, "attach", "--help")
    assert code == 0
    assert "-qmp unix:/run/vm.qmp,server=on,wait=off" in out
