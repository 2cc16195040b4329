"""The bodies that a sibling and its tokenizer are asked."""

import json
from typing import Any

import orjson
import pytest

from edge.config.settings import Engine
from edge.resume.continuation import (
    body_of,
    ids_in,
    prompt_question,
    prompt_tokens_of,
    rendered_question,
    text_question,
)
from edge.resume.rules import NotResumed, Question, question_in
from edge.resume.said import Said
from tests.resume.answers import cpu_s, delta, event, question, said_in

MESSAGES = [{"role": "user", "content": "hi"}]
ASKED = {"model": "m", "messages": MESSAGES, "max_tokens": 9, "tools": [], "cache_salt": "x", "top_p": 0.5}
CHAT = question(ASKED, is_chat=True)
SAID = said_in(event([delta({"content": 'a "b"'})]))
GOES_ON = {"continue_final_message": True, "add_generation_prompt": False}
ANSWER = [*MESSAGES, {"role": "assistant", "content": 'a "b"'}]


def body(engine: Engine, asked: Question, said: Said = SAID) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(body_of(engine, asked, said, "own", [5, 6], ("cache_salt",)))
    return loaded


def test_a_chat_has_one_more_message_and_both_flags() -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    sent = {"model": "own", "messages": ANSWER, "max_tokens": 7, "tools": [], "top_p": 0.5, "stream_options": options}
    assert body("vllm", CHAT) == sent | GOES_ON
    assert body("llamacpp", CHAT) == sent | GOES_ON | {"timings_per_token": True}


def test_what_is_not_changed_is_asked_as_it_was_written() -> None:
    body = b'{"messages" : [ {"role":"user","content":"\\u4f60"}\n ] , "top_p": 1E0, "x": [{}]}'
    sent = body_of("vllm", question_in(body, is_chat=True), SAID, "own", [5], ())
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
    assert json.loads(prompt_question("sglang", CHAT, SAID, "own")) == told
    assert json.loads(prompt_question("vllm", CHAT, SAID, "own")) == told | {"messages": ANSWER} | GOES_ON
    assert json.loads(rendered_question(b'{"prompt":"p"}'))["content"] == "p"


def test_the_prompt_has_as_many_tokens_as_the_tokenizer_says() -> None:
    assert prompt_tokens_of("vllm", [5, 6], [1, 2, 3, 5, 6]) == range(5, 6)
    with pytest.raises(NotResumed, match="template"):
        prompt_tokens_of("vllm", [5, 6], [1, 2, 3, 5, 7])


@pytest.mark.parametrize("said_tokens", [1, 2, 3, 9])
@pytest.mark.parametrize("engine", ["sglang", "llamacpp"])
def test_a_server_that_leaves_out_what_was_said_is_seen_however_short_that_is(engine: Engine, said_tokens: int) -> None:
    allowed = prompt_tokens_of(engine, [5] * said_tokens, [1] * 20)
    assert 20 not in allowed
    assert 20 + said_tokens in allowed
    assert (19 + said_tokens in allowed) is (said_tokens > 2)


def test_a_long_answer_of_a_tokenizer_is_checked_while_it_is_read() -> None:
    document = json.dumps({"tokens": list(range(130_000))}).encode()

    def read_and_checked() -> bool:
        return all(type(each) is int for each in orjson.loads(document)["tokens"])

    assert cpu_s(lambda: ids_in(document)) < 0.9 * cpu_s(read_and_checked)


@pytest.mark.parametrize("document", [b"", b"[]", b"{}", b'{"tokens":["a"]}', b'{"tokens":null}', b'{"tokens":[true]}'])
def test_what_is_no_answer_of_a_tokenizer_counts_nothing(document: bytes) -> None:
    for read in (ids_in, rendered_question):
        with pytest.raises(NotResumed, match="tokenizer"):
            read(document)
