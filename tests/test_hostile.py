"""Peers that mean harm: any bytes, lying lengths, floods. The invariants are those of fuzz/README.md.

Random inputs go through the functions of fuzz/invariants.py, which the fuzz targets use, too. Time is compared with
time (ten times the input may cost at most twice ten times as much), memory is measured by tracemalloc.
"""

from __future__ import annotations

import gc
import logging
import struct
import time
import tracemalloc
from collections.abc import Callable, Iterator
from functools import partial

import pytest
from fuzz.invariants import Feeder, check_filter, check_parser, check_stream, check_unserialize, hello_bytes
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from usbredir.errors import ConnectionClosed, RemoteProtocolError, StateError
from usbredir.packets import PACKET_TYPES, BulkPacket, Packet
from usbredir.parser import LogLevel, Parser, ParserCallbacks
from usbredir.proto import MAX_PACKET, PacketType

quick = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
roles = st.sampled_from([True, False])
MIB = 1024 * 1024

# ---------------------------------------------------------------- any input


@quick
@given(st.binary(max_size=400), roles)
@example(b"\x00\x00\x00" + bytes(8) + b"\xff", True)
@example(b"\x0f" * 9 + b"..", True)  # half a header with a length above the limit
def test_any_bytes(data: bytes, host: bool) -> None:
    """Any bytes from the peer."""
    check_parser(data, host=host)


lengths = st.one_of(
    st.integers(0, 300),
    st.sampled_from([0, 1, MAX_PACKET, MAX_PACKET + 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1024, 65535]),
)
numbers = st.one_of(st.sampled_from(list(PACKET_TYPES)), st.sampled_from(list(PACKET_TYPES)), st.integers(0, 2**32 - 1))


@st.composite
def hostile_packets(draw: st.DrawFn, wide: bool) -> bytes:
    """A header with any type and mostly the right length, and a body of about that size."""
    body = draw(st.one_of(st.binary(max_size=20), st.binary(max_size=300)))
    cls = PACKET_TYPES[draw(st.sampled_from(list(PACKET_TYPES)))]
    number = draw(st.one_of(st.just(int(cls.packet_type)), numbers))
    if draw(st.integers(0, 3)):
        body = (body + bytes(10))[: draw(st.sampled_from([0, 1, 2, 3, 4, 5, 6, 8, 9, 10, 12, 14, 96, 132, 160, 288]))]
    length = draw(lengths) if draw(st.integers(0, 4)) == 0 else len(body)
    return struct.pack("<IIQ" if wide else "<III", number, length, draw(st.integers(0, 2**32 - 1))) + body


@st.composite
def hostile_streams(draw: st.DrawFn) -> tuple[bytes, int]:
    """Perhaps a hello, then packets in the width that it settles. Second value: our own capabilities."""
    own, peer = draw(st.sampled_from([0xFF, 0xDF, 0x00, 0xA0])), draw(st.sampled_from([0xFF, 0x20, 0x07, 0x00]))
    said_hello = draw(st.integers(0, 9)) > 0
    wide = bool(said_hello and own & peer & 0x20)
    packets = draw(st.lists(hostile_packets(wide), max_size=12))
    return (hello_bytes(peer) if said_hello else b"") + b"".join(packets), own


@quick
@given(hostile_streams(), roles, st.sampled_from([1, 2, 7, 33, 500]))
def test_streams_of_bad_packets(stream: tuple[bytes, int], host: bool, size: int) -> None:
    """Headers that make sense with lengths and bodies that do not."""
    check_stream(stream[0], host=host, own=stream[1], size=size)


def some_states() -> list[bytes]:
    """States at different moments of a connection."""
    states = []
    for sent in (b"", hello_bytes(0xFF), hello_bytes(0xFF) + struct.pack("<IIQ", 101, 20, 7) + bytes(13)):
        parser = Parser(feeder := Feeder(), usb_host=True)
        feeder.rest = sent
        parser.do_read()
        states.append(parser.serialize())
    return states


STATES = some_states()


@quick
@given(st.binary(max_size=1), st.binary(max_size=120))
@example(b"\x03", b"")
def test_any_bytes_as_state(flags: bytes, data: bytes) -> None:
    """Any bytes as a migration state."""
    check_unserialize(flags + data)


@quick
@given(st.sampled_from([b"\x03", b"\x02", b"\x07"]), st.sampled_from(STATES), st.data())
def test_spoiled_states(flags: bytes, state: bytes, data: st.DataObject) -> None:
    """States with numbers changed, bytes missing and bytes too many."""
    changed = bytearray(state)
    for _ in range(data.draw(st.integers(0, 2))):
        offset = 4 * data.draw(st.integers(0, len(state) // 4 - 1))
        value = data.draw(st.one_of(st.integers(0, 300), st.integers(0, 2**32 - 1)))
        changed[offset : offset + 4] = struct.pack("<I", value)
    changed = changed[: data.draw(st.integers(0, len(changed)))] if data.draw(st.booleans()) else changed
    if data.draw(st.booleans()) and len(changed) >= 8:
        changed[4:8] = struct.pack("<I", len(changed))
    check_unserialize(flags + bytes(changed))


filter_texts = st.one_of(
    st.binary(max_size=60),
    st.text("0123456789abcdefxX-+,|: \t\n", max_size=60).map(str.encode),
    st.lists(st.lists(st.integers(-2, 70000).map(str), min_size=4, max_size=6).map(",".join), max_size=4).map(
        lambda rules: "|".join(rules).encode()
    ),
)


@quick
@given(st.binary(min_size=1, max_size=1), filter_texts)
def test_any_filter_text(flags: bytes, text: bytes) -> None:
    """Any text as a filter."""
    check_filter(flags + text)


# ---------------------------------------------------------------- memory


class Source(ParserCallbacks):
    """A stream in pieces of its own size that is not held in memory as a whole. Nothing is kept."""

    def __init__(self, pieces: Iterator[bytes], *, pause: bool = False) -> None:
        self.pieces = pieces
        self.rest = b""
        self.pause = pause
        self.pausing = False
        self.packets = 0
        self.ended = False

    def log(self, level: LogLevel, message: str) -> None:
        pass

    def read(self, count: int) -> bytes | None:
        if not self.rest:
            if self.pause and not self.pausing:
                self.pausing = True
                return None
            self.pausing = False
            self.rest = next(self.pieces, b"")
            if not self.rest:
                self.ended = True
                return None
        piece, self.rest = self.rest[:count], self.rest[count:]
        return piece

    def packet_received(self, packet: Packet) -> None:
        self.packets += 1


class SourceInto(Source):
    """The same with readinto."""

    def readinto(self, buffer: memoryview) -> int | None:
        piece = self.read(len(buffer))
        if piece is None:
            return None
        buffer[: len(piece)] = piece
        return len(piece)


SOURCES = pytest.mark.parametrize("source_type", [Source, SourceInto])


def consume(source: Source, *, host: bool = False) -> int:
    """Read to the end. Returns the number of errors."""
    parser = Parser(source, usb_host=host)
    errors = 0
    while not source.ended:
        try:
            parser.do_read()
        except RemoteProtocolError:
            errors += 1
    return errors


def peak(function: Callable[[], object]) -> int:
    """Most bytes allocated at once."""
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def header(number: int, length: int) -> bytes:
    return struct.pack("<III", number, length, 0)


@SOURCES
@pytest.mark.parametrize("length", [MAX_PACKET, MAX_PACKET + 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 100 * MIB])
@pytest.mark.parametrize("number", [PacketType.HELLO, PacketType.FILTER_FILTER, PacketType.BULK_PACKET, 0xDEAD])
def test_announced_lengths_cost_no_memory(source_type: type[Source], number: int, length: int) -> None:
    """Up to 4 GiB are announced, 100 KiB come: memory for what came, not for what was announced."""
    pieces = [header(number, length) + bytes(100), *[bytes(1000)] * 100]
    assert peak(lambda: consume(source_type(iter(pieces)))) < 2 * MIB


@SOURCES
def test_thrown_away_bodies_cost_no_memory(source_type: type[Source]) -> None:
    """16 MiB behind a bad header go through a small buffer."""
    pieces = (bytes(64 * 1024) for _ in range(256))
    source = source_type(iter([header(0xDEAD, 16 * MIB)]))
    source.pieces = _chain(header(0xDEAD, 16 * MIB), pieces)
    assert peak(lambda: consume(source)) < MIB


def _chain(first: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    yield first
    yield from rest


@SOURCES
def test_a_payload_in_tiny_pieces_costs_little_more_than_itself(source_type: type[Source]) -> None:
    """4 MiB in pieces of 100 bytes: no object per piece is kept."""
    size = 4 * MIB
    body = size - 8
    head = header(PacketType.HELLO, size) + bytes(64)
    pieces = _chain(head, (bytes(100) for _ in range(body // 100)))
    assert peak(lambda: consume(source_type(pieces))) < 3 * size


def test_errors_leave_nothing_behind() -> None:
    """20,000 bad packets: memory does not grow with their number."""
    pieces = (header(0xDEAD, 0) * 100 for _ in range(200))
    assert peak(lambda: consume(Source(pieces))) < MIB


def test_states_with_large_counts_cost_no_memory() -> None:
    """A state that announces 4 GiB or 4 billion packets."""
    state = STATES[1]
    for offset in range(0, len(state) - 3, 4):
        for value in (0xFFFFFFFF, 0x7FFFFFFF, MAX_PACKET):
            changed = state[:offset] + struct.pack("<I", value) + state[offset + 4 :]
            parser = Parser(Feeder(), usb_host=True, send_hello=False)
            assert peak(partial(load, parser, changed)) < MIB


def load(parser: Parser, state: bytes) -> None:
    try:
        parser.unserialize(state)
    except StateError:
        return


# ---------------------------------------------------------------- time


def cpu_time(function: Callable[[], object], runs: int = 3) -> float:
    """Least CPU seconds of some runs, without the garbage collector, whose share depends on the tests before."""
    times = []
    gc.disable()
    try:
        for _ in range(runs):
            start = time.process_time()
            function()
            times.append(time.process_time() - start)
    finally:
        gc.enable()
    return min(times)


def assert_linear(run: Callable[[int], object], few: int) -> None:
    """Ten times as much costs less than thirty times as much.

    What is quadratic costs a hundred times as much; shared machines change their speed by two and more.
    """
    run(few)
    ratios = []
    for _ in range(6):
        ratios.append(cpu_time(lambda: run(10 * few), 1) / cpu_time(lambda: run(few)))
        if ratios[-1] < 30:
            return
    pytest.fail(f"ten times the input costs {min(ratios):.0f} times as much")


@SOURCES
@pytest.mark.parametrize("size", [12, 1000, 12 * 5000])
def test_endless_tiny_packets_in_linear_time(source_type: type[Source], size: int) -> None:
    """Packets of 12 bytes without end."""

    def run(count: int) -> None:
        stream = header(PacketType.RESET, 0) * count
        source = source_type(stream[start : start + size] for start in range(0, len(stream), size))
        assert consume(source, host=True) == 0
        assert source.packets == count

    assert_linear(run, 3_000)


@SOURCES
@pytest.mark.parametrize(
    "packet", [header(0xDEAD, 0), header(PacketType.RESET, 1) + b"x", header(PacketType.FILTER_REJECT, 0)]
)
def test_endless_errors_in_linear_time(source_type: type[Source], packet: bytes) -> None:
    """Nothing but bad packets, many in one piece."""

    def run(count: int) -> None:
        source = source_type(iter([packet * count]))
        parser = Parser(source, usb_host=True, capabilities=())
        errors = 0
        while not source.ended:
            try:
                parser.do_read()
            except RemoteProtocolError:
                errors += 1
        assert errors == count

    assert_linear(run, 2_000)


LARGE = [
    pytest.param(PacketType.HELLO, bytes(64), id="hello"),
    pytest.param(PacketType.FILTER_FILTER, b"", id="filter"),
    pytest.param(PacketType.CONTROL_PACKET, bytes(10), id="control"),
    pytest.param(PacketType.BULK_PACKET, bytes(8), id="bulk"),
]


@SOURCES
@pytest.mark.parametrize(("number", "type_header"), LARGE)
@pytest.mark.parametrize("pause", [False, True])
def test_a_large_packet_in_small_pieces_in_linear_time(
    source_type: type[Source], number: int, type_header: bytes, pause: bool
) -> None:
    """One packet that comes in pieces of 2000 bytes; with *pause*, read would block between them."""

    def run(size: int) -> None:
        head = header(number, len(type_header) + size) + type_header
        pieces = _chain(head, (bytes(2000) for _ in range(size // 2000)))
        consume(source_type(pieces, pause=pause))

    few = 90_000 if number == PacketType.FILTER_FILTER else 1_000_000
    assert_linear(run, few)


@SOURCES
def test_single_bytes_in_linear_time(source_type: type[Source]) -> None:
    """A packet that comes byte by byte, each followed by would-block."""

    def run(size: int) -> None:
        stream = header(PacketType.HELLO, 64 + size) + bytes(64 + size)
        consume(source_type((stream[n : n + 1] for n in range(len(stream))), pause=True))

    assert_linear(run, 2_000)


@pytest.mark.parametrize(
    "rule", [b"|", b"1,1,1,1,1|", b"1,", b"-1,-1,-1,-1,0|", b"0x0000000000,", b"99999999999999999999999"]
)
def test_long_filter_texts_in_linear_time(rule: bytes) -> None:
    """Filter texts as long as they may be."""

    def run(size: int) -> None:
        text = rule * (size // len(rule)) + b"\0"
        consume(Source(iter([header(PacketType.FILTER_FILTER, len(text)) + text])))

    assert_linear(run, 60_000)


# ---------------------------------------------------------------- text from the peer

NASTY = "\x1b[2J\r\nERROR fake\x00\x07\x9b\u202e%s%n{0}"


class LogKeeper(Feeder):
    def __init__(self) -> None:
        super().__init__()
        self.messages: list[tuple[LogLevel, str]] = []

    def log(self, level: LogLevel, message: str) -> None:
        super().log(level, message)
        self.messages.append((level, message))


@pytest.mark.parametrize(
    ("version", "shown"),
    [
        (b"\x1b[2J\r\nfake", "\\x1b[2J\\r\\nfake"),
        (b"%s%n%d {0}", "%s%n%d {0}"),
        (b"\x7f\x01", "\\x7f\\x01"),
        ("\x9b\u202e\u2028".encode(), "\\x9b\\u202e\\u2028"),
        (b"abc\0hidden", "abc,"),
    ],
)
def test_control_characters_of_the_version_are_escaped(version: bytes, shown: str) -> None:
    """A peer cannot write to the terminal of who reads the log, nor forge lines in it."""
    parser = Parser(keeper := LogKeeper())
    keeper.rest = hello_bytes(0xFF, version)
    parser.do_read()
    (level, message), *more = keeper.messages
    assert level is LogLevel.INFO
    assert shown in message
    assert not more
    assert "hidden" not in message


def test_undecodable_version() -> None:
    """Bytes that are not UTF-8 are replaced."""
    parser = Parser(keeper := LogKeeper())
    keeper.rest = hello_bytes(0xFF, b"a\xff\xfeb")
    parser.do_read()
    (packet,) = keeper.seen
    assert getattr(packet, "version") == "a\ufffd\ufffdb"  # noqa: B009 - Packet itself has no version


def test_the_default_log_does_not_format_text_of_the_peer(caplog: pytest.LogCaptureFixture) -> None:
    """Percent signs from the peer are not a format for the logging module."""
    caplog.set_level(logging.DEBUG, "usbredir.parser")

    class Silent(ParserCallbacks):
        rest = hello_bytes(0xFF, NASTY.partition("\0")[0].encode() + b"%(x)s")

        def read(self, count: int) -> bytes | None:
            piece, self.rest = self.rest[:count], self.rest[count:]
            return piece or None

    Parser(Silent()).do_read()
    (record,) = caplog.records
    assert "%(x)s" in record.getMessage()
    assert record.getMessage().isprintable()


@pytest.mark.parametrize("text", [b"\x1b[31m", b"1,1,1,1,\r\n\x07", "\u202e,1,1,1,1".encode(), b"%s%n,1,1,1,1"])
def test_control_characters_of_filter_texts_are_escaped(text: bytes) -> None:
    """The message about a filter that does not parse shows no control characters; the packet is ignored."""
    parser = Parser(keeper := LogKeeper())
    keeper.rest = header(PacketType.FILTER_FILTER, len(text) + 1) + text + b"\0"
    parser.do_read()
    assert [level for level, _ in keeper.messages] == [LogLevel.ERROR]
    assert keeper.seen == []


# ---------------------------------------------------------------- the end of the stream


@quick
@given(hostile_streams(), roles)
def test_the_end_of_the_stream_comes_after_everything_else(stream: tuple[bytes, int], host: bool) -> None:
    """b"" gives ConnectionClosed once all packets and errors before it were given."""
    feeder = Feeder()
    feeder.pieces = iter((stream[0],))
    feeder.closed = True
    parser = Parser(feeder, usb_host=host, capabilities=[bit for bit in range(8) if stream[1] >> bit & 1])
    open_end = Feeder()
    open_end.pieces = iter((stream[0],))
    other = Parser(open_end, usb_host=host, capabilities=[bit for bit in range(8) if stream[1] >> bit & 1])
    for one, its_parser in ((feeder, parser), (open_end, other)):
        while True:
            try:
                its_parser.do_read()
                break
            except RemoteProtocolError as error:
                one.seen.append(error.reason)
            except ConnectionClosed:
                assert one.closed
                break
    assert feeder.seen == open_end.seen
    with pytest.raises(ConnectionClosed):
        parser.do_read()


def test_an_error_does_not_hide_what_came_before_and_after() -> None:
    """Good, bad, good in one piece: the good ones arrive, the error comes between them."""
    feeder = Feeder()
    good = [struct.pack("<IIIBBHI", 101, 8, n, 0x81, 0, 0, 0) for n in range(2)]
    feeder.rest = good[0] + header(0xDEAD, 5) + b"xxxxx" + good[1]
    parser = Parser(feeder)
    with pytest.raises(RemoteProtocolError) as caught:
        parser.do_read()
    assert (caught.value.packet_type, caught.value.reason) == (0xDEAD, "bad_type")
    assert feeder.seen == [BulkPacket(id=0, endpoint=0x81)]
    parser.do_read()
    assert feeder.seen[1:] == [BulkPacket(id=1, endpoint=0x81)]
