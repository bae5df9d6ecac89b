"""Use a device that another program exports: describe it, transfer data, wait for input, give up after a while.

With an address (HOST:PORT, [IPV6]:PORT or unix:/PATH) as argument, any device is described. Without one, a test
device is exported by a program that this one starts, and its endpoints are tried.
"""

import subprocess
import sys

from usbredir.descriptors import parse_configuration, parse_device
from usbredir.guest import Guest
from usbredir.proto import Status
from usbredir.transport import GuestConnection, connect

EXPORT = ["-m", "usbredir", "export", "--virtual", "loopback", "--as", "127.0.0.1:0", "--once"]


def describe(guest: Guest) -> None:
    """Print the device's identity and its endpoints."""
    device = parse_device(guest.get_descriptor(1))
    print(f"device {device.vendor_id:04x}:{device.product_id:04x}")
    for interface in parse_configuration(guest.get_descriptor(2, length=4096)).interfaces:
        endpoints = ", ".join(f"0x{e.address:02x} {e.type.name.lower()}" for e in interface.endpoints)
        print(f"  interface {interface.number}, alternate setting {interface.alternate}: {endpoints or 'no endpoints'}")


def try_endpoints(guest: Guest) -> None:
    """Every kind of transfer, with the endpoints of the loopback device."""
    pattern = guest.control_in(0xC0, 0x01, 5, 0, 4)
    print("control: ", Status(pattern.status).name, bytes(pattern.data).hex(" "))
    guest.bulk_out(0x01, b"there and back")
    print("bulk:    ", bytes(guest.bulk_in(0x81, 64).data))
    guest.start_interrupt_receiving(0x83)
    received = [int.from_bytes(guest.receive(0x83, timeout=1).data, "little") for _ in range(3)]
    guest.stop_interrupt_receiving(0x83)
    print("input:   ", received)
    print("stall:   ", Status(guest.bulk_in(0x85, 64).status).name)
    guest.clear_halt(0x85)
    print("cleared: ", Status(guest.bulk_in(0x85, 64).status).name)
    print("silence: ", Status(guest.bulk_in(0x86, 64, timeout=0.1).status).name)
    assert received == [0, 1, 2]


def main(address: str) -> None:
    """Connect, wait for the device, use it."""
    with connect(address) as connection, Guest(GuestConnection(connection)) as guest:
        guest.wait_for_device(5)
        print(f"connected to {guest.host_version!r} at {address}")
        describe(guest)
        if len(sys.argv) == 1:
            try_endpoints(guest)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(sys.argv[1])
    else:
        with subprocess.Popen([sys.executable, *EXPORT], stderr=subprocess.PIPE, text=True) as exporter:
            assert exporter.stderr is not None
            main(exporter.stderr.readline().split()[-1])  # "usbredir: listening on 127.0.0.1:40001"
            print(f"--- what the exporter said\n{exporter.stderr.read()}---")
        assert exporter.returncode == 0
