"""What was used, from the journal: the logic of `edge usage`.

Every file is read as a stream, those of running processes too, and nothing is written. Only ends count: a request that
runs has none yet.
"""

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from operator import attrgetter
from pathlib import Path
from typing import Any, Final, Literal, get_args

import msgspec
import orjson

from edge.commands.arguments import add_config, add_json, checked
from edge.config.reading import load
from edge.config.values import seconds
from edge.exchange import Unit, UsageSource
from edge.journal.files import LeftAlone, lines_in, open_to_read
from edge.journal.records import CRASHED, VERSION

By = Literal["key", "user", "model", "day"]

_FIRST_UNIT: Final = "images"  # of lines without `unit`, of the edge before units had kinds
_CLOCK_SLACK_S: Final = 3600  # by how much clocks are corrected


class _Ended(msgspec.Struct, gc=False):
    """What is asked of a line."""

    time: str
    v: int = VERSION
    end: str | None = None
    key_id: str | None = None
    user: str | None = None
    model: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    units: int = 0
    unit: Unit | None = None
    usage_source: str = ""


_decoder: Final = msgspec.json.Decoder(_Ended)


@dataclass(slots=True)
class Row:
    """The sums of one key, user, model or day (UTC).

    `images`, `seconds` and `characters` are the `units` of records, each kind for itself. `estimated` and `crashed` say
    how many of the requests were so.
    """

    name: str
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


@dataclass(frozen=True, slots=True)
class Totals:
    """Rows, the largest first but days in order, and how many lines could not be read."""

    rows: list[Row]
    unreadable: int


def totals(directory: Path, since: float | None, until: float | None, by: By) -> Totals:
    """Return the sums of the requests that began from `since` to before `until` (Unix seconds); raises `OSError`."""
    first = "" if since is None else _as_text(since)
    after = "~" if until is None else _as_text(until)  # text of one width sorts as time does
    rows: dict[str, Row] = {}
    unreadable = 0
    for path in sorted(directory.glob("*.jsonl")):
        try:
            opened = open_to_read(path)
        except (LeftAlone, FileNotFoundError):  # a FIFO, say, or a link to nothing
            unreadable += 1
            continue
        with opened as file:
            if since is not None and os.fstat(file.fileno()).st_mtime < since - _CLOCK_SLACK_S:
                continue  # its last line was written before
            for line in lines_in(file):
                try:
                    ended = _decoder.decode(line)
                except (ValueError, RecursionError):
                    unreadable += line.endswith(b"\n")  # else it may be one that is being written
                    continue
                unreadable += ended.v > VERSION
                if ended.v > VERSION or ended.end is None or not first <= ended.time < after:
                    continue
                name = _name(ended, by)
                row = rows.get(name)
                if row is None:
                    row = rows[name] = Row(name)
                _count(row, ended)
    return Totals(sorted(rows.values(), key=attrgetter("name") if by == "day" else _largest_first), unreadable)


def _name(ended: _Ended, by: By) -> str:
    return {"key": ended.key_id, "user": ended.user, "model": ended.model, "day": ended.time[:10]}[by] or ""


def _count(row: Row, ended: _Ended) -> None:
    row.requests += 1
    row.prompt_tokens += ended.prompt_tokens
    row.completion_tokens += ended.completion_tokens
    row.cached_tokens += ended.cached_tokens
    row.reasoning_tokens += ended.reasoning_tokens
    if ended.units:
        unit = ended.unit or _FIRST_UNIT
        setattr(row, unit, getattr(row, unit) + ended.units)
    row.estimated += ended.usage_source == UsageSource.ESTIMATED.value
    row.crashed += ended.end == CRASHED


def _largest_first(row: Row) -> tuple[int, int, str]:
    return -(row.prompt_tokens + row.completion_tokens), -row.requests, row.name


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


# --- the command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `edge usage`."""
    at = checked(lambda text: parse_time(text, time.time()))
    parser.add_argument("--since", type=at, metavar="T", help="a time: 24h (ago), 2026-11-25, 2026-11-25T03:10:00Z")
    parser.add_argument("--until", type=at, metavar="T", help="a time; requests that began then do not count")
    parser.add_argument("--by", choices=get_args(By), default="user", help="one row for each; default: user")
    add_json(parser)
    add_config(parser)


def run(parsed: argparse.Namespace) -> int:
    """Print the totals of the journal that the file names."""
    return main(load(parsed.config).usage.journal, parsed)


def main(directory: Path, parsed: argparse.Namespace) -> int:
    """Print the totals of the journal in a directory; return the exit code."""
    if not directory.is_dir():
        raise ValueError(f"there is no journal in {directory}: the first `edge serve` makes it")
    found = totals(directory, parsed.since, parsed.until, parsed.by)
    if parsed.json:
        print(orjson.dumps([as_json(row, parsed.by) for row in found.rows], option=orjson.OPT_INDENT_2).decode())
    else:
        print(render(found.rows, parsed.by))
    if found.unreadable:
        problem = "lines cannot be read and are not counted: they are damaged, or of a newer edge"
        print(f"edge: {found.unreadable} {problem}", file=sys.stderr)
    return 0


def as_json(row: Row, by: By) -> dict[str, Any]:
    """Return a row for JSON; its name stands under what it is of."""
    return {by: row.name, **{name: getattr(row, name) for name in _SUMS}}


def render(rows: Iterable[Row], by: By) -> str:
    """Return a table for people, with a last line for all."""
    rows = list(rows)
    total = Row("TOTAL")
    for row in rows:
        total.add(row)
    header = (by.upper(), *(name.removesuffix("_tokens").upper() for name in _SUMS))
    cells = [header, *((_shown(row.name), *(str(getattr(row, name)) for name in _SUMS)) for row in (*rows, total))]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join([first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))])
        for first, *rest in cells
    )


def _shown(name: str) -> str:
    """Return a name for a terminal: a model's is what a client wrote."""
    return (name if name.isprintable() else ascii(name)) or "-"
