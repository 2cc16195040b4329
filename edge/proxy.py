"""One request through its life. READ THIS FIRST.

    credential -> body -> route -> admission -> lease -> send -> relay,
    and a closing step that always runs and never waits

`Proxy.handle` is the only place that knows this order; the phases do not know each other. A phase that cannot go on
raises an `EdgeError`, which becomes HTTP in one place, `Proxy._refuse`. Once the client has a byte of the answer, only
the relay writes to it. How a request ended is known once: `Exchange.ended`, by the relay or by `Proxy._failed`.
"""

import asyncio
import logging
import time
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import unquote_to_bytes

import orjson
from aiohttp import hdrs

from edge import errors
from edge.attempt import Work, metering_of
from edge.client.answers import error_response, response
from edge.client.body import BodyMemory, read_body, whole_body
from edge.client.connection import Request
from edge.client.head import content_type_of, forwarded_head, request_id_of, target_of
from edge.config.settings import RouteConfig
from edge.envelope.form import read_multipart
from edge.envelope.json import LONG_BODY_BYTES, read_json, read_long_json
from edge.errors import EdgeError
from edge.exchange import End, Exchange, Phase, Principal
from edge.generation import Generation
from edge.journal.journal import Journal, JournalFull
from edge.keys.authenticator import Authenticator
from edge.keys.caller import Caller
from edge.keys.credential import credential_of
from edge.limits.admission import UNLIMITED, Admission
from edge.names import is_model_name
from edge.relay.relay import relay
from edge.relay.terms import FailedInStream, UpstreamAnsweredError
from edge.routing import HostTable, Match, RouteTable, host_name, is_loopback
from edge.settlement import Settlement
from edge.stage import Lifecycle, Stage
from edge.telemetry.access_log import AccessLog
from edge.telemetry.metrics import Metrics
from edge.upstream.endpoints import Endpoint, Endpoints, Lease
from edge.upstream.health import Verdict, judge
from edge.upstream.pools import Pool

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
_PREFLIGHT: Final = (
    ("Access-Control-Allow-Methods", "GET, HEAD, POST, OPTIONS"),
    ("Access-Control-Allow-Headers", "*, Authorization"),
    ("Access-Control-Max-Age", "86400"),
)
_BODY, _ROUTE, _ADMISSION, _LEASE, _DONE = Phase.BODY, Phase.ROUTE, Phase.ADMISSION, Phase.LEASE, Phase.DONE
_COMPLETE, _INTERNAL_ERROR = End.COMPLETE, End.INTERNAL_ERROR
_RETRIED: Final = (429, 502, 503, 504)  # by another endpoint: the one that answered did no work
_VERDICTS: Final[dict[End | None, Verdict]] = {
    End.COMPLETE: Verdict.FINE,
    End.UPSTREAM_CUT: Verdict.FAULT,
    End.IDLE_TIMEOUT: Verdict.FAULT,
}  # what an answer that began shows of its endpoint; other ends show nothing of it


@dataclass(slots=True, eq=False)
class Proxy:
    """Answers requests."""

    generation: Generation
    _lifecycle: Lifecycle
    _authenticator: Authenticator
    _admission: Admission
    _endpoints: Endpoints
    _journal: Journal
    _memory: BodyMemory
    _metrics: Metrics
    _access_log: AccessLog
    in_flight: int = 0
    _idle: asyncio.Event = field(default_factory=asyncio.Event)
    # One is read at a time: ten at once would be ten steps in one go.
    _long_body: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def handle(self, request: Request) -> None:
        """Answer one request; `connection.last` is whether another may follow on the connection."""
        exchange = Exchange(request_id_of(request), request.message.method, time.time(), time.monotonic())
        self.in_flight += 1
        try:
            await self._answer(request, exchange, self.generation)
        except EdgeError as error:
            self._refuse(request, exchange, error)
        except asyncio.CancelledError as error:
            self._failed(exchange, error)
            raise
        except Exception as error:  # a defect: the caller gets a clean 500, the log the place
            _log.exception("request %s failed", exchange.request_id)
            self._failed(exchange, error)
            if exchange.phase is Phase.STREAM:  # a second answer would run into the first one's body
                exchange.error = errors.InternalError.code
                request.connection.last = True
                request.connection.abort()
            else:
                self._refuse(request, exchange, errors.InternalError("The edge failed to handle this request."))
        finally:
            self._observe(exchange)

    async def wait_idle(self) -> None:
        """Wait until no request is being answered."""
        while self.in_flight:
            self._idle.clear()
            await self._idle.wait()

    # --- the phases, in their order

    async def _answer(self, request: Request, exchange: Exchange, generation: Generation) -> None:
        server, connection, method = generation.config.server, request.connection, exchange.method
        path, authority = target_of(request, exchange, server)
        host = exchange.host = host_name(authority)
        operation = _OPERATIONS.get(path)
        if operation is None or method != "POST":
            if method == "OPTIONS":
                _send(request, exchange, 204, b"", _PREFLIGHT)
                return
            if operation is not None or (path not in _MODELS and not path.startswith(("/v1/models/", "/models/"))):
                raise _wrong_path(request, path, host, operation is not None)
            if method not in ("GET", "HEAD"):
                raise _wrong_path(request, path, host, True)
        credential = connection.credential = credential_of(request.headers, connection.credential)
        caller = self._authenticator.recall(credential) or await self._authenticator.look_up(credential)
        exchange.principal = caller.principal  # before it may be refused, so that the log names who was
        self._authenticator.check(caller)
        table = routes_at(generation.routes, host, connection.peer)
        if operation is None:
            _show_models(request, exchange, generation, caller, table, path)
            return

        exchange.phase = _BODY
        form = operation in MULTIPART_OPERATIONS
        content_type = content_type_of(request, form=form)
        memory = self._memory
        body = whole_body(request, server.max_body_bytes, memory) or await read_body(request, server, memory)
        try:
            exchange.request_bytes = len(body.data)
            if form:
                envelope = read_multipart(body.data, content_type)
            elif len(body.data) <= LONG_BODY_BYTES:
                envelope = read_json(body.data)
            else:
                async with self._long_body:
                    envelope = await read_long_json(body.data)
            exchange.phase = _ROUTE
            exchange.model, exchange.stream = envelope.model, envelope.stream
            match = decide(table, envelope.model, caller)
            route = match.route
            exchange.route = route.name
            exchange.phase = _ADMISSION
            head = forwarded_head(request, exchange, content_type)
            pool = generation.pools[route.pool] if route.pool is not None else None
            continuous = pool is not None and pool.config.usage == "continuous"
            metering = metering_of(route, operation, envelope, continuous=continuous)
            timeouts = generation.timeouts[route.pool]
            work = Work(operation, envelope, body, head, form, metering, match, pool, timeouts)
            settlement = self._accept(exchange, route, caller.principal, work)
            try:
                exchange.phase = _LEASE
                await self._forward(request, exchange, work, settlement)
            except BaseException as error:
                self._failed(exchange, error)
                settlement.settle(exchange.end or End.INTERNAL_ERROR)
                raise
        finally:
            body.release()

    def _accept(self, exchange: Exchange, route: RouteConfig, principal: Principal, work: Work) -> Settlement:
        """Let a request begin, and record that it did; raises `RateLimited`, `JournalUnavailable`."""
        permit = UNLIMITED
        if route.instance is None and (route.limit is not None or principal.limit is not None):
            permit = self._admission.admit(
                route.name, (route.limit, principal.limit), principal.user, principal.id, work.reservation()
            )
            exchange.limit_headers = permit.headers
        try:
            return Settlement(exchange, permit, self._journal, work.envelope.prompt_tokens)
        except JournalFull:
            permit.cancel()
            raise errors.JournalUnavailable(
                "The edge cannot record usage right now, try again.", retry_after_s=5
            ) from None

    async def _forward(self, request: Request, exchange: Exchange, work: Work, settlement: Settlement) -> None:
        """Pass the request to an endpoint, or to another one while the budget of retries allows."""
        tried: list[Endpoint] = []
        failure: EdgeError | None = None
        pool = work.pool
        user = exchange.principal.user if exchange.principal is not None else ""
        key = work.affinity_key(user) if pool is not None and pool.config.balance == "prefix-affinity" else b""
        try:
            while True:
                try:
                    lease = pool.lease(tried, key) if pool is not None else self._instance(work.match)
                    if lease is None and pool is not None and not tried:  # all are full, and a retry does not wait
                        lease = await pool.wait(user, key)
                except errors.UpstreamUnavailable as unavailable:
                    raise _given_up(exchange, failure or unavailable) from None
                if lease is None:
                    assert failure is not None  # only a retry comes here without a lease
                    raise _given_up(exchange, failure)
                endpoint = lease.endpoint
                exchange.endpoint = endpoint.authority
                exchange.retries = len(tried)
                attempt = work.attempt(exchange, lease.member)
                begun = time.monotonic()
                try:
                    with lease:
                        await relay(exchange, request.connection, endpoint.connections, attempt, settlement)
                    if (verdict := _VERDICTS.get(exchange.end)) is not None:
                        lease.report(verdict)
                    return
                except FailedInStream as failed:
                    _judge_failure(exchange, lease, pool, failed.error, time.monotonic() - begun)
                    return
                except (EdgeError, UpstreamAnsweredError) as error:
                    failure, elsewhere = _judge_failure(exchange, lease, pool, error, time.monotonic() - begun)
                finally:
                    attempt.body = b""  # a failure keeps this frame until it is collected, and must not keep a prompt
                if not elsewhere:
                    raise _given_up(exchange, failure)
                tried.append(endpoint)
                if pool is not None and len(tried) == 1:
                    pool.retrying += 1
        finally:
            failure = None  # whose traceback has this frame
            if pool is not None and tried:
                pool.retrying -= 1

    def _instance(self, match: Match) -> Lease:
        route = match.route
        assert route.instance is not None  # a route has a pool or this
        try:
            return self._endpoints.instance(match.filled(route.instance))
        except ValueError:
            raise errors.ModelNotFound.named("of that name") from None

    # --- the end

    def _failed(self, exchange: Exchange, error: BaseException) -> None:
        """Note how a request ends that has failed, unless its end is known already."""
        if isinstance(error, EdgeError):
            exchange.status = error.status
            exchange.ended(End.UPSTREAM_ERROR if error.origin is errors.Origin.UPSTREAM else End.REFUSED)
        elif isinstance(error, asyncio.CancelledError):  # its client left, unless the drain is over and cuts it
            exchange.ended(End.DRAINED if self._lifecycle.stage is Stage.CUTTING else End.CLIENT_GONE)
        else:
            if exchange.phase is not Phase.STREAM:
                exchange.status = errors.InternalError.status
            exchange.ended(_INTERNAL_ERROR)

    def _refuse(self, request: Request, exchange: Exchange, error: EdgeError) -> None:
        """Turn a failure into HTTP: the one place."""
        self._failed(exchange, error)
        exchange.error = error.error_code
        connection, payload = request.connection, request.payload
        if not payload.is_eof() or payload.exception() is not None:
            connection.last = True  # a body that was not read would be taken for the next request
        answer = error_response(
            error, request_id=exchange.request_id, last=connection.last, with_body=exchange.method != "HEAD"
        )
        exchange.response_bytes = len(answer)
        connection.send(answer)

    def _observe(self, exchange: Exchange) -> None:
        """Count and log a request, however it ended; never waits, so cancellation cannot tear it."""
        self.in_flight -= 1
        if not self.in_flight:
            self._idle.set()
        exchange.ended(_INTERNAL_ERROR)
        if exchange.end is _COMPLETE:
            exchange.phase = _DONE
        self._metrics.observe(exchange)
        self._access_log.write(exchange)


def _send(
    request: Request, exchange: Exchange, status: int, body: bytes, headers: tuple[tuple[str, str], ...] = ()
) -> None:
    """Send an answer of the edge's own."""
    connection = request.connection
    if not request.payload.is_eof():
        connection.last = True
    exchange.status = status
    exchange.ended(_COMPLETE)
    answer = response(
        status,
        body,
        request_id=exchange.request_id,
        last=connection.last,
        headers=headers,
        with_body=exchange.method != "HEAD",
    )
    exchange.response_bytes = len(answer)
    connection.send(answer)


# --- what is decided, for requests and for `edge explain`


def routes_at(routes: RouteTable, host: str, peer: str) -> HostTable:
    """Return the routes of a host; one of this machine, asked from it, reaches all. Raises `MisdirectedRequest`."""
    table = routes.for_host(host, is_loopback(host) and (peer == "unix" or is_loopback(peer)))
    if not table:
        raise errors.MisdirectedRequest("no model is served at this host")
    return table


def decide(table: HostTable, model: str, caller: Caller | None) -> Match:
    """Return the route of a model that the caller may call, None for one who may; unknown and not-yours look the same.

    Raises: `ModelNotFound`, `PermissionDenied`.
    """
    match = table.find(model)
    if match is None:
        raise errors.ModelNotFound.named(f"`{model}`")
    if caller is not None:
        caller.check(model)
    return match


def _given_up(exchange: Exchange, failure: EdgeError) -> EdgeError:
    """Return the failure that no other endpoint makes good; a caller's fault is what an endpoint answered, too."""
    exchange.ended(End.REFUSED if isinstance(failure, errors.Overloaded) else End.UPSTREAM_ERROR)
    return failure


def _judge_failure(
    exchange: Exchange, lease: Lease, pool: Pool | None, error: EdgeError | UpstreamAnsweredError, took_s: float
) -> tuple[EdgeError, bool]:
    """Report what an attempt showed of its endpoint; return the error for the client, and whether to ask another."""
    config = pool.config if pool is not None else None
    if isinstance(error, UpstreamAnsweredError):
        retry_after = error.headers.get(b"retry-after", b"")
        lease.report(judge(error.status), int(retry_after[:6]) if retry_after.isdigit() else None)
        failure = errors.from_upstream(error.status, error.body, retry_after)
        elsewhere = error.status in _RETRIED
    else:
        if exchange.end is not End.DRAINED and not isinstance(error, errors.Overloaded):  # that is the edge's own lack
            lease.report(Verdict.FAULT)
        failure = error
        elsewhere = isinstance(error, errors.UpstreamError) and config is not None and config.retry_after_send
    if isinstance(error, EdgeError) and error.safe_elsewhere:  # nothing was sent, however long it took
        elsewhere = pool is not None and pool.may_retry()
    else:
        quick = config is not None and took_s <= config.retry_within_s
        elsewhere = elsewhere and quick and pool is not None and pool.may_retry()
    return failure, elsewhere


# --- paths that are not passed on


def _wrong_path(request: Request, path: str, host: str, exists: bool) -> EdgeError:
    if exists:
        allowed = "POST, OPTIONS" if path in _OPERATIONS else "GET, HEAD, OPTIONS"
        return errors.MethodNotAllowed(
            f"{request.message.method} is not possible here, use {allowed}", headers=(("Allow", allowed),)
        )
    if is_loopback(host):
        base = f"{'https' if request.connection.is_secure else 'http'}://{request.headers.get(hdrs.HOST, host)}"
    else:
        base = f"https://{host or 'chat.d.run'}"
    if path.startswith("/v1/") and not path.startswith(("/v1/v1/", "/v1//")):  # the base URL is right
        served = ", ".join((*JSON_OPERATIONS, *MULTIPART_OPERATIONS))
        return errors.PathNotFound(f"This operation is not served here. Under {base}/v1 there are: {served}, models.")
    return errors.PathNotFound(f"There is nothing at this path. The base URL is {base}/v1 (or {base} for openai<1).")


def _show_models(
    request: Request, exchange: Exchange, generation: Generation, caller: Caller, table: HostTable, path: str
) -> None:
    """List the models this key may call on this host, or show one: any name that would route and is allowed."""
    exchange.phase = _ROUTE
    created = int(generation.loaded_at)
    if path in _MODELS:
        names = sorted({name for name in table.names() if caller.may_call(name)})
        document: object = {"object": "list", "data": [_model(name, created) for name in names]}
    else:
        name = _model_in_path(path)
        exchange.model = name
        exchange.route = decide(table, name, caller).route.name
        document = _model(name, created)
    _send(request, exchange, 200, orjson.dumps(document))


def _model_in_path(path: str) -> str:
    """Return the model of `models/{id}`, percent-decoded once; ids contain `/`, which SDKs send as `%2F`."""
    try:
        name = unquote_to_bytes(path.partition("/models/")[2]).decode()
    except UnicodeDecodeError:
        name = ""
    if not is_model_name(name):
        raise errors.ModelNotFound.named("of that name")
    return name


def _model(name: str, created: int) -> dict[str, object]:
    return {"id": name, "object": "model", "created": created, "owned_by": name.partition("/")[0]}
