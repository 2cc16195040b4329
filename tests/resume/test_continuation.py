"""The bodies that a sibling and its tokenizer are asked."""

import json
import time
from typing import Any

import pytest

from edge.config.settings import Engine
from edge.exchange import NO_USAGE, Usage, UsageSource
from edge.resume.continuation import (
    Behind,
    body_of,
    by_ids,
    by_messages,
    ids_in,
    opening_question,
    prompt_question,
    rendered_in,
    require_thoughts,
    require_tokens,
    text_in,
    text_question,
    whole_question,
)
from edge.resume.rules import NotResumed, Question, question_in
from edge.resume.said import Said
from tests.resume.answers import delta, event, question, said_in

MESSAGES = [{"role": "user", "content": "hi"}]
ASKED = {"model": "m", "messages": MESSAGES, "max_tokens": 9, "tools": [], "cache_salt": "x", "top_p": 0.5}
CHAT = question(ASKED, is_chat=True)
SAID = said_in(event([delta({"content": 'a "b"'})]))
GOES_ON = {"continue_final_message": True, "add_generation_prompt": False}
ANSWER = [*MESSAGES, {"role": "assistant", "content": 'a "b"'}]


def body(engine: Engine, asked: Question, said: Said = SAID, ids: list[int] | None = None) -> dict[str, Any]:
    behind = Behind([5, 6], None, ids)
    loaded: dict[str, Any] = json.loads(body_of(engine, asked, said, "own", behind, ("cache_salt",)))
    return loaded


def test_a_chat_has_one_more_message_and_both_flags() -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    sent = {"model": "own", "messages": ANSWER, "max_tokens": 7, "tools": [], "top_p": 0.5, "stream_options": options}
    assert body("vllm", CHAT) == sent | GOES_ON
    assert body("llamacpp", CHAT) == sent | GOES_ON | {"timings_per_token": True}


def test_what_is_not_changed_is_asked_as_it_was_written() -> None:
    body = b'{"messages" : [ {"role":"user","content":"\\u4f60"}\n ] , "top_p": 1E0, "x": [{}]}'
    sent = body_of("vllm", question_in(body, is_chat=True), SAID, "own", Behind([5], None), ())
    assert b'"top_p":1E0' in sent
    assert json.loads(sent)["messages"] == [{"role": "user", "content": "\u4f60"}, ANSWER[-1]]


@pytest.mark.parametrize(("prompt", "expected"), [("once", "oncec"), ([1, 2], [1, 2, 5, 6])])
def test_a_text_completion_has_a_longer_prompt(prompt: Any, expected: Any) -> None:
    said = said_in(event([{"index": 0, "text": "c"}]))
    sent = body("sglang", question({"prompt": prompt}, is_chat=False), said)
    assert sent["prompt"] == expected
    assert not GOES_ON.keys() & sent.keys()


def test_tokenizers_are_asked_in_their_own_words() -> None:
    assert json.loads(text_question("llamacpp", "m", "t"))["content"] == "t"
    assert json.loads(text_question("vllm", "m", "t")) == {"model": "m", "prompt": "t", "add_special_tokens": False}
    told = {"messages": MESSAGES, "tools": [], "model": "own"}
    assert json.loads(prompt_question(CHAT, "own")) == told
    assert json.loads(whole_question(CHAT, SAID, "own")) == told | {"messages": ANSWER} | GOES_ON
    assert json.loads(opening_question("own", list(range(99))))["tokens"] == list(range(83, 99))


@pytest.mark.parametrize(
    ("tokens", "first", "reason"),
    [
        ([5, 6], Usage(1, 2, source=UsageSource.RUNNING), ""),
        ([5, 6], Usage(1, 9, source=UsageSource.ESTIMATED), ""),
        ([], Usage(1, 0, source=UsageSource.RUNNING), "tokenizer"),
        ([], NO_USAGE, "tokenizer"),
        ([5, 6], Usage(1, 1, source=UsageSource.RUNNING), "tokenizer"),
        ([5, 6], Usage(1, 3, source=UsageSource.RUNNING), "reasoning"),
    ],
)
def test_ids_are_as_many_as_the_first_server_counted(tokens: list[int], first: Usage, reason: str) -> None:
    if not reason:
        require_tokens(tokens, first)
        return
    with pytest.raises(NotResumed, match=reason):
        require_tokens(tokens, first)


def test_vllm_is_asked_by_messages_where_its_template_makes_of_them_what_it_must() -> None:
    assert by_messages([5, 6], [1, 2], [1, 2, 5, 6]) == Behind([5, 6], 4)
    for trimmed in ([1, 2, 5], [1, 5, 6], [1, 2, 5, 7]):
        assert by_messages([5, 6], [1, 2], trimmed) is None


def test_a_prompt_by_ids_stands_in_place_of_messages() -> None:
    assert by_ids(CHAT, [5, 6], [1, 2]) == Behind([5, 6], 4, [1, 2, 5, 6])
    sent = body("vllm", CHAT, ids=[1, 2, 5, 6])
    assert sent["kv_transfer_params"] == {"prompt_token_ids": [1, 2, 5, 6]}
    assert (sent["messages"], sent["return_token_ids"], sent["max_tokens"]) == (MESSAGES, True, 7)
    assert not GOES_ON.keys() & sent.keys()


@pytest.mark.parametrize(
    "member",
    [
        {"reasoning_effort": "low"},
        {"documents": [{"text": "a"}]},
        {"kv_transfer_params": {"do_remote_decode": True}},
        {"tools": [{"type": "function"}], "tool_choice": "none"},
    ],
)
def test_a_prompt_that_the_tokenizer_does_not_know_is_not_asked_by_ids(member: dict[str, Any]) -> None:
    with pytest.raises(NotResumed, match="prompt"):
        by_ids(question(ASKED | member, is_chat=True), [5], [1])


R1 = "hi<\uff5cAssistant\uff5c><think>\n"
THOUGHT = event([delta({"reasoning": "so"})])


@pytest.mark.parametrize(
    ("delivered", "ending", "known"),
    [
        (THOUGHT, R1, True),
        (THOUGHT, R1.removesuffix("\n"), False),
        (THOUGHT, "<|im_start|>assistant\n<think>\n", False),
        (THOUGHT, "<|im_start|>assistant\n", False),
        (event([delta({"content": "a"})]), R1, False),
        (event([delta({"content": "a"})]), "[thinks]<think>", False),
        (event([delta({"content": "a"})]), "<think>\n\n</think>\n\n", True),
    ],
)
def test_thoughts_are_known_behind_the_opening_of_one_template(delivered: bytes, ending: str, known: bool) -> None:
    """And an answer without thoughts behind no opening at all: a parser may have taken their end away."""
    said = said_in(delivered)
    if known:
        require_thoughts(said, ending)
        return
    with pytest.raises(NotResumed, match="reasoning"):
        require_thoughts(said, ending)


@pytest.mark.parametrize(("thought", "text", "written"), [("so", "", "so"), ("so", "a", "so</think>a"), ("", "a", "a")])
def test_thoughts_are_written_again_with_the_mark_that_ended_them(thought: str, text: str, written: str) -> None:
    said = said_in(event([delta({"reasoning_content": thought})]) + event([delta({"content": text})]))
    assert body("sglang", CHAT, said)["messages"][-1]["content"] == written


def ids_of(document: bytes) -> list[int]:
    ids: list[int] = []
    for _ in ids_in(document, ids):
        pass
    return ids


@pytest.mark.parametrize("count", [0, 1, 130_000])
def test_a_long_answer_of_a_tokenizer_is_read_in_steps(count: int) -> None:
    document = json.dumps({"count": count, "tokens": list(range(count))}).encode()
    assert ids_of(document) == list(range(count))
    took = []
    steps = ids_in(document, [])
    while True:
        began = time.thread_time()
        is_over = next(steps, steps) is steps
        took.append(time.thread_time() - began)
        if is_over:
            break
    assert len(took) >= len(document) // 70_000
    assert sorted(took)[len(took) // 2] < 0.005


@pytest.mark.parametrize(
    "document",
    [
        b"",
        b"[]",
        b"{}",
        b'{"tokens":["a"]}',
        b'{"tokens":null}',
        b'{"tokens":[true]}',
        b'{"tokens":1}',
        b'{"tokens":[1,]}',
        b'{"tokens":[[1]]}',
        b'{"tokens":["' + b"," * 99_999 + b'"]}',
    ],
)
def test_what_is_no_answer_of_a_tokenizer_counts_nothing(document: bytes) -> None:
    for read in (ids_of, rendered_in):
        with pytest.raises(NotResumed, match="tokenizer"):
            read(document)


@pytest.mark.parametrize("document", [b"", b"[]", b'{"prompt":1}', b'{"text":["a"]}', b'{"text":"\xff"}'])
def test_what_is_no_text_of_a_tokenizer_is_none(document: bytes) -> None:
    assert (text_in(b'{"prompt":"a"}'), text_in(b'{"text":"a"}')) == ("a", "a")
    with pytest.raises(NotResumed, match="tokenizer"):
        text_in(document)
