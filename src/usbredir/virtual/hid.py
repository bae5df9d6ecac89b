"""Human interface devices: reports, and the requests that every such device answers.

A subclass says what its reports look like, sends some and takes others::

    class Button(HidDevice):
        report_descriptor = bytes.fromhex("0600ff 0901 a101 0901 1500 25ff00 7508 9501 8102 c0".replace(" ", ""))

    Button().send_report(b"\\x01")

A report is the same bytes everywhere, on an endpoint and in a request: if the descriptor has report ids, the first byte
is the id.

Source: Device Class Definition for Human Interface Devices (HID) 1.11, chapters 6 and 7.
"""

from __future__ import annotations

import math
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from enum import IntEnum

from ..proto import Speed
from .base import VirtualDevice
from .control import NAK, STALL, Answer, Payload, Setup, class_in, class_out
from .declare import InterfaceDeclaration, interface, interrupt_in, interrupt_out

__all__ = ["BootProtocol", "HidDevice", "ReportKind", "report_sizes"]

REPORTS_IN, REPORTS_OUT = 0x81, 0x01
"""The endpoints."""
HID_CLASS, BOOT_SUBCLASS = 0x03, 0x01
HID_DESCRIPTOR, REPORT_DESCRIPTOR = 0x21, 0x22
HID_VERSION = 0x0111
BOOT, REPORT = 0, 1
"""Protocols of GET_PROTOCOL and SET_PROTOCOL."""
IDLE_UNIT = 0.004
"""Seconds."""
LONGEST_REPORT = 0xFFFF
"""Bytes: what a control request can carry."""


class ReportKind(IntEnum):
    """Which way a report goes. Source: HID, 7.2.1."""

    INPUT = 1
    OUTPUT = 2
    FEATURE = 3


class BootProtocol(IntEnum):
    """What a BIOS may take a device for: bInterfaceProtocol. Source: HID, 4.3."""

    NONE = 0
    KEYBOARD = 1
    MOUSE = 2


# ---------------------------------------------------------------- report descriptors

_MAIN, _GLOBAL = 0, 1  # types of items (HID, 6.2.2.2)
_KINDS: Mapping[int, ReportKind] = {8: ReportKind.INPUT, 9: ReportKind.OUTPUT, 11: ReportKind.FEATURE}
"""Main items that add fields to a report, by tag."""
_SIZE, _ID, _COUNT, _PUSH, _POP = 7, 8, 9, 10, 11  # tags of global items
_LONG_ITEM = 0xFE


def report_sizes(descriptor: bytes) -> dict[tuple[ReportKind, int], int]:
    """Bytes of each report that a report descriptor describes, by kind and id (0: there are no ids).

    The byte of the id is counted. Raises ValueError for a descriptor that makes no sense. Source: HID, 6.2.2.
    """
    bits: dict[tuple[ReportKind, int], int] = {}
    state, stack = dict.fromkeys((_SIZE, _ID, _COUNT), 0), []
    for kind, tag, value in _items(descriptor):
        if kind == _MAIN and tag in _KINDS:
            key = _KINDS[tag], state[_ID]
            bits[key] = bits.get(key, 8 if state[_ID] else 0) + state[_SIZE] * state[_COUNT]
        elif kind == _GLOBAL and tag in state:
            state[tag] = value
        elif (kind, tag) == (_GLOBAL, _PUSH):
            stack.append(dict(state))
        elif (kind, tag) == (_GLOBAL, _POP):
            if not stack:
                raise ValueError("a report descriptor pops what it has not pushed")
            state = stack.pop()
    ids = {report_id for _, report_id in bits}
    if max(ids, default=0) > 0xFF or (0 in ids and len(ids) > 1):
        raise ValueError("either no report has an id, or each has one from 1 to 255")
    sizes = {key: -(-count // 8) for key, count in bits.items()}
    if max(sizes.values(), default=0) > LONGEST_REPORT:
        raise ValueError(f"a report has at most {LONGEST_REPORT} bytes, not {max(sizes.values())}")
    return sizes


def _items(descriptor: bytes) -> Iterator[tuple[int, int, int]]:
    """(type, tag, unsigned value) of each short item; long ones have no meaning yet."""
    position = 0
    while position < len(descriptor):
        prefix = descriptor[position]
        long = prefix == _LONG_ITEM
        start = position + (3 if long else 1)
        size = descriptor[position + 1] if long and start <= len(descriptor) else (0, 1, 2, 4)[prefix & 3]
        position = start + size
        if position > len(descriptor):
            raise ValueError("a report descriptor ends inside an item")
        if not long:
            yield prefix >> 2 & 3, prefix >> 4, int.from_bytes(descriptor[start:position], "little")


# ---------------------------------------------------------------- the device


class HidDevice(VirtualDevice):
    """A human interface device: what its reports mean is a subclass's.

    Attributes of the class, or of the object if set before it is described:
        report_descriptor: what the reports look like.
        boot_protocol: for a keyboard or a mouse that a BIOS can use.
        output_endpoint: output reports come on an interrupt endpoint of their own, as those of a FIDO key; without,
            they come in requests.
        report_period: seconds between two reports, at least; rounded down to what the speed has.

    Args:
        speed: speed on the bus; None: the declared one.
        clock: seconds, monotonic.

    Raises ValueError for a report descriptor that makes no sense, and when an input or output report is longer than
    an interrupt packet at this speed.

    Threads: methods from any; hooks run in the thread that handles events.
    """

    report_descriptor: bytes = b""
    boot_protocol: BootProtocol = BootProtocol.NONE
    output_endpoint: bool = False
    report_period: float = 0.008
    remote_wakeup = True
    send_limit = 8192

    def __init__(self, *, speed: Speed | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._sizes = report_sizes(self.report_descriptor)
        self._has_ids = any(report_id for _, report_id in self._sizes)
        # The latest report of each kind and id; at first all its fields are 0.
        self._latest = {key: bytes([key[1]] * self._has_ids).ljust(size, b"\0") for key, size in self._sizes.items()}
        self._sending = threading.Lock()
        self._listened = threading.Event()
        self.interfaces = (self._interface(),)
        super().__init__(speed=speed, clock=clock)

    def _interface(self) -> InterfaceDeclaration:
        raw = self.report_descriptor
        hid = struct.pack("<BBHBBBH", 9, HID_DESCRIPTOR, HID_VERSION, 0, 1, REPORT_DESCRIPTOR, len(raw))
        endpoints = [interrupt_in(REPORTS_IN, self._longest(ReportKind.INPUT), period=self.report_period)]
        if self.output_endpoint:
            endpoints += [interrupt_out(REPORTS_OUT, self._longest(ReportKind.OUTPUT), period=self.report_period)]
        return interface(
            HID_CLASS,
            *endpoints,
            subclass=BOOT_SUBCLASS if self.boot_protocol else 0,
            protocol=self.boot_protocol,
            extra=hid,
            descriptors={HID_DESCRIPTOR: hid, REPORT_DESCRIPTOR: raw},
        )

    def _longest(self, kind: ReportKind) -> int:
        return max((size for (known, _), size in self._sizes.items() if known is kind), default=1)

    # ------------------------------------------------------------ for users and subclasses

    def send_report(self, *reports: Payload) -> bool:
        """Queue input reports for the host, which takes one per period.

        False: none was queued, because ``send_limit`` reports would wait, or because the device is gone. A reset or
        another configuration forgets those that wait; :meth:`wait_until_listening` tells when a driver is there.
        Raises ValueError for a report that has not the declared size. Threads: any.
        """
        for report in reports:
            self._check_input(report)
        with self._sending:
            if len(self._outbox.get(REPORTS_IN, ())) + len(reports) > self.send_limit:
                return False
            return all(self._send_one(bytes(report)) for report in reports)

    def _check_input(self, report: Payload) -> None:
        size = self._sizes.get((ReportKind.INPUT, self._id_of(report)))
        if size != len(report):
            wanted = "no such input report" if size is None else f"it has {size} bytes"
            raise ValueError(f"report {bytes(report).hex(' ')}: {wanted}")

    def _send_one(self, report: bytes) -> bool:
        if not self.send(REPORTS_IN, report):
            return False
        self._latest[ReportKind.INPUT, self._id_of(report)] = report
        return True

    def _id_of(self, report: Payload) -> int:
        return report[0] if self._has_ids and report else 0

    def wait_until_listening(self, timeout: float | None = None) -> bool:
        """Wait until a driver of the host asks for reports; whether it does. *timeout* in seconds. Threads: any."""
        return self._listened.wait(timeout)

    @property
    def in_boot_protocol(self) -> bool:
        """Whether the host has selected the boot protocol, as a BIOS does."""
        return self._protocol == BOOT

    # ------------------------------------------------------------ hooks

    def listening(self) -> None:
        """A driver of the host asks for reports, for the first time since the device began."""

    def report_received(self, kind: ReportKind, report: bytes) -> Answer | None:
        """An output or feature report of the host. None accepts it, NAK lets the host wait, STALL refuses."""
        return None

    def report_requested(self, kind: ReportKind, report_id: int) -> Payload | Answer:
        """The host asks for a report with a request; by default it gets the latest one."""
        return self._latest[kind, report_id]

    def boot_report(self, report: Payload) -> Payload:
        """An input report as the boot protocol has it, if that differs."""
        return report

    # ------------------------------------------------------------ hooks of VirtualDevice

    def began(self) -> None:
        """Report protocol, and reports only when something changes."""
        self._protocol = REPORT
        self._idle = {report_id: 0 for kind, report_id in self._sizes if kind is ReportKind.INPUT}
        self._told = dict.fromkeys(self._idle, -math.inf)  # when each input report was given last
        self._repeat_at = math.inf  # when a timer is due
        self._listened.clear()

    def data_in(self, endpoint: int, length: int) -> Payload | Answer:
        """The next report, whole: one that the host has no room for is a babble."""
        if not self._listened.is_set():
            self._listened.set()
            self.listening()
        report = super().data_in(endpoint, LONGEST_REPORT)
        if isinstance(report, Answer):
            report = self._repeated()
        if isinstance(report, Answer):
            return report
        self._told[self._id_of(report)] = self._clock()
        return self.boot_report(report) if self.in_boot_protocol else report

    def data_out(self, endpoint: int, data: Payload) -> Answer | None:
        """An output report."""
        return self._take(ReportKind.OUTPUT, self._id_of(data), bytes(data))

    def _take(self, kind: ReportKind, report_id: int, report: bytes) -> Answer | None:
        size = self._sizes.get((kind, report_id))
        if size is None or len(report) < size:
            return STALL
        report = report[:size]  # some hosts pad
        answer = self.report_received(kind, report)
        if answer is None:
            self._latest[kind, report_id] = report
        return answer

    # ------------------------------------------------------------ idle rate

    def _repeated(self) -> Payload | Answer:
        """The first input report whose idle time is over. Source: HID, 7.2.4."""
        now = self._clock()
        due = {report_id: self._told[report_id] + idle * IDLE_UNIT for report_id, idle in self._idle.items() if idle}
        if not due:
            return NAK
        report_id = min(due, key=due.__getitem__)
        if due[report_id] <= now:
            return self._latest[ReportKind.INPUT, report_id]
        if due[report_id] < self._repeat_at:
            self._repeat_at = due[report_id]
            self.call_later(due[report_id] - now, self._repeat_again)
        return NAK

    def _repeat_again(self) -> None:
        self._repeat_at = math.inf

    # ------------------------------------------------------------ requests (HID, 7.2)

    @class_in(0x01)
    def _get_report(self, setup: Setup) -> Payload | Answer:
        kind, report_id = setup.value >> 8, setup.value & 0xFF
        if (kind, report_id) not in self._sizes:
            return STALL
        report = self.report_requested(ReportKind(kind), report_id)
        if isinstance(report, Answer) or kind != ReportKind.INPUT or not self.in_boot_protocol:
            return report
        return self.boot_report(report)

    @class_out(0x09)
    def _set_report(self, setup: Setup, data: bytes) -> Answer | None:
        kind, report_id = setup.value >> 8, setup.value & 0xFF
        if kind == ReportKind.INPUT or (kind, report_id) not in self._sizes or self._id_of(data) != report_id:
            return STALL
        return self._take(ReportKind(kind), report_id, data)

    @class_in(0x02)
    def _get_idle(self, setup: Setup) -> bytes | Answer:
        report_id = setup.value & 0xFF
        idle = self._idle.get(report_id, next(iter(self._idle.values()), None) if not report_id else None)
        return STALL if idle is None else bytes([idle])

    @class_out(0x0A)
    def _set_idle(self, setup: Setup, data: bytes) -> Answer | None:
        """Report id 0 means all."""
        idle, report_id = setup.value >> 8, setup.value & 0xFF
        if report_id and report_id not in self._idle:
            return STALL
        self._idle |= dict.fromkeys([report_id] if report_id else self._idle, idle)
        return None

    @class_in(0x03)
    def _get_protocol(self, setup: Setup) -> bytes | Answer:
        return bytes([self._protocol]) if self.boot_protocol else STALL

    @class_out(0x0B)
    def _set_protocol(self, setup: Setup, data: bytes) -> Answer | None:
        if not self.boot_protocol or setup.value not in (BOOT, REPORT):
            return STALL
        self._protocol = setup.value
        return None
