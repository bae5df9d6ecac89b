"""A USB stick from the guest's side: SCSI commands over the Bulk-Only Transport.

For the demonstration and for tests; operating systems bring their own.
Source: USB Mass Storage Class Bulk-Only Transport 1.0; SBC-3.
"""

from __future__ import annotations

import itertools
import struct
from dataclasses import dataclass

from .errors import DeviceError
from .guest import Guest
from .parser import escape
from .proto import Status

__all__ = ["DiskClient", "Inquiry"]

COMMAND_WRAPPER = struct.Struct("<4sIIBBB16s")
STATUS_WRAPPER = struct.Struct("<4sIIB")
TIMEOUT = 10.0
"""Seconds that one transfer may take."""


@dataclass(frozen=True)
class Inquiry:
    """What a disk says of itself."""

    vendor: str
    product: str
    revision: str


class DiskClient:
    """Reads a disk through a guest. Every method raises DeviceError when a command fails. Threads: as the guest."""

    def __init__(self, guest: Guest, in_endpoint: int = 0x81, out_endpoint: int = 0x02) -> None:
        self._guest = guest
        self._in = in_endpoint
        self._out = out_endpoint
        self._tags = itertools.count(1)

    def inquiry(self) -> Inquiry:
        """Names of the disk."""
        data = self._read_command(struct.pack(">BBBHB", 0x12, 0, 0, 36, 0), 36)
        if len(data) < 36:
            raise DeviceError(f"an INQUIRY answer of {len(data)} bytes: 36 are the least")
        return Inquiry(
            *(escape(data[a:b].decode("ascii", "replace")).strip() for a, b in ((8, 16), (16, 32), (32, 36)))
        )

    def test_unit_ready(self) -> bool:
        """Whether the disk can be used; a first "unit attention" is cleared by asking."""
        return self._command(bytes(6), 0)[1] == 0

    def capacity(self) -> tuple[int, int]:
        """(number of blocks, bytes per block)."""
        data = self._read_command(struct.pack(">BBQIBB", 0x9E, 0x10, 0, 32, 0, 0), 32)
        if len(data) < 12:
            raise DeviceError(f"a READ CAPACITY answer of {len(data)} bytes: 12 are the least")
        last, block = struct.unpack_from(">QI", data)
        return last + 1, block

    def read_blocks(self, block: int, count: int, block_size: int = 512) -> bytes:
        """*count* blocks from *block* on."""
        data = self._read_command(struct.pack(">BBIBHB", 0x28, 0, block, 0, count, 0), count * block_size)
        if len(data) != count * block_size:
            raise DeviceError(f"the disk sent {len(data)} bytes of {count * block_size}")
        return data

    def read(self, offset: int, length: int) -> bytes:
        """*length* bytes from any *offset*, for file system readers."""
        first, last = offset // 512, (offset + length + 511) // 512
        return self.read_blocks(first, last - first)[offset % 512 : offset % 512 + length]

    def _read_command(self, command: bytes, length: int) -> bytes:
        data, status = self._command(command, length)
        if status:
            raise DeviceError(f"the disk refuses SCSI command 0x{command[0]:02x} (status {status})")
        return data

    def _command(self, command: bytes, length: int) -> tuple[bytes, int]:
        """Carry out a command with a data-in phase of *length* bytes: (data, status)."""
        tag = next(self._tags)
        wrapper = COMMAND_WRAPPER.pack(b"USBC", tag, length, 0x80, 0, len(command), command)
        self._check(self._guest.bulk_out(self._out, wrapper, timeout=TIMEOUT).status)
        data = b""
        if length:
            result = self._guest.bulk_in(self._in, length, timeout=TIMEOUT)
            data = result.data if isinstance(result.data, bytes) else bytes(result.data)
            if result.status == Status.STALL:
                self._guest.clear_halt(self._in, timeout=TIMEOUT)
            else:
                self._check(result.status)
        reply = self._guest.bulk_in(self._in, STATUS_WRAPPER.size, timeout=TIMEOUT)
        self._check(reply.status)
        if len(reply.data) != STATUS_WRAPPER.size:
            raise DeviceError(f"a status of {len(reply.data)} bytes: {STATUS_WRAPPER.size} are right")
        signature, replied_tag, _, status = STATUS_WRAPPER.unpack(reply.data)
        if signature != b"USBS" or replied_tag != tag:
            raise DeviceError("the disk's status does not belong to the command")
        return data, status

    @staticmethod
    def _check(status: int) -> None:
        if status != Status.SUCCESS:
            raise DeviceError(f"a transfer to the disk failed: {Status(status).name.lower()}")
