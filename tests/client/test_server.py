"""How many connections there may be: who gives way, who is refused, and what never begins."""

import asyncio
import json
import ssl
from pathlib import Path

import pytest
import trustme

from edge.client.server import ClientServer
from edge.simulator.server import Simulator
from tests.conftest import ROUTES, Edge, RawClient, StartEdge, WatchMethod, soon, tls_setting

BODY = {"model": "public/deepseek-r1", "messages": []}


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
