"""Closes the parts of the process: each has its time, and one that hangs is named and costs the others nothing."""

import asyncio
import logging
from collections.abc import Coroutine, Iterable, Mapping
from typing import Any, Final

from edge.process.drain import Drain
from edge.tasks import Hung, end_tasks, names_of

_log = logging.getLogger(__name__)

_BUDGET_S: Final = 7.5  # for all parts; what an end may take in all is stated by `drain.GRACE_S`
_LEAST_S: Final = 0.2  # for a part whose turn comes when that is spent
_CANCEL_S: Final = 0.3  # for a closing that is cancelled


class Ending:
    """The end of the parts of a process, a group after another; `hung` names what did not end."""

    def __init__(self, drain: Drain) -> None:
        self.hung: list[str] = []
        self._drain = drain
        self._loop = asyncio.get_running_loop()
        self._give_up_at = self._loop.time() + _BUDGET_S

    async def end(self, tasks: Iterable[asyncio.Task[Any]]) -> None:
        """End background tasks."""
        try:
            await end_tasks(tasks)
        except Hung as error:
            self.hung += error.names

    async def close(self, patience_s: float, parts: Mapping[str, Coroutine[Any, Any, object]]) -> None:
        """Run the closings of parts, by their names, side by side; a further signal ends the wait for them."""
        late = await self._run(patience_s, parts)
        if not self._drain.is_hurried:
            self.hung += (name for name in late if name not in self.hung)

    async def finish(self, patience_s: float, parts: Mapping[str, Coroutine[Any, Any, object]]) -> None:
        """Run what parts have left to do, as `close` does; it may be cut off, and hangs only if it cannot be."""
        await self._run(patience_s, parts)

    async def _run(self, patience_s: float, parts: Mapping[str, Coroutine[Any, Any, object]]) -> tuple[str, ...]:
        """Return the names of those that were cancelled; note those that this does not end."""
        tasks = [self._loop.create_task(closing, name=name) for name, closing in parts.items()]
        patience_s = max(min(patience_s, self._give_up_at - self._loop.time()), _LEAST_S)
        await self._drain.until(asyncio.wait(tasks), patience_s)
        late = [task for task in tasks if not task.done()]
        try:
            await end_tasks(late, _CANCEL_S)
        except Hung as error:
            self.hung += error.names
        for task in tasks:
            failure = None if task in late or task.cancelled() else task.exception()
            if isinstance(failure, Hung):
                self.hung += failure.names
            elif failure is not None:
                _log.error("stop: closing %s failed", task.get_name(), exc_info=failure)
        return names_of(late)
