"""Lines that outlive the process before they stand in a file: memory of the kernel's, mapped from a file.

To put a line costs a copy, not a system call, and the kernel keeps what a killed process had put. What a crash of the
machine leaves may be of two moments; a checksum tells, and then nothing of it is believed.

The file has all its blocks from the start, since a page that gets none ends the process (SIGBUS, mmap(2)). File systems
that copy on write look for a new block all the same.

The first 32 bytes are four words: a mark, the length of the lines and their CRC-32 in one (one store, so that they are
always of the same lines), and the number and offset of the file where the lines are to stand. Whoever finds the lines
writes them there: it is the same bytes again where that had been done in part or in full.
"""

import mmap
import os
from pathlib import Path
from typing import Final, NamedTuple
from zlib import crc32

from edge.journal.files import LeftAlone, open_to_read, write_whole

_NAME: Final = b"edgebuf"
_MARK: Final = int.from_bytes(_NAME + b"1", "big")  # the last byte is the version of the format
_HEADER_BYTES: Final = 32
_MAX_LEFT_BYTES: Final = 2**26  # of lines that any edge may have left
_LINES, _NUMBER, _OFFSET = 1, 2, 3  # words; 0 is the mark
_UNKNOWN: Final = 0  # a number that no file has


class LeftLines(NamedTuple):
    """What a process that is gone had put, and where in its files that is to stand; 0 is no file."""

    lines: bytes
    number: int
    offset: int


class LineBuffer:
    """Whole lines on their way to a file; raises `OSError` when its own file cannot be made, in full.

    `length` is how many bytes are in it, `offset` where in the file the first of them belongs.
    """

    def __init__(self, path: Path, max_bytes: int) -> None:
        self.length = 0
        self.offset = 0
        self._path = path
        self._max_bytes = max_bytes
        self._crc = 0
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o640)
        try:
            blank = bytes(_HEADER_BYTES + max_bytes)
            write_whole(descriptor, blank)  # blocks of its own: a full disk is found here, not later
            self._map = mmap.mmap(descriptor, len(blank))
        except BaseException:
            path.unlink()
            raise
        finally:
            os.close(descriptor)
        # Words are stored through a view, since each store must be one: `struct.pack_into` clears its bytes first.
        self._words = memoryview(self._map)[:_HEADER_BYTES].cast("Q")
        self._words[0] = _MARK

    def put(self, line: bytes) -> bool:
        """Keep a line; say whether there was room for it."""
        length = self.length + len(line)
        if length > self._max_bytes:
            return False
        self._map[_HEADER_BYTES + self.length : _HEADER_BYTES + length] = line
        self._crc = crc32(line, self._crc)
        self._words[_LINES] = length << 32 | self._crc
        self.length = length
        return True

    def lines(self, start: int = 0) -> bytes:
        """Return the lines, from a place in them on."""
        return self._map[_HEADER_BYTES + start : _HEADER_BYTES + self.length]

    def clear(self, offset: int) -> None:
        """Forget the lines, which stand in the file now; the next ones belong at `offset`."""
        self._words[_LINES] = self.length = self._crc = 0
        self._words[_OFFSET] = self.offset = offset

    def move(self, number: int, offset: int) -> None:
        """Say that the lines belong to another file, before it exists."""
        self._words[_NUMBER] = _UNKNOWN
        self._words[_OFFSET] = self.offset = offset
        self._words[_NUMBER] = number

    def close(self) -> None:
        """Give the memory back, and remove the file unless lines are left in it."""
        self._words.release()
        self._map.close()
        if not self.length:
            self._path.unlink(missing_ok=True)


def left_lines(path: Path) -> LeftLines | None:
    """Return what stands in the buffer of a process that is gone; None where that cannot be believed.

    Raises `OSError`, which is `LeftAlone` for a format that this edge does not know.
    """
    with open_to_read(path) as file:
        content = file.read(_HEADER_BYTES + _MAX_LEFT_BYTES)
    if len(content) < _HEADER_BYTES:
        return None
    mark, state, number, offset = memoryview(content)[:_HEADER_BYTES].cast("Q")
    if mark != _MARK and mark.to_bytes(8, "big").startswith(_NAME):
        raise LeftAlone(f"{path.name} is of a format that this edge does not know")
    length, crc = divmod(state, 2**32)
    lines = content[_HEADER_BYTES : _HEADER_BYTES + length]
    if mark != _MARK or len(lines) != length or crc32(lines) != crc:
        return None
    return LeftLines(lines, number, offset)
