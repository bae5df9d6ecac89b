"""The devices of ``--virtual``: how they are written, and what they do by themselves."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest

from usbredir._virtual_kinds import KINDS, virtual_device
from usbredir.errors import DeviceError
from usbredir.proto import Speed, Status
from usbredir.testing import linked_pair
from usbredir.virtual import (
    AudioSink,
    AudioSource,
    Cdrom,
    Keyboard,
    LoopbackDevice,
    MassStorage,
    Mouse,
    SerialPort,
    VirtualDevice,
)
from usbredir.virtual._demos import Circling
from usbredir.virtual.serial_pty import PtySerialPort

from .command_bed import PATIENCE, Process, guest_at
from .device_bed import Clock, DeviceBed


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "a,b.img"
    path.write_bytes(bytes(4096))
    return path


@pytest.mark.parametrize("speed", [Speed.FULL, Speed.HIGH, Speed.SUPER])
@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("disk:{}", MassStorage),
        ("disk:{},ro", MassStorage),
        ("loopback", LoopbackDevice),
        ("serial", SerialPort),
        ("serial:{}.link", PtySerialPort),
        ("keyboard:Hello: World!", Keyboard),
        ("mouse", Mouse),
        ("cdrom:{}", Cdrom),
    ],
)
def test_devices_are_made_as_asked_for(text: str, kind: type[VirtualDevice], speed: Speed, image: Path) -> None:
    """A new one each time."""
    make = virtual_device(text.format(image), speed)
    first, second = make(), make()
    assert isinstance(first, kind)
    assert first.speed is speed
    assert first is not second
    first.close()
    second.close()


@pytest.mark.parametrize("text", ["", "toaster", "Disk:x"])
def test_kinds_that_do_not_exist(text: str) -> None:
    """The message tells all that do."""
    with pytest.raises(ValueError, match=r"^use ") as failure:
        virtual_device(text, Speed.HIGH)
    assert all(kind.form in str(failure.value) for kind in KINDS.values())


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("disk", r"use disk:FILE\[,ro\]$"),
        ("disk:", r"use disk:FILE\[,ro\]$"),
        ("loopback:x", "use loopback$"),
        ("mouse:x", "use mouse$"),
        ("cdrom", "use cdrom:FILE$"),
        ("audio-source:", "use audio-source:FILE$"),
        ("audio-sink", "use audio-sink:FILE$"),
        ("facedancer", "use facedancer:MODULE:NAME$"),
        ("facedancer:module:", "use facedancer:MODULE:NAME$"),
        ("keyboard", "use keyboard:TEXT$"),
        ("keyboard:Käse", "use keyboard:TEXT: a US keyboard does not type 'ä'$"),
    ],
)
def test_wrong_arguments(text: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        virtual_device(text, Speed.HIGH)


def test_an_image_that_is_missing(tmp_path: Path) -> None:
    make = virtual_device(f"disk:{tmp_path}/none.img", Speed.HIGH)
    with pytest.raises(DeviceError, match=r"none\.img: No such file"):
        make()


@pytest.mark.parametrize("kind", ["cdrom", "audio-source", "audio-sink"])
def test_a_file_that_cannot_be_opened(kind: str, tmp_path: Path) -> None:
    make = virtual_device(f"{kind}:{tmp_path}/none/file", Speed.HIGH)
    with pytest.raises(DeviceError, match=r"none/file: No such file"):
        make()


@pytest.mark.parametrize("kind", ["cdrom", "audio-source"])
def test_a_file_of_another_kind(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(1000))
    make = virtual_device(f"{kind}:{path}", Speed.HIGH)
    with pytest.raises(DeviceError, match=r"/file"):
        make()


@pytest.mark.parametrize("speed", [Speed.FULL, Speed.HIGH])
def test_sound_goes_from_and_to_files(speed: Speed, tmp_path: Path) -> None:
    """What is played can be recorded; a microphone repeats itself."""
    path = tmp_path / "sound.wav"
    speaker = virtual_device(f"audio-sink:{path}", speed)()
    assert isinstance(speaker, AudioSink)
    assert speaker.speed is speed
    speaker.played(bytes(range(192)))
    speaker.close()
    microphone = virtual_device(f"audio-source:{path}", speed)()
    assert isinstance(microphone, AudioSource)
    assert (microphone.speed, microphone.rate, microphone.channels) == (speed, 48000, 2)
    assert microphone.data_in(0x81, 196) == microphone.data_in(0x81, 196) == bytes(range(192))
    microphone.close()


def test_sound_has_no_super_speed(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="full or high speed"):
        virtual_device(f"audio-sink:{tmp_path}/sound.wav", Speed.SUPER)()


def test_a_facedancer_device_has_a_speed_of_its_own() -> None:
    pytest.importorskip("facedancer")
    device = virtual_device("facedancer:facedancer.devices.ftdi:FTDIDevice", Speed.SUPER)()
    assert device.speed is Speed.FULL
    device.close()


def test_a_terminal_that_cannot_be_had(tmp_path: Path) -> None:
    make = virtual_device(f"serial:{tmp_path}/none/line", Speed.HIGH)
    with pytest.raises(DeviceError, match=r"none/line: No such file .*; choose another path"):
        make()


def test_every_kind_is_told_in_one_line() -> None:
    for name, kind in KINDS.items():
        assert re.split(r"[^\w-]", kind.form)[0] == name
        assert kind.what
        assert "\n" not in kind.what


# ================================================================ what they do


def test_the_serial_port_is_an_echo() -> None:
    host, guest = linked_pair(virtual_device("serial", Speed.HIGH)())
    guest.wait_for_device()
    guest.bulk_out(0x01, b"hello")
    assert guest.bulk_in(0x81, 512).data == b"hello"
    guest.close()
    host.close()


def test_a_program_here_and_a_guest_there(tmp_path: Path) -> None:
    """With the command, as a process; the link goes when it ends."""
    link = tmp_path / "line"
    with Process("--virtual", f"serial:{link}", "--as", "127.0.0.1:0") as exporter:
        connection, guest = guest_at(exporter.address())
        with connection, guest, open(link, "r+b", buffering=0) as terminal:
            guest.wait_for_device(PATIENCE)
            terminal.write(b"hello")
            assert guest.bulk_in(0x81, 512, timeout=PATIENCE).data == b"hello"
            guest.bulk_out(0x01, b"!", timeout=PATIENCE)
            assert terminal.read(1) == b"!"
        assert exporter.end(signal.SIGTERM) == 0
    assert not link.is_symlink()


def test_the_keyboard_types_for_each_driver() -> None:
    """Again after a reset."""
    host, guest = linked_pair(virtual_device("keyboard:a", Speed.HIGH)())
    guest.wait_for_device()
    for _ in range(2):
        guest.start_interrupt_receiving(0x81)
        assert guest.receive(0x81, timeout=60).data == bytes((0, 0, 4, 0, 0, 0, 0, 0))
        assert guest.receive(0x81, timeout=60).data == bytes(8)
        guest.reset()
    guest.close()
    host.close()


def steps(bed: DeviceBed, count: int) -> list[tuple[int, int]]:
    """The next movements, one for each twentieth of a second."""
    seen = []
    for _ in range(count):
        outcome = bed.ended(bed.interrupt(0x81, 4))
        assert outcome is not None
        status, report = outcome
        assert status == Status.SUCCESS
        seen.append(tuple(value - 256 if value > 127 else value for value in report[1:3]))
        bed.run(0.05)
    return [(dx, dy) for dx, dy in seen]


def test_the_mouse_moves_in_circles() -> None:
    """As long as a driver listens; a new one begins anew."""
    clock = Clock()
    bed = DeviceBed(Circling(clock=clock), clock)
    bed.run(1)
    assert bed.device.next_timeout() is None
    circle = steps(bed, 64)
    assert (sum(dx for dx, _ in circle), sum(dy for _, dy in circle)) == (0, 0)
    assert sum(dx for dx, _ in circle[:32]) == -200
    bed.device.reset()
    assert steps(bed, 10) == circle[:10]
    bed.device.close()
