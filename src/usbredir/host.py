"""The side that has the device: serves a guest's requests with a :class:`~usbredir.device.UsbDevice`.

How data flows: the guest's packets come through the parser to one handler per packet type; a transfer goes to
the device and its completion, from the device's event handling, becomes the reply. Everything that is sent goes to the
parser's queue; then the application's ``flush_writes`` is called, without any lock.

Locks, outermost first: the host's lock (transfers in flight, streams, states; held by handlers and completions, which
keeps replies in order), the device's own, the parser's queue lock. No application code runs under them, except ``log``.

Source: docs/host.md.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import TracebackType
from typing import Any, cast

from . import filter as _filter
from ._device_layout import DeviceLayout
from ._link import Link
from ._redirection import TRANSITIONS, Action, Input, Redirection
from ._stream_host import StreamHost
from ._streams import Stream
from .capabilities import ALL
from .descriptors import device_ids
from .device import DO_NOT_RESET, Transfer, UsbDevice, may_be_reset
from .errors import DeviceError, DeviceLostError, DeviceRejectedError, LocalProtocolError
from .filter import FilterResult, FilterRule
from .limits import Limits
from .locking import Guard, LockCallbacks
from .packets import (
    AllocBulkStreams,
    AltSettingStatus,
    BulkPacket,
    BulkStreamsStatus,
    CancelDataPacket,
    ConfigurationStatus,
    ControlPacket,
    DeviceDisconnect,
    DeviceDisconnectAck,
    FilterFilter,
    FilterReject,
    FreeBulkStreams,
    GetAltSetting,
    GetConfiguration,
    Hello,
    InterruptPacket,
    IsoPacket,
    Packet,
    Reset,
    SetAltSetting,
    SetConfiguration,
    StartBulkReceiving,
    StartInterruptReceiving,
    StartIsoStream,
    StopBulkReceiving,
    StopInterruptReceiving,
    StopIsoStream,
)
from .parser import VERSION, LogLevel, Parser, StreamCallbacks
from .proto import Capability, Status, TransferType, endpoint_address

__all__ = ["DO_NOT_RESET", "Host", "HostCallbacks", "Limits", "check_device_filter"]

CONTROL_TIMEOUT = 5.0
"""Seconds a control transfer may take."""
MAX_STREAM_BACKLOG = 800
"""Packets waiting to be written above which stream data is dropped, or reading ahead pauses: 0.1 s at high speed."""
READ_BACKLOG_PACKETS = 4096
"""Replies waiting above which no more requests are read, unless limits say otherwise."""
READ_BACKLOG_BYTES = 64 * 1024 * 1024
"""The same in bytes."""
DRAIN_STEP = 0.0025
"""Seconds of event handling at a time while waiting for cancelled transfers."""
DRAIN_LIMIT = 10.0
"""Seconds after which a device that does not give its transfers back counts as lost."""
NO_ALTERNATE = 255
"""Alternate setting in the answer when there is none to tell."""

REQUEST_CLEAR_HALT = (0x02, 1, 0)
"""requesttype, request and value of CLEAR_FEATURE(ENDPOINT_HALT)."""

# Members of enumerations cost 70 ns each to look up.
CONNECTED = Redirection.CONNECTED
CONTROL = TransferType.CONTROL
BULK = TransferType.BULK
INTERRUPT = TransferType.INTERRUPT
DataRequest = ControlPacket | BulkPacket | InterruptPacket
Payload = bytes | bytearray | memoryview


class HostCallbacks(StreamCallbacks):
    """What an application provides to a :class:`Host`.

    Threads: flush_writes: the thread in ``read_guest_data``, and the one that handles the device's events,
    possibly at once; no lock is held.
    """

    logger = "usbredir.host"

    def flush_writes(self) -> None:
        """Something was queued: call :meth:`Host.write_guest_data` now or soon."""


class Host(StreamHost):
    """Serves one guest with one device at a time.

    Args:
        callbacks: the application: stream, log and flush callback.
        device: what to export; None: set one later. A ``usb.core.Device`` is wrapped.
        version: text for hello.
        locks: thread-safety on; see docs/threads.md.
        write_owns_buffer: ``write`` takes a buffer as a whole or not at all.
        limits: what the guest may make us hold. Above the queue limits no more requests are read until replies
            were written.

    Raises what :meth:`set_device` raises. The host claims and releases the device, it does not close it, unless it
    wrapped it itself.
    Threads: each method tells. Without *locks*: one thread for everything.
    """

    guest_filter: list[FilterRule] | None
    """The rules that the guest sent last, or None. The application decides what to make of them."""

    def __init__(
        self,
        callbacks: HostCallbacks,
        device: UsbDevice | Any | None = None,
        *,
        version: str = VERSION,
        locks: LockCallbacks | None = None,
        write_owns_buffer: bool = False,
        limits: Limits = Limits(),  # noqa: B008 - immutable
    ) -> None:
        super().__init__()
        self._callbacks = callbacks
        self._limits = limits
        self._max_transfers = limits.max_transfers
        self._max_transfer_bytes = limits.max_transfer_bytes
        self._most_packets = READ_BACKLOG_PACKETS if limits.max_queued_packets is None else limits.max_queued_packets
        self._most_bytes = READ_BACKLOG_BYTES if limits.max_queued_bytes is None else limits.max_queued_bytes
        self.guest_filter = None
        self._lock = Guard(locks)
        self._guard = self._lock.section()
        self._state = Redirection.NEW
        self._device: UsbDevice | None = None
        self._made: UsbDevice | None = None  # the device, if it was wrapped here: nobody else can close it
        self._layout: DeviceLayout | None = None
        self._resettable = True
        self._freshly_reset = False
        self._error: DeviceError | None = None  # for the next attempt to read
        self._flush_due = False
        self._flying: dict[Transfer, None] = {}  # everything submitted and not completed, in order
        self._flying_bytes = 0
        self._requests: dict[int, Transfer] = {}  # single transfers by packet id, those not cancelled
        self._repeated: dict[int, deque[Transfer]] = {}  # those whose id was in use already, in order
        self._repliers: dict[type[Packet], Callable[..., None]] = {}
        self._completed = self._entrance(self._single_completed)
        self._stream_completed = self._entrance(self._serve_stream)
        handlers: dict[type[Packet], Callable[[Any], None]] = {
            Hello: self._on_hello,
            SetConfiguration: self._on_set_configuration,
            GetConfiguration: self._on_get_configuration,
            SetAltSetting: self._on_set_alt_setting,
            GetAltSetting: self._on_get_alt_setting,
            StartIsoStream: self._on_start_iso,
            StopIsoStream: self._on_stop_stream,
            StartInterruptReceiving: self._on_start_interrupt,
            StopInterruptReceiving: self._on_stop_stream,
            AllocBulkStreams: self._on_alloc_streams,
            FreeBulkStreams: self._on_free_streams,
            CancelDataPacket: self._on_cancel,
            FilterReject: self._on_filter_reject,
            FilterFilter: self._on_filter,
            DeviceDisconnectAck: self._on_disconnect_ack,
            StartBulkReceiving: self._on_start_bulk_receiving,
            StopBulkReceiving: self._on_stop_stream,
            ControlPacket: self._on_control,
            BulkPacket: self._on_bulk,
            IsoPacket: self._on_iso,
            InterruptPacket: self._on_interrupt,
        }
        self._handlers = {kind: self._entrance(handler) for kind, handler in handlers.items()}
        self._handlers[Reset] = self._on_reset  # waits for completions, which need the lock
        # Replies are never refused at a queue limit; reading pauses instead.
        self._parser = Parser(
            Link(callbacks, self._must_pause_reading, self._packet_received),
            version=version,
            capabilities=ALL,
            usb_host=True,
            write_owns_buffer=write_owns_buffer,
            locks=locks,
            limits=limits._replace(max_queued_packets=None, max_queued_bytes=None),
        )
        exceeds = self._parser.watch_backlog()
        self._overloaded = partial(exceeds, min(MAX_STREAM_BACKLOG, self._most_packets), self._most_bytes)
        self._backlog_exceeds = exceeds
        if device is not None:
            try:
                self.set_device(device)
            except BaseException:
                self._free_locks()
                raise

    # ------------------------------------------------------------ for the application

    def set_device(self, device: UsbDevice | Any | None) -> None:
        """Export *device* in place of the present one, which is released; None: only that.

        The guest is told, at once or when it has confirmed that the former device is gone. Raises DeviceClaimError
        (in use, forbidden), DeviceLostError (it does not survive the reset) or DeviceError (its descriptors make
        no sense); then there is no device. Threads: one caller at a time, shared with read_guest_data and close.
        """
        self._drop_device()
        if device is not None:
            ours = _wrap(device)
            try:
                self._take_device(ours)
            except BaseException:
                if ours is not device:
                    ours.close()
                raise
            self._made = None if ours is device else ours
        self._flush()

    def read_guest_data(self) -> None:
        """Read and serve requests until ``read`` would block.

        Raises RemoteProtocolError (call again to go on), DeviceRejectedError (the guest refuses the device: set another
        one, or end), DeviceLostError (lost during a reset or a configuration change), ConnectionClosed, and what the
        callbacks raise. Reading pauses while too many replies wait to be written. Threads: one caller at a time.
        """
        try:
            self._parser.do_read()
            self._raise_error()
        finally:
            self._flush()

    def write_guest_data(self) -> None:
        """Write until the queue is empty or ``write`` would block. Threads: any number of callers, one writes."""
        self._parser.do_write()
        self._resume_streams()

    def has_data_to_write(self) -> int:
        """Packets queued, a partly written one included. Threads: any number of callers."""
        return self._parser.has_data_to_write()

    def buffered_output_size(self) -> int:
        """Bytes queued, a partly written packet counted whole. Threads: any number of callers."""
        return self._parser.buffered_output_size()

    @property
    def reading_paused(self) -> bool:
        """Too many replies wait: do not wait for input before some were written. Threads: any number of callers."""
        return self._backlog_exceeds(self._most_packets, self._most_bytes)

    def log(self, level: LogLevel, message: str) -> None:
        """Write a message to the application's log. Threads: any number of callers."""
        self._callbacks.log(level, message)

    @property
    def device(self) -> UsbDevice | None:
        """The device that is exported, or None. Threads: any number of callers."""
        return self._device

    @property
    def state(self) -> Redirection:
        """What the guest knows of the device. Threads: any number of callers."""
        return self._state

    @property
    def has_greeted(self) -> bool:
        """Whether the guest's hello has come. Threads: any number of callers."""
        return self._parser.have_peer_capabilities()

    def close(self, *, give_back: bool = True) -> None:
        """Release the device and the locks. Idempotent. Threads: one caller, nothing else going on.

        Without *give_back* the system's drivers do not return to the device: the next host is to have it.
        """
        try:
            self._drop_device(give_back=give_back)
        finally:
            self._free_locks()

    def __enter__(self) -> Host:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None, /
    ) -> None:
        self.close()

    def _free_locks(self) -> None:
        self._parser.close()
        self._lock.free()

    # ------------------------------------------------------------ the connection

    def _must_pause_reading(self) -> bool:
        """Asked before every read: delivers a pending error at the same place as the original."""
        if self._error is not None:
            self._raise_error()
        return self._backlog_exceeds(self._most_packets, self._most_bytes)

    def _raise_error(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _packet_received(self, packet: Packet) -> None:
        self._handlers[packet.__class__](packet)
        if self._error is not None and isinstance(self._error, DeviceLostError):
            self._drop_device()
            self._flush()

    def _send(self, packet: Packet) -> None:
        """Queue a packet; what the guest's capabilities forbid is only logged."""
        try:
            self._parser.send(packet)
        except LocalProtocolError as error:
            self.log(LogLevel.ERROR, f"not sent: {error}")
            return
        self._flush_due = True

    def _flush(self) -> None:
        """Tell the application that something was queued. No lock is held."""
        if self._flush_due:
            self._flush_due = False
            self._callbacks.flush_writes()

    def _entrance(self, work: Callable[[Any], None]) -> Callable[[Any], None]:
        """*work* as it is called from outside: under the lock, and the application is told what it queued.

        Chosen once: a lock that nobody needs costs 0.24 us for every packet and every completion.
        """
        guard = self._guard

        def locked(argument: Any) -> None:
            with guard:
                work(argument)
            if self._flush_due:
                self._flush()

        def telling(argument: Any) -> None:
            work(argument)
            if self._flush_due:
                self._flush()

        return locked if self._lock.active else telling

    def _feed(self, event: Input) -> None:
        """Change the state as the table says, and do what goes with it."""
        self._state, action = TRANSITIONS[self._state, event]
        if action is Action.ANNOUNCE:
            self._send_layout()
            self._send(self._layout_of_device().device_connect())
        elif action is Action.DISCONNECT:
            self._send(DeviceDisconnect())
        elif action is Action.COMPLAIN:
            self.log(LogLevel.ERROR, "the guest confirms a disconnection that did not happen: ignored")

    @property
    def _connected(self) -> bool:
        return self._state is Redirection.CONNECTED

    def _layout_of_device(self) -> DeviceLayout:
        assert self._layout is not None, "only called while a device is there"
        return self._layout

    def _on_hello(self, packet: Hello) -> None:
        self._repliers.clear()  # the capabilities are settled only now
        self._feed(Input.HELLO)

    def _on_disconnect_ack(self, packet: DeviceDisconnectAck) -> None:
        self._feed(Input.ACK)

    def _on_filter(self, packet: FilterFilter) -> None:
        self.guest_filter = list(packet.rules)

    def _on_filter_reject(self, packet: FilterReject) -> None:
        if self._connected:
            self._error = DeviceRejectedError(
                "the guest refuses the device: its filter, or the speed of its controller, does not allow it"
            )

    # ------------------------------------------------------------ taking and losing a device

    def _take_device(self, device: UsbDevice) -> None:
        """Claim, reset and announce *device*."""
        device.claim()
        try:
            layout = DeviceLayout(device)
            self._resettable = may_be_reset(device.device_descriptor)
            if self._resettable:
                # A guest's first act is a slow reset: done now, its first one can be skipped.
                device.reset()
        except (ValueError, DeviceError) as error:
            with contextlib.suppress(DeviceError):  # the first error is the one to tell
                device.release(give_back=True, reset=self._resettable)
            if isinstance(error, DeviceError):
                raise
            raise DeviceError(f"the device's descriptors make no sense: {error}") from error
        with self._guard:
            self._device = device
            self._layout = layout
            self._freshly_reset = self._resettable
            self._warned.clear()
            self._feed(Input.DEVICE)

    def _drop_device(self, *, give_back: bool = True) -> None:
        """Cancel everything quietly, release the device, tell the guest."""
        device = self._device
        if device is None:
            return
        with self._guard:
            self._requests.clear()
            self._repeated.clear()
            for transfer in self._flying:
                if not isinstance(transfer.context, Stream):
                    transfer.context = None  # nobody is answered
            self._end_streams(self._streams)
            self._cancel_all()
        if not self._drain():
            self.log(LogLevel.ERROR, "the device does not give its transfers back: released all the same")
        try:
            device.release(give_back=give_back, reset=self._resettable)
        except DeviceError as error:
            self.log(LogLevel.WARNING, f"the device cannot be given back as it was: {error}")
        with self._guard:
            self._device = None
            self._layout = None
            self._freshly_reset = False
            self._device_gone()
        made, self._made = self._made, None
        if made is not None:
            made.close()
        self._flush()

    def _device_gone(self) -> None:
        """Tell the guest, once. The lock is held."""
        confirms = self._parser.peer_has_capability(Capability.DEVICE_DISCONNECT_ACK)
        self._feed(Input.GONE if confirms else Input.GONE_UNCONFIRMED)

    def _drain(self) -> bool:
        """Handle the device's events until every transfer has completed; False when one does not."""
        limit = time.monotonic() + DRAIN_LIMIT
        while self._flying:
            if self._device is None or time.monotonic() > limit:
                break
            try:
                self._device.handle_events(DRAIN_STEP)
            except DeviceError:
                break
        with self._guard:
            drained = not self._flying
            # What was given up must not hold up the next device; its completions are ignored.
            self._flying.clear()
            self._flying_bytes = 0
        return drained

    def _cancel_all(self) -> None:
        for transfer in list(self._flying):
            self._cancel(transfer)

    def _cancel(self, transfer: Transfer) -> None:
        if self._device is not None:
            with self._noticing_loss():
                self._device.cancel(transfer)

    @contextlib.contextmanager
    def _noticing_loss(self) -> Iterator[None]:
        """A device that turns out to be gone is reported to the guest. The lock is held."""
        try:
            yield
        except DeviceLostError:
            self._device_gone()

    # ------------------------------------------------------------ configuration, alternate settings, reset

    def _send_layout(self) -> None:
        layout = self._layout_of_device()
        self._warned.clear()
        self._send(layout.interface_info())
        self._send(layout.ep_info())

    def _on_set_configuration(self, packet: SetConfiguration) -> None:
        present = self._layout.configuration.value if self._layout else 0
        status: int = Status.SUCCESS
        if not self._connected:
            status = Status.IOERROR
        elif packet.configuration != present:
            status = self._change_configuration(packet.configuration)
            present = self._layout.configuration.value if self._layout and self._connected else 0
        self._send(ConfigurationStatus(id=packet.id, status=status, configuration=present))

    def _change_configuration(self, value: int) -> int:
        assert self._device is not None
        device = self._device
        self._freshly_reset = False
        self._end_streams(self._streams)
        self._cancel_all()
        try:
            device.release(give_back=False)
            status = device.set_configuration(value)
            device.claim()
            self._layout = DeviceLayout(device)
        except (DeviceError, ValueError) as error:
            self.log(LogLevel.ERROR, f"the device is lost after a change of its configuration: {error}")
            self._lose_device("the device is lost: it cannot be used after a change of its configuration")
            return Status.IOERROR
        self._send_layout()
        return status

    def _on_get_configuration(self, packet: GetConfiguration) -> None:
        status = Status.SUCCESS if self._connected else Status.IOERROR
        value = self._layout.configuration.value if self._layout else 0
        self._send(ConfigurationStatus(id=packet.id, status=status, configuration=value))

    def _on_set_alt_setting(self, packet: SetAltSetting) -> None:
        status, alternate = self._alternate_of(packet.interface)
        if status == Status.SUCCESS:
            status = self._change_alternate(packet.interface, packet.alt)
            if status == Status.SUCCESS:
                alternate = packet.alt
        self._send(AltSettingStatus(id=packet.id, status=status, interface=packet.interface, alt=alternate))

    def _on_get_alt_setting(self, packet: GetAltSetting) -> None:
        status, alternate = self._alternate_of(packet.interface)
        self._send(AltSettingStatus(id=packet.id, status=status, interface=packet.interface, alt=alternate))

    def _alternate_of(self, interface: int) -> tuple[int, int]:
        """(status, present alternate setting) of an interface."""
        if not self._connected:
            return Status.IOERROR, NO_ALTERNATE
        alternates = self._layout_of_device().alternates
        if interface not in alternates:
            self.log(LogLevel.ERROR, f"the guest asks for interface {interface}, which does not exist")
            return Status.INVAL, NO_ALTERNATE
        return Status.SUCCESS, alternates[interface]

    def _change_alternate(self, interface: int, alternate: int) -> int:
        assert self._device is not None
        layout = self._layout_of_device()
        addresses = layout.addresses(interface)
        self._freshly_reset = False
        self._end_streams(addresses)
        for transfer in [t for t in self._flying if t.endpoint in addresses]:
            self._cancel(transfer)
        status: int = Status.IOERROR
        with self._noticing_loss():
            status = self._device.set_alt_setting(interface, alternate)
        if status == Status.SUCCESS:
            layout.select(interface, alternate)
            self._send_layout()
        return status

    def _on_reset(self, packet: Reset) -> None:
        """The lock is not held: completions that are waited for take it."""
        with self._guard:
            if not self._connected or self._freshly_reset:
                return
            for address, stream in sorted(self._streams.items()):
                self._send_stream_status(stream.kind, address, Status.STALL, 0)  # the guest starts it again
            self._end_streams(self._streams)
            self._cancel_all()
        self._flush()
        device = self._device
        if device is None or not self._resettable:
            self._drain()
            return
        try:
            # A reset under transfers in flight would end them as "no device".
            if not self._drain():
                raise DeviceLostError("transfers do not end")
            device.reset()
        except DeviceError as error:
            self.log(LogLevel.ERROR, f"the device is lost in a reset: {error}")
            with self._guard:
                self._lose_device("the device is lost: it did not come back from a reset")
        else:
            with self._guard:
                self._freshly_reset = True

    def _lose_device(self, message: str) -> None:
        """The device cannot be used any more; the application hears of it at the next read. The lock is held."""
        self._device_gone()
        self._error = DeviceLostError(message)

    # ------------------------------------------------------------ single transfers

    def _on_control(self, packet: ControlPacket) -> None:
        if not self._may_start(packet, CONTROL):
            return
        setup = packet.requesttype, packet.request, packet.value, packet.index
        if setup[:3] == REQUEST_CLEAR_HALT and not packet.length:
            self._clear_halt(packet)
            return
        transfer = Transfer(CONTROL, packet.endpoint, packet.length, self._completed)
        transfer.setup = setup
        transfer.timeout = CONTROL_TIMEOUT
        self._start(packet, transfer)

    def _clear_halt(self, packet: ControlPacket) -> None:
        """Not forwarded: the controller's side of the endpoint has to be cleared as well."""
        assert self._device is not None
        self._freshly_reset = False
        status: int = Status.IOERROR
        with self._noticing_loss():
            status = self._device.clear_halt(packet.index & 0xFF)
        self._refuse(packet, status)

    def _on_bulk(self, packet: BulkPacket) -> None:
        if self._may_start(packet, BULK):
            transfer = Transfer(BULK, packet.endpoint, packet.length, self._completed)
            transfer.stream_id = packet.stream_id
            self._start(packet, transfer)

    def _on_interrupt(self, packet: InterruptPacket) -> None:
        if not self._may_start(packet, TransferType.INTERRUPT):
            return
        most = self._layout_of_device().endpoint(packet.endpoint).max_packet_size
        if packet.length > most:
            self.log(LogLevel.ERROR, f"an interrupt packet of {packet.length} bytes for an endpoint of {most}")
            self._refuse(packet, Status.INVAL)
            return
        self._start(packet, Transfer(INTERRUPT, packet.endpoint, packet.length, self._completed))

    def _may_start(self, packet: DataRequest, kind: TransferType) -> bool:
        """Check what is the same for all transfers; answer the request when it cannot be served."""
        if self._state is not CONNECTED or self._layout is None:
            self._refuse(packet, Status.IOERROR)
        elif self._layout.types[packet.endpoint] is not kind:
            self.log(LogLevel.ERROR, f"endpoint 0x{packet.endpoint:02x} is no {kind.name.lower()} endpoint")
            self._refuse(packet, Status.INVAL)
        elif not self._room_for(1, packet.length):
            self._refuse(packet, Status.IOERROR)
        else:
            return True
        return False

    def _room_for(self, transfers: int, size: int) -> bool:
        """Whether more transfers may be in flight; the guest's excess is logged."""
        transfers += len(self._flying)
        size += self._flying_bytes
        if self._streams:
            for stream in self._streams.values():
                transfers += stream.reserved
                size += stream.reserved * stream.shape.length
        if transfers <= self._max_transfers and size <= self._max_transfer_bytes:
            return True
        self.log(LogLevel.WARNING, "the guest wants too many transfers in flight: refused")
        return False

    def _start(self, packet: DataRequest, transfer: Transfer) -> None:
        self._freshly_reset = False
        transfer.data = packet.data
        transfer.context = packet
        packet_id = packet.id
        if packet_id in self._requests:  # guests may use an id again while it is in use
            self._repeated.setdefault(packet_id, deque()).append(transfer)
        else:
            self._requests[packet_id] = transfer
        status = self._submit(transfer)
        if status:
            self._forget_request(packet_id, transfer)
            if transfer.device_lost:
                self._device_gone()
            self._refuse(packet, status)

    def _submit(self, transfer: Transfer) -> int:
        assert self._device is not None
        self._flying[transfer] = None
        self._flying_bytes += transfer.length
        try:
            status = self._device.submit(transfer)
        except DeviceLostError:
            transfer.device_lost = True
            status = Status.IOERROR
        if status:
            self._landed(transfer)
        return status

    def _landed(self, transfer: Transfer) -> bool:
        """Count a transfer out; False for one that was given up before."""
        if transfer not in self._flying:
            return False
        del self._flying[transfer]
        self._flying_bytes -= transfer.length
        return True

    def _single_completed(self, transfer: Transfer) -> None:
        """A transfer that one packet asked for is done. Runs in the device's event handling."""
        if not self._landed(transfer):
            return
        if transfer.device_lost:
            self._device_gone()
        packet = transfer.context
        if packet is None:  # cancelled by the guest, which was answered then
            return
        if self._repeated:
            self._forget_request(packet.id, transfer)
        else:
            del self._requests[packet.id]
        if transfer.endpoint & 0x80:
            data = transfer.data
            self._answer(packet, transfer.status, len(data), data)
        else:
            self._answer(packet, transfer.status, transfer.actual_length, b"")

    def _forget_request(self, packet_id: int, transfer: Transfer) -> None:
        if packet_id not in self._repeated:
            del self._requests[packet_id]
            return
        later = self._repeated[packet_id]
        if self._requests[packet_id] is transfer:
            self._requests[packet_id] = later.popleft()
        else:
            later.remove(transfer)
        if not later:
            del self._repeated[packet_id]

    def _refuse(self, packet: DataRequest, status: int) -> None:
        self._answer(packet, status, 0, b"")

    def _answer(self, packet: DataRequest, status: int, length: int, data: Payload) -> None:
        """Queue the request's header with the result. *data* belongs to us, and stays as it is."""
        replier = self._repliers.get(packet.__class__)
        if replier is None:
            replier = self._repliers[packet.__class__] = self._parser.replier(packet.__class__)
        try:
            replier(packet, status, length, data)
        except LocalProtocolError as error:
            self.log(LogLevel.ERROR, f"not sent: {error}")
            return
        self._flush_due = True

    def _on_cancel(self, packet: CancelDataPacket) -> None:
        """Answered at once; what the transfer brings later is dropped. Unknown: it has completed meanwhile."""
        transfer = self._requests.get(packet.id)
        if transfer is None:
            return
        request = transfer.context
        self._forget_request(packet.id, transfer)
        transfer.context = None
        self._cancel(transfer)
        self._refuse(cast(DataRequest, request), Status.CANCELLED)

    # ------------------------------------------------------------ bulk streams

    def _on_alloc_streams(self, packet: AllocBulkStreams) -> None:
        status: int = Status.IOERROR
        if self._connected and self._device is not None:
            with self._noticing_loss():
                status, granted = self._device.alloc_streams(_addresses(packet.endpoints), packet.no_streams)
                if status == Status.SUCCESS and granted < packet.no_streams:
                    status = Status.IOERROR
        self._send(
            BulkStreamsStatus(id=packet.id, endpoints=packet.endpoints, no_streams=packet.no_streams, status=status)
        )

    def _on_free_streams(self, packet: FreeBulkStreams) -> None:
        status: int = Status.IOERROR
        if self._connected and self._device is not None:
            with self._noticing_loss():
                status = self._device.free_streams(_addresses(packet.endpoints))
        self._send(BulkStreamsStatus(id=packet.id, endpoints=packet.endpoints, no_streams=0, status=status))


def _addresses(mask: int) -> list[int]:
    """Endpoint addresses of a mask of endpoint indexes."""
    return [endpoint_address(index) for index in range(32) if mask >> index & 1]


def _wrap(device: Any) -> UsbDevice:
    if isinstance(device, UsbDevice):
        return device
    # Imported late: who exports virtual devices needs neither pyusb nor libusb. Not imported: not one of pyusb's.
    core = sys.modules.get("usb.core")
    if core is None or not isinstance(device, core.Device):
        raise TypeError(f"neither a UsbDevice nor a usb.core.Device: {device!r}")
    from .backends.pyusb import wrap

    return wrap(device)


def check_device_filter(rules: Sequence[FilterRule], device: UsbDevice, **flags: bool) -> FilterResult:
    """Check a device against filter rules; *flags* as for :func:`usbredir.filter.check`.

    Raises ValueError for an invalid rule or descriptors that make no sense. Threads: any.
    """
    ids = device_ids(device.device_descriptor, device.configuration_descriptor)
    return _filter.check(rules, ids, **flags)
