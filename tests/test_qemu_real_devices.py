"""End to end with a real kernel on both sides: a Linux guest exports its devices, another one uses them.

The bed is in ``../shared/qemu``: one guest has devices (Linux gadgets, and ones that QEMU emulates) and runs
``usbredir export`` with libusb on its own usbfs; the other's QEMU connects to it, and its ordinary drivers work with
the device. Takes about three minutes, so only with USBREDIR_QEMU=1 in the environment.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .vusb import ROOT

pytestmark = pytest.mark.qemu

BED = ROOT.parent / "shared" / "qemu"
LIMIT = 900.0
"""Seconds for all scenarios, on a busy machine."""
PACKAGES = ("usbredir", "usb", "libusb_package", "importlib_resources", "typing_extensions", "zipp")
"""What the exporting guest needs beside Python's standard library; some only on some Pythons."""

SCENARIOS = {
    "enumerate:composite": "several interfaces, every descriptor byte for byte",
    "read:qemu-uas": "bulk streams at super speed",
    "write:storage": "bulk both ways, and the kernel driver gives way",
    "unplugged:storage": "pulled out during reads",
    "killed:storage": "the exporter is killed and started again",
    "replug:storage": "one guest after the other",
    "configuration:zero": "the kernel's own test device, with two configurations",
    "cancel:zero": "queued transfers, cancelled",
    "keys:hid": "interrupt IN and output reports",
    "play:qemu-audio": "isochronous OUT",
    "record:microphone": "isochronous IN, every sample",
}


def share(directory: Path) -> Path:
    """A folder with the packages that the guest imports."""
    directory.mkdir()
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            continue
        origin = Path(spec.origin)
        if origin.name == "__init__.py":
            shutil.copytree(origin.parent, directory / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(origin, directory)
    return directory


def run_bed(bed: Path) -> dict[str, dict[str, Any]]:
    """What the bed tells of each scenario; all run in one pair of guests."""
    shutil.copytree(BED, bed)
    subprocess.run(["bash", str(bed / "build.sh")], cwd=bed, check=True, capture_output=True, timeout=LIMIT)
    command = "python3 -m usbredir export --device {vid}:{pid} --as 0.0.0.0:{port}"
    arguments = ["--exporter", "guest", "--share-python", str(share(bed / "share")), "--command", command]
    only = [argument for name in SCENARIOS for argument in ("--only", name)]
    done = subprocess.run(
        [sys.executable, str(bed / "run.py"), *arguments, *only, "--logs", str(bed / "logs")],
        cwd=bed,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    outcomes = {line["scenario"]: line for line in lines if "scenario" in line}
    assert outcomes, f"the bed did not start:\n{done.stdout}\n{done.stderr}"
    return outcomes


def test_real_devices(tmp_path: Path) -> None:
    """Every scenario; the bed checks the data, and what it says of failures is shown."""
    if not BED.is_dir() or shutil.which("qemu-system-x86_64") is None:
        pytest.skip("needs ../shared/qemu and qemu-system-x86_64")
    outcomes = run_bed(tmp_path / "qemu")
    assert outcomes.keys() == SCENARIOS.keys()
    failed = {name: outcome for name, outcome in outcomes.items() if not outcome["ok"]}
    assert not failed, json.dumps(failed, indent=2)
