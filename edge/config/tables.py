"""Read TOML tables key by key, noting every problem with its line instead of stopping at the first.

What the keys are, and what they mean together, is `settings.py`'s; the notations inside strings are `values.py`'s.
"""

import json
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Literal, TypeVar

import orjson

from edge.config.positions import KeyPath, Positions
from edge.config.values import byte_count, expand, seconds

T = TypeVar("T")
Choice = TypeVar("Choice", bound=str)

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_VISIBLE_ASCII = re.compile(r"[!-~]+")  # what a header's value may hold whatever the server (RFC 9110 section 5.5)


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing to change: its line, its key dotted and quoted as in TOML, what is wrong and what to write."""

    line: int
    key: str
    message: str
    severity: Literal["error", "warning"] = "error"

    def __str__(self) -> str:
        message = self.message if self.severity == "error" else f"warning: {self.message}"
        return f"{self.key}: {message}" if self.key else message


class ConfigError(Exception):
    """The file is not usable; `problems` is everything wrong with it, by line.

    `watched` are the files it names, so that one that appears later is noticed.
    """

    def __init__(self, path: Path, problems: Sequence[Problem], watched: Sequence[Path] = ()) -> None:
        super().__init__(render_problems(path, problems))
        self.path = path
        self.problems = tuple(problems)
        self.watched = tuple(watched)


def render_problems(path: Path, problems: Iterable[Problem]) -> str:
    """Return `file:line: key: message`, one problem per line; a warning's message begins with `warning: `."""
    return "\n".join(f"{path}:{problem.line}: {problem}" for problem in problems)


def problems_json(path: Path, problems: Iterable[Problem]) -> bytes:
    """Return a JSON array of `{"file", "line", "key", "message", "severity"}`."""
    return orjson.dumps(
        [
            {"file": str(path), "line": p.line, "key": p.key, "message": p.message, "severity": p.severity}
            for p in problems
        ]
    )


def read_toml(text: str, path: Path) -> dict[str, object]:
    """Return the tables of a TOML text; what is not TOML is the one problem of a `ConfigError`."""
    try:
        return tomllib.loads(text)
    except ValueError as error:  # a TOMLDecodeError, or the plain one of int() for a number of thousands of digits
        raise ConfigError(path, [_syntax_problem(text, str(error))]) from None


_QUOTED_NAME = "a name with other characters than A-Z a-z 0-9 _ - stands in quotes"
_SYNTAX_HINTS = {
    "Invalid value": 'put text in quotes, {key} = "..."; true and false are lower case',
    "Expected newline or end of document": 'write one pair on a line, and text in quotes, {key} = "..."',
    "Expected ']' at the end of a table": f'{_QUOTED_NAME}, [routes."public/name"]',
    "Expected '=' after a key": f'write {{key}} = "..."; {_QUOTED_NAME}',
    "Invalid initial character": f'{_QUOTED_NAME}, [routes."public/name"]',
    "Invalid statement": 'write key = "..." or [table]',
    "Cannot declare": "the table is there twice: write its keys under one header",
    "Cannot overwrite": "the key is there twice: keep one",
    "Duplicate inline table key": "the key is there twice: keep one",
    "Unterminated string": "close the quotes",
    "Illegal character": "close the quotes on the same line",
    "Unclosed array": "close it with ], and write commas between the values",
    "Unclosed inline table": "close it with } on the same line, and write commas between the pairs",
    "Unescaped '\\'": "write \\\\ for a backslash, or use single quotes",
    "Exceeds the limit": "the number is too long: write a smaller one",
}


def _syntax_problem(text: str, error: str) -> Problem:
    """Translate an error of `tomllib`, which has its line only in the message; the line's value is never repeated."""
    match = re.fullmatch(r"(.*) \(at (?:line (\d+), column \d+|end of document)\)", error, re.DOTALL)
    what = match[1] if match else error
    if match and not match[2]:
        line, hint = text.rstrip().count("\n") + 1, "the file ends too early, close the ], } or quotes that are open"
    else:
        line = int(match[2]) if match else 1
        hint = next(
            (hint for start, hint in _SYNTAX_HINTS.items() if what.startswith(start)), "write it as toml.io shows"
        )
    pair = re.match(r"""\s*([\w."'-]+)\s*[=:]""", text.split("\n")[line - 1])
    return Problem(line, "", f"not TOML, {what}: {hint.replace('{key}', pair[1] if pair else 'key')}")


def dotted(path: KeyPath) -> str:
    """Return a key path as TOML writes it, an index in brackets: `pools."a.b".endpoints[0].url`."""
    out = ""
    for part in path:
        if isinstance(part, int):
            out += f"[{part}]"
        else:
            out += ("." if out else "") + (part if _BARE_KEY.fullmatch(part) else _quoted(part))
    return out


def _quoted(key: str) -> str:
    """Write a key as a basic string: JSON's escapes are TOML's, but TOML escapes DEL too."""
    return json.dumps(key, ensure_ascii=False).replace("\x7f", "\\u007f")


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that a misspelt one most resembles, None when none does."""
    return next(iter(get_close_matches(name, list(known), n=1)), None)


class Reader:
    """What one reading has found: problems, warnings, and the files that were named."""

    def __init__(self, path: Path, env: Mapping[str, str], positions: Positions) -> None:
        self.path = path
        self.base = path.parent  # where relative paths start
        self.env = env
        self.positions = positions
        self.problems: list[Problem] = []
        self.warnings: list[Problem] = []
        self.watched: list[Path] = []
        self.unexpanded: set[KeyPath] = set()

    def problem(self, at: KeyPath, message: str) -> None:
        """Note what is wrong with the value at `at`, and what to write."""
        if at not in self.unexpanded:  # what stands in for a value that could not be expanded is not judged again
            self.problems.append(Problem(self.positions.line(at), dotted(at), message))

    def warn(self, at: KeyPath, message: str) -> None:
        """Note what is allowed and may not be meant."""
        self.warnings.append(Problem(self.positions.line(at), dotted(at), message, "warning"))

    def check(self, at: KeyPath, check: Callable[[str], T], text: str, default: T) -> T:
        """Return `check(text)`, or note its `ValueError` and return `default`."""
        try:
            return check(text)
        except ValueError as error:
            self.problem(at, str(error))
            return default

    def expand(self, at: KeyPath, value: object) -> object:
        """Replace the variables in a string or in the strings of a list."""
        if isinstance(value, list):
            return [self.expand((*at, index), element) for index, element in enumerate(value)]
        if not isinstance(value, str):
            return value
        expanded = self.check(at, lambda text: expand(text, self.env), value, None)
        if expanded is None:
            self.unexpanded.add(at)
        return expanded or ""

    def file(self, at: KeyPath, name: str) -> tuple[Path, bytes]:
        """Return the path of a file that must be there, and its content."""
        path = self.base / name
        if at not in self.unexpanded and "\0" not in name:  # what no file can be called cannot be looked at either
            self.watched.append(path)
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
        self.left = dict(data)
        self.known: list[str] = []

    def problem(self, key: str, message: str) -> None:
        """Note what is wrong with the value of `key`, and what to write."""
        self.reader.problem((*self.at, key), message)

    def take(self, key: str) -> object:
        """Return the value of `key`, expanded; None when it is absent (TOML has no null)."""
        self.known.append(key)
        return self.reader.expand((*self.at, key), self.left.pop(key, None))

    def text(self, key: str) -> str | None:
        """Return a string."""
        value = self.take(key)
        if value is None or isinstance(value, str):
            return value
        self.problem(key, f'must be text in quotes: write {key} = "..."')
        return None

    def parsed(self, key: str, parse: Callable[[str], T], default: T, unit: str = "") -> T:
        """Return what `parse` makes of a string; `unit` is what a bare number lacks."""
        value = self.take(key)
        if isinstance(value, str):
            return self.reader.check((*self.at, key), parse, value, default)
        if value is not None:
            if unit and type(value) is not bool and isinstance(value, int | float) and 0 < value < 10**12:
                self.problem(key, f'a number without unit: write {key} = "{value}{unit}"')
            else:
                self.problem(key, f'must be text in quotes: write {key} = "..."')
        return default

    def duration_s(self, key: str, default: float, zero: bool = False) -> float:
        """Return a duration in seconds, which may be 0 only with `zero`."""
        value_s = self.parsed(key, seconds, default, unit="s")
        if value_s == 0 and not zero:
            self.problem(key, f'must be more than zero: write {key} = "{default:g}s" or another time')
        return value_s

    def size_bytes(self, key: str, default: int, zero: bool = False) -> int:
        """Return a size in bytes, which may be 0 only with `zero`."""
        value = self.parsed(key, byte_count, default, unit="B")
        if value == 0 and not zero:
            self.problem(key, f'must be more than zero: write a size such as {key} = "64MiB"')
        return value

    def integer(self, key: str, default: T, highest: int) -> int | T:
        """Return a whole number of 1 to `highest`."""
        value = self.take(key)
        if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= highest:
            return value
        if value is not None:
            self.problem(key, f"must be a whole number of 1 to {highest}, without quotes: write {key} = 1")
        return default

    def share(self, key: str, default: float) -> float:
        """Return a share of 0 to 1."""
        value = self.take(key)
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1:
            return float(value)
        if value is not None:
            self.problem(key, f"must be a number of 0 to 1, without quotes: write {key} = {default}")
        return default

    def choice(self, key: str, options: Sequence[Choice], default: Choice) -> Choice:
        """Return one of `options`."""
        value = self.text(key)
        if value is not None and value not in options:
            self.problem(key, f"{value!r} is not known: write one of {', '.join(options)}")
        return next((option for option in options if option == value), default)

    def texts(self, key: str, single: bool = False) -> list[tuple[KeyPath, str]]:
        """Return the strings of a list, each with its place; `single` takes one string as well."""
        value = self.take(key)
        at = (*self.at, key)
        if single and isinstance(value, str):
            return [(at, value)]
        if value is None:
            return []
        if not isinstance(value, list):
            sample = '"..."' if single else '["..."]'
            self.problem(key, f"must be {'text in quotes or ' if single else ''}a list of text: write {key} = {sample}")
            return []
        for index, element in enumerate(value):
            if not isinstance(element, str):
                self.reader.problem((*at, index), f'must be text in quotes: write {key} = ["..."]')
        return [((*at, index), element) for index, element in enumerate(value) if isinstance(element, str)]

    def file(self, key: str) -> Path | None:
        """Return the path of a readable file."""
        name = self.text(key)
        return None if name is None else self.reader.file((*self.at, key), name)[0]

    def secret(self, key: str) -> str | None:
        """Return a secret that is given as `key`, or as `key_file`, a file that holds nothing else."""
        value, name = self.text(key), self.text(f"{key}_file")
        if value is not None and name is not None:
            self.problem(f"{key}_file", f"{key} is given too: remove one of the two")
        elif name is not None:
            key = f"{key}_file"
            value = self.reader.file((*self.at, key), name)[1].strip().decode("ascii", "replace")
        if value is not None and not _VISIBLE_ASCII.fullmatch(value):
            what = "has a character that no header can carry" if value else "is empty"
            self.problem(key, f"the key {what}: write its visible ASCII characters only, or remove {key}")
        return value

    def table(self, key: str) -> "Table | None":
        """Return the table at `key`, None when it is absent or no table."""
        value = self.take(key)
        if isinstance(value, dict):
            return Table(self.reader, (*self.at, key), value)
        if value is not None:
            self.problem(key, f"must be a table: write [{dotted((*self.at, key))}] and its keys below")
        return None

    def section(self, key: str) -> "Table":
        """Return the table at `key`, an empty one when there is none."""
        return self.table(key) or Table(self.reader, (*self.at, key), {})

    def tables(self) -> Iterator[tuple[str, "Table"]]:
        """Yield the tables of a table whose keys are names."""
        for name in list(self.left):
            below = self.left[name]
            if isinstance(below, dict) and below and all(isinstance(value, dict) for value in below.values()):
                # [pools.qwen2.5] without quotes is a table "5" in a table "qwen2".
                self.left.pop(name)
                whole = dotted((*self.at, f"{name}.{next(iter(below))}"))
                self.problem(name, f"a name with a dot needs quotes: write [{whole}]")
            elif table := self.table(name):
                yield name, table

    def flag(self, key: str) -> bool | None:
        """Return true or false."""
        value = self.take(key)
        if value is None or isinstance(value, bool):
            return value
        self.problem(key, f"must be true or false, without quotes: write {key} = false")
        return None

    def close(self) -> None:
        """Refuse what nobody asked for."""
        for key in self.left:
            near = nearest(key, self.known)
            what = "table" if isinstance(self.left[key], dict) else "key"
            known = ", ".join(sorted(self.known))
            self.problem(
                key, f"unknown {what}: " + (f"did you mean {near}?" if near else f"remove it, or write one of {known}")
            )
