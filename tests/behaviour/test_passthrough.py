"""What the upstream sends is what the client gets, however the network cuts it."""

import asyncio
import json
import random
import re
import ssl
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path

import pytest
import trustme
from hypothesis import given
from hypothesis import strategies as st

from edge.simulator.dialects import Behaviour
from edge.simulator.server import Simulator
from edge.wire.connections import UpstreamConnection
from tests.conftest import ROUTES, Edge, ScriptedConnection, StartEdge, StartUpstream, soon
from tests.profiles import examples
from tests.streams import STREAMS, chunk, cut

SHORT = sorted(name for name, stream in STREAMS.items() if len(stream) < 4096)
ASK = {"model": "public/deepseek-r1", "stream": True, "messages": []}
SSE_HEAD = b"HTTP/1.1 200 OK\r\nserver: uvicorn\r\ncontent-type: text/event-stream; charset=utf-8\r\n"


def frames(stream: bytes) -> list[bytes]:
    """The events of a stream, each with its empty line."""
    return re.findall(rb".+?(?:\r\n\r\n|\n\n)", stream, re.DOTALL)


def chunked_answer(stream: bytes) -> bytes:
    """A whole answer with a chunk for every event."""
    body = b"".join(map(chunk, frames(stream))) + b"0\r\n\r\n"
    return SSE_HEAD + b"transfer-encoding: chunked\r\n\r\n" + body


class Cutter:
    """Sends bytes in parts, each only after the edge has read the one before: these cuts happen."""

    def __init__(self) -> None:
        self.reads = 0
        self._read = asyncio.Event()

    def noted(self) -> None:
        self.reads += 1
        self._read.set()

    async def send(self, connection: ScriptedConnection, parts: Sequence[bytes]) -> None:
        for part in filter(None, parts):
            self._read.clear()
            connection.writer.write(part)
            await self._read.wait()


@pytest.fixture
def cutter(monkeypatch: pytest.MonkeyPatch) -> Cutter:
    cutter = Cutter()
    received = UpstreamConnection.data_received

    def data_received(self: UpstreamConnection, data: bytes) -> None:
        received(self, data)
        cutter.noted()

    monkeypatch.setattr(UpstreamConnection, "data_received", data_received)
    return cutter


Ask = Callable[[Sequence[bytes]], Awaitable[tuple[int, dict[str, str], bytes]]]


@pytest.fixture
async def ask_for(start_edge: StartEdge, start_upstream: StartUpstream, cutter: Cutter) -> Ask:
    """Ask on one kept connection for an answer that the upstream sends in these parts."""
    parts: Sequence[bytes] = ()

    async def script(connection: ScriptedConnection) -> None:
        await cutter.send(connection, parts)

    edge = await start_edge(ROUTES.replace("{upstream}", (await start_upstream(script)).url))
    client = await edge.connect()

    async def ask(given: Sequence[bytes]) -> tuple[int, dict[str, str], bytes]:
        nonlocal parts
        parts = given
        client.send(edge.request(ASK))
        return await soon(client.response())

    return ask


async def test_stream_arrives_as_the_upstream_sent_it(edge: Edge, simulator: Simulator) -> None:
    status, headers, body = await edge.ask({"model": "public/deepseek-r1", "stream": True, "messages": []})
    assert status == 200
    assert headers["content-type"] == "text/event-stream; charset=utf-8"
    assert body.startswith(b"data: {")
    assert body.endswith(b"data: [DONE]\n\n")
    await edge.consistent()
    [line] = await edge.log()
    assert (line["status"], line["end"], line["model"]) == (200, "complete", "public/deepseek-r1")


async def test_json_answer_arrives_whole(edge: Edge) -> None:
    status, headers, body = await edge.ask({"model": "u-1100a15812cc/qwen2", "messages": []})
    assert status == 200
    assert headers["x-request-id"].startswith("req_")
    assert json.loads(body)["model"] == "u-1100a15812cc/qwen2"
    await edge.consistent()


# --- cuts


def test_recorded_streams_cover_the_dialects() -> None:
    assert {"vllm", "sglang", "llamacpp", "openai", "messages", "responses", "comments", "crlf", "long"} < set(STREAMS)
    assert all(b"".join(frames(stream)) == stream for stream in STREAMS.values())


@pytest.mark.parametrize("name", SHORT)
async def test_stream_cut_in_two_at_every_byte_arrives_unchanged(ask_for: Ask, name: str) -> None:
    answer = chunked_answer(STREAMS[name])
    for position in range(len(answer)):
        status, _, body = await ask_for(cut(answer, [position]))
        assert (status, body) == (200, STREAMS[name]), position


@pytest.mark.parametrize("name", SHORT)
async def test_stream_cut_at_every_byte_at_once_arrives_unchanged(ask_for: Ask, name: str) -> None:
    answer = chunked_answer(STREAMS[name])
    status, _, body = await ask_for(cut(answer, range(1, len(answer))))
    assert (status, body) == (200, STREAMS[name])


async def test_frame_of_100_kb_arrives_unchanged_however_it_is_cut(ask_for: Ask) -> None:
    answer = chunked_answer(STREAMS["long"])
    near_ends = [at for end in re.finditer(rb"\r\n", answer) for at in range(end.start() - 1, end.end() + 2)]
    for positions in ([], *([at] for at in near_ends if 0 < at < len(answer)), range(1000, len(answer), 1000)):
        assert (await ask_for(cut(answer, positions)))[2] == STREAMS["long"]


async def test_stream_cut_at_random_arrives_unchanged(ask_for: Ask) -> None:
    """Hypothesis finds the cuts; the loop it is called from answers them."""
    loop = asyncio.get_running_loop()

    @examples(150)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(SHORT))
        answer = chunked_answer(STREAMS[name])
        positions = data.draw(st.sets(st.integers(1, len(answer) - 1), max_size=40))
        asking = asyncio.run_coroutine_threadsafe(ask_for(cut(answer, positions)), loop)
        assert asking.result(30)[2] == STREAMS[name]

    await asyncio.to_thread(check)


# --- framings

BODY = b'{"object":"chat.completion","choices":[]}'
JSON_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
CHUNKED = JSON_HEAD + b"transfer-encoding: chunked\r\n\r\n"
FRAMINGS = {
    "length": JSON_HEAD + b"content-length: %d\r\n\r\n" % len(BODY) + BODY,
    "length of nothing": JSON_HEAD + b"content-length: 0\r\n\r\n",
    "chunks": CHUNKED + chunk(BODY[:9]) + chunk(BODY[9:]) + b"0\r\n\r\n",
    "chunks of nothing": CHUNKED + b"0\r\n\r\n",
    "large hex, leading zeros": CHUNKED + b"0001\r\n{\r\n0%X\r\n%b\r\n000\r\n\r\n" % (len(BODY) - 1, BODY[1:]),
    "chunk extensions": CHUNKED
    + b'9;secret=1;b="x"\r\n%b\r\n' % BODY[:9]
    + b"%x ;secret\r\n%b\r\n0;secret\r\n\r\n" % (len(BODY) - 9, BODY[9:]),
    "extension in the middle": CHUNKED
    + chunk(BODY[:5])
    + b"4;secret\r\n%b\r\n" % BODY[5:9]
    + chunk(BODY[9:])
    + b"0\r\n\r\n",
    "trailers": CHUNKED + chunk(BODY) + b"0\r\nx-secret: 1\r\nx-secret-2: b\r\n\r\n",
    "after informational answers": b"HTTP/1.1 103 Early Hints\r\nlink: </secret>\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n"
    + CHUNKED
    + chunk(BODY)
    + b"0\r\n\r\n",
    "no content": b"HTTP/1.1 204 No Content\r\n\r\n",
}


def body_of(answer: bytes) -> bytes:
    return BODY if BODY[9:] in answer else b""


@pytest.mark.parametrize("name", FRAMINGS)
async def test_body_is_the_same_in_every_framing_and_cut(ask_for: Ask, name: str) -> None:
    """Extensions, trailers (RFC 9112 section 7.1) and informational answers (RFC 9110 section 15.2) are dropped."""
    answer = FRAMINGS[name]
    expected = (204 if name == "no content" else 200, body_of(answer))
    for parts in (*(cut(answer, [at]) for at in range(len(answer))), cut(answer, range(1, len(answer)))):
        status, headers, body = await ask_for(parts)
        assert (status, body) == expected, parts
        assert "secret" not in str(headers)


CLOSES = {
    "json": (JSON_HEAD + b"\r\n" + BODY, BODY),
    "nothing": (JSON_HEAD + b"\r\n", b""),
    "stream": (SSE_HEAD + b"connection: close\r\n\r\n" + STREAMS["vllm"], STREAMS["vllm"]),
    "HTTP/1.0": (b"HTTP/1.0 200 OK\r\ncontent-type: text/event-stream\r\n\r\n" + STREAMS["crlf"], STREAMS["crlf"]),
}


@pytest.mark.parametrize("name", CLOSES)
async def test_body_that_the_close_ends_keeps_the_clients_connection(
    start_edge: StartEdge, start_upstream: StartUpstream, cutter: Cutter, name: str
) -> None:
    """A client of HTTP/1.1 gets chunks of our own, and its connection serves again."""
    answer, expected = CLOSES[name]
    positions = iter([0, *range(1, len(answer), 7)])

    async def script(connection: ScriptedConnection) -> None:
        await cutter.send(connection, cut(answer, [next(positions, 0)]))
        connection.writer.close()

    edge = await start_edge(ROUTES.replace("{upstream}", (await start_upstream(script)).url))
    client = await edge.connect()
    for _ in range(0, len(answer), 7):
        client.send(edge.request(ASK))
        status, headers, body = await soon(client.response())
        assert (status, headers["transfer-encoding"], body) == (200, "chunked", expected)
    await edge.consistent()
    assert {line["end"] for line in await edge.log()} == {"complete"}


@pytest.mark.parametrize("name", [*FRAMINGS, *CLOSES])
async def test_http_1_0_client_gets_the_bare_body_and_the_close(
    start_edge: StartEdge, start_upstream: StartUpstream, cutter: Cutter, name: str
) -> None:
    """It knows no chunks (RFC 9112 section 7.1); the end of the connection is the end of the answer."""
    answer, expected = CLOSES[name] if name in CLOSES else (FRAMINGS[name], body_of(FRAMINGS[name]))
    in_bytes = False

    async def script(connection: ScriptedConnection) -> None:
        await cutter.send(connection, cut(answer, range(1, len(answer))) if in_bytes else [answer])
        if name in CLOSES:
            connection.writer.close()

    edge = await start_edge(ROUTES.replace("{upstream}", (await start_upstream(script)).url))
    for each in (False, True):
        in_bytes = each
        client = await edge.connect()
        client.send(edge.request(ASK, version="1.0"))
        head = (await soon(client.head())).lower()
        assert (b"\r\ntransfer-encoding:" in head, b"\r\nconnection: close\r\n" in head) == (False, True)
        assert await soon(client.rest()) == expected
    await edge.consistent()
    assert {line["end"] for line in await edge.log()} == {"complete"}


# --- the end of an answer

ENDS = {name: FRAMINGS[name] for name in ("length", "length of nothing", "chunks", "trailers", "no content")}
SMUGGLED = b"HTTP/1.1 200 OK\r\ncontent-length: 8\r\n\r\nsmuggled"


@pytest.mark.parametrize(
    ("name", "status"),
    [(name, b"200 OK") for name in ENDS] + [(name, b"404 Not Found") for name in ENDS if name != "no content"],
)
async def test_bytes_after_the_end_reach_nobody_and_end_the_connection(
    start_edge: StartEdge, start_upstream: StartUpstream, cutter: Cutter, name: str, status: bytes
) -> None:
    """Else they would answer the next request, of somebody else (RFC 9112 section 9.2)."""
    whole = ENDS[name].replace(b"200 OK", status)
    sent = whole + SMUGGLED
    positions = iter(range(len(whole) - 6, len(sent)))

    async def script(connection: ScriptedConnection) -> None:
        first, second = cut(sent, [next(positions)])[:2]
        await cutter.send(connection, [first])
        with suppress(ConnectionError):
            connection.writer.write(second)
            await connection.reader.read()  # the edge reads on or not, and in the end it closes

    upstream = await start_upstream(script)
    edge = await start_edge(ROUTES.replace("{upstream}", upstream.url))
    client = await edge.connect()
    asked = range(len(whole) - 6, len(whole) + 4)
    for _ in asked:
        client.send(edge.request(ASK))
        _, _, body = await soon(client.response())
        assert b"smuggled" not in body
        if status == b"200 OK":
            assert body == body_of(whole)
    await edge.consistent()
    assert upstream.connections == len(upstream.requests) == len(asked)


async def test_idle_upstream_connection_that_speaks_is_closed(
    start_edge: StartEdge, start_upstream: StartUpstream
) -> None:
    answered = asyncio.Event()

    async def script(connection: ScriptedConnection) -> None:
        await connection.send(FRAMINGS["length"])
        await answered.wait()
        await connection.send(SMUGGLED)

    upstream = await start_upstream(script)
    edge = await start_edge(ROUTES.replace("{upstream}", upstream.url))
    await edge.ask(ASK)
    await edge.consistent()
    answered.set()
    await soon(upstream.gone.wait())
    assert (await edge.ask(ASK))[2] == BODY
    assert upstream.connections == 2


# --- refusals

HUGE = b"x-a: " + b"a" * 70_000 + b"\r\n"
MALFORMED = {
    "two lengths": JSON_HEAD + b"content-length: 2\r\ncontent-length: 2\r\n\r\n{}",
    "list of lengths": JSON_HEAD + b"content-length: 2, 2\r\n\r\n{}",
    "negative length": JSON_HEAD + b"content-length: -2\r\n\r\n{}",
    "length and coding": JSON_HEAD + b"content-length: 2\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    "other coding": JSON_HEAD + b"transfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "folded header": JSON_HEAD + b"x-a: 1\r\n 2\r\ncontent-length: 2\r\n\r\n{}",
    "bare line feed": b"HTTP/1.1 200 OK\ncontent-length: 2\r\n\r\n{}",
    "space before the colon": JSON_HEAD + b"content-length : 2\r\n\r\n{}",
    "other version": b"HTTP/2.0 200 OK\r\ncontent-length: 2\r\n\r\n{}",
    "no status": b"HTTP/1.1 OK\r\ncontent-length: 2\r\n\r\n{}",
    "switch of protocols": b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\n\r\n",
    "huge head": JSON_HEAD + HUGE + b"content-length: 2\r\n\r\n{}",
    "endless head": JSON_HEAD + HUGE,
    "no chunk size": CHUNKED + b"zz\r\n{}\r\n0\r\n\r\n",
    "signed chunk size": CHUNKED + b"+2\r\n{}\r\n0\r\n\r\n",
    "huge chunk size": CHUNKED + b"f" * 17 + b"\r\n{}\r\n",
    "chunk too long": CHUNKED + b"1\r\n{}\r\n0\r\n\r\n",
}


@pytest.mark.parametrize("name", MALFORMED)
async def test_malformed_answer_is_a_502(start_edge: StartEdge, start_upstream: StartUpstream, name: str) -> None:
    """What two recipients could read differently is refused, never guessed at (RFC 9112 section 6.3)."""

    async def script(connection: ScriptedConnection) -> None:
        connection.writer.write(MALFORMED[name])
        await connection.reader.read()

    upstream = await start_upstream(script)
    edge = await start_edge(ROUTES.replace("{upstream}", upstream.url))
    status, _, body = await soon(edge.ask(ASK))
    error = json.loads(body)["error"]
    assert (status, error["code"]) == (502, "upstream_error")
    await edge.consistent()
    assert (await edge.log())[0]["end"] == "upstream_error"
    assert upstream.connections == 1


# --- the upstream's side


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (b"HTTP/1.1 413 Content Too Large\r\ncontent-length: 32\r\n\r\n" + b'{"error":{"message":"too long"}}', 413),
        (FRAMINGS["length"], 200),
        (FRAMINGS["chunks"], 200),
    ],
)
async def test_early_answer_to_a_large_body_arrives_and_ends_the_connection(
    start_edge: StartEdge, answer: bytes, expected: int
) -> None:
    """The rest of the body must not be taken for the next request."""
    connections = 0
    gone = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        await reader.readuntil(b"\r\n\r\n")  # the small limit of the reader then stops the reading
        writer.write(answer)
        await answered.wait()
        with suppress(ConnectionError):
            while await reader.read(2**20):
                pass
        writer.close()
        gone.set()

    answered = asyncio.Event()
    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        edge = await start_edge(ROUTES.replace("{upstream}", f"http://127.0.0.1:{port}"))
        status, _, body = await soon(edge.ask({**ASK, "messages": ["x" * 32_000_000]}))
        assert status == expected
        assert body == BODY or json.loads(body)["error"]["message"] == "too long"
        await edge.consistent()
        answered.set()
        await soon(gone.wait())
        assert (await soon(edge.ask(ASK)))[0] == expected
        assert connections == 2


@pytest.fixture
def authority(tmp_path: Path) -> trustme.CA:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    return authority


async def tls_simulator(authority: trustme.CA, name: str) -> Simulator:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert(name).configure_cert(context)
    simulator = Simulator(Behaviour())
    await simulator.start(ssl=context)
    return simulator


def tls_routes(simulator: Simulator, ca_file: Path | None) -> str:
    line = f'ca_file = "{ca_file}"' if ca_file else ""
    return f'[pools.r1]\nendpoints = ["{simulator.url}"]\n{line}\n[routes."public/deepseek-r1"]\npool = "r1"\n'


async def test_upstream_may_speak_tls(start_edge: StartEdge, authority: trustme.CA, tmp_path: Path) -> None:
    simulator = await tls_simulator(authority, "127.0.0.1")
    try:
        edge = await start_edge(tls_routes(simulator, tmp_path / "ca.pem"))
        bodies = {(await edge.ask(ASK))[::2] for _ in range(3)}
        assert [(status, body[-14:]) for status, body in bodies] == [(200, b"data: [DONE]\n\n")]
        await edge.consistent()
        assert simulator.connections == 1  # the handshake is paid once
        large = {"messages": [], "model": "public/deepseek-r1", "user": "x" * 3_000_000, "simulate": {"tokens": 5000}}
        status, _, body = await edge.ask(large)
        assert (status, json.loads(body)["usage"]["completion_tokens"]) == (200, 5000)
    finally:
        await simulator.close()


@pytest.mark.parametrize(("name", "trusted"), [("127.0.0.1", False), ("model.example", True)])
async def test_upstream_whose_certificate_is_wrong_is_not_asked(
    start_edge: StartEdge, authority: trustme.CA, tmp_path: Path, name: str, trusted: bool
) -> None:
    simulator = await tls_simulator(authority, name)
    try:
        edge = await start_edge(tls_routes(simulator, tmp_path / "ca.pem" if trusted else None))
        status, _, body = await edge.ask(ASK)
        assert (status, json.loads(body)["error"]["code"]) == (503, "upstream_unavailable")
        assert b"127.0.0.1" not in body
        assert b"certificate" not in body
        assert not simulator.requests
        await edge.consistent()
    finally:
        await simulator.close()


# --- under load


async def test_many_streams_at_once_are_not_mixed_up(start_edge: StartEdge, start_upstream: StartUpstream) -> None:
    """256 streams, cut at random, each its own."""
    cuts = random.Random(1)

    async def script(connection: ScriptedConnection) -> None:
        mark = connection.request.rpartition(b'"user": "')[2].partition(b'"')[0]
        answer = chunked_answer(b"".join(b"data: %b %d\n\n" % (mark, count) for count in range(20)))
        await connection.send(*cut(answer, cuts.sample(range(1, len(answer)), 10)))

    edge = await start_edge(ROUTES.replace("{upstream}", (await start_upstream(script)).url))

    async def one(number: int) -> None:
        _, _, body = await edge.ask({**ASK, "user": f"u{number}"})
        assert body == b"".join(b"data: u%d %d\n\n" % (number, count) for count in range(20))

    async with asyncio.TaskGroup() as tasks:
        for number in range(256):
            tasks.create_task(one(number))
    await edge.consistent()
