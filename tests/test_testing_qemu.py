"""The Linux guest of tests, as far as that needs no QEMU: commands, monitor, building. With QEMU: test_qemu.py."""

from __future__ import annotations

import base64
import contextlib
import itertools
import lzma
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from usbredir.testing import PacketLog
from usbredir.testing.qemu import BuildError, CommandResult, GuestError, GuestImage, QemuGuest, _image, _machine
from usbredir.testing.qemu._agent import Agent
from usbredir.virtual import LoopbackDevice

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the guest is for Linux")

SOON = 0.02
"""Seconds, of a limit that has to pass."""
PATIENCE = 30.0
"""Seconds, of a limit that must not pass on a busy machine."""


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    theirs.settimeout(PATIENCE)
    with ours, theirs:
        yield ours, theirs


# ================================================================ commands


def test_a_command_and_its_answer(ends: tuple[socket.socket, socket.socket]) -> None:
    """The script is base64, its input follows as it is; the answer's two parts are told apart by their lengths."""
    ours, theirs = ends
    agent = Agent(ours)
    number = agent.start("cat; echo 'ü'", b"a\nb", PATIENCE)
    script = base64.b64encode("cat; echo 'ü'".encode())
    assert theirs.recv(1000) == b"run %d 3 %s\na\nb" % (number, script)
    theirs.sendall(b"%d 2 3 4\nouterr\n" % number)
    assert agent.result(number, PATIENCE) == CommandResult(2, b"out", b"err\n")


def test_answers_in_another_order(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = ends
    agent = Agent(ours)
    first, second = (agent.start("true", b"", PATIENCE) for _ in range(2))
    theirs.sendall(b"%d 0 1 0\n2%d 0 1 0\n1" % (second, first))
    assert agent.result(first, PATIENCE).output == b"1"
    assert agent.result(second, PATIENCE).output == b"2"


def test_an_answer_may_come_in_pieces_and_late(ends: tuple[socket.socket, socket.socket]) -> None:
    """A limit that passes in the middle of an answer loses nothing of it."""
    ours, theirs = ends
    agent = Agent(ours)
    number = agent.start("true", b"", PATIENCE)
    for piece in (b"%d 0 " % number, b"4 0\nab"):
        theirs.sendall(piece)
        with pytest.raises(TimeoutError):
            agent.result(number, SOON)
    theirs.sendall(b"cd")
    assert agent.result(number, PATIENCE).output == b"abcd"


@pytest.mark.parametrize("when", ["before", "after"])
def test_the_answer_of_a_forgotten_command_is_dropped(when: str, ends: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = ends
    agent = Agent(ours)
    hanging, other = (agent.start("true", b"", PATIENCE) for _ in range(2))
    theirs.sendall(b"%d 0 4 0\nlate%d 0 2 0\nok" % (hanging, other))
    if when == "before":
        agent.forget(hanging)
    assert agent.result(other, PATIENCE).output == b"ok"
    if when == "after":
        agent.forget(hanging)
    with pytest.raises(TimeoutError):
        agent.result(hanging, SOON)


@pytest.mark.parametrize("answer", [b"sh: not found\n", b"1 0 3\n", b"1 0 -3 0\n", b"\n", b"1 0 0 0 0\n"])
def test_what_is_no_answer(answer: bytes, ends: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = ends
    agent = Agent(ours)
    number = agent.start("true", b"", PATIENCE)
    theirs.sendall(answer)
    with pytest.raises(GuestError, match="no answer to a command"):
        agent.result(number, PATIENCE)


# ================================================================ a guest of a fake QEMU


StartGuest = Callable[[Path | None], QemuGuest]
"""Starts a guest with its logs in a folder."""


@pytest.fixture
def start_guest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StartGuest]:
    """Give a function that starts a guest; all are closed."""
    program = tmp_path / "qemu"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -S {Path(__file__).with_name("fake_qemu.py")} "$@"\n')
    program.chmod(0o755)
    monkeypatch.setattr(_machine, "QEMU", str(program))
    started: list[QemuGuest] = []

    def start(folder: Path | None) -> QemuGuest:
        started.append(QemuGuest(GuestImage(tmp_path / "kernel", tmp_path / "initramfs"), folder=folder))
        return started[-1]

    yield start
    for guest in started:
        guest.close()


@pytest.fixture
def fake_guest(start_guest: StartGuest, tmp_path: Path) -> QemuGuest:
    return start_guest(tmp_path)


class Broken(LoopbackDevice):
    """A device with a mistake."""

    def claim(self) -> None:
        raise RuntimeError("a mistake")


Devices = Iterator[LoopbackDevice]


@pytest.fixture
def devices() -> Iterator[Devices]:
    """Give devices without end; they are closed."""
    with contextlib.ExitStack() as closing:
        yield (closing.enter_context(contextlib.closing(LoopbackDevice())) for _ in itertools.count())


def test_commands(fake_guest: QemuGuest, tmp_path: Path) -> None:
    assert fake_guest.run("echo one; echo two >&2; echo; echo") == "one"
    assert fake_guest.execute("cat; echo err >&2; exit 3", data=b"\0\xff\n") == (3, b"\0\xff\n", b"err\n")
    assert fake_guest.start("echo later").output() == "later"
    path = f"{tmp_path}/a b"
    data = bytes(range(256)) * 300
    fake_guest.write_file(path, data)
    assert fake_guest.read_file(path) == data


def test_a_failing_command_is_told_with_everything(fake_guest: QemuGuest) -> None:
    with pytest.raises(GuestError) as caught:
        fake_guest.run("echo some; echo bad >&2; exit 4")
    assert caught.value.reason == "'echo some; echo bad >&2; exit 4' failed with exit code 4"
    for part in ("--- output ---\nsome", "--- error output ---\nbad", "a line of the console"):
        assert part in str(caught.value)
    with pytest.raises(GuestError, match="No such file"):
        fake_guest.read_file("/no/such/file")


def test_waiting_for_a_command(fake_guest: QemuGuest, tmp_path: Path) -> None:
    """It is repeated until it succeeds, or its last failure is told."""
    tries = tmp_path / "tries"
    assert fake_guest.wait_for(f"echo x >> {tries}; [ $(wc -l < {tries}) -ge 3 ] && echo three") == "three"
    assert tries.read_text() == "x\n" * 3
    with pytest.raises(GuestError, match=r"exit code 1.*\n.*\nnot yet"):
        fake_guest.wait_for("echo not yet; false", timeout=SOON)


def test_a_command_that_takes_too_long_is_stopped(fake_guest: QemuGuest) -> None:
    with pytest.raises(GuestError, match=r"'hang' took longer than 0.02 s and was stopped\n.*\nhalf"):
        fake_guest.run("hang", timeout=SOON)
    assert fake_guest.run("echo goes on") == "goes on"
    assert fake_guest.start("hang").stop().code == 137


def test_a_command_that_cannot_be_stopped(fake_guest: QemuGuest, monkeypatch: pytest.MonkeyPatch) -> None:
    """It hangs in the kernel: that is told, and others go on."""
    monkeypatch.setattr(_machine, "STOP_LIMIT", SOON)
    with pytest.raises(GuestError, match="time limit passed while waiting for 'hang for ever' to end"):
        fake_guest.run("hang for ever", timeout=SOON)
    assert fake_guest.run("echo goes on") == "goes on"


def test_the_end_of_qemu_is_told(fake_guest: QemuGuest) -> None:
    with pytest.raises(GuestError, match="QEMU ended with exit code 3 while waiting for 'die'") as caught:
        fake_guest.run("die")
    assert "it hurts" in str(caught.value)
    for _ in range(2):
        with pytest.raises(GuestError, match="exit code 3"):
            fake_guest.run("true")
    with pytest.raises(GuestError, match="exit code 3"):
        fake_guest.qmp("query-status")


def test_closing_ends_qemu_and_the_exports(fake_guest: QemuGuest, devices: Devices) -> None:
    plugged = fake_guest.plug(next(devices), timeout=None)
    export = plugged._export
    assert export is not None
    assert export.is_alive()
    fake_guest.close()
    fake_guest.close()
    assert fake_guest._process.returncode is not None
    assert not export.is_alive()


def test_a_program_that_is_not_there(start_guest: StartGuest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_machine, "QEMU", "/no/such/qemu")
    with pytest.raises(GuestError, match="/no/such/qemu cannot be started: No such file"):
        start_guest(None)


def test_a_program_that_is_no_qemu(start_guest: StartGuest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends at once: what it said is told."""
    program = tmp_path / "other"
    program.write_text("#!/bin/sh\necho unknown option >&2\nexit 2\n")
    program.chmod(0o755)
    monkeypatch.setattr(_machine, "QEMU", str(program))
    with pytest.raises(GuestError, match="QEMU ended with exit code 2 while waiting for the guest to boot") as caught:
        start_guest(tmp_path)
    assert "unknown option" in str(caught.value)


def test_a_folder_of_its_own_is_removed(start_guest: StartGuest) -> None:
    guest = start_guest(None)
    folder = guest._console.parent
    assert "console" in guest.console()
    guest.close()
    assert not folder.exists()
    assert guest.console() == ""


def test_devices_come_and_go(fake_guest: QemuGuest, devices: Devices) -> None:
    """Each has a port and a name of its own; ports are used again, names are not."""
    first = fake_guest.plug(next(devices), timeout=None)
    second = fake_guest.plug_listening()
    third = fake_guest.plug(next(devices), controller="ehci", timeout=None)
    assert [(one.id, one.controller, one.port) for one in (first, second, third)] == [
        ("usb1", "xhci", 1),
        ("usb2", "xhci", 2),
        ("usb3", "ehci", 1),
    ]
    assert second.address.startswith("127.0.0.1:")
    fake_guest.unplug(first)
    assert first._export is not None
    assert not first._export.is_alive()
    assert first.error is None
    again = fake_guest.plug(next(devices), timeout=None)
    assert (again.id, again.port) == ("usb4", 1)
    fake_guest.unplug_all()
    assert not fake_guest._plugged


def test_packets_are_kept_if_wanted(fake_guest: QemuGuest, devices: Devices, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of devices that come while there is a log."""
    log, attached = PacketLog(), list[object]()
    monkeypatch.setattr(log, "attach", attached.append)
    first = fake_guest.plug(next(devices), timeout=None)
    fake_guest.log = log
    second = fake_guest.plug(next(devices), timeout=None)
    for plugged in (first, second):
        fake_guest.unplug(plugged)
    assert len(attached) == 1


def test_more_devices_than_ports(fake_guest: QemuGuest) -> None:
    for _ in range(8):
        fake_guest.plug_listening()
    with pytest.raises(GuestError, match="all 8 ports of xhci are in use"):
        fake_guest.plug_listening()


def test_a_device_that_the_guest_does_not_configure(fake_guest: QemuGuest, devices: Devices) -> None:
    with pytest.raises(GuestError, match=r"the guest did not configure usb1 within 0.02 s"):
        fake_guest.plug(next(devices), timeout=SOON)


def test_an_address_that_nobody_listens_at(fake_guest: QemuGuest) -> None:
    with pytest.raises(GuestError, match="QEMU refused chardev-add: no such thing"):
        fake_guest.plug_address("127.0.0.1:1")
    with pytest.raises(ValueError, match="nowhere"):
        fake_guest.plug_address("nowhere")
    with pytest.raises(ValueError, match="HOST:PORT"):
        fake_guest.plug_listening("unix:/tmp/x")
    assert not fake_guest._plugged


def test_a_device_that_is_lost_before_the_guest_sees_it(fake_guest: QemuGuest, devices: Devices) -> None:
    device = next(devices)
    device.unplug()
    with pytest.raises(GuestError, match="the export of usb1 has ended: the device was lost"):
        fake_guest.plug(device, timeout=PATIENCE)
    fake_guest.unplug_all()


def test_a_device_that_blocks_its_thread(
    fake_guest: QemuGuest, devices: Devices, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is told; waiting for it has a limit."""
    blocked = threading.Event()
    device = next(devices)
    monkeypatch.setattr(device, "claim", lambda: blocked.wait(PATIENCE))
    monkeypatch.setattr(_machine, "STOP_LIMIT", SOON)
    plugged = fake_guest.plug(device, timeout=None)
    with pytest.raises(GuestError, match=r"the export of usb1 failed: .*a hook, or handle_events, blocks"):
        fake_guest.unplug(plugged)
    blocked.set()
    assert plugged._export is not None
    plugged._export.join(PATIENCE)


def test_what_qemu_refuses_leaves_nothing(fake_guest: QemuGuest, devices: Devices) -> None:
    with pytest.raises(GuestError, match="QEMU refused device_add: no such thing"):
        fake_guest.plug(next(devices), properties={"nonsense": 1})
    assert fake_guest.qmp("query-done")[-2:] == ["chardev-remove", "query-done"]
    assert not [thread for thread in threading.enumerate() if thread.name == "export of LoopbackDevice"]


def test_an_export_that_fails_is_told(fake_guest: QemuGuest) -> None:
    """When its device is waited for, with other errors, and when it is unplugged."""
    with (
        contextlib.closing(Broken()) as device,
        pytest.raises(GuestError, match=r"the export of usb1 has ended: RuntimeError\('a mistake'\)"),
    ):
        fake_guest.plug(device, timeout=PATIENCE)
    with pytest.raises(GuestError, match=r"usb1: export failed with RuntimeError\('a mistake'\)"):
        fake_guest.run("false")
    with pytest.raises(GuestError, match=r"the export of usb1 failed: RuntimeError\('a mistake'\)"):
        fake_guest.unplug_all()
    fake_guest.unplug_all()


# ================================================================ building


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"USBREDIR_QEMU_CACHE": "{}/mine", "XDG_CACHE_HOME": "{}/xdg"}, "mine"),
        ({"USBREDIR_QEMU_CACHE": "", "XDG_CACHE_HOME": "{}/xdg"}, "xdg/usbredir/qemu"),
        ({"USBREDIR_QEMU_CACHE": "", "XDG_CACHE_HOME": "", "HOME": "{}/home"}, "home/.cache/usbredir/qemu"),
    ],
)
def test_where_guests_are_kept(
    variables: dict[str, str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value.format(tmp_path))
    assert _image.cache_folder() == tmp_path.resolve() / expected
    assert (tmp_path / expected).is_dir()


def test_missing_tools_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for tool in _image.TOOLS:
        (tmp_path / tool).touch(mode=0o755)
    monkeypatch.setattr(_image, "SEARCH_PATH", str(tmp_path))
    assert _image.missing_tools() == []
    (tmp_path / "cpio").unlink()
    (tmp_path / _image.QEMU).unlink()
    assert _image.missing_tools() == ["cpio", _image.QEMU]
    with pytest.raises(BuildError, match=f"not installed: cpio, {_image.QEMU}"):
        _image.build_guest(tmp_path)


class Builds:
    """Stands in for the packages and the building."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.versions = {"busybox-static": "1"}
        self.built: list[str] = []
        monkeypatch.setattr(_image, "missing_tools", list)
        monkeypatch.setattr(_image, "_needed_packages", lambda: self.versions)
        monkeypatch.setattr(_image, "_build_into", self.build)

    def build(self, folder: Path, packages: list[str]) -> None:
        self.built.append(folder.name)
        folder.mkdir()
        assert packages == list(self.versions)


def test_a_guest_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when several ask at once; and anew when a package or one of our files has changed."""
    builds = Builds(monkeypatch)
    images: list[GuestImage] = []
    threads = [threading.Thread(target=lambda: images.append(_image.build_guest(tmp_path))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert len(images) == 4
    assert len(set(images)) == len(builds.built) == 1
    assert images[0].kernel.parent == tmp_path / builds.built[0]

    builds.versions = {"busybox-static": "2"}
    assert _image.build_guest(tmp_path) != images[0]
    monkeypatch.setattr(_image, "_digest", lambda path: "changed")
    _image.build_guest(tmp_path)
    assert len(set(builds.built)) == 3


def test_old_guests_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What nobody has used for long, and what an interrupted building left; only when something is built."""
    Builds(monkeypatch)
    image = _image.build_guest(tmp_path)
    folders = {name: tmp_path / name for name in ("guest-old", "guest-new", "build-x")}
    for folder in folders.values():
        folder.mkdir()
    os.utime(folders["guest-old"], (0, 0))
    os.utime(image.kernel.parent, (0, 0))
    _image.build_guest(tmp_path)  # it is used: it is not old any more
    assert all(folder.exists() for folder in folders.values())
    monkeypatch.setattr(_image, "_digest", lambda path: "changed")
    _image.build_guest(tmp_path)
    assert {name for name, folder in folders.items() if folder.exists()} == {"guest-new"}
    assert image.kernel.parent.exists()


PACKAGE_LIST = {
    "linux-image-amd64": ("6.1", "linux-image-6.1.0-9-amd64 (= 6.1)"),
    "busybox-static": ("1.35", ""),
    "alsa-utils": ("1.2", "kmod (>= 17), {library} (>= 1.2.6.1), libc6 (>= 2.34)"),
    "libasound2-data": ("1.2", ""),
    "libasound2": ("1.2", ""),
    "libasound2t64": ("1.2", ""),
    "libc6": ("2.36", ""),
}


@pytest.mark.parametrize("library", ["libasound2", "libasound2t64"])
def test_needed_packages(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel and a library have names that change from release to release."""

    def show(command: list[str]) -> bytes:
        assert command[:2] == ["apt-cache", "show"]
        paragraphs = []
        for name in command[3:]:
            version, depends = PACKAGE_LIST[name]
            fields = f"Package: {name}\nVersion: {version}\nDepends: {depends.format(library=library)}\n"
            paragraphs.append(f"{fields}Description: a\n Version: of something\n")
        return "\n".join(paragraphs).encode()

    monkeypatch.setattr(_image, "_run", show)
    assert _image._needed_packages() == {
        "linux-image-6.1.0-9-amd64": "6.1",
        library: "1.2",
        **{name: PACKAGE_LIST[name][0] for name in ("busybox-static", "alsa-utils", "libasound2-data", "libc6")},
    }


@pytest.mark.parametrize(
    ("listing", "message"),
    [
        (b"Package: libc6\nVersion: 1\n", "apt does not know .*alsa-utils.*apt-get update"),
        ("\n".join(f"Package: {name}\nVersion: 1\nDepends: x\n" for name in PACKAGE_LIST).encode(), "is this Debian?"),
    ],
)
def test_packages_that_are_not_known(listing: bytes, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_image, "_run", lambda command: listing)
    with pytest.raises(BuildError, match=message):
        _image._needed_packages()


ELF = b"\x7fELF" + bytes(1000)


@pytest.mark.parametrize(
    ("vmlinuz", "expected"),
    [
        (b"MZ" + bytes(100) + lzma.compress(ELF) + b"trailer", ELF),
        (b"MZ" + lzma.compress(b"something else"), None),
        (b"MZ\xfd7zXZ\0 only looks so", None),
        (b"MZ packed in another way", None),
    ],
)
def test_the_kernel_is_unpacked_if_that_can_be_done(vmlinuz: bytes, expected: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "vmlinuz"
    path.write_bytes(vmlinuz)
    assert _image._unpacked_kernel(path) == (vmlinuz if expected is None else expected)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["/no/such/program"], "/no/such/program is not installed"),
        (["sh", "-c", "echo why >&2; exit 7"], "exit status 7.*\n?.*why"),
    ],
)
def test_a_step_that_fails(command: list[str], message: str) -> None:
    with pytest.raises(BuildError, match=message):
        _image._run(command)


def test_what_is_not_in_the_packages(tmp_path: Path) -> None:
    (tmp_path / "b").touch()
    assert _image._only(tmp_path, "a", "b") == tmp_path / "b"
    with pytest.raises(BuildError, match="no a or c in the packages"):
        _image._only(tmp_path, "a", "c")
