"""What a hash in Redis may hold; the rest is in `test_stores.py`."""

import asyncio
from pathlib import Path

import pytest

from edge.config.process_settings import KeysConfig
from edge.config.values import KeyStoreAddress
from edge.exchange import Principal
from edge.keys.stores.protocol import AnswerUnusable, Invalidation, StoreFailed, hash_key
from edge.keys.stores.records import principal_of
from edge.keys.stores.redis import KEY_PREFIX, RedisKeyStore, record_of
from tests.keybackends import NO_REDIS, PATIENCE_S, RedisBackend, saying

USER = "u-1100a15812cc"
LEAST = {"id": "key_1", "user": USER}


def test_least_record() -> None:
    assert principal_of(record_of(LEAST)) == Principal("key_1", USER)


def test_whole_record() -> None:
    facts = {
        **LEAST, "name": "laptop", "allow": "public/* u-1100a15812cc/**", "deny": "public/glm*", "enabled": "0",
        "expires_at": "1060.5", "limit": "standard", "share": "4", "unknown": "field",
    }  # fmt: skip
    assert principal_of(record_of(facts)) == Principal(
        "key_1", USER, "laptop", ("public/*", "u-1100a15812cc/**"), ("public/glm*",),
        enabled=False, expires_at=1060.5, limit="standard", share=4,
    )  # fmt: skip


@pytest.mark.parametrize(
    "facts",
    [
        {}, {"user": USER}, {"id": "key_1"}, {**LEAST, "user": "../x"}, {**LEAST, "id": "a\nb"},
        {**LEAST, "enabled": "yes"}, {**LEAST, "enabled": ""}, {**LEAST, "expires_at": "soon"},
        {**LEAST, "expires_at": "inf"}, {**LEAST, "expires_at": "nan"}, {**LEAST, "expires_at": "-1"},
        {**LEAST, "deny": "[a-z]"}, {**LEAST, "allow": "public/?"},
    ],
)  # fmt: skip
def test_record_that_is_not_understood_is_no_answer(facts: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"^something else than"):
        principal_of(record_of(facts))


@pytest.mark.parametrize("answer", NO_REDIS)
async def test_answer_that_no_redis_gives_is_a_failure(answer: bytes) -> None:
    """Whatever the client's parser makes of it."""
    async with saying(answer) as url:
        store = RedisKeyStore(KeysConfig(KeyStoreAddress(url=url), store_timeout_s=0.2))
        await store.open()
        with pytest.raises(StoreFailed) as failed:
            await store.look_up(hash_key("sk-one-0123456789"), "")
        await store.close()
    assert failed.value.reason


async def test_answers_are_doubted_again_and_again_while_no_change_can_be_heard_of() -> None:
    """Who may read but not subscribe would else believe a revoked key for as long as the cache does."""
    doubts: asyncio.Queue[Invalidation] = asyncio.Queue()
    async with saying(b"-NOPERM no permission to access the channel\r\n") as url:
        store = RedisKeyStore(KeysConfig(KeyStoreAddress(url=url)))
        store.on_change = doubts.put_nowait
        await store.open()
        async with asyncio.timeout(PATIENCE_S):
            for _ in range(3):
                assert (await doubts.get()).everything
        await store.close()


async def test_value_of_another_type_is_the_failure_of_one_key(tmp_path: Path) -> None:
    backend = RedisBackend(tmp_path)
    await backend.start()
    store = backend.store()
    await store.open()
    try:
        with backend.server.client() as client:
            client.set(KEY_PREFIX + hash_key("sk-one-0123456789").hex(), "text")
        with pytest.raises(AnswerUnusable) as failed:
            await store.look_up(hash_key("sk-one-0123456789"), "")
        assert failed.value.reason == "ResponseError"
    finally:
        await store.close()
        await backend.close()
