"""The cache of look-ups: aiocache's memory cache, bounded, keyed by the SHA-256 of a credential (never by itself).

Its hot path is one dict look-up: aiocache's own `get` passes through four decorators and costs 8 us, a tenth of a whole
request. Nothing here walks through all entries, of which there are 100,000. What a change names is found by an index; a
change of everything begins an epoch, and each entry of an earlier one is put right when it is next looked at.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from aiocache import SimpleMemoryCache
from prometheus_client.core import CounterMetricFamily, Metric

from edge.exchange import Principal
from edge.keys.caller import Caller
from edge.keys.stores.protocol import Invalidation, TokenPrincipal

_MAX_DROPPED: Final = 4  # of no use any more, at each new one: all of a quiet night's at once would hold the loop up
_MAX_WITHDRAWN: Final = 1000  # keys of an issuer that are remembered as such


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
    epoch: int = 0


class _Index:
    """The digests that a name has; most have one, and a set for each of 100,000 would take 20 MB."""

    def __init__(self) -> None:
        self._digests: dict[str, bytes | set[bytes]] = {}

    def add(self, name: str, digest: bytes) -> None:
        there = self._digests.setdefault(name, digest)
        if isinstance(there, set):
            there.add(digest)
        elif there != digest:
            self._digests[name] = {there, digest}

    def remove(self, name: str, digest: bytes) -> None:
        there = self._digests.get(name)
        if isinstance(there, set) and len(there) > 1:
            there.discard(digest)
        elif there is not None:
            del self._digests[name]

    def find(self, names: Iterable[str]) -> Iterator[bytes]:
        for name in names:
            there = self._digests.get(name, ())
            yield from (there,) if isinstance(there, bytes) else there


class KeyCache(SimpleMemoryCache):  # type: ignore[misc]  # aiocache ships no types
    """aiocache's memory cache with a bound, evicting by insertion; expiry is in the entries, so no timer is set."""

    def __init__(self, max_entries: int) -> None:
        super().__init__(timeout=0)
        # A dict would search for its oldest entry past all that were deleted before it: 60 us of 100,000.
        self._cache: OrderedDict[bytes, Entry] = OrderedDict()
        self.max_entries = max_entries
        self._by_user, self._by_id = _Index(), _Index()
        self._epoch = self._doubted = self._dropped = 0  # what is of an earlier epoch may have changed, or is no more
        self._withdrawn: dict[str, int] = {}  # by what proved a token, the epoch in which it ceased to
        self._used: set[str] = set()  # ids of keys, since they were last asked for

    def peek(self, digest: bytes) -> Entry | None:
        """Return an entry without aiocache's coroutine layers."""
        entry = self._cache.get(digest)
        if entry is not None and entry.epoch != self._epoch:
            return self._put_right(digest, entry)
        return entry

    def _put_right(self, digest: bytes, entry: Entry) -> Entry | None:
        """Return an entry after all that happened since it was last looked at; None when it is no more."""
        principal = entry.caller.principal if entry.caller is not None else None
        proof = principal.proof if isinstance(principal, TokenPrincipal) else ""
        if entry.epoch < max(self._dropped, self._withdrawn.get(proof, 0)):
            self.drop(digest)
            return None
        if entry.epoch < self._doubted:
            entry.ask_at = entry.fresh_until = 0.0
            entry.failed = False  # then: it may answer by now
        entry.epoch = self._epoch
        return entry

    def put(self, digest: bytes, entry: Entry, now: float) -> None:
        """Keep an entry as the newest; the oldest leave that are of no use any more, or over the bound."""
        self.drop(digest)
        entries = self._cache
        for _ in range(_MAX_DROPPED):
            if not entries or (len(entries) < self.max_entries and next(iter(entries.values())).stale_until > now):
                break
            self.drop(next(iter(entries)))
        entry.epoch = self._epoch
        entries[digest] = entry
        if entry.caller is not None:
            self._note_used(entry.caller.principal)
            self._by_user.add(entry.caller.principal.user, digest)
            self._by_id.add(entry.caller.principal.id, digest)

    def _note_used(self, principal: Principal) -> None:
        """Note a key that was looked up, which only happens when a request shows it: so no other request pays."""
        is_key = not isinstance(principal, TokenPrincipal)
        if is_key and principal.enabled and not principal.suspended and len(self._used) < self.max_entries:
            self._used.add(principal.id)

    def take_used(self) -> set[str]:
        """Return the ids of the keys that were used since the last call."""
        used, self._used = self._used, set()
        return used

    def drop(self, digest: bytes) -> None:
        """Drop an entry, if it is there."""
        entry = self._cache.pop(digest, None)
        if entry is not None and entry.caller is not None:
            self._by_user.remove(entry.caller.principal.user, digest)
            self._by_id.remove(entry.caller.principal.id, digest)

    def forget(self, invalidation: Invalidation) -> int:
        """Drop the callers that were changed, and doubt those that may have been; return how many that is.

        Tokens by what proved them are not counted: they leave when they are next looked at.
        """
        entries = self._cache
        named = {digest for digest in invalidation.digests if digest in entries}
        named.update(self._by_user.find(invalidation.users), self._by_id.find(invalidation.ids))
        for digest in named:
            self.drop(digest)
        if invalidation.everything or invalidation.proofs:
            self._epoch += 1
        self._withdrawn.update(dict.fromkeys(invalidation.proofs, self._epoch))
        if len(self._withdrawn) > _MAX_WITHDRAWN:
            self._withdrawn.clear()
            self.drop_all()
        if invalidation.everything:
            self._doubted = self._epoch
            return len(entries) + len(named)
        return len(named)

    def drop_all(self) -> None:
        """Drop every entry; its memory is free again as new ones come."""
        self._epoch += 1
        self._dropped = self._epoch

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
