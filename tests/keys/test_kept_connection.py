"""A connection that stays open between changes tells what one that is opened anew would."""

import contextlib
import os
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edge.config.process_settings import KeysConfig
from edge.config.values import KeyStoreAddress
from edge.errors import Unusable
from edge.keys.stores import keyfile
from edge.keys.stores.administration import Actor, Registry, UnknownKey
from edge.keys.stores.keyfile import KeptConnection, KeyFileBusy, KeyFileError
from edge.keys.stores.registry import KeyRegistry
from edge.keys.stores.table import Registries
from tests.keys.keyfiles import USER, back_up, replace_by_another_database, restore

ACTOR = Actor("ops", "api", "10.0.0.9")


@pytest.fixture
def kept(path: Path) -> Iterator[KeptConnection]:
    with KeyRegistry(path) as registry:
        registry.create(USER, "first")
    with contextlib.closing(KeptConnection(path, busy_timeout_s=0.05)) as kept:
        yield kept


def over(kept: KeptConnection) -> KeyRegistry:
    return KeyRegistry(kept.path, kept=kept)


def names(kept: KeptConnection) -> list[str]:
    with over(kept) as registry:
        return [each.name for each in registry.list()]


def test_file_is_opened_once_for_many_changes(kept: KeptConnection) -> None:
    first = kept.open()
    for name in ("second", "third"):
        with over(kept) as registry:
            registry.create(USER, name)
    with pytest.raises(UnknownKey), over(kept) as registry:
        registry.revoke("key_000000000000")
    assert kept.open() is first
    assert names(kept) == ["first", "second", "third"]


def test_change_by_another_process_is_seen(kept: KeptConnection) -> None:
    assert names(kept) == ["first"]
    with KeyRegistry(kept.path) as registry:
        registry.create(USER, "theirs")
    assert names(kept) == ["first", "theirs"]


@pytest.mark.parametrize("put_back", [Path.replace, restore])  # another file takes the name, or it is written over
def test_copy_that_is_put_back_is_changed_instead(
    kept: KeptConnection, put_back: Callable[[Path, Path], object]
) -> None:
    copy = back_up(kept.path)
    with over(kept) as registry:
        registry.create(USER, "undone")
    put_back(copy, kept.path)
    with over(kept) as registry:
        registry.create(USER, "new")
    assert names(kept) == ["first", "new"]
    with KeyRegistry(kept.path) as registry:
        assert [each.name for each in registry.list()] == ["first", "new"]


def test_file_that_is_written_over_in_place_is_read_anew(kept: KeptConnection) -> None:
    copy = back_up(kept.path)
    with over(kept) as registry:
        registry.create(USER, "undone")
    kept.path.write_bytes(copy.read_bytes())
    assert names(kept) == ["first"]


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (Path.unlink, "is missing or empty"),
        (lambda path: os.truncate(path, 0), "is missing or empty"),
        (lambda path: path.write_bytes(b"x" * 8192), "cannot be used"),
        (replace_by_another_database, "is not a key store"),
        (lambda path: _set_version(path, 1000), "newer edge"),
    ],
)
def test_file_that_is_spoilt_is_refused_until_it_is_put_back(
    kept: KeptConnection, spoil: Callable[[Path], None], told: str
) -> None:
    copy = back_up(kept.path)
    assert names(kept) == ["first"]
    spoil(kept.path)
    for _ in range(2):
        with pytest.raises(KeyFileError, match=told):
            names(kept)
    for side in ("-wal", "-shm"):
        kept.path.with_name(kept.path.name + side).unlink(missing_ok=True)
    copy.replace(kept.path)
    assert names(kept) == ["first"]


def _set_version(path: Path, version: int) -> None:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA user_version = {version}")


def test_lock_that_lasts_fails_one_change_and_the_next_one_is_made(kept: KeptConnection) -> None:
    with contextlib.closing(sqlite3.connect(kept.path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(KeyFileBusy), over(kept) as registry:
            registry.create(USER, "second")
    with over(kept) as registry:
        registry.create(USER, "second")
    assert names(kept) == ["first", "second"]


def test_step_that_another_edge_took_does_not_end_the_changes_of_one_that_knows_it(
    kept: KeptConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert names(kept) == ["first"]
    monkeypatch.setattr(keyfile, "STEPS", (*keyfile.STEPS, ("CREATE TABLE more (id TEXT)",)))
    with over(kept) as registry:
        registry.create(USER, "second")
    assert names(kept) == ["first", "second"]


def test_store_of_a_reloaded_file_is_administered_instead(path: Path, tmp_path: Path) -> None:
    registries = Registries()

    def administer(where: Path) -> Registry:
        return registries.registry(KeysConfig(KeyStoreAddress(where)), ACTOR)

    with contextlib.closing(registries):
        for where in (path, tmp_path / "other.db"):
            with KeyRegistry(where) as made:
                made.create(USER, where.name)
            with administer(where) as registry:
                assert [each.name for each in registry.page()] == [where.name]
        with pytest.raises(Unusable), administer(tmp_path / "none.db"):
            pass
