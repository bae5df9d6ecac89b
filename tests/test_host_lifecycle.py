"""usbredir.host: taking, announcing, changing, resetting and losing a device; filters; errors.

HOST_BEHAVIOUR 2, 3, 8, 9, 10 and 11.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, cast

import pytest

import usbredir.device
import usbredir.host
from usbredir._redirection import Redirection
from usbredir.descriptors import Configuration, Interface
from usbredir.device import UsbDevice
from usbredir.errors import (
    ConnectionClosed,
    DeviceClaimError,
    DeviceError,
    DeviceLostError,
    DeviceRejectedError,
    RemoteProtocolError,
)
from usbredir.filter import FilterResult, FilterRule
from usbredir.host import DO_NOT_RESET, Host, HostCallbacks, check_device_filter
from usbredir.packets import (
    AltSettingStatus,
    BulkPacket,
    BulkReceivingStatus,
    CancelDataPacket,
    ConfigurationStatus,
    ControlPacket,
    DeviceConnect,
    DeviceDisconnect,
    EpInfo,
    FilterFilter,
    FilterReject,
    GetAltSetting,
    GetConfiguration,
    Hello,
    InterfaceInfo,
    InterruptPacket,
    InterruptReceivingStatus,
    Packet,
    Reset,
    SetAltSetting,
    SetConfiguration,
    StartBulkReceiving,
    StartInterruptReceiving,
    StopInterruptReceiving,
)
from usbredir.parser import VERSION, LogLevel
from usbredir.proto import Capability, Speed, Status, endpoint_index
from usbredir.virtual.loopback import LoopbackDevice

from .host_bed import (
    ALTERNATE_INTERRUPT_IN,
    BULK_IN,
    BULK_OUT,
    INTERRUPT_IN,
    ISO_IN,
    ISO_OUT,
    MISSING_IN,
    Bed,
    FakeDevice,
    RecordingLocks,
)

ANNOUNCEMENT = [InterfaceInfo, EpInfo, DeviceConnect]


@pytest.fixture
def device() -> FakeDevice:
    return FakeDevice()


@pytest.fixture
def bed(device: FakeDevice) -> Bed:
    """A guest that has *device*."""
    return Bed(device)


def kinds(packets: list[Packet]) -> list[type[Packet]]:
    return [type(packet) for packet in packets]


def bulk_in(id: int = 1, length: int = 512) -> BulkPacket:
    return BulkPacket(id=id, endpoint=BULK_IN, length=length)


def lose(bed: Bed, device: FakeDevice) -> None:
    """The device is unplugged while a transfer is under way."""
    bed.ask(bulk_in(99))
    device.complete(lost=True)
    assert bed.news() == [DeviceDisconnect(), BulkPacket(id=99, endpoint=BULK_IN, status=Status.IOERROR)]


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that does not give its transfers back is given up at once."""
    monkeypatch.setattr(usbredir.host, "DRAIN_LIMIT", -1.0)


# ---------------------------------------------------------------- announcing


def test_announcement(device: FakeDevice) -> None:
    """hello first; then, with the guest's hello, interfaces, endpoints, device."""
    bed = Bed(device, hello=False)
    assert kinds(bed.news()) == [Hello]
    assert bed.host.state.name == "PENDING"
    bed.greet()
    interfaces, endpoints, connect = bed.received[1:]
    assert isinstance(interfaces, InterfaceInfo)
    assert (interfaces.interface_count, interfaces.interface[:3]) == (2, (0, 7, 0))
    assert isinstance(endpoints, EpInfo)
    assert (endpoints.type[1], endpoints.type[17], endpoints.type[15]) == (2, 2, 255)
    assert connect == DeviceConnect(
        speed=Speed.HIGH,
        device_class=0,
        device_subclass=0xDD,
        device_protocol=0xEE,
        vendor_id=0x1234,
        product_id=0x5678,
        device_version_bcd=0x0102,
    )
    assert bed.host.state is Redirection.CONNECTED
    assert bed.host.device is device


def test_hello() -> None:
    """All eight capabilities, and the version text."""
    (hello,) = Bed(None, hello=False).received
    assert hello == Hello(version=VERSION, capabilities=frozenset(Capability))
    written = bytearray()

    class Application(HostCallbacks):
        def write(self, data: memoryview) -> int:
            written.extend(data)
            return len(data)

    with Host(Application(), version="my host 1") as host:
        host.write_guest_data()
    assert written[12:22] == b"my host 1\0"


def test_without_a_device() -> None:
    """A device may be set later, and is announced at once then."""
    bed = Bed(None)
    assert kinds(bed.received) == [Hello]
    assert bed.host.device is None
    bed.host.set_device(FakeDevice())
    assert kinds(bed.news()) == ANNOUNCEMENT


def test_only_the_last_device_before_hello_is_announced() -> None:
    first, second = FakeDevice(product=1), FakeDevice(product=2)
    bed = Bed(first, hello=False)
    bed.host.set_device(second)
    assert first.done("release") == [("release", True)]
    bed.greet()
    assert kinds(bed.received) == [Hello, *ANNOUNCEMENT]
    assert cast(DeviceConnect, bed.received[-1]).product_id == 2


def test_a_device_that_went_before_hello_is_never_mentioned(device: FakeDevice) -> None:
    bed = Bed(device, hello=False)
    bed.host.set_device(None)
    bed.greet()
    assert kinds(bed.received) == [Hello]


def test_a_second_hello_is_ignored(bed: Bed) -> None:
    bed.say_bytes(struct.pack("<IIQ", 0, 68, 0) + bytes(68))
    assert bed.run() == []
    assert bed.logged(LogLevel.ERROR, "second hello")


@pytest.mark.parametrize("speed", [*Speed, cast(Speed, 4)])
def test_speed(speed: Speed) -> None:
    """Faster than super is unknown to a guest."""
    connect = Bed(FakeDevice(speed=speed)).received[-1]
    assert cast(DeviceConnect, connect).speed == (255 if speed == 4 else speed)


def test_unconfigured_device() -> None:
    """No interfaces, only endpoint 0; the configuration is 0."""
    bed = Bed(FakeDevice(active=0))
    interfaces, endpoints, _ = bed.received[-3:]
    assert interfaces == InterfaceInfo()
    assert cast(EpInfo, endpoints).type == tuple(0 if index in (0, 16) else 255 for index in range(32))
    assert bed.ask(GetConfiguration(id=4)) == [ConfigurationStatus(id=4, configuration=0)]
    assert bed.ask(ControlPacket(id=5, endpoint=0x80, length=2)) == []


def test_a_guest_without_capabilities(device: FakeDevice) -> None:
    """Fields that it does not know are left out."""
    bed = Bed(device, capabilities=())
    _, endpoints, connect = bed.received[-3:]
    assert (cast(EpInfo, endpoints).max_packet_size, cast(EpInfo, endpoints).max_streams) == (None, None)
    assert cast(DeviceConnect, connect).device_version_bcd is None


# ---------------------------------------------------------------- taking


def test_taking_and_releasing(device: FakeDevice) -> None:
    """Claim, reset, announce; at the end release with the drivers back, and tell the guest. It is never closed."""
    bed = Bed(device)
    bed.host.close()
    calls = [type(step) if isinstance(step, Packet) else step for step in device.calls]
    assert calls == [
        ("claim",),
        ("reset",),
        Hello,
        *ANNOUNCEMENT,
        ("release", True),
        DeviceDisconnect,
    ]


def test_close_is_idempotent(device: FakeDevice) -> None:
    locks = RecordingLocks()
    bed = Bed(device, locks=locks)
    for _ in range(3):
        bed.host.close()
    assert device.done("release") == [("release", True)]
    assert locks.allocated
    assert sorted(map(id, locks.freed)) == sorted(map(id, locks.allocated))
    assert bed.host.device is None


def test_context_manager(device: FakeDevice) -> None:
    with Host(HostCallbacks(), device) as host:
        assert host.device is device
    assert device.done("release") == [("release", True)]


FAILURES: dict[str, tuple[Callable[[FakeDevice], None], type[DeviceError], list[tuple[Any, ...]]]] = {
    "in use": (
        lambda device: device.script.update(claim=DeviceClaimError("busy")),
        DeviceClaimError,
        [("claim",)],
    ),
    "gone": (
        lambda device: device.script.update(claim=DeviceLostError("gone")),
        DeviceLostError,
        [("claim",)],
    ),
    "lost in the reset": (
        lambda device: device.script.update(reset=DeviceLostError("re-enumerated")),
        DeviceLostError,
        [("claim",), ("reset",), ("release", True)],
    ),
    "no device descriptor": (
        lambda device: setattr(device, "device_descriptor", b"\x12"),
        DeviceError,
        [("claim",), ("release", True)],
    ),
    "no configuration": (
        lambda device: setattr(device, "raw_configuration", b"\x09\x05"),
        DeviceError,
        [("claim",), ("release", True)],
    ),
    "33 interfaces": (
        lambda device: device.configurations.update(
            {1: Configuration(1, interfaces=tuple(Interface(n, 0, 1) for n in range(33)))}
        ),
        DeviceError,
        [("claim",), ("release", True)],
    ),
}


@pytest.mark.parametrize(("spoil", "error", "calls"), FAILURES.values(), ids=FAILURES)
def test_a_device_that_cannot_be_taken(
    device: FakeDevice,
    spoil: Callable[[FakeDevice], None],
    error: type[DeviceError],
    calls: list[tuple[Any, ...]],
) -> None:
    """The error comes out, what was claimed is released, nothing is announced, and the host can take another one."""
    spoil(device)
    bed = Bed(None)
    with pytest.raises(error):
        bed.host.set_device(device)
    assert device.calls == calls
    assert bed.news() == []
    assert (bed.host.device, bed.host.state) == (None, Redirection.IDLE)
    assert bed.ask(bulk_in()) == [BulkPacket(id=1, endpoint=BULK_IN, status=Status.IOERROR)]
    bed.host.set_device(FakeDevice())
    assert kinds(bed.news()) == ANNOUNCEMENT


@pytest.mark.parametrize(("spoil", "error", "calls"), FAILURES.values(), ids=FAILURES)
def test_opening_with_a_device_that_cannot_be_taken(
    device: FakeDevice,
    spoil: Callable[[FakeDevice], None],
    error: type[DeviceError],
    calls: list[tuple[Any, ...]],
) -> None:
    """The whole open fails, and gives its locks back."""
    spoil(device)
    locks = RecordingLocks()
    with pytest.raises(error):
        Host(HostCallbacks(), device, locks=locks)
    assert device.calls == calls
    assert len(locks.freed) == len(locks.allocated) > 0


def test_failure_while_another_device_is_connected(device: FakeDevice) -> None:
    """The former device is dropped first, and stays dropped."""
    bed = Bed(device)
    busy = FakeDevice()
    busy.script["claim"] = DeviceClaimError("busy")
    with pytest.raises(DeviceClaimError):
        bed.host.set_device(busy)
    assert bed.news() == [DeviceDisconnect()]
    assert device.done("release") == [("release", True)]


def test_what_is_no_device() -> None:
    with pytest.raises(TypeError, match="neither a UsbDevice nor"):
        Host(HostCallbacks(), cast(UsbDevice, object()))


# ---------------------------------------------------------------- the list of devices that are not reset


@pytest.fixture(params=sorted(DO_NOT_RESET), ids="{0[0]:04x}:{0[1]:04x}".format)
def fragile(request: pytest.FixtureRequest) -> FakeDevice:
    """Each device that does not survive a reset."""
    return FakeDevice(vendor=request.param[0], product=request.param[1])


def test_the_list() -> None:
    assert {(0x1210, 0x001C), (0x2798, 0x0001)} == DO_NOT_RESET


def test_fragile_devices_are_not_reset(fragile: FakeDevice) -> None:
    """Neither when taken nor for the guest; but a guest's reset ends what is under way all the same."""
    bed = Bed(fragile)
    bed.ask(bulk_in(1), StartInterruptReceiving(endpoint=INTERRUPT_IN))
    bed.news()
    assert bed.ask(Reset()) == [
        InterruptReceivingStatus(endpoint=INTERRUPT_IN, status=Status.STALL),
        BulkPacket(id=1, endpoint=BULK_IN, status=Status.CANCELLED),
    ]
    assert fragile.in_flight == []
    assert not fragile.done("reset")
    assert bed.host.state is Redirection.CONNECTED


def test_a_guests_first_reset_is_not_skipped_for_fragile_devices(fragile: FakeDevice) -> None:
    """They were not reset before: it has its effect on transfers, though there are none yet."""
    bed = Bed(fragile)
    assert bed.ask(Reset(), Reset()) == []
    assert not fragile.done("reset")


def test_fragile_devices_are_not_reset_when_released(monkeypatch: pytest.MonkeyPatch) -> None:
    """HOST_BEHAVIOUR 2, Release, 4: reset unless listed."""
    device = LoopbackDevice()
    monkeypatch.setattr(usbredir.device, "DO_NOT_RESET", {(0x1209, 0x0001)})
    Bed(device).host.close()
    assert device.counters["resets"] == 0


# ---------------------------------------------------------------- replacing


@pytest.mark.parametrize("acknowledges", [True, False])
def test_replacing_a_connected_device(device: FakeDevice, acknowledges: bool) -> None:
    """The next one is announced when the guest has confirmed, or at once when it cannot."""
    bed = Bed(device, acknowledges=acknowledges)
    bed.host.set_device(FakeDevice(product=0x1111))
    assert device.calls[-2:] != [("release", True), ("close",)]
    if acknowledges:
        assert bed.news() == [DeviceDisconnect()]
        assert bed.host.state is Redirection.AWAITING_ACK_PENDING
        assert bed.ask(GetConfiguration(id=3)) == [ConfigurationStatus(id=3, status=Status.IOERROR, configuration=1)], (
            "not announced yet"
        )
        news = bed.acknowledge()
    else:
        disconnect, *news = bed.news()
        assert disconnect == DeviceDisconnect()
    assert kinds(news) == ANNOUNCEMENT
    assert cast(DeviceConnect, news[-1]).product_id == 0x1111


def test_replacing_twice_before_the_guest_confirms(bed: Bed) -> None:
    bed.host.set_device(FakeDevice(product=1))
    bed.host.set_device(FakeDevice(product=2))
    assert bed.news() == [DeviceDisconnect()]
    news = bed.acknowledge()
    assert kinds(news) == ANNOUNCEMENT
    assert cast(DeviceConnect, news[-1]).product_id == 2


def test_dropping_before_the_guest_confirms(bed: Bed) -> None:
    """A forgotten device is not announced; after the confirmation a new one is, at once."""
    bed.host.set_device(FakeDevice())
    bed.host.set_device(None)
    assert bed.news() == [DeviceDisconnect()]
    assert bed.acknowledge() == []
    bed.host.set_device(FakeDevice())
    assert kinds(bed.news()) == ANNOUNCEMENT


def test_replacing_a_lost_device(bed: Bed, device: FakeDevice) -> None:
    """Lost, confirmed, replaced: the guest hears of one disconnection."""
    lose(bed, device)
    assert bed.acknowledge() == []
    bed.host.set_device(FakeDevice())
    assert kinds(bed.news()) == ANNOUNCEMENT
    assert device.done("release") == [("release", True)]


def test_dropping_cancels_quietly(bed: Bed, device: FakeDevice) -> None:
    """Nobody is answered; the device is released when it has given everything back, then the guest is told."""
    bed.ask(bulk_in(1), bulk_in(2), StartInterruptReceiving(endpoint=INTERRUPT_IN), CancelDataPacket(id=2))
    bed.news()
    mark = len(device.calls)
    bed.host.set_device(None)
    assert bed.news() == [DeviceDisconnect()]
    assert device.in_flight == []
    *before, release, disconnect = device.calls[mark:]
    assert {name for name, _ in before} == {"cancel", "completed"}
    assert (release, disconnect) == (("release", True), DeviceDisconnect())


def test_requests_to_a_former_device_cannot_be_cancelled(device: FakeDevice) -> None:
    """They are forgotten with it."""
    bed = Bed(device, acknowledges=False)
    bed.ask(bulk_in(1))
    bed.host.set_device(FakeDevice())
    bed.news()
    assert bed.ask(CancelDataPacket(id=1)) == []


@pytest.mark.usefixtures("impatient")
def test_dropping_a_device_that_gives_nothing_back(bed: Bed, device: FakeDevice) -> None:
    """It is released all the same; what it completes later disturbs nobody."""
    bed.ask(bulk_in(1), StartInterruptReceiving(endpoint=INTERRUPT_IN))
    bed.news()
    device.stuck = True
    bed.host.set_device(None)
    assert bed.news() == [DeviceDisconnect()]
    assert bed.logged(LogLevel.ERROR, "does not give its transfers back")
    assert device.done("release") == [("release", True)]
    while device.in_flight:
        device.complete(data=b"late")
    assert bed.news() == []


def test_what_a_former_device_keeps_does_not_hurt_the_next(device: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next device's reset waits for its own transfers only."""
    monkeypatch.setattr(usbredir.host, "DRAIN_LIMIT", -1.0)
    bed = Bed(device, acknowledges=False)
    bed.ask(bulk_in(1))
    device.stuck = True
    new = FakeDevice()
    bed.host.set_device(new)
    bed.ask(SetAltSetting(id=1, interface=7, alt=0), Reset())
    assert bed.host.state is Redirection.CONNECTED
    assert len(new.done("reset")) == 2


@pytest.mark.usefixtures("impatient")
def test_a_late_loss_of_a_former_device_is_no_loss_of_the_next(device: FakeDevice) -> None:
    bed = Bed(device, acknowledges=False)
    bed.ask(bulk_in(1))
    device.stuck = True
    bed.host.set_device(FakeDevice())
    device.complete(lost=True)
    assert bed.host.state is Redirection.CONNECTED


def test_a_device_that_is_gone_when_released(bed: Bed, device: FakeDevice) -> None:
    """Every method of a device may say that it is lost: the host lets go of it all the same."""
    device.script["release"] = DeviceLostError("gone")
    bed.host.set_device(None)
    assert bed.host.device is None
    assert bed.news() == [DeviceDisconnect()]


# ---------------------------------------------------------------- losing


def test_loss_is_told_once(bed: Bed, device: FakeDevice) -> None:
    """Every further completion says the same; only the replies are sent."""
    bed.ask(bulk_in(1), bulk_in(2))
    device.complete(lost=True)
    device.complete(lost=True)
    assert kinds(bed.news()) == [DeviceDisconnect, BulkPacket, BulkPacket]


def test_the_application_is_not_told_of_a_loss(bed: Bed, device: FakeDevice) -> None:
    """The host goes on and answers ioerror until the application drops the device; nothing is released or closed."""
    lose(bed, device)
    assert bed.run() == []
    bed.acknowledge()
    assert bed.host.device is device
    assert not device.done("release", "close")
    assert bed.ask(GetConfiguration(id=1), GetAltSetting(id=2, interface=0)) == [
        ConfigurationStatus(id=1, status=Status.IOERROR, configuration=1),
        AltSettingStatus(id=2, status=Status.IOERROR, interface=0, alt=255),
    ]
    assert bed.ask(Reset()) == []
    assert len(device.done("reset")) == 1


def test_dropping_a_lost_device(bed: Bed, device: FakeDevice) -> None:
    """The guest knows already."""
    lose(bed, device)
    bed.host.set_device(None)
    assert bed.news() == []
    assert device.done("release") == [("release", True)]


# ---------------------------------------------------------------- reset


def test_the_first_reset_is_skipped(bed: Bed, device: FakeDevice) -> None:
    """The host has just reset the device."""
    assert bed.ask(Reset(), Reset()) == []
    assert len(device.done("reset")) == 1


CLEARS_THE_MARK: dict[str, list[Packet]] = {
    "a control transfer": [ControlPacket(endpoint=0x80, length=2)],
    "a bulk transfer": [bulk_in()],
    "an interrupt transfer": [InterruptPacket(endpoint=0x02, data=b"x")],
    "receiving": [StartInterruptReceiving(endpoint=INTERRUPT_IN)],
    "bulk receiving": [StartBulkReceiving(endpoint=BULK_IN, bytes_per_transfer=512, no_transfers=1)],
    "another configuration": [SetConfiguration(configuration=2)],
    "an alternate setting": [SetAltSetting(interface=7, alt=2)],
}
KEEPS_THE_MARK: dict[str, list[Packet]] = {
    "questions": [GetConfiguration(), GetAltSetting(interface=0)],
    "the same configuration": [SetConfiguration(configuration=1)],
    "an unknown interface": [SetAltSetting(interface=3, alt=0)],
    "a refused transfer": [BulkPacket(endpoint=MISSING_IN, length=1)],
    "a refused stream": [StartBulkReceiving(endpoint=BULK_IN, bytes_per_transfer=1, no_transfers=1)],
    "stopping nothing": [StopInterruptReceiving(endpoint=INTERRUPT_IN)],
    "cancelling nothing": [CancelDataPacket(id=3)],
    "a filter": [FilterFilter()],
}


@pytest.mark.parametrize("packets", CLEARS_THE_MARK.values(), ids=CLEARS_THE_MARK)
def test_a_reset_after_use(bed: Bed, device: FakeDevice, packets: list[Packet]) -> None:
    """The device is reset once, and is fresh again."""
    bed.ask(*packets)
    bed.ask(Reset(), Reset())
    assert len(device.done("reset")) == 2
    assert device.in_flight == []
    bed.ask(*packets, Reset())
    assert len(device.done("reset")) == (2 if packets == [SetConfiguration(configuration=2)] else 3)


@pytest.mark.parametrize("packets", KEEPS_THE_MARK.values(), ids=KEEPS_THE_MARK)
def test_a_reset_without_use(bed: Bed, device: FakeDevice, packets: list[Packet]) -> None:
    bed.ask(*packets, Reset())
    assert len(device.done("reset")) == 1


def test_reset_without_a_device() -> None:
    assert Bed(None).ask(Reset()) == []


def test_reset_in_order(bed: Bed, device: FakeDevice) -> None:
    """Streams get stall at once, then everything comes back and is answered, then the device is reset."""
    bed.ask(
        bulk_in(1),
        StartInterruptReceiving(id=2, endpoint=INTERRUPT_IN),
        StartBulkReceiving(id=3, endpoint=0x83, bytes_per_transfer=512, no_transfers=2),
    )
    bed.news()
    mark = len(device.calls)
    assert bed.ask(Reset()) == [
        InterruptReceivingStatus(endpoint=INTERRUPT_IN, status=Status.STALL),
        BulkReceivingStatus(endpoint=0x83, status=Status.STALL),
        BulkPacket(id=1, endpoint=BULK_IN, status=Status.CANCELLED),
    ]
    steps = [step for step in device.calls[mark:] if not (isinstance(step, tuple) and step[0] == "cancel")]
    assert [type(step) for step in steps[:2]] == [InterruptReceivingStatus, BulkReceivingStatus]
    assert steps[-1] == ("reset",)
    assert sum(step[0] == "completed" for step in steps if isinstance(step, tuple)) == 8
    assert device.in_flight == []


def test_cancelled_requests_stay_answered_once_in_a_reset(bed: Bed, device: FakeDevice) -> None:
    bed.ask(bulk_in(1), CancelDataPacket(id=1))
    bed.news()
    assert bed.ask(Reset()) == []


def test_alternate_settings_survive_a_reset(bed: Bed) -> None:
    """The cached ones; libusb selects them again."""
    bed.ask(SetAltSetting(id=1, interface=7, alt=2), Reset())
    bed.news()
    assert bed.ask(GetAltSetting(id=2, interface=7)) == [AltSettingStatus(id=2, interface=7, alt=2)]


def test_a_reset_that_fails(bed: Bed, device: FakeDevice) -> None:
    """device_disconnect; packets of the same pass are handled; the next read attempt tells the application, once."""
    device.script["reset"] = DeviceLostError("re-enumerated")
    bed.say(bulk_in(1), Reset(), GetConfiguration(id=2))
    with pytest.raises(DeviceLostError, match="reset"):
        bed.run()
    assert bed.news() == [
        BulkPacket(id=1, endpoint=BULK_IN, status=Status.CANCELLED),
        DeviceDisconnect(),
        ConfigurationStatus(id=2, status=Status.IOERROR, configuration=0),  # the host has let go of the device
    ]
    assert bed.run() == []
    bed.acknowledge()
    bed.host.set_device(FakeDevice())
    assert kinds(bed.news()) == ANNOUNCEMENT


@pytest.mark.usefixtures("impatient")
def test_a_reset_under_transfers_that_do_not_end(bed: Bed, device: FakeDevice) -> None:
    """The device counts as lost; it is not reset under them."""
    device.stuck = True
    bed.say(bulk_in(1), Reset())
    with pytest.raises(DeviceLostError):
        bed.run()
    assert bed.news() == [DeviceDisconnect()]
    assert len(device.done("reset")) == 1


# ---------------------------------------------------------------- configurations


def test_the_active_configuration_again(bed: Bed, device: FakeDevice) -> None:
    """Success; the device is not touched, nothing is cancelled."""
    bed.ask(bulk_in(1), StartInterruptReceiving(endpoint=INTERRUPT_IN))
    bed.news()
    mark = len(device.calls)
    assert bed.ask(SetConfiguration(id=5, configuration=1)) == [ConfigurationStatus(id=5, configuration=1)]
    assert device.calls[mark:] == [ConfigurationStatus(id=5, configuration=1)]
    assert device.cancelled == []


def test_another_configuration(bed: Bed, device: FakeDevice) -> None:
    """Cancel, release without drivers, set, claim, tell the new layout, answer; nobody waits for the transfers."""
    bed.ask(bulk_in(1))
    mark = len(device.calls)
    bed.ask(SetConfiguration(id=5, configuration=2))
    steps = [type(step) if isinstance(step, Packet) else step for step in device.calls[mark:]]
    assert steps == [
        ("cancel", BULK_IN),
        ("release", False),
        ("set_configuration", 2),
        ("claim",),
        InterfaceInfo,
        EpInfo,
        ConfigurationStatus,
    ]
    interfaces, endpoints, status = bed.received[-3:]
    assert (cast(InterfaceInfo, interfaces).interface_count, cast(InterfaceInfo, interfaces).interface[0]) == (1, 3)
    assert cast(EpInfo, endpoints).type[endpoint_index(BULK_IN)] == 255
    assert status == ConfigurationStatus(id=5, configuration=2)
    device.handle_events()
    assert bed.news() == [BulkPacket(id=1, endpoint=BULK_IN, status=Status.CANCELLED)]
    assert bed.ask(bulk_in(2)) == [BulkPacket(id=2, endpoint=BULK_IN, status=Status.INVAL)]
    assert bed.ask(GetAltSetting(id=3, interface=7)) == [
        AltSettingStatus(id=3, status=Status.INVAL, interface=7, alt=255)
    ]
    assert bed.ask(GetConfiguration(id=4)) == [ConfigurationStatus(id=4, configuration=2)]


def test_unconfiguring(bed: Bed, device: FakeDevice) -> None:
    """0 is passed on as 0."""
    *_, status = bed.ask(SetConfiguration(id=5, configuration=0))
    assert device.done("set_configuration") == [("set_configuration", 0)]
    assert status == ConfigurationStatus(id=5, configuration=0)
    assert kinds(bed.received[-3:]) == [InterfaceInfo, EpInfo, ConfigurationStatus]
    assert bed.ask(SetConfiguration(id=6, configuration=0)) == [ConfigurationStatus(id=6, configuration=0)]


def test_a_configuration_that_fails(bed: Bed, device: FakeDevice) -> None:
    """ioerror with the present one; the interfaces are claimed again and told again, the device stays."""
    device.script["set_configuration"] = Status.IOERROR
    assert kinds(bed.ask(SetConfiguration(id=5, configuration=9))) == [InterfaceInfo, EpInfo, ConfigurationStatus]
    assert bed.received[-1] == ConfigurationStatus(id=5, status=Status.IOERROR, configuration=1)
    assert device.done("release", "claim")[-2:] == [("release", False), ("claim",)]
    assert bed.ask(bulk_in(1)) == []
    assert len(device.in_flight) == 1


LOST_IN_CONFIGURATION: dict[str, Callable[[FakeDevice], None]] = {
    "cannot be claimed": lambda device: device.script.update(claim=DeviceClaimError("busy")),
    "gone in claim": lambda device: device.script.update(claim=DeviceLostError("gone")),
    "gone in release": lambda device: device.script.update(release=DeviceLostError("gone")),
    "gone in the request": lambda device: device.script.update(set_configuration=DeviceLostError("gone")),
    "descriptors": lambda device: setattr(device, "raw_configuration", b"\x09\x07"),
}


@pytest.mark.parametrize("spoil", LOST_IN_CONFIGURATION.values(), ids=LOST_IN_CONFIGURATION)
def test_a_configuration_that_loses_the_device(
    bed: Bed, device: FakeDevice, spoil: Callable[[FakeDevice], None]
) -> None:
    """device_disconnect, ioerror; packets of the same pass are handled; the next read attempt raises, once."""
    spoil(device)
    bed.say(SetConfiguration(id=5, configuration=2), bulk_in(6))
    with pytest.raises(DeviceLostError, match="configuration"):
        bed.run()
    assert bed.news() == [
        DeviceDisconnect(),
        ConfigurationStatus(id=5, status=Status.IOERROR, configuration=0),
        BulkPacket(id=6, endpoint=BULK_IN, status=Status.IOERROR),
    ]
    assert bed.run() == []
    device.script.clear()
    bed.host.close()
    assert device.done("release")[-1] == ("release", True)


def test_configuration_without_a_device(bed: Bed, device: FakeDevice) -> None:
    """ioerror with the cached value, 0 if there is none."""
    assert Bed(None).ask(SetConfiguration(id=1, configuration=1), GetConfiguration(id=2)) == [
        ConfigurationStatus(id=1, status=Status.IOERROR, configuration=0),
        ConfigurationStatus(id=2, status=Status.IOERROR, configuration=0),
    ]
    lose(bed, device)
    assert bed.ask(SetConfiguration(id=1, configuration=2), GetConfiguration(id=2)) == [
        ConfigurationStatus(id=1, status=Status.IOERROR, configuration=1),
        ConfigurationStatus(id=2, status=Status.IOERROR, configuration=1),
    ]
    assert not device.done("set_configuration")


# ---------------------------------------------------------------- alternate settings


def test_get_alt_setting(bed: Bed) -> None:
    """0 is assumed at first; interfaces go by number, not by position."""
    assert bed.ask(*(GetAltSetting(id=n, interface=n) for n in (0, 1, 7, 255))) == [
        AltSettingStatus(id=0, interface=0, alt=0),
        AltSettingStatus(id=1, status=Status.INVAL, interface=1, alt=255),
        AltSettingStatus(id=7, interface=7, alt=0),
        AltSettingStatus(id=255, status=Status.INVAL, interface=255, alt=255),
    ]


def test_set_alt_setting(bed: Bed, device: FakeDevice) -> None:
    """By number. The layout is told before the status; endpoints that are no more become invalid."""
    interfaces, endpoints, status = bed.ask(SetAltSetting(id=3, interface=7, alt=2))
    assert device.done("set_alt_setting") == [("set_alt_setting", 7, 2)]
    assert isinstance(interfaces, InterfaceInfo)
    assert interfaces.interface_class[:2] == (0xFF, 0x0E)
    assert isinstance(endpoints, EpInfo)
    assert endpoints.max_packet_size is not None
    assert (endpoints.type[endpoint_index(ISO_IN)], endpoints.max_packet_size[endpoint_index(ISO_OUT)]) == (1, 3072)
    assert status == AltSettingStatus(id=3, interface=7, alt=2)
    _, endpoints, status = bed.ask(SetAltSetting(id=4, interface=7, alt=5))
    assert isinstance(endpoints, EpInfo)
    assert (endpoints.type[endpoint_index(ISO_IN)], endpoints.type[endpoint_index(ALTERNATE_INTERRUPT_IN)]) == (255, 3)
    assert bed.ask(GetAltSetting(id=5, interface=7)) == [AltSettingStatus(id=5, interface=7, alt=5)]
    assert bed.ask(GetAltSetting(id=6, interface=0)) == [AltSettingStatus(id=6, interface=0, alt=0)]


def test_the_same_alternate_setting_is_set_again(bed: Bed, device: FakeDevice) -> None:
    """Unlike a configuration: drivers do this to clear an interface."""
    assert kinds(bed.ask(SetAltSetting(interface=7, alt=0))) == [InterfaceInfo, EpInfo, AltSettingStatus]
    assert device.done("set_alt_setting") == [("set_alt_setting", 7, 0)]


def test_set_alt_setting_cancels_its_own_transfers(bed: Bed, device: FakeDevice) -> None:
    """Those on the interface's present endpoints; they answer cancelled when they complete."""
    bed.ask(bulk_in(1), ControlPacket(id=2, endpoint=0x80, length=1))
    bed.ask(SetAltSetting(interface=7, alt=2))
    assert device.cancelled == []
    bed.ask(SetAltSetting(interface=0, alt=0))
    assert [transfer.endpoint for transfer in device.cancelled] == [BULK_IN]
    bed.news()
    device.handle_events()
    assert bed.news() == [BulkPacket(id=1, endpoint=BULK_IN, status=Status.CANCELLED)]


@pytest.mark.parametrize("status", [Status.IOERROR, Status.INVAL, Status.TIMEOUT])
def test_an_alternate_setting_that_fails(bed: Bed, device: FakeDevice, status: Status) -> None:
    """The mapped status with the old one; what ran is cancelled all the same."""
    bed.ask(SetAltSetting(interface=7, alt=5), StartInterruptReceiving(endpoint=ALTERNATE_INTERRUPT_IN))
    bed.news()
    device.script["set_alt_setting"] = status
    assert bed.ask(SetAltSetting(id=8, interface=7, alt=2)) == [
        AltSettingStatus(id=8, status=status, interface=7, alt=5)
    ]
    assert device.cancelled == device.in_flight
    assert len(device.cancelled) == 5


def test_an_alternate_setting_of_an_unknown_interface(bed: Bed, device: FakeDevice) -> None:
    assert bed.ask(SetAltSetting(id=8, interface=1, alt=0)) == [
        AltSettingStatus(id=8, status=Status.INVAL, interface=1, alt=255)
    ]
    assert bed.logged(LogLevel.ERROR, "interface 1")
    assert not device.done("set_alt_setting")


def test_an_alternate_setting_that_loses_the_device(bed: Bed, device: FakeDevice) -> None:
    device.script["set_alt_setting"] = DeviceLostError("gone")
    assert bed.ask(SetAltSetting(id=8, interface=7, alt=2)) == [
        DeviceDisconnect(),
        AltSettingStatus(id=8, status=Status.IOERROR, interface=7, alt=0),
    ]
    assert bed.ask(SetAltSetting(id=9, interface=7, alt=2)) == [
        AltSettingStatus(id=9, status=Status.IOERROR, interface=7, alt=255)
    ]


# ---------------------------------------------------------------- filters

RULES = [FilterRule(3, -1, -1, -1, False), FilterRule(-1, -1, -1, -1, True)]


def test_the_guests_filter(bed: Bed) -> None:
    """Stored, never applied; one that does not parse is logged and the older one stays."""
    assert bed.host.guest_filter is None
    assert bed.ask(FilterFilter(rules=tuple(RULES))) == []
    assert bed.host.guest_filter == RULES
    text = b"0x03,-1,nonsense\0"
    bed.say_bytes(struct.pack("<IIQ", 23, len(text), 0) + text)
    assert bed.run() == []
    assert bed.logged(LogLevel.ERROR, "filter")
    assert bed.host.guest_filter == RULES
    bed.ask(FilterFilter())
    assert bed.host.guest_filter == []
    assert bed.host.state is Redirection.CONNECTED


def test_rejection(bed: Bed, device: FakeDevice) -> None:
    """Packets of the same pass come first; the next read attempt raises, once; the application decides."""
    bed.say(FilterReject(), GetConfiguration(id=1))
    with pytest.raises(DeviceRejectedError):
        bed.run()
    assert bed.news() == [ConfigurationStatus(id=1, configuration=1)]
    assert bed.run() == []
    assert bed.host.state is Redirection.CONNECTED
    bed.host.set_device(None)
    assert bed.news() == [DeviceDisconnect()]
    assert bed.ask(FilterReject()) == [], "nothing to reject"


@pytest.mark.parametrize("when", ["no device", "before hello", "lost", "not confirmed"])
def test_rejection_of_nothing_is_ignored(device: FakeDevice, when: str) -> None:
    bed = Bed(None if when == "no device" else device, hello=when != "before hello", capabilities=[Capability.FILTER])
    if when == "before hello":
        bed.say_bytes(struct.pack("<III", 22, 0, 0))
        assert bed.run()
        return
    if when == "lost":
        lose(bed, device)
    if when == "not confirmed":
        bed.host.set_device(FakeDevice())
        bed.news()
    assert bed.ask(FilterReject()) == []


def test_a_rejection_is_told_before_the_end_of_the_stream(bed: Bed) -> None:
    bed.say(FilterReject())
    bed.at_end = True
    with pytest.raises(DeviceRejectedError):
        bed.run()
    with pytest.raises(ConnectionClosed):
        bed.run()


def test_a_rejection_is_told_before_anything_else_is_read(bed: Bed) -> None:
    """Also when a bad packet ended the pass."""
    bed.say(FilterReject())
    bed.say_bytes(struct.pack("<IIQ", 77, 0, 0))
    with pytest.raises(RemoteProtocolError):
        bed.run()
    bed.say(GetConfiguration(id=1))
    with pytest.raises(DeviceRejectedError):
        bed.run()
    assert bed.news() == []
    assert bed.run() == [ConfigurationStatus(id=1, configuration=1)]


@pytest.mark.parametrize(
    ("rules", "active", "flags", "result"),
    [
        ([FilterRule(0xFF, -1, -1, -1, True), FilterRule(1, -1, -1, -1, True)], 1, {}, FilterResult.ALLOW),
        ([FilterRule(0xFF, -1, -1, -1, True)], 1, {}, FilterResult.NO_MATCH),
        ([FilterRule(0xFF, -1, -1, -1, True)], 1, {"default_allow": True}, FilterResult.ALLOW),
        ([FilterRule(8, -1, -1, -1, False)], 2, {}, FilterResult.DENY),
        ([FilterRule(-1, 0x1234, 0x5678, 0x0102, True)], 1, {}, FilterResult.ALLOW),
        ([FilterRule(-1, -1, -1, -1, False)], 0, {}, FilterResult.ALLOW),
        # The first alternate setting counts: classes 3 and 0x0e of interface 7 do not.
        ([FilterRule(3, -1, -1, -1, False), FilterRule(-1, -1, -1, -1, True)], 1, {}, FilterResult.ALLOW),
    ],
)
def test_check_device_filter(
    rules: list[FilterRule], active: int, flags: dict[str, bool], result: FilterResult
) -> None:
    assert check_device_filter(rules, FakeDevice(active=active), **flags) is result


def test_check_device_filter_raises() -> None:
    with pytest.raises(ValueError, match="device_class"):
        check_device_filter([FilterRule(300, -1, -1, -1, True)], FakeDevice())
    device = FakeDevice()
    device.raw_configuration = b""
    with pytest.raises(ValueError, match="descriptor"):
        check_device_filter([], device)


# ---------------------------------------------------------------- errors of the connection

BAD_PACKETS = {
    "unknown type": struct.pack("<IIQ", 77, 3, 0) + b"abc",
    "only a host sends it": struct.pack("<IIQ", 1, 10, 0) + bytes(10),
    "data of a buffered bulk packet": struct.pack("<IIQ", 104, 10, 0) + bytes(10),
    "too short": struct.pack("<IIQ", 6, 0, 0),
    "too long": struct.pack("<IIQ", 6, 2, 0) + bytes(2),
    "extra data": struct.pack("<IIQ", 100, 12, 0) + b"\x80" + bytes(9) + b"xx",
    "length that differs": struct.pack("<IIQ", 101, 13, 0) + bytes((1, 0, 4, 0, 0, 0, 0, 0, 0, 0)) + b"xyz",
    "interrupt IN": struct.pack("<IIQ", 103, 4, 0) + bytes((INTERRUPT_IN, 0, 0, 0)),
    "iso IN": struct.pack("<IIQ", 102, 4, 0) + bytes((ISO_IN, 0, 0, 0)),
    "receiving on an OUT endpoint": struct.pack("<IIQ", 15, 1, 0) + b"\x02",
    "bulk receiving on an OUT endpoint": struct.pack("<IIQ", 25, 10, 0) + bytes((0, 0, 0, 0, 0, 2, 0, 0, 1, 1)),
    "too many bytes per transfer": struct.pack("<IIQ", 25, 10, 0) + bytes((0, 0, 0, 0, 0, 2, 0, 8, 0x81, 1)),
    "filter without its end": struct.pack("<IIQ", 23, 3, 0) + b"abc",
}


@pytest.mark.parametrize("bad", BAD_PACKETS.values(), ids=BAD_PACKETS)
def test_bad_packets(bed: Bed, device: FakeDevice, bad: bytes) -> None:
    """What came before is served, the bad one is skipped without an answer, the next call goes on."""
    bed.say(GetConfiguration(id=1))
    bed.say_bytes(bad)
    bed.say(GetConfiguration(id=2), bulk_in(3))
    with pytest.raises(RemoteProtocolError):
        bed.run()
    assert bed.news() == [ConfigurationStatus(id=1, configuration=1)]
    assert bed.run() == [ConfigurationStatus(id=2, configuration=1)]
    assert len(device.in_flight) == 1
    assert bed.host.state is Redirection.CONNECTED


def test_the_end_of_the_stream(bed: Bed) -> None:
    """Told after everything before it was served."""
    bed.say(GetConfiguration(id=1))
    bed.at_end = True
    with pytest.raises(ConnectionClosed):
        bed.run()
    assert bed.news() == [ConfigurationStatus(id=1, configuration=1)]


class Failing(HostCallbacks):
    def read(self, count: int) -> bytes | None:
        raise ConnectionResetError("read")

    def write(self, data: memoryview) -> int | None:
        raise BrokenPipeError("write")


def test_errors_of_the_callbacks_pass_through() -> None:
    """And nothing is lost."""
    host = Host(Failing(), FakeDevice())
    with pytest.raises(ConnectionResetError):
        host.read_guest_data()
    for _ in range(2):
        with pytest.raises(BrokenPipeError):
            host.write_guest_data()
    assert (host.has_data_to_write(), host.buffered_output_size()) == (1, 80)
    host.close()


def test_optional_vectored_callbacks(device: FakeDevice) -> None:
    """readinto and writev are used when they are there."""
    guest = Bed(None)  # only its bytes are used
    incoming = [guest._hello, bytes(struct.pack("<IIQ", 7, 0, 5))]
    outgoing: list[bytes] = []

    class Application(HostCallbacks):
        def readinto(self, buffer: memoryview) -> int | None:
            if not incoming:
                return None
            piece = incoming.pop(0)
            buffer[: len(piece)] = piece
            return len(piece)

        def writev(self, buffers: list[memoryview]) -> int:
            outgoing.append(b"".join(buffers))
            return len(outgoing[-1])

    host = Host(Application(), device)
    host.read_guest_data()
    host.write_guest_data()
    (written,) = outgoing
    assert written.endswith(struct.pack("<IIQBB", 8, 2, 5, 0, 1))
    host.close()


def test_write_owns_buffer(device: FakeDevice) -> None:
    """A short count is a mistake then."""

    class Application(HostCallbacks):
        def write(self, data: memoryview) -> int:
            return len(data) - 1

    host = Host(Application(), device, write_owns_buffer=True)
    with pytest.raises(ValueError, match="write_owns_buffer"):
        host.write_guest_data()
    host.close()


# ---------------------------------------------------------------- telling the application


def test_flush_writes_is_called_when_something_was_queued(bed: Bed, device: FakeDevice) -> None:
    """After each handled packet and completion that queued something, and only then."""

    def flushes(action: Callable[[], object]) -> int:
        before = bed.flushes
        action()
        return bed.flushes - before

    assert flushes(lambda: bed.ask(GetConfiguration(id=1))) == 1
    assert flushes(lambda: bed.ask(GetConfiguration(id=1), GetConfiguration(id=2))) == 2
    assert flushes(lambda: bed.ask(bulk_in(1))) == 0
    assert flushes(lambda: device.complete()) == 1
    assert flushes(lambda: bed.ask(CancelDataPacket(id=1))) == 0
    assert flushes(bed.host.write_guest_data) == 0
    assert flushes(lambda: bed.host.set_device(None)) == 1


def test_flush_writes_may_be_set_when_the_host_is_there(bed: Bed) -> None:
    """``callbacks.flush_writes = host.write_guest_data`` has to come later than the host."""
    calls: list[int] = []
    bed.host._callbacks.flush_writes = lambda: calls.append(1)  # type: ignore[method-assign]
    bed.ask(GetConfiguration(id=1))
    assert calls == [1]
    assert bed.flushes == 1  # of hello


def test_nothing_is_written_unasked(device: FakeDevice) -> None:
    """The application writes, not the host."""
    bed = Bed(device)
    bed.writes_on_flush = False
    assert bed.ask(GetConfiguration(id=1)) == []
    assert bed.host.has_data_to_write() == 1
    bed.host.write_guest_data()
    assert kinds(bed.news()) == [ConfigurationStatus]
    assert (bed.host.has_data_to_write(), bed.host.buffered_output_size()) == (0, 0)


def test_the_default_log_is_the_logging_module(caplog: pytest.LogCaptureFixture) -> None:
    host = Host(HostCallbacks())
    with caplog.at_level("WARNING", "usbredir.host"):
        host.log(LogLevel.WARNING, "a percent sign %s stays")
    assert caplog.record_tuples == [("usbredir.host", 30, "a percent sign %s stays")]
    host.close()


def test_reset_of_the_endpoint_out_of_use(bed: Bed) -> None:
    """A request on an endpoint that the new alternate setting lacks is refused."""
    bed.ask(SetAltSetting(interface=7, alt=5))
    bed.ask(SetAltSetting(interface=7, alt=2))
    bed.news()
    assert bed.ask(StartInterruptReceiving(id=1, endpoint=ALTERNATE_INTERRUPT_IN)) == []
    assert bed.ask(BulkPacket(id=2, endpoint=BULK_OUT, data=b"x")) == []


def test_a_reset_after_a_cleared_halt(bed: Bed, device: FakeDevice) -> None:
    """Clearing a halt is a use of the device: the reset that follows is not skipped."""
    bed.ask(ControlPacket(id=1, endpoint=0, requesttype=2, request=1, value=0, index=BULK_IN))
    bed.ask(Reset())
    assert device.calls[-1] == ("reset",)
    resets = len(device.done("reset"))
    bed.ask(Reset())
    assert len(device.done("reset")) == resets


def test_cancelled_transfers_answer_in_order(bed: Bed, device: FakeDevice) -> None:
    """A reset cancels what is in flight in the order of submission."""
    numbers = list(range(1, 20))
    bed.ask(*map(bulk_in, numbers))
    assert [answer.id for answer in bed.ask(Reset())] == numbers
