"""What a person writes down of a device: endpoints, interfaces, associations, configurations.

::

    interfaces = [interface(0xFF, bulk_out(0x01), bulk_in(0x81), interrupt_in(0x82, 8, period=0.01))]

The same for every speed; :mod:`usbredir.virtual.description` tells what becomes of it at one. Source: USB 2.0, 9.6.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from ..proto import Speed, TransferType

__all__ = [
    "Association",
    "ConfigurationDeclaration",
    "EndpointDeclaration",
    "InterfaceDeclaration",
    "association",
    "bulk_in",
    "bulk_out",
    "check_bytes",
    "check_range",
    "configuration",
    "interface",
    "interrupt_in",
    "interrupt_out",
    "iso_in",
    "iso_out",
]

Sizes = int | Mapping[Speed, int]
"""Bytes, for every speed or by speed."""
Extra = bytes | Sequence[bytes]
"""Class-specific descriptors, in one piece or several."""
BULK, INTERRUPT, ISO = TransferType.BULK, TransferType.INTERRUPT, TransferType.ISO

# ---------------------------------------------------------------- endpoints

_MOST_BURST = 15
_MOST_STREAMS = 65536
_FEWEST_STREAMS = 2
Synchronization = Literal["none", "asynchronous", "adaptive", "synchronous"]
Usage = Literal["data", "feedback", "implicit"]
_SYNCHRONIZATIONS: Mapping[str, int] = {"none": 0, "asynchronous": 1, "adaptive": 2, "synchronous": 3}
_USAGES: Mapping[str, int] = {"data": 0, "feedback": 1, "implicit": 2}


@dataclass(frozen=True)
class EndpointDeclaration:
    """An endpoint at every speed; made by :func:`bulk_in` and its kind.

    Attributes:
        size: bytes of a bulk packet, or most bytes per interval; None or a missing speed: the usual size.
        period: seconds between two intervals. At a speed it becomes the longest interval that is no longer, if
            there is one.
        interval: bInterval itself, in place of *period*.
        usage: bits 2 to 5 of bmAttributes.
    """

    address: int
    type: TransferType
    size: Sizes | None = None
    period: float = 0.0
    interval: int | None = None
    max_burst: int = 0
    max_streams: int = 0
    usage: int = 0
    tail: bytes = b""
    extra: bytes = b""

    def error(self, why: str) -> ValueError:
        """What is wrong with it."""
        return ValueError(f"endpoint 0x{self.address:02x}: {why}")


def _endpoint(address: int, kind: TransferType, incoming: bool, **options: object) -> EndpointDeclaration:
    declared = EndpointDeclaration(address, kind, **options)  # type: ignore[arg-type]
    first = 0x81 if incoming else 0x01
    if not first <= address <= first + 14:
        way = "IN" if incoming else "OUT"
        raise declared.error(f"the address of an {way} endpoint is 0x{first:02x} to 0x{first + 14:02x}")
    if declared.period < 0 or not 0 <= declared.max_burst <= _MOST_BURST:
        raise declared.error("a period is at least 0 seconds, and a burst 0 to 15 packets beyond the first")
    streams = declared.max_streams
    if streams and (streams & (streams - 1) or not _FEWEST_STREAMS <= streams <= _MOST_STREAMS):
        raise declared.error(f"max_streams is a power of 2 from 2 to 65536, not {streams}")
    return declared


def bulk_in(
    address: int, *, size: Sizes | None = None, max_burst: int = 0, max_streams: int = 0, extra: Extra = b""
) -> EndpointDeclaration:
    """A bulk endpoint towards the host.

    Args:
        address: 0x81 to 0x8F.
        size: bytes per packet. None: 64, 512 or 1024, by the speed.
        max_burst: packets per burst beyond the first, at super speed.
        max_streams: streams at super speed: 0 or a power of 2.
        extra: class-specific descriptors behind the endpoint's.

    Raises ValueError.
    """
    return _endpoint(address, BULK, True, size=size, max_burst=max_burst, max_streams=max_streams, extra=_joined(extra))


def bulk_out(
    address: int, *, size: Sizes | None = None, max_burst: int = 0, max_streams: int = 0, extra: Extra = b""
) -> EndpointDeclaration:
    """A bulk endpoint from the host, 0x01 to 0x0F; otherwise as :func:`bulk_in`."""
    return _endpoint(
        address, BULK, False, size=size, max_burst=max_burst, max_streams=max_streams, extra=_joined(extra)
    )


def interrupt_in(
    address: int,
    size: Sizes | None = None,
    *,
    period: float = 0.01,
    interval: int | None = None,
    extra: Extra = b"",
) -> EndpointDeclaration:
    """An interrupt endpoint towards the host.

    Args:
        address: 0x81 to 0x8F.
        size: most bytes per interval. None: 64, or 8 at low speed.
        period: seconds between two packets; rounded down to what the speed has.
        interval: bInterval itself, in place of *period*.
        extra: class-specific descriptors behind the endpoint's.

    Raises ValueError.
    """
    return _endpoint(address, INTERRUPT, True, size=size, period=period, interval=interval, extra=_joined(extra))


def interrupt_out(
    address: int,
    size: Sizes | None = None,
    *,
    period: float = 0.01,
    interval: int | None = None,
    extra: Extra = b"",
) -> EndpointDeclaration:
    """An interrupt endpoint from the host, 0x01 to 0x0F; otherwise as :func:`interrupt_in`."""
    return _endpoint(address, INTERRUPT, False, size=size, period=period, interval=interval, extra=_joined(extra))


def iso_in(
    address: int,
    size: Sizes,
    *,
    period: float = 0.001,
    interval: int | None = None,
    synchronization: Synchronization = "none",
    usage: Usage = "data",
    tail: bytes = b"",
    extra: Extra = b"",
) -> EndpointDeclaration:
    """An isochronous endpoint towards the host.

    Args:
        address: 0x81 to 0x8F.
        size: most bytes per interval.
        period: seconds between two packets; rounded down to what the speed has.
        interval: bInterval itself, in place of *period*.
        synchronization: by whose clock it runs.
        usage: what the data are.
        tail: bytes of the endpoint descriptor beyond the usual seven, as audio endpoints have.
        extra: class-specific descriptors behind the endpoint's.

    Raises ValueError.
    """
    bits = _SYNCHRONIZATIONS[synchronization] | _USAGES[usage] << 2
    return _endpoint(
        address, ISO, True, size=size, period=period, interval=interval, usage=bits, tail=tail, extra=_joined(extra)
    )


def iso_out(
    address: int,
    size: Sizes,
    *,
    period: float = 0.001,
    interval: int | None = None,
    synchronization: Synchronization = "none",
    usage: Usage = "data",
    tail: bytes = b"",
    extra: Extra = b"",
) -> EndpointDeclaration:
    """An isochronous endpoint from the host, 0x01 to 0x0F; otherwise as :func:`iso_in`."""
    bits = _SYNCHRONIZATIONS[synchronization] | _USAGES[usage] << 2
    return _endpoint(
        address, ISO, False, size=size, period=period, interval=interval, usage=bits, tail=tail, extra=_joined(extra)
    )


def _joined(extra: Extra) -> bytes:
    return bytes(extra) if isinstance(extra, bytes | bytearray) else b"".join(extra)


# ---------------------------------------------------------------- interfaces and configurations


@dataclass(frozen=True)
class InterfaceDeclaration:
    """One alternate setting of an interface; made by :func:`interface`."""

    interface_class: int
    endpoints: tuple[EndpointDeclaration, ...] = ()
    subclass: int = 0
    protocol: int = 0
    name: str | None = None
    number: int | None = None
    alternate: int = 0
    extra: bytes = b""
    descriptors: Mapping[int, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Association:
    """Interfaces that are one function; made by :func:`association`."""

    interfaces: tuple[InterfaceDeclaration, ...]
    function_class: int
    subclass: int
    protocol: int
    name: str | None = None


@dataclass(frozen=True)
class ConfigurationDeclaration:
    """A configuration; made by :func:`configuration`. None: as the device says."""

    interfaces: tuple[InterfaceDeclaration | Association, ...]
    value: int | None = None
    name: str | None = None
    max_power: int | None = None
    self_powered: bool | None = None
    remote_wakeup: bool | None = None


def interface(
    interface_class: int,
    *endpoints: EndpointDeclaration,
    subclass: int = 0,
    protocol: int = 0,
    name: str | None = None,
    number: int | None = None,
    alternate: int = 0,
    extra: Extra = b"",
    descriptors: Mapping[int, bytes] | None = None,
) -> InterfaceDeclaration:
    """One alternate setting of an interface.

    Args:
        interface_class: bInterfaceClass; 0xFF is vendor-specific.
        endpoints: in the order in which they are described.
        subclass: bInterfaceSubClass.
        protocol: bInterfaceProtocol.
        name: text of its string descriptor.
        number: None: the next one, or that of the interface before when *alternate* is not 0.
        alternate: bAlternateSetting.
        extra: class-specific descriptors between the interface's and its first endpoint's.
        descriptors: what GET_DESCRIPTOR of the interface answers, by descriptor type, such as
            ``{0x22: report_descriptor}`` of a HID.

    Raises ValueError for a number that is no byte.
    """
    check_bytes(interface_class=interface_class, subclass=subclass, protocol=protocol)
    check_bytes(number=number or 0, alternate=alternate)
    return InterfaceDeclaration(
        interface_class, endpoints, subclass, protocol, name, number, alternate, _joined(extra), descriptors or {}
    )


def association(
    *interfaces: InterfaceDeclaration,
    function_class: int | None = None,
    subclass: int | None = None,
    protocol: int | None = None,
    name: str | None = None,
) -> Association:
    """Interfaces with consecutive numbers that are one function, such as the two of a serial port (CDC-ACM).

    Class, subclass and protocol are those of the first interface if not told. Raises ValueError without interfaces.
    """
    if not interfaces:
        raise ValueError("an association has at least one interface")
    first = interfaces[0]
    function_class = first.interface_class if function_class is None else function_class
    subclass = first.subclass if subclass is None else subclass
    protocol = first.protocol if protocol is None else protocol
    check_bytes(function_class=function_class, subclass=subclass, protocol=protocol)
    return Association(interfaces, function_class, subclass, protocol, name)


def configuration(
    *interfaces: InterfaceDeclaration | Association,
    value: int | None = None,
    name: str | None = None,
    max_power: int | None = None,
    self_powered: bool | None = None,
    remote_wakeup: bool | None = None,
) -> ConfigurationDeclaration:
    """A configuration.

    Args:
        interfaces: alternate settings and associations, in the order in which they are described.
        value: bConfigurationValue; None: counted from 1.
        name: text of its string descriptor.
        max_power: mA.
        self_powered: has its own power supply.
        remote_wakeup: can wake the host.

    What is None is as the device's attributes say. Raises ValueError for a value that is no byte.
    """
    check_bytes(value=value or 0)
    return ConfigurationDeclaration(interfaces, value, name, max_power, self_powered, remote_wakeup)


def check_bytes(**values: int) -> None:
    """Raises ValueError for the first value that is no byte."""
    check_range(0xFF, **values)


def check_range(most: int, **values: int) -> None:
    """Raises ValueError for the first value that is not 0 to *most*."""
    for name, value in values.items():
        if not 0 <= value <= most:
            raise ValueError(f"{name} is 0 to {most}, not {value}")
