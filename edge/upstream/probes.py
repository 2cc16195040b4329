"""Ask endpoints whether they are well, behind the requests: one task for each endpoint of a pool with `health`."""

import asyncio
import contextlib
import logging
import random
import ssl
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from aiohttp import ClientError, ClientSession, ClientTimeout, TCPConnector

from edge.config.settings import Engine
from edge.upstream.pools import Endpoint, Pool

_log = logging.getLogger(__name__)

_TIMEOUT_S: Final = 5.0  # an engine answers late while it prefills a long prompt, and is well
_JITTER: Final = 0.1  # of the interval, so that many edges do not ask at once
# Where an engine tells; the first that is there (not a 404) counts. SGLang's /health answers while it loads its model.
_PATHS: Final[dict[Engine, tuple[str, ...]]] = {
    "vllm": ("/health",),
    "sglang": ("/ready", "/health"),
    "llamacpp": ("/health",),
    "openai": (),  # has none: the configuration asks for a path
}


@dataclass(frozen=True, slots=True)
class _Probe:
    """What is asked of whom; equal ones go on across a reload."""

    endpoint: Endpoint
    paths: tuple[str, ...]
    interval_s: float
    api_key: str | None
    tls: ssl.SSLContext | None


class HealthProbes:
    """Runs the probes of a generation's pools."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._tasks: dict[_Probe, asyncio.Task[None]] = {}
        self._session: ClientSession | None = None

    def __len__(self) -> int:
        return len(self._tasks)

    def apply(self, pools: Iterable[Pool]) -> None:
        """Probe what these pools ask for, and nothing else any more."""
        wanted = set()
        for pool in pools:
            health = pool.config.health
            if health is not None:
                paths = (health.path,) if health.path is not None else _PATHS[pool.config.engine]
                for member in pool.members:
                    tls = member.endpoint.connections.tls
                    wanted.add(_Probe(member.endpoint, paths, health.interval_s, member.config.api_key, tls))
        for probe in self._tasks.keys() - wanted:
            self._tasks.pop(probe).cancel()
            if not any(other.endpoint is probe.endpoint for other in wanted):
                probe.endpoint.health.probed(healthy=True)  # nobody looks any more, so its answers alone count
        for probe in wanted - self._tasks.keys():
            name = f"probe {probe.endpoint.authority}"
            self._tasks[probe] = self._loop.create_task(self._watch(probe), name=name)

    async def _watch(self, probe: _Probe) -> None:
        endpoint = probe.endpoint
        while True:
            healthy = await self._ask(probe)
            was_out = endpoint.health.fails_probes
            endpoint.health.probed(healthy)
            if endpoint.health.fails_probes and not was_out:
                _log.warning("endpoint %s fails its health check", endpoint.authority)
            elif was_out and healthy:
                _log.info("endpoint %s passes its health check again", endpoint.authority)
            await asyncio.sleep(probe.interval_s * random.uniform(1 - _JITTER, 1 + _JITTER))

    async def _ask(self, probe: _Probe) -> bool:
        if self._session is None:
            # A connection of its own for each probe: a kept one would prove that the connection is well.
            self._session = ClientSession(
                connector=TCPConnector(force_close=True, limit=0), timeout=ClientTimeout(total=_TIMEOUT_S)
            )
        url = probe.endpoint.url
        headers = {"Authorization": f"Bearer {probe.api_key}"} if probe.api_key is not None else {}
        with contextlib.suppress(ClientError, TimeoutError, OSError):
            for path in probe.paths:
                address = f"{url.scheme}://{url.authority}{path}"
                tls = probe.tls or True
                async with self._session.get(address, headers=headers, ssl=tls, allow_redirects=False) as answer:
                    if answer.status == 404 and path is not probe.paths[-1]:
                        continue
                    return 200 <= answer.status < 300
        return False

    async def close(self) -> None:
        """End every probe."""
        tasks = list(self._tasks.values())
        self._tasks.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._session is not None:
            await self._session.close()
