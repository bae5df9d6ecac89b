"""Facedancer devices as devices of this library: Facedancer's own, and small ones that behave in every way."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from usbredir._disk_client import DiskClient
from usbredir.descriptors import parse_configuration
from usbredir.device import Transfer, UsbDevice
from usbredir.errors import DeviceError
from usbredir.proto import Speed, Status, TransferType
from usbredir.testing import check_device, linked_pair
from usbredir.virtual import facedancer as adapter
from usbredir.virtual.facedancer import FacedancerDevice, load

facedancer: Any = pytest.importorskip("facedancer")
keyboards: Any = pytest.importorskip("facedancer.devices.keyboard")
ftdi: Any = pytest.importorskip("facedancer.devices.ftdi")
umass: Any = pytest.importorskip("facedancer.devices.umass")
disk_image: Any = pytest.importorskip("facedancer.devices.umass.disk_image")
errors: Any = pytest.importorskip("facedancer.errors")

PATIENCE = 30.0
IN, OUT = facedancer.USBDirection.IN, facedancer.USBDirection.OUT


def small(**members: Any) -> Any:
    """A device with a bulk pair, 0x01 and 0x82, and with *members*."""

    class Configuration(facedancer.USBConfiguration):  # type: ignore[misc]
        class Interface(facedancer.USBInterface):  # type: ignore[misc]
            class Receiver(facedancer.USBEndpoint):  # type: ignore[misc]
                number, direction = 1, OUT

            class Sender(facedancer.USBEndpoint):  # type: ignore[misc]
                number, direction = 2, IN

    bases = (facedancer.USBDevice,)
    namespace = {"Configuration": Configuration, "__module__": __name__, **members}
    return facedancer.use_inner_classes_automatically(type(bases[0])("Small", bases, namespace))()


@pytest.fixture
def opened() -> Iterator[Callable[..., FacedancerDevice]]:
    """Give a function that makes devices, which are closed afterwards."""
    devices: list[FacedancerDevice] = []

    def make(*arguments: Any, **options: Any) -> FacedancerDevice:
        devices.append(FacedancerDevice(*arguments, **options))
        return devices[-1]

    yield make
    for device in devices:
        device.close()


Opened = Callable[..., FacedancerDevice]


def submit(device: UsbDevice, kind: TransferType, endpoint: int, length: int = 0, **options: Any) -> list[Transfer]:
    """Submit a transfer; the list holds it when it has completed."""
    done: list[Transfer] = []
    length = length or len(options.get("data", b""))
    assert device.submit(Transfer(kind, endpoint, length, done.append, **options)) == Status.SUCCESS
    device.handle_events(0)
    return done


def until(device: UsbDevice, done: Callable[[], object]) -> None:
    """Handle events until something is so."""
    patience = threading.Event()
    timer = threading.Timer(PATIENCE, patience.set)
    timer.start()
    while not done():
        assert not patience.is_set()
        device.handle_events(0.1)
    timer.cancel()


def bulk_in(device: UsbDevice, endpoint: int, length: int) -> bytes:
    done = submit(device, TransferType.BULK, endpoint, length)
    until(device, lambda: done)
    assert done[0].status == Status.SUCCESS
    return bytes(done[0].data)


def bulk_out(device: UsbDevice, endpoint: int, data: bytes) -> int:
    (transfer,) = submit(device, TransferType.BULK, endpoint, data=data)
    return transfer.status


def control(device: UsbDevice, *setup: int, length: int = 0, data: bytes = b"") -> tuple[int, bytes]:
    (transfer,) = submit(device, TransferType.CONTROL, setup[0] & 0x80, length, data=data, setup=setup)
    return transfer.status, bytes(transfer.data)


# ================================================================ packets and transfers


@pytest.mark.parametrize(
    ("packets", "lengths", "transfers"),
    [
        ([b"abc"], [10], [b"abc"]),
        ([b"abcd", b"ef"], [10], [b"abcdef"]),  # a full packet goes on
        ([b"abcd"], [10], [None]),
        ([b"abcd"], [4, 4], [b"abcd", None]),
        ([b"abcd", b""], [10], [b"abcd"]),
        ([b"abcd", b"efgh", b"ij"], [4, 4, 4], [b"abcd", b"efgh", b"ij"]),
        ([b""], [4, 4], [b"", None]),
        ([b"a", b"b"], [4, 4], [b"a", b"b"]),
        ([b"abcd"], [2], [b"abcd"]),  # a babble: packets are not cut
        ([b"abcdefghij"], [20], [b"abcdefghij"]),  # in one piece
        ([b"ab", b"abcd"], [4, 4, 4], [b"ab", b"abcd", None]),
    ],
)
def test_packets_become_transfers(packets: list[bytes], lengths: list[int], transfers: list[bytes | None]) -> None:
    outgoing = adapter._Outgoing(4)
    for packet in packets:
        outgoing.send(packet)
    assert [outgoing.take(length) for length in lengths] == transfers


@settings(deadline=None)
@given(st.lists(st.binary(max_size=20), max_size=10), st.lists(st.integers(1, 5), max_size=20))
def test_nothing_is_lost_between_packets_and_transfers(messages: list[bytes], packets: list[int]) -> None:
    outgoing, taken = adapter._Outgoing(4), b""
    for message in messages:
        outgoing.send(message)
    outgoing.send(b".")
    for count in [*packets, *[1] * 100]:
        taken += outgoing.take(count * 4) or b""
    assert taken == b"".join(messages) + b"."
    assert not outgoing


def test_what_nobody_takes_is_bounded(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(adapter, "QUEUE_LIMIT", 6)
    outgoing = adapter._Outgoing(4)
    for packet in (b"abcd", b"efgh", b"ij"):
        outgoing.send(packet)
    assert "4 bytes wait for the host" in caplog.text
    assert outgoing.take(8) == b"abcdij"
    outgoing.send(b"kl")
    assert outgoing.take(8) == b"kl"


# ================================================================ Facedancer's own devices


def test_its_keyboard(opened: Opened) -> None:
    """Descriptors as it declares them, and a report for each key."""
    keyboard = keyboards.USBKeyboardDevice()
    device = opened(keyboard)
    host, guest = linked_pair(device)
    guest.wait_for_device()
    assert (device.speed, guest.get_descriptor(1, 0)) == (Speed.FULL, bytes(keyboard.get_descriptor()))
    assert (
        bytes(guest.control_in(0x80, 6, 0x0302, 0x0409, 255).data[2:]).decode("utf-16-le") == "Non-suspicious Keyboard"
    )
    report = guest.control_in(0x81, 6, 0x2200, 0, 255).data
    assert report[:4] == b"\x05\x01\x09\x06"
    assert guest.start_interrupt_receiving(0x83) == Status.SUCCESS
    assert guest.receive(0x83, timeout=PATIENCE).data == bytes(10)
    keyboard.modifier_down(0x02)
    keyboard.key_down(0x04)
    while not any(pressed := bytes(guest.receive(0x83, timeout=PATIENCE).data)):
        pass
    assert pressed == bytes((2, 0, 4, *bytes(7)))
    guest.close()
    host.close()


def test_its_serial_adapter(opened: Opened) -> None:
    received: list[bytes] = []
    serial = ftdi.FTDIDevice()
    serial.handle_serial_data_received = received.append
    device = opened(serial)
    host, guest = linked_pair(device)
    guest.wait_for_device()
    assert guest.control_in(0xC0, 5, 0, 0, 1).data == b"\x10"
    assert guest.control_out(0x40, 1, 0x0101, 0, b"").status == Status.SUCCESS
    assert serial.data_terminal_ready
    assert guest.bulk_out(0x02, b"x" * 150).status == Status.SUCCESS
    assert received == [b"x" * 64, b"x" * 64, b"x" * 22]  # packets
    serial.transmit("hello\n")
    assert guest.bulk_in(0x81, 512).data == b"\x1d\0hello\r\n"
    guest.close()
    host.close()


class Disk(disk_image.DiskImage):  # type: ignore[misc]
    """In memory."""

    def __init__(self, content: bytes) -> None:
        self.content = bytearray(content)
        self.closed = 0

    def get_sector_count(self) -> int:
        return len(self.content) // 512 - 1  # as the device sends it

    def get_sector_data(self, address: int) -> bytes:
        return bytes(self.content[address * 512 : address * 512 + 512])

    def put_sector_data(self, address: int, data: bytes) -> None:
        self.content[address * 512 : address * 512 + 512] = data

    def close(self) -> None:
        self.closed += 1


def test_its_mass_storage(opened: Opened) -> None:
    disk = Disk(bytes(block % 251 for block in range(64) for _ in range(512)))
    device = opened(umass.USBMassStorageDevice(disk))
    host, guest = linked_pair(device)
    guest.wait_for_device()
    client = DiskClient(guest, 0x83, 0x01)
    assert client.inquiry().vendor == "LifeScan"
    assert client.test_unit_ready()
    assert client.capacity() == (64, 512)
    assert client.read_blocks(3, 20) == bytes(disk.content[3 * 512 : 23 * 512])
    guest.close()
    host.close()
    device.close()
    device.close()
    assert disk.closed == 1


@pytest.mark.parametrize("make", [keyboards.USBKeyboardDevice, ftdi.FTDIDevice, small])
def test_they_keep_the_rules_of_devices(make: Callable[[], Any]) -> None:
    check_device(lambda: FacedancerDevice(make()))


# ================================================================ requests


def handler(kind: str, number: int, direction: Any) -> Any:
    return getattr(facedancer, f"{kind}_request_handler")(number=number, direction=direction)


def test_requests_reach_their_handlers(opened: Opened) -> None:
    def add_one(self: Any, request: Any) -> None:
        request.reply(bytes([request.value + 1, request.index]))

    def keep(self: Any, request: Any) -> None:
        kept.append(bytes(request.data))
        request.acknowledge()

    def refuse(self: Any, request: Any) -> None:
        request.stall()

    kept: list[bytes] = []
    device = opened(
        small(
            add_one=handler("vendor", 1, IN)(add_one),
            keep=handler("vendor", 2, OUT)(keep),
            refuse=handler("class", 3, OUT)(refuse),
        )
    )
    assert control(device, 0xC0, 1, 5, 7, length=64) == (Status.SUCCESS, b"\x06\x07")
    assert control(device, 0xC0, 1, 5, 7, length=1) == (Status.SUCCESS, b"\x06")
    assert control(device, 0x40, 2, 0, 0, data=b"data")[0] == Status.SUCCESS
    assert control(device, 0x40, 2, 0, 0)[0] == Status.SUCCESS
    assert kept == [b"data", b""]
    assert control(device, 0x20, 3, 0, 0)[0] == Status.STALL
    assert control(device, 0xC0, 99, 0, 0, length=1)[0] == Status.STALL


def test_a_reply_may_come_later(opened: Opened) -> None:
    """The handler is called once."""
    requests: list[Any] = []

    def later(self: Any, request: Any) -> bool:
        requests.append(request)
        return True

    device = opened(small(handle_request=later))
    del requests[:]
    done = submit(device, TransferType.CONTROL, 0x80, 4, setup=(0xC0, 1, 2, 3))
    device.notify()
    device.handle_events(0)
    assert not done
    (request,) = requests
    assert (request.number, request.value, request.index, request.length) == (1, 2, 3, 4)
    request.reply(b"late")
    device.handle_events(0)
    assert bytes(done[0].data) == b"late"


def test_a_reply_that_comes_too_late_is_nobodys(opened: Opened) -> None:
    """Not the next request's."""
    requests: list[Any] = []

    def later(self: Any, request: Any) -> bool:
        requests.append(request)
        return True

    device = opened(small(handle_request=later))
    del requests[:]
    first: list[Transfer] = []
    transfer = Transfer(TransferType.CONTROL, 0x80, 4, first.append, setup=(0xC0, 1, 2, 3))
    device.submit(transfer)
    device.handle_events(0)
    device.cancel(transfer)
    device.handle_events(0)
    second = submit(device, TransferType.CONTROL, 0x80, 4, setup=(0xC0, 2, 0, 0))
    requests[0].reply(b"1111")
    device.handle_events(0)
    assert not second
    device.halt(0x01)
    device.clear_halt(0x01)  # which the device hears of meanwhile
    requests[1].reply(b"2222")
    device.handle_events(0)
    assert (first[0].status, bytes(second[0].data)) == (Status.CANCELLED, b"2222")


def test_configurations_interfaces_and_resets_are_told(opened: Opened) -> None:
    @facedancer.use_inner_classes_automatically
    class Switching(facedancer.USBDevice):  # type: ignore[misc]
        class One(facedancer.USBConfiguration):  # type: ignore[misc]
            class Off(facedancer.USBInterface):  # type: ignore[misc]
                pass

            class On(facedancer.USBInterface):  # type: ignore[misc]
                alternate = 1

                class Sender(facedancer.USBEndpoint):  # type: ignore[misc]
                    number, direction = 2, IN

    switching = Switching()
    device = opened(switching)
    assert switching.configuration.number == 1
    assert switching.configuration.active_interfaces[0].alternate == 0
    assert device.set_alt_setting(0, 1) == Status.SUCCESS
    assert switching.configuration.active_interfaces[0].alternate == 1
    assert control(device, 0x81, 10, 0, 0, length=1) == (Status.SUCCESS, b"\1")
    switching.send(2, b"hello")
    assert bulk_in(device, 0x82, 64) == b"hello"
    switching.send(2, b"lost")
    device.reset()
    assert switching.configuration.active_interfaces[0].alternate == 1
    switching.send(2, b"new")
    assert bulk_in(device, 0x82, 64) == b"new"
    assert device.set_configuration(0) == Status.SUCCESS
    assert switching.configuration is None


def test_speeds(opened: Opened) -> None:
    for name in ("LOW", "FULL", "HIGH"):
        raw = opened(small(device_speed=facedancer.DeviceSpeed[name]))
        assert raw.speed is Speed[name]
        assert raw.configuration_descriptor is not None
        assert len(parse_configuration(raw.configuration_descriptor).interfaces[0].endpoints) == 2
    with pytest.raises(DeviceError, match="SUPER_PLUS"):
        FacedancerDevice(small(device_speed=facedancer.DeviceSpeed.SUPER_PLUS))


# ================================================================ data


def test_a_device_is_asked_until_it_has_data(opened: Opened) -> None:
    """Of its own accord, as a host asks on a wire."""
    asked: list[str] = []

    def requested(self: Any, endpoint: Any) -> None:
        asked.append("data")
        if len(asked) == 6:
            endpoint.send(b"there")

    def empty(self: Any, endpoint: Any) -> None:
        asked.append("empty")

    device = opened(small(handle_data_requested=requested, handle_buffer_empty=empty))
    assert bulk_in(device, 0x82, 64) == b"there"
    assert asked == ["empty", *["data"] * 5]
    submit(device, TransferType.BULK, 0x82, 64)
    assert asked[6:] == ["empty", "data"]


def test_an_empty_buffer_can_be_filled(opened: Opened) -> None:
    device = opened(small(handle_buffer_empty=lambda self, endpoint: endpoint.send(b"more")))
    assert [bulk_in(device, 0x82, 64) for _ in range(3)] == [b"more"] * 3


def test_halts(opened: Opened) -> None:
    """The device halts an endpoint; the host clears it, and the device hears of it."""
    cleared: list[int] = []

    def request(self: Any, request: Any) -> bool:
        cleared.extend([request.index] * (request.number == 1))
        return bool(facedancer.USBDevice.handle_request(self, request))

    def received(self: Any, endpoint: Any, data: bytes) -> None:
        if data == b"halt":
            self.stall(endpoint_number=1, direction=OUT)
            self.stall(endpoint_number=2, direction=IN)
        self.send(2, data)

    device = opened(small(handle_request=request, handle_data_received=received))
    assert bulk_out(device, 1, b"halt") == Status.STALL
    assert bulk_out(device, 1, b"x") == Status.STALL
    (transfer,) = submit(device, TransferType.BULK, 0x82, 64)
    assert transfer.status == Status.STALL
    assert control(device, 0x82, 0, 0, 0x82, length=2) == (Status.SUCCESS, b"\1\0")
    assert device.clear_halt(0x01) == Status.SUCCESS
    assert control(device, 0x02, 1, 0, 0x82)[0] == Status.SUCCESS
    assert cleared == [0x01, 0x82]
    assert bulk_out(device, 1, b"x") == Status.SUCCESS
    assert bulk_in(device, 0x82, 64) == b"halt"
    assert bulk_in(device, 0x82, 64) == b"x"


def failing(*_: Any) -> None:
    raise KeyError("a bug")


@pytest.mark.parametrize(
    ("hook", "use"),
    [
        ("handle_request", lambda device: control(device, 0xC0, 1, 0, 0, length=1)[0]),
        ("handle_data_received", lambda device: bulk_out(device, 1, b"x")),
        ("handle_data_requested", lambda device: submit(device, TransferType.BULK, 0x82, 64)[0].status),
        ("handle_buffer_empty", lambda device: submit(device, TransferType.BULK, 0x82, 64)[0].status),
    ],
)
def test_a_handler_that_fails_refuses(
    hook: str, use: Callable[[UsbDevice], int], opened: Opened, caplog: pytest.LogCaptureFixture
) -> None:
    device = opened(small(**{hook: failing}))
    assert use(device) == Status.STALL
    assert "a handler of Small failed" in caplog.text
    assert "a bug" in caplog.text


def test_a_descriptor_that_does_not_exist_does_not_harm(opened: Opened) -> None:
    """Facedancer itself raises KeyError for it."""
    device = opened(small())
    assert control(device, 0x80, 6, 0x0207, 0, length=64)[0] == Status.STALL
    assert control(device, 0x80, 6, 0x0200, 0, length=9)[0] == Status.SUCCESS


def test_the_end_of_the_emulation_unplugs(opened: Opened) -> None:
    def end(*_: Any) -> None:
        raise errors.EndEmulation("done")

    device = opened(small(handle_data_received=end))
    submit(device, TransferType.BULK, 0x01, data=b"x")
    assert device.lost


def test_disconnecting_unplugs(opened: Opened) -> None:
    device = opened(small(handle_data_received=lambda self, endpoint, data: self.disconnect()))
    submit(device, TransferType.BULK, 0x01, data=b"x")
    assert device.lost


# ================================================================ coroutines


def test_coroutines_run_beside_the_handlers_and_never_with_them(opened: Opened) -> None:
    """From the first request on. What a step of a coroutine does, handlers see as a whole."""
    inside: list[str] = []
    seen: list[str] = []
    rounds = 200

    async def beside(device: Any) -> None:
        for _ in range(rounds):
            inside.append("coroutine")
            seen.extend(inside)
            inside.pop()
            await asyncio.sleep(0)
        device.send(2, b"done")

    def received(self: Any, endpoint: Any, data: bytes) -> None:
        inside.append("handler")
        seen.extend(inside)
        inside.pop()

    facedancer_device = small(handle_data_received=received)
    device = opened(facedancer_device, beside(facedancer_device))
    assert not seen
    done = submit(device, TransferType.BULK, 0x82, 64)
    while not done:
        bulk_out(device, 1, b"x")
        device.handle_events(0.001)
    assert bytes(done[0].data) == b"done"
    assert seen.count("coroutine") == rounds
    assert "handler" in seen
    assert not inside


def test_a_keyboard_types(opened: Opened) -> None:
    keyboard = keyboards.USBKeyboardDevice()
    device = opened(keyboard, keyboard.type_string("aB", duration=0.03))
    pressed: list[tuple[int, ...]] = []
    while not any(report[0] == 2 and report[2] == 5 for report in pressed):
        done = submit(device, TransferType.INTERRUPT, 0x83, 64)
        until(device, lambda done=done: done)  # type: ignore[misc]
        pressed.append(tuple(bytes(done[0].data)[:3]))
    assert (0, 0, 4) in pressed


def test_closing_ends_coroutines(opened: Opened) -> None:
    ended: list[str] = []
    begun = threading.Semaphore(0)

    async def endless(name: str) -> None:
        begun.release()
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(name)

    device = opened(small(), endless("a"), endless("b"))
    control(device, 0x80, 6, 0x0100, 0, length=18)
    assert begun.acquire(timeout=PATIENCE)
    assert begun.acquire(timeout=PATIENCE)
    device.close()
    assert sorted(ended) == ["a", "b"]
    opened(small(), endless("never begun")).close()
    hardly = opened(small(), endless("hardly begun"))
    control(hardly, 0x80, 6, 0x0100, 0, length=18)
    hardly.close()


def test_a_coroutine_that_does_not_end_is_left_alone(
    opened: Opened, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter, "END_LIMIT", 0.05)
    over = False
    begun = threading.Event()

    async def stubborn() -> None:
        begun.set()
        while not over:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0.001)

    device = opened(small(), stubborn())
    control(device, 0x80, 6, 0x0100, 0, length=18)
    assert begun.wait(PATIENCE)
    assert device._beside is not None
    thread = device._beside._thread
    closing = threading.Thread(target=device.close, daemon=True)
    closing.start()
    closing.join(PATIENCE)
    try:
        assert not closing.is_alive()
        assert thread.is_alive()
        assert "a coroutine of Small goes on although it was cancelled" in caplog.text
    finally:
        over = True
        thread.join(PATIENCE)
        closing.join(PATIENCE)


def test_a_coroutine_that_fails_is_told(opened: Opened, caplog: pytest.LogCaptureFixture) -> None:
    others: list[str] = []

    async def fails() -> None:
        raise KeyError("a bug")

    async def other() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            others.append("cancelled")
            raise

    device = opened(small(), fails(), other())
    control(device, 0x80, 6, 0x0100, 0, length=18)
    thread = device._beside._thread if device._beside else threading.current_thread()
    thread.join(PATIENCE)
    assert "a coroutine of Small failed" in caplog.text
    assert others == ["cancelled"]
    assert not device.lost


def test_a_coroutine_can_end_the_emulation(opened: Opened) -> None:
    async def end() -> None:
        raise errors.EndEmulation("done")

    device = opened(small(), end())
    control(device, 0x80, 6, 0x0100, 0, length=18)
    until(device, lambda: device.lost)


# ================================================================ loading

MODULE = """
    from facedancer.devices.ftdi import FTDIDevice

    Mine = FTDIDevice

    async def nothing():
        pass

    def with_coroutines():
        device = FTDIDevice()
        return device, nothing()

    def broken():
        return 1 / 0

    class Inherits(FTDIDevice):
        pass

    def needs(argument):
        pass

    thing = 5
    def number():
        return 5
"""


SCRIPT = """
    from facedancer import main
    from facedancer.devices.keyboard import USBKeyboardDevice

    device = USBKeyboardDevice()
    main(device, device.type_string("hello"))
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Give the name of a module in the present folder."""
    (tmp_path / "my_devices.py").write_text(textwrap.dedent(MODULE))
    (tmp_path / "bad_devices.py").write_text("import no_such_module_at_all")
    (tmp_path / "my_script.py").write_text(textwrap.dedent(SCRIPT))
    (tmp_path / "my_class.py").write_text("from facedancer import main\nfrom my_devices import Mine\nmain(Mine)\n")
    (tmp_path / "my_end.py").write_text("raise SystemExit(2)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield "my_devices"
    for name in ("my_devices", "bad_devices", "my_script", "my_class", "my_end"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", ["Mine", "with_coroutines"])
def test_load(name: str, module: str) -> None:
    with contextlib.closing(load(module, name)) as one, contextlib.closing(load(module, name)) as other:
        assert type(one.device).__name__ == "FTDIDevice"
        assert one.device is not other.device


@pytest.mark.usefixtures("module")
def test_load_a_script() -> None:
    """As Facedancer's examples are: it runs its device when it is started, without being asked."""
    original = facedancer.main
    with contextlib.closing(load("my_script", "main")) as device:
        assert type(device.device).__name__ == "USBKeyboardDevice"
        assert len(device._waiting_coroutines) == 1
    assert facedancer.main is original
    with pytest.raises(DeviceError, match="used already"):
        load("my_script", "main")
    with contextlib.closing(load("my_class", "main")) as device:
        assert type(device.device).__name__ == "FTDIDevice"


def test_a_device_with_bad_descriptors(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    importlib.import_module("facedancer.configuration")
    monkeypatch.setattr(facedancer.USBConfiguration, "get_descriptor", lambda self: b"nonsense")
    with pytest.raises(DeviceError, match=f"cannot make {module}:Mine"):
        load(module, "Mine")


@pytest.mark.parametrize(
    ("where", "name", "why"),
    [
        ("my_devices", "Missing", "cannot make my_devices:Missing: AttributeError"),
        ("my_devices", "broken", "cannot make my_devices:broken: ZeroDivisionError"),
        ("my_devices", "needs", "cannot make my_devices:needs: TypeError"),
        ("my_devices", "Inherits", "Inherits has no configuration"),
        ("my_devices", "thing", "cannot make my_devices:thing: TypeError"),
        ("my_devices", "number", "5 is no Facedancer device"),
        ("bad_devices", "Mine", "No module named 'no_such_module_at_all'"),
        ("no_such_module_at_all", "Mine", "No module named 'no_such_module_at_all'"),
        ("my_end", "Mine", "SystemExit: 2"),
        ("facedancer", "USBDevice", "has no configuration"),
    ],
)
@pytest.mark.usefixtures("module")
def test_what_cannot_be_loaded(where: str, name: str, why: str) -> None:
    with pytest.raises(DeviceError, match=why):
        load(where, name)


@pytest.mark.parametrize("names", [["facedancer"], ["facedancer.device"]])
def test_without_facedancer(names: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in names:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(DeviceError, match=r"pip install usbredir\[facedancer\]"):
        load("my_devices", "Mine")
