"""Writes the lines of a log in a thread, so that a reader that is stuck stops nobody."""

import os
import queue
import select
import threading
from concurrent.futures import Future


class LineWriter:
    """Writes to a descriptor what it is given, in order; `put`, `written` and `close` belong to one thread at a time.

    `backlog` is how many lines are not written yet: whoever fills it keeps it bounded, and counts what it drops.
    `unread` counts the lines that nobody reads any more.
    """

    def __init__(self, descriptor: int, name: str) -> None:
        self.unread = 0
        self._descriptor = descriptor
        self._put = self._done = 0  # lines; each is counted by one thread only
        self._queue: queue.SimpleQueue[tuple[bytes, int] | Future[None] | None] = queue.SimpleQueue()
        self._is_closed = False
        self._ended: Future[None] = Future()
        # A daemon, so that a stuck reader does not keep the process from ending.
        threading.Thread(target=self._run, name=name, daemon=True).start()

    @property
    def backlog(self) -> int:
        """The lines that are put and not written."""
        return self._put - self._done

    def put(self, data: bytes, lines: int = 1) -> None:
        """Queue whole lines."""
        self._put += lines
        self._queue.put((data, lines))

    def written(self) -> "Future[None]":
        """Return what is done when all that was put so far is written, or the thread has ended."""
        if self._is_closed:
            return self._ended
        written: Future[None] = Future()
        self._queue.put(written)
        return written

    def close(self) -> None:
        """End the thread, behind what was put so far."""
        self._is_closed = True
        self._queue.put(None)

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            if isinstance(item, Future):
                item.set_result(None)
                continue
            data, lines = item
            if not _write_all(self._descriptor, data):
                self.unread += lines
            self._done += lines
        self._ended.set_result(None)


def _write_all(descriptor: int, data: bytes) -> bool:
    """Write all of `data`; return False when nobody reads any more."""
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(descriptor, view) :]
        except BlockingIOError:  # a descriptor that whoever started us made non-blocking
            select.select([], [descriptor], [])
        except OSError:
            return False
    return True
