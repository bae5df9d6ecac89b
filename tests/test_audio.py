"""Microphone and loudspeaker: what they say they are, their sample clock, controls, and where samples come from."""

from __future__ import annotations

import itertools
import queue
import struct
import threading
import wave
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from usbredir.descriptors import interval_seconds, max_packet_size, parse_configuration
from usbredir.device import Transfer
from usbredir.proto import Speed, Status, TransferType
from usbredir.testing import check_device
from usbredir.virtual import AudioSink, AudioSource, VirtualDevice

IN, OUT = 0x81, 0x01
STREAMING = 1
PATIENCE = 30.0


class Time:
    """A clock that is set."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def pcm(count: int, channels: int = 1) -> bytes:
    """Samples that are all different, up to 65536."""
    return struct.pack(f"<{count * channels}H", *(index & 0xFFFF for index in range(count * channels)))


def write_wave(path: Path, content: bytes, *, rate: int = 8000, channels: int = 1, width: int = 2) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(content)
    return path


def start(device: VirtualDevice) -> None:
    assert device.set_alt_setting(STREAMING, 1) == Status.SUCCESS


def iso(device: VirtualDevice, endpoint: int, lengths: Sequence[int], data: bytes = b"") -> Transfer:
    """A transfer of packets; the time is over when this returns."""
    done: list[Transfer] = []
    transfer = Transfer(TransferType.ISO, endpoint, sum(lengths), done.append, data=data, iso_lengths=lengths)
    assert device.submit(transfer) == Status.SUCCESS
    device.handle_events(0)
    clock: Any = device._clock
    clock.now += len(lengths) / 1000 + 1e-9
    device.handle_events(0)
    assert done == [transfer]
    return transfer


def record(device: VirtualDevice, packets: int) -> list[bytes]:
    results = iso(device, IN, [1023] * packets).iso_results
    assert all(result.status == Status.SUCCESS for result in results)
    return [bytes(result.data) for result in results]


def play(device: VirtualDevice, packets: Sequence[bytes]) -> None:
    results = iso(device, OUT, [len(packet) for packet in packets], b"".join(packets)).iso_results
    assert all(result.status == Status.SUCCESS for result in results)


def control(
    device: VirtualDevice, request_type: int, request: int, value: int, index: int, data: bytes = b"", length: int = 0
) -> tuple[int, bytes]:
    done: list[Transfer] = []
    setup = (request_type, request, value, index)
    transfer = Transfer(
        TransferType.CONTROL, request_type & 0x80, length or len(data), done.append, data=data, setup=setup
    )
    assert device.submit(transfer) == Status.SUCCESS
    device.handle_events(0)
    assert done == [transfer]
    return transfer.status, bytes(transfer.data)


BOTH: list[Callable[..., VirtualDevice]] = [lambda **options: AudioSource(b"", **options), AudioSink]
both = pytest.mark.parametrize("make", BOTH, ids=["source", "sink"])


# ================================================================ what they are


@both
@pytest.mark.parametrize("speed", [Speed.FULL, Speed.HIGH])
@pytest.mark.parametrize(("rate", "channels"), [(8000, 1), (44100, 2), (48000, 2), (96000, 2)])
def test_one_packet_a_millisecond(make: Callable[..., VirtualDevice], speed: Speed, rate: int, channels: int) -> None:
    device = make(speed=speed, rate=rate, channels=channels)
    raw = device.configuration_descriptor
    assert raw is not None
    control_interface, silent, streaming = parse_configuration(raw).interfaces
    assert not control_interface.endpoints
    assert not silent.endpoints
    (endpoint,) = streaming.endpoints
    assert interval_seconds(endpoint, speed) == 0.001
    assert max_packet_size(endpoint, speed) == (rate // 1000 + 1) * 2 * channels
    assert raw.count(rate.to_bytes(3, "little")) >= 1


def test_descriptors_byte_by_byte() -> None:
    """Of a stereo loudspeaker, as in the examples of the specification."""
    raw = AudioSink(rate=48000, channels=2).configuration_descriptor
    assert raw is not None
    assert raw[9:] == bytes.fromhex(
        "09 04 00 00 00 01 01 00 00"
        "09 24 01 0001 2800 01 01"  # the header: 40 bytes, one streaming interface, number 1
        "0c 24 02 01 0101 00 02 0300 00 00"  # from USB, left and right
        "0a 24 06 02 01 01 03 00 00 00"  # mute and volume of both
        "09 24 03 03 0103 00 02 00"  # to the speaker
        "09 04 01 00 00 01 02 00 00"
        "09 04 01 01 01 01 02 00 00"
        "07 24 01 01 01 0100"  # fed by terminal 1, PCM
        "0b 24 02 01 02 02 10 01 80bb00"  # two channels, 16 bit, 48000
        "09 05 01 09 c400 01 00 00"
        "07 25 01 01 00 0000"
    )


def test_a_microphone_is_fed_by_a_microphone() -> None:
    raw = AudioSource(b"").configuration_descriptor
    assert raw is not None
    assert bytes.fromhex("0c 24 02 01 0102 00 01 0000 00 00") in raw
    assert bytes.fromhex("09 24 03 03 0101 00 02 00") in raw
    assert bytes.fromhex("07 24 01 03 01 0100") in raw
    assert bytes.fromhex("09 05 81 05 6200 01 00 00") in raw


@both
@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"speed": Speed.LOW}, "speed"),
        ({"speed": Speed.SUPER}, "speed"),
        ({"rate": 1 << 24}, "24 bits"),
        ({"rate": -1}, "24 bits"),
        ({"channels": 3}, "channels"),
        ({"rate": 400_000, "channels": 2}, "0x.1"),  # more than an interval can hold
    ],
)
def test_what_cannot_be(make: Callable[..., VirtualDevice], options: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        make(**options)


@both
def test_they_keep_the_rules_of_devices(make: Callable[..., VirtualDevice]) -> None:
    check_device(make)


# ================================================================ controls

FEATURES = 0x0200
MUTE, VOLUME, RATE = 0x0100, 0x0200, 0x0100


@both
def test_volume_and_mute(make: Callable[..., Any]) -> None:
    device = make()
    assert (device.muted, device.volume) == (False, 0.0)
    ranges = [control(device, 0xA1, request, VOLUME, FEATURES, length=2) for request in (0x82, 0x83, 0x84)]
    assert ranges == [(Status.SUCCESS, struct.pack("<h", value * 256)) for value in (-60, 0, 1)]
    for wanted, becomes in ((-10.5, -10.5), (-90, -60), (20, 0), (-3, -3)):
        data = struct.pack("<h", int(wanted * 256))
        assert control(device, 0x21, 0x01, VOLUME, FEATURES, data)[0] == Status.SUCCESS
        assert device.volume == becomes
    assert control(device, 0xA1, 0x81, VOLUME, FEATURES, length=2)[1] == struct.pack("<h", -3 * 256)
    for muted in (True, False):
        assert control(device, 0x21, 0x01, MUTE, FEATURES, bytes([muted]))[0] == Status.SUCCESS
        assert device.muted is muted
        assert control(device, 0xA1, 0x81, MUTE, FEATURES, length=1)[1] == bytes([muted])


@both
def test_the_rate_is_what_it_is(make: Callable[..., VirtualDevice]) -> None:
    device = make(rate=44100)
    endpoint = IN if isinstance(device, AudioSource) else OUT
    start(device)
    right, wrong = (44100).to_bytes(3, "little"), (48000).to_bytes(3, "little")
    assert control(device, 0xA2, 0x81, RATE, endpoint, length=3) == (Status.SUCCESS, right)
    assert control(device, 0x22, 0x01, RATE, endpoint, right)[0] == Status.SUCCESS
    assert control(device, 0x22, 0x01, RATE, endpoint, wrong)[0] == Status.STALL
    assert control(device, 0x22, 0x01, 0x0200, endpoint, b"\1")[0] == Status.STALL
    assert control(device, 0xA2, 0x81, 0x0200, endpoint, length=1)[0] == Status.STALL


@both
@pytest.mark.parametrize(
    ("request_type", "request_number", "value", "index", "data"),
    [
        (0xA1, 0x82, MUTE, FEATURES, b""),  # the least mute
        (0xA1, 0x81, VOLUME | 1, FEATURES, b""),  # of the left channel
        (0xA1, 0x81, 0x0300, FEATURES, b""),  # bass
        (0xA1, 0x81, MUTE, 0x0100, b""),  # of a terminal
        (0xA1, 0x81, MUTE, FEATURES | 1, b""),  # at the other interface
        (0x21, 0x01, VOLUME, FEATURES, b"\0"),
        (0x21, 0x01, MUTE, FEATURES, b"\0\0"),
        (0x21, 0x01, 0x0300, FEATURES, b"\0"),
    ],
)
def test_controls_that_are_not_there(
    make: Callable[..., VirtualDevice], request_type: int, request_number: int, value: int, index: int, data: bytes
) -> None:
    device = make()
    length = len(data) or 2
    assert control(device, request_type, request_number, value, index, data, length)[0] == Status.STALL


# ================================================================ the microphone


@pytest.mark.parametrize("speed", [Speed.FULL, Speed.HIGH])
def test_packets_follow_the_sample_clock(speed: Speed) -> None:
    content = pcm(441 * 3)
    microphone = AudioSource(content, rate=44100, speed=speed, clock=Time())
    start(microphone)
    packets = record(microphone, 10) + record(microphone, 20)
    assert [len(packet) // 2 for packet in packets] == ([44] * 9 + [45]) * 3
    assert b"".join(packets) == content


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 96000), st.integers(1, 2), st.lists(st.integers(1, 40), min_size=1, max_size=8))
def test_no_sample_is_too_many_or_too_few(rate: int, channels: int, transfers: list[int]) -> None:
    microphone = AudioSource(bytes, rate=rate, channels=channels, clock=Time())
    start(microphone)
    sizes = [len(packet) for count in transfers for packet in record(microphone, count)]
    frame = 2 * channels
    assert all(size // frame in (rate // 1000, rate // 1000 + 1) for size in sizes)
    assert sum(sizes) == rate * sum(transfers) // 1000 * frame


def pieces(content: bytes, sizes: Sequence[int]) -> list[bytes]:
    """The content in pieces of these sizes, over and over."""
    result: list[bytes] = []
    position = 0
    for size in itertools.cycle(sizes):
        if position >= len(content):
            return result
        result.append(content[position : position + size])
        position += size
    raise AssertionError


CONTENT = pcm(50)
SOURCES: dict[str, Callable[[Path], Any]] = {
    "bytes": lambda folder: CONTENT,
    "bytearray": lambda folder: bytearray(CONTENT),
    "view": lambda folder: memoryview(CONTENT),
    "a file": lambda folder: write_wave(folder / "a.wav", CONTENT),
    "the name of a file": lambda folder: str(write_wave(folder / "a.wav", CONTENT)),
    "small pieces": lambda folder: pieces(CONTENT, [1, 2, 0, 5]),
    "one piece": lambda folder: iter([CONTENT]),
    "a function": lambda folder: iter_read(CONTENT),
}


def iter_read(content: bytes) -> Callable[[int], bytes]:
    rest = bytearray(content)

    def read(size: int) -> bytes:
        data = bytes(rest[:size])
        del rest[:size]
        return data

    return read


@pytest.mark.parametrize("name", SOURCES)
def test_silence_follows_the_samples(name: str, tmp_path: Path) -> None:
    microphone = AudioSource(SOURCES[name](tmp_path), rate=8000, clock=Time())
    start(microphone)
    assert b"".join(record(microphone, 10)) == CONTENT + bytes(60)
    microphone.close()
    microphone.close()


def test_a_function_that_gives_too_much_is_cut() -> None:
    microphone = AudioSource(lambda size: b"\7" * (size + 10), rate=8000, clock=Time())
    start(microphone)
    assert record(microphone, 2) == [b"\7" * 16] * 2


@pytest.mark.parametrize("name", ["bytes", "a file"])
def test_repeat(name: str, tmp_path: Path) -> None:
    microphone = AudioSource(SOURCES[name](tmp_path), rate=8000, repeat=True, clock=Time())
    start(microphone)
    assert b"".join(record(microphone, 25)) == CONTENT * 4
    microphone.close()


@pytest.mark.parametrize("repeat", [False, True])
def test_nothing_is_silence(repeat: bool) -> None:
    microphone = AudioSource(b"", rate=8000, repeat=repeat, clock=Time())
    start(microphone)
    assert record(microphone, 2) == [bytes(16)] * 2


def test_a_file_tells_rate_and_channels(tmp_path: Path) -> None:
    path = write_wave(tmp_path / "a.wav", pcm(100, 2), rate=11025, channels=2)
    microphone = AudioSource(path, clock=Time())
    assert (microphone.rate, microphone.channels) == (11025, 2)
    start(microphone)
    assert b"".join(record(microphone, 9)) == pcm(99, 2)
    microphone.close()
    AudioSource(path, rate=11025, channels=2).close()


@pytest.mark.parametrize(
    ("told", "has", "why"),
    [
        ({"rate": 8000}, {"rate": 11025}, "11025 samples a second, not 8000"),
        ({"channels": 1}, {"channels": 2}, "2 channels, not 1"),
        ({}, {"width": 1}, "1 bytes a sample, not 2"),
        ({}, {"channels": 3}, "1 or 2 channels, not 3"),
    ],
)
def test_files_that_do_not_fit(told: dict[str, Any], has: dict[str, Any], why: str, tmp_path: Path) -> None:
    path = write_wave(tmp_path / "a.wav", bytes(48), **has)
    with pytest.raises(ValueError, match=why):
        AudioSource(path, **told)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        AudioSource(tmp_path / "missing.wav")
    for content in (b"", b"not a WAV file at all"):
        (tmp_path / "bad.wav").write_bytes(content)
        with pytest.raises(ValueError, match=r"bad\.wav is no WAV file"):
            AudioSource(tmp_path / "bad.wav")


def test_samples_wait_while_nobody_records() -> None:
    microphone = AudioSource(pcm(32), rate=8000, clock=Time())
    start(microphone)
    assert b"".join(record(microphone, 2)) == pcm(32)[:32]
    microphone.set_alt_setting(STREAMING, 0)
    microphone.reset()
    start(microphone)
    assert b"".join(record(microphone, 2)) == pcm(32)[32:]


# ================================================================ the loudspeaker


def test_what_is_played_is_read() -> None:
    speaker = AudioSink(clock=Time())
    start(speaker)
    play(speaker, [b"ab", b"", b"cdef"])
    play(speaker, [b"gh"])
    assert speaker.read(3) == b"abc"
    assert speaker.read(10, 0) == b"defgh"
    assert speaker.read(0) == b""
    assert speaker.dropped == 0
    with pytest.raises(ValueError, match="-1"):
        speaker.read(-1)


def test_a_hook_gets_every_packet() -> None:
    packets: list[bytes] = []

    class Speaker(AudioSink):
        def played(self, data: bytes | bytearray | memoryview) -> None:
            packets.append(bytes(data))

    speaker = Speaker(clock=Time())
    start(speaker)
    play(speaker, [b"abcd", b"", b"ef"])
    assert packets == [b"abcd", b"ef"]
    assert speaker.read(1, 0) == b""


def test_a_file_gets_what_is_played(tmp_path: Path) -> None:
    path = tmp_path / "played.wav"
    speaker = AudioSink(path, rate=44100, channels=2, clock=Time())
    start(speaker)
    content = pcm(441, 2)
    play(speaker, pieces(content, [176] * 9 + [180]))
    assert speaker.read(1, 0) == b""
    speaker.close()
    speaker.close()
    with wave.open(str(path), "rb") as file:
        assert file.getparams()[:4] == (2, 2, 44100, 441)
        assert file.readframes(441) == content


def test_a_file_that_is_full(tmp_path: Path) -> None:
    """Its header counts with 32 bits; the rest is lost, and the file is right."""
    path = tmp_path / "played.wav"
    speaker = AudioSink(path, clock=Time())
    start(speaker)
    play(speaker, [b"abcd"])
    file: Any = speaker._file
    most = speaker._file_room
    file._datawritten += most - 8  # as if it had been played
    speaker._file_room = 8
    play(speaker, [b"efgh", b"ijklmn", b"opqr"])
    assert speaker.dropped == 6
    speaker.close()
    content = path.read_bytes()
    assert content[44:] == b"abcdefghijkl"
    riff, samples = struct.unpack("<I32xI", content[4:44])
    assert riff == samples + 36 == 0xFFFFFFFF - 3  # whole samples of both channels
    assert samples % 4 == 0


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        AudioSink(tmp_path / "missing" / "played.wav")


def test_what_nobody_reads_is_bounded() -> None:
    speaker = AudioSink(clock=Time())
    speaker.buffer_limit = 5
    start(speaker)
    play(speaker, [b"abc", b"def", b"g"])
    assert speaker.dropped == 2
    assert speaker.read(100) == b"abcde"  # more can never come
    play(speaker, [b"hi"])
    assert speaker.read(2) == b"hi"


def test_reading_waits() -> None:
    """For data, and for the end."""
    speaker = AudioSink(clock=Time())
    start(speaker)
    got: queue.Queue[bytes] = queue.Queue()

    def read() -> None:
        for _ in range(2):
            got.put(speaker.read(4))

    thread = threading.Thread(target=read)
    thread.start()
    play(speaker, [b"ab"])
    play(speaker, [b"cdef"])
    assert got.get(timeout=PATIENCE) == b"abcd"
    speaker.close()
    assert got.get(timeout=PATIENCE) == b"ef"
    thread.join(PATIENCE)
