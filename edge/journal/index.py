"""What each key used, by day and model: an index beside the journal, so that a question costs no look through it.

`usage-index.db` is a SQLite file in the journal's directory, for all processes of the machine. Whoever asks brings it
up to date first, from where it was left in each file; one process at a time does, and the others answer with what
stands there. It may be removed: the next question makes it anew of the files that are still there.
"""

import asyncio
import contextlib
import logging
import os
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from edge.errors import Unusable
from edge.exchange import UsageSource
from edge.journal.ends import FIRST_UNIT, Ended, blocks_of, ends_in
from edge.journal.files import LeftAlone, open_to_read
from edge.journal.records import CRASHED

_log = logging.getLogger(__name__)

NAME: Final = "usage-index.db"
_VERSION: Final = 1
_REFRESH_S: Final = 5.0  # between two looks for what is new
_PATIENCE_S: Final = 2.0  # of who asks, for what is new; the rest goes on in its thread
_READERS: Final = 4  # at once: threads are there for others too
_BUSY_S: Final = 2.0
_A_STEP_S: Final = 0.5  # of work, between two commits
SUMS: Final = (
    "requests", "prompt_tokens", "completion_tokens", "cached_tokens", "reasoning_tokens",
    "images", "seconds", "characters", "estimated", "crashed",
)  # fmt: skip
_SCHEMA: Final = (
    "CREATE TABLE files (name TEXT PRIMARY KEY, offset INTEGER NOT NULL) WITHOUT ROWID",
    f"""CREATE TABLE sums (
        key_id TEXT, day TEXT, model TEXT, {", ".join(f"{name} INTEGER NOT NULL" for name in SUMS)},
        PRIMARY KEY (key_id, day, model)
    ) WITHOUT ROWID""",
)
_ADD: Final = f"INSERT INTO sums VALUES ({', '.join('?' * (3 + len(SUMS)))}) ON CONFLICT DO UPDATE SET " + ", ".join(
    f"{name} = {name} + excluded.{name}" for name in SUMS
)
_TAKES: Final = {unit: SUMS.index(unit) for unit in ("images", "seconds", "characters")}


class DaySums(NamedTuple):
    """What a key used of a model on a day (UTC); `sums` are in the order of `SUMS`."""

    day: str
    model: str
    sums: tuple[int, ...]


class UsageIndex:
    """Answers what keys used; its methods but `sums_of` may run in threads. Raises `Unusable` for a broken file."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._refreshing: asyncio.Task[None] | None = None
        self._refreshed_at = float("-inf")
        self._asking = asyncio.Semaphore(_READERS)
        self._closed = False
        self.as_of = 0.0  # Unix seconds, of all that stood in the files then

    async def sums_of(self, key_id: str, first: str, last: str) -> list[DaySums]:
        """Return what a key used from one day to another, in order, as far as it is known within two seconds."""
        loop = asyncio.get_running_loop()
        if self._refreshing is None and loop.time() - self._refreshed_at > _REFRESH_S:
            self._refreshing = loop.create_task(self._refresh(), name="usage index")
        if self._refreshing is not None:
            await asyncio.wait((self._refreshing,), timeout=_PATIENCE_S)
        async with self._asking:
            return await asyncio.to_thread(self.read, key_id, first, last)

    async def _refresh(self) -> None:
        try:
            await asyncio.to_thread(self.catch_up)
        except Unusable as error:
            _log.error("usage index: %s", error)
        finally:
            self._refreshed_at, self._refreshing = asyncio.get_running_loop().time(), None

    def read(self, key_id: str, first: str, last: str) -> list[DaySums]:
        """Return what is known of a key from one day to another."""
        with self._open() as connection:
            rows = connection.execute(
                "SELECT * FROM sums WHERE key_id = ? AND day BETWEEN ? AND ? ORDER BY day, model", (key_id, first, last)
            )
            return [DaySums(day, model, tuple(sums)) for _, day, model, *sums in rows]

    def catch_up(self) -> bool:
        """Add what was written since the last time; where another process does so already, leave it to that one.

        Return whether all was added.
        """
        begun = time.time()
        with self._open() as connection:
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
        found: dict[tuple[str, str, str], list[int]] = {}
        begun, start = time.monotonic(), offset
        for block in blocks:
            for ended in ends_in(block)[0]:
                key = ended.key_id or "", ended.time[:10], ended.model or ""
                _add(found.setdefault(key, [0] * len(SUMS)), ended)
            offset += len(block)
            time.sleep(0)  # the loop's turn, after a fraction of a millisecond
            if time.monotonic() - begun > _A_STEP_S:
                if self._closed or not _commit(connection, name, start, offset, found):
                    return False
                found.clear()
                begun, start = time.monotonic(), offset
        return _commit(connection, name, start, offset, found)

    async def close(self) -> None:
        """Leave the rest to the next question."""
        self._closed = True
        if self._refreshing is not None:
            await self._refreshing

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        path = self._directory / NAME
        try:
            connection = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None)
            with contextlib.closing(connection):
                (version,) = connection.execute("PRAGMA user_version").fetchone()
                if version != _VERSION:
                    _set_up(connection, version)
                connection.execute("PRAGMA synchronous = OFF")  # what a crash of the machine ruins is made anew
                yield connection
        except (sqlite3.Error, OSError) as error:
            raise Unusable(f"{NAME} cannot be used ({error}): remove it, it is made anew of the journal") from None


def _set_up(connection: sqlite3.Connection, version: int) -> None:
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("BEGIN IMMEDIATE")
    (found,) = connection.execute("PRAGMA user_version").fetchone()
    if found not in (0, _VERSION):
        raise Unusable(f"{NAME} is of another version of the edge ({version}): remove it, it is made anew")
    if not found:
        for statement in _SCHEMA:
            connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {_VERSION}")
    connection.execute("COMMIT")


def _add(sums: list[int], ended: Ended) -> None:
    sums[0] += 1
    sums[1] += ended.prompt_tokens
    sums[2] += ended.completion_tokens
    sums[3] += ended.cached_tokens
    sums[4] += ended.reasoning_tokens
    if ended.units:
        sums[_TAKES[ended.unit or FIRST_UNIT]] += ended.units
    sums[8] += ended.usage_source == UsageSource.ESTIMATED.value
    sums[9] += ended.end == CRASHED


def _commit(
    connection: sqlite3.Connection, name: str, start: int, offset: int, found: dict[tuple[str, str, str], list[int]]
) -> bool:
    """Add sums of a file from `start` to `offset`; return False where that is not where the index was left."""
    connection.execute("BEGIN IMMEDIATE")
    row = connection.execute("SELECT offset FROM files WHERE name = ?", (name,)).fetchone()
    is_next = (row[0] if row is not None else 0) == start
    if is_next:
        connection.execute("INSERT OR REPLACE INTO files VALUES (?, ?)", (name, offset))
        connection.executemany(_ADD, [(*key, *sums) for key, sums in found.items()])
    connection.execute("COMMIT" if is_next else "ROLLBACK")
    return is_next
