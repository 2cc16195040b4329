"""Keys, limits and records on servers that lose their primary, killed without a word: Sentinels, and a Cluster."""

import asyncio
import time
from collections import Counter
from pathlib import Path
from typing import Any

import orjson
import pytest

from edge.config.process_settings import KeysConfig
from edge.config.values import KeyStoreAddress
from edge.journal.sinks.redis import STREAM
from edge.keys.stores.table import registry_of
from edge.simulator.server import Simulator
from edge.valkey import connect_blocking
from tests.conftest import USER, Edge, StartEdge
from tests.keybackends import PATIENCE_S
from tests.severalvalkeys import Cluster, Sentinels, Several

MODEL = "public/deepseek-r1"
LIMIT, BEFORE = 60, 20
ROUTES = """
[shared]
redis = "{redis}"
[usage]
sink = "{redis}"
sink_replicas = 1
[limits.standard]
requests_per_minute = {limit}
[pools.r1]
endpoints = ["{upstream}"]
[routes."public/deepseek-r1"]
pool = "r1"
limit = "standard"
"""


class Watched:
    """What an edge delivered, and which batches it could not be sure of."""

    def __init__(self, edge: Edge) -> None:
        self.doubtful: set[str] = set()
        sink = edge.server._sink
        assert sink is not None
        deliver = sink.deliver

        async def watched(lines: Any) -> None:
            try:
                await deliver(lines)
            except BaseException:  # also one that a stop takes back, and sends anew
                self.doubtful |= {orjson.loads(line)["id"] for line in lines}
                raise

        sink.deliver = watched  # type: ignore[method-assign]


async def merged(edges: list[Edge]) -> None:
    """Wait until each process has reported and read all that was counted so far."""
    async with asyncio.timeout(PATIENCE_S):
        for _ in ("report", "read"):
            for edge in edges:
                shared = edge.server.shared_limits
                assert shared is not None
                enough = shared.merges + 2
                while shared.merges < enough or shared.outage:
                    await asyncio.sleep(0.01)


def counted(edge: Edge) -> int:
    """Requests of all processes in two minutes, as one knows of them."""
    (counter,) = edge.server.admission._counters.values()
    return counter.previous_requests + counter.requests


@pytest.mark.parametrize("kind", [Sentinels, Cluster])
async def test_primary_that_is_lost_costs_no_key_no_limit_and_no_record(
    start_edge: StartEdge, simulator: Simulator, tmp_path: Path, kind: type[Several]
) -> None:
    several = kind(tmp_path)
    try:
        await several.start()
        config = KeysConfig(KeyStoreAddress(url=several.url))
        with registry_of(config, makes=True) as registry:
            key, record = registry.create(USER)
        routes = ROUTES.format(redis=several.url, limit=LIMIT, upstream=simulator.url)
        edges = [await start_edge(routes, keys=f'store = "{several.url}"\ncache_ttl = "1h"') for _ in range(2)]
        sinks = [Watched(edge) for edge in edges]
        statuses: Counter[int] = Counter()

        async def ask(edge: Edge) -> int:
            status, _, _ = await edge.ask({"model": MODEL, "messages": []}, key=key)
            statuses[status] += 1
            return status

        await merged(edges)
        began = time.monotonic()
        for _ in range(BEFORE // 2):
            assert [await ask(edge) for edge in edges] == [200, 200]
        await merged(edges)

        several.lose_primary()
        succession = asyncio.get_running_loop().create_task(several.successor())
        while not succession.done():
            await asyncio.gather(*map(ask, edges), asyncio.sleep(0.02))
        assert set(statuses) <= {200, 429}, "a key that was proven goes on"
        await merged(edges)
        assert [counted(edge) for edge in edges] == [statuses[200]] * 2, "they count as one again"
        left = LIMIT - BEFORE
        slid = 2 * LIMIT / 60 * (time.monotonic() - began)
        assert statuses[200] <= LIMIT + left + slid, "what was left counts twice at most"

        with registry_of(config) as registry:
            assert [each.id for each in registry.page(USER)] == [record.id]
            registry.revoke(record.id)
        async with asyncio.timeout(PATIENCE_S):
            for edge in edges:  # it would be believed for an hour
                while await ask(edge) != 401:
                    await asyncio.sleep(0.01)

        ids = {each["id"] for edge in edges for each in edge.records()}
        for edge in edges:
            await edge.stop()
        with connect_blocking(several.url, PATIENCE_S, key=STREAM) as client:
            entries: Any = client.xrange(STREAM)
        delivered = Counter(fields[b"id"].decode() for _, fields in entries)
        assert delivered.keys() == ids
        assert len(ids) == statuses[200]
        doubled = {each for each, count in delivered.items() if count > 1}
        assert doubled <= sinks[0].doubtful | sinks[1].doubtful
    finally:
        several.close()
