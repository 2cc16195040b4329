"""Connections to upstreams: which endpoint is asked, on which connection, and what if that one turns out to be dead."""

import asyncio
import errno
import itertools
import json
import random
import socket
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path
from typing import Any

import pytest
import trustme

from edge.keys.stores.registry import KeyRegistry
from edge.simulator.dialects import Behaviour
from edge.simulator.server import Simulator
from edge.wire.connections import ConnectionPool, UpstreamConnection
from tests.conftest import (
    ROUTES,
    USER,
    Edge,
    RawClient,
    Script,
    ScriptedConnection,
    ScriptedUpstream,
    StartEdge,
    StartUpstream,
    soon,
)

ASK = {"model": "public/deepseek-r1", "messages": []}
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n"
ANSWER = HEAD + b"\r\n{}"


def pool_of(*urls: str, more: str = "", weights: tuple[int, ...] = ()) -> str:
    """The routes of a pool of these endpoints; `more` are lines of its table."""
    members = ", ".join(
        f'{{ url = "{url}", weight = {weight} }}' for url, weight in zip(urls, weights or [1] * len(urls), strict=True)
    )
    return f'[pools.r1]\nendpoints = [{members}]\n{more}\n[routes."public/deepseek-r1"]\npool = "r1"\n'


def code_of(body: bytes) -> str:
    code: str = json.loads(body)["error"]["code"]
    return code


async def last_line(edge: Edge) -> dict[str, Any]:
    """The last line of the access log, once nothing is left over."""
    await soon(edge.consistent())
    return (await edge.log())[-1]


async def answer(connection: ScriptedConnection) -> None:
    await connection.send(ANSWER)


async def close(connection: ScriptedConnection) -> None:
    connection.writer.close()


async def reset(connection: ScriptedConnection) -> None:
    connection.reset()


class Reuse:
    """A script that tells the first request on a connection from those that come on it later."""

    def __init__(self, then: Script = answer, first: Script = answer) -> None:
        self.first = first
        self.then = then
        self.ports: list[int] = []  # the edge's port of each request, so which connection it came on

    async def __call__(self, connection: ScriptedConnection) -> None:
        port = connection.writer.get_extra_info("peername")[1]
        self.ports.append(port)
        await (self.then if self.ports.count(port) > 1 else self.first)(connection)


# --- connections that the upstream closes


async def test_upstream_that_closes_idle_connections_fails_no_request(start_edge: StartEdge) -> None:
    """The gaps lie around its timeout, so that requests meet the close on the way (RFC 9112 section 9.3.1)."""
    count, rounds = 25, 14
    statuses: Counter[int] = Counter()
    async with AsyncExitStack() as stack:
        pools = ""
        for timeout_ms in (50, 100, 250):
            simulator = Simulator(Behaviour(tokens=1), keepalive_timeout_s=timeout_ms / 1000, keep_requests=0)
            await simulator.start()
            stack.push_async_callback(simulator.close)
            pools += f'[pools.p{timeout_ms}]\nendpoints = ["{simulator.url}"]\n'
            pools += f'[routes."public/{timeout_ms}"]\npool = "p{timeout_ms}"\n'
        edge = await start_edge(pools)

        async def ask(timeout_ms: int) -> None:
            gaps = random.Random(timeout_ms)
            clients = [await edge.connect() for _ in range(count)]
            for _ in range(rounds):
                for client in clients:
                    client.send(edge.request({"model": f"public/{timeout_ms}", "messages": []}))
                statuses.update([(await soon(client.response()))[0] for client in clients])
                await asyncio.sleep(timeout_ms / 1000 * gaps.uniform(0.8, 1.2))

        await asyncio.gather(*(ask(timeout_ms) for timeout_ms in (50, 100, 250)))
        assert statuses == {200: 3 * count * rounds}
        await edge.consistent()
        assert {(line["end"], line["retries"]) for line in await edge.log()} == {("complete", 0)}


@pytest.mark.parametrize(("die", "size"), [(close, 1_000_000), (reset, 0)])
async def test_request_on_a_stale_connection_is_replayed_once_on_a_new_one(
    start_edge: StartEdge, start_upstream: StartUpstream, die: Script, size: int
) -> None:
    """At the same member, for it is no failure of it, and so no retry either."""
    script = Reuse(then=die)
    upstream = await start_upstream(script)
    edge = await start_edge(pool_of(upstream.url))
    assert (await edge.ask(ASK))[0] == 200
    await edge.consistent()
    status, _, body = await soon(edge.ask({**ASK, "user": "x" * size}))
    assert (status, body) == (200, b"{}")
    line = await last_line(edge)
    assert (line["status"], line["end"], line["replays"], line["retries"]) == (200, "complete", 1, 0)
    first, second, third = script.ports
    assert first == second != third
    assert upstream.requests[1] == upstream.requests[2]


async def test_one_replay_is_enough_when_every_idle_connection_is_stale(
    start_edge: StartEdge, start_upstream: StartUpstream
) -> None:
    """It goes to a new connection, never to the next idle one."""
    together = asyncio.Barrier(3)

    async def first(connection: ScriptedConnection) -> None:
        await together.wait()
        await connection.send(ANSWER)

    script = Reuse(first=first, then=close)
    upstream = await start_upstream(script)
    edge = await start_edge(pool_of(upstream.url))
    await soon(asyncio.gather(*(edge.ask(ASK) for _ in range(3))))
    await edge.consistent()
    script.first = answer
    assert (await soon(edge.ask(ASK)))[0] == 200
    line = await last_line(edge)
    assert (line["replays"], line["retries"]) == (1, 0)
    assert (upstream.connections, len(upstream.requests)) == (4, 5)


async def test_replay_that_fails_is_the_last(start_edge: StartEdge, start_upstream: StartUpstream) -> None:
    upstream, other = await start_upstream(answer), await start_upstream(answer)
    edge = await start_edge(pool_of(upstream.url, other.url, weights=(100, 1)))
    await edge.ask(ASK)
    await edge.consistent()
    upstream.script = close
    status, _, body = await soon(edge.ask(ASK))
    assert (status, code_of(body)) == (502, "upstream_error")
    line = await last_line(edge)
    assert (line["replays"], line["retries"]) == (1, 0)
    assert (len(upstream.requests), len(other.requests)) == (3, 0)


async def test_replay_that_finds_the_endpoint_gone_goes_to_another_member(
    start_edge: StartEdge, start_upstream: StartUpstream
) -> None:
    """A server that restarts: its connections are closed, and it refuses new ones; nothing was processed."""
    upstream, other = await start_upstream(answer), await start_upstream(answer)
    edge = await start_edge(pool_of(upstream.url, other.url, weights=(100, 1)))
    await edge.ask(ASK)
    await edge.consistent()

    async def stop(connection: ScriptedConnection) -> None:
        assert upstream._server is not None
        upstream._server.close()
        connection.writer.close()

    upstream.script = stop
    assert (await soon(edge.ask(ASK)))[0] == 200
    line = await last_line(edge)
    assert (line["end"], line["replays"], line["retries"]) == ("complete", 1, 1)
    assert (len(upstream.requests), len(other.requests)) == (2, 1)


@pytest.mark.parametrize("die", [close, reset])
async def test_request_on_a_fresh_connection_is_never_replayed(
    start_edge: StartEdge, start_upstream: StartUpstream, die: Script
) -> None:
    """The upstream may have begun the work; nor is another member asked."""
    upstream, other = await start_upstream(die), await start_upstream(answer)
    edge = await start_edge(pool_of(upstream.url, other.url, weights=(100, 1)))
    status, _, body = await soon(edge.ask(ASK))
    assert (status, code_of(body)) == (502, "upstream_error")
    line = await last_line(edge)
    assert (line["status"], line["end"], line["replays"], line["retries"]) == (502, "upstream_error", 0, 0)
    assert (len(upstream.requests), len(other.requests)) == (1, 0)


@pytest.fixture
def received(monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """Set whenever the edge has read from an upstream."""
    event = asyncio.Event()
    receive = UpstreamConnection.data_received

    def data_received(self: UpstreamConnection, data: bytes) -> None:
        receive(self, data)
        event.set()

    monkeypatch.setattr(UpstreamConnection, "data_received", data_received)
    return event


@pytest.mark.parametrize(
    ("begun", "die"),
    [
        (b"H", close),
        (b"HTTP/1.1 200 OK\r\n", reset),
        (HEAD + b"\r\n", close),
        (HEAD + b"\r\n", reset),
        (b"HTTP/1.1 100 Continue\r\n\r\n", reset),
        (b"HTTP/1.1 103 Early", close),
    ],
)
async def test_request_that_got_a_byte_is_never_replayed(
    start_edge: StartEdge, start_upstream: StartUpstream, received: asyncio.Event, begun: bytes, die: Script
) -> None:
    """The connection was not stale: somebody has read the request."""

    async def then(connection: ScriptedConnection) -> None:
        received.clear()
        await connection.send(begun)
        await received.wait()
        await die(connection)

    script = Reuse(then=then)
    upstream = await start_upstream(script)
    edge = await start_edge(pool_of(upstream.url))
    await edge.ask(ASK)
    await edge.consistent()
    status, _, body = await soon(edge.ask(ASK))
    assert (status, code_of(body)) == (502, "upstream_error")
    assert (await last_line(edge))["replays"] == 0
    assert script.ports[0] == script.ports[1]
    assert len(upstream.requests) == 2


# --- which connection is used again


async def test_connection_that_was_freed_last_is_used_first(
    start_edge: StartEdge, start_upstream: StartUpstream
) -> None:
    """It is the least likely to have been closed by the upstream; the others may then grow old and go."""
    arrived: asyncio.Queue[asyncio.Event] = asyncio.Queue()

    async def wait(connection: ScriptedConnection) -> None:
        turn = asyncio.Event()
        arrived.put_nowait(turn)
        await turn.wait()
        await connection.send(ANSWER)

    script = Reuse(first=wait)
    upstream = await start_upstream(script)
    edge = await start_edge(pool_of(upstream.url))

    async def ask_together() -> list[tuple[asyncio.Event, RawClient]]:
        waiting = []
        for _ in range(3):
            client = await edge.connect()
            client.send(edge.request(ASK))
            waiting.append((await soon(arrived.get()), client))
        return waiting

    waiting = await ask_together()
    one, two, three = script.ports
    for at in (2, 0, 1):
        turn, client = waiting[at]
        turn.set()
        assert (await soon(client.response()))[0] == 200
    for _ in range(4):
        await soon(edge.ask(ASK))
        await edge.consistent()
    assert script.ports[3:] == [two] * 4
    script.then = wait
    waiting = await ask_together()
    assert script.ports[7:] == [two, one, three]
    for turn, client in waiting:
        turn.set()
        await soon(client.response())
    await edge.consistent()
    assert upstream.connections == 3


@pytest.mark.parametrize(("said", "age_s"), [("", 60), ('max_connection_age = "1h"', 3600)])
async def test_connection_is_reused_as_long_as_the_file_says(
    start_edge: StartEdge, start_upstream: StartUpstream, said: str, age_s: float
) -> None:
    """Less a fifth at most, of a pool and of an instance."""
    upstream = await start_upstream(answer)
    edge = await start_edge(pool_of(upstream.url, more=said) + f'[routes."u-*"]\ninstance = "{upstream.url}"\n{said}\n')
    for model in (ASK["model"], f"{USER}/qwen2"):
        assert (await soon(edge.ask({**ASK, "model": model})))[0] == 200
    await edge.consistent()
    kept = [each for endpoint in edge.server.endpoints.states() for each in endpoint.connections._idle]
    left_s = [each.retire_at - asyncio.get_running_loop().time() for each in kept]
    assert [0.5 * age_s < each <= age_s for each in left_s] == [True, True]


@pytest.mark.parametrize(
    ("head", "reused"),
    [
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n", True),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n", False),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nConnection: x, Close\r\n", False),
        (b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n", False),
        (b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\nconnection: keep-alive\r\n", True),
        (b"HTTP/1.1 400 Bad\r\ncontent-length: 2\r\n", True),
        (b"HTTP/1.1 400 Bad\r\ncontent-length: 2\r\nconnection: close\r\n", False),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nkeep-alive: timeout=0\r\n", False),
    ],
)
async def test_connection_is_reused_only_if_the_upstream_keeps_it(
    start_edge: StartEdge, start_upstream: StartUpstream, head: bytes, reused: bool
) -> None:
    """RFC 9112 section 9.3."""

    async def script(connection: ScriptedConnection) -> None:
        await connection.send(head + b"\r\n{}")

    upstream = await start_upstream(script)
    edge = await start_edge(pool_of(upstream.url))
    for _ in range(3):
        await soon(edge.ask(ASK))
        await edge.consistent()
    assert upstream.connections == (1 if reused else 3)
    assert {line["replays"] for line in await edge.log()} == {0}


async def test_promised_time_takes_the_place_of_the_default(
    start_edge: StartEdge, start_upstream: StartUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge.wire.http1.DEFAULT_IDLE_S", 0.0)
    monkeypatch.setattr("edge.wire.http1._shapes", {})  # where the default of before stands
    promises = iter([b"", b"", b"Keep-Alive: max=9, Timeout=60\r\n", b"", b""])

    async def script(connection: ScriptedConnection) -> None:
        await connection.send(HEAD + next(promises) + b"\r\n{}")

    upstream = await start_upstream(script)
    edge = await start_edge(pool_of(upstream.url))
    for connections in (1, 2, 3, 3, 4):
        await soon(edge.ask(ASK))
        await edge.consistent()
        assert upstream.connections == connections


async def test_idle_connection_is_closed_when_the_promised_time_is_nearly_over(
    start_edge: StartEdge, start_upstream: StartUpstream
) -> None:
    """By the edge, before the upstream does."""

    async def script(connection: ScriptedConnection) -> None:
        await connection.send(HEAD + b"keep-alive: timeout=1\r\n\r\n{}")

    upstream = await start_upstream(script)
    edge = await start_edge(pool_of(upstream.url))
    await soon(edge.ask(ASK))
    await soon(upstream.gone.wait())
    assert (await soon(edge.ask(ASK)))[0] == 200
    assert (await last_line(edge))["replays"] == 0


# --- endpoints that cannot be reached


@pytest.fixture
def refusing() -> Iterator[Callable[[], str]]:
    """Make endpoints that refuse connections: their ports are taken, and nobody listens."""
    with ExitStack() as stack:

        def make() -> str:
            taken = stack.enter_context(socket.socket())
            taken.bind(("127.0.0.1", 0))
            return f"http://127.0.0.1:{taken.getsockname()[1]}"

        yield make


@pytest.fixture
def deaf() -> Iterator[str]:
    """An endpoint that never accepts, and whose backlog is full: whoever connects waits."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(8):
            client = stack.enter_context(socket.socket())
            client.setblocking(False)
            assert client.connect_ex(listener.getsockname()) == errno.EINPROGRESS
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.parametrize("balance", ["round-robin", "least-loaded"])
async def test_refused_connection_goes_to_another_member(
    start_edge: StartEdge, simulator: Simulator, refusing: Callable[[], str], balance: str
) -> None:
    """Nothing was sent, so no other endpoint has begun the work."""
    urls = (refusing(), refusing(), simulator.url)
    edge = await start_edge(pool_of(*urls, weights=(1000, 30, 1), more=f'balance = "{balance}"'))
    assert (await soon(edge.ask(ASK)))[0] == 200
    line = await last_line(edge)
    assert (line["status"], line["end"], line["retries"], line["replays"]) == (200, "complete", 2, 0)
    assert line["endpoint"] == simulator.url.removeprefix("http://")
    assert len(simulator.requests) == 1


@pytest.mark.parametrize("members", [1, 2, 3])
async def test_pool_of_which_nobody_can_be_reached_is_unavailable(
    start_edge: StartEdge, refusing: Callable[[], str], members: int
) -> None:
    """Each member is tried once, and the client's connection stays."""
    edge = await start_edge(pool_of(*(refusing() for _ in range(members))))
    client = await edge.connect()
    for _ in range(2):
        client.send(edge.request(ASK))
        status, headers, body = await soon(client.response())
        assert (status, code_of(body)) == (503, "upstream_unavailable")
        assert 1 <= int(headers["retry-after"]) <= 59
        assert b"127.0.0.1" not in body
        line = await last_line(edge)
        assert (line["end"], line["retries"], line["replays"]) == ("upstream_error", members - 1, 0)


async def test_endpoint_that_comes_back_is_used_again(start_edge: StartEdge) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        edge = await start_edge(pool_of(f"http://127.0.0.1:{taken.getsockname()[1]}"))
        assert (await soon(edge.ask(ASK)))[0] == 503
        simulator = Simulator()
        await simulator.start(sock=taken)
        try:
            assert (await soon(edge.ask(ASK)))[0] == 200
            await edge.consistent()
        finally:
            await simulator.close()


async def test_endpoint_that_never_accepts_is_passed_over(
    start_edge: StartEdge, simulator: Simulator, deaf: str
) -> None:
    edge = await start_edge(pool_of(deaf, simulator.url, weights=(100, 1), more='connect_timeout = "100ms"'))
    assert (await soon(edge.ask(ASK)))[0] == 200
    line = await last_line(edge)
    assert (line["status"], line["retries"]) == (200, 1)


async def test_pool_of_which_nobody_accepts_is_unavailable(start_edge: StartEdge, deaf: str) -> None:
    edge = await start_edge(pool_of(deaf, more='connect_timeout = "100ms"'))
    status, headers, body = await soon(edge.ask(ASK))
    assert (status, code_of(body)) == (503, "upstream_unavailable")
    assert 1 <= int(headers["retry-after"]) <= 59
    line = await last_line(edge)
    assert (line["end"], line["retries"]) == ("upstream_error", 0)


async def test_client_that_leaves_while_the_edge_connects_frees_the_endpoint(
    start_edge: StartEdge, deaf: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    edge = await start_edge(pool_of(deaf, more='connect_timeout = "60s"'))
    connecting = asyncio.Event()
    connect = ConnectionPool.connect

    async def noted(self: ConnectionPool, *times_s: float) -> UpstreamConnection:
        connecting.set()
        return await connect(self, *times_s)

    monkeypatch.setattr(ConnectionPool, "connect", noted)
    client = await edge.connect()
    client.send(edge.request(ASK))
    await soon(connecting.wait())
    [endpoint] = edge.server.endpoints.states()
    assert endpoint.in_flight == 1
    client.abort()
    line = await last_line(edge)
    assert (line["end"], line["status"]) == ("client_gone", 0)


# --- names


class Names(dict[str, int | BaseException | None]):
    """A name service: to each host a port of this machine, an error, or None for no answer at all."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []


@pytest.fixture
async def names(monkeypatch: pytest.MonkeyPatch) -> Names:
    known = Names()
    loop = asyncio.get_running_loop()
    look_up: Any = loop.getaddrinfo

    async def getaddrinfo(host: str, port: int, **options: Any) -> Any:
        if host == "127.0.0.1":
            return await look_up(host, port, **options)
        known.asked.append(host)
        found = known.get(host, OSError("not known to the test"))
        if isinstance(found, BaseException):
            raise found
        if found is None:
            await asyncio.Event().wait()
        return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.1", found))]

    monkeypatch.setattr(loop, "getaddrinfo", getaddrinfo)
    return known


INSTANCES = '[routes."u-*"]\ninstance = "http://{service}.{owner}.svc.cluster.local:8000"\n'


async def test_instance_is_asked_at_the_host_of_its_name(
    start_edge: StartEdge, start_upstream: StartUpstream, names: Names
) -> None:
    """And keeps a connection of its own."""
    services = ["qwen2", "phi-4", "a"]
    upstreams = [await start_upstream(answer) for _ in services]
    for name, upstream in zip(services, upstreams, strict=True):
        names[f"{name}.{USER}.svc.cluster.local"] = int(upstream.url.rpartition(":")[2])
    edge = await start_edge(INSTANCES)
    for _ in range(2):
        for name in services:
            assert (await soon(edge.ask({"model": f"{USER}/{name}", "messages": []})))[0] == 200
            await edge.consistent()
    for name, upstream in zip(services, upstreams, strict=True):
        assert (len(upstream.requests), upstream.connections) == (2, 1)
        for request in upstream.requests:
            assert f"\r\nHost: {name}.{USER}.svc.cluster.local:8000\r\n".encode() in request
            assert json.loads(request.partition(b"\r\n\r\n")[2])["model"] == f"{USER}/{name}"


NO_LABELS = (
    *("", "-a", "a-", "A", "a_b", "a.b", "a/b", "a:1", "a@b", "a#", "a?", "a%2e", "..", "a b", "a\r\nx: y", "\0"),
    *("é", "xn--é", "a" * 64, "{owner}", "127.0.0.1", "[::1]", "a\\b", "a\t", "a\n"),
)


async def test_name_that_is_no_dns_label_is_asked_nowhere(start_edge: StartEdge, names: Names) -> None:
    edge = await start_edge(INSTANCES)
    with KeyRegistry(edge.keys_path) as registry:
        key, _ = registry.create(USER, allow=("*",))
    client = await edge.connect()
    for model in itertools.chain.from_iterable((f"{USER}/{name}", f"u-{name}-/a", f"u-{name}") for name in NO_LABELS):
        client.send(edge.request({"model": model, "messages": []}, key=key))
        status, _, body = await soon(client.response())
        assert (status, code_of(body)) == (404, "model_not_found"), model
    await edge.consistent()
    assert not names.asked


@pytest.mark.parametrize(
    "failure",
    [
        socket.gaierror(socket.EAI_NONAME, "Name or service not known"),
        socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution"),
        OSError(errno.ENETUNREACH, "Network is unreachable"),
        UnicodeError("label too long"),
        ssl.SSLError("handshake failed"),
        None,
    ],
    ids=repr,
)
async def test_host_without_an_address_is_unavailable(
    start_edge: StartEdge, names: Names, failure: BaseException | None
) -> None:
    """And no answer of the name service at all is bounded by `connect_timeout`."""
    names["model.example"] = names[f"qwen2.{USER}.svc.cluster.local"] = failure
    edge = await start_edge(pool_of("http://model.example:1", more='connect_timeout = "100ms"') + INSTANCES)
    for model in ("public/deepseek-r1", f"{USER}/qwen2"):
        status, headers, body = await soon(edge.ask({"model": model, "messages": []}))
        assert (status, code_of(body)) == (503, "upstream_unavailable")
        assert 1 <= int(headers["retry-after"]) <= 59
        assert not any(word in body for word in (b"example", b"cluster", b"address", b"name", b"label", b"handshake"))
        line = await last_line(edge)
        assert (line["end"], line["retries"]) == ("upstream_error", 0)


async def test_name_that_does_not_resolve_is_unavailable(start_edge: StartEdge) -> None:
    edge = await start_edge(ROUTES.replace("{upstream}", "http://nothing.invalid:1"))
    for model in ("public/deepseek-r1", f"{USER}/qwen2"):
        status, _, body = await soon(edge.ask({"model": model, "messages": []}))
        assert (status, code_of(body)) == (503, "upstream_unavailable")
    await edge.consistent()


# --- which endpoint


async def test_round_robin_asks_members_in_turn_by_weight(start_edge: StartEdge, start_upstream: StartUpstream) -> None:
    """As nginx does: 5, 1, 1 is a a b a c a a."""
    asked: list[str] = []

    def script(name: str) -> Script:
        async def note(connection: ScriptedConnection) -> None:
            asked.append(name)
            await connection.send(ANSWER)

        return note

    urls = [(await start_upstream(script(name))).url for name in "abc"]
    edge = await start_edge(pool_of(*urls, weights=(5, 1, 1), more='balance = "round-robin"'))
    for _ in range(14):
        assert (await soon(edge.ask(ASK)))[0] == 200
    assert "".join(asked) == "aabacaa" * 2
    await edge.consistent()


@pytest.fixture
async def members() -> AsyncIterator[list[Simulator]]:
    """Three simulators that think for ever."""
    async with AsyncExitStack() as stack:
        running = [Simulator(Behaviour(ttft_ms=3_600_000)) for _ in range(3)]
        for simulator in running:
            await simulator.start()
            stack.push_async_callback(simulator.close)
        yield running


async def until_active(members: list[Simulator], count: int) -> None:
    """Wait until there are so many requests at all members."""
    async with asyncio.TaskGroup() as tasks:
        arrived = asyncio.Event()

        async def wait(member: Simulator) -> None:
            await member.wait_for(lambda: sum(each.active for each in members) >= count)
            arrived.set()

        waiting = [tasks.create_task(wait(member)) for member in members]
        await soon(arrived.wait())
        for each in waiting:
            each.cancel()


async def test_least_loaded_member_for_its_weight_is_asked(start_edge: StartEdge, members: list[Simulator]) -> None:
    first, second, _ = members
    balance = 'balance = "least-loaded"'
    edge = await start_edge(pool_of(first.url, second.url, weights=(2, 1), more=balance))
    for count in (3, 6, 9):
        for _ in range(3):
            (await edge.connect()).send(edge.request(ASK))
        await until_active(members, count)
        assert (first.active, second.active) == (count * 2 // 3, count // 3)
    for client in edge._clients:
        client.abort()
    await soon(edge.consistent())


async def test_member_that_is_busy_is_left_alone_until_it_is_free(
    start_edge: StartEdge, members: list[Simulator]
) -> None:
    first, second, _ = members
    edge = await start_edge(pool_of(first.url, second.url, more='balance = "least-loaded"'))
    long = await edge.connect()
    long.send(edge.request(ASK))
    await until_active(members, 1)
    busy, free = (first, second) if first.active else (second, first)
    free.behaviour = Behaviour()
    for _ in range(20):
        assert (await soon(edge.ask(ASK)))[0] == 200
    assert (len(busy.requests), len(free.requests)) == (1, 20)
    long.abort()
    await soon(edge.consistent())


# --- in flight

WAYS: dict[str, dict[str, Any]] = {
    "complete": {},
    "upstream_error": {"fault": "error", "status": 500},
    "upstream_error before the head": {"fault": "cut", "after": -1},
    "upstream_error in rubbish": {"fault": "rubbish"},
    "upstream_error in the first event": {"fault": "error_first", "status": 429},
    "upstream_cut": {"fault": "cut", "after": 2},
    "upstream_cut by a reset": {"fault": "reset", "after": 2},
    "first_byte_timeout": {"fault": "stall", "after": -1},
    "idle_timeout": {"fault": "stall", "after": 2},
    "client_gone": {"ttft_ms": 3_600_000},
    "client_gone from a stream": {"interval_ms": 3_600_000},
}


@pytest.mark.parametrize("way", WAYS)
async def test_request_is_in_flight_at_its_endpoint_until_it_ends(
    start_edge: StartEdge, simulator: Simulator, way: str
) -> None:
    times = 'first_byte_timeout = "200ms"\nidle_timeout = "200ms"' if "timeout" in way else ""
    edge = await start_edge(pool_of(simulator.url, more=times))
    [endpoint] = edge.server.endpoints.states()
    counts: list[int] = []

    def asked() -> bool:
        if simulator.requests:
            counts.append(endpoint.in_flight)
        return bool(counts)

    client = await edge.connect()
    client.send(edge.request({**ASK, "stream": True, "simulate": {"tokens": 4, **WAYS[way]}}))
    await soon(simulator.wait_for(asked))
    if way.startswith("client_gone"):
        if "stream" in way:
            await soon(client.head())
        client.abort()
    line = await last_line(edge)
    assert line["end"] == way.partition(" ")[0]
    assert counts[0] == 1
    assert endpoint.in_flight == 0


# --- TLS


class SecureUpstream(ScriptedUpstream):
    """A scripted upstream that speaks TLS."""

    def __init__(self, script: Script, authority: trustme.CA, name: str = "127.0.0.1") -> None:
        super().__init__(script)
        self._context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        authority.issue_cert(name).configure_cert(self._context)

    async def start(self) -> str:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._context)
        return self.url.replace("http:", "https:")


@pytest.mark.parametrize("die", [answer, close, reset])
async def test_connection_with_tls_is_reused_and_replayed_like_any_other(
    start_edge: StartEdge, tmp_path: Path, die: Script
) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    script = Reuse()
    upstream = SecureUpstream(script, authority)
    try:
        edge = await start_edge(pool_of(await upstream.start(), more=f'ca_file = "{tmp_path / "ca.pem"}"'))
        for _ in range(3):
            assert (await soon(edge.ask(ASK)))[0] == 200
            await edge.consistent()
        assert upstream.connections == 1
        script.then = die
        assert (await soon(edge.ask(ASK)))[0] == 200
        stale = die is not answer
        assert (await last_line(edge))["replays"] == stale
        assert upstream.connections == 1 + stale
    finally:
        await upstream.close()


async def test_certificate_is_proved_for_the_name_not_for_its_address(
    start_edge: StartEdge, names: Names, tmp_path: Path
) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    upstream = SecureUpstream(answer, authority, "model.test")
    try:
        names["model.test"] = names["other.test"] = port_of(await upstream.start())
        for host, status in (("model.test", 200), ("other.test", 503)):
            edge = await start_edge(pool_of(f"https://{host}", more=f'ca_file = "{tmp_path / "ca.pem"}"'))
            assert (await soon(edge.ask(ASK)))[0] == status
            await edge.consistent()
    finally:
        await upstream.close()


async def test_request_that_the_upstream_worked_on_is_not_sent_again(
    start_edge: StartEdge, start_upstream: StartUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection that had been closed shows it at once; one that dies later dies of the request."""
    monkeypatch.setattr("edge.relay.relay._STALE_WITHIN_S", 0.0)  # so that nothing is at once

    async def script(connection: ScriptedConnection) -> None:
        if len(upstream.requests) == 1:
            await connection.send(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}")
        else:
            connection.writer.close()

    upstream = await start_upstream(script)
    edge = await start_edge(ROUTES.replace("{upstream}", upstream.url))
    asked = {"model": "public/deepseek-r1", "messages": []}
    assert [(await edge.ask(asked))[0] for _ in range(2)] == [200, 502]
    assert len(upstream.requests) == 2
    await edge.consistent()


class LackingLoop:
    """The edge's loop, whose connections to upstreams fail with `number` while `lacks` says so of their port."""

    def __init__(self, edge: Edge, number: int, lacks: Callable[[int], bool]) -> None:
        self._loop = edge.server._loop
        self._number = number
        self._lacks = lacks
        self.tried: list[bool] = []  # and whether each failed
        for endpoint in edge.server.endpoints.states():
            endpoint.connections.loop = self  # type: ignore[assignment]

    async def create_connection(self, factory: Any, host: str, port: int, **kwargs: Any) -> Any:
        self.tried.append(self._lacks(port))
        if self.tried[-1]:
            raise OSError(self._number, "no more")
        return await self._loop.create_connection(factory, host, port, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loop, name)


def port_of(url: str) -> int:
    return int(url.rpartition(":")[2])


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EADDRNOTAVAIL])
async def test_what_the_edge_itself_lacks_is_its_own_503_and_no_verdict_on_the_endpoint(
    start_edge: StartEdge, simulator: Simulator, number: int
) -> None:
    """However often: the endpoint is asked again as soon as there is room."""
    edge = await start_edge(pool_of(simulator.url))
    [endpoint] = edge.server.endpoints.states()
    lacking = True
    LackingLoop(edge, number, lambda _: lacking)
    for _ in range(5):
        status, headers, body = await edge.ask(ASK)
        assert (status, code_of(body), "retry-after" in headers) == (503, "overloaded", True)
        assert not endpoint.health.is_tainted
    lacking = False
    assert (await edge.ask(ASK))[0] == 200
    await soon(edge.consistent())
    assert [line["error"] for line in await edge.log()][:5] == ["overloaded"] * 5


async def test_request_that_the_edge_has_no_descriptor_for_is_refused_not_failed_by_the_upstream(
    start_edge: StartEdge, simulator: Simulator
) -> None:
    """And no other member is asked: the edge would lack the same."""
    edge = await start_edge(pool_of(simulator.url, simulator.url.replace("127.0.0.1", "127.0.0.2")))
    loop = LackingLoop(edge, errno.EMFILE, lambda _: True)
    assert (await edge.ask(ASK))[0] == 503
    assert (await last_line(edge))["end"] == "refused"
    assert loop.tried == [True, True]  # twice at the same


async def test_without_a_descriptor_an_idle_connection_of_another_pool_makes_room(
    start_edge: StartEdge, simulator: Simulator, start_upstream: StartUpstream
) -> None:
    upstream = await start_upstream(answer)
    more = f'[pools.r2]\nendpoints = ["{upstream.url}"]\n[routes."public/other"]\npool = "r2"\n'
    edge = await start_edge(pool_of(simulator.url) + more)
    assert (await edge.ask({**ASK, "model": "public/other"}))[0] == 200
    await soon(edge.consistent())
    first, second = (edge.server.generation.pools[name].members[0].endpoint for name in ("r1", "r2"))
    assert len(second.connections) == 1
    loop = LackingLoop(edge, errno.EMFILE, lambda _: len(second.connections) > 0)
    assert (await edge.ask(ASK))[0] == 200
    assert loop.tried == [True, False]
    assert not first.health.is_tainted
    await soon(edge.consistent())


async def test_without_a_port_towards_one_member_another_is_asked(
    start_edge: StartEdge, simulator: Simulator, start_upstream: StartUpstream
) -> None:
    """Ports are counted for each address."""
    upstream = await start_upstream(answer)
    edge = await start_edge(pool_of(simulator.url, upstream.url, more='balance = "round-robin"'))
    loop = LackingLoop(edge, errno.EADDRNOTAVAIL, lambda port: port == port_of(simulator.url))
    assert [(await edge.ask(ASK))[0] for _ in range(4)] == [200] * 4
    assert any(loop.tried)
    assert not any(endpoint.health.is_tainted for endpoint in edge.server.endpoints.states())
    await soon(edge.consistent())
