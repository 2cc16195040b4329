"""One request through its life. READ THIS FIRST.

    credential -> body -> route -> admission -> lease -> send -> relay,
    and a closing step that always runs and never waits

`Proxy.handle` is the only place that knows this order; the phases do not know each other. A phase that cannot go on
raises an `EdgeError`, which becomes HTTP in one place, `_refuse`. Once the client has a byte of the answer, only the
relay speaks to it.
"""

import asyncio
import ipaddress
import itertools
import logging
import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, Self
from urllib.parse import unquote_to_bytes

import orjson
from aiohttp import HttpVersion10, HttpVersion11, hdrs
from multidict import istr

from edge.client.connection import (
    Body,
    BodyMemory,
    Request,
    error_response,
    read_body,
    response,
)
from edge.config.settings import Config, RouteConfig, ServerConfig
from edge.envelope.json import (
    LONG_BODY_BYTES,
    Envelope,
    conversation_start,
    read_json,
    read_long_json,
    read_multipart,
    rewrite_json,
    rewrite_multipart,
)
from edge.errors import (
    EdgeError,
    InternalError,
    InvalidRequest,
    JournalUnavailable,
    MethodNotAllowed,
    MisdirectedRequest,
    ModelNotFound,
    Origin,
    Overloaded,
    PathNotFound,
    UnsupportedCoding,
    UnsupportedMediaType,
    UnsupportedVersion,
    UpstreamError,
    UpstreamUnavailable,
    from_upstream,
)
from edge.exchange import End, Exchange, Phase, Principal
from edge.journal.journal import Journal, JournalFull
from edge.keys.authenticator import Authenticator, Caller, credential_of
from edge.limits.admission import UNLIMITED, Admission, Permit
from edge.metering.meters import Metering
from edge.names import is_model_name
from edge.relay.relay import FailedInStream, Limits, UpstreamAnsweredError, relay
from edge.routing import HostTable, Match, RouteTable, host_name, is_loopback
from edge.telemetry.metrics import AccessLog, Metrics
from edge.upstream.health import Verdict, judge
from edge.upstream.pools import Endpoint, Endpoints, Lease, Member, Pool

_log = logging.getLogger(__name__)

JSON_OPERATIONS: Final = (
    "chat/completions", "completions", "embeddings", "responses", "messages", "rerank", "score", "tokenize",
    "detokenize", "images/generations", "audio/speech",
)  # fmt: skip
MULTIPART_OPERATIONS: Final = ("audio/transcriptions", "audio/translations", "images/edits")
# Exactly these raw paths, each with and without /v1: the platform's page promised both, and a redirect would turn POST
# into GET in most clients.
_OPERATIONS: Final = {
    f"{prefix}/{name}": name for name in (*JSON_OPERATIONS, *MULTIPART_OPERATIONS) for prefix in ("", "/v1")
}
_MODELS: Final = ("/v1/models", "/models")
# What goes upstream of the client's headers; never a credential, a cookie or a header that steers an engine.
# `istr`: a name that is folded once, not at every look-up.
_FORWARDED: Final = tuple(
    map(istr, ("Accept", "traceparent", "tracestate", "anthropic-version", "anthropic-beta", "openai-beta"))
)
_X_REQUEST_ID: Final = istr("X-Request-Id")
_ID_PREFIX: Final = f"req_{secrets.token_hex(8)}"  # of this process
_serial = itertools.count()
_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,128}")
_USAGE_OPTIONS: Final = ("chat/completions", "completions")  # their streams tell usage when they are asked to
_GENERATING: Final = (*_USAGE_OPTIONS, "responses", "messages")
# Reserved for an answer whose length the request leaves open. It bounds nothing: what is used beyond it is charged.
_ASSUMED_ANSWER_TOKENS: Final = 256
_PREFLIGHT: Final = (
    ("Access-Control-Allow-Methods", "GET, HEAD, POST, OPTIONS"),
    ("Access-Control-Allow-Headers", "*, Authorization"),
    ("Access-Control-Max-Age", "86400"),
)
_RETRIED: Final = (429, 502, 503, 504)  # by another endpoint: the one that answered did no work
_VERDICTS: Final = {
    End.COMPLETE: Verdict.FINE,
    End.UPSTREAM_CUT: Verdict.FAULT,
    End.IDLE_TIMEOUT: Verdict.FAULT,
}  # what an answer that began shows of its endpoint; other ends are no word on it
# An engine that was left before it said a word has read the prompt: a limit keeps that, else who leaves early has none.
_UNHEARD: Final = (End.CLIENT_GONE, End.FIRST_BYTE_TIMEOUT)
_INSTANCE_LIMITS_S: Final = (2.0, 300.0, 120.0)  # connect, first byte, idle: a pool's defaults


@dataclass(frozen=True, slots=True)
class Generation:
    """Everything built from one configuration; a request keeps the one it began with."""

    number: int
    config: Config
    routes: RouteTable
    pools: Mapping[str, Pool]
    loaded_at: float
    limits: dict[str | None, Limits] = field(init=False)

    def __post_init__(self) -> None:
        floor = self.config.server.min_client_rate_bytes_per_s
        limits: dict[str | None, Limits] = {None: Limits(*_INSTANCE_LIMITS_S, floor)}
        for name, pool in self.pools.items():
            times = pool.config
            limits[name] = Limits(times.connect_timeout_s, times.first_byte_timeout_s, times.idle_timeout_s, floor)
        object.__setattr__(self, "limits", limits)


class Proxy:
    """Answers requests."""

    def __init__(
        self,
        generation: Generation,
        authenticator: Authenticator,
        admission: Admission,
        endpoints: Endpoints,
        journal: Journal,
        memory: BodyMemory,
        metrics: Metrics,
        access_log: AccessLog,
    ) -> None:
        self.generation = generation
        self.draining = False  # each answer that begins is the last of its connection, and says so
        self.closing = False  # and no connection stays, whatever its last answer said
        self.cutting = False  # the drain is over: who is cut now did not leave by itself
        self.in_flight = 0
        self._idle = asyncio.Event()
        self._long_body = asyncio.Lock()  # one is read at a time: ten at once would be ten steps in one go
        self._authenticator = authenticator
        self._admission = admission
        self._endpoints = endpoints
        self.journal = journal
        self._memory = memory
        self._metrics = metrics
        self._access_log = access_log

    async def handle(self, request: Request) -> bool:
        """Answer one request; return whether another may follow on the connection."""
        message = request.message
        exchange = Exchange(request_id_of(request), message.method, time.time(), time.monotonic())
        # A tunnel is never opened, so what would go through it must not be taken for requests (RFC 9110 section 7.8).
        tunnel = message.upgrade or message.method == "CONNECT"
        keep_alive = not (message.should_close or tunnel or self.draining or message.version != HttpVersion11)
        self.in_flight += 1
        try:
            keep_alive = await self._answer(request, exchange, self.generation, keep_alive)
        except EdgeError as error:
            keep_alive = _refuse(request, exchange, error, keep_alive and not self.draining)
        except asyncio.CancelledError:
            exchange.end = exchange.end or self.who_left()
            raise
        except Exception:  # a defect: the caller gets a clean 500, the log the place
            _log.exception("request %s failed", exchange.request_id)
            defect = InternalError("The edge failed to handle this request.")
            keep_alive = _refuse(request, exchange, defect, keep_alive and not self.draining)
        finally:
            self._close(exchange)
        return keep_alive and not self.closing

    def who_left(self) -> End:
        """Return why a request is cancelled: its client left, unless the drain is over and cuts it."""
        return End.DRAINED if self.cutting else End.CLIENT_GONE

    async def wait_idle(self) -> None:
        """Wait until no request is being answered."""
        while self.in_flight:
            self._idle.clear()
            await self._idle.wait()

    def _close(self, exchange: Exchange) -> None:
        """Settle a request, however it ended; never waits, so cancellation cannot tear it."""
        self.in_flight -= 1
        if not self.in_flight:
            self._idle.set()
        exchange.finished = time.monotonic()
        exchange.end = exchange.end or End.INTERNAL_ERROR
        if exchange.end is End.COMPLETE:
            exchange.phase = Phase.DONE
        self._metrics.observe(exchange)
        self._access_log.write(exchange)

    async def _answer(self, request: Request, exchange: Exchange, generation: Generation, keep_alive: bool) -> bool:
        server = generation.config.server
        path, host = _target(request, exchange, server)
        operation = _OPERATIONS.get(path)
        method = exchange.method
        if operation is None or method != "POST":
            if method == "OPTIONS":
                return _send(request, exchange, 204, b"", keep_alive, _PREFLIGHT)
            if operation is not None or (path not in _MODELS and not path.startswith(("/v1/models/", "/models/"))):
                raise _wrong_path(request, path, host, operation is not None)
            if method not in ("GET", "HEAD"):
                raise _wrong_path(request, path, host, True)
        connection = request.connection
        credential = connection.credential = credential_of(request.headers, connection.credential)
        caller = self._authenticator.recall(credential) or await self._authenticator.look_up(credential)
        exchange.principal = caller.principal  # before it may be refused, so that the log names who was
        self._authenticator.check(caller)
        table = _routes_of(generation, request, host)
        if operation is None:
            return _show_models(request, exchange, generation, caller, table, path, keep_alive and not self.draining)

        exchange.phase = Phase.BODY
        content_type = _content_type(request, operation)
        body = await read_body(
            request,
            max_body_bytes=server.max_body_bytes,
            memory=self._memory,
            timeout_s=server.body_timeout_s,
            min_rate_bytes_per_s=server.min_client_rate_bytes_per_s,
        )
        try:
            exchange.request_bytes = len(body.data)
            multipart = operation in MULTIPART_OPERATIONS
            if multipart:
                envelope = read_multipart(body.data, content_type)
            elif len(body.data) <= LONG_BODY_BYTES:
                envelope = read_json(body.data)
            else:
                async with self._long_body:
                    envelope = await read_long_json(body.data)
            exchange.phase = Phase.ROUTE
            exchange.model, exchange.stream = envelope.model, envelope.stream
            match = _find_route(table, envelope.model, caller)
            route = match.route
            exchange.route = route.name
            exchange.phase = Phase.ADMISSION
            head = _request_head(request, exchange, content_type)
            metering = _metering(generation, route, operation, envelope)
            work = _Work(operation, envelope, body, head, multipart, metering)
            with self._accept(exchange, route, caller.principal, work) as accepted:
                exchange.phase = Phase.LEASE
                keep_alive = await self._forward(request, exchange, generation, match, work, accepted, keep_alive)
        finally:
            body.release()
        return keep_alive

    def _accept(self, exchange: Exchange, route: RouteConfig, principal: Principal, work: "_Work") -> "_Accepted":
        """Let a request begin, and record that it did; raises `RateLimited`, `JournalUnavailable`."""
        permit = UNLIMITED
        if route.instance is None and (route.limit is not None or principal.limit is not None):
            permit = self._admission.admit(
                route.name, (route.limit, principal.limit), principal.user, principal.id, work.reservation()
            )
            exchange.limit_headers = permit.headers
        try:
            self.journal.open_record(exchange)
        except JournalFull:
            permit.cancel()
            raise JournalUnavailable("The edge cannot record usage right now, try again.", retry_after_s=5) from None
        return _Accepted(self, exchange, permit, work.envelope.prompt_tokens)

    async def _forward(
        self,
        request: Request,
        exchange: Exchange,
        generation: Generation,
        match: Match,
        work: "_Work",
        accepted: "_Accepted",
        keep_alive: bool,
    ) -> bool:
        """Pass the request to an endpoint, or to another one while the budget of retries allows.

        Returns whether to keep the client's connection.
        """
        tried: list[Endpoint] = []
        failure: EdgeError | None = None
        pool = generation.pools[match.route.pool] if match.route.pool is not None else None
        key = b""
        if pool is not None and pool.config.balance == "prefix-affinity":
            key = _affinity_key(exchange, work)
        limits = generation.limits[match.route.pool]
        old_client = request.message.version == HttpVersion10
        try:
            while True:
                try:
                    lease = pool.lease(tried, key) if pool is not None else self._instance(match)
                    if lease is None and pool is not None and not tried:  # all are full, and a retry does not wait
                        lease = await pool.wait(_user(exchange), key)
                except UpstreamUnavailable:
                    if failure is None:
                        raise
                    lease = None
                if lease is None:
                    assert failure is not None  # only a retry comes here without a lease
                    exchange.end = exchange.end or End.UPSTREAM_ERROR
                    raise failure
                endpoint, member = lease.endpoint, lease.member
                exchange.endpoint = endpoint.authority
                exchange.retries = len(tried)
                varying = work.head_for(_upstream_model(match, member, work.envelope), exchange)
                head = member.head(work.operation) + varying
                begun = time.monotonic()
                try:
                    with lease:
                        keep_alive = await relay(
                            exchange,
                            request.connection,
                            endpoint.connections,
                            limits,
                            head,
                            work.body,
                            work.metering,
                            accepted.close,
                            old_client=old_client,
                            keep_alive=keep_alive and not self.draining,
                            heartbeat_s=match.route.heartbeat_s if exchange.stream else 0,
                            echo=exchange.model if match.route.model_echo else None,
                        )
                    if exchange.end in _VERDICTS:
                        lease.report(_VERDICTS[exchange.end])
                    return keep_alive
                except FailedInStream as failed:
                    _judge_failure(exchange, lease, pool, failed.error, time.monotonic() - begun)
                    return failed.keep_alive
                except (EdgeError, UpstreamAnsweredError) as error:
                    failure, elsewhere = _judge_failure(exchange, lease, pool, error, time.monotonic() - begun)
                if not elsewhere:
                    exchange.end = exchange.end or End.UPSTREAM_ERROR
                    raise failure
                tried.append(endpoint)
                if pool is not None and len(tried) == 1:
                    pool.retrying += 1
        finally:
            if pool is not None and tried:
                pool.retrying -= 1

    def _instance(self, match: Match) -> Lease:
        route = match.route
        assert route.instance is not None  # a route has a pool or this
        try:
            return self._endpoints.instance(match.filled(route.instance))
        except ValueError:
            raise ModelNotFound.named("of that name") from None


class _Accepted:
    """What an accepted request holds until it ends: its permit, and its record in the journal."""

    __slots__ = ("_exchange", "_permit", "_prompt_tokens", "_proxy")

    def __init__(self, proxy: Proxy, exchange: Exchange, permit: Permit, prompt_tokens: int) -> None:
        self._proxy = proxy
        self._exchange = exchange
        self._permit: Permit | None = permit
        self._prompt_tokens = prompt_tokens

    def close(self) -> None:
        """Settle and record, once: before the last bytes of an answer go, or when there was none."""
        permit, self._permit = self._permit, None
        if permit is not None:
            exchange = self._exchange
            usage = exchange.usage
            tokens = usage.prompt_tokens + usage.completion_tokens
            if exchange.phase is Phase.WAIT and exchange.end in _UNHEARD:
                tokens = self._prompt_tokens
            permit.settle(tokens)
            exchange.finished = time.monotonic()
            self._proxy.journal.close_record(exchange)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._permit is None:
            return
        exchange = self._exchange
        if isinstance(error, EdgeError):
            exchange.status = error.status
            exchange.end = exchange.end or End.UPSTREAM_ERROR
        elif isinstance(error, asyncio.CancelledError):
            exchange.end = exchange.end or self._proxy.who_left()
        else:
            exchange.end = exchange.end or End.INTERNAL_ERROR
        self.close()


@dataclass(slots=True)
class _Work:
    """What a request asks of whichever endpoint it comes to."""

    operation: str
    envelope: Envelope
    body: Body
    head: bytes
    multipart: bool
    metering: Metering

    def reservation(self) -> int:
        """Return how many tokens the request may use, as far as can be told before."""
        prompt_tokens = self.envelope.prompt_tokens
        if self.operation not in _GENERATING:
            return prompt_tokens
        return prompt_tokens + (self.envelope.max_tokens or _ASSUMED_ANSWER_TOKENS) * self.envelope.n

    def head_for(self, model: str, exchange: Exchange) -> bytes:
        """Let the body ask for `model`; return the part of the head that differs from request to request."""
        exchange.upstream_model = model
        body, metering = self.body, self.metering
        if model == self.envelope.model and not metering.changes:
            body.sent = body.data
        elif self.multipart:
            body.sent = rewrite_multipart(body.data, self.envelope, model)
        else:
            body.sent = rewrite_json(
                body.data,
                self.envelope,
                model,
                include_usage=metering.hide_usage,
                continuous=metering.hide_running,
            )
        return b"%bContent-Length: %d\r\n\r\n" % (self.head, len(body.sent))


def request_id_of(request: Request) -> str:
    """Return the client's own `x-request-id` when it is a plain one, else a new one."""
    given = request.headers.get(_X_REQUEST_ID)
    if given is not None and _REQUEST_ID.fullmatch(given):
        return given
    return new_request_id()


def new_request_id() -> str:
    """Return a request id; unique, not secret."""
    return _ID_PREFIX + f"{next(_serial):08x}"


def _refuse(request: Request, exchange: Exchange, error: EdgeError, keep_alive: bool) -> bool:
    """Turn a failure into HTTP: the one place."""
    exchange.error = error.error_code
    if isinstance(error, InternalError):
        exchange.end = End.INTERNAL_ERROR
        if exchange.phase is Phase.STREAM:  # a second answer would run into the first one's body
            request.connection.abort()
            return False
    elif exchange.end is None:
        exchange.end = End.UPSTREAM_ERROR if error.origin is Origin.UPSTREAM else End.REFUSED
    exchange.status = error.status
    # A body that was not read would be taken for the next request, so such a connection ends.
    keep_alive = keep_alive and request.payload.is_eof() and request.payload.exception() is None
    answer = error_response(
        error, request_id=exchange.request_id, keep_alive=keep_alive, with_body=exchange.method != "HEAD"
    )
    exchange.response_bytes = len(answer)
    request.connection.send(answer)
    return keep_alive


def _send(
    request: Request,
    exchange: Exchange,
    status: int,
    body: bytes,
    keep_alive: bool,
    headers: tuple[tuple[str, str], ...] = (),
) -> bool:
    """Send an answer of the edge's own."""
    keep_alive = keep_alive and request.payload.is_eof()
    exchange.status = status
    exchange.end = End.COMPLETE
    answer = response(
        status,
        body,
        request_id=exchange.request_id,
        keep_alive=keep_alive,
        headers=headers,
        with_body=exchange.method != "HEAD",
    )
    exchange.response_bytes = len(answer)
    request.connection.send(answer)
    return keep_alive


# --- what the head of a request says


def _target(request: Request, exchange: Exchange, server: ServerConfig) -> tuple[str, str]:
    """Return the raw path and the host that are asked; raises for what HTTP/1.1 does not allow or we do not do."""
    message, headers = request.message, request.headers
    exchange.client = _client_address(request, server) if server.trusted_proxies else request.connection.peer
    if message.version not in (HttpVersion11, HttpVersion10):
        raise UnsupportedVersion("this edge speaks HTTP/1.1 and HTTP/1.0")
    if message.chunked or hdrs.TRANSFER_ENCODING in headers:
        if message.version == HttpVersion10:
            raise InvalidRequest("an HTTP/1.0 request cannot have a transfer coding")
        if headers[hdrs.TRANSFER_ENCODING].strip().lower() != "chunked":
            raise UnsupportedCoding("the only transfer coding is chunked")
    if headers.get(hdrs.EXPECT, "100-continue").lower() != "100-continue" and message.version == HttpVersion11:
        raise InvalidRequest("the only expectation is 100-continue")
    path = message.path
    if path.startswith("/"):
        authority = headers.get(hdrs.HOST, "")
    else:  # absolute form: the target's host is the one that counts (RFC 9112 section 3.2.2)
        authority = message.url.raw_authority or ""
        path = message.url.raw_path
    path = path.partition("?")[0]
    exchange.path = path[:256]
    host = exchange.host = host_name(authority)
    return path, host


def _client_address(request: Request, server: ServerConfig) -> str:
    """Return the client's address; a trusted proxy's word counts, read from the right (RFC 7239 section 7.4)."""
    address = request.connection.peer
    hops = ",".join(request.headers.getall("X-Forwarded-For", [])).split(",")
    while hops and _is_trusted(address, server):
        hop = hops.pop().strip()
        try:
            address = _address_without_scope(hop)
        except ValueError:
            break
    return address


def _address_without_scope(text: str) -> str:
    """Return an address as it is usually written, an IPv4 one as such.

    Raises: `ValueError`, also for a scope: it may be any text.
    """
    if "%" in text:
        raise ValueError("a scope means nothing on another machine")
    address = ipaddress.ip_address(text)
    return str((isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped) or address)


def _is_trusted(address: str, server: ServerConfig) -> bool:
    if address == "unix":
        return True
    ip = ipaddress.ip_address(address)
    return any(ip in network for network in server.trusted_proxies)


def _wrong_path(request: Request, path: str, host: str, exists: bool) -> EdgeError:
    if exists:
        allowed = "POST, OPTIONS" if path in _OPERATIONS else "GET, HEAD, OPTIONS"
        return MethodNotAllowed(
            f"{request.message.method} is not possible here, use {allowed}", headers=(("Allow", allowed),)
        )
    if is_loopback(host):
        base = f"{'https' if request.connection.is_secure else 'http'}://{request.headers.get(hdrs.HOST, host)}"
    else:
        base = f"https://{host or 'chat.d.run'}"
    if path.startswith("/v1/") and not path.startswith(("/v1/v1/", "/v1//")):  # the base URL is right
        served = ", ".join((*JSON_OPERATIONS, *MULTIPART_OPERATIONS))
        return PathNotFound(f"This operation is not served here. Under {base}/v1 there are: {served}, models.")
    return PathNotFound(f"There is nothing at this path. The base URL is {base}/v1 (or {base} for openai<1).")


def _content_type(request: Request, operation: str) -> str:
    """Return the content type that goes upstream; raises `UnsupportedMediaType`."""
    given = request.headers.get(hdrs.CONTENT_TYPE, "")
    if request.headers.get(hdrs.CONTENT_ENCODING, "identity").lower() != "identity":
        raise UnsupportedMediaType("a compressed body is not understood: send it without Content-Encoding")
    if operation in MULTIPART_OPERATIONS:
        if _media_type(given) != "multipart/form-data" or not _is_plain(given):
            raise UnsupportedMediaType("send a form: Content-Type: multipart/form-data; boundary=...")
        return given
    if given != "application/json" and _media_type(given) not in ("application/json", ""):
        raise UnsupportedMediaType("send JSON: Content-Type: application/json")
    return "application/json"


def _media_type(content_type: str) -> str:
    return content_type.partition(";")[0].strip().lower()


def _request_head(request: Request, exchange: Exchange, content_type: str) -> bytes:
    head = f"Content-Type: {content_type}\r\nX-Request-Id: {exchange.request_id}\r\n"
    headers = request.headers
    for name in _FORWARDED:
        value = headers.get(name)
        if value is not None and _is_plain(value):
            head += f"{name}: {value}\r\n"
    return head.encode("ascii")


def _is_plain(value: str) -> bool:
    """Say whether a header's value is visible ASCII, so that every parser reads it alike."""
    return value.isascii() and value.isprintable()


# --- what is metered


def _metering(generation: Generation, route: RouteConfig, operation: str, envelope: Envelope) -> Metering:
    """Return how the answer is read, and what of its usage is not for the client, who did not ask for it."""
    if not (route.metered and envelope.stream and operation in _USAGE_OPTIONS and route.pool is not None):
        return Metering(operation, envelope.continuous_usage, prompt_estimate=envelope.prompt_tokens)
    continuous = generation.config.pools[route.pool].usage == "continuous"
    return Metering(
        operation,
        continuous or envelope.continuous_usage,
        hide_usage=not envelope.include_usage,
        hide_running=continuous and not envelope.continuous_usage,
        prompt_estimate=envelope.prompt_tokens,
    )


# --- the route


def _routes_of(generation: Generation, request: Request, host: str) -> HostTable:
    """Return the routes of the host; a loopback host on a loopback connection reaches all of them."""
    peer = request.connection.peer
    loopback = is_loopback(host) and (peer == "unix" or is_loopback(peer))
    table = generation.routes.for_host(host, loopback)
    if not table:
        raise MisdirectedRequest("no model is served at this host")
    return table


def _find_route(table: HostTable, model: str, caller: Caller) -> Match:
    """Return the route of a model that the caller may call; unknown and not-yours look the same."""
    match = table.find(model)
    if match is None:
        raise ModelNotFound.named(f"`{model}`")
    caller.check(model)
    return match


def _upstream_model(match: Match, member: Member, envelope: Envelope) -> str:
    if member.config.model is not None:
        return member.config.model
    if match.route.model is not None:
        return match.filled(match.route.model)
    return envelope.model


def _judge_failure(
    exchange: Exchange, lease: Lease, pool: Pool | None, error: EdgeError | UpstreamAnsweredError, took_s: float
) -> tuple[EdgeError, bool]:
    """Report what an attempt showed of its endpoint; return the error for the client, and whether to ask another."""
    config = pool.config if pool is not None else None
    if isinstance(error, UpstreamAnsweredError):
        retry_after = error.headers.get(b"retry-after", b"")
        lease.report(judge(error.status), int(retry_after[:6]) if retry_after.isdigit() else None)
        failure = from_upstream(error.status, error.body, retry_after)
        elsewhere = error.status in _RETRIED
    else:
        if exchange.end is not End.DRAINED and not isinstance(error, Overloaded):  # that is the edge's own lack
            lease.report(Verdict.FAULT)
        failure = error
        elsewhere = isinstance(error, UpstreamError) and config is not None and config.retry_after_send
    if isinstance(error, EdgeError) and error.safe_elsewhere:  # nothing was sent, however long it took
        elsewhere = pool is not None and pool.may_retry()
    else:
        quick = config is not None and took_s <= config.retry_within_s
        elsewhere = elsewhere and quick and pool is not None and pool.may_retry()
    if isinstance(failure, Overloaded) and not elsewhere:
        exchange.end = End.REFUSED
    return failure, elsewhere


def _affinity_key(exchange: Exchange, work: _Work) -> bytes:
    """Return what keeps a conversation with one member: its user and how it begins."""
    begins = b"" if work.multipart else conversation_start(work.body.data)
    return _user(exchange).encode() + b"\0" + begins


def _user(exchange: Exchange) -> str:
    assert exchange.principal is not None  # nobody gets to an upstream without
    return exchange.principal.user


def _show_models(
    request: Request,
    exchange: Exchange,
    generation: Generation,
    caller: Caller,
    table: HostTable,
    path: str,
    keep_alive: bool,
) -> bool:
    """List the models this key may call on this host, or show one: any name that would route and is allowed."""
    exchange.phase = Phase.ROUTE
    created = int(generation.loaded_at)
    if path in _MODELS:
        names = sorted({name for name in table.names() if caller.may_call(name)})
        document: object = {"object": "list", "data": [_model(name, created) for name in names]}
    else:
        name = _model_in_path(path)
        exchange.model = name
        exchange.route = _find_route(table, name, caller).route.name
        document = _model(name, created)
    return _send(request, exchange, 200, orjson.dumps(document), keep_alive)


def _model_in_path(path: str) -> str:
    """Return the model of `models/{id}`, percent-decoded once; ids contain `/`, which SDKs send as `%2F`."""
    try:
        name = unquote_to_bytes(path.partition("/models/")[2]).decode()
    except UnicodeDecodeError:
        name = ""
    if not is_model_name(name):
        raise ModelNotFound.named("of that name")
    return name


def _model(name: str, created: int) -> dict[str, object]:
    return {"id": name, "object": "model", "created": created, "owned_by": name.partition("/")[0]}
