"""`body_memory` counts what is really held of a request's body, whatever it is built of, until it is gone."""

import asyncio
import gc
import tracemalloc
from collections.abc import Callable

import pytest

from tests.conftest import Edge, ScriptedConnection, StartEdge, StartUpstream

KIB = 1024
SLACK_BYTES = 2048 * KIB  # of all else that a request has, what grows by a share, and a read
ROUTES = """
[pools.p]
endpoints = ["{upstream}"]
[routes."public/m"]
pool = "p"
model = "another"
metered = true
"""
BODY = b'{"model":"public/m","messages":[{"role":"user","content":"%b"}]}'


def body(size: int) -> bytes:
    return BODY % (b"x" * size)


def in_chunks(content: bytes, size: int) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts(content, size))


def parts(content: bytes, size: int) -> list[bytes]:
    return [content[at : at + size] for at in range(0, len(content), size)]


def head(edge: Edge, framing: bytes) -> bytes:
    lines = (b"POST /v1/chat/completions HTTP/1.1", b"Host: a", b"Content-Type: application/json", framing)
    return b"\r\n".join((*lines, b"Authorization: Bearer " + edge.key.encode(), b"", b""))


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(25):
        while not holds():
            await asyncio.sleep(0.01)


async def measured(edge: Edge, act: Callable[[], object], holds: Callable[[int], bool]) -> tuple[int, int]:
    """What was counted, and what Python allocated, once `holds` of what is counted."""
    gc.collect()
    tracemalloc.start()
    try:
        act()
        await until(lambda: holds(edge.server.memory.used_bytes))
        return edge.server.memory.used_bytes, tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()


async def unanswering(connection: ScriptedConnection) -> None:
    await asyncio.Event().wait()


@pytest.mark.parametrize(("chunk_bytes", "size"), [(0, 8000 * KIB), (16, 200 * KIB), (64 * KIB, 8000 * KIB)])
async def test_body_that_is_being_read_counts_as_much_as_it_holds(
    start_edge: StartEdge, start_upstream: StartUpstream, chunk_bytes: int, size: int
) -> None:
    upstream = await start_upstream(unanswering)
    edge = await start_edge(ROUTES.replace("{upstream}", upstream.url))
    content = body(size)[:-1]
    client = await edge.connect()
    framing = b"Transfer-Encoding: chunked" if chunk_bytes else b"Content-Length: %d" % (len(content) + 1)
    data = head(edge, framing) + (in_chunks(content, chunk_bytes) if chunk_bytes else content)
    counted, held = await measured(edge, lambda: client.send(data), lambda count: count == len(content))
    assert counted == len(content)
    assert abs(held - counted) < SLACK_BYTES + len(content) // 8
    client.abort()
    await until(lambda: not edge.server.memory.used_bytes)


async def test_body_that_its_upstream_does_not_read_counts_until_the_answer_ends(start_edge: StartEdge) -> None:
    ends = asyncio.Event()

    async def answer_unread(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{")
        await ends.wait()
        writer.write(b"}")
        await writer.drain()
        writer.transport.abort()

    async with await asyncio.start_server(answer_unread, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        edge = await start_edge(ROUTES.replace("{upstream}", f"http://127.0.0.1:{port}"))
        content = body(24 * 1024 * KIB)
        client = await edge.connect()
        client.send(head(edge, b"Content-Length: %d" % len(content)) + content)
        assert b" 200 " in await client.head()
        assert edge.server.memory.used_bytes == len(content)
        ends.set()
        await until(lambda: not edge.server.memory.used_bytes)
