"""A microphone and a loudspeaker that every operating system has a driver for (USB Audio Class 1.0).

::

    microphone = AudioSource("speech.wav")
    speaker = AudioSink("recorded.wav")

    def hum(size):
        return next_samples(size // 2)

    microphone = AudioSource(hum, rate=44100)

Samples are 16 bit, little endian, the channels one after the other. Source: USB Device Class Definition for Audio
Devices 1.0 ("UAC"), Audio Data Formats 1.0, Terminal Types 1.0.
"""

from __future__ import annotations

import io
import os
import struct
import threading
import time
import wave
from collections.abc import Callable, Iterable
from typing import ClassVar

from ..proto import Speed
from .base import VirtualDevice
from .control import STALL, Answer, Payload, Setup, class_in, class_out
from .declare import EndpointDeclaration, interface, iso_in, iso_out

__all__ = ["AudioSink", "AudioSource", "Samples"]

Samples = bytes | bytearray | memoryview | str | os.PathLike[str] | Iterable[bytes] | Callable[[int], bytes]
"""Where a microphone has its samples from: bytes; a WAV file; pieces; or a function that is asked for *size* bytes."""

AUDIO, CONTROL, STREAMING = 0x01, 0x01, 0x02
CONTROL_INTERFACE, STREAMING_INTERFACE = 0, 1
SOURCE_ENDPOINT, SINK_ENDPOINT = 0x81, 0x01
SAMPLE = 2
"""Bytes of a sample."""
DEFAULT_RATE = 48000
PACKETS = 1000
"""Packets per second, at both speeds."""

INPUT_TERMINAL, FEATURE_UNIT, OUTPUT_TERMINAL = 1, 2, 3
"""Ids: the sound goes through them in this order."""
USB_STREAM, MICROPHONE, SPEAKER = 0x0101, 0x0201, 0x0301
"""Types of terminals. Source: Terminal Types, 2."""

MUTE, VOLUME = 0x01, 0x02
"""Controls of a feature unit. Source: UAC, A.10.2."""
SET_CURRENT, CURRENT, LEAST, MOST, STEP = 0x01, 0x81, 0x82, 0x83, 0x84
"""Requests about controls. Source: UAC, A.9."""
SAMPLING_FREQUENCY = 0x0100
"""wValue. Source: UAC, A.10.5."""
DECIBEL = 256
"""Volumes are told in parts of a decibel."""
SETS_RATE = bytes((7, 0x25, 1, 0x01, 0, 0, 0))
"""Class-specific descriptor of an endpoint that knows SAMPLING_FREQUENCY. Source: UAC, 4.6.1.2."""
WAVE_LIMIT = 0xFFFFFFFF - 36
"""Bytes of samples in a WAV file: its header counts them, and its other 36 bytes, with 32 bits."""
VOLUMES = {LEAST: -60 * DECIBEL, MOST: 0, STEP: DECIBEL}


class _Audio(VirtualDevice):
    """What microphone and speaker share: descriptors, clock, mute and volume.

    A subclass says what its terminals are, which of them is the stream, and which endpoint it has.
    """

    terminals: ClassVar[tuple[int, int]]
    stream_terminal: ClassVar[int]

    def __init__(self, rate: int, channels: int, speed: Speed, clock: Callable[[], float]) -> None:
        if speed not in (Speed.FULL, Speed.HIGH):
            raise ValueError(f"audio devices have full or high speed, not {speed!r}")
        if not 1 <= rate < 1 << 24:
            raise ValueError(f"a sampling rate is a number of 24 bits, not {rate}")
        if channels not in (1, 2):
            raise ValueError(f"1 or 2 channels, not {channels}")
        self._rate = rate
        self._channels = channels
        self._frame = SAMPLE * channels
        self._muted = False
        self._volume = VOLUMES[MOST]
        most = (rate // PACKETS + 1) * self._frame
        streaming = _streaming_descriptors(self.stream_terminal, rate, channels)
        self.interfaces = (
            interface(AUDIO, subclass=CONTROL, extra=_control_descriptors(self.terminals, channels)),
            interface(AUDIO, subclass=STREAMING),
            interface(AUDIO, self._endpoint(most), subclass=STREAMING, alternate=1, extra=streaming),
        )
        super().__init__(speed=speed, clock=clock)

    def _endpoint(self, size: int) -> EndpointDeclaration:
        raise NotImplementedError

    @property
    def rate(self) -> int:
        """Samples per second of each channel."""
        return self._rate

    @property
    def channels(self) -> int:
        """1 for mono, 2 for stereo."""
        return self._channels

    @property
    def muted(self) -> bool:
        """Whether the guest has muted it. The samples are as they are, nonetheless."""
        return self._muted

    @property
    def volume(self) -> float:
        """What the guest has set, in decibels, from -60 to 0. The samples are as they are, nonetheless."""
        return self._volume / DECIBEL

    # --- requests ---

    @class_in(CURRENT)
    @class_in(LEAST)
    @class_in(MOST)
    @class_in(STEP)
    def _get_control(self, setup: Setup) -> Payload | Answer:
        control = _control_of(setup)
        if control == MUTE and setup.request == CURRENT:
            return bytes((self._muted,))
        if control == VOLUME:
            return struct.pack("<h", VOLUMES.get(setup.request, self._volume))
        return STALL

    @class_out(SET_CURRENT)
    def _set_control(self, setup: Setup, data: bytes) -> Answer | None:
        control = _control_of(setup)
        if control == MUTE and len(data) == 1:
            self._muted = bool(data[0])
        elif control == VOLUME and len(data) == 2:
            (volume,) = struct.unpack("<h", data)
            self._volume = max(VOLUMES[LEAST], min(VOLUMES[MOST], volume))
        else:
            return STALL
        return None

    @class_in(CURRENT, "endpoint")
    @class_in(LEAST, "endpoint")
    @class_in(MOST, "endpoint")
    def _get_rate(self, setup: Setup) -> Payload | Answer:
        return self._rate.to_bytes(3, "little") if setup.value == SAMPLING_FREQUENCY else STALL

    @class_out(SET_CURRENT, "endpoint")
    def _set_rate(self, setup: Setup, data: bytes) -> Answer | None:
        """There is one rate, and guests set it."""
        right = setup.value == SAMPLING_FREQUENCY and data == self._rate.to_bytes(3, "little")
        return None if right else STALL


class AudioSource(_Audio):
    """A microphone: the guest records what *samples* gives.

    A packet a millisecond goes to the guest while it records, with as many samples as that time has: at 44.1 kHz nine
    packets of 44 and one of 45. Silence fills up what *samples* lacks. Samples wait while nobody records.

    Args:
        samples: bytes; path of a WAV file; pieces of any size; or a function that is asked for *size* bytes, in the
            thread that handles events. It may give fewer.
        rate: samples per second; None: 48000, or the WAV file's.
        channels: 1 or 2; None: 1, or the WAV file's.
        repeat: begin anew at the end of bytes and of WAV files.
        speed: FULL (default) or HIGH.
        clock: seconds, monotonic.

    Raises:
        OSError: the file cannot be opened.
        ValueError: the WAV file has other samples than 16 bit, or another rate or number of channels than told; an
            argument is not as above.

    Threads: as :class:`~usbredir.virtual.VirtualDevice`.
    """

    product_id, product = 0x0008, "Microphone"
    terminals = (MICROPHONE, USB_STREAM)
    stream_terminal = OUTPUT_TERMINAL

    def __init__(
        self,
        samples: Samples,
        *,
        rate: int | None = None,
        channels: int | None = None,
        repeat: bool = False,
        speed: Speed = Speed.FULL,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._file = _open_wave(samples, rate, channels) if isinstance(samples, (str, os.PathLike)) else None
        if self._file is not None:
            rate, channels = self._file.getframerate(), self._file.getnchannels()
        try:
            super().__init__(rate or DEFAULT_RATE, channels or 1, speed, clock)
        except ValueError:
            self._close_file()
            raise
        self._take = self._reader(samples, repeat)

    def _reader(self, samples: Samples, repeat: bool) -> Callable[[int], bytes]:
        if callable(samples):
            return samples
        if self._file is not None:
            file, frame = self._file, self._frame
            again = _Again(lambda size: file.readframes(size // frame), file.rewind)
        elif isinstance(samples, (bytes, bytearray, memoryview)):
            content = io.BytesIO(samples)
            again = _Again(content.read, lambda: content.seek(0))
        else:
            return _Pieces(samples).read  # type: ignore[arg-type]  # a path has a file
        return again.read if repeat else again.once

    def close(self) -> None:
        """Close the device, then its file. Idempotent."""
        super().close()
        with self._hooks:
            self._close_file()

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()

    def _endpoint(self, size: int) -> EndpointDeclaration:
        return iso_in(SOURCE_ENDPOINT, size, synchronization="asynchronous", tail=bytes(2), extra=SETS_RATE)

    # --- hooks of VirtualDevice ---

    def began(self) -> None:
        """The clock starts anew; the samples go on."""
        self._phase = 0

    def data_in(self, endpoint: int, length: int) -> Payload | Answer:
        """A packet: the samples of a millisecond."""
        frames, self._phase = divmod(self._phase + self._rate, PACKETS)
        size = frames * self._frame
        return self._take(size)[:size].ljust(size, b"\0")


class AudioSink(_Audio):
    """A loudspeaker: what the guest plays comes here, each packet in its time.

    Override :meth:`played` to use it at once. Otherwise it is written to a WAV file, or waits for :meth:`read`. Nothing
    comes while the guest does not play.

    Args:
        wav: path of a WAV file to write, complete when the device is closed; None: for :meth:`read`. It takes 4 GiB,
            six hours at 48 kHz in stereo; what comes then is lost.
        rate: samples per second.
        channels: 1 or 2.
        speed: FULL (default) or HIGH.
        clock: seconds, monotonic.

    Raises:
        OSError: the file cannot be written.
        ValueError: an argument is not as above.

    Threads: read from any; otherwise as :class:`~usbredir.virtual.VirtualDevice`.
    """

    product_id, product = 0x0009, "Loudspeaker"
    terminals = (USB_STREAM, SPEAKER)
    stream_terminal = INPUT_TERMINAL

    buffer_limit: int = 16 << 20
    """Bytes that wait for :meth:`read`; what comes when they are full is lost."""

    def __init__(
        self,
        wav: str | os.PathLike[str] | None = None,
        *,
        rate: int = DEFAULT_RATE,
        channels: int = 2,
        speed: Speed = Speed.FULL,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._came = threading.Condition()
        self._waiting = bytearray()
        self._dropped = 0
        self._over = False
        super().__init__(rate, channels, speed, clock)
        self._file_room = WAVE_LIMIT // self._frame * self._frame
        self._file = None if wav is None else _create_wave(wav, rate, channels)

    @property
    def dropped(self) -> int:
        """Bytes that were lost because nobody read them, or the file was full."""
        return self._dropped

    def read(self, size: int, timeout: float | None = None) -> bytes:
        """What the guest played: *size* bytes, or those that have come when the time is over or the device closed.

        *timeout* is in seconds, None waits for ever. Raises ValueError for a negative *size*. Threads: any.
        """
        if size < 0:
            raise ValueError(f"cannot read {size} bytes")
        with self._came:
            self._came.wait_for(lambda: len(self._waiting) >= min(size, self.buffer_limit) or self._over, timeout)
            data = bytes(self._waiting[:size])
            del self._waiting[: len(data)]
        return data

    def played(self, data: Payload) -> None:
        """A packet of the guest: the samples of about a millisecond. In the thread that handles events."""
        if self._file is not None:
            taken = data[: self._file_room]
            self._file.writeframesraw(taken)
            self._file_room -= len(taken)
            self._dropped += len(data) - len(taken)
            return
        with self._came:
            room = self.buffer_limit - len(self._waiting)
            self._waiting += data[:room]
            self._dropped += max(0, len(data) - room)
            self._came.notify_all()

    def close(self) -> None:
        """Close the device, then its file. Idempotent."""
        super().close()
        with self._came:
            self._over = True
            self._came.notify_all()
        with self._hooks:
            if self._file is not None:
                self._file.close()

    def _endpoint(self, size: int) -> EndpointDeclaration:
        return iso_out(SINK_ENDPOINT, size, synchronization="adaptive", tail=bytes(2), extra=SETS_RATE)

    # --- hooks of VirtualDevice ---

    def data_out(self, endpoint: int, data: Payload) -> Answer | None:
        """A packet, empty while the guest has nothing to play."""
        if data:
            self.played(data)
        return None


class _Again:
    """Reads a source, and begins anew at its end, unless it is empty."""

    def __init__(self, read: Callable[[int], bytes], rewind: Callable[[], object]) -> None:
        self.once = read
        self._rewind = rewind

    def read(self, size: int) -> bytes:
        data = self.once(size)
        while len(data) < size:
            self._rewind()
            more = self.once(size - len(data))
            if not more:
                break
            data += more
        return data


class _Pieces:
    """Reads pieces of any size."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._pieces = iter(pieces)
        self._rest = bytearray()

    def read(self, size: int) -> bytes:
        while len(self._rest) < size:
            piece = next(self._pieces, None)
            if piece is None:
                break
            self._rest += piece
        data = bytes(self._rest[:size])
        del self._rest[:size]
        return data


def _control_of(setup: Setup) -> int:
    """MUTE or VOLUME of the feature unit's master channel, 0 for what there is not."""
    selector, channel = setup.value >> 8, setup.value & 0xFF
    right = setup.index == FEATURE_UNIT << 8 | CONTROL_INTERFACE and not channel
    return selector if right else 0


def _control_descriptors(terminals: tuple[int, int], channels: int) -> bytes:
    """Input terminal, feature unit, output terminal, with their header. Source: UAC, 4.3.2."""
    came, goes = terminals
    positions = 0x0003 if channels == 2 else 0  # left and right
    controls = bytes([MUTE | VOLUME, *bytes(channels)])  # of the master channel, and of each
    units = (
        struct.pack("<BBBBHBBHBB", 12, 0x24, 2, INPUT_TERMINAL, came, 0, channels, positions, 0, 0)
        + struct.pack("<BBBBBB", 7 + len(controls), 0x24, 6, FEATURE_UNIT, INPUT_TERMINAL, 1)
        + controls
        + b"\0"
        + struct.pack("<BBBBHBBB", 9, 0x24, 3, OUTPUT_TERMINAL, goes, 0, FEATURE_UNIT, 0)
    )
    return struct.pack("<BBBHHBB", 9, 0x24, 1, 0x0100, 9 + len(units), 1, STREAMING_INTERFACE) + units


def _streaming_descriptors(terminal: int, rate: int, channels: int) -> bytes:
    """Where the stream goes, and its format: PCM at one rate. Source: UAC, 4.5.2; Audio Data Formats, 2.2.5."""
    pcm, a_frame_late = 1, 1
    general = struct.pack("<BBBBBH", 7, 0x24, 1, terminal, a_frame_late, pcm)
    return (
        general + struct.pack("<BBBBBBBB", 11, 0x24, 2, 1, channels, SAMPLE, 8 * SAMPLE, 1) + rate.to_bytes(3, "little")
    )


def _open_wave(path: str | os.PathLike[str], rate: int | None, channels: int | None) -> wave.Wave_read:
    """A WAV file with samples as wanted. Raises OSError, ValueError."""
    try:
        file = wave.open(os.fspath(path), "rb")  # noqa: SIM115 - the device closes it
    except (wave.Error, EOFError) as error:
        raise ValueError(f"{os.fspath(path)} is no WAV file: {error}") from error
    has = (file.getsampwidth(), file.getframerate(), file.getnchannels())
    wanted = (SAMPLE, rate or has[1], channels or has[2])
    if has != wanted:
        file.close()
        names = ("bytes a sample", "samples a second", "channels")
        what = ", ".join(f"{h} {name}, not {w}" for h, w, name in zip(has, wanted, names, strict=True) if h != w)
        raise ValueError(f"{os.fspath(path)} has {what}")
    return file


def _create_wave(path: str | os.PathLike[str], rate: int, channels: int) -> wave.Wave_write:
    with open(path, "wb"):
        pass  # raises what wave's own destructor would stumble over
    file = wave.open(os.fspath(path), "wb")  # noqa: SIM115 - the device closes it
    file.setnchannels(channels)
    file.setsampwidth(SAMPLE)
    file.setframerate(rate)
    return file
