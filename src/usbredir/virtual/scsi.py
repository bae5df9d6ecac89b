"""A SCSI disk, without the bus: command descriptor blocks in; data, status and sense out.

::

    disk = ScsiDisk(MemoryMedium(bytes(1 << 20)))
    task = disk.execute(cdb)              # decodes; says which data phase it wants
    task.read(4096)                       # data-in phase, piece by piece, or
    task.write(piece)                     # data-out phase, piece by piece
    status = task.finish()                # GOOD, or CHECK_CONDITION with sense data kept

Nothing that a host sends raises an exception, and neither does an OSError of the medium:
both end in sense data, which REQUEST SENSE fetches. Sources: SPC-4 (INQUIRY, MODE SENSE and
others), SBC-3 (READ, WRITE and others), SAM-5 (unit attention).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Mapping
from enum import Enum, IntEnum
from typing import NamedTuple

from .medium import BLOCK_SIZE, Buffer, FileMedium, Medium, MemoryMedium

__all__ = [
    "BLOCK_SIZE",
    "MAX_BLOCKS",
    "DataPhase",
    "FileMedium",
    "Medium",
    "MemoryMedium",
    "ScsiDisk",
    "ScsiStatus",
    "Sense",
    "Task",
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


class _CheckCondition(Exception):
    """Ends a command early."""

    def __init__(self, sense: Sense) -> None:
        super().__init__(sense.name)
        self.sense = sense


class Task:
    """One command between its descriptor block and its status. Made by :meth:`ScsiDisk.execute`.

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
            self._sense = _outcome(self._complete)
        self._report(self._sense)
        return ScsiStatus.GOOD if self._sense is None else ScsiStatus.CHECK_CONDITION

    def _complete(self) -> None:
        """What is left to do after the data phase. May raise _CheckCondition."""


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


class _Parameters(Task):
    """Data-out of a parameter list, which is acted upon when it is complete."""

    phase = DataPhase.OUT

    def __init__(self, length: int, apply: Callable[[bytes], None]) -> None:
        super().__init__()
        self.length = length
        self._apply = apply
        self._received = bytearray()

    def write(self, data: Buffer, /) -> None:
        self._received += data

    def _complete(self) -> None:
        self._apply(bytes(self._received))


class _BlockTask(Task):
    """Data of the medium's blocks."""

    def __init__(self, medium: Medium, extent: _Extent) -> None:
        super().__init__()
        self._medium = medium
        self._position = extent.lba * BLOCK_SIZE
        self.length = extent.blocks * BLOCK_SIZE


class _Read(_BlockTask):
    """Data-in straight from the medium, read as it is asked for."""

    phase = DataPhase.IN

    def __init__(self, medium: Medium, extent: _Extent) -> None:
        super().__init__(medium, extent)
        self._end = self._position + self.length

    def read(self, length: int) -> bytes:
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


class _Write(_BlockTask):
    """Data-out straight to the medium, written as it comes."""

    phase = DataPhase.OUT

    def __init__(self, medium: Medium, extent: _Extent, *, through: bool) -> None:
        super().__init__(medium, extent)
        self._through = through

    def write(self, data: Buffer, /) -> None:
        if self._sense is not None:
            return
        try:
            self._medium.write(self._position, data)
        except OSError:
            self._sense = Sense.WRITE_ERROR
        self._position += len(data)

    def _complete(self) -> None:
        if self._through:
            _sync(self._medium)


class _Compare(_BlockTask):
    """Data-out that is compared with the medium. Source: SBC-3, 5.42, BYTCHK 01b."""

    phase = DataPhase.OUT

    def write(self, data: Buffer, /) -> None:
        if self._sense is not None:
            return
        self._sense = _outcome(lambda: self._compare(data))
        self._position += len(data)

    def _compare(self, data: Buffer) -> None:
        if _read(self._medium, self._position, len(data)) != data:
            raise _CheckCondition(Sense.MISCOMPARE_DURING_VERIFY)


class _Extent(NamedTuple):
    """Blocks that a command is about."""

    lba: int
    blocks: int


class _Opcode(NamedTuple):
    """One row of the command table."""

    handler: Callable[[ScsiDisk, bytes], Task]
    needs_medium: bool = True
    reports_attention: bool = True


class ScsiDisk:
    """A direct access block device with one logical unit.

    The medium is loaded at first; START STOP UNIT ejects and loads it. A removable disk reports
    a change or reset by a unit attention condition, once.

    Args:
        medium: where the blocks are. Not closed by the disk.
        read_only: write protected. A read-only medium makes it so in any case.
        removable: the medium can be ejected (it stays this medium).
        vendor: T10 vendor identification, up to 8 ASCII characters.
        product: up to 16 ASCII characters.
        revision: up to 4 ASCII characters.
        serial: unit serial number, up to 128 ASCII characters.

    Raises:
        ValueError: one of the texts is too long or not printable ASCII.

    Threads: one caller at a time.
    """

    def __init__(
        self,
        medium: Medium,
        *,
        read_only: bool = False,
        removable: bool = True,
        vendor: str = "usbredir",
        product: str = "Virtual Disk",
        revision: str = "1.0",
        serial: str = "000000000001",
    ) -> None:
        self._medium = medium
        self._read_only = read_only or medium.read_only
        self._removable = removable
        self._vendor = _ascii("vendor", vendor, 8).ljust(8)
        self._product = _ascii("product", product, 16).ljust(16)
        self._revision = _ascii("revision", revision, 4).ljust(4)
        self._serial = _ascii("serial", serial, 128)
        self._sense: Sense | None = None
        self._attention: Sense | None = None
        self.reset()

    @property
    def medium_present(self) -> bool:
        """Whether the medium is loaded, that is, not ejected."""
        return self._loaded

    def reset(self) -> None:
        """Back to the state after power on: medium loaded, removal allowed, unit attention pending."""
        self._loaded = True
        self._removal_prevented = False
        self._write_cache = True
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
        except _CheckCondition as check:
            task = Task(check.sense)
        task.report_to(self._finished)
        return task

    def _start(self, cdb: bytes) -> Task:
        command = _COMMANDS.get(cdb[0] if cdb else -1)
        if command is None or command.reports_attention:
            self._raise_attention()
        if command is None:
            raise _CheckCondition(Sense.INVALID_COMMAND)
        length = _CDB_LENGTH[cdb[0] >> 5]
        if len(cdb) < length:
            raise _CheckCondition(Sense.INVALID_FIELD_IN_CDB)
        if command.needs_medium and not self._loaded:
            raise _CheckCondition(Sense.MEDIUM_NOT_PRESENT)
        return command.handler(self, cdb[:length])

    def _finished(self, sense: Sense | None) -> None:
        # Sense data is that of the last command, so a good one clears it. Source: SAM-5, 5.13.
        self._sense = sense

    def _raise_attention(self) -> None:
        attention, self._attention = self._attention, None
        if attention is not None:
            raise _CheckCondition(attention)

    # --- about the device: SPC-4 ---

    def _test_unit_ready(self, cdb: bytes) -> Task:
        return Task()

    def _request_sense(self, cdb: bytes) -> Task:
        if cdb[1] & 0x01:  # DESC: the descriptor format is not for disks this small
            raise _CheckCondition(Sense.INVALID_FIELD_IN_CDB)
        sense = self._sense or self._attention or Sense.NO_SENSE
        if sense is self._attention:
            self._attention = None
        return _reply(sense.encode(), cdb[4])

    def _inquiry(self, cdb: bytes) -> Task:
        vital, page = cdb[1] & 0x01, cdb[2]
        allocated = int.from_bytes(cdb[3:5], "big")
        if cdb[1] & 0x02 or (page and not vital) or (vital and page not in _VITAL_PAGES):
            raise _CheckCondition(Sense.INVALID_FIELD_IN_CDB)
        if not vital:
            return _reply(self._standard_inquiry(), allocated)
        content = _VITAL_PAGES[page](self)
        return _reply(struct.pack(">xBH", page, len(content)) + content, allocated)

    def _standard_inquiry(self) -> bytes:
        # 36 bytes and no more: old hosts ask for 36 and say so in the wrapper, whatever the allocation length.
        removable = 0x80 if self._removable else 0
        head = struct.pack(">xBBBB3x", removable, 0x06, 0x02, 31)
        return head + self._vendor + self._product + self._revision

    def _vital_supported(self) -> bytes:
        return bytes(sorted(_VITAL_PAGES))

    def _vital_serial(self) -> bytes:
        return self._serial

    def _vital_identification(self) -> bytes:
        # One designator: ASCII, for the logical unit, "T10 vendor ID based".
        designator = self._vendor + self._product + self._serial
        return struct.pack(">BBxB", 0x02, 0x01, len(designator)) + designator

    def _vital_block_limits(self) -> bytes:
        return struct.pack(">4xI52x", MAX_BLOCKS)

    def _vital_characteristics(self) -> bytes:
        return struct.pack(">H58x", 0x0001)  # does not rotate

    def _vital_provisioning(self) -> bytes:
        return bytes(4)  # fully provisioned

    def _report_luns(self, cdb: bytes) -> Task:
        selected, allocated = cdb[2], int.from_bytes(cdb[6:10], "big")
        if selected > 2 or allocated < 16:
            raise _CheckCondition(Sense.INVALID_FIELD_IN_CDB)
        luns = b"" if selected == 1 else bytes(8)  # 1 asks for well known units only
        return _reply(struct.pack(">I4x", len(luns)) + luns, allocated)

    def _prevent_allow_removal(self, cdb: bytes) -> Task:
        if cdb[4] & 0x03 > 1:
            raise _CheckCondition(Sense.INVALID_FIELD_IN_CDB)
        self._removal_prevented = bool(cdb[4] & 0x01)
        return Task()

    # --- mode parameters: SPC-4, 6.9 to 6.12 and 7.5; SBC-3, 6.5 ---

    def _mode_sense_6(self, cdb: bytes) -> Task:
        pages = self._mode_pages(cdb)
        return _reply(struct.pack(">BxBx", 3 + len(pages), self._device_parameter()) + pages, cdb[4])

    def _mode_sense_10(self, cdb: bytes) -> Task:
        pages = self._mode_pages(cdb)
        head = struct.pack(">HxB4x", 6 + len(pages), self._device_parameter())
        return _reply(head + pages, int.from_bytes(cdb[7:9], "big"))

    def _device_parameter(self) -> int:
        write_protected, dpo_fua = 0x80, 0x10
        return dpo_fua | (write_protected if self._read_only else 0)

    def _mode_pages(self, cdb: bytes) -> bytes:
        control, page, subpage = cdb[2] >> 6, cdb[2] & 0x3F, cdb[3]
        if (page, subpage) not in _MODE_PAGES:
            raise _CheckCondition(Sense.INVALID_FIELD_IN_CDB)
        if control == _SAVED:
            raise _CheckCondition(Sense.SAVING_PARAMETERS_NOT_SUPPORTED)
        if control == _CHANGEABLE:
            return _CACHING_CHANGEABLE
        return _caching_page(write_cache=self._write_cache or control == _DEFAULT)

    def _mode_select_6(self, cdb: bytes) -> Task:
        return self._mode_select(cdb, cdb[4], 4)

    def _mode_select_10(self, cdb: bytes) -> Task:
        return self._mode_select(cdb, int.from_bytes(cdb[7:9], "big"), 8)

    def _mode_select(self, cdb: bytes, length: int, head_size: int) -> Task:
        if cdb[1] & 0x01:  # SP: there is nowhere to save pages
            raise _CheckCondition(Sense.INVALID_FIELD_IN_CDB)
        if not length:
            return Task()
        return _Parameters(length, lambda data: self._select_modes(data, head_size))

    def _select_modes(self, data: bytes, head_size: int) -> None:
        """Change the write cache; everything else must be as MODE SENSE said."""
        if len(data) < head_size:
            raise _CheckCondition(Sense.PARAMETER_LIST_LENGTH_ERROR)
        # The block descriptor length ends the header, in one byte or two.
        descriptors = int.from_bytes(data[head_size // 4 * 3 : head_size], "big")
        if descriptors:
            raise _CheckCondition(Sense.INVALID_FIELD_IN_PARAMETER_LIST)
        write_cache = self._write_cache
        for page in _split_mode_pages(data[head_size:]):
            write_cache = bool(page[2] & _WRITE_CACHE_ENABLE)
            if page != _caching_page(write_cache=write_cache):
                raise _CheckCondition(Sense.INVALID_FIELD_IN_PARAMETER_LIST)
        if not write_cache:
            self._sync()
        self._write_cache = write_cache

    # --- about the medium: SBC-3 ---

    def _start_stop_unit(self, cdb: bytes) -> Task:
        power_condition, load_eject, start = cdb[4] >> 4, cdb[4] & 0x02, cdb[4] & 0x01
        if power_condition:
            return Task()  # nothing here uses power; the other bits then do not count
        if load_eject and not self._removable:
            raise _CheckCondition(Sense.INVALID_FIELD_IN_CDB)
        if load_eject and start:
            self._load()
        elif load_eject:
            self._eject()
        elif not start:
            self._sync()
        return Task()

    def _load(self) -> None:
        if not self._loaded:
            self._loaded = True
            self._attention = Sense.MEDIUM_MAY_HAVE_CHANGED

    def _eject(self) -> None:
        if self._removal_prevented:
            raise _CheckCondition(Sense.MEDIUM_REMOVAL_PREVENTED)
        if self._loaded:
            self._sync()
        self._loaded = False

    def _read_capacity_10(self, cdb: bytes) -> Task:
        address, partial = int.from_bytes(cdb[2:6], "big"), cdb[8] & 0x01
        if address and not partial:
            raise _CheckCondition(Sense.INVALID_FIELD_IN_CDB)
        last = min(self._medium.blocks - 1, 0xFFFFFFFF)  # all ones: ask READ CAPACITY (16)
        return _Reply(struct.pack(">II", last, BLOCK_SIZE))

    def _service_action_in(self, cdb: bytes) -> Task:
        if cdb[1] & 0x1F != 0x10:  # READ CAPACITY (16) is the only one
            raise _CheckCondition(Sense.INVALID_FIELD_IN_CDB)
        capacity = struct.pack(">QI20x", self._medium.blocks - 1, BLOCK_SIZE)
        return _reply(capacity, int.from_bytes(cdb[10:14], "big"))

    def _read_format_capacities(self, cdb: bytes) -> Task:
        # From MMC, but Windows sends it to every removable disk.
        formatted_medium = 0x02000000
        blocks = min(self._medium.blocks, 0xFFFFFFFF)
        capacities = struct.pack(">3xBII", 8, blocks, formatted_medium | BLOCK_SIZE)
        return _reply(capacities, int.from_bytes(cdb[7:9], "big"))

    def _read(self, cdb: bytes) -> Task:
        extent = self._extent(cdb)
        if _forces_unit_access(cdb):
            self._sync()  # what is read must be what is stored
        return _Read(self._medium, extent) if extent.blocks else Task()

    def _write(self, cdb: bytes) -> Task:
        extent = self._extent(cdb)
        if self._read_only:
            raise _CheckCondition(Sense.WRITE_PROTECTED)
        if not extent.blocks:
            return Task()
        return _Write(self._medium, extent, through=_forces_unit_access(cdb) or not self._write_cache)

    def _verify(self, cdb: bytes) -> Task:
        extent = self._extent(cdb)
        compare = (cdb[1] >> 1) & 0x03
        if compare > 1:
            raise _CheckCondition(Sense.INVALID_FIELD_IN_CDB)
        if compare and extent.blocks:
            return _Compare(self._medium, extent)
        self._verify_readable(extent)
        return Task()

    def _verify_readable(self, extent: _Extent) -> None:
        position, end = extent.lba * BLOCK_SIZE, (extent.lba + extent.blocks) * BLOCK_SIZE
        while position < end:
            length = min(end - position, _VERIFY_PIECE)
            _read(self._medium, position, length)
            position += length

    def _synchronize_cache(self, cdb: bytes) -> Task:
        # A count of 0 means all that follows; all is written out in any case.
        self._check_range(_decode_extent(cdb))
        self._sync()
        return Task()

    def _sync(self) -> None:
        if not self._read_only:  # nothing to flush, and Windows refuses to
            _sync(self._medium)

    def _extent(self, cdb: bytes) -> _Extent:
        """The blocks a READ, WRITE or VERIFY is about, all of them within the medium."""
        if len(cdb) > 6 and cdb[1] & 0xE0:  # protection information, which no block has
            raise _CheckCondition(Sense.INVALID_FIELD_IN_CDB)
        extent = _decode_extent(cdb)
        self._check_range(extent)
        if extent.blocks > MAX_BLOCKS:
            raise _CheckCondition(Sense.INVALID_FIELD_IN_CDB)
        return extent

    def _check_range(self, extent: _Extent) -> None:
        if extent.lba + extent.blocks > self._medium.blocks:
            raise _CheckCondition(Sense.LBA_OUT_OF_RANGE)


_CDB_LENGTH = (6, 10, 10, 0, 16, 12, 0, 0)
"""Bytes of a command descriptor block, by the upper three bits of the operation code. Source: SPC-4, 4.2.5.1."""

_COMMANDS: Mapping[int, _Opcode] = {
    0x00: _Opcode(ScsiDisk._test_unit_ready),
    0x03: _Opcode(ScsiDisk._request_sense, needs_medium=False, reports_attention=False),
    0x08: _Opcode(ScsiDisk._read),
    0x0A: _Opcode(ScsiDisk._write),
    0x12: _Opcode(ScsiDisk._inquiry, needs_medium=False, reports_attention=False),
    0x15: _Opcode(ScsiDisk._mode_select_6, needs_medium=False),
    0x1A: _Opcode(ScsiDisk._mode_sense_6, needs_medium=False),
    0x1B: _Opcode(ScsiDisk._start_stop_unit, needs_medium=False),
    0x1E: _Opcode(ScsiDisk._prevent_allow_removal, needs_medium=False),
    0x23: _Opcode(ScsiDisk._read_format_capacities),
    0x25: _Opcode(ScsiDisk._read_capacity_10),
    0x28: _Opcode(ScsiDisk._read),
    0x2A: _Opcode(ScsiDisk._write),
    0x2F: _Opcode(ScsiDisk._verify),
    0x35: _Opcode(ScsiDisk._synchronize_cache),
    0x55: _Opcode(ScsiDisk._mode_select_10, needs_medium=False),
    0x5A: _Opcode(ScsiDisk._mode_sense_10, needs_medium=False),
    0x88: _Opcode(ScsiDisk._read),
    0x8A: _Opcode(ScsiDisk._write),
    0x8F: _Opcode(ScsiDisk._verify),
    0x91: _Opcode(ScsiDisk._synchronize_cache),
    0x9E: _Opcode(ScsiDisk._service_action_in),
    0xA0: _Opcode(ScsiDisk._report_luns, needs_medium=False, reports_attention=False),
    0xA8: _Opcode(ScsiDisk._read),
    0xAA: _Opcode(ScsiDisk._write),
    0xAF: _Opcode(ScsiDisk._verify),
}
"""Every command there is. FORMAT UNIT is missing on purpose: the blocks need no formatting."""

_VITAL_PAGES: Mapping[int, Callable[[ScsiDisk], bytes]] = {
    0x00: ScsiDisk._vital_supported,
    0x80: ScsiDisk._vital_serial,
    0x83: ScsiDisk._vital_identification,
    0xB0: ScsiDisk._vital_block_limits,
    0xB1: ScsiDisk._vital_characteristics,
    0xB2: ScsiDisk._vital_provisioning,
}
"""Vital product data pages, without their headers."""

_EXTENT_LAYOUT: Mapping[int, struct.Struct] = {
    10: struct.Struct(">2xIxH"),
    12: struct.Struct(">2xII"),
    16: struct.Struct(">2xQI"),
}
"""Where block address and block count are, by the length of the command descriptor block."""

_MODE_PAGES = frozenset({(0x08, 0x00), (0x3F, 0x00), (0x3F, 0xFF)})
"""(page, subpage) that MODE SENSE may ask for. 3F is all of them, and Caching is the only one."""

_CHANGEABLE, _DEFAULT, _SAVED = 1, 2, 3
"""Page control of MODE SENSE; 0 is the current values."""

_WRITE_CACHE_ENABLE = 0x04
_CACHING_HEAD = bytes([0x08, 0x12])
_CACHING_CHANGEABLE = _CACHING_HEAD + bytes([_WRITE_CACHE_ENABLE]) + bytes(17)

_VERIFY_PIECE = 1 << 20
"""Bytes read at a time when only their readability matters."""


def _report_to_nobody(sense: Sense | None) -> None:
    """For a task that belongs to no disk yet."""


def _outcome(action: Callable[[], None]) -> Sense | None:
    try:
        action()
    except _CheckCondition as check:
        return check.sense
    return None


def _reply(data: bytes, allocated: int) -> Task:
    """Cut to the allocation length. Nothing left means no data phase, which is no error. Source: SPC-4, 4.2.5.6."""
    data = data[:allocated]
    return _Reply(data) if data else Task()


def _read(medium: Medium, offset: int, length: int) -> bytes:
    try:
        return medium.read(offset, length)
    except OSError:
        raise _CheckCondition(Sense.UNRECOVERED_READ_ERROR) from None


def _sync(medium: Medium) -> None:
    try:
        medium.sync()
    except OSError:
        raise _CheckCondition(Sense.WRITE_ERROR) from None


def _decode_extent(cdb: bytes) -> _Extent:
    if len(cdb) == 6:  # 21 bits of address; a count of 0 stands for 256
        return _Extent(int.from_bytes(cdb[1:4], "big") & 0x1FFFFF, cdb[4] or 256)
    return _Extent(*_EXTENT_LAYOUT[len(cdb)].unpack_from(cdb))


def _forces_unit_access(cdb: bytes) -> bool:
    return len(cdb) > 6 and bool(cdb[1] & 0x08)


def _caching_page(*, write_cache: bool) -> bytes:
    return _CACHING_HEAD + bytes([_WRITE_CACHE_ENABLE if write_cache else 0]) + bytes(17)


def _split_mode_pages(data: bytes) -> list[bytes]:
    """The caching pages of a parameter list. Raises _CheckCondition for anything else."""
    size = len(_CACHING_CHANGEABLE)
    if len(data) % size:
        raise _CheckCondition(Sense.PARAMETER_LIST_LENGTH_ERROR)
    pages = [data[start : start + size] for start in range(0, len(data), size)]
    if any(page[:2] != _CACHING_HEAD for page in pages):
        raise _CheckCondition(Sense.INVALID_FIELD_IN_PARAMETER_LIST)
    return pages


def _ascii(name: str, text: str, limit: int) -> bytes:
    if not re.fullmatch(f"[ -~]{{0,{limit}}}", text):
        raise ValueError(f"{name} must be at most {limit} printable ASCII characters, got {text!r}")
    return text.encode("ascii")
