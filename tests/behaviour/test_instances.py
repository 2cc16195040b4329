"""What a route says of its instances: how long they may take, what runs there, and how much they get at once."""

import asyncio
import json

import pytest

from edge.relay.terms import Timeouts
from edge.simulator.server import Simulator
from tests.conftest import USER, Edge, RawClient, ScriptedConnection, StartEdge, StartUpstream, soon

ASK = {"model": f"{USER}/qwen2", "messages": []}


def instance_at(url: str, more: str = "") -> str:
    """The route of instances that are all at one URL; `more` are lines of its table."""
    return f'[routes."u-*"]\ninstance = "{url}"\n{more}\n'


def code_of(body: bytes) -> str:
    code: str = json.loads(body)["error"]["code"]
    return code


def document(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)


# --- how long


async def test_instance_has_as_long_as_an_sdk_waits_unless_its_route_says_otherwise(start_edge: StartEdge) -> None:
    """600 s: a whole answer of a long chain of thought comes late, and a tool's call is silent for minutes."""
    pool = '[pools.p]\nendpoints = ["http://10.0.0.1"]\nidle_timeout = "7s"\n[routes.m]\npool = "p"\n'
    said = 'connect_timeout = "1s"\nfirst_byte_timeout = "2s"\nidle_timeout = "3s"\nmax_connection_age = "4s"\n'
    edge = await start_edge(
        pool + instance_at("http://10.0.0.1") + f'[routes."u-1/*"]\ninstance = "http://10.0.0.2"\n{said}',
        server='min_client_rate = "9B"\n',
    )
    assert edge.server.generation.timeouts == {
        "m": Timeouts(2, 300, 7, 9, 60),
        "u-*": Timeouts(2, 600, 300, 9, 60),
        "u-1/*": Timeouts(1, 2, 3, 9, 4),
    }


@pytest.mark.parametrize(("after", "status", "end"), [(-1, 504, "first_byte_timeout"), (2, 200, "idle_timeout")])
async def test_instance_that_is_silent_for_longer_than_its_route_says_is_cut(
    start_edge: StartEdge, simulator: Simulator, after: int, status: int, end: str
) -> None:
    edge = await start_edge(instance_at(simulator.url, 'first_byte_timeout = "300ms"\nidle_timeout = "200ms"'))
    fault = {"fault": "stall", "after": after, "tokens": 4}
    assert (await soon(edge.ask({**ASK, "stream": True, "simulate": fault})))[0] == status
    await soon(edge.consistent())
    assert (await edge.log())[-1]["end"] == end


# --- what runs there


@pytest.mark.parametrize(("engine", "path"), [("vllm", b"/tokenize"), ("openai", b"/api/tokenize")])
async def test_instance_is_asked_as_its_engine_is(
    start_edge: StartEdge, start_upstream: StartUpstream, engine: str, path: bytes
) -> None:
    async def answer(connection: ScriptedConnection) -> None:
        await connection.send(document(b"{}"))

    upstream = await start_upstream(answer)
    edge = await start_edge(instance_at(f"{upstream.url}/api", f'engine = "{engine}"'))
    assert (await soon(edge.ask({"model": ASK["model"], "prompt": "a"}, path="/tokenize")))[0] == 200
    assert upstream.requests[0].startswith(b"POST %b HTTP/1.1\r\n" % path)
    await edge.consistent()


# --- its usage


@pytest.mark.parametrize("usage", ["", "final", "continuous"])
async def test_instance_is_asked_for_usage_where_its_route_says_so(
    start_edge: StartEdge, simulator: Simulator, usage: str
) -> None:
    """And a client that did not ask sees nothing of it."""
    edge = await start_edge(instance_at(simulator.url, f'usage = "{usage}"' if usage else ""))
    status, _, body = await soon(edge.ask({**ASK, "stream": True, "simulate": {"tokens": 4}}))
    await soon(edge.consistent())
    assert (status, b'"usage":{' in body, body.count(b"data: [DONE]")) == (200, False, 1)
    [record] = edge.records()
    asked = json.loads(simulator.requests[0].body).get("stream_options", {})
    assert (asked.get("include_usage", False), asked.get("continuous_usage_stats", False)) == (
        bool(usage),
        usage == "continuous",
    )
    assert (record["completion_tokens"], record["usage_source"] == "final") == (4, bool(usage))


# --- how much at once


class Held:
    """An upstream's script that answers each new request at its turn, and what it keeps at once."""

    def __init__(self) -> None:
        self.turns: asyncio.Queue[asyncio.Event] = asyncio.Queue()

    async def __call__(self, connection: ScriptedConnection) -> None:
        if not connection.request.startswith(b"GET "):
            turn = asyncio.Event()
            self.turns.put_nowait(turn)
            await turn.wait()
        await connection.send(document(b'{"id":"resp_1","object":"response","status":"completed"}'))


async def begin(edge: Edge, held: Held, path: str = "/v1/chat/completions") -> tuple[RawClient, asyncio.Event]:
    """Send a request that the upstream holds; return its client, and what lets it go on."""
    client = await edge.connect()
    client.send(edge.request({**ASK, "input": "a"}, path=path))
    return client, await soon(held.turns.get())


async def test_instance_that_has_as_much_as_it_takes_refuses_the_next_request(
    start_edge: StartEdge, start_upstream: StartUpstream
) -> None:
    """With a Retry-After that SDKs follow; each instance has its own count."""
    held, other = Held(), Held()
    upstream, second = await start_upstream(held), await start_upstream(other)
    more = f'[routes."{USER}/other"]\ninstance = "{second.url}"\nmax_inflight = 1\n'
    edge = await start_edge(instance_at(upstream.url, "max_inflight = 2") + more)
    running = [await begin(edge, held) for _ in range(2)]
    status, headers, body = await soon(edge.ask(ASK))
    assert (status, code_of(body), headers["retry-after"]) == (503, "upstream_unavailable", "1")
    client = await edge.connect()
    client.send(edge.request({**ASK, "model": f"{USER}/other"}))
    running.append((client, await soon(other.turns.get())))
    for client, turn in running:
        turn.set()
        assert (await soon(client.response()))[0] == 200
    client, turn = await begin(edge, held)
    turn.set()
    assert (await soon(client.response()))[0] == 200
    await soon(edge.consistent())
    assert len(upstream.requests) == 3


async def test_full_instance_is_asked_all_the_same_for_what_it_alone_keeps(
    start_edge: StartEdge, start_upstream: StartUpstream
) -> None:
    """Who cancels a response frees a place."""
    held = Held()
    edge = await start_edge(instance_at((await start_upstream(held)).url, "max_inflight = 1"))
    client, turn = await begin(edge, held, "/v1/responses")
    turn.set()
    assert (await soon(client.response()))[0] == 200
    client, turn = await begin(edge, held)
    assert (await soon(edge.ask(ASK)))[0] == 503
    assert (await soon(edge.ask(method="GET", path="/v1/responses/resp_1")))[0] == 200
    turn.set()
    assert (await soon(client.response()))[0] == 200
    await soon(edge.consistent())
