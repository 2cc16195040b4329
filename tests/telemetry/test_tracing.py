"""Spans as a collector gets them, of a running edge."""

import importlib.util
import logging
from typing import Any

import pytest

from edge.errors import Unusable
from edge.exchange import End, Tried
from edge.telemetry import tracing
from edge.telemetry.tracing import Tracing
from edge.traces import Trace
from tests.conftest import ROUTES, ScriptedConnection, StartEdge, StartUpstream
from tests.records import finished

HAS_SDK = importlib.util.find_spec("opentelemetry") and importlib.util.find_spec("opentelemetry.sdk")
needs_sdk = pytest.mark.skipif(not HAS_SDK, reason='pip install "edge[otel]"')
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
BODY = {"model": "public/deepseek-r1", "messages": []}


async def acknowledge(connection: ScriptedConnection) -> None:
    await connection.send(b"HTTP/1.1 200 OK\r\nContent-Type: application/x-protobuf\r\nContent-Length: 0\r\n\r\n")


async def busy(connection: ScriptedConnection) -> None:
    await connection.send(b"HTTP/1.1 503 Busy\r\nContent-Length: 4\r\n\r\nfull")


def spans(requests: list[bytes]) -> list[Any]:
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    read = (ExportTraceServiceRequest.FromString(each.partition(b"\r\n\r\n")[2]) for each in requests)
    return [
        span
        for each in read
        for resource in each.resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]


def attributes(of: Any) -> dict[str, Any]:
    return {each.key: each.value.string_value or each.value.int_value for each in of.attributes}


@needs_sdk
async def test_request_has_a_span_of_the_edge_and_in_it_one_of_the_endpoint(
    start_edge: StartEdge, start_upstream: StartUpstream
) -> None:
    collector, upstream = await start_upstream(acknowledge), await start_upstream(busy)
    server = f'traces = "{collector.url}/v1/traces"\ntrace_share = 1\n'
    edge = await start_edge(ROUTES.replace("{upstream}", upstream.url), server=server)
    await edge.ask(BODY, headers=(f"traceparent: 00-{TRACE}-{PARENT}-01", "X-Request-Id: mine"))
    await edge.ask(BODY, headers=(f"traceparent: 00-{TRACE}-{PARENT}-00",))  # which its caller does not keep
    await edge.idle()
    (line, _) = await edge.log()
    await edge.stop()
    own, model = spans(collector.requests)
    assert (own.trace_id.hex(), own.parent_span_id.hex()) == (TRACE, PARENT)
    assert (model.trace_id, model.parent_span_id) == (own.trace_id, own.span_id)
    assert model.span_id.hex() == line["upstream_id"].replace("-", "")[:16]
    assert f"traceparent: 00-{TRACE}-{model.span_id.hex()}-01".encode() in upstream.requests[0]
    assert own.start_time_unix_nano <= model.start_time_unix_nano <= model.end_time_unix_nano <= own.end_time_unix_nano
    assert (own.status.code, own.status.message) == (2, "upstream_unavailable"), "no word of the upstream's body"
    about = attributes(own)
    assert (about["edge.request_id"], about["edge.route"]) == ("mine", "public/deepseek-r1")
    assert (about["http.response.status_code"], about["error.type"]) == (503, "upstream_unavailable")
    assert [attributes(each)["error.type"] for each in own.events] == ["upstream_error"]
    at = upstream.url.removeprefix("http://").partition(":")
    assert (attributes(model)["server.address"], attributes(model)["server.port"]) == (at[0], int(at[2]))


@needs_sdk
async def test_trace_that_begins_here_goes_upstream_and_a_share_of_them_is_kept(
    start_edge: StartEdge, start_upstream: StartUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = iter(("a" * 16 + "0" * 16, "a" * 16 + "f" * 16))
    monkeypatch.setattr(tracing, "new_trace_id", lambda: next(ids, "b" * 32))
    collector, upstream = await start_upstream(acknowledge), await start_upstream(busy)
    server = f'traces = "{collector.url}/"\ntrace_share = 0.5\n'
    edge = await start_edge(ROUTES.replace("{upstream}", upstream.url), server=server)
    await edge.ask(BODY)
    monkeypatch.setattr(tracing, "new_trace_id", lambda: "a" * 16 + "f" * 16)
    await edge.ask(BODY)
    await edge.stop()
    assert {each.trace_id.hex() for each in spans(collector.requests)} == {"a" * 16 + "0" * 16}
    flags = [b"-01\r\n" in each.partition(b"traceparent: ")[2] for each in upstream.requests]
    assert flags == [True, False]


@needs_sdk
async def test_collector_that_is_down_holds_no_stop_up(start_edge: StartEdge, unused_tcp_port: int) -> None:
    server = f'traces = "http://127.0.0.1:{unused_tcp_port}/"\ntrace_share = 1\n'
    edge = await start_edge(ROUTES.replace("{upstream}", f"http://127.0.0.1:{unused_tcp_port}"), server=server)
    status, _, _ = await edge.ask(BODY)
    assert status == 503
    await edge.stop()


def test_without_the_packages_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(Unusable, match=r'pip install "edge\[otel\]"'):
        Tracing("http://127.0.0.1:4318/", 1)


def test_facts_of_a_request_that_asked_nobody_are_told_without_an_endpoint() -> None:
    about = tracing._attributes(finished(error="invalid_api_key", status=401, trace=Trace(TRACE, "", 1)))
    assert about["error.type"] == "invalid_api_key"
    assert "gen_ai.request.model" not in about


@pytest.mark.parametrize(
    ("endpoint", "address", "port"),
    [("10.0.0.1:8000", "10.0.0.1", 8000), ("vllm.internal", "vllm.internal", None), ("[::1]", "::1", None),
     ("[::1]:8000", "::1", 8000)],
)  # fmt: skip
def test_port_of_an_endpoint_is_told_where_it_has_one_of_its_own(endpoint: str, address: str, port: int | None) -> None:
    about = tracing._attributes_of_model(finished(endpoint=endpoint, asked_at=100.0))
    assert (about["server.address"], about.get("server.port")) == (address, port)


@needs_sdk
async def test_span_that_can_not_be_made_is_lost_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    kept = Tracing("http://127.0.0.1:9/", 1)
    kept.note(finished(asked_at=100.0, upstream_id="no hexadecimal digits", trace=Trace(TRACE, "", 1)))
    await kept.close()
    own = [each for each in caplog.records if each.name == "edge.telemetry.tracing"]
    assert [each.message for each in own] == ["no span of request req_1"]


def failed(duration_ms: float) -> Tried:
    return Tried("10.0.0.1:8000", 0, "no_answer", "", duration_ms)


@pytest.mark.parametrize(
    ("retries", "end", "at"), [(2, End.COMPLETE, (102.0, 105.0)), (1, End.UPSTREAM_ERROR, (105.0, 108.0))]
)
def test_attempts_that_failed_are_told_with_the_times_at_which_they_did(
    retries: int, end: End, at: tuple[float, float]
) -> None:
    exchange = finished(asked_at=105.0, retries=retries, end=end, failures=[failed(2000.0), failed(3000.0)])
    assert tuple(when for _, when in tracing._failed_at(exchange)) == at
