"""What the embedded key store adds to what every store promises: its file, its faults, its administration."""

import asyncio
import contextlib
import json
import os
import re
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from edge.errors import KeyStoreUnavailable
from edge.keys.stores.protocol import AnswerUnusable, Changes, hash_key
from edge.keys.stores.sqlite import (
    KeyFileBusy,
    KeyFileError,
    KeyRecord,
    KeyRegistry,
    RevokedKey,
    SqliteKeyStore,
    UnknownKey,
    _KeyFile,
    parse_lifetime,
)
from edge.names import check_pattern

USER = "u-1100a15812cc"
WATCH_INTERVAL_S = 0.01


@dataclass
class Listener:
    """The owner of a store, who keeps what the store reports."""

    reports: asyncio.Queue[Changes] = field(default_factory=asyncio.Queue)

    def __call__(self, changes: Changes) -> None:
        self.reports.put_nowait(changes)

    async def hears_of(self, digests: set[bytes]) -> None:
        """Return when these digests were reported by name, in one report or more."""
        while digests:
            digests = digests - (await self.reports.get()).digests

    async def hears_of_everything(self) -> None:
        while not (await self.reports.get()).everything:
            pass


@contextlib.asynccontextmanager
async def serving(path: Path) -> AsyncIterator[tuple[SqliteKeyStore, Listener]]:
    store, listener = SqliteKeyStore(path, watch_interval_s=WATCH_INTERVAL_S), Listener()
    store.changed = listener
    await store.open()
    try:
        yield store, listener
    finally:
        await store.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.db"


@pytest.fixture
def registry(path: Path) -> Iterator[KeyRegistry]:
    with KeyRegistry(path) as opened:
        yield opened


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


# --- the embedded store: other processes and faults of the file -----------------------------------------------------


async def test_revocation_by_another_process_reaches_every_store(path: Path, registry: KeyRegistry) -> None:
    """`edge keys revoke` is a process of its own; every serving process hears it without a restart."""
    key, record = registry.create(USER)
    async with serving(path) as (store, listener), serving(path) as (other_store, other_listener):
        code = "import sys, pathlib; from edge.keys.stores.sqlite import KeyRegistry\n"
        code += "with KeyRegistry(pathlib.Path(sys.argv[1])) as registry: registry.revoke(sys.argv[2])"
        finish(script(code, path, record.id))

        await listener.hears_of({hash_key(key)})
        await other_listener.hears_of({hash_key(key)})

        assert await store.look_up(hash_key(key), key) is None
        assert await other_store.look_up(hash_key(key), key) is None


async def test_burst_of_changes_is_reported_by_name(path: Path) -> None:
    """However commits and looks fall together, no change is missed and none makes the owner forget everything."""
    code = "import sys, pathlib; from edge.keys.stores.sqlite import KeyRegistry\n"
    code += "with KeyRegistry(pathlib.Path(sys.argv[1])) as registry:\n"
    code += "    for _ in range(200): print(registry.create('u-1')[0])"
    async with serving(path) as (store, listener):
        everything = False

        def note(changes: Changes) -> None:
            nonlocal everything
            everything = everything or changes.everything
            listener(changes)

        store.changed = note
        keys = (await asyncio.to_thread(finish, script(code, path))).split()
        await listener.hears_of({hash_key(key) for key in keys})

    assert not everything


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


def back_up(path: Path) -> Path:
    """Copy a key store as an operator would, and return where the copy is."""
    copy = path.with_suffix(".backup")
    with contextlib.closing(sqlite3.connect(path)) as source, contextlib.closing(sqlite3.connect(copy)) as target:
        source.backup(target)
    return copy


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


def replace_by_another_database(path: Path) -> None:
    other = path.with_suffix(".other")
    with contextlib.closing(sqlite3.connect(other)) as connection:
        connection.execute("CREATE TABLE visits (page TEXT)")
    other.replace(path)


def replace_by_a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


FAULTS = [delete, replace_by_garbage, overwrite_with_garbage, replace_by_another_database, replace_by_a_directory]


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
    file.open(create=False)
    with contextlib.closing(file), contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("UPDATE keys SET enabled = 0, revision = 2")
        assert file.changes() == Changes(frozenset((hash_key(key),)))
        other.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        assert file.changes() is None
        other.execute("UPDATE keys SET enabled = 1")
        looks = [file.changes() for _ in range(20)]
        assert [each for each in looks if each is not None] == [Changes(everything=True)], "made by hand"


def test_change_made_by_hand_is_not_lost_behind_a_regular_one(path: Path) -> None:
    make_key(path)
    file = _KeyFile(path)
    file.open(create=False)
    with contextlib.closing(file), contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("UPDATE keys SET enabled = 0")
        assert file.changes() is None, "it may be a commit that is to come"
        make_key(path)
        assert file.changes() == Changes(everything=True)
        make_key(path)
        told = file.changes()
        assert told is not None
        assert not told.everything


def restore(copy: Path, path: Path) -> None:
    """Write a copy over a key store in place, as `.restore` does."""
    with contextlib.closing(sqlite3.connect(copy)) as source, contextlib.closing(sqlite3.connect(path)) as target:
        source.backup(target)


@pytest.mark.parametrize("as_many", ["keys", "users"])
async def test_backup_of_another_history_reports_everything_although_it_is_further_on(
    path: Path, registry: KeyRegistry, as_many: str
) -> None:
    """Monday's backup, a change, and Tuesday's: the revision that was seen is in both, and means another change."""
    key, record = registry.create(USER)
    monday = back_up(path).rename(path.with_name("monday"))
    registry.revoke(record.id)
    registry.disable_user("u-x")
    registry.disable_user("u-y")
    tuesday = back_up(path)
    async with serving(path) as (store, listener):
        restore(monday, path)
        await listener.hears_of_everything()
        if as_many == "keys":
            made = {hash_key(registry.create(USER)[0]) for _ in range(2)}
            await listener.hears_of(made)
        else:  # the very change that has this revision in the other history
            registry.disable(record.id)
            registry.disable_user("u-x")
            heard: set[str] = set()
            while "u-x" not in heard:
                heard |= (await listener.reports.get()).users
        restore(tuesday, path)
        await listener.hears_of_everything()

        assert await store.look_up(hash_key(key), key) is None


async def test_backup_restored_in_place_reports_everything(path: Path, registry: KeyRegistry) -> None:
    """Going back in time makes no newer revision, yet every kept answer may be wrong."""
    registry.create(USER)
    copy = back_up(path)
    key, _ = registry.create(USER)
    async with serving(path) as (store, listener):
        restore(copy, path)
        await listener.hears_of_everything()

        assert await store.look_up(hash_key(key), key) is None


async def test_outage_is_told_once_on_each_side(path: Path) -> None:
    """One word when the store goes and one when it is back, however often it is asked."""
    make_key(path)
    copy = back_up(path)
    told: list[str] = []
    async with serving(path) as (store, listener):
        store.outage = told.append
        delete(path)
        for _ in range(3):
            with pytest.raises(KeyStoreUnavailable):
                await store.look_up(hash_key("sk-any"), "sk-any")
        for side_file in path.parent.glob("keys.db-*"):
            side_file.unlink()
        os.link(copy, path)
        await listener.hears_of_everything()

    assert [bool(reason) for reason in told] == [True, False]


async def test_neither_key_nor_digest_is_shown(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What a person or a log can see of a key is its id."""
    with KeyRegistry(path) as registry:
        key, record = registry.create(USER)
        with pytest.raises(UnknownKey) as mistaken:
            registry.revoke(key)
    shown = [repr(record), json.dumps(record.as_json()), repr(Changes(frozenset([hash_key(key)])))]
    stored = path.read_bytes()
    async with serving(path) as (store, _):
        shown.append(repr(store))
        replace_by_garbage(path)
        with pytest.raises(KeyStoreUnavailable) as unavailable:
            await store.look_up(hash_key(key), key)

    shown += [repr(mistaken.value), repr(unavailable.value), unavailable.value.body().decode(), caplog.text]
    for text in shown:
        assert key not in text
        assert hash_key(key).hex() not in text
        assert repr(hash_key(key)) not in text
    assert str(path) not in unavailable.value.message
    assert key.encode() not in stored


# --- the embedded store: opening the file ---------------------------------------------------------------------------


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


async def test_store_that_failed_to_open_can_be_opened_later(tmp_path: Path) -> None:
    """A failed start leaves nothing behind: no thread, no lock, no half-open state."""
    store = SqliteKeyStore(tmp_path / "later" / "keys.db")
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
        opening = group.create_task(SqliteKeyStore(path).open())
        await asyncio.sleep(0)  # the task runs to its await
        opening.cancel()

    for thread in set(threading.enumerate()) - before:
        await asyncio.to_thread(thread.join)


# --- the embedded store: administration -------------------------------------------------------------------------------


def test_key_is_sk_and_45_of_the_url_safe_alphabet(registry: KeyRegistry) -> None:
    """270 random bits; the shape is what clients and secret scanners know."""
    keys = [registry.create(USER)[0] for _ in range(50)]

    assert all(re.fullmatch(r"sk-[A-Za-z0-9_-]{45}", key) for key in keys)
    assert len(set(keys)) == 50
    assert len(set("".join(key[3:] for key in keys))) == 64


def test_key_id_is_key_and_12_lower_case_characters(registry: KeyRegistry) -> None:
    """An id is what stands in logs and usage records in place of the key."""
    _, record = registry.create(USER)

    assert re.fullmatch(r"key_[a-z0-9]{12}", record.id)


def test_only_the_digest_is_stored(path: Path, registry: KeyRegistry) -> None:
    """A key is shown once; the store has its SHA-256."""
    key, _ = registry.create(USER)

    with contextlib.closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT digest FROM keys").fetchall() == [(hash_key(key),)]


def test_keys_are_listed_in_the_order_they_were_created(registry: KeyRegistry) -> None:
    """The order holds when the clock is set back in between."""
    _, first = registry.create(USER, now=lambda: 30.0)
    _, second = registry.create(USER, now=lambda: 10.0)
    _, third = registry.create(USER, now=lambda: 20.0)

    assert registry.list() == [first, second, third]


def test_record_in_json_has_its_fields_in_order_and_times_in_utc(registry: KeyRegistry) -> None:
    """Scripts read `edge keys list --json`; times are RFC 3339."""
    _, record = registry.create(USER, "ci", allow=["public/*"], expires_in_s=3600, now=lambda: 1_700_000_000.75)

    assert list(record.as_json().items()) == [
        ("id", record.id),
        ("user", USER),
        ("name", "ci"),
        ("allow", ("public/*",)),
        ("deny", ()),
        ("enabled", True),
        ("suspended", False),
        ("out_of_quota", False),
        ("expires_at", "2023-11-14T23:13:20Z"),
        ("limit", None),
        ("created_at", "2023-11-14T22:13:20Z"),
    ]


def test_record_without_expiry_has_null_in_json() -> None:
    """A key without end has no date in a far future that a script could take at its word."""
    assert KeyRecord(id="key_000000000000", user=USER, created_at=0.0).as_json()["expires_at"] is None


def test_revoked_key_is_not_listed_and_never_comes_back(registry: KeyRegistry) -> None:
    """Revocation is for good."""
    _, record = registry.create(USER)
    registry.revoke(record.id)

    assert registry.list() == []
    for again in (registry.enable, registry.disable, registry.revoke):
        with pytest.raises(RevokedKey, match=f"{record.id} is revoked .* create a new key"):
            again(record.id)


def test_disabled_key_can_be_enabled_again(registry: KeyRegistry) -> None:
    """Disabling is for a while."""
    _, record = registry.create(USER)

    registry.disable(record.id)
    assert [key.enabled for key in registry.list()] == [False]
    registry.enable(record.id)
    assert [key.enabled for key in registry.list()] == [True]


def test_user_is_suspended_and_let_in_again_without_touching_the_keys(registry: KeyRegistry) -> None:
    """A key that was disabled for its own reason stays so when its user is let in again."""
    registry.create(USER)
    _, disabled = registry.create(USER)
    registry.disable(disabled.id)

    assert registry.disable_user(USER) == 2
    assert [(key.enabled, key.suspended) for key in registry.list()] == [(True, True), (False, True)]
    assert registry.enable_user(USER) == 2
    assert [(key.enabled, key.suspended) for key in registry.list()] == [(True, False), (False, False)]


def test_suspension_of_a_user_without_keys_says_so(registry: KeyRegistry) -> None:
    """It holds for later keys; 0 lets the command warn of a misspelt name."""
    assert registry.disable_user("u-nobody") == 0


@pytest.mark.parametrize("change", [KeyRegistry.revoke, KeyRegistry.enable, KeyRegistry.disable])
def test_unknown_id_is_refused(registry: KeyRegistry, change: Callable[[KeyRegistry, str], None]) -> None:
    """The message names the command that shows which ids exist."""
    with pytest.raises(UnknownKey, match="key_000000000000: `edge keys list`"):
        change(registry, "key_000000000000")


@pytest.mark.parametrize("user", ["", "U-1", "u_1", "-u", "u-", "u/1", "u.1", "u-é", "a" * 64, "u-1\n"])
def test_user_that_is_no_dns_label_is_refused(registry: KeyRegistry, user: str) -> None:
    """The user becomes part of host names: RFC 1123 section 2.1."""
    with pytest.raises(ValueError, match="DNS label"):
        registry.create(user)
    with pytest.raises(ValueError, match="DNS label"):
        registry.disable_user(user)


@pytest.mark.parametrize("user", ["u", "u-1100a15812cc", "7", "a" * 63])
def test_user_that_is_a_dns_label_is_taken(registry: KeyRegistry, user: str) -> None:
    """1 to 63 characters."""
    assert registry.create(user)[1].user == user


@pytest.mark.parametrize("expires_in_s", [0, -1, float("nan"), float("inf"), 1e12])
def test_lifetime_out_of_range_is_refused(registry: KeyRegistry, expires_in_s: float) -> None:
    """A key that never lived or a date no clock can print is a mistake."""
    with pytest.raises(ValueError, match="more than 0 s and at most 100 years"):
        registry.create(USER, expires_in_s=expires_in_s)


def test_limit_of_a_key_is_kept(registry: KeyRegistry) -> None:
    _, record = registry.create(USER, limit="standard")
    assert (record.limit, registry.list()[0].limit) == ("standard", "standard")


def test_name_of_more_than_one_line_is_refused(registry: KeyRegistry) -> None:
    """Names stand in tables and logs."""
    with pytest.raises(ValueError, match="one line"):
        registry.create(USER, "a\nb")


def test_refused_key_leaves_nothing_behind(registry: KeyRegistry) -> None:
    """Everything is checked before anything is written."""
    with pytest.raises(ValueError, match="pattern"):
        registry.create(USER, allow=["public/*"], deny=["a b"])

    assert registry.list() == []


def test_lock_that_lasts_is_told_from_a_damaged_file(path: Path, registry: KeyRegistry) -> None:
    """The advice for a lock is to end what holds it, not to restore a backup."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as holder:
        holder.execute("BEGIN IMMEDIATE")
        with (
            KeyRegistry(path, busy_timeout_s=0.01) as hasty,
            pytest.raises(KeyFileBusy, match="locked by another process: end what holds it"),
        ):
            hasty.create(USER)


def test_processes_that_create_keys_in_a_new_file_at_once_lose_none(path: Path) -> None:
    """The first command of several may race to make the file; every change has a revision of its own."""
    code = "import sys, pathlib; from edge.keys.stores.sqlite import KeyRegistry\n"
    code += "print('ready', flush=True); sys.stdin.readline()\n"
    code += "with KeyRegistry(pathlib.Path(sys.argv[1]), busy_timeout_s=60) as registry:\n"
    code += "    for _ in range(20): print(registry.create('u-1')[1].id)"
    processes = [script(code, path) for _ in range(6)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()

    printed = [key_id for process in processes for key_id in finish(process).split()]

    with KeyRegistry(path) as registry:
        assert sorted(record.id for record in registry.list()) == sorted(printed)
    with contextlib.closing(sqlite3.connect(path)) as connection:
        revisions = connection.execute("SELECT revision FROM keys ORDER BY revision").fetchall()
    assert revisions == [(number,) for number in range(1, 121)]


# --- patterns, lifetimes, digests -------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["public/*", "**", "*/*", "u-1/**", "public/qwen2.5-*", "a:b@c+d~e"])
def test_pattern_of_names_and_globs_is_taken(pattern: str) -> None:
    """Model names are visible ASCII; the globs are * and **."""
    check_pattern(pattern)


@pytest.mark.parametrize(
    ("pattern", "advice"),
    [
        ("", "write ** for every name"),
        ("public/a public/b", "one pattern per value"),
        ("public/é", "visible ASCII"),
        ("public/\x7f", "visible ASCII"),
        ("public/***", "write * for one level"),
        ("public/?", "the globs are * and **"),
        ("public/[ab]", "the globs are"),
        ("public/a,public/b", "several patterns are several values"),
        ("!public/a", "what is excluded is a deny pattern"),
    ],
)
def test_pattern_that_would_never_match_is_refused_with_advice(pattern: str, advice: str) -> None:
    """A pattern that silently matches nothing is worse than an error: as a deny it would let in."""
    with pytest.raises(ValueError, match=re.escape(advice)):
        check_pattern(pattern)


@pytest.mark.parametrize(
    ("text", "seconds"), [("45s", 45), ("30m", 1800), ("12h", 43_200), ("30d", 2_592_000), ("2w", 1_209_600)]
)
def test_lifetime_is_a_number_and_a_unit(text: str, seconds: int) -> None:
    """s, m, h, d, w."""
    assert parse_lifetime(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "30", "d", "0d", "-1d", "1.5h", "30 d", "30D", "1y", "30d\n", "٣d", "9999999999d"]
)
def test_anything_else_is_no_lifetime(text: str) -> None:
    """The message shows how to write one."""
    with pytest.raises(ValueError, match="such as 30d"):
        parse_lifetime(text)
