"""usbredir.aio: guests and hosts in an event loop, against each other and against hosts that mean harm."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import inspect
import os
import socket
import ssl
import struct
import sys
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from pathlib import Path
from typing import Any, ParamSpec

import pytest
from hypothesis import given
from hypothesis import strategies as st

from usbredir import _aio_stream, _exchange, aio, requests, transport
from usbredir import guest as blocking
from usbredir.device import TransferResult, UsbDevice
from usbredir.errors import (
    ConnectionClosed,
    DeviceClaimError,
    DeviceLostError,
    DeviceRejectedError,
    LocalProtocolError,
    RemoteProtocolError,
)
from usbredir.filter import FilterRule
from usbredir.limits import Limits
from usbredir.packets import (
    BufferedBulkPacket,
    BulkPacket,
    BulkReceivingStatus,
    CancelDataPacket,
    ConfigurationStatus,
    ControlPacket,
    DeviceConnect,
    DeviceDisconnect,
    EpInfo,
    FilterFilter,
    GetConfiguration,
    InterfaceInfo,
    InterruptPacket,
    InterruptReceivingStatus,
    IsoPacket,
    IsoStreamStatus,
    Packet,
)
from usbredir.parser import LogLevel, Parser
from usbredir.proto import Status, TransferType, endpoint_address
from usbredir.virtual import LoopbackDevice

from .strategies import End, raw_packet

LOOP_OUT, LOOP_IN, SINK, SOURCE = 0x01, 0x81, 0x02, 0x82
INTERRUPT_OUT, INTERRUPT_IN, ISO_OUT, ISO_IN, STALLING, SILENT = 0x03, 0x83, 0x04, 0x84, 0x85, 0x86

LONG = os.environ.get("USBREDIR_LONG") == "1"
CYCLES = 10_000 if LONG else 100
PATIENCE = 30.0
"""Seconds that an answer may take on a busy machine."""
MOMENT = 0.02
"""Seconds to wait for what does not come."""

P = ParamSpec("P")


def in_loop(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """Run a test in a loop of its own, in debug mode; it leaves no task, and nothing that the loop complains of."""

    async def watched(*args: P.args, **kwargs: P.kwargs) -> None:
        complaints: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context))
        await asyncio.wait_for(test(*args, **kwargs), 3600 if LONG else 2 * PATIENCE)
        gc.collect()
        await asyncio.sleep(0)
        assert not complaints
        assert asyncio.all_tasks() == {asyncio.current_task()}

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        asyncio.run(watched(*args, **kwargs), debug=True)

    return run


@contextlib.asynccontextmanager
async def linked(device: UsbDevice | None = None, **options: Any) -> AsyncIterator[tuple[aio.Session, aio.Guest]]:
    """A session and a guest at the two ends of a socket pair; the device is announced."""
    ours, theirs = socket.socketpair()
    made = device or LoopbackDevice(interrupt_period=0)
    session = aio.Session(made)
    await asyncio.get_running_loop().create_connection(session.protocol, sock=ours)
    async with aio.connect(theirs, **options) as guest:
        await guest.wait_for_device(PATIENCE)
        yield session, guest
    session.close()
    await session.wait_closed()
    made.close()


# ================================================================ calls


METHODS = [name for name in requests.__all__ if inspect.isfunction(getattr(requests, name)) and name != "like"]


@pytest.mark.parametrize("name", METHODS)
def test_each_request_is_a_coroutine_method(name: str) -> None:
    """With the arguments and the text of the request."""
    method, make = getattr(aio.Guest, name), getattr(requests, name)
    assert inspect.iscoroutinefunction(method)
    assert list(inspect.signature(method).parameters)[1:] == list(inspect.signature(make).parameters)
    assert method.__doc__ == make.__doc__
    assert method.__name__ == name


def test_what_the_blocking_guest_can_do_this_one_can() -> None:
    """But for what asyncio does in another way."""
    differs = {"packets_received", "process", "has_data_to_write", "pipeline"}
    public = {name for name in vars(blocking.Guest) if not name.startswith("_")}
    assert public - differs <= set(vars(aio.Guest))


@in_loop
async def test_calls() -> None:
    async with linked() as (_, guest):
        assert guest.device is not None
        assert guest.device.vendor_id == 0x1209
        assert guest.interfaces is not None
        assert guest.endpoints is not None
        assert guest.host_version
        assert guest.host_filter is None
        assert await guest.get_configuration() == (Status.SUCCESS, 1)
        assert await guest.set_configuration(1) == (Status.SUCCESS, 1)
        assert await guest.set_alt_setting(1, 2) == (Status.SUCCESS, 2)
        assert await guest.get_alt_setting(1) == (Status.SUCCESS, 2)
        assert await guest.control_out(0x40, 2, 0, 0, b"stored") == TransferResult(Status.SUCCESS)
        assert (await guest.control_in(0xC0, 3, 0, 0, 64)).data == b"stored"
        assert await guest.bulk_out(LOOP_OUT, b"hello") == TransferResult(Status.SUCCESS)
        assert await guest.bulk_in(LOOP_IN, 64) == TransferResult(Status.SUCCESS, b"hello")
        assert (await guest.interrupt_out(INTERRUPT_OUT, b"x")).status == Status.SUCCESS
        assert (await guest.alloc_streams([LOOP_IN], 2))[0] != Status.SUCCESS  # at high speed there are none
        assert (await guest.get_descriptor(1, 0, 18))[8:12] == bytes.fromhex("09120100")
        assert await guest.get_descriptor(3, 200) == b""
        assert await guest.call(requests.get_configuration()) == (Status.SUCCESS, 1)


@in_loop
async def test_results_are_not_exceptions() -> None:
    async with linked() as (_, guest):
        assert (await guest.bulk_in(STALLING, 64)).status == Status.STALL
        assert (await guest.clear_halt(STALLING)).status == Status.SUCCESS
        assert (await guest.bulk_in(STALLING, 64)).status == Status.SUCCESS
        await guest.bulk_out(LOOP_OUT, bytes(100))
        assert (await guest.bulk_in(LOOP_IN, 64)).status == Status.BABBLE


@in_loop
async def test_a_timeout_cancels() -> None:
    """Each at its own time, in whatever order they were asked for."""
    device = LoopbackDevice()
    async with linked(device) as (_, guest):
        late, soon, none = [guest.submit(requests.bulk_in(SILENT, 64, timeout=t)) for t in (0.2, MOMENT, None)]
        done, _ = await asyncio.wait([late, soon, none], return_when=asyncio.FIRST_COMPLETED)
        assert done == {soon}
        assert await late == await soon == TransferResult(Status.TIMEOUT)
        assert not none.done()
        assert device.counters["cancelled"] == 2
        assert (await guest.bulk_in(SILENT, 64, timeout=0)).status == Status.TIMEOUT
        await guest.bulk_out(LOOP_OUT, b"hello")
        assert (await guest.bulk_in(LOOP_IN, 64)).data == b"hello"
        none.cancel()


@in_loop
async def test_a_cancelled_task_cancels_its_transfer() -> None:
    """At the host; a future that is cancelled as well. Nobody is disturbed."""
    device = LoopbackDevice()
    async with linked(device) as (_, guest):
        task = asyncio.ensure_future(guest.bulk_in(SILENT, 64))
        future = guest.submit(requests.bulk_in(SILENT, 64))
        assert (await guest.bulk_in(SOURCE, 8)).status == Status.SUCCESS  # both have been sent
        task.cancel()
        future.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await guest.get_configuration()
        assert device.counters["cancelled"] == 2
        await guest._until(lambda: not guest._exchange.busy, PATIENCE)


@in_loop
async def test_many_tasks() -> None:
    """Each has the answer to its own request."""
    async with linked() as (_, guest):

        async def ask(value: int) -> None:
            for _ in range(5):
                data = (await guest.control_in(0xC0, 1, value, 0, 4)).data
                assert data == bytes((value + i) & 0xFF for i in range(4))

        await asyncio.gather(*[ask(value) for value in range(50)])
        answers = await asyncio.gather(*[guest.submit(requests.bulk_in(SOURCE, 8)) for _ in range(100)])
        assert sorted(struct.unpack("<Q", answer.data)[0] for answer in answers) == list(range(100))


@in_loop
async def test_large_transfers() -> None:
    """More than any buffer on the way holds, in both directions at once."""
    size = 3_000_000
    async with linked() as (_, guest):
        reads = [guest.submit(requests.bulk_in(SOURCE, size)) for _ in range(4)]
        writes = [guest.submit(requests.bulk_out(SINK, bytes(size))) for _ in range(4)]
        assert [len((await read).data) for read in reads] == [size] * 4
        assert {(await write).status for write in writes} == {Status.SUCCESS}
        counters = struct.unpack("<8Q", (await guest.control_in(0xC0, 0x20, 0, 0, 64)).data)
        assert counters[2] == 4 * size


@in_loop
async def test_mistakes_are_told_at_once() -> None:
    async with linked() as (_, guest):
        for mistake in (guest.bulk_in(0x81, -1), guest.control_in(0x80, 6, 0, 0, 70_000), guest.receive(INTERRUPT_IN)):
            with pytest.raises((LocalProtocolError, ValueError)):
                await mistake
        with pytest.raises((LocalProtocolError, ValueError)):
            guest.submit(requests.interrupt_out(0x83, b"x"))
        assert not guest._exchange.busy


@in_loop
async def test_devices_that_come_and_go() -> None:
    first, second = LoopbackDevice(), LoopbackDevice()
    async with linked(first) as (session, guest):
        with pytest.raises(TimeoutError):
            await guest.wait_for_disconnect(MOMENT)
        waiting = guest.submit(requests.bulk_in(SILENT, 64))
        session.host.set_device(None)
        first.close()
        await guest.wait_for_disconnect(PATIENCE)
        with pytest.raises(DeviceLostError):
            await waiting
        with pytest.raises(DeviceLostError):
            await guest.bulk_in(SOURCE, 8)
        with pytest.raises(TimeoutError):
            await guest.wait_for_device(MOMENT)
        session.host.set_device(second)  # whose descriptors may have the same numbers
        await guest.wait_for_device(PATIENCE)
        assert (await guest.bulk_in(SOURCE, 8)).status == Status.SUCCESS
        second.unplug()
        await guest.wait_for_disconnect(PATIENCE)
    second.close()


@in_loop
async def test_another_device_with_the_same_descriptors() -> None:
    """The system gives the numbers of closed descriptors again: the loop has to be told."""
    first, second = LoopbackDevice(), LoopbackDevice()
    async with linked(first) as (session, guest):
        descriptors = first.pollfds()
        session.host.set_device(None)
        first.close()
        assert second.pollfds() == descriptors
        session.host.set_device(second)
        await guest.wait_for_disconnect(PATIENCE)
        await guest.wait_for_device(PATIENCE)
        await guest.get_configuration()
        second.unplug()
        await guest.wait_for_disconnect(PATIENCE)
    second.close()


@in_loop
async def test_reset_and_reject() -> None:
    device = LoopbackDevice()
    async with linked(device) as (session, guest):
        await guest.bulk_out(LOOP_OUT, b"forgotten")
        guest.reset()
        assert await guest.get_configuration() == (Status.SUCCESS, 1)
        assert device.counters["resets"] == 2
        guest.reject()
        assert guest.device is None
        await session.wait_closed()
        assert isinstance(session.error, DeviceRejectedError)
        await guest.wait_closed()


# ================================================================ streams


@in_loop
async def test_receiving() -> None:
    async with linked() as (_, guest):
        assert await guest.start_interrupt_receiving(INTERRUPT_IN) == Status.SUCCESS
        results = [await guest.receive(INTERRUPT_IN, timeout=PATIENCE) for _ in range(20)]
        assert results == [TransferResult(Status.SUCCESS, struct.pack("<Q", number)) for number in range(20)]
        assert await guest.stop_interrupt_receiving(INTERRUPT_IN) == Status.SUCCESS
        assert await guest.start_bulk_receiving(SILENT, 512, 1) == Status.SUCCESS
        assert await guest.receive(SILENT, timeout=0) == TransferResult(Status.TIMEOUT)
        assert await guest.receive(SILENT, timeout=MOMENT) == TransferResult(Status.TIMEOUT)


@in_loop
async def test_interrupts() -> None:
    """Again right after the loop was left, whether the first was closed or only dropped."""
    async with linked() as (session, guest):
        for _ in range(3):
            counters = []
            async for status, data in guest.interrupts(INTERRUPT_IN):
                assert status == Status.SUCCESS
                counters.append(struct.unpack("<Q", data)[0])
                if len(counters) == 5:
                    break
            assert counters == list(range(counters[0], counters[0] + 5))
        async with contextlib.aclosing(guest.interrupts(INTERRUPT_IN)) as packets:
            assert (await packets.__anext__()).status == Status.SUCCESS
        await guest.get_configuration()
        assert not session.host._streams
        assert not guest._exchange.streams
        assert not guest._iterators


@in_loop
async def test_an_iteration_that_is_not_closed_gives_way() -> None:
    """A dropped generator is closed when the interpreter gets to it: the next one does not wait for that."""
    async with linked() as (_, guest):
        first = guest.interrupts(INTERRUPT_IN)
        await first.__anext__()
        second = guest.interrupts(INTERRUPT_IN)
        assert (await second.__anext__()).status == Status.SUCCESS
        await first.aclose()
        for _ in range(3):
            assert (await second.__anext__()).status == Status.SUCCESS
        await second.aclose()


@in_loop
async def test_a_cancelled_iteration_stops_receiving() -> None:
    async with linked() as (session, guest):
        seen = asyncio.Event()

        async def listen() -> None:
            async for _ in guest.interrupts(INTERRUPT_IN):
                seen.set()

        task = asyncio.ensure_future(listen())
        await seen.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await guest.get_configuration()
        assert not session.host._streams


@in_loop
async def test_bulk_and_isochronous_packets() -> None:
    async with linked(LoopbackDevice(iso_period=0.0001)) as (_, guest):
        await guest.set_alt_setting(1, 1)
        for packets in (guest.bulk_packets(SOURCE, 512, 4), guest.iso_packets(ISO_IN)):
            numbers = []
            async for status, data in packets:
                assert status == Status.SUCCESS
                numbers.append(struct.unpack_from("<Q", data)[0])
                if len(numbers) == 20:
                    break
            assert numbers == sorted(set(numbers))
            await packets.aclose()


@in_loop
async def test_a_stream_that_cannot_start_is_a_result() -> None:
    async with linked() as (_, guest):
        assert [result.status async for result in guest.interrupts(SOURCE)] == [Status.STALL]
        assert (await guest.get_configuration())[0] == Status.SUCCESS


@in_loop
async def test_an_iteration_ends_with_its_device() -> None:
    device = LoopbackDevice()
    async with linked(device) as (_, guest):
        packets = guest.interrupts(INTERRUPT_IN)
        await packets.__anext__()
        device.unplug()
        with pytest.raises(DeviceLostError):
            _ = [packet async for packet in packets]


@in_loop
async def test_isochronous_out() -> None:
    device = LoopbackDevice(iso_period=0.0001)
    async with linked(device) as (_, guest):
        await guest.set_alt_setting(1, 1)
        assert await guest.start_iso_stream(ISO_OUT) == Status.SUCCESS
        for _ in range(200):
            assert await guest.iso_out(ISO_OUT, bytes(100)) == Status.SUCCESS
        await guest.get_configuration()
        while not device.counters["iso_packets"]:
            await asyncio.sleep(0)
        assert await guest.stop_iso_stream(ISO_OUT) == Status.SUCCESS


async def start_iso_and_pause(guest: aio.Guest, raw: RawHost) -> None:
    """A stream on endpoint 4, and a transport that takes nothing more for now."""
    raw.answer = lambda request: [IsoStreamStatus(id=request.id, endpoint=4)]
    await guest.start_iso_stream(4)
    raw.answer = lambda request: ()
    raw.deliver_to.pause_writing()


@in_loop
async def test_isochronous_out_does_not_wait_for_ever() -> None:
    """For room: the packet stays queued, and leaves as soon as the transport takes it."""
    async with prey() as (guest, raw):
        await start_iso_and_pause(guest, raw)
        before, most = len(raw.requests), blocking.ISO_PACKETS_AHEAD
        statuses = [await guest.iso_out(4, bytes([number]), timeout=MOMENT) for number in range(most + 2)]
        assert statuses == [Status.SUCCESS] * most + [Status.TIMEOUT] * 2
        raw.deliver_to.resume_writing()
        assert await guest.iso_out(4, b"last", timeout=PATIENCE) == Status.SUCCESS
        while len(raw.requests) < before + most + 3:
            await asyncio.sleep(0)
        sent = [packet.data for packet in raw.requests[before:] if isinstance(packet, IsoPacket)]
        assert sent == [*(bytes([number]) for number in range(most + 2)), b"last"]


# ================================================================ against a host that is only a parser


KINDS = {0x04: TransferType.ISO, 0x82: TransferType.BULK, 0x83: TransferType.INTERRUPT}
ENDPOINTS = EpInfo(type=tuple(KINDS.get(endpoint_address(index), TransferType.INVALID) for index in range(32)))


class RawHost(asyncio.Transport):
    """A transport at whose other end only a parser is: *answer* says what it sends for each packet.

    Attributes:
        reading: the guest lets the transport deliver.
        aborted: the guest did not wait for the rest to be written.
        stuck: closing takes for ever.
    """

    def __init__(self, guest: aio.Guest, word: Iterable[int] = range(8)) -> None:
        super().__init__()
        self.loop = asyncio.get_running_loop()
        self.end = End()
        self.parser = Parser(self.end, usb_host=True, capabilities=word)
        self.answer: Callable[[Any], Iterable[Packet]] = lambda packet: ()
        self.requests: list[Packet] = []
        self.reading = True
        self.stuck = False
        self.aborted = False
        self.protocol = guest.protocol()
        assert isinstance(self.protocol, asyncio.BufferedProtocol)
        self.deliver_to = self.protocol
        self.protocol.connection_made(self)
        self._serve()  # its hello: the capabilities are settled
        self.send(InterfaceInfo(interface_count=1), ENDPOINTS, DeviceConnect(vendor_id=0x1234))

    def write(self, data: Any) -> None:
        self.end.incoming += bytes(data)
        self.loop.call_soon(self._serve)

    def _serve(self) -> None:
        self.parser.do_read()
        received, self.end.received = self.end.received, []
        self.requests += received
        for request in received:
            self.send(*self.answer(request))

    def send(self, *packets: Packet) -> None:
        for packet in packets:
            self.parser.send(packet)
        self.parser.do_write()
        self.deliver()

    def deliver(self) -> None:
        while self.end.output and self.reading:
            buffer = memoryview(self.deliver_to.get_buffer(-1))
            piece = bytes(self.end.output[: len(buffer)])
            del self.end.output[: len(piece)]
            buffer[: len(piece)] = piece
            self.deliver_to.buffer_updated(len(piece))

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True
        self.loop.call_soon(self.deliver)

    def close(self) -> None:
        self.reading = False
        if not self.stuck:
            self.loop.call_soon(self.protocol.connection_lost, None)

    def abort(self) -> None:
        self.aborted = True
        self.loop.call_soon(self.protocol.connection_lost, None)


def make_prey(**options: Any) -> tuple[aio.Guest, RawHost]:
    guest = aio.Guest(**options)
    return guest, RawHost(guest)


@contextlib.asynccontextmanager
async def prey(**options: Any) -> AsyncIterator[tuple[aio.Guest, RawHost]]:
    """A guest of a raw host, which has announced a device."""
    guest, raw = make_prey(**options)
    async with guest:
        await guest.wait_for_device(PATIENCE)
        yield guest, raw


def reply_to(request: Any, **values: Any) -> Packet:
    """The plain answer to a data packet."""
    return request.replace(**{"status": 0, "data": b"", "length": 0, **values})  # type: ignore[no-any-return]


def started(endpoint: int) -> Callable[[Any], Iterable[Packet]]:
    return lambda request: [InterruptReceivingStatus(id=request.id, endpoint=endpoint)]


@in_loop
async def test_options_are_passed_on() -> None:
    rules = (FilterRule(8, -1, -1, -1, True),)
    messages: list[tuple[LogLevel, str]] = []
    async with prey(rules=rules, version="a guest", log=lambda *message: messages.append(message)) as (guest, raw):
        raw.send(FilterFilter(rules=rules * 2), BulkPacket(id=99, endpoint=0x81))
        assert guest.host_filter == rules * 2
        await asyncio.sleep(0)
        assert [type(packet).__name__ for packet in raw.requests] == ["Hello", "FilterFilter"]
        assert raw.requests[0].version == "a guest"  # type: ignore[attr-defined]
        assert any("nobody waits" in text for _, text in messages)


@pytest.mark.parametrize("late", [True, False])
@in_loop
async def test_answers_after_a_cancellation(late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The transfer's own, or none at all: the next call has its own answer, and nothing is left."""
    monkeypatch.setattr(_exchange, "CANCEL_GRACE", MOMENT)
    async with prey() as (guest, raw):
        task = asyncio.ensure_future(guest.bulk_in(0x81, 64))
        configuration = asyncio.ensure_future(guest.get_configuration())
        await asyncio.sleep(MOMENT)
        bulk, get = raw.requests[-2:]
        task.cancel()
        configuration.cancel()
        await asyncio.wait([task, configuration])
        if late:
            raw.send(reply_to(bulk, data=b"late", length=4), ConfigurationStatus(id=get.id, configuration=7))
        await guest._until(lambda: not guest._exchange.busy, PATIENCE)
        raw.answer = lambda request: [reply_to(request, data=b"fine", length=4)]
        assert (await guest.bulk_in(0x81, 64)).data == b"fine"


@in_loop
async def test_requests_that_are_never_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_exchange, "CANCEL_GRACE", MOMENT)
    async with prey() as (guest, _):
        assert await guest.bulk_in(0x81, 64, timeout=MOMENT) == TransferResult(Status.TIMEOUT)
        with pytest.raises(TimeoutError):
            await guest.get_configuration(timeout=MOMENT)
        with pytest.raises(TimeoutError):
            await guest.start_interrupt_receiving(0x83, timeout=MOMENT)
        assert not guest._exchange.busy
        assert not guest._exchange.streams


def cancelled(request: Packet) -> Iterable[Packet]:
    """What a host says when a bulk transfer is cancelled, nothing otherwise."""
    if isinstance(request, CancelDataPacket):
        yield BulkPacket(id=request.id, endpoint=0x82, status=Status.CANCELLED)


@in_loop
async def test_a_deadline_that_fails_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop is told what went wrong, and the next deadline is kept."""
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context))
    async with prey() as (guest, raw):
        raw.answer = cancelled
        expire = guest._exchange.expire

        def fail_once() -> None:
            monkeypatch.setattr(guest._exchange, "expire", expire)
            expire()
            raise ZeroDivisionError

        monkeypatch.setattr(guest._exchange, "expire", fail_once)
        first = guest.submit(requests.bulk_in(0x82, 64, timeout=MOMENT))
        second = guest.submit(requests.bulk_in(0x82, 64, timeout=2 * MOMENT))
        for future in (first, second):
            assert (await asyncio.wait_for(future, PATIENCE)).status == Status.TIMEOUT
    assert [type(complaint["exception"]) for complaint in complaints] == [ZeroDivisionError]


@pytest.mark.parametrize("end", ["eof", "lost", "reset", "garbage", "closed"])
@in_loop
async def test_every_call_ends_with_the_connection(end: str) -> None:
    """With what ended it, and so do later ones."""
    expected: dict[str, type[Exception]] = {
        "eof": ConnectionClosed,
        "lost": ConnectionClosed,
        "reset": ConnectionResetError,
        "garbage": RemoteProtocolError,
        "closed": ConnectionClosed,
    }
    async with prey() as (guest, raw):
        raw.answer = started(0x83)
        await guest.start_interrupt_receiving(0x83)
        raw.answer = lambda request: ()
        waiting: list[asyncio.Future[Any]] = [
            asyncio.ensure_future(call)
            for call in (
                guest.bulk_in(0x81, 64, timeout=PATIENCE),
                guest.get_configuration(),
                guest.receive(0x83),
                guest.wait_for_disconnect(PATIENCE),
                guest.call(requests.bulk_in(0x81, 8)),
            )
        ]
        waiting.append(guest.submit(requests.bulk_in(0x81, 8)))
        await asyncio.sleep(MOMENT)
        if end == "eof":
            raw.deliver_to.eof_received()
        elif end == "garbage":
            raw.end.output += raw_packet(99, b"junk")
            raw.deliver()
        elif end == "closed":
            guest.close()
        else:
            raw.protocol.connection_lost(ConnectionResetError() if end == "reset" else None)
        await asyncio.wait(waiting, timeout=PATIENCE)
        for task in waiting:
            assert isinstance(task.exception(), expected[end])
        with pytest.raises(expected[end]):
            await guest.bulk_in(0x81, 64)
        with pytest.raises(expected[end]):
            await guest.wait_for_device()


@in_loop
async def test_closing() -> None:
    """Twice, before there is a connection, and with a transport that cannot get rid of its data."""
    guest = aio.Guest()
    guest.close()
    await guest.wait_closed()
    transport = RawHost(guest)
    assert transport.aborted
    with pytest.raises(ConnectionClosed):
        await guest.wait_for_device()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_aio_stream, "CLOSE_PATIENCE", MOMENT)
        async with prey() as (guest, raw):
            raw.stuck = True
            guest.close()
            guest.close()
        assert raw.aborted
        async with prey() as (guest, raw):
            pass
        await asyncio.sleep(2 * MOMENT)
        assert not raw.aborted


@in_loop
async def test_the_host_ends_a_stream() -> None:
    """Its status is the last of the iteration, after all data."""
    async with prey() as (guest, raw):
        raw.answer = started(0x83)
        packets = guest.interrupts(0x83)
        first = asyncio.ensure_future(packets.__anext__())
        await asyncio.sleep(MOMENT)
        raw.answer = lambda request: ()
        data = [InterruptPacket(endpoint=0x83, data=bytes([number])) for number in range(3)]
        raw.send(*data, InterruptReceivingStatus(endpoint=0x83, status=Status.STALL))
        results = [await first, *[result async for result in packets]]
        assert [result.data for result in results] == [b"\0", b"\1", b"\2", b""]
        assert [result.status for result in results] == [0, 0, 0, Status.STALL]


# ---------------------------------------------------------------- back-pressure


@in_loop
async def test_data_that_nobody_takes_stays_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """The transport is paused, and goes on when data is taken, or a request waits; nothing is lost."""
    monkeypatch.setattr(aio, "HIGH_BACKLOG", 10_000)
    async with prey() as (guest, raw):
        raw.answer = started(0x83)
        await guest.start_interrupt_receiving(0x83)
        raw.answer = lambda request: [ConfigurationStatus(id=request.id, configuration=1)]
        count = 5000
        raw.send(*[InterruptPacket(endpoint=0x83, data=struct.pack("<Q", number)) for number in range(count)])
        for _ in range(10):
            await asyncio.sleep(0)
        assert not raw.reading
        assert raw.end.output
        assert guest._exchange.backlog < 10_000 + 2 * _aio_stream.READ_SIZE * 8
        numbers: list[int] = []
        while guest._exchange.backlog > 10_000:
            numbers += struct.unpack("<Q", (await guest.receive(0x83)).data)
        for _ in range(10):
            await asyncio.sleep(0)
        assert guest._exchange.backlog > 10_000  # more came in
        assert not raw.reading
        assert await guest.get_configuration() == (0, 1)
        while len(numbers) < count:
            numbers += struct.unpack("<Q", (await guest.receive(0x83)).data)
        assert numbers == list(range(count))
        for _ in range(10):
            await asyncio.sleep(0)
        assert raw.reading
        assert guest._exchange.backlog == 0


@in_loop
async def test_another_stream_is_read_over_a_backlog(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits for one endpoint is not kept waiting by what nobody takes of another."""
    monkeypatch.setattr(aio, "HIGH_BACKLOG", 1000)
    async with prey() as (guest, raw):
        raw.answer = started(0x83)
        await guest.start_interrupt_receiving(0x83)
        raw.answer = lambda request: [BulkReceivingStatus(id=request.id, endpoint=0x82)]
        await guest.start_bulk_receiving(0x82, 512)
        raw.send(*[InterruptPacket(endpoint=0x83, data=bytes(100))] * 2000)
        raw.send(BufferedBulkPacket(endpoint=0x82, data=b"here"))
        assert (await guest.receive(0x82, timeout=PATIENCE)).data == b"here"


@in_loop
async def test_what_comes_in_spite_of_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with TLS. More pieces than are read at once: the rest follows by itself."""
    monkeypatch.setattr(aio, "HIGH_BACKLOG", 1000)
    async with prey() as (guest, raw):
        raw.answer = started(0x83)
        await guest.start_interrupt_receiving(0x83)
        raw.answer = lambda request: ()
        raw.send(*[InterruptPacket(endpoint=0x83, data=bytes(1000))] * 2)
        for number in range(100):
            raw.reading = True
            raw.send(InterruptPacket(endpoint=0x83, data=bytes([number])))
        assert guest._exchange.packets_received < 20
        asking = asyncio.ensure_future(guest.get_configuration())
        await asyncio.sleep(MOMENT)
        raw.reading = True
        raw.send(ConfigurationStatus(id=raw.requests[-1].id, configuration=3))
        assert await asyncio.wait_for(asking, PATIENCE) == (0, 3)


@in_loop
async def test_a_flood_does_not_keep_others_from_running() -> None:
    """A host that sends whenever it may: other tasks have their turn, and once nobody waits nothing more is read."""
    async with prey() as (guest, raw):
        raw.answer = started(0x83)
        await guest.start_interrupt_receiving(0x83)
        raw.answer = lambda request: [reply_to(request)]
        flooding = True

        def flood() -> None:
            if flooding:
                raw.send(*[InterruptPacket(endpoint=0x83, data=bytes(64))] * 1000)
                raw.loop.call_soon(flood)

        flood()
        for _ in range(20):
            assert (await guest.receive(0x83)).status == Status.SUCCESS
            assert (await guest.bulk_out(1, b"x", timeout=PATIENCE)).status == Status.SUCCESS
        while raw.reading:
            await asyncio.sleep(0)
        before = guest._exchange.backlog
        for _ in range(20):
            await asyncio.sleep(0)
        assert guest._exchange.backlog == before <= _exchange.MAX_BACKLOG
        flooding = False


@in_loop
async def test_what_the_transport_does_not_take_waits() -> None:
    """In order, until it wants more; iso_out waits for that."""
    async with prey() as (guest, raw):
        await start_iso_and_pause(guest, raw)
        sending = asyncio.ensure_future(send_packets(guest, 200))
        await asyncio.sleep(MOMENT)
        assert not sending.done()
        assert guest._exchange.has_output() <= blocking.ISO_PACKETS_AHEAD + 1
        before = len(raw.requests)
        raw.deliver_to.resume_writing()
        await sending
        await asyncio.sleep(MOMENT)
        sent = raw.requests[before:]
        assert [packet.data for packet in sent if isinstance(packet, IsoPacket)] == [bytes([n]) for n in range(200)]


async def send_packets(guest: aio.Guest, count: int) -> None:
    for number in range(count):
        await guest.iso_out(4, bytes([number]))


@in_loop
async def test_a_host_that_floods_and_does_not_read() -> None:
    """Each disconnection wants to be confirmed: the guest stops reading, and goes on when it can write."""
    async with prey() as (guest, raw):
        raw.deliver_to.pause_writing()
        raw.send(*[DeviceDisconnect()] * 30_000, DeviceConnect(vendor_id=7))
        for _ in range(20):
            await asyncio.sleep(0)
        assert guest._exchange.has_output() <= _exchange.MAX_WAITING + _aio_stream.READ_SIZE // 16
        assert guest.device is None
        waiting = asyncio.ensure_future(guest.wait_for_device(PATIENCE))
        for _ in range(20):
            await asyncio.sleep(0)
        assert not waiting.done()
        raw.deliver_to.resume_writing()
        assert (await waiting).vendor_id == 7


# ---------------------------------------------------------------- hosts that break the protocol


UNASKED: list[Packet] = [
    BulkPacket(id=77, endpoint=0x81, data=b"x", length=1),
    ControlPacket(id=77, endpoint=0x80),
    InterruptPacket(id=77, endpoint=0x83, data=b"x"),
    InterruptReceivingStatus(id=77, endpoint=0x83),
    ConfigurationStatus(id=77),
    BufferedBulkPacket(endpoint=0x82, data=b"x"),
]


@in_loop
async def test_unasked_and_repeated_answers() -> None:
    async with prey() as (guest, raw):
        raw.send(*UNASKED)
        raw.answer = lambda request: [ConfigurationStatus(id=request.id), *[reply_to(request, data=b"y", length=1)] * 3]
        for _ in range(3):
            assert (await guest.bulk_in(0x81, 64, timeout=PATIENCE)).data == b"y"
        assert not guest._exchange.streams


@in_loop
async def test_a_length_that_is_not_kept() -> None:
    """Announced, never sent: nothing is allocated for it, and time ends the call."""
    async with prey() as (guest, raw):
        header = raw_packet(101, bytes(10))
        raw.end.output += header[:4] + (100_000_000).to_bytes(4, "little") + header[8:]
        raw.deliver()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_exchange, "CANCEL_GRACE", MOMENT)
            assert (await guest.bulk_in(0x81, 64, timeout=MOMENT)).status == Status.TIMEOUT


@given(st.lists(st.binary(max_size=200), max_size=8))
def test_any_bytes(pieces: list[bytes]) -> None:
    """Either the connection ends with an error that every call raises, or the guest goes on."""

    async def feed() -> None:
        guest, raw = make_prey()
        async with guest:
            for piece in pieces:
                raw.end.output += piece
                raw.deliver()
            if guest._exchange.error is None:
                assert not guest._stream.readable
            else:
                assert isinstance(guest._exchange.error, RemoteProtocolError)
                with pytest.raises(RemoteProtocolError):
                    await guest.wait_for_device()

    asyncio.run(feed())


# ================================================================ connecting and serving


@in_loop
async def test_connecting_fails() -> None:
    for wrong in ("nonsense", "::1:4000", "host:99999"):
        with pytest.raises(ValueError, match=r"address|brackets"):
            aio.connect(wrong)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens
        with pytest.raises(OSError):  # noqa: PT011 - which one depends on the system
            await aio.connect(f"127.0.0.1:{taken.getsockname()[1]}")
    with pytest.raises(OSError, match="host name"):
        await aio.connect("a" * 70 + ":4000")


@in_loop
async def test_connecting_takes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    async def attach(*arguments: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(aio, "_attach", attach)
    with pytest.raises(TimeoutError, match=r"0\.02 seconds"):
        await aio.connect("127.0.0.1:1", timeout=MOMENT)


@pytest.mark.parametrize("address", ["127.0.0.1:0", "localhost:0", "[::1]:0", "unix:guest.sock"])
@in_loop
async def test_serving(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One guest after the other, each with a device of its own; awaited or entered."""
    monkeypatch.chdir(tmp_path)
    made: list[LoopbackDevice] = []
    ends: list[Exception | None] = []

    def make() -> LoopbackDevice:
        made.append(LoopbackDevice())
        return made[-1]

    try:
        server = await aio.serve(make, address, on_end=ends.append)
    except OSError:
        assert address.startswith("[")  # a machine without IPv6
        return
    async with server:
        for number in range(3):
            async with aio.connect(str(server.address)) as guest:
                await guest.wait_for_device(PATIENCE)
                assert (await guest.bulk_in(SOURCE, 8)).data == bytes(8)
            while len(ends) <= number:
                await asyncio.sleep(0)
        guest = await aio.connect(str(server.address))
        await guest.wait_for_device(PATIENCE)
        guest.close()
        await guest.wait_closed()
    assert ends == [None] * 4
    assert len(made) == 4
    assert all(device.pollfds() == [] for device in made)  # closed
    assert not list(tmp_path.iterdir())


@in_loop
async def test_only_one_guest_at_a_time() -> None:
    """Others are turned away, the present one stays; one that comes right after it has left is served."""
    messages: list[str] = []
    device = LoopbackDevice()
    async with await aio.serve(device, "127.0.0.1:0", log=lambda level, text: messages.append(text)) as server:
        address = str(server.address)
        for _ in range(20):
            async with aio.connect(address) as first:
                await first.wait_for_device(PATIENCE)
                assert (await first.bulk_in(SOURCE, 8)).status == Status.SUCCESS
        async with aio.connect(address) as first:
            await first.wait_for_device(PATIENCE)
            with pytest.raises((ConnectionClosed, OSError)):
                async with aio.connect(address) as second:
                    await second.wait_for_device(PATIENCE)
            assert (await first.bulk_in(SOURCE, 8)).status == Status.SUCCESS
    assert sum("turned away" in message for message in messages) == 1
    device.close()


@in_loop
async def test_closing_a_server_ends_its_guest() -> None:
    server = await aio.serve(LoopbackDevice, "127.0.0.1:0")
    serving = asyncio.ensure_future(server.serve_forever())
    async with aio.connect(str(server.address)) as guest:
        await guest.wait_for_device(PATIENCE)
        waiting = guest.submit(requests.bulk_in(SILENT, 64))
        serving.cancel()
        with pytest.raises((ConnectionClosed, OSError)):
            await waiting
        await server.wait_closed()
        assert server.session is not None
        assert server.session.ended
    server.close()
    await server.serve_forever()  # returns, as it is closed


class Busy(LoopbackDevice):
    """Another program has it."""

    def claim(self) -> None:
        raise DeviceClaimError("in use")


class Broken(LoopbackDevice):
    """A device with a mistake."""

    def close(self) -> None:
        super().close()
        raise RuntimeError("cannot end")

    def data_in(self, endpoint: int, length: int) -> Any:
        raise RuntimeError("a mistake")


async def use(address: str) -> None:
    async with aio.connect(address) as guest:
        await guest.wait_for_device(PATIENCE)
        await guest.bulk_in(SOURCE, 8)


@pytest.mark.parametrize(("kind", "error"), [(Busy, DeviceClaimError), (Broken, RuntimeError)])
@in_loop
async def test_what_ends_a_session_is_told(
    kind: type[LoopbackDevice], error: type[Exception], caplog: pytest.LogCaptureFixture
) -> None:
    """To on_end, or else to the log; the server goes on. The device's mistakes are no exception."""
    ends: list[Exception | None] = []
    for on_end in (ends.append, None):
        async with await aio.serve(kind, "127.0.0.1:0", on_end=on_end) as server:
            for _ in range(2):
                with pytest.raises((ConnectionClosed, OSError)):
                    await use(str(server.address))
    assert [type(end) for end in ends] == [error, error]
    assert sum("session has ended" in record.message for record in caplog.records) == 2


class NotReleased(LoopbackDevice):
    """A device whose hook fails when it is released."""

    leaving = False

    def began(self) -> None:
        if self.leaving:
            raise RuntimeError("cannot be released")
        super().began()


@in_loop
async def test_what_was_made_is_closed_whatever_else_fails() -> None:
    """Also when the host cannot release it, or cannot write."""
    made: list[NotReleased] = []
    ends: list[Exception | None] = []

    def make() -> NotReleased:
        made.append(NotReleased())
        return made[-1]

    async with await aio.serve(make, "127.0.0.1:0", on_end=ends.append) as server:
        for _ in range(2):
            async with aio.connect(str(server.address)) as guest:
                await guest.wait_for_device(PATIENCE)
                made[-1].leaving = True
            while len(ends) < len(made):
                await asyncio.sleep(0)
    assert [str(end) for end in ends] == ["cannot be released"] * 2
    assert [device.pollfds() for device in made] == [[], []]  # closed


@in_loop
async def test_a_device_is_released_also_when_nothing_can_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    released: list[bool] = []
    device = LoopbackDevice()

    def fail() -> None:
        raise RuntimeError("cannot write")

    async with linked(device) as (session, _):
        monkeypatch.setattr(session.host, "write_guest_data", fail)
        monkeypatch.setattr(device, "release", lambda *arguments, **options: released.append(True))
        session.close()
        assert released == [True]
        assert str(session.error) == "cannot write"


@in_loop
async def test_tcp_is_kept_alive() -> None:
    """At both ends: a guest that has vanished must not occupy a server for ever."""
    async with await aio.serve(LoopbackDevice, "127.0.0.1:0") as server, aio.connect(str(server.address)) as guest:
        await guest.wait_for_device(PATIENCE)
        assert server.session is not None
        for stream in (server.session._stream, guest._stream):
            assert stream._transport is not None
            sock = stream._transport.get_extra_info("socket")
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


@in_loop
async def test_a_guest_that_breaks_the_protocol() -> None:
    ends: list[Exception | None] = []
    async with await aio.serve(LoopbackDevice, "127.0.0.1:0", on_end=ends.append) as server:
        reader, writer = await asyncio.open_connection(server.address.host, server.address.port)
        writer.write(raw_packet(99, b"junk", wide=False))
        with contextlib.suppress(ConnectionResetError):
            while await reader.read(4096):
                pass
        writer.close()
        with contextlib.suppress(ConnectionResetError):
            await writer.wait_closed()
        assert [type(end) for end in ends] == [RemoteProtocolError]
        await use(str(server.address))


@in_loop
async def test_a_guest_that_does_not_read() -> None:
    """No more of its requests are read, and its end is noticed all the same."""
    async with await aio.serve(LoopbackDevice, "127.0.0.1:0") as server:
        with await asyncio.get_running_loop().run_in_executor(None, transport.connect, str(server.address)) as plain:
            parser = Parser(End())
            parser.do_write()
            for number in range(40):
                parser.send(BulkPacket(id=number, endpoint=SOURCE, length=4_000_000))
            parser.do_write()
            end = parser._callbacks
            assert isinstance(end, End)
            data = end.take_output()
            while data:
                data = data[plain.write(memoryview(data)) or 0 :]
                await asyncio.sleep(0)
            while server.session is None or not server.session.host.has_data_to_write():
                await asyncio.sleep(0)
            session = server.session
        await asyncio.wait_for(session.wait_closed(), PATIENCE)
        assert session.ended


ANSWER = 14
"""Bytes of a ConfigurationStatus without capabilities."""


class RawGuest(asyncio.Transport):
    """A transport at whose other end nobody reads, but *requests* come."""

    def __init__(self, protocol: asyncio.BaseProtocol) -> None:
        super().__init__()
        self.reading = True
        self.written = 0
        assert isinstance(protocol, asyncio.BufferedProtocol)
        self.protocol = protocol
        self.end = End()
        self.parser = Parser(self.end, capabilities=())
        protocol.connection_made(self)
        self.request()

    def request(self, count: int = 0) -> None:
        for _ in range(count):
            self.parser.send(GetConfiguration(id=1))
        self.parser.do_write()
        piece = self.end.take_output()
        memoryview(self.protocol.get_buffer(-1))[: len(piece)] = piece
        self.protocol.buffer_updated(len(piece))

    def write(self, data: Any) -> None:
        self.written += len(data)

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def close(self) -> None:
        asyncio.get_running_loop().call_soon(self.protocol.connection_lost, None)

    abort = close


@pytest.mark.parametrize("leaves", [False, True])
@in_loop
async def test_requests_wait_while_answers_do(leaves: bool) -> None:
    """Then they are read on, or the session ends with the connection, though the last of them were not read."""
    device = LoopbackDevice()
    session = aio.Session(device, limits=Limits(max_queued_packets=10))
    raw = RawGuest(session.protocol())
    (descriptor, _), *_ = device.pollfds()
    raw.protocol.pause_writing()
    for _ in range(3):
        raw.request(20)
    assert session.host.has_data_to_write() == 20
    assert not raw.reading
    written = raw.written
    if leaves:
        raw.protocol.connection_lost(None)
    else:
        raw.protocol.resume_writing()
        while raw.written - written < 60 * ANSWER:
            await asyncio.sleep(0)
        assert raw.written - written == 60 * ANSWER
        assert raw.reading
        session.close()
    await session.wait_closed()
    assert session.ended
    assert not asyncio.get_running_loop().remove_reader(descriptor)
    device.close()


class Restless(LoopbackDevice):
    """Its descriptors change, and one is polled for writing."""

    def __init__(self) -> None:
        super().__init__()
        self.ends = socket.socketpair()
        self.handled = 0

    def pollfds(self) -> Sequence[tuple[int, int]]:
        mine = super().pollfds()
        if not mine:
            return mine
        extra = (self.ends[self.handled % 2].fileno(), transport.POLLIN)
        writing = (self.ends[0].fileno(), transport.POLLOUT)  # always ready
        return [*mine, extra, writing] if self.handled < 20 else [*mine, extra]

    def handle_events(self, timeout: float | None = 0.0) -> None:
        self.handled += 1
        super().handle_events(timeout)

    def close(self) -> None:
        super().close()
        for end in self.ends:
            end.close()


@in_loop
async def test_a_device_with_other_descriptors_every_time() -> None:
    device = Restless()
    async with linked(device) as (_, guest):
        while device.handled < 20:
            await asyncio.sleep(0)
        for _ in range(10):
            assert (await guest.bulk_in(SOURCE, 8)).status == Status.SUCCESS
        before = device.handled
        end = 1 - device.handled % 2
        device.ends[end].send(b"x")  # the other one is being waited for
        while device.handled == before:
            await asyncio.sleep(0)


# ---------------------------------------------------------------- TLS


CERTIFICATE = """\
-----BEGIN CERTIFICATE-----
MIIBmjCCAUGgAwIBAgIUQR/UycmLcF9wN/WWo6wIMV3dVzMwCgYIKoZIzj0EAwIw
FDESMBAGA1UEAwwJbG9jYWxob3N0MCAXDTI2MTEyMzA0NDIyNVoYDzIxMjYxMDMw
MDQ0MjI1WjAUMRIwEAYDVQQDDAlsb2NhbGhvc3QwWTATBgcqhkjOPQIBBggqhkjO
PQMBBwNCAARUPEI0RL0MsRpwmYBz9bwArZN3YPr+GjbOkqX3LtC1xYSont9MnQNp
wu/PdQnI9zItrwOoVFDkA7pNO0au8Ziwo28wbTAdBgNVHQ4EFgQUKivW3UbJ+DmK
HDSh87ZRyH2CkuswHwYDVR0jBBgwFoAUKivW3UbJ+DmKHDSh87ZRyH2CkuswDwYD
VR0TAQH/BAUwAwEB/zAaBgNVHREEEzARgglsb2NhbGhvc3SHBH8AAAEwCgYIKoZI
zj0EAwIDRwAwRAIgTYpRr+2Ou9vA4VfRo+5FoXEJRIRtmWsfT8N038BvGYwCICbf
mXcfD0zOeFP/oDVrxGHPmPuqdI5ETk+/sP1EQxPM
-----END CERTIFICATE-----
"""
KEY = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQg2YI+8r4/XT0rlY6G
ijjxxfVYJLPaD7wUv2yBbygRN++hRANCAARUPEI0RL0MsRpwmYBz9bwArZN3YPr+
GjbOkqX3LtC1xYSont9MnQNpwu/PdQnI9zItrwOoVFDkA7pNO0au8Ziw
-----END PRIVATE KEY-----
"""
"""For localhost, made for this test, until 2126."""


@in_loop
async def test_tls(tmp_path: Path) -> None:
    """Both protocols on transports of asyncio's own making."""
    pem = tmp_path / "both.pem"
    pem.write_text(CERTIFICATE + KEY)
    ours, theirs = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    ours.load_cert_chain(pem)
    theirs.load_verify_locations(pem)
    loop = asyncio.get_running_loop()
    device = LoopbackDevice()
    session = aio.Session(device)
    server = await loop.create_server(session.protocol, "127.0.0.1", 0, ssl=ours)
    port = server.sockets[0].getsockname()[1]
    guest = aio.Guest()
    await loop.create_connection(guest.protocol, "127.0.0.1", port, ssl=theirs, server_hostname="localhost")
    async with guest:
        await guest.wait_for_device(PATIENCE)
        size = 500_000
        await guest.bulk_out(LOOP_OUT, bytes(size))
        assert len((await guest.bulk_in(LOOP_IN, size)).data) == size
        assert len([await guest.bulk_in(SOURCE, 512) for _ in range(20)]) == 20
    await session.wait_closed()
    assert session.error is None
    server.close()
    device.close()


# ---------------------------------------------------------------- nothing is left


@in_loop
async def test_connections_leave_nothing_behind() -> None:
    """No descriptor, task or object of many connections, some of which end in the middle of things."""
    left: list[weakref.ref[Any]] = []
    async with await aio.serve(LoopbackDevice, "127.0.0.1:0", on_end=lambda error: None) as server:

        async def cycle(number: int) -> None:
            async with aio.connect(str(server.address)) as guest:
                await guest.wait_for_device(PATIENCE)
                left.append(weakref.ref(guest))
                left.append(weakref.ref(server.session))
                if number % 3 == 1:
                    guest.submit(requests.bulk_in(SILENT, 64, timeout=PATIENCE)).add_done_callback(
                        lambda future: future.exception()
                    )
                elif number % 3 == 2:
                    async for _ in guest.interrupts(INTERRUPT_IN):
                        break

        await cycle(0)
        before = len(os.listdir("/dev/fd")) if sys.platform != "win32" else 0
        for number in range(CYCLES):
            await cycle(number)
        session = server.session
        assert session is not None
        await session.wait_closed()
        await asyncio.sleep(0)
        if sys.platform != "win32":
            assert len(os.listdir("/dev/fd")) <= before
        del session
        gc.collect()
        assert sum(ref() is not None for ref in left) <= 1  # the server's latest session
