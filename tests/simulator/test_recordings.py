"""The simulator against recordings of the engines: the same members, of the same types, in the same order."""

import json
from typing import Any, get_args

import pytest

from edge.simulator.behaviour import Dialect
from tests.recordings import ANSWERS, Recording
from tests.simulator.asking import asked

SIMULATED = [each for each in ANSWERS if each.engine in get_args(Dialect)]


def shape(value: Any) -> Any:
    """A value without what differs from answer to answer."""
    if isinstance(value, dict):
        return {name: shape(member) for name, member in value.items()}
    if isinstance(value, list):
        return [shape(element) for element in value[:1]]
    if isinstance(value, int | float):
        return "a number"
    return value if value is None else "a text"


def shapes(content: str) -> list[str]:
    """The shape of a document, or each shape among the events of a stream, in order."""
    data = [line.removeprefix("data: ") for line in content.splitlines() if line.startswith("data: ")]
    values = [each if each == "[DONE]" else json.dumps(shape(json.loads(each))) for each in data or [content]]
    return list(dict.fromkeys(values))


@pytest.mark.parametrize("recording", SIMULATED, ids=[each.name for each in SIMULATED])
async def test_simulator_says_what_the_engine_said(recording: Recording) -> None:
    """It may say more: an engine puts several tokens into a frame, or leaves a message's beginning out."""
    tells_cached = recording.engine == "vllm"  # it ran with the flag
    answer = await asked(recording.engine, recording.request, recording.path, tokens=50, prefix_cache=tells_cached)
    said, recorded = shapes(answer.text), shapes(recording.answer)
    assert [each for each in said if each in recorded] == recorded
    kinds = {name.lower(): value for name, value in answer.headers.items()}
    assert kinds["content-type"] == recording.content_type
