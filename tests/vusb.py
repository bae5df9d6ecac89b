"""The virtual USB bus below the real libusb, for tests of real devices without hardware.

Built from ``../shared/vusb`` with one compiler call, once per machine; preloaded into a process of its own, since it
replaces that process's view of the USB bus. Tests that need it skip where the folder or the compiler is missing.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT.parent / "shared" / "vusb"
PRELOADED = ("usbfs_preload.c", "vdev.c")
LIMIT = 120.0
"""Seconds that a process may take, on a busy machine."""


FD_SOURCE = Path(__file__).with_name("vusb_fd.c")

PRELUDE = """
import gc, json, logging, os, select, sys, threading, time
import usb.core
from usbredir.backends import pyusb as backends
from usbredir.backends._finding import find_all, new_backend
from usbredir.device import Transfer
from usbredir.errors import DeviceClaimError, DeviceError, DeviceLostError, DeviceNotFoundError
from usbredir.proto import Speed, Status, TransferType

CONTROL, ISO = TransferType.CONTROL, TransferType.ISO
BULK, INTERRUPT = TransferType.BULK, TransferType.INTERRUPT
LIMIT = 60.0
IDS = backends.parse_spec("1209:0001")
out = {}

def make(kind, endpoint, length=None, callback=None, *, data=b"", **more):
    length = len(data) if length is None else length
    return Transfer(kind, endpoint, length, callback or (lambda transfer: None), data=data, **more)

def vendor_in(request, length, value=0, index=0, callback=None):
    return make(CONTROL, 0x80, length, callback, setup=(0xC0, request, value, index))

def vendor_out(request, data=b"", value=0, index=0, callback=None):
    return make(CONTROL, 0x00, None, callback, data=data, setup=(0x40, request, value, index))

def until(device, condition):
    end = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < end, "never"
        device.handle_events(1.0)

def complete(device, *transfers):
    "Submit and wait for all; the first one."
    done = []
    for transfer in transfers:
        transfer.callback = done.append
        assert device.submit(transfer) == Status.SUCCESS
    until(device, lambda: len(done) == len(transfers))
    return transfers[0]

def told(transfer):
    return [int(transfer.status), transfer.actual_length, bytes(transfer.data).hex(), transfer.device_lost]

def same_device_twice():
    "Two objects of pyusb for the device, in one context."
    backend = new_backend()
    return [find_all(IDS, backend)[0] for _ in range(2)]
"""
"""What programs on the bus begin with. They leave what they found in *out*."""


def _build(name: str, sources: Sequence[Path], others: Sequence[Path] = ()) -> Path:
    """A shared object of C *sources*, made once per machine and version; skips where there is no compiler."""
    compiler = shutil.which("cc")
    if compiler is None or not all(path.exists() for path in sources):
        pytest.skip("needs a C compiler and ../shared/vusb")
    texts = b"".join(path.read_bytes() for path in (*sources, *others))
    directory = Path(tempfile.gettempdir()) / f"usbredir-vusb-{hashlib.sha256(texts).hexdigest()[:16]}"
    directory.mkdir(exist_ok=True)
    library = directory / name
    with open(directory / "lock", "w", encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            made = library.with_suffix(".new")
            options = ["-O2", "-fPIC", "-shared", "-o", str(made), *map(str, sources), "-ldl", "-lpthread"]
            subprocess.run([compiler, *options], check=True)
            made.rename(library)
    return library


def preload_library() -> Path:
    """The shared object to preload; skips when it cannot be built here."""
    return _build("libvusbfs.so", [SOURCES / name for name in PRELOADED], [SOURCES / "vdev.h"])


def fd_library() -> Path:
    """What goes before it where an open descriptor is handed over (``vusb_fd.c``)."""
    return _build("libvusb_fd.so", [FD_SOURCE])


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


def found(program: str, *arguments: str, env: Mapping[str, str] | None = None, code: int = 0) -> Any:
    """What a *program*, with :data:`PRELUDE` before it, left in *out*; through JSON."""
    text = run(f"{PRELUDE}\n{program}\nprint(json.dumps(out), flush=True)\n", *arguments, env=env, code=code)
    return json.loads(text)
