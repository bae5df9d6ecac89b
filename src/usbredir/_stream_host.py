"""The part of a host that runs streams, whatever their kind; ``usbredir.host.Host`` is the rest.

How data flows: a start packet makes a :class:`~usbredir._streams.Stream` and submits its transfers. IN: what a
completed transfer brings is sent, and the transfer submitted again. OUT: a packet goes into the stream's ring, which
tells what is to be submitted.

The host's lock is held in every method, except in the one that takes it: _resume_streams.

Source: docs/host.md, "Streams".
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

from ._device_layout import DeviceLayout, EndpointSlot
from ._iso import IsoReceiving, IsoSending, new_stream, outcome
from ._streams import (
    INTERRUPT_TRANSFERS,
    MAX_RECOVERIES,
    RECEIVED,
    Shape,
    Stream,
    StreamInput,
    StreamState,
    status_packet,
)
from .device import Transfer, UsbDevice
from .errors import LocalProtocolError
from .packets import (
    IsoPacket,
    Packet,
    StartBulkReceiving,
    StartInterruptReceiving,
    StartIsoStream,
    StopBulkReceiving,
    StopInterruptReceiving,
    StopIsoStream,
)
from .parser import LogLevel, Parser
from .proto import Capability, Status, TransferType

__all__ = ["StreamHost"]

ENDPOINT_BITS = 0x8F
"""The bits of an endpoint address that mean something."""
MISSING = EndpointSlot(TransferType.INVALID)
# Members of enumerations cost 70 ns each to look up.
BULK = TransferType.BULK
ENDED = StreamState.ENDED
PAUSED = StreamState.PAUSED
STALL = Status.STALL


class StreamHost(ABC):
    """Starts, runs and ends the streams of a host."""

    # What the rest of the host has, and does for streams.
    _guard: AbstractContextManager[object]
    _parser: Parser
    _device: UsbDevice | None
    _layout: DeviceLayout | None
    _flying: dict[Transfer, None]
    _freshly_reset: bool
    _flush_due: bool
    _overloaded: Callable[[], bool]
    """Whether the guest does not keep up with what streams bring. Threads: any number of callers."""
    _stream_completed: Callable[[Transfer], None]

    def __init__(self) -> None:
        self._streams: dict[int, Stream] = {}  # by endpoint address
        self._warned: set[int] = set()  # endpoints whose drops were told
        # What is to be done with a completed transfer, by the kind of its stream.
        self._serve: dict[type[Stream], Callable[[Any, Transfer], None]] = {
            Stream: self._deliver,
            IsoReceiving: self._deliver_packets,
            IsoSending: self._packets_sent,
        }

    @abstractmethod
    def log(self, level: LogLevel, message: str) -> None:
        """Write a message to the application's log. Threads: any number of callers."""

    @property
    @abstractmethod
    def reading_paused(self) -> bool:
        """Too many replies wait. Threads: any number of callers."""

    @property
    @abstractmethod
    def _connected(self) -> bool:
        """The guest has the device."""

    @abstractmethod
    def _send(self, packet: Packet) -> None:
        """Queue a packet."""

    @abstractmethod
    def _flush(self) -> None:
        """Tell the application that something was queued. No lock is held."""

    @abstractmethod
    def _room_for(self, transfers: int, size: int) -> bool:
        """Whether more transfers may be in flight."""

    @abstractmethod
    def _submit(self, transfer: Transfer) -> int:
        """Submit and count a transfer; the status."""

    @abstractmethod
    def _landed(self, transfer: Transfer) -> bool:
        """Count a transfer out; False for one that was given up before."""

    @abstractmethod
    def _cancel(self, transfer: Transfer) -> None:
        """Ask for the end of a transfer."""

    @abstractmethod
    def _device_gone(self) -> None:
        """Tell the guest, once."""

    @abstractmethod
    def _noticing_loss(self) -> AbstractContextManager[None]:
        """A device that turns out to be gone is reported to the guest."""

    # ------------------------------------------------------------ starting and ending

    def _on_start_iso(self, packet: StartIsoStream) -> None:
        packets = packet.pkts_per_urb
        length = packets * self._slot(packet.endpoint).max_packet_size
        endpoint = packet.endpoint & ENDPOINT_BITS
        self._start_stream(Shape(TransferType.ISO, endpoint, packet.no_urbs, length, packets), packet.id)

    def _on_start_interrupt(self, packet: StartInterruptReceiving) -> None:
        length = self._slot(packet.endpoint).max_packet_size
        endpoint = packet.endpoint & ENDPOINT_BITS
        self._start_stream(Shape(TransferType.INTERRUPT, endpoint, INTERRUPT_TRANSFERS, length), packet.id)

    def _on_start_bulk_receiving(self, packet: StartBulkReceiving) -> None:
        if not self._parser.peer_has_capability(Capability.BULK_RECEIVING):
            # Neither a status nor data could be sent: the device would be read for nothing, without end.
            self.log(LogLevel.ERROR, "the guest starts bulk receiving without that capability: ignored")
            return
        endpoint = packet.endpoint & ENDPOINT_BITS
        shape = Shape(TransferType.BULK, endpoint, packet.no_transfers, packet.bytes_per_transfer)
        self._start_stream(shape, packet.id)

    def _slot(self, endpoint: int) -> EndpointSlot:
        return self._layout.endpoint(endpoint) if self._layout else MISSING

    def _start_stream(self, shape: Shape, packet_id: int) -> None:
        endpoint, slot = shape.endpoint, self._slot(shape.endpoint)
        if not self._connected or not shape.fits(slot.type, slot.max_packet_size):
            self.log(LogLevel.ERROR, f"a stream on endpoint 0x{endpoint:02x} cannot be started")
            self._send_stream_status(slot.type, endpoint, Status.STALL, packet_id)
        elif endpoint in self._streams:
            self.log(LogLevel.ERROR, f"the stream on endpoint 0x{endpoint:02x} is started already")
            self._send_stream_status(slot.type, endpoint, Status.INVAL, packet_id)
        elif not self._room_for(shape.transfers, shape.size):
            self._send_stream_status(slot.type, endpoint, Status.STALL, packet_id)
        elif self._run(new_stream(shape, self._stream_completed)):
            self._send_stream_status(slot.type, endpoint, Status.SUCCESS, packet_id)

    def _run(self, stream: Stream) -> bool:
        """Submit a stream's transfers. False: it has ended, and the guest was told."""
        self._freshly_reset = False
        # Made anew with every run, since a hello may have settled other capabilities.
        stream.send = self._parser.sender(stream.packet_class, *RECEIVED)
        self._streams[stream.endpoint] = stream
        return self._submit_for(stream, stream.first_transfers())

    def _submit_for(self, stream: Stream, transfers: Iterable[Transfer]) -> bool:
        """Submit transfers of a stream. False: it has ended, and the guest was told."""
        for transfer in transfers:
            if self._submit(transfer):
                self._not_submitted(stream, transfer)
                return False
        return True

    def _not_submitted(self, stream: Stream, transfer: Transfer) -> None:
        """The stream ends, and the guest is told."""
        if transfer.device_lost:
            self._device_gone()
        self._end_stream(stream)
        if not transfer.device_lost:
            self._send_stream_status(stream.kind, stream.endpoint, Status.STALL, stream.id_of(transfer))

    def _on_stop_stream(self, packet: StopInterruptReceiving | StopBulkReceiving | StopIsoStream) -> None:
        """Success even when nothing was started; no answer without a device."""
        if not self._connected:
            return
        self._end_streams([packet.endpoint & ENDPOINT_BITS])
        self._send_stream_status(self._slot(packet.endpoint).type, packet.endpoint, Status.SUCCESS, packet.id)

    def _end_streams(self, endpoints: Iterable[int]) -> None:
        for endpoint in list(endpoints):
            stream = self._streams.get(endpoint)
            if stream is not None:
                self._end_stream(stream)

    def _end_stream(self, stream: Stream) -> None:
        """Forget the stream at once; completions that still come are dropped."""
        stream.feed(StreamInput.END)
        if self._streams.get(stream.endpoint) is stream:
            del self._streams[stream.endpoint]
        for transfer in stream.transfers:
            if transfer in self._flying:
                self._cancel(transfer)

    def _send_stream_status(self, kind: TransferType, endpoint: int, status: int, packet_id: int) -> None:
        packet = status_packet(kind, endpoint, status, packet_id)
        if packet is not None:
            self._send(packet)

    # ------------------------------------------------------------ completions

    def _serve_stream(self, transfer: Transfer) -> None:
        """A transfer of a stream is done. Runs in the device's event handling."""
        if not self._landed(transfer):
            return
        stream: Stream = transfer.context
        if stream.state is ENDED:
            return
        if transfer.device_lost:
            self._end_stream(stream)
            self._device_gone()
        elif transfer.status == STALL:
            self._recover(stream)
        else:
            self._serve[stream.__class__](stream, transfer)

    def _recover(self, stream: Stream) -> None:
        """The endpoint stalled: clear it and start again, ids from 0, without the guest noticing."""
        assert self._device is not None
        self._end_stream(stream)
        status: int = Status.IOERROR
        with self._noticing_loss():
            status = self._device.clear_halt(stream.endpoint)
        if not self._connected:
            return
        if status != Status.SUCCESS or stream.recoveries >= MAX_RECOVERIES:
            self.log(LogLevel.ERROR, f"endpoint 0x{stream.endpoint:02x} stalls again and again: its stream has ended")
            self._send_stream_status(stream.kind, stream.endpoint, Status.STALL, 0)
            return
        self.log(LogLevel.WARNING, f"endpoint 0x{stream.endpoint:02x} stalled: its stream is started again")
        self._run(stream.again())

    def _log_failure(self, stream: Stream, status: int) -> None:
        self.log(LogLevel.ERROR, f"the stream on endpoint 0x{stream.endpoint:02x}: status {status}")

    def _warn_overload(self, stream: Stream) -> None:
        if stream.endpoint not in self._warned:
            self._warned.add(stream.endpoint)
            what = "reading pauses" if stream.kind is TransferType.BULK else "data is dropped"
            self.log(LogLevel.WARNING, f"the connection is too slow for endpoint 0x{stream.endpoint:02x}: {what}")

    # ------------------------------------------------------------ interrupt and bulk receiving

    def _deliver(self, stream: Stream, transfer: Transfer) -> None:
        """Pass received data on and read ahead again, unless the guest does not keep up."""
        packet_id = stream.take_id()
        status, data = transfer.status, transfer.data
        if status:
            self._log_failure(stream, status)
            data = b""
        else:
            stream.recoveries = 0
        if not self._overloaded():
            self._pass_on(stream, packet_id, status, data)
        else:
            self._warn_overload(stream)
            # Data of a byte stream must not be lost: it is sent, but no more is read until the guest has caught up.
            if stream.kind is BULK:
                self._pass_on(stream, packet_id, status, data)
                stream.feed(StreamInput.OVERLOAD)
        if stream.state is PAUSED:
            stream.idle.append(transfer)
        elif self._submit(transfer):
            self._not_submitted(stream, transfer)

    def _pass_on(self, stream: Stream, packet_id: int, status: int, data: bytes | bytearray | memoryview) -> None:
        """Queue received data, which belongs to us and stays as it is."""
        try:
            stream.send(packet_id, stream.endpoint, status, len(data), data)
        except LocalProtocolError as error:
            self.log(LogLevel.ERROR, f"not sent: {error}")
            return
        self._flush_due = True

    def _resume_streams(self) -> None:
        """Something was written: streams that pause go on if that was enough. No lock is held."""
        if self._streams and not self._overloaded():
            with self._guard:
                for stream in list(self._streams.values()):
                    self._resume(stream)
            self._flush()

    def _resume(self, stream: Stream) -> None:
        if stream.state is StreamState.PAUSED:
            stream.feed(StreamInput.RELIEF)
            idle, stream.idle = stream.idle, []
            self._submit_for(stream, idle)

    # ------------------------------------------------------------ isochronous streams

    def _deliver_packets(self, stream: IsoReceiving, transfer: Transfer) -> None:
        """Pass the packets of a transfer on, unless the guest does not keep up, and submit it again."""
        if transfer.status == Status.CANCELLED:
            return  # but not by us: the stream goes on without this transfer
        first_id = stream.take_ids(transfer)
        if transfer.status != Status.SUCCESS:
            self._tell_lost_transfer(stream, first_id, transfer.status)
            self._submit_for(stream, [transfer])
            return
        status = self._send_packets(stream, transfer, first_id)
        if status == Status.STALL:
            self._recover(stream)
        elif status != Status.CANCELLED:
            self._submit_for(stream, [transfer])

    def _send_packets(self, stream: IsoReceiving, transfer: Transfer, first_id: int) -> int:
        """Send each packet, without data if it failed. The status of one that ends the transfer's use, or SUCCESS."""
        # Asked once per transfer: packets that no write was tried for yet do not make a connection slow.
        dropping = stream.is_too_fast(self._parser.buffered_output_size()) or self._overloaded()
        if dropping:
            self._warn_overload(stream)
        any_good = False
        for packet_id, (status, data) in enumerate(transfer.iso_results, first_id):
            if status == Status.SUCCESS:
                any_good = True
            elif status in (Status.STALL, Status.CANCELLED):
                return status
            else:
                data = b""
            if not dropping:
                self._pass_on(stream, packet_id, status, data)
        if any_good:
            stream.recoveries = 0
        return Status.SUCCESS

    def _tell_lost_transfer(self, stream: IsoReceiving, first_id: int, status: int) -> None:
        """One empty packet for all. It is not dropped before the limit at which nothing more is read either."""
        self._log_failure(stream, status)
        if not self.reading_paused:
            self._send(IsoPacket(id=first_id, endpoint=stream.endpoint, status=status))

    def _on_iso(self, packet: IsoPacket) -> None:
        """A packet for an OUT stream. It has no answer unless it cannot be taken."""
        stream = self._streams.get(packet.endpoint & ENDPOINT_BITS)
        if not self._connected:
            status = Status.IOERROR
        elif not isinstance(stream, IsoSending):
            self.log(LogLevel.ERROR, f"endpoint 0x{packet.endpoint:02x} has no isochronous stream to send on")
            status = Status.INVAL
        elif len(packet.data) > stream.max_packet_size:
            self.log(LogLevel.ERROR, f"an isochronous packet of {len(packet.data)} bytes is too long for its endpoint")
            status = Status.INVAL
        else:
            self._submit_for(stream, stream.put(packet.id, packet.data))
            return
        self._send_stream_status(TransferType.ISO, packet.endpoint, status, packet.id)

    def _packets_sent(self, stream: IsoSending, transfer: Transfer) -> None:
        """The transfer can be filled again; a failure is told once."""
        status = outcome(transfer)
        if status == Status.STALL:
            self._recover(stream)
            return
        if status == Status.SUCCESS:
            stream.recoveries = 0
        elif status != Status.CANCELLED:  # a cancellation that we did not ask for is nothing to tell
            self._log_failure(stream, status)
            self._send_stream_status(stream.kind, stream.endpoint, status, stream.id_of(transfer))
        stream.take_back(transfer)
