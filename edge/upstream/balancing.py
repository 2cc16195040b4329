"""Which of several members: the balancing strategies, over nothing but weights, loads and names.

Sources: power of two choices, Mitzenmacher 2001; smooth weighted round-robin as nginx does it; weighted rendezvous
hashing, Schindelhauer and Schomaker 2005. `cache-aware` has a module of its own.
"""

import hashlib
import math
import random
from collections.abc import Sequence
from typing import Protocol, TypeVar


class Candidate(Protocol):
    """A member as the strategies see it.

    `name` stays the same across restarts and machines, so that all agree; `weight` is its share of the load, `credit`
    the state of the round-robin.
    """

    name: str
    weight: int
    credit: int

    @property
    def load(self) -> int:
        """Its requests in flight."""


M = TypeVar("M", bound=Candidate)


def least_loaded(members: Sequence[M]) -> M:
    """Return the less loaded, for its weight, of two members drawn by weight.

    That is nearly as good as to compare all of them, and processes that choose at once do not all choose the same.
    """
    first, second = _two_of(members)
    return second if (second.load + 1) * first.weight < (first.load + 1) * second.weight else first


def _two_of(members: Sequence[M]) -> tuple[M, M]:
    if len(members) == 2:
        first, second = members
        if first.weight == second.weight and random.getrandbits(1):
            return second, first
        return (second, first) if second.weight > first.weight else (first, second)
    weights = [member.weight for member in members]
    first = random.choices(members, weights)[0]
    others = [member for member in members if member is not first]
    return first, random.choices(others, [member.weight for member in others])[0]


def round_robin(members: Sequence[M]) -> M:
    """Return the next member by smooth weighted round-robin."""
    for member in members:
        member.credit += member.weight
    chosen = max(members, key=lambda member: member.credit)
    chosen.credit -= sum(member.weight for member in members)
    return chosen


def rank(member: Candidate, key: bytes) -> float:
    """Return how much a key belongs to a member: each key ranks the members anew, and every process alike."""
    digest = hashlib.blake2b(b"%b\0%b" % (member.name.encode(), key), digest_size=8).digest()
    drawn = (int.from_bytes(digest) + 1) / (2**64 + 1)
    return -member.weight / math.log(drawn)
