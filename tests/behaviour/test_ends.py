"""One end for log, bill and metrics: however a request ends, its record, its log line and its metrics agree."""

import asyncio
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from edge.exchange import End
from edge.relay import pace
from tests.conftest import Edge, RawClient, ScriptedConnection, StartEdge, StartUpstream

ASK = {"model": "public/deepseek-r1", "stream": True, "messages": []}
SSE = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
EVENT = b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n'
CHUNK = b"%x\r\n%b\r\n" % (len(EVENT), EVENT)
LAST = b"0\r\n\r\n"
# More than a client's buffer holds only with its last part: the edge stops reading when it has all of it.
# It takes 16 KiB at a time.
UNREAD = (b"x" * 81_000, b"y" * 16_000)
UNREAD_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 97000\r\n\r\n"
ROUTES = """
[pools.r1]
endpoints = ["{upstream}"]
first_byte_timeout = "{first_byte}"
idle_timeout = "{idle}"
[routes."public/deepseek-r1"]
pool = "r1"
"""


def of(request: bytes) -> str:
    """Which end a request asks its upstream for."""
    return request.partition(b'"user": "')[2].partition(b'"')[0].decode()


async def script(connection: ScriptedConnection) -> None:
    """Bring the end about that the request asks for, as far as the upstream has a part in it."""
    match of(connection.request):
        case "complete":
            await connection.send(SSE + CHUNK, LAST)
        case "upstream_error":
            await connection.send(b"HTTP/1.1 400 Oh\r\ncontent-length: 2\r\n\r\n{}")
        case "upstream_cut":
            await connection.send(SSE + CHUNK)
            connection.reset()
        case "first_byte_timeout" | "client_gone":
            await connection.reader.read()
        case "slow_client":
            await connection.send(SSE)
            while not connection.writer.is_closing():
                await connection.send(b"10000\r\n" + b"x" * 2**16 + b"\r\n")
        case "unread":
            await connection.send(UNREAD_HEAD + UNREAD[0] + UNREAD[1])
        case _:
            await connection.send(SSE + CHUNK)
            await connection.reader.read()


async def seen(edge: Edge) -> tuple[dict[str, Any], dict[str, Any] | None, dict[tuple[str, str], float]]:
    """The last log line, the last record, and the metrics as sample and labels to value."""
    await edge.consistent()
    line = (await edge.log())[-1]
    records = edge.records()
    families = list(
        text_string_to_metric_families((await edge.server.metrics.render()).decode())
    )  # also of a stopped one
    samples = {
        (sample.name, " ".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }
    return line, records[-1] if records else None, samples


async def assert_agree(edge: Edge, end: End, status: int) -> None:
    line, record, samples = await seen(edge)
    route = line["route"] or ""
    assert (line["end"], line["status"]) == (end.value, status)
    if record is not None:
        assert {name: record[name] for name in ("end", "status", "duration_ms", "ttft_ms")} == {
            name: line[name] for name in ("end", "status", "duration_ms", "ttft_ms")
        }
    assert samples["edge_requests_total", f"end={end.value} route={route} status={status}"] == 1
    duration_s = samples["edge_request_duration_seconds_sum", f"route={route}"]
    assert line["duration_ms"] == pytest.approx(duration_s * 1000, abs=0.006)
    assert samples["edge_response_bytes_total", f"route={route}"] == line["response_bytes"]


async def ask(edge: Edge, user: str) -> RawClient:
    client = await edge.connect()
    client.send(edge.request({**ASK, "user": user}))
    return client


async def whole(edge: Edge, user: str) -> None:
    client = await ask(edge, user)
    await client.response()


async def left(edge: Edge, user: str) -> None:
    client = await ask(edge, user)
    while not any(each.in_flight for each in edge.server.endpoints.states()):
        await asyncio.sleep(0)
    client.abort()


async def refused(edge: Edge, user: str) -> None:
    await edge.ask({**ASK, "user": user}, key="sk-nobody-has-this-key")


async def drained(edge: Edge, user: str) -> None:
    client = await ask(edge, user)
    await client.head()
    edge.server.stop()
    await client.rest()


async def unreading(edge: Edge, user: str) -> None:
    client = await edge.connect()
    client.send(edge.request(path="/v1/models", method="GET"))
    await client.response()
    [connection] = edge.server.clients.clients
    assert connection.transport is not None
    connection.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**12)
    client.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**12)
    client.writer.transport.pause_reading()  # type: ignore[attr-defined]
    client.send(edge.request({**ASK, "user": user}))
    await edge.server.clients.wait_empty()


ENDS: dict[str, tuple[Callable[[Edge, str], Awaitable[None]], End, int]] = {
    "complete": (whole, End.COMPLETE, 200),
    "upstream_error": (whole, End.UPSTREAM_ERROR, 400),
    "upstream_cut": (whole, End.UPSTREAM_CUT, 200),
    "first_byte_timeout": (whole, End.FIRST_BYTE_TIMEOUT, 504),
    "idle_timeout": (whole, End.IDLE_TIMEOUT, 200),
    "client_gone": (left, End.CLIENT_GONE, 0),
    "slow_client": (unreading, End.SLOW_CLIENT, 200),
    "unread": (unreading, End.COMPLETE, 200),
    "drained": (drained, End.DRAINED, 200),
    "refused": (refused, End.REFUSED, 401),
    "internal_error": (whole, End.INTERNAL_ERROR, 500),
}


@pytest.mark.parametrize("name", ENDS)
async def test_record_log_line_and_metrics_agree_on_how_a_request_ended(
    start_edge: StartEdge, start_upstream: StartUpstream, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pace, "_SLOW_CLIENT_CHECK_S", 0.05)
    upstream = await start_upstream(script)
    times = {"first_byte": "50ms" if name == "first_byte_timeout" else "60s"}
    times["idle"] = "50ms" if name == "idle_timeout" else "60s"
    text = ROUTES.replace("{upstream}", upstream.url)
    for key, value in times.items():
        text = text.replace(f"{{{key}}}", value)
    drain = 'drain_timeout = "0s"' if name == "drained" else ""
    edge = await start_edge(text, server=f'min_client_rate = "1KiB"\n{drain}')
    if name == "internal_error":
        monkeypatch.setattr("edge.forwarding.relay", None)
    bring_about, end, status = ENDS[name]
    async with asyncio.timeout(60):
        await bring_about(edge, name)
        await assert_agree(edge, end, status)
    if name == "unread":  # it was recorded whole: what became of its client stands beside that
        assert (await edge.log())[-1]["error"] == "slow_client"


def test_every_end_is_compared() -> None:
    assert {end for _, end, _ in ENDS.values()} == set(End)
