"""Streams of chunks: their usage in every dialect, and what of it the client gets."""

from collections.abc import Callable
from typing import Any

import pytest

from edge.exchange import Usage, UsageSource
from tests.metering.test_meters import CHAT, DONE, USED, alike, chunk, data, events, fed, last, read, usage

FINAL, RUNNING, ESTIMATED, NONE = UsageSource


def given(frames: list[bytes], **options: Any) -> bytes:
    """What the client gets of frames."""
    meter = events(CHAT, **options)
    return b"".join(map(meter.feed, frames)) + meter.close()


def in_choice(index: int, used: dict[str, Any], finish: str = "stop") -> bytes:
    """The last frame of a choice as Moonshot has it."""
    return data({"id": "1", "choices": [{"index": index, "delta": {}, "finish_reason": finish, "usage": used}]})


# --- where usage stands


def test_usage_of_a_choice_counts() -> None:
    used = usage(12, 5, cached_tokens=8)
    assert read([chunk(), in_choice(0, used), DONE]) == Usage(12, 5, 8, source=FINAL)
    assert given([in_choice(0, used)], hide_usage=True) == in_choice(0, used)


def test_usage_of_groq_counts() -> None:
    frames = [chunk(x_groq={"id": "r"}), chunk({}, "stop", x_groq={"id": "r", "usage": usage(queue_time=0.1)}), DONE]
    assert read(frames) == USED
    assert read([chunk(x_groq=7), chunk(x_groq=None), chunk(x_groq={"usage": 7})]).source is ESTIMATED
    both = data({"choices": [], "usage": usage(), "x_groq": {"usage": usage(1, 1)}})
    assert read([chunk(), both]) == USED


def test_timings_count_where_there_is_no_usage() -> None:
    timings = {"cache_n": 8, "prompt_n": 4, "prompt_ms": 1.5, "predicted_n": 5, "predicted_ms": 9.25}
    finish = chunk({}, "stop", timings=timings)
    for frames in ([chunk(), finish, DONE], [chunk(timings=timings | {"predicted_n": 1}), finish, DONE]):
        assert read(frames) == Usage(12, 5, 8, source=FINAL)
        assert read(frames[:1] + frames[1:], whole=False) == Usage(12, 5, 8, source=RUNNING)
    for frames in (
        [last(timings=timings)],
        [chunk(timings=timings), last()],
        [last(), chunk({}, "stop", timings=timings)],
    ):
        assert read([chunk(), *frames]) == USED
    assert read([chunk(), chunk({}, "stop", timings={"prompt_n": 1})]).source is ESTIMATED


def test_usage_that_is_null_takes_nothing_away() -> None:
    assert read([chunk(usage=None), chunk({}, "stop", usage=usage()), data({"choices": [], "usage": None})]) == USED


# --- what the client did not ask for


@pytest.mark.parametrize("choices", [{}, {"choices": None}, {"choices": []}], ids=["absent", "null", "empty"])
def test_usage_frame_is_read_and_hidden_whatever_its_shape(choices: dict[str, Any]) -> None:
    frames = [chunk(), chunk({}, "stop"), data({"id": "1", **choices, "usage": usage()}), DONE]
    assert read(frames) == USED
    assert given(frames, hide_usage=True) == b"".join([*frames[:2], DONE])
    assert given(frames) == b"".join(frames)


@pytest.mark.parametrize("dumps", [data, alike], ids=["compact", "spaced"])
def test_null_that_announces_usage_is_hidden_with_it(dumps: Callable[[object], bytes]) -> None:
    """As OpenAI sends it in each chunk once usage is asked for."""

    def frames(**members: Any) -> list[bytes]:
        deltas = [{"role": "assistant"}, *({"content": text} for text in "abc")]
        chunks = [{"choices": [{"delta": each, "finish_reason": None}]} | members for each in deltas]
        return list(map(dumps, [*chunks, {"choices": [{"delta": {}, "finish_reason": "stop"}]} | members]))

    sent = [*frames(usage=None), last(), DONE]
    assert given(sent, hide_usage=True) == b"".join([*frames(), DONE])
    assert given(sent, continuous=True, hide_usage=True, hide_running=True) == b"".join([*frames(), DONE])
    assert given(sent) == given(sent, continuous=True, hide_running=True) == b"".join(sent)
    meter = fed(events(hide_usage=True), sent[:-2])
    assert meter.ending == b"", "each has to be changed"
    assert meter.usage(False) == Usage(7, 3, source=ESTIMATED)
    assert fed(meter, [sent[-2]]).usage(True) == USED
    assert fed(events(), sent[:3]).ending, "nothing is to be changed"


@pytest.mark.parametrize("behind", [b',"x":1', b',"obfuscation":"aX9"', b""])
def test_null_is_taken_out_of_every_frame_wherever_it_stands(behind: bytes) -> None:
    frame = b'data: {"choices":[{"delta":{"content":"a"},"finish_reason":null}]%b%b}\n\n'
    sent = [frame % (b',"usage":null', behind)] * 4
    assert given(sent, hide_usage=True) == frame % (b"", behind) * 4
    turned = b'data: {"usage":null,"choices":[{"delta":{"content":"a"},"finish_reason":null}]%b}\n\n' % behind
    assert given([turned] * 4, hide_usage=True) == turned.replace(b'"usage":null,', b"") * 4


def test_usage_on_the_last_frame_of_a_choice_stays_for_who_asked_for_usage() -> None:
    """transformers and llama.cpp have it nowhere else; what runs up to the end is not for who asked for the end."""
    finish = chunk({}, "stop", usage=usage())
    only_there = [chunk(), finish, DONE]
    assert given(only_there, continuous=True, hide_running=True) == b"".join(only_there)
    hidden = b"".join([chunk(), chunk({}, "stop"), DONE])
    assert given(only_there, continuous=True, hide_running=True, hide_usage=True) == hidden
    assert given(only_there, hide_usage=True) == b"".join(only_there), "whoever asks what"
    runs = [chunk(usage=usage(12, 1)), finish, last(), DONE]
    assert given(runs, continuous=True, hide_running=True) == b"".join([chunk(), chunk({}, "stop"), last(), DONE])


# --- failures


@pytest.mark.parametrize("choices", [{}, {"choices": None}, {"choices": []}], ids=["absent", "null", "empty"])
@pytest.mark.parametrize("end", [[], [DONE]], ids=["open", "done"])
def test_failure_before_the_usage_frame_stays_one(choices: dict[str, Any], end: list[bytes]) -> None:
    """SGLang sends the error of a request that ran for too long, then its usage, then `[DONE]`."""
    error = data({"error": {"object": "error", "message": "a", "type": "SERVICE_UNAVAILABLE", "code": 503}})
    meter = fed(events(), [chunk(), error, data({"id": "1", **choices, "usage": usage(26, 300)}), *end])
    assert meter.failed
    assert meter.usage(True) == Usage(26, 300, source=FINAL)
    assert fed(meter, [data({"choices": []})]).failed
    assert not fed(meter, [chunk()]).failed


# --- several choices


def choice(index: int, finish: str | None = None, **members: Any) -> bytes:
    delta = {} if finish else {"content": "ab"}
    return data({"id": "1", "choices": [{"index": index, "delta": delta, "finish_reason": finish}], **members})


def test_usage_frame_behind_each_choice_counts_that_choice() -> None:
    """As llama.cpp does where `n` are asked for. The prompt counts once, with what of it had been cached before."""
    first = last(usage=usage(26, 2, prompt_tokens_details={"cached_tokens": 3}))
    second = last(usage=usage(26, 4, prompt_tokens_details={"cached_tokens": 25}))
    frames = [choice(0), choice(1), choice(0, "stop"), first, choice(1), choice(1, "stop"), second, DONE]
    for n in (1, 2):
        assert fed(events(n=n), frames).usage(True) == Usage(26, 6, 3, source=FINAL)
    assert read(frames[:4], whole=False) == Usage(26, 2, 3, source=FINAL)
    assert read(frames[:5], whole=False) == Usage(26, 2, 3, source=RUNNING)
    shown = [frame for frame in frames if frame not in (first, second)]
    assert given(frames, hide_usage=True) == b"".join(shown)


@pytest.mark.parametrize(
    "frames",
    [
        [choice(0), choice(1), choice(1, "stop"), choice(0, "stop"), last()],
        [choice(0), choice(0, "stop"), last(usage=usage(12, 4)), last()],
        [choice(0), last(usage=usage(12, 1)), choice(0), last(usage=usage(12, 2)), choice(0, "stop"), last()],
        [choice(0), choice(0, "stop"), last(), choice(0, "stop"), last()],
        [choice(0, usage=usage(12, 1)), choice(1, usage=usage(12, 1)), choice(0, "stop"), choice(1, "stop"), last()],
    ],
    ids=["of all", "twice", "running", "one choice that ends twice", "on the others too"],
)
def test_usage_frame_that_counts_all_is_not_summed(frames: list[bytes]) -> None:
    assert read([*frames, DONE]) == USED


def test_next_choice_is_seen_behind_a_usage_frame() -> None:
    meter = fed(events(), [choice(0), choice(0, "stop")])
    assert meter.ending
    assert not fed(meter, [last()]).ending


def test_running_usage_is_that_of_its_choice() -> None:
    """As vLLM does, `previous_num_tokens[i]`; the end tells all of it."""

    def frame(count: int, **index: int) -> bytes:
        choice = {**index, "delta": {"content": "ab"}, "finish_reason": None}
        return data({"choices": [choice], "usage": usage(12, count)})

    def used(frames: list[bytes]) -> Usage:
        return fed(events(continuous=True, n=4), frames).usage(False)

    frames = [frame(2 * count, index=index) for count in range(1, 6) for index in range(4)]
    assert used(frames) == Usage(12, 40, source=RUNNING)
    assert used(frames[:-3]) == Usage(12, 34, source=RUNNING)
    assert used([*frames, last(usage=usage(12, 43))]) == Usage(12, 43, source=FINAL)
    assert used([frame(2, index=0), frame(4)]) == Usage(12, 4, source=RUNNING), "an index that is left out is the first"


def test_prompts_of_a_list_are_summed_each_once() -> None:
    """Each has `n` choices in a row. llama.cpp tells the usage of each choice on its last frame."""
    frames = [
        choice(0),
        choice(1),
        choice(0, "length", usage=usage(5, 1)),
        choice(1, "length", usage=usage(9, 1)),
        DONE,
    ]
    assert fed(events("completions"), frames).usage(True) == Usage(14, 2, source=FINAL)
    assert fed(events("completions", n=2), frames).usage(True) == Usage(5, 2, source=FINAL)
    details = {"prompt_tokens_details": {"cached_tokens": 2}, "completion_tokens_details": {"reasoning_tokens": 1}}
    four = [choice(at, "stop", usage=usage(5 if at < 2 else 9, at + 1, **details)) for at in (3, 0, 2, 1)]
    assert fed(events("completions", n=2), four).usage(True) == Usage(14, 10, 4, 4, source=FINAL)


def test_timings_of_each_choice_are_summed() -> None:
    timings = [{"prompt_n": 12 - cached, "cache_n": cached, "predicted_n": 3} for cached in (0, 11)]
    frames = [choice(at, "stop", timings=each) for at, each in enumerate(timings)]
    assert fed(events(n=2), frames).usage(True) == Usage(12, 6, 0, source=FINAL)


@pytest.mark.parametrize("index", [None, -1, 1.5, "1", 10**18, [], {}])
def test_odd_index_is_that_of_the_first_choice(index: Any) -> None:
    frames = [choice(index, "stop", usage=usage(12, 3)), choice(0, "stop", usage=usage(12, 5))]
    assert read(frames) == USED
