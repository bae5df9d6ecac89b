"""Whether the guest has the device: the states of a host, as a table.

Source: docs/host.md, "Announcing" and "Losing the device".
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum

__all__ = ["TRANSITIONS", "Action", "Input", "Redirection"]


class Redirection(Enum):
    """What the guest knows of the device."""

    NEW = "no hello from the guest, no device"
    PENDING = "a device waits for the guest's hello"
    IDLE = "connected to the guest, no device"
    CONNECTED = "the guest has the device"
    AWAITING_ACK = "the guest has not yet confirmed that the device went away"
    AWAITING_ACK_PENDING = "the same, and another device waits"


class Input(Enum):
    """What happens to a host."""

    HELLO = "the guest's hello"
    DEVICE = "a device is there"
    GONE = "the device is gone, the guest will confirm"
    GONE_UNCONFIRMED = "the device is gone, the guest cannot confirm"
    ACK = "the guest confirms"


class Action(Enum):
    """What the host sends on a transition."""

    NOTHING = "nothing"
    ANNOUNCE = "interface_info, ep_info, device_connect"
    DISCONNECT = "device_disconnect"
    COMPLAIN = "an error message: the packet makes no sense now"


_R, _I, _A = Redirection, Input, Action

TRANSITIONS: Mapping[tuple[Redirection, Input], tuple[Redirection, Action]] = {
    (_R.NEW, _I.HELLO): (_R.IDLE, _A.NOTHING),
    (_R.NEW, _I.DEVICE): (_R.PENDING, _A.NOTHING),
    (_R.NEW, _I.GONE): (_R.NEW, _A.NOTHING),
    (_R.NEW, _I.GONE_UNCONFIRMED): (_R.NEW, _A.NOTHING),
    (_R.NEW, _I.ACK): (_R.NEW, _A.COMPLAIN),
    (_R.PENDING, _I.HELLO): (_R.CONNECTED, _A.ANNOUNCE),
    (_R.PENDING, _I.DEVICE): (_R.PENDING, _A.NOTHING),
    (_R.PENDING, _I.GONE): (_R.NEW, _A.NOTHING),
    (_R.PENDING, _I.GONE_UNCONFIRMED): (_R.NEW, _A.NOTHING),
    (_R.PENDING, _I.ACK): (_R.PENDING, _A.COMPLAIN),
    (_R.IDLE, _I.HELLO): (_R.IDLE, _A.NOTHING),
    (_R.IDLE, _I.DEVICE): (_R.CONNECTED, _A.ANNOUNCE),
    (_R.IDLE, _I.GONE): (_R.IDLE, _A.NOTHING),
    (_R.IDLE, _I.GONE_UNCONFIRMED): (_R.IDLE, _A.NOTHING),
    (_R.IDLE, _I.ACK): (_R.IDLE, _A.COMPLAIN),
    (_R.CONNECTED, _I.HELLO): (_R.CONNECTED, _A.NOTHING),
    (_R.CONNECTED, _I.DEVICE): (_R.CONNECTED, _A.NOTHING),
    (_R.CONNECTED, _I.GONE): (_R.AWAITING_ACK, _A.DISCONNECT),
    (_R.CONNECTED, _I.GONE_UNCONFIRMED): (_R.IDLE, _A.DISCONNECT),
    (_R.CONNECTED, _I.ACK): (_R.CONNECTED, _A.COMPLAIN),
    (_R.AWAITING_ACK, _I.HELLO): (_R.AWAITING_ACK, _A.NOTHING),
    (_R.AWAITING_ACK, _I.DEVICE): (_R.AWAITING_ACK_PENDING, _A.NOTHING),
    (_R.AWAITING_ACK, _I.GONE): (_R.AWAITING_ACK, _A.NOTHING),
    (_R.AWAITING_ACK, _I.GONE_UNCONFIRMED): (_R.AWAITING_ACK, _A.NOTHING),
    (_R.AWAITING_ACK, _I.ACK): (_R.IDLE, _A.NOTHING),
    (_R.AWAITING_ACK_PENDING, _I.HELLO): (_R.AWAITING_ACK_PENDING, _A.NOTHING),
    (_R.AWAITING_ACK_PENDING, _I.DEVICE): (_R.AWAITING_ACK_PENDING, _A.NOTHING),
    (_R.AWAITING_ACK_PENDING, _I.GONE): (_R.AWAITING_ACK, _A.NOTHING),
    (_R.AWAITING_ACK_PENDING, _I.GONE_UNCONFIRMED): (_R.AWAITING_ACK, _A.NOTHING),
    (_R.AWAITING_ACK_PENDING, _I.ACK): (_R.CONNECTED, _A.ANNOUNCE),
}
