"""Which device a user means, what is plugged in, and what is said when it cannot be had."""

from __future__ import annotations

import ctypes
import errno
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import usb.core

from usbredir.backends import _base, _system
from usbredir.backends.pyusb import DeviceSpec, parse_spec
from usbredir.errors import DeviceClaimError, DeviceError, DeviceLostError, DeviceNotFoundError
from usbredir.proto import Status

from . import vusb


@pytest.mark.parametrize(
    ("text", "kind", "value", "shown"),
    [
        ("1209:0001", "ids", (0x1209, 1), "1209:0001"),
        ("0x1209:0xAb", "ids", (0x1209, 0xAB), "1209:00ab"),
        ("a:b", "ids", (0xA, 0xB), "000a:000b"),
        ("1-2", "address", (1, 2), "1-2"),
        ("001-012", "address", (1, 12), "1-12"),
        ("port:1-1", "port", "1-1", "port:1-1"),
        ("port:3-1.4.2", "port", "3-1.4.2", "port:3-1.4.2"),
        ("serial:A:1-2", "serial", "A:1-2", "serial:A:1-2"),
    ],
)
def test_specs(text: str, kind: str, value: Any, shown: str) -> None:
    """Four forms; each reads what it prints."""
    spec = parse_spec(text)
    assert spec == DeviceSpec(kind, value)
    assert str(spec) == shown
    assert parse_spec(str(spec)) == spec


@pytest.mark.parametrize(
    "text",
    [
        *["", ":", "1209", "1209:", ":0001", "12091:1", "1209:00011", "g:1", "1209:0001:2", "1209:0001\n"],
        *["1-", "-1", "1-2-3", "1000-1", " 1-2", "1-2\n", "\u0661-\u0662"],
        *["port:", "port:1", "port:1-1.", "port:1-a", "port:1-1\n", "port:1-\u0661", "serial:"],
    ],
)
def test_texts_that_name_nothing(text: str) -> None:
    with pytest.raises(ValueError, match="names no device: use VID:PID") as error:
        parse_spec(text)
    assert repr(text) in str(error.value)


FOUND = """
def try_open(text, **more):
    try:
        device = backends.open_device(text, **more)
    except DeviceError as error:
        return type(error).__name__, error.reason, str(error)
    found = str(device), device.device.address
    device.close()
    return found
for text in ("1209:0001", "1-2", "port:1-1", "serial:0001", "1209:0002", "9-9", "port:2-1", "serial:none"):
    out[text] = try_open(text)
log = os.environ["VUSB_LOG"]
before = open(log).read().count("open")
out["list"] = [
    [i.bus, i.address, i.port, int(i.speed), i.ids.vendor_id, i.ids.product_id, [list(t) for t in i.ids.interfaces],
     i.manufacturer, i.product, i.serial, i.drivers]
    for i in backends.list_devices()
]
out["opened"] = open(log).read().count("open") - before

# forbidden, by an error that pyusb would raise
from usbredir.backends import _backend
original = _backend.Backend.open_device
def refuse(self, dev):
    raise usb.core.USBError("Access denied (insufficient permissions)", -3, 13)
_backend.Backend.open_device = refuse
out["forbidden"] = try_open("1209:0001")
out["no_serial"] = try_open("serial:0001")
out["list_forbidden"] = [(i.serial, i.ids.vendor_id) for i in backends.list_devices()]
def unsupported(self, dev):
    raise NotImplementedError("Operation not supported or unimplemented on this platform")
_backend.Backend.open_device = unsupported
out["unsupported"] = try_open("1209:0001")
_backend.Backend.open_device = original

# of several, the first that can be claimed
first, second = same_device_twice()
blocker = backends.wrap(find_all(IDS, new_backend())[0])
blocker.claim()
try:
    backends.open_first([first, second])
except DeviceClaimError as error:
    out["all_busy"] = str(error)
blocker.close()
try:
    backends.open_first([])
except DeviceNotFoundError as error:
    out["none"] = str(error)

# plugged in and out
from usbredir.backends._context import Context
watched = new_backend()
out["watch"] = Context.of(watched).watch(), Context.of(watched).watch(), Context.of(watched).arrivals
Context.of(watched).poll()
device = backends.wrap(find_all(IDS, watched)[0])
import ctypes
from usbredir.backends import _context, _libusb
devid = device.device._ctx.dev.devid
address = watched.ctx.value
_context._on_plugged(address, devid, _libusb.HOTPLUG_ARRIVED, address)
_context._on_plugged(address, devid + 8, _libusb.HOTPLUG_LEFT, address)
out["arrivals"] = Context.of(watched).arrivals, device.lost
_context._on_plugged(address, devid, _libusb.HOTPLUG_LEFT, address)
out["left"] = device.lost
device.close()

# callbacks after the backend is gone
del device, watched, first, second, blocker
gc.collect()
_context._on_plugged(address, devid, _libusb.HOTPLUG_LEFT, address)
_context._on_fd_removed(5, address)
_context._on_fd_added(5, 1, address)
out["contexts"] = len(_context._contexts)
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What was found on the bus."""
    return vusb.found(FOUND, env=vusb.environment(log=tmp_path_factory.mktemp("bus") / "log"))


@pytest.mark.parametrize("text", ["1209:0001", "1-2", "port:1-1", "serial:0001"])
def test_finding(found: Any, text: str) -> None:
    assert found[text] == ["<LibusbDevice 1209:0001 at 1-2>", 2]


@pytest.mark.parametrize("text", ["1209:0002", "9-9", "port:2-1", "serial:none"])
def test_not_finding(found: Any, text: str) -> None:
    kind, reason, message = found[text]
    assert (kind, reason) == ("DeviceNotFoundError", "missing")
    assert text in message
    assert "usbredir list" in message


def test_the_list(found: Any) -> None:
    """Everything, in the order of the bus, a device being opened once for its texts."""
    hub, device = found["list"]
    assert hub[:6] == [1, 1, "", 2, 0x1D6B, 2]
    assert device == [
        *[1, 2, "1-1", 2, 0x1209, 1, [[255, 0, 0], [254, 0, 0]]],
        *["vusb", "virtual test device", "0001", {}],
    ]
    assert found["opened"] == 1


def test_forbidden(found: Any) -> None:
    """The message tells what to do; a list goes on without texts."""
    kind, reason, message = found["forbidden"]
    assert (kind, reason) == ("DeviceClaimError", "forbidden")
    assert "/dev/bus/usb/001/002" in message
    assert 'ATTR{idVendor}=="1209"' in message
    assert "uaccess" in message
    assert found["no_serial"][0] == "DeviceNotFoundError"
    assert found["list_forbidden"] == [["", 0x1D6B], ["", 0x1209]]
    assert found["unsupported"][0] == "DeviceError"
    assert "does not support" in found["unsupported"][2]


def test_of_several(found: Any) -> None:
    assert "in use by another program" in found["all_busy"]
    assert found["none"] == "no such device"


def test_plugging(found: Any) -> None:
    """Arrivals are counted, departures are noticed; late callbacks find nothing."""
    assert found["watch"] == [True, True, 0]
    assert found["arrivals"] == [1, False]
    assert found["left"]
    assert found["contexts"] == 0


# ================================================================ errors

DEVICE = SimpleNamespace(bus=1, address=2, idVendor=0x1209, idProduct=1, port_numbers=(1,))


@pytest.mark.parametrize(
    ("number", "kind", "reason", "part"),
    [
        (errno.ENODEV, DeviceLostError, "lost", "unplugged"),
        (errno.EACCES, DeviceClaimError, "forbidden", "udev rule"),
        (errno.EPERM, DeviceClaimError, "forbidden", "udev rule"),
        (errno.EBUSY, DeviceClaimError, "busy", "in use by another program"),
        (errno.ENOENT, DeviceNotFoundError, "missing", "not found"),
        (errno.EIO, DeviceError, "unusable", "words"),
        (None, DeviceError, "unusable", "words"),
    ],
)
def test_errors_are_translated(number: int | None, kind: type[DeviceError], reason: str, part: str) -> None:
    """By errno, which every backend has; backend_error_code has another meaning with each."""
    error = _base.translate(usb.core.USBError("words", -4, number), "it cannot be done", DEVICE)
    assert type(error) is kind
    assert error.reason == reason
    assert str(error).startswith("it cannot be done: ")
    assert part in str(error)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (usb.core.USBError("", -2, errno.EINVAL), Status.INVAL),
        (usb.core.USBTimeoutError("", -7, errno.ETIMEDOUT), Status.TIMEOUT),
        (usb.core.USBError("", -110, errno.ETIMEDOUT), Status.TIMEOUT),
        (usb.core.USBError("", -9, errno.EPIPE), Status.IOERROR),
        (usb.core.USBError("", -4, None), Status.IOERROR),
        (NotImplementedError(), Status.IOERROR),
    ],
)
def test_errors_as_status(error: BaseException, status: Status) -> None:
    assert _base.status_of(error) is status


def test_loss_is_no_status() -> None:
    with pytest.raises(DeviceLostError):
        _base.status_of(usb.core.USBError("", None, errno.ENODEV))


# ================================================================ the system


def test_what_the_system_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drivers by interface, texts, permissions; nothing where it does not tell."""
    monkeypatch.setattr(_system, "SYSFS", str(tmp_path))
    monkeypatch.setattr(_system, "DEV", str(tmp_path))
    assert _system.driver_of(DEVICE, 0) == ""
    assert _system.attribute_of(DEVICE, "serial") is None
    assert _system.is_accessible(DEVICE) is None
    (tmp_path / "1-1:1.0").mkdir()
    (tmp_path / "1-1:1.0" / "driver").symlink_to("/sys/bus/usb/drivers/usb-storage")
    (tmp_path / "1-1").mkdir()
    (tmp_path / "1-1" / "serial").write_bytes(b"A\xff1\n")
    (tmp_path / "001").mkdir()
    (tmp_path / "001" / "002").touch()
    assert _system.driver_of(DEVICE, 0) == "usb-storage"
    assert _system.driver_of(DEVICE, 1) == ""
    assert _system.attribute_of(DEVICE, "serial") == "A\ufffd1"
    assert _system.is_accessible(DEVICE) is True
    hub = SimpleNamespace(bus=1, address=1, port_numbers=None)
    assert _system.port_path(hub) == ""
    assert _system.driver_of(hub, 0) == ""
    assert _system.attribute_of(hub, "serial") is None


WITHOUT_PACKAGE = """
import ctypes.util, sys
sys.modules["libusb_package"] = None  # cannot be imported
ctypes.util.find_library = lambda name: None  # nor found with the system's tools
from usbredir.backends._backend import load_library
print(load_library()._name)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux's name of the library")
def test_the_systems_library() -> None:
    """Without libusb-package, and without tools to search with."""
    try:
        ctypes.CDLL("libusb-1.0.so.0")
    except OSError:
        pytest.skip("needs the system's libusb 1.0")
    done = subprocess.run([sys.executable, "-c", WITHOUT_PACKAGE], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["libusb-1.0.so.0"]
