"""One device at a host, with the calls that libusb has for a device of this machine.

usbredir has streams where libusb has single transfers: interrupt IN and isochronous endpoints. A stream is started by
the first transfer on its endpoint and goes on, so that nothing is lost between two transfers; it is stopped when the
interface is released or gets another alternate setting, and when the device is configured, reset or closed.

Results are statuses of :class:`~usbredir.proto.Status`. Source: docs/drive-a-remote-device.md.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from ._pyusb_descriptors import ConfigurationDescriptor, read_configuration, read_device
from .descriptors import DescriptorType
from .device import TransferResult
from .errors import DeviceLostError, LocalProtocolError, UsbRedirError
from .guest import Guest
from .packets import EpInfo
from .proto import Speed, Status, TransferType, endpoint_index

__all__ = ["RemoteDevice", "Transferred"]

REQUEST_TIMEOUT = 10.0
"""Seconds that requests may take which have no timeout in pyusb."""
MAX_STREAM_PACKETS = 32
MAX_STREAM_TRANSFERS = 16
"""Most isochronous packets of a transfer, and transfers of a stream, that hosts accept."""
IN_TRANSFERS = 4
"""Transfers in flight of an isochronous IN stream."""
SPEEDS: Mapping[int, int] = {Speed.LOW: 1, Speed.FULL: 2, Speed.HIGH: 3, Speed.SUPER: 4}
"""libusb's numbers; 0 is unknown."""
FRAME, MICROFRAME = 0.001, 0.000125
"""Seconds between two packets of an isochronous endpoint whose interval is 1."""
LONGEST_PERIOD = 1.024
"""The same for the longest interval that is believed: the longest that Linux uses."""
LATENESS = 0.002
"""Seconds that a wait may end later than it should: writes that follow at once still keep the bus's pace."""
NO_ROOM = memoryview(bytearray())


class Transferred(NamedTuple):
    """Outcome of a transfer: status, and bytes moved whatever the status is."""

    status: int
    length: int


class Timer:
    """What is left of a timeout in seconds, None: for ever."""

    def __init__(self, timeout: float | None) -> None:
        self._end = None if timeout is None else time.monotonic() + timeout

    def left(self) -> float | None:
        """Seconds, at least 0."""
        return None if self._end is None else max(0.0, self._end - time.monotonic())

    def at_most(self, seconds: float) -> float:
        """Seconds that are left, or fewer."""
        left = self.left()
        return seconds if left is None else min(left, seconds)

    def is_over(self) -> bool:
        """Nothing is left."""
        return self.left() == 0


class OpenStream(NamedTuple):
    """A stream that this device has started. *packets*: per transfer (isochronous)."""

    kind: TransferType
    interface: int
    packets: int
    stop: Callable[..., int]


class RemoteDevice:
    """The device that *guest* has now; a device that comes later on the same connection is another one.

    Args:
        bus, address: what to call it.

    Making one raises ValueError when the device has no sensible descriptor. Calls raise DeviceLostError once the
    device is gone, TimeoutError, and what the guest raises. *timeout* is in seconds, None waits for ever.
    Threads: any; one at a time for an endpoint.

    Attributes:
        descriptor: its device descriptor.
    """

    def __init__(self, guest: Guest, bus: int, address: int) -> None:
        self._guest = guest
        self._announced = guest.device
        self._configurations: dict[int, ConfigurationDescriptor] = {}  # by position
        self._streams: dict[int, OpenStream] = {}  # by endpoint
        self._changing = threading.Lock()  # held to start and stop streams, and to count users
        self._opens = 0
        self._claims = Counter[int]()  # by interface
        self._sent_until: dict[int, float] = {}  # when the bus is done with what was sent, by isochronous endpoint
        raw = self._read_descriptor(DescriptorType.DEVICE, 0, 18)
        self.descriptor = read_device(raw, bus=bus, address=address, speed=SPEEDS.get(self._speed, 0))

    @property
    def guest(self) -> Guest:
        """The guest, which has this device. Raises DeviceLostError."""
        if self._guest.device is not self._announced or self._announced is None:
            raise DeviceLostError("the device is gone")
        return self._guest

    def open(self) -> None:
        """One more uses the device. Asks the host whether it is there."""
        self.check()
        with self._changing:
            self._opens += 1

    def close(self) -> None:
        """One less; the last one stops all streams. Raises nothing."""
        with self._changing:
            self._opens = max(0, self._opens - 1)
            if not self._opens:
                self._claims.clear()
                self._stop_all(None)

    def claim(self, interface: int) -> None:
        """One more uses *interface*. Asks the host whether the device is there."""
        self.check()
        with self._changing:
            self._claims[interface] += 1

    def release(self, interface: int) -> None:
        """One less; the last one stops the interface's streams. Raises nothing."""
        with self._changing:
            self._claims[interface] = max(0, self._claims[interface] - 1)
            if not self._claims[interface]:
                self._stop_all(interface)

    def check(self) -> None:
        """Ask the host whether the device is there. Raises as every call."""
        self.get_configuration()

    @property
    def _speed(self) -> int:
        return Speed.UNKNOWN if self._announced is None else self._announced.speed

    # ------------------------------------------------------------ descriptors, configuration

    def configuration(self, position: int) -> ConfigurationDescriptor:
        """The configuration descriptor at *position*, from 0 on. Raises ValueError."""
        if position not in self._configurations:
            head = self._read_descriptor(DescriptorType.CONFIGURATION, position, 9)
            raw = self._read_descriptor(DescriptorType.CONFIGURATION, position, int.from_bytes(head[2:4], "little"))
            self._configurations[position] = read_configuration(raw)
        return self._configurations[position]

    def _read_descriptor(self, kind: int, index: int, length: int) -> bytes:
        return self.guest.get_descriptor(kind, index, length)

    def get_configuration(self) -> tuple[int, int]:
        """(status, value of the active configuration)."""
        return self.guest.get_configuration(timeout=REQUEST_TIMEOUT)

    def set_configuration(self, value: int) -> int:
        """Select a configuration; a status."""
        self.stop_streams()
        return self.guest.set_configuration(value, timeout=REQUEST_TIMEOUT)[0]

    def set_alt_setting(self, interface: int, alternate: int) -> int:
        """Select an alternate setting; a status."""
        self.stop_streams(interface)
        return self.guest.set_alt_setting(interface, alternate, timeout=REQUEST_TIMEOUT)[0]

    def clear_halt(self, endpoint: int) -> int:
        """Clear the halt of an endpoint; a status."""
        return self.guest.clear_halt(endpoint, timeout=REQUEST_TIMEOUT).status

    def reset(self) -> None:
        """Reset the device."""
        self.stop_streams()
        self.guest.reset()

    # ------------------------------------------------------------ transfers

    def control_in(
        self, request_type: int, request: int, value: int, index: int, room: memoryview, timeout: float | None
    ) -> Transferred:
        """A control transfer that reads into *room*."""
        result = self.guest.control_in(request_type, request, value, index, len(room), timeout=timeout)
        return _put(result, room)

    def control_out(
        self, request_type: int, request: int, value: int, index: int, data: bytes, timeout: float | None
    ) -> Transferred:
        """A control transfer that writes *data*. Requests of which the host must know go the way that tells it."""
        match request_type, request, value:
            case 0x00, 0x09, _:
                return Transferred(self.set_configuration(value & 0xFF), 0)
            case 0x01, 0x0B, _:
                return Transferred(self.set_alt_setting(index & 0xFF, value & 0xFF), 0)
        status = self.guest.control_out(request_type, request, value, index, data, timeout=timeout).status
        return Transferred(status, 0 if status else len(data))

    def bulk_in(self, endpoint: int, room: memoryview, timeout: float | None) -> Transferred:
        """Read into *room*."""
        return _put(self.guest.bulk_in(endpoint, len(room), timeout=timeout), room)

    def bulk_out(self, endpoint: int, data: bytes, timeout: float | None) -> Transferred:
        """Write *data*."""
        status = self.guest.bulk_out(endpoint, data, timeout=timeout).status
        return Transferred(status, 0 if status else len(data))

    def interrupt_in(self, endpoint: int, room: memoryview, timeout: float | None) -> Transferred:
        """Read packets into *room* until it is full or a packet is short. One that has no room is a babble."""
        timer = Timer(timeout)
        full_packet = self._max_packet_size(endpoint) or len(room)
        status = self._start_interrupt(endpoint, timer)
        total = 0
        while status == Status.SUCCESS:
            status, length = self._receive(endpoint, room[total:], timer)
            total += length
            if length < full_packet or total == len(room):
                break
            if timer.is_over():
                status = Status.TIMEOUT
        return self._concluded(endpoint, Transferred(status, total), timer)

    def interrupt_out(self, endpoint: int, data: bytes, timeout: float | None) -> Transferred:
        """Write *data*, a packet at a time."""
        timer = Timer(timeout)
        size = self._max_packet_size(endpoint) or len(data)
        for start in range(0, max(1, len(data)), max(1, size)):
            packet = data[start : start + size]
            status = self.guest.interrupt_out(endpoint, packet, timeout=timer.left()).status
            if status != Status.SUCCESS:
                return Transferred(status, start)
        return Transferred(Status.SUCCESS, len(data))

    def iso_in(self, endpoint: int, room: memoryview, timeout: float | None) -> Transferred:
        """Read as many packets as have room, one after the other. Empty packets do not count.

        A packet that failed takes its place without data; it is an error when there is nothing else.
        """
        timer = Timer(timeout)
        size = self._max_packet_size(endpoint)
        if not size:
            return Transferred(Status.INVAL, 0)
        packets = -(-len(room) // size)
        status = self._start_iso(endpoint, min(packets, MAX_STREAM_PACKETS), IN_TRANSFERS, timer)
        if status != Status.SUCCESS:
            return Transferred(status, 0)
        total = received = 0
        while status != Status.TIMEOUT and received < packets and total < len(room):
            status, length = self._receive(endpoint, room[total:], timer)
            total += length
            received += length > 0 or status != Status.SUCCESS
            if timer.is_over():  # the host may send empty packets for ever
                status = status or Status.TIMEOUT
                break
        return Transferred(Status.SUCCESS, total) if total else self._concluded(endpoint, Transferred(status, 0), timer)

    def iso_out(self, endpoint: int, data: bytes, timeout: float | None) -> Transferred:
        """Write *data* in packets; returns when the bus has had the time for them, or the time is over."""
        timer = Timer(timeout)
        size = self._max_packet_size(endpoint)
        if not size or not data:
            return Transferred(Status.INVAL if not size else Status.SUCCESS, 0)
        packets = [data[start : start + size] for start in range(0, len(data), size)]
        # As many transfers as the data fills, twice: a host begins to send when half of them are full.
        per_transfer = max(n for n in range(1, MAX_STREAM_PACKETS + 1) if len(packets) % n == 0)
        transfers = min(MAX_STREAM_TRANSFERS, 2 * len(packets) // per_transfer)
        status = self._pace(endpoint, timer)  # for a call before whose time was over
        if status == Status.SUCCESS:
            status = self._start_iso(endpoint, per_transfer, transfers, timer)
        if status != Status.SUCCESS:
            return self._concluded(endpoint, Transferred(status, 0), timer)
        return self._concluded(endpoint, self._send_iso(endpoint, packets, timer), timer)

    def _send_iso(self, endpoint: int, packets: Sequence[bytes], timer: Timer) -> Transferred:
        """Send packets on a stream, and wait as long as the bus takes for them."""
        begin = now = time.monotonic()
        before = self._sent_until.get(endpoint, now)
        if now - before < LATENESS:
            begin = before
        period = self._packet_period(endpoint)
        sent = 0
        for number, packet in enumerate(packets, 1):
            if self.guest.iso_out(endpoint, packet, timeout=timer.left()) == Status.STALL:
                return Transferred(Status.STALL, 0)  # the host has ended the stream; it goes on after other failures
            sent += len(packet)
            self._sent_until[endpoint] = begin + number * period
            if timer.is_over():
                return Transferred(Status.TIMEOUT, sent)
        status = self._pace(endpoint, timer)
        return Transferred(status, sent if status in (Status.SUCCESS, Status.TIMEOUT) else 0)

    def _pace(self, endpoint: int, timer: Timer) -> int:
        """Wait until the bus has had the time for what was sent: a host drops what it has no place for.

        TIMEOUT when the time is over before; the status with which the host has ended the stream, or IOERROR when
        it was stopped, as soon as that happens.
        """
        due = self._sent_until.get(endpoint, 0.0) - time.monotonic()
        if due <= 0:
            return Status.SUCCESS
        left = timer.left()
        in_time = left is None or due <= left
        status = self._receive(endpoint, NO_ROOM, Timer(due if in_time else left)).status
        return Status.SUCCESS if in_time and status == Status.TIMEOUT else status

    def _packet_period(self, endpoint: int) -> float:
        unit = FRAME if self._speed in (Speed.LOW, Speed.FULL) else MICROFRAME
        interval = self._endpoints.interval[endpoint_index(endpoint)]
        return min(float(unit * (1 << min(max(interval, 1), 16) - 1)), LONGEST_PERIOD)

    # ------------------------------------------------------------ streams

    def stop_streams(self, interface: int | None = None) -> None:
        """Stop the streams of an interface, or all; what they brought and nobody read is dropped. Raises nothing."""
        with self._changing:
            self._stop_all(interface)

    def _stop_all(self, interface: int | None) -> None:
        for endpoint, stream in list(self._streams.items()):
            if interface in (None, stream.interface):
                self._stop(endpoint)

    def _stop(self, endpoint: int, timeout: float = REQUEST_TIMEOUT) -> None:
        stream = self._streams.pop(endpoint)
        self._sent_until.pop(endpoint, None)
        with contextlib.suppress(UsbRedirError, OSError):
            stream.stop(endpoint, timeout=timeout)

    def _start_interrupt(self, endpoint: int, timer: Timer) -> int:
        guest = self.guest
        stream = OpenStream(TransferType.INTERRUPT, self._interface(endpoint), 1, guest.stop_interrupt_receiving)
        return self._start(
            endpoint, stream, lambda left: guest.start_interrupt_receiving(endpoint, timeout=left), timer
        )

    def _start_iso(self, endpoint: int, packets: int, transfers: int, timer: Timer) -> int:
        guest = self.guest
        stream = OpenStream(TransferType.ISO, self._interface(endpoint), packets, guest.stop_iso_stream)
        return self._start(
            endpoint, stream, lambda left: guest.start_iso_stream(endpoint, packets, transfers, timeout=left), timer
        )

    def _start(self, endpoint: int, stream: OpenStream, start: Callable[[float], int], timer: Timer) -> int:
        """Start a stream unless it is running. Writing other amounts than before needs another shape."""
        if self._endpoints.type[endpoint_index(endpoint)] != stream.kind:
            return Status.INVAL  # a host has no answer for an endpoint that it does not know
        with self._changing:
            present = self._streams.get(endpoint)
            if present is not None:
                if present.packets == stream.packets or endpoint & 0x80:
                    return Status.SUCCESS
                self._stop(endpoint, timer.at_most(REQUEST_TIMEOUT))
            status = start(timer.at_most(REQUEST_TIMEOUT))
            if status == Status.SUCCESS:
                self._streams[endpoint] = stream
            return status

    def _receive(self, endpoint: int, room: memoryview, timer: Timer) -> Transferred:
        """The next packet of a stream, or the status that ended it."""
        try:
            return _put(self.guest.receive(endpoint, timeout=timer.left()), room)
        except LocalProtocolError:  # so much came while nobody read that some was dropped
            return Transferred(Status.IOERROR, 0)

    def _concluded(self, endpoint: int, result: Transferred, timer: Timer) -> Transferred:
        """The result; the stream is stopped if it is an error, so that the next transfer starts it anew."""
        if result.status not in (Status.SUCCESS, Status.TIMEOUT):
            with self._changing:
                self._sent_until.pop(endpoint, None)  # also when somebody else has stopped it
                if endpoint in self._streams:
                    self._stop(endpoint, timer.at_most(REQUEST_TIMEOUT))
        return result

    # ------------------------------------------------------------ endpoints

    @property
    def _endpoints(self) -> EpInfo:
        info = self.guest.endpoints
        if info is None:
            raise DeviceLostError("the host has announced no endpoints")
        return info

    def _interface(self, endpoint: int) -> int:
        return self._endpoints.interface[endpoint_index(endpoint)]

    def _max_packet_size(self, endpoint: int) -> int:
        """In bytes; 0: there is no such endpoint now, or the host does not tell."""
        info, index = self._endpoints, endpoint_index(endpoint)
        if info.type[index] == TransferType.INVALID or not info.max_packet_size:
            return 0
        return info.max_packet_size[index]


def _put(result: TransferResult, room: memoryview) -> Transferred:
    """Copy what was received into *room*; more than fits is a babble."""
    length = len(result.data)
    if length > len(room):
        return Transferred(Status.BABBLE, 0)
    room[:length] = result.data
    return Transferred(result.status, length)
