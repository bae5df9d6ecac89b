"""``usbredir attach``: gives a running QEMU a device that is exported somewhere, and takes it away again.

Source: QEMU's QMP reference, qapi/char.json (chardev-add), qapi/qdev.json (device_add), qapi/qom.json.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from . import filter as _filter
from ._ending import ExitCode, Failure
from ._messages import Messages
from ._qmp import Qmp, QmpError, QmpRefusal, socket_address
from .errors import FilterSyntaxError
from .exporter import Event
from .parser import LogLevel, escape
from .transport import Address, parse_address

__all__ = ["add_arguments", "attach"]

DRIVER = "usb-redir"
PERIPHERAL = "/machine/peripheral"
"""Where QEMU keeps the devices that have a name."""
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]*")
"""QEMU's rule for names of devices."""
DISCONNECTED = "disconnected:"
"""What QEMU's description of a connection begins with while there is none."""

TIMEOUT = 10.0
"""Seconds that QEMU may take for a command, and the exporter to come with a device."""
MOST_SECONDS = 86_400
RECONNECT = 1
"""Seconds after which QEMU connects again."""
POLL_INTERVAL = 0.05
"""Seconds between two looks for something that is waited for: QEMU has no event for it."""

DESCRIPTION = "Give a running QEMU a device that is exported at ADDRESS, take it away, or list what it has."
EPILOG = """\
example:
  qemu-system-x86_64 ... -device qemu-xhci -qmp unix:/run/vm.qmp,server=on,wait=off

  usbredir export --virtual disk:stick.img --as 127.0.0.1:4000
  usbredir attach 127.0.0.1:4000 --qmp /run/vm.qmp --id stick
  usbredir attach --list --qmp /run/vm.qmp
  usbredir attach --detach stick --qmp /run/vm.qmp

ADDRESS is HOST:PORT, [IPV6]:PORT or unix:/PATH, as QEMU's machine reaches it.
MONITOR is the path of QEMU's -qmp socket, or an address as above. It serves one program at a time.

exit codes: 0 done, 2 usage, 3 QEMU refused, 7 MONITOR is no QMP monitor, 8 --detach: no such device,
  12 nobody answers at ADDRESS, or at MONITOR
"""

REMEDIES = {
    r"'usb-bus' bus found|Bus '.*' not found": "start the machine with -device qemu-xhci, or name its bus with --bus",
    r"already exists|Duplicate": "choose another --id, or --detach that one first",
    r"not a valid device model": "this QEMU is without USB redirection; some systems have that in another package",
    r"no free ports": "detach something, or give the machine another -device qemu-xhci",
    r"hotplug": "give it at the start, with -device usb-redir",
}
"""What QEMU says when it refuses, and what to do then."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.description, parser.epilog, parser.allow_abbrev = DESCRIPTION, EPILOG, False
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("address", nargs="?", metavar="ADDRESS", help="where the device is exported")
    what.add_argument("--detach", metavar="NAME", help="take a device away")
    what.add_argument("--list", action="store_true", help="show the devices that QEMU has from exporters")
    add = parser.add_argument
    add("--qmp", metavar="MONITOR", required=True, help="QEMU's monitor")
    add("--id", metavar="NAME", help="how to call the device; default: usbredir1, usbredir2, ...")
    add("--bus", metavar="BUS", help="where to plug it in, as in usb-bus.0; default: where there is room")
    add("--filter", metavar="RULES", help="what QEMU takes: CLASS,VENDOR,PRODUCT,VERSION,ALLOW|..., -1 for any")
    add("--reconnect", type=_whole_seconds, default=RECONNECT, metavar="SECONDS", help="QEMU's pause between tries")
    add("--debug", type=int, choices=range(6), metavar="LEVEL", help="QEMU's own messages on this device, 0 to 5")
    add("--wait", action="store_true", help="end at once: QEMU connects when the exporter is there")
    add("--timeout", type=_seconds, default=TIMEOUT, metavar="SECONDS", help="for QEMU and the exporter to answer")
    add("--log-format", choices=["text", "json"], default="text", help="how messages, and the list, are written")
    parser.set_defaults(run=attach)


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value <= MOST_SECONDS:
        raise ValueError
    return value


def _whole_seconds(text: str) -> int:
    value = int(text)
    if not 0 < value <= MOST_SECONDS:
        raise ValueError
    return value


def attach(options: argparse.Namespace) -> int:
    """Run the command; what goes wrong is told, and in the exit code that it returns."""
    as_json = options.log_format == "json"
    messages = Messages(as_json=as_json)
    try:
        wanted = None if options.address is None else _wanted(options)
        with _explained(options), _machine(options) as machine:
            if options.list:
                _show(machine.devices(), as_json=as_json)
            elif wanted is None:
                machine.detach(options.detach)
                messages.reporter(options.detach)(Event.LEFT, LogLevel.INFO, "detached")
            else:
                name = machine.attach(wanted)
                told = "QEMU connects when the exporter is there" if options.wait else "attached"
                messages.reporter(name)(Event.CONNECTED, LogLevel.INFO, f"{told}: {wanted.exporter}")
                print(name)
    except Failure as failure:
        messages.failure(failure)
        return failure.code
    return ExitCode.OK


# ---------------------------------------------------------------- options


class Wanted(NamedTuple):
    """A device to attach. *properties* are those of QEMU's usb-redir; *reconnect* is in seconds."""

    exporter: Address
    name: str | None
    properties: Mapping[str, object]
    reconnect: int
    wait: bool


def _wanted(options: argparse.Namespace) -> Wanted:
    if options.id is not None and not NAME.fullmatch(options.id):
        raise Failure(ExitCode.USAGE, f"--id {options.id}: a letter first, then letters, digits and -._")
    given = {"bus": options.bus, "filter": _qemu_filter(options.filter), "debug": options.debug}
    properties = {name: value for name, value in given.items() if value is not None}
    return Wanted(_address(options.address), options.id, properties, options.reconnect, options.wait)


def _address(text: str, option: str = "") -> Address:
    try:
        address = parse_address(text)
    except ValueError as error:
        raise Failure(ExitCode.USAGE, f"{option}{error}") from error
    # QEMU runs in a folder of its own.
    return address if address.port is not None else Address(os.path.abspath(address.host), None)


def _qemu_filter(rules: str | None) -> str | None:
    """The same rules with the separator that QEMU wants: a comma would end the option on its command line."""
    try:
        return None if rules is None else _filter.format(_filter.parse(rules), token_sep=":")
    except FilterSyntaxError as error:
        raise Failure(ExitCode.USAGE, f"--filter: {error}") from error


# ---------------------------------------------------------------- the monitor


@contextlib.contextmanager
def _explained(options: argparse.Namespace) -> Iterator[None]:
    """Make failures of what comes from the monitor."""
    monitor = options.qmp
    try:
        yield
    except QmpRefusal as error:
        remedies = (remedy for pattern, remedy in REMEDIES.items() if re.search(pattern, error.description))
        raise Failure(ExitCode.DEVICE, "; ".join([str(error), *itertools.islice(remedies, 1)])) from error
    except QmpError as error:
        raise Failure(ExitCode.PROTOCOL, f"--qmp {monitor}: {error}; is it QEMU's -qmp?") from error
    except TimeoutError as error:
        why = f"QEMU does not answer within {options.timeout:g} seconds; its monitor serves one program at a time"
        raise Failure(ExitCode.REFUSED, f"--qmp {monitor}: {why}: is another one, such as libvirt, there?") from error
    except EOFError as error:
        raise Failure(ExitCode.REFUSED, f"--qmp {monitor}: QEMU closed the connection; has it ended?") from error
    except KeyboardInterrupt as error:
        raise Failure(ExitCode.FAILED, "interrupted; 'usbredir attach --list' tells what QEMU has") from error


@contextlib.contextmanager
def _machine(options: argparse.Namespace) -> Iterator[_Machine]:
    """The machine behind the monitor."""
    text = options.qmp
    is_path = not text.startswith("unix:") and ("/" in text or ":" not in text)
    address = _address(f"unix:{text}" if is_path else text, "--qmp ")
    try:
        sock = _connected(address, options.timeout)
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or error
        advice = "is QEMU running, with -qmp unix:PATH,server=on,wait=off?"
        raise Failure(ExitCode.REFUSED, f"--qmp {text}: {why}; {advice}") from error
    with contextlib.closing(Qmp(sock)) as qmp:
        qmp.greet(options.timeout)
        yield _Machine(qmp, options.timeout)


def _connected(address: Address, timeout: float) -> socket.socket:
    if address.port is not None:
        return socket.create_connection((address.host, address.port), timeout)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(timeout)
        sock.connect(address.host)
    except BaseException:
        sock.close()
        raise
    return sock


class _Machine:
    """A running QEMU and its devices from exporters. Methods raise Failure, and what Qmp raises. Threads: one."""

    def __init__(self, qmp: Qmp, timeout: float) -> None:
        self._qmp = qmp
        self._timeout = timeout

    def attach(self, wanted: Wanted) -> str:
        """Plug a device in and return its name; if that fails nothing is left."""
        name = wanted.name or self._free_name()
        chardev = _chardev_for(name)
        backend = {"addr": socket_address(*wanted.exporter), "server": False} | self._qmp.reconnecting(wanted.reconnect)
        with contextlib.ExitStack() as undo:
            self._do("chardev-add", id=chardev, backend={"type": "socket", "data": backend})
            undo.callback(self._remove_chardev, chardev)
            if not wanted.wait:
                self._wait_for_exporter(chardev, wanted.exporter)
            self._do("device_add", driver=DRIVER, id=name, chardev=chardev, **wanted.properties)
            undo.callback(self._remove_device, name)
            if not wanted.wait:
                self._wait_for_device(name, wanted.exporter)
            undo.pop_all()
        return name

    def detach(self, name: str) -> None:
        """Pull a device out, and end its connection."""
        names = [found for found, kind in self._children() if kind == f"child<{DRIVER}>"]
        if name not in names:
            known = f"there are {', '.join(names)}" if names else "there is none"
            raise Failure(ExitCode.MISSING, f"--detach {name}: QEMU has no such device from an exporter; {known}")
        chardev = str(self._property(name, "chardev"))
        self._remove_device(name)
        self._remove_chardev(chardev)

    def devices(self) -> list[dict[str, str]]:
        """Name, state and exporter of each device."""
        connections = self._connections()
        return [
            self._described(name, connections.get(str(self._property(name, "chardev")), DISCONNECTED))
            for name, kind in self._children()
            if kind == f"child<{DRIVER}>"
        ]

    def _described(self, name: str, connection: str) -> dict[str, str]:
        attached = "attached" if self._property(name, "attached") is True else "connected"
        state = "disconnected" if connection.startswith(DISCONNECTED) else attached
        # Both ends while there is a connection: tcp:OURS <-> THEIRS
        exporter = connection.removeprefix(DISCONNECTED).removeprefix("tcp:").rpartition(" <-> ")[2]
        return {"id": name, "state": state, "exporter": exporter}

    def _wait_for_exporter(self, chardev: str, exporter: Address) -> None:
        if not self._comes_true(lambda: not self._connections().get(chardev, DISCONNECTED).startswith(DISCONNECTED)):
            why = f"nobody answered QEMU within {self._timeout:g} seconds; is a device exported there, and free?"
            raise Failure(ExitCode.REFUSED, f"{exporter}: {why} --wait lets QEMU go on trying")

    def _wait_for_device(self, name: str, exporter: Address) -> None:
        if self._comes_true(lambda: self._property(name, "attached") is True):
            return
        status = self._do("query-status")
        if isinstance(status, dict) and status.get("running") is False:
            raise Failure(ExitCode.DEVICE, f"{exporter}: the machine is paused and takes no device; continue it")
        why = f"connected, but no device came within {self._timeout:g} seconds; is it there, and do filters allow it?"
        raise Failure(ExitCode.DEVICE, f"{exporter}: {why} The exporter's messages tell")

    def _comes_true(self, condition: Callable[[], bool]) -> bool:
        end = time.monotonic() + self._timeout
        while not (true := condition()) and time.monotonic() < end:
            time.sleep(POLL_INTERVAL)
        return true

    def _free_name(self) -> str:
        used = {name for name, _ in self._children()} | self._connections().keys()
        names = (f"usbredir{number}" for number in itertools.count(1))
        return next(name for name in names if name not in used and _chardev_for(name) not in used)

    def _remove_device(self, name: str) -> None:
        self._do("device_del", id=name)
        self._qmp.wait_event("DEVICE_DELETED", {"device": name}, self._timeout)

    def _remove_chardev(self, name: str) -> None:
        """Remove a connection, unless it has gone with its device: that depends on QEMU's version."""
        if name in self._connections():
            self._do("chardev-remove", id=name)

    def _children(self) -> list[tuple[str, str]]:
        """Name and type of each device that has a name."""
        found = _objects(self._do("qom-list", path=PERIPHERAL))
        return [(str(one.get("name")), str(one.get("type"))) for one in found]

    def _connections(self) -> dict[str, str]:
        """What QEMU says of each character device."""
        return {str(one.get("label")): str(one.get("filename")) for one in _objects(self._do("query-chardev"))}

    def _property(self, name: str, key: str) -> Any:
        return self._do("qom-get", path=f"{PERIPHERAL}/{name}", property=key)

    def _do(self, command: str, **arguments: object) -> Any:
        return self._qmp.execute(command, arguments, self._timeout)


def _chardev_for(name: str) -> str:
    return f"{name}-chardev"


def _objects(answer: object) -> list[dict[str, Any]]:
    if isinstance(answer, list) and all(isinstance(one, dict) for one in answer):
        return answer
    raise QmpError(f"QEMU's monitor answered {str(answer)[:80]!r} in place of a list of objects")


def _show(devices: list[dict[str, str]], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(devices, indent=2))
        return
    for device in devices:
        print(*(escape(text) for text in device.values()), sep="  ")
    if not devices:
        print("(no devices from exporters)")
