"""The ``usbredir`` command: arguments, messages and exit codes.

Exit codes (also in docs/cli.md): 0 ended as wanted; 1 the demonstration read something wrong, or an internal error;
2 wrong usage; 3 the device cannot be used; 4 the address cannot be had or nobody answers; 5 the guest refused the
device; 6 the device was lost; 7 the guest broke the protocol.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import signal
import sys
import time
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import NoReturn

from . import __version__
from .device import UsbDevice
from .errors import DeviceError, DeviceLostError, DeviceRejectedError, ProtocolError
from .parser import LogLevel, escape
from .proto import Speed

__all__ = ["ExitCode", "main"]

RETRY_SECONDS = (0.5, 10.0)
"""First and longest wait before connecting again; each wait doubles, by chance up to a quarter more."""


class ExitCode(IntEnum):
    """What the process tells its caller."""

    OK = 0
    FAILED = 1
    USAGE = 2
    DEVICE = 3
    ADDRESS = 4
    REJECTED = 5
    LOST = 6
    PROTOCOL = 7


class Failure(Exception):
    """Ends the command with a message and an exit code."""

    def __init__(self, code: ExitCode, message: str) -> None:
        super().__init__(message)
        self.code = code


DESCRIPTION = "Redirect USB devices over a network connection to virtual machines (QEMU, SPICE, KubeVirt)."
EPILOG = """\
examples:
  usbredir demo                                             see it work, no hardware needed
  usbredir export --virtual disk:stick.img --as 127.0.0.1:4000
  qemu-system-x86_64 ... -device qemu-xhci \\
      -chardev socket,id=c,host=127.0.0.1,port=4000 -device usb-redir,chardev=c
"""
EXPORT_EPILOG = """\
virtual devices:
  disk:FILE        a USB stick whose content is FILE (a disk image); add ,ro to protect it
  loopback         a vendor-specific device for tests

roles:
  --as ADDRESS     wait there for the virtual machine to connect
  --to ADDRESS     connect to the virtual machine, which waits there (in QEMU: server=on,wait=off)
  ADDRESS is HOST:PORT, [IPV6]:PORT or unix:/PATH. Anyone who can connect can use the device: prefer
  127.0.0.1, a Unix socket or a tunnel.

exit codes: 0 ended as wanted, 2 usage, 3 device unusable, 4 address unusable; with --once also 5 refused by
  the guest, 6 device lost, 7 protocol broken by the guest
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with *arguments* (default: the process's); returns the exit code."""
    options = _parser().parse_args(arguments)
    signal.signal(signal.SIGINT, _interrupt)
    signal.signal(signal.SIGTERM, _interrupt)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, _interrupt)
    try:
        code: int = options.run(options)
    except KeyboardInterrupt:
        code = ExitCode.OK
    except Failure as failure:
        _say(f"error: {failure}")
        code = failure.code
    return code


def _interrupt(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _say(message: str) -> None:
    with contextlib.suppress(OSError):  # nobody reads it any more: no reason to stop serving
        print(f"usbredir: {message}", file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="usbredir", description=DESCRIPTION, epilog=EPILOG, formatter_class=formatter)
    parser.add_argument("--version", action="version", version=f"usbredir {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_export(commands, formatter)
    listing = commands.add_parser("list", help="show the devices that can be exported")
    listing.set_defaults(run=_list)
    demo = commands.add_parser("demo", help="export a virtual USB stick to a guest on this machine and measure")
    demo.set_defaults(run=_demo)
    return parser


def _add_export(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], formatter: type[argparse.HelpFormatter]
) -> None:
    export = commands.add_parser(
        "export",
        help="let a virtual machine use a device",
        description="Let a virtual machine use a device.",
        epilog=EXPORT_EPILOG,
        formatter_class=formatter,
    )
    device = export.add_mutually_exclusive_group(required=True)
    device.add_argument("--virtual", metavar="KIND[:ARG]", help="a device made by software, see below")
    device.add_argument("--device", metavar="VID:PID|BUS-DEV", help="a real device (not in this version)")
    address = export.add_mutually_exclusive_group(required=True)
    address.add_argument("--as", dest="listen", metavar="ADDRESS", help="wait for the virtual machine there")
    address.add_argument("--to", dest="connect", metavar="ADDRESS", help="connect to the virtual machine there")
    export.add_argument("--once", action="store_true", help="end when the first guest has left")
    export.add_argument("--speed", choices=["full", "high", "super"], default="high", help="speed of a virtual device")
    export.add_argument("-k", "--keepalive", action="store_true", help="TCP keep-alive on the connection")
    export.add_argument(
        "-v",
        "--verbose",
        type=int,
        default=LogLevel.WARNING,
        metavar="LEVEL",
        help="messages: 0 none to 5 all, default 2",
    )
    export.set_defaults(run=_export)


# ---------------------------------------------------------------- export


def _export(options: argparse.Namespace) -> int:
    device = _open_device(options)
    try:
        return _listen_and_serve(options, device) if options.listen else _connect_and_serve(options, device)
    finally:
        device.close()


def _open_device(options: argparse.Namespace) -> UsbDevice:
    from .virtual import LoopbackDevice, MassStorage

    if options.device is not None:
        raise Failure(ExitCode.DEVICE, "real devices cannot be exported by this version: use --virtual, or usbredirect")
    kind, _, argument = options.virtual.partition(":")
    speed = {"full": Speed.FULL, "high": Speed.HIGH, "super": Speed.SUPER}[options.speed]
    if kind == "loopback" and not argument:
        return LoopbackDevice(speed=speed)
    if kind != "disk" or not argument:
        raise Failure(ExitCode.USAGE, f"--virtual {options.virtual}: use disk:FILE, disk:FILE,ro or loopback")
    path, comma, flag = argument.rpartition(",")
    read_only = bool(comma) and flag == "ro"
    path = path if read_only else argument
    try:
        return MassStorage(path, read_only=read_only, speed=speed)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise Failure(
            ExitCode.DEVICE,
            f"disk image {path}: {why}; make one with e.g. truncate -s 64M {path}, or check its permissions",
        ) from error


def _listen_and_serve(options: argparse.Namespace, device: UsbDevice) -> int:
    from .transport import listen

    try:
        listener = listen(options.listen)
    except ValueError as error:
        raise Failure(ExitCode.USAGE, f"--as {error}") from error
    except OSError as error:
        raise Failure(
            ExitCode.ADDRESS,
            f"cannot listen on {options.listen}: {error.strerror}; is another program there? choose another port, or 0",
        ) from error
    with listener:
        _say(f"listening on {listener.address}")
        while True:
            connection = listener.accept()
            if connection is None:
                continue
            _say(f"guest connected from {connection.name}")
            code = _serve_one(options, device, connection, listener)
            if options.once:
                return code


def _connect_and_serve(options: argparse.Namespace, device: UsbDevice) -> int:
    """Connect, serve, and connect again when the guest has left. The first failure to connect ends it."""
    from .transport import connect

    wait, longest = RETRY_SECONDS
    served = False
    while True:
        try:
            connection = connect(options.connect)
        except ValueError as error:
            raise Failure(ExitCode.USAGE, f"--to {error}") from error
        except OSError as error:
            if not served:
                why = f"cannot connect to {options.connect}: {error.strerror or error}"
                raise Failure(ExitCode.ADDRESS, f"{why}; is the virtual machine listening there?") from error
            time.sleep(wait * random.uniform(1.0, 1.25))
            wait = min(2 * wait, longest)
            continue
        _say(f"connected to {connection.name}")
        code = _serve_one(options, device, connection, None)
        if options.once:
            return code
        served, wait = True, RETRY_SECONDS[0]


def _serve_one(options: argparse.Namespace, device: UsbDevice, connection: object, listener: object) -> int:
    """Serve one guest and tell how it ended."""
    from .transport import Connection, Listener, serve

    assert isinstance(connection, Connection)
    assert listener is None or isinstance(listener, Listener)
    with connection:
        try:
            if options.keepalive:
                connection.keep_alive()
            serve(connection, device, log=_logger(options.verbose), listener=listener)
        except DeviceRejectedError as error:
            return _report(ExitCode.REJECTED, error)
        except DeviceLostError as error:
            return _report(ExitCode.LOST, error)
        except DeviceError as error:
            return _report(ExitCode.DEVICE, error)
        except ProtocolError as error:
            return _report(ExitCode.PROTOCOL, error)
        except OSError as error:
            _say(f"connection lost: {error.strerror or error}")
            return ExitCode.OK
    _say("guest left")
    return ExitCode.OK


def _report(code: ExitCode, error: Exception) -> ExitCode:
    _say(escape(str(error)))
    return code


def _logger(verbosity: int) -> Callable[[LogLevel, str], None]:
    def log(level: LogLevel, message: str) -> None:
        if level <= verbosity:
            _say(f"{level.name.lower()}: {message}")

    return log


# ---------------------------------------------------------------- list, demo


def _list(options: argparse.Namespace) -> int:
    """Real devices that pyusb sees, then the virtual kinds."""
    from ._describe import SPEED_NAMES

    devices = _real_devices()
    print(f"{'bus-dev':8} {'ids':10} {'speed':24} class")
    for bus, address, vendor, product, speed, device_class in devices:
        name = SPEED_NAMES.get(speed, "unknown") if speed is not None else "unknown"
        print(f"{f'{bus}-{address}':8} {vendor:04x}:{product:04x}  {name:24} {device_class}")
    if not devices:
        print("(no real devices)")
    print("\nvirtual: disk:FILE  loopback")
    return ExitCode.OK


def _real_devices() -> list[tuple[int, int, int, int, Speed | None, str]]:
    import libusb_package
    import usb.core

    from ._describe import CLASS_NAMES

    backend = libusb_package.get_libusb1_backend()
    if backend is None:
        raise Failure(ExitCode.DEVICE, "libusb cannot be loaded: reinstall the package libusb-package")
    speeds = {1: Speed.LOW, 2: Speed.FULL, 3: Speed.HIGH, 4: Speed.SUPER}
    return sorted(
        (
            d.bus,
            d.address,
            d.idVendor,
            d.idProduct,
            speeds.get(d.speed),
            CLASS_NAMES.get(d.bDeviceClass, "by interface"),
        )
        for d in usb.core.find(find_all=True, backend=backend)
    )


def _demo(options: argparse.Namespace) -> int:
    from . import demo

    return demo.run()
