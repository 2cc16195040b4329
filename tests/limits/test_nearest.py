"""Who is nearest to a limit."""

from edge.limits.admission import Admission
from edge.limits.nearest import Nearness, find_nearest
from tests.limits.test_admission import BEGIN, ROUTE, Clock, admission, admit, limit


def nearest(of: Admission, most: int = 10) -> list[Nearness]:
    found: list[Nearness] = []
    for _ in find_nearest(of, most, found):
        pass
    return found


def test_the_scarcest_part_of_each_counter_is_compared() -> None:
    clock = Clock()
    of = admission(clock, limit(requests_per_minute=10, tokens_per_minute=100, concurrent_requests=4))
    admit(of, user="u-a", tokens=90)
    admit(of, user="u-b", tokens=10)
    for user, count in (("u-b", 2), ("u-c", 5)):
        for _ in range(count):
            admit(of, user=user).charge(0)
    assert [(each.whom, each.what, each.used, each.allowed) for each in nearest(of)] == [
        ("u-a", "tokens", 90, 100),
        ("u-c", "requests", 5, 10),
        ("u-b", "requests", 3, 10),
    ]
    assert {(each.limit, each.route) for each in nearest(of)} == {("standard", ROUTE)}


def test_what_was_used_slides_out_also_of_a_counter_that_nobody_uses() -> None:
    clock = Clock()
    of = admission(clock, limit(requests_per_minute=10))
    for _ in range(8):
        admit(of).charge(0)
    clock.now = BEGIN + 90
    assert [(each.used, each.share) for each in nearest(of)] == [(4, 0.4)]
    clock.now = BEGIN + 120
    assert nearest(of) == []


def test_few_of_thousands_are_named_in_steps() -> None:
    of = admission(Clock(), limit(requests_per_minute=5000))
    for number in range(2500):
        for _ in range(2 if number == 1234 else 1):
            admit(of, user=f"u-{number}").charge(0)
    found: list[Nearness] = []
    assert len(list(find_nearest(of, 3, found))) == 2
    assert len(found) == 3
    assert found[0].whom == "u-1234"


def test_a_limit_that_a_reload_took_away_is_not_shown() -> None:
    of = admission(Clock(), limit(requests_per_minute=5))
    admit(of)
    of.reconfigure({})
    assert nearest(of) == []


def test_days_and_months_that_are_used_up_leave_minutes_their_places() -> None:
    of = admission(Clock(), limit(requests_per_minute=10, requests_per_day=2), limit("other", requests_per_minute=10))
    for number in range(4):
        for _ in range(2):
            admit(of, user=f"u-{number}").charge(0)
    for _ in range(5):
        admit(of, "other", user="u-near").charge(0)
    found = nearest(of, 3)
    assert [each.span for each in found] == ["minute"] * 3 + ["day"] * 3
    assert found[0].whom == "u-near"


def test_what_has_no_limit_is_not_shown_and_what_a_reload_allows_is() -> None:
    of = admission(Clock(), limit(tokens_per_month=1000))
    admit(of).charge(0)
    assert nearest(of) == []
    admit(of, tokens=500).charge(500)
    of.reconfigure({"standard": limit(tokens_per_month=2000)})
    assert [(each.what, each.used, each.allowed) for each in nearest(of)] == [("tokens per month", 500, 2000)]
