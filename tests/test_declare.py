"""Declarations: what is written down, and what cannot be at any speed. What becomes of them: test_description.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from usbredir.proto import Speed, TransferType
from usbredir.virtual import (
    association,
    bulk_in,
    bulk_out,
    configuration,
    interface,
    interrupt_in,
    interrupt_out,
    iso_in,
    iso_out,
)
from usbredir.virtual.declare import EndpointDeclaration, check_range

BULK, INTERRUPT, ISO = TransferType.BULK, TransferType.INTERRUPT, TransferType.ISO


@pytest.mark.parametrize(
    ("declared", "expected"),
    [
        (bulk_in(0x81), EndpointDeclaration(0x81, BULK)),
        (
            bulk_out(0x0F, size={Speed.FULL: 8}, max_burst=15, max_streams=2, extra=[b"a", b"b"]),
            EndpointDeclaration(0x0F, BULK, {Speed.FULL: 8}, max_burst=15, max_streams=2, extra=b"ab"),
        ),
        (interrupt_in(0x8F), EndpointDeclaration(0x8F, INTERRUPT, period=0.01)),
        (interrupt_out(0x01, 8, period=0), EndpointDeclaration(0x01, INTERRUPT, 8)),
        (iso_in(0x81, 100, interval=3), EndpointDeclaration(0x81, ISO, 100, 0.001, 3)),
        (
            iso_out(0x02, 8, synchronization="synchronous", usage="implicit", tail=b"xy", extra=[b"z"]),
            EndpointDeclaration(0x02, ISO, 8, 0.001, usage=0b1011, tail=b"xy", extra=b"z"),
        ),
    ],
)
def test_endpoints(declared: EndpointDeclaration, expected: EndpointDeclaration) -> None:
    assert declared == expected


def test_an_association_is_like_its_first_interface() -> None:
    first, second = interface(2, subclass=3, protocol=4), interface(0x0A)
    declared = association(first, second)
    assert (declared.function_class, declared.subclass, declared.protocol) == (2, 3, 4)
    assert declared.interfaces == (first, second)
    told = association(first, function_class=0, subclass=0, protocol=0)
    assert (told.function_class, told.subclass, told.protocol) == (0, 0, 0)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: bulk_in(0x01), "IN endpoint is 0x81 to 0x8f"),
        (lambda: bulk_out(0x81), "OUT endpoint is 0x01 to 0x0f"),
        (lambda: interrupt_in(0x80, 8), "0x81 to 0x8f"),
        (lambda: iso_out(0x10, 8), "0x01 to 0x0f"),
        (lambda: iso_in(0x190, 8), "0x81 to 0x8f"),
        (lambda: bulk_in(0x81, max_streams=3), "power of 2 from 2 to 65536, not 3"),
        (lambda: bulk_in(0x81, max_streams=1), "not 1"),
        (lambda: bulk_in(0x81, max_streams=131072), "not 131072"),
        (lambda: bulk_in(0x81, max_burst=16), "0 to 15"),
        (lambda: interrupt_in(0x81, period=-1), "at least 0 seconds"),
        (association, "at least one interface"),
        (lambda: association(interface(1), subclass=256), "subclass is 0 to 255, not 256"),
        (lambda: interface(256), "interface_class is 0 to 255, not 256"),
        (lambda: interface(1, protocol=-1), "protocol is 0 to 255, not -1"),
        (lambda: interface(1, number=256), "number"),
        (lambda: interface(1, alternate=256), "alternate"),
        (lambda: configuration(value=256), "value"),
    ],
)
def test_declarations_that_cannot_be(make: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("value", [0, 7])
def test_ranges(value: int) -> None:
    check_range(7, some=value)
    with pytest.raises(ValueError, match="some is 0 to 7, not 8"):
        check_range(7, other=value, some=8)
