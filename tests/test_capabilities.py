"""Capability words: sets, masks, and the one fix-up there is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from usbredir.capabilities import ALL, WORD_BITS, fix_up, has, mask_of, members_of
from usbredir.proto import Capability

words = st.integers(0, 2**32 - 1)


def test_all_is_what_the_library_knows() -> None:
    assert frozenset(Capability) == ALL
    assert mask_of(ALL) == 0xFF
    assert WORD_BITS == 32


@given(words)
def test_a_word_is_a_set(word: int) -> None:
    members = members_of(word)
    assert mask_of(members) == word
    assert members == {bit for bit in range(32) if has(word, bit)}


@given(words)
def test_known_members_are_capabilities_others_are_ints(word: int) -> None:
    for member in members_of(word):
        assert isinstance(member, Capability) is (member < 8)
        assert isinstance(member, int)


@pytest.mark.parametrize("number", [32, 33, 10**9])
def test_numbers_above_31_have_no_place(number: int) -> None:
    assert mask_of([number]) == 0
    assert mask_of([number, 5]) == 0x20


@pytest.mark.parametrize("number", [-1, -32])
def test_negative_numbers_are_errors(number: int) -> None:
    with pytest.raises(ValueError, match=str(number)):
        mask_of([number])


def test_a_set_may_come_in_any_way() -> None:
    assert mask_of(iter([1, 1, 0])) == 3
    assert mask_of(()) == 0


@given(words)
def test_streams_need_packet_sizes(word: int) -> None:
    """The only dependency there is: without EP_INFO_MAX_PACKET_SIZE, BULK_STREAMS is dropped."""
    fixed = fix_up(word)
    if has(word, Capability.BULK_STREAMS) and not has(word, Capability.EP_INFO_MAX_PACKET_SIZE):
        assert fixed == word - 1
    else:
        assert fixed == word
    assert fix_up(fixed) == fixed
