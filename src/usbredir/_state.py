"""The migration state: a parser's situation as bytes, compatible with the C library's.

:func:`pack` and :func:`unpack` know the format and nothing of a parser; every count is checked
before it is used. Source: docs/protocol.md, "Migration state".
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

from .errors import StateError

__all__ = ["Reader", "State", "pack"]

MAGIC = 0x55525031
WORD_BYTES = 4
"""Bytes of a capability set: one word."""

MESSAGES = {
    "state_underrun": "it ends too early",
    "state_overrun": "a block is longer than it may be",
    "state_bad_magic": "it is not a usbredir parser state",
    "state_length_mismatch": "its length field differs from its length",
    "state_not_pristine": "this parser has already received part of a packet",
    "state_source_has_extra_caps": "the source has capabilities that this parser lacks",
    "packet_too_large": "the open packet is above the size limit",
    "state_header_invalid": "the header of the open packet is not valid",
    "state_empty_write_buffer": "a queued packet is empty",
    "state_trailing_bytes": "bytes are left behind its end",
}
"""What can be wrong with a state, by the key that StateError carries."""


def state_error(reason: str) -> StateError:
    """The error for one of the keys of :data:`MESSAGES`."""
    return StateError(f"the migration state cannot be loaded: {MESSAGES[reason]}", reason=reason)


class State(NamedTuple):
    """What a migration state holds. *peer* is None while the peer's hello has not come."""

    own: int
    peer: int | None
    skip: int
    header: bytes
    type_header: bytes
    data: bytes
    queue: Sequence[bytes]


def pack(state: State) -> bytes:
    """The bytes of *state*."""
    parts = [
        _block(state.own.to_bytes(WORD_BYTES, "little")),
        _block(b"" if state.peer is None else state.peer.to_bytes(WORD_BYTES, "little")),
        struct.pack("<I", state.skip),
        _block(state.header),
        _block(state.type_header),
        _block(state.data),
        struct.pack("<I", len(state.queue)),
        *map(_block, state.queue),
    ]
    body = b"".join(parts)
    return struct.pack("<II", MAGIC, len(body) + 8) + body


def _block(data: bytes) -> bytes:
    return struct.pack("<I", len(data)) + data


class Reader:
    """Reads numbers and blocks one after the other; every method raises StateError when bytes are missing."""

    def __init__(self, state: bytes) -> None:
        self._state = state
        self._pos = 0

    def check_magic(self) -> None:
        """The first number."""
        if self.number() != MAGIC:
            raise state_error("state_bad_magic")

    def check_length(self) -> None:
        """The second number."""
        if self.number() != len(self._state):
            raise state_error("state_length_mismatch")

    def number(self) -> int:
        """A 32-bit number."""
        return int.from_bytes(self._bytes(4), "little")

    def block(self, most: int | None) -> bytes:
        """A count and that many bytes, at most *most*."""
        count = self.number()
        if count > len(self._state) - self._pos:
            raise state_error("state_underrun")
        if most is not None and count > most:
            raise state_error("state_overrun")
        return self._bytes(count)

    def capability_word(self, before: int) -> int | None:
        """A capability set, laid over the bytes of *before*; None for an empty block."""
        data = self.block(WORD_BYTES)
        if not data:
            return None
        return int.from_bytes(data + before.to_bytes(WORD_BYTES, "little")[len(data) :], "little")

    def queue(self) -> list[bytes]:
        """The packets that waited to be written."""
        packets = []
        for _ in range(self.number()):
            packets.append(self.block(None))
            if not packets[-1]:
                raise state_error("state_empty_write_buffer")
        return packets

    def finish(self) -> None:
        """Nothing may be left."""
        if self._pos != len(self._state):
            raise state_error("state_trailing_bytes")

    def _bytes(self, count: int) -> bytes:
        data = self._state[self._pos : self._pos + count]
        if len(data) != count:
            raise state_error("state_underrun")
        self._pos += count
        return data
