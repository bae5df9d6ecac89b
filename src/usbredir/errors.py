"""The exceptions of usbredir.

::

    UsbRedirError
    ├── ProtocolError
    │   ├── LocalProtocolError      our caller broke a rule; nothing was queued
    │   │   └── QueueFullError      a limit of the output queue is reached
    │   └── RemoteProtocolError     the peer broke a rule; the next read goes on behind the bad packet
    ├── StateError                  a migration state cannot be written or read
    ├── FilterSyntaxError           a filter text does not parse (also a ValueError)
    ├── DeviceError
    │   ├── DeviceLostError         the device is gone
    │   ├── DeviceRejectedError     the guest refuses the device
    │   ├── DeviceClaimError        an interface is busy, or permission is missing
    │   └── DeviceNotFoundError     no such device
    └── ConnectionClosed            the peer closed the connection

A stall, babble, timeout or cancellation is a *result* of a transfer
(:class:`usbredir.proto.Status`), never an exception. An :class:`OSError` from a
read or write callback passes through unchanged.
"""

from __future__ import annotations

__all__ = [
    "ConnectionClosed",
    "DeviceClaimError",
    "DeviceError",
    "DeviceLostError",
    "DeviceNotFoundError",
    "DeviceRejectedError",
    "FilterSyntaxError",
    "LocalProtocolError",
    "ProtocolError",
    "QueueFullError",
    "RemoteProtocolError",
    "StateError",
    "UsbRedirError",
]


class UsbRedirError(Exception):
    """Base of all exceptions that this package defines."""


class ProtocolError(UsbRedirError):
    """A rule of the protocol was broken.

    Attributes:
        packet_type: number of the packet concerned, or None.
        reason: a short fixed key such as ``"bad_length"`` (see docs/errors.md), for programs.
    """

    def __init__(self, message: str, *, packet_type: int | None = None, reason: str = "") -> None:
        super().__init__(message)
        self.packet_type = packet_type
        self.reason = reason


class LocalProtocolError(ProtocolError):
    """Our own caller broke a rule. Nothing was queued."""


class QueueFullError(LocalProtocolError):
    """A limit of the output queue is reached. Write what is queued, then send again."""


class RemoteProtocolError(ProtocolError):
    """The peer broke a rule. Good packets before it were delivered; the next read goes on behind it."""


class StateError(UsbRedirError):
    """A migration state cannot be written now, or cannot be read. The parser is unchanged.

    Attributes:
        reason: a short fixed key such as ``"state_bad_magic"``, for programs.
    """

    def __init__(self, message: str, *, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason


class FilterSyntaxError(UsbRedirError, ValueError):
    """A filter text does not parse.

    Attributes:
        position: index in the text of the rule that is wrong, in characters.
    """

    def __init__(self, message: str, *, position: int = 0) -> None:
        super().__init__(message)
        self.position = position


class DeviceError(UsbRedirError):
    """Something is wrong with the USB device.

    Attributes:
        reason: a short fixed key for programs: ``"missing"``, ``"busy"``, ``"forbidden"``, ``"unconfigured"``,
            ``"filtered"``, ``"lost"``, ``"final"``, ``"rejected"`` or ``"unusable"``.
    """

    default_reason = "unusable"

    def __init__(self, message: str, *, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason or self.default_reason


class DeviceLostError(DeviceError):
    """The device is gone; the guest has been told."""

    default_reason = "lost"


class DeviceRejectedError(DeviceError):
    """The guest does not accept the device (a filter, a wrong speed)."""

    default_reason = "rejected"


class DeviceClaimError(DeviceError):
    """The device is in use by another program, or permission is missing."""

    default_reason = "busy"


class DeviceNotFoundError(DeviceError):
    """There is no such device."""

    default_reason = "missing"


class ConnectionClosed(UsbRedirError):
    """The peer closed the connection; everything that came before it was delivered."""
