"""End to end: a Linux guest in QEMU uses Facedancer's own devices, with no hardware."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import struct
import textwrap
from pathlib import Path
from typing import Any

import pytest

from usbredir.testing.qemu import QemuGuest
from usbredir.virtual.facedancer import FacedancerDevice

from .command_bed import Process

pytestmark = pytest.mark.qemu

keyboards: Any = pytest.importorskip("facedancer.devices.keyboard")

EVENT = struct.Struct("<qqHHi")
KEY_EVENT = 1
NAMES = {30: "a", 48: "b", 42: "shift"}
"""Linux's codes of keys."""


def wait_until_open(guest: QemuGuest, path: str) -> None:
    guest.wait_for(f"ls -l /proc/[0-9]*/fd 2> /dev/null | grep -q '> {path}$'")


class EventFile:
    """What a guest's input device tells, in a file that a program of the guest writes."""

    def __init__(self, guest: QemuGuest, device: str) -> None:
        self._guest = guest
        self._reader = guest.start(f"cat {device} > /tmp/events")
        wait_until_open(guest, device)

    def keys(self, count: int) -> list[tuple[str, int]]:
        """(key, 1 pressed or 0 released) up to now, when there are *count*. Repetitions, which are 2, do not count."""
        end = 0
        while True:
            self._guest.wait_for(f"[ $(stat -c %s /tmp/events) -gt {end} ]")
            data = self._guest.read_file("/tmp/events")
            end = len(data)
            events = EVENT.iter_unpack(data[: end // EVENT.size * EVENT.size])
            keys = [(NAMES[code], value) for _, _, kind, code, value in events if kind == KEY_EVENT and value < 2]
            if len(keys) >= count:
                return keys


def test_its_keyboard(qemu_guest: QemuGuest) -> None:
    """The keys arrive in the guest's input layer."""
    keyboard = keyboards.USBKeyboardDevice()
    with contextlib.closing(FacedancerDevice(keyboard)) as device:
        plugged = qemu_guest.plug(device)
        assert qemu_guest.run(f"cat {plugged.path}/product") == "Non-suspicious Keyboard"
        events = EventFile(qemu_guest, qemu_guest.node(plugged, "event*"))
        keyboard.key_down(0x04)
        assert events.keys(1) == [("a", 1)]
        keyboard.modifier_down(2)
        assert events.keys(2)[1:] == [("shift", 1)]
        keyboard.key_up(0x04)
        assert events.keys(3)[2:] == [("a", 0)]
        keyboard.key_down(0x05)
        assert events.keys(4)[3:] == [("b", 1)]
        qemu_guest.unplug(plugged)


MODULE = """
    import asyncio

    from facedancer.devices.ftdi import FTDIDevice
    from facedancer.devices.umass import RawDiskImage, USBMassStorageDevice

    def loud():
        serial, heard = FTDIDevice(), bytearray()
        serial.handle_serial_data_received = heard.extend

        async def answer():
            while True:
                await asyncio.sleep(0.01)
                if heard.endswith(b"\\n"):
                    serial.transmit(bytes(heard).upper())
                    heard.clear()

        return serial, answer()

    def disk():
        return USBMassStorageDevice(RawDiskImage("disk.img", 512))
"""


@pytest.fixture
def devices(tmp_path: Path) -> dict[str, str]:
    """Give an environment in which MODULE is importable, as my_devices."""
    (tmp_path / "my_devices.py").write_text(textwrap.dedent(MODULE).replace("disk.img", str(tmp_path / "disk.img")))
    paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)}


def test_its_serial_adapter_exported_by_the_command(qemu_guest: QemuGuest, devices: dict[str, str]) -> None:
    """The guest's terminal gets what the coroutine makes of what the handler got."""
    with Process("--virtual", "facedancer:my_devices:loud", "--as", "127.0.0.1:0", env=devices) as exporter:
        plugged = qemu_guest.plug_address(exporter.address())
        terminal = qemu_guest.node(plugged, "ttyUSB*")
        qemu_guest.run(f"stty -F {terminal} raw -echo clocal")
        reading = qemu_guest.start(f"head -n 1 {terminal}")
        wait_until_open(qemu_guest, terminal)
        qemu_guest.run(f"echo hello > {terminal}")
        assert reading.output() == "HELLO"
        qemu_guest.unplug(plugged)


def test_its_mass_storage_exported_by_the_command(
    qemu_guest: QemuGuest, devices: dict[str, str], tmp_path: Path
) -> None:
    """What the guest reads is the image; what it writes gets there."""
    content = random.Random(6).randbytes(256 * 1024)
    image = tmp_path / "disk.img"
    image.write_bytes(content)
    with Process("--virtual", "facedancer:my_devices:disk", "--as", "127.0.0.1:0", env=devices) as exporter:
        plugged = qemu_guest.plug_address(exporter.address())
        disk = qemu_guest.node(plugged, "sd?")
        read = qemu_guest.run(f"dd if={disk} bs=64k count=4 iflag=direct 2> /dev/null | sha256sum").split()[0]
        assert read == hashlib.sha256(content).hexdigest()
        written = random.Random(7).randbytes(8192)
        qemu_guest.run(f"dd of={disk} bs=4k seek=3 oflag=direct", data=written)
        qemu_guest.unplug(plugged)
    assert image.read_bytes() == content[:12288] + written + content[12288 + 8192 :]
