"""What the kernel does and knows of a connection: whether its peer has vanished, and what waits unread or unsent.

Who vanishes sends no end. A silent peer is noticed within 15 s and three intervals, one that was sent something within
about 30 s: not sooner, since a host that moves to another machine is silent for some (tcp(7), RFC 5482).
"""

import asyncio
import fcntl
import socket
import struct
import termios
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


def has_input(transport: asyncio.BaseTransport) -> bool:
    """Return whether bytes of the peer wait in the kernel."""
    return _asked_of_kernel(transport, termios.FIONREAD) > 0


def unsent_bytes(transport: asyncio.BaseTransport) -> int:
    """Return how many bytes wait in the kernel for the peer to take them."""
    return _asked_of_kernel(transport, termios.TIOCOUTQ)


def _asked_of_kernel(transport: asyncio.BaseTransport, request: int) -> int:
    descriptor = transport.get_extra_info("socket").fileno()
    return int(struct.unpack("i", fcntl.ioctl(descriptor, request, bytes(4)))[0]) if descriptor >= 0 else 0
