"""End to end: a Linux guest in QEMU reads discs, which come and go, and plays and records sound."""

from __future__ import annotations

import contextlib
import hashlib
import random
import struct
from collections.abc import Iterator, Mapping
from typing import Literal

import pytest

from usbredir.proto import Speed
from usbredir.testing.qemu import QemuGuest
from usbredir.virtual import AudioSink, AudioSource, Cdrom

pytestmark = pytest.mark.qemu

FILES = {
    "HELLO.TXT": b"Hello from the disc.\n",
    "EMPTY.TXT": b"",
    "RANDOM.BIN": random.Random(1).randbytes(3_000_001),
}
BLOCK = 2048


@pytest.fixture
def guest(qemu_guest: QemuGuest) -> Iterator[QemuGuest]:
    """Give the guest; what is mounted goes afterwards."""
    yield qemu_guest
    qemu_guest.execute("umount -l /mnt")


# ================================================================ an ISO 9660 image


def both(layout: Literal["H", "I"], value: int) -> bytes:
    """A number in both byte orders."""
    return struct.pack("<" + layout, value) + struct.pack(">" + layout, value)


def record(name: bytes, block: int, size: int, *, folder: bool) -> bytes:
    """A directory record. Source: ECMA-119, 9.1."""
    date = bytes((126, 11, 23, 12, 0, 0, 0))
    head = both("I", block) + both("I", size) + date + bytes((2 if folder else 0, 0, 0)) + both("H", 1)
    content = head + bytes((len(name),)) + name + bytes(1 - len(name) % 2)
    return bytes((len(content) + 2, 0)) + content


def make_iso(files: Mapping[str, bytes], label: str = "USBREDIR") -> bytes:
    """An image with files in its root folder, which is one block. Source: ECMA-119, 8.4 and 9.4."""
    root, first = 20, 21
    records = [record(b"\0", root, BLOCK, folder=True), record(b"\1", root, BLOCK, folder=True)]
    content = b""
    for name, data in sorted(files.items()):
        records.append(record(f"{name};1".encode(), first + len(content) // BLOCK, len(data), folder=False))
        content += data + bytes(-len(data) % BLOCK)
    path_table = bytes((1, 0)) + struct.pack("<IH", root, 1) + b"\0\0"
    blocks = first + len(content) // BLOCK
    primary = b"".join(
        [
            b"\1CD001\1\0",
            b" " * 32,
            label.encode().ljust(32),
            bytes(8),
            both("I", blocks),
            bytes(32),
            both("H", 1) + both("H", 1) + both("H", BLOCK) + both("I", len(path_table)),
            struct.pack("<II", 18, 0) + struct.pack(">II", 19, 0),
            record(b"\0", root, BLOCK, folder=True),
            b" " * (128 * 4 + 37 * 3),
            (b"0" * 16 + b"\0") * 4,
            b"\1\0",
        ]
    )
    big_endian_table = bytes((1, 0)) + struct.pack(">IH", root, 1) + b"\0\0"
    parts = [primary, b"\xffCD001\1", path_table, big_endian_table, b"".join(records)]
    return bytes(16 * BLOCK) + b"".join(part.ljust(BLOCK, b"\0") for part in parts) + content


IMAGE = make_iso(FILES)
GIVEN = {name.lower(): hashlib.sha256(data).hexdigest() for name, data in FILES.items()}


# ================================================================ discs


def read_disc(guest: QemuGuest, drive: str) -> dict[str, str]:
    """SHA-256 of each file of the disc, by name; nothing stays in the guest's memory."""
    guest.run(f"mount -t iso9660 -o ro {drive} /mnt")
    lines = guest.run("cd /mnt && find . -type f -exec sha256sum {} +").splitlines()
    guest.run(f"umount /mnt && blockdev --flushbufs {drive} && echo 3 > /proc/sys/vm/drop_caches")
    return {name.removeprefix("./"): digest for digest, name in (line.split("  ", 1) for line in lines)}


@pytest.mark.parametrize(("controller", "speed"), [("xhci", Speed.SUPER), ("ehci", Speed.HIGH)])
def test_a_disc_is_read(controller: Literal["xhci", "ehci"], speed: Speed, guest: QemuGuest) -> None:
    with contextlib.closing(Cdrom(IMAGE, speed=speed)) as device:
        plugged = guest.plug(device, controller=controller)
        drive = guest.node(plugged, "sr*")
        assert read_disc(guest, drive) == GIVEN
        name = drive.removeprefix("/dev/")
        assert guest.run(f"blockdev --getss {drive}; cat /sys/block/{name}/ro").split() == ["2048", "1"]
        assert int(guest.run(f"cat /sys/block/{name}/size")) == len(IMAGE) // 512
        abilities = guest.run("tr -s '\\t' ' ' < /proc/sys/dev/cdrom/info").splitlines()
        assert {"Can open tray: 1", "Can close tray: 1", "Can lock tray: 1", "Can write CD-R: 0"} <= set(abilities)
        guest.unplug(plugged)


def test_discs_come_and_go(guest: QemuGuest) -> None:
    """The guest locks the tray while it uses the disc, sees the button, ejects, and reads another disc."""
    other = {"OTHER.TXT": b"Another disc.\n"}
    with contextlib.closing(Cdrom()) as device:
        plugged = guest.plug(device)
        drive = guest.node(plugged, "sr*")
        assert guest.execute(f"mount -t iso9660 -o ro {drive} /mnt").code != 0
        device.insert(IMAGE)
        assert read_disc(guest, drive) == GIVEN

        guest.run(f"mount -t iso9660 -o ro {drive} /mnt")
        assert device.locked
        assert not device.eject()
        assert guest.run("cat /mnt/hello.txt") == "Hello from the disc."
        guest.run("umount /mnt")
        assert not device.locked
        assert device.eject()
        assert guest.execute(f"mount -t iso9660 -o ro {drive} /mnt").code != 0

        device.insert(make_iso(other))
        guest.run(f"mount -t iso9660 -o ro {drive} /mnt")
        assert guest.run("cat /mnt/*") == "Another disc."
        guest.run("umount /mnt")
        guest.unplug(plugged)


# ================================================================ sound

SECONDS = 1
ATTEMPTS = 5
"""Isochronous packets are not sent again: a machine that stops for a moment loses some, and the test tries again."""
SOUNDS = pytest.mark.parametrize(
    ("rate", "channels", "speed", "controller"),
    [
        (48000, 2, Speed.FULL, "xhci"),
        (48000, 2, Speed.HIGH, "ehci"),
        (44100, 1, Speed.HIGH, "xhci"),
    ],
)


def noise(rate: int, channels: int, seconds: float) -> bytes:
    """Samples in which every place can be told from every other."""
    return random.Random(rate).randbytes(int(rate * seconds) * channels * 2)


def card_of(node: str) -> str:
    """hw:0,0 for /dev/snd/pcmC0D0c."""
    name = node.rpartition("pcmC")[2]
    return "hw:" + name[:-1].replace("D", ",")


@SOUNDS
def test_the_recorded_sound_is_the_sent_sound(
    rate: int, channels: int, speed: Speed, controller: Literal["xhci", "ehci"], guest: QemuGuest
) -> None:
    """From wherever the recording begins, each sample of it."""
    sent = noise(rate, channels, 4 * SECONDS * ATTEMPTS)
    with contextlib.closing(AudioSource(sent, rate=rate, channels=channels, speed=speed, repeat=True)) as microphone:
        plugged = guest.plug(microphone, controller=controller)
        card = card_of(guest.node(plugged, "pcmC*c"))
        options = f"-q -D {card} -t raw -f S16_LE -r {rate} -c {channels} -d {SECONDS}"
        recordings: list[bytes] = []
        for _ in range(ATTEMPTS):
            guest.run(f"arecord {options} /tmp/recorded")
            recordings.append(guest.read_file("/tmp/recorded"))
            if recordings[-1] in sent + sent:
                break
        assert len(recordings[-1]) == rate * channels * 2 * SECONDS
        assert recordings[-1] in sent + sent
        assert not microphone.muted
        guest.unplug(plugged)


@SOUNDS
def test_the_played_sound_is_the_sent_sound(
    rate: int, channels: int, speed: Speed, controller: Literal["xhci", "ehci"], guest: QemuGuest
) -> None:
    """What a host has not yet played when a guest stops is lost, so a moment of silence ends it."""
    sound, silence = noise(rate, channels, SECONDS), bytes(rate // 2 * channels * 2)
    with contextlib.closing(AudioSink(rate=rate, channels=channels, speed=speed)) as speaker:
        plugged = guest.plug(speaker, controller=controller)
        card = card_of(guest.node(plugged, "pcmC*p"))
        guest.write_file("/tmp/sound", sound + silence)
        played: list[bytes] = []
        for _ in range(ATTEMPTS):
            guest.run(f"aplay -q -D {card} -t raw -f S16_LE -r {rate} -c {channels} /tmp/sound")
            played.append(speaker.read(speaker.buffer_limit, 0))
            if sound in played[-1]:
                break
        assert sound in played[-1]
        assert not played[-1].replace(sound, b"").strip(b"\0")
        guest.unplug(plugged)
