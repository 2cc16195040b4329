"""The listener for operators: health, readiness and metrics, without a key."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from edge.simulator.server import Simulator
from tests.conftest import ROUTES, Edge, RawClient, StartEdge


async def admin(edge: Edge, path: str, method: str = "GET") -> tuple[int, dict[str, str], bytes]:
    client = RawClient(*await asyncio.open_connection("127.0.0.1", edge.admin_port))
    client.send(f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    try:
        if method == "HEAD":
            head = (await client.head()).decode().lower()
            headers = dict(line.split(": ", 1) for line in head.splitlines()[1:] if line)
            return int(head.split()[1]), headers, await client.rest()
        return await client.response()
    finally:
        client.close()


@pytest.fixture
async def logged() -> AsyncIterator[asyncio.Event]:
    """Set whenever the process logs something."""
    event, loop = asyncio.Event(), asyncio.get_running_loop()
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: loop.call_soon_threadsafe(event.set)  # type: ignore[assignment,method-assign,return-value]
    logger = logging.getLogger("edge")
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    yield event
    logger.setLevel(level)
    logger.removeHandler(handler)


async def test_health_is_a_word_and_needs_no_key(edge: Edge) -> None:
    for path in ("/livez", "/readyz", "/healthz", "/livez?x=1"):
        status, headers, body = await admin(edge, path)
        assert (path, status, body) == (path, 200, b"ok\n")
        assert headers["content-type"].startswith("text/plain")


async def test_readyz_verbose_shows_a_fact_a_line(edge: Edge) -> None:
    status, _, body = await admin(edge, "/readyz?verbose")
    facts = dict(line.split(": ", 1) for line in body.decode().splitlines())
    assert status == 200
    assert (facts["ready"], facts["generation"], facts["last reload"], facts["routes"]) == ("yes", "1", "ok", "2")


async def test_sink_that_is_down_is_told_with_its_place_its_reason_and_what_waits(
    start_edge: StartEdge, simulator: Simulator, unused_tcp_port: int, logged: asyncio.Event
) -> None:
    sink = f'[usage]\nsink = "http://127.0.0.1:{unused_tcp_port}/secret"\n'
    edge = await start_edge(ROUTES.replace("{upstream}", simulator.url) + sink)
    await edge.ask({"model": "public/deepseek-r1"})
    assert edge.server._shipper is not None
    while not edge.server._shipper.outage:
        logged.clear()
        await logged.wait()
    _, _, body = await admin(edge, "/readyz?verbose")
    told = dict(line.split(": ", 1) for line in body.decode().splitlines())["usage sink"]
    waits = edge.server._shipper.lag_bytes
    assert waits
    assert told == f"127.0.0.1:{unused_tcp_port}: Connection refused, {waits} bytes to go"


async def test_unknown_path_is_404_and_names_those_that_exist(edge: Edge) -> None:
    for path in ("/", "/metrics/", "/readyz/", "/v1/models", "//livez", "/%2e/livez"):
        status, _, body = await admin(edge, path)
        assert (path, status) == (path, 404)
        assert b"/readyz" in body


async def test_another_method_is_405_with_allow(edge: Edge) -> None:
    """RFC 9110 section 15.5.6."""
    for method in ("POST", "PUT", "DELETE", "OPTIONS"):
        status, headers, _ = await admin(edge, "/livez", method)
        assert (method, status, headers["allow"]) == (method, 405, "GET, HEAD")


async def test_head_is_get_without_the_body(edge: Edge) -> None:
    """RFC 9110 section 9.3.2."""
    for path in ("/livez", "/readyz", "/readyz?verbose", "/metrics", "/nothing"):
        status, _, _ = await admin(edge, path)
        head_status, headers, body = await admin(edge, path, "HEAD")
        assert (path, head_status, body) == (path, status, b"")
        assert "content-type" in headers


async def test_admin_is_not_on_the_public_listener(edge: Edge) -> None:
    for path in ("/livez", "/readyz", "/metrics"):
        status, _, body = await edge.ask(path=path, method="GET")
        assert status == 404
        assert b"edge_" not in body


async def test_metrics_tell_what_happened(edge: Edge, simulator: Simulator) -> None:
    """Counters by route and end, histograms that are cumulative, gauges of now."""
    await edge.ask({"model": "public/deepseek-r1", "stream": True, "simulate": {"tokens": 3}})
    await edge.ask({"model": "u-1100a15812cc/qwen2"})
    await edge.ask({"model": "public/nobody-knows-this"})
    await edge.ask({"model": "public/deepseek-r1"}, key="sk-wrong-key")
    client = await edge.connect()
    client.send(edge.request({"model": "public/deepseek-r1", "simulate": {"ttft_ms": 86_400_000}}))
    await simulator.wait_for(lambda: len(simulator.requests) == 3)
    status, headers, body = await admin(edge, "/metrics")
    assert status == 200
    assert headers["content-type"].startswith("text/plain; version=")
    samples = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(body.decode())
        for sample in family.samples
    }
    requests = {key[1:]: value for key, value in samples.items() if key[0] == "edge_requests_total"}
    assert requests == {
        ("200", "complete", "public/deepseek-r1"): 1,
        ("200", "complete", "u-*"): 1,
        ("", "404", "refused"): 1,
        ("", "401", "refused"): 1,
    }
    assert samples["edge_request_duration_seconds_count", "public/deepseek-r1"] == 1
    assert samples["edge_time_to_first_byte_seconds_bucket", "+Inf", "public/deepseek-r1"] == 1
    assert samples["edge_requests_in_flight",] == 1
    assert samples["edge_upstream_in_flight", simulator.url.removeprefix("http://")] == 1
    assert samples["edge_config_generation",] == 1
    assert samples["edge_config_last_reload_successful",] == 1
    assert samples["edge_client_connections",] >= 1
    assert "nobody-knows-this" not in body.decode()
    client.abort()
    await edge.consistent()
    assert (await edge.log())[-1]["end"] == "client_gone"


async def test_instances_have_one_sum_however_many_there_are(edge: Edge, simulator: Simulator) -> None:
    """A series each, for thousands, held the loop up at every scrape; the endpoints of pools have theirs."""
    await edge.ask({"model": "public/deepseek-r1"})
    await edge.ask({"model": "u-1100a15812cc/qwen2"})
    await edge.idle()
    leases = [edge.server.endpoints.instance(f"http://s{at}.o.svc:8000") for at in range(3000)]
    with contextlib.ExitStack() as running:
        for lease in leases[:5]:
            running.enter_context(lease)
        _, _, body = await admin(edge, "/metrics")
    found = {
        (sample.name, sample.labels["endpoint"]): sample.value
        for family in text_string_to_metric_families(body.decode())
        for sample in family.samples
        if "endpoint" in sample.labels and "pool" not in sample.labels
    }
    pooled = simulator.url.removeprefix("http://")
    assert found == {
        ("edge_upstream_in_flight", pooled): 0,
        ("edge_upstream_in_flight", "instances"): 5,
        ("edge_upstream_idle_connections", pooled): 1,
        ("edge_upstream_idle_connections", "instances"): 1,
        ("edge_upstream_out", pooled): 0,
        ("edge_upstream_out_for_some", pooled): 0,
        ("edge_upstream_ejections_total", pooled): 0,
    }


async def test_metrics_are_there_while_the_edge_drains(
    start_edge: StartEdge, simulator: Simulator, logged: asyncio.Event
) -> None:
    edge = await start_edge(ROUTES.replace("{upstream}", simulator.url), server='shutdown_delay = "1h"\n')
    edge.server.stop()
    while edge.server.readiness.ready:
        logged.clear()
        await logged.wait()
    status, _, body = await admin(edge, "/readyz?verbose")
    assert (status, body.splitlines()[0]) == (503, b"ready: no, draining")
    assert (await admin(edge, "/livez"))[0] == 200
    assert (await admin(edge, "/metrics"))[0] == 200
    await edge.stop()
