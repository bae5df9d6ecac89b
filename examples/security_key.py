"""A HID of one's own: the transport of security keys (FIDO U2F HID Protocol 1.2), as far as INIT and PING.

Messages are cut into reports of 64 bytes: channel, command, length and data, then channel, number and data.
"""

import struct

from usbredir.guest import Guest
from usbredir.testing import linked_pair
from usbredir.virtual import VirtualDevice, interface, interrupt_in, interrupt_out

REPORT = bytes.fromhex("06d0f1 0901 a101 0920 1500 26ff00 7508 9540 8102 0921 1500 26ff00 7508 9540 9102 c0")
HID = struct.pack("<BBHBBBH", 9, 0x21, 0x0111, 0, 1, 0x22, len(REPORT))
ENDPOINTS = interrupt_in(0x81, 64, period=0.005), interrupt_out(0x01, 64, period=0.005)
BROADCAST, INIT, PING, ERROR, BAD_COMMAND = 0xFFFFFFFF, 0x86, 0x81, 0xBF, b"\x01"


def reports(channel: int, command: int, data: bytes) -> list[bytes]:
    """A message as reports: 57 bytes go into the first one, 59 into every other."""
    first = struct.pack(">IBH57s", channel, command, len(data), data[:57])
    rest = range(57, len(data), 59)
    return [first, *(struct.pack(">IB59s", channel, number, data[at : at + 59]) for number, at in enumerate(rest))]


class SecurityKey(VirtualDevice):
    """Gives channels and answers pings."""

    vendor_id, product_id, product = 0x1209, 0x0005, "Security key"
    interfaces = (interface(0x03, *ENDPOINTS, extra=HID, descriptors={0x21: HID, 0x22: REPORT}),)

    def began(self) -> None:
        """No channel is given, no message has begun."""
        self.channels = self.channel = self.command = self.length = 0
        self.data: bytes | None = None

    def data_out(self, endpoint: int, data: bytes | bytearray | memoryview) -> None:
        """Collect the reports of a message, and queue those of the answer."""
        report = bytes(data).ljust(64, b"\0")
        if report[4] & 0x80:
            self.channel, self.command, self.length, self.data = *struct.unpack(">IBH", report[:7]), report[7:]
        elif self.data is not None:
            self.data += report[5:]
        if self.data is not None and len(self.data) >= self.length:
            command, message = self.answer(self.command, self.data[: self.length])
            self.data = None
            for report in reports(self.channel, command, message):
                self.send(0x81, report)

    def answer(self, command: int, data: bytes) -> tuple[int, bytes]:
        """Command and data of the answer to a message."""
        if command == INIT and self.channel == BROADCAST:
            self.channels += 1
            return INIT, struct.pack(">8sIBBBBB", data, self.channels, 2, 1, 0, 0, 0)
        return (PING, data) if command == PING else (ERROR, BAD_COMMAND)


def ask(guest: Guest, channel: int, command: int, data: bytes) -> bytes:
    """Send a message and collect the answer."""
    for report in reports(channel, command, data):
        guest.interrupt_out(0x01, report, timeout=5)
    answer = bytes(guest.receive(0x81, timeout=5).data)[5:]
    length = 2 + int.from_bytes(answer[:2], "big")
    while len(answer) < length:
        answer += bytes(guest.receive(0x81, timeout=5).data)[5:]
    return answer[2:length]


if __name__ == "__main__":
    host, guest = linked_pair(SecurityKey())
    guest.wait_for_device()
    assert guest.control_in(0x81, 6, 0x2200, 0, 255).data == REPORT
    guest.start_interrupt_receiving(0x81)
    channel = int.from_bytes(ask(guest, BROADCAST, INIT, b"12345678")[8:12], "big")
    print("channel", channel)
    for message in (b"ping", bytes(range(200))):
        assert ask(guest, channel, PING, message) == message
        print("answer of", len(message), "bytes")
    host.close()
