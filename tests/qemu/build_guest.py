"""Builds the guest of the end-to-end tests from Debian packages, without root.

The guest is a Debian kernel and an initramfs with busybox, the few modules that a USB disk needs, and `guest_init.sh`.
`python build_guest.py` builds it ahead of the tests and prints where it is.
"""

import contextlib
import hashlib
import lzma
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
INIT = HERE / "guest_init.sh"
KERNEL_METAPACKAGE = "linux-image-amd64"
BUSYBOX_PACKAGE = "busybox-static"
MODULES = ("xhci_pci", "ehci_pci", "usb_storage", "sd_mod", "vfat", "nls_cp437", "nls_ascii")
TOOLS = ("apt-get", "apt-cache", "dpkg-deb", "cpio", "depmod", "modprobe")
# depmod and modprobe are outside an ordinary user's PATH.
SEARCH_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])


class BuildError(Exception):
    """The guest could not be built; the message says what to install or do."""


@dataclass(frozen=True)
class GuestImage:
    """The files that QEMU boots."""

    kernel: Path
    initramfs: Path


def missing_tools() -> list[str]:
    """Return the names of needed programs that this machine lacks."""
    return [tool for tool in TOOLS if shutil.which(tool, path=SEARCH_PATH) is None]


def cache_folder() -> Path:
    """Return the folder where built guests are kept; it is created."""
    folder = Path(os.environ.get("USBREDIR_QEMU_CACHE") or HERE.parents[1] / ".cache" / "qemu").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def exclusive_use() -> Iterator[Path]:
    """Hold the cache folder's lock: one guest is built or runs at a time, whichever test process asks."""
    import fcntl  # here, so that Windows can import this module and say what it lacks

    folder = cache_folder()
    with open(folder / "lock", "w", encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder


def build_guest(cache: Path) -> GuestImage:
    """Return the guest in *cache*, built anew if the scripts or the packages changed.

    Args:
        cache: The folder of `exclusive_use`, which the caller holds.

    Raises:
        BuildError: A program or package is missing, or a step failed.

    """
    packages = _needed_packages()
    inputs = [*(f"{name}={version}" for name, version in packages.items()), *map(_digest, (Path(__file__), INIT))]
    key = hashlib.sha256("\n".join(inputs).encode()).hexdigest()[:16]
    folder = cache / f"guest-{key}"
    image = GuestImage(folder / "kernel", folder / "initramfs")
    if not folder.exists():
        for former in (*cache.glob("guest-*"), *cache.glob("build-*")):
            shutil.rmtree(former)
        with tempfile.TemporaryDirectory(dir=cache, prefix="build-") as scratch:
            built = Path(scratch) / "built"
            built.mkdir()
            _build(Path(scratch), list(packages), built)
            built.rename(folder)
    return image


def _build(scratch: Path, packages: list[str], target: Path) -> None:
    _run(["apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", *packages], cwd=scratch)
    root = scratch / "root"
    for archive in scratch.glob("*.deb"):
        _run(["dpkg-deb", "--extract", str(archive), str(root)])
    (target / "kernel").write_bytes(_unpacked_kernel(_only(root, "boot/vmlinuz-*")))
    _make_initramfs(root, scratch / "initramfs", target / "initramfs")


def _make_initramfs(root: Path, tree: Path, target: Path) -> None:
    for name in ("bin", "dev", "mnt", "modules", "proc", "sys"):
        (tree / name).mkdir(parents=True)
    shutil.copy(_only(root, "bin/busybox", "usr/bin/busybox"), tree / "bin" / "busybox")
    (tree / "bin" / "sh").symlink_to("busybox")
    shutil.copy(INIT, tree / "init")
    (tree / "init").chmod(0o755)
    order = [_copy_module(path, tree / "modules") for path in _module_files(root)]
    (tree / "modules" / "order").write_text("".join(f"{name}\n" for name in order), encoding="ascii")
    names = sorted(str(path.relative_to(tree)) for path in tree.rglob("*"))
    archive = _run(["cpio", "--quiet", "-o", "-H", "newc", "-R", "0:0"], cwd=tree, input="\n".join(names).encode())
    target.write_bytes(archive)


def _module_files(root: Path) -> list[Path]:
    """Return the wanted modules and all they depend on, in the order of loading."""
    if not (root / "lib").exists():  # newer packages have everything below /usr, where kmod does not look
        (root / "lib").symlink_to("usr/lib")
    release = _only(root, "lib/modules/*").name
    _run(["depmod", "-b", str(root), release])
    files: dict[Path, None] = {}
    for module in MODULES:
        output = _run(["modprobe", "-d", str(root), "-S", release, "--show-depends", module]).decode()
        words = (line.split() for line in output.splitlines())
        files.update(dict.fromkeys(Path(line[1]) for line in words if line[0] == "insmod"))  # or "builtin"
    return list(files)


def _copy_module(path: Path, folder: Path) -> str:
    """Copy one module, unpacked, and return its name there."""
    data = path.read_bytes()
    if path.suffix == ".xz":
        path, data = path.with_suffix(""), lzma.decompress(data)
    (folder / path.name).write_bytes(data)
    return path.name


def _unpacked_kernel(vmlinuz: Path) -> bytes:
    """Return the ELF file in *vmlinuz*, for unpacking takes an emulated processor longer than all the rest of the boot.

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


def _needed_packages() -> dict[str, str]:
    """Return name and version of the packages to download: the kernel and busybox."""
    known = _package_fields(KERNEL_METAPACKAGE, BUSYBOX_PACKAGE)
    metapackage = known[KERNEL_METAPACKAGE]
    kernel = next((word for word in metapackage["Depends"].split() if word.startswith("linux-image-")), None)
    if kernel is None:
        raise BuildError(f"{KERNEL_METAPACKAGE} depends on no kernel package: {metapackage['Depends']!r}")
    return {kernel: metapackage["Version"], BUSYBOX_PACKAGE: known[BUSYBOX_PACKAGE]["Version"]}


def _package_fields(*packages: str) -> dict[str, dict[str, str]]:
    output = _run(["apt-cache", "show", "--no-all-versions", *packages]).decode()
    known = {}
    for paragraph in output.split("\n\n"):
        lines = (line.partition(": ") for line in paragraph.splitlines() if not line.startswith(" "))
        fields = {name: value for name, _, value in lines}
        known[fields.get("Package", "")] = fields
    unknown = set(packages) - set(known)
    if unknown:
        raise BuildError(f"apt does not know {', '.join(sorted(unknown))}; is 'apt-get update' needed?")
    return known


def _only(root: Path, *patterns: str) -> Path:
    found = [path for pattern in patterns for path in root.glob(pattern)]
    if not found:
        raise BuildError(f"no {' or '.join(patterns)} in the packages")
    return found[0]


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _run(command: Sequence[str], *, cwd: Path | None = None, input: bytes | None = None) -> bytes:
    env = {**os.environ, "PATH": SEARCH_PATH, "LC_ALL": "C"}
    try:
        done = subprocess.run(command, cwd=cwd, input=input, capture_output=True, check=True, timeout=300, env=env)
    except FileNotFoundError as error:
        raise BuildError(f"{command[0]} is not installed") from error
    except subprocess.SubprocessError as error:
        output = getattr(error, "stderr", None) or b""
        raise BuildError(f"{' '.join(command)}: {error}\n{output.decode(errors='replace')}".rstrip()) from error
    return done.stdout


if __name__ == "__main__":
    with exclusive_use() as _cache:
        print(build_guest(_cache))
