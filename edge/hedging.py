"""A second endpoint for a stream whose first byte is late: two are asked, and the client gets what begins first.

The second attempt is one of the same request as any other: `forwarding.py` takes over its lease and its answer once the
first one is out. Until then it runs in a task of its own, and writes what comes of it into a copy of the exchange. What
decides is the first byte that the client would get, a heartbeat too, or an error that no other endpoint would be asked
for. Then the other attempt is closed in the same call, its place is free, and it says nothing of its endpoint.

Only a stream is asked twice, since any other answer begins when all of it is written. Sources: Dean and Barroso, "The
Tail at Scale", 2013, for the percentile; finagle's backup requests, for the budget.
"""

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any, Final

from edge.attempt import Work
from edge.client.connection import ClientConnection
from edge.config.delays import HEDGED_BYTES
from edge.errors import EdgeError, UpstreamUnavailable
from edge.exchange import End, Exchange, Hedged, Phase
from edge.judgement import DISPLACED, OUTRUN, is_answer, judge_failure, note_cut
from edge.relay.relay import Relay, relay
from edge.relay.terms import Attempt, UpstreamAnsweredError
from edge.relay.terms import Settlement as Owed
from edge.settlement import Settlement
from edge.upstream.endpoints import Endpoint, Lease
from edge.upstream.health import Verdict
from edge.upstream.pools import Pool
from edge.upstream.prefixes import Prefix
from edge.wire.connections import UpstreamConnection

_WAIT: Final = Phase.WAIT


def may_hedge(work: Work, lease: Lease) -> bool:
    """Return whether a request of a plan with hedges may have one: a short one that did not wait for its place."""
    return work.envelope.stream and lease.turn is None and len(work.body.data) <= HEDGED_BYTES


class Outrun(Exception):
    """The answer of the other endpoint has begun, or it has refused the request."""


class _Lane:
    """One of the two attempts; `relay` while its endpoint is asked, `hedge` while the race is open.

    `exchange` is where it is written what comes of it: the request's, or a copy that nobody else reads.
    """

    __slots__ = ("attempt", "exchange", "hedge", "lease", "relay")

    def __init__(self, hedge: "Hedge", lease: Lease, exchange: Exchange, work: Work) -> None:
        self.hedge: Hedge | None = hedge
        self.lease = lease
        self.exchange = exchange
        self.relay: _RacingRelay | None = None
        self.attempt = work.attempt(exchange, lease, None)
        self.attempt.began = self.began
        exchange.endpoint, exchange.asked_at = lease.endpoint.authority, time.monotonic()

    def relay_of(self, _: Exchange, client: ClientConnection, attempt: Attempt, settlement: Owed) -> "_RacingRelay":
        """Return what passes the answer on, unless the other attempt begins first."""
        return _RacingRelay(self, self.exchange, client, attempt, settlement)

    def attach(self, relay: "_RacingRelay | None") -> None:
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

    def write_to(self, exchange: Exchange) -> None:
        """Write to another exchange from now on."""
        self.exchange = exchange
        if self.relay is not None:
            self.relay.write_to(exchange)

    def lose(self) -> None:
        """Cut the attempt, and let go of what it asked."""
        if self.relay is not None:
            self.relay.lose()
        self.attempt.body = ()


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

    def write_to(self, exchange: Exchange) -> None:
        """Write to another exchange what comes of the answer."""
        self._exchange = exchange
        self._answer.exchange = exchange

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
        self._asked_at = 0.0  # that one
        self._second: _Lane | None = None  # while it is asked
        self._winner: _Lane | None = None
        self._is_out = False  # the first one, and the second is the request's attempt
        self._is_measured = pool.first_bytes is None  # or the first one failed, and shows no time
        self.failed: tuple[Endpoint, ...] = ()  # the second one, while the first was asked
        self._missing: Lease | None = None  # of a second endpoint that answered 404, which counts if the first answers
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
        first = self._first = _Lane(self, lease, self._exchange, self._work)
        self._asked_at, after_s = self._exchange.asked_at, self._pool.hedge_after_s
        if after_s is not None:
            self._timer = self._client.loop.call_later(after_s, self._ask_second)
        try:
            async with self._scope:
                await self._asking(first)
        except (TimeoutError, EdgeError, UpstreamAnsweredError) as error:  # the first: of the time that is set to cut
            if self._winner not in (None, first):  # also where it failed in the turn in which the other one began
                raise Outrun from None
            if isinstance(error, TimeoutError) and self._exchange.end is End.DRAINED:
                raise UpstreamUnavailable("The edge is restarting, try again.", retry_after_s=1) from None
            raise
        finally:
            self._stop_timer()

    def _asking(self, lane: _Lane) -> Coroutine[Any, Any, None]:
        """Return what asks the endpoint of a lane, and passes its answer on."""
        connections = lane.lease.endpoint.connections
        return relay(lane.exchange, self._client, connections, lane.attempt, self._settlement, lane.relay_of)

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
        self._pool.no_duplicate(second.lease)
        if self._winner is None:  # the first one failed
            self._measure_failed()
            hedge.outcome = "failed"
            self._take_over(second)
        return second.lease

    def close(self) -> None:
        """Cut what still runs, however the request ended."""
        self._stop_timer()
        end = self._exchange.end
        self._measure_failed()
        if self._second is not None and not self._is_out:
            if end is End.UPSTREAM_ERROR:  # the first one answered with an error
                self._drop(self._second, "lost")
            else:
                self._end_second(self._second, end or End.CLIENT_GONE)
        if self._missing is not None and end is End.COMPLETE:
            self._missing.report(Verdict.FAULT)
        if self._client.answering is self:
            self._client.attach(None)
        for lane in (self._first, self._second):
            if lane is not None:
                lane.hedge, lane.attempt.body = None, ()  # a circle of references lives until it is collected
        self._task = None
        if self._exchange.hedge is not None:
            self._pool.hedges[self._exchange.hedge.outcome] += 1

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
        exchange.hedge = Hedged("left", exchange.asked_at)
        lease.hold()
        pool.duplicate(lease, self._give_way)
        second = self._second = _Lane(self, lease, exchange.of_another_attempt(), self._work)
        self._task = self._client.loop.create_task(self._asking(second), name="hedge")
        self._task.add_done_callback(self._second_ended)

    def _second_ended(self, task: asyncio.Task[None]) -> None:
        """Take that the second endpoint failed while the first one is asked; all else who awaits the task is told."""
        error = None if task.cancelled() else task.exception()  # seen: else the loop would complain
        second, exchange = self._second, self._exchange
        if error is None or second is None or self._winner is not None or self._is_out:
            return
        own = second.exchange
        if not isinstance(error, EdgeError | UpstreamAnsweredError) or is_answer(own, error):
            self.decide(second)
            return
        judge_failure(own, second.lease, self._pool, error)
        exchange.failures = own.failures
        exchange.upstream_status, exchange.upstream_error = own.upstream_status, own.upstream_error
        if isinstance(error, UpstreamAnsweredError) and error.status == 404:
            self._missing = second.lease
        self.failed = (second.lease.endpoint,)
        self._leave(second, "failed")

    def _give_way(self) -> None:
        """Leave the second endpoint, whose place another request needs."""
        if self._second is not None:
            self._drop(self._second, "room", DISPLACED)

    def _end_second(self, second: _Lane, end: End) -> None:
        """Cut the second attempt, whose request has come to an end."""
        if second.exchange.phase is _WAIT:  # its engine has read the prompt
            self._exchange.phase = _WAIT
        self._drop(second, "left", (end.value, ""))

    def _drop(self, second: _Lane, outcome: str, how: tuple[str, str] = OUTRUN) -> None:
        """Cut the second attempt, as the log shall tell it."""
        note_cut(self._exchange, second.lease, second.exchange.asked_at, *how)
        second.lose()
        if self._task is not None:
            self._task.cancel()
        self._leave(second, outcome)

    def _leave(self, second: _Lane, outcome: str) -> None:
        """Let go of the second endpoint."""
        hedge = self._exchange.hedge
        assert hedge is not None  # it was asked
        hedge.outcome = outcome
        second.attempt.body = ()
        second.hedge = self._second = self._task = None
        self._pool.no_duplicate(second.lease)
        second.lease.give_back()

    def _outrun(self, second: _Lane) -> None:
        """Cut the first attempt, on which the request's own task waits."""
        first = self._first
        asked_at = first.exchange.asked_at
        first.lose()
        self._take_over(second)
        note_cut(self._exchange, first.lease, asked_at, *OUTRUN)
        self._scope.reschedule(0.0)

    def _take_over(self, second: _Lane) -> None:
        """Let the exchange be of the second endpoint, which stands for the request from now on."""
        exchange, own, first_at = self._exchange, second.exchange, self._exchange.asked_at
        exchange.take_over(own)
        exchange.waited_s += exchange.asked_at - first_at
        second.write_to(exchange)
        self._first.write_to(own)  # what still comes of it is nobody's

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
            self._pool.no_duplicate(second.lease)
        elif second is not None:
            self._drop(second, "lost")
        self._client.attach(winner.relay)

    def measure(self) -> None:
        """Note how long the first endpoint took to begin, or had taken when it was outrun."""
        if not self._is_measured and self._pool.first_bytes is not None:
            self._is_measured = True
            self._pool.first_bytes.note(time.monotonic() - self._asked_at)

    def _measure_failed(self) -> None:
        """Note how long the first endpoint had taken whose time was over, or whose client left."""
        window, is_measured, self._is_measured = self._pool.first_bytes, self._is_measured, True
        if is_measured or window is None:
            return
        if self._exchange.end is End.FIRST_BYTE_TIMEOUT:
            window.note(time.monotonic() - self._asked_at)
        elif self._exchange.end is End.CLIENT_GONE:
            window.note_cut(time.monotonic() - self._asked_at)

    def listen(self, lane: _Lane) -> None:
        """Know what the client does while nothing is decided; then who has won does."""
        if self._winner is None:
            runs = any(each is not None and each.relay is not None for each in (self._first, self._second))
            self._client.attach(self if runs else None)
            return
        if lane is not self._winner and lane.relay is not None:
            lane.lose()  # its connection was made in the turn of the loop in which it was outrun
        self._client.attach(self._winner.relay)

    # --- the client: `Answering`

    def cut(self) -> None:
        """End both because the edge has to stop."""
        first, second = self._first, self._second
        self._stop_timer()
        if self._is_out:
            if second is not None and second.relay is not None:
                second.relay.cut()
            return
        if second is not None:
            self._end_second(second, End.DRAINED)
        if first.relay is not None:
            first.relay.cut()
        else:  # it connects
            self._exchange.ended(End.DRAINED)
            self._scope.reschedule(0.0)

    def client_paused(self) -> None:
        """Nothing is written that could wait."""

    def client_resumed(self) -> None:
        """Nothing is written that could go on."""

    def client_gone(self) -> None:
        """Close both upstreams in this same call."""
        self._stop_timer()
        if self.runs and self._second is not None:
            self._end_second(self._second, End.CLIENT_GONE)
        for lane in (self._first, self._second):
            if lane is not None and lane.relay is not None:
                lane.relay.client_gone()
