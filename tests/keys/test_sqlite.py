"""The serving side of the embedded store: changes by other processes, and faults of its file."""

import asyncio
import contextlib
import json
import os
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from edge.errors import KeyStoreUnavailable
from edge.keys.stores.administration import UnknownKey
from edge.keys.stores.keyfile import KeyFileError
from edge.keys.stores.protocol import AnswerUnusable, Invalidation, hash_key
from edge.keys.stores.registry import KeyRegistry
from edge.keys.stores.sqlite import _KeyFile
from edge.protocols import OPENAI
from tests.keybackends import sqlite_store
from tests.keys.keyfiles import (
    USER,
    back_up,
    finish,
    make_key,
    replace_by_another_database,
    restore,
    script,
    serving,
)


async def test_revocation_by_another_process_reaches_every_store(path: Path, registry: KeyRegistry) -> None:
    """`edge keys revoke` is a process of its own; every serving process hears it without a restart."""
    key, record = registry.create(USER)
    async with serving(path) as (store, listener), serving(path) as (other_store, other_listener):
        code = "import sys, pathlib; from edge.keys.stores.registry import KeyRegistry\n"
        code += "with KeyRegistry(pathlib.Path(sys.argv[1])) as registry: registry.revoke(sys.argv[2])"
        finish(script(code, path, record.id))

        await listener.hears_of(hash_key(key))
        await other_listener.hears_of(hash_key(key))

        assert await store.look_up(hash_key(key), key) is None
        assert await other_store.look_up(hash_key(key), key) is None


async def test_burst_of_changes_is_reported_by_name(path: Path) -> None:
    """However commits and polls fall together, no change is missed and none makes the owner forget everything."""
    code = "import sys, pathlib; from edge.keys.stores.registry import KeyRegistry\n"
    code += "with KeyRegistry(pathlib.Path(sys.argv[1])) as registry:\n"
    code += "    for _ in range(200): print(registry.create('u-1')[0])"
    async with serving(path) as (_, listener):
        keys = {hash_key(key) for key in (await asyncio.to_thread(finish, script(code, path))).split()}
        await listener.until(
            lambda: (
                any(each.everything for each in listener.reports)
                or keys <= {digest for each in listener.reports for digest in each.digests}
            )
        )

    assert not any(each.everything for each in listener.reports)


async def test_writer_with_an_open_transaction_blocks_no_look_up(path: Path, registry: KeyRegistry) -> None:
    """In WAL mode a reader sees what was committed and waits for no writer."""
    key, _ = registry.create(USER)
    async with serving(path) as (store, _):
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as writer:
            writer.execute("BEGIN IMMEDIATE")
            writer.execute("UPDATE keys SET revoked = 1")

            assert await store.look_up(hash_key(key), key) is not None


async def test_serving_changes_nothing_in_the_file(path: Path) -> None:
    """Only the registry writes: a server may come and go without a trace."""
    key = make_key(path)
    before = path.read_bytes()

    async with serving(path) as (store, _):
        assert await store.look_up(hash_key(key), key) is not None

    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


async def test_locked_file_is_unavailable_until_it_is_released(path: Path) -> None:
    """A lock at the start is no reason not to start: the store waits, says so, and heals by itself."""
    key = make_key(path)
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("PRAGMA locking_mode = EXCLUSIVE")
    holder.execute("BEGIN EXCLUSIVE")

    async with serving(path) as (store, listener):
        assert repr(store) == f"<SqliteKeyStore {path} unavailable>"
        with pytest.raises(KeyStoreUnavailable):
            await store.look_up(hash_key(key), key)

        holder.close()
        await listener.hears_of_everything()

        assert await store.look_up(hash_key(key), key) is not None
        assert repr(store) == f"<SqliteKeyStore {path} open>"


def delete(path: Path) -> None:
    path.unlink()


def replace_by_garbage(path: Path) -> None:
    garbage = path.with_suffix(".garbage")
    garbage.write_bytes(os.urandom(8192))
    garbage.replace(path)


def overwrite_with_garbage(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    with path.open("r+b") as file:
        file.write(os.urandom(path.stat().st_size))


def replace_by_a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def replace_by_an_empty_file(path: Path) -> None:
    path.unlink()
    path.touch()


def cut_off(path: Path) -> None:
    """Where it stands, as a full disk or a slip of the shell does."""
    os.truncate(path, 0)


def cut_in_half(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    os.truncate(path, path.stat().st_size // 2 & ~4095)


FAULTS = [
    delete,
    replace_by_garbage,
    overwrite_with_garbage,
    replace_by_another_database,
    replace_by_a_directory,
    replace_by_an_empty_file,
    cut_off,
    cut_in_half,
]


@pytest.mark.parametrize("spoil", FAULTS)
async def test_spoilt_file_is_unavailable_until_it_is_restored(path: Path, spoil: Callable[[Path], None]) -> None:
    """Where the file cannot be read, nobody is told that a key is unknown; restored, it serves without a restart."""
    key = make_key(path)
    copy = back_up(path)
    async with serving(path) as (store, listener):
        assert await store.look_up(hash_key(key), key) is not None

        spoil(path)
        with pytest.raises(KeyStoreUnavailable):
            await store.look_up(hash_key(key), key)

        for left in path.parent.glob("keys.db*"):
            left.rmdir() if left.is_dir() else left.unlink()
        os.link(copy, path)  # fails if the store had made a new, empty file
        await listener.hears_of_everything()

        assert await store.look_up(hash_key(key), key) is not None


async def test_replaced_file_is_read_instead_of_the_old_one(path: Path, tmp_path: Path) -> None:
    """Operators replace by rename: the open file is then another than the one at the path."""
    key = make_key(path)
    with KeyRegistry(tmp_path / "new.db") as new:
        new_key, _ = new.create(USER)
    async with serving(path) as (store, listener):
        (tmp_path / "new.db").replace(path)

        assert await store.look_up(hash_key(key), key) is None
        assert await store.look_up(hash_key(new_key), new_key) is not None
        await listener.hears_of_everything()


async def test_change_leaves_nothing_that_would_undo_a_revocation_in_a_file_moved_into_its_place(path: Path) -> None:
    """SQLite applies a WAL to whatever stands beside it: that of a served file, which nobody deletes, is emptied."""
    key = make_key(path)
    async with serving(path) as (store, _):
        copy = back_up(path)
        with KeyRegistry(copy) as aside:
            aside.revoke(aside.list()[0].id)
        make_key(path)  # its page would come back over that of the revocation
        assert path.with_name("keys.db-wal").stat().st_size == 0
        copy.replace(path)

        assert await store.look_up(hash_key(key), key) is None
    with KeyRegistry(path) as registry:
        assert registry.list() == []


async def test_new_file_has_no_wal_either(path: Path) -> None:
    async with serving(path):
        assert path.with_name("keys.db-wal").stat().st_size == 0


def test_reader_that_stays_keeps_no_change_from_being_made(path: Path, registry: KeyRegistry) -> None:
    """A backup may read for minutes: the WAL is emptied after a later change."""
    registry.create(USER)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM keys").fetchone()
        _, record = registry.create(USER)
        registry.revoke(record.id)
    assert path.with_name("keys.db-wal").stat().st_size > 0
    registry.create(USER)
    assert path.with_name("keys.db-wal").stat().st_size == 0
    assert len(registry.list()) == 2


async def test_odd_row_is_the_fault_of_its_key_alone(path: Path, registry: KeyRegistry) -> None:
    """Who has such a key could else make the store reopen its file as often as they ask."""
    odd, record = registry.create(USER)
    key, _ = registry.create(USER)
    async with serving(path) as (store, _):
        with contextlib.closing(sqlite3.connect(path)) as hand, hand:
            hand.execute("UPDATE keys SET allow = ? WHERE id = ?", (b"x", record.id))
        with pytest.raises(AnswerUnusable):
            await store.look_up(hash_key(odd), odd)
        assert repr(store) == f"<SqliteKeyStore {path} open>"
        assert await store.look_up(hash_key(key), key) is not None


async def test_hand_at_the_tables_reports_everything(path: Path) -> None:
    """It makes no newer revision."""
    key = make_key(path)
    async with serving(path) as (store, listener):
        with contextlib.closing(sqlite3.connect(path)) as hand, hand:
            hand.execute("UPDATE keys SET revoked = 1")
        await listener.hears_of_everything()

        assert await store.look_up(hash_key(key), key) is None


def test_emptied_wal_is_no_change(path: Path) -> None:
    """SQLite counts it as one; were it told, each change would make every kept answer be asked for anew."""
    key = make_key(path)
    file = _KeyFile(path)
    file.open()
    with contextlib.closing(file), contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("UPDATE keys SET enabled = 0, revision = 2")
        assert file.changes() == Invalidation(frozenset((hash_key(key),)))
        other.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        assert file.changes() is None
        other.execute("UPDATE keys SET enabled = 1")
        looks = [file.changes() for _ in range(20)]
        assert [each for each in looks if each is not None] == [Invalidation(everything=True)], "made by hand"


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE keys SET enabled = 0",
        "UPDATE keys SET digest = x'00'",
        "DELETE FROM keys",
        "INSERT INTO keys (id, digest, user, name, allow, deny, created_at, revision)"
        " SELECT id || 'x', x'01', user, name, '', '', 0.0, 0 FROM keys",
        "INSERT INTO users (user, suspended, revision) VALUES ('u-1', 1, 0)",
        "DELETE FROM users",
    ],
)
def test_change_made_by_hand_is_not_lost_behind_a_regular_one(path: Path, statement: str) -> None:
    make_key(path)
    with KeyRegistry(path) as registry:
        registry.mark_user("u-2", suspended=True)
    file = _KeyFile(path)
    file.open()
    with contextlib.closing(file), contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute(statement)
        make_key(path)
        assert file.changes() == Invalidation(everything=True)
        make_key(path)
        told = file.changes()
        assert told is not None
        assert not told.everything


def test_file_of_the_first_schema_is_brought_up_to_date_with_its_keys(path: Path) -> None:
    """Its triggers are there from then on, and the key works as before."""
    key = make_key(path)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as old:
        for (name,) in old.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
            old.execute(f"DROP TRIGGER {name}")
        for table in ("audit", "requests", "uses"):
            old.execute(f"DROP TABLE {table}")
        for column in ("revoked_at", "replaced_by", "share"):
            old.execute(f"ALTER TABLE keys DROP COLUMN {column}")
        old.execute("PRAGMA user_version = 1")
    file = _KeyFile(path)
    file.open()
    with contextlib.closing(file), contextlib.closing(sqlite3.connect(path, isolation_level=None)) as hand:
        assert file.find(hash_key(key)) is not None
        hand.execute("UPDATE keys SET revoked = 1")
        assert file.changes() == Invalidation(everything=True)


@pytest.mark.parametrize("as_many", ["keys", "users"])
def test_backup_of_another_history_is_a_change_of_everything_although_it_is_further_on(
    path: Path, registry: KeyRegistry, as_many: str
) -> None:
    """Monday's backup, a change, and Tuesday's: the revision that was seen is in both, and means another change."""
    key, record = registry.create(USER)
    monday = back_up(path).rename(path.with_name("monday"))
    registry.revoke(record.id)
    registry.mark_user("u-x", suspended=True)
    registry.mark_user("u-y", suspended=True)
    tuesday = back_up(path)
    file = _KeyFile(path)
    file.open()
    with contextlib.closing(file):
        restore(monday, path)
        assert file.changes() == Invalidation(everything=True)
        if as_many == "keys":
            made = frozenset(hash_key(registry.create(USER)[0]) for _ in range(2))
            assert file.changes() == Invalidation(made)
        else:  # the very change that has this revision in the other history
            registry.change(record.id, enabled=False)
            registry.mark_user("u-x", suspended=True)
            assert file.changes() == Invalidation(frozenset((hash_key(key),)), users=frozenset(("u-x",)))
        restore(tuesday, path)
        assert file.changes() == Invalidation(everything=True)

        assert file.find(hash_key(key)) is None


async def test_backup_restored_in_place_reports_everything(path: Path, registry: KeyRegistry) -> None:
    """Going back in time makes no newer revision, yet every kept answer may be wrong."""
    registry.create(USER)
    copy = back_up(path)
    key, _ = registry.create(USER)
    async with serving(path) as (store, listener):
        restore(copy, path)
        await listener.hears_of_everything()

        assert await store.look_up(hash_key(key), key) is None


async def test_outage_is_reported_once_on_each_side(path: Path) -> None:
    """Once when the store goes and once when it is back, however often it is asked."""
    make_key(path)
    copy = back_up(path)
    async with serving(path) as (store, listener):
        delete(path)
        for _ in range(3):
            with pytest.raises(KeyStoreUnavailable):
                await store.look_up(hash_key("sk-any"), "sk-any")
        for side_file in path.parent.glob("keys.db-*"):
            side_file.unlink()
        os.link(copy, path)
        await listener.hears_of_everything()

    assert [bool(reason) for reason in listener.outages] == [True, False]


async def test_neither_key_nor_digest_is_shown(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What a person or a log can see of a key is its id."""
    with KeyRegistry(path) as registry:
        key, record = registry.create(USER)
        with pytest.raises(UnknownKey) as mistaken:
            registry.revoke(key)
    shown = [repr(record), json.dumps(record.as_json()), repr(Invalidation(frozenset([hash_key(key)])))]
    stored = path.read_bytes()
    async with serving(path) as (store, _):
        shown.append(repr(store))
        replace_by_garbage(path)
        with pytest.raises(KeyStoreUnavailable) as unavailable:
            await store.look_up(hash_key(key), key)

    shown += [
        repr(mistaken.value),
        repr(unavailable.value),
        OPENAI.error_body(unavailable.value, "").decode(),
        caplog.text,
    ]
    for text in shown:
        assert key not in text
        assert hash_key(key).hex() not in text
        assert repr(hash_key(key)) not in text
    assert str(path) not in unavailable.value.message
    assert key.encode() not in stored


async def test_store_that_failed_to_open_can_be_opened_later(tmp_path: Path) -> None:
    """A failed start leaves nothing behind: no thread, no lock, no half-open state."""
    store = sqlite_store(tmp_path / "later" / "keys.db")
    with pytest.raises(KeyFileError):
        await store.open()
    (tmp_path / "later").mkdir()

    await store.open()

    assert await store.look_up(hash_key("sk-any"), "sk-any") is None
    await store.close()


async def test_abandoned_opening_ends_its_thread(path: Path) -> None:
    """A start that is interrupted holds neither the file nor a thread."""
    before = set(threading.enumerate())
    async with asyncio.TaskGroup() as group:
        opening = group.create_task(sqlite_store(path).open())
        await asyncio.sleep(0)  # the task runs to its await
        opening.cancel()

    for thread in set(threading.enumerate()) - before:
        await asyncio.to_thread(thread.join)
