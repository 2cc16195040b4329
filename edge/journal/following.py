"""An index beside the journal, in SQLite: sums of what its records say, so that a question costs no look through it.

It stands in the journal's directory, for all processes of the machine. Whoever asks brings it up to date first, from
where it was left in each file; one process at a time does. It may be removed: the next question makes it anew of the
files that are still there.
"""

import contextlib
import os
import sqlite3
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Final

from edge.errors import Unusable
from edge.journal.ends import Ended, blocks_of, ends_in
from edge.journal.files import LeftAlone, open_to_read

_BUSY_S: Final = 2.0
_A_STEP_S: Final = 0.5  # of work, between two commits
_FILES: Final = "CREATE TABLE files (name TEXT PRIMARY KEY, offset INTEGER NOT NULL) WITHOUT ROWID"

Key = tuple[Any, ...]


class JournalIndex:
    """Follows a journal; its methods may run in threads. Raises `Unusable` for a broken file.

    A subclass has the `name` of the file, its `version`, the `schema` of its table, and `add`, the statement that adds
    the sums of a key.
    """

    name: ClassVar[str]
    version: ClassVar[int]
    schema: ClassVar[str]
    add: ClassVar[str]
    sums: ClassVar[int]  # how many a key has

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._closed = False
        self.as_of = 0.0  # Unix seconds, of all that stood in the files then

    def key_of(self, file: str, ended: Ended) -> Key | None:
        """Return what a record of a file is summed under, None for one that counts nowhere."""
        raise NotImplementedError

    def count(self, sums: list[int], ended: Ended) -> None:
        """Add a record to the sums of its key."""
        raise NotImplementedError

    def catch_up(self) -> bool:
        """Add what was written since the last time; where another process does so already, leave it to that one.

        Return whether all was added.
        """
        begun = time.time()
        with self.open() as connection:
            known = dict(connection.execute("SELECT name, offset FROM files"))
            for path in sorted(self._directory.glob("*.jsonl")):
                with contextlib.suppress(LeftAlone, FileNotFoundError), open_to_read(path) as file:
                    offset = known.get(path.name, 0)
                    if os.fstat(file.fileno()).st_size > offset:
                        file.seek(offset)
                        if not self._add_file(connection, path.name, offset, blocks_of(file)):
                            return False
        self.as_of = begun
        return True

    def _add_file(self, connection: sqlite3.Connection, name: str, offset: int, blocks: Iterator[bytes]) -> bool:
        """Add blocks of a file, which begin at an offset; return False when another process does, or at the end."""
        found: dict[Key, list[int]] = {}
        begun, start = time.monotonic(), offset
        for block in blocks:
            for ended in ends_in(block)[0]:
                if (key := self.key_of(name, ended)) is not None:
                    self.count(found.setdefault(key, [0] * self.sums), ended)
            offset += len(block)
            time.sleep(0)  # the loop's turn, after a fraction of a millisecond
            if time.monotonic() - begun > _A_STEP_S:
                if self._closed or not self._commit(connection, name, start, offset, found):
                    return False
                found.clear()
                begun, start = time.monotonic(), offset
        return self._commit(connection, name, start, offset, found)

    def stop(self) -> None:
        """Leave the rest to the next question."""
        self._closed = True

    @contextlib.contextmanager
    def open(self) -> Iterator[sqlite3.Connection]:
        """Open the file, making one that is missing."""
        path = self._directory / self.name
        try:
            connection = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None)
            with contextlib.closing(connection):
                (version,) = connection.execute("PRAGMA user_version").fetchone()
                if version != self.version:
                    self._set_up(connection, version)
                connection.execute("PRAGMA synchronous = OFF")  # what a crash of the machine ruins is made anew
                yield connection
        except (sqlite3.Error, OSError) as error:
            raise Unusable(f"{self.name} cannot be used ({error}): remove it, it is made anew of the journal") from None

    def _set_up(self, connection: sqlite3.Connection, version: int) -> None:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("BEGIN IMMEDIATE")
        (found,) = connection.execute("PRAGMA user_version").fetchone()
        if found not in (0, self.version):
            raise Unusable(f"{self.name} is of another version of the edge ({version}): remove it, it is made anew")
        if not found:
            for statement in (_FILES, self.schema):
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {self.version}")
        connection.execute("COMMIT")

    def _commit(
        self, connection: sqlite3.Connection, name: str, start: int, offset: int, found: dict[Key, list[int]]
    ) -> bool:
        """Add sums of a file from `start` to `offset`; return False where that is not where the index was left."""
        connection.execute("BEGIN IMMEDIATE")
        row = connection.execute("SELECT offset FROM files WHERE name = ?", (name,)).fetchone()
        is_next = (row[0] if row is not None else 0) == start
        if is_next:
            connection.execute("INSERT OR REPLACE INTO files VALUES (?, ?)", (name, offset))
            connection.executemany(self.add, [(*key, *sums) for key, sums in found.items()])
        connection.execute("COMMIT" if is_next else "ROLLBACK")
        return is_next


def adding(table: str, keys: int, sums: Sequence[str]) -> str:
    """Return the statement that adds sums to a table, whose first columns are its keys."""
    places = ", ".join("?" * (keys + len(sums)))
    added = ", ".join(f"{name} = {name} + excluded.{name}" for name in sums)
    return f"INSERT INTO {table} VALUES ({places}) ON CONFLICT DO UPDATE SET {added}"
