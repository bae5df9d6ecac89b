"""TCP keep-alive: the system finds out when the machine at the other end is gone."""

from __future__ import annotations

import socket

__all__ = ["keep_alive"]

IDLE = 30
"""Seconds of silence before the first probe."""
INTERVAL = 10
"""Seconds between probes."""
PROBES = 3
"""Probes without answer after which the peer is gone."""


def keep_alive(sock: socket.socket, *, idle: int = IDLE, unanswered: float | None = None) -> None:
    """Switch it on; see :meth:`usbredir.transport.Connection.keep_alive`. Raises OSError."""
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    values = {"TCP_KEEPIDLE": idle, "TCP_KEEPINTVL": INTERVAL, "TCP_KEEPCNT": PROBES}
    if unanswered is not None:
        values["TCP_USER_TIMEOUT"] = int(unanswered * 1000)
    for name, value in values.items():
        option = getattr(socket, name, None)
        if option is not None:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
