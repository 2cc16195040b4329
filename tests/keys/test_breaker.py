"""When something that is down is asked again."""

from edge.keys.breaker import FAILURES_TO_OPEN, Breaker


def opened(now: float = 0.0) -> Breaker:
    breaker = Breaker()
    for _ in range(FAILURES_TO_OPEN):
        assert breaker.admits(now)
        breaker.fail(now)
    assert breaker.is_open
    return breaker


def test_a_few_failures_in_a_row_open_it() -> None:
    assert not opened().admits(0.0)


def test_an_answer_in_between_begins_the_count_anew() -> None:
    breaker = Breaker()
    for _ in range(10):
        breaker.fail(0.0)
        breaker.fail(0.0)
        breaker.reset()
    assert not breaker.is_open


def test_after_its_pause_one_may_ask() -> None:
    breaker = opened()
    assert not breaker.admits(0.99)
    assert breaker.admits(1.0)
    breaker.begin()
    assert not breaker.admits(100.0)


def test_one_tries_a_second_after_the_last() -> None:
    breaker, now, pauses = opened(), 0.0, []
    for _ in range(4):
        at = next(now + step / 4 for step in range(100) if breaker.admits(now + step / 4))
        pauses.append(at - now)
        now = at
        breaker.begin()
        breaker.fail(now, is_try=True)
        breaker.end()
    assert pauses == [1.0] * 4


def test_one_who_ends_without_an_answer_leaves_the_try_to_another() -> None:
    breaker = opened()
    breaker.begin()
    breaker.end()
    assert breaker.admits(1.0)


def test_failures_of_those_who_asked_before_do_not_prolong_the_pause() -> None:
    breaker = opened()
    for _ in range(50):
        breaker.fail(0.9)
    assert breaker.admits(1.0)
    breaker.begin()
    breaker.fail(1.1)
    assert not breaker.admits(2.2), "the one who tries is still under way"


def test_one_answer_closes_it() -> None:
    breaker = opened()
    breaker.begin()
    breaker.reset()
    assert not breaker.is_open
    assert all(breaker.admits(0.0) for _ in range(3))
