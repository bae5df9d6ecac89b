"""Limits: the values, and that each one is obeyed somewhere (by the name of the test that shows it)."""

from __future__ import annotations

import pytest

from usbredir import errors, host, parser
from usbredir.limits import Limits

SHOWN_BY = {
    "max_packet": "test_parser.py: test_limits_of_what_is_received",
    "max_bulk": "test_parser.py: test_limits_of_what_is_received",
    "max_filter_text": "test_parser.py: test_a_bad_packet_spoils_no_other",
    "max_queued_packets": "test_parser.py: test_limit_of_queued_packets",
    "max_queued_bytes": "test_parser.py: test_limit_of_queued_bytes",
    "max_transfers": "the host's tests",
    "max_transfer_bytes": "the host's tests",
}


def test_defaults() -> None:
    """API: the protocol's own limits; queues without any; the host's safe."""
    limits = Limits()
    assert (limits.max_packet, limits.max_bulk) == (134218752, 134217728)
    assert (limits.max_queued_packets, limits.max_queued_bytes) == (None, None)
    assert 0 < limits.max_transfers <= 10_000
    assert limits.max_bulk <= limits.max_transfer_bytes < 1 << 30
    assert 0 < limits.max_filter_text <= limits.max_packet


def test_every_limit_is_tested() -> None:
    assert set(Limits._fields) == set(SHOWN_BY)


def test_every_limit_is_described() -> None:
    assert Limits.__doc__ is not None
    for name in Limits._fields:
        assert f" {name}: " in Limits.__doc__


def test_limits_are_values() -> None:
    """One object may be shared: it cannot change."""
    assert Limits(max_bulk=5) == Limits(max_bulk=5) != Limits()
    with pytest.raises(AttributeError):
        Limits().max_bulk = 5  # type: ignore[misc]


def test_where_they_are_found() -> None:
    assert parser.Limits is host.Limits is Limits
    assert parser.QueueFullError is errors.QueueFullError
