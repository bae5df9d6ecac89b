"""The SCSI disk, command by command, without any bus."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from usbredir.virtual.medium import Buffer, MemoryMedium
from usbredir.virtual.scsi import MAX_BLOCKS, DataPhase, ScsiStatus, ScsiTarget, Sense, Task
from usbredir.virtual.scsi_disk import ScsiDisk

BLOCKS = 64
CONTENT = bytes(block % 251 for block in range(BLOCKS) for _ in range(512))


class Recorder:
    """A medium that counts, fails on request, and can be of any size."""

    def __init__(self, blocks: int = BLOCKS) -> None:
        self.blocks = blocks
        self.read_only = False
        self.fail = ""
        self.calls: list[tuple[str, int, int]] = []

    def _call(self, name: str, offset: int, length: int) -> None:
        self.calls.append((name, offset, length))
        if name == self.fail:
            raise OSError(5, "broken")

    def read(self, offset: int, length: int) -> bytes:
        self._call("read", offset, length)
        return bytes(length)

    def write(self, offset: int, data: Buffer, /) -> None:
        self._call("write", offset, len(data))

    def sync(self) -> None:
        self._call("sync", 0, 0)

    def close(self) -> None:
        self._call("close", 0, 0)


class Result(NamedTuple):
    """What came of a command."""

    status: ScsiStatus
    data: bytes
    sense: tuple[int, int, int]


GOOD = (0, 0, 0)


def run(disk: ScsiTarget, cdb: bytes, data: bytes = b"", *, piece: int = 1 << 20) -> Result:
    """Run a command in pieces of at most *piece* bytes, and fetch its sense data."""
    task = disk.execute(cdb)
    received = b""
    if task.phase is DataPhase.IN:
        while chunk := task.read(piece):
            received += chunk
        assert task.failed or len(received) == task.length
    elif task.phase is DataPhase.OUT:
        assert len(data) == task.length
        for start in range(0, len(data), piece):
            task.write(data[start : start + piece])
    status = task.finish()
    return Result(status, received, fetch_sense(disk))


def fetch_sense(disk: ScsiTarget) -> tuple[int, int, int]:
    task = disk.execute(bytes.fromhex("030000001200"))
    raw = task.read(252)
    assert task.finish() is ScsiStatus.GOOD
    assert len(raw) == 18
    assert raw[0] == 0x70
    assert raw[7] == 10
    return raw[2], raw[12], raw[13]


def ready(disk: ScsiDisk) -> ScsiDisk:
    """The disk, its unit attention after power on fetched."""
    assert fetch_sense(disk) == Sense.RESET_OCCURRED.value
    return disk


@pytest.fixture
def disk() -> ScsiDisk:
    return ready(ScsiDisk(MemoryMedium(CONTENT), serial="0123456789AB"))


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def recorded(recorder: Recorder) -> ScsiDisk:
    return ready(ScsiDisk(recorder))


def cdb6(opcode: int, lba: int = 0, count: int = 0) -> bytes:
    return bytes([opcode]) + lba.to_bytes(3, "big") + bytes([count, 0])


def cdb10(opcode: int, lba: int = 0, count: int = 0, flags: int = 0) -> bytes:
    return struct.pack(">BBIxHx", opcode, flags, lba, count)


def cdb12(opcode: int, lba: int = 0, count: int = 0, flags: int = 0) -> bytes:
    return struct.pack(">BBIIxx", opcode, flags, lba, count)


def cdb16(opcode: int, lba: int = 0, count: int = 0, flags: int = 0) -> bytes:
    return struct.pack(">BBQIxx", opcode, flags, lba, count)


MakeCdb = Callable[[int, int, int], bytes]
READS = [(cdb6, 0x08), (cdb10, 0x28), (cdb12, 0xA8), (cdb16, 0x88)]
WRITES = [(cdb6, 0x0A), (cdb10, 0x2A), (cdb12, 0xAA), (cdb16, 0x8A)]
VERIFIES = [(cdb10, 0x2F), (cdb12, 0xAF), (cdb16, 0x8F)]

TEST_UNIT_READY = bytes(6)
EJECT = bytes.fromhex("1b0000000200")
LOAD = bytes.fromhex("1b0000000300")
PREVENT = bytes.fromhex("1e0000000100")
ALLOW = bytes.fromhex("1e0000000000")


# --- about the device ---


def test_standard_inquiry(disk: ScsiDisk) -> None:
    data = run(disk, bytes.fromhex("12000000ff00")).data
    assert data[:8] == bytes.fromhex("008006021f000000")
    assert data[8:] == b"usbredirVirtual Disk    1.0 "
    assert len(data) == data[4] + 5 == 36


@pytest.mark.parametrize("allocated", [0, 1, 5, 35, 36, 37, 0x1234])
def test_allocation_length_cuts(disk: ScsiDisk, allocated: int) -> None:
    whole = run(disk, bytes.fromhex("12000000ff00")).data
    result = run(disk, struct.pack(">BBBHx", 0x12, 0, 0, allocated))
    assert result.status is ScsiStatus.GOOD
    assert result.data == whole[:allocated]


PAGES = {
    0x00: bytes.fromhex("008083b0b1b2"),
    0x80: b"0123456789AB",
    0x83: bytes.fromhex("02010024") + b"usbredirVirtual Disk    0123456789AB",
    0xB0: bytes(4) + MAX_BLOCKS.to_bytes(4, "big") + bytes(52),
    0xB1: b"\0\x01" + bytes(58),
    0xB2: bytes(4),
}


@pytest.mark.parametrize("page", PAGES)
def test_vital_product_data(disk: ScsiDisk, page: int) -> None:
    data = run(disk, bytes([0x12, 1, page, 1, 0, 0])).data
    assert data[:2] == bytes([0, page])
    assert int.from_bytes(data[2:4], "big") == len(data) - 4
    assert data[4:] == PAGES[page]


def test_report_luns(disk: ScsiDisk) -> None:
    assert run(disk, cdb12(0xA0, 0, 16)).data == bytes.fromhex("0000000800000000") + bytes(8)
    assert run(disk, bytes.fromhex("a000010000000000001000000000")[:12]).data == bytes(8)


REFUSED = {
    "cmddt inquiry": ("120200002400", Sense.INVALID_FIELD_IN_CDB),
    "page without evpd": ("120080002400", Sense.INVALID_FIELD_IN_CDB),
    "unknown vital page": ("12018100ff00", Sense.INVALID_FIELD_IN_CDB),
    "report luns with little room": ("a00000000000" + "0000000f0000", Sense.INVALID_FIELD_IN_CDB),
    "report luns of a strange kind": ("a00003000000" + "000000ff0000", Sense.INVALID_FIELD_IN_CDB),
    "descriptor sense": ("030100001200", Sense.INVALID_FIELD_IN_CDB),
    "saved mode pages": ("1a00ff00ff00", Sense.SAVING_PARAMETERS_NOT_SUPPORTED),
    "unknown mode page": ("1a000500ff00", Sense.INVALID_FIELD_IN_CDB),
    "unknown mode subpage": ("1a000801ff00", Sense.INVALID_FIELD_IN_CDB),
    "saving mode select": ("151100001800", Sense.INVALID_FIELD_IN_CDB),
    "strange prevention": ("1e0000000200", Sense.INVALID_FIELD_IN_CDB),
    "capacity of an address": ("25000000000100000000", Sense.INVALID_FIELD_IN_CDB),
    "other service action": ("9e110000000000000000000000200000", Sense.INVALID_FIELD_IN_CDB),
    "format unit": ("040000000000", Sense.INVALID_COMMAND),
    "format unit with data": ("041000000000", Sense.INVALID_COMMAND),
    "write same": ("41000000000000000100", Sense.INVALID_COMMAND),
    "ata pass-through": ("a1082e0000000000000000ec", Sense.INVALID_COMMAND),
    "no command": ("", Sense.INVALID_COMMAND),
    "cut off": ("28000000000000000001"[:-2], Sense.INVALID_FIELD_IN_CDB),
    "protection information": ("28200000000000000100", Sense.INVALID_FIELD_IN_CDB),
    "protected write": ("2a600000000000000100", Sense.INVALID_FIELD_IN_CDB),
    "protected verify": ("2f200000000000000100", Sense.INVALID_FIELD_IN_CDB),
    "verify with one block": ("2f060000000000000100", Sense.INVALID_FIELD_IN_CDB),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(disk: ScsiDisk, name: str) -> None:
    cdb, sense = REFUSED[name]
    task = disk.execute(bytes.fromhex(cdb))
    assert task.phase is DataPhase.NONE
    assert task.failed
    assert task.read(10) == b""
    task.write(b"ignored")
    assert task.finish() is ScsiStatus.CHECK_CONDITION
    assert fetch_sense(disk) == sense.value
    assert fetch_sense(disk) == GOOD


def test_sense_belongs_to_the_last_command(disk: ScsiDisk) -> None:
    disk.execute(cdb6(0x04)).finish()
    disk.execute(TEST_UNIT_READY).finish()
    assert fetch_sense(disk) == GOOD


def test_sense_data_that_nobody_took_is_kept(disk: ScsiDisk) -> None:
    """REQUEST SENSE counts when it has finished."""
    disk.execute(cdb6(0x04)).finish()
    disk.execute(bytes.fromhex("030000001200")).read(4)
    assert fetch_sense(disk) == Sense.INVALID_COMMAND.value


def test_read_format_capacities(disk: ScsiDisk) -> None:
    data = run(disk, bytes.fromhex("2300000000000000fc00")).data
    assert data == bytes.fromhex("00000008") + struct.pack(">II", BLOCKS, 0x02000200)


# --- unit attention, ejecting ---


@pytest.mark.parametrize("cdb", [TEST_UNIT_READY, cdb10(0x28, 0, 1), cdb10(0x25), cdb6(0x04), bytes([0xFF])])
def test_reset_is_reported_once(disk: ScsiDisk, cdb: bytes) -> None:
    disk.reset()
    assert disk.execute(cdb).finish() is ScsiStatus.CHECK_CONDITION
    assert fetch_sense(disk) == Sense.RESET_OCCURRED.value
    assert run(disk, TEST_UNIT_READY).status is ScsiStatus.GOOD


def test_inquiry_and_report_luns_leave_attention(disk: ScsiDisk) -> None:
    disk.reset()
    assert disk.execute(bytes.fromhex("120000002400")).finish() is ScsiStatus.GOOD
    assert disk.execute(cdb12(0xA0, 0, 16)).finish() is ScsiStatus.GOOD
    assert disk.execute(TEST_UNIT_READY).finish() is ScsiStatus.CHECK_CONDITION


def test_request_sense_fetches_attention(disk: ScsiDisk) -> None:
    disk.reset()
    assert fetch_sense(disk) == Sense.RESET_OCCURRED.value
    assert run(disk, TEST_UNIT_READY).status is ScsiStatus.GOOD


NEED_MEDIUM = [
    TEST_UNIT_READY,
    cdb10(0x28, 0, 1),
    cdb10(0x2A, 0, 1),
    cdb10(0x2F, 0, 1),
    cdb10(0x35),
    cdb10(0x25),
    cdb16(0x9E, 0, 0, 0x10),
    bytes.fromhex("2300000000000000fc00"),
]


@pytest.mark.parametrize("cdb", NEED_MEDIUM)
def test_nothing_works_without_the_medium(disk: ScsiDisk, cdb: bytes) -> None:
    assert run(disk, EJECT).status is ScsiStatus.GOOD
    assert not disk.medium_present
    assert run(disk, cdb).sense == Sense.MEDIUM_NOT_PRESENT.value


@pytest.mark.parametrize("cdb", [bytes.fromhex("120000002400"), bytes.fromhex("1a003f00ff00"), PREVENT, EJECT])
def test_what_works_without_the_medium(disk: ScsiDisk, cdb: bytes) -> None:
    run(disk, EJECT)
    assert run(disk, cdb).status is ScsiStatus.GOOD


def test_eject_and_load(disk: ScsiDisk) -> None:
    run(disk, EJECT)
    assert disk.execute(LOAD).finish() is ScsiStatus.GOOD
    assert disk.execute(TEST_UNIT_READY).finish() is ScsiStatus.CHECK_CONDITION
    assert fetch_sense(disk) == Sense.MEDIUM_MAY_HAVE_CHANGED.value
    assert run(disk, cdb10(0x28, 3, 1)).data == CONTENT[3 * 512 : 4 * 512]


def test_load_when_loaded_changes_nothing(disk: ScsiDisk) -> None:
    assert run(disk, LOAD).sense == GOOD


def test_eject_is_refused_while_prevented(disk: ScsiDisk) -> None:
    run(disk, PREVENT)
    assert run(disk, EJECT).sense == Sense.MEDIUM_REMOVAL_PREVENTED.value
    assert disk.medium_present
    run(disk, ALLOW)
    assert run(disk, EJECT).status is ScsiStatus.GOOD


def test_reset_loads_and_allows_removal(disk: ScsiDisk) -> None:
    run(disk, EJECT)
    run(disk, PREVENT)
    disk.reset()
    fetch_sense(disk)
    assert disk.medium_present
    assert run(disk, EJECT).status is ScsiStatus.GOOD


def test_fixed_disk_cannot_be_ejected() -> None:
    disk = ready(ScsiDisk(MemoryMedium(CONTENT), removable=False))
    assert run(disk, bytes.fromhex("120000002400")).data[1] == 0
    assert run(disk, EJECT).sense == Sense.INVALID_FIELD_IN_CDB.value
    assert run(disk, bytes.fromhex("1b0000000000")).status is ScsiStatus.GOOD


def test_starting_a_started_disk_does_nothing(recorded: ScsiDisk, recorder: Recorder) -> None:
    assert run(recorded, bytes.fromhex("1b0000000100")).status is ScsiStatus.GOOD
    assert recorder.calls == []


def test_power_conditions_are_ignored(disk: ScsiDisk) -> None:
    assert run(disk, bytes.fromhex("1b0000003200")).status is ScsiStatus.GOOD
    assert disk.medium_present


@pytest.mark.parametrize("cdb", [EJECT, bytes.fromhex("1b0000000000")])
def test_stopping_flushes(recorded: ScsiDisk, recorder: Recorder, cdb: bytes) -> None:
    run(recorded, cdb)
    assert recorder.calls == [("sync", 0, 0)]


def test_eject_that_cannot_flush_fails(recorded: ScsiDisk, recorder: Recorder) -> None:
    recorder.fail = "sync"
    assert run(recorded, EJECT).sense == Sense.WRITE_ERROR.value
    assert recorded.medium_present


# --- capacity ---


@pytest.mark.parametrize(
    ("blocks", "last10"),
    [(1, 0), (BLOCKS, BLOCKS - 1), (0xFFFFFFFF, 0xFFFFFFFE), (1 << 32, 0xFFFFFFFF), (1 << 40, 0xFFFFFFFF)],
)
def test_capacity(blocks: int, last10: int) -> None:
    disk = ready(ScsiDisk(Recorder(blocks)))
    assert run(disk, cdb10(0x25)).data == struct.pack(">II", last10, 512)
    whole = run(disk, cdb16(0x9E, 0, 255, 0x10)).data
    assert whole == struct.pack(">QI", blocks - 1, 512) + bytes(20)
    assert run(disk, cdb16(0x9E, 0, 12, 0x10)).data == whole[:12]
    assert run(disk, cdb10(0x25, 5)[:8] + b"\1\0").data == struct.pack(">II", last10, 512)


def test_blocks_beyond_2_tib() -> None:
    recorder = Recorder((1 << 33) + 10)
    disk = ready(ScsiDisk(recorder))
    run(disk, cdb16(0x88, (1 << 33) + 1, 2))
    run(disk, cdb16(0x8A, (1 << 33) + 9, 1), bytes(512))
    assert recorder.calls == [("read", ((1 << 33) + 1) * 512, 1024), ("write", ((1 << 33) + 9) * 512, 512)]
    assert run(disk, cdb16(0x88, (1 << 33) + 10, 1)).sense == Sense.LBA_OUT_OF_RANGE.value
    assert run(disk, cdb16(0x88, (1 << 64) - 1, 2)).sense == Sense.LBA_OUT_OF_RANGE.value


# --- reading ---


@pytest.mark.parametrize(("make", "opcode"), READS)
@pytest.mark.parametrize("piece", [1, 13, 512, 1000, 1 << 20])
def test_read(disk: ScsiDisk, make: MakeCdb, opcode: int, piece: int) -> None:
    assert run(disk, make(opcode, 5, 3), piece=piece).data == CONTENT[5 * 512 : 8 * 512]


def test_read_6_of_zero_blocks_is_256() -> None:
    disk = ready(ScsiDisk(Recorder(0x1FFFFF + 1)))
    assert disk.execute(cdb6(0x08, 7, 0)).length == 256 * 512
    assert disk.execute(cdb6(0x08, 0x1FFFFF, 1)).length == 512


@pytest.mark.parametrize(("make", "opcode"), [*READS[1:], *WRITES[1:], *VERIFIES])
def test_zero_blocks_are_no_data(disk: ScsiDisk, make: MakeCdb, opcode: int) -> None:
    assert disk.execute(make(opcode, BLOCKS, 0)).phase is DataPhase.NONE
    assert run(disk, make(opcode, BLOCKS, 0)).status is ScsiStatus.GOOD


@pytest.mark.parametrize(("make", "opcode"), [*READS, *WRITES, *VERIFIES, (cdb10, 0x35), (cdb16, 0x91)])
@pytest.mark.parametrize(("lba", "count"), [(BLOCKS, 1), (BLOCKS - 1, 2), (0, BLOCKS + 1), (BLOCKS + 1, 200)])
def test_out_of_range(disk: ScsiDisk, make: MakeCdb, opcode: int, lba: int, count: int) -> None:
    assert run(disk, make(opcode, lba, count)).sense == Sense.LBA_OUT_OF_RANGE.value


@pytest.mark.parametrize("opcode", [0x88, 0x8A, 0x8F])
def test_transfer_limit(opcode: int) -> None:
    disk = ready(ScsiDisk(Recorder(1 << 33)))
    assert run(disk, cdb16(opcode, 0, MAX_BLOCKS + 1)).sense == Sense.INVALID_FIELD_IN_CDB.value
    assert not disk.execute(cdb16(opcode, 0, MAX_BLOCKS)).failed


def test_read_is_cut_to_what_is_asked(recorded: ScsiDisk, recorder: Recorder) -> None:
    """Nothing is read ahead or twice."""
    task = recorded.execute(cdb10(0x28, 2, 4))
    assert recorder.calls == []
    assert [len(task.read(length)) for length in (1000, 0, 13, 4096, 4096)] == [1000, 0, 13, 1035, 0]
    assert recorder.calls == [("read", 1024, 1000), ("read", 2024, 13), ("read", 2037, 1035)]


def test_read_error_midway(recorded: ScsiDisk, recorder: Recorder) -> None:
    task = recorded.execute(cdb10(0x28, 2, 4))
    assert len(task.read(512)) == 512
    recorder.fail = "read"
    assert task.read(512) == b""
    recorder.fail = ""
    assert task.failed
    assert task.read(512) == b""
    assert task.finish() is ScsiStatus.CHECK_CONDITION
    assert fetch_sense(recorded) == Sense.UNRECOVERED_READ_ERROR.value


# --- writing ---


@pytest.mark.parametrize(("make", "opcode"), WRITES)
@pytest.mark.parametrize("piece", [1, 13, 512, 1000, 1 << 20])
def test_write(disk: ScsiDisk, make: MakeCdb, opcode: int, piece: int) -> None:
    data = bytes(range(256)) * 6
    assert run(disk, make(opcode, 5, 3), data, piece=piece).status is ScsiStatus.GOOD
    assert run(disk, cdb10(0x28, 0, BLOCKS)).data == CONTENT[: 5 * 512] + data + CONTENT[8 * 512 :]


def test_write_reaches_the_medium_before_the_status(recorded: ScsiDisk, recorder: Recorder) -> None:
    task = recorded.execute(cdb10(0x2A, 1, 2))
    task.write(bytes(500))
    task.write(bytes(524))
    assert recorder.calls == [("write", 512, 500), ("write", 1012, 524)]


@pytest.mark.parametrize(("make", "opcode"), [(cdb10, 0x2A), (cdb12, 0xAA), (cdb16, 0x8A)])
def test_forced_unit_access_flushes(
    recorded: ScsiDisk, recorder: Recorder, make: Callable[[int, int, int, int], bytes], opcode: int
) -> None:
    run(recorded, make(opcode, 1, 1, 0x08), bytes(512))
    assert recorder.calls == [("write", 512, 512), ("sync", 0, 0)]


def test_forced_unit_access_read_flushes_first(recorded: ScsiDisk, recorder: Recorder) -> None:
    run(recorded, cdb10(0x28, 1, 1, 0x08))
    assert recorder.calls == [("sync", 0, 0), ("read", 512, 512)]


def test_failed_flush_fails_the_write(recorded: ScsiDisk, recorder: Recorder) -> None:
    recorder.fail = "sync"
    assert run(recorded, cdb10(0x2A, 1, 1, 0x08), bytes(512)).sense == Sense.WRITE_ERROR.value


def test_write_error(recorded: ScsiDisk, recorder: Recorder) -> None:
    recorder.fail = "write"
    assert run(recorded, cdb10(0x2A, 1, 2), bytes(1024), piece=512).sense == Sense.WRITE_ERROR.value
    assert recorder.calls == [("write", 512, 512)]


@pytest.mark.parametrize("how", ["disk", "medium"])
def test_write_protected(how: str) -> None:
    medium = MemoryMedium(CONTENT, read_only=how == "medium")
    disk = ready(ScsiDisk(medium, read_only=how == "disk"))
    for make, opcode in WRITES:
        assert run(disk, make(opcode, 0, 1)).sense == Sense.WRITE_PROTECTED.value
    assert run(disk, bytes.fromhex("1a003f00ff00")).data[2] == 0x90
    assert run(disk, cdb10(0x35)).status is ScsiStatus.GOOD
    assert medium.read(0, len(CONTENT)) == CONTENT


@pytest.mark.parametrize("cdb", [cdb10(0x35), cdb10(0x35, 3, 4), cdb16(0x91), cdb16(0x91, 3, 4)])
def test_synchronize_cache(recorded: ScsiDisk, recorder: Recorder, cdb: bytes) -> None:
    assert run(recorded, cdb).status is ScsiStatus.GOOD
    assert recorder.calls == [("sync", 0, 0)]
    recorder.fail = "sync"
    assert run(recorded, cdb).sense == Sense.WRITE_ERROR.value


# --- verifying ---


@pytest.mark.parametrize(("make", "opcode"), VERIFIES)
def test_verify_reads(recorded: ScsiDisk, recorder: Recorder, make: MakeCdb, opcode: int) -> None:
    assert run(recorded, make(opcode, 2, 3)).status is ScsiStatus.GOOD
    assert recorder.calls == [("read", 1024, 1536)]
    recorder.fail = "read"
    assert run(recorded, make(opcode, 2, 3)).sense == Sense.UNRECOVERED_READ_ERROR.value


def test_verify_reads_in_bounded_pieces() -> None:
    recorder = Recorder(1 << 20)
    run(ready(ScsiDisk(recorder)), cdb10(0x2F, 0, 5000))
    assert [length for _, _, length in recorder.calls] == [1 << 20, 1 << 20, 5000 * 512 - (2 << 20)]


@pytest.mark.parametrize("piece", [100, 512, 4096])
def test_verify_compares(disk: ScsiDisk, piece: int) -> None:
    same = CONTENT[512:2048]
    assert run(disk, cdb10(0x2F, 1, 3, 0x02), same, piece=piece).status is ScsiStatus.GOOD
    other = same[:-1] + b"\xff"
    result = run(disk, cdb10(0x2F, 1, 3, 0x02), other, piece=piece)
    assert result.sense == Sense.MISCOMPARE_DURING_VERIFY.value


def test_verify_compare_read_error(recorded: ScsiDisk, recorder: Recorder) -> None:
    recorder.fail = "read"
    result = run(recorded, cdb10(0x2F, 1, 2, 0x02), bytes(1024), piece=512)
    assert result.sense == Sense.UNRECOVERED_READ_ERROR.value
    assert len(recorder.calls) == 1


# --- mode parameters ---

CACHE_ON = bytes.fromhex("081204") + bytes(17)
CACHE_OFF = bytes.fromhex("081200") + bytes(17)


@pytest.mark.parametrize("page", ["0800", "3f00", "3fff"])
def test_mode_sense(disk: ScsiDisk, page: str) -> None:
    assert run(disk, bytes.fromhex(f"1a00{page}ff00")).data == bytes.fromhex("17001000") + CACHE_ON
    assert run(disk, bytes.fromhex(f"5a00{page}000000fff000")).data == bytes.fromhex("001a001000000000") + CACHE_ON
    assert run(disk, bytes.fromhex(f"1a00{page}0300")).data == bytes.fromhex("170010")


def test_mode_sense_page_controls(disk: ScsiDisk) -> None:
    assert run(disk, bytes.fromhex("1a004800ff00")).data[4:] == CACHE_ON  # only that bit can change
    run(disk, bytes.fromhex("151000001800"), bytes(4) + CACHE_OFF)
    assert run(disk, bytes.fromhex("1a000800ff00")).data[4:] == CACHE_OFF
    assert run(disk, bytes.fromhex("1a008800ff00")).data[4:] == CACHE_ON


@pytest.mark.parametrize(
    ("cdb", "head"), [("151000001800", bytes(4)), ("55100000000000001c00", bytes(8))], ids=["6", "10"]
)
def test_mode_select_switches_the_write_cache(recorded: ScsiDisk, recorder: Recorder, cdb: str, head: bytes) -> None:
    assert run(recorded, bytes.fromhex(cdb), head + CACHE_OFF, piece=5).status is ScsiStatus.GOOD
    run(recorded, cdb10(0x2A, 0, 1), bytes(512))
    assert recorder.calls == [("sync", 0, 0), ("write", 0, 512), ("sync", 0, 0)]
    run(recorded, bytes.fromhex(cdb), head + CACHE_ON)
    run(recorded, cdb10(0x2A, 0, 1), bytes(512))
    assert recorder.calls[-1] == ("write", 0, 512)


SELECTED = {
    "nothing but a header": (bytes(4), None),
    "the page twice": (bytes(4) + CACHE_ON + CACHE_ON, None),
    "short header": (bytes(3), Sense.PARAMETER_LIST_LENGTH_ERROR),
    "cut page": (bytes(4) + CACHE_ON[:-1], Sense.PARAMETER_LIST_LENGTH_ERROR),
    "block descriptor": (bytes(3) + b"\x08" + bytes(8), Sense.INVALID_FIELD_IN_PARAMETER_LIST),
    "other page": (bytes(4) + b"\x0a" + CACHE_ON[1:], Sense.INVALID_FIELD_IN_PARAMETER_LIST),
    "other bit": (bytes(4) + CACHE_ON[:-1] + b"\1", Sense.INVALID_FIELD_IN_PARAMETER_LIST),
}


@pytest.mark.parametrize("name", SELECTED)
def test_mode_select(disk: ScsiDisk, name: str) -> None:
    data, sense = SELECTED[name]
    result = run(disk, bytes([0x15, 0x10, 0, 0, len(data), 0]), data)
    assert result.sense == (GOOD if sense is None else sense.value)


def test_mode_select_of_nothing(disk: ScsiDisk) -> None:
    assert run(disk, bytes.fromhex("151000000000")).status is ScsiStatus.GOOD


def test_write_cache_stays_on_when_it_cannot_be_flushed(recorded: ScsiDisk, recorder: Recorder) -> None:
    recorder.fail = "sync"
    result = run(recorded, bytes.fromhex("151000001800"), bytes(4) + CACHE_OFF)
    assert result.sense == Sense.WRITE_ERROR.value
    assert run(recorded, bytes.fromhex("1a000800ff00")).data[4:] == CACHE_ON


# --- whatever comes ---


@pytest.mark.parametrize(
    ("name", "text"), [("vendor", "x" * 9), ("product", "x" * 17), ("revision", "12345"), ("serial", "ä")]
)
def test_bad_texts(name: str, text: str) -> None:
    with pytest.raises(ValueError, match=name):
        ScsiDisk(MemoryMedium(CONTENT), **{name: text})  # type: ignore[arg-type]


def test_task_without_a_disk() -> None:
    assert Task().finish() is ScsiStatus.GOOD


OPCODES = st.one_of(
    st.integers(0, 255),
    st.sampled_from([0x00, 0x03, 0x08, 0x0A, 0x12, 0x15, 0x1A, 0x1B, 0x1E, 0x23, 0x25, 0x28, 0x2A, 0x2F, 0x35, 0x55]),
    st.sampled_from([0x5A, 0x88, 0x8A, 0x8F, 0x91, 0x9E, 0xA0, 0xA8, 0xAA, 0xAF]),
)
CDBS = st.builds(lambda opcode, rest: bytes([opcode]) + rest, OPCODES, st.binary(max_size=15) | st.binary(max_size=2))


@settings(deadline=None, max_examples=150)
@given(st.lists(st.tuples(CDBS, st.sampled_from(["", "read", "write", "sync"]), st.booleans()), max_size=10))
def test_any_commands_are_answered(commands: list[tuple[bytes, str, bool]]) -> None:
    """No command raises; phase and length agree; after a reset the disk works."""
    recorder = Recorder(1 << 20)
    disk = ScsiDisk(recorder)
    for cdb, recorder.fail, finish in commands:
        task = disk.execute(cdb)
        assert (task.phase is DataPhase.NONE) == (task.length == 0)
        assert len(task.read(3000)) <= min(3000, task.length)
        task.write(bytes(min(3000, task.length)))
        if finish:
            assert (task.finish() is ScsiStatus.CHECK_CONDITION) >= task.failed
    recorder.fail = ""
    disk.reset()
    ready(disk)
    assert run(disk, cdb10(0x28, 1, 1)).data == bytes(512)
