"""The server in front: aiohttp's low-level one, building our connections, counting and bounding them."""

import asyncio
import ssl
from collections.abc import Awaitable, Callable
from itertools import islice
from typing import Any, Final

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from edge.client import bounds, connection
from edge.client.addresses import Addresses, Visit
from edge.client.arrival import Arrival
from edge.client.connection import ClientConnection, Request
from edge.config.process_settings import ServerConfig
from edge.errors import EdgeError, Overloaded
from edge.stage import Lifecycle

MOST_REFUSED: Final = 32  # at once by an answer, for whose reading they linger; more are closed at once
_OWN_TIME_S: Final = 1.0  # in which a connection's first byte comes, unless its network is very bad
_LOOKED_AT: Final = 64  # of which one is to give way; a flood must not have all of many thousands asked
_MANY_SILENT: Final = 4  # a part of the places: so many that say nothing are a flood, however young


async def _never_called(request: web.BaseRequest) -> web.StreamResponse:
    """Stand where aiohttp wants its own kind of handler; `ClientConnection.start` calls ours."""
    raise NotImplementedError


class ClientServer(web.Server):
    """aiohttp's low-level server, building our connections.

    `arrivals` are the connections whose TLS is not ready yet, `clients` those whose requests can be read. `silent` are
    those of which no byte came yet, without TLS or before it, the longest first; `idle` the clients that wait for a
    further request, of which nothing came yet, the longest first.
    """

    def __init__(
        self,
        handle: Callable[[Request], Awaitable[None]],
        lifecycle: Lifecycle,
        config: ServerConfig,
        max_connections: int,
    ) -> None:
        # A client that leaves cancels its handler, also before the first byte: the GPU slot is what this saves.
        super().__init__(_never_called, handler_cancellation=True)
        self.handle = handle
        self.lifecycle = lifecycle
        self.tls: ssl.SSLContext | None = None
        self._options: dict[str, Any] = {
            "loop": self._loop,
            "lingering_time": connection.LINGER_S,
            "access_log": None,
            "auto_decompress": False,
            "max_line_size": bounds.MAX_REQUEST_LINE_BYTES,
            "max_field_size": bounds.MAX_FIELD_BYTES,
            "max_headers": bounds.MAX_FIELDS,
        }
        self.addresses = Addresses()
        self.reconfigure(config, max_connections)
        self.arrivals: set[Arrival] = set()
        self.clients: set[ClientConnection] = set()
        self.silent: dict[Arrival | ClientConnection, None] = {}
        self.idle: dict[ClientConnection, None] = {}
        self._visits: set[Visit] = set()
        self._refused = 0  # of them, which are still there
        self._empty = asyncio.Event()
        self.accepted_connections = 0
        self.evicted_connections = 0
        self.refused_connections = 0
        self.silent_handshakes = 0
        self.failed_handshakes = 0
        self.malformed_requests = 0
        self.parsed_heads = 0

    def __call__(self) -> Arrival | ClientConnection:  # type: ignore[override]  # only listeners call it
        """Make the protocol of one accepted connection."""
        return self.connection() if self.tls is None else Arrival(self, self._loop)

    def connection(self, visit: Visit | None = None) -> ClientConnection:
        """Make the protocol of one connection whose requests are to be read."""
        return ClientConnection(self, visit, **self._options)

    # --- the life of a connection

    def arrive(self, transport: asyncio.BaseTransport) -> Visit:
        """Count a connection in; it learns its refusal, or is ended, when there is no room for it."""
        self.accepted_connections += 1
        visit = Visit(transport, self._loop.time())
        if not visit.peer:
            transport.abort()  # type: ignore[attr-defined]  # of what was accepted
            return visit
        try:
            visit.address = self.addresses.hold(visit.peer)
            if self.open_connections >= self.max_connections and not self._make_room():
                self.refused_connections += 1
                raise Overloaded("The edge has too many connections, try again in a moment.", retry_after_s=1)
        except EdgeError as refusal:
            visit.refusal = refusal
            if visit.address:
                self.addresses.give_back(visit.address)
            if self._refused >= MOST_REFUSED:
                visit.wire.abort()
                return visit
            self._refused += 1
        self._visits.add(visit)
        return visit

    def left(self, visit: Visit | None) -> None:
        """Count a connection out; again is once."""
        if visit is None or visit not in self._visits:
            return
        self._visits.discard(visit)
        if visit.refusal is not None:
            self._refused -= 1
        elif visit.address:
            self.addresses.give_back(visit.address)
        if not self._visits:
            self._empty.set()

    def connection_made(self, handler: RequestHandler, transport: asyncio.Transport) -> None:
        """Note that requests can be read."""
        super().connection_made(handler, transport)
        assert isinstance(handler, ClientConnection)
        self.clients.add(handler)

    def connection_lost(self, handler: RequestHandler, exc: BaseException | None = None) -> None:
        """Count a connection out, unless it gave way."""
        super().connection_lost(handler, exc)
        assert isinstance(handler, ClientConnection)
        self.not_idle(handler)
        self.clients.discard(handler)
        self.left(handler.visit)

    def not_idle(self, client: ClientConnection) -> None:
        """Note that something of a request has come."""
        self.silent.pop(client, None)
        self.idle.pop(client, None)

    # --- how many there may be

    @property
    def open_connections(self) -> int:
        """How many connections are open, but for those that linger with their refusal."""
        return len(self._visits) - self._refused

    @property
    def handshakes(self) -> int:
        """How many TLS handshakes have begun and are not over."""
        return len(self.arrivals) - len(self.silent) if self.tls is not None else 0

    def _make_room(self) -> bool:
        """Close a connection that does nothing; return whether there was one.

        One that never sent a byte goes first, once it has had its time or there are many; then the longest idle. Of
        which bytes wait in the kernel is not idle: who closes then loses a request (RFC 9112 section 9.5).
        """
        silent = _first_that_may(self.silent)
        many = len(self.silent) >= self.max_connections // _MANY_SILENT
        if silent is None or not (many or silent.visit.since + _OWN_TIME_S < self._loop.time()):
            silent = _first_that_may(self.idle) or silent
        if silent is None:
            return False
        silent.give_way()
        self.evicted_connections += 1
        return True

    def reconfigure(self, config: ServerConfig, max_connections: int) -> None:
        """Take over a reload's values: idle times from the next connection on."""
        self._options["keepalive_timeout"] = self.client_idle_timeout_s = config.client_idle_timeout_s
        self.max_body_bytes = config.max_body_bytes
        self.header_timeout_s = config.header_timeout_s
        self.max_connections = max_connections
        self.addresses.most = config.max_connections_per_address
        self.addresses.trusted = config.trusted_proxies

    # --- the end

    async def wait_empty(self) -> None:
        """Wait until no connection is open."""
        while self._visits:
            self._empty.clear()
            await self._empty.wait()


def _first_that_may(waiting: dict[Any, None]) -> Any:
    """Return the first that may give way, None for none; who may not, is asked after all others."""
    for each in tuple(islice(waiting, _LOOKED_AT)):
        if each.may_give_way:
            return each
        waiting[each] = waiting.pop(each)
    return None
