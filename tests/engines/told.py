"""The usage that an engine tells in an answer, for engines without counters of their own."""

import json
from collections.abc import Iterator
from typing import Any

from tests.engines.engine import Counts


def told(answer: bytes) -> Counts:
    """Return the last usage in an answer, a document or a stream; none is 0."""
    found = Counts()
    for value in _values(answer):
        response = value.get("response") or value
        usage = response.get("usage")
        if isinstance(usage, dict):
            found = _counts(usage)
    return found


def _values(answer: bytes) -> Iterator[dict[str, Any]]:
    lines = [line.removeprefix(b"data:") for line in answer.splitlines() if line.startswith(b"data:")]
    for line in lines or [answer]:
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            yield value


def _counts(usage: dict[str, Any]) -> Counts:
    prompt = usage.get("prompt_tokens", usage.get("input_tokens", 0))
    return Counts(prompt, 0, usage.get("completion_tokens", usage.get("output_tokens", 0)))
