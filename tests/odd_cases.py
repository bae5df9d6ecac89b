"""Odd things that a guest may do, as a table: each case is a script for a guest with one device, 1209:0001.

A case runs against three hosts (``odd_peers``): usbredirect 0.15 and ours, both above the real libusb on the virtual
bus, and ours with a LoopbackDevice. What the guest gets is written down as lines of text that do not depend on time:
see :meth:`Guest.describe`. Nothing waits for nothing: where no answer is expected, a later request's answer
proves that there was none.

The scripts follow the sections of HOST_BEHAVIOUR.md.
"""

from __future__ import annotations

import select
import socket
import struct
import time
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from usbredir.capabilities import ALL
from usbredir.errors import ConnectionClosed
from usbredir.filter import FilterRule
from usbredir.packets import (
    AllocBulkStreams,
    BufferedBulkPacket,
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
    FreeBulkStreams,
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
from usbredir.proto import Capability, PacketType, Status, TransferType, endpoint_address

PATIENCE = 20.0
"""Seconds after which an answer counts as missing, on a busy machine."""
FENCE_ID = 0xFE9CE
"""Id of the requests whose answers only prove that nothing else came."""

STREAM_STATUSES = (IsoStreamStatus, InterruptReceivingStatus, BulkReceivingStatus)
STREAM_DATA = (IsoPacket, InterruptPacket, BufferedBulkPacket)
INFORMATION = (InterfaceInfo, EpInfo, DeviceConnect)
SOURCES = {0x82, 0x83, 0x84, 0x85}
"""Endpoints that bring data by themselves: how much depends on time."""
COUNTERS = {0x83, 0x84}
"""Endpoints whose data begins with a counter of 8 bytes."""
SHOWN_DATA = 16
"""Bytes of data that are shown; of more, length and checksum."""

THE_END = "the connection ended"


# ---------------------------------------------------------------- the guest


class Guest(ParserCallbacks):
    """Performs a script on a connected socket and writes down what the host says.

    Args:
        sock: connected to the host; owned by the caller.
        capabilities: to announce. Any set, also one without DEVICE_DISCONNECT_ACK.
        unplugged: returns when the device has been unplugged, as far as the bed can tell.

    Attributes:
        answers: what came, a line each.
        cursor: packets before it were waited for.
    """

    def __init__(self, sock: socket.socket, capabilities: Collection[int], unplugged: Callable[[], None]) -> None:
        self.answers: list[str] = []
        self.unplugged = unplugged
        self.ended = False
        self._socket = sock
        sock.setblocking(True)  # reading asks not to wait
        self._outgoing = bytearray()
        self._acknowledges = Capability.DEVICE_DISCONNECT_ACK in capabilities
        self._packets: list[Packet] = []
        self.cursor = 0
        self._hidden = 0  # fences' answers still to come
        self._next_ids: dict[int, int] = {}  # of running streams of sources, by endpoint
        self._counters: dict[int, int] = {}
        self._hello = b""
        self._parser = Parser(self, capabilities=capabilities)
        self._parser.do_write()

    # ------------------------------------------------------------ callbacks of the parser

    def log(self, level: LogLevel, message: str) -> None:
        assert level > LogLevel.WARNING, f"the guest complains about what the host sent: {message}"

    def read(self, count: int) -> bytes | None:
        try:
            return self._socket.recv(count, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None
        except ConnectionError:
            return b""

    def write(self, data: memoryview) -> int:
        if not self._hello:
            # A guest always announces that it acknowledges; this one need not.
            self._hello = bytes(data) if self._acknowledges else bytes(data[:-4]) + bytes((data[-4] & ~8, 0, 0, 0))
        elif self._acknowledges or data[0] != PacketType.DEVICE_DISCONNECT_ACK:
            self._outgoing += data
        return len(data)

    def packet_received(self, packet: Packet) -> None:
        self._packets.append(packet)
        if self._hidden and isinstance(packet, ConfigurationStatus) and packet.id == FENCE_ID:
            self._hidden -= 1
        elif isinstance(packet, STREAM_DATA) and packet.endpoint in SOURCES:
            self._stream_data(packet)
        else:
            if isinstance(packet, STREAM_STATUSES) and packet.status != Status.INVAL:  # that changes no stream
                self._next_ids.pop(packet.endpoint, None)
            self.answers.append(self.describe(packet))

    def _stream_data(self, packet: IsoPacket | InterruptPacket | BufferedBulkPacket) -> None:
        """One line for all packets of a run whose ids follow one another."""
        endpoint = packet.endpoint
        text = f"{type(packet).__name__}s on 0x{endpoint:02x} from id {packet.id}"
        text += f", {len(packet.data)} bytes, {Status(packet.status).name}"
        if packet.id != self._next_ids.get(endpoint) or packet.status != Status.SUCCESS:
            self._counters.pop(endpoint, None)
            if not self.answers or self.answers[-1] != text:
                self.answers.append(text)
        elif endpoint in COUNTERS:
            assert self._counter_of(packet) == self._counters[endpoint] + 1, "data out of order"
        self._counters[endpoint] = self._counter_of(packet)
        self._next_ids[endpoint] = packet.id + 1

    @staticmethod
    def _counter_of(packet: IsoPacket | InterruptPacket | BufferedBulkPacket) -> int:
        return int.from_bytes(packet.data[:8], "little")

    # ------------------------------------------------------------ for steps

    def send(self, packet: Packet | bytes) -> None:
        """Goes out with the next :meth:`flush`; bytes as they are."""
        if isinstance(packet, bytes):
            self._outgoing += packet
        else:
            self._parser.send(packet)
            self._parser.do_write()

    def greet(self) -> None:
        """Say hello."""
        self._outgoing += self._hello

    def flush(self) -> None:
        """Write everything at once."""
        self._parser.do_write()
        data, self._outgoing = bytes(self._outgoing), bytearray()
        try:
            self._socket.sendall(data)
        except ConnectionError:
            self.ended = True

    def wait(self, wanted: Callable[[Packet], bool], count: int = 1, what: object = "") -> None:
        """Read until *count* such packets came after those of the last wait, or the host ends the connection."""
        limit = time.monotonic() + PATIENCE
        while True:
            found = [i for i in range(self.cursor, len(self._packets)) if wanted(self._packets[i])]
            if len(found) >= count:
                self.cursor = found[count - 1] + 1
                return
            if self.ended:
                return
            assert self._receive(limit), f"no {what or 'answer'} came; so far: {self.answers}"

    def wait_for_end(self) -> None:
        """Read until the host ends the connection."""
        self.flush()
        limit = time.monotonic() + PATIENCE
        while not self.ended:
            assert self._receive(limit), f"the host does not end the connection; so far: {self.answers}"

    def fence(self) -> None:
        """Ask for something that is answered at once, to prove what did not come before."""
        self._hidden += 1
        self.send(GetConfiguration(id=FENCE_ID))
        self.flush()
        self.wait(lambda packet: isinstance(packet, ConfigurationStatus) and packet.id == FENCE_ID, what="fence")

    def _receive(self, limit: float) -> bool:
        """Wait for bytes and parse them; False when the time is over."""
        if not select.select([self._socket], [], [], max(0.0, limit - time.monotonic()))[0]:
            return False
        try:
            self._parser.do_read()
        except ConnectionClosed:
            self.ended = True
        if self._outgoing:
            self.flush()  # an acknowledgement
        return True

    # ------------------------------------------------------------ text

    @staticmethod
    def describe(packet: Packet) -> str:
        """A packet as a line: fields that are 0 and long data left out, no texts that differ between hosts."""
        values = packet.as_dict()
        name = type(packet).__name__
        if isinstance(packet, Hello):
            return f"{name} {' '.join(c.name for c in ALL if c in packet.capabilities)}"
        if isinstance(packet, InterfaceInfo):
            return f"{name} {_describe_interfaces(packet)}"
        if isinstance(packet, EpInfo):
            return f"{name} {_describe_endpoints(packet)}"
        words = [name]
        for key, value in values.items():
            if key == "data":
                if value:
                    words.append(f"data={_describe_data(value)}")
            elif key == "status":
                words.append(Status(value).name)
            elif value is None or value:
                words.append(f"{key}=0x{value:02x}" if key == "endpoint" else f"{key}={value}")
        return " ".join(words)


def _describe_data(data: bytes | bytearray | memoryview) -> str:
    if len(data) <= SHOWN_DATA:
        return bytes(data).hex()
    return f"<{bytes(data[:4]).hex()}.. crc {zlib.crc32(data):08x}>"


def _describe_interfaces(packet: InterfaceInfo) -> str:
    words = [f"{packet.interface_count}:"]
    tables = packet.interface_class, packet.interface_subclass, packet.interface_protocol
    for index, (number, *codes) in enumerate(zip(packet.interface, *tables, strict=True)):
        if index < packet.interface_count or number or any(codes):
            words.append(f"{number}={'/'.join(f'{code:02x}' for code in codes)}")
    return " ".join(words)


def _describe_endpoints(packet: EpInfo) -> str:
    """Type, interval, interface, packet size and streams of each slot in use; "-" for what is not on the wire."""
    words = []
    for index, kind in enumerate(packet.type):
        tables = packet.interval, packet.interface, packet.max_packet_size, packet.max_streams
        values = ["-" if table is None else table[index] for table in tables]
        if kind != TransferType.INVALID or any(value not in (0, "-") for value in values):
            words.append(f"{endpoint_address(index):02x}={kind}/{'/'.join(str(value) for value in values)}")
    return " ".join(words)


# ---------------------------------------------------------------- steps


class Step(ABC):
    """One thing that a scripted guest does. Packets and bytes are steps, too: they are sent with what follows."""

    @abstractmethod
    def perform(self, guest: Guest) -> None:
        """Do it."""


def perform(guest: Guest, steps: Sequence[Step | Packet | bytes]) -> None:
    """Perform a script, or its beginning when the host ends the connection."""
    for step in steps:
        if guest.ended:
            break
        if isinstance(step, Step):
            step.perform(guest)
        else:
            guest.send(step)
    if guest.ended:
        guest.answers.append(THE_END)


@dataclass(frozen=True)
class Ask(Step):
    """Send packets, each when the answer to the one before has come."""

    packets: tuple[Packet, ...]

    def __init__(self, *packets: Packet) -> None:
        object.__setattr__(self, "packets", packets)

    def perform(self, guest: Guest) -> None:
        for packet in self.packets:
            guest.send(packet)
            guest.flush()
            wait_for_answer(guest, packet.id)


def wait_for_answer(guest: Guest, packet_id: int) -> None:
    """Wait for what carries an id and is no data of a stream."""

    def is_answer(answer: Packet) -> bool:
        # Data of interrupt endpoints comes in the same packets as answers to interrupt transfers.
        streamed = isinstance(answer, STREAM_DATA) and bool(answer.endpoint & 0x80)
        return answer.id == packet_id and not streamed and not isinstance(answer, INFORMATION)

    guest.wait(is_answer, what=f"answer {packet_id}")


@dataclass(frozen=True)
class Unordered(Step):
    """Send a packet and wait for the answers with these ids; what comes meanwhile is written down sorted."""

    packet: Packet
    ids: tuple[int, ...]

    def perform(self, guest: Guest) -> None:
        before, cursor = len(guest.answers), guest.cursor
        guest.send(self.packet)
        guest.flush()
        ends = []
        for packet_id in self.ids:
            guest.cursor = cursor
            wait_for_answer(guest, packet_id)
            ends.append(guest.cursor)
        guest.cursor = max(ends)
        guest.answers[before:] = sorted(guest.answers[before:])


@dataclass(frozen=True)
class Await(Step):
    """Wait until packets of a type have come, with these values."""

    kind: type[Packet]
    count: int = 1
    values: Mapping[str, int] = field(default_factory=dict)
    by_endpoint: bool = False
    """Written down by endpoint: only the order on each of them is the same for all devices."""

    def perform(self, guest: Guest) -> None:
        guest.flush()
        before = len(guest.answers)
        guest.wait(
            lambda p: isinstance(p, self.kind) and self.values.items() <= p.as_dict().items(),
            self.count,
            f"{self.count} x {self.kind.__name__}",
        )
        if self.by_endpoint:
            guest.answers[before:] = sorted(guest.answers[before:], key=_endpoint_of)


def _endpoint_of(answer: str) -> str:
    return answer.partition("endpoint=")[2][:4]


class Fence(Step):
    """Prove that nothing (else) comes."""

    def perform(self, guest: Guest) -> None:
        guest.fence()


class Greeting(Step):
    """Say hello and wait for the device."""

    def perform(self, guest: Guest) -> None:
        guest.greet()
        guest.flush()
        guest.wait(lambda packet: isinstance(packet, DeviceConnect), what="device")


class End(Step):
    """The host has to end the connection."""

    def perform(self, guest: Guest) -> None:
        guest.wait_for_end()


@dataclass(frozen=True)
class Unplugged(Step):
    """Have the device unplugged, and wait until it is.

    Attributes:
        noticed: a running stream notices, perhaps before the answer to the request has come.
    """

    noticed: bool = False

    def perform(self, guest: Guest) -> None:
        before, cursor = len(guest.answers), guest.cursor
        Ask(control_out(900, UNPLUG)).perform(guest)
        guest.unplugged()
        if self.noticed:
            guest.cursor = cursor
            guest.wait(lambda packet: isinstance(packet, DeviceDisconnect), what="disconnection")
            guest.answers[before:] = sorted(guest.answers[before:])


@dataclass(frozen=True)
class Repeat(Step):
    """Repeat a control request until it brings *data*; only the last answer is written down."""

    packet: ControlPacket
    data: bytes

    def perform(self, guest: Guest) -> None:
        limit = time.monotonic() + PATIENCE
        wanted = f"data={_describe_data(self.data)}"
        while True:
            before = len(guest.answers)
            Ask(self.packet).perform(guest)
            if guest.ended or any(wanted in answer for answer in guest.answers[before:]):
                return
            assert time.monotonic() < limit, f"never: {wanted}; so far: {guest.answers}"
            del guest.answers[before:]


FENCE, GREETING, END, UNPLUGGED = Fence(), Greeting(), End(), Unplugged()


# ---------------------------------------------------------------- words of the scripts

PATTERN, STORE, FETCH, STATISTICS = 0x01, 0x02, 0x03, 0x20
UNPLUG, HALT = 0x10, 0x11
"""Vendor requests of the device."""

LOOP_OUT, LOOP_IN, SINK, SOURCE = 0x01, 0x81, 0x02, 0x82
INTERRUPT_OUT, INTERRUPT_IN, ISO_OUT, ISO_IN = 0x03, 0x83, 0x04, 0x84
STALLING, SILENT, MISSING_OUT, MISSING_IN = 0x85, 0x86, 0x0A, 0x8A


def control_in(packet_id: int, request: int, length: int, value: int = 0, index: int = 0) -> ControlPacket:
    """A vendor request."""
    return ControlPacket(
        id=packet_id, endpoint=0x80, request=request, requesttype=0xC0, value=value, index=index, length=length
    )


def control_out(packet_id: int, request: int, data: bytes = b"", value: int = 0, index: int = 0) -> ControlPacket:
    """A vendor request."""
    return ControlPacket(id=packet_id, request=request, requesttype=0x40, value=value, index=index, data=data)


def clear_halt(packet_id: int, endpoint: int) -> ControlPacket:
    """CLEAR_FEATURE(ENDPOINT_HALT)."""
    return ControlPacket(id=packet_id, request=1, requesttype=0x02, index=endpoint)


def halt(packet_id: int, endpoint: int) -> ControlPacket:
    """Have the device halt an endpoint."""
    return control_out(packet_id, HALT, index=endpoint)


def bulk_in(packet_id: int, endpoint: int, length: int, stream_id: int = 0) -> BulkPacket:
    return BulkPacket(id=packet_id, endpoint=endpoint, length=length, stream_id=stream_id)


def bulk_out(packet_id: int, endpoint: int, data: bytes, stream_id: int = 0) -> BulkPacket:
    return BulkPacket(id=packet_id, endpoint=endpoint, data=data, stream_id=stream_id)


def interrupt_out(packet_id: int, data: bytes, endpoint: int = INTERRUPT_OUT) -> InterruptPacket:
    return InterruptPacket(id=packet_id, endpoint=endpoint, data=data)


def iso_out(*sizes: int, first_id: int = 0, endpoint: int = ISO_OUT) -> tuple[IsoPacket, ...]:
    return tuple(
        IsoPacket(id=packet_id, endpoint=endpoint, data=bytes((packet_id & 0xFF,)) * size)
        for packet_id, size in enumerate(sizes, first_id)
    )


def receive_bulk(packet_id: int, endpoint: int, size: int, transfers: int, stream_id: int = 0) -> StartBulkReceiving:
    return StartBulkReceiving(
        id=packet_id, endpoint=endpoint, bytes_per_transfer=size, no_transfers=transfers, stream_id=stream_id
    )


def iso_start(packet_id: int, endpoint: int, pkts: int, urbs: int) -> StartIsoStream:
    return StartIsoStream(id=packet_id, endpoint=endpoint, pkts_per_urb=pkts, no_urbs=urbs)


def iso_statistics(packet_id: int) -> ControlPacket:
    """Ask the device how many iso OUT packets and bytes it got."""
    return control_in(packet_id, STATISTICS, 16)


def iso_received(count: int, size: int) -> bytes:
    """The answer to that."""
    return struct.pack("<QQ", count, size)


def alternate(packet_id: int, number: int, interface: int = 1) -> SetAltSetting:
    return SetAltSetting(id=packet_id, interface=interface, alt=number)


def raw(packet_type: int, body: bytes = b"", packet_id: int = 0, *, length: int | None = None) -> bytes:
    """A packet that no parser would send, with a 64-bit id."""
    return struct.pack("<IIQ", packet_type, len(body) if length is None else length, packet_id) + body


def hello_again() -> bytes:
    return raw(PacketType.HELLO, b"another".ljust(64, b"\0") + b"\0\0\0\0")


# ---------------------------------------------------------------- cases


@dataclass(frozen=True)
class Difference:
    """Why and how our answers differ from usbredirect's.

    Attributes:
        reason: words that docs/deviations.md has, too.
        answers: the lines that differ, "- " theirs, "+ " ours.
        log: the same of the device's log.
    """

    reason: str
    answers: tuple[str, ...]
    log: tuple[str, ...] = ()


@dataclass(frozen=True)
class Case:
    """A script and what it runs with.

    Attributes:
        settings: of the virtual bus: VUSB_* variables, without the prefix.
        greets: the script begins with the guest's hello, and the device.
        announcement: what comes before the script is written down.
        differs: from usbredirect; None: equal.
        real_only: why the case makes no sense with a LoopbackDevice; empty: it does.
    """

    name: str
    steps: tuple[Step | Packet | bytes, ...]
    settings: Mapping[str, str] = field(default_factory=dict)
    capabilities: Collection[int] = ALL
    greets: bool = True
    announcement: bool = False
    differs: Difference | None = None
    real_only: str = ""


def case(name: str, *steps: Step | Packet | bytes, **options: Any) -> Case:
    return Case(name, steps, **options)


RELEASED = ("+ release 0", "+ release 1", "+ reset", "+ attach 0", "+ attach 1", "+ close")
"""What a host that has died does not do."""


def dies(reason: str, *answers: str, signal: str = "SIGTRAP") -> Difference:
    """usbredirect dies; ours gives these answers, and the device back."""
    return Difference(reason, (f"- the process died: {signal}", *(f"+ {answer}" for answer in answers)), RELEASED)


PARSER_ERROR = "an error message of the parser ends it by a signal"
ISO_ELSEWHERE = "an isochronous packet for an endpoint of another type"
DIES_OF_MESSAGE = dies(PARSER_ERROR)
DIES_OF_BAD_PACKET = dies(PARSER_ERROR, THE_END)

ACK_ONLY = frozenset({Capability.DEVICE_DISCONNECT_ACK})
SLOW_ISO = {"ISO_PERIOD_US": "1000"}
FAST_ISO = {"ISO_PERIOD_US": "0"}
HELD_ISO = {"ISO_PERIOD_US": "100000"}
SUPER = {"SPEED": "super"}
LOOP_MASK = 1 << 1 | 1 << 17
SAYS_NOTHING = "a virtual device has no kernel driver"
NO_STREAMS = "virtual devices have no bulk streams"
NOT_LIBUSB = "a limit of libusb, which virtual devices do not need"

ANNOUNCEMENT = (
    case("announced with all capabilities", announcement=True),
    case("announced without any capability", FENCE, capabilities=(), announcement=True),
    case("announced with acknowledgement only", FENCE, capabilities=ACK_ONLY, announcement=True),
    case(
        "announced with 32-bit ids",
        Ask(GetConfiguration(id=0xFFFFFFFF)),
        capabilities=ALL - {Capability.IDS_64BITS},
        announcement=True,
    ),
    case(
        "announced without packet sizes, bulk streams asked for",
        FENCE,
        capabilities=ALL - {Capability.EP_INFO_MAX_PACKET_SIZE, Capability.BULK_STREAMS},
        announcement=True,
    ),
    case(
        "announced with sizes but no streams",
        FENCE,
        capabilities=ALL - {Capability.BULK_STREAMS, Capability.CONNECT_DEVICE_VERSION},
        announcement=True,
    ),
    case(
        "announced at low speed",
        settings={"SPEED": "low"},
        announcement=True,
        real_only="the device models differ at low speed",
    ),
    case("announced at full speed", settings={"SPEED": "full"}, announcement=True),
    case("announced at super speed", settings=SUPER, announcement=True),
    case("64-bit ids come back whole", Ask(GetConfiguration(id=2**64 - 1), control_in(2**63 + 5, PATTERN, 4))),
    case(
        "second configuration at the start is restored at the end",
        Ask(SetConfiguration(id=1, configuration=1)),
        settings={"CONFIG": "2"},
        announcement=True,
        real_only="the bus decides the configuration at the start",
    ),
    case(
        "unconfigured at the start",
        settings={"CONFIG": "0"},
        announcement=True,
        real_only="the bus decides the configuration at the start",
    ),
    case("kernel drivers come back", Ask(control_in(1, PATTERN, 4)), settings={"DRIVER": "1"}, real_only=SAYS_NOTHING),
    case(
        "kernel drivers stay away from another configuration",
        Ask(SetConfiguration(id=1, configuration=2), SetConfiguration(id=2, configuration=1)),
        settings={"DRIVER": "1"},
        real_only=SAYS_NOTHING,
    ),
    case("a second hello", hello_again(), FENCE, differs=DIES_OF_MESSAGE),
    case(
        "requests before hello",
        Ask(
            control_in(1, PATTERN, 4),
            bulk_in(2, LOOP_IN, 16),
            interrupt_out(3, b"x"),
            SetConfiguration(id=4, configuration=2),
            GetConfiguration(id=5),
            SetAltSetting(id=6, interface=1, alt=1),
            GetAltSetting(id=7, interface=0),
        ),
        Reset(),
        CancelDataPacket(id=2),
        StopInterruptReceiving(id=8, endpoint=INTERRUPT_IN),
        FENCE,
        GREETING,
        Ask(control_in(9, PATTERN, 4)),
        capabilities=ACK_ONLY,
        greets=False,
    ),
    case(
        "streams before hello",
        StartInterruptReceiving(id=1, endpoint=INTERRUPT_IN),
        iso_start(2, ISO_OUT, 4, 4),
        FENCE,
        GREETING,
        FENCE,
        capabilities=ACK_ONLY,
        greets=False,
    ),
)

RESETS = (
    case("the first reset is skipped", Reset(), FENCE),
    case("a reset after a transfer", Ask(control_in(1, PATTERN, 4)), Reset(), FENCE),
    case("two resets in a row after a transfer", Ask(control_in(1, PATTERN, 4)), Reset(), Reset(), FENCE),
    case("a reset after a cleared halt", Ask(clear_halt(1, LOOP_IN)), Reset(), FENCE),
    case("a reset after a refused transfer", Ask(bulk_in(1, INTERRUPT_IN, 8)), Reset(), FENCE),
    case("a reset after too much interrupt data", Ask(interrupt_out(1, bytes(65))), Reset(), FENCE),
    case("a reset after the same configuration", Ask(SetConfiguration(id=1, configuration=1)), Reset(), FENCE),
    case("a reset after an alternate setting", Ask(alternate(1, 1)), Reset(), Ask(GetAltSetting(id=2, interface=1))),
    case("a reset after an alternate setting that does not exist", Ask(alternate(1, 7)), Reset(), FENCE),
    case("a reset after the alternate setting of no interface", Ask(alternate(1, 0, interface=5)), Reset(), FENCE),
    case(
        "a reset after a stream that found the endpoint missing",
        StartInterruptReceiving(id=1, endpoint=MISSING_IN),
        Reset(),
        FENCE,
    ),
    case(
        "a reset with streams running",
        Ask(StartInterruptReceiving(id=1, endpoint=INTERRUPT_IN)),
        Await(InterruptPacket, 3),
        Reset(),
        Await(InterruptReceivingStatus),
        FENCE,
        Ask(StartInterruptReceiving(id=2, endpoint=INTERRUPT_IN)),
        Await(InterruptPacket, 3),
        Ask(StopInterruptReceiving(id=3, endpoint=INTERRUPT_IN)),
    ),
    case(
        "a reset with bulk receiving running",
        Ask(receive_bulk(1, LOOP_IN, 512, 2)),
        Reset(),
        FENCE,
        Ask(receive_bulk(2, LOOP_IN, 512, 2), bulk_out(3, LOOP_OUT, b"after")),
        Await(BufferedBulkPacket),
    ),
    case(
        "a reset with transfers in flight",
        bulk_in(1, SILENT, 64),
        bulk_in(2, SILENT, 64),
        FENCE,
        Reset(),
        Await(BulkPacket, 2),
        FENCE,
        Ask(bulk_out(3, LOOP_OUT, b"after"), bulk_in(4, LOOP_IN, 64)),
    ),
    case(
        "a reset after a cancelled transfer",
        bulk_in(1, SILENT, 64),
        CancelDataPacket(id=1),
        Await(BulkPacket),
        Reset(),
        FENCE,
    ),
)

CONTROL = (
    case(
        "device and configuration descriptors",
        Ask(
            ControlPacket(id=1, endpoint=0x80, requesttype=0x80, request=6, value=0x0200, length=9),
            ControlPacket(id=2, endpoint=0x80, requesttype=0x80, request=6, value=0x0209, length=9),
            ControlPacket(id=3, endpoint=0x80, requesttype=0x80, request=8, length=1),
        ),
    ),
    case(
        "the endpoint decides the direction: OUT", Ask(ControlPacket(id=1, requesttype=0xC0, request=1, data=b"abcd"))
    ),
    case(
        "the endpoint decides the direction: IN", Ask(ControlPacket(id=1, endpoint=0x80, requesttype=0x40, request=2))
    ),
    case("stored and fetched", Ask(control_out(1, STORE, b"hello"), control_in(2, FETCH, 64))),
    case("data stages without data", Ask(control_out(1, STORE), control_in(2, PATTERN, 0), control_in(3, FETCH, 64))),
    case("a stalled request", Ask(control_in(1, 0x7F, 8), control_out(2, 0x7F, b"abc"), control_in(3, PATTERN, 2))),
    case("a data stage of 4096 bytes", Ask(control_in(1, PATTERN, 4096), control_out(2, STORE, bytes(4096)))),
    case(
        "a data stage of 4097 bytes",
        Ask(control_in(1, PATTERN, 4097), control_out(2, STORE, bytes(4097))),
        real_only=NOT_LIBUSB,
    ),
    case("a data stage of 65535 bytes", Ask(control_in(1, PATTERN, 0xFFFF)), real_only=NOT_LIBUSB),
    case(
        "control on other endpoints",
        Ask(
            ControlPacket(id=1, endpoint=LOOP_IN, requesttype=0xC0, request=1, length=4),
            ControlPacket(id=2, endpoint=LOOP_OUT, requesttype=0x40, request=2, data=b"a"),
            ControlPacket(id=3, endpoint=MISSING_IN, requesttype=0xC0, request=1, length=4),
        ),
    ),
    case(
        "control on endpoints with meaningless bits",
        Ask(ControlPacket(id=1, endpoint=0xD0, requesttype=0xC0, request=1, length=4)),
    ),
    case(
        "a halt is cleared",
        Ask(halt(1, LOOP_IN), bulk_in(2, LOOP_IN, 64), clear_halt(3, LOOP_IN)),
        Ask(bulk_out(4, LOOP_OUT, b"again"), bulk_in(5, LOOP_IN, 64)),
    ),
    case("a halt that cannot be cleared", Ask(clear_halt(1, MISSING_IN), clear_halt(2, 0x80), clear_halt(3, 0x00))),
    case(
        "requests that are like the clearing of a halt",
        Ask(
            ControlPacket(id=1, requesttype=0x02, request=1, value=1, index=LOOP_IN),
            ControlPacket(id=2, requesttype=0x42, request=1, index=LOOP_IN),
            ControlPacket(id=3, requesttype=0x00, request=1, value=1),
        ),
        real_only="the device models differ in standard requests",
    ),
    case(
        "the clearing of a halt as an IN request",
        Ask(ControlPacket(id=1, endpoint=0x80, requesttype=0x02, request=1, index=LOOP_IN)),
    ),
    case(
        "the clearing of a halt with data",
        Ask(ControlPacket(id=1, requesttype=0x02, request=1, index=LOOP_IN, data=b"a")),
        real_only="the device models differ in standard requests",
    ),
    case(
        "SET_CONFIGURATION and SET_INTERFACE as control requests",
        Ask(
            ControlPacket(id=1, requesttype=0x00, request=9, value=2),
            ControlPacket(id=2, requesttype=0x01, request=11, value=1, index=1),
            GetConfiguration(id=3),
            GetAltSetting(id=4, interface=1),
        ),
    ),
)

BULK = (
    case("a message through the loop", Ask(bulk_out(1, LOOP_OUT, b"hello"), bulk_in(2, LOOP_IN, 64))),
    case("no bytes through the loop", Ask(bulk_out(1, LOOP_OUT, b""), bulk_in(2, LOOP_IN, 64))),
    case("no bytes wanted", Ask(bulk_in(1, SOURCE, 0))),
    case(
        "one MiB through the loop", Ask(bulk_out(1, LOOP_OUT, bytes(range(256)) * 4096), bulk_in(2, LOOP_IN, 1 << 20))
    ),
    case(
        "70000 bytes for a guest of 16-bit lengths",
        Ask(bulk_out(1, LOOP_OUT, b"a" * 65535), bulk_in(2, LOOP_IN, 65535)),
        capabilities=ALL - {Capability.BULK_LENGTH_32BITS},
    ),
    case("babble", Ask(bulk_out(1, LOOP_OUT, b"0123456789"), bulk_in(2, LOOP_IN, 4), bulk_out(3, LOOP_OUT, b"x"))),
    case(
        "a stall, cleared, one success, a stall again",
        Ask(bulk_in(1, STALLING, 64), bulk_in(2, STALLING, 64), clear_halt(3, STALLING)),
        Ask(bulk_in(4, STALLING, 64), bulk_in(5, STALLING, 64)),
    ),
    case(
        "a halted OUT endpoint",
        Ask(halt(1, SINK), bulk_out(2, SINK, b"abc"), clear_halt(3, SINK), bulk_out(4, SINK, b"d")),
    ),
    case(
        "bulk on other endpoints",
        Ask(
            bulk_in(1, INTERRUPT_IN, 8),
            bulk_out(2, INTERRUPT_OUT, b"abc"),
            bulk_in(3, 0x80, 8),
            bulk_out(4, 0x00, b"abc"),
            bulk_in(5, MISSING_IN, 8),
            bulk_out(6, MISSING_OUT, b"abc"),
            bulk_in(7, ISO_IN, 8),
        ),
    ),
    case(
        "bulk on an endpoint with meaningless bits",
        Ask(bulk_out(1, LOOP_OUT | 0x40, b"hello"), bulk_in(2, LOOP_IN | 0x70, 64)),
    ),
    case(
        "a stream id without streams",
        Ask(bulk_out(1, LOOP_OUT, b"hello", stream_id=3), bulk_in(2, LOOP_IN, 64, stream_id=3)),
    ),
    case(
        "two transfers with the same id",
        bulk_in(7, LOOP_IN, 64),
        bulk_in(7, LOOP_IN, 64),
        bulk_out(1, LOOP_OUT, b"first"),
        bulk_out(2, LOOP_OUT, b"second"),
        Await(BulkPacket, 4, by_endpoint=True),
    ),
    case(
        "many transfers in flight",
        *(bulk_in(100 + n, LOOP_IN, 64) for n in range(40)),
        *(bulk_out(200 + n, LOOP_OUT, b"%d" % n) for n in range(40)),
        Await(BulkPacket, 80, by_endpoint=True),
    ),
    case("the source counts", Ask(bulk_in(1, SOURCE, 64), bulk_in(2, SOURCE, 1000), bulk_in(3, SOURCE, 8))),
)

INTERRUPT = (
    case("interrupt data", Ask(interrupt_out(1, b"abc"), interrupt_out(2, bytes(64)), interrupt_out(3, b""))),
    case("too much interrupt data", Ask(interrupt_out(1, bytes(65)), interrupt_out(2, bytes(64)))),
    case(
        "interrupt data for other endpoints",
        Ask(
            interrupt_out(1, b"abc", LOOP_OUT),
            interrupt_out(2, b"abc", MISSING_OUT),
            interrupt_out(3, b"abc", 0x00),
            interrupt_out(4, b"abc", ISO_OUT),
        ),
    ),
    case("a halted interrupt OUT endpoint", Ask(halt(1, INTERRUPT_OUT), interrupt_out(2, b"abc"))),
)

CANCELLING = (
    case("cancelled in flight", bulk_in(1, SILENT, 64), CancelDataPacket(id=1), Await(BulkPacket), FENCE),
    case("an unknown id cancelled", CancelDataPacket(id=77), FENCE),
    case("a completed transfer cancelled", Ask(bulk_out(1, SINK, b"abc")), CancelDataPacket(id=1), FENCE),
    case(
        "cancelled twice",
        bulk_in(1, SILENT, 64),
        CancelDataPacket(id=1),
        CancelDataPacket(id=1),
        Await(BulkPacket),
        FENCE,
    ),
    case(
        "an id used again after its cancellation",
        bulk_in(1, SILENT, 64),
        CancelDataPacket(id=1),
        bulk_in(1, LOOP_IN, 64),
        Await(BulkPacket),
        bulk_out(2, LOOP_OUT, b"hello"),
        Await(BulkPacket, 2),
        FENCE,
    ),
    case(
        "one of two with the same id cancelled, and then the other",
        bulk_in(1, LOOP_IN, 64),
        bulk_in(1, SILENT, 64),
        CancelDataPacket(id=1),
        FENCE,
        CancelDataPacket(id=1),
        FENCE,
        CancelDataPacket(id=1),
        FENCE,
    ),
    case(
        "a cancelled transfer takes no data",
        bulk_in(1, LOOP_IN, 64),
        CancelDataPacket(id=1),
        Await(BulkPacket),
        Ask(bulk_out(2, LOOP_OUT, b"hello"), bulk_in(3, LOOP_IN, 64)),
    ),
    case(
        "streams cannot be cancelled by their ids",
        Ask(receive_bulk(50, LOOP_IN, 512, 2)),
        CancelDataPacket(id=0),
        CancelDataPacket(id=50),
        FENCE,
        Ask(bulk_out(1, LOOP_OUT, b"hello")),
        Await(BufferedBulkPacket),
        Ask(StopBulkReceiving(id=51, endpoint=LOOP_IN)),
    ),
)

INTERRUPT_RECEIVING = (
    case(
        "interrupt receiving: started, twice, stopped, twice, started",
        Ask(StartInterruptReceiving(id=1, endpoint=INTERRUPT_IN)),
        Await(InterruptPacket, 12),
        Ask(StartInterruptReceiving(id=2, endpoint=INTERRUPT_IN)),
        Await(InterruptPacket, 12),
        Ask(StopInterruptReceiving(id=3, endpoint=INTERRUPT_IN)),
        Ask(StopInterruptReceiving(id=4, endpoint=INTERRUPT_IN)),
        Ask(StartInterruptReceiving(id=5, endpoint=INTERRUPT_IN)),
        Await(InterruptPacket, 12),
        Ask(StopInterruptReceiving(id=6, endpoint=INTERRUPT_IN)),
    ),
    case(
        "interrupt receiving on other endpoints",
        Ask(StartInterruptReceiving(id=1, endpoint=LOOP_IN)),
        StartInterruptReceiving(id=2, endpoint=MISSING_IN),
        StartInterruptReceiving(id=3, endpoint=0x80),
        FENCE,
        Ask(StopInterruptReceiving(id=4, endpoint=LOOP_IN)),
        StopInterruptReceiving(id=5, endpoint=MISSING_IN),
        StopInterruptReceiving(id=6, endpoint=0x80),
        FENCE,
    ),
    case(
        "interrupt receiving recovers from a stall",
        Ask(StartInterruptReceiving(id=1, endpoint=INTERRUPT_IN)),
        Await(InterruptPacket, 3),
        Ask(halt(2, INTERRUPT_IN)),
        Await(InterruptPacket, values={"id": 0}),
        Await(InterruptPacket, 3),
        Ask(StopInterruptReceiving(id=3, endpoint=INTERRUPT_IN)),
    ),
    case(
        "interrupt receiving on a halted endpoint",
        Ask(halt(1, INTERRUPT_IN), StartInterruptReceiving(id=2, endpoint=INTERRUPT_IN)),
        Await(InterruptPacket, 3),
        Ask(StopInterruptReceiving(id=3, endpoint=INTERRUPT_IN)),
    ),
    case(
        "an OUT transfer while interrupts are received",
        Ask(StartInterruptReceiving(id=1, endpoint=INTERRUPT_IN)),
        Await(InterruptPacket, 3),
        Ask(interrupt_out(2, b"abc"), StopInterruptReceiving(id=3, endpoint=INTERRUPT_IN)),
    ),
)

BULK_RECEIVING = (
    case(
        "bulk receiving: started, twice, stopped, twice, started",
        Ask(receive_bulk(1, LOOP_IN, 512, 2), receive_bulk(2, LOOP_IN, 1024, 4)),
        Ask(bulk_out(10, LOOP_OUT, b"one")),
        Await(BufferedBulkPacket),
        Ask(bulk_out(11, LOOP_OUT, b"two")),
        Await(BufferedBulkPacket),
        Ask(bulk_out(12, LOOP_OUT, b"")),
        Await(BufferedBulkPacket),
        Ask(bulk_out(13, LOOP_OUT, bytes(512))),
        Await(BufferedBulkPacket),
        Ask(StopBulkReceiving(id=3, endpoint=LOOP_IN), StopBulkReceiving(id=4, endpoint=LOOP_IN)),
        Ask(receive_bulk(5, LOOP_IN, 512, 1), bulk_out(14, LOOP_OUT, b"three")),
        Await(BufferedBulkPacket),
        Ask(StopBulkReceiving(id=6, endpoint=LOOP_IN)),
    ),
    case(
        "bulk receiving: parameters out of range",
        Ask(
            receive_bulk(1, LOOP_IN, 512, 0),
            receive_bulk(2, LOOP_IN, 512, 17),
            receive_bulk(3, LOOP_IN, 100, 1),
            receive_bulk(4, LOOP_IN, 513, 1),
            receive_bulk(5, LOOP_IN, 512, 16),
            StopBulkReceiving(id=6, endpoint=LOOP_IN),
        ),
    ),
    case(
        "bulk receiving of no bytes",
        Ask(receive_bulk(1, LOOP_IN, 0, 1), StopBulkReceiving(id=2, endpoint=LOOP_IN)),
        differs=Difference(
            "bulk receiving with 0 bytes per transfer is started",
            (
                "- BulkReceivingStatus id=1 endpoint=0x81 SUCCESS",
                "+ BulkReceivingStatus id=1 endpoint=0x81 STALL",
            ),
        ),
    ),
    case(
        "bulk receiving on other endpoints",
        Ask(receive_bulk(1, INTERRUPT_IN, 64, 1)),
        receive_bulk(2, MISSING_IN, 512, 1),
        receive_bulk(3, 0x80, 64, 1),
        FENCE,
        StopBulkReceiving(id=4, endpoint=MISSING_IN),
        Ask(StopBulkReceiving(id=5, endpoint=INTERRUPT_IN)),
    ),
    case(
        "bulk receiving with a stream id",
        Ask(receive_bulk(1, LOOP_IN, 512, 1, stream_id=3), bulk_out(2, LOOP_OUT, b"hello")),
        Await(BufferedBulkPacket),
        Ask(StopBulkReceiving(id=3, endpoint=LOOP_IN, stream_id=3)),
    ),
    case(
        "bulk receiving of more than fits",
        Ask(receive_bulk(1, LOOP_IN, 512, 1), bulk_out(2, LOOP_OUT, bytes(600))),
        Await(BufferedBulkPacket),
        Ask(bulk_out(3, LOOP_OUT, b"next")),
        Await(BufferedBulkPacket),
        Ask(StopBulkReceiving(id=4, endpoint=LOOP_IN)),
    ),
    case(
        "bulk receiving recovers from stalls",
        Ask(receive_bulk(1, STALLING, 512, 1)),
        Await(BufferedBulkPacket, 3),
        Ask(StopBulkReceiving(id=2, endpoint=STALLING)),
    ),
    case(
        "single transfers between bulk receiving",
        Ask(receive_bulk(1, LOOP_IN, 512, 1)),
        bulk_in(2, LOOP_IN, 64),
        bulk_out(3, LOOP_OUT, b"for the stream"),
        Await(BufferedBulkPacket),
        FENCE,
        bulk_out(4, LOOP_OUT, b"for the transfer"),
        Await(BulkPacket, values={"id": 2}),
        Ask(StopBulkReceiving(id=5, endpoint=LOOP_IN)),
    ),
    case(
        "bulk receiving for a guest that cannot have it",
        raw(PacketType.START_BULK_RECEIVING, struct.pack("<IIBB", 0, 512, LOOP_IN, 1), 1),
        FENCE,
        Ask(bulk_out(2, LOOP_OUT, b"hello"), bulk_in(3, LOOP_IN, 64)),
        capabilities=ALL - {Capability.BULK_RECEIVING},
        differs=dies(
            "bulk receiving for a guest without that capability",
            "BulkPacket id=2 endpoint=0x01 SUCCESS length=5",
            "BulkPacket id=3 endpoint=0x81 SUCCESS length=5 data=68656c6c6f",
        ),
    ),
)

ISO = (
    case("iso streams without their alternate setting", iso_start(1, ISO_IN, 8, 4), iso_start(2, ISO_OUT, 8, 4), FENCE),
    case(
        "iso streams on other endpoints",
        Ask(iso_start(1, SOURCE, 8, 8), iso_start(2, INTERRUPT_IN, 8, 8)),
        iso_start(3, 0x80, 1, 1),
        FENCE,
    ),
    case(
        "iso receiving: started, twice, stopped, twice, started",
        Ask(alternate(1, 1), iso_start(2, ISO_IN, 8, 4)),
        Await(IsoPacket, 70),
        Ask(iso_start(3, ISO_IN, 4, 4)),
        Await(IsoPacket, 20),
        Ask(StopIsoStream(id=4, endpoint=ISO_IN), StopIsoStream(id=5, endpoint=ISO_IN), iso_start(6, ISO_IN, 2, 16)),
        Await(IsoPacket, 40),
        Ask(StopIsoStream(id=7, endpoint=ISO_IN)),
        settings=SLOW_ISO,
    ),
    case(
        "iso streams: parameters out of range",
        Ask(alternate(1, 1)),
        Ask(
            iso_start(2, ISO_IN, 0, 4),
            iso_start(3, ISO_IN, 33, 4),
            iso_start(4, ISO_IN, 4, 0),
            iso_start(5, ISO_IN, 4, 17),
        ),
        Ask(
            iso_start(6, ISO_OUT, 0, 4),
            iso_start(7, ISO_OUT, 33, 4),
            iso_start(8, ISO_OUT, 4, 0),
            iso_start(9, ISO_OUT, 4, 17),
        ),
        Ask(iso_start(10, ISO_OUT, 32, 16), StopIsoStream(id=11, endpoint=ISO_OUT)),
    ),
    case(
        "iso receiving of three packets per microframe",
        Ask(alternate(1, 2), iso_start(2, ISO_IN, 4, 4)),
        Await(IsoPacket, 20),
        Ask(StopIsoStream(id=3, endpoint=ISO_IN)),
        settings=SLOW_ISO,
    ),
    case(
        "interrupt and bulk receiving on an iso endpoint",
        Ask(alternate(1, 1), StartInterruptReceiving(id=2, endpoint=ISO_IN), receive_bulk(3, ISO_IN, 1023, 1)),
        Ask(StopInterruptReceiving(id=4, endpoint=ISO_IN)),
    ),
    case(
        "an alternate setting under an iso stream",
        Ask(alternate(1, 1), iso_start(2, ISO_IN, 8, 4)),
        Await(IsoPacket, 20),
        Ask(alternate(3, 0)),
        FENCE,
        iso_start(4, ISO_IN, 8, 4),
        FENCE,
        Ask(alternate(5, 2), iso_start(6, ISO_IN, 8, 4)),
        Await(IsoPacket, 20),
        Ask(StopIsoStream(id=7, endpoint=ISO_IN)),
        settings=SLOW_ISO,
    ),
    case(
        "a reset under iso streams",
        Ask(alternate(1, 1), iso_start(2, ISO_IN, 8, 4), iso_start(3, ISO_OUT, 8, 4)),
        Await(IsoPacket, 20),
        Reset(),
        Await(IsoStreamStatus, 2),
        FENCE,
        Ask(alternate(4, 1), iso_start(5, ISO_IN, 8, 4)),
        Await(IsoPacket, 20),
        Ask(StopIsoStream(id=6, endpoint=ISO_IN)),
        settings=SLOW_ISO,
    ),
    case(
        "an iso stream whose transfers cannot be submitted",
        Ask(alternate(1, 1)),
        Reset(),
        FENCE,
        iso_start(2, ISO_IN, 8, 4),
        FENCE,
        real_only="the virtual bus forgets alternate settings in a reset",
    ),
    case(
        "iso packets that are refused",
        Ask(alternate(1, 1)),
        *iso_out(4, first_id=5),
        FENCE,
        Ask(iso_start(2, ISO_OUT, 2, 4)),
        *iso_out(1024, first_id=6),
        FENCE,
        Ask(StopIsoStream(id=3, endpoint=ISO_OUT)),
        *iso_out(4, first_id=7),
        FENCE,
    ),
    case(
        "iso packets for endpoints that do not exist, and for control",
        *iso_out(4, first_id=5, endpoint=MISSING_OUT),
        FENCE,
        *iso_out(4, first_id=6, endpoint=0x00),
        FENCE,
        differs=Difference(
            ISO_ELSEWHERE, ("+ IsoStreamStatus id=5 INVAL endpoint=0x0a", "+ IsoStreamStatus id=6 INVAL")
        ),
    ),
    case(
        "iso packets for bulk endpoints",
        *iso_out(4, first_id=5, endpoint=LOOP_OUT),
        FENCE,
        differs=dies(ISO_ELSEWHERE, "IsoStreamStatus id=5 INVAL endpoint=0x01"),
    ),
    case(
        "iso packets for interrupt endpoints",
        *iso_out(4, first_id=5, endpoint=INTERRUPT_OUT),
        FENCE,
        differs=dies(ISO_ELSEWHERE, "IsoStreamStatus id=5 INVAL endpoint=0x03"),
    ),
    case(
        "iso sending starts with half of the ring",
        Ask(alternate(1, 1), iso_start(2, ISO_OUT, 4, 2), iso_start(3, ISO_OUT, 4, 2)),
        *iso_out(10, 20, 30),
        Ask(iso_statistics(4)),
        *iso_out(0, first_id=3),
        Repeat(iso_statistics(5), iso_received(4, 60)),
        Ask(StopIsoStream(id=6, endpoint=ISO_OUT), StopIsoStream(id=7, endpoint=ISO_OUT)),
        settings=FAST_ISO,
    ),
    case(
        "iso sending fills anew after an underflow",
        Ask(alternate(1, 1), iso_start(2, ISO_OUT, 2, 4)),
        *iso_out(10, 10, 10, 10, 10),
        Repeat(iso_statistics(3), iso_received(4, 40)),
        *iso_out(1, 1, 1, first_id=5),
        Ask(iso_statistics(4)),
        *iso_out(1, first_id=8),
        Repeat(iso_statistics(5), iso_received(8, 44)),
        Ask(StopIsoStream(id=6, endpoint=ISO_OUT)),
        settings={"ISO_PERIOD_US": "40000"},
    ),
    case(
        "iso sending drops half a ring after an overflow",
        Ask(alternate(1, 1), iso_start(2, ISO_OUT, 1, 4)),
        *iso_out(*(1 << n for n in range(10))),
        FENCE,
        Repeat(iso_statistics(3), iso_received(4, 0xF)),
        *iso_out(100, 100, first_id=10),
        Repeat(iso_statistics(4), iso_received(6, 0xF + 200)),
        settings=HELD_ISO,
    ),
    case(
        "iso sending with drops left after an overflow",
        Ask(alternate(1, 1), iso_start(2, ISO_OUT, 1, 4)),
        *iso_out(1, 2, 4, 8, 16),
        FENCE,
        Repeat(iso_statistics(3), iso_received(4, 0xF)),
        *iso_out(10, 10, first_id=10),
        Repeat(iso_statistics(4), iso_received(6, 0xF + 20)),
        settings=HELD_ISO,
    ),
    case(
        "iso sending of one packet in one transfer",
        Ask(alternate(1, 1), iso_start(2, ISO_OUT, 1, 1)),
        *iso_out(10),
        FENCE,
        *iso_out(10, first_id=1),
        FENCE,
        Repeat(iso_statistics(3), iso_received(2, 20)),
        settings=FAST_ISO,
        differs=dies(
            "an isochronous OUT stream of 1 packet in 1 transfer crashes the host",
            "ControlPacket id=3 endpoint=0x80 request=32 requesttype=192 SUCCESS length=16"
            " data=02000000000000001400000000000000",
            signal="SIGSEGV",
        ),
    ),
    case(
        "iso sending of one packet in two transfers",
        Ask(alternate(1, 1), iso_start(2, ISO_OUT, 1, 2)),
        *iso_out(10),
        Repeat(iso_statistics(3), iso_received(1, 10)),
        *iso_out(20, first_id=1),
        Repeat(iso_statistics(4), iso_received(2, 30)),
        settings=FAST_ISO,
    ),
)

BULK_STREAMS = (
    case(
        "bulk streams at high speed",
        Ask(AllocBulkStreams(id=1, endpoints=LOOP_MASK, no_streams=8), FreeBulkStreams(id=2, endpoints=LOOP_MASK)),
        real_only=NO_STREAMS,
    ),
    case(
        "bulk streams at super speed",
        Ask(
            AllocBulkStreams(id=1, endpoints=LOOP_MASK, no_streams=8),
            bulk_out(2, LOOP_OUT, b"hello", stream_id=3),
            bulk_in(3, LOOP_IN, 64, stream_id=3),
            FreeBulkStreams(id=4, endpoints=LOOP_MASK),
        ),
        settings=SUPER,
        real_only=NO_STREAMS,
    ),
    case(
        "fewer bulk streams than asked for",
        Ask(AllocBulkStreams(id=1, endpoints=LOOP_MASK, no_streams=32), FreeBulkStreams(id=2, endpoints=LOOP_MASK)),
        settings=SUPER,
        real_only=NO_STREAMS,
    ),
    case(
        "bulk streams on no endpoint, and on one that does not exist",
        Ask(
            AllocBulkStreams(id=1, endpoints=0, no_streams=8),
            FreeBulkStreams(id=2, endpoints=0),
            AllocBulkStreams(id=3, endpoints=1 << 10, no_streams=8),
            FreeBulkStreams(id=4, endpoints=0xFFFFFFFF),
        ),
        settings=SUPER,
        real_only=NO_STREAMS,
    ),
)

CONFIGURATIONS = (
    case("the same configuration", Ask(SetConfiguration(id=1, configuration=1), GetConfiguration(id=2))),
    case(
        "another configuration and back",
        Ask(
            SetConfiguration(id=1, configuration=2),
            GetConfiguration(id=2),
            bulk_in(3, SOURCE, 8),
            GetAltSetting(id=4, interface=1),
            bulk_out(5, LOOP_OUT, b"hello"),
            bulk_in(6, LOOP_IN, 64),
            SetConfiguration(id=7, configuration=1),
            bulk_in(8, SOURCE, 8),
        ),
    ),
    case("another configuration is undone at the end", Ask(SetConfiguration(id=1, configuration=2))),
    case(
        "no configuration and back",
        Ask(
            SetConfiguration(id=1, configuration=0),
            GetConfiguration(id=2),
            bulk_in(3, LOOP_IN, 8),
            control_in(4, PATTERN, 4),
            GetAltSetting(id=5, interface=0),
            SetConfiguration(id=6, configuration=1),
            GetConfiguration(id=7),
        ),
    ),
    case(
        "a configuration that does not exist",
        Ask(SetConfiguration(id=1, configuration=9), GetConfiguration(id=2), control_in(3, PATTERN, 4)),
    ),
    case(
        "a configuration under transfers",
        bulk_in(1, SILENT, 64),
        bulk_in(2, LOOP_IN, 64),
        FENCE,
        Unordered(SetConfiguration(id=3, configuration=2), (1, 2, 3)),
        Ask(bulk_out(4, LOOP_OUT, b"hello"), bulk_in(5, LOOP_IN, 64)),
    ),
    case(
        "a configuration under streams",
        Ask(receive_bulk(2, LOOP_IN, 512, 2), StartInterruptReceiving(id=1, endpoint=INTERRUPT_IN)),
        Await(InterruptPacket, 3),
        Ask(SetConfiguration(id=3, configuration=2)),
        FENCE,
        Ask(bulk_out(4, LOOP_OUT, b"hello"), bulk_in(5, LOOP_IN, 64), SetConfiguration(id=6, configuration=1)),
        Ask(StartInterruptReceiving(id=7, endpoint=INTERRUPT_IN)),
        Await(InterruptPacket, 3),
        Ask(StopInterruptReceiving(id=8, endpoint=INTERRUPT_IN)),
    ),
    case(
        "the same configuration under streams",
        Ask(receive_bulk(1, LOOP_IN, 512, 2), SetConfiguration(id=2, configuration=1), bulk_out(3, LOOP_OUT, b"hello")),
        Await(BufferedBulkPacket),
        Ask(StopBulkReceiving(id=4, endpoint=LOOP_IN)),
    ),
)

ALTERNATES = (
    case(
        "alternate settings",
        Ask(
            GetAltSetting(id=1, interface=1),
            alternate(2, 1),
            GetAltSetting(id=3, interface=1),
            alternate(4, 2),
            GetAltSetting(id=5, interface=1),
            alternate(6, 0),
            GetAltSetting(id=7, interface=1),
        ),
    ),
    case(
        "an alternate setting that does not exist",
        Ask(alternate(1, 1), alternate(2, 7), GetAltSetting(id=3, interface=1)),
    ),
    case("alternate settings of no interface", Ask(GetAltSetting(id=1, interface=5), alternate(2, 0, interface=5))),
    case(
        "the same alternate setting under transfers",
        bulk_in(1, SILENT, 64),
        FENCE,
        Unordered(alternate(2, 0, interface=0), (1, 2)),
        Ask(bulk_out(3, LOOP_OUT, b"hello"), bulk_in(4, LOOP_IN, 64)),
    ),
    case(
        "an alternate setting of another interface under transfers and streams",
        bulk_in(1, SILENT, 64),
        Ask(receive_bulk(2, LOOP_IN, 512, 2), alternate(3, 1), bulk_out(4, LOOP_OUT, b"hello")),
        Await(BufferedBulkPacket),
        CancelDataPacket(id=1),
        Await(BulkPacket, values={"id": 1}),
    ),
    case(
        "the same alternate setting under streams",
        Ask(receive_bulk(1, LOOP_IN, 512, 2), alternate(2, 0, interface=0)),
        FENCE,
        Ask(bulk_out(3, LOOP_OUT, b"hello"), bulk_in(4, LOOP_IN, 64), receive_bulk(5, LOOP_IN, 512, 2)),
        Ask(StopBulkReceiving(id=6, endpoint=LOOP_IN)),
    ),
    case(
        "alternate settings are forgotten with the configuration",
        Ask(alternate(1, 1), SetConfiguration(id=2, configuration=2), SetConfiguration(id=3, configuration=1)),
        Ask(GetAltSetting(id=4, interface=1)),
    ),
)

FILTERS = (
    case("a filter", FilterFilter(rules=(FilterRule(8, -1, -1, -1, False),)), FENCE, Ask(control_in(1, PATTERN, 4))),
    case("a filter that makes no sense", raw(PacketType.FILTER_FILTER, b"0x08,x|\0"), FENCE, differs=DIES_OF_MESSAGE),
    case("an empty filter", raw(PacketType.FILTER_FILTER, b"\0"), FENCE),
    case("the device is rejected", FilterReject(), END),
    case("the device is rejected under streams", Ask(receive_bulk(1, LOOP_IN, 512, 2)), FilterReject(), END),
)

BAD_PACKETS = (
    case("an unknown packet type", raw(99, b"abcd"), END, differs=DIES_OF_BAD_PACKET),
    case("a packet of the other direction", raw(PacketType.DEVICE_DISCONNECT), END, differs=DIES_OF_BAD_PACKET),
    case("a packet that is too short", raw(PacketType.SET_CONFIGURATION), END, differs=DIES_OF_BAD_PACKET),
    case("a packet that is too long", raw(PacketType.SET_CONFIGURATION, b"\1\1"), END, differs=DIES_OF_BAD_PACKET),
    case("a reset with data", raw(PacketType.RESET, b"a"), END, differs=DIES_OF_BAD_PACKET),
    case("a packet of 4 GiB", raw(PacketType.BULK_PACKET, length=0xFFFFFFFF), END, differs=DIES_OF_BAD_PACKET),
    case(
        "an IN transfer with data",
        raw(PacketType.BULK_PACKET, struct.pack("<BBHIH", LOOP_IN, 0, 4, 0, 0) + b"data", 1),
        END,
        differs=DIES_OF_BAD_PACKET,
    ),
    case(
        "an OUT transfer whose data is too short",
        raw(PacketType.BULK_PACKET, struct.pack("<BBHIH", LOOP_OUT, 0, 5, 0, 0) + b"data", 1),
        END,
        differs=DIES_OF_BAD_PACKET,
    ),
    case(
        "a bulk transfer above the limit",
        raw(PacketType.BULK_PACKET, struct.pack("<BBHIH", LOOP_IN, 0, 1, 0, 0x0800), 1),
        END,
        differs=DIES_OF_BAD_PACKET,
    ),
    case(
        "an interrupt IN transfer",
        raw(PacketType.INTERRUPT_PACKET, struct.pack("<BBH", INTERRUPT_IN, 0, 8), 1),
        END,
        differs=DIES_OF_BAD_PACKET,
    ),
    case(
        "an iso IN packet",
        raw(PacketType.ISO_PACKET, struct.pack("<BBH", ISO_IN, 0, 8), 1),
        END,
        differs=DIES_OF_BAD_PACKET,
    ),
    case(
        "interrupt receiving on an OUT endpoint",
        raw(PacketType.START_INTERRUPT_RECEIVING, bytes((INTERRUPT_OUT,)), 1),
        END,
        differs=DIES_OF_BAD_PACKET,
    ),
    case(
        "bulk receiving on an OUT endpoint",
        raw(PacketType.START_BULK_RECEIVING, struct.pack("<IIBB", 0, 512, LOOP_OUT, 1), 1),
        END,
        differs=DIES_OF_BAD_PACKET,
    ),
    case(
        "a filter without its end", raw(PacketType.FILTER_FILTER, b"0x08,-1,-1,-1,1"), END, differs=DIES_OF_BAD_PACKET
    ),
    case("an acknowledgement of nothing", raw(PacketType.DEVICE_DISCONNECT_ACK), FENCE),
    case(
        "a bad packet under streams and transfers",
        Ask(receive_bulk(1, LOOP_IN, 512, 2)),
        bulk_in(2, SILENT, 64),
        FENCE,
        raw(99),
        END,
        differs=DIES_OF_BAD_PACKET,
    ),
)

LOST_REQUESTS = (
    bulk_in(2, LOOP_IN, 64),
    bulk_out(3, LOOP_OUT, b"abc"),
    interrupt_out(4, b"abc"),
    clear_halt(5, LOOP_IN),
    bulk_in(6, MISSING_IN, 64),
    SetConfiguration(id=7, configuration=2),
    SetConfiguration(id=8, configuration=1),
    GetConfiguration(id=9),
    SetAltSetting(id=10, interface=1, alt=1),
    GetAltSetting(id=11, interface=0),
    StartInterruptReceiving(id=12, endpoint=INTERRUPT_IN),
    receive_bulk(13, LOOP_IN, 512, 2),
    iso_start(14, ISO_OUT, 1, 4),
)

LOST = (
    case(
        "everything after the device was lost",
        Ask(alternate(20, 1)),
        UNPLUGGED,
        Ask(control_in(1, PATTERN, 4), *LOST_REQUESTS),
        *iso_out(4, first_id=15),
        FENCE,
        StopInterruptReceiving(id=16, endpoint=INTERRUPT_IN),
        StopBulkReceiving(id=17, endpoint=LOOP_IN),
        CancelDataPacket(id=2),
        Reset(),
        FilterReject(),
        FENCE,
    ),
    case(
        "bulk streams after the device was lost",
        UNPLUGGED,
        Ask(control_in(1, PATTERN, 4)),
        Ask(AllocBulkStreams(id=2, endpoints=LOOP_MASK, no_streams=8)),
        Ask(FreeBulkStreams(id=3, endpoints=LOOP_MASK)),
        settings=SUPER,
    ),
    case(
        "lost, and the guest does not acknowledge",
        UNPLUGGED,
        Ask(control_in(1, PATTERN, 4), bulk_in(2, LOOP_IN, 4)),
        capabilities=ALL - {Capability.DEVICE_DISCONNECT_ACK},
    ),
    case(
        "lost with transfers in flight",
        bulk_in(1, LOOP_IN, 64),
        bulk_in(2, SILENT, 64),
        FENCE,
        UNPLUGGED,
        Await(BulkPacket, 2),
        FENCE,
    ),
    case(
        "lost with a stream",
        Ask(StartInterruptReceiving(id=1, endpoint=INTERRUPT_IN)),
        Await(InterruptPacket, 3),
        Unplugged(noticed=True),
        Ask(StartInterruptReceiving(id=3, endpoint=INTERRUPT_IN)),
        FENCE,
    ),
    case(
        "lost with an iso stream",
        Ask(alternate(1, 1), iso_start(2, ISO_IN, 8, 4)),
        Await(IsoPacket, 20),
        Unplugged(noticed=True),
        FENCE,
        settings=SLOW_ISO,
    ),
    case("a reset finds the device lost", UNPLUGGED, Reset(), END),
    case("a configuration finds the device lost", UNPLUGGED, SetConfiguration(id=1, configuration=2), END),
    case("an alternate setting finds the device lost", UNPLUGGED, Ask(alternate(1, 1)), FENCE),
    case("the clearing of a halt finds the device lost", UNPLUGGED, Ask(clear_halt(1, LOOP_IN)), FENCE),
    case(
        "a stream finds the device lost",
        UNPLUGGED,
        StartInterruptReceiving(id=1, endpoint=INTERRUPT_IN),
        Await(DeviceDisconnect),
        FENCE,
    ),
    case(
        "bulk streams find the device lost",
        UNPLUGGED,
        Ask(AllocBulkStreams(id=1, endpoints=LOOP_MASK, no_streams=8)),
        FENCE,
        settings=SUPER,
        real_only=NO_STREAMS,
    ),
    case("a cancellation finds the device lost", UNPLUGGED, CancelDataPacket(id=1), FENCE),
)

CASES = (
    *ANNOUNCEMENT,
    *RESETS,
    *CONTROL,
    *BULK,
    *INTERRUPT,
    *CANCELLING,
    *INTERRUPT_RECEIVING,
    *BULK_RECEIVING,
    *ISO,
    *BULK_STREAMS,
    *CONFIGURATIONS,
    *ALTERNATES,
    *FILTERS,
    *BAD_PACKETS,
    *LOST,
)
