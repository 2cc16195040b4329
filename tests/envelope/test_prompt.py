"""Where the messages of a prompt end, and what of a body an engine has read before."""

import json
import sys
from typing import Any

import pytest

from edge.envelope import json as envelopes
from edge.envelope.json import LONG_BODY_BYTES
from edge.envelope.prompt import Prompt, prompt_of
from tests.envelope.reading import in_steps, memory_below

MIB = 2**20
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]


def prompt(body: bytes | dict[str, Any], *, cleaned: bool = False, **form: Any) -> Prompt:
    data = body if isinstance(body, bytes) else json.dumps({"model": "m", **body}, **form).encode()
    envelope = in_steps(data) if len(data) > LONG_BODY_BYTES else envelopes.read_json(data)
    return prompt_of(envelope, data, cleaned=cleaned)


def before(found: Prompt, end: int) -> bytes:
    """Return all that stands before a place."""
    return b"".join([*found.head, found.data[found.start : end]])


def chat(turn: int, *, role_first: bool = True) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = [{"role": "system", "content": "be {kind}, {very}"}]
    for number in range(turn):
        messages.append({"role": "user", "content": 'say "},{" ' + str(number)})
        if number < turn - 1:
            messages.append({"role": "assistant", "content": f"answer {number}"})
    return messages if role_first else [dict(reversed(each.items())) for each in messages]


def agent(turn: int) -> list[dict[str, Any]]:
    messages = chat(1)
    for number in range(1, turn):
        call = {"id": f"call_{number}", "type": "function", "function": {"name": "look", "arguments": '{"a": {}}'}}
        messages.append({"role": "assistant", "content": None, "tool_calls": [call, call]})
        messages += [{"role": "tool", "tool_call_id": f"call_{number}", "content": [{"type": "text", "text": "x"}]}] * 2
    return messages


def blocks(turn: int) -> list[dict[str, Any]]:
    """As Claude Code sends them: the last one is to be cached, another in each turn."""
    messages: list[dict[str, Any]] = []
    for number in range(2 * turn - 1):
        part: dict[str, Any] = {"type": "text", "text": f"{number}"}
        if number == 2 * turn - 2:
            part["cache_control"] = {"type": "ephemeral"}
        messages.append({"role": ("user", "assistant")[number % 2], "content": [{"type": "text", "text": "a"}, part]})
    return messages


def items(turn: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [{"role": "user", "content": [{"type": "input_text", "text": "go"}]}]
    for number in range(1, turn):
        found += [
            {"id": f"rs_{number}", "type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}] * 2},
            {"type": "function_call", "call_id": f"c{number}", "name": "look", "arguments": "{}"},
            {"type": "function_call_output", "call_id": f"c{number}", "output": "seen"},
        ]
    return found


@pytest.mark.parametrize("form", [{}, {"separators": (",", ":")}, {"indent": 2}], ids=["spaced", "compact", "indented"])
@pytest.mark.parametrize("turn", [1, 2, 3, 7])
@pytest.mark.parametrize(
    ("name", "turns"),
    [
        ("messages", chat),
        ("messages", lambda turn: chat(turn, role_first=False)),
        ("messages", agent),
        ("messages", blocks),
        ("input", items),
    ],
    ids=["chat", "role last", "agent", "blocks", "items"],
)
def test_next_turn_finds_where_the_one_before_ended(name: str, turns: Any, turn: int, form: dict[str, Any]) -> None:
    head = {"tools": TOOLS, "system": "be kind"}
    first = prompt({name: turns(turn), **head}, cleaned=True, **form)
    second = prompt({name: turns(turn + 1), **head}, cleaned=True, **form)
    assert first.previous in (0, *first.ends)
    assert bool(first.previous) == (turn > 1)
    assert second.previous in second.ends
    assert before(second, second.previous) == before(first, first.ends[-1])
    assert second.home == first.home != b""


def test_text_goes_on_where_it_ended() -> None:
    for name in ("prompt", "input"):
        first, second = (prompt({name: text}) for text in ("once upon", "once upon a time"))
        assert first.is_text
        assert before(second, second.ends[0]).startswith(before(first, first.ends[0]))


def test_long_body_has_the_prompt_of_a_short_one() -> None:
    messages = [{"role": "user", "content": "x" * MIB}, {"role": "assistant", "content": "y"}, *chat(2)]
    long = prompt({"messages": messages, "tools": TOOLS, "prompt_cache_key": "k"})
    assert long.session == b'"k"'
    assert b"".join(long.head) == json.dumps(TOOLS).encode()
    ends = [long.data[end - 1 : end + 12] for end in long.ends]
    assert ends[:-1] == [b'}, {"role": "'] * (len(messages) - 1)
    assert long.data[long.ends[-1] :].startswith(b"]")
    assert before(long, long.previous).endswith(b'0"}')


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"m"}',
        b'{"model":"m","messages":[]}',
        b'{"model":"m","messages":null}',
        b'{"model":"m","messages":7}',
        b'{"model":"m","messages":"]"}',
        b'{"model":"m","input":[1,2,3]}',
        b'{"model":"m","prompt":""}',
        b'{"model":"m","prompt":["a","b"],"tools":{}}',
        b'{"model":"m","messages":[{},{},[{}],"},{",{"cache_control"}]}'.replace(
            b'{"cache_control"}', b'"cache_control"'
        ),
    ],
)
def test_any_body_has_a_prompt(body: bytes) -> None:
    found = prompt(body, cleaned=True)
    assert found.start <= found.ends[0]
    assert list(found.ends) == sorted(found.ends)
    assert len(found.ends) <= 8


@pytest.mark.parametrize("unit", [b"{},", b"1,", b'"},{",', b'{"cache_control":{}},', b'{"role":"user"},'])
def test_body_that_is_built_to_be_slow_is_looked_at_in_a_few_places(unit: bytes) -> None:
    body = b'{"model":"m","messages":[%b1]}' % (unit * (LONG_BODY_BYTES // len(unit) - 20))
    with memory_below(4 * MIB):
        found = prompt(body, cleaned=True)
    assert len(found.ends) <= 8


def test_envelope_lets_go_of_the_body() -> None:
    """An answer may take an hour, and nobody asks its request again."""
    body = json.dumps({"model": "m", "messages": chat(3), "tools": TOOLS}).encode()
    references = sys.getrefcount(body)
    envelope = envelopes.read_json(body)
    assert sys.getrefcount(body) > references
    envelope.let_go()
    assert sys.getrefcount(body) == references
    assert prompt_of(envelope, body).ends == (0,)


@pytest.mark.parametrize("member", ["prompt_cache_key", "session_id"])
def test_conversation_may_have_a_name(member: str) -> None:
    assert prompt({"messages": chat(1), member: "c-1"}).session == b'"c-1"'
    assert prompt({"messages": chat(1), member: "c" * 5000}).session[:2] == b'"c'
    assert len(prompt({"messages": chat(1), member: "c" * 5000}).session) == 1024
