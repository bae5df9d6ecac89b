"""The lock-callback protocol, the ready-made locks, and the guard that parsers and hosts use."""

from __future__ import annotations

import inspect
import threading

import pytest

from usbredir.locking import Guard, LockCallbacks, ThreadingLocks
from usbredir.parser import Parser

from .strategies import End
from .test_parser import CountingLocks


def test_the_protocol_has_four_calls() -> None:
    """API: alloc_lock, lock, unlock, free_lock, the lock by position."""
    names = [name for name in vars(LockCallbacks) if name.endswith("lock")]
    assert sorted(names) == ["alloc_lock", "free_lock", "lock", "unlock"]
    for name in ("lock", "unlock", "free_lock"):
        parameters = list(inspect.signature(getattr(LockCallbacks, name)).parameters.values())
        assert parameters[1].kind is inspect.Parameter.POSITIONAL_ONLY


def test_an_application_need_not_inherit() -> None:
    """Anything with the four methods will do."""
    calls: list[str] = []

    class Own:
        def alloc_lock(self) -> object | None:
            return self

        def lock(self, lock: object, /) -> None:
            assert lock is self
            calls.append("lock")

        def unlock(self, lock: object, /) -> None:
            calls.append("unlock")

        def free_lock(self, lock: object, /) -> None:
            calls.append("free")

    with Parser(End(), locks=Own()) as parser:
        parser.do_write()
    assert calls[-1] == "free"
    assert calls.count("lock") == calls.count("unlock") > 0


def test_threading_locks() -> None:
    """New, unlocked, not recursive, each one of its own."""
    locks = ThreadingLocks()
    one, other = locks.alloc_lock(), locks.alloc_lock()
    assert one is not None
    assert other is not None
    assert one is not other
    locks.lock(one)
    locks.lock(other)
    assert isinstance(one, type(threading.Lock()))
    assert not one.acquire(blocking=False)
    locks.unlock(one)
    locks.lock(one)
    locks.unlock(one)
    locks.unlock(other)
    locks.free_lock(one)


def test_threading_locks_block() -> None:
    locks = ThreadingLocks()
    lock = locks.alloc_lock()
    assert lock is not None
    order: list[str] = []
    waiting = threading.Event()
    locks.lock(lock)

    def other() -> None:
        waiting.set()
        locks.lock(lock)
        order.append("second")
        locks.unlock(lock)

    thread = threading.Thread(target=other)
    thread.start()
    assert waiting.wait(60)
    order.append("first")
    locks.unlock(lock)
    thread.join(60)
    assert order == ["first", "second"]


def test_a_guard_locks() -> None:
    locks = CountingLocks()
    guard = Guard(locks)
    assert guard.active
    with guard:
        assert locks.held == locks.allocated
    assert not locks.held
    assert locks.calls == ["alloc", "lock", "unlock"]


def test_a_guard_unlocks_after_an_exception() -> None:
    locks = CountingLocks()
    with pytest.raises(KeyError), Guard(locks):
        raise KeyError
    assert not locks.held


@pytest.mark.parametrize("locks", [None, CountingLocks(give=False)])
def test_a_guard_without_a_lock_does_nothing(locks: CountingLocks | None) -> None:
    guard = Guard(locks)
    assert not guard.active
    with guard, guard:
        pass
    guard.free()
    assert locks is None or locks.calls == ["alloc"]


def test_a_guard_is_freed_once() -> None:
    """Afterwards nothing is locked any more."""
    locks = CountingLocks()
    guard = Guard(locks)
    guard.free()
    guard.free()
    assert locks.freed == locks.allocated
    assert not guard.active
    with guard:
        assert not locks.held


def test_the_section_of_a_guard() -> None:
    """With a lock it is the guard; without, anything that can be entered again and again."""
    locks = CountingLocks()
    guard = Guard(locks)
    assert guard.section() is guard
    section = Guard(None).section()
    with section, section:
        pass
