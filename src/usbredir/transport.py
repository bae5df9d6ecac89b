"""Byte streams for hosts and guests: TCP and Unix sockets, and the loops that drive them.

Addresses are text: ``host:port``, ``[v6 address]:port`` and ``unix:/path``. Port 0 lets the system choose.

:func:`serve` runs a host in one thread: it polls the guest's socket and the device's descriptors together, and
collects the output of a round into one write. :class:`GuestConnection` does the same for a guest's calls.

Source: docs/transport.md.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import select
import socket
import stat
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from types import TracebackType
from typing import Any, NamedTuple

from . import _keep_alive
from .device import UsbDevice
from .errors import ConnectionClosed
from .guest import GuestCallbacks
from .host import Host, HostCallbacks
from .limits import Limits
from .parser import VERSION, LogLevel

__all__ = [
    "Address",
    "Connection",
    "Connector",
    "GuestConnection",
    "HostConnection",
    "Listener",
    "Poller",
    "Session",
    "connect",
    "listen",
    "parse_address",
    "serve",
    "turn_away",
]

POLLIN = 1
POLLOUT = 4
POLL_ERRORS = 8 | 16
"""poll(2)'s numbers; not every platform's select module has them."""

LONGEST_POLL = 1_000_000.0
"""Seconds that a poll takes at most: its number of milliseconds has 31 bits. Who wants more asks again."""
CONNECT_TIMEOUT = 10.0
"""Seconds that connecting may take."""
KEPT_MEMORY = 32 * 1024 * 1024
"""Bytes of free memory at the end of the heap that stay with the process while it serves a guest."""
TURNED_AWAY = "another guest from {} was turned away: one at a time"
"""What is logged of a guest that comes while another is served."""
BACKLOG = 8
"""Connections that may wait to be accepted."""


class Address(NamedTuple):
    """Where to listen or connect. *port* is None for a Unix socket, whose path is *host*."""

    host: str
    port: int | None

    def __str__(self) -> str:
        if self.port is None:
            return f"unix:{self.host}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_address(text: str) -> Address:
    """Read ``host:port``, ``[v6 address]:port`` or ``unix:/path``. Raises ValueError that tells the forms."""
    if text.startswith("unix:"):
        if len(text) == len("unix:"):
            raise ValueError("unix: needs a path, as in unix:/run/usbredir.sock")
        return Address(text[len("unix:") :], None)
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError(f"{text!r}: put an IPv6 address into brackets, as in [::1]:4000")
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 0xFFFF:
        raise ValueError(
            f"{text!r} is not an address: use HOST:PORT, [IPV6]:PORT or unix:/PATH, with a port up to 65535"
        )
    return Address(host, int(port))


class Waker:
    """Two sockets: a byte through them ends a poll. Threads: any; :meth:`clear` one."""

    def __init__(self) -> None:
        self._ends = socket.socketpair()
        for end in self._ends:
            end.setblocking(False)
        self.fileno = self._ends[0].fileno

    def wake(self) -> None:
        """Let the poll return."""
        with contextlib.suppress(OSError):  # full: it returns anyway; closed: nobody polls any more
            self._ends[1].send(b"w")

    def clear(self) -> None:
        """The poll has returned."""
        with contextlib.suppress(OSError):
            self._ends[0].recv(64)

    def close(self) -> None:
        """Close the sockets. Idempotent."""
        for end in self._ends:
            end.close()


class Connection:
    """A connected socket, not blocking, as the callbacks of parsers want it. Owns the socket.

    TCP keep-alive is on, as :meth:`keep_alive` has it without arguments, where the system lets it.

    Threads: one reader, one writer.
    """

    def __init__(self, sock: socket.socket, name: str) -> None:
        sock.setblocking(False)
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            # Replies are small and awaited: never hold them back to fill a segment.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(OSError):  # of no use to those who go on without
            _keep_alive.keep_alive(sock)
        self.name = name
        self.bytes_received = 0
        self.bytes_sent = 0
        self._socket = sock
        # Bound once: at every packet that is flushed alone this takes 100 ns less.
        self._recv = sock.recv
        self._send = sock.send
        self._sendmsg: Callable[..., int] | None = getattr(sock, "sendmsg", None)  # not on Windows
        self._drained = False
        self._waker: Waker | None = None
        self._poller = Poller()
        self._wanted: list[Wanted | None] = [None, None]  # for reading only, and for both: made once
        self.fileno: Callable[[], int] = sock.fileno
        """The descriptor, for polling; -1 when closed. The socket's own method: it is asked for in every round."""

    def keep_alive(self, *, idle: int = _keep_alive.IDLE, unanswered: float | None = None) -> None:
        """Choose when the system finds out that the peer's machine is gone; nothing to do for Unix sockets.

        idle: seconds of silence before probes are sent (SO_KEEPALIVE). unanswered: seconds that sent data may stay
        unacknowledged before the connection counts as broken, also when the peer is there but reads nothing, such
        as a paused virtual machine; None: as long as the system likes, often 15 minutes. Where the system has no
        such options, its own times hold. Raises OSError.
        """
        _keep_alive.keep_alive(self._socket, idle=idle, unanswered=unanswered)

    def read(self, count: int) -> bytes | None:
        """Up to *count* bytes; None: nothing there now; b"": end of the stream."""
        if self._drained:
            # The last read was short, so there was no more: save the call that would only say so.
            self._drained = False
            return None
        try:
            data = self._recv(count)
        except (BlockingIOError, InterruptedError):
            return None
        self._drained = 0 < len(data) < count
        self.bytes_received += len(data)
        return data

    def at_end(self) -> bool:
        """Whether the next read would find the end of the stream, or an error."""
        try:
            return not self._socket.recv(1, socket.MSG_PEEK)
        except (BlockingIOError, InterruptedError):
            return False
        except OSError:
            return True

    def write(self, data: memoryview) -> int | None:
        """Send what the socket takes; None: nothing now."""
        try:
            count = self._send(data)
        except (BlockingIOError, InterruptedError):
            return None
        self.bytes_sent += count
        return count

    def writev(self, buffers: Sequence[memoryview]) -> int | None:
        """Send what the socket takes of several buffers, without joining them; None: nothing now."""
        try:
            count = self._send(buffers[0]) if self._sendmsg is None or len(buffers) == 1 else self._sendmsg(buffers)
        except (BlockingIOError, InterruptedError):
            return None
        self.bytes_sent += count
        return count

    def wait(self, timeout: float | None, *, writing: bool) -> None:
        """Block until the socket can be read, or with *writing* written, or :meth:`wake` is called. Threads: one.

        It may also return for no reason. Raises OSError after :meth:`close`.
        """
        if self.fileno() < 0:
            raise OSError(errno.EBADF, "the connection was closed")
        if self._waker is None:
            self._waker = Waker()
            return  # what was to wake this call until now could not
        if self._wanted[writing] is None:
            events = POLLIN | POLLOUT if writing else POLLIN
            self._wanted[writing] = ((self.fileno(), events), (self._waker.fileno(), POLLIN))
        ready = self._poller.wait(self._wanted[writing] or (), timeout)
        self._drained = False  # whatever the last read has said
        if self._waker.fileno() in ready:
            self._waker.clear()

    def wake(self) -> None:
        """Make a :meth:`wait` of another thread return, now or the next time. Threads: any."""
        if self._waker is not None:  # None: the first wait returns at once
            self._waker.wake()

    def close(self) -> None:
        """Close the socket. Idempotent."""
        self._socket.close()
        if self._waker is not None:
            self._waker.close()

    def __enter__(self) -> Connection:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None, /
    ) -> None:
        self.close()


class Listener:
    """A listening socket. *address* tells the real port. Threads: one."""

    def __init__(self, sock: socket.socket, address: Address) -> None:
        self._socket = sock
        self._socket.setblocking(False)
        if address.port is None:
            self.address = address
        else:
            host, port = sock.getsockname()[:2]
            self.address = Address(host, port)

    def fileno(self) -> int:
        """The descriptor, for polling."""
        return self._socket.fileno()

    def accept(self, timeout: float | None = None) -> Connection | None:
        """The next connection, or None when none came within *timeout* seconds (None: wait for ever)."""
        if not poll([(self.fileno(), POLLIN)], timeout):
            return None
        try:
            sock, peer = self._socket.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return None
        try:
            return Connection(sock, _peer_name(peer))
        except OSError:  # it has gone again
            sock.close()
            return None

    def refuse(self) -> str | None:
        """Accept and close one connection that waits; its name, or None. Never raises: others must not suffer."""
        with contextlib.suppress(OSError):
            connection = self.accept(0)
            if connection is not None:
                connection.close()
                return connection.name
        return None

    def close(self) -> None:
        """Stop listening; a Unix socket's file is removed. Idempotent."""
        if self._socket.fileno() < 0:
            return
        self._socket.close()
        if self.address.port is None:
            with contextlib.suppress(OSError):
                os.unlink(self.address.host)

    def __enter__(self) -> Listener:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None, /
    ) -> None:
        self.close()


def _peer_name(peer: object) -> str:
    if isinstance(peer, tuple) and len(peer) >= 2:
        return str(Address(str(peer[0]), int(peer[1])))
    return "a local process"


def listen(address: str) -> Listener:
    """Listen on an address. Raises ValueError for its form, OSError when it cannot be had."""
    where = parse_address(address)
    if where.port is None:
        return Listener(_listen_unix(where.host), where)
    family, _, _, _, sockaddr = socket.getaddrinfo(
        where.host, where.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        if os.name == "posix":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if where.host == "::":  # all addresses, those of IPv4 as well, also where that is not the system's default
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.bind(sockaddr)
        sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    return Listener(sock, where)


def _listen_unix(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_stale(path)
        sock.bind(path)
        sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def _remove_stale(path: str) -> None:
    """Remove a socket that a killed process left behind; one that answers, and any other file, stays."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)
            try:
                probe.connect(path)
            except BlockingIOError:
                return  # somebody is there, with as many waiting as fit
            except ConnectionRefusedError:
                os.unlink(path)


class Connector:
    """A connection on its way, that blocks nobody (but for the name's look-up). Threads: one.

    Poll :meth:`fileno` for writing, then call :meth:`finish`. A name's addresses are tried one after the other.
    Raises ValueError for the form of *address*, OSError when it cannot be looked up or nobody answers.
    """

    def __init__(self, address: str) -> None:
        self.address = parse_address(address)
        self._candidates = _candidates(self.address)
        self._socket = self._start()

    def fileno(self) -> int:
        """The descriptor, for polling."""
        return self._socket.fileno()

    def finish(self) -> Connection | None:
        """The connection, or None while it is still on its way. Raises OSError when nobody answers."""
        if not poll([(self.fileno(), POLLOUT)], 0):
            return None
        code = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if not code:
            return Connection(self._socket, str(self.address))
        self._socket.close()
        if not self._candidates:
            raise OSError(code, os.strerror(code))
        self._socket = self._start()
        return None

    def close(self) -> None:
        """Give up."""
        self._socket.close()

    def _start(self) -> socket.socket:
        """Begin with the next address that can be tried at all."""
        while True:
            family, where = self._candidates.pop(0)
            sock = socket.socket(family, socket.SOCK_STREAM)
            try:
                sock.setblocking(False)
                _begin(sock, where)
                return sock
            except OSError:
                sock.close()
                if not self._candidates:
                    raise


def _begin(sock: socket.socket, where: Any) -> None:
    try:
        sock.connect(where)
    except BlockingIOError:
        if sock.family not in (socket.AF_INET, socket.AF_INET6):
            raise  # too many wait there: a Unix socket does not go on by itself


def _candidates(address: Address) -> list[tuple[int, Any]]:
    """(address family, socket address) pairs."""
    if address.port is None:
        return [(socket.AF_UNIX, address.host)]
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    except UnicodeError as error:
        raise OSError(errno.EINVAL, "not a host name") from error
    return [(int(family), where) for family, _, _, _, where in found]


def connect(address: str, timeout: float = CONNECT_TIMEOUT) -> Connection:
    """Connect to an address. Raises ValueError for its form, OSError when nobody answers (in time: TimeoutError)."""
    connector = Connector(address)
    end = time.monotonic() + timeout
    try:
        while True:
            poll([(connector.fileno(), POLLOUT)], max(0.0, end - time.monotonic()))
            connection = connector.finish()
            if connection is not None:
                return connection
            if time.monotonic() >= end:
                raise TimeoutError(errno.ETIMEDOUT, f"no answer within {timeout:g} seconds")
    except BaseException:
        connector.close()
        raise


Wanted = Sequence[tuple[int, int]]
"""What to poll: (descriptor, event mask) pairs."""


class Poller:
    """poll(2) for a loop that asks for nearly the same descriptors every time. Threads: one."""

    def __init__(self) -> None:
        self._poll = select.poll() if hasattr(select, "poll") else None
        self._wanted: Wanted = ()
        self._registered: dict[int, int] = {}

    def wait(self, wanted: Wanted, timeout: float | None) -> dict[int, int]:
        """Wait until a descriptor is ready: {descriptor: events}."""
        if self._poll is None:
            return _poll_with_select(wanted, timeout)
        if wanted is not self._wanted and wanted != self._wanted:
            self._register(wanted)
        # Rounded up, so that a timer that is nearly due does not spin.
        return dict(self._poll.poll(None if timeout is None else int(min(timeout, LONGEST_POLL) * 1000 + 0.999)))

    def _register(self, wanted: Wanted) -> None:
        assert self._poll is not None
        masks: dict[int, int] = {}
        for descriptor, events in wanted:
            masks[descriptor] = masks.get(descriptor, 0) | events
        for descriptor in self._registered.keys() - masks.keys():
            self._poll.unregister(descriptor)
        for descriptor, events in masks.items():
            if self._registered.get(descriptor) != events:
                self._poll.register(descriptor, events)
        self._registered = masks
        self._wanted = wanted


def poll(wanted: Wanted, timeout: float | None) -> dict[int, int]:
    """Wait once until a descriptor is ready: {descriptor: events}."""
    return Poller().wait(wanted, timeout)


def _poll_with_select(wanted: Wanted, timeout: float | None) -> dict[int, int]:
    """:func:`poll` for Windows."""
    reading = [descriptor for descriptor, events in wanted if events & POLLIN]
    writing = [descriptor for descriptor, events in wanted if events & POLLOUT]
    if not reading and not writing:
        time.sleep(timeout or 0)
        return {}
    readable, writable, _ = select.select(reading, writing, [], timeout)
    ready = dict.fromkeys(readable, POLLIN)
    for descriptor in writable:
        ready[descriptor] = ready.get(descriptor, 0) | POLLOUT
    return ready


# ---------------------------------------------------------------- a host on a connection


class HostConnection(HostCallbacks):
    """Joins a host to a connection. Threads: as :class:`~usbredir.host.Host`."""

    def __init__(self, connection: Connection, log: Callable[[LogLevel, str], None] | None = None) -> None:
        self.connection = connection
        self.read = connection.read  # type: ignore[method-assign]
        self.write = connection.write  # type: ignore[method-assign]
        self.writev = connection.writev
        self._log = log

    def log(self, level: LogLevel, message: str) -> None:
        """Hand a message to the function that was given, else to the logger "usbredir.host"."""
        (self._log or super().log)(level, message)


@cache  # once: the next block would come from the heap, and be cleared
def _keep_memory() -> None:
    """Let the C library keep the memory of large payloads for the next ones, until the guest has left.

    glibc gives free memory back when there is more than twice the largest block that was mapped, and freed, so far. So
    one is, untouched. Without it writing 1 MiB at a time, 16 in flight, takes 260 page faults each and twice the CPU
    time. Other C libraries do not mind.
    """
    bytes(KEPT_MEMORY // 2)


def _give_memory_back() -> None:
    """Nobody needs what was kept until the next guest comes: all of it, not only the end of the heap."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


class Session:
    """One guest, served by a host: what to wait for, and what to do in a round. Threads: one.

    Args:
        device: what to export; None: later, with ``session.host.set_device``.

    Others as for :class:`~usbredir.host.Host`. Raises what its ``set_device`` raises.
    """

    def __init__(
        self,
        connection: Connection,
        device: UsbDevice | None,
        *,
        version: str = VERSION,
        limits: Limits = Limits(),  # noqa: B008 - immutable
        log: Callable[[LogLevel, str], None] | None = None,
    ) -> None:
        _keep_memory()
        self.connection = connection
        self.host = Host(HostConnection(connection, log), device, version=version, limits=limits)

    def wanted(self) -> list[tuple[int, int]]:
        """Descriptors to poll: the guest's and the device's."""
        host = self.host
        events = 0 if host.reading_paused else POLLIN
        if host.has_data_to_write():
            events |= POLLOUT
        device = host.device
        own = (self.connection.fileno(), events)
        return [own] if device is None else [own, *device.pollfds()]

    def timeout(self) -> float | None:
        """Seconds until :meth:`step` is due without any descriptor being ready, or None."""
        device = self.host.device
        return None if device is None else device.next_timeout()

    def step(self, ready: Mapping[int, int]) -> None:
        """One round: read requests, complete transfers, write answers.

        Raises ConnectionClosed when the guest has left, and what ``Host.read_guest_data`` raises.
        """
        host = self.host
        if ready.get(self.connection.fileno(), 0) & (POLLIN | POLL_ERRORS):
            host.read_guest_data()
        device = host.device
        if device is not None:
            device.handle_events(0)
        host.write_guest_data()

    def is_occupied(self) -> bool:
        """Whether the guest is still there, so that others have to be turned away."""
        return self.host.reading_paused or not self.connection.at_end()

    def close(self, *, give_back: bool = True) -> None:
        """Release the device; what is queued is written as far as the socket takes it. Idempotent."""
        try:
            with contextlib.suppress(OSError):
                self.host.write_guest_data()
        finally:
            self.host.close(give_back=give_back)
            _give_memory_back()


def serve(
    connection: Connection,
    device: UsbDevice,
    *,
    version: str = VERSION,
    limits: Limits = Limits(),  # noqa: B008 - immutable
    log: Callable[[LogLevel, str], None] | None = None,
    listener: Listener | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> None:
    """Serve one guest with *device*, in this thread, until it leaves or *stop* says so; the device is released then.

    A device that is lost while nothing is under way is noticed with the next request; ``stop=lambda: device.lost``
    ends at once. Other guests that come to *listener* meanwhile are turned away.
    Raises DeviceRejectedError, DeviceLostError, DeviceClaimError, RemoteProtocolError (the connection is of no use
    any more) and OSError. Threads: one.
    """
    session = Session(connection, device, version=version, limits=limits, log=log)
    poller = Poller()
    try:
        while not stop():
            wanted = session.wanted()
            if listener is not None:
                wanted.append((listener.fileno(), POLLIN))
            ready = poller.wait(wanted, session.timeout())
            session.step(ready)
            if listener is not None and listener.fileno() in ready and session.is_occupied():
                turn_away(listener, session.host.log)
    except ConnectionClosed:
        return
    finally:
        session.close()


def turn_away(listener: Listener, log: Callable[[LogLevel, str], None]) -> None:
    """Refuse one guest that comes while another is served."""
    name = listener.refuse()
    if name:
        log(LogLevel.WARNING, TURNED_AWAY.format(name))


# ---------------------------------------------------------------- a guest on a connection


class GuestConnection(GuestCallbacks):
    """Joins a guest to a connection. Threads: as :class:`~usbredir.guest.Guest`."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.read = connection.read  # type: ignore[method-assign]
        self.write = connection.write  # type: ignore[method-assign]
        self.writev = connection.writev

    def wait(self, timeout: float | None, *, writing: bool) -> None:
        """Block until the socket can be read, or with *writing* written."""
        self.connection.wait(timeout, writing=writing)

    def wake(self) -> None:
        """Make :meth:`wait` return."""
        self.connection.wake()
