"""What a client is sent for what an upstream sends, however it is read; without sockets."""

import asyncio
import gc
import json
import re
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import product
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.client.answers import CORS
from edge.client.body import Body, BodyMemory
from edge.config.values import parse_url
from edge.errors import EdgeError, UpstreamError, UpstreamTimeout, UpstreamUnavailable
from edge.exchange import NO_USAGE, End, Exchange, Phase, Usage
from edge.metering.meters import Metering
from edge.operations import OPERATIONS
from edge.relay.answer import Answer
from edge.relay.echo import MAX_JSON_BYTES, EventEcho
from edge.relay.pace import Heartbeat, Silence
from edge.relay.relay import Relay
from edge.relay.terms import Attempt, FailedInStream, StaleConnection, Timeouts, UpstreamAnsweredError
from edge.wire.connections import ConnectionPool, UpstreamConnection
from edge.wire.http1 import READ_STEP_BYTES
from tests.clock import Clock
from tests.profiles import examples
from tests.streams import STREAMS, chunk, cut

JSON = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
SSE = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
CHUNKED = b"transfer-encoding: chunked\r\n\r\n"
LAST = b"0\r\n\r\n"
EVENT_ENDS = (b"\n\n", b"\r\n\r\n", b"\r\r", b"\n\r\n")


def in_bytes(data: bytes) -> list[bytes]:
    return cut(data, range(1, len(data)))


@dataclass
class Transport:
    """Keeps what is written, and what is done."""

    written: list[bytes] = field(default_factory=list)
    done: list[str] = field(default_factory=list)

    def write(self, data: bytes) -> None:
        self.written.append(data)

    def writelines(self, parts: Iterable[bytes]) -> None:
        self.written += parts

    def get_write_buffer_size(self) -> int:
        return 0

    def abort(self) -> None:
        self.done.append("abort")

    def pause_reading(self) -> None:
        self.done.append("pause")

    def resume_reading(self) -> None:
        self.done.append("resume")


class Client:
    """The client's side of a connection."""

    def __init__(self, *, last: bool, bare: bool) -> None:
        self.transport = Transport()
        self.loop = asyncio.get_running_loop()
        self.attached: list[object] = []
        self.last = last
        self.bare = bare

    def attach(self, answering: object) -> None:
        self.attached.append(answering)

    def abort(self) -> None:
        self.transport.abort()

    def reset(self) -> None:
        self.transport.done.append("reset")


class Running:
    """One relay between an upstream and a client that are both played."""

    def __init__(
        self,
        *,
        reused: bool = False,
        old_client: bool = False,
        keep_alive: bool = True,
        heartbeat_s: float = 0,
        echo: str | None = None,
        metering: Metering = Metering(OPERATIONS["chat/completions"]),  # noqa: B008  # frozen
        stream: bool = False,
    ) -> None:
        self.client = Client(last=old_client or not keep_alive, bare=old_client)
        self.upstream = Transport()
        self.exchange = Exchange("req_1", "POST", 0.0, 0.0, stream=stream)
        if stream:
            self.exchange.operation = metering.operation
        self.pool = ConnectionPool(parse_url("http://10.0.0.1:8000"), None, asyncio.get_running_loop())
        self.connection = UpstreamConnection(self.pool)
        self.connection.connection_made(cast(Any, self.upstream))
        self.connection.uses = int(reused)
        # Each time it was settled: how it had ended then, and how much the client had got.
        self.settled: list[tuple[End | None, int]] = []
        body = Body(b"{}", BodyMemory(100))
        self._attempt = Attempt(
            b"head\r\n\r\n",
            (body.data,),
            len(body.data),
            metering,
            Timeouts(1.0, 60.0, 60.0, 0),
            body.release,
            heartbeat_s,
            echo,
        )
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        self.relay = Relay(self.exchange, cast(Any, self.client), self._attempt, self)
        try:
            await self.relay.send(self.connection)
        finally:
            self.relay.close()

    def note(self, usage: Usage) -> None:
        raise AssertionError("nothing goes on elsewhere")

    def settle(self, end: End, usage: Usage | None = None) -> None:
        """What a settlement does: the first end counts."""
        if self.exchange.end is None or not self.settled:
            self.exchange.ended(end)
            self.exchange.usage = usage or NO_USAGE
            self.settled.append((self.exchange.end, len(self.client.transport.written)))

    async def feed(self, *parts: bytes) -> None:
        await asyncio.sleep(0)
        for part in filter(None, parts):
            if "abort" not in self.upstream.done:  # an aborted transport reads no more
                self.connection.data_received(part)
            for _ in range(len(part) // READ_STEP_BYTES):  # a long read is taken in steps
                await asyncio.sleep(0)

    async def lose(self, *, eof: bool) -> None:
        await asyncio.sleep(0)
        if "abort" not in self.upstream.done:
            if eof:
                self.connection.eof_received()
            self.connection.connection_lost(None if eof else ConnectionResetError())

    async def end(self) -> Exception | None:
        """The relay's failure; it has to have ended."""
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        self.pool.close()
        assert self._task.done()
        return cast(Exception | None, self._task.exception())

    @property
    def ended(self) -> bool:
        return self._task.done()

    @property
    def sent(self) -> bytes:
        return b"".join(self.client.transport.written)


@dataclass
class Outcome:
    """What became of an answer."""

    failure: Exception | None
    head: bytes
    body: bytes
    exchange: Exchange
    client: list[str]
    reusable: bool
    keep_alive: bool


def relayed(parts: Sequence[bytes], *, closes: bool = False, breaks: bool = False, **options: Any) -> Outcome:
    """Relay an answer that is read in these parts, after which the connection ends in order, or not."""

    async def run() -> Outcome:
        running = Running(**options)
        await running.feed(*parts)
        if closes or breaks:
            await running.lose(eof=closes)
        reusable = bool(len(running.pool))
        failure = await running.end()
        head, _, body = running.sent.partition(b"\r\n\r\n")
        done = running.client.transport.done
        return Outcome(failure, head, body, running.exchange, done, reusable, not running.client.last)

    with closing(asyncio.new_event_loop()) as loop:
        return loop.run_until_complete(run())


def content_of(body: bytes) -> tuple[bytes, bool]:
    """The content of chunks, and whether the last chunk came; fails for what no client could read."""
    content = b""
    while body:
        line = re.match(rb"([0-9a-fA-F]+)\r\n", body)
        if line is None:
            assert re.fullmatch(rb"[0-9a-fA-F]*\r?", body), body
            break
        size, body = int(line[1], 16), body[line.end() :]
        if not size:
            assert body == b"\r\n"
            return content, True
        content += body[:size]
        assert b"\r\n".startswith(body[size : size + 2]), body
        body = body[size + 2 :]
    return content, False


# --- what is passed on

EVENTS = b'data: {"id":"1"}\n\n: ping\n\nevent: x\r\ndata: {"id":"2"}\r\n\r\ndata: [DONE]\n\n'
ANSWERS = {
    "chunks": (SSE + CHUNKED + chunk(EVENTS[:18]) + chunk(EVENTS[18:]) + LAST, EVENTS),
    "chunks across events": (SSE + CHUNKED + b"".join(map(chunk, cut(EVENTS, range(5, len(EVENTS), 5))))
                             + LAST, EVENTS),
    "extensions": (SSE + CHUNKED + b"5;a=1\r\n" + EVENTS[:5] + b"\r\n" + chunk(EVENTS[5:]) + LAST, EVENTS),
    "late extension": (SSE + CHUNKED + chunk(EVENTS[:40]) + b"%x ;a\r\n" % len(EVENTS[40:]) + EVENTS[40:]
                       + b"\r\n0;b\r\n\r\n", EVENTS),
    "trailers": (SSE + CHUNKED + chunk(EVENTS) + b"0\r\nx-a: 1\r\n\r\n", EVENTS),
    "length": (JSON + b'content-length: 8\r\n\r\n{"a": 1}', b'{"a": 1}'),
    "no length": (JSON + b"content-length: 0\r\n\r\n", b""),
    "interim": (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early\r\nlink: x\r\n\r\n" + JSON
                + b"content-length: 2\r\n\r\n{}", b"{}"),
    "close": (SSE + b"\r\n" + EVENTS, EVENTS),
    "close of JSON": (JSON + b"\r\n{}", b"{}"),
}  # fmt: skip


def check_answer(name: str, parts: Sequence[bytes], old_client: bool) -> None:
    closes = name.startswith("close")
    got = relayed(parts, closes=closes, old_client=old_client)
    assert got.failure is None
    assert got.exchange.end is End.COMPLETE
    assert got.exchange.response_bytes == len(got.head) + 4 + len(got.body)
    plain = old_client or b"\r\ncontent-length: " in got.head
    assert ((got.body, True) if plain else content_of(got.body)) == (ANSWERS[name][1], True)
    assert (b"\r\ntransfer-encoding: chunked\r\n" in got.head) == (not plain)
    assert got.reusable == (not closes)
    assert got.client == []


@pytest.mark.parametrize("old_client", [False, True])
@pytest.mark.parametrize("name", ANSWERS)
def test_answer_arrives_whole_however_it_is_read(name: str, old_client: bool) -> None:
    answer = ANSWERS[name][0]
    for parts in (in_bytes(answer), *(cut(answer, [at]) for at in range(len(answer)))):
        check_answer(name, parts, old_client)


@examples(200)
@given(st.sampled_from(sorted(ANSWERS)), st.booleans(), st.data())
def test_answer_arrives_whole_at_random_cuts(name: str, old_client: bool, data: st.DataObject) -> None:
    answer = ANSWERS[name][0]
    check_answer(name, cut(answer, data.draw(st.sets(st.integers(1, len(answer) - 1), max_size=20))), old_client)


async def test_whole_chunks_are_passed_on_as_the_same_objects() -> None:
    """The point of the relay: no copy of a token."""
    running = Running()
    events = [chunk(b"data: %d\n\n" % number) for number in range(100, 110)]
    await running.feed(SSE + CHUNKED + events[0], *events)
    assert all(passed is event for passed, event in zip(running.client.transport.written[1:], events, strict=True))
    await running.feed(LAST)
    assert await running.end() is None


# --- the head

SECRET = b"\r\n".join(
    name + b": secret"
    for name in (b"server", b"set-cookie", b"x-powered-by", b"x-request-id", b"www-authenticate", b"via", b"location",
                 b"x-ratelimit-limit-requests", b"access-control-allow-origin", b"vary", b"keep-alive", b"upgrade",
                 b"cache-control", b"strict-transport-security", b"alt-svc", b"trailer", b"x-envoy-upstream")
)  # fmt: skip


def lines_of(got: Outcome) -> list[bytes]:
    return got.head.split(b"\r\n")


def test_head_holds_what_is_allowed_and_nothing_else() -> None:
    allowed = [
        b"content-type: audio/mpeg", b"content-encoding: identity", b"content-disposition: inline",
        b"content-language: zh", b"date: Mon, 01 Jan 2024 00:00:00 GMT", b"openai-processing-ms: 7",
    ]  # fmt: skip
    head = b"\r\n".join([b"HTTP/1.1 200 Fine", SECRET, *(line.upper() for line in allowed), b"content-length: 2"])
    got = relayed([head + b"\r\n\r\n{}"])
    values = [line.partition(b": ") for line in lines_of(got)]
    assert b"secret" not in got.head
    assert lines_of(got)[0].startswith(b"HTTP/1.1 200 ")
    expected = [(name, value.upper()) for name, _, value in (line.partition(b": ") for line in allowed)]
    given_names = [name for name, _ in expected]
    assert [(name, value) for name, _, value in values if name in given_names] == expected
    ours = {b"content-length": b"2", b"x-request-id": b"req_1", b"access-control-allow-origin": b"*"}
    rest = {name: value for name, _, value in values[1:] if name not in given_names}
    assert rest.pop(b"access-control-expose-headers")
    assert rest == ours


@pytest.mark.parametrize(
    ("framing", "old_client", "keep_alive", "expected"),
    [
        (b"content-length: 2\r\n\r\n{}", False, True, {b"content-length: 2"}),
        (b"content-length: 2\r\n\r\n{}", False, False, {b"content-length: 2", b"connection: close"}),
        (CHUNKED + chunk(b"{}") + LAST, False, True, {b"transfer-encoding: chunked"}),
        (CHUNKED + chunk(b"{}") + LAST, True, True, {b"connection: close"}),
        (CHUNKED + LAST, False, True, {b"transfer-encoding: chunked"}),
        (b"\r\n: ping\n\n", False, True, {b"transfer-encoding: chunked"}),
        (b"\r\n: ping\n\n", True, True, {b"connection: close"}),
        (b"\r\n", False, True, {b"transfer-encoding: chunked"}),
    ],
)
def test_head_tells_the_framing(framing: bytes, old_client: bool, keep_alive: bool, expected: set[bytes]) -> None:
    """RFC 9112 section 6; and streams are never buffered by a proxy in front."""
    for media_type in (JSON, SSE):
        got = relayed([media_type + framing], closes=True, old_client=old_client, keep_alive=keep_alive)
        assert got.failure is None
        names = (b"content-length", b"transfer-encoding", b"connection")
        assert {line for line in lines_of(got) if line.startswith(names)} == expected
        assert got.keep_alive == (b"connection: close" not in expected)
        assert CORS.strip() in got.head
        assert b"\r\nx-request-id: req_1\r\n" in got.head
        unbuffered = [line in lines_of(got) for line in (b"cache-control: no-cache", b"x-accel-buffering: no")]
        assert unbuffered == [media_type is SSE and b"{}" not in framing] * 2


# --- streams that open with an error

OPENINGS = [
    b'data: {"error"', b'data:{"error"', b'data: {"object":"error"', b'data: {"object": "error"', b"error: {",
    b"event: error",
]  # fmt: skip


def ways_to_read(content: bytes) -> list[tuple[str, list[bytes]]]:
    """The same content in one chunk, in chunks of a byte, up to the close; read whole and in bytes."""
    answers = {
        "chunk": SSE + CHUNKED + chunk(content) + LAST,
        "chunks": SSE + CHUNKED + b"".join(chunk(content[at : at + 1]) for at in range(len(content))) + LAST,
        "close": SSE + b"\r\n" + content,
    }
    return [(name, parts) for name, answer in answers.items() for parts in ([answer], in_bytes(answer))]


@pytest.mark.parametrize("opening", OPENINGS)
def test_stream_that_only_begins_like_an_error_is_passed_on(opening: bytes) -> None:
    """The two are told apart at every length."""
    for length in range(len(opening)):
        content = opening[:length] + b"~\n\n"
        for name, parts in ways_to_read(content):
            got = relayed(parts, closes=name == "close")
            assert got.failure is None, (content, name)
            assert content_of(got.body) == (content, True), name


ERRORS = [
    (b'data: {"error": {"message": "m", "type": "t", "param": null, "code": 400}}\n\n', 400),
    (b'data: {"error":{"message":"m","code":429}}\n\ndata: [DONE]\n\n', 429),
    (b'data:{"error":{"message":"m","code":503}}\r\n\r\n', 503),
    (b'data: {"object":"error","message":"m","type":"BadRequestError","code":404}\n\n', 404),
    (b'data: {"object": "error", "message": "m", "code": 422}\n\n', 422),
    (b'error: {"code":500,"message":"m","type":"server_error"}\n\n', 500),
    (b'event: error\ndata: {"type":"error","error":{"type":"overloaded_error","message":"m"}}\n\n', 529),
    (b'event: error\ndata: {"error":{"code":413,"message":"m"}}\n\n', 413),
    (b'data: {"error":{"message":"m","code":"context_length_exceeded"}}\n\n', 502),
    (b'data: {"error":{"message":"m","code":null}}\n\n', 502),
    (b'data: {"error":{"message":"m","code":200}}\n\n', 502),
    (b'data: {"error":{"message":"m","code":600}}\n\n', 502),
    (b'data: {"error":{"message":"m","code":true}}\n\n', 502),
    (b'data: {"error":{"message":"m","code":400.0}}\n\n', 502),
    (b'data: {"error":{"message":"m","code":99999999999999999999999}}\n\n', 502),
    (b'data: {"error":"m"}\n\n', 502),
    (b'data: {"error" is no JSON\n\n', 502),
    (b"event: error\n\n", 502),
]


@pytest.mark.parametrize(("content", "status"), ERRORS)
def test_stream_that_opens_with_an_error_has_the_status_that_it_names(content: bytes, status: int) -> None:
    """No client has a byte of it yet, so it becomes an answer that every SDK understands."""
    for name, parts in ways_to_read(content):
        got = relayed(parts, closes=name == "close")
        assert isinstance(got.failure, UpstreamAnsweredError), (name, len(parts))
        assert got.failure.status == status
        assert (got.head, got.body) == (b"", b"")
        assert got.exchange.phase is Phase.WAIT
        if b'"m"' in content:
            assert b'"m"' in got.failure.body
            json.loads(got.failure.body)


@pytest.mark.parametrize("status", [302, 400, 401, 429, 500, 503])
def test_error_answer_is_handed_over_with_its_body(status: int) -> None:
    head = b"HTTP/1.1 %d Oh\r\nretry-after: 7\r\n" % status
    for framing in (b"content-length: 9\r\n\r\nno reason", CHUNKED + chunk(b"no ") + chunk(b"reason") + LAST):
        for parts in ([head + framing], in_bytes(head + framing)):
            got = relayed(parts)
            assert isinstance(got.failure, UpstreamAnsweredError)
            assert (got.failure.status, got.failure.body) == (status, b"no reason")
            assert got.failure.headers[b"retry-after"] == b"7"
            assert (got.head, got.reusable) == (b"", True)


def test_error_answer_without_end_is_bounded() -> None:
    got = relayed([b"HTTP/1.1 500 Oh\r\n" + CHUNKED, *[chunk(b"x" * 10_000)] * 1000])
    assert isinstance(got.failure, UpstreamAnsweredError)
    assert 64 * 1024 <= len(got.failure.body) <= 80 * 1024
    assert not got.reusable


# --- answers that break off

PIECES = [
    b"data: a\n\n",
    b": ping\n\n",
    b"data: b\r\n\r\n",
    b"data: c\r\r",
    b"event: d\ndata: e\n\n",
    b"data: [DONE]\n\n",
]
RUBBISH = [b"zz\r\n", b"-1\r\n", b"5", b"", b"\r\n", b"0\r\nno trailer\r\n\r\n"]


@examples(600)
@given(st.data())
def test_broken_stream_never_looks_complete(data: st.DataObject) -> None:
    """What the client got is the beginning of what was sent; an error event stands only between events and chunks."""
    content = b"".join(data.draw(st.lists(st.sampled_from(PIECES), min_size=1, max_size=5)))
    ends = sorted(data.draw(st.sets(st.integers(1, len(content)), min_size=1, max_size=8)))
    content = content[: ends[-1]]
    body = b"".join(map(chunk, cut(content, ends[:-1])))
    rubbish = data.draw(st.sampled_from(RUBBISH))
    if not rubbish:
        body = body[: data.draw(st.integers(1, len(body)))]
    head = SSE + CHUNKED
    positions = data.draw(st.sets(st.integers(1, len(head + body + rubbish) - 1), max_size=12))
    old_client = data.draw(st.booleans())
    eof = data.draw(st.booleans())
    got = relayed(cut(head + body + rubbish, positions), closes=eof, breaks=not eof, old_client=old_client)
    if got.failure is not None:
        assert isinstance(got.failure, UpstreamError)
        assert not got.head
        return
    passed, complete = (got.body, "reset" not in got.client) if old_client else content_of(got.body)
    if got.exchange.end is End.COMPLETE:  # it broke behind the event that ends it
        assert passed.replace(b": ping", b"").rstrip().endswith(b"data: [DONE]")
        assert content.startswith(passed)
        return
    assert got.exchange.end is End.UPSTREAM_CUT
    if not complete:
        assert content.startswith(passed)
        assert not got.keep_alive
        return
    before, _, frame = passed.rpartition(b"data: ")
    assert json.loads(frame)["error"]["code"] == "upstream_disconnected"
    assert content.startswith(before)
    assert before.endswith(EVENT_ENDS)


@pytest.mark.parametrize(
    "begun", [b"", b"HTTP", JSON + CHUNKED, SSE + CHUNKED, SSE + CHUNKED + b"4\r\ndata", SSE + b"\r\n"]
)
def test_connection_that_ends_before_an_answer_is_stale_only_if_it_was_reused_and_silent(begun: bytes) -> None:
    for reused, eof in product((False, True), repeat=2):
        got = relayed([begun], closes=eof, breaks=not eof, reused=reused)
        if begun.endswith(b"utf-8\r\n\r\n") and eof:
            assert (got.failure, got.exchange.end) == (None, End.COMPLETE)  # an empty body that the close ends
        else:
            assert type(got.failure) is (StaleConnection if reused and not begun else UpstreamError)
            assert got.head == b""


# --- the client, the clock, the drain


def played(parts: Sequence[bytes], act: str) -> tuple[Running, bool, Exception | None]:
    """Relay these parts, then call a method of the relay; whether it had ended in that call, and its failure."""

    async def run() -> tuple[Running, bool, Exception | None]:
        running = Running()
        await running.feed(*parts)
        getattr(running.relay, act)()
        aborted = "abort" in running.upstream.done
        if act == "client_gone":  # aiohttp then cancels who waits
            running._task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running._task
            return running, aborted, None
        return running, aborted, await running.end()

    with closing(asyncio.new_event_loop()) as loop:
        return loop.run_until_complete(run())


@pytest.mark.parametrize("parts", [[], [SSE + CHUNKED], [SSE + CHUNKED + chunk(b"data: 1\n\n")]])
def test_client_that_leaves_ends_the_upstream_in_the_same_call(parts: list[bytes]) -> None:
    running, aborted, _ = played(parts, "client_gone")
    assert aborted
    assert running.exchange.end is End.CLIENT_GONE
    assert running.exchange.response_bytes == len(running.sent)
    assert running.client.attached[-1] is None


@pytest.mark.parametrize(("act", "kind", "end"), [
    ("cut", UpstreamUnavailable, End.DRAINED),
    ("overdue", UpstreamTimeout, End.FIRST_BYTE_TIMEOUT),
])  # fmt: skip
def test_answer_that_has_not_begun_fails_when_it_is_cut(act: str, kind: type[EdgeError], end: End) -> None:
    for parts in ([], [b"HTTP/1.1 2"], [SSE + CHUNKED], [SSE + CHUNKED + b"5\r\ndata:"]):
        running, aborted, failure = played(parts, act)
        assert isinstance(failure, kind)
        assert aborted
        assert (running.exchange.end, running.sent) == (end, b"")


def test_stream_that_is_cut_by_the_drain_says_so() -> None:
    running, aborted, failure = played([SSE + CHUNKED + chunk(b"data: 1\n\n")], "cut")
    assert (failure, aborted, running.exchange.end) == (None, True, End.DRAINED)
    content, complete = content_of(running.sent.partition(b"\r\n\r\n")[2])
    assert complete
    assert json.loads(content.removeprefix(b"data: 1\n\ndata: "))["error"]["code"] == "upstream_disconnected"


async def test_full_client_stops_the_reading_and_holds_the_end_until_it_has_room() -> None:
    """So that one that never reads again is noticed while its request still counts."""
    running = Running()
    await running.feed(SSE + CHUNKED + chunk(b"data: 1\n\n"))
    running.relay.client_paused()
    running.relay.client_paused()  # as it is attached anew: it is watched once
    assert running.upstream.done == ["pause"]
    running.relay.client_resumed()
    assert running.upstream.done == ["pause", "resume"]
    running.relay.client_paused()
    await running.feed(LAST)
    for _ in range(3):
        await asyncio.sleep(0)
    assert not running.ended
    running.relay.client_resumed()
    assert await running.end() is None
    assert running.exchange.end is End.COMPLETE


# --- model_echo

SHORT = sorted(name for name, stream in STREAMS.items() if len(stream) < 4096)
NEW = "public/new"


def echoed(stream: bytes) -> bytes:
    """What `edge.echo` makes of a stream; its own tests show that this is right."""
    echo = EventEcho(NEW)
    return echo.feed(stream) + echo.close()


def framings(head: bytes, content: bytes) -> dict[str, bytes]:
    pieces = b"".join(map(chunk, cut(content, range(50, len(content), 50))))
    return {
        "chunks": head + CHUNKED + pieces + LAST,
        "extensions": head + CHUNKED + b"%x;a=b\r\n%b\r\n0\r\nx: y\r\n\r\n" % (len(content), content),
        "length": head + b"content-length: %d\r\n\r\n" % len(content) + content,
        "close": head + b"\r\n" + content,
    }


def check_echo(name: str, framing: str, parts: Sequence[bytes], old_client: bool) -> None:
    got = relayed(parts, closes=framing == "close", old_client=old_client, echo=NEW)
    assert (got.failure, got.exchange.end) == (None, End.COMPLETE)
    body = (got.body, True) if old_client else content_of(got.body)
    assert body == (echoed(STREAMS[name]), True)
    assert b"content-length" not in got.head
    assert got.keep_alive == (not old_client)
    assert got.reusable == (framing != "close")


@pytest.mark.parametrize("framing", ["chunks", "extensions", "length", "close"])
def test_stream_is_echoed_in_every_framing_whole_and_in_single_bytes(framing: str) -> None:
    for name, old_client in product(SHORT, (False, True)):
        answer = framings(SSE, STREAMS[name])[framing]
        check_echo(name, framing, [answer], old_client)
        check_echo(name, framing, in_bytes(answer), old_client)


@examples(200)
@given(st.data())
def test_stream_is_echoed_at_random_cuts(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(STREAMS)))
    framing, answer = data.draw(st.sampled_from(sorted(framings(SSE, STREAMS[name]).items())))
    positions = data.draw(st.sets(st.integers(1, len(answer) - 1), max_size=20))
    check_echo(name, framing, cut(answer, positions), data.draw(st.booleans()))


@pytest.mark.parametrize(("name", "eof"), [("vllm", False), ("messages", True)])
def test_echoed_stream_that_breaks_gives_whole_events_and_says_so(name: str, eof: bool) -> None:
    """What is held of an event is dropped, so an event of ours can stand wherever the upstream broke off."""
    for framing, answer in framings(SSE, STREAMS[name]).items():
        begins = answer.index(b"\r\n\r\n") + 4
        ends = {len(answer) - len(STREAMS[name]) + end.end() for end in re.finditer(rb"\n\n", STREAMS[name])}
        for count in range(begins + 20, len(answer)):
            got = relayed([answer[:count]], closes=eof, breaks=not eof, echo=NEW)
            if framing == "close" and eof and count in ends:
                assert got.exchange.end is End.COMPLETE  # there, as ever, nothing tells the two apart
                continue
            if got.exchange.end is End.COMPLETE:  # it broke behind the event that ends it
                assert content_of(got.body) == (echoed(STREAMS[name]), True)
                continue
            assert (got.failure, got.exchange.end) == (None, End.UPSTREAM_CUT)
            content, complete = content_of(got.body)
            before, _, frame = content.rpartition(b"data: ")
            assert complete
            assert json.loads(frame)["error"]["code"] == "upstream_disconnected"
            assert echoed(STREAMS[name]).startswith(before)
            assert before.endswith(EVENT_ENDS) or not before


DOCUMENT = b'{"id":"1","model":"m","choices":[{"message":{"model":"x"}}]}'
CHANGED = b'{"id":"1","model":"public/new","choices":[{"message":{"model":"x"}}]}'


@pytest.mark.parametrize("framing", ["chunks", "extensions", "length", "close"])
def test_json_answer_is_echoed_with_its_new_length(framing: str) -> None:
    answer = framings(JSON, DOCUMENT)[framing]
    ways = ([answer], in_bytes(answer), *(cut(answer, [at]) for at in range(1, len(answer))))
    for parts, old_client in product(ways, (False, True)):
        got = relayed(parts, closes=framing == "close", old_client=old_client, echo=NEW)
        assert (got.failure, got.exchange.end, got.body) == (None, End.COMPLETE, CHANGED)
        assert b"content-length: %d" % len(CHANGED) in lines_of(got)
        assert b"transfer-encoding" not in got.head
        assert got.keep_alive == (not old_client)
        assert got.exchange.first_byte
        assert got.exchange.response_bytes == len(got.head) + 4 + len(got.body)


def test_json_answer_that_breaks_while_it_is_held_is_a_status() -> None:
    for framing in ("chunks", "length"):
        answer = framings(JSON, DOCUMENT)[framing]
        got = relayed([answer[:-7]], breaks=True, echo=NEW)
        assert isinstance(got.failure, UpstreamError)
        assert (got.head, got.exchange.first_byte) == (b"", 0.0)
    got = relayed([JSON + CHUNKED + b"zz\r\n"], echo=NEW)
    assert isinstance(got.failure, UpstreamError)


@pytest.mark.parametrize(
    ("framing", "size"),
    [("chunks", MAX_JSON_BYTES - 100), *((each, MAX_JSON_BYTES + 100) for each in ("chunks", "length", "close"))],
)
def test_json_answer_over_the_bound_passes_as_it_is(framing: str, size: int) -> None:
    document = DOCUMENT[:-1] + b',"x":"%b"}' % (b"x" * size)
    answers = {
        "chunks": JSON + CHUNKED + b"".join(map(chunk, cut(document, range(60000, len(document), 60000)))) + LAST,
        "length": JSON + b"content-length: %d\r\n\r\n" % len(document) + document,
        "close": JSON + b"\r\n" + document,
    }
    answer = answers[framing]
    got = relayed(cut(answer, range(65536, len(answer), 65536)), closes=framing == "close", echo=NEW)
    assert (got.failure, got.exchange.end) == (None, End.COMPLETE)
    if size < MAX_JSON_BYTES:
        assert got.body == document.replace(DOCUMENT[:-1], CHANGED[:-1])
    elif framing == "length":
        assert got.body == document
    else:
        assert content_of(got.body) == (document, True)


@pytest.mark.parametrize("content", [
    SSE + b"content-encoding: gzip\r\n" + CHUNKED + chunk(b'data: {"model":"m"}\n\n') + LAST,
    JSON + b"content-encoding: br\r\n" + CHUNKED + chunk(DOCUMENT) + LAST,
    b"HTTP/1.1 200 OK\r\ncontent-type: audio/mpeg\r\n" + CHUNKED + chunk(DOCUMENT) + LAST,
    b"HTTP/1.1 204 No Content\r\ncontent-type: application/json\r\n\r\n",
])  # fmt: skip
def test_what_cannot_be_read_is_never_touched(content: bytes) -> None:
    got = relayed([content], echo=NEW, heartbeat_s=1)
    assert got.failure is None
    assert got.body == content.partition(b"\r\n\r\n")[2]


# --- heartbeat

BEAT = b": keep-alive\n\n"
HEARTBEAT_S = 15.0


def beating(
    act: Callable[[Running, Clock], Awaitable[None]], heartbeat_s: float = HEARTBEAT_S, **options: Any
) -> Running:
    """A relay of a route with heartbeats, after `act`."""

    async def run(clock: Clock) -> Running:
        running = Running(heartbeat_s=heartbeat_s, **options)
        await running.feed()
        await act(running, clock)
        if not running.ended:
            running.relay.client_gone()
        running._task.cancel()
        await asyncio.wait([running._task])
        running.pool.close()
        return running

    with closing(Clock()) as clock:
        return clock.run_until_complete(run(clock))


def body_of(running: Running) -> bytes:
    return running.sent.partition(b"\r\n\r\n")[2]


@pytest.mark.parametrize(
    ("begun", "reused"),
    [
        (b"", False),
        (b"", True),
        (b"HTTP/1.1 2", True),
        (SSE + CHUNKED, False),
        (SSE + CHUNKED + b"12\r\ndata: {", True),
    ],
)
def test_silent_upstream_gets_its_client_a_heartbeat_each_interval(begun: bytes, reused: bool) -> None:
    """In a chunk of its own; whatever comes then follows without a second head, each chunk as the same object."""
    event = chunk(b"data: 1\n\n")

    async def act(running: Running, clock: Clock) -> None:
        await running.feed(begun)
        await clock.pass_time(HEARTBEAT_S - 1)
        assert running.sent == b""
        await clock.pass_time(1 + HEARTBEAT_S / 4)
        head, _, body = running.sent.partition(b"\r\n\r\n")
        lines = head.split(b"\r\n")
        assert lines[0] == b"HTTP/1.1 200 OK"
        assert {b"transfer-encoding: chunked", b"x-request-id: req_1", b"x-accel-buffering: no"} < set(lines)
        assert b"content-type: text/event-stream; charset=utf-8" in lines
        assert body == chunk(BEAT)
        assert running.exchange.phase is Phase.STREAM
        assert not running.exchange.first_byte
        for _ in range(2):
            await clock.pass_time(HEARTBEAT_S * 1.25 + 0.25)
        assert body_of(running) == chunk(BEAT) * 3
        await running.feed((SSE + CHUNKED + chunk(b'data: {"id":1}  \n\n'))[len(begun) :], event, event)
        assert running.client.transport.written[-1] is event
        assert running.exchange.first_byte
        await running.feed(LAST)
        assert await running.end() is None
        assert not running.client.last

    running = beating(act, reused=reused)
    assert content_of(body_of(running)) == (BEAT * 3 + b'data: {"id":1}  \n\n' + b"data: 1\n\n" * 2, True)
    assert (running.exchange.status, running.exchange.end) == (200, End.COMPLETE)


# Every two values of the three meet.
@pytest.mark.parametrize(("framing", "old_client", "echo"), [
    ("chunks", False, None), ("chunks", True, NEW), ("length", False, NEW), ("length", True, None),
    ("close", False, None), ("close", True, NEW),
])  # fmt: skip
def test_heartbeats_stand_between_events_and_never_inside_one(framing: str, old_client: bool, echo: str | None) -> None:
    stream = STREAMS["vllm"]
    events = [each + b"\n\n" for each in stream.split(b"\n\n")[:-1]]
    half = len(events[1]) // 2
    pieces = [events[0], events[1][:half], events[1][half:], b"".join(events[2:])]
    framed = list(map(chunk, pieces)) if framing == "chunks" else pieces
    head = {"chunks": CHUNKED, "length": b"content-length: %d\r\n\r\n" % len(stream), "close": b"\r\n"}[framing]

    async def act(running: Running, clock: Clock) -> None:
        await running.feed(SSE + head)
        for piece in framed:
            await running.feed(piece)
            await clock.pass_time(HEARTBEAT_S * 1.25 + 0.25)
        if framing == "chunks":
            await running.feed(LAST)
        elif framing == "close":
            await running.lose(eof=True)
        assert await running.end() is None

    running = beating(act, old_client=old_client, echo=echo)
    content, complete = (body_of(running), True) if old_client else content_of(body_of(running))
    whole = echoed(stream) if echo else stream
    assert complete
    assert content.replace(BEAT, b"") == whole
    assert content.startswith((echoed(events[0]) if echo else events[0]) + BEAT)
    # Inside an event there is room only for who holds its first half.
    between = content.count(BEAT)
    last = 0 if framing == "length" else 1  # it ended with its last byte
    assert between == 2 + last + (echo is not None)
    assert running.exchange.end is End.COMPLETE


def test_bytes_put_the_heartbeat_off_and_a_full_client_gets_none() -> None:
    async def act(running: Running, clock: Clock) -> None:
        await running.feed(SSE + CHUNKED)
        for _ in range(5):
            await running.feed(chunk(b"data: 1\n\n"))
            await clock.pass_time(HEARTBEAT_S - 4)
        assert BEAT not in running.sent
        running.relay.client_paused()
        await clock.pass_time(3 * HEARTBEAT_S)
        assert BEAT not in running.sent
        running.relay.client_resumed()
        await clock.pass_time(HEARTBEAT_S * 1.25)
        assert running.sent.count(BEAT) == 1

    beating(act)


@pytest.mark.parametrize(
    ("framing", "heartbeat_s"), [(CHUNKED, 1), (b"\r\n", 1), (CHUNKED, HEARTBEAT_S), (b"\r\n", 50), (CHUNKED, 200)]
)
def test_heartbeats_neither_shorten_nor_lengthen_the_idle_timeout(framing: bytes, heartbeat_s: float) -> None:
    """It is 60 s, and up to a quarter more."""
    event = b"data: 1\n\n"

    async def act(running: Running, clock: Clock) -> None:
        await running.feed(SSE + framing)
        for _ in range(10):
            await running.feed(chunk(event) if framing == CHUNKED else event)
            await clock.pass_time(40)
        assert running.exchange.end is None
        await clock.pass_time(19)
        assert running.exchange.end is None
        await clock.pass_time(1 + 15 + 1)
        assert await running.end() is None

    running = beating(act, heartbeat_s)
    assert running.exchange.end is End.IDLE_TIMEOUT
    assert (BEAT in running.sent) == (heartbeat_s < 60)


@pytest.mark.parametrize("begun", [
    JSON + CHUNKED + b"2\r\n{", b"HTTP/1.1 500 Oh\r\n" + CHUNKED, SSE + b"content-encoding: gzip\r\n" + CHUNKED,
    SSE + CHUNKED + chunk(b"data: 1\n"), SSE + CHUNKED + b"b\r\ndata: 1\n\n",
])  # fmt: skip
def test_no_heartbeat_stands_in_what_is_no_stream_or_no_place_for_one(begun: bytes) -> None:
    async def act(running: Running, clock: Clock) -> None:
        await running.feed(begun)
        before = running.sent
        await clock.pass_time(3 * HEARTBEAT_S)
        assert running.sent == before

    beating(act)


FAILURES: dict[str, tuple[bytes, str, str, End]] = {
    "error answer": (b"HTTP/1.1 400 Oh\r\ncontent-length: 25\r\n\r\n" + b'{"error":{"message":"m"}}', "feed",
                     "invalid_request_error", End.UPSTREAM_ERROR),
    "error event": (SSE + CHUNKED + chunk(b'data: {"error":{"message":"m","code":400}}\n\n'), "feed",
                    "invalid_request_error", End.UPSTREAM_ERROR),
    "no stream": (JSON + b"content-length: 2\r\n\r\n{}", "feed", "upstream_error", End.UPSTREAM_ERROR),
    "encoded": (SSE + b"content-encoding: gzip\r\n" + CHUNKED, "feed", "upstream_error", End.UPSTREAM_ERROR),
    "empty": (b"HTTP/1.1 204 No\r\n\r\n", "feed", "upstream_error", End.UPSTREAM_ERROR),
    "no HTTP": (b"SSH-2.0\r\n", "feed", "upstream_error", End.UPSTREAM_ERROR),
    "loss": (b"", "lose", "upstream_error", End.UPSTREAM_ERROR),
    "loss after the head": (SSE + CHUNKED, "lose", "upstream_error", End.UPSTREAM_ERROR),
    "silence": (b"", "overdue", "upstream_timeout", End.FIRST_BYTE_TIMEOUT),
    "drain": (SSE + CHUNKED, "cut", "upstream_unavailable", End.DRAINED),
}  # fmt: skip


# An old client gets the same events without chunks, wherever they come from: one from each way of failing.
@pytest.mark.parametrize(
    ("name", "old_client"),
    [*((name, False) for name in FAILURES), *((name, True) for name in ("error event", "loss", "silence", "drain"))],
)
def test_failure_after_a_heartbeat_is_an_event_and_no_retry(name: str, old_client: bool) -> None:
    """The client has status 200, so an event is the one way to tell; and what is raised says that nobody else may."""
    said, happens, code, end = FAILURES[name]

    async def act(running: Running, clock: Clock) -> None:
        await clock.pass_time(HEARTBEAT_S * 1.25)
        await running.feed(said)
        if happens == "lose":
            await running.lose(eof=False)
        elif happens != "feed":
            getattr(running.relay, happens)()
        failure = await running.end()
        assert isinstance(failure, FailedInStream)
        assert isinstance(failure.error, UpstreamAnsweredError if said.startswith(b"HTTP/1.1 4") else Exception)
        assert running.client.last == old_client

    running = beating(act, old_client=old_client, reused=True)
    content, complete = (body_of(running), True) if old_client else content_of(body_of(running))
    assert complete
    beat, event = content[: len(BEAT)], content[len(BEAT) :]
    assert (beat, event[-2:]) == (BEAT, b"\n\n")
    assert json.loads(event.removeprefix(b"data: "))["error"]["code"] == code
    assert (running.exchange.status, running.exchange.end, running.exchange.error) == (200, end, code)
    assert running.exchange.response_bytes == len(running.sent)
    assert "reset" not in running.client.transport.done


def test_each_event_of_a_chunk_counts_however_many_it_has() -> None:
    """A hop in front of the upstream may join them; what ends like one token is not one for that."""

    def token(text: str) -> bytes:
        return b'data: {"choices":[{"index":0,"delta":{"content":"%b"},"finish_reason":null}]}\n\n' % text.encode()

    chunks = [chunk(token("a") * count) for count in (1, 3, 3, 1, 1, 2, 3)]
    got = relayed([SSE + CHUNKED + chunks[0], *chunks[1:]], breaks=True)
    assert got.exchange.usage.completion_tokens == 14


def test_usage_in_a_chunk_with_a_token_is_hidden_each_time() -> None:
    usage = b'data: {"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":2}}\n\n'
    token = b'data: {"choices":[{"index":0,"delta":{"content":"a"},"finish_reason":null}]}\n\n'
    both = chunk(usage + token)
    metering = Metering(OPERATIONS["chat/completions"], hide_usage=True)
    got = relayed([SSE + CHUNKED + chunk(token), both, both, both, LAST], metering=metering)
    assert content_of(got.body) == (token * 4, True)


def test_malformed_beginning_after_a_heartbeat_is_a_broken_stream() -> None:
    async def act(running: Running, clock: Clock) -> None:
        await clock.pass_time(HEARTBEAT_S * 1.25)
        await running.feed(SSE + CHUNKED + b"zz\r\n")
        assert await running.end() is None

    running = beating(act)
    content, complete = content_of(body_of(running))
    assert complete
    assert json.loads(content.removeprefix(BEAT + b"data: "))["error"]["code"] == "upstream_disconnected"
    assert running.exchange.end is End.UPSTREAM_CUT


@pytest.mark.parametrize("parts", [[JSON + b"content-length: 2\r\n\r\n{}"], [SSE + CHUNKED, chunk(EVENTS), LAST]])
def test_answer_that_is_over_is_freed_without_the_collector(parts: list[bytes]) -> None:
    """A circle of references for each request would be the collector's work, and memory until then."""
    relayed(parts, heartbeat_s=60)
    gc.collect()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        relayed(parts, heartbeat_s=60)
        gc.collect()
        assert [each for each in gc.garbage if isinstance(each, Answer | Silence | Heartbeat)] == []
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
