"""A stream that broke, on its way to a sibling: whether one may be asked, which one, and what.

A resume is another attempt of the same request: `proxy.py` asks for its lease and its attempt as for any other's. Where
none is possible the interruption itself is raised, which ends the stream with an error, and `exchange.resume` has why.
"""

import asyncio
from typing import Final

import msgspec

from edge.attempt import Work
from edge.client.connection import ClientConnection
from edge.errors import UpstreamUnavailable
from edge.exchange import Exchange, Usage, UsageSource
from edge.metering.meters import Metering
from edge.operations import OPERATIONS
from edge.relay.delivered import Interrupted
from edge.relay.terms import Attempt
from edge.resume.continuation import (
    body_of,
    ids_in,
    prompt_question,
    prompt_tokens_of,
    rendered_question,
    text_question,
)
from edge.resume.rules import NotResumed, Way, question_in, ways_of
from edge.resume.said import Said
from edge.resume.seam import Continued, Outcome, Replayed
from edge.settlement import Settlement
from edge.upstream.endpoints import Endpoint, Lease, Member
from edge.upstream.pools import Pool
from edge.upstream.prefixes import Prefix
from edge.upstream.tokenizer import NoTokens, asked

_COUNTING_S: Final = 1.0  # of all that a tokenizer is asked, while the client waits
_CHAT: Final = OPERATIONS["chat/completions"]


class Resumption:
    """What of a stream is known that broke, and its one chance to go on; raises `Interrupted` where it has none."""

    def __init__(
        self,
        work: Work,
        pool: Pool,
        exchange: Exchange,
        client: ClientConnection,
        settlement: Settlement,
        interrupted: Interrupted,
    ) -> None:
        self._work = work
        self._pool = pool
        self._exchange = exchange
        self._client = client
        self.interrupted = interrupted
        self._first: Usage = settlement.so_far
        self._broke_at = exchange.endpoint
        self._seam: Replayed | Continued | None = None
        interrupted.hold(client)
        config, delivered = pool.config, work.delivered
        assert delivered is not None  # else nobody would have interrupted
        try:
            self._question = question_in(work.body.data, is_chat=exchange.operation is _CHAT)
            self._said = Said()
            for _ in self._said.read(delivered.content(bare=client.bare)):
                pass
            if self._first.source is UsageSource.FINAL and self._said.is_over:
                interrupted.is_over = True
                raise NotResumed("finished")
            tokens = self._first.completion_tokens
            self._ways = ways_of(
                config.resume, self._question, self._said, config.engine, tokens, config.resume_at_most
            )
            if not pool.may_retry():
                raise NotResumed("budget")
        except NotResumed as refused:
            raise self._refused(refused.reason) from None

    def _refused(self, reason: str) -> Interrupted:
        self._exchange.resume = reason
        return self.interrupted

    @property
    def differs(self) -> bool:
        """Whether the sibling's answer was another one, which is no fault of it."""
        return self._seam is not None and self._seam.broken

    def note(self) -> None:
        """Note what has become of it, for the log and the metrics."""
        if self._seam is not None:
            self._exchange.resume = self._seam.outcome.value

    def lease(self, tried: list[Endpoint], prefix: Prefix | None, user: str) -> Lease:
        """Return a lease of a sibling, one that is out rather than none."""
        self.interrupted.hold(self._client)
        try:
            lease = self._pool.lease(tried, prefix, user)
        except UpstreamUnavailable:
            lease = self._pool.spare(tried, user)
        if lease is None:
            raise self._refused("no_member")
        return lease

    async def attempt(self, lease: Lease) -> Attempt:
        """Return what a sibling is asked; its place is counted from now on."""
        lease.hold()
        reason = ""
        for way in self._ways:
            try:
                attempt = self._replayed(lease) if way is Way.REPLAY else await self._continued(lease)
            except NotResumed as refused:
                reason = refused.reason
                continue
            exchange = self._exchange
            attempt.delivered, attempt.echo, attempt.broken_end = None, None, self.interrupted.how
            exchange.resumes, exchange.resumed_from, exchange.resume = 1, self._broke_at, Outcome.FAILED.value
            return attempt
        raise self._refused(reason)

    @property
    def _echo(self) -> str | None:
        return self._exchange.model if self._work.plan.route.model_echo else None

    def _replayed(self, lease: Lease) -> Attempt:
        attempt = self._work.attempt(self._exchange, lease, None)
        attempt.seam = self._seam = Replayed(self._said, self._first, self._echo)
        return attempt

    async def _continued(self, lease: Lease) -> Attempt:
        """Return a question that goes on; raises `NotResumed` where the sibling counts no tokens, or cannot go on."""
        work, question, said, engine = self._work, self._question, self._said, self._pool.config.engine
        model = work.model_for(lease.member)
        try:
            async with asyncio.timeout(_COUNTING_S):
                text, prompt_tokens = await self._counted(lease.member, model)
        except (NoTokens, TimeoutError):
            raise NotResumed("tokenizer") from None
        body = body_of(engine, question, said, model, text, work.dropped)
        attempt = work.continuing(self._exchange, lease, body, self._metering(len(text)))
        envelope = work.envelope
        attempt.seam = self._seam = Continued(
            said,
            self._first,
            self._echo,
            question.place,
            len(text),
            prompt_tokens=prompt_tokens,
            shows_usage=envelope.include_usage,
            shows_running=envelope.continuous_usage,
            hides_usage=work.metering.hide_usage,
            shows_timings=bool(question.members.get("timings_per_token")),
        )
        return attempt

    async def _counted(self, member: Member, model: str) -> tuple[list[int], range | None]:
        """Return the ids of what was said, and how many tokens a question has that goes on with it.

        None for what has no template, and so cannot but go on. Raises: `NotResumed`, `NoTokens`.
        """
        question, said, engine = self._question, self._said, self._pool.config.engine
        text = ids_in(await asked(member, "tokenize", text_question(engine, model, said.text(question.place))))
        if not question.is_chat:
            return text, None
        of_prompt = prompt_question(engine, question, said, model)
        if engine == "llamacpp":
            of_prompt = rendered_question(await asked(member, "apply-template", of_prompt))
        return text, prompt_tokens_of(engine, text, ids_in(await asked(member, "tokenize", of_prompt)))

    def _metering(self, tokens: int) -> Metering:
        """Return how the second answer is read: it tells its usage all along, of which the seam hides what it must."""
        metering = self._work.metering
        most = metering.most
        return msgspec.structs.replace(
            metering,
            continuous=True,
            hide_usage=False,
            hide_running=False,
            most=None if most is None else max(0, most - tokens),
        )
