"""What a request takes that its head, its caller and its model decide: worked out once, and kept with the head.

A client sends the same head again and again, and mostly asks for the same model. A reload makes another generation, and
a key that was changed, or is looked up again, another caller: then the plan is made anew.
"""

from dataclasses import dataclass, field
from typing import Final, NamedTuple

from edge import errors
from edge.client.head import Head
from edge.config.settings import RouteConfig
from edge.generation import Generation
from edge.keys.caller import Caller
from edge.limits.lines import NO_PATIENCE, Patience, patience_of
from edge.operations import Reads, Reserves
from edge.relay.terms import Timeouts
from edge.routing import HostTable, Match, RouteTable, is_loopback
from edge.upstream.endpoints import Member
from edge.upstream.pools import Pool

_MAX_MEMBERS: Final = 64  # whose heads are kept: those of a name in DNS come and go
_ANSWER, _NOTHING = Reserves.ANSWER, Reserves.NOTHING


class Sent(NamedTuple):
    """What a member is sent with each request of a plan: the model's name, and the head up to the request's id."""

    model: str
    head: bytes


@dataclass(slots=True, eq=False)
class Plan:
    """How the requests of one head go that ask for one model.

    `generation` is the number of the one it was made in, `limits` are the names of the limits that count, () for none,
    which count the prompt's tokens and those of the answer. `asks_for_usage`: a stream is asked for its usage,
    `continuous` in every frame. `by_prefix`: it matters how a prompt begins. `patience` is how long they
    wait for their limits, `share` that of their user in the pool's queue. `tells_timing`: answers say what took their
    time. `resumes`: a stream that breaks may go on elsewhere. `hedges`: a slow one may be asked of two. `sent` is
    what each member is sent, as far as it was asked before.
    """

    generation: int
    caller: Caller
    model: str
    match: Match
    route: RouteConfig
    pool: Pool | None
    timeouts: Timeouts
    limits: tuple[str | None, ...] = ()
    counts_prompt: bool = False
    counts_answer: bool = False
    asks_for_usage: bool = False
    continuous: bool = False
    by_prefix: bool = False
    patience: Patience = NO_PATIENCE
    share: int = 1
    tells_timing: bool = False
    resumes: bool = False
    hedges: bool = False
    sent: dict[Member, Sent] = field(default_factory=dict)

    def keep_sent(self, member: Member, sent: Sent) -> Sent:
        """Keep what a member is sent."""
        if len(self.sent) >= _MAX_MEMBERS:
            self.sent.clear()
        self.sent[member] = sent
        return sent


def plan_for(generation: Generation, head: Head, caller: Caller, model: str, match: Match) -> Plan:
    """Return the plan of requests for a model that the caller may call, whose route is that of `match`."""
    route, operation, limit = match.route, head.asked.operation, caller.principal.limit
    pool = generation.pools[route.pool] if route.pool is not None else None
    is_limited = route.instance is None and (route.limit is not None or limit is not None)
    patience, share = NO_PATIENCE, 1
    if pool is not None and pool.config.queue:
        known = generation.config.limits
        limits = [known[name] for name in (limit, route.limit) if name is not None and name in known]
        shares = (caller.principal.share, *(each.share for each in limits))
        share = next((each for each in shares if each is not None), 1)
        if is_limited:
            patience = patience_of(pool, (each.wait_s for each in limits), head.headers.getall("Prefer", ()))
    return Plan(
        generation.number,
        caller,
        model,
        match,
        route,
        pool,
        generation.timeouts[route.name],
        (route.limit, limit) if is_limited else (),
        operation.reserves is not _NOTHING,
        operation.reserves is _ANSWER,
        (route.metered or route.usage is not None) and operation.takes_usage_options,
        route.name in generation.continuous,
        pool is not None and pool.caches is not None and operation.is_cached,
        patience,
        share,
        generation.config.server.timing,
        pool is not None and pool.config.resume != "off" and operation.reads is Reads.CHUNKS,
        # What is kept, or may use tools of the server, would be so twice: that is `responses`.
        pool is not None and pool.config.hedge_after is not None and operation.is_cached and not operation.keeps,
    )


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
