"""What finished requests leave for people: counters for Prometheus, and one JSON line each.

Both are cheap where requests pass (a few additions, one `dumps`); what is dear is done per scrape, in steps, and per
batch of lines, in a thread. A line holds no prompt, no key and no digest of one.
"""

import asyncio
import bisect
import contextlib
import logging
import os
import queue
import select
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final

import msgspec
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from edge.exchange import NO_USAGE, End, Exchange, Phase, UsageSource

_log = logging.getLogger(__name__)

# LLM answers take from tens of milliseconds to ten minutes (the usual SDK's read timeout).
_DURATION_BOUNDS_S: Final = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 600.0)
_FIRST_BYTE_BOUNDS_S: Final = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
MAX_BACKLOG: Final = 50_000  # finished requests whose lines are not yet written
_BATCH: Final = 200  # lines encoded in one go: 200 take less than a millisecond of the loop
_FLUSH_INTERVAL_S: Final = 0.1

_ENDED_BY: Final = {
    End.COMPLETE: "none",
    End.REFUSED: "edge",
    End.CLIENT_GONE: "client",
    End.SLOW_CLIENT: "edge",
    End.UPSTREAM_CUT: "upstream",
    End.UPSTREAM_ERROR: "upstream",
    End.FIRST_BYTE_TIMEOUT: "edge",
    End.IDLE_TIMEOUT: "edge",
    End.DRAINED: "edge",
    End.INTERNAL_ERROR: "edge",
}


@dataclass(slots=True)
class Histogram:
    """Counts by upper bound, in seconds."""

    bounds: tuple[float, ...]
    counts: list[int] = field(init=False)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def observe(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.total += value

    def buckets(self) -> list[tuple[str, float]]:
        """Return cumulative counts, as the exposition format wants them."""
        result, running = [], 0
        for bound, count in zip((*map(str, self.bounds), "+Inf"), self.counts, strict=True):
            running += count
            result.append((bound, float(running)))
        return result


@dataclass(slots=True)
class _RouteNumbers:
    requests: dict[tuple[int, End], int] = field(default_factory=dict)
    duration: Histogram = field(default_factory=lambda: Histogram(_DURATION_BOUNDS_S))
    first_byte: Histogram = field(default_factory=lambda: Histogram(_FIRST_BYTE_BOUNDS_S))
    request_bytes: int = 0
    response_bytes: int = 0
    retries: int = 0
    replays: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Metrics:
    """The numbers of finished requests by route; gauges are asked for at the scrape.

    What matched no route has the empty label, never the name that was asked: anybody can make those up.
    """

    def __init__(self) -> None:
        self._routes: dict[str, _RouteNumbers] = {}
        self.gauges: list[Callable[[], Iterable[Metric]]] = []

    def observe(self, exchange: Exchange) -> None:
        """Count one finished request."""
        numbers = self._routes.get(exchange.route)
        if numbers is None:
            numbers = self._routes[exchange.route] = _RouteNumbers()
        assert exchange.end is not None
        outcome = (exchange.status, exchange.end)
        numbers.requests[outcome] = numbers.requests.get(outcome, 0) + 1
        numbers.duration.observe(exchange.finished - exchange.begun)
        if exchange.first_byte:
            numbers.first_byte.observe(exchange.first_byte - exchange.begun)
        numbers.request_bytes += exchange.request_bytes
        numbers.response_bytes += exchange.response_bytes
        numbers.retries += exchange.retries
        numbers.replays += exchange.replays
        usage = exchange.usage
        if usage is not NO_USAGE:
            numbers.prompt_tokens += usage.prompt_tokens
            numbers.completion_tokens += usage.completion_tokens

    def families(self) -> Iterator[Metric]:
        """Yield every metric."""
        requests = CounterMetricFamily("edge_requests", "Finished requests.", labels=("route", "status", "end"))
        duration = HistogramMetricFamily("edge_request_duration_seconds", "From head to end.", labels=("route",))
        first_byte = HistogramMetricFamily(
            "edge_time_to_first_byte_seconds", "From a request's head to the first byte of the answer's body.",
            labels=("route",),
        )  # fmt: skip
        sums = {
            name: CounterMetricFamily(f"edge_{name}", text, labels=("route",))
            for name, text in (
                ("request_bytes", "Bytes of request bodies."),
                ("response_bytes", "Bytes of answers, framing included."),
                ("retries", "Requests that were sent to another endpoint."),
                ("prompt_tokens", "Tokens of prompts, as recorded."),
                ("completion_tokens", "Tokens of answers, as recorded."),
                ("replays", "Requests sent again because a reused connection had been closed."),
            )
        }
        for route, numbers in self._routes.items():
            for (status, end), count in numbers.requests.items():
                requests.add_metric((route, str(status), end.value), count)
            duration.add_metric((route,), numbers.duration.buckets(), numbers.duration.total)
            first_byte.add_metric((route,), numbers.first_byte.buckets(), numbers.first_byte.total)
            for name, family in sums.items():
                family.add_metric((route,), getattr(numbers, name))
        yield from (requests, duration, first_byte, *sums.values())
        for gauges in self.gauges:
            yield from gauges()

    async def render(self) -> bytes:
        """Return the exposition; yields to the loop between two families, since rendering takes milliseconds."""
        parts = []
        for family in self.families():
            registry = CollectorRegistry()
            registry.register(_One(family))
            parts.append(generate_latest(registry))
            await asyncio.sleep(0)
        return b"".join(parts)


class _One:
    """A collector of one finished family."""

    def __init__(self, family: Metric) -> None:
        self._family = family

    def collect(self) -> Iterator[Metric]:
        """Yield it."""
        yield self._family


def gauge(name: str, text: str, value: float) -> Metric:
    """Return a gauge without labels."""
    return GaugeMetricFamily(name, text, value=value)


def counter(name: str, text: str, value: float) -> Metric:
    """Return a counter without labels."""
    return CounterMetricFamily(name, text, value=value)


class LogLine(msgspec.Struct):
    """The access log's line of a finished request."""

    time: datetime
    level: str
    event: str
    request_id: str
    client: str
    method: str
    host: str
    path: str
    key_id: str | None
    user: str | None
    model: str | None
    route: str | None
    endpoint: str | None
    upstream_model: str | None
    stream: bool
    status: int
    end: End
    ended_by: str
    phase: Phase
    error: str | None
    request_bytes: int
    response_bytes: int
    retries: int
    replays: int
    prompt_tokens: int
    completion_tokens: int
    usage_source: UsageSource
    ttft_ms: float | None
    duration_ms: float


def log_line(exchange: Exchange) -> LogLine:
    """Return the line of a finished request."""
    principal, end, begun = exchange.principal, exchange.end, exchange.begun
    assert end is not None
    return LogLine(
        datetime.fromtimestamp(exchange.started_at, UTC),
        "info",
        "request",
        exchange.request_id,
        exchange.client,
        exchange.method,
        exchange.host,
        exchange.path,
        principal.id if principal is not None else None,
        principal.user if principal is not None else None,
        exchange.model or None,
        exchange.route or None,
        exchange.endpoint or None,
        exchange.upstream_model or None,
        exchange.stream,
        exchange.status,
        end,
        _ENDED_BY[end],
        exchange.phase,
        exchange.error or None,
        exchange.request_bytes,
        exchange.response_bytes,
        exchange.retries,
        exchange.replays,
        exchange.usage.prompt_tokens,
        exchange.usage.completion_tokens,
        exchange.usage.source,
        _ms(exchange.first_byte - begun) if exchange.first_byte else None,
        _ms(exchange.finished - begun),
    )


def _ms(seconds: float) -> float:
    """Return milliseconds to two places; `round` takes four times as long."""
    return int(seconds * 1e5 + 0.5) / 100


class AccessLog:
    """Writes a line for each finished request, a batch every 100 ms: encoded in one go, written by a thread.

    A reader that is stuck never stops a request: past `MAX_BACKLOG` lines are dropped and counted.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._finished: list[Exchange] = []
        self._encoder = msgspec.json.Encoder()
        self._batches: queue.SimpleQueue[tuple[bytes, int, Future[None]] | None] = queue.SimpleQueue()
        self._queued = asyncio.Event()
        self._unwritten = 0
        self._flushing = asyncio.Lock()
        self.dropped = 0
        # A daemon, so that a stuck reader does not keep the process from ending.
        self._thread = threading.Thread(target=self._write_batches, name="edge-log", daemon=True)
        self._thread.start()

    def write(self, exchange: Exchange) -> None:
        """Queue the line of a finished request, which changes no more."""
        if not self._finished:
            self._queued.set()
        if len(self._finished) < MAX_BACKLOG:
            self._finished.append(exchange)
        else:
            self.dropped += 1

    async def run(self) -> None:
        """Flush until cancelled."""
        if self._finished:  # left by a defect that ended it; `write` wakes it for the first one only
            self._queued.set()
        while True:
            await self._queued.wait()
            await asyncio.sleep(_FLUSH_INTERVAL_S)
            self._queued.clear()
            await self.flush()

    async def flush(self) -> None:
        """Write what is queued, and return when it is written; cancelled, it loses nothing."""
        async with self._flushing:
            if self._finished:
                await self._flush()

    async def _flush(self) -> None:
        lines, parts = 0, []
        try:
            while self._finished:
                batch = self._finished[:_BATCH]
                del self._finished[:_BATCH]
                encoded, count = self._encode(batch)
                parts.append(encoded)
                lines += count
                await asyncio.sleep(0)
        finally:
            # One hand-over for all: each wakes the thread, which then wants the interpreter from the loop.
            written: Future[None] = Future()
            self._unwritten += lines
            self._batches.put((b"".join(parts), lines, written))
        await asyncio.shield(asyncio.wrap_future(written))

    def _encode(self, batch: list[Exchange]) -> tuple[bytes, int]:
        """Return lines and their count; one that cannot be a line costs no other its place."""
        try:
            return self._encoder.encode_lines(map(log_line, batch)), len(batch)
        except ValueError:  # a lone surrogate, which is no text
            lines = []
            for exchange in batch:
                try:
                    lines.append(self._encoder.encode(log_line(exchange)) + b"\n")
                except ValueError:
                    self.dropped += 1
            return b"".join(lines), len(lines)

    async def close(self, patience_s: float = 1.0) -> None:
        """Write the rest, waiting `patience_s` for a reader that is stuck."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                await self.flush()
        self._batches.put(None)
        await asyncio.to_thread(self._thread.join, patience_s)
        if self._unwritten:
            self.dropped += self._unwritten
            _log.error("access log: its reader is stuck, %d lines are lost", self._unwritten)

    def _write_batches(self) -> None:
        while (batch := self._batches.get()) is not None:
            data, lines, written = batch
            if not write_all(self._descriptor, data):
                self.dropped += lines
            self._unwritten -= lines
            written.set_result(None)


def write_all(descriptor: int, data: bytes) -> bool:
    """Write all of `data`; return False when nobody reads any more."""
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(descriptor, view) :]
        except BlockingIOError:  # a descriptor that whoever started us made non-blocking
            select.select([], [descriptor], [])
        except OSError:
            return False
    return True


__all__ = ["AccessLog", "Histogram", "LogLine", "Metrics", "counter", "gauge", "log_line", "write_all"]
