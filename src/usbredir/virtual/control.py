"""Control requests of devices in Python: the setup packet, what a hook answers, and requests as methods.

::

    class Lamp(VirtualDevice):
        @vendor_out(0x01)
        def switch(self, setup, data):
            self.on = bool(setup.value)

        @vendor_in(0x02)
        def state(self, setup):
            return bytes([self.on])

Source: USB 2.0, 9.3 and 9.4.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any, Final, Literal, NamedTuple, TypeVar

__all__ = [
    "NAK",
    "STALL",
    "Answer",
    "Payload",
    "Recipient",
    "Setup",
    "class_in",
    "class_out",
    "declared_requests",
    "vendor_in",
    "vendor_out",
]

Payload = bytes | bytearray | memoryview
Recipient = Literal["device", "interface", "endpoint", "other"]


class Answer(Enum):
    """What a hook answers in place of data."""

    NAK = "nothing now, ask again"
    STALL = "no"


NAK: Final = Answer.NAK
STALL: Final = Answer.STALL


class Setup(NamedTuple):
    """The setup packet of a control request (USB 2.0, 9.3). *length* is the data stage's, in bytes."""

    request_type: int
    request: int
    value: int
    index: int  # type: ignore[assignment]  # the specification's name; hides tuple.index
    length: int


InMethod = TypeVar("InMethod", bound=Callable[[Any, Setup], Payload | Answer])
OutMethod = TypeVar("OutMethod", bound=Callable[[Any, Setup, bytes], Answer | None])
Method = TypeVar("Method", bound=Callable[..., Any])

_IN, _CLASS, _VENDOR = 0x80, 0x20, 0x40
_RECIPIENTS: dict[str, int] = {"device": 0, "interface": 1, "endpoint": 2, "other": 3}
_MARK = "_usb_requests"
"""Attribute of a decorated function: a tuple of (bmRequestType, bRequest)."""


def vendor_in(request: int, recipient: Recipient = "device") -> Callable[[InMethod], InMethod]:
    """The method ``(setup) -> bytes | NAK | STALL`` answers vendor request *request* with its data stage.

    More bytes than ``setup.length`` are cut. Raises ValueError for a number or recipient that does not exist.
    """
    return _answers(_IN | _VENDOR, request, recipient)


def vendor_out(request: int, recipient: Recipient = "device") -> Callable[[OutMethod], OutMethod]:
    """The method ``(setup, data) -> None | NAK | STALL`` takes vendor request *request* and its data stage.

    Raises ValueError for a number or recipient that does not exist.
    """
    return _answers(_VENDOR, request, recipient)


def class_in(request: int, recipient: Recipient = "interface") -> Callable[[InMethod], InMethod]:
    """As :func:`vendor_in`, for a request of the device's class; ``setup.index`` tells which interface."""
    return _answers(_IN | _CLASS, request, recipient)


def class_out(request: int, recipient: Recipient = "interface") -> Callable[[OutMethod], OutMethod]:
    """As :func:`vendor_out`, for a request of the device's class; ``setup.index`` tells which interface."""
    return _answers(_CLASS, request, recipient)


def _answers(request_type: int, request: int, recipient: str) -> Callable[[Method], Method]:
    if recipient not in _RECIPIENTS:
        raise ValueError(f"a request goes to {', '.join(_RECIPIENTS)}, not to {recipient!r}")
    if not 0 <= request <= 0xFF:
        raise ValueError(f"a request has a number from 0 to 255, not {request}")
    key = request_type | _RECIPIENTS[recipient], request

    def mark(method: Method) -> Method:
        setattr(method, _MARK, (*getattr(method, _MARK, ()), key))
        return method

    return mark


def declared_requests(cls: type) -> dict[tuple[int, int], str]:
    """Names of the methods that answer requests, by (bmRequestType, bRequest); a class overrides its bases."""
    return {
        key: name
        for base in reversed(cls.__mro__)
        for name, member in vars(base).items()
        for key in getattr(member, _MARK, ())
    }
