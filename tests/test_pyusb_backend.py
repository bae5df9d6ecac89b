"""pyusb on remote devices: descriptors, every kind of transfer, errors with libusb's numbers, connections."""

from __future__ import annotations

import array
import contextlib
import errno
import itertools
import logging
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import usb.core
import usb.util
from hypothesis import given
from hypothesis import strategies as st

from usbredir import _exchange, _pyusb_device
from usbredir import guest as guest_module
from usbredir._pyusb_descriptors import read_configuration, read_device
from usbredir._pyusb_device import RemoteDevice
from usbredir.errors import ConnectionClosed, DeviceLostError, LocalProtocolError
from usbredir.guest import Guest, GuestCallbacks
from usbredir.host import Host
from usbredir.packets import (
    ConfigurationStatus,
    ControlPacket,
    DeviceConnect,
    DeviceDisconnect,
    EpInfo,
    GetConfiguration,
    InterruptPacket,
    InterruptReceivingStatus,
    IsoPacket,
    IsoStreamStatus,
    Packet,
    StartInterruptReceiving,
    StartIsoStream,
    StopInterruptReceiving,
    StopIsoStream,
)
from usbredir.parser import LogLevel, Parser
from usbredir.proto import Speed, Status, TransferType, endpoint_index
from usbredir.pyusb_backend import Backend, get_backend
from usbredir.testing import linked_pair
from usbredir.transport import HostConnection, connect, listen, poll
from usbredir.virtual import NAK, STALL, Answer, LoopbackDevice, VirtualDevice, bulk_in, interface, interrupt_in
from usbredir.virtual import interrupt_out as interrupt_out_endpoint
from usbredir.virtual.control import Payload, Setup

from .instruments import BenchmarkDevice
from .pyusb_bed import PATIENCE, exported
from .strategies import End

LONG = int(PATIENCE * 1000)
"""Milliseconds for what is there at once, on a busy machine."""
SHORT = 30
"""Milliseconds to wait for what does not come."""


class Bed:
    """A device, and what pyusb has of it, joined in memory."""

    def __init__(self, device: VirtualDevice | None) -> None:
        self.virtual = device
        self.host: Host
        self.guest: Guest
        self.host, self.guest = linked_pair(device)
        self.backend = get_backend(guest=self.guest)

    @property
    def device(self) -> Any:
        found = usb.core.find(backend=self.backend)
        assert found is not None
        return found

    def close(self) -> None:
        self.backend.close()
        self.host.close()
        if self.virtual is not None:
            self.virtual.close()


@pytest.fixture
def bed() -> Iterator[Bed]:
    made = Bed(LoopbackDevice(iso_period=0, interrupt_period=0))
    yield made
    made.close()


@contextlib.contextmanager
def joined(device: VirtualDevice | None) -> Iterator[Bed]:
    made = Bed(device)
    try:
        yield made
    finally:
        made.close()


def failure(call: Callable[..., object], *arguments: object) -> usb.core.USBError:
    with pytest.raises(usb.core.USBError) as raised:
        call(*arguments)
    return raised.value


# ================================================================ descriptors


def test_the_device(bed: Bed) -> None:
    device = bed.device
    assert (device.idVendor, device.idProduct, device.bcdDevice) == (0x1209, 0x0001, 0x1234)
    assert (device.bus, device.address, device.port_number, device.port_numbers) == (1, 1, 1, (1,))
    assert device.parent is None
    assert device.langids == (0x0409,)
    assert (device.manufacturer, device.product, device.serial_number) == ("usbredir", "Loopback", "LOOP0001")
    assert "CONFIGURATION 2" in str(device)


@pytest.mark.parametrize(
    ("speed", "number"),
    [(Speed.FULL, usb.util.SPEED_FULL), (Speed.HIGH, usb.util.SPEED_HIGH), (Speed.SUPER, usb.util.SPEED_SUPER)],
)
def test_speeds_have_pyusbs_numbers(speed: Speed, number: int) -> None:
    with joined(LoopbackDevice(speed=speed)) as bed:
        assert bed.device.speed == number


def test_configurations_interfaces_and_endpoints(bed: Bed) -> None:
    first, second = bed.device
    assert (first.bConfigurationValue, first.bNumInterfaces, second.bNumInterfaces) == (1, 2, 1)
    assert [(i.bInterfaceNumber, i.bAlternateSetting, i.bNumEndpoints) for i in first] == [
        (0, 0, 8),
        (1, 0, 0),
        (1, 1, 2),
        (1, 2, 2),
    ]
    assert [endpoint.bEndpointAddress for endpoint in first[(1, 2)]] == [0x04, 0x84]
    assert first[(1, 2)][0].wMaxPacketSize == 0x1400


def test_positions_that_do_not_exist(bed: Bed) -> None:
    """Loops over pyusb's objects end where there is nothing more."""
    remote = next(bed.backend.enumerate_devices())
    for where in [(2, 0, 0), (1, 3, 0)]:
        with pytest.raises(IndexError):
            bed.backend.get_interface_descriptor(remote, *where)
    with pytest.raises(IndexError):
        bed.backend.get_endpoint_descriptor(remote, 8, 0, 0, 0)
    error = failure(bed.backend.get_configuration_descriptor, remote, 2)
    assert (error.errno, error.backend_error_code) == (errno.ENOENT, -5)


def test_companions_are_extra_descriptors() -> None:
    with joined(LoopbackDevice(speed=Speed.SUPER)) as bed:
        endpoint = bed.device[0][(0, 0)][0]
        assert list(endpoint.extra_descriptors[:2]) == [6, 0x30]
        assert bed.device.bMaxPacketSize0 == 9


CONFIGURATION = bytes([9, 2, 60, 0, 5, 1, 0, 0x80, 50])
ASSOCIATION = bytes([8, 11, 0, 2, 2, 2, 1, 0])
INTERFACE = bytes([9, 4, 0, 0, 7, 1, 2, 3, 0])
ENDPOINT = bytes([7, 5, 0x81, 3, 8, 0, 10])
AUDIO_ENDPOINT = bytes([9, 5, 0x01, 1, 64, 0, 1, 6, 0x82])
SPECIFIC = bytes([4, 0x21, 1, 2])


def test_extra_descriptors_belong_to_what_they_follow() -> None:
    raw = CONFIGURATION + ASSOCIATION + INTERFACE + SPECIFIC + ENDPOINT + SPECIFIC + AUDIO_ENDPOINT
    configuration = read_configuration(raw)
    ((setting,),) = configuration.interfaces
    assert bytes(configuration.extra_descriptors) == ASSOCIATION
    assert bytes(setting.extra_descriptors) == SPECIFIC
    assert [bytes(endpoint.extra_descriptors) for endpoint in setting.endpoints] == [SPECIFIC, b""]
    assert [(e.bRefresh, e.bSynchAddress) for e in setting.endpoints] == [(0, 0), (6, 0x82)]


def test_counts_are_of_what_is_there() -> None:
    """The headers above announce five interfaces and seven endpoints."""
    configuration = read_configuration(CONFIGURATION + INTERFACE + ENDPOINT)
    assert configuration.bNumInterfaces == 1
    assert configuration.interfaces[0][0].bNumEndpoints == 1
    assert configuration.wTotalLength == 60


@pytest.mark.parametrize("raw", [b"", b"\x09", CONFIGURATION[:8], INTERFACE, b"\x00\x02" * 8])
def test_no_configuration(raw: bytes) -> None:
    with pytest.raises(ValueError, match="not a configuration"):
        read_configuration(raw)


@pytest.mark.parametrize("raw", [b"", bytes(18), b"\x12\x01" + bytes(15)])
def test_no_device_descriptor(raw: bytes) -> None:
    with pytest.raises(ValueError, match="not a device"):
        read_device(raw, bus=1, address=1, speed=0)


PIECES = st.lists(
    st.sampled_from([ASSOCIATION, INTERFACE, ENDPOINT, AUDIO_ENDPOINT, SPECIFIC]) | st.binary(max_size=12), max_size=12
)


@given(PIECES)
def test_any_bytes_are_read(pieces: list[bytes]) -> None:
    """Positions below the counts can be looked at, whatever the device sent."""
    configuration = read_configuration(CONFIGURATION + b"".join(pieces))
    assert configuration.bNumInterfaces == len(configuration.interfaces)
    for settings in configuration.interfaces:
        assert len({setting.bInterfaceNumber for setting in settings}) == 1
        assert all(setting.bNumEndpoints == len(setting.endpoints) for setting in settings)


class Senseless(LoopbackDevice):
    """Its device descriptor is none."""

    def standard_request(self, setup: Setup, data: bytes) -> Payload | Answer | None:
        return b"what?" if setup.value == 0x0100 else super().standard_request(setup, data)


def test_a_device_without_a_sensible_descriptor_is_not_there(caplog: pytest.LogCaptureFixture) -> None:
    with joined(Senseless()) as bed, caplog.at_level(logging.WARNING):
        assert usb.core.find(backend=bed.backend) is None
    assert "cannot be used" in caplog.text


# ================================================================ transfers


def test_control(bed: Bed) -> None:
    assert bed.device.ctrl_transfer(0xC0, 0x01, 5, 0, 4).tobytes() == b"\x05\x06\x07\x08"
    assert bed.device.ctrl_transfer(0x40, 0x02, 0, 0, b"kept") == 4
    assert bed.device.ctrl_transfer(0xC0, 0x03, 0, 0, 64).tobytes() == b"kept"
    buffer = array.array("B", bytes(8))
    assert bed.device.ctrl_transfer(0xC0, 0x03, 0, 0, buffer) == 4
    assert buffer.tobytes() == b"kept" + bytes(4)


def test_bulk(bed: Bed) -> None:
    device = bed.device
    for message in (b"", b"hello", bytes(range(256)) * 4097):
        assert device.write(0x01, message) == len(message)
        assert device.read(0x81, 2 << 20).tobytes() == message


def test_arrays_of_more_than_bytes(bed: Bed) -> None:
    """What is not filled stays as it was."""
    remote = next(bed.backend.enumerate_devices())
    numbers = array.array("H", [1, 2, 3])
    assert bed.backend.bulk_write(remote, 0x01, 0, numbers, LONG) == 6
    filled = array.array("H", [9] * 5)
    assert bed.backend.bulk_read(remote, 0x81, 0, filled, LONG) == 6
    assert filled.tolist() == [1, 2, 3, 9, 9]


def test_interrupts(bed: Bed) -> None:
    device = bed.device
    counters = [struct.unpack("<Q", device.read(0x83, 8))[0] for _ in range(20)]
    assert counters == list(range(20))
    assert device.write(0x03, b"abc") == 3


class Typist(VirtualDevice):
    """Sends a message in packets of 8 bytes, and keeps the packets that it gets."""

    interfaces = (interface(3, interrupt_in(0x81, 8), interrupt_out_endpoint(0x02, 8)), interface(3, alternate=1))

    def __init__(self) -> None:
        self.packets: deque[bytes] = deque()
        self.got: list[bytes] = []
        super().__init__()

    def packet_period(self, endpoint: int) -> float:
        return 0.0

    def types(self, message: bytes) -> None:
        self.packets.extend(message[i : i + 8] for i in range(0, len(message), 8))

    def data_in(self, endpoint: int, length: int) -> Payload | Answer:
        return self.packets.popleft() if self.packets else NAK

    def data_out(self, endpoint: int, data: Payload) -> None:
        self.got.append(bytes(data))


def test_interrupt_packets_are_joined() -> None:
    """Up to a short one, or the length asked for; the rest is for the next read."""
    typist = Typist()
    with joined(typist) as bed:
        device = bed.device
        typist.types(bytes(range(20)))
        typist.types(bytes(range(100, 124)))
        assert device.read(0x81, 64, LONG).tobytes() == bytes(range(20))
        assert device.read(0x81, 16, LONG).tobytes() == bytes(range(100, 116))
        assert device.read(0x81, 8, LONG).tobytes() == bytes(range(116, 124))
        assert failure(device.read, 0x81, 8, SHORT).errno == errno.ETIMEDOUT


def test_what_came_before_the_time_was_over_is_no_error() -> None:
    """As libusb: only full packets came, and then nothing."""
    typist = Typist()
    with joined(typist) as bed:
        typist.types(bytes(16))
        assert len(bed.device.read(0x81, 64, 500)) == 16


def test_an_interrupt_packet_without_room() -> None:
    typist = Typist()
    with joined(typist) as bed:
        typist.types(bytes(8))
        error = failure(bed.device.read, 0x81, 4, LONG)
        assert (error.errno, error.backend_error_code) == (errno.EOVERFLOW, -8)
        typist.types(b"again")
        assert bed.device.read(0x81, 8, LONG).tobytes() == b"again"


def test_long_interrupt_writes_are_packets() -> None:
    typist = Typist()
    with joined(typist) as bed:
        assert bed.device.write(0x02, bytes(20)) == 20
        assert list(map(len, typist.got)) == [8, 8, 4]


ENDERS: dict[str, Callable[[Any], object]] = {
    "release": lambda device: usb.util.release_interface(device, 0),
    "alternate setting": lambda device: device.set_interface_altsetting(0, 0),
    "configuration": lambda device: device.set_configuration(1),
    "configuration by request": lambda device: device.ctrl_transfer(0x00, 0x09, 1),
    "alternate setting by request": lambda device: device.ctrl_transfer(0x01, 0x0B, 0, 0),
    "reset": lambda device: device.reset(),
    "dispose": usb.util.dispose_resources,
}


@pytest.mark.parametrize("end", ENDERS.values(), ids=ENDERS)
def test_streams_end(end: Callable[[Any], object]) -> None:
    """The host polls no more, and what was polled before and not read is not taken for news."""
    typist = Typist()
    with joined(typist) as bed:
        device = bed.device
        typist.types(b"first---second--")
        assert device.read(0x81, 8, LONG).tobytes() == b"first---"
        end(device)
        with pytest.raises(LocalProtocolError, match="start"):
            bed.guest.receive(0x81, timeout=0)
        typist.packets.clear()
        typist.types(b"third---")
        assert device.read(0x81, 8, LONG).tobytes() == b"third---"


def test_streams_of_other_interfaces_go_on(bed: Bed) -> None:
    device = bed.device
    device.read(0x83, 8)
    device.set_interface_altsetting(1, 1)
    assert bed.guest.receive(0x83, timeout=PATIENCE).status == Status.SUCCESS


def test_a_stream_that_was_too_much(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    """So much came while nobody read that it was dropped: an error once, then the stream begins anew."""

    def dropped(*arguments: object, **options: object) -> None:
        raise LocalProtocolError("data was dropped")

    device = bed.device
    device.read(0x83, 8)
    with monkeypatch.context() as patch:
        patch.setattr(bed.guest, "receive", dropped)
        assert failure(device.read, 0x83, 8).errno == errno.EIO
    assert len(device.read(0x83, 8, LONG)) == 8


def test_isochronous_reading(bed: Bed) -> None:
    """As many packets as have room, one behind the other, and none is lost between two reads."""
    device = bed.device
    device.set_interface_altsetting(1, 1)
    data = device.read(0x84, 1023 * 3, LONG).tobytes() + device.read(0x84, 1023 * 2, LONG).tobytes()
    assert [struct.unpack_from("<Q", data, at)[0] for at in range(0, len(data), 1023)] == [0, 1, 2, 3, 4]


class Noisy(LoopbackDevice):
    """Isochronous packets are too long while *noise* says so, for one after the other."""

    noise: Iterator[bool] = iter(())

    def data_in(self, endpoint: int, length: int) -> Payload | Answer:
        return bytes(1024) if next(self.noise, False) else super().data_in(endpoint, length)


def test_isochronous_packets_that_fail() -> None:
    """They take the place of data, as with libusb; it is an error when there is nothing else."""
    noisy = Noisy(iso_period=0)
    with joined(noisy) as bed:
        device = bed.device
        device.set_interface_altsetting(1, 1)
        noisy.noise = itertools.cycle([True, False])
        assert len(device.read(0x84, 1023 * 4, LONG)) == 1023 * 2
        noisy.noise = itertools.repeat(True)
        error = failure(lambda: [device.read(0x84, 1023, LONG) for _ in itertools.count()])  # first what was read ahead
        assert (error.errno, error.backend_error_code) == (errno.EOVERFLOW, 6)
        noisy.noise = iter(())
        assert len(device.read(0x84, 1023, LONG)) == 1023


@pytest.mark.parametrize("packets", [1, 7, 40])
def test_isochronous_writing(bed: Bed, packets: int) -> None:
    """Every packet arrives, also the last ones of an amount that fills no transfer of the amount before."""
    device, counters = bed.device, bed.virtual.counters  # type: ignore[union-attr]
    device.set_interface_altsetting(1, 1)
    for _ in range(3):
        assert device.write(0x04, bytes(1023 * packets), LONG) == 1023 * packets
        device.ctrl_transfer(0xC0, 0x20, 0, 0, 64)  # the host has taken them
    assert device.write(0x04, bytes(100), LONG) == 100
    while counters["iso_packets"] < 3 * packets + 1:
        bed.guest.get_configuration()
    assert counters["iso_bytes"] == 3 * packets * 1023 + 100


def test_isochronous_silence() -> None:
    """Packets without data are none: the time is over. It has the number of libusb's transfers."""
    with joined(BenchmarkDevice()) as bed:
        device = bed.device
        device.set_interface_altsetting(0, 2)
        error = failure(device.read, 0x83, 64, SHORT)
        assert (error.errno, error.backend_error_code) == (errno.ETIMEDOUT, 2)
        assert device.write(0x03, bytes(range(64)), LONG) == 64
        assert device.read(0x83, 64, LONG).tobytes() == bytes(range(64))


def test_an_endpoint_that_is_not_there(bed: Bed) -> None:
    remote = next(bed.backend.enumerate_devices())
    buffer = array.array("B", bytes(8))
    assert failure(bed.backend.iso_read, remote, 0x84, 1, buffer, LONG).backend_error_code == 1
    assert failure(bed.backend.iso_write, remote, 0x04, 1, buffer, LONG).backend_error_code == 1
    assert failure(bed.backend.intr_read, remote, 0x8E, 0, buffer, LONG).errno == errno.EIO
    assert failure(bed.backend.intr_write, remote, 0x0E, 0, buffer, LONG).errno == errno.EIO
    assert failure(bed.backend.bulk_read, remote, 0x8E, 0, buffer, LONG).errno == errno.EIO


def test_times_that_poll_cannot_count(bed: Bed) -> None:
    """pyvisa's "for ever" is 2**32 - 1 ms."""
    assert bed.device.write(0x01, b"x", 2**32 - 1) == 1
    assert bed.device.read(0x81, 8, 0).tobytes() == b"x"


# ================================================================ several users of one device


USERS: dict[str, Callable[[Any], object]] = {
    "opened": lambda device: device.ctrl_transfer(0x80, 8, 0, 0, 1),
    "claimed": lambda device: usb.util.claim_interface(device, 0),
}


@pytest.mark.parametrize("use", USERS.values(), ids=USERS)
def test_streams_go_on_while_somebody_uses_them(use: Callable[[Any], object]) -> None:
    """Searching with custom_match makes objects that open the device and close it again."""
    typist = Typist()
    with joined(typist) as bed:
        device, other = bed.device, bed.device
        typist.types(b"first---second--third---")
        assert device.read(0x81, 8, LONG).tobytes() == b"first---"
        use(other)
        usb.util.dispose_resources(other)
        assert device.read(0x81, 8, LONG).tobytes() == b"second--"
        usb.util.dispose_resources(device)
        with pytest.raises(LocalProtocolError, match="start"):
            bed.guest.receive(0x81, timeout=0)


# ================================================================ hosts that are slow, or mean harm


class Clock:
    """Stands in for the module ``time``: passes only when somebody waits."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


class Script(GuestCallbacks):
    """A host in memory that answers as *answers* say.

    It sends what *idle* gives when somebody waits, and *flood* whenever somebody reads.

    A call that would wait for ever, or for 100 s, loses the connection.
    """

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.end = End()
        self.parser = Parser(self.end, usb_host=True)
        self.idle: Callable[[], Packet | None] = lambda: None
        self.flood: Iterator[Packet] = iter(())
        self.blocked = False
        self.asked: list[Packet] = []
        self.answers: dict[type[Packet], Callable[[Any], Packet | None]] = {
            GetConfiguration: lambda p: ConfigurationStatus(id=p.id, status=0, configuration=1),
            ControlPacket: lambda p: p.replace(data=DESCRIPTOR[: p.length]),
            StartIsoStream: lambda p: IsoStreamStatus(id=p.id, status=0, endpoint=p.endpoint),
            StopIsoStream: lambda p: IsoStreamStatus(id=p.id, status=0, endpoint=p.endpoint),
            StartInterruptReceiving: lambda p: InterruptReceivingStatus(id=p.id, status=0, endpoint=p.endpoint),
            StopInterruptReceiving: lambda p: InterruptReceivingStatus(id=p.id, status=0, endpoint=p.endpoint),
        }

    def log(self, level: LogLevel, message: str) -> None:
        pass

    def read(self, count: int) -> bytes | None:
        self.parser.do_write()
        if not self.end.output:
            self.send(next(self.flood, None))
            self.parser.do_write()
        piece = bytes(self.end.output[:count])
        del self.end.output[:count]
        return piece or (b"" if self.clock.now > 1100 else None)

    def write(self, data: memoryview) -> int:
        if self.blocked:
            return 0
        self.end.incoming += data
        return len(data)

    def wait(self, timeout: float | None, *, writing: bool) -> None:
        self.parser.do_read()
        news, self.end.received = self.end.received, []
        for packet in news:
            self.asked.append(packet)
            self.send(self.answers.get(type(packet), lambda p: None)(packet))
        if not (self.parser.has_data_to_write() or self.end.output):
            told = self.idle()
            self.send(told)
            self.clock.now += 200 if timeout is None and told is None else 0.001 if told else timeout or 0.001

    def send(self, packet: Packet | None) -> None:
        if packet is not None:
            self.parser.send(packet)

    def count(self, kind: type[Packet]) -> int:
        """Packets of this kind that came."""
        return sum(isinstance(packet, kind) for packet in self.asked)


DESCRIPTOR = bytes.fromhex("120100020000004009120200000100000001")
KINDS = {0x81: TransferType.INTERRUPT, 0x83: TransferType.ISO, 0x03: TransferType.ISO}


@contextlib.contextmanager
def scripted(*, interval: int = 1) -> Iterator[tuple[Script, Backend]]:
    """A host with a full-speed device with packets of 64 bytes; time is the host's."""
    with pytest.MonkeyPatch.context() as patch:
        clock = Clock()
        for module in (guest_module, _exchange, _pyusb_device):
            patch.setattr(module, "time", clock)
        script = Script(clock)
        kinds = [TransferType.INVALID] * 32
        for endpoint, kind in KINDS.items():
            kinds[endpoint_index(endpoint)] = kind
        with Guest(script) as guest:
            guest.process()
            script.parser.do_read()
            script.send(
                EpInfo(
                    type=tuple(kinds),
                    interval=(interval,) * 32,
                    interface=(0,) * 32,
                    max_packet_size=(64,) * 32,
                    max_streams=(0,) * 32,
                )
            )
            script.send(DeviceConnect(speed=Speed.FULL, vendor_id=0x1209))
            guest.wait_for_device()
            with get_backend(guest=guest) as backend:
                yield script, backend


def remote_of(backend: Backend) -> RemoteDevice:
    return next(backend.enumerate_devices())


FLOODS = {0x83: (IsoPacket(endpoint=0x83), 0), 0x81: (InterruptPacket(endpoint=0x81, data=bytes(64)), 64)}


@pytest.mark.parametrize(("packet", "length"), FLOODS.values(), ids=map(hex, FLOODS))
def test_a_time_is_over_whatever_the_host_sends(packet: IsoPacket | InterruptPacket, length: int) -> None:
    """Also when the next packet is always there."""
    with scripted() as (script, backend):
        remote = remote_of(backend)
        script.flood = iter([packet] * 100)
        room = memoryview(bytearray(1 << 16))
        read = remote.iso_in if packet.endpoint == 0x83 else remote.interrupt_in
        assert read(packet.endpoint, room, 1.0) == (Status.TIMEOUT, length)
        assert next(script.flood, None) is not None


def test_a_stream_to_the_device_that_ends_is_an_error_and_begins_anew() -> None:
    with scripted() as (script, backend):
        remote = remote_of(backend)
        assert remote.iso_out(0x03, bytes(128), 1.0) == (Status.SUCCESS, 128)
        news = iter([IsoStreamStatus(endpoint=0x03, status=Status.STALL)])
        script.idle = lambda: next(news, None)
        assert remote.iso_out(0x03, bytes(128), 1.0) == (Status.STALL, 0)
        assert remote.iso_out(0x03, bytes(128), 1.0) == (Status.SUCCESS, 128)
        assert script.count(StartIsoStream) == 2


def test_a_stream_that_ended_before_the_write() -> None:
    """The time counts for what follows from it as well: this host does not answer."""
    with scripted() as (script, backend):
        remote = remote_of(backend)
        remote.iso_out(0x03, bytes(64), 1.0)
        script.send(IsoStreamStatus(endpoint=0x03, status=Status.STALL))
        remote.check()
        del script.answers[StopIsoStream]
        begin = script.clock.now
        assert remote.iso_out(0x03, bytes(64), 0.0) == (Status.STALL, 0)
        assert script.clock.now - begin < 0.1
        assert remote.iso_out(0x03, bytes(64), 1.0) == (Status.SUCCESS, 64)
        begin = script.clock.now
        with pytest.raises(TimeoutError):  # another shape: the old stream is stopped first
            remote.iso_out(0x03, bytes(64 * 5), 1.0)
        assert script.clock.now - begin == pytest.approx(1.0, abs=0.1)


def test_a_failure_of_packets_to_the_device_is_not_told() -> None:
    with scripted() as (script, backend):
        remote = remote_of(backend)
        news = iter([IsoStreamStatus(endpoint=0x03, status=Status.IOERROR)])
        script.idle = lambda: next(news, None)
        for _ in range(2):
            assert remote.iso_out(0x03, bytes(128), 1.0) == (Status.SUCCESS, 128)
        assert script.count(StartIsoStream) == 1


def test_a_long_interval_does_not_outlast_the_time() -> None:
    """What was sent counts; the next write waits for its turn."""
    with scripted(interval=12) as (script, backend):
        remote, begin = remote_of(backend), script.clock.now
        assert remote.iso_out(0x03, bytes(64), 0.2) == (Status.TIMEOUT, 64)
        assert remote.iso_out(0x03, bytes(64), 0.2) == (Status.TIMEOUT, 0)
        assert script.clock.now - begin == pytest.approx(0.4, abs=0.1)
        assert remote.iso_out(0x03, bytes(64), None) == (Status.SUCCESS, 64)
        assert script.clock.now - begin == pytest.approx(2 * 1.024, abs=0.1)
        assert script.count(IsoPacket) == 2


def test_writes_keep_the_pace_of_the_bus() -> None:
    """On average, though every wait is late."""
    with scripted() as (script, backend):
        remote = remote_of(backend)
        remote.iso_out(0x03, bytes(64), 1.0)
        begin = script.clock.now
        for _ in range(100):
            remote.iso_out(0x03, bytes(64 * 10), 1.0)
            script.clock.now += 0.0015
        assert script.clock.now - begin == pytest.approx(1.0, abs=0.02)


def test_a_connection_that_takes_nothing_does_not_outlast_the_time() -> None:
    with scripted() as (script, backend):
        remote = remote_of(backend)
        remote.iso_out(0x03, bytes(64 * 200), 1.0)
        script.blocked, begin = True, script.clock.now
        status, length = remote.iso_out(0x03, bytes(64 * 200), 1.0)
        assert status == Status.TIMEOUT
        assert 0 < length < 64 * 200
        assert script.clock.now - begin == pytest.approx(1.0, abs=0.1)


def test_a_device_that_goes_during_a_write() -> None:
    with scripted(interval=16) as (script, backend):
        remote, begin = remote_of(backend), script.clock.now
        script.idle = DeviceDisconnect
        with pytest.raises(DeviceLostError):
            remote.iso_out(0x03, bytes(64), None)
        assert script.clock.now - begin < 0.1


def test_closing_ends_a_write(at_address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits for the bus meanwhile."""
    monkeypatch.setattr(_pyusb_device, "LONGEST_PERIOD", 10 * PATIENCE)
    monkeypatch.setattr(_pyusb_device, "MICROFRAME", 10 * PATIENCE)
    with get_backend(at_address) as backend:
        device = usb.core.find(backend=backend)
        device.set_interface_altsetting(1, 1)
        failures: list[usb.core.USBError] = []
        writer = threading.Thread(
            target=lambda: failures.append(failure(device.write, 0x04, bytes(64), 0)), daemon=True
        )
        writer.start()
        while not remote_of(backend)._sent_until:
            device.ctrl_transfer(0xC0, 0x01, 5, 0, 4)
        usb.util.dispose_resources(device)
        writer.join(PATIENCE)
        assert len(failures) == 1
        assert not remote_of(backend)._sent_until


def test_a_host_that_starts_no_stream() -> None:
    """Whoever closes the device does not wait for ever, though the read would."""
    with scripted() as (script, backend):
        remote, begin = remote_of(backend), script.clock.now
        del script.answers[StartInterruptReceiving], script.answers[StartIsoStream]
        for call in (remote.interrupt_in, remote.iso_in):
            with pytest.raises(TimeoutError):
                call(0x81 if call == remote.interrupt_in else 0x83, memoryview(bytearray(8)), None)
        assert script.clock.now - begin == pytest.approx(2 * _pyusb_device.REQUEST_TIMEOUT, abs=0.1)


def test_a_descriptor_that_comes_too_late() -> None:
    """The device is there when it answers, with the address that it would have had."""
    with scripted() as (script, backend):
        answer = script.answers.pop(ControlPacket)
        assert usb.core.find(backend=backend) is None
        script.answers[ControlPacket] = answer
        found = usb.core.find(backend=backend)
        assert (found.idProduct, found.address) == (0x0002, 1)
        assert usb.core.find(backend=backend).address == 1


# ================================================================ errors


class Silent(VirtualDevice):
    """Answers nothing but standard requests."""

    interfaces = (interface(0xFF, bulk_in(0x81)),)

    def control_request(self, setup: Setup, data: bytes) -> Answer:
        return NAK if setup.request == 1 else STALL


ERRORS: dict[str, tuple[Callable[[Any], object], int, int]] = {
    "stall": (lambda d: d.read(0x85, 64), errno.EPIPE, -9),
    "control stall": (lambda d: d.ctrl_transfer(0xC0, 0x77, 0, 0, 8), errno.EPIPE, -9),
    "time": (lambda d: d.read(0x86, 64, SHORT), errno.ETIMEDOUT, -7),
    "babble": (lambda d: (d.write(0x01, bytes(600)), d.read(0x81, 8)), errno.EOVERFLOW, -8),
    "no such setting": (lambda d: d.ctrl_transfer(0x01, 0x0B, 7, 1), errno.EIO, -1),
    "no such configuration": (lambda d: d.ctrl_transfer(0x00, 0x09, 7), errno.EIO, -1),
    "too long a request": (lambda d: d.ctrl_transfer(0x40, 0x02, 0, 0, bytes(1 << 16)), errno.EINVAL, -2),
}


@pytest.mark.parametrize(("call", "number", "code"), ERRORS.values(), ids=ERRORS)
def test_errors_have_libusbs_numbers(bed: Bed, call: Callable[[Any], object], number: int, code: int) -> None:
    error = failure(call, bed.device)
    assert (error.errno, error.backend_error_code) == (number, code)
    assert isinstance(error, usb.core.USBTimeoutError) is (number == errno.ETIMEDOUT)


def test_control_transfers_have_an_end() -> None:
    with joined(Silent()) as bed:
        assert isinstance(failure(bed.device.ctrl_transfer, 0xC0, 1, 0, 0, 8, SHORT), usb.core.USBTimeoutError)


def test_a_halt_is_cleared(bed: Bed) -> None:
    device = bed.device
    failure(device.read, 0x85, 64)
    device.clear_halt(0x85)
    assert len(device.read(0x85, 64)) == 64


def test_configurations_are_changed(bed: Bed) -> None:
    device = bed.device
    device.set_configuration(2)
    assert device.get_active_configuration().bConfigurationValue == 2
    assert usb.core.find(backend=bed.backend).get_active_configuration().bConfigurationValue == 2
    device.write(0x01, b"2")
    assert device.read(0x81, 8).tobytes() == b"2"


def test_reset(bed: Bed) -> None:
    device = bed.device
    device.write(0x01, b"forgotten")
    device.reset()
    assert failure(device.read, 0x81, 64, SHORT).errno == errno.ETIMEDOUT
    assert bed.virtual.counters["resets"] >= 1  # type: ignore[union-attr]


def test_no_kernel_driver_is_in_the_way(bed: Bed) -> None:
    device = bed.device
    assert device.is_kernel_driver_active(0) is False
    device.detach_kernel_driver(0)
    device.attach_kernel_driver(0)


def assert_gone(device: Any) -> None:
    for call in (
        lambda: device.read(0x81, 8),
        lambda: device.ctrl_transfer(0xC0, 0x01, 0, 0, 4),
        lambda: device.is_kernel_driver_active(0),
        lambda: device.clear_halt(0x81),
    ):
        error = failure(call)
        assert (error.errno, error.backend_error_code) == (errno.ENODEV, -4)
    usb.util.dispose_resources(device)


def test_a_device_that_is_unplugged(bed: Bed) -> None:
    device = bed.device
    device.read(0x83, 8)
    bed.virtual.unplug()  # type: ignore[union-attr]
    assert_gone(device)
    assert usb.core.find(backend=bed.backend) is None


def test_a_device_that_comes_again_is_another_one(bed: Bed) -> None:
    before = bed.device
    before.write(0x01, b"x")
    bed.host.set_device(None)
    assert usb.core.find(backend=bed.backend) is None
    successor = LoopbackDevice(serial="LOOP0002")
    bed.host.set_device(successor)
    after = bed.device
    assert (before.address, after.address, after.serial_number) == (1, 2, "LOOP0002")
    assert_gone(before)
    after.write(0x01, b"y")
    successor.close()


# ================================================================ connections


@pytest.fixture
def at_address() -> Iterator[str]:
    with exported(LoopbackDevice()) as address:
        yield address


def test_an_address(at_address: str) -> None:
    """Connected once; with all objects of pyusb."""
    with get_backend(at_address) as backend:
        first, second = usb.core.find(backend=backend), usb.core.find(backend=get_backend(at_address))
        first.write(0x01, b"over TCP")
        assert second.read(0x81, 64).tobytes() == b"over TCP"
        assert get_backend(at_address) is backend
    assert usb.core.find(backend=backend) is None
    assert failure(first.write, 0x01, b"closed").errno == errno.ENODEV
    with get_backend(at_address) as another:
        assert another is not backend
        assert usb.core.find(backend=another) is not None


def test_a_unix_socket(tmp_path: Path) -> None:
    with exported(LoopbackDevice(), f"unix:{tmp_path}/s") as address, get_backend(address) as backend:
        assert usb.core.find(backend=backend).product == "Loopback"


def test_several_hosts(at_address: str, bed: Bed) -> None:
    """Each is a bus; guests come after addresses."""
    with exported(BenchmarkDevice()) as second, get_backend(at_address, second, guest=bed.guest) as backend:
        found = list(usb.core.find(find_all=True, backend=backend))
        assert [(d.bus, d.address, d.idProduct) for d in found] == [(1, 1, 0x0001), (2, 1, 0xFA2E), (3, 1, 0x0001)]
        assert usb.core.find(backend=backend, idVendor=0x04D8).product == "Benchmark Device"
    bed.device.write(0x01, b"its guest is still open")


def test_connections_that_are_not_needed_are_closed(at_address: str) -> None:
    """The back end is there already; the same address twice; an address is none; nobody is at the first one."""
    with listen("127.0.0.1:0") as listener:
        other = str(listener.address)
        with get_backend(at_address) as backend:
            spare = connect(other)
            assert get_backend(at_address, connections={at_address: spare}) is backend
            assert spare.fileno() < 0
        for addresses in [(), (other, "nonsense"), ("unix:/nonexistent/socket", other), ("unix:/nonexistent/socket",)]:
            spare = connect(other)
            with pytest.raises((ValueError, usb.core.USBError)):
                get_backend(*addresses, connections={other: spare})
            assert spare.fileno() < 0


def test_an_address_that_does_not_answer_keeps_nobody_from_others(at_address: str) -> None:
    """Neither from connecting nor from closing."""
    with listen("127.0.0.1:0") as listener:
        silent = str(listener.address)
        waiting = threading.Thread(target=lambda: failure(lambda: get_backend(silent, patience=PATIENCE)))
        waiting.start()
        connection = listener.accept(PATIENCE)
        opener = threading.Thread(target=lambda: get_backend(at_address).close(), daemon=True)
        opener.start()
        opener.join(PATIENCE / 4)
        done = not opener.is_alive()
    assert connection is not None
    connection.close()
    waiting.join(PATIENCE)
    assert done


def test_nobody_answers() -> None:
    with listen("127.0.0.1:0") as listener:
        address = str(listener.address)
    error = failure(get_backend, address)
    assert error.errno == errno.ECONNREFUSED
    assert address in str(error)


def test_one_of_several_does_not_answer(at_address: str) -> None:
    """The connection to the other is closed again."""
    failure(get_backend, at_address, "unix:/nonexistent/socket")
    with get_backend(at_address) as backend:
        assert usb.core.find(backend=backend) is not None


def test_another_guest_has_the_device(at_address: str) -> None:
    with get_backend(at_address):
        error = failure(lambda: get_backend(at_address.replace("127.0.0.1", "localhost"), patience=1.0))
    assert error.errno == errno.EBUSY


@pytest.mark.parametrize("addresses", [(), ("no port",), ("127.0.0.1:4000", "unix:")])
def test_what_is_no_address(addresses: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"address|unix"):
        get_backend(*addresses)


def test_a_host_without_a_device() -> None:
    """It may get one later."""
    with joined(None) as bed:
        assert usb.core.find(backend=bed.backend) is None
        bed.virtual = LoopbackDevice()
        bed.host.set_device(bed.virtual)
        assert bed.device.address == 1


def test_a_host_that_has_no_device_for_long(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def wait(guest: Guest, timeout: float) -> None:
        while not guest.host_version:
            poll([], 0.001)
            guest.process()
        raise TimeoutError

    monkeypatch.setattr(Guest, "wait_for_device", wait)
    with exported_nothing() as address, caplog.at_level(logging.WARNING):
        with get_backend(address) as backend:
            assert usb.core.find(backend=backend) is None
        assert "no device yet" in caplog.text


@contextlib.contextmanager
def exported_nothing() -> Iterator[str]:
    """The address of a host that says hello, and no more."""
    with listen("127.0.0.1:0") as listener:

        def greet() -> None:
            connection = listener.accept(PATIENCE)
            assert connection is not None
            with connection, Host(HostConnection(connection)) as host, contextlib.suppress(ConnectionClosed):
                while True:
                    host.write_guest_data()
                    connection.wait(PATIENCE, writing=False)
                    host.read_guest_data()

        thread = threading.Thread(target=greet)
        thread.start()
        yield str(listener.address)
        thread.join(PATIENCE)


@pytest.mark.parametrize(
    ("greeting", "patience", "number"),
    [(b"", 0.1, errno.ETIMEDOUT), (b"220 mail.example ESMTP\r\n" * 8, PATIENCE, None)],
    ids=["silence", "another protocol"],
)
def test_something_else_answers(greeting: bytes, patience: float, number: int | None) -> None:
    with listen("127.0.0.1:0") as listener:

        def greet() -> None:
            connection = listener.accept(PATIENCE)
            assert connection is not None
            connection.write(memoryview(greeting))
            while connection.at_end() is False:
                connection.read(1 << 16)
                poll([(connection.fileno(), 1)], PATIENCE)
            connection.close()

        thread = threading.Thread(target=greet)
        thread.start()
        error = failure(lambda: get_backend(str(listener.address), patience=patience))
        thread.join(PATIENCE)
    assert error.errno == number


def test_a_connection_that_breaks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The device is gone; when somebody exports it again it is found again, as a new one."""
    address = f"unix:{tmp_path}/s"
    with exported(LoopbackDevice(), address):
        backend = get_backend(address)
        device = usb.core.find(backend=backend)
        device.write(0x01, b"x")
    with backend:
        assert_gone(device)
        with caplog.at_level(logging.WARNING):
            assert usb.core.find(backend=backend) is None
        assert "no connection" in caplog.text
        with exported(LoopbackDevice(), address):
            again = usb.core.find(backend=backend)
            assert again.address == 2
            again.write(0x01, b"y")
            assert again.read(0x81, 8).tobytes() == b"y"


def test_the_guest_of_somebody_who_closes_it(bed: Bed) -> None:
    device = bed.device
    bed.guest.close()
    assert_gone(device)
    assert usb.core.find(backend=bed.backend) is None


def test_several_threads(at_address: str) -> None:
    """One waits for what another one sends."""
    with get_backend(at_address) as backend:
        device = usb.core.find(backend=backend)
        device.write(0x01, b"")
        device.read(0x81, 8)  # claimed
        read: list[bytes] = []
        reader = threading.Thread(target=lambda: read.append(device.read(0x81, 64, LONG).tobytes()))
        reader.start()
        assert len(device.read(0x83, 8, LONG)) == 8
        device.write(0x01, b"from the other thread", LONG)
        reader.join(PATIENCE)
    assert read == [b"from the other thread"]
