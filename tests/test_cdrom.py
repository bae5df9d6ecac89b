"""The CD-ROM drive: its commands without a bus, and discs that come and go behind the Bulk-Only Transport."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from usbredir.device import UsbDevice
from usbredir.proto import Speed
from usbredir.testing import check_device
from usbredir.virtual import Cdrom
from usbredir.virtual.medium import MemoryMedium
from usbredir.virtual.scsi import DataPhase, ScsiStatus, Sense
from usbredir.virtual.scsi_cdrom import CD_BLOCK_SIZE, ScsiCdrom

from .test_mass_storage import FAILED, PASSED, Initiator
from .test_scsi import Recorder, Result, run

BLOCKS = 24
IMAGE = b"".join(bytes([block]) * CD_BLOCK_SIZE for block in range(BLOCKS))

TEST_UNIT_READY = bytes(6)
REQUEST_SENSE = bytes.fromhex("030000001200")
EJECT = bytes.fromhex("1b0000000200")
LOAD = bytes.fromhex("1b0000000300")
PREVENT = bytes.fromhex("1e0000000100")
ALLOW = bytes.fromhex("1e0000000000")
EVENTS = bytes.fromhex("4a 01 0000 10 0000 0008 00")
READ_CAPACITY = bytes.fromhex("25000000000000000000")


def command(text: str) -> bytes:
    """A descriptor block from hexadecimal digits, filled up to 12 bytes."""
    return bytes.fromhex(text).ljust(12, b"\0")


def read10(block: int, count: int) -> bytes:
    return struct.pack(">BxIxHx", 0x28, block, count)


def empty_drive() -> ScsiCdrom:
    drive = ScsiCdrom(vendor="usbredir", product="Virtual CD-ROM", revision="1.0", serial="0123456789AB")
    run(drive, REQUEST_SENSE)
    return drive


@pytest.fixture
def drive() -> ScsiCdrom:
    """Give a drive with IMAGE; its unit attention was fetched."""
    drive = empty_drive()
    drive.insert(MemoryMedium(IMAGE))
    assert run(drive, TEST_UNIT_READY).sense == Sense.MEDIUM_MAY_HAVE_CHANGED.value
    return drive


# ================================================================ commands


def test_it_says_that_it_is_a_cd_drive(drive: ScsiCdrom) -> None:
    data = run(drive, command("12000000ff00")).data
    assert data[:5] == bytes((0x05, 0x80, 0x06, 0x02, 31))
    assert data[8:] == b"usbredirVirtual CD-ROM  1.0 "
    assert run(drive, command("12018000ff00")).data == b"\x05\x80\0\x0c0123456789AB"


@pytest.mark.parametrize("cdb", [read10(3, 2), command("a8000000000300000002")])
def test_blocks_have_2048_bytes(drive: ScsiCdrom, cdb: bytes) -> None:
    assert run(drive, READ_CAPACITY).data == struct.pack(">II", BLOCKS - 1, CD_BLOCK_SIZE)
    assert run(drive, cdb, piece=1000).data == bytes([3]) * CD_BLOCK_SIZE + bytes([4]) * CD_BLOCK_SIZE
    assert run(drive, read10(BLOCKS - 1, 2)).sense == Sense.LBA_OUT_OF_RANGE.value


def test_a_tail_shorter_than_a_block_is_out_of_reach() -> None:
    drive = empty_drive()
    drive.insert(MemoryMedium(IMAGE + bytes(512)))
    assert drive.blocks == BLOCKS


LEAD_OUT = "0014aa00"
TOCS = {
    # format 0: the track at block 0 and the lead-out
    "43000000000000006400": f"0012 0101 00140100 00000000 {LEAD_OUT} 00000018",
    "43020000000000006400": f"0012 0101 00140100 00000200 {LEAD_OUT} 00000218",
    "430000000000aa006400": f"000a 0101 {LEAD_OUT} 00000018",
    "43000000000000000c00": "0012 0101 00140100 00000000",
    # format 1: the session, also by the old place of the format
    "43000100000000006400": "000a 0101 00140100 00000000",
    "43000000000000006440": "000a 0101 00140100 00000000",
    # format 2: the full one
    "43000200000000006400": "002e 0101 01 14 00 a0 00000000 01 00 00 01 14 00 a1 00000000 01 00 00"
    " 01 14 00 a2 00000000 00 02 18 01 14 00 01 00000000 00 02 00",
}


@pytest.mark.parametrize("cdb", TOCS)
def test_table_of_contents(drive: ScsiCdrom, cdb: str) -> None:
    expected = TOCS[cdb]
    result = run(drive, command(cdb))
    assert result == Result(ScsiStatus.GOOD, bytes.fromhex(expected), Sense.NO_SENSE.value)


def test_disc_and_track_information(drive: ScsiCdrom) -> None:
    disc = run(drive, command("5100000000000000ff00")).data
    assert len(disc) == 34
    assert disc[:7] == bytes.fromhex("0020 0e 01 01 01 01")
    track = run(drive, command("5201000000010000ff00")).data
    assert track == run(drive, command("5200000000050000ff00")).data
    assert struct.unpack(">H", track[:2])[0] == len(track) - 2
    assert track[2:7] == bytes((1, 1, 0, 4, 1))
    assert track[24:28] == struct.pack(">I", BLOCKS)


def features(drive: ScsiCdrom, cdb: str) -> tuple[int, dict[int, bool]]:
    """The present profile, and which features are current."""
    data = run(drive, command(cdb)).data
    length, profile = struct.unpack_from(">IxxH", data)
    assert length == len(data) - 4
    found, position = {}, 8
    while position < len(data):
        number, flags, size = struct.unpack_from(">HBB", data, position)
        assert size % 4 == 0
        found[number] = bool(flags & 1)
        position += 4 + size
    assert position == len(data)
    return profile, found


ALWAYS = {0: True, 1: True, 2: True, 3: True}
CD, DVD, NEITHER = {0x10: True, 0x1E: True}, {0x10: True, 0x1F: True}, {0x10: False, 0x1E: False, 0x1F: False}
GET_CONFIGURATION, CURRENT_ONES = "46000000000000ffff00", "46010000000000ffff00"


def test_configuration_follows_the_disc() -> None:
    drive = empty_drive()
    assert features(drive, GET_CONFIGURATION) == (0, ALWAYS | NEITHER)
    assert features(drive, CURRENT_ONES) == (0, ALWAYS)
    drive.insert(MemoryMedium(IMAGE))
    assert features(drive, GET_CONFIGURATION) == (0x0008, ALWAYS | NEITHER | CD)
    drive.insert(Recorder(1 << 22))  # 2 GiB
    assert features(drive, CURRENT_ONES) == (0x0010, ALWAYS | DVD)
    assert features(drive, "46020010000000ffff00") == (0x0010, {0x10: True})
    assert features(drive, "46020011000000ffff00") == (0x0010, {})
    assert features(drive, "46000003000000ffff00")[1] == {3: True, **NEITHER, **DVD}


def test_mode_pages(drive: ScsiCdrom) -> None:
    page = run(drive, command("5a002a000000000 0ff00".replace(" ", ""))).data
    assert page[:10] == bytes.fromhex("001a 00 00 0000 0000 2a 12")
    assert page[10:15] == bytes.fromhex("0b 00 30 00 29")
    run(drive, PREVENT)
    assert run(drive, command("5a002a0000000000ff00")).data[14] == 0x2B  # it is locked
    everything = run(drive, command("1a003f00ff00")).data
    assert everything[0] == len(everything) - 1
    assert everything[4:6] == bytes((0x01, 10))
    assert everything[16:18] == bytes((0x2A, 18))
    assert run(drive, command("5a006a0000000000ff00")).data[10:] == bytes(18)  # nothing can be changed


@pytest.mark.parametrize(
    ("cdb", "answer"),
    [
        ("bd0000000000000000080000", bytes(8)),  # MECHANISM STATUS
        ("bb00ffff0000000000000000", b""),  # SET CD SPEED
        ("2b000000000500000000", b""),  # SEEK
        ("4a010000020000000800", bytes.fromhex("0002 80 10")),  # no such class of events
    ],
)
def test_small_commands(drive: ScsiCdrom, cdb: str, answer: bytes) -> None:
    assert run(drive, command(cdb)) == Result(ScsiStatus.GOOD, answer, Sense.NO_SENSE.value)


REFUSED = {
    "4a000000100000000800": Sense.INVALID_FIELD_IN_CDB,  # asynchronous events
    "46030000000000ffff00": Sense.INVALID_FIELD_IN_CDB,
    "43000400000000006400": Sense.INVALID_FIELD_IN_CDB,  # ATIP, which only writable discs have
    "43000000000002006400": Sense.INVALID_FIELD_IN_CDB,  # track 2
    "5101000000000000ff00": Sense.INVALID_FIELD_IN_CDB,
    "5201000000020000ff00": Sense.INVALID_FIELD_IN_CDB,
    "5200000000180000ff00": Sense.INVALID_FIELD_IN_CDB,  # a block behind the last
    "5a00080000000000ff00": Sense.INVALID_FIELD_IN_CDB,  # the page of disks
    "2a00000000000000010 0".replace(" ", ""): Sense.INVALID_COMMAND,  # WRITE
    "be0000000000000001f80000": Sense.INVALID_COMMAND,  # READ CD
}


@pytest.mark.parametrize("cdb", REFUSED)
def test_refused(drive: ScsiCdrom, cdb: str) -> None:
    assert run(drive, command(cdb)) == Result(ScsiStatus.CHECK_CONDITION, b"", REFUSED[cdb].value)


def test_times_end_where_minutes_do() -> None:
    drive = empty_drive()
    drive.insert(Recorder(1 << 22))
    run(drive, REQUEST_SENSE)
    assert run(drive, command("430200000000aa006400")).data[-4:] == bytes((0, 99, 59, 74))


# ================================================================ the tray


def events(drive: ScsiCdrom) -> tuple[int, int]:
    """Event code, and status: 1 tray open, 2 medium present."""
    data = run(drive, EVENTS).data
    assert data[:4] == bytes((0, 6, 4, 0x10))
    return data[4], data[5]


def test_events(drive: ScsiCdrom) -> None:
    assert [events(drive), events(drive)] == [(2, 2), (0, 2)]  # told once
    run(drive, EJECT)
    assert [events(drive), events(drive)] == [(3, 1), (0, 1)]
    run(drive, LOAD)
    assert [events(drive), events(drive)] == [(2, 2), (0, 2)]


def test_an_event_that_did_not_fit_is_told_again(drive: ScsiCdrom) -> None:
    assert run(drive, command("4a010000100000000400")).data == bytes((0, 6, 4, 0x10))
    assert events(drive) == (2, 2)


def test_button(drive: ScsiCdrom) -> None:
    events(drive)
    run(drive, PREVENT)
    assert drive.removal_prevented
    assert not drive.press_button()
    assert [events(drive), events(drive)] == [(1, 2), (0, 2)]
    assert run(drive, EJECT).sense == Sense.MEDIUM_REMOVAL_PREVENTED.value
    assert drive.medium_present
    run(drive, ALLOW)
    assert drive.press_button()
    assert not drive.medium_present
    assert run(drive, READ_CAPACITY).sense == Sense.MEDIUM_NOT_PRESENT.value
    assert run(drive, command("bd0000000000000000080000")).data[1] == 0x10


def test_a_disc_that_is_loaded_again_is_news(drive: ScsiCdrom) -> None:
    run(drive, EJECT)
    assert run(drive, LOAD) == Result(ScsiStatus.GOOD, b"", Sense.MEDIUM_MAY_HAVE_CHANGED.value)
    assert run(drive, TEST_UNIT_READY).status is ScsiStatus.GOOD
    assert run(drive, LOAD) == Result(ScsiStatus.GOOD, b"", Sense.NO_SENSE.value)  # it was closed


def test_an_empty_tray_can_be_moved() -> None:
    drive = empty_drive()
    for cdb in (EJECT, LOAD):
        assert run(drive, cdb).status is ScsiStatus.GOOD
        assert run(drive, TEST_UNIT_READY).sense == Sense.MEDIUM_NOT_PRESENT.value
    assert run(drive, bytes.fromhex("1b0000000000")).status is ScsiStatus.GOOD  # stop


def test_a_reset_does_not_move_the_tray(drive: ScsiCdrom) -> None:
    run(drive, PREVENT)
    drive.reset()
    assert not drive.removal_prevented
    assert drive.medium_present
    drive.press_button()
    drive.reset()
    assert not drive.medium_present


def test_what_is_asked_while_the_disc_is_new_leaves_the_attention() -> None:
    drive = empty_drive()
    drive.insert(MemoryMedium(IMAGE))
    for cdb in (command(GET_CONFIGURATION), EVENTS):
        assert drive.execute(cdb).finish() is ScsiStatus.GOOD
    assert run(drive, TEST_UNIT_READY).sense == Sense.MEDIUM_MAY_HAVE_CHANGED.value


OPCODES = st.one_of(st.integers(0, 255), st.sampled_from(sorted(ScsiCdrom.commands)))
CDBS = st.builds(lambda opcode, rest: bytes([opcode]) + rest, OPCODES, st.binary(max_size=15) | st.just(bytes(15)))


@settings(deadline=None, max_examples=150)
@given(st.lists(st.tuples(CDBS, st.sampled_from(["", "insert", "button"])), max_size=10))
def test_any_commands_are_answered(commands: list[tuple[bytes, str]]) -> None:
    """No command raises; phase and length agree; afterwards the drive works."""
    drive = empty_drive()
    for cdb, before in commands:
        if before == "insert":
            drive.insert(Recorder(1 << 20))
        elif before == "button":
            drive.press_button()
        task = drive.execute(cdb)
        assert (task.phase is DataPhase.NONE) == (task.length == 0)
        assert len(task.read(3000)) <= min(3000, task.length)
        task.finish()
    drive.insert(MemoryMedium(IMAGE))
    run(drive, REQUEST_SENSE)
    assert run(drive, read10(1, 1)).data == bytes([1]) * CD_BLOCK_SIZE


# ================================================================ the device


def ready(device: UsbDevice) -> Initiator:
    """An initiator that has fetched the unit attention after power on."""
    host = Initiator(device)
    assert host.sense() == Sense.RESET_OCCURRED.value
    return host


def test_a_file_is_read_over_the_bus(tmp_path: Path) -> None:
    path = tmp_path / "disc.iso"
    path.write_bytes(IMAGE)
    device = Cdrom(path)
    assert device.medium_present
    assert ready(device).command(read10(5, 2), 4096).data == IMAGE[5 * 2048 : 7 * 2048]
    device.close()
    device.close()


def test_discs_are_changed() -> None:
    device = Cdrom()
    host = ready(device)
    assert not device.medium_present
    assert host.command(TEST_UNIT_READY).status == FAILED
    assert host.sense() == Sense.MEDIUM_NOT_PRESENT.value
    first, second = Recorder(BLOCKS * 4), MemoryMedium(IMAGE)
    device.insert(first)
    assert host.sense() == Sense.MEDIUM_MAY_HAVE_CHANGED.value
    assert host.command(read10(1, 1), 2048).data == bytes(2048)
    device.insert(second)
    assert first.calls[-1][0] == "close"
    assert host.sense() == Sense.MEDIUM_MAY_HAVE_CHANGED.value
    assert host.command(read10(1, 1), 2048).data == bytes([1]) * 2048
    device.close()
    with pytest.raises(OSError, match="beyond"):
        second.read(0, 512)


def test_a_disc_that_is_no_disc_changes_nothing() -> None:
    medium = Recorder(3)
    device = Cdrom(IMAGE)
    with pytest.raises(ValueError, match="2048"):
        device.insert(medium)
    assert medium.calls[-1][0] == "close"
    assert device.medium_present
    with pytest.raises(ValueError, match="2048"):
        Cdrom(bytes(1024))


def test_a_disc_is_changed_in_the_middle_of_a_read() -> None:
    """The rest of the data is missing, and the host is told."""
    device = Cdrom(IMAGE)
    host = ready(device)
    host.write(struct.pack("<4sIIBBB16s", b"USBC", 7, 4 * 2048, 0x80, 0, 10, read10(0, 4)))
    assert len(host.read(2048).data) == 2048
    device.insert(IMAGE)
    host.read(2048)  # stalls
    host.clear_halt(0x81)
    assert host.read(13).data[12] == FAILED


def test_eject_button_and_lock() -> None:
    device = Cdrom(IMAGE)
    host = ready(device)
    assert host.command(PREVENT).status == PASSED
    assert device.locked
    assert not device.eject()
    assert device.medium_present
    assert host.command(EVENTS, 8).data[4:6] == bytes((1, 2))
    assert host.command(ALLOW).status == PASSED
    assert device.eject()
    assert not device.medium_present


def test_the_guest_ejects() -> None:
    device = Cdrom(IMAGE)
    host = ready(device)
    assert host.command(EJECT).status == PASSED
    assert not device.medium_present
    device.reset()
    assert not device.medium_present
    assert host.sense() == Sense.RESET_OCCURRED.value
    assert host.command(LOAD).status == PASSED
    assert device.medium_present


@pytest.mark.parametrize("source", [None, IMAGE, Recorder(BLOCKS)])
def test_serial_numbers_stay(source: bytes | Recorder | None) -> None:
    assert Cdrom(source).serial == Cdrom(source).serial
    assert Cdrom(source, serial="0123456789AB").serial == "0123456789AB"


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="speed"):
        Cdrom(IMAGE, speed=Speed.LOW)
    with pytest.raises(ValueError, match="serial"):
        Cdrom(IMAGE, serial="x")


def test_it_keeps_the_rules_of_devices() -> None:
    check_device(lambda: Cdrom(IMAGE))
