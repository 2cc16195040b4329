"""The Messages API as each engine serves it: events, usage, errors, and the count of tokens."""

from typing import Any

import pytest

from edge.simulator.behaviour import Behaviour
from tests.simulator.asking import MESSAGES, ask, asked, compact, simulating

COUNT = "/v1/messages/count_tokens"


def without_id(event: dict[str, Any]) -> str:
    if event["type"] == "message_start":
        event["message"].pop("id")
    return compact(event)


STREAMS = [
    ("vllm", [
        '{"type":"message_start","message":{"type":"message","role":"assistant","content":[],"model":"m",'
        '"stop_reason":null,"stop_sequence":null,"usage":{"input_tokens":12,"output_tokens":0}}}',
        '{"type":"content_block_start","content_block":{"type":"text","text":""},"index":0}',
        '{"type":"content_block_delta","delta":{"type":"text_delta","text":" token0"},"index":0}',
        '{"type":"content_block_delta","delta":{"type":"text_delta","text":" token1"},"index":0}',
        '{"type":"content_block_stop","index":0}',
        '{"type":"message_delta","delta":{"stop_reason":"max_tokens","stop_sequence":null},'
        '"usage":{"input_tokens":12,"output_tokens":2}}',
        '{"type":"message_stop"}',
    ], [1] * 7),
    ("sglang", [
        '{"type":"message_start","message":{"type":"message","role":"assistant","content":[],"model":"m",'
        '"usage":{"input_tokens":12,"output_tokens":0}}}',
        '{"type":"content_block_start","index":0,"content_block":{"type":"text","text":""}}',
        '{"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":" token0"}}',
        '{"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":" token1"}}',
        '{"type":"content_block_stop","index":0}',
        '{"type":"message_delta","delta":{"stop_reason":"max_tokens"},"usage":{"output_tokens":2}}',
        '{"type":"message_stop"}',
    ], [1] * 7),
    ("llamacpp", [
        '{"type":"message_start","message":{"type":"message","role":"assistant","content":[],'
        '"model":"/models/simulated.gguf","stop_reason":null,"stop_sequence":null,'
        '"usage":{"cache_read_input_tokens":0,"input_tokens":12,"output_tokens":0}}}',
        '{"type":"content_block_start","index":0,"content_block":{"type":"text","text":""}}',
        '{"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":" token0"}}',
        '{"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":" token1"}}',
        '{"type":"content_block_stop","index":0}',
        '{"type":"message_delta","delta":{"stop_reason":"max_tokens","stop_sequence":null},'
        '"usage":{"output_tokens":2}}',
        '{"type":"message_stop"}',
    ], [3, 1, 3]),
]  # fmt: skip


@pytest.mark.parametrize(("dialect", "expected", "events_in_chunks"), STREAMS)
async def test_stream_of_a_message_has_the_events_of_its_engine(
    dialect: Any, expected: list[str], events_in_chunks: list[int]
) -> None:
    answer = await asked(dialect, {"model": "m", "stream": True, "max_tokens": 2}, MESSAGES)
    names = [line.removeprefix("event: ") for line in answer.text.splitlines() if line.startswith("event: ")]
    assert names == [event["type"] for event in answer.events]
    assert [without_id(event) for event in answer.events] == expected
    assert [chunk.count(b"event: ") for chunk in answer.chunks] == events_in_chunks


DOCUMENTS = [
    ("vllm", '{"type":"message","role":"assistant","content":[{"type":"text","text":" token0 token1"}],"model":"m",'
             '"stop_reason":"max_tokens","usage":{"input_tokens":12,"output_tokens":2}}', "chatcmpl-", 16),
    ("sglang", '{"type":"message","role":"assistant","content":[{"type":"text","text":" token0 token1"}],"model":"m",'
               '"stop_reason":"max_tokens","usage":{"input_tokens":12,"output_tokens":2}}', "msg_", 32),
    ("llamacpp", '{"type":"message","role":"assistant","content":[{"type":"text","text":" token0 token1"}],'
                 '"model":"/models/simulated.gguf","stop_reason":"max_tokens","stop_sequence":null,"usage":'
                 '{"cache_read_input_tokens":0,"input_tokens":12,"output_tokens":2}}', "chatcmpl-", 32),
]  # fmt: skip


@pytest.mark.parametrize(("dialect", "expected", "prefix", "length"), DOCUMENTS)
async def test_message_has_the_members_of_its_engine(dialect: Any, expected: str, prefix: str, length: int) -> None:
    message = (await asked(dialect, {"model": "m", "max_tokens": 2}, MESSAGES)).json
    message_id = message.pop("id")
    assert compact(message) == expected
    assert message_id.startswith(prefix)
    assert len(message_id.removeprefix(prefix)) == length


async def test_message_that_ends_by_itself_says_so() -> None:
    assert (await asked("sglang", {}, MESSAGES)).json["stop_reason"] == "end_turn"


@pytest.mark.parametrize(
    ("dialect", "expected"),
    [
        ("vllm", '{"input_tokens":12,"context_management":{"original_input_tokens":12}}'),
        ("sglang", '{"input_tokens":12}'),
        ("llamacpp", '{"input_tokens":12}'),
    ],
)
async def test_tokens_are_counted(dialect: Any, expected: str) -> None:
    assert (await asked(dialect, {"messages": []}, COUNT)).text == expected


# --- Errors

REFUSED: list[tuple[str, dict[str, Any], dict[str, Any], int, Any]] = [
    ("vllm", {"model": "other"}, {"served": ("mine",)}, 404,
     {"type": "error", "error": {"type": "NotFoundError",
                                 "message": "The model `other` does not exist. Valid aliases: mine."}}),
    ("vllm", {"max_tokens": "x"}, {}, 400,
     {"error": {"message": "1 validation error:\n  {'type': 'int_parsing', 'loc': 'body.max_tokens', 'msg': 'Input "
                           "should be a valid integer, unable to parse string as an integer', 'input': 'x'}",
                "type": "Bad Request", "param": "body.max_tokens", "code": 400}}),
    ("vllm", {"max_tokens": 40_000}, {}, 400,
     {"type": "error", "error": {"type": "BadRequestError", "message":
         "max_completion_tokens=40000 cannot be greater than max_model_len=32768. Please request fewer output tokens. "
         "(parameter=max_completion_tokens, value=40000)"}}),
    ("vllm", {}, {"fault": "error", "status": 503}, 503,
     {"type": "error", "error": {"type": "ServiceUnavailableError",
                                 "message": "The simulated engine failed with status 503."}}),
    ("sglang", {"max_tokens": "x"}, {}, 400,
     {"type": "error", "error": {"type": "invalid_request_error", "message":
         "max_tokens: Input should be a valid integer, unable to parse string as an integer"}}),
    ("sglang", {"max_tokens": 0}, {}, 400,
     {"type": "error", "error": {"type": "invalid_request_error",
                                 "message": "max_tokens: Value error, max_tokens must be positive"}}),
    ("sglang", {"max_tokens": 40_000}, {}, 400,
     {"type": "error", "error": {"type": "invalid_request_error", "message":
         "max_completion_tokens is too large: 40000.This model supports at most 32768 completion tokens."}}),
    ("sglang", {}, {"prompt_tokens": 40_000}, 400,
     {"type": "error", "error": {"type": "BadRequestError", "message":
         "The input (40000 tokens) is longer than the model's context length (32768 tokens)."}}),
    ("sglang", {}, {"fault": "error", "status": 503}, 503,
     {"type": "error", "error": {"type": "overloaded_error", "message": "Internal server error"}}),
    ("llamacpp", {}, {"fault": "error", "status": 503}, 503,
     {"error": {"code": 503, "message": "The simulated engine failed with status 503.", "type": "unavailable_error"}}),
    ("openai", {}, {}, 404,
     {"error": {"message": "Invalid URL (POST /v1/messages)", "type": "invalid_request_error", "param": None,
                "code": None}}),
]  # fmt: skip


@pytest.mark.parametrize(("dialect", "body", "behaviour", "status", "expected"), REFUSED)
async def test_refused_message_is_told_in_the_shape_of_its_engine(
    dialect: Any, body: dict[str, Any], behaviour: dict[str, Any], status: int, expected: Any
) -> None:
    """vLLM's own errors are as Anthropic's, those of its framework are not; llama.cpp's never are."""
    answer = await asked(dialect, body, MESSAGES, **behaviour)
    assert (answer.status, answer.json) == (status, expected)


FAILED = [
    ("vllm", 3, ["error"], '{"type":"error","error":{"type":"internal_error","message":"FAILED"}}'),
    ("sglang", 3, ["content_block_stop", "error", "message_stop"],
     '{"type":"error","error":{"type":"api_error","message":"FAILED"}}'),
    ("sglang", 1, ["error", "message_stop"], '{"type":"error","error":{"type":"api_error","message":"FAILED"}}'),
    ("llamacpp", 2, ["error"], '{"code":500,"message":"FAILED","type":"server_error"}'),
]  # fmt: skip


@pytest.mark.parametrize(("dialect", "after", "names", "error"), FAILED)
async def test_stream_of_a_message_that_fails_ends_as_its_engine_ends_it(
    dialect: Any, after: int, names: list[str], error: str
) -> None:
    answer = await asked(dialect, {"stream": True}, MESSAGES, fault="error_mid", after=after)
    tail = b"".join(answer.chunks[after:]).decode()
    assert [line.removeprefix("event: ") for line in tail.splitlines() if line.startswith("event: ")] == names
    assert error.replace("FAILED", "The simulated engine failed with status 500.") in tail


async def test_sglang_begins_the_stream_of_a_prompt_that_is_too_long() -> None:
    """As it was seen to: status 200, a start without tokens, the error, and the end of a message."""
    answer = await asked("sglang", {"stream": True}, MESSAGES, prompt_tokens=40_000)
    assert answer.status == 200
    assert [event["type"] for event in answer.events] == ["message_start", "error", "message_stop"]
    assert answer.events[0]["message"]["usage"] == {"input_tokens": 0, "output_tokens": 0}
    assert answer.events[1]["error"]["type"] == "invalid_request_error"


# --- Cached tokens

CACHED: list[tuple[str, Any, Any, Any]] = [
    ("vllm",
     {"input_tokens": 4, "output_tokens": 16, "cache_creation_input_tokens": 496, "cache_read_input_tokens": 0},
     {"input_tokens": 4, "output_tokens": 16, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 496},
     {"input_tokens": 500, "output_tokens": 0}),
    ("sglang",
     {"input_tokens": 500, "output_tokens": 16},
     {"input_tokens": 1, "output_tokens": 16, "cache_read_input_tokens": 499},
     {"input_tokens": 1, "output_tokens": 0, "cache_read_input_tokens": 499}),
    ("llamacpp",
     {"cache_read_input_tokens": 0, "input_tokens": 500, "output_tokens": 16},
     {"cache_read_input_tokens": 499, "input_tokens": 1, "output_tokens": 16},
     {"cache_read_input_tokens": 499, "input_tokens": 1, "output_tokens": 0}),
]  # fmt: skip


@pytest.mark.parametrize(("dialect", "first", "again", "started"), CACHED)
async def test_cached_tokens_are_no_input_tokens(dialect: Any, first: Any, again: Any, started: Any) -> None:
    """vLLM tells of its cache at the end of a stream only."""
    body = {"messages": [{"role": "user", "content": "x" * 63}]}
    behaviour = Behaviour(dialect=dialect, prompt_tokens=500, prefix_cache=True)
    async with simulating(behaviour) as simulator:
        assert (await ask(simulator, body, MESSAGES)).json["usage"] == first
        assert (await ask(simulator, body, MESSAGES)).json["usage"] == again
        events = (await ask(simulator, body | {"stream": True}, MESSAGES)).events
    assert events[0]["message"]["usage"] == started
    if dialect == "vllm":
        assert events[-2]["usage"] == again
