"""The server in front: aiohttp's low-level one, building our connections and counting them."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Final

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from edge.client import bounds, connection
from edge.client.connection import ClientConnection, Request
from edge.config.settings import ServerConfig
from edge.stage import Lifecycle

_REFUSED_AT_ONCE: Final = 32  # connections beyond the bound that are refused by an answer; more are closed at once


async def _never_called(request: web.BaseRequest) -> web.StreamResponse:
    """Stand where aiohttp wants its own kind of handler; `ClientConnection.start` calls ours."""
    raise NotImplementedError


class ClientServer(web.Server):
    """aiohttp's low-level server, building our connections."""

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
        self._options: dict[str, Any] = {
            "loop": self._loop,
            "lingering_time": connection.LINGER_S,
            "access_log": None,
            "auto_decompress": False,
            "max_line_size": bounds.MAX_REQUEST_LINE_BYTES,
            "max_field_size": bounds.MAX_FIELD_BYTES,
            "max_headers": bounds.MAX_FIELDS,
        }
        self.reconfigure(config, max_connections)
        self.clients: set[ClientConnection] = set()
        self._empty = asyncio.Event()
        self.accepted_connections = 0
        self.refused_connections = 0
        self.malformed_requests = 0

    def __call__(self) -> ClientConnection:
        """Make the protocol of one accepted connection."""
        return ClientConnection(self, **self._options)

    def connection_made(self, handler: RequestHandler, transport: asyncio.Transport) -> None:
        """Count a connection in."""
        super().connection_made(handler, transport)
        assert isinstance(handler, ClientConnection)
        self.clients.add(handler)
        self.accepted_connections += 1

    def connection_lost(self, handler: RequestHandler, exc: BaseException | None = None) -> None:
        """Count a connection out."""
        super().connection_lost(handler, exc)
        self.clients.discard(handler)
        if not self.clients:
            self._empty.set()

    @property
    def is_full(self) -> bool:
        """Whether there is one connection too many."""
        return len(self.clients) > self.max_connections

    @property
    def is_flooded(self) -> bool:
        """Whether so many linger to read their refusal that descriptors would run out."""
        return len(self.clients) > self.max_connections + _REFUSED_AT_ONCE

    def reconfigure(self, config: ServerConfig, max_connections: int) -> None:
        """Take over a reload's values: idle times from the next connection on."""
        self._options["keepalive_timeout"] = self.client_idle_timeout_s = config.client_idle_timeout_s
        self.max_body_bytes = config.max_body_bytes
        self.header_timeout_s = config.header_timeout_s
        self.max_connections = max_connections

    async def wait_empty(self) -> None:
        """Wait until no connection is open."""
        while self.clients:
            self._empty.clear()
            await self._empty.wait()
