"""The client's side of a connection: aiohttp's parser and life cycle, our bytes.

aiohttp accepts, parses, bounds pipelining and notices departure. Everything that goes out is written raw to the
transport, so no response object is ever built: a handler returns whether another request may follow. What aiohttp 3.14
gets wrong for an edge is put right here, each with its reason; it rides on internals, so the version is pinned.
"""

import asyncio
import fcntl
import functools
import io
import socket
import struct
import termios
import time
from collections.abc import Awaitable, Callable
from email.utils import formatdate
from typing import Any, Final, Protocol

from aiohttp import HttpVersion11, StreamReader, hdrs, web
from aiohttp.http_exceptions import LineTooLong
from aiohttp.http_parser import RawRequestMessage
from aiohttp.streams import EMPTY_PAYLOAD
from aiohttp.web_protocol import RequestHandler, RequestPayloadError
from multidict import CIMultiDictProxy

from edge.errors import (
    EdgeError,
    HeadersTooLarge,
    InvalidRequest,
    Overloaded,
    RequestTimeout,
    RequestTooLarge,
    UriTooLong,
)
from edge.exchange import NO_CREDENTIAL

MAX_REQUEST_LINE_BYTES: Final = 8190
MAX_FIELD_BYTES: Final = 16_384  # of one header; unlike the request line's, so that an error tells which it was
MAX_FIELDS: Final = 100  # Envoy's default
MAX_HEAD_BYTES: Final = 64 * 1024
_MAX_PARKED_BYTES: Final = 256 * 1024  # pipelined behind a running answer and its 32 queued requests
_REFUSED_AT_ONCE: Final = 32  # connections beyond the bound that are told so; more are closed without a word
_LINGER_S: Final = 2.0  # an early answer is read by a client that still sends; nginx lingers 5 s a read
_CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"

REASONS: Final = {
    200: "OK", 204: "No Content", 400: "Bad Request", 401: "Unauthorized", 402: "Payment Required", 403: "Forbidden",
    404: "Not Found", 405: "Method Not Allowed", 408: "Request Timeout", 413: "Content Too Large", 414: "URI Too Long",
    415: "Unsupported Media Type", 421: "Misdirected Request", 422: "Unprocessable Content", 429: "Too Many Requests",
    431: "Request Header Fields Too Large", 500: "Internal Server Error", 501: "Not Implemented", 502: "Bad Gateway",
    503: "Service Unavailable", 504: "Gateway Timeout", 505: "HTTP Version Not Supported",
}  # fmt: skip

# On every answer: browsers call the API from any page, and may read these headers (https://fetch.spec.whatwg.org).
CORS: Final = (
    b"access-control-allow-origin: *\r\n"
    b"access-control-expose-headers: x-request-id, retry-after, retry-after-ms, x-should-retry, "
    b"x-ratelimit-limit-requests, x-ratelimit-remaining-requests, x-ratelimit-reset-requests, "
    b"x-ratelimit-limit-tokens, x-ratelimit-remaining-tokens, x-ratelimit-reset-tokens\r\n"
)


class Answering(Protocol):
    """The answer that is running on a connection: what it has to hear of its client."""

    def client_paused(self) -> None:
        """Hear that the client's buffer is full."""

    def client_resumed(self) -> None:
        """Hear that the client's buffer has room again."""

    def client_gone(self) -> None:
        """Hear that the client left."""


class Request:
    """One request as the parser gave it."""

    __slots__ = ("connection", "headers", "message", "payload")

    def __init__(self, message: RawRequestMessage, payload: StreamReader, connection: "ClientConnection") -> None:
        self.message = message
        self.headers: CIMultiDictProxy[str] = message.headers
        self.payload = payload
        self.connection = connection

    def _cancel(self, error: BaseException) -> None:
        """Fail the body's reader; called by aiohttp when the connection is lost."""
        self.payload.set_exception(error)


class ClientConnection(RequestHandler):
    """aiohttp's connection, with flow control and departure told to the running answer."""

    __slots__ = (
        "_answering",
        "_drop_timer",
        "_head_bytes",
        "_header_timer",
        "_parked",
        "_parser_full",
        "_parser_reads",
        "_server",
        "_wire",
        "credential",
        "peer",
    )

    def __init__(self, server: "ClientServer", **options: Any) -> None:
        super().__init__(server, **options)
        self._server = server
        self._current_request: Request | None = None  # type: ignore[assignment]  # aiohttp only calls its `_cancel`
        self._answering: Answering | None = None
        self._header_timer: asyncio.TimerHandle | None = None
        self._wire: asyncio.Transport | None = None  # aiohttp forgets its own when it begins to close
        self._drop_timer: asyncio.TimerHandle | None = None
        self.peer = ""  # the client's address, "unix" on a unix socket
        self.credential = NO_CREDENTIAL  # that was shown last
        self._parser_reads = True
        self._parser_full = False  # it may hold requests back, and is to be asked for them
        self._parked = b""
        self._head_bytes = 0  # received since the last whole head

    # --- what the proxy uses

    @property
    def busy(self) -> bool:
        """Whether a request is being answered or read."""
        return self._current_request is not None or bool(self._messages) or self._header_timer is not None

    @property
    def answering(self) -> Answering | None:
        """The answer that is running."""
        return self._answering

    def attach(self, answering: Answering | None) -> None:
        """Tell `answering` of the client from now on.

        While an answer runs the socket is always read, else a client's leaving would not be seen.
        """
        self._answering = answering
        if not self._parser_reads and answering is not None:
            super()._resume_transport_reading()
        elif not self._parser_reads:
            super()._pause_transport_reading()
        if answering is not None and self._paused:
            answering.client_paused()

    @property
    def is_secure(self) -> bool:
        """Whether the client speaks TLS with this process."""
        return self._wire is not None and self._wire.get_extra_info("ssl_object") is not None

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The loop that serves the connection."""
        return self._loop

    def send(self, data: bytes) -> None:
        """Write to the client; nothing when it has left, since then the handler is being cancelled."""
        if self.transport is not None:
            self.transport.write(data)

    def unread_bytes(self) -> int:
        """Return how much the client has not read: what waits here, and what waits in the kernel."""
        if self.transport is None:
            return 0
        connection = self.transport.get_extra_info("socket")
        in_kernel = struct.unpack("i", fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, bytes(4)))[0]
        return self.transport.get_write_buffer_size() + int(in_kernel)

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

    def close_if_idle(self) -> None:
        """Close unless a request is on its way."""
        if not self.busy:
            self.force_close()

    # --- aiohttp's protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Refuse the connection when there are too many."""
        super().connection_made(transport)
        self._wire = self.transport
        name = transport.get_extra_info("peername")
        # An IPv4 client of a listener for both is that client, not an IPv6 one (RFC 4291 section 2.5.5.2).
        self.peer = name[0].removeprefix("::ffff:") if isinstance(name, tuple) else "unix"
        if self._server.is_full:
            self._server.refused_connections += 1
            if self._server.is_flooded:
                self.abort()
            else:
                self.refuse(Overloaded("The edge has too many connections, try again in a moment.", retry_after_s=1))

    def pause_writing(self) -> None:
        """Stop the upstream: the client's buffer is full."""
        super().pause_writing()
        if self._answering is not None:
            self._answering.client_paused()

    def resume_writing(self) -> None:
        """Let the upstream go on."""
        super().resume_writing()
        if self._answering is not None:
            self._answering.client_resumed()

    def connection_lost(self, exc: BaseException | None) -> None:
        """Abort the upstream in this same call; aiohttp then cancels the handler."""
        self._stop_header_timer()
        self._wire = None
        if self._drop_timer is not None:
            self._drop_timer.cancel()
        answering, self._answering = self._answering, None
        if answering is not None:
            answering.client_gone()
        super().connection_lost(exc)

    def eof_received(self) -> None:
        """Abort when bytes are still queued: nobody reads them, and the transport would wait for ever."""
        if self.transport is not None and self.transport.get_write_buffer_size():
            self.transport.abort()

    def _pause_transport_reading(self) -> None:
        """Keep what comes from the parser, which is full of pipelined requests; do not stop noticing departure."""
        self._parser_reads = False
        if self._answering is None:
            super()._pause_transport_reading()

    def _resume_transport_reading(self) -> None:
        """Let the parser have what came in the meantime, and go on."""
        self._parser_reads = True
        parked, self._parked = self._parked, b""
        if parked:
            self.data_received(parked)
        if self._parser_reads:
            super()._resume_transport_reading()

    def _park(self, data: bytes) -> None:
        """Hold bytes behind a running answer; a client that sends too many gets no further answer (RFC 9112 9.3.2)."""
        self._parked += data
        if len(self._parked) > _MAX_PARKED_BYTES:
            self._parked = b""
            self._messages.clear()
            self._close = True

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
        if data and not self._parser_reads:
            self._park(data)
            return
        current = self._current_request
        is_body = current is not None and not current.payload.is_eof()
        if data != b"\r\n":  # which old clients send behind a body, and which begins no head (RFC 9112 section 2.2)
            self._head_bytes += len(data)
        super().data_received(data)
        if self._messages:
            self._stop_header_timer()
            self._check_head_sizes()
            # The parser counts a request from its last byte on, also the one that is being answered: hence one less.
            if len(self._messages) >= self._max_msg_queue_size - 1:
                self._parser_full = True
            if not isinstance(self._messages[-1][0], RawRequestMessage):
                self._fail_body()
        elif is_body or self._force_close:
            self._head_bytes = 0
        elif self._waiter is not None and self._head_bytes:
            self._watch_head()

    def _watch_head(self) -> None:
        """Bound the size and the time of a head that has begun; only while no answer runs, since it may be refused."""
        if self._head_bytes > MAX_HEAD_BYTES:
            self.refuse(_head_too_large())
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
                    self._messages[index] = (_Refused(_head_too_large()), EMPTY_PAYLOAD)  # type: ignore[assignment]  # as aiohttp's

    def _fail_body(self) -> None:
        """Fail the body whose framing broke: that of the request before, queued or being answered."""
        if len(self._messages) > 1:
            payload = self._messages[-2][1]
        elif self._current_request is not None:
            payload = self._current_request.payload
        else:
            return
        if not payload.is_eof():
            payload.set_exception(InvalidRequest("the framing of the request's body is malformed"))

    def _stop_header_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _head_too_slow(self) -> None:
        self._header_timer = None
        if self._waiter is not None and not self._messages:
            self.refuse(RequestTimeout("The head of the request took too long."))

    def refuse(self, error: EdgeError) -> None:
        """Answer outside of any request, and close."""
        self.send(error_response(error, request_id=self._server.new_request_id(), keep_alive=False))
        self._close_lingering()

    async def start(self) -> None:
        """Answer one request after another.

        Takes the place of aiohttp's loop, which makes a task, a writer and a response for each request and so costs
        a third more.
        """
        try:
            while not self._force_close:
                if not self._messages:
                    self._waiter = self._loop.create_future()
                    if self._head_bytes:
                        self._watch_head()
                    try:
                        await self._waiter
                    finally:
                        self._waiter = None
                    continue
                if self._paused:  # it asks for more than it reads
                    break
                message, payload = self._messages.popleft()
                is_whole = payload.is_eof()
                if is_whole:
                    self._message_taken()
                if isinstance(message, RawRequestMessage):
                    request = self._current_request = Request(message, payload, self)
                    try:
                        keep_alive = await self._server.handle(request)
                    finally:
                        self._current_request = None
                else:
                    self._refuse_malformed(message.exc)
                    keep_alive = False
                if not payload.is_eof() or not isinstance(message, RawRequestMessage):
                    self._close_lingering()
                    return
                if not is_whole:
                    self._message_taken()
                if not keep_alive or self._close:
                    break
                if self._messages:  # pipelined: whoever else is ready comes first
                    await asyncio.sleep(0)
                self._next_keepalive_close_time = self._loop.time() + self._keepalive_timeout
                if self._keepalive_handle is None:
                    self._keepalive_handle = self._loop.call_at(
                        self._next_keepalive_close_time, self._process_keepalive
                    )
        except asyncio.CancelledError:
            self.force_close()
            raise
        if not self._force_close:
            self._task_handler = None
            self.force_close()

    def force_close(self) -> None:
        """Close; a client that does not read what is still queued is dropped when it has been idle for long."""
        super().force_close()
        if self._wire is not None and self._drop_timer is None and self._wire.get_write_buffer_size():
            self._drop_timer = self._loop.call_later(self._keepalive_timeout, self._wire.abort)

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
        self._loop.call_later(_LINGER_S, self.force_close)

    def _process_keepalive(self) -> None:
        """Drop a client that neither asks nor reads: closing in order would wait for its buffer for ever."""
        transport = self.transport
        super()._process_keepalive()
        if transport is not None and self.transport is None and transport.get_write_buffer_size():
            transport.abort()

    def _refuse_malformed(self, cause: BaseException) -> None:
        """Answer a request that the parser refused; neither the log nor the answer quotes the input, keys included."""
        self._server.malformed_requests += 1
        self.send(error_response(_parser_error(cause), request_id=self._server.new_request_id(), keep_alive=False))


class _Refused:
    """Stands in the queue for a request that is refused when its turn comes."""

    def __init__(self, error: EdgeError) -> None:
        self.exc = error


def _head_too_large() -> HeadersTooLarge:
    return HeadersTooLarge(f"the head of the request is over {MAX_HEAD_BYTES} bytes")


def _parser_error(error: BaseException | None) -> EdgeError:
    if isinstance(error, EdgeError):
        return error
    if isinstance(error, LineTooLong):
        if error.args[1] == MAX_REQUEST_LINE_BYTES:
            return UriTooLong(f"the request line is over {MAX_REQUEST_LINE_BYTES} bytes")
        return HeadersTooLarge(f"a header is over {MAX_FIELD_BYTES} bytes")
    if "Too many headers" in str(error):
        return HeadersTooLarge(f"the request has more than {MAX_FIELDS} headers")
    return InvalidRequest("the request is not valid HTTP/1.1")


async def _never_called(request: web.BaseRequest) -> web.StreamResponse:
    """Stand where aiohttp wants its own kind of handler; `ClientConnection.start` calls ours."""
    raise NotImplementedError


class ClientServer(web.Server):
    """aiohttp's low-level server, building our connections."""

    def __init__(
        self,
        handle: Callable[[Request], Awaitable[bool]],
        *,
        new_request_id: Callable[[], str],
        client_idle_timeout_s: float,
        header_timeout_s: float,
        max_connections: int,
    ) -> None:
        # A client that leaves cancels its handler, also before the first byte: the GPU slot is what this saves.
        super().__init__(_never_called, handler_cancellation=True)
        self.handle = handle
        self._options: dict[str, Any] = {
            "loop": self._loop,
            "keepalive_timeout": client_idle_timeout_s,
            "lingering_time": _LINGER_S,
            "access_log": None,
            "auto_decompress": False,
            "max_line_size": MAX_REQUEST_LINE_BYTES,
            "max_field_size": MAX_FIELD_BYTES,
            "max_headers": MAX_FIELDS,
        }
        self.header_timeout_s = header_timeout_s
        self.new_request_id = new_request_id
        self.max_connections = max_connections
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

    def reconfigure(self, client_idle_timeout_s: float, header_timeout_s: float, max_connections: int) -> None:
        """Take over a reload's values: idle times from the next connection on."""
        self._options["keepalive_timeout"] = client_idle_timeout_s
        self.header_timeout_s = header_timeout_s
        self.max_connections = max_connections

    async def wait_empty(self) -> None:
        """Wait until no connection is open."""
        while self.clients:
            self._empty.clear()
            await self._empty.wait()


# --- the body of a request


class BodyMemory:
    """Bounds the bodies of all requests together, in bytes."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.used_bytes = 0

    def reserve(self, count: int) -> None:
        """Take `count` bytes; raises `Overloaded` when they are not to be had."""
        if self.used_bytes + count > self.limit_bytes:
            raise Overloaded("The edge holds too many large requests, try again in a moment.", retry_after_s=1)
        self.used_bytes += count

    def release(self, count: int) -> None:
        """Give `count` bytes back."""
        self.used_bytes -= count


class Body:
    """The body of a request, counted in the memory of all bodies until it is released; `sent` is what goes upstream."""

    __slots__ = ("_memory", "_reserved", "data", "sent")

    def __init__(self, data: bytes, memory: BodyMemory) -> None:
        self.data = self.sent = data
        self._memory = memory
        self._reserved = len(data)

    def release(self) -> None:
        """Let go of the bytes; the answer has begun, so nobody is asked again."""
        if self._reserved:
            self._memory.release(self._reserved)
            self._reserved = 0
            self.data = self.sent = b""


NOTHING: Final = Body(b"", BodyMemory(0))


def _check_length(headers: CIMultiDictProxy[str], max_body_bytes: int) -> None:
    """Raise `RequestTooLarge` for a body that announces itself as too large."""
    length = headers.get(hdrs.CONTENT_LENGTH)
    if length is not None and (len(length) > 15 or int(length) > max_body_bytes):
        raise _too_large(max_body_bytes)


def _too_large(max_body_bytes: int) -> RequestTooLarge:
    return RequestTooLarge(f"the body is over the limit of {max_body_bytes} bytes")


async def read_body(
    request: Request, *, max_body_bytes: int, memory: BodyMemory, timeout_s: float, min_rate_bytes_per_s: int
) -> Body:
    """Return the body of a request, reserved in `memory` until the caller releases it.

    Two reads are at most `timeout_s` apart, and all of it must keep up with the floor rate.
    Raises: `RequestTooLarge`, `Overloaded`, `RequestTimeout`, `InvalidRequest` for broken framing.
    """
    payload = request.payload
    if payload.is_eof():  # the usual case: it came with the head
        # What its `read_nowait` would say, for 2 us less.
        body = b"".join(payload._buffer) if payload is not EMPTY_PAYLOAD else b""
        if len(body) > max_body_bytes:
            raise _too_large(max_body_bytes)
        memory.reserve(len(body))
        return Body(body, memory)
    _check_length(request.headers, max_body_bytes)
    expects = request.headers.get(hdrs.EXPECT, "").lower() == "100-continue"
    if expects and request.message.version == HttpVersion11 and not payload.total_bytes:  # RFC 9110 section 10.1.1
        request.connection.send(_CONTINUE)
    content = io.BytesIO()  # grows in place; to join 10 MB of parts at the end would take 6 ms in one go
    count = 0
    loop = asyncio.get_running_loop()
    begun = loop.time()
    try:
        async with asyncio.timeout(timeout_s) as deadline:
            while part := await payload.readany():
                memory.reserve(len(part))
                count += len(part)
                content.write(part)
                if count > max_body_bytes:
                    raise _too_large(max_body_bytes)
                floor = count / min_rate_bytes_per_s if min_rate_bytes_per_s else float("inf")
                deadline.reschedule(min(loop.time() + timeout_s, begun + 2 * timeout_s + floor))
        return Body(content.getvalue(), memory)
    except BaseException as error:
        memory.release(count)
        match error:
            case TimeoutError():
                raise RequestTimeout("The body of the request took too long.") from None
            case RequestPayloadError():
                raise InvalidRequest("the framing of the request's body is malformed") from None
            case _:
                raise


# --- answers of the edge's own

_date_second = 0
_date = b""


def date_header() -> bytes:
    """Return the Date header of this second (RFC 9110 section 6.6.1)."""
    global _date_second, _date
    now = int(time.time())
    if now != _date_second:
        _date_second, _date = now, f"date: {formatdate(now, usegmt=True)}\r\n".encode()
    return _date


def response(
    status: int,
    body: bytes,
    *,
    request_id: str,
    keep_alive: bool,
    content_type: str = "application/json",
    headers: tuple[tuple[str, str], ...] = (),
    with_body: bool = True,
) -> bytes:
    """Return a whole response; `with_body` False answers a HEAD."""
    head = _constant_head(status, len(body), keep_alive, content_type, headers)
    name = f"x-request-id: {request_id}\r\n".encode() if request_id else b""
    return b"".join((head, name, date_header(), CORS, b"\r\n", body if with_body else b""))


@functools.lru_cache(maxsize=256)
def _constant_head(
    status: int, length: int, keep_alive: bool, content_type: str, headers: tuple[tuple[str, str], ...]
) -> bytes:
    """Return what equal answers begin with: who tries one bad key all day must not cost more than who is served."""
    lines = [f"HTTP/1.1 {status} {REASONS[status]}"]
    if status != 204:
        lines += [f"content-type: {content_type}", f"content-length: {length}"]
    if not keep_alive:
        lines.append("connection: close")
    lines += [f"{name.lower()}: {value}" for name, value in headers]
    return ("\r\n".join(lines) + "\r\n").encode()


def error_response(error: EdgeError, *, request_id: str, keep_alive: bool, with_body: bool = True) -> bytes:
    """Return an error as a whole response: the one place where a failure becomes HTTP."""
    headers = error.headers
    if error.retry_after_s is not None:
        headers += (("retry-after", str(error.retry_after_s)), ("retry-after-ms", str(error.retry_after_s * 1000)))
    if error.should_retry is not None:
        headers += (("x-should-retry", "true" if error.should_retry else "false"),)
    return response(
        error.status, error.body(), request_id=request_id, keep_alive=keep_alive, headers=headers, with_body=with_body
    )
