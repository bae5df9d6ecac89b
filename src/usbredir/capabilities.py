"""Capability sets: the words of hello, and what two of them settle.

Source: docs/protocol.md, capabilities.
"""

from __future__ import annotations

from collections.abc import Iterable

from .proto import Capability

__all__ = ["ALL", "WORD_BITS", "fix_up", "has", "mask_of", "members_of"]

ALL: frozenset[Capability] = frozenset(Capability)
"""Every capability this library knows."""

WORD_BITS = 32
"""Capability numbers that exist: 0 to 31. Every known one fits the first word."""


def mask_of(capabilities: Iterable[int]) -> int:
    """The capability word: bit n is set for capability n. Numbers above 31 have no place in it and are left out.

    Raises ValueError for a negative number.
    """
    mask = 0
    for capability in capabilities:
        if capability < 0:
            raise ValueError(f"a capability number cannot be negative: {capability}")
        if capability < WORD_BITS:
            mask |= 1 << capability
    return mask


def members_of(mask: int) -> frozenset[int]:
    """The set behind a capability word: :class:`Capability` members, and plain ints for unknown bits."""
    known = Capability._value2member_map_
    return frozenset(known.get(bit, bit) for bit in range(WORD_BITS) if mask >> bit & 1)  # type: ignore[misc]


def has(mask: int, capability: int) -> bool:
    """Whether a capability word has the bit of *capability*."""
    return bool(mask >> capability & 1)


def fix_up(mask: int) -> int:
    """Without EP_INFO_MAX_PACKET_SIZE there can be no BULK_STREAMS: ep_info could not be laid out."""
    if has(mask, Capability.BULK_STREAMS) and not has(mask, Capability.EP_INFO_MAX_PACKET_SIZE):
        return mask & ~(1 << Capability.BULK_STREAMS)
    return mask
