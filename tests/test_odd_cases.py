"""A guest that does odd things gets the answers that usbredirect gives, and the same of a virtual device.

What usbredirect 0.15 answers, and does with its device, was recorded (``odd_peers``). Differences are declared with the
case, line by line, and are in docs/deviations.md with their reason.
"""

from __future__ import annotations

import difflib
import os
import re
import shutil
from pathlib import Path

import pytest

from . import odd_peers, vusb
from .odd_cases import CASES, SOURCES, Case
from .odd_peers import Result

DEVIATIONS = vusb.ROOT / "docs" / "deviations.md"

MODELS = (
    # The two devices present themselves differently.
    ("InterfaceInfo 2: 0=ff/00/00 1=ff/00/00", "InterfaceInfo 2: 0=ff/00/00 1=fe/00/00"),
    ("device_class=255 ", ""),
)
FILLED = re.compile(f"(endpoint=0x(?:{'|'.join(f'{endpoint:02x}' for endpoint in SOURCES)}) .*)data=<.*>")
"""Data of the sources: after its counter each device has a pattern of its own."""

RECORDED = odd_peers.load()

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def changes(theirs: list[str], ours: list[str]) -> list[str]:
    """The lines that differ, "- " theirs, "+ " ours."""
    return [line for line in difflib.ndiff(theirs, ours) if line[0] in "-+"]


def check(case: Case, theirs: Result, ours: Result) -> None:
    """Our answers differ from *theirs* only as the case declares."""
    answers, log = (case.differs.answers, case.differs.log) if case.differs else ((), ())
    found = changes(theirs.answers, ours.answers)
    assert found == list(answers), "\n".join(("answers:", *found))
    if ours.log:
        found = changes(odd_peers.without_probe(theirs.log), ours.log)
        assert found == list(log), "\n".join(("the device's log:", *found))


def as_on_the_bus(answer: str) -> str:
    """An answer of a LoopbackDevice without what the models do not have in common."""
    for ours, theirs in MODELS:
        answer = answer.replace(ours, theirs)
    return FILLED.sub(r"\1data", answer)


@each_case
def test_a_real_device_is_served_as_usbredirect_does(case: Case) -> None:
    """Answers and the device's log."""
    check(case, RECORDED[case.name], odd_peers.run_ours(case))


@pytest.mark.parametrize("case", [case for case in CASES if not case.real_only], ids=lambda case: case.name)
def test_a_virtual_device_answers_as_a_real_one(case: Case) -> None:
    """The recording stands for ours with a real device: the test above proves it."""
    answers = [as_on_the_bus(answer) for answer in odd_peers.run_loopback(case).answers]
    check(case, Result([FILLED.sub(r"\1data", a) for a in RECORDED[case.name].answers], []), Result(answers, []))


@each_case
def test_usbredirect_still_answers_as_recorded(case: Case) -> None:
    """``python -m tests.odd_peers`` records anew."""
    root = os.environ.get("USBREDIR_PEER_ROOT")
    if root is None:
        pytest.skip("needs USBREDIR_PEER_ROOT, a folder with usbredirect 0.15; see tests/odd_peers.py")
    if os.geteuid() != 0 or shutil.which("chroot") is None:
        pytest.skip("usbredirect is started with chroot, as root")
    assert odd_peers.run_peer(case, Path(root)) == RECORDED[case.name]


def test_every_declared_difference_is_documented_with_its_reason() -> None:
    """The words of the declaration are in the list of deviations."""
    text = DEVIATIONS.read_text(encoding="utf-8")
    reasons = {case.differs.reason for case in CASES if case.differs} | {odd_peers.PROBE_REASON}
    assert [reason for reason in reasons if reason not in text] == []


def test_declared_differences_are_differences() -> None:
    """Lines that are declared to differ."""
    assert [case.name for case in CASES if case.differs and not case.differs.answers + case.differs.log] == []


def test_the_recording_has_every_case() -> None:
    """And none that is gone."""
    assert list(RECORDED) == [case.name for case in CASES]
    assert len(CASES) >= 60
