"""One request through its life. READ THIS FIRST.

    credential -> body -> route -> admission -> lease -> send -> relay,
    and a closing step that always runs and never waits

`Proxy.handle` is the only place that knows this order; the phases do not know each other. What is from the lease on may
take several endpoints, and is read in `forwarding.py`. A phase that cannot go on raises an `EdgeError`, which becomes
HTTP in one place, `Proxy._refuse`. Once the client has a byte of the answer, only the relay writes to it. How a request
ended is known once: `Exchange.ended`, by the relay or by `Proxy._failed`.
"""

import asyncio
import logging
import time
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import orjson

from edge import errors, own_answers
from edge.attempt import Work, metering_of
from edge.client.answers import error_response, server_timing
from edge.client.body import Body, BodyMemory, read_body, whole_body
from edge.client.connection import Request
from edge.client.head import Head, address_behind_proxies
from edge.envelope.form import read_long_multipart, read_multipart
from edge.envelope.json import LONG_BODY_BYTES, Envelope, read_json
from edge.envelope.long_json import read_long_json, takes_long
from edge.errors import EdgeError
from edge.exchange import End, Exchange, Phase
from edge.forwarding import Forwarder
from edge.generation import Generation
from edge.ids import new_request_id
from edge.journal.journal import Journal, JournalFull
from edge.keys.authenticator import Authenticator
from edge.keys.caller import Caller
from edge.keys.credential import credential_of
from edge.limits.admission import UNLIMITED, Admission
from edge.limits.lines import Lines
from edge.operations import HEALTH, STORED_RESPONSE, Operation
from edge.own_answers import OwnAnswers
from edge.plan import Plan, decide, plan_for, routes_at
from edge.routing import HostTable, host_name
from edge.settlement import Settlement
from edge.stage import Lifecycle, Stage
from edge.telemetry.access_log import AccessLog
from edge.telemetry.metrics import Metrics
from edge.telemetry.tracing import Tracing
from edge.upstream.catalogue import Catalogue
from edge.upstream.kept_responses import Keeper, KeptResponses

_log = logging.getLogger(__name__)

_PREFLIGHT: Final = (
    ("Access-Control-Allow-Methods", "GET, HEAD, POST, DELETE, OPTIONS"),
    ("Access-Control-Allow-Headers", "*, Authorization"),
    ("Access-Control-Max-Age", "86400"),
)
_BODY, _ROUTE, _ADMISSION, _LEASE, _DONE = Phase.BODY, Phase.ROUTE, Phase.ADMISSION, Phase.LEASE, Phase.DONE
_COMPLETE, _INTERNAL_ERROR = End.COMPLETE, End.INTERNAL_ERROR


@dataclass(slots=True, eq=False)
class Proxy:
    """Answers requests."""

    generation: Generation
    _lifecycle: Lifecycle
    _authenticator: Authenticator
    _admission: Admission
    _forwarder: Forwarder
    _kept: KeptResponses
    _catalogue: Catalogue
    _journal: Journal
    _memory: BodyMemory
    _metrics: Metrics
    _access_log: AccessLog
    _own: OwnAnswers
    _lines: Lines = field(default_factory=Lines)
    in_flight: int = 0
    plans_made: int = 0
    tracing: Tracing | None = None
    _idle: asyncio.Event = field(default_factory=asyncio.Event)

    async def handle(self, request: Request) -> None:
        """Answer one request; `connection.last` is whether another may follow on the connection."""
        head, generation, body = request.head, self.generation, None
        exchange = Exchange(head.request_id or new_request_id(), head.method, time.time(), time.monotonic())
        exchange.trace = head.trace if self.tracing is None else self.tracing.begin(head.trace)
        self.in_flight += 1
        try:
            operation = self._operation(request, exchange, generation)
            if operation is None or operation is HEALTH:
                self._answer_at_once(request, exchange, operation)
                return
            credential = head.credential = head.credential or credential_of(head.headers)
            caller = self._authenticator.recall(credential) or await self._authenticator.look_up(credential)
            exchange.principal = caller.principal  # before it may be refused, so that the log names who was
            caller.check_state(exchange.started_at)
            plan: Plan | None = head.plan
            table: HostTable | None = None
            if plan is None or plan.caller is not caller or plan.generation != generation.number:
                plan, table = None, routes_at(generation.routes, exchange.host, request.connection.peer)
                if operation.is_own:
                    await self._show_own(request, exchange, generation, caller, table)
                    return
            exchange.phase = _BODY
            server, memory = generation.config.server, self._memory
            if operation is not STORED_RESPONSE and not head.content_type:
                head.read_content_type()
            body = whole_body(request, server.max_body_bytes, memory)
            if body is None:
                body = await read_body(request, server, memory)
                exchange.waited_s = time.monotonic() - exchange.begun
            exchange.request_bytes = len(body.data)
            keeper: str | None = None
            if operation is STORED_RESPONSE:
                envelope, keeper = await self._stored(caller, head, body)
            elif len(body.data) <= LONG_BODY_BYTES or not (operation.form or takes_long(body.data)):
                envelope = _read(head, body.data, generation)
            else:
                envelope = await self._read_long(head, body.data, generation)
            if envelope.previous_response_id and operation.keeps:
                keeper = (await self._keeper(caller, envelope.previous_response_id)).member
            exchange.phase = _ROUTE
            model = exchange.model = envelope.model
            exchange.stream = envelope.stream
            if plan is None or plan.model != model:
                table = table or routes_at(generation.routes, exchange.host, request.connection.peer)
                self.plans_made += 1
                plan = head.plan = plan_for(generation, head, caller, model, decide(table, model, caller))
            route = plan.route
            exchange.route, exchange.pool, exchange.tells_timing = route.name, route.pool or "", plan.tells_timing
            if envelope.background and operation.keeps and route.metered:
                raise errors.InvalidRequest(
                    "background is not possible with this model, whose tokens are counted as they pass: leave it out",
                    param="background",
                )
            dropped = generation.dropped(route, envelope.steering, form=operation.form) if envelope.steering else ()
            exchange.phase = _ADMISSION
            length = self._catalogue.context_length_of(model, plan.match)
            metering = metering_of(plan, operation, envelope, body, length)
            work = Work(head, plan, envelope, body, metering, keeper, dropped)
            waits = plan.patience.wait_s
            settlement = await self._in_line(exchange, plan, work) if waits else self._accept(exchange, plan, work)
            try:
                exchange.phase = _LEASE
                await self._forwarder.forward(request, exchange, work, settlement)
            except BaseException as error:
                self._failed(exchange, error)
                settlement.settle(exchange.end or End.INTERNAL_ERROR)
                raise
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
            if body is not None:
                body.release()
            self._observe(exchange)

    async def wait_idle(self) -> None:
        """Wait until no request is being answered."""
        while self.in_flight:
            self._idle.clear()
            await self._idle.wait()

    # --- the phases, in their order

    def _operation(self, request: Request, exchange: Exchange, generation: Generation) -> Operation | None:
        """Return what is asked, None for a browser that asks what it may ask for; note who asks, and where."""
        server, head, connection = generation.config.server, request.head, request.connection
        peer = connection.peer
        exchange.client = address_behind_proxies(head, peer, server) if server.trusted_proxies else peer
        exchange.path = head.path[:256]
        asked = head.asked if head.paths is generation.paths else head.ask(generation.paths)
        exchange.operation = asked.operation  # before anything is refused, in its protocol's words
        if exchange.client is not peer:
            connection.answer_for(exchange.client)
        if not head.is_checked:
            head.check()
        host = exchange.host = host_name(head.authority)
        if head.method in asked.methods:
            return asked.operation
        if head.method == "OPTIONS":
            return None
        raise own_answers.wrong_path(head, asked, host, is_secure=connection.is_secure)

    def _answer_at_once(self, request: Request, exchange: Exchange, operation: Operation | None) -> None:
        """Answer what wants no credential: whether this edge is healthy, or what a browser may ask for."""
        if operation is None:
            own_answers.send(request, exchange, 204, b"", _PREFLIGHT)
        else:
            own_answers.send(request, exchange, 200 if self._lifecycle.stage is Stage.RUNNING else 503, b"")

    async def _read_long(self, head: Head, data: bytes, generation: Generation) -> Envelope:
        """Return what a long body asks for, read in steps."""
        operation, name = head.asked.operation, head.asked.model
        if name:
            name = own_answers.model_in_path(name)
        if operation.form:
            long = read_long_multipart(data, head.content_type, name)
        else:
            long = read_long_json(data, name, operation.limits, generation.names)
        async with self._forwarder.long_body:
            return await long

    async def _stored(self, caller: Caller, head: Head, body: Body) -> tuple[Envelope, str]:
        """Return what is asked of a response that was made before, and the member that keeps it."""
        body.release()  # which says nothing
        query = head.query()
        keeper = await self._keeper(caller, head.asked.response_id)
        return Envelope(keeper.model, stream="stream=true" in query[1:].split("&")), keeper.member

    async def _keeper(self, caller: Caller, response_id: str) -> Keeper:
        """Return who keeps a response; raises `ResponseNotFound`, also for one of another user."""
        keeper = await self._kept.find(caller.principal.user, response_id)
        if keeper is None:
            raise errors.ResponseNotFound("No response of that id is kept here for the user of this key.")
        return keeper

    def _accept(self, exchange: Exchange, plan: Plan, work: Work) -> Settlement:
        """Let a request begin, and record that it did; raises `RateLimited`, `JournalUnavailable`."""
        permit, envelope = UNLIMITED, work.envelope
        prompt_tokens = envelope.prompt_tokens if plan.counts_prompt else 0
        if plan.limits:
            principal, answers = plan.caller.principal, envelope.choices if plan.counts_answer else 0
            permit = self._admission.admit(
                plan.route.name, plan.limits, principal.user, principal.id, prompt_tokens, answers, envelope.max_tokens
            )
            exchange.limit_headers = permit.headers
        try:
            return Settlement(exchange, permit, self._journal, prompt_tokens)
        except JournalFull:
            permit.cancel()
            raise errors.JournalUnavailable(
                "The edge cannot record usage right now, try again.", retry_after_s=5
            ) from None

    async def _in_line(self, exchange: Exchange, plan: Plan, work: Work) -> Settlement:
        """Let a request begin that may wait until its limits have room, if its key is good by then."""
        principal, patience = plan.caller.principal, plan.patience
        whose = plan.route.name, plan.limits, principal.user, principal.id
        admit = partial(self._accept, exchange, plan, work)
        settlement = self._lines.admit(whose, patience, admit)
        if settlement is None:
            with exchange.queueing():
                settlement = await self._lines.wait(whose, patience, admit, partial(self._forwarder.check_again, work))
        exchange.limit_headers += patience.header
        return settlement

    async def _show_own(
        self, request: Request, exchange: Exchange, generation: Generation, caller: Caller, table: HostTable
    ) -> None:
        """Show what this key may call on this host, its limits or its usage, or one model: any that would route."""
        exchange.phase, asked = _ROUTE, request.head.asked
        if asked.model:
            name = exchange.model = own_answers.model_in_path(asked.model)
            match = decide(table, name, caller)
            exchange.route = match.route.name
            own_answers.send(request, exchange, 200, orjson.dumps(self._own.document(name, match)))
        else:
            first, *others = await self._own.pieces(request.head, generation, table, caller)
            own_answers.send(request, exchange, 200, first, more=others)

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
        exchange.error, exchange.limit = error.error_code, error.limit
        self._metrics.count_error(error)
        connection, payload = request.connection, request.payload
        if not payload.is_eof() or payload.exception() is not None:
            connection.last = True  # a body that was not read would be taken for the next request
        answer = error_response(
            error,
            request_id=exchange.request_id,
            last=connection.last,
            with_body=exchange.method != "HEAD",
            protocol=exchange.operation.protocol,
            timing=server_timing(exchange, time.monotonic()) if exchange.asked_at else b"",
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
        if self.tracing is not None:
            self.tracing.note(exchange)


def _read(head: Head, data: bytes, generation: Generation) -> Envelope:
    """Return what a body asks for that is read in one go."""
    operation, name = head.asked.operation, head.asked.model
    if name:
        name = own_answers.model_in_path(name)
    if operation.form:
        return read_multipart(data, head.content_type, name)
    return read_json(data, name, operation.limits, generation.names)
