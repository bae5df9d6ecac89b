"""The side that uses a device: sends requests to a host, matches the answers, as blocking calls.

How data flows: a call queues its request and then lets the application's ``wait`` move bytes until the answer is there;
what else arrives meanwhile (received interrupt data, a device that comes or goes) is kept for the call that wants it.

Stall, babble, timeout and cancellation are results (:class:`~usbredir.device.TransferResult`), not exceptions.
Source: docs/guest.md.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, cast

from ._link import Link
from .capabilities import ALL
from .device import TransferResult
from .errors import DeviceLostError, LocalProtocolError
from .filter import FilterRule
from .limits import Limits
from .packets import (
    AltSettingStatus,
    BufferedBulkPacket,
    BulkPacket,
    BulkReceivingStatus,
    BulkStreamsStatus,
    CancelDataPacket,
    ConfigurationStatus,
    ControlPacket,
    DeviceConnect,
    DeviceDisconnect,
    EpInfo,
    FilterFilter,
    FilterReject,
    GetAltSetting,
    GetConfiguration,
    Hello,
    InterfaceInfo,
    InterruptPacket,
    InterruptReceivingStatus,
    IsoPacket,
    IsoStreamStatus,
    Packet,
    Reset,
    SetAltSetting,
    SetConfiguration,
    StartBulkReceiving,
    StartInterruptReceiving,
    StopBulkReceiving,
    StopInterruptReceiving,
)
from .parser import VERSION, LogLevel, Parser, StreamCallbacks
from .proto import Status

__all__ = ["Guest", "GuestCallbacks", "TransferResult"]

CANCEL_GRACE = 5.0
"""Seconds that the host has to answer a cancelled request; later answers are dropped."""
MAX_BACKLOG = 64 * 1024 * 1024
"""Received stream data that waits to be taken, in bytes per endpoint; more ends in an error."""
MAX_WAITING = 4096
"""Packets waiting to be written above which nothing is read."""
READS_AT_ONCE = 16
"""Reads before a call looks at its timeout again."""
PACKET_COST = 128
"""Bytes that a waiting packet counts beside its data."""

GET_DESCRIPTOR = 6

Key = tuple[type[Packet], int]
StreamRequest = StartInterruptReceiving | StopInterruptReceiving | StartBulkReceiving | StopBulkReceiving
StreamStatus = IsoStreamStatus | InterruptReceivingStatus | BulkReceivingStatus
STREAM_REQUESTS = (StartInterruptReceiving, StopInterruptReceiving, StartBulkReceiving, StopBulkReceiving)


class GuestCallbacks(StreamCallbacks):
    """What an application provides to a :class:`Guest`. Threads: the one that calls the guest."""

    logger = "usbredir.guest"

    def wait(self, timeout: float | None, *, writing: bool) -> None:
        """Block until the stream can be read (or, with *writing*, written), at most *timeout* seconds."""
        raise NotImplementedError("override wait() to use blocking calls")


class _Received:
    """What came on an endpoint that is being received, and was not taken yet.

    backlog: what waits, in bytes. ended: the status with which the host ended the stream, or None.
    """

    def __init__(self) -> None:
        self.waiting: deque[InterruptPacket | BufferedBulkPacket] = deque()
        self.backlog = 0
        self.ended: int | None = None


class Guest:
    """Uses the device of one host.

    Args:
        callbacks: the application: stream, log and ``wait``.
        version: text for hello.
        capabilities: what to announce.
        rules: filter rules to tell the host.
        limits: what the host may make us hold.

    Every call may raise ConnectionClosed, RemoteProtocolError, and what the callbacks raise; calls that need a device
    raise DeviceLostError when there is none. *timeout* is in seconds, None waits for ever.
    Threads: one caller at a time.

    Attributes:
        device: DeviceConnect of the present device, or None.
        interfaces: its latest InterfaceInfo.
        endpoints: its latest EpInfo.
        host_filter: the rules that the host sent, or None.
    """

    def __init__(
        self,
        callbacks: GuestCallbacks,
        *,
        version: str = VERSION,
        capabilities: Iterable[int] = ALL,
        rules: Sequence[FilterRule] = (),
        limits: Limits = Limits(),  # noqa: B008 - immutable
    ) -> None:
        self.device: DeviceConnect | None = None
        self.interfaces: InterfaceInfo | None = None
        self.endpoints: EpInfo | None = None
        self.host_filter: tuple[FilterRule, ...] | None = None
        self.host_version = ""
        self.packets_received = 0
        self._callbacks = callbacks
        self._rules = rules
        self._ids = itertools.count(1)
        self._replies: dict[Key, Packet | None] = {}  # None: expected
        self._received: dict[int, _Received] = {}  # by endpoint
        self._stream_requests: dict[int, int] = {}  # id of the start or stop that waits, by endpoint
        self._reads_left = 0
        self._done: Callable[[], bool] | None = None  # what the present call waits for
        self._handlers: dict[type[Packet], Callable[[Any], None]] = {
            Hello: self._on_hello,
            DeviceConnect: self._on_connect,
            DeviceDisconnect: self._on_disconnect,
            InterfaceInfo: self._on_interface_info,
            EpInfo: self._on_ep_info,
            ConfigurationStatus: self._on_reply,
            AltSettingStatus: self._on_reply,
            IsoStreamStatus: self._on_stream_status,
            InterruptReceivingStatus: self._on_stream_status,
            BulkStreamsStatus: self._on_reply,
            FilterFilter: self._on_filter,
            BulkReceivingStatus: self._on_stream_status,
            ControlPacket: self._on_reply,
            BulkPacket: self._on_reply,
            IsoPacket: self._on_iso,
            InterruptPacket: self._on_interrupt,
            BufferedBulkPacket: self._on_stream_data,
        }
        link = Link(callbacks, self._has_enough, self._packet_received)
        self._parser = Parser(link, version=version, capabilities=capabilities, limits=limits)

    # ------------------------------------------------------------ the connection

    def wait_for_device(self, timeout: float | None = None) -> DeviceConnect:
        """The device, as soon as the host has announced one. Raises TimeoutError."""
        if not self._pump(lambda: self.device is not None, timeout):
            raise TimeoutError("the host has announced no device in time")
        assert self.device is not None
        return self.device

    def wait_for_disconnect(self, timeout: float | None = None) -> None:
        """Return when the device is gone. Raises TimeoutError."""
        if not self._pump(lambda: self.device is None, timeout):
            raise TimeoutError("the device is still there")

    def process(self) -> None:
        """Write what is queued and read what has arrived, without waiting, at most 1 MiB of it."""
        self._reads_left = READS_AT_ONCE
        self._parser.do_write()
        self._parser.do_read()
        self._parser.do_write()

    def has_data_to_write(self) -> int:
        """Packets queued."""
        return self._parser.has_data_to_write()

    def reject(self) -> None:
        """Refuse the device. Raises LocalProtocolError when the host has no filter capability."""
        self._parser.send(FilterReject())
        self._parser.do_write()
        self.device = None

    def reset(self) -> None:
        """Reset the device. There is no answer."""
        self._need_device()
        self._parser.send(Reset())
        self._parser.do_write()

    def close(self) -> None:
        """Release what the guest holds. Idempotent. The stream is the application's to close."""
        self._parser.close()

    def __enter__(self) -> Guest:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None, /
    ) -> None:
        self.close()

    # ------------------------------------------------------------ configuration

    def get_configuration(self, *, timeout: float | None = None) -> tuple[int, int]:
        """(status, configuration value; 0 = unconfigured)."""
        return self._ask_configuration(GetConfiguration(id=next(self._ids)), timeout)

    def set_configuration(self, value: int, *, timeout: float | None = None) -> tuple[int, int]:
        """Select a configuration; (status, configuration value now active)."""
        return self._ask_configuration(SetConfiguration(id=next(self._ids), configuration=value), timeout)

    def get_alt_setting(self, interface: int, *, timeout: float | None = None) -> tuple[int, int]:
        """(status, alternate setting of *interface*)."""
        return self._ask_alternate(GetAltSetting(id=next(self._ids), interface=interface), timeout)

    def set_alt_setting(self, interface: int, alt: int, *, timeout: float | None = None) -> tuple[int, int]:
        """Select an alternate setting; (status, alternate setting now active)."""
        return self._ask_alternate(SetAltSetting(id=next(self._ids), interface=interface, alt=alt), timeout)

    def _ask_configuration(self, packet: Packet, timeout: float | None) -> tuple[int, int]:
        reply = cast(ConfigurationStatus, self._ask(packet, ConfigurationStatus, timeout))
        return reply.status, reply.configuration

    def _ask_alternate(self, packet: Packet, timeout: float | None) -> tuple[int, int]:
        reply = cast(AltSettingStatus, self._ask(packet, AltSettingStatus, timeout))
        return reply.status, reply.alt

    # ------------------------------------------------------------ transfers

    def control_in(
        self, request_type: int, request: int, value: int, index: int, length: int, *, timeout: float | None = None
    ) -> TransferResult:
        """A control transfer with an IN data stage of up to *length* bytes (at most 65535)."""
        return self._transfer(
            ControlPacket(
                id=next(self._ids),
                endpoint=0x80,
                requesttype=request_type,
                request=request,
                value=value,
                index=index,
                length=length,
            ),
            timeout,
        )

    def control_out(
        self,
        request_type: int,
        request: int,
        value: int,
        index: int,
        data: bytes | bytearray | memoryview = b"",
        *,
        timeout: float | None = None,
    ) -> TransferResult:
        """A control transfer with an OUT data stage, or none."""
        return self._transfer(
            ControlPacket(
                id=next(self._ids),
                endpoint=0,
                requesttype=request_type,
                request=request,
                value=value,
                index=index,
                data=data,
            ),
            timeout,
        )

    def get_descriptor(self, kind: int, index: int = 0, length: int = 255, *, language: int = 0) -> bytes:
        """A descriptor of the device, empty when it has none. *length* is the most to ask for, in bytes."""
        result = self.control_in(0x80, GET_DESCRIPTOR, kind << 8 | index, language, length, timeout=5.0)
        return bytes(result.data) if result.status == Status.SUCCESS else b""

    def clear_halt(self, endpoint: int, *, timeout: float | None = None) -> TransferResult:
        """Clear the halt of an endpoint."""
        return self.control_out(0x02, 1, 0, endpoint, timeout=timeout)

    def bulk_in(
        self, endpoint: int, length: int, *, stream_id: int = 0, timeout: float | None = None
    ) -> TransferResult:
        """Read up to *length* bytes, at most 128 MiB."""
        packet = BulkPacket(id=next(self._ids), endpoint=endpoint, length=length, stream_id=stream_id)
        return self._transfer(packet, timeout)

    def bulk_out(
        self,
        endpoint: int,
        data: bytes | bytearray | memoryview,
        *,
        stream_id: int = 0,
        timeout: float | None = None,
    ) -> TransferResult:
        """Write *data*, at most 128 MiB."""
        packet = BulkPacket(id=next(self._ids), endpoint=endpoint, data=data, stream_id=stream_id)
        return self._transfer(packet, timeout)

    def interrupt_out(
        self, endpoint: int, data: bytes | bytearray | memoryview, *, timeout: float | None = None
    ) -> TransferResult:
        """Write *data* to an interrupt endpoint, at most one packet."""
        return self._transfer(InterruptPacket(id=next(self._ids), endpoint=endpoint, data=data), timeout)

    # ------------------------------------------------------------ receiving

    def start_interrupt_receiving(self, endpoint: int, *, timeout: float | None = None) -> int:
        """Start polling an interrupt IN endpoint. Returns a status."""
        return self._start_receiving(StartInterruptReceiving(id=next(self._ids), endpoint=endpoint), timeout)

    def stop_interrupt_receiving(self, endpoint: int, *, timeout: float | None = None) -> int:
        """Stop polling an interrupt IN endpoint; what was not taken is dropped. Returns a status."""
        return self._stop_receiving(StopInterruptReceiving(id=next(self._ids), endpoint=endpoint), timeout)

    def start_bulk_receiving(
        self, endpoint: int, bytes_per_transfer: int, transfers: int = 5, *, timeout: float | None = None
    ) -> int:
        """Start reading a bulk IN endpoint ahead. Returns a status."""
        packet = StartBulkReceiving(
            id=next(self._ids), bytes_per_transfer=bytes_per_transfer, endpoint=endpoint, no_transfers=transfers
        )
        return self._start_receiving(packet, timeout)

    def stop_bulk_receiving(self, endpoint: int, *, timeout: float | None = None) -> int:
        """Stop reading a bulk IN endpoint ahead; what was not taken is dropped. Returns a status."""
        return self._stop_receiving(StopBulkReceiving(id=next(self._ids), endpoint=endpoint), timeout)

    def receive(self, endpoint: int, *, timeout: float | None = None) -> TransferResult:
        """The next data of an endpoint that is being received; status TIMEOUT when none came in time.

        When the host has ended the stream, its status, after all data. Raises LocalProtocolError when it is not
        started.
        """
        stream = self._received.get(endpoint)
        if stream is None:
            self._need_device()
            raise LocalProtocolError(f"receiving on endpoint 0x{endpoint:02x} is not started")
        if not self._pump(lambda: bool(stream.waiting) or stream.ended is not None or self.device is None, timeout):
            return TransferResult(Status.TIMEOUT)
        if stream.waiting:
            packet = stream.waiting.popleft()
            stream.backlog -= len(packet.data) + PACKET_COST
            return TransferResult(packet.status, packet.data)
        self._need_device()
        assert stream.ended is not None
        return TransferResult(stream.ended)

    def _start_receiving(self, packet: StartInterruptReceiving | StartBulkReceiving, timeout: float | None) -> int:
        present = self._received.get(packet.endpoint)
        # Data may follow the answer at once: the place for it is there before.
        if present is None or present.ended is not None:
            self._received[packet.endpoint] = _Received()
        status = self._ask_stream(packet, timeout)
        if status != Status.SUCCESS and (present is None or present.ended is not None):
            self._received.pop(packet.endpoint, None)
        return status

    def _stop_receiving(self, packet: StopInterruptReceiving | StopBulkReceiving, timeout: float | None) -> int:
        status = self._ask_stream(packet, timeout)
        if status == Status.SUCCESS:
            self._received.pop(packet.endpoint, None)
        return status

    def _ask_stream(self, packet: StreamRequest, timeout: float | None) -> int:
        """The status that answers a start or stop. Its packet is of the endpoint's kind, not of the request's."""
        self._stream_requests[packet.endpoint] = packet.id
        try:
            return cast(StreamStatus, self._ask(packet, type(packet), timeout)).status
        finally:
            del self._stream_requests[packet.endpoint]

    # ------------------------------------------------------------ requests and answers

    def _ask(self, request: Packet, kind: type[Packet], timeout: float | None) -> Packet:
        """Send a request and wait for its answer, which is filed under *kind* and the id. Raises TimeoutError."""
        self._need_device()
        key = (kind, request.id)
        self._send(request, key)
        try:
            if not self._pump(lambda: self._replies.get(key) is not None or self.device is None, timeout):
                raise TimeoutError(f"no answer to {type(request).__name__} in time")
            reply = self._replies[key]
        finally:
            self._replies.pop(key, None)
        if reply is None:
            raise DeviceLostError("the device went away before it answered")
        return reply

    def _transfer(self, request: Any, timeout: float | None) -> TransferResult:
        self._need_device()
        key = (type(request), request.id)
        self._send(request, key)
        try:
            status = self._finish(key, timeout)
            reply: Any = self._replies[key]
        finally:
            self._replies.pop(key, None)
        if reply is None:
            if status is None:
                raise DeviceLostError("the device went away before it answered")
            return TransferResult(status)
        if status is None or reply.status != Status.CANCELLED:
            status = reply.status
        if request.endpoint & 0x80 and len(reply.data) > request.length:
            return TransferResult(Status.BABBLE, reply.data[: request.length])
        return TransferResult(status, reply.data)

    def _finish(self, key: Key, timeout: float | None) -> Status | None:
        """Wait for the answer; when time is up, cancel. TIMEOUT when it was cancelled."""

        def answered() -> bool:
            return self._replies[key] is not None or self.device is None

        if self._pump(answered, timeout):
            return None
        self._parser.send(CancelDataPacket(id=key[1]))
        self._pump(answered, CANCEL_GRACE)
        return Status.TIMEOUT

    def _send(self, request: Packet, key: Key) -> None:
        self._parser.send(request)
        self._replies[key] = None

    def _need_device(self) -> None:
        if self.device is None:
            raise DeviceLostError("the host has no device: wait_for_device() first, or it went away")

    def _pump(self, done: Callable[[], bool], timeout: float | None) -> bool:
        """Move bytes until *done*; False when time is up."""
        limit = None if timeout is None else time.monotonic() + timeout
        while not done():
            self._done = done
            try:
                self.process()
            finally:
                self._done = None
            if done():
                break
            remaining = None if limit is None else limit - time.monotonic()
            if remaining is not None and remaining <= 0:
                return False
            self._callbacks.wait(remaining, writing=self._parser.has_data_to_write() > 0)
        return True

    def _has_enough(self) -> bool:
        """Asked before each read: no more for now.

        The present call has what it waits for, and what the host sends on stays outside until the next one; or the
        host sends without a pause, and the call has to look at its timeout.
        """
        self._reads_left -= 1
        if self._parser.has_data_to_write() > MAX_WAITING:
            return True  # a host that floods us with what we must confirm, and does not read
        return self._reads_left < 0 or (self._done is not None and self._done())

    # ------------------------------------------------------------ packets from the host

    def _packet_received(self, packet: Packet) -> None:
        self.packets_received += 1
        self._handlers[type(packet)](packet)

    def _on_hello(self, packet: Hello) -> None:
        self.host_version = packet.version
        if self._rules:
            self._parser.send(FilterFilter(rules=tuple(self._rules)))

    def _on_connect(self, packet: DeviceConnect) -> None:
        self.device = packet

    def _on_disconnect(self, packet: DeviceDisconnect) -> None:
        self.device = None
        self.interfaces = None
        self.endpoints = None
        self._received.clear()

    def _on_interface_info(self, packet: InterfaceInfo) -> None:
        self.interfaces = packet

    def _on_ep_info(self, packet: EpInfo) -> None:
        self.endpoints = packet

    def _on_filter(self, packet: FilterFilter) -> None:
        self.host_filter = packet.rules

    def _on_reply(self, packet: Packet) -> None:
        key = (type(packet), packet.id)
        if key in self._replies and self._replies[key] is None:
            self._replies[key] = packet
        else:
            self._callbacks.log(LogLevel.WARNING, f"an answer that nobody waits for, dropped: {packet!r}")

    def _on_stream_status(self, packet: StreamStatus) -> None:
        waiting = self._stream_requests.get(packet.endpoint)
        # A host whose first transfer fails answers with the transfer's id, not with the request's.
        if waiting is not None and (packet.id == waiting or packet.status != Status.SUCCESS):
            for key in self._replies:
                if key[1] == waiting and key[0] in STREAM_REQUESTS:
                    self._replies[key] = packet
        elif packet.endpoint in self._received:
            self._received[packet.endpoint].ended = packet.status

    def _on_interrupt(self, packet: InterruptPacket) -> None:
        if packet.endpoint & 0x80:
            self._on_stream_data(packet)
        else:
            self._on_reply(packet)

    def _on_stream_data(self, packet: InterruptPacket | BufferedBulkPacket) -> None:
        stream = self._received.get(packet.endpoint)
        if stream is None:
            return  # still under way when the stream was stopped
        backlog = stream.backlog + len(packet.data) + PACKET_COST
        if backlog > MAX_BACKLOG:
            raise LocalProtocolError(
                f"{MAX_BACKLOG} bytes wait on endpoint 0x{packet.endpoint:02x}: call receive(), or stop receiving"
            )
        stream.backlog = backlog
        stream.waiting.append(packet)

    def _on_iso(self, packet: IsoPacket) -> None:
        """No isochronous stream was started: nothing wants it."""
