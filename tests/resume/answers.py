"""Answers cut into chunks in any way, as two servers cut one answer."""

import json
import time
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

from edge.resume.rules import Question, question_in
from edge.resume.said import Said

HEAD = {"object": "chat.completion.chunk"}


def event(choices: list[dict[str, Any]], **more: Any) -> bytes:
    return b"data: %b\n\n" % json.dumps(HEAD | {"choices": choices} | more).encode()


def said_in(content: bytes) -> Said:
    said = Said()
    for _ in said.read(content):
        pass
    return said


def cpu_s(run: Callable[[], object]) -> float:
    """The CPU time that the quickest of five runs took."""
    taken = []
    for _ in range(5):
        began = time.thread_time()
        run()
        taken.append(time.thread_time() - began)
    return min(taken)


def question(members: dict[str, Any], *, is_chat: bool) -> Question:
    return question_in(json.dumps(members).encode(), is_chat=is_chat)


def delta(said: dict[str, Any], finish: str | None = None, index: int = 0, **more: Any) -> dict[str, Any]:
    return {"index": index, "delta": said, "finish_reason": finish, **more}


@st.composite
def _pieces(draw: st.DrawFn, text: str) -> list[str]:
    """A text in pieces, of which some are empty."""
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=6)))
    return [text[low:high] for low, high in zip([0, *cuts], [*cuts, len(text)], strict=True)]


@st.composite
def streams(draw: st.DrawFn, name: str, answer: dict[str, str]) -> list[bytes]:
    """The events of one answer of one server: thoughts, a text with logprobs, a tool's call, usage and the end."""
    own = {"id": name, "model": name, "created": len(name)}
    thought, text, arguments = answer["thought"], answer["text"], answer["arguments"]
    events = [event([delta({"role": "assistant", "content": ""})], **own)]
    events += [event([delta({"reasoning_content": piece})], **own) for piece in draw(_pieces(thought))]
    for piece in draw(_pieces(text)):
        logprobs = {"content": [{"token": each, "logprob": -0.5} for each in piece]}
        events.append(event([delta({"content": piece}, logprobs=logprobs)], **own))
    if arguments:
        call: dict[str, Any] = {"index": 0, "id": name, "type": "function", "function": {"name": "f", "arguments": ""}}
        events.append(event([delta({"tool_calls": [call]})], **own))
        for piece in draw(_pieces(arguments)):
            part = {"index": 0, "function": {"arguments": piece}}
            events.append(event([delta({"tool_calls": [part]})], **own))
    events.append(event([delta({}, "stop")], **own))
    events.append(event([], usage={"prompt_tokens": 9, "completion_tokens": 5, "total_tokens": 14}, **own))
    return [*events, b"data: [DONE]\n\n"]


TEXT = st.text("ab \n\u4f60", max_size=9)
ANSWERS = st.fixed_dictionaries({"thought": TEXT, "text": TEXT, "arguments": TEXT})
PAIRS = ANSWERS.flatmap(lambda answer: st.tuples(streams("first", answer), streams("second", answer)))
