"""The end of the process: unready, no new connection, a wait for answers, and a cut of those that take too long."""

import asyncio
import logging
from collections.abc import Iterable
from typing import Any, Final

from edge.client.connection import Answering
from edge.client.server import ClientServer
from edge.config.settings import ServerConfig
from edge.stage import Lifecycle, Stage

_log = logging.getLogger(__name__)

_CUT_GRACE_S: Final = 1.0  # for the last bytes of cut answers


class Drain:
    """Moves the process from one stage to the next, once it is asked to stop."""

    def __init__(self, lifecycle: Lifecycle) -> None:
        self._lifecycle = lifecycle
        self._asked = asyncio.Event()
        self._hurried = asyncio.Event()

    def stop(self) -> None:
        """Begin to drain; a second call ends the wait for the balancer and for running answers."""
        if self._asked.is_set():
            self._hurried.set()
        else:
            self._asked.set()

    async def asked(self) -> None:
        """Wait until the process is asked to stop."""
        await self._asked.wait()

    async def run(self, server: ServerConfig, clients: ClientServer, listeners: Iterable[asyncio.Server]) -> None:
        """Stop without hurting anybody, and return when no client is connected."""
        self._lifecycle.stage = Stage.DRAINING
        for client in clients.clients:
            client.be_last()
        busy = sum(client.busy for client in clients.clients)
        _log.info("draining: %d requests, %d connections", busy, len(clients.clients))
        await self._unless_hurried(asyncio.sleep(server.shutdown_delay_s))
        self._lifecycle.stage = Stage.CLOSING
        for listener in listeners:
            listener.close()
        for client in list(clients.clients):
            if not client.busy:
                client.force_close()
        if await self._unless_hurried(asyncio.wait_for(clients.wait_empty(), server.drain_timeout_s)):
            return
        _log.warning("drain: %d connections are cut", len(clients.clients))
        _cut(clients)
        try:
            await asyncio.wait_for(clients.wait_empty(), _CUT_GRACE_S)
        except TimeoutError:
            self._lifecycle.stage = Stage.CUTTING
            _cut(clients)  # answers that began since: an abort alone would look as if their clients had left
            for client in list(clients.clients):
                client.abort()
            await clients.wait_empty()

    async def _unless_hurried(self, waiting: Any) -> bool:
        """Wait, unless a second signal ends it; return whether it came to its own end."""
        loop = asyncio.get_running_loop()
        task = loop.create_task(waiting, name="drain")
        hurry = loop.create_task(self._hurried.wait(), name="second signal")
        await asyncio.wait((task, hurry), return_when=asyncio.FIRST_COMPLETED)
        hurry.cancel()
        if not task.done():
            task.cancel()
            return False
        return task.exception() is None


def _cut(clients: ClientServer) -> None:
    """End every answer that is being passed on."""
    answers: list[Answering] = [client.answering for client in clients.clients if client.answering is not None]
    for answer in answers:
        answer.cut()
