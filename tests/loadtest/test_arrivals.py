"""The open-loop schedule."""

import itertools
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.arrivals import schedule


@given(
    count=st.integers(1, 300),
    rate=st.floats(0.1, 1e5),
    burstiness=st.floats(0.1, 50),
    seed=st.integers(0, 2**32),
)
def test_times_begin_at_zero_never_go_back_and_offer_the_asked_rate(
    count: int, rate: float, burstiness: float, seed: int
) -> None:
    times = schedule(count, rate, burstiness, seed)
    assert len(times) == count
    assert times[0] == 0.0
    assert times == sorted(times)
    assert times[-1] <= count / rate * (1 + 1e-9)


def test_a_seed_gives_the_same_times_and_another_seed_others() -> None:
    assert schedule(50, 10, seed=1) == schedule(50, 10, seed=1)
    assert schedule(50, 10, seed=1) != schedule(50, 10, seed=2)


def test_an_infinite_rate_sends_all_at_once() -> None:
    assert schedule(3, float("inf")) == [0.0, 0.0, 0.0]


def test_gaps_of_a_poisson_process_vary_as_much_as_their_mean_and_a_higher_shape_evens_them_out() -> None:
    def variation(burstiness: float) -> float:
        gaps = [after - before for before, after in itertools.pairwise(schedule(20_000, 100, burstiness))]
        return statistics.pstdev(gaps) / statistics.fmean(gaps)

    assert variation(1) == pytest.approx(1, rel=0.05)
    assert variation(4) == pytest.approx(0.5, rel=0.05)
    assert variation(0.25) == pytest.approx(2, rel=0.1)


@pytest.mark.parametrize(("rate", "burstiness"), [(0, 1), (-1, 1), (1, 0), (float("nan"), 1), (1, float("inf"))])
def test_a_rate_or_shape_that_is_not_above_zero_is_refused(rate: float, burstiness: float) -> None:
    with pytest.raises(ValueError, match="above 0"):
        schedule(1, rate, burstiness)


def test_gaps_too_small_for_a_float_are_none() -> None:
    assert schedule(1, 10.0, 0.001, seed=1) == [0.0]
