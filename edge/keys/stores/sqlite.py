"""The embedded key store, and its administration.

It is one SQLite file with two sides. `SqliteKeyStore` serves: it only reads, in a thread of its own, and hears
within its watch interval what any other process committed. `KeyRegistry` administers: it is synchronous and all that
writes. Every write gives the rows it touches the next revision, and a revoked key stays as a row, so a reader can ask
for what changed.

Sources: https://www.sqlite.org/pragma.html#pragma_data_version, https://www.sqlite.org/wal.html,
https://www.sqlite.org/howtocorrupt.html
"""

import asyncio
import builtins
import contextlib
import dataclasses
import os
import queue
import re
import secrets
import sqlite3
import string
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from edge.errors import Unusable
from edge.exchange import Principal
from edge.keys.stores.protocol import (
    AnswerUnusable,
    Changes,
    StoreFailed,
    UserState,
    hash_key,
    ignore_changes,
    ignore_outage,
)
from edge.names import check_pattern, is_dns_label

SCHEMA_VERSION = 1

_SCHEMA = (
    """CREATE TABLE keys (
        id TEXT PRIMARY KEY,
        digest BLOB NOT NULL UNIQUE,      -- SHA-256 of the key
        user TEXT NOT NULL,
        name TEXT NOT NULL,
        allow TEXT NOT NULL,              -- patterns with one space between two
        deny TEXT NOT NULL,
        enabled INTEGER NOT NULL DEFAULT 1,
        revoked INTEGER NOT NULL DEFAULT 0,
        expires_at REAL,                  -- Unix seconds; NULL: never
        limit_name TEXT,                  -- a table of [limits]
        created_at REAL NOT NULL,         -- Unix seconds
        revision INTEGER NOT NULL
    )""",
    "CREATE INDEX keys_by_user ON keys (user)",
    "CREATE INDEX keys_by_revision ON keys (revision)",
    # Apart from the keys, so that what is said of a user holds for the keys that are created later.
    """CREATE TABLE users (
        user TEXT PRIMARY KEY,
        suspended INTEGER NOT NULL DEFAULT 0,
        out_of_quota INTEGER NOT NULL DEFAULT 0,
        revision INTEGER NOT NULL
    )""",
    "CREATE INDEX users_by_revision ON users (revision)",
)

_SELECT_RECORD = """
    SELECT keys.id, keys.user, keys.name, keys.allow, keys.deny, keys.enabled,
           coalesce(users.suspended, 0), coalesce(users.out_of_quota, 0),
           keys.expires_at, keys.limit_name, keys.created_at
    FROM keys LEFT JOIN users ON users.user = keys.user
    WHERE NOT keys.revoked
"""
_SELECT_REVISION = """
    SELECT max(coalesce((SELECT max(revision) FROM keys), 0), coalesce((SELECT max(revision) FROM users), 0))
"""
_SELECT_CHANGED = """
    SELECT digest, NULL FROM keys WHERE revision > :seen
    UNION ALL
    SELECT NULL, user FROM users WHERE revision > :seen
"""
_SELECT_USER = "SELECT suspended, out_of_quota FROM users WHERE user = ?"

_KEY_ALPHABET = string.ascii_letters + string.digits + "_-"
_KEY_LENGTH = 45  # choices out of 64: 270 random bits
_ID_ALPHABET = string.ascii_lowercase + string.digits
_ID = re.compile(r"key_[a-z0-9]{12}")
_LIFETIME = re.compile(r"([0-9]{1,9})([smhdw])")
_UNIT_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_LONGEST_LIFETIME_S = 100 * 365 * 86_400  # past this a date is a slip of the pen, and soon one that no clock can print

_END_OF_CALENDAR_S = 253_402_300_800  # the year 10000, which RFC 3339 cannot write

# In WAL mode a reader waits for no writer, only for a recovery or a file held exclusively. Requests wait with it.
_READ_BUSY_TIMEOUT_S = 0.5
_BUSY_RETRY_INTERVAL_S = 0.01
_MAX_DOUBTS = 8  # a disk may need as many looks to write a commit; who works on the tables by hand waits two seconds
_CHECKPOINT_PATIENCE_MS = 250  # readers of this package are done in a fraction of it; a backup may take minutes


class KeyFileError(Unusable):
    """The file of the embedded store cannot be used as it is; the message tells an operator what to change."""


class KeyFileBusy(KeyFileError):
    """Another process holds the file for longer than one waits."""


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
        record: dict[str, Any] = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        record["expires_at"] = None if self.expires_at is None else _rfc3339(self.expires_at)
        record["created_at"] = _rfc3339(self.created_at)
        return record


class SqliteKeyStore:
    """The serving side of the embedded store: look-ups in a thread of its own, and news of every change.

    A file that is locked, damaged or deleted makes look-ups fail until it can be read again; every watch tries, so no
    restart is needed. Only `open` creates a missing file: one that vanishes later is a fault, not an empty store.
    """

    knows_users = True

    def __init__(self, path: Path, watch_interval_s: float = 0.25) -> None:
        self.changed: Callable[[Changes], object] = ignore_changes
        self.outage: Callable[[str], None] = ignore_outage
        self._file = _KeyFile(path)
        self._watch_interval_s = watch_interval_s
        self._questions: queue.SimpleQueue[_Question | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._healthy = True

    def __repr__(self) -> str:
        state = "closed" if self._thread is None else "open" if self._healthy else "unavailable"
        return f"<SqliteKeyStore {self._file.path} {state}>"

    async def open(self) -> None:
        """Open the file, creating a missing one, and begin to watch it.

        Raises `KeyFileError` when a person must act first. A file that is merely locked is waited for by the watch.
        """
        self._loop = asyncio.get_running_loop()
        self._healthy = True
        opened: asyncio.Future[None] = self._loop.create_future()
        thread = threading.Thread(target=self._run, args=(opened,), name="edge-keystore", daemon=True)
        thread.start()
        try:
            await opened
        except asyncio.CancelledError:
            self._questions.put(None)
            raise
        self._thread = thread

    async def close(self) -> None:
        """Answer what was asked, then end the thread and close the file."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._questions.put(None)
            await asyncio.to_thread(thread.join)

    async def look_up(self, digest: bytes, key: str) -> Principal | None:
        """Return who owns the key of this SHA-256 digest, None if it is unknown or revoked.

        Raises `StoreFailed` when the file cannot be read now.
        """
        found: Principal | None = await self._ask(lambda file: file.find(digest))
        return found

    async def look_up_user(self, user: str) -> UserState:
        """Return what is recorded of a user; raises `StoreFailed` when the file cannot be read now."""
        found: UserState = await self._ask(lambda file: file.find_user(user))
        return found

    async def _ask(self, question: "Callable[[_KeyFile], Any]") -> Any:
        if self._thread is None:
            raise StoreFailed("the store is closed")
        answer: asyncio.Future[Any] = self._loop.create_future()
        self._questions.put((question, answer))
        return await answer

    # What follows runs in the thread.

    def _run(self, opened: asyncio.Future[None]) -> None:
        with contextlib.closing(self._file):
            try:
                self._file.open(create=True)
            except KeyFileBusy as error:
                self._lost(error)
            except Exception as error:
                self._post(_fail, opened, error)
                return
            self._post(_settle, opened, None)
            self._serve()

    def _serve(self) -> None:
        watch_at = time.monotonic() + self._watch_interval_s
        while True:
            with contextlib.suppress(queue.Empty):
                question = self._questions.get(timeout=max(0.0, watch_at - time.monotonic()))
                if question is None:
                    return
                self._answer(*question)
            if time.monotonic() >= watch_at:  # asked after a question too: a busy store watches as often as an idle one
                self._watch()
                watch_at = time.monotonic() + self._watch_interval_s

    def _answer(self, question: "Callable[[_KeyFile], Any]", answer: asyncio.Future[Any]) -> None:
        if not self._file.is_open:  # the next watch tries again; until then nobody queues behind it
            self._post(_fail, answer, StoreFailed("the file is not open"))
            return
        try:
            if self._file.was_replaced():
                self._reopen()
            found = question(self._file)
        except AnswerUnusable as error:  # the fault of one row is none of the file
            self._post(_fail, answer, error)
        except Exception as error:  # whatever it was, who waits must hear of it
            self._lost(error)
            self._post(_fail, answer, StoreFailed(str(error)))
        else:
            self._post(_settle, answer, found)

    def _watch(self) -> None:
        try:
            if not self._file.is_open or self._file.was_replaced():
                self._reopen()
            elif changes := self._file.changes():
                self._post(self._report, changes)
        except Exception as error:  # the watch outlives every fault of the file
            self._lost(error)

    def _reopen(self) -> None:
        self._file.open(create=False)
        if not self._healthy:
            self._healthy = True
            self._post(self._tell_outage, "")
        self._post(self._report, Changes(everything=True))

    def _lost(self, error: Exception) -> None:
        self._file.close()
        if self._healthy:
            self._healthy = False
            self._post(self._tell_outage, str(error) or type(error).__name__)

    def _post(self, callback: Callable[..., None], *arguments: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to tell
            self._loop.call_soon_threadsafe(callback, *arguments)

    def _report(self, changes: Changes) -> None:
        self.changed(changes)

    def _tell_outage(self, reason: str) -> None:
        self.outage(reason)


class KeyRegistry:
    """The administering side of the embedded store; a context manager, synchronous, safe beside other processes.

    Every method raises `KeyFileError` when the file cannot be used, `KeyFileBusy` when it stays locked for
    `busy_timeout_s`.
    """

    def __init__(self, path: Path, busy_timeout_s: float = 5.0) -> None:
        self._path = path
        self._busy_timeout_s = busy_timeout_s

    def __enter__(self) -> Self:
        with _key_file_errors(self._path):
            _make_file(self._path)
            self._connection = _connect(self._path, self._busy_timeout_s)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
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

        Raises `ValueError` for a user that is no DNS label, a wrong pattern, or a lifetime out of range.
        """
        _check_user(user)
        if not name.isprintable():
            raise ValueError("a key's name is one line of printable characters")
        for pattern in (*allow, *deny):
            check_pattern(pattern)
        if expires_in_s is not None and not 0 < expires_in_s <= _LONGEST_LIFETIME_S:
            raise ValueError(
                "a key lives for more than 0 s and at most 100 years: leave out --expires for one without end"
            )
        key = "sk-" + _random(_KEY_ALPHABET, _KEY_LENGTH)
        key_id = "key_" + _random(_ID_ALPHABET, 12)
        created_at = now()
        expires_at = None if expires_in_s is None else created_at + expires_in_s
        with self._write() as revision:
            self._connection.execute(
                "INSERT INTO keys (id, digest, user, name, allow, deny, limit_name, expires_at, created_at, revision)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    key_id,
                    hash_key(key),
                    user,
                    name,
                    " ".join(allow),
                    " ".join(deny),
                    limit,
                    expires_at,
                    created_at,
                    revision,
                ),
            )
            row = self._connection.execute(_SELECT_RECORD + "AND keys.id = ?", (key_id,)).fetchone()
        return key, _key_record(row)

    def list(self) -> builtins.list[KeyRecord]:
        """Return the keys that are not revoked, in the order they were created."""
        with _key_file_errors(self._path):
            rows = self._connection.execute(_SELECT_RECORD + "ORDER BY keys.rowid").fetchall()
        try:
            return [_key_record(row) for row in rows]
        except ValueError as error:
            raise KeyFileError(f"{self._path}: {error}: correct it with sqlite3") from None

    def revoke(self, key_id: str) -> None:
        """End a key for good; raises `UnknownKey`, and `RevokedKey` when that was done before."""
        self._change_key(key_id, "revoked", True)

    def enable(self, key_id: str) -> None:
        """Let a disabled key in again; raises `UnknownKey` or `RevokedKey`."""
        self._change_key(key_id, "enabled", True)

    def disable(self, key_id: str) -> None:
        """Keep a key out until it is enabled; raises `UnknownKey` or `RevokedKey`."""
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

    @contextlib.contextmanager
    def _write(self) -> Iterator[int]:
        """Hold the file's write lock for one change and yield the revision that the change makes."""
        with _key_file_errors(self._path), _transaction(self._connection, "IMMEDIATE"):
            yield _revision(self._connection) + 1
        _empty_wal(self._connection)


def parse_lifetime(text: str) -> int:
    """Return the seconds of a lifetime such as `30d`; the units are s, m, h, d and w. Raises `ValueError`."""
    match = _LIFETIME.fullmatch(text)
    seconds = int(match[1]) * _UNIT_S[match[2]] if match else 0
    if not seconds:
        raise ValueError(f"{text!r} is not a lifetime: write a number above 0 and one of s, m, h, d, w, such as 30d")
    return seconds


_Question = tuple[Callable[["_KeyFile"], Any], "asyncio.Future[Any]"]


class _KeyFile:
    """The serving side's open file; every method runs in the store's thread."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._connection: sqlite3.Connection | None = None
        self._identity = (0, 0)
        self._data_version = 0
        self._doubts = 0  # looks in a row at what may be no change
        self._history = 0
        self._revision = 0

    @property
    def is_open(self) -> bool:
        return self._connection is not None

    def open(self, *, create: bool) -> None:
        """Open the file anew, for reading only; raises `KeyFileError`."""
        self.close()
        with _key_file_errors(self.path):
            if create:
                _make_file(self.path)
            self._identity = (
                self._identify()
            )  # before the file is opened: a replacement in between is seen at the next look
            connection = _connect(self.path, _READ_BUSY_TIMEOUT_S, set_up=create)
            self._connection = connection
            connection.execute("PRAGMA query_only = 1")
            # SQLite keeps pages while nobody writes by its own rules. Without a cache of its own every look-up reads
            # the file as it is, from the system's cache, and damage is seen at once.
            connection.execute("PRAGMA cache_size = 0")
            with _transaction(connection, "DEFERRED"):
                self._data_version, self._doubts = _data_version(connection), 0
                self._history = _history(connection)
                self._revision = _revision(connection)

    def close(self) -> None:
        if self._connection is not None:
            connection, self._connection = self._connection, None
            connection.close()

    def was_replaced(self) -> bool:
        """Say whether the path names another file than the open one; raises `OSError` when it names none."""
        return self._identify() != self._identity

    def find(self, digest: bytes) -> Principal | None:
        row = self._open_connection().execute(_SELECT_RECORD + "AND keys.digest = ?", (digest,)).fetchone()
        try:
            return None if row is None else Principal(**_facts(row))
        except ValueError as error:
            raise AnswerUnusable(str(error)) from None

    def find_user(self, user: str) -> UserState:
        row = self._open_connection().execute(_SELECT_USER, (user,)).fetchone()
        return UserState() if row is None else UserState(*map(bool, row))

    def changes(self) -> Changes | None:
        """Return what other processes changed since the last look, None if nothing."""
        connection = self._open_connection()
        seen, history = self._revision, self._history
        with _transaction(connection, "DEFERRED"):  # one snapshot: the version and the rows that belong to it
            data_version = _data_version(connection)
            if data_version == self._data_version:
                return None
            self._history, self._revision = _history(connection), _revision(connection)
            rows = connection.execute(_SELECT_CHANGED, {"seen": seen}).fetchall()
            was_emptied = self._wal_is_empty()  # nothing can be taken out of it that this snapshot reads from it
        is_same = self._revision == seen and self._history == history
        # An emptied WAL counts as a commit too, and the next writer may be filling it, with commits that are to come.
        if is_same and not was_emptied and self._doubts < _MAX_DOUBTS:
            self._doubts += 1
            return None
        was_doubted, self._data_version, self._doubts = bool(self._doubts), data_version, 0
        if is_same and was_emptied and not was_doubted:
            return None
        # A change without a newer revision is a hand at the tables, also when a newer one followed before that was
        # sure. In another history the same revision may have been another change: a backup was restored in place.
        if self._revision <= seen or self._history != history or was_doubted:
            return Changes(everything=True)
        digests = frozenset(digest for digest, _ in rows if digest is not None)
        return Changes(digests, users=frozenset(user for _, user in rows if user is not None))

    def _wal_is_empty(self) -> bool:
        wal = Path(f"{self.path}-wal")
        return wal.exists() and not wal.stat().st_size

    def _identify(self) -> tuple[int, int]:
        status = self.path.stat()
        return status.st_dev, status.st_ino

    def _open_connection(self) -> sqlite3.Connection:
        if self._connection is None:
            raise KeyFileError("the file is not open")
        return self._connection


def _make_file(path: Path) -> None:
    """Create a missing file, empty and for its owner alone; SQLite gives its side files the same mode."""
    if not path.parent.is_dir():
        raise KeyFileError(f"the directory {path.parent} of the key store is missing: create it or change keys.store")
    with contextlib.suppress(FileExistsError):
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))


def _connect(path: Path, busy_timeout_s: float, *, set_up: bool = True) -> sqlite3.Connection:
    """Open a key store in WAL mode; an empty file is given its schema when `set_up` allows it."""
    address = f"{path.absolute().as_uri()}?mode=rw"
    connection = sqlite3.connect(address, uri=True, timeout=busy_timeout_s, isolation_level=None)
    try:
        _prepare_patiently(connection, path, busy_timeout_s, set_up)
    except BaseException:
        connection.close()
        raise
    return connection


def _prepare_patiently(connection: sqlite3.Connection, path: Path, busy_timeout_s: float, set_up: bool) -> None:
    # Two processes that change a new file's journal mode at once would wait for each other, so SQLite refuses one of
    # them without its busy timeout: that one tries again.
    give_up_at = time.monotonic() + busy_timeout_s
    while True:
        try:
            return _prepare(connection, path, set_up)
        except sqlite3.OperationalError as error:
            if not _is_busy(error) or time.monotonic() >= give_up_at:
                raise
        time.sleep(_BUSY_RETRY_INTERVAL_S)


def _prepare(connection: sqlite3.Connection, path: Path, set_up: bool) -> None:
    version = _schema_version(connection)
    if version > SCHEMA_VERSION:
        raise KeyFileError(
            f"{path} was written by a newer edge (schema {version}, this one knows {SCHEMA_VERSION}): upgrade this edge"
        )
    if version == 0 and not (set_up and _is_blank(connection)):
        raise KeyFileError(f"{path} is not a key store: change keys.store, or move the file away")
    (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
    if mode != "wal":
        raise KeyFileError(f"the file system of {path} has no shared memory for SQLite's WAL: use a local one")
    if version == 0:
        with _transaction(connection, "IMMEDIATE"):
            if _schema_version(connection) == 0:  # else another process was faster
                for statement in _SCHEMA:
                    connection.execute(statement)
                connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        _empty_wal(connection)


def _empty_wal(connection: sqlite3.Connection) -> None:
    """Move what was committed into the file itself, as far as readers let it; what is not moved is not lost.

    SQLite applies a WAL to whatever stands beside it: left as it is, one would undo what a file says that is moved into
    this one's place, a revocation for one. Source: https://www.sqlite.org/howtocorrupt.html section 1.4
    """
    (patience_ms,) = connection.execute("PRAGMA busy_timeout").fetchone()
    try:
        connection.execute(f"PRAGMA busy_timeout = {_CHECKPOINT_PATIENCE_MS}")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    except sqlite3.Error:  # the change itself is committed, and the next one tries again
        pass
    finally:
        connection.execute(f"PRAGMA busy_timeout = {patience_ms}")


def _schema_version(connection: sqlite3.Connection) -> int:
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def _is_blank(connection: sqlite3.Connection) -> bool:
    """Say whether nothing is in this database; one whose schema another process made just now counts as blank too."""
    with _transaction(connection, "DEFERRED"):
        (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        return tables == 0 or _schema_version(connection) == SCHEMA_VERSION


def _data_version(connection: sqlite3.Connection) -> int:
    """Return a number that is another after every commit of another connection."""
    return int(connection.execute("PRAGMA data_version").fetchone()[0])


def _history(connection: sqlite3.Connection) -> int:
    """Return a number that is another after every backup that was restored in place, and else only after a VACUUM.

    SQLite counts it up then, from what it was, so that every connection reads the schema anew: `sqlite3_backup_step` in
    https://sqlite.org/src/file/src/backup.c
    """
    return int(connection.execute("PRAGMA schema_version").fetchone()[0])


def _revision(connection: sqlite3.Connection) -> int:
    """Return the newest revision; rows are never deleted, so it only grows."""
    return int(connection.execute(_SELECT_REVISION).fetchone()[0])


@contextlib.contextmanager
def _transaction(connection: sqlite3.Connection, kind: str) -> Iterator[None]:
    connection.execute(f"BEGIN {kind}")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:  # some errors have rolled back already
            connection.execute("ROLLBACK")
        raise


@contextlib.contextmanager
def _key_file_errors(path: Path) -> Iterator[None]:
    """Translate what SQLite and the system say of the file into `KeyFileError`."""
    try:
        yield
    except sqlite3.Error as error:
        if _is_busy(error):
            raise KeyFileBusy(f"{path} is locked by another process: end what holds it and try again") from error
        raise KeyFileError(
            f"{path} cannot be used ({error}): see that it is a key store this user may read and write, "
            "restore it from a backup, or change keys.store"
        ) from error
    except OSError as error:
        raise KeyFileError(
            f"{path} cannot be used ({error.strerror}): make it accessible or change keys.store"
        ) from error


def _is_busy(error: sqlite3.Error) -> bool:
    code: int | None = getattr(error, "sqlite_errorcode", None)  # absent where the module itself raised
    return code is not None and code & 0xFF == sqlite3.SQLITE_BUSY  # the low byte: the rest tells kinds of busy apart


def _facts(row: Sequence[Any]) -> dict[str, Any]:
    """Return the fields of a `Principal` out of a row of `_SELECT_RECORD`.

    Raises `ValueError` for what only a hand at the tables has put there: SQLite lets any value into any column.
    """
    key_id, user, name, allow, deny, enabled, suspended, out_of_quota, expires_at, limit, _ = row
    if not all(isinstance(each, str) for each in (key_id, user, name, allow, deny, "" if limit is None else limit)):
        raise ValueError(f"the row of the key {key_id!r} has something else than text in a column of text")
    if not isinstance(expires_at, float | None):
        raise ValueError(f"the row of the key {key_id!r} has something else than a number as expires_at")
    return {
        "id": key_id,
        "user": user,
        "name": name,
        "allow": tuple(allow.split()),
        "deny": tuple(deny.split()),
        "enabled": bool(enabled),
        "suspended": bool(suspended),
        "out_of_quota": bool(out_of_quota),
        "expires_at": expires_at,
        "limit": limit,
    }


def _key_record(row: Sequence[Any]) -> KeyRecord:
    record = KeyRecord(**_facts(row), created_at=row[-1])
    for moment in (record.created_at, 0.0 if record.expires_at is None else record.expires_at):
        if not isinstance(moment, float) or not 0 <= moment < _END_OF_CALENDAR_S:
            raise ValueError(f"the row of the key {record.id!r} has something else than a time in Unix seconds")
    return record


def _check_user(user: str) -> None:
    if not is_dns_label(user):
        raise ValueError(
            "a user is a DNS label such as u-1100a15812cc: 1 to 63 of a-z, 0-9 and -, with no - at either end"
        )


def _random(alphabet: str, length: int) -> str:
    return "".join(secrets.choice(alphabet) for _ in range(length))


def _rfc3339(unix_s: float) -> str:
    return datetime.fromtimestamp(unix_s, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _settle(future: asyncio.Future[Any], result: object) -> None:
    if not future.done():  # else who asked was cancelled
        future.set_result(result)


def _fail(future: asyncio.Future[Any], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
