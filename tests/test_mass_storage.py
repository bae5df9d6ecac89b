"""Mass storage, driven by a small initiator: the wire protocol of Bulk-Only Transport 1.0."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from usbredir.device import Transfer, UsbDevice
from usbredir.proto import Speed, Status, TransferType
from usbredir.virtual import Answer, MassStorage, Setup
from usbredir.virtual.medium import Buffer, MemoryMedium

BLOCKS = 64
CONTENT = bytes(block % 251 for block in range(BLOCKS) for _ in range(512))
IN, OUT = 0x81, 0x02
PASSED, FAILED, PHASE_ERROR = 0, 1, 2
RESET = Setup(0x21, 0xFF, 0, 0, 0)
GET_MAX_LUN = Setup(0xA1, 0xFE, 0, 0, 1)

TEST_UNIT_READY = bytes(6)
REQUEST_SENSE = bytes.fromhex("030000001200")
INQUIRY = bytes.fromhex("120000002400")
EJECT = bytes.fromhex("1b0000000200")


def read10(lba: int, blocks: int) -> bytes:
    return struct.pack(">BxIxHx", 0x28, lba, blocks)


def write10(lba: int, blocks: int, flags: int = 0) -> bytes:
    return struct.pack(">BBIxHx", 0x2A, flags, lba, blocks)


def wrap(cdb: bytes, length: int = 0, *, tag: int = 1, flags: int = 0x80, lun: int = 0) -> bytes:
    """A command block wrapper."""
    return struct.pack("<4sIIBBB16s", b"USBC", tag, length, flags, lun, len(cdb), cdb)


class Outcome(NamedTuple):
    """What a host saw of a command."""

    status: int
    residue: int
    data: bytes
    stalled: str


class Initiator:
    """The host side: sends wrappers, moves data in pieces, clears halts, reads status."""

    def __init__(self, device: UsbDevice) -> None:
        self.device = device
        self.tag = 0x1000

    def bulk(self, endpoint: int, length: int, data: Buffer = b"") -> Transfer:
        """One bulk transfer; CANCELLED when the device has no answer."""
        done: list[Transfer] = []
        transfer = Transfer(TransferType.BULK, endpoint, length, done.append, data=data)
        assert self.device.submit(transfer) == Status.SUCCESS
        self.device.handle_events(0)
        self.device.handle_events(0)
        self.device.cancel(transfer)
        self.device.handle_events(0)
        assert done == [transfer]
        return transfer

    def write(self, data: Buffer) -> int:
        return self.bulk(OUT, len(data), data).status

    def read(self, length: int) -> Transfer:
        return self.bulk(IN, length)

    def control(self, setup: Setup, data: bytes = b"") -> Transfer:
        done: list[Transfer] = []
        request_type, request, value, index, length = setup
        fields = (request_type, request, value, index)
        transfer = Transfer(TransferType.CONTROL, request_type & 0x80, length, done.append, data=data, setup=fields)
        assert self.device.submit(transfer) == Status.SUCCESS
        self.device.handle_events(0)
        assert done == [transfer]
        return transfer

    def clear_halt(self, endpoint: int) -> None:
        assert self.control(Setup(0x02, 1, 0, endpoint, 0)).status == Status.SUCCESS

    def halted(self, endpoint: int) -> bool:
        return bytes(self.control(Setup(0x82, 0, 0, endpoint, 2)).data) == b"\1\0"

    def recover(self) -> None:
        """Reset recovery. Source: BOT, 5.3.4."""
        assert self.control(RESET).status == Status.SUCCESS
        self.clear_halt(IN)
        self.clear_halt(OUT)

    def command(self, cdb: bytes, length: int = 0, data: bytes = b"", *, piece: int = 1 << 20) -> Outcome:
        """One command. With *data* it goes out, else *length* bytes are to come in."""
        self.tag += 1
        length = len(data) or length
        assert self.write(wrap(cdb, length, tag=self.tag, flags=0 if data else 0x80)) == Status.SUCCESS
        if data:
            received, stalled = b"", self._send(data, piece)
        else:
            received, stalled = self._receive(length, piece)
        status = self.read(13)
        if status.status == Status.STALL:  # BOT, figure 2: the status is tried once more
            self.clear_halt(IN)
            stalled += "in"
            status = self.read(13)
        assert status.status == Status.SUCCESS
        signature, tag, residue, result = struct.unpack("<4sIIB", status.data)
        assert (signature, tag) == (b"USBS", self.tag)
        return Outcome(result, residue, received, stalled)

    def _send(self, data: bytes, piece: int) -> str:
        for start in range(0, len(data), piece):
            if self.write(data[start : start + piece]) == Status.STALL:
                self.clear_halt(OUT)
                return "out"
        return ""

    def _receive(self, length: int, piece: int) -> tuple[bytes, str]:
        received = b""
        while len(received) < length:
            want = min(piece, length - len(received))
            transfer = self.read(want)
            received += transfer.data
            if transfer.status == Status.STALL:
                self.clear_halt(IN)
                return received, "in"
            if len(transfer.data) < want:
                break
        return received, ""

    def sense(self) -> tuple[int, int, int]:
        data = self.command(REQUEST_SENSE, 18).data
        return data[2], data[12], data[13]


def initiator(device: MassStorage) -> Initiator:
    """An initiator that has fetched the unit attention after power on."""
    host = Initiator(device)
    assert host.sense() == (6, 0x29, 0)
    return host


@pytest.fixture
def medium() -> MemoryMedium:
    return MemoryMedium(CONTENT)


@pytest.fixture
def host(medium: MemoryMedium) -> Initiator:
    return initiator(MassStorage(medium))


def works(host: Initiator) -> bool:
    return host.command(read10(3, 1), 512) == (PASSED, 0, CONTENT[1536:2048], "")


# --- commands ---


@pytest.mark.parametrize("piece", [13, 512, 600, 1 << 20])
def test_read_and_write(host: Initiator, piece: int) -> None:
    data = bytes(range(256)) * 8
    assert host.command(write10(8, 4), data=data, piece=piece) == (PASSED, 0, b"", "")
    assert host.command(read10(8, 4), 2048, piece=piece) == (PASSED, 0, data, "")
    assert host.command(read10(0, 8), 4096, piece=piece).data == CONTENT[:4096]


def test_read_longer_than_the_phase_gets_the_phase_only(host: Initiator) -> None:
    """A host may ask for data and status at once; the data phase still ends the transfer."""
    host.write(wrap(read10(0, 1), 512))
    assert bytes(host.read(4096).data) == CONTENT[:512]
    assert bytes(host.read(4096).data) == struct.pack("<4sIIB", b"USBS", 1, 0, PASSED)


def test_failed_command(host: Initiator) -> None:
    assert host.command(read10(BLOCKS, 1), 512) == (FAILED, 512, b"", "in")
    assert host.sense() == (5, 0x21, 0)
    assert host.command(bytes([4, 0, 0, 0, 0, 0])) == (FAILED, 0, b"", "")
    assert host.sense() == (5, 0x20, 0)


def test_eject_and_bus_reset() -> None:
    device = MassStorage(CONTENT)
    host = initiator(device)
    assert host.command(EJECT).status == PASSED
    assert not device.medium_present
    assert host.command(TEST_UNIT_READY).status == FAILED
    assert host.sense() == (2, 0x3A, 0)
    device.reset()
    assert device.medium_present
    assert host.sense() == (6, 0x29, 0)
    assert works(host)


def test_fixed_disk() -> None:
    host = initiator(MassStorage(CONTENT, removable=False))
    assert host.command(INQUIRY, 36).data[1] == 0
    assert host.command(EJECT).status == FAILED
    assert works(host)


def test_read_only() -> None:
    host = initiator(MassStorage(CONTENT, read_only=True))
    assert host.command(write10(0, 1), data=bytes(512)) == (FAILED, 512, b"", "out")
    assert host.sense() == (7, 0x27, 0)
    assert host.command(read10(0, 1), 512).data == CONTENT[:512]


# --- the thirteen cases. Source: BOT, 6.7 ---

CASES = {
    "1 Hn = Dn": (TEST_UNIT_READY, 0, b"", (PASSED, 0, b"", "")),
    "2 Hn < Di": (read10(3, 1), 0, b"", (PHASE_ERROR, 0, b"", "")),
    "3 Hn < Do": (write10(3, 1), 0, b"", (PHASE_ERROR, 0, b"", "")),
    "4 Hi > Dn": (TEST_UNIT_READY, 64, b"", (PASSED, 64, b"", "in")),
    "5 Hi > Di": (read10(3, 1), 1024, b"", (PASSED, 512, CONTENT[1536:2048], "in")),
    "5 Hi > Di, short packet": (INQUIRY[:4] + b"\x04\0", 36, b"", (PASSED, 32, bytes.fromhex("00800602"), "in")),
    "6 Hi = Di": (read10(3, 1), 512, b"", (PASSED, 0, CONTENT[1536:2048], "")),
    "7 Hi < Di": (read10(3, 2), 512, b"", (PHASE_ERROR, 512, b"", "in")),
    "8 Hi <> Do": (write10(3, 1), 512, b"", (PHASE_ERROR, 512, b"", "in")),
    "9 Ho > Dn": (TEST_UNIT_READY, 0, b"x" * 700, (PASSED, 700, b"", "out")),
    "10 Ho <> Di": (read10(3, 1), 0, b"x" * 512, (PHASE_ERROR, 512, b"", "out")),
    "11 Ho > Do": (write10(3, 1), 0, b"w" * 1024, (PASSED, 512, b"", "out")),
    "12 Ho = Do": (write10(3, 1), 0, b"w" * 512, (PASSED, 0, b"", "")),
    "13 Ho < Do": (write10(3, 2), 0, b"x" * 512, (PHASE_ERROR, 1024 - 512, b"", "out")),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("piece", [100, 512])
def test_thirteen_cases(host: Initiator, medium: MemoryMedium, case: str, piece: int) -> None:
    """Status, residue, data and stalls; only a write that both agree on (or more) is done; then all goes on."""
    cdb, length, data, outcome = CASES[case]
    assert host.command(cdb, length, data, piece=piece) == outcome
    changed = b"w" * 512 if outcome[0] == PASSED and cdb[0] == 0x2A else CONTENT[1536:2048]
    assert medium.read(0, len(CONTENT)) == CONTENT[:1536] + changed + CONTENT[2048:]
    assert host.command(read10(0, 1), 512) == (PASSED, 0, CONTENT[:512], "")


def test_excess_data_in_the_same_transfer_is_dropped(host: Initiator, medium: MemoryMedium) -> None:
    """Case 11 when everything has come already: nothing is left to stall."""
    assert host.command(write10(0, 1), data=b"w" * 1024) == (PASSED, 512, b"", "")
    assert medium.read(0, 1024) == b"w" * 512 + CONTENT[512:1024]


def test_direction_does_not_count_without_data(host: Initiator) -> None:
    host.write(wrap(TEST_UNIT_READY, 0, flags=0))
    assert host.read(13).data == struct.pack("<4sIIB", b"USBS", 1, 0, PASSED)


def test_status_comes_without_trying_to_send(host: Initiator) -> None:
    """The host need not run into the stall of data-out."""
    host.write(wrap(TEST_UNIT_READY, 512, flags=0))
    assert host.read(13).data == struct.pack("<4sIIB", b"USBS", 1, 512, PASSED)
    assert works(host)


def test_halt_cleared_before_it_was_seen(host: Initiator) -> None:
    host.write(wrap(TEST_UNIT_READY, 64))
    host.clear_halt(IN)
    assert host.read(13).data == struct.pack("<4sIIB", b"USBS", 1, 64, PASSED)


def test_clearing_the_other_endpoint_changes_nothing(host: Initiator) -> None:
    host.write(wrap(TEST_UNIT_READY, 64))
    host.clear_halt(OUT)
    assert host.read(64).status == Status.STALL


# --- what is asked too early waits ---


def test_no_status_before_a_command(host: Initiator) -> None:
    assert host.read(13).status == Status.CANCELLED


def test_no_status_before_the_data(host: Initiator) -> None:
    host.write(wrap(write10(0, 2), 1024, flags=0))
    assert host.write(bytes(512)) == Status.SUCCESS
    assert host.read(13).status == Status.CANCELLED
    assert host.write(bytes(512)) == Status.SUCCESS
    assert len(host.read(13).data) == 13


@pytest.mark.parametrize("cdb", [read10(0, 1), TEST_UNIT_READY])
def test_next_command_waits_for_the_status(host: Initiator, cdb: bytes) -> None:
    host.write(wrap(cdb, 512))
    assert host.write(wrap(TEST_UNIT_READY)) == Status.CANCELLED


def test_next_command_waits_while_the_status_is_there(host: Initiator) -> None:
    host.write(wrap(TEST_UNIT_READY))
    assert host.write(wrap(TEST_UNIT_READY)) == Status.CANCELLED


def test_empty_reads_change_nothing(host: Initiator) -> None:
    host.write(wrap(read10(3, 1), 512))
    assert host.read(0).data == b""
    assert host.read(512).data == CONTENT[1536:2048]
    assert host.read(0).data == b""
    assert len(host.read(13).data) == 13


def test_status_does_not_fit(host: Initiator) -> None:
    host.write(wrap(TEST_UNIT_READY))
    assert host.read(12).status == Status.BABBLE


# --- wrappers that are not valid or not meaningful. Source: BOT, 6.2 ---

GOOD_WRAPPER = wrap(INQUIRY, 36)
BAD_WRAPPERS = {
    "empty": b"",
    "short": GOOD_WRAPPER[:-1],
    "long": GOOD_WRAPPER + b"\0",
    "status signature": b"USBS" + GOOD_WRAPPER[4:],
    "reserved flags": wrap(INQUIRY, 36, flags=0xC0),
    "logical unit": wrap(INQUIRY, 36, lun=1),
    "reserved bits of logical unit": wrap(INQUIRY, 36, lun=0x10),
    "empty command": GOOD_WRAPPER[:14] + b"\0" + GOOD_WRAPPER[15:],
    "long command": GOOD_WRAPPER[:14] + b"\x11" + GOOD_WRAPPER[15:],
    "reserved bits of command length": GOOD_WRAPPER[:14] + b"\x26" + GOOD_WRAPPER[15:],
}


@pytest.mark.parametrize("name", BAD_WRAPPERS)
def test_bad_wrapper_needs_reset_recovery(host: Initiator, name: str) -> None:
    """BOT, 6.6.1: both endpoints stall, clearing does not help, reset recovery does."""
    assert host.write(BAD_WRAPPERS[name]) == Status.SUCCESS
    for _ in range(2):
        assert host.halted(IN)
        assert host.halted(OUT)
        assert host.read(13).status == Status.STALL
        assert host.write(GOOD_WRAPPER) == Status.STALL
        host.clear_halt(IN)
        host.clear_halt(OUT)
    assert host.control(RESET).status == Status.SUCCESS
    assert host.halted(IN)  # BOT, 3.1: the reset preserves halts
    assert host.read(13).status == Status.STALL
    host.clear_halt(IN)
    host.clear_halt(OUT)
    assert not host.halted(OUT)
    assert works(host)


def test_bus_reset_recovers(host: Initiator) -> None:
    host.write(b"nonsense")
    host.device.reset()
    assert host.sense() == (6, 0x29, 0)
    assert works(host)


def test_more_data_than_announced_needs_reset_recovery(host: Initiator, medium: MemoryMedium) -> None:
    host.write(wrap(write10(0, 1), 512, flags=0))
    host.write(bytes(600))
    assert host.read(13).status == Status.STALL
    assert medium.read(0, 512) == CONTENT[:512]
    host.recover()
    assert works(host)


@pytest.mark.parametrize("after", [b"", bytes(100)], ids=["command", "data"])
def test_reset_ends_a_command(host: Initiator, after: bytes) -> None:
    host.write(wrap(write10(0, 1), 512, flags=0))
    if after:
        host.write(after)
    host.recover()
    assert host.read(13).status == Status.CANCELLED
    assert works(host)


# --- class requests. Source: BOT, 3.1 and 3.2 ---


def test_get_max_lun(host: Initiator) -> None:
    assert bytes(host.control(GET_MAX_LUN).data) == b"\0"


REFUSED_REQUESTS = [
    RESET._replace(value=1),
    RESET._replace(index=1),
    RESET._replace(request_type=0x20),
    RESET._replace(request=0xFD),
    GET_MAX_LUN._replace(value=1),
    GET_MAX_LUN._replace(index=1),
    GET_MAX_LUN._replace(length=2),
    GET_MAX_LUN._replace(request_type=0xC1),
]


@pytest.mark.parametrize("setup", [*REFUSED_REQUESTS, RESET._replace(length=1)])
def test_other_requests_stall(host: Initiator, setup: Setup) -> None:
    assert host.control(setup, bytes(0 if setup.request_type & 0x80 else setup.length)).status == Status.STALL


@pytest.mark.parametrize("setup", REFUSED_REQUESTS)
def test_other_requests_leave_the_transport_alone(host: Initiator, setup: Setup) -> None:
    host.write(wrap(read10(3, 1), 512))
    assert host.control(setup).status == Status.STALL
    assert bytes(host.read(512).data) == CONTENT[1536:2048]


# --- errors of the medium ---


class Broken(MemoryMedium):
    """Fails beyond a byte offset."""

    good = 1 << 40

    def read(self, offset: int, length: int) -> bytes:
        if offset + length > self.good:
            raise OSError(5, "broken")
        return super().read(offset, length)

    def write(self, offset: int, data: Buffer, /) -> None:
        if offset + len(data) > self.good:
            raise OSError(28, "full")
        super().write(offset, data)


def test_read_error_ends_the_data_by_a_stall() -> None:
    medium = Broken(CONTENT)
    host = initiator(MassStorage(medium))
    medium.good = 1024
    assert host.command(read10(0, 4), 2048, piece=512) == (FAILED, 1024, CONTENT[:1024], "in")
    assert host.sense() == (3, 0x11, 0)


@pytest.mark.parametrize(("piece", "stalled"), [(512, "out"), (2048, "")])
def test_write_error(piece: int, stalled: str) -> None:
    medium = Broken(CONTENT)
    host = initiator(MassStorage(medium))
    medium.good = 1024
    outcome = host.command(write10(0, 4), data=bytes(2048), piece=piece)
    assert outcome == (FAILED, 2048 - 1024 if piece == 512 else 2048, b"", stalled)
    assert host.sense() == (3, 0x0C, 0)


# --- files ---


def test_file_has_the_data_before_the_status(tmp_path: Path) -> None:
    """Another process sees it although nothing was closed: a killed process loses nothing."""
    path = tmp_path / "disk.img"
    path.write_bytes(CONTENT)
    device = MassStorage(path)
    host = initiator(device)
    host.write(wrap(write10(1, 1), 512, flags=0))
    host.write(b"n" * 512)
    assert path.read_bytes() == CONTENT[:512] + b"n" * 512 + CONTENT[1024:]
    assert host.read(13).actual_length == 13
    device.close()
    device.close()


def test_synchronize_cache_flushes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[int] = []
    monkeypatch.setattr("usbredir.virtual.medium._flush", flushed.append)
    path = tmp_path / "disk.img"
    path.write_bytes(CONTENT)
    device = MassStorage(str(path))
    host = initiator(device)
    assert host.command(write10(1, 1), data=bytes(512)).status == PASSED
    assert len(flushed) == 0
    assert host.command(bytes([0x35]) + bytes(9)).status == PASSED
    assert host.command(write10(1, 1, flags=0x08), data=bytes(512)).status == PASSED
    assert len(flushed) == 2
    device.close()


def test_close_closes_the_medium(medium: MemoryMedium) -> None:
    MassStorage(medium).close()
    with pytest.raises(OSError, match="beyond the end"):
        medium.read(0, 1)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        MassStorage(tmp_path / "missing")


def test_read_data_is_not_copied(host: Initiator, medium: MemoryMedium, monkeypatch: pytest.MonkeyPatch) -> None:
    piece = bytes(4096)
    monkeypatch.setattr(medium, "read", lambda offset, length: piece)
    host.write(wrap(read10(0, 8), 4096))
    assert host.read(4096).data is piece


# --- descriptors ---


@pytest.mark.parametrize(("speed", "packet"), [(Speed.FULL, 64), (Speed.HIGH, 512), (Speed.SUPER, 1024)])
def test_descriptors(speed: Speed, packet: int) -> None:
    device = MassStorage(CONTENT, speed=speed)
    assert device.speed is speed
    descriptor = device.device_descriptor
    assert len(descriptor) == descriptor[0] == 18
    assert struct.unpack_from("<HH", descriptor, 8) == (0x0525, 0xA4A5)
    assert descriptor[2:4] == (b"\0\3" if speed is Speed.SUPER else b"\0\2")
    assert descriptor[7] == (9 if speed is Speed.SUPER else 64)
    configuration = device.configuration_descriptor
    assert configuration is not None
    assert len(configuration) == int.from_bytes(configuration[2:4], "little")
    parts = split(configuration)
    assert [part[1] for part in parts] == ([2, 4, 5, 0x30, 5, 0x30] if speed is Speed.SUPER else [2, 4, 5, 5])
    assert parts[1][5:8] == bytes([8, 6, 0x50])
    endpoints = [(part[2], part[3], int.from_bytes(part[4:6], "little")) for part in parts if part[1] == 5]
    assert endpoints == [(IN, 2, packet), (OUT, 2, packet)]


def split(raw: bytes) -> list[bytes]:
    parts = []
    while raw:
        parts.append(raw[: raw[0]])
        raw = raw[raw[0] :]
    return parts


def test_binary_object_store() -> None:
    host = Initiator(MassStorage(CONTENT, speed=Speed.SUPER))
    bos = bytes(host.control(Setup(0x80, 6, 0x0F00, 0, 255)).data)
    assert len(bos) == int.from_bytes(bos[2:4], "little")
    parts = split(bos)
    assert [(part[1], part[2]) for part in parts[1:]] == [(0x10, 2), (0x10, 3)]
    assert bos[4] == len(parts) - 1
    assert Initiator(MassStorage(CONTENT)).control(Setup(0x80, 6, 0x0F00, 0, 255)).status == Status.STALL


def serial_of(device: MassStorage) -> str:
    raw = bytes(Initiator(device).control(Setup(0x80, 6, 0x0303, 0x0409, 255)).data)
    return raw[2:].decode("utf-16-le")


def test_default_serial(tmp_path: Path) -> None:
    """At least twelve hexadecimal digits; the same for the same source, another for another."""
    path = tmp_path / "disk.img"
    path.write_bytes(CONTENT)
    devices = [MassStorage(source) for source in (path, str(path), CONTENT, CONTENT, bytes(512), MemoryMedium(CONTENT))]
    serials = [serial_of(device) for device in devices]
    assert serials[0] == serials[1]
    assert serials[2] == serials[3]
    assert len(set(serials)) == 4
    assert all(len(serial) == 16 and int(serial, 16) for serial in serials)
    for device in devices:
        device.close()


def test_serial_is_the_unit_serial_number_too() -> None:
    device = MassStorage(CONTENT, serial="0123456789ABCDEF")
    assert serial_of(device) == "0123456789ABCDEF"
    assert initiator(device).command(bytes.fromhex("12018000ff00"), 255).data[4:] == b"0123456789ABCDEF"


@pytest.mark.parametrize("serial", ["", "0123456789A", "0123456789ab", "0123456789AG", "1" * 127])
def test_bad_serial(serial: str) -> None:
    with pytest.raises(ValueError, match="serial number"):
        MassStorage(CONTENT, serial=serial)


@pytest.mark.parametrize("speed", [Speed.LOW, Speed.UNKNOWN])
def test_bad_speed(speed: Speed) -> None:
    with pytest.raises(ValueError, match="full, high or super"):
        MassStorage(CONTENT, speed=speed)


# --- whatever comes ---

WRAPPERS = st.builds(
    wrap,
    st.binary(min_size=1, max_size=16)
    | st.sampled_from([read10(0, 2), write10(0, 2), INQUIRY, TEST_UNIT_READY, EJECT, REQUEST_SENSE]),
    st.integers(0, 3000) | st.integers(0, 2**32 - 1),
    flags=st.sampled_from([0x00, 0x80]),
)
STEPS = st.one_of(
    st.tuples(st.just("out"), WRAPPERS),
    st.tuples(st.just("out"), WRAPPERS | st.binary(max_size=40)),
    st.tuples(st.just("out"), st.sampled_from([bytes(512), bytes(1024), bytes(100)])),
    st.tuples(st.just("in"), st.integers(0, 2000) | st.just(13)),
    st.tuples(st.just("clear"), st.sampled_from([IN, OUT])),
    st.tuples(st.just("reset"), st.none()),
)


@settings(deadline=None, max_examples=150)
@given(st.lists(STEPS, max_size=15))
def test_reset_recovery_always_works(steps: list[tuple[str, object]]) -> None:
    """Nothing raises, nothing babbles but a status, and after reset recovery the device works."""
    host = Initiator(MassStorage(bytes(16384)))
    for kind, value in steps:
        if kind == "out":
            assert isinstance(value, bytes)
            host.write(value)
        elif kind == "in":
            assert isinstance(value, int)
            assert host.read(value).status != Status.BABBLE or value < 13
        elif kind == "clear":
            assert isinstance(value, int)
            host.clear_halt(value)
        else:
            host.control(RESET)
    host.recover()
    host.sense()
    if host.command(TEST_UNIT_READY).status == FAILED:  # ejected on the way
        host.device.reset()
        host.sense()
    assert host.command(write10(5, 1), data=b"y" * 512) == (PASSED, 0, b"", "")
    assert host.command(read10(5, 1), 512) == (PASSED, 0, b"y" * 512, "")


@settings(deadline=None, max_examples=150)
@given(st.binary(max_size=64) | WRAPPERS, st.integers(0, 600))
def test_any_wrapper_is_answered(raw: bytes, length: int) -> None:
    """The hooks themselves never raise and never give more than asked, but for the status."""
    device = MassStorage(bytes(16384))
    assert device.data_out(OUT, raw) is None
    answer = device.data_in(IN, length)
    assert isinstance(answer, Answer) or len(answer) <= max(length, 13)
