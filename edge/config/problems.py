"""What is wrong with a routes.toml: one line of the file, one key, one thing to change."""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

import orjson
import tomli

from edge.config.positions import KeyPath

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


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
    return orjson.dumps([{"file": str(path), **asdict(problem)} for problem in problems])


def read_toml(text: str, path: Path) -> dict[str, object]:
    """Return the tables of a TOML text; what is not TOML is the one problem of a `ConfigError`."""
    try:
        return tomli.loads(text)
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
    "Unclosed inline table": "close it with }, and write commas between the pairs",
    "Unescaped '\\'": "write \\\\ for a backslash, or use single quotes",
    "Exceeds the limit": "the number is too long: write a smaller one",
}


def _syntax_problem(text: str, error: str) -> Problem:
    """Translate an error of `tomli`, which has its line only in the message; the line's value is never repeated."""
    match = re.fullmatch(r"(.*) \(at (?:line (\d+), column \d+|end of document)\)", error, re.DOTALL)
    what = match[1] if match else error
    if match and not match[2]:
        line, hint = text.rstrip().count("\n") + 1, "the file ends too early, close the ], } or quotes that are open"
    else:
        line = int(match[2]) if match else 1
        hints = (hint for start, hint in _SYNTAX_HINTS.items() if what.startswith(start))
        hint = next(hints, "write it as toml.io shows")
    pair = re.match(r"""\s*([\w."'-]+)\s*[=:]\s*((?i:true|false)?)""", text.split("\n")[line - 1])
    if pair and pair[2] not in ("", "true", "false"):
        hint = f"write {{key}} = {pair[2].lower()}"
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
    by_lower = {each.lower(): each for each in known}
    return next((by_lower[each] for each in get_close_matches(name.lower(), by_lower, n=1)), None)
