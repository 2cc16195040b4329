"""What a sweep finds, of servers whose behaviour is known."""

import math

import pytest

from loadtest.search import Step, capacity, knee, next_rate


def server(rate: float, most: float = 100.0, service_ms: float = 10.0, slo_ms: float = math.inf) -> Step:
    """A queue of one (M/M/1) that serves `most` a second: its latency, and how many of its requests are soon enough."""
    if rate >= most:
        return Step(rate, most, 10_000.0, 0.0, 0.0)
    e2el_ms = service_ms / (1 - rate / most)
    return Step(rate, rate, e2el_ms, 1 - math.exp(-slo_ms / e2el_ms), 0.0)


def search(first: float, slo_share: float = 0.9, **known: float) -> list[Step]:
    steps: list[Step] = []
    while (rate := next_rate(first, steps, slo_share)) is not None:
        steps.append(server(rate, **known))
    return steps


def test_a_queues_knee_is_at_half_its_load() -> None:
    """For M/M/1 the power is the greatest there: Kleinrock 1979."""
    steps = [server(rate) for rate in range(10, 100, 10)]
    found = knee(steps)
    assert found is not None
    assert found.rate == 50


@pytest.mark.parametrize("first", [3.0, 50.0, 2000.0])
def test_the_capacity_is_found_from_below_and_from_above(first: float) -> None:
    steps = search(first)
    found = capacity(steps, 0.9)
    assert found is not None
    assert 90 <= found.rate < 100
    assert len(steps) <= 13


def test_limits_lower_the_capacity() -> None:
    """90 % within 100 ms: a mean of 100 / ln 10 ms, which is at 77 % of the load."""
    found = capacity(search(10.0, slo_ms=100.0), 0.9)
    assert found is not None
    assert 70 <= found.rate <= 77


def test_a_step_that_is_void_ends_the_search_and_is_no_capacity() -> None:
    steps = [Step(10, 10, 5, 1, 0), Step(20, 20, 5, 1, 0, void=True)]
    assert next_rate(10, [*steps, Step(14.1, 14.1, 5, 1, 0), Step(18.5, 18.5, 5, 1, 0)], 0.9) is None
    found = capacity(steps, 0.9)
    assert found is not None
    assert found.rate == 10


def test_what_is_served_above_a_rate_that_was_too_much_is_no_capacity() -> None:
    steps = [Step(10, 5, 5, 1, 0), Step(20, 20, 5, 1, 0)]
    assert capacity(steps, 0.9) is None
    assert next_rate(10, steps, 0.9) is None


def test_failures_and_slow_answers_are_too_much() -> None:
    assert not Step(10, 10, 5, 1.0, 0.02).is_good(0.9)
    assert not Step(10, 10, 5, 0.89, 0.0).is_good(0.9)
    assert Step(10, 9.6, 5, 0.91, 0.01).is_good(0.9)


def test_the_latency_of_the_last_requests_is_not_held_against_the_rate() -> None:
    """Ten seconds of ten requests a second, each of two seconds: the last ends after twelve."""
    numbers = {"completed": 100, "failed": 0, "duration": 12.0, "median_e2el_ms": 2000.0, "mean_e2el_ms": 2100.0}
    step = Step.of(10.0, numbers | {"goodput_share": None, "void": []})
    assert step.served == pytest.approx(10.0)
    assert (step.share, step.e2el_ms, step.void) == (1.0, 2100.0, False)
