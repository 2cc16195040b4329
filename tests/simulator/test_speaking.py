"""A simulated model whose text depends on its prompt: two that are asked alike say the same."""

from typing import Any

import pytest

from edge.simulator import speaking
from edge.simulator.behaviour import Behaviour
from tests.simulator.asking import CHAT, COMPLETIONS, ask, simulating

MESSAGES = [{"role": "user", "content": "hi there"}]
GREEDY: dict[str, Any] = {"model": "m", "messages": MESSAGES, "temperature": 0}
FLAGS = {"continue_final_message": True, "add_generation_prompt": False}
SPEAKS = {"text": "prompt", "tokens": 24}


async def said(dialect: str, path: str = CHAT, behaviour: dict[str, Any] | None = None, **body: Any) -> tuple[str, Any]:
    """The text of an answer, and its usage, of a server of its own."""
    async with simulating(Behaviour(dialect=dialect, **SPEAKS | (behaviour or {}))) as simulator:  # type: ignore[arg-type]
        answer = await ask(simulator, body, path)
    document = answer.json
    assert answer.status == 200, document
    choice = document["choices"][0]
    return choice["text"] if path == COMPLETIONS else choice["message"]["content"], document["usage"]


@pytest.mark.parametrize("dialect", ["vllm", "sglang", "llamacpp"])
async def test_whoever_goes_on_with_a_text_says_the_rest_of_it(dialect: str) -> None:
    whole, used = await said(dialect, **GREEDY)
    tokens = speaking.tokens_of(whole)
    assert len(tokens) == used["completion_tokens"] == 24
    for count in range(1, 24):
        partial = "".join(tokens[:count])
        messages = [*MESSAGES, {"role": "assistant", "content": partial}]
        rest, after = await said(dialect, **GREEDY | FLAGS | {"messages": messages})
        assert partial + rest == whole
        assert after["prompt_tokens"] == used["prompt_tokens"] + count
        assert after["completion_tokens"] == 24 - count


@pytest.mark.parametrize("dialect", ["vllm", "sglang", "llamacpp", "openai"])
async def test_a_text_completion_goes_on_from_its_prompt(dialect: str) -> None:
    body = {"model": "m", "temperature": 0}
    whole, _ = await said(dialect, COMPLETIONS, prompt="once upon", **body)
    partial = "".join(speaking.tokens_of(whole)[:9])
    rest, _ = await said(dialect, COMPLETIONS, prompt="once upon" + partial, **body)
    by_ids, _ = await said(dialect, COMPLETIONS, prompt=speaking.ids_of("once upon" + partial), **body)
    assert partial + rest == partial + by_ids == whole


@pytest.mark.parametrize(
    ("dialect", "flags", "goes_on"),
    [
        ("vllm", {}, False),
        ("vllm", {"continue_final_message": True}, None),
        ("vllm", {"add_generation_prompt": False}, False),
        ("sglang", {}, False),
        ("sglang", {"continue_final_message": True}, True),
        ("sglang", {"add_generation_prompt": False}, False),
        ("llamacpp", {}, True),
        ("llamacpp", {"continue_final_message": True}, None),
        ("llamacpp", {"add_generation_prompt": False}, True),
        ("openai", FLAGS, False),
    ],
)
async def test_each_engine_takes_the_flags_in_its_own_way(
    dialect: str, flags: dict[str, bool], goes_on: bool | None
) -> None:
    whole, _ = await said(dialect, **GREEDY)
    partial = "".join(speaking.tokens_of(whole)[:5])
    messages = [*MESSAGES, {"role": "assistant", "content": partial}]
    async with simulating(Behaviour(dialect=dialect, **SPEAKS)) as simulator:  # type: ignore[arg-type]
        answer = await ask(simulator, GREEDY | flags | {"messages": messages})
    if goes_on is None:
        assert answer.status == 400
    else:
        text = answer.json["choices"][0]["message"]["content"]
        assert (partial + text == whole) is goes_on


async def test_a_text_depends_on_the_prompt_the_weights_the_seed_and_chance() -> None:
    texts = [
        (await said("vllm", behaviour=behaviour, **GREEDY | more))[0]
        for behaviour, more in [
            ({}, {}),
            ({"weights": 1}, {}),
            ({}, {"messages": [{"role": "user", "content": "other"}]}),
            ({}, {"temperature": 1, "seed": 5}),
            ({}, {"temperature": 1, "seed": 5}),
            ({}, {"temperature": 1}),
            ({}, {"temperature": 1}),
        ]
    ]
    assert texts[3] == texts[4]
    assert len(set(texts)) == 6


@pytest.mark.parametrize("dialect", ["vllm", "sglang", "llamacpp"])
async def test_a_tokenizer_counts_what_the_model_counts(dialect: str) -> None:
    whole, used = await said(dialect, **GREEDY)
    async with simulating(Behaviour(dialect=dialect, **SPEAKS)) as simulator:  # type: ignore[arg-type]
        name = "content" if dialect == "llamacpp" else "prompt"
        text = (await ask(simulator, {name: whole}, "/tokenize")).json
        assert len(text["tokens"]) == 24
        if dialect != "llamacpp":
            prompt = (await ask(simulator, {"messages": MESSAGES}, "/tokenize")).json
            assert prompt["count"] == used["prompt_tokens"]


async def test_a_template_that_trims_says_something_else() -> None:
    whole, _ = await said("vllm", **GREEDY)
    messages = [*MESSAGES, {"role": "assistant", "content": "".join(speaking.tokens_of(whole)[:5])}]
    rest, _ = await said("vllm", behaviour={"trims": True}, **GREEDY | FLAGS | {"messages": messages})
    assert not whole.endswith(rest)


async def test_a_fault_of_a_name_meets_one_request_at_whichever_server() -> None:
    body = {"model": "m", "messages": MESSAGES, "simulate": {"fault": "error", "once": "this test"}}
    async with simulating() as one, simulating() as other:
        statuses = [(await ask(each, body)).status for each in (one, other, one)]
    assert statuses == [500, 200, 200]


def test_texts_of_tokens_are_forgotten_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speaking, "_MOST_TEXTS", 50)
    first, last = speaking.ids_of(" first"), [speaking.ids_of(f" last{number}") for number in range(60)]
    assert speaking.text_of(first) == "\ufffd"
    assert "".join(map(speaking.text_of, last[-50:])) == "".join(f" last{number}" for number in range(10, 60))
