"""usbredir.host: single transfers, their cancellation, bulk streams, limits. HOST_BEHAVIOUR 4, 5 and 7."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from usbredir.device import Transfer
from usbredir.errors import DeviceLostError, RemoteProtocolError
from usbredir.host import CONTROL_TIMEOUT
from usbredir.limits import Limits
from usbredir.packets import (
    AllocBulkStreams,
    BulkPacket,
    BulkStreamsStatus,
    CancelDataPacket,
    ControlPacket,
    DeviceDisconnect,
    FreeBulkStreams,
    InterruptPacket,
    IsoPacket,
    IsoStreamStatus,
    Packet,
    StartInterruptReceiving,
    StartIsoStream,
)
from usbredir.parser import LogLevel
from usbredir.proto import MAX_BULK, Capability, Status, TransferType

from .host_bed import (
    BULK_IN,
    BULK_IN_2,
    BULK_OUT,
    INTERRUPT_IN,
    INTERRUPT_OUT,
    INTERRUPT_SIZE,
    ISO_OUT,
    KINDS,
    MISSING_IN,
    MISSING_OUT,
    Bed,
    FakeDevice,
)

DataPacket = ControlPacket | BulkPacket | InterruptPacket


@pytest.fixture
def device() -> FakeDevice:
    return FakeDevice()


@pytest.fixture
def bed(device: FakeDevice) -> Bed:
    """A guest that has *device*."""
    return Bed(device)


def control_in(id: int = 1, length: int = 8) -> ControlPacket:
    return ControlPacket(id=id, endpoint=0x80, request=6, requesttype=0x80, value=0x0100, index=0, length=length)


def control_out(id: int = 1, data: bytes = b"abc") -> ControlPacket:
    return ControlPacket(id=id, endpoint=0x00, request=9, requesttype=0x21, value=0x0200, index=3, data=data)


def bulk_in(id: int = 1, length: int = 512, endpoint: int = BULK_IN) -> BulkPacket:
    return BulkPacket(id=id, endpoint=endpoint, length=length)


def bulk_out(id: int = 1, data: bytes = b"data", endpoint: int = BULK_OUT) -> BulkPacket:
    return BulkPacket(id=id, endpoint=endpoint, data=data)


def interrupt_out(id: int = 1, data: bytes = b"int") -> InterruptPacket:
    return InterruptPacket(id=id, endpoint=INTERRUPT_OUT, data=data)


REQUESTS: dict[str, Callable[[int], DataPacket]] = {
    "control IN": control_in,
    "control OUT": control_out,
    "bulk IN": bulk_in,
    "bulk OUT": bulk_out,
    "interrupt OUT": interrupt_out,
}
EACH_REQUEST = pytest.mark.parametrize("request_of", REQUESTS.values(), ids=REQUESTS)


def refusal(request: DataPacket, status: int) -> Packet:
    """The request's header with a status and nothing transferred."""
    return request.replace(status=status, length=0, data=b"")


# ---------------------------------------------------------------- what the device is asked


def test_control_in(bed: Bed, device: FakeDevice) -> None:
    assert bed.ask(ControlPacket(id=5, endpoint=0x80, request=1, requesttype=0xC0, value=2, index=3, length=64)) == []
    (transfer,) = device.in_flight
    assert (transfer.kind, transfer.endpoint, transfer.length) == (TransferType.CONTROL, 0x80, 64)
    assert transfer.setup == (0xC0, 1, 2, 3)
    assert transfer.timeout == CONTROL_TIMEOUT == 5.0
    device.complete(data=b"answer")
    assert bed.news() == [
        ControlPacket(id=5, endpoint=0x80, request=1, requesttype=0xC0, value=2, index=3, data=b"answer")
    ]


def test_control_out(bed: Bed, device: FakeDevice) -> None:
    bed.ask(ControlPacket(id=6, endpoint=0x00, request=1, requesttype=0x40, value=2, index=3, data=b"payload"))
    (transfer,) = device.in_flight
    assert (transfer.kind, transfer.endpoint, transfer.length) == (TransferType.CONTROL, 0x00, 7)
    assert (transfer.setup, bytes(transfer.data)) == ((0x40, 1, 2, 3), b"payload")
    device.complete(length=7)
    assert bed.news() == [
        ControlPacket(id=6, endpoint=0x00, request=1, requesttype=0x40, value=2, index=3, length=7, data=b"")
    ]


@pytest.mark.parametrize("requesttype", [0x00, 0x80, 0x21, 0xA1])
@pytest.mark.parametrize("endpoint", [0x00, 0x80])
def test_the_endpoint_decides_the_direction_of_a_control_transfer(
    bed: Bed, device: FakeDevice, endpoint: int, requesttype: int
) -> None:
    """Not the request type."""
    data = b"" if endpoint else b"1234"
    bed.ask(ControlPacket(endpoint=endpoint, requesttype=requesttype, request=7, length=4, data=data))
    assert device.in_flight[0].endpoint == endpoint
    assert device.in_flight[0].setup[0] == requesttype
    device.complete(data=b"9876")
    (reply,) = bed.news()
    assert isinstance(reply, ControlPacket)
    assert (reply.data, reply.length) == (b"9876" if endpoint else b"", 4)


@pytest.mark.parametrize(("requesttype", "request_number"), [(0x00, 9), (0x01, 11)])
def test_set_configuration_and_set_interface_as_control_transfers(
    bed: Bed, device: FakeDevice, requesttype: int, request_number: int
) -> None:
    """They are not intercepted; guests have packets of their own for them."""
    bed.ask(ControlPacket(endpoint=0x00, requesttype=requesttype, request=request_number, value=2))
    assert device.in_flight[0].setup == (requesttype, request_number, 2, 0)
    assert not device.done("set_configuration", "set_alt_setting")


@pytest.mark.parametrize("stream_id", [0, 1, 0xFFFFFFFF])
@pytest.mark.parametrize("endpoint", [BULK_IN, BULK_OUT])
def test_bulk(bed: Bed, device: FakeDevice, endpoint: int, stream_id: int) -> None:
    """The stream id goes to the device and comes back; there is no timeout."""
    inward = bool(endpoint & 0x80)
    data = b"" if inward else b"x" * 100
    bed.ask(BulkPacket(id=9, endpoint=endpoint, stream_id=stream_id, length=100, data=data))
    (transfer,) = device.in_flight
    assert (transfer.kind, transfer.endpoint, transfer.length) == (TransferType.BULK, endpoint, 100)
    assert (transfer.stream_id, transfer.timeout, bytes(transfer.data)) == (stream_id, 0, data)
    device.complete(data=b"y" * 30, length=30)
    received = b"y" * 30 if inward else b""
    assert bed.news() == [BulkPacket(id=9, endpoint=endpoint, stream_id=stream_id, length=30, data=received)]


@pytest.mark.parametrize("length", [0xFFFF, 0x10000, 0x12345])
def test_long_bulk(bed: Bed, device: FakeDevice, length: int) -> None:
    """Lengths of more than 16 bits, both ways."""
    bed.ask(bulk_in(1, length))
    assert device.in_flight[0].length == length
    device.complete(data=b"z" * length)
    assert bed.news() == [BulkPacket(id=1, endpoint=BULK_IN, data=b"z" * length)]
    bed.ask(bulk_out(2, b"w" * length))
    device.complete()
    assert bed.news() == [BulkPacket(id=2, endpoint=BULK_OUT, length=length, data=b"")]


def test_interrupt_out(bed: Bed, device: FakeDevice) -> None:
    bed.ask(InterruptPacket(id=3, endpoint=INTERRUPT_OUT, data=b"b" * INTERRUPT_SIZE))
    (transfer,) = device.in_flight
    assert (transfer.kind, transfer.endpoint, transfer.length) == (
        TransferType.INTERRUPT,
        INTERRUPT_OUT,
        INTERRUPT_SIZE,
    )
    assert transfer.timeout == 0
    device.complete()
    assert bed.news() == [InterruptPacket(id=3, endpoint=INTERRUPT_OUT, length=INTERRUPT_SIZE, data=b"")]


@EACH_REQUEST
@pytest.mark.parametrize("garbage", [1, 4, 250])
def test_the_status_of_a_request_does_not_matter(
    bed: Bed, device: FakeDevice, request_of: Callable[[int], DataPacket], garbage: int
) -> None:
    """QEMU leaves it uninitialised."""
    bed.ask(request_of(1).replace(status=garbage))
    device.complete()
    assert bed.news()[0].status == Status.SUCCESS  # type: ignore[attr-defined]


@given(st.lists(st.sampled_from(list(REQUESTS)), min_size=1, max_size=12), st.data())
def test_replies_come_in_the_order_of_completion(kinds: list[str], data: st.DataObject) -> None:
    """Whatever the device finishes first is answered first, each with its own header."""
    device = FakeDevice()
    bed = Bed(device)
    requests = [REQUESTS[kind](number) for number, kind in enumerate(kinds)]
    bed.ask(*requests)
    waiting = dict(zip(device.in_flight, requests, strict=True))
    for transfer in data.draw(st.permutations(list(waiting))):
        device.complete(transfer)
        assert bed.news() == [
            waiting[transfer].replace(length=waiting[transfer].length * (not transfer.endpoint & 0x80), data=b"")
        ]
    bed.host.close()


# ---------------------------------------------------------------- statuses


@EACH_REQUEST
@pytest.mark.parametrize("status", Status)
def test_status_of_a_completion(
    bed: Bed, device: FakeDevice, request_of: Callable[[int], DataPacket], status: Status
) -> None:
    """It is passed on; IN data that came before a failure travels with it, OUT replies tell how much went."""
    request = request_of(1)
    bed.ask(request)
    device.complete(status=status, data=b"xy", length=2)
    received = b"xy" if request.endpoint & 0x80 else b""
    assert bed.news() == [request.replace(status=status, length=2, data=received)]


@EACH_REQUEST
@pytest.mark.parametrize("status", [Status.INVAL, Status.IOERROR, Status.TIMEOUT])
def test_status_of_a_failed_submission(
    bed: Bed, device: FakeDevice, request_of: Callable[[int], DataPacket], status: Status
) -> None:
    """Answered as a completion would be, with zero length; the connection and the device stay."""
    device.script["submit"] = status
    request = request_of(1)
    assert bed.ask(request) == [refusal(request, status)]
    del device.script["submit"]
    assert bed.ask(request) == []
    assert len(device.in_flight) == 1


@EACH_REQUEST
def test_device_lost_in_a_completion(bed: Bed, device: FakeDevice, request_of: Callable[[int], DataPacket]) -> None:
    """device_disconnect goes out before the status."""
    request = request_of(1)
    bed.ask(request)
    device.complete(lost=True)
    assert bed.news() == [DeviceDisconnect(), refusal(request, Status.IOERROR)]


@EACH_REQUEST
def test_device_lost_in_a_submission(bed: Bed, device: FakeDevice, request_of: Callable[[int], DataPacket]) -> None:
    request = request_of(1)
    device.script["submit"] = DeviceLostError("gone")
    assert bed.ask(request) == [DeviceDisconnect(), refusal(request, Status.IOERROR)]


def test_device_lost_in_a_submission_without_an_exception(bed: Bed, device: FakeDevice) -> None:
    """A device may also mark the transfer."""

    def submit(transfer: Transfer) -> int:
        transfer.device_lost = True
        return Status.IOERROR

    device.submit = submit  # type: ignore[method-assign]
    assert bed.ask(bulk_in()) == [DeviceDisconnect(), refusal(bulk_in(), Status.IOERROR)]


# ---------------------------------------------------------------- refusals


def empty_request(kind: TransferType, endpoint: int) -> DataPacket:
    if kind is TransferType.CONTROL:
        return ControlPacket(id=1, endpoint=endpoint, length=0)
    if kind is TransferType.BULK:
        return BulkPacket(id=1, endpoint=endpoint, length=0)
    return InterruptPacket(id=1, endpoint=endpoint, length=0)


WRONG = [
    (kind, endpoint)
    for kind in (TransferType.CONTROL, TransferType.BULK, TransferType.INTERRUPT)
    for endpoint, real in KINDS.items()
    if real is not kind and not (kind is TransferType.INTERRUPT and endpoint & 0x80)
]


@pytest.mark.parametrize(("kind", "endpoint"), WRONG)
def test_wrong_type_of_endpoint(bed: Bed, device: FakeDevice, kind: TransferType, endpoint: int) -> None:
    """inval and an error message; the connection stays."""
    request = empty_request(kind, endpoint)
    assert bed.ask(request) == [refusal(request, Status.INVAL)]
    assert bed.logged(LogLevel.ERROR, f"0x{endpoint:02x}")
    assert device.in_flight == []


@EACH_REQUEST
def test_disconnected(request_of: Callable[[int], DataPacket]) -> None:
    """Without a device, and with a lost one."""
    request = request_of(1)
    assert Bed(None).ask(request) == [refusal(request, Status.IOERROR)]
    device = FakeDevice()
    bed = Bed(device)
    bed.ask(bulk_in(7))
    device.complete(lost=True)
    bed.news()
    assert bed.ask(request) == [refusal(request, Status.IOERROR)]
    assert device.in_flight == []


@EACH_REQUEST
def test_before_hello(request_of: Callable[[int], DataPacket]) -> None:
    """The device is there, but not announced: ioerror."""
    device = FakeDevice()
    bed = Bed(device, hello=False, capabilities=())
    request = request_of(1)
    bed.news()
    assert bed.ask(request) == [refusal(request, Status.IOERROR)]
    assert device.in_flight == []


def test_too_long_interrupt_packet(bed: Bed, device: FakeDevice) -> None:
    request = InterruptPacket(id=1, endpoint=INTERRUPT_OUT, data=bytes(INTERRUPT_SIZE + 1))
    assert bed.ask(request) == [refusal(request, Status.INVAL)]
    assert bed.logged(LogLevel.ERROR, "65 bytes")
    assert device.in_flight == []


def test_interrupt_in_cannot_be_asked_for(bed: Bed, device: FakeDevice) -> None:
    """Such a packet is a parse error; what follows is served."""
    bed.say_bytes(bytes((103, 0, 0, 0, 4, 0, 0, 0)) + bytes(8) + bytes((INTERRUPT_IN, 0, 0, 0)))
    bed.say(bulk_in())
    with pytest.raises(RemoteProtocolError):
        bed.run()
    assert bed.run() == []
    assert len(device.in_flight) == 1


def test_iso_packets(bed: Bed) -> None:
    """Not without a stream, see test_host_iso."""
    for endpoint in (ISO_OUT, BULK_OUT, MISSING_OUT):
        assert bed.ask(IsoPacket(id=4, endpoint=endpoint, data=b"x")) == [
            IsoStreamStatus(id=4, endpoint=endpoint, status=Status.INVAL)
        ]
    bed.host.set_device(None)
    bed.news()
    assert bed.ask(IsoPacket(id=5, endpoint=ISO_OUT, data=b"x")) == [
        IsoStreamStatus(id=5, endpoint=ISO_OUT, status=Status.IOERROR)
    ]


# ---------------------------------------------------------------- clear-halt

CLEAR_HALT = ControlPacket(id=8, endpoint=0x00, requesttype=0x02, request=1, value=0, index=BULK_IN)


@pytest.mark.parametrize(
    ("result", "status"),
    [
        (Status.SUCCESS, Status.SUCCESS),
        (Status.IOERROR, Status.IOERROR),
        (Status.TIMEOUT, Status.TIMEOUT),
        (Status.INVAL, Status.INVAL),
    ],
)
def test_clear_halt(bed: Bed, device: FakeDevice, result: Status, status: Status) -> None:
    """The controller has to know, so the request is not forwarded; the result is the reply."""
    device.script["clear_halt"] = result
    assert bed.ask(CLEAR_HALT) == [refusal(CLEAR_HALT, status)]
    assert device.done("clear_halt") == [("clear_halt", BULK_IN)]
    assert device.in_flight == []


@pytest.mark.parametrize(
    "change",
    [
        {"requesttype": 0x00},
        {"requesttype": 0x01},
        {"requesttype": 0x42},
        {"request": 3},
        {"value": 1},
        {"data": b"x", "length": 1},
    ],
    ids=str,
)
def test_not_quite_clear_halt(bed: Bed, device: FakeDevice, change: dict[str, Any]) -> None:
    """Anything else is forwarded."""
    assert bed.ask(CLEAR_HALT.replace(**change)) == []
    assert not device.done("clear_halt")
    assert len(device.in_flight) == 1


def test_clear_halt_of_a_lost_device(bed: Bed, device: FakeDevice) -> None:
    device.script["clear_halt"] = DeviceLostError("gone")
    assert bed.ask(CLEAR_HALT) == [DeviceDisconnect(), refusal(CLEAR_HALT, Status.IOERROR)]
    assert bed.ask(CLEAR_HALT) == [refusal(CLEAR_HALT, Status.IOERROR)]


# ---------------------------------------------------------------- cancelling


@EACH_REQUEST
@pytest.mark.parametrize("late", [*Status, "lost"])
def test_cancel(bed: Bed, device: FakeDevice, request_of: Callable[[int], DataPacket], late: Status | str) -> None:
    """Answered at once, with the original header; whatever the completion brings is swallowed."""
    request = request_of(77)
    bed.ask(request)
    assert bed.ask(CancelDataPacket(id=77)) == [refusal(request, Status.CANCELLED)]
    assert device.cancelled == device.in_flight
    if late == "lost":
        device.complete(lost=True)
        assert bed.news() == [DeviceDisconnect()]
    else:
        assert isinstance(late, Status)
        device.complete(status=late, data=b"abc")
        assert bed.news() == []


def test_cancel_of_nothing(bed: Bed, device: FakeDevice) -> None:
    """It completed meanwhile: no reply, no error."""
    assert bed.ask(CancelDataPacket(id=1)) == []
    bed.ask(bulk_in(1))
    device.complete()
    bed.news()
    assert bed.ask(CancelDataPacket(id=1)) == []
    assert Bed(None).ask(CancelDataPacket(id=1)) == []
    assert not bed.logged(LogLevel.ERROR)
    assert not device.done("cancel")


def test_cancel_twice(bed: Bed, device: FakeDevice) -> None:
    bed.ask(bulk_in(1))
    assert len(bed.ask(CancelDataPacket(id=1), CancelDataPacket(id=1))) == 1
    assert len(device.cancelled) == 1


def test_the_id_of_a_cancelled_request_is_free_at_once(bed: Bed, device: FakeDevice) -> None:
    """Even though its transfer is still under way."""
    bed.ask(bulk_in(1, 10))
    bed.ask(CancelDataPacket(id=1))
    assert bed.ask(bulk_out(1)) == []
    old, new = device.in_flight
    device.complete(new)
    assert bed.news() == [BulkPacket(id=1, endpoint=BULK_OUT, length=4, data=b"")]
    device.complete(old, data=b"late")
    assert bed.news() == []


def test_ids_may_repeat(bed: Bed, device: FakeDevice) -> None:
    """Nothing checks that they are unique: each request is answered, a cancel takes the oldest."""
    requests: list[DataPacket] = [bulk_in(5, 10), bulk_in(5, 20), control_in(5)]
    bed.ask(*requests)
    first, second, third = device.in_flight
    assert bed.ask(CancelDataPacket(id=5)) == [refusal(requests[0], Status.CANCELLED)]
    assert device.cancelled == [first]
    device.complete(third)
    device.complete(first)
    assert bed.news() == [refusal(requests[2], Status.SUCCESS)]
    assert bed.ask(CancelDataPacket(id=5)) == [refusal(requests[1], Status.CANCELLED)]
    assert device.cancelled == [first, second]


def test_cancelling_one_id_again_and_again(bed: Bed, device: FakeDevice) -> None:
    """From the oldest to the newest."""
    lengths = [10, 20, 30, 40]
    bed.ask(*(bulk_in(5, length) for length in lengths))
    for _ in lengths:
        bed.ask(CancelDataPacket(id=5))
    assert [transfer.length for transfer in device.cancelled] == lengths
    assert bed.ask(CancelDataPacket(id=5)) == []


@pytest.mark.parametrize("wide", [1 << 32, (1 << 64) - 1])
def test_wide_ids(bed: Bed, device: FakeDevice, wide: int) -> None:
    """QEMU's are addresses: 64 bits count."""
    bed.ask(bulk_in(wide), bulk_in(wide & 0xFFFF))
    assert [packet.id for packet in bed.ask(CancelDataPacket(id=wide))] == [wide]


def test_cancel_after_the_device_was_lost(bed: Bed, device: FakeDevice) -> None:
    """What is still under way can be cancelled; each request has one answer."""
    bed.ask(bulk_in(1), bulk_in(2))
    device.complete(lost=True)
    bed.news()
    assert bed.ask(CancelDataPacket(id=2)) == [refusal(bulk_in(2), Status.CANCELLED)]
    device.complete(lost=True)
    assert bed.news() == []


def test_receiving_cannot_be_cancelled_by_id(bed: Bed, device: FakeDevice) -> None:
    bed.ask(StartInterruptReceiving(id=9, endpoint=INTERRUPT_IN))
    assert bed.ask(*(CancelDataPacket(id=number) for number in range(10))) == []
    assert device.cancelled == []


def test_device_lost_in_cancel(bed: Bed, device: FakeDevice) -> None:
    """Every method of a device may say so; the cancelled request is answered all the same."""
    bed.ask(bulk_in(1))
    device.script["cancel"] = DeviceLostError("gone")
    assert refusal(bulk_in(1), Status.CANCELLED) in bed.ask(CancelDataPacket(id=1))


# ---------------------------------------------------------------- bulk streams

STREAMS_MASK = 1 << 1 | 1 << 17
STREAM_ENDPOINTS = [0x01, 0x81]


@pytest.mark.parametrize(
    ("result", "status"),
    [
        ((Status.SUCCESS, 16), Status.SUCCESS),
        ((Status.SUCCESS, 15), Status.IOERROR),
        ((Status.SUCCESS, 0), Status.IOERROR),
        ((Status.INVAL, 0), Status.INVAL),
        ((Status.IOERROR, 0), Status.IOERROR),
    ],
)
def test_alloc_streams(bed: Bed, device: FakeDevice, result: tuple[int, int], status: Status) -> None:
    """Fewer than asked for is an ioerror; the reply repeats mask and count."""
    device.script["alloc_streams"] = result
    assert bed.ask(AllocBulkStreams(id=3, endpoints=STREAMS_MASK, no_streams=16)) == [
        BulkStreamsStatus(id=3, endpoints=STREAMS_MASK, no_streams=16, status=status)
    ]
    assert device.done("alloc_streams") == [("alloc_streams", STREAM_ENDPOINTS, 16)]


@pytest.mark.parametrize("status", [Status.SUCCESS, Status.IOERROR, Status.INVAL])
def test_free_streams(bed: Bed, device: FakeDevice, status: Status) -> None:
    """The reply has count 0."""
    device.script["free_streams"] = status
    assert bed.ask(FreeBulkStreams(id=3, endpoints=STREAMS_MASK)) == [
        BulkStreamsStatus(id=3, endpoints=STREAMS_MASK, no_streams=0, status=status)
    ]
    assert device.done("free_streams") == [("free_streams", STREAM_ENDPOINTS)]


@pytest.mark.parametrize("lost", [False, True])
def test_streams_without_a_device(lost: bool) -> None:
    """Never set, or lost: ioerror."""
    device = FakeDevice()
    bed = Bed(device if lost else None)
    if lost:
        bed.ask(bulk_in(7))
        device.complete(lost=True)
        bed.news()
    assert bed.ask(AllocBulkStreams(id=3, endpoints=2, no_streams=4), FreeBulkStreams(id=4, endpoints=2)) == [
        BulkStreamsStatus(id=3, endpoints=2, no_streams=4, status=Status.IOERROR),
        BulkStreamsStatus(id=4, endpoints=2, no_streams=0, status=Status.IOERROR),
    ]
    assert not device.done("alloc_streams", "free_streams")


@pytest.mark.parametrize(
    ("method", "request_packet"),
    [
        ("alloc_streams", AllocBulkStreams(id=3, endpoints=2, no_streams=4)),
        ("free_streams", FreeBulkStreams(id=3, endpoints=2)),
    ],
)
def test_device_lost_in_streams(bed: Bed, device: FakeDevice, method: str, request_packet: Packet) -> None:
    """As everywhere: device_disconnect, then ioerror."""
    device.script[method] = DeviceLostError("gone")
    first, second = bed.ask(request_packet)
    assert first == DeviceDisconnect()
    assert isinstance(second, BulkStreamsStatus)
    assert second.status == Status.IOERROR


# ---------------------------------------------------------------- limits


def test_most_transfers(device: FakeDevice) -> None:
    """One request too many is refused; when a transfer is done there is room again."""
    bed = Bed(device, limits=Limits(max_transfers=3))
    assert bed.ask(bulk_in(1), bulk_out(2), control_in(3)) == []
    assert bed.ask(interrupt_out(4)) == [refusal(interrupt_out(4), Status.IOERROR)]
    assert bed.logged(LogLevel.WARNING, "too many")
    bed.ask(CancelDataPacket(id=1))
    bed.news()
    assert bed.ask(bulk_in(5)) == [refusal(bulk_in(5), Status.IOERROR)], "a cancelled transfer is still under way"
    device.complete(device.cancelled[0])
    assert bed.ask(bulk_in(6)) == []


def test_most_bytes(device: FakeDevice) -> None:
    """Buffers of IN and OUT transfers and of receiving count alike."""
    bed = Bed(device, limits=Limits(max_transfer_bytes=1000))
    bed.ask(bulk_in(1, 300), bulk_out(2, bytes(300)))
    assert bed.ask(bulk_in(3, 401)) == [refusal(bulk_in(3, 401), Status.IOERROR)]
    assert bed.ask(bulk_in(4, 400)) == []
    assert bed.ask(bulk_in(5, 1)) == [refusal(bulk_in(5, 1), Status.IOERROR)]
    assert bed.ask(bulk_in(6, 0)) == []
    device.complete(device.in_flight[2])
    bed.news()
    bed.ask(StartInterruptReceiving(id=7, endpoint=INTERRUPT_IN))  # 5 x 64
    assert bed.ask(bulk_in(8, 81)) == [refusal(bulk_in(8, 81), Status.IOERROR)]
    assert bed.ask(bulk_in(9, 80)) == []


def test_refused_submissions_do_not_count(device: FakeDevice) -> None:
    bed = Bed(device, limits=Limits(max_transfers=2, max_transfer_bytes=100))
    device.script["submit"] = Status.IOERROR
    for number in range(5):
        bed.ask(bulk_in(number, 90))
    device.script.clear()
    bed.news()
    assert bed.ask(bulk_in(1, 90), bulk_in(2, 10)) == []


def test_huge_bulk_requests(bed: Bed, device: FakeDevice) -> None:
    """With the default limits a guest can have two of the largest transfers, and none that is larger."""
    huge = [bulk_in(number, MAX_BULK) for number in range(4)]
    assert bed.ask(*huge) == [refusal(request, Status.IOERROR) for request in huge[2:]]
    assert len(device.in_flight) == 2
    too_long = bytes((101, 0, 0, 0, 10, 0, 0, 0)) + bytes(8) + bytes((BULK_IN, 0, 1, 0, 0, 0, 0, 0, 0, 8))
    bed.say_bytes(too_long)
    with pytest.raises(RemoteProtocolError):
        bed.run()
    assert bed.ask(bulk_in(9, 0)) == []


def test_endless_requests_and_cancels(bed: Bed, device: FakeDevice) -> None:
    """A cancelled transfer counts until the device gives it back: a guest cannot collect them."""
    device.stuck = True
    for number in range(1100):
        bed.say(bulk_in(number, 1), CancelDataPacket(id=number))
    statuses = [packet.status for packet in bed.run()]  # type: ignore[attr-defined]
    assert statuses == [Status.CANCELLED] * 1024 + [Status.IOERROR] * 76
    assert len(device.in_flight) == 1024


# ---------------------------------------------------------------- guests with fewer capabilities


def test_a_simple_guest(device: FakeDevice) -> None:
    """32-bit ids and 16-bit lengths."""
    bed = Bed(device, capabilities=())
    bed.ask(bulk_in(0xFFFFFFFF, 0xFFFF))
    device.complete(data=b"q" * 0xFFFF)
    assert bed.news() == [BulkPacket(id=0xFFFFFFFF, endpoint=BULK_IN, data=b"q" * 0xFFFF)]


@pytest.mark.parametrize("missing", Capability)
def test_every_capability_may_be_missing(device: FakeDevice, missing: Capability) -> None:
    """Requests are served all the same; the guest understands every packet, or its parser would complain."""
    dropped = {missing, Capability.BULK_STREAMS} if missing is Capability.EP_INFO_MAX_PACKET_SIZE else {missing}
    bed = Bed(device, capabilities=set(Capability) - dropped)
    bed.ask(bulk_in(1), AllocBulkStreams(id=2, endpoints=2), StartInterruptReceiving(id=3, endpoint=INTERRUPT_IN))
    device.complete(data=b"fine")
    assert bed.received[-1] == BulkPacket(id=1, endpoint=BULK_IN, data=b"fine")
    bed.news()
    assert bed.ask(bulk_in(2, endpoint=MISSING_IN)) == [refusal(bulk_in(2, endpoint=MISSING_IN), Status.INVAL)]


def test_a_guest_without_bulk_receiving_gets_no_status_of_it(device: FakeDevice) -> None:
    """The status packet follows the endpoint's type; this guest would take it for a bad packet."""
    bed = Bed(device, capabilities=set(Capability) - {Capability.BULK_RECEIVING})
    assert bed.ask(StartIsoStream(id=2, endpoint=BULK_IN_2, pkts_per_urb=1, no_urbs=1)) == []
    assert bed.logged(LogLevel.ERROR, "not sent")
