"""What an endpoint's answers make of it."""

import re
from pathlib import Path

import pytest

import edge.upstream.health as health_module
from edge.upstream.health import Health, Verdict, judge, may_pass_elsewhere


@pytest.mark.parametrize(
    ("verdict", "statuses"),
    [
        (Verdict.FAULT, [301, 302, 307, 401, 402, 403, 407, 408, 409, 421, 500, 502, 504, 520, 599]),
        (Verdict.BACKPRESSURE, [429, 503, 529]),
        (Verdict.NOTHING, [400, 404, 405, 413, 415, 422, 499, 501]),
        (Verdict.FINE, [200]),
    ],
)
def test_every_status_shows_one_thing(verdict: Verdict, statuses: list[int]) -> None:
    assert {status: judge(status) for status in statuses} == dict.fromkeys(statuses, verdict)


def table(text: str) -> list[str]:
    """The rows of the table of verdicts."""
    return [line for line in text.splitlines() if line.startswith("| ") and line.count(" | ") == 3]


def test_the_table_says_of_every_status_what_it_shows_and_whether_it_is_tried_elsewhere() -> None:
    assert health_module.__doc__ is not None
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in table(health_module.__doc__)[1:]]
    given = [re.findall(r"[0-9]{3}|[345]xx", row[0].replace('a 500 "too large"', "")) for row in rows]
    named = {int(status) for statuses in given for status in statuses if status.isdigit()}
    said = {}
    for (_, shows, elsewhere, _), statuses in zip(rows, given, strict=True):
        for status in statuses:
            first = int(status[0]) * 100
            meant = {int(status)} if status.isdigit() else {*range(first, first + 100)} - named
            said.update(dict.fromkeys(meant, (shows.split(",")[0].lower(), elsewhere in ("yes", "once"))))
    assert said == {status: (judge(status).value, may_pass_elsewhere(status, 0)) for status in range(300, 600)}


def test_the_manual_has_the_same_table() -> None:
    manual = (Path(__file__).parents[2] / "docs/operating.md").read_text()
    assert health_module.__doc__ is not None
    assert set(table(health_module.__doc__)) <= set(manual.splitlines())


def test_another_endpoint_is_asked_where_one_did_no_work_and_once_after_a_404() -> None:
    passed_on = {status for status in range(200, 600) if may_pass_elsewhere(status, 0)}
    assert passed_on == {*range(300, 400), 401, 402, 403, 404, 407, 409, 421, 429, 502, 503, 504, 529}
    assert not may_pass_elsewhere(404, 404)
    assert may_pass_elsewhere(404, 503)
    assert may_pass_elsewhere(503, 503)


ONE, TWO, THREE, OTHER = "u-1", "u-2", "u-3", "u-4"


def fail(health: Health, *users: str, now: float = 0.0) -> Health:
    for user in users:
        health.fault(now, health.begin(user), user)
    return health


def ejected(now: float = 0.0) -> Health:
    return fail(Health(), ONE, TWO, THREE, now=now)


def test_three_users_in_a_row_that_it_failed_eject_it() -> None:
    health = fail(Health(), ONE, TWO)
    assert health.admits(0.0, OTHER)
    fail(health, THREE)
    assert not health.admits(4.9, OTHER)
    assert health.describe(1.0) == "ejected for 4 s"
    assert health.total_ejections == 1


def test_three_connections_in_a_row_that_fail_eject_it_whoever_asked() -> None:
    health = Health()
    for at in range(3):
        assert health.admits(0.0, OTHER), at
        health.unreachable(0.0, health.begin(ONE), ONE)
    assert not health.admits(4.9, OTHER)


def test_one_user_takes_it_from_nobody_else() -> None:
    """However many keys and bodies: an engine answers 500 to bad input, and did so 101 times in 9 s."""
    health = fail(Health(), *[ONE] * 1000)
    assert health.admits(0.0, OTHER)
    assert health.total_ejections == 0
    assert not health.admits(4.9, ONE)
    assert health.back_at(ONE) == 5.0
    assert health.describe(0.0) == "ejected for some users"
    assert health.is_out_for_some


def test_a_user_whom_it_fails_comes_back_on_trial_one_request_at_a_time_and_later_each_time() -> None:
    health, now, times = fail(Health(), ONE, ONE, ONE), 0.0, []
    for _ in range(7):
        times.append(health.out_until(ONE) - now)
        now = health.out_until(ONE)
        assert health.admits(now, ONE)
        era = health.begin(ONE)
        assert not health.admits(now, ONE)
        health.fault(now, era, ONE)
    assert times == [5, 10, 20, 40, 80, 120, 120]
    health.fine(now, health.begin(ONE))
    assert health.admits(now, ONE)
    assert not health.is_tainted


def test_a_good_answer_to_anybody_begins_every_count_anew() -> None:
    health = Health()
    for _ in range(10):
        fail(health, ONE, TWO)
        health.fine(0.0, health.begin(OTHER))
    assert health.admits(0.0, OTHER)
    assert health.admits(0.0, ONE)
    assert not health.is_tainted


def test_after_its_time_one_request_of_a_user_is_let_through_on_trial_and_three_at_once() -> None:
    """A user whose trial takes minutes keeps it from nobody else."""
    health = ejected()
    for user in (ONE, TWO, OTHER):
        assert health.admits(5.0, user)
        health.begin(user)
        assert not health.admits(5.0, user)
    assert not health.admits(5.0, THREE)
    assert health.describe(5.0) == "on trial"


def test_a_trial_that_goes_well_brings_it_back_whole() -> None:
    health = ejected()
    health.fine(5.0, health.begin(ONE))
    assert health.describe(5.0) == "healthy"
    fail(health, ONE, TWO, now=5.0)
    assert health.admits(5.0, OTHER)


def test_a_trial_that_one_user_fails_is_open_to_the_others() -> None:
    """Else a caller with bad input would keep out what is well."""
    health = fail(ejected(), *[ONE] * 20, now=5.0)
    assert not health.admits(5.0, ONE)
    assert health.admits(5.0, TWO)
    assert health.total_ejections == 1


def test_each_ejection_doubles_the_time_up_to_a_bound() -> None:
    by_users, by_connections = ejected(), ejected()
    for health in (by_users, by_connections):
        now, times = 0.0, []
        for _ in range(8):
            times.append(health.ejected_until - now)
            now = health.ejected_until
            if health is by_users:
                fail(health, ONE, TWO, THREE, now=now)
            else:
                health.unreachable(now, health.begin())
        assert times == [5, 10, 20, 40, 80, 120, 120, 120]


def test_a_trial_whose_client_left_frees_the_place_for_another() -> None:
    health = ejected()
    health.abandon(health.begin(ONE), ONE)
    assert health.admits(5.0, ONE)


def test_the_end_of_an_older_request_leaves_the_trial_alone() -> None:
    health = Health()
    older = health.begin(ONE)
    fail(health, ONE, TWO, THREE)
    health.begin(ONE)
    health.abandon(older, ONE)
    assert not health.admits(5.0, ONE)
    health.backpressure(0.0, 0.0, older, ONE)
    assert not health.admits(5.0, ONE)


def test_answers_to_older_requests_do_not_end_an_ejection() -> None:
    """An engine may run its streams to their end and take no new ones; it was asked again and again."""
    health = Health()
    older = health.begin(ONE)
    fail(health, ONE, TWO, THREE)
    health.fine(0.0, older)
    assert not health.admits(4.9)
    assert health.ejected_until == 5.0


def test_answers_to_older_requests_do_not_bring_back_a_user_whom_it_fails() -> None:
    health = Health()
    older = health.begin(OTHER)
    fail(health, ONE, ONE, ONE, TWO)
    health.fine(0.0, older)
    assert not health.admits(4.9, ONE)
    health.fine(0.0, health.begin(OTHER))
    assert health.admits(4.9, ONE)


def test_faults_of_a_request_that_was_sent_for_want_of_another_do_not_prolong_an_ejection() -> None:
    health = fail(ejected(), *(f"u-{at}" for at in range(20)), now=1.0)
    health.unreachable(1.0, health.begin())
    assert health.ejected_until == 5.0
    assert health.admits(5.0)


def test_faults_of_requests_under_way_are_one_ejection() -> None:
    """A member that dies under a hundred requests is not ejected for an hour."""
    health = Health()
    for at, era in enumerate([health.begin(f"u-{at}") for at in range(100)]):
        health.fault(1.0, era, f"u-{at}")
    assert health.total_ejections == 1
    assert health.ejected_until == 6.0


@pytest.mark.parametrize(("asked", "rest"), [(None, 0.5), (1.0, 1.0), (5.0, 5.0), (3600.0, 5.0)])
def test_a_busy_endpoint_rests_as_long_as_it_asks_within_a_bound(asked: float | None, rest: float) -> None:
    health = Health()
    for user in (ONE, TWO):
        health.backpressure(10.0, asked, health.begin(user), user)
    assert not health.admits(10.0 + rest - 0.01, OTHER)
    assert health.describe(10.0) == "busy"
    assert health.admits(10.0 + rest, OTHER)
    assert health.total_ejections == 0


def test_a_rest_that_one_user_was_told_of_is_for_that_user() -> None:
    """A request over a vendor's limit is a 429 each time, and let the whole pool rest."""
    health = Health()
    for at in range(20):
        health.backpressure(at / 10, 5.0, health.begin(ONE), ONE)
    assert health.admits(2.0, OTHER)
    assert not health.admits(2.0, ONE)
    assert health.back_at(ONE) == 6.9
    health.backpressure(7.0, None, health.begin(TWO), TWO)  # the first one's time is over
    assert health.admits(7.0, OTHER)


def test_answers_that_were_under_way_do_not_end_the_rest_a_busy_endpoint_asked_for() -> None:
    """A stream that ended well brought an engine back that had just said how long to leave it alone."""
    health = Health()
    older = health.begin(ONE)
    for user in (ONE, TWO):
        health.backpressure(10.0, 5.0, health.begin(user), user)
    health.fine(12.0, older)
    assert not health.admits(14.9, OTHER)
    assert health.describe(14.9) == "busy"
    assert health.admits(15.0, ONE)
    health.fine(15.0, health.begin(ONE))
    assert not health.is_tainted


def test_backpressure_is_no_fault() -> None:
    health = Health()
    for at in range(100):
        health.backpressure(0.0, None, health.begin(f"u-{at}"), f"u-{at}")
    assert health.admits(0.5)


def test_two_failed_probes_take_it_out_and_one_good_one_brings_it_back() -> None:
    health = Health()
    health.probed(healthy=False, now=0.0)
    assert health.admits(0.0)
    health.probed(healthy=False, now=0.0)
    assert not health.admits(1e9)
    assert health.describe(0.0) == "fails its health check"
    health.probed(healthy=True, now=0.0)
    assert health.admits(0.0)


def test_a_good_answer_does_not_outvote_the_probes() -> None:
    health = Health()
    health.probed(healthy=False, now=0.0)
    health.probed(healthy=False, now=0.0)
    health.fine(0.0, health.begin())
    assert not health.admits(0.0)


def test_good_probes_do_not_outvote_what_requests_meet() -> None:
    """An engine whose model has died may pass its health check for ever."""
    health = fail(Health(), ONE, TWO)
    health.probed(healthy=True, now=0.0)
    fail(health, THREE)
    health.probed(healthy=True, now=0.0)
    assert not health.admits(4.9, OTHER)


def test_since_is_when_it_went_and_when_it_came_back() -> None:
    """A further ejection while it is out is the same absence."""
    health = Health()
    assert health.since == 0.0
    fail(health, ONE, TWO, THREE, now=7.0)
    assert health.since == 7.0
    health.unreachable(12.0, health.begin(ONE), ONE)
    assert health.total_ejections == 2
    assert health.since == 7.0
    health.fine(23.0, health.begin(TWO))
    assert health.since == 23.0
    for now in (30.0, 31.0, 32.0):
        health.probed(healthy=False, now=now)
    assert health.since == 31.0
    health.probed(healthy=True, now=40.0)
    assert health.since == 40.0
