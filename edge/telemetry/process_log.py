"""The process's own log on standard error, one JSON object a line, which a reader that is stuck cannot stop."""

import contextlib
import logging
import os
import select
import time
from collections.abc import Iterator
from typing import Final

import orjson

from edge.telemetry.line_writer import LineWriter

MAX_BACKLOG: Final = 5_000  # lines not yet written; with a stack each, some tens of MB
_PATIENCE_S: Final = 1.0  # at the end, for a reader that is stuck
_STDERR: Final = 2


class JsonFormatter(logging.Formatter):
    """One JSON object a record."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record."""
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created)),
            "level": record.levelname.lower(),
            "event": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["stack"] = self.formatException(record.exc_info)
        return orjson.dumps(line).decode()


class ThreadedHandler(logging.Handler):
    """Formats records where they arise and lets a thread write them, in order.

    Past `MAX_BACKLOG` lines are dropped, and the next line that finds room comes after one that counts them.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self.setFormatter(JsonFormatter())
        self._writer = LineWriter(descriptor, "edge-process-log")
        self._dropped = 0  # since the last line that counted them

    def emit(self, record: logging.LogRecord) -> None:
        """Queue the line of a record; called with the handler's lock."""
        if self._writer.backlog >= MAX_BACKLOG:
            self._dropped += 1
            return
        self._report_dropped()
        try:
            self._put(record)
        except Exception:  # as every handler of `logging`: a bad line must not fail who logs it
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:  # named by logging
        """Report in a line which record cannot be one; `logging` itself would print, and wait for the reader."""
        self._report(f"a line of {record.name} cannot be written: {record.msg!a}")

    def flush(self) -> None:
        """Write what was logged so far, for a while; `logging` itself calls it at the interpreter's end."""
        self.wait_written(_PATIENCE_S)

    def wait_written(self, patience_s: float) -> bool:
        """Wait until what was logged so far is written; return False when the reader is stuck."""
        self.acquire()
        try:
            self._report_dropped()
            written = self._writer.written()
        finally:
            self.release()
        try:
            written.result(patience_s)
        except TimeoutError:
            return False
        return True

    def _report_dropped(self) -> None:
        if self._dropped:
            self._report(f"{self._dropped} lines of this log are lost, its reader was stuck")
            self._dropped = 0

    def _report(self, message: str) -> None:
        self._put(logging.makeLogRecord({"name": __name__, "levelname": "ERROR", "msg": message}))

    def _put(self, record: logging.LogRecord) -> None:
        self._writer.put(self.format(record).encode() + b"\n")


@contextlib.contextmanager
def log_to_stderr() -> Iterator[None]:
    """Send the process's own log to standard error; what is printed there afterwards comes after every line."""
    handler = ThreadedHandler(_STDERR)
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    try:
        yield
    finally:
        if not (handler.wait_written(_PATIENCE_S) and select.select([], [_STDERR], [], _PATIENCE_S)[1]):
            send_nowhere(_STDERR)  # whoever prints an error now would wait for the reader


def send_nowhere(descriptor: int) -> None:
    """Let what is printed to a descriptor from now on go nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)
