"""Cached tokens: what each engine tells of a second turn, and where."""

from typing import Any

import pytest

from edge.simulator.behaviour import Behaviour
from tests.simulator.asking import CHAT, COMPLETIONS, RESPONSES, ask, simulating

FIRST = [{"role": "user", "content": "Tell me of the sea, and of those who sail on it."}]
SECOND = [*FIRST, {"role": "assistant", "content": "It is wide."}, {"role": "user", "content": "And deep?"}]
ASKED = {"include_usage": True}

# What a first turn of 640 tokens tells, and what the second; of the second, 80 bytes of 201 are known.
TURNS: list[tuple[str, Any, Any, Any]] = [
    ("vllm", {"cached_tokens": 0, "created_cache_tokens": 640, "multimodal_tokens": None},
     {"cached_tokens": 240, "created_cache_tokens": 400, "multimodal_tokens": None},
     {"cached_tokens": 240, "created_cache_tokens": 400}),
    ("sglang", {"cached_tokens": 0}, {"cached_tokens": 254}, {"cached_tokens": 254}),
    ("llamacpp", {"cached_tokens": 0}, {"cached_tokens": 254}, {"cached_tokens": 254}),
    ("openai", {"cached_tokens": 0}, {"cached_tokens": 0}, {"cached_tokens": 0}),
]  # fmt: skip


@pytest.mark.parametrize(("dialect", "first", "second", "streamed"), TURNS)
async def test_second_turn_tells_the_tokens_of_the_first(dialect: Any, first: Any, second: Any, streamed: Any) -> None:
    """vLLM in whole blocks; OpenAI only for prompts of 1,024 tokens and more."""
    behaviour = Behaviour(dialect=dialect, prompt_tokens=640, prefix_cache=True)
    details = []
    for stream in (False, True):
        async with simulating(behaviour) as simulator:
            for turn in (FIRST, SECOND):
                body = {"messages": turn, "stream": stream} | ({"stream_options": ASKED} if stream else {})
                answer = await ask(simulator, body)
                used = (answer.events[-1] if stream else answer.json)["usage"]
                details.append(used["prompt_tokens_details"])
    assert (details[0], details[1], details[3]) == (first, second, streamed)


async def test_openai_tells_steps_of_128() -> None:
    async with simulating(Behaviour(dialect="openai", prompt_tokens=2_000, prefix_cache=True)) as simulator:
        await ask(simulator, {"messages": FIRST})
        used = (await ask(simulator, {"messages": FIRST})).json["usage"]
    assert used["prompt_tokens_details"] == {"cached_tokens": 1_920}


@pytest.mark.parametrize(("dialect", "details"), [("vllm", None), ("sglang", None), ("llamacpp", {"cached_tokens": 0})])
async def test_without_a_cache_only_llamacpp_speaks_of_one(dialect: Any, details: Any) -> None:
    async with simulating(Behaviour(dialect=dialect)) as simulator:
        for _ in range(2):
            used = (await ask(simulator, {"messages": FIRST})).json["usage"]
            assert used["prompt_tokens_details"] == details


@pytest.mark.parametrize(("dialect", "cached"), [("vllm", 624), ("sglang", 639), ("llamacpp", 639)])
async def test_equal_prompt_leaves_a_token_to_read(dialect: Any, cached: int) -> None:
    """In every API."""
    async with simulating(Behaviour(dialect=dialect, prompt_tokens=640, prefix_cache=True)) as simulator:
        for path, name in ((COMPLETIONS, "prompt"), (RESPONSES, "input")):
            for _ in range(2):
                used = (await ask(simulator, {name: f"{path}: the sea"}, path)).json["usage"]
            details = used.get("prompt_tokens_details") or used["input_tokens_details"]
            assert details["cached_tokens"] == cached


async def test_text_of_vllm_tells_no_tokens_put_into_the_cache() -> None:
    async with simulating(Behaviour(prompt_tokens=640, prefix_cache=True)) as simulator:
        body = {"prompt": "the sea"}
        used = (await ask(simulator, body, COMPLETIONS)).json["usage"]["prompt_tokens_details"]
        assert used == {"cached_tokens": 0, "created_cache_tokens": None, "multimodal_tokens": None}
        streamed = await ask(simulator, body | {"stream": True, "stream_options": ASKED}, COMPLETIONS)
        assert streamed.events[-1]["usage"]["prompt_tokens_details"] == {"cached_tokens": 624}


async def test_timings_of_llamacpp_tell_what_was_read_and_what_was_kept() -> None:
    async with simulating(Behaviour(dialect="llamacpp", prompt_tokens=640, prefix_cache=True)) as simulator:
        told = [(await ask(simulator, {"messages": FIRST}, CHAT)).json["timings"] for _ in range(2)]
    assert [(each["cache_n"], each["prompt_n"]) for each in told] == [(0, 640), (639, 1)]
    assert [each["predicted_n"] for each in told] == [16, 16]
