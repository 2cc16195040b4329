"""Which member: the strategies over weights and loads."""

from collections import Counter
from dataclasses import dataclass

import pytest

from edge.upstream.balancing import least_loaded, rank, round_robin


@dataclass
class Server:
    name: str
    weight: int = 1
    load: int = 0
    credit: int = 0


def servers(*weights: int) -> list[Server]:
    return [Server(f"10.0.0.{at}:8000", weight) for at, weight in enumerate(weights, 1)]


def test_of_two_drawn_the_less_loaded_for_its_weight_is_taken() -> None:
    a, b = servers(1, 4)
    a.load, b.load = 1, 6
    assert {least_loaded([a, b]).name for _ in range(50)} == {b.name}
    b.load = 9
    assert {least_loaded([a, b]).name for _ in range(50)} == {a.name}


def test_the_most_loaded_of_many_is_never_taken() -> None:
    """Whoever it is drawn with carries less."""
    members = servers(*[1] * 10)
    members[3].load = 5
    assert members[3].name not in {least_loaded(members).name for _ in range(500)}


@pytest.mark.parametrize("weights", [(1, 1), (1, 1, 1, 1), (1, 2, 3)])
def test_held_requests_spread_by_weight(weights: tuple[int, ...]) -> None:
    members = servers(*weights)
    for _ in range(1200):
        least_loaded(members).load += 1
    share = 1200 / sum(weights)
    assert all(abs(member.load - share * member.weight) < 0.05 * 1200 for member in members), members


def test_round_robin_spreads_weights_smoothly() -> None:
    """As nginx does: 5, 1, 1 is a a b a c a a, never five times the same in a row."""
    members = servers(5, 1, 1)
    order = "".join("abc"[members.index(round_robin(members))] for _ in range(14))
    assert order == "aabacaa" * 2


def first(members: list[Server], key: bytes) -> Server:
    return max(members, key=lambda member: rank(member, key))


def test_a_key_belongs_to_the_same_member_wherever_it_is_asked() -> None:
    """Also on another machine, where the file may list the members in another order."""
    one, other = servers(*[1] * 5), servers(*[1] * 5)[::-1]
    keys = [f"u-{number}".encode() for number in range(200)]
    assert [first(one, key).name for key in keys] == [first(other, key).name for key in keys]


def test_a_member_that_goes_moves_its_own_keys_only() -> None:
    members = servers(*[1] * 5)
    keys = [f"u-{number}".encode() for number in range(2000)]
    before = {key: first(members, key).name for key in keys}
    after = {key: first(members[1:], key).name for key in keys}
    moved = [key for key in keys if before[key] != after[key]]
    assert {before[key] for key in moved} == {members[0].name}
    assert len(Counter(after[key] for key in moved)) == 4  # to all that are left, not to one neighbour


def test_keys_spread_by_weight() -> None:
    members = servers(1, 3)
    counts = Counter(first(members, f"u-{number}".encode()).weight for number in range(4000))
    assert 0.7 < counts[3] / 4000 < 0.8


def test_keys_spread_over_members_whose_long_names_differ_at_their_end() -> None:
    """Three ports of one host are three members, however long its name is."""
    host = "deepseek-r1-0528-distill-qwen3-8b.inference-production-shanghai.svc.cluster.local"
    members = [Server(f"{host}:{port}") for port in (8001, 8002, 8003)]
    counts = Counter(first(members, f"u-{number}".encode()).name for number in range(3000))
    assert len(counts) == 3
    assert min(counts.values()) > 900
