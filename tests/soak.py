"""A soak test: an exporter process, and guests that do to it what goes wrong in real life, in random order.

``python tests/soak.py --seed 1 --events 1000 [--bed]`` prints a report; test_soak runs a short one. Subjects: an
exported loopback device, or with ``--bed`` the device of the virtual USB bus below the real libusb.

Each event is a connection of its own: random traffic, then something happens (see EVENTS). Whatever it was, the
exporter then has to serve a fresh guest, in bounded time and with the descriptors it began with. Every request that
is sent is remembered; it has to be answered exactly once, with its id, its kind and the right data.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from usbredir.errors import ConnectionClosed
from usbredir.packets import (
    AltSettingStatus,
    BufferedBulkPacket,
    BulkPacket,
    BulkReceivingStatus,
    CancelDataPacket,
    ConfigurationStatus,
    ControlPacket,
    DeviceConnect,
    DeviceDisconnect,
    EpInfo,
    GetAltSetting,
    GetConfiguration,
    Hello,
    InterfaceInfo,
    InterruptPacket,
    InterruptReceivingStatus,
    IsoPacket,
    IsoStreamStatus,
    Packet,
    Reset,
    SetAltSetting,
    SetConfiguration,
    StartBulkReceiving,
    StartInterruptReceiving,
    StartIsoStream,
    StopBulkReceiving,
    StopInterruptReceiving,
    StopIsoStream,
)
from usbredir.parser import LogLevel, Parser, ParserCallbacks
from usbredir.proto import Status
from usbredir.transport import POLLIN, POLLOUT, Connection, connect, poll

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 30.0
"""Seconds that anything may take, on a busy machine, before it counts as a hang."""
STEP = 0.002
"""Seconds between two looks at something that cannot be polled: the exporter's descriptors, a buffer's level."""
WARM_UP = 0.2
"""Share of the events after which memory is measured for the first time."""
GROWTH = 12 * 1024
"""KiB that the exporter may grow after that: what guests that do not read leave behind in the allocator. What the
process holds in objects does not grow by a byte."""
PATTERN = bytes(range(256)) * 300

LOOP_OUT, LOOP_IN, SINK, SOURCE = 0x01, 0x81, 0x02, 0x82
INTERRUPT_OUT, INTERRUPT_IN, ISO_OUT, ISO_IN = 0x03, 0x83, 0x04, 0x84
STALLING, SILENT = 0x85, 0x86
STREAM_DATA = (BufferedBulkPacket, IsoPacket)
QUICK = "import usbredir.cli, usbredir.exporter as e, sys; e.CHECK_DEVICE = 0.02; sys.exit(usbredir.cli.main())"
"""The command, but for looking more often for a lost device: a test has no second to spare."""

BACK = "the device is there"
"""What the exporter says when a device has come back."""

Check = Callable[[Any], object]


class SoakError(AssertionError):
    """The exporter did something it must not do."""


def until(done: Callable[[], object], what: str) -> None:
    """Look until *done*; after LIMIT it is a hang."""
    end = time.monotonic() + LIMIT
    while not done():
        if time.monotonic() > end:
            raise SoakError(f"not in time: {what}")
        poll([], STEP)


# ---------------------------------------------------------------- a guest


class Peer(ParserCallbacks):
    """A guest that remembers what it asked for, and complains about every answer that is not right."""

    def __init__(self, address: str) -> None:
        self.connection: Connection = connect(address, LIMIT)
        self.held: bytearray | None = None  # what is written stays here, when it is not None
        self.has_device = False
        self.next_id = 1
        self.expected: dict[int, tuple[type[Packet], Check]] = {}
        self.streams: set[int] = set()  # endpoints
        self.messages: deque[bytes] = deque()  # in the loopback, in order
        self.stream_packets = 0
        self.answers = 0
        self.parser = Parser(self)

    # ------------------------------------------------------------ callbacks

    def read(self, count: int) -> bytes | None:
        return self.connection.read(count)

    def write(self, data: memoryview) -> int | None:
        if self.held is not None:
            self.held += data
            return len(data)
        return self.connection.write(data)

    def log(self, level: LogLevel, message: str) -> None:
        if level <= LogLevel.WARNING:
            raise SoakError(f"the guest's parser complains: {message}")

    def packet_received(self, packet: Packet) -> None:
        match packet:
            case Hello() | InterfaceInfo() | EpInfo():
                pass
            case DeviceConnect():
                self.has_device = True
            case DeviceDisconnect():
                self.has_device = False
                self.streams.clear()
                self.expected.clear()  # nobody answers any more
            case BufferedBulkPacket() | IsoPacket() | InterruptPacket() if packet.endpoint in self.streams:
                self.stream_packets += 1
            case _ if packet.id in self.expected and isinstance(packet, self.expected[packet.id][0]):
                _, check = self.expected.pop(packet.id)
                self.answers += 1
                check(packet)
            case IsoStreamStatus() | InterruptReceivingStatus() | BulkReceivingStatus() if packet.status:
                self.streams.discard(packet.endpoint)  # it ended by itself
            case _:
                if self.has_device:
                    raise SoakError(f"an answer to nothing, or a second one: {packet!r}")

    # ------------------------------------------------------------ moving bytes

    def move(self, timeout: float | None = 0.0) -> None:
        """Write what is queued, read what has come."""
        self.parser.do_write()
        events = POLLIN | (POLLOUT if self.parser.has_data_to_write() else 0)
        if poll([(self.connection.fileno(), events)], timeout):
            self.parser.do_read()
            self.parser.do_write()

    def wait(self, done: Callable[[], object], what: str) -> None:
        """Move bytes until *done*."""
        end = time.monotonic() + LIMIT
        while not done():
            left = end - time.monotonic()
            if left <= 0:
                kinds = Counter(kind.__name__ for kind, _ in self.expected.values())
                raise SoakError(f"not in time: {what}; open requests: {dict(kinds)}")
            self.move(left)

    def settle(self) -> None:
        """Until every request is answered."""
        self.wait(lambda: not self.expected, "answers")

    def wait_for_end(self) -> None:
        """Until the exporter closes the connection."""
        try:
            while True:
                if not poll([(self.connection.fileno(), POLLIN)], LIMIT):
                    raise SoakError("the exporter keeps the connection of a guest that has gone")
                if self.connection.read(1 << 16) == b"":
                    return
        except OSError:
            return

    # ------------------------------------------------------------ requests

    def ask(self, packet_class: type[Packet], answer: type[Packet], check: Check, **fields: Any) -> int:
        """Send a request whose *answer* is to be checked."""
        number, self.next_id = self.next_id, self.next_id + 1
        self.expected[number] = (answer, check)
        self.parser.send(packet_class(id=number, **fields))
        return number

    def relax(self) -> None:
        """What is under way may end with any status: something drastic comes next."""
        for number, (kind, _) in list(self.expected.items()):
            self.expected[number] = (kind, lambda packet: None)
        self.messages.clear()

    def control_in(self, request: int, value: int, length: int, expected: bytes) -> None:
        self.ask(
            ControlPacket, ControlPacket, data_is(expected),
            endpoint=0x80, requesttype=0xC0, request=request, value=value, length=length,
        )  # fmt: skip

    def control_out(self, request: int, value: int = 0, index: int = 0, data: bytes = b"", kind: int = 0x40) -> None:
        self.ask(
            ControlPacket, ControlPacket, status_is(Status.SUCCESS),
            endpoint=0, requesttype=kind, request=request, value=value, index=index, data=data,
        )  # fmt: skip

    def clear_halt(self, endpoint: int) -> None:
        self.control_out(1, index=endpoint, kind=0x02)

    def bulk_in(self, endpoint: int, length: int, check: Check) -> int:
        return self.ask(BulkPacket, BulkPacket, check, endpoint=endpoint, length=length)

    def bulk_out(self, endpoint: int, data: bytes) -> int:
        return self.ask(BulkPacket, BulkPacket, status_is(Status.SUCCESS), endpoint=endpoint, data=data)

    def configure(self, value: int) -> None:
        def check(packet: ConfigurationStatus) -> None:
            expect(packet, packet.status == Status.SUCCESS and packet.configuration == value)

        self.ask(SetConfiguration, ConfigurationStatus, check, configuration=value)

    def alternate(self, interface: int, alt: int) -> None:
        def check(packet: AltSettingStatus) -> None:
            expect(packet, (packet.status, packet.interface, packet.alt) == (Status.SUCCESS, interface, alt))

        self.ask(SetAltSetting, AltSettingStatus, check, interface=interface, alt=alt)

    def stream(self, packet_class: type[Packet], answer: type[Packet], endpoint: int, **fields: Any) -> None:
        """Start or stop a stream."""
        self.streams.add(endpoint)
        self.ask(packet_class, answer, status_is(Status.SUCCESS), endpoint=endpoint, **fields)

    def random_requests(self, rng: random.Random, count: int) -> None:
        """Requests of many kinds, all at once."""
        for _ in range(count):
            rng.choice(REQUESTS)(self, rng)


def expect(packet: Packet, right: bool) -> None:
    if not right:
        raise SoakError(f"a wrong answer: {packet!r:.300}")


def status_is(status: int) -> Check:
    return lambda packet: expect(packet, packet.status == status)


def data_is(data: bytes) -> Check:
    return lambda packet: expect(packet, packet.status == Status.SUCCESS and bytes(packet.data) == data)


def is_pattern(length: int) -> Check:
    def check(packet: BulkPacket) -> None:
        data = bytes(packet.data)
        # The 8 bytes of the counter, then ascending bytes; where they begin differs between the two devices.
        start = data[8] - 8 if length > 8 else 0
        rest = bytes((start + i) & 0xFF for i in range(8, min(length, 64)))
        expect(packet, packet.status == Status.SUCCESS and len(data) == length and data[8:64] == rest)

    return check


def ask_pattern(peer: Peer, rng: random.Random) -> None:
    value, length = rng.randrange(256), rng.choice((0, 1, 8, 64, 1000))
    peer.control_in(0x01, value, length, PATTERN[value : value + length])


def ask_store(peer: Peer, rng: random.Random) -> None:
    data = rng.randbytes(rng.choice((1, 17, 500)))
    peer.control_out(0x02, data=data)
    peer.control_in(0x03, 0, len(data), data)


def ask_loop(peer: Peer, rng: random.Random) -> None:
    data = rng.randbytes(rng.choice((1, 31, 512, 513, 4096, 70000)))
    peer.messages.append(data)

    def check(packet: BulkPacket) -> None:
        data_is(peer.messages.popleft())(packet)

    steps: list[Callable[[], object]] = [
        lambda: peer.bulk_out(LOOP_OUT, data),
        lambda: peer.bulk_in(LOOP_IN, 70000, check),
    ]
    for step in rng.sample(steps, 2):
        step()


def ask_sink(peer: Peer, rng: random.Random) -> None:
    peer.bulk_out(SINK, bytes(rng.choice((0, 1, 512, 16384))))


def ask_source(peer: Peer, rng: random.Random) -> None:
    length = rng.choice((8, 512, 16384))
    peer.bulk_in(SOURCE, length, is_pattern(length))


def ask_interrupt(peer: Peer, rng: random.Random) -> None:
    peer.ask(InterruptPacket, InterruptPacket, status_is(Status.SUCCESS), endpoint=INTERRUPT_OUT, data=rng.randbytes(8))


def ask_configuration(peer: Peer, rng: random.Random) -> None:
    peer.ask(
        GetConfiguration, ConfigurationStatus,
        lambda packet: expect(packet, (packet.status, packet.configuration) == (Status.SUCCESS, 1)),
    )  # fmt: skip


def ask_alternate(peer: Peer, rng: random.Random) -> None:
    peer.ask(GetAltSetting, AltSettingStatus, status_is(Status.SUCCESS), interface=rng.randrange(2))


def ask_nonsense(peer: Peer, rng: random.Random) -> None:
    """An interface and an endpoint that do not exist."""
    if rng.randrange(2):
        peer.ask(GetAltSetting, AltSettingStatus, status_is(Status.INVAL), interface=rng.randrange(2, 256))
    else:
        peer.bulk_in(0x8A, 64, status_is(Status.INVAL))


REQUESTS = (
    ask_pattern, ask_store, ask_loop, ask_loop, ask_sink, ask_source, ask_interrupt, ask_configuration, ask_alternate,
    ask_nonsense,
)  # fmt: skip

# ---------------------------------------------------------------- the exporter


class Subject:
    """The exporter's process, and what it has."""

    def __init__(self, bed: bool, folder: Path) -> None:
        self.bed = bed
        self._log = folder / "stderr"
        self._environment: Mapping[str, str] = os.environ
        if bed:
            sys.path.insert(0, str(ROOT))
            from tests import vusb

            self._environment = vusb.environment()
        self.starts = 0
        self.start()

    def start(self, **variables: str) -> None:
        """Start the process. *variables*: for its environment."""
        self.starts += 1
        device = ["--device", "1209:0001"] if self.bed else ["--virtual", "loopback"]
        with open(self._log, "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", QUICK, "export", *device, "--as", "127.0.0.1:0"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                env={**self._environment, **variables},
            )
        try:
            until(self._has_started, "the start of the exporter")
        except BaseException:
            self.process.kill()
            self.process.wait()
            raise
        self.address = self.log_text().partition("listening on ")[2].split()[0]
        # What it needs is there once a guest was greeted; one descriptor is that guest's.
        with connect(self.address, LIMIT) as greeted:
            if not poll([(greeted.fileno(), POLLIN)], LIMIT):
                raise SoakError("the first guest is not greeted")
            self.descriptors = self.count_descriptors() - 1
            self.threads = self.count_threads()

    def _has_started(self) -> bool:
        if self.process.poll() is not None:
            raise SoakError(f"the exporter did not start: {self.log_text()}")
        _, found, rest = self.log_text().partition("listening on ")
        return bool(found) and "\n" in rest

    def log_text(self) -> str:
        """What it wrote."""
        return self._log.read_text(encoding="utf-8", errors="replace")

    def count_descriptors(self) -> int:
        """Open descriptors of the process."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def count_threads(self) -> int:
        """Threads of the process."""
        return len(os.listdir(f"/proc/{self.process.pid}/task"))

    def resident(self) -> int:
        """Memory of the process in KiB."""
        with open(f"/proc/{self.process.pid}/status", encoding="ascii") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))

    def check(self) -> None:
        """It runs, holds what it held at the start, and did not stumble."""
        if self.process.poll() is not None:
            raise SoakError(f"the exporter ended with {self.process.returncode}:\n{self.log_text()[-3000:]}")
        until(lambda: self.count_descriptors() <= self.descriptors, "descriptors given back")
        if self.count_threads() > self.threads:
            raise SoakError(f"{self.count_threads()} threads, at first {self.threads}")
        if "Traceback" in self.log_text() or "Exception ignored" in self.log_text():
            raise SoakError(self.log_text()[-3000:])

    def stop(self) -> None:
        """SIGTERM ends it with 0, also in the middle of something."""
        self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            raise SoakError("the exporter does not end") from None
        if code != 0 or "Traceback" in self.log_text():
            raise SoakError(f"the exporter ended with {code}:\n{self.log_text()[-3000:]}")

    def kill(self) -> None:
        """The end, whatever happened."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


# ---------------------------------------------------------------- events


class Soak:
    """The events, in random order."""

    def __init__(self, subject: Subject, rng: random.Random) -> None:
        self.subject = subject
        self.rng = rng
        self.answers = 0
        self.turned_away = 0
        self.slowest = 0.0  # fresh session, in seconds

    def guest(self) -> Peer:
        """A guest that has the device, in configuration 1."""
        peer = self.connected()
        peer.configure(1)  # a former guest may have chosen another
        peer.settle()
        if self.subject.bed:
            self.empty_loop(peer)
        return peer

    def empty_loop(self, peer: Peer) -> None:
        """The device of the bed keeps messages in its loopback through a reset: take out what former guests left."""
        mark, last = self.rng.randbytes(16), b""

        def check(packet: BulkPacket) -> None:
            nonlocal last
            last = bytes(packet.data)

        peer.bulk_out(LOOP_OUT, mark)
        while last != mark:
            peer.bulk_in(LOOP_IN, 70000, check)
            peer.settle()

    def connected(self) -> Peer:
        """A guest that has the device. Connecting is tried again while a former guest still is there."""
        end = time.monotonic() + LIMIT
        while True:
            peer = Peer(self.subject.address)
            try:
                peer.wait(lambda p=peer: p.has_device, "the device")  # type: ignore[misc]
            except (ConnectionClosed, OSError):
                peer.connection.close()
                self.turned_away += 1
                if time.monotonic() > end:
                    raise SoakError("guests are turned away for ever") from None
                poll([], STEP)
            else:
                return peer

    def leave(self, peer: Peer) -> None:
        """Close politely."""
        self.answers += peer.answers
        peer.connection.close()

    def fresh_session(self) -> None:
        """Whatever happened: the next guest is served, and nothing is left of the former ones."""
        started = time.monotonic()
        peer = self.guest()
        for ask in (ask_pattern, ask_loop, ask_store):
            ask(peer, self.rng)
        peer.settle()
        self.slowest = max(self.slowest, time.monotonic() - started)
        self.leave(peer)
        self.subject.check()

    # ------------------------------------------------------------ one method for each event

    def polite_close(self) -> None:
        peer = self.guest()
        for _ in range(self.rng.randrange(1, 4)):
            peer.random_requests(self.rng, self.rng.randrange(1, 30))
            peer.settle()
        self.leave(peer)

    def killed(self) -> None:
        """A killed peer: RST, with requests under way and streams running."""
        peer = self.guest()
        if self.rng.randrange(2):
            peer.stream(StartInterruptReceiving, InterruptReceivingStatus, INTERRUPT_IN)
        peer.random_requests(self.rng, self.rng.randrange(30))
        peer.bulk_in(SILENT, 64, lambda packet: None)
        for _ in range(self.rng.randrange(3)):
            peer.move()
        linger = struct.pack("ii", 1, 0)
        peer.connection._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.leave(peer)

    def cut(self) -> None:
        """The connection ends inside a packet."""
        peer = self.guest()
        peer.held = bytearray()
        peer.random_requests(self.rng, self.rng.randrange(1, 20))
        peer.parser.do_write()
        data = memoryview(peer.held)[: self.rng.randrange(1, len(peer.held))]
        self.send_raw(peer, data)
        self.leave(peer)

    def send_raw(self, peer: Peer, data: memoryview | bytes) -> None:
        """Send bytes, reading meanwhile, as far as the exporter takes them."""
        view = memoryview(data)
        with contextlib.suppress(ConnectionClosed, OSError):
            while view:
                poll([(peer.connection.fileno(), POLLIN | POLLOUT)], LIMIT)
                peer.parser.do_read()
                view = view[peer.connection.write(view) or 0 :]

    def half_close(self) -> None:
        """The guest shuts down its sending side; the exporter closes."""
        peer = self.guest()
        peer.random_requests(self.rng, self.rng.randrange(10))
        peer.parser.do_write()
        peer.connection._socket.shutdown(socket.SHUT_WR)
        peer.wait_for_end()
        self.leave(peer)

    def connect_and_close(self) -> None:
        """No hello, half a hello."""
        connection = connect(self.subject.address, LIMIT)
        with contextlib.suppress(OSError):
            connection.write(memoryview(bytes(self.rng.randrange(1, 20))))
        connection.close()

    def second_guest(self) -> None:
        """Turned away at once; the first one does not notice."""
        peer = self.guest()
        other = connect(self.subject.address, LIMIT)
        peer.random_requests(self.rng, 10)
        peer.settle()
        with contextlib.suppress(OSError):
            until(lambda: other.read(1 << 16) == b"", "turning away")
        other.close()
        self.leave(peer)

    def stalled(self) -> None:
        """The guest reads nothing for a while, with streams running and requests sent."""
        peer = self.guest()
        peer.stream(StartInterruptReceiving, InterruptReceivingStatus, INTERRUPT_IN)
        size = self.rng.choice((512, 4096))
        peer.stream(StartBulkReceiving, BulkReceivingStatus, SOURCE, bytes_per_transfer=size, no_transfers=8)
        peer.parser.do_write()
        # Until the level of our buffer does not rise any more: the exporter is held up.
        level, same = -1, 0
        end = time.monotonic() + LIMIT
        while same < 10 and time.monotonic() < end:
            poll([], STEP)
            before, level = level, waiting(peer.connection)
            same = same + 1 if level == before else 0
        for _ in range(10):
            ask_pattern(peer, self.rng)
        if self.rng.randrange(2):
            peer.settle()
            peer.stream(StopBulkReceiving, BulkReceivingStatus, SOURCE)
            peer.stream(StopInterruptReceiving, InterruptReceivingStatus, INTERRUPT_IN)
            peer.settle()
            expect(GetConfiguration(id=0), peer.stream_packets > 0)
        self.leave(peer)

    def device_reset(self) -> None:
        peer = self.guest()
        for _ in range(self.rng.randrange(1, 4)):
            peer.random_requests(self.rng, self.rng.randrange(20))
            if self.rng.randrange(2):
                peer.bulk_in(SILENT, 64, lambda packet: None)
            else:
                peer.settle()
            peer.relax()
            peer.parser.send(Reset())
            ask_pattern(peer, self.rng)
            peer.settle()
        peer.random_requests(self.rng, 5)
        peer.settle()
        self.leave(peer)

    def set_configuration(self) -> None:
        peer = self.guest()
        peer.random_requests(self.rng, self.rng.randrange(20))
        peer.relax()
        peer.configure(2)
        peer.settle()
        ask_loop(peer, self.rng)
        peer.settle()
        if self.rng.randrange(2):  # the next guest has to cope with what is left
            peer.configure(1)
            peer.random_requests(self.rng, 5)
            peer.settle()
        self.leave(peer)

    def cancel_storm(self) -> None:
        """Each cancelled request is answered once, whether it was still under way or not."""
        peer = self.guest()
        silent = [peer.bulk_in(SILENT, 64, status_is(Status.CANCELLED)) for _ in range(self.rng.randrange(1, 60))]
        others = [
            peer.bulk_in(SOURCE, 512, lambda p: expect(p, p.status in (Status.SUCCESS, Status.CANCELLED)))
            for _ in range(self.rng.randrange(20))
        ]
        unknown = [10**9 + number for number in range(5)]
        victims = silent + others + unknown
        self.rng.shuffle(victims)
        for number in victims:
            peer.parser.send(CancelDataPacket(id=number))
            if self.rng.randrange(4) == 0:
                peer.move()
        ask_loop(peer, self.rng)
        peer.settle()
        self.leave(peer)

    def stall_and_clear(self) -> None:
        """An endpoint that stalls, and one that is told to."""
        peer = self.guest()
        for _ in range(self.rng.randrange(1, 5)):
            peer.bulk_in(STALLING, 64, status_is(Status.STALL))
            peer.settle()
            peer.clear_halt(STALLING)
            peer.bulk_in(STALLING, 64, status_is(Status.SUCCESS))
            peer.control_out(0x11, index=SOURCE)
            peer.settle()
            peer.bulk_in(SOURCE, 512, status_is(Status.STALL))
            peer.settle()
            peer.clear_halt(SOURCE)
            ask_source(peer, self.rng)
            peer.settle()
        self.leave(peer)

    def iso_streams(self) -> None:
        """Isochronous streams both ways, ended politely or not."""
        peer = self.guest()
        peer.alternate(1, self.rng.choice((1, 2)))
        peer.stream(StartIsoStream, IsoStreamStatus, ISO_IN, pkts_per_urb=8, no_urbs=4)
        peer.stream(StartIsoStream, IsoStreamStatus, ISO_OUT, pkts_per_urb=8, no_urbs=4)
        for number in range(100):
            peer.parser.send(IsoPacket(id=number, endpoint=ISO_OUT, data=bytes(512)))
        peer.wait(lambda: peer.stream_packets > 20, "isochronous data")
        if self.rng.randrange(2):
            for endpoint in (ISO_IN, ISO_OUT):
                peer.stream(StopIsoStream, IsoStreamStatus, endpoint)
            peer.settle()
            peer.random_requests(self.rng, 5)
            peer.settle()
        self.leave(peer)

    def garbage(self) -> None:
        """Bytes that are no packets: the exporter ends the connection, or waits for the rest of something."""
        peer = self.guest()
        peer.random_requests(self.rng, self.rng.randrange(5))
        peer.parser.do_write()
        if self.rng.randrange(2):
            self.send_raw(peer, self.rng.randbytes(self.rng.randrange(1, 3000)))
        else:
            self.send_raw(peer, struct.pack("<IIQ", self.rng.choice((99, 5000, 2**32 - 1)), 4, 1) + b"none")
            peer.wait_for_end()
        self.leave(peer)

    def unplugged(self) -> None:
        """With requests under way or idle; the guest is told. A loopback device comes back on the same connection."""
        peer = self.guest()
        peer.random_requests(self.rng, self.rng.randrange(20))
        if self.rng.randrange(2):
            peer.settle()
        else:
            peer.bulk_in(SILENT, 64, lambda packet: None)
        peer.relax()
        peer.control_out(0x10, value=self.rng.choice((0, 0, 3)))
        peer.relax()
        peer.wait(lambda: not peer.has_device, "the guest hears of it")
        if self.subject.bed:
            self.leave(peer)
            self.restart()
            return
        peer.wait(lambda: peer.has_device, "the device is back")
        peer.random_requests(self.rng, 5)
        peer.settle()
        self.leave(peer)

    def unplugged_idle(self) -> None:
        """Unplugged while nobody asks anything of it, with a guest or without one."""
        if self.subject.bed:
            self.restart(VUSB_UNPLUG_AFTER_MS="1000")
            if self.rng.randrange(2):
                peer = self.connected()
                peer.wait(lambda: not peer.has_device, "the guest hears of it")
                self.leave(peer)
            else:
                until(lambda: "unplugged" in self.subject.log_text(), "the exporter hears of it")
            self.restart()
            return
        peer = self.guest()
        seen = self.subject.log_text().count(BACK)
        peer.control_out(0x10, value=20)
        peer.settle()
        self.leave(peer)
        until(lambda: self.subject.log_text().count(BACK) > seen, "the device is back")

    def restart(self, **variables: str) -> None:
        """What was unplugged from the virtual bus stays away: another process."""
        self.subject.stop()
        self.subject.start(**variables)


def waiting(connection: Connection) -> int:
    """Bytes in a socket's receive buffer."""
    import fcntl
    import termios

    return int(struct.unpack("i", fcntl.ioctl(connection.fileno(), termios.FIONREAD, b"\0" * 4))[0])


EVENTS: dict[Callable[[Soak], None], int] = {
    Soak.polite_close: 3,
    Soak.killed: 3,
    Soak.cut: 4,
    Soak.half_close: 2,
    Soak.connect_and_close: 1,
    Soak.second_guest: 1,
    Soak.stalled: 2,
    Soak.device_reset: 2,
    Soak.set_configuration: 2,
    Soak.cancel_storm: 2,
    Soak.stall_and_clear: 2,
    Soak.iso_streams: 2,
    Soak.garbage: 2,
    Soak.unplugged: 2,
    Soak.unplugged_idle: 1,
}
"""What may happen, and how often."""
RARE = (Soak.unplugged, Soak.unplugged_idle)
"""Events that start another process on the bed: a tenth as often there."""


class Report:
    """What a soak gave."""

    def __init__(self) -> None:
        self.events: Counter[str] = Counter()
        self.answers = 0
        self.turned_away = 0
        self.seconds = 0.0
        self.slowest = 0.0
        self.memory = (0, 0)
        self.descriptors = (0, 0)
        self.starts = 0

    def lines(self) -> list[str]:
        """For people."""
        return [
            f"{sum(self.events.values())} events in {self.seconds:.0f} s, {self.answers} answers checked, "
            f"{self.turned_away} guests came too early, slowest fresh session {self.slowest:.2f} s",
            f"memory after the warm-up {self.memory[0]} KiB, at the end {self.memory[1]} KiB; "
            f"descriptors {self.descriptors[0]}, {self.descriptors[1]}; processes started {self.starts}",
            ", ".join(f"{name} {count}" for name, count in sorted(self.events.items())),
        ]


def soak(seed: int, events: int, *, bed: bool = False, tell: Callable[[str], object] = lambda text: None) -> Report:
    """Run *events*. Raises SoakError with the number and the kind of the event that broke it."""
    rng = random.Random(seed)
    weights = [weight * (0.1 if bed and event in RARE else 1) for event, weight in EVENTS.items()]
    chosen: Sequence[Callable[[Soak], None]] = rng.choices(list(EVENTS), weights, k=events)
    report = Report()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        subject = Subject(bed, Path(folder))
        run = Soak(subject, rng)
        try:
            memory: dict[int, list[int]] = {}  # by process
            for number, event in enumerate(chosen):
                name = event.__name__
                report.events[name] += 1
                try:
                    event(run)
                    run.fresh_session()
                except (SoakError, OSError, ConnectionClosed, TimeoutError) as error:
                    raise SoakError(f"seed {seed}, event {number} ({name}): {type(error).__name__} {error}") from error
                if number >= events * WARM_UP:
                    memory.setdefault(subject.process.pid, []).append(subject.resident())
                if number % 100 == 99:
                    tell(f"{number + 1} events, {time.monotonic() - started:.0f} s, {subject.resident()} KiB")
            report.descriptors = (subject.descriptors, subject.count_descriptors())
            longest = max(memory.values(), key=len)
            report.memory = (longest[0], longest[-1])
            if report.memory[1] - report.memory[0] > GROWTH:
                raise SoakError(f"the exporter has grown from {longest[0]} to {longest[-1]} KiB")
            subject.stop()
        finally:
            subject.kill()
    report.answers, report.turned_away, report.slowest = run.answers, run.turned_away, run.slowest
    report.starts = subject.starts
    report.seconds = time.monotonic() - started
    return report


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Run the soak test and print its report.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--events", type=int, default=1000)
    parser.add_argument("--bed", action="store_true", help="with the virtual USB bus below the real libusb")
    options = parser.parse_args()
    report = soak(options.seed, options.events, bed=options.bed, tell=lambda text: print(text, flush=True))
    for line in report.lines():
        print(line)


if __name__ == "__main__":
    main()
