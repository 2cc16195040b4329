"""The marks of a prompt."""

import hashlib
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.envelope.json import LONG_BODY_BYTES, read_json
from edge.envelope.prompt import Prompt, prompt_of
from edge.upstream.prefixes import Prefix, read_prefix
from tests.envelope.reading import in_steps


def marks(prompt: Prompt, owner: bytes = b"u-1", session: bytes = b"") -> Prefix:
    reading = read_prefix(prompt, owner, session)
    try:
        while True:
            reading.send(None)
    except StopIteration as done:
        return done.value  # type: ignore[no-any-return]


def of_chat(messages: list[dict[str, Any]], owner: bytes = b"u-1", **more: Any) -> Prefix:
    body = json.dumps({"model": "m", "messages": messages, **more}).encode()
    envelope = in_steps(body) if len(body) > LONG_BODY_BYTES else read_json(body)
    return marks(prompt_of(envelope, body), owner)


def shared(one: Prefix, other: Prefix) -> int:
    """Return how far two prompts are the same, by their marks."""
    return max(
        [at for at, digest in zip(other.offsets, other.digests, strict=True) if digest in one.digests], default=0
    )


def texts(*sizes: int) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[at % 2], "content": f"{at}" * size} for at, size in enumerate(sizes)]


def test_next_turn_shares_all_of_the_one_before() -> None:
    for sizes in ((5,), (3_000,), (100_000,), (5, 5, 5), (200, 300_000, 70_000), (9, 9, 600_000)):
        first = of_chat(texts(*sizes))
        assert shared(first, of_chat(texts(*sizes, 50, 60))) == first.size
        assert of_chat(texts(*sizes, 50, 60)).previous == first.size


def test_long_prompt_that_was_changed_shares_more_than_three_quarters_of_what_is_the_same() -> None:
    for size in (5_000, 40_000, 700_000, 2_000_000):
        one, other = of_chat(texts(size)), of_chat([{"role": "user", "content": "0" * int(size * 0.9) + "1" * size}])
        assert shared(one, other) >= (0.8 if size > LONG_BODY_BYTES else 0.5) * 0.85 * size


def test_conversation_that_becomes_long_keeps_what_it_shares() -> None:
    short, long = texts(5, 5, 450_000), texts(5, 5, 450_000, 9, 100_000)
    assert shared(of_chat(short), of_chat(long)) == of_chat(short).size


def test_tools_and_system_are_shared_by_conversations_and_prompts_by_none_but_their_owner() -> None:
    head = {"tools": [{"type": "function"}] * 50, "system": "be kind"}
    one, other = of_chat(texts(10), **head), of_chat([{"role": "user", "content": "else"}], **head)
    assert shared(one, other) == len(json.dumps(head["tools"])) + len(json.dumps(head["system"]))
    assert one.home != other.home
    assert not shared(one, of_chat(texts(10), b"u-2", **head))
    assert not shared(of_chat(texts(10), b"u"), of_chat(texts(10), b"u-1"))


@settings(max_examples=40)
@given(
    st.lists(st.binary(max_size=3_000), max_size=3), st.binary(min_size=1, max_size=20_000),
    st.lists(st.integers(0, 20_000), max_size=8), st.booleans(), st.integers(1, 900),
)  # fmt: skip
def test_each_mark_is_a_digest_of_all_before_it(
    head: list[bytes], data: bytes, places: list[int], is_text: bool, step: int
) -> None:
    """However the prompt is cut into steps."""
    ends = (*sorted({place for place in places if place < len(data)}), len(data))
    prefix = marks(Prompt(tuple(head), data, 0, ends, 0, b"", b"", is_text))
    whole = b"".join([*head, data])
    assert prefix.size == len(whole)
    assert list(prefix.offsets) == sorted(set(prefix.offsets))
    for offset, digest in zip(prefix.offsets, prefix.digests, strict=True):
        assert digest == int.from_bytes(hashlib.sha256(b"3 u-1" + whole[:offset]).digest()[:8]) >> 4
    assert {len(whole) - len(data) + end for end in ends} <= set(prefix.offsets)


def test_prompt_of_nothing_has_a_mark() -> None:
    prefix = marks(Prompt((), b"", 0, (0,), 0, b"", b"", True))
    assert (prefix.size, prefix.offsets, len(prefix.digests)) == (0, (0,), 1)


@pytest.mark.parametrize("where", ["body", "header"])
def test_name_of_a_conversation_is_its_home_and_a_mark(where: str) -> None:
    body, header = (b'"c"', b"") if where == "body" else (b"", b"c")
    one, other = (marks(Prompt((), data, 0, (3,), 0, data, body, True), session=header) for data in (b'"ab', b'"cd'))
    assert one.session == other.session != 0
    assert one.home == other.home
