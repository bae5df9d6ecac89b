"""The hosts that the cases of ``odd_cases`` run against, and the recording of what usbredirect answers.

Record again, as root, in a folder with Debian trixie and usbredirect (see bench/README.md); the bus and the libusb that
our own tests use are copied into it:

    python -m tests.odd_peers --root /path/to/folder
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import libusb_package

from usbredir import transport
from usbredir.errors import UsbRedirError
from usbredir.proto import Speed
from usbredir.virtual import LoopbackDevice

from . import vusb
from .odd_cases import CASES, GREETING, PATIENCE, THE_END, Case, Guest, perform

RECORDING = Path(__file__).resolve().parent / "data" / "usbredirect-0.15.json"
DEVICE = "1209:0001"

NOT_SERVED = "the device is not served"

PROBE = ("detach", "claim", "release", "attach")
"""What usbredirect does with each interface before it takes a device."""
PROBE_REASON = "a device is claimed and released once before it is taken"
"""Why we do not: words that docs/deviations.md has, too."""

SERVER = """
import sys
from usbredir import transport
from usbredir.backends.pyusb import open_device
from usbredir.errors import DeviceError, UsbRedirError

try:
    device = open_device(sys.argv[1])
except DeviceError as error:
    print(error, file=sys.stderr)
    sys.exit(3)
with transport.listen("127.0.0.1:0") as listener:
    print(listener.address.port, flush=True)
    connection = listener.accept()
    try:
        with connection:
            transport.serve(connection, device)
    except (UsbRedirError, ConnectionError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    finally:
        device.close()
"""


class Result(NamedTuple):
    """What a host answered, a line per packet, and what it did with its device (empty: nobody saw)."""

    answers: list[str]
    log: list[str]


# ---------------------------------------------------------------- running a script


def run_script(case: Case, sock: socket.socket, is_unplugged: Callable[[], bool]) -> list[str]:
    """Perform a case's script on a connected socket, hang up, and return the lines."""
    with sock:
        guest = Guest(sock, case.capabilities, lambda: wait_until(is_unplugged))
        if case.greets:
            GREETING.perform(guest)
            if not case.announcement:
                guest.answers.clear()
        perform(guest, case.steps)
    return guest.answers


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait until a function returns True."""
    limit = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < limit, "it did not happen"
        time.sleep(0.002)


def read_log(log: Path) -> list[str]:
    """The device's log. Lines that repeat count once: how often a stalling stream is restarted depends on time."""
    lines = log.read_text(encoding="ascii").splitlines() if log.exists() else []
    return [line for index, line in enumerate(lines) if index == 0 or line != lines[index - 1]]


# ---------------------------------------------------------------- the hosts


@functools.cache
def bring_bus(root: Path) -> str:
    """Copy the bus and libusb-package's libusb into *root*; their folder there. Other processes may do so as well."""
    folder = root / "opt" / "usbredir-tests"
    folder.mkdir(parents=True, exist_ok=True)
    sources = {"libvusbfs.so": vusb.preload_library(), "libusb-1.0.so.0": Path(str(libusb_package.get_library_path()))}
    for name, source in sources.items():
        copy = folder / f"{name}.{os.getpid()}"
        shutil.copy(source, copy)
        copy.replace(folder / name)
    return "/opt/usbredir-tests"


def run_peer(case: Case, root: Path) -> Result:
    """usbredirect in the folder *root*."""
    bus = bring_bus(root)
    with tempfile.TemporaryDirectory(dir=root / "tmp", prefix="usbredir-") as directory, free_port() as port:
        log, inside = Path(directory) / "log", Path("/tmp") / Path(directory).name
        settings = {f"VUSB_{name}": value for name, value in case.settings.items()}
        # The bus keeps files in TMPDIR, which a process that dies leaves behind.
        settings |= {"VUSB_LOG": f"{inside}/log", "TMPDIR": f"{inside}", "LD_PRELOAD": f"{bus}/libvusbfs.so"}
        words = [f"{name}={value}" for name, value in settings.items()]
        command = ["chroot", str(root), "/usr/bin/env", f"LD_LIBRARY_PATH={bus}", *words]
        command += ["usbredirect", "--device", DEVICE, "--as", f"127.0.0.1:{port}"]
        with running(command, {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}) as process:
            sock = connect(port, process)
            answers = [NOT_SERVED] if sock is None else run_script(case, sock, lambda: "UNPLUG" in read_log(log))
            code = process.wait(PATIENCE)
        if code < 0:
            assert answers[-1] == THE_END, f"{case.name}: died of signal {-code} after {answers}"
            answers[-1] = f"the process died: {signal.Signals(-code).name}"
        return Result(answers, read_log(log))


def run_ours(case: Case) -> Result:
    """A process of ours on the virtual bus."""
    with tempfile.TemporaryDirectory(prefix="usbredir-") as directory:
        log = Path(directory) / "log"
        environment = {**vusb.environment(log=log, **case.settings), "TMPDIR": directory}
        with running([sys.executable, "-c", SERVER, DEVICE], environment) as process:
            assert process.stdout is not None
            port = process.stdout.readline()
            answers = [NOT_SERVED]
            if port:
                sock = socket.create_connection(("127.0.0.1", int(port)), PATIENCE)
                answers = run_script(case, sock, lambda: "UNPLUG" in read_log(log))
            code = process.wait(PATIENCE)
            assert code == (0 if port else 3), f"exit status {code}"
        return Result(answers, read_log(log))


def run_loopback(case: Case) -> Result:
    """A host of ours with a LoopbackDevice, in a thread."""
    device = LoopbackDevice(
        speed=Speed[case.settings.get("SPEED", "high").upper()],
        iso_period=float(case.settings.get("ISO_PERIOD_US", 125)) / 1e6,
    )
    ours, theirs = socket.socketpair()

    def serve() -> None:
        with transport.Connection(theirs, "guest") as connection, contextlib.suppress(UsbRedirError, ConnectionError):
            transport.serve(connection, device)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        return Result(run_script(case, ours, lambda: device.lost), [])
    finally:
        ours.close()
        thread.join(PATIENCE)
        device.close()
        assert not thread.is_alive(), "the host does not end"


@contextlib.contextmanager
def running(command: Sequence[str], environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """A process, which is killed if it has not ended by itself; what it said is shown when the body fails."""
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)
        try:
            yield process
        except BaseException:
            errors.seek(0)
            sys.stderr.write(errors.read())
            raise
        finally:
            if process.poll() is None:
                process.kill()
            process.communicate()


@contextlib.contextmanager
def free_port() -> Iterator[int]:
    """A port that nobody listens on."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
    yield port


def connect(port: int, process: subprocess.Popen[str]) -> socket.socket | None:
    """Connect as soon as the process listens; None when it has ended before."""
    limit = time.monotonic() + PATIENCE
    while True:
        sock = socket.socket()
        # A connection to a port of one's own range may come about without a listener: with itself.
        sock.settimeout(PATIENCE)
        try:
            sock.connect(("127.0.0.1", port))
        except ConnectionError:
            sock.close()
        else:
            if sock.getsockname() != sock.getpeername():
                return sock
            sock.close()
        if process.poll() is not None:
            return None
        assert time.monotonic() < limit, "the process does not listen"
        time.sleep(0.005)


# ---------------------------------------------------------------- the recording


def load() -> dict[str, Result]:
    """What was recorded, by case."""
    recorded = json.loads(RECORDING.read_text(encoding="utf-8"))
    return {name: Result(entry["answers"], entry["log"].split("; ")) for name, entry in recorded["cases"].items()}


def without_probe(log: list[str]) -> list[str]:
    """usbredirect's log without what it does before it takes the device: see PROBE."""
    start = end = log.index("open") + 1
    while log[end : end + len(PROBE)] == [f"{action} {(end - start) // len(PROBE)}" for action in PROBE]:
        end += len(PROBE)
    return log[:start] + log[end:]


def main() -> None:
    """Run every case against usbredirect, twice, and write down what it does."""
    arguments = argparse.ArgumentParser(description=main.__doc__)
    arguments.add_argument("--root", type=Path, required=True, help="folder with usbredirect")
    arguments.add_argument("--only", default="", help="print the cases whose names contain this; nothing is written")
    options = arguments.parse_args()
    recorded = {}
    for case in CASES:
        if options.only not in case.name:
            continue
        try:
            result = run_peer(case, options.root)
        except AssertionError as error:
            print(f"{case.name}: {error}", file=sys.stderr)
            continue
        if options.only:
            print(f"== {case.name}", *result.answers, "; ".join(result.log), sep="\n  ")
            continue
        again = run_peer(case, options.root)
        if again != result:
            print(f"{case.name}: not the same twice\n  {result}\n  {again}", file=sys.stderr)
        recorded[case.name] = {"answers": result.answers, "log": "; ".join(result.log)}
    if not options.only:
        meta = {
            "source": "usbredirect 0.15.0 (Debian trixie), real libusb 1.0, device vusb",
            "script": "tests/odd_peers.py",
        }
        text = json.dumps({"meta": meta, "cases": recorded}, indent=1)
        RECORDING.write_text(text + os.linesep, encoding="utf-8")


if __name__ == "__main__":
    main()
