"""The conformance kit: good devices pass, and for each rule there are devices that break it and are found."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest

import usbredir.virtual
from usbredir.device import IsoResult, Transfer, UsbDevice
from usbredir.errors import DeviceError
from usbredir.proto import Speed, Status, TransferType
from usbredir.testing import ConformanceError, check_device
from usbredir.testing._bench import Finding
from usbredir.testing.conformance import RULES, Report
from usbredir.virtual import Faulty, LoopbackDevice, MassStorage, VirtualDevice

PATIENCE = 60.0
"""Seconds that a device may take on a busy machine."""
IMPATIENT = 0.3
"""Seconds after which a device is given up that never does what it should."""
NEVER = ("did not complete", "did not return", "never ended", "did not lead", "blocks", "in flight")
"""Findings that come after that time."""
CONTROL, BULK, INTERRUPT, ISO = TransferType.CONTROL, TransferType.BULK, TransferType.INTERRUPT, TransferType.ISO


# ================================================================ devices that keep the rules


class Delegating:
    """A device that has another one do what it does not itself."""

    def __init__(self) -> None:
        self._device = LoopbackDevice()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._device, name)


class OnItsOwnThread(Delegating):
    """Completes transfers on a thread of its own; handle_events has nothing to do."""

    def __init__(self) -> None:
        super().__init__()
        self._woken = threading.Event()
        self._ending = False
        self._thread = threading.Thread(target=self._main)
        self._thread.start()

    def _main(self) -> None:
        while not self._ending:
            self._device.handle_events(None)

    def handle_events(self, timeout: float | None = 0.0) -> None:
        if self._woken.wait(timeout):
            self._woken.clear()

    def wake(self) -> None:
        self._woken.set()

    def pollfds(self) -> Sequence[tuple[int, int]]:
        return []

    def next_timeout(self) -> float | None:
        return None

    def close(self) -> None:
        self._ending = True
        self._device.wake()
        self._thread.join()
        self._device.close()


ARGUMENTS: dict[str, tuple[object, ...]] = {
    "MassStorage": (bytes(1 << 16),),
    "Cdrom": (bytes(1 << 16),),
    "AudioSource": (bytes(64),),
}
"""What constructors need."""
DEVICES: dict[str, type[VirtualDevice]] = {
    name: thing
    for name, thing in vars(usbredir.virtual).items()
    if isinstance(thing, type) and issubclass(thing, VirtualDevice) and thing is not VirtualDevice
}
GOOD: dict[str, Callable[[], UsbDevice]] = {
    "full": functools.partial(LoopbackDevice, speed=Speed.FULL),
    "super": functools.partial(LoopbackDevice, speed=Speed.SUPER),
    "thread": OnItsOwnThread,
    "faulty": lambda: Faulty(LoopbackDevice()),
    "faulty-stick": lambda: Faulty(MassStorage(bytes(1 << 16))),
    "faulty-thread": lambda: Faulty(OnItsOwnThread()),
    "slow": lambda: Faulty(LoopbackDevice(), delay=(0.0, 0.002), seed=3),
    "losing": lambda: Faulty(LoopbackDevice(), drop={0x01: 0.5, 0x02: 1.0, 0x03: 0.5}),
    "noisy": lambda: Faulty(LoopbackDevice(), corrupt={0x82: 1.0, 0x84: 1.0, 0x02: 1.0}, babble={0x83: 0.5}),
}


@pytest.mark.parametrize("name", GOOD)
def test_good_devices_pass(name: str) -> None:
    """Every rule is checked, but for what the device has not."""
    report = check_device(GOOD[name])
    assert set(report.passed) | set(report.not_checked) == set(RULES)
    assert set(report.not_checked) <= {"bulk-streams"}


@pytest.mark.parametrize("name", DEVICES)
def test_every_device_of_usbredir_passes(name: str) -> None:
    """A new one that needs arguments has a row in ARGUMENTS."""
    report = check_device(functools.partial(DEVICES[name], *ARGUMENTS.get(name, ())))
    assert {"control-transfers", "closing", "configuration-descriptor", "get-descriptor"} <= set(report.passed)


def test_what_may_not_be_touched() -> None:
    """Nothing is written or set up, and endpoints to be avoided get no transfer."""
    seen: list[Transfer] = []

    class Watching(LoopbackDevice):
        def submit(self, transfer: Transfer) -> int:
            seen.append(transfer)
            return super().submit(transfer)

        def set_configuration(self, value: int) -> int:
            raise AssertionError

        def reset(self) -> None:
            raise AssertionError

    report = check_device(Watching, destructive=False, avoid=[0x81, 0x82])
    assert {t.endpoint for t in seen} >= {0x80, 0x83, 0x86}
    assert not [t for t in seen if t.endpoint in (0x81, 0x82) or not t.endpoint & 0x80]
    assert {name for name, why in report.not_checked.items() if why == "it is destructive"} == {
        name for name, rule in RULES.items() if rule.destructive
    }


def test_rules_can_be_skipped() -> None:
    report = check_device(
        BY_RULE["waiting"][0][1], skip=["waiting", "submission-from-other-threads"], patience=IMPATIENT
    )
    assert "it is not to be checked" in report.not_checked["waiting"]
    assert isinstance(report, Report)


def test_a_rule_that_does_not_exist_cannot_be_skipped() -> None:
    with pytest.raises(ValueError, match=r"no such rule: nonsense; the rules are interface, device-descriptor"):
        check_device(LoopbackDevice, skip=["nonsense"])


def test_what_the_factory_raises_passes_through() -> None:
    def make() -> UsbDevice:
        raise DeviceError("none there")

    with pytest.raises(DeviceError, match="none there"):
        check_device(make)


# ================================================================ devices that break them


class Altered(LoopbackDevice):
    """Alters the results of some transfers."""

    def concerns(self, transfer: Transfer) -> bool:
        return True

    def alter(self, transfer: Transfer) -> None:
        raise NotImplementedError

    def submit(self, transfer: Transfer) -> int:
        if not self.concerns(transfer):
            return super().submit(transfer)
        callback = transfer.callback

        def altered(done: Transfer) -> None:
            transfer.callback = callback
            self.alter(done)
            callback(done)

        transfer.callback = altered
        status = super().submit(transfer)
        if status != Status.SUCCESS:
            transfer.callback = callback
        return status


def answering(setup: tuple[int, ...], data: bytes | None, status: int = Status.SUCCESS) -> type[Altered]:
    """A device that answers control requests that begin so with *data*."""

    class Answering(Altered):
        def concerns(self, transfer: Transfer) -> bool:
            return transfer.kind is CONTROL and transfer.setup[: len(setup)] == setup

        def alter(self, transfer: Transfer) -> None:
            transfer.status = status
            if data is not None:
                transfer.data = data
                transfer.actual_length = len(data)

    return Answering


def ending(status: int, *kinds: TransferType, at: int | None = None, instead_of: int | None = None) -> type[Altered]:
    """A device whose transfers of some kinds, or on an endpoint, end with *status*."""

    class Ending(Altered):
        def concerns(self, transfer: Transfer) -> bool:
            return transfer.kind in kinds or transfer.endpoint == at

        def alter(self, transfer: Transfer) -> None:
            if instead_of in (None, transfer.status):
                transfer.status = status

    return Ending


def having(**members: Any) -> type[LoopbackDevice]:
    """A device with other members."""
    return type("Having", (LoopbackDevice,), members)


CONFIGURATION = LoopbackDevice().configuration_descriptor or b""
DEVICE = LoopbackDevice().device_descriptor


def being(**members: Any) -> type[Delegating]:
    """A device that tells other things of itself."""
    return type("Being", (Delegating,), members)


def patched(raw: bytes, **changes: int) -> bytes:
    """*raw* with other bytes, as ``at_7=0x40``."""
    data = bytearray(raw)
    for place, value in changes.items():
        data[int(place.removeprefix("at_"))] = value
    return bytes(data)


def described(raw: bytes) -> type[Delegating]:
    return being(configuration_descriptor=raw)


def with_endpoint(**changes: int) -> type[Delegating]:
    """Another endpoint descriptor 0x81: the second one, behind configuration, interface and endpoint."""
    return described(patched(CONFIGURATION, **{f"at_{25 + int(k[3:])}": v for k, v in changes.items()}))


class WithoutWake(Delegating):
    """A device that lacks a member."""

    def __getattr__(self, name: str) -> Any:
        if name == "wake":
            raise AttributeError(name)
        return super().__getattr__(name)


class Changing(Delegating):
    reads = 0

    @property
    def device_descriptor(self) -> bytes:
        self.reads += 1
        return patched(DEVICE, at_12=self.reads)


class Reversing(LoopbackDevice):
    """Completes what it was given between two calls in the wrong order."""

    def __init__(self, *kinds: TransferType) -> None:
        super().__init__()
        self._kinds = kinds
        self._held: list[Transfer] = []

    def submit(self, transfer: Transfer) -> int:
        if transfer.kind not in self._kinds:
            return super().submit(transfer)
        self._held.append(transfer)
        self.notify()
        return Status.SUCCESS

    def handle_events(self, timeout: float | None = 0.0) -> None:
        while self._held:
            super().submit(self._held.pop())
        super().handle_events(timeout)


class Once(LoopbackDevice):
    """Refuses a transfer that it had before."""

    def __init__(self) -> None:
        super().__init__()
        self._had: set[Transfer] = set()

    def submit(self, transfer: Transfer) -> int:
        if transfer in self._had:
            return Status.INVAL
        self._had.add(transfer)
        return super().submit(transfer)


class Twice(Altered):
    def alter(self, transfer: Transfer) -> None:
        transfer.callback(transfer)


class AtOnce(LoopbackDevice):
    def submit(self, transfer: Transfer) -> int:
        status = super().submit(transfer)
        self.handle_events(0)
        return status


class CancellingAtOnce(LoopbackDevice):
    def cancel(self, transfer: Transfer) -> None:
        super().cancel(transfer)
        self.handle_events(0)


class Overlapping(LoopbackDevice):
    """Completes two transfers on two threads at a time, each in the middle of the other."""

    def submit(self, transfer: Transfer) -> int:
        if transfer.kind is CONTROL:
            callback = transfer.callback

            def completed(done: Transfer) -> None:
                transfer.callback = callback
                while self._queues.get(0):  # the next one first, from another thread
                    other = threading.Thread(target=super(Overlapping, self).handle_events)
                    other.start()
                    other.join()
                callback(done)

            transfer.callback = completed
        return super().submit(transfer)


class TooMuch(Altered):
    def concerns(self, transfer: Transfer) -> bool:
        return transfer.endpoint == 0x82

    def alter(self, transfer: Transfer) -> None:
        transfer.data = bytes(transfer.length + 1)
        transfer.actual_length = transfer.length + 1


class Miscounting(TooMuch):
    def alter(self, transfer: Transfer) -> None:
        transfer.data = b"xyz"
        transfer.actual_length = 2


class LostQuietly(TooMuch):
    def alter(self, transfer: Transfer) -> None:
        transfer.device_lost = True


class FewResults(Altered):
    def concerns(self, transfer: Transfer) -> bool:
        return transfer.kind is ISO

    def alter(self, transfer: Transfer) -> None:
        transfer.iso_results = transfer.iso_results[1:]


class LongResults(FewResults):
    def alter(self, transfer: Transfer) -> None:
        transfer.iso_results = [IsoResult(Status.SUCCESS, bytes(length + 1)) for length in transfer.iso_lengths]


class Refusing(LoopbackDevice):
    """Refuses an endpoint that it has."""

    def submit(self, transfer: Transfer) -> int:
        return Status.INVAL if transfer.endpoint == 0x02 else super().submit(transfer)


class Accepting(LoopbackDevice):
    """Has endpoints that it does not tell."""

    def submit(self, transfer: Transfer) -> int:
        transfer.status = Status.SUCCESS
        status = super().submit(transfer)
        if status != Status.SUCCESS and not self.lost:
            self.call_later(0, lambda: transfer.callback(transfer))
            self.notify()
        return Status.SUCCESS


class WithoutTimeouts(LoopbackDevice):
    def submit(self, transfer: Transfer) -> int:
        transfer.timeout = 0.0
        return super().submit(transfer)


class Hurrying(LoopbackDevice):
    """Times out too early."""

    def submit(self, transfer: Transfer) -> int:
        transfer.timeout /= 100
        return super().submit(transfer)


class Unimpressed(LoopbackDevice):
    def cancel(self, transfer: Transfer) -> None:
        """Nothing."""


class StrictCancel(LoopbackDevice):
    """Does not like to cancel what it has not."""

    def __init__(self) -> None:
        super().__init__()
        self._flying: set[Transfer] = set()

    def submit(self, transfer: Transfer) -> int:
        status, callback = super().submit(transfer), transfer.callback
        self._flying.add(transfer)

        def completed(done: Transfer) -> None:
            transfer.callback = callback
            self._flying.discard(transfer)
            callback(done)

        transfer.callback = completed
        return status

    def cancel(self, transfer: Transfer) -> None:
        if transfer not in self._flying:
            raise KeyError(transfer)
        super().cancel(transfer)


class HaltingNothing(LoopbackDevice):
    def halt(self, endpoint: int) -> None:
        """Nothing."""


class HaltedForEver(LoopbackDevice):
    def clear_halt(self, endpoint: int) -> int:
        return Status.SUCCESS


class Sleeper(LoopbackDevice):
    """Is not woken."""

    def wake(self) -> None:
        """Nothing."""


class Waiter(LoopbackDevice):
    """Waits longer than it is told to."""

    def handle_events(self, timeout: float | None = 0.0) -> None:
        super().handle_events(None)


class Unnoticing(Reversing):
    """Does not notice what is submitted while it waits."""

    def notify(self) -> None:
        """Nothing."""

    def wake(self) -> None:
        super().notify()


class Silent(LoopbackDevice):
    """Leads event loops nowhere."""

    def pollfds(self) -> Sequence[tuple[int, int]]:
        return []

    def next_timeout(self) -> float | None:
        return None


class Locking(LoopbackDevice):
    """Holds a lock during completions."""

    def __init__(self) -> None:
        super().__init__()
        self._mine = threading.RLock()

    def submit(self, transfer: Transfer) -> int:
        with self._mine:
            return super().submit(transfer)

    def handle_events(self, timeout: float | None = 0.0) -> None:
        with self._mine:
            super().handle_events(timeout)


class Leaving(LoopbackDevice):
    """Closes without completing anything."""

    def close(self) -> None:
        for queue in (self._submitted, *self._queues.values()):
            queue.clear()
        super().close()


class ClosedOnce(LoopbackDevice):
    def close(self) -> None:
        if self._closed:
            raise RuntimeError("closed already")
        super().close()


class NeverClosed(LoopbackDevice):
    def close(self) -> None:
        self.handle_events(0)
        for queue in list(self._queues.values()):
            for transfer in queue:
                self.cancel(transfer)
        self.handle_events(0)


class Denying(LoopbackDevice):
    @property
    def lost(self) -> bool:
        return False


class Ghost(Altered):
    """Ends transfers without telling that it is gone."""

    def alter(self, transfer: Transfer) -> None:
        transfer.device_lost = False


class Blocking(LoopbackDevice):
    """Never answers, and never returns."""

    released = threading.Event()

    def __init__(self) -> None:
        super().__init__()
        self.released.clear()

    def claim(self) -> None:
        self.released.wait()


def lying(value: Any) -> Callable[..., Any]:
    return lambda self, *arguments, **options: value


def failing(*arguments: Any, **options: Any) -> Any:
    raise OSError("broken")


def keeping_configuration(self: LoopbackDevice, value: int) -> int:
    return Status.SUCCESS if value in (0, 1, 2) else Status.IOERROR


def losing_configuration(self: LoopbackDevice) -> None:
    self.set_configuration(0)


def any_alternate(self: LoopbackDevice, interface: int, alt: int) -> int:
    status = LoopbackDevice.set_alt_setting(self, interface, alt)
    return Status.SUCCESS if alt > 2 else status


def opposite_alternate(self: LoopbackDevice, interface: int, alt: int) -> int:
    return LoopbackDevice.set_alt_setting(self, interface, 2 if alt == 1 else alt)


BROKEN: list[tuple[str, Callable[[], Any], str]] = [
    ("interface", WithoutWake, "it has no wake"),
    ("interface", being(speed=2), "read speed: 2"),
    ("device-descriptor", being(device_descriptor=DEVICE[:8]), "8 bytes that begin with 12 01"),
    (
        "device-descriptor",
        being(device_descriptor=bytearray(DEVICE)),
        "it is a bytearray, not bytes",
    ),
    (
        "device-descriptor",
        being(device_descriptor=patched(DEVICE, at_7=9)),
        "bMaxPacketSize0 is 9 at speed HIGH",
    ),
    (
        "device-descriptor",
        being(device_descriptor=patched(DEVICE, at_17=0)),
        "bNumConfigurations is 0",
    ),
    ("device-descriptor", Changing, "it has changed"),
    ("configuration-descriptor", described(DEVICE), "it begins with 12 01"),
    ("configuration-descriptor", described(CONFIGURATION[:-3]), "wTotalLength is"),
    ("configuration-descriptor", described(patched(CONFIGURATION, at_9=0)), "at byte 9 begins a descriptor that does"),
    ("configuration-descriptor", described(patched(CONFIGURATION, at_4=7)), "bNumInterfaces is 7, but there are 2"),
    ("configuration-descriptor", described(patched(CONFIGURATION, at_5=0)), "bConfigurationValue is 0"),
    ("configuration-descriptor", described(patched(CONFIGURATION, at_7=0)), "bmAttributes is 0x00"),
    ("configuration-descriptor", described(patched(CONFIGURATION, at_12=3)), "has no alternate setting 0"),
    ("configuration-descriptor", described(patched(CONFIGURATION, at_13=3)), "bNumEndpoints is 3, but there are 8"),
    ("configuration-descriptor", with_endpoint(at_2=0x01), "has endpoint 0x01 more than once"),
    ("configuration-descriptor", with_endpoint(at_2=0x84), "endpoint 0x84 belongs to interfaces 0 and 1"),
    ("endpoint-descriptors", with_endpoint(at_2=0x90), "its address is not possible"),
    ("endpoint-descriptors", with_endpoint(at_5=0x01), "packets of 256 bytes are not possible for bulk"),
    ("endpoint-descriptors", with_endpoint(at_5=0x0A), "wMaxPacketSize is 0x0a00"),
    (
        "endpoint-descriptors",
        with_endpoint(at_3=3, at_4=1, at_5=6, at_6=1),
        "packets of 1537 bytes are not possible",
    ),
    ("endpoint-descriptors", with_endpoint(at_3=3, at_6=0), "bInterval is 0"),
    (
        "endpoint-descriptors",
        being(configuration_descriptor=CONFIGURATION, speed=Speed.SUPER),
        "packets of 512 bytes are not possible for bulk at speed SUPER",
    ),
    ("get-descriptor", answering((0x80, 6, 0x0100), patched(DEVICE, at_8=1)[:8]), "which is not that of"),
    ("get-descriptor", described(patched(CONFIGURATION, at_8=99)), "none is that of configuration_descriptor"),
    ("strings", answering((0x80, 6, 0x0301), b"\x0a\x03a\0"), "asked for string descriptor 1: 4 bytes: 0a 03 61 00"),
    ("strings", answering((0x80, 6, 0x0300), b"\x02\x03"), "asked for string descriptor 0: 2 bytes: 02 03"),
    ("strings", answering((0x80, 6, 0x0302), b"", Status.STALL), "although its device descriptor names it"),
    ("state-requests", answering((0x80, 8), b"\7"), "sent GET_CONFIGURATION: 1 bytes: 07"),
    ("state-requests", answering((0x81, 10), b"\1"), "sent GET_INTERFACE of interface 0: 1 bytes: 01"),
    ("state-requests", answering((0x80, 0), b"\0"), "sent GET_STATUS of the device: 1 bytes: 00"),
    ("unknown-requests", answering((0x80, 0xEE), b""), "sent an unknown standard request: it ended with SUCCESS"),
    ("unknown-requests", answering((0x80, 6, 0xEE00), b""), "unknown type: it ended with SUCCESS"),
    ("claims", having(release=failing), "called release(): it raised OSError('broken')"),
    ("claims", Blocking, "called claim(): it did not return within"),
    ("configuration-changes", having(set_configuration=lying(Status.SUCCESS)), "although there is none with this"),
    ("configuration-changes", having(set_configuration=lying(Status.IOERROR)), "called set_configuration(1): IOERROR"),
    ("configuration-changes", having(set_configuration=keeping_configuration), "configuration 1 is active"),
    ("alternate-settings", having(set_alt_setting=lying(Status.SUCCESS)), "then sent GET_INTERFACE: 1 bytes: 00"),
    ("alternate-settings", having(set_alt_setting=any_alternate), "which does not exist: SUCCESS"),
    ("alternate-settings", having(set_alt_setting=lying(Status.STALL)), "alternate setting 0 of interface 0: STALL"),
    ("alternate-settings", having(set_alt_setting=opposite_alternate), "then sent GET_INTERFACE: 1 bytes: 02"),
    ("alternate-settings", Accepting, "SUCCESS without such an endpoint"),
    ("unknown-endpoints", Accepting, "SUCCESS without such an endpoint"),
    ("unknown-endpoints", having(clear_halt=lying(Status.SUCCESS)), "called clear_halt(0x8f): SUCCESS"),
    ("bulk-streams", having(alloc_streams=lying((Status.SUCCESS, 2))), "an endpoint without streams: SUCCESS, 2"),
    ("reset", having(reset=losing_configuration), "it is another device"),
    ("reset", having(reset=failing), "it raised OSError('broken')"),
    ("control-transfers", functools.partial(Reversing, CONTROL), "they completed in another order"),
    ("control-transfers", Twice, "it completed 2 times"),
    ("control-transfers", AtOnce, "a completion ran inside submit"),
    ("control-transfers", ending(77, CONTROL), "its status is 77"),
    ("cancellation", CancellingAtOnce, "a completion ran inside cancel"),
    ("resubmission", Once, "it was refused"),
    ("transfers", Refusing, "refused with INVAL"),
    ("transfers", functools.partial(Reversing, BULK), "they completed in another order"),
    ("transfers", TooMuch, "513 bytes were transferred, at most 512 could be"),
    ("transfers", Miscounting, "actual_length is 2, but there are 3 bytes of data"),
    ("transfers", LostQuietly, "the device is lost, but the status is"),
    ("transfers", FewResults, "3 results for 4 isochronous packets"),
    ("transfers", LongResults, "an isochronous packet has more data than room"),
    ("timeouts", WithoutTimeouts, "it did not complete within 0.3 s"),
    ("timeouts", Hurrying, "TIMEOUT after 0.0"),
    ("timeouts", ending(Status.CANCELLED, BULK), "CANCELLED, although nobody did"),
    ("cancellation", Unimpressed, "it did not complete within 0.3 s"),
    ("cancellation", StrictCancel, "it raised KeyError"),
    ("cancellation", ending(Status.TIMEOUT, BULK), "TIMEOUT, although it has none"),
    ("cancellation", ending(Status.IOERROR, at=0x86), "which waited: IOERROR"),
    ("halts", HaltingNothing, "and read from it: TIMEOUT"),
    ("halts", HaltedForEver, "cleared the halt of endpoint 0x81, and read from it: STALL"),
    ("halts", having(clear_halt=lying(Status.IOERROR)), "called clear_halt(0x01): IOERROR"),
    ("halts", answering((0x82, 0), b"\0\0"), "and sent GET_STATUS: 2 bytes: 00 00"),
    ("waiting", Sleeper, "called handle_events(None), and wake() from another thread: it did not return"),
    ("waiting", Waiter, "called handle_events(0.0): it did not return"),
    ("submission-from-other-threads", functools.partial(Unnoticing, CONTROL), "it never ended"),
    ("polling", Silent, "pollfds and next_timeout did not lead to its completion"),
    ("polling", having(next_timeout=lying(-1.0)), "called next_timeout(): -1.0: None or at least 0"),
    ("polling", having(pollfds=lying([(-1, 1)])), "called pollfds(): (-1, 1)"),
    ("completions-hold-no-locks", Locking, "it blocks"),
    ("closing", Leaving, "then closed the device: it has not completed"),
    ("closing", ClosedOnce, "closed the device again: it raised RuntimeError"),
    ("closing", NeverClosed, "a closed device: it was accepted"),
    ("unplugging", Denying, "unplugged the device: lost is not True"),
    ("unplugging", Ghost, "without loss of the device"),
    ("unplugging", having(claim=lying(None)), "claimed an unplugged device: no DeviceLostError"),
    ("unplugging", having(submit=lying(Status.SUCCESS)), "it did not complete"),
]
BY_RULE = {rule: [row for row in BROKEN if row[0] == rule] for rule in RULES}


def findings_of(make: Callable[[], Any], rule: str, patience: float) -> list[Finding]:
    """What the kit finds when it checks one rule only."""
    others = set(RULES) - {rule, "interface"}
    with pytest.raises(ConformanceError) as caught:
        check_device(make, skip=others, patience=patience)
    assert isinstance(caught.value, AssertionError)
    for finding in caught.value.findings:
        assert str(finding) in str(caught.value)
    return caught.value.findings


@pytest.mark.parametrize(("rule", "make", "saw"), BROKEN, ids=[f"{row[0]}-{n}" for n, row in enumerate(BROKEN)])
def test_broken_devices_are_found(rule: str, make: Callable[[], Any], saw: str) -> None:
    """The finding names the rule, what was done, and what was seen."""
    try:
        findings = findings_of(make, rule, IMPATIENT if any(text in saw for text in NEVER) else PATIENCE)
    finally:
        Blocking.released.set()
    assert findings[0].rule == rule
    assert saw in "; ".join(f"{finding.did}: {finding.saw}" for finding in findings)


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_can_be_broken(rule: str) -> None:
    """A rule that no device breaks checks nothing. Each is told as a sentence."""
    assert BY_RULE[rule], "no broken device for it"
    assert RULES[rule].text.endswith(".")


def test_all_findings_are_told_at_once() -> None:
    """A device that breaks several rules; the message has the rules' sentences."""
    with pytest.raises(ConformanceError, match="Accepting breaks 2 rules") as caught:
        check_device(Accepting, skip=["closing", "unplugging"])
    assert {finding.rule for finding in caught.value.findings} == {"alternate-settings", "unknown-endpoints"}
    assert RULES["unknown-endpoints"].text in str(caught.value)
