"""An upstream that breaks off: no client may take what it got for a complete answer."""

import asyncio
import json
import re

import pytest

from tests.conftest import ROUTES, Edge, RawClient, ScriptedConnection, StartEdge, StartUpstream, soon
from tests.streams import chunk

ASK = {"model": "public/deepseek-r1", "stream": True, "messages": []}
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
EVENTS = [b'data: {"id":"1"}\n\n', b": ping\n\n", b'event: x\r\ndata: {"id":"2"}\r\n\r\n', b"data: [DONE]\n\n"]
STREAM = b"".join(EVENTS)
LAST = b"0\r\n\r\n"
WAYS = ("cut", "reset", "stall")


# The same events in other chunks; `whole events` is how engines send them.
CHUNKS = {
    "whole events": EVENTS,
    "two events in a chunk": [EVENTS[0] + EVENTS[1], EVENTS[2] + EVENTS[3]],
    "parts of events": [STREAM[at : at + 11] for at in range(0, len(STREAM), 11)],
    "single bytes": [STREAM[at : at + 1] for at in range(len(STREAM))],
    "single bytes of blank lines": [bytes([byte]) for byte in b"x: a\n\ny: b\r\n\r\nz: c\nz: d\n\n"],
}


async def edge_for(start_edge: StartEdge, start_upstream: StartUpstream, way: str, whole: bytes) -> Edge:
    """An edge whose upstream breaks off in some way after as many bytes of `whole` as the request says."""

    async def script(connection: ScriptedConnection) -> None:
        count = int(connection.request.rpartition(b'"user": "')[2].partition(b'"')[0])
        await connection.send(whole[:count])
        if way == "stall":
            await connection.reader.read()
        elif way == "reset":
            connection.reset()
        connection.writer.close()

    upstream = await start_upstream(script)
    # No more than a stall has to wait, and as much as a busy machine may need for bytes that come at once.
    times = 'idle_timeout = "3s"\nfirst_byte_timeout = "3s"\n[routes.' if way == "stall" else "[routes."
    return await start_edge(ROUTES.replace("{upstream}", upstream.url).replace("[routes.", times, 1))


async def broken(edge: Edge, count: int, version: str = "1.1") -> tuple[bytes, bytes, bool, RawClient]:
    """Head and rest of an answer that broke after `count` bytes, whether a reset ended it, and the client.

    A rest that ends with the last chunk is all there is, for the connection then stays.
    """
    client = await edge.connect()
    client.send(edge.request({**ASK, "user": str(count)}, version=version))
    head, rest = b"", b""
    try:
        head = await soon(client.head())
        if found := re.search(rb"\r\ncontent-length: (\d+)\r\n", head, re.IGNORECASE):
            while len(rest) < int(found[1]) and (data := await soon(client.reader.read(65536))):
                rest += data
        else:
            while not rest.endswith(LAST) and (data := await soon(client.reader.read(65536))):
                rest += data
    except (ConnectionResetError, asyncio.IncompleteReadError):
        return head, rest, True, client
    return head, rest, False, client


def content_of(body: bytes) -> bytes:
    """The content of chunks, the last of which may be cut."""
    content = b""
    while body and (line := re.match(rb"([0-9a-f]+)\r\n", body)):
        size = int(line[1], 16)
        content += body[line.end() : line.end() + size]
        body = body[line.end() + size + 2 :]
    return content


def error_in(frame: bytes) -> dict[str, object]:
    assert frame.startswith(b"data: ")
    assert frame.endswith(b"\n\n")
    assert frame.count(b"\n") == 2
    error: dict[str, object] = json.loads(frame[6:])["error"]
    return error


def boundaries(head: bytes, chunks: list[bytes]) -> set[int]:
    """Where both a chunk and an event have ended."""
    at, content, found = len(head), b"", set()
    for each in chunks:
        at += len(chunk(each))
        content += each
        if content.endswith((b"\n\n", b"\r\n\r\n")):
            found.add(at)
    return found


def breaks(way: str, counts: range, ends: set[int]) -> list[int]:
    """Where to break: at every byte; where the edge waits for more, around the ends of events and at every ninth.

    A stall is told by the clock. Whatever is asked at once has to come before it, on a busy machine too.
    """
    if way != "stall":
        return list(counts)
    return sorted(set(counts[::9]) | {at for end in ends for at in (end - 1, end, end + 1) if at in counts})


def is_pending(content: bytes) -> bool:
    """Whether nothing but the beginning of what may be an error has come, so that the head is still held."""
    return b'data: {"error"'.startswith(content)


# What came decides where the stream stands, at every byte of every kind; the way it breaks only enters at its end.
@pytest.mark.parametrize(("kind", "way"), [
    *((kind, "cut") for kind in CHUNKS),
    ("whole events", "reset"), ("single bytes of blank lines", "reset"),
    ("whole events", "stall"), ("parts of events", "stall"),
])  # fmt: skip
async def test_stream_that_breaks_at_any_byte_never_looks_complete(
    start_edge: StartEdge, start_upstream: StartUpstream, kind: str, way: str
) -> None:
    """On a chunk and event boundary an error event and the last chunk, anywhere else a close without it."""
    head = HEAD + b"transfer-encoding: chunked\r\n\r\n"
    body = b"".join(map(chunk, CHUNKS[kind])) + LAST
    whole = head + body
    speaks = boundaries(head, CHUNKS[kind])
    edge = await edge_for(start_edge, start_upstream, way, whole)

    async def one(count: int) -> None:
        got_head, got, was_reset, client = await broken(edge, count)
        assert not was_reset
        sent = body[: max(0, count - len(head))]
        content = content_of(sent)
        assert got.count(b"HTTP/1.1") == 0
        if got_head.startswith(b"HTTP/1.1 504" if way == "stall" else b"HTTP/1.1 502"):
            assert is_pending(content)
            assert json.loads(got)["error"]["code"] in ("upstream_error", "upstream_timeout")
            return
        assert kind == "single bytes" or not is_pending(content)  # an error is looked for in the first chunk
        assert got_head.startswith(b"HTTP/1.1 200 OK\r\n")
        if count in speaks:
            passed, frame = got[: len(sent)], content_of(got[len(sent) :])
            assert passed == sent
            if content.endswith(EVENTS[-1]):  # it has its last event
                assert got == sent + LAST, count
            else:
                assert got == sent + chunk(frame) + LAST, count
                assert error_in(frame)["code"] == "upstream_disconnected"
            client.send(edge.request(path="/v1/models", method="GET"))
            assert (await soon(client.response()))[0] == 200  # the connection is whole
        else:
            assert sent.startswith(got), (count, got)
            assert content_of(got) == content, count
            assert not got.endswith(LAST)

    positions = breaks(way, range(len(head) - 3, len(whole)), speaks)
    for low in range(0, len(positions), 64):
        await asyncio.gather(*(one(count) for count in positions[low : low + 64]))
    await edge.consistent()
    ends = {line["end"] for line in await edge.log() if line["path"] != "/v1/models"}
    assert ends <= {"upstream_error", "first_byte_timeout", "upstream_cut", "idle_timeout", "complete"}
    assert ("complete" in ends) == b"".join(CHUNKS[kind]).endswith(EVENTS[-1])
    assert ("idle_timeout" in ends) == (way == "stall")
    assert ("upstream_cut" in ends) == (way != "stall")


@pytest.mark.parametrize("way", WAYS)
async def test_head_that_breaks_at_any_byte_is_an_error_of_ours(
    start_edge: StartEdge, start_upstream: StartUpstream, way: str
) -> None:
    head = HEAD + b"transfer-encoding: chunked\r\n\r\n"
    edge = await edge_for(start_edge, start_upstream, way, head)
    answers = await asyncio.gather(
        *(broken(edge, count) for count in breaks(way, range(1, len(head) + 1), {len(head)}))
    )
    for got_head, got, was_reset, _ in answers:
        assert got_head.startswith(b"HTTP/1.1 504 " if way == "stall" else b"HTTP/1.1 502 ")
        assert set(json.loads(got)) == {"error"}
        assert not was_reset
    await edge.consistent()


BODY = b'{"object":"chat.completion","choices":[]}'
JSON = {
    "length": b"content-length: %d\r\n\r\n" % len(BODY) + BODY,
    "chunks": b"transfer-encoding: chunked\r\n\r\n" + chunk(BODY[:9]) + chunk(BODY[9:]) + LAST,
    "chunks with extensions": b"transfer-encoding: chunked\r\n\r\n9;a\r\n"
    + BODY[:9]
    + b"\r\n"
    + chunk(BODY[9:])
    + LAST,
}


@pytest.mark.parametrize(("framing", "way"), [
    *((framing, "cut") for framing in JSON), ("length", "reset"), ("chunks", "reset"), ("length", "stall"),
    ("chunks with extensions", "stall"),
])  # fmt: skip
async def test_json_answer_that_breaks_at_any_byte_is_short(
    start_edge: StartEdge, start_upstream: StartUpstream, framing: str, way: str
) -> None:
    """No frame of ours can stand there."""
    whole = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n" + JSON[framing]
    begin = whole.index(b"\r\n\r\n") + 4
    edge = await edge_for(start_edge, start_upstream, way, whole)

    async def one(count: int) -> None:
        head, got, was_reset, _ = await broken(edge, count)
        assert not was_reset
        if b"{" not in whole[begin:count]:  # framing alone is no beginning of an answer
            assert head.startswith((b"HTTP/1.1 502", b"HTTP/1.1 504"))
            assert set(json.loads(got)) == {"error"}
            return
        assert head.startswith(b"HTTP/1.1 200")
        content = got if framing == "length" else content_of(got)
        assert BODY.startswith(content)
        assert b"error" not in got
        assert len(got) < len(BODY) if framing == "length" else not got.endswith(LAST)

    await asyncio.gather(*(one(count) for count in range(begin, len(whole))))
    await edge.consistent()
    assert "complete" not in {line["end"] for line in await edge.log()}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("media_type", [b"text/event-stream", b"application/json"])
async def test_http_1_0_client_gets_a_reset_or_an_error_event(
    start_edge: StartEdge, start_upstream: StartUpstream, media_type: bytes, way: str
) -> None:
    """An orderly end alone would complete the answer for it."""
    head = b"HTTP/1.1 200 OK\r\ncontent-type: " + media_type + b"\r\ntransfer-encoding: chunked\r\n\r\n"
    body = b"".join(map(chunk, EVENTS))
    edge = await edge_for(start_edge, start_upstream, way, head + body + LAST)

    async def one(count: int) -> None:
        got_head, got, was_reset, _ = await broken(edge, count, "1.0")
        content = content_of(body[: count - len(head)])
        if was_reset:
            return
        if got_head.startswith((b"HTTP/1.1 502", b"HTTP/1.1 504")):
            assert is_pending(content) or not content
            return
        assert media_type == b"text/event-stream", count
        assert got.startswith(content)
        assert content.endswith((b"\n\n", b"\r\n\r\n"))
        if content.endswith(EVENTS[-1]):  # it has its last event
            assert got == content
        else:
            assert error_in(got.removeprefix(content))["code"] == "upstream_disconnected"

    counts = range(len(head), len(head + body + LAST))
    await asyncio.gather(*(one(count) for count in breaks(way, counts, boundaries(head, EVENTS))))
    await edge.consistent()
    ends = {line["end"] for line in await edge.log()}
    assert ("complete" in ends) == (media_type == b"text/event-stream")


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("way", ["cut", "reset"])
async def test_stream_that_a_close_ends_is_complete_only_at_the_end_of_an_event(
    start_edge: StartEdge, start_upstream: StartUpstream, way: str, version: str
) -> None:
    head = HEAD + b"\r\n"
    whole = head + STREAM
    edge = await edge_for(start_edge, start_upstream, way, whole)

    async def one(count: int) -> None:
        got_head, got, was_reset, _ = await broken(edge, count, version)
        sent = STREAM[: count - len(head)]
        at_event_end = sent.endswith((b"\n\n", b"\r\n\r\n"))
        if got_head.startswith(b"HTTP/1.1 502"):
            assert is_pending(sent)
        elif not at_event_end:
            assert was_reset if version == "1.0" else not got.endswith(LAST), (count, got)
        elif way == "cut":
            assert not was_reset
            assert got == sent if version == "1.0" else (got.endswith(LAST) and content_of(got) == sent)
        else:
            frame = (got if version == "1.0" else content_of(got)).removeprefix(sent)
            if not sent.endswith(EVENTS[-1]):
                assert error_in(frame)["code"] == "upstream_disconnected"
            else:  # it has its last event
                assert frame == b""

    await asyncio.gather(*(one(count) for count in range(len(head) + 1, len(whole) + 1)))
    await edge.consistent()


MALFORMED = [
    b"zz\r\n",
    b"5\r\nhello!\r\n",
    b"-1\r\n",
    b"\r\n",
    b"0\r\nbad trailer\r\n\r\n",
    b"HTTP/1.1 500 Oops\r\n\r\n",
]


@pytest.mark.parametrize("rubbish", MALFORMED)
async def test_malformed_chunk_in_a_stream_breaks_it(
    start_edge: StartEdge, start_upstream: StartUpstream, rubbish: bytes
) -> None:
    begun = asyncio.Event()

    async def script(connection: ScriptedConnection) -> None:
        await connection.send(HEAD + b"transfer-encoding: chunked\r\n\r\n" + chunk(EVENTS[0]))
        await begun.wait()
        await connection.send(rubbish)
        await connection.reader.read()

    upstream = await start_upstream(script)
    edge = await start_edge(ROUTES.replace("{upstream}", upstream.url))
    for version in ("1.0", "1.1"):
        begun.clear()
        upstream.gone.clear()
        client = await edge.connect()
        client.send(edge.request(ASK, version=version))
        await soon(client.head())
        first = EVENTS[0] if version == "1.0" else chunk(EVENTS[0])
        assert await soon(client.reader.readexactly(len(first))) == first
        begun.set()
        got = b""
        try:
            while not got.endswith(LAST) and (data := await soon(client.reader.read(65536))):
                got += data
        except ConnectionResetError:
            assert version == "1.0"
        else:
            if version == "1.0" or got.endswith(LAST):
                frame = got if version == "1.0" else content_of(got)
                assert error_in(frame.removeprefix(b"hello"))["code"] == "upstream_disconnected"
        assert not rubbish.strip() or rubbish not in got
        await soon(upstream.gone.wait())
    await edge.consistent()
    assert [line["end"] for line in await edge.log()] == ["upstream_cut"] * 2
