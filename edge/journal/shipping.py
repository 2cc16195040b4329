"""Delivers the ends of usage records to a sink, each at least once.

What is read is what stands in the files of the journal, so the sink may be down for as long as the disk has room. How
far they are delivered is noted after the sink has acknowledged: whoever is stopped in between delivers once more, with
the same ids, and a sink that must not count twice keeps the first of each id.
"""

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Final, NamedTuple

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from edge.journal import files
from edge.journal.keeping import delete_shipped
from edge.journal.records import Head, head_of
from edge.journal.replaying import deliver_apart
from edge.journal.sinks.protocol import Sink, SinkRefused, SinkUnavailable
from edge.outage import Outage
from edge.tasks import end_tasks

_log = logging.getLogger(__name__)

_MAX_RECORDS: Final = 500
_POLL_INTERVAL_S: Final = 0.2
_CLEAN_INTERVAL_S: Final = 3600.0
_FIRST_PAUSE_S: Final = 1.0
_LONGEST_PAUSE_S: Final = 30.0


class _Batch(NamedTuple):
    lines: list[bytes]
    end: files.Position
    oldest_at: float  # Unix seconds, 0 of an empty batch


class Shipper:
    """Delivers the records of this process and of the tokens it adopted, a batch of each in turn.

    With `keep_s` files that are delivered are deleted so long after their last line. What is refused is set aside.

    `locks` are those of adopted tokens; a token that is delivered to its end is finished. `more` adopts further ones
    when these are. One that cannot be delivered is tried again after pauses that grow, and holds up no other. `outage`
    lasts while the last attempt of any token failed, `note_outage` while a crash would repeat records.
    """

    def __init__(
        self,
        directory: Path,
        token: str,
        locks: Sequence[files.TokenLock],
        sink: Sink,
        clock: Callable[[], float] = time.time,
        more: Callable[[], Sequence[files.TokenLock]] = tuple,
        keep_s: float | None = None,
    ) -> None:
        self.shipped = 0
        self.refused = 0
        self._keep_s = keep_s
        self._directory = directory
        self._more = more
        self._finished = False  # an adopted token, since there were more
        self._sink = sink
        self._clock = clock
        down = "usage sink: records are not delivered and wait in the journal"
        self.outage = Outage(_log, down, "usage sink: records are delivered again")
        down = "usage sink: how far records are delivered cannot be noted, a crash repeats them"
        self.note_outage = Outage(_log, down, "usage sink: how far records are delivered is noted")
        # Its own first: they are what `flush` must not leave behind for the sake of others.
        self._spools = [_Spool(directory, token, None), *(_Spool(directory, lock.token, lock) for lock in locks)]

    @property
    def lag_bytes(self) -> int:
        """What stands in the files and is not delivered."""
        return sum(spool.lag_bytes() for spool in self._spools)

    @property
    def lag_s(self) -> float:
        """The age of the oldest record that could not be delivered yet."""
        oldest_at = min((spool.oldest_at for spool in self._spools if spool.oldest_at), default=0.0)
        return max(self._clock() - oldest_at, 0.0) if oldest_at else 0.0

    async def run(self) -> None:
        """Deliver until cancelled; what fails is tried again after pauses that grow."""
        now = asyncio.get_running_loop().time
        clean_at = now()
        while True:
            if self._keep_s is not None and now() >= clean_at:
                clean_at = now() + _CLEAN_INTERVAL_S
                await self._clean(self._keep_s)
            if not await self._deliver_some(lambda failures: pause_s(failures, random.random())):
                await asyncio.sleep(_POLL_INTERVAL_S)
            if self._finished and len(self._spools) == 1:
                self._finished = False
                locks = await asyncio.to_thread(self._more)
                self._spools += (_Spool(self._directory, lock.token, lock) for lock in locks)

    async def _clean(self, keep_s: float) -> None:
        """Delete what is delivered and old; what cannot be deleted holds up no record."""
        try:
            await asyncio.to_thread(delete_shipped, self._directory, keep_s, self._clock())
        except OSError as error:
            _log.error("usage journal: files that are delivered cannot be deleted: %s", error)

    async def flush(self, patience_s: float) -> None:
        """Deliver what is left, in at most `patience_s`, when `run` has ended."""
        for spool in self._spools:
            spool.due_at = 0.0
        rest = asyncio.get_running_loop().create_task(self._deliver_rest(), name="deliver the last records")
        try:
            await asyncio.wait((rest,), timeout=patience_s)
            if rest.done():
                rest.result()
        finally:
            await end_tasks((rest,))
            if self.lag_bytes:
                _log.warning("usage sink: %d bytes of the journal are left to the next start", self.lag_bytes)

    async def _deliver_rest(self) -> None:
        """Deliver until nothing is left."""
        while True:
            if not await self._deliver_some(lambda failures: _POLL_INTERVAL_S):
                if not self.outage:
                    break
                await asyncio.sleep(_POLL_INTERVAL_S)

    async def _deliver_some(self, pause: Callable[[int], float]) -> bool:
        """Deliver a batch of each token that has one and is not paused; return whether there was any.

        `pause` makes of how often in a row a token failed before how many seconds it is left alone.
        """
        found = False
        now = asyncio.get_running_loop().time
        for spool in tuple(self._spools):
            if spool.due_at > now():
                continue
            try:
                found = await self._deliver(spool) or found
            except (SinkUnavailable, OSError) as error:
                spool.failed_by = str(error) or type(error).__name__
                if spool.lock is not None:  # what is refused may be these records alone
                    spool.failed_by += f", those of {spool.lock.token}"
                self._judge()
                spool.due_at = now() + pause(spool.failures)
                spool.failures += 1
        return found

    async def _deliver(self, spool: "_Spool") -> bool:
        """Deliver a batch of one token and return whether there was one; raises `SinkUnavailable` or `OSError`."""
        found = bool(spool.lag_bytes()) and await self._deliver_batch(spool)
        if not spool.lag_bytes():
            self._answered(spool)
            if spool.lock is not None:
                await asyncio.to_thread(partial(spool.lock.finish, leaves_note=self._keep_s is not None))
                self._spools.remove(spool)
                self._finished = True
        return found

    async def _deliver_batch(self, spool: "_Spool") -> bool:
        batch = await asyncio.to_thread(spool.read)
        if batch.lines:
            spool.oldest_at = batch.oldest_at
            refused = await self._refused_of(spool, batch.lines)
            if refused:
                await asyncio.to_thread(spool.set_aside, refused)
                self.refused += len(refused)
            self.shipped += len(batch.lines) - len(refused)
            self._answered(spool)
        if batch.end == spool.position:
            return False
        spool.position = batch.end
        try:
            await asyncio.to_thread(spool.save)
        except OSError as error:  # a full disk is no reason to deliver less
            self.note_outage.down(error.strerror or type(error).__name__)
        else:
            self.note_outage.up()
        return True

    async def _refused_of(self, spool: "_Spool", lines: list[bytes]) -> list[bytes]:
        """Deliver lines and return those that the sink refuses.

        Raises `SinkRefused` where it refuses all: then it is the sink that is wrong, unless it took others since the
        last time.
        """
        took_others = spool.refused_at is not None and self.shipped > spool.refused_at
        try:
            refused = await deliver_apart(self._sink, lines, takes=took_others)
            if len(refused) == len(lines) and not took_others:
                raise SinkRefused("the sink refuses every record")
        except SinkRefused:
            spool.refused_at = self.shipped
            raise
        return refused

    def _answered(self, spool: "_Spool") -> None:
        spool.failed_by, spool.oldest_at, spool.failures = "", 0.0, 0
        spool.refused_at = None
        self._judge()

    def _judge(self) -> None:
        """Note whether records are delivered, as far as the last attempt of each token shows."""
        reason = next((spool.failed_by for spool in self._spools if spool.failed_by), "")
        if reason:
            self.outage.down(reason)
        else:
            self.outage.up()

    def metrics(self) -> Iterator[Metric]:
        """Yield what was delivered, and how far delivery is behind."""
        yield CounterMetricFamily("edge_usage_shipped", "Records that the sink has acknowledged.", value=self.shipped)
        yield CounterMetricFamily("edge_usage_refused", "Records that it refuses, set aside.", value=self.refused)
        for name, text, value in (
            ("unshipped_bytes", "What stands in the journal only.", self.lag_bytes),
            ("unshipped_age_seconds", "The oldest record that is not delivered.", self.lag_s),
            ("sink_up", "1, or 0 while the sink does not acknowledge.", not self.outage),
        ):
            yield GaugeMetricFamily(f"edge_usage_{name}", text, value=value)


class _Spool:
    """The files of one token from a position on, and how their delivery goes. Its methods may run in threads.

    `lock` is that of an adopted token. `failed_by` is why the last of `failures` attempts in a row failed, "" when none
    did; `due_at` is when to try again, on the loop's clock. `oldest_at` is when the oldest record ended that the sink
    was given and has not acknowledged, in Unix seconds, 0 for none. `refused_at` is how many records of all tokens were
    delivered when all of a batch were refused, None where the last batch was not.
    """

    def __init__(self, directory: Path, token: str, lock: files.TokenLock | None) -> None:
        self.position = files.load_position(directory, token) or files.START
        self.lock = lock
        self.failed_by = ""
        self.failures = 0
        self.due_at = 0.0
        self.oldest_at = 0.0
        self.refused_at: int | None = None
        self._directory = directory
        self._token = token
        self._saving = Lock()

    def lag_bytes(self) -> int:
        """Return how many bytes follow the position."""
        self._pass_removed()
        number, offset = self.position
        found = 0
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):  # then it cannot be read
            while True:
                found += max(self._path(number).stat().st_size - offset, 0)
                number, offset = number + 1, 0
        return found

    def read(self) -> _Batch:
        """Return the whole lines that follow the position and are ends; raises `OSError`."""
        self._pass_removed()
        number, offset = self.position
        complete = self._path(number + 1).exists()  # asked first: what has a successor grows no more
        with files.open_to_read(self._path(number)) as file:
            file.seek(offset)
            data = file.read(files.MAX_LINE_BYTES)
        lines: list[bytes] = []
        start, unreadable, oldest_at = 0, 0, 0.0
        while len(lines) < _MAX_RECORDS and (newline := data.find(b"\n", start)) >= 0:
            line, start = data[start:newline], newline + 1
            head = head_of(line)
            if head is None:
                unreadable += 1
            elif head.end is not None:
                lines.append(line)
                oldest_at = oldest_at or _ended_at(head)
        if not start and len(data) == files.MAX_LINE_BYTES:  # no line of ours
            start, unreadable = len(data), 1
        if unreadable:
            _log.error("%s: %d lines cannot be read and are not delivered", self._path(number), unreadable)
        if not start and complete:
            return _Batch([], files.Position(number + 1, 0), 0.0)
        return _Batch(lines, files.Position(number, offset + start), oldest_at)

    def set_aside(self, lines: Sequence[bytes]) -> None:
        """Keep what the sink refuses, for who finds out why; raises `OSError`."""
        path = files.refused_path(self._directory, self._token)
        size = path.stat().st_size if path.exists() else 0
        files.write_at(path, size, b"".join(line + b"\n" for line in lines))
        _log.error("usage sink: %d records are refused and set aside in %s", len(lines), path)

    def save(self) -> None:
        """Note the position; raises `OSError`. Of two that save at once the last to do it notes the newest."""
        with self._saving:
            files.save_position(self._directory, self._token, self.position)

    def _path(self, number: int) -> Path:
        return files.file_path(self._directory, self._token, number)

    def _pass_removed(self) -> None:
        """Go on to the next file when somebody took away the one that was to be read."""
        if not self._path(self.position.number).exists():
            later = [each for each in files.file_numbers(self._directory, self._token) if each > self.position.number]
            if later:
                self.position = files.Position(later[0], 0)


def _ended_at(head: Head) -> float:
    """Return Unix seconds."""
    with contextlib.suppress(ValueError):
        return datetime.fromisoformat(head.time).timestamp() + head.duration_ms / 1000
    return 0.0


def pause_s(failures: int, chance: float) -> float:
    """Return how long to leave a sink alone after so many failures, from 0.5 to 30 s; `chance` is from 0 to 1.

    It spreads what a sink that comes back is asked by many processes.
    """
    return float(min(_FIRST_PAUSE_S * 2 ** min(failures, 10), _LONGEST_PAUSE_S)) * (1 + chance) / 2
