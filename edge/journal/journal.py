"""Keeps the usage record of each accepted request until it is delivered.

The two lines of a record (`journal/records.py`) go into an append-only file: the first before anything goes upstream,
the second before the last bytes of the answer go. A line is put into a mapped buffer (`journal/buffer.py`), where it
outlives the process, and from there `drain` writes to the file ten times a second. What the machine's crash can take is
what came since the last `sync`.

A process has a token of its own, which sorts by the time of its start, and alone writes `<token>.0001.jsonl`, then
`.0002` and so on: a new file when one is full, and every UTC day. Each begins with the open lines of the requests that
are running, so the last one says all that a crash left open, and older ones may be taken away. A line that ends in a
newline stays; one that could be written only in part is undone.

`<token>.lock` is locked (flock) for the life of the process. A process that starts takes every lock that is free,
writes what stands in `<token>.buffer`, and ends what is open with a line whose `end` is "crashed". Where records are
shipped the lock is kept until all were (`shipping.py`, which notes in `<token>.shipped` how far it came); then, as
without a sink, the lock's file is removed and the token is done with.
"""

import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from edge.config.settings import WhenFull
from edge.errors import Unusable
from edge.exchange import Exchange
from edge.journal.files import START, file_path, load_position, lock_new_token
from edge.journal.records import first_line, last_line
from edge.journal.recovery import adopt
from edge.journal.rotating import RotatingFile
from edge.outage import Outage

_log = logging.getLogger(__name__)

_MAX_WAITING: Final = 100_000  # lines in memory while the disk is full: some 60 MB
_RETRY_WRITES: Final = 32  # of a full buffer each, at one retry: some 30 ms of the loop, twenty thousand lines


class JournalFull(Exception):
    """A request cannot be recorded, so it must not be served."""


class Journal:
    """The records of this process, and those that crashed processes left.

    `ships` says that a `Shipper` will deliver them. `outage` lasts while lines cannot be written, `sync_outage` while
    what is written may not outlive the machine. `sync` may run in a thread; all else belongs to the loop's. Raises
    `Unusable`.
    """

    def __init__(
        self,
        directory: Path,
        rotate_bytes: int,
        when_full: WhenFull,
        *,
        ships: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.directory = directory
        self.records_open = 0  # opened since the start
        self.records_closed = 0
        self.write_errors = 0
        self._refuses = when_full == "refuse"
        self._ships = ships
        self._open: dict[str, bytes] = {}  # first lines of records whose last does not stand in the file yet
        self._waiting: deque[tuple[bytes, str]] = deque()  # lines, and the id of the record that one closes
        self._failing = False  # the last write did, and the next retry says whether it is over
        self._errors_seen = 0
        meanwhile = "new requests are refused" if self._refuses else "records wait in memory"
        about = f"usage journal: {directory}"
        self.outage = Outage(_log, f"{about} cannot be written, {meanwhile}", f"{about} is written again")
        self.sync_outage = Outage(_log, f"{about} does not reach the disk", f"{about} reaches the disk again")
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with contextlib.ExitStack() as undo:
                self.lock = lock_new_token(directory, clock())
                undo.callback(self.lock.finish)
                self._file = RotatingFile(directory, self.token, rotate_bytes, self._open.values(), clock)
                undo.pop_all()
        except OSError as error:
            raise Unusable(
                f"usage.journal: records cannot be kept in {directory} ({error.strerror}): make it a directory in which"
                " this user may write, on a local disk with room"
            ) from None
        self._put = self._file.buffer.put
        self.adopted = adopt(directory, ships=ships)

    @property
    def token(self) -> str:
        """The name of this process in the journal."""
        return self.lock.token

    @property
    def lines_waiting(self) -> int:
        """The lines that are in memory only."""
        return len(self._waiting)

    # --- records

    def open_record(self, exchange: Exchange) -> str:
        """Write that a request was accepted, and return the id of its record; raises `JournalFull`."""
        if self._refuses and (self._failing or self._waiting or self.sync_outage):
            raise JournalFull(self.outage.reason or self.sync_outage.reason)
        record_id = f"{self.lock.token}-{self.records_open + 1}"
        line = first_line(exchange, record_id)
        if self._waiting or not (self._put(line) or self._write_and_put(line)):
            if self._refuses or len(self._waiting) >= _MAX_WAITING:
                raise JournalFull(self.outage.reason)
            self._waiting.append((line, ""))
        self.records_open += 1
        self._open[record_id] = line
        return record_id

    def close_record(self, exchange: Exchange, record_id: str) -> None:
        """Write how a request ended, once, when its `end`, `status`, `usage` and `finished` are set; raises nothing."""
        line = last_line(self._open[record_id], exchange)
        self.records_closed += 1
        if self._waiting or not (self._put(line) or self._write_and_put(line)):
            self._waiting.append((line, record_id))
        else:
            del self._open[record_id]

    def _write_and_put(self, line: bytes) -> bool:
        """Put a line into the full buffer when the disk takes what is in it; return whether there was room."""
        return not self._failing and self._write() and self._put(line)

    # --- the file

    def drain(self) -> None:
        """Write what came since the last time to the file; a disk that failed is left to `retry`."""
        if not self._failing:
            self._write()

    def _write(self) -> bool:
        """Write what the buffer holds to the file; return whether all of it stands there."""
        try:
            self._file.write()
        except OSError as error:
            self.write_errors += 1
            self._failing = True
            self.outage.down(error.strerror or type(error).__name__)
            return False
        self._failing = False
        return True

    def retry(self) -> None:
        """Write what waits in memory, and end an outage that is over."""
        for _ in range(_RETRY_WRITES):
            if not (self._write() and self._refill()):
                break
        if not self._waiting and self.write_errors == self._errors_seen:
            self.outage.up()
        self._errors_seen = self.write_errors

    def _refill(self) -> bool:
        """Put into the buffer what waits in memory; return whether that was anything."""
        before = len(self._waiting)
        while self._waiting and self._put(self._waiting[0][0]):
            _, closed_id = self._waiting.popleft()
            self._open.pop(closed_id, None)
        return len(self._waiting) < before

    def sync(self) -> None:
        """Make what was written outlive a crash of the machine."""
        try:
            self._file.sync()
        except OSError as error:
            self.sync_outage.down(error.strerror or type(error).__name__)
        else:
            self.sync_outage.up()

    def close(self) -> None:
        """Write the rest, and leave to the next start what is not delivered."""
        while self._write() and self._refill():
            pass
        if self._waiting:
            _log.error("usage journal: %d lines could not be written and are lost", len(self._waiting))
        self.sync()
        self._file.close()
        end = self._file.end
        empty = end == START
        if empty:
            file_path(self.directory, self.token, end.number).unlink(missing_ok=True)
        unfinished = self._open or self._file.buffer.length
        if not unfinished and (empty or not self._ships or load_position(self.directory, self.token) == end):
            self.lock.finish()
        else:
            self.lock.release()
        for lock in self.adopted.locks:
            lock.release()

    def metrics(self) -> Iterator[Metric]:
        """Yield what was recorded, and what stands in the way of it."""
        for name, text, count in (
            ("opened", "Requests accepted and recorded.", self.records_open),
            ("closed", "Records that say how a request ended.", self.records_closed),
            ("recovered", "Records ended for a process that crashed.", self.adopted.recovered),
        ):
            yield CounterMetricFamily(f"edge_usage_records_{name}", text, value=count)
        yield CounterMetricFamily(
            "edge_usage_write_errors", "Writes to the journal that failed.", value=self.write_errors
        )
        yield GaugeMetricFamily(
            "edge_usage_lines_waiting", "Lines in memory, for a disk with room.", value=self.lines_waiting
        )
        yield CounterMetricFamily(
            "edge_usage_bad_lines", "Lines of crashed processes that cannot be read.", value=self.adopted.bad_lines
        )
