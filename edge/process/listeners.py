"""The sockets that clients and operators connect to: bound here, or handed over by systemd.

Operators have descriptors of their own. The soft limit of open files, which the kernel goes by, lies below the hard one
(getrlimit(2)); it is lifted for the accepting of their connections alone. So whatever took the others, clients,
upstreams or files, health and metrics are answered.
"""

import asyncio
import contextlib
import logging
import os
import resource
import socket
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, Final

from aiohttp import web

from edge.config.values import Address

_log = logging.getLogger(__name__)

_FIRST_PASSED_DESCRIPTOR: Final = 3  # sd_listen_fds(3)
_OPERATORS_DESCRIPTORS: Final = 32  # probes of balancers keep their connections
_OPERATORS_PART: Final = 16  # of a small limit they have a part
_ACCEPT_PAUSE_S: Final = 1.0  # when the kernel has no room for another connection: asking at once would take the CPU


def passed_sockets() -> list[socket.socket]:
    """Return the listening sockets that systemd hands over (sd_listen_fds(3)): no connection is lost at a restart."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return []
    count = int(os.environ.get("LISTEN_FDS", "0"))
    sockets = [socket.socket(fileno=_FIRST_PASSED_DESCRIPTOR + index) for index in range(count)]
    for sock in sockets:
        sock.setblocking(False)
    return sockets


def bind(address: Address) -> socket.socket:
    """Return a socket bound to an address; a unix socket that a killed process left is replaced. Raises `OSError`."""
    at: Any
    if address.path is not None:
        if address.path.is_socket():
            address.path.unlink()
        sock, at = socket.socket(socket.AF_UNIX), str(address.path)
    else:
        family, kind, protocol, _, at = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, protocol)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind(at)
    except OSError as error:
        sock.close()
        raise OSError(error.errno, f"{address}: {error.strerror}") from None
    sock.setblocking(False)
    return sock


def raise_descriptor_limit() -> int:
    """Raise the limit of open files to its hard value, but for what is kept for operators; return how many are left."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY:
        hard = 1 << 20
    soft = hard - min(_OPERATORS_DESCRIPTORS, hard // _OPERATORS_PART)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return soft


@contextlib.contextmanager
def _all_descriptors() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


class AdminListener:
    """Accepts the connections of operators, also when no descriptor is left for anybody else.

    As many may be open as there are descriptors kept for them; a further one closes the oldest that does nothing.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sock: socket.socket,
        handler: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]],
    ) -> None:
        self._loop = loop
        self._sock = sock
        self._server = web.Server(handler, access_log=None)
        self._opening: set[asyncio.Task[Any]] = set()
        self._pause: asyncio.TimerHandle | None = None
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._most = max(hard - soft, 1)
        sock.listen()
        self._resume()

    def _resume(self) -> None:
        self._loop.add_reader(self._sock, self._accept)

    def _accept(self) -> None:
        try:
            with _all_descriptors():
                connection, _ = self._sock.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError as error:
            _log.error("admin: no connection can be accepted: %s", error.strerror)
            self._loop.remove_reader(self._sock)
            self._pause = self._loop.call_later(_ACCEPT_PAUSE_S, self._resume)
            return
        connection.setblocking(False)
        opening = self._loop.create_task(self._loop.connect_accepted_socket(self._server, connection))
        self._opening.add(opening)
        opening.add_done_callback(self._opened)
        connections = self._server.connections
        if len(connections) >= self._most:
            idle = (each for each in connections if each._current_request is None)
            next(idle, connections[0]).force_close()

    def _opened(self, opening: "asyncio.Task[Any]") -> None:
        self._opening.discard(opening)
        if not opening.cancelled():
            opening.exception()  # who left at once is nobody's fault

    def close(self) -> None:
        """Accept no more."""
        if self._pause is not None:
            self._pause.cancel()
        self._loop.remove_reader(self._sock)
        self._sock.close()

    async def shutdown(self, patience_s: float) -> None:
        """End the open connections."""
        await self._server.shutdown(patience_s)


def name_of(sock: socket.socket) -> str:
    """Return the address of a socket, as it is written in `server.listen`."""
    name = sock.getsockname()
    if sock.family == socket.AF_UNIX:
        return f"unix:{name}"
    return str(Address(name[0], name[1]))
