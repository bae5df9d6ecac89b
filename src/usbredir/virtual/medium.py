"""What a virtual disk keeps its blocks on: a file, a block device, or memory.

A medium knows bytes and offsets and nothing of SCSI. Failures are :class:`OSError`;
the disk on top of it turns them into sense data.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
import threading
from collections.abc import Callable
from typing import Protocol, TypeAlias

__all__ = ["BLOCK_SIZE", "Buffer", "FileMedium", "Medium", "MediumSource", "MemoryMedium", "open_medium"]

Buffer: TypeAlias = bytes | bytearray | memoryview
"""What carries data. It is not kept beyond the call."""

BLOCK_SIZE = 512
"""Bytes of a logical block. Fixed: boot firmware knows no other size on a USB disk."""


class Medium(Protocol):
    """Blocks of :data:`BLOCK_SIZE` bytes, addressed by the byte.

    Threads: one caller at a time. Every method may raise OSError.
    """

    @property
    def blocks(self) -> int:
        """Number of blocks, at least 1. Does not change."""
        ...

    @property
    def read_only(self) -> bool:
        """Whether writing is impossible."""
        ...

    def read(self, offset: int, length: int) -> bytes:
        """Exactly *length* bytes from byte *offset*, which lie within the blocks."""
        ...

    def write(self, offset: int, data: Buffer, /) -> None:
        """Store all of *data* at byte *offset*. A later read sees it, from another process as well."""
        ...

    def sync(self) -> None:
        """Return when everything written is on stable storage."""
        ...

    def close(self) -> None:
        """Let the medium go. Idempotent; afterwards reads and writes raise OSError."""
        ...


MediumSource: TypeAlias = str | os.PathLike[str] | Buffer | Medium
"""What a medium is made from: a path, the content, or one of one's own."""


class FileMedium:
    """A disk image or block device, read and written in place and never loaded.

    A tail shorter than a block is out of reach. The file must not shrink while in use; reads
    of what is missing then fail.

    Args:
        path: image file, or block device.
        read_only: open for reading only.

    Raises:
        OSError: the file cannot be opened, is no image, or is smaller than one block.
    """

    def __init__(self, path: str | os.PathLike[str], read_only: bool = False) -> None:
        self._path = os.fspath(path)
        self._read_only = read_only
        self._position_lock = threading.Lock()
        # Windows has neither; there the file position is shared state, hence the lock.
        self._pread: Callable[[int, int, int], bytes] = getattr(os, "pread", self._seek_and_read)
        self._pwrite: Callable[[int, Buffer, int], int] = getattr(os, "pwrite", self._seek_and_write)
        self._fd = _open_image(self._path, read_only)
        try:
            self._blocks = _image_blocks(self._fd, self._path)
        except OSError:
            self.close()
            raise

    def __repr__(self) -> str:
        return f"<FileMedium {self._path!r} blocks={self._blocks}>"

    @property
    def blocks(self) -> int:
        """Number of whole blocks in the file when it was opened."""
        return self._blocks

    @property
    def read_only(self) -> bool:
        """Whether the file was opened for reading only."""
        return self._read_only

    def read(self, offset: int, length: int) -> bytes:
        """Exactly *length* bytes from *offset*. Raises OSError, also when the file has shrunk."""
        data = self._pread(self._fd, length, offset)
        if len(data) == length:
            return data
        return self._read_rest([data], offset + len(data), length - len(data))

    def write(self, offset: int, data: Buffer, /) -> None:
        """Give all of *data* to the operating system at *offset*. Raises OSError."""
        written = self._pwrite(self._fd, data, offset)
        if written == len(data):
            return
        rest = memoryview(data)[written:]
        while rest:
            offset += written
            written = self._pwrite(self._fd, rest, offset)
            rest = rest[written:]

    def sync(self) -> None:
        """Flush the file's data to stable storage. Raises OSError."""
        _flush(self._fd)

    def close(self) -> None:
        """Close the file. Idempotent."""
        # -1 and not the old number, which the next open file would have.
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _read_rest(self, parts: list[bytes], offset: int, length: int) -> bytes:
        while length:
            part = self._pread(self._fd, length, offset)
            if not part:
                raise OSError(errno.EIO, "file is shorter than when it was opened", self._path)
            parts.append(part)
            offset += len(part)
            length -= len(part)
        return b"".join(parts)

    def _seek_and_read(self, fd: int, length: int, offset: int) -> bytes:
        with self._position_lock:
            os.lseek(fd, offset, os.SEEK_SET)
            return os.read(fd, length)

    def _seek_and_write(self, fd: int, data: Buffer, offset: int) -> int:
        with self._position_lock:
            os.lseek(fd, offset, os.SEEK_SET)
            return os.write(fd, data)


class MemoryMedium:
    """A disk in memory, gone with the process.

    Args:
        content: initial bytes, copied. A tail shorter than a block is out of reach.
        read_only: refuse writes.

    Raises:
        ValueError: *content* is smaller than one block.
    """

    def __init__(self, content: Buffer, read_only: bool = False) -> None:
        self._content = bytearray(content)
        self._blocks = len(self._content) // BLOCK_SIZE
        self._read_only = read_only
        if not self._blocks:
            raise ValueError(f"a disk needs at least one block of {BLOCK_SIZE} bytes, got {len(self._content)} bytes")

    def __repr__(self) -> str:
        return f"<MemoryMedium blocks={self._blocks}>"

    @property
    def blocks(self) -> int:
        """Number of whole blocks."""
        return self._blocks

    @property
    def read_only(self) -> bool:
        """Whether writes are refused."""
        return self._read_only

    def read(self, offset: int, length: int) -> bytes:
        """*length* bytes from *offset*, copied: what is on its way must not change with a later write."""
        with memoryview(self._content) as view:
            data = bytes(view[offset : offset + length])
        if len(data) != length:
            raise OSError(errno.EIO, "read beyond the end of the medium")
        return data

    def write(self, offset: int, data: Buffer, /) -> None:
        """Store *data* at *offset*. Raises OSError when that is not within the blocks, or after close."""
        if offset + len(data) > len(self._content):
            raise OSError(errno.EIO, "write beyond the end of the medium")
        self._content[offset : offset + len(data)] = data

    def sync(self) -> None:
        """Nothing to do: memory is all there is."""

    def close(self) -> None:
        """Free the memory. Idempotent."""
        self._content = bytearray()


def open_medium(source: MediumSource, *, read_only: bool = False) -> Medium:
    """A file or block device in place, bytes as a copy, a medium as it is. Raises what these raise."""
    if isinstance(source, (str, os.PathLike)):
        return FileMedium(source, read_only)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return MemoryMedium(source, read_only)
    return source


def _open_image(path: str, read_only: bool) -> int:
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    # Before opening, because opening a FIFO would wait for its other end.
    if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):
        raise OSError(errno.EINVAL, "neither a file nor a block device", path)
    return os.open(path, (os.O_RDONLY if read_only else os.O_RDWR) | getattr(os, "O_BINARY", 0))


def _image_blocks(fd: int, path: str) -> int:
    # Not fstat, which says 0 for a block device.
    blocks = os.lseek(fd, 0, os.SEEK_END) // BLOCK_SIZE
    if not blocks:
        raise OSError(errno.EINVAL, f"smaller than one block of {BLOCK_SIZE} bytes", path)
    return blocks


if sys.platform == "darwin":
    import fcntl

    def _flush(fd: int) -> None:
        # fsync stops at the drive's own cache there; F_FULLFSYNC is refused by some file systems.
        try:
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
        except OSError:
            os.fsync(fd)

elif hasattr(os, "fdatasync"):
    _flush = os.fdatasync
else:
    _flush = os.fsync
