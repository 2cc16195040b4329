"""The administering side of the embedded key store: all that writes to its file. Synchronous, for commands."""

import builtins
import contextlib
import dataclasses
import re
import secrets
import sqlite3
import string
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal, Self

from edge.config.values import seconds
from edge.exchange import Principal
from edge.keys.stores import keyfile
from edge.keys.stores.keyfile import KeyFileBusy, KeyFileError, key_file_errors, number
from edge.keys.stores.protocol import hash_key
from edge.keys.stores.records import principal_of
from edge.names import check_pattern, is_dns_label

_KEY_ALPHABET: Final = string.ascii_letters + string.digits + "_-"
_KEY_LENGTH: Final = 45  # choices out of 64: 270 random bits
_ID_ALPHABET: Final = string.ascii_lowercase + string.digits
_ID = re.compile(r"key_[a-z0-9]{12}")
_LONGEST_LIFETIME_S: Final = 100 * 365 * 86_400  # a later date is a slip of the pen, and soon one no clock can print
_END_OF_CALENDAR_S: Final = 253_402_300_800  # the year 10000, which RFC 3339 cannot write


class UnknownKey(ValueError):
    """No key has this id."""

    def __init__(self, key_id: str) -> None:
        if _ID.fullmatch(key_id):
            message = f"no key has the id {key_id}: `edge keys list` shows those that exist"
        else:  # not repeated: it may be the key itself
            message = "this is not the id of a key: an id is key_ and 12 characters, see `edge keys list`"
        super().__init__(message)


class RevokedKey(ValueError):
    """The key was revoked, which is for good."""

    def __init__(self, key_id: str) -> None:
        super().__init__(f"{key_id} is revoked and stays so: create a new key for this user")


@dataclass(frozen=True, slots=True)
class KeyRecord(Principal):
    """A key as its administrator sees it: the record of a look-up and when the key was made (Unix seconds)."""

    created_at: float = field(kw_only=True)

    def as_json(self) -> dict[str, Any]:
        """Return the record for JSON: its fields in order, times as RFC 3339 in UTC or None."""
        expires_at = None if self.expires_at is None else _rfc3339(self.expires_at)
        return {**dataclasses.asdict(self), "expires_at": expires_at, "created_at": _rfc3339(self.created_at)}


class KeyRegistry:
    """Creates, lists and changes keys; a context manager, safe beside other processes.

    A missing file is made if it `makes` one: else it would stand for a store whose keys are all gone. Every method
    raises `KeyFileError` when the file cannot be used, `KeyFileBusy` when it stays locked for `busy_timeout_s`.
    """

    def __init__(self, path: Path, busy_timeout_s: float = 5.0, *, makes: bool = True) -> None:
        self._path = path
        self._makes = makes
        self._busy_timeout_s = busy_timeout_s

    def __enter__(self) -> Self:
        with key_file_errors(self._path):
            if self._makes:
                keyfile.make_file(self._path)
            else:
                keyfile.find_file(self._path)
            blank: Literal["set up", "refuse"] = "set up" if self._makes else "refuse"
            self._connection = keyfile.connect(self._path, self._busy_timeout_s, blank=blank)
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def create(
        self,
        user: str,
        name: str = "",
        allow: Sequence[str] = (),
        deny: Sequence[str] = (),
        expires_in_s: float | None = None,
        limit: str | None = None,
        now: Callable[[], float] = time.time,
    ) -> tuple[str, KeyRecord]:
        """Make a key for a user and return it with its record; the key itself is kept nowhere.

        Raises: `ValueError` as `new_key` does.
        """
        key, record = new_key(user, name, allow, deny, expires_in_s, limit, now)
        with self._write() as revision:
            row = {
                **{"id": record.id, "digest": hash_key(key), "user": user, "name": name, "limit_name": limit},
                **{"allow": " ".join(allow), "deny": " ".join(deny), "expires_at": record.expires_at},
                **{"created_at": record.created_at, "revision": revision},
            }
            self._connection.execute(f"INSERT INTO keys ({', '.join(row)}) VALUES (:{', :'.join(row)})", row)
            made = self._connection.execute(keyfile.SELECT_RECORD + "AND keys.id = ?", (record.id,)).fetchone()
        return key, self._record(made)

    def list(self) -> builtins.list[KeyRecord]:
        """Return the keys that are not revoked, in the order they were created."""
        with key_file_errors(self._path):
            rows = self._connection.execute(keyfile.SELECT_RECORD + "ORDER BY keys.rowid").fetchall()
        return [self._record(row) for row in rows]

    def revoke(self, key_id: str) -> None:
        """End a key for good; raises `UnknownKey`, and `RevokedKey` when that was done before."""
        self._change_key(key_id, "revoked", True)

    def enable(self, key_id: str) -> None:
        """Let a disabled key work again; raises `UnknownKey` or `RevokedKey`."""
        self._change_key(key_id, "enabled", True)

    def disable(self, key_id: str) -> None:
        """Stop a key until it is enabled; raises `UnknownKey` or `RevokedKey`."""
        self._change_key(key_id, "enabled", False)

    def disable_user(self, user: str) -> int:
        """Suspend a user: all keys, later ones too; return how many there are now, 0 may be a misspelt user."""
        return self._change_user(user, "suspended", True)

    def enable_user(self, user: str) -> int:
        """End the suspension of a user; return how many keys there are."""
        return self._change_user(user, "suspended", False)

    def set_out_of_quota(self, user: str, out_of_quota: bool) -> int:
        """Record whether a user has used up what was paid; return how many keys there are.

        The store keeps no balances: whoever does calls this.
        """
        return self._change_user(user, "out_of_quota", out_of_quota)

    def _change_key(self, key_id: str, column: str, value: bool) -> None:
        with self._write() as revision:
            row = self._connection.execute("SELECT revoked FROM keys WHERE id = ?", (key_id,)).fetchone()
            if row is None:
                raise UnknownKey(key_id)
            if row[0]:
                raise RevokedKey(key_id)
            self._connection.execute(
                f"UPDATE keys SET {column} = ?, revision = ? WHERE id = ?", (value, revision, key_id)
            )

    def _change_user(self, user: str, column: str, value: bool) -> int:
        _check_user(user)
        with self._write() as revision:
            self._connection.execute(
                f"INSERT INTO users (user, {column}, revision) VALUES (:user, :value, :revision)"
                f" ON CONFLICT (user) DO UPDATE SET {column} = :value, revision = :revision",
                {"user": user, "value": value, "revision": revision},
            )
            count = self._connection.execute("SELECT count(*) FROM keys WHERE user = ? AND NOT revoked", (user,))
            return int(count.fetchone()[0])

    def _record(self, row: Sequence[Any]) -> KeyRecord:
        """Return the record of a row of `SELECT_RECORD`; only a hand at the tables writes what it has to refuse."""
        created_at = row[-1]
        try:
            principal = principal_of(keyfile.record_of(row))
            for moment in (created_at, principal.expires_at or 0.0):
                if not isinstance(moment, float) or not 0 <= moment < _END_OF_CALENDAR_S:
                    raise ValueError("something else than a time in Unix seconds")
        except ValueError as error:
            where = f"{self._path}: the row of the key {row[0]!r}"
            raise KeyFileError(f"{where} has {error}: correct it with sqlite3") from None
        return KeyRecord(**dataclasses.asdict(principal), created_at=created_at)

    @contextlib.contextmanager
    def _write(self) -> Iterator[int]:
        """Hold the file's write lock for one change and yield the revision that the change makes."""
        with key_file_errors(self._path), keyfile.transaction(self._connection, "IMMEDIATE"):
            yield number(self._connection, keyfile.REVISION) + 1
        keyfile.empty_wal(self._connection)


def new_key(
    user: str,
    name: str = "",
    allow: Sequence[str] = (),
    deny: Sequence[str] = (),
    expires_in_s: float | None = None,
    limit: str | None = None,
    now: Callable[[], float] = time.time,
) -> tuple[str, KeyRecord]:
    """Return a key and its record, which stand nowhere yet.

    Raises `ValueError` for a user that is no DNS label, a wrong pattern, or a lifetime out of range.
    """
    _check_user(user)
    if not name.isprintable():
        raise ValueError("a key's name is one line of printable characters")
    for pattern in (*allow, *deny):
        check_pattern(pattern)
    if expires_in_s is not None and not 0 < expires_in_s <= _LONGEST_LIFETIME_S:
        raise ValueError("a key lives for more than 0 s and at most 100 years: leave out --expires for one without end")
    created_at = now()
    record = KeyRecord(
        "key_" + _random(_ID_ALPHABET, 12),
        user,
        name,
        tuple(allow),
        tuple(deny),
        expires_at=None if expires_in_s is None else created_at + expires_in_s,
        limit=limit,
        created_at=created_at,
    )
    return "sk-" + _random(_KEY_ALPHABET, _KEY_LENGTH), record


def parse_lifetime(text: str) -> float:
    """Return the seconds of a lifetime such as `30d`, at least 1 and whole; raises `ValueError`."""
    lifetime_s = seconds(text, longest_s=_LONGEST_LIFETIME_S)
    if lifetime_s < 1 or lifetime_s % 1:
        raise ValueError(f'{text!r} is not a lifetime: write whole seconds, one or more, such as "90s" or "30d"')
    return lifetime_s


def restore(path: Path, backup: Path, busy_timeout_s: float = 5.0) -> tuple[int, int]:
    """Put all that a backup holds in the place of all that the key store holds; return how many keys and users.

    It is one commit, which every running edge notices as a change of everything; a missing file is made. Raises
    `KeyFileError`, and changes nothing, when the backup is damaged, no key store or of a newer edge, or when the key
    store cannot be written.

    Source: https://www.sqlite.org/backup.html
    """
    with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as copy:
        try:
            users = _read_backup(backup, copy)
        except sqlite3.Error as error:
            raise KeyFileError(f"{backup} is no backup of a key store ({error}): name another file") from error
        with key_file_errors(path):
            keyfile.make_file(path)
            with contextlib.closing(keyfile.connect(path, busy_timeout_s, blank="leave")) as connection:
                _copy(copy, connection, path)
                keyfile.empty_wal(connection)
    return len(users), len(set(users))


def _read_backup(backup: Path, copy: sqlite3.Connection) -> builtins.list[str]:
    """Fill an empty database with a backup, proved and of this edge's version; return the user of each key in it."""
    # Commits may still stand beside the file; where none do, it is read without the side files that SQLite would leave.
    is_alone = not any(Path(f"{backup.absolute()}{suffix}").exists() for suffix in ("-wal", "-journal"))
    address = f"{backup.absolute().as_uri()}?mode=ro{'&immutable=1' if is_alone else ''}"
    with contextlib.closing(sqlite3.connect(address, uri=True)) as source:
        _copy(source, copy, backup)
    if not keyfile.known_version(copy, backup):
        raise sqlite3.DatabaseError("it has no schema version")
    (verdict,) = copy.execute("PRAGMA integrity_check(1)").fetchone()
    if verdict != "ok":
        raise sqlite3.DatabaseError(verdict)
    keyfile.migrate(copy)
    number(copy, keyfile.REVISION)
    return [keyfile.record_of(row)["user"] for row in copy.execute(keyfile.SELECT_RECORD)]


def _copy(source: sqlite3.Connection, target: sqlite3.Connection, path: Path) -> None:
    """Copy a database at once; raises `KeyFileBusy` where the module would wait for ever for who holds `path`."""

    def progress(status: int, remaining: int, total: int) -> None:
        if status & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise KeyFileBusy(path)

    source.backup(target, progress=progress)


def _check_user(user: str) -> None:
    if not is_dns_label(user):
        raise ValueError(
            "a user is a DNS label such as u-1100a15812cc: 1 to 63 of a-z, 0-9 and -, with no - at either end"
        )


def _random(alphabet: str, length: int) -> str:
    return "".join(secrets.choice(alphabet) for _ in range(length))


def _rfc3339(unix_s: float) -> str:
    return datetime.fromtimestamp(unix_s, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
