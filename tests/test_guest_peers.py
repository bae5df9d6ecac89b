"""Guest against three hosts: one in memory, our exporter, and usbredirect 0.15; the last two with a real libusb.

The same tests, see ``guest_peers``. What a test expects of some peers only is told by attributes of
:class:`~tests.guest_peers.Peer`.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import random
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator

import pytest

from usbredir import requests
from usbredir.device import TransferResult
from usbredir.errors import ConnectionClosed, DeviceLostError
from usbredir.filter import FilterRule
from usbredir.guest import Guest
from usbredir.proto import Speed, Status, TransferType, endpoint_index
from usbredir.testing import linked_pair
from usbredir.virtual import LoopbackDevice

from .command_bed import Process, guest_at
from .guest_peers import PATIENCE, PEERS, Peer, ProcessPeer

LOOP_OUT, LOOP_IN, SINK, SOURCE = 0x01, 0x81, 0x02, 0x82
INTERRUPT_OUT, INTERRUPT_IN, ISO_OUT, ISO_IN = 0x03, 0x83, 0x04, 0x84
STALLING, SILENT = 0x85, 0x86
VENDOR_IN, VENDOR_OUT = 0xC0, 0x40
PATTERN, STORE, FETCH, COUNTERS = 0x01, 0x02, 0x03, 0x20
UNPLUG, HALT, INTERRUPT_PERIOD, ISO_PERIOD = 0x10, 0x11, 0x12, 0x13

MOMENT = 0.02
"""Seconds to wait for what does not come."""
CONNECTION_ENDED = (ConnectionClosed, OSError)
"""What a guest is told when the other process is gone: how the system says so is a matter of chance."""


# ================================================================ the peers


@pytest.fixture(scope="module", params=list(PEERS))
def peer(request: pytest.FixtureRequest) -> Iterator[Peer]:
    with contextlib.closing(PEERS[request.param]()) as made:
        yield made


@pytest.fixture
def guest(peer: Peer) -> Iterator[Guest]:
    with peer.open() as guest:
        yield guest


@pytest.fixture(scope="module", params=[name for name in PEERS if name != "memory"])
def process_peer(request: pytest.FixtureRequest) -> Iterator[ProcessPeer]:
    made = PEERS[request.param]()
    assert isinstance(made, ProcessPeer)
    with contextlib.closing(made):
        yield made


def vendor_in(guest: Guest, request: int, length: int, value: int = 0) -> TransferResult:
    return guest.control_in(VENDOR_IN, request, value, 0, length, timeout=PATIENCE)


def vendor_out(guest: Guest, request: int, value: int = 0, index: int = 0, data: bytes = b"") -> None:
    result = guest.control_out(VENDOR_OUT, request, value, index, data, timeout=PATIENCE)
    assert result.status == Status.SUCCESS


def counters(guest: Guest) -> tuple[int, ...]:
    """iso-out packets, iso-out bytes, sink bytes, interrupt-out packets, resets, cancelled, submitted, 0."""
    return struct.unpack("<8Q", vendor_in(guest, COUNTERS, 64).data)


def number_of(data: bytes | bytearray | memoryview) -> int:
    """The counter that data of a source begins with."""
    return int(struct.unpack_from("<Q", data)[0])


def send(guest: Guest, data: bytes, stream_id: int = 0) -> None:
    assert guest.bulk_out(LOOP_OUT, data, stream_id=stream_id, timeout=PATIENCE) == TransferResult(Status.SUCCESS)


def take(guest: Guest, length: int = 1 << 20, stream_id: int = 0) -> tuple[int, bytes]:
    result = guest.bulk_in(LOOP_IN, length, stream_id=stream_id, timeout=PATIENCE)
    return result.status, bytes(result.data)


def some_bytes(size: int) -> bytes:
    return bytes(i % 251 for i in range(size))


def endpoint_type(guest: Guest, address: int) -> int:
    assert guest.endpoints is not None
    return guest.endpoints.type[endpoint_index(address)]


def packet_size(guest: Guest, address: int) -> int:
    assert guest.endpoints is not None
    assert guest.endpoints.max_packet_size is not None
    return guest.endpoints.max_packet_size[endpoint_index(address)]


# ================================================================ what the device is


def test_hello_and_the_device(peer: Peer, guest: Guest) -> None:
    assert guest.host_version == peer.version
    connect = guest.wait_for_device(0)
    assert connect is guest.device
    assert (connect.vendor_id, connect.product_id, connect.device_version_bcd) == (0x1209, 0x0001, 0x1234)
    assert connect.speed == Speed.HIGH
    interfaces = guest.interfaces
    assert interfaces is not None
    assert interfaces.interface_count == 2
    assert interfaces.interface[:2] == (0, 1)
    assert interfaces.interface_class[:2] == peer.interface_classes
    types = {LOOP_OUT: TransferType.BULK, SOURCE: TransferType.BULK, INTERRUPT_IN: TransferType.INTERRUPT}
    assert {address: endpoint_type(guest, address) for address in types} == types
    assert endpoint_type(guest, ISO_IN) == TransferType.INVALID
    assert packet_size(guest, LOOP_IN) == 512


@pytest.mark.parametrize("speed", [Speed.FULL, Speed.HIGH, Speed.SUPER])
def test_speeds(peer: Peer, speed: Speed) -> None:
    sizes = {Speed.FULL: 64, Speed.HIGH: 512, Speed.SUPER: 1024}
    with peer.open(speed) as guest:
        assert guest.device is not None
        assert guest.device.speed == speed
        assert packet_size(guest, LOOP_IN) == sizes[speed]
        send(guest, b"hello")
        assert take(guest) == (Status.SUCCESS, b"hello")


def test_descriptors(peer: Peer, guest: Guest) -> None:
    assert guest.get_descriptor(1, 0, 18)[8:14] == bytes.fromhex("091201003412")
    header = guest.get_descriptor(2, 0, 9)
    total = int.from_bytes(header[2:4], "little")
    assert (len(header), header[5]) == (9, 1)
    assert len(guest.get_descriptor(2, 0, 1024)) == total
    assert guest.get_descriptor(2, 1)[5] == 2
    assert guest.get_descriptor(3, 2, language=0x0409)[2:].decode("utf-16-le") == peer.product
    assert guest.get_descriptor(3, 200, language=0x0409) == b""


def test_configurations(guest: Guest) -> None:
    """A change announces the new endpoints."""
    assert guest.get_configuration(timeout=PATIENCE) == (Status.SUCCESS, 1)
    assert guest.set_configuration(2, timeout=PATIENCE) == (Status.SUCCESS, 2)
    assert guest.get_configuration(timeout=PATIENCE) == (Status.SUCCESS, 2)
    assert endpoint_type(guest, LOOP_IN) == TransferType.BULK
    assert endpoint_type(guest, SOURCE) == TransferType.INVALID
    assert guest.bulk_in(SOURCE, 8, timeout=PATIENCE).status != Status.SUCCESS
    send(guest, b"hello")
    assert take(guest) == (Status.SUCCESS, b"hello")
    status, value = guest.set_configuration(77, timeout=PATIENCE)
    assert (status != Status.SUCCESS, value) == (True, 2)
    assert guest.set_configuration(1, timeout=PATIENCE) == (Status.SUCCESS, 1)
    assert guest.bulk_in(SOURCE, 8, timeout=PATIENCE).status == Status.SUCCESS


def test_alternate_settings(guest: Guest) -> None:
    assert guest.get_alt_setting(1, timeout=PATIENCE) == (Status.SUCCESS, 0)
    for alternate, size in ((1, 1023), (2, 3 * 1024)):
        assert guest.set_alt_setting(1, alternate, timeout=PATIENCE) == (Status.SUCCESS, alternate)
        assert guest.get_alt_setting(1, timeout=PATIENCE) == (Status.SUCCESS, alternate)
        assert endpoint_type(guest, ISO_IN) == TransferType.ISO
        assert packet_size(guest, ISO_IN) == size
    status, alternate = guest.set_alt_setting(1, 9, timeout=PATIENCE)
    assert (status != Status.SUCCESS, alternate) == (True, 2)
    assert guest.set_alt_setting(9, 0, timeout=PATIENCE)[0] != Status.SUCCESS
    assert guest.set_alt_setting(1, 0, timeout=PATIENCE) == (Status.SUCCESS, 0)


# ================================================================ transfers


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 512, 4096])
def test_control_transfers(guest: Guest, size: int) -> None:
    assert vendor_in(guest, PATTERN, size, value=7) == TransferResult(0, bytes((7 + i) & 0xFF for i in range(size)))
    data = some_bytes(size)
    vendor_out(guest, STORE, data=data)
    assert vendor_in(guest, FETCH, 4096) == TransferResult(Status.SUCCESS, data)


@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, 1024, 16_383, 16_384, 65_537, 1_000_000])
def test_bulk_transfers(guest: Guest, size: int) -> None:
    """As long as asked for, and shorter."""
    data = some_bytes(size)
    for length in (size, size + 1, size + 100_000):
        send(guest, data)
        assert take(guest, length) == (Status.SUCCESS, data)


@pytest.mark.parametrize("size", [1, 512, 1_000_000])
def test_sink_and_source(guest: Guest, size: int) -> None:
    before = counters(guest)[2]
    assert guest.bulk_out(SINK, some_bytes(size), timeout=PATIENCE) == TransferResult(Status.SUCCESS)
    assert counters(guest)[2] - before == size
    assert len(guest.bulk_in(SOURCE, size, timeout=PATIENCE).data) == size


def test_a_babble_is_a_result(guest: Guest) -> None:
    """A message that is too long for the transfer; the next one is not concerned."""
    send(guest, bytes(2000))
    send(guest, b"next")
    status, data = take(guest, 512)
    assert status == Status.BABBLE
    assert len(data) <= 512
    assert take(guest) == (Status.SUCCESS, b"next")


def test_a_stall_is_a_result(guest: Guest) -> None:
    """Until the halt is cleared, and on its endpoint only."""
    for _ in range(2):
        assert guest.bulk_in(STALLING, 64, timeout=PATIENCE).status == Status.STALL
    send(guest, b"hello")
    assert take(guest) == (Status.SUCCESS, b"hello")
    assert guest.clear_halt(STALLING, timeout=PATIENCE).status == Status.SUCCESS
    result = guest.bulk_in(STALLING, 64, timeout=PATIENCE)
    assert (result.status, len(result.data)) == (Status.SUCCESS, 64)
    assert guest.bulk_in(STALLING, 64, timeout=PATIENCE).status == Status.STALL


def test_a_halt_of_the_devices_own(guest: Guest) -> None:
    for endpoint in (LOOP_IN, LOOP_OUT):
        vendor_out(guest, HALT, index=endpoint)
    assert guest.bulk_out(LOOP_OUT, b"refused", timeout=PATIENCE).status == Status.STALL
    assert guest.bulk_in(LOOP_IN, 64, timeout=PATIENCE).status == Status.STALL
    for endpoint in (LOOP_IN, LOOP_OUT):
        assert guest.clear_halt(endpoint, timeout=PATIENCE).status == Status.SUCCESS
    send(guest, b"taken")
    assert take(guest) == (Status.SUCCESS, b"taken")


def test_a_control_stall_needs_no_clearing(guest: Guest) -> None:
    assert guest.control_in(VENDOR_IN, 0x99, 0, 0, 4, timeout=PATIENCE).status == Status.STALL
    assert guest.control_out(VENDOR_OUT, 0x99, 0, 0, b"x", timeout=PATIENCE).status == Status.STALL
    assert vendor_in(guest, PATTERN, 4).status == Status.SUCCESS


def test_an_endpoint_that_the_device_does_not_have(guest: Guest) -> None:
    assert guest.bulk_in(0x8A, 64, timeout=PATIENCE).status not in (Status.SUCCESS, Status.TIMEOUT)
    assert guest.bulk_out(0x0A, b"x", timeout=PATIENCE).status not in (Status.SUCCESS, Status.TIMEOUT)


def test_timeouts(guest: Guest) -> None:
    """The transfer is cancelled at the device, and takes nothing that comes later."""
    cancelled = counters(guest)[5]
    for timeout in (0, MOMENT, MOMENT):
        assert guest.bulk_in(LOOP_IN, 64, timeout=timeout) == TransferResult(Status.TIMEOUT)
    assert guest.bulk_in(SILENT, 64, timeout=MOMENT).status == Status.TIMEOUT
    assert counters(guest)[5] - cancelled == 4
    send(guest, b"hello")
    assert take(guest) == (Status.SUCCESS, b"hello")


def test_interrupt_out(guest: Guest) -> None:
    before = counters(guest)[3]
    for _ in range(10):
        assert guest.interrupt_out(INTERRUPT_OUT, bytes(8), timeout=PATIENCE) == TransferResult(Status.SUCCESS)
    assert counters(guest)[3] - before == 10


# ================================================================ many at a time


@pytest.mark.parametrize("depth", [16, 200])
def test_many_in_flight(guest: Guest, depth: int) -> None:
    """Each future has the answer to its own request, in whatever order they are asked."""
    futures = {
        value: guest.submit(requests.control_in(VENDOR_IN, PATTERN, value, 0, 16, timeout=PATIENCE))
        for value in range(depth)
    }
    sources = [guest.submit(requests.bulk_in(SOURCE, 64, timeout=PATIENCE)) for _ in range(depth)]
    order = list(futures)
    random.Random(depth).shuffle(order)
    for value in order:
        assert futures[value].result() == TransferResult(Status.SUCCESS, bytes((value + i) & 0xFF for i in range(16)))
    numbers = [number_of(future.result().data) for future in sources]
    assert numbers == list(range(numbers[0], numbers[0] + depth))


@pytest.mark.parametrize("depth", [16, 200])
def test_many_that_wait_for_data(guest: Guest, depth: int) -> None:
    """Transfers of an endpoint are served in order; some are cancelled meanwhile; new ones pass the old."""
    waiting = [guest.submit(requests.bulk_in(LOOP_IN, 64, timeout=PATIENCE)) for _ in range(depth)]
    assert guest.get_configuration(timeout=PATIENCE) == (Status.SUCCESS, 1)  # all have reached the host
    rng = random.Random(depth)
    cancelled = rng.sample(range(depth), depth // 2)
    for index in cancelled:
        assert waiting[index].cancel()
    for index in cancelled:
        assert waiting[index].result(PATIENCE) == TransferResult(Status.CANCELLED)
    left = [future for future in waiting if not future.done()]
    assert len(left) == depth - depth // 2
    sent = [guest.submit(requests.bulk_out(LOOP_OUT, b"%d" % number)) for number in range(len(left))]
    results = dict(enumerate(left))
    for number in rng.sample(range(len(left)), len(left)):
        assert results[number].result(PATIENCE) == TransferResult(Status.SUCCESS, b"%d" % number)
    assert {future.result(PATIENCE) for future in sent} == {TransferResult(Status.SUCCESS)}


def test_cancelling(guest: Guest) -> None:
    """The result follows; what is done, or is no transfer, cannot be cancelled."""
    future = guest.submit(requests.bulk_in(SILENT, 64))
    with pytest.raises(TimeoutError):
        future.result(MOMENT)
    assert future.cancel()
    assert not future.cancel()
    assert future.result(PATIENCE) == TransferResult(Status.CANCELLED)
    assert not future.cancel()
    assert not guest.submit(requests.get_configuration()).cancel()


# ================================================================ streams


def test_interrupt_receiving(guest: Guest) -> None:
    """Every packet, in order; again after a stop."""
    vendor_out(guest, INTERRUPT_PERIOD, 500)
    for _ in range(2):
        assert guest.start_interrupt_receiving(INTERRUPT_IN, timeout=PATIENCE) == Status.SUCCESS
        results = [guest.receive(INTERRUPT_IN, timeout=PATIENCE) for _ in range(20)]
        assert {(result.status, len(result.data)) for result in results} == {(Status.SUCCESS, 8)}
        numbers = [number_of(result.data) for result in results]
        assert numbers == list(range(numbers[0], numbers[0] + 20))
        assert guest.stop_interrupt_receiving(INTERRUPT_IN, timeout=PATIENCE) == Status.SUCCESS


@pytest.mark.parametrize(("size", "transfers"), [(512, 1), (4096, 5), (65536, 16)])
def test_bulk_receiving(guest: Guest, size: int, transfers: int) -> None:
    assert guest.start_bulk_receiving(SOURCE, size, transfers, timeout=PATIENCE) == Status.SUCCESS
    results = [guest.receive(SOURCE, timeout=PATIENCE) for _ in range(40)]
    assert {(result.status, len(result.data)) for result in results} == {(Status.SUCCESS, size)}
    numbers = [number_of(result.data) for result in results]
    assert numbers == list(range(numbers[0], numbers[0] + 40))
    assert vendor_in(guest, PATTERN, 4).status == Status.SUCCESS  # while it runs
    assert guest.stop_bulk_receiving(SOURCE, timeout=PATIENCE) == Status.SUCCESS


def test_bulk_receiving_of_short_messages(guest: Guest) -> None:
    """Each message comes as a packet of its own."""
    assert guest.start_bulk_receiving(LOOP_IN, 1024, 4, timeout=PATIENCE) == Status.SUCCESS
    for size in (1, 511, 512, 513, 1024):
        send(guest, some_bytes(size))
        result = guest.receive(LOOP_IN, timeout=PATIENCE)
        assert (result.status, bytes(result.data)) == (Status.SUCCESS, some_bytes(size))
    assert guest.receive(LOOP_IN, timeout=MOMENT) == TransferResult(Status.TIMEOUT)
    assert guest.stop_bulk_receiving(LOOP_IN, timeout=PATIENCE) == Status.SUCCESS


def test_iso_in(guest: Guest) -> None:
    """Packets in the order of the bus, none is lost at a moderate rate."""
    vendor_out(guest, ISO_PERIOD, 250)
    assert guest.set_alt_setting(1, 1, timeout=PATIENCE) == (Status.SUCCESS, 1)
    assert guest.start_iso_stream(ISO_IN, 8, 4, timeout=PATIENCE) == Status.SUCCESS
    results = [guest.receive(ISO_IN, timeout=PATIENCE) for _ in range(200)]
    assert {(result.status, len(result.data)) for result in results} == {(Status.SUCCESS, 1023)}
    numbers = [number_of(result.data) for result in results]
    assert numbers == list(range(numbers[0], numbers[0] + 200))
    assert guest.stop_iso_stream(ISO_IN, timeout=PATIENCE) == Status.SUCCESS


def test_iso_out(guest: Guest) -> None:
    """The device gets every packet that the host's buffer holds: half a buffer at a time, and the next when it has."""
    vendor_out(guest, ISO_PERIOD, 250)
    assert guest.set_alt_setting(1, 1, timeout=PATIENCE) == (Status.SUCCESS, 1)
    packets, size, *_ = counters(guest)
    assert guest.start_iso_stream(ISO_OUT, 8, 4, timeout=PATIENCE) == Status.SUCCESS
    sizes = [100 + number for number in range(16 * 6)]
    for first in range(0, len(sizes), 16):
        for length in sizes[first : first + 16]:
            assert guest.iso_out(ISO_OUT, bytes(length)) == Status.SUCCESS
        while counters(guest)[0] - packets < first + 16:
            pass
    now = counters(guest)
    assert (now[0] - packets, now[1] - size) == (len(sizes), sum(sizes))
    assert guest.stop_iso_stream(ISO_OUT, timeout=PATIENCE) == Status.SUCCESS


@pytest.mark.parametrize(
    "start",
    [
        lambda guest: guest.start_iso_stream(SOURCE, timeout=PATIENCE),
        lambda guest: guest.start_bulk_receiving(SOURCE, 100, timeout=PATIENCE),
        lambda guest: guest.start_interrupt_receiving(SOURCE, timeout=PATIENCE),
    ],
    ids=["iso", "not whole packets", "interrupt"],
)
def test_streams_that_cannot_start(guest: Guest, start: Callable[[Guest], int]) -> None:
    """A status, not silence; the connection goes on."""
    assert start(guest) != Status.SUCCESS
    assert vendor_in(guest, PATTERN, 4).status == Status.SUCCESS


def test_streams_of_a_missing_endpoint(guest: Guest) -> None:
    """The protocol has no answer, as its type would be that of the endpoint: the guest knows better than to ask."""
    assert guest.start_iso_stream(0x8A) == Status.INVAL
    assert guest.start_interrupt_receiving(0x8A) == Status.INVAL
    assert vendor_in(guest, PATTERN, 4).status == Status.SUCCESS


def test_bulk_streams(peer: Peer) -> None:
    with peer.open(Speed.SUPER) as guest:
        status, granted = guest.alloc_streams([LOOP_OUT, LOOP_IN], 4, timeout=PATIENCE)
        assert (status, granted) == (Status.SUCCESS, 4)
        for stream_id in range(1, granted + 1):
            send(guest, b"stream %d" % stream_id, stream_id)
            assert take(guest, stream_id=stream_id) == (Status.SUCCESS, b"stream %d" % stream_id)
        if peer.separates_streams:
            send(guest, b"first", 1)
            send(guest, b"second", 2)
            assert take(guest, stream_id=2) == (Status.SUCCESS, b"second")
            assert take(guest, stream_id=1) == (Status.SUCCESS, b"first")
        assert guest.free_streams([LOOP_OUT, LOOP_IN], timeout=PATIENCE)[0] == Status.SUCCESS
        send(guest, b"plain")
        assert take(guest) == (Status.SUCCESS, b"plain")


def test_bulk_streams_of_a_device_without(guest: Guest) -> None:
    assert guest.alloc_streams([LOOP_IN], 4, timeout=PATIENCE)[0] != Status.SUCCESS


# ================================================================ the device and the guest come and go


def test_reset(peer: Peer, guest: Guest) -> None:
    """The device is told, and serves on."""
    send(guest, b"before")
    resets = counters(guest)[4]
    guest.reset()
    assert guest.get_configuration(timeout=PATIENCE) == (Status.SUCCESS, 1)
    assert counters(guest)[4] == resets + 1
    if not peer.forgets:
        assert take(guest) == (Status.SUCCESS, b"before")
    send(guest, b"after")
    assert take(guest) == (Status.SUCCESS, b"after")


def test_a_reset_ends_what_waits(guest: Guest) -> None:
    future = guest.submit(requests.bulk_in(SILENT, 64, timeout=PATIENCE))
    guest.reset()
    assert future.result(PATIENCE).status not in (Status.SUCCESS, Status.TIMEOUT)


def test_the_device_is_lost_while_calls_wait(peer: Peer) -> None:
    """Each request has its end, by a status or by DeviceLostError; later ones are refused."""
    with peer.open(alone=True) as guest:
        assert guest.start_interrupt_receiving(INTERRUPT_IN, timeout=PATIENCE) == Status.SUCCESS
        vendor_out(guest, UNPLUG, 20)
        waiting = [guest.submit(requests.bulk_in(SILENT, 64, timeout=PATIENCE)) for _ in range(20)]
        for future in waiting:
            error = future.exception(PATIENCE)
            assert isinstance(error, DeviceLostError) or future.result().status in (Status.IOERROR, Status.CANCELLED)
        with contextlib.suppress(*CONNECTION_ENDED):  # usbredirect ends
            guest.wait_for_disconnect(PATIENCE)
            assert (guest.device, guest.interfaces, guest.endpoints) == (None, None, None)
        for call in (lambda: guest.get_configuration(), lambda: guest.receive(INTERRUPT_IN)):
            with pytest.raises((DeviceLostError, *CONNECTION_ENDED)):
                call()


def test_another_device_on_the_same_connection() -> None:
    """In memory: the application gives the host another one."""
    host, guest = linked_pair(LoopbackDevice())
    with host, guest:
        for speed in (Speed.FULL, Speed.SUPER, Speed.HIGH):
            waiting = guest.submit(requests.bulk_in(SILENT, 64))
            host.set_device(None)
            guest.wait_for_disconnect(PATIENCE)
            with pytest.raises(DeviceLostError):
                waiting.result(PATIENCE)
            with pytest.raises(DeviceLostError):
                guest.get_configuration()
            host.set_device(LoopbackDevice(speed=speed))
            assert guest.wait_for_device(PATIENCE).speed == speed
            send(guest, b"hello")
            assert take(guest) == (Status.SUCCESS, b"hello")
        host.set_device(None)


def test_an_exported_device_comes_back() -> None:
    """Our exporter makes a new device when one is unplugged; the connection stays."""
    with Process("--virtual", "loopback", "--as", "127.0.0.1:0") as exporter:
        connection, guest = guest_at(exporter.address())
        with connection, guest:
            for _ in range(2):
                guest.wait_for_device(PATIENCE)
                send(guest, b"hello")
                assert take(guest) == (Status.SUCCESS, b"hello")
                vendor_out(guest, UNPLUG, 1)
                guest.wait_for_disconnect(PATIENCE)


@pytest.mark.parametrize("background", [False, True])
def test_the_connection_is_cut(process_peer: ProcessPeer, background: bool) -> None:
    """Every pending request gets the error, and so does every later one."""
    with process_peer.connect(alone=True, background=background) as (guest, process):
        guest.wait_for_device(PATIENCE)
        waiting = [guest.submit(requests.bulk_in(SILENT, 64)) for _ in range(50)]
        assert guest.start_interrupt_receiving(INTERRUPT_IN, timeout=PATIENCE) == Status.SUCCESS
        kill(process)
        errors = {type(future.exception(PATIENCE)) for future in waiting}
        assert len(errors) == 1
        assert issubclass(errors.pop(), CONNECTION_ENDED)
        for call in (guest.get_configuration, guest.wait_for_device, guest.wait_for_disconnect):
            with pytest.raises(CONNECTION_ENDED):
                call()


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait(PATIENCE)


@pytest.mark.parametrize("background", [False, True])
def test_closed_while_calls_wait(process_peer: ProcessPeer, background: bool) -> None:
    """By another thread: all end with ConnectionClosed."""
    with process_peer.connect(background=background) as (guest, _):
        guest.wait_for_device(PATIENCE)
        with concurrent.futures.ThreadPoolExecutor(5) as pool:
            waiting = [guest.submit(requests.bulk_in(SILENT, 64)) for _ in range(10)]
            calls = [pool.submit(guest.bulk_in, SILENT, 64) for _ in range(4)]
            gone = pool.submit(guest.wait_for_disconnect)
            guest.get_configuration(timeout=PATIENCE)
            guest.close()
            errors = [call.exception(PATIENCE) for call in (*calls, *waiting)]
            assert {type(error) for error in (*errors, gone.exception(PATIENCE))} == {ConnectionClosed}


def test_futures_complete_while_nobody_waits(process_peer: ProcessPeer) -> None:
    """With a background thread: as_completed gives them as they end, whichever was sent first."""
    with process_peer.connect(background=True) as (guest, _):
        guest.wait_for_device(PATIENCE)
        silent = guest.submit(requests.bulk_in(SILENT, 64))
        timed = guest.submit(requests.bulk_in(LOOP_IN, 64, timeout=MOMENT))
        quick = {guest.submit(requests.control_in(VENDOR_IN, PATTERN, value, 0, 4)): value for value in range(50)}
        ended = list(concurrent.futures.as_completed([*quick, timed], PATIENCE))
        assert len(ended) == 51
        for future, value in quick.items():
            assert future.result() == TransferResult(Status.SUCCESS, bytes((value + i) & 0xFF for i in range(4)))
        assert timed.result().status == Status.TIMEOUT
        assert not silent.done()
        assert silent.cancel()
        assert concurrent.futures.wait([silent], PATIENCE).not_done == set()
        assert silent.result().status == Status.CANCELLED


def test_rules_are_told(process_peer: ProcessPeer) -> None:
    """Rules that let the device pass."""
    rules = [FilterRule(-1, 0x1209, 0x0001, -1, True), FilterRule(-1, -1, -1, -1, False)]
    with process_peer.connect(rules=rules) as (guest, _):
        assert guest.wait_for_device(PATIENCE).product_id == 1
        assert vendor_in(guest, PATTERN, 4).status == Status.SUCCESS


def wait_for_the_end(guest: Guest) -> None:
    """Whatever device is announced meanwhile."""
    guest.wait_for_device(PATIENCE)
    guest.wait_for_disconnect(PATIENCE)


def test_rules_that_forbid_the_device(process_peer: ProcessPeer) -> None:
    """Our exporter hangs up, or offers nothing; usbredirect leaves it to the guest to refuse the device."""
    with process_peer.connect(rules=[FilterRule(-1, -1, -1, -1, False)]) as (guest, _):
        if process_peer.heeds_rules:
            with pytest.raises(CONNECTION_ENDED):
                wait_for_the_end(guest)
        else:
            guest.wait_for_device(PATIENCE)
            assert vendor_in(guest, PATTERN, 4).status == Status.SUCCESS


def test_refusing_the_device(process_peer: ProcessPeer) -> None:
    """Nothing is left to use, and the host ends the connection."""
    with process_peer.connect() as (guest, _):
        guest.wait_for_device(PATIENCE)
        waiting = guest.submit(requests.bulk_in(SILENT, 64))
        guest.reject()
        assert isinstance(waiting.exception(PATIENCE), DeviceLostError)
        with pytest.raises(DeviceLostError):
            guest.get_configuration()
        with pytest.raises(CONNECTION_ENDED):
            guest.wait_for_device(PATIENCE)


def test_guests_one_after_the_other(peer: Peer) -> None:
    """What one left behind, in flight and in its streams, does not disturb the next."""
    for _ in range(3):
        with peer.open() as guest:
            assert guest.start_interrupt_receiving(INTERRUPT_IN, timeout=PATIENCE) == Status.SUCCESS
            assert guest.start_bulk_receiving(SOURCE, 512, timeout=PATIENCE) == Status.SUCCESS
            waiting = guest.submit(requests.bulk_in(SILENT, 64))
            send(guest, b"hello")
            assert take(guest) == (Status.SUCCESS, b"hello")
        assert isinstance(waiting.exception(0), ConnectionClosed)


def test_threads_share_a_guest(peer: Peer) -> None:
    """Each thread has the answers to its own questions."""
    with peer.open() as guest, concurrent.futures.ThreadPoolExecutor(4) as pool:
        start = threading.Barrier(4)

        def ask(first: int) -> None:
            start.wait(PATIENCE)
            for value in range(first, first + 40):
                assert vendor_in(guest, PATTERN, 4, value).data == bytes((value + i) & 0xFF for i in range(4))

        for done in [pool.submit(ask, first) for first in range(0, 160, 40)]:
            done.result(PATIENCE)
