"""The protocol parser: packets in, packets out, over callbacks of the application.

:class:`Parser` joins three parts: the decoder of what arrives (``usbredir._framing``), the queue of what is to be
written (``usbredir._queue``) and the application's :class:`ParserCallbacks`. It sends two packets by itself: hello,
and the acknowledgement of a device_disconnect.

Source: docs/protocol.md; the original's usbredirparser.h.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable
from functools import partial
from types import TracebackType
from typing import NoReturn

from . import _state, capabilities
from ._framing import REASONS, Decoder, packet_name
from ._layout import REPLY, Declaration, Reject, compile_sender
from ._queue import OutputQueue
from .capabilities import ALL
from .errors import (
    ConnectionClosed,
    FilterSyntaxError,
    LocalProtocolError,
    ProtocolError,
    QueueFullError,
    RemoteProtocolError,
    StateError,
)
from .limits import Limits
from .locking import Guard, LockCallbacks
from .packets import DeviceDisconnectAck, Hello, Packet
from .proto import Capability, Direction, PacketType

__all__ = [
    "ALL",
    "VERSION",
    "ConnectionClosed",
    "Limits",
    "LocalProtocolError",
    "LogLevel",
    "Parser",
    "ParserCallbacks",
    "ProtocolError",
    "QueueFullError",
    "RemoteProtocolError",
    "StateError",
    "StreamCallbacks",
    "escape",
]

VERSION = "usbredir-python 0.1.0"
"""The text that hello carries unless the application chooses another."""

BY_ITSELF = (PacketType.HELLO, PacketType.DEVICE_DISCONNECT_ACK)
"""Packets that the parser sends, never the application."""


SPARE = 256 * 1024
"""Bytes that are allocated at once for ``readinto``."""
LEAST_SPARE = 16 * 1024
"""With fewer bytes left new memory is allocated, unless fewer are wanted."""


class LogLevel(enum.IntEnum):
    """Levels of log messages, as in the original."""

    NONE = 0
    ERROR = 1
    WARNING = 2
    INFO = 3
    DEBUG = 4
    DEBUG_DATA = 5


LOGGING_LEVELS = {
    LogLevel.NONE: 0,
    LogLevel.ERROR: 40,
    LogLevel.WARNING: 30,
    LogLevel.INFO: 20,
    LogLevel.DEBUG: 10,
    LogLevel.DEBUG_DATA: 5,
}
"""Level of the ``logging`` module for each :class:`LogLevel`, as numbers: importing it takes 10 ms."""


def escape(text: str) -> str:
    """Text from the peer, fit to be shown: control and other unprintable characters are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class StreamCallbacks:
    """What every end of a connection needs of the application: a log and a byte stream.

    Two optional methods are used when a subclass has them, looked up once, when the parser, host or guest is made:
    ``readinto(buffer: memoryview) -> int | None`` in place of :meth:`read`, and
    ``writev(buffers: Sequence[memoryview]) -> int | None`` in place of :meth:`write`, with many packets at once.

    Threads: read: the reading thread; write: one thread at a time; log: any. No lock of the output queue is
    held during any of them.
    """

    logger = "usbredir.parser"

    def log(self, level: LogLevel, message: str) -> None:
        """A message. Default: the logger named by the attribute *logger*."""
        import logging  # takes 10 ms, and most applications have a log of their own

        logging.getLogger(self.logger).log(LOGGING_LEVELS[level], "%s", message)

    def read(self, count: int) -> bytes | bytearray | memoryview | None:
        """Up to *count* bytes; None: nothing there now; b"": end of the stream. An OSError passes through."""
        raise NotImplementedError("override read() to receive")

    def write(self, data: memoryview) -> int | None:
        """Take bytes, return how many; 0 or None: none now. An OSError passes through."""
        raise NotImplementedError("override write() to send")


class ParserCallbacks(StreamCallbacks):
    """What an application provides to a :class:`Parser`; override what you need.

    Threads: packet_received: the thread in ``do_read``, no lock held.
    """

    def packet_received(self, packet: Packet) -> None:
        """A packet arrived. May send; an exception passes through ``do_read``."""


class Parser:
    """One end of a usbredir connection.

    Args:
        callbacks: the application.
        version: text for hello, cut to 63 bytes.
        capabilities: what to announce. Numbers above 31 are dropped; a guest always announces DEVICE_DISCONNECT_ACK;
            BULK_STREAMS is dropped where EP_INFO_MAX_PACKET_SIZE is missing.
        usb_host: this end has the device; otherwise it is the guest.
        write_owns_buffer: ``write`` takes a buffer as a whole or not at all.
        send_hello: queue hello now. False for a parser that will :meth:`unserialize`.
        locks: thread-safety on; see docs/threads.md.
        limits: what the peer may make us hold.

    Threads: each method tells. Without *locks*: one thread for everything.
    """

    def __init__(
        self,
        callbacks: ParserCallbacks,
        *,
        version: str = VERSION,
        capabilities: Iterable[int] = ALL,
        usb_host: bool = False,
        write_owns_buffer: bool = False,
        send_hello: bool = True,
        locks: LockCallbacks | None = None,
        limits: Limits = Limits(),  # noqa: B008 - immutable
    ) -> None:
        self._callbacks = callbacks
        self._limits = limits
        self._sends = Direction.HOST_TO_GUEST if usb_host else Direction.GUEST_TO_HOST
        self._own = self._own_capabilities(capabilities, usb_host)
        self._peer: int | None = None
        self._reading = False
        self._readinto: Callable[[memoryview], int | None] | None = getattr(callbacks, "readinto", None)
        self._spare = memoryview(b"")
        self._guard = Guard(locks)
        self._queue = OutputQueue(
            self._guard,
            limits,
            callbacks.write,
            getattr(callbacks, "writev", None),
            owned=write_owns_buffer,
        )
        self._waiting = self._queue.waiting
        self._push = self._queue.push
        receives = Direction.GUEST_TO_HOST if usb_host else Direction.HOST_TO_GUEST
        self._decoder = Decoder(receives, limits, self._special_packet)
        self._settle()
        if send_hello:
            self._queue_packet(Hello(version=version, capabilities=members(self._own)))

    def _own_capabilities(self, wanted: Iterable[int], usb_host: bool) -> int:
        mask = capabilities.mask_of(wanted)
        if not usb_host:
            mask |= 1 << Capability.DEVICE_DISCONNECT_ACK
        return self._fix_up(mask, "our own")

    def _fix_up(self, mask: int, whose: str) -> int:
        fixed = capabilities.fix_up(mask)
        if fixed != mask:
            self._callbacks.log(
                LogLevel.ERROR, f"{whose} capabilities have bulk_streams without ep_info_max_packet_size: dropped"
            )
        return fixed

    def _settle(self) -> None:
        """Choose the layouts that the two capability sets settle."""
        self._decoder.set_capabilities(self._own, self._peer or 0)
        # class -> what sends its packets, filled on first use; a new table each time: threads see one or the other
        self._senders: dict[type[Packet], Callable[[Packet], None]] = {}

    # ------------------------------------------------------------ reading

    def do_read(self) -> None:
        """Read and deliver packets until ``read`` would block.

        Raises: RemoteProtocolError for a bad packet (good ones before it were delivered; call again to go on),
        ConnectionClosed at the end of the stream, ValueError when ``read`` gives more than it was asked for,
        LocalProtocolError when called from ``packet_received``, and what the callbacks raise.
        Threads: one caller at a time.
        """
        if self._reading:
            raise LocalProtocolError("do_read was called from inside packet_received: return from it first")
        self._reading = True
        decoder, deliver = self._decoder, self._callbacks.packet_received
        try:
            while True:
                decoder.parse(deliver)
                count = decoder.wanted()
                piece = self._read_into(count) if self._readinto is not None else self._callbacks.read(count)
                if piece is None:
                    return
                if piece.__class__ is not bytes or not 0 < len(piece) <= count:
                    piece = self._checked(piece, count)
                decoder.take(piece)
        finally:
            self._reading = False

    def _checked(self, piece: bytes | bytearray | memoryview, count: int) -> bytes | memoryview:
        """What was read, if it may be used."""
        if self._readinto is None or isinstance(piece, bytearray):
            piece = bytes(piece)  # the application may use its buffer again
        if not piece:
            raise ConnectionClosed("the peer closed the connection")
        if len(piece) > count:
            raise ValueError(f"read() returned {len(piece)} bytes although at most {count} were asked for")
        return piece

    def _read_into(self, count: int) -> memoryview | None:
        """Read into fresh memory that no later read overwrites, so that large payloads are copied only once."""
        assert self._readinto is not None
        if len(self._spare) < min(count, LEAST_SPARE):
            self._spare = memoryview(bytearray(SPARE))
        buffer = self._spare[:count]
        received = self._readinto(buffer)
        if received is None:
            return None
        if not 0 <= received <= len(buffer):
            raise ValueError(f"readinto() returned {received} although the buffer has {len(buffer)} bytes")
        self._spare = self._spare[received:]
        return buffer[:received]

    def _special_packet(self, packet_type: int, make: Callable[[], Packet]) -> None:
        """Packets that change the parser's own state."""
        if packet_type == PacketType.HELLO:
            self._hello_received(make())
        elif packet_type == PacketType.DEVICE_DISCONNECT:
            try:
                self._callbacks.packet_received(make())
            finally:  # an exception of the application does not change what the peer waits for
                if self.peer_has_capability(Capability.DEVICE_DISCONNECT_ACK):
                    self._queue_packet(DeviceDisconnectAck())
        else:
            try:
                packet = make()
            except FilterSyntaxError as error:
                self._callbacks.log(LogLevel.ERROR, f"the peer's filter does not parse, ignored: {escape(str(error))}")
                return
            self._callbacks.packet_received(packet)

    def _hello_received(self, packet: Packet) -> None:
        assert isinstance(packet, Hello)
        if self._peer is not None:
            self._callbacks.log(LogLevel.ERROR, "a second hello from the peer, ignored")
            return
        self._peer = self._fix_up(capabilities.mask_of(packet.capabilities), "the peer's")
        self._settle()
        width = 64 if capabilities.has(self._own & self._peer, Capability.IDS_64BITS) else 32
        self._callbacks.log(LogLevel.INFO, f"peer version: {escape(packet.version)}, using {width}-bit ids")
        self._callbacks.packet_received(packet.replace(capabilities=members(self._peer)))

    # ------------------------------------------------------------ writing

    def send(self, packet: Packet) -> None:
        """Encode *packet* and queue it; :meth:`do_write` writes it.

        ``bytes`` are kept by reference, other buffers are copied. Raises LocalProtocolError (nothing is queued) if the
        role, the capabilities or a field's width forbid the packet, QueueFullError at a limit.
        Threads: any number of callers.
        """
        send = self._senders.get(packet.__class__) or self._new_sender(packet)
        send(packet)

    def sender(self, packet_class: type[Packet], *given: str) -> Callable[..., None]:
        """A function that sends packets of one class without making them: it is called with the values *given* names.

        Other values have their defaults. Data is not copied: it has to stay as it is. The function raises as
        :meth:`send` does. It is of use until the next hello. Threads: any number of callers.
        """
        return self._sender(packet_class, given)

    def replier(self, packet_class: type[Packet]) -> Callable[..., None]:
        """A :meth:`sender` of replies: called with the request, and what replaces its status, length and data.

        Threads: any number of callers.
        """
        return self._sender(packet_class, REPLY)

    def _sender(self, packet_class: type[Packet], given: tuple[str, ...]) -> Callable[..., None]:
        return self._compile(packet_class.declaration, given)(self._push, partial(self._refuse, packet_class))

    def _new_sender(self, packet: Packet) -> Callable[[Packet], None]:
        """What sends packets of a type that is sent for the first time."""
        if not isinstance(packet, Packet) or not hasattr(packet, "declaration"):
            raise TypeError(f"not a packet of one of the 33 types: {packet!r}")
        senders = self._senders
        declaration = packet.declaration
        if packet.packet_type in BY_ITSELF:
            raise LocalProtocolError(
                f"{declaration.name} is sent by the parser itself", packet_type=packet.packet_type, reason="by_itself"
            )
        if not declaration.may_travel(self._sends):
            raise self._refused(packet, f"it does not travel {self._sends.value}", "send_type_not_allowed")
        sender = senders[type(packet)] = self._sender(type(packet), ("packet",))
        return sender

    def _compile(self, declaration: Declaration, given: tuple[str, ...]) -> Callable[..., Callable[..., None]]:
        peer = self._peer or 0
        both = self._own & peer
        wide_ids = capabilities.has(both, Capability.IDS_64BITS)
        return compile_sender(declaration, wide_ids, both, peer, self._sends, self._limits.max_bulk, given)

    def _queue_packet(self, packet: Packet) -> None:
        """Queue a packet of the parser's own: the peer waits for it, so no limit holds it back."""
        send = self._compile(packet.declaration, ("packet",))
        send(self._queue.push_unlimited, partial(self._refuse, packet))(packet)

    def _refuse(self, packet: object, error: Exception) -> NoReturn:
        """Raise what a caller is to see of an error while encoding."""
        if isinstance(error, Reject):
            raise self._refused(packet, REASONS[error.reason], error.reason) from None
        raise self._refused(packet, str(error), "field_range") from error

    def _refused(self, packet: object, why: str, reason: str) -> LocalProtocolError:
        packet_type: int | None = getattr(packet, "packet_type", None)
        name = type(packet).__name__ if packet_type is None else packet_name(packet_type)
        return LocalProtocolError(f"{name} cannot be sent: {why}", packet_type=packet_type, reason=reason)

    def do_write(self) -> None:
        """Write until the queue is empty or ``write`` would block.

        After an exception of ``write`` nothing is lost; the next call goes on where it stopped. ValueError when
        ``write`` reports a count that cannot be. Threads: any number of callers, one of them writes; when the last
        one returns, nothing is left unless ``write`` would block or failed. From inside ``write``: returns at once.
        """
        self._queue.flush()

    def has_data_to_write(self) -> int:
        """Packets queued, a partly written one included. Threads: any number of callers."""
        return len(self._waiting)

    def watch_backlog(self) -> Callable[[int, int], bool]:
        """``exceeds(packets, bytes)``: whether more than so many are queued. For one that asks at every packet.

        Bytes are counted from now on, which takes time with each packet. To be called before :meth:`sender` and
        :meth:`replier`, whose packets would not be counted.
        Threads: one caller, nothing else going on; the function: any number of callers.
        """
        self._queue.count()
        self._push = self._queue.push
        self._senders.clear()
        return self._queue.exceeds

    def buffered_output_size(self) -> int:
        """Bytes queued, a partly written packet counted whole. Threads: any number of callers.

        Without queue limits and :meth:`watch_backlog` it takes 10 ns for each packet that is queued.
        """
        return self._queue.size

    # ------------------------------------------------------------ capabilities

    def have_capability(self, capability: int) -> bool:
        """Whether we announce *capability*. Threads: any number of callers."""
        return self._has(self._own, capability)

    def peer_has_capability(self, capability: int) -> bool:
        """Whether the peer announced *capability*; False before its hello. Threads: any number of callers."""
        return self._has(self._peer or 0, capability)

    def have_peer_capabilities(self) -> bool:
        """Whether the peer's hello has come. Threads: any number of callers."""
        return self._peer is not None

    def _has(self, mask: int, capability: int) -> bool:
        if not 0 <= capability < capabilities.WORD_BITS:
            self._callbacks.log(LogLevel.ERROR, f"there is no capability number {capability}: they are 0 to 31")
            return False
        return capabilities.has(mask, capability)

    # ------------------------------------------------------------ migration

    def serialize(self) -> bytes:
        """The migration state, byte-compatible with the C library.

        Raises StateError when received packets were not parsed yet (inside ``packet_received``, or after a
        RemoteProtocolError): call :meth:`do_read` first. Threads: one caller, nothing else going on.
        """
        open_packet = None if self._reading else self._decoder.open_packet()
        if open_packet is None:
            raise StateError(
                "received packets are not parsed yet: call do_read until it returns, then serialize",
                reason="state_unparsed_packets",
            )
        return _state.pack(_state.State(self._own, self._peer, self._decoder.skip, *open_packet, self._queue.entries()))

    def unserialize(self, state: bytes) -> None:
        """Take over the situation of the parser that made *state*: for a new parser, made with ``send_hello=False``.

        Raises StateError, and is then unchanged. Threads: one caller, nothing else going on.
        """
        reader = _state.Reader(bytes(state))
        reader.check_magic()
        if self._reading or self._decoder.open_packet() != (b"", b"", b""):
            raise _state.state_error("state_not_pristine")
        reader.check_length()
        own = reader.capability_word(self._own)
        own = self._own if own is None else own
        if own & ~self._own:
            raise _state.state_error("state_source_has_extra_caps")
        peer = reader.capability_word(self._peer or 0)
        peer = self._peer if peer is None else peer
        skip = reader.number()
        decoder = Decoder(self._decoder.travel, self._limits, self._special_packet)
        decoder.set_capabilities(own, peer or 0)
        decoder.load(self._read_open_packet(reader, decoder), skip)
        queue = reader.queue()
        reader.finish()
        lacking, self._own, self._peer, self._decoder = self._own & ~own, own, peer, decoder
        self._queue.replace(queue)
        self._senders = {}
        if lacking:
            names = ", ".join(str(c) for c in sorted(members(lacking)))
            self._callbacks.log(LogLevel.WARNING, f"the migration source lacks capabilities that we have: {names}")

    def _read_open_packet(self, reader: _state.Reader, decoder: Decoder) -> bytes:
        header = reader.block(decoder.header_size)
        length = int.from_bytes(header[4:8].ljust(4, b"\0"), "little")
        if length > self._limits.max_packet:
            raise _state.state_error("packet_too_large")
        complete = len(header) == decoder.header_size
        if complete and decoder.header_problem(header):
            raise _state.state_error("state_header_invalid")
        size = decoder.type_header_size(header) if complete else 0
        type_header = reader.block(size)
        if complete and len(type_header) == size and length > size:
            return header + type_header + reader.block(length - size)
        # No data can have been received yet: what a state holds here all the same is dropped, as in C.
        reader.block(None if complete or not length else length)
        return header + type_header

    # ------------------------------------------------------------ the end

    def close(self) -> None:
        """Give the lock back. Idempotent; the parser must not be used afterwards. Threads: one caller."""
        self._guard.free()

    def __enter__(self) -> Parser:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None, /
    ) -> None:
        self.close()


def members(mask: int) -> frozenset[int]:
    """The set behind a capability word."""
    return capabilities.members_of(mask)
