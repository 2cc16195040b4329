"""Who may start now, by limits that are counted here."""

import logging
from collections import Counter as Tally
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from edge.config.settings import LimitConfig
from edge.errors import RateLimited
from edge.limits.admission import UNLIMITED, Admission, Permit
from edge.limits.counters import Counter, Counts
from tests.profiles import examples

ROUTE = "public/deepseek-r1"
USER = "u-1100a15812cc"
BEGIN = 1_700_000_040.0  # a minute begins here
ROUNDING = 1e-3


@dataclass
class Clock:
    """A clock that is moved by hand."""

    now: float = BEGIN

    def __call__(self) -> float:
        return self.now


def limit(name: str = "standard", per: Any = "user", **numbers: int | None) -> LimitConfig:
    return LimitConfig(name, per, **numbers)


def admission(clock: Clock, *limits: LimitConfig) -> Admission:
    return Admission({each.name: each for each in limits}, clock)


def admit(
    of: Admission, *names: str, user: str = USER, key_id: str = "key_1", route: str = ROUTE, tokens: int = 0
) -> Permit:
    return of.admit(route, names or ("standard",), user, key_id, tokens)


def refused(of: Admission, *names: str, **kwargs: Any) -> RateLimited:
    with pytest.raises(RateLimited) as caught:
        admit(of, *names, **kwargs)
    return caught.value


def collected(of: Admission, everything: bool = False) -> list[Counter]:
    return [counter for some in of.collect(everything) for counter in some]


def counters(of: Admission) -> dict[tuple[str, str, str], Counter]:
    return {counter.key: counter for counter in collected(of, everything=True)}


def counter_count(of: Admission) -> float:
    family, _ = of.metrics()
    assert family.name == "edge_limit_counters"
    return family.samples[0].value


def only(of: Admission) -> Counter:
    [counter] = counters(of).values()
    return counter


def shown(permit: Permit) -> dict[str, str]:
    """The headers of a permit, without what their names begin with."""
    lines = permit.headers.decode().split("\r\n")
    assert lines.pop() == ""
    pairs = [line.split(": ") for line in lines]
    assert all(name.startswith("x-ratelimit-") for name, _ in pairs)
    return {name.removeprefix("x-ratelimit-"): value for name, value in pairs}


# --- what is admitted


def test_no_limits_cost_nothing_and_say_nothing() -> None:
    permit = admission(Clock()).admit(ROUTE, (), USER, "key_1", 100)
    assert permit is UNLIMITED
    assert permit.headers == b""
    permit.charge(50)
    permit.charge(50)


def test_requests_are_admitted_up_to_the_limit() -> None:
    of = admission(Clock(), limit(requests_per_minute=3))
    for _ in range(3):
        admit(of).charge(0)
    refused(of)


def test_tokens_are_reserved_when_a_request_starts() -> None:
    of = admission(Clock(), limit(tokens_per_minute=1000))
    admit(of, tokens=600)
    refused(of, tokens=401)
    admit(of, tokens=400)


def test_what_an_answer_may_take_is_no_matter_where_tokens_have_no_limit() -> None:
    of = admission(Clock(), limit(requests_per_minute=10))
    first = of.admit(ROUTE, ("standard",), USER, "key_1", 10, 10**15, 1)
    admit(of, tokens=10)
    first.charge(30, 20)


def test_places_are_given_back_when_a_request_is_settled_and_only_once() -> None:
    of = admission(Clock(), limit(concurrent_requests=2))
    first, _ = admit(of), admit(of)
    refused(of)
    first.charge(0)
    first.charge(0)
    admit(of)
    refused(of)


def test_users_keys_and_routes_are_counted_apart() -> None:
    of = admission(Clock(), limit(requests_per_minute=1), limit("each", "key", requests_per_minute=1))
    admit(of, "standard", key_id="key_1")
    refused(of, "standard", key_id="key_2")
    admit(of, "standard", key_id="key_1", route="public/deepseek-v3")
    admit(of, "standard", user="u-2")
    admit(of, "each", key_id="key_1")
    refused(of, "each", key_id="key_1", user="u-2")
    admit(of, "each", key_id="key_2")


def test_every_limit_must_allow_it_and_a_refusal_charges_none() -> None:
    """A request that concurrency refuses must not use up the requests of the minute."""
    of = admission(
        Clock(),
        limit("route", requests_per_minute=10, tokens_per_minute=1000, concurrent_requests=5),
        limit("key", "key", concurrent_requests=1),
    )
    admit(of, "route", "key", tokens=100)
    before = repr(counters(of))
    for _ in range(20):
        refused(of, "route", "key", tokens=100)
        refused(of, "key", "route", tokens=100)
    assert repr(counters(of)) == before


def test_limit_that_is_named_twice_counts_once() -> None:
    of = admission(Clock(), limit(requests_per_minute=2))
    admit(of, "standard", "standard")
    admit(of, "standard", "standard")
    refused(of, "standard", "standard")


def test_unknown_limit_is_logged_once_and_limits_nothing(caplog: pytest.LogCaptureFixture) -> None:
    of = admission(Clock(), limit(requests_per_minute=1))
    for number in range(3):
        assert admit(of, "gone", user=f"u-{number}") is UNLIMITED
        admit(of, "standard", "gone", user=f"u-{number}")
    refused(of, "standard", "gone", user="u-0")
    assert [(record.levelno, record.args) for record in caplog.records] == [(logging.WARNING, ("gone",))]


def test_names_that_keys_bring_do_not_fill_memory_or_the_log(caplog: pytest.LogCaptureFixture) -> None:
    of = admission(Clock(), limit(requests_per_minute=10_000))
    for number in range(3000):
        admit(of, "standard", f"gone{number}").charge(0)
    assert len(caplog.records) == 1000
    assert len(of._applying) <= 1000


def test_request_that_is_larger_than_the_limit_runs_alone() -> None:
    clock = Clock()
    of = admission(clock, limit(tokens_per_minute=1000))
    permit = admit(of, tokens=5000)
    refused(of, tokens=1)
    permit.charge(0)
    admit(of, tokens=1).charge(1)
    assert refused(of, tokens=5000).retry_after_s == 59
    clock.now += 120
    admit(of, tokens=5000)


# --- the window


def test_the_minute_before_counts_by_the_share_that_is_still_in_the_window() -> None:
    clock = Clock()
    of = admission(clock, limit(requests_per_minute=60))
    for _ in range(60):
        admit(of)
    clock.now = BEGIN + 59.9
    refused(of)
    clock.now = BEGIN + 60
    refused(of)
    clock.now = BEGIN + 75.01  # 45 of them are left
    for _ in range(15):
        admit(of)
    refused(of)
    clock.now = BEGIN + 120  # none is left of those, all of these
    for _ in range(45):
        admit(of)
    refused(of)
    clock.now = BEGIN + 240
    for _ in range(60):
        admit(of)


@pytest.mark.parametrize(
    ("passed_s", "tokens", "previous", "current"),
    [
        (0, 700, 0, 700),
        (0, 200, 0, 200),
        (60, 700, 700, 0),  # in the minute it was reserved in
        (60, 200, 200, 0),
        (150, 700, 0, 200),  # that minute is gone: what was used on top counts now
        (150, 200, 0, 0),
        (150, 500, 0, 0),
    ],
)
def test_reservation_is_corrected_in_its_minute(passed_s: float, tokens: int, previous: int, current: int) -> None:
    clock = Clock()
    of = admission(clock, limit(tokens_per_minute=1000))
    permit = admit(of, tokens=500)
    clock.now += passed_s
    permit.charge(tokens)
    permit.charge(tokens)
    counter = only(of)
    assert (counter.previous_tokens, counter.tokens, counter.running) == (previous, current, 0)


def test_more_than_was_reserved_holds_up_the_next() -> None:
    of = admission(Clock(), limit(tokens_per_minute=1000))
    admit(of, tokens=10).charge(3000)
    error = refused(of, tokens=0)
    assert "limit 1000, used 3000, requested 0" in str(error)
    assert dict(error.headers)["x-ratelimit-remaining-tokens"] == "0"


# --- what an answer reserves


def reserved(of: Admission, *names: str, answers: int = 1, max_tokens: int | None = None, user: str = USER) -> int:
    """What a request without a prompt would reserve now, which it does not do."""
    permit = of.admit(ROUTE, names or ("standard",), user, "key_1", 0, answers, max_tokens)
    counter = counters(of)[(names or ("standard",))[0], ROUTE, user]
    tokens = counter.tokens
    permit.cancel()
    return tokens - counter.tokens


def used(of: Admission, *answers: int, user: str = USER) -> None:
    """Take back what these answers were charged, but for what they taught."""
    for tokens in answers:
        permit = of.admit(ROUTE, ("standard",), user, "key_1", 0, 1)
        permit.charge(tokens, tokens)
    counters(of)["standard", ROUTE, user].tokens = 0


TOKENS_OF = limit(tokens_per_minute=100_000)


@pytest.mark.parametrize(("max_tokens", "expected"), [(None, 256), (32_000, 256), (131_072, 256), (256, 256), (9, 9)])
def test_first_answer_reserves_little_however_much_it_may_have(max_tokens: int | None, expected: int) -> None:
    of = admission(Clock(), TOKENS_OF)
    assert reserved(of, max_tokens=max_tokens) == expected
    assert reserved(of, max_tokens=max_tokens, answers=3) == 3 * expected
    assert reserved(of, max_tokens=max_tokens, answers=0) == 0


def test_four_agents_that_ask_for_much_and_use_little_run_at_once() -> None:
    of = admission(Clock(), limit(tokens_per_minute=100_000, concurrent_requests=8))
    for _ in range(5):
        permits = [of.admit(ROUTE, ("standard",), USER, "key_1", 21, 1, 32_000) for _ in range(4)]
        for permit in permits:
            permit.charge(121, 100)
    assert only(of).tokens == 20 * 121


def test_answer_reserves_what_the_latest_ones_took() -> None:
    of = admission(Clock(), TOKENS_OF)
    used(of, *[4000] * 20)
    assert 3900 < reserved(of) == reserved(of, max_tokens=32_000) <= 4000
    assert reserved(of, max_tokens=1000) == 1000
    used(of, 100)
    assert 2900 < reserved(of) < 3100, "the latest has a quarter"
    used(of, *[100] * 20)
    assert reserved(of) == 256


def test_answer_that_did_not_come_teaches_nothing() -> None:
    of = admission(Clock(), TOKENS_OF)
    used(of, *[4000] * 20)
    before = reserved(of)
    for _ in range(20):
        of.admit(ROUTE, ("standard",), USER, "key_1", 50, 1).charge(0)
    assert reserved(of) == before


def test_each_of_several_answers_counts_as_one() -> None:
    of = admission(Clock(), TOKENS_OF)
    for _ in range(20):
        of.admit(ROUTE, ("standard",), USER, "key_1", 0, 10, 1000).charge(5000, 5000)
    only(of).tokens = 0
    assert 490 < reserved(of) <= 500
    assert 4900 < reserved(of, answers=10) <= 5000


def test_what_is_usual_is_known_of_each_user_and_route_and_only_for_as_long_as_it_counts() -> None:
    clock = Clock()
    of = admission(clock, TOKENS_OF)
    used(of, *[4000] * 20)
    assert reserved(of, user="u-2") == 256
    clock.now += 60
    assert reserved(of) > 3900
    clock.now += 180
    assert reserved(of) == 256


@pytest.mark.parametrize(
    ("at_most", "max_tokens", "expected"),
    [
        (2000, 32_000, 2000),
        (2000, 500, 500),
        (2000, None, 256),
        (100, None, 100),
        (10**6, 32_000, 32_000),
        (10**6, 131_072, 100_000),  # all that there is
    ],
)
def test_setting_bounds_what_an_answer_reserves(at_most: int, max_tokens: int | None, expected: int) -> None:
    of = admission(Clock(), limit(tokens_per_minute=100_000, reserve_at_most=at_most))
    assert reserved(of, max_tokens=max_tokens) == expected
    used(of, *[4000] * 20)
    assert reserved(of, max_tokens=max_tokens) == (expected if max_tokens else min(at_most, only(of).answer_tokens))


def test_setting_of_a_reload_holds_for_the_next_request() -> None:
    of = admission(Clock(), limit(tokens_per_minute=100_000, reserve_at_most=10))
    assert reserved(of, max_tokens=5000) == 10
    of.reconfigure({"standard": limit(tokens_per_minute=100_000, reserve_at_most=1000)})
    assert reserved(of, max_tokens=5000) == 1000


def test_what_an_answer_uses_beyond_its_reservation_is_charged() -> None:
    of = admission(Clock(), limit(tokens_per_minute=1000))
    permits = [of.admit(ROUTE, ("standard",), USER, "key_1", 0, 1, 32_000) for _ in range(3)]
    for permit in permits:
        permit.charge(900, 900)
    assert "used 2700" in str(refused(of, tokens=1))


@examples(200)
@given(
    st.lists(
        st.tuples(st.integers(0, 500), st.integers(0, 5), st.none() | st.integers(1, 5000), st.integers(0, 9000)),
        max_size=30,
    ),
    st.none() | st.integers(1, 3000),
)
def test_reservation_is_never_above_what_a_request_may_use(
    asked: list[tuple[int, int, int | None, int]], at_most: int | None
) -> None:
    of = admission(Clock(), limit(tokens_per_minute=10**12, reserve_at_most=at_most))
    for tokens, answers, max_tokens, took in asked:
        before = only(of).tokens if counter_count(of) else 0
        permit = of.admit(ROUTE, ("standard",), USER, "key_1", tokens, answers, max_tokens)
        each = min((bound for bound in (max_tokens, at_most) if bound is not None), default=9000)
        assert tokens <= only(of).tokens - before <= tokens + answers * each
        permit.charge(took, took)
        assert only(of).tokens == before + took


@pytest.mark.parametrize("step_s", [-0.05, -59.0])
def test_shared_clock_that_is_set_back_a_little_does_not_end_the_minute(step_s: float) -> None:
    clock = Clock(BEGIN - 1)
    of = admission(clock, limit(requests_per_minute=10))
    admit(of)
    clock.now = BEGIN
    admit(of)
    of.clock_offset_s = step_s
    permit = admit(of)
    assert shown(permit)["remaining-requests"] == "7"
    assert shown(permit)["reset-requests"] == "2m0s"


def test_counters_follow_a_shared_clock_that_is_set_back_by_far() -> None:
    """As when a machine whose clock is an hour fast joins the others."""
    clock = Clock()
    of = admission(clock, limit(requests_per_minute=10, tokens_per_minute=100))
    for _ in range(9):
        permit = admit(of)
    of.clock_offset_s = -3600.0
    admit(of)
    permit.charge(7)
    counter = only(of)
    assert (counter.minute, counter.requests, counter.tokens) == ((BEGIN - 3600) // 60, 10, 7)
    refused(of)


# --- what is said


def test_headers_tell_limit_remainder_and_reset_as_openai_writes_them() -> None:
    clock = Clock(BEGIN + 12)
    of = admission(clock, limit(requests_per_minute=60, tokens_per_minute=100_000))
    assert admit(of, tokens=1000).headers == (
        b"x-ratelimit-limit-requests: 60\r\n"
        b"x-ratelimit-remaining-requests: 59\r\n"
        b"x-ratelimit-reset-requests: 1m48s\r\n"
        b"x-ratelimit-limit-tokens: 100000\r\n"
        b"x-ratelimit-remaining-tokens: 99000\r\n"
        b"x-ratelimit-reset-tokens: 1m48s\r\n"
    )


@pytest.mark.parametrize(("at_s", "reset"), [(0, "2m0s"), (0.1, "2m0s"), (1, "1m59s"), (59.9, "1m1s")])
def test_reset_is_rounded_up_to_seconds(at_s: float, reset: str) -> None:
    of = admission(Clock(BEGIN + at_s), limit(requests_per_minute=60))
    assert shown(admit(of))["reset-requests"] == reset


def test_reset_is_when_everything_is_free_again() -> None:
    clock = Clock()
    of = admission(clock, limit(tokens_per_minute=1000))
    assert shown(admit(of, tokens=0))["reset-tokens"] == "0s"
    admit(of, tokens=600)
    clock.now = BEGIN + 90
    assert shown(admit(of, tokens=0)) == {"limit-tokens": "1000", "remaining-tokens": "700", "reset-tokens": "30s"}
    clock.now = BEGIN + 119.5
    assert shown(admit(of, tokens=0))["reset-tokens"] == "1s"


@pytest.mark.parametrize(
    ("limited", "names"),
    [
        (limit(requests_per_minute=5), {"limit-requests", "remaining-requests", "reset-requests"}),
        (limit(tokens_per_minute=5), {"limit-tokens", "remaining-tokens", "reset-tokens"}),
        (limit(concurrent_requests=5), set()),
    ],
)
def test_headers_tell_only_of_what_is_limited(limited: LimitConfig, names: set[str]) -> None:
    assert set(shown(admit(admission(Clock(), limited)))) == names


@pytest.mark.parametrize("names", [("a", "b", "c"), ("c", "b", "a")])
def test_of_several_limits_the_one_with_the_smallest_share_left_is_told(names: tuple[str, ...]) -> None:
    of = admission(
        Clock(),
        limit("a", requests_per_minute=100, tokens_per_minute=100),
        limit("b", requests_per_minute=50, tokens_per_minute=1000),
        limit("c", concurrent_requests=5),
    )
    told = shown(admit(of, *names, tokens=10))
    assert (told["limit-requests"], told["remaining-requests"]) == ("50", "49")
    assert (told["limit-tokens"], told["remaining-tokens"]) == ("100", "90")


def test_limit_that_knows_no_tokens_hides_no_headers_of_one_that_does() -> None:
    of = admission(Clock(), limit("a", requests_per_minute=100), limit("b", tokens_per_minute=1000))
    assert len(shown(admit(of, "a", "b"))) == 6


def test_refusal_says_what_with_numbers_and_when_to_come_back() -> None:
    clock = Clock()
    of = admission(clock, limit(requests_per_minute=2, tokens_per_minute=900))
    admit(of, tokens=300)
    admit(of, tokens=300)
    clock.now = BEGIN + 45.5
    error = refused(of, tokens=200)
    assert error.message == (
        "Rate limit reached for requests per minute of this user with this model: "
        "limit 2, used 2, requested 1. Try again in 45 s."
    )
    assert (error.status, error.error_code, error.kind) == (429, "rate_limit_exceeded", "rate_limit_error")
    assert (error.retry_after_s, error.should_retry) == (45, None)
    assert error.headers == (
        ("x-ratelimit-limit-requests", "2"),
        ("x-ratelimit-remaining-requests", "0"),
        ("x-ratelimit-reset-requests", "1m15s"),
        ("x-ratelimit-limit-tokens", "900"),
        ("x-ratelimit-remaining-tokens", "300"),
        ("x-ratelimit-reset-tokens", "1m15s"),
    )


def test_refusal_tells_a_wait_of_more_than_a_minute_and_asks_to_come_back_in_one() -> None:
    """What was used slides out of the next minute; "Try again in 60 s" was untrue."""
    clock = Clock()
    of = admission(clock, limit(requests_per_minute=1))
    admit(of)
    clock.now = BEGIN + 0.5
    error = refused(of)
    assert error.message.endswith("Try again in 120 s.")
    assert error.retry_after_s == 59


def test_refusal_for_tokens_and_for_places_says_so() -> None:
    of = admission(Clock(), limit(tokens_per_minute=900), limit("places", "key", concurrent_requests=1), limit("free"))
    admit(of, tokens=800)
    assert "tokens per minute of this user with this model: limit 900, used 800, requested 200." in str(
        refused(of, tokens=200)
    )
    admit(of, "places")
    error = refused(of, "places", "free")
    assert "concurrent requests of this key with this model: limit 1, used 1, requested 1." in str(error)
    assert (error.retry_after_s, error.headers) == (1, ())


def test_of_several_refusals_the_longest_is_told() -> None:
    clock = Clock()
    of = admission(clock, limit(requests_per_minute=1), limit("places", concurrent_requests=1))
    admit(of, "standard", "places")
    clock.now = BEGIN + 90
    assert refused(of, "places", "standard").retry_after_s == 31
    assert "requests per minute" in str(refused(of, "places", "standard"))


@examples(300)
@given(
    allowed=st.integers(1, 200),
    previous=st.integers(0, 1000),
    current=st.integers(0, 1000),
    asked=st.integers(1, 300),
    at_s=st.floats(0, 59.99),
)
def test_who_comes_back_when_told_is_admitted_and_not_a_second_before(
    allowed: int, previous: int, current: int, asked: int, at_s: float
) -> None:
    clock = Clock()
    of = admission(clock, limit(tokens_per_minute=allowed))
    admit(of).charge(previous)
    clock.now = BEGIN + 60
    only(of).tokens = current
    clock.now += at_s
    try:
        admit(of, tokens=asked)
    except RateLimited as error:
        wait_s = int(error.message.rpartition("Try again in ")[2].removesuffix(" s."))
        retry_after_s = error.retry_after_s
    else:
        return
    assert 1 <= wait_s <= 121
    assert retry_after_s == min(wait_s, 59)
    came = clock.now
    if wait_s > 1:
        clock.now = came + wait_s - 1 - ROUNDING
        refused(of, tokens=asked)
    clock.now = came + wait_s
    admit(of, tokens=asked)


# --- reloads and memory


def test_counters_outlive_a_reload_by_the_name_of_their_limit() -> None:
    of = admission(Clock(), limit(requests_per_minute=3, concurrent_requests=9))
    permit = admit(of)
    of.reconfigure({"standard": limit(requests_per_minute=2, concurrent_requests=1)})
    refused(of)
    permit.charge(0)
    assert shown(admit(of))["remaining-requests"] == "0"
    of.reconfigure({})
    assert admit(of) is UNLIMITED


def test_reload_changes_nothing_of_what_was_reserved() -> None:
    of = admission(Clock(), limit(tokens_per_minute=100))
    permit = admit(of, tokens=500)
    of.reconfigure({"standard": limit(tokens_per_minute=1000)})
    permit.charge(30)
    assert only(of).tokens == 30


def test_idle_counters_are_forgotten() -> None:
    clock = Clock()
    of = admission(clock, limit(requests_per_minute=60))
    for minute in range(10):
        clock.now = BEGIN + 60 * minute
        for number in range(100):
            admit(of, user=f"u-{minute}-{number}").charge(0)
        list(of.forget_idle())
        assert counter_count(of) <= 300
    running = admit(of, user="u-long")
    clock.now += 600
    admit(of, user="u-new").charge(0)
    list(of.forget_idle())
    assert {key[2] for key in counters(of)} == {"u-long", "u-new"}
    running.charge(0)
    clock.now += 600
    list(of.forget_idle())
    assert collected(of) == []
    assert counter_count(of) == 0


# --- any sequence


@dataclass
class Running:
    """What the model knows of a permit."""

    permit: Permit
    user: str
    minute: int
    reserved: int


@dataclass
class Model:
    """What was charged to one user, by minute."""

    requests: Tally[int] = field(default_factory=Tally)
    tokens: Tally[int] = field(default_factory=Tally)
    running: int = 0


REQUESTS, TOKENS, PLACES = 4, 100, 3
USERS = ("u-1", "u-2")


class AnySequence(RuleBasedStateMachine):
    """Admits, settles and time in any order, beside exact arithmetic."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.of = admission(
            self.clock,
            limit(requests_per_minute=REQUESTS, tokens_per_minute=TOKENS, concurrent_requests=PLACES),
        )
        self.models = {user: Model() for user in USERS}
        self.running: list[Running] = []

    @property
    def minute(self) -> int:
        return int(self.clock.now // 60)

    def used(self, counts: Tally[int]) -> Fraction:
        gone = Fraction(self.clock.now) / 60 - self.minute
        return counts[self.minute - 1] * (1 - gone) + counts[self.minute]

    @rule(step_s=st.sampled_from([0.5, 7.25, 20, 33.125, 61, 200]))
    def let_time_pass(self, step_s: float) -> None:
        self.clock.now += step_s

    @rule(user=st.sampled_from(USERS), tokens=st.integers(0, 150))
    def ask(self, user: str, tokens: int) -> None:
        model, reserved = self.models[user], min(tokens, TOKENS)
        over = max(
            self.used(model.requests) + 1 - REQUESTS,
            self.used(model.tokens) + reserved - TOKENS,
            Fraction(model.running + 1 - PLACES),
        )
        try:
            permit = admit(self.of, user=user, tokens=tokens)
        except RateLimited:
            assert over > -ROUNDING
            return
        assert over < ROUNDING
        model.requests[self.minute] += 1
        model.tokens[self.minute] += reserved
        model.running += 1
        assert self.used(model.requests) < REQUESTS + ROUNDING
        assert model.requests[self.minute] <= REQUESTS
        assert self.used(model.tokens) < TOKENS + ROUNDING
        self.running.append(Running(permit, user, self.minute, reserved))

    @precondition(lambda self: self.running)
    @rule(draw=st.data(), tokens=st.integers(0, 150), twice=st.booleans())
    def end(self, draw: st.DataObject, tokens: int, twice: bool) -> None:
        ended = self.running.pop(draw.draw(st.integers(0, len(self.running) - 1)))
        ended.permit.charge(tokens)
        if twice:
            ended.permit.charge(tokens + 1)
        model, difference = self.models[ended.user], tokens - ended.reserved
        model.running -= 1
        if ended.minute >= self.minute - 1:
            model.tokens[ended.minute] += difference
        else:
            model.tokens[self.minute] += max(difference, 0)

    @invariant()
    def counters_are_what_was_charged(self) -> None:
        held = {key[2]: counter for key, counter in counters(self.of).items()}
        for user, model in self.models.items():
            counter = held.get(user, Counter(("", "", user), self.minute))
            assert counter.requests == model.requests[self.minute]
            assert counter.previous_requests == model.requests[self.minute - 1]
            assert counter.tokens == model.tokens[self.minute]
            assert counter.previous_tokens == model.tokens[self.minute - 1]
            assert counter.running == model.running


TestAnySequence = AnySequence.TestCase
TestAnySequence.settings = settings(examples(150), stateful_step_count=40)


@given(st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 2000), st.booleans()), max_size=50))
def test_when_all_is_settled_the_counter_holds_the_sum_of_what_was_used(
    asked: list[tuple[int, int, bool]],
) -> None:
    of = admission(Clock(), limit(tokens_per_minute=10_000))
    running, used = [], 0
    for reserved, tokens, at_once in asked:
        try:
            permit = admit(of, tokens=reserved)
        except RateLimited:
            continue
        used += tokens
        if at_once:
            permit.charge(tokens)
        else:
            running.append((permit, tokens))
    for permit, tokens in running:
        permit.charge(tokens)
    assert sum(counter.tokens for counter in collected(of, everything=True)) == used


# --- other processes


class Exchange:
    """A place where processes tell and hear of one counter, in one minute, without a server."""

    def __init__(self) -> None:
        self._told: dict[int, Counts] = {}

    def merge(self, number: int, of: Admission) -> None:
        for counter in collected(of, everything=True):
            own = self._told[number] = counter.local()
            others = [told for each, told in self._told.items() if each != number]
            of.merge([counter], [Counts(own.minute, *(sum(told[at] for told in others) for at in range(1, 6)))])


def overshoot_bound(allowed: int, last: list[tuple[int, int]]) -> int:
    """How many requests processes may admit together, by the formula of the module.

    Of each process: after how many admissions, by anyone, its last one was, and of how many it then knew for sure.
    """
    known_to_all = next(
        moment
        for moment in range(allowed, -1, -1)
        if all(admission <= moment or knew >= moment for admission, knew in last)
    )
    return allowed + (len(last) - 1) * (allowed - known_to_all)


def test_what_others_used_counts_and_comes_off_again() -> None:
    clock = Clock()
    one, other = (
        admission(clock, limit(requests_per_minute=10, tokens_per_minute=100, concurrent_requests=3)) for _ in "ab"
    )
    mine, theirs = admit(one, tokens=20), admit(other, tokens=30)
    exchange = Exchange()
    for _ in range(3):  # hearing it again changes nothing
        exchange.merge(1, one)
        exchange.merge(2, other)
    assert (only(one).requests, only(one).tokens) == (2, 50)
    admit(one)
    assert "concurrent" in str(refused(one))
    theirs.charge(5)
    mine.charge(1)
    exchange.merge(1, one)
    exchange.merge(2, other)
    exchange.merge(1, one)
    assert (only(one).requests, only(one).tokens) == (3, 6)
    assert (only(other).requests, only(other).tokens) == (3, 6)
    assert only(one).local() == Counts(int(clock.now // 60), 2, 1, 0, 0, 1)


def test_what_runs_elsewhere_is_forgotten_three_seconds_after_it_was_heard_of() -> None:
    clock = Clock()
    of = admission(clock, limit(concurrent_requests=1, requests_per_minute=10))
    admit(of).charge(0)
    of.merge([only(of)], [Counts(int(clock.now // 60), 2, 0, 0, 0, 1)])
    clock.now += 2.9
    refused(of)
    clock.now += 0.1
    assert shown(admit(of))["remaining-requests"] == "6"


def test_what_others_used_ages_with_its_minutes() -> None:
    clock = Clock()
    of = admission(clock, limit(requests_per_minute=10))
    admit(of).charge(0)
    of.merge([only(of)], [Counts(int(clock.now // 60), 5, 0, 0, 0, 0)])
    clock.now += 90
    assert shown(admit(of))["remaining-requests"] == "6"
    clock.now += 60
    assert shown(admit(of))["remaining-requests"] == "8"


@pytest.mark.parametrize(("passed_s", "previous", "current"), [(0, 4, 9), (60, 9, 0), (120, 0, 0)])
def test_answer_belongs_to_the_minute_it_was_asked_in(passed_s: float, previous: int, current: int) -> None:
    clock = Clock()
    of = admission(clock, limit(requests_per_minute=100))
    admit(of).charge(0)
    asked = collected(of)
    told = Counts(asked[0].minute, 7, 70, 4, 40, 0)
    running = admit(of)
    clock.now += passed_s
    running.charge(0)
    of.merge(asked, [told])
    assert (asked[0].previous_requests, asked[0].requests) == (previous, current)


def test_counters_are_told_when_they_were_touched_and_when_places_are_held() -> None:
    clock = Clock()
    of = admission(clock, limit(concurrent_requests=1))
    collected(of)
    for each in range(1000):  # which take their turns
        admit(of, user=f"u-other-{each}").charge(0)
    collected(of, everything=True)

    def told() -> list[str]:
        return [each.key[2] for each in collected(of) if "other" not in each.key[2]]

    admit(of, user="u-1").charge(0)
    running = admit(of, user="u-2")
    assert told() == ["u-1", "u-2"]
    assert told() == []
    refused(of, user="u-2")  # a refusal is a reason to look again
    assert told() == ["u-2"]
    clock.now += 1
    assert told() == ["u-2"]
    running.charge(0)
    assert told() == ["u-2"]


def test_counters_that_nobody_touches_are_told_in_turn() -> None:
    """What others used since would not be known at the next request."""
    clock = Clock()
    of = admission(clock, limit(requests_per_minute=1))
    users = {f"u-{each}" for each in range(1000)}
    for user in users:
        admit(of, user=user).charge(0)
    collected(of)
    turns = [{each.key[2] for each in collected(of)} for _ in range(5)]
    assert set().union(*turns) == users
    assert sum(map(len, turns)) == len(users)
    clock.now += 120
    admit(of, user="u-0").charge(0)
    collected(of)
    assert {each.key[2] for _ in range(5) for each in collected(of)} == {"u-0"}, "which is the only one left"


def test_all_counters_are_told_when_all_are_asked_for() -> None:
    of = admission(Clock(), limit(concurrent_requests=1))
    admit(of, user="u-1").charge(0)
    admit(of, user="u-2")
    collected(of)
    assert {each.key[2] for each in collected(of, everything=True)} == {"u-1", "u-2"}


@examples(300)
@given(st.integers(1, 60), st.lists(st.tuples(st.integers(0, 2), st.integers(0, 15)), max_size=60))
def test_processes_overshoot_by_no_more_than_the_others_share_of_what_was_left(
    allowed: int, steps: list[tuple[int, int]]
) -> None:
    """Each step is a process that tries so often and then merges."""
    clock = Clock()
    processes = [admission(clock, limit(requests_per_minute=allowed)) for _ in range(3)]
    exchange, admitted = Exchange(), 0
    sent, knows, last = [0] * 3, [0] * 3, [(0, 0)] * 3
    for number, tries in steps:
        for _ in range(tries):
            try:
                admit(processes[number])
            except RateLimited:
                break
            admitted += 1
            last[number] = (admitted, knows[number])
            assert admitted <= overshoot_bound(allowed, last)
        exchange.merge(number, processes[number])
        sent[number] = admitted
        if counter_count(processes[number]):  # who has not used it hears nothing of it
            knows[number] = min(each for other, each in enumerate(sent) if other != number)
    for _ in "ab":
        for number, of in enumerate(processes):
            exchange.merge(number, of)
    assert all(only(of).requests == admitted for of in processes if counter_count(of))


def test_tokens_are_not_taken_back_from_a_minute_that_is_counted_anew() -> None:
    """The shared clock was set back while a request ran, and its minute comes a second time."""
    now = 1_700_000_040.0
    admission = Admission({"l": LimitConfig("l", tokens_per_minute=1000)}, lambda: now)
    permit = admission.admit("r", ("l",), "u", "k", 900)
    admission.clock_offset_s = -180.0
    admission.admit("r", ("l",), "u", "k", 1)
    now += 180
    admission.admit("r", ("l",), "u", "k", 1)
    permit.charge(10)
    [counter] = collected(admission, everything=True)
    assert counter.local().tokens == 0


# --- a hundred thousand users


def test_walks_through_all_counters_go_in_steps() -> None:
    """Who came a while ago is forgotten, and who runs is told, a thousand at a time."""
    clock = Clock()
    of = admission(clock, limit(requests_per_minute=1))
    for number in range(3000):
        admit(of, user=f"u-{number}")
    assert [len(some) for some in of.collect()] == [0] * 3 + [1000] * 3
    assert [len(some) for some in of.collect()] == [200]  # some in turn
    clock.now += 1
    assert [len(some) for some in of.collect()] == [1000] * 3 + [200]
    assert len(list(of.forget_idle())) == 3


def test_limits_of_a_reload_are_made_when_they_are_used() -> None:
    of = admission(Clock(), *(LimitConfig(f"l{number}", requests_per_minute=1) for number in range(1000)))
    assert of._limits == {}
    admit(of, "l7", "l8").charge(0)
    admit(of, "l8", user="u-2").charge(0)
    assert list(of._limits) == ["l7", "l8"]
