"""What one endpoint is asked: the head and body of the request, and how its answer is read and passed on."""

from dataclasses import dataclass
from typing import Final

from edge.client.body import Body
from edge.config.settings import RouteConfig
from edge.envelope.json import Envelope, conversation_start
from edge.envelope.splices import rewrite_json, rewrite_multipart
from edge.exchange import Exchange
from edge.metering.meters import Metering
from edge.relay.terms import Attempt, Timeouts
from edge.routing import Match
from edge.upstream.endpoints import Member
from edge.upstream.pools import Pool

_USAGE_OPTIONS: Final = ("chat/completions", "completions")  # whose streams have usage when they are asked for it
_GENERATING: Final = (*_USAGE_OPTIONS, "responses", "messages")
# Reserved for an answer whose length the request leaves open. It bounds nothing: what is used beyond it is charged.
_ASSUMED_ANSWER_TOKENS: Final = 256


@dataclass(slots=True)
class Work:
    """What a request asks of whichever endpoint it comes to.

    `head` are the lines that the client's head yields; no `pool` is the instance that `match` names.
    """

    operation: str
    envelope: Envelope
    body: Body
    head: bytes
    form: bool
    metering: Metering
    match: Match
    pool: Pool | None
    timeouts: Timeouts

    def reservation(self) -> int:
        """Return how many tokens the request may use, as far as can be known before."""
        prompt_tokens = self.envelope.prompt_tokens
        if self.operation not in _GENERATING:
            return prompt_tokens
        return prompt_tokens + (self.envelope.max_tokens or _ASSUMED_ANSWER_TOKENS) * self.envelope.n

    def affinity_key(self, user: str) -> bytes:
        """Return what keeps a conversation with one member: its user and how it begins."""
        return user.encode() + b"\0" + (b"" if self.form else conversation_start(self.body.data))

    def attempt(self, exchange: Exchange, member: Member) -> Attempt:
        """Return what a member is asked: the client's own bytes, with the splices that it needs."""
        route, envelope, body, metering = self.match.route, self.envelope, self.body.data, self.metering
        model = member.config.model
        if model is None:
            model = envelope.model if route.model is None else self.match.filled(route.model)
        exchange.upstream_model = model
        if model != envelope.model or metering.changes:
            if self.form:
                body = rewrite_multipart(body, envelope, model)
            else:
                body = rewrite_json(
                    body, envelope, model, include_usage=metering.hide_usage, continuous=metering.hide_running
                )
        return Attempt(
            b"%b%bContent-Length: %d\r\n\r\n" % (member.head(self.operation), self.head, len(body)),
            body,
            metering,
            self.timeouts,
            self.body.release,
            route.heartbeat_s if exchange.stream else 0,
            exchange.model if route.model_echo else None,
        )


def metering_of(route: RouteConfig, operation: str, envelope: Envelope, *, continuous: bool) -> Metering:
    """Return how the answer is read, and what of its usage is not for the client, who did not ask for it.

    `continuous` says that the route's pool is asked for usage in every frame.
    """
    if not (route.metered and envelope.stream and operation in _USAGE_OPTIONS and route.pool is not None):
        return Metering(operation, envelope.continuous_usage, prompt_estimate=envelope.prompt_tokens)
    return Metering(
        operation,
        continuous or envelope.continuous_usage,
        hide_usage=not envelope.include_usage,
        hide_running=continuous and not envelope.continuous_usage,
        prompt_estimate=envelope.prompt_tokens,
    )
