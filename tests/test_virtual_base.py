"""VirtualDevice: what is the same for every device made of Python, with a small device and a clock that is set."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from usbredir.descriptors import (
    Configuration,
    DescriptorType,
    DeviceDescriptor,
    Endpoint,
    Interface,
    bos_descriptor,
    build_configuration,
)
from usbredir.device import IsoResult, Transfer, UsbDevice
from usbredir.errors import DeviceLostError
from usbredir.guest import Guest
from usbredir.proto import Speed, Status, TransferType
from usbredir.transport import GuestConnection, listen, poll
from usbredir.virtual import (
    Answer,
    Description,
    Setup,
    VirtualDevice,
    bulk_in,
    bulk_out,
    interface,
    interrupt_in,
    interrupt_out,
)

PATIENCE = 60.0
"""Seconds after which a thread counts as stuck."""
BULK, CONTROL, INTERRUPT, ISO = TransferType.BULK, TransferType.CONTROL, TransferType.INTERRUPT, TransferType.ISO
IN, OUT, OTHER_IN, ISO_IN, ISO_OUT = 0x81, 0x02, 0x83, 0x84, 0x05
DEVICE_DESCRIPTOR = DeviceDescriptor(0x0200, 0xFF, 0, 0, 64, 0x1209, 2, 0x0100, 1, 2, 3, configurations=2).to_bytes()
FIRST = build_configuration(
    Configuration(
        1,
        attributes=0xE0,
        interfaces=(
            Interface(
                0, 0, 0xFF, endpoints=(Endpoint(IN, BULK, 512), Endpoint(OUT, BULK, 512), Endpoint(OTHER_IN, BULK, 512))
            ),
            Interface(1, 0, 0xFF),
            Interface(1, 1, 0xFF, endpoints=(Endpoint(ISO_IN, ISO, 64, 1), Endpoint(ISO_OUT, ISO, 64, 1))),
        ),
    )
)
SECOND = build_configuration(Configuration(5, attributes=0x80, interfaces=(Interface(0, 0, 0xFF),)))
BOS = bos_descriptor([])
STRINGS = {1: "maker", 2: "Gerät ☃", 3: "x" * 200}


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now


class Device(VirtualDevice):
    """Answers what the test puts into ``answers``, by endpoint; NAK otherwise. Writes down what happens."""

    def __init__(self, **more: Any) -> None:
        self._told = Description(DEVICE_DESCRIPTOR, [FIRST, SECOND], STRINGS, **more)
        self.clock = Clock()
        self.events: list[object] = []
        self.answers: dict[int, Any] = {}
        self.accept: Answer | None = None
        self.period = 0.0
        self.control: Callable[[Setup, bytes], Any] = lambda setup, data: Answer.STALL
        super().__init__(clock=self.clock)
        assert self.events == ["began"]
        self.events.clear()

    def describe(self, speed: Speed) -> Description:
        return self._told

    def data_in(self, endpoint: int, length: int) -> Any:
        answer = self.answers.get(endpoint, Answer.NAK)
        if isinstance(answer, list):
            return answer.pop(0) if answer else Answer.NAK
        return answer

    def data_out(self, endpoint: int, data: bytes | bytearray | memoryview) -> Answer | None:
        self.events.append((endpoint, bytes(data)))
        return self.accept

    def control_request(self, setup: Setup, data: bytes) -> Any:
        return self.control(setup, data)

    def packet_period(self, endpoint: int) -> float:
        return self.period

    def halt_cleared(self, endpoint: int) -> None:
        self.events.append(("cleared", endpoint))

    def alternate_selected(self, interface: int, alternate: int) -> None:
        self.events.append(("alternate", interface, alternate))

    def began(self) -> None:
        self.events.append("began")

    # ------------------------------------------------------------ for tests

    def start(self, endpoint: int, length: int = 64, data: bytes = b"", **options: Any) -> Transfer:
        """Submit a bulk transfer. ``context`` is the list of what completed."""
        done: list[Transfer] = []
        kind = options.pop("kind", BULK)
        transfer = Transfer(kind, endpoint, len(data) or length, done.append, data=data, context=done, **options)
        assert self.submit(transfer) == Status.SUCCESS
        return transfer

    def request(self, setup: Setup, data: bytes = b"") -> Transfer:
        """A control request, completed at once."""
        transfer = self.start(
            setup.request_type & 0x80, setup.length, data, kind=CONTROL, setup=tuple(setup)[:4], timeout=0
        )
        self.handle_events(0)
        assert is_done(transfer)
        return transfer

    def read(self, setup: Setup) -> bytes | None:
        """The answer to a control IN request, or None for a stall."""
        transfer = self.request(setup)
        if transfer.status == Status.STALL:
            return None
        assert transfer.status == Status.SUCCESS
        assert transfer.actual_length == len(transfer.data) <= setup.length
        return bytes(transfer.data)


def is_done(transfer: Transfer) -> bool:
    """Whether a transfer completed, once."""
    assert isinstance(transfer.context, list)
    assert len(transfer.context) <= 1, "a transfer completed twice"
    return transfer.context == [transfer]


@pytest.fixture
def device() -> Iterator[Device]:
    device = Device()
    yield device
    device.close()


def get_descriptor(kind: int, index: int = 0, length: int = 4096, language: int = 0) -> Setup:
    return Setup(0x80, 6, kind << 8 | index, language, length)


# ================================================================ description


def test_a_virtual_device_is_a_usb_device(device: Device) -> None:
    assert isinstance(device, UsbDevice)
    assert device.speed is Speed.HIGH
    assert device.device_descriptor == DEVICE_DESCRIPTOR
    assert device.configuration_descriptor == FIRST
    device.claim()


class Small(VirtualDevice):
    """Nothing but a declaration."""

    interfaces = (interface(0xFF, bulk_in(IN)),)


def test_a_device_of_one_s_own_takes_few_lines() -> None:
    """The defaults: everything NAKs or stalls, everything sent is accepted."""
    with_defaults = Small()
    assert with_defaults.control_request(Setup(0xC0, 1, 0, 0, 4), b"") is Answer.STALL
    assert with_defaults.data_in(IN, 5) is Answer.NAK
    assert with_defaults.data_out(OUT, b"x") is None
    with_defaults.halt_cleared(IN)
    with_defaults.alternate_selected(0, 0)
    with_defaults.began()
    with_defaults.close()


def test_most_interfaces() -> None:
    class Huge(VirtualDevice):
        interfaces = tuple(interface(0xFF) for _ in range(33))

    with pytest.raises(ValueError, match="33 interfaces"):
        Huge()


def test_periods_are_those_declared() -> None:
    """Seconds of each interrupt and isochronous endpoint of the present alternate settings."""

    class Paced(VirtualDevice):
        interfaces = (interface(0xFF, interrupt_in(0x81, period=0.01), bulk_in(0x82)), interface(0xFF))

    device = Paced()
    periods = [device.packet_period(endpoint) for endpoint in (0x81, 0x82, 0x83)]
    assert periods == [pytest.approx(0.008), 0, 0]
    device.close()


@pytest.mark.parametrize("speed", [Speed.FULL, Speed.SUPER])
def test_the_speed_is_the_object_s(speed: Speed) -> None:
    device = Small(speed=speed)
    assert device.speed is speed
    assert Small.speed is Speed.HIGH
    device.close()


def test_the_first_device_of_the_page_is_short_and_works(tmp_path: Path) -> None:
    """Complete in twenty lines, export included."""
    page = (Path(__file__).parent.parent / "docs" / "virtual.md").read_text(encoding="utf-8")
    program = page.partition("```py\n")[2].partition("```\n")[0]
    assert 10 <= len(program.splitlines()) <= 20
    with listen(f"unix:{tmp_path}/echo.sock") as listener:
        process = subprocess.Popen(
            [sys.executable, "-X", "dev", "-W", "error", "-c", program], cwd=tmp_path, stderr=subprocess.PIPE
        )
        try:
            connection = listener.accept(PATIENCE)
            assert connection is not None
            with connection, Guest(GuestConnection(connection)) as guest:
                guest.wait_for_device(PATIENCE)
                for message in (b"one", b"two" * 1000, b""):
                    guest.bulk_out(0x01, message, timeout=PATIENCE)
                    assert guest.bulk_in(0x81, 4096, timeout=PATIENCE).data == message
        finally:
            _, errors = process.communicate(timeout=PATIENCE)
    assert (process.returncode, errors) == (0, b"")


# ================================================================ standard requests


@pytest.mark.parametrize(
    ("setup", "expected"),
    [
        (get_descriptor(DescriptorType.DEVICE), DEVICE_DESCRIPTOR),
        (get_descriptor(DescriptorType.DEVICE, length=8), DEVICE_DESCRIPTOR[:8]),
        (get_descriptor(DescriptorType.DEVICE, length=0), b""),
        (get_descriptor(DescriptorType.CONFIGURATION), FIRST),
        (get_descriptor(DescriptorType.CONFIGURATION, length=9), FIRST[:9]),
        (get_descriptor(DescriptorType.CONFIGURATION, 1), SECOND),
        (get_descriptor(DescriptorType.CONFIGURATION, 2), None),
        (get_descriptor(DescriptorType.STRING, 0), b"\x04\x03\x09\x04"),
        (get_descriptor(DescriptorType.STRING, 1), b"\x0c\x03" + "maker".encode("utf-16-le")),
        (get_descriptor(DescriptorType.STRING, 2, language=0x0409), b"\x10\x03" + "Gerät ☃".encode("utf-16-le")),
        (get_descriptor(DescriptorType.STRING, 3), b"\xfe\x03" + ("x" * 126).encode("utf-16-le")),
        (get_descriptor(DescriptorType.STRING, 77), None),
        (get_descriptor(DescriptorType.BOS), None),
        (get_descriptor(6), None),  # device qualifier
        (Setup(0x81, 6, 0x2200, 0, 64), None),  # a HID report descriptor
        (Setup(0x80, 0, 0, 0, 2), b"\x01\x00"),  # GET_STATUS: self powered
        (Setup(0x81, 0, 0, 0, 2), b"\x00\x00"),
        (Setup(0x82, 0, 0, IN, 2), b"\x00\x00"),
        (Setup(0x80, 8, 0, 0, 1), b"\x01"),  # GET_CONFIGURATION
        (Setup(0x81, 10, 0, 1, 1), b"\x00"),  # GET_INTERFACE
        (Setup(0x80, 77, 0, 0, 4), None),
        (Setup(0x83, 0, 0, 0, 2), None),  # recipient "other"
    ],
)
def test_standard_requests(device: Device, setup: Setup, expected: bytes | None) -> None:
    assert device.read(setup) == expected


def test_bos_descriptor() -> None:
    with_bos = Device(bos=BOS)
    assert with_bos.read(get_descriptor(DescriptorType.BOS)) == BOS
    with_bos.close()


@pytest.mark.parametrize("request_number", [48, 49])  # SET_SEL, SET_ISOCH_DELAY
def test_requests_that_need_no_action(device: Device, request_number: int) -> None:
    assert device.request(Setup(0x00, request_number, 0, 0, 0)).status == Status.SUCCESS


def test_remote_wakeup(device: Device) -> None:
    """SET_FEATURE and CLEAR_FEATURE show in GET_STATUS."""
    status = Setup(0x80, 0, 0, 0, 2)
    assert device.request(Setup(0x00, 3, 1, 0, 0)).status == Status.SUCCESS
    assert device.read(status) == b"\x03\x00"
    assert device.request(Setup(0x00, 1, 1, 0, 0)).status == Status.SUCCESS
    assert device.read(status) == b"\x01\x00"
    device.set_configuration(5)
    assert device.read(status) == b"\x00\x00"
    assert device.request(Setup(0x00, 3, 1, 0, 0)).status == Status.STALL, "this configuration cannot wake the host"
    assert device.read(status) == b"\x00\x00"


def test_remote_wakeup_ends_with_a_reset(device: Device) -> None:
    assert not device.remote_wakeup_enabled
    device.request(Setup(0x00, 3, 1, 0, 0))
    assert device.remote_wakeup_enabled
    device.reset()
    assert not device.remote_wakeup_enabled


def test_halts_by_request(device: Device) -> None:
    """SET_FEATURE and CLEAR_FEATURE of ENDPOINT_HALT."""
    status = Setup(0x82, 0, 0, IN, 2)
    device.answers[IN] = b"data"
    assert device.request(Setup(0x02, 3, 0, IN, 0)).status == Status.SUCCESS
    assert device.read(status) == b"\x01\x00"
    assert device.is_halted(IN)
    transfer = device.start(IN)
    device.handle_events(0)
    assert (is_done(transfer), transfer.status) == (True, Status.STALL)
    assert device.request(Setup(0x02, 1, 0, IN, 0)).status == Status.SUCCESS
    assert device.read(status) == b"\x00\x00"
    assert device.events == [("cleared", IN)]


@pytest.mark.parametrize(
    "setup", [Setup(0x02, 3, 0, 0x8F, 0), Setup(0x02, 3, 5, IN, 0), Setup(0x00, 3, 9, 0, 0), Setup(0x00, 1, 9, 0, 0)]
)
def test_features_that_do_not_exist(device: Device, setup: Setup) -> None:
    assert device.request(setup).status == Status.STALL


def test_features_of_interfaces(device: Device) -> None:
    """Function suspend: nothing to do."""
    assert device.request(Setup(0x01, 3, 0, 0, 0)).status == Status.SUCCESS


@pytest.mark.parametrize("kind", [0x20, 0x40, 0x60])
def test_class_and_vendor_requests_go_to_the_hook(device: Device, kind: int) -> None:
    seen: list[object] = []

    def control(setup: Setup, data: bytes) -> bytes:
        seen.append((setup, data))
        return b"0123456789"

    device.control = control
    assert device.read(Setup(0x80 | kind, 6, 0x0102, 0x0304, 4)) == b"0123"
    out = Setup(kind, 9, 1, 2, 5)
    assert device.request(out, b"hello").status == Status.SUCCESS
    assert seen == [(Setup(0x80 | kind, 6, 0x0102, 0x0304, 4), b""), (out, b"hello")]
    device.control = lambda setup, data: Answer.STALL
    assert device.read(Setup(0x80 | kind, 6, 0, 0, 4)) is None
    assert device.request(out, b"hello").status == Status.STALL


def test_a_control_stall_halts_nothing(device: Device) -> None:
    """The next request works."""
    assert device.read(Setup(0xC0, 1, 0, 0, 1)) is None
    assert device.read(Setup(0x80, 8, 0, 0, 1)) == b"\x01"


def test_a_control_request_may_take_its_time(device: Device) -> None:
    """NAK: asked again after notify; others wait behind it, in order."""
    answers: list[Any] = [Answer.NAK, b"late"]
    device.control = lambda setup, data: answers.pop(0)
    first = device.start(0x80, 4, kind=CONTROL, setup=(0xC0, 1, 0, 0))
    second = device.start(0x80, 1, kind=CONTROL, setup=(0x80, 8, 0, 0))
    device.handle_events(0)
    assert not is_done(first)
    assert not is_done(second)
    device.notify()
    device.handle_events(0)
    assert bytes(first.data) == b"late"
    assert bytes(second.data) == b"\x01"


# ================================================================ transfers


@pytest.mark.parametrize("answer", [b"", b"short", bytes(64), bytearray(b"any"), memoryview(b"buffer")])
def test_data_in(device: Device, answer: bytes) -> None:
    device.answers[IN] = answer
    transfer = device.start(IN, 64)
    assert not is_done(transfer), "completions come inside handle_events"
    device.handle_events(0)
    assert is_done(transfer)
    assert (transfer.status, bytes(transfer.data), transfer.actual_length) == (0, bytes(answer), len(answer))


def test_too_much_data_is_a_babble(device: Device) -> None:
    device.answers[IN] = bytes(range(65))
    transfer = device.start(IN, 64)
    device.handle_events(0)
    assert (transfer.status, bytes(transfer.data), transfer.actual_length) == (Status.BABBLE, bytes(range(64)), 64)


def test_data_out(device: Device) -> None:
    transfer = device.start(OUT, data=b"hello")
    device.handle_events(0)
    assert device.events == [(OUT, b"hello")]
    assert (is_done(transfer), transfer.status, transfer.actual_length) == (True, 0, 5)


def test_out_data_that_is_held_back(device: Device) -> None:
    """NAK: offered again; what is behind it waits."""
    device.accept = Answer.NAK
    transfers = [device.start(OUT, data=data) for data in (b"1", b"2")]
    device.handle_events(0)
    assert not any(map(is_done, transfers))
    device.accept = None
    device.notify()
    device.handle_events(0)
    assert all(map(is_done, transfers))
    assert device.events == [(OUT, b"1"), (OUT, b"1"), (OUT, b"2")]


def test_a_nak_waits(device: Device) -> None:
    """The hook is asked again when something changed, not before."""
    transfer = device.start(IN)
    device.handle_events(0)
    device.answers[IN] = b"now"
    device.handle_events(0)
    assert not is_done(transfer)
    device.notify()
    device.handle_events(0)
    assert is_done(transfer)


def test_progress_elsewhere_asks_again(device: Device) -> None:
    """A NAK may have become an answer after any other transfer."""
    waiting = device.start(IN)
    device.handle_events(0)

    def accept(endpoint: int, data: bytes | bytearray | memoryview) -> None:
        device.answers[IN] = b"follows"

    device.data_out = accept  # type: ignore[method-assign]
    device.start(OUT, data=b"x")
    for _ in range(3):
        device.handle_events(0)
    assert is_done(waiting)


def test_transfers_of_an_endpoint_complete_in_order(device: Device) -> None:
    device.answers[IN] = [bytes([number]) for number in range(5)]
    transfers = [device.start(IN) for _ in range(5)]
    device.handle_events(0)
    assert [bytes(transfer.data) for transfer in transfers] == [bytes([number]) for number in range(5)]


def test_an_endpoint_that_waits_holds_up_no_other(device: Device) -> None:
    device.answers[OTHER_IN] = b"data"
    waiting, other = device.start(IN), device.start(OTHER_IN)
    device.handle_events(0)
    assert (is_done(waiting), is_done(other)) == (False, True)


def test_a_device_that_always_has_data_does_not_keep_its_caller(device: Device) -> None:
    """Completions may submit; what they submit waits for the next call."""
    device.answers[IN] = b"data"
    count = 0

    def again(transfer: Transfer) -> None:
        nonlocal count
        count += 1
        if count < 10:
            device.submit(transfer)

    device.submit(Transfer(BULK, IN, 64, again))
    for expected in range(1, 11):
        device.handle_events(0)
        assert count == expected


def test_completions_are_never_nested(device: Device) -> None:
    """Not inside submit or cancel."""
    depth = 0

    def done(transfer: Transfer) -> None:
        nonlocal depth
        depth += 1
        assert depth == 1
        other = device.start(OUT, data=b"x")
        device.cancel(other)
        depth -= 1

    device.answers[IN] = b"data"
    device.submit(Transfer(BULK, IN, 64, done))
    device.handle_events(0)
    device.handle_events(0)


@pytest.mark.parametrize("endpoint", [0x01, 0x8F, ISO_IN])
def test_endpoints_that_do_not_exist(device: Device, endpoint: int) -> None:
    """Those of other alternate settings included."""
    assert device.submit(Transfer(BULK, endpoint, 5, lambda transfer: None)) == Status.IOERROR


# ---------------------------------------------------------------- halts


@pytest.mark.parametrize("endpoint", [IN, OUT])
def test_a_stall_halts_the_endpoint(device: Device, endpoint: int) -> None:
    """All its transfers stall, without asking the hook, until the halt is cleared."""
    device.answers[IN] = [Answer.STALL, b"data"]
    device.accept = Answer.STALL
    transfers = [device.start(endpoint, data=b"" if endpoint & 0x80 else b"x") for _ in range(2)]
    device.handle_events(0)
    assert [transfer.status for transfer in transfers] == [Status.STALL] * 2
    assert device.is_halted(endpoint)
    device.accept = None
    device.events.clear()
    assert device.clear_halt(endpoint) == Status.SUCCESS
    assert device.events == [("cleared", endpoint)]
    assert not device.is_halted(endpoint)
    transfer = device.start(endpoint, data=b"" if endpoint & 0x80 else b"x")
    device.handle_events(0)
    assert transfer.status == Status.SUCCESS


def test_clearing_what_is_not_there(device: Device) -> None:
    assert device.clear_halt(0x8F) == Status.IOERROR
    assert device.clear_halt(IN) == Status.SUCCESS, "clearing an endpoint that is not halted is allowed"


def test_clearing_a_halt_wakes_what_waits(device: Device) -> None:
    device.halt(IN)
    device.answers[IN] = b"data"
    device.clear_halt(IN)
    assert device.next_timeout() == 0.0


# ---------------------------------------------------------------- configurations


def test_configurations(device: Device) -> None:
    """Endpoints, alternate settings and halts go with the configuration."""
    device.set_alt_setting(1, 1)
    device.halt(IN)
    assert device.set_configuration(5) == Status.SUCCESS
    assert device.configuration_descriptor == SECOND
    assert device.read(Setup(0x80, 8, 0, 0, 1)) == b"\x05"
    assert device.submit(Transfer(BULK, IN, 5, lambda transfer: None)) == Status.IOERROR
    assert device.set_configuration(1) == Status.SUCCESS
    assert not device.is_halted(IN)
    assert device.read(Setup(0x81, 10, 0, 1, 1)) == b"\x00"
    assert device.events.count("began") == 2


def test_unconfigured(device: Device) -> None:
    assert device.set_configuration(0) == Status.SUCCESS
    assert device.configuration_descriptor is None
    assert device.read(Setup(0x80, 8, 0, 0, 1)) == b"\x00"
    assert device.read(get_descriptor(DescriptorType.CONFIGURATION)) == FIRST
    assert device.submit(Transfer(BULK, IN, 5, lambda transfer: None)) == Status.IOERROR


def test_a_configuration_that_does_not_exist(device: Device) -> None:
    assert device.set_configuration(77) == Status.IOERROR
    assert device.configuration_descriptor == FIRST
    assert not device.events


def test_alternate_settings(device: Device) -> None:
    """Its endpoints appear; halts of the interface's endpoints are cleared, those of others stay."""
    assert device.set_alt_setting(1, 1) == Status.SUCCESS
    assert device.read(Setup(0x81, 10, 0, 1, 1)) == b"\x01"
    device.halt(ISO_IN)
    device.halt(IN)
    assert device.set_alt_setting(1, 1) == Status.SUCCESS
    assert (device.is_halted(ISO_IN), device.is_halted(IN)) == (False, True)
    assert device.events == [("alternate", 1, 1)] * 2
    assert device.set_alt_setting(1, 0) == Status.SUCCESS
    assert device.submit(Transfer(ISO, ISO_IN, 5, lambda transfer: None, iso_lengths=[5])) == Status.IOERROR


@pytest.mark.parametrize(("interface", "alternate"), [(1, 2), (0, 1), (5, 0)])
def test_alternate_settings_that_do_not_exist(device: Device, interface: int, alternate: int) -> None:
    assert device.set_alt_setting(interface, alternate) == Status.IOERROR
    assert not device.events


def test_reset(device: Device) -> None:
    """Configuration and alternate settings stay, as libusb selects them again; everything else begins anew."""
    device.set_configuration(5)
    device.set_configuration(1)
    device.set_alt_setting(1, 1)
    device.halt(IN)
    device.events.clear()
    device.reset()
    assert device.events == ["began"]
    assert not device.is_halted(IN)
    assert device.read(Setup(0x80, 8, 0, 0, 1)) == b"\x01"
    assert device.read(Setup(0x81, 10, 0, 1, 1)) == b"\x01"


@pytest.mark.parametrize(
    ("options", "events"),
    [
        ({"give_back": True}, ["began"]),
        ({"give_back": False}, []),
        ({"give_back": True, "reset": False}, []),
    ],
)
def test_release(device: Device, options: dict[str, bool], events: list[str]) -> None:
    """Given back, the device starts anew, unless it is told not to."""
    device.release(**options)
    assert device.events == events


# ---------------------------------------------------------------- streams


class Streams(VirtualDevice):
    """Echoes on each stream by itself; nothing on stream 3."""

    speed = Speed.SUPER
    interfaces = (
        interface(0xFF, bulk_in(0x81, max_streams=16), bulk_out(0x01, max_streams=4), bulk_in(0x82)),
        interface(0xFF, bulk_in(0x83, max_streams=8)),
        interface(0xFF, bulk_in(0x83, max_streams=8), alternate=1),
        interface(0xFF, alternate=2),
    )

    def began(self) -> None:
        self.messages: dict[int, bytes] = {}

    def data_out(self, endpoint: int, data: bytes | bytearray | memoryview) -> None:
        self.messages[self.stream] = bytes(data)

    def data_in(self, endpoint: int, length: int) -> bytes | Answer:
        return self.messages.pop(self.stream, Answer.NAK)

    def start(self, endpoint: int, stream: int, data: bytes = b"") -> list[Transfer]:
        """Submit a transfer; the list of what completed."""
        done: list[Transfer] = []
        status = self.submit(Transfer(BULK, endpoint, len(data) or 64, done.append, data=data, stream_id=stream))
        assert status == Status.SUCCESS
        return done


@pytest.fixture
def streams() -> Iterator[Streams]:
    device = Streams()
    yield device
    device.close()


@pytest.mark.parametrize(
    ("endpoints", "count", "expected"),
    [
        ([0x81, 0x01], 4, (Status.SUCCESS, 4)),
        ([0x81, 0x01], 5, (Status.SUCCESS, 4)),
        ([0x81], 16, (Status.SUCCESS, 16)),
        ([0x81], 1, (Status.SUCCESS, 1)),
        ([0x81], 0, (Status.IOERROR, 0)),
        ([], 4, (Status.IOERROR, 0)),
        ([0x81, 0x82], 4, (Status.IOERROR, 0)),
        ([0x81, 0x8F], 4, (Status.IOERROR, 0)),
    ],
)
def test_allocating_streams(streams: Streams, endpoints: list[int], count: int, expected: tuple[int, int]) -> None:
    assert streams.alloc_streams(endpoints, count) == expected
    assert streams.free_streams(endpoints) == expected[0]
    assert streams.free_streams(endpoints) == Status.IOERROR


def test_streams_wait_for_themselves(streams: Streams) -> None:
    """Each has its own queue, and hooks know which one they are asked for."""
    streams.alloc_streams([0x81, 0x01], 4)
    first, second, third = (streams.start(0x81, stream) for stream in (1, 2, 3))
    streams.start(0x01, 2, b"two")
    streams.start(0x01, 1, b"one")
    for _ in range(3):
        streams.handle_events(0)
    assert [bytes(done[0].data) for done in (first, second)] == [b"one", b"two"]
    assert third == []


@pytest.mark.parametrize("stream", [0, 5])
def test_transfers_without_their_stream(streams: Streams, stream: int) -> None:
    """An endpoint that has streams takes nothing else, until they are freed."""
    streams.alloc_streams([0x81], 4)
    assert streams.submit(Transfer(BULK, 0x81, 8, print, stream_id=stream)) == Status.INVAL
    streams.free_streams([0x81])
    streams.start(0x81, stream)


def test_a_stream_that_nobody_allocated_is_not_looked_at(streams: Streams) -> None:
    """As on a real bus: the endpoint has one queue."""
    streams.alloc_streams([0x83], 4)
    for stream in (0, 3):
        done = streams.start(0x81, stream)
        streams.start(0x01, 7, b"data")
        for _ in range(3):
            streams.handle_events(0)
        assert bytes(done[0].data) == b"data"


def test_streams_of_the_past_leave_no_queue(streams: Streams) -> None:
    streams.alloc_streams([0x81, 0x01], 4)
    for stream in range(1, 5):
        done = streams.start(0x81, stream)
        streams.start(0x01, stream, b"data")
        for _ in range(3):
            streams.handle_events(0)
        assert bytes(done[0].data) == b"data"
    assert not streams._queues


@pytest.mark.parametrize("how", ["reset", "configuration", "alternate", "alternate without"])
def test_streams_end(streams: Streams, how: str) -> None:
    """With a reset, another configuration, another alternate setting; those of other interfaces stay."""
    assert streams.alloc_streams([0x81], 4) == (Status.SUCCESS, 4)
    assert streams.alloc_streams([0x83], 4) == (Status.SUCCESS, 4)
    ways: dict[str, Callable[[], object]] = {
        "reset": streams.reset,
        "configuration": lambda: streams.set_configuration(1),
        "alternate": lambda: streams.set_alt_setting(1, 1),
        "alternate without": lambda: streams.set_alt_setting(1, 2),
    }
    ways[how]()
    assert streams.free_streams([0x83]) == Status.IOERROR
    assert streams.free_streams([0x81]) == (Status.SUCCESS if "alternate" in how else Status.IOERROR)


def test_a_halt_is_that_of_all_streams(streams: Streams) -> None:
    streams.alloc_streams([0x81], 4)
    streams.halt(0x81)
    both = [streams.start(0x81, stream) for stream in (1, 2)]
    streams.handle_events(0)
    assert [done[0].status for done in both] == [Status.STALL] * 2


def test_devices_without_streams(device: Device) -> None:
    assert device.alloc_streams([IN], 4) == (Status.IOERROR, 0)
    assert device.free_streams([IN]) == Status.IOERROR


# ---------------------------------------------------------------- interrupt endpoints, and what a device sends


class Reports(VirtualDevice):
    """Sends; takes what it is given, if it may."""

    interfaces = (
        interface(0xFF, interrupt_in(0x81, 8, interval=4), interrupt_out(0x01, 8, interval=5), bulk_in(0x82)),
        interface(0xFF),
        interface(0xFF, bulk_in(0x83), alternate=1),
    )
    send_limit = 10

    def __init__(self) -> None:
        self.time = Clock()
        super().__init__(clock=self.time)

    def start(self, endpoint: int, length: int = 64, kind: TransferType = INTERRUPT, **options: Any) -> Transfer:
        done: list[Transfer] = []
        transfer = Transfer(kind, endpoint, length, done.append, data=bytes(length), context=done, **options)
        assert self.submit(transfer) == Status.SUCCESS
        return transfer

    def pass_time(self, seconds: float) -> None:
        self.time.now += seconds
        for _ in range(3):
            self.handle_events(0)


@pytest.fixture
def reports() -> Iterator[Reports]:
    device = Reports()
    yield device
    device.close()


PERIOD = 0.001
"""Seconds of bInterval 4 at high speed."""


def test_reports_come_once_per_interval(reports: Reports) -> None:
    """The first at once, the next ones in time."""
    for number in range(3):
        assert reports.send(0x81, bytes([number]))
    transfers = [reports.start(0x81) for _ in range(4)]
    reports.pass_time(0)
    for number, transfer in enumerate(transfers[:3]):
        assert is_done(transfer)
        assert bytes(transfer.data) == bytes([number])
        assert not is_done(transfers[number + 1])
        assert reports.next_timeout() == pytest.approx(PERIOD, rel=0.01)
        reports.pass_time(PERIOD * 0.9)
        assert not is_done(transfers[number + 1])
        reports.pass_time(PERIOD * 0.101)
    assert not is_done(transfers[3]), "there is nothing"
    assert reports.next_timeout() is None


def test_a_report_after_a_pause_comes_at_once(reports: Reports) -> None:
    for _ in range(3):
        transfer = reports.start(0x81)
        reports.pass_time(1.0)
        reports.send(0x81, b"news")
        reports.pass_time(0)
        assert is_done(transfer)


def test_the_rhythm_stays(reports: Reports) -> None:
    """Events that are handled a little late delay what follows by nothing, much too late ones give no burst."""
    for number in range(4):
        reports.send(0x81, bytes([number]))
    transfers = [reports.start(0x81) for _ in range(4)]
    reports.pass_time(0)
    reports.pass_time(PERIOD * 1.5)
    assert is_done(transfers[1])
    assert reports.next_timeout() == pytest.approx(PERIOD * 0.5)
    reports.pass_time(PERIOD * 100)
    assert (is_done(transfers[2]), is_done(transfers[3])) == (True, False)
    reports.pass_time(PERIOD * 1.01)
    assert is_done(transfers[3])


def test_several_packets_take_several_intervals(reports: Reports) -> None:
    """20 bytes are three packets of 8."""
    reports.send(0x81, bytes(20))
    reports.send(0x81, b"next")
    first, second = reports.start(0x81), reports.start(0x81)
    reports.pass_time(0)
    assert (is_done(first), first.actual_length) == (True, 20)
    assert reports.next_timeout() == pytest.approx(3 * PERIOD)
    reports.pass_time(3.01 * PERIOD)
    assert is_done(second)


def test_interrupts_out_have_their_interval(reports: Reports) -> None:
    """2 ms each; two packets take twice the time."""
    transfers = [reports.start(0x01, length) for length in (8, 9, 8)]
    reports.pass_time(0)
    assert [is_done(transfer) for transfer in transfers] == [True, False, False]
    reports.pass_time(2.01 * PERIOD)
    assert [is_done(transfer) for transfer in transfers] == [True, True, False]
    reports.pass_time(2.01 * PERIOD)
    assert not is_done(transfers[2])
    reports.pass_time(2.01 * PERIOD)
    assert is_done(transfers[2])


@pytest.mark.parametrize("how", ["cancel", "timeout"])
def test_an_interrupt_that_ends_early_leaves_nothing(reports: Reports, how: str) -> None:
    """No time to wait for; the next transfer takes its place."""
    reports.send(0x81, b"1")
    reports.send(0x81, b"2")
    reports.start(0x81)
    early = reports.start(0x81, timeout=PERIOD / 2 if how == "timeout" else 0.0)
    reports.pass_time(0)
    later = reports.start(0x81)
    if how == "cancel":
        reports.cancel(early)
    reports.pass_time(PERIOD / 2)
    assert is_done(early)
    assert reports.next_timeout() == pytest.approx(PERIOD / 2)
    reports.pass_time(PERIOD)
    assert (is_done(later), bytes(later.data)) == (True, b"2")
    assert reports.next_timeout() is None


def test_an_interval_that_the_device_ends(reports: Reports, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is waited for any more."""
    reports.send(0x81, b"1")
    reports.start(0x81)
    waiting = reports.start(0x81)
    reports.pass_time(0)
    assert reports.next_timeout() == pytest.approx(PERIOD)
    monkeypatch.setattr(reports, "packet_period", lambda endpoint: 0.0)
    reports.notify()
    reports.pass_time(0)
    assert reports.next_timeout() is None
    assert not is_done(waiting)


def test_a_reset_begins_intervals_anew(reports: Reports) -> None:
    reports.send(0x81, b"1")
    reports.start(0x81)
    reports.pass_time(0)
    reports.reset()
    reports.send(0x81, b"2")
    transfer = reports.start(0x81)
    reports.pass_time(0)
    assert is_done(transfer)


def test_what_is_sent_waits_for_transfers(reports: Reports) -> None:
    """A message ends a transfer; what does not fit goes into the next one; an empty one is one, too."""
    for message in (b"0123456789", b"", bytearray(b"ab")):
        reports.send(0x82, message)
    got = []
    for length in (4, 4, 4, 64, 64):
        transfer = reports.start(0x82, length, BULK)
        reports.pass_time(0)
        got.append(bytes(transfer.data))
    assert got == [b"0123", b"4567", b"89", b"", b"ab"]


def test_what_is_sent_is_a_copy(reports: Reports) -> None:
    message = bytearray(b"before")
    reports.send(0x82, message)
    message[:] = b"behind"
    transfer = reports.start(0x82, kind=BULK)
    reports.pass_time(0)
    assert bytes(transfer.data) == b"before"


def test_sending_has_a_limit(reports: Reports) -> None:
    """For each endpoint; there is room again when the host takes something."""
    assert [reports.send(0x82, b"x") for _ in range(11)] == [True] * 10 + [False]
    assert reports.send(0x81, b"x")
    reports.start(0x82, kind=BULK)
    reports.pass_time(0)
    assert reports.send(0x82, b"x")


def test_sending_to_nobody(reports: Reports) -> None:
    """An alternate setting that is not selected, no configuration, no device, no endpoint."""
    assert not reports.send(0x83, b"x")
    reports.set_alt_setting(1, 1)
    assert reports.send(0x83, b"x")
    reports.send(0x82, b"x")
    reports.set_configuration(0)
    assert not reports.send(0x82, b"x")
    reports.set_configuration(1)
    transfer = reports.start(0x82, kind=BULK)
    reports.pass_time(0)
    assert not is_done(transfer), "the start forgets what waited"
    for endpoint in (0x8F, 0x01):
        with pytest.raises(ValueError, match=f"no IN endpoint 0x{endpoint:02x}"):
            reports.send(endpoint, b"x")
    reports.unplug()
    assert not reports.send(0x82, b"x")


def test_sending_from_another_thread_wakes(reports: Reports) -> None:
    transfer = reports.start(0x82, kind=BULK)
    reports.pass_time(0)
    thread = threading.Thread(target=reports.send, args=(0x82, b"now"))
    thread.start()
    reports.handle_events(PATIENCE)
    thread.join(PATIENCE)
    assert is_done(transfer)
    assert bytes(transfer.data) == b"now"


# ---------------------------------------------------------------- isochronous


def test_iso_in(device: Device) -> None:
    """One hook call per packet; nothing there is an empty packet, too much a babble."""
    device.set_alt_setting(1, 1)
    device.answers[ISO_IN] = [b"12345678", Answer.NAK, b"123456789", Answer.STALL]
    transfer = device.start(ISO_IN, 32, kind=ISO, iso_lengths=[8, 8, 8, 8])
    device.handle_events(0)
    assert transfer.status == Status.SUCCESS
    assert [IsoResult(result.status, bytes(result.data)) for result in transfer.iso_results] == [
        (Status.SUCCESS, b"12345678"),
        (Status.SUCCESS, b""),
        (Status.BABBLE, b"12345678"),
        (Status.STALL, b""),
    ]


def test_iso_out(device: Device) -> None:
    device.set_alt_setting(1, 1)
    device.events.clear()
    transfer = device.start(ISO_OUT, data=b"aabbbc", kind=ISO, iso_lengths=[2, 3, 1])
    device.handle_events(0)
    assert device.events == [(ISO_OUT, b"aa"), (ISO_OUT, b"bbb"), (ISO_OUT, b"c")]
    assert [result.status for result in transfer.iso_results] == [0, 0, 0]


def paced(device: Device, *, period: float = 0.25) -> None:
    """Powers of two: sums are exact."""
    device.set_alt_setting(1, 1)
    device.period = period
    device.answers[ISO_IN] = b"x"


def advance(device: Device, seconds: float) -> None:
    device.clock.now += seconds
    for _ in range(3):
        device.handle_events(0)


def test_paced_transfers(device: Device) -> None:
    """Each completes as a whole when the time of its packets is over, one after the other; the hooks are asked then."""
    paced(device)
    first = device.start(ISO_IN, 4, kind=ISO, iso_lengths=[1] * 4)
    second = device.start(ISO_IN, 2, kind=ISO, iso_lengths=[1] * 2)
    device.answers[ISO_IN] = []
    advance(device, 0)
    assert device.next_timeout() == 1.0
    advance(device, 0.75)
    assert not is_done(first)
    device.answers[ISO_IN] = b"y"
    advance(device, 0.25)
    assert is_done(first)
    assert [result.data for result in first.iso_results] == [b"y"] * 4
    assert device.next_timeout() == 0.5
    assert not is_done(second)
    advance(device, 0.5)
    assert is_done(second)
    assert device.next_timeout() is None


def test_paced_transfers_catch_up(device: Device) -> None:
    """Late event handling costs no time of transfers that were there; one that comes late starts when it comes."""
    paced(device)
    early = [device.start(ISO_IN, 1, kind=ISO, iso_lengths=[1]) for _ in range(3)]
    advance(device, 0)
    advance(device, 10)
    assert all(map(is_done, early))
    late = device.start(ISO_IN, 1, kind=ISO, iso_lengths=[1])
    advance(device, 0)
    assert device.next_timeout() == 0.25
    advance(device, 0.25)
    assert is_done(late)


def test_endpoints_have_their_own_pace(device: Device) -> None:
    paced(device)
    incoming = device.start(ISO_IN, 1, kind=ISO, iso_lengths=[1])
    outgoing = device.start(ISO_OUT, data=b"abcd", kind=ISO, iso_lengths=[1] * 4)
    advance(device, 0)
    advance(device, 0.25)
    assert (is_done(incoming), is_done(outgoing)) == (True, False)
    advance(device, 0.75)
    assert is_done(outgoing)


def test_a_cancelled_paced_transfer_takes_no_time(device: Device) -> None:
    """However often a host starts and stops, what comes then is not late."""
    paced(device)
    for _ in range(100):
        transfers = [device.start(ISO_IN, 32, kind=ISO, iso_lengths=[1] * 32) for _ in range(4)]
        advance(device, 0)
        for transfer in transfers:
            device.cancel(transfer)
        advance(device, 0)
        assert [transfer.status for transfer in transfers] == [Status.CANCELLED] * 4
    assert device.next_timeout() is None
    last = device.start(ISO_IN, 1, kind=ISO, iso_lengths=[1])
    advance(device, 0)
    advance(device, 0.25)
    assert is_done(last)


def test_a_paced_transfer_can_time_out(device: Device) -> None:
    paced(device)
    transfer = device.start(ISO_IN, 8, kind=ISO, iso_lengths=[1] * 8, timeout=1.0)
    advance(device, 0)
    advance(device, 1.0)
    assert (is_done(transfer), transfer.status) == (True, Status.TIMEOUT)
    assert device.next_timeout() is None


# ================================================================ cancel, timeouts, timers


def test_cancel(device: Device) -> None:
    """Only that transfer ends, inside handle_events; cancelling twice or too late is harmless."""
    first, second = device.start(IN), device.start(IN)
    device.handle_events(0)
    device.cancel(first)
    assert not is_done(first)
    device.handle_events(0)
    assert (is_done(first), first.status, first.actual_length) == (True, Status.CANCELLED, 0)
    device.cancel(first)
    device.answers[IN] = b"data"
    device.notify()
    device.handle_events(0)
    assert (is_done(second), second.status) == (True, Status.SUCCESS)
    device.cancel(second)
    device.handle_events(0)
    assert second.status == Status.SUCCESS


def test_cancel_right_after_submit(device: Device) -> None:
    """Even when the device could have answered."""
    device.answers[IN] = b"data"
    transfer = device.start(IN)
    device.cancel(transfer)
    device.handle_events(0)
    assert is_done(transfer)


def test_a_cancelled_out_transfer_is_not_delivered_later(device: Device) -> None:
    device.accept = Answer.NAK
    transfer = device.start(OUT, data=b"x")
    device.handle_events(0)
    device.cancel(transfer)
    device.accept = None
    device.handle_events(0)
    assert transfer.status == Status.CANCELLED
    assert device.events == [(OUT, b"x")]


def test_timeouts(device: Device) -> None:
    """Counted from when the device took the transfer over."""
    transfer = device.start(IN, timeout=2.0)
    forever = device.start(OTHER_IN)
    device.handle_events(0)
    assert device.next_timeout() == pytest.approx(2.0)
    device.clock.now += 1.5
    device.handle_events(0)
    assert not is_done(transfer)
    assert device.next_timeout() == pytest.approx(0.5)
    device.clock.now += 0.5
    device.handle_events(0)
    assert (is_done(transfer), transfer.status, bytes(transfer.data)) == (True, Status.TIMEOUT, b"")
    assert not is_done(forever)
    assert device.next_timeout() is None


def test_what_waits_behind_a_timeout_is_asked_for(device: Device) -> None:
    first, second = device.start(OUT, data=b"1", timeout=1.0), device.start(OUT, data=b"2")
    device.accept = Answer.NAK
    device.handle_events(0)
    device.accept = None
    device.clock.now += 1.0
    device.handle_events(0)
    assert (first.status, second.status) == (Status.TIMEOUT, Status.SUCCESS)
    assert (is_done(first), is_done(second)) == (True, True)


def test_a_timeout_that_is_not_needed(device: Device) -> None:
    """A transfer that completed has none any more."""
    device.answers[IN] = b"data"
    transfer = device.start(IN, timeout=2.0)
    device.handle_events(0)
    assert is_done(transfer)
    assert device.next_timeout() is None
    device.clock.now += 5
    device.handle_events(0)
    assert transfer.status == Status.SUCCESS


def test_timers(device: Device) -> None:
    """In order of their times; hooks are asked again afterwards."""
    ran: list[str] = []
    transfer = device.start(IN)

    def answer() -> None:
        ran.append("second")
        device.answers[IN] = b"data"

    device.call_later(2.0, answer)
    device.call_later(1.0, lambda: ran.append("first"))
    device.handle_events(0)
    assert device.next_timeout() == pytest.approx(1.0)
    device.clock.now += 1.0
    device.handle_events(0)
    assert ran == ["first"]
    device.clock.now += 1.0
    device.handle_events(0)
    assert ran == ["first", "second"]
    assert is_done(transfer)
    assert device.next_timeout() is None


def test_a_timer_may_set_a_timer(device: Device) -> None:
    ticks: list[float] = []

    def tick() -> None:
        ticks.append(device.clock.now)
        device.call_later(1.0, tick)

    device.call_later(1.0, tick)
    for _ in range(3):
        device.clock.now += 1.0
        device.handle_events(0)
    assert ticks == [51.0, 52.0, 53.0]


def test_work_is_due_at_once(device: Device) -> None:
    """next_timeout is 0 with work, None with nothing to wait for."""
    assert device.next_timeout() is None
    device.start(IN)
    assert device.next_timeout() == 0.0
    device.handle_events(0)
    assert device.next_timeout() is None
    device.wake()
    assert device.next_timeout() == 0.0


# ================================================================ unplugging and the end


def test_unplug(device: Device) -> None:
    """Every transfer ends with loss of the device, as do later ones; methods say so."""
    running = device.start(IN)
    device.handle_events(0)
    queued = device.start(OTHER_IN)
    device.unplug()
    assert not is_done(running)
    device.handle_events(0)
    for transfer in (running, queued):
        assert (is_done(transfer), transfer.status, transfer.device_lost) == (True, Status.IOERROR, True)
    late = Transfer(BULK, IN, 5, lambda transfer: None)
    assert device.submit(late) == Status.IOERROR
    assert late.device_lost
    assert device.lost
    methods: list[Callable[[], object]] = [
        device.claim,
        device.reset,
        lambda: device.set_configuration(1),
        lambda: device.set_alt_setting(1, 1),
        lambda: device.clear_halt(IN),
    ]
    for method in methods:
        with pytest.raises(DeviceLostError):
            method()
    device.release(give_back=True)
    device.unplug()
    assert not device.events


def test_unplugging_from_inside_a_hook(device: Device) -> None:
    def control(setup: Setup, data: bytes) -> bytes:
        device.unplug()
        return b""

    device.control = control
    waiting = device.start(IN)
    device.request(Setup(0x40, 1, 0, 0, 0))
    device.handle_events(0)
    assert (is_done(waiting), waiting.device_lost) == (True, True)


def test_close(device: Device) -> None:
    """Ends what runs; idempotent; nothing can be submitted; descriptors are closed."""
    transfer = device.start(IN)
    ((descriptor, _),) = device.pollfds()
    device.close()
    assert is_done(transfer)
    assert transfer.status != Status.SUCCESS
    device.close()
    assert device.submit(Transfer(BULK, IN, 5, lambda transfer: None)) == Status.IOERROR
    assert not device.pollfds()
    with pytest.raises(OSError, match="descriptor"):
        os.fstat(descriptor)


def test_the_end_of_with_closes() -> None:
    with Small() as device:
        assert device.pollfds()
    assert not device.pollfds()


# ================================================================ polling and threads


def readable(device: Device) -> bool:
    """Whether one of the device's descriptors is ready."""
    return bool(poll(device.pollfds(), 0))


@pytest.mark.parametrize(
    "something",
    [
        lambda device: device.start(IN),
        lambda device: device.notify(),
        lambda device: device.wake(),
        lambda device: device.unplug(),
        lambda device: device.cancel(Transfer(BULK, IN, 5, lambda transfer: None)),
        lambda device: device.clear_halt(IN),
        lambda device: device.reset(),
    ],
)
def test_descriptors_are_ready_when_there_is_something_to_do(
    device: Device, something: Callable[[Device], object]
) -> None:
    """Whether they were asked for before or after; not ready once it is done."""
    for asked_before in (True, False):
        if asked_before:
            assert not readable(device)
        something(device)
        something(device)
        assert readable(device)
        for _ in range(3):
            device.handle_events(0)
        assert not readable(device)


def test_descriptors_stay_the_same(device: Device) -> None:
    assert device.pollfds() == device.pollfds()


def test_waiting_ends_with_work_from_another_thread(device: Device) -> None:
    """wake, submit, cancel: handle_events waits no longer."""
    for something in (device.wake, lambda: device.start(IN), device.notify):
        entered = threading.Event()

        def wait(entered: threading.Event = entered) -> None:
            entered.set()
            device.handle_events(PATIENCE)

        thread = threading.Thread(target=wait)
        thread.start()
        assert entered.wait(PATIENCE)
        something()
        thread.join(PATIENCE / 2)
        assert not thread.is_alive()


def test_waiting_without_a_time() -> None:
    """None waits until there is something; also for a timer."""
    device = Small()
    ran: list[int] = []
    device.call_later(0.001, lambda: ran.append(1))
    while not ran:
        device.handle_events(None)
    device.close()


def test_waiting_has_an_end(device: Device) -> None:
    device.handle_events(0.001)


def test_submitting_from_many_threads(device: Device) -> None:
    """Every transfer completes once."""
    device.answers[IN] = b"data"
    per_thread, threads = 200, 4
    done = 0

    def count(transfer: Transfer) -> None:
        nonlocal done
        done += 1  # completions run one at a time

    def submit() -> None:
        for _ in range(per_thread):
            assert device.submit(Transfer(BULK, IN, 64, count)) == Status.SUCCESS

    workers = [threading.Thread(target=submit) for _ in range(threads)]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers) or device.next_timeout() == 0:
        device.handle_events(0.01)
    for worker in workers:
        worker.join(PATIENCE)
    device.handle_events(0)
    assert done == per_thread * threads


def test_two_threads_that_handle_events(device: Device) -> None:
    """One does the work, completions are one at a time."""
    device.answers[IN] = b"data"
    inside = threading.Lock()
    done = 0
    total = 500

    def complete(transfer: Transfer) -> None:
        nonlocal done
        assert inside.acquire(blocking=False), "two completions at once"
        done += 1
        if done < total:
            device.submit(transfer)
        inside.release()

    def handle() -> None:
        while done < total:
            device.handle_events(0.01)

    device.submit(Transfer(BULK, IN, 64, complete))
    workers = [threading.Thread(target=handle) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(PATIENCE)
    assert done == total


# ---------------------------------------------------------------- completions that raise


class Breaks:
    """A completion that raises the first time."""

    def __init__(self) -> None:
        self.done: list[Transfer] = []

    def __call__(self, transfer: Transfer) -> None:
        self.done.append(transfer)
        if len(self.done) == 1:
            raise OSError("the connection is broken")


@pytest.mark.parametrize("how", ["completed", "cancelled", "unplugged"])
def test_a_completion_that_raises_loses_no_other(device: Device, how: str) -> None:
    """Each transfer completes exactly once; the device goes on at the next call."""
    breaks = Breaks()
    device.accept = None if how == "completed" else Answer.NAK
    transfers = [Transfer(BULK, OUT, 1, breaks, data=b"x") for _ in range(3)]
    for transfer in transfers:
        assert device.submit(transfer) == Status.SUCCESS
    if how != "completed":
        device.handle_events(0)
    for transfer in transfers if how == "cancelled" else []:
        device.cancel(transfer)
    if how == "unplugged":
        device.unplug()
    with pytest.raises(OSError, match="broken"):
        device.handle_events(0)
    assert device.next_timeout() == 0.0
    for _ in range(3):
        device.handle_events(0)
    assert breaks.done == transfers


def test_a_completion_may_handle_events(device: Device) -> None:
    """As a host does that gives its device up inside a completion."""
    done: list[Transfer] = []

    def completed(transfer: Transfer) -> None:
        done.append(transfer)
        device.handle_events(0)
        device.unplug()
        device.handle_events(0)

    transfers = [Transfer(BULK, OUT, 1, completed, data=b"x") for _ in range(3)]
    for transfer in transfers:
        device.submit(transfer)
    device.handle_events(0)
    assert sorted(map(id, done)) == sorted(map(id, transfers))
