"""How the parts fit together: layers, test files, docstrings, the promised names, and how the tests are run."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import usbredir

TESTS = Path(__file__).parent
ROOT = TESTS.parent
SOURCE = Path(usbredir.__file__).parent
PATIENCE = 60.0
"""Seconds that an interpreter may take on a busy machine."""

LAYERS: dict[int, str] = {
    0: "_startup _ending proto errors locking _keep_alive _redirection virtual.medium virtual.fat virtual.control "
    "virtual.microsoft backends",
    1: "capabilities limits filter device _state backends._libusb backends._raw_descriptors "
    "backends._system backends._completions backends._exit",
    2: "_layout descriptors virtual.declare virtual.scsi backends._native backends._backend _channel "
    "testing.qemu._guest_error",
    3: "packets _queue virtual.description virtual.scsi_disk virtual.scsi_cdrom backends._base backends._context "
    "_pyusb_descriptors",
    4: "requests _framing _device_layout _streams virtual.base virtual.faulty backends._finding backends._synchronous",
    5: "parser _iso virtual.loopback virtual.hid virtual.serial_port "
    "virtual.bulk_only virtual.audio virtual.facedancer "
    "backends.pyusb testing._packet_log",
    6: "_link _stream_host virtual.keyboard virtual.mouse virtual.serial_pty virtual.mass_storage virtual.cdrom "
    "backends._source",
    7: "host _exchange virtual virtual._demos testing.qemu._agent _qmp",
    8: "guest _virtual_kinds testing.qemu._image",
    9: "transport _aio_stream testing._pair _describe _disk_client _pyusb_device",
    10: "demo exporter _aio_host testing._bench testing._server testing.qemu._machine _pyusb_hosts",
    11: "_messages aio testing.conformance testing.qemu pyusb_backend",
    12: "_attach _export _listing testing _pyusb_handover",
    13: "pytest_plugin _startup.sitecustomize",
    14: "_run",
    15: "cli",
    16: "__main__",
}
"""A module imports only from lower layers."""
LEVEL = {name: level for level, names in LAYERS.items() for name in names.split()}

TESTED_ELSEWHERE = {
    "__init__": ("test_architecture.py", "it has a docstring and a version, no code"),
    "__main__": ("test_cli.py", "two lines: the command as a process"),
    "_describe": ("test_cli.py", "part of the demonstration"),
    "_ending": ("test_cli.py", "what all commands share; signals also in test_export"),
    "_disk_client": ("test_cli.py", "part of the demonstration"),
    "_aio_host": ("test_aio.py", "half of aio: guests and hosts are tested with each other"),
    "_aio_stream": ("test_aio.py", "what both halves of aio stand on"),
    "_exchange": ("test_guest.py", "the protocol below Guest; with asyncio in test_aio"),
    "requests": ("test_guest.py", "each is a call of a guest"),
    "_keep_alive": ("test_transport.py", "options of connections; with asyncio in test_aio"),
    "_link": ("test_host.py", "what hosts and guests hand to their parser"),
    "_framing": (
        "test_parser.py",
        "the receiving half of the parser, whose promises are told there; also test_hostile",
    ),
    "_pyusb_descriptors": ("test_pyusb_backend.py", "what pyusb sees of a device"),
    "_pyusb_device": ("test_pyusb_backend.py", "the back end's half that knows streams"),
    "_pyusb_handover": ("test_run.py", "from one process to the next"),
    "_pyusb_hosts": ("test_pyusb_backend.py", "connections of the back end"),
    "_startup": ("test_run.py", "a folder"),
    "_startup.sitecustomize": ("test_run.py", "what interpreters do when they start"),
    "_stream_host": ("test_host_streams.py", "half of the host; isochronous streams in test_host_iso"),
    "_queue": ("test_parser.py", "the sending half of the parser; with threads in test_stress_threads"),
    "_state": ("test_vectors.py", "a format: compared with states of the original library; also test_parser"),
    "backends": ("test_backends_pyusb.py", "a docstring"),
    "backends._backend": ("test_backends_pyusb.py", "pyusb's internals and file descriptors"),
    "backends._base": ("test_backends_pyusb.py", "the half that all devices share; errors in test_backends_finding"),
    "backends._completions": ("test_backends_pyusb.py", "events; also test_backends_synchronous"),
    "backends._context": ("test_backends_pyusb.py", "what a device stands on; also test_backends_hazards"),
    "backends._exit": ("test_backends_hazards.py", "ends of processes"),
    "backends._libusb": ("test_backends_pyusb.py", "prototypes and numbers"),
    "backends._native": ("test_backends_pyusb.py", "transfers as C memory"),
    "backends._raw_descriptors": ("test_backends_pyusb.py", "descriptors of the virtual bus at both speeds"),
    "backends._system": ("test_backends_finding.py", "what is told with devices and errors"),
    "demo": ("test_cli.py", "a command"),
    "device": ("test_virtual_base.py", "an interface; the tests of what satisfies it"),
    "testing": ("test_guest.py", "re-exports"),
    "testing._bench": ("test_testing_conformance.py", "what the rules of the kit stand on"),
    "testing._packet_log": ("test_pytest_plugin.py", "what failures show"),
    "testing._server": ("test_pytest_plugin.py", "a fixture"),
    "testing._pair": ("test_guest.py", "linked_pair is what these tests stand on"),
    "testing.qemu._agent": ("test_testing_qemu.py", "part of the guest of tests"),
    "testing.qemu._guest_error": ("test_testing_qemu.py", "an exception"),
    "testing.qemu._machine": ("test_testing_qemu.py", "part of the guest of tests; with a real one in test_qemu"),
    "testing.qemu._image": ("test_testing_qemu.py", "part of the guest of tests"),
    "virtual": ("test_virtual_base.py", "re-exports"),
    "virtual._demos": ("test_virtual_kinds.py", "what the command's devices do by themselves"),
    "virtual.bulk_only": ("test_mass_storage.py", "what carries the commands of sticks and drives"),
    "virtual.scsi_cdrom": ("test_cdrom.py", "the drive inside the device"),
    "virtual.scsi_disk": ("test_scsi.py", "the target that the others are tested with"),
}
"""Modules without a test file of their own name: which tests them, and why."""


def module_name(path: Path) -> str:
    """``virtual.base`` for src/usbredir/virtual/base.py; a package by its own name, usbredir itself as ``__init__``."""
    parts = list(path.relative_to(SOURCE).with_suffix("").parts)
    if parts[-1] == "__init__" and len(parts) > 1:
        parts.pop()
    return ".".join(parts)


PATHS = {module_name(path): path for path in sorted(SOURCE.rglob("*.py"))}
MODULES = [name for name in PATHS if name != "__init__"]
every_module = pytest.mark.parametrize("name", MODULES)


def load(name: str) -> ModuleType:
    return usbredir if name == "__init__" else importlib.import_module(f"usbredir.{name}")


# ================================================================ layers


def imports(path: Path) -> set[str]:
    """Names of the usbredir modules that a file imports, wherever in it."""
    package = ["usbredir", *path.relative_to(SOURCE).parts[:-1]]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # "from . import filter" imports a module, "from . import __version__" a name of the package.
            found |= {f"{module}.{alias.name}" for alias in node.names} | {module}
    names = {name.removeprefix("usbredir.") for name in found if name.startswith("usbredir.")}
    return names & set(PATHS)


def test_every_module_has_a_layer() -> None:
    """And every row of the table is a module."""
    assert set(LEVEL) == set(MODULES)


@every_module
def test_arrows_point_down(name: str) -> None:
    for imported in imports(PATHS[name]):
        assert LEVEL[imported] < LEVEL[name], f"{name} imports {imported}, which is not below it"


def test_the_package_imports_nothing() -> None:
    """``import usbredir`` is cheap."""
    assert not imports(PATHS["__init__"])


def test_the_test_sees_imports() -> None:
    """That of a module, of a name in it, of a package, and inside a function."""
    assert {"packets", "_framing", "capabilities"} <= imports(PATHS["parser"])
    assert {"descriptors", "virtual.base"} <= imports(PATHS["virtual.loopback"])
    assert {"_virtual_kinds", "backends._source", "exporter"} <= imports(PATHS["_export"])


ALONE = """
import importlib, sys
importlib.import_module(sys.argv[1])
print(*sorted(name for name in sys.modules if name.partition(".")[0] in ("usbredir", "usb", "libusb_package")))
"""


@pytest.mark.parametrize("name", [name for name in MODULES if name != "__main__"])
def test_a_module_can_be_imported_alone(name: str) -> None:
    """In a fresh interpreter, with warnings as errors; it loads nothing of higher layers and no USB library."""
    finished = subprocess.run(
        [sys.executable, "-W", "error", "-c", ALONE, f"usbredir.{name}"],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    loaded = finished.stdout.split()
    assert f"usbredir.{name}" in loaded
    if not name.startswith(("backends", "pyusb_backend", "_pyusb_handover")):
        assert not [module for module in loaded if module.startswith(("usb.", "libusb_package")) or module == "usb"]
    above = {module.removeprefix("usbredir.") for module in loaded if module.startswith("usbredir.")} - {name}
    if not name.startswith(("virtual", "testing")):
        assert all(LEVEL[module] < LEVEL[name] for module in above)
    if name in ("host", "guest", "parser", "transport"):
        assert not [module for module in above if module.startswith(("virtual", "backends"))]


SLOW = (
    "argparse asyncio concurrent.futures ctypes dataclasses inspect json libusb_package logging multiprocessing random "
    "select selectors socket ssl subprocess tempfile tokenize traceback usb"
)
"""Modules that take long to import."""
COMMAND = "from usbredir.cli import main; import contextlib\nwith contextlib.suppress(SystemExit): main(sys.argv[1:])"


def loaded_by(statement: str, *arguments: str) -> set[str]:
    """Names of the modules that a fresh interpreter imports for *statement*."""
    program = f"import sys; before = set(sys.modules)\n{statement}\nprint(*set(sys.modules) - before)"
    finished = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=PATIENCE, check=True
    )
    return set(finished.stdout.splitlines()[-1].split())


def test_importing_the_parser_is_quick() -> None:
    """Nothing slow comes along that a parser only may need."""
    loaded = loaded_by("import usbredir.parser")
    assert "usbredir.parser" in loaded
    assert not loaded & set(SLOW.split())


@pytest.mark.parametrize("arguments", [["--version"], ["--help"]])
def test_the_command_starts_quickly(arguments: list[str]) -> None:
    """What it can tell by itself it tells without the modules of its commands."""
    loaded = loaded_by(COMMAND, *arguments)
    assert {name for name in loaded if name.startswith("usbredir")} == {"usbredir", "usbredir.cli", "usbredir._ending"}
    assert not loaded & {"asyncio", "ctypes", "logging", "socket", "usb"}


def test_a_command_imports_no_other() -> None:
    loaded = loaded_by(COMMAND, "list", "--help")
    assert "usbredir._listing" in loaded
    assert not loaded & {"usbredir._attach", "usbredir._export", "usbredir._run", "usbredir.exporter", "usbredir.demo"}


def test_the_host_knows_no_device() -> None:
    """It drives whatever satisfies UsbDevice: neither it nor what it imports imports devices."""
    reached, open_ = set[str](), {"host"}
    while open_:
        name = open_.pop()
        reached.add(name)
        # But for one, imported when it is needed: a usb.core.Device is wrapped.
        open_ |= imports(PATHS[name]) - reached - {"backends.pyusb"}
    assert not [name for name in reached if name.startswith(("virtual", "backends"))]


# ================================================================ test files


@pytest.mark.parametrize("name", PATHS)
def test_every_module_has_its_tests(name: str) -> None:
    """tests/test_X.py for X.py; exceptions are in the table, each with a reason, and none is out of date."""
    short = name.rpartition(".")[2].lstrip("_")
    mirrors = [f"test_{short}.py", f"test_{'_'.join(part.lstrip('_') for part in name.split('.'))}.py"]
    present = [mirror for mirror in mirrors if (TESTS / mirror).exists()]
    if name in TESTED_ELSEWHERE:
        file, reason = TESTED_ELSEWHERE[name]
        assert (TESTS / file).exists(), f"{file} is said to test {name}"
        assert reason
        assert not present, f"{name} has its own {present}: take it out of the table"
    else:
        assert present, f"no tests for {name}: one of {mirrors}, or a row in TESTED_ELSEWHERE"


def test_the_table_of_exceptions_is_about_modules() -> None:
    assert set(TESTED_ELSEWHERE) <= set(PATHS)


# ================================================================ docstrings


def public_names(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """The names a module defines for others."""
    for name in getattr(module, "__all__", ()):
        yield name, getattr(module, name)


@every_module
def test_every_module_says_what_it_offers(name: str) -> None:
    """A docstring, and __all__ with names that exist, each once."""
    if name == "__main__":
        return
    module = load(name)
    assert (module.__doc__ or "").strip()
    names = list(module.__all__)
    assert len(names) == len(set(names))
    assert not [public for public in names if not hasattr(module, public)]


@pytest.mark.parametrize("name", [name for name in MODULES if name != "__main__"])
def test_every_public_name_has_a_docstring(name: str) -> None:
    """Classes and functions, and the public methods of classes (those may be inherited)."""
    module = load(name)
    missing = []
    for public, value in public_names(module):
        if not (inspect.isclass(value) or inspect.isfunction(value)):
            continue
        if not (value.__doc__ or "").strip():
            missing.append(public)
        for member, function in vars(value).items() if inspect.isclass(value) else ():
            documented = inspect.getdoc(getattr(value, member, None))
            kinds = (property, staticmethod, classmethod)
            if not member.startswith("_") and (inspect.isfunction(function) or isinstance(function, kinds)):
                missing += [f"{public}.{member}"] if not documented else []
    assert not missing


# ================================================================ the public contract

PACKETS = (
    "Hello DeviceConnect DeviceDisconnect Reset InterfaceInfo EpInfo SetConfiguration GetConfiguration "
    "ConfigurationStatus SetAltSetting GetAltSetting AltSettingStatus StartIsoStream StopIsoStream IsoStreamStatus "
    "StartInterruptReceiving StopInterruptReceiving InterruptReceivingStatus AllocBulkStreams FreeBulkStreams "
    "BulkStreamsStatus CancelDataPacket FilterReject FilterFilter DeviceDisconnectAck StartBulkReceiving "
    "StopBulkReceiving BulkReceivingStatus ControlPacket BulkPacket IsoPacket InterruptPacket BufferedBulkPacket"
)
PROMISED: dict[str, str] = {
    "locking": "LockCallbacks LockCallbacks.alloc_lock LockCallbacks.lock LockCallbacks.unlock LockCallbacks.free_lock "
    "ThreadingLocks",
    "packets": PACKETS + " PacketType Status Speed TransferType Capability PACKET_TYPES Packet",
    "parser": "LogLevel ParserCallbacks ParserCallbacks.log ParserCallbacks.read ParserCallbacks.write "
    "ParserCallbacks.packet_received Parser Parser.do_read Parser.do_write Parser.send Parser.has_data_to_write "
    "Parser.buffered_output_size Parser.have_capability Parser.peer_has_capability Parser.have_peer_capabilities "
    "Parser.serialize Parser.unserialize Parser.close Parser.__enter__ Parser.__exit__ Limits ALL",
    "filter": "FilterRule FilterResult FilterResult.ALLOW FilterResult.DENY FilterResult.NO_MATCH DeviceIds parse "
    "format check",
    "host": "HostCallbacks HostCallbacks.log HostCallbacks.read HostCallbacks.write HostCallbacks.flush_writes Host "
    "Host.set_device Host.read_guest_data Host.write_guest_data Host.has_data_to_write Host.buffered_output_size "
    "Host.close check_device_filter",
    "device": "UsbDevice UsbDevice.claim UsbDevice.release UsbDevice.set_configuration UsbDevice.set_alt_setting "
    "UsbDevice.reset UsbDevice.clear_halt UsbDevice.alloc_streams UsbDevice.submit UsbDevice.cancel TransferResult",
    "guest": "Guest GuestCallbacks TransferResult Guest.call Guest.submit Guest.pipeline",
    "requests": "Request bulk_in bulk_out control_in control_out",
    "aio": "connect serve Guest",
    "virtual": "VirtualDevice LoopbackDevice MassStorage SerialPort Keyboard Mouse Cdrom AudioSource AudioSink Faulty",
    "backends.pyusb": "LibusbDevice wrap open_device open_fd parse_spec DeviceSpec DeviceInfo list_devices",
    "testing": "linked_pair check_device ConformanceError PacketLog Server",
    "pyusb_backend": "Backend Backend.close get_backend",
    "transport": "listen connect",
    "cli": "main ExitCode",
    "errors": "UsbRedirError ProtocolError LocalProtocolError QueueFullError RemoteProtocolError StateError "
    "FilterSyntaxError DeviceError DeviceLostError DeviceRejectedError DeviceClaimError DeviceNotFoundError "
    "ConnectionClosed",
}


def promises() -> Iterator[Any]:
    for module, names in PROMISED.items():
        for name in names.split():
            yield pytest.param(module, name, id=f"{module}-{name}")


@pytest.mark.parametrize(("module", "name"), list(promises()))
def test_what_is_promised_exists(module: str, name: str) -> None:
    """Names of the public contract; the first part of a dotted one is in __all__."""
    loaded = load(module)
    value: Any = loaded
    for part in name.split(".") if name else ():
        value = getattr(value, part)
    assert not name or name.partition(".")[0] in loaded.__all__


PARAMETERS: dict[str, str] = {
    "parser.Parser": "callbacks * version capabilities usb_host write_owns_buffer send_hello locks limits",
    "parser.Parser.send": "self packet",
    "parser.Parser.unserialize": "self state",
    "parser.ParserCallbacks.log": "self level message",
    "parser.ParserCallbacks.read": "self count",
    "parser.ParserCallbacks.write": "self data",
    "filter.parse": "text token_sep rule_sep",
    "filter.format": "rules token_sep rule_sep",
    "filter.check": "rules device * default_allow dont_skip_non_boot_hid",
    "host.Host": "callbacks device * version locks write_owns_buffer limits",
    "host.Host.set_device": "self device",
    "host.check_device_filter": "rules device **flags",
    "testing.linked_pair": "device",
    "device.TransferResult": "status data",
    "filter.FilterRule": "device_class vendor_id product_id device_version_bcd allow",
    "filter.DeviceIds": "device_class device_subclass device_protocol vendor_id product_id device_version_bcd "
    "interfaces",
}


@pytest.mark.parametrize(("path", "expected"), PARAMETERS.items())
def test_signatures(path: str, expected: str) -> None:
    """The promised arguments, in order; keyword-only ones may be followed by others."""
    module, *names = path.split(".")
    value: Any = load(module)
    for name in names:
        value = getattr(value, name)
    parameters = inspect.signature(value).parameters.values()
    shown: list[str] = []
    for parameter in parameters:
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in shown:
            shown.append("*")
        shown.append(("**" if parameter.kind is parameter.VAR_KEYWORD else "") + parameter.name)
    promised = expected.split()
    assert shown[: len(promised)] == promised
    assert shown == promised or "*" in shown[: len(promised) + 1], "more positional arguments than promised"


def test_the_package_is_typed() -> None:
    assert (SOURCE / "py.typed").exists()
    assert '"py.typed"' in (ROOT / "pyproject.toml").read_text()


def test_the_command_is_installed() -> None:
    assert 'usbredir = "usbredir.cli:main"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize(
    "text",
    [
        'requires-python = ">=3.10"',
        '"pyusb',
        '"libusb-package>=1.0.30"',
    ],
)
def test_requirements(text: str) -> None:
    assert text in (ROOT / "pyproject.toml").read_text()


def test_versions_agree() -> None:
    """The package's, the project's, and that in hello."""
    from usbredir.parser import VERSION

    assert f'version = "{usbredir.__version__}"' in (ROOT / "pyproject.toml").read_text()
    assert VERSION.endswith(usbredir.__version__)


# ================================================================ how the tests are run

SKIPPING = """
import pytest

def test_passes():
    pass

def test_skips():
    pytest.skip("no such tool")

@pytest.mark.skipif(True, reason="marked")
def test_marked():
    pass

@pytest.mark.xfail(reason="known")
def test_known():
    assert False
"""
SKIPPING_MODULE = "import pytest\npytest.skip('the whole module', allow_module_level=True)\n"


@pytest.mark.parametrize("forbidden", [False, True])
def test_skips_can_be_forbidden(tmp_path: Path, forbidden: bool) -> None:
    """USBREDIR_NO_SKIPS=1 turns each skip into a failure that tells its reason; expected failures stay."""
    (tmp_path / "test_some.py").write_text(SKIPPING)
    (tmp_path / "test_module.py").write_text(SKIPPING_MODULE)
    options = [
        "-c",
        os.devnull,
        "--rootdir",
        str(tmp_path),
        "-p",
        "tests.conftest",
        "-rA",
        "--continue-on-collection-errors",
    ]
    plugins = ["-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:randomly", "-p", "no:benchmark"]
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *plugins, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
        cwd=ROOT,
        env={**os.environ, "USBREDIR_NO_SKIPS": "1" if forbidden else ""},
    )
    if forbidden:
        assert finished.returncode != 0
        assert "no such tool" in finished.stdout
        assert "marked" in finished.stdout
        assert "the whole module" in finished.stdout
        assert "skipped" not in finished.stdout.splitlines()[-1]
    else:
        assert re.search(r"1 passed, 3 skipped, 1 xfailed", finished.stdout), finished.stdout


@pytest.mark.parametrize("name", ["default", "ci"])
def test_hypothesis_profiles(name: str) -> None:
    """No deadline anywhere: machines are shared."""
    from hypothesis import settings

    profile = settings.get_profile(name)
    assert profile.deadline is None
    assert profile.print_blob is (name == "ci") or profile.print_blob
    assert profile.max_examples >= (200 if name == "ci" else 20)
