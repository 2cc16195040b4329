"""A stream whose upstream is silent gets heartbeats, and nothing else of it is different."""

import asyncio
import json

import openai
import pytest

from edge.simulator.server import Simulator
from tests.conftest import ROUTES, Edge, RawClient, ScriptedConnection, StartEdge, StartUpstream, soon
from tests.streams import chunk

BEAT = b": keep-alive\n\n"
BEAT_CHUNK = b"e\r\n: keep-alive\n\n\r\n"
ASK = {"model": "public/deepseek-r1", "stream": True, "messages": []}
SSE = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
EVENT = b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n'
LAST = b"0\r\n\r\n"
OVERLOADED = b"HTTP/1.1 503 Busy\r\ncontent-length: 2\r\n\r\n{}"


def routes(*urls: str, heartbeat: str = "20ms") -> str:
    endpoints = ", ".join(f'"{url}"' for url in urls)
    return (
        f'[pools.p]\nendpoints = [{endpoints}]\nbalance = "round-robin"\n'
        f'[routes."public/deepseek-r1"]\npool = "p"\nheartbeat = "{heartbeat}"\n'
    )


async def beats(client: RawClient, count: int) -> None:
    """So many heartbeats, and nothing else."""
    assert await soon(client.reader.readexactly(count * len(BEAT_CHUNK))) == BEAT_CHUNK * count


class Turns:
    """An upstream that says the next thing when it is told to."""

    def __init__(self) -> None:
        self.says: asyncio.Queue[bytes] = asyncio.Queue()

    async def __call__(self, connection: ScriptedConnection) -> None:
        while (said := await self.says.get()) != b"close":
            await connection.send(said)
            if said.endswith((LAST, b"{}")):
                return
        connection.writer.close()


async def test_client_gets_heartbeats_before_the_head_after_it_and_between_events(
    start_edge: StartEdge, start_upstream: StartUpstream
) -> None:
    turns = Turns()
    edge = await start_edge(routes((await start_upstream(turns)).url))
    client = await edge.connect()
    client.send(edge.request(ASK))
    head = await soon(client.head())
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"\r\ncontent-type: text/event-stream; charset=utf-8\r\n" in head
    await beats(client, 3)
    turns.says.put_nowait(SSE)
    await beats(client, 3)
    content = b""
    for said in (chunk(EVENT), chunk(EVENT) + LAST):
        turns.says.put_nowait(said)
        await soon(client.reader.readuntil(EVENT))
        await soon(client.reader.readexactly(2))
        if not said.endswith(LAST):
            await beats(client, 2)
    while not content.endswith(LAST):
        content += await soon(client.reader.read(100))
    assert content.removesuffix(LAST).replace(BEAT_CHUNK, b"") == b""
    client.send(edge.request(path="/v1/models", method="GET"))
    assert (await soon(client.response()))[0] == 200  # the connection is whole
    await edge.consistent()
    line = (await edge.log())[0]
    assert (line["status"], line["end"]) == (200, "complete")


async def test_answer_that_is_no_stream_gets_none(start_edge: StartEdge, start_upstream: StartUpstream) -> None:
    turns, release = Turns(), asyncio.Event()

    async def script(connection: ScriptedConnection) -> None:
        if b'"stream": true' in connection.request:
            await turns(connection)
        else:
            await release.wait()
            await connection.send(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}")

    edge = await start_edge(routes((await start_upstream(script)).url))
    plain, stream = await edge.connect(), await edge.connect()
    plain.send(edge.request({**ASK, "stream": False}))
    stream.send(edge.request(ASK))
    await soon(stream.head())
    await beats(stream, 5)
    release.set()
    status, headers, body = await soon(plain.response())
    assert (status, headers["content-type"], body) == (200, "application/json", b"{}")
    turns.says.put_nowait(SSE + LAST)
    await soon(stream.reader.readuntil(LAST))
    await edge.consistent()


@pytest.mark.parametrize(
    ("said", "code"),
    [
        (OVERLOADED, "upstream_unavailable"),
        (b"close", "upstream_error"),
        (SSE + chunk(b'data: {"error":{"message":"too long","code":400}}\n\n') + LAST, "invalid_request_error"),
    ],
)
async def test_failure_after_a_heartbeat_is_an_event_and_nobody_else_is_asked(
    start_edge: StartEdge, start_upstream: StartUpstream, said: bytes, code: str
) -> None:
    turns = Turns()
    members = [await start_upstream(turns) for _ in range(2)]
    edge = await start_edge(
        routes(*(each.url for each in members)).replace("[routes", "retry_after_send = true\n[routes")
    )
    client = await edge.connect()
    client.send(edge.request(ASK))
    await soon(client.head())
    await beats(client, 1)
    turns.says.put_nowait(said)
    body = await soon(client.reader.readuntil(LAST))
    event = body.replace(BEAT_CHUNK, b"").split(b"\r\n")[1]
    assert json.loads(event.removeprefix(b"data: "))["error"]["code"] == code
    assert sum(len(each.requests) for each in members) == 1
    client.send(edge.request(path="/v1/models", method="GET"))
    assert (await soon(client.response()))[0] == 200
    await edge.consistent()
    line = (await edge.log())[0]
    assert (line["status"], line["end"], line["error"]) == (200, "upstream_error", code)


async def test_failure_before_the_first_heartbeat_is_still_retried(
    start_edge: StartEdge, start_upstream: StartUpstream, simulator: Simulator
) -> None:
    async def script(connection: ScriptedConnection) -> None:
        await connection.send(OVERLOADED)

    bad = await start_upstream(script)
    edge = await start_edge(routes(bad.url, simulator.url, heartbeat="1h"))
    answers = [await edge.ask(ASK) for _ in range(4)]
    assert [status for status, _, _ in answers] == [200] * 4
    assert bad.requests
    assert all(body.endswith(b"data: [DONE]\n\n") and BEAT not in body for _, _, body in answers)


async def test_client_that_leaves_after_a_heartbeat_frees_its_upstream(
    start_edge: StartEdge, start_upstream: StartUpstream
) -> None:
    upstream = await start_upstream(Turns())

    async def reads(connection: ScriptedConnection) -> None:
        assert await connection.reader.read() == b""

    upstream.script = reads
    edge = await start_edge(routes(upstream.url))
    client = await edge.connect()
    client.send(edge.request(ASK))
    await soon(client.head())
    await beats(client, 1)
    client.abort()
    await soon(upstream.gone.wait())
    await edge.consistent()
    assert [line["end"] for line in await edge.log()] == ["client_gone"]


async def test_http_1_0_client_gets_bare_heartbeats(start_edge: StartEdge, start_upstream: StartUpstream) -> None:
    turns = Turns()
    edge = await start_edge(routes((await start_upstream(turns)).url))
    client = await edge.connect()
    client.send(edge.request(ASK, version="1.0"))
    head = await soon(client.head())
    assert b"\r\nconnection: close\r\n" in head
    assert b"transfer-encoding" not in head
    assert await soon(client.reader.readexactly(2 * len(BEAT))) == BEAT * 2
    turns.says.put_nowait(SSE + chunk(EVENT) + LAST)
    assert (await soon(client.rest())).replace(BEAT, b"") == EVENT
    await edge.consistent()


@pytest.mark.usefixtures("no_environment")
async def test_sdk_skips_heartbeats_and_raises_what_comes_after_them(
    start_edge: StartEdge, start_upstream: StartUpstream
) -> None:
    turns = Turns()
    edge = await start_edge(routes((await start_upstream(turns)).url))
    async with openai.AsyncOpenAI(base_url=f"{edge.url}/v1", api_key=edge.key, max_retries=0) as sdk:
        # `create` returns when it has the head, which is a heartbeat's: the upstream has said nothing yet.
        stream = await soon(sdk.chat.completions.create(model="public/deepseek-r1", messages=[], stream=True))
        turns.says.put_nowait(SSE + chunk(EVENT) + LAST)
        assert [each.choices[0].delta.content async for each in stream] == ["a"]
        failing = await soon(sdk.chat.completions.create(model="public/deepseek-r1", messages=[], stream=True))
        turns.says.put_nowait(OVERLOADED)
        with pytest.raises(openai.APIError, match="overloaded"):
            async for _ in failing:
                pass
    await edge.consistent()


async def test_other_routes_hear_nothing_of_it(edge: Edge) -> None:
    assert "heartbeat" not in ROUTES
    _, _, body = await edge.ask(ASK)
    assert BEAT not in body
