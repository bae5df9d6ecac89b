"""Devices exported for programs that use pyusb, and programs of others, installed once and kept.

``USBREDIR_THIRD_PARTY=1`` allows to install what is not there yet, from the package index. Without it, or without a
network, tests that need a program are skipped unless it was installed before. The folder is ``.cache/third-party``, or
``USBREDIR_THIRD_PARTY_CACHE``.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from usbredir.device import UsbDevice
from usbredir.errors import UsbRedirError
from usbredir.transport import connect, listen, serve

__all__ = ["PATIENCE", "exported", "run_with", "source_release", "virtual_environment"]

PATIENCE = 60.0
"""Seconds that a program may take on a busy machine."""
INSTALL_PATIENCE = 300.0
"""Seconds that an installation may take."""
ROOT = Path(__file__).parent.parent


@contextlib.contextmanager
def exported(device: UsbDevice, address: str = "127.0.0.1:0") -> Iterator[str]:
    """The address at which *device* serves one guest after the other, in a thread; closed at the end."""
    with listen(address) as listener:
        ended = threading.Event()

        def export() -> None:
            while not ended.is_set():
                connection = listener.accept(PATIENCE)
                if connection is not None and not ended.is_set():
                    with connection, contextlib.suppress(UsbRedirError, OSError):
                        serve(connection, device, listener=listener, stop=ended.is_set)
                elif connection is not None:
                    connection.close()

        thread = threading.Thread(target=export)
        thread.start()
        try:
            yield str(listener.address)
        finally:
            ended.set()
            device.wake()
            with contextlib.suppress(OSError):  # it may be waiting for a guest
                connect(str(listener.address)).close()
            thread.join(PATIENCE)
            assert not thread.is_alive()
            device.close()


def run_with(
    address: str,
    *program: object,
    more: Sequence[str] = (),
    code: int = 0,
    folder: Path | None = None,
    text: str = "",
    **environment: str,
) -> str:
    """What a program below ``usbredir run`` prints, after it has ended with *code*.

    *more* are further addresses, *text* is the input.
    """
    connect_options = [f"--connect={each}" for each in (address, *more)]
    finished = subprocess.run(
        [sys.executable, "-m", "usbredir", "run", *connect_options, "--", *map(str, program)],
        input=text,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE,
        check=False,
        cwd=folder,
        env={**os.environ, **environment},
    )
    assert finished.returncode == code, finished.stdout
    return finished.stdout


# ---------------------------------------------------------------- programs of others


def virtual_environment(*requirements: str) -> Path:
    """The folder with the programs of a virtual environment that has these packages, and nothing of ours."""

    def make(folder: Path) -> None:
        _call(sys.executable, "-m", "venv", folder)
        _call(folder / "bin" / "python", "-m", "pip", "install", "--quiet", *requirements)

    return _kept("environment", requirements, make) / "bin"


def source_release(name: str, version: str) -> Path:
    """The folder of a source release."""

    def make(folder: Path) -> None:
        arguments = ["--quiet", "--no-deps", "--no-binary", ":all:", "--dest", folder, f"{name}=={version}"]
        _call(sys.executable, "-m", "pip", "download", *arguments)
        (archive,) = folder.glob("*.tar.gz")
        with tarfile.open(archive) as opened:
            opened.extractall(folder, filter="data")
        archive.unlink()

    return _kept(f"{name}-{version}", [], make) / f"{name}-{version}"


def _kept(name: str, requirements: Sequence[str], make: Callable[[Path], None]) -> Path:
    """The folder that *make* has filled, now or at an earlier time. Skips the test when it cannot be had."""
    text = "\n".join((*sorted(requirements), sys.version, sys.prefix))
    cache = Path(os.environ.get("USBREDIR_THIRD_PARTY_CACHE") or ROOT / ".cache" / "third-party").resolve()
    folder = cache / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    complete = folder / ".complete"
    if not complete.exists() and os.environ.get("USBREDIR_THIRD_PARTY") != "1":
        pytest.skip("programs of others are installed with USBREDIR_THIRD_PARTY=1 only")
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several processes run tests
        if not complete.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            complete.touch()
    return folder


def _call(*command: object) -> None:
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=INSTALL_PATIENCE, check=False
    )
    if done.returncode:
        pytest.skip(f"cannot be installed, without a network perhaps: {done.stderr[-500:]}")
