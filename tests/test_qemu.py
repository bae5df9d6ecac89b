"""End to end: a Linux guest in QEMU uses devices of this process, and disks that `usbredir export` shares.

One boot serves all tests of a process. Takes about a minute, so only with USBREDIR_QEMU=1 in the environment.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from usbredir.proto import Speed
from usbredir.testing import PacketLog
from usbredir.testing.qemu import Controller, GuestError, Plugged, QemuGuest
from usbredir.virtual import LoopbackDevice, MassStorage
from usbredir.virtual.fat import make_image, read_files

pytestmark = pytest.mark.qemu

FILES = {
    "HELLO.TXT": b"Hello from the host.\n",
    "empty": b"",
    "random numbers, about 3 MB.bin": random.Random(1).randbytes(3_000_001),
}
DISK_SIZE = 16 * 1024 * 1024
PATIENCE = 60.0
"""Seconds that an exporter may take to start or to end, on a busy machine."""


class Exporter:
    """A running `usbredir export`; a context manager, which always ends it."""

    def __init__(self, disk: Path, log: Path, *arguments: str) -> None:
        self._log = log
        command = [sys.executable, "-m", "usbredir", "export", "--virtual", f"disk:{disk}", *arguments]
        with open(log, "wb") as output:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)

    def __enter__(self) -> Exporter:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        print(f"--- exporter ---\n{self.output()}")  # pytest shows it after a failure

    def output(self) -> str:
        """Return what it has written up to now."""
        return self._log.read_text(errors="replace")

    def address(self) -> str:
        """Wait until it listens, and return where."""
        end = time.monotonic() + PATIENCE
        while True:
            found = re.search(r"listening on ([0-9.]+:[0-9]+)$", self.output(), re.MULTILINE)
            if found:
                return found[1]
            assert self._process.poll() is None, f"the exporter ended: {self.output()}"
            assert time.monotonic() < end, "the exporter does not listen"
            time.sleep(0.05)

    def interrupt(self) -> int:
        """Press Ctrl-C, so to say, and return the exit code."""
        self._process.send_signal(signal.SIGINT)
        return self._process.wait(PATIENCE)

    def kill(self) -> None:
        """End it without a chance to do anything about it."""
        self._process.kill()
        self._process.wait()


@pytest.fixture
def guest(qemu_guest: QemuGuest) -> Iterator[QemuGuest]:
    """Give the guest; what is mounted goes afterwards."""
    yield qemu_guest
    qemu_guest.execute("umount -l /mnt")


# ================================================================ what the guest does with disks


def mount(guest: QemuGuest, disk: str, how: str) -> None:
    guest.run(f"mount -t vfat -o {how},codepage=437,iocharset=ascii {disk} /mnt")


def forget(guest: QemuGuest, disk: str) -> None:
    """Unmount; nothing that is read afterwards may come from the guest's memory."""
    guest.run(f"umount /mnt && blockdev --flushbufs {disk} && echo 3 > /proc/sys/vm/drop_caches")


def sums_of_files(guest: QemuGuest) -> dict[str, str]:
    """SHA-256 of each file of the mounted disk, by name."""
    lines = guest.run("cd /mnt && find . -type f -exec sha256sum {} +").splitlines()
    return {name.removeprefix("./"): digest for digest, name in (line.split("  ", 1) for line in lines)}


def sum_of_disk(guest: QemuGuest, disk: str) -> str:
    return guest.run(f"dd if={disk} bs=1M iflag=direct 2> /dev/null | sha256sum").split()[0]


def read_all(guest: QemuGuest, disk: str) -> dict[str, str]:
    """Mount a disk, read its files, and forget them."""
    mount(guest, disk, "ro")
    sums = sums_of_files(guest)
    forget(guest, disk)
    return sums


def write_files(guest: QemuGuest, disk: str) -> dict[str, str]:
    """Write a new file and a copy of one that is there, up to the disk itself; return their sums."""
    mount(guest, disk, "rw")
    guest.run("dd if=/dev/urandom of=/tmp/random bs=1M count=4")
    guest.run("cp /tmp/random '/mnt/written by the guest.bin' && cp /mnt/random*.bin /mnt/copy.bin && sync")
    digest = guest.run("sha256sum /tmp/random").split()[0]
    return {"written by the guest.bin": digest, "copy.bin": GIVEN["random numbers, about 3 MB.bin"]}


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


GIVEN = {name: sha256(data) for name, data in FILES.items()}


@pytest.fixture
def disk_file(tmp_path: Path) -> Path:
    """Give an image with FILES."""
    path = tmp_path / "disk.img"
    path.write_bytes(make_image(FILES, size=DISK_SIZE, label="USBREDIR"))
    return path


def files_in(image: bytes) -> dict[str, str]:
    found = read_files(lambda offset, length: image[offset : offset + length])
    return {name: sha256(data) for name, data in found.items()}


@contextlib.contextmanager
def exported(role: str, guest: QemuGuest, disk: Path, controller: Controller) -> Iterator[tuple[Exporter, Plugged]]:
    """Export a disk from another process, which *role* 'listens' or 'connects'."""
    log = disk.with_name("exporter.log")
    if role == "listens":
        with Exporter(disk, log, "--as", "127.0.0.1:0") as exporter:
            yield exporter, guest.plug_address(exporter.address(), controller=controller)
    else:
        plugged = guest.plug_listening(controller=controller)
        with Exporter(disk, log, "--to", plugged.address) as exporter:
            guest.wait_for_device(plugged)
            yield exporter, plugged


@pytest.mark.parametrize(("controller", "role"), [("xhci", "listens"), ("ehci", "listens"), ("xhci", "connects")])
def test_guest_reads_and_writes_an_exported_disk(
    controller: Controller, role: str, guest: QemuGuest, disk_file: Path
) -> None:
    """What the guest's own drivers read is what the image holds, and what they write arrives in the image."""
    original = disk_file.read_bytes()
    with exported(role, guest, disk_file, controller) as (exporter, plugged):
        disk = guest.node(plugged, "sd?")
        name = disk.removeprefix("/dev/")
        assert guest.run(f"cat /sys/block/{name}/size") == str(DISK_SIZE // 512)
        assert guest.run(f"cat /sys/block/{name}/ro") == "0"
        assert sum_of_disk(guest, disk) == sha256(original)
        assert read_all(guest, disk) == GIVEN

        written = write_files(guest, disk)
        forget(guest, disk)
        assert read_all(guest, disk) == GIVEN | written
        changed = disk_file.read_bytes()
        assert sum_of_disk(guest, disk) == sha256(changed)
        assert exporter.interrupt() == 0
    assert files_in(changed) == GIVEN | written


def test_a_killed_exporter_loses_nothing(guest: QemuGuest, disk_file: Path) -> None:
    """What the guest has synchronised is in the image; the next exporter is found by itself, and gives all of it."""
    log = disk_file.with_name("exporter.log")
    with Exporter(disk_file, log, "--as", "127.0.0.1:0") as exporter:
        address = exporter.address()
        plugged = guest.plug_address(address, reconnect=True)
        expected = GIVEN | write_files(guest, guest.node(plugged, "sd?"))
        exporter.kill()
    assert files_in(disk_file.read_bytes()) == expected
    guest.wait_for(f"[ ! -e {plugged.path} ]")
    guest.run("umount -l /mnt")
    with Exporter(disk_file, log, "--as", address):
        guest.wait_for_device(plugged)
        assert read_all(guest, guest.node(plugged, "sd?")) == expected


@pytest.mark.parametrize(
    ("controller", "speed", "mbit"),
    [
        ("xhci", Speed.FULL, "12"),
        ("xhci", Speed.HIGH, "480"),
        ("xhci", Speed.SUPER, "5000"),
        ("ehci", Speed.FULL, "12"),
        ("ehci", Speed.HIGH, "480"),
    ],
)
def test_a_disk_of_this_process_at_every_speed(
    controller: Controller, speed: Speed, mbit: str, guest: QemuGuest
) -> None:
    """Read-only: the guest knows, and cannot write."""
    data = random.Random(2).randbytes(1 << 20)
    with contextlib.closing(MassStorage(data, speed=speed, read_only=True)) as stick:
        plugged = guest.plug(stick, controller=controller)
        assert guest.run(f"cat {plugged.path}/speed") == mbit
        disk = guest.node(plugged, "sd?")
        assert guest.run(f"cat /sys/block/{disk.removeprefix('/dev/')}/ro") == "1"
        assert sum_of_disk(guest, disk) == sha256(data)
        with pytest.raises(GuestError, match="exit code 1"):
            guest.write_file(disk, b"x")
        guest.unplug(plugged)


# ================================================================ the guest itself


def test_several_devices_at_once(guest: QemuGuest) -> None:
    """Each is found at its own place; the same device may come again, also at another controller."""
    with contextlib.ExitStack() as closing:
        contents = [bytes([number]) * (1 << 20) for number in range(3)]
        sticks = [closing.enter_context(contextlib.closing(MassStorage(content))) for content in contents]
        controllers: list[Controller] = ["xhci", "ehci", "xhci"]
        for again in (controllers, controllers[::-1]):
            plugged = [guest.plug(stick, controller=at) for stick, at in zip(sticks, again, strict=True)]
            sums = [sum_of_disk(guest, guest.node(one, "sd?")) for one in plugged]
            assert sums == [sha256(content) for content in contents]
            guest.unplug_all()
            assert guest.run("ls /dev/sd* 2> /dev/null || echo none") == "none"


def test_a_device_that_unplugs_itself(guest: QemuGuest) -> None:
    with contextlib.closing(LoopbackDevice()) as device:
        guest.log = log = PacketLog()
        plugged = guest.plug(device)
        guest.log = None
        assert guest.run(f"cat {plugged.path}/idVendor") == "1209"
        device.unplug()
        guest.wait_for(f"[ ! -e {plugged.path} ]")
        guest.unplug(plugged)
        assert not plugged.exported
        assert plugged.error is None
        assert "guest > host  Hello(" in str(log)


def test_commands_of_the_guest(guest: QemuGuest) -> None:
    """Several at a time, with input and output of any bytes, and stopped with all that they started."""
    data = random.Random(3).randbytes(2_000_001)
    guest.write_file("/tmp/a file", data)
    assert guest.read_file("/tmp/a file") == data
    waiting = guest.start("until [ -e /tmp/go ]; do usleep 10000; done; echo went; echo why >&2; exit 5")
    assert guest.run("touch /tmp/go; echo first") == "first"
    assert waiting.result() == (5, b"went\n", b"why\n")

    endless = "sleep 1000 & echo begun; wait"
    with pytest.raises(GuestError, match=r"'.*' took longer than 0\.5 s and was stopped\n.*\nbegun"):
        guest.run(endless, timeout=0.5)
    assert guest.start("sleep 1000").stop().code == 137  # perhaps before it has begun
    guest.wait_for("! pidof sleep")
    guest.run("rm /tmp/go '/tmp/a file'")
    guest.wait_for("[ $(ls -A /run | cut -d . -f 1 | uniq | wc -l) -eq 1 ]")  # only what this command needs itself


def test_what_tests_need_is_there(guest: QemuGuest) -> None:
    """Programs and modules for the classes of devices."""
    assert "aplay" in guest.run("aplay --version")
    assert "arecord" in guest.run("arecord --version")
    modules = "usb_storage uas sd_mod sr_mod isofs vfat cdc_acm ftdi_sio usbhid hid_generic evdev snd_usb_audio usbtmc"
    guest.run(f"for module in {modules}; do modprobe -D $module || exit; done")


def test_a_guest_that_nobody_talks_to_powers_off(guest: QemuGuest) -> None:
    """So that a killed test leaves nothing running. Two guests may run at once."""
    with QemuGuest() as other:
        other._agent.close()
        assert other._process.wait(PATIENCE) == 0
    assert guest.run("echo still here") == "still here"
