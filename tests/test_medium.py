"""Media: what is written is read, what is missing is an OSError, and nothing but OSError."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from usbredir.virtual.medium import BLOCK_SIZE, FileMedium, Medium, MemoryMedium

MakeMedium = Callable[[bytes], Medium]


@pytest.fixture(params=["memory", "file", "file without pread"])
def make_medium(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeMedium:
    """A function that makes a medium of each kind with the given content."""
    if request.param == "memory":
        return MemoryMedium
    if request.param == "file without pread":
        monkeypatch.delattr(os, "pread")
        monkeypatch.delattr(os, "pwrite")

    def make(content: bytes) -> Medium:
        path = tmp_path / "disk.img"
        path.write_bytes(content)
        medium = FileMedium(path)
        request.addfinalizer(medium.close)
        return medium

    return make


@pytest.mark.parametrize(("size", "blocks"), [(512, 1), (1023, 1), (1024, 2), (5000, 9)])
def test_size_is_rounded_down_to_blocks(make_medium: MakeMedium, size: int, blocks: int) -> None:
    assert make_medium(bytes(size)).blocks == blocks


@pytest.mark.parametrize("size", [0, 511])
def test_file_smaller_than_a_block_is_refused(tmp_path: Path, size: int) -> None:
    path = tmp_path / "small.img"
    path.write_bytes(bytes(size))
    with pytest.raises(OSError, match=r"smaller than one block.*small\.img"):
        FileMedium(path)


def test_content_smaller_than_a_block_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one block"):
        MemoryMedium(bytes(511))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=20)
@given(st.lists(st.tuples(st.integers(0, 2047), st.binary(max_size=700)), max_size=8))
def test_reads_see_writes(make_medium: MakeMedium, writes: list[tuple[int, bytes]]) -> None:
    """A medium is an array of bytes."""
    model = bytearray(4 * BLOCK_SIZE)
    medium = make_medium(bytes(model))
    for offset, piece in writes:
        data = piece[: len(model) - offset]
        model[offset : offset + len(data)] = data
        medium.write(offset, memoryview(data))
    medium.sync()
    assert medium.read(0, len(model)) == model
    assert medium.read(700, 3) == model[700:703]
    assert medium.read(5, 0) == b""


def test_read_beyond_the_end_is_an_error(make_medium: MakeMedium) -> None:
    medium = make_medium(bytes(1024))
    with pytest.raises(OSError, match=r"end of the medium|shorter than"):
        medium.read(1000, 100)


def test_closed_medium_gives_errors_only(make_medium: MakeMedium) -> None:
    medium = make_medium(bytes(1024))
    medium.close()
    medium.close()
    with pytest.raises(OSError, match=r"."):
        medium.read(0, 1)
    with pytest.raises(OSError, match=r"."):
        medium.write(0, b"x")


def test_file_is_not_loaded_and_not_private(tmp_path: Path) -> None:
    """A sparse file of 3 TiB works; another opener sees writes at once."""
    path = tmp_path / "big.img"
    with path.open("wb") as file:
        file.truncate(3 << 40)
    medium = FileMedium(path)
    medium.write((3 << 40) - 4, b"last")
    with path.open("rb") as file:
        file.seek(-4, os.SEEK_END)
        assert file.read() == b"last"
    medium.close()


def test_short_reads_and_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(1024))
    pread, pwrite = os.pread, os.pwrite
    monkeypatch.setattr(os, "pread", lambda fd, length, offset: pread(fd, min(length, 100), offset))
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, memoryview(data)[:70], offset))
    medium = FileMedium(path)
    data = bytes(range(256)) * 3
    medium.write(10, data)
    assert medium.read(10, len(data)) == data
    medium.close()


def test_read_only_file_cannot_be_written(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(512))
    path.chmod(0o400)
    medium = FileMedium(path, read_only=True)
    assert medium.read_only
    with pytest.raises(OSError, match=r"."):
        medium.write(0, b"x")
    medium.sync()
    medium.close()
    assert path.read_bytes() == bytes(512)


def test_what_is_no_image_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError):
        FileMedium(tmp_path, read_only=True)
    with pytest.raises(FileNotFoundError):
        FileMedium(tmp_path / "missing")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_fifo_is_refused_without_waiting(tmp_path: Path) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    with pytest.raises(OSError, match="neither a file"):
        FileMedium(path)


def test_shrunk_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(2048))
    medium = FileMedium(path)
    os.truncate(path, 1024)
    with pytest.raises(OSError, match="shorter than when it was opened"):
        medium.read(512, 1024)
    medium.close()


def test_repr_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(2048))
    medium = FileMedium(path)
    assert repr(medium) == f"<FileMedium {str(path)!r} blocks=4>"
    assert repr(MemoryMedium(bytes(512))) == "<MemoryMedium blocks=1>"
    medium.close()
