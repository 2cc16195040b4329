"""What an answer is, where its content type does not say so, or says what cannot be right."""

import json
from typing import Any

import pytest

from edge.errors import UpstreamError
from edge.exchange import End, UsageSource
from edge.metering.meters import Metering
from edge.operations import OPERATIONS
from edge.relay.heads import Beginning, Opening
from edge.relay.terms import FailedInStream, UpstreamAnsweredError
from edge.wire.http1 import Chunked
from tests.relay.test_relay import CHUNKED, LAST, Outcome, Running, content_of, in_bytes, relayed
from tests.streams import chunk

HIDING = Metering(OPERATIONS["chat/completions"], hide_usage=True, prompt_estimate=9)
TOKEN = b'data: {"choices":[{"index":0,"delta":{"content":"a"},"finish_reason":null}]}\n\n'
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":200}}\n\n'
DONE = b"data: [DONE]\n\n"
STREAM = TOKEN + TOKEN + USAGE + DONE
SHOWN = TOKEN + TOKEN + DONE
DOCUMENT = json.dumps({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 1}}).encode()
UNSAID = [
    b"",
    b"content-type: text/plain; charset=utf-8\r\n",
    b"content-type: application/octet-stream\r\n",
    b"content-type: application/json, text/event-stream; charset=utf-8\r\n",
]
STREAM_TYPES = [b"text/event-stream", b"Text/Event-Stream;Charset=UTF-8", b"TEXT/EVENT-STREAM ; x=1"]


def head(line: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\n" + line


def answered(line: bytes, content: bytes, **options: Any) -> list[Outcome]:
    """What becomes of the same content: in one chunk, in chunks of a byte, up to the close; read whole and in bytes."""
    bodies = [
        CHUNKED + chunk(content) + LAST,
        CHUNKED + b"".join(chunk(content[at : at + 1]) for at in range(len(content))) + LAST,
        b"\r\n" + content,
    ]
    return [
        relayed(parts, closes=body is bodies[2], **{"metering": HIDING, "stream": True, **options})
        for body in bodies
        for parts in ([head(line) + body], in_bytes(head(line) + body))
    ]


@pytest.mark.parametrize("line", [*UNSAID, *(b"content-type: %b\r\n" % each for each in STREAM_TYPES)])
def test_first_bytes_make_a_stream_where_one_was_asked_for(line: bytes) -> None:
    for opening in (b"", b": ping\n\n", b"\n", b"event: message\n"):
        for got in answered(line, opening + STREAM):
            assert got.failure is None
            assert content_of(got.body) == (opening + SHOWN, True)
            usage = got.exchange.usage
            assert (usage.prompt_tokens, usage.completion_tokens, usage.source) == (7, 200, UsageSource.FINAL)
            assert b"x-accel-buffering: no" in got.head


@pytest.mark.parametrize(
    "line", [*UNSAID, b"content-type: text/event-stream\r\n", b"content-type: application/json\r\n"]
)
def test_json_is_a_document_whatever_its_type_and_whatever_was_asked(line: bytes) -> None:
    for got in answered(line, DOCUMENT):
        assert got.failure is None
        assert content_of(got.body) == (DOCUMENT, True)
        usage = got.exchange.usage
        assert (usage.prompt_tokens, usage.completion_tokens, usage.source) == (3, 1, UsageSource.FINAL)
        assert b"x-accel-buffering" not in got.head


@pytest.mark.parametrize("kind", [b"application/json", b"Application/JSON; charset=utf-8", b"application/problem+json"])
def test_answer_that_is_said_to_be_json_stays_a_document(kind: bytes) -> None:
    for got in answered(b"content-type: %b\r\n" % kind, STREAM):
        assert content_of(got.body) == (STREAM, True)
        assert got.exchange.usage.source is UsageSource.ESTIMATED


@pytest.mark.parametrize("line", UNSAID)
def test_nothing_is_looked_for_where_no_stream_was_asked_for_or_the_content_is_encoded(line: bytes) -> None:
    for got in (*answered(line, STREAM, stream=False), *answered(line + b"content-encoding: gzip\r\n", STREAM)):
        assert got.failure is None
        assert content_of(got.body) == (STREAM, True)


@pytest.mark.parametrize("line", UNSAID)
def test_error_that_opens_a_stream_of_no_type_has_its_status(line: bytes) -> None:
    for got in answered(line, b'data: {"error":{"message":"m","code":429}}\n\n'):
        assert isinstance(got.failure, UpstreamAnsweredError)
        assert (got.failure.status, got.head) == (429, b"")


@pytest.mark.parametrize("line", UNSAID)
def test_stream_of_no_type_and_no_event_is_a_failure(line: bytes) -> None:
    got = relayed([head(line) + CHUNKED + LAST], metering=HIDING, stream=True)
    assert isinstance(got.failure, UpstreamError)


async def heartbeat_before(answer: list[bytes]) -> tuple[Running, Exception | None]:
    running = Running(metering=HIDING, stream=True)
    await running.feed()
    running.relay._answer.beat()
    await running.feed(*answer)
    return running, await running.end()


@pytest.mark.parametrize("line", UNSAID)
async def test_answer_behind_a_heartbeat_has_to_be_a_stream(line: bytes) -> None:
    running, failure = await heartbeat_before(in_bytes(head(line) + CHUNKED + chunk(STREAM) + LAST))
    assert failure is None
    assert running.exchange.end is End.COMPLETE
    assert content_of(running.sent.partition(b"\r\n\r\n")[2]) == (b": keep-alive\n\n" + SHOWN, True)
    running, failure = await heartbeat_before(in_bytes(head(line) + CHUNKED + chunk(DOCUMENT) + LAST))
    assert isinstance(failure, FailedInStream)
    content, whole = content_of(running.sent.partition(b"\r\n\r\n")[2])
    assert whole
    assert b"did not answer with a stream" in content


async def test_heartbeat_goes_out_between_head_and_body_of_no_type_only_behind_another() -> None:
    """Before the first, the answer may still become a document."""
    for beaten in (False, True):
        running = Running(metering=HIDING, stream=True)
        await running.feed()
        if beaten:
            running.relay._answer.beat()
        await running.feed(head(b"") + CHUNKED)
        assert running.relay._answer.may_beat() is beaten
        await running.lose(eof=False)
        await running.end()


def test_first_bytes_are_looked_at_once_however_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    scanned = []
    scan = Chunked.scan

    def counted(self: Chunked, data: bytes, payload: list[bytes], plain: bool = False) -> int:
        scanned.append(len(data))
        return scan(self, data, payload, plain)

    monkeypatch.setattr(Chunked, "scan", counted)
    blank = chunk(b"\n") * 1000
    for step in (1, 100, len(blank)):
        beginning = Beginning(Chunked(), None)
        scanned.clear()
        openings = {beginning.opening(blank[:at]) for at in range(step, len(blank) + 1, step)}
        assert openings == {Opening.UNCERTAIN}
        assert sum(scanned) < 4 * len(blank)
        assert beginning.opening(blank + chunk(TOKEN) * 1000) is Opening.EVENTS
        assert scanned[-1] < 5000, "no more than tells it"


@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_error_in_many_pieces_is_handed_over_whole(framing: str) -> None:
    error = json.dumps({"error": {"message": "x" * 20_000}}).encode()
    pieces = b"".join(chunk(error[at : at + 1]) for at in range(len(error))) + LAST
    body = b"content-length: %d\r\n\r\n%b" % (len(error), error) if framing == "length" else CHUNKED + pieces
    got = relayed([b"HTTP/1.1 400 Bad Request\r\n" + body])
    assert isinstance(got.failure, UpstreamAnsweredError)
    assert got.failure.body == error
