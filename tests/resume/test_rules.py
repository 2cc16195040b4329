"""Which way a stream may go on; that each refusal is one is shown by a running edge in behaviour/test_resume.py."""

from typing import Any

import orjson
import pytest

from edge.config.settings import Engine, Resume
from edge.resume.rules import NotResumed, Way, limits_left, question_in, ways_of
from tests.resume.answers import cpu_s, delta, event, question, said_in

TEXT = event([delta({"role": "assistant", "content": "a"})])
REPLAY, CONTENT = Way.REPLAY, Way.CONTENT


def ways(mode: Resume, delivered: bytes = TEXT, engine: Engine = "vllm", tokens: int = 1, **members: Any) -> Any:
    asked = question({"messages": [{"role": "user", "content": "hi"}]} | members, is_chat=True)
    try:
        return ways_of(mode, asked, said_in(delivered), engine, tokens, 10)
    except NotResumed as refused:
        return refused.reason


@pytest.mark.parametrize(
    ("mode", "members", "expected"),
    [
        ("replay", {"temperature": 0}, [REPLAY]),
        ("replay", {"temperature": 0.0}, [REPLAY]),
        ("replay", {"temperature": False}, "sampled"),
        ("replay", {"seed": 0}, [REPLAY]),
        ("replay", {"seed": None}, "sampled"),
        ("content", {"temperature": 0, "seed": 3}, [CONTENT]),
        ("content", {"seed": 3}, "seeded"),
        ("content", {}, [CONTENT]),
        ("auto", {"temperature": 0}, [CONTENT, REPLAY]),
        ("auto", {"temperature": 0, "stop": "x"}, [REPLAY]),
        ("auto", {"seed": 3}, [REPLAY]),
        ("auto", {}, [CONTENT]),
        ("auto", {"stop": "x"}, "stop"),
        ("auto", {"temperature": 0, "engine": "openai"}, [REPLAY]),
        ("content", {"engine": "openai"}, "engine"),
        ("replay", {"temperature": 0, "tokens": 11}, "too_long"),
        ("auto", {"temperature": 0, "tokens": 11}, [CONTENT]),
        ("auto", {"seed": 3, "tokens": 11}, "seeded"),
    ],
)
def test_each_mode_has_its_way(mode: Resume, members: dict[str, Any], expected: object) -> None:
    assert ways(mode, **members) == expected


@pytest.mark.parametrize(
    ("delivered", "expected"),
    [
        (event([delta({"role": "assistant", "content": ""})]), [REPLAY]),
        (b"", [REPLAY]),
        (TEXT + b"data: {", "unreadable"),
        (event([delta({"reasoning_content": "t"})]), [CONTENT]),
        (event([delta({"reasoning": "t"})]) + TEXT, [CONTENT]),
        (event([delta({"reasoning": "t"})]) + event([delta({"content": "</think>"})]), [CONTENT]),
        (event([delta({"reasoning": "t"})]) + event([delta({"content": "<think>"})]), "reasoning"),
        (event([delta({"reasoning": "t", "reasoning_content": "t"})]), "reasoning"),
        (event([delta({"reasoning_details": "t"})]), "reasoning"),
        (event([delta({"reasoning": "t"})]) + TEXT + event([delta({"reasoning": "t"})]), "reasoning"),
        (event([delta({"content": "a", "reasoning": "t"})]), [CONTENT]),
        (event([delta({"reasoning": "\ufffd"})]) + TEXT, "characters"),
        (event([delta({"tool_calls": [{"index": 0, "function": {"name": "f"}}]})]), "tools"),
        (event([delta({"refusal": "no"})]), "unreadable"),
        (event([delta({"content": "a\ufffd"})]), "characters"),
        (TEXT + event([delta({}, "stop")]), "finished"),
        (TEXT + event([delta({"content": "b"}, index=1)]), "choices"),
    ],
)
def test_what_was_said_decides_too(delivered: bytes, expected: object) -> None:
    assert ways("content", delivered) == expected


@pytest.mark.parametrize("engine", ["llamacpp", "openai"])
def test_thoughts_are_gone_on_with_where_an_engine_tells_the_rest_as_what_it_is(engine: Engine) -> None:
    assert ways("content", event([delta({"reasoning_content": "t"})]), engine) in ("reasoning", "engine")


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ({"stop": "b"}, [CONTENT]),
        ({"stop": ["c", "a"]}, [CONTENT]),
        ({"stop": "ab"}, "stop"),
        ({"stop": ["c", "xab", "abc"]}, "stop"),
        ({"stop": ["x" * 2000]}, "stop"),
        ({"stop": [1]}, "stop"),
        ({"stop_regex": "a+"}, "stop"),
        ({"include_reasoning": True}, [CONTENT]),
        ({"include_reasoning": False}, "reasoning"),
    ],
)
@pytest.mark.parametrize("engine", ["sglang", "llamacpp"])
def test_what_may_be_half_a_stop_string_or_hide_thoughts_is_not_gone_on_with(
    engine: Engine, members: dict[str, Any], expected: object
) -> None:
    assert ways("content", TEXT, engine, **members) == expected


def test_limits_are_less_what_the_answer_has() -> None:
    members = {"max_tokens": 9, "max_completion_tokens": None, "min_tokens": 2, "n_predict": -1}
    assert limits_left(question(members, is_chat=True), 4) == {"max_tokens": 5, "min_tokens": 0}
    with pytest.raises(NotResumed, match="at_limit"):
        limits_left(question({"max_tokens": 4}, is_chat=True), 4)


def test_a_body_that_is_gone_or_odd_is_no_question() -> None:
    for body in (b"", b"\xff", b"[]"):
        with pytest.raises(NotResumed, match="body"):
            question_in(body, is_chat=True)


def test_many_small_objects_are_not_all_read_again_and_again() -> None:
    body = b'{"temperature":0,"messages":[' + b",".join([b"{}"] * 100_000) + b"]}"
    said = said_in(TEXT)

    def asked() -> list[Way]:
        return ways_of("content", question_in(body, is_chat=True), said, "vllm", 1, 10)

    assert asked() == [CONTENT]
    assert cpu_s(asked) < 3 * cpu_s(lambda: orjson.loads(body))


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a", [CONTENT]),
        ([1, 2], [CONTENT]),
        (["a", "b"], "choices"),
        ([[1], [2]], "choices"),
        ([True, 1], "choices"),
        (["a"], "prompt"),
        ([], "prompt"),
        (None, "prompt"),
        ({}, "prompt"),
    ],
)
def test_a_prompt_is_a_text_or_ids(prompt: object, expected: object) -> None:
    asked = question({"prompt": prompt}, is_chat=False)
    try:
        ways_: object = ways_of("content", asked, said_in(event([{"index": 0, "text": "a"}])), "vllm", 1, 10)
    except NotResumed as refused:
        ways_ = refused.reason
    assert ways_ == expected
