"""The serving side of the embedded key store, one SQLite file that `stores/registry.py` administers.

It only reads, in a thread of its own, and notices within its watch interval what any other process committed.

Source: https://www.sqlite.org/pragma.html#pragma_data_version
"""

import asyncio
import contextlib
import logging
import queue
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

from edge.config.process_settings import KeysConfig
from edge.exchange import Principal
from edge.keys.stores import keyfile
from edge.keys.stores.keyfile import number
from edge.keys.stores.protocol import AnswerUnusable, Invalidation, KeyStore, StoreFailed, UserState
from edge.keys.stores.records import principal_of

_log = logging.getLogger(__name__)

_SELECT_CHANGED = """
    SELECT digest, NULL FROM keys WHERE revision > :seen
    UNION ALL
    SELECT NULL, user FROM users WHERE revision > :seen
"""
_DATA_VERSION: Final = "PRAGMA data_version"  # another number after every commit of another connection
# Another number after every backup that was restored in place, and else only after a VACUUM or a step of the schema.
# SQLite counts it up then, from what it was, so that every connection reads the schema anew: `sqlite3_backup_step` in
# https://sqlite.org/src/file/src/backup.c
_HISTORY: Final = "PRAGMA schema_version"

# In WAL mode a reader waits for no writer, only for a recovery or a file held exclusively. Requests wait with it.
_READ_BUSY_TIMEOUT_S: Final = 0.5

T = TypeVar("T")
_Question = tuple[Callable[["_KeyFile"], Any], "asyncio.Future[Any]"]


class SqliteKeyStore(KeyStore):
    """Looks keys up in a thread of its own, and reports every change.

    A file that is locked, damaged, deleted or emptied makes look-ups fail until it can be read again; every watch
    tries, so no restart is needed. Only `open` makes a file: one that is missing or empty later has lost its keys.
    """

    def __init__(self, config: KeysConfig, watch_interval_s: float = 0.25) -> None:
        assert config.store.path is not None
        self._file = _KeyFile(config.store.path)
        self._watch_interval_s = watch_interval_s
        self._questions: queue.SimpleQueue[_Question | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._healthy = True
        self._reason = ""  # why it is not, in the last attempt

    def __repr__(self) -> str:
        state = "closed" if self._thread is None else "open" if self._healthy else "unavailable"
        return f"<SqliteKeyStore {self._file.path} {state}>"

    async def open(self) -> None:
        """Open the file, making one that is missing or empty, and begin to watch it.

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
        """Return who owns the key of this SHA-256 digest; raises `StoreFailed` when the file cannot be read now."""
        return await self._ask(lambda file: file.find(digest))

    async def look_up_user(self, user: str) -> UserState:
        """Return what is recorded of a user; raises `StoreFailed` when the file cannot be read now."""
        return await self._ask(lambda file: file.find_user(user))

    async def _ask(self, question: "Callable[[_KeyFile], T]") -> T:
        if self._thread is None:
            raise StoreFailed("the store is closed")
        answer: asyncio.Future[T] = self._loop.create_future()
        self._questions.put((question, answer))
        return await answer

    # What follows runs in the thread.

    def _run(self, opened: asyncio.Future[None]) -> None:
        with contextlib.closing(self._file):
            try:
                self._open_first()
            except keyfile.KeyFileBusy as error:
                self._lost(error)
            except Exception as error:
                self._post(_fail, opened, error)
                return
            self._post(_settle, opened, None)
            self._serve()

    def _open_first(self) -> None:
        try:
            self._file.open()
        except keyfile.KeyFileBlank:
            self._file.open(makes=True)
            _log.warning("%s is a new key store: make its first key with `edge keys create`", self._file.path)

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
            self._post(_fail, answer, StoreFailed(self._reason))
            return
        try:
            if self._file.was_replaced():
                self._reopen()
            found = question(self._file)
        except AnswerUnusable as error:  # the fault of one row is none of the file
            self._post(_fail, answer, error)
        except Exception as error:  # whatever it was, who waits must get an answer
            self._lost(error)
            self._post(_fail, answer, StoreFailed(_reason_of(error)))
        else:
            self._post(_settle, answer, found)

    def _watch(self) -> None:
        try:
            if not self._file.is_open or self._file.was_replaced():
                self._reopen()
            elif invalidation := self._file.changes():
                self._post(self.on_change, invalidation)
        except Exception as error:  # the watch outlives every fault of the file
            self._lost(error)

    def _reopen(self) -> None:
        self._file.open()
        if not self._healthy:
            self._healthy = True
            self._post(self.on_outage, "")
        self._post(self.on_change, Invalidation(everything=True))

    def _lost(self, error: Exception) -> None:
        self._file.close()
        self._reason = _reason_of(error)
        if self._healthy:
            self._healthy = False
            self._post(self.on_outage, self._reason)

    def _post(self, callback: Callable[..., object], *arguments: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(callback, *arguments)


class _KeyFile:
    """The serving side's open file; every method runs in the store's thread."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._connection: sqlite3.Connection | None = None

    @property
    def is_open(self) -> bool:
        return self._connection is not None

    def open(self, *, makes: bool = False) -> None:
        """Open the file anew, for reading only; raises `KeyFileError`, for a blank one only where it `makes` none."""
        self.close()
        with keyfile.key_file_errors(self.path):
            connection, self._identity = keyfile.open_file(self.path, _READ_BUSY_TIMEOUT_S, makes=makes)
            self._connection = connection
            connection.execute("PRAGMA query_only = 1")
            # SQLite keeps pages while nobody writes by its own rules. Without a cache of its own every look-up reads
            # the file as it is, from the system's cache, and damage is seen at once.
            connection.execute("PRAGMA cache_size = 0")
            with keyfile.transaction(connection, "DEFERRED"):
                self._data_version = number(connection, _DATA_VERSION)
                self._history, self._revision = number(connection, _HISTORY), number(connection, keyfile.REVISION)

    def close(self) -> None:
        if self._connection is not None:
            connection, self._connection = self._connection, None
            connection.close()

    def was_replaced(self) -> bool:
        """Return whether the path names another file than the open one; raises `KeyFileBlank` when it names none."""
        try:
            return keyfile.identify(self.path) != self._identity
        except FileNotFoundError:
            raise keyfile.KeyFileBlank(self.path) from None

    def find(self, digest: bytes) -> Principal | None:
        row = self._open_connection().execute(keyfile.SELECT_RECORD + "AND keys.digest = ?", (digest,)).fetchone()
        try:
            return None if row is None else principal_of(keyfile.record_of(row))
        except ValueError as error:
            raise AnswerUnusable(f"the row of the key {row[0]!r} has {error}") from None

    def find_user(self, user: str) -> UserState:
        row = self._open_connection().execute(keyfile.SELECT_USER, (user,)).fetchone()
        return UserState() if row is None else UserState(*map(bool, row))

    def changes(self) -> Invalidation | None:
        """Return what other processes changed since the last call, None if nothing."""
        connection = self._open_connection()
        seen, history = self._revision, self._history
        with keyfile.transaction(connection, "DEFERRED"):  # one snapshot: the version and the rows that belong to it
            data_version = number(connection, _DATA_VERSION)
            if data_version == self._data_version:
                return None
            self._data_version = data_version
            self._history, self._revision = number(connection, _HISTORY), number(connection, keyfile.REVISION)
            rows = connection.execute(_SELECT_CHANGED, {"seen": seen}).fetchall()
        # In another history the same revision may have been another change: a backup was restored in place.
        if self._history != history or self._revision < seen:
            return Invalidation(everything=True)
        digests = frozenset(digest for digest, _ in rows if digest is not None)
        users = frozenset(user for _, user in rows if user is not None)
        if keyfile.HAND in users:
            return Invalidation(everything=True)
        return Invalidation(digests, users=users) if rows else None

    def _open_connection(self) -> sqlite3.Connection:
        assert self._connection is not None
        return self._connection


def _reason_of(error: Exception) -> str:
    return str(error) or type(error).__name__


def _settle(future: asyncio.Future[Any], result: object) -> None:
    if not future.done():  # else who asked was cancelled
        future.set_result(result)


def _fail(future: asyncio.Future[Any], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
