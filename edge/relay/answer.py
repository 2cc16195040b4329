"""One answer, from the bytes that an upstream sends to those that the client gets; no socket, clock or loop in here.

The state of an answer is the method that receives its bytes. What each state does with each event:

| state      | bytes                        | closed in order              | lost          | overdue        | drain  |
|------------|------------------------------|------------------------------|---------------|----------------|--------|
| HEAD       | OPENING, COLLECTING, REFUSED | stale if reused, else 502    | the same      | 504 first byte | 503    |
| OPENING    | REFUSED, VERBATIM, FRAMED    | done if that is its end, 502 | 502           | 504 first byte | 503    |
| COLLECTING | ENDED, FRAMED                | done if that is its end, 502 | 502           | 504 idle       | 503    |
| REFUSED    | ENDED                        | fails with what came         | the same      | 504 first byte | 503    |
| VERBATIM   | FRAMED, ENDED                | breaks, cut                  | breaks, cut   | breaks, idle   | breaks |
| FRAMED     | ENDED                        | done between events, or cut  | breaks, cut   | breaks, idle   | breaks |

A client that leaves ends each of them. A stream that breaks behind its protocol's last event is complete. The head is
held until the first byte of the body (OPENING): servers send it at once and their first token much later. Until then an
error that opens a stream can still become a status, and another endpoint can still be asked. A heartbeat ends that
early: once one went out the client has its status, and a failure after it becomes an event.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from edge.errors import EdgeError, UpstreamError, UpstreamTimeout, UpstreamUnavailable
from edge.exchange import End, Exchange
from edge.metering.meters import Meter
from edge.protocols import NOTHING_BEGUN
from edge.relay import heads
from edge.relay.echo import MAX_JSON_BYTES, DocumentEcho
from edge.relay.framed import Framed
from edge.relay.heads import DOCUMENT, ERROR, NO_EVENT, UNCERTAIN, Beginning
from edge.relay.terms import Attempt, Client, Owner, StaleConnection, State, broken_stream, last_event
from edge.relay.verbatim import NO_ENDING, Verbatim, body_for
from edge.sse import EVENT_ENDS, event_end
from edge.wire import http1
from edge.wire.http1 import EVENT_END_BYTES, READ_STEP_BYTES, SIZE_LINE_BYTES, ResponseHead, whole_chunks

_MAX_ERROR_BYTES: Final = 64 * 1024  # of an upstream's error body; what is longer is not a message for a person
_NO_STREAM: Final = "did not answer with a stream"
_MAX_INTERIM: Final = 16  # answers of 1xx before the answer

HEAD, OPENING, COLLECTING, REFUSED, VERBATIM, FRAMED, ENDED = State
WAITING: Final = (HEAD, OPENING, COLLECTING, REFUSED)
_COMPLETE: Final = End.COMPLETE


class Answer:
    """One answer on its way; see the table above.

    `connection` has the attribute `receive`, which is set to the receiver of the state; it is None once the upstream is
    left. `reads` and `last_chunk` change with each read, which is the sign of life that is polled.
    """

    __slots__ = (
        "_attempt", "_body", "_client", "_collects", "_error", "_head", "_held", "_interim", "_owner", "_write",
        "connection", "ending", "exchange", "last_chunk", "meter", "reads", "sent_bytes", "state", "streams",
        "unmetered",
    )  # fmt: skip

    def __init__(self, owner: Owner, exchange: Exchange, client: Client, attempt: Attempt, connection: Any) -> None:
        self._owner = owner
        self.exchange = exchange
        self._client = client
        self._attempt = attempt
        self.connection = connection
        self.state = HEAD
        connection.receive = self.head
        self._head: ResponseHead | None = None
        self._held = b""  # not understood yet
        self._interim = 0
        self._error = bytearray()  # its body
        self._collects: DocumentEcho | None = None
        self._body: Verbatim | Framed | None = None
        self.streams: bool | None = False  # None: the first bytes decide
        self.meter: Meter | None = None
        self.unmetered = 0  # events that the meter did not have to see
        self.ending = NO_ENDING  # of those
        self.sent_bytes = exchange.response_bytes  # of an answer that goes on, else 0
        self.reads, self.last_chunk = 0, b""
        if attempt.seam is not None:
            self._write = owner.open(exchange.status)

    def _enter(self, state: State, receive: Callable[[bytes], None]) -> None:
        self.state = state
        if self.connection is not None:  # None: an answer that the close ends
            self.connection.receive = receive

    # --- receivers: before the client has a byte

    def head(self, data: bytes) -> None:
        """Take the head, and skip those of 1xx (RFC 9110 section 15.2): nobody asked to switch protocols."""
        self.reads += 1
        data = self._held + data if self._held else data
        while True:
            end = data.find(b"\r\n\r\n")
            if end < 0 or end > http1.MAX_HEAD_BYTES:
                self._held = data
                is_http = data.startswith(b"HTTP/1."[: len(data)]) and b"\n\n" not in data
                if len(data) > http1.MAX_HEAD_BYTES or not is_http:
                    self._refuse()
                return
            try:
                head = http1.parse_head(data[:end])
            except http1.Malformed:
                self._refuse()
                return
            data = data[end + 4 :]
            if head.shape.status >= 200:
                break
            self._interim += 1
            if head.shape.status == 101 or self._interim > _MAX_INTERIM:
                self._refuse()
                return
        self._head, self._held, shape = head, b"", head.shape
        if shape.status >= 300:
            self._enter(REFUSED, self.refused)
        else:
            streams = shape.is_events
            self.streams = None if self.exchange.stream and not streams and heads.may_stream(head) else streams
            if self.sent_bytes and not heads.takes_events(head, self.streams is not False):
                self._refuse(_NO_STREAM)
                return
            if self._attempt.echo is not None and self.streams is not None and heads.takes_model(head):
                self._collects = DocumentEcho(self._attempt.echo, self._attempt.metering.document())
                self._enter(COLLECTING, self.collecting)
            else:
                # Only where there is framing can bytes come that are no content, and only events can be errors.
                plain = self.streams is False and not head.framing.chunked
                looks = self._begin if plain else partial(self.opening, Beginning(head.framing, self.streams))
                self._enter(OPENING, looks)
        if data or head.framing.done:
            self.connection.receive(data)

    def opening(self, beginning: Beginning, data: bytes) -> None:
        """Hold the head until it is certain that the body has begun, as what, and that it is no error."""
        if len(data) > READ_STEP_BYTES:
            data = self.connection.first_step(data)
        data = self._held + data if self._held else data
        opening = beginning.opening(data)
        if opening is UNCERTAIN:
            self._held = data
            if len(data) > http1.MAX_HEAD_BYTES:
                self._refuse()
            return
        self._held = b""
        self.streams = opening is not DOCUMENT
        if self.sent_bytes and not self.streams:
            self._refuse(_NO_STREAM)
        elif opening is NO_EVENT and self.exchange.operation.last_events:
            self._refuse("answered with an empty stream")  # as some engines refuse a prompt
        elif opening is ERROR:
            self._enter(REFUSED, self.refused)
            self.refused(data)
        else:
            self._begin(data)

    def collecting(self, data: bytes) -> None:
        """Hold a JSON answer until it is whole and `model` can be changed, or is too long for that."""
        head: ResponseHead = self._head  # type: ignore[assignment]  # as in every state behind HEAD
        collects: DocumentEcho = self._collects  # type: ignore[assignment]  # in this state
        self.reads += 1
        if len(data) > READ_STEP_BYTES:
            data = self.connection.first_step(data)
        begins = not self.exchange.first_byte
        self.exchange.first_byte = self.exchange.first_byte or time.monotonic()
        data = self._held + data
        parts: list[bytes] = []
        try:
            self._held = data[head.framing.scan(data, parts) :]
        except http1.Malformed:
            self._refuse()
            return
        collects.feed(b"".join(parts))
        if collects.held_bytes > MAX_JSON_BYTES:
            self._begin(b"")
        elif head.framing.done:
            self._pass_collected(head)
        elif begins:
            self._owner.began()

    def refused(self, data: bytes) -> None:
        """Collect the body of an error up to its end or its bound."""
        head: ResponseHead = self._head  # type: ignore[assignment]  # as in every state behind HEAD
        error, framing, parts = self._error, head.framing, list[bytes]()
        if len(data) > READ_STEP_BYTES:
            data = self.connection.first_step(data)
        data = self._held + data if self._held else data
        looked = max(0, len(error) - EVENT_END_BYTES)  # no event ends before
        try:
            self._held = data[framing.scan(data, parts) :]
        except http1.Malformed:
            framing.done, head.keep_alive, self._held = True, False, b""
        error += b"".join(parts)
        is_whole = framing.done or (head.shape.status < 300 and event_end(error, looked, False))
        if is_whole or len(error) > _MAX_ERROR_BYTES:
            self._fail_as_answered(head)

    def _fail_as_answered(self, head: ResponseHead) -> None:
        self._owner.fail(*heads.answered_error(head, bytes(self._error), is_over=not self._held))

    def _refuse(self, why: str = "sent a malformed response") -> None:
        self._owner.fail(UpstreamError(f"The model's server {why}."))

    def _pass_collected(self, head: ResponseHead) -> None:
        """Pass on a whole JSON answer with the name that was asked."""
        assert self._collects is not None
        self.meter, content = self._collects.meter, self._collects.changed()
        self._write = self._owner.open(head.shape.status)
        self._owner.settle(_COMPLETE)
        line = b"content-length: %d\r\n" % len(content)
        before = heads.client_head(self.exchange, self._client, self._attempt, head.shape, line, streams=False)
        self.write(before + content)
        self._end(head, self._held)

    # --- the beginning

    def _begin(self, data: bytes) -> None:
        """Pass the head on, unless a heartbeat had to, and the first bytes with it, also those collected in vain."""
        head: ResponseHead = self._head  # type: ignore[assignment]  # as in every state behind HEAD
        exchange, client, attempt, collects = self.exchange, self._client, self._attempt, self._collects
        framing, streams, metering, before = head.framing, bool(self.streams), attempt.metering, b""
        kind = metering.events if streams and head.shape.is_identity else metering.document
        meter = self.meter = kind() if collects is None else collects.meter
        body = self._body = body_for(
            head, meter, attempt, bare=client.bare, streams=streams, collected=collects is not None
        )
        if self.sent_bytes:
            framing.tail = exchange.operation.protocol.heartbeat[-EVENT_END_BYTES:]
        else:
            self._write = self._owner.open(head.shape.status)
            line = heads.framing_line(framing, bare=client.bare, framed=isinstance(body, Framed))
            before = heads.client_head(exchange, client, attempt, head.shape, line, streams=streams)
        if isinstance(body, Framed):
            self._enter(FRAMED, self.framed)
            body.left, self._held = self._held, b""
            self.framed(data, before + body.chunk(collects.held() if collects is not None else b""))
        else:
            self._enter(VERBATIM, self.token if framing.chunked else self.verbatim)
            self.verbatim(data, before)
        self._owner.began()

    # --- receivers: the hot path

    def token(self, data: bytes) -> None:
        """Pass on one whole chunk with an event that ends as its kind does, which is a token; else the general way.

        Every line here runs once a token of every stream: no call, clock or allocation that can be spared.
        """
        count = len(data)
        if (
            whole_chunks.get(data[:SIZE_LINE_BYTES]) == count
            and data.endswith(self.ending)
            and data.find(b"\n\n") + 4 == count  # some put several events into a chunk; this is the end of the first
        ):
            self.sent_bytes += count
            self.unmetered += 1
            self.last_chunk = data
            self._write(data)
        else:
            self.verbatim(data)

    def verbatim(self, data: bytes, before: bytes = b"") -> None:
        """Pass bytes on as they are, `before` in front of them in one write."""
        self.reads += 1
        if self.last_chunk:
            self._note_last_chunk()
            self.last_chunk = b""
        if len(data) > READ_STEP_BYTES:
            data = self.connection.first_step(data)
        body: Verbatim = self._body  # type: ignore[assignment]  # in this state; an assert here costs
        data = body.feed(data)
        self.ending = body.ending
        if body.framed is not None:
            self._body = body.framed
            self._enter(FRAMED, self.framed)
        self._pass(before + data if before else data)

    def framed(self, data: bytes, before: bytes = b"") -> None:
        """Take the upstream's framing away and put ours on, `before` in front."""
        self.reads += 1
        if len(data) > READ_STEP_BYTES:
            data = self.connection.first_step(data)
        self._pass(before + self._body.feed(data))  # type: ignore[union-attr]  # as above

    def _pass(self, data: bytes) -> None:
        """Give the client what the body yielded; an answer that breaks the rules gets a status as long as it can."""
        body: Verbatim | Framed = self._body  # type: ignore[assignment]  # as above
        head: ResponseHead = self._head  # type: ignore[assignment]
        if self._attempt.keep is not None:
            self._attempt.note_kept(self.meter, whole=False)
        if not self.exchange.first_byte and self.meter.has_content:  # type: ignore[union-attr]  # as above
            self.exchange.first_byte = time.monotonic()
        if body.broken:
            if not self.sent_bytes:
                self._refuse()
                return
            self._break(self._attempt.broken_end, data)
            return
        done = head.framing.done
        if done and self.streams and self._is_half():
            self._break(End.UPSTREAM_CUT, data.removesuffix(http1.LAST_CHUNK))
            return
        if done:
            self._owner.settle(_COMPLETE)
        if data:
            self.sent_bytes += len(data)
            self._write(data)
        if done:
            self._end(head, body.left)

    def write(self, data: bytes) -> None:
        """Give the client bytes, and count them."""
        self.sent_bytes += len(data)
        self._write(data)

    def _note_last_chunk(self) -> None:
        """Let the framing know how the content ends, which the hot path does not."""
        if self.last_chunk:
            self._head.framing.tail = self.last_chunk[-2 - EVENT_END_BYTES : -2]  # type: ignore[union-attr]

    # --- the end

    def _end(self, head: ResponseHead, left: bytes) -> None:
        """End a complete answer; bytes after its end never reach a client."""
        reusable = head.keep_alive and head.framing.self_delimited and not left
        self._owner.leave(head.shape.idle_s if reusable else 0.0)

    def closed(self, *, in_order: bool, stale: bool) -> None:
        """Take the end of the upstream's connection; `stale` one that was reused, and died as soon as it was."""
        head = self._head
        if self.state is REFUSED:
            assert head is not None
            self._fail_as_answered(head)
        elif self.state not in WAITING:
            self._closed_within(in_order)
        elif stale and not self.reads and not self.sent_bytes:
            self._owner.fail(StaleConnection())
        elif head is None or head.framing.self_delimited or not in_order or self._held:
            self._refuse(f"{'closed' if in_order else 'reset'} the connection without an answer")
        else:
            head.framing.done = True
            if self.state is OPENING:
                self.opening(Beginning(head.framing, self.streams), b"")
            else:
                self._pass_collected(head)

    def _closed_within(self, in_order: bool) -> None:
        body, head = self._body, self._head
        assert head is not None
        # A stream that stops within an event was cut, whatever the connection says.
        is_whole = in_order and not head.framing.self_delimited
        if not isinstance(body, Framed) or not is_whole or (self.streams and body.within_event) or self._is_half():
            self._break(End.UPSTREAM_CUT)
            return
        last = body.end()
        if body.broken:
            self._break(self._attempt.broken_end, last)
        else:
            self._owner.settle(_COMPLETE)
            self.write(last)
            self._end(head, body.left)

    def overdue(self) -> None:
        """End the answer because its first byte, or its next one, is too late."""
        if self.state in WAITING:
            self.exchange.ended(End.IDLE_TIMEOUT if self.exchange.first_byte else End.FIRST_BYTE_TIMEOUT)
            self._owner.fail(UpstreamTimeout("The model's server did not begin to answer in time."))
        else:
            self._break(End.IDLE_TIMEOUT)

    def drain(self) -> None:
        """End the answer because the edge has to stop."""
        if self.state in WAITING:
            self.exchange.ended(End.DRAINED)
            self._owner.fail(UpstreamUnavailable("The edge is restarting, try again.", retry_after_s=1))
        else:
            self._break(End.DRAINED)

    def _is_half(self) -> bool:
        """Whether a stream has ended in order without the event that ends it, and would look whole."""
        framed = isinstance(self._body, Framed)
        has_to_end = heads.has_to_end(self.exchange.operation, self._head, self.streams, framed=framed)
        return has_to_end and self.meter is not None and self.meter.is_half()

    def _break(self, end: End, before: bytes = b"") -> None:
        """End an answer that began, so that no client takes it for complete; `before` is what of it came last.

        Where a frame of our own can stand, an error event is the one thing that every SDK turns into an exception.
        """
        if self.state is ENDED:
            return
        if before:
            self.write(before)
        between = self.takes_event_now()
        is_whole = between and self.meter is not None and self.meter.ended and not self._attempt.differs
        if between and not is_whole and self._head.shape.is_identity and self._owner.interrupt(end):  # type: ignore[union-attr]
            return
        self._owner.settle(_COMPLETE if is_whole else end)
        if is_whole:
            self.write(b"" if self._client.bare else http1.LAST_CHUNK)
        elif between:
            self.write_last_event(broken_stream(end))
        else:
            self._client.last = True
            if self._client.bare:
                self._client.reset()  # to such a client an orderly end is a complete answer
        self._owner.leave(0.0)

    # --- events of our own

    def takes_event_now(self) -> bool:
        """Whether an event of our own can stand here."""
        body = self._body
        if not self.streams or self._head is None or body is None:
            return False
        if isinstance(body, Framed):
            return body.between_events
        self._note_last_chunk()
        framing = self._head.framing
        return not body.left and framing.between_chunks and framing.tail.endswith(EVENT_ENDS)

    def write_last_event(self, error: EdgeError) -> None:
        """Give the client an error as the last event of its stream."""
        begun = self.meter.begun(self.last_chunk) if self.meter is not None else NOTHING_BEGUN
        if self._attempt.echo is not None or not begun.model:
            begun = begun._replace(model=self.exchange.model)
        self.write(last_event(self.exchange, error, begun, bare=self._client.bare))

    def may_beat(self) -> bool:
        """Whether a heartbeat can stand here: before a stream, or between two of its events."""
        head = self._head
        if self.state is REFUSED:  # it may still become a status, or another endpoint's answer
            return False
        if self.state in WAITING:
            return head is None or heads.takes_events(head, self.streams or self.sent_bytes > 0)
        return head is not None and self.takes_event_now() and head.shape.is_identity

    def beat(self) -> None:
        """Give the client a heartbeat; before the answer, it decides the status."""
        heartbeat = self.exchange.operation.protocol.heartbeat
        beat = heartbeat if self._client.bare else http1.chunk(heartbeat)
        if not self.sent_bytes:  # no other endpoint is asked from now on: the client has the status
            self.streams = True
            self._owner.let_go()
            shape = self._head.shape if self._head is not None else heads.STREAM
            self._write = self._owner.open(shape.status)
            line = b"" if self._client.bare else heads.CHUNKED
            beat = heads.client_head(self.exchange, self._client, self._attempt, shape, line, streams=True) + beat
        self.write(beat)
