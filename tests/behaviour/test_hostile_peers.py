"""Peers that mean harm, or look like it: each was a way to hurt the edge once."""

import asyncio
import itertools
import json
import socket

import pytest

from edge.client.connection import ClientConnection, Request
from edge.envelope.form import read_multipart
from edge.errors import InvalidRequest
from edge.simulator.server import Simulator
from edge.telemetry.access_log import AccessLog
from tests.conftest import ROUTES, Edge, RawClient, ScriptedConnection, StartEdge, StartUpstream, WatchMethod

ASK = {"model": "public/deepseek-r1", "stream": True, "messages": []}
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"


async def deaf_client(edge: Edge) -> RawClient:
    """A client with the smallest of receive buffers, which reads nothing."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", edge.port))
    reader, writer = await asyncio.open_connection(sock=sock, limit=1)  # one byte, and the reader pauses
    client = RawClient(reader, writer)
    edge._clients.append(client)
    return client


async def answered_but_unread(
    start_edge: StartEdge, start_upstream: StartUpstream, watch: WatchMethod, server: str, *headers: str
) -> tuple[Edge, RawClient]:
    """An answer that is complete for the edge, its last bytes in the edge's own buffer."""

    async def script(connection: ScriptedConnection) -> None:
        edge_side = None
        await connection.send(HEAD + b"transfer-encoding: chunked\r\n\r\n")
        while not edge_side:
            await connection.send(b"1000\r\n" + b"x" * 4096 + b"\r\n")
            edge_side = next(
                (each._wire.get_write_buffer_size() for each in edge.server.clients.clients if each._wire), 0
            )
        await connection.send(b"0\r\n\r\n")

    logged = watch(AccessLog, "write")
    upstream = await start_upstream(script)
    edge = await start_edge(ROUTES.replace("{upstream}", upstream.url), server=server)
    client = await deaf_client(edge)
    client.send(edge.request(ASK, headers=headers))
    await logged.called()
    assert [line["end"] for line in await edge.log()] == ["complete"]
    assert edge.server.clients.clients
    return edge, client


@pytest.mark.parametrize("headers", [(), ("Connection: close",)])
async def test_client_that_never_reads_does_not_hold_up_a_stop(
    start_edge: StartEdge, start_upstream: StartUpstream, watch: WatchMethod, headers: tuple[str, ...]
) -> None:
    edge, _ = await answered_but_unread(start_edge, start_upstream, watch, 'drain_timeout = "200ms"', *headers)
    async with asyncio.timeout(20):
        await edge.stop()
    assert not edge.server.clients.clients


async def test_closing_connection_whose_client_never_reads_is_dropped(
    start_edge: StartEdge, start_upstream: StartUpstream, watch: WatchMethod
) -> None:
    edge, _ = await answered_but_unread(
        start_edge, start_upstream, watch, 'client_idle_timeout = "200ms"', "Connection: close"
    )
    async with asyncio.timeout(20):
        await edge.server.clients.wait_empty()


@pytest.mark.parametrize("pieces", [1, 40])
async def test_large_head_behind_a_running_stream_is_refused_in_its_turn(
    edge: Edge, simulator: Simulator, pieces: int
) -> None:
    """RFC 9112 section 9.3.2: answers come in the order of the requests, never one inside another."""
    client = await edge.connect()
    client.send(edge.request({**ASK, "simulate": {"ttft_ms": 100, "interval_ms": 20, "tokens": 8}}))
    await client.head()
    large = "".join(f"X{n}: {'a' * 15_000}\r\n" for n in range(5))
    request = f"GET /v1/models HTTP/1.1\r\nHost: a\r\n{large}\r\n".encode()
    size = -(-len(request) // pieces)
    for start in range(0, len(request), size):
        client.send(request[start : start + size])
        await client.writer.drain()
        await asyncio.sleep(0)
    async with asyncio.timeout(20):
        rest = await client.rest()
    stream, end, refusal = rest.partition(b"\r\n0\r\n\r\n")
    assert end
    assert b"[DONE]" in stream
    assert refusal.startswith(b"HTTP/1.1 431 ")
    await edge.consistent()
    assert [line["end"] for line in await edge.log()] == ["complete"]


async def test_queued_body_whose_framing_breaks_is_refused_in_its_turn(
    start_edge: StartEdge, simulator: Simulator, watch: WatchMethod
) -> None:
    received = watch(ClientConnection, "data_received")
    edge = await start_edge(ROUTES.replace("{upstream}", simulator.url))
    client = await edge.connect()
    client.send(edge.request({**ASK, "simulate": {"ttft_ms": 1, "interval_ms": 30, "tokens": 10}}))
    await client.head()
    client.send(
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {edge.key}\r\n"
        "Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n".encode()
    )
    await received.until(lambda: len(received.calls) == 2)  # so it is queued
    async with asyncio.timeout(20):
        client.send(b"ZZ\r\n")
        stream, end, refusal = (await client.rest()).partition(b"\r\n0\r\n\r\n")
    assert end
    assert b"[DONE]" in stream
    assert refusal.startswith(b"HTTP/1.1 400 ")
    assert json.loads(refusal.rpartition(b"\r\n\r\n")[2])["error"]["code"] == "invalid_request_error"
    await edge.consistent()


@pytest.mark.parametrize(
    "content_type",
    [
        'multipart/form-data; x="; boundary=AAA"; boundary=BBB',
        'multipart/form-data; boundary*=BBB; x="; boundary=AAA"',
        "multipart/form-data; boundary=AAA; boundary=BBB",
        'multipart/form-data; boundary="A\\"AA"',
    ],
)
def test_form_with_two_readings_of_its_boundary_is_refused(content_type: str) -> None:
    body = b'--AAA\r\nContent-Disposition: form-data; name="model"\r\n\r\nm\r\n--AAA--\r\n'
    assert read_multipart(body, 'multipart/form-data; charset=utf-8; boundary="AAA"').model == "m"
    with pytest.raises(InvalidRequest):
        read_multipart(body, content_type)


@pytest.mark.parametrize(("interim", "status"), [(3, 200), (16, 200), (17, 502), (20_000, 502)])
async def test_storm_of_interim_answers_ends_in_an_error_not_in_recursion(
    start_edge: StartEdge, start_upstream: StartUpstream, interim: int, status: int
) -> None:
    async def script(connection: ScriptedConnection) -> None:
        await connection.send(b"HTTP/1.1 100 Continue\r\n\r\n" * interim + HEAD + b"content-length: 2\r\n\r\n{}")

    upstream = await start_upstream(script)
    edge = await start_edge(ROUTES.replace("{upstream}", upstream.url))
    assert (await edge.ask(ASK))[0] == status
    await edge.consistent()


async def test_client_that_pipelines_lets_others_in_between(edge: Edge, monkeypatch: pytest.MonkeyPatch) -> None:
    """A refusal never waits for anything: all that one read holds would else be answered in one step of the loop."""
    order: list[object] = []
    handle = edge.server.clients.handle

    async def noted(request: Request) -> bool:
        order.append(request.connection)
        return await handle(request)

    monkeypatch.setattr(edge.server.clients, "handle", noted)
    greedy, other = await edge.connect(), await edge.connect()
    ask = edge.request(method="GET", path="/v1/models", key="sk-nobody-knows-this-one")
    await edge.ask(method="GET", path="/v1/models", key="sk-nobody-knows-this-one")  # from now on known to be unknown
    greedy.send(ask * 30)
    other.send(ask)
    for _ in range(30):
        assert (await greedy.response())[0] == 401
    assert (await other.response())[0] == 401
    assert len(order) == 32
    assert order.index(order[-1]) < 31
    turns = [first is not second for first, second in itertools.pairwise(order[1:])]
    assert turns.index(True) < 28


async def test_client_that_pipelines_and_never_reads_is_dropped(start_edge: StartEdge, simulator: Simulator) -> None:
    """What it is answered would else wait here for ever, without a bound."""
    routes = ROUTES.replace("{upstream}", simulator.url)
    edge = await start_edge(routes, server='client_idle_timeout = "200ms"\n')
    client = await deaf_client(edge)
    ask = edge.request(method="GET", path="/v1/models")
    while clients := edge.server.clients.clients:
        client.send(ask * 8)
        assert all(each._wire is None or each._wire.get_write_buffer_size() < 2**20 for each in clients)
        await asyncio.sleep(0)


@pytest.mark.parametrize(
    ("network", "hop"),
    [("127.0.0.0/8", "::ffff:9.9.9.9"), ("::ffff:7f00:0/104", "9.9.9.9"), ("::ffff:127.0.0.0/104", "9.9.9.9")],
)
async def test_ipv4_client_of_a_listener_for_both_is_an_ipv4_client(
    start_edge: StartEdge, simulator: Simulator, network: str, hop: str
) -> None:
    """Else it is in no network of `trusted_proxies`, and no loopback client."""
    routes = ROUTES.replace("{upstream}", simulator.url)
    trusted = f'trusted_proxies = ["{network}"]\n'
    edge = await start_edge(routes, server='listen = "[::]:0"\nadmin = "127.0.0.1:0"\n' + trusted)
    status, _, _ = await edge.ask(ASK, host="localhost", headers=(f"X-Forwarded-For: {hop}",))
    assert status == 200
    assert (await edge.log())[-1]["client"] == "9.9.9.9"


@pytest.mark.parametrize("scope", [b"\xff", b"x" * 500])
async def test_scope_of_a_forwarded_address_is_no_part_of_it(
    start_edge: StartEdge, simulator: Simulator, scope: bytes
) -> None:
    """It may be any text, also one that no line of a log can hold."""
    routes = ROUTES.replace("{upstream}", simulator.url)
    edge = await start_edge(routes, server='trusted_proxies = ["127.0.0.0/8"]\n')
    client = await edge.connect()
    hops = b"X-Forwarded-For: fe80::1%%%b, 127.0.0.9\r\n" % scope
    client.send(b"GET /nothing HTTP/1.1\r\nHost: 127.0.0.1\r\n" + hops + b"\r\n")
    assert (await client.response())[0] == 404
    assert (await edge.log())[-1]["client"] == "127.0.0.9"
    assert (await edge.ask({"model": "public/deepseek-r1", "messages": []}))[0] == 200
