"""A backup of the embedded key store, put in the place of all that the store holds."""

import contextlib
import sqlite3
import time
from pathlib import Path

from edge.keys.stores import keyfile
from edge.keys.stores.administration import audit_line, this_process
from edge.keys.stores.keyfile import KeyFileBusy, KeyFileError, key_file_errors, number


def restore(path: Path, backup: Path, busy_timeout_s: float = 5.0) -> tuple[int, int]:
    """Put all that a backup holds in the place of all that the key store holds; return how many keys and users.

    It is one commit, which every running edge notices as a change of everything; a missing file is made. The lines of
    the audit stay: those of the store go on behind those of the backup. Raises `KeyFileError`, and changes nothing,
    when the backup is damaged, no key store or of a newer edge, or when the key store cannot be written.

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
                _keep_audit(connection, copy)
                _copy(copy, connection, path)
                keyfile.empty_wal(connection)
    return len(users), len(set(users))


def _read_backup(backup: Path, copy: sqlite3.Connection) -> list[str]:
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


def _keep_audit(connection: sqlite3.Connection, copy: sqlite3.Connection) -> None:
    """Add to a backup what was noted since it was made, and that it is restored."""
    rows: list[tuple[float, str]] = []
    if number(connection, "SELECT count(*) FROM sqlite_master WHERE name = 'audit'"):  # else the file is new
        rows = connection.execute("SELECT at, line FROM audit ORDER BY number").fetchall()
    known = {line for (line,) in copy.execute("SELECT line FROM audit")}
    now = time.time()
    rows.append((now, audit_line(this_process(), "restore", now, "", "", {}).decode()))
    copy.executemany("INSERT INTO audit (at, line) VALUES (?, ?)", [row for row in rows if row[1] not in known])


def _copy(source: sqlite3.Connection, target: sqlite3.Connection, path: Path) -> None:
    """Copy a database at once; raises `KeyFileBusy` where the module would wait for ever for who holds `path`."""

    def progress(status: int, remaining: int, total: int) -> None:
        if status & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise KeyFileBusy(path)

    source.backup(target, progress=progress)
