"""What an endpoint's answers make of it."""

import pytest

from edge.upstream.health import Health, Verdict, judge


@pytest.mark.parametrize(
    ("status", "verdict"),
    [
        (500, Verdict.FAULT),
        (502, Verdict.FAULT),
        (504, Verdict.FAULT),
        (301, Verdict.FAULT),
        (401, Verdict.FAULT),
        (403, Verdict.FAULT),
        (407, Verdict.FAULT),
        (409, Verdict.FAULT),
        (529, Verdict.BACKPRESSURE),
        (429, Verdict.BACKPRESSURE),
        (503, Verdict.BACKPRESSURE),
        (200, Verdict.FINE),
        (400, Verdict.FINE),
        (404, Verdict.FINE),
        (422, Verdict.FINE),
        (501, Verdict.FINE),
    ],
)
def test_every_status_belongs_to_one_of_three_classes(status: int, verdict: Verdict) -> None:
    assert judge(status) is verdict


def faulty(now: float = 0.0) -> Health:
    health = Health()
    for _ in range(3):
        health.fault(now, health.begin())
    return health


def test_three_faults_in_a_row_eject() -> None:
    health = Health()
    for _ in range(2):
        health.fault(0.0, health.begin())
        assert health.admits(0.0)
    health.fault(0.0, health.begin())
    assert not health.admits(4.9)
    assert health.describe(1.0) == "ejected for 4 s"
    assert health.total_ejections == 1


def test_a_good_answer_in_between_begins_the_count_anew() -> None:
    health = Health()
    for _ in range(10):
        health.fault(0.0, health.begin())
        health.fault(0.0, health.begin())
        health.fine(0.0, health.begin())
    assert health.admits(0.0)
    assert not health.is_tainted


def test_after_its_time_one_request_is_let_through_on_trial() -> None:
    health = faulty()
    assert health.admits(5.0)
    health.begin()
    assert not health.admits(5.0)
    assert health.describe(5.0) == "on trial"


def test_a_trial_that_goes_well_brings_it_back_whole() -> None:
    health = faulty()
    health.fine(0.0, health.begin())
    assert health.admits(5.0)
    assert health.describe(5.0) == "healthy"
    for _ in range(2):
        health.fault(5.0, health.begin())
    assert health.admits(5.0)


def test_each_failed_trial_doubles_the_time_up_to_a_bound() -> None:
    health = faulty()
    now, times = 0.0, []
    for _ in range(8):
        times.append(health.ejected_until - now)
        now = health.ejected_until
        health.fault(now, health.begin())
    assert times == [5, 10, 20, 40, 80, 120, 120, 120]


def test_a_trial_whose_client_left_frees_the_place_for_another() -> None:
    health = faulty()
    health.abandon(health.begin())
    assert health.admits(5.0)


def test_the_end_of_an_older_request_leaves_the_trial_alone() -> None:
    health = Health()
    older = health.begin()
    for _ in range(3):
        health.fault(0.0, health.begin())
    health.begin()
    health.abandon(older)
    assert not health.admits(5.0)
    health.backpressure(0.0, 0.0, older)
    assert not health.admits(5.0)


def test_answers_to_older_requests_do_not_end_an_ejection() -> None:
    """An engine may run its streams to their end and take no new ones; it was asked again and again."""
    health = Health()
    older = health.begin()
    for _ in range(3):
        health.fault(0.0, health.begin())
    health.fine(0.0, older)
    assert not health.admits(4.9)
    assert health.ejected_until == 5.0


def test_faults_of_a_request_that_was_sent_for_want_of_another_do_not_prolong_an_ejection() -> None:
    health = faulty()
    for _ in range(20):
        health.fault(1.0, health.begin())
    assert health.ejected_until == 5.0
    assert health.admits(5.0)


def test_faults_of_requests_under_way_are_one_ejection() -> None:
    """A member that dies under a hundred requests is not ejected for an hour."""
    health = Health()
    for era in [health.begin() for _ in range(100)]:
        health.fault(1.0, era)
    assert health.total_ejections == 1
    assert health.ejected_until == 6.0


@pytest.mark.parametrize(("asked", "rest"), [(None, 0.5), (1.0, 1.0), (5.0, 5.0), (3600.0, 5.0)])
def test_a_busy_endpoint_rests_as_long_as_it_asks_within_a_bound(asked: float | None, rest: float) -> None:
    health = Health()
    health.backpressure(10.0, asked, health.begin())
    assert not health.admits(10.0 + rest - 0.01)
    assert health.admits(10.0 + rest)
    assert health.total_ejections == 0


def test_answers_that_were_under_way_do_not_end_the_rest_a_busy_endpoint_asked_for() -> None:
    """A stream that ended well brought an engine back that had just said how long to leave it alone."""
    health = Health()
    older = health.begin()
    health.backpressure(10.0, 5.0, health.begin())
    health.fine(12.0, older)
    assert not health.admits(14.9)
    assert health.describe(14.9) == "busy"
    assert health.admits(15.0)
    health.fine(15.0, health.begin())
    assert not health.is_tainted


def test_backpressure_is_no_fault() -> None:
    health = Health()
    for _ in range(100):
        health.backpressure(0.0, None, health.begin())
    assert health.admits(0.5)


def test_two_failed_probes_take_it_out_and_one_good_one_brings_it_back() -> None:
    health = Health()
    health.probed(healthy=False)
    assert health.admits(0.0)
    health.probed(healthy=False)
    assert not health.admits(1e9)
    assert health.describe(0.0) == "fails its health check"
    health.probed(healthy=True)
    assert health.admits(0.0)


def test_a_good_answer_does_not_outvote_the_probes() -> None:
    health = Health()
    health.probed(healthy=False)
    health.probed(healthy=False)
    health.fine(0.0, health.begin())
    assert not health.admits(0.0)
