"""What must hold for any input at all. Shared by the fuzz targets and by tests/test_hostile.py.

Each function takes arbitrary bytes and raises AssertionError, or whatever escaped, when an invariant is broken;
fuzz/README.md lists them.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from usbredir import filter as usbfilter
from usbredir.errors import ConnectionClosed, FilterSyntaxError, RemoteProtocolError, StateError
from usbredir.packets import DeviceDisconnectAck, Hello, Packet
from usbredir.parser import LogLevel, Parser, ParserCallbacks

__all__ = [
    "Feeder",
    "check_filter",
    "check_parser",
    "check_stream",
    "check_unserialize",
    "hello_bytes",
    "read_everything",
]

TRUSTED = 1024 * 1024
"""Bytes the parser may ask for without having received anything like it."""


class Feeder(ParserCallbacks):
    """Feeds a stream in pieces and keeps what comes out, checking each item on the way."""

    def __init__(self) -> None:
        self.pieces: Iterator[bytes] = iter(())
        self.rest = b""
        self.received = 0
        self.seen: list[Packet | str] = []
        self.output = bytearray()
        self.closed = False

    def log(self, level: LogLevel, message: str) -> None:
        assert message.isprintable(), f"control characters in a log message: {message!r}"

    def read(self, count: int) -> bytes | None:
        assert 0 < count <= TRUSTED + 2 * self.received, f"asked for {count} bytes after {self.received}"
        if not self.rest:
            try:
                self.rest = next(self.pieces)
            except StopIteration:
                return b"" if self.closed else None
            if not self.rest:
                return None
        piece, self.rest = self.rest[:count], self.rest[count:]
        self.received += len(piece)
        return piece

    def write(self, data: memoryview) -> int:
        self.output += data
        return len(data)

    def packet_received(self, packet: Packet) -> None:
        text = repr(packet)
        assert text.isprintable(), f"control characters in a repr: {text!r}"
        assert packet == packet.replace()
        self.seen.append(packet)


def hello_bytes(capabilities: int, version: bytes = b"fuzz") -> bytes:
    """A hello as it travels, announcing a capability word."""
    return struct.pack("<III64sI", 0, 68, 0, version, capabilities)


def read_everything(parser: Parser, feeder: Feeder) -> None:
    """Read until nothing is left. Bad packets are kept as text; any other exception is a finding."""
    most = feeder.received + 16  # a bad packet needs a header of its own
    errors = 0
    while True:
        try:
            parser.do_read()
        except RemoteProtocolError as error:
            _check_message(error, error.reason)
            feeder.seen.append(f"{error.reason} {error.packet_type}")
            errors += 1
            assert errors * 12 <= feeder.received + most, "errors without bytes"
            continue
        except ConnectionClosed:
            assert feeder.closed
            return
        if not feeder.rest and (feeder.closed or not _more(feeder)):
            return


def _check_message(error: Exception, reason: str) -> None:
    assert reason, "an error without its key"
    assert str(error).isprintable(), f"control characters in a message: {error}"


def _check_position(error: FilterSyntaxError, text: str) -> None:
    assert 0 <= error.position <= len(text)
    assert str(error).isprintable(), f"control characters in a message: {error}"


def _more(feeder: Feeder) -> bool:
    try:
        feeder.rest = next(feeder.pieces)
    except StopIteration:
        return False
    return True


def _pieces(stream: bytes, size: int) -> Iterator[bytes]:
    for start in range(0, len(stream), size):
        yield stream[start : start + size]
        yield b""  # would block


def _parser(feeder: Feeder, *, host: bool, own: int, send_hello: bool = True) -> Parser:
    return Parser(
        feeder, usb_host=host, capabilities=[bit for bit in range(32) if own >> bit & 1], send_hello=send_hello
    )


def check_parser(data: bytes, *, host: bool) -> None:
    """Any bytes: the first three choose capabilities and piece size, the rest is what the peer sends."""
    own, peer, size = data[:3].ljust(3, b"\0")
    stream = data[3:]
    if peer:  # 0: the input has to contain its own hello
        stream = hello_bytes(peer) + stream
    check_stream(stream, host=host, own=own, size=1 + size)


def check_stream(stream: bytes, *, host: bool, own: int, size: int) -> None:
    """A stream gives the same packets and errors however it is cut, and each packet can be sent on."""
    whole, pieces = Feeder(), Feeder()
    parser = _parser(whole, host=host, own=own)
    whole.pieces = iter((stream,))
    read_everything(parser, whole)
    assert whole.received == len(stream)

    other = _parser(pieces, host=host, own=own)
    pieces.pieces = _pieces(stream, size)
    read_everything(other, pieces)
    assert pieces.seen == whole.seen, "the result depends on how the stream is cut"

    state = parser.serialize()
    assert state == other.serialize()
    _check_migration(state, host=host, own=own)
    _check_sending_on(whole.seen, host=host, own=own)
    parser.do_write()
    assert parser.has_data_to_write() == parser.buffered_output_size() == 0

    whole.closed = True
    read_everything(parser, whole)


def _check_migration(state: bytes, *, host: bool, own: int) -> None:
    """A state can be loaded, and is then the same."""
    heir = _parser(Feeder(), host=host, own=own, send_hello=False)
    try:
        heir.unserialize(state)
    except StateError as error:
        # As in the original: half a header that already announces too much is refused before it is complete.
        if error.reason != "packet_too_large":
            raise
        return
    assert heir.serialize() == state


def _check_sending_on(seen: list[Packet | str], *, host: bool, own: int) -> None:
    """Who received a packet can send it on: a parser in the sender's place takes it, and it arrives unchanged."""
    there, here = Feeder(), Feeder()
    receiver = _parser(here, host=host, own=own)
    sender: Parser | None = None
    for packet in seen:
        if isinstance(packet, Hello):
            mask = sum(1 << capability for capability in packet.capabilities)
            sender = _parser(there, host=not host, own=mask)
            receiver.do_write()
            there.pieces, here.pieces = iter((bytes(here.output),)), iter((hello_bytes(mask),))
            sender.do_read()
            receiver.do_read()
            sender.do_write()
            there.output.clear()
            if receiver.have_capability(5) and not sender.have_capability(5):
                return  # cannot happen; a guard for the comparison below
            # A guest announces capability 3 whether asked to or not; layouts do not depend on it.
        elif sender is not None and isinstance(packet, Packet) and not isinstance(packet, DeviceDisconnectAck):
            sender.send(packet)
            sender.do_write()
            here.seen.clear()
            here.pieces = iter((bytes(there.output),))
            there.output.clear()
            receiver.do_read()
            assert here.seen == [packet if packet.declaration.carries_id else packet.replace(id=0)]


def check_unserialize(data: bytes) -> None:
    """Any bytes as a migration state: StateError and an unchanged parser, or a parser that works."""
    flags, rest = data[:1].ljust(1, b"\0")[0], data[1:]
    feeder = Feeder()
    parser = _parser(feeder, host=bool(flags & 1), own=0xFF if flags & 2 else flags, send_hello=bool(flags & 4))
    before: tuple[bytes, int, int] | None
    before = parser.serialize(), parser.has_data_to_write(), parser.buffered_output_size()
    try:
        parser.unserialize(rest)
    except StateError as error:
        _check_message(error, error.reason)
    else:
        before = None
    if before is not None:
        assert (parser.serialize(), parser.has_data_to_write(), parser.buffered_output_size()) == before
        return
    _check_migration(parser.serialize(), host=bool(flags & 1), own=0xFF if flags & 2 else flags)
    feeder.pieces = iter((hello_bytes(0xFF), rest))
    read_everything(parser, feeder)
    parser.do_write()
    assert parser.has_data_to_write() == 0


def check_filter(data: bytes) -> None:
    """Any bytes as a filter text: FilterSyntaxError, or rules that survive the way to text and back."""
    flags, text = data[:1].ljust(1, b"\0")[0], data[1:].decode("utf-8" if data[:1] > b"\x7f" else "latin-1", "replace")
    token_sep, rule_sep = ((",", "|"), (":", "|"), (",;", " \n"), (" ", ","))[flags & 3]
    try:
        rules = usbfilter.parse(text, token_sep, rule_sep)
    except FilterSyntaxError as error:
        _check_position(error, text)
        return
    again = usbfilter.format(rules, token_sep, rule_sep)
    if "-" not in token_sep + rule_sep:
        assert usbfilter.parse(again, token_sep, rule_sep) == rules
    for device_class, interfaces in ((0, []), (9, [(9, 0, 0)]), (0xEF, [(3, 0, 0), (8, 6, 80)])):
        device = usbfilter.DeviceIds(device_class, 0, 0, 0x1234, 0x5678, 0x0100, interfaces)
        for default_allow in (False, True):
            result = usbfilter.check(rules, device, default_allow=default_allow)
            assert isinstance(result, usbfilter.FilterResult)
