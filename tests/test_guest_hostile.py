"""Guests of hosts that mean harm: any packets in any order, lying lengths, repeated ids, streams without end.

Whatever comes, a guest raises what is documented and nothing else, each request ends exactly once, and what the guest
holds stays bounded.
"""

from __future__ import annotations

import contextlib
import gc
import socket
import threading
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from usbredir import _exchange, requests
from usbredir import guest as guest_module
from usbredir._layout import header_struct
from usbredir.capabilities import ALL, mask_of
from usbredir.errors import ConnectionClosed, DeviceLostError, LocalProtocolError, RemoteProtocolError
from usbredir.guest import Guest, GuestCallbacks
from usbredir.packets import (
    BufferedBulkPacket,
    BulkPacket,
    ConfigurationStatus,
    DeviceConnect,
    DeviceDisconnect,
    InterruptPacket,
    InterruptReceivingStatus,
    IsoPacket,
    IsoStreamStatus,
    Packet,
)
from usbredir.parser import LogLevel, Parser
from usbredir.proto import Direction, PacketType, Status
from usbredir.transport import Connection, GuestConnection

from .strategies import End, packets, raw_packet

PATIENCE = 60.0
"""Seconds after which something counts as stuck."""
MOMENT = 0.02
"""Seconds to wait for what does not come."""
BACKLOG = 20_000
"""What streams may hold here, in bytes."""
DOCUMENTED = (ConnectionClosed, DeviceLostError, LocalProtocolError, RemoteProtocolError, TimeoutError)
"""What calls may raise, see docs/guest.md."""
STREAMS = (0x82, 0x83, 0x04)
ENDPOINTS = (0x01, 0x02, 0x03, 0x04, 0x81, 0x82, 0x83, 0x84)


class Clock:
    """Stands in for the module ``time``: passes only when somebody waits."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


class Hostile(GuestCallbacks):
    """A host that sends what it is told, whatever it is asked. When it has nothing to send, time passes.

    A call that would wait for ever ends, as the host then closes the connection.
    """

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.end = End()
        self.parser = Parser(self.end, usb_host=True)
        self.closed = False

    def log(self, level: LogLevel, message: str) -> None:
        pass

    def read(self, count: int) -> bytes | None:
        self.parser.do_write()
        piece = bytes(self.end.output[:count])
        del self.end.output[:count]
        return piece or (b"" if self.closed else None)

    def write(self, data: memoryview) -> int:
        if not self.parser.have_peer_capabilities():
            self.end.incoming += data  # hello; what follows is of no interest
        return len(data)

    def wait(self, timeout: float | None, *, writing: bool) -> None:
        if not (self.parser.has_data_to_write() or self.end.output):
            if timeout is None:
                self.closed = True
            else:
                self.clock.now += timeout + 0.001

    def send(self, *told: Packet | bytes) -> None:
        for packet in told:
            if isinstance(packet, bytes):
                self.parser.do_write()
                self.end.output += packet
            else:
                self.parser.send(packet)


class Quiet(GuestConnection):
    """Nothing is logged: there would be much."""

    def log(self, level: LogLevel, message: str) -> None:
        pass


@contextlib.contextmanager
def hostile_host() -> Iterator[tuple[Guest, Hostile]]:
    """A guest that has a device, as far as it knows; time is the host's."""
    with pytest.MonkeyPatch.context() as patch:
        clock = Clock()
        patch.setattr(guest_module, "time", clock)
        patch.setattr(_exchange, "time", clock)
        patch.setattr(_exchange, "MAX_BACKLOG", BACKLOG)
        host = Hostile(clock)
        with Guest(host) as guest:
            guest.process()
            host.parser.do_read()
            host.send(DeviceConnect(vendor_id=1))
            guest.wait_for_device()
            yield guest, host


# ================================================================ any packets, any calls

ids = st.one_of(st.integers(0, 12), st.sampled_from([2**32 - 1]))
any_packet = packets(Direction.HOST_TO_GUEST, mask_of(ALL), mask_of(ALL)).flatmap(
    lambda packet: st.builds(lambda number: with_id(packet, number), ids)
)


def with_id(packet: Packet, number: int) -> Packet:
    return packet.replace(id=number) if packet.declaration.carries_id else packet


bad_bytes = st.one_of(
    st.binary(min_size=1, max_size=40),
    st.builds(
        lambda kind, length, body: header_struct(True).pack(kind, length, 1) + body,
        st.sampled_from([int(kind) for kind in PacketType]),
        st.sampled_from([0, 1, 10, 1 << 20, 0x7FFFFFFF, 0xFFFFFFFF]),
        st.binary(max_size=30),
    ),
    st.builds(raw_packet, st.integers(0, 300), st.binary(max_size=30), ids),
)
timeouts = st.sampled_from([0.0, 1.0, None])
endpoints = st.sampled_from(ENDPOINTS)
inputs = st.sampled_from([endpoint for endpoint in ENDPOINTS if endpoint & 0x80])


def made(make: Callable[..., requests.Request[Any]], *arguments: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.builds(lambda timeout, *values: make(*values, timeout=timeout), timeouts, *arguments)


any_request = st.one_of(
    made(requests.get_configuration),
    made(requests.set_alt_setting, st.just(1), st.just(1)),
    made(requests.bulk_in, st.just(0x81), st.just(64)),
    made(requests.bulk_out, st.just(0x01), st.just(b"data")),
    made(requests.control_in, st.just(0xC0), st.just(1), st.just(0), st.just(0), st.just(8)),
    made(requests.interrupt_out, st.just(0x03), st.just(b"data")),
    made(requests.start_interrupt_receiving, inputs),
    made(requests.stop_interrupt_receiving, inputs),
    made(requests.start_bulk_receiving, inputs, st.just(512)),
    made(requests.start_iso_stream, endpoints),
    made(requests.stop_iso_stream, endpoints),
    made(requests.alloc_streams, st.just([0x81]), st.just(4)),
)
data_packets = st.builds(
    lambda cls, endpoint, number, size: cls(endpoint=endpoint, id=number, data=bytes(size)),
    st.sampled_from([BufferedBulkPacket, InterruptPacket, IsoPacket]),
    inputs,
    ids,
    st.sampled_from([0, 1, 8000]),
)
actions = st.one_of(
    st.tuples(st.just("send"), st.one_of(any_packet, data_packets)),
    st.tuples(st.just("send"), st.one_of(any_packet, data_packets, st.builds(DeviceConnect), bad_bytes)),
    st.tuples(st.just("submit"), any_request),
    st.tuples(st.just("call"), any_request),
    st.tuples(st.just("cancel"), st.integers(0, 10)),
    st.tuples(st.just("receive"), inputs),
    st.tuples(st.just("iso_out"), st.just(0x04)),
    st.tuples(st.just("process"), st.none()),
)


class Subject:
    """A guest under attack, and its futures."""

    def __init__(self, guest: Guest, host: Hostile) -> None:
        self.guest = guest
        self.host = host
        self.futures: list[Future[Any]] = []
        self.ended: Counter[int] = Counter()

    def perform(self, action: str, value: Any) -> None:
        guest = self.guest
        match action:
            case "send":
                self.host.send(value)
            case "submit":
                future = guest.submit(value)
                self.futures.append(future)
                future.add_done_callback(lambda future: self.ended.update([id(future)]))
            case "call":
                guest.call(value)
            case "cancel" if value < len(self.futures):
                self.futures[value].cancel()
            case "receive":
                guest.receive(value, timeout=0.5)
            case "iso_out":
                guest.iso_out(value, b"data")
            case "process":
                guest.process()

    def check(self) -> None:
        """What is held is bounded, and accounted for."""
        exchange = self.guest._exchange
        held = sum(
            len(packet.data) + _exchange.PACKET_COST
            for stream in exchange.streams.values()
            for packet in stream.waiting
        )
        assert held == exchange.backlog <= BACKLOG
        assert set(exchange.streams) <= set(ENDPOINTS)
        assert not [pending for pending in exchange._pending.values() if pending.done]

    def end(self) -> None:
        """The connection ends, and with it everything that waits."""
        self.host.closed = True
        with contextlib.suppress(*DOCUMENTED):
            while True:
                self.guest.process()
        assert all(future.done() for future in self.futures)
        assert all(self.ended[id(future)] == 1 for future in self.futures)
        for future in self.futures:
            error = future.exception(0)
            assert error is None or isinstance(error, DOCUMENTED)
        assert not self.guest._exchange.busy


@given(st.lists(actions, max_size=40), st.booleans())
def test_any_packets_and_any_calls(script: list[tuple[str, Any]], with_streams: bool) -> None:
    """No exception but the documented ones; each request ends once; memory is bounded."""
    with hostile_host() as (guest, host):
        subject = Subject(guest, host)
        for number, endpoint in enumerate(STREAMS if with_streams else (), 1):
            host.send(IsoStreamStatus(id=number, endpoint=endpoint))
            assert guest.start_iso_stream(endpoint) == Status.SUCCESS
        for action, value in script:
            with contextlib.suppress(*DOCUMENTED):
                subject.perform(action, value)
            subject.check()
        subject.end()


@given(st.lists(st.one_of(any_packet, data_packets, bad_bytes), max_size=30), st.booleans())
def test_any_packets_to_a_background_guest(script: list[Packet | bytes], cut: bool) -> None:
    """Over a socket: every future ends when the host has gone, and so does the thread."""
    end = End()
    parser = Parser(end, usb_host=True)
    ours, theirs = socket.socketpair()
    theirs.settimeout(PATIENCE)
    with theirs, Connection(ours, "host") as connection, Guest(Quiet(connection), background=True) as guest:
        end.incoming = theirs.recv(4096)
        parser.do_read()
        parser.send(DeviceConnect())
        parser.do_write()
        theirs.sendall(end.output)
        guest.wait_for_device(PATIENCE)
        futures: list[Future[Any]] = [
            guest.submit(requests.bulk_in(0x81, 64)),
            guest.submit(requests.get_configuration()),
            guest.submit(requests.start_interrupt_receiving(0x83)),
            guest.submit(requests.bulk_in(0x82, 64, timeout=PATIENCE)),
        ]
        with contextlib.suppress(OSError):
            for packet in script:
                end.output.clear()
                if isinstance(packet, bytes):
                    end.output += packet
                else:
                    parser.send(packet)
                    parser.do_write()
                theirs.sendall(end.output)
            theirs.shutdown(socket.SHUT_RDWR if cut else socket.SHUT_WR)
        for future in futures:
            error = future.exception(PATIENCE)
            assert error is None or isinstance(error, (*DOCUMENTED, OSError))
        assert guest._thread is not None
        guest._thread.join(PATIENCE)
        assert not guest._thread.is_alive()


# ================================================================ memory


FLOODS: dict[str, list[Packet | bytes]] = {
    "unasked answers": [ConfigurationStatus(id=1 << 20), BulkPacket(id=7, endpoint=0x81, data=bytes(1000))],
    "one answer again and again": [ConfigurationStatus(id=1)],
    "statuses of streams never started": [InterruptReceivingStatus(endpoint=0x83, status=Status.STALL)],
    "data of streams never started": [
        BufferedBulkPacket(endpoint=0x82, data=bytes(1000)),
        IsoPacket(endpoint=0x84, data=bytes(1000)),
    ],
    "devices that come and go": [DeviceConnect(), DeviceDisconnect()],
    "devices that only come": [DeviceConnect()],
}


@pytest.mark.parametrize("flood", FLOODS)
def test_floods_leave_nothing_behind(flood: str) -> None:
    """Ten times as much takes no more memory."""
    with hostile_host() as (guest, host):

        def send(times: int) -> None:
            for _ in range(times):
                for _ in range(50):
                    host.send(*FLOODS[flood])
                guest.process()

        send(2)
        gc.collect()
        tracemalloc.start()
        try:
            send(20)
            gc.collect()
            held = tracemalloc.get_traced_memory()[0]
        finally:
            tracemalloc.stop()
        assert held < 100_000
        assert not guest._exchange.busy
        assert not guest._exchange.streams
        assert guest.has_data_to_write() == 0


def test_announced_lengths_take_no_memory() -> None:
    """A packet of 100 MiB of which 10 bytes come."""
    with hostile_host() as (guest, host):
        future = guest.submit(requests.bulk_in(0x81, 128 << 20))
        host.send(header_struct(True).pack(PacketType.BULK_PACKET, 100 << 20, 1) + bytes(10))
        tracemalloc.start()
        try:
            guest.process()
            most = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert most < 1 << 20
        assert not future.done()
        host.closed = True
        with pytest.raises(ConnectionClosed):
            future.result()


# ================================================================ time


@pytest.mark.parametrize("background", [False, True])
def test_a_host_that_never_pauses(background: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls with a timeout end all the same."""
    monkeypatch.setattr(_exchange, "CANCEL_GRACE", MOMENT)
    end = End()
    parser = Parser(end, usb_host=True)
    ours, theirs = socket.socketpair()
    theirs.settimeout(PATIENCE)
    stop = threading.Event()
    with Connection(ours, "host") as connection, Guest(Quiet(connection), background=background) as guest:
        if not background:
            guest.process()
        end.incoming = theirs.recv(4096)
        parser.do_read()
        parser.send(DeviceConnect())
        parser.do_write()
        theirs.sendall(end.output)
        end.output.clear()
        for _ in range(100):
            parser.send(IsoPacket(endpoint=0x84, data=bytes(1000)))
            parser.send(ConfigurationStatus(id=1 << 20))
        parser.do_write()

        def flood() -> None:
            with contextlib.suppress(OSError):
                while not stop.is_set():
                    theirs.sendall(end.output)

        flooding = threading.Thread(target=flood, daemon=True)
        flooding.start()
        try:
            guest.wait_for_device(PATIENCE)
            for _ in range(3):
                assert guest.bulk_in(0x81, 64, timeout=MOMENT).status == Status.TIMEOUT
                with pytest.raises(TimeoutError):
                    guest.get_configuration(timeout=MOMENT)
                with pytest.raises(TimeoutError):
                    guest.wait_for_disconnect(MOMENT)
        finally:
            stop.set()
            theirs.shutdown(socket.SHUT_RDWR)
            flooding.join(PATIENCE)
            theirs.close()
        assert not flooding.is_alive()
