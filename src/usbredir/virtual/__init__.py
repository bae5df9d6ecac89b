"""Devices written in Python: each satisfies :class:`usbredir.device.UsbDevice`, so a host can export it.

:class:`VirtualDevice` is the base for your own, :class:`HidDevice` for those with reports, :class:`LoopbackDevice` for
tests; the others are devices that operating systems know, such as :class:`MassStorage` and :class:`Keyboard`.
"""

from .audio import AudioSink, AudioSource
from .base import VirtualDevice
from .cdrom import Cdrom
from .control import NAK, STALL, Answer, Setup, class_in, class_out, vendor_in, vendor_out
from .declare import (
    association,
    bulk_in,
    bulk_out,
    configuration,
    interface,
    interrupt_in,
    interrupt_out,
    iso_in,
    iso_out,
)
from .description import Description
from .faulty import Faulty
from .hid import HidDevice
from .keyboard import Keyboard
from .loopback import LoopbackDevice
from .mass_storage import MassStorage
from .microsoft import WinUsb
from .mouse import Mouse
from .serial_port import SerialPort

__all__ = [
    "NAK",
    "STALL",
    "Answer",
    "AudioSink",
    "AudioSource",
    "Cdrom",
    "Description",
    "Faulty",
    "HidDevice",
    "Keyboard",
    "LoopbackDevice",
    "MassStorage",
    "Mouse",
    "SerialPort",
    "Setup",
    "VirtualDevice",
    "WinUsb",
    "association",
    "bulk_in",
    "bulk_out",
    "class_in",
    "class_out",
    "configuration",
    "interface",
    "interrupt_in",
    "interrupt_out",
    "iso_in",
    "iso_out",
    "vendor_in",
    "vendor_out",
]
