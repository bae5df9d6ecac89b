"""The lock-callback protocol: how an application switches thread-safety on.

Without locks (``locks=None``, the default everywhere) an object is for one thread and no
lock callback is ever called. With them, the methods that docs/threads.md marks "any
number of callers" may be called from any thread. The library never calls into the
application (write, log, packet callbacks) while it holds a lock of the output queue.
"""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Protocol

__all__ = ["Guard", "LockCallbacks", "ThreadingLocks"]


class LockCallbacks(Protocol):
    """What an application supplies. Source: the original's README.multi-thread."""

    def alloc_lock(self) -> object | None:
        """A new, unlocked, non-recursive lock. None means: no locking."""
        ...

    def lock(self, lock: object, /) -> None:
        """Block until *lock* is held."""
        ...

    def unlock(self, lock: object, /) -> None:
        """Release *lock*."""
        ...

    def free_lock(self, lock: object, /) -> None:
        """*lock*, unlocked, is no longer needed. Called once per lock."""
        ...


class ThreadingLocks(LockCallbacks):
    """Ready-made lock callbacks on :class:`threading.Lock`."""

    def alloc_lock(self) -> object | None:
        """A new :class:`threading.Lock`."""
        return threading.Lock()

    def lock(self, lock: object, /) -> None:
        """Block until *lock* is held."""
        assert isinstance(lock, type(threading.Lock()))
        lock.acquire()

    def unlock(self, lock: object, /) -> None:
        """Release *lock*."""
        assert isinstance(lock, type(threading.Lock()))
        lock.release()

    def free_lock(self, lock: object, /) -> None:
        """Nothing to do: the garbage collector frees it."""


class Guard:
    """One application lock as a context manager; does nothing when there is no locking.

    Threads: any, as the application's lock allows.
    """

    __slots__ = ("_callbacks", "_lock")

    def __init__(self, callbacks: LockCallbacks | None) -> None:
        self._callbacks = callbacks
        self._lock: object | None = None if callbacks is None else callbacks.alloc_lock()
        if self._lock is None:
            self._callbacks = None

    @property
    def active(self) -> bool:
        """Whether there is a lock at all."""
        return self._callbacks is not None

    def __enter__(self) -> None:
        if self._callbacks is not None:
            self._callbacks.lock(self._lock)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None, /
    ) -> None:
        if self._callbacks is not None:
            self._callbacks.unlock(self._lock)

    def section(self) -> AbstractContextManager[object]:
        """What ``with`` takes to hold the lock, the cheapest object that can stand there.

        A lock of the interpreter costs 120 ns in a ``with``, two methods in Python 400. So where there is no locking
        it is one of those, and with :class:`ThreadingLocks` the application's lock itself.
        """
        if type(self._callbacks) is ThreadingLocks:
            assert isinstance(self._lock, type(threading.Lock()))
            return self._lock
        return self if self.active else threading.RLock()

    def free(self) -> None:
        """Give the lock back to the application. Idempotent; afterwards nothing is locked."""
        callbacks, self._callbacks = self._callbacks, None
        if callbacks is not None:
            callbacks.free_lock(self._lock)
