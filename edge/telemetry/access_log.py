"""The access log: one JSON line for each finished request.

A line is encoded on the loop, many at a time, and written by a thread. It holds no prompt, no key and no digest of one.
"""

import asyncio
import contextlib
import logging
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Final

import msgspec
from prometheus_client.core import CounterMetricFamily, Metric

from edge.errors import NO_LIMIT
from edge.exchange import Choice, End, Exchange, Tried
from edge.telemetry.line_writer import LineWriter

_log = logging.getLogger(__name__)

MAX_BACKLOG: Final = 50_000  # finished requests whose lines are not yet written
_BATCH: Final = 200  # lines encoded in one go: 200 take less than a millisecond of the loop
_FLUSH_INTERVAL_S: Final = 0.1
_ENDED_BY: Final = dict.fromkeys(End, "edge") | {
    End.COMPLETE: "none",
    End.CLIENT_GONE: "client",
    End.UPSTREAM_CUT: "upstream",
    End.UPSTREAM_ERROR: "upstream",
}


class LogLine(msgspec.Struct, gc=False):
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
    choice: Choice | None
    upstream_model: str | None
    upstream_id: str | None
    upstream_status: int | None
    upstream_error: str | None
    attempts: list[Tried] | None
    trace_id: str | None
    stream: bool
    status: int
    end: str
    ended_by: str
    phase: str
    error: str | None
    limit: str | None
    request_bytes: int
    response_bytes: int
    retries: int
    replays: int
    resumes: int
    resume: str | None
    hedge: str | None
    prompt_tokens: int
    completion_tokens: int
    usage_source: str
    queue_ms: float | None
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
        exchange.choice,
        exchange.upstream_model or None,
        exchange.upstream_id or None,
        exchange.upstream_status or None,
        exchange.upstream_error or None,
        _attempts(exchange) if exchange.failures is not None else None,
        exchange.trace.trace_id if exchange.trace is not None else None,
        exchange.stream,
        exchange.status,
        end._value_,  # `value`, and msgspec's own look-up of it, cost ten times as much
        _ENDED_BY[end],
        exchange.phase._value_,
        exchange.error or None,
        ": ".join(exchange.limit) if exchange.limit is not NO_LIMIT else None,
        exchange.request_bytes,
        exchange.response_bytes,
        exchange.retries,
        exchange.replays,
        exchange.resumes,
        exchange.resume or None,
        exchange.hedge.outcome if exchange.hedge is not None else None,
        exchange.usage.prompt_tokens,
        exchange.usage.completion_tokens,
        exchange.usage.source._value_,
        _ms(exchange.queued_s) if exchange.queued_s else None,
        _ms(exchange.first_byte - begun) if exchange.first_byte else None,
        _ms(exchange.finished - begun),
    )


def _attempts(exchange: Exchange) -> list[Tried]:
    """Return every endpoint that was asked, where one of them failed."""
    failures, end = exchange.failures or [], exchange.end
    assert end is not None
    if exchange.has_failed_last:
        return failures
    took_ms = _ms(exchange.finished - exchange.asked_at)
    return [*failures, Tried(exchange.endpoint, exchange.status, end._value_, "", took_ms)]


def _ms(seconds: float) -> float:
    """Return milliseconds to two places; `round` takes four times as long."""
    return int(seconds * 1e5 + 0.5) / 100


class AccessLog:
    """Writes a line for each finished request, a batch every 100 ms: encoded in one go, written by a thread.

    A reader that is stuck never stops a request: past `MAX_BACKLOG` lines are dropped and counted.
    """

    def __init__(self, descriptor: int) -> None:
        self._finished: list[Exchange] = []
        self._encoder = msgspec.json.Encoder()
        self._writer = LineWriter(descriptor, "edge-log")
        self._queued = asyncio.Event()
        self._flushing = asyncio.Lock()
        self._dropped = 0

    @property
    def dropped(self) -> int:
        """The lines that were not written and never will be."""
        return self._dropped + self._writer.unread

    def write(self, exchange: Exchange) -> None:
        """Queue the line of a finished request, which changes no more."""
        if not self._finished:
            self._queued.set()
        if len(self._finished) < MAX_BACKLOG:
            self._finished.append(exchange)
        else:
            self._dropped += 1

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
                self._writer.put(b"".join(parts), lines)
            await asyncio.shield(asyncio.wrap_future(self._writer.written()))

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
                    self._dropped += 1
            return b"".join(lines), len(lines)

    async def close(self, patience_s: float = 2.0) -> None:
        """Write the rest, waiting `patience_s` for a reader that is stuck."""
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(patience_s):
                    await self.flush()
        finally:  # who is cancelled has as little time left
            self._writer.close()
            if lost := self._writer.backlog:
                self._dropped += lost
                _log.error("access log: its reader is stuck, %d lines are lost", lost)

    def metrics(self) -> Iterator[Metric]:
        """Yield what was lost."""
        yield CounterMetricFamily(
            "edge_access_log_dropped", "Log lines dropped for a stuck reader.", value=self.dropped
        )
