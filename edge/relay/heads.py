"""The head of an upstream's answer: what it allows to be done with the body, and how the client gets it."""

import enum
import time
from typing import Final

from edge.client.answers import CORS, server_timing
from edge.exchange import Exchange
from edge.operations import Operation
from edge.relay.echo import MAX_JSON_BYTES
from edge.relay.terms import Attempt, Client, UpstreamAnsweredError
from edge.sse import error_in, opens_stream, opens_with_error
from edge.upstream_errors import ACCOUNT_HEADERS
from edge.wire.http1 import MAX_LINE_BYTES, Chunked, Framing, Length, Malformed, NoBody, ResponseHead, Shape

# What comes back from the upstream besides the framing. Everything else, `server` and cookies above all, stays behind.
_RETURNED: Final = frozenset({
    b"content-type", b"content-encoding", b"content-disposition", b"content-language", b"date", b"openai-processing-ms",
    b"openai-version",
})  # fmt: skip
_RETURNED_TO_OWNER: Final = (*ACCOUNT_HEADERS, b"retry-after", b"x-should-retry")
_NO_BUFFERING: Final = b"cache-control: no-cache\r\nx-accel-buffering: no\r\n"
# The head of a stream whose upstream has sent nothing yet; vLLM and SGLang send the same content type.
_MEDIA: Final = (b"audio/", b"image/", b"video/")
_JSON: Final = (b"/json", b"+json")
STREAM: Final = Shape(200, {b"content-type": b"text/event-stream; charset=utf-8"}, Chunked, True, 0.0)
CHUNKED: Final = b"transfer-encoding: chunked\r\n"
_LOOK_BYTES: Final = MAX_LINE_BYTES + 2  # looked at in one go: a line of chunk framing is no longer
_LAST_LINES: Final = CORS + b"\r\n"


class Opening(enum.Enum):
    """What a body begins with."""

    UNCERTAIN = "uncertain"
    DOCUMENT = "document"
    EVENTS = "events"
    NO_EVENT = "no event"  # a stream that is over
    ERROR = "error"  # in a stream


UNCERTAIN, DOCUMENT, EVENTS, NO_EVENT, ERROR = Opening


def may_stream(head: ResponseHead) -> bool:
    """Whether an answer that is not said to be events may be a stream of them all the same.

    Some servers give events no type, that of a file or of plain text, or a list of types. JSON's and those of media are
    believed.
    """
    types = head.shape.headers.get(b"content-type", b"").lower().split(b",")
    is_told = all(
        each.endswith(_JSON) or each.startswith(_MEDIA) for each in (each.partition(b";")[0].strip() for each in types)
    )
    return not is_told and head.shape.is_identity and not isinstance(head.framing, NoBody)


def takes_events(head: ResponseHead, streams: bool | None) -> bool:
    """Whether the answer is a stream that events of ours can stand in."""
    return bool(streams) and head.shape.is_identity and not isinstance(head.framing, NoBody)


def has_to_end(operation: Operation, head: ResponseHead | None, streams: bool | None, *, framed: bool) -> bool:
    """Whether an answer is a stream with an event that ends it, to which an event of ours can be added."""
    if not operation.always_ends or head is None or not takes_events(head, streams):
        return False
    return head.framing.chunked or framed


def takes_model(head: ResponseHead) -> bool:
    """Whether the answer is JSON that can be changed."""
    framing = head.framing
    if not head.shape.headers.get(b"content-type", b"").lower().startswith(b"application/json") or isinstance(
        framing, NoBody
    ):
        return False
    return head.shape.is_identity and not (isinstance(framing, Length) and framing.total > MAX_JSON_BYTES)


class Beginning:
    """Finds out what a body is by its first bytes, of which each is looked at once; `framing` is left as it is.

    `streams` is what its head says, None where it does not say. JSON under the type of events is a document: some
    servers answer so whoever asked for a stream.
    """

    __slots__ = ("_ahead", "_at", "_content", "_framing", "_streams", "_whole")

    def __init__(self, framing: Framing, streams: bool | None) -> None:
        self._framing = framing
        self._streams = streams
        self._ahead = Chunked() if isinstance(framing, Chunked) else None
        self._at = 0  # how much of a chunked body was understood
        self._content = b""  # of it, without empty lines in front where anything may follow
        self._whole = False

    def opening(self, data: bytes) -> Opening:
        """Return what a body is whose first bytes are `data`: all that came."""
        if self._ahead is None:
            left = self._framing.left if isinstance(self._framing, Length) else len(data) + 1
            self._content, self._whole = data, self._framing.done or len(data) >= left
            return self._judged()
        found = UNCERTAIN
        while found is UNCERTAIN and self._look(self._ahead, data):
            found = self._judged()
        return found

    def _look(self, ahead: Chunked, data: bytes) -> bool:
        """Look at a few bytes more; return whether they told something."""
        payload: list[bytes] = []
        piece = data[self._at : self._at + _LOOK_BYTES]
        try:
            count = ahead.scan(piece, payload)
        except Malformed:  # to be found out again, and refused, by who passes it on
            payload, count, ahead.done = [piece], len(piece), True
        content = self._content + b"".join(payload)
        self._content = content.lstrip(b"\r\n") if self._streams is None else content
        self._at += count
        self._whole = ahead.done
        return count > 0

    def _judged(self) -> Opening:
        content, whole, streams = self._content, self._whole, self._streams
        if not content and not whole:
            return UNCERTAIN
        if streams is False:
            return DOCUMENT
        if streams is None or content[:1] == b"{":
            streams = opens_stream(content, whole)
            if not streams:
                return UNCERTAIN if streams is None else DOCUMENT
        if not content:
            return NO_EVENT
        is_error = opens_with_error(content, whole)
        if is_error is None:
            return UNCERTAIN
        return ERROR if is_error else EVENTS


def answered_error(head: ResponseHead, body: bytes, *, is_over: bool) -> tuple[UpstreamAnsweredError, float]:
    """Return what an upstream answered with an error, and how long its connection may be idle, 0 to close it."""
    status, shape = head.shape.status, head.shape
    if status < 300:  # an event: what it carries has the status
        status, body = error_in(body)
    idle_s = shape.idle_s if head.framing.done and head.keep_alive and is_over else 0.0
    return UpstreamAnsweredError(status, shape.headers, body), idle_s


def framing_line(framing: Framing, *, bare: bool, framed: bool) -> bytes:
    """Return the line that says how the body ends, b"" for none; `bare` for a client that knows no chunks."""
    if isinstance(framing, Length) and not framed:
        return b"content-length: %d\r\n" % framing.total
    return b"" if isinstance(framing, NoBody) or bare else CHUNKED


def client_head(
    exchange: Exchange, client: Client, attempt: Attempt, shape: Shape, framing: bytes, *, streams: bool
) -> bytes:
    """Return the head that a client gets; `framing` says how the body ends, `streams` keeps proxies from buffering."""
    lines = (shape.returned.get(attempt.is_instance) or _returned(shape, attempt.is_instance)) + framing
    if client.last:
        lines += b"connection: close\r\n"
    if streams:
        lines += _NO_BUFFERING
    if exchange.tells_timing:
        lines += server_timing(exchange, time.monotonic())
    return lines + exchange.operation.protocol.id_lines(exchange.request_id) + exchange.limit_headers + _LAST_LINES


def _returned(shape: Shape, is_instance: bool) -> bytes:
    """Return the lines that come back from the upstream, more of them to the owner of an instance."""
    status = shape.status
    lines = [b"HTTP/1.1 %d OK" % status if status != 204 else b"HTTP/1.1 204 No Content"]
    lines += [
        name + b": " + value
        for name, value in shape.headers.items()
        if name in _RETURNED or (is_instance and name.startswith(_RETURNED_TO_OWNER))
    ]
    shape.returned[is_instance] = b"\r\n".join(lines) + b"\r\n"
    return shape.returned[is_instance]
