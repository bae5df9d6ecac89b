"""Completed transfers on their way to the thread that handles a device's events.

Whatever thread finds that a transfer has completed puts it here; its callback runs in ``handle_events`` only, one at a
time. Who waits there, or polls the socket, is woken.
"""

from __future__ import annotations

import contextlib
import ctypes
import socket
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

__all__ = ["POLLIN", "Completions"]

POLLIN = 1
"""poll(2)'s number; not every platform's select module has it."""

Item = TypeVar("Item")


class Completions(Generic[Item]):
    """Threads: any.

    Attributes:
        done: completed, callback not yet run.
        signalled: not zero when there is something to do; a C integer, so that libusb sees it before it waits.
    """

    def __init__(self) -> None:
        self.done: deque[Item] = deque()
        self.signalled = ctypes.c_int(0)
        self._turn = threading.RLock()  # held by the thread that runs completions
        self._condition = threading.Condition()
        self._sockets: tuple[socket.socket, socket.socket] | None = None
        self._pollfds: Sequence[tuple[int, int]] = ()
        self._closed = False

    def handle(
        self, timeout: float | None, wait: Callable[[float | None], None], complete: Callable[[Item], None]
    ) -> None:
        """``handle_events``: *wait* until something has completed, *timeout* seconds at most, then *complete* it.

        When another thread is doing so, that one does the work and this call only waits.
        """
        if not self._turn.acquire(blocking=False):
            limit = -1.0 if timeout is None else min(max(timeout, 0.0), threading.TIMEOUT_MAX)
            if not limit or not self._turn.acquire(timeout=limit):
                return
        try:
            # Cleared before looking for work: what comes later signals again.
            if self.done or (self.signalled.value and self._clear()):
                timeout = 0.0
            wait(timeout)
            if self.signalled.value:
                self._clear()
            # What completions submit is for the next call: a busy device must not keep its caller for ever.
            for _ in range(len(self.done)):
                if not self.done:  # a completion has handled events itself
                    break
                complete(self.done.popleft())
        finally:
            if self.done:  # a completion raised: pollers have to hear of the rest
                self.signal()
            self._turn.release()

    def pause(self, timeout: float) -> None:
        """Wait until no other thread is in :meth:`handle`, *timeout* seconds at most."""
        if self._turn.acquire(timeout=timeout):
            self._turn.release()

    def signal(self) -> None:
        """There is something to do."""
        if self.signalled.value:  # not cleared yet, so who clears it will look
            return
        with self._condition:
            self.signalled.value = 1
            self._condition.notify_all()
            self._tell_pollers()

    def _tell_pollers(self) -> None:
        if self._sockets is not None:
            with contextlib.suppress(OSError):
                self._sockets[1].send(b"w")

    def _clear(self) -> bool:
        """Forget a signal; whether there was one."""
        if not self.signalled.value:
            return False
        with self._condition:
            self.signalled.value = 0
            if self._sockets is not None:
                with contextlib.suppress(OSError):
                    self._sockets[0].recv(64)
        return True

    def wait(self, timeout: float | None) -> None:
        """Wait for a signal, unless something has completed, or this is closed."""
        if timeout != 0 and not self.done:
            if timeout is not None:
                timeout = min(timeout, threading.TIMEOUT_MAX)
            with self._condition:
                self._condition.wait_for(lambda: self.signalled.value or self._closed, timeout)

    def pollfds(self) -> Sequence[tuple[int, int]]:
        """A socket that is readable while there is a signal."""
        if self._pollfds:  # asked for in every round
            return self._pollfds
        with self._condition:
            if self._sockets is None and not self._closed:
                self._sockets = socket.socketpair()
                for end in self._sockets:
                    end.setblocking(False)
                if self.signalled.value:
                    self._tell_pollers()
            if self._sockets is not None:
                self._pollfds = ((self._sockets[0].fileno(), POLLIN),)
            return self._pollfds

    def close(self) -> None:
        """Close the sockets; who waits is woken."""
        self.signal()
        with self._condition:
            self._closed = True
            sockets, self._sockets = self._sockets, None
            self._pollfds = ()
        for end in sockets or ():
            end.close()
