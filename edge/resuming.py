"""A stream that broke, on its way to a sibling: whether one may be asked, which one, and what.

A resume is another attempt of the same request: `forwarding.py` asks for its lease and its attempt as for any other's.
Where none is possible `NotResumed` is raised, which ends the stream with an error, and `exchange.resume` has why.
"""

import asyncio
import math
import time
from typing import Final

import msgspec

from edge.attempt import Work
from edge.client.connection import ClientConnection
from edge.errors import ConnectFailed, UpstreamUnavailable
from edge.exchange import End, Exchange, Usage, UsageSource
from edge.metering.meters import Metering
from edge.operations import OPERATIONS
from edge.relay.delivered import Interrupted
from edge.relay.terms import Attempt, UpstreamAnsweredError
from edge.resume.continuation import (
    Behind,
    body_of,
    by_ids,
    by_messages,
    ids_in,
    opening_question,
    prompt_question,
    rendered_in,
    rendered_question,
    require_thoughts,
    require_tokens,
    text_in,
    text_question,
    whole_question,
)
from edge.resume.rules import NotResumed, Question, Way, question_in, ways_of
from edge.resume.said import THOUGHT_ENDS, Said
from edge.resume.seam import Continued, Outcome, Replayed
from edge.settlement import Settlement
from edge.tasks import in_steps
from edge.upstream.endpoints import Endpoint, Lease
from edge.upstream.pools import Pool
from edge.upstream.prefixes import Prefix
from edge.upstream.tokenizer import NoTokens, RefusedTokens, Tokenizer

_COUNTING_S: Final = 5.0  # of all that tokenizers are asked, while the client waits
_LEFT: Final = "left"  # a resume of a client that leaves before anything came of it
_CHAT: Final = OPERATIONS["chat/completions"]


class Resumption:
    """A stream that broke, which it answers for, and its one chance to go on; `read` comes first."""

    _question: Question
    _ways: list[Way]

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
        self.interrupted = interrupted.with_traceback(None)  # whose frames have this
        self._first: Usage = settlement.so_far
        self._broke_at = exchange.endpoint
        self._said = Said()
        self._seam: Replayed | Continued | None = None
        self.is_answered = False
        self._tried: list[Endpoint] = []
        self._count_until = math.inf  # by the loop's clock
        self._hold()
        exchange.resume = _LEFT

    def _hold(self) -> None:
        self.interrupted.hold(self._exchange, self._client, self._work.plan.route.heartbeat_s)

    async def read(self, turn: asyncio.Lock) -> None:
        """Read what was asked and what the client has of its answer, one stream after another; raises `NotResumed`."""
        work, config = self._work, self._pool.config
        delivered = work.delivered
        assert delivered is not None  # else nobody would have interrupted
        async with turn:
            self._question = question_in(work.body.data, is_chat=self._exchange.operation is _CHAT)
            content = await delivered.content(bare=self._client.bare)
            delivered.release()
            if content is None:
                raise NotResumed("unreadable")
            await in_steps(self._said.read(content))
        if self._first.source is UsageSource.FINAL and self._said.is_over(work.envelope.choices):
            self.interrupted.is_over = True
            raise NotResumed("finished")
        tokens = self._first.completion_tokens
        self._ways = ways_of(config.resume, self._question, self._said, config.engine, tokens, config.resume_at_most)
        if not self._pool.may_retry():
            raise NotResumed("budget")
        if Way.CONTENT not in self._ways:
            self._question.members.clear()

    @property
    def difference(self) -> str:
        """How the sibling's answer was another one, which is no fault of it; "" where it was not."""
        seam = self._seam
        if seam is None or not seam.broken or seam.outcome is Outcome.FAILED:
            return ""
        outcome: str = (Outcome.UNEQUAL if seam.outcome is Outcome.RESUMED else seam.outcome).value
        return outcome

    def note(self) -> None:
        """Note what has become of an attempt, for the log and the metrics."""
        self.interrupted.rest()
        seam, exchange = self._seam, self._exchange
        if seam is not None and (seam.outcome is not Outcome.FAILED or exchange.end is not End.CLIENT_GONE):
            exchange.resume = seam.outcome.value

    def lease(self, tried: list[Endpoint], prefix: Prefix | None, user: str) -> Lease:
        """Return a lease of a sibling, one that is out rather than none; raises `NotResumed`."""
        self._hold()
        self._tried = tried
        try:
            lease = self._pool.lease(tried, prefix, user)
        except UpstreamUnavailable:
            lease = self._pool.spare(tried, user)
        if lease is None:
            reason = self._exchange.resume
            raise NotResumed("no_member" if reason == _LEFT else reason)
        return lease

    async def attempt(self, lease: Lease) -> Attempt:
        """Return what a sibling is asked.

        Raises: `NotResumed`; `ConnectFailed`, `NoTokens`, `UpstreamAnsweredError` for a sibling that failed to count
        tokens.
        """
        reason, asked_at = "", time.monotonic()
        self._seam = None
        for way in self._ways:
            try:
                attempt = self._replayed(lease) if way is Way.REPLAY else await self._continued(lease)
            except NotResumed as refused:
                reason = refused.reason
                continue
            except (ConnectFailed, NoTokens, UpstreamAnsweredError) as error:
                is_down = isinstance(error, ConnectFailed) or (isinstance(error, NoTokens) and self._has_others)
                if not is_down and way is not self._ways[-1]:
                    continue  # it has no tokenizer, and need not have one
                self._exchange.asked_at, self._exchange.resume = asked_at, "tokenizer"
                raise
            exchange = self._exchange
            attempt.delivered, attempt.echo, attempt.broken_end = None, None, self.interrupted.how
            attempt.release = self._let_go
            exchange.resumes, exchange.resumed_from, exchange.resume = 1, self._broke_at, _LEFT
            return attempt
        raise NotResumed(reason)

    def _let_go(self) -> None:
        """Let go of what was asked, as the sibling answers: nobody else is asked, and it is no retry any longer."""
        if not self.is_answered:
            self.is_answered = True
            self._pool.retrying -= 1
        self._question.members.clear()
        self._work.body.release()

    @property
    def _echo(self) -> str | None:
        return self._exchange.model if self._work.plan.route.model_echo else None

    def _replayed(self, lease: Lease) -> Attempt:
        attempt = self._work.attempt(self._exchange, lease, None)
        attempt.seam = self._seam = Replayed(self._said, self._first, self._echo)
        return attempt

    async def _continued(self, lease: Lease) -> Attempt:
        """Return a question that goes on; raises as `attempt` does."""
        work, question, said, engine = self._work, self._question, self._said, self._pool.config.engine
        model = work.model_for(lease.member)
        try:
            async with asyncio.timeout_at(self._counts_until()), Tokenizer(lease.member) as tokenizer:
                behind = await self._counted(tokenizer, model)
        except TimeoutError:
            raise NoTokens from None
        except RefusedTokens as refused:
            raise UpstreamAnsweredError(refused.status, refused.headers, refused.body, safe_elsewhere=True) from None
        body = body_of(engine, question, said, model, behind, work.dropped)
        attempt = work.continuing(self._exchange, lease, body, self._metering(len(behind.tokens)))
        envelope = work.envelope
        attempt.seam = self._seam = Continued(
            said,
            self._first,
            self._echo,
            question.place,
            behind,
            shows_usage=envelope.include_usage,
            shows_running=envelope.continuous_usage,
            hides_usage=work.metering.hide_usage,
            shows_timings=bool(question.get("timings_per_token")),
        )
        return attempt

    @property
    def _has_others(self) -> bool:
        """Whether another sibling than the one that is asked may be."""
        left = [member for member in self._pool.members if member.endpoint not in self._tried]
        return len(left) > 1 and self._pool.may_retry()

    def _counts_until(self) -> float:
        """Return until when a sibling may count: half of what is left, and all of that where there is no other."""
        now = self._client.loop.time()
        self._count_until = min(self._count_until, now + _COUNTING_S)
        return (now + self._count_until) / 2 if self._has_others else self._count_until

    async def _counted(self, tokenizer: Tokenizer, model: str) -> Behind:
        """Return the prompt of a question that goes on, as its tokenizer counts it.

        Raises: `NotResumed`, and as `Tokenizer.ask` does.
        """
        question, said, engine = self._question, self._said, self._pool.config.engine
        tokens = await _ids(tokenizer, text_question(engine, model, said.written(question.place)))
        require_tokens(tokens, self._first)
        if not question.is_chat:
            return Behind(tokens, None)
        of_prompt = prompt_question(question, model)
        if engine == "llamacpp":
            opening = rendered_in(await tokenizer.ask("apply-template", of_prompt))
            require_thoughts(said, opening)
            whole = rendered_question(opening + said.written(question.place))  # it reads them as one text
            return Behind(tokens, len(await _ids(tokenizer, whole)))
        prompt = await _ids(tokenizer, of_prompt)
        opening = text_in(await tokenizer.ask("detokenize", opening_question(model, prompt)))
        require_thoughts(said, opening)
        if engine == "sglang":  # it reads the message apart from the rest
            length = len(prompt) + len(tokens)
            return Behind(tokens, length, thoughts=await self._thoughts(tokenizer, model, len(tokens)))
        behind = await self._by_messages(tokenizer, model, tokens, prompt)
        if behind is None:
            behind = self._by_ids(tokens, prompt)
            read = text_in(await tokenizer.ask("detokenize", opening_question(model, prompt, tokens)))
            if read != opening + said.written(question.place):
                raise NotResumed("tokenizer")  # whose ids are not what was said
        return behind

    async def _thoughts(self, tokenizer: Tokenizer, model: str, tokens: int) -> int:
        """Return how many of the tokens that were said are thoughts, with their end; raises as `Tokenizer.ask` does."""
        said, place = self._said, self._question.place
        if said.thought_is_over(place):
            thoughts = text_question(self._pool.config.engine, model, said.thoughts + THOUGHT_ENDS)
            return len(await _ids(tokenizer, thoughts))
        return tokens if said.thoughts else 0

    async def _by_messages(
        self, tokenizer: Tokenizer, model: str, tokens: list[int], prompt: list[int]
    ) -> Behind | None:
        """Return vLLM's prompt of messages and flags, None where these do not make it; raises as `_counted`."""
        if self._said.thoughts:
            return None
        try:
            whole = await _ids(tokenizer, whole_question(self._question, self._said, model))
        except RefusedTokens as refused:
            if refused.status != 400:
                raise
            return None  # its template does not show the message
        return by_messages(tokens, prompt, whole)

    def _by_ids(self, tokens: list[int], prompt: list[int]) -> Behind:
        """Return vLLM's prompt by its ids; raises `NotResumed`."""
        if self._first.source is UsageSource.RUNNING and self._first.prompt_tokens != len(prompt):
            raise NotResumed("prompt")
        return by_ids(self._question, tokens, prompt)

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


async def _ids(tokenizer: Tokenizer, question: bytes) -> list[int]:
    """Return the ids that a tokenizer answers, however many; raises `NotResumed`, and as `Tokenizer.ask` does."""
    document = await tokenizer.ask("tokenize", question)
    ids: list[int] = []
    await in_steps(ids_in(document, ids))
    return ids
