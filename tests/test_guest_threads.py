"""One guest, many threads: each call has its own answer, and none can hold up the others.

Threads wait for events, never for time. A deadlock shows as a thread that does not end.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import gc
import os
import random
import signal
import socket
import struct
import threading
import time
import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain

import pytest

from usbredir import _exchange, requests, transport
from usbredir import guest as guest_module
from usbredir.device import TransferResult
from usbredir.errors import ConnectionClosed, LocalProtocolError, UsbRedirError
from usbredir.guest import Guest
from usbredir.packets import (
    BufferedBulkPacket,
    BulkReceivingStatus,
    ConfigurationStatus,
    DeviceConnect,
    GetConfiguration,
    Packet,
    StartBulkReceiving,
)
from usbredir.parser import Parser, ParserCallbacks
from usbredir.proto import Status
from usbredir.testing import linked_pair
from usbredir.transport import Connection, GuestConnection, connect, listen
from usbredir.virtual import LoopbackDevice

LOOP_OUT, LOOP_IN, SINK, SOURCE = 0x01, 0x81, 0x02, 0x82
INTERRUPT_IN, SILENT = 0x83, 0x86

PATIENCE = 60.0
"""Seconds after which a thread counts as stuck."""
MOMENT = 0.02
"""Seconds to wait for what does not come."""
THREADS = 8
LONG = os.environ.get("USBREDIR_LONG") == "1"


# ================================================================ guests


class Watched(GuestConnection):
    """Says when a thread waits, and lets it be interrupted.

    Attributes:
        waiting: some thread has begun to wait since it was cleared.
        trouble: what the next wait raises.
    """

    def __init__(self, connection: Connection) -> None:
        super().__init__(connection)
        self.waiting = threading.Event()
        self.trouble: BaseException | None = None

    def wait(self, timeout: float | None, *, writing: bool) -> None:
        self.waiting.set()
        super().wait(timeout, writing=writing)
        trouble, self.trouble = self.trouble, None
        if trouble is not None:
            raise trouble


class Bed:
    """A guest of a loopback device, which a thread serves at the other end of a socket pair."""

    def __init__(self, *, background: bool = False) -> None:
        self.device = LoopbackDevice(interrupt_period=0)
        self._background = background
        ours, theirs = socket.socketpair()
        self._connection = Connection(ours, "host")
        self._thread = threading.Thread(target=self._serve, args=(theirs,), daemon=True)
        self._thread.start()
        self.stream = Watched(self._connection)
        self.guest = Guest(self.stream, background=background)
        self.guest.wait_for_device(PATIENCE)
        self.stream.waiting.clear()

    def _serve(self, sock: socket.socket) -> None:
        with Connection(sock, "guest") as connection, contextlib.suppress(UsbRedirError, OSError):
            transport.serve(connection, self.device)

    def until_waiting(self) -> None:
        """Until a call of another thread waits. With a thread of the guest's own: until the device has its transfer."""
        if self._background:
            until(lambda: self.device.counters["submitted"] > 0, self.guest)
        else:
            assert self.stream.waiting.wait(PATIENCE)

    def close(self) -> None:
        self.guest.close()
        self._connection.close()
        self._thread.join(PATIENCE)
        self.device.close()
        assert not self._thread.is_alive(), "the host does not end"


@pytest.fixture(params=[False, True], ids=["leaders", "background"])
def bed(request: pytest.FixtureRequest) -> Iterator[Bed]:
    with contextlib.closing(Bed(background=request.param)) as bed:
        yield bed


@pytest.fixture
def plain() -> Iterator[Bed]:
    """Without a thread of the guest's own."""
    with contextlib.closing(Bed()) as bed:
        yield bed


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    pool = ThreadPoolExecutor(THREADS)
    yield pool
    pool.shutdown(wait=False)  # a failed test leaves calls that only the end of the guest ends


def pattern(value: int, length: int = 8) -> TransferResult:
    """What vendor request 1 gives."""
    return TransferResult(Status.SUCCESS, bytes((value + i) & 0xFF for i in range(length)))


def ask(value: int, length: int = 8) -> requests.Request[TransferResult]:
    return requests.control_in(0xC0, 1, value, 0, length)


def until(condition: Callable[[], bool], guest: Guest) -> None:
    """Ask the device something until *condition*."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        guest.get_configuration()


# ================================================================ each answer belongs to its question


def mixed_calls(guest: Guest, rng: random.Random, rounds: int, numbers: list[int]) -> None:
    """Calls and futures of many kinds. What the source counts goes to *numbers*."""
    for _ in range(rounds):
        match rng.randrange(7):
            case 0:
                futures = {value: guest.submit(ask(value)) for value in rng.sample(range(60000), 4)}
                for value in rng.sample(list(futures), 4):
                    assert futures[value].result(PATIENCE) == pattern(value)
            case 1:
                assert guest.bulk_out(SINK, bytes(rng.randrange(2000))).status == Status.SUCCESS
            case 2:
                result = guest.bulk_in(SOURCE, 8, timeout=PATIENCE)
                numbers.append(struct.unpack("<Q", result.data)[0])
            case 3:
                assert guest.bulk_in(SILENT, 64, timeout=0) == TransferResult(Status.TIMEOUT)
            case 4:
                future = guest.submit(requests.bulk_in(SILENT, 64))
                assert future.cancel()
                assert future.result(PATIENCE) == TransferResult(Status.CANCELLED)
            case 5:
                assert guest.get_alt_setting(1, timeout=PATIENCE) == (Status.SUCCESS, 0)
            case _:
                value, length = rng.randrange(60000), rng.randrange(1, 64)
                assert guest.control_in(0xC0, 1, value, 0, length, timeout=PATIENCE) == pattern(value, length)


def use_by_threads(guest: Guest, pool: ThreadPoolExecutor, rounds: int) -> None:
    numbers: list[list[int]] = [[] for _ in range(THREADS)]
    done = [pool.submit(mixed_calls, guest, random.Random(n), rounds, numbers[n]) for n in range(THREADS)]
    for thread in done:
        thread.result(PATIENCE)
    assert all(seen == sorted(seen) for seen in numbers)
    assert sorted(chain.from_iterable(numbers)) == list(range(sum(map(len, numbers))))
    assert not guest._exchange.busy


def test_mixed_calls_of_many_threads(bed: Bed, pool: ThreadPoolExecutor) -> None:
    use_by_threads(bed.guest, pool, 150)


def test_mixed_calls_of_many_threads_in_memory(pool: ThreadPoolExecutor) -> None:
    device = LoopbackDevice()
    host, guest = linked_pair(device)
    with contextlib.closing(device), host, guest:
        use_by_threads(guest, pool, 20)


def test_the_reader_changes(bed: Bed, pool: ThreadPoolExecutor) -> None:
    """Whichever thread reads, the others get their answers when it has gone with its own."""
    waiting = [pool.submit(bed.guest.bulk_in, LOOP_IN, 64) for _ in range(THREADS)]
    until(lambda: bed.device.counters["submitted"] >= THREADS, bed.guest)
    for number in range(THREADS):
        bed.guest.bulk_out(LOOP_OUT, b"%d" % number)
        done, _ = concurrent.futures.wait(waiting, PATIENCE, concurrent.futures.FIRST_COMPLETED)
        assert {bytes(call.result().data) for call in done} == {b"%d" % number}
        waiting = [call for call in waiting if call not in done]
    assert not waiting


def test_thousands_at_once(plain: Bed) -> None:
    """More than the host takes before it wants its answers to be read."""
    futures = [plain.guest.submit(requests.bulk_in(SOURCE, 2048)) for _ in range(6000)]
    statuses = [future.result(PATIENCE).status for future in futures]
    assert set(statuses) <= {Status.SUCCESS, Status.IOERROR}  # above its limit the host refuses
    assert not plain.guest._exchange.busy


# ================================================================ futures and their callbacks


def test_callbacks_submit_more(bed: Bed) -> None:
    """A chain: each answer asks the next question."""
    asked: list[int] = []
    end: Future[TransferResult] = Future()

    def go_on(future: Future[TransferResult]) -> None:
        assert future.result() == pattern(len(asked))
        asked.append(len(asked))
        if len(asked) == 100:
            end.set_result(future.result())
        else:
            bed.guest.submit(ask(len(asked))).add_done_callback(go_on)

    bed.guest.submit(ask(0)).add_done_callback(go_on)
    until(end.done, bed.guest)
    assert asked == list(range(100))


def test_callbacks_must_not_wait(bed: Bed) -> None:
    """They are told so, and the reader goes on."""
    guest = bed.guest
    assert guest.start_interrupt_receiving(INTERRUPT_IN) == Status.SUCCESS
    assert guest.start_bulk_receiving(SILENT, 512) == Status.SUCCESS
    silent = guest.submit(requests.bulk_in(LOOP_IN, 64))
    calls: list[Callable[[], object]] = [
        guest.get_configuration,
        guest.wait_for_disconnect,
        silent.result,
        silent.exception,
        lambda: guest.receive(SILENT),
    ]
    raised: list[BaseException | None] = []

    def try_to_wait(_: Future[tuple[int, int]]) -> None:
        for call in calls:
            try:
                call()
            except Exception as error:
                raised.append(error)
            else:
                raised.append(None)

    future = guest.submit(requests.get_configuration())
    with contextlib.suppress(LocalProtocolError):  # when it is done already, the callback runs here, and may wait
        future.add_done_callback(try_to_wait)
        assert future.result(PATIENCE)[0] == Status.SUCCESS
        until(lambda: len(raised) == len(calls), guest)
        assert [type(error) for error in raised] == [LocalProtocolError] * len(calls)
    assert guest.bulk_out(LOOP_OUT, b"x").status == Status.SUCCESS
    assert silent.result(PATIENCE).data == b"x"


def test_a_callback_that_fails_disturbs_nobody(bed: Bed, caplog: pytest.LogCaptureFixture) -> None:
    """concurrent.futures logs it."""
    called = threading.Event()

    def fail(_: object) -> None:
        called.set()
        raise RuntimeError("a callback")

    future = bed.guest.submit(requests.bulk_in(LOOP_IN, 64))
    future.add_done_callback(fail)
    bed.guest.bulk_out(LOOP_OUT, b"x")
    assert future.result(PATIENCE).data == b"x"
    until(called.is_set, bed.guest)
    assert bed.guest.get_configuration() == (Status.SUCCESS, 1)


# ================================================================ nobody holds up the others


def test_short_timeouts_while_another_waits_for_ever(bed: Bed, pool: ThreadPoolExecutor) -> None:
    guest = bed.guest
    for_ever = pool.submit(guest.bulk_in, LOOP_IN, 64)
    bed.until_waiting()
    assert guest.bulk_in(SILENT, 64, timeout=MOMENT).status == Status.TIMEOUT
    with pytest.raises(TimeoutError):
        guest.wait_for_disconnect(MOMENT)
    with pytest.raises(TimeoutError):
        guest.submit(requests.bulk_in(SILENT, 64)).result(MOMENT)
    assert guest.start_bulk_receiving(SILENT, 512) == Status.SUCCESS
    assert guest.receive(SILENT, timeout=MOMENT).status == Status.TIMEOUT
    assert not for_ever.done()
    guest.bulk_out(LOOP_OUT, b"x")
    assert for_ever.result(PATIENCE).data == b"x"


class SilentHost(ParserCallbacks):
    """Says hello and announces a device. It reads when it is told to, and answers nothing by itself."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self.received: list[Packet] = []
        self._data = b""
        sock.settimeout(PATIENCE)
        self.parser = Parser(self, usb_host=True)
        self.parser.do_write()
        self._read_once()
        self.send(DeviceConnect(vendor_id=1))

    def read(self, count: int) -> bytes | None:
        data, self._data = self._data[:count], self._data[count:]
        return data or None

    def _read_once(self) -> None:
        self._data = self.socket.recv(1 << 16)
        self.parser.do_read()

    def write(self, data: memoryview) -> int:
        self.socket.sendall(data)
        return len(data)

    def packet_received(self, packet: Packet) -> None:
        self.received.append(packet)

    def send(self, *packets: Packet) -> None:
        """Blocks while the guest does not read."""
        for packet in packets:
            self.parser.send(packet)
            self.parser.do_write()

    def wait_for(self, kind: type[Packet]) -> Packet:
        """The next packet of a kind."""
        while True:
            for packet in self.received:
                if type(packet) is kind:
                    self.received.remove(packet)
                    return packet
            self._read_once()


@contextlib.contextmanager
def silent_host(*, background: bool) -> Iterator[tuple[Guest, SilentHost]]:
    ours, theirs = socket.socketpair()
    with (
        theirs,
        Connection(ours, "host") as connection,
        Guest(GuestConnection(connection), background=background) as guest,
    ):
        if not background:
            guest.process()
        host = SilentHost(theirs)
        guest.wait_for_device(PATIENCE)
        yield guest, host


@pytest.mark.parametrize("background", [False, True])
def test_a_host_that_does_not_read(background: bool, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    """The socket is full: calls with a timeout end in time, the others when the guest is closed."""
    monkeypatch.setattr(_exchange, "CANCEL_GRACE", MOMENT)
    with silent_host(background=background) as (guest, _):
        stuck = pool.submit(guest.bulk_out, SINK, bytes(8 << 20))
        assert guest.bulk_out(SINK, bytes(8 << 20), timeout=MOMENT).status == Status.TIMEOUT
        with pytest.raises(TimeoutError):
            guest.get_configuration(timeout=MOMENT)
        timed = pool.submit(guest.bulk_in, LOOP_IN, 64, timeout=MOMENT)
        assert timed.result(PATIENCE).status == Status.TIMEOUT
        assert not stuck.done()
        guest.close()
        assert isinstance(stuck.exception(PATIENCE), ConnectionClosed)


def test_closed_by_another_thread(bed: Bed, pool: ThreadPoolExecutor) -> None:
    """Every call that waits ends with ConnectionClosed, and so does every later one."""
    guest = bed.guest
    assert guest.start_bulk_receiving(SILENT, 512) == Status.SUCCESS
    futures = [guest.submit(requests.bulk_in(LOOP_IN, 64)) for _ in range(20)]
    waiting: list[Callable[[], object]] = [
        lambda: guest.bulk_in(LOOP_IN, 64),
        lambda: guest.bulk_in(LOOP_IN, 64, timeout=PATIENCE),
        guest.wait_for_disconnect,
        lambda: guest.receive(SILENT),
        lambda: guest.receive(SILENT, timeout=PATIENCE),
        futures[0].result,
        lambda: futures[1].result(PATIENCE),
    ]
    calls = [pool.submit(call) for call in waiting]
    bed.until_waiting()
    guest.close()
    assert {type(call.exception(PATIENCE)) for call in calls} == {ConnectionClosed}
    assert {type(future.exception(PATIENCE)) for future in futures} == {ConnectionClosed}
    for later in (guest.get_configuration, guest.wait_for_device, guest.process, guest.reset, guest.reject):
        with pytest.raises(ConnectionClosed):
            later()


class Interrupt(BaseException):
    """Like KeyboardInterrupt."""


@pytest.mark.parametrize("trouble", [Interrupt(), RuntimeError("the application")], ids=["base", "error"])
def test_an_interrupted_call_cancels_its_transfer(plain: Bed, pool: ThreadPoolExecutor, trouble: BaseException) -> None:
    """And only that: who waits beside it reads on."""
    guest = plain.guest
    reader = pool.submit(guest.bulk_in, SILENT, 64)
    plain.until_waiting()
    other = pool.submit(guest.bulk_in, LOOP_IN, 64)
    plain.stream.trouble = trouble
    plain.stream.wake()
    assert reader.exception(PATIENCE) is trouble
    until(lambda: plain.device.counters["cancelled"] == 1 and plain.device.counters["submitted"] == 2, guest)
    guest.bulk_out(LOOP_OUT, b"x")
    assert other.result(PATIENCE).data == b"x"
    assert not guest._exchange.busy


def test_a_signal_interrupts_a_call(bed: Bed, pool: ThreadPoolExecutor) -> None:
    """A KeyboardInterrupt of the main thread, also while another thread reads."""
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("signals reach the main thread only")
    main, raised = threading.get_ident(), threading.Event()

    def raise_once(*_: object) -> None:
        if not raised.is_set():
            raised.set()
            raise KeyboardInterrupt

    def interrupt() -> None:
        until(lambda: bed.device.counters["submitted"] == 1, bed.guest)
        while not raised.wait(MOMENT):  # one that comes just before a system call does not end it
            signal.pthread_kill(main, signal.SIGINT)

    before = signal.signal(signal.SIGINT, raise_once)
    try:
        helper = pool.submit(interrupt)
        with pytest.raises(KeyboardInterrupt):
            bed.guest.bulk_in(SILENT, 64)
        helper.result(PATIENCE)
    finally:
        signal.signal(signal.SIGINT, before)
    until(lambda: bed.device.counters["cancelled"] == 1 and not bed.guest._exchange.busy, bed.guest)


# ================================================================ back-pressure


PIECE = 64 * 1024
SLACK = 16 * PIECE
"""What the read that passes the mark may bring, with the packets that it completes."""


def test_data_that_nobody_takes_stays_outside(monkeypatch: pytest.MonkeyPatch, pool: ThreadPoolExecutor) -> None:
    """A background guest stops reading, keeps what it has, and reads on when it is taken, or when it is asked."""
    high = 256 * 1024
    monkeypatch.setattr(guest_module, "HIGH_BACKLOG", high)
    with silent_host(background=True) as (guest, host):
        started = guest.submit(requests.start_bulk_receiving(SOURCE, PIECE))
        request = host.wait_for(StartBulkReceiving)
        host.send(BulkReceivingStatus(id=request.id, endpoint=SOURCE))
        assert started.result(PATIENCE) == Status.SUCCESS
        count = 200
        pieces = [
            BufferedBulkPacket(endpoint=SOURCE, data=struct.pack("<Q", n) + bytes(PIECE - 8)) for n in range(count)
        ]
        sending = pool.submit(host.send, *pieces)
        with pytest.raises(concurrent.futures.TimeoutError):
            sending.result(10 * MOMENT)
        assert guest._exchange.backlog <= high + SLACK
        for number in range(count):
            result = guest.receive(SOURCE, timeout=PATIENCE)
            assert struct.unpack_from("<Q", result.data)[0] == number
            assert guest._exchange.backlog <= high + SLACK
        sending.result(PATIENCE)
        assert guest._exchange.backlog == 0


def test_a_future_is_answered_behind_data_that_nobody_takes(
    monkeypatch: pytest.MonkeyPatch, pool: ThreadPoolExecutor
) -> None:
    """A background guest that had stopped reading reads on when something is asked, though no thread waits."""
    monkeypatch.setattr(guest_module, "HIGH_BACKLOG", PIECE)
    with silent_host(background=True) as (guest, host):
        started = guest.submit(requests.start_bulk_receiving(SOURCE, PIECE))
        host.send(BulkReceivingStatus(id=host.wait_for(StartBulkReceiving).id, endpoint=SOURCE))
        assert started.result(PATIENCE) == Status.SUCCESS
        piece = BufferedBulkPacket(endpoint=SOURCE, data=bytes(PIECE))
        sending = pool.submit(host.send, *[piece] * 40)
        end = time.monotonic() + PATIENCE
        while guest._exchange.backlog <= PIECE:
            assert time.monotonic() < end, "nothing is read"
        answered = threading.Event()
        future = guest.submit(requests.get_configuration())
        future.add_done_callback(lambda future: answered.set())
        sending.result(PATIENCE)
        host.send(ConfigurationStatus(id=host.wait_for(GetConfiguration).id, configuration=1))
        assert answered.wait(PATIENCE)
        assert future.result(0) == (Status.SUCCESS, 1)


def test_a_request_is_answered_behind_data_that_nobody_takes(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is read as far as the answer; what came before it is kept, in order."""
    monkeypatch.setattr(guest_module, "HIGH_BACKLOG", 10_000)
    assert bed.guest.start_bulk_receiving(SOURCE, 512, 4) == Status.SUCCESS
    for _ in range(20):
        assert bed.guest.get_configuration(timeout=PATIENCE) == (Status.SUCCESS, 1)
    numbers = [struct.unpack_from("<Q", bed.guest.receive(SOURCE, timeout=PATIENCE).data)[0] for _ in range(200)]
    assert numbers == list(range(200))
    assert bed.guest.stop_bulk_receiving(SOURCE, timeout=PATIENCE) == Status.SUCCESS


# ================================================================ nothing is left


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("background", [False, True])
def test_a_closed_guest_is_gone(background: bool) -> None:
    """No thread, and nothing that holds it."""
    before = set(threading.enumerate())  # some may end meanwhile
    bed = Bed(background=background)
    ours = set(threading.enumerate()) - before
    assert len(ours) == 1 + background
    future = bed.guest.submit(requests.bulk_in(SILENT, 64))
    gone = weakref.ref(bed.guest)
    bed.close()
    assert isinstance(future.exception(0), ConnectionClosed)
    assert not any(thread.is_alive() for thread in ours)
    del bed, future, ours
    gc.collect()
    assert gone() is None


def test_a_guest_that_was_not_closed_is_collected() -> None:
    """One without a thread."""
    host, guest = linked_pair(LoopbackDevice())
    gone = weakref.ref(guest)
    host.close()
    del host, guest
    gc.collect()
    assert gone() is None


def serve_all(listener: transport.Listener, device: LoopbackDevice, count: int) -> None:
    for _ in range(count):
        connection = listener.accept(PATIENCE)
        assert connection is not None
        with connection, contextlib.suppress(UsbRedirError, OSError):
            transport.serve(connection, device)


def leave_politely(guest: Guest, connection: Connection) -> None:
    assert guest.get_configuration() == (Status.SUCCESS, 1)


def leave_in_the_middle(guest: Guest, connection: Connection) -> None:
    """Transfers in flight, streams that run, data that nobody took."""
    assert guest.start_bulk_receiving(SOURCE, 512, 4) == Status.SUCCESS
    assert guest.start_interrupt_receiving(INTERRUPT_IN) == Status.SUCCESS
    futures = [guest.submit(requests.bulk_in(SILENT, 64)) for _ in range(5)]
    guest.receive(SOURCE)
    guest.close()
    assert all(isinstance(future.exception(0), ConnectionClosed) for future in futures)


def leave_at_once(guest: Guest, connection: Connection) -> None:
    """The socket goes first."""
    connection.close()
    with pytest.raises((ConnectionClosed, OSError)):
        guest.get_configuration(timeout=PATIENCE)


WAYS = (leave_politely, leave_in_the_middle, leave_at_once)


def test_connects_and_disconnects_leave_nothing_behind() -> None:
    """Of many guests over TCP that leave in different ways; USBREDIR_LONG=1: of 10,000."""
    count, warm = (10_000 if LONG else 120), 30

    def come_and_go(times: int) -> None:
        for number in range(times):
            with (
                connect(str(listener.address), PATIENCE) as connection,
                Guest(GuestConnection(connection), background=number % 2 == 1) as guest,
            ):
                guest.wait_for_device(PATIENCE)
                WAYS[number % len(WAYS)](guest, connection)

    device = LoopbackDevice(interrupt_period=0.01)
    with contextlib.closing(device), listen("127.0.0.1:0") as listener:
        server = threading.Thread(target=serve_all, args=(listener, device, warm + count), daemon=True)
        server.start()
        come_and_go(warm)
        gc.collect()
        threads, open_files = threading.active_count(), descriptors()
        tracemalloc.start()
        try:
            come_and_go(count // 2)
            gc.collect()
            held = tracemalloc.get_traced_memory()[0]
            come_and_go(count - count // 2)
            gc.collect()
            grown = tracemalloc.get_traced_memory()[0] - held
        finally:
            tracemalloc.stop()
        server.join(PATIENCE)
        assert not server.is_alive()
        assert threading.active_count() == threads - 1
        assert descriptors() <= open_files
        assert grown < 64 * 1024, f"{grown} bytes"
