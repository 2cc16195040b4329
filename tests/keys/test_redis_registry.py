"""What `edge keys` does in a Redis: the first keys, and the mark that they are all there."""

import json
from pathlib import Path

import pytest

from edge.__main__ import main
from edge.config.process_settings import KeysConfig
from edge.config.values import KeyStoreAddress
from edge.keys.stores.protocol import hash_key
from edge.keys.stores.redis import FORMAT, KEY_PREFIX, MARKER
from edge.keys.stores.redis_registry import RedisRegistry
from tests.keybackends import RedisBackend, ValkeyServer

USER = "u-1100a15812cc"


@pytest.fixture
def config(valkey: ValkeyServer, tmp_path: Path) -> list[str]:
    path = tmp_path / "routes.toml"
    path.write_text(f'[keys]\nstore = "{valkey.url}"\n')
    return ["--config", str(path)]


async def look_up(valkey: ValkeyServer, key: str) -> str | None:
    backend = RedisBackend(valkey.directory)
    backend.server = valkey
    store = backend.store()
    await store.open()
    try:
        principal = await store.look_up(hash_key(key), key)
        return principal.id if principal is not None else None
    finally:
        await store.close()


def create(config: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, str], str]:
    options = ["--user", USER, "--allow", "public/**", "--expires", "1h", "--json"]
    assert main(["keys", "create", *options, *config]) == 0
    shown = capsys.readouterr()
    return json.loads(shown.out), shown.err


def test_first_key_marks_a_new_store_and_a_later_one_no_other(
    valkey: ValkeyServer, config: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """A key among others that may be incomplete is no first one: the operator is told what to do."""
    made, told = create(config, capsys)
    with valkey.client() as client:
        name = KEY_PREFIX + hash_key(made["key"]).hex()
        record = client.hgetall(name)
        assert {b"id": made["id"].encode(), b"user": USER.encode(), b"allow": b"public/**"}.items() <= record.items()
        assert client.get(MARKER) == FORMAT.encode()
        assert told == ""
        client.delete(MARKER)
        _, told = create(config, capsys)
        assert client.get(MARKER) is None
        assert "`edge keys init`" in told
        assert main(["keys", "init", *config]) == 0
        assert client.get(MARKER) == FORMAT.encode()


async def test_key_that_was_made_is_looked_up(valkey: ValkeyServer) -> None:
    with RedisRegistry(KeysConfig(KeyStoreAddress(url=valkey.url))) as registry:
        key, record = registry.create(USER)
        assert registry.is_marked
    assert await look_up(valkey, key) == record.id


def test_store_of_another_format_or_that_cannot_be_written_is_left_alone(
    valkey: ValkeyServer, config: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with valkey.client() as client:
        client.set(MARKER, "2")
        for verb in (["init"], ["create", "--user", USER]):
            assert main(["keys", *verb, *config]) == 1
            assert "upgrade this edge" in capsys.readouterr().err
        assert client.keys() == [MARKER.encode()]
        client.delete(MARKER)
        client.replicaof("127.0.0.1", 1)
    assert main(["keys", "init", *config]) == 1
    assert "name its primary" in capsys.readouterr().err
