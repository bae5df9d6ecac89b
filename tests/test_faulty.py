"""Faulty: each fault by itself with a clock that is set, halts, order, and that a seed gives the same faults again."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from usbredir.device import Transfer, UsbDevice
from usbredir.errors import DeviceLostError
from usbredir.proto import Speed, Status, TransferType
from usbredir.testing import linked_pair
from usbredir.transport import Poller
from usbredir.virtual import Faulty, LoopbackDevice

PATIENCE = 60.0
CONTROL, BULK, INTERRUPT, ISO = TransferType.CONTROL, TransferType.BULK, TransferType.INTERRUPT, TransferType.ISO
CLEAR_HALT = (0x02, 1, 0)


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now


class Rig:
    """A faulty LoopbackDevice, and what completed."""

    def __init__(self, **faults: Any) -> None:
        self.clock = Clock()
        self.loopback = LoopbackDevice(clock=self.clock, iso_period=0)
        self.device = Faulty(self.loopback, clock=self.clock, **faults)
        self.done: list[Transfer] = []

    def start(self, endpoint: int, length: int = 64, *, data: bytes = b"", **options: Any) -> Transfer:
        options.setdefault("kind", BULK)
        transfer = Transfer(
            endpoint=endpoint, length=len(data) or length, callback=self.done.append, data=data, **options
        )
        assert self.device.submit(transfer) == Status.SUCCESS
        assert transfer not in self.done, "completed inside submit"
        return transfer

    def run(self) -> None:
        """Handle events while there is something to do now."""
        for _ in range(100):
            self.device.handle_events(0)
            if self.device.next_timeout() != 0:
                return
        raise AssertionError("there is always something to do")

    def transfer(self, endpoint: int, length: int = 64, **options: Any) -> Transfer:
        """A transfer that has completed."""
        transfer = self.start(endpoint, length, **options)
        self.run()
        assert self.done.count(transfer) == 1
        return transfer

    def status(self, endpoint: int, length: int = 64, **options: Any) -> Status:
        return Status(self.transfer(endpoint, length, **options).status)

    def control(self, *setup: int, length: int = 0, data: bytes = b"") -> Transfer:
        return self.transfer(setup[0] & 0x80, length, data=data, kind=CONTROL, setup=setup)


@pytest.fixture
def make() -> Iterator[Callable[..., Rig]]:
    """Rigs that are closed, after which every transfer has completed once."""
    rigs: list[Rig] = []

    def make_rig(**faults: Any) -> Rig:
        rigs.append(Rig(**faults))
        return rigs[-1]

    yield make_rig
    for rig in rigs:
        rig.device.close()
        assert len(rig.done) == len(set(rig.done))


# ================================================================ arguments


@pytest.mark.parametrize(
    ("faults", "text"),
    [
        ({"stall": 1.5}, "stall is a probability from 0 to 1, not 1.5"),
        ({"drop": -0.1}, "drop is a probability"),
        ({"babble": "often"}, "babble is a probability"),
        ({"corrupt": {0x81: 2}}, "corrupt is a probability"),
        ({"stall": {0x80: 1}}, "stall by endpoint: 128 is no address; 0 is for control"),
        ({"stall": {0x91: 1}}, "stall by endpoint: 145 is no address"),
        ({"drop": {"0x81": 1}}, "drop by endpoint: '0x81' is no address"),
        ({"delay": -1}, "delay is seconds"),
        ({"delay": (2, 1)}, "delay is seconds, or the least and the most of them, not"),
        ({"delay": {0x81: "long"}}, "delay is seconds"),
        ({"delay": {0x100: 1}}, "delay by endpoint: 256 is no address"),
        ({"unplug_after": -1}, "unplug_after is a number of transfers, not -1"),
    ],
)
def test_what_makes_no_sense_is_refused(faults: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Faulty(LoopbackDevice(), **faults)


def test_it_is_a_usb_device(make: Callable[..., Rig]) -> None:
    """With the description of the device that it wraps."""
    rig = make()
    assert isinstance(rig.device, UsbDevice)
    assert rig.device.device is rig.loopback
    assert "LoopbackDevice" in repr(rig.device)
    assert rig.device.speed is Speed.HIGH
    assert rig.device.device_descriptor == rig.loopback.device_descriptor
    assert rig.device.configuration_descriptor == rig.loopback.configuration_descriptor
    assert not rig.device.lost


def test_without_faults_everything_works(make: Callable[..., Rig]) -> None:
    rig = make()
    assert rig.status(0x01, data=b"hello") == Status.SUCCESS
    received = rig.transfer(0x81)
    assert (bytes(received.data), received.actual_length) == (b"hello", 5)
    assert bytes(rig.control(0xC0, 1, 7, 0, length=3).data) == b"\7\x08\x09"
    assert rig.device.set_alt_setting(1, 1) == Status.SUCCESS
    iso = rig.transfer(0x84, 128, kind=ISO, iso_lengths=[64, 64])
    assert [len(result.data) for result in iso.iso_results] == [64, 64]
    refused = Transfer(BULK, 0x0E, 4, rig.done.append)
    assert rig.device.submit(refused) == Status.IOERROR
    rig.device.cancel(refused)
    assert rig.loopback.counters["cancelled"] == 0, "it is forgotten"
    assert rig.device.alloc_streams([0x81], 2) == rig.loopback.alloc_streams([0x81], 2)
    assert rig.device.free_streams([0x81]) == rig.loopback.free_streams([0x81])
    assert rig.device.set_configuration(9) == Status.IOERROR
    assert rig.device.set_configuration(2) == Status.SUCCESS
    rig.device.claim()
    rig.device.release(give_back=True)


def test_a_mapping_is_about_its_endpoints_only(make: Callable[..., Rig]) -> None:
    rig = make(stall={0x82: 1.0, 0: 1})
    assert rig.status(0x82) == Status.STALL
    assert rig.control(0xC0, 1, 0, 0, length=4).status == Status.STALL
    assert rig.control(0x40, 2, 0, 0, data=b"x").status == Status.STALL
    assert rig.status(0x02, data=b"x") == Status.SUCCESS


# ================================================================ stalls


def clear_by_call(rig: Rig) -> None:
    assert rig.device.clear_halt(0x82) == Status.SUCCESS


def clear_by_request(rig: Rig) -> None:
    assert rig.control(*CLEAR_HALT, 0x82).status == Status.SUCCESS


CLEARED: list[Callable[[Rig], object]] = [
    clear_by_call,
    clear_by_request,
    lambda rig: rig.device.reset(),
    lambda rig: rig.device.set_configuration(1),
    lambda rig: rig.device.set_alt_setting(0, 0),
    lambda rig: rig.device.release(give_back=True),
]
NOT_CLEARED: list[Callable[[Rig], object]] = [
    lambda rig: rig.device.clear_halt(0x81),
    lambda rig: rig.control(*CLEAR_HALT, 0x02),
    lambda rig: rig.device.set_configuration(7),
    lambda rig: rig.device.set_alt_setting(1, 1),
    lambda rig: rig.device.set_alt_setting(0, 9),
    lambda rig: rig.device.release(give_back=False),
    lambda rig: rig.device.release(give_back=True, reset=False),
]


@pytest.mark.parametrize("clear", CLEARED)
def test_a_stall_halts_until_it_is_cleared(make: Callable[..., Rig], clear: Callable[[Rig], object]) -> None:
    rig = make(stall={0x82: 1.0})
    assert rig.status(0x82) == Status.STALL
    rig.device.set_faults(stall=0)
    assert rig.status(0x82) == Status.STALL
    assert rig.loopback.counters["submitted"] == 0, "the device saw nothing of it"
    clear(rig)
    assert rig.status(0x82) == Status.SUCCESS


@pytest.mark.parametrize("something", NOT_CLEARED)
def test_a_halt_stays(make: Callable[..., Rig], something: Callable[[Rig], object]) -> None:
    rig = make(stall={0x82: 1.0})
    assert rig.status(0x82) == Status.STALL
    rig.device.set_faults(stall=0.0)
    something(rig)
    assert rig.status(0x82) == Status.STALL


def test_a_stalled_control_transfer_halts_nothing(make: Callable[..., Rig]) -> None:
    rig = make(stall={0: 1.0})
    assert rig.control(0xC0, 1, 0, 0, length=4).status == Status.STALL
    rig.device.set_faults(stall=0.0)
    assert rig.control(0xC0, 1, 0, 0, length=4).status == Status.SUCCESS


def test_what_the_device_has_is_not_taken(make: Callable[..., Rig]) -> None:
    """Stalls, babbles and dropped transfers leave data where it is."""
    rig = make()
    rig.transfer(0x01, data=b"kept")
    for babble, stall in (1.0, 0.0), (0.0, 1.0):
        rig.device.set_faults(babble={0x81: babble}, stall={0x81: stall})
        rig.transfer(0x81)
    rig.device.set_faults(babble=0.0, stall=0.0, drop=1.0)
    rig.device.cancel(rig.start(0x81))
    rig.device.set_faults(drop=0.0)
    rig.device.clear_halt(0x81)
    assert bytes(rig.transfer(0x81).data) == b"kept"


# ================================================================ dropped transfers


def test_a_dropped_transfer_waits_for_its_cancellation(make: Callable[..., Rig]) -> None:
    rig = make(drop=1.0)
    transfer = rig.start(0x82)
    rig.run()
    assert not rig.done
    assert rig.device.next_timeout() is None
    rig.device.cancel(transfer)
    assert not rig.done, "completed inside cancel"
    assert rig.device.next_timeout() == 0
    rig.device.cancel(transfer)
    rig.run()
    assert rig.done == [transfer]
    assert (transfer.status, transfer.actual_length, transfer.data) == (Status.CANCELLED, 0, b"")
    rig.device.cancel(transfer)


def test_a_dropped_transfer_times_out(make: Callable[..., Rig]) -> None:
    rig = make(drop=1.0)
    transfer = rig.start(0x82, timeout=2.0)
    rig.run()
    assert rig.device.next_timeout() == 2.0
    rig.clock.now += 1.5
    rig.run()
    assert not rig.done
    rig.clock.now += 0.5
    rig.run()
    assert transfer.status == Status.TIMEOUT


def test_others_go_on(make: Callable[..., Rig]) -> None:
    """A dropped transfer holds no other one of its endpoint back."""
    rig = make(drop={0x82: 1.0})
    rig.start(0x82)
    rig.device.set_faults(drop=0.0)
    assert rig.status(0x82) == Status.SUCCESS


# ================================================================ delays


def test_a_delay(make: Callable[..., Rig]) -> None:
    rig = make(delay=0.5)
    transfer = rig.start(0x82)
    rig.run()
    assert not rig.done
    assert rig.device.next_timeout() == 0.5
    rig.clock.now += 0.4
    rig.run()
    assert not rig.done
    rig.clock.now += 0.125
    assert rig.device.next_timeout() == 0
    rig.run()
    assert rig.done == [transfer]
    assert transfer.status == Status.SUCCESS


def test_delays_are_between_least_and_most(make: Callable[..., Rig]) -> None:
    """And not all the same."""
    rig = make(delay={0x82: (1.0, 3.0)})
    waits = []
    for _ in range(50):
        rig.start(0x82)
        rig.run()
        waits.append(rig.device.next_timeout() or 0.0)
        rig.clock.now += waits[-1] + 1e-6
        rig.run()
        assert len(rig.done) == len(waits)
    assert all(1.0 <= wait <= 3.0 for wait in waits)
    assert max(waits) - min(waits) > 1


def test_transfers_of_an_endpoint_keep_their_order(make: Callable[..., Rig]) -> None:
    rig = make(delay={0x82: (0.0, 1.0)})
    started = [rig.start(0x82) for _ in range(20)]
    rig.clock.now += 2
    rig.device.set_faults(delay=0.0)
    started.append(rig.start(0x82))
    rig.run()
    assert rig.done == started
    assert [int.from_bytes(t.data[:8], "little") for t in rig.done] == list(range(21))


def test_none_overtakes_another(make: Callable[..., Rig]) -> None:
    """Whatever their delays: each is delivered at its time, not before an earlier one."""
    rig = make(delay={0x82: (0.0, 1.0)})
    started = [rig.start(0x82) for _ in range(20)]
    for _ in range(22):
        rig.run()
        rig.clock.now += 0.05
    assert rig.done == started


@pytest.mark.parametrize("begin", ["stalled", "delayed", "cancelled"])
def test_event_loops_are_told(make: Callable[..., Rig], begin: str) -> None:
    """A descriptor is ready when there is something to do that the device does not know of."""
    rig = make(drop={0x81: 1.0}, stall={0x82: 1.0}, delay={0x83: 1.0})
    dropped = rig.start(0x81)
    fds = rig.device.pollfds()
    rig.run()
    assert not Poller().wait(fds, 0)
    actions: dict[str, Callable[[], object]] = {
        "stalled": lambda: rig.start(0x82),
        "delayed": lambda: rig.start(0x83, kind=INTERRUPT),
        "cancelled": lambda: rig.device.cancel(dropped),
    }
    actions[begin]()
    assert Poller().wait(fds, 0)


def test_what_waits_can_be_cancelled_and_time_out(make: Callable[..., Rig]) -> None:
    rig = make(delay=1.0)
    late, cancelled = rig.start(0x82, timeout=0.5), rig.start(0x82)
    rig.device.cancel(cancelled)
    rig.run()
    assert (rig.done, cancelled.status) == ([cancelled], Status.CANCELLED)
    rig.clock.now += 0.75
    rig.run()
    assert (rig.done, late.status) == ([cancelled, late], Status.TIMEOUT)
    assert rig.loopback.counters["submitted"] == 0


def test_the_timeout_begins_with_the_submission(make: Callable[..., Rig]) -> None:
    """The device has what the delay leaves of it."""
    rig = make(delay=1.0)
    transfer = rig.start(0x86, timeout=3.0)
    rig.clock.now += 1.5
    rig.run()
    assert rig.loopback.counters["submitted"] == 1
    assert rig.device.next_timeout() == pytest.approx(1.5)
    rig.clock.now += 1.6
    rig.run()
    assert transfer.status == Status.TIMEOUT


def test_a_transfer_that_comes_due_too_late(make: Callable[..., Rig]) -> None:
    """Its time is over when a later transfer of the endpoint is submitted: it never reaches the device."""
    rig = make(delay={0x82: 1.0})
    transfer = rig.start(0x82, timeout=1.5)
    rig.clock.now += 2
    rig.device.set_faults(delay=0.0)
    rig.transfer(0x82)
    assert transfer.status == Status.TIMEOUT
    assert rig.loopback.counters["submitted"] == 1


def test_what_the_device_refuses_after_a_delay_fails(make: Callable[..., Rig]) -> None:
    rig = make(delay=1.0)
    transfer = rig.start(0x0E)
    rig.clock.now += 2
    rig.run()
    assert (transfer.status, transfer.device_lost) == (Status.IOERROR, False)


def test_other_faults_come_after_the_delay(make: Callable[..., Rig]) -> None:
    rig = make(delay=1.0, stall=1.0)
    rig.start(0x82)
    rig.run()
    assert not rig.done
    rig.clock.now += 1
    rig.run()
    assert rig.done[0].status == Status.STALL


# ================================================================ babble and corruption


def test_a_babble_fills_the_transfer(make: Callable[..., Rig]) -> None:
    rig = make(babble=1.0)
    transfer = rig.transfer(0x81, 100)
    assert (transfer.status, transfer.actual_length, len(transfer.data)) == (Status.BABBLE, 100, 100)
    assert rig.control(0xC0, 1, 0, 0, length=4).status == Status.BABBLE
    assert rig.status(0x02, data=b"x") == Status.SUCCESS, "only a device can babble"


def test_isochronous_babble(make: Callable[..., Rig]) -> None:
    rig = make(babble={0x84: 1.0})
    rig.device.set_alt_setting(1, 1)
    transfer = rig.transfer(0x84, 30, kind=ISO, iso_lengths=[10, 20])
    assert [(r.status, len(r.data)) for r in transfer.iso_results] == [(Status.BABBLE, 10), (Status.BABBLE, 20)]


def flipped(one: bytes, other: bytes) -> int:
    """How many bits differ."""
    assert len(one) == len(other)
    return sum((a ^ b).bit_count() for a, b in zip(one, other, strict=True))


@given(seed=st.integers(0, 1 << 32), data=st.binary(min_size=1, max_size=300))
def test_corruption_flips_some_bits(seed: int, data: bytes) -> None:
    """On the way to the device, and on the way from it; what was submitted stays as it is."""
    rig = Rig(corrupt={0x01: 1.0}, seed=seed)
    sent = rig.transfer(0x01, data=data)
    assert bytes(sent.data) == data
    assert sent.actual_length == len(data)
    arrived = bytes(rig.transfer(0x81, 512).data)
    assert 1 <= flipped(arrived, data) <= 8
    rig.device.set_faults(corrupt={0x81: 1.0})
    rig.transfer(0x01, data=data)
    received = rig.transfer(0x81, 512)
    assert received.status == Status.SUCCESS
    assert 1 <= flipped(bytes(received.data), data) <= 8
    rig.device.close()


def test_corruption_of_nothing(make: Callable[..., Rig]) -> None:
    """A data stage that there is none of, and an empty message."""
    rig = make(corrupt=1.0)
    assert rig.control(0x40, 0x12, 1000, 0).status == Status.SUCCESS
    rig.device.set_alt_setting(1, 1)
    assert rig.status(0x04, kind=ISO, data=bytes(20), iso_lengths=[10, 10]) == Status.SUCCESS
    rig.start(0x86)
    rig.device.cancel(rig.start(0x86))
    rig.run()
    assert rig.done[-1].status == Status.CANCELLED


def test_one_isochronous_packet_is_corrupted(make: Callable[..., Rig]) -> None:
    rig, clean = make(corrupt={0x84: 1.0}), make()
    results = []
    for one in (rig, clean):
        one.device.set_alt_setting(1, 1)
        transfer = one.transfer(0x84, 400, kind=ISO, iso_lengths=[100] * 4)
        results.append([bytes(result.data) for result in transfer.iso_results])
    assert sum(a != b for a, b in zip(*results, strict=True)) == 1


# ================================================================ unplugging


def test_it_is_gone_after_so_many_transfers(make: Callable[..., Rig]) -> None:
    """The last one still succeeds; what is in flight then is lost."""
    rig = make(unplug_after=3)
    waiting = rig.start(0x86)
    assert [rig.status(0x82) for _ in range(2)] == [Status.SUCCESS] * 2
    assert not rig.device.lost
    assert rig.status(0x82) == Status.SUCCESS
    assert rig.device.lost
    assert (waiting.status, waiting.device_lost) == (Status.IOERROR, True)
    late = Transfer(BULK, 0x82, 4, rig.done.append)
    assert rig.device.submit(late) == Status.IOERROR
    assert late.device_lost
    assert late not in rig.done


def test_gone_from_the_start(make: Callable[..., Rig]) -> None:
    rig = make(unplug_after=0)
    assert rig.device.lost
    gone: list[Callable[[], object]] = [
        rig.device.claim,
        rig.device.reset,
        lambda: rig.device.set_configuration(1),
        lambda: rig.device.set_alt_setting(1, 1),
        lambda: rig.device.clear_halt(0x81),
        lambda: rig.device.alloc_streams([0x81], 1),
        lambda: rig.device.free_streams([0x81]),
    ]
    for call in gone:
        with pytest.raises(DeviceLostError):
            call()
    rig.device.release(give_back=True)


def test_unplugging_now(make: Callable[..., Rig]) -> None:
    """What the device has, what is delayed and what was dropped."""
    rig = make(delay={0x82: 1.0}, drop={0x83: 1.0})
    transfers = [rig.start(0x86), rig.start(0x82), rig.start(0x83, kind=INTERRUPT)]
    rig.run()
    rig.device.unplug()
    assert not rig.done, "completed inside unplug"
    rig.run()
    assert set(rig.done) == set(transfers)
    assert [(t.status, t.device_lost) for t in transfers] == [(Status.IOERROR, True)] * 3


def test_the_device_itself_may_be_gone(make: Callable[..., Rig]) -> None:
    rig = make()
    transfer = rig.start(0x86)
    rig.loopback.unplug()
    rig.run()
    assert (transfer.status, transfer.device_lost) == (Status.IOERROR, True)
    assert rig.device.lost
    late = Transfer(BULK, 0x82, 4, rig.done.append)
    assert rig.device.submit(late) == Status.IOERROR
    assert late.device_lost


def test_closing_ends_everything(make: Callable[..., Rig]) -> None:
    rig = make(delay={0x82: 1.0}, drop={0x83: 1.0})
    transfers = [rig.start(0x86), rig.start(0x82), rig.start(0x83, kind=INTERRUPT)]
    rig.run()
    rig.device.close()
    assert set(rig.done) == set(transfers)
    assert rig.device.submit(Transfer(BULK, 0x82, 4, rig.done.append)) == Status.IOERROR
    rig.device.close()


def test_a_completion_that_raises_loses_no_other(make: Callable[..., Rig]) -> None:
    rig = make(drop=1.0)

    def fail(transfer: Transfer) -> None:
        raise ZeroDivisionError

    first, transfer = Transfer(BULK, 0x82, 4, fail), rig.start(0x82)
    assert rig.device.submit(first) == Status.SUCCESS
    rig.device.cancel(first)
    rig.device.cancel(transfer)
    with pytest.raises(ZeroDivisionError):
        rig.device.handle_events(0)
    assert rig.device.next_timeout() == 0
    rig.run()
    assert rig.done == [transfer]


# ================================================================ the same again


@given(
    seed=st.integers(),
    chances=st.fixed_dictionaries({name: st.floats(0, 1) for name in ("stall", "drop", "babble", "corrupt")}),
    order=st.lists(st.sampled_from([0x02, 0x82, 0x81, 0x01]), max_size=30),
)
def test_a_seed_gives_the_same_faults(seed: int, chances: dict[str, float], order: list[int]) -> None:
    """Also when transfers of other endpoints come in between, and when several are in flight."""

    def outcomes(endpoints: list[int], *, together: bool) -> dict[int, list[tuple[int, bytes]]]:
        rig = Rig(seed=seed, **chances)
        started = []
        for endpoint in endpoints:
            data = b"" if endpoint & 0x80 else b"message"
            started.append(rig.start(endpoint, 16, data=data, timeout=1.0))
            if not together:
                rig.run()
        rig.clock.now += 2
        rig.run()
        rig.device.close()
        return {
            endpoint: [(t.status, bytes(t.data)) for t in started if t.endpoint == endpoint]
            for endpoint in (0x02, 0x82)
        }

    assert outcomes(order, together=False) == outcomes(order, together=False)
    by_endpoint = sorted(order)
    assert outcomes(order, together=True) == outcomes(by_endpoint, together=True)


def test_seeds_differ() -> None:
    """And endpoints; other chances and delays change nothing."""

    def babbles(seed: int, endpoint: int = 0x82, **others: Any) -> list[Status]:
        rig = Rig(babble={endpoint: 0.5}, seed=seed, **others)
        results = [rig.status(endpoint) for _ in range(64)]
        rig.device.close()
        return results

    assert babbles(1) == babbles(1) != babbles(2)
    assert [s == Status.BABBLE for s in babbles(1)] != [s == Status.BABBLE for s in babbles(1, 0x85)]
    assert babbles(1) == babbles(1, drop={0x82: 1e-12}, corrupt={0x82: 1.0})


def test_chances_are_kept(make: Callable[..., Rig]) -> None:
    """A tenth stalls, a fifth of the rest babbles."""
    rig = make(stall={0: 0.1}, babble={0: 0.2})
    statuses = [rig.control(0xC0, 1, 0, 0, length=1).status for _ in range(2000)]
    assert 140 < statuses.count(Status.STALL) < 260
    assert 280 < statuses.count(Status.BABBLE) < 440


# ================================================================ hosts and threads


def test_a_guest_sees_the_faults() -> None:
    """And recovers as from those of a real device."""
    device = Faulty(LoopbackDevice())
    host, guest = linked_pair(device)
    guest.wait_for_device()
    device.set_faults(stall={0x01: 1.0})
    assert guest.bulk_out(0x01, b"hello").status == Status.STALL
    device.set_faults(stall=0.0, drop={0x82: 1.0})
    assert guest.clear_halt(0x01).status == Status.SUCCESS
    assert guest.bulk_out(0x01, b"hello").status == Status.SUCCESS
    assert guest.bulk_in(0x82, 8, timeout=0.02).status == Status.TIMEOUT
    device.unplug()
    with pytest.raises(DeviceLostError):
        guest.bulk_in(0x82, 8, timeout=PATIENCE)
    guest.close()
    host.close()
    device.close()


def test_threads() -> None:
    """Transfers that are submitted and cancelled by several threads complete exactly once."""
    device = Faulty(LoopbackDevice(), stall={0x82: 0.1}, drop={0x82: 0.1}, delay=(0.0, 0.001), corrupt=0.3, seed=5)
    done: list[Transfer] = []
    started: list[list[Transfer]] = [[], [], []]
    stop = threading.Event()

    def handle() -> None:
        while not stop.is_set():
            device.handle_events(None)

    def use(mine: list[Transfer]) -> None:
        for number in range(150):
            transfer = Transfer(BULK, 0x82, 16, done.append, timeout=0.02)
            assert device.submit(transfer) == Status.SUCCESS
            mine.append(transfer)
            if number % 3 == 0:
                device.cancel(transfer)
            if number % 7 == 0:
                device.clear_halt(0x82)

    handler = threading.Thread(target=handle)
    users = [threading.Thread(target=use, args=(mine,)) for mine in started]
    for thread in (handler, *users):
        thread.start()
    for thread in users:
        thread.join(PATIENCE)
    stop.set()
    device.wake()
    handler.join(PATIENCE)
    assert not handler.is_alive()
    device.close()
    transfers = [transfer for mine in started for transfer in mine]
    assert len(transfers) == 450
    assert sorted(map(id, done)) == sorted(map(id, transfers))


def test_a_waiting_thread_notices_a_delayed_transfer() -> None:
    """What another thread submits while this one waits for ever."""
    device = Faulty(LoopbackDevice(), delay=0.01)
    done: list[Transfer] = []
    user = threading.Timer(0.01, lambda: device.submit(Transfer(BULK, 0x82, 16, done.append)))
    user.start()
    while not done:
        device.handle_events(None)
    user.join()
    assert done[0].status == Status.SUCCESS
    device.close()
