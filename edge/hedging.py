"""A second endpoint for a stream whose first byte is late: two are asked, and the client gets what begins first.

The second attempt is one of the same request as any other: `forwarding.py` takes over its lease and its answer once the
first one is out. Until then it runs in a task of its own, and tells the exchange nothing. What decides is the first
byte that the client would get, a heartbeat too, or an error that no other endpoint would be asked for. Then the other
attempt is closed in the same call, its place is free, and it says nothing of its endpoint.

Only a stream is asked twice, since any other answer begins when all of it is written. Sources: Dean and Barroso, "The
Tail at Scale", 2013, for the percentile; finagle's backup requests, for the budget.
"""

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any, NamedTuple, Self

from edge.attempt import Work
from edge.client.connection import ClientConnection
from edge.config.delays import HEDGED_BYTES
from edge.errors import EdgeError
from edge.exchange import Choice, End, Exchange, Hedged
from edge.judgement import is_answer, judge_failure, note_cut
from edge.relay.relay import Relay, relay
from edge.relay.terms import Attempt, UpstreamAnsweredError
from edge.relay.terms import Settlement as Owed
from edge.settlement import Settlement
from edge.upstream.endpoints import Endpoint, Lease
from edge.upstream.health import Verdict
from edge.upstream.pools import Pool
from edge.upstream.prefixes import Prefix
from edge.wire.connections import UpstreamConnection


def may_hedge(work: Work, lease: Lease) -> bool:
    """Return whether a request of a plan with hedges may have one: a short one that did not wait for its place."""
    return work.envelope.stream and lease.turn is None and len(work.body.data) <= HEDGED_BYTES


class Outrun(Exception):
    """The answer of the other endpoint has begun, or it has refused the request."""


class _Asked(NamedTuple):
    """What an exchange says of the endpoint that is asked."""

    endpoint: str
    choice: Choice | None
    upstream_model: str
    upstream_id: str
    asked_at: float

    @classmethod
    def now(cls, exchange: Exchange, endpoint: Endpoint) -> Self:
        """Return it of an endpoint for which an attempt was just made."""
        return cls(endpoint.authority, exchange.choice, exchange.upstream_model, exchange.upstream_id, time.monotonic())

    def put(self, exchange: Exchange) -> None:
        (
            exchange.endpoint, exchange.choice, exchange.upstream_model, exchange.upstream_id, exchange.asked_at,
        ) = self  # fmt: skip


class _Lane:
    """One of the two attempts; `relay` while its endpoint is asked, `hedge` while the race is open."""

    __slots__ = ("asked", "hedge", "lease", "relay")

    def __init__(self, hedge: "Hedge", lease: Lease) -> None:
        self.hedge: Hedge | None = hedge
        self.lease = lease
        self.relay: Relay | None = None
        self.asked: _Asked

    def relay_of(
        self, exchange: Exchange, client: ClientConnection, attempt: Attempt, settlement: Owed
    ) -> "_RacingRelay":
        """Return what passes the answer on, unless the other attempt begins first."""
        return _RacingRelay(self, exchange, client, attempt, settlement)

    def attach(self, relay: Relay | None) -> None:
        """Have a relay that is to know what the client does."""
        self.relay = relay
        if self.hedge is not None:
            self.hedge.listen(self)

    def win(self) -> None:
        """Be the one that the client gets."""
        if self.hedge is not None:
            self.hedge.decide(self)

    def began(self, streamed: bool) -> None:
        """Note the first byte of the answer, which may be held."""
        self.lease.first_byte(streamed)
        if self.hedge is not None:
            self.hedge.decide(self)
            self.hedge.measure()


class _RacingRelay(Relay):
    """The relay of one of the two attempts: of the client it is told by its lane."""

    __slots__ = ("_lane",)

    def __init__(
        self,
        lane: _Lane,
        exchange: Exchange,
        client: ClientConnection,
        attempt: Attempt,
        settlement: Owed,
    ) -> None:
        super().__init__(exchange, client, attempt, settlement)
        self._lane = lane

    def send(self, connection: UpstreamConnection) -> "asyncio.Future[None]":
        """Send the request; return what is done when its answer is over."""
        done = super().send(connection)
        self._lane.attach(self)
        return done

    def open(self, status: int) -> Callable[[bytes], None]:
        """Let the client have bytes from now on, of this answer and of no other."""
        self._lane.win()
        return super().open(status)

    def close(self) -> None:
        """Let go of everything, however the request ended, but of a client that is not told to this one."""
        client, attached = self._client, self._client.answering
        super().close()
        if attached is not None and attached is not self:
            client.attach(attached)
        self._lane.attach(None)


class Hedge:
    """The two attempts of one request; while nothing is decided this is the client's running answer."""

    begun = False

    def __init__(
        self,
        work: Work,
        pool: Pool,
        exchange: Exchange,
        client: ClientConnection,
        settlement: Settlement,
        prefix: Prefix | None,
    ) -> None:
        self._work = work
        self._pool = pool
        self._exchange = exchange
        self._client = client
        self._settlement = settlement
        self._prefix = prefix
        self._first: _Lane
        self._second: _Lane | None = None  # while it is asked
        self._winner: _Lane | None = None
        self._is_out = False  # the first one, and the second is the request's attempt
        self._is_measured = pool.first_bytes is None  # or the first one failed, and shows no time
        self._missing: Lease | None = None  # of a second endpoint that answered 404, which counts if the first answers
        self._takes_budget = False
        self._is_closed = False
        self._attempts: list[Attempt] = []
        self._task: asyncio.Task[None] | None = None
        self._scope = asyncio.timeout(None)
        self._timer: asyncio.TimerHandle | None = None

    # --- the request's own task

    async def relay(self, lease: Lease) -> None:
        """Pass on the answer of the endpoint of a lease, as `relay` does; raises `Outrun` too."""
        if self._is_out:
            assert self._task is not None  # which asks it
            await self._task
            return
        first = self._first = _Lane(self, lease)
        asking, after_s = self._asking(first), self._pool.hedge_after_s
        first.asked.put(self._exchange)
        if after_s is not None:
            self._timer = self._client.loop.call_later(after_s, self._ask_second)
        try:
            async with self._scope:
                await asking
        except (TimeoutError, EdgeError, UpstreamAnsweredError):  # the first: of the time that `_outrun` sets
            if self._winner in (None, first):
                raise
            raise Outrun from None  # also where it failed in the turn of the loop in which the other one began
        finally:
            self._stop_timer()

    def _asking(self, lane: _Lane) -> Coroutine[Any, Any, None]:
        """Return what asks the endpoint of a lane, and passes its answer on."""
        exchange, lease = self._exchange, lane.lease
        attempt = self._work.attempt(exchange, lease, None)
        self._attempts.append(attempt)
        attempt.began, lane.asked = lane.began, _Asked.now(exchange, lease.endpoint)
        return relay(exchange, self._client, lease.endpoint.connections, attempt, self._settlement, lane.relay_of)

    @property
    def runs(self) -> bool:
        """Whether the second endpoint is asked, and will be the request's next attempt once the first is out."""
        return self._second is not None and not self._is_out

    def lease(self) -> Lease:
        """Return the lease of the second endpoint, which is the caller's from now on."""
        second, hedge = self._second, self._exchange.hedge
        assert second is not None  # it runs
        assert hedge is not None  # as does this
        self._is_out = True
        self._give_budget_back()
        if self._winner is None:  # the first one failed
            self._is_measured = True
            hedge.outcome = "failed"
            self._tell_of(second)
        return second.lease

    def close(self) -> None:
        """Cut what still runs, however the request ended."""
        self._stop_timer()
        end = self._exchange.end
        if self._second is not None and not self._is_out:
            if end is End.UPSTREAM_ERROR:  # the first one answered with an error
                self._drop(self._second, "lost")
            else:
                self._drop(self._second, "left", end or End.CLIENT_GONE)
        if self._missing is not None and end is End.COMPLETE:
            self._missing.report(Verdict.FAULT)
        if self._client.answering is self:
            self._client.attach(None)
        self._first.hedge = self._task = None  # a circle of references lives until it is collected
        if self._second is not None:
            self._second.hedge = None
        for attempt in self._attempts:
            attempt.body = ()
        if self._exchange.hedge is not None and not self._is_closed:
            self._pool.hedges[self._exchange.hedge.outcome] += 1
        self._is_closed = True

    # --- the second endpoint

    def _ask_second(self) -> None:
        """Ask another endpoint as well, unless that would be one too many."""
        pool, exchange, user = self._pool, self._exchange, self._work.plan.caller.principal.user
        self._timer = None
        if pool.waiting:
            exchange.hedge = Hedged("queue")
            return
        if not pool.may_retry():
            exchange.hedge = Hedged("budget")
            return
        lease = pool.beside(self._first.lease.endpoint, self._prefix, user)
        if lease is None:
            exchange.hedge = Hedged("member")
            return
        exchange.hedge = Hedged("left", is_asked=True)
        pool.retrying += 1
        self._takes_budget = True
        lease.hold()
        second = self._second = _Lane(self, lease)
        asking = self._asking(second)
        self._first.asked.put(exchange)
        self._task = self._client.loop.create_task(asking, name="hedge")
        self._task.add_done_callback(self._second_ended)

    def _second_ended(self, task: asyncio.Task[None]) -> None:
        """Take that the second endpoint failed while the first one is asked; all else who awaits the task is told."""
        error = None if task.cancelled() else task.exception()  # seen: else the loop would complain
        second, exchange = self._second, self._exchange
        if error is None or second is None or self._winner is not None or self._is_out:
            return
        if not isinstance(error, EdgeError | UpstreamAnsweredError) or is_answer(exchange, error):
            self.decide(second)
            return
        second.asked.put(exchange)
        judge_failure(exchange, second.lease, self._pool, error, another_runs=True)
        if isinstance(error, UpstreamAnsweredError) and error.status == 404:
            self._missing = second.lease
        self._first.asked.put(exchange)
        self._leave(second, "failed")

    def _drop(self, second: _Lane, outcome: str, end: End | None = None) -> None:
        """Cut the second attempt: it was outrun, or its request has come to an `end`."""
        note_cut(self._exchange, second.lease, second.asked.asked_at, end)
        if second.relay is not None:
            second.relay.lose()
        if self._task is not None:
            self._task.cancel()
        self._leave(second, outcome)

    def _leave(self, second: _Lane, outcome: str) -> None:
        """Let go of the second endpoint."""
        hedge = self._exchange.hedge
        assert hedge is not None  # it was asked
        hedge.outcome = outcome
        second.hedge = self._second = self._task = None
        self._give_budget_back()
        with second.lease:  # which gives its place back
            pass

    def _outrun(self, second: _Lane) -> None:
        """Cut the first attempt, on which the request's own task waits."""
        first = self._first
        note_cut(self._exchange, first.lease, first.asked.asked_at)
        if first.relay is not None:
            first.relay.lose()
        self._scope.reschedule(0.0)
        self._tell_of(second)

    def _tell_of(self, second: _Lane) -> None:
        """Let the exchange tell of the second endpoint, which stands for the request from now on."""
        exchange = self._exchange
        assert exchange.hedge is not None  # it is asked
        second.asked.put(exchange)
        waited_s = exchange.hedge.waited_s = second.asked.asked_at - self._first.asked.asked_at
        exchange.waited_s += waited_s

    def _give_budget_back(self) -> None:
        self._pool.retrying -= self._takes_budget
        self._takes_budget = False

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # --- the race, as its lanes tell of it

    def decide(self, winner: _Lane) -> None:
        """Give the client the attempt that begins first, and cut the other in this same call."""
        second = self._second
        if self._winner is not None:
            return
        self._winner = winner
        self._stop_timer()
        if winner is second:
            if not self._is_out:
                self._outrun(second)
            assert self._exchange.hedge is not None  # it was asked
            self._exchange.hedge.outcome = "won"
            self._give_budget_back()
        elif second is not None:
            self._drop(second, "lost")
        self._client.attach(winner.relay)

    def measure(self) -> None:
        """Note how long the first endpoint took to begin, or had taken when it was outrun."""
        if not self._is_measured and self._pool.first_bytes is not None:
            self._is_measured = True
            self._pool.first_bytes.note(time.monotonic() - self._first.asked.asked_at)

    def listen(self, lane: _Lane) -> None:
        """Know what the client does while nothing is decided; then who has won does."""
        if self._winner is None:
            runs = any(each is not None and each.relay is not None for each in (self._first, self._second))
            self._client.attach(self if runs else None)
            return
        if lane is not self._winner and lane.relay is not None:
            lane.relay.lose()  # its connection was made in the turn of the loop in which it was outrun
        self._client.attach(self._winner.relay)

    # --- the client: `Answering`

    def cut(self) -> None:
        """End both because the edge has to stop."""
        first, second = self._first.relay, self._second
        if first is not None and second is not None and not self._is_out:
            self._drop(second, "left", End.DRAINED)
        elif second is not None and second.relay is not None:
            second.relay.cut()
        if first is not None and not self._is_out:
            first.cut()

    def client_paused(self) -> None:
        """Nothing is written that could wait."""

    def client_resumed(self) -> None:
        """Nothing is written that could go on."""

    def client_gone(self) -> None:
        """Close both upstreams in this same call."""
        if self.runs and self._second is not None:
            self._drop(self._second, "left", End.CLIENT_GONE)
        for lane in (self._first, self._second):
            if lane is not None and lane.relay is not None:
                lane.relay.client_gone()
