"""Every cell of the table of operations, seen by a client of a running edge; the table in the manual says the same."""

import asyncio
import json
from typing import Any

import pytest

from edge.operations import OPERATIONS, Operation, Reads, Reserves
from edge.protocols import MESSAGES, OPENAI, RESPONSES, Protocol
from tests.conftest import Edge, RawClient, Script, ScriptedConnection, StartEdge, StartUpstream, soon
from tests.streams import chunk, document
from tests.test_documents import OPERATING, rows

MODEL = "public/m"
ROUTES = """
[limits.standard]
tokens_per_minute = 100000
[pools.p]
endpoints = ["{upstream}"]
{pool}
[routes."public/m"]
pool = "p"
metered = true
limit = "standard"
{route}
"""
BOUNDARY = "b0undary"
STREAMS = [name for name, operation in OPERATIONS.items() if operation.last_events]
SSE = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
BEGINS = {
    "chat/completions": b'data: {"choices":[{"index":0,"delta":{"content":"Half"},"finish_reason":null}]}\n\n',
    "completions": b'data: {"choices":[{"index":0,"text":"Half","finish_reason":null}]}\n\n',
    "messages": b'event: message_start\ndata: {"type":"message_start","message":{"id":"msg_1","usage":{}}}\n\n',
    "responses": b"event: response.created\n"
    b'data: {"type":"response.created","sequence_number":0,"response":{"id":"resp_1","created_at":7,"model":"m"}}\n\n',
}
ENDS = {
    "chat/completions": b"data: [DONE]\n\n",
    "completions": b"data: [DONE]\n\n",
    "messages": b'event: message_stop\ndata: {"type":"message_stop"}\n\n',
    "responses": b'data: {"type":"response.completed","sequence_number":1,"response":{}}\n\n',
}
NAMES: dict[Protocol, str] = {OPENAI: "openai", MESSAGES: "messages", RESPONSES: "responses"}


def asked(edge: Edge, operation: Operation, model: str = MODEL, **members: Any) -> bytes:
    """A request for an operation, as a form or as JSON."""
    path = f"/{operation.name}" if operation.has_version else f"/v1/{operation.name}"
    if not operation.form:
        return edge.request({"model": model, **members}, path=path)
    part = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="model"\r\n\r\n{model}\r\n--{BOUNDARY}--\r\n'
    head = edge.request(part.encode(), path=path)
    return head.replace(b"application/json", f"multipart/form-data; boundary={BOUNDARY}".encode())


async def told(edge: Edge, request: bytes) -> tuple[int, dict[str, str], bytes]:
    client = await edge.connect()
    client.send(request)
    try:
        return await soon(client.response())
    finally:
        client.close()


def check_error(operation: Operation, headers: dict[str, str], body: bytes, words: str) -> None:
    """One error in the protocol of an operation."""
    said = json.loads(body)
    if operation.protocol is MESSAGES:
        assert list(said) == ["type", "error", "request_id"]
        assert list(said["error"]) == ["type", "message"]
        assert said["request_id"] == headers["request-id"] == headers["x-request-id"]
    else:
        assert list(said) == ["error"]
        assert list(said["error"]) == ["message", "type", "param", "code"]
        assert "request-id" not in headers
    assert words in said["error"]["message"]


async def serve(
    start_edge: StartEdge,
    start_upstream: StartUpstream,
    script: Script,
    *,
    pool: str = "",
    route: str = "",
    server: str = "",
) -> Edge:
    """An edge before an upstream of this script; what is given of a pool, a route or the server stands in the file."""
    upstream = await start_upstream(script)
    routes = ROUTES.replace("{upstream}", upstream.url).replace("{pool}", pool).replace("{route}", route)
    return await start_edge(routes, server=server)


def says(*parts: bytes, close: bool = False) -> Script:
    """An upstream that says these bytes to each request."""

    async def script(connection: ScriptedConnection) -> None:
        await connection.send(*parts)
        if close:
            connection.writer.close()

    return script


# --- documents, errors, tokens


@pytest.mark.parametrize("name", OPERATIONS)
async def test_errors_are_in_the_callers_protocol(
    start_edge: StartEdge, start_upstream: StartUpstream, name: str
) -> None:
    """Of the edge's own and of the upstream's."""
    operation = OPERATIONS[name]
    edge = await serve(
        start_edge, start_upstream, says(document({"error": {"message": "the words", "type": "x"}}, 400))
    )
    status, headers, body = await told(edge, asked(edge, operation, "public/unknown"))
    check_error(operation, headers, body, "public/unknown")
    assert status == 404
    status, headers, body = await told(edge, asked(edge, operation))
    check_error(operation, headers, body, "the words")
    assert status == 400
    line = (await edge.log())[-1]
    assert (line["upstream_status"], line["error"]) == (400, "invalid_request_error")
    assert "the words" in line["upstream_error"]
    await edge.consistent()


@pytest.mark.parametrize("name", OPERATIONS)
async def test_tokens_are_reserved_and_counted_as_the_table_says(
    start_edge: StartEdge, start_upstream: StartUpstream, name: str
) -> None:
    operation = OPERATIONS[name]
    said = {"usage": {"prompt_tokens": 5, "completion_tokens": 2}, "data": [{"url": "1"}, {"url": "2"}]}
    edge = await serve(start_edge, start_upstream, says(document(said)))
    request = asked(edge, operation, padding="x" * 400)
    status, headers, _ = await told(edge, request)
    assert status == 200
    body_bytes = len(request.partition(b"\r\n\r\n")[2])
    prompt = 0 if operation.form else body_bytes // 4
    reserved = {Reserves.NOTHING: 0, Reserves.PROMPT: prompt, Reserves.ANSWER: prompt + 256}[operation.reserves]
    assert int(headers["x-ratelimit-remaining-tokens"]) == 100_000 - reserved
    await edge.consistent()
    record = edge.records()[-1]
    is_read = operation.reads is not Reads.NOTHING
    assert (record["prompt_tokens"], record["completion_tokens"]) == ((5, 2) if is_read else (0, 0))
    assert record["usage_source"] == ("final" if is_read else "none")
    assert record["units"] == (2 if operation.reads is Reads.IMAGES else 0)


@pytest.mark.parametrize("name", OPERATIONS)
async def test_conversation_stays_with_one_member_where_that_saves_work(
    start_edge: StartEdge, start_upstream: StartUpstream, name: str
) -> None:
    operation = OPERATIONS[name]

    async def script(connection: ScriptedConnection) -> None:
        await connection.send(document({}))

    urls = [(await start_upstream(script)).url for _ in range(2)]
    edge = await start_edge(
        f'[pools.p]\nendpoints = {urls}\nbalance = "prefix-affinity"\n[routes."public/m"]\npool = "p"\n'
    )
    for _ in range(24):
        assert (await told(edge, asked(edge, operation, messages=[{"role": "user", "content": "hello"}])))[0] == 200
    await edge.consistent()
    assert len({line["endpoint"] for line in await edge.log()}) == (1 if operation.is_cached else 2)


# --- streams


async def rest_of(client: RawClient) -> bytes:
    """The content of an answer in chunks, which ends in order."""
    _, _, body = await soon(client.response())
    return body


def check_last_event(operation: Operation, event: bytes, words: str) -> None:
    """The event with which a stream that failed ends."""
    name, _, data = event.rpartition(b"data: ")
    said = json.loads(data)
    assert event.endswith(b"\n\n")
    if operation.protocol is MESSAGES:
        assert name == b"event: error\n"
        assert (said["type"], list(said["error"])) == ("error", ["type", "message"])
    elif operation.protocol is RESPONSES:
        assert name == b"event: response.failed\n"
        assert (said["type"], said["response"]["status"]) == ("response.failed", "failed")
        assert words in said["response"]["error"]["message"]
    else:
        assert name == b""
        assert list(said["error"]) == ["message", "type", "param", "code"]
    assert words in said["error"]["message"]


@pytest.mark.parametrize("way", ["cut", "idle", "drain"])
@pytest.mark.parametrize("name", STREAMS)
async def test_stream_that_breaks_ends_with_an_event_of_its_protocol(
    start_edge: StartEdge, start_upstream: StartUpstream, name: str, way: str
) -> None:
    """Anthropic's SDKs skip every event that they do not know, and would take half an answer for a whole one."""
    operation, begins = OPERATIONS[name], BEGINS[name]
    ends = asyncio.Event()

    async def script(connection: ScriptedConnection) -> None:
        await connection.send(SSE, chunk(begins))
        if way == "cut":
            connection.writer.close()
        else:
            await ends.wait()

    pool = 'idle_timeout = "200ms"' if way == "idle" else ""
    edge = await serve(start_edge, start_upstream, script, pool=pool, server='drain_timeout = "0s"')
    client = await edge.connect()
    client.send(asked(edge, operation, stream=True))
    if way == "drain":
        head = await soon(client.head())
        assert b"200 OK" in head
        await soon(client.reader.readexactly(len(chunk(begins))))
        await edge.stop()
        last = (await soon(client.rest())).partition(b"\r\n")[2].removesuffix(b"\r\n0\r\n\r\n")
    else:
        body = await rest_of(client)
        assert body.startswith(begins)
        last = body.removeprefix(begins)
    ends.set()
    words = {"cut": "lost", "idle": "stopped sending", "drain": "restart"}[way]
    check_last_event(operation, last, words)
    if operation.protocol is RESPONSES:
        said = json.loads(last.rpartition(b"data: ")[2])
        assert said["sequence_number"] == 1
        assert (said["response"]["id"], said["response"]["created_at"]) == ("resp_1", 7)


@pytest.mark.parametrize("name", STREAMS)
async def test_error_behind_a_heartbeat_is_an_event_of_its_protocol(
    start_edge: StartEdge, start_upstream: StartUpstream, name: str
) -> None:
    operation = OPERATIONS[name]
    goes_on = asyncio.Event()

    async def script(connection: ScriptedConnection) -> None:
        await goes_on.wait()
        await connection.send(document({"error": {"message": "the words"}}, 400))

    edge = await serve(start_edge, start_upstream, script, route='heartbeat = "20ms"')
    client = await edge.connect()
    client.send(asked(edge, operation, stream=True))
    head = await soon(client.head())
    assert b"200 OK" in head
    beat = chunk(operation.protocol.heartbeat)
    assert await soon(client.reader.readexactly(2 * len(beat))) == 2 * beat
    goes_on.set()
    content = b""
    while not content.endswith(b"0\r\n\r\n"):
        content += await soon(client.reader.read(4096))
    last = content.replace(beat, b"").partition(b"\r\n")[2].removesuffix(b"\r\n0\r\n\r\n")
    check_last_event(operation, last, "the words")
    await edge.consistent()


@pytest.mark.parametrize("name", STREAMS)
async def test_stream_that_breaks_behind_its_last_event_is_complete(
    start_edge: StartEdge, start_upstream: StartUpstream, name: str
) -> None:
    whole = BEGINS[name] + ENDS[name]
    edge = await serve(start_edge, start_upstream, says(SSE, chunk(BEGINS[name]), chunk(ENDS[name]), close=True))
    client = await edge.connect()
    client.send(asked(edge, OPERATIONS[name], stream=True))
    assert await rest_of(client) == whole
    await edge.consistent()
    assert edge.records()[-1]["end"] == "complete"


@pytest.mark.parametrize("reads", ["the last event", "the first event"])
@pytest.mark.parametrize("name", STREAMS)
async def test_client_that_leaves_behind_the_last_event_has_all_of_the_answer(
    start_edge: StartEdge, start_upstream: StartUpstream, name: str, reads: str
) -> None:
    """Codex does not wait for the last chunk."""
    sent = [chunk(BEGINS[name]), chunk(ENDS[name])] if reads == "the last event" else [chunk(BEGINS[name])]

    async def script(connection: ScriptedConnection) -> None:
        await connection.send(SSE, *sent)
        await connection.reader.read()

    edge = await serve(start_edge, start_upstream, script)
    client = await edge.connect()
    client.send(asked(edge, OPERATIONS[name], stream=True))
    await soon(client.head())
    await soon(client.reader.readexactly(len(b"".join(sent))))
    client.close()
    await edge.consistent()
    assert edge.records()[-1]["end"] == ("complete" if reads == "the last event" else "client_gone")


@pytest.mark.parametrize("framing", ["chunks", "chunks, the last one apart", "close"])
@pytest.mark.parametrize("name", [name for name in STREAMS if OPERATIONS[name].always_ends])
async def test_stream_that_ends_in_order_without_its_last_event_is_half_an_answer(
    start_edge: StartEdge, start_upstream: StartUpstream, name: str, framing: str
) -> None:
    """No SDK looks for it, and an engine that fails may well end so."""
    head = SSE if framing != "close" else SSE.replace(b"transfer-encoding: chunked\r\n", b"")

    async def script(connection: ScriptedConnection) -> None:
        if framing == "close":
            await connection.send(head, BEGINS[name])
            connection.writer.close()
        elif framing == "chunks":
            await connection.send(head, chunk(BEGINS[name]) + b"0\r\n\r\n")
        else:
            await connection.send(head, chunk(BEGINS[name]), b"0\r\n\r\n")

    edge = await serve(start_edge, start_upstream, script)
    client = await edge.connect()
    client.send(asked(edge, OPERATIONS[name], stream=True))
    body = await rest_of(client)
    assert body.startswith(BEGINS[name])
    check_last_event(OPERATIONS[name], body.removeprefix(BEGINS[name]), "lost")
    await edge.consistent()
    assert edge.records()[-1]["end"] == "upstream_cut"


@pytest.mark.parametrize("framing", ["chunked", "length", "close"])
@pytest.mark.parametrize("name", ["chat/completions", "audio/speech"])
async def test_stream_without_an_event_is_no_answer_where_answers_need_events(
    start_edge: StartEdge, start_upstream: StartUpstream, name: str, framing: str
) -> None:
    """An engine refuses a prompt that is too long so; what is heard in silence may be nothing."""
    lines = {"chunked": b"transfer-encoding: chunked\r\n", "length": b"content-length: 0\r\n", "close": b""}
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n" + lines[framing] + b"\r\n"

    async def script(connection: ScriptedConnection) -> None:
        await connection.send(head + (b"0\r\n\r\n" if framing == "chunked" else b""))
        if framing == "close":
            connection.writer.close()

    edge = await serve(start_edge, start_upstream, script)
    status, _, body = await told(edge, asked(edge, OPERATIONS[name], stream=True))
    await edge.consistent()
    end = edge.records()[-1]["end"]
    if OPERATIONS[name].last_events:
        assert (status, json.loads(body)["error"]["code"], end) == (502, "upstream_error", "upstream_error")
    else:
        assert (status, body, end) == (200, b"", "complete")


# --- the manual


def test_table_in_the_manual_is_the_table() -> None:
    written = {line[0].strip("`"): line[1:] for line in rows(OPERATING, "Operations") if len(line) == 8}
    for name, operation in OPERATIONS.items():
        assert written[name] == [
            f"`{NAMES[operation.protocol]}`",
            "form" if operation.form else "JSON",
            ", ".join(f"`{each}`" for each in operation.last_events),
            f"`{operation.reads.value}`",
            operation.reserves.value,
            ", ".join(f"`{each}`" for each in operation.limits),
            "yes" if operation.is_cached else "no",
        ], name
    assert written.keys() == OPERATIONS.keys()
