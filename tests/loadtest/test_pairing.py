"""Ratios of paired rounds: medians, intervals, slopes, and the order of rounds."""

import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.pairing import MIN_ROUNDS, differences, estimate, line, passes, ratios

POSITIVE = st.floats(min_value=1e-3, max_value=1e6)


@given(st.lists(POSITIVE, min_size=MIN_ROUNDS, max_size=40))
def test_the_interval_holds_the_median_and_has_values_of_its_own_as_ends(values: list[float]) -> None:
    told = estimate(values)
    assert told.low in values
    assert told.high in values
    assert told.low <= told.median <= told.high
    assert told.median == statistics.median(values)
    assert told.rounds == len(values)


@pytest.mark.parametrize("rounds", range(1, MIN_ROUNDS))
def test_too_few_rounds_have_no_interval(rounds: int) -> None:
    told = estimate([1.0] * rounds)
    assert (told.median, told.low, told.high, told.span) == (1.0, None, None, "")


def test_an_interval_narrows_with_more_rounds() -> None:
    assert estimate(range(6)).span == "[0.000, 5.000]"
    assert estimate(range(9)).span == "[1.000, 7.000]"
    assert estimate(range(100)).span == "[39.000, 60.000]"  # as tables have it: the 40th value and the 61st


@pytest.mark.parametrize("rounds", [6, 9, 12, 20])
@pytest.mark.parametrize("skewed", [False, True])
def test_the_interval_covers_the_true_median_as_often_as_it_says(rounds: int, skewed: bool) -> None:
    """By a simulation whose error is 0.5 %; of a lognormal distribution, too, as that of times is."""
    draw = random.Random(rounds)

    def covers() -> bool:
        told = estimate([math.exp(each) if skewed else each for each in (draw.gauss() for _ in range(rounds))])
        assert told.low is not None
        assert told.high is not None
        return told.low <= (1 if skewed else 0) <= told.high

    assert statistics.fmean(covers() for _ in range(2000)) >= 0.94


def test_no_values_have_no_median() -> None:
    with pytest.raises(ValueError, match="no values"):
        estimate([])


def test_a_round_that_one_side_lacks_makes_no_pair() -> None:
    assert ratios([2.0, None, 6.0, 8.0], [1.0, 1.0, None, 4.0]) == [2.0, 2.0]
    assert differences([2.0, None, 6.0, 8.0], [1.0, 1.0, None, 4.0]) == [1.0, 4.0]


def test_a_baseline_of_nothing_makes_no_ratio() -> None:
    assert ratios([2.0, 3.0], [0.0, 1.5]) == [2.0]


def test_pairs_forgive_a_machine_that_slows_down_for_both() -> None:
    nginx = [10.0, 20.0, 40.0]
    assert estimate(ratios([each * 3 for each in nginx], nginx)).median == pytest.approx(3)


def test_the_slope_is_the_cost_of_an_event_and_the_intercept_that_of_a_stream() -> None:
    per_event, per_stream = line([(10, 100 + 10 * 7), (40, 100 + 40 * 7), (160, 100 + 160 * 7)])
    assert per_event == pytest.approx(7)
    assert per_stream == pytest.approx(100)


def test_one_point_makes_no_line() -> None:
    with pytest.raises(ValueError, match="two different"):
        line([(10, 1), (10, 2)])


@given(st.integers(1, 9), st.integers(0, 5))
def test_every_round_has_every_proxy_and_every_second_one_runs_backwards(rounds: int, seed: int) -> None:
    orders = passes(["edge", "nginx", "floor"], rounds, seed)
    assert len(orders) == rounds
    assert all(sorted(order) == ["edge", "floor", "nginx"] for order in orders)
    assert all(back == there[::-1] for there, back in zip(orders[::2], orders[1::2], strict=False))


def test_the_order_is_random_and_told_by_the_seed() -> None:
    names = ["a", "b", "c", "d"]
    assert passes(names, 8, 1) == passes(names, 8, 1)
    assert len({tuple(order) for order in passes(names, 40, 1)}) > 4
