"""A host and a guest joined in memory: waiting for the one means running the other."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from ..device import UsbDevice
from ..guest import Guest, GuestCallbacks
from ..host import Host, HostCallbacks
from ..limits import Limits
from ._packet_log import PacketLog

__all__ = ["linked_pair"]

IDLE_STEP = 0.05
"""Seconds to wait for the device at a time while neither side has anything to do."""


class _Pipe:
    """One direction of a connection in memory."""

    def __init__(self) -> None:
        self._pieces: deque[bytes] = deque()

    def put(self, buffers: Sequence[memoryview]) -> int:
        data = b"".join(buffers)
        self._pieces.append(data)
        return len(data)

    def __len__(self) -> int:
        """Pieces that wait."""
        return len(self._pieces)

    def take(self, count: int) -> bytes | None:
        if not self._pieces:
            return None
        piece = self._pieces.popleft()
        if len(piece) > count:
            self._pieces.appendleft(piece[count:])
        return piece[:count]


class _HostEnd(HostCallbacks):
    def __init__(self, incoming: _Pipe, outgoing: _Pipe) -> None:
        self._incoming = incoming
        self._outgoing = outgoing
        self.host: Host | None = None

    def read(self, count: int) -> bytes | None:
        return self._incoming.take(count)

    def writev(self, buffers: Sequence[memoryview]) -> int:
        return self._outgoing.put(buffers)

    def flush_writes(self) -> None:
        if self.host is not None:
            self.host.write_guest_data()


class _GuestEnd(GuestCallbacks):
    """Waiting for the host means running it."""

    def __init__(self, incoming: _Pipe, outgoing: _Pipe) -> None:
        self._incoming = incoming
        self._outgoing = outgoing
        self.host: Host | None = None

    def read(self, count: int) -> bytes | None:
        return self._incoming.take(count)

    def writev(self, buffers: Sequence[memoryview]) -> int:
        return self._outgoing.put(buffers)

    def wait(self, timeout: float | None, *, writing: bool) -> None:
        assert self.host is not None
        self.host.read_guest_data()
        device = self.host.device
        if device is not None:
            idle = not self._incoming and self.host.has_data_to_write() == 0
            step = IDLE_STEP if timeout is None else min(timeout, IDLE_STEP)
            device.handle_events(step if idle else 0)
            if device.lost and self.host.device is device:  # no transfer may have been there to tell
                self.host.set_device(None)
        self.host.write_guest_data()

    def wake(self) -> None:
        assert self.host is not None
        if self.host.device is not None:
            self.host.device.wake()


def linked_pair(
    device: UsbDevice | None,
    *,
    limits: Limits = Limits(),  # noqa: B008 - immutable
    log: PacketLog | None = None,
) -> tuple[Host, Guest]:
    """A host with *device* and a guest at the two ends of a connection in memory.

    The guest's calls run the host; hello has been exchanged and the device announced. Packets are kept in *log*.
    Threads: one.
    """
    to_host, to_guest = _Pipe(), _Pipe()
    guest_end = _GuestEnd(to_guest, to_host)
    guest = Guest(guest_end, limits=limits)
    host_end = _HostEnd(to_host, to_guest)
    if log is not None:
        log.attach(host_end)
    host = Host(host_end, device, limits=limits)
    guest_end.host = host_end.host = host
    guest.process()
    host.read_guest_data()
    host.write_guest_data()
    guest.process()
    return host, guest
