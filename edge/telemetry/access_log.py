"""The access log: one JSON line for each finished request.

A line is encoded on the loop, many at a time, and written by a thread. It holds no prompt, no key and no digest of one.
"""

import asyncio
import contextlib
import logging
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import lru_cache
from typing import Final

import msgspec
from prometheus_client.core import CounterMetricFamily, Metric

from edge.errors import NO_LIMIT
from edge.exchange import Choice, End, Exchange, Tried
from edge.tasks import in_steps
from edge.telemetry.line_writer import LineWriter

_log = logging.getLogger(__name__)

MAX_BACKLOG: Final = 50_000  # finished requests whose lines are not yet written
_BATCH: Final = 200  # lines encoded in one go: 200 take less than a millisecond of the loop
_FLUSH_INTERVAL_S: Final = 0.1
_time_of: Final = datetime.fromtimestamp  # looked up once: with its formatting it is a fifth of a line
_KEPT: Final = 4096  # parts of lines, of half a kilobyte each
_ENDED_BY: Final = dict.fromkeys(End, "edge") | {
    End.COMPLETE: "none",
    End.CLIENT_GONE: "client",
    End.UPSTREAM_CUT: "upstream",
    End.UPSTREAM_ERROR: "upstream",
}


class _Asked(msgspec.Struct, gc=False):
    """What was asked, by whom and of whom: one client sends many such requests."""

    client: str
    method: str
    host: str
    path: str
    key_id: str | None
    user: str | None
    model: str | None
    route: str | None
    endpoint: str | None


class _Failed(msgspec.Struct, gc=False):
    """The attempts, where one of them failed."""

    upstream_status: int | None = None
    upstream_error: str | None = None
    attempts: list[Tried] | None = None


class _Ended(msgspec.Struct, gc=False):
    """How it ended: mostly as most do."""

    stream: bool
    status: int
    end: str
    ended_by: str
    phase: str
    error: str | None
    limit: str | None


class LogLine(msgspec.Struct, gc=False):
    """The access log's line of a finished request.

    Three of its members are encoded already, and have those with them that stand behind: `client` those of `_Asked`,
    `upstream_status` those of `_Failed`, `stream` those of `_Ended`. What lines have in common is encoded once.
    """

    time: datetime
    level: str
    event: str
    request_id: str
    client: msgspec.Raw
    choice: Choice | None
    upstream_model: str | None
    upstream_id: str | None
    upstream_status: msgspec.Raw
    trace_id: str | None
    stream: msgspec.Raw
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
    """Return the line of a finished request; raises `ValueError` where a member of it is no text."""
    principal, end, usage = exchange.principal, exchange.end, exchange.usage
    begun, first_byte = exchange.begun, exchange.first_byte
    assert end is not None
    return LogLine(
        _time_of(exchange.started_at, UTC),
        "info",
        "request",
        exchange.request_id,
        _asked(
            exchange.client,
            exchange.method,
            exchange.host,
            exchange.path,
            principal.id if principal is not None else None,
            principal.user if principal is not None else None,
            exchange.model,
            exchange.route,
            exchange.endpoint,
        ),
        exchange.choice,
        exchange.upstream_model or None,
        exchange.upstream_id or None,
        _NO_FAILURE if exchange.failures is None else _failed(exchange),
        exchange.trace.trace_id if exchange.trace is not None else None,
        # `value`, and msgspec's own look-up of it, cost ten times as much as `_value_`
        _ended(exchange.stream, exchange.status, end._value_, exchange.phase._value_, exchange.error, exchange.limit),
        exchange.request_bytes,
        exchange.response_bytes,
        exchange.retries,
        exchange.replays,
        exchange.resumes,
        exchange.resume or None,
        exchange.hedge.outcome if exchange.hedge is not None else None,
        usage.prompt_tokens,
        usage.completion_tokens,
        usage.source._value_,
        _ms(exchange.queued_s) if exchange.queued_s else None,
        ((first_byte - begun) * 1e5 + 0.5) // 1 / 100 if first_byte else None,
        ((exchange.finished - begun) * 1e5 + 0.5) // 1 / 100,
    )


@lru_cache(maxsize=_KEPT)
def _asked(
    client: str, method: str, host: str, path: str, key_id: str | None, user: str | None, model: str, route: str,
    endpoint: str,
) -> msgspec.Raw:  # fmt: skip
    return _members(_Asked(client, method, host, path, key_id, user, model or None, route or None, endpoint or None))


@lru_cache(maxsize=_KEPT)
def _ended(stream: bool, status: int, end: str, phase: str, error: str, limit: tuple[str, str]) -> msgspec.Raw:
    which = ": ".join(limit) if limit is not NO_LIMIT else None
    return _members(_Ended(stream, status, end, _ENDED_BY[End(end)], phase, error or None, which))


def _failed(exchange: Exchange) -> msgspec.Raw:
    return _members(_Failed(exchange.upstream_status or None, exchange.upstream_error or None, _attempts(exchange)))


def _members(of: msgspec.Struct) -> msgspec.Raw:
    """Return the members of a struct as they stand in a line behind the name of the first one."""
    encoded = msgspec.json.encode(of)
    return msgspec.Raw(encoded[encoded.index(b":") + 1 : -1])


_NO_FAILURE: Final = _members(_Failed())


def _attempts(exchange: Exchange) -> list[Tried]:
    """Return every endpoint that was asked, where one of them failed."""
    failures, end = exchange.failures or [], exchange.end
    assert end is not None
    if exchange.has_failed_last:
        return failures
    took_ms = _ms(exchange.finished - exchange.asked_at)
    return [*failures, Tried(exchange.endpoint, exchange.status, end._value_, "", took_ms)]


def _ms(seconds: float) -> float:
    """Return milliseconds to two places; `round` takes four times as long, and `int` a sixth more."""
    return (seconds * 1e5 + 0.5) // 1 / 100


class AccessLog:
    """Writes a line for each finished request, a batch every 100 ms: encoded in one go, written by a thread.

    A reader that is stuck never stops a request: past `MAX_BACKLOG` lines are dropped and counted.
    """

    def __init__(self, descriptor: int) -> None:
        self._finished: list[Exchange] = []
        self._encoded: list[tuple[bytes, int]] = []  # lines, and how many; not yet the thread's
        self._encoder = msgspec.json.Encoder()
        self._writer = LineWriter(descriptor, "edge-log")
        self._dropped = 0

    @property
    def dropped(self) -> int:
        """The lines that were not written and never will be."""
        return self._dropped + self._writer.unread

    def write(self, exchange: Exchange) -> None:
        """Queue the line of a finished request, which changes no more."""
        if len(self._finished) < MAX_BACKLOG:
            self._finished.append(exchange)
        else:
            self._dropped += 1

    async def run(self) -> None:
        """Hand lines to the thread until cancelled; it gets no more while a reader is stuck."""
        while True:
            await asyncio.sleep(_FLUSH_INTERVAL_S)
            if self._finished and not self._writer.backlog:
                await in_steps(self._hand_over())

    async def flush(self) -> None:
        """Write what is queued, and return when it is written; cancelled, it loses nothing."""
        await in_steps(self._hand_over())
        await asyncio.shield(asyncio.wrap_future(self._writer.written()))

    def _hand_over(self) -> Iterator[None]:
        """Encode what is queued, a batch a step, and give it to the thread."""
        while self._finished:
            batch = self._finished[:_BATCH]
            del self._finished[:_BATCH]
            self._encoded.append(self._encode(batch))
            yield
        if self._encoded:  # all at once: each wakes the thread, which then wants the interpreter from the loop
            self._writer.put(b"".join([lines for lines, _ in self._encoded]), sum(count for _, count in self._encoded))
            self._encoded.clear()

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
