"""How the kernel notices that who is at the other end of a connection has vanished: that one sends no end.

A silent peer is noticed within 15 s and three intervals, one that was sent something within about 30 s: not sooner,
since a host that moves to another machine is silent for some (tcp(7), RFC 5482).
"""

import socket
from typing import Final

_OPTIONS: Final = (
    (socket.SOL_SOCKET, "SO_KEEPALIVE", 1),
    (socket.IPPROTO_TCP, "TCP_KEEPIDLE", 15),
    (socket.IPPROTO_TCP, "TCP_KEEPCNT", 3),
    (socket.IPPROTO_TCP, "TCP_USER_TIMEOUT", 30_000),  # ms
)


def notices_of_death(interval_s: int) -> tuple[tuple[int, int, int], ...]:
    """Return the options, as `setsockopt` takes them, with `interval_s` between two questions to a silent peer."""
    options = (*_OPTIONS, (socket.IPPROTO_TCP, "TCP_KEEPINTVL", interval_s))
    # Linux has all of them.
    return tuple((level, getattr(socket, name), value) for level, name, value in options if hasattr(socket, name))
