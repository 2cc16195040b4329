"""Who calls: the credential a request shows, the cached look-up that proves it, and what its owner may call.

The cache is aiocache's memory cache, bounded, keyed by the SHA-256 of the key (never the key). Its hot path is one dict
look-up: aiocache's own `get` passes through four decorators and costs 8 us, a tenth of a whole request.
"""

import asyncio
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

from aiocache import SimpleMemoryCache
from multidict import istr

from edge.config import KeysConfig
from edge.errors import (
    InvalidRequest,
    KeyStoreUnavailable,
    ModelNotFound,
    OutOfQuota,
    PermissionDenied,
    Unauthenticated,
)
from edge.exchange import Principal
from edge.keystores import Changes, KeyStore

_KEY = re.compile(r"[\x21-\x7e]{8,512}")
_MAX_LOOKUPS: Final = 1000  # different unknown keys asked of the store at once; a flood of more is told to come back
_MAX_VERDICTS: Final = 256  # models remembered per key
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


def credential_of(headers: Headers) -> str:
    """Return the key a request shows as `Authorization: Bearer`, `api-key` or `x-api-key` (RFC 6750 section 2.1).

    Raises: `Unauthenticated` for none or a malformed one, `InvalidRequest` for two different ones.
    """
    values = headers.getall(_AUTHORIZATION, _NO_VALUES)
    if len(values) == 1 and _API_KEY not in headers and _X_API_KEY not in headers:
        key = _bearer(values[0])
    else:
        key = _only_key(headers, values)
    if not _KEY.fullmatch(key):
        raise _invalid_key()
    return key


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


def _invalid_key() -> Unauthenticated:
    return Unauthenticated(
        "Incorrect API key provided. Check the key, or make a new one at the platform.",
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
    """A look-up's answer: None is "unknown"; `fresh_until` and `stale_until` are seconds of the loop's clock."""

    caller: Caller | None
    fresh_until: float
    stale_until: float


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

    def forget(self, changes: Changes) -> None:
        """Drop what a change made stale."""
        if changes.everything:
            self._cache.clear()
        for digest in changes.digests:
            self._cache.pop(digest, None)

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


class Authenticator:
    """Proves credentials through the cache: one look-up in flight per key, however many wait for it."""

    def __init__(
        self, config: KeysConfig, store: KeyStore, clock: Callable[[], float], wall: Callable[[], float]
    ) -> None:
        self._config = config
        self._store = store
        self._clock = clock
        self._wall = wall
        self._known = KeyCache(config.cache_entries)
        self._unknown = KeyCache(config.cache_entries)
        self._lookups: dict[bytes, asyncio.Task[Caller | None]] = {}
        self._epoch = 0
        self.counts = CacheCounts()
        store.changed = self.forget

    def reconfigure(self, config: KeysConfig) -> None:
        """Take over new times from a reload; entries keep the times they were made with."""
        self._config = config

    def forget(self, changes: Changes) -> None:
        """Drop what a change made stale, and what is being looked up since before it."""
        self._epoch += 1
        self._known.forget(changes)
        self._unknown.forget(changes)

    def _cached(self, digest: bytes) -> Caller | None:
        """Return the caller of a key that is in the cache and fresh, None when it has to be looked up.

        Raises: `Unauthenticated` for a key that is known to be unknown.
        """
        entry = self._known.peek(digest)
        if entry is not None:
            if entry.fresh_until < self._clock():
                return None
            self.counts.hits += 1
            return entry.caller
        entry = self._unknown.peek(digest)
        if entry is not None and entry.fresh_until >= self._clock():
            self.counts.negative_hits += 1
            raise _invalid_key()
        return None

    def recall(self, digest: bytes) -> Caller | None:
        """Return the caller of a key that is in the cache, None when `authenticate` has to look it up.

        Raises: `Unauthenticated`, `OutOfQuota`.
        """
        caller = self._cached(digest)
        if caller is not None:
            caller.check_state(self._wall())
        return caller

    async def authenticate(self, digest: bytes) -> Caller:
        """Return the caller of a key by its digest, from the cache or the store.

        Raises: `Unauthenticated`, `OutOfQuota`, `KeyStoreUnavailable`; a store's failure is never "unknown".
        """
        caller = self._cached(digest) or await asyncio.shield(self._look_up(digest))
        if caller is None:
            raise _invalid_key()
        caller.check_state(self._wall())
        return caller

    def _look_up(self, digest: bytes) -> "asyncio.Task[Caller | None]":
        task = self._lookups.get(digest)
        if task is None:
            if len(self._lookups) >= _MAX_LOOKUPS:
                raise KeyStoreUnavailable(
                    "API keys cannot be checked right now, try again in a moment.", retry_after_s=1
                )
            self.counts.misses += 1
            # Owned here, not by the first who waits: whoever leaves cancels nobody else.
            task = asyncio.get_running_loop().create_task(self._ask_store(digest), name="key look-up")
            self._lookups[digest] = task
            task.add_done_callback(lambda done: self._looked_up(digest, done))
        return task

    def _looked_up(self, digest: bytes, task: "asyncio.Task[Caller | None]") -> None:
        del self._lookups[digest]
        if not task.cancelled():
            task.exception()  # seen, also when everybody who waited has left

    async def _ask_store(self, digest: bytes) -> Caller | None:
        stale = self._known.peek(digest)
        while True:
            epoch = self._epoch
            try:
                principal = await self._store.look_up(digest)
            except KeyStoreUnavailable:
                self.counts.failures += 1
                stale = self._known.peek(digest) or stale
                if stale is not None and stale.stale_until >= self._clock() and epoch == self._epoch:
                    self.counts.stale += 1
                    return stale.caller
                raise
            if epoch == self._epoch:  # else a revocation arrived while the store answered: ask again
                return self._keep(digest, principal)

    def _keep(self, digest: bytes, principal: Principal | None) -> Caller | None:
        now = self._clock()
        if principal is None:
            self._known.forget(Changes(frozenset((digest,))))
            self._unknown.put(digest, _Entry(None, now + self._config.negative_ttl_s, 0.0))
            return None
        caller = Caller(principal)
        fresh_until = now + self._config.cache_ttl_s
        self._known.put(digest, _Entry(caller, fresh_until, fresh_until + self._config.stale_for_s))
        return caller

    async def close(self) -> None:
        """End the look-ups that run."""
        tasks = list(self._lookups.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
