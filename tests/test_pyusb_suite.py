"""pyusb's own tests, as they are in its source release, against a virtual device at the other end of a connection."""

from __future__ import annotations

import re
import sys
from importlib.metadata import version

from .instruments import BenchmarkDevice
from .pyusb_bed import exported, run_with, source_release

TESTS = 35
"""Tests of the suite: 16 need no device, one uses the old interface, and six run with each of three back ends."""
LAUNCH = """
import runpy, unittest
case = unittest.TestCase
case.assertEquals, case.assertNotEquals = case.assertEqual, case.assertNotEqual
runpy.run_path("testall.py", run_name="__main__")
"""
"""Runs the suite; its old names of two methods are gone from Python 3.12."""


def test_the_suite_passes() -> None:
    """Descriptors, control, bulk, interrupt and isochronous transfers, halts, strings, and the old interface."""
    folder = source_release("pyusb", version("pyusb")) / "tests"
    with exported(BenchmarkDevice()) as address:
        output = run_with(address, sys.executable, "-c", LAUNCH, folder=folder)
    counted = re.search(r"^Ran (\d+) tests", output, re.MULTILINE)
    assert counted, output
    assert int(counted[1]) == TESTS, output
    assert output.rstrip().endswith("OK"), output
