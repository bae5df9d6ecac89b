"""Connections that ``usbredir run`` has made, for the program that it becomes: the first process to need them has them.

A host serves one guest at a time, and some end with their first one. So the connection that shows that the host
answers is the one that is used. A process of its own holds it, until somebody fetches it from a socket in a private
folder or the program has ended. Processes that come later connect by themselves. Windows cannot hand connections
over: all connect there.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Mapping

from .pyusb_backend import Backend, get_backend
from .transport import Connection, Poller

__all__ = ["backend", "hand_over"]

MAX_CONNECTIONS = 253
"""Descriptors that one message can carry."""
PATIENCE = 5.0
"""Seconds that the holder may take to answer."""
NAME = "connections"
SHORT_FOLDER = "/tmp"
"""Where sockets can be when TMPDIR is too long for the name of one."""
POLLIN = 1
_FETCHING = threading.Lock()


def hand_over(connections: Mapping[str, Connection]) -> str:
    """Leave connections, by address, to the program that this process will become. Gives the text for :func:`backend`.

    They are closed here. Raises ValueError for more than 253. Threads: the only one.
    """
    if len(connections) > MAX_CONNECTIONS:
        raise ValueError(f"{len(connections)} addresses: at most {MAX_CONNECTIONS} work")
    folder = _leave(connections) if hasattr(os, "fork") else ""
    for connection in connections.values():
        connection.close()
    return "\n".join((folder, *connections))


def _leave(connections: Mapping[str, Connection]) -> str:
    """Start the process that holds the connections; the folder of its socket, "": that cannot be done."""
    with socket.socket(socket.AF_UNIX) as listener:
        folder = _listen(listener)
        if not folder:
            return ""
        program_ended, program_runs = os.pipe()
        try:
            child = os.fork()
        except OSError:
            os.close(program_runs)
            os.close(program_ended)
            shutil.rmtree(folder, ignore_errors=True)
            return ""
        if not child:
            try:
                _become_holder(program_runs)
                _hold(connections, listener, program_ended)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
                os._exit(0)
    os.set_inheritable(program_runs, True)  # the program's copy is closed when it ends
    os.close(program_ended)
    os.waitpid(child, 0)
    return folder


def _listen(listener: socket.socket) -> str:
    """Bind to a name in a new private folder: the folder, "" when there is no place for one."""
    for parent in (None, SHORT_FOLDER):
        with contextlib.suppress(OSError):
            folder = tempfile.mkdtemp(prefix="usbredir-run-", dir=parent)
            try:
                listener.bind(os.path.join(folder, NAME))
                listener.listen()
            except OSError:  # the name is too long for a socket, or the file system has none
                shutil.rmtree(folder, ignore_errors=True)
            else:
                return folder
    return ""


def _become_holder(program_runs: int) -> None:
    """A process that is nobody's child, in no terminal, and keeps none of the program's files open."""
    os.setsid()
    if os.fork():
        os._exit(0)
    os.close(program_runs)
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in range(3):
        os.dup2(nothing, descriptor)


def _hold(connections: Mapping[str, Connection], listener: socket.socket, program_ended: int) -> None:
    ready = Poller().wait([(listener.fileno(), POLLIN), (program_ended, POLLIN)], None)
    if listener.fileno() in ready:
        with listener.accept()[0] as taker:
            addresses = "\n".join(connections).encode()
            socket.send_fds(taker, [addresses], [connection.fileno() for connection in connections.values()])


def backend(text: str) -> Backend:
    """The back end for what :func:`hand_over` gave. Raises USBError when nobody answers. Threads: any."""
    folder, *addresses = text.split("\n")
    with _FETCHING:
        return get_backend(*addresses, connections=_fetch(folder) if folder else {})


def _fetch(folder: str) -> dict[str, Connection]:
    """The connections, unless another process was first."""
    message, descriptors = b"", list[int]()
    with socket.socket(socket.AF_UNIX) as holder, contextlib.suppress(OSError):
        holder.settimeout(PATIENCE)
        holder.connect(os.path.join(folder, NAME))
        message, descriptors, _, _ = socket.recv_fds(holder, 1 << 16, MAX_CONNECTIONS)
    fetched = {}
    for address, descriptor in zip(message.decode().split("\n"), descriptors, strict=False):
        os.set_inheritable(descriptor, False)
        fetched[address] = Connection(socket.socket(fileno=descriptor), address)
    return fetched
