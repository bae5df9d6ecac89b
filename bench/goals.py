"""The goals of the project: the rows of the table in docs/performance.md. Whatever is checked is checked by these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

__all__ = ["ROWS", "Figure", "Limit", "Row", "at_least", "at_most", "limit", "number"]


class Limit(NamedTuple):
    """What a value may be. *least*: not below, else not above."""

    value: float
    least: bool

    def met(self, value: float) -> bool:
        """Whether a value is as it is wanted."""
        return value >= self.value if self.least else value <= self.value

    def __str__(self) -> str:
        return f"at {'least' if self.least else 'most'} {self.value:g}"


def at_least(value: float) -> Limit:
    """A limit that is not to be fallen short of."""
    return Limit(value, True)


def at_most(value: float) -> Limit:
    """A limit that is not to be passed."""
    return Limit(value, False)


@dataclass(frozen=True)
class Figure:
    """One thing that was measured: values by unit, those of the row's goals first, and the times behind them."""

    case: str
    values: Mapping[str, float]
    text: str = ""


@dataclass(frozen=True)
class Row:
    """A row of the table. *limits* by unit; without any, it is shown only."""

    key: str
    what: str
    limits: Mapping[str, Limit] = field(default_factory=dict)

    def missed(self, unit: str, figures: Sequence[Figure]) -> list[Figure]:
        """Those that miss the goal of a unit."""
        return [f for f in figures if unit in f.values and not self.limits[unit].met(f.values[unit])]


def _sending(key: str, how: str) -> tuple[Row, ...]:
    return (
        Row(f"send-many{key}", f"send over TCP, 2, 4 or 32 per flush, {how}", {"x C": at_least(1.2)}),
        Row(f"send-one-small{key}", f"send over TCP, one per flush, up to 4 KiB, {how}", {"x C": at_least(0.6)}),
        Row(f"send-one-large{key}", f"send over TCP, one per flush, from 16 KiB, {how}", {"x C": at_least(1.0)}),
    )


ROWS = (
    Row("receive-small", "receive over TCP, up to 4 KiB", {"x C": at_least(1.5), "x ctypes": at_least(6)}),
    Row("receive-large", "receive over TCP, from 16 KiB", {"x C": at_least(1.0)}),
    *_sending("-objects", "an object for each packet"),
    *_sending("", "`Parser.sender`"),
    Row("round-trip-1", "round trips, 1 in flight", {"x C": at_least(0.9)}),
    Row("round-trip-16", "round trips, 16 in flight", {"x C": at_least(1.2)}),
    Row("latency", "latency of a guest's round trip, beside C's"),
    Row("parse-small", "parse from memory, 8 to 512 B", {"x C": at_least(0.2), "x ctypes": at_least(8)}),
    Row("parse-large", "parse from memory, the others"),
    Row("serialise", "send to memory, 64 per flush, `Parser.sender`"),
    Row("queue", "queue 16,384 packets", {"x C": at_least(10)}),
    Row("flatness", "queue: dearest packet of 64 to 65,536 queued, times the cheapest", {"times": at_most(1.5)}),
    Row("locks-one", "locks on, one thread", {"x locks off": at_most(1.3)}),
    Row("locks-many", "4 senders and a writer", {"x C": at_least(0.5)}),
    Row("calls", "system calls per 64 B packet, saturated", {"calls": at_most(0.05)}),
    Row("memory", "memory per queued 64 B packet", {"x C": at_most(1.2)}),
    Row("host-16", "whole host on the virtual bus, 16 in flight, rate", {"x C": at_least(1.0)}),
    Row("host-1", "whole host, 1 in flight, rate", {"x C": at_least(0.9)}),
    Row("host-cpu-large", "whole host, CPU per transfer, from 16 KiB", {"x C": at_most(1.2)}),
    Row("host-cpu-small", "whole host, CPU per transfer, below 16 KiB", {"x C": at_most(1.5)}),
    Row("qemu", "disk in a guest in QEMU: time beside QEMU's own `usb-storage`", {"times": at_most(1.25)}),
    Row("import", "import of `usbredir.parser`", {"ms": at_most(40)}),
    Row("version", "`usbredir --version`", {"ms": at_most(120)}),
    Row("free-threaded", "2 reader/writer pairs in 2 threads without GIL", {"x one pair": at_least(1.6)}),
    Row("floor", "what a step costs in this interpreter"),
)
"""In the order of the table."""


def limit(key: str, unit: str) -> Limit:
    """The goal of a row."""
    return next(row.limits[unit] for row in ROWS if row.key == key)


def number(value: float) -> str:
    """Three digits, for people."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
