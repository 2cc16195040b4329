"""What a stream has said, however it was cut into chunks."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.resume.said import Said, events_in
from tests.resume.answers import PAIRS, delta, event, said_in
from tests.streams import STREAMS, cut


@given(PAIRS)
def test_two_cuts_of_one_answer_say_the_same(pair: tuple[list[bytes], list[bytes]]) -> None:
    first, second = (said_in(b"".join(events)) for events in pair)
    assert (first.parts, first.ends, first.usages, first.roles) == (second.parts, second.ends, 1, {0})
    assert first.head_for(0) == {"id": "first", "created": 5, "model": "first"}
    assert first.is_plain


def test_texts_are_told_by_their_places() -> None:
    said = said_in(
        event([delta({"content": "a", "reasoning": "t"}), delta({"content": "b"}, index=1)])
        + event([delta({"content": "c", "function_call": {"arguments": "{"}}, logprobs={"content": [1], "no": None})])
        + event([{"index": 2, "text": "d", "finish_reason": "length"}])
    )
    assert said.parts == {
        0: {
            "delta.content": "ac",
            "delta.reasoning": "t",
            "delta.function_call.arguments": "{",
            "logprobs.content": [1],
        },
        1: {"delta.content": "b"},
        2: {"text": "d"},
    }
    assert (said.ends, said.text("delta.content"), said.roles) == ({2: "length"}, "ac", set())


def test_an_answer_is_over_when_the_one_choice_that_was_asked_has_ended() -> None:
    begun = event([delta({"content": "a"})])
    ended = begun + event([delta({}, finish_reason="stop")])
    assert not said_in(begun).is_over(1)
    assert said_in(ended).is_over(1)
    assert not said_in(ended).is_over(2)  # of which one has not begun


@pytest.mark.parametrize(
    ("content", "is_plain"),
    [
        (b": ping\n\n" + event([delta({})]), True),
        (b"\n\n: a\n: b\n\n", True),
        (b"data: no JSON\n\n", False),
        (b"\x1f\x8b garbage\n\n", False),
        (b'data: {"error":{"message":"no"}}\n\n', False),
        (event([delta({})]) + b"data: {", False),
        (event([delta({"content": ["a"]})]) + event([delta({"content": "b"})]), False),
        (event([delta({"content": "a"})]) + event([delta({"content": ["b"]})]), False),
    ],
)
def test_what_cannot_be_read_is_known(content: bytes, is_plain: bool) -> None:
    assert said_in(content).is_plain is is_plain


def test_much_that_was_said_is_read_in_steps_and_nothing_of_it_is_lost() -> None:
    said, content = Said(), b"".join(event([delta({"content": f" {number}"})]) for number in range(1000))
    steps = 0
    for steps, _ in enumerate(said.read(content), 1):  # noqa: B007
        assert not said.parts
    assert steps >= 20
    assert said.text("delta.content") == "".join(f" {number}" for number in range(1000))


def test_a_server_may_nest_as_deep_as_it_likes() -> None:
    deep = b'data: {"choices":[{"index":0,"delta":' + b'{"a":' * 1000 + b'"b"' + b"}" * 1000 + b"}]}\n\n"
    assert list(said_in(deep).parts[0].values()) == ["b"]


@given(st.sampled_from(sorted(STREAMS)), st.lists(st.integers(0, 2000), max_size=5))
def test_events_are_cut_out_of_real_streams_at_any_cut(name: str, cuts: list[int]) -> None:
    stream, events, left = STREAMS[name], list[bytes](), b""
    for piece in cut(stream, sorted(min(each, len(stream)) for each in cuts)):
        more = list(events_in(left + piece))
        events += more
        left = (left + piece)[sum(map(len, more)) :]
    assert b"".join(events) + left == stream
    assert len(events) > 1
