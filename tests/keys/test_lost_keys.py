"""A store whose keys are gone is down: nobody is refused for it."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from edge.config.process_settings import KeysConfig
from edge.config.values import KeyStoreAddress
from edge.keys.stores.protocol import AnswerUnusable, StoreFailed, hash_key
from edge.keys.stores.redis import EMPTY, FORMAT, KEY_PREFIX, MARKER, USER_PREFIX, RedisKeyStore
from tests.keybackends import PATIENCE_S, Facts, RedisBackend, attended, saying

KEY, OTHER = "sk-one-0123456789", "sk-two-0123456789"
FACTS = Facts("key_1", "u-1100a15812cc")


@pytest.fixture
async def redis(tmp_path: Path) -> AsyncIterator[RedisBackend]:
    backend = RedisBackend(tmp_path)
    await backend.start()
    yield backend
    await backend.close()


async def _owner(store: RedisKeyStore, key: str = KEY) -> str | None:
    principal = await store.look_up(hash_key(key), key)
    return principal.user if principal is not None else None


def _flush(backend: RedisBackend) -> None:
    with backend.server.client() as client:
        client.flushall()


def _restart(backend: RedisBackend) -> None:
    backend.server.stop()
    backend.server.start()


@pytest.mark.parametrize("lose", [_flush, _restart])
async def test_redis_that_comes_back_empty_is_down_until_it_is_marked_again(
    redis: RedisBackend, lose: Callable[[RedisBackend], None]
) -> None:
    """Without a request too. Keys that are put back one by one prove nothing of those that are still to come."""
    await redis.create(KEY, FACTS)
    store = redis.store()
    async with attended(store) as listener:
        await listener.until(lambda: listener.outages[-1:] == [""])
        assert await _owner(store, OTHER) is None
        lose(redis)
        await listener.until(lambda: listener.outages[-1:] == [EMPTY])
        for refill in (None, KEY):
            if refill:
                await redis.create(refill, FACTS)
            for ask in (_owner(store), _owner(store, OTHER), store.look_up_user("u-other")):
                with pytest.raises(StoreFailed, match=r"cannot be checked") as failed:
                    await ask
                assert failed.value.reason == EMPTY
        redis.mark()
        await listener.hears_of_everything()
        await listener.until(lambda: listener.outages[-1:] == [""])
        assert await _owner(store) == FACTS.user
        assert await _owner(store, OTHER) is None


@pytest.mark.parametrize("record", [KEY_PREFIX + "ab" * 32, USER_PREFIX + "u-a"])
async def test_store_of_before_there_was_a_mark_goes_on_and_gets_one(redis: RedisBackend, record: str) -> None:
    """Among what others keep there."""
    with redis.server.client() as client:
        client.delete(MARKER)
        client.mset({f"edge:limit:{number}": "" for number in range(3000)} | {"other": "1"})
        client.hset(record, "user", "u-a")
    store = redis.store()
    async with attended(store) as listener:
        assert await asyncio.gather(*(_owner(store, f"sk-{number}") for number in range(20))) == [None] * 20
        await listener.until(lambda: listener.outages[-1:] == [""])
    with redis.server.client() as client:
        assert client.get(MARKER) == FORMAT.encode()
        client.flushall()
    async with attended(redis.store()):
        pass


async def test_replica_of_before_there_was_a_mark_goes_on_and_the_operator_is_told(
    redis: RedisBackend, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It cannot be marked there. That of its primary arrives."""
    (tmp_path / "replica").mkdir()
    replica = RedisBackend(tmp_path / "replica")
    replica.server.start()
    try:
        await redis.create(KEY, FACTS)
        with redis.server.client() as client, replica.server.client() as copy:
            client.delete(MARKER)
            copy.replicaof("127.0.0.1", redis.server.port)  # type: ignore[no-untyped-call]
            async with asyncio.timeout(PATIENCE_S):
                while not copy.exists(KEY_PREFIX + hash_key(KEY).hex()):
                    await asyncio.sleep(0)
        store = replica.store()
        async with attended(store):
            for _ in range(2):
                assert (await _owner(store), await _owner(store, OTHER)) == (FACTS.user, None)
            [warning] = [each for each in caplog.records if each.levelno == logging.WARNING]
            assert "read-only replica" in warning.getMessage()
            assert f"SET {MARKER} {FORMAT}" in warning.getMessage()
            _flush(redis)
            redis.mark()
            with replica.server.client() as copy:  # which gets the one before the other
                async with asyncio.timeout(PATIENCE_S):
                    while not copy.exists(MARKER):
                        await asyncio.sleep(0)
            assert await _owner(store) is None
    finally:
        await replica.close()


@pytest.mark.parametrize("mark", ["2", "", None])
async def test_format_that_is_not_known_is_an_outage(redis: RedisBackend, mark: str | None) -> None:
    """None: a value of another type."""
    await redis.create(KEY, FACTS)
    with redis.server.client() as client:
        if mark is None:
            client.delete(MARKER)
            client.hset(MARKER, "version", "2")
        else:
            client.set(MARKER, mark)
        before = client.dump(MARKER)
    store = redis.store()
    async with attended(store) as listener:
        with pytest.raises(StoreFailed) as failed:
            await _owner(store)
        assert "upgrade" in failed.value.reason
        await listener.until(lambda: "upgrade" in "".join(listener.outages))
    with redis.server.client() as client:
        assert client.dump(MARKER) == before


@pytest.mark.parametrize("answer", [b"-MOVED 1 127.0.0.1:1\r\n" * 2, b"-ASK 1 127.0.0.1:1\r\n" * 2])
async def test_member_of_a_cluster_is_an_outage_that_names_it(answer: bytes) -> None:
    """No single key is at fault, and the marks of the other members would not be seen."""
    async with saying(answer) as url:
        store = RedisKeyStore(KeysConfig(KeyStoreAddress(url=url)))
        await store.open()
        with pytest.raises(StoreFailed) as failed:
            await _owner(store)
        await store.close()
    assert not isinstance(failed.value, AnswerUnusable)
    advice = "it is a member of a Cluster, which keeps a part of the keys: name it with redis+cluster://"
    assert failed.value.reason == advice
