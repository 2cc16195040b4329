"""Spans of requests, sent to a collector by OTLP over HTTP. Needs the extra `otel`.

A request that is kept has two: what the edge did, and in it what the last endpoint did, with the id that its
`traceparent` had; endpoints that failed before are events. They are made at a request's end, of facts that it has
anyhow, and a thread of the SDK's sends them, many at once: a collector that is down or slow costs lost spans only.
Names of attributes: https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-spans/.
"""

import asyncio
import logging
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from importlib.metadata import version
from typing import Any, Final
from urllib.parse import urlsplit

from edge.errors import Unusable
from edge.exchange import End, Exchange, Tried
from edge.ids import new_trace_id
from edge.traces import Trace, span_id

_log = logging.getLogger(__name__)

_SPAN: Final = 16  # hexadecimal digits of the id of one
_ALL: Final = 2**64
_FAILED: Final = (End.UPSTREAM_CUT, End.UPSTREAM_ERROR, End.FIRST_BYTE_TIMEOUT, End.IDLE_TIMEOUT, End.INTERNAL_ERROR)


class Tracing:
    """Keeps a share of the traces, chosen by their ids, so that every part of a platform keeps the same ones.

    A trace that its caller does not keep is not kept here. Raises `Unusable` without the packages.
    """

    def __init__(self, url: str, share: float) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError:
            raise Unusable('server.traces: needs the packages: pip install "edge[otel]"') from None
        logging.getLogger("opentelemetry").setLevel(logging.ERROR)  # else a warning for each try of a collector down
        self._below = round(share * _ALL)
        self._resource = Resource.create({"service.name": "edge", "service.version": version("edge")})
        self._processor: Any = BatchSpanProcessor(OTLPSpanExporter(endpoint=url))

    def begin(self, given: Trace | None) -> Trace:
        """Return the trace of a request: the caller's, or one that begins here."""
        if given is not None:
            return given
        trace_id = new_trace_id()
        return Trace(trace_id, "", int(self._keeps(trace_id)))

    def _keeps(self, trace_id: str) -> bool:
        return int(trace_id[_SPAN:], 16) < self._below

    def note(self, exchange: Exchange) -> None:
        """Note a finished request, if its trace is kept; its spans are sent later.

        It never raises, since a request is closed with it: a span that can not be made is lost.
        """
        trace = exchange.trace
        if trace is not None and trace.is_sampled and self._keeps(trace.trace_id):
            try:
                for span in self._spans(exchange, trace):
                    self._processor.on_end(span)
            except Exception:
                _log.exception("no span of request %s", exchange.request_id)

    def _spans(self, exchange: Exchange, trace: Trace) -> Iterator[Any]:
        from opentelemetry.sdk.trace import Event, ReadableSpan
        from opentelemetry.trace import SpanContext, SpanKind, TraceFlags
        from opentelemetry.trace.status import Status, StatusCode

        def context(span: str) -> SpanContext:
            return SpanContext(int(trace.trace_id, 16), int(span, 16), is_remote=False, trace_flags=TraceFlags(1))

        def unix_ns(monotonic_s: float) -> int:
            return int((exchange.started_at + monotonic_s - exchange.begun) * 1e9)

        failed = exchange.end in _FAILED
        # Never what an upstream said: its words may quote a prompt.
        status = Status(StatusCode.ERROR, exchange.error) if failed else Status()
        own = context(new_trace_id()[:_SPAN])
        asked = unix_ns(exchange.asked_at) if exchange.asked_at else unix_ns(exchange.finished)
        events = [
            Event("attempt failed", {"server.address": each.endpoint, "error.type": each.outcome}, unix_ns(at))
            for each, at in _failed_at(exchange)
        ]
        yield ReadableSpan(
            f"{exchange.method} {exchange.operation.name or exchange.path}",
            own,
            context(trace.parent_id) if trace.parent_id else None,
            self._resource,
            _attributes(exchange),
            events,
            kind=SpanKind.SERVER,
            status=status,
            start_time=unix_ns(exchange.begun),
            end_time=unix_ns(exchange.finished),
        )
        if exchange.asked_at:
            yield ReadableSpan(
                f"{exchange.operation.name} {exchange.upstream_model}",
                context(span_id(exchange.upstream_id)),
                own,
                self._resource,
                _attributes_of_model(exchange),
                kind=SpanKind.CLIENT,
                status=status,
                start_time=asked,
                end_time=unix_ns(exchange.finished),
            )

    async def close(self) -> None:
        """Send what waits; a collector that does not take it is left behind, with the thread that tries."""
        sent: Future[None] = Future()
        sent.set_running_or_notify_cancel()

        def shut_down() -> None:
            try:
                self._processor.shutdown()
            finally:
                sent.set_result(None)

        threading.Thread(target=shut_down, name="last spans", daemon=True).start()
        await asyncio.wrap_future(sent)


def _failed_at(exchange: Exchange) -> list[tuple[Tried, float]]:
    """Return the attempts that failed, each with when it did: the next one began then, or none followed."""
    failures, at = exchange.failures or [], exchange.asked_at
    if exchange.has_failed_last:
        at += failures[-1].duration_ms / 1000
    found = []
    for each in reversed(failures):
        if each.outcome in ("outrun", "displaced"):  # it ran beside another one, and ended as that began or before
            found.append((each, exchange.first_byte or at))
            continue
        found.append((each, at))
        at -= each.duration_ms / 1000
    return found[::-1]


def _attributes(exchange: Exchange) -> dict[str, str | int]:
    """Return what is said of a request: nothing of whose it is but the request's id, by which the log has it."""
    return {
        "http.request.method": exchange.method,
        "http.response.status_code": exchange.status,
        "url.path": exchange.path,
        "edge.request_id": exchange.request_id,
        "edge.route": exchange.route,
        "edge.end": exchange.end.value if exchange.end is not None else "",
        **({"error.type": exchange.error} if exchange.error else {}),
    }


def _attributes_of_model(exchange: Exchange) -> dict[str, str | int | float]:
    at = urlsplit(f"//{exchange.endpoint}")
    port = {} if at.port is None else {"server.port": at.port}  # else it is that of the scheme
    first_s = exchange.first_byte - exchange.asked_at  # under 0 of a stream that another endpoint began
    ttft_s = {"gen_ai.response.time_to_first_chunk": first_s} if first_s > 0 else {}
    return {
        "gen_ai.operation.name": "chat" if "chat" in exchange.operation.name else exchange.operation.name,
        "gen_ai.request.model": exchange.upstream_model,
        "gen_ai.usage.input_tokens": exchange.usage.prompt_tokens,
        "gen_ai.usage.output_tokens": exchange.usage.completion_tokens,
        "server.address": at.hostname or "",
        "edge.pool": exchange.pool,
        **port,
        **ttft_s,
    }
