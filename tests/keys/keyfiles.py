"""What the tests of the embedded store do with its file."""

import contextlib
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

from edge.keys.stores.registry import KeyRegistry
from edge.keys.stores.sqlite import SqliteKeyStore
from tests.keybackends import Listener, attended, sqlite_store

USER = "u-1100a15812cc"


@contextlib.asynccontextmanager
async def serving(path: Path) -> AsyncIterator[tuple[SqliteKeyStore, Listener]]:
    store = sqlite_store(path)
    async with attended(store) as listener:
        yield store, listener


def make_key(path: Path) -> str:
    with KeyRegistry(path) as registry:
        return registry.create(USER)[0]


def script(code: str, *arguments: object) -> subprocess.Popen[str]:
    """Start another Python process."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate()
    assert process.returncode == 0
    return output


def back_up(path: Path) -> Path:
    """Copy a key store as an operator would, and return where the copy is."""
    copy = path.with_suffix(".backup")
    with contextlib.closing(sqlite3.connect(path)) as source, contextlib.closing(sqlite3.connect(copy)) as target:
        source.backup(target)
    return copy


def replace_by_another_database(path: Path) -> None:
    other = path.with_suffix(".other")
    with contextlib.closing(sqlite3.connect(other)) as connection:
        connection.execute("CREATE TABLE visits (page TEXT)")
    other.replace(path)


def restore(copy: Path, path: Path) -> None:
    """Write a copy over a key store in place, as `.restore` does."""
    with contextlib.closing(sqlite3.connect(copy)) as source, contextlib.closing(sqlite3.connect(path)) as target:
        source.backup(target)
