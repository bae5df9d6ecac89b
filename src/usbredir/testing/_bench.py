"""One device under test: submits transfers, waits for them, and watches that the rules of completions are kept."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from ..descriptors import Configuration, Endpoint, max_packet_size, parse_configuration
from ..device import Transfer, UsbDevice
from ..proto import Status, TransferType
from ..transport import Poller

__all__ = ["Bench", "Broken", "Finding", "NotChecked", "Watched"]

GET_DESCRIPTOR = 6
STEP = 0.01
"""Seconds to wait at a time, so that the end of patience is seen."""
SHORT_TIMEOUT = 0.02
"""Seconds after which transfers that probably nobody answers time out."""
ISO_PACKETS = 4


class Finding(NamedTuple):
    """A rule that a device does not keep: its name, what was done, and what was seen."""

    rule: str
    did: str
    saw: str

    def __str__(self) -> str:
        return f"{self.rule}: {self.did}: {self.saw}"


class Broken(Exception):
    """Ends a rule: what was done and seen breaks it."""

    def __init__(self, did: str, saw: str) -> None:
        super().__init__(did, saw)
        self.did = did
        self.saw = saw


class NotChecked(Exception):
    """Ends a rule: there is nothing that it can be checked with."""


class Watched:
    """A transfer and what became of it. *refused*: the status of a submit that did not start it."""

    def __init__(self, transfer: Transfer, then: Callable[[Watched], None] | None) -> None:
        self.transfer = transfer
        self.then = then
        self.refused: int | None = None
        self.completions = 0
        self.done = threading.Event()

    def __str__(self) -> str:
        transfer = self.transfer
        if transfer.kind is TransferType.CONTROL:
            return "a control transfer (" + " ".join(f"{part:02x}" for part in transfer.setup) + ")"
        timeout = f" and a timeout of {transfer.timeout} s" if transfer.timeout else ""
        kind = transfer.kind.name.lower()
        return f"a transfer on {kind} endpoint 0x{transfer.endpoint:02x} of {transfer.length} bytes{timeout}"

    @property
    def status(self) -> int:
        """How it ended, refused or completed."""
        return self.transfer.status if self.refused is None else self.refused


class Bench:
    """A device and what is known of it. Threads: start, cancel: any; otherwise one."""

    def __init__(self, device: UsbDevice, avoid: Collection[int], patience: float) -> None:
        self.device = device
        self.patience = patience
        self.doing = "nothing yet"
        self.problems: list[tuple[str, str]] = []
        self._avoid = avoid
        self._alternates: dict[int, int] = {}
        self._local = threading.local()
        self._lock = threading.Lock()
        self._running: Watched | None = None

    # ------------------------------------------------------------ description

    def configuration(self) -> Configuration:
        """The active configuration. Raises NotChecked."""
        raw = self.device.configuration_descriptor
        if raw is None:
            raise NotChecked("the device is not configured")
        return parse_configuration(raw)

    def endpoints(self, *kinds: TransferType, direction: int | None = None) -> list[Endpoint]:
        """Endpoints of the selected alternate settings that may be used; *direction* is 0x80 for IN, 0 for OUT."""
        return [
            endpoint
            for interface in self.configuration().interfaces
            if self._alternates.get(interface.number, 0) == interface.alternate
            for endpoint in interface.endpoints
            if endpoint.address not in self._avoid
            if endpoint.type in kinds and direction in (None, endpoint.address & 0x80)
        ]

    def select(self, interface: int, alternate: int) -> int:
        """Select an alternate setting; the status."""
        status = self.device.set_alt_setting(interface, alternate)
        if status == Status.SUCCESS:
            self._alternates[interface] = alternate
        return status

    # ------------------------------------------------------------ transfers

    def start(
        self,
        kind: TransferType,
        endpoint: int,
        length: int,
        *,
        data: bytes = b"",
        setup: tuple[int, int, int, int] | None = None,
        timeout: float = 0.0,
        iso_lengths: Sequence[int] = (),
        then: Callable[[Watched], None] | None = None,
    ) -> Watched:
        """Submit a transfer and watch it; *then* is called in its completion."""
        transfer = Transfer(
            kind,
            endpoint,
            length,
            self._completed,
            data=data,
            setup=setup,
            timeout=timeout,
            iso_lengths=iso_lengths,
        )
        watched = transfer.context = Watched(transfer, then)
        self.submit(watched)
        return watched

    def submit(self, watched: Watched) -> None:
        """Submit a transfer that is not in flight."""
        self.doing = f"submitted {watched}"
        watched.done.clear()
        watched.completions = 0
        watched.refused = None
        status = self._inside("submit", lambda: self.device.submit(watched.transfer))
        if status != Status.SUCCESS:
            watched.refused = status
            watched.done.set()

    def start_on(self, endpoint: Endpoint, *, timeout: float = 0.0) -> Watched:
        """One packet (isochronous: some) on an endpoint: read, or zeros are written."""
        size = max(1, max_packet_size(endpoint, self.device.speed))
        lengths = [size] * ISO_PACKETS if endpoint.type is TransferType.ISO else []
        length = sum(lengths) or size
        data = b"" if endpoint.address & 0x80 else bytes(length)
        return self.start(endpoint.type, endpoint.address, length, data=data, timeout=timeout, iso_lengths=lengths)

    def start_control(
        self, request_type: int, request: int, value: int, index: int, length: int = 0, *, data: bytes = b""
    ) -> Watched:
        """A control transfer."""
        setup = request_type, request, value, index
        return self.start(TransferType.CONTROL, request_type & 0x80, len(data) or length, data=data, setup=setup)

    def control(self, request_type: int, request: int, value: int, index: int, length: int = 0) -> Watched:
        """A control transfer that has completed."""
        return self.finish(self.start_control(request_type, request, value, index, length))

    def descriptor(self, kind: int, index: int = 0, length: int = 4096, *, language: int = 0) -> bytes | None:
        """A descriptor of the device, or None where it does not answer."""
        watched = self.control(0x80, GET_DESCRIPTOR, kind << 8 | index, language, length)
        return bytes(watched.transfer.data) if watched.status == Status.SUCCESS else None

    def start_reading(self, *, then: Callable[[Watched], None] | None = None) -> Watched:
        """Ask for the device descriptor, which every device can answer."""
        setup = 0x80, GET_DESCRIPTOR, 0x0100, 0
        return self.start(TransferType.CONTROL, 0x80, 18, setup=setup, then=then)

    def cancel(self, watched: Watched) -> None:
        """Cancel a transfer."""
        self.doing = f"cancelled {watched}"
        self._inside("cancel", lambda: self.device.cancel(watched.transfer))

    # ------------------------------------------------------------ waiting

    def run(self, seconds: float, *watched: Watched) -> bool:
        """Handle events for some time, or until the transfers have completed. Whether they have."""
        end = time.monotonic() + seconds
        while not all(one.done.is_set() for one in watched) or not watched:
            left = end - time.monotonic()
            if left <= 0:
                return False
            self.doing = f"called handle_events({min(left, STEP):.3f})"
            self.device.handle_events(min(left, STEP))
        return True

    def finish(self, watched: Watched) -> Watched:
        """Handle events until the transfer has completed. Raises Broken when it does not."""
        if not self.run(self.patience, watched):
            raise Broken(f"submitted {watched}", f"it did not complete within {self.patience:g} s")
        return watched

    def finish_by_polling(self, watched: Watched) -> None:
        """As an event loop does: handle events only when pollfds or next_timeout say so. Raises Broken."""
        end = time.monotonic() + self.patience
        poller = Poller()
        while not watched.done.is_set():
            wait, fds, now = self.next_timeout(), list(self.device.pollfds()), time.monotonic()
            if now >= end:
                saw = f"pollfds and next_timeout did not lead to its completion within {self.patience:g} s"
                raise Broken(f"submitted {watched}", saw)
            ready = poller.wait(fds, min(STEP, end - now, STEP if wait is None else wait))
            if ready or (wait is not None and time.monotonic() >= now + wait):
                self.device.handle_events(0)

    def next_timeout(self) -> float | None:
        """What the device says. Raises Broken for a negative time."""
        wait = self.device.next_timeout()
        if wait is not None and wait < 0:
            raise Broken("called next_timeout()", f"{wait!r}: None or at least 0 was expected")
        return wait

    def in_thread(self, function: Callable[[], object], meanwhile: Callable[[], object] = lambda: None) -> bool:
        """Run *function* in another thread, and *meanwhile* here again and again. Whether it ended in time."""
        thread = threading.Thread(target=function, daemon=True)
        end = time.monotonic() + self.patience
        thread.start()
        while thread.is_alive() and time.monotonic() < end:
            meanwhile()
            thread.join(STEP)
        return not thread.is_alive()

    # ------------------------------------------------------------ rules of every completion

    def problem(self, did: str, saw: str) -> None:
        """Note that a rule is broken, and go on."""
        if (did, saw) not in self.problems:
            self.problems.append((did, saw))

    def _inside(self, name: str, call: Callable[[], int | None]) -> int | None:
        before = getattr(self._local, "call", None)
        self._local.call = name
        try:
            return call()
        finally:
            self._local.call = before

    def _completed(self, transfer: Transfer) -> None:
        watched: Watched = transfer.context
        did = f"submitted {watched}"
        with self._lock:
            watched.completions += 1
            others, self._running = self._running, watched
        if others is not None:
            self.problem(did, f"its completion ran while that of {others} did")
        call = getattr(self._local, "call", None)
        if call:
            self.problem(did, f"a completion ran inside {call}")
        if watched.completions > 1:
            self.problem(did, f"it completed {watched.completions} times")
        for saw in _problems_of(transfer):
            self.problem(did, saw)
        if watched.then is not None:
            watched.then(watched)
        with self._lock:
            self._running = None
        if watched.completions:  # not submitted again
            watched.done.set()


def _problems_of(transfer: Transfer) -> list[str]:
    """What is wrong with the result of a transfer."""
    reading, iso = bool(transfer.endpoint & 0x80), transfer.kind is TransferType.ISO
    received, results = len(transfer.data), transfer.iso_results
    broken = {
        f"its status is {transfer.status!r}": transfer.status not in Status._value2member_map_,
        f"{transfer.actual_length} bytes were transferred, at most {transfer.length} could be": (
            not 0 <= transfer.actual_length <= transfer.length
        ),
        f"actual_length is {transfer.actual_length}, but there are {received} bytes of data": (
            reading and not iso and received != transfer.actual_length
        ),
        f"the device is lost, but the status is {transfer.status!r}": (
            transfer.device_lost and transfer.status != Status.IOERROR
        ),
        f"{len(results)} results for {len(transfer.iso_lengths)} isochronous packets": (
            iso and transfer.status == Status.SUCCESS and len(results) != len(transfer.iso_lengths)
        ),
        "an isochronous packet has more data than room": any(
            len(result.data) > length for result, length in zip(results, transfer.iso_lengths, strict=False)
        ),
    }
    return [saw for saw, is_so in broken.items() if is_so]
