"""The administering side of a key store in Redis or Valkey. Synchronous, as that of the embedded store.

Beside what serves (`redis.py`) there are: `edge:id:ID`, the digest of a key in hex; the sorted sets `edge:ids` and
`edge:ids:USER`, ids by when their keys were made; `edge:revoked:ID`, what `edge:key:DIGEST` was; the hash `edge:used`,
Unix seconds by id; the stream `edge:audit`; and for a day `edge:request:SHA256`, of a request that may come again. So
keys are found by id and listed by user without a search. A key that is recorded by hand stands in no index until
`edge keys init` puts it there. In a Cluster the names begin with `{edge}:`.

Each change is a transaction that begins anew when another overtakes it: https://valkey.io/topics/transactions/
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Final, Self, TypeVar, Unpack

import orjson

from edge.config.process_settings import KeysConfig
from edge.config.redis_urls import names_at
from edge.errors import Unusable
from edge.keys.revocations import CHANNEL
from edge.keys.stores import administration as admin
from edge.keys.stores.administration import (
    Actor,
    Idempotency,
    KeyChanges,
    KeyOptions,
    KeyRecord,
    UnknownKey,
    UserMarks,
)
from edge.keys.stores.protocol import UserState, hash_key
from edge.keys.stores.records import principal_of, user_state_of
from edge.keys.stores.redis import EMPTY, FORMAT, KEY_PREFIX, MARKER, USER_PREFIX, flags_of, record_of
from edge.valkey import connect_blocking, reason_of

_ID: Final = "edge:id:"
_IDS: Final = "edge:ids"
_REVOKED: Final = "edge:revoked:"
_USED: Final = "edge:used"
_AUDIT: Final = "edge:audit"
_REQUEST: Final = "edge:request:"
_OF_A_NEW_KEY: Final = ("id", "user", "name", "allow", "deny", "expires_at", "limit", "share", "created_at")
_A_STEP: Final = 500  # keys that are read at once
_SCAN_COUNT: Final = 1000

T = TypeVar("T")
Facts = Mapping[str, str]


class RedisRegistry:
    """A `Registry` over a Redis; raises `Unusable` for one that fails or is of another format.

    The first key marks the store if the registry `makes` one: else a Redis that came back empty would be taken for
    whole. `is_marked` says after `create` whether it is. Without a mark nobody knows whether all keys are there.
    """

    def __init__(self, config: KeysConfig, actor: Actor | None = None, *, makes: bool = True) -> None:
        self._config = config
        self._at = names_at(config.store.url)
        self._makes = makes
        self._actor = actor or admin.this_process()
        self.is_marked = False

    def __enter__(self) -> Self:
        # Any: its types are those of two clients, and of text and bytes.
        self._client: Any = connect_blocking(
            self._config.store.url, self._config.store_timeout_s, self._config.store_ca_file
        )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._client.close()

    # --- keys

    def create(
        self,
        user: str,
        name: str = "",
        *,
        idempotency: Idempotency | None = None,
        now: Callable[[], float] = time.time,
        **options: Unpack[KeyOptions],
    ) -> tuple[str, KeyRecord]:
        """Make a key, the first one with the mark; return it and its record. Raises as `Registry.create` does."""

        def create(pipe: Any) -> tuple[str, KeyRecord]:
            if idempotency is not None and (known := self._replay(pipe, idempotency)):
                return known
            mark = self._mark()
            is_first = mark is None and not self._has_keys()
            salt, drawn = admin.draw(idempotency)
            key, record = admin.new_key(user, name, now=now, key=drawn, **options)
            pipe.multi()
            self._insert(pipe, key, record, idempotency, salt)
            self._note(pipe, "create", record.user, record.id, admin.facts_of(record))
            if is_first:
                pipe.set(self._at(MARKER), FORMAT, nx=True)
            self.is_marked = is_first or mark is not None
            return key, record

        key, made = self._change(create, *self._watched(idempotency))
        return key, self._with_state(made)

    def rotate(self, key_id: str, grace_s: float, *, idempotency: Idempotency | None = None) -> tuple[str, KeyRecord]:
        """Make a key like another, which ends `grace_s` from now; raises as `Registry.rotate` does."""
        now = time.time()

        def rotate(pipe: Any) -> tuple[str, KeyRecord]:
            if idempotency is not None and (known := self._replay(pipe, idempotency)):
                return known
            digest, old = self._find(pipe, key_id)
            salt, drawn = admin.draw(idempotency)
            key, record = admin.successor(old, now, drawn)
            ends_at = admin.end_of(old, now, grace_s)
            pipe.multi()
            self._insert(pipe, key, record, idempotency, salt)
            pipe.hset(self._at(KEY_PREFIX + digest), mapping={"expires_at": str(ends_at), "replaced_by": record.id})
            self._note(pipe, "rotate", old.user, key_id, {"replaced_by": record.id, "expires_at": ends_at})
            pipe.publish(CHANNEL, f"digest:{digest}")
            return key, record

        key, made = self._change(rotate, *self._watched(idempotency))
        return key, self._with_state(made)

    def find(self, key_id: str) -> KeyRecord:
        """Return a key, also a revoked one; raises `UnknownKey`."""
        with self._failures():
            found = self._records([key_id])
        if not found:
            raise UnknownKey(key_id)
        return found[0]

    def page(
        self, user: str | None = None, after: str | None = None, limit: int | None = None, *, revoked: bool = False
    ) -> list[KeyRecord]:
        """Return keys as `Registry.page` does; raises `UnknownKey` for an `after` that is none."""
        index = self._at(_IDS if user is None else f"{_IDS}:{user}")
        found: list[KeyRecord] = []
        with self._failures():
            at = 0
            if after is not None:
                rank = self._client.zrank(index, after)
                if rank is None:
                    raise UnknownKey(after)
                at = int(rank) + 1
            while limit is None or len(found) < limit:
                ids = [each.decode() for each in self._client.zrange(index, at, at + _A_STEP - 1)]
                if not ids:
                    break
                found += (each for each in self._records(ids) if revoked or not each.revoked)
                at += len(ids)
        return found[:limit]

    def change(self, key_id: str, **changes: Unpack[KeyChanges]) -> KeyRecord:
        """Change a key and return it; raises as `Registry.change` does."""
        admin.check_changes(changes)
        given = _facts_of(changes)

        def change(pipe: Any) -> None:
            digest, record = self._find(pipe, key_id)
            admin.check_changeable(record)
            pipe.multi()
            name = self._at(KEY_PREFIX + digest)
            if kept := {field: value for field, value in given.items() if value}:
                pipe.hset(name, mapping=kept)
            if gone := [field for field, value in given.items() if not value]:
                pipe.hdel(name, *gone)
            self._note(pipe, "change", record.user, key_id, changes)
            pipe.publish(CHANNEL, f"digest:{digest}")

        self._change(change)
        return self.find(key_id)

    def revoke(self, key_id: str) -> KeyRecord:
        """End a key for good; raises `UnknownKey`, and `RevokedKey` when that was done before."""
        now = time.time()

        def revoke(pipe: Any) -> None:
            digest, record = self._find(pipe, key_id)
            admin.check_changeable(record)
            pipe.multi()
            pipe.rename(self._at(KEY_PREFIX + digest), self._at(_REVOKED + key_id))
            pipe.hset(self._at(_REVOKED + key_id), "revoked_at", str(now))
            self._note(pipe, "revoke", record.user, key_id, {"revoked": True, "revoked_at": now})
            pipe.publish(CHANNEL, f"digest:{digest}")

        self._change(revoke)
        return self.find(key_id)

    def note_used(self, ids: Iterable[str], at: float) -> None:
        """Note that keys were used, at a time in Unix seconds."""
        names = list(ids)
        with self._failures():
            for begin in range(0, len(names), _A_STEP):
                self._client.hset(self._at(_USED), mapping=dict.fromkeys(names[begin : begin + _A_STEP], str(int(at))))

    # --- users

    def mark_user(self, user: str, **marks: Unpack[UserMarks]) -> int:
        """Record something of a user, for keys made later too; return how many keys there are now."""
        admin.check_user(user)

        def mark(pipe: Any) -> None:
            pipe.multi()
            if marks:
                flags = {name: str(int(bool(value))) for name, value in marks.items()}
                pipe.hset(self._at(USER_PREFIX + user), mapping=flags)
            self._note(pipe, "mark user", user, "", marks)
            pipe.publish(CHANNEL, f"user:{user}")

        self._change(mark)
        return self.find_user(user)[1]

    def find_user(self, user: str) -> tuple[UserState, int]:
        """Return what is recorded of a user, and how many keys there are."""
        admin.check_user(user)
        return self._state(user), len(self.page(user))

    # --- the store

    def init(self) -> None:
        """Say that all keys are there, or that there are to be none, and put those made by hand into the index."""
        with self._failures():
            self._mark()
            for name in self._client.scan_iter(self._at(KEY_PREFIX + "*"), _SCAN_COUNT):
                self._index(name.decode())
            commands = self._client.pipeline(transaction=True)
            commands.set(self._at(MARKER), FORMAT)
            commands.publish(CHANNEL, "all")
            commands.execute()

    def _index(self, name: str) -> None:
        facts = _decoded(self._client.hgetall(name))
        with contextlib.suppress(ValueError):  # what no edge serves is not listed either
            principal = principal_of(record_of(facts))
            digest, score = name.removeprefix(self._at(KEY_PREFIX)), _number(facts.get("created_at")) or 0.0
            commands = self._client.pipeline(transaction=True)
            commands.set(self._at(_ID + principal.id), digest)
            for index in (_IDS, f"{_IDS}:{principal.user}"):
                commands.zadd(self._at(index), {principal.id: score}, nx=True)
            commands.execute()

    def audit(self, since: float = 0.0) -> Iterator[dict[str, Any]]:
        """Yield what was changed from a time on, in its order."""
        begin = str(int(since * 1000))
        with self._failures():
            while entries := self._client.xrange(self._at(_AUDIT), begin, "+", count=_A_STEP):
                yield from (orjson.loads(fields[b"line"]) for _, fields in entries)
                begin = f"({entries[-1][0].decode()}"

    def _mark(self) -> bytes | None:
        """Return the mark, None without one; raises `Unusable` for that of another edge."""
        found: bytes | None = self._client.get(self._at(MARKER))
        if found not in (None, FORMAT.encode()):
            raise Unusable(f"keys.store: its {MARKER} names a format that this edge does not know: upgrade this edge")
        return found

    def _has_keys(self) -> bool:
        """Return whether any key or user is recorded; asked where there is no mark."""
        prefixes = (self._at(KEY_PREFIX).encode(), self._at(USER_PREFIX).encode())
        return any(name.startswith(prefixes) for name in self._client.scan_iter(self._at("edge:*"), _SCAN_COUNT))

    # --- records

    def _change(self, act: Callable[[Any], T], *watched: str) -> T:
        """Do a change, again while another overtakes it; `act` reads, calls `multi`, and says what is to be done."""
        with self._failures():
            if not self._makes and self._mark() is None:
                raise Unusable(f"keys.store: {EMPTY.replace(MARKER, self._at(MARKER))}")
            done: T = self._client.transaction(act, *watched, value_from_callable=True)
        return done

    def _find(self, pipe: Any, key_id: str) -> tuple[str, KeyRecord]:
        """Return the digest of a key in hex and its record, watched for changes; raises `UnknownKey`."""
        pipe.watch(self._at(_ID + key_id))
        digest = pipe.get(self._at(_ID + key_id))
        if digest is not None:
            pipe.watch(self._at(KEY_PREFIX + digest.decode()))
        found = self._records([key_id])
        if digest is None or not found:
            raise UnknownKey(key_id)
        return digest.decode(), found[0]

    def _records(self, ids: Sequence[str]) -> list[KeyRecord]:
        """Return the keys of ids, without those that there are not."""
        digests = self._client.mget([self._at(_ID + each) for each in ids])
        commands = self._client.pipeline(transaction=False)
        for key_id, digest in zip(ids, digests, strict=True):
            commands.hgetall(self._at(KEY_PREFIX + (digest or b"").decode()))
            commands.hgetall(self._at(_REVOKED + key_id))
        commands.hmget(self._at(_USED), list(ids))
        *hashes, used = commands.execute()
        known = [(_decoded(hashes[at]), _decoded(hashes[at + 1])) for at in range(0, len(hashes), 2)]
        users = sorted({(live or gone).get("user", "") for live, gone in known})
        commands = self._client.pipeline(transaction=False)
        for user in users:
            commands.hgetall(self._at(USER_PREFIX + user))
        states = dict(zip(users, map(_decoded, commands.execute()), strict=True))
        return [
            _record(live or gone, states[(live or gone).get("user", "")], last, revoked=not live)
            for (live, gone), last in zip(known, used, strict=True)
            if live or gone
        ]

    def _state(self, user: str) -> UserState:
        with self._failures():
            return _user_state(_decoded(self._client.hgetall(self._at(USER_PREFIX + user))))

    def _with_state(self, record: KeyRecord) -> KeyRecord:
        state = self._state(record.user)
        return dataclasses.replace(record, suspended=state.suspended, out_of_quota=state.out_of_quota)

    def _insert(self, pipe: Any, key: str, record: KeyRecord, idempotency: Idempotency | None, salt: bytes) -> None:
        digest = hash_key(key).hex()
        facts = _facts_of({name: getattr(record, name) for name in _OF_A_NEW_KEY})
        pipe.hset(self._at(KEY_PREFIX + digest), mapping={name: value for name, value in facts.items() if value})
        pipe.set(self._at(_ID + record.id), digest)
        for index in (_IDS, f"{_IDS}:{record.user}"):
            pipe.zadd(self._at(index), {record.id: record.created_at or 0.0})
        if idempotency is not None:
            known = {"request": idempotency.request, "salt": salt, "id": record.id, "digest": digest}
            pipe.hset(self._request(idempotency), mapping=known)
            pipe.expire(self._request(idempotency), admin.IDEMPOTENT_S)
        pipe.publish(CHANNEL, f"digest:{digest}")

    def _watched(self, idempotency: Idempotency | None) -> tuple[str, ...]:
        return () if idempotency is None else (self._request(idempotency),)

    def _request(self, idempotency: Idempotency) -> str:
        return self._at(_REQUEST + idempotency.name.hex())

    def _replay(self, pipe: Any, idempotency: Idempotency) -> tuple[str, KeyRecord] | None:
        """Return what a request got when it came first, None when it did not; raises `IdempotencyReused`."""
        known = pipe.hgetall(self._request(idempotency))
        if not known:
            return None
        found = self._records([known[b"id"].decode()])
        if not found:
            return None
        key, digest = idempotency.key(known[b"salt"]), bytes.fromhex(known[b"digest"].decode())
        return admin.replayed(found[0], idempotency, known[b"request"], key, digest)

    def _note(self, pipe: Any, action: str, user: str, key_id: str, changed: Mapping[str, Any]) -> None:
        line = admin.audit_line(self._actor, action, time.time(), user, key_id, changed)
        pipe.xadd(self._at(_AUDIT), {"line": line})

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        """Turn what the client raises into `Unusable`, which repeats no command."""
        from redis.exceptions import RedisError

        try:
            yield
        except (RedisError, OSError) as error:
            raise Unusable(f"keys.store cannot be used: {reason_of(error)}") from None


def _decoded(facts: Mapping[bytes, bytes]) -> dict[str, str]:
    return {name.decode("utf-8", "replace"): value.decode("utf-8", "replace") for name, value in facts.items()}


def _facts_of(values: Mapping[str, Any]) -> dict[str, str]:
    """Return values as a hash has them, "" for what it has not."""
    facts = {}
    for name, value in values.items():
        if isinstance(value, bool):
            facts[name] = str(int(value))
        elif isinstance(value, str):
            facts[name] = value
        elif isinstance(value, int):
            facts[name] = str(value)
        else:
            facts[name] = "" if value is None else str(value) if isinstance(value, float) else " ".join(value)
    return facts


def _number(text: str | None) -> float | None:
    with contextlib.suppress(TypeError, ValueError):
        return float(text or "")
    return None


def _user_state(facts: Facts) -> UserState:
    try:
        return user_state_of(flags_of(facts, "suspended", "out_of_quota"))
    except ValueError as error:
        raise Unusable(f"keys.store: a user's record has {error}: correct it by hand") from None


def _record(facts: Facts, user: Facts, last_used: bytes | None, *, revoked: bool) -> KeyRecord:
    try:
        principal = principal_of(record_of(facts))
    except ValueError as error:
        raise Unusable(f"keys.store: a key's record has {error}: correct it by hand") from None
    return KeyRecord(
        **(dataclasses.asdict(principal) | dataclasses.asdict(_user_state(user))),
        created_at=_number(facts.get("created_at")),
        last_used_at=_number((last_used or b"").decode()),
        revoked=revoked,
        revoked_at=_number(facts.get("revoked_at")),
        replaced_by=facts.get("replaced_by"),
    )
