"""What crashed processes left in the journal: their lines are written where they belong, their requests are ended."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from edge.journal import files
from edge.journal.buffer import left_lines
from edge.journal.records import READ, crashed_line, head_of

_log = logging.getLogger(__name__)

BATCH: Final = 256  # tokens at once: what a start waits for, and descriptors of locks


@dataclass(slots=True)
class Adopted:
    """What a process took over from others that crashed.

    `locks` are of the tokens that it has to deliver, `recovered` counts the requests that it ended, `bad_lines` what
    cannot be read. `last` is the last token that was tried, and `is_more` says that others follow it.
    """

    locks: list[files.TokenLock] = field(default_factory=list)
    recovered: int = 0
    bad_lines: int = 0
    last: str = field(default="", compare=False)
    is_more: bool = False

    def add(self, more: "Adopted") -> None:
        """Add what was taken over later."""
        self.locks += more.locks
        self.recovered += more.recovered
        self.bad_lines += more.bad_lines
        self.last, self.is_more = more.last, more.is_more


def adopt(directory: Path, *, ships: bool, after: str = "") -> Adopted:
    """Take the tokens `after` one whose processes are gone, at most `BATCH`, and end what they left open.

    A token is done with then, unless what it has is to be delivered by who `ships`. One that cannot be adopted is left
    to the next start as it is. Raises `OSError` for a directory that cannot be read.
    """
    adopted = Adopted(last=after)
    failed: list[str] = []
    locks = _take(directory, adopted, failed)
    numbers = files.all_file_numbers(directory) if locks else {}  # when nobody else writes them any more
    for lock in locks:
        try:
            is_empty = _adopt(directory, lock, numbers.get(lock.token, []), adopted)
            if lock.is_left:
                failed.append(f"{lock.token} (it has open records of a newer edge)")
            if ships and not is_empty:
                adopted.locks.append(lock)
            else:
                lock.finish()
        except OSError as error:
            failed.append(f"{lock.token} ({error.strerror})")
            lock.release()
    if failed:
        more = f", and {len(failed) - 1} more" if len(failed) > 1 else ""
        _log.error("usage journal: in %s cannot be adopted, and stays as it is: %s%s", directory, failed[0], more)
    return adopted


def _take(directory: Path, adopted: Adopted, failed: list[str]) -> list[files.TokenLock]:
    """Return the locks of the next tokens whose processes are gone."""
    locks: list[files.TokenLock] = []
    for token in files.tokens_left(directory):
        if token <= adopted.last:
            continue
        if len(locks) == BATCH:
            adopted.is_more = True
            break
        adopted.last = token
        try:
            lock = files.TokenLock.take(directory, token)
        except OSError as error:
            failed.append(f"{token} ({error.strerror})")
        else:
            if lock is not None:  # else this process itself has it, or another that lives
                locks.append(lock)
    return locks


def _adopt(directory: Path, lock: files.TokenLock, numbers: list[int], adopted: Adopted) -> bool:
    """Complete the files of a token, which are `numbers`; return whether it has no line at all."""
    position = files.load_position(directory, lock.token)  # raises where a newer edge knows how far it is delivered
    end = (numbers[-1], files.file_path(directory, lock.token, numbers[-1]).stat().st_size) if numbers else (0, 0)
    if position is not None and position > end:  # the crash of the machine took lines: all anew, before others follow
        files.position_path(directory, lock.token).unlink()
    _write_left(directory, lock.token, numbers, adopted)
    return _end_crashed(directory, lock, numbers, adopted)


def _write_left(directory: Path, token: str, numbers: list[int], adopted: Adopted) -> None:
    """Write what stands in a token's buffer to where it belongs, again if it was."""
    path = files.buffer_path(directory, token)
    try:
        left = left_lines(path)
    except FileNotFoundError:
        return
    if left is None:
        adopted.bad_lines += 1
    elif left.lines:
        known = left.number in numbers  # else its file was about to begin, or was taken away
        file = files.file_path(directory, token, left.number if known else (numbers or [files.START.number])[-1])
        size = file.stat().st_size if numbers else 0
        lines, at = left.lines, left.offset if known else size
        if at > size:  # the machine's crash took what was before, maybe the half of a line
            lines, at = b"\n" + lines, size
        files.write_at(file, at, lines)
        if not numbers:
            numbers.append(files.START.number)
    path.unlink()


def _end_crashed(directory: Path, lock: files.TokenLock, numbers: list[int], adopted: Adopted) -> bool:
    """Append a line for each request that was left open; return whether the token has no line at all."""
    token = lock.token
    (directory / f"{token}.tmp").unlink(missing_ok=True)
    if not numbers:
        return True
    path = files.file_path(directory, token, numbers[-1])
    left: dict[str, bytes] = {}
    newer: set[str] = set()
    line = b"\n"
    with files.open_to_read(path) as file:
        for line in files.lines_in(file):
            head = head_of(line)
            if head is None:
                adopted.bad_lines += 1
            elif head.end is None:
                left[head.id] = line
                if head.v not in READ:
                    newer.add(head.id)
            else:
                left.pop(head.id, None)
        size = file.tell()
    lock.is_left = not newer.isdisjoint(left)
    if not size and len(numbers) == 1:
        path.unlink()
        return True
    _write_ends(path, size, left.values(), adopted, torn=not line.endswith(b"\n"))
    return False


def _write_ends(path: Path, size: int, left: Iterable[bytes], adopted: Adopted, *, torn: bool) -> None:
    lines = [b"\n"] if torn else []
    for line in left:
        try:
            lines.append(crashed_line(line))
        except ValueError:
            adopted.bad_lines += 1
    if lines:
        files.write_at(path, size, b"".join(lines))
        adopted.recovered += len(lines) - torn
