"""FAT16 and FAT32 file systems: make one from files, and read its files back.

::

    image = make_image({"hello.txt": b"hello"})
    FatReader(lambda offset, length: image[offset : offset + length]).read("hello.txt")

The whole disk is one file system without a partition table, as on a floppy; all systems accept that on
a removable disk. Only the root directory is written and read. Source: "Microsoft FAT Specification",
2005 (called FATSPEC below).
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

__all__ = ["FatReader", "make_image", "read_files"]

_SECTOR = 512
_ENTRY = 32
_COPIES = 2
_MEDIA = 0xF8

_FAT16_MIN_CLUSTERS = 4085
_FAT32_MIN_CLUSTERS = 65525
_FAT32_MAX_CLUSTERS = 0x0FFFFFF5
# Drivers that count wrongly are off by a few clusters at the limits. Source: FATSPEC, 3.5.
_MARGIN = 16
_FAT32_FROM = 260 << 20  # the least that has enough clusters of 4 KiB
_MAX_IMAGE = 0xFFFFFFFF * _SECTOR
_MAX_FILE = 0xFFFFFFFF
_MAX_ENTRIES = 0x10000
"""Entries of a directory: 2 MiB of them. Source: FATSPEC, 6."""

_READ_ONLY, _LABEL, _DIRECTORY, _ARCHIVE, _LONG = 0x01, 0x08, 0x10, 0x20, 0x0F
_LOWER_BASE, _LOWER_EXTENSION = 0x08, 0x10
_LAST_PART = 0x40
_PART = 13
"""Characters of a long name in one directory entry."""

_DATE = (2024 - 1980) << 9 | 1 << 5 | 1  # always the same, so that an image is too

_ENTRY_LAYOUT = struct.Struct("<11sBBBHHHHHHHI")
_LONG_LAYOUT = struct.Struct("<B10sBBB12sH4s")
_BIOS_LAYOUT = struct.Struct("<3s8sHBHBHHBHHHII")

_SHORT_NAME = re.compile(
    r"([A-Z0-9$%'_@~`!(){}^#&-]{1,8})(?:\.([A-Z0-9$%'_@~`!(){}^#&-]{1,3}))?", re.ASCII | re.IGNORECASE
)
_NOT_SHORT = re.compile(r"[^A-Z0-9$%'_@~`!(){}^#&-]")
_NOT_LONG = re.compile(r'[\x00-\x1f\x7f\uffff"*/:<>?\\|]')  # U+FFFF is what pads a name

# Ends by a jump to itself, after the BIOS call for "try the next disk".
_BOOT_CODE = b"\xcd\x18\xeb\xfe"


class _Geometry(NamedTuple):
    """Where things are, in sectors, and how FAT entries look."""

    wide: bool  # FAT32
    sector: int  # bytes
    total: int
    reserved: int
    table: int  # of one copy
    copies: int
    root: int  # FAT16 only
    cluster: int

    @property
    def root_start(self) -> int:
        return self.reserved + self.copies * self.table

    @property
    def data_start(self) -> int:
        return self.root_start + self.root

    @property
    def clusters(self) -> int:
        return max(0, self.total - self.data_start) // self.cluster

    @property
    def cluster_bytes(self) -> int:
        return self.cluster * self.sector

    @property
    def entry_bytes(self) -> int:
        return 4 if self.wide else 2


class _Entry(NamedTuple):
    """A file of the root directory."""

    name: str
    first_cluster: int
    size: int


# --- writing ---------------------------------------------------------------------------------


def make_image(files: Mapping[str, bytes], *, size: int = 16 << 20, label: str = "USBREDIR") -> bytes:
    """A disk image with *files* in the root directory of a FAT file system.

    The same arguments give the same image.

    Args:
        files: content by name. Long names are fine; names differ in more than upper and lower case.
        size: bytes of the image, rounded down to a whole sector of 512. FAT16 below 260 MiB, FAT32 from
            there on; at least about 2.2 MiB.
        label: volume label, up to 11 characters, or empty.

    Raises:
        ValueError: a name or the label is not allowed, the size is out of range, or the files do not fit.
    """
    geometry = _plan(size)
    raw_label = _raw_label(label)
    serial = zlib.crc32("\0".join([label, str(size), *files]).encode())
    layout = _place(geometry, files, raw_label)
    head = _boot_sectors(geometry, raw_label, serial, layout.next_free)
    table = layout.table.ljust(geometry.table * _SECTOR, b"\0")
    used = [head, *[table] * _COPIES, layout.data]
    rest = geometry.total * _SECTOR - sum(map(len, used))
    return b"".join([*used, bytes(rest)])


class _Layout(NamedTuple):
    """What is behind the boot sectors."""

    table: bytes  # one copy of the file allocation table, as far as it is used
    data: bytes  # FAT16 root directory, then clusters, as far as they are used
    next_free: int


def _plan(size: int) -> _Geometry:
    """Choose type and cluster size."""
    if not 0 < size <= _MAX_IMAGE:
        raise ValueError(f"a FAT image cannot have {size} bytes")
    wide = size >= _FAT32_FROM
    low = _FAT32_MIN_CLUSTERS if wide else _FAT16_MIN_CLUSTERS
    # The first sector count that keeps the table small enough, for FAT32 about 8 MiB.
    high = 1 << 21 if wide else _FAT32_MIN_CLUSTERS - 1
    cluster = 8 if wide else 1
    while (geometry := _fit(size // _SECTOR, cluster, wide)).clusters > high - _MARGIN and cluster < 64:
        cluster *= 2
    if geometry.clusters < low + _MARGIN:
        raise ValueError(f"{size} bytes are too few for a FAT16 image")
    return geometry


def _fit(total: int, cluster: int, wide: bool) -> _Geometry:
    """The geometry with the smallest table that covers its clusters."""
    geometry = _Geometry(wide, _SECTOR, total, 32 if wide else 1, 1, _COPIES, 0 if wide else 32, cluster)
    while True:
        needed = -(-(geometry.clusters + 2) * geometry.entry_bytes // _SECTOR)
        if needed <= geometry.table:
            return geometry
        geometry = geometry._replace(table=needed)


def _place(geometry: _Geometry, files: Mapping[str, bytes], raw_label: bytes) -> _Layout:
    """Put the directory first and the files behind it, each in one run of clusters."""
    directory_size = _ENTRY * _count_entries(files, raw_label)
    limit = _ENTRY * _MAX_ENTRIES if geometry.wide else geometry.root * _SECTOR
    if directory_size > limit:
        raise ValueError("too many files, or too long names, for the root directory")
    runs = [max(1, _clusters_of(geometry, directory_size))] if geometry.wide else []
    runs += [_clusters_of(geometry, len(content)) for content in files.values()]
    if sum(runs) > geometry.clusters:
        raise ValueError(f"the files do not fit: {sum(runs)} clusters needed, {geometry.clusters} there")
    starts = _starts(runs)
    directory = _directory(files, raw_label, starts[len(runs) - len(files) :])
    root_size = runs[0] * geometry.cluster_bytes if geometry.wide else limit
    parts = [directory.ljust(root_size, b"\0")]
    parts += [_padded(geometry, content) for content in files.values()]
    return _Layout(_table(geometry, runs), b"".join(parts), 2 + sum(runs))


def _clusters_of(geometry: _Geometry, length: int) -> int:
    return -(-length // geometry.cluster_bytes)


def _padded(geometry: _Geometry, content: bytes) -> bytes:
    return content.ljust(_clusters_of(geometry, len(content)) * geometry.cluster_bytes, b"\0")


def _starts(runs: list[int]) -> list[int]:
    """First cluster of each run; 0 for an empty one."""
    starts, cluster = [], 2
    for run in runs:
        starts.append(cluster if run else 0)
        cluster += run
    return starts


def _table(geometry: _Geometry, runs: list[int]) -> bytes:
    """The file allocation table: every run a chain, and all volume flags "clean"."""
    end = 0x0FFFFFFF if geometry.wide else 0xFFFF
    links = [end & ~0xFF | _MEDIA, end]
    for run in runs:
        links += range(len(links) + 1, len(links) + run)
        links += [end] * bool(run)
    return struct.pack(f"<{len(links)}{'I' if geometry.wide else 'H'}", *links)


def _boot_sectors(geometry: _Geometry, raw_label: bytes, serial: int, next_free: int) -> bytes:
    """All reserved sectors. Source: FATSPEC, 3.1 to 3.4 and 5."""
    boot = _signed(_wide_boot(geometry, raw_label, serial) if geometry.wide else _boot(geometry, raw_label, serial))
    if not geometry.wide:
        return boot
    free = geometry.clusters - (next_free - 2)
    information = _signed(b"RRaA".ljust(484, b"\0") + struct.pack("<4sII", b"rrAa", free, next_free))
    # The copy at sector 6 is for repair.
    copy = (boot + information + _signed(b"")).ljust(6 * _SECTOR, b"\0")
    return (copy + copy).ljust(geometry.reserved * _SECTOR, b"\0")


def _signed(sector: bytes) -> bytes:
    return sector.ljust(_SECTOR - 2, b"\0") + b"\x55\xaa"


def _boot(geometry: _Geometry, raw_label: bytes, serial: int) -> bytes:
    head = _bios_parameters(geometry, b"\xeb\x3c\x90")
    return head + struct.pack("<BxBI11s8s", 0x80, 0x29, serial, raw_label, b"FAT16   ") + _BOOT_CODE


def _wide_boot(geometry: _Geometry, raw_label: bytes, serial: int) -> bytes:
    root_cluster, information_sector, copy_sector = 2, 1, 6
    head = _bios_parameters(geometry, b"\xeb\x58\x90")
    extension = struct.pack("<IHHIHH12x", geometry.table, 0, 0, root_cluster, information_sector, copy_sector)
    return head + extension + struct.pack("<BxBI11s8s", 0x80, 0x29, serial, raw_label, b"FAT32   ") + _BOOT_CODE


def _bios_parameters(geometry: _Geometry, jump: bytes) -> bytes:
    small = geometry.total if geometry.total < 0x10000 and not geometry.wide else 0
    return _BIOS_LAYOUT.pack(
        jump,
        b"USBREDIR",
        _SECTOR,
        geometry.cluster,
        geometry.reserved,
        _COPIES,
        geometry.root * _SECTOR // _ENTRY,
        small,
        _MEDIA,
        0 if geometry.wide else geometry.table,
        63,  # sectors of a track and heads: as every tool says, and nobody uses
        255,
        0,
        0 if small else geometry.total,
    )


def _count_entries(files: Mapping[str, bytes], raw_label: bytes) -> int:
    return sum(len(_long_parts(name)) + 1 for name in files) + (raw_label != _NO_LABEL)


def _directory(files: Mapping[str, bytes], raw_label: bytes, starts: list[int]) -> bytes:
    entries = []
    if raw_label != _NO_LABEL:
        entries.append(_pack_entry(raw_label, _LABEL, 0, 0))
    for (name, content), short, start in zip(files.items(), _short_names(list(files)), starts, strict=True):
        if len(content) > _MAX_FILE:
            raise ValueError(f"{name!r} is too long for FAT")
        entries += _pack_long(name, short)
        entries.append(_pack_entry(short, _ARCHIVE, start, len(content)))
    return b"".join(entries)


def _pack_entry(short: bytes, attributes: int, cluster: int, size: int) -> bytes:
    high, low = divmod(cluster, 0x10000)
    return _ENTRY_LAYOUT.pack(short, attributes, 0, 0, 0, _DATE, _DATE, high, 0, _DATE, low, size)


def _long_parts(name: str) -> list[bytes]:
    """The name in parts of 13 UTF-16 units, padded; none when the short name says it all."""
    if _SHORT_NAME.fullmatch(name) and name == name.upper():
        return []
    raw = name.encode("utf-16-le")
    width = 2 * _PART
    if len(raw) % width:
        raw = (raw + b"\0\0").ljust(-(-len(raw) // width) * width, b"\xff")
    return [raw[start : start + width] for start in range(0, len(raw), width)]


def _pack_long(name: str, short: bytes) -> list[bytes]:
    """Entries of a long name, last part first. Source: FATSPEC, 7."""
    parts, checksum = _long_parts(name), _checksum(short)
    entries = []
    for number, part in enumerate(parts, 1):
        order = number | (_LAST_PART if number == len(parts) else 0)
        entries.append(_LONG_LAYOUT.pack(order, part[:10], _LONG, 0, checksum, part[10:22], 0, part[22:]))
    return entries[::-1]


def _checksum(short: bytes) -> int:
    total = 0
    for byte in short:
        total = ((total >> 1) + (total << 7) + byte) & 0xFF
    return total


def _short_names(names: list[str]) -> list[bytes]:
    """A short name for each name, all different."""
    for name in names:
        _check_name(name)
    folded = [name.upper() for name in names]
    if len(set(folded)) != len(folded):
        raise ValueError("file names must differ in more than upper and lower case")
    own = [_SHORT_NAME.fullmatch(name) for name in names]
    taken = {_pad_short(match[1], match[2]) for match in own if match}
    tails: dict[tuple[str, str], int] = {}
    return [
        _pad_short(match[1], match[2]) if match else _alias(name, taken, tails)
        for name, match in zip(names, own, strict=True)
    ]


def _check_name(name: str) -> None:
    units = len(name.encode("utf-16-le")) // 2
    if not 1 <= units <= 255 or _NOT_LONG.search(name) or name != name.rstrip(". ") or name != name.lstrip(" "):
        raise ValueError(f"not a file name on FAT: {name!r}")


def _alias(name: str, taken: set[bytes], tails: dict[tuple[str, str], int]) -> bytes:
    """BASE~1.EXT, with the next number that is free. *tails* remembers it. Source: FATSPEC, 7.4."""
    base, _, extension = name.upper().replace(" ", "").lstrip(".").rpartition(".")
    if not base:
        base, extension = extension, ""
    base, extension = (_NOT_SHORT.sub("_", part) for part in (base.replace(".", ""), extension))
    key = (base[:6], extension[:3])
    while True:
        number = tails[key] = tails.get(key, 0) + 1
        tail = f"~{number}"
        short = _pad_short(base[: 8 - len(tail)] + tail, extension[:3])
        if short not in taken:
            taken.add(short)
            return short


def _pad_short(base: str, extension: str | None) -> bytes:
    return (base.ljust(8) + (extension or "").ljust(3)).upper().encode("ascii")


_NO_LABEL = b"NO NAME    "


def _raw_label(label: str) -> bytes:
    if not label:
        return _NO_LABEL
    upper = label.upper()
    if len(upper) > 11 or upper != upper.strip() or _NOT_SHORT.search(upper.replace(" ", "")):
        raise ValueError(f"not a volume label: {label!r}")
    return upper.encode("ascii").ljust(11)


# --- reading ---------------------------------------------------------------------------------


def read_files(read: Callable[[int, int], bytes]) -> dict[str, bytes]:
    """All files of the root directory, content by name. Arguments and errors as for :class:`FatReader`."""
    reader = FatReader(read)
    return {name: reader.read(name) for name in reader.names()}


class FatReader:
    """Reads the files in the root directory of a FAT16 or FAT32 file system.

    Nothing in the image is trusted: what is inconsistent raises ValueError, and the work done is bounded
    by the size of the image.

    Args:
        read: ``read(offset, length)`` gives *length* bytes from byte *offset* of the disk; fewer at its end.

    Raises:
        ValueError: there is no FAT16 or FAT32 file system, or it is damaged. What *read* raises passes through.
    """

    def __init__(self, read: Callable[[int, int], bytes]) -> None:
        self._read_at = read
        sector = self._bytes(0, _SECTOR)
        self._geometry = _parse_boot(sector)
        self._root_cluster = int.from_bytes(sector[44:48], "little") if self._geometry.wide else 0
        self._cached_table: tuple[int, bytes] = (-1, b"")
        self._entries = {entry.name: entry for entry in self._list()}

    def names(self) -> list[str]:
        """Names of the files, long names where there are any, in the directory's order."""
        return list(self._entries)

    def read(self, name: str) -> bytes:
        """The content of the file called *name*.

        Raises:
            KeyError: there is no such file.
            ValueError: the file's cluster chain is damaged, or the disk ends before it.
        """
        entry = self._entries[name]
        wanted = -(-entry.size // self._geometry.cluster_bytes)
        chain = self._chain(entry.first_cluster, wanted) if wanted else []
        if len(chain) < wanted:
            raise ValueError(f"{name!r}: the cluster chain ends too early")
        return b"".join(map(self._cluster, chain))[: entry.size]

    def _bytes(self, offset: int, length: int) -> bytes:
        data = self._read_at(offset, length)
        if len(data) != length:
            raise ValueError(f"the disk ends within the {length} bytes at {offset}")
        return data

    def _cluster(self, cluster: int) -> bytes:
        geometry = self._geometry
        sector = geometry.data_start + (cluster - 2) * geometry.cluster
        return self._bytes(sector * geometry.sector, geometry.cluster_bytes)

    def _chain(self, first: int, limit: int) -> list[int]:
        """Clusters from *first* on, at most *limit*; each only once, or a loop would be read for ever."""
        end = 0x0FFFFFF8 if self._geometry.wide else 0xFFF8
        chain: dict[int, None] = {}
        cluster = first
        while cluster < end and len(chain) < limit:
            if not 2 <= cluster < self._geometry.clusters + 2 or cluster in chain:
                raise ValueError(f"the cluster chain from {first} is damaged at {cluster}")
            chain[cluster] = None
            cluster = self._link(cluster)
        return list(chain)

    def _link(self, cluster: int) -> int:
        geometry = self._geometry
        sector, position = divmod(cluster * geometry.entry_bytes, geometry.sector)
        if self._cached_table[0] != sector:
            offset = (geometry.reserved + sector) * geometry.sector
            self._cached_table = (sector, self._bytes(offset, geometry.sector))
        raw = self._cached_table[1][position : position + geometry.entry_bytes]
        return int.from_bytes(raw, "little") & 0x0FFFFFFF

    def _list(self) -> Iterator[_Entry]:
        parts: list[bytes] = []
        for raw in self._raw_entries():
            attributes = raw[11]
            if raw[0] == 0xE5:
                parts = []
            elif attributes & 0x3F == _LONG:
                parts.append(raw)
            else:
                if not attributes & (_LABEL | _DIRECTORY):
                    yield self._entry(raw, parts)
                parts = []

    def _entry(self, raw: bytes, parts: list[bytes]) -> _Entry:
        _, _, _, _, _, _, _, high, _, _, low, size = _ENTRY_LAYOUT.unpack(raw)
        name = _long_name(parts, _checksum(raw[:11])) or _short_name(raw)
        return _Entry(name, low | (high << 16 if self._geometry.wide else 0), size)

    def _raw_entries(self) -> Iterator[bytes]:
        for block in self._directory_blocks():
            for start in range(0, len(block), _ENTRY):
                if not block[start]:
                    return
                yield block[start : start + _ENTRY]

    def _directory_blocks(self) -> Iterator[bytes]:
        geometry = self._geometry
        if not geometry.wide:
            yield self._bytes(geometry.root_start * geometry.sector, geometry.root * geometry.sector)
            return
        most = -(-_MAX_ENTRIES * _ENTRY // geometry.cluster_bytes)
        yield from map(self._cluster, self._chain(self._root_cluster, most))


def _parse_boot(sector: bytes) -> _Geometry:
    """Check the BIOS parameter block. Source: FATSPEC, 3.1 to 3.5."""
    fields = _BIOS_LAYOUT.unpack_from(sector)
    _, _, sector_bytes, cluster, reserved, copies, root_entries, small, _, table, _, _, _, large = fields
    wide = not table
    root, remainder = divmod(root_entries * _ENTRY, sector_bytes or 1)
    sound = (
        sector[510:] == b"\x55\xaa"
        and sector_bytes in (512, 1024, 2048, 4096)
        and cluster in (1, 2, 4, 8, 16, 32, 64, 128)
        and reserved
        and copies
        and not remainder
        and bool(root) != wide
    )
    if not sound:
        raise ValueError("not a FAT16 or FAT32 file system")
    table = table or int.from_bytes(sector[36:40], "little")
    geometry = _Geometry(wide, sector_bytes, small or large, reserved, table, copies, root, cluster)
    low, high = (1, _FAT32_MAX_CLUSTERS) if wide else (_FAT16_MIN_CLUSTERS, _FAT32_MIN_CLUSTERS)
    if not low <= geometry.clusters < high:
        raise ValueError("the number of clusters does not suit FAT16 or FAT32")
    if table * sector_bytes < (geometry.clusters + 2) * geometry.entry_bytes:
        raise ValueError("the file allocation table is too small")
    return geometry


def _long_name(parts: list[bytes], checksum: int) -> str | None:
    """The name that *parts* make, or None when they do not belong together."""
    text = b""
    for number, raw in zip(range(len(parts), 0, -1), parts, strict=True):
        order, first, _, _, part_checksum, second, _, third = _LONG_LAYOUT.unpack(raw)
        if order != number | (_LAST_PART if number == len(parts) else 0) or part_checksum != checksum:
            return None
        text = first + second + third + text
    try:
        return text.decode("utf-16-le").partition("\0")[0]
    except UnicodeDecodeError:
        return None


def _short_name(raw: bytes) -> str:
    """The 8.3 name; code page 437 stands in for whichever was used."""
    first = b"\xe5" if raw[0] == 0x05 else raw[:1]  # 0xE5 itself would say "deleted"
    base = (first + raw[1:8]).decode("cp437").rstrip(" ")
    extension = raw[8:11].decode("cp437").rstrip(" ")
    base = base.lower() if raw[12] & _LOWER_BASE else base
    extension = extension.lower() if raw[12] & _LOWER_EXTENSION else extension
    return f"{base}.{extension}" if extension else base
