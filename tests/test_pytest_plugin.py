"""The pytest plugin: its fixtures, the packets that failures show, and what stands behind them."""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import re
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import usbredir.testing
from usbredir._layout import header_struct
from usbredir.device import UsbDevice
from usbredir.errors import ConnectionClosed
from usbredir.guest import Guest
from usbredir.packets import BulkPacket
from usbredir.parser import Parser, ParserCallbacks
from usbredir.proto import Capability, PacketType, Status
from usbredir.testing import PacketLog, Server, linked_pair, qemu
from usbredir.transport import GuestConnection, connect
from usbredir.virtual import Answer, Faulty, LoopbackDevice

pytest_plugins = ["pytester"]

ROOT = Path(__file__).parent.parent
PATIENCE = 60.0
PLUGIN = "usbredir.pytest_plugin"
INSTALLED = any(entry.value == PLUGIN for entry in importlib.metadata.entry_points(group="pytest11"))
OTHERS = ("cacheprovider", "xdist", "randomly", "benchmark")
OPTIONS = [*(f"-pno:{name}" for name in OTHERS), "-W", "error", "--strict-markers"]


@pytest.fixture
def run(pytester: pytest.Pytester) -> Callable[..., pytest.RunResult]:
    """Run a text as a test file, with the plugin."""

    def run_text(text: str, *options: str) -> pytest.RunResult:
        pytester.makepyfile(text)
        loaded = [] if INSTALLED else ["-p", PLUGIN]
        return pytester.runpytest_inprocess(*OPTIONS, *loaded, *options)

    return run_text


# ================================================================ loading


def test_the_entry_point() -> None:
    """pytest finds the plugin by itself, under a name that users can switch off."""
    assert f'[project.entry-points.pytest11]\nusbredir = "{PLUGIN}"' in (ROOT / "pyproject.toml").read_text()


def test_it_is_cheap_to_load() -> None:
    """Every pytest of an environment with usbredir loads it: nothing else of usbredir comes with it."""
    program = f"import {PLUGIN}, sys; print(*[m for m in sys.modules if m.partition('.')[0] in ('usbredir', 'usb')])"
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=PATIENCE, check=True
    )
    assert set(result.stdout.split()) == {"usbredir", PLUGIN}


def test_it_can_be_switched_off(pytester: pytest.Pytester) -> None:
    """Tests that need nothing of it run without."""
    pytester.makepyfile("def test_plain(request): assert not request.config.pluginmanager.has_plugin('usbredir')")
    pytester.runpytest_inprocess(*OPTIONS, "-p", "no:usbredir").assert_outcomes(passed=1)


# ================================================================ fixtures

DEVICES = """
import pytest
from usbredir.proto import Speed
from usbredir.virtual import LoopbackDevice, MassStorage

made = []
ready = LoopbackDevice()

def make(speed=Speed.HIGH, serial="X"):
    made.append(LoopbackDevice(speed=speed, serial=serial))
    return made[-1]

def test_default(usb_device):
    assert type(usb_device) is LoopbackDevice

@pytest.mark.usb_device(LoopbackDevice, speed=Speed.FULL)
def test_marker(usb_device):
    assert usb_device.speed is Speed.FULL

@pytest.mark.usb_device(device=make)
def test_keyword(usb_device):
    assert made == [usb_device]

@pytest.mark.usb_device(make, Speed.SUPER, serial="Y")
class TestArguments:
    def test_arguments(self, usb_device):
        assert usb_device.speed is Speed.SUPER
        assert not usb_device._closed
        assert made[0]._closed

@pytest.mark.usb_device(device=make)
@pytest.mark.parametrize("usb_device", [MassStorage.__mro__[0], ready], indirect=True, ids=["class", "device"])
def test_parameter(usb_device, request):
    pass

@pytest.mark.parametrize("usb_device", [LoopbackDevice, ready], indirect=True)
def test_parameters(usb_device):
    assert isinstance(usb_device, LoopbackDevice)

def test_a_device_stays_open():
    assert not ready._closed
    ready.close()
    assert len(made) == 2 and all(device._closed for device in made)
"""


def test_usb_device(run: Callable[..., pytest.RunResult]) -> None:
    """By default, by marker and by parameter; what the fixture made it closes."""
    text = DEVICES.replace("MassStorage.__mro__[0]", "lambda: MassStorage(bytes(4096))")
    run(text).assert_outcomes(passed=9)


def test_a_marker_needs_a_device(run: Callable[..., pytest.RunResult]) -> None:
    result = run("import pytest\n@pytest.mark.usb_device()\ndef test_it(usb_device): pass")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*the marker needs a device: usb_device(device, *"])


CONNECTIONS = """
from usbredir.guest import Guest
from usbredir.proto import Status
from usbredir.transport import GuestConnection, connect

def test_loopback(usb_loopback, usb_device):
    host, guest, device = usb_loopback
    assert (host, guest, device) == (usb_loopback.host, usb_loopback.guest, usb_device)
    assert guest.bulk_out(0x01, b"hello").status == Status.SUCCESS
    assert guest.bulk_in(0x81, 64).data == b"hello"

def test_server(usbredir_server, usb_device):
    assert usbredir_server.device is usb_device
    for _ in range(3):
        with connect(usbredir_server.address) as connection, Guest(GuestConnection(connection)) as guest:
            guest.wait_for_device(60)
            assert guest.bulk_out(0x01, b"hello").status == Status.SUCCESS
            assert guest.bulk_in(0x81, 64).data == b"hello"

def test_pyusb(pyusb_device, usb_device):
    assert pyusb_device.idVendor == 0x1209
    pyusb_device.set_configuration()
    assert pyusb_device.write(0x01, b"hello") == 5
    assert bytes(pyusb_device.read(0x81, 64)) == b"hello"
    assert usb_device.counters["submitted"] > 2

def test_pyusb_again(pyusb_device):
    assert bytes(pyusb_device.ctrl_transfer(0xC0, 1, 5, 0, 2)) == b"\\5\\6"
"""


def test_the_ways_to_a_device(run: Callable[..., pytest.RunResult]) -> None:
    run(CONNECTIONS).assert_outcomes(passed=4)


def test_a_device_that_raises_is_an_error(run: Callable[..., pytest.RunResult]) -> None:
    """The driver sees that the connection ends; what the hook raised is told."""
    result = run(
        """
        import pytest
        import usb.core
        from usbredir.virtual import LoopbackDevice

        class Broken(LoopbackDevice):
            def data_out(self, endpoint, data):
                raise ZeroDivisionError("in a hook")

        @pytest.mark.usb_device(device=Broken)
        def test_it(pyusb_device):
            with pytest.raises(usb.core.USBError):
                pyusb_device.write(0x01, b"hello")
        """
    )
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["*ZeroDivisionError: in a hook*"])


def test_the_example_of_the_page(run: Callable[..., pytest.RunResult]) -> None:
    """docs/test-a-driver.md: its first two blocks are test files."""
    page = (ROOT / "docs" / "test-a-driver.md").read_text(encoding="utf-8")
    driver, parameters = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)[:2]
    run(driver).assert_outcomes(passed=6)
    run(parameters).assert_outcomes(passed=3)


# ================================================================ QEMU

QEMU_TESTS = """
def test_one(qemu_guest): qemu_guest.plug(None)
def test_two(qemu_guest): qemu_guest.plug(None)
def test_three(qemu_guest): qemu_guest.plug(None)
def test_without(): pass
"""


def test_a_guest_boots_once(run: Callable[..., pytest.RunResult], monkeypatch: pytest.MonkeyPatch) -> None:
    """And again after it could not be used any more."""
    events: list[str] = []

    class FakeGuest:
        def __init__(self) -> None:
            events.append("boot")

        def plug(self, device: object) -> None:
            events.append("plug")

        def unplug_all(self) -> None:
            events.append("unplug")
            if events.count("unplug") == 2:
                raise qemu.GuestError("it hangs")

        def close(self) -> None:
            events.append("close")

    monkeypatch.setattr(qemu, "QemuGuest", FakeGuest)
    monkeypatch.setattr(qemu, "missing_tools", list)
    run(QEMU_TESTS).assert_outcomes(passed=4, errors=1)
    assert " ".join(events) == "boot plug unplug plug unplug close boot plug unplug close"


def test_without_qemu_tests_are_skipped(run: Callable[..., pytest.RunResult], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qemu, "missing_tools", lambda: ["qemu-system-x86_64", "busybox"])
    result = run(QEMU_TESTS, "-rs")
    result.assert_outcomes(passed=1, skipped=3)
    result.stdout.fnmatch_lines(["*no Linux guest: qemu-system-x86_64, busybox missing*"])


@pytest.mark.qemu
def test_a_real_guest(run: Callable[..., pytest.RunResult]) -> None:
    """One boot, and the device that one test plugged in is gone in the next."""
    result = run(
        """
        def test_one(qemu_guest, usb_device):
            plugged = qemu_guest.plug(usb_device)
            assert qemu_guest.run(f"cat {plugged.path}/product") == "Loopback"

        def test_two(qemu_guest):
            assert "Loopback" not in qemu_guest.run("cat /sys/bus/usb/devices/*/product")
        """
    )
    result.assert_outcomes(passed=2)


# ================================================================ failures show packets

FAILING = """
import pytest

logs = []

def test_passes(usb_loopback):
    usb_loopback.guest.bulk_out(0x01, b"unseen")

def test_loopback(usb_loopback):
    usb_loopback.guest.bulk_out(0x01, b"seen")
    assert False

def test_server(pyusb_device):
    pyusb_device.ctrl_transfer(0xC0, 0x01, 5, 0, 2)
    assert False

def test_without():
    assert False
"""


def test_failures_show_packets(run: Callable[..., pytest.RunResult]) -> None:
    """Those of the failed test, in both directions; nothing where none of the fixtures was used."""
    result = run(FAILING, "-rP")
    result.assert_outcomes(passed=1, failed=3)
    output = result.stdout.str()
    seen = b"seen".hex(" ")
    assert re.search(rf"packets of usb_loopback(.|\n)*guest > host  BulkPacket\(.*data=<4 bytes: {seen}>", output)
    assert re.search(r"packets of usbredir_server(.|\n)*host > guest  ControlPacket\(.*data=<2 bytes: 05 06>", output)
    assert b"unseen".hex(" ") not in output
    assert output.count("packets of") == 2


def test_logs_go_with_their_tests(run: Callable[..., pytest.RunResult], monkeypatch: pytest.MonkeyPatch) -> None:
    """However many tests a run has, and although pytest keeps their items."""
    logs = weakref.WeakSet[PacketLog]()
    made = []

    class Counted(PacketLog):
        def __init__(self) -> None:
            super().__init__()
            logs.add(self)
            made.append(1)

    monkeypatch.setattr(usbredir.testing, "PacketLog", Counted)
    result = run("def test_it(usb_loopback): pass")
    result.assert_outcomes(passed=1)
    gc.collect()
    assert (len(made), len(logs)) == (1, 0)


# ================================================================ the packet log


class SlowWriter:
    """The host's end of a stream whose bytes arrive before the call that wrote them has returned."""

    def __init__(self, log: PacketLog) -> None:
        self.arrived, self.returns = threading.Event(), threading.Event()
        log.attach(self)

    def read(self, count: int) -> bytes | None:
        raise AssertionError("nothing is read here")

    def writev(self, buffers: Sequence[memoryview]) -> int | None:
        self.arrived.set()
        assert self.returns.wait(PATIENCE)
        return sum(map(len, buffers))


def test_what_has_arrived_is_in_the_log() -> None:
    """A test fails in one thread while the thread of the host has not returned from writing."""
    log = PacketLog()
    stream = SlowWriter(log)
    hello = header_struct(False).pack(PacketType.HELLO, 68, 0) + b"host".ljust(64, b"\0") + bytes(4)
    writing = threading.Thread(target=stream.writev, args=([memoryview(hello)],))
    writing.start()
    assert stream.arrived.wait(PATIENCE)
    shown: list[str] = []
    asking = threading.Thread(target=lambda: shown.append(str(log)))
    asking.start()
    try:
        asking.join(0.05)  # it has to wait
        assert not shown
    finally:
        stream.returns.set()
    for thread in (writing, asking):
        thread.join(PATIENCE)
    assert "host > guest  Hello" in shown[0]


class Recorder:
    """The host's end of a stream that is played to a log: pieces that were read and written."""

    def __init__(self, log: PacketLog) -> None:
        self._piece = b""
        log.attach(self)

    def read(self, count: int) -> bytes | None:
        return self._piece or None

    def writev(self, buffers: Sequence[memoryview]) -> int | None:
        return len(self._piece)

    def received(self, data: bytes) -> None:
        self._piece = data
        assert (self.read(1 << 20) or b"") == data

    def sent(self, data: bytes, *, more: bytes = b"") -> None:
        """*more* was offered and not taken."""
        self._piece = data
        whole = memoryview(data + more)
        assert self.writev([whole[:3], whole[3:]]) == len(data)


class Bytes(ParserCallbacks):
    """The bytes that a parser sends."""

    def __init__(self) -> None:
        self.sent = bytearray()
        self.incoming = b""

    def read(self, count: int) -> bytes | None:
        piece, self.incoming = self.incoming[:count], self.incoming[count:]
        return piece or None

    def write(self, data: memoryview) -> int:
        self.sent += data
        return len(data)


def session(capabilities: Sequence[int]) -> list[tuple[str, bytes]]:
    """Who sent what: hellos, a packet to the host, its answer, and what is no packet."""
    ends = [Bytes(), Bytes()]
    guest, host = Parser(ends[0]), Parser(ends[1], usb_host=True, capabilities=capabilities)
    pieces = []

    def say(number: int, parser: Parser) -> None:
        parser.do_write()
        pieces.append((("received", "sent")[number], bytes(ends[number].sent)))
        ends[1 - number].incoming = bytes(ends[number].sent)
        ends[number].sent.clear()
        (host, guest)[number].do_read()

    say(0, guest)
    say(1, host)
    guest.send(BulkPacket(id=7, endpoint=0x02, data=bytes(range(40))))
    say(0, guest)
    host.send(BulkPacket(id=7, endpoint=0x02, length=40))
    say(1, host)
    pieces.append(("received", (77).to_bytes(4, "little") + (3).to_bytes(4, "little") + bytes(11)))
    return pieces


LINES = [
    "guest > host  Hello(",
    "host > guest  Hello(",
    "guest > host  BulkPacket(id=7, endpoint=0x02, status=SUCCESS, length=40, ",
    "host > guest  BulkPacket(id=7, endpoint=0x02, status=SUCCESS, length=40, ",
    "guest > host  bad packet from the peer: packet type 77: unknown packet type",
]


@settings(max_examples=20)
@given(capabilities=st.sets(st.sampled_from(Capability)), size=st.integers(1, 200))
def test_packets_are_found_in_any_pieces(capabilities: set[Capability], size: int) -> None:
    """Whatever was negotiated, and however the bytes came."""
    log = PacketLog(clock=lambda: 0.0)
    recorder = Recorder(log)
    for kind, data in session(sorted(capabilities)):
        whole = data if Capability.IDS_64BITS in capabilities or data[0] != 77 else data[:15]
        for start in range(0, len(whole), size):
            piece = whole[start : start + size]
            recorder.received(piece) if kind == "received" else recorder.sent(piece, more=b"not taken")
    lines = str(log).splitlines()
    assert len(lines) == len(LINES)
    for line, expected in zip(lines, LINES, strict=True):
        assert line.startswith(f"   0.0000 {expected}")
        assert len(line) < 260
    assert "data=<40 bytes: 00 01 02" in lines[2]


def test_old_packets_are_dropped() -> None:
    """Also before anybody looks: what was not shown yet is bounded too."""
    now = [0.0]
    log = PacketLog(3, clock=lambda: now[0])
    recorder = Recorder(log)
    pieces = session([])
    for kind, data in pieces[:2]:
        recorder.received(data) if kind == "received" else recorder.sent(data)
    packet = pieces[3][1]
    for _ in range(100_000):
        now[0] += 0.5
        recorder.sent(packet)
        assert log._size <= 1 << 20
    lines = str(log).splitlines()
    assert lines[0] == "(99999 earlier packets)"
    assert [line.split()[0] for line in lines[1:]] == ["49999.0000", "49999.5000", "50000.0000"]
    assert str(log) == "\n".join(lines)


def test_connections_one_after_the_other() -> None:
    """Each begins with hello, and is numbered when there are several."""
    log = PacketLog(clock=lambda: 0.0)
    for capabilities in ([], sorted(Capability)):
        recorder = Recorder(log)
        for kind, data in session(capabilities)[:4]:
            recorder.received(data) if kind == "received" else recorder.sent(data)
    lines = str(log).splitlines()
    assert [line.split()[1] for line in lines] == ["#1"] * 4 + ["#2"] * 4
    assert not [line for line in lines if "bad packet" in line]


def test_nothing_is_said_of_nothing() -> None:
    log = PacketLog()
    recorder = Recorder(log)
    assert recorder.read(5) is None
    assert recorder.writev([memoryview(b"abc")]) == 0
    assert str(log) == ""


def test_a_filter_that_does_not_parse_is_told() -> None:
    log = PacketLog(clock=lambda: 0.0)
    recorder = Recorder(log)
    for kind, data in session(sorted(Capability))[:2]:
        recorder.received(data) if kind == "received" else recorder.sent(data)
    recorder.received((23).to_bytes(4, "little") + (4).to_bytes(4, "little") + bytes(8) + b"abc\0")
    assert "guest > host  a filter that does not parse: " in str(log)


def test_a_pair_with_a_log() -> None:
    log = PacketLog()
    host, guest = linked_pair(LoopbackDevice(), log=log)
    guest.wait_for_device(PATIENCE)
    assert "host > guest  DeviceConnect(" in str(log)
    assert "host > guest  EpInfo(" in str(log)
    assert max(map(len, str(log).splitlines())) < 240
    guest.close()
    host.close()


# ================================================================ the server


@pytest.fixture
def device() -> Iterator[LoopbackDevice]:
    device = LoopbackDevice()
    yield device
    device.close()


def test_it_ends_with_a_guest_that_is_there(device: LoopbackDevice) -> None:
    server = Server(device)
    with connect(server.address) as connection, Guest(GuestConnection(connection)) as guest:
        guest.wait_for_device(PATIENCE)
        server.close()
        server.close()
        with pytest.raises(ConnectionClosed):
            guest.bulk_in(0x82, 8, timeout=PATIENCE)
    with pytest.raises(OSError, match=r"refused|answer"):
        connect(server.address)


def test_guests_wait_for_each_other(device: LoopbackDevice) -> None:
    """The second one is served when the first has left."""
    with Server(device) as server, connect(server.address) as first, Guest(GuestConnection(first)) as guest:
        guest.wait_for_device(PATIENCE)
        with connect(server.address) as second, Guest(GuestConnection(second)) as waiting:
            with pytest.raises(TimeoutError):
                waiting.wait_for_device(0.02)
            guest.close()
            first.close()
            waiting.wait_for_device(PATIENCE)
            assert waiting.bulk_in(0x82, 8).status == Status.SUCCESS


def test_an_idle_guest_learns_that_the_device_is_gone(device: LoopbackDevice) -> None:
    with (
        Server(Faulty(device)) as server,
        connect(server.address) as connection,
        Guest(GuestConnection(connection)) as guest,
    ):
        guest.wait_for_device(PATIENCE)
        assert isinstance(server.device, Faulty)
        server.device.unplug()
        guest.wait_for_disconnect(PATIENCE)


def test_a_lost_device_turns_guests_away(device: LoopbackDevice) -> None:
    device.unplug()
    with Server(device) as server:
        for _ in range(2):
            with (
                connect(server.address) as connection,
                Guest(GuestConnection(connection)) as guest,
                pytest.raises((ConnectionClosed, ConnectionError)),
            ):
                guest.wait_for_device(PATIENCE)


def test_a_guest_that_is_none_is_sent_away(device: LoopbackDevice) -> None:
    """The next one is served, and nothing is said of it."""
    with Server(device) as server:
        with connect(server.address) as stranger:
            stranger.write(memoryview(b"GET / HTTP/1.0\r\n\r\n" * 20))
            with contextlib.suppress(ConnectionError):
                while stranger.read(4096) != b"":
                    stranger.wait(PATIENCE, writing=False)
        with connect(server.address) as connection, Guest(GuestConnection(connection)) as guest:
            guest.wait_for_device(PATIENCE)
            assert guest.bulk_in(0x82, 8).status == Status.SUCCESS


def meet_a_broken_device(server: Server) -> None:
    """A guest whose connection ends when a hook of the device fails."""
    with connect(server.address) as connection, Guest(GuestConnection(connection)) as guest:
        guest.wait_for_device(PATIENCE)
        with pytest.raises((ConnectionClosed, ConnectionError)):
            guest.bulk_in(0x82, 8, timeout=PATIENCE)


def test_an_error_of_the_system_ends_one_session() -> None:
    """It may be one of a hook, so close() raises it, but the next guest is served."""

    class Unreadable(LoopbackDevice):
        def data_in(self, endpoint: int, length: int) -> Answer:
            raise FileNotFoundError("samples.wav")

    with Unreadable() as broken:
        server = Server(broken)
        for _ in range(2):
            meet_a_broken_device(server)
        with pytest.raises(FileNotFoundError):
            server.close()
        server.close()


def test_what_a_hook_raises_is_raised_once(device: LoopbackDevice) -> None:
    class Broken(LoopbackDevice):
        def data_in(self, endpoint: int, length: int) -> Answer:
            raise ZeroDivisionError

    broken: UsbDevice = Broken()
    server = Server(broken)
    meet_a_broken_device(server)
    with pytest.raises(ZeroDivisionError):
        server.close()
    server.close()
    broken.close()
