"""Who calls: the credential a request shows, the cached look-up that proves it, and what its owner may call.

A credential is an API key, which a key store knows, or a token that this platform's issuer signed; both are proved once
and then remembered for a while. The cache is aiocache's memory cache, bounded, keyed by the SHA-256 of the credential
(never by itself). Its hot path is one dict look-up: aiocache's own `get` passes through four decorators and costs 8 us,
a tenth of a whole request.

What is known goes on while the store is down, within `stale_for`; what is not known is told to come back, and never
that it is wrong. A breaker keeps a dead store from costing every request its time, and a flood of guesses reaches the
store only in part: what is known is looked up again whatever else is asked.
"""

import asyncio
import logging
import re
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field, replace
from typing import Any, Final, Protocol, TypeVar

from aiocache import SimpleMemoryCache
from multidict import istr

from edge.config.settings import KeysConfig
from edge.errors import (
    InvalidRequest,
    KeyStoreUnavailable,
    ModelNotFound,
    OutOfQuota,
    PermissionDenied,
    Unauthenticated,
)
from edge.exchange import NO_CREDENTIAL, Credential, Principal
from edge.keys.breaker import Breaker
from edge.keys.stores.protocol import AnswerUnusable, Changes, KeyStore, StoreFailed, hash_key
from edge.keys.tokens import TokenRefused, TokenVerifier
from edge.names import Glob

_log = logging.getLogger(__name__)

T = TypeVar("T")

_CREDENTIAL = re.compile(r"[\x21-\x7e]{8,8192}")
_MAX_KEY_LENGTH: Final = 512  # what is longer can only be a token
_MAX_LOOKUPS: Final = 1000  # different unknown keys asked of the store at once; a flood of more is told to come back
_MAX_RENEWALS: Final = 1000  # known keys asked of the store beside those
_GUESSES_PER_S: Final = 500  # look-ups that find nobody; past this and the burst an unknown key is told to come back
_GUESS_BURST_S: Final = 2.0  # that many seconds' worth at once
_MAX_VERDICTS: Final = 256  # models remembered per key
_MAX_TRIES: Final = 3  # of a look-up that changes overtake
_RENEWAL_SHARE: Final = 0.8  # of its time after which a key that is still used is looked up again, ahead of need
_AUTHORIZATION: Final = istr("Authorization")
_API_KEY: Final = istr("api-key")
_X_API_KEY: Final = istr("x-api-key")
_NO_VALUES: Final[list[str]] = []
_CHALLENGE: Final = 'Bearer realm="d.run"'


class Headers(Protocol):
    """What is asked of a request's headers: case-insensitive, several values a name."""

    def getall(self, key: str, default: list[str]) -> list[str]:
        """Return every value of a header."""

    def __contains__(self, key: object) -> bool:
        """Say whether the header is there."""


def credential_of(headers: Headers, known: Credential = NO_CREDENTIAL) -> Credential:
    """Return what a request shows as `Authorization: Bearer`, `api-key` or `x-api-key` (RFC 6750 section 2.1).

    `known` is what the connection showed last, which hardly ever changes: then it is returned, and nothing is hashed.
    Raises: `Unauthenticated` for none or a malformed one, `InvalidRequest` for two different ones.
    """
    values = headers.getall(_AUTHORIZATION, _NO_VALUES)
    header = ""
    if len(values) == 1 and _API_KEY not in headers and _X_API_KEY not in headers:
        header = values[0]
        if header == known.header and header:
            return known
        key = _bearer(header)
    else:
        key = _only_key(headers, values)
    if not key:
        raise _no_key()
    if not _CREDENTIAL.fullmatch(key):
        raise _invalid_key()
    return Credential(header, key, hash_key(key))


def _only_key(headers: Headers, authorizations: list[str]) -> str:
    keys = set(map(_bearer, authorizations))
    for name in (_API_KEY, _X_API_KEY):
        keys.update(value.strip() for value in headers.getall(name, _NO_VALUES))
    keys.discard("")  # another scheme, or a header that a client sends empty
    if len(keys) > 1:
        raise InvalidRequest("the request shows two different API keys: send one")
    return keys.pop() if keys else ""


def _bearer(value: str) -> str:
    """Return the key of an `Authorization`, "" when it has none or is of another scheme."""
    scheme, _, key = value.strip().partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


def _no_key() -> Unauthenticated:
    return Unauthenticated(
        "You didn't provide an API key. Send it as a header: Authorization: Bearer YOUR_KEY",
        headers=(("WWW-Authenticate", _CHALLENGE),),
    )


def _invalid_key(message: str = "") -> Unauthenticated:
    return Unauthenticated(
        message or "Incorrect API key provided. Check the key, or make a new one at the platform.",
        headers=(("WWW-Authenticate", f'{_CHALLENGE}, error="invalid_token"'),),
    )


class Caller:
    """A principal as the cache holds it: with what was decided of the models it asked for."""

    __slots__ = ("_allow", "_deny", "_verdicts", "principal")

    def __init__(self, principal: Principal) -> None:
        self.principal = principal
        self._allow = [(pattern, Glob(pattern)) for pattern in principal.allow]
        self._deny = [Glob(pattern) for pattern in principal.deny]
        self._verdicts: dict[str, bool | None] = {}

    def may_call(self, model: str) -> bool | None:
        """Return True, False (looks like an unknown model), or None for an explicit deny."""
        verdict = self._verdicts.get(model, ...)
        if verdict is ...:
            if len(self._verdicts) >= _MAX_VERDICTS:
                self._verdicts.clear()
            verdict = self._verdicts[model] = self._judge(model)
        return verdict

    def _judge(self, model: str) -> bool | None:
        if any(denied.matches(model) for denied in self._deny):
            return None
        owner, slash, _ = model.partition("/")
        owned = owner.startswith("u-")
        if not self._allow:
            return bool(slash) and owner in ("public", self.principal.user)
        for pattern, allowed in self._allow:
            opens = not owned or owner in (self.principal.user, pattern.partition("/")[0])
            if opens and allowed.matches(model):
                return True
        return False

    def check(self, model: str) -> None:
        """Raise `PermissionDenied` or `ModelNotFound` unless this caller may call the model."""
        verdict = self.may_call(model)
        if verdict is None:
            raise PermissionDenied("This API key is not allowed to use this model.", param="model")
        if not verdict:
            raise ModelNotFound.named(f"`{model}`")

    def check_state(self, now: float) -> None:
        """Raise unless the key is usable at the Unix time `now`."""
        principal = self.principal
        if principal.expires_at is not None and principal.expires_at <= now:
            raise _invalid_key()
        if not principal.enabled or principal.suspended:
            raise _invalid_key()
        if principal.out_of_quota:
            raise OutOfQuota("You exceeded your current quota: check the balance of your account.")


@dataclass(slots=True)
class _Entry:
    """What was found: `caller` None is "unknown", with what is said of it. Times are seconds of the loop's clock.

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
        # A dict would look for its oldest entry past all that were deleted before it: 60 us of 100,000.
        self._cache: OrderedDict[bytes, _Entry] = OrderedDict()
        self.max_entries = max_entries

    def peek(self, digest: bytes) -> _Entry | None:
        """Return an entry without aiocache's coroutine layers."""
        return self._cache.get(digest)

    def put(self, digest: bytes, entry: _Entry, now: float) -> None:
        """Keep an entry as the newest; the oldest leave that are of no use any more, or over the bound."""
        entries = self._cache
        entries.pop(digest, None)
        while entries and (len(entries) >= self.max_entries or next(iter(entries.values())).stale_until <= now):
            entries.popitem(last=False)
        entries[digest] = entry

    def drop(self, digest: bytes) -> bool:
        """Drop an entry; return whether it was there."""
        return self._cache.pop(digest, None) is not None

    def forget(self, changes: Changes) -> int:
        """Drop the callers that were changed, and doubt those that may have been; return how many that is."""
        entries = self._cache
        if changes.everything:
            for entry in entries.values():
                entry.ask_at = entry.fresh_until = 0.0
                entry.failed = False  # then: it may answer by now
        named = {digest for digest in changes.digests if digest in entries}
        if changes.name_principals:
            name = changes.name
            named.update(
                digest for digest, entry in entries.items() if entry.caller is not None and name(entry.caller.principal)
            )
        for digest in named:
            del entries[digest]
        return len(entries) + len(named) if changes.everything else len(named)

    def drop_all(self) -> None:
        """Drop every entry."""
        self._cache.clear()

    def __len__(self) -> int:
        return len(self._cache)


@dataclass(slots=True)
class CacheCounts:
    """What the cache did since the start; for the metrics."""

    hits: int = 0
    negative_hits: int = 0
    misses: int = 0
    stale: int = 0
    failures: int = 0
    declined: int = 0


@dataclass(slots=True, eq=False)
class _LookUp:
    """A look-up under way: by one who tries whether the store is back, of a key that is known, or neither.

    `outdated` when a change arrived that its answer may not know of.
    """

    is_try: bool
    is_known: bool
    task: "asyncio.Task[_Entry]" = field(init=False)
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
        self.outage = ""
        self.counts = CacheCounts()
        store.changed = self.forget
        store.outage = self._store_outage
        if tokens is not None:
            tokens.changed = self.forget

    def reconfigure(self, config: KeysConfig) -> None:
        """Take over a reload; entries keep the times they were made with."""
        self._config = config
        self._known.max_entries = self._unknown.max_entries = config.cache_entries

    def forget(self, changes: Changes) -> int:
        """Drop what a change made stale, and what is being looked up since before it; return how many were known."""
        for digest, look_up in self._look_ups.items():
            entry = self._known.peek(digest)
            principal = entry.caller.principal if entry is not None and entry.caller is not None else None
            look_up.outdated = look_up.outdated or changes.concern(digest, principal)
        if changes.everything:
            self._unknown.drop_all()
        for digest in changes.digests:
            self._unknown.drop(digest)
        return self._known.forget(changes)

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
            raise StoreFailed if entry.failed else _invalid_key(entry.message)
        return None

    async def look_up(self, credential: Credential) -> Caller:
        """Return the caller of a credential that `recall` does not know.

        Raises: `Unauthenticated`, `KeyStoreUnavailable`; a store's failure is never "unknown".
        """
        entry = await asyncio.shield(self._look_up(credential))
        if entry.caller is None:
            raise _invalid_key(entry.message)
        return entry.caller

    def check(self, caller: Caller) -> None:
        """Raise `Unauthenticated` or `OutOfQuota` unless the caller, who is known by now, may call at all."""
        caller.check_state(self._wall())

    def _ageing(self, credential: Credential, entry: _Entry, now: float) -> Caller | None:
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

    def _look_up(self, credential: Credential) -> "asyncio.Task[_Entry]":
        look_up = self._look_ups.get(credential.digest)
        if look_up is None:
            is_known = self._known.peek(credential.digest) is not None
            if not self._may_ask(credential.key, self._clock(), is_known=is_known):
                self.counts.declined += 1
                raise StoreFailed
            look_up = self._begin(credential, is_known=is_known)
        return look_up.task

    def _may_ask(self, key: str, now: float, *, is_known: bool) -> bool:
        """Say whether one more may be looked up now; guesses are few, at once and in a second."""
        if is_known:
            has_room = len(self._look_ups) < _MAX_LOOKUPS + _MAX_RENEWALS
        else:
            has_room = len(self._look_ups) < _MAX_LOOKUPS and self._guessed_until - now < _GUESS_BURST_S
        return has_room and (self._breaker.admits(now) or not self._asks_store(key))

    def _asks_store(self, key: str) -> bool:
        """Say whether the store is asked when this is looked up; not for a token when it knows nothing of users."""
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

    async def _prove(self, credential: Credential, look_up: _LookUp) -> _Entry:
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

    async def _ask(self, credential: Credential, look_up: _LookUp) -> _Entry:
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
        return self._refusal("") if found is None else self._entry(found, self._config.cache_ttl_s)

    async def _ask_store(self, question: Coroutine[Any, Any, T], look_up: _LookUp) -> T:
        """Return the store's answer within its time, and let the breaker know how it went."""
        try:
            async with asyncio.timeout(self._config.store_timeout_s):
                answer = await question
        except TimeoutError:
            error = StoreFailed(f"no answer within {self._config.store_timeout_s:g} s")
        except StoreFailed as failed:
            error = failed
        except Exception as defect:  # of the store: it is no reason to let nobody in who is known
            error = StoreFailed(type(defect).__name__)
        else:
            if self._breaker.is_open:
                self._store_outage("")
            self._breaker.reset()
            self._store_answered = True
            return answer
        self._note_failure(error, look_up)
        raise error

    def _note_failure(self, error: StoreFailed, look_up: _LookUp) -> None:
        """Count a failure against the store, unless it may be that of one key while others are answered.

        Else whoever has one key that the store cannot tell of, or finds one, could shut out every new key.
        """
        is_of_key = isinstance(error, AnswerUnusable) and self._store_answered and not look_up.is_known
        if is_of_key and not look_up.is_try:
            return
        self._breaker.fail(self._clock(), is_try=look_up.is_try)
        if self._breaker.is_open:
            self._store_outage(error.reason)

    def _without_answer(self, digest: bytes, error: KeyStoreUnavailable) -> _Entry:
        """Return what is known of a key that could not be looked up, if that serves; else raise the error.

        Either is asked for again no sooner than an unknown key.
        """
        now = self._clock()
        again_at = now + self._config.negative_ttl_s
        known = self._known.peek(digest)
        if known is not None and now < known.stale_until:
            known.ask_at, known.failed = min(again_at, known.stale_until), True
            self.counts.stale += now >= known.fresh_until
            return known
        if isinstance(error, AnswerUnusable):
            self._note_guess(now)
            self._unknown.put(digest, _Entry(None, again_at, again_at, again_at, failed=True), now)
        raise error

    def _store_outage(self, reason: str) -> None:
        """Tell once when the store goes, and once when it is back."""
        if bool(reason) != bool(self.outage):
            if reason:
                _log.error("key store is unavailable: %s", reason)
            else:
                _log.warning("key store answers again")
        self.outage = reason
        self._store_answered = not reason
        if not reason:
            self._breaker.reset()

    def _refusal(self, message: str) -> _Entry:
        now = self._clock()
        self._note_guess(now)
        until = now + self._config.negative_ttl_s
        return _Entry(None, until, until, until, message)

    def _note_guess(self, now: float) -> None:
        self._guessed_until = max(self._guessed_until, now) + 1 / _GUESSES_PER_S

    def _entry(self, principal: Principal, ttl_s: float) -> _Entry:
        """Return the entry of a record; one that lets nobody in is asked for again as soon as an unknown key."""
        config, now, left_s = self._config, self._clock(), float("inf")
        if principal.expires_at is not None:
            left_s = principal.expires_at - self._wall()
        usable = principal.enabled and not principal.suspended and not principal.out_of_quota and left_s > 0
        ttl_s = min(ttl_s, left_s) if usable else min(config.negative_ttl_s, config.cache_ttl_s)
        fresh_until = now + ttl_s
        # It goes on while the store is down if it lets somebody in; else it may do so by now, and nobody can say.
        stale_until = fresh_until + config.stale_for_s if usable else fresh_until
        return _Entry(Caller(principal), now + ttl_s * _RENEWAL_SHARE, fresh_until, stale_until)

    def _keep(self, digest: bytes, entry: _Entry) -> None:
        if entry.caller is None:
            self._known.drop(digest)
            self._unknown.put(digest, entry, self._clock())
        else:
            self._known.put(digest, entry, self._clock())

    async def close(self) -> None:
        """End the look-ups that run."""
        tasks = [look_up.task for look_up in self._look_ups.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
