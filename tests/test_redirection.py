"""usbredir._redirection: what the guest knows of the device.

The table is compared with a model of three facts, which says the same in another way; then a host is driven at random
and must send what the model says.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from usbredir._redirection import TRANSITIONS, Action, Input, Redirection
from usbredir.packets import (
    PACKET_TYPES,
    BulkPacket,
    ConfigurationStatus,
    DeviceConnect,
    DeviceDisconnect,
    EpInfo,
    GetConfiguration,
    Hello,
    InterfaceInfo,
    Packet,
)
from usbredir.parser import LogLevel
from usbredir.proto import Direction, Status

from .host_bed import BULK_IN, Bed, FakeDevice


class Facts(NamedTuple):
    """What a host has to know: three of the original's flags."""

    hello: bool
    device: bool
    waiting: bool

    @property
    def connected(self) -> bool:
        return self.hello and self.device and not self.waiting


FACTS = {
    Redirection.NEW: Facts(hello=False, device=False, waiting=False),
    Redirection.PENDING: Facts(hello=False, device=True, waiting=False),
    Redirection.IDLE: Facts(hello=True, device=False, waiting=False),
    Redirection.CONNECTED: Facts(hello=True, device=True, waiting=False),
    Redirection.AWAITING_ACK: Facts(hello=True, device=False, waiting=True),
    Redirection.AWAITING_ACK_PENDING: Facts(hello=True, device=True, waiting=True),
}
STATES = {facts: state for state, facts in FACTS.items()}


def model(before: Facts, event: Input) -> tuple[Facts, Action]:
    """HOST_BEHAVIOUR 3 and 9: a device is announced once hello is there and no confirmation is due."""
    after, action = before, Action.NOTHING
    match event:
        case Input.HELLO:
            after = before._replace(hello=True)
        case Input.DEVICE:
            after = before._replace(device=True)
        case Input.GONE | Input.GONE_UNCONFIRMED:
            after = before._replace(device=False)
            if before.connected:
                action = Action.DISCONNECT
                after = after._replace(waiting=event is Input.GONE)
        case Input.ACK if before.waiting:
            after = before._replace(waiting=False)
        case Input.ACK:
            action = Action.COMPLAIN
    if after.connected and not before.connected:
        action = Action.ANNOUNCE
    return after, action


def test_the_model_has_all_states() -> None:
    assert set(FACTS) == set(Redirection)
    assert len(STATES) == len(FACTS)


@pytest.mark.parametrize("event", Input)
@pytest.mark.parametrize("state", Redirection)
def test_every_input_in_every_state(state: Redirection, event: Input) -> None:
    """Each is in the table, and the table says what the model says."""
    after, action = model(FACTS[state], event)
    assert TRANSITIONS[state, event] == (STATES[after], action)


def test_the_table_has_nothing_else() -> None:
    assert set(TRANSITIONS) == {(state, event) for state in Redirection for event in Input}


def test_handlers_cover_what_a_guest_may_send() -> None:
    """No packet of a guest is forgotten, and none that only a host sends is there."""
    from_guest = {cls for cls in PACKET_TYPES.values() if cls.direction in (Direction.GUEST_TO_HOST, Direction.BOTH)}
    with Bed() as bed:
        assert set(bed.host._handlers) == from_guest


# ---------------------------------------------------------------- the host against the model

ANNOUNCEMENT: list[type[Packet]] = [InterfaceInfo, EpInfo, DeviceConnect]
SENT: dict[Action, list[type[Packet]]] = {
    Action.NOTHING: [],
    Action.ANNOUNCE: ANNOUNCEMENT,
    Action.DISCONNECT: [DeviceDisconnect],
    Action.COMPLAIN: [],
}


@given(
    acknowledges=st.booleans(),
    steps=st.lists(st.sampled_from(["hello", "device", "drop", "unplug", "ack", "request"]), max_size=16),
)
def test_the_host_sends_what_the_model_says(acknowledges: bool, steps: list[str]) -> None:
    """Devices come, go and break away in any order, the guest confirms early, late or never."""
    bed = Bed(hello=False, acknowledges=acknowledges, capabilities=())  # without 64-bit ids before and after hello
    gone = Input.GONE if acknowledges else Input.GONE_UNCONFIRMED
    facts = Facts(hello=False, device=False, waiting=False)
    device: FakeDevice | None = None
    expected: list[type[Packet]] = [Hello]

    def feed(event: Input) -> None:
        nonlocal facts
        facts, action = model(facts, event)
        expected.extend(SENT[action])

    for number, step in enumerate(steps):
        if step == "hello":
            if not facts.hello:
                bed.greet()
                feed(Input.HELLO)
        elif step == "device":
            device = FakeDevice()
            bed.host.set_device(device)
            feed(gone)
            feed(Input.DEVICE)
        elif step == "drop":
            device = None
            bed.host.set_device(None)
            feed(gone)
        elif step == "unplug" and device is not None and facts.connected:
            bed.ask(BulkPacket(id=number, endpoint=BULK_IN, length=10))
            device.complete(lost=True)
            feed(gone)
            expected.append(BulkPacket)
        elif step == "ack" and facts.waiting:
            bed.acknowledge()
            feed(Input.ACK)
        elif step == "request":
            bed.ask(GetConfiguration(id=number))
            expected.append(ConfigurationStatus)
            assert bed.received[-1] == ConfigurationStatus(
                id=number,
                status=Status.SUCCESS if facts.connected else Status.IOERROR,
                configuration=device is not None,
            )
        assert [type(packet) for packet in bed.received] == expected
        assert bed.host.state is STATES[facts]
    bed.host.close()


@pytest.mark.parametrize("state", [state for state in Redirection if not FACTS[state].waiting])
def test_an_acknowledgement_out_of_place_is_only_logged(state: Redirection) -> None:
    """Nothing changes, nothing is sent."""
    facts = FACTS[state]
    bed = Bed(FakeDevice() if facts.device else None, hello=facts.hello, capabilities=())
    before = len(bed.received)
    bed.say_bytes(bytes((24, 0, 0, 0)) + bytes(8))
    bed.run()
    assert bed.received[before:] == []
    assert bed.host.state is state
    assert bed.logged(LogLevel.ERROR, "did not happen")
    bed.host.close()
