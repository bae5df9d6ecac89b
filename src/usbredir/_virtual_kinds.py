"""The devices of ``--virtual KIND[:ARGUMENT]``: how each is written, and what makes it.

A device's module is imported when the device is asked for: commands start faster.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from .device import UsbDevice
from .errors import DeviceError
from .proto import Speed

__all__ = ["KINDS", "Kind", "virtual_device"]

Make = Callable[[], UsbDevice]


class Kind(NamedTuple):
    """A kind of device.

    form: how it is written. what: one line for users. prepare: from what stands behind the colon ("" for nothing) and
    the speed to what makes the device; it raises ValueError when *form* says otherwise. *make* raises DeviceError.
    """

    form: str
    what: str
    prepare: Callable[[str, Speed], Make]


def virtual_device(text: str, speed: Speed) -> Make:
    """A function that makes the device *text*. Raises ValueError with what would be right; the function DeviceError."""
    name, _, argument = text.partition(":")
    kind = KINDS.get(name)
    if kind is None:
        raise ValueError(f"use {', '.join(kind.form for kind in KINDS.values())}")
    try:
        return kind.prepare(argument, speed)
    except ValueError as error:
        raise ValueError(f"use {kind.form}" + (f": {error}" if str(error) else "")) from error


def _only(make: Callable[[Speed], UsbDevice]) -> Callable[[str, Speed], Make]:
    """For a kind that takes no argument."""

    def prepare(argument: str, speed: Speed) -> Make:
        if argument:
            raise ValueError
        return lambda: make(speed)

    return prepare


def _with_file(make: Callable[[str, Speed], UsbDevice]) -> Callable[[str, Speed], Make]:
    """For a kind whose argument is the path of a file."""

    def prepare(path: str, speed: Speed) -> Make:
        if not path:
            raise ValueError

        def open_it() -> UsbDevice:
            try:
                return make(path, speed)
            except OSError as error:
                raise DeviceError(f"{path}: {error.strerror or error}") from error
            except ValueError as error:
                raise DeviceError(f"{path}: {error}") from error

        return open_it

    return prepare


def _disk(argument: str, speed: Speed) -> Make:
    from .virtual.mass_storage import MassStorage

    if not argument:
        raise ValueError
    path, comma, flag = argument.rpartition(",")
    read_only = bool(comma) and flag == "ro"
    image = path if read_only else argument

    def make() -> UsbDevice:
        try:
            return MassStorage(image, read_only=read_only, speed=speed)
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise DeviceError(
                f"disk image {image}: {why}; make one with e.g. truncate -s 64M {image}, or check its permissions"
            ) from error

    return make


def _cdrom(path: str, speed: Speed) -> UsbDevice:
    from .virtual.cdrom import Cdrom

    return Cdrom(path, speed=speed)


def _audio_source(path: str, speed: Speed) -> UsbDevice:
    from .virtual.audio import AudioSource

    return AudioSource(path, repeat=True, speed=speed)


def _audio_sink(path: str, speed: Speed) -> UsbDevice:
    from .virtual.audio import AudioSink

    return AudioSink(path, speed=speed)


def _facedancer(argument: str, speed: Speed) -> Make:
    from .virtual.facedancer import load

    module, _, name = argument.partition(":")
    if not module or not name:
        raise ValueError
    return lambda: load(module, name)  # it has a speed of its own


def _keyboard(argument: str, speed: Speed) -> Make:
    from .virtual._demos import Typist
    from .virtual.keyboard import US_LAYOUT

    missing = sorted(set(argument) - set(US_LAYOUT))
    if missing or not argument:
        raise ValueError(f"a US keyboard does not type {', '.join(map(repr, missing))}" if missing else "")
    return lambda: Typist(argument, speed=speed)


def _loopback(speed: Speed) -> UsbDevice:
    from .virtual.loopback import LoopbackDevice

    return LoopbackDevice(speed=speed)


def _serial(argument: str, speed: Speed) -> Make:
    from .virtual._demos import Echo
    from .virtual.serial_pty import PtySerialPort

    def make() -> UsbDevice:
        try:
            return PtySerialPort(argument, speed=speed)
        except OSError as error:
            raise DeviceError(f"terminal {argument}: {error.strerror or error}; choose another path") from error

    return make if argument else lambda: Echo(speed=speed)


def _mouse(speed: Speed) -> UsbDevice:
    from .virtual._demos import Circling

    return Circling(speed=speed)


KINDS: dict[str, Kind] = {
    "disk": Kind("disk:FILE[,ro]", "a USB stick whose content is FILE (a disk image); ,ro protects it", _disk),
    "loopback": Kind("loopback", "a vendor-specific device for tests", _only(_loopback)),
    "serial": Kind(
        "serial[:LINK]", "a serial port; programs here open LINK. Without, it sends back what it gets", _serial
    ),
    "keyboard": Kind("keyboard:TEXT", "a keyboard that types TEXT, with a US layout", _keyboard),
    "cdrom": Kind("cdrom:FILE", "a CD-ROM drive with FILE (an ISO image) in it", _with_file(_cdrom)),
    "audio-source": Kind(
        "audio-source:FILE", "a microphone that hears FILE (WAV, 16 bit) again and again", _with_file(_audio_source)
    ),
    "audio-sink": Kind("audio-sink:FILE", "a loudspeaker; what is played becomes FILE (WAV)", _with_file(_audio_sink)),
    "facedancer": Kind("facedancer:MODULE:NAME", "a Facedancer device: what class or function NAME makes", _facedancer),
    "mouse": Kind("mouse", "a mouse that moves in circles", _only(_mouse)),
}
"""By what stands before the colon."""
