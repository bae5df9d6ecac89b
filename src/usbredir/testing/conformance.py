"""A conformance kit: whether a device keeps the rules that hosts rely on.

::

    def test_my_device():
        check_device(MyDevice)

Each rule of :data:`RULES` is checked with a fresh device, in a thread of its own, so that one that blocks ends the rule
and not the test. Rules are those of :mod:`usbredir.device`, and of USB for what devices answer to standard requests.

Source: docs/virtual.md, "Your own UsbDevice"; USB 2.0, chapter 9.
"""

from __future__ import annotations

import contextlib
import struct
import threading
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field

from ..descriptors import Configuration, Endpoint, parse_configuration
from ..device import UsbDevice, may_be_reset
from ..errors import DeviceError, DeviceLostError
from ..proto import Speed, Status, TransferType
from ._bench import GET_DESCRIPTOR, SHORT_TIMEOUT, STEP, Bench, Broken, Finding, NotChecked, Watched

__all__ = ["RULES", "ConformanceError", "Finding", "Report", "check_device"]

BULK, INTERRUPT, ISO = TransferType.BULK, TransferType.INTERRUPT, TransferType.ISO
IN, OUT = 0x80, 0
DEVICE, CONFIGURATION, STRING = 1, 2, 3
INTERFACE_DESCRIPTOR, ENDPOINT_DESCRIPTOR = 4, 5
UNUSED_VALUE = 0xEE
"""A request, descriptor type or alternate setting that devices hardly have."""
GET_STATUS, SET_FEATURE, GET_CONFIGURATION, GET_INTERFACE = 0, 3, 8, 10

MEMBERS = [name for name in vars(UsbDevice) if not name.startswith("_")]
CONTROL_SIZES = {Speed.LOW: (8,), Speed.FULL: (8, 16, 32, 64), Speed.HIGH: (64,), Speed.SUPER: (9,)}
"""bMaxPacketSize0 by speed. Source: USB 2.0, 5.5.3; USB 3.2, 9.6.1."""
BULK_SIZES = {Speed.LOW: (), Speed.FULL: (8, 16, 32, 64), Speed.HIGH: (512,), Speed.SUPER: (1024,)}
"""Packet sizes of bulk endpoints. Source: USB 2.0, 5.8.3; USB 3.2, 9.6.6."""
LARGEST = {
    INTERRUPT: {Speed.LOW: 8, Speed.FULL: 64, Speed.HIGH: 1024, Speed.SUPER: 1024},
    ISO: {Speed.LOW: -1, Speed.FULL: 1023, Speed.HIGH: 1024, Speed.SUPER: 1024},
}
"""The largest packets of periodic endpoints; -1: there may be none. Source: USB 2.0, 5.6.3 and 5.7.3."""

LIMIT = 5
"""Times *patience* that a whole rule may take."""


@dataclass(frozen=True)
class Report:
    """What was checked.

    Attributes:
        passed: names of the rules that the device keeps.
        not_checked: rules that could not be checked or were not to be, and why.
    """

    passed: tuple[str, ...]
    not_checked: dict[str, str]


class ConformanceError(AssertionError):
    """A device breaks rules.

    Attributes:
        findings: each rule, what was done, and what was seen.
    """

    def __init__(self, device: str, findings: list[Finding]) -> None:
        lines = [f"{one}\n    the rule: {RULES[one.rule].text}" for one in findings]
        count = len({one.rule for one in findings})
        super().__init__(f"{device} breaks {count} rule{'s'[: count > 1]} of USB devices:\n" + "\n".join(lines))
        self.findings = findings


@dataclass(frozen=True)
class Rule:
    """One rule.

    Attributes:
        text: the rule, a sentence.
        check: checks it; raises Broken or NotChecked.
        destructive: checking changes what the device holds or how it is set up.
    """

    text: str
    check: Callable[[Bench], None]
    destructive: bool


RULES: dict[str, Rule] = {}
"""The rules by name, in the order in which they are checked."""


@dataclass(frozen=True)
class _Run:
    """One call of check_device: what is to be done, and what came of it."""

    make_device: Callable[[], UsbDevice]
    avoid: frozenset[int]
    skip: frozenset[str]
    patience: float
    passed: list[str] = field(default_factory=list)
    not_checked: dict[str, str] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)


def check_device(
    make_device: Callable[[], UsbDevice],
    *,
    destructive: bool = True,
    avoid: Collection[int] = (),
    skip: Collection[str] = (),
    patience: float = 5.0,
) -> Report:
    """Put a device through every rule of :data:`RULES`.

    Args:
        make_device: makes a fresh device, for each rule; the kit closes it. A class will do.
        destructive: False: nothing is written, reset, configured or halted, only read.
        avoid: addresses of endpoints on which no transfers are to be made.
        skip: names of rules that are not to be checked.
        patience: seconds after which something that must happen counts as not happening.

    Returns:
        What was checked.

    Raises:
        ConformanceError: the device breaks rules; it names each, what was done and what was seen.
        ValueError: *skip* names no rule.

    Threads: any. What *make_device* raises passes through.
    """
    unknown = set(skip) - set(RULES)
    if unknown:
        raise ValueError(f"no such rule: {', '.join(sorted(unknown))}; the rules are {', '.join(RULES)}")
    run = _Run(make_device, frozenset(avoid), frozenset(skip), patience)
    for name, rule in RULES.items():
        if name in run.skip:
            run.not_checked[name] = "it is not to be checked"
        elif rule.destructive and not destructive:
            run.not_checked[name] = "it is destructive"
        else:
            _check_rule(name, rule, run)
        if name == "interface" and run.findings:
            break  # nothing else can be tried
    if run.findings:
        raise ConformanceError(getattr(make_device, "__name__", repr(make_device)), run.findings)
    return Report(tuple(run.passed), run.not_checked)


def _check_rule(name: str, rule: Rule, run: _Run) -> None:
    """Check one rule with a device of its own, in a thread of its own."""
    bench = Bench(run.make_device(), run.avoid, run.patience)
    problems: list[tuple[str, str]] = []
    reasons: list[str] = []

    def check() -> None:
        try:
            rule.check(bench)
        except Broken as broken:
            problems.append((broken.did, broken.saw))
        except NotChecked as reason:
            reasons.append(str(reason))
        except Exception as error:
            problems.append((bench.doing, f"it raised {error!r}"))
        bench.doing = "closed the device"
        try:
            bench.device.close()
        except Exception as error:
            problems.append(("closed the device", f"it raised {error!r}"))

    thread = threading.Thread(target=check, name=f"rule {name}", daemon=True)
    thread.start()
    thread.join(LIMIT * run.patience)
    if thread.is_alive():
        problems.append((bench.doing, f"it did not return within {LIMIT * run.patience:g} s"))
    problems += bench.problems
    run.findings.extend(Finding(name, did, saw) for did, saw in problems)
    if reasons and not problems:
        run.not_checked[name] = reasons[0]
    elif not problems:
        run.passed.append(name)


def _rule(*, destructive: bool = False) -> Callable[[Callable[[Bench], None]], Callable[[Bench], None]]:
    """The function checks a rule, named as it is and told in its docstring."""

    def add(check: Callable[[Bench], None]) -> Callable[[Bench], None]:
        name = check.__name__.lstrip("_").replace("_", "-")
        RULES[name] = Rule(" ".join((check.__doc__ or "").split()), check, destructive)
        return check

    return add


def _expect(holds: bool, did: str, saw: str) -> None:
    if not holds:
        raise Broken(did, saw)


# ================================================================ description


@_rule()
def _interface(bench: Bench) -> None:
    """A device has every member of UsbDevice, and its speed is a Speed."""
    missing = [name for name in MEMBERS if not hasattr(bench.device, name)]
    _expect(not missing, "looked at the device", f"it has no {', '.join(missing)}")
    speed = bench.device.speed
    _expect(isinstance(speed, Speed), "read speed", f"{speed!r}")


@_rule()
def _device_descriptor(bench: Bench) -> None:
    """The device descriptor has 18 bytes, a packet size that fits the speed, and stays the same."""
    raw, did = bench.device.device_descriptor, "read device_descriptor"
    _expect(isinstance(raw, bytes), did, f"it is a {type(raw).__name__}, not bytes")
    _expect(len(raw) == 18 and raw[:2] == b"\x12\x01", did, f"{len(raw)} bytes that begin with {raw[:2].hex(' ')}")
    speed = bench.device.speed
    _expect(raw[7] in CONTROL_SIZES.get(speed, range(256)), did, f"bMaxPacketSize0 is {raw[7]} at speed {speed.name}")
    _expect(raw[17] > 0, did, "bNumConfigurations is 0")
    _expect(bench.device.device_descriptor == raw, f"{did} again", "it has changed")


@_rule()
def _configuration_descriptor(bench: Bench) -> None:
    """Configuration descriptors are as long as they say, and what they count is there."""
    for did, raw in _configurations(bench):
        for problem in _structure_problems(raw):
            raise Broken(did, problem)


@_rule()
def _endpoint_descriptors(bench: Bench) -> None:
    """Endpoint descriptors have addresses, packet sizes and intervals that USB allows at the speed."""
    for did, raw in _configurations(bench):
        for problem in _endpoint_problems(parse_configuration(raw), bench.device.speed):
            raise Broken(did, problem)


def _configurations(bench: Bench) -> Iterator[tuple[str, bytes]]:
    """(how it was read, configuration descriptor): the active one, and those that the device answers."""
    raw = bench.device.configuration_descriptor
    if raw is not None:
        yield "read configuration_descriptor", raw
    for index in range(bench.device.device_descriptor[17]):
        answer = bench.descriptor(CONFIGURATION, index)
        if answer is not None:
            yield f"asked for configuration descriptor {index}", answer


def _structure_problems(raw: bytes) -> Iterator[str]:
    if len(raw) < 9 or raw[:2] != b"\x09\x02":
        yield f"it begins with {raw[:9].hex(' ')}"
        return
    total, count, value, attributes = struct.unpack_from("<2xHBBxB", raw)
    if total != len(raw):
        yield f"wTotalLength is {total}, but there are {len(raw)} bytes"
    pieces = list(_pieces(raw))
    used = sum(map(len, pieces))
    if used != len(raw):
        yield f"at byte {used} begins a descriptor that does not fit: {raw[used : used + 2].hex(' ')}"
        return
    try:
        configuration = parse_configuration(raw)
    except ValueError as error:
        yield str(error)
        return
    if not value:
        yield "bConfigurationValue is 0, which means unconfigured"
    if not attributes & 0x80:
        yield f"bmAttributes is 0x{attributes:02x}: bit 7 has to be set"
    if count != len(configuration.numbers()):
        yield f"bNumInterfaces is {count}, but there are {len(configuration.numbers())}"
    yield from _interface_problems(configuration, [p[4] for p in pieces if p[1] == INTERFACE_DESCRIPTOR and len(p) > 8])


def _pieces(raw: bytes) -> Iterator[bytes]:
    position = 0
    while position + 2 <= len(raw) and 2 <= raw[position] <= len(raw) - position:
        yield raw[position : position + raw[position]]
        position += raw[position]


def _interface_problems(configuration: Configuration, announced: list[int]) -> Iterator[str]:
    """*announced* has bNumEndpoints of each alternate setting."""
    settings = [(interface.number, interface.alternate) for interface in configuration.interfaces]
    owners: dict[int, int] = {}
    for interface, count in zip(configuration.interfaces, announced, strict=True):
        name = f"alternate setting {interface.alternate} of interface {interface.number}"
        addresses = [endpoint.address for endpoint in interface.endpoints]
        if settings.count((interface.number, interface.alternate)) > 1:
            yield f"{name} is there more than once"
        if (interface.number, 0) not in settings:
            yield f"interface {interface.number} has no alternate setting 0"
        if count != len(addresses):
            yield f"{name}: bNumEndpoints is {count}, but there are {len(addresses)}"
        for address in addresses:
            if addresses.count(address) > 1:
                yield f"{name} has endpoint 0x{address:02x} more than once"
            if owners.setdefault(address, interface.number) != interface.number:
                yield f"endpoint 0x{address:02x} belongs to interfaces {owners[address]} and {interface.number}"


def _endpoint_problems(configuration: Configuration, speed: Speed) -> Iterator[str]:
    for interface in configuration.interfaces:
        for endpoint in interface.endpoints:
            for problem in _problems_of_endpoint(endpoint, speed):
                yield f"endpoint 0x{endpoint.address:02x} of alternate setting {interface.alternate}: {problem}"


def _problems_of_endpoint(endpoint: Endpoint, speed: Speed) -> Iterator[str]:
    size, kind = endpoint.raw_max_packet_size & 0x7FF, endpoint.type
    if endpoint.address & 0x70 or not endpoint.address & 0x0F:
        yield "its address is not possible"
    if endpoint.raw_max_packet_size >> 11 and (speed is not Speed.HIGH or kind not in (INTERRUPT, ISO)):
        yield f"wMaxPacketSize is 0x{endpoint.raw_max_packet_size:04x}: above 0x7ff only if periodic at high speed"
    if kind is BULK and size not in BULK_SIZES.get(speed, range(2048)):
        yield f"packets of {size} bytes are not possible for bulk at speed {speed.name}"
    if kind in LARGEST and size > LARGEST[kind].get(speed, 1024):
        yield f"packets of {size} bytes are not possible for {kind.name.lower()} at speed {speed.name}"
    if kind in LARGEST and not 1 <= endpoint.interval <= (255 if speed in (Speed.LOW, Speed.FULL) else 16):
        yield f"bInterval is {endpoint.interval}"
    if speed is Speed.SUPER and not endpoint.companion:
        yield "no SuperSpeed companion descriptor follows it"


# ================================================================ standard requests


@_rule()
def _get_descriptor(bench: Bench) -> None:
    """GET_DESCRIPTOR gives what the properties say, cut to the length asked for."""
    raw = bench.device.device_descriptor
    if bench.descriptor(DEVICE, length=18) is None:
        raise NotChecked("the device does not answer GET_DESCRIPTOR")
    for length in (8, 18, 255):
        answer = bench.descriptor(DEVICE, length=length)
        did = f"asked for {length} bytes of the device descriptor"
        _expect(answer == raw[:length], did, f"{_hex(answer)}, which is not that of device_descriptor")
    active = bench.device.configuration_descriptor
    answers = [bench.descriptor(CONFIGURATION, index) for index in range(raw[17])]
    if active is not None and None not in answers:
        _expect(
            active in answers, "asked for all configuration descriptors", "none is that of configuration_descriptor"
        )


@_rule()
def _strings(bench: Bench) -> None:
    """String descriptors begin with their length and type and hold UTF-16; number 0 holds language ids."""
    languages = bench.descriptor(STRING, 0, 255)
    if languages is None:
        raise NotChecked("the device has no strings")
    named = [index for index in bench.device.device_descriptor[14:17] if index]
    language = int.from_bytes(languages[2:4], "little")
    for index in [0, *named]:
        raw, did = bench.descriptor(STRING, index, 255, language=language), f"asked for string descriptor {index}"
        if raw is None:
            raise Broken(did, "the device does not answer, although its device descriptor names it")
        right = len(raw) >= 2 and raw[0] == len(raw) and raw[1] == STRING and not len(raw) % 2
        _expect(right and (index > 0 or len(raw) > 2), did, _hex(raw))


@_rule()
def _state_requests(bench: Bench) -> None:
    """GET_CONFIGURATION, GET_INTERFACE and GET_STATUS tell how the device is set up, with 1, 1 and 2 bytes."""
    configuration = bench.configuration()
    requests = [
        ("GET_CONFIGURATION", (0x80, GET_CONFIGURATION, 0, 0, 1), bytes([configuration.value])),
        ("GET_STATUS of the device", (0x80, GET_STATUS, 0, 0, 2), None),
    ]
    requests += [
        (f"GET_INTERFACE of interface {number}", (0x81, GET_INTERFACE, 0, number, 1), b"\0")
        for number in configuration.numbers()
    ]
    for did, request, expected in requests:
        watched = bench.control(*request)
        if watched.status == Status.SUCCESS:
            data = bytes(watched.transfer.data)
            _expect(len(data) == request[4] and expected in (None, data), f"sent {did}", _hex(data))


@_rule()
def _unknown_requests(bench: Bench) -> None:
    """A request or descriptor that the device does not have is refused with STALL."""
    requests = {"an unknown standard request": UNUSED_VALUE, "GET_DESCRIPTOR of an unknown type": GET_DESCRIPTOR}
    for did, request in requests.items():
        watched = bench.control(0x80, request, UNUSED_VALUE << 8, 0, 64)
        _expect(watched.status == Status.STALL, f"sent {did}", f"it ended with {_name(watched.status)}")


# ================================================================ setting up


@_rule()
def _claims(bench: Bench) -> None:
    """A device can be claimed, released and claimed again; a release of what is not claimed is harmless."""
    device = bench.device
    for keep in (False, True):
        for call in ("claim", "release", "release"):
            bench.doing = f"called {call}()"
            device.claim() if call == "claim" else device.release(give_back=keep, reset=False)
    device.claim()
    _expect(bench.finish(bench.start_reading()).refused is None, "claimed it again, and submitted", "it was refused")


@_rule(destructive=True)
def _configuration_changes(bench: Bench) -> None:
    """Each configuration can be selected and is then the active one; an unknown one is refused and changes nothing."""
    device, active = bench.device, bench.configuration().value
    values = [raw[5] for _, raw in _configurations(bench)]
    bench.doing = f"called set_configuration({UNUSED_VALUE})"
    if UNUSED_VALUE not in values:
        status = device.set_configuration(UNUSED_VALUE)
        _expect(status != Status.SUCCESS, bench.doing, "SUCCESS, although there is none with this value")
        _expect(_active(device) == active, bench.doing, "the active configuration has changed")
    for value in [*dict.fromkeys(values), active]:
        bench.doing = f"called set_configuration({value})"
        status = device.set_configuration(value)
        _expect(status == Status.SUCCESS, bench.doing, _name(status))
        _expect(_active(device) == value, bench.doing, f"configuration {_active(device)} is active")
    bench.doing = "called set_configuration(0)"
    if device.set_configuration(0) == Status.SUCCESS:
        _expect(_active(device) == 0, bench.doing, f"configuration {_active(device)} is active")


def _active(device: UsbDevice) -> int:
    raw = device.configuration_descriptor
    return 0 if raw is None else raw[5]


@_rule(destructive=True)
def _alternate_settings(bench: Bench) -> None:
    """Each alternate setting can be selected, has its endpoints then and no others; unknown ones are refused."""
    bench.device.claim()
    configuration = bench.configuration()
    for interface in configuration.interfaces:
        did = f"selected alternate setting {interface.alternate} of interface {interface.number}"
        status = bench.select(interface.number, interface.alternate)
        _expect(status == Status.SUCCESS, did, _name(status))
        watched = bench.control(0x81, GET_INTERFACE, 0, interface.number, 1)
        if watched.status == Status.SUCCESS:
            data = bytes(watched.transfer.data)
            _expect(data == bytes([interface.alternate]), f"{did}, then sent GET_INTERFACE", _hex(data))
        present = {endpoint.address for endpoint in interface.endpoints}
        for other in configuration.interfaces:
            for endpoint in other.endpoints:
                if other.number == interface.number and endpoint.address not in present:
                    _expect_no_endpoint(bench, endpoint.type, endpoint.address, did)
    for number, alternate in ((configuration.numbers()[:1] or [0])[0], UNUSED_VALUE), (UNUSED_VALUE, 0):
        did = f"selected alternate setting {alternate} of interface {number}, which does not exist"
        _expect(bench.select(number, alternate) != Status.SUCCESS, did, "SUCCESS")


def _expect_no_endpoint(bench: Bench, kind: TransferType, address: int, did: str) -> None:
    lengths = [8] if kind is ISO else []
    watched = bench.start(kind, address, 8, data=b"" if address & IN else bytes(8), iso_lengths=lengths)
    bench.finish(watched)
    _expect(watched.status != Status.SUCCESS, f"{did}, and submitted {watched}", "SUCCESS without such an endpoint")


@_rule()
def _unknown_endpoints(bench: Bench) -> None:
    """What is asked of an endpoint that does not exist is refused, or fails."""
    bench.device.claim()
    known = {e.address for interface in bench.configuration().interfaces for e in interface.endpoints}
    address = next((address for address in range(0x8F, 0x80, -1) if address not in known), 0)
    if not address:
        raise NotChecked("the device has every IN endpoint that there can be")
    _expect_no_endpoint(bench, BULK, address, "took an address that is not in use")
    bench.doing = f"called clear_halt(0x{address:02x})"
    _expect(bench.device.clear_halt(address) != Status.SUCCESS, bench.doing, "SUCCESS without such an endpoint")


@_rule()
def _bulk_streams(bench: Bench) -> None:
    """alloc_streams grants at most what was asked for; where there are no streams it fails and grants none."""
    bench.device.claim()
    endpoints = [endpoint for endpoint in bench.endpoints(BULK) if not endpoint.max_streams]
    if not endpoints:
        raise NotChecked("no bulk endpoint without streams")
    status, granted = bench.device.alloc_streams([endpoints[0].address], 2)
    did = f"called alloc_streams([0x{endpoints[0].address:02x}], 2), an endpoint without streams"
    _expect(status != Status.SUCCESS and not granted, did, f"{_name(status)}, {granted} streams")


@_rule(destructive=True)
def _reset(bench: Bench) -> None:
    """After a reset the device is as it was: descriptors and configuration."""
    device = bench.device
    if not may_be_reset(device.device_descriptor):
        raise NotChecked("the device does not survive a reset, see DO_NOT_RESET")
    device.claim()
    before = device.device_descriptor, device.configuration_descriptor
    bench.doing = "called reset()"
    device.reset()
    _expect((device.device_descriptor, device.configuration_descriptor) == before, "reset it", "it is another device")
    _expect(bench.finish(bench.start_reading()).refused is None, "reset it, and submitted", "it was refused")


# ================================================================ transfers


@_rule()
def _control_transfers(bench: Bench) -> None:
    """Control transfers complete, many at a time and in the order of their submission."""
    done: list[Watched] = []
    started = [bench.start_reading(then=done.append) for _ in range(8)]
    for watched in started:
        bench.finish(watched)
    _expect(done == started, "submitted 8 control transfers", "they completed in another order")


@_rule()
def _resubmission(bench: Bench) -> None:
    """A transfer may be submitted again from its completion."""
    left = 3

    def again(watched: Watched) -> None:
        nonlocal left
        if left:
            left -= 1
            bench.submit(watched)

    watched = bench.finish(bench.start_reading(then=again))
    _expect(not left and watched.refused is None, "submitted a transfer from its completion", "it was refused")


@_rule(destructive=True)
def _transfers(bench: Bench) -> None:
    """Transfers on endpoints complete, those of an endpoint that succeed in the order of their submission."""
    for endpoint in _every_endpoint(bench, BULK, INTERRUPT, ISO):
        done: list[Watched] = []
        started = [bench.start_on(endpoint, timeout=SHORT_TIMEOUT) for _ in range(4)]
        for watched in started:
            watched.then = done.append
        for watched in started:
            _expect(watched.refused is None, f"submitted {watched}", f"refused with {_name(watched.status)}")
            bench.finish(watched)
        in_order = sorted(done, key=started.index)
        succeeded = [[w for w in those if w.status == Status.SUCCESS] for those in (done, in_order)]
        _expect(succeeded[0] == succeeded[1], f"submitted 4 times {started[0]}", "they completed in another order")


def _every_endpoint(bench: Bench, *kinds: TransferType, direction: int | None = None) -> Iterator[Endpoint]:
    """Claim the device and select alternate settings, one after the other; the endpoints of each."""
    bench.device.claim()
    found = False
    for interface in bench.configuration().interfaces:
        if bench.select(interface.number, interface.alternate) == Status.SUCCESS:
            for endpoint in bench.endpoints(*kinds, direction=direction):
                if endpoint.interface == interface.number:
                    found = True
                    yield endpoint
    if not found:
        raise NotChecked("no such endpoint")


def _reading_endpoints(bench: Bench) -> list[Endpoint]:
    """IN endpoints of the present alternate settings. Claims the device. Raises NotChecked."""
    bench.device.claim()
    endpoints = bench.endpoints(BULK, INTERRUPT, direction=IN)
    if not endpoints:
        raise NotChecked("no bulk or interrupt IN endpoint")
    return endpoints


@_rule()
def _timeouts(bench: Bench) -> None:
    """A transfer that nobody answers completes with TIMEOUT when its time is over, not earlier."""
    for endpoint in _reading_endpoints(bench):
        begin = time.monotonic()
        watched = bench.finish(bench.start_on(endpoint, timeout=SHORT_TIMEOUT))
        took = time.monotonic() - begin
        if watched.status == Status.TIMEOUT:
            # Clocks of kernels and of this process need not agree to the millisecond.
            _expect(took >= SHORT_TIMEOUT / 2, f"submitted {watched}", f"TIMEOUT after {took:.3f} s")
        _expect(watched.status != Status.CANCELLED, f"submitted {watched}", "CANCELLED, although nobody did")


@_rule()
def _cancellation(bench: Bench) -> None:
    """A cancelled transfer completes; cancelling twice, or what has completed, is harmless."""
    for endpoint in _reading_endpoints(bench):
        watched = bench.start_on(endpoint)
        bench.cancel(watched)
        bench.cancel(watched)
        _finish_cancelled(bench, watched)
        waiting = bench.start_on(endpoint)
        if not bench.run(2 * STEP, waiting):
            bench.cancel(waiting)
            _finish_cancelled(bench, waiting)
            ends = (Status.CANCELLED, Status.SUCCESS)
            _expect(waiting.status in ends, f"cancelled {waiting}, which waited", _name(waiting.status))
    watched = bench.finish(bench.start_reading(then=bench.cancel))
    bench.cancel(watched)
    bench.device.handle_events(0)
    _expect(bench.finish(bench.start_reading()).refused is None, "cancelled what had completed", "the next was refused")


def _finish_cancelled(bench: Bench, watched: Watched) -> None:
    if not bench.run(bench.patience, watched):
        raise Broken(f"submitted {watched} and cancelled it", f"it did not complete within {bench.patience:g} s")
    bench.cancel(watched)
    bench.device.handle_events(0)
    _expect(watched.status != Status.TIMEOUT, f"cancelled {watched}", "TIMEOUT, although it has none")


@_rule(destructive=True)
def _halts(bench: Bench) -> None:
    """A halted endpoint stalls until the halt is cleared, and GET_STATUS tells; clear_halt works on any endpoint."""
    _reading_endpoints(bench)
    checked = False
    for endpoint in bench.endpoints(BULK, INTERRUPT):
        status = bench.device.clear_halt(endpoint.address)
        _expect(status == Status.SUCCESS, f"called clear_halt(0x{endpoint.address:02x})", _name(status))
        checked = (bool(endpoint.address & IN) and _check_halt(bench, endpoint)) or checked
    if not checked:
        raise NotChecked("no IN endpoint can be halted by SET_FEATURE")


def _check_halt(bench: Bench, endpoint: Endpoint) -> bool:
    """False: the endpoint does not take part."""
    address = endpoint.address
    if _status_of_short_transfer(bench, endpoint) == Status.STALL:
        return False
    if bench.control(0x02, SET_FEATURE, 0, address).status != Status.SUCCESS:
        return False
    status = _status_of_short_transfer(bench, endpoint)
    _expect(status == Status.STALL, f"halted endpoint 0x{address:02x}, and read from it", _name(status))
    told = bench.control(0x82, GET_STATUS, 0, address, 2)
    if told.status == Status.SUCCESS:
        data = bytes(told.transfer.data)
        _expect(data == b"\x01\x00", f"halted endpoint 0x{address:02x}, and sent GET_STATUS", _hex(data))
    bench.device.clear_halt(address)
    status = _status_of_short_transfer(bench, endpoint)
    _expect(status != Status.STALL, f"cleared the halt of endpoint 0x{address:02x}, and read from it", "STALL")
    return True


def _status_of_short_transfer(bench: Bench, endpoint: Endpoint) -> int:
    return bench.finish(bench.start_on(endpoint, timeout=SHORT_TIMEOUT)).status


# ================================================================ events and threads


@_rule()
def _waiting(bench: Bench) -> None:
    """handle_events returns when its time is over, and when another thread calls wake."""
    for timeout in (0.0, STEP):
        bench.doing = f"called handle_events({timeout})"
        did, began = bench.doing, time.monotonic()
        if not bench.in_thread(lambda t=timeout: bench.device.handle_events(t)):  # type: ignore[misc]
            raise Broken(did, f"it did not return within {time.monotonic() - began:.1f} s")
    if not bench.in_thread(lambda: bench.device.handle_events(None), bench.device.wake):
        raise Broken("called handle_events(None), and wake() from another thread", "it did not return")


@_rule()
def _submission_from_other_threads(bench: Bench) -> None:
    """A thread that waits in handle_events completes what other threads submit."""
    device, stop = bench.device, threading.Event()

    def handle() -> None:
        while not stop.is_set():
            device.handle_events(None)

    def use() -> None:
        for _ in range(3):
            stop.wait(STEP)  # so that the other thread is probably waiting
            watched = bench.start_reading()
            if not watched.done.wait(bench.patience / 2):  # earlier than the other thread is given up
                bench.problem("submitted a transfer while another thread was in handle_events(None)", "it never ended")
                break
        stop.set()

    user = threading.Thread(target=use, daemon=True)
    user.start()
    if not bench.in_thread(handle, lambda: device.wake() if stop.is_set() else None):
        raise Broken("called handle_events(None), and submit() from another thread", "it does not return")
    user.join(bench.patience)


@_rule()
def _polling(bench: Bench) -> None:
    """An event loop that follows pollfds and next_timeout misses nothing."""
    device = bench.device
    for fd, events in device.pollfds():
        _expect(fd >= 0 and events > 0, "called pollfds()", f"({fd}, {events})")
    bench.finish_by_polling(bench.start_reading())
    with contextlib.suppress(NotChecked):
        for endpoint in _reading_endpoints(bench):
            bench.finish_by_polling(bench.start_on(endpoint, timeout=SHORT_TIMEOUT))
            cancelled = bench.start_on(endpoint)
            bench.in_thread(lambda c=cancelled: bench.cancel(c))  # type: ignore[misc]
            bench.finish_by_polling(cancelled)


@_rule()
def _completions_hold_no_locks(bench: Bench) -> None:
    """While a completion runs, it and other threads can submit, cancel and wake."""
    others: list[Watched] = []

    def submit_and_cancel() -> None:
        others.append(bench.start_reading())
        bench.cancel(others[-1])
        bench.device.wake()

    def then(watched: Watched) -> None:
        submit_and_cancel()
        if not bench.in_thread(submit_and_cancel):
            bench.problem("submitted, cancelled and woke from another thread during a completion", "it blocks")

    bench.finish(bench.start_reading(then=then))
    for watched in others:
        bench.finish(watched)


# ================================================================ the end


@_rule()
def _closing(bench: Bench) -> None:
    """close completes everything, can be called again, and nothing can be submitted afterwards."""
    device = bench.device
    device.claim()
    waiting = [bench.start_on(endpoint) for endpoint in bench.endpoints(BULK, INTERRUPT, direction=IN)]
    waiting.append(bench.start_reading())
    bench.doing = "closed the device with transfers in flight"
    device.close()
    for watched in waiting:
        _expect(watched.done.is_set(), f"submitted {watched}, then closed the device", "it has not completed")
    bench.doing = "closed the device again"
    device.close()
    late = _submitted_late(bench)
    _expect(late != Status.SUCCESS, "submitted a transfer to a closed device", "it was accepted")
    for watched in waiting:
        bench.cancel(watched)
    bench.doing = "called wake() and handle_events(0) of a closed device"
    device.wake()
    device.handle_events(0)


def _submitted_late(bench: Bench) -> int:
    """The status of a submit when there is no device any more; a DeviceError is as good as IOERROR."""
    try:
        watched = bench.start_reading()
    except DeviceError:
        return Status.IOERROR
    return Status.SUCCESS if watched.refused is None else watched.refused


@_rule()
def _unplugging(bench: Bench) -> None:
    """When the device is gone transfers end with loss of the device, claim raises DeviceLostError, and it says so."""
    device = bench.device
    unplug: Callable[[], object] | None = getattr(device, "unplug", None)
    if unplug is None:
        raise NotChecked("the device has no method unplug()")
    device.claim()
    waiting = [bench.start_on(endpoint) for endpoint in bench.endpoints(BULK, INTERRUPT, direction=IN)]
    waiting.append(bench.start_reading())
    bench.doing = "called unplug()"
    unplug()
    for watched in waiting:
        bench.finish(watched)
        # It may have ended before.
        lost = watched.transfer.device_lost or watched.status in (Status.SUCCESS, Status.STALL, Status.BABBLE)
        _expect(lost, f"submitted {watched}, then unplugged", f"{_name(watched.status)} without loss of the device")
    _expect(device.lost, "unplugged the device", "lost is not True")
    late = _submitted_late(bench)
    _expect(late != Status.SUCCESS, "submitted a transfer to an unplugged device", "it was accepted")
    try:
        device.claim()
    except DeviceLostError:
        return
    raise Broken("claimed an unplugged device", "no DeviceLostError")


def _hex(data: bytes | None) -> str:
    return "no answer" if data is None else f"{len(data)} bytes: {data[:32].hex(' ')}"


def _name(status: int) -> str:
    return Status(status).name if status in Status._value2member_map_ else repr(status)
