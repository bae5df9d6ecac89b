"""Where a pyusb back end has its devices from: hosts at addresses, connected when needed, and guests of others.

Source: docs/drive-a-remote-device.md.
"""

from __future__ import annotations

import errno
import logging
import threading
import time

from ._pyusb_device import RemoteDevice
from .errors import ConnectionClosed, DeviceLostError, UsbRedirError
from .guest import Guest
from .transport import Connection, GuestConnection, connect, parse_address

__all__ = ["Bus", "BusAt", "BusOf"]

LAST_ADDRESS = 127
"""Largest address of a device on a bus (USB 2.0, 9.4.6)."""
ANSWER_TIMEOUT = 5.0
"""Seconds that a host may take to say whether the device is still there."""
GLANCE = 0.001
"""Seconds to wait for the news of a device that has come."""
RETRY = 0.05
"""Seconds between two attempts at a host that is busy with its former guest."""

log = logging.getLogger("usbredir.pyusb_backend")


class Bus:
    """A bus with at most one device. Threads: any."""

    def __init__(self, bus: int) -> None:
        self._bus = bus
        self._known: RemoteDevice | None = None
        self._announced: object = None
        self._addresses = 0
        self._lock = threading.RLock()

    def device(self) -> RemoteDevice | None:
        """The device that is there now. A new one, also the same that came again, has the next address."""
        with self._lock:
            guest = self._current_guest()
            if guest is None or guest.device is None:
                return None
            if guest.device is not self._announced:
                announced, address = guest.device, self._addresses % LAST_ADDRESS + 1
                try:
                    self._known = RemoteDevice(guest, self._bus, address)
                except (UsbRedirError, OSError, ValueError) as error:
                    log.warning("a device that cannot be used now: %s", error)
                    return None
                self._announced, self._addresses = announced, address
            return self._known

    def _current_guest(self) -> Guest | None:
        """The guest, after it has read what has come; None: there is no connection."""
        raise NotImplementedError

    def disconnect(self) -> None:
        """End the connection, if it is this object's; the device is not told first."""

    def close(self) -> None:
        """Stop what runs on the device."""
        with self._lock:
            if self._known is not None:
                self._known.stop_streams()


class BusOf(Bus):
    """The host of a guest that the application has made, and closes. Raises nothing when it is gone."""

    def __init__(self, bus: int, guest: Guest) -> None:
        super().__init__(bus)
        self._guest = guest

    def _current_guest(self) -> Guest | None:
        return self._guest if _look(self._guest) else None


class BusAt(Bus):
    """The host at an address: connected by :meth:`connect`, and again by :meth:`device` after the connection broke.

    Args:
        patience: seconds that connecting, and waiting for the first device, may take.
    """

    def __init__(self, bus: int, address: str, patience: float) -> None:
        super().__init__(bus)
        parse_address(address)
        self.address = address
        self._patience = patience
        self._connection: Connection | None = None
        self._guest: Guest | None = None
        self._closed = False

    def connect(self, given: Connection | None = None) -> None:
        """Connect, if that is not done, and wait for the device; a host that has none yet is no error.

        *given* is a connection that somebody else has made, used first; it is owned from now on.
        Raises OSError when nobody answers. A host that closes the connection at once is busy with another guest,
        perhaps with the last one's end: it is tried again.
        """
        with self._lock:
            end = time.monotonic() + self._patience
            turned_away = False
            while self._guest is None:
                try:
                    connection, given = given, None
                    self._try_once(connection or connect(self.address, max(0.0, end - time.monotonic())), end)
                except (ConnectionClosed, ConnectionResetError, BrokenPipeError, TimeoutError) as error:
                    turned_away = turned_away or not isinstance(error, TimeoutError)
                    if time.monotonic() < end:
                        time.sleep(RETRY)
                    elif turned_away:
                        raise OSError(errno.EBUSY, "another guest uses the device") from error
                    else:
                        raise

    def _try_once(self, connection: Connection, end: float) -> None:
        self._connection = connection
        guest = self._guest = Guest(GuestConnection(connection))
        try:
            guest.wait_for_device(max(0.0, end - time.monotonic()))
        except TimeoutError:
            if not guest.host_version:
                self.disconnect()
                raise TimeoutError(errno.ETIMEDOUT, "somebody answers, but says nothing") from None
            log.warning("the host at %s has announced no device yet", self.address)
        except BaseException:
            self.disconnect()
            raise

    def _current_guest(self) -> Guest | None:
        if self._closed:
            return None
        if self._guest is not None and not _look(self._guest):
            self.disconnect()
        if self._guest is None:
            try:
                self.connect()
            except (UsbRedirError, OSError) as error:
                log.warning("no connection to %s: %s", self.address, error)
        return self._guest

    def disconnect(self) -> None:
        """End the connection; the device is not told first."""
        if self._guest is not None:
            self._guest.close()
        if self._connection is not None:
            self._connection.close()
        self._guest = self._connection = None

    def close(self) -> None:
        """Stop what runs on the device, and end the connection for good."""
        with self._lock:
            super().close()
            self._closed = True
            self.disconnect()


def _look(guest: Guest) -> bool:
    """Take note of a device that has come or gone. False: the connection has ended."""
    try:
        if guest.device is None:
            guest.wait_for_device(GLANCE)
        else:  # what the host has to say of the device comes before its answer
            guest.get_configuration(timeout=ANSWER_TIMEOUT)
    except (TimeoutError, DeviceLostError):
        return True
    except (UsbRedirError, OSError):
        return False
    return True
