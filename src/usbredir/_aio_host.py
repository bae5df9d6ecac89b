"""Hosts in an event loop: one guest served on an asyncio transport, and a server for one after the other."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable
from types import TracebackType
from typing import Any

from ._aio_stream import Log, TransportStream
from .device import UsbDevice
from .errors import ConnectionClosed
from .host import Host
from .limits import Limits
from .parser import VERSION, LogLevel
from .transport import POLL_ERRORS, POLLIN, POLLOUT, TURNED_AWAY, Address, Listener, Wanted, listen, parse_address

__all__ = ["Server", "Session", "serve"]

DeviceSource = UsbDevice | Callable[[], UsbDevice]


class Session:
    """One guest, served by a host, in an event loop.

    Args:
        device: what to export, or a function that makes it when the guest is there; what it made is closed at the end.
        log: gets the host's messages; None: the logger "usbredir.host".
        on_end: called once, with what ended the session; None: the guest has left.

    Others as for :class:`~usbredir.host.Host`. Make it in a running loop and hand :meth:`protocol` to asyncio, for
    example ``await loop.create_connection(session.protocol, sock=connected)``.

    The device's events are handled in the loop, which needs ``add_reader``: on Windows a selector loop. What a device
    takes its time for, such as a claim, keeps the loop waiting.
    Threads: one, that of the event loop.

    Attributes:
        host: the host.
        ended: whether the session is over.
        error: what ended the session, or None.
    """

    def __init__(
        self,
        device: DeviceSource,
        *,
        version: str = VERSION,
        limits: Limits = Limits(),  # noqa: B008 - immutable
        log: Log | None = None,
        on_end: Callable[[Exception | None], None] | None = None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._stream = TransportStream(self._step, "usbredir.host", log)
        self.host = Host(self._stream, version=version, limits=limits)
        self.ended = False
        self.error: Exception | None = None
        self._source = device
        self._on_end = on_end
        self._made: UsbDevice | None = None  # to be closed
        self._stream.flush_writes = self._flush_soon  # type: ignore[method-assign]
        self._begun = False
        self._stepping = False
        self._watched: Wanted = ()
        self._watched_device: UsbDevice | None = None
        self._next_step: asyncio.Handle | None = None

    def protocol(self) -> asyncio.BaseProtocol:
        """The protocol for the guest's transport: the factory that asyncio wants. For one transport."""
        return self._stream

    def close(self) -> None:
        """Release the device and close the connection. Idempotent."""
        self._end(None)

    async def wait_closed(self) -> None:
        """Return when the guest has left, or :attr:`error` has ended the session, and the connection is closed."""
        await self._stream.closed.wait()

    # ------------------------------------------------------------ rounds

    def _step(self) -> None:
        """One round: read requests, complete transfers, write answers."""
        if self.ended:
            return
        host, stream = self.host, self._stream
        self._stepping = True
        try:
            if not self._begun:
                self._begin()
            host.read_guest_data()
            if host.device is not None:
                host.device.handle_events(0)
            if host.device is not None and host.device.lost:
                host.set_device(None)  # the guest is told
            host.write_guest_data()
            self._watch()
        except ConnectionClosed:
            self._end(None)
        except Exception as error:  # of the connection, or of the device
            self._end(error)
        else:
            if stream.lost:
                self._end(None)  # nobody can be answered, and what is left of the requests was held back for that
            else:
                stream.pace()
                if stream.readable and not host.reading_paused:
                    self._step_after(0)
        finally:
            self._stepping = False

    def _flush_soon(self) -> None:
        """The application has changed something, such as the device; a round writes by itself."""
        if self._begun and not self._stepping and not self.ended:
            self._step_after(0)

    def _begin(self) -> None:
        self._begun = True
        if callable(self._source):
            self._made = self._source()
            self.host.set_device(self._made)
        else:
            self.host.set_device(self._source)

    def _watch(self) -> None:
        """Wait for the device: its descriptors, which may have become others, and its time."""
        device = self.host.device
        wanted = [] if device is None else list(device.pollfds())
        if wanted != self._watched or device is not self._watched_device:  # another one's may have the same numbers
            self._register(wanted)
            self._watched_device = device
        if self._next_step is not None:
            self._next_step.cancel()
            self._next_step = None
        timeout = None if device is None else device.next_timeout()
        if timeout is not None:
            self._step_after(timeout)

    def _register(self, wanted: Wanted) -> None:
        for descriptor, _ in self._watched:
            self._loop.remove_reader(descriptor)
            self._loop.remove_writer(descriptor)
        self._watched = wanted
        for descriptor, events in wanted:
            if events & (POLLIN | POLL_ERRORS):
                self._loop.add_reader(descriptor, self._step)
            if events & POLLOUT:
                self._loop.add_writer(descriptor, self._step)

    def _step_after(self, seconds: float) -> None:
        if self._next_step is not None:
            self._next_step.cancel()
        if seconds > 0:
            self._next_step = self._loop.call_later(seconds, self._step)
        else:
            self._next_step = self._loop.call_soon(self._step)

    def _end(self, error: Exception | None) -> None:
        if self.ended:
            return
        self.ended = True
        self.error = error
        self._register(())
        if self._next_step is not None:
            self._next_step.cancel()
        try:
            with contextlib.ExitStack() as steps:  # from the last one on, whatever the others raise
                if self._made is not None:
                    steps.callback(self._made.close)
                steps.callback(self.host.close)
                self.host.write_guest_data()
        except Exception as problem:  # of the device: the connection ends all the same
            self.error = error = error or problem
        self._stream.close()
        if self._on_end is not None:
            self._on_end(error)
        elif error is not None:
            self.host.log(LogLevel.ERROR, f"a guest's session has ended: {error!r}")


class _Refused(asyncio.Protocol):
    """A guest that comes while another is served."""

    def __init__(self, log: Callable[[LogLevel, str], None]) -> None:
        self._log = log

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Turn it away."""
        peer = transport.get_extra_info("peername")
        name = str(Address(str(peer[0]), int(peer[1]))) if isinstance(peer, tuple) else "a local process"
        self._log(LogLevel.WARNING, TURNED_AWAY.format(name))
        transport.close()


class Server:
    """Serves guests at an address, one after the other; :func:`serve` makes it. ``async with`` closes it.

    Threads: one, that of the event loop.

    Attributes:
        address: where it listens, with the real port.
        session: that of the latest guest, or None.
    """

    def __init__(self, listener: Listener, make_session: Callable[[], Session]) -> None:
        self.address = listener.address
        self.session: Session | None = None
        self._listener = listener
        self._make_session = make_session
        self._accepting: asyncio.AbstractServer | None = None
        self._closed = asyncio.Event()

    async def _start(self) -> None:
        unix = self.address.port is None
        family = socket.AF_UNIX if unix else socket.AF_INET6 if ":" in self.address.host else socket.AF_INET
        loop = asyncio.get_running_loop()
        create_server: Callable[..., Any] = loop.create_unix_server if unix else loop.create_server
        # A duplicate, as asyncio closes what it is given; the listener removes a Unix socket's file.
        sock = socket.fromfd(self._listener.fileno(), family, socket.SOCK_STREAM)
        try:
            self._accepting = await create_server(self._accept, sock=sock)
        except BaseException:
            sock.close()
            raise

    def _accept(self) -> asyncio.BaseProtocol:
        if self.session is not None and not self.session.ended:
            return _Refused(self.session.host.log)
        self.session = self._make_session()
        return self.session.protocol()

    async def serve_forever(self) -> None:
        """Return when the server is closed; cancelling it closes it."""
        try:
            await self._closed.wait()
        finally:
            self.close()

    def close(self) -> None:
        """Serve nobody any more: the present guest's connection is closed, its device released. Idempotent."""
        if self._accepting is not None:
            self._accepting.close()
        self._listener.close()
        if self.session is not None:
            self.session.close()
        self._closed.set()

    async def wait_closed(self) -> None:
        """Return when the server and its last guest's connection are closed."""
        await self._closed.wait()
        if self.session is not None:
            await self.session.wait_closed()

    async def __aenter__(self) -> Server:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None, /
    ) -> None:
        self.close()
        await self.wait_closed()


async def serve(
    device: DeviceSource,
    address: str,
    *,
    version: str = VERSION,
    limits: Limits = Limits(),  # noqa: B008 - immutable
    log: Log | None = None,
    on_end: Callable[[Exception | None], None] | None = None,
) -> Server:
    """Serve guests at *address*, one after the other, until the server is closed; others are turned away meanwhile.

    *on_end* is called after each guest with what ended its session, None: it has left. The server goes on in any case.
    Arguments as for :class:`Session`; a *device* that is no function is the caller's to close. Raises ValueError for
    the form of *address*, OSError when it cannot be had.
    """
    where = parse_address(address)
    if where.port is not None:  # a name is looked up in a thread
        found = await asyncio.get_running_loop().getaddrinfo(
            where.host, where.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        where = Address(str(found[0][4][0]), where.port)
    server = Server(listen(str(where)), lambda: Session(device, version=version, limits=limits, log=log, on_end=on_end))
    try:
        await server._start()
    except BaseException:
        server.close()
        raise
    return server
