"""Everything built from one configuration; a request keeps the generation that it began with."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from edge.config.settings import Config, PoolConfig
from edge.operations import Asked, paths_of
from edge.relay.terms import Timeouts
from edge.routing import RouteTable
from edge.upstream.pools import Pool

_INSTANCE: Final = PoolConfig("", ())  # instances are asked with a pool's defaults


@dataclass(frozen=True, slots=True)
class Generation:
    """A configuration in force; `loaded_at` is Unix time, `timeouts` are by a pool's name, None for instances.

    `paths` is what each raw path asks for.
    """

    number: int
    config: Config
    routes: RouteTable
    pools: Mapping[str, Pool]
    loaded_at: float
    timeouts: dict[str | None, Timeouts] = field(init=False)
    paths: dict[str, Asked] = field(init=False)

    def __post_init__(self) -> None:
        floor = self.config.server.min_client_rate_bytes_per_s
        pools: dict[str | None, PoolConfig] = {None: _INSTANCE}
        pools |= {name: pool.config for name, pool in self.pools.items()}
        timeouts = {
            name: Timeouts(pool.connect_timeout_s, pool.first_byte_timeout_s, pool.idle_timeout_s, floor)
            for name, pool in pools.items()
        }
        object.__setattr__(self, "timeouts", timeouts)
        object.__setattr__(self, "paths", paths_of(self.config.server.operations))
