"""How long an answer may be: the request's limit and the context, by the rules of each engine."""

from typing import Any

import pytest

from edge.simulator.behaviour import Behaviour
from tests.simulator.asking import CHAT, COMPLETIONS, MESSAGES, RESPONSES, ask, asked, simulating

LIMITS: list[tuple[str, str, dict[str, Any], int, str]] = [
    ("vllm", CHAT, {"max_tokens": 2}, 2, "length"),
    ("vllm", CHAT, {"max_tokens": 2, "max_completion_tokens": 3}, 3, "length"),
    ("vllm", CHAT, {"max_output_tokens": 2}, 16, "stop"),
    ("vllm", COMPLETIONS, {"max_tokens": 2, "max_completion_tokens": 3}, 2, "length"),
    ("vllm", CHAT, {"max_tokens": 1_000}, 16, "stop"),
    ("sglang", CHAT, {"max_tokens": 0}, 0, "length"),
    ("sglang", CHAT, {"max_completion_tokens": 3, "max_tokens": 2}, 3, "length"),
    ("llamacpp", CHAT, {"max_tokens": 0}, 1, "length"),
    ("llamacpp", COMPLETIONS, {"max_tokens": 0}, 1, "length"),
    ("llamacpp", CHAT, {"max_tokens": -1}, 16, "stop"),
    ("openai", CHAT, {"max_completion_tokens": 3}, 3, "length"),
]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(("dialect", "path", "body", "tokens", "finish"), LIMITS)
async def test_limit_of_tokens_is_kept_as_the_engine_keeps_it(
    dialect: Any, path: str, body: dict[str, Any], tokens: int, finish: str, stream: bool
) -> None:
    """None of llama.cpp is one token; of SGLang's chat it is none."""
    async with simulating(Behaviour(dialect=dialect)) as simulator:
        answer = await ask(simulator, body | {"stream": stream}, path)
        assert simulator.requests[0].tokens == tokens
    choices = [each["choices"][0] for each in (answer.events if stream else [answer.json])]
    assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]] == [finish]


@pytest.mark.parametrize("path", [RESPONSES, MESSAGES])
async def test_limit_has_a_name_in_every_api(path: str) -> None:
    body = {"max_output_tokens": 2} if path == RESPONSES else {"max_tokens": 2}
    assert (await asked("vllm", body, path)).json["usage"]["output_tokens"] == 2


CONTEXT: list[tuple[str, str, dict[str, Any], int, int, str | None, dict[str, Any]]] = [
    ("vllm", CHAT, {}, 1025, 0,
     "This model's maximum context length is 1024 tokens. However, your prompt contains at least 1025 input tokens, "
     "which exceeds this limit even without any output tokens. Please reduce the length of the input prompt. "
     "(parameter=input_tokens, value=1025)", {"type": "BadRequestError", "param": "input_tokens"}),
    ("vllm", COMPLETIONS, {"max_tokens": 1025}, 1, 0,
     "max_tokens=1025 cannot be greater than max_model_len=1024. Please request fewer output tokens. "
     "(parameter=max_tokens, value=1025)", {"type": "BadRequestError", "param": "max_tokens"}),
    ("vllm", RESPONSES, {"max_output_tokens": 1025}, 1, 0,
     "max_output_tokens=1025 cannot be greater than max_model_len=1024. Please request fewer output tokens. "
     "(parameter=max_output_tokens, value=1025)", {"param": "max_output_tokens"}),
    ("vllm", CHAT, {"max_tokens": 1000}, 1020, 4, None, {}),
    ("sglang", CHAT, {}, 1024, 0, "The input (1024 tokens) is longer than the model's context length (1024 tokens).",
     {"type": "BadRequestError", "param": None}),
    ("sglang", CHAT, {"max_tokens": 1025}, 1, 0,
     "max_completion_tokens is too large: 1025.This model supports at most 1024 completion tokens.",
     {"type": "BadRequestError"}),
    ("sglang", COMPLETIONS, {"max_tokens": 1020}, 5, 0,
     "Requested token count exceeds the model's maximum context length of 1024 tokens. You requested a total of 1025 "
     "tokens: 5 tokens from the input messages and 1020 tokens for the completion. Please reduce the number of tokens "
     "in the input messages or the completion to fit within the limit.", {"type": "BadRequestError"}),
    ("sglang", RESPONSES, {}, 1024, 0,
     "The input (1024 tokens) is longer than the model's context length (1024 tokens).",
     {"type": "invalid_request_error"}),
    ("sglang", CHAT, {}, 1018, 4, None, {}),
    ("llamacpp", CHAT, {}, 1024, 0,
     "request (1024 tokens) exceeds the available context size (1024 tokens), try increasing it",
     {"type": "exceed_context_size_error", "n_prompt_tokens": 1024, "n_ctx": 1024}),
    ("llamacpp", MESSAGES, {}, 1024, 0,
     "request (1024 tokens) exceeds the available context size (1024 tokens), try increasing it",
     {"type": "exceed_context_size_error"}),
    ("llamacpp", CHAT, {"max_tokens": 5000}, 1020, 4, None, {}),
    ("openai", CHAT, {"max_tokens": 1000}, 100, 0,
     "This model's maximum context length is 1024 tokens. However, you requested 1100 tokens (100 in the messages, "
     "1000 in the completion). Please reduce the length of the messages or completion.",
     {"type": "invalid_request_error", "param": "messages", "code": "context_length_exceeded"}),
]  # fmt: skip


@pytest.mark.parametrize(("dialect", "path", "body", "prompt", "tokens", "said", "members"), CONTEXT)
async def test_context_bounds_prompt_and_answer_as_the_engine_does(
    dialect: Any,
    path: str,
    body: dict[str, Any],
    prompt: int,
    tokens: int,
    said: str | None,
    members: dict[str, Any],
) -> None:
    """vLLM 0.32 and llama.cpp shorten what does not fit, SGLang and OpenAI refuse it."""
    answer = await asked(dialect, body, path, prompt_tokens=prompt, context_length=1024)
    if said is None:
        assert answer.json["choices"][0]["finish_reason"] == "length"
        assert answer.json["usage"]["completion_tokens"] == tokens
    else:
        assert (answer.status, answer.error["message"]) == (400, said)
        assert {name: answer.error[name] for name in members} == members


# --- Request ids


@pytest.mark.parametrize(
    ("path", "stream", "prefix"),
    [
        (CHAT, True, "chatcmpl-"),
        (CHAT, False, "chatcmpl-"),
        (COMPLETIONS, True, "cmpl-"),
        (MESSAGES, False, "chatcmpl-"),
    ],
)
async def test_vllm_makes_the_id_of_an_answer_of_the_one_of_the_request(path: str, stream: bool, prefix: str) -> None:
    async with simulating(Behaviour(request_ids="answered")) as simulator:
        answer = await ask(simulator, {"stream": stream}, path, headers="x-request-id: abc\r\n")
        assert (answer.events[0] if stream else answer.json)["id"] == f"{prefix}abc"
        assert "x-request-id" not in answer.headers
        other = await ask(simulator, {"stream": stream}, path)
        assert (other.events[0] if stream else other.json)["id"] != f"{prefix}abc"


async def test_any_request_id_is_fine_and_ignored_by_default() -> None:
    async with simulating() as simulator:
        first, second = [
            await ask(simulator, {"stream": True}, headers=f"x-request-id: {each}\r\n") for each in ("req_1", "req_2")
        ]
    assert first.chunks == second.chunks


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ("x-request-id: req_0123456789abcdef\r\n", 400),
        ("x-request-id: 0b2f8f4c9d6e4c0f8a1b2c3d4e5f6071\r\n", 200),
        ("x-request-id: 0b2f8f4c-9d6e-4c0f-8a1b-2c3d4e5f6071\r\n", 200),
        ("", 200),
    ],
)
async def test_request_id_that_is_no_uuid_can_be_refused_without_a_word(headers: str, status: int) -> None:
    """As llama-cpp-python's middleware does."""
    async with simulating(Behaviour(request_ids="uuid")) as simulator:
        answer = await ask(simulator, {}, headers=headers)
    assert answer.status == status
    assert (answer.text == "") == (status == 400)
