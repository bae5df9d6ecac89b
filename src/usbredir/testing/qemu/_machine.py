"""A running guest: commands, files, devices that come and go, and what it all looks like when something fails."""

from __future__ import annotations

import contextlib
import shlex
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple

from ..._qmp import Qmp, QmpError, socket_address
from ...device import UsbDevice
from ...errors import DeviceLostError
from ...transport import Connection, listen, parse_address, serve
from .._packet_log import PacketLog
from ._agent import Agent, CommandResult
from ._guest_error import GuestError
from ._image import QEMU, SEARCH_PATH, GuestImage, build_guest

__all__ = ["Controller", "Plugged", "QemuGuest", "Running"]

Controller = Literal["xhci", "ehci"]
"""Kind of USB host controller. xHCI takes devices of all speeds; EHCI, with its companions, all but super speed."""

PROCESSOR = "Nehalem,rdrand=on"
"""It lacks the string instructions that are slow in emulation. Random numbers, which it also lacks, are worth having:
without them the kernel spends a second on gathering its own."""
KERNEL_ARGUMENTS = (
    "console=ttyS0 quiet panic=-1 printk.devkmsg=on random.trust_cpu=on "
    "mitigations=off nowatchdog no_timer_check tsc=reliable"
)
CONTROLLERS = (
    "qemu-xhci,id=xhci,addr=4,p2=8,p3=8",
    "ich9-usb-ehci1,id=ehci,addr=5.7,multifunction=on",
    "ich9-usb-uhci1,masterbus=ehci.0,firstport=0,addr=5.0,multifunction=on",
    "ich9-usb-uhci2,masterbus=ehci.0,firstport=2,addr=5.1",
    "ich9-usb-uhci3,masterbus=ehci.0,firstport=4,addr=5.2",
)
PORTS: dict[Controller, range] = {"xhci": range(1, 9), "ehci": range(1, 7)}

ANSWER_LIMIT = 60.0
"""Seconds for what QEMU does at once, on a busy machine."""
STOP_LIMIT = 10.0
"""Seconds for a command to end that was stopped."""
TRY_LIMIT = 10.0
"""Seconds that every try of something that is waited for may take, also the last one."""
POLL_INTERVAL = 0.05
"""Seconds between two looks for something that is waited for."""
CONSOLE_LINES = 60
"""Lines of the console that an error shows."""
QEMU_LINES = 20
"""Lines of QEMU's messages that an error shows."""
SHOWN = 2000
"""Characters of a command and of its outputs that an error shows."""


def _port_folders(controller: Controller, port: int) -> tuple[str, ...]:
    """Patterns of the guest's /sys where a device at a port appears."""
    slots = "/sys/bus/pci/devices/0000:00"
    if controller == "xhci":
        return (f"{slots}:04.0/usb*/*-{port}",)
    companion, at = divmod(port - 1, 2)  # where low and full speed devices go
    return f"{slots}:05.7/usb*/*-{port}", f"{slots}:05.{companion}/usb*/*-{at + 1}"


class _Export(threading.Thread):
    """Serves one device on one connection, until the other side closes it or the device is lost."""

    def __init__(self, device: UsbDevice, log: PacketLog | None) -> None:
        super().__init__(name=f"export of {type(device).__name__}", daemon=True)
        self._device = device
        self._log = log
        self._socket, self.far_end = socket.socketpair()
        self.error: Exception | None = None

    def run(self) -> None:
        """Serve; what goes wrong is kept."""
        with Connection(self._socket, "the guest") as connection:
            if self._log is not None:
                self._log.attach(connection)
            try:
                serve(connection, self._device, stop=lambda: self._device.lost)
            except (ConnectionError, DeviceLostError):
                pass  # QEMU has left in the middle of something, or the device
            except Exception as error:
                self.error = error

    def stop(self) -> None:
        """Close the connection and wait for the end."""
        with contextlib.suppress(OSError):  # closed already
            self._socket.shutdown(socket.SHUT_RDWR)
        self.join(STOP_LIMIT)
        self.far_end.close()
        if self.is_alive():
            self.error = GuestError(f"{self._device!r} does not end: a hook, or handle_events, blocks")


class Plugged:
    """A device in a port of the guest.

    Attributes:
        id: QEMU's name of it.
        controller: where it is plugged in.
        port: the port's number, from 1.
        address: where QEMU listens for its exporter, or connects to; "" for a device of this process.
        path: the device's folder in the guest's /sys, once it has been seen there; before, "".
    """

    def __init__(self, id: str, controller: Controller, port: int, address: str, export: _Export | None) -> None:
        self.id = id
        self.controller = controller
        self.port = port
        self.address = address
        self.path = ""
        self._export = export

    @property
    def error(self) -> Exception | None:
        """What the export of a device of this process failed with, such as an exception from a hook; else None."""
        return None if self._export is None else self._export.error

    @property
    def exported(self) -> bool:
        """Whether it is there for the guest, as far as this process knows: not if its device was lost or failed."""
        return self._export is None or self._export.is_alive()


class _Backend(NamedTuple):
    """How QEMU reaches a device: a socket character device."""

    options: Mapping[str, object]
    address: str = ""
    descriptor: int | None = None
    export: _Export | None = None


class Running:
    """A command that was started in the guest. Threads: as :class:`QemuGuest`."""

    def __init__(self, guest: QemuGuest, number: int, command: str) -> None:
        self._guest = guest
        self._number = number
        self._command = command

    def result(self, timeout: float = 60.0) -> CommandResult:
        """Wait until it has ended, and return how. Once.

        After *timeout* seconds it is stopped, with what it started. Raises GuestError then.
        """
        return self._guest._result(self._number, self._command, timeout)

    def output(self, timeout: float = 60.0) -> str:
        """Its output, as :meth:`QemuGuest.run` returns it. Raises GuestError as that does."""
        return self._guest._checked(self._command, self.result(timeout))

    def stop(self) -> CommandResult:
        """End it, with what it started, and return how far it came. Raises GuestError if it does not end."""
        return self._guest._stop(self._number, self._command)


class QemuGuest:
    """A Linux guest, from power on to :meth:`close`; a context manager.

    Each call that waits has a limit in seconds, and raises :exc:`GuestError`, which shows the console and QEMU's
    messages, when it has passed or when QEMU has ended. Threads: one at a time; devices are served by threads of their
    own.

    Attributes:
        log: where the packets of devices go that :meth:`plug` plugs in from now on; None: nowhere.
    """

    def __init__(
        self,
        image: GuestImage | None = None,
        *,
        folder: Path | None = None,
        memory: int = 256,
        options: Sequence[str] = (),
        boot_timeout: float = 180.0,
    ) -> None:
        """Start QEMU and wait until the guest takes commands.

        Args:
            image: what to boot; None: what :func:`build_guest` gives.
            folder: where to put the console's log and QEMU's messages; None: a folder that is removed at the end.
            memory: the guest's, in MiB.
            options: more of QEMU's.
            boot_timeout: seconds that the boot may take.

        Raises:
            BuildError: there is no image.
            GuestError: QEMU did not start, or the guest did not boot.

        """
        self.log: PacketLog | None = None
        self._plugged: dict[str, Plugged] = {}
        self._count = 0
        self._ending = contextlib.ExitStack()  # what close() has to do, the last first
        try:
            image = build_guest() if image is None else image
            folder = self._own_folder() if folder is None else folder
            self._console, self._messages = folder / "console.log", folder / "qemu.log"
            self._power_on(image, memory, options, boot_timeout)
        except BaseException:
            self.close()
            raise

    def _own_folder(self) -> Path:
        folder = Path(tempfile.mkdtemp(prefix="usbredir-qemu-"))
        self._ending.callback(shutil.rmtree, folder, ignore_errors=True)
        return folder

    def _power_on(self, image: GuestImage, memory: int, options: Sequence[str], boot_timeout: float) -> None:
        agent, far_agent = socket.socketpair()
        monitor, far_monitor = socket.socketpair()
        self._agent, self._qmp = Agent(agent), Qmp(monitor)
        self._ending.callback(self._agent.close)
        self._ending.callback(self._qmp.close)
        self._ending.callback(self._stop_exports)
        with far_agent, far_monitor:
            self._process = self._start(image, memory, options, far_agent.fileno(), far_monitor.fileno())
        self._ending.callback(self._process.wait)
        self._ending.callback(self._process.kill)
        with self._explained("the guest to boot"):
            self._qmp.greet(boot_timeout)
        self.run("true", timeout=boot_timeout)

    def _start(
        self, image: GuestImage, memory: int, options: Sequence[str], agent: int, monitor: int
    ) -> subprocess.Popen[bytes]:
        command = [
            *(QEMU, "-accel", "tcg", "-machine", "pc", "-cpu", PROCESSOR, "-smp", "1", "-m", str(memory)),
            *("-nodefaults", "-display", "none", "-no-reboot", "-serial", f"file:{self._console}"),
            *("-kernel", str(image.kernel), "-initrd", str(image.initramfs), "-append", KERNEL_ARGUMENTS),
            *("-chardev", f"socket,id=monitor,fd={monitor}", "-mon", "chardev=monitor,mode=control"),
            *("-device", "virtio-serial-pci", "-chardev", f"socket,id=agent,fd={agent}"),
            *("-device", "virtserialport,chardev=agent,name=agent"),
            *(word for controller in CONTROLLERS for word in ("-device", controller)),
            *options,
        ]
        command[0] = shutil.which(QEMU, path=SEARCH_PATH) or QEMU
        with open(self._messages, "wb") as messages:
            try:
                return subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=messages, stderr=messages, pass_fds=(agent, monitor)
                )
            except OSError as error:
                raise GuestError(f"{QEMU} cannot be started: {error.strerror or error}") from error

    def __enter__(self) -> QemuGuest:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None, /
    ) -> None:
        self.close()

    def close(self) -> None:
        """End QEMU, and the exports. Idempotent."""
        self._ending.close()

    def _stop_exports(self) -> None:
        for plugged in self._plugged.values():
            if plugged._export is not None:
                plugged._export.stop()

    # ------------------------------------------------------------ commands

    def run(self, command: str, *, data: bytes = b"", timeout: float = 60.0) -> str:
        """Run a shell command with *data* as its input, and return its output, without white space at the end.

        Raises GuestError when it fails (exit code not 0) or takes longer; it is stopped then, with what it started.
        """
        return self.start(command, data=data).output(timeout)

    def execute(self, command: str, *, data: bytes = b"", timeout: float = 60.0) -> CommandResult:
        """Run a shell command, and return exit code, output and error output as they are."""
        return self.start(command, data=data).result(timeout)

    def start(self, command: str, *, data: bytes = b"") -> Running:
        """Start a shell command, and go on while it runs. Any number of them may run."""
        with self._explained(f"the guest to take {_shown(command)}"):
            return Running(self, self._agent.start(command, data, ANSWER_LIMIT), command)

    def wait_for(self, command: str, timeout: float = 60.0) -> str:
        """Run a shell command again and again until it succeeds, and return its output then."""
        end = time.monotonic() + timeout
        while True:
            result = self.execute(command, timeout=max(TRY_LIMIT, end - time.monotonic()))
            if result.code == 0 or time.monotonic() >= end:
                return self._checked(command, result)
            time.sleep(POLL_INTERVAL)

    def read_file(self, path: str, timeout: float = 60.0) -> bytes:
        """The contents of one of the guest's files. Raises GuestError if it cannot be read."""
        result = self.execute(f"cat {shlex.quote(path)}", timeout=timeout)
        self._checked(f"cat {path}", result)
        return result.output

    def write_file(self, path: str, data: bytes, timeout: float = 60.0) -> None:
        """Write one of the guest's files, or give a device *data*."""
        self.run(f"cat > {shlex.quote(path)}", data=data, timeout=timeout)

    def _result(self, number: int, command: str, timeout: float) -> CommandResult:
        try:
            with self._explained(f"{_shown(command)}", timeouts=False):
                return self._agent.result(number, timeout)
        except TimeoutError:
            pass
        result = self._stop(number, command)
        raise self._error(f"{_shown(command)} took longer than {timeout:g} s and was stopped", _outputs(result))

    def _stop(self, number: int, command: str) -> CommandResult:
        with self._explained(f"{_shown(command)} to end, which was stopped"):
            self._agent.stop(number, STOP_LIMIT)
            try:
                return self._agent.result(number, STOP_LIMIT)
            except TimeoutError:
                self._agent.forget(number)  # it hangs in the kernel, and may end much later
                raise

    def _checked(self, command: str, result: CommandResult) -> str:
        if result.code:
            raise self._error(f"{_shown(command)} failed with exit code {result.code}", _outputs(result))
        return result.output.decode(errors="replace").rstrip()

    # ------------------------------------------------------------ devices

    def plug(
        self,
        device: UsbDevice,
        *,
        controller: Controller = "xhci",
        timeout: float | None = 60.0,
        properties: Mapping[str, object] | None = None,
    ) -> Plugged:
        """Plug a device of this process in: it is exported to QEMU by a thread, until :meth:`unplug`.

        The device stays the caller's: it is released then, not closed, and may be plugged in again.

        Args:
            device: any.
            controller: where to plug it in.
            timeout: seconds in which the guest has to configure it, see :meth:`wait_for_device`; None: do not wait.
            properties: of QEMU's usb-redir, such as ``{"debug": 4}``.

        """
        export = _Export(device, self.log)
        export.start()
        backend = _Backend({"server": False}, descriptor=export.far_end.fileno(), export=export)
        try:
            return self._plug(backend, controller, timeout, properties)
        finally:
            export.far_end.close()

    def plug_address(
        self,
        address: str,
        *,
        reconnect: bool = False,
        controller: Controller = "xhci",
        timeout: float | None = 60.0,
        properties: Mapping[str, object] | None = None,
    ) -> Plugged:
        """Plug a device in that an exporter offers at *address*: ``host:port`` or ``unix:/path``.

        With *reconnect* QEMU connects again, a second after the connection has ended. The others: as for :meth:`plug`.
        """
        options = {"server": False, "addr": socket_address(*parse_address(address))}
        if reconnect:
            options |= self._qmp.reconnecting(1)
        return self._plug(_Backend(options, address), controller, timeout, properties)

    def plug_listening(
        self,
        address: str = "127.0.0.1:0",
        *,
        controller: Controller = "xhci",
        properties: Mapping[str, object] | None = None,
    ) -> Plugged:
        """Let QEMU listen at ``host:port`` for an exporter that connects to it; ``Plugged.address`` has the real port.

        The device is there once an exporter has come: see :meth:`wait_for_device`.
        """
        if parse_address(address).port is None:
            raise ValueError(f"{address!r}: QEMU listens at HOST:PORT here")
        with listen(address) as listener:
            backend = _Backend({"server": True, "wait": False}, str(listener.address), listener.fileno())
            return self._plug(backend, controller, None, properties)

    def wait_for_device(self, plugged: Plugged, timeout: float = 60.0) -> None:
        """Wait until the guest's kernel has configured the device; its drivers may still be at work, see :meth:`node`.

        Raises GuestError if it does not, or if the device's export has ended.
        """
        folders = " ".join(_port_folders(plugged.controller, plugged.port))
        configured = '[ -n "$(cat $at/bConfigurationValue)" ] && cd -P $at && pwd && exit'
        look = f"for at in {folders}; do {configured}; done; false"
        end = time.monotonic() + timeout
        while True:
            result = self.execute(look, timeout=max(TRY_LIMIT, end - time.monotonic()))
            if result.code == 0:
                plugged.path = result.output.decode().strip()
                return
            if not plugged.exported:
                why = "the device was lost" if plugged.error is None else repr(plugged.error)
                raise self._error(f"the export of {plugged.id} has ended: {why}")
            if time.monotonic() >= end:
                raise self._error(f"the guest did not configure {plugged.id} within {timeout:g} s")
            time.sleep(POLL_INTERVAL)

    def node(self, plugged: Plugged, name: str, timeout: float = 60.0) -> str:
        """Wait for a device file of a device, and return its path below /dev.

        Args:
            plugged: what has been seen by :meth:`wait_for_device`.
            name: the kernel's name, with wildcards: ``sd?``, ``sr*``, ``ttyACM*``, ``event*``, ``pcmC*p``.
            timeout: seconds.

        """
        find = f"find {plugged.path or '/nowhere'} -name {shlex.quote(name)} -type d"
        command = f"for at in $({find}); do sed -n 's|^DEVNAME=|/dev/|p' $at/uevent; done | grep -m 1 ."
        return self.wait_for(command, timeout)

    def unplug(self, plugged: Plugged, timeout: float = 60.0) -> None:
        """Pull a device out, and wait until the guest has noticed.

        Raises GuestError if that fails, or if the device's export failed before. That the device was lost, as after
        its own ``unplug()``, is no failure.
        """
        self.qmp("device_del", id=plugged.id)
        with self._explained(f"{plugged.id} to be unplugged"):
            self._qmp.wait_event("DEVICE_DELETED", {"device": plugged.id}, timeout)
        del self._plugged[plugged.id]
        if plugged._export is not None:
            plugged._export.stop()
        if plugged.path:
            self.wait_for(f"[ ! -e {plugged.path} ]", timeout)
        if plugged.error is not None:
            raise self._error(f"the export of {plugged.id} failed: {plugged.error!r}") from plugged.error

    def unplug_all(self, timeout: float = 60.0) -> None:
        """Pull all devices out, as :meth:`unplug` does. Raises GuestError also when the guest answers no more."""
        with contextlib.ExitStack() as stack:  # one that fails does not keep the others in
            stack.callback(self.run, "true", timeout=timeout)
            for plugged in self._plugged.values():
                stack.callback(self.unplug, plugged, timeout)

    def qmp(self, command: str, **arguments: object) -> Any:
        """Run a command of QEMU's monitor and return its answer. Raises GuestError if QEMU refuses it."""
        with self._explained(f"QEMU to do {command}"):
            return self._qmp.execute(command, arguments, ANSWER_LIMIT)

    def _plug(
        self,
        backend: _Backend,
        controller: Controller,
        timeout: float | None,
        properties: Mapping[str, object] | None,
    ) -> Plugged:
        plugged = self._new_plugged(controller, backend)
        with contextlib.ExitStack() as undo:
            if backend.export is not None:
                undo.callback(backend.export.stop)
            chardev = self._add_chardev(f"{plugged.id}-chardev", backend)
            undo.callback(self.qmp, "chardev-remove", id=chardev)
            where = {"bus": f"{controller}.0", "port": str(plugged.port)}
            self.qmp("device_add", driver="usb-redir", id=plugged.id, chardev=chardev, **where, **(properties or {}))
            undo.pop_all()
        self._plugged[plugged.id] = plugged
        if timeout is not None:
            self.wait_for_device(plugged, timeout)
        return plugged

    def _add_chardev(self, name: str, backend: _Backend) -> str:
        options = dict(backend.options)
        if backend.descriptor is not None:
            with self._explained("QEMU to take a file descriptor"):
                self._qmp.execute("getfd", {"fdname": name}, ANSWER_LIMIT, descriptors=[backend.descriptor])
            options["addr"] = {"type": "fd", "data": {"str": name}}
        self.qmp("chardev-add", id=name, backend={"type": "socket", "data": options})
        return name

    def _new_plugged(self, controller: Controller, backend: _Backend) -> Plugged:
        used = {plugged.port for plugged in self._plugged.values() if plugged.controller == controller}
        port = next((port for port in PORTS[controller] if port not in used), None)
        if port is None:
            raise self._error(f"all {len(used)} ports of {controller} are in use")
        self._count += 1
        return Plugged(f"usb{self._count}", controller, port, backend.address, backend.export)

    # ------------------------------------------------------------ what is told of failures

    def console(self) -> str:
        """The text of the serial console up to now: messages of the guest's kernel."""
        with contextlib.suppress(FileNotFoundError):
            return self._console.read_text(errors="replace").replace("\r", "")
        return ""

    @contextlib.contextmanager
    def _explained(self, what: str, *, timeouts: bool = True) -> Iterator[None]:
        """Turn what channels raise into GuestError that has the circumstances."""
        try:
            yield
        except GuestError as error:
            raise self._error(error.reason) from None
        except QmpError as error:
            raise self._error(str(error)) from None
        except EOFError:
            raise self._error(f"QEMU ended {self._exit()} while waiting for {what}") from None
        except TimeoutError:
            if not timeouts:
                raise
            raise self._error(f"time limit passed while waiting for {what}") from None

    def _exit(self) -> str:
        try:
            return f"with exit code {self._process.wait(STOP_LIMIT)}"
        except subprocess.TimeoutExpired:
            return "its connection"

    def _error(self, reason: str, *more: str) -> GuestError:
        exports = [f"{one.id}: export failed with {one.error!r}" for one in self._plugged.values() if one.error]
        with contextlib.suppress(FileNotFoundError):
            messages = self._messages.read_text(errors="replace").splitlines()[-QEMU_LINES:]
        console = self.console().splitlines()[-CONSOLE_LINES:]
        parts = [*more, *exports, "--- QEMU ---", *messages, "--- console ---", *console]
        return GuestError(reason, "\n".join(part for part in parts if part))


def _shown(command: str) -> str:
    return repr(command if len(command) <= SHOWN else command[:SHOWN] + "...")


def _outputs(result: CommandResult) -> str:
    """The ends of what a command wrote."""
    both = (("output", result.output), ("error output", result.errors))
    return "\n".join(f"--- {name} ---\n{data[-SHOWN:].decode(errors='replace')}" for name, data in both if data)
