"""A SCSI disk, without the bus.

::

    disk = ScsiDisk(MemoryMedium(bytes(1 << 20)))
    task = disk.execute(cdb)

Sources: SBC-3 (READ, WRITE and others), SPC-4 (MODE SELECT).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from .medium import BLOCK_SIZE, Buffer, Medium
from .scsi import (
    CHANGEABLE,
    COMMON_COMMANDS,
    COMMON_VITAL_PAGES,
    DEFAULT,
    MAX_BLOCKS,
    BlockTask,
    CheckCondition,
    Command,
    DataPhase,
    Extent,
    Parameters,
    ScsiTarget,
    Sense,
    Task,
    decode_extent,
    outcome,
    read_medium,
    reply,
    sync_medium,
)

__all__ = ["ScsiDisk"]


class _Write(BlockTask):
    """Data-out straight to the medium, written as it comes."""

    phase = DataPhase.OUT

    def __init__(self, medium: Medium, position: int, length: int, *, through: bool) -> None:
        super().__init__(medium, position, length)
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
            sync_medium(self._medium)


class _Compare(BlockTask):
    """Data-out that is compared with the medium. Source: SBC-3, 5.42, BYTCHK 01b."""

    phase = DataPhase.OUT

    def write(self, data: Buffer, /) -> None:
        if self._sense is not None:
            return
        self._sense = outcome(lambda: self._compare(data))
        self._position += len(data)

    def _compare(self, data: Buffer) -> None:
        if read_medium(self._medium, self._position, len(data)) != data:
            raise CheckCondition(Sense.MISCOMPARE_DURING_VERIFY)


class ScsiDisk(ScsiTarget):
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

    device_type = 0x00
    block_size = BLOCK_SIZE
    mode_pages = frozenset({0x08})

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
        self.removable = removable
        self._loaded = True
        super().__init__(vendor=vendor, product=product, revision=revision, serial=serial)

    @property
    def medium(self) -> Medium:
        """What the disk was made with."""
        return self._medium

    @property
    def medium_present(self) -> bool:
        """Whether the medium is loaded, that is, not ejected."""
        return self._loaded

    def reset(self) -> None:
        """Back to the state after power on: medium loaded, removal allowed, unit attention pending."""
        super().reset()
        self._loaded = True
        self._write_cache = True

    # --- what it is ---

    def _vital_block_limits(self) -> bytes:
        return struct.pack(">4xI52x", MAX_BLOCKS)

    def _vital_characteristics(self) -> bytes:
        return struct.pack(">H58x", 0x0001)  # does not rotate

    def _vital_provisioning(self) -> bytes:
        return bytes(4)  # fully provisioned

    def _device_parameter(self) -> int:
        write_protected, dpo_fua = 0x80, 0x10
        return dpo_fua | (write_protected if self._read_only else 0)

    def _mode_page(self, page: int, control: int) -> bytes:
        if control == CHANGEABLE:
            return _CACHING_CHANGEABLE
        return _caching_page(write_cache=self._write_cache or control == DEFAULT)

    def _mode_select_6(self, cdb: bytes) -> Task:
        return self._mode_select(cdb, cdb[4], 4)

    def _mode_select_10(self, cdb: bytes) -> Task:
        return self._mode_select(cdb, int.from_bytes(cdb[7:9], "big"), 8)

    def _mode_select(self, cdb: bytes, length: int, head_size: int) -> Task:
        if cdb[1] & 0x01:  # SP: there is nowhere to save pages
            raise CheckCondition(Sense.INVALID_FIELD_IN_CDB)
        if not length:
            return Task()
        return Parameters(length, lambda data: self._select_modes(data, head_size))

    def _select_modes(self, data: bytes, head_size: int) -> None:
        """Change the write cache; everything else must be as MODE SENSE said."""
        if len(data) < head_size:
            raise CheckCondition(Sense.PARAMETER_LIST_LENGTH_ERROR)
        # The block descriptor length ends the header, in one byte or two.
        descriptors = int.from_bytes(data[head_size // 4 * 3 : head_size], "big")
        if descriptors:
            raise CheckCondition(Sense.INVALID_FIELD_IN_PARAMETER_LIST)
        write_cache = self._write_cache
        for page in _split_mode_pages(data[head_size:]):
            write_cache = bool(page[2] & _WRITE_CACHE_ENABLE)
            if page != _caching_page(write_cache=write_cache):
                raise CheckCondition(Sense.INVALID_FIELD_IN_PARAMETER_LIST)
        if not write_cache:
            self._sync()
        self._write_cache = write_cache

    # --- about the medium: SBC-3 ---

    def _load(self) -> None:
        if not self._loaded:
            self._loaded = True
            self._attention = Sense.MEDIUM_MAY_HAVE_CHANGED

    def _eject(self) -> None:
        if self._loaded:
            self._sync()
        self._loaded = False

    def _stop(self) -> None:
        self._sync()

    def _service_action_in(self, cdb: bytes) -> Task:
        if cdb[1] & 0x1F != 0x10:  # READ CAPACITY (16) is the only one
            raise CheckCondition(Sense.INVALID_FIELD_IN_CDB)
        capacity = struct.pack(">QI20x", self._medium.blocks - 1, BLOCK_SIZE)
        return reply(capacity, int.from_bytes(cdb[10:14], "big"))

    def _read_format_capacities(self, cdb: bytes) -> Task:
        # From MMC, but Windows sends it to every removable disk.
        formatted_medium = 0x02000000
        blocks = min(self._medium.blocks, 0xFFFFFFFF)
        capacities = struct.pack(">3xBII", 8, blocks, formatted_medium | BLOCK_SIZE)
        return reply(capacities, int.from_bytes(cdb[7:9], "big"))

    def _read(self, cdb: bytes) -> Task:
        task = super()._read(cdb)
        if _forces_unit_access(cdb):
            self._sync()  # what is read must be what is stored
        return task

    def _write(self, cdb: bytes) -> Task:
        extent = self._extent(cdb)
        if self._read_only:
            raise CheckCondition(Sense.WRITE_PROTECTED)
        if not extent.blocks:
            return Task()
        return _Write(self._medium, *self._bytes(extent), through=_forces_unit_access(cdb) or not self._write_cache)

    def _verify(self, cdb: bytes) -> Task:
        extent = self._extent(cdb)
        compare = (cdb[1] >> 1) & 0x03
        if compare > 1:
            raise CheckCondition(Sense.INVALID_FIELD_IN_CDB)
        if compare and extent.blocks:
            return _Compare(self._medium, *self._bytes(extent))
        self._verify_readable(extent)
        return Task()

    def _verify_readable(self, extent: Extent) -> None:
        position, size = self._bytes(extent)
        end = position + size
        while position < end:
            length = min(end - position, _VERIFY_PIECE)
            read_medium(self._medium, position, length)
            position += length

    def _synchronize_cache(self, cdb: bytes) -> Task:
        # A count of 0 means all that follows; all is written out in any case.
        self._check_range(decode_extent(cdb))
        self._sync()
        return Task()

    def _sync(self) -> None:
        if not self._read_only:  # nothing to flush, and Windows refuses to
            sync_medium(self._medium)

    commands: ClassVar[Mapping[int, Command]] = {
        **COMMON_COMMANDS,
        0x08: Command(_read),
        0x0A: Command(_write),
        0x15: Command(_mode_select_6, needs_medium=False),
        0x23: Command(_read_format_capacities),
        0x28: Command(_read),
        0x2A: Command(_write),
        0x2F: Command(_verify),
        0x35: Command(_synchronize_cache),
        0x55: Command(_mode_select_10, needs_medium=False),
        0x88: Command(_read),
        0x8A: Command(_write),
        0x8F: Command(_verify),
        0x91: Command(_synchronize_cache),
        0x9E: Command(_service_action_in),
        0xA8: Command(_read),
        0xAA: Command(_write),
        0xAF: Command(_verify),
    }
    """Every command there is. FORMAT UNIT is missing on purpose: the blocks need no formatting."""

    vital_pages: ClassVar[Mapping[int, Callable[[Any], bytes]]] = {
        **COMMON_VITAL_PAGES,
        0xB0: _vital_block_limits,
        0xB1: _vital_characteristics,
        0xB2: _vital_provisioning,
    }


_WRITE_CACHE_ENABLE = 0x04
_CACHING_HEAD = bytes([0x08, 0x12])
_CACHING_CHANGEABLE = _CACHING_HEAD + bytes([_WRITE_CACHE_ENABLE]) + bytes(17)

_VERIFY_PIECE = 1 << 20
"""Bytes read at a time when only their readability matters."""


def _forces_unit_access(cdb: bytes) -> bool:
    return len(cdb) > 6 and bool(cdb[1] & 0x08)


def _caching_page(*, write_cache: bool) -> bytes:
    return _CACHING_HEAD + bytes([_WRITE_CACHE_ENABLE if write_cache else 0]) + bytes(17)


def _split_mode_pages(data: bytes) -> list[bytes]:
    """The caching pages of a parameter list. Raises CheckCondition for anything else."""
    size = len(_CACHING_CHANGEABLE)
    if len(data) % size:
        raise CheckCondition(Sense.PARAMETER_LIST_LENGTH_ERROR)
    pages = [data[start : start + size] for start in range(0, len(data), size)]
    if any(page[:2] != _CACHING_HEAD for page in pages):
        raise CheckCondition(Sense.INVALID_FIELD_IN_PARAMETER_LIST)
    return pages
