"""`cache-aware`: the score against a plain one, what it forgets, and what it is worth over engines in virtual time."""

import statistics
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.exchange import Usage
from edge.upstream.balancing import least_loaded
from edge.upstream.cache_aware import CacheAware, Ticket
from edge.upstream.prefixes import Prefix
from tests.upstream.engines_model import BYTES_PER_S, Engine, engines, prefix, run, sticky_by_rank


def seated(policy: CacheAware, *weights: int) -> list[Engine]:
    policy.foreign = 0.0  # it is known to be alone
    members = [Engine(f"10.0.0.{at}:8000", weight=weight) for at, weight in enumerate(weights)]
    for each in members:
        each.seat = policy.seat(each.name)
    return members


def ask(policy: CacheAware, members: list[Engine], mine: Prefix, now: float = 0.0) -> tuple[Engine, Ticket]:
    member, ticket = policy.choose(members, mine, now)
    ticket.dispatch(now)
    member.load += 1
    return member, ticket


@dataclass
class Plain:
    """What is known of one member, told in the simplest words."""

    weight: int
    prompts: dict[int, int] = field(default_factory=dict)  # by ticket, what is not read
    order: list[int] = field(default_factory=list)
    running: int = 0
    since: float = 0.0
    rate: float = 0.0
    had: dict[int, int] = field(default_factory=dict)  # digests, and the ticket that put them last

    def score(self, mine: Prefix, now: float, waiting: float) -> float:
        known = [at for at, digest in zip(mine.offsets, mine.digests, strict=True) if digest in self.had]
        pending = sum(self.prompts.values())
        read = min(self.rate * (now - self.since), pending / len(self.prompts)) if self.prompts else 0
        new = mine.size - max(known, default=0)
        return (
            (new * (1 + waiting / 2) + pending - read + 1024)
            * max(self.running - len(self.prompts) + 8, self.running)
            / self.weight
        )


STEPS = st.lists(
    st.tuples(st.sampled_from(["ask", "ask", "byte", "whole", "end"]), st.integers(0, 5), st.integers(1, 5)),
    max_size=40,
)


@settings(max_examples=60)
@given(STEPS, st.lists(st.integers(1, 3), min_size=1, max_size=4))
def test_score_is_that_of_a_plain_model(steps: list[tuple[str, int, int]], weights: list[int]) -> None:
    """Streams, answers in one piece, failures and clients that leave, in any order; in the end nothing is left."""
    policy = CacheAware()
    members = seated(policy, *weights)
    plain = [Plain(weight) for weight in weights]
    flying: list[tuple[int, int, Prefix, Ticket, int, bool]] = []  # number, member, prefix, ticket, matched, begun
    now, number = 0.0, 0
    for what, which, turns in [*steps, *[("end", 0, 1)] * len(steps)]:
        now += 0.25
        if what == "ask":
            mine = prefix(which, [3_000] * (2 * turns), which % 2)._replace(previous=0)  # no part of it is foreign
            waiting = sum(len(each.prompts) for each in plain) / len(plain)
            scores = [each.score(mine, now, waiting) for each in plain]
            member, ticket = ask(policy, members, mine, now)
            at, number = members.index(member), number + 1
            assert scores[at] == pytest.approx(min(scores))
            assert ticket.choice.score == int(min(scores))
            there = plain[at]
            matched = max([o for o, d in zip(mine.offsets, mine.digests, strict=True) if d in there.had], default=0)
            if not there.prompts:
                there.since = now
            there.prompts[number] = mine.size - matched
            there.order.append(number)
            there.running += 1
            there.had.update(dict.fromkeys(mine.digests, number))
            flying.append((number, at, mine, ticket, matched, False))
        elif flying:
            mark, at, mine, ticket, matched, begun = flying.pop(which % len(flying))
            there = plain[at]
            if what in ("byte", "whole"):
                ticket.first_byte(now, streamed=what == "byte")
                if mark in there.prompts:
                    if what == "byte" and there.prompts[mark] > 1536:
                        rate = there.prompts[mark] / (now - there.since)
                        there.rate += (rate - there.rate) * (0.1 if there.rate else 1)
                    for each in there.order[: there.order.index(mark) + 1]:
                        there.prompts.pop(each, None)
                    there.since = now
                flying.append((mark, at, mine, ticket, matched, True))
            else:
                members[at].load -= 1
                there.running -= 1
                ticket.end(now)
                if mark in there.prompts:
                    first = next(each for each in there.order if each in there.prompts)
                    del there.prompts[mark]
                    there.since = now if first == mark else there.since
                for offset, digest in zip(mine.offsets, mine.digests, strict=True):
                    if not begun and offset > matched and there.had.get(digest) == mark:
                        del there.had[digest]
    assert not flying
    for each in members:
        assert each.seat is not None
        assert (each.load, each.seat.pending, each.seat.prefilling, len(each.seat.line)) == (0, 0, 0, 0)


def test_turns_stay_and_a_member_that_has_much_to_read_is_left() -> None:
    policy = CacheAware()
    members = seated(policy, 1, 1, 1)
    first, ticket = ask(policy, members, prefix(1, [500, 20_000], 1))
    ticket.first_byte(0.1, streamed=True)
    again, ticket = policy.choose(members, prefix(1, [500, 20_000, 60, 900], 1), 0.2)
    assert again is first
    assert (ticket.choice.hit_percent, ticket.choice.load, ticket.choice.backlog_bytes) == (95, 1, 0)
    assert ticket.choice.next_score is not None
    assert ticket.choice.next_score > 10 * ticket.choice.score
    for number in range(2, 9):  # whose prompts it has not begun to read
        _, other = policy.choose([first], prefix(number, [500, 9_000], number), 0.2)
        other.dispatch(0.2)
        first.load += 1
    assert policy.choose(members, prefix(1, [500, 20_000, 60, 900], 1), 0.2)[0] is not first


def test_prompt_that_failed_is_not_taken_to_be_cached() -> None:
    policy = CacheAware()
    members = seated(policy, 1, 1)
    mine = prefix(1, [500, 20_000], 1)
    _, ticket = ask(policy, members, mine)
    ticket.end(1.0)
    assert policy.index.match(mine.offsets, mine.digests) == {}


def test_member_that_left_is_forgotten_and_its_seat_is_another_ones() -> None:
    policy = CacheAware()
    members = seated(policy, 1, 1)
    mine = prefix(1, [500, 20_000], 1)
    gone, ticket = ask(policy, members, mine)
    ticket.first_byte(0.1, streamed=True)
    policy.keep_only({each.name for each in members if each is not gone})
    came = Engine("10.0.0.9:8000", seat=policy.seat("10.0.0.9:8000"))
    assert came.seat is not None
    assert gone.seat is not None
    assert came.seat.slot == gone.seat.slot
    assert policy.choose([came], mine, 0.2)[1].choice.hit_percent == 0
    ticket.end(0.3)  # of who left: it changes nothing here


def test_conversation_that_its_caller_names_returns_though_its_beginning_changed() -> None:
    policy = CacheAware()
    members = seated(policy, 1, 1, 1, 1)
    for number in range(6):
        mine, edited = (prefix(2 * number + at, [500, 9_000], at - 50)._replace(session=number + 1) for at in (0, 1))
        member, ticket = ask(policy, members, mine)
        ticket.first_byte(0.1, streamed=True)
        assert policy.choose(members, edited, 0.2)[0] is member
        ticket.end(0.3)
        member.load -= 1


def test_conversation_that_its_caller_names_returns_to_who_answered_of_two_that_were_asked() -> None:
    for who in (0, 1):
        policy = CacheAware()
        members = seated(policy, 1, 1)
        mine, edited = (prefix(at, [500, 9_000], at - 50)._replace(session=1) for at in (0, 1))
        asked = [ask(policy, [member], mine) for member in members]
        asked[who][1].first_byte(0.1, streamed=True)
        for member, ticket in asked:
            ticket.end(0.2)
            member.load -= 1
        assert {policy.choose(members, edited, 0.3)[0] for _ in range(20)} == {members[who]}


def test_first_turn_that_goes_where_others_would_send_it_is_counted_whole() -> None:
    policy = CacheAware()
    members = seated(policy, 1, 1)
    policy.foreign = 0.5
    mine = prefix(1, [500, 20_000], 1)
    member, ticket = ask(policy, members, mine)
    assert {policy.choose(members, mine._replace(digests=(1, 2)), 0.0)[0] for _ in range(20)} == {member}
    assert member.seat is not None
    assert (member.seat.pending, ticket.choice.hit_percent) == (mine.size, 0)


@pytest.mark.parametrize(("cached", "trust"), [(0, 0.05), (None, 1.0), (4_000, 1.0)])
def test_engine_that_says_it_cached_nothing_is_believed_and_one_that_says_nothing_is_no_such(
    cached: int | None, trust: float
) -> None:
    policy = CacheAware()
    members = seated(policy, 1)
    for number in range(80):
        _, ticket = ask(policy, members, prefix(1, [500, 16_000 + number], 1))
        ticket.first_byte(number, streamed=True)
        ticket.end(number)
        _, ticket = ask(policy, members, prefix(1, [500, 16_000 + number], 1))
        ticket.learn(Usage(4_000, 5, cached))
        ticket.end(number)
    assert policy.trust == pytest.approx(trust, abs=0.06)


# --- what it is worth: the figures of `loadtest conversations`, in virtual time


def plain_least(members: list[Any], mine: Prefix, now: float) -> Any:
    return least_loaded(members)


def test_waits_are_a_part_of_what_they_were_and_hits_nearly_all_there_could_be() -> None:
    now = [run(engines(), [CacheAware()], seed=seed) for seed in range(3)]
    ranked = [run(engines(), sticky_by_rank, seed=seed) for seed in range(3)]
    least = [run(engines(), plain_least, seed=seed) for seed in range(3)]
    p90 = statistics.median(each.p90 for each in now)
    assert p90 <= 0.6 * statistics.median(each.p90 for each in ranked)
    assert p90 <= 0.15 * statistics.median(each.p90 for each in least)
    assert min(each.hits for each in now) >= 0.96
    assert max(each.most for each in now) <= 1.25


def test_turns_stay_where_engines_queue_since_what_is_read_again_fills_the_others_too() -> None:
    now = [run(engines(), [CacheAware()], seed=seed, rate=24) for seed in range(3)]
    ranked = [run(engines(), sticky_by_rank, seed=seed, rate=24) for seed in range(3)]
    assert statistics.median(each.p90 for each in now) <= 0.6 * statistics.median(each.p90 for each in ranked)
    assert min(each.hits for each in now) >= 0.96


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize(("rate", "hits", "most"), [(9, 0.96, 1.5), (24, 0.93, 2.5)])
def test_processes_that_share_nothing_agree_where_conversations_belong(
    processes: int, rate: int, hits: float, most: float
) -> None:
    """Also those that begin before it is known that there are others."""
    split = [run(engines(), [CacheAware() for _ in range(processes)], seed=seed, rate=rate) for seed in range(3)]
    alone = [run(engines(), [CacheAware()], seed=seed, rate=rate) for seed in range(3)]
    assert min(each.hits for each in split) >= hits
    assert statistics.median(each.p90 for each in split) <= most * statistics.median(each.p90 for each in alone)


def test_burst_of_one_prompt_is_shared_by_all_members_though_one_has_it() -> None:
    policy = CacheAware()
    members = seated(policy, 1, 1)
    mine = prefix(1, [500], 1)
    chosen = [ask(policy, members, mine)[0] for _ in range(64)]
    assert min(chosen.count(each) for each in members) >= 20


def restart(number: int, members: list[Engine]) -> None:
    if number == 450:
        members[0].cache.clear()


def slow(number: int, members: list[Engine]) -> None:
    members[0].bytes_per_s = 0.4 * BYTES_PER_S


def without_cache(number: int, members: list[Engine]) -> None:
    for each in members:
        each.caches = False


@pytest.mark.parametrize(
    ("at", "options"),
    [
        (restart, {}),
        (slow, {}),
        (lambda number, members: None, {"turns": 1, "systems": 0, "conversations": 600, "rate": 30}),
        (without_cache, {"rate": 4}),
    ],
    ids=["a restart", "a slow member", "single turns", "no cache"],
)
def test_never_worse_than_least_loaded(at: Any, options: dict[str, Any]) -> None:
    now = [run(engines(), [CacheAware()], at=at, seed=seed, **options).p90 for seed in range(2)]
    least = [run(engines(), plain_least, at=at, seed=seed, **options).p90 for seed in range(2)]
    assert sum(now) <= sum(least)
