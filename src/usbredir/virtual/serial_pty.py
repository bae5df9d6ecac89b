"""A serial port between the guest and a terminal of this machine, for programs that know terminals only.

::

    port = PtySerialPort("/tmp/board")  # programs here open /tmp/board, those of the guest /dev/ttyACM0

Source: openpty(3), termios(3).
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
from pathlib import Path

from ..proto import Speed
from .serial_port import SerialPort

__all__ = ["PtySerialPort"]

PIECE = 4096
"""Bytes moved at a time."""


class PtySerialPort(SerialPort):
    """A serial port whose near end is a pseudo-terminal, in raw mode. Not on Windows.

    Both ways bytes wait, and are not lost, while the other side does not take them. Two threads move them until the
    device is closed.

    Args:
        link: path of a symbolic link to the terminal. One that is there is replaced; it is removed at the end.
        serial: serial number, None for none.
        speed: full, high (default) or super.

    Raises:
        OSError: there is no pseudo-terminal, or no link can be made.
        ValueError: at low speed.

    Attributes:
        path: of the terminal.
    """

    def __init__(
        self, link: str | os.PathLike[str] | None = None, *, serial: str | None = None, speed: Speed = Speed.HIGH
    ) -> None:
        super().__init__(serial=serial, speed=speed)
        self._link = None if link is None else Path(link)
        with contextlib.ExitStack() as files:
            # The far end stays open here as well: a terminal that nobody has open would hang up.
            self._near, far = (_kept(files, descriptor) for descriptor in os.openpty())
            self._stopped, stop = (_kept(files, descriptor) for descriptor in os.pipe())
            self.path = _prepare(self._near, far)
            if self._link is not None:
                _make_link(self._link, self.path)
            files.pop_all()
        self._files = [self._near, far, self._stopped]
        self._stop: int | None = stop
        self._threads = [
            threading.Thread(target=move, name=f"{self.path} {way}", daemon=True)
            for move, way in ((self._move_in, "to the guest"), (self._move_out, "from the guest"))
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Close the device, then the terminal. Idempotent."""
        super().close()
        stop, self._stop = self._stop, None
        if stop is None:
            return
        os.close(stop)  # which the threads see
        for thread in self._threads:
            thread.join()
        for descriptor in self._files:
            os.close(descriptor)
        if self._link is not None:
            with contextlib.suppress(OSError):
                if os.readlink(self._link) == self.path:  # nobody has replaced it since
                    self._link.unlink()

    def _move_in(self) -> None:
        while self._wait_for(select.POLLIN):
            self.write(os.read(self._near, PIECE), None)

    def _move_out(self) -> None:
        while data := self.read(1) + self.read(PIECE, 0):
            while data:
                if not self._wait_for(select.POLLOUT):
                    return
                data = data[os.write(self._near, data) :]

    def _wait_for(self, event: int) -> bool:
        """Wait until the terminal is ready; False: the device is closed."""
        poll = select.poll()
        poll.register(self._near, event)
        poll.register(self._stopped, select.POLLIN)
        return self._stopped not in dict(poll.poll())


def _kept(files: contextlib.ExitStack, descriptor: int) -> int:
    files.callback(os.close, descriptor)
    return descriptor


def _prepare(near: int, far: int) -> str:
    """Bytes go through unchanged; the path of the far end."""
    import tty  # here, so that Windows can import this module

    tty.setraw(far)
    os.set_blocking(near, False)
    return os.ttyname(far)


def _make_link(link: Path, target: str) -> None:
    if link.is_symlink():
        link.unlink()
    link.symlink_to(target)
