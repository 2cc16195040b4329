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
import errno
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from edge.config.process_settings import WhenFull
from edge.errors import Unusable
from edge.exchange import Exchange
from edge.journal.files import START, TokenLock, file_path, load_position, lock_new_token, new_token
from edge.journal.records import first_line, last_line
from edge.journal.recovery import Adopted, adopt
from edge.journal.rotating import RotatingFile
from edge.outage import Outage

_log = logging.getLogger(__name__)

_MAX_WAITING: Final = 100_000  # lines in memory while the disk is full: some 60 MB
_RETRY_WRITES: Final = 32  # of a full buffer each, at one retry: some 30 ms of the loop, twenty thousand lines


def _put_nowhere(line: bytes) -> bool:
    """Take no line: there is no buffer yet."""
    return False


class JournalFull(Exception):
    """A request cannot be recorded, so it must not be served."""


class Journal:
    """The records of this process, and those that crashed processes left.

    `ships` says that a `Shipper` will deliver them; `region` stands in each. `outage` lasts while lines cannot be
    written, `sync_outage` while what is written may not outlive the machine. A disk without room, or that nobody may
    write, is an outage from the start on where requests are to be served meanwhile. `sync` and `adopt_more` may run in
    a thread; all else belongs to the loop's. Raises `Unusable`.
    """

    def __init__(
        self,
        directory: Path,
        rotate_bytes: int,
        when_full: WhenFull,
        *,
        ships: bool = False,
        region: str = "",
        leaves_notes: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.directory = directory
        self.records_open = 0  # opened since the start
        self.records_closed = 0
        self.write_errors = 0
        self.token = new_token(clock())  # the name of this process in the journal
        self.lock: TokenLock | None = None
        self._file: RotatingFile | None = None  # None until the disk takes one
        self._refuses = when_full == "refuse"
        self._ships = ships
        self._leaves_notes = leaves_notes
        self._region = region or None
        self._rotate_bytes = rotate_bytes
        self._clock = clock
        self._open: dict[str, bytes] = {}  # first lines of records whose last does not stand in the file yet
        self._waiting: deque[tuple[bytes, str]] = deque()  # lines, and the id of the record that one closes
        self._failing = False  # the last write did, and the next retry says whether it is over
        self._errors_seen = 0
        meanwhile = "new requests are refused" if self._refuses else "records wait in memory"
        about = f"usage journal: {directory}"
        self.outage = Outage(_log, f"{about} cannot be written, {meanwhile}", f"{about} is written again")
        self.sync_outage = Outage(_log, f"{about} does not reach the disk", f"{about} reaches the disk again")
        self._put = _put_nowhere
        self.adopted = Adopted(is_more=True)
        try:
            directory.mkdir(parents=True, exist_ok=True)
            lock = lock_new_token(directory, clock())
            self.token = lock.token
            self._begin(lock)
        except OSError as error:
            # What is no directory becomes none by itself: a mistake in the file, which a start has to tell.
            if self._refuses or isinstance(error, FileExistsError | NotADirectoryError):
                raise Unusable(
                    f"usage.journal: records cannot be kept in {directory} ({error.strerror}): make it a directory in"
                    " which this user may write, on a local disk with room"
                ) from None
            self._fail(error)
        self.adopt_more()

    def _begin(self, lock: TokenLock) -> None:
        """Begin the first file of the token; raises `OSError`, and nothing is left then."""
        with contextlib.ExitStack() as undo:
            undo.callback(lock.finish)
            self._file = RotatingFile(self.directory, self.token, self._rotate_bytes, self._open.values(), self._clock)
            undo.pop_all()
        self.lock = lock
        self._put = self._file.buffer.put

    def _begin_late(self) -> None:
        """Begin what could not be begun at the start; raises `OSError`."""
        self.directory.mkdir(parents=True, exist_ok=True)
        lock = TokenLock.take(self.directory, self.token, os.O_CREAT)
        if lock is None:  # one that starts at the same moment took it for a dead one's, and removes it
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        self._begin(lock)

    def adopt_more(self) -> list[TokenLock]:
        """Adopt further tokens where the start left some; return the locks of those that are to be delivered."""
        if not self.adopted.is_more:
            return []
        try:
            more = adopt(self.directory, ships=self._ships, after=self.adopted.last)
        except OSError:  # the directory is not there or cannot be read, which is logged already
            return []
        self.adopted.add(more)
        return more.locks

    @property
    def lines_waiting(self) -> int:
        """The lines that are in memory only."""
        return len(self._waiting)

    # --- records

    def open_record(self, exchange: Exchange) -> str:
        """Write that a request was accepted, and return the id of its record; raises `JournalFull`."""
        if self._refuses and (self._failing or self._waiting or self.sync_outage):
            raise JournalFull(self.outage.reason or self.sync_outage.reason)
        record_id = f"{self.token}-{self.records_open + 1}"
        line = first_line(exchange, record_id, self._region)
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
            if self._file is None:
                self._begin_late()
            else:
                self._file.write()
        except OSError as error:
            self._fail(error)
            return False
        self._failing = False
        return True

    def _fail(self, error: OSError) -> None:
        self.write_errors += 1
        self._failing = True
        self.outage.down(error.strerror or type(error).__name__)

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
        if self._file is None:  # nothing was written
            return
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
        if self._file is not None and self.lock is not None:
            self._close_file(self._file, self.lock)
        for lock in self.adopted.locks:
            lock.release()

    def _close_file(self, file: RotatingFile, lock: TokenLock) -> None:
        self.sync()
        file.close()
        end = file.end
        empty = end == START
        if empty:
            file_path(self.directory, self.token, end.number).unlink(missing_ok=True)
        unfinished = self._open or file.buffer.length
        if not unfinished and (empty or not self._ships or load_position(self.directory, self.token) == end):
            lock.finish(leaves_note=self._leaves_notes and not empty)
        else:
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
        up, written = not (self.outage or self.sync_outage), self._file.written_bytes if self._file is not None else 0
        yield GaugeMetricFamily("edge_usage_journal_up", "1, or 0 while it cannot be written.", value=up)
        yield CounterMetricFamily("edge_usage_written_bytes", "Bytes that went into its files.", value=written)
        free = GaugeMetricFamily("edge_usage_disk_free_bytes", "What its disk has room for.")
        with contextlib.suppress(OSError):
            disk = os.statvfs(self.directory)
            free.add_metric((), disk.f_bavail * disk.f_frsize)
        yield free
        yield CounterMetricFamily(
            "edge_usage_bad_lines", "Lines of crashed processes that cannot be read.", value=self.adopted.bad_lines
        )
