"""What a guest can ask of a device: each function makes a :class:`Request`, which a guest sends and has answered.

The blocking calls of :class:`usbredir.guest.Guest`, its futures (``guest.submit(bulk_in(0x81, 512))``) and the
coroutines of :mod:`usbredir.aio` are these functions: what they take and what they give is written down once, here.

*timeout* is in seconds, None waits for ever. A transfer whose time is over is cancelled at the host and gives status
TIMEOUT; any other request raises TimeoutError. Source: docs/protocol.md; docs/guest.md.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar

from .device import TransferResult
from .packets import (
    AllocBulkStreams,
    AltSettingStatus,
    BulkPacket,
    BulkReceivingStatus,
    BulkStreamsStatus,
    ConfigurationStatus,
    ControlPacket,
    FreeBulkStreams,
    GetAltSetting,
    GetConfiguration,
    InterruptPacket,
    InterruptReceivingStatus,
    IsoStreamStatus,
    Packet,
    SetAltSetting,
    SetConfiguration,
    StartBulkReceiving,
    StartInterruptReceiving,
    StartIsoStream,
    StopBulkReceiving,
    StopInterruptReceiving,
    StopIsoStream,
)
from .proto import Status, endpoint_index

__all__ = [
    "Request",
    "StreamRequest",
    "TransferRequest",
    "alloc_streams",
    "bulk_in",
    "bulk_out",
    "clear_halt",
    "control_in",
    "control_out",
    "free_streams",
    "get_alt_setting",
    "get_configuration",
    "get_descriptor",
    "interrupt_out",
    "like",
    "set_alt_setting",
    "set_configuration",
    "start_bulk_receiving",
    "start_interrupt_receiving",
    "start_iso_stream",
    "stop_bulk_receiving",
    "stop_interrupt_receiving",
    "stop_iso_stream",
]

CLEAR_FEATURE = 1
GET_DESCRIPTOR = 6
DESCRIPTOR_TIMEOUT = 5.0
"""Seconds that a device has for a descriptor."""

T = TypeVar("T")
Data = bytes | bytearray | memoryview


class Shape:
    """What the packets of one kind of request have in common.

    Attributes:
        packet_type: their class.
        names: the fields that a request gives beside the id; the others have their defaults.
        answers: classes of packets that may answer them.
        stop: they start a stream; what stops it again.
    """

    def __init__(
        self,
        packet_type: type[Packet],
        *names: str,
        answers: tuple[type[Packet], ...] = (),
        stop: Callable[..., Packet] | None = None,
    ) -> None:
        self.packet_type = packet_type
        self.names = names
        self.answers = answers or (packet_type,)
        self.stop = stop


class Request(Generic[T]):
    """A packet to be sent, and how its answer is read.

    Attributes:
        shape: its class and the names of its fields.
        values: their values, in the same order.
        timeout: seconds until it is given up, or None.
        cancellable: whether the host can be told to give it up.
    """

    __slots__ = ("shape", "values", "timeout")
    cancellable = False

    def __init__(self, shape: Shape, values: tuple[Any, ...], timeout: float | None) -> None:
        self.shape = shape
        self.values = values
        self.timeout = timeout

    def read(self, answer: Any) -> T:
        """The result that *answer* means."""
        raise NotImplementedError

    def given_up(self, status: Status, data: Data = b"") -> T:
        """The result after a cancellation, with the data that came before it. Only when it is cancellable."""
        raise NotImplementedError

    def __repr__(self) -> str:
        values = ", ".join(f"{n}={v!r}" for n, v in zip(self.shape.names, self.values, strict=True) if n != "data")
        return f"<Request {self.shape.packet_type.__name__}({values})>"


class _ConfigurationRequest(Request[tuple[int, int]]):
    __slots__ = ()

    def read(self, answer: ConfigurationStatus) -> tuple[int, int]:
        return answer.status, answer.configuration


class _AlternateRequest(Request[tuple[int, int]]):
    __slots__ = ()

    def read(self, answer: AltSettingStatus) -> tuple[int, int]:
        return answer.status, answer.alt


class _BulkStreamsRequest(Request[tuple[int, int]]):
    __slots__ = ()

    def read(self, answer: BulkStreamsStatus) -> tuple[int, int]:
        return answer.status, answer.no_streams


class StreamRequest(Request[int]):
    """Start or stop of a stream; its first value is the endpoint's address."""

    __slots__ = ()

    @property
    def endpoint(self) -> int:
        """Address of the endpoint."""
        return int(self.values[0])

    def read(self, answer: IsoStreamStatus | InterruptReceivingStatus | BulkReceivingStatus) -> int:
        """The status."""
        return answer.status


class TransferRequest(Request[TransferResult]):
    """A control, bulk or interrupt transfer; its values begin with the endpoint's address, and the length or data."""

    __slots__ = ()
    cancellable = True

    def read(self, answer: ControlPacket | BulkPacket | InterruptPacket) -> TransferResult:
        """Status and data; more data than was asked for is a babble."""
        data = answer.data
        if data and self.values[0] & 0x80 and len(data) > self.values[1]:
            return TransferResult(Status.BABBLE, data[: self.values[1]])
        return TransferResult(answer.status, data)

    def given_up(self, status: Status, data: Data = b"") -> TransferResult:
        """The result of a transfer that was cancelled."""
        return TransferResult(status, data[: self.values[1]] if self.values[0] & 0x80 else b"")


class _DescriptorRequest(Request[bytes]):
    __slots__ = ()
    cancellable = True

    def read(self, answer: ControlPacket) -> bytes:
        return bytes(answer.data[: self.values[1]]) if answer.status == Status.SUCCESS else b""

    def given_up(self, status: Status, data: Data = b"") -> bytes:
        return b""


# The type of a stream's answer is of the endpoint's kind, not of the request's.
STREAM_ANSWERS = (IsoStreamStatus, InterruptReceivingStatus, BulkReceivingStatus)

GET_CONFIGURATION = Shape(GetConfiguration, answers=(ConfigurationStatus,))
SET_CONFIGURATION = Shape(SetConfiguration, "configuration", answers=(ConfigurationStatus,))
GET_ALT_SETTING = Shape(GetAltSetting, "interface", answers=(AltSettingStatus,))
SET_ALT_SETTING = Shape(SetAltSetting, "interface", "alt", answers=(AltSettingStatus,))
CONTROL_IN = Shape(ControlPacket, "endpoint", "length", "requesttype", "request", "value", "index")
CONTROL_OUT = Shape(ControlPacket, "endpoint", "data", "requesttype", "request", "value", "index")
BULK_IN = Shape(BulkPacket, "endpoint", "length", "stream_id")
BULK_OUT = Shape(BulkPacket, "endpoint", "data", "stream_id")
INTERRUPT_OUT = Shape(InterruptPacket, "endpoint", "data")
START_INTERRUPT = Shape(StartInterruptReceiving, "endpoint", answers=STREAM_ANSWERS, stop=StopInterruptReceiving)
STOP_INTERRUPT = Shape(StopInterruptReceiving, "endpoint", answers=STREAM_ANSWERS)
START_BULK = Shape(
    StartBulkReceiving,
    "endpoint",
    "bytes_per_transfer",
    "no_transfers",
    answers=STREAM_ANSWERS,
    stop=StopBulkReceiving,
)
STOP_BULK = Shape(StopBulkReceiving, "endpoint", answers=STREAM_ANSWERS)
START_ISO = Shape(StartIsoStream, "endpoint", "pkts_per_urb", "no_urbs", answers=STREAM_ANSWERS, stop=StopIsoStream)
STOP_ISO = Shape(StopIsoStream, "endpoint", answers=STREAM_ANSWERS)
ALLOC_STREAMS = Shape(AllocBulkStreams, "endpoints", "no_streams", answers=(BulkStreamsStatus,))
FREE_STREAMS = Shape(FreeBulkStreams, "endpoints", answers=(BulkStreamsStatus,))


def like(make: Callable[..., Request[Any]], method: Callable[..., Any]) -> None:
    """Let *method*, which sends what *make* makes, show its name, arguments and text."""
    method.__name__ = make.__name__
    method.__doc__ = make.__doc__
    signature = inspect.signature(make)
    itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    shown = signature.replace(
        parameters=[itself, *signature.parameters.values()], return_annotation=inspect.Signature.empty
    )
    method.__signature__ = shown  # type: ignore[attr-defined]


# ---------------------------------------------------------------- configuration


def get_configuration(*, timeout: float | None = None) -> Request[tuple[int, int]]:
    """(status, configuration value; 0 = unconfigured)."""
    return _ConfigurationRequest(GET_CONFIGURATION, (), timeout)


def set_configuration(value: int, *, timeout: float | None = None) -> Request[tuple[int, int]]:
    """Select a configuration; (status, configuration value now active)."""
    return _ConfigurationRequest(SET_CONFIGURATION, (value,), timeout)


def get_alt_setting(interface: int, *, timeout: float | None = None) -> Request[tuple[int, int]]:
    """(status, alternate setting of *interface*)."""
    return _AlternateRequest(GET_ALT_SETTING, (interface,), timeout)


def set_alt_setting(interface: int, alt: int, *, timeout: float | None = None) -> Request[tuple[int, int]]:
    """Select an alternate setting; (status, alternate setting now active)."""
    return _AlternateRequest(SET_ALT_SETTING, (interface, alt), timeout)


# ---------------------------------------------------------------- transfers


def control_in(
    request_type: int, request: int, value: int, index: int, length: int, *, timeout: float | None = None
) -> Request[TransferResult]:
    """A control transfer with an IN data stage of up to *length* bytes (at most 65535)."""
    return TransferRequest(CONTROL_IN, (0x80, length, request_type, request, value, index), timeout)


def control_out(
    request_type: int, request: int, value: int, index: int, data: Data = b"", *, timeout: float | None = None
) -> Request[TransferResult]:
    """A control transfer with an OUT data stage, or none."""
    return TransferRequest(CONTROL_OUT, (0, _snapshot(data), request_type, request, value, index), timeout)


def get_descriptor(
    kind: int, index: int = 0, length: int = 255, *, language: int = 0, timeout: float | None = DESCRIPTOR_TIMEOUT
) -> Request[bytes]:
    """A descriptor of the device, empty when it has none. *length* is the most to ask for, in bytes."""
    return _DescriptorRequest(CONTROL_IN, (0x80, length, 0x80, GET_DESCRIPTOR, kind << 8 | index, language), timeout)


def clear_halt(endpoint: int, *, timeout: float | None = None) -> Request[TransferResult]:
    """Clear the halt of an endpoint."""
    return control_out(0x02, CLEAR_FEATURE, 0, endpoint, timeout=timeout)


def bulk_in(endpoint: int, length: int, *, stream_id: int = 0, timeout: float | None = None) -> Request[TransferResult]:
    """Read up to *length* bytes, at most 128 MiB."""
    return TransferRequest(BULK_IN, (endpoint, length, stream_id), timeout)


def bulk_out(endpoint: int, data: Data, *, stream_id: int = 0, timeout: float | None = None) -> Request[TransferResult]:
    """Write *data*, at most 128 MiB."""
    return TransferRequest(BULK_OUT, (endpoint, _snapshot(data), stream_id), timeout)


def interrupt_out(endpoint: int, data: Data, *, timeout: float | None = None) -> Request[TransferResult]:
    """Write *data* to an interrupt endpoint, at most one packet."""
    return TransferRequest(INTERRUPT_OUT, (endpoint, _snapshot(data)), timeout)


# ---------------------------------------------------------------- streams


def start_interrupt_receiving(endpoint: int, *, timeout: float | None = None) -> Request[int]:
    """Start polling an interrupt IN endpoint. Gives a status."""
    return StreamRequest(START_INTERRUPT, (endpoint,), timeout)


def stop_interrupt_receiving(endpoint: int, *, timeout: float | None = None) -> Request[int]:
    """Stop polling an interrupt IN endpoint; what was not taken is dropped. Gives a status."""
    return StreamRequest(STOP_INTERRUPT, (endpoint,), timeout)


def start_bulk_receiving(
    endpoint: int, bytes_per_transfer: int, transfers: int = 5, *, timeout: float | None = None
) -> Request[int]:
    """Start reading a bulk IN endpoint ahead, with so many transfers at a time (1 to 16). Gives a status."""
    return StreamRequest(START_BULK, (endpoint, bytes_per_transfer, transfers), timeout)


def stop_bulk_receiving(endpoint: int, *, timeout: float | None = None) -> Request[int]:
    """Stop reading a bulk IN endpoint ahead; what was not taken is dropped. Gives a status."""
    return StreamRequest(STOP_BULK, (endpoint,), timeout)


def start_iso_stream(
    endpoint: int, packets_per_transfer: int = 8, transfers: int = 4, *, timeout: float | None = None
) -> Request[int]:
    """Start an isochronous stream: *transfers* (1 to 16) of so many packets (1 to 32) at a time. Gives a status.

    The more, the longer the delay and the longer an interruption that does no harm. OUT: the device is sent packets
    once half of the host's buffer is filled.
    """
    return StreamRequest(START_ISO, (endpoint, packets_per_transfer, transfers), timeout)


def stop_iso_stream(endpoint: int, *, timeout: float | None = None) -> Request[int]:
    """Stop an isochronous stream; what was not taken, or not sent yet, is dropped. Gives a status."""
    return StreamRequest(STOP_ISO, (endpoint,), timeout)


def alloc_streams(endpoints: Iterable[int], count: int, *, timeout: float | None = None) -> Request[tuple[int, int]]:
    """Allocate *count* bulk streams on each of some endpoint addresses (USB 3); (status, streams granted)."""
    return _BulkStreamsRequest(ALLOC_STREAMS, (_endpoint_mask(endpoints), count), timeout)


def free_streams(endpoints: Iterable[int], *, timeout: float | None = None) -> Request[tuple[int, int]]:
    """Free the bulk streams of some endpoint addresses; (status, 0)."""
    return _BulkStreamsRequest(FREE_STREAMS, (_endpoint_mask(endpoints),), timeout)


def _snapshot(data: Data) -> bytes:
    """What was given may change before it is written."""
    return data if type(data) is bytes else bytes(data)


def _endpoint_mask(endpoints: Iterable[int]) -> int:
    mask = 0
    for address in endpoints:
        if address & ~0x8F:
            raise ValueError(f"0x{address:x} is not an endpoint address")
        mask |= 1 << endpoint_index(address)
    return mask
