"""A serial port that every operating system has a driver for (CDC-ACM).

::

    port = SerialPort()
    port.write(b"login: ")
    name = port.read_until(b"\\n", timeout=10)

    class Echo(SerialPort):
        def received(self, data):
            return self.write(data)

Source: USB Class Definitions for Communication Devices (CDC) 1.2, and its Subclass for PSTN Devices 1.2 ("PSTN" below).
"""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Callable
from enum import IntEnum
from typing import NamedTuple

from ..proto import Speed
from .base import VirtualDevice
from .control import NAK, STALL, Answer, Payload, Setup, class_in, class_out
from .declare import association, bulk_in, bulk_out, interface, interrupt_in

__all__ = ["ENDLESS_BREAK", "LineCoding", "Parity", "SerialPort"]

DATA_OUT, DATA_IN, NOTIFICATIONS = 0x01, 0x81, 0x82
"""The endpoints."""
COMMUNICATIONS, ABSTRACT_CONTROL_MODEL, AT_COMMANDS = 0x02, 0x02, 0x01
DATA = 0x0A
CONTROL_INTERFACE, DATA_INTERFACE = 0, 1

FUNCTIONS = (
    bytes.fromhex("05 24 00 2001"),  # CDC 1.20
    bytes([5, 0x24, 1, 0, DATA_INTERFACE]),  # no call management
    bytes.fromhex("04 24 02 06"),  # line coding, control lines and their states; breaks
    bytes([5, 0x24, 6, CONTROL_INTERFACE, DATA_INTERFACE]),  # these two are one
)
"""Functional descriptors. Source: CDC, 5.2.3; PSTN, 5.3."""
DTR, RTS = 1, 2
"""Bits of SET_CONTROL_LINE_STATE."""
CARRIER, DSR, RING = 1, 2, 8
"""Bits of the notification SERIAL_STATE. Source: PSTN, table 31."""
ENDLESS_BREAK = 0xFFFF
"""Milliseconds of a break that lasts until it is ended."""


class Parity(IntEnum):
    """The parity bit."""

    NONE = 0
    ODD = 1
    EVEN = 2
    MARK = 3
    SPACE = 4


_STOP_BITS = (1.0, 1.5, 2.0)
_DATA_BITS = (5, 6, 7, 8, 16)
_LINE_CODING = struct.Struct("<IBBB")


class LineCoding(NamedTuple):
    """How bytes are told on the line. Source: PSTN, table 17.

    baud_rate: bits per second. stop_bits: 1, 1.5 or 2. data_bits: 5, 6, 7, 8 or 16.
    """

    baud_rate: int = 9600
    stop_bits: float = 1.0
    parity: Parity = Parity.NONE
    data_bits: int = 8


class SerialPort(VirtualDevice):
    """A serial port. The guest's end is a terminal, such as /dev/ttyACM0; this end is the object.

    Use it with :meth:`read` and :meth:`write`, or let a subclass override :meth:`received`. Both ways data are held
    back, not lost, when the other end does not take them: at most ``buffer_limit`` bytes, and one transfer of the
    guest, wait here.

    Args:
        serial: serial number, None for none.
        speed: full, high (default) or super.
        clock: seconds, monotonic.

    Raises ValueError at low speed, which has no bulk endpoints.

    Threads: methods and properties from any; hooks run in the thread that handles events.
    """

    # The ids of Linux's own serial gadget, which every operating system has met.
    vendor_id, product_id, product = 0x0525, 0xA4A7, "Serial Port"
    interfaces = (
        association(
            interface(
                COMMUNICATIONS,
                interrupt_in(NOTIFICATIONS, 16, period=0.016),
                subclass=ABSTRACT_CONTROL_MODEL,
                protocol=AT_COMMANDS,
                extra=FUNCTIONS,
            ),
            interface(DATA, bulk_out(DATA_OUT), bulk_in(DATA_IN)),
        ),
    )

    buffer_limit: int = 65536
    """Bytes that wait in each direction."""

    def __init__(
        self,
        *,
        serial: str | None = None,
        speed: Speed = Speed.HIGH,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.serial = serial
        self._changed = threading.Condition()  # guards the buffers; told of bytes, of room, of lines and of the end
        self._incoming = bytearray()  # from the guest
        self._outgoing = bytearray()  # to the guest
        self._offered: Payload | None = None  # the OUT transfer of which a part was taken
        self._taken = 0  # how much of it
        self._lines = 0
        self._serial_state = 0
        self._line_coding = LineCoding()
        self._over = False
        super().__init__(speed=speed, clock=clock)

    # ------------------------------------------------------------ data

    def write(self, data: Payload, timeout: float | None = 0.0) -> int:
        """Queue bytes for the guest; how many there was room for within *timeout* seconds (None: wait for ever).

        They wait until a guest fetches them, or for a reset, which forgets them. Threads: any; in a hook, and where
        the same thread handles events, without waiting.
        """
        view, taken = memoryview(data), 0
        limit = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            while taken < len(view) and self._wait_for_room(limit):
                piece = view[taken : taken + self._room()]
                self._outgoing += piece
                taken += len(piece)
                self.notify()
        return taken

    def _room(self) -> int:
        return 0 if self._over else self.buffer_limit - len(self._outgoing)

    def _wait_for_room(self, limit: float | None) -> bool:
        """Whether there is room for bytes to the guest before the time *limit*. The condition is held."""
        left = None if limit is None else limit - time.monotonic()
        self._changed.wait_for(lambda: self._over or self._room(), left)
        return self._room() > 0

    def read(self, size: int, timeout: float | None = None) -> bytes:
        """What the guest wrote: *size* bytes, or those that have come when the time is over or the device gone.

        At most ``buffer_limit`` bytes at a time; *timeout* is in seconds, None waits for ever. Nothing comes here when
        :meth:`received` is overridden. Raises ValueError for a negative *size*. Threads: any.
        """
        if size < 0:
            raise ValueError(f"cannot read {size} bytes")
        return self._read(lambda: size if len(self._incoming) >= size else None, timeout)

    def read_until(self, end: bytes, timeout: float | None = None) -> bytes:
        """What the guest wrote, up to and including *end*. Otherwise as :meth:`read`.

        Raises ValueError for an empty *end*.
        """
        if not end:
            raise ValueError("read_until needs to know where to end")
        return self._read(lambda: self._incoming.find(end) + len(end) if end in self._incoming else None, timeout)

    def _read(self, wanted: Callable[[], int | None], timeout: float | None) -> bytes:
        """*wanted*: how many bytes to give; None: more have to come, while there is room."""
        with self._changed:
            self._changed.wait_for(
                lambda: wanted() is not None or len(self._incoming) >= self.buffer_limit or self._over, timeout
            )
            data = bytes(self._incoming[: wanted()])
            del self._incoming[: len(data)]
        if data:
            self.notify()  # there is room for more
        return data

    # ------------------------------------------------------------ lines

    @property
    def line_coding(self) -> LineCoding:
        """What the guest has set, 9600 baud 8N1 until then."""
        return self._line_coding

    @property
    def dtr(self) -> bool:
        """Data terminal ready: as a rule, a program of the guest has opened the port."""
        return bool(self._lines & DTR)

    @property
    def rts(self) -> bool:
        """Request to send."""
        return bool(self._lines & RTS)

    def wait_until_open(self, timeout: float | None = None) -> bool:
        """Wait for :attr:`dtr`; whether it came within *timeout* seconds. Threads: any."""
        with self._changed:
            self._changed.wait_for(lambda: self.dtr or self._over, timeout)
            return self.dtr

    def set_serial_state(
        self, *, carrier: bool | None = None, dsr: bool | None = None, ring: bool | None = None
    ) -> bool:
        """Tell the guest of modem lines; None leaves one as it is.

        False: the guest is not told, because the device is gone or because a thousand changes wait for it. It is told
        again after a reset. Threads: any.
        """
        with self._changed:
            for bit, on in ((CARRIER, carrier), (DSR, dsr), (RING, ring)):
                if on is not None:
                    self._serial_state = self._serial_state & ~bit | bit * on
            return self._tell_serial_state()

    def _tell_serial_state(self) -> bool:
        header = struct.pack("<BBHHH", 0xA1, 0x20, 0, CONTROL_INTERFACE, 2)
        return self.send(NOTIFICATIONS, header + struct.pack("<H", self._serial_state))

    # ------------------------------------------------------------ hooks

    def received(self, data: bytes) -> int | None:
        """The guest wrote bytes. How many are taken, None for all.

        The rest is offered again at the next progress, and after :meth:`notify`; meanwhile the guest waits. By default
        they are kept for :meth:`read`.
        """
        with self._changed:
            taken = min(len(data), self.buffer_limit - len(self._incoming))
            self._incoming += data[:taken]
            self._changed.notify_all()
        return taken

    def line_coding_changed(self, coding: LineCoding) -> None:
        """The guest set baud rate and format."""

    def control_lines_changed(self) -> None:
        """The guest, or a reset, changed :attr:`dtr` or :attr:`rts`."""

    def break_received(self, milliseconds: int) -> None:
        """A break of so many milliseconds. With :data:`ENDLESS_BREAK` it lasts until this is called with 0."""

    # ------------------------------------------------------------ hooks of VirtualDevice

    def began(self) -> None:
        """Forget what the guest has not fetched; keep what it sent."""
        with self._changed:
            del self._outgoing[:]
            self._changed.notify_all()
            if self._serial_state:
                self._tell_serial_state()
        self._offered = None
        self._set_lines(0)

    def data_in(self, endpoint: int, length: int) -> Payload | Answer:
        """Bytes or a notification for the guest."""
        if endpoint == NOTIFICATIONS:
            return super().data_in(endpoint, length)
        with self._changed:
            data = bytes(self._outgoing[:length])
            del self._outgoing[:length]
            self._changed.notify_all()  # there is room
        return data or NAK

    def data_out(self, endpoint: int, data: Payload) -> Answer | None:
        """Bytes of the guest; a transfer completes when all of it was taken."""
        # The same object again: the transfer of which a part was taken. Another one may be there if that was cancelled.
        start = self._taken if data is self._offered else 0
        rest = bytes(data[start:])
        taken = self.received(rest) if rest else 0
        if taken is None or taken == len(rest):
            self._offered = None
            return None
        if not 0 <= taken < len(rest):
            raise ValueError(f"received() took {taken} of {len(rest)} bytes")
        self._offered, self._taken = data, start + taken
        return NAK

    def unplug(self) -> None:
        """Take the device away; who waits in :meth:`read` gets what is there."""
        super().unplug()
        self._end_waiting()

    def close(self) -> None:
        """Close the device; who waits in :meth:`read` gets what is there. Idempotent."""
        super().close()
        self._end_waiting()

    def _end_waiting(self) -> None:
        with self._changed:
            self._over = True
            self._changed.notify_all()

    # ------------------------------------------------------------ requests (PSTN, 6.3)

    @class_out(0x20)
    def _set_line_coding(self, setup: Setup, data: bytes) -> Answer | None:
        if len(data) != _LINE_CODING.size:
            return STALL
        baud_rate, stop, parity, data_bits = _LINE_CODING.unpack(data)
        if stop >= len(_STOP_BITS) or parity > max(Parity) or data_bits not in _DATA_BITS:
            return STALL
        self._line_coding = LineCoding(baud_rate, _STOP_BITS[stop], Parity(parity), data_bits)
        self.line_coding_changed(self._line_coding)
        return None

    @class_in(0x21)
    def _get_line_coding(self, setup: Setup) -> bytes:
        coding = self._line_coding
        stop = _STOP_BITS.index(coding.stop_bits)
        return _LINE_CODING.pack(coding.baud_rate, stop, coding.parity, coding.data_bits)

    @class_out(0x22)
    def _set_control_line_state(self, setup: Setup, data: bytes) -> None:
        self._set_lines(setup.value & (DTR | RTS))

    def _set_lines(self, lines: int) -> None:
        with self._changed:
            changed, self._lines = lines != self._lines, lines
            self._changed.notify_all()
        if changed:
            self.control_lines_changed()

    @class_out(0x23)
    def _send_break(self, setup: Setup, data: bytes) -> None:
        self.break_received(setup.value)
