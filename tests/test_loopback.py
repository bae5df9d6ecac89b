"""The loopback device: every row of its table and every vendor request, with a clock that is set."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import pytest

from usbredir.descriptors import max_packet_size, parse_configuration, parse_device
from usbredir.device import Transfer, UsbDevice
from usbredir.errors import DeviceLostError
from usbredir.proto import Speed, Status, TransferType
from usbredir.virtual.loopback import COUNTERS, MAX_MESSAGES, LoopbackDevice

BULK, CONTROL, INTERRUPT, ISO = TransferType.BULK, TransferType.CONTROL, TransferType.INTERRUPT, TransferType.ISO


class Bench:
    """A loopback device and its time."""

    def __init__(self, **options: Any) -> None:
        self.now = 10.0
        self.device = LoopbackDevice(clock=lambda: self.now, **options)

    def run(self, seconds: float = 0.0) -> None:
        self.now += seconds
        for _ in range(3):
            self.device.handle_events(0)

    def start(self, endpoint: int, length: int = 64, data: bytes = b"", **options: Any) -> Transfer:
        done: list[Transfer] = []
        kind = options.pop("kind", BULK)
        transfer = Transfer(kind, endpoint, len(data) or length, done.append, data=data, context=done, **options)
        assert self.device.submit(transfer) == Status.SUCCESS
        return transfer

    def bulk(self, endpoint: int, length: int = 64, data: bytes = b"") -> tuple[int, bytes]:
        """(status, data) of a transfer that completes at once."""
        transfer = self.start(endpoint, length, data)
        self.run()
        assert transfer.context == [transfer]
        return transfer.status, bytes(transfer.data) if endpoint & 0x80 else b""

    def vendor(self, request: int, value: int = 0, index: int = 0, data: bytes = b"", length: int = 0) -> bytes | None:
        """A vendor request, IN with a *length*; None for a stall."""
        way = 0x80 if length else 0
        transfer = self.start(way, length, data, kind=CONTROL, setup=(0x40 | way, request, value, index))
        self.run()
        assert transfer.context == [transfer]
        return bytes(transfer.data) if transfer.status == Status.SUCCESS else None

    def counters(self) -> dict[str, int]:
        raw = self.vendor(0x20, length=64)
        assert raw is not None
        *numbers, zero = struct.unpack("<8Q", raw)
        assert zero == 0
        return dict(zip(COUNTERS, numbers, strict=True))


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.device.close()


# ================================================================ description


def test_identity(bench: Bench) -> None:
    assert isinstance(bench.device, UsbDevice)
    d = parse_device(bench.device.device_descriptor)
    assert (d.vendor_id, d.product_id, d.device_version_bcd, d.configurations) == (0x1209, 0x0001, 0x1234, 2)
    assert d.device_class == 0xFF


def test_serial_number() -> None:
    bench = Bench(serial="MINE")
    transfer = bench.start(0x80, 255, kind=CONTROL, setup=(0x80, 6, 0x0303, 0x0409))
    bench.run()
    assert bytes(transfer.data)[2:].decode("utf-16-le") == "MINE"
    bench.device.close()


@pytest.mark.parametrize(
    ("speed", "bulk", "wide"),
    [(Speed.FULL, 64, (1023, 0, 0)), (Speed.HIGH, 512, (3072, 0, 0)), (Speed.SUPER, 1024, (1024, 2, 3072))],
)
def test_endpoints(speed: Speed, bulk: int, wide: tuple[int, int, int]) -> None:
    """The table in the module's docstring, at every speed."""
    bench = Bench(speed=speed)
    assert bench.device.speed is speed
    raw = bench.device.configuration_descriptor
    assert raw is not None
    configuration = parse_configuration(raw)
    kinds = {e.address: e.type for i in configuration.interfaces for e in i.endpoints}
    assert kinds == {
        **dict.fromkeys((0x01, 0x81, 0x02, 0x82, 0x85, 0x86), BULK),
        **dict.fromkeys((0x03, 0x83), INTERRUPT),
        **dict.fromkeys((0x04, 0x84), ISO),
    }
    first = configuration.interfaces[0]
    assert {max_packet_size(e, speed) for e in first.endpoints if e.type is BULK} == {bulk}
    assert {e.max_streams for e in first.endpoints if e.type is BULK} == {16 if speed is Speed.SUPER else 0}
    assert [(i.number, i.alternate) for i in configuration.interfaces] == [(0, 0), (1, 0), (1, 1), (1, 2)]
    narrow, wider = configuration.interfaces[2:]
    assert [max_packet_size(e, speed) for e in narrow.endpoints] == [1023, 1023]
    assert [(max_packet_size(e, speed), e.max_burst, e.bytes_per_interval) for e in wider.endpoints] == [wide] * 2
    bench.device.close()


def test_second_configuration(bench: Bench) -> None:
    bench.device.set_configuration(2)
    assert bench.bulk(0x01, data=b"hello") == (Status.SUCCESS, b"")
    assert bench.bulk(0x81) == (Status.SUCCESS, b"hello")
    assert bench.device.submit(Transfer(BULK, 0x82, 8, lambda transfer: None)) == Status.IOERROR


# ================================================================ endpoints


def test_loop(bench: Bench) -> None:
    """Messages come back in order, each in a transfer of its own, empty ones included."""
    for message in (b"one", b"", b"three" * 1000):
        bench.bulk(0x01, length=0, data=message)
    assert bench.bulk(0x81) == (Status.SUCCESS, b"one")
    assert bench.bulk(0x81) == (Status.SUCCESS, b"")
    assert bench.bulk(0x81, 64)[0] == Status.BABBLE


def test_a_loop_for_each_stream() -> None:
    """At super speed; each holds back what is too much by itself."""
    bench = Bench(speed=Speed.SUPER)
    assert bench.device.alloc_streams([0x01, 0x81], 16) == (Status.SUCCESS, 16)
    waiting = [bench.start(0x81, stream_id=stream) for stream in (1, 16)]
    for stream in (16, 1):
        bench.start(0x01, data=b"%d" % stream, stream_id=stream)
    bench.run()
    assert [bytes(transfer.data) for transfer in waiting] == [b"1", b"16"]
    many = [bench.start(0x01, data=b"x", stream_id=2) for _ in range(MAX_MESSAGES + 1)]
    other = bench.start(0x01, data=b"x", stream_id=3)
    bench.run()
    assert (many[-1].context, other.context) == ([], [other])
    bench.device.close()


def test_low_speed_has_no_such_device() -> None:
    with pytest.raises(ValueError, match="no bulk endpoints at low speed"):
        LoopbackDevice(speed=Speed.LOW)


def test_loop_answers_a_transfer_that_waits(bench: Bench) -> None:
    waiting = bench.start(0x81)
    bench.run()
    assert waiting.context == []
    bench.bulk(0x01, data=b"now")
    assert waiting.context == [waiting]
    assert waiting.data == b"now"


def test_loop_holds_back_what_is_too_much(bench: Bench) -> None:
    """OUT transfers wait while nobody takes messages out; none is lost."""
    transfers = [bench.start(0x01, data=struct.pack("<I", number)) for number in range(MAX_MESSAGES + 10)]
    bench.run()
    assert sum(transfer.context == [transfer] for transfer in transfers) == MAX_MESSAGES
    messages = [struct.unpack("<I", bench.bulk(0x81)[1])[0] for _ in transfers]
    assert messages == list(range(MAX_MESSAGES + 10))


@pytest.mark.parametrize("length", [4, 8, 512, 65536, 200_000])
def test_source(bench: Bench, length: int) -> None:
    """A counter of transfers, then the pattern."""
    for number in range(3):
        status, data = bench.bulk(0x82, length)
        assert status == Status.SUCCESS
        pattern = struct.pack("<Q", number) + bytes(i & 0xFF for i in range(8, length))
        assert data == pattern[:length]


def test_sink(bench: Bench) -> None:
    bench.bulk(0x02, data=bytes(1000))
    bench.bulk(0x02, data=bytes(24))
    assert bench.counters()["sink_bytes"] == 1024


def test_interrupt_sink(bench: Bench) -> None:
    bench.start(0x03, data=b"12345678", kind=INTERRUPT)
    bench.run()
    assert bench.counters()["interrupts"] == 1


def test_interrupt_source(bench: Bench) -> None:
    """One packet per period: a counter."""
    transfers = [bench.start(0x83, 8, kind=INTERRUPT) for _ in range(3)]
    bench.run()
    assert bench.device.next_timeout() == pytest.approx(0.001)
    for number, transfer in enumerate(transfers):
        assert transfer.context == []
        bench.run(0.001)
        assert transfer.context == [transfer]
        assert transfer.data == struct.pack("<Q", number)


def test_interrupt_source_at_its_fastest() -> None:
    bench = Bench(interrupt_period=0)
    transfers = [bench.start(0x83, 8, kind=INTERRUPT) for _ in range(3)]
    bench.run()
    assert [struct.unpack("<Q", transfer.data)[0] for transfer in transfers] == [0, 1, 2]
    bench.device.close()


def test_the_stalling_endpoint(bench: Bench) -> None:
    """After its halt is cleared one transfer succeeds."""
    for _ in range(2):
        assert bench.bulk(0x85)[0] == Status.STALL
        assert bench.bulk(0x85)[0] == Status.STALL
        assert bench.device.clear_halt(0x85) == Status.SUCCESS
        assert bench.bulk(0x85, 16) == (Status.SUCCESS, bytes(range(16)))


def test_the_silent_endpoint(bench: Bench) -> None:
    transfer = bench.start(0x86)
    bench.run(1000)
    assert transfer.context == []
    bench.device.cancel(transfer)
    bench.run()
    assert transfer.status == Status.CANCELLED


def iso_in(bench: Bench, packets: int, room: int = 10) -> Transfer:
    return bench.start(0x84, packets * room, kind=ISO, iso_lengths=[room] * packets)


def test_iso_source(bench: Bench) -> None:
    """A counter of packets, then the pattern; after a period for each packet, all at once."""
    assert bench.device.set_alt_setting(1, 1) == Status.SUCCESS
    transfer = iso_in(bench, 8)
    bench.run()
    assert bench.device.next_timeout() == pytest.approx(0.001)
    bench.run(0.0009)
    assert transfer.context == []
    bench.run(0.0002)
    assert transfer.context == [transfer]
    expected = [struct.pack("<Q", number) + bytes((8, 9)) for number in range(8)]
    assert [(result.status, bytes(result.data)) for result in transfer.iso_results] == [(0, data) for data in expected]
    second = iso_in(bench, 1, room=4)
    bench.run()
    bench.run(1)
    assert [bytes(result.data) for result in second.iso_results] == [struct.pack("<I", 8)]


def test_iso_sink(bench: Bench) -> None:
    bench.device.set_alt_setting(1, 1)
    sent = bench.start(0x04, data=bytes(31), kind=ISO, iso_lengths=[10, 1, 20])
    bench.run()
    assert sent.context == []
    bench.run(0.0004)
    assert [result.status for result in sent.iso_results] == [0, 0, 0]
    counters = bench.counters()
    assert (counters["iso_packets"], counters["iso_bytes"]) == (3, 31)


@pytest.mark.parametrize(("alternate", "most"), [(1, 1023), (2, 3072)])
def test_iso_packets_are_no_longer_than_the_endpoint_allows(bench: Bench, alternate: int, most: int) -> None:
    bench.device.set_alt_setting(1, alternate)
    transfer = iso_in(bench, 2, room=5000)
    bench.run()
    bench.run(1)
    assert [len(result.data) for result in transfer.iso_results] == [most, most]


def test_iso_at_its_fastest() -> None:
    bench = Bench(iso_period=0)
    bench.device.set_alt_setting(1, 1)
    transfers = [iso_in(bench, 2) for _ in range(3)]
    bench.run()
    numbers = [struct.unpack_from("<Q", result.data)[0] for transfer in transfers for result in transfer.iso_results]
    assert numbers == [0, 1, 2, 3, 4, 5]
    bench.device.close()


def test_the_iso_period_by_request(bench: Bench) -> None:
    """A transfer that is on its way keeps its time."""
    bench.device.set_alt_setting(1, 1)
    first, second = iso_in(bench, 2), iso_in(bench, 2)
    bench.run()
    assert bench.vendor(0x13, 1000) == b""
    bench.run(0.0003)
    assert (first.context, second.context) == ([first], [])
    bench.run(0.0015)
    assert second.context == []
    bench.run(0.0005)
    assert second.context == [second]


# ================================================================ vendor requests


def test_pattern(bench: Bench) -> None:
    assert bench.vendor(0x01, 250, length=10) == bytes((250 + i) & 0xFF for i in range(10))


def test_store_and_fetch(bench: Bench) -> None:
    assert bench.vendor(0x03, length=64) == b""
    assert bench.vendor(0x02, data=b"kept") == b"kept"  # an OUT transfer keeps what it sent
    assert bench.vendor(0x03, length=64) == b"kept"
    assert bench.vendor(0x03, length=2) == b"ke"
    bench.vendor(0x02)
    assert bench.vendor(0x03, length=64) == b""


def test_counters(bench: Bench) -> None:
    before = bench.counters()
    transfer = bench.start(0x86)
    bench.device.cancel(transfer)
    bench.device.reset()
    bench.run()
    after = bench.counters()
    assert after["resets"] == before["resets"] + 1
    assert after["cancelled"] == before["cancelled"] + 1
    assert after["submitted"] == before["submitted"] + 2  # that one, and the one that asks


def test_halt_by_request(bench: Bench) -> None:
    assert bench.vendor(0x11, index=0x82) == b""
    assert bench.bulk(0x82)[0] == Status.STALL
    bench.device.clear_halt(0x82)
    assert bench.bulk(0x82)[0] == Status.SUCCESS


def test_unplug_by_request(bench: Bench) -> None:
    transfer = bench.start(0x86)
    assert bench.vendor(0x10, 500) == b""
    bench.run(0.499)
    assert transfer.context == []
    bench.run(0.002)
    assert (transfer.context, transfer.device_lost) == ([transfer], True)
    with pytest.raises(DeviceLostError):
        bench.device.reset()


def test_period_by_request(bench: Bench) -> None:
    assert bench.vendor(0x12, 20_000) == b""
    transfer = bench.start(0x83, 8, kind=INTERRUPT)
    bench.run()
    assert bench.device.next_timeout() == pytest.approx(0.02)
    bench.run(0.02)
    assert transfer.context == [transfer]


@pytest.mark.parametrize(("request_number", "length"), [(0x99, 0), (0x99, 4), (0x02, 4), (0x01, 0)])
def test_requests_that_do_not_exist(bench: Bench, request_number: int, length: int) -> None:
    assert bench.vendor(request_number, length=length) is None


def test_a_reset_forgets_what_is_under_way(bench: Bench) -> None:
    """But not the counters."""
    bench.bulk(0x01, data=b"message")
    bench.bulk(0x82)
    bench.bulk(0x02, data=b"x")
    bench.device.reset()
    waiting = bench.start(0x81)
    bench.run()
    assert waiting.context == []
    assert bench.bulk(0x82, 8)[1] == bytes(8)
    assert bench.counters()["sink_bytes"] == 1
