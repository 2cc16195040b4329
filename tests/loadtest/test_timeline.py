"""What happened when, in flat memory."""

import pytest

from loadtest.outcome import Outcome
from loadtest.timeline import Live, Timeline


def streamed(start: float, ttft: float, gap: float, count: int, tokens: int) -> Outcome:
    e2el = ttft + gap * (count - 1)
    return Outcome(start, start + e2el, start, 0.0, 0.0, "", ttft, e2el, [gap] * (count - 1), 10, tokens)


def test_tokens_count_where_they_came_and_requests_where_they_ended() -> None:
    timeline = Timeline()
    timeline.add(streamed(0.0, 0.9, 0.2, 2, tokens=4))
    timeline.add(Outcome(0.0, 1.5, 0.0, 0.0, 0.0, "connection lost"))
    timeline.add(Outcome(0.0, 0.5, 0.0, 0.0, 0.0, "", None, 0.5, [], 10, 8))
    assert timeline.tokens_of_second.tolist() == [pytest.approx(10), pytest.approx(2)]
    assert sum(each.finished for each in timeline.intervals()) == 2
    assert timeline.intervals()[-1].failed == 1


def test_intervals_grow_wider_and_lose_nothing() -> None:
    timeline = Timeline()
    for second in range(3600):
        timeline.add(streamed(float(second), 0.1, 0.01, 5, tokens=5))
    assert 60 <= len(timeline.intervals()) <= 120
    assert timeline.width_s == pytest.approx(0.05 * 2**10)
    assert [each.at for each in timeline.intervals()[:2]] == [0.0, timeline.width_s]
    assert sum(each.finished for each in timeline.intervals()) == 3600
    assert sum(each.tokens for each in timeline.intervals()) == pytest.approx(18_000)


def test_the_busiest_moment_is_that_of_all_processes_together() -> None:
    live = Live(2)
    live.add(0, [1.0, 2.0, -3.0], 4.0)
    assert live.most == 0  # the other may tell something of that time yet
    live.add(1, [2.5, -5.0], 6.0)
    assert (live.now, live.most) == (2, 3)
    live.finish(0)
    live.finish(1)
    assert (live.now, live.most) == (1, 3)


def test_an_end_at_the_edge_of_an_interval_is_in_one() -> None:
    timeline = Timeline()
    for number in range(1, 2000):
        timeline.add(streamed(0.0, number / 20, 0.0, 1, tokens=1))
    assert sum(each.tokens for each in timeline.intervals()) == pytest.approx(1999)
