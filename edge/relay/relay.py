"""Move the bytes: one request to one endpoint, and its answer back to the client at the client's pace.

The usual answer is verbatim: what the upstream's socket gave goes to the client's socket as the same `bytes` object,
chunk framing and all, with no task, Future, queue or decoding per event. An exact tracker (`wire/`) runs before every
write, finds the end, and lets nothing pass that is not the answer's.

Usage is read in passing (`metering/`), and all that is known of an answer is recorded before its last bytes go. A
token costs nothing for that: an event that ends as those before it did says no more than they.

The head is held until the first byte of the body. Servers send it at once and their first token much later; until then
an error that opens a stream can still become a status, and another endpoint can still be asked. A route's `heartbeat`
ends that early: once one went out the client has its status, and a failure after it is told as an event.
"""

import asyncio
import enum
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from edge.client.connection import CORS, NOTHING, Body, ClientConnection
from edge.errors import EdgeError, UpstreamError, UpstreamTimeout, UpstreamUnavailable, error_body, from_upstream
from edge.exchange import End, Exchange, Phase
from edge.metering.meters import Meter, Metering
from edge.relay.echo import MAX_JSON_BYTES, EventEcho, echo_json
from edge.relay.framed import Framed
from edge.sse import EVENT_ENDS, HEARTBEAT, error_event, error_in, opens_with_error
from edge.wire.connections import (
    EVENT_END_BYTES,
    LAST_CHUNK,
    MAX_HEAD_BYTES,
    SIZE_LINE_BYTES,
    Chunked,
    ConnectionPool,
    Framing,
    Irregular,
    Length,
    Malformed,
    NoBody,
    Receiver,
    ResponseHead,
    UntilClose,
    UpstreamConnection,
    chunk,
    parse_head,
    whole_chunks,
)

_MAX_ERROR_BYTES: Final = 64 * 1024  # of an upstream's error body; what is longer is not a message for a person
_JOIN_BYTES: Final = 64 * 1024  # under this, head and body are joined for one write; over it, copying costs more
_SLOW_CLIENT_CHECK_S: Final = 5.0
_SLOW_CLIENT_PATIENCE: Final = 6  # checks in a row below the floor rate, so half a minute, before a client is cut

# What comes back from the upstream besides the framing. Everything else, `server` and cookies above all, stays behind.
_RETURNED: Final = {
    name: name + b": "
    for name in (
        b"content-type",
        b"content-encoding",
        b"content-disposition",
        b"content-language",
        b"date",
        b"openai-processing-ms",
    )
}
_STATUS_LINE: Final = b"HTTP/1."
_NO_BUFFERING: Final = b"cache-control: no-cache\r\nx-accel-buffering: no\r\n"
# The head of a stream whose upstream has said nothing yet; vLLM and SGLang send the same content type.
_STREAM_HEADERS: Final = {b"content-type": b"text/event-stream; charset=utf-8"}
_CHUNKED: Final = b"transfer-encoding: chunked"
_HEARTBEAT_CHUNK: Final = chunk(HEARTBEAT)
_STALE_WITHIN_S: Final = 1.0  # of a request: a connection that the upstream had closed tells so at once
_LOOKS: Final = 4  # for a sign of life, in the time after which its absence counts
_NO_ENDING: Final = b"\0"  # which no chunk has
_MAX_INTERIM: Final = 16  # answers of 1xx before the answer

_CUT: Final = error_body(
    "The connection to the model's server was lost before the answer was complete.",
    "server_error", None, "upstream_disconnected",
)  # fmt: skip
_DRAINED: Final = error_body(
    "The edge had to restart before the answer was complete.", "server_error", None, "upstream_disconnected"
)
_IDLE: Final = error_body(
    "The model's server stopped sending before the answer was complete.",
    "server_error", None, "upstream_disconnected",
)  # fmt: skip
_BROKEN_STREAM: Final = {End.DRAINED: _DRAINED, End.IDLE_TIMEOUT: _IDLE}


def _discard(data: bytes) -> None:
    """Take the place of the client's `write` until an answer begins."""


class StaleConnection(Exception):
    """A reused connection died at once, before it gave a byte: it had been closed, and nothing was processed."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How long an answer may take, in seconds, and how slowly a client may read it, in bytes a second."""

    connect_timeout_s: float
    first_byte_timeout_s: float
    idle_timeout_s: float
    min_client_rate_bytes_per_s: int


class UpstreamAnsweredError(Exception):
    """The upstream answered with an error; `body` is what it said, at most 64 KiB."""

    def __init__(self, status: int, headers: dict[bytes, bytes], body: bytes) -> None:
        super().__init__(status)
        self.status = status
        self.headers = headers
        self.body = body


class FailedInStream(Exception):
    """The upstream failed after a heartbeat had begun the answer, and the client was told so by an event.

    `error` is what would have been raised else, `keep_alive` whether the client's connection can go on.
    """

    def __init__(self, error: EdgeError | UpstreamAnsweredError, keep_alive: bool) -> None:
        super().__init__(error)
        self.error = error
        self.keep_alive = keep_alive


class _State(enum.Enum):
    WAITING = 0  # for the head or the first byte of the body; for all of it where it is changed as a whole
    FAILING = 1  # the body of an error is being collected
    PASSING = 2  # the head was passed on
    ENDED = 3


class Relay(Receiver):
    """One answer on its way: the receiver of an upstream connection, and the `Answering` of a client's."""

    # More fields than an instance keeps without a dict of its own (30, SHARED_KEYS_MAX_SIZE of CPython 3.11).
    __slots__ = (
        "_answered", "_beat_seen", "_beat_timer", "_body", "_client", "_client_write", "_connection", "_done",
        "_echo", "_ending", "_error_bytes", "_event_stream", "_exchange", "_failure", "_framed", "_head",
        "_heartbeat_s", "_held", "_hides", "_interim", "_last_chunk", "_last_read", "_limits", "_loop", "_meter",
        "_metering", "_old_client", "_parts", "_passed_unseen", "_paused", "_queued_bytes", "_record", "_reused",
        "_seen_chunk", "_sent_bytes", "_settled", "_silent_since", "_slow_checks", "_slow_timer", "_state",
        "_transport", "keep_alive",
    )  # fmt: skip

    def __init__(
        self,
        exchange: Exchange,
        client: ClientConnection,
        limits: Limits,
        metering: Metering,
        settle: Callable[[], None],
        *,
        old_client: bool,
        keep_alive: bool,
        heartbeat_s: float = 0,
        echo: str | None = None,
    ) -> None:
        self._exchange = exchange
        self._client = client
        self._limits = limits
        self._metering = metering
        self._record = settle
        self._old_client = old_client  # HTTP/1.0: no chunks, never kept, the end of the connection ends the answer
        self.keep_alive = keep_alive
        self._heartbeat_s = heartbeat_s
        self._echo = echo
        self._loop = client.loop
        self._done: asyncio.Future[None] = self._loop.create_future()
        self._client_write: Callable[[bytes], None] = _discard
        self._state = _State.WAITING
        # the upstream
        self._connection: UpstreamConnection | None = None
        self._transport: asyncio.Transport | None = None
        self._body = NOTHING
        self._reused = False
        self._answered = False
        # its answer
        self._head: ResponseHead | None = None
        self._held = b""
        self._interim = 0
        self._framed: Framed | None = None
        self._parts: list[bytes] | None = None
        self._failure: FailedInStream | None = None
        self._event_stream = False
        self._last_read = 0.0
        # what passed
        self._meter: Meter | None = None
        self._ending = _NO_ENDING
        self._hides = False
        self._last_chunk = b""
        self._passed_unseen = 0
        self._sent_bytes = 0
        self._settled = False
        # what happens beside it
        self._paused = False
        self._slow_timer: asyncio.TimerHandle | None = None
        self._slow_checks = 0
        self._queued_bytes = 0
        self._beat_timer: asyncio.TimerHandle | None = None
        self._beat_seen = -1
        self._silent_since = 0.0
        self._seen_chunk = b""

    # --- the request

    async def run(self, connection: UpstreamConnection, head: bytes, body: Body) -> None:
        """Send the request and pass its answer on, to the end.

        Raises: `StaleConnection`, `UpstreamAnsweredError`, `UpstreamError`, `UpstreamTimeout`, all of them only while
        the client has not got a byte; `FailedInStream` instead of them when it has got no more than heartbeats. Later
        failures end the answer here and are told by `exchange.end`.
        """
        self._connection = connection
        self._body = body
        self._reused = connection.uses > 0
        transport = self._transport = connection.lend(self)
        now = self._last_read = self._loop.time()
        connection.expect_by(now + self._limits.first_byte_timeout_s)
        self._exchange.phase = Phase.WAIT
        self._client.attach(self)
        try:
            if len(body.sent) < _JOIN_BYTES:
                transport.write(head + body.sent)
            else:
                transport.writelines((head, body.sent))
            if self._heartbeat_s:
                self._heed_silence()
            await self._done
        finally:
            self._client.attach(None)
            if self._beat_timer is not None:
                self._beat_timer.cancel()
            if self._slow_timer is not None:
                self._slow_timer.cancel()
            if self._connection is not None:
                self._drop_connection()

    # --- what the upstream sends

    def data_received(self, data: bytes) -> None:
        """Take the head; from then on the connection gives its bytes to a method of their own."""
        self._answered = True
        data = self._held + data if self._held else data
        while True:
            end = data.find(b"\r\n\r\n")
            if end < 0 or end > MAX_HEAD_BYTES:
                self._held = data
                if len(data) > MAX_HEAD_BYTES or not data.startswith(_STATUS_LINE[: len(data)]) or b"\n\n" in data:
                    self._refuse_head()
                return
            try:
                head = parse_head(data[:end])
            except Malformed:
                self._refuse_head()
                return
            data = data[end + 4 :]
            if head.status >= 200:
                break
            self._interim += 1  # dropped (RFC 9110 section 15.2); and nobody asked to switch protocols
            if head.status == 101 or self._interim > _MAX_INTERIM:
                self._refuse_head()
                return
        self._held = b""
        self._head = head
        assert self._connection is not None
        if 200 <= head.status < 300:
            media_type = head.headers.get(b"content-type", b"")[:17].lower()
            self._event_stream = media_type == b"text/event-stream"
            # Only where there is framing can bytes come that are none of the content, and only events are looked into.
            receive = self._first_bytes if self._event_stream or head.framing.chunked else self._begin
            if self._sent_bytes and not self._may_change_events(head):
                self._fail(UpstreamError("The model's server did not answer with a stream."))
                return
            if self._echo is not None and media_type.startswith(b"application/json") and _may_change_json(head):
                self._parts = []
                receive = self._collect
        else:
            self._state = _State.FAILING
            self._error_bytes: list[bytes] = []
            receive = self._error_received
        self._connection.receive = receive
        if data or head.framing.done:
            receive(data)

    def _may_change_events(self, head: ResponseHead) -> bool:
        """Say whether the answer is a stream that events of ours can stand in."""
        return self._event_stream and not isinstance(head.framing, NoBody) and _is_identity(head)

    def _refuse_head(self) -> None:
        self._fail(UpstreamError("The model's server sent a malformed response."))

    def _first_bytes(self, data: bytes) -> None:
        """Hold the head until it is certain that the body has begun and does not begin with an error."""
        data = self._held + data if self._held else data
        assert self._head is not None
        content, whole = _content(self._head.framing, data)
        if not content and not whole:
            self._held = data
            if len(data) > MAX_HEAD_BYTES:
                self._fail(UpstreamError("The model's server sent a malformed response."))
            return
        is_error = opens_with_error(content, whole) if self._event_stream and content else False
        if is_error is None:
            self._held = data
            return
        self._held = b""
        if is_error:
            self._state = _State.FAILING
            self._error_bytes = []
            assert self._connection is not None
            self._connection.receive = self._error_received
            self._error_received(data)
            return
        self._begin(data)

    def _collect(self, data: bytes) -> None:
        """Hold a JSON answer until it is whole and `model` can be changed, or is too long for that."""
        head, parts = self._head, self._parts
        assert head is not None
        assert parts is not None
        self._exchange.first_byte = self._exchange.first_byte or time.monotonic()
        data = self._held + data
        try:
            self._held = data[head.framing.scan(data, parts) :]
        except Malformed:
            self._refuse_head()
            return
        if sum(map(len, parts)) > MAX_JSON_BYTES:
            self._begin(b"", b"".join(parts))
        elif head.framing.done:
            self._pass_collected(head, b"".join(parts))
        elif self._connection is not None:
            self._connection.expect_by(self._loop.time() + self._limits.idle_timeout_s)

    def _pass_collected(self, head: ResponseHead, content: bytes) -> None:
        """Pass on a whole JSON answer with the name that was asked."""
        assert self._echo is not None
        self._meter = self._metering.document()
        self._meter.feed(content)
        content = echo_json(content, self._echo)
        self._open(head.status)
        self._settle(End.COMPLETE)
        self._write(self._client_head(head.status, head.headers, b"content-length: %d" % len(content)) + content)
        self._end()

    def _error_received(self, data: bytes) -> None:
        """Collect the body of an error up to its end or its bound."""
        assert self._head is not None
        framing = self._head.framing
        data = self._held + data if self._held else data
        try:
            understood = framing.scan(data, self._error_bytes)
        except Malformed:
            framing.done = True
            self._head.keep_alive = False
            understood = len(data)
        self._held = data[understood:]
        is_event = self._event_stream and self._head.status < 300
        body = b"".join(self._error_bytes) if is_event or framing.done else b""
        too_long = sum(map(len, self._error_bytes)) > _MAX_ERROR_BYTES
        if framing.done or too_long or (is_event and any(end in body for end in EVENT_ENDS)):
            self._answered_error(body or b"".join(self._error_bytes))

    def _answered_error(self, body: bytes) -> None:
        head = self._head
        assert head is not None
        status = head.status
        if status < 300:  # an event: what it carries tells the status
            status, body = error_in(body)
        reusable = head.framing.done and head.keep_alive and not self._held
        self._fail(UpstreamAnsweredError(status, head.headers, body), reusable=reusable)

    def _open(self, status: int) -> None:
        """Let the client have bytes from now on."""
        self._exchange.phase = Phase.STREAM
        self._exchange.status = status
        client_transport = self._client.transport
        assert client_transport is not None  # else the client's leaving would have ended this
        self._client_write = client_transport.write

    def _begin(self, data: bytes, collected: bytes | None = None) -> None:
        """Pass the head on, unless a heartbeat had to, and the first bytes with it.

        `collected` is content that was held in vain: it is too long to be changed.
        """
        head = self._head
        assert head is not None
        framing = head.framing
        if self._sent_bytes:
            framing.tail = HEARTBEAT[-EVENT_END_BYTES:]
        readable = self._event_stream and _is_identity(head)
        meter = self._meter = self._metering.events() if readable else self._metering.document()
        self._hides = readable and self._metering.changes
        self._framed = self._framed_for(head, collected)
        client_head = b""
        if not self._sent_bytes:
            self._open(head.status)
            client_head = self._client_head(head.status, head.headers, self._framing_line(framing))
        self._state = _State.PASSING
        self._exchange.first_byte = self._exchange.first_byte or time.monotonic()
        self._last_read = self._loop.time()
        receive: Callable[[bytes], None]
        if self._framed is not None:
            receive = self._framed_received
        elif framing.chunked:
            receive = self._chunk_received
        else:
            receive = self._verbatim_received
        if self._connection is not None:  # None: an answer that the close ends, and that was empty
            self._connection.receive = receive
        if self._framed is not None:
            content = meter.feed(collected) if collected is not None else b""
            self._framed_received(data, client_head + self._framed.chunk(content))
        else:
            self._verbatim_received(data, client_head)
        if self._sent_bytes:
            self._body.release()
        if self._connection is not None:
            self._connection.expect_by(self._last_read + self._limits.idle_timeout_s / _LOOKS)

    def _framed_for(self, head: ResponseHead, collected: bytes | None) -> Framed | None:
        """Return what the answer passes through, None for one that passes as it is."""
        framing = head.framing
        echo: EventEcho | None = None
        needed = isinstance(framing, UntilClose) or (self._old_client and framing.chunked) or collected is not None
        if (self._heartbeat_s or self._hides or self._echo is not None) and self._may_change_events(head):
            echo = EventEcho(self._echo) if self._echo is not None else None
            needed = needed or echo is not None or isinstance(framing, Length)
        return self._new_framed(framing, echo) if needed else None

    def _new_framed(self, framing: Framing, echo: EventEcho | None = None) -> Framed:
        assert self._meter is not None  # there is one as soon as an answer begins
        whole_events = self._hides or echo is not None
        return Framed(framing, self._meter, bare=self._old_client, whole_events=whole_events, echo=echo)

    def _framing_line(self, framing: Framing) -> bytes:
        if isinstance(framing, Length) and self._framed is None:
            return b"content-length: %d" % framing.total
        return b"" if isinstance(framing, NoBody) or self._old_client else _CHUNKED

    def _client_head(self, status: int, headers: dict[bytes, bytes], framing_line: bytes) -> bytes:
        lines = [b"HTTP/1.1 %d OK" % status if status != 204 else b"HTTP/1.1 204 No Content"]
        for name, value in headers.items():
            written = _RETURNED.get(name)
            if written is not None:
                lines.append(written + value)
        if framing_line:
            lines.append(framing_line)
        if not self.keep_alive:
            lines.append(b"connection: close")
        lines.append(b"x-request-id: " + self._exchange.request_id.encode())
        extra = _NO_BUFFERING if self._event_stream else b""
        return b"\r\n".join(lines) + b"\r\n" + self._exchange.limit_headers + extra + CORS + b"\r\n"

    # --- the hot path

    def _chunk_received(self, data: bytes) -> None:
        """Pass on one whole chunk with an event that ends as its kind does, which is a token; else the general way.

        Every line here runs once a token of every stream: no call, clock or allocation that can be spared.
        """
        count = len(data)
        if (
            whole_chunks.get(data[:SIZE_LINE_BYTES]) == count
            and data.endswith(self._ending)
            and data.find(b"\n\n") + 4 == count  # some put several events into a chunk; this is the end of the first
        ):
            self._sent_bytes += count
            self._passed_unseen += 1
            self._last_chunk = data
            self._client_write(data)
        else:
            self._verbatim_received(data)

    def _verbatim_received(self, data: bytes, before: bytes = b"") -> None:
        """Pass bytes on as they are, `before` in front of them in one write."""
        if self._held:
            data = self._held + data
            self._held = b""
        self._last_read = self._loop.time()
        if self._last_chunk:
            self._note_last_chunk()
        framing = self._head.framing  # type: ignore[union-attr]  # set since the head came; an assert here costs
        payload: list[bytes] = []
        try:
            understood = framing.scan(data, payload, plain=True)
        except Irregular:
            self._become_framed(data, before, payload)
            return
        except Malformed:
            assert isinstance(framing, Chunked)  # no other framing has rules to break
            self._malformed(self._metered(data[: framing.consumed], payload))
            return
        if understood != len(data):
            self._held = data[understood:]
            data = data[:understood]
        data = self._metered(data, payload)
        if framing.done:
            self._settle(End.COMPLETE)
        self._write(before + data if before else data)
        if framing.done:
            self._end()

    def _metered(self, data: bytes, payload: list[bytes]) -> bytes:
        """Return what the client gets for `data`, whose content is `payload`; see what it used."""
        meter, framing = self._meter, self._head.framing  # type: ignore[union-attr]  # as above
        content = payload[0] if len(payload) == 1 else b"".join(payload)
        passed = meter.feed(content)  # type: ignore[union-attr]  # there since the answer began
        if not self._event_stream:
            return data
        between = framing.between_chunks and not meter.holds  # type: ignore[union-attr]
        ending = meter.ending if between and not self._held else b""  # type: ignore[union-attr]
        self._ending = ending + b"\r\n" if ending else _NO_ENDING
        if not self._hides or (between and passed is content):
            return data
        if between:
            return chunk(passed) + LAST_CHUNK if framing.done else chunk(passed)
        # The read ends within a chunk or an event: how much of it the client may have is not told yet.
        framed = self._framed = self._new_framed(framing)
        if self._connection is not None:
            self._connection.receive = self._framed_received
        return framed.chunk(passed) + (framed.end() if framing.done else b"")

    def _malformed(self, understood: bytes) -> None:
        """End an answer that breaks the rules: with a status of ours as long as the client has none."""
        if not self._sent_bytes:
            self._refuse_head()
            return
        if understood:
            self._write(understood)
        self._break(End.UPSTREAM_CUT)

    def _become_framed(self, data: bytes, before: bytes, payload: list[bytes]) -> None:
        """Go on without the upstream's chunk framing, because it has extensions or trailers."""
        assert self._head is not None
        assert isinstance(self._head.framing, Chunked)
        assert self._connection is not None
        consumed = self._head.framing.consumed
        passed = self._metered(data[:consumed], payload)
        self._framed = self._framed or self._new_framed(self._head.framing)
        self._connection.receive = self._framed_received
        self._framed_received(data[consumed:], before + passed)

    def _framed_received(self, data: bytes, before: bytes = b"") -> None:
        """Take the upstream's framing away and put ours on, `before` in front."""
        self._last_read = self._loop.time()
        framed = self._framed
        assert framed is not None
        assert self._head is not None
        data = before + framed.feed(self._held + data)
        self._held = framed.left
        if framed.broken:
            self._malformed(data)
            return
        if self._head.framing.done:
            self._settle(End.COMPLETE)
        if data:
            self._write(data)
        if self._head.framing.done:
            self._end()

    def _write(self, data: bytes) -> None:
        self._sent_bytes += len(data)
        self._client_write(data)

    def _note_last_chunk(self) -> None:
        """Tell the framing how the content ends, which the hot path does not."""
        chunk, self._last_chunk, self._seen_chunk = self._last_chunk, b"", b""
        if chunk and self._head is not None:
            self._head.framing.tail = chunk[-2 - EVENT_END_BYTES : -2]

    # --- the end

    def connection_lost(self, eof: bool) -> None:
        """Hear that the upstream's connection ended: in order, too early, or before it began."""
        self._connection = None
        if self._state is _State.WAITING:
            head = self._head
            at_once = self._loop.time() - self._last_read < _STALE_WITHIN_S
            if self._reused and at_once and not self._answered and not self._sent_bytes:
                self._fail(StaleConnection())
            elif head is not None and not head.framing.self_delimited and eof and not self._held:
                head.framing.done = True
                if self._parts is None:
                    self._begin(b"")
                else:
                    self._pass_collected(head, b"".join(self._parts))
            else:
                self._fail(UpstreamError("The model's server closed the connection without an answer."))
        elif self._state is _State.FAILING:
            self._answered_error(b"".join(self._error_bytes))
        elif self._state is _State.PASSING:
            self._upstream_closed(eof)

    def _upstream_closed(self, eof: bool) -> None:
        assert self._head is not None
        framed = self._framed
        whole = eof and not self._head.framing.self_delimited
        # A stream that stops within an event was cut, whatever the connection says.
        if not whole or framed is None or (self._event_stream and framed.within_event):
            self._break(End.UPSTREAM_CUT)
            return
        last = framed.end()
        self._settle(End.COMPLETE)
        self._write(last)
        self._end()

    def _end(self) -> None:
        """End a complete answer; bytes after its end never reach a client."""
        head = self._head
        assert head is not None
        reusable = head.keep_alive and head.framing.self_delimited and not self._held
        self._release(reusable)
        self._let_go()

    def _settle(self, end: End) -> None:
        """Note how an answer that began ended and what it used, and let it be recorded: once, before its last bytes."""
        if self._settled:
            return
        self._settled = True
        meter, exchange = self._meter, self._exchange
        if meter is not None:
            meter.passed += self._passed_unseen
            exchange.usage = meter.usage(end is End.COMPLETE)
            if end is End.COMPLETE and meter.failed:
                end = End.UPSTREAM_ERROR
        exchange.end = end
        self._record()

    def _release(self, reusable: bool) -> None:
        """Part from the upstream: give a connection back that can serve again, close any other."""
        self._state = _State.ENDED
        self._exchange.response_bytes = self._sent_bytes
        connection, transport = self._connection, self._transport
        if connection is None or not reusable or transport is None or transport.get_write_buffer_size():
            self._drop_connection()
            return
        self._connection = None
        if self._paused:
            transport.resume_reading()
        connection.free(self._head.idle_s if self._head is not None else 0.0)

    def _let_go(self) -> None:
        """Let the request end; an answer stays open until its client has room again, so that a dead one is noticed."""
        if self._paused or self._done.done():
            return
        if self._failure is None:
            self._done.set_result(None)
        else:
            self._done.set_exception(self._failure)

    def _fail(self, error: Exception, reusable: bool = False) -> None:
        """End an answer of which the client has not got a byte, or nothing but heartbeats."""
        self._exchange.first_byte = 0.0
        if self._sent_bytes and isinstance(error, EdgeError | UpstreamAnsweredError):
            self._fail_in_stream(error, reusable)
            return
        self._release(reusable)
        if not self._done.done():
            self._done.set_exception(error)

    def _fail_in_stream(self, error: EdgeError | UpstreamAnsweredError, reusable: bool) -> None:
        exchange = self._exchange
        if isinstance(error, UpstreamAnsweredError):
            told = from_upstream(error.status, error.body)
        else:
            told = error
        exchange.error = told.error_code
        self._settle(exchange.end or End.UPSTREAM_ERROR)
        self._write_last_event(told.body())
        self._failure = FailedInStream(error, self.keep_alive)
        self._release(reusable)
        self._let_go()

    def _write_last_event(self, body: bytes) -> None:
        event = error_event(body)
        self._write(event if self._old_client else chunk(event) + LAST_CHUNK)

    def _break(self, end: End) -> None:
        """End an answer that began, so that no client takes it for complete.

        Where a frame of our own can stand, an error event is the one thing that every SDK turns into an exception;
        a clean end would be silent truncation, since no SDK looks for `[DONE]`.
        """
        if self._state is _State.ENDED:
            return
        self._settle(end)
        if self._can_speak():
            self._write_last_event(_BROKEN_STREAM.get(end, _CUT))
        else:
            self.keep_alive = False
            if self._old_client:
                self._client.reset()  # to such a client an orderly end is a complete answer
        self._release(reusable=False)
        self._let_go()

    def _can_speak(self) -> bool:
        """Say whether an event of our own can stand here."""
        if not self._event_stream or self._head is None:
            return False
        if self._framed is not None:
            return self._framed.between_events
        self._note_last_chunk()
        framing = self._head.framing
        return not self._held and framing.between_chunks and framing.tail.endswith(EVENT_ENDS)

    def be_last(self) -> None:
        """Let the answer be the last of its connection, unless its head has promised another."""
        if not self._sent_bytes:
            self.keep_alive = False

    def cut(self) -> None:
        """End the answer because the edge has to stop."""
        if self._state is _State.PASSING:
            self._break(End.DRAINED)
        elif self._state is not _State.ENDED:
            self._exchange.end = End.DRAINED
            self._fail(UpstreamUnavailable("The edge is restarting, try again.", retry_after_s=1))

    def _drop_connection(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.abort()

    # --- the client

    def client_paused(self) -> None:
        """Stop reading the upstream: the client's buffer is full."""
        self._paused = True
        self._slow_checks = 0
        if self._transport is not None and self._connection is not None:
            self._transport.pause_reading()
        if self._limits.min_client_rate_bytes_per_s:
            self._queued_bytes = self._client.unread_bytes()
            self._slow_timer = self._loop.call_later(_SLOW_CLIENT_CHECK_S, self._watch_client)

    def client_resumed(self) -> None:
        """Go on reading; an answer that waited for its client to read it is over."""
        self._paused = False
        self._last_read = self._loop.time()
        if self._slow_timer is not None:
            self._slow_timer.cancel()
            self._slow_timer = None
        if self._connection is not None and self._transport is not None:
            self._transport.resume_reading()
        if self._state is _State.ENDED:
            self._let_go()

    def client_gone(self) -> None:
        """Close the upstream in this same call: the GPU slot is what this saves."""
        if self._state is not _State.ENDED:
            self._settle(End.CLIENT_GONE)
            self._exchange.response_bytes = self._sent_bytes
            self._state = _State.ENDED
        self._drop_connection()

    # --- time

    def overdue(self) -> None:
        """Hear that the first byte, or the next one, may be too late; while the client is full nothing is read.

        No clock is read per token: it is looked a few times in an `idle_timeout_s` whether one came, so an upstream is
        cut between one and one and a quarter of it.
        """
        if self._state is not _State.PASSING:
            self._exchange.end = End.IDLE_TIMEOUT if self._exchange.first_byte else End.FIRST_BYTE_TIMEOUT
            self._fail(UpstreamTimeout("The model's server did not begin to answer in time."))
            return
        now, idle_timeout_s = self._loop.time(), self._limits.idle_timeout_s
        self._heed_last_chunk(now)
        if now - self._last_read >= idle_timeout_s:
            self._break(End.IDLE_TIMEOUT)
        elif self._connection is not None:
            self._connection.expect_by(min(self._last_read + idle_timeout_s, now + idle_timeout_s / _LOOKS))

    def _heed_last_chunk(self, now: float) -> None:
        """Count a chunk that the hot path passed on as read by now."""
        if self._paused or self._last_chunk is not self._seen_chunk:
            self._last_read, self._seen_chunk = now, self._last_chunk

    def _heed_silence(self) -> None:
        """Send a heartbeat when nothing was sent for as long as the route says.

        Looked for a few times in that, so a heartbeat comes after between one and one and a quarter of it.
        """
        now = self._loop.time()
        if self._state is _State.ENDED:
            return
        self._heed_last_chunk(now)  # before a heartbeat looks where it ended
        if self._paused or self._sent_bytes != self._beat_seen:
            self._silent_since = now
        elif now - self._silent_since >= self._heartbeat_s and self._may_beat():
            self._beat()
            self._silent_since = now
        self._beat_seen = self._sent_bytes
        left_s, look_s = self._silent_since + self._heartbeat_s - now, self._heartbeat_s / _LOOKS
        self._beat_timer = self._loop.call_later(left_s if 0 < left_s < look_s else look_s, self._heed_silence)

    def _may_beat(self) -> bool:
        """Say whether a comment can stand here: before a stream, or between two of its events."""
        if self._state is _State.WAITING:
            return self._head is None or self._may_change_events(self._head)
        return self._state is _State.PASSING and self._can_speak() and _is_identity(self._head)

    def _beat(self) -> None:
        beat = HEARTBEAT if self._old_client else _HEARTBEAT_CHUNK
        if not self._sent_bytes:  # nobody else is asked from now on: the client has the status
            self._body.release()
            self._event_stream = True
            self._open(200)
            headers = self._head.headers if self._head is not None else _STREAM_HEADERS
            beat = self._client_head(200, headers, b"" if self._old_client else _CHUNKED) + beat
        self._write(beat)

    def _watch_client(self) -> None:
        """Cut a client that has read more slowly than the floor rate for half a minute."""
        unread = self._client.unread_bytes()
        floor = self._limits.min_client_rate_bytes_per_s * _SLOW_CLIENT_CHECK_S
        self._slow_checks = self._slow_checks + 1 if self._queued_bytes - unread < floor else 0
        self._queued_bytes = unread
        if self._slow_checks >= _SLOW_CLIENT_PATIENCE:
            self._settle(End.SLOW_CLIENT)
            self._exchange.end = End.SLOW_CLIENT  # also of an answer that was recorded whole: its client never read it
            self.keep_alive = False
            self._paused = False
            self._client.abort()
            self._release(reusable=False)
            self._let_go()
        else:
            self._slow_timer = self._loop.call_later(_SLOW_CLIENT_CHECK_S, self._watch_client)


def _is_identity(head: ResponseHead | None) -> bool:
    """Say whether the content can be read; what is encoded is never touched."""
    return head is not None and head.headers.get(b"content-encoding", b"identity").lower() == b"identity"


def _may_change_json(head: ResponseHead) -> bool:
    framing = head.framing
    too_long = isinstance(framing, Length) and framing.total > MAX_JSON_BYTES
    return _is_identity(head) and not isinstance(framing, NoBody) and not too_long


def _content(framing: Framing, data: bytes) -> tuple[bytes, bool]:
    """Return the content at the beginning of a body, and whether that is all of it; `framing` is left as it is."""
    if isinstance(framing, Chunked):
        payload: list[bytes] = []
        ahead = Chunked()
        try:
            ahead.scan(data, payload)
        except Malformed:
            return data, True  # to be found out again, and refused, by who passes it on
        return b"".join(payload), ahead.done
    return data, framing.done or (isinstance(framing, Length) and len(data) >= framing.left)


async def relay(
    exchange: Exchange,
    client: ClientConnection,
    pool: ConnectionPool,
    limits: Limits,
    head: bytes,
    body: Body,
    metering: Metering,
    settle: Callable[[], None],
    *,
    old_client: bool,
    keep_alive: bool,
    heartbeat_s: float = 0,
    echo: str | None = None,
) -> bool:
    """Pass a request to an endpoint and its answer to the client; return whether the client's connection can go on.

    A request whose reused connection dies at once, before it gave a byte, is sent again, once, on a new one. That is
    safe even for a POST, since the upstream had closed it before the request came (RFC 9112 section 9.3.1), and no
    retry, so it takes no budget. `metering` tells how usage is read, and `settle` is called once for an answer that
    began, before its last bytes go. `heartbeat_s` is the silence after which a stream gets a heartbeat, 0 for none;
    `echo` the model's name that the answer shall have, None for the upstream's own.
    """
    reused = pool.take()
    while True:
        connection = reused or await pool.connect(limits.connect_timeout_s)
        answer = Relay(
            exchange,
            client,
            limits,
            metering,
            settle,
            old_client=old_client,
            keep_alive=keep_alive,
            heartbeat_s=heartbeat_s,
            echo=echo,
        )
        try:
            await answer.run(connection, head, body)
        except StaleConnection:  # never of a new one
            exchange.replays += 1
            reused = None
        else:
            return answer.keep_alive
