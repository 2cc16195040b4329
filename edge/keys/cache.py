"""The cache of look-ups: aiocache's memory cache, bounded, keyed by the SHA-256 of a credential (never by itself).

Its hot path is one dict look-up: aiocache's own `get` passes through four decorators and costs 8 us, a tenth of a whole
request.
"""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

from aiocache import SimpleMemoryCache
from prometheus_client.core import CounterMetricFamily, Metric

from edge.keys.caller import Caller
from edge.keys.stores.protocol import Invalidation


@dataclass(slots=True)
class Entry:
    """What was found: `caller` None is "unknown", with the message for it. Times are seconds of the loop's clock.

    Before `ask_at` it is simply believed, then it is asked for again while it still serves, from `fresh_until` on it
    serves only while the store does not answer, and from `stale_until` on not at all. `failed`: when it was last asked
    for there was no answer.
    """

    caller: Caller | None
    ask_at: float
    fresh_until: float
    stale_until: float
    message: str = ""
    failed: bool = False


class KeyCache(SimpleMemoryCache):  # type: ignore[misc]  # aiocache ships no types
    """aiocache's memory cache with a bound, evicting by insertion; expiry is in the entries, so no timer is set."""

    def __init__(self, max_entries: int) -> None:
        super().__init__(timeout=0)
        # A dict would search for its oldest entry past all that were deleted before it: 60 us of 100,000.
        self._cache: OrderedDict[bytes, Entry] = OrderedDict()
        self.max_entries = max_entries

    def peek(self, digest: bytes) -> Entry | None:
        """Return an entry without aiocache's coroutine layers."""
        return self._cache.get(digest)

    def put(self, digest: bytes, entry: Entry, now: float) -> None:
        """Keep an entry as the newest; the oldest leave that are of no use any more, or over the bound."""
        entries = self._cache
        entries.pop(digest, None)
        while entries and (len(entries) >= self.max_entries or next(iter(entries.values())).stale_until <= now):
            entries.popitem(last=False)
        entries[digest] = entry

    def drop(self, digest: bytes) -> None:
        """Drop an entry, if it is there."""
        self._cache.pop(digest, None)

    def forget(self, invalidation: Invalidation) -> int:
        """Drop the callers that were changed, and doubt those that may have been; return how many that is."""
        entries = self._cache
        if invalidation.everything:
            for entry in entries.values():
                entry.ask_at = entry.fresh_until = 0.0
                entry.failed = False  # then: it may answer by now
        named = {digest for digest in invalidation.digests if digest in entries}
        if invalidation.names_principals:
            names = invalidation.names
            named.update(digest for digest, entry in entries.items() if entry.caller and names(entry.caller.principal))
        for digest in named:
            del entries[digest]
        return len(entries) + len(named) if invalidation.everything else len(named)

    def drop_all(self) -> None:
        """Drop every entry."""
        self._cache.clear()

    def __len__(self) -> int:
        return len(self._cache)


@dataclass(slots=True)
class CacheCounts:
    """What was found in the cache and asked of the store since the start."""

    hits: int = 0
    negative_hits: int = 0
    misses: int = 0
    stale: int = 0
    failures: int = 0
    declined: int = 0

    def metrics(self) -> Iterator[Metric]:
        """Yield the counts for Prometheus."""
        declined = "Keys told to come back without a look-up: the store is down, or too many are guessed."
        for name, text, value in (
            ("edge_key_cache_hits", "Keys found in the cache.", self.hits),
            ("edge_key_cache_negative_hits", "Keys known to be unknown.", self.negative_hits),
            ("edge_key_lookups", "Keys asked of the store.", self.misses),
            ("edge_key_lookup_failures", "Look-ups the store could not answer.", self.failures),
            ("edge_key_lookups_declined", declined, self.declined),
            ("edge_key_stale_answers", "Known keys that went on while the store was down.", self.stale),
        ):
            yield CounterMetricFamily(name, text, value=value)
