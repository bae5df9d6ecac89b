"""A short soak: what tests/soak.py does, as a part of the plain test run."""

from __future__ import annotations

import sys

import pytest

from usbredir.packets import BulkPacket

from . import soak, vusb

EVENTS = 60

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")


@pytest.mark.parametrize("seed", [1])
def test_a_loopback_device(seed: int) -> None:
    report = soak.soak(seed, EVENTS)
    assert sum(report.events.values()) == EVENTS
    assert report.answers > 5 * EVENTS
    assert report.turned_away <= 1, "a guest that follows another at once is served at once"


def test_a_real_device() -> None:
    """That of the virtual bus, below the real libusb."""
    vusb.preload_library()
    report = soak.soak(3, EVENTS, bed=True)
    assert report.answers > 5 * EVENTS


def test_the_soak_notices() -> None:
    """An answer that is wrong, one to nothing, one that comes twice, and one that never comes."""
    peer = soak.Peer.__new__(soak.Peer)
    peer.expected = {}
    peer.streams = set()
    peer.has_device = True
    peer.answers = 0
    right = BulkPacket(id=7, endpoint=0x81, data=b"right")
    wrong = BulkPacket(id=7, endpoint=0x81, data=b"wrong")
    peer.expected[7] = (BulkPacket, soak.data_is(b"right"))
    peer.packet_received(right)
    with pytest.raises(soak.SoakError, match="an answer to nothing"):
        peer.packet_received(right)
    peer.expected[7] = (BulkPacket, soak.data_is(b"right"))
    with pytest.raises(soak.SoakError, match="a wrong answer"):
        peer.packet_received(wrong)
    with pytest.raises(soak.SoakError, match="a wrong answer"):
        soak.is_pattern(64)(BulkPacket(id=1, endpoint=0x82, data=bytes(64)))


def test_what_never_comes_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "LIMIT", 0.01)
    with pytest.raises(soak.SoakError, match="not in time: the moon"):
        soak.until(lambda: False, "the moon")
