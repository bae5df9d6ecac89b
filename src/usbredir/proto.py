"""Numbers of the wire: packet types, statuses, speeds, capabilities and limits.

Source: the usbredir protocol, version 0.7.1 (docs/protocol.md).
"""

from __future__ import annotations

from enum import Enum, IntEnum

__all__ = [
    "MAX_BULK",
    "MAX_INTERFACES",
    "MAX_PACKET",
    "Capability",
    "Direction",
    "PacketType",
    "Speed",
    "Status",
    "TransferType",
    "endpoint_address",
    "endpoint_index",
]

MAX_BULK = 128 * 1024 * 1024
"""Longest bulk transfer, in bytes."""
MAX_PACKET = MAX_BULK + 1024
"""Largest value of a packet header's length field."""
MAX_INTERFACES = 32
"""Most interfaces of a configuration."""


class Direction(Enum):
    """Who may send a packet."""

    HOST_TO_GUEST = "host to guest"
    GUEST_TO_HOST = "guest to host"
    BOTH = "both"


class PacketType(IntEnum):
    """Type numbers of the packet header."""

    HELLO = 0
    DEVICE_CONNECT = 1
    DEVICE_DISCONNECT = 2
    RESET = 3
    INTERFACE_INFO = 4
    EP_INFO = 5
    SET_CONFIGURATION = 6
    GET_CONFIGURATION = 7
    CONFIGURATION_STATUS = 8
    SET_ALT_SETTING = 9
    GET_ALT_SETTING = 10
    ALT_SETTING_STATUS = 11
    START_ISO_STREAM = 12
    STOP_ISO_STREAM = 13
    ISO_STREAM_STATUS = 14
    START_INTERRUPT_RECEIVING = 15
    STOP_INTERRUPT_RECEIVING = 16
    INTERRUPT_RECEIVING_STATUS = 17
    ALLOC_BULK_STREAMS = 18
    FREE_BULK_STREAMS = 19
    BULK_STREAMS_STATUS = 20
    CANCEL_DATA_PACKET = 21
    FILTER_REJECT = 22
    FILTER_FILTER = 23
    DEVICE_DISCONNECT_ACK = 24
    START_BULK_RECEIVING = 25
    STOP_BULK_RECEIVING = 26
    BULK_RECEIVING_STATUS = 27
    CONTROL_PACKET = 100
    BULK_PACKET = 101
    ISO_PACKET = 102
    INTERRUPT_PACKET = 103
    BUFFERED_BULK_PACKET = 104


class Status(IntEnum):
    """Result of a request or transfer. Unknown values count as errors."""

    SUCCESS = 0
    CANCELLED = 1
    INVAL = 2
    IOERROR = 3
    STALL = 4
    TIMEOUT = 5
    BABBLE = 6


class Speed(IntEnum):
    """Speed of a device."""

    LOW = 0
    FULL = 1
    HIGH = 2
    SUPER = 3
    UNKNOWN = 255


class TransferType(IntEnum):
    """Type of an endpoint, in USB's numbers; INVALID stands for "no such endpoint"."""

    CONTROL = 0
    ISO = 1
    BULK = 2
    INTERRUPT = 3
    INVALID = 255


class Capability(IntEnum):
    """Bit numbers of the capability word in hello."""

    BULK_STREAMS = 0
    CONNECT_DEVICE_VERSION = 1
    FILTER = 2
    DEVICE_DISCONNECT_ACK = 3
    EP_INFO_MAX_PACKET_SIZE = 4
    IDS_64BITS = 5
    BULK_LENGTH_32BITS = 6
    BULK_RECEIVING = 7


def endpoint_index(address: int) -> int:
    """Slot of an endpoint address in the arrays of 32: OUT 0-15, IN 16-31."""
    return (address & 0x0F) | ((address & 0x80) >> 3)


def endpoint_address(index: int) -> int:
    """Endpoint address of a slot in the arrays of 32."""
    return (index & 0x0F) | ((index & 0x10) << 3)
