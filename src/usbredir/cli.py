"""The ``usbredir`` command: its commands, and how it ends.

A command's module is imported when the command is used: ``usbredir --version`` takes a third of the time that all need.
Exit codes are in ``_ending.ExitCode`` and explained in docs/cli.md.
"""

from __future__ import annotations

import argparse
import importlib
import signal
import sys
from collections.abc import Container, Sequence
from typing import NamedTuple

from . import __version__
from ._ending import ExitCode, Failure, ending_signals, interrupt

__all__ = ["ExitCode", "joined", "main"]

DESCRIPTION = "Redirect USB devices over a network connection to virtual machines (QEMU, SPICE, KubeVirt)."
EPILOG = """\
examples:
  usbredir demo                                             see it work, no hardware needed
  usbredir list                                             what is plugged in
  usbredir export --device 0781:5567 --as 127.0.0.1:4000    a real device
  usbredir export --virtual disk:stick.img --as 127.0.0.1:4000
  qemu-system-x86_64 ... -device qemu-xhci \\
      -chardev socket,id=c,host=127.0.0.1,port=4000 -device usb-redir,chardev=c
  usbredir attach 127.0.0.1:4000 --qmp /run/vm.qmp          the same for a machine that runs
  usbredir run --connect 127.0.0.1:4000 -- python script_with_pyusb.py
"""


class Command(NamedTuple):
    """A command: the module with its ``add_arguments``, and what help tells of it."""

    module: str
    help: str


COMMANDS = {
    "export": Command("_export", "let virtual machines use devices"),
    "attach": Command("_attach", "give a running QEMU a device that is exported"),
    "list": Command("_listing", "show the devices that can be exported"),
    "run": Command("_run", "run a Python program that uses pyusb with the devices that others export"),
    "demo": Command("demo", "export a virtual USB stick to a guest on this machine and measure"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with *arguments* (default: the process's); returns the exit code."""
    arguments = joined(sys.argv[1:] if arguments is None else arguments)
    options = _parser(arguments).parse_args(arguments)
    for number in ending_signals():
        signal.signal(number, interrupt)
    try:
        code: int = options.run(options)
    except KeyboardInterrupt:
        code = ExitCode.OK
    except Failure as failure:
        from ._messages import Messages

        Messages().failure(failure)
        code = failure.code
    return code


def joined(arguments: Sequence[str]) -> list[str]:
    """``--filter -1,...`` as ``--filter=-1,...``: argparse takes a value that begins with "-" for an option.

    What follows ``--`` belongs to another program and stays as it is.
    """
    result: list[str] = []
    for position, argument in enumerate(arguments):
        if argument == "--":
            return [*result, *arguments[position:]]
        if result and result[-1] == "--filter" and argument.startswith("-1"):
            result[-1] = f"--filter={argument}"
        else:
            result.append(argument)
    return result


def _parser(used: Container[str] = COMMANDS) -> argparse.ArgumentParser:
    """The parser of the command line, with the options of the commands in *used*."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="usbredir", description=DESCRIPTION, epilog=EPILOG, formatter_class=formatter)
    parser.add_argument("--version", action="version", version=f"usbredir {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        added = commands.add_parser(name, help=command.help, formatter_class=formatter)
        if name in used:
            importlib.import_module(f".{command.module}", __package__).add_arguments(added)
    return parser
