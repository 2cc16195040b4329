"""Where the numbers of a run go: JSON, CSV, and a line for each request while it runs."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import msgspec
import orjson

from loadtest.outcome import Outcome

_LONG: Final = ("itls",)  # which no cell holds


def save_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write a document; whoever reads the file meanwhile sees the old one or the new one."""
    fresh = path.with_name(path.name + ".new")
    fresh.write_bytes(orjson.dumps(document, option=orjson.OPT_INDENT_2))
    fresh.replace(path)


def save_csv(path: Path, documents: Sequence[Mapping[str, Any]]) -> None:
    """Write a row for each document: what is one value in it, under the names of all."""
    names = list(dict.fromkeys(name for each in documents for name, value in each.items() if _is_cell(name, value)))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(documents)
    path.write_text(text.getvalue())


def _is_cell(name: str, value: object) -> bool:
    return not isinstance(value, dict | list) and not name.endswith("_hdr")


class RequestsFile:
    """A file with a line for each request, JSON or, with the suffix `.csv`, a row; nothing where no path is given."""

    def __init__(self, path: Path | None) -> None:
        self._file = path.open("w", newline="") if path is not None else None
        names = Outcome.__struct_fields__
        self._names = names if path is None or path.suffix != ".csv" else [each for each in names if each not in _LONG]
        self._rows = csv.writer(self._file) if self._file and path and path.suffix == ".csv" else None
        if self._rows is not None:
            self._rows.writerow([*self._names, "tpot"])

    def add(self, outcome: Outcome) -> None:
        """Write a finished request."""
        if self._rows is not None:
            self._rows.writerow([*(getattr(outcome, name) for name in self._names), outcome.tpot])
        elif self._file is not None:
            told = {name: getattr(outcome, name) for name in self._names}
            self._file.write(msgspec.json.encode(told | {"tpot": outcome.tpot}).decode() + "\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
