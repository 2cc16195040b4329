"""The benchmark's upstream: events that tell when they were sent, and wishes that survive a gateway."""

import json

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.stamped import find_stamp
from loadtest.upstream import EVENT_BYTES, Wish, event, read_event, usage_event

NUMBERS = st.integers(0, 999_999)
TIMES = st.integers(0, 10**19 - 1)


@given(NUMBERS, TIMES)
def test_every_event_is_as_long_and_tells_its_number_and_time(number: int, sent_ns: int) -> None:
    made = event(number, sent_ns)
    assert len(made) == EVENT_BYTES
    assert read_event(made.removesuffix(b"\n\n")) == (number, sent_ns)


def test_an_event_is_an_openai_chunk() -> None:
    document = orjson.loads(event(3, 42).removeprefix(b"data: "))
    assert document["object"] == "chat.completion.chunk"
    assert document["choices"][0]["delta"]["content"].startswith("000003 ")
    assert orjson.loads(usage_event(7).removeprefix(b"data: "))["usage"]["completion_tokens"] == 7


@given(NUMBERS, TIMES, st.data())
def test_one_changed_byte_outside_the_stamp_is_seen(number: int, sent_ns: int, data: st.DataObject) -> None:
    made = event(number, sent_ns).removesuffix(b"\n\n")
    stamp = made.index(b'"content":"') + len(b'"content":"')
    outside = [at for at in range(len(made)) if not stamp <= at < stamp + 26]
    at = data.draw(st.sampled_from(outside))
    with pytest.raises(ValueError, match="differs"):
        read_event(made[:at] + bytes([made[at] ^ 1]) + made[at + 1 :])


@given(NUMBERS, TIMES)
def test_the_stamp_is_found_in_an_event_that_was_encoded_anew(number: int, sent_ns: int) -> None:
    document = json.loads(event(number, sent_ns).removeprefix(b"data: "))
    for separators in ((",", ":"), (", ", ": ")):
        assert find_stamp(b"data: " + json.dumps(document, separators=separators).encode()) == (number, sent_ns)


def test_other_events_have_no_stamp() -> None:
    assert find_stamp(usage_event(3)) is None
    assert find_stamp(b"data: [DONE]") is None


@given(st.integers(0, 10**6), st.floats(0, 10**4), st.floats(0, 10**4), st.booleans())
def test_a_wish_comes_through_a_prompt(events: int, interval_ms: float, ttft_ms: float, aligned: bool) -> None:
    wish = Wish(events, round(interval_ms, 3), round(ttft_ms, 3), aligned)
    body = orjson.dumps({"messages": [{"role": "user", "content": f"{wish.text()} and more"}]})
    told = Wish.of(body)
    assert (told.events, told.aligned) == (wish.events, wish.aligned)
    assert told.interval_ms == pytest.approx(wish.interval_ms)
    assert told.ttft_ms == pytest.approx(wish.ttft_ms)


def test_without_a_wish_the_usual_stream_comes() -> None:
    assert Wish.of(b'{"stream":true}') == Wish()
