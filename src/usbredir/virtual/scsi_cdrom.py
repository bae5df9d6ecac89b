"""A SCSI CD or DVD drive, without the bus: one data track on one disc, which goes in and out.

::

    drive = ScsiCdrom()
    drive.insert(MemoryMedium(image))
    task = drive.execute(cdb)

Source: MMC-6 ("MMC"; commands and features), MMC-3 for mode page 2A; SPC-4.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from enum import IntEnum
from typing import Any, ClassVar, NamedTuple

from .medium import Medium
from .scsi import (
    CHANGEABLE,
    COMMON_COMMANDS,
    COMMON_VITAL_PAGES,
    CheckCondition,
    Command,
    ScsiTarget,
    Sense,
    Task,
    reply,
)

__all__ = ["CD_BLOCK_SIZE", "ScsiCdrom"]

CD_BLOCK_SIZE = 2048
"""Bytes of the user data of a block (Mode 1)."""


class ScsiCdrom(ScsiTarget):
    """A drive with a tray, at first closed and empty.

    The disc lies on the tray, whether it is open or not: what the guest has ejected is back when it loads, unless
    another disc was inserted meanwhile. Neither a reset nor a change of configuration moves the tray.

    Args, exceptions, threads: as :class:`~usbredir.virtual.scsi.ScsiTarget`.
    """

    device_type = 0x05
    block_size = CD_BLOCK_SIZE

    def __init__(self, *, vendor: str, product: str, revision: str, serial: str) -> None:
        self._disc: Medium | None = None
        self._open = False
        self._event = MediaEvent.NONE
        super().__init__(vendor=vendor, product=product, revision=revision, serial=serial)

    # --- tray and disc ---

    @property
    def medium(self) -> Medium:
        """The disc."""
        assert self._disc is not None
        return self._disc

    @property
    def medium_present(self) -> bool:
        """Whether there is a disc and the tray is closed."""
        return self._disc is not None and not self._open

    @property
    def removal_prevented(self) -> bool:
        """Whether the guest has locked the tray."""
        return self._removal_prevented

    def insert(self, disc: Medium) -> Medium | None:
        """Put a disc into the drive and close the tray, locked or not. Returns the disc that was there."""
        before, self._disc = self._disc, disc
        self._open = False
        self._changed()
        return before

    def press_button(self) -> bool:
        """Ask for the disc. False: the guest has locked the tray and is told that somebody wants it open."""
        if self._removal_prevented:
            self._event = MediaEvent.EJECT_REQUEST
            return False
        self._eject()
        return True

    def _load(self) -> None:
        if self._open:
            self._open = False
            if self._disc is not None:
                self._changed()

    def _eject(self) -> None:
        if not self._open:
            self._open = True
            if self._disc is not None:
                self._event = MediaEvent.REMOVAL

    def _stop(self) -> None:
        """Nothing is written, so nothing is left to do."""

    def _changed(self) -> None:
        self._attention = Sense.MEDIUM_MAY_HAVE_CHANGED
        self._event = MediaEvent.NEW

    # --- mode parameters ---

    def _device_parameter(self) -> int:
        return 0

    def _mode_page(self, page: int, control: int) -> bytes:
        content = _MODE_PAGES[page](self)
        return bytes((page, len(content))) + (bytes(len(content)) if control == CHANGEABLE else content)

    def _recovery_page(self) -> bytes:
        return bytes(10)  # read/write error recovery: there are no errors to recover from

    def _capabilities_page(self) -> bytes:
        """What the drive can do. Source: MMC-3, 5.2.3.4 (page 2A)."""
        reads_cd_r_rw_dvd, mode_2, lock, eject, tray = 0x0B, 0x30, 0x01, 0x08, 0x20
        locked = 0x02 if self._removal_prevented else 0
        return struct.pack(
            ">BxBxBxHxxHHxxxx",
            reads_cd_r_rw_dvd,
            mode_2,
            lock | locked | eject | tray,
            _SPEED,
            _BUFFER,
            _SPEED,
        )

    # --- commands: MMC ---

    def _get_configuration(self, cdb: bytes) -> Task:
        wanted, first = cdb[1] & 0x03, int.from_bytes(cdb[2:4], "big")
        if wanted == 3:
            raise CheckCondition(Sense.INVALID_FIELD_IN_CDB)
        profile = self._profile()
        features = [
            _encode_feature(number, feature, profile, current)
            for number, feature in sorted(_FEATURES.items())
            if (number == first if wanted == _ONE_FEATURE else number >= first)
            for current in [feature.profiles is None or profile in feature.profiles]
            if current or wanted != _CURRENT_FEATURES
        ]
        content = struct.pack(">xxH", profile) + b"".join(features)
        return reply(struct.pack(">I", len(content)) + content, _allocated(cdb))

    def _profile(self) -> int:
        if not self.medium_present:
            return 0
        return _CD_ROM if self.blocks <= _MOST_CD_BLOCKS else _DVD_ROM

    def _get_event_status(self, cdb: bytes) -> Task:
        polled, classes = cdb[1] & 0x01, cdb[4]
        if not polled:
            raise CheckCondition(Sense.INVALID_FIELD_IN_CDB)
        if not classes & 1 << _MEDIA_CLASS:
            no_event = 0x80
            return reply(struct.pack(">HBB", 2, no_event, 1 << _MEDIA_CLASS), _allocated(cdb))
        status = (0x01 if self._open else 0) | (0x02 if self.medium_present else 0)
        answer = struct.pack(">HBBBBxx", 6, _MEDIA_CLASS, 1 << _MEDIA_CLASS, self._event, status)
        if _allocated(cdb) >= len(answer):  # it was not told otherwise
            self._event = MediaEvent.NONE
        return reply(answer, _allocated(cdb))

    def _read_toc(self, cdb: bytes) -> Task:
        # Old hosts write the format into the control byte.
        toc_format, track = cdb[2] & 0x0F or cdb[9] >> 6, cdb[6]
        make = _TOCS.get(toc_format)
        if make is None or (toc_format == 0 and track not in (0, 1, _LEAD_OUT)):
            raise CheckCondition(Sense.INVALID_FIELD_IN_CDB)
        content = make(self, track, bool(cdb[1] & 0x02))
        return reply(struct.pack(">H", len(content)) + content, _allocated(cdb))

    def _toc(self, track: int, as_time: bool) -> bytes:
        """Tracks from *track* on: the only one, and the lead-out. Source: MMC, 6.25.3.2."""
        tracks = [(1, 0)] if track <= 1 else []
        entries = [*tracks, (_LEAD_OUT, self.blocks)]
        return bytes((1, 1)) + b"".join(_toc_entry(number, block, as_time) for number, block in entries)

    def _session_toc(self, _track: int, as_time: bool) -> bytes:
        """The last session, which is the first, by its first track."""
        return bytes((1, 1)) + _toc_entry(1, 0, as_time)

    def _full_toc(self, _track: int, _as_time: bool) -> bytes:
        """The lead-in's own entries, always in minutes, seconds and frames. Source: MMC, 6.25.3.4."""
        points = [
            (0xA0, bytes((1, 0, 0))),  # first track; a disc of type CD-ROM
            (0xA1, bytes((1, 0, 0))),  # last track
            (0xA2, _time(self.blocks)),
            (1, _time(0)),
        ]
        entries = [struct.pack(">BBxB3xx3s", 1, _DATA_TRACK, point, time) for point, time in points]
        return bytes((1, 1)) + b"".join(entries)

    def _read_disc_information(self, cdb: bytes) -> Task:
        if cdb[1] & 0x07:  # standard information is the only kind
            raise CheckCondition(Sense.INVALID_FIELD_IN_CDB)
        complete = 0x0E  # last session and disc: nothing can be added
        # First track, sessions, first and last track in the last session; disc type CD-ROM; no addresses to write to.
        content = struct.pack(">BBBBB5x4x4s4s10x", complete, 1, 1, 1, 1, b"\xff" * 4, b"\xff" * 4)
        return reply(struct.pack(">H", len(content)) + content, _allocated(cdb))

    def _read_track_information(self, cdb: bytes) -> Task:
        kind, number = cdb[1] & 0x03, int.from_bytes(cdb[2:6], "big")
        by_block, by_track = kind == 0 and number < self.blocks, kind == 1 and number == 1
        if not (by_block or by_track):
            raise CheckCondition(Sense.INVALID_FIELD_IN_CDB)
        mode_1 = 0x01
        content = struct.pack(">BBxBBxIIIII4x", 1, 1, _DATA_TRACK & 0x0F, mode_1, 0, 0, 0, 0, self.blocks)
        return reply(struct.pack(">H", len(content)) + content, _allocated(cdb))

    def _mechanism_status(self, cdb: bytes) -> Task:
        return reply(struct.pack(">BB6x", 0, 0x10 if self._open else 0), int.from_bytes(cdb[8:10], "big"))

    def _accept(self, cdb: bytes) -> Task:
        return Task()

    mode_pages = frozenset({0x01, 0x2A})

    commands: ClassVar[Mapping[int, Command]] = {
        **COMMON_COMMANDS,
        0x2B: Command(_accept),  # SEEK
        0x43: Command(_read_toc),
        0x46: Command(_get_configuration, needs_medium=False, reports_attention=False),
        0x4A: Command(_get_event_status, needs_medium=False, reports_attention=False),
        0x51: Command(_read_disc_information),
        0x52: Command(_read_track_information),
        0xBB: Command(_accept, needs_medium=False),  # SET CD SPEED
        0xBD: Command(_mechanism_status, needs_medium=False),
    }
    """Every command there is. READ CD is missing: audio is not on these discs, and READ gives the data."""

    vital_pages: ClassVar[Mapping[int, Callable[[Any], bytes]]] = COMMON_VITAL_PAGES


class MediaEvent(IntEnum):
    """What happened since GET EVENT STATUS NOTIFICATION was last asked. Source: MMC, 6.6.3.6."""

    NONE = 0
    EJECT_REQUEST = 1
    NEW = 2
    REMOVAL = 3


class _Feature(NamedTuple):
    """A feature of the drive: its version, its data at the present profile, the profiles that have it (None: all)."""

    version: int
    data: Callable[[int], bytes]
    profiles: frozenset[int] | None = None


_CD_ROM, _DVD_ROM = 0x0008, 0x0010
"""Profiles. Source: MMC, 5.3.1."""
_MOST_CD_BLOCKS = 100 * 60 * 75 - 150
"""Blocks that minutes, seconds and frames can count; a larger image is a DVD."""
_CURRENT_FEATURES, _ONE_FEATURE = 1, 2

_FEATURES: Mapping[int, _Feature] = {
    0x0000: _Feature(0, lambda profile: b"".join(struct.pack(">HBx", p, p == profile) for p in (_DVD_ROM, _CD_ROM))),
    0x0001: _Feature(2, lambda _: struct.pack(">IB3x", 8, 0x01)),  # core: USB
    0x0002: _Feature(1, lambda _: bytes(4)),  # morphing: events are told when asked for
    0x0003: _Feature(0, lambda _: bytes((0x29, 0, 0, 0))),  # removable medium: tray, eject, lock
    0x0010: _Feature(0, lambda _: struct.pack(">IHxx", CD_BLOCK_SIZE, 1), frozenset({_CD_ROM, _DVD_ROM})),  # reads
    0x001E: _Feature(2, lambda _: bytes(4), frozenset({_CD_ROM})),  # CD read
    0x001F: _Feature(0, lambda _: b"", frozenset({_DVD_ROM})),  # DVD read
}
"""Features by number. Source: MMC, 5.3."""

_MODE_PAGES: Mapping[int, Callable[[ScsiCdrom], bytes]] = {
    0x01: ScsiCdrom._recovery_page,
    0x2A: ScsiCdrom._capabilities_page,
}

_TOCS: Mapping[int, Callable[[ScsiCdrom, int, bool], bytes]] = {
    0: ScsiCdrom._toc,
    1: ScsiCdrom._session_toc,
    2: ScsiCdrom._full_toc,
}
"""Formats of READ TOC/PMA/ATIP, each of them (drive, first track, as time)."""

_LEAD_OUT = 0xAA
_DATA_TRACK = 0x14
"""ADR 1, and the control nibble of a data track that must not be copied."""
_MEDIA_CLASS = 4
_SPEED, _BUFFER = 5540, 512
"""Kilobytes: per second (a DVD drive at four times), and of the buffer."""


def _allocated(cdb: bytes) -> int:
    return int.from_bytes(cdb[7:9], "big")


def _encode_feature(number: int, feature: _Feature, profile: int, current: bool) -> bytes:
    persistent = 0x02 if feature.profiles is None else 0
    data = feature.data(profile)
    return struct.pack(">HBB", number, feature.version << 2 | persistent | current, len(data)) + data


def _toc_entry(track: int, block: int, as_time: bool) -> bytes:
    address = b"\0" + _time(block) if as_time else struct.pack(">I", block)
    return struct.pack(">xBBx", _DATA_TRACK, track) + address


def _time(block: int) -> bytes:
    """Minutes, seconds and frames of a block; 99:59:74 for what is beyond. Source: MMC, 4.2.3.1."""
    position = min(block + 150, 100 * 60 * 75 - 1)
    minutes, rest = divmod(position, 60 * 75)
    return bytes((minutes, *divmod(rest, 75)))
