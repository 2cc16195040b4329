"""What an answer used, read from its bytes: the same however they come, and never disturbed by what stands in them."""

import json
import re
import tracemalloc
from collections.abc import Iterable, Iterator
from typing import Any, get_args

import msgspec
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.exchange import NO_USAGE, Usage, UsageSource
from edge.metering import chunks
from edge.metering.chunks import MAX_ENDING_BYTES
from edge.metering.documents import MAX_DOCUMENT_BYTES
from edge.metering.events import MAX_HELD_BYTES, decoded
from edge.metering.meters import Meter, Metering
from edge.metering.scanning import MAX_VALUE_BYTES, Scanner
from edge.operations import OPERATIONS, Operation
from edge.simulator import dialects
from edge.simulator.dialects import Ask, Dialect, Question, error_frames
from tests.profiles import examples
from tests.streams import STREAMS as CASES
from tests.streams import cut

FINAL, RUNNING, ESTIMATED, NONE = UsageSource
CHAT, TEXT, MESSAGES, RESPONSES = "chat/completions", "completions", "messages", "responses"
DIALECTS = get_args(Dialect)
KINDS = [*((CHAT, each) for each in DIALECTS), *((TEXT, each) for each in DIALECTS), (MESSAGES, "vllm")]
KINDS.append((RESPONSES, "vllm"))


def question(dialect: Any = "vllm", tokens: int = 5, usage: bool = False, running: bool = False) -> Question:
    return Question(dialect, "m", tokens, "stop", 12, usage=usage, running_usage=running)


def simulated(operation: str, *args: Any, **kwargs: Any) -> list[bytes]:
    """Return the frames that a model server sends."""
    return list(dialects.STREAMS[f"/v1/{operation}"](question(*args, **kwargs)).frames)


def events(operation: str = CHAT, **options: Any) -> Meter:
    return Metering(OPERATIONS.get(operation) or Operation(operation), prompt_estimate=7, **options).events()


def document(operation: str = CHAT) -> Meter:
    return Metering(OPERATIONS.get(operation) or Operation(operation), prompt_estimate=7).document()


def fed(meter: Meter, parts: Iterable[bytes]) -> Meter:
    for part in parts:
        meter.feed(part)
    return meter


def read(parts: bytes | Iterable[bytes], operation: str = CHAT, whole: bool = True) -> Usage:
    return fed(events(operation), [parts] if isinstance(parts, bytes) else parts).usage(whole)


def data(value: object) -> bytes:
    return b"data: " + orjson.dumps(value) + b"\n\n"


def chunk(delta: object = None, finish: str | None = None, **members: Any) -> bytes:
    delta = {"content": "a"} if delta is None else delta
    return data({"id": "1", "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]} | members)


def usage(prompt: int = 12, completion: int = 5, **members: Any) -> dict[str, Any]:
    return {"prompt_tokens": prompt, "total_tokens": prompt + completion, "completion_tokens": completion} | members


def last(**members: Any) -> bytes:
    return data({"id": "1", "choices": [], "usage": usage()} | members)


DONE = b"data: [DONE]\n\n"
USED = Usage(12, 5, source=FINAL)


def uncached(used: Usage) -> Usage:
    """The usage of a server that says that nothing was cached as that of one that says nothing of it."""
    return msgspec.structs.replace(used, cached_tokens=used.cached_tokens or None)


# --- whole streams


@pytest.mark.parametrize(("operation", "dialect"), KINDS)
def test_whole_stream_used_what_its_server_says(operation: str, dialect: str) -> None:
    assert uncached(read(simulated(operation, dialect, usage=True), operation)) == USED


@pytest.mark.parametrize(("operation", "dialect"), [*((CHAT, each) for each in DIALECTS), (TEXT, "vllm")])
def test_stream_without_usage_used_its_frames(operation: str, dialect: str) -> None:
    """llama.cpp tells its timings all the same."""
    expected = Usage(12, 9, source=FINAL) if dialect == "llamacpp" else Usage(7, 9, source=ESTIMATED)
    assert uncached(read(simulated(operation, dialect, tokens=9), operation)) == expected


@pytest.mark.parametrize(("operation", "dialect"), KINDS)
def test_frames_that_carry_a_token_are_counted_as_the_server_counts_them(operation: str, dialect: str) -> None:
    for tokens in [0, 1, 9]:
        script = dialects.STREAMS[f"/v1/{operation}"](question(dialect, tokens))
        prompt = 12 if operation == MESSAGES else 7  # `message_start` tells
        for sent in range(len(script.frames)):
            used = uncached(read(script.frames[:sent], operation, whole=False))
            if sent == 0:
                assert used == NO_USAGE
            elif used.source is ESTIMATED:
                assert used == Usage(prompt, script.tokens_in(sent), source=ESTIMATED)
            elif dialect == "llamacpp":  # its timings, on the frame before `[DONE]`
                assert (used, sent) == (Usage(12, tokens, source=RUNNING), len(script.frames) - 1)
            else:
                assert (operation, used) == (MESSAGES, Usage(12, tokens, source=FINAL))
                assert sent == len(script.frames) - 1


def test_only_frames_that_carry_a_token_are_counted() -> None:
    tool = {"tool_calls": [{"index": 0, "function": {"arguments": "{"}}]}
    counted = [
        chunk(tool), chunk({"reasoning_content": "a"}), chunk({"role": "assistant", "content": "a"}),
        chunk({"content": None, "refusal": "no"}), chunk({"content": "a"}, "stop"), chunk({"content": " "}),
        data({"choices": [{"text": "a", "finish_reason": None}]}), data({"token": {"text": "a"}}),
        b"data: no JSON\n\n", data({"choices": [{"delta": ["a"]}]}), b'data: {"choices":[{"text":"\\ud83d"}]}\n\n',
    ]  # fmt: skip
    others = [
        chunk({"role": "assistant"}), chunk({"role": "assistant", "content": ""}), chunk({}), chunk({}, "stop"),
        chunk({"content": None, "tool_calls": []}), data({"choices": [{"delta": None}]}), last(), data({"choices": []}),
        data({"choices": [{"text": "", "finish_reason": "stop"}]}), data({"error": {"message": "a"}}), DONE,
        b": a comment\n\n", b"event: ping\n\n", b"\n\n", b"id: 1\n\n", data({"usage": usage()}),
    ]  # fmt: skip
    for frame in counted:
        assert read(frame) == Usage(7, 1, source=ESTIMATED), frame
    for frame in others:
        assert read(frame).completion_tokens in (0, 5), frame


@pytest.mark.parametrize(("operation", "dialect"), KINDS)
def test_content_begins_with_the_first_token(operation: str, dialect: str) -> None:
    """A comment, a role, `message_start` and `response.created` come before, some of them long before."""
    script = dialects.STREAMS[f"/v1/{operation}"](question(dialect))
    meter = events(operation)
    meter.feed(b":\n\n")
    for sent, frame in enumerate(script.frames):
        assert meter.has_content is (script.tokens_in(sent) > 0)
        meter.feed(frame)
    assert not fed(events(), [DONE, data({"error": {"message": "a"}}), last()]).has_content
    assert document().has_content


@pytest.mark.parametrize("parts", [[], [b""], [b": keep-alive\n\n"] * 3, [DONE], [data({"error": {"message": "a"}})]])
def test_nothing_is_used_by_a_stream_that_says_nothing(parts: list[bytes]) -> None:
    """The text of an error is no answer."""
    for operation in [CHAT, TEXT, MESSAGES, RESPONSES, "audio/transcriptions"]:
        for whole in (True, False):
            assert read(parts, operation, whole) == NO_USAGE


# --- usage objects


@pytest.mark.parametrize(
    ("value", "used"),
    [
        (usage(), Usage(12, 5)),
        (usage(0, 0), Usage(0, 0)),
        (usage(prompt_tokens_details={"cached_tokens": 8}, completion_tokens_details={"reasoning_tokens": 3}),
         Usage(12, 5, 8, 3)),
        (usage(prompt_tokens_details=None, completion_tokens_details={"reasoning_tokens": None}), Usage(12, 5)),
        (usage(prompt_tokens_details={"cached_tokens": -1}, completion_tokens_details="3"), Usage(12, 5)),
        ({"prompt_tokens": 12, "total_tokens": 14}, Usage(12, 2)),
        ({"prompt_tokens": 12, "total_tokens": 4}, Usage(12, 0)),
        ({"prompt_tokens": 12, "completion_tokens": None}, Usage(12, 0)),
        ({"total_tokens": 14}, Usage(14, 0)),
        ({"completion_tokens": 4, "total_tokens": 14}, Usage(10, 4)),
        ({"completion_tokens": 4}, Usage(0, 4)),
        ({"input_tokens": 12, "output_tokens": 5, "total_tokens": 17}, Usage(12, 5)),
        (usage(2**53, 0), Usage(2**53, 0)),
        (usage(reasoning_tokens=4), Usage(12, 5, None, 4)),
        (usage(reasoning_tokens="4"), Usage(12, 5)),
        (usage(reasoning_tokens=4, completion_tokens_details={"reasoning_tokens": 3}), Usage(12, 5, None, 3)),
        (usage(prompt_tokens_details=None, input_tokens_details={"cached_tokens": 2}), Usage(12, 5, 2)),
        (usage(completion_tokens_details=None, output_tokens_details={"reasoning_tokens": 2}), Usage(12, 5, None, 2)),
        (usage(cached_tokens=8), Usage(12, 5, 8)),  # Moonshot
        (usage(cached_tokens="8"), Usage(12, 5)),
        (usage(cached_tokens=8, prompt_tokens_details={"cached_tokens": 8}), Usage(12, 5, 8)),
        (usage(prompt_cache_hit_tokens=8, prompt_cache_miss_tokens=4), Usage(12, 5, 8)),  # DeepSeek
        (usage(prompt_tokens_details={"cached_tokens": 8}, prompt_cache_hit_tokens=8), Usage(12, 5, 8)),
        (usage(prompt_tokens_details={"cached_tokens": 0, "cache_creation_input_tokens": 9, "cache_type": "ephemeral",
                                      "cache_creation": {"ephemeral_5m_input_tokens": 9}}),
         Usage(12, 5, 0, cache_creation_tokens=9)),  # DashScope
        (usage(prompt_tokens_details={"cached_tokens": 8, "created_cache_tokens": 3}),
         Usage(12, 5, 8, cache_creation_tokens=3)),  # vLLM
        ({"input_tokens": 2, "cache_creation_input_tokens": 3, "cache_read_input_tokens": 7, "output_tokens": 5,
          "cache_creation": {"ephemeral_5m_input_tokens": 3}}, Usage(12, 5, 7, cache_creation_tokens=3)),  # Anthropic
        ({"input_tokens": 12, "cache_creation_input_tokens": 3, "cache_read_input_tokens": 7, "output_tokens": 5,
          "total_tokens": 17}, Usage(12, 5, 7, cache_creation_tokens=3)),
        (usage(cache_creation_input_tokens=3, cache_read_input_tokens=7), Usage(12, 5, 7, cache_creation_tokens=3)),
    ],
)  # fmt: skip
def test_usage_is_what_the_object_says(value: dict[str, Any], used: Usage) -> None:
    expected = msgspec.structs.replace(used, source=FINAL)
    assert read(data({"choices": [], "usage": value})) == expected
    assert fed(document(), [orjson.dumps({"choices": [], "usage": value})]).usage(True) == expected


NONSENSE = [
    b"null", b"{}", b"[]", b'"12"', b"12", b"true", b'{"prompt_tokens":null}', b'{"prompt_tokens":-1,"total_tokens":3}',
    b'{"prompt_tokens":12.0,"completion_tokens":5}', b'{"prompt_tokens":"12","completion_tokens":5}',
    b'{"prompt_tokens":12,"completion_tokens":9007199254740993}', b'{"prompt_tokens":1e400}',
    b'{"prompt_tokens":' + b"9" * 5000 + b"}", b'{"prompt_tokens":[12]}', b'{"prompt_tokens":true}',
    b'{"type":"duration","seconds":1}', b'{"a":' + b"[" * 5000 + b"]" * 5000 + b"}",
]  # fmt: skip


@pytest.mark.parametrize("value", NONSENSE)
def test_nonsense_is_no_usage(value: bytes) -> None:
    assert read([chunk(), b'data: {"choices":[],"usage":%b}\n\n' % value]).source is ESTIMATED
    assert read([last(), b'data: {"choices":[],"usage":%b}\n\n' % value]) == USED
    other = b'{"usage":{"prompt_tokens":3,"completion_tokens":4}}'  # the caller's own, not the upstream's
    answers = [b'{"choices":[],"usage":%b}' % value]
    if b"[[" not in value:  # too deep to be read, and so looked through from its end
        answers.append(b'{"usage":%b,"metadata":%b}' % (value, other))
    for answer in answers:
        assert fed(document(), [answer]).usage(True) == Usage(7, len(answer) // 4, source=ESTIMATED)


def test_running_usage_is_never_summed() -> None:
    frames = [chunk(usage=usage(12, count)) for count in range(1, 6)]
    assert read(frames) == USED
    assert read(frames, whole=False) == Usage(12, 5, source=RUNNING)
    assert read([*frames, last(usage=usage(12, 6))], whole=False) == Usage(12, 6, source=FINAL)


@pytest.mark.parametrize("operation", [CHAT, TEXT])
def test_stream_that_is_cut_used_what_was_running(operation: str) -> None:
    for dialect in ["vllm", "sglang"]:
        frames = simulated(operation, dialect, tokens=9, usage=True, running=True)
        script = dialects.STREAMS[f"/v1/{operation}"](question(dialect, 9))
        silent = (operation, dialect) == (CHAT, "sglang")  # whose frame with the role tells nothing
        for sent in range(1 + silent, len(frames) - 2):
            meter = fed(events(operation, continuous=True), frames[:sent])
            assert meter.usage(False) == Usage(12, script.tokens_in(sent), source=RUNNING)
            assert meter.ending == b""
        assert read(frames[:-1], operation, whole=False) == Usage(12, 9, source=FINAL)


# --- what does not fool it

SAID = '"usage":{"prompt_tokens":1,"completion_tokens":1}} data: [DONE]\n\ndata: {"error":{"message":"a"}}\n\n"error":1'


@pytest.mark.parametrize("operation", [CHAT, TEXT, MESSAGES, RESPONSES])
def test_what_a_model_says_is_not_taken_for_usage_or_an_end(operation: str) -> None:
    for dumps in [lambda value: json.dumps(value).encode(), orjson.dumps]:
        for size in [1, 20_000]:
            said = SAID * size
            frames = {
                CHAT: {"choices": [{"delta": {"content": said}, "finish_reason": None}]},
                TEXT: {"choices": [{"text": said, "finish_reason": None}]},
                MESSAGES: {"type": "content_block_delta", "delta": {"type": "text_delta", "text": said}},
                RESPONSES: {"type": "response.output_text.delta", "delta": said},
            }
            event = b"data: " + dumps(frames[operation]) + b"\n\n"
            meter = fed(events(operation), [event, *cut(event, range(1000, len(event), 1000))])
            assert meter.usage(True) == Usage(7, 2, source=ESTIMATED)
            assert not meter.failed
            answer = dumps({"id": 1, "output": said, "choices": [frames[CHAT]]})
            assert fed(document(operation), [answer]).usage(True).source is ESTIMATED
            assert (
                fed(document(operation), cut(answer, range(1000, len(answer), 1000))).usage(False).source is ESTIMATED
            )


# --- the same however it comes


def variants() -> Iterator[tuple[str, str, bytes]]:
    for name, stream in CASES.items():
        yield name, {"messages": MESSAGES, "responses": RESPONSES}.get(name, CHAT), stream
    for operation, dialect in KINDS:
        yield f"{operation} {dialect}", operation, b"".join(simulated(operation, dialect, tokens=3, usage=True))
    running = b"".join(simulated(CHAT, tokens=3, usage=True, running=True))
    yield "running", CHAT, running
    yield "error", CHAT, chunk() + data({"error": {"message": "a"}}) + DONE
    yield "flat error", CHAT, chunk() + data({"object": "error", "message": "a"})
    yield "no space", CHAT, (chunk() + last()).replace(b"data: ", b"data:") + DONE
    yield (
        "lines",
        CHAT,
        b"retry: 1\r\nid: 2\r\n" + last().replace(b',"usage"', b',\r\ndata:"usage"').strip() + b"\r\n\r\n",
    )
    yield "behind a comment", CHAT, b": a\n" + last()
    yield "unfinished", CHAT, chunk() + last().strip()
    yield "mixed ends", CHAT, chunk().replace(b"\n", b"\r\n") + last() + chunk().replace(b"\n", b"\r") + last() + DONE
    yield "half an event", CHAT, chunk() + last()[:-20]
    for ending in (b"\r\n", b"\r"):
        yield f"ends {ending!r}", CHAT, running.replace(b"\n", ending)
        yield f"messages {ending!r}", MESSAGES, CASES["messages"].replace(b"\n", ending)


STREAMS = {name: (operation, stream) for name, operation, stream in variants()}
MODES: list[dict[str, bool]] = [
    {},
    {"hide_usage": True},
    {"continuous": True, "hide_usage": True, "hide_running": True},
]


def outcome(operation: str, mode: dict[str, bool], parts: list[bytes]) -> tuple[bytes, Usage, Usage, bool]:
    meter = events(operation, **mode)
    given = [meter.feed(part) for part in parts]
    if not mode:
        assert all(got is part for got, part in zip(given, parts, strict=True))
    cut_off = meter.usage(False) if not meter.holds else NO_USAGE
    ended = meter.close()
    assert not meter.holds
    return b"".join(given) + ended, meter.usage(True), cut_off, meter.failed


@pytest.mark.parametrize("name", [name for name in STREAMS if name != "long"])
def test_usage_is_the_same_cut_at_any_byte(name: str) -> None:
    operation, stream = STREAMS[name]
    for mode in MODES if operation in (CHAT, TEXT) else MODES[:1]:  # nothing is hidden in other streams
        expected = outcome(operation, mode, [stream])
        assert outcome(operation, mode, cut(stream, range(1, len(stream)))) == expected
        for at in range(0, len(stream), 3):
            assert outcome(operation, mode, cut(stream, [at])) == expected, at


@examples(200)
@given(st.sampled_from(sorted(STREAMS)), st.sampled_from(MODES), st.data())
def test_usage_is_the_same_at_random_cuts(name: str, mode: dict[str, bool], draw: st.DataObject) -> None:
    operation, stream = STREAMS[name]
    mode = mode if operation in (CHAT, TEXT) else {}
    positions = draw.draw(st.sets(st.integers(1, len(stream) - 1), max_size=20))
    assert outcome(operation, mode, cut(stream, positions)) == outcome(operation, mode, [stream])


@pytest.mark.parametrize("operation", [CHAT, TEXT, MESSAGES, RESPONSES])
@pytest.mark.parametrize("event", [b"data: x\n\n", b"data: {}\n\n", b"data:[]\n\n", b"data:\n\n", b"x\n\n", b": x\n\n"])
def test_short_event_counts_alike_alone_and_among_others(operation: str, event: bytes) -> None:
    for stream in (event * 3, event + b'data: "of another kind"\n\n' + event):
        expected = outcome(operation, {}, [stream])
        assert outcome(operation, {}, stream.splitlines(keepends=True)) == expected
        assert outcome(operation, {}, [each + b"\n\n" for each in stream.split(b"\n\n")[:-1]]) == expected


@pytest.mark.parametrize(
    ("name", "used", "failed"),
    [
        ("comments", Usage(7, 1, source=ESTIMATED), False),
        ("crlf", Usage(7, 1, source=ESTIMATED), False),
        ("llamacpp", Usage(12, 1, source=FINAL), False),
        ("long", Usage(7, 1, source=ESTIMATED), False),
        ("messages", Usage(12, 2, source=FINAL), False),
        ("openai", Usage(12, 2, source=FINAL), False),
        ("responses", Usage(12, 2, source=FINAL), False),
        ("sglang", Usage(7, 1, source=ESTIMATED), False),
        ("transformers", Usage(7, 1, source=ESTIMATED), False),
        ("vllm", Usage(12, 2, source=FINAL), False),
        ("error", Usage(7, 1, source=ESTIMATED), True),
        ("flat error", Usage(7, 1, source=ESTIMATED), True),
        ("no space", USED, False),
        ("lines", USED, False),
        ("behind a comment", USED, False),
        ("unfinished", USED, False),
        ("mixed ends", USED, False),
        ("ends b'\\r'", Usage(12, 3, source=FINAL), False),
        ("messages b'\\r\\n'", Usage(12, 2, source=FINAL), False),
    ],
)
def test_streams_of_many_servers_are_understood(name: str, used: Usage, failed: bool) -> None:
    operation, stream = STREAMS[name]
    meter = fed(events(operation), [stream])
    assert uncached(meter.usage(True)) == used
    assert meter.failed is failed


@given(st.lists(st.binary(max_size=20) | st.sampled_from([b"data: ", b"\n\n", b"{", b'"usage":', b"\r", b"[1]}"])))
@examples(300)
def test_no_bytes_make_a_meter_fail(parts: list[bytes]) -> None:
    for operation in (CHAT, TEXT, MESSAGES, RESPONSES, "images/edits", "audio/speech", "rerank", "new/operation"):
        for mode in MODES:
            meter = events(operation, **mode)
            given = b"".join(map(meter.feed, parts)) + meter.close()
            assert given == b"".join(parts)
            cut, whole = (msgspec.structs.replace(meter.usage(each), source=NONE) for each in (False, True))
            assert cut == whole
        meter = document(operation)
        assert b"".join(map(meter.feed, parts)) + meter.close() == b"".join(parts)
        assert meter.usage(True).prompt_tokens in (0, 7)
        assert meter.usage(False).prompt_tokens in (0, 7)


@pytest.mark.parametrize(
    "value", ["[" * 100_000, "[" * 50_000 + "]" * 50_000, '{"a":' * 25_000], ids=["open", "deep", "keys"]
)
def test_depth_costs_no_stack(value: str) -> None:
    """Deeper than any release of Python reads: 3.13 takes ten times the depth of those before."""
    for member in ("choices", "usage", "delta", "error", "response", "message"):
        bomb = f'{{"{member}":{value}}}'.encode()
        for operation in (CHAT, MESSAGES, RESPONSES):
            assert read([b"data: " + bomb + b"\n\n", last()], operation).completion_tokens in (0, 1, 5)
            used = fed(document(operation), [bomb]).usage(True)
            assert used.source is (NONE if (member, value[0]) == ("error", "{") else ESTIMATED)


# --- errors

ERRORS = [
    data({"error": {"message": "a", "code": 500}}), data({"error": "a"}), b'data: {"error": "an "unescaped" one"}\n\n',
    data({"object": "error", "message": "a"}), b'data:{"error":1}\n\n', b'error: {"code":500,"message":"a"}\n\n',
    b'event: error\ndata: {"message":"a"}\n\n', b': a\ndata: {"error":{}}\n\n', chunk(error={"message": "a"}),
    b'data: {"error":{\r\ndata: "message":1}}\r\n\r\n',
]  # fmt: skip


@pytest.mark.parametrize("error", ERRORS)
def test_stream_failed_whose_last_data_is_an_error(error: bytes) -> None:
    for end in ([], [DONE], [b": a comment\n\n"]):
        meter = fed(events(), [chunk(), error, *end])
        assert meter.failed
        assert meter.ending == b""
        assert meter.usage(True) == Usage(7, 1, source=ESTIMATED)
        assert not fed(meter, [chunk()]).failed
    meter = events()
    meter.feed(chunk() + error.strip())
    meter.close()
    assert meter.failed


@pytest.mark.parametrize("dialect", DIALECTS)
def test_errors_of_every_server_are_known(dialect: Any) -> None:
    for operation in [CHAT, TEXT, MESSAGES, RESPONSES]:
        frames = [*simulated(operation, dialect)[:5], *error_frames(f"/v1/{operation}", dialect, 500)]
        meter = fed(events(operation), frames)
        assert meter.failed
        assert meter.usage(True).source is ESTIMATED


@pytest.mark.parametrize("operation", [MESSAGES, RESPONSES])
def test_error_of_another_dialect_is_one(operation: str) -> None:
    for error in [data({"object": "error", "message": "a"}), data({"error": {"message": "a"}})]:
        assert fed(events(operation), [error]).failed


@pytest.mark.parametrize(
    "frame",
    [chunk(error=None), b'data: {"error":null,"choices":[]}\n\n', chunk({"content": '"error":1'}), chunk(), last()],
)
def test_error_that_is_null_is_none(frame: bytes) -> None:
    """`"error":null` stands in each chunk of some servers."""
    assert not fed(events(), [frame, DONE]).failed


# --- the ending


@pytest.mark.parametrize(("operation", "dialect"), KINDS)
def test_frames_that_end_alike_need_not_be_seen(operation: str, dialect: Any) -> None:
    """Wherever the stream is cut or fails, what is known is the same as if all of it had been seen."""
    for fault in [0, 1, 6, 12]:
        for asked in [True, False]:
            frames = simulated(operation, dialect, tokens=12, usage=asked)
            if fault:
                frames[fault:] = error_frames(f"/v1/{operation}", dialect, 500)
            every, some = events(operation), events(operation)
            unseen = 0
            for frame in frames:
                every.feed(frame)
                if some.ending and frame.endswith(some.ending) and not some.holds:
                    some.passed += 1
                    unseen += 1
                else:
                    some.feed(frame)
                assert some.usage(False) == every.usage(False)
                assert some.failed == every.failed
            assert some.usage(True) == every.usage(True)
            if operation in (CHAT, TEXT) and not fault:
                # All but the first, and the last where it has the reason to finish; llama.cpp's end with their text.
                finishing = dialect == "vllm" or (operation, dialect) == (TEXT, "sglang")
                assert unseen == (0 if (operation, dialect) == (CHAT, "llamacpp") else 10 if finishing else 11)
                assert len(some.ending) <= MAX_ENDING_BYTES
            if operation == MESSAGES:
                assert some.ending == b""


def alike(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


CHOICE = {"index": 0, "delta": {"content": "a"}, "finish_reason": None}
CONTENT = {"id": "1", "choices": [CHOICE], "model": "m", "object": "chat.completion.chunk"}
NOT_CONTENT = [
    CONTENT | {"choices": [CHOICE | {"finish_reason": "stop", "delta": {}}]},
    {"id": "1", "choices": [], "usage": usage(), "model": "m", "object": "chat.completion.chunk"},
    {"id": "1", "usage": usage(), "choices": [], "model": "m", "object": "chat.completion.chunk"},
    {"usage": usage(), "choices": [CHOICE | {"finish_reason": "length"}], "model": "m"},
    {"id": "1", "error": {"message": '"finish_reason":null}]}'}, "model": "m", "object": "chat.completion.chunk"},
    {"error": {"message": '"finish_reason": null}], "model": "m", "object": "chat.completion.chunk"}'}},
]


@pytest.mark.parametrize("frame", NOT_CONTENT)
def test_no_other_frame_ends_as_content_does(frame: dict[str, Any]) -> None:
    """Also where the members stand in another order: what follows `finish_reason` tells what the frame is."""
    for dumps in [alike, data]:
        for order in [1, -1]:
            turned = [dict(list(each.items())[::order]) for each in (CONTENT, frame)]
            meter = fed(events(), map(dumps, turned[:1]))
            assert meter.ending
            assert not dumps(turned[1]).endswith(meter.ending)


def test_ending_begins_at_the_mark_of_an_unfinished_choice() -> None:
    assert fed(events(), [chunk()]).ending == b'"finish_reason":null}]}\n\n'
    assert fed(events(), [alike(CONTENT)]).ending.startswith(b'"finish_reason": null}]')
    assert fed(events(), [chunk().replace(b"\n", b"\r\n")]).ending == b'"finish_reason":null}]}\r\n\r\n'
    assert fed(events(), [chunk(usage=None)]).ending == b'"finish_reason":null}],"usage":null}\n\n'
    typed = data({"delta": "a", "sequence_number": 1, "type": "response.output_text.delta"})
    assert fed(events(RESPONSES), [typed]).ending == b'"type":"response.output_text.delta"}\n\n'


@pytest.mark.parametrize(
    "frame",
    [
        chunk({"role": "assistant", "content": ""}), chunk({}, "stop"), chunk(finish="stop"), chunk(usage=usage()),
        last(), DONE, ERRORS[0], b": a comment\n\n", chunk(x="y" * MAX_ENDING_BYTES), data({"token": 1}),
        data({"choices": [{"finish_reason": None, "delta": {"content": "a" * MAX_ENDING_BYTES}}]}),
    ],
)  # fmt: skip
def test_no_ending_is_taken_from_other_frames(frame: bytes) -> None:
    assert fed(events(), [frame, frame]).ending == b""


def test_no_ending_is_taken_where_usage_runs() -> None:
    assert fed(events(continuous=True), [chunk(), chunk()]).ending == b""


def test_frames_that_passed_unseen_are_an_answer() -> None:
    meter = events()
    meter.passed += 3
    assert meter.usage(False) == Usage(7, 3, source=ESTIMATED)


# --- what the client did not ask for


def without(stream: bytes, *, running: bool, extra: bool = True) -> bytes:
    """What the client gets, found by a parser and not by the code under test."""

    def event(found: re.Match[bytes]) -> bytes:
        try:
            value = json.loads(found[1])
        except ValueError:
            return found[0]
        if extra and value.get("usage", "") is None:
            del value["usage"]
            return data(value)
        if not isinstance(value.get("usage"), dict):
            return found[0]
        if value.get("choices") == [] and extra:
            return b""
        if running and value.get("choices"):
            del value["usage"]
            return data(value)
        return found[0]

    return re.sub(rb"data: ([^\n]+)\n\n", event, stream)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_usage_that_the_client_did_not_ask_for_is_hidden(dialect: str) -> None:
    for operation in [CHAT, TEXT]:
        for running in [True, False]:
            for size in [1, 100, 100_000]:
                stream = b"".join(simulated(operation, dialect, usage=True, running=running))
                meter = events(operation, continuous=running, hide_usage=True, hide_running=running)
                given = b"".join(map(meter.feed, cut(stream, range(size, len(stream), size))))
                assert given == without(stream, running=running)
                # llama.cpp tells usage of a text with the reason to finish, whoever asks.
                told = (operation, dialect, running) == (TEXT, "llamacpp", False)
                assert (given == stream, b'"usage":{' in given) == (told, told)
                assert uncached(meter.usage(True)) == USED


def test_usage_stays_for_who_asked_for_it_at_the_end_only() -> None:
    frames = simulated(CHAT, usage=True, running=True)
    meter = events(continuous=True, hide_running=True)
    assert b"".join(map(meter.feed, frames)) == without(b"".join(frames), running=True, extra=False)
    assert meter.usage(True) == USED


def test_same_object_comes_back_while_nothing_changes() -> None:
    contents = [
        chunk(), chunk() + DONE, b": a\n\n", chunk(usage=usage()), data({"choices": []}),
    ]  # fmt: skip
    meter = events(hide_usage=True)
    for content in contents:
        assert meter.feed(content) is content
        assert not meter.holds
    assert [meter.feed(part) for part in (b"data: 1", b"\n", b"\n", b"")] == [b"", b"", b"data: 1\n\n", b""]
    assert meter.feed(last()) == b""
    assert meter.feed(chunk() + last() + DONE) == chunk() + DONE
    assert meter.feed(b"data: 2") == b""
    assert meter.holds
    assert (meter.close(), meter.holds, meter.close()) == (b"data: 2", False, b"")


def test_passive_meter_holds_nothing_back() -> None:
    meter = events()
    for content in (last()[:30], last()[30:50]):
        assert meter.feed(content) is content
        assert meter.holds
    assert meter.close() == b""
    assert not Metering(OPERATIONS[CHAT], continuous=True).changes
    assert Metering(OPERATIONS[CHAT], hide_usage=True).changes
    assert Metering(OPERATIONS[CHAT], hide_running=True).changes


@pytest.mark.parametrize(
    ("frame", "hidden"),
    [
        ('{"usage":%,"choices":[{"text":"a"}]}', '{"choices":[{"text":"a"}]}'),
        ('{"id":1,"usage":%,"choices":[{"text":"a"}]}', '{"id":1,"choices":[{"text":"a"}]}'),
        ('{"choices":[{"text":"a"}],"usage":%}', '{"choices":[{"text":"a"}]}'),
        ('{ "usage" : % , "choices":[{"text":"a"}] }', '{  "choices":[{"text":"a"}] }'),
        ('{ "id" : 1 , "usage" : % , "choices":[{"text":"a"}] }', '{ "id" : 1  , "choices":[{"text":"a"}] }'),
        ('{"choices":[{"text":"a"}] ,\t"usage"\t:% }', '{"choices":[{"text":"a"}]  }'),
        ('{"x":{"usage":%},"choices":[{"text":"\\"usage\\":{}"}],"usage":%}',
         '{"x":{"usage":%},"choices":[{"text":"\\"usage\\":{}"}]}'),
        ('{"choices":[{"text":"a","usage":%}]}', '{"choices":[{"text":"a","usage":%}]}'),
        ('{"choices":[{"text":"a"}],"usage":null}', '{"choices":[{"text":"a"}]}'),
        ('{ "usage" : null , "choices":[]}', '{  "choices":[]}'),
        ('{"x":{"usage":null},"choices":[{"text":"a"}],"usage":null}', '{"x":{"usage":null},"choices":[{"text":"a"}]}'),
        ('{"choices":[{"text":"a","usage":null}]}', '{"choices":[{"text":"a","usage":null}]}'),
    ],
)  # fmt: skip
def test_running_usage_is_cut_out_and_every_other_byte_stays(frame: str, hidden: str) -> None:
    for value in ['{"prompt_tokens":1}', "{ }", '{"a":{"b":{"c":1}},"prompt_tokens_details":{"cached_tokens":0}}']:
        meter = events(continuous=True, hide_usage=True, hide_running=True)
        event, expected = (f"data: {text.replace('%', value)}\n\n".encode() for text in (frame, hidden))
        assert meter.feed(event) == expected
        json.loads(expected[6:])


JSON = st.recursive(
    st.none() | st.integers() | st.text('a"\\{}:,', max_size=6),
    lambda below: st.lists(below, max_size=3) | st.dictionaries(st.sampled_from(["usage", "a", "choices"]), below),
    max_leaves=12,
)


@examples(300)
@given(
    st.dictionaries(st.sampled_from(["id", "x", "delta", 'q"{']), JSON),
    st.dictionaries(st.sampled_from(["prompt_tokens", "usage", "a"]), st.integers(0, 9) | st.none()),
    st.booleans(),
    st.randoms(),
)
def test_any_chunk_loses_its_usage_as_a_parser_would_take_it(
    members: dict[str, Any], value: dict[str, Any], spaced: bool, random: Any
) -> None:
    members = members | {"usage": value, "choices": [{"index": 0, "delta": {"content": SAID}}]}
    items = list(members.items())
    random.shuffle(items)
    text = json.dumps(dict(items), separators=None if spaced else (",", ":")).encode()
    given = events(continuous=True, hide_usage=True, hide_running=True).feed(b"data: " + text + b"\n\n")
    assert list(json.loads(given[6:]).items()) == [item for item in items if item[0] != "usage"]


# --- what is too long


@pytest.mark.parametrize("size", [1000, 65_536, 10**7])
def test_event_too_long_to_be_held_goes_on_and_its_usage_is_read(size: int) -> None:
    for end in [b"\n\n", b"\r\n\r\n", b"\r\r"]:
        long = (
            b'data: {"choices":[{"text":"' + b"x" * (MAX_HELD_BYTES + 9000) + b'"}],"usage":{"prompt_tokens":3}}' + end
        )
        after = (last(usage=usage(12, 1)) + chunk()).replace(b"\n\n", end)
        meter = events(hide_usage=True)
        given = [meter.feed(part) for part in cut(long + after, range(size, len(long + after), size))]
        assert b"".join(given) == long + chunk().replace(b"\n\n", end)
        assert meter.usage(True) == Usage(12, 1, source=FINAL)
        meter = events(hide_running=True)
        for part in cut(long, range(size, len(long), size)):
            meter.feed(part)
        assert meter.usage(False) == Usage(3, 0, source=RUNNING)
        assert not meter.holds


def test_what_is_too_long_does_not_depend_on_the_reads() -> None:
    for length in range(MAX_HELD_BYTES - 4, MAX_HELD_BYTES + 4):
        event = last(x="")
        event = last(x="x" * (length - len(event)))
        mode = MODES[2]
        expected = outcome(CHAT, mode, [event])
        assert expected[0] == (b"" if length < MAX_HELD_BYTES else event)
        for positions in ([5], [length - 2], [length - 1], [5, length - 3]):
            assert outcome(CHAT, mode, cut(event, positions))[:2] == expected[:2]
        assert outcome(CHAT, mode, [event + DONE])[0] == expected[0] + DONE


@pytest.mark.parametrize("length", [10, MAX_HELD_BYTES])
def test_usage_at_the_top_of_an_event_counts_however_long_it_is(length: int) -> None:
    """An object of that name that stands deeper, or in a text, is the caller's own."""
    own = {"usage": usage(1, 1), "x": '"usage":{"prompt_tokens":1}', "choices": [{"index": 0, "usage": None}]}
    for long in ({"x": "x" * length}, {"x": [own] * (length // 50)}):
        for members in (own | long | {"y": own, "usage": usage(), "z": {"usage": {}}}, {"usage": usage()} | long):
            event = data(members | {"choices": [{"index": 0, "delta": {}}]})
            for size in (10**7, 65_536, 1400):
                parts = cut(event, range(size, len(event), size))
                for mode in MODES[:2]:
                    meter = fed(events(**mode), parts)
                    assert meter.usage(True) == USED
                    assert meter.usage(False) == msgspec.structs.replace(USED, source=RUNNING)


def test_end_of_a_long_event_may_be_the_end_of_the_stream() -> None:
    for hide in (True, False):
        meter = events(hide_usage=hide)
        event = b'data: {"text":"' + b"x" * MAX_HELD_BYTES + b'","usage":{"total_tokens":3}}'
        assert b"".join(map(meter.feed, cut(event, [5, 90_000, 10**6]))) + meter.close() == event
        assert meter.usage(False).prompt_tokens == 3


def test_usage_among_many_of_its_name_is_taken_out_with_one_look(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []
    monkeypatch.setattr(chunks, "decoded", lambda decoder, event: looks.append(1) or decoded(decoder, event))
    for many in (b'"usage":null,' * 1000, b'"usage":{},' * 1000):
        own = b'"choices":[{"index":0,"delta":{"content":"a","x":{%b"y":1}}}]' % many
        event = b'data: {%b,"usage":{"prompt_tokens":3}}\n\n' % own
        meter = events(continuous=True, hide_usage=True, hide_running=True)
        assert meter.feed(event) == b"data: {%b}\n\n" % own
        assert meter.usage(False).prompt_tokens == 3
    assert len(looks) == 4, "each event is read, and once more without its usage"


def test_comments_and_empty_lines_are_passed_over_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    monkeypatch.setattr(chunks, "decoded", lambda decoder, event: reads.append(event) or decoded(decoder, event))
    silence = b":\n\n" * 1000 + b"\n" * 1000 + b"\r\n" * 1000 + b": a\r: b\r\r" * 1000
    for size in (10**6, 7):
        meter = events(hide_usage=True)
        stream = silence + chunk() + silence + chunk()
        assert b"".join(map(meter.feed, cut(stream, range(size, len(stream), size)))) == stream
        assert meter.usage(False).completion_tokens == 2
    assert len(reads) < 10 + 2 * len(silence) // 7


def test_data_that_is_no_json_costs_no_scan_each(monkeypatch: pytest.MonkeyPatch) -> None:
    scans = []
    monkeypatch.setattr("edge.metering.events.Scanner", lambda *names: scans.append(1) or Scanner(*names))
    for odd in (b'data: {"a\n\n', b"data:1\n\n", b'data: {"aaaaaa\n\n'):
        meter = fed(events(), [odd * 1000])
        assert meter.usage(True).completion_tokens == 1000
    assert 0 < len(scans) < 100


@pytest.mark.parametrize("operation", [CHAT, MESSAGES, RESPONSES])
def test_error_that_is_long_is_one(operation: str) -> None:
    error = b'data: {"error":{"message":"%b"}}\n\n' % (b"x" * MAX_HELD_BYTES)
    assert fed(events(operation), [error]).failed


def test_little_is_kept_of_what_is_long() -> None:
    meters = [
        events,
        lambda: events(RESPONSES),
        lambda: events(hide_usage=True),
        document,
        lambda: document("images/edits"),
    ]
    tracemalloc.start()
    try:
        for new in meters:
            meter = new()
            meter.feed(b'data: {"x":"')
            for _ in range(300):
                meter.feed(bytes(32_768))
            assert tracemalloc.get_traced_memory()[0] < 4 * MAX_VALUE_BYTES
        assert tracemalloc.get_traced_memory()[1] < 4 * MAX_VALUE_BYTES
    finally:
        tracemalloc.stop()


# --- answers that are no streams


def answer(operation: str, dialect: Any = "vllm", **ask: Any) -> bytes:
    return orjson.dumps(dialects.DOCUMENTS[f"/v1/{operation}"](Ask(**ask), question(dialect)))


@pytest.mark.parametrize("operation", [CHAT, TEXT, MESSAGES, RESPONSES])
def test_document_used_what_its_server_says(operation: str) -> None:
    for dialect in DIALECTS:
        content = answer(operation, dialect)
        for parts in ([content], cut(content, range(1, len(content))), [b"", content, b"\n"]):
            meter = document(operation)
            assert all(meter.feed(part) is part for part in parts)
            assert [uncached(meter.usage(whole)) for whole in (True, False)] == [USED, USED]
            assert (meter.close(), meter.holds, meter.failed, meter.ending, meter.passed) == (b"", False, False, b"", 0)


@pytest.mark.parametrize("operation", ["embeddings", "rerank", "score"])
def test_vectors_and_ranks_cost_their_prompt(operation: str) -> None:
    content = answer(operation)
    assert fed(document(operation), [content]).usage(True) == Usage(12, 0, source=FINAL)
    assert fed(document(operation), [content[:-60]]).usage(False) == Usage(7, 0, source=ESTIMATED)
    assert fed(document(operation), [b"{}"]).usage(True) == Usage(7, 0, source=ESTIMATED)
    total = b'{"results":[],"usage":{"total_tokens":9}}'
    assert fed(document(operation), [total]).usage(True) == Usage(9, 0, source=FINAL)


@pytest.mark.parametrize("operation", [CHAT, TEXT, MESSAGES, RESPONSES])
def test_document_without_usage_is_guessed_from_its_size(operation: str) -> None:
    assert fed(document(operation), [b'{"choices":[]}'] * 4).usage(True) == Usage(7, 14, source=ESTIMATED)
    assert fed(document(operation), [b"<html>"]).usage(True) == Usage(7, 1, source=ESTIMATED)


@pytest.mark.parametrize("operation", [CHAT, "embeddings", "audio/speech", "tokenize", "images/edits", "new/operation"])
def test_nothing_is_used_by_a_document_that_did_not_come(operation: str) -> None:
    for whole in (True, False):
        assert document(operation).usage(whole) == NO_USAGE
        assert fed(document(operation), [b""]).usage(whole) == NO_USAGE


@pytest.mark.parametrize("operation", ["tokenize", "detokenize", "audio/transcriptions", "new/operation"])
def test_other_answers_use_nothing_that_they_do_not_tell_of(operation: str) -> None:
    for content in (b"\xff\xfb\x90", b'{"text":"a","usage":{"seconds":null}}', b'a "usage":{"total_tokens":1}'):
        for whole in (True, False):
            assert fed(document(operation), [content]).usage(whole) == NO_USAGE


def test_transcript_used_the_tokens_that_it_tells_of() -> None:
    content = b'{"text":"a","usage":{"type":"tokens","input_tokens":12,"output_tokens":5,"total_tokens":17}}'
    assert fed(document("audio/transcriptions"), [content]).usage(True) == USED
    stream = [
        data({"type": "transcript.text.delta", "delta": "a"}),
        data({"type": "transcript.text.done"} | json.loads(content)),
    ]
    assert read(stream, "audio/transcriptions") == USED
    assert read(stream[:1], "audio/transcriptions") == NO_USAGE


@pytest.mark.parametrize(
    ("value", "used"),
    [
        ({"type": "duration", "seconds": 12}, Usage(units=12, unit="seconds")),
        ({"type": "duration", "seconds": 11.2}, Usage(units=12, unit="seconds")),
        ({"type": "duration", "seconds": 0}, NO_USAGE),
        ({"type": "duration", "seconds": "12"}, NO_USAGE),
        ({"type": "duration", "seconds": -1}, NO_USAGE),
        ({"characters": 24}, Usage(units=24, unit="characters")),
        (usage(seconds=3), Usage(12, 5, units=3, unit="seconds")),
    ],
)
def test_sound_used_the_seconds_or_characters_that_its_answer_tells_of(value: dict[str, Any], used: Usage) -> None:
    if used is not NO_USAGE:
        used = msgspec.structs.replace(used, source=FINAL)
    content = orjson.dumps({"text": "a", "usage": value})
    assert fed(document("audio/transcriptions"), [content]).usage(True) == used
    done = data({"type": "transcript.text.done", "text": "a", "usage": value})
    assert read([data({"type": "transcript.text.delta", "delta": "a"}), done], "audio/transcriptions") == used


@pytest.mark.parametrize("operation", [CHAT, TEXT])
def test_document_without_usage_used_what_its_timings_count(operation: str) -> None:
    timings = {"cache_n": 8, "prompt_n": 4, "prompt_ms": 1.5, "predicted_n": 5, "predicted_ms": 9.25}
    content = orjson.dumps({"choices": [], "timings": timings})
    assert fed(document(operation), [content]).usage(True) == Usage(12, 5, 8, source=FINAL)
    both = orjson.dumps({"choices": [], "usage": usage(9, 3), "timings": timings})
    assert fed(document(operation), [both]).usage(True) == Usage(9, 3, source=FINAL)
    for odd in ({"timings": {"prompt_n": 4}}, {"timings": None}, {"timings": {"prompt_n": -1, "predicted_n": 1}}):
        assert fed(document(operation), [orjson.dumps(odd)]).usage(True).source is ESTIMATED


def test_document_that_is_cut_used_what_it_told_before() -> None:
    content = b'{"usage":{"prompt_tokens":12,"completion_tokens":5},"choices":[{"text":"aaaa'
    assert fed(document(), [content]).usage(False) == Usage(12, 5, source=RUNNING)
    lone = b'{"choices":[{"text":"\\ud83d"}],"usage":{"prompt_tokens":12,"completion_tokens":5}}'
    assert fed(document(), [lone]).usage(True) == USED


VECTORS = b'"data":[' + b",".join([b'{"embedding":[' + b"0.125," * 1000 + b"1]}"] * 400) + b"]"
OWN = b'"metadata":{"usage":{"prompt_tokens":1},"text":"\\"usage\\":{\\"prompt_tokens\\":2}"}'
SHORT_USAGE = b'"usage":{"prompt_tokens":12,"total_tokens":12}'


@pytest.mark.parametrize("size", [1400, 65_536, MAX_DOCUMENT_BYTES, 10**8])
@pytest.mark.parametrize("at", [0, 1, 2], ids=["in front", "between", "behind"])
def test_usage_is_found_anywhere_in_a_document_of_any_length(size: int, at: int) -> None:
    """llama.cpp has it in front of the vectors, vLLM between an answer and the log probabilities of its prompt."""
    members = [VECTORS, OWN, VECTORS.replace(b"data", b"more")]
    content = b"{" + b",".join([*members[:at], SHORT_USAGE, *members[at:]]) + b"}"
    assert len(content) > 4 * MAX_DOCUMENT_BYTES
    parts = cut(content, range(size, len(content), size))
    assert fed(document("embeddings"), parts).usage(True) == Usage(12, 0, source=FINAL)
    assert fed(document("embeddings"), parts).usage(False) == Usage(12, 0, source=RUNNING)


@pytest.mark.parametrize("size", [1400, 65_536, 10**8])
def test_what_the_caller_wrote_is_no_usage_wherever_the_document_is_cut(size: int) -> None:
    content = b"{" + b",".join([OWN, VECTORS, OWN.replace(b"metadata", b"more"), SHORT_USAGE]) + b"}"
    for short in (content[:-1], content[: len(OWN) - 5], content[: len(OWN) + 100], content[:-80]):
        parts = cut(short, range(size, len(short), size))
        assert fed(document("embeddings"), parts).usage(False) == Usage(7, 0, source=ESTIMATED)
        assert fed(document(), parts).usage(True) == Usage(7, len(short) // 4, source=ESTIMATED)


def test_timings_of_a_long_document_count() -> None:
    content = b'{"timings":{"prompt_n":12,"predicted_n":5},' + VECTORS + b"}"
    assert fed(document(), cut(content, range(65_536, len(content), 65_536))).usage(True) == USED


# --- images


@pytest.mark.parametrize("size", [1, 7, 1400, 10**8])
def test_images_of_a_stream_are_counted_however_long_they_are(size: int) -> None:
    for operation in ["generation", "edit"]:
        done = f"image_{operation}.completed"
        image = "QUJD" * (MAX_HELD_BYTES // 4 if size > 1000 else 4)
        frames = [
            b"event: %b\n" % done.encode() + data({"type": done, "b64_json": image}),
            data({"type": f"image_{operation}.partial_image", "b64_json": "QUJD"}),
            data({"b64_json": "QUJD", "type": done, "usage": {"input_tokens": 12, "output_tokens": 5}}),
        ]
        content = b"".join(frames)
        parts = cut(content, range(size, len(content), size))
        assert read(parts, "images/generations") == Usage(12, 5, units=2, unit="images", source=FINAL)
        assert read(parts, "images/generations", whole=False).units == 2


@pytest.mark.parametrize("operation", ["images/generations", "images/edits"])
def test_images_are_counted(operation: str) -> None:
    for n in [1, 3]:
        content = answer(operation, n=n)
        assert fed(document(operation), [content]).usage(True) == Usage(units=n, unit="images", source=FINAL)
        assert fed(document(operation), [content]).usage(False) == Usage(units=n, unit="images", source=RUNNING)
        assert fed(document(operation), [content[:-4]]).usage(False) == Usage(units=n, unit="images", source=RUNNING)
        told = content[:-1] + b',"usage":{"input_tokens":12,"output_tokens":5}}'
        assert fed(document(operation), [told]).usage(True) == Usage(12, 5, units=n, unit="images", source=FINAL)


@pytest.mark.parametrize("content", [b'{"data":[]}', b'{"data":null}', b"{}", b'{"error":{"message":"a"}}', b"x"])
def test_answer_without_an_image_used_nothing(content: bytes) -> None:
    assert fed(document("images/generations"), [content]).usage(True) == NO_USAGE


@pytest.mark.parametrize("size", [1, 7, 1400, MAX_DOCUMENT_BYTES + 1, 10**8])
def test_large_images_are_counted_as_they_pass(size: int) -> None:
    """An answer of 1 MiB is an everyday image; it is not kept."""
    for member in ['"b64_json":"%s"', '"b64_json": "%s", "url": null', '"url":"data:%s"']:
        first = "QUJD" * (MAX_DOCUMENT_BYTES // 4)
        images = ",".join("{" + member.replace("%s", text) + "}" for text in (first, "QUJD", "QUJD"))
        content = f'{{"created":1,"data":[{images}],"usage":{{"input_tokens":12,"output_tokens":5}}}}'.encode()
        positions = range(max(size, len(content) - 400 * size), len(content), size)
        parts = cut(content, positions)
        assert fed(document("images/generations"), parts).usage(True) == Usage(
            12, 5, units=3, unit="images", source=FINAL
        )


@pytest.mark.parametrize("empty", [b"data:\n\n", b"data: \n\n", b"data:  \r\n\r\n", b"data:\r\r"])
def test_data_that_is_empty_is_no_event(empty: bytes) -> None:
    """Servers send it to keep a connection: it is no token, and a stream that has ended stays whole."""
    stop = data({"type": "message_stop"})
    for operation, ending in ((CHAT, DONE), (MESSAGES, stop)):
        for parts in ([ending + empty], [ending, empty], [ending + empty[:3], empty[3:]]):
            meter = fed(events(operation), parts)
            assert (meter.ended, meter.is_half()) == (True, False), (operation, parts)
    error = data({"error": {"message": "x"}})
    assert fed(events(), [error + empty]).failed
    for parts in ([chunk() + empty + chunk()], [chunk(), empty, chunk()]):
        assert read(parts).completion_tokens == 2
