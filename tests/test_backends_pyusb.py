"""Real devices through pyusb: LibusbDevice on the virtual bus, below it the real libusb.

Each program runs once per worker and tells everything it saw; the tests look at parts of that.
"""

from __future__ import annotations

import ctypes
import struct
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from usbredir.backends import _libusb, _native
from usbredir.backends._backend import load_library
from usbredir.backends._completions import Completions
from usbredir.device import Transfer, UsbDevice
from usbredir.proto import Status, TransferType

from . import vusb

SUCCESS, CANCELLED, INVAL, IOERROR, STALL, TIMEOUT, BABBLE = range(7)

both_drivers = pytest.mark.parametrize("driver", ["polling", "thread"])


# ================================================================ transfers

TRANSFERS = """
device = backends.open_device("1209:0001", event_thread=sys.argv[1] == "thread")
from usbredir.device import UsbDevice
out["satisfies"] = isinstance(device, UsbDevice)
out["repr"] = repr(device)
device.claim()

out["control_in"] = told(complete(device, vendor_in(1, 6, value=3)))
out["control_out"] = told(complete(device, vendor_out(2, b"hello")))
out["control_fetch"] = told(complete(device, vendor_in(3, 64)))
out["control_stall"] = told(complete(device, vendor_in(0x77, 8)))
out["control_empty"] = told(complete(device, vendor_out(0x10 + 2, value=500)))
out["descriptor"] = told(complete(device, make(CONTROL, 0x80, 18, setup=(0x80, 6, 0x100, 0))))[2]
# A guest that contradicts itself: endpoint IN, request OUT. What the buffer held before must not go out.
complete(device, vendor_in(1, 512, value=0xAA))
complete(device, make(CONTROL, 0x80, 4, setup=(0x40, 2, 0, 0)))
out["contradiction"] = told(complete(device, vendor_in(3, 64)))[2]

complete(device, make(BULK, 0x01, data=b"message"))
out["bulk_short"] = told(complete(device, make(BULK, 0x81, 512)))
out["bulk_out"] = told(complete(device, make(BULK, 0x01, data=memoryview(bytearray(b"12345")))))
out["bulk_exact"] = told(complete(device, make(BULK, 0x81, 5)))
out["zero_out"] = told(complete(device, make(BULK, 0x01, data=b"")))
out["zero_in"] = told(complete(device, make(BULK, 0x81, 64)))
complete(device, make(BULK, 0x01, data=b"0123456789"))
out["babble"] = told(complete(device, make(BULK, 0x81, 4)))
out["large"] = complete(device, make(BULK, 0x82, 1000000)).actual_length
out["interrupt_out"] = told(complete(device, make(INTERRUPT, 0x03, data=b"12345678")))
out["interrupt_in"] = told(complete(device, make(INTERRUPT, 0x83, 64)))[:2]

out["halting"] = [told(complete(device, make(BULK, 0x85, 8)))[0] for _ in range(3)]
out["cleared"] = device.clear_halt(0x85), told(complete(device, make(BULK, 0x85, 8)))[0]
out["clear_nothing"] = device.clear_halt(0x0A)

began = time.monotonic()
out["timeout"] = told(complete(device, make(BULK, 0x86, 64, timeout=0.05)))
out["timeout_took"] = time.monotonic() - began

one = make(BULK, 0x86, 64)
done = []
one.callback = done.append
device.submit(one)
device.cancel(one)
device.cancel(one)
out["in_submit_or_cancel"] = len(done)
until(device, lambda: done)
device.cancel(one)
out["cancel"] = told(one)
try:
    device.submit(one), device.submit(one)
except ValueError as error:
    out["twice"] = str(error)
device.cancel(one)
until(device, lambda: len(done) == 2)

counters = []
many = [make(BULK, 0x82, 64, lambda t: counters.append(int.from_bytes(t.data[:8], "little"))) for _ in range(200)]
hanging = [make(BULK, 0x86, 64, done.append) for _ in range(100)]
for transfer in hanging + many:
    assert device.submit(transfer) == 0
until(device, lambda: len(counters) == 200)
out["in_order"] = counters == list(range(counters[0], counters[0] + 200))
for transfer in hanging:
    device.cancel(transfer)
until(device, lambda: len(done) == 102)
out["many_cancelled"] = {int(t.status) for t in hanging} == {Status.CANCELLED}
out["pooled"] = sum(device._pool.sizes().values())

def change_and_submit(transfer):
    seen.append([int(transfer.status), len(transfer.data)])
    if len(seen) < 5:
        transfer.length = 64 * len(seen) if len(seen) % 2 else transfer.length
        transfer.endpoint = 0x82 if len(seen) < 4 else 0x85
        assert device.submit(transfer) == 0
seen = []
device.submit(make(BULK, 0x82, 3000, change_and_submit))
until(device, lambda: len(seen) == 5)
out["changed_by_its_completion"] = seen

out["alternate"] = device.set_alt_setting(1, 1), device.set_alt_setting(1, 7), device.set_alt_setting(9, 0)
iso = complete(device, make(ISO, 0x84, 3 * 1023, iso_lengths=[1023, 1023, 1023]))
out["iso_in"] = [int(iso.status)] + [[int(r.status), len(r.data)] for r in iso.iso_results]
iso = complete(device, make(ISO, 0x04, data=bytes(30), iso_lengths=[10, 0, 20]))
out["iso_out"] = [int(iso.status)] + [[int(r.status), len(r.data)] for r in iso.iso_results]
complete(device, make(ISO, 0x84, 1023, iso_lengths=[1023]), make(ISO, 0x84, 1023, iso_lengths=[1023]))

unsound = [
    make(BULK, 0x82, -1), make(BULK, 0x02, 5, data=b"1234"), make(CONTROL, 0x80, 0x10000), make(ISO, 0x84, 10),
    make(ISO, 0x84, 10, iso_lengths=[11]), make(ISO, 0x84, 10, iso_lengths=[20, -10]), make(BULK, 0x182, 1),
    make(BULK, 0x82, 1 << 31), make(TransferType.INVALID, 0x82, 1), make(BULK, 0x82, 1, stream_id=-1),
    make(CONTROL, 0x80, 1, setup=(0xC0, 1, 0x10000, 0)),
]
out["unsound"] = sorted({int(device.submit(transfer)) for transfer in unsound})
out["no_endpoint"] = device.submit(make(BULK, 0x8A, 64))
out["no_streams"] = device.alloc_streams([0x81], 4)
out["flying"] = len(device._flying)

def handle_again(transfer):
    device.handle_events(0)
    nested.append(transfer)
nested = []
for _ in range(5):
    device.submit(make(BULK, 0x82, 64, handle_again))
until(device, lambda: len(nested) == 5)

device.submit(make(BULK, 0x86, 64, lambda t: out.update(at_close=told(t))))
device.close()
device.close()
closed = make(BULK, 0x82, 64)
out["closed"] = [device.submit(closed), closed.device_lost, list(device.pollfds())]
device.handle_events(None)
for name, call in {
    "configuration": lambda: device.configuration_descriptor, "claim": device.claim, "reset": device.reset,
    "streams": lambda: device.alloc_streams([0x81], 1), "halt": lambda: device.clear_halt(0x81),
}.items():
    try:
        call()
    except DeviceError as error:
        out["closed"].append(str(error))
device.release(give_back=True)
device.cancel(closed)
out["threads"] = threading.active_count()
"""


@cache
def transfers(driver: str) -> Any:
    return vusb.found(TRANSFERS, driver)


@both_drivers
@pytest.mark.parametrize(
    ("name", "expected"),
    {
        "satisfies": True,
        "repr": "<LibusbDevice 1209:0001 at 1-2>",
        "control_in": [SUCCESS, 6, "030405060708", False],
        "control_out": [SUCCESS, 5, b"hello".hex(), False],
        "control_fetch": [SUCCESS, 5, b"hello".hex(), False],
        "control_stall": [STALL, 0, "", False],
        "control_empty": [SUCCESS, 0, "", False],
        "descriptor": "120100020000004009120100341201020302",
        "contradiction": "00000000",
        "bulk_short": [SUCCESS, 7, b"message".hex(), False],
        "bulk_out": [SUCCESS, 5, b"12345".hex(), False],
        "bulk_exact": [SUCCESS, 5, b"12345".hex(), False],
        "zero_out": [SUCCESS, 0, "", False],
        "zero_in": [SUCCESS, 0, "", False],
        "babble": [BABBLE, 4, b"0123".hex(), False],
        "large": 1000000,
        "interrupt_out": [SUCCESS, 8, b"12345678".hex(), False],
        "interrupt_in": [SUCCESS, 8],
        "halting": [STALL, STALL, STALL],
        "cleared": [SUCCESS, SUCCESS],
        "clear_nothing": IOERROR,
        "timeout": [TIMEOUT, 0, "", False],
        "in_submit_or_cancel": 0,
        "cancel": [CANCELLED, 0, "", False],
        "twice": "<Transfer bulk endpoint=0x86 length=64> has not completed yet",
        "in_order": True,
        "many_cancelled": True,
        "alternate": [SUCCESS, IOERROR, IOERROR],
        "iso_in": [SUCCESS, [SUCCESS, 1023], [SUCCESS, 1023], [SUCCESS, 1023]],
        "iso_out": [SUCCESS, [SUCCESS, 0], [SUCCESS, 0], [SUCCESS, 0]],
        "unsound": [INVAL],
        "no_endpoint": IOERROR,
        "no_streams": [INVAL, 0],
        "flying": 0,
        "at_close": [CANCELLED, 0, "", False],
        "closed": [IOERROR, True, [], *["the device is closed"] * 5],
        "threads": 1,
    }.items(),
)
def test_transfers(driver: str, name: str, expected: Any) -> None:
    assert transfers(driver)[name] == expected


@both_drivers
def test_a_timeout_is_in_time(driver: str) -> None:
    assert 0.05 <= transfers(driver)["timeout_took"] < 10


@both_drivers
def test_idle_transfers_are_bounded(driver: str) -> None:
    assert 0 < transfers(driver)["pooled"] <= 3 * _native.MAX_POOLED
    assert transfers(driver)["changed_by_its_completion"] == [[0, 3000], [0, 64], [0, 64], [0, 192], [4, 0]]


STREAMS = """
device = backends.open_device("1209:0001")
device.claim()
out["speed"] = int(device.speed)
out["descriptor"] = device.configuration_descriptor.hex()
out["alloc"] = device.alloc_streams([0x81, 0x01], 4)
out["granted"] = device.alloc_streams([0x81], 100)
complete(device, make(BULK, 0x01, data=b"on stream 3", stream_id=3))
out["data"] = told(complete(device, make(BULK, 0x81, 64, stream_id=3)))
out["free"] = device.free_streams([0x81, 0x01])
complete(device, vendor_out(0x10, value=0))
until(device, lambda: device.lost)
for name, call in {
    "alloc": lambda: device.alloc_streams([0x81], 1), "free": lambda: device.free_streams([0x81]),
    "reset": device.reset, "alt": lambda: device.set_alt_setting(0, 0), "halt": lambda: device.clear_halt(0x81),
}.items():
    try:
        call()
    except DeviceLostError as error:
        out["lost_" + name] = str(error)
device.close()
"""


def test_streams_and_super_speed(tmp_path: Path) -> None:
    log = tmp_path / "log"
    found = vusb.found(STREAMS, env=vusb.environment(speed="super", log=log))
    assert found["speed"] == 3
    assert "06300003" not in found["descriptor"]
    raw = bytes.fromhex(found["descriptor"])
    companions = _companions(raw)
    assert raw[2:4] == len(raw).to_bytes(2, "little")
    assert companions, "SuperSpeed companions follow their endpoints"
    assert found["alloc"] == [SUCCESS, 4]
    assert found["granted"] == [SUCCESS, 16]
    assert found["data"] == [SUCCESS, 11, b"on stream 3".hex(), False]
    assert found["free"] == SUCCESS
    lines = log.read_text().splitlines()
    assert [line for line in lines if "streams" in line][:3] == [
        "alloc_streams 4 eps=2",
        "alloc_streams 100 eps=1",
        "free_streams 0 eps=2",
    ]
    for name in ("alloc", "free", "reset", "alt", "halt"):
        assert "unplugged" in found[f"lost_{name}"]


def _companions(raw: bytes) -> list[bytes]:
    """SuperSpeed companions, each of which has to follow an endpoint."""
    found, offset, before = [], 0, 0
    while offset < len(raw):
        if raw[offset + 1] == 0x30:
            assert before == 5
            found.append(raw[offset : offset + raw[offset]])
        before = raw[offset + 1]
        offset += raw[offset]
    assert offset == len(raw)
    return found


# ================================================================ events

EVENTS = """
device = backends.open_device("1209:0001", event_thread=sys.argv[1] == "thread")
device.claim()

# an application's own loop
def poll_until(condition):
    end = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < end
        poller = select.poll()
        for fd, events in device.pollfds():
            poller.register(fd, events)
        wait = device.next_timeout()
        out["polls"] = out.get("polls", 0) + 1
        poller.poll(min(LIMIT, LIMIT if wait is None else wait) * 1000)
        device.handle_events(0)

out["idle_timeout"] = device.next_timeout()
done = []
for length in range(1, 20):
    device.submit(make(INTERRUPT, 0x83, length, done.append))
poll_until(lambda: len(done) == 19)
out["polled"] = [int(t.status) for t in done]
device.submit(make(BULK, 0x86, 8, done.append, timeout=0.02))
poll_until(lambda: len(done) == 20)
out["polled_timeout"] = int(done[-1].status)

# cancelled by another thread while this one polls
hanging = make(BULK, 0x86, 8, done.append)
device.submit(hanging)
threading.Timer(0.05, device.cancel, [hanging]).start()
poll_until(lambda: len(done) == 21)

# woken by another thread, in a wait and in a poll
threading.Timer(0.05, device.wake).start()
device.handle_events(None)
threading.Timer(0.05, device.wake).start()
woken = []
threading.Timer(0.05, lambda: (woken.append(1), device.wake())).start()
poll_until(lambda: woken)
device.wake()
device.handle_events(None)

# submitted by another thread while this one waits
threading.Timer(0.05, device.submit, [make(BULK, 0x82, 8, done.append)]).start()
while len(done) < 22:
    device.handle_events(None)

# completions that raise
def fail(transfer):
    done.append(transfer)
    raise RuntimeError("of a completion")
del done[:]
device.submit(make(BULK, 0x82, 8, fail))
device.submit(make(BULK, 0x82, 8, done.append))
device.submit(make(BULK, 0x82, 8, fail))
errors = 0
while len(done) < 3:
    assert errors < 3
    try:
        poll_until(lambda: len(done) == 3)
    except RuntimeError:
        errors += 1
out["raised"] = errors

# another thread handles events: this call only waits
holder = threading.Thread(target=device.handle_events, args=[None])
holder.start()
while not device._completions._turn.acquire(blocking=False) is False:
    device._completions._turn.release()
began = time.monotonic()
device.handle_events(0.05)
out["only_waited"] = time.monotonic() - began >= 0.05
device.wake()
holder.join()

# a synchronous call of pyusb runs libusb's events too: what it completes is not lost
del done[:]
device.submit(make(BULK, 0x82, 8, done.append))
out["serial"] = usb.util.get_string(device.device, device.device.iSerialNumber)
poll_until(lambda: done)

# so do calls from elsewhere of which nobody tells: a poll looks again after a while
del done[:]
import ctypes
from usbredir.backends import _context
device.submit(make(BULK, 0x82, 8, done.append))
if not device._context.threaded:
    out["foreign_timeout"] = device.next_timeout()
    end = time.monotonic() + LIMIT
    while not _context._landed:
        assert time.monotonic() < end
        device._library.libusb_handle_events_timeout_completed(
            device._context._address, ctypes.byref(_context.TimeVal(1, 0)), ctypes.byref(ctypes.c_int(0)))
    out["foreign_landed"] = device.next_timeout()
poll_until(lambda: done)

# nothing that lands in a libusb callback runs Python code, so a signal's exception cannot be lost there
import signal
def interrupted(number, frame):
    raise KeyboardInterrupt
signal.signal(signal.SIGALRM, interrupted)
signal.setitimer(signal.ITIMER_REAL, 0.05)
try:
    while True:
        device.handle_events(None)
except KeyboardInterrupt:
    out["interrupted"] = True
out["afterwards"] = told(complete(device, make(BULK, 0x82, 8)))[0]
device.close()
"""


@both_drivers
def test_events(driver: str) -> None:
    """An application's own loop, wake, other threads, completions that raise, a second waiter, signals."""
    found = vusb.found(EVENTS, driver)
    assert found["idle_timeout"] is None
    assert set(found["polled"]) == {SUCCESS}
    assert found["polled_timeout"] == TIMEOUT
    assert found["polls"] < 500, "no busy loop"
    assert found["raised"] == 2
    assert found["only_waited"]
    assert found["serial"] == "0001"
    assert found.get("foreign_timeout", 1.0) <= 1.0
    assert found.get("foreign_landed", 0.0) == 0.0
    assert found["interrupted"]
    assert found["afterwards"] == SUCCESS


NO_DESCRIPTORS = """
from usbredir.backends._context import Context
Context._read_pollfds = Context.fd_added = lambda self, *arguments: None
device = backends.open_device("1209:0001")
device.claim()
out["pollfds"] = len(device.pollfds())
out["data"] = told(complete(device, make(BULK, 0x82, 8)))[0]
out["thread"] = [thread.name for thread in threading.enumerate()]
device.close()
"""


def test_a_system_without_descriptors() -> None:
    """Windows: an event thread, asked for or not."""
    found = vusb.found(NO_DESCRIPTORS)
    assert found == {"pollfds": 1, "data": SUCCESS, "thread": ["MainThread", "usbredir-libusb"]}


SHARED = """
from usbredir.backends._context import Context
first, second = (backends.wrap(d, event_thread=sys.argv[1] == "thread") for d in same_device_twice())
out["one_context"] = first._context is second._context
try:
    backends.wrap(first.device)
except DeviceClaimError as error:
    out["twice"] = str(error)

def work(device, endpoint, kind, counts):
    def again(transfer):
        counts.append(int(transfer.status))
        if len(counts) < 2000:
            device.submit(make(kind, endpoint, 64, again))
    for _ in range(8):
        device.submit(make(kind, endpoint, 64, again))
    until(device, lambda: len(counts) >= 2000)

counts = [], []
threads = [
    threading.Thread(target=work, args=[first, 0x82, BULK, counts[0]]),
    threading.Thread(target=work, args=[second, 0x83, INTERRUPT, counts[1]]),
]
for thread in threads: thread.start()
for thread in threads: thread.join(LIMIT)
out["counts"] = [len(c) >= 2000 and set(c) == {0} for c in counts]

# one waits for ever while the other, which brought the event thread, goes: it has to notice
waiting = []
hanging = make(INTERRUPT, 0x83, 8, waiting.append)
thread = threading.Thread(target=until, args=[second, lambda: waiting])
first._context.start_thread()
thread.start()
first._context.stop_thread()
second.submit(hanging)
thread.join(LIMIT)
out["went_on"] = len(waiting)

# cancelling and closing under load, from other threads
stop = []
def load(device):
    def again(transfer):
        if not stop:
            device.submit(make(BULK, 0x82, 64, again))
    for _ in range(16):
        device.submit(make(BULK, 0x82, 64, again))
    while not stop:
        device.handle_events(1.0)
def canceller(device):
    while not stop:
        for transfer in list(device._flying):
            device.cancel(transfer)
threads = [threading.Thread(target=load, args=[d]) for d in (first, second)]
threads.append(threading.Thread(target=canceller, args=[first]))
for thread in threads: thread.start()
threads[0].join(0.3)
began = time.monotonic()
first.close()
out["close_took"] = time.monotonic() - began
stop.append(1)
for thread in threads: thread.join(LIMIT)
out["alive"] = [thread.is_alive() for thread in threads]
out["other"] = told(complete(second, make(BULK, 0x82, 8)))[0]
second.close()
from usbredir.backends import _context
out["in_flight"] = len(_context._in_flight)
out["again"] = backends.wrap(first.device).close()
"""


@both_drivers
def test_devices_share_a_context(driver: str) -> None:
    """Two devices of one context in two threads; closing one under load."""
    vusb_environment = vusb.environment(int_period_us=20, bulk_latency_us=20)
    found = vusb.found(SHARED, driver, env=vusb_environment)
    assert found["one_context"]
    assert "in use by this program" in found["twice"]
    assert found["counts"] == [True, True]
    assert found["went_on"] == 1
    assert found["close_took"] < 4
    assert found["alive"] == [False, False, False]
    assert found["other"] == SUCCESS
    assert found["in_flight"] == 0


# ================================================================ loss

LOST = """
device = backends.open_device("1209:0001", event_thread=sys.argv[1] == "thread")
device.claim()
if sys.argv[2] == "idle":
    while not device.lost:
        device.handle_events(LIMIT)
    out["status"] = 3, True
else:
    done = []
    for _ in range(5):
        device.submit(make(BULK, 0x86, 64, done.append))
    until(device, lambda: len(done) == 5)
    out["status"] = sorted({(int(t.status), t.device_lost) for t in done})[0]
after = make(BULK, 0x82, 64)
out["after"] = device.submit(after), after.device_lost
out["lost"] = device.lost
device.release(give_back=True)
began = time.monotonic()
device.close()
out["close_took"] = time.monotonic() - began
"""


@both_drivers
@pytest.mark.parametrize("state", ["idle", "busy"])
def test_unplugging(driver: str, state: str) -> None:
    """Noticed without a transfer in flight too: libusb tells that a descriptor is not to be polled any more."""
    found = vusb.found(LOST, driver, state, env=vusb.environment(unplug_after_ms=300))
    assert found["status"] == [IOERROR, True]
    assert found["after"] == [IOERROR, True]
    assert found["lost"]
    assert found["close_took"] < 4


# ================================================================ claims and configurations

CLAIMS = """
device = backends.open_device("1209:0001")
device.release(give_back=True)
device.claim()
device.claim()
device.reset()
device.release(give_back=False)
out["set"] = device.set_configuration(2), device.set_configuration(7)
out["two"] = device.configuration_descriptor[5], device.configuration_descriptor[4]
device.claim()
device.release(give_back=True)
out["back"] = device.configuration_descriptor[5]
device.release(give_back=True)
device.close()
"""
SESSION = """
from usbredir.host import Host, HostCallbacks
device = backends.open_first(find_all(IDS, new_backend()) * 2)
out["remembered"] = device.device._ctx._claimed_intf == set()
class Callbacks(HostCallbacks):
    def read(self, count):
        return None
    def write(self, data):
        return len(data)
host = Host(Callbacks(), device)
host.close()
device.close()
"""


def test_order_of_claims(tmp_path: Path) -> None:
    """Drivers are detached with the claim and return after all is released; a changed configuration is changed back."""
    log = tmp_path / "log"
    found = vusb.found(CLAIMS, env=vusb.environment(driver=1, log=log))
    assert found["set"] == [SUCCESS, IOERROR]
    assert found["two"] == [2, 1]
    assert found["back"] == 1
    claim = ["detach 0", "claim 0", "detach 1", "claim 1"]
    release = ["release 0", "release 1"]
    assert log.read_text().splitlines() == [
        "open",
        *claim,
        *[*release, "reset", *claim],
        *release,
        *["set_config 2", "set_config 7"],
        *["detach 0", "claim 0", "release 0", "reset", "set_config 1"],
        "close",
    ]


def test_order_of_a_session(tmp_path: Path) -> None:
    """As usbredirect's: HOST_BEHAVIOUR, "The usbredirect tool"."""
    log = tmp_path / "log"
    assert vusb.found(SESSION, env=vusb.environment(driver=1, log=log))["remembered"]
    claim = ["detach 0", "claim 0", "detach 1", "claim 1"]
    release = ["release 0", "release 1"]
    assert log.read_text().splitlines() == [
        "open",
        *[*claim, *release, "attach 0", "attach 1"],
        *claim,
        *[*release, "reset", *claim],
        *[*release, "reset", "attach 0", "attach 1"],
        "close",
    ]


UNCONFIGURED = """
try:
    backends.open_device("1209:0001")
except DeviceError as error:
    out["open"] = error.reason, str(error)
device = backends.wrap(find_all(IDS, new_backend())[0])
out["descriptor"] = device.configuration_descriptor
device.claim()
out["set"] = device.set_configuration(1)
out["now"] = device.configuration_descriptor[5]
device.claim()
device.release(give_back=True)
out["restored"] = device.configuration_descriptor
device.close()

# held by somebody else
device = backends.wrap(find_all(IDS, new_backend())[0])
device.set_configuration(1)
other, another = (backends.wrap(d) for d in same_device_twice())
other.claim()
try:
    another.claim()
except DeviceClaimError as error:
    out["busy"] = error.reason, str(error)
out["nothing_claimed"] = [list(another._claimed), sorted(another.device._ctx._claimed_intf)]
other.close()
another.claim()
another.close()
device.close()
"""


def test_unconfigured_and_busy(tmp_path: Path) -> None:
    """An unconfigured device is refused by open_device, works with wrap, and is unconfigured again afterwards."""
    found = vusb.found(UNCONFIGURED, env=vusb.environment(config=0, log=tmp_path / "log"))
    assert found["open"][0] == "unconfigured"
    assert "plug it in again" in found["open"][1]
    assert found["descriptor"] is None
    assert found["set"] == SUCCESS
    assert found["now"] == 1
    assert found["restored"] is None
    assert "set_config -1" in (tmp_path / "log").read_text()
    assert found["busy"][0] == "busy"
    assert "interface 0" in found["busy"][1]
    assert "another program" in found["busy"][1]
    assert found["nothing_claimed"] == [[], []]


# ================================================================ file descriptors

FD = """
fd = os.open("/dev/bus/usb/001/002", os.O_RDWR)
import usb.backend.libusb1
device = backends.open_fd(fd, event_thread=sys.argv[1] == "thread")
out["context"] = "ctx" in usb.backend.libusb1._lib_object.__dict__
out["ids"] = device.device.idVendor, device.device.idProduct, device.device.address
out["descriptor"] = device.device_descriptor.hex(), len(device.configuration_descriptor)
device.claim()
out["data"] = told(complete(device, make(BULK, 0x82, 8)))[:2]
complete(device, vendor_out(0x10, value=int(sys.argv[2])))
while sys.argv[2] != "60000" and not device.lost:
    device.handle_events(LIMIT)
device.close()
out["still_open"] = os.fstat(fd).st_mode > 0
usb_device = device.device
try:
    backends.wrap(usb_device)
except DeviceError as error:
    out["again"] = type(error).__name__
if sys.argv[2] == "60000":
    device = backends.open_fd(fd)
    out["another"] = told(complete(device, make(BULK, 0x82, 8)))[0] if device.claim() is None else None
    device.close()
    out["listed"] = [info.address for info in backends.list_devices()]
for wrong in (0, 99, -1):
    try:
        backends.open_fd(wrong)
    except DeviceError as error:
        out.setdefault("wrong", []).append(f"file descriptor {wrong} cannot" in str(error))
del device, usb_device
gc.collect()
"""


@both_drivers
@pytest.mark.parametrize("lost", [False, True])
def test_open_fd(driver: str, lost: bool, tmp_path: Path) -> None:
    """No list of devices, no opening; the descriptor stays the caller's, and is usable again."""
    env = vusb.environment(log=tmp_path / "log")
    env["LD_PRELOAD"] = f"{vusb.fd_library()} {env['LD_PRELOAD']}"
    found = vusb.found(FD, driver, "100" if lost else "60000", env=env)
    assert not found["context"], "no context that looks for devices was made"
    assert found["ids"] == [0x1209, 1, 2]
    assert found["descriptor"] == ["120100020000004009120100341201020302", 129]
    assert found["data"] == [SUCCESS, 8]
    assert found["still_open"]
    assert found["again"] == "DeviceError" if not lost else found["again"]
    assert found["wrong"] == [True, True, True]
    log = (tmp_path / "log").read_text().splitlines()
    assert log.count("open") == (1 if lost else 2), "list_devices opens it, to read its texts"
    assert log.count("close") == log.count("open") - 1
    if not lost:
        assert found["another"] == SUCCESS
        assert found["listed"] == [1, 2]


# ================================================================ without a bus


INTERNALS = """
import usb.backend.libusb1 as libusb1
backend = new_backend()
device = find_all(IDS, backend)[0]
out["lib"] = [type(backend.lib).__name__, os.path.exists(backend.lib._name), bool(backend.ctx.value)]
out["module"] = [hasattr(libusb1, name) for name in (
    "_LibUSB", "_Device", "_check", "_load_library", "_setup_prototypes", "_lib", "_lib_object")]
out["closed"] = device._ctx.handle is None
handle = device._ctx.managed_open()
out["handle"] = [device._ctx.handle is handle, bool(handle.handle.value), handle.devid == device._ctx.dev.devid]
device._ctx.managed_claim_interface(device, 0)
out["claimed"] = sorted(device._ctx._claimed_intf)
device._ctx.managed_release_interface(device, 0)
device._ctx.dispose(device)
out["disposed"] = [device._ctx.handle is None, sorted(device._ctx._claimed_intf)]
devid = device._ctx.dev.devid
out["devid"] = isinstance(getattr(devid, "value", devid), int)
# The last reference to a backend may be a device's: the context has to end after it.
loose = find_all(IDS, new_backend())[0]
del loose
gc.collect()
"""


def test_pyusb_internals() -> None:
    """The parts of pyusb without a promise that we rely on."""
    found = vusb.found(INTERNALS)
    assert found["lib"][1:] == [True, True]
    assert all(found["module"])
    assert found["closed"]
    assert found["handle"] == [True, True, True]
    assert found["claimed"] == [0]
    assert found["disposed"] == [True, []]
    assert found["devid"]


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return _libusb.load(load_library()._name)


def transfer(kind: TransferType = TransferType.BULK, endpoint: int = 0x81, length: int = 16, **more: Any) -> Transfer:
    return Transfer(kind, endpoint, length, lambda _: None, **more)


@pytest.fixture
def native(library: ctypes.CDLL) -> Iterator[_native.NativeTransfer]:
    made = _native.NativeTransfer(library, 1024, 0)
    yield made
    made.free()


@pytest.mark.parametrize(
    ("code", "actual", "status", "length"),
    [
        (2, 5, Status.TIMEOUT, 5),
        (4, 3, Status.STALL, 3),
        (6, 16, Status.BABBLE, 16),
        (0, 17, Status.SUCCESS, 16),
        (0, 2**31 - 1, Status.SUCCESS, 16),
        (0, -1, Status.SUCCESS, 0),
        (99, 4, Status.IOERROR, 4),
        (-1, 0, Status.IOERROR, 0),
    ],
)
def test_what_libusb_says_is_checked(
    native: _native.NativeTransfer, code: int, actual: int, status: int, length: int
) -> None:
    """Partial data of a transfer that failed is kept; lengths outside the buffer are not believed."""
    asked = transfer()
    native.fill(asked, 1, 2)
    memoryview(native.buffer).cast("B")[:20] = bytes(range(20))
    _libusb.RESULT.pack_into(_libusb.bytes_at(native.address, 60), _libusb.STATUS_OFFSET, code, 16, actual)
    native.read(asked)
    assert asked.status == status
    assert asked.actual_length == length
    assert bytes(asked.data) == bytes(range(length))


@pytest.mark.parametrize(("code", "actual", "got"), [(0, 9999, 8), (0, 3, 3), (-18, 8, 8), (1, 8, 0), (55, 8, 0)])
def test_what_libusb_says_of_packets_is_checked(library: ctypes.CDLL, code: int, actual: int, got: int) -> None:
    made = _native.NativeTransfer(library, 1024, 2)
    asked = transfer(TransferType.ISO, 0x84, 16, iso_lengths=[8, 8])
    made.fill(asked, 1, 2)
    memoryview(made.buffer).cast("B")[:24] = bytes(range(24))
    at = _libusb.HEAD.size
    _libusb.bytes_at(made.address, at + 24)[at + 12 : at + 24] = b"".join(
        number.to_bytes(4, "little", signed=number < 0) for number in (8, actual, code)
    )
    made.read(asked)
    assert [bytes(packet.data) for packet in asked.iso_results] == [b"", bytes(range(8, 8 + got))]
    assert asked.iso_results[1].status == (Status.SUCCESS if code == 0 else Status.IOERROR)
    made.free()


def taken(pool: _native.Pool, wanted: Transfer) -> _native.NativeTransfer:
    return pool.take(wanted) or pool.make(wanted)


def test_the_pool_is_bounded(library: ctypes.CDLL) -> None:
    """By number per size and by bytes altogether, and sizes that are not used any more make room."""
    pool = _native.Pool(library)
    small = [taken(pool, transfer(length=100)) for _ in range(_native.MAX_POOLED + 5)]
    for native in small:
        pool.give(native)
    assert pool.sizes() == {(1024, 0): _native.MAX_POOLED}
    large = [taken(pool, transfer(length=5_000_000)) for _ in range(3)]
    assert all(native.capacity == 8 * 1024 * 1024 for native in large)
    for native in large:
        pool.give(native)
    assert sum(size * count for (size, _), count in pool.sizes().items()) <= _native.MAX_POOLED_BYTES
    huge = taken(pool, transfer(length=_native.MAX_POOLED_BYTES + 1))
    pool.give(huge)
    assert (huge.capacity, 0) not in pool.sizes()
    pool.close()
    assert not pool.sizes()
    late = taken(pool, transfer())
    pool.give(late)
    assert not pool.sizes()


def test_a_pool_that_is_closed_in_the_middle_keeps_nothing(library: ctypes.CDLL) -> None:
    """Small transfers come back without the device's lock, while another thread closes the device."""
    pool = _native.Pool(library)

    class Shelf(list[_native.NativeTransfer]):
        def append(self, native: _native.NativeTransfer) -> None:
            pool.close()
            super().append(native)

    native = taken(pool, transfer())
    native.shelf = Shelf()
    assert pool.give_small(native)
    assert not native.shelf
    with pytest.raises(ValueError, match="released"):
        len(native._head)  # it was freed


def lend(library: ctypes.CDLL, pool: _native.Pool, length: int) -> tuple[_native.NativeTransfer, Transfer]:
    """A transfer that has received *length* bytes, and the native one whose buffer it reads."""
    asked = transfer(length=length)
    native = taken(pool, asked)
    native.fill(asked, 1, 2)
    _libusb.RESULT.pack_into(_libusb.bytes_at(native.address, 60), _libusb.STATUS_OFFSET, 0, length, length)
    native.read(asked)
    pool.give(native)
    return native, asked


def test_lent_buffers(library: ctypes.CDLL) -> None:
    """Large data is a view of the buffer, which is not used again, nor freed, before nobody refers to it."""
    pool = _native.Pool(library)
    native, received = lend(library, pool, 1 << 20)
    address = native.address
    assert native.lent
    assert isinstance(received.data, memoryview)
    assert received.data.readonly
    other = taken(pool, transfer(length=1 << 20))
    assert other is not native
    pool.give(other)
    part = received.data[5:10]
    received.data = b""
    assert native.lent
    del part
    assert not native.lent
    assert {taken(pool, transfer(length=1 << 20)).address for _ in range(2)} == {address, other.address}


def test_what_is_lent_is_bounded(library: ctypes.CDLL) -> None:
    """Buffers that nobody looks at any more are not kept for ever, however large; nothing is kept after close."""
    pool = _native.Pool(library)
    held = [lend(library, pool, 5_000_000) for _ in range(4)]
    assert pool._lent_bytes <= _native.MAX_POOLED_BYTES
    held[3][1].data[:3]
    late = lend(library, pool, 1 << 20)
    pool.close()
    assert pool._lent_bytes == 0
    assert not pool._lent
    again = lend(library, pool, 1 << 20)
    assert not pool._lent
    assert bytes(again[1].data[:1]) == bytes(late[1].data[:1]) == b"\0"
    held.clear()


def test_lengths_of_the_c_structure() -> None:
    assert _libusb.HEAD.size == (60 if ctypes.sizeof(ctypes.c_void_p) == 8 else 40)
    assert ctypes.sizeof(_libusb.InitOption) == 2 * ctypes.sizeof(ctypes.c_void_p)


def test_an_old_library_is_refused(tmp_path: Path) -> None:
    from usbredir.errors import DeviceError

    name = ctypes.CDLL(None)._name  # the process itself has no libusb_submit_transfer
    with pytest.raises(DeviceError, match="too old"):
        _libusb.load(name)


def test_completions_are_closed() -> None:
    """No socket, no waiting afterwards."""
    completions: Completions[int] = Completions()
    assert len(completions.pollfds()) == 1
    completions.close()
    assert completions.pollfds() == ()
    completions.handle(None, completions.wait, lambda item: None)
    completions.handle(None, completions.wait, lambda item: None)
    completions.signal()


def test_sockets_are_made_late() -> None:
    """Nobody polls, nothing is opened; a signal from before is told."""
    completions: Completions[int] = Completions()
    completions.done.append(1)
    completions.signal()
    (descriptor,) = completions.pollfds()
    got: list[int] = []
    completions.handle(None, completions.wait, got.append)
    assert got == [1]
    assert completions.pollfds() == (descriptor,)
    completions.close()


def test_the_protocol_has_lost() -> None:
    assert isinstance(UsbDevice.lost, property)


@pytest.mark.parametrize("timeout", [float("inf"), float("nan"), -1.0])
def test_timeouts_that_are_none(timeout: float) -> None:
    assert not _native.is_sound(transfer(timeout=timeout))


def test_a_transfer_that_could_not_be_described(native: _native.NativeTransfer) -> None:
    """Nothing is left of the attempt: the next one describes everything."""
    asked = transfer()
    native.fill(asked, 1, 2)
    with pytest.raises(struct.error):
        native.fill(transfer(length=8), "no address", 2)  # type: ignore[arg-type]
    assert native.shape is None
    native.fill(asked, 0x1234, 2)
    assert _libusb.HEAD.unpack(_libusb.bytes_at(native.address, _libusb.HEAD.size))[0] == 0x1234


@pytest.mark.parametrize(("length", "received", "lent"), [(1 << 20, 40_000, False), (65_536, 40_000, True)])
def test_a_little_data_does_not_keep_a_large_buffer(
    library: ctypes.CDLL, length: int, received: int, lent: bool
) -> None:
    """What waits to be sent is counted by its own size."""
    pool = _native.Pool(library)
    asked = transfer(length=length)
    native = taken(pool, asked)
    native.fill(asked, 1, 2)
    _libusb.RESULT.pack_into(_libusb.bytes_at(native.address, 60), _libusb.STATUS_OFFSET, 0, length, received)
    native.read(asked)
    assert len(asked.data) == received
    assert native.lent is lent
    pool.give(native)
    pool.close()


def test_what_is_sent_is_kept(native: _native.NativeTransfer) -> None:
    """libusb reads the bytes where they are, whatever becomes of the transfer's own reference."""
    data = bytes(range(256)) * 32
    asked = transfer(endpoint=0x02, length=len(data), data=data)
    before = sys.getrefcount(data)
    native.fill(asked, 1, 2)
    asked.data = b""
    assert sys.getrefcount(data) > before - 1, "somebody else than the transfer refers to it"
    address = _libusb.HEAD.unpack(_libusb.bytes_at(native.address, _libusb.HEAD.size))[10]
    assert ctypes.string_at(address, len(data)) == data
    native.read(asked)
    assert sys.getrefcount(data) == before - 1


FRAGILE = """
from usbredir import device
from usbredir.backends.pyusb import open_device
device.DO_NOT_RESET.add((0x1209, 0x0001))
opened = open_device("1209:0001")
opened.claim()
opened.close()
"""


def test_a_fragile_device_is_closed_without_a_reset(tmp_path: Path) -> None:
    """Its interfaces go back all the same."""
    log = tmp_path / "log"
    vusb.run(FRAGILE, env=vusb.environment(log=log, driver=1))
    actions = log.read_text().split("\n")
    assert "reset" not in actions
    assert {"attach 0", "attach 1"} <= set(actions)


def test_what_was_described_is_known(native: _native.NativeTransfer) -> None:
    """Only a transfer that receives, and is the same in every number, needs nothing more to be written."""
    native.fill(transfer(stream_id=3, timeout=1.5), 1, 2)
    assert native.receives(transfer(stream_id=3, timeout=1.5))
    for other in (
        transfer(stream_id=3, timeout=1.0),
        transfer(stream_id=4, timeout=1.5),
        transfer(stream_id=3, timeout=1.5, length=15),
        transfer(stream_id=3, timeout=1.5, endpoint=0x82),
        transfer(TransferType.INTERRUPT, stream_id=3, timeout=1.5),
    ):
        assert not native.receives(other)
    for other in (transfer(endpoint=0x01, length=4, data=b"1234"), transfer(TransferType.CONTROL, 0x80, 4)):
        native.fill(other, 1, 2)
        assert not native.receives(other), "its data or its setup packet has to be written"


def test_data_to_send_is_where_it_was_last_put(native: _native.NativeTransfer) -> None:
    """Large bytes are sent from where they are, other buffers from the copy; the same shape changes between both."""
    large = _native.NativeTransfer(native._library, _native.LARGE_OUT, 0)

    def address() -> int:
        head = _libusb.bytes_at(large.address, _libusb.HEAD.size)
        return int(_libusb.ADDRESS.unpack_from(head, _libusb.BUFFER_OFFSET)[0])

    for data in (bytes(_native.LARGE_OUT), bytearray(b"a" * _native.LARGE_OUT), b"b" * _native.LARGE_OUT):
        large.fill(transfer(endpoint=0x01, length=len(data), data=data), 1, 2)
        assert ctypes.string_at(address(), len(data)) == data
        assert (address() == large.buffer_address) is isinstance(data, bytearray)
    large.free()
