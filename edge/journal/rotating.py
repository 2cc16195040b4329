"""The file that a process appends its records to, and the next one when that is full or the UTC day is over."""

import contextlib
import errno
import logging
import os
import threading
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Final

from edge.journal.buffer import LineBuffer
from edge.journal.files import Position, buffer_path, file_path, sync_directory, write_whole

_log = logging.getLogger(__name__)

BUFFER_BYTES: Final = 2**18  # some 600 lines; full, it is written at once
_DAY_S: Final = 86_400


class RotatingFile:
    """The files of one token, written through a `LineBuffer`; raises `OSError` when the first cannot begin.

    Each but the first begins with the lines that `carried` has at that time. It is full some `rotate_bytes` later, and
    has whole lines only: what could be written in part is undone. `end` is where the next line will stand. `sync` and
    `close` may run in a thread; all else belongs to the loop's.
    """

    def __init__(
        self,
        directory: Path,
        token: str,
        rotate_bytes: int,
        carried: Collection[bytes],
        clock: Callable[[], float],
    ) -> None:
        self._directory = directory
        self._token = token
        self._rotate_bytes = rotate_bytes
        self._carried = carried
        self._clock = clock
        self._number = 0
        self._descriptor, self._size = -1, 0
        self._torn = False
        self.written_bytes = 0  # in all files
        self._syncing = threading.Lock()
        self._replaced: list[int] = []  # descriptors of full files, for the next sync
        self._synced = (-1, 0)
        self.buffer = LineBuffer(buffer_path(directory, token), BUFFER_BYTES)
        try:
            self._rotate()
            sync_directory(directory)
        except BaseException:
            self.buffer.close()
            raise

    @property
    def end(self) -> Position:
        """Where the files end, and the lines of the buffer begin."""
        return Position(self._number, self._size)

    def write(self) -> None:
        """Write what the buffer holds; raises `OSError` unless all of it stands."""
        buffer = self.buffer
        if not buffer.length:
            return
        if self._torn:
            self._mend()
        begun = self._size > buffer.offset  # when there was no room for all, the last time
        if not begun and (self._size >= self._rotate_at or self._clock() >= self._day_ends):
            self._rotate()
        lines = buffer.lines(self._size - buffer.offset)
        self._torn = True  # a write that failed promises nothing
        written = os.write(self._descriptor, lines)
        if written < len(lines):
            self._size += lines.rfind(b"\n", 0, written) + 1
            with contextlib.suppress(OSError):
                self._mend()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._torn = False
        self._size += written
        self.written_bytes += written
        buffer.clear(self._size)

    def _mend(self) -> None:
        """Take away what a failed write left after the last whole line."""
        os.ftruncate(self._descriptor, self._size)
        self._torn = False

    def _rotate(self) -> None:
        """Begin the next file; it gets its name when it has the carried lines, so that no crash finds half of them."""
        draft = self._directory / f"{self._token}.tmp"
        lines = b"".join(self._carried) if self._number else b""
        descriptor = os.open(draft, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_TRUNC, 0o640)
        try:
            self.buffer.move(self._number + 1, len(lines))  # before the file has its name, and so can be shipped
            write_whole(descriptor, lines)
            draft.rename(file_path(self._directory, self._token, self._number + 1))
        except BaseException:
            os.close(descriptor)
            draft.unlink(missing_ok=True)
            self.buffer.move(self._number, self._size)
            raise
        if self._number:
            self._replaced.append(self._descriptor)
        self._number += 1
        self._descriptor, self._size, self._torn = descriptor, len(lines), False
        self._rotate_at = self._size + self._rotate_bytes
        self._day_ends = (self._clock() // _DAY_S + 1) * _DAY_S

    def sync(self) -> None:
        """Make what was written outlive a crash of the machine; raises `OSError`."""
        with self._syncing:
            self._sync()

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
            sync_directory(self._directory)
        if self._rotate_at and not os.fstat(written[0]).st_nlink:  # else it is logged already
            _log.error("usage journal: a file was removed from %s while it was written", self._directory)
            self._rotate_at = 0  # with the next line, so that what comes is found

    def close(self) -> None:
        """Close the file, behind a sync that runs, and keep the buffer's for lines that do not stand."""
        with self._syncing:
            os.close(self._descriptor)
            self._descriptor = -1
        self.buffer.close()
