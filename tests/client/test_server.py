"""How many connections there may be: who gives way, who is refused, and what never begins."""

import asyncio
import http.client
import json
import os
import socket
import ssl
from pathlib import Path

import pytest
import trustme

from edge.client.server import ClientServer
from edge.simulator.server import Simulator
from edge.stage import Stage
from tests.conftest import (
    ROUTES,
    Edge,
    Heard,
    RawClient,
    ScriptedConnection,
    StartEdge,
    StartUpstream,
    WatchMethod,
    soon,
    tls_setting,
)

BODY = {"model": "public/deepseek-r1", "messages": []}


LONG_ANSWER = b"x" * 60_000
LONG_RESPONSE = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 60000\r\n\r\n" + LONG_ANSWER


async def answer_at_length(upstream: ScriptedConnection) -> None:
    await upstream.send(LONG_RESPONSE)


def secured(directory: Path) -> tuple[str, ssl.SSLContext]:
    """The setting of a listener with TLS, and the context of its clients."""
    authority = trustme.CA()
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return tls_setting(directory, authority), context


def answer_on(client: socket.socket) -> bytes:
    response = http.client.HTTPResponse(client)
    response.begin()
    return response.read()


async def served(edge: Edge, client: RawClient) -> bool:
    client.send(edge.request(BODY))
    return (await client.response())[0] == 200


async def test_longest_idle_gives_way_to_a_new_client(start_edge: StartEdge, simulator: Simulator) -> None:
    edge = await start_edge(ROUTES.replace("{upstream}", simulator.url), server="max_connections = 3\n")
    kept = [await edge.connect() for _ in range(3)]
    for at in (0, 1, 2, 0):
        assert await served(edge, kept[at])
    assert await served(edge, await edge.connect())
    assert await soon(kept[1].rest()) == b""
    assert await served(edge, kept[2])
    assert await served(edge, kept[0])
    clients = edge.server.clients
    assert (clients.evicted_connections, clients.refused_connections, clients.open_connections) == (1, 0, 3)
    await edge.consistent()


async def test_client_that_never_sent_a_byte_gives_way_first(
    start_edge: StartEdge, simulator: Simulator, watch: WatchMethod
) -> None:
    arrived = watch(ClientServer, "arrive")
    edge = await start_edge(ROUTES.replace("{upstream}", simulator.url), server="max_connections = 3\n")
    kept = await edge.connect()
    assert await served(edge, kept)
    silent = [await edge.connect() for _ in range(2)]
    await arrived.until(lambda: len(arrived.calls) == 3)
    assert await served(edge, await edge.connect())
    assert await soon(silent[0].rest()) == b""
    assert await served(edge, kept)
    assert await served(edge, silent[1])


async def test_a_few_that_have_just_come_keep_their_place_before_the_longest_idle(
    start_edge: StartEdge, simulator: Simulator, watch: WatchMethod
) -> None:
    """They are clients whose first byte is on its way."""
    arrived = watch(ClientServer, "arrive")
    edge = await start_edge(ROUTES.replace("{upstream}", simulator.url), server="max_connections = 12\n")
    kept = [await edge.connect() for _ in range(12)]
    for client in kept:
        assert await served(edge, client)
    new = [await edge.connect() for _ in range(3)]
    await arrived.until(lambda: len(arrived.calls) == 15)
    for client in new:
        assert await served(edge, client)
    for client in kept[:3]:
        assert await soon(client.rest()) == b""


async def test_client_whose_request_has_begun_is_not_idle(
    start_edge: StartEdge, simulator: Simulator, watch: WatchMethod
) -> None:
    """Neither in its head nor in its body; who comes then is refused."""
    watching = watch(ClientServer, "arrive")
    edge = await start_edge(ROUTES.replace("{upstream}", simulator.url), server="max_connections = 2\n")
    request = edge.request(BODY)
    begun = [await edge.connect(), await edge.connect()]
    begun[0].send(request[:20])
    begun[1].send(request[:-5])
    clients = edge.server.clients
    async with asyncio.timeout(20):
        while len(clients.clients) < 2 or clients.idle:
            await asyncio.sleep(0)
    other = await edge.connect()
    await watching.until(lambda: len(watching.calls) == 3)
    assert (await other.response())[0] == 503
    for client, rest in zip(begun, (request[20:], request[-5:]), strict=True):
        client.send(rest)
        assert (await client.response())[0] == 200
    await edge.consistent()


async def test_idle_client_of_tls_gives_way_in_order_and_at_once(
    start_edge: StartEdge, simulator: Simulator, tmp_path: Path
) -> None:
    """It is told by the end of TLS, for whose answer nobody waits (RFC 8446 section 6.1)."""
    authority = trustme.CA()
    settings = "max_connections = 1\n" + tls_setting(tmp_path, authority)
    edge = await start_edge(ROUTES.replace("{upstream}", simulator.url), server=settings)
    context = ssl.create_default_context()
    authority.configure_trust(context)

    async def connect() -> RawClient:
        return RawClient(*await asyncio.open_connection("127.0.0.1", edge.port, ssl=context))

    first = await connect()
    assert await served(edge, first)
    second = await connect()
    assert await served(edge, second)
    assert await soon(first.rest()) == b""
    assert edge.server.clients.open_connections == 1
    for client in (first, second):
        client.abort()


async def test_longest_idle_client_of_a_unix_socket_gives_way_whatever_an_address_may_hold(
    start_edge: StartEdge, simulator: Simulator, tmp_path: Path
) -> None:
    """Who connects by it has no address."""
    server = f'listen = "unix:{tmp_path}/edge.sock"\nmax_connections = 2\nmax_connections_per_address = 1\n'
    edge = await start_edge(ROUTES.replace("{upstream}", simulator.url), server=server)
    kept = []
    for _ in range(3):
        kept.append(RawClient(*await asyncio.open_unix_connection(f"{tmp_path}/edge.sock")))
        assert await served(edge, kept[-1])
    assert await soon(kept[0].rest()) == b""
    assert await served(edge, kept[1])
    for client in kept:
        client.abort()


async def test_handshake_that_never_begins_is_counted_and_closed(
    start_edge: StartEdge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, watch: WatchMethod
) -> None:
    monkeypatch.setattr("edge.client.arrival.FIRST_BYTE_OF_TLS_S", 0.1)
    arrived = watch(ClientServer, "arrive")
    edge = await start_edge(
        ROUTES.replace("{upstream}", "http://127.0.0.1:1"), server=tls_setting(tmp_path, trustme.CA())
    )
    clients = edge.server.clients
    silent = await edge.connect()
    await arrived.called()
    assert clients.open_connections == 1
    assert await soon(silent.rest()) == b""
    assert (clients.silent_handshakes, clients.failed_handshakes, clients.open_connections) == (1, 0, 0)


async def test_address_has_so_many_connections_and_a_trusted_proxy_any_number(
    start_edge: StartEdge, simulator: Simulator, watch: WatchMethod
) -> None:
    lost = watch(ClientServer, "connection_lost")
    bound = "max_connections_per_address = 2\n"
    edge = await start_edge(ROUTES.replace("{upstream}", simulator.url), server=bound)
    first, _ = [await edge.connect() for _ in range(2)]
    assert await served(edge, first)
    status, headers, body = await (await edge.connect()).response()
    assert (status, headers["retry-after"], headers["connection"]) == (429, "1", "close")
    assert json.loads(body)["error"]["code"] == "rate_limit_exceeded"
    clients = edge.server.clients
    assert (clients.addresses.refused, clients.refused_connections, clients.open_connections) == (1, 0, 2)
    first.close()
    await lost.until(lambda: clients.open_connections == 1)
    assert await served(edge, await edge.connect())
    proxied = await start_edge(
        ROUTES.replace("{upstream}", simulator.url), server=bound + 'trusted_proxies = ["127.0.0.0/8"]\n'
    )
    for client in [await proxied.connect() for _ in range(5)]:
        assert await served(proxied, client)


async def test_client_whose_request_was_read_in_the_same_step_does_not_give_way(
    start_edge: StartEdge, simulator: Simulator
) -> None:
    """The new connection is accepted first, then the request is read, and only then room is looked for."""
    edge = await start_edge(ROUTES.replace("{upstream}", simulator.url), server="max_connections = 1\n")
    kept = await edge.connect()
    assert await served(edge, kept)
    sock = socket.create_connection(("127.0.0.1", edge.port))
    os.write(kept.writer.get_extra_info("socket").fileno(), edge.request(BODY))
    assert (await soon(kept.response()))[0] == 200
    sock.setblocking(False)
    other = RawClient(*await asyncio.open_connection(sock=sock))
    assert (await soon(other.response()))[0] == 503
    other.abort()
    assert edge.server.clients.evicted_connections == 0


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "TLS"])
async def test_client_that_has_not_got_all_of_its_answer_does_not_give_way(
    start_edge: StartEdge, start_upstream: StartUpstream, tmp_path: Path, watch: WatchMethod, tls: bool
) -> None:
    """It waits for a request by then, and its answer for the client."""
    arrived = watch(ClientServer, "arrive")
    setting, context = secured(tmp_path) if tls else ("", None)
    upstream = await start_upstream(answer_at_length)
    edge = await start_edge(ROUTES.replace("{upstream}", upstream.url), server=setting + "max_connections = 1\n")
    slow = socket.socket()
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    await asyncio.to_thread(slow.connect, ("127.0.0.1", edge.port))
    if context is not None:  # in a thread: a loop's own TLS reads on for a client that pauses
        slow = await asyncio.to_thread(context.wrap_socket, slow, server_hostname="127.0.0.1")
    request = edge.request(BODY)
    await asyncio.to_thread(slow.sendall, request[:10])
    clients = edge.server.clients
    async with asyncio.timeout(20):
        while not clients.clients:
            await asyncio.sleep(0)
    [connection] = clients.clients
    connection.visit.wire.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2048)
    await asyncio.to_thread(slow.sendall, request[10:])
    async with asyncio.timeout(20):
        while connection not in clients.idle or connection.busy:
            await asyncio.sleep(0)
    assert connection.visit.wire.get_write_buffer_size()
    other = RawClient(*await asyncio.open_connection("127.0.0.1", edge.port, ssl=context))
    await arrived.until(lambda: len(arrived.calls) == 2)
    assert (await soon(other.response()))[0] == 503
    assert await asyncio.to_thread(answer_on, slow) == LONG_ANSWER
    await asyncio.to_thread(slow.sendall, request)
    assert await asyncio.to_thread(answer_on, slow) == LONG_ANSWER
    slow.close()
    other.abort()


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "TLS"])
async def test_first_bytes_of_a_connection_are_read_once_and_in_order(
    start_edge: StartEdge, start_upstream: StartUpstream, tmp_path: Path, tls: bool
) -> None:
    """Several requests in one write, long ones too; a head that is cut; a body in many chunks."""
    setting, context = secured(tmp_path) if tls else ("", None)

    async def echo(upstream: ScriptedConnection) -> None:
        body = upstream.request.partition(b"\r\n\r\n")[2]
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
        await upstream.send(head + body)

    upstream = await start_upstream(echo)
    edge = await start_edge(ROUTES.replace("{upstream}", upstream.url), server=setting)
    bodies = [
        json.dumps({"model": "public/deepseek-r1", "messages": [], "user": str(at) * size}).encode()
        for at, size in enumerate((1, 20_000, 1, 300_000, 5))
    ]
    head = edge.request(b"").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
    requests = [edge.request(body) for body in bodies]
    chunks = [bodies[3][at : at + 1000] for at in range(0, len(bodies[3]), 1000)]
    requests[3] = head + b"".join(b"%x\r\n%b\r\n" % (len(each), each) for each in chunks) + b"0\r\n\r\n"
    stream = b"".join(requests)
    for cuts in (
        (),
        (1,),
        (50,),
        (len(requests[0]) - 1,),
        (len(requests[0]),),
        (len(requests[0]) + 9000,),
        range(1, 400),
    ):
        client = RawClient(*await asyncio.open_connection("127.0.0.1", edge.port, ssl=context, limit=2**20))
        begun = 0
        for cut in cuts:
            client.send(stream[begun:cut])
            begun = cut
            await asyncio.sleep(0)
        client.send(stream[begun:])
        for body in bodies:
            status, _, answer = await soon(client.response())
            assert (status, answer) == (200, body)
        client.abort()


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "TLS"])
async def test_connection_that_is_closed_at_once_leaves_nothing(
    start_edge: StartEdge, simulator: Simulator, tmp_path: Path, heard: Heard, tls: bool
) -> None:
    """Balancers ask so whether there is a listener: with nothing, with some bytes, in order or by a reset."""
    setting, _ = secured(tmp_path) if tls else ("", None)
    edge = await start_edge(
        ROUTES.replace("{upstream}", simulator.url), server=setting + "max_connections_per_address = 9\n"
    )
    clients = edge.server.clients
    firsts = (
        [b"", b"G", edge.request(BODY)[:-3], edge.request(BODY)]
        if not tls
        else [b"", b"\x16", b"GET / HTTP/1.1\r\n\r\n"]
    )
    for first in firsts:
        for linger in (None, b"\x01\0\0\0\0\0\0\0"):  # a reset
            with socket.create_connection(("127.0.0.1", edge.port)) as sock:
                if linger is not None:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                sock.sendall(first)
    async with asyncio.timeout(20):
        while clients.accepted_connections < 2 or clients.open_connections:
            await asyncio.sleep(0)
    await edge.idle()
    assert [
        *clients.clients,
        *clients.arrivals,
        *clients._visits,
        *clients.silent,
        *clients.idle,
        *clients.addresses._held,
    ] == []
    assert clients.silent_handshakes == 0
    assert heard._said == [each for each in heard._said if "Traceback" not in each and "Fatal" not in each]


async def test_handshake_that_begins_as_the_listeners_close_does_not_hold_the_drain(
    start_edge: StartEdge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, watch: WatchMethod
) -> None:
    monkeypatch.setattr("edge.client.arrival.LAST_REQUEST_S", 0.1)
    arrived, begun = watch(ClientServer, "arrive"), watch(ClientServer, "connection")
    settings = 'header_timeout = "60s"\ndrain_timeout = "60s"\n' + secured(tmp_path)[0]
    edge = await start_edge(ROUTES.replace("{upstream}", "http://127.0.0.1:1"), server=settings)
    silent, hanging = await edge.connect(), await edge.connect()
    await arrived.until(lambda: len(arrived.calls) == 2)
    edge.server.stop()
    async with asyncio.timeout(20):
        while edge.server.lifecycle.stage < Stage.CLOSING:
            await asyncio.sleep(0)
    hanging.send(b"\x16")
    await begun.called()
    await soon(edge._task)
    for client in (silent, hanging):
        assert await soon(client.rest()) == b""


async def test_client_behind_a_trusted_proxy_is_bounded_in_requests(
    start_edge: StartEdge, simulator: Simulator, watch: WatchMethod
) -> None:
    """Its own connections count too, and nobody else is refused for it."""
    server = 'max_connections_per_address = 2\ntrusted_proxies = ["127.0.0.0/8"]\n'
    edge = await start_edge(ROUTES.replace("{upstream}", simulator.url), server=server)

    def asked_for(client: str, **simulate: object) -> bytes:
        return edge.request({**BODY, "simulate": simulate}, headers=(f"X-Forwarded-For: {client}",))

    proxied = [await edge.connect() for _ in range(4)]
    for client, address in zip(proxied, ("2001:db8::1", "2001:db8::2:1"), strict=False):
        client.send(asked_for(address, ttft_ms=86_400_000))
    await simulator.wait_for(lambda: len(simulator.requests) == 2)
    proxied[2].send(asked_for("2001:db8::3"))
    status, headers, body = await soon(proxied[2].response())
    assert (status, headers["retry-after"]) == (429, "1")
    assert json.loads(body)["error"]["code"] == "rate_limit_exceeded"
    for other in ("2001:db8:0:1::1", "192.0.2.1", "127.0.0.2"):
        proxied[2].send(asked_for(other))
        assert (await soon(proxied[2].response()))[0] == 200
    proxied[0].abort()
    async with asyncio.timeout(20):
        while edge.server.proxy.in_flight > 1:
            await asyncio.sleep(0)
    proxied[3].send(asked_for("2001:db8::3"))
    assert (await soon(proxied[3].response()))[0] == 200
    proxied[1].abort()
    await edge.consistent()
    assert edge.server.clients.addresses.refused == 1
    assert "127.0.0.1" in edge.server.clients.addresses._held


def test_tls_can_be_begun_with_bytes_that_were_read() -> None:
    """A new uvloop without this: begin TLS by `loop.start_tls`, once it takes bytes that were read.

    Or give `ssl=` to `create_server` again, lose the 2 s for the first byte and the counts of handshakes, and let
    `Drain` wait `LAST_REQUEST_S` for handshakes, which then nobody sees. Then correct the range in pyproject.toml.
    """
    from uvloop.loop import SSLProtocol  # type: ignore[attr-defined]  # whose stubs have the loop alone

    for name in ("connection_made", "get_buffer", "buffer_updated"):
        assert callable(getattr(SSLProtocol, name)), f"edge/client/arrival.py calls SSLProtocol.{name}"
