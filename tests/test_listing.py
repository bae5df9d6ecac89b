"""``usbredir list``: the table, the JSON, and what can be exported."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from usbredir import cli
from usbredir._ending import ExitCode
from usbredir.backends import pyusb
from usbredir.errors import DeviceError
from usbredir.filter import DeviceIds
from usbredir.proto import Speed

from . import vusb

PATIENCE = 60.0
KEYS = [
    "bus", "address", "port", "vendor_id", "product_id", "manufacturer", "product", "serial", "speed", "device_class",
    "interfaces", "drivers", "accessible", "configured", "allowed",
]  # fmt: skip

STICK = pyusb.DeviceInfo(
    1, 12, "1-1.4", Speed.HIGH, DeviceIds(0, 0, 0, 0x0781, 0x5567, 0x0126, ((8, 6, 80),)),
    "San\x1bDisk", "Cruzer", "2005\n", {0: "usb-storage"}, True,
)  # fmt: skip
PHONE = pyusb.DeviceInfo(
    2, 3, "2-1", Speed.SUPER, DeviceIds(0, 0, 0, 0x18D1, 0x4EE7, 0x0510, ((6, 1, 1), (0xFF, 0x42, 1), (6, 1, 1))),
    "", "", "", {0: "mtp", 1: "adb", 2: "mtp"}, False,
)  # fmt: skip
HUB = pyusb.DeviceInfo(
    1, 1, "", Speed.UNKNOWN, DeviceIds(9, 0, 1, 0x1D6B, 2, 0x0618, ((9, 0, 0),)), "", "", "", {0: "hub"}, True
)
ODD = pyusb.DeviceInfo(1, 2, "1-2", Speed.LOW, DeviceIds(0x77, 0, 0, 1, 2, 3, ()), "", "", "", {}, None)
UNCONFIGURED = ODD._replace(configured=False, ids=DeviceIds(0, 0, 0, 1, 2, 3, ()))

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Lists the given devices."""

    def call(devices: list[pyusb.DeviceInfo], *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(pyusb, "list_devices", lambda: iter(devices))
        code = cli.main(["list", *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def rows(out: str) -> list[str]:
    """Lines of the table without its head, up to the empty line."""
    return out.partition("\n\n")[0].splitlines()[1:]


def test_the_table(run: Run) -> None:
    """Everything in a column of its own; what devices say is escaped; unknown things are numbers or dashes."""
    code, out, _ = run([HUB, ODD, STICK, PHONE])
    assert code == ExitCode.OK
    assert out.splitlines()[0].split() == [
        "bus-dev", "port", "ids", "speed", "class", "driver", "export", "name", "serial"
    ]  # fmt: skip
    split = [[cell for cell in line.split("  ") if cell] for line in rows(out)]
    cells = [[cell.strip() for cell in line] for line in split]
    assert cells == [
        ["1-1", "-", "1d6b:0002", "unknown", "hub", "hub", "no: hub", "-", "-"],
        ["1-2", "1-2", "0001:0002", "low", "0x77", "-", "yes", "-", "-"],
        ["1-12", "1-1.4", "0781:5567", "high", "mass storage", "usb-storage", "yes", r"San\x1bDisk Cruzer", r"2005\n"],
        ["2-3", "2-1", "18d1:4ee7", "super", cells[3][4], "mtp+adb", "no: permission", "-", "-"],
    ]
    assert cells[3][4].endswith("+vendor specific")
    assert "virtual: disk:FILE[,ro]  loopback" in out


def test_json(run: Run) -> None:
    """One object for each device."""
    code, out, _ = run([STICK, HUB], "--json")
    assert code == ExitCode.OK
    devices = json.loads(out)
    assert [list(device) for device in devices] == [KEYS, KEYS]
    assert devices[0] == {
        "bus": 1, "address": 12, "port": "1-1.4", "vendor_id": "0781", "product_id": "5567",
        "manufacturer": "San\x1bDisk", "product": "Cruzer", "serial": "2005\n", "speed": "high", "device_class": 0,
        "interfaces": [[8, 6, 80]], "drivers": {"0": "usb-storage"}, "accessible": True, "configured": None,
        "allowed": None,
    }  # fmt: skip
    assert out.isascii(), "a terminal obeys nothing in it"


@pytest.mark.parametrize(
    ("rules", "stick", "phone"),
    [
        ("0x08,-1,-1,-1,1", "yes", "no: filter"),
        ("-1,-1,-1,-1,0", "no: filter", "no: filter"),
        ("-1,-1,-1,-1,1", "yes", "no: permission"),
    ],
)
def test_filters(run: Run, rules: str, stick: str, phone: str) -> None:
    """As for export; a denial comes before missing permissions."""
    _, out, _ = run([STICK, PHONE], "--filter", rules)
    assert [verdict in line for verdict, line in zip((stick, phone), rows(out), strict=True)] == [True, True]
    _, out, _ = run([STICK, PHONE], "--json", f"--filter={rules}")
    assert [device["allowed"] for device in json.loads(out)] == ["filter" not in stick, "filter" not in phone]


def test_a_wrong_filter(run: Run) -> None:
    code, out, err = run([STICK], "--filter", "nonsense")
    assert (code, out) == (ExitCode.USAGE, "")
    assert err.startswith("usbredir: error: --filter: ")
    assert err.count("\n") == 1


def test_a_device_without_configuration(run: Run) -> None:
    """It cannot be exported as it is; the line still is one."""
    _, out, _ = run([UNCONFIGURED])
    assert "0001:0002" in rows(out)[0]
    assert "no: unconfigured" in rows(out)[0]


def test_no_devices(run: Run) -> None:
    _, out, _ = run([])
    assert "(no real devices)" in out
    code, out, _ = run([], "--json")
    assert (code, json.loads(out)) == (ExitCode.OK, [])


def test_without_libusb(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Iterator[Any]:
        raise DeviceError("libusb 1.0 cannot be loaded: install the package libusb-package")

    monkeypatch.setattr(pyusb, "list_devices", fail)
    assert cli.main(["list"]) == ExitCode.DEVICE
    assert "libusb-package" in capsys.readouterr().err


def on_the_bus(*arguments: str, **variables: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "usbredir", "list", *arguments],
        env=vusb.environment(**variables),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=True,
    )


def test_on_the_virtual_bus() -> None:
    """The whole program: a root hub and a device."""
    done = on_the_bus(driver=1)
    hub, device = rows(done.stdout)
    assert "no: hub" in hub
    for text in ("1-2", "1-1", "1209:0001", "high", "vendor specific", "yes", "vusb virtual test device", "0001"):
        assert text in device
    assert not done.stderr


def test_on_the_virtual_bus_as_json() -> None:
    device = json.loads(on_the_bus("--json", "--filter", "-1,0x1209,-1,-1,1", speed="super").stdout)[1]
    assert (device["serial"], device["speed"], device["allowed"]) == ("0001", "super", True)


def test_as_a_process() -> None:
    """With whatever is plugged in here."""
    finished = subprocess.run(
        [sys.executable, "-m", "usbredir", "list"], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert finished.returncode == ExitCode.OK, finished.stderr
    assert "virtual: disk:FILE[,ro]  loopback" in finished.stdout
