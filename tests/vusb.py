"""The virtual USB bus below the real libusb, for tests of real devices without hardware.

Built from ``../shared/vusb`` with one compiler call, once per machine; preloaded into a process of its own, since it
replaces that process's view of the USB bus. Tests that need it skip where the folder or the compiler is missing.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT.parent / "shared" / "vusb"
PRELOADED = ("usbfs_preload.c", "vdev.c")
LIMIT = 120.0
"""Seconds that a process may take, on a busy machine."""


def preload_library() -> Path:
    """The shared object to preload; skips when it cannot be built here."""
    compiler = shutil.which("cc")
    if compiler is None or not SOURCES.is_dir():
        pytest.skip("needs a C compiler and ../shared/vusb")
    texts = b"".join((SOURCES / name).read_bytes() for name in (*PRELOADED, "vdev.h"))
    directory = Path(tempfile.gettempdir()) / f"usbredir-vusb-{hashlib.sha256(texts).hexdigest()[:16]}"
    directory.mkdir(exist_ok=True)
    library = directory / "libvusbfs.so"
    with open(directory / "lock", "w", encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            made = library.with_suffix(".new")
            sources = [str(SOURCES / name) for name in PRELOADED]
            subprocess.run([compiler, "-O2", "-fPIC", "-shared", "-o", made, *sources, "-ldl", "-lpthread"], check=True)
            made.rename(library)
    return library


def environment(**variables: object) -> dict[str, str]:
    """The environment of a process on the bus. *variables*: VUSB_* settings, without the prefix, in any case."""
    env = {**os.environ, "LD_PRELOAD": str(preload_library())}
    env.update({f"VUSB_{name.upper()}": str(value) for name, value in variables.items()})
    return env


def run(program: str, *arguments: str, env: Mapping[str, str] | None = None, code: int = 0) -> str:
    """Run a Python *program* (text) on the bus and return what it printed; it has to end with *code*."""
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", program, *arguments],
        env=env or environment(),
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert done.returncode == code, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout
