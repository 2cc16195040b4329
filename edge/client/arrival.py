"""A connection of a listener with TLS, until its TLS is ready: it waits for its first byte, then for its handshake.

Most of a flood never gets further, so it is a small object and a timer: no parser, no task, no handshake.
"""

import asyncio
from typing import TYPE_CHECKING, Any, Final

from uvloop.loop import SSLProtocol  # type: ignore[attr-defined]  # whose stubs have the loop alone

from edge.client.addresses import Visit
from edge.client.connection import LAST_REQUEST_S, LOOK_AGAIN_S
from edge.sockets import has_input
from edge.stage import Stage

if TYPE_CHECKING:
    from edge.client.server import ClientServer

FIRST_BYTE_OF_TLS_S: Final = 2.0  # its client sends it as soon as it is connected (RFC 8446 section 2)


class Arrival(asyncio.Protocol):
    """One accepted connection, until a `ClientConnection` can read its requests."""

    __slots__ = ("_loop", "_server", "_timer", "_wire", "visit")

    def __init__(self, server: "ClientServer", loop: asyncio.AbstractEventLoop) -> None:
        self._server = server
        self._loop = loop
        self._timer: asyncio.TimerHandle | None = None
        self._wire: Any = None  # a transport of uvloop
        self.visit: Visit

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Have it counted, and wait for its first byte."""
        self._wire = transport
        self.visit = self._server.arrive(transport)
        if transport.is_closing():
            return
        self._server.arrivals.add(self)
        if self.visit.refusal is None:  # else it does not give way to others: it is not counted
            self._server.silent[self] = None
        if self._server.lifecycle.stage >= Stage.CLOSING:  # the kernel had accepted it before
            self.leave_soon()
        else:
            self._close_in(FIRST_BYTE_OF_TLS_S)

    def data_received(self, data: bytes) -> None:
        """Begin TLS with its first bytes, which were read without it."""
        self._server.silent.pop(self, None)
        if self._server.lifecycle.stage >= Stage.CLOSING:
            self.leave_soon()  # unless its handshake is over by then
        else:
            self._stop_timer()
        over = self._loop.create_future()
        over.add_done_callback(self._handshake_over)
        protocol = SSLProtocol(
            self._loop,
            self._server.connection(self.visit),
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

    def connection_lost(self, exc: BaseException | None) -> None:
        """Have it counted out: it never said anything."""
        self._stop_timer()
        self._leave()

    def _handshake_over(self, over: "asyncio.Future[None]") -> None:
        """Let go of a client whose requests are read by now, or never will be."""
        self._stop_timer()
        if not over.cancelled():
            over.exception()  # which nobody else asks for
        if self.visit.is_ready:
            self._server.arrivals.discard(self)
        elif self in self._server.arrivals:
            self._server.failed_handshakes += 1
            self._leave()

    # --- its end

    @property
    def may_give_way(self) -> bool:
        """Whether nothing of it waits in the kernel."""
        return not has_input(self._wire)

    def leave_soon(self) -> None:
        """Close unless its first request can be read within `LAST_REQUEST_S`."""
        self._close_in(LAST_REQUEST_S)

    def give_way(self) -> None:
        """Close at once."""
        self._stop_timer()
        self._leave()
        self._wire.abort()

    def _leave(self) -> None:
        self._server.silent.pop(self, None)
        self._server.arrivals.discard(self)
        self._server.left(self.visit)

    def _close_in(self, patience_s: float) -> None:
        self._stop_timer()
        self._timer = self._loop.call_later(patience_s, self._too_late)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _too_late(self) -> None:
        if has_input(self._wire):  # the loop is busy
            self._close_in(LOOK_AGAIN_S)
            return
        if self in self._server.silent:
            self._server.silent_handshakes += 1
        self.give_way()
