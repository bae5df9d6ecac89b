"""Devices that programs of others accept: what these programs expect of real ones, as far as they ask.

* :class:`BenchmarkDevice`: the board that pyusb's own tests are written for (Microchip's benchmark firmware).
* :class:`Instrument`: a measuring instrument (USBTMC 1.0 with the USB488 subclass).
* :class:`SerialAdapter`: an FT232H as a serial port whose transmit line is wired to its receive line.
* :class:`Bootloader`: a microcontroller that waits for firmware (DFU 1.1 with ST's DfuSe extension).
"""

from __future__ import annotations

import struct
from collections import deque
from dataclasses import replace

from usbredir.proto import Speed
from usbredir.virtual import (
    NAK,
    STALL,
    Answer,
    Description,
    Setup,
    VirtualDevice,
    bulk_in,
    bulk_out,
    class_in,
    class_out,
    interface,
    interrupt_in,
    interrupt_out,
    iso_in,
    iso_out,
    vendor_in,
    vendor_out,
)

__all__ = ["BenchmarkDevice", "Bootloader", "Instrument", "SerialAdapter"]

Payload = bytes | bytearray | memoryview
ANSWERS = {"*IDN?": "usbredir,Voltmeter,V0001,1.0", "MEAS:VOLT?": "+1.25E+00", "CURVE?": "0123456789" * 1000}
"""What the instrument answers."""


class BenchmarkDevice(VirtualDevice):
    """Each of three alternate settings sends back what it gets: bulk, interrupt, isochronous."""

    vendor_id, product_id, device_version = 0x04D8, 0xFA2E, 0x0001
    manufacturer, product, serial = "Travis Robinson", "Benchmark Device", "LUSB0"
    speed, usb_version, self_powered = Speed.FULL, 0x0200, True
    interfaces = (
        interface(0, bulk_out(0x01, size=16), bulk_in(0x81, size=16)),
        interface(0, interrupt_out(0x02, 16, period=0.001), interrupt_in(0x82, 16, period=0.001), alternate=1),
        interface(0, iso_out(0x03, 64), iso_in(0x83, 64), alternate=2),
    )

    def describe(self, speed: Speed) -> Description:
        """As the board does, with packets of 8 bytes on endpoint 0."""
        description = super().describe(speed)
        device = description.device
        return replace(description, device=device[:7] + bytes([8]) + device[8:])

    def began(self) -> None:
        self.messages: dict[int, deque[bytes]] = {1: deque(), 2: deque(), 3: deque()}
        self.stored = b""

    def data_out(self, endpoint: int, data: Payload) -> None:
        self.messages[endpoint].append(bytes(data))

    def data_in(self, endpoint: int, length: int) -> Payload | Answer:
        messages = self.messages[endpoint & 0x0F]
        return messages.popleft() if messages else b"" if endpoint == 0x83 else NAK

    @vendor_out(0x10)
    def store(self, setup: Setup, data: bytes) -> None:
        self.stored = data

    @vendor_in(0x11)
    def fetch(self, setup: Setup) -> bytes:
        return self.stored


class Instrument(VirtualDevice):
    """A voltmeter. *asked*: the commands that it got."""

    vendor_id, product_id = 0x1209, 0x0011
    manufacturer, product, serial = "usbredir", "Voltmeter", "V0001"
    interfaces = (interface(0xFE, bulk_out(0x01), bulk_in(0x82), subclass=3, protocol=1),)

    HEADER = struct.Struct("<BBBxLB3x")
    WRITE, READ = 1, 2
    END_OF_MESSAGE = 1
    DONE = b"\x01"

    def __init__(self) -> None:
        self.asked: list[str] = []
        super().__init__()

    def began(self) -> None:
        self.command = b""
        self.answer = b""
        self.transfers: deque[bytes] = deque()

    def data_out(self, endpoint: int, data: Payload) -> Answer | None:
        kind, tag, _, size, attributes = self.HEADER.unpack_from(data)
        if kind == self.WRITE:
            self.command += bytes(data[12 : 12 + size])
            if attributes & self.END_OF_MESSAGE:
                self._execute(self.command.decode().strip())
                self.command = b""
        elif kind == self.READ:
            piece, self.answer = self.answer[:size], self.answer[size:]
            header = self.HEADER.pack(self.READ, tag, ~tag & 0xFF, len(piece), not self.answer)
            self.transfers.append(header + piece + bytes(-len(piece) % 4))
        else:
            return STALL
        return None

    def _execute(self, command: str) -> None:
        self.asked.append(command)
        if command in ANSWERS:
            self.answer = ANSWERS[command].encode() + b"\n"

    def data_in(self, endpoint: int, length: int) -> Payload | Answer:
        if not self.transfers:
            return NAK
        transfer = self.transfers.popleft()
        if len(transfer) > length:
            self.transfers.appendleft(transfer[length:])
        return transfer[:length]

    @class_in(7)
    def capabilities(self, setup: Setup) -> bytes:
        return struct.pack("<BxHBB6xHBB8x", 1, 0x0100, 0, 0, 0x0100, 0x06, 0)

    @class_in(160)
    def remote_control(self, setup: Setup) -> bytes:
        return self.DONE

    @class_in(5)
    def initiate_clear(self, setup: Setup) -> bytes:
        self.transfers.clear()
        return self.DONE

    @class_in(6)
    def check_clear(self, setup: Setup) -> bytes:
        return self.DONE + b"\0"


class SerialAdapter(VirtualDevice):
    """Every packet to the host begins with two bytes of modem and line status. *requests*: the latest of each kind."""

    vendor_id, product_id, device_version = 0x0403, 0x6014, 0x0900
    manufacturer, product, serial = "FTDI", "Single RS232-HS", "FT0001"
    interfaces = (interface(0xFF, bulk_in(0x81), bulk_out(0x02), subclass=0xFF, protocol=0xFF),)

    PACKET = 512
    STATUS = b"\x01\x60"
    """Clear to send nothing, transmitter empty."""
    SET_BAUD_RATE, SET_DATA, SET_LATENCY = 3, 4, 9

    def __init__(self) -> None:
        self.requests: dict[int, Setup] = {}
        super().__init__()

    def began(self) -> None:
        self.line = bytearray()
        self.latency = 0.016
        self.timer = self.due = False

    def control_request(self, setup: Setup, data: bytes) -> Payload | Answer | None:
        match setup.request_type, setup.request:
            case 0x40, request:
                self.requests[request] = setup
                if request == self.SET_LATENCY:
                    self.latency = setup.value / 1000
                return None
            case 0xC0, 0x05:
                return self.STATUS
            case 0xC0, 0x0A:
                return bytes([int(self.latency * 1000)])
        return STALL

    def data_out(self, endpoint: int, data: Payload) -> None:
        self.line += data

    def data_in(self, endpoint: int, length: int) -> Payload | Answer:
        """Data at once; the status alone each time that the latency timer has run down."""
        if self.line:
            return self._packets(length)
        if self.due:
            self.due = False
            return self.STATUS
        if not self.timer:
            self.timer = True
            self.call_later(self.latency, self._run_down)
        return NAK

    def _run_down(self) -> None:
        self.timer, self.due = False, True

    def _packets(self, length: int) -> bytes:
        packets = bytearray()
        while self.line and len(packets) + self.PACKET <= length:
            packets += self.STATUS + self.line[: self.PACKET - 2]
            del self.line[: self.PACKET - 2]
        return bytes(packets)


class Bootloader(VirtualDevice):
    """64 KiB of flash memory in pages of 16 KiB. *left*: the host has told it to start the firmware."""

    vendor_id, product_id = 0x1209, 0x0012
    product, serial = "Bootloader", "DFU0001"
    BASE, PAGE, PAGES, TRANSFER = 0x08000000, 16 * 1024, 4, 1024
    interfaces = (
        interface(
            0xFE,
            subclass=1,
            protocol=2,
            name=f"@Internal Flash /0x{BASE:08X}/{PAGES:02d}*{PAGE // 1024:03d}Kg",
            extra=struct.pack("<BBBHHH", 9, 0x21, 0x0B, 255, TRANSFER, 0x011A),
        ),
    )

    IDLE, DOWNLOAD_SYNC, DOWNLOAD_BUSY, DOWNLOAD_IDLE, ERROR = 2, 3, 4, 5, 10
    SET_ADDRESS, ERASE = 0x21, 0x41

    def __init__(self) -> None:
        self.flash = bytearray(self.PAGE * self.PAGES)
        self.erased: list[int] = []
        self.left = False
        super().__init__()

    def began(self) -> None:
        self.address = self.BASE
        self.state = self.IDLE

    @class_out(1)
    def download(self, setup: Setup, data: bytes) -> Answer | None:
        if not data:
            self.state, self.left = self.IDLE, True
        elif setup.value == 0:
            return self._command(data[0], int.from_bytes(data[1:5], "little"))
        else:
            start = self.address - self.BASE + (setup.value - 2) * self.TRANSFER
            if not 0 <= start <= len(self.flash) - len(data):
                self.state = self.ERROR
                return STALL
            self.flash[start : start + len(data)] = data
            self.state = self.DOWNLOAD_SYNC
        return None

    def _command(self, command: int, address: int) -> Answer | None:
        if command == self.SET_ADDRESS:
            self.address = address
        elif command == self.ERASE:
            self.erased.append(address)
            page = (address - self.BASE) // self.PAGE * self.PAGE
            self.flash[page : page + self.PAGE] = b"\xff" * self.PAGE
        else:
            return STALL
        self.state = self.DOWNLOAD_SYNC
        return None

    @class_in(3)
    def get_status(self, setup: Setup) -> bytes:
        if self.state in (self.DOWNLOAD_SYNC, self.DOWNLOAD_BUSY):
            self.state += 1
        return bytes([0, 0, 0, 0, self.state, 0])

    @class_out(4)
    def clear_status(self, setup: Setup, data: bytes) -> None:
        self.state = self.IDLE
