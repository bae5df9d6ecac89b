"""Microsoft's descriptors, byte for byte after the tables of its documents; and what a device with them answers."""

from __future__ import annotations

import pytest

from usbredir.device import Transfer
from usbredir.proto import Speed, Status, TransferType
from usbredir.virtual import (
    Setup,
    VirtualDevice,
    WinUsb,
    association,
    bulk_in,
    interface,
    interrupt_in,
    vendor_in,
)
from usbredir.virtual.microsoft import (
    compatible_ids,
    default_guid,
    descriptor_set,
    extended_properties,
    os_string,
    platform_capability,
)

GUID = "{01234567-89AB-CDEF-0123-456789ABCDEF}"
GUID_UTF16 = GUID.encode("utf-16-le")
WINUSB = "57 49 4e 55 53 42 00 00 00 00 00 00 00 00 00 00"


def raw(text: str) -> bytes:
    return bytes.fromhex(text)


def test_os_string() -> None:
    """Its last character holds the vendor request and a zero."""
    assert os_string(0x20).encode("utf-16-le") == raw("4d 00 53 00 46 00 54 00 31 00 30 00 30 00 20 00")


def test_compatible_ids() -> None:
    """Extended Compat ID: header of 16 bytes, sections of 24."""
    assert compatible_ids([0]) == raw(
        f"28 00 00 00  00 01  04 00  01  00 00 00 00 00 00 00  00 01 {WINUSB} 00 00 00 00 00 00"
    )
    assert compatible_ids([2, 5]) == raw(
        "40 00 00 00  00 01  04 00  02  00 00 00 00 00 00 00"
        f"02 01 {WINUSB} 00 00 00 00 00 00"
        f"05 01 {WINUSB} 00 00 00 00 00 00"
    )


def test_extended_properties() -> None:
    """The usual 142 bytes: one section with a REG_SZ."""
    properties = extended_properties(GUID)
    name = "DeviceInterfaceGUID".encode("utf-16-le")
    assert len(properties) == 142
    assert properties == b"".join(
        (
            raw("8e 00 00 00  00 01  05 00  01 00"),
            raw("84 00 00 00  01 00 00 00  28 00"),
            name + b"\0\0",
            raw("4e 00 00 00"),
            GUID_UTF16 + b"\0\0",
        )
    )


FEATURES = b"".join(
    (
        raw(f"14 00  03 00 {WINUSB}"),
        raw("84 00  04 00  07 00  2a 00"),
        "DeviceInterfaceGUIDs".encode("utf-16-le") + b"\0\0",
        raw("50 00"),
        GUID_UTF16 + bytes(4),
    )
)
"""Compatible ID and registry property, REG_MULTI_SZ."""


def test_descriptor_set() -> None:
    """For the device as a whole: the usual 162 bytes."""
    assert descriptor_set(GUID, []) == raw("0a 00  00 00  00 00 03 06  a2 00") + FEATURES
    assert len(FEATURES) == 0xA2 - 10


def test_descriptor_set_of_a_composite_device() -> None:
    """A configuration subset with a function subset for each function."""
    subset = 8 + len(FEATURES)
    total = 10 + 8 + 2 * subset
    assert descriptor_set(GUID, [0, 3]) == b"".join(
        (
            raw("0a 00  00 00  00 00 03 06") + total.to_bytes(2, "little"),
            raw("08 00  01 00  00 00") + (total - 10).to_bytes(2, "little"),
            raw("08 00  02 00  00 00") + subset.to_bytes(2, "little") + FEATURES,
            raw("08 00  02 00  03 00") + subset.to_bytes(2, "little") + FEATURES,
        )
    )


def test_platform_capability() -> None:
    assert platform_capability(162, 0x20) == raw(
        "1c 10 05 00  df 60 dd d8 89 45 c7 4c 9c d2 65 9d 9e 64 8a 9f  00 00 03 06  a2 00  20  00"
    )


def test_default_guid() -> None:
    """The same for the same ids, another for others; of the form that WinUsb takes."""
    assert default_guid(1, 2) == default_guid(1, 2) != default_guid(2, 1)
    WinUsb(default_guid(1, 2))


@pytest.mark.parametrize("guid", ["", GUID[1:-1], GUID[:-2] + "}", GUID.replace("A", "G")])
def test_a_guid_that_is_none(guid: str) -> None:
    with pytest.raises(ValueError, match="a GUID looks like"):
        WinUsb(guid)


@pytest.mark.parametrize("request_number", [0, 256])
def test_a_request_that_is_none(request_number: int) -> None:
    with pytest.raises(ValueError, match="1 to 255"):
        WinUsb(request=request_number)


# ================================================================ devices


class Plain(VirtualDevice):
    interfaces = (interface(0xFF, bulk_in(0x81)),)
    winusb: WinUsb | bool = WinUsb(GUID, request=0x5A)


class Composite(VirtualDevice):
    interfaces = (
        interface(0x03, interrupt_in(0x83, 8)),
        interface(0xFF, bulk_in(0x81)),
        association(interface(0xFF, bulk_in(0x82)), interface(0xFF)),
    )
    winusb = WinUsb(GUID)


def get(device: VirtualDevice, *setup: int) -> bytes | None:
    done: list[Transfer] = []
    fields = setup[0], setup[1], setup[2], setup[3]
    device.submit(Transfer(TransferType.CONTROL, 0x80, 4096, done.append, setup=fields))
    device.handle_events(0)
    return bytes(done[0].data) if done[0].status == Status.SUCCESS else None


@pytest.mark.parametrize("speed", [Speed.FULL, Speed.HIGH, Speed.SUPER])
def test_a_device_with_one_function(speed: Speed) -> None:
    """Everything that Windows asks, in both versions."""
    device = Plain(speed=speed)
    assert int.from_bytes(device.device_descriptor[2:4], "little") >= 0x0201, "otherwise BOS is not asked for"
    assert get(device, 0x80, 6, 0x03EE, 0) == raw("12 03 4d 00 53 00 46 00 54 00 31 00 30 00 30 00 5a 00")
    assert get(device, 0xC0, 0x5A, 0, 4) == compatible_ids([0])
    assert get(device, 0xC1, 0x5A, 0, 5) == extended_properties(GUID)
    assert get(device, 0xC0, 0x5A, 0, 7) == descriptor_set(GUID, [])
    bos = get(device, 0x80, 6, 0x0F00, 0)
    assert bos is not None
    assert bos.endswith(platform_capability(162, 0x5A))
    assert len(bos) == int.from_bytes(bos[2:4], "little")
    assert bos[4] == (3 if speed is Speed.SUPER else 2)
    assert get(device, 0xC0, 0x5A, 0, 6) is None
    assert get(device, 0xC0, 0x20, 0, 4) is None
    device.close()


def test_the_only_function_may_be_of_any_class() -> None:
    class Hid(VirtualDevice):
        interfaces = (interface(0x03, interrupt_in(0x81, 8)),)
        winusb = True

    device = Hid()
    assert get(device, 0xC0, 0x20, 0, 4) == compatible_ids([0])
    device.close()


def test_a_composite_device() -> None:
    """WinUSB is for the vendor-specific functions."""
    device = Composite()
    assert get(device, 0xC0, 0x20, 0, 4) == compatible_ids([1, 2])
    assert get(device, 0xC0, 0x20, 0, 7) == descriptor_set(GUID, [1, 2])
    for value in (1, 2, 0x0100, 0x0200):
        assert get(device, 0xC1, 0x20, value, 5) == extended_properties(GUID)
    for value in (0, 3, 0x0300):
        assert get(device, 0xC1, 0x20, value, 5) is None
    device.close()


def test_chosen_functions() -> None:
    class Chosen(Composite):
        winusb = WinUsb(GUID, interfaces=(2,))

    device = Chosen()
    assert get(device, 0xC0, 0x20, 0, 7) == descriptor_set(GUID, [2])
    device.close()


@pytest.mark.parametrize("interfaces", [(3,), (0, 7), ()])
def test_functions_that_do_not_exist(interfaces: tuple[int, ...]) -> None:
    """3 is the second interface of a function."""

    class Wrong(Composite):
        winusb = WinUsb(GUID, interfaces=interfaces)

    with pytest.raises(ValueError, match=r"begin at interfaces \[0, 1, 2\]"):
        Wrong()


def test_true_is_enough() -> None:
    class Short(VirtualDevice):
        vendor_id, product_id = 0x1209, 0x0003
        interfaces = (interface(0xFF, bulk_in(0x81)),)
        winusb = True

    device = Short()
    assert get(device, 0xC0, 0x20, 0, 7) == descriptor_set(default_guid(0x1209, 0x0003), [])
    device.close()


def test_without_it_there_is_nothing() -> None:
    class Without(Plain):
        winusb = False

    device = Without()
    assert get(device, 0x80, 6, 0x03EE, 0) is None
    assert get(device, 0x80, 6, 0x0F00, 0) is None
    assert get(device, 0xC0, 0x20, 0, 7) is None
    device.close()


def test_a_request_of_the_device_s_own_is_no_room() -> None:
    class Taken(Plain):
        winusb = True

        @vendor_in(0x20)
        def mine(self, setup: Setup) -> bytes:
            return b""

    with pytest.raises(ValueError, match="0x20"):
        Taken()
