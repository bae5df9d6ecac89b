"""How the tests run: Hypothesis profiles, and no silent skips where none are wanted.

* ``HYPOTHESIS_PROFILE=ci``: more examples, and a failure prints what reproduces it.
* ``USBREDIR_QEMU=1``: tests marked ``qemu``, which boot virtual machines, run.
* ``USBREDIR_NO_SKIPS=1``: a test that would be skipped fails with its reason, so that an automatic check that
  lacks a tool cannot pass.
"""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest
from hypothesis import HealthCheck, settings

# Machines are shared: a slow example is no failure.
settings.register_profile("default", deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile(
    "ci", deadline=None, max_examples=300, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests with virtual machines take minutes: only when they are asked for.

    An emulated machine that shares two cores with other tests misses its own deadlines now and then: such a test is
    run once more when it fails, and the summary tells so ("rerun").
    """
    asked = os.environ.get("USBREDIR_QEMU") == "1"
    for item in items:
        if item.get_closest_marker("qemu"):
            skip = pytest.mark.skip("boots a virtual machine; set USBREDIR_QEMU=1")
            item.add_marker(pytest.mark.flaky(reruns=1) if asked else skip)


def _forbid_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Turn a skip into a failure; an expected failure (xfail) is none."""
    if os.environ.get("USBREDIR_NO_SKIPS") != "1" or not report.skipped or hasattr(report, "wasxfail"):
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    report.outcome = "failed"
    report.longrepr = f"{reason}\n(a skip is a failure because USBREDIR_NO_SKIPS=1)"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _forbid_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _forbid_skip(report)
    return report
