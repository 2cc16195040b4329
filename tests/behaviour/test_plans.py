"""What is kept with the head of a connection is used no longer than it is true: another model, file, key or member."""

import contextlib
import json
import sqlite3

from edge.keys.authenticator import Authenticator
from edge.keys.stores.registry import KeyRegistry
from edge.process.reloading import Reloader
from tests.conftest import Edge, RawClient, ScriptedConnection, StartEdge, StartUpstream, WatchMethod
from tests.streams import document

ROUTES = """
[limits.few]
per = "key"
requests_per_minute = 1000
[pools.a]
endpoints = ["{upstream}"]
[routes."public/one"]
pool = "a"
model = "first"
limit = "few"
[routes."public/two"]
pool = "a"
model = "second"
[routes."public/*"]
pool = "a"
hosts = ["!other.example"]
"""
CHANGED = (
    ROUTES.replace('"first"', '"third"').replace('limit = "few"', "").replace('["{upstream}"]', '["{upstream}/base"]')
)


async def echo(connection: ScriptedConnection) -> None:
    """Answer with what was asked."""
    head, _, body = connection.request.partition(b"\r\n\r\n")
    told = {"line": head.split(b"\r\n")[0].decode(), "asked": json.loads(body)["model"]}
    await connection.send(document({**told, "usage": {"prompt_tokens": 1, "completion_tokens": 1}}))


async def met(edge: Edge, client: RawClient, model: str, host: str = "chat.d.run", **asked: str) -> tuple[object, ...]:
    """What a request meets: its status, what went upstream or the error, and whether a limit counted it."""
    client.send(edge.request({"model": model, "messages": []}, host=host, **asked))
    status, headers, body = await client.response()
    answer = json.loads(body)
    told = (answer["line"], answer["asked"]) if status == 200 else (answer["error"]["code"],)
    return status, *told, "x-ratelimit-limit-requests" in headers


async def test_kept_connection_meets_what_a_new_one_does(
    start_edge: StartEdge, start_upstream: StartUpstream, watch: WatchMethod
) -> None:
    """Whatever came before on it: other models, another file, a key that may less, and one that may nothing."""
    upstream, forgot = await start_upstream(echo), watch(Authenticator, "forget")
    edge = await start_edge(ROUTES.replace("{upstream}", upstream.url), keys='cache_ttl = "1h"')
    kept = await edge.connect()

    async def both(model: str) -> object:
        first = await met(edge, kept, model)
        again = await met(edge, kept, model)
        new = await met(edge, await edge.connect(), model)
        assert first == again == new, model
        return first

    line = "POST /v1/chat/completions HTTP/1.1"
    assert await both("public/one") == (200, line, "first", True)
    assert await both("public/two") == (200, line, "second", False)
    assert await both("public/one") == (200, line, "first", True)
    assert await both("public/three") == (200, line, "public/three", False)
    assert await both("private") == (404, "model_not_found", False)
    assert await both("public/one") == (200, line, "first", True)

    text = edge.config_path.read_text()
    accepted = watch(Reloader, "accept")
    edge.config_path.write_text(text[: text.index("[limits.few]")] + CHANGED.replace("{upstream}", upstream.url))
    edge.server.reload()
    await accepted.until(lambda: edge.server.generation.number == 2)
    line = "POST /base/chat/completions HTTP/1.1"
    assert await both("public/one") == (200, line, "third", False)
    assert await both("public/two") == (200, line, "second", False)

    async def news(status: int) -> None:
        """Wait until a new connection meets what a change of the key makes of it."""
        while True:
            forgot.calls.clear()
            if (await met(edge, await edge.connect(), "public/two"))[0] == status:
                return
            await forgot.called()

    with contextlib.closing(sqlite3.connect(edge.keys_path)) as keys, keys:
        keys.execute("UPDATE keys SET deny = ?", ("public/two",))
    await news(403)
    assert await both("public/two") == (403, "permission_denied", False)
    assert await both("public/one") == (200, line, "third", False)
    with KeyRegistry(edge.keys_path) as registry:
        registry.change(registry.list()[0].id, enabled=False)
    await news(401)
    assert await both("public/two") == (401, "invalid_api_key", False)
    await edge.consistent()


async def test_heads_of_one_connection_have_plans_of_their_own(
    start_edge: StartEdge, start_upstream: StartUpstream
) -> None:
    """As behind a proxy that mixes clients: another host, and another key with another limit."""
    upstream = await start_upstream(echo)
    edge = await start_edge(ROUTES.replace("{upstream}", upstream.url))
    with KeyRegistry(edge.keys_path) as registry:
        key, _ = registry.create("u-2200b", limit="few")
    kept = await edge.connect()
    for _ in range(3):
        assert (await met(edge, kept, "public/two"))[0] == 200
        assert (await met(edge, kept, "public/three"))[0] == 200
        assert (await met(edge, kept, "public/three", "other.example"))[:2] == (404, "model_not_found")
        assert (await met(edge, kept, "public/two", key=key))[3], "counted by the limit of its key"
        assert not (await met(edge, kept, "public/two"))[3]
