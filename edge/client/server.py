"""The server in front: aiohttp's low-level one, building our connections, counting and bounding them."""

import asyncio
import ssl
from collections.abc import Awaitable, Callable
from itertools import islice
from typing import Any, Final

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from edge.client import bounds, connection
from edge.client.addresses import Addresses
from edge.client.arrival import Arrival
from edge.client.connection import ClientConnection, Request
from edge.config.settings import ServerConfig
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

    A connection is in one of `silent`, of which no byte came yet, `handshakes`, and `clients`. `idle` are the clients
    that wait for a request of which nothing came yet, the longest first, and so is `silent`.
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
        self.silent: dict[Arrival, None] = {}
        self.handshakes: set[Arrival] = set()
        self.clients: set[ClientConnection] = set()
        self.idle: dict[ClientConnection, None] = {}
        self._refused = 0  # which are still there
        self._empty = asyncio.Event()
        self.accepted_connections = 0
        self.evicted_connections = 0
        self.refused_connections = 0
        self.silent_handshakes = 0
        self.failed_handshakes = 0
        self.malformed_requests = 0

    def __call__(self) -> Arrival:  # type: ignore[override]  # only listeners call it
        """Make the protocol of one accepted connection."""
        return Arrival(self, self._loop)

    def connection(self, arrival: Arrival) -> ClientConnection:
        """Make the protocol of one connection whose requests are to be read."""
        return ClientConnection(self, arrival, **self._options)

    # --- the life of a connection

    def arrive(self, arrival: Arrival) -> None:
        """Count a connection in; it learns its refusal, or is ended, when there is no room for it."""
        self.accepted_connections += 1
        self.silent[arrival] = None
        try:
            self.addresses.check(arrival.peer, arrival.address)
            if self.open_connections > self.max_connections and not self._make_room(arrival):
                self.refused_connections += 1
                raise Overloaded("The edge has too many connections, try again in a moment.", retry_after_s=1)
        except EdgeError as refusal:
            self._refuse(arrival, refusal)
        else:
            self.addresses.take(arrival.address)

    def begin_handshake(self, arrival: Arrival) -> None:
        """Note that the first bytes of TLS came."""
        self.silent.pop(arrival, None)
        self.handshakes.add(arrival)

    def end_handshake(self, arrival: Arrival) -> None:
        """Note that TLS is ready, or never will be."""
        if arrival in self.handshakes:
            self.failed_handshakes += 1
            self.left(arrival)

    def connection_made(self, handler: RequestHandler, transport: asyncio.Transport) -> None:
        """Note that requests can be read."""
        super().connection_made(handler, transport)
        assert isinstance(handler, ClientConnection)
        self.silent.pop(handler.arrival, None)
        self.handshakes.discard(handler.arrival)
        self.clients.add(handler)

    def connection_lost(self, handler: RequestHandler, exc: BaseException | None = None) -> None:
        """Count a connection out, unless it gave way."""
        super().connection_lost(handler, exc)
        assert isinstance(handler, ClientConnection)
        self.idle.pop(handler, None)
        if handler in self.clients:
            self.clients.discard(handler)
            self._leave(handler.arrival)

    def left(self, arrival: Arrival) -> None:
        """Count a connection out that has had no request; again is once."""
        if arrival in self.silent or arrival in self.handshakes:
            self.silent.pop(arrival, None)
            self.handshakes.discard(arrival)
            self._leave(arrival)

    def _leave(self, arrival: Arrival) -> None:
        if arrival.refusal is not None:
            self._refused -= 1
        else:
            self.addresses.give_back(arrival.address)
        if not (self.clients or self.silent or self.handshakes):
            self._empty.set()

    # --- how many there may be

    @property
    def open_connections(self) -> int:
        """How many connections are open, but for those that linger with their refusal."""
        return len(self.silent) + len(self.handshakes) + len(self.clients) - self._refused

    def _refuse(self, arrival: Arrival, refusal: EdgeError) -> None:
        """Have a connection answered by an error, or ended at once when many are."""
        arrival.refusal = refusal
        self._refused += 1
        self.begin_handshake(arrival)  # it does not give way to others: it is not counted
        if self._refused > MOST_REFUSED:
            arrival.close()

    def _make_room(self, newcomer: Arrival) -> bool:
        """Close a connection that does nothing; return whether there was one.

        One that never sent a byte goes first, once it has had its time or there are many; then the longest idle. Of
        which bytes wait in the kernel is not idle: who closes then loses a request (RFC 9112 section 9.5).
        """
        silent = next((each for each in islice(self.silent, _LOOKED_AT) if not each.has_input()), None)
        if silent is newcomer:  # the last of them
            silent = None
        many = len(self.silent) > self.max_connections // _MANY_SILENT
        silent_first = silent is not None and (many or silent.since + _OWN_TIME_S < self._loop.time())
        idle = None if silent_first else self._longest_idle()
        if idle is not None:
            self.clients.discard(idle)
            self._leave(idle.arrival)
            idle.force_close()
            self._loop.call_soon(idle.abort)  # TLS would wait for the client's own end; ours has gone out by then
        elif silent is not None:
            silent.close()
        else:
            return False
        self.evicted_connections += 1
        return True

    def _longest_idle(self) -> ClientConnection | None:
        """Return one that may give way; who may not, since it does not read its answer, is asked after all others."""
        for each in tuple(islice(self.idle, _LOOKED_AT)):
            if each.may_give_way:
                return each
            self.idle[each] = self.idle.pop(each)
        return None

    def reconfigure(self, config: ServerConfig, max_connections: int) -> None:
        """Take over a reload's values: idle times from the next connection on."""
        self._options["keepalive_timeout"] = self.client_idle_timeout_s = config.client_idle_timeout_s
        self.max_body_bytes = config.max_body_bytes
        self.header_timeout_s = config.header_timeout_s
        self.max_connections = max_connections
        self.addresses.most = config.max_connections_per_address
        self.addresses.trusted = config.trusted_proxies

    # --- the end

    def arrivals(self) -> tuple[Arrival, ...]:
        """Return the connections of which no request can be read yet."""
        return (*self.silent, *self.handshakes)

    async def wait_empty(self) -> None:
        """Wait until no connection is open."""
        while self.clients or self.silent or self.handshakes:
            self._empty.clear()
            await self._empty.wait()
