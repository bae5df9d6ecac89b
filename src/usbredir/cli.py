"""The ``usbredir`` command: its commands, and how it ends.

Exit codes are in ``_messages.ExitCode`` and explained in docs/cli.md.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from . import __version__, _attach, _export, _listing, _run
from ._messages import ExitCode, Failure, Messages

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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with *arguments* (default: the process's); returns the exit code."""
    options = _parser().parse_args(joined(sys.argv[1:] if arguments is None else arguments))
    for number in _export.ending_signals():
        signal.signal(number, _interrupt)
    try:
        code: int = options.run(options)
    except KeyboardInterrupt:
        code = ExitCode.OK
    except Failure as failure:
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


def _interrupt(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="usbredir", description=DESCRIPTION, epilog=EPILOG, formatter_class=formatter)
    parser.add_argument("--version", action="version", version=f"usbredir {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _export.add_arguments(commands, formatter)
    _attach.add_arguments(commands, formatter)
    _listing.add_arguments(commands)
    _run.add_arguments(commands, formatter)
    demo = commands.add_parser("demo", help="export a virtual USB stick to a guest on this machine and measure")
    demo.set_defaults(run=_demo)
    return parser


def _demo(options: argparse.Namespace) -> int:
    from . import demo

    return demo.run()
