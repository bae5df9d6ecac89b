"""The error of everything about guests of tests."""

from __future__ import annotations

from ...errors import UsbRedirError

__all__ = ["GuestError"]


class GuestError(UsbRedirError):
    """The guest, or QEMU, did not do what it should.

    Attributes:
        reason: what went wrong, without the circumstances that the message goes on with.
    """

    def __init__(self, reason: str, circumstances: str = "") -> None:
        super().__init__(f"{reason}\n{circumstances}" if circumstances else reason)
        self.reason = reason
