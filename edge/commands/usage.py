"""What was used, from the journal: the logic of `edge usage`.

Every file is read as a stream, those of running processes too, and nothing is written. Only ends count: a request that
runs has none yet.
"""

import argparse
import asyncio
import csv
import dataclasses
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import repeat
from operator import attrgetter
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, cast, get_args

import orjson

from edge.commands.arguments import add_config, checked
from edge.config.process_settings import UsageConfig
from edge.config.reading import load
from edge.config.values import seconds
from edge.exchange import UsageSource
from edge.garbage import no_collection
from edge.journal.ends import FIRST_UNIT, Ended, blocks_of, ends_in
from edge.journal.files import LeftAlone, open_to_read
from edge.journal.records import CRASHED
from edge.journal.replaying import replay
from edge.journal.sinks.protocol import SinkUnavailable
from edge.journal.sinks.table import sink_of

By = Literal["key", "user", "model", "region", "month", "day", "hour"]

_FIELDS: Final = {"key": "key_id", "user": "user", "model": "model", "region": "region"}
_TIMES: Final = {"month": 7, "day": 10, "hour": 13}  # how many characters of a time name it, in UTC
_CLOCK_SLACK_S: Final = 3600  # by how much clocks are corrected
_SOON_READ_BYTES: Final = 32 * 2**20


@dataclass(slots=True)
class Row:
    """The sums of one key, user, model, region, month, day or hour (UTC), or of one of several of these together.

    `images`, `seconds` and `characters` are the `units` of records, each kind for itself. `estimated` and `crashed` say
    how many of the requests were so.
    """

    names: tuple[str, ...]
    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    images: int = 0
    seconds: int = 0
    characters: int = 0
    estimated: int = 0
    crashed: int = 0

    def add(self, other: "Row") -> None:
        """Add the sums of another row."""
        for name in _SUMS:
            setattr(self, name, getattr(self, name) + getattr(other, name))


_SUMS: Final = tuple(each.name for each in dataclasses.fields(Row))[1:]
_fields_of: Final = attrgetter("names", *_SUMS)
_Packed = tuple[Any, tuple[Any, ...]]  # the key of a row, and its fields


class Wanted(NamedTuple):
    """Which requests count: those that began from `since` to before `until` (Unix seconds), of a user or a key."""

    since: float | None = None
    until: float | None = None
    user: str | None = None
    key: str | None = None


EVERYTHING: Final = Wanted()


@dataclass(frozen=True, slots=True)
class Totals:
    """Rows, the largest first but times in order, and how many lines could not be read."""

    rows: list[Row]
    unreadable: int


def totals(directory: Path, by: Sequence[By], wanted: Wanted = EVERYTHING) -> Totals:
    """Return the sums of the requests that are wanted, a row for each combination of what `by` names.

    Large journals are read by a process for each core. Raises: `OSError`.
    """
    with no_collection():  # rows have no cycles, and a look at half a million of them takes a third of all
        paths = sorted(directory.glob("*.jsonl"))
        parts = _parts(paths)
        if len(parts) == 1:
            sums, unreadable = _part_of(paths, by, wanted)
        else:
            with ProcessPoolExecutor(len(parts), mp_context=multiprocessing.get_context("fork")) as processes:
                sums, unreadable = _together(processes.map(_packed_part_of, parts, repeat(by), repeat(wanted)))
        in_order = any(each in _TIMES for each in by)
        return Totals(sorted(sums.values(), key=attrgetter("names") if in_order else _largest_first), unreadable)


def _packed_part_of(paths: Sequence[Path], by: Sequence[By], wanted: Wanted) -> tuple[list[_Packed], int]:
    """Return the same as `_part_of`, as tuples: of rows a process takes as long to hand them over as to make them."""
    rows, unreadable = _part_of(paths, by, wanted)
    return [(key, _fields_of(row)) for key, row in rows.items()], unreadable


def _together(parts: Iterable[tuple[list[_Packed], int]]) -> tuple[dict[Any, Row], int]:
    """Return the sums of all parts."""
    rows: dict[Any, Row] = {}
    unreadable = 0
    for packed, bad in parts:
        unreadable += bad
        for key, fields in packed:
            row = rows.get(key)
            if row is None:
                rows[key] = Row(*fields)
            else:
                row.add(Row(*fields))
    return rows, unreadable


def _parts(paths: Sequence[Path]) -> list[list[Path]]:
    """Return files in parts of about the same size, as many as there are cores, one part of what is soon read."""
    sizes = [(path.stat().st_size if path.is_file() else 0, path) for path in paths]
    cores = len(os.sched_getaffinity(0)) if sum(size for size, _ in sizes) > _SOON_READ_BYTES else 1
    parts: list[list[Path]] = [[] for _ in range(cores)]
    filled = [0] * cores
    for size, path in sorted(sizes, reverse=True):
        least = filled.index(min(filled))
        parts[least].append(path)
        filled[least] += size
    return parts


def _part_of(paths: Sequence[Path], by: Sequence[By], wanted: Wanted) -> tuple[dict[Any, Row], int]:
    """Return the sums of some files, and how many lines could not be read."""
    first = "" if wanted.since is None else _as_text(wanted.since)
    after = "~" if wanted.until is None else _as_text(wanted.until)  # text of one width sorts as time does
    is_wanted = _of(wanted)
    group = _grouping(by)
    rows: dict[Any, Row] = {}
    unreadable = 0
    for block in _blocks(paths, wanted.since):
        if block is None:
            unreadable += 1
            continue
        ends, bad = ends_in(block)
        unreadable += bad
        for ended in ends if is_wanted is None else filter(is_wanted, ends):
            if first <= ended.time < after:
                key = group(ended)
                row = rows.get(key)
                if row is None:
                    row = rows[key] = Row(_names(by, ended))
                _count(row, ended)
    return rows, unreadable


def _blocks(paths: Iterable[Path], since: float | None) -> Iterator[bytes | None]:
    """Yield the lines of every file that may have what began since then; None for one that is none."""
    for path in paths:
        try:
            opened = open_to_read(path)
        except (LeftAlone, FileNotFoundError):  # a FIFO, say, or a link to nothing
            yield None
            continue
        with opened as file:
            if since is None or os.fstat(file.fileno()).st_mtime >= since - _CLOCK_SLACK_S:
                yield from blocks_of(file)  # else its last line was written before


def _of(wanted: Wanted) -> Callable[[Ended], bool] | None:
    """Return whether an end is of the user and the key that are wanted, None where all are."""
    if wanted.user is None and wanted.key is None:
        return None
    user, key = wanted.user, wanted.key
    return lambda ended: (user is None or ended.user == user) and (key is None or ended.key_id == key)


def _grouping(by: Sequence[By]) -> Callable[[Ended], Any]:
    """Return what makes of an end the key of its row: a call or two in C, as it is asked a million times."""
    fields = [_FIELDS[each] for each in by if each in _FIELDS]
    width = max((_TIMES[each] for each in by if each in _TIMES), default=0)
    if not fields:
        return lambda ended: ended.time[:width]
    of_fields = attrgetter(*fields)
    return (lambda ended: (of_fields(ended), ended.time[:width])) if width else of_fields


def _names(by: Sequence[By], ended: Ended) -> tuple[str, ...]:
    return tuple(ended.time[: _TIMES[each]] if each in _TIMES else getattr(ended, _FIELDS[each]) or "" for each in by)


def _count(row: Row, ended: Ended) -> None:
    row.requests += 1
    row.prompt_tokens += ended.prompt_tokens
    row.completion_tokens += ended.completion_tokens
    row.cached_tokens += ended.cached_tokens
    row.reasoning_tokens += ended.reasoning_tokens
    if ended.units:
        unit = ended.unit or FIRST_UNIT
        setattr(row, unit, getattr(row, unit) + ended.units)
    if ended.usage_source == _ESTIMATED:
        row.estimated += 1
    if ended.end == CRASHED:
        row.crashed += 1


_ESTIMATED: Final = UsageSource.ESTIMATED.value


def _largest_first(row: Row) -> tuple[int, int, tuple[str, ...]]:
    return -(row.prompt_tokens + row.completion_tokens), -row.requests, row.names


def _as_text(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def parse_time(text: str, now: float) -> float:
    """Return Unix seconds of a duration (that long ago), a day (its begin in UTC) or RFC 3339; raises `ValueError`."""
    try:
        return now - seconds(text)
    except ValueError:
        pass
    try:
        at = datetime.fromisoformat(text)
        return (at if at.tzinfo is not None else at.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        raise ValueError(f"{text!r} is no time: write 24h, 2026-11-25 or 2026-11-25T03:10:00Z") from None


def parse_by(text: str) -> tuple[By, ...]:
    """Return what a row is of, as `key,model,day`; raises `ValueError`."""
    names = tuple(text.split(","))
    if not set(names) <= set(get_args(By)) or len(set(names)) < len(names):
        raise ValueError(f"{text!r}: write one or more of {', '.join(get_args(By))}, with commas between them")
    return cast(tuple[By, ...], names)


# --- the command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `edge usage`."""
    at = checked(lambda text: parse_time(text, time.time()))
    add = parser.add_argument
    add("--since", type=at, metavar="T", help="a time: 24h (ago), 2026-11-25, 2026-11-25T03:10:00Z")
    add("--until", type=at, metavar="T", help="a time; requests that began then do not count")
    add("--user", metavar="U", help="of this user only")
    add("--key", metavar="ID", help="of this key only")
    by = f"one row for each, or for each combination: {', '.join(get_args(By))}; default: user"
    add("--by", type=checked(parse_by), default=("user",), metavar="A,B", help=by)
    written = parser.add_mutually_exclusive_group()
    written.add_argument("--json", action="store_true", help="print JSON")
    written.add_argument("--csv", action="store_true", help="print CSV (RFC 4180), without a total")
    add_config(parser)
    verbs = parser.add_subparsers(metavar="", dest="verb")
    text = "deliver records to the sink once more, which keeps the first of each id"
    replaying = verbs.add_parser("replay", help=text, description=text)
    replaying.add_argument("--since", type=at, required=True, metavar="T", help="a time, as above")
    replaying.add_argument("--until", type=at, metavar="T", help="a time; requests that began then are left out")
    add_config(replaying)


def run(parsed: argparse.Namespace) -> int:
    """Print the totals of the journal that the file names, or deliver it once more."""
    config = load(parsed.config).usage
    return _replay(config, parsed) if parsed.verb == "replay" else main(config.journal, parsed)


def _replay(config: UsageConfig, parsed: argparse.Namespace) -> int:
    """Deliver records once more; return 1 when the sink refuses some."""
    after = "~" if parsed.until is None else _as_text(parsed.until)
    try:
        taken, refused = asyncio.run(_deliver_again(config, _as_text(parsed.since), after))
    except SinkUnavailable as error:
        raise ValueError(f"usage.sink: {error}: mend it, and begin anew: it keeps the first of each id") from None
    print(f"{taken} records delivered, {refused} refused")
    return int(refused > 0)


async def _deliver_again(config: UsageConfig, first: str, after: str) -> tuple[int, int]:
    sink = sink_of(config)
    if sink is None:
        raise ValueError("there is no usage.sink in the file: name one")
    try:
        return await replay(config.journal, sink, first, after)
    finally:
        await sink.close()


def main(directory: Path, parsed: argparse.Namespace) -> int:
    """Print the totals of the journal in a directory; return the exit code."""
    if not directory.is_dir():
        raise ValueError(f"there is no journal in {directory}: the first `edge serve` makes it")
    found = totals(directory, parsed.by, Wanted(parsed.since, parsed.until, parsed.user, parsed.key))
    if parsed.json:
        print(orjson.dumps([as_json(row, parsed.by) for row in found.rows], option=orjson.OPT_INDENT_2).decode())
    elif parsed.csv:
        lines = csv.writer(sys.stdout)
        lines.writerow((*parsed.by, *_SUMS))
        lines.writerows((*map(_in_csv, row.names), *_fields_of(row)[1:]) for row in found.rows)
    else:
        print(render(found.rows, parsed.by))
    if found.unreadable:
        problem = "lines cannot be read and are not counted: they are damaged, or of a newer edge"
        print(f"edge: {found.unreadable} {problem}", file=sys.stderr)
    return 0


def as_json(row: Row, by: Sequence[By]) -> dict[str, Any]:
    """Return a row for JSON; its names stand under what they are of."""
    return {**dict(zip(by, row.names, strict=True)), **{name: getattr(row, name) for name in _SUMS}}


def render(rows: Iterable[Row], by: Sequence[By]) -> str:
    """Return a table for people, with a last line for all."""
    rows = list(rows)
    total = Row(("TOTAL", *("" for _ in by[1:])))
    for row in rows:
        total.add(row)
    named = len(by)
    header = (*(each.upper() for each in by), *(name.removesuffix("_tokens").upper() for name in _SUMS))
    body = [(*map(_shown, row.names), *(str(getattr(row, name)) for name in _SUMS)) for row in rows]
    cells = [header, *body, (*total.names, *(str(getattr(total, name)) for name in _SUMS))]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if at < named else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in cells
    )


def _shown(name: str) -> str:
    """Return a name for a terminal: a model's is what a client wrote."""
    return (name if name.isprintable() else ascii(name)) or "-"


def _in_csv(name: str) -> str:
    """Return a name for a sheet: what a client wrote must be no formula there (OWASP: CSV injection)."""
    return f"'{name}" if name.startswith(("=", "+", "-", "@", "\t", "\r")) else name
