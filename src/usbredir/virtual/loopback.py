"""A vendor-specific device for tests: loopback, sinks, sources and misbehaving endpoints.

The device is 1209:0001, release 0x1234. Configuration 1:

=========  =============================================================================================
interface  endpoints
=========  =============================================================================================
0          0x01 / 0x81 bulk loopback: an OUT transfer is a message; a too small IN transfer babbles
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
from collections import deque
from collections.abc import Callable

from ..descriptors import (
    Configuration,
    DeviceDescriptor,
    Endpoint,
    Interface,
    build_configuration,
    max_packet_size,
)
from ..device import Transfer
from ..proto import Speed
from .base import Answer, Payload, Setup, VirtualDevice

__all__ = ["LoopbackDevice"]

VENDOR_ID = 0x1209
PRODUCT_ID = 0x0001

BULK, INTERRUPT, ISO = 2, 3, 1
LOOP_OUT, LOOP_IN = 0x01, 0x81
SINK, SOURCE = 0x02, 0x82
INTERRUPT_SINK, INTERRUPT_SOURCE = 0x03, 0x83
ISO_OUT, ISO_IN = 0x04, 0x84
STALLING, SILENT = 0x85, 0x86

MAX_MESSAGES = 256
"""Messages that wait in the loopback before OUT transfers are held back."""
COUNTERS = ("iso_packets", "iso_bytes", "sink_bytes", "interrupts", "resets", "cancelled", "submitted")
PATTERN = bytes(range(256)) * 256

IN_REQUEST, OUT_REQUEST = 0xC0, 0x40
BULK_SIZES = {Speed.LOW: 8, Speed.FULL: 64, Speed.HIGH: 512, Speed.SUPER: 1024}


class LoopbackDevice(VirtualDevice):
    """The device of this module's description.

    Args:
        speed: high unless told otherwise.
        interrupt_period: seconds between two packets of the interrupt source; 0: as fast as they are asked for.
        iso_period: the same for the isochronous endpoints.
        serial: serial number.
    """

    def __init__(
        self,
        *,
        speed: Speed = Speed.HIGH,
        interrupt_period: float = 0.001,
        iso_period: float = 0.000125,
        serial: str = "LOOP0001",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(
            speed=speed,
            device_descriptor=DeviceDescriptor(
                usb_bcd=0x0320 if speed is Speed.SUPER else 0x0200,
                device_class=0xFF,
                device_subclass=0,
                device_protocol=0,
                max_packet_size0=9 if speed is Speed.SUPER else 64,
                vendor_id=VENDOR_ID,
                product_id=PRODUCT_ID,
                device_version_bcd=0x1234,
                manufacturer_index=1,
                product_index=2,
                serial_index=3,
                configurations=2,
            ).to_bytes(),
            configurations=[build_configuration(c) for c in _configurations(speed)],
            strings={1: "usbredir", 2: "Loopback", 3: serial},
            clock=clock,
        )
        self._interrupt_period = interrupt_period
        self._iso_period = iso_period
        self.counters = dict.fromkeys(COUNTERS, 0)
        self._stored = b""
        self._begin()

    def _begin(self) -> None:
        self._messages: deque[bytes] = deque()
        self._sourced = 0
        self._iso_sourced = 0
        self._interrupts = 0
        self._interrupt_due = False
        self._interrupt_timer = False
        self._may_succeed = False

    # ------------------------------------------------------------ hooks

    def was_reset(self) -> None:
        """Counters stay, everything else starts anew."""
        self.counters["resets"] += 1
        self._begin()

    def submit(self, transfer: Transfer) -> int:
        """Count, then queue the transfer."""
        self.counters["submitted"] += 1
        return super().submit(transfer)

    def cancel(self, transfer: Transfer) -> None:
        """Count, then cancel the transfer."""
        self.counters["cancelled"] += 1
        super().cancel(transfer)

    def packet_period(self, endpoint: int) -> float:
        """Microframes, unless told otherwise."""
        return self._iso_period

    def alternate_selected(self, interface: int, alternate: int) -> None:
        """Remember how long isochronous packets are."""
        if interface == 1 and alternate:
            self._max_iso_packet = max_packet_size(self._endpoints[ISO_IN], self._speed)

    def halt_cleared(self, endpoint: int) -> None:
        """The stalling endpoint may succeed once."""
        if endpoint == STALLING:
            self._may_succeed = True

    def data_in(self, endpoint: int, length: int) -> Payload | Answer:
        """One IN transfer."""
        match endpoint:
            case 0x81:
                return self._messages.popleft() if self._messages else Answer.NAK
            case 0x82:
                self._sourced += 1
                return _pattern(self._sourced - 1, length)
            case 0x83:
                return self._interrupt()
            case 0x85:
                allowed, self._may_succeed = self._may_succeed, False
                return PATTERN[:length] if allowed else Answer.STALL
            case 0x84:
                self._iso_sourced += 1
                return _pattern(self._iso_sourced - 1, min(length, self._max_iso_packet))
        return Answer.NAK

    def data_out(self, endpoint: int, data: Payload) -> Answer | None:
        """One OUT transfer."""
        match endpoint:
            case 0x01:
                if len(self._messages) >= MAX_MESSAGES:
                    return Answer.NAK
                self._messages.append(bytes(data))
            case 0x02:
                self.counters["sink_bytes"] += len(data)
            case 0x03:
                self.counters["interrupts"] += 1
            case 0x04:
                self.counters["iso_packets"] += 1
                self.counters["iso_bytes"] += len(data)
        return None

    def control_request(self, setup: Setup, data: bytes) -> Payload | Answer:
        """The vendor requests."""
        match setup.request_type, setup.request:
            case 0xC0, 0x01:
                return bytes((setup.value + i) & 0xFF for i in range(setup.length))
            case 0xC0, 0x03:
                return self._stored
            case 0xC0, 0x20:
                return struct.pack("<8Q", *self.counters.values(), 0)
            case 0x40, 0x02:
                self._stored = data
            case 0x40, 0x10:
                self.call_later(setup.value / 1000, self.unplug)
            case 0x40, 0x11:
                self.halt(setup.index & 0xFF)
            case 0x40, 0x12:
                self._interrupt_period = setup.value / 1e6
            case 0x40, 0x13:
                self._iso_period = setup.value / 1e6
            case _:
                return Answer.STALL
        return b""

    # ------------------------------------------------------------ sources

    def _interrupt(self) -> bytes | Answer:
        """The next counter, one per period."""
        if self._interrupt_period and not self._interrupt_due:
            if not self._interrupt_timer:
                self._interrupt_timer = True
                self.call_later(self._interrupt_period, self._period_is_over)
            return Answer.NAK
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


def _configurations(speed: Speed) -> list[Configuration]:
    bulk = BULK_SIZES[speed]
    super_speed = speed is Speed.SUPER

    def endpoint(address: int, kind: int, size: int, interval: int = 0) -> Endpoint:
        streams = 16 if super_speed and kind == BULK else 0
        return Endpoint(address, kind, size, interval, companion=super_speed, max_streams=streams)

    loop = (endpoint(LOOP_OUT, BULK, bulk), endpoint(LOOP_IN, BULK, bulk))
    rest = (
        endpoint(SINK, BULK, bulk),
        endpoint(SOURCE, BULK, bulk),
        endpoint(INTERRUPT_SINK, INTERRUPT, 64, 4),
        endpoint(INTERRUPT_SOURCE, INTERRUPT, 64, 4),
        endpoint(STALLING, BULK, bulk),
        endpoint(SILENT, BULK, bulk),
    )

    def iso(size: int) -> tuple[Endpoint, ...]:
        return endpoint(ISO_OUT, ISO, size, 1), endpoint(ISO_IN, ISO, size, 1)

    return [
        Configuration(
            1,
            interfaces=(
                Interface(0, 0, 0xFF, endpoints=loop + rest),
                Interface(1, 0, 0xFF),
                Interface(1, 1, 0xFF, endpoints=iso(1023)),
                Interface(1, 2, 0xFF, endpoints=iso(0x1400)),
            ),
        ),
        Configuration(2, interfaces=(Interface(0, 0, 0xFF, endpoints=loop),)),
    ]
