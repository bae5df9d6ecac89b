"""Requests as methods: which request each decorator stands for, and what may stand in its place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from usbredir.device import Transfer
from usbredir.proto import Status, TransferType
from usbredir.virtual import (
    NAK,
    STALL,
    Answer,
    Description,
    Setup,
    VirtualDevice,
    bulk_in,
    class_in,
    class_out,
    interface,
    vendor_in,
    vendor_out,
)
from usbredir.virtual.control import declared_requests


class Lamp(VirtualDevice):
    """Some requests of each kind."""

    interfaces = (interface(0xFF, bulk_in(0x81), descriptors={0x22: b"report", 0x21: b"hid"}),)

    def began(self) -> None:
        self.seen: list[object] = []
        self.busy = 0

    @vendor_in(0x01)
    def state(self, setup: Setup) -> bytes:
        return b"0123456789"

    @vendor_out(0x01)
    def switch(self, setup: Setup, data: bytes) -> None:
        self.seen.append((setup, data))

    @class_in(0x01)
    def of_class(self, setup: Setup) -> bytes | Answer:
        return STALL if setup.index else b"class"

    @class_out(0x01)
    @class_out(0x02, "endpoint")
    def to_class(self, setup: Setup, data: bytes) -> Answer | None:
        self.busy += 1
        return NAK if self.busy == 1 else None


class Lantern(Lamp):
    """Overrides a method, and answers a request with another one."""

    def state(self, setup: Setup) -> bytes:
        return b"lantern"

    @vendor_out(0x01)
    def dim(self, setup: Setup, data: bytes) -> Answer:
        return STALL

    def control_request(self, setup: Setup, data: bytes) -> bytes | None:
        self.seen.append("other")
        return b"other" if setup.request_type & 0x80 else None

    def standard_request(self, setup: Setup, data: bytes) -> bytes | bytearray | memoryview | Answer | None:
        return b"none" if setup.request == 12 else super().standard_request(setup, data)


def ask(device: VirtualDevice, setup: Setup, data: bytes = b"") -> bytes | None:
    """The data stage of a request that completes; None: stalled."""
    done: list[Transfer] = []
    length = len(data) or setup.length
    transfer = Transfer(
        TransferType.CONTROL, setup.request_type & 0x80, length, done.append, data=data, setup=setup[:4]
    )
    assert device.submit(transfer) == Status.SUCCESS
    for _ in range(2):
        device.notify()
        device.handle_events(0)
    assert done == [transfer]
    if transfer.status == Status.STALL:
        return None
    assert transfer.status == Status.SUCCESS
    return bytes(transfer.data)


@pytest.fixture
def lamp() -> Iterator[Lamp]:
    device = Lamp()
    yield device
    device.close()


@pytest.fixture
def lantern() -> Iterator[Lantern]:
    device = Lantern()
    yield device
    device.close()


DECORATORS: list[tuple[Any, dict[str, int]]] = [
    (vendor_in, {"device": 0xC0, "interface": 0xC1, "endpoint": 0xC2, "other": 0xC3}),
    (vendor_out, {"device": 0x40, "interface": 0x41, "endpoint": 0x42, "other": 0x43}),
    (class_in, {"device": 0xA0, "interface": 0xA1, "endpoint": 0xA2, "other": 0xA3}),
    (class_out, {"device": 0x20, "interface": 0x21, "endpoint": 0x22, "other": 0x23}),
]


@pytest.mark.parametrize(
    ("decorator", "recipient", "request_type"),
    [(decorator, recipient, number) for decorator, kinds in DECORATORS for recipient, number in kinds.items()],
)
def test_request_types(decorator: Any, recipient: str, request_type: int) -> None:
    """bmRequestType of USB 2.0, table 9-2."""

    class One:
        @decorator(0x55, recipient)  # type: ignore[untyped-decorator]
        def method(self, setup: Setup, *data: bytes) -> None: ...

    assert declared_requests(One) == {(request_type, 0x55): "method"}


@pytest.mark.parametrize(
    ("decorator", "request_type"), [(vendor_in, 0xC0), (vendor_out, 0x40), (class_in, 0xA1), (class_out, 0x21)]
)
def test_usual_recipients(decorator: Any, request_type: int) -> None:
    class One:
        @decorator(0xFF)  # type: ignore[untyped-decorator]
        def method(self, setup: Setup, *data: bytes) -> None: ...

    assert declared_requests(One) == {(request_type, 0xFF): "method"}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: vendor_in(256), "0 to 255"),
        (lambda: class_out(-1), "0 to 255"),
        (lambda: vendor_in(1, "pipe"), "'pipe'"),  # type: ignore[arg-type]
    ],
)
def test_requests_that_cannot_be(make: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize(
    ("setup", "expected"),
    [
        (Setup(0xC0, 1, 0, 0, 4), b"0123"),
        (Setup(0xC0, 1, 0, 0, 64), b"0123456789"),
        (Setup(0xC0, 1, 0, 0, 0), b""),
        (Setup(0xA1, 1, 0, 0, 64), b"class"),
        (Setup(0xA1, 1, 0, 1, 64), None),
        (Setup(0xA0, 1, 0, 0, 64), None),  # another recipient
        (Setup(0xC0, 2, 0, 0, 64), None),
        (Setup(0x81, 6, 0x2200, 0, 64), b"report"),
        (Setup(0x81, 6, 0x2100, 0, 2), b"hi"),
        (Setup(0x81, 6, 0x2200, 1, 64), None),  # another interface
        (Setup(0x81, 6, 0x2300, 0, 64), None),
    ],
)
def test_answers(lamp: Lamp, setup: Setup, expected: bytes | None) -> None:
    assert ask(lamp, setup) == expected


def test_data_stages(lamp: Lamp) -> None:
    """None accepts them; NAK asks again."""
    setup = Setup(0x40, 1, 2, 3, 5)
    assert ask(lamp, setup, b"hello") == b"hello"
    assert lamp.seen == [(setup, b"hello")]
    assert ask(lamp, Setup(0x21, 1, 0, 0, 0)) == b""
    assert lamp.busy == 2
    assert ask(lamp, Setup(0x22, 2, 0, 0, 0)) == b""
    assert lamp.busy == 3
    assert ask(lamp, Setup(0x40, 9, 0, 0, 0)) is None


def test_subclasses(lantern: Lantern) -> None:
    """A method may be overridden with or without the decorator, a request be given to another method."""
    assert ask(lantern, Setup(0xC0, 1, 0, 0, 64)) == b"lantern"
    assert ask(lantern, Setup(0x40, 1, 0, 0, 1), b"x") is None
    assert ask(lantern, Setup(0xA1, 1, 0, 0, 64)) == b"class"
    assert lantern.seen == []


def test_what_has_no_method(lantern: Lantern) -> None:
    """Goes to control_request; standard requests can be answered differently."""
    assert ask(lantern, Setup(0xC0, 7, 0, 0, 64)) == b"other"
    assert ask(lantern, Setup(0x40, 7, 0, 0, 1), b"x") == b"x"
    assert lantern.seen == ["other", "other"]
    assert ask(lantern, Setup(0x82, 12, 0, 0, 4)) == b"none"
    assert ask(lantern, Setup(0x80, 8, 0, 0, 1)) == b"\x01"


def test_mixins() -> None:
    """Requests of a class that is no device by itself."""

    class Blinking:
        @vendor_in(0x70)
        def blink(self, setup: Setup) -> bytes:
            return b"blink"

    class Both(Blinking, Lamp):
        pass

    device = Both()
    assert ask(device, Setup(0xC0, 0x70, 0, 0, 5)) == b"blink"
    assert ask(device, Setup(0xC0, 1, 0, 0, 5)) == b"01234"
    device.close()


def test_a_request_has_one_answer() -> None:
    """Not a method and a constant."""

    class Torn(Lamp):
        def describe(self, speed: Any) -> Description:
            told = super().describe(speed)
            return Description(told.device, told.configurations, answers={(0xC0, 1, 0, 0): b"constant"})

    with pytest.raises(ValueError, match=r"request 0x01 \(0xc0\).*state"):
        Torn()
