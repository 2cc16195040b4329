"""The administering side of the embedded store."""

import contextlib
import os
import re
import shutil
import sqlite3
import stat
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from edge.keys.stores import keyfile
from edge.keys.stores.administration import KeyRecord, RevokedKey, UnknownKey, parse_lifetime
from edge.keys.stores.backup import restore
from edge.keys.stores.keyfile import KeyFileBusy, KeyFileError
from edge.keys.stores.protocol import hash_key
from edge.keys.stores.registry import KeyRegistry
from edge.names import check_pattern
from tests.keys.keyfiles import USER, back_up, finish, make_key, replace_by_another_database, script, serving


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
        ("share", None),
        ("created_at", "2023-11-14T22:13:20Z"),
        ("last_used_at", None),
        ("revoked", False),
        ("revoked_at", None),
        ("replaced_by", None),
    ]


def test_record_without_expiry_has_null_in_json() -> None:
    """A key without end has no date in a far future that a script could take at its word."""
    assert KeyRecord(id="key_000000000000", user=USER, created_at=0.0).as_json()["expires_at"] is None


def test_revoked_key_is_not_listed_and_never_comes_back(registry: KeyRegistry) -> None:
    """Revocation is for good."""
    _, record = registry.create(USER)
    registry.revoke(record.id)

    assert registry.list() == []
    changes = (partial(registry.change, enabled=each) for each in (True, False))
    for again in (*changes, registry.revoke):
        with pytest.raises(RevokedKey, match=f"{record.id} is revoked .* create a new key"):
            again(record.id)


def test_disabled_key_can_be_enabled_again(registry: KeyRegistry) -> None:
    """Disabling is for a while."""
    _, record = registry.create(USER)

    registry.change(record.id, enabled=False)
    assert [key.enabled for key in registry.list()] == [False]
    registry.change(record.id, enabled=True)
    assert [key.enabled for key in registry.list()] == [True]


def test_user_is_suspended_and_let_in_again_without_touching_the_keys(registry: KeyRegistry) -> None:
    """A key that was disabled for its own reason stays so when its user is let in again."""
    registry.create(USER)
    _, disabled = registry.create(USER)
    registry.change(disabled.id, enabled=False)

    assert registry.mark_user(USER, suspended=True) == 2
    assert [(key.enabled, key.suspended) for key in registry.list()] == [(True, True), (False, True)]
    assert registry.mark_user(USER, suspended=False) == 2
    assert [(key.enabled, key.suspended) for key in registry.list()] == [(True, False), (False, False)]


def test_suspension_of_a_user_without_keys_says_so(registry: KeyRegistry) -> None:
    """It holds for later keys; 0 lets the command warn of a misspelt name."""
    assert registry.mark_user("u-nobody", suspended=True) == 0


@pytest.mark.parametrize(
    "change", [KeyRegistry.revoke, *(partial(KeyRegistry.change, enabled=each) for each in (True, False))]
)
def test_unknown_id_is_refused(registry: KeyRegistry, change: Callable[[KeyRegistry, str], object]) -> None:
    """The message names the command that shows which ids exist."""
    with pytest.raises(UnknownKey, match="key_000000000000: `edge keys list`"):
        change(registry, "key_000000000000")


@pytest.mark.parametrize("user", ["", "U-1", "u_1", "-u", "u-", "u/1", "u.1", "u-é", "a" * 64, "u-1\n"])
def test_user_that_is_no_dns_label_is_refused(registry: KeyRegistry, user: str) -> None:
    """The user becomes part of host names: RFC 1123 section 2.1."""
    with pytest.raises(ValueError, match="DNS label"):
        registry.create(user)
    with pytest.raises(ValueError, match="DNS label"):
        registry.mark_user(user, suspended=True)


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
    code = "import sys, pathlib; from edge.keys.stores.registry import KeyRegistry\n"
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
    ("text", "seconds"),
    [
        ("45s", 45),
        ("30m", 1800),
        ("1.5h", 5400),
        ("12h", 43_200),
        ("30d", 2_592_000),
        ("2w", 1_209_600),
        ("36500d", 3_153_600_000),
    ],
)
def test_lifetime_is_written_as_every_duration_is(text: str, seconds: int) -> None:
    assert parse_lifetime(text) == seconds


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        *((each, "not a duration: write a number and") for each in ("", "30", "d", "-1d", "1y")),
        *((each, 'not a duration: write "30d"') for each in ("30 d", "30D", "30d\n")),
        ("٣d", "not a duration: write a number and"),
        ("0d", "write whole seconds, one or more"),
        ("999ms", "write whole seconds, one or more"),
        ("1.5s", "write whole seconds, one or more"),
        ("36500.1d", 'too long: write at most "36500d"'),
        ("9999999999d", 'too long: write at most "36500d"'),
    ],
)
def test_anything_else_is_no_lifetime(text: str, advice: str) -> None:
    """The message shows how to write one."""
    with pytest.raises(ValueError, match=advice):
        parse_lifetime(text)


# --- a backup that is restored


async def test_running_store_serves_what_was_restored(path: Path, registry: KeyRegistry) -> None:
    """The keys of the backup and no others; what was revoked since works again."""
    key, record = registry.create(USER)
    registry.create("u-2200b")
    registry.create(USER)
    copy = back_up(path)
    registry.revoke(record.id)
    new, _ = registry.create(USER)
    registry.mark_user(USER, suspended=True)
    async with serving(path) as (store, listener):
        assert await store.look_up(hash_key(key), key) is None

        assert restore(path, copy) == (3, 2)
        await listener.hears_of_everything()

        found = await store.look_up(hash_key(key), key)
        assert found is not None
        assert not found.suspended
        assert await store.look_up(hash_key(new), new) is None
        assert listener.outages == []
        assert path.with_name("keys.db-wal").stat().st_size == 0
        made, _ = registry.create(USER)
        assert await store.look_up(hash_key(made), made) is not None
    assert list(path.parent.glob(f"{copy.name}?*")) == [], "nothing is left beside the backup"


async def test_store_whose_file_is_missing_serves_what_was_restored(path: Path) -> None:
    """And until it does, nobody is refused for good: an empty file is no key store that knows nobody."""
    key = make_key(path)
    copy = back_up(path)
    async with serving(path) as (store, listener):
        for each in path.parent.glob("keys.db*"):
            if each != copy:
                each.unlink()
        await listener.until(lambda: any(listener.outages))

        assert restore(path, copy) == (1, 1)
        await listener.hears_of_everything()

        assert await store.look_up(hash_key(key), key) is not None
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_backup_with_commits_beside_it_is_restored_with_them(path: Path, tmp_path: Path) -> None:
    """As a copy of the files of a running store is, or a snapshot of its disk."""
    with KeyRegistry(path) as registry, contextlib.closing(sqlite3.connect(path, isolation_level=None)) as reader:
        registry.create(USER)
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM keys").fetchone()  # who reads keeps the WAL from being emptied
        registry.create(USER)
        snapshot = tmp_path / "snapshot"
        snapshot.mkdir()
        for each in (path, path.with_name("keys.db-wal")):
            shutil.copy(each, snapshot)
    assert (snapshot / "keys.db-wal").stat().st_size > 0

    assert restore(tmp_path / "other.db", snapshot / "keys.db") == (2, 1)


def test_key_store_restored_from_itself_stays_as_it_is(path: Path, registry: KeyRegistry) -> None:
    registry.create(USER)
    before = registry.list()

    assert restore(path, path) == (1, 1)

    assert registry.list() == before


def test_backup_of_an_older_edge_takes_its_steps_on_the_way(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backup itself stays as it is."""
    make_key(path)
    copy = back_up(path)
    before = copy.read_bytes()
    monkeypatch.setattr(keyfile, "STEPS", (*keyfile.STEPS, ("ALTER TABLE keys ADD COLUMN note TEXT",)))

    assert restore(path, copy) == (1, 1)

    assert copy.read_bytes() == before
    with contextlib.closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT note FROM keys").fetchall() == [(None,)]


def garbage(copy: Path) -> None:
    copy.write_bytes(os.urandom(8192))


def truncated(copy: Path) -> None:
    copy.write_bytes(copy.read_bytes()[:-4096])


def damaged_inside(copy: Path) -> None:
    content = bytearray(copy.read_bytes())
    content[4096:8192] = os.urandom(4096)
    copy.write_bytes(content)


def another_program(copy: Path) -> None:
    with contextlib.closing(sqlite3.connect(copy)) as connection:
        connection.executescript("DROP TABLE keys; PRAGMA user_version = 1")


def without_a_version(copy: Path) -> None:
    with contextlib.closing(sqlite3.connect(copy)) as connection:
        connection.execute("PRAGMA user_version = 0")


def newer(copy: Path) -> None:
    with contextlib.closing(sqlite3.connect(copy)) as connection:
        connection.execute("PRAGMA user_version = 99")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (Path.unlink, r"is no backup of a key store \(unable to open database file\): name another file"),
        (lambda copy: copy.write_bytes(b""), r"is no backup of a key store \(it has no schema version\)"),
        (garbage, r"is no backup of a key store \(file is not a database\)"),
        (truncated, "is no backup of a key store"),
        (damaged_inside, "is no backup of a key store"),
        (another_program, r"is no backup of a key store \(no such table: main\.keys\)"),
        (without_a_version, r"is no backup of a key store \(it has no schema version\)"),
        (newer, rf"was written by a newer edge \(schema 99, this one knows {len(keyfile.STEPS)}\): upgrade this edge"),
    ],
)
def test_what_is_no_backup_is_refused_and_changes_nothing(
    path: Path, spoil: Callable[[Path], object], message: str
) -> None:
    make_key(path)
    copy = back_up(path)
    spoil(copy)
    before = path.read_bytes()

    with pytest.raises(KeyFileError, match=f"^{re.escape(str(copy))} {message}"):
        restore(path, copy)

    assert path.read_bytes() == before


def test_file_that_is_no_key_store_is_not_written_over(path: Path, tmp_path: Path) -> None:
    """Whoever names the wrong file in the configuration must not lose it."""
    make_key(path)
    copy = back_up(path)
    replace_by_another_database(path)

    with pytest.raises(KeyFileError, match=r"is not a key store: change keys\.store"):
        restore(path, copy)

    path.write_bytes(os.urandom(8192))
    with pytest.raises(KeyFileError, match="move it away and restore a backup"):
        restore(path, copy)


def test_restore_waits_for_no_lock_for_ever(path: Path) -> None:
    make_key(path)
    copy = back_up(path)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as holder:
        holder.execute("BEGIN IMMEDIATE")
        with pytest.raises(KeyFileBusy, match=re.escape(f"{path} is locked by another process")):
            restore(path, copy, busy_timeout_s=0.01)
    with contextlib.closing(sqlite3.connect(copy, isolation_level=None)) as holder:
        holder.execute("PRAGMA locking_mode = EXCLUSIVE")
        holder.execute("BEGIN EXCLUSIVE")
        with pytest.raises(KeyFileBusy, match=re.escape(f"{copy} is locked by another process")):
            restore(path, copy)
