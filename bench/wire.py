"""The packets that are measured, and ready-made bytes of them.

Made with ``struct`` from the published layouts and not with the library, which is what is measured.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

__all__ = ["DEVICE_CONNECT", "KINDS", "Kind", "bulk_request", "hello", "packet", "stream"]

_HEADER = struct.Struct("<IIQ")  # type, length, id: with 64-bit ids
_BULK = struct.Struct("<BBHIH")  # endpoint, status, length, stream, its upper half
_HELLO = struct.Struct("<III64sI")
_ALL_CAPABILITIES = 0xFF
_PATTERN = bytes((i * 7 + 3) & 0xFF for i in range(256)) * 4096


class Kind(NamedTuple):
    """A packet to measure: what it is and how many bytes it carries."""

    name: str
    transfer: str
    size: int

    @property
    def payload(self) -> bytes:
        """The bytes it carries."""
        return _PATTERN[: self.size]


KINDS = tuple(
    Kind(name, name.split()[0], size)
    for name, size in (
        ("bulk 64 B", 64),
        ("bulk 512 B", 512),
        ("bulk 4 KiB", 4096),
        ("bulk 64 KiB", 64 * 1024),
        ("bulk 1 MiB", 1024 * 1024),
        ("interrupt 8 B", 8),
        ("control 8 B", 8),
    )
)
"""In the order of the tables."""


def hello() -> bytes:
    """A hello that announces every capability."""
    return _HELLO.pack(0, 68, 0, b"bench", _ALL_CAPABILITIES)


DEVICE_CONNECT = _HEADER.pack(1, 10, 0) + bytes(10)
"""Nobody looks at what is in it."""


def bulk_request(endpoint: int, size: int) -> bytes:
    """A guest's request to receive *size* bytes."""
    return _HEADER.pack(101, _BULK.size, 1) + _BULK.pack(endpoint, 0, size & 0xFFFF, 0, size >> 16)


def packet(kind: Kind, packet_id: int) -> bytes:
    """One packet as a host sends it to a guest."""
    size = kind.size
    if kind.transfer == "bulk":
        number, head = 101, _BULK.pack(0x81, 0, size & 0xFFFF, 0, size >> 16)
    elif kind.transfer == "interrupt":
        number, head = 103, struct.pack("<BBH", 0x82, 0, size)
    else:
        number, head = 100, struct.pack("<BBBBHHH", 0x80, 6, 0x80, 0, 0x100, 0, size)
    return _HEADER.pack(number, len(head) + size, packet_id) + head + kind.payload


def stream(kind: Kind, count: int) -> bytes:
    """*count* packets in a row."""
    return b"".join(packet(kind, i) for i in range(count))
