"""One libusb transfer with its buffer: filled, submitted, read and used again.

A :class:`NativeTransfer` is C memory. It and its buffer are kept alive by the table of submitted transfers until the
completion callback has come; then by a :class:`Pool`. A transfer that never comes back is leaked on purpose. The C
structure is freed by :meth:`Pool.close` and never by a destructor, which could run after libusb has ended.

Copies: what a large IN transfer brought is handed out as a view of its buffer, and the native transfer rests until
nobody refers to that view any more; what a large OUT transfer sends is sent from where it is.

Source: libusb's struct libusb_transfer (``_libusb.HEAD``).
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import struct
import sys
import weakref
from collections import Counter, deque
from collections.abc import Mapping
from functools import cache
from typing import Any, Protocol

from ..device import IsoResult, Transfer
from ..proto import Status, TransferType
from . import _libusb
from ._libusb import (
    ADDRESS,
    BUFFER_OFFSET,
    HEAD,
    NO_ISO_DATA,
    RESULT,
    STATUS_OFFSET,
    TRANSFER_STATUS,
    TRANSFER_TYPE,
)

__all__ = ["NativeTransfer", "Owner", "Pool", "is_sound"]

# Members of enumerations cost 70 ns each to look up.
SUCCESS = Status.SUCCESS
CONTROL = TransferType.CONTROL
ISO = TransferType.ISO
PLAIN = (TransferType.BULK, TransferType.INTERRUPT)
unpack_result = RESULT.unpack_from

SETUP = struct.Struct("<BBHHH")
SMALLEST = 1024
"""Bytes of the smallest buffer; larger ones are powers of two."""
LARGE = 32 * 1024
"""Bytes from which data is not copied. A view that tells when it is not needed any more costs 2 us."""
LARGE_OUT = 4096
"""The same for OUT transfers: taking the address of bytes costs 1 us."""
MAX_POOLED = 64
"""Idle transfers that a device keeps per endpoint and size."""
MAX_LENT = 64
"""Transfers whose buffers are in use that a device remembers; others are let go."""
MAX_POOLED_BYTES = 16 * 1024 * 1024
"""Idle large buffers that a device keeps, in bytes, of all sizes together; and as many that are lent. With more than
that in small ones, those that are idle are let go."""
KEY_BITS = 32
"""Bits of a capacity; it has a single one above those of an endpoint."""
MAX_CONTROL = 0xFFFF
"""Longest data stage of a control transfer, in bytes."""
MAX_LENGTH = 1 << 30
"""Longest transfer, in bytes; lengths are C integers."""
MAX_TIMEOUT = 0xFFFFFFFF
"""Longest timeout, in milliseconds."""


class Owner(Protocol):
    """A device, as its transfers and its context see it. Threads: any, inside libusb's callbacks too.

    Attributes:
        done: transfers that libusb is done with.
        pumper: the thread that is in libusb for this device, and looks at *done* afterwards; 0: none.
    """

    done: deque[NativeTransfer]
    pumper: int

    def mark_lost(self) -> None:
        """The system says that the device is gone."""

    def signal(self) -> None:
        """Make a waiting handle_events look again."""

    def is_libusb_device(self, address: int) -> bool:
        """Whether libusb's device object at *address* is this one."""


def is_sound(transfer: Transfer) -> bool:
    """Whether a C library would stay inside the buffers, and every number fits its field."""
    kind, length, endpoint = transfer.kind, transfer.length, transfer.endpoint
    if not (0 <= length <= MAX_LENGTH and 0 <= endpoint <= 0xFF and 0 <= transfer.stream_id <= 0xFFFFFFFF):
        return False
    if not 0 <= transfer.timeout < math.inf or (endpoint < 0x80 and len(transfer.data) != length):
        return False
    if kind in PLAIN:
        return True
    if kind is CONTROL:
        request_type, request, value, index = transfer.setup
        return (
            length <= MAX_CONTROL
            and 0 <= request_type <= 0xFF
            and 0 <= request <= 0xFF
            and 0 <= value <= 0xFFFF
            and 0 <= index <= 0xFFFF
        )
    lengths = transfer.iso_lengths
    return kind is ISO and len(lengths) > 0 and min(lengths) >= 0 and sum(lengths) == length


Shape = tuple[Any, ...]
"""All that libusb's structure tells of a transfer: all but its data and its setup packet."""


@cache
def _iso_layout(packets: int) -> struct.Struct:
    """length, actual_length and status of each isochronous packet."""
    return struct.Struct("@" + "IIi" * packets)


class NativeTransfer:
    """A libusb transfer that can hold *capacity* bytes and *packets* isochronous packets.

    Attributes:
        address: of the C structure.
        owner: the device whose transfer it is at present.
        transfer: what it carries at present; None: it is idle.
        lent: a view of its buffer is in use.
        shape: of the transfer that the C structure describes; None: of none.
        shelf: where its pool keeps it while it is idle.
    """

    __slots__ = (
        "_head",
        "_iso",
        "_lease",
        "_library",
        "_readable",
        "_sent",
        "_view",
        "address",
        "buffer",
        "buffer_address",
        "capacity",
        "lent",
        "owner",
        "packets",
        "shape",
        "shelf",
        "transfer",
    )

    def __init__(
        self, library: ctypes.CDLL, capacity: int, packets: int, shelf: list[NativeTransfer] | None = None
    ) -> None:
        address = library.libusb_alloc_transfer(packets)
        if not address:
            raise MemoryError("libusb cannot allocate a transfer")
        self._library = library
        self.address: int = address
        self.capacity = capacity
        self.packets = packets
        self.shelf = [] if shelf is None else shelf
        self.buffer: Any = (ctypes.c_char * (capacity + SETUP.size))()
        self.buffer_address = ctypes.addressof(self.buffer)
        self._view = memoryview(self.buffer).cast("B")
        # A slice of the array is bytes already, and 100 ns cheaper; but PyPy copies it item by item.
        self._readable: Any = self.buffer if sys.implementation.name == "cpython" else self._view
        self._head = _libusb.bytes_at(address, HEAD.size)
        self._iso = _libusb.bytes_at(address + HEAD.size, _iso_layout(packets).size) if packets else memoryview(b"")
        self.owner: Owner | None = None
        self.transfer: Transfer | None = None
        self.lent = False
        self._lease: weakref.ref[Any] | None = None
        self._sent: Any = None  # keeps what is sent from where it is
        self.shape: Shape | None = None

    def receives(self, transfer: Transfer) -> bool:
        """Whether *transfer* has been described already and nothing is to be sent with it."""
        # libusb leaves its structure as it is: what is done again and again is described and checked once.
        return (
            transfer.endpoint >= 0x80
            and self.shape == (transfer.kind, transfer.endpoint, transfer.length, transfer.timeout, transfer.stream_id)
            and transfer.kind is not CONTROL
        )

    def fill(self, transfer: Transfer, handle: int, callback: int) -> None:
        """Describe *transfer*, which is sound, to libusb. The buffer is large enough, see :meth:`Pool.make`."""
        shape: Shape = transfer.kind, transfer.endpoint, transfer.length, transfer.timeout, transfer.stream_id
        if self.packets:
            shape = (*shape, *transfer.iso_lengths)
        if shape != self.shape:
            self._describe(transfer, handle, callback)
            self.shape = shape
        if transfer.kind is CONTROL:
            self._put_setup(transfer)
        elif transfer.endpoint < 0x80:
            self._put_data(transfer)

    def _describe(self, transfer: Transfer, handle: int, callback: int) -> None:
        self.shape = None  # until all of it is written
        length, endpoint, kind = transfer.length, transfer.endpoint, TRANSFER_TYPE[transfer.kind]
        if transfer.kind is CONTROL:
            length += SETUP.size
            endpoint = 0  # the direction is the request's
        elif transfer.stream_id:
            kind = _libusb.TYPE_BULK_STREAM
            self._library.libusb_transfer_set_stream_id(self.address, transfer.stream_id)
        HEAD.pack_into(
            self._head,
            0,
            handle,
            0,
            endpoint,
            kind,
            math.ceil(min(transfer.timeout * 1000, MAX_TIMEOUT)),
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

    def _put_setup(self, transfer: Transfer) -> None:
        """The setup packet, and the data behind it."""
        setup, length = transfer.setup, transfer.length
        SETUP.pack_into(self._view, 0, *setup, length)
        if not transfer.endpoint & 0x80:
            self._view[SETUP.size : SETUP.size + length] = transfer.data
        elif not setup[0] & 0x80:
            # A guest that contradicts itself: the device gets zeros, not what the buffer held before.
            self._view[SETUP.size : SETUP.size + length] = bytes(length)

    def _put_data(self, transfer: Transfer) -> None:
        """Data to send: copied, or sent from where it is."""
        length, data = transfer.length, transfer.data
        if length < LARGE_OUT:
            self._view[:length] = data
            return
        address = self.buffer_address
        if data.__class__ is bytes:
            address = self._address_of(data)
        else:
            self._view[:length] = data
        ADDRESS.pack_into(self._head, BUFFER_OFFSET, address)

    def _address_of(self, data: bytes) -> int:
        """The address of *data*, which is kept from now on."""
        pointer = ctypes.c_char_p(data)
        self._sent = pointer, data
        return ctypes.cast(pointer, ctypes.c_void_p).value or 0

    def read(self, transfer: Transfer) -> None:
        """Tell *transfer* how it went. What libusb says is checked against what was asked for."""
        code, _, actual = unpack_result(self._head, STATUS_OFFSET)
        if code:
            transfer.status = TRANSFER_STATUS.get(code, Status.IOERROR)
            transfer.device_lost = code == _libusb.TRANSFER_NO_DEVICE
        else:
            transfer.status = SUCCESS
        if not 0 <= actual <= transfer.length:
            actual = min(max(actual, 0), transfer.length)
        transfer.actual_length = actual
        if self.packets:
            self._read_packets(transfer)
        elif transfer.endpoint < 0x80:
            self._sent = None
        elif transfer.kind is CONTROL:
            transfer.data = bytes(self._readable[SETUP.size : SETUP.size + actual])
        elif actual >= LARGE and 2 * actual >= self.capacity:
            # A view keeps the whole buffer: it must not be much larger than what is counted as waiting to be sent.
            transfer.data = self._lend(actual)
        else:
            transfer.data = bytes(self._readable[:actual])

    def _lend(self, count: int) -> memoryview:
        """The first *count* bytes of the buffer, which stay as they are while anybody refers to them."""
        lease = (ctypes.c_char * self.capacity).from_buffer(self.buffer)
        self.lent = True
        self._lease = weakref.ref(lease, self._returned)
        return memoryview(lease).cast("B")[:count].toreadonly()

    def _returned(self, lease: object) -> None:
        """Nobody refers to the view any more. In any thread, wherever the last reference went: no lock is taken."""
        self.lent = False

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
        ADDRESS.pack_into(self._head, 0, 0)  # the device's handle may be closed, and libusb looks at it
        self._head.release()
        self._iso.release()
        self._library.libusb_free_transfer(self.address)


class Pool:
    """Idle transfers of one device, by endpoint and size. Threads: one at a time, the device's lock is held; but
    :meth:`give_small` any.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._lent: deque[NativeTransfer] = deque()  # idle but for a view that is in use, in the order of lending
        self._idle: dict[int, list[NativeTransfer]] = {}
        self._bytes = 0  # idle large buffers
        self._small_bytes = 0  # small buffers that exist
        self._lent_bytes = 0
        self._closed = False

    def take(self, transfer: Transfer) -> NativeTransfer | None:
        """An idle native transfer with room for *transfer*, probably one that describes it already; None: no more."""
        length = transfer.length
        capacity = SMALLEST if length <= SMALLEST else 1 << (length - 1).bit_length()
        key = capacity | transfer.endpoint
        if transfer.kind is ISO:
            key |= len(transfer.iso_lengths) << KEY_BITS
        if self._lent:
            self._collect()
        idle = self._idle.get(key)
        if not idle:
            return None
        if capacity >= LARGE:
            self._bytes -= capacity
        return idle.pop()

    def make(self, transfer: Transfer) -> NativeTransfer:
        """A new native transfer with room for *transfer*, which is sound."""
        length = transfer.length
        capacity = SMALLEST if length <= SMALLEST else 1 << (length - 1).bit_length()
        packets = len(transfer.iso_lengths) if transfer.kind is ISO else 0
        key = packets << KEY_BITS | capacity | transfer.endpoint
        if capacity < LARGE:
            if self._small_bytes + capacity > MAX_POOLED_BYTES:
                self._free_idle()
            self._small_bytes += capacity
        return NativeTransfer(self._library, capacity, packets, self._idle.setdefault(key, []))

    def give_small(self, native: NativeTransfer) -> bool:
        """Keep a native transfer for later; False: it is not small, or there are enough, :meth:`give` tells.

        Nothing here needs the lock, which costs 0.2 us.
        """
        if native.capacity >= LARGE or len(native.shelf) >= MAX_POOLED or self._closed:
            return False
        native.owner = native.transfer = None
        native.shelf.append(native)
        if self._closed:  # meanwhile, by another thread: who takes it from the shelf frees it
            with contextlib.suppress(IndexError):
                native.shelf.pop().free()
        return True

    def give(self, native: NativeTransfer) -> None:
        """Keep a native transfer for later, unless there are enough."""
        if self.give_small(native):
            return
        native.owner = native.transfer = None
        capacity = native.capacity
        if native.lent:
            self._remember(native)
            return
        if self._bytes + capacity > MAX_POOLED_BYTES:
            self._free_idle()  # sizes that were wanted once must not keep out those wanted now
        if self._closed or len(native.shelf) >= MAX_POOLED or not LARGE <= capacity <= MAX_POOLED_BYTES:
            self._free(native)
        else:
            native.shelf.append(native)
            self._bytes += capacity

    def _remember(self, native: NativeTransfer) -> None:
        """Keep a native transfer whose buffer is in use, unless there are enough."""
        if self._closed or self._lent_bytes + native.capacity > MAX_POOLED_BYTES:
            self._free(native)  # the C structure; the buffer lives as long as its view
        else:
            self._lent.append(native)
            self._lent_bytes += native.capacity

    def _collect(self) -> None:
        """Take back what is not lent any more. Views end in about the order in which they were lent."""
        lent = self._lent
        while lent and not lent[0].lent:
            self._give_back(lent.popleft())
        if len(lent) > MAX_LENT:
            for native in [native for native in lent if not native.lent]:
                lent.remove(native)
                self._give_back(native)
            while len(lent) > MAX_LENT:
                native = lent.popleft()
                self._lent_bytes -= native.capacity
                self._free(native)

    def _give_back(self, native: NativeTransfer) -> None:
        self._lent_bytes -= native.capacity
        self.give(native)

    def close(self) -> None:
        """Free what is idle; what comes back later is freed then."""
        self._closed = True
        self._free_idle()
        while self._lent:
            self._lent.popleft().free()
        self._lent_bytes = 0

    def _free_idle(self) -> None:
        for idle in self._idle.values():
            while idle:
                self._free(idle.pop())
        self._bytes = 0

    def _free(self, native: NativeTransfer) -> None:
        if native.capacity < LARGE:
            self._small_bytes -= native.capacity
        native.free()

    def sizes(self) -> Mapping[tuple[int, int], int]:
        """How many are idle, by capacity and packets."""
        return Counter((native.capacity, native.packets) for idle in self._idle.values() for native in idle)
