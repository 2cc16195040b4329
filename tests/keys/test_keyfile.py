"""The file of the embedded store, opened by either side: made, refused, or taken to this edge's schema."""

import contextlib
import errno
import re
import sqlite3
import stat
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from edge.keys.stores import keyfile
from edge.keys.stores.keyfile import STEPS, KeyFileBlank, KeyFileError
from edge.keys.stores.protocol import StoreFailed, hash_key
from edge.keys.stores.registry import KeyRegistry
from tests.keys.keyfiles import make_key, replace_by_another_database, serving


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
        assert connection.execute("PRAGMA user_version").fetchone() == (len(STEPS),)


@both_sides
async def test_empty_file_becomes_a_key_store(path: Path, open_and_close: OpenAndClose) -> None:
    """A file that was only touched, or whose maker was killed, is set up as a missing one is."""
    path.touch()

    await open_and_close(path)

    with KeyRegistry(path) as registry:
        assert registry.list() == []


@pytest.mark.parametrize("is_there", [False, True])
async def test_missing_or_empty_file_is_a_new_store_at_the_start(
    path: Path, is_there: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """It knows nobody, which is told once, and the first key that is made works at once."""
    if is_there:
        path.touch()
    async with serving(path) as (store, listener):
        assert await store.look_up(hash_key("sk-any"), "sk-any") is None
        key = make_key(path)
        assert await store.look_up(hash_key(key), key) is not None
        assert await store.look_up(hash_key("sk-any"), "sk-any") is None
        assert listener.outages == []
    async with serving(path):
        pass
    [told] = [each.getMessage() for each in caplog.records]
    assert str(path) in told
    assert "`edge keys create`" in told


@pytest.mark.parametrize("is_there", [False, True])
async def test_who_only_lists_makes_no_file(path: Path, is_there: bool) -> None:
    if is_there:
        path.touch()
    with pytest.raises(KeyFileBlank, match="`edge keys create`"), KeyRegistry(path, makes=False):
        pass
    assert path.exists() == is_there
    assert not is_there or not path.read_bytes()


@pytest.mark.parametrize("is_there", [False, True])
async def test_file_that_is_gone_or_emptied_while_it_is_served_is_an_outage_until_it_has_a_key(
    path: Path, is_there: bool
) -> None:
    """Its keys are lost, also where it never had one: no start is what makes it anew."""
    async with serving(path) as (store, listener):
        path.unlink()
        if is_there:
            path.touch()
        await listener.until(lambda: listener.outages != [])
        assert "`edge keys create`" in listener.outages[0]
        with pytest.raises(StoreFailed):
            await store.look_up(hash_key("sk-any"), "sk-any")
        assert path.exists() == is_there
        assert not is_there or not path.read_bytes()
        key = make_key(path)
        await listener.hears_of_everything()
        assert await store.look_up(hash_key(key), key) is not None
        assert await store.look_up(hash_key("sk-any"), "sk-any") is None
        assert listener.outages[1:] == [""]


async def test_file_that_cannot_be_made_is_named_at_the_start(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("os.open", refuse)
    with pytest.raises(KeyFileError, match=re.escape(f"{path} cannot be used (Read-only file system)")):
        await open_and_close_store(path)


@both_sides
async def test_missing_directory_is_named(tmp_path: Path, open_and_close: OpenAndClose) -> None:
    """A directory is not made: a slip in the path would hide every key."""
    with pytest.raises(KeyFileError, match=re.escape(f"{tmp_path / 'absent'} of the key store is missing: create it")):
        await open_and_close(tmp_path / "absent" / "keys.db")


@both_sides
async def test_newer_schema_is_refused(path: Path, open_and_close: OpenAndClose) -> None:
    """An older edge does not guess what a newer one has written."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA user_version = {len(STEPS) + 1}")

    with pytest.raises(
        KeyFileError, match=rf"newer edge \(schema {len(STEPS) + 1}, this one knows {len(STEPS)}\): upgrade"
    ):
        await open_and_close(path)


@pytest.mark.parametrize("version", [0, 1, 2, 3, 99])
@both_sides
async def test_another_programs_database_is_refused_and_left_alone(
    path: Path, open_and_close: OpenAndClose, version: int
) -> None:
    """A wrong path must not put tables into somebody's data, nor change how it is stored; versions are no proof."""
    replace_by_another_database(path)
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA user_version = {version}")
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


# --- from one version of the schema to the next

NOTES = ("ALTER TABLE keys ADD COLUMN note TEXT NOT NULL DEFAULT ''", "CREATE INDEX keys_by_note ON keys (note)")


def version_of(path: Path) -> int:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        return int(version)


@both_sides
async def test_file_of_an_older_edge_takes_the_steps_that_it_lacks(
    path: Path, open_and_close: OpenAndClose, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its keys stay; and a new file takes all of the steps."""
    key = make_key(path)
    steps = (*keyfile.STEPS, NOTES, ("UPDATE keys SET note = 'old'",))
    monkeypatch.setattr(keyfile, "STEPS", steps)

    for each in (path, path.with_name("new.db")):
        await open_and_close(each)
        assert version_of(each) == len(steps)
    with contextlib.closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT digest, note FROM keys").fetchall() == [(hash_key(key), "old")]


@both_sides
async def test_step_that_fails_changes_nothing(
    path: Path, open_and_close: OpenAndClose, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The steps are one transaction: the edge before goes on with the file."""
    make_key(path)
    version = version_of(path)
    with monkeypatch.context() as newer:
        newer.setattr(keyfile, "STEPS", (*keyfile.STEPS, NOTES, ("UPDATE absent SET x = 1",)))
        with pytest.raises(KeyFileError, match=r"cannot be used \(no such table: absent\)"):
            await open_and_close(path)
    assert version_of(path) == version
    with contextlib.closing(sqlite3.connect(path)) as connection, pytest.raises(sqlite3.OperationalError):
        connection.execute("SELECT note FROM keys")
    await open_and_close(path)


async def test_running_store_notices_that_its_file_took_a_step(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A newer edge, or its command, has opened the file."""
    key = make_key(path)
    async with serving(path) as (store, listener):
        monkeypatch.setattr(keyfile, "STEPS", (*keyfile.STEPS, NOTES))
        with KeyRegistry(path):
            pass
        await listener.hears_of_everything()
        assert await store.look_up(hash_key(key), key) is not None
