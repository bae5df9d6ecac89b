"""Fixtures for pytest: virtual devices, and the ways to reach them. Installed with usbredir, as plugin ``usbredir``.

=================== ================================================================================================
fixture             gives
=================== ================================================================================================
``usb_device``      a device: ``LoopbackDevice``, or what the test asks for by parameter or marker
``usb_loopback``    a host with that device and a guest, joined in memory
``usbredir_server`` that device on a free TCP port
``pyusb_device``    that device as a ``usb.core.Device``
``qemu_guest``      a Linux guest in QEMU; the test is skipped where QEMU is missing
=================== ================================================================================================

Where a test fails that used one of them, its report has the packets that went both ways.
Everything else of usbredir is imported when a fixture is first used. Source: docs/test-a-driver.md.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

if TYPE_CHECKING:
    from .device import UsbDevice
    from .guest import Guest
    from .host import Host
    from .testing import PacketLog, Server
    from .testing.qemu import QemuGuest

__all__ = ["Loopback", "pyusb_device", "qemu_guest", "usb_device", "usb_loopback", "usbredir_server"]

MARKER = "usb_device(device, *args, **options): what the fixture usb_device gives: a device, or what makes one"
WAIT = 5.0
"""Seconds until the device must have been announced."""

_LOGS = pytest.StashKey["dict[str, PacketLog]"]()
"""The packet logs of a test, by fixture."""


class Loopback(NamedTuple):
    """What ``usb_loopback`` gives: both ends of a connection in memory, and the device."""

    host: Host
    guest: Guest
    device: UsbDevice


def pytest_configure(config: pytest.Config) -> None:
    """Make the marker known."""
    config.addinivalue_line("markers", MARKER)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add the packets to the report of a failure."""
    report = yield
    if _LOGS in item.stash:
        if report.failed:
            report.sections += [(f"packets of {name}", str(log)) for name, log in item.stash[_LOGS].items()]
        if call.when == "teardown":
            del item.stash[_LOGS]  # items live as long as the run
    return report


def _packet_log(request: pytest.FixtureRequest) -> PacketLog:
    """A log whose packets a failure of the test shows."""
    from .testing import PacketLog

    log = PacketLog()
    request.node.stash.setdefault(_LOGS, {})[request.fixturename] = log
    return log


@pytest.fixture
def usb_device(request: pytest.FixtureRequest) -> Iterator[UsbDevice]:
    """A device: by default a :class:`~usbredir.virtual.LoopbackDevice`.

    Others by ``@pytest.mark.usb_device(MyDevice, arg=...)`` or, before that, a parameter,
    ``@pytest.mark.parametrize("usb_device", [MyDevice], indirect=True)``. A class or function is called, and the
    device closed after the test; a device is given as it is, and stays open. Without options it has to be
    ``usb_device(device=MyDevice)``: a mark that is called with nothing but a class or function decorates that.
    """
    from .virtual import LoopbackDevice

    marker = request.node.get_closest_marker("usb_device")
    arguments, options = ([LoopbackDevice], {}) if marker is None else (list(marker.args), dict(marker.kwargs))
    if hasattr(request, "param"):
        arguments, options = [request.param], {}
    if not arguments and "device" not in options:
        raise pytest.UsageError(f"the marker needs a device: {MARKER}")
    make = arguments.pop(0) if arguments else options.pop("device")
    if callable(make):
        device = make(*arguments, **options)
        yield device
        device.close()
    else:
        yield make


@pytest.fixture
def usb_loopback(request: pytest.FixtureRequest, usb_device: UsbDevice) -> Iterator[Loopback]:
    """A host with ``usb_device`` and a guest, joined in memory; the device is announced.

    It unpacks into host, guest and device, and has them as attributes.
    """
    from .testing import linked_pair

    host, guest = linked_pair(usb_device, log=_packet_log(request))
    guest.wait_for_device(WAIT)
    yield Loopback(host, guest, usb_device)
    guest.close()
    host.close()


@pytest.fixture
def usbredir_server(request: pytest.FixtureRequest, usb_device: UsbDevice) -> Iterator[Server]:
    """``usb_device`` on a free TCP port, ``usbredir_server.address``; guests may come one after the other.

    An exception of the device's hooks is an error of the test.
    """
    from .testing import Server

    server = Server(usb_device, log=_packet_log(request))
    yield server
    server.close()


@pytest.fixture
def pyusb_device(usbredir_server: Server) -> Iterator[Any]:
    """``usb_device`` as a ``usb.core.Device``, through ``usbredir_server``."""
    import usb.core
    import usb.util

    from .pyusb_backend import get_backend

    with get_backend(usbredir_server.address) as backend:
        device = usb.core.find(backend=backend)
        if device is None:
            pytest.fail(f"{usbredir_server.device!r} was not announced")
        yield device
        usb.util.dispose_resources(device)


class _Qemu:
    """The guest of a run, booted when first asked for."""

    def __init__(self) -> None:
        self._guest: QemuGuest | None = None

    def guest(self) -> QemuGuest:
        from .testing.qemu import QemuGuest

        if self._guest is None:
            self._guest = QemuGuest()
        return self._guest

    def close(self) -> None:
        guest, self._guest = self._guest, None
        if guest is not None:
            guest.close()


@pytest.fixture(scope="session")
def _qemu() -> Iterator[_Qemu]:
    from .testing.qemu import missing_tools

    missing = missing_tools()
    if missing:
        pytest.skip(f"no Linux guest: {', '.join(missing)} missing")
    qemu = _Qemu()
    yield qemu
    qemu.close()


@pytest.fixture
def qemu_guest(_qemu: _Qemu, request: pytest.FixtureRequest) -> Iterator[QemuGuest]:
    """A Linux guest in QEMU with nothing plugged in: ``qemu_guest.plug(device)``.

    It boots once a run (with pytest-xdist: once a worker), and anew after a test that left it unusable. What a test
    has plugged in is unplugged after it.
    """
    from .testing.qemu import GuestError

    guest = _qemu.guest()
    guest.log = _packet_log(request)
    yield guest
    guest.log = None
    try:
        guest.unplug_all()
    except GuestError:
        _qemu.close()
        raise
