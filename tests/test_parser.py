"""Parser: every promise of the public contract, in its order, over callbacks in memory."""

from __future__ import annotations

import itertools
import logging
import struct
import sys
import threading
import tracemalloc
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest.mock import Mock

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from usbredir import _framing, _layout
from usbredir._framing import REASONS
from usbredir._layout import header_struct
from usbredir.capabilities import ALL, mask_of
from usbredir.errors import (
    ConnectionClosed,
    LocalProtocolError,
    QueueFullError,
    RemoteProtocolError,
    StateError,
)
from usbredir.filter import FilterRule
from usbredir.limits import Limits
from usbredir.locking import LockCallbacks, ThreadingLocks
from usbredir.packets import (
    PACKET_TYPES,
    BufferedBulkPacket,
    BulkPacket,
    CancelDataPacket,
    ControlPacket,
    DeviceConnect,
    DeviceDisconnect,
    DeviceDisconnectAck,
    EpInfo,
    FilterFilter,
    FilterReject,
    GetConfiguration,
    Hello,
    InterfaceInfo,
    InterruptPacket,
    IsoPacket,
    Packet,
    Reset,
    SetConfiguration,
    StartBulkReceiving,
    StartInterruptReceiving,
    StopBulkReceiving,
)
from usbredir.parser import LogLevel, Parser, ParserCallbacks
from usbredir.proto import MAX_BULK, MAX_PACKET, Capability, Direction, PacketType

from .strategies import (
    BITS,
    End,
    bits,
    carry,
    packets,
    packets_of,
    parser_pair,
    raw_hello,
    raw_packet,
    sendable,
    settled,
    valid_packet,
)

HOST, GUEST = Direction.HOST_TO_GUEST, Direction.GUEST_TO_HOST
EVERYTHING = mask_of(ALL)
MIB = 1024 * 1024
LARGE = 200_000
"""A payload that is received and queued by itself."""

needs_tracemalloc = pytest.mark.skipif(sys.implementation.name != "cpython", reason="needs tracemalloc")


def connected_host(end: End | None = None, word: int = EVERYTHING, **options: Any) -> tuple[Parser, End]:
    """A host parser that has received a guest's hello and sent its own."""
    end = end or End()
    parser = Parser(end, usb_host=True, **options)
    end.incoming += raw_hello(word)
    parser.do_read()
    parser.do_write()
    end.received.clear()
    end.messages.clear()
    end.asked.clear()
    end.output.clear()
    return parser, end


def bulk_out(data: bytes, packet_id: int = 0) -> bytes:
    """A bulk packet from guest to host as it travels with all capabilities."""
    body = struct.pack("<BBHIH", 2, 0, len(data) & 0xFFFF, 0, len(data) >> 16) + data
    return raw_packet(PacketType.BULK_PACKET, body, packet_id)


def get_configuration(packet_id: int) -> bytes:
    return raw_packet(PacketType.GET_CONFIGURATION, b"", packet_id)


def ids(end: End) -> list[int]:
    """The ids of the packets received."""
    return [packet.id for packet in end.received]


# ================================================================ reading


def test_read_is_asked_for_large_pieces() -> None:
    """Many packets at once: one call for all of them, one that finds that there is no more."""
    parser, end = connected_host()
    end.incoming = b"".join(bulk_out(b"x" * 10, number) for number in range(1000))
    parser.do_read()
    assert ids(end) == list(range(1000))
    assert len(end.asked) == 2
    assert min(end.asked) >= 64 * 1024


def test_one_call_finds_that_read_would_block() -> None:
    """Also in the middle of a packet."""
    parser, end = connected_host()
    for start in (b"", get_configuration(1)[:5], get_configuration(2)[:3]):
        end.incoming = start
        end.asked.clear()
        parser.do_read()
        assert len(end.asked) == 1 + bool(start)


@pytest.mark.parametrize("size", [0, 1, 500, 40_000, LARGE])
@pytest.mark.parametrize("piece", [1, 7, 1000, 1 << 30])
def test_pieces_of_any_size(size: int, piece: int) -> None:
    """The same packets, whole or cut, with other packets before and behind."""
    if piece == 1:
        size = min(size, 20_000)
    parser, end = connected_host()
    data = bytes(i & 0xFF for i in range(size))
    end.incoming = get_configuration(1) + bulk_out(data, 2) + bulk_out(data, 3) + get_configuration(4)
    end.piece = piece
    parser.do_read()
    assert ids(end) == [1, 2, 3, 4]
    for packet in end.received[1:3]:
        assert isinstance(packet, BulkPacket)
        assert packet.data == data
        assert packet.length == size


def test_reading_goes_on_where_it_would_have_blocked() -> None:
    stream = get_configuration(1) + bulk_out(b"data" * 9, 2) + bulk_out(bytes(70_000), 3)
    parser, end = connected_host()
    for start, stop in itertools.pairwise([0, 3, 16, 17, 40, 60, 69, 100, 130, 30_000, 70_000, len(stream)]):
        end.incoming = stream[start:stop]
        parser.do_read()
    assert ids(end) == [1, 2, 3]


@pytest.mark.parametrize("rest", [b"", get_configuration(9)[:7], bulk_out(bytes(LARGE))[:100_000]])
def test_the_end_of_the_stream(rest: bytes) -> None:
    """ConnectionClosed after what came before was delivered, also in the middle of a packet; and again."""
    parser, end = connected_host()
    end.incoming = get_configuration(1) + get_configuration(2) + rest
    end.closed = True
    for _ in range(2):
        with pytest.raises(ConnectionClosed):
            parser.do_read()
        assert ids(end) == [1, 2]


class ScriptedReads(End):
    """Gives what a script says, one item per read; exceptions are raised."""

    def __init__(self, *script: object) -> None:
        super().__init__()
        self.script = list(script)

    def read(self, count: int) -> Any:
        self.asked.append(count)
        item = self.script.pop(0) if self.script else None
        if isinstance(item, BaseException):
            raise item
        return item


@pytest.mark.parametrize("error", [OSError(5, "gone"), ConnectionResetError("reset"), KeyboardInterrupt()])
def test_an_exception_of_read_passes_through(error: BaseException) -> None:
    """What was delivered stays delivered, what was half read is kept."""
    parser, end = connected_host(ScriptedReads(raw_hello(EVERYTHING)))
    assert isinstance(end, ScriptedReads)
    stream = get_configuration(2)
    end.script = [get_configuration(1) + stream[:9], error, stream[9:]]
    with pytest.raises(type(error)) as caught:
        parser.do_read()
    assert caught.value is error
    assert ids(end) == [1]
    parser.do_read()
    assert ids(end) == [1, 2]


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
@pytest.mark.parametrize("data", [b"small", bytes(LARGE)])
def test_read_may_give_any_buffer(kind: Callable[[bytes], Any], data: bytes) -> None:
    """And may use it again: what was delivered is a copy."""
    parser, end = connected_host(ScriptedReads(raw_hello(EVERYTHING)))
    assert isinstance(end, ScriptedReads)
    stream = bulk_out(data)
    end.script = [
        kind(stream[start:stop]) for start, stop in itertools.pairwise([0, 20, *range(26, len(stream), 65536)])
    ]
    end.script.append(kind(stream[26 + (len(stream) - 26) // 65536 * 65536 :]))
    reused = [piece for piece in end.script if isinstance(piece, bytearray)]
    parser.do_read()
    for piece in reused:
        piece[:] = b"\xff" * len(piece)
    (packet,) = end.received
    assert isinstance(packet, BulkPacket)
    assert bytes(packet.data) == data


@pytest.mark.parametrize("before", [b"", bulk_out(bytes(LARGE))[:50_000]], ids=["between packets", "in a large one"])
def test_more_than_was_asked_for_is_an_error(before: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    parser, end = connected_host(ScriptedReads(raw_hello(EVERYTHING)))
    assert isinstance(end, ScriptedReads)
    end.script = [before] if before else []
    parser.do_read()
    monkeypatch.setattr(end, "read", lambda count: bytes(count + 1))
    with pytest.raises(ValueError, match="read"):
        parser.do_read()


def test_callbacks_have_defaults() -> None:
    """A subclass overrides what it needs."""

    class Silent(ParserCallbacks):
        def read(self, count: int) -> bytes | None:
            pieces, self.pieces = self.pieces, b""
            return pieces or None

        pieces = raw_hello(EVERYTHING) + get_configuration(1)

    Parser(Silent(), usb_host=True).do_read()


# ---------------------------------------------------------------- readinto


class Readinto(End):
    """With the optional method; read is not to be used."""

    def __init__(self, incoming: bytes = b"") -> None:
        super().__init__(incoming)
        self.buffers: list[memoryview] = []

    def read(self, count: int) -> bytes | None:
        raise AssertionError("read was called although there is readinto")

    def readinto(self, buffer: memoryview) -> int | None:
        self.asked.append(len(buffer))
        self.buffers.append(buffer)
        piece, self.incoming = self.incoming[: len(buffer)], self.incoming[len(buffer) :]
        buffer[: len(piece)] = piece
        return len(piece) if piece else (0 if self.closed else None)


@pytest.mark.parametrize("size", [10, LARGE])
def test_readinto_is_used_when_there_is_one(size: int) -> None:
    """Data stays valid, whatever happens to the buffers."""
    parser, end = connected_host(Readinto())
    assert isinstance(end, Readinto)
    data = bytes(i % 251 for i in range(size))
    end.incoming = bulk_out(data, 1) + bulk_out(data, 2)
    parser.do_read()
    assert ids(end) == [1, 2]
    assert min(end.asked) > 0
    for buffer in end.buffers:
        if not buffer.readonly:
            buffer[:] = bytes(len(buffer))
    assert [bytes(packet.data) for packet in end.received if isinstance(packet, BulkPacket)] == [data, data]


def test_readinto_at_the_end_of_the_stream() -> None:
    parser, end = connected_host(Readinto())
    end.closed = True
    with pytest.raises(ConnectionClosed):
        parser.do_read()


@pytest.mark.parametrize("answer", [lambda size: size + 1, lambda size: -1])
def test_readinto_cannot_fill_more_than_its_buffer(answer: Callable[[int], int]) -> None:
    class Wrong(Readinto):
        def readinto(self, buffer: memoryview) -> int | None:
            return answer(len(buffer))

    with pytest.raises(ValueError, match="readinto"):
        Parser(Wrong()).do_read()


def test_optional_methods_are_looked_up_once() -> None:
    """In the constructor: what comes or goes later does not matter."""

    class Plain(End):
        readinto: Any
        writev: Any

    parser, end = connected_host(Plain())
    assert isinstance(end, Plain)
    end.readinto = end.writev = lambda buffer: pytest.fail("looked up again")
    end.incoming = get_configuration(1)
    parser.do_read()
    parser.send(GetConfigurationReply)
    parser.do_write()
    assert ids(end) == [1]
    assert end.output

    looked_up: list[str] = []

    class Counting(End):
        def __getattribute__(self, name: str) -> Any:
            if name in ("readinto", "writev"):
                looked_up.append(name)
            return super().__getattribute__(name)

    connected_host(Counting())
    assert sorted(looked_up) == ["readinto", "writev"]


GetConfigurationReply = PACKET_TYPES[PacketType.CONFIGURATION_STATUS](id=1)

# ================================================================ bad packets

BAD: list[tuple[str, bytes]] = [
    ("bad_type", raw_packet(28, b"some body")),
    ("bad_type", raw_packet(2**32 - 1, b"")),
    ("bad_type", raw_packet(PacketType.DEVICE_CONNECT, bytes(10))),  # travels the other way
    ("packet_too_large", struct.pack("<IIQ", PacketType.BULK_PACKET, 2**31, 0)),
    ("packet_too_large", struct.pack("<IIQ", PacketType.RESET, 2**32 - 1, 0)),
    ("packet_too_large", raw_packet(PacketType.FILTER_FILTER, b"x" * 101)),
    ("bad_length", raw_packet(PacketType.RESET, b"x")),
    ("bad_length", raw_packet(PacketType.SET_CONFIGURATION, b"")),
    ("bad_length", raw_packet(PacketType.BULK_PACKET, bytes(9))),
    ("data_length_mismatch", raw_packet(PacketType.BULK_PACKET, struct.pack("<BBHIH", 2, 0, 3, 0, 0) + b"four")),
    ("data_length_mismatch", raw_packet(PacketType.CONTROL_PACKET, struct.pack("<BBBBHHH", 0, 0, 0, 0, 0, 0, 1))),
    ("unexpected_data", raw_packet(PacketType.BULK_PACKET, struct.pack("<BBHIH", 0x82, 0, 4, 0, 0) + b"four")),
    ("unexpected_data", raw_packet(PacketType.BULK_PACKET, struct.pack("<BBHIH", 0x82, 0, 0, 0, 0) + bytes(LARGE))),
    ("wrong_direction", raw_packet(PacketType.ISO_PACKET, struct.pack("<BBH", 0x81, 0, 0))),
    ("wrong_direction", raw_packet(PacketType.INTERRUPT_PACKET, struct.pack("<BBH", 0x81, 0, 0))),
    ("endpoint_not_input", raw_packet(PacketType.START_INTERRUPT_RECEIVING, b"\x01")),
    ("bulk_length_limit", raw_packet(PacketType.BULK_PACKET, struct.pack("<BBHIH", 0x82, 0, 1, 0, 0x800))),
    (
        "bulk_length_limit",
        raw_packet(PacketType.START_BULK_RECEIVING, struct.pack("<IIBB", 0, MAX_BULK + 1, 0x82, 1)),
    ),
    ("filter_no_data", raw_packet(PacketType.FILTER_FILTER)),
    ("filter_not_terminated", raw_packet(PacketType.FILTER_FILTER, b"0x03,-1,-1,-1,1")),
]
bad_packets = pytest.mark.parametrize(("reason", "bad"), BAD)
LIMITS = Limits(max_filter_text=100)


@bad_packets
@pytest.mark.parametrize("piece", [1, 7, 1 << 30])
def test_a_bad_packet_spoils_no_other(reason: str, bad: bytes, piece: int) -> None:
    """Good ones before it are delivered, the next call goes on behind it, also where its bytes were read already."""
    if len(bad) > 1000 and piece < 1000:
        piece *= 1000
    parser, end = connected_host(limits=LIMITS)
    end.incoming = get_configuration(1) + bad + get_configuration(2) + bad + bulk_out(b"last", 3)
    end.piece = piece
    for expected in ([1], [1, 2]):
        with pytest.raises(RemoteProtocolError) as caught:
            parser.do_read()
        assert ids(end) == expected
        assert caught.value.reason == reason
        assert caught.value.packet_type == int.from_bytes(bad[:4], "little")
        assert REASONS[reason] in str(caught.value)
        assert str(caught.value).isprintable()
    parser.do_read()
    assert ids(end) == [1, 2, 3]


@bad_packets
def test_resuming_needs_no_read(reason: str, bad: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was read already is delivered before read is called again."""
    parser, end = connected_host(limits=LIMITS)
    end.incoming = bad + get_configuration(1)
    with pytest.raises(RemoteProtocolError):
        parser.do_read()
    if not end.incoming:
        delivered: list[list[int]] = []
        monkeypatch.setattr(end, "read", lambda count: delivered.append(ids(end)))
        parser.do_read()
        assert delivered == [[1]]


@pytest.mark.parametrize("length", [MAX_PACKET + 1, 2**31 - 1])
def test_the_body_of_a_bad_header_is_thrown_away(length: int) -> None:
    """In pieces, and not asked for as a whole."""
    parser, end = connected_host()
    end.incoming = struct.pack("<IIQ", PacketType.BULK_PACKET, length, 0)
    with pytest.raises(RemoteProtocolError):
        parser.do_read()
    end.asked.clear()
    rest = length
    junk = get_configuration(77) * 50_000
    for _ in range(3):
        end.incoming = junk
        rest -= len(junk)
        parser.do_read()
    assert not end.received
    assert max(end.asked) <= MIB
    parser._decoder.skip -= rest  # as if the rest had come
    end.incoming = get_configuration(1)
    parser.do_read()
    assert ids(end) == [1]


def test_missing_capabilities_are_errors() -> None:
    """When receiving it is we who must have the capability."""
    parser, end = connected_host(capabilities=())
    for cls, reason in (
        (FilterReject, "missing_cap_filter"),
        (FilterFilter, "missing_cap_filter"),
        (DeviceDisconnectAck, "missing_cap_disconnect_ack"),
        (StopBulkReceiving, "missing_cap_bulk_receiving"),
    ):
        body = {FilterFilter: b"\0", StopBulkReceiving: b"\0\0\0\0\x81"}.get(cls, b"")
        end.incoming = raw_packet(cls.packet_type, body, wide=False) + raw_packet(PacketType.RESET, wide=False)
        with pytest.raises(RemoteProtocolError) as caught:
            parser.do_read()
        assert caught.value.reason == reason
        parser.do_read()
        assert end.received == [Reset()]
        end.received.clear()


def test_a_second_hello_is_only_logged() -> None:
    parser, end = connected_host(word=0xFF)
    end.incoming = raw_packet(PacketType.HELLO, bytes(64) + b"\0\0\0\0") + get_configuration(1)
    parser.do_read()
    assert ids(end) == [1]
    assert [level for level, _ in end.messages] == [LogLevel.ERROR]
    assert parser.peer_has_capability(Capability.FILTER)


@pytest.mark.parametrize("text", [b"nonsense", b"1,2,3,4", b"0x100,-1,-1,-1,1", b"\xff\xfe\x1b[31m,1,1,1,1"])
def test_a_filter_that_does_not_parse_is_only_logged(text: bytes) -> None:
    parser, end = connected_host()
    end.incoming = raw_packet(PacketType.FILTER_FILTER, text + b"\0") + get_configuration(1)
    parser.do_read()
    assert ids(end) == [1]
    ((level, message),) = end.messages
    assert level == LogLevel.ERROR
    assert message.isprintable()


class Raising(End):
    """Raises for every packet of the types named."""

    def __init__(self, *types: type[Packet]) -> None:
        super().__init__()
        self.types: tuple[type[Packet], ...] = types
        self.reraise: Exception = RuntimeError("the application's own")

    def packet_received(self, packet: Packet) -> None:
        super().packet_received(packet)
        if isinstance(packet, self.types):
            raise self.reraise


@pytest.mark.parametrize("size", [3, LARGE])
def test_an_exception_of_the_application_passes_through(size: int) -> None:
    """The packet counts as consumed; the next call goes on behind it."""
    parser, end = connected_host(Raising())
    assert isinstance(end, Raising)
    end.types = (BulkPacket,)
    end.incoming = get_configuration(1) + bulk_out(bytes(size), 2) + get_configuration(3)
    with pytest.raises(RuntimeError, match="the application's own"):
        parser.do_read()
    assert ids(end) == [1, 2]
    parser.do_read()
    assert ids(end) == [1, 2, 3]


def test_an_exception_at_hello_changes_nothing_else() -> None:
    """The capabilities are settled all the same."""
    end = Raising(Hello)
    parser = Parser(end, usb_host=True)
    end.incoming = raw_hello(EVERYTHING) + get_configuration(5)
    with pytest.raises(RuntimeError):
        parser.do_read()
    assert parser.have_peer_capabilities()
    parser.do_read()
    assert end.received[1:] == [GetConfiguration(id=5)]


def test_an_exception_at_a_filter() -> None:
    parser, end = connected_host(Raising())
    assert isinstance(end, Raising)
    end.types = (FilterFilter,)
    end.incoming = raw_packet(PacketType.FILTER_FILTER, b"\0") + get_configuration(1)
    with pytest.raises(RuntimeError):
        parser.do_read()
    parser.do_read()
    assert end.received == [FilterFilter(), GetConfiguration(id=1)]


def test_an_exception_at_a_disconnect_leaves_no_host_waiting() -> None:
    """The acknowledgement is queued."""
    end = Raising()
    parser = Parser(end)
    end.incoming = raw_hello(EVERYTHING)
    parser.do_read()
    parser.do_write()
    end.take_output()
    end.types = (DeviceDisconnect,)
    end.incoming = raw_packet(PacketType.DEVICE_DISCONNECT)
    with pytest.raises(RuntimeError):
        parser.do_read()
    parser.do_write()
    assert end.take_output() == raw_packet(PacketType.DEVICE_DISCONNECT_ACK)


def test_a_nested_do_read_is_refused() -> None:
    """And the outer one goes on."""

    class Nesting(End):
        def packet_received(self, packet: Packet) -> None:
            super().packet_received(packet)
            with pytest.raises(LocalProtocolError, match="do_read"):
                parser.do_read()

    end = Nesting()
    parser = Parser(end, usb_host=True)
    end.incoming = raw_hello(EVERYTHING) + get_configuration(1) + get_configuration(2)
    parser.do_read()
    assert ids(end) == [0, 1, 2]
    end.incoming = get_configuration(3)
    parser.do_read()
    assert ids(end) == [0, 1, 2, 3]


# ================================================================ acknowledgements


@pytest.mark.parametrize("peer_confirms", [True, False])
def test_a_disconnect_is_acknowledged(peer_confirms: bool) -> None:
    """After the callback, to peers that have the capability."""
    queued: list[int] = []

    class Watching(End):
        def packet_received(self, packet: Packet) -> None:
            queued.append(parser.has_data_to_write())

    end = Watching()
    parser = Parser(end)
    parser.do_write()
    end.take_output()
    wide = peer_confirms
    end.incoming = raw_hello(EVERYTHING if peer_confirms else 0)
    end.incoming += raw_packet(PacketType.DEVICE_DISCONNECT, b"", 99 if wide else 0, wide=wide)
    parser.do_read()
    assert queued == [0, 0]
    parser.do_write()
    assert end.take_output() == (raw_packet(PacketType.DEVICE_DISCONNECT_ACK) if peer_confirms else b"")


# ================================================================ logging


def test_log_levels() -> None:
    assert {level.name: int(level) for level in LogLevel} == {
        "NONE": 0,
        "ERROR": 1,
        "WARNING": 2,
        "INFO": 3,
        "DEBUG": 4,
        "DEBUG_DATA": 5,
    }


@pytest.mark.parametrize(("word", "width"), [(EVERYTHING, "64"), (0, "32")])
def test_the_peer_s_hello_is_logged_as_info(word: int, width: str) -> None:
    end = End(raw_hello(word, b"some peer 1.0"))
    Parser(end, usb_host=True).do_read()
    ((level, message),) = end.messages
    assert level == LogLevel.INFO
    assert "some peer 1.0" in message
    assert width in message


@given(st.binary(max_size=64), st.binary(max_size=60))
@example(b"\x1b[31mred\n%s%d{0}\xff", b"%n\x1b]0;title\x07,1,1,1,1")
@example("\u202eevil\u2028".encode(), b"\x9b31m")
def test_text_of_the_peer_is_data(version: bytes, rules: bytes) -> None:
    """Never a format; control characters are escaped."""
    end = End(raw_hello(EVERYTHING, version) + raw_packet(PacketType.FILTER_FILTER, rules + b"\0"))
    Parser(end, usb_host=True).do_read()
    assert all(message.isprintable() for _, message in end.messages)
    shown = [message for level, message in end.messages if level == LogLevel.INFO]
    assert len(shown) == 1
    if b"%s%d{0}" in version:
        assert "%s%d{0}" in shown[0]


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        (LogLevel.ERROR, logging.ERROR),
        (LogLevel.WARNING, logging.WARNING),
        (LogLevel.INFO, logging.INFO),
        (LogLevel.DEBUG, logging.DEBUG),
        (LogLevel.DEBUG_DATA, logging.DEBUG - 5),
    ],
)
def test_the_default_log(level: LogLevel, expected: int, caplog: pytest.LogCaptureFixture) -> None:
    """The logger "usbredir.parser"; the text is no format there either."""
    with caplog.at_level(1, logger="usbredir.parser"):
        ParserCallbacks().log(level, "100 % of %s")
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("usbredir.parser", expected)
    assert record.getMessage() == "100 % of %s"


def test_the_default_log_is_used(caplog: pytest.LogCaptureFixture) -> None:
    class Reader(ParserCallbacks):
        pieces = raw_hello(0, b"%s\x1b[1m")

        def read(self, count: int) -> bytes | None:
            piece, self.pieces = self.pieces, b""
            return piece or None

    with caplog.at_level(logging.INFO, logger="usbredir.parser"):
        Parser(Reader()).do_read()
    assert "%s\\x1b[1m" in caplog.text


# ================================================================ capabilities


def test_before_and_after_hello() -> None:
    end = End()
    parser = Parser(end, usb_host=True, capabilities=[Capability.FILTER, 20])
    assert not parser.have_peer_capabilities()
    assert not any(parser.peer_has_capability(number) for number in range(32))
    assert [number for number in range(32) if parser.have_capability(number)] == [2, 20]
    end.incoming = raw_hello(0x8000_0081 | 0x10)
    parser.do_read()
    assert parser.have_peer_capabilities()
    assert [number for number in range(32) if parser.peer_has_capability(number)] == [0, 4, 7, 31]
    assert parser.peer_has_capability(Capability.BULK_STREAMS)
    assert [level for level, _ in end.messages] == [LogLevel.INFO]


@pytest.mark.parametrize("number", [32, 33, 1000, -1, 2**64])
def test_capabilities_that_cannot_exist(number: int) -> None:
    """False and an error message."""
    parser, end = connected_host()
    assert parser.have_capability(number) is False
    assert parser.peer_has_capability(number) is False
    assert [level for level, _ in end.messages] == [LogLevel.ERROR] * 2


def announced(**options: Any) -> tuple[frozenset[int], End]:
    """The capabilities that a parser's hello announces."""
    end = End()
    parser = Parser(end, **options)
    parser.do_write()
    assert len(end.output) == 80
    return frozenset(bits(int.from_bytes(end.output[76:], "little"))), end


@pytest.mark.parametrize(
    ("usb_host", "given_numbers", "expected"),
    [
        (True, [], []),
        (False, [], [3]),
        (True, ALL, range(8)),
        (False, [0, 4], [0, 3, 4]),
        (True, [8, 31], [8, 31]),
        (True, [32, 100], []),
        (True, iter([1, 1, 5]), [1, 5]),
    ],
)
def test_what_is_announced(usb_host: bool, given_numbers: Any, expected: Sequence[int]) -> None:
    """As given; a guest always acknowledges disconnections; numbers above 31 have no place."""
    numbers, end = announced(usb_host=usb_host, capabilities=given_numbers)
    assert numbers == frozenset(expected)
    assert not end.messages


def test_everything_is_announced_by_default() -> None:
    assert announced(usb_host=True)[0] == ALL


def test_a_negative_capability_is_an_error() -> None:
    with pytest.raises(ValueError, match="negative"):
        Parser(End(), capabilities=[-1])


def test_our_own_inconsistent_capabilities() -> None:
    """Streams without the packet sizes are dropped before they are announced, with an error message."""
    numbers, end = announced(usb_host=True, capabilities=[Capability.BULK_STREAMS, Capability.FILTER])
    assert numbers == {Capability.FILTER}
    assert [level for level, _ in end.messages] == [LogLevel.ERROR]


def test_the_peer_s_inconsistent_capabilities() -> None:
    end = End(raw_hello(0b101))
    parser = Parser(end, usb_host=True)
    parser.do_read()
    assert end.received == [Hello(version="test", capabilities=frozenset((Capability.FILTER,)))]
    assert not parser.peer_has_capability(Capability.BULK_STREAMS)
    assert [level for level, _ in end.messages] == [LogLevel.ERROR, LogLevel.INFO]


@pytest.mark.parametrize(
    ("body", "word"),
    [
        (b"", 0),
        (b"\xff\xff\xff", 0),
        (b"\xfe\0\0\0", 0xFE),
        (b"\xfe\0\0\0\x01", 0xFE),
        (b"\xfe\0\0\0" + b"\xff" * 8, 0xFE),
        (b"\0\0\0\x80", 0x8000_0000),
    ],
)
def test_words_of_the_peer_s_hello(body: bytes, word: int) -> None:
    """Whole words only; only the first one has a meaning; unknown bits are kept."""
    end = End(raw_packet(PacketType.HELLO, bytes(64) + body, wide=False))
    Parser(end, usb_host=True).do_read()
    (hello,) = end.received
    assert isinstance(hello, Hello)
    assert hello.capabilities == frozenset(bits(word))


@pytest.mark.parametrize(
    ("raw", "expected"),
    [(b"plain\0rest", "plain"), (b"x" * 64, "x" * 64), (b"", ""), (b"a\xffb", "a\ufffdb"), ("é".encode(), "é")],
)
def test_versions_of_the_peer(raw: bytes, expected: str) -> None:
    end = End(raw_hello(0, raw))
    Parser(end).do_read()
    assert isinstance(end.received[0], Hello)
    assert end.received[0].version == expected


# ================================================================ sending


@pytest.mark.parametrize("size", [100, LARGE])
def test_send_takes_a_snapshot(size: int) -> None:
    """Buffers may be changed as soon as send has returned."""
    host, host_end, guest, guest_end = parser_pair()
    data = bytearray(b"a" * size)
    guest.send(BulkPacket(endpoint=2, data=data))
    guest.send(BulkPacket(endpoint=2, data=memoryview(data)))
    data[:] = b"b" * size
    carry(guest, guest_end, host, host_end)
    assert host_end.received == [BulkPacket(endpoint=2, data=b"a" * size)] * 2


def test_bytes_are_kept_by_reference() -> None:
    """Large payloads reach write as they are."""
    seen: list[object] = []

    class Watching(End):
        def write(self, data: memoryview) -> int | None:
            seen.append(data.obj)
            return len(data)

    parser, _ = connected_host(Watching())
    data = bytes(LARGE)
    parser.send(BulkPacket(endpoint=0x82, data=data))
    parser.do_write()
    assert any(item is data for item in seen)


REFUSED: list[tuple[bool, Packet, str]] = [
    (True, Hello(), "by_itself"),
    (False, Hello(), "by_itself"),
    (False, DeviceDisconnectAck(), "by_itself"),
    (True, DeviceDisconnectAck(), "by_itself"),
    (True, Reset(), "send_type_not_allowed"),
    (True, CancelDataPacket(id=1), "send_type_not_allowed"),
    (False, DeviceConnect(), "send_type_not_allowed"),
    (False, BufferedBulkPacket(endpoint=0x81), "send_type_not_allowed"),
    (True, InterfaceInfo(interface_count=33), "interface_count_limit"),
    (False, StartInterruptReceiving(endpoint=1), "endpoint_not_input"),
    (False, StartBulkReceiving(endpoint=1), "endpoint_not_input"),
    (False, StartBulkReceiving(endpoint=0x81, bytes_per_transfer=MAX_BULK + 1), "bulk_length_limit"),
    (False, BulkPacket(endpoint=0x81, length=MAX_BULK + 1), "bulk_length_limit"),
    (False, BulkPacket(endpoint=1, length=3, data=b"1234"), "data_length_mismatch"),
    (False, BulkPacket(endpoint=0x81, data=b"1234"), "unexpected_data"),
    (True, BulkPacket(endpoint=1, data=b"1234"), "unexpected_data"),
    (True, ControlPacket(endpoint=0x80, length=1), "data_length_mismatch"),
    (False, IsoPacket(endpoint=0x81), "wrong_direction"),
    (True, IsoPacket(endpoint=1), "wrong_direction"),
    (False, InterruptPacket(endpoint=0x81), "wrong_direction"),
    (True, BufferedBulkPacket(endpoint=1), "wrong_direction"),
    (False, FilterFilter(rules=(FilterRule(256, -1, -1, -1, True),)), "field_range"),
]


@pytest.mark.parametrize(("usb_host", "packet", "reason"), REFUSED)
def test_what_cannot_be_sent(usb_host: bool, packet: Packet, reason: str) -> None:
    """LocalProtocolError that says what and why; nothing is queued; the next packet is not disturbed."""
    host, _, guest, _ = parser_pair()
    sender = host if usb_host else guest
    for _ in range(2):
        with pytest.raises(LocalProtocolError) as caught:
            sender.send(packet)
        assert (caught.value.packet_type, caught.value.reason) == (packet.packet_type, reason)
        assert type(packet).__name__ in str(caught.value)
        assert (sender.has_data_to_write(), sender.buffered_output_size()) == (0, 0)
    sender.send(BulkPacket(endpoint=0x81 if usb_host else 0x01, data=b"x"))
    assert sender.has_data_to_write() == 1


@pytest.mark.parametrize(
    ("usb_host", "packet", "reason"),
    [
        (False, FilterReject(), "missing_cap_filter"),
        (False, FilterFilter(), "missing_cap_filter"),
        (True, FilterFilter(), "missing_cap_filter"),
        (False, StartBulkReceiving(endpoint=0x81), "missing_cap_bulk_receiving"),
        (False, StopBulkReceiving(endpoint=0x81), "missing_cap_bulk_receiving"),
        (True, BufferedBulkPacket(endpoint=0x81), "missing_cap_bulk_receiving"),
    ],
)
def test_what_the_peer_does_not_know(usb_host: bool, packet: Packet, reason: str) -> None:
    """It is the peer that must have the capability when we send; before its hello it has none, afterwards it may."""
    end = End()
    parser = Parser(end, usb_host=usb_host)
    with pytest.raises(LocalProtocolError) as caught:
        parser.send(packet)
    assert caught.value.reason == reason
    assert parser.has_data_to_write() == 1, "hello"
    end.incoming = raw_hello(EVERYTHING)
    parser.do_read()
    parser.send(packet)
    assert parser.has_data_to_write() == 2
    without = Parser(End(raw_hello(0)), usb_host=usb_host)
    without.do_read()
    with pytest.raises(LocalProtocolError):
        without.send(packet)


def fields_of_numbers() -> Iterator[Any]:
    for cls in PACKET_TYPES.values():
        for field in cls.declaration.fields:
            if field.wire.code in BITS:
                name = f"{cls.__name__}-{field.name}"
                yield pytest.param(cls, field.name, BITS[field.wire.code], field.wire.count > 1, id=name)


@pytest.mark.parametrize(("cls", "name", "width", "table"), list(fields_of_numbers()))
def test_values_that_do_not_fit_their_field(cls: type[Packet], name: str, width: int, table: bool) -> None:
    """ValueError when the packet is built, or LocalProtocolError when it is sent; nothing is queued."""
    host, _, guest, _ = parser_pair()
    usb_host = cls in sendable(HOST, EVERYTHING, EVERYTHING)
    sender, direction = (host, HOST) if usb_host else (guest, GUEST)
    if (cls, name) == (BulkPacket, "length"):
        width = 32
    for wrong in (1 << width, -1, 1 << 80, 1.5, "1"):
        value = (0,) * 31 + (wrong,) if table else wrong
        with pytest.raises((LocalProtocolError, ValueError)):
            sender.send(valid_packet(cls, direction, **{name: value}))
    assert sender.has_data_to_write() == 0


@pytest.mark.parametrize("wide", [True, False])
def test_ids(wide: bool) -> None:
    """With 32-bit ids an id is cut; packets whose call has no id in C carry 0."""
    host, host_end, guest, guest_end = parser_pair(EVERYTHING, EVERYTHING if wide else EVERYTHING & ~0x20)
    guest.send(GetConfiguration(id=0x1234_5678_9ABC_DEF0))
    guest.send(Reset(id=77))
    carry(guest, guest_end, host, host_end)
    assert ids(host_end) == [0x1234_5678_9ABC_DEF0 if wide else 0x9ABC_DEF0, 0]
    host.send(DeviceConnect(id=77))
    carry(host, host_end, guest, guest_end)
    assert ids(guest_end) == [0]


@pytest.mark.parametrize("wrong", [2**64, -1, None, "1"])
def test_ids_that_do_not_fit(wrong: Any) -> None:
    _, _, guest, _ = parser_pair()
    with pytest.raises((LocalProtocolError, ValueError)):
        guest.send(GetConfiguration(id=wrong))
    assert guest.has_data_to_write() == 0


@pytest.mark.parametrize("wrong", [None, 5, b"bytes", (0,), Reset])
def test_only_packets_can_be_sent(wrong: Any) -> None:
    parser, _ = connected_host()
    with pytest.raises((LocalProtocolError, TypeError)):
        parser.send(wrong)
    assert parser.has_data_to_write() == 0


def test_fields_off_the_wire_do_not_matter_when_sending() -> None:
    """Whatever they hold, None included; and None is zero where the field travels."""
    for word, version in ((0, None), (EVERYTHING, 0)):
        host, host_end, guest, guest_end = parser_pair(EVERYTHING, word)
        host.send(DeviceConnect(device_version_bcd=None))
        host.send(EpInfo(max_packet_size=None, max_streams=None))
        if not word:
            host.send(DeviceConnect(device_version_bcd=2**20))
        carry(host, host_end, guest, guest_end)
        connect, ep_info = guest_end.received[:2]
        assert isinstance(connect, DeviceConnect)
        assert isinstance(ep_info, EpInfo)
        assert connect.device_version_bcd == version
        assert ep_info.max_streams == (None if version is None else (0,) * 32)


def test_limit_of_queued_packets() -> None:
    """QueueFullError, nothing queued; after writing there is room again."""
    parser, end = connected_host(limits=Limits(max_queued_packets=3))
    for _ in range(3):
        parser.send(DeviceDisconnect())
    with pytest.raises(QueueFullError) as caught:
        parser.send(DeviceDisconnect())
    assert isinstance(caught.value, LocalProtocolError)
    assert caught.value.reason == "queue_full"
    assert parser.has_data_to_write() == 3
    parser.do_write()
    assert len(end.output) == 3 * 16
    parser.send(DeviceDisconnect())


@pytest.mark.parametrize("locks", [None, ThreadingLocks()])
def test_limit_of_queued_bytes(locks: LockCallbacks | None) -> None:
    """A packet that is partly written counts in full."""
    end = PartialWrites(itertools.chain([10], itertools.repeat(None)))
    parser = Parser(end, usb_host=True, send_hello=False, limits=Limits(max_queued_bytes=100), locks=locks)
    end.incoming = raw_hello(EVERYTHING)
    parser.do_read()
    parser.send(BulkPacket(endpoint=0x81, data=bytes(100 - 26 - 16)))
    with pytest.raises(QueueFullError):
        parser.send(BulkPacket(endpoint=0x81))
    parser.do_write()
    assert len(end.output) == 10
    with pytest.raises(QueueFullError):
        parser.send(BulkPacket(endpoint=0x81))
    parser.send(DeviceDisconnect())
    assert parser.buffered_output_size() == 100


# ================================================================ rows of like packets


class Stumbling(End):
    """An application that fails at one packet, once it is told at which."""

    fails_at = -1

    def packet_received(self, packet: Packet) -> None:
        super().packet_received(packet)
        if len(self.received) - 1 == self.fails_at:
            raise ZeroDivisionError


def reading_of(direction: Direction, words: tuple[int, int], stream: bytes, fails_at: int, least: int) -> list[object]:
    """Everything that comes out of *stream*, in order: packets, errors, and what is left open."""
    usb_host = direction is GUEST
    host, host_end, guest, guest_end = parser_pair(*words, ends=Stumbling)
    parser, end = (host, host_end) if usb_host else (guest, guest_end)
    assert isinstance(end, Stumbling)
    end.fails_at, end.incoming = fails_at, stream
    outcome: list[object] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_framing, "LEAST_ROWS", least)
        while True:
            try:
                parser.do_read()
                break
            except (RemoteProtocolError, ZeroDivisionError) as error:
                outcome += [len(end.received), type(error), str(error)]
    return [*outcome, *end.received, parser.serialize()]


@st.composite
def rows(draw: st.DrawFn) -> tuple[Direction, tuple[int, int], bytes]:
    """Packets of one type and length in a row, some bytes of which were changed."""
    words = draw(st.sampled_from([(EVERYTHING, EVERYTHING), (0, 0), (EVERYTHING, 0b0011_1000), (0x80, EVERYTHING)]))
    direction = draw(st.sampled_from([HOST, GUEST]))
    host, host_end, guest, guest_end = parser_pair(*words)
    sender, end = (host, host_end) if direction is HOST else (guest, guest_end)
    own, peer = (settled(words[0], usb_host=True), settled(words[1], usb_host=False))[:: 1 if direction is HOST else -1]
    kinds = [cls for cls in sendable(direction, own, peer) if cls.declaration.transfers]
    packet = draw(st.sampled_from(kinds).flatmap(lambda cls: packets_of(cls, direction, own & peer)))
    for number in range(draw(st.integers(10, 40))):
        sender.send(packet.replace(id=number))
    sender.do_write()
    stream = bytearray(end.take_output())
    for at in draw(st.lists(st.integers(0, min(len(stream), 3000) - 1), max_size=3)):
        stream[at] = draw(st.integers(0, 255))
    return direction, words, bytes(stream)


@given(rows(), st.integers(0, 60))
def test_a_row_is_read_as_its_packets_one_by_one(row: tuple[Direction, tuple[int, int], bytes], fails_at: int) -> None:
    """The same packets, and the same errors at the same places, whatever is wrong in the middle."""
    direction, words, stream = row
    together = reading_of(direction, words, stream, fails_at, least=8)
    assert together == reading_of(direction, words, stream, fails_at, least=1 << 30)


IN_REQUEST: dict[str, Any] = {"endpoint": 0x81, "status": 0, "length": 512, "stream_id": 0, "data": b""}
OUT_REQUEST: dict[str, Any] = {"endpoint": 1, "status": 0, "length": 4, "stream_id": 0, "data": b"data"}
SMALL_BULK = Limits(max_bulk=1000)


@pytest.mark.parametrize(
    ("limits", "row", "other", "reason"),
    [
        (Limits(), IN_REQUEST, {"endpoint": 0x8F, "status": 255, "length": 1000, "stream_id": 2**32 - 1}, None),
        (Limits(), IN_REQUEST, {"endpoint": 2}, "data_length_mismatch"),
        (Limits(), IN_REQUEST, {"length": 65536 + 512}, None),
        (Limits(), IN_REQUEST, {"data": b"data"}, "unexpected_data"),
        (SMALL_BULK, IN_REQUEST, {"length": 1001}, "bulk_length_limit"),
        (SMALL_BULK, IN_REQUEST, {"length": 65537}, "bulk_length_limit"),
        (Limits(), OUT_REQUEST, {"endpoint": 0x0F, "status": 255, "stream_id": 2**32 - 1, "data": b"atad"}, None),
        (Limits(), OUT_REQUEST, {"endpoint": 0x81}, "unexpected_data"),
        (Limits(), OUT_REQUEST, {"length": 3}, "data_length_mismatch"),
        (Limits(), OUT_REQUEST, {"length": 65536 + 4}, "data_length_mismatch"),
        (Limits(), OUT_REQUEST, {"length": 5, "data": b"datum"}, None),
    ],
)
def test_one_of_a_row_is_another(
    limits: Limits, row: dict[str, Any], other: dict[str, Any], reason: str | None
) -> None:
    """What is checked of a packet by itself is checked of one in a row."""
    parser, end = connected_host(limits=limits)
    requests = [{**row, **(other if number == 20 else {})} for number in range(40)]
    for number, request in enumerate(requests):
        endpoint, status, length, stream_id, data = request.values()
        head = struct.pack("<BBHIH", endpoint, status, length & 0xFFFF, stream_id, length >> 16)
        end.incoming += raw_packet(PacketType.BULK_PACKET, head + data, number)
    expected = [BulkPacket(id=number, **request) for number, request in enumerate(requests)]
    if reason is not None:
        with pytest.raises(RemoteProtocolError) as caught:
            parser.do_read()
        assert caught.value.reason == reason
        del expected[20]
    parser.do_read()
    assert end.received == expected


@pytest.mark.parametrize("count", [2, _framing.LEAST_ROWS + 1, _framing.LEAST_ROWS + 2, 700])
def test_a_row_is_unpacked_at_once(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the third packet on, when enough follow."""
    parser, end = connected_host()
    compile_rows = Mock(side_effect=_layout.compile_rows)
    monkeypatch.setattr(_framing, "compile_rows", compile_rows)
    end.incoming = b"".join(bulk_out(b"some data", number) for number in range(count))
    parser.do_read()
    assert ids(end) == list(range(count))
    assert compile_rows.called == (count >= _framing.LEAST_ROWS + 2)


def test_rows_that_are_none_are_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer whose packets look alike at two places only does not have them looked at again and again."""
    parser, end = connected_host()
    compile_rows = Mock(side_effect=_layout.compile_rows)
    monkeypatch.setattr(_framing, "compile_rows", compile_rows)
    control = raw_packet(PacketType.CONTROL_PACKET, struct.pack("<BBBBHHH", 0, 9, 0, 0, 0, 0, 9) + b"some data")
    one = bulk_out(b"some data") * 3 + control
    assert len(one) == 4 * len(control)
    end.incoming = one * 200
    parser.do_read()
    assert [type(packet) for packet in end.received] == [BulkPacket, BulkPacket, BulkPacket, ControlPacket] * 200
    assert compile_rows.call_count == 1


# ================================================================ writing


class PartialWrites(End):
    """Accepts what a script says: a number (at most what is offered), None, or an exception.

    With a *budget*, instead, that many bytes in all.
    """

    def __init__(self, script: Iterator[int | Exception | None]) -> None:
        super().__init__()
        self.script = script
        self.budget: int | None = None
        self.offers: list[int] = []

    def answer(self, offered: int) -> int | None:
        self.offers.append(offered)
        if self.budget is not None:
            taken = min(self.budget, offered)
            self.budget -= taken
            return taken or None
        item = next(self.script)
        if isinstance(item, Exception):
            raise item
        return None if item is None else min(item, offered)

    def write(self, data: memoryview) -> int | None:
        count = self.answer(len(data))
        self.output += data[: count or 0]
        return count


class VectoredWrites(PartialWrites):
    """The same with writev."""

    def __init__(self, script: Iterator[int | Exception | None]) -> None:
        super().__init__(script)
        self.vectors: list[list[memoryview]] = []

    def write(self, data: memoryview) -> int | None:
        raise AssertionError("write was called although there is writev")

    def writev(self, buffers: Sequence[memoryview]) -> int | None:
        self.vectors.append(list(buffers))
        count = self.answer(sum(map(len, buffers)))
        self.output += b"".join(buffers)[: count or 0]
        return count


writers = pytest.mark.parametrize("kind", [PartialWrites, VectoredWrites])


def always(item: int | Exception | None) -> Iterator[int | Exception | None]:
    return itertools.repeat(item)


def writing_host(kind: type[PartialWrites], **options: Any) -> tuple[Parser, PartialWrites]:
    """A connected host whose callbacks accept everything until told otherwise."""
    end = kind(always(1 << 30))
    parser, _ = connected_host(end, **options)
    end.offers.clear()
    if isinstance(end, VectoredWrites):
        end.vectors.clear()
    return parser, end


SOME = [
    BulkPacket(id=1, endpoint=0x81, data=b"first"),
    BulkPacket(id=2, endpoint=0x81, data=bytes(range(256)) * 100),
    DeviceDisconnect(),
    BulkPacket(id=4, endpoint=0x81, data=b"last"),
]


def wire_of(sent: Sequence[Packet]) -> bytes:
    """The bytes of packets from a host, written in the plainest way."""
    parser, end = connected_host()
    for packet in sent:
        parser.send(packet)
    parser.do_write()
    return end.take_output()


@writers
@pytest.mark.parametrize("step", [1, 5, 26, 1000, 1 << 30])
def test_short_writes(kind: type[PartialWrites], step: int) -> None:
    """The rest is offered again at once."""
    parser, end = writing_host(kind)
    end.script = always(step)
    sent = SOME if step > 1 else [SOME[0], SOME[3]]
    for packet in sent:
        parser.send(packet)
    parser.do_write()
    assert bytes(end.output) == wire_of(sent)
    assert (parser.has_data_to_write(), parser.buffered_output_size()) == (0, 0)


@writers
@pytest.mark.parametrize("blocked", [None, 0])
def test_would_block(kind: type[PartialWrites], blocked: int | None) -> None:
    """do_write returns at once; the next call goes on where it stopped."""
    parser, end = writing_host(kind)
    end.script = itertools.cycle([20, blocked])
    for packet in SOME:
        parser.send(packet)
    total = parser.buffered_output_size()
    calls = 0
    while parser.has_data_to_write():
        end.offers.clear()
        parser.do_write()
        assert len(end.offers) <= 2
        calls += 1
    assert calls >= total // 20
    assert bytes(end.output) == wire_of(SOME)


@writers
def test_what_is_queued_while_a_packet_is_partly_written(kind: type[PartialWrites]) -> None:
    """A partly written packet is one packet and counts in full."""
    parser, end = writing_host(kind)
    parser.send(SOME[0])
    parser.send(SOME[1])
    sizes = [len(wire_of([packet])) for packet in SOME[:2]]
    for accepted, expected in (
        (1, (2, sum(sizes))),
        (sizes[0] - 2, (2, sum(sizes))),
        (1, (1, sizes[1])),
        (sizes[1] - 1, (1, sizes[1])),
        (1, (0, 0)),
    ):
        end.budget = accepted
        parser.do_write()
        assert end.budget == 0
        assert (parser.has_data_to_write(), parser.buffered_output_size()) == expected
    assert bytes(end.output) == wire_of(SOME[:2])


@writers
@pytest.mark.parametrize("error", [OSError(32, "broken"), BrokenPipeError(), RuntimeError("any")])
def test_nothing_is_lost_by_an_exception_of_write(kind: type[PartialWrites], error: Exception) -> None:
    """It passes through; the next call goes on where it stopped."""
    parser, end = writing_host(kind)
    end.script = itertools.cycle([30, error, None, error])
    for packet in SOME:
        parser.send(packet)
    raised = 0
    while parser.has_data_to_write():
        try:
            parser.do_write()
        except type(error):
            raised += 1
    assert raised > 5
    assert bytes(end.output) == wire_of(SOME)


class Wrong(VectoredWrites):
    """Reports what cannot be."""

    def answer(self, offered: int) -> int | None:
        return self.wrong(offered)

    wrong: Callable[[int], int | None]


class WrongPlain(PartialWrites):
    answer = Wrong.answer
    wrong: Callable[[int], int | None]


@pytest.mark.parametrize("kind", [Wrong, WrongPlain])
@pytest.mark.parametrize("wrong", [lambda offered: offered + 1, lambda offered: -1, lambda offered: 1 << 40])
@pytest.mark.parametrize("owned", [False, True])
def test_counts_that_cannot_be(kind: Any, wrong: Callable[[int], int], owned: bool) -> None:
    """ValueError; nothing was written as far as we know, so it is offered again."""
    end = kind(always(None))
    end.wrong = lambda offered: offered
    parser, _ = connected_host(end, write_owns_buffer=owned)
    for packet in SOME:
        parser.send(packet)
    size = parser.buffered_output_size()
    end.wrong = wrong
    with pytest.raises(ValueError, match="write callback"):
        parser.do_write()
    assert (parser.has_data_to_write(), parser.buffered_output_size()) == (len(SOME), size)
    end.wrong = lambda offered: offered
    end.output.clear()
    parser.do_write()
    assert bytes(end.output) == wire_of(SOME)


@writers
def test_an_owned_buffer_is_taken_as_a_whole(kind: type[PartialWrites]) -> None:
    """With write_owns_buffer a short count is a ValueError; 0 and None are not."""
    parser, end = writing_host(kind, write_owns_buffer=True)
    for packet in SOME:
        parser.send(packet)
    for blocked in (0, None):
        end.script = always(blocked)
        parser.do_write()
        assert parser.has_data_to_write() == len(SOME)
    end.script = always(5)
    with pytest.raises(ValueError, match="write_owns_buffer"):
        parser.do_write()
    end.output.clear()
    end.script = always(1 << 30)
    parser.do_write()
    assert bytes(end.output) == wire_of(SOME)


def test_an_owned_buffer_stays_as_it_is() -> None:
    """The callback may keep what it was given."""
    kept: list[memoryview] = []

    class Keeping(End):
        def write(self, data: memoryview) -> int | None:
            kept.append(data)
            return len(data)

    parser, _ = connected_host(Keeping(), write_owns_buffer=True)
    kept.clear()
    for packet in SOME * 3:
        parser.send(packet)
    parser.do_write()
    parser.close()
    assert b"".join(kept) == wire_of(SOME) * 3


@writers
def test_an_empty_queue_calls_nothing(kind: type[PartialWrites]) -> None:
    parser, end = writing_host(kind)
    parser.do_write()
    assert not end.offers


def test_writev_gets_many_packets_at_once() -> None:
    parser, end = writing_host(VectoredWrites)
    assert isinstance(end, VectoredWrites)
    for number in range(2000):
        parser.send(BulkPacket(id=number, endpoint=0x81, data=b"0123456789"))
    parser.do_write()
    assert len(end.vectors) <= 2
    assert len(end.output) == 2000 * 36


def test_writev_gets_vectors_that_a_system_takes() -> None:
    """Not too many buffers, not too many bytes, none empty, large payloads by reference."""
    parser, end = writing_host(VectoredWrites)
    assert isinstance(end, VectoredWrites)
    payload = bytes(20_000)
    for _ in range(2000):
        parser.send(BulkPacket(endpoint=0x81, data=payload))
    parser.do_write()
    for vector in end.vectors:
        assert 1 <= len(vector) <= 1024
        assert sum(map(len, vector)) <= 2 * MIB
        assert all(len(buffer) for buffer in vector)
        assert all(isinstance(buffer, memoryview) for buffer in vector)
        assert any(buffer.obj is payload for buffer in vector)


@given(
    st.lists(st.tuples(st.integers(0, 30_000), st.booleans()), min_size=1, max_size=12),
    st.lists(st.none() | st.integers(0, 60_000), min_size=1, max_size=12),
    st.sampled_from([PartialWrites, VectoredWrites]),
)
def test_any_sizes_and_any_counts(
    sizes: list[tuple[int, bool]], counts: list[int | None], kind: type[PartialWrites]
) -> None:
    """The same bytes, in whatever pieces they are taken, with packets that are queued in between."""
    parser, end = writing_host(kind)
    end.script = itertools.cycle([*counts, 7000])
    sent: list[Packet] = []
    for number, (size, write_now) in enumerate(sizes):
        sent.append(BulkPacket(id=number, endpoint=0x81, data=bytes([number]) * size))
        parser.send(sent[-1])
        if write_now:
            parser.do_write()
        expected = sum(len(wire_of([packet])) for packet in sent)
        assert parser.buffered_output_size() >= expected - len(end.output)
    while parser.has_data_to_write():
        parser.do_write()
    assert bytes(end.output) == wire_of(sent)
    assert parser.buffered_output_size() == 0


@writers
@pytest.mark.parametrize("locks", [None, ThreadingLocks()], ids=["no locks", "locks"])
def test_calls_from_inside_write(kind: type[PartialWrites], locks: LockCallbacks | None) -> None:
    """Send, questions and do_write: no deadlock, no nesting, and the packet is written before do_write returns."""
    depth = 0

    class Calling(kind):  # type: ignore[valid-type, misc]
        def answer(self, offered: int) -> int | None:
            nonlocal depth
            depth += 1
            assert depth == 1, "write was entered twice"
            if len(self.offers) == 1:
                parser.send(SOME[3])
            assert parser.has_data_to_write() >= 1
            assert parser.buffered_output_size() >= offered
            before = len(self.offers)
            parser.do_write()
            assert len(self.offers) == before
            depth -= 1
            return super().answer(offered)  # type: ignore[no-any-return]

    end = Calling(always(1 << 30))
    parser = Parser(end, usb_host=True, send_hello=False, locks=locks)
    end.incoming = raw_hello(EVERYTHING)
    parser.do_read()
    end.offers.append(0)
    parser.send(SOME[0])
    parser.do_write()
    assert bytes(end.output) == wire_of([SOME[0], SOME[3]])


def test_sending_from_inside_packet_received_and_log() -> None:
    class Answering(End):
        def packet_received(self, packet: Packet) -> None:
            super().packet_received(packet)
            if packet.id:
                parser.send(PACKET_TYPES[PacketType.CONFIGURATION_STATUS](id=packet.id))
                parser.do_write()

        def log(self, level: LogLevel, message: str) -> None:
            super().log(level, message)
            parser.do_write()

    end = Answering()
    parser = Parser(end, usb_host=True, locks=ThreadingLocks())
    end.incoming = raw_hello(EVERYTHING) + get_configuration(1) + get_configuration(2)
    parser.do_read()
    assert len(end.output) == 80 + 2 * 18


def test_the_first_packet_is_hello() -> None:
    """80 bytes with the version, cut to 63 bytes; nothing with send_hello=False."""
    end = End()
    parser = Parser(end, usb_host=True, version="v" * 100)
    assert (parser.has_data_to_write(), parser.buffered_output_size()) == (1, 80)
    parser.do_write()
    assert bytes(end.output) == raw_hello(EVERYTHING, b"v" * 63)
    assert Parser(End(), send_hello=False).has_data_to_write() == 0


def test_packets_queued_before_the_peer_s_hello_have_short_headers() -> None:
    """What is queued is finished: a hello that comes later does not change it."""
    end = End()
    parser = Parser(end, usb_host=True, send_hello=False)
    parser.send(DeviceConnect(device_version_bcd=5))
    end.incoming = raw_hello(EVERYTHING)
    parser.do_read()
    parser.send(DeviceConnect(device_version_bcd=5))
    parser.do_write()
    assert len(end.output) == (12 + 8) + (16 + 10)


# ================================================================ large payloads


def test_a_large_payload_that_comes_in_one_piece_is_not_copied() -> None:
    """Only what is missing is asked for, so that the piece is the payload."""
    parser, end = connected_host(ScriptedReads(raw_hello(EVERYTHING)))
    assert isinstance(end, ScriptedReads)
    stream = bulk_out(bytes(LARGE))
    payload = bytes(LARGE)
    end.script = [stream[:26], payload]
    parser.do_read()
    (packet,) = end.received
    assert isinstance(packet, BulkPacket)
    assert packet.data is payload
    assert end.asked[1] == LARGE


class Endless(ParserCallbacks):
    """A stream that is not held in memory: a head, then zeros. Blocks after *total* bytes."""

    def __init__(self, head: bytes, total: int, *, piece: int = 64 * 1024) -> None:
        self.head = head
        self.left = total
        self.piece = piece
        self.sizes: list[int] = []

    def log(self, level: LogLevel, message: str) -> None:
        pass

    def read(self, count: int) -> bytes | None:
        if self.head:
            head, self.head = self.head[:count], self.head[count:]
            return head
        size = min(count, self.left, self.piece)
        self.left -= size
        return bytes(size) or None

    def packet_received(self, packet: Packet) -> None:
        if isinstance(packet, BulkPacket):
            self.sizes.append(len(packet.data))


def traced_peak(function: Callable[[], object]) -> int:
    """The most memory that *function* had at a time, in bytes, beyond what there was before."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        function()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


@needs_tracemalloc
@pytest.mark.parametrize("piece", [1 << 30, 64 * 1024])
def test_a_large_payload_is_copied_once_at_most(piece: int) -> None:
    """The pieces and the whole: twice its size, and no more."""
    size = 16 * MIB
    end = Endless(raw_hello(EVERYTHING) + bulk_out(bytes(size))[:26], size, piece=piece)
    parser = Parser(end, usb_host=True)
    peak = traced_peak(parser.do_read)
    assert end.sizes == [size]
    assert peak < 2 * size + MIB


@needs_tracemalloc
@pytest.mark.parametrize("received", [0, 64 * 1024, 4 * MIB])
@pytest.mark.parametrize("with_readinto", [False, True])
def test_memory_follows_what_was_received(received: int, with_readinto: bool) -> None:
    """Not what was announced: here 128 MiB."""
    head = raw_packet(PacketType.BULK_PACKET, struct.pack("<BBHIH", 2, 0, 0, 0, 0x800))
    head = head[:4] + struct.pack("<I", MAX_BULK + 10) + head[8:]
    end = Endless(raw_hello(EVERYTHING) + head, received)
    if with_readinto:

        def readinto(buffer: memoryview) -> int | None:
            piece = end.read(len(buffer))
            if piece is None:
                return None
            buffer[: len(piece)] = piece
            return len(piece)

        end.readinto = readinto  # type: ignore[attr-defined]
    parser = Parser(end, usb_host=True)
    assert traced_peak(parser.do_read) < 3 * received + MIB


@needs_tracemalloc
def test_tiny_pieces_do_not_add_up() -> None:
    """A peer that sends byte by byte does not make us keep an object per byte."""
    size = 60_000
    end = Endless(raw_hello(EVERYTHING) + bulk_out(bytes(size))[:26], size, piece=1)
    parser = Parser(end, usb_host=True)
    assert traced_peak(parser.do_read) < 6 * size
    assert end.sizes == [size]


def test_received_data_is_bytes() -> None:
    parser, end = connected_host()
    end.incoming = bulk_out(b"x") + bulk_out(bytes(LARGE))
    parser.do_read()
    assert [type(packet.data) for packet in end.received if isinstance(packet, BulkPacket)] == [bytes, bytes]


@pytest.mark.parametrize("limits", [Limits(max_packet=1000), Limits(max_bulk=900)])
def test_limits_of_what_is_received(limits: Limits) -> None:
    parser, end = connected_host(limits=limits)
    end.incoming = bulk_out(bytes(900), 1) + bulk_out(bytes(1001), 2) + get_configuration(3)
    with pytest.raises(RemoteProtocolError):
        parser.do_read()
    parser.do_read()
    assert ids(end) == [1, 3]


# ================================================================ locks


class CountingLocks(ThreadingLocks):
    """Counts its calls, and knows which locks are held."""

    def __init__(self, give: bool = True) -> None:
        self.give = give
        self.calls: list[str] = []
        self.held: list[object] = []
        self.allocated: list[object] = []
        self.freed: list[object] = []

    def alloc_lock(self) -> object | None:
        self.calls.append("alloc")
        if not self.give:
            return None
        self.allocated.append(super().alloc_lock())
        return self.allocated[-1]

    def lock(self, lock: object, /) -> None:
        self.calls.append("lock")
        assert lock not in self.held, "a lock that is not recursive was locked twice: deadlock"
        assert lock not in self.freed
        super().lock(lock)
        self.held.append(lock)

    def unlock(self, lock: object, /) -> None:
        self.calls.append("unlock")
        self.held.remove(lock)
        super().unlock(lock)

    def free_lock(self, lock: object, /) -> None:
        assert lock not in self.held
        self.freed.append(lock)
        super().free_lock(lock)


def use_everything(locks: CountingLocks | None) -> Parser:
    """Read, send, write, ask, log and fail; no lock is held in any callback."""

    class Checking(End):
        def check(self) -> None:
            assert locks is None or not locks.held

        def log(self, level: LogLevel, message: str) -> None:
            self.check()

        def read(self, count: int) -> bytes | bytearray | memoryview | None:
            self.check()
            return super().read(count)

        def write(self, data: memoryview) -> int | None:
            self.check()
            return super().write(data)

        def packet_received(self, packet: Packet) -> None:
            self.check()

    end = Checking()
    parser = Parser(end, usb_host=True, locks=locks, limits=Limits(max_queued_packets=5))
    end.incoming = raw_hello(0b101) + raw_packet(PacketType.FILTER_FILTER, b"bad\0", wide=False)
    parser.do_read()
    parser.do_write()
    for _ in range(5):
        parser.send(DeviceDisconnect())
    with pytest.raises(QueueFullError):
        parser.send(DeviceDisconnect())
    with pytest.raises(LocalProtocolError):
        parser.send(Reset())
    parser.have_capability(99)
    parser.peer_has_capability(1)
    parser.have_peer_capabilities()
    parser.has_data_to_write()
    parser.buffered_output_size()
    parser.do_write()
    parser.do_write()
    parser.serialize()
    return parser


def test_callbacks_run_with_no_lock_held() -> None:
    locks = CountingLocks()
    use_everything(locks)
    assert not locks.held
    assert locks.calls.count("lock") == locks.calls.count("unlock") > 0


def test_every_lock_is_freed_once() -> None:
    locks = CountingLocks()
    parser = use_everything(locks)
    assert locks.allocated
    assert not locks.freed
    for _ in range(3):
        parser.close()
    assert sorted(map(id, locks.freed)) == sorted(map(id, locks.allocated))


def test_no_lock_means_no_locking() -> None:
    """alloc_lock may say None; then no other lock callback is called."""
    locks = CountingLocks(give=False)
    use_everything(locks).close()
    assert set(locks.calls) == {"alloc"}
    assert not locks.freed
    use_everything(None).close()


def test_a_parser_is_a_context_manager() -> None:
    locks = CountingLocks()
    with Parser(End(), locks=locks) as parser:
        assert isinstance(parser, Parser)
    assert locks.freed == locks.allocated
    with pytest.raises(KeyError), Parser(End(), locks=CountingLocks()):
        raise KeyError


# ================================================================ migration


def test_serialize_inside_a_callback() -> None:
    """There may be packets behind this one: StateError that says what to do."""
    reasons: list[str] = []

    class Serializing(End):
        def packet_received(self, packet: Packet) -> None:
            with pytest.raises(StateError, match="do_read") as caught:
                parser.serialize()
            reasons.append(caught.value.reason)

    end = Serializing()
    parser = Parser(end, usb_host=True)
    end.incoming = raw_hello(EVERYTHING) + get_configuration(1)
    parser.do_read()
    assert reasons == ["state_unparsed_packets"] * 2
    parser.serialize()


def state_or_advice(parser: Parser) -> bytes | StateError:
    try:
        return parser.serialize()
    except StateError as error:
        return error


@bad_packets
@pytest.mark.parametrize("behind", [b"", get_configuration(1), get_configuration(1)[:5], get_configuration(1) * 2])
def test_serialize_after_a_bad_packet(reason: str, bad: bytes, behind: bytes) -> None:
    """Nothing is lost, or StateError that says to call do_read first."""
    parser, end = connected_host(limits=LIMITS)
    end.incoming = bad + behind
    with pytest.raises(RemoteProtocolError):
        parser.do_read()
    state = state_or_advice(parser)
    if isinstance(state, StateError):
        assert "do_read" in str(state)
        parser.do_read()
        state = parser.serialize()
    heir_end = End(end.incoming)
    heir = Parser(heir_end, usb_host=True, send_hello=False, limits=LIMITS)
    heir.unserialize(state)
    heir_end.incoming += get_configuration(1)[5:] if len(behind) == 5 else get_configuration(2)
    heir.do_read()
    expected = [1] * (len(behind) // 16) + ([1] if len(behind) == 5 else [2])
    assert ids(end) + ids(heir_end) == expected


def test_an_heir_goes_on_at_any_byte() -> None:
    """Reading and writing, with packets queued and one of them partly written."""
    stream = get_configuration(1) + bulk_out(b"some data", 2) + raw_packet(PacketType.FILTER_FILTER, b"\0")
    for cut in range(len(stream) + 1):
        parser, end = connected_host(PartialWrites(always(1 << 30)))
        assert isinstance(end, PartialWrites)
        end.incoming = stream[:cut]
        parser.do_read()
        for packet in SOME:
            parser.send(packet)
        end.output.clear()
        end.budget = cut
        parser.do_write()
        heir_end = End(stream[cut:])
        heir = Parser(heir_end, usb_host=True, send_hello=False)
        heir.unserialize(parser.serialize())
        heir.do_read()
        heir.do_write()
        assert [*end.received, *heir_end.received] == [
            GetConfiguration(id=1),
            BulkPacket(id=2, endpoint=2, data=b"some data"),
            FilterFilter(),
        ]
        assert bytes(end.output + heir_end.output) == wire_of(SOME)
        assert heir.have_peer_capabilities()


def test_serialize_changes_nothing() -> None:
    parser, end = connected_host()
    end.incoming = bulk_out(bytes(LARGE), 1)[:LARGE]
    parser.do_read()
    state = parser.serialize()
    assert parser.serialize() == state
    end.incoming = bulk_out(bytes(LARGE), 1)[LARGE:]
    parser.do_read()
    assert ids(end) == [1]


def test_fewer_capabilities_in_a_state_are_warned_of() -> None:
    state = Parser(End(), usb_host=True, capabilities=[Capability.FILTER]).serialize()
    end = End()
    parser = Parser(end, usb_host=True)
    parser.unserialize(state)
    assert [level for level, _ in end.messages] == [LogLevel.WARNING]
    assert parser.have_capability(Capability.FILTER)
    assert not parser.have_capability(Capability.IDS_64BITS)


def test_more_capabilities_in_a_state_are_an_error() -> None:
    state = Parser(End(), usb_host=True).serialize()
    with pytest.raises(StateError):
        Parser(End(), usb_host=True, capabilities=[Capability.FILTER]).unserialize(state)


@st.composite
def spoiled(draw: st.DrawFn) -> bytes:
    """A good state with a few bytes changed, cut or added."""
    parser, end = connected_host()
    end.incoming = bulk_out(b"data", 3)[: draw(st.integers(0, 29))]
    parser.do_read()
    parser.send(SOME[0])
    state = bytearray(parser.serialize())
    kind = draw(st.sampled_from(["cut", "change", "add", "cut to fit"]))
    if kind == "add":
        return bytes(state) + b"\0"
    if kind == "change":
        state[draw(st.integers(0, len(state) - 1))] ^= draw(st.integers(1, 255))
        return bytes(state)
    state = state[: draw(st.integers(0, len(state) - 1))]
    if kind == "cut to fit" and len(state) >= 8:
        state[4:8] = len(state).to_bytes(4, "little")
    return bytes(state)


@given(spoiled())
def test_a_failed_unserialize_changes_nothing(state: bytes) -> None:
    """Queue, capabilities and what was read are as before; a good state still loads."""
    end = End()
    parser = Parser(end, usb_host=True)
    before = parser.serialize()
    try:
        parser.unserialize(state)
    except StateError as error:
        failure = error
    else:
        return
    assert failure.reason
    assert str(failure).isprintable()
    assert parser.serialize() == before
    assert parser.has_data_to_write() == 1
    assert not end.messages
    end.incoming = raw_hello(EVERYTHING) + get_configuration(9)
    parser.do_read()
    assert ids(end) == [0, 9]


def test_unserialize_needs_a_new_parser() -> None:
    state = Parser(End(), usb_host=True).serialize()
    parser, end = connected_host()
    end.incoming = get_configuration(1)[:4]
    parser.do_read()
    with pytest.raises(StateError) as caught:
        parser.unserialize(state)
    assert caught.value.reason == "state_not_pristine"
    end.incoming = get_configuration(1)[4:]
    parser.do_read()
    assert ids(end) == [1]


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_a_state_may_be_any_buffer(kind: Callable[[bytes], Any]) -> None:
    parser, _ = connected_host()
    heir = Parser(End(), usb_host=True, send_hello=False)
    heir.unserialize(kind(parser.serialize()))
    assert heir.have_peer_capabilities()


# ================================================================ everything at once


@given(st.lists(packets(GUEST, EVERYTHING, EVERYTHING), max_size=6), st.data())
def test_cut_anywhere(sent: list[Packet], data: st.DataObject) -> None:
    """Reads that give random pieces, blocking in between, deliver what was sent."""
    host, host_end, guest, guest_end = parser_pair()
    for packet in sent:
        guest.send(packet)
    guest.do_write()
    stream = guest_end.take_output()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=5)))
    host_end.piece = data.draw(st.sampled_from([5, 100, 5000, 1 << 30]))
    for start, stop in itertools.pairwise([0, *cuts, len(stream)]):
        host_end.incoming = stream[start:stop]
        host.do_read()
    assert host_end.received == sent


def test_header_widths_change_right_behind_hello() -> None:
    """Inside the same read."""
    end = End(raw_packet(PacketType.RESET, wide=False) + raw_hello(EVERYTHING) + raw_packet(PacketType.RESET))
    Parser(end, usb_host=True).do_read()
    assert [type(packet) for packet in end.received] == [Reset, Hello, Reset]
    assert header_struct(True).size == 16


def test_packets_before_hello_are_delivered() -> None:
    """The original does not insist on it either: 32-bit ids, short layouts."""
    end = End(raw_packet(PacketType.SET_CONFIGURATION, b"\1", 7, wide=False))
    Parser(end, usb_host=True).do_read()
    assert end.received == [SetConfiguration(id=7, configuration=1)]


def test_a_bad_header_that_is_still_to_be_told_is_not_serialized() -> None:
    """Such a state could never be loaded."""

    pieces = [struct.pack("<III", 99, 0, 0) + struct.pack("<III", 1, 5000, 0) + b"x" * 10]

    class Stream(ParserCallbacks):
        def read(self, count: int) -> bytes | None:
            return pieces.pop() if pieces else None

    parser = Parser(Stream())
    with pytest.raises(RemoteProtocolError):
        parser.do_read()
    with pytest.raises(StateError, match="do_read"):
        parser.serialize()


@given(st.data())
def test_a_sender_sends_like_send(data: st.DataObject) -> None:
    """Values in place of a packet: the same bytes."""
    packet = data.draw(packets(HOST, mask_of(ALL), mask_of(ALL)))
    host, end, _, _ = parser_pair()
    host.send(packet)
    host.do_write()
    expected = end.take_output()
    values = packet.as_dict()
    host.sender(type(packet), *values)(*values.values())
    host.do_write()
    assert end.take_output() == expected


def test_a_replier_replaces_the_result() -> None:
    host, end, _, _ = parser_pair()
    request = BulkPacket(id=5, endpoint=0x81, length=64, stream_id=3)
    host.send(request.replace(status=4, length=2, data=b"ab"))
    host.replier(BulkPacket)(request, 4, 2, b"ab")
    host.do_write()
    output = end.take_output()
    assert output[: len(output) // 2] == output[len(output) // 2 :]


@pytest.mark.parametrize(
    "packet", [BulkPacket(endpoint=0x01, data=b"an answer has none"), BulkPacket(endpoint=0x81, status=256)]
)
def test_a_sender_refuses_like_send(packet: Packet) -> None:
    """With the same words, and nothing is queued."""
    host = Parser(End(), usb_host=True)
    waiting = host.has_data_to_write()
    values = packet.as_dict()
    with pytest.raises(LocalProtocolError) as by_send:
        host.send(packet)
    with pytest.raises(LocalProtocolError) as by_sender:
        host.sender(type(packet), *values)(*values.values())
    assert str(by_sender.value) == str(by_send.value)
    assert by_sender.value.reason == by_send.value.reason
    assert host.has_data_to_write() == waiting


class InterruptedDeque(deque[None]):
    """Ctrl-C as something was taken out."""

    def pop(self) -> None:  # type: ignore[override]
        super().pop()
        raise KeyboardInterrupt


def test_an_interrupted_write_does_not_keep_its_turn() -> None:
    """Signal handlers run between any two steps of Python."""
    end = End()
    parser = Parser(end, locks=ThreadingLocks())
    turn = parser._queue._turn
    parser._queue._turn = interrupted = InterruptedDeque(turn)
    with pytest.raises(KeyboardInterrupt):
        parser.do_write()
    assert len(interrupted) == 1
    parser._queue._turn = turn
    parser.do_write()
    assert end.output
    assert parser.has_data_to_write() == 0


class BusyOnce(End):
    """A stream that takes nothing at first; another thread hears that it does again before that call has returned."""

    def __init__(self) -> None:
        super().__init__()
        self.flush: Callable[[], None] = lambda: None
        self.calls = 0

    def write(self, data: memoryview) -> int | None:
        self.calls += 1
        if self.calls > 1:
            return super().write(data)
        other = threading.Thread(target=self.flush)
        other.start()
        other.join()
        return None


def test_a_write_that_came_meanwhile_is_made_up_for() -> None:
    """Whose call finds another thread writing returns, and that one tries again."""
    end = BusyOnce()
    parser = Parser(end, locks=ThreadingLocks())
    end.flush = parser.do_write
    parser.do_write()
    assert parser.has_data_to_write() == 0
    assert end.calls == 2
    assert end.output


class StubbornLocks(ThreadingLocks):
    """An application's lock that fails once something was queued."""

    fails = False

    def unlock(self, lock: object) -> None:
        super().unlock(lock)
        if self.fails:
            raise ValueError("no lock of mine")


def test_errors_of_locks_pass_through() -> None:
    """They are no fault of the packet."""
    locks = StubbornLocks()
    host, _ = connected_host(locks=locks)
    locks.fails = True
    with pytest.raises(ValueError, match="no lock of mine"):
        host.send(DeviceDisconnect())


def test_a_view_of_larger_items_is_counted_in_bytes() -> None:
    """More than was asked for is an error, whatever its len() says."""
    parser, end = connected_host()
    end.read = lambda count: memoryview(bytes(2 * count)).cast("H")  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="bytes although at most"):
        parser.do_read()


@pytest.mark.parametrize("locks", [None, ThreadingLocks()])
def test_watch_backlog(locks: ThreadingLocks | None) -> None:
    """More than so many packets, or bytes: those that wait already, and those that come."""
    host = Parser(End(), usb_host=True, locks=locks)  # its hello waits
    hello = host.buffered_output_size()
    exceeds = host.watch_backlog()
    assert host.buffered_output_size() == hello
    assert not exceeds(1, hello)
    assert exceeds(0, hello)
    assert exceeds(1, hello - 1)
    host.send(DeviceDisconnect())
    more = host.buffered_output_size()
    assert more > hello
    assert not exceeds(2, more)
    assert exceeds(2, more - 1)
    host.do_write()
    assert host.buffered_output_size() == 0
    assert not exceeds(0, 0)
