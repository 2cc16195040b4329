"""Streams of chunks: their usage in every dialect, and what of it the client gets."""

from typing import Any

import pytest

from edge.exchange import Usage, UsageSource
from tests.metering.test_meters import CHAT, DONE, USED, chunk, data, events, fed, last, read, usage

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
