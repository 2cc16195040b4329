"""The last moment of a stop, kept by a thread of its own: a loop that is blocked cannot outlast it."""

import asyncio
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Final

from edge.tasks import names_of

_log = logging.getLogger(__name__)

_WAITING: Final = ("edge.__main__", "edge.commands.")  # where the main thread always is


class Deadline:
    """Ends the process with the exit code 1 when its stop takes too long, and logs what is left then.

    It holds until the very end of the interpreter, which waits for threads. `end` takes the exit code.
    """

    def __init__(self, end: Callable[[int], object] = os._exit) -> None:
        self._end = end
        self._loop = asyncio.get_running_loop()
        self._loops_thread = threading.get_ident()
        self._at = float("inf")
        self._moved = threading.Condition()
        self._thread: threading.Thread | None = None

    def within(self, patience_s: float) -> None:
        """Let the process end in so many seconds at the latest, and no later than was said before."""
        with self._moved:
            self._at = min(self._at, time.monotonic() + patience_s)
            self._moved.notify()
            if self._thread is None:
                self._thread = threading.Thread(target=self._watch, name="edge-deadline", daemon=True)
                self._thread.start()

    def _watch(self) -> None:
        with self._moved:
            while (left_s := self._at - time.monotonic()) > 0:
                self._moved.wait(left_s)
        _log.error("stop: it takes too long and ends here, left are: %s", ", ".join(self._left()) or "threads")
        logging.shutdown()
        self._end(1)

    def _left(self) -> Iterator[str]:
        """Yield what has not ended: tasks, threads that the interpreter would wait for, and the code that runs."""
        yield from names_of(asyncio.all_tasks(self._loop))
        for thread in threading.enumerate():
            if not thread.daemon and thread.ident != self._loops_thread:
                yield f"the thread {thread.name}"
        frame = sys._current_frames().get(self._loops_thread)
        while frame is not None:
            module = frame.f_globals.get("__name__", "")
            if module.startswith("edge.") and not module.startswith(_WAITING):
                yield f"the code of {module}.{frame.f_code.co_qualname}"
                return
            frame = frame.f_back
