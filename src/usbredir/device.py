"""What a host needs of a USB device: :class:`UsbDevice` and :class:`Transfer`.

The interface is libusb's asynchronous one, reduced: transfers are *submitted*, any number
at a time, and each *completes* exactly once. Real devices (``usbredir.backends``) and
devices written in Python (``usbredir.virtual``) satisfy it alike.

Rules that both sides rely on:

* A completion callback runs inside :meth:`UsbDevice.handle_events` or on a thread of the
  device, one at a time, never inside ``submit`` or ``cancel``, and with no lock of the device held.
  It may submit and cancel.
* A submitted transfer belongs to the device until it completed; a cancelled one completes too.
* Stall, babble, timeout, cancellation and loss of the device are results
  (:attr:`Transfer.status`, :attr:`Transfer.device_lost`), not exceptions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from .proto import Speed, Status, TransferType

__all__ = ["DO_NOT_RESET", "IsoResult", "Transfer", "TransferResult", "UsbDevice", "may_be_reset"]

SUCCESS = Status.SUCCESS
NO_SETUP = 0, 0, 0, 0

DO_NOT_RESET = {(0x1210, 0x001C), (0x2798, 0x0001)}
"""Devices (vendor, product) that do not survive a reset; applications may add to it."""


def may_be_reset(device_descriptor: bytes) -> bool:
    """Whether the device with this descriptor survives a reset."""
    ids = int.from_bytes(device_descriptor[8:10], "little"), int.from_bytes(device_descriptor[10:12], "little")
    return ids not in DO_NOT_RESET


class TransferResult(NamedTuple):
    """Outcome of a transfer as a user sees it: status, and the bytes received (IN)."""

    status: int
    data: bytes | bytearray | memoryview = b""


class IsoResult(NamedTuple):
    """Outcome of one packet of an isochronous transfer."""

    status: int
    data: bytes | bytearray | memoryview = b""


class Transfer:
    """One USB I/O request.

    Attributes:
        kind: type of the endpoint.
        endpoint: address, bit 7 set for IN. For control transfers 0x00 or 0x80.
        length: bytes wanted (IN) or bytes in *data* (OUT).
        data: OUT: the bytes to send. After an IN transfer: the bytes received.
        setup: control only: (request_type, request, value, index).
        stream_id: bulk stream, 0 for none.
        timeout: seconds, 0 waits for ever.
        iso_lengths: isochronous only: bytes of each packet (OUT), or room for each (IN).
        callback: called with the transfer when it has completed.
        status: result, a :class:`~usbredir.proto.Status` value.
        actual_length: bytes transferred.
        device_lost: the device went away; *status* is IOERROR.
        iso_results: isochronous only: one result per packet.
        context: for the submitter.
        handle: for the device.
    """

    # Slots, all of them set at once: making and filling a transfer takes 230 ns in place of 350 with attributes in a
    # dictionary. There is one all the same, for what a device wants to remember.
    __slots__ = (
        "__dict__",
        "__weakref__",
        "actual_length",
        "callback",
        "context",
        "data",
        "device_lost",
        "endpoint",
        "handle",
        "iso_lengths",
        "iso_results",
        "kind",
        "length",
        "setup",
        "status",
        "stream_id",
        "timeout",
    )

    def __init__(
        self,
        kind: TransferType,
        endpoint: int,
        length: int,
        callback: Callable[[Transfer], None],
        *,
        data: bytes | bytearray | memoryview = b"",
        setup: tuple[int, int, int, int] | None = None,
        stream_id: int = 0,
        timeout: float = 0.0,
        iso_lengths: Sequence[int] = (),
        context: Any = None,
    ) -> None:
        self.kind = kind
        self.endpoint = endpoint
        self.length = length
        self.callback = callback
        self.data = data
        self.setup = NO_SETUP if setup is None else setup
        self.stream_id = stream_id
        self.timeout = timeout
        self.iso_lengths = iso_lengths
        self.context = context
        self.status: int = SUCCESS
        self.actual_length = 0
        self.device_lost = False
        self.iso_results: Sequence[IsoResult] = ()
        self.handle: Any = None

    def __repr__(self) -> str:
        return f"<Transfer {self.kind.name.lower()} endpoint=0x{self.endpoint:02x} length={self.length}>"


@runtime_checkable
class UsbDevice(Protocol):
    """A USB device as a host drives it.

    Methods that return a :class:`~usbredir.proto.Status` value report failures that the guest is told
    about. Every method may raise :class:`~usbredir.errors.DeviceLostError`. Threads: one caller at a time,
    except submit, cancel, wake (any) and handle_events (any one thread, beside the others).
    """

    @property
    def speed(self) -> Speed:
        """Speed on the bus."""
        ...

    @property
    def device_descriptor(self) -> bytes:
        """The device descriptor, 18 bytes, as the device sends it."""
        ...

    @property
    def configuration_descriptor(self) -> bytes | None:
        """The active configuration's descriptor with all that follows it, or None when unconfigured."""
        ...

    @property
    def lost(self) -> bool:
        """The device is gone; nothing will work any more."""
        ...

    def claim(self) -> None:
        """Take all interfaces of the active configuration, displacing kernel drivers.

        Raises DeviceClaimError. Nothing is left claimed after a failure.
        """
        ...

    def release(self, *, give_back: bool, reset: bool = True) -> None:
        """Give the interfaces up; with *give_back* the system's drivers return, after a reset if *reset*."""
        ...

    def set_configuration(self, value: int) -> int:
        """Select configuration *value*, 0 = unconfigured. Interfaces are released. Returns a status."""
        ...

    def set_alt_setting(self, interface: int, alt: int) -> int:
        """Select alternate setting *alt* of *interface*. Returns a status."""
        ...

    def reset(self) -> None:
        """Reset the device. Raises DeviceLostError when it does not come back as it was."""
        ...

    def clear_halt(self, endpoint: int) -> int:
        """Clear the halt of an endpoint, on the device and in the controller. Returns a status."""
        ...

    def alloc_streams(self, endpoints: Sequence[int], count: int) -> tuple[int, int]:
        """Allocate bulk streams on endpoint addresses. Returns (status, streams granted)."""
        ...

    def free_streams(self, endpoints: Sequence[int]) -> int:
        """Free the bulk streams of endpoint addresses. Returns a status."""
        ...

    def submit(self, transfer: Transfer) -> int:
        """Start *transfer*. SUCCESS: it will complete. Any other status: it was not started."""
        ...

    def cancel(self, transfer: Transfer) -> None:
        """Ask for an early end; the transfer still completes. Harmless when it already has."""
        ...

    def handle_events(self, timeout: float | None = 0.0) -> None:
        """Run completions that are due; wait at most *timeout* seconds for one (None: for ever)."""
        ...

    def wake(self) -> None:
        """Make a waiting handle_events return."""
        ...

    def pollfds(self) -> Sequence[tuple[int, int]]:
        """(descriptor, poll event mask) pairs; handle_events is due when one is ready."""
        ...

    def next_timeout(self) -> float | None:
        """Seconds until handle_events is due without any descriptor being ready, or None."""
        ...

    def close(self) -> None:
        """Cancel what runs, wait for it, and let the device go. Idempotent."""
        ...
