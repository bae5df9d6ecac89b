"""Devices that are open, to be closed at exit.

pyusb ends its libusb contexts with an exit handler, and ending one under transfers in flight, or under a thread that
waits in it, aborts the process. So :func:`close_everything` has to run before: exit handlers run in the opposite order
of their registration, and :func:`register_exit_handler` is called again after each new backend.
"""

from __future__ import annotations

import atexit
import logging
import os
import weakref
from typing import Protocol

__all__ = ["Closable", "close_everything", "is_closed", "is_open", "register_exit_handler"]

logger = logging.getLogger("usbredir.backends.pyusb")


class Closable(Protocol):
    """What is closed at exit."""

    def close(self) -> None:
        """End everything, in bounded time."""

    def abandon(self) -> None:
        """Forget everything without touching it: a forked child shares its parent's descriptors."""


_open: dict[int, weakref.ref[Closable]] = {}


def is_open(device: Closable) -> None:
    """*device* has to be closed at exit."""
    _open[id(device)] = weakref.ref(device)


def is_closed(device: Closable) -> None:
    """*device* need not be closed any more."""
    _open.pop(id(device), None)


def _take() -> list[Closable]:
    taken = [reference() for reference in list(_open.values())]
    return [device for device in taken if device is not None]


def close_everything() -> None:
    """Close the devices that are open. Runs at exit, before pyusb ends the contexts."""
    for device in _take():
        try:
            device.close()
        except Exception:
            logger.exception("%r cannot be closed", device)


def _abandon_everything() -> None:
    for device in _take():
        device.abandon()
    _open.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_abandon_everything)


def register_exit_handler() -> None:
    """Make :func:`close_everything` the first exit handler to run."""
    atexit.unregister(close_everything)
    atexit.register(close_everything)
