"""Builds the guest from Debian packages, without root: a kernel, and an initramfs with busybox and some modules.

Built once, then kept in the cache folder: ``$USBREDIR_QEMU_CACHE``, else ``usbredir/qemu`` below ``$XDG_CACHE_HOME``
or ``~/.cache``.
"""

from __future__ import annotations

import contextlib
import hashlib
import lzma
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ._guest_error import GuestError

__all__ = ["QEMU", "BuildError", "GuestImage", "build_guest", "cache_folder", "missing_tools"]

QEMU = "qemu-system-x86_64"
TOOLS = ("apt-get", "apt-cache", "dpkg-deb", "cpio", "depmod", "modprobe", QEMU)
SEARCH_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
"""depmod and modprobe are outside an ordinary user's PATH."""

KERNEL_METAPACKAGE = "linux-image-amd64"
PACKAGES = (KERNEL_METAPACKAGE, "busybox-static", "alsa-utils", "libasound2-data", "libc6")
ALSA_LIBRARY = re.compile(r"\blibasound2(t64)?\b")
"""alsa-utils depends on it, under a name that is not the same in all releases."""

MODULES = (
    *("virtio_pci", "virtio_console", "xhci_pci", "ehci_pci", "uhci_hcd"),
    *(
        "usb_storage",
        "uas",
        "sd_mod",
        "sr_mod",
        "sg",
        "vfat",
        "isofs",
        "udf",
        "nls_cp437",
        "nls_ascii",
        "nls_iso8859_1",
    ),
    *("cdc_acm", "usbserial", "ftdi_sio", "cp210x", "pl2303", "usbtmc", "usbtest"),
    *("usbhid", "hid_generic", "evdev", "mousedev", "snd_usb_audio"),
)
"""What devices of the usual classes need; the guest loads a module when its device comes."""

MODULE_OPTIONS = "options usb_storage delay_use=0\n"
"""A disk is there at once, not a second later."""

PROGRAMS = {"bin/busybox": ("bin/busybox", "usr/bin/busybox"), "bin/aplay": ("usr/bin/aplay",)}
LIBRARIES = ("libasound.so.2", "libc.so.6", "libm.so.6", "ld-linux-x86-64.so.2")
LINKS = {
    "bin/sh": "busybox",
    "bin/arecord": "aplay",
    "sbin/modprobe": "/bin/busybox",  # where the kernel looks for it
    "lib64": "lib",  # where programs look for their loader
}
FOLDERS = ("bin", "dev", "etc/modprobe.d", "lib", "mnt", "proc", "run", "sbin", "sys", "tmp", "usr/share")
SCRIPTS = {"init": "guest_init.sh", "sbin/hotplug": "guest_hotplug.sh"}
HERE = Path(__file__).resolve().parent

BUILD_LIMIT = 300.0
"""Seconds that one step of the building may take, downloads included."""
UNUSED = 30 * 24 * 3600.0
"""Seconds after which a built guest that nobody has used is removed."""


class BuildError(GuestError):
    """The guest could not be built; the message says what to install or do."""


@dataclass(frozen=True)
class GuestImage:
    """The files that QEMU boots."""

    kernel: Path
    initramfs: Path


def missing_tools() -> list[str]:
    """Names of the programs that building and running a guest needs and this machine lacks."""
    return [tool for tool in TOOLS if shutil.which(tool, path=SEARCH_PATH) is None]


def cache_folder() -> Path:
    """The folder where built guests are kept; it is created."""
    chosen = os.environ.get("USBREDIR_QEMU_CACHE")
    general = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = (Path(chosen) if chosen else general / "usbredir" / "qemu").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def build_guest(cache: Path | None = None) -> GuestImage:
    """The guest, from the cache, or built if the packages or what it is made from have changed.

    Building takes some 20 s, and downloads 90 MB. Several processes may ask at once: one builds, the others wait.

    Args:
        cache: folder to keep it in; None: the user's.

    Raises:
        BuildError: a program or package is missing, or a step failed.

    """
    if missing := missing_tools():
        raise BuildError(f"not installed: {', '.join(missing)}")
    cache = cache_folder() if cache is None else cache
    with _locked(cache):
        packages = _needed_packages()
        folder = cache / f"guest-{_key(packages)}"
        if folder.exists():
            os.utime(folder)  # it is in use
        else:
            _remove_unused(cache)
            _build_into(folder, list(packages))
    return GuestImage(folder / "kernel", folder / "initramfs")


@contextlib.contextmanager
def _locked(cache: Path) -> Iterator[None]:
    import fcntl  # here, so that Windows can import this module and say what it lacks

    with open(cache / "lock", "w", encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _key(packages: dict[str, str]) -> str:
    """What a guest is made from, as a short text: versions of the packages, and our own files."""
    ours = (Path(__file__), *(HERE / script for script in SCRIPTS.values()))
    parts = [*(f"{name}={version}" for name, version in packages.items()), *map(_digest, ours)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _remove_unused(cache: Path) -> None:
    """Remove old guests, and what an interrupted building left."""
    for folder in (*cache.glob("guest-*"), *cache.glob("build-*")):
        if folder.name.startswith("build-") or folder.stat().st_mtime < time.time() - UNUSED:
            shutil.rmtree(folder)


# ---------------------------------------------------------------- packages


def _needed_packages() -> dict[str, str]:
    """Name and version of the packages to download."""
    known = _package_fields(PACKAGES)
    kernel = next(
        (word for word in known[KERNEL_METAPACKAGE]["Depends"].split() if word.startswith("linux-image-")), ""
    )
    library = ALSA_LIBRARY.search(known["alsa-utils"]["Depends"])
    if not kernel or library is None:
        raise BuildError(f"{KERNEL_METAPACKAGE} or alsa-utils has unexpected dependencies: is this Debian?")
    known[library[0]] = _package_fields([library[0]])[library[0]]
    versions = {name: fields["Version"] for name, fields in known.items()}
    versions[kernel] = versions.pop(KERNEL_METAPACKAGE)
    return versions


def _package_fields(packages: Sequence[str]) -> dict[str, dict[str, str]]:
    """What apt knows of packages: {name: {field: value}}."""
    output = _run(["apt-cache", "show", "--no-all-versions", *packages]).decode()
    known = {}
    for paragraph in output.split("\n\n"):
        lines = (line.partition(": ") for line in paragraph.splitlines() if not line.startswith(" "))
        fields = {name: value for name, _, value in lines}
        if fields.get("Package") in packages:
            known[fields["Package"]] = fields
    unknown = set(packages) - set(known)
    if unknown:
        raise BuildError(f"apt does not know {', '.join(sorted(unknown))}; is 'apt-get update' needed?")
    return known


# ---------------------------------------------------------------- building


def _build_into(folder: Path, packages: list[str]) -> None:
    """Build a guest beside *folder*, then give it this name: what has it is complete."""
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="build-") as name:
        scratch = Path(name)
        built = scratch / "built"
        built.mkdir()
        _run(["apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", *packages], cwd=scratch)
        for archive in scratch.glob("*.deb"):
            _run(["dpkg-deb", "--extract", str(archive), str(scratch / "root")])
        (built / "kernel").write_bytes(_unpacked_kernel(_only(scratch / "root", "boot/vmlinuz-*")))
        tree = scratch / "tree"
        _make_tree(scratch / "root", tree)
        (built / "initramfs").write_bytes(_archive(tree))
        built.rename(folder)


def _make_tree(root: Path, tree: Path) -> None:
    """The guest's file system, from the packages that were unpacked below *root*."""
    for folder in FOLDERS:
        (tree / folder).mkdir(parents=True)
    for target, candidates in PROGRAMS.items():
        shutil.copy(_only(root, *candidates), tree / target)
    for name in LIBRARIES:
        shutil.copy(_only(root, f"lib/*/{name}", f"usr/lib/*/{name}"), tree / "lib" / name)
    shutil.copytree(root / "usr/share/alsa", tree / "usr/share/alsa")
    for link, content in LINKS.items():
        (tree / link).symlink_to(content)
    for target, script in SCRIPTS.items():
        shutil.copy(HERE / script, tree / target)
        (tree / target).chmod(0o755)
    (tree / "etc/modprobe.d/guest.conf").write_text(MODULE_OPTIONS, encoding="ascii")
    _copy_modules(root, tree)


def _copy_modules(root: Path, tree: Path) -> None:
    """Copy the wanted modules and all they depend on, unpacked, with the tables that modprobe reads."""
    if not (root / "lib").exists():  # newer packages have everything below /usr, where kmod does not look
        (root / "lib").symlink_to("usr/lib")
    release = _only(root, "lib/modules/*").name
    target = tree / "lib/modules" / release
    target.mkdir(parents=True)
    _run(["depmod", "-b", str(root), release])
    for path in _module_files(root, release):
        data = path.read_bytes()
        if path.suffix == ".xz":
            path, data = path.with_suffix(""), lzma.decompress(data)
        (target / path.name).write_bytes(data)
    for table in ("modules.builtin", "modules.order"):
        shutil.copy(root / "lib/modules" / release / table, target)
    _run(["depmod", "-b", str(tree), release])


def _module_files(root: Path, release: str) -> Iterable[Path]:
    files: dict[Path, None] = {}
    for module in MODULES:
        output = _run(["modprobe", "-d", str(root), "-S", release, "--show-depends", module]).decode()
        words = (line.split() for line in output.splitlines())
        files.update(dict.fromkeys(Path(line[1]) for line in words if line[0] == "insmod"))  # or "builtin"
    return files


def _archive(tree: Path) -> bytes:
    """The initramfs, not packed: unpacking takes an emulated processor longer than reading."""
    names = sorted(str(path.relative_to(tree)) for path in tree.rglob("*"))
    return _run(["cpio", "--quiet", "-o", "-H", "newc", "-R", "0:0"], cwd=tree, input="\n".join(names).encode())


def _unpacked_kernel(vmlinuz: Path) -> bytes:
    """The ELF file in *vmlinuz*, for unpacking takes an emulated processor longer than all the rest of the boot.

    A kernel that is packed in another way is returned as it is: slower, not wrong.
    """
    packed = vmlinuz.read_bytes()
    start = packed.find(b"\xfd7zXZ\0")
    if start >= 0:
        with contextlib.suppress(lzma.LZMAError):
            unpacked = lzma.LZMADecompressor().decompress(packed[start:])
            if unpacked.startswith(b"\x7fELF"):
                return unpacked
    return packed


def _only(root: Path, *patterns: str) -> Path:
    found = [path for pattern in patterns for path in sorted(root.glob(pattern))]
    if not found:
        raise BuildError(f"no {' or '.join(patterns)} in the packages")
    return found[0]


def _run(command: Sequence[str], *, cwd: Path | None = None, input: bytes | None = None) -> bytes:
    env = {**os.environ, "PATH": SEARCH_PATH, "LC_ALL": "C"}
    try:
        done = subprocess.run(
            command, cwd=cwd, input=input, capture_output=True, check=True, timeout=BUILD_LIMIT, env=env
        )
    except FileNotFoundError as error:
        raise BuildError(f"{command[0]} is not installed") from error
    except subprocess.SubprocessError as error:
        output = getattr(error, "stderr", None) or b""
        raise BuildError(f"{' '.join(command)}: {error}\n{output.decode(errors='replace')}".rstrip()) from error
    return done.stdout
