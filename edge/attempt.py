"""What one endpoint is asked: the head and body of the request, and how its answer is read and passed on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from edge.client.body import Body
from edge.config.settings import RouteConfig
from edge.envelope.form import rewrite_multipart
from edge.envelope.json import Envelope, conversation_start
from edge.envelope.long_json import rewrite_long_json
from edge.envelope.speech import spoken_characters
from edge.envelope.splices import rewrite_json
from edge.exchange import Exchange
from edge.ids import new_upstream_id
from edge.metering.meters import Metering
from edge.operations import STORED_RESPONSE, Asked, Operation, Reads, Reserves
from edge.relay.terms import Attempt, Timeouts
from edge.routing import Match
from edge.upstream.endpoints import Member
from edge.upstream.pools import Pool

_SPEECH, _ANSWER, _NOTHING = Reads.SPEECH, Reserves.ANSWER, Reserves.NOTHING


@dataclass(slots=True)
class Work:
    """What a request asks of whichever endpoint it comes to.

    `head` are the lines that the client's head yields, `query` what stands behind the path of a stored response. No
    `pool` is the instance that `match` names. `keeper` is the name of the one member that can answer, None for any.
    `dropped` are members of the body that do not go upstream.
    """

    asked: Asked
    query: str
    envelope: Envelope
    body: Body
    head: bytes
    metering: Metering
    match: Match
    pool: Pool | None
    timeouts: Timeouts
    keeper: str | None = None
    dropped: tuple[str, ...] = ()

    @property
    def prompt_tokens(self) -> int:
        """How many tokens the prompt may have that count."""
        return 0 if self.asked.operation.reserves is _NOTHING else self.envelope.prompt_tokens

    def reservation(self) -> tuple[int, int, int | None]:
        """Return how many tokens the prompt may have, how many answers are asked for, and the most each may have."""
        envelope = self.envelope
        answers = envelope.n * envelope.prompts if self.asked.operation.reserves is _ANSWER else 0
        return self.prompt_tokens, answers, envelope.max_tokens

    def affinity_key(self, user: str) -> bytes:
        """Return what keeps a conversation with one member, its user and how it begins; b"" for what is none."""
        if not self.asked.operation.is_cached:
            return b""
        places = self.envelope.places
        return user.encode() + b"\0" + (places.begins if places is not None else conversation_start(self.body.data))

    def attempt(self, exchange: Exchange, member: Member, keep: Callable[[str], None] | None) -> Attempt:
        """Return what a member is asked: the client's own bytes, with the splices that it needs."""
        route, envelope, body, metering = self.match.route, self.envelope, self.body.data, self.metering
        model = member.config.model
        if model is None:
            model = envelope.model if route.model is None else self.match.filled(route.model)
        exchange.upstream_model = model
        pieces: Sequence[bytes | memoryview] = (body,)
        if (model != envelope.written or metering.changes or self.dropped) and body:
            dropped, usage, running = self.dropped, metering.hide_usage, metering.hide_running
            if self.asked.operation.form:
                pieces = rewrite_multipart(body, envelope, model)
            elif envelope.places is not None:
                pieces = rewrite_long_json(body, envelope, model, dropped, include_usage=usage, continuous=running)
            else:
                changed = rewrite_json(body, envelope, model, dropped, include_usage=usage, continuous=running)
                pieces = self.body.copied(changed)
        body_bytes = sum(map(len, pieces))
        upstream_id = exchange.upstream_id = new_upstream_id()
        first_lines = self._first_lines(member, exchange.method)
        return Attempt(
            b"%b%bX-Request-Id: %b\r\nContent-Length: %d\r\n\r\n"
            % (first_lines, self.head, upstream_id.encode(), body_bytes),
            pieces,
            body_bytes,
            metering,
            self.timeouts,
            self.body.release,
            route.heartbeat_s if exchange.stream else 0,
            exchange.model if route.model_echo else None,
            self.pool is None,
            keep,
        )

    def _first_lines(self, member: Member, method: str) -> bytes:
        asked = self.asked
        if asked.operation is not STORED_RESPONSE:
            return member.head(asked.operation)
        return member.head_of(method, f"responses/{asked.stored}{self.query}", asked.operation)


def metering_of(
    route: RouteConfig,
    operation: Operation,
    envelope: Envelope,
    body: Body,
    *,
    continuous: bool,
    context_length: int | None,
) -> Metering:
    """Return how the answer is read, and what of its usage is not for the client, who did not ask for it.

    `continuous` says that the route's pool or instance is asked for usage in every frame; `context_length` is how many
    tokens the model takes, prompt and answer together, None where that is not known.
    """
    if operation.reads is _SPEECH:
        places = envelope.places
        characters = places.characters if places is not None else spoken_characters(body.data)
        return Metering(operation, prompt_estimate=characters)
    most = envelope.max_tokens
    if context_length is not None and (most is None or context_length < most):
        most = context_length
    if most is not None:
        most *= envelope.n * envelope.prompts
    is_asked = (route.metered or route.usage is not None) and envelope.stream and operation.takes_usage_options
    continuous = continuous and is_asked
    return Metering(
        operation,
        continuous or envelope.continuous_usage,
        hide_usage=is_asked and not envelope.include_usage,
        hide_running=continuous and not envelope.continuous_usage,
        prompt_estimate=envelope.prompt_tokens,
        n=envelope.n,
        most=most,
    )
