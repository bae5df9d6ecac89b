"""Devices written in Python: each satisfies :class:`usbredir.device.UsbDevice`, so a host can export it.

:class:`VirtualDevice` is the base for your own, :class:`LoopbackDevice` is for tests, :class:`MassStorage` is a USB
stick.
"""

from .base import Answer, Setup, VirtualDevice
from .loopback import LoopbackDevice
from .mass_storage import MassStorage

__all__ = ["Answer", "LoopbackDevice", "MassStorage", "Setup", "VirtualDevice"]
