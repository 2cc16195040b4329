"""What each engine says of a body that it cannot read, and of numbers that it does not take."""

from typing import Any

import pytest

from edge.simulator.behaviour import Behaviour
from tests.simulator.asking import CHAT, COMPLETIONS, RESPONSES, ask, asked, simulating

HOT = {"temperature": "hot"}
SGLANG_FOUND = (
    "{'type': 'float_parsing', 'loc': ('body', 'temperature'), 'msg': 'Input should be a valid number, unable to parse "
    "string as a number', 'input': 'hot'}"
)
SGLANG_PLACE = (
    '  File "/usr/local/lib/python3.12/dist-packages/sglang/srt/entrypoints/http_server.py", line 1870, in '
    "openai_v1_chat_completions\n    POST /v1/chat/completions"
)

TEXTS: list[tuple[str, dict[str, Any] | bytes, str, str | None, str | None]] = [
    ("vllm", HOT, "1 validation error:\n  {'type': 'float_parsing', 'loc': 'body.temperature', 'msg': 'Input should "
     "be a valid number, unable to parse string as a number', 'input': 'hot'}", "Bad Request", "body.temperature"),
    ("vllm", {"model": 3}, "1 validation error:\n  {'type': 'string_type', 'loc': 'body.model', 'msg': 'Input should "
     "be a valid string', 'input': '3'}", "Bad Request", "body.model"),
    ("vllm", {"stream_options": {"include_usage": "x"}}, "1 validation error:\n  {'type': 'bool_parsing', 'loc': "
     "'body.stream_options.include_usage', 'msg': 'Input should be a valid boolean, unable to interpret input', "
     "'input': 'x'}", "Bad Request", "body.stream_options.include_usage"),
    ("vllm", {"max_tokens": 1.5}, "1 validation error:\n  {'type': 'int_from_float', 'loc': 'body.max_tokens', 'msg': "
     "'Input should be a valid integer, got a number with a fractional part', 'input': '1.5'}", "Bad Request",
     "body.max_tokens"),
    ("vllm", b"{", "1 validation error:\n  {'type': 'json_invalid', 'loc': 'body.1', 'msg': 'JSON decode error', "
     "'input': '<dict of 0 items>', 'ctx': {'error': 'Expecting property name enclosed in double quotes'}}",
     "Bad Request", "body.1"),
    ("vllm", b"[]", "1 validation error:\n  {'type': 'model_attributes_type', 'loc': 'body', 'msg': 'Input should be "
     "a valid dictionary or object to extract fields from', 'input': '<list of 0 items>'}", "Bad Request", "body"),
    ("vllm", {"seed": "x" * 300}, f"'input': '{'x' * 200}...[truncated]'}}", "Bad Request", "body.seed"),
    ("sglang", HOT, f"1 validation error:\n  {SGLANG_FOUND}\n\n{SGLANG_PLACE} [{SGLANG_FOUND}]", "Bad Request", None),
    ("sglang", b"{", "{'type': 'json_invalid', 'loc': ('body', 1), 'msg': 'JSON decode error', 'input': {}, 'ctx': "
     "{'error': 'unexpected end of data'}}", "Bad Request", None),
    ("llamacpp", HOT, "Field 'temperature': [json.exception.type_error.302] type must be number, but is string",
     "invalid_request_error", None),
    ("llamacpp", {"stream_options": {"include_usage": "x"}}, "Field 'include_usage': [json.exception.type_error.302] "
     "type must be boolean, but is string", "invalid_request_error", None),
    ("llamacpp", b"{", "[json.exception.parse_error.101] parse error at line 1, column 2", "invalid_request_error",
     None),
    ("llamacpp", b"[]", "'messages' is required", "invalid_request_error", None),
    ("openai", HOT, "Invalid type for 'temperature': expected float, but got str instead.", "invalid_request_error",
     "temperature"),
    ("openai", b"{", "The body cannot be read", "invalid_request_error", None),
]  # fmt: skip


@pytest.mark.parametrize(("dialect", "body", "said", "kind", "param"), TEXTS)
async def test_wrong_body_is_told_in_the_words_of_the_engine(
    dialect: Any, body: dict[str, Any] | bytes, said: str, kind: str, param: str | None
) -> None:
    """SGLang's words hold a path of its own code, which no caller should see."""
    answer = await asked(dialect, body)
    assert answer.status == 400
    assert said in answer.error["message"]
    assert (answer.error["type"], answer.error.get("param")) == (kind, param)


async def test_bytes_that_are_no_text_are_not_parsed_at_all() -> None:
    answer = await asked("vllm", b"\xff{")
    assert (answer.status, answer.json) == (400, {"detail": "There was an error parsing the body"})


@pytest.mark.parametrize(("dialect", "status"), [("vllm", 200), ("sglang", 200), ("llamacpp", 400), ("openai", 400)])
async def test_numbers_as_texts_are_taken_by_servers_on_fastapi(dialect: Any, status: int) -> None:
    assert (await asked(dialect, {"max_tokens": "5"})).status == status


@pytest.mark.parametrize("dialect", ["vllm", "sglang"])
async def test_servers_on_fastapi_take_nothing_but_json(dialect: Any) -> None:
    async with simulating(Behaviour(dialect=dialect)) as simulator:
        answer = await ask(simulator, b"{}", headers="content-type: text/plain\r\n")
    assert (answer.status, answer.error["type"]) == (400, "Bad Request")
    assert "Unsupported Media Type: Only 'application/json' is allowed" in answer.error["message"]


async def test_llamacpp_does_not_look_at_the_content_type() -> None:
    async with simulating(Behaviour(dialect="llamacpp")) as simulator:
        assert (await ask(simulator, b"{}", headers="content-type: text/plain\r\n")).status == 200


NUMBERS: list[tuple[str, str, dict[str, Any], str | None]] = [
    ("vllm", CHAT, {"temperature": -1}, "temperature must be non-negative, got -1.0. (parameter=temperature, "
     "value=-1.0)"),
    ("vllm", CHAT, {"temperature": 5}, "temperature must be in [0, 2], got 5.0. (parameter=temperature, value=5.0)"),
    ("vllm", CHAT, {"top_p": 5}, "top_p must be in (0, 1], got 5.0. (parameter=top_p, value=5.0)"),
    ("sglang", CHAT, {"temperature": -1}, "temperature must be a non-negative finite number, got -1.0."),
    ("sglang", CHAT, {"temperature": 5}, None),
    ("sglang", CHAT, {"top_p": 5}, "top_p must be in (0, 1], got 5.0."),
    ("llamacpp", CHAT, {"temperature": -1, "top_p": 5}, None),
    ("vllm", CHAT, {"max_tokens": 0}, "max_tokens must be at least 1, got 0. (parameter=max_tokens, value=0)"),
    ("vllm", COMPLETIONS, {"max_tokens": -1}, "max_tokens must be at least 1, got -1. (parameter=max_tokens, "
     "value=-1)"),
    ("vllm", RESPONSES, {"max_output_tokens": 0}, "max_tokens must be at least 1, got 0. (parameter=max_tokens, "
     "value=0)"),
    ("vllm", "/v1/messages", {"max_tokens": 0}, "'msg': 'Value error, max_tokens must be positive', 'input': '0', "
     "'ctx': {'error': ValueError('max_tokens must be positive')}}"),
    ("sglang", CHAT, {"max_tokens": -1}, "max_new_tokens must be at least 0, got -1."),
    ("sglang", COMPLETIONS, {"max_tokens": 0}, "'msg': 'Value error, max_tokens must be positive', 'input': 0"),
    ("sglang", RESPONSES, {"max_output_tokens": 1}, "max_new_tokens must be at least 0, got -1."),
    ("openai", CHAT, {"max_tokens": 0}, "max_tokens must be at least 1, got 0."),
    ("vllm", CHAT, {"stream_options": {"include_usage": True}},
     "Stream options can only be defined when `stream=True`. (parameter=stream_options)"),
    ("sglang", CHAT, {"stream_options": {"include_usage": True}}, None),
]  # fmt: skip


@pytest.mark.parametrize(("dialect", "path", "body", "said"), NUMBERS)
async def test_number_out_of_range_is_refused_where_the_engine_refuses_it(
    dialect: Any, path: str, body: dict[str, Any], said: str | None
) -> None:
    answer = await asked(dialect, body, path)
    assert answer.status == (200 if said is None else 400)
    assert said is None or said in answer.error["message"]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"simulate": {"tokns": 3}}', "unknown tokns; use dialect"),
        (b'{"simulate": {"tokens": "3"}}', "simulate"),
        (b'{"simulate": 3}', "simulate"),
        (b'{"simulate": {"fault": "fire"}}', "fire"),
        (b'{"simulate": {"tokens": -1}}', "tokens must be between 0 and 100000"),
    ],
)
async def test_steering_that_makes_no_sense_is_400(body: bytes, said: str) -> None:
    """A test that steers by a misspelt name must not pass."""
    answer = await asked("vllm", body)
    assert answer.status == 400
    assert said in answer.error["message"]
