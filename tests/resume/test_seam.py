"""A second answer gives what is new and nothing else, or is found to be another one."""

import gc
import json
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.exchange import NO_USAGE, Usage, UsageSource
from edge.resume.continuation import Behind
from edge.resume.said import Said
from edge.resume.seam import MAX_HELD_BYTES, Continued, Outcome, Replayed, Seam
from tests.resume.answers import PAIRS, delta, event, said_in
from tests.streams import cut

FIRST = Usage(7, 3, source=UsageSource.ESTIMATED)
SECOND = Usage(9, 5, source=UsageSource.FINAL)


def replayed(delivered: bytes, second: bytes, cuts: list[int]) -> tuple[Replayed, bytes]:
    seam = Replayed(said_in(delivered), FIRST)
    given_ = b"".join(map(seam.feed, cut(second, sorted(min(each, len(second)) for each in cuts))))
    return seam, given_ + seam.close()


@given(PAIRS, st.data(), st.lists(st.integers(0, 3000), max_size=5))
def test_a_replay_gives_what_the_client_lacks(
    pair: tuple[list[bytes], list[bytes]], data: st.DataObject, cuts: list[int]
) -> None:
    first, second = pair
    delivered = b"".join(first[: data.draw(st.integers(0, len(first) - 1))])
    seam, rest = replayed(delivered, b"".join(second), cuts)
    joined, whole = said_in(delivered + rest), said_in(b"".join(first))
    assert not seam.broken
    assert (joined.parts, joined.ends, joined.usages, joined.roles) == (whole.parts, whole.ends, 1, {0})
    if delivered:
        assert {json.loads(each[6:])["id"] for each in rest.split(b"\n\n")[:-2]} <= {"first"}
        assert (delivered + rest).count(b'"role"') == 1
    assert rest.endswith(b"data: [DONE]\n\n")
    assert (seam.usage(SECOND), seam.outcome) == (SECOND, Outcome.RESUMED)


@given(PAIRS, st.data(), st.lists(st.integers(0, 3000), max_size=5))
def test_another_answer_gives_nothing(
    pair: tuple[list[bytes], list[bytes]], data: st.DataObject, cuts: list[int]
) -> None:
    """One character is another, or a text is longer than all of the second answer's."""
    first, second = pair
    delivered = b"".join(first[: data.draw(st.integers(1, len(first) - 1))])
    said = said_in(delivered)
    places = [(index, place) for index, parts in said.parts.items() for place, part in parts.items() if part]
    if places:
        index, place = data.draw(st.sampled_from(places))
        part = said.parts[index][place]
        at = data.draw(st.integers(0, len(part) - 1))
        said.parts[index][place] = part[:at] + ("x" if isinstance(part, str) else ["x"]) + part[at + 1 :]  # type: ignore[operator]
    else:
        said.parts[0] = {"delta.content": "x"}
    seam, rest = Replayed(said, FIRST), b""
    for piece in cut(b"".join(second), sorted(min(each, len(b"".join(second))) for each in cuts)):
        rest += seam.feed(piece)
    assert (rest + seam.close(), seam.broken) == (b"", True)
    assert (seam.usage(SECOND), seam.outcome) == (FIRST, Outcome.UNEQUAL)


@pytest.mark.parametrize(
    "second",
    [
        event([delta({"content": "a"})]),
        event([delta({"content": "a"})]) + b"data: [DONE]\n\n",
        event([delta({"content": "ab"}, "stop")]),
        event([delta({"content": "a", "reasoning": "t"})]),
        event([delta({"reasoning": "ab"})]),
        event([delta({"content": ["ab"]})]),
        event([delta({"content": "a"})]) + event([delta({"content": ["b"]})]),
        event([], usage={}),
        b"data: no JSON\n\n",
    ],
)
def test_an_answer_that_is_shorter_or_goes_elsewhere_is_another_one(second: bytes) -> None:
    seam, rest = replayed(event([delta({"content": "abc"})]), second, [])
    assert (rest, seam.outcome, seam.broken) == (b"", Outcome.UNEQUAL, True)


def test_another_end_is_another_answer() -> None:
    delivered = event([delta({"content": "a"})]) + event([delta({}, "stop")])
    seam, rest = replayed(delivered, event([delta({"content": "a"}, "length")]), [])
    assert (rest, seam.outcome) == (b"", Outcome.UNEQUAL)


def test_an_error_of_the_second_server_is_given_only_behind_the_seam() -> None:
    error = b'data: {"error":{"message":"no"}}\n\n'
    seam, rest = replayed(event([delta({"content": "a"})]), error, [])
    assert (rest, seam.outcome, seam.broken) == (b"", Outcome.FAILED, True)
    seam, rest = replayed(event([delta({"content": "a"})]), event([delta({"content": "ab"})]) + error, [])
    assert rest.count(b"data:") == 2
    assert (seam.outcome, seam.broken) == (Outcome.RESUMED, False)


def test_comments_and_the_name_that_was_asked_are_in_the_answer() -> None:
    seam = Replayed(said_in(b""), FIRST, "asked")
    assert seam.feed(b": ping\n\n") == b": ping\n\n"
    assert b'"model":"asked"' in seam.feed(event([delta({"role": "assistant"})], model="own"))


def continued(length: int | None = 10, ids: list[int] | None = None, **more: bool) -> Continued:
    shown = {"shows_usage": True, "shows_running": False, "hides_usage": False, "shows_timings": False} | more
    said = said_in(event([delta({"role": "assistant", "content": "ab"})], id="first"))
    return Continued(said, FIRST, None, "delta.content", Behind([1, 2, 3, 4], length, ids), **shown)


def continued_behind(said: Said, thoughts: int = 0) -> Continued:
    shown = {"shows_usage": True, "shows_running": False, "hides_usage": False, "shows_timings": False}
    return Continued(said, FIRST, None, "delta.content", Behind([1], None, thoughts=thoughts), **shown)


def told(content: str, **more: Any) -> bytes:
    usage = {"prompt_tokens": 10, "completion_tokens": 1, "total_tokens": 11}
    return event([delta({"content": content})], id="second", **{"usage": usage} | more)


def test_what_goes_on_is_the_first_answer_with_the_bill_of_both() -> None:
    seam = continued()
    last = event([], usage={"prompt_tokens": 10, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 9}})
    rest = seam.feed(event([delta({"role": "assistant", "content": ""})]) + told("c") + told("d") + last)
    chunks = [json.loads(each[6:]) for each in rest.split(b"\n\n") if each]
    assert [each["choices"][0]["delta"] for each in chunks[:2]] == [{"content": "c"}, {"content": "d"}]
    assert {each.get("id") for each in chunks[:2]} == {"first"}
    assert all("usage" not in each for each in chunks[:2])
    assert chunks[2]["usage"] == {
        "prompt_tokens": 6, "completion_tokens": 6, "prompt_tokens_details": {"cached_tokens": 6}
    }  # fmt: skip
    assert seam.usage(Usage(10, 2, 9, source=UsageSource.FINAL)) == Usage(6, 6, 6, source=UsageSource.FINAL)
    assert seam.usage(Usage(1, 2, source=UsageSource.ESTIMATED)) == Usage(7, 6, source=UsageSource.ESTIMATED)
    assert seam.usage(NO_USAGE) == FIRST


@pytest.mark.parametrize(
    ("second", "outcome"),
    [
        (told("c"), Outcome.RESUMED),
        (told("c", usage={"prompt_tokens": 9, "completion_tokens": 1}), Outcome.IGNORED),
        (told("c", usage={"prompt_tokens": 11, "completion_tokens": 1}), Outcome.IGNORED),
        (told("c", usage=None), Outcome.IGNORED),
        (told("c", usage=None, timings={"prompt_n": 4, "cache_n": 6}), Outcome.RESUMED),
        (told("c", usage=None, timings={"prompt_n": 20}), Outcome.IGNORED),
        (event([delta({}, "stop")]) + b"data: [DONE]\n\n", Outcome.IGNORED),
        (event([delta({}, "stop")]) + told("")[:-2] + b"\n\ndata: [DONE]\n\n", Outcome.RESUMED),
        (b'data: {"object":"error","message":"no"}\n\n', Outcome.FAILED),
        (told("c", usage=None, timings={"prompt_n": 10, "cache_n": "x"}), Outcome.RESUMED),
    ],
)
def test_a_prompt_of_another_length_shows_that_the_server_began_anew(second: bytes, outcome: Outcome) -> None:
    seam = continued()
    rest = seam.feed(second) + seam.close()
    assert seam.outcome is outcome
    assert bool(rest) is (outcome is Outcome.RESUMED)
    assert seam.usage(SECOND) == FIRST or outcome is Outcome.RESUMED


@pytest.mark.parametrize(
    ("told_ids", "outcome"),
    [([7, 8], Outcome.RESUMED), ([7, 9], Outcome.IGNORED), (None, Outcome.IGNORED)],
)
def test_a_prompt_by_ids_is_told_again_or_the_server_began_anew(told_ids: list[int] | None, outcome: Outcome) -> None:
    seam = continued(2, ids=[7, 8])
    usage = {"prompt_tokens": 2, "completion_tokens": 0}
    begins = event([delta({"role": "assistant", "content": ""})], prompt_token_ids=told_ids, usage=usage)
    rest = seam.feed(begins + event([delta({"content": "c"}, token_ids=[9])], usage=usage))
    assert seam.outcome is outcome
    chunks = [json.loads(each[6:]) for each in rest.split(b"\n\n") if each]
    new = [delta({"content": "c"}, token_ids=None)]
    assert [each["choices"] for each in chunks] == ([new] if outcome is Outcome.RESUMED else [])
    assert b"[7" not in rest


def test_a_thought_that_comes_before_the_prompt_is_known_shows_that_the_server_began_anew() -> None:
    seam = continued()
    assert (seam.feed(told("", usage=None)), seam.broken) == (b"", False)
    assert (seam.feed(event([delta({"reasoning": "c"})])), seam.outcome) == (b"", Outcome.IGNORED)


THOUGHT, ANSWERED = {"reasoning": "t"}, {"content": "a"}


@pytest.mark.parametrize(
    ("had", "second", "outcome"),
    [
        ([THOUGHT], [THOUGHT, ANSWERED], Outcome.RESUMED),
        ([THOUGHT], [THOUGHT | ANSWERED, ANSWERED], Outcome.RESUMED),
        ([THOUGHT, ANSWERED], [{"content": "</think>"}], Outcome.RESUMED),
        ([THOUGHT], [{"reasoning_content": "t"}], Outcome.UNEQUAL),
        ([THOUGHT], [ANSWERED], Outcome.UNEQUAL),
        ([THOUGHT, ANSWERED], [THOUGHT], Outcome.UNEQUAL),
        ([ANSWERED], [THOUGHT], Outcome.UNEQUAL),
        ([THOUGHT], [THOUGHT | {"content": "t</think>a"}], Outcome.UNEQUAL),
    ],
)
def test_what_goes_on_is_of_the_kind_that_must_follow(
    had: list[dict[str, str]], second: list[dict[str, str]], outcome: Outcome
) -> None:
    """A sibling may have another parser of thoughts, or none: the client sees nothing of it."""
    seam = continued_behind(said_in(b"".join(event([delta(each)]) for each in had)))
    rest = b"".join(seam.feed(event([delta(each)])) for each in second)
    assert (seam.outcome, rest.count(b"data:")) == (outcome, len(second) if outcome is Outcome.RESUMED else 0)


def test_thoughts_behind_the_answer_end_a_stream_that_went_on() -> None:
    seam = continued_behind(said_in(event([delta(THOUGHT)])))
    rest = b"".join(seam.feed(event([delta(each)])) for each in (THOUGHT, ANSWERED, THOUGHT))
    assert (rest.count(b"data:"), seam.broken) == (2, True)


def test_thoughts_are_counted_where_the_second_server_counts_them() -> None:
    for told, counted in ({"reasoning_tokens": 1}, 4), ({}, 0):
        seam = continued_behind(said_in(event([delta(THOUGHT)])), thoughts=3)
        usage = {"prompt_tokens": 9, "completion_tokens": 1} | told
        seam.feed(event([delta(THOUGHT)], usage=usage))
        second = Usage(9, 1, reasoning_tokens=told.get("reasoning_tokens", 0), source=UsageSource.FINAL)
        assert seam.usage(second).reasoning_tokens == counted


def test_the_ids_of_a_long_prompt_are_no_fault_of_who_tells_them() -> None:
    ids = list(range(100_000, 130_000))
    seam = continued(len(ids), ids)
    begins = event([delta({"content": ""})], prompt_token_ids=ids, usage={"prompt_tokens": len(ids)})
    assert len(begins) > 3 * MAX_HELD_BYTES
    rest = b"".join(map(seam.feed, cut(begins + told("c"), [1000, 100_000])))
    assert (rest.count(b"data:"), seam.outcome) == (1, Outcome.RESUMED)


def test_usage_and_timings_are_shown_to_who_asked() -> None:
    timed = told("c", timings={"prompt_n": 10})
    shown = json.loads(continued(shows_running=True, shows_timings=True).feed(timed)[6:])
    assert (shown["usage"]["prompt_tokens"], shown["timings"]) == (6, {"prompt_n": 10})
    hidden = json.loads(continued().feed(timed)[6:])
    assert not {"usage", "timings"} & set(hidden)
    assert continued(None, shows_usage=False).feed(event([], usage={"prompt_tokens": 1, "completion_tokens": 1})) == b""
    end = event([delta({}, "stop")], usage={"prompt_tokens": 10, "completion_tokens": 1})
    assert b'"usage"' in continued(None).feed(end)
    assert b'"usage"' not in continued(None, hides_usage=True).feed(end)


BEGINS = event([delta({"role": "assistant", "content": ""})], usage={"prompt_tokens": 10, "completion_tokens": 0})
DONE = b"data: [DONE]\n\n"


@pytest.mark.parametrize("second", [b"", DONE, BEGINS, BEGINS + DONE])
@pytest.mark.parametrize("prompt_tokens", [None, 10])
def test_a_second_answer_that_says_nothing_and_has_no_end_is_no_answer(
    prompt_tokens: int | None, second: bytes
) -> None:
    seam = continued(prompt_tokens)
    assert (seam.feed(second) + seam.close(), seam.broken, seam.outcome) == (b"", True, Outcome.FAILED)


def test_a_second_answer_that_ends_at_once_with_a_reason_is_one() -> None:
    seam = continued(None)
    given_ = seam.feed(event([delta({}, "stop")]) + DONE) + seam.close()
    assert (given_.count(b"data:"), seam.broken, seam.outcome) == (2, False, Outcome.RESUMED)


@pytest.mark.parametrize("seam", [continued(None), Replayed(said_in(b""), FIRST)])
def test_an_event_without_end_is_held_to_64_kib(seam: Continued | Replayed) -> None:
    assert seam.feed(b"data: {") == b""
    for _ in range(70):
        seam.feed(b" " * 1024)
    assert (seam.broken, seam.holds, seam.outcome) == (True, False, Outcome.FAILED)


def test_an_event_in_many_reads_costs_no_more_than_in_one() -> None:
    seam = continued(None)
    read = event([delta({"content": "a" * 60_000})])
    began = time.thread_time()
    given_ = b"".join(seam.feed(read[at : at + 1]) for at in range(len(read)))
    assert time.thread_time() - began < 0.5
    assert json.loads(given_[6:])["choices"][0]["delta"]["content"] == "a" * 60_000


def test_beginnings_that_tell_no_prompt_are_kept_to_64_kib() -> None:
    seam = continued()
    for _ in range(700):
        seam.feed(event([delta({"role": "assistant", "content": ""})]))
    assert (seam.broken, seam.outcome) == (True, Outcome.FAILED)


@given(st.permutations([0, 0, 0, 1, 1, 1]))
def test_nothing_of_a_choice_passes_before_all_choices_are_known_to_be_the_same(order: list[int]) -> None:
    """Each choice says 'abc' in three chunks; the client had the 'a' of both. The second one's may differ."""
    delivered = event([delta({"content": "a"}, index=0)]) + event([delta({"content": "a"}, index=1)])
    for texts in (["abc", "abc"], ["abc", "xbc"]):
        seam, came = Replayed(said_in(delivered), FIRST), {0: 0, 1: 0}
        for index in order:
            given_ = seam.feed(event([delta({"content": texts[index][came[index]]}, index=index)]))
            came[index] += 1
            assert not given_ or (all(came.values()) and texts[0] == texts[1])
        if texts[0] == texts[1]:
            assert seam.usage(SECOND) == SECOND
        else:
            assert (seam.broken, seam.outcome, seam.usage(SECOND)) == (True, Outcome.UNEQUAL, FIRST)


@given(st.permutations([0, 0, 0, 1, 1, 1]))
def test_choices_are_whole_in_whatever_order_they_come_again(order: list[int]) -> None:
    delivered = event([delta({"content": "a"}, index=0)]) + event([delta({"content": "ab"}, index=1)])
    seam, came, given_ = Replayed(said_in(delivered), FIRST), {0: 0, 1: 0}, b""
    for index in order:
        given_ += seam.feed(event([delta({"content": "abc"[came[index]]}, index=index)]))
        came[index] += 1
    parts = said_in(delivered + given_ + seam.close()).parts
    assert parts == {0: {"delta.content": "abc"}, 1: {"delta.content": "abc"}}


def test_a_choice_that_never_comes_again_holds_no_more_than_64_kib_of_the_others() -> None:
    delivered = event([delta({"content": "a"}, index=0)]) + event([delta({"content": "a"}, index=1)])
    seam = Replayed(said_in(delivered), FIRST)
    given_ = b"".join(seam.feed(event([delta({"content": "a"})])) for _ in range(700))
    assert (given_, seam.broken, seam.outcome, seam.usage(SECOND)) == (b"", True, Outcome.FAILED, FIRST)


@pytest.mark.parametrize(
    "odd",
    [
        {"tool_calls": ["x", None, 3]},
        {"tool_calls": "x"},
        {"a.b": "c"},
        {"content": ["x"]},
        {"x": {"y": [{"z": None}]}},
    ],
)
def test_odd_members_of_a_second_answer_break_nothing(odd: dict[str, Any]) -> None:
    for seam in (Replayed(said_in(event([delta({"role": "assistant"})])), FIRST), continued(None)):
        both = {"x.y": "q"} | odd
        assert json.loads(seam.feed(event([delta(both)]))[6:])["choices"][0]["delta"] == both


def test_a_member_with_a_dot_in_its_name_is_not_said_twice() -> None:
    _, rest = replayed(event([delta({"a.b": "x"})]), event([delta({"a.b": "xy"})]), [])
    assert json.loads(rest[6:])["choices"][0]["delta"] == {"a.b": "y"}


def test_what_is_nested_too_deep_to_be_written_is_a_failure_of_the_second_server() -> None:
    deep = b'data: {"choices":[{"delta":{"content":"a","b":' + b"[" * 500 + b"1" + b"]" * 500 + b"}}]}\n\n"
    for seam in (Replayed(said_in(b""), FIRST), continued(None)):
        assert (seam.feed(deep), seam.broken, seam.outcome) == (b"", True, Outcome.FAILED)


def test_what_filters_say_of_each_chunk_is_no_text_of_the_answer() -> None:
    """Azure's verdict stands in every chunk, and servers cut an answer into other chunks."""
    safe: dict[str, Any] = {"content_filter_results": {"hate": {"filtered": False, "severity": "safe"}}}
    first = b"".join(event([delta({"content": each}, **safe)]) for each in "abc")
    _, rest = replayed(first, event([delta({"content": "abcd"}, **safe)]), [])
    assert json.loads(rest[6:])["choices"][0] == delta({"content": "d"}, **safe)


@pytest.mark.parametrize("make", [continued, lambda: Replayed(said_in(b""), FIRST)])
def test_a_seam_is_gone_with_its_request(make: Callable[[], Seam]) -> None:
    gc.disable()
    try:
        seam = make()
        gone = weakref.ref(seam)
        del seam
        assert gone() is None
    finally:
        gc.enable()


def test_a_long_text_that_comes_again_in_many_chunks_takes_time_as_its_length() -> None:
    said = said_in(event([delta({"content": "a" * 2_000_000})]))
    seam, read = Replayed(said, FIRST), event([delta({"content": "a"})])
    began = time.thread_time()
    assert not any(seam.feed(read) for _ in range(2000))
    assert time.thread_time() - began < 0.15
