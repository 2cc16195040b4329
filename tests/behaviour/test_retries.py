"""Asking another member: before the first byte, for fast failures only, within a budget."""

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack

import pytest

from edge.keys.stores.registry import KeyRegistry
from edge.simulator.server import Simulator
from tests.conftest import Edge, Script, ScriptedConnection, StartEdge, StartUpstream

BODY = {"model": "public/deepseek-r1", "messages": [{"role": "user", "content": "hi"}]}


def routes(*urls: str, pool: str = 'balance = "round-robin"') -> str:
    endpoints = ", ".join(f'"{url}"' for url in urls)
    return f'[pools.p]\nendpoints = [{endpoints}]\n{pool}\n[routes."public/deepseek-r1"]\npool = "p"\n'


def says(status: str, body: bytes = b'{"error":{"message":"no"}}', *headers: str) -> Script:
    async def script(connection: ScriptedConnection) -> None:
        lines = [
            f"HTTP/1.1 {status}",
            "content-type: application/json",
            f"content-length: {len(body)}",
            *headers,
            "",
            "",
        ]
        await connection.send("\r\n".join(lines).encode() + body)

    return script


def keys_of(edge: Edge, users: int) -> list[str]:
    """A key of each of so many users."""
    with KeyRegistry(edge.keys_path) as registry:
        return [registry.create(f"u-{at:012x}")[0] for at in range(users)]


async def resets(connection: ScriptedConnection) -> None:
    connection.reset()


@pytest.mark.parametrize("status", ["429 Too Many Requests", "502 Bad Gateway", "503 Busy", "504 Late"])
async def test_a_fast_failure_is_tried_at_a_sibling(
    start_edge: StartEdge, start_upstream: StartUpstream, simulator: Simulator, status: str
) -> None:
    bad = await start_upstream(says(status))
    edge = await start_edge(routes(bad.url, simulator.url))
    answers = [await edge.ask(BODY) for _ in range(4)]
    assert [answer[0] for answer in answers] == [200] * 4
    assert bad.requests
    assert sum(line["retries"] for line in await edge.log()) == len(bad.requests)
    await edge.consistent()


@pytest.mark.parametrize("status", ["400 Bad Request", "422 Unprocessable", "500 Failed"])
async def test_what_another_member_could_not_mend_is_not_tried_again(
    start_edge: StartEdge, start_upstream: StartUpstream, status: str
) -> None:
    """A 500 may be what this prompt does to every engine."""
    members = [await start_upstream(says(status)) for _ in range(2)]
    edge = await start_edge(routes(*(each.url for each in members)))
    answer, _, _ = await edge.ask(BODY)
    assert answer == {"500": 502}.get(status[:3], int(status[:3]))
    assert sum(len(each.requests) for each in members) == 1


async def test_each_member_is_asked_at_most_once(start_edge: StartEdge, start_upstream: StartUpstream) -> None:
    members = [await start_upstream(says("503 Busy", b"{}", "retry-after: 3")) for _ in range(3)]
    edge = await start_edge(routes(*(each.url for each in members)))
    status, headers, _ = await edge.ask(BODY)
    assert (status, headers["retry-after"]) == (503, "3")
    assert [len(each.requests) for each in members] == [1, 1, 1]
    await edge.consistent()


async def test_an_error_that_opens_a_stream_is_tried_at_a_sibling(
    start_edge: StartEdge, start_upstream: StartUpstream, simulator: Simulator
) -> None:
    frame = b'data: {"error":{"message":"overloaded","code":503}}\n\n'

    async def script(connection: ScriptedConnection) -> None:
        head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        await connection.send(head, b"%x\r\n%b\r\n0\r\n\r\n" % (len(frame), frame))

    bad = await start_upstream(script)
    edge = await start_edge(routes(bad.url, simulator.url))
    for _ in range(2):
        status, _, body = await edge.ask({**BODY, "stream": True})
        assert status == 200
        assert body.endswith(b"data: [DONE]\n\n")
    assert bad.requests


async def test_a_connection_that_died_with_the_request_on_it_is_tried_again_only_when_asked(
    start_edge: StartEdge, start_upstream: StartUpstream, simulator: Simulator
) -> None:
    """A prompt that crashed one engine must not go on to the next."""
    bad = await start_upstream(resets)
    careful = await start_edge(routes(bad.url, simulator.url))
    assert sorted([(await careful.ask(BODY))[0] for _ in range(2)]) == [200, 502]
    bold = await start_edge(routes(bad.url, simulator.url, pool='balance = "round-robin"\nretry_after_send = true'))
    assert [(await bold.ask(BODY))[0] for _ in range(2)] == [200, 200]


async def test_a_failure_that_came_late_is_not_tried_again(
    start_edge: StartEdge, start_upstream: StartUpstream
) -> None:
    """`retry_within = "0s"`: every failure is late."""
    members = [await start_upstream(says("503 Busy")) for _ in range(2)]
    edge = await start_edge(routes(*(each.url for each in members), pool='retry_within = "0s"'))
    assert (await edge.ask(BODY))[0] == 503
    assert sum(len(each.requests) for each in members) == 1


async def test_retries_are_bounded_by_the_budget(start_edge: StartEdge, start_upstream: StartUpstream) -> None:
    """A pool that is down is not asked twice as often: past the budget only three retries run at once."""
    members = [await start_upstream(says("503 Busy")) for _ in range(2)]
    edge = await start_edge(routes(*(each.url for each in members), pool="retry_budget = 0"))
    pool = edge.server.generation.pools["p"]
    pool.retrying = 3
    assert (await edge.ask(BODY))[0] == 503
    assert sum(len(each.requests) for each in members) == 1
    pool.retrying = 2
    assert (await edge.ask(BODY))[0] == 503
    assert sum(len(each.requests) for each in members) == 3
    assert pool.retrying == 2  # counted while it ran


async def test_a_budget_of_all_lets_all_be_asked_again(start_edge: StartEdge, simulator: Simulator) -> None:
    """The last of those whose server died too, whose own place is free by then."""
    pool = (await start_edge(routes(simulator.url, pool="retry_budget = 1.0"))).server.generation.pools["p"]
    leases = [pool.lease([], None, "u") for _ in range(3)]
    with ExitStack() as places:
        for lease in leases:
            assert lease is not None
            places.enter_context(lease)
        pool.retrying = 3
        assert pool.may_retry()
        pool.retrying = 4
        assert not pool.may_retry()


async def test_a_member_that_fails_is_ejected_and_comes_back(
    start_edge: StartEdge, start_upstream: StartUpstream, simulator: Simulator
) -> None:
    bad = await start_upstream(resets)
    edge = await start_edge(routes(bad.url, simulator.url))
    keys = keys_of(edge, 3)
    statuses = [(await edge.ask(BODY, key=keys[at // 2 % 3]))[0] for at in range(20)]
    assert statuses.count(502) == 3  # three faults, then nobody is sent there
    verbose = await admin(edge, "/readyz?verbose")
    assert f"endpoint {bad.url.removeprefix('http://')}: ejected" in verbose
    assert "edge_upstream_ejections_total" in await admin(edge, "/metrics")
    bad.script = says("200 OK", b"{}")
    ejected = next(each for each in edge.server.endpoints.states() if each.health.ejected_until)
    ejected.health._everyone.until = edge.server._loop.time()  # its time is over
    assert [(await edge.ask(BODY))[0] for _ in range(4)] == [200] * 4
    assert not ejected.health.is_tainted


async def test_no_more_than_half_of_a_pool_is_ejected(start_edge: StartEdge, start_upstream: StartUpstream) -> None:
    """With everybody out nobody would ever be asked again."""
    members = [await start_upstream(says("502 Bad Gateway")) for _ in range(2)]
    edge = await start_edge(routes(*(each.url for each in members), pool="retry_budget = 0"))
    for _ in range(12):
        assert (await edge.ask(BODY))[0] == 502
    before = sum(len(each.requests) for each in members)
    await edge.ask(BODY)
    assert sum(len(each.requests) for each in members) > before


async def test_health_is_kept_across_a_reload(
    start_edge: StartEdge, start_upstream: StartUpstream, simulator: Simulator
) -> None:
    bad = await start_upstream(resets)
    edge = await start_edge(routes(bad.url, simulator.url))
    for _ in range(8):
        await edge.ask(BODY)
    seen = len(bad.requests)
    edge.config_path.write_text(edge.config_path.read_text() + '[routes."public/other"]\npool = "p"\n')
    await edge.server._apply(await edge.server._reloader.reload(edge.server.generation))
    assert edge.server.generation.number == 2
    for _ in range(8):
        assert (await edge.ask(BODY))[0] == 200
    assert len(bad.requests) == seen


async def admin(edge: Edge, path: str) -> str:
    reader, writer = await asyncio.open_connection("127.0.0.1", edge.admin_port)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n".encode())
    try:
        return (await reader.read()).decode()
    finally:
        writer.close()


class Probed:
    """An upstream whose GETs are answered by path, 404 for a path without an answer; `asked` are the paths so far."""

    def __init__(self) -> None:
        self.answers: dict[str, Iterator[int]] = {}
        self.asked: list[str] = []
        self._came = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        path = (await reader.readuntil(b"\r\n\r\n")).decode().split()[1]
        status = next(self.answers[path]) if path in self.answers else 404
        writer.write(f"HTTP/1.1 {status} X\r\ncontent-length: 0\r\nconnection: close\r\n\r\n".encode())
        writer.close()
        self.asked.append(path)
        self._came.set()

    async def until_asked(self, times: int) -> None:
        """Wait for so many probes; what all of them but the last showed has taken effect."""
        async with asyncio.timeout(20):
            while len(self.asked) < times:
                self._came.clear()
                await self._came.wait()


@pytest.fixture
async def probed() -> AsyncIterator[tuple[Probed, str]]:
    """An upstream that is probed, and its URL."""
    upstream = Probed()
    async with await asyncio.start_server(upstream.serve, "127.0.0.1", 0) as server:
        yield upstream, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


@pytest.mark.parametrize(
    ("engine", "answers", "paths", "healthy"),
    [
        ("vllm", {"/health": 200}, ["/health"], True),
        ("vllm", {"/health": 503}, ["/health"], False),
        ("sglang", {"/ready": 503, "/health": 200}, ["/ready"], False),
        ("sglang", {"/health": 200}, ["/ready", "/health"], True),
        ("llamacpp", {"/health": 200}, ["/health"], True),
    ],
)
async def test_each_engine_is_asked_where_it_reports_its_health(
    start_edge: StartEdge,
    probed: tuple[Probed, str],
    engine: str,
    answers: dict[str, int],
    paths: list[str],
    healthy: bool,
) -> None:
    upstream, url = probed
    upstream.answers = {path: itertools.repeat(status) for path, status in answers.items()}
    edge = await start_edge(routes(url, pool=f'engine = "{engine}"\nhealth = {{ interval = "10ms" }}'))
    endpoint = next(edge.server.endpoints.states())
    await upstream.until_asked(4 * len(paths))
    assert upstream.asked[: len(paths)] == paths
    assert endpoint.health.admits(0.0) is healthy


async def test_probes_that_take_an_endpoint_out_and_bring_it_back_are_logged(
    start_edge: StartEdge, probed: tuple[Probed, str], caplog: pytest.LogCaptureFixture
) -> None:
    """One failed probe takes nothing out, and a return is no problem."""
    caplog.set_level(logging.INFO, "edge.upstream.probes")
    upstream, url = probed
    upstream.answers["/health"] = itertools.chain([503, 200, 503, 503, 503, 200], itertools.repeat(200))
    await start_edge(routes(url, pool='health = { interval = "10ms" }'))
    await upstream.until_asked(8)
    name = url.removeprefix("http://")
    assert [(each.levelno, each.getMessage()) for each in caplog.records if each.name == "edge.upstream.probes"] == [
        (logging.WARNING, f"endpoint {name} fails its health check: /health answers 503"),
        (logging.INFO, f"endpoint {name} passes its health check again"),
    ]


async def test_a_reload_that_drops_the_probes_ends_them(start_edge: StartEdge, probed: tuple[Probed, str]) -> None:
    upstream, url = probed
    upstream.answers["/health"] = itertools.repeat(503)
    edge = await start_edge(routes(url, pool='health = { interval = "10ms" }'))
    endpoint = next(edge.server.endpoints.states())
    await upstream.until_asked(3)
    assert not endpoint.health.admits(0.0)
    edge.config_path.write_text(edge.config_path.read_text().replace('health = { interval = "10ms" }', ""))
    await edge.server._apply(await edge.server._reloader.reload(edge.server.generation))
    assert len(edge.server.probes) == 0
    assert endpoint.health.admits(0.0)  # no probe any more, so nothing is held against it
