"""A device on a TCP port of this machine, served by a thread."""

from __future__ import annotations

import threading
from types import TracebackType

from ..device import UsbDevice
from ..errors import ConnectionClosed, DeviceError, RemoteProtocolError
from ..transport import Connection, Poller, Session, Waker, listen
from ._packet_log import PacketLog

__all__ = ["Server"]

POLLIN = 1
STOP_LIMIT = 5.0
"""Seconds that the thread may take to end."""


class Server:
    """Serves *device* on a free port: guests one after the other, those that come meanwhile wait.

    Attributes:
        device: the device; it is not closed.
        address: ``127.0.0.1:port``.

    The device starts anew when a guest leaves, as it does for :func:`usbredir.transport.serve`. When it is lost guests
    are turned away. A guest that breaks the protocol loses its connection, the next one is served. What a hook of the
    device raises is raised by :meth:`close`, and ends the service, unless it is an OSError.

    Threads: any.
    """

    def __init__(self, device: UsbDevice, *, log: PacketLog | None = None) -> None:
        self.device = device
        self._log = log
        self._listener = listen("127.0.0.1:0")
        self.address = str(self._listener.address)
        self._waker = Waker()
        self._stopping = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=f"server of {type(device).__name__}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the service and the connection to a guest that is still there. Idempotent.

        Raises what a hook of the device raised, once, and RuntimeError when one does not return.
        """
        self._stopping = True
        self._waker.wake()
        self._thread.join(STOP_LIMIT)
        if self._thread.is_alive():
            raise RuntimeError(f"{self.device!r} does not end: a hook, or handle_events, blocks")
        self._waker.close()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None, /
    ) -> None:
        self.close()

    def _run(self) -> None:
        poller = Poller()
        with self._listener:
            while not self._stopping:
                poller.wait([(self._listener.fileno(), POLLIN), (self._waker.fileno(), POLLIN)], None)
                connection = self._listener.accept(0)
                if connection is not None:
                    with connection:
                        self._serve(connection)

    def _serve(self, connection: Connection) -> None:
        """One guest, until it leaves or the device is lost."""
        if self._log is not None:
            self._log.attach(connection)
        try:
            self._run_session(Session(connection, self.device))
        except (ConnectionClosed, ConnectionError, RemoteProtocolError, DeviceError):
            pass  # the guest has left, perhaps in the middle of something, or is none, or the device is lost
        except OSError as error:  # of the connection or of a hook: nobody can tell
            self._error = self._error or error
        except Exception as error:
            self._error = error
            self._stopping = True

    def _run_session(self, session: Session) -> None:
        poller = Poller()
        try:
            while not self._stopping:
                ready = poller.wait([*session.wanted(), (self._waker.fileno(), POLLIN)], session.timeout())
                session.step(ready)
                if self.device.lost:  # no transfer may have been there to tell
                    session.host.set_device(None)
                    return
        finally:
            session.close()
