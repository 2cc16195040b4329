"""The load generator's connection against an upstream that says exactly these bytes."""

import asyncio
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import pytest
import trustme

from loadtest.alarm import Alarm
from loadtest.client import Address, Client, Connections, Sample
from tests.conftest import ScriptedConnection, StartUpstream
from tests.streams import chunk

REQUEST = b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\n\r\n{}"
STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


@dataclass
class Seen:
    events: list[bytes] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    heard: Callable[[], None] = lambda: None

    def event(self, event: bytes, now: float) -> None:
        self.events.append(event)
        self.heard()

    def body(self, body: bytes) -> None:
        self.bodies.append(body)


def address(url: str) -> Address:
    parts = urlsplit(url)
    assert parts.hostname is not None
    assert parts.port is not None
    return Address(parts.hostname, parts.port)


@dataclass
class Asked:
    sample: Sample
    seen: Seen


async def ask(start_upstream: StartUpstream, *parts: bytes, close: bool = False) -> Asked:
    async def script(connection: ScriptedConnection) -> None:
        await connection.send(*parts)
        if close:
            connection.writer.close()

    upstream = await start_upstream(script)
    connections = Connections(address(upstream.url))
    seen = Seen()
    sample = await connections.request(REQUEST, seen)
    connections.close()
    return Asked(sample, seen)


async def test_a_stream_is_told_event_by_event_however_it_is_cut(start_upstream: StartUpstream) -> None:
    whole = STREAM + chunk(b"data: 1\n\nda") + chunk(b"ta: 2\n\n") + b"0\r\n\r\n"
    together = await ask(start_upstream, whole)
    bytewise = await ask(start_upstream, *(whole[at : at + 1] for at in range(len(whole))))
    for asked in (together, bytewise):
        assert asked.seen.events == [b"data: 1", b"data: 2"]
        assert asked.sample.ok
        assert asked.sample.events == 2
        assert asked.sample.body_bytes == 18
    times = together.sample
    assert 0 < times.sent <= times.first_byte <= times.finished


async def test_a_stream_may_end_with_more_than_one_empty_line(start_upstream: StartUpstream) -> None:
    asked = await ask(start_upstream, STREAM, chunk(b"data: [DONE]\n\n\n") + b"0\r\n\r\n")
    assert asked.seen.events == [b"data: [DONE]"]
    assert asked.sample.ok


async def test_a_server_that_accepts_and_says_nothing_does_not_outlast_the_timeout(
    start_upstream: StartUpstream,
) -> None:
    async def silent(connection: ScriptedConnection) -> None:
        await connection.reader.read()

    upstream = await start_upstream(silent)
    where = address(upstream.url)
    connections = Connections(Address(where.host, where.port, ssl.create_default_context()))
    sample = await connections.request(REQUEST, timeout_s=0.05)
    assert sample.error == "no connection within 0.05 s"


async def test_a_certificate_that_nobody_vouches_for_is_named() -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(context)
    server = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0, ssl=context)
    async with server:
        port = server.sockets[0].getsockname()[1]
        connections = Connections(Address("127.0.0.1", port, ssl.create_default_context()))
        sample = await connections.request(REQUEST)
    assert sample.error.startswith("connect: certificate: ")


async def test_events_may_end_with_crlf(start_upstream: StartUpstream) -> None:
    asked = await ask(start_upstream, STREAM, chunk(b"data: 1\r\n\r\n"), chunk(b"data: 2\r\n\r\n") + b"0\r\n\r\n")
    assert asked.seen.events == [b"data: 1", b"data: 2"]
    assert asked.sample.ok


async def test_a_body_is_told_whole(start_upstream: StartUpstream) -> None:
    asked = await ask(start_upstream, b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n", b"ab", b"cd")
    assert asked.seen.bodies == [b"abcd"]
    assert asked.sample.ok


async def test_a_body_may_end_with_the_connection(start_upstream: StartUpstream) -> None:
    asked = await ask(start_upstream, b"HTTP/1.1 200 OK\r\n\r\nab", close=True)
    assert asked.seen.bodies == [b"ab"]
    assert asked.sample.ok


async def test_an_interim_answer_is_passed_over(start_upstream: StartUpstream) -> None:
    asked = await ask(
        start_upstream, b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nab"
    )
    assert asked.sample.status == 200
    assert asked.seen.bodies == [b"ab"]


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nabc", "bytes after the end of the answer"),
        (STREAM + b"zz\r\n", "malformed answer: chunk size"),
        (STREAM + chunk(b"data: 1") + b"0\r\n\r\n", "the stream ends within an event"),
        (b"220 smtp ready\r\n\r\n", "malformed answer: status line"),
    ],
)
async def test_a_byte_too_many_or_too_few_is_an_error(start_upstream: StartUpstream, answer: bytes, error: str) -> None:
    asked = await ask(start_upstream, answer)
    assert asked.sample.error == error
    assert not asked.sample.ok


async def test_a_stream_that_is_cut_is_an_error(start_upstream: StartUpstream) -> None:
    asked = await ask(start_upstream, STREAM + chunk(b"data: 1\n\n"), close=True)
    assert asked.sample.error == "connection lost"


async def test_a_connection_is_used_again_and_left_when_the_answer_says_so(start_upstream: StartUpstream) -> None:
    async def script(connection: ScriptedConnection) -> None:
        more = b"Connection: close\r\n" if len(upstream.requests) == 2 else b""
        await connection.send(b"HTTP/1.1 200 OK\r\n" + more + b"Content-Length: 1\r\n\r\na")

    upstream = await start_upstream(script)
    connections = Connections(address(upstream.url))
    samples = [await connections.request(REQUEST) for _ in range(3)]
    connections.close()
    assert [sample.error for sample in samples] == ["", "", ""]
    assert upstream.connections == 2
    assert [bool(sample.connect_s) for sample in samples] == [True, False, True]


async def test_warm_connections_are_used_first(start_upstream: StartUpstream) -> None:
    async def script(connection: ScriptedConnection) -> None:
        await connection.send(b"HTTP/1.1 204 No Content\r\n\r\n")

    upstream = await start_upstream(script)
    connections = Connections(address(upstream.url))
    await connections.warm(2)
    samples = await asyncio.gather(*(connections.request(REQUEST) for _ in range(2)))
    connections.close()
    assert [sample.ok for sample in samples] == [True, True]
    assert upstream.connections == 2


async def test_nobody_listening_is_an_error_and_no_exception(unused_port: int) -> None:
    sample = await Connections(Address("127.0.0.1", unused_port)).request(REQUEST, intended=5.0)
    assert sample.error == "connect: Connection refused"
    assert sample.intended == 5.0


@pytest.fixture
async def unused_port() -> int:
    server = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
    port: int = server.sockets[0].getsockname()[1]
    server.close()
    await server.wait_closed()
    return port


async def test_an_answer_that_does_not_come_in_time_is_an_error(start_upstream: StartUpstream) -> None:
    async def script(connection: ScriptedConnection) -> None:
        await connection.send(STREAM)
        await connection.reader.read()

    upstream = await start_upstream(script)
    sample = await Connections(address(upstream.url)).request(REQUEST, timeout_s=0.05)
    assert sample.error == "no whole answer within 0.05 s"
    assert sample.status == 200


async def test_an_abort_ends_the_request_and_the_connection(start_upstream: StartUpstream) -> None:
    async def script(connection: ScriptedConnection) -> None:
        await connection.send(STREAM + chunk(b"data: 1\n\n"))
        await connection.reader.read()

    upstream = await start_upstream(script)
    client: Client = await Connections(address(upstream.url)).open()
    sample = await client.request(REQUEST, Seen(heard=client.abort))
    assert sample.error == "connection lost"
    assert not client.reusable
    await upstream.gone.wait()


async def test_an_alarm_rings_at_its_time_and_never_before() -> None:
    alarm = Alarm()
    at = time.monotonic() + 0.003
    await alarm.until(at)
    assert time.monotonic() >= at
    await alarm.until(at)  # past already
    alarm.close()
