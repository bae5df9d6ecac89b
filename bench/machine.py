"""Where numbers come from: machine, interpreter, and the programs that usbredir is compared with."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["cpu_seconds", "interpreter", "machine", "package_version", "peers", "use_library_of"]

TREE_LIBRARIES = "usr/lib/*/libusbredirparser.so.1"
PARSER_PACKAGES = ("libusbredirparser1t64", "libusbredirparser1")


def machine() -> dict[str, Any]:
    """Machine and interpreter, for programs."""
    return {
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "build": _build(),
        "gil": getattr(sys, "_is_gil_enabled", lambda: True)(),
        "system": f"{platform.system()} {'.'.join(platform.release().split('.')[:2])}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def interpreter() -> str:
    """For people."""
    where = machine()
    return f"{where['python']} ({where['build']})"


def cpu_seconds(pid: int, *, main_thread: bool = False) -> float:
    """CPU time of a process up to now, of all its threads or of its main thread."""
    fields = (
        Path(f"/proc/{pid}/task/{pid}/stat" if main_thread else f"/proc/{pid}/stat")
        .read_text()
        .rsplit(")", 1)[1]
        .split()
    )
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _build() -> str:
    """How the interpreter was optimised. Debian does it in its own way, without the option that tells."""
    if "--enable-optimizations" in (sysconfig.get_config_var("CONFIG_ARGS") or ""):
        return "PGO"
    base = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    if base.startswith("/usr/bin/") and os.path.exists("/etc/debian_version"):
        return "Debian's, PGO"
    return "plain, without PGO"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def use_library_of(tree: Path, folder: Path) -> None:
    """Let C and ctypes peers use the libusbredirparser of a Debian tree, by way of *folder*; the header is ours."""
    library = next(tree.glob(TREE_LIBRARIES), None)
    if library is None:
        raise RuntimeError(f"{tree} has no libusbredirparser.so.1")
    for name in ("libusbredirparser.so.1", "libusbredirparser.so"):
        (folder / name).symlink_to(library.resolve())
    os.environ.update(USBREDIR_LIBDIR=str(folder), USBREDIR_LIB=str(folder / "libusbredirparser.so.1"))


def peers(tree: Path | None) -> str:
    """The C programs and their versions. *tree*: the Debian tree that they come from; None: the system's library."""
    versions = {
        "libusbredirparser": package_version(PARSER_PACKAGES, tree),
        "usbredirect": package_version(("usbredirect",), tree) if tree is not None else "",
        "QEMU": package_version(("qemu-system-x86",)),
        "libusb": _libusb(),
    }
    return ", ".join(f"{name} {version}" for name, version in versions.items() if version)


def package_version(names: Sequence[str], tree: Path | None = None) -> str:
    """The upstream version of the first of Debian's packages that is there; else ""."""
    query = shutil.which("dpkg-query")
    if query is None:
        return ""
    where = [] if tree is None else [f"--admindir={tree / 'var/lib/dpkg'}"]
    for name in names:
        command = [query, *where, "-W", "-f=${Status} ${Version}", name]
        status, _, version = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.rpartition(" ")
        if status == "install ok installed":
            return re.sub(r"^\d+:|[-+].*", "", version)
    return ""


def _libusb() -> str:
    try:
        import libusb_package  # noqa: F401
    except ImportError:
        return ""
    from importlib.metadata import version

    return ".".join(version("libusb-package").split(".")[:3])
