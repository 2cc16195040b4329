"""The cache of look-ups: bounded, without timers."""

from edge.keys.cache import Entry, KeyCache


def entry_until(time: float) -> Entry:
    return Entry(None, time, time, time)


async def test_cache_lets_go_of_what_serves_nobody_any_more() -> None:
    """A flood leaves as much as its last seconds hold, not as much as fits."""
    cache = KeyCache(1000)
    for number in range(500):
        cache.put(b"%d" % number, entry_until(number + 10), number)
    assert len(cache) == 10
    cache.max_entries = 4
    cache.put(b"x", entry_until(600), 500)
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
