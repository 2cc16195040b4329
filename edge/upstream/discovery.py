"""Members by DNS: all addresses of a pool's name, looked up at an interval, behind the requests."""

import asyncio
import logging
import random
import socket
import threading
from collections.abc import Awaitable, Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import Final

from edge.config.values import Url
from edge.names import is_metadata_address
from edge.outage import Outage
from edge.tasks import end_tasks
from edge.upstream.endpoints import Endpoints
from edge.upstream.pools import Pool

_log = logging.getLogger(__name__)

_INTERVAL_S: Final = 5.0  # what cluster DNS lets clients keep an answer; getaddrinfo returns no TTL
_JITTER: Final = 0.1  # of the interval, so that many edges do not ask at once
_TIMEOUT_S: Final = 5.0  # a resolver's first server is given up after it (resolv.conf(5))

Addresses = tuple[str, ...]


class Discovery:
    """Follows the names of a generation's pools; the last good answer counts while there is no new one."""

    def __init__(self, endpoints: Endpoints, changed: Callable[[], Awaitable[None]]) -> None:
        self._loop = asyncio.get_running_loop()
        self._endpoints = endpoints
        self._changed = changed  # called when pools have other members
        self._known: dict[Url, Addresses] = {}
        self._outages: dict[Url, Outage] = {}
        self._pools: dict[Url, list[Pool]] = {}
        self._coming: dict[Url, list[Pool]] = {}  # that got their members, and are followed soon
        self._tasks: dict[Url, asyncio.Task[None]] = {}
        self._asking: dict[Url, asyncio.Task[Addresses]] = {}  # each until its answer comes, however late

    def __len__(self) -> int:
        return len(self._tasks)

    def states(self) -> Iterator[tuple[str, str]]:
        """Yield every name, and why it cannot be resolved now, "" when it can."""
        yield from ((name.authority, outage.reason) for name, outage in self._outages.items())

    async def learn(self, pools: Iterable[Pool]) -> None:
        """Give these pools their members, asking for the names that are new; a name that fails leaves a pool empty."""
        named = _by_name(pools)
        await asyncio.gather(*(self._ask(name) for name in named if name not in self._known))
        self._coming = named
        for name in named:
            self._fill(name, named[name])
            await asyncio.sleep(0)

    def apply(self, pools: Iterable[Pool]) -> None:
        """Follow the names of these pools, and no others any more."""
        self._pools, self._coming = _by_name(pools), {}
        for name in self._tasks.keys() - self._pools.keys():
            self._tasks.pop(name).cancel()
            self._known.pop(name, None)
            self._outages.pop(name, None)
        for name in self._pools.keys() - self._tasks.keys():
            self._tasks[name] = self._loop.create_task(self._follow(name), name=f"dns {name.authority}")

    async def _follow(self, name: Url) -> None:
        while True:
            if name not in self._asking:  # else its answer is late, and taken over when it comes
                await asyncio.sleep(_INTERVAL_S * random.uniform(1 - _JITTER, 1 + _JITTER))
            before = self._known.get(name)
            await self._ask(name)
            if self._known.get(name) != before:
                self._fill(name, (*self._pools[name], *self._coming.get(name, ())))
                await self._changed()

    async def _ask(self, name: Url) -> None:
        """Take over the answer of a name's look-up; a late one goes on, and no other is begun before its end."""
        asking = self._asking.get(name) or self._begin(name)
        dns = f"dns {name.authority}"
        outage = self._outages.setdefault(name, Outage(_log, f"{dns} cannot be resolved", f"{dns} is resolved again"))
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                addresses = await asyncio.shield(asking)
        except (OSError, UnicodeError, RuntimeError) as error:
            kept = "the last answer goes on" if name in self._known else "its pool is empty"
            outage.down(f"{str(error) or 'no answer'}; {kept}", logging.WARNING)
            return
        outage.up(logging.INFO)
        if addresses != self._known.get(name):
            self._known[name] = addresses
            _log.info("%s is %s", dns, ", ".join(addresses))

    def _begin(self, name: Url) -> asyncio.Task[Addresses]:
        def end(asking: asyncio.Task[Addresses]) -> None:
            del self._asking[name]
            if not asking.cancelled():
                asking.exception()  # whoever asked may have gone

        asking = self._asking[name] = self._loop.create_task(look_up(name), name=f"look up {name.authority}")
        asking.add_done_callback(end)
        return asking

    def _fill(self, name: Url, pools: Iterable[Pool]) -> None:
        urls = [Url(name.scheme, address, name.port) for address in self._known.get(name, ())]
        for pool in pools:
            pool.replace([self._endpoints.member(url, pool.config) for url in urls])

    async def close(self) -> None:
        """End every look-up; a thread that still waits for its resolver is left behind."""
        tasks = [*self._tasks.values(), *self._asking.values()]
        self._tasks.clear()
        await end_tasks(tasks)


def _by_name(pools: Iterable[Pool]) -> dict[Url, list[Pool]]:
    named: dict[Url, list[Pool]] = {}
    for pool in pools:
        if pool.config.dns is not None:
            named.setdefault(pool.config.dns, []).append(pool)
    return named


async def look_up(name: Url) -> Addresses:
    """Return all addresses of a name, in a fixed order.

    Each on a thread of its own: the loop has four for all names of the process, and one whose server is dead holds its
    thread for as long as the resolver is patient. A daemon, so that it does not hold the process's end either.
    None at which clouds give a machine's credentials to whoever asks, as for a connection by name.
    Raises: `OSError`, also when no other address is left, `UnicodeError`, or `RuntimeError` when there is no thread to
    be had.
    """
    answer: Future[Addresses] = Future()
    answer.set_running_or_notify_cancel()  # that nobody waits any more ends no look-up
    threading.Thread(target=_resolve, args=(name, answer), name=f"dns {name.authority}", daemon=True).start()
    return await asyncio.wrap_future(answer)


def _resolve(name: Url, answer: Future[Addresses]) -> None:
    """Ask the resolver, on a thread that may wait for it."""
    try:
        found = socket.getaddrinfo(name.host, name.port, type=socket.SOCK_STREAM)
        addresses = {str(address[0]) for *_, address in found}
        kept = sorted(each for each in addresses if not is_metadata_address(each))
        if not kept:
            raise OSError("it leads to nothing but addresses at which clouds keep the credentials of a machine")
        answer.set_result(tuple(kept))
    except Exception as error:  # raised where it is waited for
        answer.set_exception(error)
