"""Reduced mode: devices of pyusb backends other than libusb 1.0, on the virtual bus and with a scripted backend."""

from __future__ import annotations

import array
import errno
import logging
import re
import threading
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import usb.backend
import usb.core

from usbredir.backends import _synchronous
from usbredir.backends.pyusb import SynchronousDevice, wrap
from usbredir.device import Transfer, UsbDevice
from usbredir.errors import DeviceClaimError, DeviceError, DeviceLostError
from usbredir.proto import Status, TransferType

from . import vusb

SUCCESS, CANCELLED, INVAL, IOERROR, STALL, TIMEOUT, BABBLE = range(7)
PATIENCE = 30.0

# ================================================================ on the bus

PLAIN = """
import usb.backend
class Plain(usb.backend.IBackend):
    "libusb1's synchronous calls, without what tells that they are libusb1's."
    def __init__(self):
        self._inner = new_backend()
NAMES = '''enumerate_devices get_parent get_device_descriptor get_configuration_descriptor get_interface_descriptor
get_endpoint_descriptor open_device close_device set_configuration get_configuration set_interface_altsetting
claim_interface release_interface bulk_write bulk_read intr_write intr_read ctrl_transfer clear_halt reset_device
is_kernel_driver_active detach_kernel_driver attach_kernel_driver'''.split()
for name in NAMES:
    setattr(Plain, name, lambda self, *arguments, name=name: getattr(self._inner, name)(*arguments))
"""
REDUCED = """
device = backends.wrap(find_all(IDS, Plain())[0])
out["kind"] = type(device).__name__
device.claim()
out["descriptor"] = device.device_descriptor.hex(), len(device.configuration_descriptor), int(device.speed)
out["control_in"] = told(complete(device, vendor_in(1, 6, value=3)))
complete(device, vendor_out(2, b"hello"))
out["control_fetch"] = told(complete(device, vendor_in(3, 64)))
out["control_stall"] = told(complete(device, vendor_in(0x77, 8)))
complete(device, make(BULK, 0x01, data=b"message"))
out["bulk"] = told(complete(device, make(BULK, 0x81, 512)))
complete(device, make(BULK, 0x01, data=b""))
out["zero"] = told(complete(device, make(BULK, 0x81, 512)))
complete(device, make(BULK, 0x01, data=b"0123456789"))
out["babble"] = told(complete(device, make(BULK, 0x81, 4)))[0]
out["interrupt_out"] = told(complete(device, make(INTERRUPT, 0x03, data=b"12345678")))[:2]
events = [make(INTERRUPT, 0x83, 8) for _ in range(100)]
complete(device, *events)
first = int.from_bytes(events[0].data, "little")
out["events"] = [int.from_bytes(t.data, "little") - first for t in events] == list(range(100))
out["stall"] = told(complete(device, make(BULK, 0x85, 8)))[0]
out["cleared"] = device.clear_halt(0x85), told(complete(device, make(BULK, 0x85, 8)))[0]
out["timeout"] = told(complete(device, make(BULK, 0x86, 8, timeout=0.05)))
done = []
hanging = [make(BULK, 0x86, 8, done.append) for _ in range(5)]
for transfer in hanging:
    device.submit(transfer)
device.cancel(hanging[3])
until(device, lambda: done)
out["waiting_cancelled"] = [hanging.index(t) for t in done], int(done[0].status)
for transfer in hanging:
    device.cancel(transfer)
until(device, lambda: len(done) == 5)
out["cancelled"] = sorted({int(t.status) for t in done})
out["alternate"] = device.set_alt_setting(1, 1)
out["iso"] = device.submit(make(ISO, 0x84, 1023, iso_lengths=[1023]))
out["streams"] = device.alloc_streams([0x81], 4), device.free_streams([0x81])
out["on_a_stream"] = device.submit(make(BULK, 0x81, 8, stream_id=1))

# an application's own loop
poller = select.poll()
for fd, events in device.pollfds():
    poller.register(fd, events)
del done[:]
device.submit(make(BULK, 0x82, 8, done.append))
while not done:
    wait = device.next_timeout()
    assert poller.poll(LIMIT * 1000 if wait is None else wait * 1000) or wait == 0
    device.handle_events(0)
threading.Timer(0.05, device.wake).start()
device.handle_events(None)

device.submit(make(BULK, 0x86, 8, lambda t: out.update(at_close=int(t.status))))
threads = threading.active_count()
device.close()
out["threads"] = threads > 1, threading.active_count()

device = backends.wrap(find_all(IDS, Plain())[0])
device.claim()
for _ in range(3):
    device.submit(make(BULK, 0x86, 8, lambda t: out.setdefault("lost", []).append([int(t.status), t.device_lost])))
device.submit(vendor_out(0x10, value=1))
until(device, lambda: len(out.get("lost", [])) == 3)
after = make(BULK, 0x82, 8)
out["after"] = device.lost, device.submit(after), after.device_lost
device.close()
"""
AT_EXIT = """
device = backends.wrap(find_all(IDS, Plain())[0])
device.claim()
device.submit(make(BULK, 0x86, 8))
device.submit(make(BULK, 0x82, 8))
sys.exit(3)
"""


@cache
def reduced() -> Any:
    return vusb.found(PLAIN + REDUCED, env=vusb.environment(driver=1))


@pytest.mark.parametrize(
    ("name", "expected"),
    {
        "kind": "SynchronousDevice",
        "descriptor": ["120100020000004009120100341201020302", 129, 2],
        "control_in": [SUCCESS, 6, "030405060708", False],
        "control_fetch": [SUCCESS, 5, b"hello".hex(), False],
        "control_stall": [STALL, 0, "", False],
        "bulk": [SUCCESS, 7, b"message".hex(), False],
        "zero": [SUCCESS, 0, "", False],
        "babble": BABBLE,
        "interrupt_out": [SUCCESS, 8],
        "events": True,
        "stall": STALL,
        "cleared": [SUCCESS, SUCCESS],
        "timeout": [TIMEOUT, 0, "", False],
        "waiting_cancelled": [[3], CANCELLED],
        "cancelled": [CANCELLED],
        "alternate": SUCCESS,
        "iso": IOERROR,
        "streams": [[IOERROR, 0], IOERROR],
        "on_a_stream": IOERROR,
        "at_close": CANCELLED,
        "threads": [True, 1],
        "lost": [[IOERROR, True]] * 3,
        "after": [True, IOERROR, True],
    }.items(),
)
def test_reduced_mode(name: str, expected: Any) -> None:
    assert reduced()[name] == expected


def test_exit_with_calls_running() -> None:
    vusb.run(vusb.PRELUDE + PLAIN + AT_EXIT, code=3)


# ================================================================ scripted

ENDPOINT = SimpleNamespace(
    bLength=7, bDescriptorType=5, bmAttributes=2, wMaxPacketSize=512, bInterval=0, extra_descriptors=[]
)
ADDRESSES = (0x01, 0x81, 0x82)
CALLS = re.findall(
    r"\w+",
    """set_configuration get_configuration set_interface_altsetting claim_interface release_interface bulk_write
bulk_read intr_write intr_read ctrl_transfer clear_halt reset_device is_kernel_driver_active detach_kernel_driver
attach_kernel_driver""",
)


class ScriptedBackend(usb.backend.IBackend):  # type: ignore[misc]
    """One device, no library. *script*: by the name of a call, what it does, one after the other, the last for ever.

    That is a result, bytes to read, an exception to raise, or a function to call with the call's arguments.
    """

    def __init__(self) -> None:
        self.script: dict[str, list[Any]] = defaultdict(lambda: [NotImplementedError()])
        self.script["claim_interface"] = self.script["release_interface"] = [None]
        self.calls: list[tuple[Any, ...]] = []
        self.closed = threading.Event()

    def enumerate_devices(self) -> list[str]:
        return ["device"]

    def get_device_descriptor(self, dev: Any) -> Any:
        return SimpleNamespace(
            bLength=18,
            bDescriptorType=1,
            bcdUSB=0x0200,
            bDeviceClass=0,
            bDeviceSubClass=0,
            bDeviceProtocol=0,
            bMaxPacketSize0=64,
            idVendor=0x1209,
            idProduct=2,
            bcdDevice=1,
            iManufacturer=0,
            iProduct=0,
            iSerialNumber=0,
            bNumConfigurations=1,
            bus=None,
            address=None,
            port_number=None,
            port_numbers=None,
            speed=None,
        )

    def get_configuration_descriptor(self, dev: Any, config: int) -> Any:
        if config:
            raise IndexError
        return SimpleNamespace(
            bLength=9,
            bDescriptorType=2,
            wTotalLength=0,
            bNumInterfaces=1,
            bConfigurationValue=4,
            iConfiguration=0,
            bmAttributes=0x80,
            bMaxPower=50,
            extra_descriptors=[],
        )

    def get_interface_descriptor(self, dev: Any, intf: int, alt: int, config: int) -> Any:
        if intf or alt:
            raise IndexError
        return SimpleNamespace(
            bLength=9,
            bDescriptorType=4,
            bInterfaceNumber=6,
            bAlternateSetting=0,
            bNumEndpoints=len(ADDRESSES),
            bInterfaceClass=255,
            bInterfaceSubClass=0,
            bInterfaceProtocol=0,
            iInterface=0,
            extra_descriptors=[],
        )

    def get_endpoint_descriptor(self, dev: Any, ep: int, intf: int, alt: int, config: int) -> Any:
        return SimpleNamespace(
            **{**vars(ENDPOINT), "bEndpointAddress": ADDRESSES[ep], "bRefresh": 0, "bSynchAddress": 0}
        )

    def open_device(self, dev: Any) -> str:
        return "handle"

    def close_device(self, dev_handle: Any) -> None:
        self.closed.set()

    def do(self, name: str, *arguments: Any) -> Any:
        self.calls.append((name, *arguments[1:]))
        steps = self.script[name]
        step = steps.pop(0) if len(steps) > 1 else steps[0]
        if callable(step):
            step = step(*arguments)
        if isinstance(step, BaseException):
            raise step
        if isinstance(step, bytes):
            buffer = arguments[3]
            assert isinstance(buffer, array.array)
            buffer[: len(step)] = array.array("B", step)
            return len(step)
        return step


for _name in CALLS:
    setattr(ScriptedBackend, _name, lambda self, *arguments, _name=_name: self.do(_name, *arguments))

Bed = tuple[SynchronousDevice, ScriptedBackend]


def error(number: int | None, code: int | None = None) -> usb.core.USBError:
    return usb.core.USBError("words", code, number)


def timed_out() -> usb.core.USBError:
    return usb.core.USBTimeoutError("Operation timed out", None, errno.ETIMEDOUT)


@pytest.fixture
def bed() -> Iterator[Bed]:
    """A device and the script of its backend."""
    backend = ScriptedBackend()
    device = wrap(usb.core.find(backend=backend))
    assert isinstance(device, SynchronousDevice)
    device.claim()
    yield device, backend
    device.close()


def submitted(device: SynchronousDevice, kind: TransferType, endpoint: int, length: int = 0, **more: Any) -> Transfer:
    """A transfer in its queue; its *context* is set when it has completed."""
    done = threading.Event()
    transfer = Transfer(kind, endpoint, length, lambda t: done.set(), context=done, **more)
    assert device.submit(transfer) == Status.SUCCESS
    return transfer


def finish(device: SynchronousDevice, transfer: Transfer) -> Transfer:
    while not transfer.context.is_set():
        device.handle_events(PATIENCE)
    return transfer


def go_on(device: SynchronousDevice) -> None:
    """Until a completion raises."""
    while True:
        device.handle_events(PATIENCE)


def bulk_in(device: SynchronousDevice, length: int = 64, **more: Any) -> Transfer:
    return finish(device, submitted(device, TransferType.BULK, 0x81, length, **more))


def bulk_out(device: SynchronousDevice, data: bytes, **more: Any) -> Transfer:
    return finish(device, submitted(device, TransferType.BULK, 0x01, len(data), data=data, **more))


def test_a_backend_that_can_nothing(bed: Bed) -> None:
    """No configuration, drivers, reset, halts: what is not implemented is harmless."""
    device, _ = bed
    assert isinstance(device, UsbDevice)
    assert device.configuration_descriptor is not None
    assert device.configuration_descriptor[5] == 4
    assert device.clear_halt(0x81) == Status.IOERROR
    assert device.set_alt_setting(6, 0) == Status.IOERROR
    assert device.set_configuration(4) == Status.IOERROR
    device.reset()
    assert bulk_in(device).status == Status.IOERROR
    assert finish(device, submitted(device, TransferType.CONTROL, 0x80, 4)).status == Status.IOERROR
    assert not device.lost
    device.release(give_back=True)


def test_it_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "usbredir.backends.pyusb"):
        device = wrap(usb.core.find(backend=ScriptedBackend()))
        device.claim()
        device.close()
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "reduced mode" in record.message
    assert "synchronous calls only" in record.message
    assert "SynchronousDevice 1209:0002" in record.message


def test_reading_goes_on_until_there_is_data(bed: Bed) -> None:
    """In short calls, with the number of the endpoint's interface."""
    device, backend = bed
    backend.script["bulk_read"] = [timed_out(), error(errno.ETIMEDOUT), b"data"]
    transfer = bulk_in(device)
    assert (transfer.status, transfer.actual_length, transfer.data) == (Status.SUCCESS, 4, b"data")
    reads = [call for call in backend.calls if call[0] == "bulk_read"]
    assert [call[1:3] for call in reads] == [(0x81, 6)] * 3
    assert all(0 < call[4] <= 1000 * _synchronous.SLICE_IN for call in reads)


def test_writing_goes_on_until_all_is_out(bed: Bed) -> None:
    device, backend = bed
    backend.script["bulk_write"] = [timed_out(), 3, 0, 2]
    transfer = bulk_out(device, b"12345")
    assert (transfer.status, transfer.actual_length) == (Status.SUCCESS, 5)
    written = [call[3].tobytes() for call in backend.calls if call[0] == "bulk_write"]
    assert written == [b"12345", b"12345", b"45", b"45"]


@pytest.mark.parametrize(("count", "length"), [(1000, 64), (-5, 0), (64, 64)])
def test_counts_are_not_believed(bed: Bed, count: int, length: int) -> None:
    device, backend = bed
    backend.script["bulk_read"] = [count]
    transfer = bulk_in(device)
    assert (transfer.actual_length, len(transfer.data)) == (length, length)
    backend.script["bulk_write"] = [count, 64]
    assert bulk_out(device, bytes(64)).actual_length == 64
    backend.script["ctrl_transfer"] = [count]
    assert finish(device, submitted(device, TransferType.CONTROL, 0x80, 64)).actual_length == length


def test_timeouts(bed: Bed) -> None:
    """What had moved before is told; the wait gets shorter at the end."""
    device, backend = bed
    backend.script["bulk_read"] = [timed_out()]
    transfer = bulk_in(device, timeout=0.001)
    assert (transfer.status, transfer.data) == (Status.TIMEOUT, b"")
    assert backend.calls[-1][4] <= 1
    backend.script["bulk_write"] = [2, timed_out()]
    transfer = bulk_out(device, b"12345", timeout=0.001)
    assert (transfer.status, transfer.actual_length) == (Status.TIMEOUT, 2)


def test_control_transfers_are_tried_once(bed: Bed) -> None:
    device, backend = bed
    backend.script["ctrl_transfer"] = [timed_out()]
    setup = (0xC0, 1, 2, 3)
    transfer = finish(device, submitted(device, TransferType.CONTROL, 0x80, 4, setup=setup))
    assert transfer.status == Status.TIMEOUT
    (call,) = [call for call in backend.calls if call[0] == "ctrl_transfer"]
    assert call[1:5] == setup
    assert call[6] == 1000 * _synchronous.CONTROL_TIMEOUT
    backend.script["ctrl_transfer"] = [lambda *a: len(a[5])]
    transfer = finish(device, submitted(device, TransferType.CONTROL, 0x00, 2, data=b"ab", timeout=0.25))
    assert transfer.actual_length == 2
    assert backend.calls[-1][5:] == (array.array("B", b"ab"), 250)


@pytest.mark.parametrize(
    ("number", "status"),
    [
        (errno.EPIPE, Status.STALL),
        (errno.EOVERFLOW, Status.BABBLE),
        (errno.EINVAL, Status.INVAL),
        (errno.EIO, Status.IOERROR),
        (errno.ENOMEM, Status.IOERROR),
        (None, Status.IOERROR),
    ],
)
def test_errors_of_transfers(bed: Bed, number: int | None, status: int) -> None:
    """By errno; backend_error_code has other meanings here."""
    device, backend = bed
    backend.script["bulk_read"] = [error(number, -4)]
    transfer = bulk_in(device)
    assert (transfer.status, transfer.device_lost, device.lost) == (status, False, False)


@pytest.mark.parametrize("number", [errno.EIO, errno.EINVAL, errno.ESHUTDOWN])
def test_three_suspicious_errors_are_a_loss(bed: Bed, number: int) -> None:
    """In a row; anything else in between shows that the device is there."""
    device, backend = bed
    for step in (b"data", error(errno.EPIPE)):
        backend.script["bulk_read"] = [error(number), error(number), step, error(number), error(number), step]
        for _ in range(6):
            assert not bulk_in(device).device_lost
    backend.script["bulk_read"] = [timed_out(), error(number)]
    transfers = [bulk_in(device) for _ in range(3)]
    assert [t.device_lost for t in transfers] == [False, False, True]
    assert transfers[2].status == Status.IOERROR
    assert device.lost
    late = Transfer(TransferType.BULK, 0x82, 4, lambda t: None)
    assert device.submit(late) == Status.IOERROR
    assert late.device_lost


def test_enodev_is_a_loss_at_once(bed: Bed) -> None:
    """For what waits in queues as well, and for calls that are no transfers."""
    device, backend = bed
    going_on = threading.Event()

    def unplugged(*_: Any) -> Any:
        assert going_on.wait(PATIENCE)
        return error(errno.ENODEV)

    backend.script["bulk_read"] = [unplugged]
    transfers = [submitted(device, TransferType.BULK, 0x81, 8) for _ in range(3)]
    going_on.set()
    assert [finish(device, t).device_lost for t in transfers] == [True] * 3
    assert len([call for call in backend.calls if call[0] == "bulk_read"]) == 1
    backend.script["clear_halt"] = [error(errno.ENODEV)]
    with pytest.raises(DeviceLostError):
        device.clear_halt(0x81)


def test_data_after_a_cancel_is_thrown_away(bed: Bed) -> None:
    device, backend = bed
    transfer: list[Transfer] = []

    def late(*_: Any) -> bytes:
        device.cancel(transfer[0])
        return b"too late"

    started = threading.Event()
    backend.script["bulk_read"] = [lambda *a: [started.wait(PATIENCE), timed_out()][1], late]
    transfer.append(submitted(device, TransferType.BULK, 0x81, 64))
    started.set()
    finish(device, transfer[0])
    assert (transfer[0].status, transfer[0].actual_length, transfer[0].data) == (Status.CANCELLED, 0, b"")
    device.cancel(transfer[0])


def test_a_backend_that_is_wrong(bed: Bed, caplog: pytest.LogCaptureFixture) -> None:
    """Its exception is an I/O error and is logged; the next transfer goes on."""
    device, backend = bed
    backend.script["bulk_read"] = [ZeroDivisionError(), b"data"]
    assert bulk_in(device).status == Status.IOERROR
    assert "ZeroDivisionError" in caplog.text
    assert bulk_in(device).data == b"data"


def test_completions_that_raise(bed: Bed) -> None:
    """Reach the caller of handle_events; the others run at its next calls."""
    device, backend = bed
    backend.script["bulk_read"] = [b"data"]
    seen: list[Transfer] = []

    def fail(transfer: Transfer) -> None:
        seen.append(transfer)
        raise RuntimeError("of a completion")

    for _ in range(3):
        assert device.submit(Transfer(TransferType.BULK, 0x81, 8, fail)) == Status.SUCCESS
    for count in range(1, 4):
        with pytest.raises(RuntimeError, match="of a completion"):
            go_on(device)
        assert len(seen) == count


def test_endpoints_do_not_wait_for_each_other(bed: Bed) -> None:
    """One thread each; submitting twice what has not completed is refused."""
    device, backend = bed
    blocked = threading.Event()
    backend.script["bulk_read"] = [lambda *a: blocked.wait(PATIENCE) and b"data"]
    backend.script["bulk_write"] = [lambda *a: len(a[3])]
    waiting = submitted(device, TransferType.BULK, 0x81, 8)
    assert bulk_out(device, b"out").status == Status.SUCCESS
    with pytest.raises(ValueError, match="has not completed yet"):
        device.submit(waiting)
    blocked.set()
    assert finish(device, waiting).data == b"data"


@pytest.mark.parametrize(
    "transfer",
    [
        Transfer(TransferType.BULK, 0x81, -1, print),
        Transfer(TransferType.BULK, 0x01, 2, print, data=b"1"),
        Transfer(TransferType.CONTROL, 0x80, 2, print, setup=(256, 0, 0, 0)),
        Transfer(TransferType.INVALID, 0x81, 2, print),
    ],
    ids=repr,
)
def test_unsound_transfers(bed: Bed, transfer: Transfer) -> None:
    assert bed[0].submit(transfer) == Status.INVAL


def test_drivers_and_claims() -> None:
    """Detached one by one, attached again at the end; a failed claim leaves nothing."""
    backend = ScriptedBackend()
    script: dict[str, Any] = {
        "is_kernel_driver_active": True,
        "detach_kernel_driver": None,
        "attach_kernel_driver": None,
    }
    for name, result in script.items():
        backend.script[name] = [result]
    device = wrap(usb.core.find(backend=backend))
    device.claim()
    device.release(give_back=True)
    assert [call[0] for call in backend.calls if "driver" in call[0] or "interface" in call[0]] == [
        "is_kernel_driver_active",
        "detach_kernel_driver",
        "claim_interface",
        "release_interface",
        "attach_kernel_driver",
    ]
    backend.script["claim_interface"] = [error(errno.EBUSY)]
    backend.calls.clear()
    with pytest.raises(DeviceClaimError, match="in use"):
        device.claim()
    assert backend.calls[-1][0] == "attach_kernel_driver"
    backend.script["claim_interface"] = [NotImplementedError()]
    with pytest.raises(DeviceError, match="does not support"):
        device.claim()
    backend.script["is_kernel_driver_active"] = [error(errno.EACCES)]
    with pytest.raises(DeviceClaimError) as caught:
        device.claim()
    assert caught.value.reason == "forbidden"
    backend.script["reset_device"] = [error(errno.ENOENT)]
    with pytest.raises(DeviceLostError, match="as another one"):
        device.reset()
    assert device.lost
    device.close()
    assert backend.closed.is_set()


def test_a_call_that_does_not_end(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Keeps the handle: closing it would take it from under the call."""
    monkeypatch.setattr(_synchronous, "CLOSE_LIMIT", 0.1)
    backend = ScriptedBackend()
    forever, started = threading.Event(), threading.Event()

    def stuck(*_: Any) -> bytes:
        started.set()
        forever.wait(PATIENCE)
        return b""

    backend.script["bulk_read"] = [stuck]
    device = wrap(usb.core.find(backend=backend))
    device.claim()
    assert device.submit(Transfer(TransferType.BULK, 0x81, 8, lambda t: None)) == Status.SUCCESS
    assert started.wait(PATIENCE)
    device.close()
    device.close()
    assert "left open" in caplog.text
    assert not backend.closed.is_set()
    forever.set()
    device.handle_events(None)
