"""Other programs: run to their end or for a while, with all that they start, and never for ever; C programs."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["compiled", "output", "running"]


@contextmanager
def running(
    command: Sequence[str], env: Mapping[str, str] | None = None, *, errors: bool = False
) -> Iterator[subprocess.Popen[str]]:
    """A program, until the block is left: it is killed then, with what it started.

    What it writes is there to be read, *errors*: its messages as well, on the same stream.
    """
    stderr = subprocess.STDOUT if errors else None
    with subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=stderr, text=True, start_new_session=True
    ) as process:
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def output(command: Sequence[str], timeout: float, env: Mapping[str, str] | None = None) -> str:
    """What a program writes. Raises RuntimeError when it fails or takes longer than *timeout* seconds."""
    name = " ".join(Path(word).name if "/" in word else word for word in command[:3])
    with running(command, env) as process:
        try:
            written, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"{name}: nothing within {timeout:g} s") from None
    if process.returncode:
        raise RuntimeError(f"{name}: exit code {process.returncode}")
    return written


def compiled(program: Path, *sources: Path, flags: Sequence[str] = (), library: bool = False) -> Path:
    """Compile a C program, with *library* on libusbredirparser: the system's, or the one in ``$USBREDIR_LIBDIR``.

    Raises RuntimeError that tells what is missing.
    """
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        raise RuntimeError("no C compiler")
    folder = os.environ.get("USBREDIR_LIBDIR")
    own = [f"-L{folder}", f"-Wl,-rpath,{folder}"] if folder and library else []
    link = [*own, "-lusbredirparser"] if library else []
    command = [compiler, "-O2", *flags, "-o", str(program), *map(str, sources), *link, "-ldl", "-lpthread"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if result.returncode:
        wanted = " (package libusbredirparser-dev?)" if library else ""
        raise RuntimeError(f"{sources[0].name} does not compile{wanted}:\n{result.stderr}")
    return program
