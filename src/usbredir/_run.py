"""``usbredir run``: a program whose pyusb finds the devices of hosts.

The program becomes this process: its exit code, signals and terminal are its own. What makes its pyusb find the devices
is in ``usbredir._startup``.
"""

from __future__ import annotations

import argparse
import errno
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence

from . import _startup
from ._ending import ExitCode, Failure
from ._startup.sitecustomize import VARIABLE
from .transport import Connection, connect, parse_address

__all__ = ["add_arguments", "run"]

EPILOG = """\
examples:
  usbredir run --connect 127.0.0.1:4000 -- python script.py
  usbredir run --connect unix:/run/usbredir.sock -- python -m module --its --options
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.usage = "usbredir run --connect ADDRESS [--connect ADDRESS ...] -- PROGRAM [ARGUMENT ...]"
    parser.epilog = EPILOG
    parser.add_argument(
        "--connect", metavar="ADDRESS", action="append", required=True, help="where a device is exported"
    )
    parser.add_argument("program", metavar="PROGRAM", nargs=argparse.REMAINDER, help="the program and its arguments")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command. Raises Failure. Comes back where a process cannot become another program: with its exit code."""
    program: list[str] = options.program[options.program[:1] == ["--"] :]
    if not program:
        raise Failure(ExitCode.USAGE, "no program: write it after --, as in: -- python script.py")
    path = shutil.which(program[0])
    if path is None:
        raise Failure(ExitCode.USAGE, f"{program[0]}: no such program")
    addresses = list(dict.fromkeys(options.connect))
    for address in addresses:
        _check(address)
    environment = _environment(_connect(addresses))
    try:
        if os.name == "posix":
            os.execve(path, program, environment)
        return subprocess.run([path, *program[1:]], env=environment, check=False).returncode
    except OSError as error:
        why = "neither a program nor a script with #!" if error.errno == errno.ENOEXEC else error.strerror
        raise Failure(ExitCode.USAGE, f"{program[0]}: {why}") from error


def _check(address: str) -> None:
    try:
        parse_address(address)
    except ValueError as error:
        raise Failure(ExitCode.USAGE, f"--connect {error}") from error


def _connect(addresses: Sequence[str]) -> dict[str, Connection]:
    """Connections to all of them, so that what is wrong is told before the program starts."""
    connections: dict[str, Connection] = {}
    for address in addresses:
        try:
            connections[address] = connect(address)
        except OSError as error:
            raise Failure(
                ExitCode.REFUSED, f"--connect {address}: {error.strerror or error}; is a device exported there?"
            ) from error
    return connections


def _environment(connections: Mapping[str, Connection]) -> dict[str, str]:
    """What the program and all that it starts inherit."""
    from . import _pyusb_handover  # imports pyusb, which the other commands can do without

    folder = os.path.dirname(os.path.abspath(_startup.__file__))
    path = os.pathsep.join(entry for entry in (folder, os.environ.get("PYTHONPATH")) if entry)
    return {**os.environ, "PYTHONPATH": path, VARIABLE: _pyusb_handover.hand_over(connections)}
