"""What the tests of the host stand on: a scripted guest, a device whose completions a test decides, recording locks.

:class:`Bed` joins a host to a raw parser that plays the guest, in memory. Whatever the host writes is parsed at once
and recorded in the order on the wire, mixed with the calls on a :class:`FakeDevice`.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, TypeVar

from usbredir.capabilities import ALL
from usbredir.descriptors import Configuration, DeviceDescriptor, Endpoint, Interface, build_configuration
from usbredir.device import IsoResult, Transfer, UsbDevice
from usbredir.host import Host, HostCallbacks
from usbredir.limits import Limits
from usbredir.locking import LockCallbacks, ThreadingLocks
from usbredir.packets import Packet
from usbredir.parser import LogLevel, Parser, ParserCallbacks
from usbredir.proto import PacketType, Speed, Status, TransferType

PATIENCE = 30.0
"""Seconds after which a thread counts as stuck, or something that a thread waits for as lost."""

BULK_OUT, BULK_IN, BULK_IN_2 = 0x01, 0x81, 0x83
INTERRUPT_OUT, INTERRUPT_IN = 0x02, 0x82
ISO_OUT, ISO_IN = 0x04, 0x84
ALTERNATE_INTERRUPT_IN = 0x85
MISSING_OUT, MISSING_IN = 0x0A, 0x8A

KINDS = {
    0x00: TransferType.CONTROL,
    0x80: TransferType.CONTROL,
    BULK_OUT: TransferType.BULK,
    BULK_IN: TransferType.BULK,
    BULK_IN_2: TransferType.BULK,
    INTERRUPT_OUT: TransferType.INTERRUPT,
    INTERRUPT_IN: TransferType.INTERRUPT,
    MISSING_OUT: TransferType.INVALID,
    MISSING_IN: TransferType.INVALID,
}
"""Endpoints of configuration 1 of :class:`FakeDevice` with all alternate settings 0."""

BULK_SIZE, INTERRUPT_SIZE, ALTERNATE_SIZE = 512, 64, 8

CONFIGURATIONS = (
    Configuration(
        1,
        interfaces=(
            Interface(
                0,
                0,
                0xFF,
                1,
                2,
                endpoints=(
                    Endpoint(BULK_OUT, 2, BULK_SIZE),
                    Endpoint(BULK_IN, 2, BULK_SIZE),
                    Endpoint(BULK_IN_2, 2, BULK_SIZE),
                    Endpoint(INTERRUPT_OUT, 3, INTERRUPT_SIZE, 4),
                    Endpoint(INTERRUPT_IN, 3, INTERRUPT_SIZE, 4),
                ),
            ),
            # Alternate settings need not be numbered 0, 1, 2, nor come in order.
            Interface(7, 0, 0x01),
            Interface(7, 5, 0x03, 4, 5, endpoints=(Endpoint(ALTERNATE_INTERRUPT_IN, 3, ALTERNATE_SIZE, 1),)),
            Interface(7, 2, 0x0E, endpoints=(Endpoint(ISO_OUT, 1, 0x1400, 1), Endpoint(ISO_IN, 1, 1023, 1))),
        ),
    ),
    Configuration(2, interfaces=(Interface(3, 0, 0x08, 6, 80, endpoints=(Endpoint(BULK_OUT, 2, BULK_SIZE),)),)),
)

Result = TypeVar("Result")


class FakeDevice:
    """A device of which the test decides everything.

    Attributes:
        calls: every call that changes the device, as (name, arguments...), in order.
        script: what a method does in place of succeeding: an exception to raise, or a value to return.
        in_flight: transfers submitted and not completed, in order.
        cancelled: transfers that the host cancelled, in order.
        stuck: cancelled transfers do not complete by themselves in handle_events.
        submissions_left: submits that still succeed, then script["submit"] counts; None: as script says.
    """

    def __init__(
        self,
        configurations: Sequence[Configuration] = CONFIGURATIONS,
        *,
        active: int = 1,
        vendor: int = 0x1234,
        product: int = 0x5678,
        device_class: int = 0,
        speed: Speed = Speed.HIGH,
    ) -> None:
        self.configurations = {configuration.value: configuration for configuration in configurations}
        self.active = active
        self.speed = speed
        self.device_descriptor = DeviceDescriptor(
            0x0200, device_class, 0xDD, 0xEE, 64, vendor, product, 0x0102, 0, 0, 0, len(configurations)
        ).to_bytes()
        self.raw_configuration: bytes | None = None  # in place of the one of *configurations*
        self.lost = False
        self.calls: list[Any] = []
        self.script: dict[str, Any] = {}
        self.in_flight: list[Transfer] = []
        self.cancelled: list[Transfer] = []
        self.stuck = False
        self.submissions_left: int | None = None

    @property
    def configuration_descriptor(self) -> bytes | None:
        if self.raw_configuration is not None:
            return self.raw_configuration
        active = self.configurations.get(self.active)
        return None if active is None else build_configuration(active)

    def _call(self, name: str, *arguments: object, default: Result) -> Result:
        self.calls.append((name, *arguments))
        result = self.script.get(name, default)
        if isinstance(result, BaseException):
            raise result
        return result  # type: ignore[no-any-return]

    def claim(self) -> None:
        self._call("claim", default=None)

    def release(self, *, give_back: bool, reset: bool = True) -> None:
        self._call("release", give_back, default=None)

    def set_configuration(self, value: int) -> int:
        status = self._call("set_configuration", value, default=int(Status.SUCCESS))
        if status == Status.SUCCESS:
            self.active = value
        return status

    def set_alt_setting(self, interface: int, alt: int) -> int:
        return self._call("set_alt_setting", interface, alt, default=int(Status.SUCCESS))

    def reset(self) -> None:
        self._call("reset", default=None)

    def clear_halt(self, endpoint: int) -> int:
        return self._call("clear_halt", endpoint, default=int(Status.SUCCESS))

    def alloc_streams(self, endpoints: Sequence[int], count: int) -> tuple[int, int]:
        return self._call("alloc_streams", list(endpoints), count, default=(int(Status.SUCCESS), count))

    def free_streams(self, endpoints: Sequence[int]) -> int:
        return self._call("free_streams", list(endpoints), default=int(Status.SUCCESS))

    def submit(self, transfer: Transfer) -> int:
        if self.submissions_left is None or self.submissions_left == 0:
            result = self.script.get("submit", Status.SUCCESS)
        else:
            self.submissions_left -= 1
            result = Status.SUCCESS
        if isinstance(result, BaseException):
            raise result
        if result == Status.SUCCESS:
            self.in_flight.append(transfer)
        return int(result)

    def cancel(self, transfer: Transfer) -> None:
        if transfer not in self.cancelled:
            self.cancelled.append(transfer)
        self._call("cancel", transfer.endpoint, default=None)

    def handle_events(self, timeout: float | None = 0.0) -> None:
        if self.stuck:
            return
        for transfer in [t for t in self.in_flight if t in self.cancelled]:
            self.complete(transfer, Status.CANCELLED)

    def wake(self) -> None:
        pass

    def pollfds(self) -> Sequence[tuple[int, int]]:
        return []

    def next_timeout(self) -> float | None:
        return None

    def close(self) -> None:
        self._call("close", default=None)

    # ------------------------------------------------------------ for the test

    def complete(
        self,
        transfer: Transfer | None = None,
        status: int = Status.SUCCESS,
        data: bytes = b"",
        *,
        length: int | None = None,
        lost: bool = False,
        packets: Sequence[tuple[int, bytes]] = (),
    ) -> None:
        """Complete *transfer*, the oldest one unless told.

        *length* is what an OUT transfer moved, *packets* (status, data) of an isochronous one's; those of a transfer
        that fails as a whole are what they were before.
        """
        transfer = self.in_flight[0] if transfer is None else transfer
        self.in_flight.remove(transfer)
        self.calls.append(("completed", transfer.endpoint))
        transfer.status = Status.IOERROR if lost else status
        transfer.device_lost = lost
        if packets:
            transfer.iso_results = [IsoResult(*packet) for packet in packets]
        if transfer.endpoint & 0x80:
            transfer.data, transfer.actual_length = data, len(data)
        else:
            succeeded = status == Status.SUCCESS and not lost
            transfer.actual_length = length if length is not None else transfer.length if succeeded else 0
        transfer.callback(transfer)

    def done(self, *names: str) -> list[Any]:
        """The calls with these names."""
        return [call for call in self.calls if isinstance(call, tuple) and call[0] in names]


class RecordingLocks(LockCallbacks):
    """Locks that know who holds them, in which order they nest, and that cry when one is taken twice."""

    def __init__(self) -> None:
        self.allocated: list[object] = []
        self.freed: list[object] = []
        self.nested: set[tuple[int, int]] = set()
        self.taken: list[int] = []  # by number of allocation, in order
        self._local = threading.local()

    @property
    def held(self) -> list[object]:
        """The locks that the calling thread holds, outermost first."""
        if not hasattr(self._local, "held"):
            self._local.held = []
        return self._local.held  # type: ignore[no-any-return]

    def alloc_lock(self) -> object:
        self.allocated.append(threading.Lock())
        return self.allocated[-1]

    def lock(self, lock: object, /) -> None:
        assert lock not in self.held, "a non-recursive lock was taken twice"
        assert lock not in self.freed, "a freed lock was taken"
        for outer in self.held:
            self.nested.add((self.allocated.index(outer), self.allocated.index(lock)))
        lock.acquire()  # type: ignore[attr-defined]
        self.taken.append(self.allocated.index(lock))
        self.held.append(lock)

    def unlock(self, lock: object, /) -> None:
        self.held.remove(lock)
        lock.release()  # type: ignore[attr-defined]

    def free_lock(self, lock: object, /) -> None:
        assert lock not in self.freed, "a lock was freed twice"
        self.freed.append(lock)


class _HostEnd(HostCallbacks):
    def __init__(self, bed: Bed) -> None:
        self.bed = bed

    def log(self, level: LogLevel, message: str) -> None:
        self.bed.messages.append((level, message))

    def read(self, count: int) -> bytes | None:
        self.bed.check_no_lock()
        return self.bed.take_input(count)

    def write(self, data: memoryview) -> int | None:
        self.bed.check_no_lock()
        return self.bed.written(data)

    def flush_writes(self) -> None:
        self.bed.check_no_lock()
        self.bed.flushes += 1
        self.bed.on_flush()
        if self.bed.writes_on_flush and self.bed.ready:
            self.bed.host.write_guest_data()


class _GuestEnd(ParserCallbacks):
    def __init__(self, bed: Bed) -> None:
        self.bed = bed
        self.input: deque[bytes] = deque()

    def log(self, level: LogLevel, message: str) -> None:
        assert level > LogLevel.WARNING, f"the guest complains about what the host sent: {message}"

    def read(self, count: int) -> bytes | None:
        if not self.input:
            return None
        piece = self.input.popleft()
        if len(piece) > count:
            self.input.appendleft(piece[count:])
        return piece[:count]

    def write(self, data: memoryview) -> int:
        self.bed.said(bytes(data))
        return len(data)

    def packet_received(self, packet: Packet) -> None:
        self.bed.received.append(packet)
        self.bed.journal.append(packet)
        self.bed.on_packet(packet)


class Bed:
    """A host and a scripted guest, joined in memory.

    Args:
        device: what the host exports.
        capabilities: of the guest.
        acknowledges: the guest has DEVICE_DISCONNECT_ACK.
        hello: the guest says hello at once; otherwise with :meth:`greet`.

    Attributes:
        received: every packet that the guest got, in the order on the wire.
        journal: the same, mixed with the calls on a FakeDevice.
        messages: what the host logged.
        acks: acknowledgements that the guest holds back until :meth:`acknowledge`.
        blocked: the connection takes nothing.
        flushes: calls of flush_writes.
        writes_on_flush: flush_writes writes; otherwise the test does.
        on_packet, on_flush: called with each packet that the guest got, and in flush_writes.
    """

    def __init__(
        self,
        device: UsbDevice | None = None,
        *,
        capabilities: Iterable[int] = ALL,
        acknowledges: bool = True,
        hello: bool = True,
        locks: LockCallbacks | None = None,
        limits: Limits | None = None,
    ) -> None:
        self.locks = locks
        self.received: list[Packet] = []
        self.journal: list[Any] = device.calls if isinstance(device, FakeDevice) else []
        self.messages: list[tuple[LogLevel, str]] = []
        self.acks: list[bytes] = []
        self.input: deque[bytes] = deque()
        self.blocked = False
        self.writes_on_flush = True
        self.at_end = False
        self.flushes = 0
        self.on_packet: Callable[[Packet], object] = lambda packet: None
        self.on_flush: Callable[[], object] = lambda: None
        self.ready = False
        self._acknowledges = acknowledges
        self._hello = b""
        self._seen = 0
        self._guest_end = _GuestEnd(self)
        self.guest = Parser(self._guest_end, capabilities=capabilities, locks=ThreadingLocks())
        self.host = Host(_HostEnd(self), device, locks=locks, limits=limits or Limits())
        self.ready = True
        self.host.write_guest_data()
        self.guest.do_write()
        if hello:
            self.greet()
            self.news()

    def __enter__(self) -> Bed:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None, /
    ) -> None:
        self.host.close()

    def check_no_lock(self) -> None:
        if isinstance(self.locks, RecordingLocks):
            assert not self.locks.held, "the application was called with a lock held"

    # ------------------------------------------------------------ the connection

    def take_input(self, count: int) -> bytes | None:
        """As much as there is, so that one read gives the host several packets."""
        if not self.input:
            return b"" if self.at_end else None
        pieces, size = [], 0
        while self.input and size < count:
            pieces.append(self.input.popleft())
            size += len(pieces[-1])
        if size > count:
            self.input.appendleft(pieces[-1][count - size :])
            pieces[-1] = pieces[-1][: count - size]
        return b"".join(pieces)

    def written(self, data: memoryview) -> int | None:
        if self.blocked:
            return None
        self._guest_end.input.append(bytes(data))
        self.guest.do_read()
        return len(data)

    def said(self, data: bytes) -> None:
        """The guest's parser wrote one buffer."""
        number = int.from_bytes(data[:4], "little")
        if number == PacketType.HELLO and not self._hello:
            self._hello = data if self._acknowledges else data[:-4] + bytes((data[-4] & ~8, 0, 0, 0))
        elif number == PacketType.DEVICE_DISCONNECT_ACK and len(data) <= 16:
            self.acks.append(data)
        else:
            self.input.append(data)

    # ------------------------------------------------------------ the guest

    def greet(self) -> None:
        """The guest says hello."""
        self.input.append(self._hello)
        self.run()

    def acknowledge(self) -> list[Packet]:
        """The guest confirms the oldest device_disconnect that it has not confirmed."""
        self.guest.do_write()
        self.input.append(self.acks.pop(0))
        return self.run()

    def say(self, *packets: Packet) -> None:
        """The guest sends; nothing is read yet."""
        for packet in packets:
            self.guest.send(packet)
        self.guest.do_write()

    def say_bytes(self, data: bytes) -> None:
        """The guest sends anything."""
        if data:
            self.input.append(data)

    def run(self) -> list[Packet]:
        """The host reads; the packets that came of it."""
        self.host.read_guest_data()
        return self.news()

    def ask(self, *packets: Packet) -> list[Packet]:
        """Send, let the host read, and return what came of it."""
        self.say(*packets)
        return self.run()

    def news(self) -> list[Packet]:
        """What the guest received since the last look."""
        news, self._seen = self.received[self._seen :], len(self.received)
        return news

    def unblock(self) -> list[Packet]:
        """The connection takes data again; what comes of it."""
        self.blocked = False
        self.host.write_guest_data()
        return self.news()

    def logged(self, level: LogLevel, word: str = "") -> list[str]:
        """Messages of one level that contain *word*."""
        return [message for logged, message in self.messages if logged == level and word in message]


def run_together(*functions: Callable[[], object]) -> None:
    """Run functions in threads of their own; fail with the first exception, or if one does not end."""
    failures: list[BaseException] = []

    def guarded(function: Callable[[], object]) -> None:
        try:
            function()
        except BaseException as error:  # handed to the main thread
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(function,), daemon=True) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * PATIENCE)
        assert not thread.is_alive() or failures, "deadlock: a thread does not end"
    if failures:
        raise failures[0]
