"""The client's side of a connection: aiohttp's parser and life cycle, our bytes.

aiohttp accepts, parses, bounds pipelining and notices departure. Everything that goes out is written raw to the
transport, so no response object is ever built, and `last` is whether another request may follow. What aiohttp 3.14
gets wrong for an edge is put right here, each with its reason; it rides on internals, so the version is pinned.
"""

import asyncio
import socket
import struct
from typing import TYPE_CHECKING, Any, Final, Protocol

from aiohttp import StreamReader
from aiohttp.http_parser import RawRequestMessage
from aiohttp.streams import EMPTY_PAYLOAD
from aiohttp.web_protocol import RequestHandler

from edge.client.addresses import Visit
from edge.client.answers import error_response
from edge.client.bounds import MAX_HEAD_BYTES, head_too_large, parser_error
from edge.client.head import Head
from edge.client.repeats import Repeats
from edge.client.steps import STEP_BYTES, SteppedHandler
from edge.errors import EdgeError, InvalidRequest, RequestTimeout
from edge.ids import new_request_id
from edge.operations import protocol_of_line
from edge.sockets import has_input, notices_of_death, unsent_bytes
from edge.stage import Stage

if TYPE_CHECKING:
    from edge.client.server import ClientServer

_LINE_BYTES: Final = 64  # of a request line, in which every path stands that has a protocol of its own
_DRAINING: Final = Stage.DRAINING
_CLOSING: Final = Stage.CLOSING
LOOK_AGAIN_S: Final = 0.1  # at a connection that is idle for too long while a request begins to arrive
# A request that crosses the end of its connection is lost. So one that may still get a request stays so long, once the
# listeners are closed or its last answer is over: a balancer's pool has used it by then, or does not need it.
LAST_REQUEST_S: Final = 2.0
LINGER_S: Final = 2.0  # an early answer is read by a client that still sends; nginx lingers 5 s a read
# Within 45 s: else the answer of a client that vanished would go on, and its engine's place with it. The kernel counts
# as vanished also who keeps its window shut for so long.
_NOTICE_VANISHING: Final = notices_of_death(interval_s=10)


class Answering(Protocol):
    """The answer that is running on a connection, as its connection and the process know it."""

    @property
    def begun(self) -> bool:
        """Whether the client has got the head."""

    def cut(self) -> None:
        """End the answer because the edge has to stop."""

    def client_paused(self) -> None:
        """Take that the client's buffer is full."""

    def client_resumed(self) -> None:
        """Take that the client's buffer has room again."""

    def client_gone(self) -> None:
        """Take that the client left."""


class Request:
    """One request: its head, and its body, which came with a head that was known, else is in the parser's reader."""

    __slots__ = ("body", "connection", "head", "payload")

    def __init__(
        self, head: Head, payload: StreamReader, connection: "ClientConnection", body: bytes | None = None
    ) -> None:
        self.head = head
        self.payload = payload
        self.connection = connection
        self.body = body

    def _cancel(self, error: BaseException) -> None:
        """Fail the body's reader; called by aiohttp when the connection is lost."""
        self.payload.set_exception(error)


class ClientConnection(SteppedHandler):
    """aiohttp's connection, with flow control and departure told to the running answer."""

    __slots__ = (
        "_behind", "_drop_timer", "_head_bytes", "_header_timer", "_line", "_parser_full", "_repeated",
        "_repeats", "_server", "_wire", "bare", "is_secure", "last", "loop", "peer", "visit",
    )  # fmt: skip

    def __init__(self, server: "ClientServer", visit: Visit | None = None, **options: Any) -> None:
        super().__init__(server, **options)
        self._server = server
        self.visit = visit  # None until it is made, where there is no TLS before
        self.loop: asyncio.AbstractEventLoop = self._loop
        self._current_request: Request | None = None  # type: ignore[assignment]  # aiohttp only calls its `_cancel`
        self.answering: Answering | None = None  # the answer that is running
        self.last = False  # whether this answer is the connection's last
        self.bare = False  # HTTP/1.0: no chunks, and the end of the connection ends the answer
        self._header_timer: asyncio.TimerHandle | None = None
        self._wire: asyncio.Transport | None = None  # aiohttp forgets its own when it begins to close
        self._drop_timer: asyncio.TimerHandle | None = None
        self.is_secure = False  # whether the client speaks TLS with this process
        self.peer = ""  # the client's address, "unix" on a unix socket
        self._parser_full = False  # it may hold requests back, and is to be asked for them
        self._head_bytes = 0  # received since the last whole head
        self._line = b""  # how they begin: the request line, or so much of it
        self._behind: str | bytes = ""  # the client for whom a proxy's request is answered
        self._repeats = Repeats()
        self._repeated: Request | None = None  # the next request, when its head was known

    # --- what the proxy uses

    @property
    def busy(self) -> bool:
        """Whether a request is being answered or read."""
        begins = self._repeated is not None or bool(self._messages) or self._header_timer is not None
        return begins or self._current_request is not None

    @property
    def may_give_way(self) -> bool:
        """Whether nobody is hurt by its end: nothing of a request has come, and nothing of an answer waits here."""
        if self._wire is None or self.visit is None or self.visit.refusal is not None or self.busy or self._rest:
            return False
        wire = self.visit.wire
        return not (self._wire.get_write_buffer_size() or wire.get_write_buffer_size() or has_input(wire))

    def give_way(self) -> None:
        """Close; TLS would wait for the client's own end, and ours has gone out by then."""
        self._server.left(self.visit)
        self.force_close()
        self._loop.call_soon(self.abort)

    def attach(self, answering: Answering | None) -> None:
        """Tell `answering` of the client from now on.

        While an answer runs the socket is always read, else a client's leaving would not be seen.
        """
        self.answering = answering
        if not self._parser_reads and answering is not None:
            RequestHandler._resume_transport_reading(self)
        elif not self._parser_reads:
            RequestHandler._pause_transport_reading(self)
        if answering is not None and self._paused:
            answering.client_paused()

    def answer_for(self, client: str) -> None:
        """Have the running request counted for who is behind a proxy. Raises: `RateLimited`."""
        self._behind = self._server.addresses.hold(client)

    def send(self, data: bytes) -> None:
        """Write to the client; nothing when it has left, since then the handler is being cancelled."""
        if self.transport is not None:
            self.transport.write(data)

    def unread_bytes(self) -> int:
        """Return how much the client has not read: what waits here, and what waits in the kernel."""
        if self.transport is None:
            return 0
        return self.transport.get_write_buffer_size() + unsent_bytes(self.transport)

    def abort(self) -> None:
        """End the connection at once, also one that is closing and waits for its client to read."""
        if self._wire is not None:
            self._wire.abort()

    def reset(self) -> None:
        """End the connection with a reset: an orderly end would complete an answer that the end delimits."""
        if self._wire is not None:
            connection = self._wire.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self._wire.abort()

    def be_last(self) -> None:
        """Let the running answer be the connection's last, unless its head has promised another request."""
        if self.answering is None or not self.answering.begun:
            self.last = True

    def leave_soon(self) -> None:
        """Close when no request comes for `LAST_REQUEST_S`, counted anew behind every answer."""
        self._keepalive_timeout = LAST_REQUEST_S
        if self._keepalive_handle is not None:
            self._keepalive_handle.cancel()
        self._next_keepalive_close_time = 0.0
        self._keepalive_handle = None if self.busy else self._loop.call_later(LAST_REQUEST_S, self._process_keepalive)

    # --- aiohttp's protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Let the kernel notice when the client vanishes; refuse the connection when it is one too many."""
        visit = self.visit = self.visit or self._server.arrive(transport)
        if transport.is_closing():
            return
        visit.is_ready = True
        super().connection_made(transport)
        self._wire = self.transport
        if self._server.lifecycle.stage >= _CLOSING:  # the kernel had accepted it before
            self.leave_soon()
        self.is_secure = transport.get_extra_info("ssl_object") is not None
        self.peer = visit.peer
        if self.peer != "unix":
            connection = transport.get_extra_info("socket")
            for level, option, value in _NOTICE_VANISHING:
                connection.setsockopt(level, option, value)
        if visit.refusal is not None:
            self.refuse(visit.refusal)

    def pause_writing(self) -> None:
        """Stop the upstream: the client's buffer is full."""
        super().pause_writing()
        if self.answering is not None:
            self.answering.client_paused()

    def resume_writing(self) -> None:
        """Let the upstream go on."""
        super().resume_writing()
        if self.answering is not None:
            self.answering.client_resumed()

    def connection_lost(self, exc: BaseException | None) -> None:
        """Abort the upstream in this same call; aiohttp then cancels the handler."""
        self._stop_header_timer()
        self._wire = None
        if self._drop_timer is not None:
            self._drop_timer.cancel()
        answering, self.answering = self.answering, None
        if answering is not None:
            answering.client_gone()
        super().connection_lost(exc)

    def eof_received(self) -> None:
        """Abort when bytes are still queued: nobody reads them, and the transport would wait for ever."""
        if self.transport is not None and self.transport.get_write_buffer_size():
            self.transport.abort()

    def resume_reading(self, resume_parser: bool = True) -> None:
        """Resume only what was paused: aiohttp's reader asks for it at the end of every body, at 4 us a request."""
        if self._reading_paused:
            super().resume_reading(resume_parser)

    def data_received(self, data: bytes) -> None:
        """Parse; fail the body that is being read when its framing breaks; bound the time of a head.

        aiohttp's C parser forgets the body whose framing broke and queues its 400 behind the handler that waits for
        that body: the client would hang.
        """
        if self._close or self._force_close:
            return
        if data and self._rest:
            self._wait(data)
            return
        if data and not self._parser_reads:
            self._park(data)
            return
        if self._messages and not isinstance(self._messages[-1][0], RawRequestMessage):
            return  # which nobody can read, behind what could not be read
        waiter, parsed = self._waiter, len(self._messages)
        waits = waiter is not None and not waiter.done()
        if waits and (known := self._repeats.find(data)) is not None:
            self._repeated = Request(known[0], EMPTY_PAYLOAD, self, known[1])
            waiter.set_result(None)  # type: ignore[union-attr]  # it waits
            return
        if len(data) > STEP_BYTES and not self._repeats.is_simple(data):
            data = self._first_step(data)
        current = self._current_request
        is_body = current is not None and not current.payload.is_eof()
        if data != b"\r\n":  # which old clients send behind a body, and which begins no head (RFC 9112 section 2.2)
            if self._head_bytes < _LINE_BYTES:
                self._line = self._line[: self._head_bytes] + data[:_LINE_BYTES]
            self._head_bytes += len(data)
        due_bytes = self._repeats.due_bytes
        super().data_received(data)
        count = len(self._messages) - parsed
        self._repeats.follow(data, self._messages[-1][0] if count == 1 else None, waits=waits)
        if self._repeats.due_bytes is None:
            self._follow_framing(data, count, due_bytes or 0, self._server.max_body_bytes)
        if self._messages:
            self._stop_header_timer()
            self._check_head_sizes()
            if current is not None and not self._has_room():
                self._drop_queue()
                return
            # The parser counts a request from its last byte on, also the one that is being answered: hence one less.
            if len(self._messages) >= self._max_msg_queue_size - 1:
                self._parser_full = True
            if not isinstance(self._messages[-1][0], RawRequestMessage):
                # The request before, queued or being answered, is the one whose framing broke.
                queued = len(self._messages) > 1
                before = self._messages[-2][1] if queued else current.payload if current is not None else None
                if before is not None and not before.is_eof():
                    before.set_exception(InvalidRequest("the framing of the request's body is malformed"))
        elif is_body or self._force_close:
            self._head_bytes = 0
        elif waits and self._head_bytes:
            self._watch_head()

    def _watch_head(self) -> None:
        """Bound the size and the time of a head that has begun; only while no answer runs, since it may be refused."""
        self._server.not_idle(self)
        if self._head_bytes > MAX_HEAD_BYTES:
            self.refuse(head_too_large())
        elif self._header_timer is None:
            self._header_timer = self._loop.call_later(self._server.header_timeout_s, self._head_too_slow)

    def _check_head_sizes(self) -> None:
        """Refuse heads over the bound, in their turn; one that came within so many bytes needs no counting."""
        received, self._head_bytes = self._head_bytes, 0
        if received <= MAX_HEAD_BYTES and self._current_request is None:
            return
        for index, (message, _) in enumerate(self._messages):
            if isinstance(message, RawRequestMessage):
                size = len(message.path) + sum(len(name) + len(value) + 4 for name, value in message.raw_headers)
                if size > MAX_HEAD_BYTES:
                    self._messages[index] = (head_too_large(), EMPTY_PAYLOAD)  # type: ignore[assignment]  # for its turn

    def _stop_header_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _head_too_slow(self) -> None:
        self._header_timer = None
        if self._waiter is not None and not self._messages:
            self.refuse(RequestTimeout("The head of the request took too long."))

    def refuse(self, error: EdgeError) -> None:
        """Answer outside of any request, and close; in the protocol of the path, where a request line came."""
        protocol = protocol_of_line(self._line)
        self.send(error_response(error, request_id=new_request_id(), last=True, protocol=protocol))
        self._close_lingering()

    async def start(self) -> None:
        """Answer one request after another.

        Takes the place of aiohttp's loop, which makes a task, a writer and a response for each request and so costs
        a third more.
        """
        idle = self._server.silent if self._server.tls is None else self._server.idle
        try:
            while not self._force_close:
                if not self._messages and self._repeated is None:
                    self._waiter = self._loop.create_future()
                    idle[self] = None
                    if self._head_bytes:
                        self._watch_head()
                    try:
                        await self._waiter
                    finally:
                        self._waiter = None
                        idle.pop(self, None)
                        idle = self._server.idle
                    continue
                if self._paused:  # it asks for more than it reads
                    break
                request, self._repeated = self._repeated or self._parsed(), None
                if request is None:
                    return
                is_whole = request.payload.is_eof()
                self._current_request = request
                self.bare = request.head.bare
                self.last = request.head.is_last or self._server.lifecycle.stage >= _DRAINING
                try:
                    await self._server.handle(request)
                finally:
                    self._current_request = None
                    if self._behind:
                        self._server.addresses.give_back(self._behind)
                        self._behind = ""
                if request.head.is_odd or not request.payload.is_eof():
                    self._close_lingering()
                    return
                if not is_whole:
                    self._message_taken()
                if self.last or self._close:
                    break
                if self._messages:  # pipelined: whoever else is ready comes first
                    await asyncio.sleep(0)
                self._next_keepalive_close_time = self._loop.time() + self._keepalive_timeout
                if self._keepalive_handle is None:
                    self._keepalive_handle = self._loop.call_at(
                        self._next_keepalive_close_time, self._process_keepalive
                    )
        except BaseException:  # after a defect too: nobody would answer the next request
            self.force_close()
            raise
        if not self._force_close:
            self._task_handler = None
            self.force_close()

    def _parsed(self) -> Request | None:
        """Return the next request that the parser made, None when it could not, which is refused."""
        message, payload = self._messages.popleft()
        if payload.is_eof():
            self._message_taken()
        if not isinstance(message, RawRequestMessage):
            self._server.malformed_requests += 1
            self.refuse(message if isinstance(message, EdgeError) else parser_error(message.exc))
            return None
        self._server.parsed_heads += 1
        head = Head(message)
        self._repeats.keep(head)
        return Request(head, payload, self)

    def force_close(self) -> None:
        """Close; a client that does not read what is still queued is dropped when it has been idle for long."""
        super().force_close()
        if self._wire is not None and self._drop_timer is None and self._wire.get_write_buffer_size():
            self._drop_timer = self._loop.call_later(self._server.client_idle_timeout_s, self._wire.abort)

    def _message_taken(self) -> None:
        """Make room for one more pipelined request, once the parser has counted this one; take what it held back."""
        if self._parser is not None:
            self._parser.message_consumed()
        if len(self._messages) <= self._msg_queue_resume_size:
            if self._buffer_paused:
                self._resume_reading_if_drained()
            elif self._parser_full:
                self._parser_full = False
                self.data_received(b"")

    def _close_lingering(self) -> None:
        """Close for a client that may still be sending: with its bytes unread it would get a reset, not the answer."""
        self._close = True
        if self.transport is None or not self.transport.can_write_eof():
            self.force_close()
            return
        self.transport.write_eof()
        self._loop.call_later(LINGER_S, self.force_close)

    def _process_keepalive(self) -> None:
        """Drop a client that neither asks nor reads: closing in order would wait for its buffer for ever.

        Whose request has begun to arrive, or waits in the kernel because the loop is busy, is not idle.
        """
        transport = self.transport
        has_begun = self._header_timer is not None
        if transport is not None and (has_begun or (not self._reading_paused and has_input(transport))):
            self._keepalive_handle = self._loop.call_later(LOOK_AGAIN_S, self._process_keepalive)
            return
        super()._process_keepalive()
        if transport is not None and self.transport is None and transport.get_write_buffer_size():
            transport.abort()
