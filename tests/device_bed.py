"""A device in Python with its time: transfers one by one, and a clock that passes when told to."""

from __future__ import annotations

from typing import Any

from usbredir.device import Transfer
from usbredir.proto import Status, TransferType
from usbredir.virtual import VirtualDevice

__all__ = ["Clock", "DeviceBed"]


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class DeviceBed:
    """Puts transfers to a device that was made with *clock*."""

    def __init__(self, device: VirtualDevice, clock: Clock) -> None:
        self.device = device
        self.clock = clock

    def run(self, seconds: float = 0.0) -> None:
        """Let time pass, then let the device do what it can."""
        self.clock.now += seconds
        for _ in range(3):
            self.device.handle_events(0)

    def start(
        self, endpoint: int, length: int = 512, data: Any = b"", kind: TransferType = TransferType.BULK, **options: Any
    ) -> Transfer:
        """Submit a transfer; its ``context`` is the list of what completed."""
        done: list[Transfer] = []
        transfer = Transfer(kind, endpoint, len(data) or length, done.append, data=data, context=done, **options)
        assert self.device.submit(transfer) == Status.SUCCESS
        return transfer

    def ended(self, transfer: Transfer) -> tuple[int, bytes] | None:
        """(status, data) of a transfer, None while it waits."""
        self.run()
        if not transfer.context:
            return None
        assert transfer.context == [transfer]
        return transfer.status, bytes(transfer.data) if transfer.endpoint & 0x80 else b""

    def interrupt(self, endpoint: int, length: int = 64, data: bytes = b"") -> Transfer:
        """Submit an interrupt transfer."""
        return self.start(endpoint, length, data, TransferType.INTERRUPT)

    def waiting(self, endpoint: int, length: int) -> list[bytes]:
        """What an interrupt endpoint has for the host, a second apart, until it has nothing."""
        found: list[bytes] = []
        while True:
            transfer = self.interrupt(endpoint, length)
            self.run(1)
            outcome = self.ended(transfer)
            if outcome is None:
                self.device.cancel(transfer)
                self.run()
                return found
            assert outcome[0] == Status.SUCCESS
            found.append(outcome[1])

    def request(
        self, request_type: int, request: int, value: int = 0, index: int = 0, *, data: bytes = b"", length: int = 0
    ) -> bytes | None:
        """The answer to a control request that is answered at once; None for a stall."""
        setup = (request_type, request, value, index)
        outcome = self.ended(self.start(request_type & 0x80, length, data, TransferType.CONTROL, setup=setup))
        assert outcome is not None
        status, answer = outcome
        assert status in (Status.SUCCESS, Status.STALL)
        return answer if status == Status.SUCCESS else None
