"""One libusb transfer with its buffer: filled, submitted, read and used again.

A :class:`NativeTransfer` is C memory. It and its buffer are kept alive by the table of submitted transfers until the
completion callback has come; then by a :class:`Pool`. A transfer that never comes back is leaked on purpose.

Source: libusb's struct libusb_transfer (``_libusb.HEAD``).
"""

from __future__ import annotations

import ctypes
import math
import struct
from functools import cache
from typing import TYPE_CHECKING

from ..device import IsoResult, Transfer
from ..proto import Status, TransferType
from . import _libusb
from ._libusb import HEAD, NO_ISO_DATA, RESULT, STATUS_OFFSET, TRANSFER_STATUS, TRANSFER_TYPE

if TYPE_CHECKING:
    from .pyusb import LibusbDevice

__all__ = ["NativeTransfer", "Pool"]

SETUP = struct.Struct("<BBHHH")
SMALLEST = 1024
"""Bytes of the smallest buffer; larger ones are powers of two."""
MAX_POOLED = 64
"""Idle transfers that a device keeps per size."""
MAX_POOLED_BYTES = 16 * 1024 * 1024
"""Idle buffers that a device keeps, in bytes."""


@cache
def _iso_layout(packets: int) -> struct.Struct:
    """length, actual_length and status of each isochronous packet."""
    return struct.Struct("@" + "IIi" * packets)


class NativeTransfer:
    """A libusb transfer that can hold *capacity* bytes and *packets* isochronous packets.

    Attributes:
        address: of the C structure.
        device: whose transfer it is at present.
        transfer: what it carries at present.
    """

    __slots__ = (
        "_head",
        "_iso",
        "_library",
        "_view",
        "address",
        "buffer",
        "buffer_address",
        "capacity",
        "device",
        "packets",
        "transfer",
    )

    def __init__(self, library: ctypes.CDLL, capacity: int, packets: int) -> None:
        address = library.libusb_alloc_transfer(packets)
        if not address:
            raise MemoryError("libusb cannot allocate a transfer")
        self._library = library
        self.address: int = address
        self.capacity = capacity
        self.packets = packets
        self.buffer = (ctypes.c_char * capacity)()
        self.buffer_address = ctypes.addressof(self.buffer)
        self._view = memoryview(self.buffer).cast("B")
        self._head = _libusb.bytes_at(address, HEAD.size)
        self._iso = _libusb.bytes_at(address + HEAD.size, _iso_layout(packets).size) if packets else memoryview(b"")
        self.device: LibusbDevice | None = None
        self.transfer: Transfer | None = None

    def fill(self, transfer: Transfer, handle: int, callback: int) -> None:
        """Describe *transfer* to libusb. The buffer is large enough, see :meth:`Pool.take`."""
        length = transfer.length
        if transfer.kind is TransferType.CONTROL:
            SETUP.pack_into(self._view, 0, *transfer.setup, length)
            if not transfer.endpoint & 0x80:
                self._view[SETUP.size : SETUP.size + length] = transfer.data
            length += SETUP.size
        elif not transfer.endpoint & 0x80:
            self._view[:length] = transfer.data
        kind = TRANSFER_TYPE[transfer.kind]
        if transfer.stream_id:
            kind = _libusb.TYPE_BULK_STREAM
            self._library.libusb_transfer_set_stream_id(self.address, transfer.stream_id)
        HEAD.pack_into(
            self._head,
            0,
            handle,
            0,
            transfer.endpoint,
            kind,
            math.ceil(transfer.timeout * 1000),
            0,
            length,
            0,
            callback,
            0,
            self.buffer_address,
            self.packets,
        )
        if self.packets:
            lengths = [number for length in transfer.iso_lengths for number in (length, 0, 0)]
            _iso_layout(self.packets).pack_into(self._iso, 0, *lengths)

    def read(self, transfer: Transfer) -> None:
        """Tell *transfer* how it went. What libusb says is checked against what was asked for."""
        code, _, actual = RESULT.unpack_from(self._head, STATUS_OFFSET)
        transfer.status = TRANSFER_STATUS.get(code, Status.IOERROR)
        transfer.device_lost = code == _libusb.TRANSFER_NO_DEVICE
        actual = min(max(actual, 0), transfer.length)
        transfer.actual_length = actual
        if self.packets:
            self._read_packets(transfer)
        elif transfer.endpoint & 0x80:
            start = SETUP.size if transfer.kind is TransferType.CONTROL else 0
            transfer.data = self._view[start : start + actual].tobytes()

    def _read_packets(self, transfer: Transfer) -> None:
        results: list[IsoResult] = []
        fields = _iso_layout(self.packets).unpack(self._iso)
        start = 0
        for room, actual, code in zip(fields[::3], fields[1::3], fields[2::3], strict=True):
            status = TRANSFER_STATUS.get(code, Status.IOERROR)
            data = b""
            if transfer.endpoint & 0x80 and (code == 0 or code == NO_ISO_DATA):
                data = self._view[start : start + min(actual, room)].tobytes()
            results.append(IsoResult(status, data))
            start += room
        transfer.iso_results = results

    def free(self) -> None:
        """Give the C memory back. Never while submitted."""
        self._head.release()
        self._iso.release()
        self._library.libusb_free_transfer(self.address)


class Pool:
    """Idle transfers of one device, by size. Threads: any (lists are appended and popped as one step)."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._idle: dict[tuple[int, int], list[NativeTransfer]] = {}
        self._closed = False

    def take(self, transfer: Transfer) -> NativeTransfer:
        """A native transfer with room for *transfer*."""
        size = transfer.length + (SETUP.size if transfer.kind is TransferType.CONTROL else 0)
        capacity = SMALLEST if size <= SMALLEST else 1 << (size - 1).bit_length()
        packets = len(transfer.iso_lengths)
        try:
            return self._idle[capacity, packets].pop()
        except (KeyError, IndexError):
            return NativeTransfer(self._library, capacity, packets)

    def give(self, native: NativeTransfer) -> None:
        """Keep a native transfer for later, unless there are enough."""
        native.transfer = None
        key = native.capacity, native.packets
        idle = self._idle.setdefault(key, [])
        if self._closed or len(idle) >= MAX_POOLED or (len(idle) + 1) * native.capacity > MAX_POOLED_BYTES:
            native.free()
        else:
            idle.append(native)

    def close(self) -> None:
        """Free what is idle; what comes back later is freed then."""
        self._closed = True
        for idle in self._idle.values():
            while idle:
                idle.pop().free()
