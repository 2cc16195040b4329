"""Records of the journal, delivered to the sink once more: for a sink that lost some."""

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from edge.journal.files import LeftAlone, lines_in, open_to_read
from edge.journal.records import head_of
from edge.journal.sinks.protocol import Sink, SinkRefused

_BATCH: Final = 500
_ENOUGH: Final = 20  # refusals of a sink that takes nothing: it is wrong, and not what it is sent


async def replay(directory: Path, sink: Sink, first: str, after: str) -> tuple[int, int]:
    """Deliver the ends of requests that began from `first` to before `after`, RFC 3339 in UTC with milliseconds.

    Returns how many the sink took and how many it refused. Raises: `SinkUnavailable`, `OSError`.
    """
    taken = refused = 0
    batch: list[bytes] = []
    for line in _ends(directory, first, after):
        batch.append(line)
        if len(batch) == _BATCH:
            bad = len(await deliver_apart(sink, batch))
            taken, refused, batch = taken + len(batch) - bad, refused + bad, []
    if batch:
        bad = len(await deliver_apart(sink, batch))
        taken, refused = taken + len(batch) - bad, refused + bad
    return taken, refused


def _ends(directory: Path, first: str, after: str) -> Iterator[bytes]:
    for path in sorted(directory.glob("*.jsonl")):
        try:
            opened = open_to_read(path)
        except (LeftAlone, FileNotFoundError):
            continue
        with opened as file:
            for line in lines_in(file):
                head = head_of(line) if line.endswith(b"\n") else None
                if head is not None and head.end is not None and first <= head.time < after:
                    yield line[:-1]


async def deliver_apart(sink: Sink, lines: list[bytes], *, takes: bool = False) -> list[bytes]:
    """Deliver lines, in halves where a sink refuses them together; return those that it refuses alone.

    `takes`: it is known to take others.
    Raises: `SinkUnavailable`; `SinkRefused` when it refuses one after another and takes none, the last one neither.
    """
    refused: list[bytes] = []
    parts = [lines]
    while parts:
        part = parts.pop()
        if not part:
            continue
        try:
            await sink.deliver(part)
            takes = True
        except SinkRefused:
            middle = len(part) // 2
            if middle:
                parts += [part[middle:], part[:middle]]
            else:
                refused += part
            if len(refused) >= _ENOUGH and not takes:
                if not parts:
                    raise
                await sink.deliver(parts[0][-1:])
                takes, parts[0] = True, parts[0][:-1]
    return refused
