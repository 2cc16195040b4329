"""What a caller is told of its own: how far its limits are used, and what its key used."""

import json
from typing import Any

from edge.keys.stores.registry import KeyRegistry
from edge.simulator.server import Simulator
from tests.conftest import USER, Edge, StartEdge

LIMITED = """
[limits.standard]
requests_per_minute = 10
tokens_per_minute = 100_000
[limits.small]
per = "key"
concurrent_requests = 2
[pools.r1]
endpoints = ["{upstream}"]
[routes."public/deepseek-r1"]
pool = "r1"
limit = "standard"
metered = true
[routes."public/free"]
pool = "r1"
[routes."secret/x"]
pool = "r1"
limit = "standard"
[routes."u-*"]
instance = "{upstream}"
"""


async def shown(edge: Edge, path: str, key: str | None = None) -> Any:
    status, _, body = await edge.ask(method="GET", path=path, key=key)
    assert status == 200, body
    return json.loads(body)


async def test_limits_are_those_of_the_key_at_each_model_that_it_may_call(
    start_edge: StartEdge, simulator: Simulator
) -> None:
    """As used by now as the headers of an answer say, and to ask counts for nothing."""
    edge = await start_edge(LIMITED.replace("{upstream}", simulator.url))
    _, headers, _ = await edge.ask({"model": "public/deepseek-r1"})
    await edge.idle()
    for _ in range(2):
        [limit] = (await shown(edge, "/v1/limits"))["data"]
        assert (limit["model"], limit["limit"], limit["per"]) == ("public/deepseek-r1", "standard", "user")
        remaining = int(headers["x-ratelimit-remaining-requests"])
        assert limit["requests_per_minute"] == {"limit": 10, "used": 1, "remaining": remaining}
        used = limit["tokens_per_minute"]["used"]
        [record] = edge.records()
        assert used == record["prompt_tokens"] + record["completion_tokens"]
        assert limit["concurrent_requests"] is None
    with KeyRegistry(edge.keys_path) as registry:
        key, _ = registry.create(USER, limit="small")
    found = (await shown(edge, "/v1/limits", key))["data"]
    assert [(each["model"], each["limit"], each["per"]) for each in found] == [
        ("public/deepseek-r1", "standard", "user"),
        ("public/deepseek-r1", "small", "key"),
        ("public/free", "small", "key"),
    ]
    assert found[0]["requests_per_minute"]["used"] == 1, "what a user's other key used counts too"
    assert found[2]["concurrent_requests"] == {"limit": 2, "used": 0, "remaining": 2}


async def test_usage_is_that_of_the_key_alone(edge: Edge) -> None:
    with KeyRegistry(edge.keys_path) as registry:
        key, record = registry.create(USER)
    await edge.ask({"model": "public/deepseek-r1"})
    for _ in range(2):
        await edge.ask({"model": "public/deepseek-r1"}, key=key)
    made = [each for each in edge.records() if each["key_id"] == record.id]
    for path in ("/v1/usage", "/usage/"):
        used = await shown(edge, path, key)
        [day] = used["data"]
        assert (used["key_id"], day["model"], day["requests"]) == (record.id, "public/deepseek-r1", 2)
        assert day["completion_tokens"] == sum(each["completion_tokens"] for each in made)
    assert (await shown(edge, "/v1/usage?since=2020-01-01&until=2020-01-31", key))["data"] == []
    for query in ("since=now", "key=key_1"):
        status, _, body = await edge.ask(method="GET", path=f"/v1/usage?{query}", key=key)
        assert (status, json.loads(body)["error"]["code"]) == (400, "invalid_request_error")
    assert edge.server.journal.records_open == 3, "to ask is no use"


async def test_nothing_is_told_without_a_key_and_nothing_is_changed_by_a_post(edge: Edge) -> None:
    for path in ("/v1/usage", "/v1/limits"):
        assert (await edge.ask(method="GET", path=path, key="sk-" + "0" * 45))[0] == 401
        assert (await edge.ask({}, path=path))[0] == 405
