"""`max_inflight` and `queue`: who waits, in which order, and that nobody who left holds a place."""

import asyncio
import json
import math
from collections.abc import Callable
from typing import Any

import pytest

from edge.attempt import Work
from edge.keys.stores.registry import KeyRegistry
from edge.simulator.server import Simulator
from edge.upstream.queueing import FairQueue
from tests.conftest import Edge, RawClient, ScriptedConnection, StartEdge, StartUpstream

BODY = {"model": "public/deepseek-r1", "messages": [{"role": "user", "content": "hi"}]}
OK = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}"
PATIENCE_S = 20


def routes(*urls: str, pool: str) -> str:
    endpoints = ", ".join(f'"{url}"' for url in urls)
    return f'[pools.p]\nendpoints = [{endpoints}]\n{pool}\n[routes."public/deepseek-r1"]\npool = "p"\n'


class Held:
    """An upstream's script that answers each request at its turn."""

    def __init__(self, answer: bytes = OK) -> None:
        self.arrived: asyncio.Queue[tuple[str, asyncio.Event]] = asyncio.Queue()
        self._answer = answer

    async def __call__(self, connection: ScriptedConnection) -> None:
        request_id = json.loads(connection.request.partition(b"\r\n\r\n")[2]).get("user", "")
        turn = asyncio.Event()
        self.arrived.put_nowait((request_id, turn))
        await turn.wait()
        await connection.send(self._answer)

    async def next(self) -> tuple[str, asyncio.Event]:
        async with asyncio.timeout(PATIENCE_S):
            return await self.arrived.get()


def waiting(edge: Edge) -> int:
    return edge.server.generation.pools["p"].waiting


class Queue:
    """The queue of a pool: a test waits until so many requests wait in it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._changed = asyncio.Event()
        for name in ("push", "pop", "remove"):
            monkeypatch.setattr(FairQueue, name, self._noting(getattr(FairQueue, name)))

    def _noting(self, act: Callable[..., Any]) -> Callable[..., Any]:
        def noting(*args: Any) -> Any:
            self._changed.set()
            return act(*args)

        return noting

    async def holds(self, edge: Edge, count: int) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while waiting(edge) != count:
                self._changed.clear()
                await self._changed.wait()


@pytest.fixture
async def queue(monkeypatch: pytest.MonkeyPatch) -> Queue:
    return Queue(monkeypatch)


async def send(edge: Edge, request_id: str, key: str | None = None) -> RawClient:
    client = await edge.connect()
    client.send(edge.request({**BODY, "user": request_id}, key=key, headers=(f"x-request-id: {request_id}",)))
    return client


async def test_no_endpoint_gets_more_than_its_cap_and_all_are_answered(
    start_edge: StartEdge, start_upstream: StartUpstream, queue: Queue
) -> None:
    held = Held()
    members = [await start_upstream(held) for _ in range(2)]
    edge = await start_edge(routes(*(each.url for each in members), pool="max_inflight = 2\nqueue = 10"))
    clients = [await send(edge, f"r{number}") for number in range(10)]
    await queue.holds(edge, 6)
    assert [each.in_flight for each in edge.server.endpoints.states()] == [2, 2]
    for _ in range(10):
        _, turn = await held.next()
        assert all(each.in_flight <= 2 for each in edge.server.endpoints.states())
        turn.set()
    assert [(await client.response())[0] for client in clients] == [200] * 10
    await edge.consistent()
    assert waiting(edge) == 0
    assert [len(each.waiting) for each in edge.server.endpoints.states()] == [0, 0]


async def test_two_hundred_requests_of_one_user_do_not_delay_the_single_one_of_another(
    start_edge: StartEdge, start_upstream: StartUpstream, queue: Queue
) -> None:
    """It is the next but one that is served: no longer than one service time after the one that runs."""
    held = Held()
    upstream = await start_upstream(held)
    edge = await start_edge(routes(upstream.url, pool='max_inflight = 1\nqueue = 300\nqueue_timeout = "1m"'))
    with KeyRegistry(edge.keys_path) as registry:
        other, _ = registry.create("u-other")
    clients = [await send(edge, f"many{number}") for number in range(201)]
    await queue.holds(edge, 200)
    for _ in range(20):
        (await held.next())[1].set()
    await queue.holds(edge, 180)
    single = await send(edge, "single", key=other)
    await queue.holds(edge, 181)
    order = []
    while "single" not in order:
        request_id, turn = await held.next()
        order.append(request_id)
        turn.set()
    assert len(order) <= 3  # the one that ran, at most one more, and this
    assert (await single.response())[0] == 200
    for client in clients:
        client.abort()
    await queue.holds(edge, 0)
    await edge.consistent()


async def test_a_full_queue_says_when_to_come_back(
    start_edge: StartEdge, start_upstream: StartUpstream, queue: Queue
) -> None:
    held = Held()
    upstream = await start_upstream(held)
    edge = await start_edge(routes(upstream.url, pool="max_inflight = 1\nqueue = 1"))
    first = await send(edge, "first")
    _, turn = await held.next()
    second = await send(edge, "second")
    await queue.holds(edge, 1)
    status, headers, body = await edge.ask(BODY)
    assert status == 503
    assert b"upstream_unavailable" in body
    assert 1 <= int(headers["retry-after"]) <= 59
    turn.set()
    (await held.next())[1].set()
    assert [(await client.response())[0] for client in (first, second)] == [200, 200]
    await edge.consistent()


async def test_without_a_queue_a_full_pool_refuses_at_once(
    start_edge: StartEdge, start_upstream: StartUpstream
) -> None:
    held = Held()
    upstream = await start_upstream(held)
    edge = await start_edge(routes(upstream.url, pool="max_inflight = 1"))
    first = await send(edge, "first")
    _, turn = await held.next()
    assert (await edge.ask(BODY))[0] == 503
    turn.set()
    assert (await first.response())[0] == 200
    assert len(upstream.requests) == 1


@pytest.mark.parametrize("queue", ["", 'queue = 1\nqueue_timeout = "20ms"'])
async def test_request_that_a_full_pool_refuses_is_none_of_its_limits(
    start_edge: StartEdge, start_upstream: StartUpstream, queue: str
) -> None:
    held = Held()
    upstream = await start_upstream(held)
    text = routes(upstream.url, pool=f"max_inflight = 1\n{queue}") + 'limit = "few"\n'
    edge = await start_edge(text + "[limits.few]\nrequests_per_minute = 2\nrequests_per_day = 2\n")
    first = await send(edge, "first")
    _, turn = await held.next()
    assert [(await edge.ask(BODY))[0] for _ in range(3)] == [503] * 3
    turn.set()
    assert (await first.response())[0] == 200
    second = await send(edge, "second")
    (await held.next())[1].set()
    assert [(await second.response())[0], (await edge.ask(BODY))[0]] == [200, 429]
    assert len(edge.records()) == 5
    await edge.consistent()


async def test_a_wait_that_is_too_long_ends_in_a_503(start_edge: StartEdge, start_upstream: StartUpstream) -> None:
    held = Held()
    upstream = await start_upstream(held)
    edge = await start_edge(routes(upstream.url, pool='max_inflight = 1\nqueue = 9\nqueue_timeout = "20ms"'))
    first = await send(edge, "first")
    _, turn = await held.next()
    status, headers, _ = await edge.ask(BODY)
    assert (status, "retry-after" in headers) == (503, True)
    assert waiting(edge) == 0
    turn.set()
    assert (await first.response())[0] == 200
    await edge.consistent()


async def test_a_client_that_leaves_while_it_waits_takes_no_place(
    start_edge: StartEdge, start_upstream: StartUpstream, queue: Queue
) -> None:
    held = Held()
    upstream = await start_upstream(held)
    edge = await start_edge(routes(upstream.url, pool="max_inflight = 1\nqueue = 9"))
    first = await send(edge, "first")
    _, turn = await held.next()
    gone = await send(edge, "gone")
    await queue.holds(edge, 1)
    last = await send(edge, "last")
    await queue.holds(edge, 2)
    gone.abort()
    await queue.holds(edge, 1)
    turn.set()
    request_id, turn = await held.next()
    assert request_id == "last"
    turn.set()
    assert [(await client.response())[0] for client in (first, last)] == [200, 200]
    await edge.consistent()
    ends = {line["request_id"]: line["end"] for line in await edge.log()}
    assert ends == {"first": "complete", "gone": "client_gone", "last": "complete"}


async def test_key_that_is_revoked_while_its_request_waits_for_a_place_gets_401_and_the_next_one_the_place(
    start_edge: StartEdge, start_upstream: StartUpstream, queue: Queue
) -> None:
    held = Held()
    upstream = await start_upstream(held)
    edge = await start_edge(routes(upstream.url, pool="max_inflight = 1\nqueue = 9"))
    first = await send(edge, "first")
    _, turn = await held.next()
    with KeyRegistry(edge.keys_path) as registry:
        key, record = registry.create("u-other")
        revoked = await send(edge, "revoked", key=key)
        await queue.holds(edge, 1)
        last = await send(edge, "last")
        await queue.holds(edge, 2)
        registry.revoke(record.id)
        while (await edge.ask({}, key=key))[0] != 401:
            pass
    turn.set()
    request_id, turn = await held.next()
    assert request_id == "last"
    turn.set()
    status, _, body = await revoked.response()
    assert (status, b"invalid_api_key" in body) == (401, True)
    assert [(await client.response())[0] for client in (first, last)] == [200, 200]
    await edge.consistent()


async def test_a_place_that_was_given_to_a_request_that_is_cancelled_goes_to_the_next(
    start_edge: StartEdge, start_upstream: StartUpstream, queue: Queue
) -> None:
    """Between the gift and the waking of its request a client may leave."""
    held = Held()
    upstream = await start_upstream(held)
    edge = await start_edge(routes(upstream.url, pool="max_inflight = 1\nqueue = 9"))
    pool = edge.server.generation.pools["p"]
    lease = pool.lease()
    assert lease is not None
    loop = asyncio.get_running_loop()
    with lease:
        one, two = (loop.create_task(pool.wait(f"u-{number}")) for number in (1, 2))
        await queue.holds(edge, 2)
    one.cancel()  # it has the place, and does not know yet
    given = await two
    assert one.cancelled()
    endpoint = given.endpoint
    assert endpoint.in_flight == 1
    with given:
        assert endpoint.in_flight == 1
    assert (endpoint.in_flight, pool.waiting) == (0, 0)


async def test_who_waits_is_served_after_a_reload_too(
    start_edge: StartEdge, start_upstream: StartUpstream, queue: Queue
) -> None:
    held = Held()
    upstream = await start_upstream(held)
    edge = await start_edge(routes(upstream.url, pool="max_inflight = 1\nqueue = 9"))
    first = await send(edge, "first")
    _, turn = await held.next()
    old = await send(edge, "old")
    await queue.holds(edge, 1)
    edge.config_path.write_text(edge.config_path.read_text().replace("queue = 9", "queue = 8"))
    await edge.server._apply(await edge.server._reloader.reload(edge.server.generation))
    new = await send(edge, "new")
    await queue.holds(edge, 1)  # of the new generation
    order = []
    for _ in range(2):
        turn.set()
        request_id, turn = await held.next()
        order.append(request_id)
    turn.set()
    assert order == ["old", "new"]
    assert [(await client.response())[0] for client in (first, old, new)] == [200] * 3
    await edge.consistent()


@pytest.mark.parametrize("status", ["429 Too Many Requests", "503 Busy"])
async def test_backpressure_of_one_member_tries_a_sibling_first(
    start_edge: StartEdge, start_upstream: StartUpstream, simulator: Simulator, status: str
) -> None:
    async def busy(connection: ScriptedConnection) -> None:
        await connection.send(f"HTTP/1.1 {status}\r\nretry-after: 7\r\ncontent-length: 0\r\n\r\n".encode())

    upstream = await start_upstream(busy)
    edge = await start_edge(routes(upstream.url, simulator.url, pool="max_inflight = 4\nqueue = 9"))
    for _ in range(6):
        assert (await edge.ask(BODY))[0] == 200
    assert len(upstream.requests) <= 1  # it rests for the time it asked for


async def test_metrics_show_how_many_wait(start_edge: StartEdge, start_upstream: StartUpstream, queue: Queue) -> None:
    held = Held()
    upstream = await start_upstream(held)
    edge = await start_edge(routes(upstream.url, pool="max_inflight = 1\nqueue = 9"))
    clients = [await send(edge, f"r{number}") for number in range(3)]
    await queue.holds(edge, 2)
    assert b'edge_pool_waiting{pool="p"} 2\n' in await edge.server.metrics.render()
    for _ in clients:
        (await held.next())[1].set()
    assert math.prod([(await client.response())[0] for client in clients]) == 200**3


async def test_request_that_waited_and_cannot_be_sent_gives_its_place_back(
    start_edge: StartEdge, start_upstream: StartUpstream, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held()
    upstream = await start_upstream(held)
    edge = await start_edge(routes(upstream.url, pool="max_inflight = 1\nqueue = 9"))
    clients = [await send(edge, "first")]
    _, turn = await held.next()
    clients += [await send(edge, "second"), await send(edge, "third")]
    await queue.holds(edge, 2)

    def fail(*args: object) -> None:
        monkeypatch.undo()
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(Work, "attempt", fail)
    turn.set()
    (await held.next())[1].set()
    assert [(await client.response())[0] for client in clients] == [200, 500, 200]
    await edge.consistent()


# --- by tokens, and with shares


async def test_places_go_by_what_requests_used_and_by_the_share_of_the_key(
    start_edge: StartEdge, start_upstream: StartUpstream, queue: Queue
) -> None:
    """The user whose answer took 5,000 tokens waits until a share of four has had 20,000."""
    usage = b'{"usage":{"prompt_tokens":5000,"completion_tokens":0,"total_tokens":5000}}'
    held = Held(OK.replace(b"length: 2\r\n\r\n{}", b"length: %d\r\n\r\n%b" % (len(usage), usage)))
    upstream = await start_upstream(held)
    edge = await start_edge(routes(upstream.url, pool='max_inflight = 1\nqueue = 50\nqueue_timeout = "1m"'))
    with KeyRegistry(edge.keys_path) as registry:
        four, _ = registry.create("u-four", share=4)
        one, _ = registry.create("u-one")
    first = await send(edge, "first")
    _, turn = await held.next()
    clients = [await send(edge, "one", key=one)]
    await queue.holds(edge, 1)
    clients += [await send(edge, "four", key=four) for _ in range(10)]
    await queue.holds(edge, 11)
    clients += [await send(edge, "one", key=one) for _ in range(3)]
    await queue.holds(edge, 14)
    turn.set()
    order = []
    for _ in clients:
        name, turn = await held.next()
        order.append(name)
        turn.set()
    assert [(await client.response())[0] for client in (first, *clients)] == [200] * 15
    assert order[0] == "one"
    assert order[1:6].count("four") >= 4
    assert order[:11].count("four") == 8
    await edge.consistent()


# --- over a limit


WAITS = """
[limits.standard]
requests_per_minute = 1
{wait}
[pools.p]
endpoints = ["{url}"]
max_inflight = 4
queue = 2
[routes."public/deepseek-r1"]
pool = "p"
limit = "standard"
"""


def held_up(edge: Edge) -> int:
    return edge.server.generation.pools["p"].held


@pytest.fixture
def minute(monkeypatch: pytest.MonkeyPatch) -> Callable[[Edge, float], None]:
    """Let time pass for the limits of an edge."""

    def pass_(edge: Edge, seconds: float) -> None:
        clock = edge.server.admission.clock
        edge.server.admission.clock = lambda: clock() + seconds

    return pass_


async def ask_with(edge: Edge, prefer: str, request_id: str = "r") -> RawClient:
    client = await edge.connect()
    client.send(edge.request(BODY, headers=(f"x-request-id: {request_id}", *([f"prefer: {prefer}"] if prefer else []))))
    return client


@pytest.mark.parametrize(("wait", "prefer"), [('wait = "200s"', ""), ('wait = "200s"', "wait=190"), ("", "wait=55")])
async def test_request_over_its_limit_waits_for_it_and_says_whose_wish_that_is(
    start_edge: StartEdge,
    simulator: Simulator,
    queue: Queue,
    minute: Callable[[Edge, float], None],
    wait: str,
    prefer: str,
) -> None:
    edge = await start_edge(WAITS.format(wait=wait, url=simulator.url))
    minute(edge, 110 - edge.server.admission.clock() % 60)  # at most ten seconds of the minute are to be waited for
    assert (await (await ask_with(edge, "")).response())[0] == 200
    minute(edge, 60.0)
    client = await ask_with(edge, prefer)
    async with asyncio.timeout(PATIENCE_S):
        while held_up(edge) != 1:
            await asyncio.sleep(0)
    assert edge.server.proxy.in_flight == 1
    minute(edge, 60.0)
    status, headers, _ = await client.response()
    assert (status, headers.get("preference-applied")) == (200, prefer or None)
    assert headers["x-ratelimit-limit-requests"] == "1"
    await edge.consistent()


async def test_key_that_is_revoked_while_its_request_waits_for_its_limit_gets_401(
    start_edge: StartEdge, start_upstream: StartUpstream
) -> None:
    held = Held()
    upstream = await start_upstream(held)
    text = WAITS.format(wait='wait = "200s"', url=upstream.url).replace("requests_per_minute", "concurrent_requests")
    edge = await start_edge(text)
    with KeyRegistry(edge.keys_path) as registry:
        key, record = registry.create("u-other")
        first, waits = await send(edge, "first", key=key), await send(edge, "waits", key=key)
        _, turn = await held.next()
        async with asyncio.timeout(PATIENCE_S):
            while held_up(edge) != 1:
                await asyncio.sleep(0)
            registry.revoke(record.id)
            status, _, body = await waits.response()
    assert (status, b"invalid_api_key" in body) == (401, True)
    turn.set()
    assert (await first.response())[0] == 200
    await edge.consistent()
    assert len(edge.records()) == 1, "it was not accepted"


async def test_request_that_had_not_to_wait_for_its_limit_is_not_told_as_one_that_did(
    start_edge: StartEdge, simulator: Simulator
) -> None:
    edge = await start_edge(WAITS.format(wait='wait = "200s"', url=simulator.url))
    assert (await edge.ask(BODY))[0] == 200
    await edge.idle()
    (line,) = await edge.log()
    assert line["queue_ms"] is None
    assert b'edge_pool_wait_seconds_count{pool="p"}' not in await edge.server.metrics.render()


@pytest.mark.parametrize(("wait", "prefer"), [("", ""), ('wait = "0s"', "wait=60"), ('wait = "200s"', "wait=0")])
async def test_request_that_nobody_lets_wait_gets_its_429_at_once(
    start_edge: StartEdge, simulator: Simulator, wait: str, prefer: str
) -> None:
    edge = await start_edge(WAITS.format(wait=wait, url=simulator.url))
    assert (await (await ask_with(edge, prefer)).response())[0] == 200
    status, headers, _ = await (await ask_with(edge, prefer)).response()
    assert status == 429
    assert 1 <= int(headers["retry-after"]) <= 59


async def test_who_leaves_while_it_waits_for_its_limit_is_gone_and_more_than_the_queue_holds_are_refused(
    start_edge: StartEdge, simulator: Simulator
) -> None:
    edge = await start_edge(WAITS.format(wait='wait = "200s"', url=simulator.url))
    assert (await (await ask_with(edge, "")).response())[0] == 200
    clients = [await ask_with(edge, "", f"r{number}") for number in range(2)]
    async with asyncio.timeout(PATIENCE_S):
        while held_up(edge) != 2:
            await asyncio.sleep(0)
    shown = await edge.server.metrics.render()
    assert b'edge_pool_held{pool="p"} 2\n' in shown
    assert b'edge_pool_waiting{pool="p"} 0\n' in shown, "the pool is not full"
    assert (await (await ask_with(edge, "wait=190")).response())[0] == 429
    for client in clients:
        client.abort()
    async with asyncio.timeout(PATIENCE_S):
        while held_up(edge) or edge.server.proxy.in_flight:
            await asyncio.sleep(0)
    await edge.consistent()
    ends = {line["request_id"]: line["end"] for line in await edge.log()}
    assert (ends["r0"], ends["r1"]) == ("client_gone", "client_gone")
    assert len(edge.records()) == 1, "who waited was not accepted"


async def test_a_stop_waits_for_those_who_wait_for_their_limit_and_cuts_them_in_the_end(
    start_edge: StartEdge, simulator: Simulator
) -> None:
    edge = await start_edge(WAITS.format(wait='wait = "200s"', url=simulator.url), server='drain_timeout = "50ms"')
    assert (await (await ask_with(edge, "")).response())[0] == 200
    client = await ask_with(edge, "", "waits")
    async with asyncio.timeout(PATIENCE_S):
        while held_up(edge) != 1:
            await asyncio.sleep(0)
    edge.server.stop()
    async with asyncio.timeout(PATIENCE_S):
        while edge.server.proxy.in_flight:
            await asyncio.sleep(0.01)
    ends = {line["request_id"]: line["end"] for line in await edge.log()}
    assert ends["waits"] == "drained"
    client.abort()
