"""Who calls: the credential a request shows, the cached look-up that proves it, and what its owner may call.

A credential is an API key, which a key store knows, or a token that this platform's issuer signed; both are proved once
and then remembered for a while. The cache is aiocache's memory cache, bounded, keyed by the SHA-256 of the credential
(never by itself). Its hot path is one dict look-up: aiocache's own `get` passes through four decorators and costs 8 us,
a tenth of a whole request.

What is known goes on while the store is down, within `stale_for`; what is not known is told to come back, and never
that it is wrong. A breaker keeps a dead store from costing every request its time.
"""

import asyncio
import logging
import re
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol, TypeVar

from aiocache import SimpleMemoryCache
from multidict import istr

from edge.breaker import Breaker
from edge.config import KeysConfig
from edge.errors import (
    InvalidRequest,
    KeyStoreUnavailable,
    ModelNotFound,
    OutOfQuota,
    PermissionDenied,
    Unauthenticated,
)
from edge.exchange import NO_CREDENTIAL, Credential, Principal
from edge.keystores import Changes, KeyStore, hash_key, unavailable
from edge.tokens import TokenRefused, TokenVerifier

_log = logging.getLogger(__name__)

T = TypeVar("T")

_CREDENTIAL = re.compile(r"[\x21-\x7e]{8,8192}")
_MAX_KEY_LENGTH: Final = 512  # what is longer can only be a token
_MAX_LOOKUPS: Final = 1000  # different unknown keys asked of the store at once; a flood of more is told to come back
_MAX_VERDICTS: Final = 256  # models remembered per key
_MAX_TRIES: Final = 3  # of a look-up that changes overtake
_REFRESH_SHARE: Final = 0.8  # of its time after which a key that is still used is looked up again, ahead of need
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
    if not _CREDENTIAL.fullmatch(key):
        raise _invalid_key()
    return Credential(header, key, hash_key(key))


def _only_key(headers: Headers, authorizations: list[str]) -> str:
    keys = set(map(_bearer, authorizations))
    for name in (_API_KEY, _X_API_KEY):
        keys.update(value.strip() for value in headers.getall(name, _NO_VALUES))
    if not keys:
        raise Unauthenticated(
            "You didn't provide an API key. Send it as a header: Authorization: Bearer YOUR_KEY",
            headers=(("WWW-Authenticate", _CHALLENGE),),
        )
    if len(keys) > 1:
        raise InvalidRequest("the request shows two different API keys: send one")
    return keys.pop()


def _bearer(value: str) -> str:
    scheme, _, key = value.strip().partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


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
        self._allow = [(pattern, glob(pattern)) for pattern in principal.allow]
        self._deny = [glob(pattern) for pattern in principal.deny]
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
        if any(denied.fullmatch(model) for denied in self._deny):
            return None
        owner, slash, _ = model.partition("/")
        owned = owner.startswith("u-")
        if not self._allow:
            return bool(slash) and owner in ("public", self.principal.user)
        for pattern, allowed in self._allow:
            opens = not owned or owner in (self.principal.user, pattern.partition("/")[0])
            if opens and allowed.fullmatch(model):
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


def glob(pattern: str) -> re.Pattern[str]:
    """Return the expression of a glob: `*` stays within one `/` level, `**` crosses."""
    parts = re.split(r"(\*\*|\*)", pattern)
    return re.compile("".join({"**": ".*", "*": "[^/]*"}.get(part, re.escape(part)) for part in parts), re.DOTALL)


@dataclass(slots=True)
class _Entry:
    """What was found: `caller` None is "unknown", with what is said of it. Times are seconds of the loop's clock.

    Before `refresh_at` it is simply true, then it is asked for again while it still serves, from `fresh_until` on it
    serves only while the store is down, and from `stale_until` on not at all.
    """

    caller: Caller | None
    refresh_at: float
    fresh_until: float
    stale_until: float
    message: str = ""


class KeyCache(SimpleMemoryCache):  # type: ignore[misc]  # aiocache ships no types
    """aiocache's memory cache with a bound, evicting by insertion; expiry is in the entries, so no timer is set."""

    def __init__(self, max_entries: int) -> None:
        super().__init__(timeout=0)
        self._max_entries = max_entries

    def peek(self, digest: bytes) -> _Entry | None:
        """Return an entry without aiocache's coroutine layers."""
        entry: _Entry | None = self._cache.get(digest)
        return entry

    def put(self, digest: bytes, entry: _Entry) -> None:
        """Keep an entry as the newest; the oldest leaves when the bound is reached."""
        self._cache.pop(digest, None)
        if len(self._cache) >= self._max_entries:
            del self._cache[next(iter(self._cache))]
        self._cache[digest] = entry

    def forget(self, changes: Changes) -> int:
        """Drop what was changed, and doubt what may have been; return how many entries that is."""
        entries: dict[bytes, _Entry] = self._cache
        if changes.everything:
            for digest in [digest for digest, entry in entries.items() if entry.caller is None]:
                del entries[digest]
            for entry in entries.values():
                entry.refresh_at = entry.fresh_until = 0.0
        named = [digest for digest in changes.digests if digest in entries]
        if changes.ids or changes.users:
            named += [
                digest
                for digest, entry in entries.items()
                if entry.caller is not None and changes.name(entry.caller.principal)
            ]
        for digest in named:
            entries.pop(digest, None)
        return len(entries) if changes.everything else len(named)

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


@dataclass(slots=True, eq=False)
class _LookUp:
    """A look-up under way; `outdated` when a change arrived that its answer may not know of."""

    task: "asyncio.Task[_Entry]"
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
        self.outage = ""
        self.counts = CacheCounts()
        store.changed = self.forget
        store.outage = self._store_outage
        if tokens is not None:
            tokens.changed = self.forget

    def reconfigure(self, config: KeysConfig) -> None:
        """Take over new times from a reload; entries keep the times they were made with."""
        self._config = config

    def forget(self, changes: Changes) -> int:
        """Drop what a change made stale, and what is being looked up since before it; return how many were known."""
        for digest, look_up in self._look_ups.items():
            entry = self._known.peek(digest)
            principal = entry.caller.principal if entry is not None and entry.caller is not None else None
            look_up.outdated = look_up.outdated or changes.concern(digest, principal)
        self._unknown.forget(changes)
        return self._known.forget(changes)

    def recall(self, credential: Credential) -> Caller | None:
        """Return the caller of a credential that is in the cache, None when `authenticate` has to look it up.

        Raises: `Unauthenticated`, `OutOfQuota`.
        """
        caller = self._cached(credential)
        if caller is not None:
            caller.check_state(self._wall())
        return caller

    async def authenticate(self, credential: Credential) -> Caller:
        """Return the caller of a credential, from the cache or by a look-up.

        Raises: `Unauthenticated`, `OutOfQuota`, `KeyStoreUnavailable`; a store's failure is never "unknown".
        """
        caller = self._cached(credential)
        if caller is None:
            entry = await asyncio.shield(self._look_up(credential))
            caller = entry.caller
            if caller is None:
                raise _invalid_key(entry.message)
        caller.check_state(self._wall())
        return caller

    def _cached(self, credential: Credential) -> Caller | None:
        """Return the caller of a credential that the cache can answer for now, None when it has to be looked up.

        Raises: `Unauthenticated` for one that is known to be unknown.
        """
        digest = credential.digest
        entry = self._known.peek(digest)
        if entry is not None:
            now = self._clock()
            if now < entry.refresh_at:
                self.counts.hits += 1
                return entry.caller
            return self._ageing(credential, entry, now)
        entry = self._unknown.peek(digest)
        if entry is not None and entry.fresh_until >= self._clock():
            self.counts.negative_hits += 1
            raise _invalid_key(entry.message)
        return None

    def _ageing(self, credential: Credential, entry: _Entry, now: float) -> Caller | None:
        """Return the caller of an entry that needs a new look-up and can do without for now, else None."""
        is_fresh = now < entry.fresh_until
        if not is_fresh and not (self._breaker.is_open and now < entry.stale_until):
            return None
        if credential.digest not in self._look_ups and len(self._look_ups) < _MAX_LOOKUPS and self._breaker.admits(now):
            self._begin(credential)
        if is_fresh:
            self.counts.hits += 1
        else:
            self.counts.stale += 1
        return entry.caller

    # --- look-ups

    def _look_up(self, credential: Credential) -> "asyncio.Task[_Entry]":
        look_up = self._look_ups.get(credential.digest)
        if look_up is None:
            if len(self._look_ups) >= _MAX_LOOKUPS or not self._breaker.admits(self._clock()):
                raise unavailable()
            look_up = self._begin(credential)
        return look_up.task

    def _begin(self, credential: Credential) -> _LookUp:
        self.counts.misses += 1
        self._breaker.begin()
        digest = credential.digest
        # Owned here, not by the first who waits: whoever leaves cancels nobody else.
        task = asyncio.get_running_loop().create_task(self._prove(credential), name="key look-up")
        look_up = self._look_ups[digest] = _LookUp(task)
        task.add_done_callback(lambda done: self._proved(digest, done))
        return look_up

    def _proved(self, digest: bytes, task: "asyncio.Task[_Entry]") -> None:
        del self._look_ups[digest]
        self._breaker.abandon()
        if not task.cancelled():
            task.exception()  # seen, also when everybody who waited has left

    async def _prove(self, credential: Credential) -> _Entry:
        look_up = self._look_ups[credential.digest]
        for _ in range(_MAX_TRIES):
            look_up.outdated = False
            try:
                entry = await self._ask(credential)
            except KeyStoreUnavailable:
                self.counts.failures += 1
                known, now = self._known.peek(credential.digest), self._clock()
                if known is not None and now < known.stale_until:
                    self.counts.stale += now >= known.fresh_until
                    return known
                raise
            if not look_up.outdated:  # else a revocation arrived while the store answered: ask again
                self._keep(credential.digest, entry)
                break
        return entry

    async def _ask(self, credential: Credential) -> _Entry:
        """Return what is true of a credential now; raises `KeyStoreUnavailable`."""
        if self._tokens is not None and self._tokens.claims(credential.key):
            try:
                principal = await self._tokens.verify(credential.key)
            except TokenRefused as refused:
                return self._refusal(str(refused))
            state = await self._ask_store(self._store.look_up_user(principal.user))
            principal = replace(principal, suspended=state.suspended, out_of_quota=state.out_of_quota)
            return self._entry(principal, float("inf"))  # what was signed stays so until it expires
        found: Principal | None = None
        if len(credential.key) <= _MAX_KEY_LENGTH:
            found = await self._ask_store(self._store.look_up(credential.digest, credential.key))
        return self._refusal("") if found is None else self._entry(found, self._config.cache_ttl_s)

    async def _ask_store(self, question: Coroutine[Any, Any, T]) -> T:
        """Return the store's answer within its time, and let the breaker know how it went."""
        try:
            async with asyncio.timeout(self._config.store_timeout_s):
                answer = await question
        except (TimeoutError, KeyStoreUnavailable) as error:
            self._breaker.fail(self._clock())
            if self._breaker.is_open:
                timed_out = isinstance(error, TimeoutError)
                reason = f"no answer within {self._config.store_timeout_s:g} s" if timed_out else str(error.__cause__)
                self._store_outage(reason)
            raise (unavailable() if isinstance(error, TimeoutError) else error) from None
        if self._breaker.is_open:
            self._store_outage("")
        self._breaker.reset()
        return answer

    def _store_outage(self, reason: str) -> None:
        """Tell once when the store goes, and once when it is back."""
        if bool(reason) != bool(self.outage):
            if reason:
                _log.error("key store is unavailable: %s", reason)
            else:
                _log.warning("key store answers again")
        self.outage = reason
        if not reason:
            self._breaker.reset()

    def _refusal(self, message: str) -> _Entry:
        until = self._clock() + self._config.negative_ttl_s
        return _Entry(None, until, until, until, message)

    def _entry(self, principal: Principal, ttl_s: float) -> _Entry:
        """Return the entry of a record; one that lets nobody in is asked for again as soon as an unknown key."""
        config, now, left_s = self._config, self._clock(), float("inf")
        if principal.expires_at is not None:
            left_s = principal.expires_at - self._wall()
        usable = principal.enabled and not principal.suspended and not principal.out_of_quota and left_s > 0
        ttl_s = min(ttl_s, left_s) if usable else min(config.negative_ttl_s, config.cache_ttl_s)
        fresh_until = now + ttl_s
        return _Entry(Caller(principal), now + ttl_s * _REFRESH_SHARE, fresh_until, fresh_until + config.stale_for_s)

    def _keep(self, digest: bytes, entry: _Entry) -> None:
        if entry.caller is None:
            self._known.forget(Changes(frozenset((digest,))))
            self._unknown.put(digest, entry)
        else:
            self._known.put(digest, entry)

    async def close(self) -> None:
        """End the look-ups that run."""
        tasks = [look_up.task for look_up in self._look_ups.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
