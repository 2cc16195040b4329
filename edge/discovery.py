"""Members by DNS: all addresses of a pool's name, looked up again and again, behind the requests."""

import asyncio
import logging
import random
import socket
from collections.abc import Callable, Iterable
from typing import Final

from edge.config import Url
from edge.upstream import Endpoints, Pool

_log = logging.getLogger(__name__)

_INTERVAL_S: Final = 5.0  # what cluster DNS lets clients keep an answer; getaddrinfo tells no TTL
_JITTER: Final = 0.1  # of the interval, so that many edges do not ask at once
_TIMEOUT_S: Final = 5.0  # a resolver's first server is given up after it (resolv.conf(5))

Addresses = tuple[str, ...]


class Discovery:
    """Follows the names of a generation's pools; the last good answer counts while there is no new one."""

    def __init__(self, endpoints: Endpoints, changed: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._endpoints = endpoints
        self._changed = changed  # called when pools have other members
        self._known: dict[Url, Addresses] = {}
        self._failing: set[Url] = set()
        self._pools: list[Pool] = []
        self._tasks: dict[Url, asyncio.Task[None]] = {}

    def __len__(self) -> int:
        return len(self._tasks)

    async def learn(self, pools: Iterable[Pool]) -> None:
        """Give these pools their members, asking for the names that are new; a name that fails leaves a pool empty."""
        pools = [pool for pool in pools if pool.config.dns is not None]
        names = {pool.config.dns for pool in pools if pool.config.dns is not None}
        await asyncio.gather(*(self._ask(name) for name in names if name not in self._known))
        for pool in pools:
            self._fill(pool)

    def apply(self, pools: Iterable[Pool]) -> None:
        """Follow the names of these pools, and no others any more."""
        self._pools = [pool for pool in pools if pool.config.dns is not None]
        names = {pool.config.dns for pool in self._pools if pool.config.dns is not None}
        for name in self._tasks.keys() - names:
            self._tasks.pop(name).cancel()
            self._known.pop(name, None)
            self._failing.discard(name)
        for name in names - self._tasks.keys():
            self._tasks[name] = self._loop.create_task(self._follow(name), name=f"dns {name.authority}")

    async def _follow(self, name: Url) -> None:
        while True:
            await asyncio.sleep(_INTERVAL_S * random.uniform(1 - _JITTER, 1 + _JITTER))
            before = self._known.get(name)
            await self._ask(name)
            if self._known.get(name) != before:
                for pool in self._pools:
                    if pool.config.dns == name:
                        self._fill(pool)
                self._changed()

    async def _ask(self, name: Url) -> None:
        try:
            addresses = await asyncio.wait_for(look_up(name), _TIMEOUT_S)
        except (OSError, UnicodeError, TimeoutError) as error:
            if name not in self._failing:
                self._failing.add(name)
                kept = "the last answer goes on" if name in self._known else "its pool is empty"
                _log.warning("dns %s cannot be resolved, %s: %s", name.authority, kept, str(error) or "no answer")
            return
        self._failing.discard(name)
        if addresses != self._known.get(name):
            self._known[name] = addresses
            _log.info("dns %s is %s", name.authority, ", ".join(addresses))

    def _fill(self, pool: Pool) -> None:
        name = pool.config.dns
        assert name is not None  # only pools with one are kept
        addresses = self._known.get(name, ())
        pool.replace([self._endpoints.member(Url(name.scheme, each, name.port), None) for each in addresses])

    async def close(self) -> None:
        """End every look-up."""
        tasks = list(self._tasks.values())
        self._tasks.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def look_up(name: Url) -> Addresses:
    """Return all addresses of a name, in a fixed order; raises `OSError` or `UnicodeError`."""
    found = await asyncio.get_running_loop().getaddrinfo(name.host, name.port, type=socket.SOCK_STREAM)
    return tuple(sorted({str(address[0]) for *_, address in found}))
