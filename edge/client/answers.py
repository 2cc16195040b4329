"""Answers of the edge's own, whole, and what every answer has."""

import functools
import time
from email.utils import formatdate
from http.client import responses
from typing import Final

from edge.errors import EdgeError
from edge.exchange import Exchange
from edge.protocols import OPENAI, Protocol

# On every answer: browsers call the API from any page, and may read these headers (https://fetch.spec.whatwg.org).
CORS: Final = (
    b"access-control-allow-origin: *\r\n"
    b"access-control-expose-headers: x-request-id, request-id, retry-after, retry-after-ms, x-should-retry, "
    b"preference-applied, "
    b"server-timing, proxy-status, "
    b"x-ratelimit-limit-requests, x-ratelimit-remaining-requests, x-ratelimit-reset-requests, "
    b"x-ratelimit-limit-tokens, x-ratelimit-remaining-tokens, x-ratelimit-reset-tokens\r\n"
)

_date_second = 0
_date = b""


def date_header() -> bytes:
    """Return the Date header of this second (RFC 9110 section 6.6.1)."""
    global _date_second, _date
    now = int(time.time())
    if now != _date_second:
        _date_second, _date = now, f"date: {formatdate(now, usegmt=True)}\r\n".encode()
    return _date


def response(
    status: int,
    body: bytes,
    *,
    request_id: str,
    last: bool,
    content_type: str = "application/json",
    headers: tuple[tuple[str, str], ...] = (),
    with_body: bool = True,
    protocol: Protocol = OPENAI,
    more_bytes: int = 0,
    timing: bytes = b"",
) -> bytes:
    """Return a whole response, but for `more_bytes` of its body that follow; `with_body` False answers a HEAD."""
    head = _constant_head(status, len(body) + more_bytes, last, content_type, headers)
    name = protocol.id_lines(request_id)
    return b"".join((head, name, timing, date_header(), CORS, b"\r\n", body if with_body else b""))


@functools.lru_cache(maxsize=256)
def _constant_head(
    status: int, length: int, last: bool, content_type: str, headers: tuple[tuple[str, str], ...]
) -> bytes:
    """Return what equal answers begin with: who tries one bad key all day must not cost more than who is served."""
    lines = [f"HTTP/1.1 {status} {responses.get(status, '')}"]
    if status != 204:
        lines += [f"content-type: {content_type}", f"content-length: {length}"]
    if last:
        lines.append("connection: close")
    lines += [f"{name.lower()}: {value}" for name, value in headers]
    return ("\r\n".join(lines) + "\r\n").encode()


def server_timing(exchange: Exchange, now: float) -> bytes:
    """Return the line that says what took the time of an answer that begins `now`: the edge, its queue, an upstream.

    In milliseconds (https://www.w3.org/TR/server-timing/). What failed attempts took is the upstreams', of two side by
    side the time of both at once.
    """
    upstream_s, queued_s = now - exchange.asked_at, exchange.queued_s
    if exchange.hedge is not None and exchange.hedge.asked_at:
        upstream_s = now - exchange.hedge.asked_at
    elif exchange.retries:
        upstream_s += sum([each.duration_ms for each in (exchange.failures or ())[: exchange.retries]]) / 1000
    own_ms, upstream_ms = (now - exchange.begun - upstream_s - queued_s) * 1000, upstream_s * 1000
    if queued_s:
        return b"server-timing: edge;dur=%.1f, queue;dur=%.1f, upstream;dur=%.1f\r\n" % (
            own_ms, queued_s * 1000, upstream_ms,
        )  # fmt: skip
    return b"server-timing: edge;dur=%.1f, upstream;dur=%.1f\r\n" % (own_ms, upstream_ms)


def _proxy_status(error: EdgeError) -> str:
    """Return what a proxy says of an answer that is an error: what an upstream answered, or why it answered nothing.

    Source: RFC 9209.
    """
    if error.received_status:
        return f"edge; received-status={error.received_status}"
    return f"edge; error={error.proxy_error}"


def error_response(
    error: EdgeError,
    *,
    request_id: str,
    last: bool,
    with_body: bool = True,
    protocol: Protocol = OPENAI,
    timing: bytes = b"",
) -> bytes:
    """Return an error as a whole response: the one place where a failure becomes HTTP."""
    headers = (*error.headers, ("proxy-status", _proxy_status(error)))
    if error.retry_after_s is not None:
        headers += (("retry-after", str(error.retry_after_s)), ("retry-after-ms", str(error.retry_after_s * 1000)))
    if error.should_retry is not None:
        headers += (("x-should-retry", "true" if error.should_retry else "false"),)
    return response(
        error.status,
        protocol.error_body(error, request_id),
        request_id=request_id,
        last=last,
        headers=headers,
        with_body=with_body,
        protocol=protocol,
        timing=timing,
    )
