"""Devices written for Facedancer 3, without Facedancer's hardware.

::

    from facedancer.devices.keyboard import USBKeyboardDevice

    keyboard = USBKeyboardDevice()
    device = FacedancerDevice(keyboard, keyboard.type_string("hello"))

Needs the package ``facedancer``: ``pip install usbredir[facedancer]``. To a Facedancer device this module is the
board: :class:`FacedancerDevice` calls the device's handlers, which answer through the methods of ``_Board``.
Source: facedancer 3.1, ``facedancer.backends.base`` and the backend of Hydradancer for when handlers are called.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import operator
import os
import selectors
import struct
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from types import ModuleType
from typing import Any

from ..descriptors import max_packet_size
from ..errors import DeviceError
from ..proto import Speed
from .base import VirtualDevice
from .control import NAK, STALL, Answer, Payload, Setup
from .description import Description

__all__ = ["FacedancerDevice", "load"]

_log = logging.getLogger("usbredir.facedancer")

GET_STATUS, CLEAR_FEATURE, SET_FEATURE, SET_CONFIGURATION, SET_INTERFACE = 0, 1, 3, 9, 11
ENDPOINT_HALT = 0
TO_DEVICE, TO_INTERFACE, TO_ENDPOINT = 0, 1, 2
HALTS = {GET_STATUS, CLEAR_FEATURE, SET_FEATURE}
"""Requests that are about halts when they go to endpoints; boards know halts, devices hardly do."""
POLL = 0.002
"""Seconds after which a device that had no data is asked again: most do not tell when they have some."""
END_LIMIT = 5.0
"""Seconds that coroutines may take to end."""
QUEUE_LIMIT = 64 << 20
"""Bytes of an endpoint that wait for the host."""
SPEEDS: Mapping[str, Speed] = {
    "LOW": Speed.LOW,
    "FULL": Speed.FULL,
    "HIGH": Speed.HIGH,
    "SUPER": Speed.SUPER,
}
"""Facedancer's names of speeds."""


class _Outgoing:
    """What a device has sent on one endpoint, packet by packet, as the bus makes transfers of it.

    A full packet goes on in the same transfer, a short one ends it.
    """

    def __init__(self, packet_size: int) -> None:
        self.packet_size = packet_size
        self._transfers: deque[bytearray] = deque()
        self._open = False  # the last one goes on
        self._size = 0

    def send(self, data: bytes) -> None:
        """Queue a packet, or several in one piece. What the host leaves here for too long is lost."""
        if self._size + len(data) > QUEUE_LIMIT:
            _log.warning("%d bytes wait for the host: a packet is dropped", self._size)
            return
        if not self._open:
            self._transfers.append(bytearray())
        self._transfers[-1] += data
        self._size += len(data)
        self._open = bool(data) and len(data) % self.packet_size == 0

    def take(self, length: int) -> bytes | None:
        """The next transfer, at most the packets that begin within *length* bytes; None: it is not complete."""
        if not self._transfers:
            return None
        first = self._transfers[0]
        goes_on = self._open and len(self._transfers) == 1
        if goes_on and len(first) < length:
            return None
        packets = -(-length // self.packet_size)
        data = bytes(first[: packets * self.packet_size])
        del first[: len(data)]
        self._size -= len(data)
        if not first:
            self._transfers.popleft()
            self._open = self._open and not goes_on
        return data

    def __bool__(self) -> bool:
        return bool(self._transfers)


class _Board:
    """What a Facedancer device sees of its board; the methods are those of ``FacedancerBackend``."""

    def __init__(self, device: FacedancerDevice) -> None:
        self._device = device
        self.changed: Callable[[], None] = lambda: None
        self.outgoing: dict[int, _Outgoing] = {}
        self.request: Any = None  # the control request that the host has made last
        self.reply: bytes | Answer | None = None  # to it, None: not yet

    def connect(self, usb_device: Any, max_packet_size_ep0: int = 64, device_speed: Any = None) -> None:
        """The device shall be there: it is."""

    def disconnect(self) -> None:
        """The device leaves the bus."""
        self._device.unplug()

    def reset(self) -> None:
        """The device has noticed a reset of the bus."""

    def configured(self, configuration: Any) -> None:
        """The device has got a configuration."""

    def set_address(self, address: int, defer: bool = False) -> None:
        """The device has got an address, which means nothing here."""

    def send_on_control_endpoint(
        self, endpoint_number: int, in_request: Any, data: bytes, blocking: bool = True
    ) -> None:
        """The data stage of a control request, unless the host has given it up."""
        if in_request is self.request:
            self.send_on_endpoint(0, data, blocking)

    def send_on_endpoint(self, endpoint_number: int, data: bytes, blocking: bool = True) -> None:
        """A packet. It waits for the host, the device never does."""
        if endpoint_number == 0:
            self.reply = bytes(data)
        elif endpoint_number in self.outgoing:
            self.outgoing[endpoint_number].send(bytes(data))
        self.changed()

    def read_from_endpoint(self, endpoint_number: int) -> bytes:
        """Data are given to handlers; there are none to fetch."""
        return b""

    def ack_status_stage(self, direction: Any = 0, endpoint_number: int = 0, blocking: bool = False) -> None:
        """The control request is done."""
        if self.reply is None:
            self.send_on_endpoint(0, b"")

    def stall_endpoint(self, endpoint_number: int, direction: Any = 0) -> None:
        """Refuse the control request, or halt an endpoint."""
        if endpoint_number == 0:
            self.reply = STALL
        else:
            self._device.halt(endpoint_number | int(direction) << 7)
        self.changed()

    def clear_halt(self, endpoint_number: int, direction: Any) -> None:
        """Of an alternate setting that was selected; that has been done."""

    def service_irqs(self) -> None:
        """For devices that run themselves: handlers are called without."""

    def validate_configuration(self, configuration: Any) -> None:
        """Every configuration will do."""


class FacedancerDevice(VirtualDevice):
    """A device whose handlers are those of a Facedancer device.

    Its speed is the Facedancer device's ``device_speed``, full speed when that is None. Handlers run as hooks do, one
    at a time, and steps of the coroutines between them, in a thread of their own: neither must wait for the other. An
    exception of a handler is logged and refuses what the guest wanted (STALL); ``EndEmulation`` unplugs the device.

    Args:
        device: an instance of ``facedancer.USBDevice`` or ``USBBaseDevice`` that is not connected.
        coroutines: run beside it as by Facedancer's ``main``, from the guest's first request on.
        clock: seconds, monotonic.

    Attributes:
        device: the Facedancer device. Use it in coroutines, or where no other thread handles events.

    Raises:
        DeviceError: *device* is none, or none that can be exported.

    Threads: as :class:`~usbredir.virtual.VirtualDevice`.
    """

    def __init__(
        self,
        device: Any,
        *coroutines: Coroutine[Any, Any, object],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        facedancer = _facedancer()
        if not isinstance(device, facedancer.device.USBBaseDevice):
            raise DeviceError(f"{device!r} is no Facedancer device")
        if not device.configurations:
            raise DeviceError(
                f"{type(device).__name__} has no configuration: it needs @use_inner_classes_automatically, and inner "
                "classes of its own, which Facedancer does not inherit"
            )
        self.device = device
        self._end_emulation = facedancer.errors.EndEmulation
        self._board = _Board(self)
        self._asked: tuple[Setup, bytes] | None = None  # the control request that has no reply yet
        self._told_empty: set[int] = set()  # endpoints that were told that nothing waits there
        self._polling = False
        self._waiting_coroutines = coroutines
        self._beside: _Beside | None = None
        device.backend = self._board
        device.connect()
        super().__init__(speed=_speed_of(device), clock=clock)
        self._board.changed = self.notify

    def describe(self, speed: Speed) -> Description:
        """What the Facedancer device says of itself."""
        configurations = self.device.configurations.values()
        return Description(
            device=bytes(self.device.get_descriptor()),
            configurations=[bytes(configuration.get_descriptor()) for configuration in configurations],
        )

    def close(self) -> None:
        """Close the device, end its coroutines and disconnect it. Idempotent.

        A coroutine that does not end in five seconds after it was cancelled is logged and left alone.
        """
        super().close()
        beside, self._beside = self._beside, None
        if beside is not None and not beside.end():
            _log.warning("a coroutine of %s goes on although it was cancelled", type(self.device).__name__)
        for coroutine in self._waiting_coroutines:
            coroutine.close()
        self._waiting_coroutines = ()
        if self.device.backend is self._board:
            with self._hooks:
                self._call(self.device.disconnect)
            self.device.backend = None

    # --- hooks of VirtualDevice ---

    def began(self) -> None:
        """A reset of the bus, then configuration and alternate settings as they are."""
        self._asked = None
        self._told_empty.clear()
        self._board.outgoing = {}
        self._find_queues()
        self._call(self.device.handle_bus_reset)
        raw = self.configuration_descriptor
        self._tell(Setup(TO_DEVICE, SET_CONFIGURATION, raw[5] if raw else 0, 0, 0))
        for interface, alternate in self._alternates.items():
            self._tell(Setup(TO_INTERFACE, SET_INTERFACE, alternate, interface, 0))

    def alternate_selected(self, interface: int, alternate: int) -> None:
        """The Facedancer device hears of it as a request."""
        self._find_queues()
        self._tell(Setup(TO_INTERFACE, SET_INTERFACE, alternate, interface, 0))

    def halt_cleared(self, endpoint: int) -> None:
        """The Facedancer device hears of it as a request."""
        self._tell(Setup(TO_ENDPOINT, CLEAR_FEATURE, ENDPOINT_HALT, endpoint, 0))

    def standard_request(self, setup: Setup, data: bytes) -> Payload | Answer | None:
        """For the Facedancer device; halts are the board's."""
        if setup.request in HALTS and setup.request_type & 0x1F != TO_DEVICE:
            return super().standard_request(setup, data)
        return self.control_request(setup, data)

    def control_request(self, setup: Setup, data: bytes) -> Payload | Answer | None:
        """For the Facedancer device, which may reply later."""
        self._run_coroutines()
        if self._asked != (setup, data):
            self._asked = setup, data
            self._request(setup, data)
        reply = self._board.reply
        if reply is None:
            return NAK
        self._asked = None
        return reply

    def data_in(self, endpoint: int, length: int) -> Payload | Answer:
        """What the Facedancer device has sent, or sends when it is asked."""
        self._run_coroutines()
        number = endpoint & 0x0F
        outgoing = self._board.outgoing[number]
        works = bool(outgoing) or self._ask_for_data(number, outgoing)
        if not works or self.is_halted(endpoint):
            return STALL
        data = outgoing.take(length)
        if data is None:
            self._ask_again_soon()
            return NAK
        if not outgoing:
            self._told_empty.discard(number)
        return data

    def data_out(self, endpoint: int, data: Payload) -> Answer | None:
        """The Facedancer device gets packets."""
        self._run_coroutines()
        size = max(1, max_packet_size(self._endpoints[endpoint], self.speed))
        for start in range(0, len(data) or 1, size):
            packet = bytes(data[start : start + size])
            if not self._call(self.device.handle_data_available, endpoint, packet) or self.is_halted(endpoint):
                return STALL
        return None

    # --- the Facedancer device ---

    def _call(self, handler: Callable[..., object], *arguments: object) -> bool:
        """Call a handler. False: it failed."""
        try:
            handler(*arguments)
        except self._end_emulation:
            self.unplug()
        except Exception:  # of somebody else's code, for something that a guest did
            _log.exception("a handler of %s failed", type(self.device).__name__)
            return False
        return True

    def _request(self, setup: Setup, data: bytes = b"") -> None:
        self._board.reply = None
        self._board.request = request = self.device.create_request(struct.pack("<BBHHH", *setup) + data)
        if not self._call(self.device.handle_request, request):
            self._board.reply = STALL

    def _tell(self, setup: Setup) -> None:
        """A request that the host has not made itself; nobody wants the reply."""
        before = self._board.request, self._board.reply
        self._request(setup)
        self._board.request, self._board.reply = before

    def _ask_for_data(self, number: int, outgoing: _Outgoing) -> bool:
        works = True
        if number not in self._told_empty:
            self._told_empty.add(number)
            works = self._call(self.device.handle_buffer_available, number)
        if not outgoing:
            works = self._call(self.device.handle_nak, number) and works
        return works

    def _ask_again_soon(self) -> None:
        if not self._polling:
            self._polling = True
            self.call_later(POLL, self._asked_again)

    def _asked_again(self) -> None:
        self._polling = False

    def _find_queues(self) -> None:
        """A queue for each endpoint of the present alternate settings; what waits stays where nothing has changed."""
        before, self._board.outgoing = self._board.outgoing, {}
        for address, endpoint in self._endpoints.items():
            if address & 0x80:
                number, size = address & 0x0F, max(1, max_packet_size(endpoint, self.speed))
                queue = before.get(number)
                same = queue is not None and queue.packet_size == size
                self._board.outgoing[number] = queue if queue is not None and same else _Outgoing(size)

    def _run_coroutines(self) -> None:
        if self._waiting_coroutines:
            coroutines, self._waiting_coroutines = self._waiting_coroutines, ()
            self._beside = _Beside(coroutines, self._hooks, self._coroutines_ended)

    def _coroutines_ended(self, error: BaseException) -> None:
        if isinstance(error, self._end_emulation):
            self.unplug()
        else:
            _log.error("a coroutine of %s failed", type(self.device).__name__, exc_info=error)


class _Turns(selectors.DefaultSelector):
    """Lets go of a lock while the event loop waits: its steps and the lock's other holders take turns."""

    def __init__(self, lock: threading.RLock) -> None:
        super().__init__()
        self._lock = lock

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self._lock.release()
        try:
            return super().select(timeout)
        finally:
            self._lock.acquire()


class _Beside:
    """A thread that runs coroutines, whose steps hold *lock*; *failed* gets the first exception."""

    def __init__(
        self,
        coroutines: Sequence[Coroutine[Any, Any, object]],
        lock: threading.RLock,
        failed: Callable[[BaseException], None],
    ) -> None:
        self._lock = lock
        self._failed = failed
        self._loop = asyncio.SelectorEventLoop(_Turns(lock))
        self._tasks = [self._loop.create_task(coroutine) for coroutine in coroutines]
        self._thread = threading.Thread(target=self._run, name="Facedancer coroutines", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with self._lock:
            try:
                self._loop.run_until_complete(self._finish())
            except asyncio.CancelledError:
                pass
            except Exception as error:
                self._failed(error)
            self._loop.close()

    async def _finish(self) -> None:
        try:
            await asyncio.gather(*self._tasks)
        finally:  # one ends all
            self._cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def _cancel(self) -> None:
        for task in self._tasks:
            task.cancel()

    def end(self) -> bool:
        """Cancel what runs, and wait for it. False: it takes too long."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._cancel)
        if threading.current_thread() is self._thread:
            return True
        self._thread.join(END_LIMIT)
        return not self._thread.is_alive()


def load(module: str, name: str) -> FacedancerDevice:
    """The device that *name* of *module* makes, called without arguments: a class, or a function of one's own.

    It returns the Facedancer device, or that and its coroutines as a tuple. A script that calls Facedancer's ``main``
    when it is imported has them under the name ``main``. Modules are also found in the present folder. Raises
    DeviceError for whatever goes wrong; without Facedancer it tells how to install it.
    """
    facedancer = _facedancer()
    try:
        made = operator.attrgetter(name)(_import(module, facedancer))()
        device, *coroutines = made if isinstance(made, tuple) else (made,)
        return FacedancerDevice(device, *coroutines)
    except DeviceError:
        raise
    except (Exception, SystemExit) as error:  # of somebody else's code
        raise DeviceError(f"cannot make {module}:{name}: {type(error).__name__}: {error}") from error


class _Main:
    """In place of Facedancer's ``main``: keeps what it is called with, and gives it when called with nothing."""

    def __init__(self) -> None:
        self._kept: list[tuple[Any, ...]] = []

    def __call__(self, *arguments: Any) -> Any:
        if arguments:
            return self._kept.append(arguments)
        if not self._kept:
            raise RuntimeError("the module does not call main() when it is imported, or its device was used already")
        device, *coroutines = self._kept.pop()
        return device() if isinstance(device, type) else device, *coroutines


def _import(module: str, facedancer: Any) -> ModuleType:
    if (folder := os.getcwd()) not in sys.path:
        sys.path.insert(0, folder)
    main = facedancer.main
    facedancer.main = facedancer.devices.default_main = _Main()
    try:
        return importlib.import_module(module)
    finally:
        facedancer.main = facedancer.devices.default_main = main


def _facedancer() -> Any:
    try:
        for name in ("device", "errors"):
            importlib.import_module(f"facedancer.{name}")
        return importlib.import_module("facedancer")
    except ImportError as error:
        raise DeviceError(f"Facedancer is not installed ({error}): pip install usbredir[facedancer]") from error


def _speed_of(device: Any) -> Speed:
    if device.device_speed is None:
        return Speed.FULL
    name = device.device_speed.name
    if name not in SPEEDS:
        raise DeviceError(f"{type(device).__name__} has speed {name}; there are {', '.join(SPEEDS)}")
    return SPEEDS[name]
