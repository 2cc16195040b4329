"""Tasks that must end, tasks that must go on, and work in steps.

What loses a cancellation is cancelled again, and what never ends is named.
On CPython 3.11 `asyncio.wait_for` returns as if nothing had happened when it is cancelled in the moment in which what
it waits for is done (https://github.com/python/cpython/issues/86296, put right in 3.12). redis-py sends with it.
"""

import asyncio
import logging
import re
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, Final

_log = logging.getLogger(__name__)

PATIENCE_S: Final = 1.5  # for tasks that are cancelled; what is of any use then takes milliseconds
_AGAIN_S: Final = 0.1  # between two cancellations
_RESTART_PAUSE_S: Final = 1.0  # of what failed
_UNNAMED: Final = re.compile(r"Task-\d+")  # as asyncio calls them: those of connections, and the loop's own


class Hung(Exception):
    """Something of the process does not end; `names` say what, for the log."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = tuple(names)
        super().__init__(", ".join(self.names))


async def end_tasks(tasks: Iterable[asyncio.Task[Any]], patience_s: float = PATIENCE_S) -> None:
    """Cancel tasks, again and again, until each of them is done; what they return or raise is dropped.

    A task that has something to do when it ends must leave that to whoever ends it: it would be cancelled in it.
    Raises: `Hung` with the names of those that are not done in `patience_s`.
    """
    tasks, loop = tuple(tasks), asyncio.get_running_loop()
    give_up_at = loop.time() + patience_s
    while left := [task for task in tasks if not task.done()]:
        if loop.time() >= give_up_at:
            raise Hung(names_of(left))
        for task in left:
            task.cancel()
        await asyncio.wait(left, timeout=_AGAIN_S)
    for task in tasks:
        if not task.cancelled():
            task.exception()  # seen: else the loop would complain


def names_of(tasks: Iterable[asyncio.Task[Any]]) -> tuple[str, ...]:
    """Return the names of tasks for the log, each once."""
    names = (task.get_name() for task in tasks)
    return tuple(sorted({"an unnamed task" if _UNNAMED.fullmatch(name) else name for name in names}))


async def in_steps(steps: Iterable[None]) -> None:
    """Do work that would hold the loop up a step at a time; others get their turn after each."""
    for _ in steps:
        await asyncio.sleep(0)


async def repeat_in_steps(interval_s: float, work: Callable[[], Iterable[None]]) -> None:
    """Do such work again and again, with a pause before each, until cancelled."""
    while True:
        await asyncio.sleep(interval_s)
        await in_steps(work())


async def keep_running(name: str, run: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run a part of the process until it is cancelled; a defect of one ends neither the others nor the streams."""
    while True:
        try:
            await run()
        except Exception:
            _log.exception("%s failed, and begins again", name)
        await asyncio.sleep(_RESTART_PAUSE_S)
