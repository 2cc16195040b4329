"""Health over any sequence of requests: what one caller can do, and how little of the traffic a bad member gets."""

import asyncio
import math
from typing import Final, cast

import hypothesis.strategies as st
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from edge.config.settings import Balance
from edge.upstream.endpoints import Endpoints, Lease, Member
from edge.upstream.health import Verdict
from edge.upstream.pools import Pool
from edge.upstream.prefixes import Prefix
from tests.upstream.conftest import pool_of

BEGUN: Final = 1000.0
CALLER: Final = "u-caller"
OTHERS: Final = tuple(f"u-{at}" for at in range(5))
STEPS_S: Final = st.sampled_from([0.1, 0.6, 4.9, 5.1, 11.0, 41.0, 130.0])
BALANCES: Final = st.sampled_from(["least-loaded", "round-robin", "cache-aware"])
# What a caller's own request can come to at a member that is well.
DRIVEN: Final = st.sampled_from([Verdict.FAULT, Verdict.BACKPRESSURE, Verdict.NOTHING, Verdict.FINE])
PAUSES_S: Final = st.sampled_from([None, 1.0, 60.0])
SETTINGS: Final = settings(
    max_examples=30, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


class Clock:
    """The loop of endpoints that nobody connects to: it has the time."""

    def __init__(self) -> None:
        self.now = BEGUN

    def time(self) -> float:
        return self.now


class Traffic(RuleBasedStateMachine):
    """A pool, its clock, and requests that are under way."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.running: list[Lease] = []

    @initialize(members=st.integers(2, 5), balance=BALANCES)
    def build(self, members: int, balance: Balance) -> None:
        endpoints = Endpoints(cast(asyncio.AbstractEventLoop, self.clock))
        self.pool: Pool = pool_of(endpoints, *[1] * members, balance=balance)

    @rule(step_s=STEPS_S)
    def let_time_pass(self, step_s: float) -> None:
        self.clock.now += step_s

    def asked_by(self, user: str) -> list[Member]:
        """The members that a request of a user may come to."""
        return self.pool._admitted((), user)

    def begin(self, user: str, mark: int = 0) -> Lease:
        prefix = Prefix(9_000, (9_000,), (mark,), 0, b"", 0) if mark else None
        lease = self.pool.lease((), prefix, user)
        assert lease is not None
        lease.__enter__()
        return lease

    @invariant()
    def at_least_half_of_the_pool_is_there_for_everybody(self) -> None:
        members = self.pool.members
        for user in (CALLER, *OTHERS):
            assert len(self.asked_by(user)) >= math.ceil(len(members) / 2)


def end(lease: Lease, verdict: Verdict, pause_s: float | None = None) -> None:
    lease.__exit__()
    lease.report(verdict, pause_s)


class OneCaller(Traffic):
    """Members that are well, and one caller who makes of his requests what he likes, at any time, many at once."""

    @rule(mark=st.sampled_from([0, 1 << 55, 2 << 55]))
    def caller_begins(self, mark: int) -> None:
        self.running.append(self.begin(CALLER, mark))

    @precondition(lambda self: self.running)
    @rule(draw=st.data(), verdict=DRIVEN, pause_s=PAUSES_S)
    def callers_request_ends(self, draw: st.DataObject, verdict: Verdict, pause_s: float | None) -> None:
        at = draw.draw(st.integers(0, len(self.running) - 1))
        end(self.running.pop(at), verdict, pause_s)

    @rule(verdict=DRIVEN, times=st.integers(1, 30), pause_s=PAUSES_S)
    def caller_repeats(self, verdict: Verdict, times: int, pause_s: float | None) -> None:
        for _ in range(times):
            end(self.begin(CALLER), verdict, pause_s)

    @rule(user=st.sampled_from(OTHERS))
    def another_is_served(self, user: str) -> None:
        end(self.begin(user), Verdict.FINE)

    @invariant()
    def the_pool_is_as_large_as_ever_for_others(self) -> None:
        for user in OTHERS:
            assert self.asked_by(user) == self.pool.members

    @invariant()
    def nothing_is_ejected(self) -> None:
        assert [member.endpoint.health.total_ejections for member in self.pool.members] == [0] * len(self.pool.members)

    @invariant()
    def what_is_remembered_is_bounded(self) -> None:
        assert all(len(member.endpoint.health._users) <= 1 for member in self.pool.members)


class KeptOut(Traffic):
    """A member that was ejected and is well again, and a caller who wants it to stay out."""

    @initialize(members=st.integers(2, 5), balance=BALANCES)
    def build(self, members: int, balance: Balance) -> None:
        super().build(members, balance)
        self.member = self.pool.members[0]
        for user in OTHERS[:3]:
            with Lease(self.member, user) as lease:
                lease.report(Verdict.FAULT)
        self.clock.now = self.member.endpoint.health.ejected_until

    @rule(verdict=st.sampled_from([Verdict.FAULT, Verdict.BACKPRESSURE, Verdict.NOTHING]), times=st.integers(1, 30))
    def caller_repeats(self, verdict: Verdict, times: int) -> None:
        for _ in range(times):
            end(self.begin(CALLER), verdict, 60.0)

    @rule()
    def caller_holds_the_trial(self) -> None:
        self.running.append(self.begin(CALLER))

    @precondition(lambda self: self.running)
    @rule(verdict=st.sampled_from([Verdict.FAULT, Verdict.BACKPRESSURE, Verdict.NOTHING]))
    def callers_trial_ends(self, verdict: Verdict) -> None:
        end(self.running.pop(), verdict)

    @invariant()
    def others_may_try_it(self) -> None:
        assert all(self.member in self.asked_by(user) for user in OTHERS)

    def teardown(self) -> None:
        with Lease(self.member, OTHERS[0]) as lease:
            lease.report(Verdict.FINE)
        assert self.asked_by(OTHERS[1]) == self.pool.members


class OneBadMember(Traffic):
    """One member fails whoever asks, as fast as it can, and passes its probes; the others serve."""

    @initialize(verdict=st.sampled_from([Verdict.FAULT, Verdict.UNREACHABLE]), users=st.integers(1, 5))
    def choose(self, verdict: Verdict, users: int) -> None:
        self.verdict = verdict
        self.users = OTHERS[:users]
        self.asked = self.asked_now = 0

    @property
    def bad(self) -> Member:
        return self.pool.members[0]

    @rule(step_s=STEPS_S)
    def let_time_pass(self, step_s: float) -> None:
        super().let_time_pass(step_s)
        self.asked_now = 0

    @rule(users=st.lists(st.integers(0, 4), min_size=1, max_size=30))
    def ask(self, users: list[int]) -> None:
        for at in users:
            lease = self.begin(self.users[at % len(self.users)])
            is_bad = lease.member is self.bad
            end(lease, self.verdict if is_bad else Verdict.FINE)
            self.asked += is_bad
            self.asked_now += is_bad

    @rule()
    def probe_succeeds(self) -> None:
        self.bad.endpoint.health.probed(healthy=True, now=0.0)

    @invariant()
    def it_gets_seven_requests_and_three_each_time_it_is_tried_again(self) -> None:
        elapsed_s = self.clock.now - BEGUN
        assert self.asked_now <= 7
        assert self.asked <= 7 + 3 * int(elapsed_s / 5.0)
        if len(self.users) == 1 or self.verdict is Verdict.UNREACHABLE:
            assert self.asked <= 3 + int(math.log2(1 + elapsed_s / 5.0)) + int(elapsed_s / 120.0)

    @invariant()
    def it_is_out_for_everybody_after_three_users(self) -> None:
        health = self.bad.endpoint.health
        assert len(health._users) <= 2
        if health.ejected_until > self.clock.now:
            assert all(self.bad not in self.asked_by(user) for user in (CALLER, *OTHERS))

    @invariant()
    def nothing_is_held_against_the_others(self) -> None:
        assert not any(member.endpoint.health.is_tainted for member in self.pool.members[1:])


OneCaller.TestCase.settings = KeptOut.TestCase.settings = OneBadMember.TestCase.settings = SETTINGS
TestOneCaller = OneCaller.TestCase
TestKeptOut = KeptOut.TestCase
TestOneBadMember = OneBadMember.TestCase
