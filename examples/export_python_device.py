"""A USB device in a few lines of Python, exported over TCP to a guest in the same process.

What is written to endpoint 0x01 can be read, in capitals, from endpoint 0x81; vendor request 1 tells how many
messages that were.
"""

import threading
from collections import deque

from usbredir.guest import Guest
from usbredir.transport import GuestConnection, Listener, connect, listen, serve
from usbredir.virtual import NAK, Answer, Setup, VirtualDevice, bulk_in, bulk_out, interface, vendor_in


class Shouter(VirtualDevice):
    """Says everything again, louder."""

    vendor_id, product_id, product = 0x1209, 0x0003, "Shouter"
    interfaces = (interface(0xFF, bulk_out(0x01), bulk_in(0x81)),)

    def began(self) -> None:
        """Forget everything: the start, and every reset."""
        self.waiting: deque[bytes] = deque()
        self.count = 0

    def data_out(self, endpoint: int, data: bytes | bytearray | memoryview) -> None:
        """Keep a message; transfers that wait for one are asked about again."""
        self.waiting.append(bytes(data).upper())
        self.count += 1

    def data_in(self, endpoint: int, length: int) -> bytes | Answer:
        """Give the next message, if there is one."""
        return self.waiting.popleft() if self.waiting else NAK

    @vendor_in(0x01)
    def tell_count(self, setup: Setup) -> bytes:
        """How many messages there were."""
        return bytes([self.count])


def export(listener: Listener) -> None:
    """Serve one guest."""
    connection = listener.accept(5)
    assert connection is not None
    with connection, Shouter() as device:
        serve(connection, device)


if __name__ == "__main__":
    with listen("127.0.0.1:0") as listener:
        print("exported on", listener.address)
        exporter = threading.Thread(target=export, args=(listener,))
        exporter.start()
        with connect(str(listener.address)) as connection, Guest(GuestConnection(connection)) as guest:
            print("guest has", guest.wait_for_device(5))
            for message in (b"hello", b"is anybody there?"):
                guest.bulk_out(0x01, message, timeout=5)
                reply = guest.bulk_in(0x81, 512, timeout=5)
                print(f"{message!r} -> {bytes(reply.data)!r}")
                assert reply.data == message.upper()
            count = guest.control_in(0xC0, 1, 0, 0, 1, timeout=5)
            print("messages:", count.data[0])
        exporter.join()
