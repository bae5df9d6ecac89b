"""Byte streams: addresses, sockets, and a host that serves a guest in another thread over real connections.

The only waiting is for sockets and threads, with PATIENCE as its end.
"""

from __future__ import annotations

import os
import platform
import select
import socket
import stat
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from usbredir import _keep_alive, transport
from usbredir.errors import (
    ConnectionClosed,
    DeviceError,
    DeviceLostError,
    DeviceRejectedError,
    RemoteProtocolError,
)
from usbredir.guest import Guest
from usbredir.limits import Limits
from usbredir.parser import LogLevel
from usbredir.proto import Status
from usbredir.transport import (
    Address,
    Connection,
    Connector,
    GuestConnection,
    HostConnection,
    Listener,
    Poller,
    Session,
    _poll_with_select,
    connect,
    listen,
    parse_address,
    poll,
    serve,
    turn_away,
)
from usbredir.virtual import LoopbackDevice

from .strategies import raw_packet

PATIENCE = 30.0
POLLIN, POLLOUT = 1, 4

unix_sockets = pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="no Unix sockets here")


def has_ipv6() -> bool:
    """Whether ::1 can be used on this machine."""
    if not socket.has_ipv6:
        return False
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


# ================================================================ addresses


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("localhost:4000", "localhost", 4000),
        ("127.0.0.1:0", "127.0.0.1", 0),
        ("vm.example.org:65535", "vm.example.org", 65535),
        ("[::1]:4000", "::1", 4000),
        ("[fe80::1%eth0]:1", "fe80::1%eth0", 1),
        ("unix:/run/usb.sock", "/run/usb.sock", None),
        ("unix:relative:4000", "relative:4000", None),
    ],
)
def test_addresses(text: str, host: str, port: int | None) -> None:
    address = parse_address(text)
    assert address == Address(host, port) == (host, port)
    assert str(address) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":",
        ":4000",
        "4000",
        "localhost",
        "localhost:",
        "localhost:http",
        "localhost:-1",
        "localhost:+1",
        "localhost: 1",
        "localhost:65536",
        "localhost:1_0",
        "localhost:٣",
        "localhost:" + "9" * 5000,
        "::1:4000",
        "fe80::1",
        "[::1]",
        "[]:4000",
        "unix:",
    ],
)
def test_texts_that_are_no_address(text: str) -> None:
    """The message tells the forms."""
    with pytest.raises(ValueError, match=r"HOST:PORT|\[::1\]:4000|unix:/run|integer string"):
        parse_address(text)


# ================================================================ connections


def joined(listener: Listener) -> tuple[Connection, Connection]:
    """(the one that connects, the one that accepts)."""
    near = connect(str(listener.address), PATIENCE)
    far = listener.accept(PATIENCE)
    assert far is not None
    return near, far


def wait_for(connection: Connection, events: int = POLLIN) -> None:
    assert poll([(connection.fileno(), events)], PATIENCE), "nothing happened on the connection"


def read_all(connection: Connection, size: int) -> bytes:
    data = b""
    while len(data) < size:
        wait_for(connection)
        data += connection.read(1 << 20) or b""
    return data


@pytest.fixture(params=["tcp", pytest.param("unix", marks=unix_sockets)])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where to listen: port 0, and a Unix socket."""
    return "127.0.0.1:0" if request.param == "tcp" else f"unix:{tmp_path}/usb.sock"


@pytest.fixture
def ends(address: str) -> Iterator[tuple[Connection, Connection]]:
    with listen(address) as listener:
        near, far = joined(listener)
        with near, far:
            yield near, far


def test_port_0_lets_the_system_choose() -> None:
    with listen("127.0.0.1:0") as one, listen("127.0.0.1:0") as other:
        assert one.address.port
        assert other.address.port
        assert one.address.port != other.address.port
        assert one.address.host == "127.0.0.1"


def test_bytes_both_ways(ends: tuple[Connection, Connection]) -> None:
    near, far = ends
    for sender, receiver in ((near, far), (far, near)):
        assert receiver.read(100) is None
        assert sender.write(memoryview(b"hello")) == 5
        assert read_all(receiver, 5) == b"hello"
        assert receiver.read(100) is None
        assert (sender.bytes_sent, receiver.bytes_received) == (5, 5)


def test_several_buffers_at_once(ends: tuple[Connection, Connection]) -> None:
    near, far = ends
    buffers = [memoryview(b"one"), memoryview(b"two"), memoryview(bytes(1000))]
    assert near.writev(buffers) == 1006
    assert read_all(far, 1006) == b"onetwo" + bytes(1000)
    assert near.writev(buffers[:1]) == 3


def test_no_more_than_asked_for(ends: tuple[Connection, Connection]) -> None:
    near, far = ends
    near.write(memoryview(b"0123456789"))
    wait_for(far)
    assert far.read(4) == b"0123"
    assert far.read(4) == b"4567"
    assert far.read(4) == b"89"
    assert far.read(4) is None


def test_a_full_socket_blocks(ends: tuple[Connection, Connection]) -> None:
    """None, and everything that was accepted arrives."""
    near, far = ends
    block = memoryview(bytes(range(256)) * 4096)
    sent = 0
    while (count := near.write(block)) is not None:
        sent += count
        assert sent < 1 << 30
    assert near.writev([block, block]) is None
    assert len(read_all(far, sent)) == sent
    wait_for(near, POLLOUT)
    assert near.write(block)


def test_the_peer_closes(ends: tuple[Connection, Connection]) -> None:
    """What it sent is read, then the end of the stream, again and again."""
    near, far = ends
    near.write(memoryview(b"last"))
    near.close()
    assert read_all(far, 4) == b"last"
    wait_for(far)
    pieces = [far.read(100) for _ in range(4)]
    assert pieces[-1] == b""
    assert set(pieces) <= {None, b""}


def test_close_is_idempotent(ends: tuple[Connection, Connection]) -> None:
    near, _ = ends
    near.close()
    near.close()
    assert near.fileno() == -1


def socket_option(connection: Connection, level: int, option: int) -> int:
    return connection._socket.getsockopt(level, option)


def test_tcp_does_not_hold_back_small_packets() -> None:
    with listen("127.0.0.1:0") as listener:
        for connection in joined(listener):
            with connection:
                assert socket_option(connection, socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_every_tcp_connection_is_kept_alive() -> None:
    """On both ends, without being asked for: a peer that has vanished must not stay for ever."""
    with listen("127.0.0.1:0") as listener:
        for connection in joined(listener):
            with connection:
                assert socket_option(connection, socket.SOL_SOCKET, socket.SO_KEEPALIVE)


def test_connections_that_cannot_be_kept_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are used without."""

    def refuse(sock: socket.socket) -> None:
        raise OSError("not here")

    monkeypatch.setattr(_keep_alive, "keep_alive", refuse)
    with listen("127.0.0.1:0") as listener:
        near, far = joined(listener)
        with near, far:
            near.write(memoryview(b"works"))
            assert read_all(far, 5) == b"works"


def test_names_of_peers() -> None:
    with listen("127.0.0.1:0") as listener:
        near, far = joined(listener)
        with near, far:
            assert near.name == str(listener.address)
            host, port = near._socket.getsockname()
            assert far.name == f"{host}:{port}"


@pytest.mark.skipif(not has_ipv6(), reason="no IPv6 here")
def test_ipv6() -> None:
    with listen("[::1]:0") as listener:
        assert str(listener.address).startswith("[::1]:")
        near, far = joined(listener)
        with near, far:
            near.write(memoryview(b"six"))
            assert read_all(far, 3) == b"six"
            assert far.name.startswith("[::1]:")


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="no such options here")
def test_how_a_dead_peer_is_found() -> None:
    """Probes when it is silent; a limit for what it does not confirm, only when one is wanted."""
    with listen("127.0.0.1:0") as listener:
        near, far = joined(listener)
        with near, far:
            options = [getattr(socket, f"TCP_{name}") for name in ("KEEPIDLE", "KEEPINTVL", "KEEPCNT", "USER_TIMEOUT")]
            assert [socket_option(near, socket.IPPROTO_TCP, option) for option in options] == [30, 10, 3, 0]
            near.keep_alive(idle=7)
            far.keep_alive(unanswered=2.5)
            assert [socket_option(near, socket.IPPROTO_TCP, option) for option in options] == [7, 10, 3, 0]
            assert [socket_option(far, socket.IPPROTO_TCP, option) for option in options] == [30, 10, 3, 2500]


@unix_sockets
def test_unix_sockets_need_no_keep_alive(tmp_path: Path) -> None:
    with listen(f"unix:{tmp_path}/usb.sock") as listener:
        near, far = joined(listener)
        with near, far:
            near.keep_alive(unanswered=1)
            assert not socket_option(near, socket.SOL_SOCKET, socket.SO_KEEPALIVE)


def test_systems_with_few_options(monkeypatch: pytest.MonkeyPatch) -> None:
    """SO_KEEPALIVE alone, with the system's own times."""
    for name in ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT", "TCP_USER_TIMEOUT"):
        monkeypatch.delattr(socket, name, raising=False)
    with listen("127.0.0.1:0") as listener:
        near, far = joined(listener)
        with near, far:
            near.keep_alive(unanswered=1)
            assert socket_option(near, socket.SOL_SOCKET, socket.SO_KEEPALIVE)


def test_whether_the_peer_has_left(ends: tuple[Connection, Connection]) -> None:
    """Seen without reading; unread data comes before the end."""
    near, far = ends
    assert not far.at_end()
    near.write(memoryview(b"last"))
    near.close()
    wait_for(far)
    assert not far.at_end()
    assert far.read(10) == b"last"
    wait_for(far)
    assert far.at_end()


def test_a_reset_is_an_end() -> None:
    with listen("127.0.0.1:0") as listener:
        near, far = joined(listener)
        near._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        near.close()
        wait_for(far)
        assert far.at_end()
        far.close()


# ================================================================ connecting without waiting


def finished(connector: Connector) -> Connection:
    """Poll as its description says."""
    while (connection := connector.finish()) is None:
        assert poll([(connector.fileno(), POLLOUT)], PATIENCE)
    return connection


def test_connecting_without_waiting(address: str) -> None:
    with listen(address) as listener, finished(Connector(str(listener.address))) as near:
        far = listener.accept(PATIENCE)
        assert far is not None
        with far:
            assert near.name == str(listener.address)
            near.write(memoryview(b"there"))
            assert read_all(far, 5) == b"there"


def test_every_address_of_a_name_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that refuses, one that cannot be tried at all, one that answers."""
    with listen("127.0.0.1:0") as listener, listen("127.0.0.1:0") as closed:
        refusing = ("127.0.0.1", closed.address.port)
        closed.close()
        there = ("127.0.0.1", listener.address.port)
        found = [(socket.AF_INET, socket.SOCK_STREAM, 0, "", where) for where in (refusing, ("no address", 1), there)]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **options: found)
        with finished(Connector("name:1")):
            far = listener.accept(PATIENCE)
            assert far is not None
            far.close()
        found = found[:1]
        with pytest.raises(ConnectionRefusedError):
            finished(Connector("name:1"))


def test_giving_up(address: str) -> None:
    with listen(address) as listener:
        connector = Connector(str(listener.address))
        connector.close()
        assert connector.fileno() == -1


def test_connecting_takes_too_long() -> None:
    """Nobody accepts, nobody refuses."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        waiting = [socket.socket() for _ in range(4)]
        for one in waiting:  # as many as fit, and more
            one.setblocking(False)
            one.connect_ex(server.getsockname())
        with pytest.raises(TimeoutError, match=r"no answer within 0\.01 seconds"):
            connect("{}:{}".format(*server.getsockname()), 0.01)
        for one in waiting:
            one.close()


# ================================================================ listening


def test_accept_has_an_end() -> None:
    with listen("127.0.0.1:0") as listener:
        assert listener.accept(0) is None
        assert listener.accept(0.01) is None


def test_a_listener_that_is_closed(address: str) -> None:
    """Nobody answers there; the address can be had again at once."""
    listener = listen(address)
    where = str(listener.address)
    near, far = joined(listener)
    listener.close()
    listener.close()
    near.close()
    far.close()
    with pytest.raises(OSError, match=r"refused|No such file"):
        connect(where, PATIENCE)
    with listen(where) as again:
        assert str(again.address) == where


def test_an_address_in_use(address: str) -> None:
    with listen(address) as listener, pytest.raises(OSError, match="in use"):
        listen(str(listener.address))


def test_an_address_of_another_machine() -> None:
    with pytest.raises(OSError, match="assign"):
        listen("192.0.2.1:0")


def test_nobody_answers() -> None:
    with listen("127.0.0.1:0") as listener:
        where = str(listener.address)
    with pytest.raises(ConnectionRefusedError):
        connect(where, PATIENCE)


@pytest.mark.parametrize("function", [listen, connect])
def test_wrong_addresses_are_value_errors(function: Callable[[str], object]) -> None:
    with pytest.raises(ValueError, match="HOST:PORT"):
        function("nonsense")


def test_turning_a_guest_away(address: str) -> None:
    with listen(address) as listener:
        assert listener.refuse() is None
        with connect(str(listener.address), PATIENCE) as near:
            assert poll([(listener.fileno(), POLLIN)], PATIENCE)
            assert listener.refuse()
            wait_for(near)
            assert near.read(10) == b""


@unix_sockets
def test_a_unix_socket_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "usb.sock"
    with listen(f"unix:{path}"):
        assert stat.S_ISSOCK(path.stat().st_mode)
    assert not path.exists()


@unix_sockets
def test_a_stale_unix_socket_is_replaced(tmp_path: Path) -> None:
    """One that a killed process left behind."""
    path = tmp_path / "usb.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as killed:
        killed.bind(str(path))
    assert path.exists()
    with listen(f"unix:{path}") as listener:
        near, far = joined(listener)
        near.close()
        far.close()


@unix_sockets
def test_other_files_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_text("data")
    with pytest.raises(OSError, match="in use"):
        listen(f"unix:{path}")
    assert path.read_text() == "data"


@unix_sockets
def test_a_unix_socket_in_use_is_left_alone(tmp_path: Path) -> None:
    where = f"unix:{tmp_path}/usb.sock"
    with listen(where) as first:
        with pytest.raises(OSError, match="in use"):
            listen(where)
        first.refuse()  # the question whether it is alive
        near, far = joined(first)
        near.close()
        far.close()


@unix_sockets
@pytest.mark.parametrize("path", ["no/such/directory/usb.sock", "x" * 200])
def test_unix_sockets_that_cannot_be_had(tmp_path: Path, path: str) -> None:
    for function in (listen, connect):
        with pytest.raises(OSError, match=r"No such file|too long"):
            function(f"unix:{tmp_path}/{path}")


# ================================================================ polling


@pytest.mark.parametrize("function", [poll, _poll_with_select])
def test_polling(function: Callable[..., dict[int, int]], ends: tuple[Connection, Connection]) -> None:
    """The same answers from both implementations."""
    near, far = ends
    both = POLLIN | POLLOUT
    assert function([(far.fileno(), POLLIN)], 0) == {}
    assert function([(far.fileno(), both)], PATIENCE) == {far.fileno(): POLLOUT}
    near.write(memoryview(b"x"))
    assert function([(far.fileno(), POLLIN), (near.fileno(), POLLIN)], PATIENCE) == {far.fileno(): POLLIN}
    wait_for(far)
    assert function([(far.fileno(), both)], None) == {far.fileno(): both}
    assert function([], 0.001) == {}


def test_a_poller_follows_what_is_wanted(ends: tuple[Connection, Connection]) -> None:
    """Descriptors that come and go, other events of the same one, one that is wanted twice."""
    near, far = ends
    poller = Poller()
    n, f = near.fileno(), far.fileno()
    assert poller.wait([(n, POLLOUT)], PATIENCE) == {n: POLLOUT}
    assert poller.wait([(n, POLLIN), (f, POLLOUT)], PATIENCE) == {f: POLLOUT}
    near.write(memoryview(b"x"))
    wait_for(far)
    assert poller.wait([(f, POLLIN)], PATIENCE) == {f: POLLIN}
    assert poller.wait([(f, POLLIN), (f, POLLOUT)], PATIENCE) == {f: POLLIN | POLLOUT}
    assert poller.wait([(n, POLLIN)], 0) == {}
    assert poller.wait([], 0.001) == {}
    assert poller.wait([(f, POLLIN)], None) == {f: POLLIN}


def test_systems_without_poll(ends: tuple[Connection, Connection], monkeypatch: pytest.MonkeyPatch) -> None:
    near, _ = ends
    monkeypatch.delattr(select, "poll", raising=False)
    assert Poller().wait([(near.fileno(), POLLOUT)], PATIENCE) == {near.fileno(): POLLOUT}


# ================================================================ serving


class Server(threading.Thread):
    """Serves one guest in a thread; *outcome* is what serve raised."""

    def __init__(self, address: Listener, device: LoopbackDevice, **options: Any) -> None:
        super().__init__(daemon=True)
        self.address = address
        self.device = device
        self.options = options
        self.outcome: BaseException | None = None
        self.messages: list[tuple[LogLevel, str]] = []
        self.start()

    def run(self) -> None:
        connection = self.address.accept(PATIENCE)
        if connection is None:
            self.outcome = TimeoutError("nobody came")
            return
        with connection:
            try:
                serve(connection, self.device, log=lambda *message: self.messages.append(message), **self.options)
            except BaseException as error:  # looked at by the test
                self.outcome = error

    def ended(self) -> BaseException | None:
        """What serve raised, or None."""
        self.join(PATIENCE)
        assert not self.is_alive(), "serve does not end"
        return self.outcome


@pytest.fixture
def device() -> Iterator[LoopbackDevice]:
    device = LoopbackDevice(interrupt_period=0.0001)
    yield device
    device.close()


@pytest.fixture
def listener(address: str) -> Iterator[Listener]:
    with listen(address) as listener:
        yield listener


def guest_at(listener: Listener) -> tuple[Connection, Guest]:
    connection = connect(str(listener.address), PATIENCE)
    guest = Guest(GuestConnection(connection))
    return connection, guest


def test_serving_a_guest(listener: Listener, device: LoopbackDevice) -> None:
    """All kinds of transfers over a real connection; serve returns when the guest has left; the device is reset."""
    server = Server(listener, device, version="the exporter")
    connection, guest = guest_at(listener)
    with connection, guest:
        assert guest.wait_for_device(PATIENCE).vendor_id == 0x1209
        assert guest.host_version == "the exporter"
        data = bytes(range(256)) * 8000
        assert guest.bulk_out(0x01, data, timeout=PATIENCE).status == Status.SUCCESS
        assert guest.bulk_in(0x81, len(data), timeout=PATIENCE).data == data
        assert guest.control_in(0xC0, 1, 5, 0, 4, timeout=PATIENCE).data == b"\5\6\7\x08"
        assert guest.start_interrupt_receiving(0x83, timeout=PATIENCE) == Status.SUCCESS
        for number in range(50):
            assert guest.receive(0x83, timeout=PATIENCE).data == struct.pack("<Q", number)
        assert guest.stop_interrupt_receiving(0x83, timeout=PATIENCE) == Status.SUCCESS
        assert guest.bulk_in(0x86, 64, timeout=0.01).status == Status.TIMEOUT
        resets = device.counters["resets"]
    assert server.ended() is None
    assert device.counters["resets"] == resets + 1


def test_serving_one_guest_after_the_other(listener: Listener, device: LoopbackDevice) -> None:
    for _ in range(3):
        server = Server(listener, device)
        connection, guest = guest_at(listener)
        with connection, guest:
            guest.wait_for_device(PATIENCE)
            assert guest.bulk_out(0x02, b"x", timeout=PATIENCE).status == Status.SUCCESS
        assert server.ended() is None


def test_one_guest_at_a_time(listener: Listener, device: LoopbackDevice) -> None:
    """Others are turned away, with a warning, and disturb nothing."""
    server = Server(listener, device, listener=listener)
    connection, guest = guest_at(listener)
    with connection, guest:
        guest.wait_for_device(PATIENCE)
        for _ in range(2):
            with connect(str(listener.address), PATIENCE) as second:
                wait_for(second)
                assert second.read(100) == b""
        assert guest.bulk_out(0x02, b"x", timeout=PATIENCE).status == Status.SUCCESS
    assert server.ended() is None
    warnings = [message for level, message in server.messages if level == LogLevel.WARNING]
    assert len(warnings) == 2
    assert "turned away" in warnings[0]


def test_a_guest_that_vanishes(device: LoopbackDevice) -> None:
    """Its connection is reset in the middle of everything: an OSError, or the end; the device is released."""
    with listen("127.0.0.1:0") as listener:
        server = Server(listener, device)
        connection, guest = guest_at(listener)
        guest.wait_for_device(PATIENCE)
        guest.start_interrupt_receiving(0x83, timeout=PATIENCE)
        resets = device.counters["resets"]
        connection._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()
        outcome = server.ended()
        assert outcome is None or isinstance(outcome, OSError)
        assert device.counters["resets"] == resets + 1
        guest.close()


def test_a_guest_that_leaves_while_data_flows(listener: Listener, device: LoopbackDevice) -> None:
    """Nothing is missing before; the end of the connection is an end, or an OSError when something was under way."""
    server = Server(listener, device)
    connection, guest = guest_at(listener)
    with connection, guest:
        guest.wait_for_device(PATIENCE)
        assert guest.start_interrupt_receiving(0x83, timeout=PATIENCE) == Status.SUCCESS
        for number in range(100):
            assert guest.receive(0x83, timeout=PATIENCE).data == struct.pack("<Q", number)
    outcome = server.ended()
    assert outcome is None or isinstance(outcome, OSError)


def test_a_guest_that_breaks_the_protocol(listener: Listener, device: LoopbackDevice) -> None:
    server = Server(listener, device)
    with connect(str(listener.address), PATIENCE) as connection:
        connection.write(memoryview(raw_packet(99, wide=False)))
        assert isinstance(server.ended(), RemoteProtocolError)


def test_a_guest_that_refuses_the_device(listener: Listener, device: LoopbackDevice) -> None:
    server = Server(listener, device)
    connection, guest = guest_at(listener)
    with connection, guest:
        guest.wait_for_device(PATIENCE)
        guest.reject()
        assert isinstance(server.ended(), DeviceRejectedError)


def test_limits_are_passed_on(listener: Listener, device: LoopbackDevice) -> None:
    server = Server(listener, device, limits=Limits(max_packet=1000))
    connection, guest = guest_at(listener)
    with connection, guest:
        guest.wait_for_device(PATIENCE)
        with pytest.raises((ConnectionClosed, OSError)):
            guest.bulk_out(0x02, bytes(2000), timeout=PATIENCE)
    assert isinstance(server.ended(), RemoteProtocolError)


def test_a_device_that_is_gone_before(listener: Listener, device: LoopbackDevice) -> None:
    device.unplug()
    server = Server(listener, device)
    with connect(str(listener.address), PATIENCE):
        assert isinstance(server.ended(), DeviceError)


def test_a_device_that_is_lost(listener: Listener, device: LoopbackDevice) -> None:
    """The guest is told; serve ends when the guest asks for what only the device can do, or leaves."""
    server = Server(listener, device)
    connection, guest = guest_at(listener)
    with connection, guest:
        guest.wait_for_device(PATIENCE)
        assert guest.start_interrupt_receiving(0x83, timeout=PATIENCE) == Status.SUCCESS
        device.unplug()
        guest.wait_for_disconnect(PATIENCE)
    outcome = server.ended()
    assert outcome is None or isinstance(outcome, DeviceLostError)


def test_another_guest_is_turned_away_with_a_message(listener: Listener) -> None:
    messages: list[str] = []
    turn_away(listener, lambda level, message: messages.append(message))
    assert not messages
    with connect(str(listener.address), PATIENCE) as near:
        assert poll([(listener.fileno(), POLLIN)], PATIENCE)
        turn_away(listener, lambda level, message: messages.append(message))
        wait_for(near)
        assert near.read(1) == b""
    assert len(messages) == 1
    assert "one at a time" in messages[0]


def test_a_session_step_by_step(ends: tuple[Connection, Connection], device: LoopbackDevice) -> None:
    """Without a device at first; what it waits for follows its state."""
    near, far = ends
    session = Session(far, None, version="step by step")
    poller = Poller()

    class End(GuestConnection):
        def wait(self, timeout: float | None, *, writing: bool) -> None:
            own = (near.fileno(), POLLIN | (POLLOUT if writing else 0))
            session.step(poller.wait([*session.wanted(), own], session.timeout() or 0.01))

    assert session.wanted() == [(far.fileno(), POLLIN | POLLOUT)], "the hello waits"
    assert session.timeout() is None
    end = End(near)
    with Guest(end) as guest:
        while not guest.host_version:
            guest.process()
            end.wait(PATIENCE, writing=False)
        assert guest.host_version == "step by step"
        assert guest.device is None
        assert session.wanted() == [(far.fileno(), POLLIN)]
        session.host.set_device(device)
        assert {fd for fd, _ in session.wanted()} == {far.fileno(), *(fd for fd, _ in device.pollfds())}
        guest.wait_for_device(PATIENCE)
        assert guest.bulk_out(0x01, b"x", timeout=PATIENCE).status == Status.SUCCESS
        near.close()
        wait_for(far)
        with pytest.raises(ConnectionClosed):
            session.step({far.fileno(): POLLIN})
    session.close()
    session.close()


def test_a_session_releases_its_device_whatever_writing_raises(
    ends: tuple[Connection, Connection], device: LoopbackDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    released: list[bool] = []
    session = Session(ends[0], device)

    def fail() -> None:
        raise RuntimeError("cannot write")

    monkeypatch.setattr(session.host, "write_guest_data", fail)
    monkeypatch.setattr(device, "release", lambda *arguments, **options: released.append(True))
    with pytest.raises(RuntimeError, match="cannot write"):
        session.close()
    assert released == [True]


def test_serving_can_be_stopped(listener: Listener, device: LoopbackDevice) -> None:
    """*stop* is asked whenever something happened; wake makes something happen."""
    stop = threading.Event()
    server = Server(listener, device, stop=stop.is_set)
    connection, guest = guest_at(listener)
    with connection, guest:
        guest.wait_for_device(PATIENCE)
        stop.set()
        device.wake()
        assert server.ended() is None
        with pytest.raises((ConnectionClosed, OSError)):
            guest.wait_for_disconnect(PATIENCE)


def test_the_first_wait_looks_again(ends: tuple[Connection, Connection]) -> None:
    """It returns at once: what was to wake it before could not. From then on it can be woken."""
    near, _ = ends
    near.wake()
    near.wait(None, writing=False)
    near.wake()
    near.wait(None, writing=False)


def test_a_timeout_may_be_longer_than_poll_can_take(ends: tuple[Connection, Connection]) -> None:
    """Years, as programs write that mean "for ever"."""
    near, far = ends
    far.write(memoryview(b"x"))
    assert poll([(near.fileno(), POLLIN)], 1e10)
    near.wait(1e300, writing=False)


def test_an_idle_device_is_unplugged(listener: Listener, device: LoopbackDevice) -> None:
    """Nothing is under way; *stop* may look for it."""
    server = Server(listener, device, stop=lambda: device.lost)
    connection, guest = guest_at(listener)
    with connection, guest:
        guest.wait_for_device(PATIENCE)
        device.unplug()
        assert server.ended() is None


def test_a_host_connection_logs(caplog: pytest.LogCaptureFixture) -> None:
    """To the function given, else to the logger "usbredir.host"."""
    messages: list[object] = []
    with listen("127.0.0.1:0") as listener:
        near, far = joined(listener)
        with near, far:
            HostConnection(near, lambda *message: messages.append(message)).log(LogLevel.ERROR, "one")
            HostConnection(near).log(LogLevel.ERROR, "two")
    assert messages == [(LogLevel.ERROR, "one")]
    assert [(record.name, record.getMessage()) for record in caplog.records] == [("usbredir.host", "two")]


@pytest.mark.skipif(sys.platform == "win32", reason="no sendmsg there")
def test_systems_without_vectored_writes(ends: tuple[Connection, Connection], monkeypatch: pytest.MonkeyPatch) -> None:
    """The first buffer is sent; the rest is offered again."""
    near, far = ends

    monkeypatch.setattr(near, "_sendmsg", None)
    assert near.writev([memoryview(b"one"), memoryview(b"two")]) == 3
    assert read_all(far, 3) == b"one"


@pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="no Unix sockets")
def test_a_unix_socket_whose_owner_is_busy_is_left_alone(tmp_path: Path) -> None:
    """As many wait there as fit: asking whether it is stale must not wait as well."""
    path = str(tmp_path / "busy")
    with socket.socket(socket.AF_UNIX) as owner:
        owner.bind(path)
        owner.listen(0)
        waiting = [socket.socket(socket.AF_UNIX) for _ in range(4)]
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(path)
        with pytest.raises(OSError, match="in use"):
            listen(f"unix:{path}")
        for one in waiting:
            one.close()


def test_memory_is_kept_while_a_guest_is_served(
    ends: tuple[Connection, Connection], device: LoopbackDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for name in ("_keep_memory", "_give_memory_back"):
        monkeypatch.setattr(transport, name, lambda name=name: calls.append(name))
    session = Session(ends[0], device)
    assert calls == ["_keep_memory"]
    session.close()
    assert calls == ["_keep_memory", "_give_memory_back"]


glibc = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or platform.python_implementation() != "CPython",
    reason="it is for glibc's malloc",
)

KEPT = """
import resource, sys
from usbredir import transport
if sys.argv[1] == "kept":
    transport._keep_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for round in range(12):
    if round == 4:
        before = faults()
    payloads = [b"x" * (1 << 20) for _ in range(16)]
    del payloads
print(faults() - before)
"""


@glibc
def test_memory_is_kept_once() -> None:
    """The second guest of a process does not pay for it again: no page of the block is touched."""
    program = """
import resource
from usbredir import transport
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
before = faults()
for _ in range(4):
    transport._keep_memory()
print(faults() - before)
"""
    faults = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, check=True).stdout
    assert int(faults) < 100


@glibc
def test_memory_is_given_back() -> None:
    """Also what lies below something that is still in use."""
    program = """
from usbredir import transport
def resident():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS"))
transport._keep_memory()
payloads, small = [], []
for _ in range(24):
    payloads.append(b"x" * (1 << 20))
    small.append([bytes(700) for _ in range(100)])
del payloads
before = resident()
transport._give_memory_back()
print(before - resident())
"""
    given = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, check=True).stdout
    assert int(given) > 12 * 1024


@glibc
def test_memory_of_payloads_is_kept() -> None:
    """Large payloads that come and go cost no page faults."""
    counts = {}
    for way in ("kept", "given back"):
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
        command = [sys.executable, "-c", KEPT, way]
        counts[way] = int(subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout)
    assert 4 * counts["kept"] < counts["given back"]  # in pages, which may be huge ones
