"""Runs the test guest in QEMU, without hardware virtualisation, and collects what it reports."""

import contextlib
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal

from .build_guest import GuestImage

QEMU = "qemu-system-x86_64"
PREFIX = "usbredir-guest: "
CONTROLLERS = {"xhci": "qemu-xhci,id=usb", "ehci": "usb-ehci,id=usb"}
# This processor is without the string instructions that are slow in emulation. Random numbers, which it also lacks, are
# worth having: without them the kernel spends a second on gathering its own.
PROCESSOR = "Nehalem,rdrand=on"
KERNEL_ARGUMENTS = (
    "console=ttyS0 quiet panic=-1 printk.devkmsg=on random.trust_cpu=on "
    "mitigations=off nowatchdog no_timer_check tsc=reliable"
)

Controller = Literal["xhci", "ehci"]
Scenario = Literal["readonly", "readwrite", "speed"]


class GuestError(Exception):
    """The guest did not do what it should; the message has its console."""


@dataclass(frozen=True)
class UsbSource:
    """Where the guest's USB device comes from, as options of QEMU."""

    options: tuple[str, ...]
    pass_fds: tuple[int, ...] = ()


def connect_to(address: tuple[str, int], *, reconnect: bool = False) -> UsbSource:
    """Return a device that QEMU gets by connecting to an exporter.

    Args:
        address: Host and port where the exporter listens.
        reconnect: Try again every second after a failure; without it, QEMU ends if it cannot connect at once.

    """
    host, port = address
    return _redirection(f"host={host},port={port}" + (",reconnect=1" if reconnect else ""))


def listen_on(listener: socket.socket) -> UsbSource:
    """Return a device whose exporter connects to QEMU, at *listener*, which must outlive QEMU's start."""
    return _redirection(f"fd={listener.fileno()},server=on,wait=off", listener.fileno())


def emulated_storage(image: Path) -> UsbSource:
    """Return QEMU's own USB disk on *image*, for comparison: nothing is redirected."""
    drive = f"if=none,id=disk,format=raw,cache=writeback,file={image}"
    return UsbSource(("-drive", drive, "-device", "usb-storage,drive=disk,bus=usb.0"))


def _redirection(where: str, *pass_fds: int) -> UsbSource:
    chardev, device = f"socket,id=usb_chardev,{where}", "usb-redir,chardev=usb_chardev,bus=usb.0"
    return UsbSource(("-chardev", chardev, "-device", device), pass_fds)


@dataclass(frozen=True)
class Report:
    """What the guest said, in order: pairs of a key and the rest of the line. `guest_init.sh` has the keys."""

    lines: tuple[tuple[str, str], ...]

    def __contains__(self, key: str) -> bool:
        return any(name == key for name, _ in self.lines)

    def __getitem__(self, key: str) -> str:
        return next(value for name, value in self.lines if name == key)

    def checksums(self, key: str) -> dict[str, str]:
        """Return the SHA-256 of each file reported under *key*, by name."""
        pairs = (value.split(" ", 1) for name, value in self.lines if name == key)
        return {name: checksum for checksum, name in pairs}

    def timings(self) -> dict[str, list[tuple[int, float]]]:
        """Return the measurements of the speed scenario: bytes and seconds of each round, by name."""
        result: dict[str, list[tuple[int, float]]] = {}
        for key, value in self.lines:
            if key == "time":
                name, size, seconds = value.split(" ")
                result.setdefault(name, []).append((int(size), float(seconds)))
        return result


class LinuxGuest:
    """One run of the guest, from power on to power off; a context manager, which always ends QEMU."""

    def __init__(
        self,
        image: GuestImage,
        source: UsbSource,
        folder: Path,
        *,
        controller: Controller = "xhci",
        scenario: Scenario = "readwrite",
        parameters: Mapping[str, int] | None = None,
        limit: float = 180,
    ) -> None:
        """Start QEMU.

        Args:
            image: What to boot.
            source: The USB device.
            folder: Where to put the console's log and QEMU's messages.
            controller: Kind of USB host controller. EHCI takes high-speed devices only.
            scenario: What the guest does with the device.
            parameters: More for the scenario: 'mib', 'repeat'.
            limit: Seconds from now until QEMU is ended, done or not.

        """
        self._console = folder / "console.log"
        self._messages = folder / "qemu.log"
        self._end = time.monotonic() + limit
        arguments = {"scenario": scenario, "limit": round(limit), **(parameters or {})}
        appended = [KERNEL_ARGUMENTS, *(f"usbredir.{name}={value}" for name, value in arguments.items())]
        command = [
            *(QEMU, "-accel", "tcg", "-machine", "pc", "-cpu", PROCESSOR, "-smp", "1", "-m", "256"),
            *("-nodefaults", "-display", "none", "-no-reboot", "-serial", f"file:{self._console}"),
            *("-kernel", str(image.kernel), "-initrd", str(image.initramfs), "-append", " ".join(appended)),
            *("-device", CONTROLLERS[controller], *source.options),
        ]
        with open(self._messages, "wb") as messages:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=messages, stderr=messages, pass_fds=source.pass_fds
            )

    def __enter__(self) -> "LinuxGuest":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End QEMU if it still runs."""
        self._process.kill()
        self._process.wait()

    def report(self) -> Report:
        """Return what the guest said up to now."""
        lines = (line.partition(PREFIX)[2] for line in self.console().split("\n")[:-1] if PREFIX in line)
        pairs = (line.partition(" ") for line in lines)
        return Report(tuple((key, value) for key, _, value in pairs))

    def console(self) -> str:
        """Return the text of the serial console up to now."""
        with contextlib.suppress(FileNotFoundError):
            return self._console.read_text(errors="replace").replace("\r", "")
        return ""

    def wait_for(self, key: str) -> str:
        """Wait until the guest has said *key*, and return the rest of that line.

        Raises:
            GuestError: It said FAILED, QEMU ended, or the time limit passed.

        """
        self._wait(lambda: key in self.report(), f"the guest to say {key}")
        return self.report()[key]

    def finish(self) -> Report:
        """Wait until the guest has powered off, and return what it said.

        Raises:
            GuestError: It failed, QEMU ended early, or the time limit passed.

        """
        self._wait(lambda: "DONE" in self.report(), "the guest to be done")
        self._wait(lambda: self._process.poll() is not None, "the guest to power off")
        return self.report()

    def _wait(self, condition: Callable[[], bool], what: str) -> None:
        while not condition():
            ended = self._process.poll() is not None
            if "FAILED" in self.report():
                raise self._error(f"the guest failed: {self.report()['FAILED']}")
            if ended and not condition():
                raise self._error(f"QEMU ended with {self._process.returncode} while waiting for {what}")
            if time.monotonic() > self._end:
                raise self._error(f"time limit passed while waiting for {what}")
            time.sleep(0.05)

    def _error(self, reason: str) -> GuestError:
        messages = self._messages.read_text(errors="replace").splitlines()[-20:]
        console = self.console().splitlines()[-100:]
        return GuestError("\n".join([reason, "--- QEMU ---", *messages, "--- console ---", *console]))
