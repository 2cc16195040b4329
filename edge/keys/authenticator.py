"""Who calls: the cached look-up that proves a credential.

A credential is an API key, which a key store knows, or a token that this platform's issuer signed; both are proved once
and then remembered for a while.

What is known goes on while the store is down, within `stale_for`; what is not known is refused for the moment, with
503 and never 401. A breaker keeps a dead store from costing every request its time, and a flood of guesses reaches the
store only in part: what is known is looked up again whatever else is asked.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Final, TypeVar

from prometheus_client.core import GaugeMetricFamily, Metric

from edge.config.process_settings import KeysConfig
from edge.errors import KeyStoreUnavailable
from edge.exchange import Credential, Principal
from edge.keys.breaker import Breaker
from edge.keys.cache import CacheCounts, Entry, KeyCache
from edge.keys.caller import Caller
from edge.keys.credential import wrong_key
from edge.keys.stores.protocol import AnswerUnusable, Invalidation, KeyStore, StoreFailed
from edge.keys.tokens import TokenRefused, TokenVerifier
from edge.outage import Outage
from edge.tasks import end_tasks

_log = logging.getLogger(__name__)

T = TypeVar("T")

_MAX_KEY_LENGTH: Final = 512  # what is longer can only be a token
_MAX_LOOKUPS: Final = 1000  # different unknown keys asked of the store at once; more of a flood are declined
_MAX_RENEWALS: Final = 1000  # known keys asked of the store beside those
_GUESSES_PER_S: Final = 500  # look-ups that find nobody; past this and the burst an unknown key is declined
_GUESS_BURST_S: Final = 2.0  # that many seconds' worth at once
_MAX_TRIES: Final = 3  # of a look-up that changes overtake
_RENEWAL_SHARE: Final = 0.8  # of its time after which a key that is still used is looked up again, ahead of need


@dataclass(slots=True, eq=False)
class _LookUp:
    """A look-up under way: by one who tries whether the store is back, of a key that is known, or neither.

    `outdated` when a change arrived that its answer may not know of.
    """

    is_try: bool
    is_known: bool
    task: "asyncio.Task[Entry]" = field(init=False)
    outdated: bool = False


class Authenticator:
    """Proves credentials through the cache: one look-up in flight per key, however many wait for it."""

    def __init__(
        self,
        config: KeysConfig,
        store: KeyStore,
        clock: Callable[[], float],
        wall: Callable[[], float],
        tokens: TokenVerifier | None = None,
    ) -> None:
        self._config = config
        self._store = store
        self._tokens = tokens
        self._clock = clock
        self._wall = wall
        self._known = KeyCache(config.cache_entries)
        self._unknown = KeyCache(config.cache_entries)
        self._look_ups: dict[bytes, _LookUp] = {}
        self._breaker = Breaker()
        self._store_answered = False  # since it was last down
        self._guessed_until = 0.0  # when the guesses so far will have been paid for
        self.outage = Outage(_log, "key store is unavailable", "key store answers again")
        self.counts = CacheCounts()
        store.on_change = self.forget
        store.on_outage = self._note_outage
        if tokens is not None:
            tokens.on_change = self.forget

    def reconfigure(self, config: KeysConfig) -> None:
        """Take over a reload; entries keep the times they were made with."""
        self._config = config
        self._known.max_entries = self._unknown.max_entries = config.cache_entries
        self._store.reconfigure(config)

    def forget(self, invalidation: Invalidation) -> int:
        """Drop what a change made stale, and what is being looked up since before it; return how many were known."""
        for digest, look_up in self._look_ups.items():
            entry = self._known.peek(digest)
            principal = entry.caller.principal if entry is not None and entry.caller is not None else None
            look_up.outdated = look_up.outdated or invalidation.concerns(digest, principal)
        if invalidation.everything:
            self._unknown.drop_all()
        for digest in invalidation.digests:
            self._unknown.drop(digest)
        return self._known.forget(invalidation)

    def recall(self, credential: Credential) -> Caller | None:
        """Return the caller of a credential that the cache can answer for now, None when it has to be looked up.

        Raises: `Unauthenticated` for one that is known to be unknown, `StoreFailed` for one that was asked for a
        moment ago, in vain.
        """
        digest = credential.digest
        entry = self._known.peek(digest)
        if entry is not None:
            now = self._clock()
            if now < entry.ask_at:
                self.counts.hits += 1
                return entry.caller
            return self._ageing(credential, entry, now)
        entry = self._unknown.peek(digest)
        if entry is not None and entry.fresh_until >= self._clock():
            self.counts.negative_hits += 1
            raise StoreFailed if entry.failed else wrong_key(entry.message)
        return None

    async def look_up(self, credential: Credential) -> Caller:
        """Return the caller of a credential that `recall` does not know.

        Raises: `Unauthenticated`, `KeyStoreUnavailable`; a store's failure is never "unknown".
        """
        look_up = self._look_ups.get(credential.digest)
        if look_up is None:
            is_known = self._known.peek(credential.digest) is not None
            if not self._may_ask(credential.key, self._clock(), is_known=is_known):
                self.counts.declined += 1
                raise StoreFailed
            look_up = self._begin(credential, is_known=is_known)
        entry = await asyncio.shield(look_up.task)
        if entry.caller is None:
            raise wrong_key(entry.message)
        return entry.caller

    async def check(self, credential: Credential, model: str) -> None:
        """Raise what one who comes now would get for a model: a key may be revoked while its request waits."""
        caller = self.recall(credential) or await self.look_up(credential)
        caller.check_state(self._wall())
        caller.check(model)

    def metrics(self) -> Iterator[Metric]:
        """Yield what the cache did, and whether the store answers."""
        yield from self.counts.metrics()
        up = not self.outage
        yield GaugeMetricFamily("edge_key_store_up", "1, or 0 while the key store does not answer.", value=up)

    def take_used(self) -> set[str]:
        """Return the ids of the keys that were used since the last call, to `keys.cache_ttl`."""
        return self._known.take_used()

    def _ageing(self, credential: Credential, entry: Entry, now: float) -> Caller | None:
        """Return the caller of an entry that needs a new look-up and can do without for now, else None."""
        is_fresh = now < entry.fresh_until
        may_ask = self._may_ask(credential.key, now, is_known=True)
        if not is_fresh:
            is_answered = may_ask and not entry.failed and not self._breaker.is_open
            if is_answered or now >= entry.stale_until:
                return None
        if may_ask and credential.digest not in self._look_ups:
            self._begin(credential, is_known=True)
        if is_fresh:
            self.counts.hits += 1
        else:
            self.counts.stale += 1
        return entry.caller

    # --- look-ups

    def _may_ask(self, key: str, now: float, *, is_known: bool) -> bool:
        """Return whether one more may be looked up now; guesses are few, at once and in a second."""
        if is_known:
            has_room = len(self._look_ups) < _MAX_LOOKUPS + _MAX_RENEWALS
        else:
            has_room = len(self._look_ups) < _MAX_LOOKUPS and self._guessed_until - now < _GUESS_BURST_S
        return has_room and (self._breaker.admits(now) or not self._asks_store(key))

    def _asks_store(self, key: str) -> bool:
        """Return whether the store is asked when this is looked up; not for a token when it knows nothing of users."""
        return self._store.knows_users or self._tokens is None or not self._tokens.claims(key)

    def _begin(self, credential: Credential, *, is_known: bool) -> _LookUp:
        self.counts.misses += 1
        digest = credential.digest
        is_try = self._breaker.is_open and self._asks_store(credential.key)
        if is_try:
            self._breaker.begin()
        look_up = self._look_ups[digest] = _LookUp(is_try, is_known)
        # Owned here, not by the first who waits: whoever leaves cancels nobody else.
        look_up.task = asyncio.get_running_loop().create_task(self._prove(credential, look_up), name="key look-up")
        look_up.task.add_done_callback(lambda done: self._proved(digest, look_up))
        return look_up

    def _proved(self, digest: bytes, look_up: _LookUp) -> None:
        del self._look_ups[digest]
        if look_up.is_try:
            self._breaker.end()
        if not look_up.task.cancelled():
            look_up.task.exception()  # seen, also when everybody who waited has left

    async def _prove(self, credential: Credential, look_up: _LookUp) -> Entry:
        for _ in range(_MAX_TRIES):
            look_up.outdated = False
            try:
                entry = await self._ask(credential, look_up)
            except KeyStoreUnavailable as error:
                self.counts.failures += 1
                return self._without_answer(credential.digest, error)
            if not look_up.outdated:  # else a revocation arrived while the store answered: ask again
                self._keep(credential.digest, entry)
                break
        return entry

    async def _ask(self, credential: Credential, look_up: _LookUp) -> Entry:
        """Return what is true of a credential now; raises `KeyStoreUnavailable`."""
        if self._tokens is not None and self._tokens.claims(credential.key):
            try:
                principal = await self._tokens.verify(credential.key)
            except TokenRefused as refused:
                return self._refusal(str(refused))
            if self._store.knows_users:
                state = await self._ask_store(self._store.look_up_user(principal.user), look_up)
                principal = replace(principal, suspended=state.suspended, out_of_quota=state.out_of_quota)
            return self._entry(principal, float("inf"))  # what was signed stays so until it expires
        found: Principal | None = None
        if len(credential.key) <= _MAX_KEY_LENGTH:
            found = await self._ask_store(self._store.look_up(credential.digest, credential.key), look_up)
        return self._refusal() if found is None else self._entry(found, self._config.cache_ttl_s)

    async def _ask_store(self, question: Coroutine[Any, Any, T], look_up: _LookUp) -> T:
        """Return the store's answer within its time, and let the breaker know how it went."""
        try:
            async with asyncio.timeout(self._config.store_timeout_s):
                answer = await question
        except TimeoutError:
            error = StoreFailed(f"no answer within {self._config.store_timeout_s:g} s")
        except StoreFailed as failed:
            error = failed
        except Exception as defect:  # of the store: it is no reason to refuse who is known
            error = StoreFailed(type(defect).__name__)
        else:
            if self._breaker.is_open:
                self._note_outage("")
            self._breaker.reset()
            self._store_answered = True
            return answer
        self._note_failure(error, look_up)
        raise error

    def _note_failure(self, error: StoreFailed, look_up: _LookUp) -> None:
        """Count a failure against the store, unless it may be that of one key while others are answered.

        Else whoever has one key that the store stumbles on, or finds one, could shut out every new key.
        """
        is_of_key = isinstance(error, AnswerUnusable) and self._store_answered and not look_up.is_known
        if is_of_key and not look_up.is_try:
            return
        self._breaker.fail(self._clock(), is_try=look_up.is_try)
        if self._breaker.is_open:
            self._note_outage(error.reason)

    def _without_answer(self, digest: bytes, error: KeyStoreUnavailable) -> Entry:
        """Return what is known of a key that could not be looked up, if that serves; else raise the error.

        Either is asked for again no sooner than an unknown key.
        """
        now = self._clock()
        known = self._known.peek(digest)
        if known is not None and now < known.stale_until:
            known.ask_at, known.failed = min(now + self._config.negative_ttl_s, known.stale_until), True
            self.counts.stale += now >= known.fresh_until
            return known
        if isinstance(error, AnswerUnusable):
            self._unknown.put(digest, self._refusal(failed=True), now)
        raise error

    def _note_outage(self, reason: str) -> None:
        """Note that the store is down, for a reason, or "" that it is back: then it is asked at once."""
        self._store_answered = not reason
        if reason:
            self.outage.down(reason)
        else:
            self.outage.up()
            self._breaker.reset()

    def _refusal(self, message: str = "", *, failed: bool = False) -> Entry:
        """Return the entry of a credential that proves nobody, which counts as a guess."""
        now = self._clock()
        self._guessed_until = max(self._guessed_until, now) + 1 / _GUESSES_PER_S
        until = now + self._config.negative_ttl_s
        return Entry(None, until, until, until, message, failed)

    def _entry(self, principal: Principal, ttl_s: float) -> Entry:
        """Return the entry of a record; one that admits nobody is asked for again as soon as an unknown key."""
        config, now, left_s = self._config, self._clock(), float("inf")
        if principal.expires_at is not None:
            left_s = principal.expires_at - self._wall()
        usable = principal.enabled and not principal.suspended and not principal.out_of_quota and left_s > 0
        ttl_s = min(ttl_s, left_s) if usable else min(config.negative_ttl_s, config.cache_ttl_s)
        fresh_until = now + ttl_s
        # It goes on while the store is down if it admits somebody; else it may do so by now, and nobody knows.
        stale_until = fresh_until + config.stale_for_s if usable else fresh_until
        return Entry(Caller(principal), now + ttl_s * _RENEWAL_SHARE, fresh_until, stale_until)

    def _keep(self, digest: bytes, entry: Entry) -> None:
        if entry.caller is None:
            self._known.drop(digest)
        cache = self._unknown if entry.caller is None else self._known
        cache.put(digest, entry, self._clock())

    async def close(self) -> None:
        """End the look-ups that run."""
        await end_tasks([look_up.task for look_up in self._look_ups.values()])
