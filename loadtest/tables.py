"""Tables for a terminal: names with values, and columns that are Markdown too."""

from collections.abc import Iterable, Sequence
from typing import Final

_NAME: Final = 40
_VALUE: Final = 12


def pairs(rows: Iterable[tuple[str, str]]) -> list[str]:
    """Return a line for each name and its value."""
    return [f"{name + ':':<{_NAME}} {value:>{_VALUE}}" for name, value in rows]


def columns(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table; the first column names the row, the others are numbers."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return [_line(header, widths), _line(rule, widths), *(_line(row, widths) for row in rows)]


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = zip(cells, widths, strict=True)
    return "| " + " | ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]) + " |"
