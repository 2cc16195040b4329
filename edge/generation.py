"""Everything built from one configuration; a request keeps the generation that it began with."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from edge.config.settings import Config, PoolConfig, RouteConfig
from edge.envelope.steering import NAMES, Names, Rules
from edge.operations import Asked, paths_of
from edge.relay.terms import Timeouts
from edge.routing import RouteTable
from edge.upstream.pools import Pool


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Generation:
    """A configuration in force; `loaded_at` is Unix time.

    `timeouts` are by the name of a route, those of its pool or of its instance; `continuous` are the routes that are
    asked for usage in every frame. `paths` is what each raw path asks for, and `names` are those of members that any
    pool looks for. It is made on any thread; `pools` are put in afterwards, where their endpoints are.
    """

    number: int
    config: Config
    routes: RouteTable
    pools: dict[str, Pool]
    loaded_at: float
    timeouts: dict[str, Timeouts] = field(init=False)
    continuous: frozenset[str] = field(init=False)
    paths: Mapping[str, Asked] = field(init=False)
    names: Names = field(init=False)
    _rules: Mapping[str, Rules] = field(init=False)  # by the name of a pool

    def __post_init__(self) -> None:
        asked = {route.name: self._asked(route) for route in self.config.routes}
        known: dict[Timeouts, Timeouts] = {}
        timeouts = {name: known.setdefault(found, found) for name, found in self._timeouts(asked)}
        continuous = frozenset(name for name, each in asked.items() if each.usage == "continuous")
        object.__setattr__(self, "timeouts", timeouts)
        object.__setattr__(self, "continuous", continuous)
        object.__setattr__(self, "paths", paths_of(self.config.server.operations))
        pools = self.config.pools
        watched = {name for pool in pools.values() for name in pool.refuse_members}
        object.__setattr__(self, "names", Names(watched) if watched else NAMES)
        object.__setattr__(self, "_rules", {name: Rules(pool) for name, pool in pools.items()})

    def dropped(self, route: RouteConfig, names: tuple[str, ...], *, form: bool) -> tuple[str, ...]:
        """Return which members of a body a route's pool does not get; users' own instances get all of them.

        Raises: `InvalidRequest` for one that the pool refuses.
        """
        return self._rules[route.pool].dropped(names, form=form) if route.pool is not None else ()

    def members(self) -> Iterator[tuple[str, str]]:
        """Yield each pool's name with that of each endpoint in it."""
        yield from ((name, member.name) for name, pool in self.pools.items() for member in pool.members)

    def parts(self) -> list[object]:
        """Return what it is made of in large numbers: who holds them decides when they are freed, and how many at once.

        A part comes after what it holds itself.
        """
        config = self.config
        return [*config.routes, *config.pools.values(), *self.routes.parts(), *self.pools.values()]

    def _asked(self, route: RouteConfig) -> PoolConfig | RouteConfig:
        """Return the settings with which a route's endpoints are asked: its pool's, or for an instance its own."""
        return self.config.pools[route.pool] if route.pool is not None else route

    def _timeouts(self, asked: Mapping[str, PoolConfig | RouteConfig]) -> Iterator[tuple[str, Timeouts]]:
        floor = self.config.server.min_client_rate_bytes_per_s
        for name, each in asked.items():
            yield (
                name,
                Timeouts(
                    each.connect_timeout_s, each.first_byte_timeout_s, each.idle_timeout_s, floor,
                    each.max_connection_age_s,
                ),
            )  # fmt: skip
