"""A behaviour that exists is valid, however it came to be."""

import argparse
from typing import Any

import pytest

from edge.commands.simulate import add_arguments, behaviour_from
from edge.simulator.behaviour import Behaviour, Refusal


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"fault": "fire"}, r"fault must be one of error, .*, not 'fire'"),
        ({"dialect": "cohere"}, "dialect must be one of vllm, sglang, llamacpp, openai"),
        ({"request_ids": "none"}, "request_ids must be one of any, uuid, answered"),
        ({"context_length": 0}, "context_length must be between 1 and 10000000"),
        ({"ping_ms": 0}, "ping_ms must be between 1 and"),
        ({"tokens": -1}, "tokens must be between 0 and 100000"),
        ({"status": 200}, "status must be between 400 and 599"),
    ],
)
def test_value_out_of_range_names_the_field_and_what_it_may_be(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Behaviour(**given)


def test_request_steers_what_it_names_and_nothing_else() -> None:
    behaviour = Behaviour(tokens=3, served=("a",))
    assert behaviour.steered(None) is behaviour
    assert behaviour.steered({"dialect": "sglang", "prefix_cache": True}) == Behaviour(
        dialect="sglang", tokens=3, served=("a",), prefix_cache=True
    )


@pytest.mark.parametrize("simulate", [{"tokns": 3}, {"tokens": "3"}, {"tokens": -1}])
def test_request_that_steers_wrongly_is_refused(simulate: dict[str, Any]) -> None:
    with pytest.raises(Refusal) as caught:
        Behaviour().steered(simulate)
    assert (caught.value.status, caught.value.param) == (400, "simulate")
    assert caught.value.message.startswith("simulate: ")


def test_command_sets_what_an_engine_is_started_with() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    words = (
        "--context-length 1024 --prefix-cache --only-chat --uneven --request-ids uuid --ttft 0s --rate 0 --tokens 16"
    )
    assert behaviour_from(parser.parse_args(words.split())) == Behaviour(
        context_length=1_024, prefix_cache=True, only_chat=True, uneven=True, request_ids="uuid"
    )
