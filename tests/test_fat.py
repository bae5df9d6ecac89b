"""FAT images: read back by our reader and by the system's tools; damage is a ValueError."""

from __future__ import annotations

import functools
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from usbredir.virtual.fat import FatReader, make_image, read_files

FILES = {
    "hello.txt": b"hello",
    "README.TXT": bytes(range(256)) * 20,
    "a long file name with spaces.tar.gz": b"x" * 100_000,
    "foobarbaz.txt": b"1",
    "foobar~1.txt": b"2",
    "foobarquux.txt": b"3",
    "Ünïcödé 日本 🎈.txt": b"4",
    "EMPTY": b"",
    ".profile": b"5",
    "thirteen char": b"6",
    "x" * 255: b"7",
}
FAT16_SIZES = [2_300_000, 3 << 20, 16 << 20, (64 << 20) + 77]
FAT32_SIZE = 260 << 20

Read = Callable[[int, int], bytes]


def reading(image: bytes) -> Read:
    return lambda offset, length: image[offset : offset + length]


@functools.lru_cache(maxsize=4)
def image_of(size: int) -> bytes:
    return make_image(FILES, size=size)


needs_fsck = pytest.mark.skipif(shutil.which("fsck.fat") is None, reason="fsck.fat is not installed")
needs_mkfs = pytest.mark.skipif(shutil.which("mkfs.fat") is None, reason="mkfs.fat is not installed")
needs_mtools = pytest.mark.skipif(shutil.which("mcopy") is None, reason="mtools are not installed")


@pytest.mark.parametrize("size", FAT16_SIZES)
def test_round_trip(size: int) -> None:
    image = image_of(size)
    assert len(image) == size // 512 * 512
    assert image[54:62] == b"FAT16   "
    assert read_files(reading(image)) == FILES


def test_round_trip_fat32() -> None:
    """Its 260 MiB are mostly zeros that nobody touches; the directory is longer than one cluster."""
    files = {f"{'long name ' * 20}{number}": str(number).encode() for number in range(100)}
    image = make_image(files, size=FAT32_SIZE)
    assert image[82:90] == b"FAT32   "
    assert image[6 * 512 : 8 * 512] == image[: 2 * 512]
    assert read_files(reading(image)) == files


def test_largest_fat16() -> None:
    image = make_image({"A": b"a"}, size=FAT32_SIZE - 1)
    assert image[54:62] == b"FAT16   "
    assert read_files(reading(image)) == {"A": b"a"}


def test_same_arguments_same_image() -> None:
    assert make_image(FILES) == make_image(dict(FILES))
    assert make_image({"A": b""}) != make_image({"B": b""})


@pytest.mark.parametrize("label", ["", "ABC", "two words", "12345678901"])
def test_label(label: str) -> None:
    image = make_image({}, label=label)
    assert image[43:54] == (label.upper() or "NO NAME").encode().ljust(11)
    assert read_files(reading(image)) == {}


def fsck(path: Path) -> None:
    result = subprocess.run(["fsck.fat", "-n", "-v", str(path)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


@needs_fsck
@pytest.mark.parametrize("size", [*FAT16_SIZES, FAT32_SIZE])
@pytest.mark.parametrize("label", ["", "USBREDIR"])
def test_fsck_is_content(tmp_path: Path, size: int, label: str) -> None:
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.write(make_image(FILES, size=size, label=label).rstrip(b"\0"))
        file.truncate(size // 512 * 512)
    fsck(path)


@needs_mtools
def test_mtools_read_our_image(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(image_of(16 << 20))
    for name in ("hello.txt", "a long file name with spaces.tar.gz", "EMPTY", "foobarquux.txt"):
        subprocess.run(["mcopy", "-i", str(image), f"::{name}", str(tmp_path / "out")], check=True)
        assert (tmp_path / "out").read_bytes() == FILES[name]
        (tmp_path / "out").unlink()


@needs_mkfs
@needs_mtools
@pytest.mark.parametrize("kind", ["16", "32"])
@pytest.mark.parametrize("sector", ["512", "4096"])
def test_we_read_what_mtools_wrote(tmp_path: Path, kind: str, sector: str) -> None:
    """With directories, deleted files, lower case flags and a label in between."""
    image = tmp_path / "disk.img"
    kibibytes = {"16": 8192, "32": 40960}[kind] * int(sector) // 512
    command = ["mkfs.fat", "-C", "-F", kind, "-S", sector, "-s", "1", "-n", "LABEL", str(image), str(kibibytes)]
    subprocess.run(command, check=True, capture_output=True)
    files = {"lower.txt": b"l", "UPPER.TXT": b"U", "Mixed Name.data": bytes(70_000), "gone": b"x", "Lower.c": b"c"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        subprocess.run(["mcopy", "-i", str(image), str(tmp_path / name), "::"], check=True)
    subprocess.run(["mdel", "-i", str(image), "::gone"], check=True)
    subprocess.run(["mmd", "-i", str(image), "::directory"], check=True)
    del files["gone"]
    with image.open("rb") as file:
        assert read_files(lambda offset, length: (file.seek(offset), file.read(length))[1]) == files


# --- what is refused ---


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "a.",
        "a ",
        " a",
        "a/b",
        "a\\b",
        "a:b",
        "a?b",
        'a"b',
        "a\nb",
        "a\uffff",
        "x" * 256,
        "🎈" * 128,
        "\ud800",
    ],
)
def test_bad_names(name: str) -> None:
    with pytest.raises(ValueError, match=r"not a file name|surrogates"):
        make_image({name: b""})


def test_names_differing_in_case_only() -> None:
    with pytest.raises(ValueError, match="upper and lower case"):
        make_image({"Hello": b"", "hello": b""})


@pytest.mark.parametrize("label", ["x" * 12, "a.b", " a", "a ", "ä"])
def test_bad_labels(label: str) -> None:
    with pytest.raises(ValueError, match="not a volume label"):
        make_image({}, label=label)


@pytest.mark.parametrize(("size", "why"), [(0, "cannot"), (-1, "cannot"), (1 << 60, "cannot"), (1 << 20, "too few")])
def test_bad_sizes(size: int, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        make_image({}, size=size)


def test_too_much_data() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        make_image({"a": bytes(3 << 20)}, size=3 << 20)


def test_too_many_files() -> None:
    assert len(read_files(reading(make_image({f"F{number}": b"" for number in range(511)})))) == 511
    with pytest.raises(ValueError, match="too many files"):
        make_image({f"F{number}": b"" for number in range(512)})


def short_names(image: bytes) -> list[bytes]:
    start = 512 * (1 + 2 * int.from_bytes(image[22:24], "little"))
    entries = [image[start + 32 * number : start + 32 * number + 32] for number in range(512)]
    return [entry[:11] for entry in entries if entry[0] and entry[11] == 0x20]


def test_short_names_differ() -> None:
    names = ["foobarbaz.txt", "foobar~1.txt", *(f"foobar and {number}.text" for number in range(12)), "a.b.c", "ß"]
    short = short_names(make_image(dict.fromkeys(names, b"")))
    assert len(set(short)) == len(names)
    assert short[:3] == [b"FOOBAR~2TXT", b"FOOBAR~1TXT", b"FOOBAR~1TEX"]
    assert short[10:12] == [b"FOOBAR~9TEX", b"FOOBA~10TEX"]
    assert short[-2:] == [b"AB~1    C  ", b"SS~1       "]


# --- damaged images ---


def damaged(image: bytes, offset: int, patch: bytes) -> Read:
    return reading(image[:offset] + patch + image[offset + len(patch) :])


BOOT_DAMAGE = {
    "no signature": (510, b"\0\0"),
    "sector of 0": (11, b"\0\0"),
    "sector of 513": (11, b"\1\2"),
    "cluster of 0": (13, b"\0"),
    "cluster of 3": (13, b"\3"),
    "nothing reserved": (14, b"\0\0"),
    "no table": (16, b"\0"),
    "no root directory": (17, b"\0\0"),
    "root directory of half a sector": (17, b"\x08\0"),
    "few sectors": (19, b"\0\1"),
    "no sectors": (19, b"\0\0"),
    "many sectors": (19, b"\0\0" + bytes(11) + b"\xff\xff\xff\xff"),
    "small table": (22, b"\1\0"),
}


@pytest.mark.parametrize("name", BOOT_DAMAGE)
def test_damaged_boot_sector(name: str) -> None:
    offset, patch = BOOT_DAMAGE[name]
    with pytest.raises(ValueError, match=r"FAT16 or FAT32|table is too small"):
        FatReader(damaged(image_of(16 << 20), offset, patch))


@pytest.mark.parametrize("size", [0, 100, 511, 512, 5000])
def test_cut_image(size: int) -> None:
    with pytest.raises(ValueError, match="disk ends"):
        FatReader(reading(image_of(16 << 20)[:size]))


def test_missing_file() -> None:
    with pytest.raises(KeyError):
        FatReader(reading(image_of(16 << 20))).read("nothing")


def link_offset(cluster: int) -> int:
    return 512 + 2 * cluster


@pytest.mark.parametrize("link", [0, 1, 2, 0xFFF0, 0xFFF7, 0xFFFF])
def test_damaged_chain(link: int) -> None:
    """Free, reserved, looping, beyond the end, bad, and too short."""
    image = make_image({"A": bytes(5000)})
    reader = FatReader(damaged(image, link_offset(2), struct.pack("<H", link)))
    with pytest.raises(ValueError, match="chain"):
        reader.read("A")


def test_data_beyond_the_disk() -> None:
    image = make_image({"A": bytes(5000)})
    reader = FatReader(reading(image[: 512 * (1 + 2 * int.from_bytes(image[22:24], "little") + 32 + 3)]))
    with pytest.raises(ValueError, match="disk ends"):
        reader.read("A")


def test_root_directory_that_loops() -> None:
    image = make_image({f"{'y' * 250}{number}": b"" for number in range(100)}, size=FAT32_SIZE)[: 4 << 20]
    with pytest.raises(ValueError, match="chain"):
        FatReader(damaged(image, 32 * 512 + 4 * 2, struct.pack("<I", 2)))


def test_long_name_that_does_not_belong_is_ignored() -> None:
    """The short name counts then."""
    image = make_image({"long name.text": b"x"}, label="")
    root = 512 * (1 + 2 * int.from_bytes(image[22:24], "little"))
    for offset, patch in [(0, b"\x43"), (13, b"\xaa"), (1, b"\0\xd8")]:
        assert FatReader(damaged(image, root + offset, patch)).names() == ["LONGNA~1.TEX"]


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.integers(0, 90), st.binary(min_size=1, max_size=4)), max_size=3), st.data())
def test_any_damage_is_a_value_error(boot: list[tuple[int, bytes]], data: st.DataObject) -> None:
    """Whatever the bytes are, the reader ends, with content or ValueError."""
    image = bytearray(image_of(FAT16_SIZES[0])[: 300 * 512])
    root = 512 * (1 + 2 * int.from_bytes(image[22:24], "little"))
    for offset, patch in boot if data.draw(st.booleans()) else []:
        image[offset : offset + len(patch)] = patch
    for area, size in ((512, 600), (root, 1500)):
        for offset, patch in data.draw(st.lists(st.tuples(st.integers(0, size), st.binary(min_size=1, max_size=4)))):
            image[area + offset : area + offset + len(patch)] = patch
    whole = bytes(image)
    try:
        reader = FatReader(reading(whole))
    except ValueError:
        return
    for name in reader.names():
        try:
            assert len(reader.read(name)) <= len(whole)
        except ValueError:
            continue


NAMES = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"], exclude_characters='"*/:<>?\\|\x7f\uffff'),
    max_size=40,
).filter(lambda name: name.strip(" .") and name == name.rstrip(" .").lstrip(" "))


@settings(deadline=None, max_examples=50)
@given(st.dictionaries(NAMES, st.binary(max_size=3000), max_size=8))
def test_any_files_round_trip(files: dict[str, bytes]) -> None:
    if len({name.upper() for name in files}) == len(files):
        image = make_image(files, size=2_300_000)
        assert read_files(reading(image)) == files
        assert len(set(short_names(image))) == len(files)
