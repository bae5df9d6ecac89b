"""``usbredir attach`` with a real QEMU, whose machine has nothing to boot: the USB bus is enough."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from usbredir.cli import ExitCode
from usbredir.testing.qemu._image import QEMU
from usbredir.transport import listen

from .command_bed import PATIENCE, Outcome, Process, call_main, signals

__all__ = ["signals"]

pytestmark = pytest.mark.qemu

MACHINE = ["-accel", "tcg", "-machine", "pc", "-m", "32", "-nodefaults", "-display", "none", "-device", "qemu-xhci"]
SOON = "0.5"
"""Seconds, of a limit that has to pass."""
NOBODY = "127.0.0.1:1"


@pytest.fixture
def monitor(tmp_path: Path) -> Iterator[Path]:
    """The path of a running machine's monitor. It listens before QEMU starts: nobody has to wait."""
    path = tmp_path / "qmp"
    with listen(f"unix:{path}") as listener:
        chardev = f"socket,id=monitor,server=on,wait=off,fd={listener.fileno()}"
        command = [QEMU, *MACHINE, "-chardev", chardev, "-mon", "chardev=monitor,mode=control"]
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[listener.fileno()]) as qemu:
            yield path
            qemu.kill()


def test_attaching_and_detaching(monitor: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The exporter sees the guest come and go; what fails leaves nothing in QEMU, so that the name is free again."""

    def attach(*arguments: object, timeout: object = PATIENCE) -> Outcome:
        return call_main(capsys, "attach", *arguments, "--qmp", monitor, "--timeout", timeout)

    code, _, err = attach(NOBODY, "--id", "stick", "--bus", "nowhere.0", "--wait")
    assert (code, "start the machine with -device qemu-xhci" in err) == (ExitCode.DEVICE, True)
    code, _, err = attach(NOBODY, "--id", "stick", timeout=SOON)
    assert (code, "nobody answered QEMU" in err) == (ExitCode.REFUSED, True)
    with Process("--virtual", "loopback", "--as", "127.0.0.1:0") as exporter:
        address = exporter.address()
        code, _, err = attach(address, "--id", "stick", "--filter", "-1,0x1209,-1,-1,0|-1,-1,-1,-1,1", timeout=SOON)
        assert (code, "do filters allow it" in err) == (ExitCode.DEVICE, True)

        allowed = "--filter", "-1,0x1209,-1,-1,1", "--bus", "usb-bus.0", "--debug", "0"
        assert attach(address, "--id", "stick", *allowed) == (0, "stick\n", f"usbredir: [stick] attached: {address}\n")
        exporter.line_with("guest connected")
        assert attach("--list").out == f"stick  attached  {address}\n"
        code, _, err = attach(NOBODY, "--id", "stick")
        assert (code, "choose another --id" in err) == (ExitCode.DEVICE, True)

        assert attach("--detach", "stick").code == 0
        exporter.line_with("guest left")
        assert attach("--list").out == "(no devices from exporters)\n"
    assert attach(NOBODY, "--id", "stick", "--wait").code == 0
    assert attach("--list").out == f"stick  disconnected  {NOBODY}\n"
