"""Keeps the usage record of each accepted request until it is delivered.

A record is two lines of JSON in an append-only file: one when the request is accepted, before anything goes upstream,
and one when it has ended. The second has `end` and is the whole record; the first only says, after a crash, that there
is one to write. A line is put into a mapped buffer (`journal/buffer.py`), where it outlives the process, and from there
`drain` writes to the file ten times a second. What the machine's crash can take is what came since the last `sync`.

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
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final, Literal

import msgspec

from edge.config.settings import WhenFull
from edge.errors import Unusable
from edge.exchange import End, Exchange, UsageSource
from edge.journal.buffer import LineBuffer, left_lines
from edge.journal.files import (
    START,
    Position,
    TokenLock,
    buffer_path,
    file_numbers,
    file_path,
    lines_in,
    load_position,
    lock_new_token,
    position_path,
    sync_directory,
    tokens_left,
    write_at,
    write_whole,
)

_log = logging.getLogger(__name__)

_BUFFER_BYTES: Final = 2**18  # some 600 lines; full, it is written at once
_MAX_WAITING: Final = 100_000  # lines in memory while the disk is full: some 60 MB
_RETRY_WRITES: Final = 32  # of a full buffer each, at one retry: some 30 ms of the loop, twenty thousand lines
_DAY_S: Final = 86_400
_MILLISECONDS: Final = tuple(f".{number:03d}Z" for number in range(1000))


class JournalFull(Exception):
    """A request cannot be recorded, so it must not be served."""


class _Opened(msgspec.Struct, gc=False):
    """The first line of a record; `time` is when the request began."""

    id: str
    time: str
    request_id: str
    key_id: str | None
    user: str | None
    route: str | None
    path: str
    model: str | None
    stream: bool


class _Ended(msgspec.Struct, gc=False):
    """What the last line of a record has after the fields of the first, the last of which moves in between."""

    upstream_model: str | None
    endpoint: str | None
    stream: bool
    status: int
    end: End | Literal["crashed"]
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    reasoning_tokens: int
    units: int
    usage_source: UsageSource
    ttft_ms: float | None
    duration_ms: float
    retries: int


class _Head(msgspec.Struct, gc=False):
    """What tells which line it is."""

    id: str
    end: str | None = None


_encoder: Final = msgspec.json.Encoder()
_head_decoder: Final = msgspec.json.Decoder(_Head)
_opened_decoder: Final = msgspec.json.Decoder(_Opened)
_STREAM_BYTES: Final = {True: len('"stream":true}\n'), False: len('"stream":false}\n')}  # at the end of a first line


class Journal:
    """The records of this process, and those that crashed processes left.

    `ships` says that a `Shipper` will deliver them. `sync` may run in a thread; all else belongs to the loop's. Raises
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
        self.recovered = 0  # crashed requests of other processes, ended here
        self.bad_lines = 0  # lines of other processes that cannot be read
        self.adopted: list[TokenLock] = []
        self._rotate_bytes = rotate_bytes
        self._refuses = when_full == "refuse"
        self._ships = ships
        self._clock = clock
        self._second, self._second_text = -1, ""
        self._open: dict[str, bytes] = {}  # first lines of records whose last does not stand in the file yet
        self._waiting: deque[tuple[bytes, str]] = deque()  # lines, and the id of the record that one closes
        self._failing = False  # the last write did, and the next retry says whether it is over
        self._torn = False
        self._trouble = ""
        self._errors_seen = 0
        self._syncing = threading.Lock()
        self._replaced: list[int] = []  # descriptors of full files, for the next sync
        self._synced = (-1, 0)
        self._sync_error = ""
        self._unsafe = False  # what is written might not last, and that is a reason to refuse
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._number = 0
            self._descriptor, self._size = -1, 0
            with contextlib.ExitStack() as undo:
                self.lock = lock_new_token(directory, clock())
                undo.callback(self.lock.finish)
                self._buffer = LineBuffer(buffer_path(directory, self.lock.token), _BUFFER_BYTES)
                undo.callback(self._buffer.close)
                self._rotate()
                sync_directory(directory)
                undo.pop_all()
        except OSError as error:
            raise Unusable(
                f"usage.journal: records cannot be kept in {directory} ({error.strerror}): make it a directory in which"
                " this user may write, on a local disk with room"
            ) from None
        self._adopt()

    @property
    def token(self) -> str:
        """The name of this process in the journal."""
        return self.lock.token

    @property
    def outage(self) -> str:
        """Why lines cannot be written, "" when they can."""
        return self._trouble

    @property
    def lines_waiting(self) -> int:
        """The lines that are in memory only."""
        return len(self._waiting)

    # --- records

    def open_record(self, exchange: Exchange) -> None:
        """Write that a request was accepted, and set its `record_id`; raises `JournalFull`, and then sets nothing."""
        if self._refuses and (self._failing or self._waiting or self._unsafe):
            raise JournalFull(self._trouble or self._sync_error)
        record_id = f"{self.lock.token}-{self.records_open + 1}"
        principal = exchange.principal
        opened = _Opened(
            record_id,
            self._time(exchange.started_at),
            exchange.request_id,
            principal.id if principal is not None else None,
            principal.user if principal is not None else None,
            exchange.route or None,
            exchange.path,
            exchange.model or None,
            exchange.stream,
        )
        line = _encoder.encode(opened) + b"\n"
        if self._waiting or not self._keep(line):
            if self._refuses or len(self._waiting) >= _MAX_WAITING:
                raise JournalFull(self._trouble)
            self._waiting.append((line, ""))
        exchange.record_id = record_id
        self.records_open += 1
        self._open[record_id] = line

    def close_record(self, exchange: Exchange) -> None:
        """Write how a request ended, once, when its `end`, `status`, `usage` and `finished` are set; raises nothing."""
        usage, begun, first_byte, record_id = exchange.usage, exchange.begun, exchange.first_byte, exchange.record_id
        ended = _Ended(
            exchange.upstream_model or None,
            exchange.endpoint or None,
            exchange.stream,
            exchange.status,
            exchange.end or End.INTERNAL_ERROR,
            usage.prompt_tokens,
            usage.completion_tokens,
            usage.cached_tokens,
            usage.reasoning_tokens,
            usage.units,
            usage.source,
            int((first_byte - begun) * 1e5 + 0.5) / 100 if first_byte else None,
            int((exchange.finished - begun) * 1e5 + 0.5) / 100,
            exchange.retries,
        )
        line = _last_line(self._open[record_id], ended)
        self.records_closed += 1
        if self._waiting or not self._keep(line):
            self._waiting.append((line, record_id))
        else:
            del self._open[record_id]

    def _time(self, at: float) -> str:
        """Return RFC 3339 in UTC with milliseconds: of one width, so that it sorts as text."""
        second = int(at)
        if second != self._second:
            self._second, self._second_text = second, time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
        return self._second_text + _MILLISECONDS[int((at - second) * 1000)]

    # --- the file

    def _keep(self, line: bytes) -> bool:
        """Put a line where it outlives the process; say whether there was room, once the disk was asked for it."""
        return self._buffer.put(line) or (not self._failing and self._write() and self._buffer.put(line))

    def drain(self) -> None:
        """Write what came since the last time to the file; a disk that failed is left to `retry`."""
        if not self._failing:
            self._write()

    def _write(self) -> bool:
        """Write what the buffer holds to the file; say whether all of it stands there."""
        buffer = self._buffer
        if not buffer.length:
            return True
        try:
            if self._torn:
                self._mend()
            begun = self._size > buffer.offset  # when there was no room for all, the last time
            if not begun and (self._size >= self._rotate_at or self._clock() >= self._day_ends):
                self._rotate()
            lines = buffer.lines(self._size - buffer.offset)
            written = os.write(self._descriptor, lines)
        except OSError as error:
            self._torn = True  # a write that failed promises nothing
            self._fail(error)
            return False
        if written < len(lines):
            self._size += lines.rfind(b"\n", 0, written) + 1
            self._torn = True
            with contextlib.suppress(OSError):
                self._mend()
            self._fail(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
            return False
        self._size += written
        buffer.clear(self._size)
        self._failing = False
        return True

    def _mend(self) -> None:
        """Take away what a failed write left after the last whole line."""
        os.ftruncate(self._descriptor, self._size)
        self._torn = False

    def _rotate(self) -> None:
        """Begin the next file; it gets its name when it holds the open lines, so that no crash finds half of them."""
        draft = self.directory / f"{self.lock.token}.tmp"
        lines = b"".join(self._open.values())
        descriptor = os.open(draft, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_TRUNC, 0o640)
        try:
            self._buffer.move(self._number + 1, len(lines))  # before the file has its name, and so can be shipped
            write_whole(descriptor, lines)
            draft.rename(file_path(self.directory, self.lock.token, self._number + 1))
        except BaseException:
            os.close(descriptor)
            draft.unlink(missing_ok=True)
            self._buffer.move(self._number, self._size)
            raise
        if self._number:
            self._replaced.append(self._descriptor)
        self._number += 1
        self._descriptor, self._size, self._torn = descriptor, len(lines), False
        self._rotate_at = self._size + self._rotate_bytes
        self._day_ends = (self._clock() // _DAY_S + 1) * _DAY_S

    def _fail(self, error: OSError) -> None:
        self.write_errors += 1
        self._failing = True
        if not self._trouble:
            self._trouble = error.strerror or type(error).__name__
            _log.error(
                "usage journal: %s cannot be written (%s), %s",
                self.directory,
                self._trouble,
                "new requests are refused" if self._refuses else "records wait in memory",
            )

    def retry(self) -> None:
        """Write what waits in memory, and tell of a fault that is over."""
        for _ in range(_RETRY_WRITES):
            if not (self._write() and self._refill()):
                break
        if self._trouble and not self._waiting and self.write_errors == self._errors_seen:
            _log.warning("usage journal: %s is written again", self.directory)
            self._trouble = ""
        self._errors_seen = self.write_errors

    def _refill(self) -> bool:
        """Put into the buffer what waits in memory; say whether that was anything."""
        before = len(self._waiting)
        while self._waiting and self._buffer.put(self._waiting[0][0]):
            _, closed_id = self._waiting.popleft()
            self._open.pop(closed_id, None)
        return len(self._waiting) < before

    def sync(self) -> None:
        """Make what was written outlive a crash of the machine."""
        with self._syncing:
            try:
                self._sync()
            except OSError as error:
                self._unsafe = self._refuses
                if not self._sync_error:
                    self._sync_error = error.strerror or type(error).__name__
                    _log.error("usage journal: %s does not reach the disk (%s)", self.directory, self._sync_error)
            else:
                self._unsafe = False
                if self._sync_error:
                    self._sync_error = ""
                    _log.warning("usage journal: %s reaches the disk again", self.directory)

    def _sync(self) -> None:
        # The loop's thread writes on meanwhile; it may replace the descriptor, but only this thread closes one.
        replaced = len(self._replaced)
        written = self._descriptor, self._size
        for _ in range(replaced):
            descriptor = self._replaced.pop(0)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        if written != self._synced:
            os.fsync(written[0])
            self._synced = written
        if replaced:
            sync_directory(self.directory)
        if self._rotate_at and not os.fstat(written[0]).st_nlink:  # else it is told already
            _log.error("usage journal: a file was removed from %s while it was written", self.directory)
            self._rotate_at = 0  # with the next line, so that what comes is found

    def close(self) -> None:
        """Write the rest, and leave to the next start what is not delivered."""
        while self._write() and self._refill():
            pass
        if self._waiting:
            _log.error("usage journal: %d lines could not be written and are lost", len(self._waiting))
        self.sync()
        with self._syncing:
            os.close(self._descriptor)
            self._descriptor = -1
        self._buffer.close()
        end = Position(self._number, self._size)
        empty = end == START
        if empty:
            file_path(self.directory, self.token, self._number).unlink(missing_ok=True)
        unfinished = self._open or self._buffer.length
        if not unfinished and (empty or not self._ships or load_position(self.directory, self.token) == end):
            self.lock.finish()
        else:
            self.lock.release()
        for lock in self.adopted:
            lock.release()

    # --- what others left

    def _adopt(self) -> None:
        """Take every token whose process is gone, and end what it left open."""
        for token in tokens_left(self.directory):
            lock = None
            try:
                lock = TokenLock.take(self.directory, token)
                if lock is None:  # this process itself, or another that lives
                    continue
                self._write_left(token)
                empty = self._end_crashed(token)
            except OSError as error:  # the next start tries again
                _log.error("usage journal: %s.*.jsonl cannot be adopted (%s)", self.directory / token, error.strerror)
                if lock is not None:
                    lock.release()
                continue
            if self._ships and not empty:
                self.adopted.append(lock)
            else:
                lock.finish()

    def _write_left(self, token: str) -> None:
        """Write what stands in a token's buffer to where it belongs, again if it was."""
        path = buffer_path(self.directory, token)
        try:
            left = left_lines(path)
        except FileNotFoundError:
            return
        if left is None:
            self.bad_lines += 1
        elif left.lines:
            numbers = file_numbers(self.directory, token)
            known = left.number in numbers  # else its file was about to begin, or was taken away
            file = file_path(self.directory, token, left.number if known else (numbers or [START.number])[-1])
            size = file.stat().st_size if numbers else 0
            lines, at = left.lines, left.offset if known else size
            if at > size:  # the machine's crash took what was before, maybe the half of a line
                lines, at = b"\n" + lines, size
            write_at(file, at, lines)
        path.unlink()

    def _end_crashed(self, token: str) -> bool:
        """Append a line for each request that was left open; return whether the token has no line at all."""
        (self.directory / f"{token}.tmp").unlink(missing_ok=True)
        numbers = file_numbers(self.directory, token)
        if not numbers:
            return True
        path = file_path(self.directory, token, numbers[-1])
        left: dict[str, bytes] = {}
        line = b"\n"
        with path.open("rb") as file:
            for line in lines_in(file):
                try:
                    head = _head_decoder.decode(line)
                except (ValueError, RecursionError):
                    self.bad_lines += 1
                    continue
                if head.end is None:
                    left[head.id] = line
                else:
                    left.pop(head.id, None)
            size = file.tell()
        position = load_position(self.directory, token)
        if position is not None and position > (numbers[-1], size):  # the crash of the machine took lines: all anew
            position_path(self.directory, token).unlink()
        if not size and len(numbers) == 1:
            path.unlink()
            return True
        self._write_ends(path, size, left.values(), torn=not line.endswith(b"\n"))
        return False

    def _write_ends(self, path: Path, size: int, left: Iterable[bytes], *, torn: bool) -> None:
        lines = [b"\n"] if torn else []
        for line in left:
            try:
                opened = _opened_decoder.decode(line)
            except ValueError:
                self.bad_lines += 1
                continue
            lines.append(_last_line(_encoder.encode(opened) + b"\n", _crashed(opened.stream)))
        if not lines:
            return
        write_at(path, size, b"".join(lines))
        self.recovered += len(lines) - torn


def _last_line(first: bytes, ended: _Ended) -> bytes:
    """Return the line that is the whole record."""
    return first[: -_STREAM_BYTES[ended.stream]] + _encoder.encode(ended)[1:] + b"\n"


def _crashed(stream: bool) -> _Ended:
    """Return the end of a request of which nothing more is known."""
    return _Ended(
        upstream_model=None,
        endpoint=None,
        stream=stream,
        status=0,
        end="crashed",
        prompt_tokens=0,
        completion_tokens=0,
        cached_tokens=0,
        reasoning_tokens=0,
        units=0,
        usage_source=UsageSource.NONE,
        ttft_ms=None,
        duration_ms=0,
        retries=0,
    )


__all__ = ["Journal", "JournalFull", "Unusable"]
