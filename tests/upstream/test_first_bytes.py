"""The time after which a first byte is late, by the latest of them."""

import random
from typing import Any

import pytest

from edge.config.settings import PoolConfig
from edge.upstream.first_bytes import LEAST_SAMPLES, FirstBytes
from edge.upstream.pools import Pool


def test_95_of_100_begin_within_the_time_and_before_there_is_none() -> None:
    window, times = FirstBytes(), [number / 100 for number in range(100)]
    random.Random(7).shuffle(times)
    for time_s in times[1:]:
        window.note(time_s)
        assert window.p95_s is None
    window.note(times[0])
    assert window.p95_s == 0.95


def test_a_pool_that_becomes_slower_is_followed_within_few_answers_and_forgets_what_was() -> None:
    window = FirstBytes()
    for _ in range(500):
        window.note(0.1)
    for _ in range(24):
        window.note(2.0)
    assert window.p95_s == 0.1
    window.note(2.0)
    assert window.p95_s == 2.0
    for _ in range(500):
        window.note(0.1)
    assert window.p95_s == 0.1
    assert len(window._sorted) == len(window._latest) == 500


@pytest.mark.parametrize("stalls", [0.0, 0.02, 0.2])
def test_times_that_were_cut_off_at_the_measured_one_do_not_move_it(stalls: float) -> None:
    """What is outrun counts as it was cut: were it left out, the time would fall with every 20 answers."""
    chance, free, hedged = random.Random(3), FirstBytes(), FirstBytes()
    for _ in range(5000):
        time_s = 2.0 if chance.random() < stalls else chance.lognormvariate(-2, 0.4)
        second_s = chance.lognormvariate(-2, 0.4)
        free.note(time_s)
        after_s = hedged.p95_s
        hedged.note(time_s if after_s is None else min(time_s, after_s + second_s))
    assert free.p95_s is not None
    assert hedged.p95_s is not None
    assert hedged.p95_s == pytest.approx(free.p95_s, rel=0.15)


def test_what_is_measured_outlives_a_reload_that_changes_other_settings() -> None:
    def pool(before: Pool | None = None, **settings: Any) -> Pool:
        return Pool(PoolConfig("p", **settings), [], before)

    before = pool(hedge_after="p95")
    assert before.first_bytes is not None
    for _ in range(LEAST_SAMPLES):
        before.first_bytes.note(0.5)
    assert pool(before, hedge_after="p95", retry_budget=0.4).hedge_after_s == 0.5
    assert pool(before, hedge_after=0.8).hedge_after_s == 0.8
    assert pool(before).hedge_after_s is None
