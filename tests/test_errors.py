"""The tree of exceptions: the drawing in the module's docstring is what there is."""

from __future__ import annotations

import copy
import pickle

import pytest

from usbredir import errors
from usbredir.errors import (
    DeviceError,
    FilterSyntaxError,
    LocalProtocolError,
    ProtocolError,
    QueueFullError,
    RemoteProtocolError,
    StateError,
    UsbRedirError,
)


def drawn_tree() -> dict[str, str | None]:
    """{name: parent} as drawn in the docstring."""
    assert errors.__doc__ is not None
    tree: dict[str, str | None] = {}
    above: list[str] = []
    for line in errors.__doc__.splitlines():
        name = line.lstrip(" │├└─").split(" ")[0]
        if not name.isidentifier() or not name[0].isupper() or not line.startswith("    "):
            continue
        depth = (len(line) - len(line.lstrip(" │├└─"))) // 4 - 1
        tree[name] = above[depth - 1] if depth else None
        above[depth:] = [name]
    return tree


TREE = drawn_tree()
ERRORS: list[type[Exception]] = [getattr(errors, name) for name in errors.__all__]
every_error = pytest.mark.parametrize("cls", ERRORS, ids=lambda cls: cls.__name__)


def test_every_exception_is_drawn() -> None:
    assert set(TREE) == set(errors.__all__)
    defined = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert defined == set(errors.__all__)


@pytest.mark.parametrize(("name", "parent"), TREE.items())
def test_the_drawing_is_true(name: str, parent: str | None) -> None:
    cls = getattr(errors, name)
    assert cls.__bases__[0] is (getattr(errors, parent) if parent else Exception)


def test_the_tree_is_that_of_the_contract() -> None:
    """API, usbredir.errors."""
    for child, parent in [
        ("ProtocolError", "UsbRedirError"),
        ("LocalProtocolError", "ProtocolError"),
        ("QueueFullError", "LocalProtocolError"),
        ("RemoteProtocolError", "ProtocolError"),
        ("StateError", "UsbRedirError"),
        ("FilterSyntaxError", "UsbRedirError"),
        ("DeviceError", "UsbRedirError"),
        ("DeviceLostError", "DeviceError"),
        ("DeviceRejectedError", "DeviceError"),
        ("DeviceClaimError", "DeviceError"),
        ("DeviceNotFoundError", "DeviceError"),
        ("ConnectionClosed", "UsbRedirError"),
    ]:
        assert TREE[child] == parent
    assert issubclass(FilterSyntaxError, ValueError)
    assert not issubclass(UsbRedirError, OSError)


@every_error
def test_messages(cls: type[Exception]) -> None:
    """The text is what was given; errors are hashable and can travel between processes."""
    error = cls("what and why")
    assert str(error) == "what and why"
    assert cls.__doc__
    hash(error)
    for other in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(other) is cls
        assert str(other) == str(error)


@pytest.mark.parametrize("cls", [ProtocolError, LocalProtocolError, QueueFullError, RemoteProtocolError])
def test_protocol_errors_tell_the_packet(cls: type[ProtocolError]) -> None:
    error = pickle.loads(pickle.dumps(cls("text", packet_type=101, reason="bad_length")))
    assert (error.packet_type, error.reason) == (101, "bad_length")
    assert (cls("text").packet_type, cls("text").reason) == (None, "")


def test_state_errors_tell_a_reason() -> None:
    assert pickle.loads(pickle.dumps(StateError("text", reason="state_underrun"))).reason == "state_underrun"
    assert StateError("text").reason == ""


def test_filter_errors_tell_a_position() -> None:
    assert pickle.loads(pickle.dumps(FilterSyntaxError("text", position=7))).position == 7
    assert FilterSyntaxError("text").position == 0


def test_one_handler_for_all() -> None:
    for cls in ERRORS:
        with pytest.raises(UsbRedirError):
            raise cls("text")
    assert not issubclass(DeviceError, ProtocolError)
