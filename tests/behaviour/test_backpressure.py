"""A slow reader slows its own upstream and nobody else; what is too slow, or never comes, ends by its own clock."""

import asyncio
import gc
import hashlib
import json
import socket
from collections.abc import Awaitable
from contextlib import suppress
from typing import Any, TypeVar

import pytest

from edge.attempt import Work
from edge.relay import answer, pace
from edge.relay.relay import Relay
from edge.relay.terms import Attempt
from edge.wire.connections import ConnectionPool
from tests.conftest import ROUTES, Edge, RawClient, Script, ScriptedConnection, StartEdge, StartUpstream
from tests.streams import chunk

T = TypeVar("T")
ASK = {"model": "public/deepseek-r1", "stream": True, "messages": []}
SSE_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
JSON_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
LAST = b"0\r\n\r\n"
HELLO = b"7\r\ndata:1\n\r\n1\r\n\n\r\n"
MIB = 2**20


async def soon(waiting: Awaitable[T]) -> T:
    """What has to come, and soon enough for any machine."""
    async with asyncio.timeout(25):
        return await waiting


def called(monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> asyncio.Queue[Any]:
    """A queue of the objects on which a method was called."""
    calls: asyncio.Queue[Any] = asyncio.Queue()
    original = getattr(owner, name)

    def method(self: Any, *args: Any) -> Any:
        result = original(self, *args)
        calls.put_nowait(self)
        return result

    monkeypatch.setattr(owner, name, method)
    return calls


@pytest.fixture
def paused(monkeypatch: pytest.MonkeyPatch) -> asyncio.Queue[Any]:
    """The answers whose client's buffer became full."""
    return called(monkeypatch, Relay, "client_paused")


class Flood:
    """An upstream that would send `size` bytes as fast as it can; a request that says `small` gets a short answer."""

    def __init__(self, size: int) -> None:
        self.event = b"data: " + bytes(range(97, 123)) * 2500 + b"\n\n"
        self.events = size // len(self.event)
        self.sent = 0

    async def __call__(self, connection: ScriptedConnection) -> None:
        if b"small" in connection.request:
            await connection.send(SSE_HEAD + HELLO + LAST)
            return
        connection.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**18)
        await connection.send(SSE_HEAD)
        for _ in range(self.events):
            await connection.send(chunk(self.event))
            self.sent += len(self.event)
        await connection.send(LAST)


async def edge_for(
    start_edge: StartEdge, start_upstream: StartUpstream, script: Script, *, pool: str = "", server: str = ""
) -> Edge:
    upstream = await start_upstream(script)
    routes = ROUTES.replace("{upstream}", upstream.url).replace("[routes.", f"{pool}\n[routes.", 1)
    return await start_edge(routes, server=server)


async def unreading(edge: Edge, body: dict[str, Any] = ASK, buffer: int = 2**16) -> RawClient:
    """A client that asked, and does not read until its transport is told to."""
    client = await edge.connect()
    client.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    client.writer.transport.pause_reading()  # type: ignore[attr-defined]  # a transport that reads
    client.send(edge.request(body))
    return client


def read_on(client: RawClient) -> None:
    client.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 * MIB)
    client.writer.transport.resume_reading()  # type: ignore[attr-defined]


async def assert_whole(client: RawClient, flood: Flood) -> None:
    """Read a flood to its end and compare every byte."""
    expected, got = hashlib.sha256(), hashlib.sha256()
    for _ in range(flood.events):
        expected.update(chunk(flood.event))
    expected.update(LAST)
    assert (await soon(client.head())).startswith(b"HTTP/1.1 200 ")
    left = len(chunk(flood.event)) * flood.events + len(LAST)
    while left:
        data = await soon(client.reader.read(min(left, MIB)))
        assert data
        got.update(data)
        left -= len(data)
    assert got.digest() == expected.digest()


async def small(edge: Edge) -> bytes:
    return (await soon(edge.ask(ASK | {"user": "small"})))[2]


async def test_client_that_does_not_read_stops_its_upstream_until_it_reads_again(
    start_edge: StartEdge, start_upstream: StartUpstream, paused: asyncio.Queue[Any]
) -> None:
    """Little is held meanwhile, the others go on, and in the end every byte is there."""
    flood = Flood(64 * MIB)
    edge = await edge_for(start_edge, start_upstream, flood)
    client = await unreading(edge)
    await soon(paused.get())
    for _ in range(50):  # others go on, and time passes in which the upstream could send
        assert await small(edge) == b"data:1\n\n"
        held = [each.transport.get_write_buffer_size() for each in edge.server.clients.clients if each.transport]
        assert max(held) < MIB
    assert flood.sent < 16 * MIB
    read_on(client)
    await assert_whole(client, flood)
    client.send(edge.request(ASK | {"user": "small"}))
    assert (await soon(client.response()))[0] == 200
    await soon(edge.consistent())
    assert {line["end"] for line in await edge.log()} == {"complete"}


async def test_client_below_the_floor_rate_is_cut_and_its_upstream_freed_but_never_without_a_floor(
    start_edge: StartEdge, start_upstream: StartUpstream, paused: asyncio.Queue[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pace, "_SLOW_CLIENT_CHECK_S", 0.02)
    monkeypatch.setattr(pace, "_SLOW_CLIENT_PATIENCE", 3)
    flood = Flood(16 * MIB)
    free = await edge_for(start_edge, start_upstream, flood, server='min_client_rate = "0B"')
    patient = await unreading(free)
    await soon(paused.get())

    cut_flood = Flood(1000 * MIB)
    upstream = await start_upstream(cut_flood)
    edge = await start_edge(ROUTES.replace("{upstream}", upstream.url), server='min_client_rate = "1KiB"')
    client = await unreading(edge)
    await soon(upstream.gone.wait())
    await soon(edge.consistent())
    await soon(edge.server.clients.wait_empty())
    [line] = await edge.log()
    assert (line["end"], line["ended_by"], line["phase"]) == ("slow_client", "edge", "stream")
    read_on(client)
    with suppress(ConnectionResetError):
        assert not (await soon(client.rest())).endswith(LAST)

    read_on(patient)  # paused before the other, and for longer
    await assert_whole(patient, flood)
    await soon(free.consistent())
    assert [line["end"] for line in await free.log()] == ["complete"]


async def test_client_above_the_floor_rate_is_never_cut_however_much_the_kernel_holds(
    start_edge: StartEdge, start_upstream: StartUpstream, paused: asyncio.Queue[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel takes more only when much has room again: what it still holds has to count as unread too."""
    monkeypatch.setattr(pace, "_SLOW_CLIENT_CHECK_S", 0.2)
    monkeypatch.setattr(pace, "_SLOW_CLIENT_PATIENCE", 3)
    edge = await edge_for(start_edge, start_upstream, Flood(1000 * MIB), server='min_client_rate = "1KiB"')
    loop = asyncio.get_running_loop()
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**12)
        sock.setblocking(False)
        await loop.sock_connect(sock, ("127.0.0.1", edge.port))
        await loop.sock_sendall(sock, edge.request(ASK))
        await soon(paused.get())
        for _ in range(150):  # 4 KiB every 10 ms, a hundred times the floor and more
            assert await soon(loop.sock_recv(sock, 2**12))
            await asyncio.sleep(0.01)
        assert edge.server.proxy.in_flight == 1
    await soon(edge.consistent())
    assert [line["end"] for line in await edge.log()] == ["client_gone"]


async def answered_but_unread(edge: Edge, paused: asyncio.Queue[Any], kept: asyncio.Queue[Any]) -> RawClient:
    """A client whose whole answer waits in the edge."""
    client = await edge.connect()
    client.send(edge.request(path="/v1/models", method="GET"))
    await soon(client.response())
    [connection] = edge.server.clients.clients
    assert connection.transport is not None
    connection.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**12)
    client.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**12)
    client.writer.transport.pause_reading()  # type: ignore[attr-defined]
    client.send(edge.request(ASK))
    await soon(paused.get())
    await soon(kept.get())
    assert edge.server.proxy.in_flight == 1
    return client


# More than a client's buffer holds only with its last part: the edge stops reading when it has all of it.
READS = (b"x" * 60_000, b"y" * 60_000)


async def whole_answer(connection: ScriptedConnection) -> None:
    await connection.send(JSON_HEAD + b"content-length: 120000\r\n\r\n" + b"".join(READS))


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> asyncio.Queue[Any]:
    """The pools to which a connection came back, after an answer that is read at once."""
    monkeypatch.setattr(answer, "READ_STEP_BYTES", MIB)
    return called(monkeypatch, ConnectionPool, "keep")


async def test_answer_that_is_complete_stays_open_until_its_client_has_read_it(
    start_edge: StartEdge, start_upstream: StartUpstream, paused: asyncio.Queue[Any], kept: asyncio.Queue[Any]
) -> None:
    """The upstream's connection serves others meanwhile; the client's serves again after it."""
    edge = await edge_for(start_edge, start_upstream, whole_answer)
    client = await answered_but_unread(edge, paused, kept)
    read_on(client)
    status, _, body = await soon(client.response())
    assert (status, body) == (200, b"".join(READS))
    await soon(edge.consistent())
    client.send(edge.request(ASK))
    assert (await soon(client.response()))[2] == body
    await soon(edge.consistent())
    assert [line["end"] for line in await edge.log()] == ["complete"] * 3


async def test_client_that_never_reads_its_complete_answer_is_cut_below_the_floor_rate(
    start_edge: StartEdge,
    start_upstream: StartUpstream,
    paused: asyncio.Queue[Any],
    kept: asyncio.Queue[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pace, "_SLOW_CLIENT_CHECK_S", 0.05)
    edge = await edge_for(start_edge, start_upstream, whole_answer)
    await answered_but_unread(edge, paused, kept)
    await soon(edge.server.clients.wait_empty())
    await soon(edge.consistent())
    line, [record] = (await edge.log())[1], edge.records()
    assert (line["end"], line["error"], record["end"]) == ("complete", "slow_client", "complete")


BEGINNINGS = {
    "nothing": b"",
    "part of a head": SSE_HEAD[:-2],
    "a head": SSE_HEAD,
    "a head and part of a size": SSE_HEAD + b"1",
    "an informational answer": b"HTTP/1.1 103 Early Hints\r\n\r\n",
    "a head with a length": JSON_HEAD + b"content-length: 5\r\n\r\n",
}


@pytest.mark.parametrize("beginning", BEGINNINGS)
async def test_upstream_without_a_first_byte_in_time_is_a_504_and_is_closed(
    start_edge: StartEdge, start_upstream: StartUpstream, beginning: str
) -> None:
    """A head is no answer: servers send it long before their first token."""

    async def script(connection: ScriptedConnection) -> None:
        await connection.send(BEGINNINGS[beginning])
        await connection.reader.read()

    upstream = await start_upstream(script)
    routes = ROUTES.replace("[routes.", 'first_byte_timeout = "100ms"\n[routes.', 1)
    edge = await start_edge(routes.replace("{upstream}", upstream.url))
    client = await edge.connect()
    client.send(edge.request(ASK))
    status, headers, body = await soon(client.response())
    assert (status, headers["content-type"]) == (504, "application/json")
    assert json.loads(body)["error"]["code"] == "upstream_timeout"
    await soon(upstream.gone.wait())
    await soon(edge.consistent())
    [line] = await edge.log()
    assert (line["end"], line["phase"], line["status"]) == ("first_byte_timeout", "wait", 504)
    client.send(edge.request(path="/v1/models", method="GET"))
    assert (await soon(client.response()))[0] == 200


@pytest.mark.parametrize("head", [SSE_HEAD, JSON_HEAD + b"transfer-encoding: chunked\r\n\r\n"], ids=["stream", "json"])
async def test_upstream_that_falls_silent_is_closed_and_its_stream_ends_with_an_error(
    start_edge: StartEdge, start_upstream: StartUpstream, head: bytes
) -> None:
    async def script(connection: ScriptedConnection) -> None:
        await connection.send(head + HELLO)
        await connection.reader.read()

    upstream = await start_upstream(script)
    routes = ROUTES.replace("[routes.", 'idle_timeout = "100ms"\n[routes.', 1)
    edge = await start_edge(routes.replace("{upstream}", upstream.url))
    client = await edge.connect()
    client.send(edge.request(ASK))
    await soon(client.head())
    if head == SSE_HEAD:
        got = await soon(client.reader.readuntil(LAST))
        frame = got.removeprefix(HELLO).partition(b"\r\n")[2].removesuffix(b"\r\n" + LAST)
        assert json.loads(frame.removeprefix(b"data: "))["error"]["code"] == "upstream_disconnected"
    else:
        assert await soon(client.rest()) == HELLO
    await soon(upstream.gone.wait())
    await soon(edge.consistent())
    [line] = await edge.log()
    assert (line["end"], line["ended_by"], line["phase"]) == ("idle_timeout", "edge", "stream")


async def test_time_in_which_the_client_was_full_is_no_silence_of_the_upstream(
    start_edge: StartEdge, start_upstream: StartUpstream, paused: asyncio.Queue[Any]
) -> None:
    """Two streams that are silent in turn, and cut for it, show that the time has passed."""
    flood = Flood(16 * MIB)

    async def script(connection: ScriptedConnection) -> None:
        if b"silent" in connection.request:
            await connection.send(SSE_HEAD + HELLO)
            await connection.reader.read()
        await flood(connection)

    edge = await edge_for(start_edge, start_upstream, script, pool='idle_timeout = "1s"')
    client = await unreading(edge)
    await soon(paused.get())
    for _ in range(2):
        assert b"upstream_disconnected" in (await soon(edge.ask(ASK | {"user": "silent"})))[2]
    read_on(client)
    await assert_whole(client, flood)
    await soon(edge.consistent())
    assert [line["end"] for line in await edge.log()] == ["idle_timeout", "idle_timeout", "complete"]


@pytest.mark.parametrize("size", [100, 2 * MIB])
async def test_body_is_released_at_the_first_byte_of_its_answer(
    start_edge: StartEdge, start_upstream: StartUpstream, size: int
) -> None:
    asked, answer, end = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def script(connection: ScriptedConnection) -> None:
        asked.set()
        await connection.send(SSE_HEAD)
        await answer.wait()
        await connection.send(HELLO)
        await end.wait()
        await connection.send(LAST)

    edge = await edge_for(start_edge, start_upstream, script)
    client = await edge.connect()
    client.send(edge.request(ASK | {"user": "x" * size}))
    await soon(asked.wait())
    assert edge.server.memory.used_bytes > size
    answer.set()
    await soon(client.head())
    assert edge.server.memory.used_bytes == 0
    assert edge.server.proxy.in_flight == 1
    end.set()
    await soon(client.reader.readuntil(LAST))
    await soon(edge.consistent())


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Oh\r\ncontent-length: 2\r\n\r\n{}", b"SSH-2.0\r\n\r\n"])
async def test_failed_request_leaves_nothing_to_the_collector(
    start_edge: StartEdge, start_upstream: StartUpstream, answer: bytes
) -> None:
    """A circle of references would hold the prompt of each, and `body_memory` knows nothing of that."""

    async def script(connection: ScriptedConnection) -> None:
        await connection.send(answer)

    edge = await edge_for(start_edge, start_upstream, script)
    await edge.ask(ASK)
    gc.collect()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        for _ in range(3):
            assert (await soon(edge.ask(ASK)))[0] in (400, 502)
        await edge.idle()
        gc.collect()
        assert [each for each in gc.garbage if isinstance(each, Relay | Attempt | Work)] == []
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
