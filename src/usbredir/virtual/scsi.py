"""SCSI without the bus: command descriptor blocks in; data, status and sense out.

::

    task = target.execute(cdb)            # decodes; says which data phase it wants
    task.read(4096)                       # data-in phase, piece by piece, or
    task.write(piece)                     # data-out phase, piece by piece
    status = task.finish()                # GOOD, or CHECK_CONDITION with sense data kept

Here is what every kind of target shares; :mod:`~usbredir.virtual.scsi_disk` and :mod:`~usbredir.virtual.scsi_cdrom`
are two. Nothing that a host sends raises an exception, and neither does an OSError of the medium: both end in sense
data, which REQUEST SENSE fetches. Sources: SPC-4 (INQUIRY, MODE SENSE and others), SBC-3 (READ), SAM-5 (unit
attention).
"""

from __future__ import annotations

import re
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from enum import Enum, IntEnum
from typing import Any, ClassVar, NamedTuple

from .medium import BLOCK_SIZE, Buffer, Medium

__all__ = [
    "CHANGEABLE",
    "COMMON_COMMANDS",
    "COMMON_VITAL_PAGES",
    "DEFAULT",
    "MAX_BLOCKS",
    "BlockTask",
    "CheckCondition",
    "Command",
    "DataPhase",
    "Extent",
    "Parameters",
    "ReadTask",
    "ScsiStatus",
    "ScsiTarget",
    "Sense",
    "Task",
    "decode_extent",
    "outcome",
    "read_medium",
    "reply",
    "sync_medium",
]

MAX_BLOCKS = 0x10000
"""Most blocks of one command, as the Block Limits page says. It bounds the time a command takes."""


class DataPhase(Enum):
    """Which way a command's data goes, seen from the host."""

    NONE = "none"
    IN = "in"
    OUT = "out"


class ScsiStatus(IntEnum):
    """How a command ended. Source: SAM-5, 5.3.1."""

    GOOD = 0x00
    CHECK_CONDITION = 0x02


class Sense(Enum):
    """Sense key, additional sense code and its qualifier. Source: SPC-4, 4.5.6 and annex F."""

    NO_SENSE = (0x0, 0x00, 0x00)
    MEDIUM_NOT_PRESENT = (0x2, 0x3A, 0x00)
    WRITE_ERROR = (0x3, 0x0C, 0x00)
    UNRECOVERED_READ_ERROR = (0x3, 0x11, 0x00)
    PARAMETER_LIST_LENGTH_ERROR = (0x5, 0x1A, 0x00)
    INVALID_COMMAND = (0x5, 0x20, 0x00)
    LBA_OUT_OF_RANGE = (0x5, 0x21, 0x00)
    INVALID_FIELD_IN_CDB = (0x5, 0x24, 0x00)
    INVALID_FIELD_IN_PARAMETER_LIST = (0x5, 0x26, 0x00)
    SAVING_PARAMETERS_NOT_SUPPORTED = (0x5, 0x39, 0x00)
    MEDIUM_REMOVAL_PREVENTED = (0x5, 0x53, 0x02)
    MEDIUM_MAY_HAVE_CHANGED = (0x6, 0x28, 0x00)
    RESET_OCCURRED = (0x6, 0x29, 0x00)
    WRITE_PROTECTED = (0x7, 0x27, 0x00)
    MISCOMPARE_DURING_VERIFY = (0xE, 0x1D, 0x00)

    def encode(self) -> bytes:
        """As fixed format sense data, 18 bytes. Source: SPC-4, 4.5.3."""
        key, code, qualifier = self.value
        return struct.pack(">BxB4xB4xBB4x", 0x70, key, 10, code, qualifier)


class CheckCondition(Exception):
    """Ends a command early, with sense data."""

    def __init__(self, sense: Sense) -> None:
        super().__init__(sense.name)
        self.sense = sense


class Task:
    """One command between its descriptor block and its status. Made by :meth:`ScsiTarget.execute`.

    This class itself is a command without data; subclasses carry data.

    Attributes:
        phase: the data phase the command wants.
        length: its length in bytes; 0 exactly when *phase* is NONE.
    """

    phase = DataPhase.NONE
    length = 0

    def __init__(self, sense: Sense | None = None) -> None:
        self._sense = sense
        self._report: Callable[[Sense | None], None] = _report_to_nobody

    @property
    def failed(self) -> bool:
        """Whether the command has failed already; the rest of the data phase is then pointless."""
        return self._sense is not None

    def report_to(self, report: Callable[[Sense | None], None]) -> None:
        """Have *report* called with the sense data, or None, when the task finishes."""
        self._report = report

    def read(self, length: int) -> bytes:
        """The next *length* bytes of the data-in phase, fewer at its end, none after a failure."""
        return b""

    def write(self, data: Buffer, /) -> None:
        """Take the next bytes of the data-out phase. After a failure they are dropped.

        The caller must not go beyond :attr:`length`.
        """

    def finish(self) -> ScsiStatus:
        """End the command, when its data phase is complete. Call once; a task may also be dropped unfinished."""
        if self._sense is None:
            self._sense = outcome(self._complete)
        self._report(self._sense)
        return ScsiStatus.GOOD if self._sense is None else ScsiStatus.CHECK_CONDITION

    def _complete(self) -> None:
        """What is left to do after the data phase. May raise CheckCondition."""


class _Reply(Task):
    """Data-in from memory."""

    phase = DataPhase.IN

    def __init__(self, data: bytes) -> None:
        super().__init__()
        self._data = data
        self._position = 0
        self.length = len(data)

    def read(self, length: int) -> bytes:
        start = self._position
        self._position = min(start + length, self.length)
        return self._data[start : self._position]


class Parameters(Task):
    """Data-out of a parameter list, which is acted upon when it is complete."""

    phase = DataPhase.OUT

    def __init__(self, length: int, apply: Callable[[bytes], None]) -> None:
        super().__init__()
        self.length = length
        self._apply = apply
        self._received = bytearray()

    def write(self, data: Buffer, /) -> None:
        """Take the next bytes of the list."""
        self._received += data

    def _complete(self) -> None:
        self._apply(bytes(self._received))


class BlockTask(Task):
    """Data of the medium, *length* bytes from byte *position*."""

    def __init__(self, medium: Medium, position: int, length: int) -> None:
        super().__init__()
        self._medium = medium
        self._position = position
        self.length = length


class ReadTask(BlockTask):
    """Data-in straight from the medium, read as it is asked for."""

    phase = DataPhase.IN

    def __init__(self, medium: Medium, position: int, length: int) -> None:
        super().__init__(medium, position, length)
        self._end = position + length

    def read(self, length: int) -> bytes:
        """The next *length* bytes of the medium."""
        position = self._position
        length = min(length, self._end - position)
        if self._sense is not None or not length:
            return b""
        try:
            data = self._medium.read(position, length)
        except OSError:
            self._sense = Sense.UNRECOVERED_READ_ERROR
            return b""
        self._position = position + length
        return data


class Extent(NamedTuple):
    """Blocks that a command is about."""

    lba: int
    blocks: int


class Command(NamedTuple):
    """One row of a command table: *handler* is a method ``(self, cdb) -> Task`` that may raise CheckCondition."""

    handler: Callable[[Any, bytes], Task]
    needs_medium: bool = True
    reports_attention: bool = True


class ScsiTarget(ABC):
    """One logical unit, of whatever kind; a subclass has commands, mode pages and a medium.

    Resets and changes of the medium are reported by a unit attention condition, once.

    Args:
        vendor: T10 vendor identification, up to 8 ASCII characters.
        product: up to 16 ASCII characters.
        revision: up to 4 ASCII characters.
        serial: unit serial number, up to 128 ASCII characters.

    Raises:
        ValueError: one of the texts is too long or not printable ASCII.

    Threads: one caller at a time.
    """

    device_type: ClassVar[int]
    """Peripheral device type. Source: SPC-4, 6.6.2."""
    block_size: ClassVar[int]
    """Bytes of a logical block, a multiple of the medium's."""
    commands: ClassVar[Mapping[int, Command]]
    """Every command there is, by operation code; :data:`COMMON_COMMANDS` are those that have their methods here."""
    vital_pages: ClassVar[Mapping[int, Callable[[Any], bytes]]]
    """Vital product data pages, without their headers."""
    mode_pages: ClassVar[frozenset[int]]
    """Mode pages that MODE SENSE may ask for, one by one or all together."""

    removable = True

    def __init__(self, *, vendor: str, product: str, revision: str, serial: str) -> None:
        self._vendor = _ascii("vendor", vendor, 8).ljust(8)
        self._product = _ascii("product", product, 16).ljust(16)
        self._revision = _ascii("revision", revision, 4).ljust(4)
        self._serial = _ascii("serial", serial, 128)
        self._sense: Sense | None = None
        self._attention: Sense | None = None
        self._removal_prevented = False
        self.reset()

    @property
    @abstractmethod
    def medium_present(self) -> bool:
        """Whether there is a medium that commands can use."""

    @property
    @abstractmethod
    def medium(self) -> Medium:
        """The medium, asked for only while it is present."""

    @property
    def blocks(self) -> int:
        """Logical blocks of the medium."""
        return self.medium.blocks * BLOCK_SIZE // self.block_size

    def reset(self) -> None:
        """Back to the state after power on: removal allowed, unit attention pending."""
        self._removal_prevented = False
        self._sense = None
        self._attention = Sense.RESET_OCCURRED

    def execute(self, cdb: bytes) -> Task:
        """Decode and start a command.

        Commands without a data phase are done when this returns; others move data as
        the task's read and write are called, and may be dropped at any time.

        Args:
            cdb: the command descriptor block, any bytes. What follows the command's own length is ignored.

        Returns:
            The task, which may have failed already. Call its finish() when its data phase is over.
        """
        try:
            task = self._start(cdb)
        except CheckCondition as check:
            task = Task(check.sense)
        task.report_to(self._finished)
        return task

    def _start(self, cdb: bytes) -> Task:
        command = self.commands.get(cdb[0] if cdb else -1)
        if command is None or command.reports_attention:
            self._raise_attention()
        if command is None:
            raise CheckCondition(Sense.INVALID_COMMAND)
        length = _CDB_LENGTH[cdb[0] >> 5]
        if len(cdb) < length:
            raise CheckCondition(Sense.INVALID_FIELD_IN_CDB)
        if command.needs_medium and not self.medium_present:
            raise CheckCondition(Sense.MEDIUM_NOT_PRESENT)
        return command.handler(self, cdb[:length])

    def _finished(self, sense: Sense | None) -> None:
        # Sense data is that of the last command, so a good one clears it. Source: SAM-5, 5.13.
        self._sense = sense

    def _raise_attention(self) -> None:
        attention, self._attention = self._attention, None
        if attention is not None:
            raise CheckCondition(attention)

    # --- about the device: SPC-4 ---

    def _test_unit_ready(self, cdb: bytes) -> Task:
        return Task()

    def _request_sense(self, cdb: bytes) -> Task:
        if cdb[1] & 0x01:  # DESC: the descriptor format is not for disks this small
            raise CheckCondition(Sense.INVALID_FIELD_IN_CDB)
        sense = self._sense or self._attention or Sense.NO_SENSE
        if sense is self._attention:
            self._attention = None
        return reply(sense.encode(), cdb[4])

    def _inquiry(self, cdb: bytes) -> Task:
        vital, page = cdb[1] & 0x01, cdb[2]
        allocated = int.from_bytes(cdb[3:5], "big")
        if cdb[1] & 0x02 or (page and not vital) or (vital and page not in self.vital_pages):
            raise CheckCondition(Sense.INVALID_FIELD_IN_CDB)
        if not vital:
            return reply(self._standard_inquiry(), allocated)
        content = self.vital_pages[page](self)
        return reply(struct.pack(">BBH", self.device_type, page, len(content)) + content, allocated)

    def _standard_inquiry(self) -> bytes:
        # 36 bytes and no more: old hosts ask for 36 and say so in the wrapper, whatever the allocation length.
        removable = 0x80 if self.removable else 0
        head = struct.pack(">BBBBB3x", self.device_type, removable, 0x06, 0x02, 31)
        return head + self._vendor + self._product + self._revision

    def _vital_supported(self) -> bytes:
        return bytes(sorted(self.vital_pages))

    def _vital_serial(self) -> bytes:
        return self._serial

    def _vital_identification(self) -> bytes:
        # One designator: ASCII, for the logical unit, "T10 vendor ID based".
        designator = self._vendor + self._product + self._serial
        return struct.pack(">BBxB", 0x02, 0x01, len(designator)) + designator

    def _report_luns(self, cdb: bytes) -> Task:
        selected, allocated = cdb[2], int.from_bytes(cdb[6:10], "big")
        if selected > 2 or allocated < 16:
            raise CheckCondition(Sense.INVALID_FIELD_IN_CDB)
        luns = b"" if selected == 1 else bytes(8)  # 1 asks for well known units only
        return reply(struct.pack(">I4x", len(luns)) + luns, allocated)

    def _prevent_allow_removal(self, cdb: bytes) -> Task:
        if cdb[4] & 0x03 > 1:
            raise CheckCondition(Sense.INVALID_FIELD_IN_CDB)
        self._removal_prevented = bool(cdb[4] & 0x01)
        return Task()

    # --- mode parameters: SPC-4, 6.9 to 6.12 and 7.5 ---

    def _mode_sense_6(self, cdb: bytes) -> Task:
        pages = self._mode_pages(cdb)
        return reply(struct.pack(">BxBx", 3 + len(pages), self._device_parameter()) + pages, cdb[4])

    def _mode_sense_10(self, cdb: bytes) -> Task:
        pages = self._mode_pages(cdb)
        head = struct.pack(">HxB4x", 6 + len(pages), self._device_parameter())
        return reply(head + pages, int.from_bytes(cdb[7:9], "big"))

    @abstractmethod
    def _device_parameter(self) -> int:
        """The device-specific parameter of the mode parameter header."""

    @abstractmethod
    def _mode_page(self, page: int, control: int) -> bytes:
        """A mode page with its header; *control* is CHANGEABLE, DEFAULT or 0 for the current values."""

    def _mode_pages(self, cdb: bytes) -> bytes:
        control, page, subpage = cdb[2] >> 6, cdb[2] & 0x3F, cdb[3]
        everything = page == _ALL_PAGES and subpage in (0x00, 0xFF)
        if not everything and (page not in self.mode_pages or subpage):
            raise CheckCondition(Sense.INVALID_FIELD_IN_CDB)
        if control == _SAVED:
            raise CheckCondition(Sense.SAVING_PARAMETERS_NOT_SUPPORTED)
        pages = sorted(self.mode_pages) if everything else [page]
        return b"".join(self._mode_page(each, control) for each in pages)

    # --- about the medium ---

    def _start_stop_unit(self, cdb: bytes) -> Task:
        power_condition, load_eject, start = cdb[4] >> 4, cdb[4] & 0x02, cdb[4] & 0x01
        if power_condition:
            return Task()  # nothing here uses power; the other bits then do not count
        if load_eject and not self.removable:
            raise CheckCondition(Sense.INVALID_FIELD_IN_CDB)
        if load_eject and start:
            self._load()
        elif load_eject:
            if self._removal_prevented:
                raise CheckCondition(Sense.MEDIUM_REMOVAL_PREVENTED)
            self._eject()
        elif not start:
            self._stop()
        return Task()

    @abstractmethod
    def _load(self) -> None:
        """Take the medium in."""

    @abstractmethod
    def _eject(self) -> None:
        """Let the medium out; nothing prevents it. May raise CheckCondition."""

    @abstractmethod
    def _stop(self) -> None:
        """What is to be done before the medium stops. May raise CheckCondition."""

    def _read_capacity_10(self, cdb: bytes) -> Task:
        address, partial = int.from_bytes(cdb[2:6], "big"), cdb[8] & 0x01
        if address and not partial:
            raise CheckCondition(Sense.INVALID_FIELD_IN_CDB)
        last = min(self.blocks - 1, 0xFFFFFFFF)  # all ones: ask READ CAPACITY (16)
        return _Reply(struct.pack(">II", last, self.block_size))

    def _read(self, cdb: bytes) -> Task:
        extent = self._extent(cdb)
        return ReadTask(self.medium, *self._bytes(extent)) if extent.blocks else Task()

    def _bytes(self, extent: Extent) -> tuple[int, int]:
        """Where blocks are in the medium: position and length in bytes."""
        return extent.lba * self.block_size, extent.blocks * self.block_size

    def _extent(self, cdb: bytes) -> Extent:
        """The blocks a READ, WRITE or VERIFY is about, all of them within the medium."""
        if len(cdb) > 6 and cdb[1] & 0xE0:  # protection information, which no block has
            raise CheckCondition(Sense.INVALID_FIELD_IN_CDB)
        extent = decode_extent(cdb)
        self._check_range(extent)
        if extent.blocks > MAX_BLOCKS:
            raise CheckCondition(Sense.INVALID_FIELD_IN_CDB)
        return extent

    def _check_range(self, extent: Extent) -> None:
        if extent.lba + extent.blocks > self.blocks:
            raise CheckCondition(Sense.LBA_OUT_OF_RANGE)


_CDB_LENGTH = (6, 10, 10, 0, 16, 12, 0, 0)
"""Bytes of a command descriptor block, by the upper three bits of the operation code. Source: SPC-4, 4.2.5.1."""

COMMON_COMMANDS: Mapping[int, Command] = {
    0x00: Command(ScsiTarget._test_unit_ready),
    0x03: Command(ScsiTarget._request_sense, needs_medium=False, reports_attention=False),
    0x12: Command(ScsiTarget._inquiry, needs_medium=False, reports_attention=False),
    0x1A: Command(ScsiTarget._mode_sense_6, needs_medium=False),
    0x1B: Command(ScsiTarget._start_stop_unit, needs_medium=False),
    0x1E: Command(ScsiTarget._prevent_allow_removal, needs_medium=False),
    0x25: Command(ScsiTarget._read_capacity_10),
    0x28: Command(ScsiTarget._read),
    0x5A: Command(ScsiTarget._mode_sense_10, needs_medium=False),
    0xA0: Command(ScsiTarget._report_luns, needs_medium=False, reports_attention=False),
    0xA8: Command(ScsiTarget._read),
}
"""What disks and drives understand alike."""

COMMON_VITAL_PAGES: Mapping[int, Callable[[Any], bytes]] = {
    0x00: ScsiTarget._vital_supported,
    0x80: ScsiTarget._vital_serial,
    0x83: ScsiTarget._vital_identification,
}

_EXTENT_LAYOUT: Mapping[int, struct.Struct] = {
    10: struct.Struct(">2xIxH"),
    12: struct.Struct(">2xII"),
    16: struct.Struct(">2xQI"),
}
"""Where block address and block count are, by the length of the command descriptor block."""

_ALL_PAGES = 0x3F
CHANGEABLE, DEFAULT, _SAVED = 1, 2, 3
"""Page control of MODE SENSE; 0 is the current values."""


def _report_to_nobody(sense: Sense | None) -> None:
    """For a task that belongs to no disk yet."""


def outcome(action: Callable[[], None]) -> Sense | None:
    """The sense data that *action* ends with, None when it succeeds."""
    try:
        action()
    except CheckCondition as check:
        return check.sense
    return None


def reply(data: bytes, allocated: int) -> Task:
    """Cut to the allocation length. Nothing left means no data phase, which is no error. Source: SPC-4, 4.2.5.6."""
    data = data[:allocated]
    return _Reply(data) if data else Task()


def read_medium(medium: Medium, offset: int, length: int) -> bytes:
    """Bytes of the medium. Raises CheckCondition."""
    try:
        return medium.read(offset, length)
    except OSError:
        raise CheckCondition(Sense.UNRECOVERED_READ_ERROR) from None


def sync_medium(medium: Medium) -> None:
    """Bring what was written to stable storage. Raises CheckCondition."""
    try:
        medium.sync()
    except OSError:
        raise CheckCondition(Sense.WRITE_ERROR) from None


def decode_extent(cdb: bytes) -> Extent:
    """The blocks that a command of 6, 10, 12 or 16 bytes names, unchecked."""
    if len(cdb) == 6:  # 21 bits of address; a count of 0 stands for 256
        return Extent(int.from_bytes(cdb[1:4], "big") & 0x1FFFFF, cdb[4] or 256)
    return Extent(*_EXTENT_LAYOUT[len(cdb)].unpack_from(cdb))


def _ascii(name: str, text: str, limit: int) -> bytes:
    if not re.fullmatch(f"[ -~]{{0,{limit}}}", text):
        raise ValueError(f"{name} must be at most {limit} printable ASCII characters, got {text!r}")
    return text.encode("ascii")
