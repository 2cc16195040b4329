"""The client's side of a connection: what aiohttp's parser refuses, how many there may be, how bodies are bounded."""

import asyncio
import importlib.metadata
import json
import logging
import socket
import ssl
import sys
import tomllib
from http.client import responses
from itertools import pairwise
from pathlib import Path

import pytest
import trustme
from aiohttp import http_parser

from edge.client.answers import response
from edge.client.body import BodyMemory
from edge.client.bounds import MAX_FIELD_BYTES, MAX_FIELDS, MAX_REQUEST_LINE_BYTES
from edge.client.connection import ClientConnection
from edge.client.server import MOST_REFUSED, ClientServer
from edge.errors import EdgeError, Overloaded
from edge.simulator.server import Simulator
from edge.telemetry.access_log import AccessLog
from tests.conftest import ROUTES, Edge, RawClient, StartEdge, WatchMethod, tls_setting
from tests.test_errors import ALL

SECRET = "sk-" + "s3cret" * 7


def test_aiohttp_is_the_version_that_was_read_and_has_its_c_parser() -> None:
    """The connection rides on private names of `RequestHandler`; the pure parser is too lenient for an edge."""
    assert importlib.metadata.version("aiohttp").split(".")[:2] == ["3", "14"]
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert any(each.startswith("aiohttp>=3.14") and each.endswith("<3.15") for each in project["dependencies"])
    assert http_parser.HttpRequestParser is not http_parser.HttpRequestParserPy


@pytest.mark.parametrize("kind", ALL)
def test_every_status_has_its_reason(kind: type[EdgeError]) -> None:
    assert kind.status in responses


HEAD = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {SECRET}\r\n"


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (f"{SECRET}\r\n\r\n", 400),
        (f"GET {SECRET} HTTP/9.9\r\n\r\n", 400),
        (f"{HEAD}{SECRET} no colon\r\n\r\n", 400),
        (f"{HEAD}X: a\x00{SECRET}\r\n\r\n", 400),
        (f"{HEAD}Content-Length: {SECRET}\r\n\r\n", 400),
        (f"{HEAD}Content-Length: -1\r\n\r\n", 400),
        (f"{HEAD}Content-Length: 1\r\nContent-Length: 2\r\n\r\n{SECRET}", 400),
        (f"{HEAD}Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n{SECRET}", 400),
        (f"{HEAD}Transfer-Encoding: chunked, {SECRET}\r\n\r\n", 400),
        (f"{HEAD}X : {SECRET}\r\n\r\n", 400),
        (f"{HEAD} {SECRET}: folded\r\n\r\n", 400),
        (f"POST /{SECRET}?{'x' * MAX_REQUEST_LINE_BYTES} HTTP/1.1\r\nHost: x\r\n\r\n", 414),
        (f"{HEAD}X: {SECRET}{'x' * MAX_FIELD_BYTES}\r\n\r\n", 431),
        (f"{HEAD}{'x' * MAX_FIELD_BYTES}y: {SECRET}\r\n\r\n", 431),
        (HEAD + f"X: {SECRET}\r\n" * MAX_FIELDS + "\r\n", 431),
        (HEAD + f"X: {SECRET}{'x' * 10_000}\r\n" * 90 + "\r\n", 431),
    ],
    ids=[
        "no HTTP", "version", "no colon", "NUL", "length is a word", "negative length", "two lengths",
        "length and chunked", "unknown coding", "space before colon", "folded", "long request line", "long value",
        "long name", "many headers", "large head",
    ],
)  # fmt: skip
async def test_what_the_parser_refuses_is_our_json_and_quotes_nothing(
    edge: Edge, data: str, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    """aiohttp's own answer and traceback quote the input, keys included (RFC 9112 sections 3, 5, 6.3)."""
    caplog.set_level(logging.DEBUG)
    client = await edge.connect()
    client.send(data.encode("latin-1"))
    got, headers, body = await client.response()
    assert got == status
    assert json.loads(body)["error"]["type"] == "invalid_request_error"
    assert (headers["content-type"], headers["connection"]) == ("application/json", "close")
    assert headers["x-request-id"].startswith("req_")
    assert headers["access-control-allow-origin"] == "*"
    assert await client.rest() == b""
    assert SECRET.encode() not in body
    assert SECRET not in repr(headers)
    assert SECRET not in caplog.text
    assert SECRET not in json.dumps(await edge.log())
    await edge.consistent()


REFUSED_HEADS = {
    431: "{path} HTTP/1.1\r\nHost: x\r\nX: " + "x" * MAX_FIELD_BYTES + "y\r\n\r\n",
    414: "{path}?" + "x" * MAX_REQUEST_LINE_BYTES + " HTTP/1.1\r\nHost: x\r\n\r\n",
    400: "{path} HTTP/1.1\r\nHost: x\r\nno colon\r\n\r\n",
}
OF_MESSAGES = [
    "/v1/messages",
    "/messages",
    "/v1/messages/count_tokens",
    "/openai/v1/messages",
    "/anthropic/v1/models/x",
]
OF_OTHERS = ["/v1/chat/completions", "/v1/responses", "/v1/messages_of_others", "/openai/deployments/messages/x", "/"]


async def refusal(client: RawClient, path: str, status: int) -> None:
    """Read a refusal, which has to be in the protocol of the path."""
    got, headers, body = await client.response()
    said = json.loads(body)
    assert (got, headers["connection"]) == (status, "close")
    if path in OF_MESSAGES:
        assert list(said) == ["type", "error", "request_id"]
        assert (said["type"], list(said["error"])) == ("error", ["type", "message"])
        assert said["error"]["type"] == "invalid_request_error"
        assert said["request_id"] == headers["request-id"] == headers["x-request-id"]
    else:
        assert list(said) == ["error"]
        assert "request-id" not in headers
    assert await client.rest() == b""


@pytest.mark.parametrize("status", REFUSED_HEADS)
@pytest.mark.parametrize("path", [*OF_MESSAGES, *OF_OTHERS])
async def test_head_that_is_refused_is_told_so_in_the_protocol_of_its_path(edge: Edge, path: str, status: int) -> None:
    """Read whole, in pieces, and behind a request of before."""
    data = f"POST {REFUSED_HEADS[status].format(path=path)}".encode()
    for places in ((), (3, 9, 40, len(data) // 2), (len(data) - 3,)):
        client = await edge.connect()
        at = [0, *places, len(data)]
        for low, high in pairwise(at):
            client.send(data[low:high])
            await asyncio.sleep(0)
        await refusal(client, path, status)
    client = await edge.connect()
    other = "/v1/models" if path in OF_MESSAGES else "/anthropic/v1/models"
    client.send(edge.request(path=other, method="GET"))
    assert (await client.response())[0] == 200
    client.send(data)
    await refusal(client, path, status)


async def test_head_that_is_too_slow_or_too_large_is_told_so_in_the_protocol_of_its_path(
    start_edge: StartEdge, simulator: Simulator
) -> None:
    edge = await start_edge(ROUTES.replace("{upstream}", simulator.url), server='header_timeout = "100ms"\n')
    for path in (OF_MESSAGES[0], OF_OTHERS[0]):
        begun = f"POST {path} HTTP/1.1\r\nHost: x\r\n".encode()
        for more, status in ((b"", 408), (b"X: " + b"x" * 10_000 + b"\r\n", 431)):
            client = await edge.connect()
            client.send(begun + more * 9)
            await refusal(client, path, status)


async def test_request_before_a_malformed_one_is_still_answered(edge: Edge, simulator: Simulator) -> None:
    client = await edge.connect()
    client.send(edge.request({"model": "public/deepseek-r1", "simulate": {"ttft_ms": 100}}))
    await simulator.wait_for(lambda: simulator.requests)
    client.send(b"rubbish\r\n\r\n")
    assert (await client.response())[0] == 200
    assert (await client.response())[0] == 400
    assert await client.rest() == b""
    await edge.consistent()


async def test_connection_too_many_is_refused_with_503(
    start_edge: StartEdge, simulator: Simulator, watch: WatchMethod
) -> None:
    """While all others are busy; and is no longer too many when another has gone."""
    lost = watch(ClientServer, "connection_lost")
    edge = await start_edge(ROUTES.replace("{upstream}", simulator.url), server="max_connections = 2\n")
    first, second = await edge.connect(), await edge.connect()
    for client in (first, second):
        client.send(edge.request({"model": "public/deepseek-r1", "simulate": {"ttft_ms": 86_400_000}}))
    await simulator.wait_for(lambda: len(simulator.requests) == 2)
    third = await edge.connect()
    status, headers, body = await third.response()
    assert (status, headers["retry-after"], headers["connection"]) == (503, "1", "close")
    assert json.loads(body)["error"]["code"] == "overloaded"
    assert await third.rest() == b""
    assert edge.server.clients.refused_connections == 1
    third.close()  # it was read to its end, so nobody need linger for it
    first.close()
    await lost.until(lambda: len(edge.server.clients.clients) == 1)
    assert (await edge.ask({"model": "public/deepseek-r1"}))[0] == 200
    second.abort()
    await edge.consistent()


async def test_flood_of_connections_takes_no_descriptors(
    start_edge: StartEdge, simulator: Simulator, watch: WatchMethod
) -> None:
    """Some are told why; each of those lingers to be read, so not all can be."""
    arrived = watch(ClientServer, "arrive")
    edge = await start_edge(ROUTES.replace("{upstream}", simulator.url), server="max_connections = 2\n")
    for _ in range(2):
        (await edge.connect()).send(edge.request({"model": "public/deepseek-r1", "simulate": {"ttft_ms": 86_400_000}}))
    await simulator.wait_for(lambda: len(simulator.requests) == 2)
    clients = [await edge.connect() for _ in range(60)]
    await arrived.until(lambda: edge.server.clients.refused_connections >= 60)
    assert len(edge.server.clients.clients) + len(edge.server.clients.arrivals) <= 2 + MOST_REFUSED
    assert edge.server.clients.open_connections == 2
    assert await clients[-1].rest() == b""


async def test_handshake_that_never_ends_has_the_time_of_a_head(start_edge: StartEdge, tmp_path: Path) -> None:
    settings = 'header_timeout = "100ms"\n' + tls_setting(tmp_path, trustme.CA())
    edge = await start_edge(ROUTES.replace("{upstream}", "http://127.0.0.1:1"), server=settings)
    begun = await edge.connect()
    begun.send(b"\x16")  # of a record that holds a ClientHello (RFC 8446 section 5.1)
    assert await begun.rest() == b""
    clients = edge.server.clients
    assert (clients.failed_handshakes, clients.silent_handshakes, clients.open_connections) == (1, 0, 0)


@pytest.mark.skipif(sys.platform != "linux", reason="other kernels lack some of it")
@pytest.mark.parametrize("tls", [False, True])
async def test_kernel_asks_whether_a_silent_client_is_there_and_waits_30_s_for_one_that_was_sent_something(
    start_edge: StartEdge, tmp_path: Path, watch: WatchMethod, tls: bool
) -> None:
    """One that vanished without an end frees its engine's place within 45 s (tcp(7), RFC 5482)."""
    made = watch(ClientConnection, "connection_made")
    authority = trustme.CA()
    edge = await start_edge(
        ROUTES.replace("{upstream}", "http://127.0.0.1:1"), server=tls_setting(tmp_path, authority) if tls else ""
    )
    context = ssl.create_default_context() if tls else None
    if context is not None:
        authority.configure_trust(context)
    _, writer = await asyncio.open_connection("127.0.0.1", edge.port, ssl=context)
    await made.until(lambda: len(edge.server.clients.clients) == 1)
    [client] = edge.server.clients.clients
    connection = client._wire.get_extra_info("socket")
    names = ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT", "TCP_USER_TIMEOUT")
    values = [connection.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) for name in names]
    assert values == [15, 10, 3, 30_000]
    assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    writer.transport.abort()


async def test_connection_that_says_nothing_is_closed(start_edge: StartEdge, simulator: Simulator) -> None:
    """Before its first request and after it; a head that never ends gets a 408."""
    edge = await start_edge(
        ROUTES.replace("{upstream}", simulator.url), server='client_idle_timeout = "200ms"\nheader_timeout = "100ms"\n'
    )
    silent, idle, slow = await edge.connect(), await edge.connect(), await edge.connect()
    idle.send(edge.request({"model": "public/deepseek-r1"}))
    assert (await idle.response())[0] == 200
    slow.send(b"POST /v1/completions HTTP/1.1\r\nHost")
    assert await silent.rest() == b""
    assert await idle.rest() == b""
    assert (await slow.rest()).startswith(b"HTTP/1.1 408 ")
    await edge.consistent()


@pytest.mark.parametrize(
    ("facts", "absent", "present"),
    [
        ({"last": False}, [b"connection"], [b"content-length: 2"]),
        ({"last": True}, [], [b"connection: close"]),
        ({"last": False, "with_body": False}, [], [b"content-length: 2"]),
        ({"last": False, "status": 204, "body": b""}, [b"content-length", b"content-type"], []),
    ],
)
def test_answer_of_the_edges_own(facts: dict[str, object], absent: list[bytes], present: list[bytes]) -> None:
    """RFC 9110 section 8.6: a 204 has no length, an answer to HEAD has that of the GET."""
    arguments = {"status": 200, "body": b"{}", **facts}
    data = response(arguments.pop("status"), arguments.pop("body"), request_id="r", **arguments)  # type: ignore[arg-type]
    head, _, body = data.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 20")
    assert [line for line in absent if line in head] == []
    assert [line for line in present if line not in head] == []
    for name in (b"\r\ndate: ", b"\r\nx-request-id: r", b"\r\naccess-control-allow-origin: *"):
        assert head.count(name) == 1
    assert body == (b"" if facts.get("with_body") is False or facts.get("status") == 204 else b"{}")


def test_memory_of_bodies_is_bounded_and_given_back() -> None:
    memory = BodyMemory(10)
    memory.reserve(10)
    with pytest.raises(Overloaded):
        memory.reserve(1)
    assert memory.used_bytes == 10
    memory.release(4)
    memory.reserve(4)
    assert memory.used_bytes == 10


async def test_body_over_the_memory_of_all_bodies_is_503_and_leaves_nothing(
    start_edge: StartEdge, simulator: Simulator, watch: WatchMethod
) -> None:
    reserved = watch(BodyMemory, "reserve")
    edge = await start_edge(
        ROUTES.replace("{upstream}", simulator.url), server='max_body = "20KB"\nbody_memory = "20KB"\n'
    )
    request = edge.request({"model": "public/deepseek-r1", "user": "x" * 15_000})
    waiting: RawClient = await edge.connect()
    waiting.send(request[:-10])
    await reserved.until(lambda: edge.server.memory.used_bytes >= 10_000)
    other = await edge.connect()
    other.send(request)
    status, headers, body = await other.response()
    assert (status, json.loads(body)["error"]["code"]) == (503, "overloaded")
    assert headers["retry-after"] == "1"
    waiting.send(request[-10:])
    assert (await waiting.response())[0] == 200
    await edge.consistent()


@pytest.mark.parametrize("size", [100, 200_000], ids=["one read", "several reads"])
async def test_connection_that_waits_for_its_next_request_holds_no_body(edge: Edge, size: int) -> None:
    client = await edge.connect()
    for _ in range(2):  # the second has a head that is known
        client.send(edge.request({"model": "public/deepseek-r1", "user": "x" * size}))
        assert (await client.response())[0] == 200
    await edge.consistent()
    [connection] = edge.server.clients.clients
    request = connection._task_handler.get_coro().cr_frame.f_locals["request"]  # type: ignore[union-attr]
    assert not request.body
    assert not getattr(request.payload, "_buffer", None)


async def test_connection_whose_request_could_not_be_closed_ends_in_order(
    edge: Edge, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else its client would wait for ever for the answer to the next request."""

    def fail(*args: object) -> None:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(AccessLog, "write", fail)
    client = await edge.connect()
    for _ in range(2):
        client.send(edge.request({"model": "public/deepseek-r1", "messages": []}))
    assert (await client.response())[0] == 200
    async with asyncio.timeout(20):
        assert await client.reader.read() == b""
    monkeypatch.undo()
    assert not edge.server.clients.open_connections
