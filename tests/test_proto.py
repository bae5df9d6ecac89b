"""The numbers of the wire, against the protocol's tables."""

from __future__ import annotations

from enum import Enum

import pytest

from usbredir import proto
from usbredir.proto import (
    MAX_BULK,
    MAX_INTERFACES,
    MAX_PACKET,
    Capability,
    Direction,
    PacketType,
    Speed,
    Status,
    TransferType,
    endpoint_address,
    endpoint_index,
)

NUMBERS: list[tuple[type[Enum], str]] = [
    (Status, "SUCCESS 0, CANCELLED 1, INVAL 2, IOERROR 3, STALL 4, TIMEOUT 5, BABBLE 6"),
    (Speed, "LOW 0, FULL 1, HIGH 2, SUPER 3, UNKNOWN 255"),
    (TransferType, "CONTROL 0, ISO 1, BULK 2, INTERRUPT 3, INVALID 255"),
    (
        Capability,
        "BULK_STREAMS 0, CONNECT_DEVICE_VERSION 1, FILTER 2, DEVICE_DISCONNECT_ACK 3, EP_INFO_MAX_PACKET_SIZE 4, "
        "IDS_64BITS 5, BULK_LENGTH_32BITS 6, BULK_RECEIVING 7",
    ),
]


@pytest.mark.parametrize(("enum", "expected"), NUMBERS)
def test_values_are_the_wire_s(enum: type[Enum], expected: str) -> None:
    assert ", ".join(f"{member.name} {member.value}" for member in enum) == expected


def test_packet_types() -> None:
    assert [int(member) for member in PacketType] == [*range(28), *range(100, 105)]


def test_members_are_numbers() -> None:
    assert [Status.STALL, Speed.SUPER] == [4, 3]
    assert PacketType(101) is PacketType.BULK_PACKET
    assert {1: "x"}[Capability.CONNECT_DEVICE_VERSION] == "x"


def test_directions() -> None:
    assert [member.name for member in Direction] == ["HOST_TO_GUEST", "GUEST_TO_HOST", "BOTH"]


def test_sizes() -> None:
    assert (MAX_PACKET, MAX_BULK, MAX_INTERFACES) == (134218752, 134217728, 32)


def test_endpoint_slots() -> None:
    """OUT endpoints are 0 to 15, IN endpoints 16 to 31; each address has its own."""
    addresses = [*range(16), *range(0x80, 0x90)]
    assert [endpoint_index(address) for address in addresses] == list(range(32))
    assert [endpoint_address(index) for index in range(32)] == addresses


def test_everything_public_is_listed() -> None:
    assert sorted(proto.__all__) == sorted(
        name
        for name in vars(proto)
        if name.isidentifier() and name[0] != "_" and name not in ("Enum", "IntEnum", "annotations")
    )
