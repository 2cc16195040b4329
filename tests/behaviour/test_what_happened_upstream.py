"""What log, headers and metrics say of what befell a request upstream, so that nobody has to guess."""

import asyncio
import datetime
import json
import re
import socket
import ssl
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import trustme

from edge.simulator.dialects import Behaviour
from edge.simulator.server import Simulator
from edge.upstream import endpoints
from tests.conftest import ROUTES, Edge, ScriptedConnection, StartEdge, StartUpstream, soon

PUBLIC = "public/deepseek-r1"
BODY = {"model": PUBLIC, "messages": []}
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"


async def last_line(edge: Edge) -> dict[str, Any]:
    await edge.idle()
    return (await edge.log())[-1]


def routes(*urls: str, **settings: object) -> str:
    lines = "\n".join(f"{name} = {json.dumps(value)}" for name, value in settings.items())
    pool = f"endpoints = {json.dumps(urls)}\n{lines}\n"
    return ROUTES.replace('endpoints = ["{upstream}"]\n', pool).replace("{upstream}", urls[0])


async def closing(connection: ScriptedConnection) -> None:
    connection.writer.close()


async def resetting(connection: ScriptedConnection) -> None:
    connection.reset()


async def rubbish(connection: ScriptedConnection) -> None:
    await connection.send(b"SSH-2.0-OpenSSH\r\n\r\n")


async def busy(connection: ScriptedConnection) -> None:
    await connection.send(b"HTTP/1.1 503 Busy\r\nContent-Length: 4\r\n\r\nfull")


async def silent(connection: ScriptedConnection) -> None:
    await asyncio.Event().wait()


async def halved(connection: ScriptedConnection) -> None:
    event = b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n'
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    await connection.send(head + b"%x\r\n%b\r\n" % (len(event), event))
    connection.writer.close()


@pytest.mark.parametrize(
    ("script", "status", "said", "outcome", "error", "proxy_status"),
    [
        (closing, 502, 0, "no_answer", "closed the connection without an answer", "error=http_response_incomplete"),
        (resetting, 502, 0, "no_answer", "reset the connection without an answer", "error=http_response_incomplete"),
        (rubbish, 502, 0, "no_answer", "sent a malformed response", "error=http_response_incomplete"),
        (busy, 503, 503, "upstream_error", "full", "received-status=503"),
        (silent, 504, 0, "first_byte_timeout", "no first byte in 0 s", "error=http_response_timeout"),
    ],
)
async def test_failure_is_named_in_log_headers_and_metrics(
    start_edge: StartEdge, start_upstream: StartUpstream,
    script: Callable[[ScriptedConnection], Any], status: int, said: int, outcome: str, error: str, proxy_status: str,
) -> None:  # fmt: skip
    upstream = await start_upstream(script)
    edge = await start_edge(routes(upstream.url, first_byte_timeout="50ms" if script is silent else "1m"))
    found, headers, _ = await edge.ask(BODY)
    line = await last_line(edge)
    at = upstream.url.removeprefix("http://")
    assert (found, headers["proxy-status"]) == (status, f"edge; {proxy_status}")
    assert headers["server-timing"].startswith("edge;dur=")
    assert (line["upstream_status"] or 0, line["upstream_error"]) == (said, error)
    (attempt,) = line["attempts"]
    assert (attempt["endpoint"], attempt["status"], attempt["outcome"], attempt["error"]) == (at, said, outcome, error)
    exposition = (await edge.server.metrics.render()).decode()
    labels = f'pool="r1",endpoint="{at}",status="{said}",outcome="{outcome}"'
    assert f"edge_upstream_requests_total{{{labels}}} 1" in exposition


async def test_cut_stream_is_named_though_its_status_was_good(
    start_edge: StartEdge, start_upstream: StartUpstream
) -> None:
    upstream = await start_upstream(halved)
    edge = await start_edge(routes(upstream.url))
    await edge.ask({**BODY, "stream": True})
    line = await last_line(edge)
    assert (line["status"], line["end"], line["upstream_error"]) == (200, "upstream_cut", "cut within the answer")
    assert [(each["status"], each["outcome"]) for each in line["attempts"]] == [(200, "upstream_cut")]


async def test_attempts_are_told_one_after_another_and_only_where_one_failed(
    start_edge: StartEdge, start_upstream: StartUpstream, simulator: Simulator, unused_tcp_port: int
) -> None:
    closed, full = f"http://127.0.0.1:{unused_tcp_port}", (await start_upstream(busy)).url
    edge = await start_edge(routes(closed, full, simulator.url, balance="round-robin"))
    for _ in range(3):
        status, headers, _ = await edge.ask(BODY)
        assert (status, "proxy-status" in headers) == (200, False)
    await edge.idle()
    told = {tuple((each["outcome"], each["error"]) for each in line["attempts"] or ()) for line in await edge.log()}
    assert ("connect_refused", "refused") in {each for line in told for each in line}
    assert ("upstream_error", "full") in {each for line in told for each in line}
    assert all(line == () or line[-1] == ("complete", "") for line in told)


async def test_stream_that_goes_on_elsewhere_names_the_member_that_broke(start_edge: StartEdge) -> None:
    async with AsyncExitStack() as stack:
        members = [Simulator(Behaviour(text="prompt", tokens=13)) for _ in range(2)]
        for each in members:
            await each.start()
            stack.push_async_callback(each.close)
        settings: dict[str, object] = {"balance": "round-robin", "resume": "replay", "retry_budget": 1.0}
        edge = await start_edge(routes(*(each.url for each in members), **settings))
        fault = {"fault": "cut", "after": 5, "once": "named"}
        messages = [{"role": "user", "content": "hi"}]
        await edge.ask({**BODY, "messages": messages, "stream": True, "temperature": 0, "simulate": fault})
        line = await last_line(edge)
        exposition = (await edge.server.metrics.render()).decode()
    broke, went_on = line["attempts"]
    assert (line["end"], line["resumes"]) == ("complete", 1)
    assert (broke["outcome"], went_on["outcome"]) == ("upstream_cut", "complete")
    assert went_on["endpoint"] == line["endpoint"] != broke["endpoint"]
    for each in line["attempts"]:
        labels = f'pool="r1",endpoint="{each["endpoint"]}",status="200",outcome="{each["outcome"]}"'
        assert f"edge_upstream_requests_total{{{labels}}} 1" in exposition
    sums = [float(each.split()[1]) for each in exposition.splitlines() if each.startswith("gen_ai") and "_sum" in each]
    assert min(sums) >= 0


class Expired:
    """A server at localhost whose certificate ended yesterday."""

    def __init__(self, directory: Path) -> None:
        authority = trustme.CA()
        authority.cert_pem.write_to_path(directory / "ca.pem")
        yesterday = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
        issued = authority.issue_cert(
            "localhost", not_before=yesterday - datetime.timedelta(days=9), not_after=yesterday
        )
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        issued.configure_cert(self.context)


async def test_certificate_that_ended_is_named(start_edge: StartEdge, tmp_path: Path) -> None:
    async def never(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    server = await asyncio.start_server(never, "127.0.0.1", 0, ssl=Expired(tmp_path).context)
    async with server:
        port = server.sockets[0].getsockname()[1]
        edge = await start_edge(routes(f"https://localhost:{port}", ca_file=str(tmp_path / "ca.pem")))
        _, headers, _ = await edge.ask(BODY)
        line = await last_line(edge)
    assert line["upstream_error"] == "tls: certificate has expired"
    assert line["attempts"][0]["outcome"] == "connect_tls"
    assert headers["proxy-status"] == "edge; error=tls_certificate_error"


async def test_name_that_is_not_known_is_named(start_edge: StartEdge, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*args: object, **kwargs: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    edge = await start_edge(routes("http://engine.example:8000"))
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setattr(type(edge.server._loop), "getaddrinfo", _raising(unknown), raising=False)
    _, headers, _ = await edge.ask(BODY)
    line = await last_line(edge)
    assert line["upstream_error"] == "dns: Name or service not known"
    assert headers["proxy-status"] == "edge; error=dns_error"


def _raising(unknown: Callable[..., None]) -> Callable[..., Any]:
    async def getaddrinfo(*args: object, **kwargs: object) -> None:
        unknown()

    return getaddrinfo


async def test_answers_say_what_took_their_time_where_that_is_set(start_edge: StartEdge, simulator: Simulator) -> None:
    for server, says in (("timing = true\n", True), ("", False)):
        edge = await start_edge(routes(simulator.url), server=server)
        for stream in (True, False):
            _, headers, _ = await edge.ask({**BODY, "stream": stream})
            assert (
                bool(re.fullmatch(r"edge;dur=[0-9.]+, upstream;dur=[0-9.]+", headers.get("server-timing", ""))) == says
            )
        await edge.stop()


async def test_limit_that_refuses_is_named(start_edge: StartEdge, simulator: Simulator) -> None:
    text = ROUTES.replace("{upstream}", simulator.url).replace(
        f'[routes."{PUBLIC}"]\n', f'[routes."{PUBLIC}"]\nlimit = "free"\n'
    )
    edge = await start_edge(text + "\n[limits.free]\nrequests_per_minute = 1\n")
    await edge.ask(BODY)
    status, headers, _ = await edge.ask(BODY)
    line = await last_line(edge)
    assert (status, line["limit"]) == (429, "free: requests per minute")
    assert headers["proxy-status"] == "edge; error=http_request_denied"
    assert "server-timing" not in headers  # nobody else took any time
    exposition = (await edge.server.metrics.render()).decode()
    assert 'edge_errors_total{error="rate_limit_exceeded",limit="free",of="requests per minute"} 1' in exposition


async def test_wait_for_a_place_is_told(start_edge: StartEdge, simulator: Simulator) -> None:
    edge = await start_edge(routes(simulator.url, max_inflight=1, queue=9))
    first, second = await edge.connect(), await edge.connect()
    first.send(edge.request({**BODY, "simulate": {"ttft_ms": 86_400_000}}))
    await simulator.wait_for(lambda: len(simulator.requests) == 1)
    second.send(edge.request(BODY))
    pool = edge.server.generation.pools["r1"]
    while not pool.waiting:
        await asyncio.sleep(0)
    first.abort()
    await soon(second.response())
    line = await last_line(edge)
    assert line["queue_ms"] > 0
    exposition = (await edge.server.metrics.render()).decode()
    assert 'edge_pool_wait_seconds_count{pool="r1"} 1' in exposition
    second.close()


async def test_trace_goes_on_with_a_span_of_the_edge(start_edge: StartEdge, start_upstream: StartUpstream) -> None:
    async def answer(connection: ScriptedConnection) -> None:
        await connection.send(ANSWER)

    upstream = await start_upstream(answer)
    edge = await start_edge(routes(upstream.url))
    trace = "0af7651916cd43dd8448eb211c80319c"
    await edge.ask(BODY, headers=(f"traceparent: 00-{trace}-b7ad6b7169203331-00", "tracestate: a=1", "tracestate: b=2"))
    await edge.ask(BODY, headers=("traceparent: 00-nonsense", "tracestate: a=1"))
    await edge.idle()
    traced, untraced = await edge.log()
    assert (traced["trace_id"], untraced["trace_id"]) == (trace, None)
    span = traced["upstream_id"].replace("-", "")[:16].encode()
    assert b"traceparent: 00-" + trace.encode() + b"-" + span + b"-00\r\n" in upstream.requests[0]
    assert b"tracestate: a=1,b=2\r\n" in upstream.requests[0]
    assert b"trace" not in upstream.requests[1]


async def test_key_that_is_refused_upstream_is_warned_of_once_an_hour(
    start_edge: StartEdge, caplog: pytest.LogCaptureFixture
) -> None:
    refusing = Simulator(Behaviour(fault="error", status=401))
    await refusing.start()
    try:
        edge = await start_edge(routes(refusing.url))
        for _ in range(3):
            await edge.ask(BODY)
        endpoint = edge.server.generation.pools["r1"].members[0].endpoint
    finally:
        await refusing.close()
    warned = [each for each in caplog.messages if "check its `api_key`" in each]
    assert len(warned) == 1
    assert endpoints._REFUSAL_LOG_INTERVAL_S == 3600
    endpoint.log_refusal(401, endpoint._refusal_log_at)
    assert len([each for each in caplog.messages if "check its `api_key`" in each]) == 2
