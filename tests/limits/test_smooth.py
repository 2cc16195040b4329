"""A minute that is spread over its seconds."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.config.settings import LimitConfig
from edge.errors import RateLimited
from edge.limits.admission import Admission
from edge.limits.counters import Counts
from tests.limits.test_admission import BEGIN, Clock, admission, admit, collected, refused


def smooth(**numbers: int) -> LimitConfig:
    return LimitConfig("standard", **numbers, smooth=True)


def admits(of: Admission, tokens: int = 0) -> bool:
    try:
        admit(of, tokens=tokens).charge(tokens)
    except RateLimited:
        return False
    return True


def test_a_second_has_a_sixtieth_of_the_minute_at_once_and_then_each_as_it_is_due() -> None:
    clock = Clock()
    of = admission(clock, smooth(requests_per_minute=600))
    assert [admits(of) for _ in range(12)] == [True] * 10 + [False] * 2
    clock.now += 0.1
    assert [admits(of), admits(of)] == [True, False]
    clock.now += 30.0
    assert sum(admits(of) for _ in range(50)) == 10, "idleness gives no credit"


def test_refusal_says_how_soon_and_is_one_of_the_minute() -> None:
    of = admission(Clock(), smooth(requests_per_minute=30))
    admit(of)
    error = refused(of)
    assert error.wait_s == pytest.approx(2.0, abs=0.01)
    assert (error.error_code, error.retry_after_s) == ("rate_limit_exceeded", 3)
    assert "over its seconds" in error.message


def test_more_tokens_than_a_second_has_run_alone_and_are_paid_before_the_next() -> None:
    clock = Clock()
    of = admission(clock, smooth(tokens_per_minute=6000))
    permit = admit(of, tokens=1000)
    assert not admits(of, 1)
    clock.now += 8.0
    assert not admits(of, 200)
    permit.charge(500)  # five seconds' worth, that are over
    assert admits(of, 200)


@given(st.integers(1, 900), st.integers(0, 2**32))
def test_no_second_begins_more_than_its_part_and_one(rate: int, seed: int) -> None:
    draw, clock = random.Random(seed), Clock()
    of = admission(clock, smooth(requests_per_minute=rate))
    times = []
    for _ in range(200):
        clock.now += draw.random() * 0.2
        if admits(of):
            times.append(clock.now)
    for first in range(len(times)):
        within = sum(times[first] <= each < times[first] + 1.0 for each in times)
        assert within <= max(rate / 60, 1) + rate / 60 + 1


def test_what_others_used_is_paid_too() -> None:
    clock = Clock()
    of = admission(clock, smooth(requests_per_minute=600))
    admit(of)
    [counter] = collected(of)
    of.merge([counter], [Counts(int(BEGIN // 60), 9, 0, 0, 0, 0)])
    assert not admits(of)
    clock.now += 0.1
    assert admits(of)


def test_rate_of_a_reload_holds_for_what_others_used_too() -> None:
    clock = Clock()
    of = admission(clock, smooth(requests_per_minute=6))
    admit(of)
    clock.now += 10
    of.reconfigure({"standard": smooth(requests_per_minute=600)})
    assert admits(of)
    [counter] = collected(of)
    of.merge([counter], [Counts(int(BEGIN // 60), 5, 0, 0, 0, 0)])
    clock.now += 1
    assert admits(of)


def test_what_others_used_before_anything_was_known_is_not_taken_for_used_just_now() -> None:
    """Half of the rate was used elsewhere: who begins here has the other half at once."""
    clock = Clock()
    of = admission(clock, smooth(requests_per_minute=60, tokens_per_minute=6000))
    clock.now += 40
    assert admits(of, 100)
    [counter] = collected(of)
    of.merge([counter], [Counts(int(BEGIN // 60), 20, 2000, 0, 0, 0)])
    clock.now += 1
    assert admits(of, 100)
    of.merge([counter], [Counts(int(BEGIN // 60), 20 + 71, 2000, 0, 0, 0)])  # an outage of ten seconds
    clock.now += 1
    assert not admits(of)


def test_server_that_comes_back_empty_holds_nobody_up_for_what_was_paid() -> None:
    clock = Clock()
    of = admission(clock, smooth(requests_per_minute=60))
    for used in range(1, 21):
        assert admits(of)
        [counter] = collected(of)
        of.merge([counter], [Counts(int(BEGIN // 60), used, 0, 0, 0, 0)])
        clock.now += 2
    for used in (0, 20):
        of.merge([counter], [Counts(int(BEGIN // 60), used, 0, 0, 0, 0)])
        clock.now += 0.1
    assert admits(of)


def test_what_is_paid_goes_along_when_the_clock_is_set_back_by_far() -> None:
    clock = Clock()
    of = admission(clock, smooth(requests_per_minute=60))
    of.clock_offset_s = 3600.0
    assert admits(of)
    clock.now += 5
    of.clock_offset_s = 0.0
    assert [admits(of), admits(of)] == [True, False]
