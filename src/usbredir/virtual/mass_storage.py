"""A USB stick: a disk image, block device or bytes behind the Bulk-Only Transport.

::

    device = MassStorage("disk.img")
    device = MassStorage(make_image({"hello.txt": b"hello"}), read_only=True)

Source: USB Mass Storage Class Bulk-Only Transport 1.0 ("BOT" below), for the SCSI
transparent command set of :mod:`usbredir.virtual.scsi`.
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
from collections.abc import Callable, Mapping
from enum import Enum, IntEnum
from typing import NamedTuple

from ..descriptors import Configuration, DeviceDescriptor, Endpoint, Interface, build_configuration
from ..proto import Speed, TransferType
from .base import Answer, Setup, VirtualDevice
from .medium import Buffer, FileMedium, Medium, MemoryMedium
from .scsi import DataPhase, ScsiDisk, ScsiStatus, Task

__all__ = ["MassStorage"]

_IN_ENDPOINT = 0x81
_OUT_ENDPOINT = 0x02

# The ids of Linux's own mass storage gadget, which every operating system has met.
_VENDOR_ID = 0x0525
_PRODUCT_ID = 0xA4A5
_MANUFACTURER = "usbredir"
_PRODUCT = "Virtual Disk"

_RESET_REQUEST = Setup(request_type=0x21, request=0xFF, value=0, index=0, length=0)
_GET_MAX_LUN_REQUEST = Setup(request_type=0xA1, request=0xFE, value=0, index=0, length=1)

_COMMAND_WRAPPER = struct.Struct("<4sIIBBB16s")
_STATUS_WRAPPER = struct.Struct("<4sIIB")


class _State(Enum):
    """Where the transport is between two command block wrappers (CBW)."""

    COMMAND = "waits for a CBW"
    DATA_IN = "has data for the host"
    DATA_OUT = "waits for data of the host"
    STALL_IN = "ends the data-in phase early: stalls, then has the status"
    STALL_OUT = "ends the data-out phase early: stalls, and has the status"
    STATUS = "has the command status wrapper (CSW)"
    RECOVERY = "got nonsense: stalls until reset recovery"


class _Outcome(IntEnum):
    """bCSWStatus. Source: BOT, table 5.3."""

    PASSED = 0
    FAILED = 1
    PHASE_ERROR = 2


class _CommandWrapper(NamedTuple):
    """A command block wrapper that is valid and meaningful."""

    tag: int
    length: int
    phase: DataPhase
    cdb: bytes


class MassStorage(VirtualDevice):
    """A USB stick with one disk.

    When host and disk disagree about the data phase (BOT, 6.7, "the thirteen cases"), the data
    phase is ended by a stall: data-in after what the disk has, data-out as soon as the disk has
    enough. A disk that would move more than the host allows, or the other way, moves nothing: the
    command is not carried out and the status is phase error.

    A command block wrapper that is not valid or not meaningful (BOT, 6.2) stalls both endpoints
    until reset recovery (BOT, 6.6.1).

    What the guest wrote is with the operating system before the guest sees the command's status, so that
    the end of this process loses nothing; SYNCHRONIZE CACHE and FUA bring it to stable storage.

    Args:
        source: path of an image file or block device, used in place; or the content, kept in
            memory; or a medium of one's own. The device closes it.
        read_only: write protected.
        removable: the guest can eject the disk. Without, guests ask less often whether it is still there.
        speed: FULL, HIGH or SUPER.
        serial: serial number, at least 12 digits 0-9 A-F (BOT, 4.1.1). By default made from *source*, the
            same each time.

    Raises:
        OSError: the file cannot be opened or is smaller than a block of 512 bytes.
        ValueError: the content is smaller than a block, or *speed* or *serial* is not as above.
    """

    _state: _State

    def __init__(
        self,
        source: str | os.PathLike[str] | Buffer | Medium,
        *,
        read_only: bool = False,
        removable: bool = True,
        speed: Speed = Speed.HIGH,
        serial: str | None = None,
    ) -> None:
        if speed not in _MAX_PACKET:
            raise ValueError(f"mass storage needs full, high or super speed, not {speed!r}")
        serial = _checked_serial(_default_serial(source) if serial is None else serial)
        super().__init__(
            speed=speed,
            device_descriptor=_device_descriptor(speed),
            configurations=[_configuration(speed)],
            strings={1: _MANUFACTURER, 2: _PRODUCT, 3: serial},
            bos=_BOS if speed is Speed.SUPER else None,
        )
        self._medium = _open_medium(source, read_only)
        self._disk = ScsiDisk(
            self._medium,
            read_only=read_only,
            removable=removable,
            vendor=_MANUFACTURER,
            product=_PRODUCT,
            serial=serial,
        )
        self._abandon_command()

    @property
    def medium_present(self) -> bool:
        """Whether the guest has not ejected the disk. A bus reset brings it back."""
        return self._disk.medium_present

    def close(self) -> None:
        """Close the device, then its file. Idempotent."""
        super().close()
        with self._hooks:  # not under the feet of a hook that is still reading
            self._medium.close()

    # --- hooks of VirtualDevice ---

    def control_request(self, setup: Setup, data: bytes) -> bytes | Answer:
        """Bulk-Only Mass Storage Reset and Get Max LUN, with exactly the values of BOT, 3.1 and 3.2."""
        if setup == _RESET_REQUEST:
            # Halts stay, which the host clears next. Source: BOT, 3.1.
            self._abandon_command()
            return b""
        if setup == _GET_MAX_LUN_REQUEST:
            return b"\0"
        return Answer.STALL

    def data_in(self, endpoint: int, length: int) -> bytes | Answer:
        """Data or status for the host."""
        return _WHEN_READ[self._state](self, length)

    def data_out(self, endpoint: int, data: Buffer) -> Answer | None:
        """A command or data from the host."""
        return _WHEN_WRITTEN[self._state](self, data)

    def halt_cleared(self, endpoint: int) -> None:
        """Go on to the status after the stall that ended a data phase; without reset, halt again."""
        if self._state is _State.RECOVERY:
            self.halt(endpoint)
        elif (self._state, endpoint) in _ENDED_BY_CLEARING:
            self._state = _State.STATUS

    def was_reset(self) -> None:
        """Start afresh. To the disk this is power on: an ejected medium is back."""
        self._abandon_command()
        self._disk.reset()

    # --- commands ---

    def _abandon_command(self) -> None:
        self._state = _State.COMMAND
        self._task = Task()
        self._tag = 0
        self._host_left = 0  # bytes of the data phase that the host has yet to move
        self._task_left = 0  # bytes that the disk has yet to move
        self._residue = 0
        self._outcome = _Outcome.PASSED

    def _receive_command(self, data: Buffer) -> Answer | None:
        wrapper = _decode_command(bytes(data))
        if wrapper is None:
            self._require_recovery()
            return None
        self._tag = wrapper.tag
        self._residue = self._host_left = wrapper.length
        self._task = self._disk.execute(wrapper.cdb)
        self._task_left = self._task.length
        self._state = self._agree(wrapper)
        return None

    def _require_recovery(self) -> None:
        self._state = _State.RECOVERY
        self.halt(_IN_ENDPOINT)
        self.halt(_OUT_ENDPOINT)

    def _agree(self, wrapper: _CommandWrapper) -> _State:
        """Compare what host and disk expect of the data phase. Source: BOT, 6.7."""
        task = self._task
        if task.phase is DataPhase.NONE:  # cases 1, 4 and 9
            self._finish_task()
            return _WITHOUT_DATA[wrapper.phase]
        if task.phase is wrapper.phase and task.length <= wrapper.length:  # cases 5, 6, 11 and 12
            return _WITH_DATA[task.phase]
        self._outcome = _Outcome.PHASE_ERROR  # cases 2, 3, 7, 8, 10 and 13
        return _WITHOUT_DATA[wrapper.phase]

    def _finish_task(self) -> None:
        good = self._task.finish() is ScsiStatus.GOOD
        self._outcome = _Outcome.PASSED if good else _Outcome.FAILED

    # --- data and status ---

    def _send_data(self, length: int) -> bytes | Answer:
        data = self._task.read(length)
        self._task_left -= len(data)
        self._residue -= len(data)
        if self._task.failed:
            self._finish_task()
            self._state = _State.STALL_IN
            return Answer.STALL
        if not self._task_left:
            self._finish_task()
            self._state = _State.STALL_IN if self._residue else _State.STATUS
        return data

    def _receive_data(self, data: Buffer) -> Answer | None:
        if len(data) > self._host_left:  # what is too much is no command
            self._require_recovery()
            return None
        self._host_left -= len(data)
        useful = data if len(data) <= self._task_left else memoryview(data)[: self._task_left]
        self._task.write(useful)
        self._task_left -= len(useful)
        if not self._task.failed:
            self._residue -= len(useful)
        if self._task.failed or not self._task_left:
            self._finish_task()
            self._state = _State.STALL_OUT if self._host_left else _State.STATUS
        return None

    def _send_status(self, length: int) -> bytes | Answer:
        if not length:
            return b""
        # Whole, whatever the length: the host that asks for less sees babble, as on a wire.
        status = _STATUS_WRAPPER.pack(b"USBS", self._tag, self._residue, self._outcome)
        self._abandon_command()
        return status

    def _wait(self, _: object) -> Answer:
        return Answer.NAK

    def _refuse(self, _: object) -> Answer:
        return Answer.STALL


_WHEN_READ: Mapping[_State, Callable[[MassStorage, int], bytes | Answer]] = {
    _State.COMMAND: MassStorage._wait,
    _State.DATA_IN: MassStorage._send_data,
    _State.DATA_OUT: MassStorage._wait,
    _State.STALL_IN: MassStorage._refuse,
    # The host may have stopped sending without having seen the stall.
    _State.STALL_OUT: MassStorage._send_status,
    _State.STATUS: MassStorage._send_status,
    _State.RECOVERY: MassStorage._refuse,
}
"""What a transfer on the IN endpoint gets."""

_WHEN_WRITTEN: Mapping[_State, Callable[[MassStorage, Buffer], Answer | None]] = {
    _State.COMMAND: MassStorage._receive_command,
    _State.DATA_IN: MassStorage._wait,
    _State.DATA_OUT: MassStorage._receive_data,
    _State.STALL_IN: MassStorage._wait,
    _State.STALL_OUT: MassStorage._refuse,
    _State.STATUS: MassStorage._wait,
    _State.RECOVERY: MassStorage._refuse,
}
"""What a transfer on the OUT endpoint gets."""

_ENDED_BY_CLEARING = frozenset({(_State.STALL_IN, _IN_ENDPOINT), (_State.STALL_OUT, _OUT_ENDPOINT)})
"""(state, endpoint): once the endpoint's halt is cleared, only the status is left."""

_WITH_DATA: Mapping[DataPhase, _State] = {
    DataPhase.IN: _State.DATA_IN,
    DataPhase.OUT: _State.DATA_OUT,
}
"""The state after a command whose data phase can take place."""

_WITHOUT_DATA: Mapping[DataPhase, _State] = {
    DataPhase.NONE: _State.STATUS,
    DataPhase.IN: _State.STALL_IN,
    DataPhase.OUT: _State.STALL_OUT,
}
"""The state after a command that moves no data, by what the host expects."""

_MAX_PACKET: Mapping[Speed, int] = {Speed.FULL: 64, Speed.HIGH: 512, Speed.SUPER: 1024}
"""Bytes of a bulk endpoint's packets. Source: USB 2.0, 5.8.3; USB 3.2, 9.6.6."""

_BOS = bytes.fromhex(
    "050f160002"  # two capabilities
    "07100200000000"  # USB 2.0 extension: no link power management
    "0a1003000e00010a2000"  # SuperSpeed: full, high and super speed; works from full speed on
)
"""Binary object store. Source: USB 3.2, 9.6.2."""


def _device_descriptor(speed: Speed) -> bytes:
    super_speed = speed is Speed.SUPER
    return DeviceDescriptor(
        usb_bcd=0x0300 if super_speed else 0x0200,
        device_class=0,
        device_subclass=0,
        device_protocol=0,
        max_packet_size0=9 if super_speed else 64,  # at super speed an exponent of 2
        vendor_id=_VENDOR_ID,
        product_id=_PRODUCT_ID,
        device_version_bcd=0x0100,
        manufacturer_index=1,
        product_index=2,
        serial_index=3,
    ).to_bytes()


def _configuration(speed: Speed) -> bytes:
    super_speed = speed is Speed.SUPER
    endpoints = tuple(
        Endpoint(address, TransferType.BULK, _MAX_PACKET[speed], companion=super_speed, max_burst=15)
        for address in (_IN_ENDPOINT, _OUT_ENDPOINT)
    )
    interface = Interface(0, 0, 0x08, 0x06, 0x50, endpoints=endpoints)  # mass storage, SCSI, Bulk-Only Transport
    power = 13 if super_speed else 50  # about 100 mA, in units of 8 mA or 2 mA
    return build_configuration(Configuration(1, max_power=power, interfaces=(interface,)))


def _decode_command(data: bytes) -> _CommandWrapper | None:
    """None when it is not valid or not meaningful. Source: BOT, 5.1 and 6.2."""
    if len(data) != _COMMAND_WRAPPER.size:
        return None
    signature, tag, length, flags, lun, cdb_length, cdb = _COMMAND_WRAPPER.unpack(data)
    reserved = flags & 0x7F
    if signature != b"USBC" or reserved or lun or not 1 <= cdb_length <= len(cdb):
        return None
    phase = DataPhase.IN if flags else DataPhase.OUT
    return _CommandWrapper(tag, length, phase if length else DataPhase.NONE, cdb[:cdb_length])


def _open_medium(source: str | os.PathLike[str] | Buffer | Medium, read_only: bool) -> Medium:
    if isinstance(source, (str, os.PathLike)):
        return FileMedium(source, read_only)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return MemoryMedium(source, read_only)
    return source


def _default_serial(source: str | os.PathLike[str] | Buffer | Medium) -> str:
    """The same for the same source, so that a guest recognises the stick."""
    if isinstance(source, (str, os.PathLike)):
        text = os.fsencode(os.path.abspath(source))
    elif isinstance(source, (bytes, bytearray, memoryview)):
        text = bytes(source[:4096])  # has a file system's own serial number
    else:
        text = str(source.blocks).encode()
    return hashlib.sha256(text).hexdigest()[:16].upper()


def _checked_serial(serial: str) -> str:
    if not re.fullmatch("[0-9A-F]{12,126}", serial):
        raise ValueError(f"a serial number is 12 to 126 digits 0-9 A-F, got {serial!r}")
    return serial
