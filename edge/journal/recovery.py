"""What crashed processes left in the journal: their lines are written where they belong, their requests are ended."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from edge.journal import files
from edge.journal.buffer import left_lines
from edge.journal.records import crashed_line, head_of

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Adopted:
    """What a process took over from others that crashed, at its start.

    `locks` are of the tokens that it has to deliver, `recovered` counts the requests that it ended, `bad_lines` what
    cannot be read.
    """

    locks: list[files.TokenLock] = field(default_factory=list)
    recovered: int = 0
    bad_lines: int = 0


def adopt(directory: Path, *, ships: bool) -> Adopted:
    """Take every token whose process is gone, and end what it left open.

    A token is done with then, unless what it has is to be delivered by who `ships`.
    """
    adopted = Adopted()
    for token in files.tokens_left(directory):
        lock = None
        try:
            lock = files.TokenLock.take(directory, token)
            if lock is None:  # this process itself, or another that lives
                continue
            _write_left(directory, token, adopted)
            empty = _end_crashed(directory, token, adopted)
        except OSError as error:  # the next start tries again
            _log.error("usage journal: %s.*.jsonl cannot be adopted (%s)", directory / token, error.strerror)
            if lock is not None:
                lock.release()
            continue
        if ships and not empty:
            adopted.locks.append(lock)
        else:
            lock.finish()
    return adopted


def _write_left(directory: Path, token: str, adopted: Adopted) -> None:
    """Write what stands in a token's buffer to where it belongs, again if it was."""
    path = files.buffer_path(directory, token)
    try:
        left = left_lines(path)
    except FileNotFoundError:
        return
    if left is None:
        adopted.bad_lines += 1
    elif left.lines:
        numbers = files.file_numbers(directory, token)
        known = left.number in numbers  # else its file was about to begin, or was taken away
        file = files.file_path(directory, token, left.number if known else (numbers or [files.START.number])[-1])
        size = file.stat().st_size if numbers else 0
        lines, at = left.lines, left.offset if known else size
        if at > size:  # the machine's crash took what was before, maybe the half of a line
            lines, at = b"\n" + lines, size
        files.write_at(file, at, lines)
    path.unlink()


def _end_crashed(directory: Path, token: str, adopted: Adopted) -> bool:
    """Append a line for each request that was left open; return whether the token has no line at all."""
    (directory / f"{token}.tmp").unlink(missing_ok=True)
    numbers = files.file_numbers(directory, token)
    if not numbers:
        return True
    path = files.file_path(directory, token, numbers[-1])
    left: dict[str, bytes] = {}
    line = b"\n"
    with path.open("rb") as file:
        for line in files.lines_in(file):
            head = head_of(line)
            if head is None:
                adopted.bad_lines += 1
            elif head.end is None:
                left[head.id] = line
            else:
                left.pop(head.id, None)
        size = file.tell()
    position = files.load_position(directory, token)
    if position is not None and position > (numbers[-1], size):  # the crash of the machine took lines: all anew
        files.position_path(directory, token).unlink()
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
