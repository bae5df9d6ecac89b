"""What is measured: one end of a connection, on usbredir's public API, and the transports in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from wire import Kind, hello

from usbredir.locking import LockCallbacks
from usbredir.packets import BulkPacket, ControlPacket, InterruptPacket, Packet
from usbredir.parser import Parser, ParserCallbacks

__all__ = ["CountingSink", "End", "MemorySink", "MemorySource", "Received", "Transport", "UsbredirEnd"]

Received = Callable[[int, "bytes | bytearray | memoryview"], object]
"""Called with id and data of each packet."""


class Transport(Protocol):
    """Where bytes come from and go to, as usbredir's callbacks want it. May have ``writev`` too."""

    def read(self, count: int) -> bytes | None: ...

    def write(self, data: Any) -> int | None: ...  # bytes or a memoryview, as the implementation has it


class End(Protocol):
    """One end of a connection. It announces every capability and sends no hello."""

    name: str

    @property
    def connected(self) -> bool: ...

    @property
    def count(self) -> int: ...

    def receive(self) -> None: ...

    def flush(self) -> None: ...

    def pending(self) -> int: ...

    def sender(self, kind: Kind) -> Callable[[int, bytes], object]: ...

    def close(self) -> None: ...


class _Application(ParserCallbacks):
    """An application that counts its packets."""

    def __init__(self, transport: Transport) -> None:
        self.count = 0
        self.read = transport.read  # type: ignore[method-assign]
        self.write = transport.write  # type: ignore[method-assign]
        if hasattr(transport, "writev"):
            self.writev = transport.writev

    def packet_received(self, packet: Packet) -> None:
        self.count += 1


class _Checker(_Application):
    """One that hands id and data of each data packet on."""

    def __init__(self, transport: Transport, received: Received) -> None:
        super().__init__(transport)
        self.received = received

    def packet_received(self, packet: Packet) -> None:
        if isinstance(packet, (BulkPacket, ControlPacket, InterruptPacket)):
            self.received(packet.id, packet.data)


class UsbredirEnd:
    """usbredir as an application uses it: packet objects, all checks, the default limits."""

    name = "usbredir"

    def __init__(
        self,
        transport: Transport,
        *,
        usb_host: bool = False,
        received: Received | None = None,
        locks: LockCallbacks | None = None,
    ) -> None:
        application = _Application(transport) if received is None else _Checker(transport, received)
        self._application = application
        self.parser = Parser(application, usb_host=usb_host, send_hello=False, locks=locks)
        self.receive = self.parser.do_read
        self.flush = self.parser.do_write
        self.pending = self.parser.has_data_to_write

    @property
    def connected(self) -> bool:
        """Whether the peer's hello has come."""
        return self.parser.have_peer_capabilities()

    @property
    def count(self) -> int:
        """Packets received, without *received*."""
        return self._application.count

    def sender(self, kind: Kind) -> Callable[[int, bytes], object]:
        """A function that makes and queues one packet of a kind: (id, data)."""
        send = self.parser.send
        if kind.transfer == "bulk":
            return lambda packet_id, data: send(BulkPacket(id=packet_id, endpoint=0x81, data=data))
        if kind.transfer == "interrupt":
            return lambda packet_id, data: send(InterruptPacket(id=packet_id, endpoint=0x82, data=data))
        return lambda packet_id, data: send(
            ControlPacket(id=packet_id, endpoint=0x80, request=6, requesttype=0x80, value=0x100, data=data)
        )

    def close(self) -> None:
        """Free the parser."""
        self.parser.close()


class MemorySource:
    """A transport that gives the bytes it was loaded with, a hello first."""

    def __init__(self) -> None:
        self.data = hello()
        self.position = 0

    def load(self, data: bytes) -> None:
        """Give *data* from now on."""
        self.data, self.position = data, 0

    def read(self, count: int) -> bytes | None:
        """The next bytes."""
        start = self.position
        piece = self.data[start : start + count]
        self.position = start + len(piece)
        return piece or None

    def write(self, data: bytes | memoryview) -> int | None:
        """Not used."""
        raise AssertionError("a receiver wrote")


class MemorySink(MemorySource):
    """A transport that takes all it is given. It copies, as a socket does."""

    def __init__(self) -> None:
        super().__init__()
        self._room = memoryview(bytearray(2 * 1024 * 1024))

    def write(self, data: bytes | memoryview) -> int:
        """Take one buffer."""
        size = len(data)
        self._room[:size] = data
        return size

    def writev(self, buffers: Sequence[memoryview]) -> int:
        """Take several buffers."""
        room, total = self._room, 0
        for data in buffers:
            size = len(data)
            room[:size] = data
            total += size
        return total


class CountingSink(MemorySink):
    """The same, and counts calls, buffers and bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.writes = self.buffers = self.bytes = 0

    def write(self, data: bytes | memoryview) -> int:
        """Take one buffer."""
        self.writes += 1
        self.buffers += 1
        self.bytes += len(data)
        return super().write(data)

    def writev(self, buffers: Sequence[memoryview]) -> int:
        """Take several buffers."""
        self.writes += 1
        self.buffers += len(buffers)
        self.bytes += sum(map(len, buffers))
        return super().writev(buffers)
