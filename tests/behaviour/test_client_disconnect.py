"""A client that leaves: its upstream is let go in the same moment, in every phase, and nothing is left over."""

import asyncio
import random
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from edge.keys.stores.sqlite import SqliteKeyStore
from edge.relay.relay import Relay
from edge.simulator.server import Simulator
from edge.wire.connections import ConnectionPool
from tests.conftest import ROUTES, Edge, RawClient, ScriptedConnection, StartEdge, StartUpstream, WatchMethod, soon

NEVER_MS = 30_000  # until the upstream's next byte: longer than any wait here, so it is the abort that ends it
SSE_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def reset(client: RawClient) -> None:
    sock = client.writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.abort()


LEAVE: dict[str, Callable[[RawClient], None]] = {
    "close": RawClient.close,
    "reset": reset,
    "half-close": lambda client: client.writer.write_eof(),
}
ways = pytest.mark.parametrize("way", LEAVE)
streams = pytest.mark.parametrize("stream", [True, False], ids=["stream", "json"])


def ask(stream: bool = True, **simulate: Any) -> dict[str, Any]:
    return {"model": "public/deepseek-r1", "stream": stream, "messages": [], "simulate": simulate}


async def gone_in(edge: Edge, phase: str) -> None:
    """Assert that the only request ended because its client left in this phase, and left nothing over."""
    await soon(edge.consistent())
    await soon(edge.server.clients.wait_empty())
    [line] = await edge.log()
    assert (line["end"], line["ended_by"], line["phase"]) == ("client_gone", "client", phase)


async def upstream_let_go(simulator: Simulator) -> None:
    await soon(simulator.wait_for(lambda: [each.outcome for each in simulator.requests] == ["client_gone"]))
    await soon(simulator.wait_for(lambda: simulator.connections == 0))


@pytest.fixture
def deaf_port() -> Iterator[int]:
    """A port whose backlog is full, so that a connection to it is never established."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        fillers = [socket.socket() for _ in range(4)]
        for each in fillers:
            each.setblocking(False)
            each.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]
        for each in fillers:
            each.close()


def connecting_sockets(port: int) -> int:
    """How many sockets wait for this port (proc_pid_net(5): state 02 is SYN_SENT)."""
    lines = [line.split() for line in Path("/proc/self/net/tcp").read_text().splitlines()[1:]]
    return sum(line[2].endswith(f":{port:04X}") and line[3] == "02" for line in lines)


@ways
async def test_client_that_leaves_while_connecting_ends_the_attempt_and_no_other_is_made(
    start_edge: StartEdge, simulator: Simulator, deaf_port: int, watch: WatchMethod, way: str
) -> None:
    connecting = watch(ConnectionPool, "connect")
    edge = await start_edge(
        f"""
        [pools.r1]
        endpoints = ["http://127.0.0.1:{deaf_port}", "{simulator.url}"]
        balance = "round-robin"
        connect_timeout = "60s"
        [routes."public/deepseek-r1"]
        pool = "r1"
        """
    )
    before = connecting_sockets(deaf_port)
    client = await edge.connect()
    client.send(edge.request(ask()))
    await soon(connecting.called())
    await asyncio.sleep(0)
    LEAVE[way](client)
    await gone_in(edge, "lease")
    assert connecting_sockets(deaf_port) <= before
    assert not simulator.requests


@ways
async def test_client_that_leaves_while_its_key_is_looked_up_asks_nothing_upstream(
    edge: Edge, simulator: Simulator, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """The look-up itself goes on: others may wait for the same key."""
    asked, answer = asyncio.Event(), asyncio.Event()
    look_up = SqliteKeyStore.look_up

    async def slow(store: SqliteKeyStore, digest: bytes, key: str) -> Any:
        asked.set()
        await answer.wait()
        return await look_up(store, digest, key)

    monkeypatch.setattr(SqliteKeyStore, "look_up", slow)
    client, other = await edge.connect(), await edge.connect()
    client.send(edge.request(ask()))
    await soon(asked.wait())
    LEAVE[way](client)
    await soon(edge.consistent())
    [line] = await edge.log()
    assert (line["end"], line["ended_by"], line["phase"]) == ("client_gone", "client", "credential")
    other.send(edge.request(ask()))
    answer.set()
    assert (await soon(other.response()))[0] == 200
    assert len(simulator.requests) == 1


LENGTH, CHUNKED, PART = "Content-Length: 1000", "Transfer-Encoding: chunked", b'{"model":"public/deepseek-r1",'


# Every two values of the three meet once.
@pytest.mark.parametrize(("framing", "part", "way"), [
    (LENGTH, b"", "close"), (LENGTH, PART, "reset"), (LENGTH, b"", "half-close"),
    (CHUNKED, PART, "close"), (CHUNKED, b"", "reset"), (CHUNKED, PART, "half-close"),
])  # fmt: skip
async def test_client_that_leaves_within_its_body_asks_nothing_upstream(
    edge: Edge, simulator: Simulator, framing: str, part: bytes, way: str
) -> None:
    client = await edge.connect()
    head = edge.request(b"", headers=("Expect: 100-continue",)).replace(b"Content-Length: 0", framing.encode())
    client.send(head)
    assert (await soon(client.head())).startswith(b"HTTP/1.1 100 ")
    client.send(part if part and "Length" in framing else b"%x\r\n%b\r\n" % (len(part), part) if part else b"")
    await asyncio.sleep(0)
    LEAVE[way](client)
    await gone_in(edge, "body")
    assert not simulator.requests


@pytest.mark.parametrize(("way", "stream"), [("close", True), ("reset", False), ("half-close", True)])
async def test_client_that_leaves_before_the_first_byte_frees_the_upstream(
    edge: Edge, simulator: Simulator, stream: bool, way: str
) -> None:
    client = await edge.connect()
    client.send(edge.request(ask(stream, ttft_ms=NEVER_MS)))
    await soon(simulator.wait_for(lambda: simulator.requests and simulator.requests[0].body))
    LEAVE[way](client)
    await upstream_let_go(simulator)
    await gone_in(edge, "wait")


# Every two values of the three meet once.
@pytest.mark.parametrize(("stream", "version", "way"), [
    (True, "1.1", "close"), (True, "1.0", "reset"), (True, "1.1", "half-close"),
    (False, "1.0", "close"), (False, "1.1", "reset"), (False, "1.0", "half-close"),
])  # fmt: skip
async def test_client_that_leaves_within_the_answer_frees_the_upstream(
    edge: Edge, simulator: Simulator, stream: bool, version: str, way: str
) -> None:
    client = await edge.connect()
    pace = {"interval_ms": NEVER_MS} if stream else {"fault": "stall", "after_bytes": 20}
    client.send(edge.request(ask(stream, **pace), version=version))
    await soon(client.head())
    await soon(client.reader.readexactly(20))
    LEAVE[way](client)
    await upstream_let_go(simulator)
    await gone_in(edge, "stream")
    assert (await edge.log())[0]["response_bytes"] >= 20


@ways
@streams
async def test_client_that_leaves_with_bytes_queued_for_it_frees_the_upstream(
    start_edge: StartEdge, start_upstream: StartUpstream, watch: WatchMethod, stream: bool, way: str
) -> None:
    """A half-close too: whoever still reads would not stop to read first, and the queue would wait for ever."""
    event = b"data: " + b"x" * 65_536 + b"\n\n"

    async def script(connection: ScriptedConnection) -> None:
        await connection.send(SSE_HEAD if stream else b"HTTP/1.1 200 OK\r\ncontent-length: 99999999999\r\n\r\n")
        while True:
            await connection.send(b"%x\r\n%b\r\n" % (len(event), event))

    paused = watch(Relay, "client_paused")
    upstream = await start_upstream(script)
    edge = await start_edge(ROUTES.replace("{upstream}", upstream.url))
    client = await edge.connect()
    client.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**14)
    client.send(edge.request(ask(stream)))
    client.writer.transport.pause_reading()  # type: ignore[attr-defined]  # a transport that reads
    await soon(paused.called())
    LEAVE[way](client)
    await soon(upstream.gone.wait())
    await gone_in(edge, "stream")


async def test_client_that_half_closes_is_taken_for_gone_and_told_so_by_the_close(
    edge: Edge, simulator: Simulator
) -> None:
    """No client of an API does it; but a killed one looks the same, and its GPU slot is what counts."""
    client = await edge.connect()
    client.send(edge.request(ask(interval_ms=NEVER_MS)))
    await soon(client.head())
    client.writer.write_eof()
    rest = await soon(client.rest())
    assert not rest.endswith(b"0\r\n\r\n")
    await upstream_let_go(simulator)


@pytest.mark.parametrize(("count", "way"), [(1, "close"), (3, "half-close"), *((200, way) for way in LEAVE)])
async def test_pipelined_requests_of_a_gone_client_are_never_sent_upstream(
    edge: Edge, simulator: Simulator, count: int, way: str
) -> None:
    """However many wait: the edge stops taking more of them, and must hear of the departure still."""
    client = await edge.connect()
    later = edge.request(ask() | {"user": "later"})
    client.send(edge.request(ask(interval_ms=NEVER_MS)) + later * count)
    await soon(client.head())
    LEAVE[way](client)
    await upstream_let_go(simulator)
    await soon(edge.consistent())
    assert (await soon(edge.ask(ask())))[0] == 200
    assert not any(b"later" in each.body for each in simulator.requests)
    assert [line["end"] for line in await edge.log()] == ["client_gone", "complete"]


@ways
async def test_client_that_leaves_behind_a_large_pipelined_body_frees_the_upstream(
    edge: Edge, simulator: Simulator, way: str
) -> None:
    client = await edge.connect()
    client.send(edge.request(ask(interval_ms=NEVER_MS)) + edge.request(b" " * 2**22))
    await soon(client.head())
    LEAVE[way](client)
    await upstream_let_go(simulator)
    await soon(edge.consistent())
    assert len(simulator.requests) == 1
    assert (await edge.log())[0]["end"] == "client_gone"


async def test_fifty_clients_that_leave_at_random_leave_the_counts_whole(edge: Edge, simulator: Simulator) -> None:
    chance = random.Random(50)

    async def one() -> None:
        client = await edge.connect()
        stream = chance.random() < 0.8
        pace = chance.choice([{}, {"interval_ms": 1, "tokens": 50}, {"interval_ms": NEVER_MS}, {"ttft_ms": NEVER_MS}])
        data = edge.request(ask(stream, **pace))
        sent = chance.choice([0, 20, len(data) - 10, len(data), len(data), len(data)])
        client.send(data[:sent])
        if sent == len(data) and chance.random() < 0.7:
            with suppress(asyncio.IncompleteReadError, TimeoutError):
                async with asyncio.timeout(chance.random() / 5):  # the moment is random, nothing waits for it
                    await client.reader.readexactly(chance.randrange(1, 4096))
        LEAVE[chance.choice(["close", "reset"])](client)

    await soon(asyncio.gather(*(one() for _ in range(50))))
    await soon(edge.server.clients.wait_empty())
    await soon(edge.consistent())
    await soon(simulator.wait_for(lambda: simulator.active == 0))
    assert {each.outcome for each in simulator.requests} <= {"client_gone", "complete"}
    lines = await edge.log()
    assert {line["end"] for line in lines} == {"client_gone", "complete"}
    assert len({line["request_id"] for line in lines}) == len(lines) <= 50
    assert (await soon(edge.ask(ask())))[0] == 200
    await soon(edge.consistent())
