"""The file of the embedded store, opened by either side: made, refused, or taken to this edge's schema."""

import contextlib
import re
import sqlite3
import stat
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from edge.keys.stores.keyfile import KeyFileError
from edge.keys.stores.registry import KeyRegistry
from tests.keys.keyfiles import replace_by_another_database, serving


async def open_and_close_store(path: Path) -> None:
    async with serving(path):
        pass


async def open_and_close_registry(path: Path) -> None:
    with KeyRegistry(path):
        pass


both_sides = pytest.mark.parametrize("open_and_close", [open_and_close_store, open_and_close_registry])
OpenAndClose = Callable[[Path], Awaitable[None]]


@both_sides
async def test_missing_file_is_created_for_its_owner_alone(path: Path, open_and_close: OpenAndClose) -> None:
    """Digests and names of users are nobody else's business."""
    await open_and_close(path)

    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with contextlib.closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert connection.execute("PRAGMA user_version").fetchone() == (1,)


@both_sides
async def test_empty_file_becomes_a_key_store(path: Path, open_and_close: OpenAndClose) -> None:
    """A file that was only touched, or whose maker was killed, is set up as a missing one is."""
    path.touch()

    await open_and_close(path)

    with KeyRegistry(path) as registry:
        assert registry.list() == []


@both_sides
async def test_missing_directory_is_named(tmp_path: Path, open_and_close: OpenAndClose) -> None:
    """A directory is not made: a slip in the path would hide every key."""
    with pytest.raises(KeyFileError, match=re.escape(f"{tmp_path / 'absent'} of the key store is missing: create it")):
        await open_and_close(tmp_path / "absent" / "keys.db")


@both_sides
async def test_newer_schema_is_refused(path: Path, open_and_close: OpenAndClose) -> None:
    """An older edge does not guess what a newer one has written."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 2")

    with pytest.raises(KeyFileError, match=r"newer edge \(schema 2, this one knows 1\): upgrade"):
        await open_and_close(path)


@both_sides
async def test_another_programs_database_is_refused_and_left_alone(path: Path, open_and_close: OpenAndClose) -> None:
    """A wrong path must not put tables into somebody's data, nor change how it is stored."""
    replace_by_another_database(path)
    before = path.read_bytes()

    with pytest.raises(KeyFileError, match="is not a key store"):
        await open_and_close(path)

    assert path.read_bytes() == before


@both_sides
async def test_file_that_is_no_database_is_refused(path: Path, open_and_close: OpenAndClose) -> None:
    """At the start a damaged file is an operator's mistake, said aloud."""
    path.write_text("[server]\n" * 100)

    with pytest.raises(KeyFileError, match=re.escape(f"{path} cannot be used")):
        await open_and_close(path)
