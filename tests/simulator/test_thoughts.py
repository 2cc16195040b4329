"""A model that thinks before it answers, and what each engine's parser tells of that."""

from typing import Any

import pytest

from edge.simulator.behaviour import Dialect, Refusal
from edge.simulator.questions import Question
from edge.simulator.thoughts import OPENS, goes_on, goes_on_thinking, message, told


def question(dialect: Dialect, *, thinks: bool | None = True) -> Question:
    return Question(dialect=dialect, model="m", tokens=3, finish="stop", prompt_tokens=1, thinks=thinks)


@pytest.mark.parametrize(("dialect", "name"), [("vllm", "reasoning"), ("sglang", "reasoning_content")])
def test_thoughts_have_a_place_of_their_own_and_their_end_has_none(dialect: Dialect, name: str) -> None:
    pieces = [("so", 1), ("</think>", 2), ("a", 3)]
    assert told(question(dialect), pieces) == [({name: "so"}, 1), ({"content": "a"}, 3)]
    assert told(question(dialect), [("so</think>a", 3)]) == [({name: "so", "content": "a"}, 3)]
    assert message(question(dialect), "so</think>a") == {name: "so", "content": "a"}
    assert told(question(dialect, thinks=False), [("b", 1)]) == [({"content": "b"}, 1)]
    assert told(question(dialect, thinks=None), pieces)[1] == ({"content": "</think>"}, 2)


@pytest.mark.parametrize(
    ("dialect", "text", "prompt", "thinks"),
    [
        ("sglang", "so", f"{OPENS}so", True),
        ("sglang", "so</think>a", f"{OPENS}so</think>a", False),
        ("vllm", "so", OPENS.removesuffix("<think>\n") + "so", True),
        ("llamacpp", "a", OPENS.removesuffix("<think>\n") + "<think></think>a", False),
    ],
)
def test_a_message_that_is_gone_on_with_is_read_as_its_engine_does(
    dialect: Dialect, text: str, prompt: Any, thinks: bool
) -> None:
    assert goes_on(dialect, text) == prompt
    assert goes_on_thinking(prompt) is thinks


def test_vllm_refuses_a_message_that_its_template_cuts() -> None:
    with pytest.raises(Refusal, match="does not appear"):
        goes_on("vllm", "so</think>a")
