"""An accepted request on its way: to an endpoint, and to another one where that may help.

    lease -> send -> relay

`Forwarder.forward` is the only loop over endpoints. A retry takes another one for an attempt that failed, `hedging.py`
asks a second one beside one that is slow, `resuming.py` goes on elsewhere with a stream that broke.
"""

import asyncio
import time
from dataclasses import dataclass, field
from typing import Final

from edge import errors
from edge.attempt import Work
from edge.client.connection import Request
from edge.errors import EdgeError
from edge.exchange import End, Exchange
from edge.hedging import Hedge, Outrun, may_hedge
from edge.judgement import given_up, is_answer, judge_answer, judge_failure, judge_interruption
from edge.keys.authenticator import Authenticator
from edge.operations import STORED_RESPONSE, Operation
from edge.relay.delivered import Interrupted
from edge.relay.relay import relay
from edge.relay.terms import FailedInStream, UpstreamAnsweredError
from edge.resume.rules import NotResumed
from edge.resuming import Resumption
from edge.routing import Match
from edge.settlement import Settlement
from edge.upstream.endpoints import Endpoint, Endpoints, Lease
from edge.upstream.kept_responses import KeptResponses
from edge.upstream.pools import Pool
from edge.upstream.prefixes import Prefix
from edge.upstream.queueing import Demand

_COMPLETE: Final = End.COMPLETE


@dataclass(slots=True, eq=False)
class Forwarder:
    """Passes accepted requests to endpoints."""

    _endpoints: Endpoints
    _kept: KeptResponses
    _authenticator: Authenticator
    long_body: asyncio.Lock = field(default_factory=asyncio.Lock)  # one at a time: ten would be ten steps in one go

    async def forward(self, request: Request, exchange: Exchange, work: Work, settlement: Settlement) -> None:
        """Pass the request to an endpoint, or to another one while the budget of retries allows."""
        tried: list[Endpoint] = []
        beside: tuple[Endpoint, ...] = ()  # which failed beside the one that is asked
        failure: EdgeError | None = None
        missing: Lease | None = None  # of the endpoint that answered 404, which counts if another one answers
        plan, operation = work.plan, exchange.operation
        pool, user = plan.pool, plan.caller.principal.user
        prefix: Prefix | None = None
        hedge: Hedge | None = None  # of a stream whose first byte is late
        resumption: Resumption | None = None  # of a stream that broke
        if plan.by_prefix and pool is not None and pool.reads_prompts:
            prefix = await work.prefix(user, pool)
        work.envelope.let_go()
        try:
            while True:
                try:
                    lease: Lease | None
                    if resumption:
                        lease = resumption.lease(tried, prefix, user)
                    elif hedge:
                        lease = hedge.lease()
                    elif pool is None:
                        lease = _instance_of(self._endpoints, plan.match, operation)
                    elif work.keeper is not None:
                        lease = pool.lease_of_keeper(work.keeper, tried, user, prefix)
                    else:
                        lease = pool.lease(tried, prefix, user)
                        if lease is None and not tried:  # all are full, and a retry does not wait
                            lease = await _place_in(pool, exchange, user, prefix, work.demand())
                            settlement.turn = lease.turn
                            await self.check_again(work, lease)
                except errors.UpstreamUnavailable as unavailable:
                    raise given_up(exchange, failure or unavailable) from None
                if lease is None:
                    raise given_up(exchange, failure)
                endpoint, attempt = lease.endpoint, None
                keep = work.keep(self._kept, exchange.model, lease) if operation.keeps else None
                if plan.hedges and may_hedge(work, lease) and not (tried or hedge or resumption):
                    assert pool is not None  # which has the setting
                    hedge = Hedge(work, pool, exchange, request.connection, settlement, prefix)
                try:
                    with lease:  # a place that was waited for is counted already
                        if hedge:
                            await hedge.relay(lease)
                        else:
                            if resumption:
                                attempt = await resumption.attempt(lease)
                            else:
                                attempt = work.attempt(exchange, lease, keep)
                            if tried:
                                exchange.retries += 1
                            exchange.endpoint, exchange.asked_at = endpoint.authority, time.monotonic()
                            await relay(exchange, request.connection, endpoint.connections, attempt, settlement)
                    judge_answer(exchange, lease, missing, resumption.difference if resumption else "")
                    if exchange.method == "DELETE" and exchange.end is _COMPLETE:
                        self._kept.forget(user, work.head.asked.response_id)
                    return
                except Interrupted as interrupted:
                    judge_interruption(exchange, lease, interrupted.how)
                    assert pool is not None  # else nothing would have been kept
                    resumption = Resumption(work, pool, exchange, request.connection, settlement, interrupted)
                    await resumption.read(self.long_body)
                    elsewhere = True
                except Outrun:
                    continue
                except FailedInStream as failed:
                    judge_failure(exchange, lease, pool, failed.error)
                    return
                except (EdgeError, UpstreamAnsweredError) as error:
                    rivals = hedge is not None and hedge.runs
                    waits = rivals and not is_answer(exchange, error)  # which would be for both
                    failure, elsewhere = judge_failure(exchange, lease, pool, error)
                    elsewhere = waits if rivals else elsewhere
                    if isinstance(error, UpstreamAnsweredError) and error.status == 404 and (attempt or hedge):
                        missing = lease
                finally:
                    if attempt is not None:  # a failure keeps this frame until it is collected, and no prompt with it
                        attempt.body = ()
                    if resumption:
                        resumption.note()
                    if hedge and not hedge.runs:
                        hedge.close()
                        beside, hedge = hedge.failed, None
                if not elsewhere:
                    raise given_up(exchange, failure) if resumption is None else NotResumed(exchange.resume)
                if pool is not None and not tried:
                    pool.retrying += 1
                tried += (endpoint, *beside)
        except NotResumed as refused:
            assert resumption is not None  # who refuses
            exchange.resume = refused.reason
            resumption.interrupted.close(settlement)
        except asyncio.CancelledError:
            if resumption is None or not resumption.interrupted.is_cut:
                raise
            resumption.interrupted.close(settlement)
        finally:
            if hedge:
                hedge.close()
            if pool is not None and tried and not (resumption and resumption.is_answered):
                pool.retrying -= 1
            failure = resumption = None  # whose tracebacks have this frame
            if work.delivered is not None:
                work.delivered.release()

    async def check_again(self, work: Work, lease: Lease | None = None) -> None:
        """Raise, and give the place back, where the key of a request that waited is good no more."""
        credential = work.head.credential
        assert credential is not None  # by which the caller was found
        try:
            await self._authenticator.check(credential, work.plan.model)
        except BaseException:
            if lease is not None:
                lease.give_back()
            raise


def _instance_of(endpoints: Endpoints, match: Match, operation: Operation) -> Lease:
    """Return a lease of a user's own instance; raises `ModelNotFound`, `UpstreamUnavailable`."""
    route = match.route
    assert route.instance is not None  # a route has a pool or this
    most = route.max_inflight if operation is not STORED_RESPONSE else None  # what a full one keeps, it alone has
    try:
        return endpoints.instance(match.filled(route.instance), route.engine, most)
    except ValueError:
        raise errors.ModelNotFound.named("of that name") from None


async def _place_in(pool: Pool, exchange: Exchange, user: str, prefix: Prefix | None, demand: Demand) -> Lease:
    """Return a lease of a full pool, once it is this request's turn; raises `UpstreamUnavailable`."""
    with exchange.queueing():
        return await pool.wait(user, prefix, demand)
