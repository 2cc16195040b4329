"""The check of what comes back."""

import pytest

from loadtest.answer import Answer, Kept, refusal
from loadtest.dialects import DIALECTS
from loadtest.upstream import DONE, event, usage_event
from tests.streams import STREAMS

CONTENT = b'data: {"choices":[{"delta":{"content":"a"}}]}'
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":5,"completion_tokens":7}}'


def told(*events: bytes, exact: int | None = None) -> Answer:
    answer = Answer(stream=True, exact=exact)
    for number, each in enumerate(events):
        answer.event(each, float(number))
    answer.end()
    return answer


def test_a_whole_stream_is_right_and_tells_its_times_and_usage() -> None:
    answer = told(CONTENT, b": ping", CONTENT, USAGE, DONE)
    assert answer.problem == ""
    assert answer.content_times == [0.0, 2.0]
    assert (answer.input_tokens, answer.output_tokens) == (5, 7)


def test_without_usage_events_with_content_are_counted() -> None:
    assert told(CONTENT, CONTENT, DONE).output_tokens == 2


@pytest.mark.parametrize(
    "events",
    [
        [CONTENT, b"data:[DONE]"],
        [CONTENT, b"event: done\ndata: [DONE]"],
        [CONTENT, b"\nid: 6\r\ndata: [DONE]"],
        [CONTENT, DONE, b": bye"],
        [CONTENT.replace(b'"choices"', b'"error":null,"choices"'), DONE],
    ],
)
def test_whatever_a_server_may_write_is_a_whole_stream(events: list[bytes]) -> None:
    answer = told(*events)
    assert answer.problem == ""
    assert answer.output_tokens == 1


@pytest.mark.parametrize("usage", [b"[1]", b'{"completion_tokens":null,"prompt_tokens":"x"}', b"7", b"null"])
def test_usage_without_sense_is_none(usage: bytes) -> None:
    answer = told(CONTENT, b'data: {"choices":[],"usage":%b}' % usage, DONE)
    assert (answer.problem, answer.input_tokens, answer.output_tokens) == ("", 0, 1)
    whole = Answer(stream=False)
    whole.body(b'{"choices":[{}],"error":null,"usage":%b}' % usage)
    assert (whole.end(), whole.input_tokens, whole.output_tokens) == ("", 0, 0)


def test_a_comment_is_no_sign_of_life() -> None:
    answer = Answer(stream=True)
    answer.event(CONTENT, 1.0)
    answer.event(b": ping", 2.0)
    assert answer.last_at == 1.0


def test_events_of_several_lines_and_of_other_fields_are_understood() -> None:
    several = b'event: chunk\r\nid: 1\r\ndata:{"choices":\r\ndata: [{"text":"a"}]}'
    answer = told(several, DONE)
    assert answer.problem == ""
    assert len(answer.content_times) == 1


@pytest.mark.parametrize(
    ("delta", "is_content"),
    [
        (b'{"role":"assistant","content":""}', False),
        (b'{"role":"assistant","content":null,"reasoning_content":null}', False),
        (b"{}", False),
        (b'{"content":"a"}', True),
        (b'{"content":"","reasoning_content":"a"}', True),
        (b'{"reasoning":"a"}', True),
        (b'{"refusal":"a"}', True),
        (b'{"tool_calls":[{"index":0}]}', True),
    ],
)
def test_a_frame_with_a_role_and_no_text_is_an_event_and_no_content(delta: bytes, is_content: bool) -> None:
    answer = told(b'data: {"choices":[{"delta":%b}]}' % delta, CONTENT, DONE)
    assert answer.problem == ""
    assert answer.choice_times == [0.0, 1.0]
    assert answer.content_times == ([0.0, 1.0] if is_content else [1.0])


def test_usage_says_how_many_tokens_there_are_and_events_do_where_there_is_none() -> None:
    assert told(CONTENT, USAGE, DONE).is_counted
    assert not told(CONTENT, DONE).is_counted


@pytest.mark.parametrize(
    ("events", "problem"),
    [
        ([CONTENT], "a stream without [DONE]"),
        ([DONE], "a stream without content"),
        ([CONTENT, DONE, CONTENT], "an event after [DONE]"),
        ([b"data: {", DONE], "an event whose data is no JSON"),
        ([b"data: \xff", DONE], "an event whose data is no JSON"),
        ([b"data: 1", DONE], "an event whose data is no JSON object"),
        ([b"HTTP/1.1 200 OK", DONE], "a line that belongs to no event"),
        ([CONTENT, b'data: {"error":{"message":"x"}}', DONE], "an error inside the stream"),
        ([CONTENT, b'data: {"object":"error"}', DONE], "an error inside the stream"),
    ],
)
def test_what_is_wrong_with_a_stream_is_named(events: list[bytes], problem: str) -> None:
    assert told(*events).problem == problem


EXACT = [event(number, 123)[:-2] for number in range(3)]
END = [usage_event(3)[:-2], DONE]


def test_the_bytes_of_our_upstream_are_exact() -> None:
    answer = told(*EXACT, *END, exact=3)
    assert answer.problem == ""
    assert answer.output_tokens == 3


@pytest.mark.parametrize(
    ("events", "problem"),
    [
        ([EXACT[1], EXACT[0], EXACT[2], *END], "events lost, doubled or swapped"),
        ([EXACT[0], EXACT[1], EXACT[1], *END], "events lost, doubled or swapped"),
        ([*EXACT[:2], *END], "an event differs from what was sent"),
        ([EXACT[0].replace(b"R1", b"R2"), *EXACT[1:], *END], "an event differs from what was sent"),
        ([EXACT[0] + b" ", *EXACT[1:], *END], "an event differs from what was sent"),
        ([*EXACT, usage_event(4)[:-2], DONE], "an event differs from what was sent"),
        ([*EXACT, END[0], END[0], DONE], "an event differs from what was sent"),
        ([*EXACT, END[0]], "a stream without [DONE]"),
    ],
)
def test_a_byte_that_differs_from_our_upstreams_is_found(events: list[bytes], problem: str) -> None:
    assert told(*events, exact=3).problem == problem


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (b'{"choices":[{}],"usage":{"completion_tokens":3}}', ""),
        (b'{"data":[{}]}', ""),
        (b'{"choices":[]}', "an answer without content"),
        (b'{"error":{"message":"x"}}', "an error with a good status"),
        (b"[]", "an answer that is no JSON object"),
        (b"{", "an answer that is no JSON object"),
    ],
)
def test_an_answer_that_is_no_stream_is_checked(body: bytes, problem: str) -> None:
    answer = Answer(stream=False)
    answer.body(body)
    assert answer.end() == problem


def test_a_body_in_place_of_a_stream_is_wrong() -> None:
    answer = Answer(stream=True)
    answer.body(b'{"choices":[{}]}')
    assert answer.end() == "an answer that is no stream"


def test_equal_answers_have_equal_digests_and_others_do_not() -> None:
    assert told(CONTENT, DONE).digest == told(CONTENT, DONE).digest
    assert told(CONTENT, DONE).digest != told(CONTENT, CONTENT, DONE).digest


def test_what_was_kept_is_told_as_it_came() -> None:
    kept, answer = Kept(), Answer(stream=True)
    for at, each in enumerate((CONTENT, USAGE, DONE)):
        kept.event(each, float(at))
    kept.tell(answer)
    assert answer.end() == ""
    assert answer.content_times == [0.0]


@pytest.mark.parametrize(
    ("body", "name"),
    [
        (b'{"error":{"code":"rate_limit_exceeded","type":"t"}}', "status 429 rate_limit_exceeded"),
        (b'{"error":{"code":null,"type":"t"}}', "status 429 t"),
        (b'{"error":"busy"}', "status 429"),
        (b"<html>", "status 429"),
        (None, "status 429"),
    ],
)
def test_a_refusal_is_named_by_status_and_code(body: bytes | None, name: str) -> None:
    assert refusal(429, body) == name


def of_dialect(kind: str, stream: bytes) -> Answer:
    answer = Answer(stream=True, dialect=DIALECTS[kind])
    for number, each in enumerate(stream.removesuffix(b"\n\n").split(b"\n\n")):
        answer.event(each, float(number))
    answer.end()
    return answer


@pytest.mark.parametrize("kind", ["messages", "responses"])
def test_a_stream_of_another_dialect_tells_its_text_its_times_and_its_usage(kind: str) -> None:
    answer = of_dialect(kind, STREAMS[kind])
    assert answer.problem == ""
    assert answer.text == "Hi"
    assert (answer.input_tokens, answer.output_tokens, answer.is_counted) == (12, 2, True)


@pytest.mark.parametrize(
    ("kind", "stream", "problem"),
    [
        ("messages", b'data: {"type":"content_block_delta","delta":{"text":"a"}}', "a stream without its last event"),
        ("messages", b'event: error\ndata: {"type":"error","error":{"type":"overloaded_error"}}', "an error inside"),
        ("messages", b'data: {"type":"message_stop"}\n\ndata: {"type":"ping"}', "an event after the last"),
        ("responses", b'data: {"type":"response.failed"}', "an error inside the stream"),
        ("responses", b'data: {"type":"response.completed","response":{}}', "a stream without content"),
    ],
)
def test_what_is_wrong_with_a_stream_of_another_dialect_is_named(kind: str, stream: bytes, problem: str) -> None:
    assert of_dialect(kind, stream).problem.startswith(problem)


def test_a_done_behind_the_last_event_of_another_dialect_is_no_harm() -> None:
    assert of_dialect("responses", STREAMS["responses"] + b"data: [DONE]\n\n").problem == ""
