"""Engines with a prefix cache, in virtual time, and conversations at a rate: what a balance is worth."""

import heapq
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from edge.exchange import Usage
from edge.upstream.balancing import rank
from edge.upstream.cache_aware import CacheAware, Seat
from edge.upstream.prefixes import Prefix

BYTES_PER_S = 100_000.0  # of a prompt that one engine reads
STEP_S = 0.005  # a token of an answer
TOKENS = 16


@dataclass(eq=False)
class Engine:
    """A member of the pool, and the engine that it is."""

    name: str
    seat: Seat | None = None
    weight: int = 1
    credit: int = 0
    load: int = 0
    bytes_per_s: float = BYTES_PER_S
    caches: bool = True
    cache: set[int] = field(default_factory=set)  # digests
    read_at: float = 0.0
    asked: int = 0

    def has(self, prefix: Prefix) -> int:
        """Return how much of a prompt is cached, which it is from now on."""
        known = [at for at, digest in zip(prefix.offsets, prefix.digests, strict=True) if digest in self.cache]
        if self.caches:
            self.cache.update(prefix.digests)
        return max(known, default=0)


@dataclass
class Found:
    """Waits, and shares of all that was asked."""

    waits: list[float] = field(default_factory=list)
    asked: int = 0
    cached: int = 0
    ideal: int = 0
    most: float = 0.0

    @property
    def p90(self) -> float:
        return sorted(self.waits)[int(0.9 * len(self.waits))]

    @property
    def hits(self) -> float:
        return self.cached / self.ideal


def prefix(conversation: int, sizes: list[int], system: int) -> Prefix:
    """Return the prefix of a turn: the system's text, which some share, then what was asked and answered in turn."""
    offsets, digests, at = [], [], 0
    for number, size in enumerate(sizes):
        at += size
        offsets.append(at)
        digests.append(hash((system,) if not number else (conversation, number)) >> 4 & (1 << 60) - 1)
    previous = offsets[-3] if len(sizes) > 3 else 0
    return Prefix(at, tuple(offsets[-9:]), tuple(digests[-9:]), previous, b"%d" % conversation, 0)


Choose = Callable[[list[Any], Prefix, float], Any]


def run(
    members: list[Engine],
    policies: list[CacheAware] | Choose,
    *,
    rate: float = 9.0,
    conversations: int = 150,
    turns: int = 6,
    systems: int = 40,
    seed: int = 1,
    at: Callable[[int, list[Engine]], None] = lambda number, members: None,
    tells: bool = True,
) -> Found:
    """Play conversations; `policies` are those of the processes, of which each request meets any, or a plain choice.

    `at` may change the engines before each request, of which it gets the number.
    """
    random.seed(seed)  # of equal members any is chosen
    draw, found, seen = random.Random(seed), Found(), set[int]()
    events: list[tuple[float, int, Callable[[float], None]]] = []
    number = 0

    def later(when: float, do: Callable[[float], None]) -> None:
        nonlocal number
        number += 1
        heapq.heappush(events, (when, number, do))

    def ask(conversation: int, sizes: list[int], system: int, now: float) -> None:
        at(len(found.waits), members)
        mine, ticket, policy = prefix(conversation, sizes, system), None, None
        if callable(policies):
            member = policies(members, mine, now)
        else:
            policy = draw.choice(policies)
            for each in members:
                each.seat = policy.seat(each.name)
            member, ticket = policy.choose(members, mine, now)
            ticket.dispatch(now)
        member.load += 1
        member.asked += 1
        cached = member.has(mine)
        member.read_at = max(member.read_at, now) + (mine.size - cached + 100) / member.bytes_per_s
        found.waits.append(member.read_at - now)
        found.asked += mine.size
        found.cached += cached
        found.ideal += max([at for at, mark in zip(mine.offsets, mine.digests, strict=True) if mark in seen], default=0)
        seen.update(mine.digests)

        def first_byte(when: float) -> None:
            if ticket is not None:
                ticket.first_byte(when, streamed=True)
            later(when + TOKENS * STEP_S, end)

        def end(when: float) -> None:
            member.load -= 1
            if ticket is not None:
                ticket.end(when)
                ticket.learn(Usage(mine.size // 4, TOKENS, cached // 4 if tells else None))
            if len(sizes) < 2 * turns:
                more = [*sizes, 60, draw.randint(500, 4_000)]
                later(when + draw.uniform(0.3, 1.5), lambda then: ask(conversation, more, system, then))

        later(member.read_at, first_byte)

    begins = 0.0
    for conversation in range(conversations):
        begins += draw.expovariate(rate)
        system = draw.randrange(systems) if systems else -conversation - 1
        sizes = [500 + 140 * (system % 40) if systems else 3_000, draw.randint(1_000, 14_000)]
        later(begins, lambda now, c=conversation, s=sizes, y=system: ask(c, s, y, now))  # type: ignore[misc]
    while events:
        when, _, do = heapq.heappop(events)
        do(when)
    found.most = max(each.asked for each in members) * len(members) / len(found.waits)
    return found


def engines(count: int = 4) -> list[Engine]:
    return [Engine(f"10.0.0.{number}:8000") for number in range(count)]


def sticky_by_rank(members: list[Engine], mine: Prefix, now: float) -> Engine:
    """`prefix-affinity`, as it was: the conversation's own order of members, past those over 1.25 of the mean load."""
    most = math.ceil(1.25 * (sum(each.load for each in members) + 1) / len(members))
    ranked = sorted(members, key=lambda each: rank(each, mine.home), reverse=True)
    return next((each for each in ranked if each.load + 1 <= most), ranked[0])
