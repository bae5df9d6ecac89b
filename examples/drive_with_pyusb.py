"""Read a USB stick at the other end of a connection with pyusb, and measure how fast that is.

With addresses (HOST:PORT, [IPV6]:PORT or unix:/PATH) as arguments the stick is one that others export there. Without
one, it is a virtual stick, and the connection is in this process.
"""

import array
import itertools
import struct
import sys
import time

import usb.core
import usb.util

from usbredir.pyusb_backend import Backend, get_backend
from usbredir.testing import linked_pair
from usbredir.virtual import MassStorage
from usbredir.virtual.fat import make_image

REQUEST = 1 << 20
"""Bytes that are read at a time."""


class Stick:
    """SCSI commands over the Bulk-Only Transport, as pyusb programs send them."""

    def __init__(self, device: usb.core.Device) -> None:
        self.tags = itertools.count(1)
        device.set_configuration()
        interface = device.get_active_configuration()[(0, 0)]
        self.from_device, self.to_device = (
            usb.util.find_descriptor(
                interface, custom_match=lambda e, way=way: usb.util.endpoint_direction(e.bEndpointAddress) == way
            )
            for way in (usb.util.ENDPOINT_IN, usb.util.ENDPOINT_OUT)
        )

    def read_command(self, command: bytes, length: int) -> "array.array[int]":
        """What a command gives, up to *length* bytes."""
        header = struct.pack("<4sIIBBB", b"USBC", next(self.tags), length, 0x80, 0, len(command))
        self.to_device.write(header + command.ljust(16, b"\0"))
        data: array.array[int] = self.from_device.read(length) if length else array.array("B")
        status = self.from_device.read(13)
        assert bytes(status[:4]) == b"USBS", "the stick does not follow"
        return data

    def inquiry(self) -> str:
        """Vendor, product and revision."""
        return self.read_command(struct.pack(">BBBHB", 0x12, 0, 0, 36, 0), 36)[8:].tobytes().decode()

    def read(self, offset: int, length: int) -> "array.array[int]":
        """Multiples of 512 bytes."""
        return self.read_command(struct.pack(">BBIBHB", 0x28, 0, offset // 512, 0, length // 512, 0), length)


def main(backend: Backend) -> None:
    """Find a stick, say what it is, and read its first 32 MiB."""
    device = usb.core.find(
        backend=backend, custom_match=lambda d: any(i.bInterfaceClass == 8 for cfg in d for i in cfg)
    )
    assert device is not None, "no USB stick there"
    stick = Stick(device)
    stick.read_command(bytes(6), 0)  # "unit attention": it was just plugged in
    print(f"{device.idVendor:04x}:{device.idProduct:04x}, serial number {device.serial_number}\n{stick.inquiry()}")
    start = time.perf_counter()
    total = sum(len(stick.read(offset, REQUEST)) for offset in range(0, 32 * REQUEST, REQUEST))
    print(f"{total / (time.perf_counter() - start) / 1e6:.0f} MB/s in requests of 1 MiB")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        with get_backend(*sys.argv[1:]) as remote:
            main(remote)
    else:
        virtual = MassStorage(make_image({"hello.txt": b"Hello!\n"}, size=64 << 20), read_only=True)
        host, guest = linked_pair(virtual)
        main(get_backend(guest=guest))
        host.close()
        virtual.close()
