"""The Bulk-Only Transport of USB mass storage: what carries SCSI commands to a target and back.

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

from ..proto import Speed
from .base import VirtualDevice
from .control import NAK, STALL, Answer, Setup, class_in, class_out
from .declare import bulk_in, bulk_out, interface
from .medium import Buffer, MediumSource
from .scsi import DataPhase, ScsiStatus, ScsiTarget, Task

__all__ = ["BulkOnlyDevice", "checked_serial", "checked_speed", "default_serial"]

_IN_ENDPOINT = 0x81
_OUT_ENDPOINT = 0x02

_SPEEDS = (Speed.FULL, Speed.HIGH, Speed.SUPER)
_MOST_BURST = 15

# Bulk-Only Mass Storage Reset and Get Max LUN, with exactly these values. Source: BOT, 3.1 and 3.2.
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


class BulkOnlyDevice(VirtualDevice):
    """A device with one SCSI target behind the Bulk-Only Transport.

    When host and target disagree about the data phase (BOT, 6.7, "the thirteen cases"), the data
    phase is ended by a stall: data-in after what the target has, data-out as soon as the target has
    enough. A target that would move more than the host allows, or the other way, moves nothing: the
    command is not carried out and the status is phase error.

    A command block wrapper that is not valid or not meaningful (BOT, 6.2) stalls both endpoints
    until reset recovery (BOT, 6.6.1).

    Args:
        target: what carries the commands out.
    """

    interfaces = (  # mass storage, SCSI, Bulk-Only Transport
        interface(
            0x08,
            bulk_in(_IN_ENDPOINT, max_burst=_MOST_BURST),
            bulk_out(_OUT_ENDPOINT, max_burst=_MOST_BURST),
            subclass=0x06,
            protocol=0x50,
        ),
    )

    _state: _State

    def __init__(self, target: ScsiTarget) -> None:
        self._target = target
        super().__init__()

    # --- hooks of VirtualDevice ---

    @class_out(0xFF)
    def _reset_transport(self, setup: Setup, data: bytes) -> Answer | None:
        if setup != _RESET_REQUEST:
            return STALL
        self._abandon_command()  # halts stay, which the host clears next
        return None

    @class_in(0xFE)
    def _get_max_lun(self, setup: Setup) -> bytes | Answer:
        return b"\0" if setup == _GET_MAX_LUN_REQUEST else STALL

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

    def began(self) -> None:
        """Start afresh. To the target this is power on."""
        self._abandon_command()
        self._target.reset()

    # --- commands ---

    def _abandon_command(self) -> None:
        self._state = _State.COMMAND
        self._task = Task()
        self._tag = 0
        self._host_left = 0  # bytes of the data phase that the host has yet to move
        self._task_left = 0  # bytes that the target has yet to move
        self._residue = 0
        self._outcome = _Outcome.PASSED

    def _receive_command(self, data: Buffer) -> Answer | None:
        wrapper = _decode_command(bytes(data))
        if wrapper is None:
            self._require_recovery()
            return None
        self._tag = wrapper.tag
        self._residue = self._host_left = wrapper.length
        self._task = self._target.execute(wrapper.cdb)
        self._task_left = self._task.length
        self._state = self._agree(wrapper)
        return None

    def _require_recovery(self) -> None:
        self._state = _State.RECOVERY
        self.halt(_IN_ENDPOINT)
        self.halt(_OUT_ENDPOINT)

    def _agree(self, wrapper: _CommandWrapper) -> _State:
        """Compare what host and target expect of the data phase. Source: BOT, 6.7."""
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
            return STALL
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
        return NAK

    def _refuse(self, _: object) -> Answer:
        return STALL


_WHEN_READ: Mapping[_State, Callable[[BulkOnlyDevice, int], bytes | Answer]] = {
    _State.COMMAND: BulkOnlyDevice._wait,
    _State.DATA_IN: BulkOnlyDevice._send_data,
    _State.DATA_OUT: BulkOnlyDevice._wait,
    _State.STALL_IN: BulkOnlyDevice._refuse,
    # The host may have stopped sending without having seen the stall.
    _State.STALL_OUT: BulkOnlyDevice._send_status,
    _State.STATUS: BulkOnlyDevice._send_status,
    _State.RECOVERY: BulkOnlyDevice._refuse,
}
"""What a transfer on the IN endpoint gets."""

_WHEN_WRITTEN: Mapping[_State, Callable[[BulkOnlyDevice, Buffer], Answer | None]] = {
    _State.COMMAND: BulkOnlyDevice._receive_command,
    _State.DATA_IN: BulkOnlyDevice._wait,
    _State.DATA_OUT: BulkOnlyDevice._receive_data,
    _State.STALL_IN: BulkOnlyDevice._wait,
    _State.STALL_OUT: BulkOnlyDevice._refuse,
    _State.STATUS: BulkOnlyDevice._wait,
    _State.RECOVERY: BulkOnlyDevice._refuse,
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


def checked_speed(speed: Speed) -> Speed:
    """The speed if mass storage can have it. Raises ValueError."""
    if speed not in _SPEEDS:
        raise ValueError(f"mass storage needs full, high or super speed, not {speed!r}")
    return speed


def default_serial(source: MediumSource) -> str:
    """The same for the same source, so that a guest recognises the device."""
    if isinstance(source, (str, os.PathLike)):
        text = os.fsencode(os.path.abspath(source))
    elif isinstance(source, (bytes, bytearray, memoryview)):
        text = bytes(source[:4096])  # has a file system's own serial number
    else:
        text = str(source.blocks).encode()
    return hashlib.sha256(text).hexdigest()[:16].upper()


def checked_serial(serial: str) -> str:
    """The serial number if it is one (BOT, 4.1.1). Raises ValueError."""
    if not re.fullmatch("[0-9A-F]{12,126}", serial):
        raise ValueError(f"a serial number is 12 to 126 digits 0-9 A-F, got {serial!r}")
    return serial
