"""The file of the embedded key store, as both of its sides use it: its schema, how it is opened, what can be wrong.

Every write gives the rows it touches the next revision, and a revoked key stays as a row, so a reader can ask for what
changed.

Sources: https://www.sqlite.org/wal.html, https://www.sqlite.org/howtocorrupt.html
"""

import contextlib
import os
import sqlite3
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, Literal

from edge.errors import Unusable

# The newest one, which only grows: a deleted row leaves a newer one at `HAND`.
REVISION: Final = """
    SELECT max(coalesce((SELECT max(revision) FROM keys), 0), coalesce((SELECT max(revision) FROM users), 0))
"""

# The user whose row has a new revision when a hand at the tables changed anything: no user has this name.
HAND: Final = ""

# SQLite's own sign of a commit is also given when a WAL is emptied, and `KeyRegistry` empties it after each commit. So
# it is the revision that tells of a change, and a statement that sets no newer one has these triggers set HAND's.
_NOTE_HAND: Final = f"""
    INSERT INTO users (user, revision) VALUES ('{HAND}', ({REVISION}) + 1)
    ON CONFLICT (user) DO UPDATE SET revision = excluded.revision;
"""
_HAND_TRIGGERS: Final = tuple(
    f"CREATE TRIGGER hand_{verb}s_{table} BEFORE {verb} ON {table} {condition} BEGIN {_NOTE_HAND} END"
    for table in ("keys", "users")
    for verb, condition in (
        ("INSERT", f"WHEN NEW.revision <= ({REVISION})"),
        ("UPDATE", "WHEN NEW.revision <= OLD.revision"),
        ("DELETE", ""),
    )
)

# Each step makes a file of version n one of version n + 1; an empty file has version 0. A released step stays as it is,
# and what is needed later is another one.
STEPS: tuple[tuple[str, ...], ...] = (
    (
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
        # Apart from the keys, so that what holds for a user holds for the keys that are created later.
        """CREATE TABLE users (
            user TEXT PRIMARY KEY,
            suspended INTEGER NOT NULL DEFAULT 0,
            out_of_quota INTEGER NOT NULL DEFAULT 0,
            revision INTEGER NOT NULL
        )""",
        "CREATE INDEX users_by_revision ON users (revision)",
    ),
    _HAND_TRIGGERS,
    (
        "ALTER TABLE keys ADD COLUMN revoked_at REAL",  # Unix seconds
        "ALTER TABLE keys ADD COLUMN replaced_by TEXT",  # the id of the key that a rotation made
        # Apart from the keys, so that to note a use is no change of a key.
        "CREATE TABLE uses (id TEXT PRIMARY KEY, at REAL NOT NULL) WITHOUT ROWID",  # Unix seconds
        "CREATE TABLE audit (number INTEGER PRIMARY KEY AUTOINCREMENT, at REAL NOT NULL, line TEXT NOT NULL)",
        *(
            f"CREATE TRIGGER audit_no_{verb} BEFORE {verb} ON audit"
            " BEGIN SELECT RAISE(ABORT, 'lines of the audit are never changed'); END"
            for verb in ("UPDATE", "DELETE")
        ),
        # Requests that may come again, by the SHA-256 of their name; with the salt of their key.
        """CREATE TABLE requests (
            name BLOB PRIMARY KEY, request BLOB NOT NULL, salt BLOB NOT NULL, key_id TEXT NOT NULL, at REAL NOT NULL
        )""",
        "CREATE INDEX requests_by_time ON requests (at)",
    ),
    ("ALTER TABLE keys ADD COLUMN share INTEGER",),  # of the tokens in the queue of a pool; NULL: that of a limit
)

_COLUMNS: Final = """
    keys.id, keys.user, keys.name, keys.allow, keys.deny, keys.enabled,
    coalesce(users.suspended, 0), coalesce(users.out_of_quota, 0), keys.expires_at, keys.limit_name, keys.share
"""
SELECT_RECORD = f"""
    SELECT {_COLUMNS} FROM keys LEFT JOIN users ON users.user = keys.user WHERE NOT keys.revoked
"""
SELECT_USER: Final = "SELECT suspended, out_of_quota FROM users WHERE user = ?"
# For who administers: a key with its history, also a revoked one.
SELECT_KEY: Final = f"""
    SELECT {_COLUMNS}, keys.created_at, uses.at, keys.revoked, keys.revoked_at, keys.replaced_by
    FROM keys LEFT JOIN users ON users.user = keys.user LEFT JOIN uses ON uses.id = keys.id WHERE
"""
_FIELDS: Final = (
    "id", "user", "name", "allow", "deny", "enabled", "suspended", "out_of_quota", "expires_at", "limit", "share",
    "created_at", "last_used_at", "revoked", "revoked_at", "replaced_by",
)  # fmt: skip

_VERSION: Final = "PRAGMA user_version"  # which any program may use
_OWN_COLUMNS: Final = """
    SELECT (SELECT count(*) FROM pragma_table_info('keys') WHERE name IN ('id', 'digest', 'user', 'revision'))
         + (SELECT count(*) FROM pragma_table_info('users') WHERE name IN ('user', 'suspended', 'revision'))
"""
_OWN_COLUMN_COUNT: Final = 7
_BUSY_RETRY_INTERVAL_S: Final = 0.01
_CHECKPOINT_PATIENCE_MS: Final = 250  # readers of this package are done in a fraction of it; a backup may take minutes


class KeyFileError(Unusable):
    """The file of the embedded store cannot be used as it is; the message is for an operator, with what to change."""


class KeyFileBusy(KeyFileError):
    """Another process holds the file for longer than one waits."""

    def __init__(self, path: Path) -> None:
        super().__init__(f"{path} is locked by another process: end what holds it and try again")


class KeyFileBlank(KeyFileError):
    """There is no file, or nothing in it: it is new, or its keys are lost."""

    def __init__(self, path: Path) -> None:
        super().__init__(
            f"{path} is missing or empty: make its first key with `edge keys create`, put a backup back with"
            " `edge keys restore`, or say with `edge keys init` that there are to be no keys"
        )


def find_file(path: Path) -> None:
    """Raise `KeyFileBlank` for a missing file, `KeyFileError` where its directory is missing too."""
    if not path.parent.is_dir():
        raise KeyFileError(f"the directory {path.parent} of the key store is missing: create it or change keys.store")
    if not path.exists():
        raise KeyFileBlank(path)


def make_file(path: Path) -> None:
    """Create a missing file, empty and for its owner alone; SQLite gives its side files the same mode."""
    with contextlib.suppress(KeyFileBlank):
        find_file(path)
    with contextlib.suppress(FileExistsError):
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))


def connect(
    path: Path, busy_timeout_s: float, *, blank: Literal["set up", "refuse", "leave"] = "set up"
) -> sqlite3.Connection:
    """Open a key store in WAL mode and take the steps that its schema lacks.

    `blank` is what becomes of a file with nothing in it. Raises `KeyFileError`, and what `sqlite3` raises.
    """
    address = f"{path.absolute().as_uri()}?mode=rw"
    connection = sqlite3.connect(address, uri=True, timeout=busy_timeout_s, isolation_level=None)
    try:
        _prepare_patiently(connection, path, busy_timeout_s, blank)
    except BaseException:
        connection.close()
        raise
    return connection


def open_file(path: Path, busy_timeout_s: float, *, makes: bool) -> tuple[sqlite3.Connection, tuple[int, int]]:
    """Open the key store that a path names now; return a connection to it, and what tells the file from another one.

    A missing or blank file becomes a new store if it `makes` one. Raises as `find_file` and `connect` do.
    """
    (make_file if makes else find_file)(path)
    identity = identify(path)  # before it is opened: a replacement in between is noticed later
    return connect(path, busy_timeout_s, blank="set up" if makes else "refuse"), identity


class KeptConnection:
    """A connection to a key file that stays open from one change to the next, for one thread.

    It costs ten statements to open one, and each may wait for a loop that is busy to let go of the interpreter.
    """

    def __init__(self, path: Path, busy_timeout_s: float = 5.0) -> None:
        self.path = path
        self._busy_timeout_s = busy_timeout_s
        self._connection: sqlite3.Connection | None = None
        self._identity: tuple[int, int] | None = None

    def open(self) -> sqlite3.Connection:
        """Return a connection to the file that the path names now; raises as `open_file` does."""
        if self._connection is not None and not self._is_current(self._connection):
            self.close()
        if self._connection is None:
            self._connection, self._identity = open_file(self.path, self._busy_timeout_s, makes=False)
            # So that it reads the file as it is, as a connection would that is opened anew.
            self._connection.execute("PRAGMA cache_size = 0")
        return self._connection

    def close(self) -> None:
        """Let go of the file; it is opened again when it is asked for."""
        if self._connection is not None:
            connection, self._connection = self._connection, None
            connection.close()

    def _is_current(self, connection: sqlite3.Connection) -> bool:
        try:
            return identify(self.path) == self._identity and number(connection, _VERSION) == len(STEPS)
        except (OSError, sqlite3.Error):  # what is wrong is told by who opens it anew
            return False


def identify(path: Path) -> tuple[int, int]:
    """Return what tells a file from one that takes its place."""
    status = path.stat()
    return status.st_dev, status.st_ino


def _prepare_patiently(connection: sqlite3.Connection, path: Path, busy_timeout_s: float, blank: str) -> None:
    # Two processes that change a new file's journal mode at once would wait for each other, so SQLite refuses one of
    # them without its busy timeout: that one tries again.
    give_up_at = time.monotonic() + busy_timeout_s
    while True:
        try:
            return _prepare(connection, path, blank)
        except sqlite3.OperationalError as error:
            if not is_busy(error) or time.monotonic() >= give_up_at:
                raise
        time.sleep(_BUSY_RETRY_INTERVAL_S)


def _prepare(connection: sqlite3.Connection, path: Path, blank: str) -> None:
    is_foreign = _is_foreign(connection)  # asked first, as another program's version means nothing
    version = 0 if is_foreign else known_version(connection, path)
    if is_foreign or (version == 0 and not _is_blank(connection)):
        raise KeyFileError(f"{path} is not a key store: change keys.store, or move the file away")
    if version == 0 and blank == "refuse":
        raise KeyFileBlank(path)
    (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
    if mode != "wal":
        raise KeyFileError(f"the file system of {path} has no shared memory for SQLite's WAL: use a local one")
    if version < len(STEPS) and (version or blank == "set up"):
        migrate(connection)
        empty_wal(connection)


def migrate(connection: sqlite3.Connection) -> None:
    """Take the steps that a file lacks, all of them or none; another process may have been faster."""
    with transaction(connection, "IMMEDIATE"):
        for step in STEPS[number(connection, _VERSION) :]:
            for statement in step:
                connection.execute(statement)
        connection.execute(f"{_VERSION} = {len(STEPS)}")


def known_version(connection: sqlite3.Connection, path: Path) -> int:
    """Return the version of a file's schema; raises `KeyFileError` for one that only a newer edge knows."""
    version = number(connection, _VERSION)
    if version > len(STEPS):
        raise KeyFileError(
            f"{path} was written by a newer edge (schema {version}, this one knows {len(STEPS)}): upgrade this edge"
        )
    return version


def empty_wal(connection: sqlite3.Connection) -> None:
    """Move what was committed into the file itself, as far as readers let it; what is not moved is not lost.

    SQLite applies a WAL to whatever stands beside it. Left as it is, it would undo what a file holds that is moved into
    this one's place, such as a revocation. Source: https://www.sqlite.org/howtocorrupt.html section 1.4
    """
    patience_ms = number(connection, "PRAGMA busy_timeout")
    try:
        connection.execute(f"PRAGMA busy_timeout = {_CHECKPOINT_PATIENCE_MS}")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    except sqlite3.Error:  # the change itself is committed, and the next one tries again
        pass
    finally:
        connection.execute(f"PRAGMA busy_timeout = {patience_ms}")


def number(connection: sqlite3.Connection, question: str) -> int:
    """Return the one number that answers a question in SQL."""
    return int(connection.execute(question).fetchone()[0])


def _is_foreign(connection: sqlite3.Connection) -> bool:
    """Return whether a version is that of another program, which has tables of its own."""
    with transaction(connection, "DEFERRED"):
        has_tables = number(connection, _VERSION) and number(connection, "SELECT count(*) FROM sqlite_master")
        return bool(has_tables) and number(connection, _OWN_COLUMNS) < _OWN_COLUMN_COUNT


def _is_blank(connection: sqlite3.Connection) -> bool:
    """Return whether nothing is in this database, or a schema that another process made just now."""
    with transaction(connection, "DEFERRED"):
        return not number(connection, "SELECT count(*) FROM sqlite_master") or number(connection, _VERSION) > 0


@contextlib.contextmanager
def transaction(connection: sqlite3.Connection, kind: str) -> Iterator[None]:
    """Commit what is done within, or roll it back when it fails."""
    connection.execute(f"BEGIN {kind}")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:  # some errors have rolled back already
            connection.execute("ROLLBACK")
        raise


@contextlib.contextmanager
def key_file_errors(path: Path) -> Iterator[None]:
    """Turn what SQLite and the system raise about the file into `KeyFileError`."""
    try:
        yield
    except sqlite3.Error as error:
        if is_busy(error):
            raise KeyFileBusy(path) from error
        raise KeyFileError(
            f"{path} cannot be used ({error}): see that it is a key store this user may read and write, "
            "move it away and restore a backup, or change keys.store"
        ) from error
    except OSError as error:
        raise KeyFileError(
            f"{path} cannot be used ({error.strerror}): make it accessible or change keys.store"
        ) from error


def is_busy(error: sqlite3.Error) -> bool:
    """Return whether SQLite gave up waiting for a lock."""
    code: int | None = getattr(error, "sqlite_errorcode", None)  # absent where the module itself raised
    return code is not None and code & 0xFF == sqlite3.SQLITE_BUSY  # the low byte: the rest is the kind of busy


def record_of(row: Sequence[Any]) -> dict[str, Any]:
    """Return the record of a row of `SELECT_RECORD` or `SELECT_KEY`, passing on what SQLite let into a column."""
    record = dict(zip(_FIELDS, row, strict=False))
    for name in ("allow", "deny"):
        if isinstance(record[name], str):
            record[name] = record[name].split()
    return record | {name: bool(record[name]) for name in ("enabled", "suspended", "out_of_quota")}
