"""Health checks, behind the requests: one task for each endpoint of a pool with `health`."""

import asyncio
import contextlib
import logging
import random
from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

from aiohttp import ClientError, ClientSession, ClientTimeout, TCPConnector

from edge.outage import Outage
from edge.tasks import end_tasks
from edge.upstream.endpoints import Endpoint
from edge.upstream.engines import ENGINES
from edge.upstream.pools import Pool

_log = logging.getLogger(__name__)

_TIMEOUT_S: Final = 5.0  # an engine answers late while it prefills a long prompt, and is well
_JITTER: Final = 0.1  # of the interval, so that many edges do not ask at once
_A_STEP: Final = 100  # pools, or probes


class _Probe(NamedTuple):
    """What is asked of whom; equal ones go on across a reload."""

    endpoint: Endpoint
    paths: tuple[str, ...]
    interval_s: float
    api_key: str | None


class HealthProbes:
    """Runs the probes of a generation's pools."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._tasks: dict[_Probe, asyncio.Task[None]] = {}
        self._outages: dict[Endpoint, Outage] = {}
        self._session: ClientSession | None = None

    def __len__(self) -> int:
        return len(self._tasks)

    def apply(self, pools: Iterable[Pool]) -> Iterator[None]:
        """Probe what these pools ask for, and nothing else any more, in steps; one call ends before the next begins."""
        wanted, probed = dict[_Probe, None](), set[Endpoint]()
        for number, pool in enumerate(list(pools)):
            health = pool.config.health
            if health is not None:
                paths = (health.path,) if health.path is not None else ENGINES[pool.config.engine].health_paths
                for member in pool.members:
                    wanted[_Probe(member.endpoint, paths, health.interval_s, member.config.api_key)] = None
                    probed.add(member.endpoint)
            if number % _A_STEP == _A_STEP - 1:
                yield
        for number, probe in enumerate(list(self._tasks)):
            if probe not in wanted:
                self._tasks.pop(probe).cancel()
                if probe.endpoint not in probed:
                    self._outages.pop(probe.endpoint, None)
                    probe.endpoint.health.probed(
                        healthy=True, now=self._loop.time()
                    )  # no probe any more, so its answers alone count
            if number % _A_STEP == _A_STEP - 1:
                yield
        for number, probe in enumerate(wanted):
            if probe not in self._tasks:
                name = f"probe {probe.endpoint.authority}"
                self._tasks[probe] = self._loop.create_task(self._watch(probe), name=name)
            if number % _A_STEP == _A_STEP - 1:
                yield

    async def _watch(self, probe: _Probe) -> None:
        endpoint = probe.endpoint
        fails, passes = f"{endpoint} fails its health check", f"{endpoint} passes its health check again"
        outage = self._outages.setdefault(endpoint, Outage(_log, fails, passes))
        while True:
            failure = await self._ask(probe)
            endpoint.health.probed(healthy=not failure, now=self._loop.time())
            if failure:
                endpoint.note_fault("", f"health check: {failure}")
            if endpoint.health.fails_probes:
                outage.down(failure, logging.WARNING)
            elif not failure:
                outage.up(logging.INFO)
            await asyncio.sleep(probe.interval_s * random.uniform(1 - _JITTER, 1 + _JITTER))

    async def _ask(self, probe: _Probe) -> str:
        """Return why the endpoint is not well, "" when it is."""
        if self._session is None:
            # A connection of its own for each probe: a kept one would prove that the connection is well.
            self._session = ClientSession(
                connector=TCPConnector(force_close=True, limit=0), timeout=ClientTimeout(total=_TIMEOUT_S)
            )
        url = probe.endpoint.url
        headers = {"Authorization": f"Bearer {probe.api_key}"} if probe.api_key is not None else {}
        tls = probe.endpoint.connections.tls or True
        with contextlib.suppress(ClientError, OSError):
            for path in probe.paths:
                address = f"{url.scheme}://{url.authority}{path}"
                async with self._session.get(address, headers=headers, ssl=tls, allow_redirects=False) as answer:
                    if answer.status != 404 or path is probe.paths[-1]:
                        return "" if 200 <= answer.status < 300 else f"{path} answers {answer.status}"
        return "no answer"

    async def close(self) -> None:
        """End every probe."""
        tasks = list(self._tasks.values())
        self._tasks.clear()
        await end_tasks(tasks)
        if self._session is not None:
            await self._session.close()
