"""What administers keys, one suite over every place where this edge may change them."""

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edge.config.process_settings import KeysConfig
from edge.config.values import KeyStoreAddress
from edge.errors import Unusable
from edge.keys.stores.administration import (
    Actor,
    Idempotency,
    IdempotencyReused,
    ReadOnlyStore,
    Registry,
    RevokedKey,
    Unchangeable,
    UnknownKey,
)
from edge.keys.stores.backup import restore
from edge.keys.stores.protocol import hash_key
from edge.keys.stores.registry import KeyRegistry
from edge.keys.stores.table import key_store, registry_of
from tests.keybackends import ValkeyServer
from tests.keys.keyfiles import back_up

USER = "u-1100a15812cc"
ACTOR = Actor("ops", "api", "10.0.0.9")
Open = Callable[..., Registry]


@pytest.fixture(params=["sqlite", "redis"])
def config(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[KeysConfig]:
    if request.param == "sqlite":
        yield KeysConfig(KeyStoreAddress(tmp_path / "keys.db"))
        return
    server = ValkeyServer(tmp_path)
    server.start()
    yield KeysConfig(KeyStoreAddress(url=server.url))
    server.stop()


@pytest.fixture
def registry(config: KeysConfig) -> Iterator[Registry]:
    with registry_of(config, ACTOR, makes=True) as opened:
        yield opened


def request(name: bytes = b"n" * 32, body: bytes = b"b" * 32, secret: bytes = b"token") -> Idempotency:
    return Idempotency(name, body, secret)


async def test_what_is_changed_is_what_the_edge_looks_up(config: KeysConfig, registry: Registry) -> None:
    store = key_store(config)
    await store.open()
    try:
        key, made = registry.create(USER, "ci", allow=["public/*"], limit="standard", share=4, expires_in_s=3600)
        found = await store.look_up(hash_key(key), key)
        assert found is not None
        assert (found.id, found.name, found.allow, found.limit) == (made.id, "ci", ("public/*",), "standard")
        assert found.share == 4
        assert found.expires_at == pytest.approx(made.expires_at)
        registry.change(made.id, name="new", allow=[], deny=["public/x"], enabled=False, expires_at=None, limit=None)
        registry.change(made.id, share=None)
        registry.mark_user(USER, suspended=True)
        found = await store.look_up(hash_key(key), key)
        assert found is not None
        assert (found.name, found.allow, found.deny, found.enabled) == ("new", (), ("public/x",), False)
        assert (found.expires_at, found.limit, found.suspended, found.share) == (None, None, True, None)
        assert registry.change(made.id, share=9).share == 9
        found = await store.look_up(hash_key(key), key)
        assert found is not None
        assert found.share == 9
        registry.revoke(made.id)
        assert await store.look_up(hash_key(key), key) is None
    finally:
        await store.close()


def test_pages_follow_each_other_in_the_order_of_creation_and_miss_none(registry: Registry) -> None:
    """Of one user without those of others, also behind a key that was revoked meanwhile."""
    ids = [registry.create(user)[1].id for user in (USER, "u-2", USER, "u-2", USER)]
    registry.revoke(ids[2])
    assert [each.id for each in registry.page()] == [ids[0], ids[1], ids[3], ids[4]]
    assert [each.id for each in registry.page(USER, revoked=True)] == [ids[0], ids[2], ids[4]]
    assert [each.id for each in registry.page(USER, ids[2], 1)] == [ids[4]]
    assert [each.id for each in registry.page(None, ids[0], 2)] == [ids[1], ids[3]]
    assert list(registry.page("u-3")) == []
    with pytest.raises(UnknownKey):
        registry.page(after="key_000000000000")


def test_revoked_key_stays_to_be_seen_and_cannot_be_changed(registry: Registry) -> None:
    _, made = registry.create(USER)
    gone = registry.revoke(made.id)
    assert (gone.revoked, gone.revoked_at is not None) == (True, True)
    assert registry.find(made.id) == gone
    for change in (
        registry.revoke,
        lambda key_id: registry.change(key_id, name="x"),
        lambda key_id: registry.rotate(key_id, 0),
    ):
        with pytest.raises(RevokedKey):
            change(made.id)
    with pytest.raises(UnknownKey):
        registry.find("key_000000000000")


def test_rotated_key_has_a_successor_like_it_and_ends_after_its_grace(registry: Registry) -> None:
    _, old = registry.create(
        USER, "ci", allow=["public/*"], deny=["public/x"], limit="standard", share=3, expires_in_s=7200
    )
    key, new = registry.rotate(old.id, 3600)
    before = registry.find(old.id)
    assert before.replaced_by == new.id != old.id
    assert before.expires_at is not None
    assert new.created_at is not None
    assert new.expires_at is not None
    assert before.expires_at == pytest.approx(new.created_at + 3600, abs=1)
    assert new.expires_at - new.created_at == pytest.approx(7200)
    assert (new.user, new.name, new.allow, new.deny, new.limit) == (USER, "ci", old.allow, old.deny, "standard")
    assert new.share == 3
    assert key.startswith("sk-")
    with pytest.raises(Unchangeable, match=f"rotate {new.id}"):
        registry.rotate(old.id, 0)
    registry.change(new.id, enabled=False)
    with pytest.raises(Unchangeable, match="enable it"):
        registry.rotate(new.id, 0)


def test_grace_lengthens_no_life(registry: Registry) -> None:
    _, old = registry.create(USER, expires_in_s=60)
    registry.rotate(old.id, 3600)
    assert registry.find(old.id).expires_at == pytest.approx(old.expires_at)


def test_request_that_comes_again_gets_the_same_key_and_no_other_is_made(registry: Registry) -> None:
    key, made = registry.create(USER, idempotency=request())
    assert registry.create(USER, idempotency=request()) == (key, made)
    successor, new = registry.rotate(made.id, 60, idempotency=request(b"r" * 32))
    assert registry.rotate(made.id, 60, idempotency=request(b"r" * 32)) == (successor, new)
    assert len(registry.page()) == 2


def test_request_that_asks_for_something_else_by_the_same_name_is_refused(registry: Registry) -> None:
    _, made = registry.create(USER, idempotency=request())
    with pytest.raises(IdempotencyReused, match="another request"):
        registry.create(USER, idempotency=request(body=b"c" * 32))
    with pytest.raises(IdempotencyReused, match=made.id):
        registry.create(USER, idempotency=request(secret=b"another token"))


def test_requests_at_once_by_one_name_make_one_key(config: KeysConfig, registry: Registry) -> None:
    made: list[str] = []

    def create() -> None:
        with registry_of(config, ACTOR) as own:
            made.append(own.create(USER, idempotency=request())[0])

    registry.create("u-2")
    threads = [threading.Thread(target=create) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 4
    assert len(set(made)) == 1
    assert len(registry.page(USER)) == 1


def test_user_is_marked_one_thing_at_a_time(registry: Registry) -> None:
    registry.create(USER)
    assert registry.mark_user(USER, suspended=True) == 1
    assert registry.mark_user(USER, out_of_quota=True) == 1
    state, keys = registry.find_user(USER)
    assert (state.suspended, state.out_of_quota, keys) == (True, True, 1)
    assert registry.page(USER)[0].suspended
    with pytest.raises(ValueError, match="DNS label"):
        registry.mark_user("../etc", suspended=True)


def test_use_is_noted_of_keys_alone_and_changes_no_key(registry: Registry) -> None:
    _, made = registry.create(USER)
    registry.note_used([made.id], 1_700_000_040.0)
    assert registry.find(made.id).last_used_at == 1_700_000_040.0


def test_every_change_has_a_line_that_says_who_and_what_and_holds_no_key(registry: Registry) -> None:
    key, made = registry.create(USER, "ci", limit="standard")
    registry.change(made.id, enabled=False, expires_at=1_900_000_000.0)
    registry.change(made.id, enabled=True)
    successor, new = registry.rotate(made.id, 0)
    registry.revoke(new.id)
    registry.mark_user(USER, suspended=True)
    lines = list(registry.audit())
    assert [(line["action"], line["key_id"]) for line in lines] == [
        ("create", made.id), ("change", made.id), ("change", made.id), ("rotate", made.id), ("revoke", new.id),
        ("mark user", None),
    ]  # fmt: skip
    assert {(line["actor"], line["via"], line["address"], line["user"]) for line in lines} == {(*ACTOR, USER)}
    assert lines[0]["changed"] == {"name": "ci", "limit": "standard"}
    assert lines[1]["changed"] == {"enabled": False, "expires_at": "2030-03-17T17:46:40Z"}
    assert lines[3]["changed"]["replaced_by"] == new.id
    shown = json.dumps(lines)
    for secret in (key, successor):
        assert secret not in shown
        assert hash_key(secret).hex() not in shown
    assert list(registry.audit(since=4e9)) == []


def test_what_no_key_may_have_changes_nothing(registry: Registry) -> None:
    _, made = registry.create(USER)
    wrong: list[dict[str, Any]] = [{"name": "a\nb"}, {"name": "a" * 257}, {"allow": ["a b"]}, {"deny": ["a"] * 101}]
    for changes in wrong:
        with pytest.raises(ValueError, match=r"\w"):
            registry.change(made.id, **changes)
        with pytest.raises(ValueError, match=r"\w"):
            registry.create(USER, **changes)
    assert list(registry.page()) == [made]


def test_store_without_keys_is_not_begun_by_who_may_not(config: KeysConfig) -> None:
    """A Redis that came back empty, or a file that vanished, has lost its keys: one new key would hide that."""
    with pytest.raises(Unusable, match="edge keys init"), registry_of(config, ACTOR) as registry:
        registry.create(USER)


def test_store_of_somebody_else_is_read_only_and_says_so() -> None:
    with pytest.raises(ReadOnlyStore, match="made and listed there"):
        registry_of(KeysConfig(KeyStoreAddress(url="https://console.example/introspect")))


# --- what one of them has alone


def test_audit_outlives_a_restore_and_cannot_be_changed(tmp_path: Path) -> None:
    import sqlite3

    path = tmp_path / "keys.db"
    with KeyRegistry(path, actor=ACTOR) as registry:
        _, first = registry.create(USER)
        copy = back_up(path)
        registry.revoke(first.id)
        restore(path, copy)
        assert [line["action"] for line in registry.audit()] == ["create", "revoke", "restore"]
        assert not registry.find(first.id).revoked
        for statement in ("DELETE FROM audit", "UPDATE audit SET line = ''"):
            with pytest.raises(sqlite3.IntegrityError, match="never changed"):
                registry._connection.execute(statement)


def test_key_recorded_by_hand_is_in_the_index_after_init(tmp_path: Path) -> None:
    from edge.keys.stores.redis_registry import RedisRegistry

    server = ValkeyServer(tmp_path)
    server.start()
    try:
        with server.client() as client:
            client.hset("edge:key:" + hash_key("sk-by-hand").hex(), mapping={"id": "key_hand", "user": USER})
        with RedisRegistry(KeysConfig(KeyStoreAddress(url=server.url)), ACTOR) as registry:
            assert registry.page() == []
            registry.init()
            [found] = registry.page(USER)
            assert (found.id, found.created_at) == ("key_hand", None)
            registry.revoke("key_hand")
            assert registry.page(USER) == []
    finally:
        server.stop()
