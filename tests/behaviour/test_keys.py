"""Keys change in another process while the edge serves: the news arrives, and a fault of the store locks nobody out."""

import asyncio
import json
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from edge.keys_sqlite import KeyRegistry
from edge.simulator import Simulator
from tests.conftest import ROUTES, USER, Edge, StartEdge

PATIENCE_S = 20
BODY = {"model": "public/deepseek-r1", "messages": []}


async def status_of(edge: Edge, key: str | None = None, model: str = "public/deepseek-r1") -> int:
    return (await edge.ask({"model": model, "messages": []}, key=key))[0]


async def until_status(edge: Edge, wanted: int, allowed: tuple[int, ...], key: str | None = None) -> None:
    """Ask until the answer is the one that is wanted; every one before is among those allowed."""
    async with asyncio.timeout(PATIENCE_S):
        while (status := await status_of(edge, key)) != wanted:
            assert status in allowed
            await asyncio.sleep(0.01)


def id_of(registry: KeyRegistry, number: int = 0) -> str:
    return registry.list()[number].id


@pytest.fixture
async def edge(start_edge: StartEdge, simulator: Simulator) -> Edge:
    """An edge whose cache alone would keep every answer for an hour."""
    routes = ROUTES.replace("{upstream}", simulator.url)
    return await start_edge(routes, keys='cache_ttl = "1h"\nnegative_ttl = "1h"\nstale_for = "1h"')


CHANGES: dict[str, tuple[Callable[[KeyRegistry], object], int]] = {
    "revoked": (lambda registry: registry.revoke(id_of(registry)), 401),
    "disabled": (lambda registry: registry.disable(id_of(registry)), 401),
    "suspended user": (lambda registry: registry.disable_user(USER), 401),
    "out of quota": (lambda registry: registry.set_out_of_quota(USER, True), 402),
}


@pytest.mark.parametrize("how", CHANGES)
async def test_change_of_a_cached_key_arrives(edge: Edge, how: str) -> None:
    """Within a second on a machine that has time; no cached answer outlives the news."""
    assert await status_of(edge) == 200
    act, status = CHANGES[how]
    with KeyRegistry(edge.keys_path) as registry:
        await asyncio.to_thread(lambda: None)
        act(registry)
    await until_status(edge, status, (200,))
    assert await status_of(edge) == status
    await edge.consistent()
    line = (await edge.log())[-1]
    assert (line["status"], line["end"]) == (status, "refused")


@pytest.mark.parametrize(
    ("off", "on"),
    [
        (lambda registry: registry.disable(id_of(registry)), lambda registry: registry.enable(id_of(registry))),
        (lambda registry: registry.disable_user(USER), lambda registry: registry.enable_user(USER)),
    ],
)
async def test_key_that_is_let_in_again_works(
    edge: Edge, off: Callable[[KeyRegistry], object], on: Callable[[KeyRegistry], object]
) -> None:
    with KeyRegistry(edge.keys_path) as registry:
        off(registry)
        await until_status(edge, 401, (200,))
        on(registry)
        await until_status(edge, 200, (401,))


async def test_revocation_by_another_process_arrives(edge: Edge) -> None:
    """`edge keys revoke` is such a process."""
    assert await status_of(edge) == 200
    with KeyRegistry(edge.keys_path) as registry:
        key_id = id_of(registry)
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "edge", "keys", "revoke", key_id, "--config", str(edge.config_path)],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    await until_status(edge, 401, (200,))


async def test_revocation_touches_no_other_key(edge: Edge) -> None:
    with KeyRegistry(edge.keys_path) as registry:
        second, record = registry.create("u-2200b")
        assert await status_of(edge, second) == 200
        assert await status_of(edge) == 200
        registry.revoke(record.id)
    await until_status(edge, 401, (200,), second)
    assert await status_of(edge) == 200


async def test_new_key_works_although_it_was_asked_for_before(edge: Edge, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was cached as unknown for an hour."""
    key = "sk-" + "A" * 45
    assert await status_of(edge, key) == 401
    letters = iter("A" * 45)
    with KeyRegistry(edge.keys_path) as registry:
        monkeypatch.setattr("edge.keys_sqlite._random", lambda alphabet, length: (
            "".join(next(letters) for _ in range(length)) if length == 45 else "a" * length))  # fmt: skip
        created, _ = registry.create(USER)
    assert created == key
    await until_status(edge, 200, (401,), key)


async def test_new_key_works_at_once(edge: Edge) -> None:
    with KeyRegistry(edge.keys_path) as registry:
        key, _ = registry.create("u-2200b")
    assert await status_of(edge, key) == 200


async def test_key_stops_at_its_time_of_expiry(edge: Edge) -> None:
    """Without a look-up: the time is in the cached record."""
    with KeyRegistry(edge.keys_path) as registry:
        key, _ = registry.create(USER, expires_in_s=1.5)
    assert await status_of(edge, key) == 200
    await until_status(edge, 401, (200,), key)


async def test_key_of_another_user_reaches_no_instance(edge: Edge, simulator: Simulator) -> None:
    """Unknown and not-yours look the same to whoever asks."""
    with KeyRegistry(edge.keys_path) as registry:
        key, _ = registry.create("u-2200b", deny=["public/deepseek-r1"])
    own = f"{USER}/qwen2"
    assert [await status_of(edge, model=own), await status_of(edge, key, own)] == [200, 404]
    *_, others = await edge.ask({"model": own}, key=key)
    *_, unknown = await edge.ask({"model": "public/none"}, key=key)
    assert others.decode().replace(own, "NAME") == unknown.decode().replace("public/none", "NAME")
    assert await status_of(edge, key) == 403
    assert len(simulator.requests) == 1


# --- the store is down


@pytest.fixture
async def impatient(start_edge: StartEdge, simulator: Simulator) -> Edge:
    """An edge that believes the store for a moment only, so that every request asks it again."""
    routes = ROUTES.replace("{upstream}", simulator.url)
    return await start_edge(routes, keys='cache_ttl = "1ms"\nnegative_ttl = "1ms"\nstale_for = "1h"')


def delete(edge: Edge) -> None:
    for suffix in ("", "-wal", "-shm"):
        edge.keys_path.with_name(edge.keys_path.name + suffix).unlink(missing_ok=True)


def damage(edge: Edge) -> None:
    with sqlite3.connect(edge.keys_path) as connection:
        connection.execute("DROP TABLE keys")
    connection.close()


@pytest.mark.parametrize("harm", [delete, damage])
async def test_store_that_is_gone_lets_known_keys_go_on_and_nobody_else_in(
    impatient: Edge, simulator: Simulator, harm: Callable[[Edge], None]
) -> None:
    """Unknown is 503 `key_store_unavailable`, never 401: an SDK gives up on a 401. A running stream is untouched."""
    edge = impatient
    with KeyRegistry(edge.keys_path) as registry:
        new, _ = registry.create("u-2200b")
    body: dict[str, Any] = {**BODY, "stream": True, "simulate": {"tokens": 50, "interval_ms": 10}, "seed": 1}
    *_, expected = await edge.ask(body)
    client = await edge.connect()
    client.send(edge.request(body))
    await simulator.wait_for(lambda: len(simulator.requests) == 2)
    harm(edge)
    async with asyncio.timeout(PATIENCE_S):
        while edge.server.authenticator.counts.failures < 3:
            assert await status_of(edge) == 200
    for key in (new, "sk-never-heard-of"):
        status, headers, answer = await edge.ask(BODY, key=key)
        assert (status, json.loads(answer)["error"]["code"]) == (503, "key_store_unavailable")
        assert int(headers["retry-after"]) >= 1
        assert headers.get("x-should-retry") != "false"
        assert str(edge.keys_path).encode() not in answer
    status, _, received = await client.response()
    assert (status, received) == (200, expected)
    assert await status_of(edge) == 200
    assert edge.server.health.ready
    await edge.consistent()
    assert {line["end"] for line in await edge.log() if line["status"] == 200} == {"complete"}


async def test_store_that_comes_back_is_asked_again(impatient: Edge) -> None:
    """Without a restart; what changed meanwhile holds."""
    edge = impatient
    assert await status_of(edge) == 200
    with KeyRegistry(edge.keys_path) as registry:
        gone, record = registry.create("u-2200b")
        assert await status_of(edge, gone) == 200
        registry.revoke(record.id)
        new, _ = registry.create("u-3300c")
        copy = sqlite3.connect(edge.keys_path.with_name("copy.db"))
        registry._connection.backup(copy)
        copy.close()
    delete(edge)
    async with asyncio.timeout(PATIENCE_S):
        while await status_of(edge, "sk-never-heard-of") != 503:
            pass
    edge.keys_path.with_name("copy.db").rename(edge.keys_path)
    await until_status(edge, 200, (503,), new)
    assert await status_of(edge) == 200
    assert await status_of(edge, gone) == 401
