"""Several requests in one read, or at any cuts: each is the one that was sent, and each body's chunks are followed."""

import asyncio
import random
from types import SimpleNamespace
from typing import Any, cast

import pytest

from edge.client.answers import response
from edge.client.body import BodyMemory, read_body, whole_body
from edge.client.connection import Request
from edge.client.server import ClientServer
from edge.config.process_settings import ServerConfig
from edge.errors import EdgeError
from edge.stage import Lifecycle
from tests.client.test_repeats import Wire

Asked = tuple[str, str, bytes]

HEAD = b"POST /%d HTTP/1.1\r\nHost: x\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n"
TINY = b"1\r\nx\r\n" * 5000 + b"0\r\n\r\n"


async def serve(reads: list[bytes]) -> list[Asked]:
    """Give reads to a connection, as its sockets would, and return what was served."""
    served: list[Asked] = []

    async def answer(request: Request) -> None:
        head = request.head
        try:
            memory = BodyMemory(10**9)
            body = whole_body(request, 10**6, memory) or await read_body(request, ServerConfig(), memory)
            served.append((head.method, head.message.path, bytes(body.data)))
            body.release()
        except EdgeError:
            request.connection.last = True
        request.connection.send(response(200, b"", request_id="r", last=request.connection.last))

    wire = Wire()
    connection = ClientServer(answer, Lifecycle(), ServerConfig(), 10)()
    connection.connection_made(wire)
    for read in reads:
        await asyncio.sleep(0)
        connection.data_received(read)
    for _ in range(300):
        await asyncio.sleep(0)
    connection.connection_lost(None)
    await asyncio.sleep(0)
    return served


def one(chance: random.Random, number: int) -> tuple[bytes, Asked]:
    """Return a request, and what is served of it."""
    body = bytes(chance.choices(b"01aF\r\n Z", k=chance.choice((0, 1, 20, 300, 9000))))
    if chance.random() < 0.3:
        body += b"\r\n\r\n0\r\n\r\nDELETE / HTTP/1.1\r\nHost: x\r\n\r\n"
    before = chance.choice((b"", b"", b"\r\n")) + chance.choice((b"POST", b"DELETE")) + b" /%d HTTP/1.1\r\n" % number
    before += b"Host: x\r\n"
    asked = (before.split()[0].decode(), f"/{number}", body)
    if chance.random() < 0.4:
        return before + b"Content-Length: %d\r\n\r\n%b" % (len(body), body), asked
    chunks, at = b"", 0
    while at < len(body):
        piece = body[at : at + chance.choice((1, 16, 17, 5000))]
        chunks += b"%x%b\r\n%b\r\n" % (len(piece), chance.choice((b"", b"", b";a")), piece)
        at += len(piece)
    return before + CHUNKED + chunks + chance.choice((b"0\r\n\r\n", b"000;x=y\r\nX: y\r\n\r\n")), asked


@pytest.mark.parametrize("seed", range(30))
async def test_requests_in_a_row_are_served_as_they_were_sent_wherever_reads_cut_them(seed: int) -> None:
    chance = random.Random(seed)
    requests = [one(chance, number) for number in range(chance.choice((2, 3, 10, 40)))]
    data = b"".join(sent for sent, _ in requests)
    at = sorted(chance.choice((chance.randrange(len(data)), 8192 + chance.randrange(-2, 3))) for _ in range(seed % 5))
    reads = [data[start:end] for start, end in zip([0, *at], [*at, len(data)], strict=True)]
    assert await serve([read for read in reads if read]) == [asked for _, asked in requests]


@pytest.mark.parametrize(
    "before",
    [
        b"",
        b"\r\n\r\n",
        b"GET /0 HTTP/1.1\r\nHost: x\r\n\r\n",
        HEAD % 0 + b"Content-Length: 4\r\n\r\n\r\n\r\n",
        HEAD % 0 + CHUNKED + b"4\r\n\r\n\r\n\r\n0\r\nX: y\r\n\r\n",
    ],
    ids=["nothing", "lines", "get", "length", "chunks"],
)
async def test_chunks_of_a_body_are_followed_whatever_stands_before_its_request(before: bytes) -> None:
    data = before + HEAD % 1 + CHUNKED + TINY
    for at in (0, len(before) + 9, len(data) - len(TINY)):
        served = await serve([part for part in (data[:at], data[at:]) if part])
        served = await serve([part for part in (data[:at], data[at:]) if part])
        assert [path for _, path, _ in served] == ["/0"][: len(before) // 9]


@pytest.mark.parametrize("size", [100, 10_000, 60_000, 120_000, 200_000])
async def test_bodies_behind_a_running_answer_are_bounded(size: int) -> None:
    """No memory of bodies counts one before its turn. Who sends too much gets the running answer, and no other."""
    release, served = asyncio.Event(), []

    async def answer(request: Request) -> None:
        served.append(request)
        request.connection.attach(cast(Any, SimpleNamespace(begun=True, client_gone=lambda: None)))
        await release.wait()
        request.connection.attach(None)

    wire = Wire()
    connection = ClientServer(answer, Lifecycle(), ServerConfig(), 10).connection()
    connection.connection_made(wire)
    await _turns()
    connection.data_received(asked(2))
    await _turns()
    most = 0
    for _ in range(3_000_000 // size):
        connection.data_received(asked(size))
        while connection._rest:
            await asyncio.sleep(0)
        held = [payload.total_bytes for _, payload in connection._messages]
        most = max(most, sum(held) + len(connection._parked) + connection.unparsed_bytes)
    assert most < 1_000_000
    assert connection._close
    assert not wire.closed, "the running answer goes on"
    release.set()
    await _turns()
    assert wire.closed
    assert len(served) == 1


def asked(size: int) -> bytes:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    return head % size + b"x" * size


async def _turns() -> None:
    for _ in range(6):  # of the loop, which wait for nothing
        await asyncio.sleep(0)
