"""The cache of look-ups: bounded, without timers, and never walked through."""

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from edge.exchange import Principal
from edge.keys.cache import Entry, KeyCache
from edge.keys.caller import Caller
from edge.keys.stores.protocol import Invalidation, TokenPrincipal


def entry_until(time: float) -> Entry:
    return Entry(None, time, time, time)


async def test_cache_lets_go_of_what_serves_nobody_any_more() -> None:
    """A flood leaves as much as its last seconds hold, not as much as fits."""
    cache = KeyCache(1000)
    for number in range(500):
        cache.put(b"%d" % number, entry_until(number + 10), number)
    assert len(cache) == 10
    cache.max_entries = 4
    for number in range(3):
        cache.put(b"x%d" % number, entry_until(600), 500)
    assert len(cache) == 4


async def test_cache_evicts_by_insertion() -> None:
    """The newest stay; a key that is put again is new again."""
    cache = KeyCache(3)
    for digest in (b"a", b"b", b"c", b"a", b"d"):
        cache.put(digest, entry_until(10), 0)
    assert [digest for digest in (b"a", b"b", b"c", b"d") if cache.peek(digest)] == [b"a", b"c", b"d"]
    assert len(cache) == 3


async def test_cache_sets_no_timer() -> None:
    """One timer per key would be a hundred thousand; aiocache sets one where it is given a time to live."""
    cache = KeyCache(10)
    cache.put(b"a", entry_until(10), 0)
    assert cache._handlers == {}
    assert cache.timeout == 0


def entry_of(principal: Principal) -> Entry:
    return Entry(Caller(principal), 50.0, 60.0, 70.0)


def filled(count: int) -> KeyCache:
    """Keys of users who have two each, and of a token."""
    cache = KeyCache(10**6)
    for number in range(count):
        cache.put(b"%d" % number, entry_of(Principal(f"key_{number}", f"u-{number // 2}")), 0.0)
    cache.put(b"token", entry_of(TokenPrincipal("jwt:u-0", "u-0", proof="rsa")), 0.0)
    return cache


def lines_of(work: Callable[[], object]) -> int:
    """How many lines of Python run, those of comprehensions too."""
    count = 0

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


CHANGES = {
    "user": Invalidation(users=frozenset(("u-3",))),
    "id": Invalidation(ids=frozenset(("key_7",))),
    "digest": Invalidation(frozenset((b"7",))),
    "proof": Invalidation(proofs=frozenset(("rsa",))),
    "everything": Invalidation(everything=True),
}


@pytest.mark.parametrize("change", CHANGES)
async def test_what_a_change_costs_does_not_grow_with_what_is_remembered(change: str) -> None:
    """A walk through 100,000 keys would hold everybody up, and whoever owns a key can have it revoked at will."""
    few, many = filled(10), filled(1000)
    assert lines_of(lambda: few.forget(CHANGES[change])) == lines_of(lambda: many.forget(CHANGES[change]))


async def test_what_expired_in_a_quiet_night_goes_a_few_at_a_time() -> None:
    cache = filled(1000)
    cache.put(b"new", entry_of(Principal("key_new", "u-new")), 100.0)
    assert len(cache) == 1001 + 1 - 4


async def test_change_is_of_all_the_keys_of_its_user_and_of_no_other() -> None:
    cache = filled(10)
    assert cache.forget(Invalidation(users=frozenset(("u-0", "u-1", "u-none")))) == 5
    assert [number for number in range(10) if cache.peek(b"%d" % number)] == [4, 5, 6, 7, 8, 9]
    assert cache.forget(Invalidation(ids=frozenset(("key_4",)))) == 1
    assert cache.forget(Invalidation(ids=frozenset(("key_4",)), users=frozenset(("u-2",)))) == 1
    assert len(cache) == 4


async def test_key_that_changes_hands_is_its_new_users_alone() -> None:
    cache = filled(2)
    cache.put(b"0", entry_of(Principal("key_0", "u-other")), 0.0)
    assert cache.forget(Invalidation(users=frozenset(("u-0",)))) == 2  # the other key, and the token
    assert cache.peek(b"0") is not None
    assert cache.forget(Invalidation(users=frozenset(("u-other",)))) == 1
    assert len(cache) == 0


async def test_index_holds_no_name_of_which_nothing_is_remembered() -> None:
    """Users and ids come and go for as long as the process lives."""
    cache = KeyCache(10)
    for number in range(1000):
        cache.put(b"%d" % number, entry_of(Principal(f"key_{number}", f"u-{number // 3}")), 0.0)
    assert len(cache) == len(cache._by_id._digests) == 10
    assert len(cache._by_user._digests) == 4
    for number in range(1000):
        cache.drop(b"%d" % number)
    assert (cache._by_id._digests, cache._by_user._digests) == ({}, {})


async def test_everything_is_doubted_once_and_what_comes_after_is_not() -> None:
    cache = filled(4)
    assert cache.forget(CHANGES["everything"]) == 5
    cache.put(b"later", entry_of(Principal("key_later", "u-later")), 0.0)
    doubted, later = cache.peek(b"0"), cache.peek(b"later")
    assert doubted is not None
    assert later is not None
    assert (doubted.ask_at, doubted.fresh_until, doubted.stale_until) == (0.0, 0.0, 70.0)
    assert later.ask_at == 50.0
    doubted.ask_at = 9.0  # asked again
    assert cache.peek(b"0") is doubted
    assert doubted.ask_at == 9.0


async def test_token_whose_proof_is_withdrawn_is_gone_until_it_is_proved_again() -> None:
    cache = filled(2)
    cache.forget(CHANGES["proof"])
    cache.forget(CHANGES["everything"])
    assert cache.peek(b"token") is None
    cache.put(b"token", entry_of(TokenPrincipal("jwt:u-0", "u-0", proof="rsa")), 0.0)
    assert cache.peek(b"token") is not None
    for number in range(1000):  # no issuer has so many: what is remembered of them is bounded, and safe
        cache.forget(Invalidation(proofs=frozenset((f"proof-{number}",))))
    assert cache._withdrawn == {}
    assert cache.peek(b"0") is None
