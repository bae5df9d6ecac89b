"""``usbredir export``: its options, the exporters that they mean, and how they ended.

The options are those of usbredirect and usbredirserver as they are, and our own. Devices and addresses belong
together in the order in which they are written.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import signal
import socket
from typing import Any, NamedTuple

from . import filter as _filter
from ._ending import ExitCode, Failure, ending_signals, interrupt
from ._messages import Messages
from ._virtual_kinds import KINDS, virtual_device
from .errors import DeviceError, FilterSyntaxError, ProtocolError
from .exporter import Connecting, DeviceSource, Exporter, ExportSettings, FactorySource, Listening, run
from .parser import LogLevel
from .proto import Speed

__all__ = ["add_arguments", "export"]

SPEEDS = {"full": Speed.FULL, "high": Speed.HIGH, "super": Speed.SUPER}
MOST_SECONDS = 2_147_483
DEFAULT_PORT = 4000
"""usbredirserver's."""

DESCRIPTION = "Let virtual machines use devices. Takes the options of usbredirect and of usbredirserver as they are."
EPILOG = f"""\
real devices, as --device or, as with usbredirserver, without it:
  VID:PID          vendor and product, hexadecimal, as in 0781:5567
  BUS-DEV          bus number and device address, decimal, as in 1-4
  port:BUS-PORTS   whatever is plugged in there, as in port:1-1.4
  serial:TEXT      the device with this serial number

virtual devices:
{"".join(f"  {kind.form:<16} {kind.what}{chr(10)}" for kind in KINDS.values())}
roles:
  --as ADDRESS     wait there for the virtual machine to connect
  --to ADDRESS     connect to the virtual machine, which waits there (in QEMU: server=on,wait=off)
  ADDRESS is HOST:PORT, [IPV6]:PORT or unix:/PATH. Anyone who can connect can use the device: prefer
  127.0.0.1, a Unix socket or a tunnel.
  Several devices: repeat --device (or --virtual) and --as (or --to); the first belongs to the first, and so on.

exit codes: 0 ended as wanted, 2 usage, 3 device unusable, 4 address unusable, 8 no such device, 9 device in use,
  10 permission denied, 11 device without configuration, 12 nobody answers, 13 not allowed by --filter;
  with --once also 5 refused by the guest, 6 device lost, 7 protocol broken by the guest
"""

DEVICE_CODES = {
    "missing": ExitCode.MISSING,
    "busy": ExitCode.BUSY,
    "forbidden": ExitCode.FORBIDDEN,
    "unconfigured": ExitCode.UNCONFIGURED,
    "filtered": ExitCode.FILTERED,
    "lost": ExitCode.LOST,
    "final": ExitCode.LOST,
    "rejected": ExitCode.REJECTED,
}
"""Exit codes for reasons of DeviceError; others are DEVICE."""


class Wanted(NamedTuple):
    """A device or an address that was asked for: the option and its value."""

    option: str
    value: str


class _Append(argparse.Action):
    """Collects values of several options in the order in which they come."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, [*(getattr(namespace, self.dest) or ()), Wanted(option_string or "", values)])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.description, parser.epilog, parser.allow_abbrev = DESCRIPTION, EPILOG, False
    add = parser.add_argument
    add(
        "--device",
        dest="devices",
        action=_Append,
        metavar="DEVICE",
        help="a real device: VID:PID or BUS-DEV, see below",
    )
    add("--virtual", dest="devices", action=_Append, metavar="KIND[:ARG]", help="a device made by software, see below")
    add(
        "--fd", dest="devices", action=_Append, metavar="N", help="a device whose file is open already, as descriptor N"
    )
    add("--as", dest="addresses", action=_Append, metavar="ADDRESS", help="wait for the virtual machine there")
    add("--to", dest="addresses", action=_Append, metavar="ADDRESS", help="connect to the virtual machine there")
    add("--wait", action="store_true", help="wait for a device that is not there yet, and for a guest to connect to")
    add("--once", action="store_true", help="end when the first guest has left")
    add("--filter", metavar="RULES", help="what may be exported: CLASS,VENDOR,PRODUCT,VERSION,ALLOW|..., -1 for any")
    add("--speed", choices=list(SPEEDS), default="high", help="speed of virtual devices")
    add("--peer-timeout", type=_seconds, metavar="SECONDS", help="give up a guest that confirms nothing for so long")
    add("--log-format", choices=["text", "json"], default="text", help="how messages are written")
    add(
        "-v",
        "--verbose",
        type=int,
        default=LogLevel.WARNING,
        metavar="LEVEL",
        help="messages: 0 none to 5 all, default 2",
    )
    add(
        "-k",
        "--keepalive",
        type=int,
        nargs="?",
        const=0,
        metavar="SECONDS",
        help="accepted: TCP keep-alive is always on",
    )
    add("-p", "--port", type=int, metavar="PORT", help="with DEVICE alone: wait on this port, default 4000")
    add("-4", "--ipv4", metavar="ADDRESS", help="with DEVICE alone: wait at this address")
    add("-6", "--ipv6", metavar="ADDRESS", help="with DEVICE alone: wait at this address")
    add("positional", nargs="?", metavar="DEVICE", help="a real device, as usbredirserver takes it")
    parser.set_defaults(run=export, devices=[], addresses=[])


def _seconds(text: str) -> float:
    """A time that the system's timers can hold: milliseconds in 31 bits."""
    value = float(text)
    if not 0 < value <= MOST_SECONDS:
        raise ValueError
    return value


def export(options: argparse.Namespace) -> int:
    """Run the command. Raises Failure."""
    messages = Messages(options.verbose, as_json=options.log_format == "json")
    with messages.installed():
        try:
            return _export(options, messages)
        except Failure as failure:
            messages.failure(failure)
            return failure.code


def _export(options: argparse.Namespace, messages: Messages) -> int:
    if options.verbose >= LogLevel.DEBUG_DATA:
        os.environ.setdefault("LIBUSB_DEBUG", "3")  # libusb writes its own log then
    settings = _settings(options)
    exporters: list[Exporter] = []
    with _StopSignal() as stop, contextlib.ExitStack() as cleanup:
        pairs = _pair(options)
        for device, address in pairs:
            label = device.value if len(pairs) > 1 else ""
            exporter = Exporter(_source(device, options), _peer(address), messages.reporter(label), settings)
            cleanup.callback(exporter.close)
            exporters.append(exporter)
            _start(exporter)
        run(exporters, stop_fd=stop.fileno())
    return max((_code_at_end(exporter) for exporter in exporters), default=ExitCode.OK)


# ---------------------------------------------------------------- options


def _settings(options: argparse.Namespace) -> ExportSettings:
    rules = None
    if options.filter is not None:
        try:
            rules = _filter.parse(options.filter)
        except FilterSyntaxError as error:
            raise Failure(ExitCode.USAGE, f"--filter: {error}") from error
    return ExportSettings(once=options.once, wait=options.wait, rules=rules, unanswered=options.peer_timeout)


def _pair(options: argparse.Namespace) -> list[tuple[Wanted, Wanted]]:
    """Devices with their addresses."""
    devices, addresses = list(options.devices), list(options.addresses)
    if options.positional is not None:
        if devices or addresses:
            raise Failure(ExitCode.USAGE, f"{options.positional}: write --device before it")
        devices = [Wanted("--device", options.positional)]
        addresses = [Wanted("--as", _server_address(options))]
    if not devices:
        raise Failure(ExitCode.USAGE, "no device: use --device, --virtual or --fd ('usbredir list' shows devices)")
    if len(devices) == 1 and {wanted.option for wanted in addresses} == {"--as", "--to"} and len(addresses) == 2:
        addresses = [wanted for wanted in addresses if wanted.option == "--to"]  # it wins, as in usbredirect
    if len(devices) != len(addresses):
        raise Failure(
            ExitCode.USAGE,
            f"{len(devices)} device(s) and {len(addresses)} address(es): every device needs one --as or --to",
        )
    return list(zip(devices, addresses, strict=True))


def _server_address(options: argparse.Namespace) -> str:
    """Where usbredirserver would listen."""
    port = DEFAULT_PORT if options.port is None else options.port
    if options.ipv4:
        return f"{options.ipv4}:{port}"
    if options.ipv6:
        return f"[{options.ipv6}]:{port}"
    return f"[::]:{port}" if socket.has_dualstack_ipv6() else f"0.0.0.0:{port}"


def _source(wanted: Wanted, options: argparse.Namespace) -> DeviceSource:
    if wanted.option == "--virtual":
        try:
            return FactorySource(virtual_device(wanted.value, SPEEDS[options.speed]))
        except ValueError as error:
            raise Failure(ExitCode.USAGE, f"--virtual {wanted.value}: {error}") from error
    from .backends._source import FdSource, PyusbSource, parse_spec

    try:
        return PyusbSource(parse_spec(wanted.value)) if wanted.option == "--device" else FdSource(int(wanted.value))
    except ValueError as error:
        raise Failure(ExitCode.USAGE, f"{wanted.option} {error}") from error


def _peer(wanted: Wanted) -> Listening | Connecting:
    try:
        return Listening(wanted.value) if wanted.option == "--as" else Connecting(wanted.value)
    except ValueError as error:
        raise Failure(ExitCode.USAGE, f"{wanted.option} {error}") from error
    except OSError as error:
        advice = "; is another program there? choose another port, or 0" if error.errno == errno.EADDRINUSE else ""
        why = f"cannot listen on {wanted.value}: {error.strerror or error}{advice}"
        raise Failure(ExitCode.ADDRESS, why) from error


# ---------------------------------------------------------------- running


def _start(exporter: Exporter) -> None:
    try:
        exporter.start()
    except DeviceError as error:
        raise Failure(DEVICE_CODES.get(error.reason, ExitCode.DEVICE), str(error)) from error


def _code_at_end(exporter: Exporter) -> ExitCode:
    error = exporter.error
    if error is None:
        return ExitCode.OK
    if isinstance(error, DeviceError):
        return DEVICE_CODES.get(error.reason, ExitCode.DEVICE)
    if isinstance(error, ProtocolError):
        return ExitCode.PROTOCOL
    return ExitCode.REFUSED  # told when it happened


class _StopSignal:
    """SIGINT, SIGTERM and SIGHUP end the loop at its next round, wherever they hit; a second one ends at once.

    An exception out of a signal handler could be raised, and lost, inside a callback of libusb.
    """

    def __enter__(self) -> _StopSignal:
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        self._came = False
        self._wakeup_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._handlers = {number: signal.signal(number, self._handle) for number in ending_signals()}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_fd)
        self._reader.close()
        self._writer.close()

    def fileno(self) -> int:
        """Readable when a signal came."""
        return self._reader.fileno()

    def _handle(self, number: int, frame: object) -> None:
        if self._came:
            interrupt(number, frame)
        self._came = True
