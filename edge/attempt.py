"""What one endpoint is asked: the head and body of the request, and how its answer is read and passed on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

from edge.client.body import Body
from edge.client.head import Head
from edge.envelope.form import rewrite_multipart
from edge.envelope.json import LONG_BODY_BYTES, Envelope
from edge.envelope.prompt import prompt_of
from edge.envelope.speech import spoken_characters
from edge.envelope.splices import rewrite_json
from edge.exchange import Exchange
from edge.ids import new_upstream_id
from edge.metering.meters import Metering
from edge.operations import STORED_RESPONSE, Operation, Reads
from edge.plan import Plan, Sent
from edge.protocols import MESSAGES
from edge.relay.delivered import Delivered
from edge.relay.terms import Attempt
from edge.upstream.endpoints import Lease, Member
from edge.upstream.kept_responses import Keeper, KeptResponses
from edge.upstream.pools import Pool
from edge.upstream.prefixes import Prefix, read_prefix
from edge.upstream.queueing import Demand

_SESSION_HEADER: Final = "X-Session-Id"
_SPEECH = Reads.SPEECH


@dataclass(slots=True, eq=False)
class Work:
    """What a request asks of whichever endpoint it comes to.

    `keeper` is the name of the one member that can answer, None for any. `dropped` are members of the body that do not
    go upstream. `delivered` is what a client has of a stream that may go on elsewhere.
    """

    head: Head
    plan: Plan
    envelope: Envelope
    body: Body
    metering: Metering
    keeper: str | None = None
    dropped: tuple[str, ...] = ()
    delivered: Delivered | None = None

    async def prefix(self, user: str, pool: Pool) -> Prefix:
        """Return how the prompt begins, by which a member is chosen."""
        head = self.head
        prompt = prompt_of(self.envelope, self.body.data, cleaned=head.asked.operation.protocol is MESSAGES)
        owner = b"" if pool.config.share_prefixes else user.encode()
        return await read_prefix(prompt, owner, head.headers.get(_SESSION_HEADER, "").encode())

    def demand(self) -> Demand:
        """Return what it may take of a pool whose places are all taken."""
        plan, envelope = self.plan, self.envelope
        return Demand(
            envelope.prompt_tokens if plan.counts_prompt else 0,
            envelope.choices if plan.counts_answer else 0,
            envelope.max_tokens,
            plan.share,
        )

    def attempt(self, exchange: Exchange, lease: Lease, keep: Callable[[str], None] | None) -> Attempt:
        """Return what a member is asked: the client's own bytes, with the splices that it needs."""
        ticket = lease.ticket
        exchange.choice = ticket.choice if ticket is not None else None
        plan, envelope, body, metering = self.plan, self.envelope, self.body.data, self.metering
        sent = plan.sent.get(lease.member) or self._sent(lease.member)
        model = exchange.upstream_model = sent.model
        pieces: Sequence[bytes | memoryview] = (body,)
        body_bytes = len(body)
        if (model != envelope.written or metering.changes or self.dropped) and body:
            pieces = self._changed(body, model)
            body_bytes = sum(map(len, pieces))
        upstream_id = exchange.upstream_id = new_upstream_id()
        trace = exchange.trace.line(upstream_id) if exchange.trace is not None else ""
        route = plan.route
        return Attempt(
            sent.head + f"{upstream_id}\r\n{trace}Content-Length: {body_bytes}\r\n\r\n".encode(),
            pieces,
            body_bytes,
            metering,
            plan.timeouts,
            self.body.release,
            route.heartbeat_s if exchange.stream else 0,
            exchange.model if route.model_echo else None,
            plan.pool is None,
            keep,
            lease.first_byte if ticket is not None else None,
            self._kept(plan.pool) if plan.resumes and exchange.stream else None,
        )

    def continuing(self, exchange: Exchange, lease: Lease, body: bytes, metering: Metering) -> Attempt:
        """Return what a member is asked that goes on with an answer: another body, whose answer is read otherwise."""
        attempt = self.attempt(exchange, lease, None)
        lines, name, _ = attempt.head.rpartition(b"Content-Length: ")
        attempt.head = b"%b%b%d\r\n\r\n" % (lines, name, len(body))
        attempt.body, attempt.body_bytes, attempt.metering = (body,), len(body), metering
        return attempt

    def keep(self, kept: KeptResponses, model: str, lease: Lease) -> Callable[[str], None] | None:
        """Return what notes that a member keeps a response, None for one that is not to be kept."""
        if not self.envelope.stored:
            return None
        keeper = Keeper(model, lease.member.name if self.plan.pool is not None else "")
        return partial(kept.remember, self.plan.caller.principal.user, keeper=keeper)

    def model_for(self, member: Member) -> str:
        """Return the name of the model that a member is asked for."""
        return (self.plan.sent.get(member) or self._sent(member)).model

    def _kept(self, pool: Pool | None) -> Delivered | None:
        """Return what keeps a stream whose request may be asked again; a long one is not kept for that."""
        if self.delivered is None and pool is not None and len(self.body.data) <= LONG_BODY_BYTES:
            self.delivered = Delivered(self.body.memory, pool.config.resume_memory_bytes)
        return self.delivered

    def _changed(self, body: bytes, model: str) -> Sequence[bytes | memoryview]:
        """Return the pieces of the body with what is to be changed in it."""
        usage, running = self.metering.hide_usage, self.metering.hide_running
        if self.head.asked.operation.form:
            return rewrite_multipart(body, self.envelope, model)
        return rewrite_json(body, self.envelope, model, self.dropped, include_usage=usage, continuous=running)

    def _sent(self, member: Member) -> Sent:
        """Return what a member is sent with each request of the plan."""
        plan, head, asked = self.plan, self.head, self.head.asked
        model = member.config.model
        if model is None:
            model = plan.model if plan.route.model is None else plan.match.filled(plan.route.model)
        if asked.operation is STORED_RESPONSE:
            lines = member.head_of(head.method, f"responses/{asked.stored}{head.query()}", asked.operation)
        else:
            lines = member.head(asked.operation)
        lines += head.forwarded or head.read_forwarded(head.content_type)
        return plan.keep_sent(member, Sent(model, lines + b"X-Request-Id: "))


def metering_of(
    plan: Plan, operation: Operation, envelope: Envelope, body: Body, context_length: int | None
) -> Metering:
    """Return how the answer is read, and what of its usage is not for the client, who did not ask for it.

    `context_length` is how many tokens the model takes, prompt and answer together, None where that is not known.
    """
    if operation.reads is _SPEECH:
        places = envelope.places
        characters = places.characters if places is not None else None
        return Metering(operation, prompt_estimate=spoken_characters(body.data) if characters is None else characters)
    most = envelope.max_tokens
    if context_length is not None and (most is None or context_length < most):
        most = context_length
    if most is not None:
        most *= envelope.choices
    is_asked = plan.asks_for_usage and envelope.stream
    continuous = is_asked and plan.continuous
    return Metering(
        operation,
        continuous or envelope.continuous_usage,
        is_asked and not envelope.include_usage,
        continuous and not envelope.continuous_usage,
        envelope.prompt_tokens,
        envelope.n,
        most,
    )
