"""A vendor-specific device for tests: loopback, sinks, sources and misbehaving endpoints.

The device is 1209:0001, release 0x1234. Configuration 1:

=========  =============================================================================================
interface  endpoints
=========  =============================================================================================
0          0x01 / 0x81 bulk loopback: an OUT transfer is a message; a too small IN transfer babbles; at super
           speed one loop for each of 16 streams
           0x02 bulk sink, 0x82 bulk source (a pattern that begins with an 8-byte transfer counter)
           0x03 interrupt sink, 0x83 interrupt source (an 8-byte counter, one per period)
           0x85 bulk IN that stalls; after its halt is cleared one transfer succeeds, then it stalls again
           0x86 bulk IN that never completes
1          alternate 1: 0x04 isochronous sink, 0x84 isochronous source (a pattern that begins with an 8-byte packet
           counter), 1023 bytes, one packet per period; alternate 2: the same with 3 x 1024 bytes
=========  =============================================================================================

Configuration 2: interface 0 with the loopback pair only.

Vendor requests: IN 0x01 pattern (value + i); OUT 0x02 stores, IN 0x03 fetches; IN 0x20 counters (8 x u64: iso-out
packets, iso-out bytes, sink bytes, interrupt-out packets, resets, cancelled, submitted, 0); OUT 0x10 unplugs the device
after *value* ms; OUT 0x11 halts endpoint *index*; OUT 0x12 and 0x13 set the interrupt and isochronous period in us.
"""

from __future__ import annotations

import struct
import time
from collections import defaultdict, deque
from collections.abc import Callable

from ..descriptors import max_packet_size
from ..device import Transfer
from ..proto import Speed
from .base import VirtualDevice
from .control import NAK, STALL, Answer, Payload, Setup, vendor_in, vendor_out
from .declare import bulk_in, bulk_out, configuration, interface, interrupt_in, interrupt_out, iso_in, iso_out

__all__ = ["LoopbackDevice"]

LOOP_OUT, LOOP_IN = 0x01, 0x81
SINK, SOURCE = 0x02, 0x82
INTERRUPT_SINK, INTERRUPT_SOURCE = 0x03, 0x83
ISO_OUT, ISO_IN = 0x04, 0x84
STALLING, SILENT = 0x85, 0x86

MAX_MESSAGES = 256
"""Messages that wait in the loopback, for each stream, before OUT transfers are held back."""
COUNTERS = ("iso_packets", "iso_bytes", "sink_bytes", "interrupts", "resets", "cancelled", "submitted")
PATTERN = bytes(range(256)) * 256

STREAMS = 16
WIDE = {Speed.FULL: 1023, Speed.HIGH: 3 * 1024, Speed.SUPER: 3 * 1024}
"""Bytes per interval of the second alternate setting."""


class LoopbackDevice(VirtualDevice):
    """The device of this module's description.

    Args:
        speed: full, high or super; high unless told otherwise.
        interrupt_period: seconds between two packets of the interrupt source; 0: as fast as they are asked for.
        iso_period: the same for the isochronous endpoints.
        serial: serial number.

    Raises ValueError at low speed, which has neither bulk nor isochronous endpoints.
    """

    vendor_id, product_id, device_version = 0x1209, 0x0001, 0x1234
    device_class = 0xFF
    product = "Loopback"

    _loop = bulk_out(LOOP_OUT, max_streams=STREAMS), bulk_in(LOOP_IN, max_streams=STREAMS)
    configurations = (
        configuration(
            interface(
                0xFF,
                *_loop,
                bulk_out(SINK, max_streams=STREAMS),
                bulk_in(SOURCE, max_streams=STREAMS),
                interrupt_out(INTERRUPT_SINK, 64, interval=4),
                interrupt_in(INTERRUPT_SOURCE, 64, interval=4),
                bulk_in(STALLING, max_streams=STREAMS),
                bulk_in(SILENT, max_streams=STREAMS),
            ),
            interface(0xFF),
            interface(0xFF, iso_out(ISO_OUT, 1023, interval=1), iso_in(ISO_IN, 1023, interval=1), alternate=1),
            interface(0xFF, iso_out(ISO_OUT, WIDE, interval=1), iso_in(ISO_IN, WIDE, interval=1), alternate=2),
        ),
        configuration(interface(0xFF, *_loop)),
    )

    def __init__(
        self,
        *,
        speed: Speed = Speed.HIGH,
        interrupt_period: float = 0.001,
        iso_period: float = 0.000125,
        serial: str = "LOOP0001",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.serial = serial
        self.usb_version = 0x0320 if speed is Speed.SUPER else 0x0200
        self._interrupt_period = interrupt_period
        self._iso_period = iso_period
        self.counters = dict.fromkeys(COUNTERS, 0)
        self.counters["resets"] = -1  # the start is none
        self._stored = b""
        super().__init__(speed=speed, clock=clock)

    # ------------------------------------------------------------ hooks

    def began(self) -> None:
        """Counters and what is stored stay, everything else starts anew."""
        self.counters["resets"] += 1
        self._messages: defaultdict[int, deque[bytes]] = defaultdict(deque)  # by stream
        self._sourced = 0
        self._iso_sourced = 0
        self._interrupts = 0
        self._interrupt_due = False
        self._interrupt_timer = False
        self._may_succeed = False

    def submit(self, transfer: Transfer) -> int:
        """Count, then queue the transfer."""
        self.counters["submitted"] += 1
        return super().submit(transfer)

    def cancel(self, transfer: Transfer) -> None:
        """Count, then cancel the transfer."""
        self.counters["cancelled"] += 1
        super().cancel(transfer)

    def packet_period(self, endpoint: int) -> float:
        """Isochronous packets as told; interrupts are paced by their source."""
        return self._iso_period if endpoint in (ISO_IN, ISO_OUT) else 0.0

    def alternate_selected(self, interface: int, alternate: int) -> None:
        """Remember how long isochronous packets are."""
        if interface == 1 and alternate:
            self._max_iso_packet = max_packet_size(self._endpoints[ISO_IN], self.speed)

    def halt_cleared(self, endpoint: int) -> None:
        """The stalling endpoint may succeed once."""
        if endpoint == STALLING:
            self._may_succeed = True

    def data_in(self, endpoint: int, length: int) -> Payload | Answer:
        """One IN transfer."""
        match endpoint:
            case 0x81:
                messages = self._messages[self.stream]
                return messages.popleft() if messages else NAK
            case 0x82:
                self._sourced += 1
                return _pattern(self._sourced - 1, length)
            case 0x83:
                return self._interrupt()
            case 0x85:
                allowed, self._may_succeed = self._may_succeed, False
                return PATTERN[:length] if allowed else STALL
            case 0x84:
                self._iso_sourced += 1
                return _pattern(self._iso_sourced - 1, min(length, self._max_iso_packet))
        return NAK

    def data_out(self, endpoint: int, data: Payload) -> Answer | None:
        """One OUT transfer."""
        match endpoint:
            case 0x01:
                messages = self._messages[self.stream]
                if len(messages) >= MAX_MESSAGES:
                    return NAK
                messages.append(bytes(data))
            case 0x02:
                self.counters["sink_bytes"] += len(data)
            case 0x03:
                self.counters["interrupts"] += 1
            case 0x04:
                self.counters["iso_packets"] += 1
                self.counters["iso_bytes"] += len(data)
        return None

    # ------------------------------------------------------------ vendor requests

    @vendor_in(0x01)
    def _pattern(self, setup: Setup) -> bytes:
        return bytes((setup.value + i) & 0xFF for i in range(setup.length))

    @vendor_out(0x02)
    def _store(self, setup: Setup, data: bytes) -> None:
        self._stored = data

    @vendor_in(0x03)
    def _fetch(self, setup: Setup) -> bytes:
        return self._stored

    @vendor_in(0x20)
    def _count(self, setup: Setup) -> bytes:
        return struct.pack("<8Q", *self.counters.values(), 0)

    @vendor_out(0x10)
    def _unplug(self, setup: Setup, data: bytes) -> None:
        self.call_later(setup.value / 1000, self.unplug)

    @vendor_out(0x11)
    def _halt(self, setup: Setup, data: bytes) -> None:
        self.halt(setup.index & 0xFF)

    @vendor_out(0x12)
    def _set_interrupt_period(self, setup: Setup, data: bytes) -> None:
        self._interrupt_period = setup.value / 1e6

    @vendor_out(0x13)
    def _set_iso_period(self, setup: Setup, data: bytes) -> None:
        self._iso_period = setup.value / 1e6

    # ------------------------------------------------------------ sources

    def _interrupt(self) -> bytes | Answer:
        """The next counter, one per period."""
        if self._interrupt_period and not self._interrupt_due:
            if not self._interrupt_timer:
                self._interrupt_timer = True
                self.call_later(self._interrupt_period, self._period_is_over)
            return NAK
        self._interrupt_due = False
        self._interrupts += 1
        return struct.pack("<Q", self._interrupts - 1)

    def _period_is_over(self) -> None:
        self._interrupt_timer = False
        self._interrupt_due = True


def _pattern(number: int, length: int) -> bytes:
    """The pattern, its first 8 bytes replaced by a number."""
    data = struct.pack("<Q", number)
    if length <= len(PATTERN):
        return (data + PATTERN[8:length])[:length]
    return (data + (PATTERN * (length // len(PATTERN) + 1))[8:length])[:length]
