"""Parser with many threads: what docs/threads.md promises, under contention.

Threads wait for events and semaphores, never for time. A deadlock shows as a thread that does not end.
"""

from __future__ import annotations

import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import pytest

from usbredir.locking import LockCallbacks, ThreadingLocks
from usbredir.packets import BulkPacket, ControlPacket, DeviceDisconnect, Packet, Reset
from usbredir.parser import LogLevel, Parser, ParserCallbacks

PATIENCE = 60.0
"""Seconds after which a thread counts as stuck."""
SENDERS = 8


@pytest.fixture(autouse=True)
def frequent_switches() -> Iterator[None]:
    """Threads change places every 10 microseconds."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def run_together(*functions: Callable[[], object]) -> None:
    """Run functions in threads of their own; fail with the first exception, or if one does not end."""
    failures: list[BaseException] = []

    def guarded(function: Callable[[], object]) -> None:
        try:
            function()
        except BaseException as error:  # handed to the main thread
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(function,), daemon=True) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
        if failures:
            raise failures[0]
        assert not thread.is_alive(), "deadlock: a thread does not end"
    if failures:
        raise failures[0]


class Link(ParserCallbacks):
    """Callbacks in memory. Everything written is kept; *answer* decides how much is accepted."""

    def __init__(self, answer: Callable[[int], int | None] = lambda offered: offered) -> None:
        self.input = b""
        self.output = bytearray()
        self.answer = answer
        self.received: list[Packet] = []
        self.entered = threading.Lock()

    def log(self, level: LogLevel, message: str) -> None:
        assert level > LogLevel.WARNING, message

    def read(self, count: int) -> bytes | None:
        piece, self.input = self.input[:count], self.input[count:]
        return piece or None

    def write(self, data: memoryview) -> int | None:
        assert self.entered.acquire(blocking=False), "write was entered twice"
        try:
            accepted = self.answer(len(data))
            self.output += data[: accepted or 0]
            return accepted
        finally:
            self.entered.release()

    def packet_received(self, packet: Packet) -> None:
        self.received.append(packet)


class VectorLink(Link):
    """With the optional vectored write."""

    def writev(self, buffers: Sequence[memoryview]) -> int | None:
        assert self.entered.acquire(blocking=False), "writev was entered twice"
        try:
            accepted = self.answer(sum(map(len, buffers)))
            self.output += b"".join(buffers)[: accepted or 0]
            return accepted
        finally:
            self.entered.release()


LINKS = pytest.mark.parametrize("link_type", [Link, VectorLink])


def connected(link: Link, locks: LockCallbacks | None) -> tuple[Parser, Parser, Link]:
    """A host with *link* and *locks*, and a guest in whose link everything can be parsed, hellos exchanged."""
    guest_link = Link()
    guest = Parser(guest_link)
    host = Parser(link, usb_host=True, locks=locks)
    guest.do_write()
    link.input = bytes(guest_link.output)
    host.do_read()
    answer, link.answer = link.answer, lambda offered: offered
    host.do_write()
    link.answer = answer
    guest_link.input = bytes(link.output)
    guest.do_read()
    link.output.clear()
    link.received.clear()
    guest_link.received.clear()
    return host, guest, guest_link


def parse_all(guest: Parser, link: Link, data: bytes) -> list[Packet]:
    link.input = data
    guest.do_read()
    return link.received


def numbered(sender: int, number: int) -> BulkPacket:
    """A packet that tells its sender and number, and whose data shows whether it is whole."""
    size = (0, 1, 17, 100, 600, 8191, 8192, 8193, 30000)[(sender * 7 + number) % 9]
    return BulkPacket(id=sender << 32 | number, endpoint=0x81, data=bytes([(sender * 31 + number) % 256]) * size)


def check_numbered(packets: Sequence[Packet], senders: int, count: int) -> None:
    """Every packet whole, once, and in order for each sender."""
    expected = [0] * senders
    for packet in packets:
        sender, number = packet.id >> 32, packet.id & 0xFFFFFFFF
        assert number == expected[sender], f"sender {sender}: packet {number} where {expected[sender]} is due"
        assert packet == numbered(sender, number)
        expected[sender] += 1
    assert expected == [count] * senders


def wobbly(rng: random.Random, fail: float = 0.0) -> Callable[[int], int | None]:
    """Accepts random parts; sometimes would block, sometimes fails."""

    def answer(offered: int) -> int | None:
        kind = rng.random()
        if kind < fail:
            raise BrokenPipeError("not now")
        if kind < 0.3:
            return rng.choice((0, None))
        return rng.choice((1, offered, rng.randint(1, offered)))

    return answer


@LINKS
@pytest.mark.parametrize("fail", [0.0, 0.1])
def test_packets_of_many_senders_stay_whole_and_in_order(link_type: type[Link], fail: float) -> None:
    """8 senders and a writer with short writes, would-block and errors: nothing lost, doubled, mixed or overtaken."""
    link = link_type(wobbly(random.Random(1), fail))
    host, guest, guest_link = connected(link, ThreadingLocks())
    count = 150
    queued = threading.Semaphore(0)

    def sender(number: int) -> None:
        for n in range(count):
            host.send(numbered(number, n))
            queued.release()

    def write_once() -> None:
        try:
            host.do_write()
        except BrokenPipeError:
            assert fail

    def writer() -> None:
        for _ in range(SENDERS * count):
            assert queued.acquire(timeout=PATIENCE)
            write_once()
        while host.has_data_to_write():
            write_once()

    run_together(writer, *[lambda number=number: sender(number) for number in range(SENDERS)])
    assert (host.has_data_to_write(), host.buffered_output_size()) == (0, 0)
    check_numbered(parse_all(guest, guest_link, bytes(link.output)), SENDERS, count)


@LINKS
def test_every_thread_may_write(link_type: type[Link]) -> None:
    """Each sender calls do_write itself: write is never entered twice, and when all have returned nothing is left."""
    rng = random.Random(2)
    count = 20
    for _ in range(15):
        link = link_type(lambda offered: rng.randint(1, offered))
        host, guest, guest_link = connected(link, ThreadingLocks())

        def sender(number: int, host: Parser = host) -> None:
            for n in range(count):
                host.send(numbered(number, n))
                host.do_write()

        run_together(*[lambda number=number: sender(number) for number in range(SENDERS)])
        assert host.has_data_to_write() == 0
        check_numbered(parse_all(guest, guest_link, bytes(link.output)), SENDERS, count)


@LINKS
def test_queue_questions_are_answered_while_others_send_and_write(link_type: type[Link]) -> None:
    """has_data_to_write and buffered_output_size never go below zero or above what was sent."""
    link = link_type(wobbly(random.Random(3)))
    host, _, _ = connected(link, ThreadingLocks())
    packet = BulkPacket(endpoint=0x81, data=bytes(100))
    size, count, done = 16 + 10 + 100, 2000, threading.Event()

    def sender() -> None:
        for _ in range(count):
            host.send(packet)
        done.set()

    def writer() -> None:
        while not done.is_set() or host.has_data_to_write():
            host.do_write()

    def asker() -> None:
        while not done.is_set():
            assert 0 <= host.has_data_to_write() <= count
            assert 0 <= host.buffered_output_size() <= count * size

    run_together(sender, writer, asker)
    assert len(link.output) == count * size


@LINKS
def test_sends_and_questions_from_inside_write(link_type: type[Link]) -> None:
    """A write callback may use the parser: no deadlock, do_write returns at once, the packet goes out behind."""
    link = link_type()
    host, guest, guest_link = connected(link, ThreadingLocks())
    calls: list[tuple[int, int]] = []

    def answer(offered: int) -> int:
        if len(calls) < 5:
            calls.append((host.has_data_to_write(), host.buffered_output_size()))
            host.send(ControlPacket(id=len(calls), endpoint=0x80, data=b"inside"))
            assert host.has_data_to_write() == calls[-1][0] + 1
            host.do_write()
        return offered

    link.answer = answer
    host.send(ControlPacket(id=0, endpoint=0x80, data=b"first"))
    run_together(host.do_write)
    assert [packet.id for packet in parse_all(guest, guest_link, bytes(link.output))] == [0, 1, 2, 3, 4, 5]
    assert host.has_data_to_write() == 0


@LINKS
def test_a_slow_write_blocks_nobody(link_type: type[Link]) -> None:
    """While write is stuck, other threads send, ask and call do_write; what they sent goes out when it is free."""
    entered, release = threading.Event(), threading.Event()
    link = link_type()
    host, guest, guest_link = connected(link, ThreadingLocks())

    def answer(offered: int) -> int:
        if not entered.is_set():
            entered.set()
            assert release.wait(PATIENCE)
        return offered

    link.answer = answer
    host.send(numbered(0, 0))

    def others() -> None:
        assert entered.wait(PATIENCE)
        for n in range(1, 200):
            host.send(numbered(0, n))
        host.do_write()
        assert host.has_data_to_write() == 200
        assert not release.is_set()
        release.set()

    run_together(host.do_write, others)
    assert host.has_data_to_write() == 0
    check_numbered(parse_all(guest, guest_link, bytes(link.output)), 1, 200)


def test_a_thread_that_reads_beside_threads_that_send() -> None:
    """do_read, whose callback sends, beside senders and a writer."""
    link = Link(wobbly(random.Random(4)))
    host, guest, guest_link = connected(link, ThreadingLocks())
    count = 300
    for n in range(count):
        guest.send(BulkPacket(id=n, endpoint=0x81, length=64))
    guest.do_write()
    requests = bytes(guest_link.output)[-count * 26 :]
    replied = threading.Semaphore(0)

    def reply(packet: Packet) -> None:
        host.send(numbered(0, packet.id))
        replied.release()

    link.packet_received = reply  # type: ignore[method-assign]
    host = _rebuilt(host, link)

    def reader() -> None:
        for start in range(0, len(requests), 100):
            link.input = requests[start : start + 100]
            host.do_read()

    def sender() -> None:
        for n in range(count):
            host.send(numbered(1, n))
            replied.release()

    def writer() -> None:
        for _ in range(2 * count):
            assert replied.acquire(timeout=PATIENCE)
            host.do_write()
        while host.has_data_to_write():
            host.do_write()

    run_together(reader, sender, writer)
    check_numbered(parse_all(guest, guest_link, bytes(link.output)), 2, count)


def _rebuilt(parser: Parser, link: Link) -> Parser:
    """The same connection on a new parser, which finds the changed callbacks."""
    new = Parser(link, usb_host=True, send_hello=False, locks=ThreadingLocks())
    new.unserialize(parser.serialize())
    return new


# ---------------------------------------------------------------- the lock callbacks


class RecordingLocks(LockCallbacks):
    """Checks every rule of the lock callbacks, and knows who holds what."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.locks: dict[int, threading.Lock] = {}
        self.holders: dict[int, int] = {}
        self.freed: set[int] = set()

    def alloc_lock(self) -> object | None:
        self.calls["alloc"] += 1
        number = len(self.locks)
        self.locks[number] = threading.Lock()
        return number

    def lock(self, lock: object, /) -> None:
        assert isinstance(lock, int)
        assert lock not in self.freed, "a freed lock is used"
        assert self.holders.get(lock) != threading.get_ident(), "a thread takes a lock twice"
        assert self.locks[lock].acquire(timeout=PATIENCE), "deadlock"
        self.holders[lock] = threading.get_ident()
        self.calls["lock"] += 1

    def unlock(self, lock: object, /) -> None:
        assert isinstance(lock, int)
        assert self.holders.pop(lock) == threading.get_ident(), "unlocked by another thread"
        self.locks[lock].release()

    def free_lock(self, lock: object, /) -> None:
        assert isinstance(lock, int)
        assert lock not in self.freed, "freed twice"
        assert lock not in self.holders, "freed while held"
        self.freed.add(lock)

    def assert_none_held(self) -> None:
        assert threading.get_ident() not in self.holders.values(), "a lock is held during a callback"


class WatchedLink(Link):
    """Checks in every callback that the calling thread holds no lock."""

    def __init__(self, locks: RecordingLocks) -> None:
        super().__init__()
        self.locks = locks
        self.calls: Counter[str] = Counter()

    def _check(self, name: str) -> None:
        self.calls[name] += 1
        self.locks.assert_none_held()

    def log(self, level: LogLevel, message: str) -> None:
        self._check("log")

    def read(self, count: int) -> bytes | None:
        self._check("read")
        return super().read(count)

    def write(self, data: memoryview) -> int | None:
        self._check("write")
        return super().write(data)

    def packet_received(self, packet: Packet) -> None:
        self._check("packet_received")
        super().packet_received(packet)


def test_no_lock_is_held_during_callbacks() -> None:
    """log, read, write and packet_received run without a lock; every lock is freed once, by close."""
    locks = RecordingLocks()
    link = WatchedLink(locks)
    guest = Parser(link, locks=locks, capabilities=range(8))
    other_link = Link()
    other = Parser(other_link, usb_host=True, capabilities=range(8))
    other.do_write()
    link.input = bytes(other_link.output)
    guest.do_read()
    other_link.input = bytes(link.output)
    guest.do_write()
    other_link.input = bytes(link.output)
    other.do_read()
    other.send(DeviceDisconnect())
    del other_link.output[:]
    other.do_write()
    link.input = bytes(other_link.output)
    guest.do_read()  # queues the acknowledgement
    guest.send(Reset())
    guest.peer_has_capability(32)  # logs an error
    assert guest.have_capability(77) is False
    assert guest.has_data_to_write() == 2
    assert guest.buffered_output_size() == 32
    guest.do_write()
    assert {"log", "read", "write", "packet_received"} <= set(link.calls)
    assert locks.calls["lock"] > 0
    assert not locks.holders
    assert not locks.freed
    guest.close()
    guest.close()
    assert len(locks.freed) == locks.calls["alloc"] >= 1


def test_locks_are_released_when_a_callback_raises() -> None:
    """An exception from write or packet_received leaves no lock held, and loses nothing."""
    locks = RecordingLocks()
    link = WatchedLink(locks)
    host, guest, guest_link = connected(link, locks)
    host.send(numbered(0, 0))

    def broken(_offered: int) -> int:
        raise ZeroDivisionError

    link.answer = broken
    with pytest.raises(ZeroDivisionError):
        host.do_write()
    assert not locks.holders
    assert host.has_data_to_write() == 1
    link.answer = lambda offered: offered + 1
    with pytest.raises(ValueError, match=r"\d"):
        host.do_write()
    assert not locks.holders
    link.output.clear()
    link.answer = lambda offered: offered
    host.do_write()
    check_numbered(parse_all(guest, guest_link, bytes(link.output)), 1, 1)


def test_stress_with_recording_locks() -> None:
    """The rules hold under contention, too."""
    locks = RecordingLocks()
    link = WatchedLink(locks)
    link.answer = wobbly(random.Random(5))
    host, guest, guest_link = connected(link, locks)
    count = 60

    def sender(number: int) -> None:
        for n in range(count):
            host.send(numbered(number, n))
            host.do_write()

    run_together(*[lambda number=number: sender(number) for number in range(SENDERS)])
    while host.has_data_to_write():
        host.do_write()
    host.close()
    assert not locks.holders
    assert len(locks.freed) == locks.calls["alloc"]
    check_numbered(parse_all(guest, guest_link, bytes(link.output)), SENDERS, count)


class NoLocks(LockCallbacks):
    """alloc_lock gives None: no locking."""

    def alloc_lock(self) -> object | None:
        return None

    def lock(self, lock: object, /) -> None:
        raise AssertionError("lock without a lock")

    def unlock(self, lock: object, /) -> None:
        raise AssertionError("unlock without a lock")

    def free_lock(self, lock: object, /) -> None:
        raise AssertionError("free_lock without a lock")


def test_no_lock_means_no_locking() -> None:
    """None from alloc_lock: no other lock callback is ever called."""
    link = Link()
    host, guest, guest_link = connected(link, NoLocks())
    host.send(numbered(0, 0))
    assert host.has_data_to_write() == 1
    assert host.buffered_output_size() == 26
    host.do_write()
    host.close()
    check_numbered(parse_all(guest, guest_link, bytes(link.output)), 1, 1)


# ---------------------------------------------------------------- the queue's cost


def queue_cost(link_type: type[Link], count: int, accept: int) -> float:
    """CPU seconds for queueing *count* packets and writing them in pieces of at most *accept* bytes."""
    link = link_type()
    host, _, _ = connected(link, None)
    link.answer = lambda offered: min(offered, accept)
    packet = BulkPacket(endpoint=0x81, data=bytes(64))
    start = time.process_time()
    for _ in range(count):
        host.send(packet)
    assert host.buffered_output_size() == count * 90
    host.do_write()
    assert host.has_data_to_write() == 0
    return time.process_time() - start


@pytest.mark.parametrize(
    ("link_type", "accept", "few"), [(Link, 10**9, 2_000), (Link, 50, 2_000), (VectorLink, 10**9, 2_000)]
)
def test_cost_of_the_queue_is_linear(link_type: type[Link], accept: int, few: int) -> None:
    """Ten times as many queued packets cost about ten times as much (the original: a hundred times)."""
    ratio = min(
        min(queue_cost(link_type, 10 * few, accept) for _ in range(2))
        / min(queue_cost(link_type, few, accept) for _ in range(5))
        for _ in range(2)
    )
    assert ratio < 20, f"{10 * few} packets cost {ratio:.1f} times what {few} cost"


def test_cost_of_short_vectored_writes_is_linear() -> None:
    """Short counts from writev: the offer is limited, so what is offered again and again does not grow."""
    test_cost_of_the_queue_is_linear(VectorLink, 5_000, 6_000)
