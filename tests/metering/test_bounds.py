"""What is counted has a bound: no estimate is more than the request allowed, and nobody's own words are usage."""

import base64
import json
import random
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.exchange import NO_USAGE, Usage, UsageSource
from edge.metering.documents import MAX_DOCUMENT_BYTES
from edge.metering.meters import Meter, Metering
from edge.operations import OPERATIONS
from tests.metering.test_meters import CHAT, DONE, MESSAGES, RESPONSES, TEXT, chunk, data, fed, usage
from tests.profiles import examples
from tests.streams import cut

FINAL, RUNNING, ESTIMATED, NONE = UsageSource
WRITING = [CHAT, TEXT, MESSAGES, RESPONSES]
PROMPT = 7


def metering(operation: str, most: int | None, **options: Any) -> Metering:
    return Metering(OPERATIONS[operation], prompt_estimate=PROMPT, most=most, **options)


def used_by(operation: str, content: bytes, most: int | None = None, *, whole: bool = True) -> Usage:
    return fed(metering(operation, most).document(), [content]).usage(whole)


# --- no more than the request allowed


@pytest.mark.parametrize("operation", WRITING)
@pytest.mark.parametrize("most", [0, 3, 10**6, None])
def test_document_is_estimated_to_have_no_more_than_it_may(operation: str, most: int | None) -> None:
    """Log probabilities make a document a hundred times as long as its text."""
    small = b'{"choices":[{"logprobs":"%b"}]}' % (b"0.1, " * 1000)
    large = b'{"choices":[{"logprobs":"%b"}]}' % (b"0.1, " * (MAX_DOCUMENT_BYTES // 4))
    for content in (small, large):
        for parts in ([content], cut(content, range(65_536, len(content), 65_536))):
            guess = sum(len(part) // 4 for part in parts) if content is large else len(content) // 4
            expected = guess if most is None else min(guess, most)
            for whole in (True, False):
                used = fed(metering(operation, most).document(), parts).usage(whole)
                assert used == Usage(PROMPT, expected, source=ESTIMATED)


DELTAS = {
    CHAT: chunk(),
    TEXT: data({"choices": [{"index": 0, "text": "a", "finish_reason": None}]}),
    MESSAGES: data({"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "a"}}),
    RESPONSES: data({"type": "response.output_text.delta", "delta": "a", "sequence_number": 1}),
}


@pytest.mark.parametrize("operation", WRITING)
@pytest.mark.parametrize("most", [0, 3, 9, None])
def test_stream_is_estimated_to_have_no_more_than_it_may(operation: str, most: int | None) -> None:
    """Whatever its frames hold: what is counted by `passed` is bound too."""
    expected = Usage(PROMPT, 8 if most is None else min(8, most), source=ESTIMATED)
    meter = fed(metering(operation, most).events(), [DELTAS[operation]] * 8)
    assert meter.usage(False) == expected
    meter = fed(metering(operation, most).events(), [DELTAS[operation]] * 2)
    meter.passed += 6
    assert meter.usage(False) == expected


def test_what_the_engine_counted_stands_as_it_is() -> None:
    """The bound is one of guesses; `message_start` counts what it has, and the rest is a guess."""
    assert used_by(CHAT, orjson.dumps({"choices": [], "usage": usage(12, 5)}), 3) == Usage(12, 5, source=FINAL)
    start = data({"type": "message_start", "message": {"usage": {"input_tokens": 12, "output_tokens": 1}}})
    meter = fed(metering(MESSAGES, 3).events(), [start, *[DELTAS[MESSAGES]] * 8])
    assert meter.usage(False) == Usage(12, 3, source=ESTIMATED)


def test_sound_and_images_of_an_answer_are_sums() -> None:
    blob = base64.b64encode(random.Random(5).randbytes(600_000)).decode()
    sound = {"choices": [{"message": {"audio": {"data": blob, "id": "a"}}}]}
    image = {"choices": [{"message": {"images": [{"image_url": {"url": f"data:image/png;base64,{blob}"}}]}}]}
    for answer, tokens in ((sound, 937), (image, 1600)):
        content = orjson.dumps(answer)
        for size in (10**7, 65_536):
            meter = fed(metering(CHAT, None).document(), cut(content, range(size, len(content), size)))
            assert 0 < meter.usage(True).completion_tokens < tokens + 100


# --- what is no answer


ERRORS = [
    {"error": {"message": "a" * 4000, "type": "server_error", "code": 500}},
    {"error": "a" * 4000},
    {"id": 1, "error": {"message": "a"}, "choices": []},
    {"object": "error", "message": "a" * 4000, "type": "invalid_request_error", "code": 400},
    {"type": "error", "error": {"type": "overloaded_error", "message": "a"}},
    {"error": {"message": "a"}, "usage": None},
]


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("operation", [*WRITING, "embeddings"])
def test_error_under_a_status_of_success_is_no_answer(operation: str, error: dict[str, Any]) -> None:
    for content in (orjson.dumps(error), json.dumps(error, indent=1).encode()):
        meter = fed(metering(operation, None).document(), [content])
        assert (meter.usage(True), meter.failed) == (NO_USAGE, True)
    long = orjson.dumps(error | {"stack": "x" * MAX_DOCUMENT_BYTES})
    meter = fed(metering(operation, None).document(), cut(long, range(9000, len(long), 9000)))
    assert (meter.usage(True), meter.failed) == (NO_USAGE, True)


def test_error_that_is_cut_is_none_either() -> None:
    for begin in (b'{"error":{"message":"aaaaaaaaaaaa', b' { "error" : "aaaaaaaaaaaaa'):
        assert used_by(CHAT, begin, whole=False) == NO_USAGE


@pytest.mark.parametrize("status", ["failed", "queued", "in_progress"])
def test_response_that_is_not_written_is_no_answer(status: str) -> None:
    response = {"id": "resp_1", "object": "response", "status": status, "error": None, "instructions": "a" * 4000}
    if status == "failed":
        response["error"] = {"code": "server_error", "message": "a"}
    for told in ({"usage": None}, {}):
        meter = fed(metering(RESPONSES, None).document(), [orjson.dumps(response | told)])
        assert (meter.usage(True), meter.failed) == (NO_USAGE, status == "failed")
        assert meter.response_id(True) == "resp_1"
    assert used_by(RESPONSES, orjson.dumps(response | {"usage": usage()})) == Usage(12, 5, source=FINAL)


@pytest.mark.parametrize("status", ["failed", "queued"])
def test_stream_of_a_response_that_is_not_written_has_no_answer(status: str) -> None:
    response = {"id": "resp_1", "status": status, "usage": None, "instructions": "a" * 4000}
    meter = fed(metering(RESPONSES, None).events(), [data({"type": f"response.{status}", "response": response})])
    assert meter.usage(True).completion_tokens == 0
    assert meter.failed is (status == "failed")


@pytest.mark.parametrize(
    "answer",
    [
        {"error": None, "status": "completed", "output": []},
        {"error": None, "status": "incomplete", "output": []},
        {"type": "message", "content": [{"type": "error"}]},
        {"choices": [{"message": {"content": '{"error":{"message":"a"}}'}}], "object": "chat.completion"},
        {"choices": [], "metadata": {"error": {}, "status": "failed", "type": "error"}},
    ],
)
def test_answer_that_is_none_of_these_is_one(answer: dict[str, Any]) -> None:
    content = orjson.dumps(answer)
    meter = fed(metering(RESPONSES, None).document(), [content])
    assert (meter.usage(True), meter.failed) == (Usage(PROMPT, len(content) // 4, source=ESTIMATED), False)


# --- any answer, cut anywhere

FALSE = 10**9
DECOY = {"prompt_tokens": FALSE, "completion_tokens": FALSE, "input_tokens": FALSE, "output_tokens": FALSE,
         "total_tokens": 2 * FALSE, "prompt_tokens_details": {"cached_tokens": FALSE}}  # fmt: skip
SAID = json.dumps({"usage": DECOY})
TIMED = {"prompt_n": FALSE, "predicted_n": FALSE, "cache_n": FALSE}
words = st.lists(
    st.sampled_from([SAID, SAID[1:], ',"usage":', '"}]}', "a", "\\", '"', "\n\n", "data: [DONE]\n\n", "世界", "🙂"]),
    min_size=1,
    max_size=4,
).map("".join)
own = st.recursive(
    words | st.just(DECOY) | st.none() | st.integers(0, 9),
    lambda below: st.lists(below, max_size=3) | st.dictionaries(st.sampled_from(["usage", "a", "timings"]), below),
    max_leaves=8,
)


def shuffled(draw: Any, members: dict[str, Any]) -> dict[str, Any]:
    return dict(draw(st.permutations(list(members.items()))))


def object_of(operation: str, prompt: int, completion: int) -> dict[str, int]:
    """The usage that an engine tells."""
    if operation in (CHAT, TEXT):
        return usage(prompt, completion)
    return {"input_tokens": prompt, "output_tokens": completion}


def document_of(draw: Any, operation: str, told: dict[str, int] | None) -> bytes:
    said, more = draw(words), draw(own)
    tool = {"type": "tool_use", "name": "f", "input": {"usage": more}, "usage": DECOY}
    members: dict[str, Any] = {"id": said, "metadata": {"usage": more}, "x": draw(own), "logprobs": [{"usage": DECOY}]}
    members |= {
        CHAT: {"choices": [{"message": {"content": said, "tool_calls": [tool], "usage": DECOY}}]},
        TEXT: {"choices": [{"text": said, "logprobs": {"usage": DECOY}}]},
        MESSAGES: {"content": [{"type": "text", "text": said}, tool], "type": "message"},
        RESPONSES: {"output": [{"content": [{"text": said}]}, tool], "status": "completed", "instructions": said},
    }[operation]
    if told is not None:
        members["usage"] = told
    elif draw(st.booleans()):
        members["usage"] = None
    return orjson.dumps(shuffled(draw, members))


def delta_of(draw: Any, operation: str) -> dict[str, Any]:
    said, more = draw(words), {"x": {"usage": draw(own)}, "metadata": {"usage": DECOY, "timings": TIMED}}
    return shuffled(draw, more | {
        CHAT: {"choices": [{"index": 0, "delta": {"content": said, "x": {"usage": DECOY}}, "finish_reason": None}]},
        TEXT: {"choices": [{"index": 0, "text": said, "finish_reason": None}]},
        MESSAGES: {"type": "content_block_delta", "delta": {"text": said, "usage": DECOY}},
        RESPONSES: {"type": "response.output_text.delta", "delta": said, "item": {"usage": DECOY}},
    }[operation])  # fmt: skip


def stream_of(draw: Any, operation: str, told: dict[str, int] | None, deltas: int) -> list[bytes]:
    events = [delta_of(draw, operation) for _ in range(deltas)]
    more = {"metadata": {"usage": draw(own)}}
    if operation in (CHAT, TEXT):
        end = {"choices": [{"index": 0, "delta": {}, "text": "", "finish_reason": "stop"}]}
        events += [more | end, *([more | {"choices": [], "usage": told}] if told is not None else [])]
        return [*map(data, events), DONE]
    if operation == MESSAGES:
        first = {"usage": {"input_tokens": told["input_tokens"], "output_tokens": 0}} if told is not None else {}
        events.insert(0, {"type": "message_start", "message": more | first})
        events.append({"type": "message_delta", "delta": {"usage": DECOY}, **({"usage": told} if told else {})})
        events.append({"type": "message_stop"})
    else:
        events.insert(0, {"type": "response.created", "response": more | {"id": "r", "usage": None}})
        events.append({"type": "response.completed", "response": shuffled(draw, more | {"id": "r", "usage": told})})
    return list(map(data, events))


def cut_at_random(draw: Any, content: bytes) -> list[bytes]:
    return cut(content, draw(st.lists(st.integers(0, len(content)), max_size=6)))


@examples(50)
@given(st.data())
def test_no_record_is_more_than_was_allowed_whatever_an_answer_says(draws: st.DataObject) -> None:
    """And no object of that name outside its place counts: each of those here has a billion tokens."""
    draw = draws.draw
    operation = draw(st.sampled_from(WRITING))
    most = draw(st.none() | st.integers(0, 12))
    prompt, completion = draw(st.integers(0, 50)), draw(st.integers(0, 12 if most is None else most))
    told = object_of(operation, prompt, completion) if draw(st.booleans()) else None
    deltas = draw(st.integers(0, 16))
    meter: Meter
    if is_stream := draw(st.booleans()):
        content = b"".join(stream_of(draw, operation, told, deltas))
        options = draw(st.sampled_from([{}, {"hide_usage": True}, {"continuous": True, "hide_running": True}]))
        meter = metering(operation, most, **options).events()
    else:
        content = document_of(draw, operation, told)
        meter = metering(operation, most).document()
    length = draw(st.just(len(content)) | st.integers(0, len(content)))
    used = fed(meter, cut_at_random(draw, content[:length])).usage(length == len(content))

    if length == len(content) and told is not None:
        # No message has a prompt of nothing: a stream of one that counts 0 has left the count out.
        is_left_out = is_stream and operation == MESSAGES and not prompt
        told_or_guessed = (PROMPT, ESTIMATED) if is_left_out else (prompt, FINAL)
        assert (used.prompt_tokens, used.source) == told_or_guessed
        assert used.completion_tokens == completion
    assert most is None or used.completion_tokens <= most
    assert used.prompt_tokens in (0, PROMPT, prompt)
    assert not used.cached_tokens
    assert used.reasoning_tokens == used.cache_creation_tokens == used.units == 0
    assert used.completion_tokens in (0, completion) or used.completion_tokens <= (deltas if is_stream else length // 4)
