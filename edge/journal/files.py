"""The directory of usage records: names of its files, who may write them, and how far they are delivered.

`<token>.NNNN.jsonl` are the records of one process, `<token>.buffer` what is on its way there, `<token>.lock` is locked
(flock) by whoever may write them, and `<token>.shipped` says how far they are delivered. What is of a format that
this edge does not know is left to one that does.
Sources: https://man7.org/linux/man-pages/man2/flock.2.html, https://man7.org/linux/man-pages/man2/open.2.html
"""

import contextlib
import errno
import fcntl
import os
import re
import secrets
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple, Self

import msgspec

MAX_LINE_BYTES: Final = 2**19  # far over any line of ours; a damaged file may have no newline at all
_NOTE_VERSION: Final = 1  # of `<token>.shipped`
_MAX_NOTE_BYTES: Final = 4096
_TOKEN: Final = re.compile(r"[0-9]{8}T[0-9]{6}Z-[0-9a-f]{16}")
_FILE: Final = re.compile(rf"({_TOKEN.pattern})\.([0-9]{{4,}})\.jsonl")


class LeftAlone(OSError):
    """A file that is none of this edge's, or of a newer one: nothing is read from it, written or removed."""

    def __init__(self, reason: str) -> None:
        super().__init__(errno.EINVAL, reason)


def open_regular(path: Path, flags: int) -> int:
    """Return a descriptor of a regular file; raises `OSError` for anything else.

    To open a FIFO would wait for who opens its other end, and to read a device may never end.
    """
    descriptor = os.open(path, flags | os.O_NONBLOCK, 0o640)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise LeftAlone(f"{path.name} is no regular file")
    return descriptor


def open_to_read(path: Path) -> BinaryIO:
    """Return a regular file, to be read and closed; raises `OSError` for anything else."""
    return os.fdopen(open_regular(path, os.O_RDONLY), "rb")


class TokenLock:
    """The right to a token's files, held until `release` or `finish`.

    `is_left` says that something is left to do with them which this edge cannot.
    """

    def __init__(self, directory: Path, token: str, descriptor: int) -> None:
        self.token = token
        self.is_left = False
        self._directory = directory
        self._descriptor = descriptor

    @classmethod
    def take(cls, directory: Path, token: str, flags: int = 0) -> Self | None:
        """Return the lock of a token, None while another process has it or when it is done with."""
        path = directory / f"{token}.lock"
        try:
            descriptor = open_regular(path, os.O_RDWR | os.O_NOFOLLOW | flags)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), path.stat()):  # else it was removed between open and flock
                return cls(directory, token, descriptor)
        except (BlockingIOError, FileNotFoundError):
            pass
        os.close(descriptor)
        return None

    def release(self) -> None:
        """Leave the token to whoever starts next; again, or after `finish`, it does nothing."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def finish(self, *, leaves_note: bool = False) -> None:
        """Give the token up for good, unless something is left to do with its files.

        The note of how far it is delivered may be left, as the proof that it is.
        """
        if self._descriptor >= 0 and not self.is_left:
            (self._directory / f"{self.token}.lock").unlink(missing_ok=True)
            if leaves_note:
                return self.release()
            with contextlib.suppress(IsADirectoryError):  # which is none of ours
                position_path(self._directory, self.token).unlink(missing_ok=True)
        self.release()


def new_token(now: float) -> str:
    """Return a name for a process: the time of its start and 64 random bits."""
    return time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(now)) + "-" + secrets.token_hex(8)


def lock_new_token(directory: Path, now: float) -> TokenLock:
    """Return the lock of a new token; raises `OSError`."""
    while True:
        lock = TokenLock.take(directory, new_token(now), os.O_CREAT)
        if lock is not None:  # else one that starts at the same moment took it for a dead one's, and removes it
            return lock


class Position(NamedTuple):
    """A place between two lines of a token's files."""

    number: int
    offset: int


class _SavedPosition(msgspec.Struct):
    file: str
    offset: int
    v: int = _NOTE_VERSION


class _Versioned(msgspec.Struct):
    """What a note of every version has."""

    v: int = _NOTE_VERSION


START: Final = Position(1, 0)


def position_path(directory: Path, token: str) -> Path:
    """Return the file that says how far a token's records are delivered."""
    return directory / f"{token}.shipped"


def load_position(directory: Path, token: str) -> Position | None:
    """Return how far a token's records are delivered, None when that is not known.

    Raises `LeftAlone` for a note of a newer edge.
    """
    path = position_path(directory, token)
    try:
        with open_to_read(path) as file:
            note = file.read(_MAX_NOTE_BYTES)
    except OSError:
        return None
    try:
        if msgspec.json.decode(note, type=_Versioned).v > _NOTE_VERSION:
            raise LeftAlone(f"{path.name} is of a newer edge")
        saved = msgspec.json.decode(note, type=_SavedPosition)
    except ValueError:
        return None
    match = _FILE.fullmatch(saved.file)
    return Position(int(match[2]), saved.offset) if match is not None and saved.offset >= 0 else None


def save_position(directory: Path, token: str, position: Position) -> None:
    """Note how far a token's records are delivered; a crash leaves the old note or the new one."""
    saved = _SavedPosition(file_path(directory, token, position.number).name, position.offset)
    draft = directory / f"{token}.shipped.tmp"
    draft.unlink(missing_ok=True)  # of a crash, or something that would not be written
    draft.write_bytes(msgspec.json.encode(saved))
    draft.rename(position_path(directory, token))


def file_path(directory: Path, token: str, number: int) -> Path:
    """Return the path of one file of a token, the first being 1."""
    return directory / f"{token}.{number:04d}.jsonl"


def buffer_path(directory: Path, token: str) -> Path:
    """Return the file behind the lines of a token that do not stand in its files yet."""
    return directory / f"{token}.buffer"


def refused_path(directory: Path, token: str) -> Path:
    """Return the file of the records of a token that the sink refuses: not one of those that are read again."""
    return directory / f"{token}.refused"


def file_numbers(directory: Path, token: str) -> list[int]:
    """Return which files of a token exist, in order."""
    return all_file_numbers(directory).get(token, [])


def all_file_numbers(directory: Path) -> dict[str, list[int]]:
    """Return which files of each token exist, in order."""
    found: dict[str, list[int]] = {}
    for name in os.listdir(directory):
        if (each := _FILE.fullmatch(name)) is not None:
            found.setdefault(each[1], []).append(int(each[2]))
    return {token: sorted(numbers) for token, numbers in found.items()}


def lines_in(file: BinaryIO) -> Iterator[bytes]:
    """Yield the lines of a file with their newlines; one that is too long to be one of ours comes in pieces."""
    return iter(lambda: file.readline(MAX_LINE_BYTES), b"")


def write_whole(descriptor: int, data: bytes) -> None:
    """Write all of `data` with one call; raises `OSError`, also when there was room for a part only."""
    if os.write(descriptor, data) != len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def write_at(path: Path, offset: int, data: bytes) -> None:
    """Write into a file, for good, and make it where there is none.

    Raises `OSError`; the file is then no longer than it was.
    """
    descriptor = open_regular(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW)
    try:
        size = os.fstat(descriptor).st_size
        os.lseek(descriptor, offset, os.SEEK_SET)
        try:
            write_whole(descriptor, data)
        except OSError:
            os.ftruncate(descriptor, size)
            raise
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_directory(directory: Path) -> None:
    """Make the names of files that were made or renamed outlive a crash of the machine."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def tokens_left(directory: Path) -> list[str]:
    """Return the tokens that are not done with, in the order of their starts; their processes may live."""
    return sorted(path.stem for path in directory.glob("*.lock") if _TOKEN.fullmatch(path.stem))
