"""A connection before its first request: it waits for its first byte, then for its TLS.

Most of a flood never gets further, so it is a small object and a timer: no parser, no task, no handshake.
"""

import asyncio
from typing import TYPE_CHECKING, Any, Final

from uvloop.loop import SSLProtocol  # type: ignore[attr-defined]  # whose stubs have the loop alone

from edge.client.addresses import one_client
from edge.client.connection import LAST_REQUEST_S, LOOK_AGAIN_S, ClientConnection
from edge.errors import EdgeError
from edge.sockets import has_input
from edge.stage import Stage

if TYPE_CHECKING:
    from edge.client.server import ClientServer

FIRST_BYTE_OF_TLS_S: Final = 2.0  # its client sends it as soon as it is connected (RFC 8446 section 2)


class Arrival(asyncio.Protocol):
    """One accepted connection, until it is handed to its `ClientConnection`.

    `peer` is the client's address, "unix" on a unix socket; `address` what is counted as one client; `since` when it
    was accepted; `refusal` what it is answered instead of being served.
    """

    __slots__ = ("_loop", "_server", "_timer", "_wire", "address", "peer", "refusal", "since")

    def __init__(self, server: "ClientServer", loop: asyncio.AbstractEventLoop) -> None:
        self._server = server
        self._loop = loop
        self._timer: asyncio.TimerHandle | None = None
        self._wire: Any = None  # a transport of uvloop
        self.address: str | bytes = ""
        self.peer = "unix"
        self.refusal: EdgeError | None = None
        self.since = loop.time()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Have it counted, and wait for its first byte; without TLS a refusal needs none."""
        self._wire = transport
        name = transport.get_extra_info("peername")
        if name is None:  # it has left already
            self._wire.abort()
            return
        if isinstance(name, tuple):
            # An IPv4 client of a listener for both is that client, not an IPv6 one (RFC 4291 section 2.5.5.2).
            self.peer = name[0].removeprefix("::ffff:")
        self.address = one_client(self.peer)
        self._server.arrive(self)
        if transport.is_closing():
            return
        if self.refusal is not None and self._server.tls is None:
            self._begin()
        elif self._server.lifecycle.stage >= Stage.CLOSING:  # the kernel had accepted it before
            self.leave_soon()
        else:
            self._close_in(self._server.client_idle_timeout_s if self._server.tls is None else FIRST_BYTE_OF_TLS_S)

    def data_received(self, data: bytes) -> None:
        """Begin: with the first request, or with the first bytes of a handshake."""
        if self._server.tls is not None:
            self._shake_hands(data)
        else:
            self._begin().receive_soon(data)

    def connection_lost(self, exc: BaseException | None) -> None:
        """Have it counted out: it never said anything."""
        self._stop_timer()
        self._server.left(self)

    def _begin(self) -> ClientConnection:
        self._stop_timer()
        connection = self._server.connection(self)
        self._wire.set_protocol(connection)
        connection.connection_made(self._wire)
        return connection

    def _shake_hands(self, data: bytes) -> None:
        if self._server.lifecycle.stage >= Stage.CLOSING:
            self.leave_soon()  # unless its handshake is over by then
        else:
            self._stop_timer()
        self._server.begin_handshake(self)
        over = self._loop.create_future()
        over.add_done_callback(self._handshake_over)
        protocol = SSLProtocol(
            self._loop,
            self._server.connection(self),
            self._server.tls,
            over,
            server_side=True,
            ssl_handshake_timeout=self._server.header_timeout_s,
        )
        self._wire.set_protocol(protocol)
        protocol.connection_made(self._wire)
        while data and not self._wire.is_closing():
            buffer = protocol.get_buffer(len(data))
            taken = min(len(buffer), len(data))
            buffer[:taken] = data[:taken]
            protocol.buffer_updated(taken)
            data = data[taken:]

    def _handshake_over(self, over: "asyncio.Future[None]") -> None:
        self._stop_timer()
        if not over.cancelled():
            over.exception()  # which nobody else asks for
        self._server.end_handshake(self)

    # --- its end

    def has_input(self) -> bool:
        """Return whether bytes of it wait in the kernel."""
        return has_input(self._wire)

    def has_output(self) -> bool:
        """Return whether bytes for it wait here; those of TLS too, once they are encrypted."""
        return bool(self._wire.get_write_buffer_size())

    def leave_soon(self) -> None:
        """Close unless its first request can be read within `LAST_REQUEST_S`."""
        self._close_in(LAST_REQUEST_S)

    def close(self) -> None:
        """Close at once."""
        self._server.left(self)
        self._wire.abort()

    def _close_in(self, patience_s: float) -> None:
        self._stop_timer()
        self._timer = self._loop.call_later(patience_s, self._too_late)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _too_late(self) -> None:
        if self.has_input():  # the loop is busy
            self._close_in(LOOK_AGAIN_S)
            return
        if self._server.tls is not None and self in self._server.silent:
            self._server.silent_handshakes += 1
        self.close()
