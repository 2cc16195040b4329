"""The administering side of the embedded key store: all that writes to its file but a backup. Synchronous."""

import builtins
import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, Unpack

import orjson

from edge.keys.stores import administration as admin
from edge.keys.stores import keyfile
from edge.keys.stores.administration import (
    Actor,
    Idempotency,
    KeyChanges,
    KeyOptions,
    KeyRecord,
    UnknownKey,
    UserMarks,
)
from edge.keys.stores.keyfile import KeptConnection, KeyFileError, key_file_errors, number
from edge.keys.stores.protocol import UserState, hash_key
from edge.keys.stores.records import principal_of

_END_OF_CALENDAR_S: Final = 253_402_300_800  # the year 10000, which RFC 3339 cannot write
_USES_AT_ONCE: Final = 1000  # in one transaction: who creates a key waits for it


class KeyRegistry:
    """A `Registry` over the embedded file, safe beside other processes; its lines of the audit name the `actor`.

    A missing file is made if it `makes` one: else it would stand for a store whose keys are all gone. Every method
    raises `KeyFileError` when the file cannot be used, `KeyFileBusy` when it stays locked for `busy_timeout_s`.
    Over a `kept` connection it opens none and makes no file; a failure of the file closes that.
    """

    def __init__(
        self,
        path: Path,
        busy_timeout_s: float = 5.0,
        *,
        makes: bool = True,
        actor: Actor | None = None,
        kept: KeptConnection | None = None,
    ) -> None:
        self._path = path
        self._makes = makes
        self._busy_timeout_s = busy_timeout_s
        self._actor = actor or admin.this_process()
        self._kept = kept

    def __enter__(self) -> Self:
        with key_file_errors(self._path):
            if self._kept is None:
                self._connection, _ = keyfile.open_file(self._path, self._busy_timeout_s, makes=self._makes)
            else:
                self._connection = self._kept.open()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._kept is None:
            self._connection.close()
        elif isinstance(error, KeyFileError):
            self._kept.close()

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
        """Make a key for a user and return it with its record; the key itself is kept nowhere.

        Raises: `ValueError` as `new_key` does, `IdempotencyReused`.
        """
        with self._write() as revision:
            if idempotency is not None and (known := self._replay(idempotency)):
                return known
            salt, drawn = admin.draw(idempotency)
            key, record = admin.new_key(user, name, now=now, key=drawn, **options)
            self._insert(key, record, revision, idempotency, salt)
            self._note("create", record.user, record.id, admin.facts_of(record))
            return key, self._find(record.id)

    def rotate(self, key_id: str, grace_s: float, *, idempotency: Idempotency | None = None) -> tuple[str, KeyRecord]:
        """Make a key like another, which ends `grace_s` from now.

        Raises: `UnknownKey`, `Unchangeable`, `IdempotencyReused`.
        """
        now = time.time()
        with self._write() as revision:
            if idempotency is not None and (known := self._replay(idempotency)):
                return known
            old = self._find(key_id)
            salt, drawn = admin.draw(idempotency)
            key, record = admin.successor(old, now, drawn)
            self._insert(key, record, revision, idempotency, salt)
            ends_at = admin.end_of(old, now, grace_s)
            self._update(key_id, revision, {"expires_at": ends_at, "replaced_by": record.id})
            self._note("rotate", old.user, key_id, {"replaced_by": record.id, "expires_at": ends_at})
            return key, self._find(record.id)

    def find(self, key_id: str) -> KeyRecord:
        """Return a key, also a revoked one; raises `UnknownKey`."""
        with key_file_errors(self._path):
            return self._find(key_id)

    def list(self) -> builtins.list[KeyRecord]:
        """Return the keys that are not revoked, in the order they were created."""
        return self.page()

    def page(
        self, user: str | None = None, after: str | None = None, limit: int | None = None, *, revoked: bool = False
    ) -> builtins.list[KeyRecord]:
        """Return keys in the order they were made: of a user, those after another, at most `limit`.

        Raises `UnknownKey` for an `after` that is none.
        """
        with key_file_errors(self._path):
            place = self._connection.execute("SELECT rowid FROM keys WHERE id = ?", (after,)).fetchone()
            if after is not None and place is None:
                raise UnknownKey(after)
            wanted = {"keys.rowid > :place": after is not None, "keys.user = :user": user is not None}
            wanted |= {"NOT keys.revoked": not revoked}
            rows = self._connection.execute(
                keyfile.SELECT_KEY
                + " AND ".join(["1", *(each for each, holds in wanted.items() if holds)])
                + " ORDER BY keys.rowid LIMIT :limit",
                {"place": place and place[0], "user": user, "limit": -1 if limit is None else limit},
            ).fetchall()
        return [self._record(row) for row in rows]

    def change(self, key_id: str, **changes: Unpack[KeyChanges]) -> KeyRecord:
        """Change a key and return it; raises `UnknownKey`, `RevokedKey`, and `ValueError` for what no key may have."""
        admin.check_changes(changes)
        return self._change("change", key_id, changes)

    def revoke(self, key_id: str) -> KeyRecord:
        """End a key for good; raises `UnknownKey`, and `RevokedKey` when that was done before."""
        return self._change("revoke", key_id, {"revoked": True, "revoked_at": time.time()})

    def note_used(self, ids: Iterable[str], at: float) -> None:
        """Note that keys were used, at a time in Unix seconds; ids of keys that there are not are passed over."""
        names = builtins.list(ids)
        for begin in range(0, len(names), _USES_AT_ONCE):
            with key_file_errors(self._path), keyfile.transaction(self._connection, "IMMEDIATE"):
                self._connection.executemany(
                    "INSERT INTO uses (id, at) SELECT id, :at FROM keys WHERE id = :id"
                    " ON CONFLICT (id) DO UPDATE SET at = max(at, excluded.at)",
                    [{"id": name, "at": at} for name in names[begin : begin + _USES_AT_ONCE]],
                )
        keyfile.empty_wal(self._connection)

    # --- users

    def mark_user(self, user: str, **marks: Unpack[UserMarks]) -> int:
        """Record something of a user, for keys made later too; return how many keys there are now."""
        admin.check_user(user)
        with self._write() as revision:
            for column, value in marks.items():
                self._connection.execute(
                    f"INSERT INTO users (user, {column}, revision) VALUES (:user, :value, :revision)"
                    f" ON CONFLICT (user) DO UPDATE SET {column} = :value, revision = :revision",
                    {"user": user, "value": value, "revision": revision},
                )
            self._note("mark user", user, "", marks)
            return self._count(user)

    def find_user(self, user: str) -> tuple[UserState, int]:
        """Return what is recorded of a user, and how many keys there are."""
        admin.check_user(user)
        with key_file_errors(self._path):
            row = self._connection.execute(keyfile.SELECT_USER, (user,)).fetchone()
            return UserState(*map(bool, row or ())), self._count(user)

    def audit(self, since: float = 0.0) -> Iterator[dict[str, Any]]:
        """Yield what was changed from a time on, in its order."""
        with key_file_errors(self._path):
            rows = self._connection.execute("SELECT line FROM audit WHERE at >= ? ORDER BY at, number", (since,))
            yield from (orjson.loads(line) for (line,) in rows)

    # --- the file

    def _change(self, action: str, key_id: str, columns: Mapping[str, Any]) -> KeyRecord:
        with self._write() as revision:
            admin.check_changeable(self._find(key_id))
            if columns:
                self._update(key_id, revision, columns)
            found = self._find(key_id)
            self._note(action, found.user, key_id, columns)
            return found

    def _insert(self, key: str, record: KeyRecord, revision: int, idempotency: Idempotency | None, salt: bytes) -> None:
        row = {
            **{"id": record.id, "digest": hash_key(key), "user": record.user, "name": record.name},
            **{"allow": " ".join(record.allow), "deny": " ".join(record.deny), "limit_name": record.limit},
            "share": record.share,
            **{"expires_at": record.expires_at, "created_at": record.created_at, "revision": revision},
        }
        self._connection.execute(f"INSERT INTO keys ({', '.join(row)}) VALUES (:{', :'.join(row)})", row)
        if idempotency is not None:
            self._connection.execute(
                "INSERT INTO requests VALUES (?, ?, ?, ?, ?)",
                (idempotency.name, idempotency.request, salt, record.id, record.created_at),
            )

    def _replay(self, idempotency: Idempotency) -> tuple[str, KeyRecord] | None:
        """Return what a request got when it came first, None when it did not; raises `IdempotencyReused`."""
        self._connection.execute("DELETE FROM requests WHERE at < ?", (time.time() - admin.IDEMPOTENT_S,))
        row = self._connection.execute(
            "SELECT request, salt, key_id, keys.digest FROM requests JOIN keys ON keys.id = key_id"
            " WHERE requests.name = ?",
            (idempotency.name,),
        ).fetchone()
        if row is None:
            return None
        request, salt, key_id, digest = row
        return admin.replayed(self._find(key_id), idempotency, request, idempotency.key(salt), digest)

    def _update(self, key_id: str, revision: int, columns: Mapping[str, Any]) -> None:
        values = {_COLUMN.get(name, name): _VALUE.get(name, _as_is)(value) for name, value in columns.items()}
        names = ", ".join(f"{name} = :{name}" for name in values)
        self._connection.execute(
            f"UPDATE keys SET {names}, revision = :revision WHERE id = :id",
            {**values, "revision": revision, "id": key_id},
        )

    def _note(self, action: str, user: str, key_id: str, changed: Mapping[str, Any]) -> None:
        now = time.time()
        line = admin.audit_line(self._actor, action, now, user, key_id, changed)
        self._connection.execute("INSERT INTO audit (at, line) VALUES (?, ?)", (now, line.decode()))

    def _count(self, user: str) -> int:
        query = "SELECT count(*) FROM keys WHERE user = ? AND NOT revoked"
        return int(self._connection.execute(query, (user,)).fetchone()[0])

    def _find(self, key_id: str) -> KeyRecord:
        row = self._connection.execute(keyfile.SELECT_KEY + "keys.id = ?", (key_id,)).fetchone()
        if row is None:
            raise UnknownKey(key_id)
        return self._record(row)

    def _record(self, row: Sequence[Any]) -> KeyRecord:
        """Return the record of a row of `SELECT_KEY`; only a hand at the tables writes what it has to refuse."""
        facts = keyfile.record_of(row)
        times = {name: facts[name] for name in ("created_at", "last_used_at", "revoked_at")}
        try:
            principal = principal_of(facts)
            for moment in (facts["created_at"], *(each or 0.0 for each in (principal.expires_at, *times.values()))):
                if not isinstance(moment, float) or not 0 <= moment < _END_OF_CALENDAR_S:
                    raise ValueError("something else than a time in Unix seconds")
        except ValueError as error:
            where = f"{self._path}: the row of the key {row[0]!r}"
            raise KeyFileError(f"{where} has {error}: correct it with sqlite3") from None
        history = {"revoked": bool(facts["revoked"]), "replaced_by": facts["replaced_by"]}
        return KeyRecord(**dataclasses.asdict(principal), **times, **history)

    @contextlib.contextmanager
    def _write(self) -> Iterator[int]:
        """Hold the file's write lock for one change and yield the revision that the change makes."""
        with key_file_errors(self._path), keyfile.transaction(self._connection, "IMMEDIATE"):
            yield number(self._connection, keyfile.REVISION) + 1
        keyfile.empty_wal(self._connection)


_COLUMN: Final = {"limit": "limit_name"}
_VALUE: Final[Mapping[str, Callable[[Any], Any]]] = {"allow": " ".join, "deny": " ".join}


def _as_is(value: Any) -> Any:
    return value
