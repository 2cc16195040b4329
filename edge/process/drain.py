"""The end of the process: unready, no new connection, a wait for answers, and a cut of those that take too long."""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, Final

from edge.client.server import ClientServer
from edge.config.process_settings import ServerConfig
from edge.stage import Lifecycle, Stage

_log = logging.getLogger(__name__)

GRACE_S: Final = 10.0  # what a stop may take beyond `drain_timeout`, and from a second signal on
_CUT_GRACE_S: Final = 1.0  # for the last bytes of cut answers, and for the end of aborted connections


class Drain:
    """Moves the process from one stage to the next, once it is asked to stop.

    `within` sets the last moment of the process, in seconds from the call; the earliest counts.
    """

    def __init__(self, lifecycle: Lifecycle, within: Callable[[float], None]) -> None:
        self._lifecycle = lifecycle
        self._within = within
        self._asked = asyncio.Event()
        self._hurried = asyncio.Event()

    def stop(self) -> None:
        """Begin to drain; each further call ends what is waited for."""
        if self._asked.is_set():
            self._within(GRACE_S)
            self._hurried.set()
        else:
            self._asked.set()

    async def asked(self) -> None:
        """Wait until the process is asked to stop."""
        await self._asked.wait()

    @property
    def is_hurried(self) -> bool:
        """Whether a further signal has ended what is waited for now."""
        return self._hurried.is_set()

    async def run(self, server: ServerConfig, clients: ClientServer, listeners: Iterable[asyncio.Server]) -> None:
        """Stop without hurting anybody, and return when no client is connected, or none that can be got rid of."""
        try:
            await self._run(server, clients, listeners)
        finally:
            self._hurried.clear()  # the parts have their time all the same

    async def _run(self, server: ServerConfig, clients: ClientServer, listeners: Iterable[asyncio.Server]) -> None:
        self._within(server.shutdown_delay_s + server.drain_timeout_s + GRACE_S)
        self._lifecycle.stage = Stage.DRAINING
        for client in clients.clients:
            client.be_last()
        busy = sum(client.busy for client in clients.clients)
        _log.info("draining: %d requests, %d connections", busy, clients.open_connections)
        await self.until(asyncio.sleep(server.shutdown_delay_s))
        self._lifecycle.stage = Stage.CLOSING
        for listener in listeners:
            listener.close()
        for client in clients.clients:
            client.leave_soon()
        for arrival in clients.arrivals:
            arrival.leave_soon()
        if await self.until(clients.wait_empty(), server.drain_timeout_s):
            return
        self._hurried.clear()
        _log.warning("drain: %d connections are cut", clients.open_connections)
        _cut(clients)
        if await self.until(clients.wait_empty(), _CUT_GRACE_S):
            return
        self._hurried.clear()
        self._lifecycle.stage = Stage.CUTTING
        _cut(clients)  # answers that began since: an abort alone would look as if their clients had left
        for client in list(clients.clients):
            client.abort()
        await self.until(clients.wait_empty(), _CUT_GRACE_S)

    async def until(self, waiting: Coroutine[Any, Any, object], patience_s: float | None = None) -> bool:
        """Wait for something, `patience_s` at most and not past a further signal; return whether it came."""
        loop = asyncio.get_running_loop()
        awaited = loop.create_task(waiting, name="drain")
        hurry = loop.create_task(self._hurried.wait(), name="further signal")
        try:
            await asyncio.wait((awaited, hurry), timeout=patience_s, return_when=asyncio.FIRST_COMPLETED)
            return awaited.done()
        finally:
            awaited.cancel()
            hurry.cancel()


def _cut(clients: ClientServer) -> None:
    """End every answer that is being passed on, and what waits for another request."""
    for client in list(clients.clients):
        client.last = True  # whatever its head promised
        if client.answering is not None:
            client.answering.cut()
        elif not client.busy:
            client.force_close()
    for arrival in list(clients.arrivals):
        arrival.give_way()
