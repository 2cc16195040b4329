"""Read TOML tables key by key, noting every problem with its line instead of stopping at the first.

The kinds of values are `kinds.py`'s, the notations inside strings `values.py`'s.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Final, TypeVar

from edge.config.positions import KeyPath, Positions
from edge.config.problems import Problem, dotted, nearest
from edge.config.values import expand

T = TypeVar("T")

_MAX_GUESSES: Final = 100_000  # names a misspelt one is compared with, some microseconds each: ten thousand pools once


class Reader:
    """What one reading has found: problems, warnings, and the files that were named."""

    def __init__(
        self,
        path: Path,
        env: Mapping[str, str],
        positions: Positions,
        before_file: Callable[[Path], object] = lambda path: None,
    ) -> None:
        self.path = path
        self._before_file = before_file  # is called with a file that is read next
        self.base = path.parent  # where relative paths start
        self.env = env
        self.positions = positions
        self.problems: list[Problem] = []
        self.warnings: list[Problem] = []
        self.watched: list[Path] = []
        self.bad: set[KeyPath] = set()
        self.unexpanded: set[KeyPath] = set()
        self._guesses = _MAX_GUESSES

    def problem(self, at: KeyPath, message: str) -> None:
        """Note what is wrong with the value at `at`, and what to write."""
        self.bad.add(at)
        if at not in self.unexpanded:  # what stands in for a value that could not be expanded is not judged again
            self.problems.append(Problem(self.positions.line(at), dotted(at), message))

    def warn(self, at: KeyPath, message: str) -> None:
        """Note what is allowed and may not be meant."""
        self.warnings.append(Problem(self.positions.line(at), dotted(at), message, "warning"))

    def check(self, at: KeyPath, check: Callable[[str], T], text: str) -> T | None:
        """Return `check(text)`, or note its `ValueError` and return None."""
        try:
            return check(text)
        except ValueError as error:
            self.problem(at, str(error))
            return None

    def nearest(self, name: str, known: Collection[str]) -> str | None:
        """Return the known name that a misspelt one most resembles; None when none does, or many were guessed."""
        if self._guesses <= 0:
            return None
        self._guesses -= len(known)
        return nearest(name, known)

    def expand(self, at: KeyPath, value: object) -> object:
        """Replace the variables in a string or in the strings of a list."""
        if isinstance(value, list):
            return [self.expand((*at, index), element) for index, element in enumerate(value)]
        if not isinstance(value, str) or "$" not in value:
            return value
        expanded = self.check(at, lambda text: expand(text, self.env), value)
        if expanded is None:
            self.unexpanded.add(at)
        return expanded or ""

    def file(self, at: KeyPath, name: str) -> tuple[Path, bytes]:
        """Return the path of a file that must be there, and its content."""
        path = self.base / name
        if at not in self.unexpanded and "\0" not in name:  # no file can have such a name
            self.watched.append(path)
            self._before_file(path)
        try:
            if path.is_file():  # never open what could block: a pipe, a device
                return path, path.read_bytes()
            reason = "no such file"
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "no such file"
        # The name is not repeated: someone may have put the secret itself there.
        self.problem(at, f"cannot be read ({reason}): write the path of a readable file, relative to this one")
        return path, b"?"  # not empty, which would be one more problem


class Table:
    """One table, read key by key: a method notes what is wrong with a value and returns its default instead."""

    def __init__(self, reader: Reader, at: KeyPath, data: Mapping[str, object]) -> None:
        self.reader = reader
        self.at = at
        self.data = data
        self.known: dict[str, None] = {}  # the keys that it may have, in order
        self.known_below: dict[str, str] = {}  # keys of tables in it, and how each is written there
        self.listed: dict[str, list[tuple[KeyPath, str]]] = {}  # the strings of the lists that were read

    def problem(self, key: str, message: str) -> None:
        """Note what is wrong with the value of `key`, and what to write."""
        self.reader.problem((*self.at, key), message)

    def is_sound(self, key: str) -> bool:
        """Return whether no problem was noted with the value of `key`."""
        return (*self.at, key) not in self.reader.bad

    def is_given(self, key: str) -> bool:
        """Return whether `key` has a value with which no problem was noted."""
        return key in self.data and self.is_sound(key)

    def check(self, key: str, check: Callable[[str], T], text: str) -> T | None:
        """Return `check(text)`, or note its `ValueError` and return None."""
        return self.reader.check((*self.at, key), check, text)

    def take(self, key: str) -> object:
        """Return the value of `key`, expanded; None when it is absent (TOML has no null)."""
        self.known[key] = None
        value = self.data.get(key)
        if isinstance(value, str | list):
            return self.reader.expand((*self.at, key), value)
        return value

    def text(self, key: str, unit: str = "") -> str | None:
        """Return a string; `unit` is what a bare number lacks."""
        value = self.take(key)
        if value is None or isinstance(value, str):
            return value
        if unit and type(value) is not bool and isinstance(value, int | float) and 0 < value < 10**12:
            self.problem(key, f'a number without unit: write {key} = "{value}{unit}"')
        else:
            self.problem(key, f'must be text in quotes: write {key} = "..."')
        return None

    def parsed(self, key: str, parse: Callable[[str], T], default: T, unit: str = "") -> T:
        """Return what `parse` makes of a string; `unit` is what a bare number lacks."""
        text = self.text(key, unit)
        found = None if text is None else self.check(key, parse, text)
        return default if found is None else found

    def texts(self, key: str, single: bool = False) -> list[tuple[KeyPath, str]]:
        """Return the strings of a list, each with its place; `single` takes one string as well."""
        value = self.take(key)
        at = (*self.at, key)
        if value is None:
            return []
        if single and isinstance(value, str):
            return [(at, value)]
        if not isinstance(value, list):
            what, sample = ("text in quotes or a list", '"..."') if single else ("a list", '["..."]')
            self.problem(key, f"must be {what} of text: write {key} = {sample}")
            return []
        for index, element in enumerate(value):
            if not isinstance(element, str):
                self.reader.problem((*at, index), f'must be text in quotes: write {key} = ["..."]')
        self.listed[key] = [((*at, index), each) for index, each in enumerate(value) if isinstance(each, str)]
        return self.listed[key]

    def table(self, key: str, example: object = None) -> "Table | None":
        """Return the table at `key`, None when it is absent or no table; `example` is what one may hold."""
        value = self.take(key)
        if isinstance(value, dict):
            return Table(self.reader, (*self.at, key), value)
        if isinstance(value, list) and value and all(isinstance(each, dict) for each in value):
            at = dotted((*self.at, key))
            self.problem(key, f"is in double brackets: write [{at}], or [{at}.NAME] where each has a name")
        elif isinstance(example, dict) and value is not None:
            pairs = ", ".join(f'{name} = "{each}"' for name, each in example.items())
            self.problem(key, f"must be a table: write {key} = {{ {pairs} }}")
        elif value is not None:
            self.problem(key, f"must be a table: write [{dotted((*self.at, key))}] and its keys below")
        return None

    def section(self, key: str) -> "Table":
        """Return the table at `key`, an empty one when there is none."""
        return self.table(key) or Table(self.reader, (*self.at, key), {})

    def tables(self, keys: Collection[str]) -> Iterator[tuple[str, "Table"]]:
        """Yield the tables of a table whose keys are names; `keys` are those that each of them may have."""
        for name, below in self.data.items():
            if name in keys and not isinstance(below, dict):
                self.problem(name, f"stands in no table with a name: write [{dotted((*self.at, 'NAME'))}] above it")
                continue
            if isinstance(below, dict) and below and all(isinstance(value, dict) for value in below.values()):
                # [pools.qwen2.5] without quotes is a table "5" in a table "qwen2".
                whole = dotted((*self.at, f"{name}.{next(iter(below))}"))
                self.problem(name, f"a name with a dot needs quotes: write [{whole}]")
            elif table := self.table(name):
                yield name, table

    def close(self) -> None:
        """Refuse what nobody asked for."""
        for key in (each for each in self.data if each not in self.known):
            near = self.reader.nearest(key, self.known)
            what = "table" if isinstance(self.data[key], dict) else "key"
            hint = f"did you mean {near}?" if near else f"remove it, or write one of {', '.join(sorted(self.known))}"
            if key in self.known_below:
                hint = f"write {self.known_below[key]}"
            self.problem(key, f"unknown {what}: {hint}")
