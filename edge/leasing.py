"""Which endpoint a request goes to where no pool chooses at once: an instance, or a place that is waited for."""

from edge import errors
from edge.exchange import Exchange
from edge.operations import STORED_RESPONSE, Operation
from edge.routing import Match
from edge.upstream.endpoints import Endpoints, Lease
from edge.upstream.pools import Pool
from edge.upstream.prefixes import Prefix
from edge.upstream.queueing import Demand


def instance_of(endpoints: Endpoints, match: Match, operation: Operation) -> Lease:
    """Return a lease of a user's own instance; raises `ModelNotFound`, `UpstreamUnavailable`."""
    route = match.route
    assert route.instance is not None  # a route has a pool or this
    most = route.max_inflight if operation is not STORED_RESPONSE else None  # what a full one keeps, it alone has
    try:
        return endpoints.instance(match.filled(route.instance), route.engine, most)
    except ValueError:
        raise errors.ModelNotFound.named("of that name") from None


async def place_in(pool: Pool, exchange: Exchange, user: str, prefix: Prefix | None, demand: Demand) -> Lease:
    """Return a lease of a full pool, once it is this request's turn; raises `UpstreamUnavailable`."""
    with exchange.queueing():
        return await pool.wait(user, prefix, demand)
