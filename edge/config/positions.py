"""The line of every key of a TOML text.

`tomli` keeps no positions, so this walks the text a second time, after `tomli` has accepted it: it validates
nothing and decodes only keys. Source: TOML 1.1.0 (toml.io/en/v1.1.0), from Keys to Array of Tables.
"""

import re
from bisect import bisect_left
from functools import cached_property

import tomli

KeyPath = tuple[str | int, ...]
"""The way to a value: the keys from the root, and an int for the index of an array's element."""

_BLANK = re.compile(r"(?:[ \t\n]|#[^\n]*)*")
_SPACE = re.compile(r"[ \t]*")
_KEY_PART = re.compile(r"""[A-Za-z0-9_-]+|"(?:[^"\\]|\\.)*"|'[^']*'""")
_STRING = re.compile(
    r""""{3}(?:[^\\]|\\.)*?"{3}"{0,2}"""  # up to two quotes may stand right before the closing three
    r"""|'{3}.*?'{3}'{0,2}"""
    r'''|"(?:[^"\\]|\\.)*"'''
    r"""|'[^']*'""",
    re.DOTALL,
)
_SCALAR = re.compile(r"[^,\]}\n#]*")


class Positions:
    """An index from key path to line, the first line being 1; made when a line is asked for, as problems do."""

    def __init__(self, text: str) -> None:
        """Take `text`, which `tomli.loads` has accepted."""
        self._text = text

    @cached_property
    def _lines(self) -> dict[KeyPath, int]:
        return _Scanner(self._text.replace("\r\n", "\n")).scan()

    def line(self, path: KeyPath) -> int:
        """Return the line of the deepest prefix of `path` that stands in the text, 1 when none does."""
        while path and path not in self._lines:
            path = path[:-1]
        return self._lines.get(path, 1)


class _Scanner:
    """One walk over a text; `at` is the offset of what is read next."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.newlines = [match.start() for match in re.finditer("\n", text)]
        self.lines: dict[KeyPath, int] = {}
        self.table_counts: dict[KeyPath, int] = {}  # how many [[x]] were seen, by the path of x

    def scan(self) -> dict[KeyPath, int]:
        table: KeyPath = ()
        self.skip(_BLANK)
        while self.at < len(self.text):
            if self.text[self.at] == "[":
                table = self.header()
            else:
                self.pair(table)
            self.skip(_BLANK)
        return self.lines

    def header(self) -> KeyPath:
        """Read `[a.b]` or `[[a.b]]` and return the path of the table it opens."""
        line = self.here()
        brackets = 2 if self.text.startswith("[[", self.at) else 1
        self.at += brackets
        *parents, name = self.key()
        self.at += brackets
        path: KeyPath = ()
        for part in parents:
            path += (part,)
            self.lines.setdefault(path, line)
            if path in self.table_counts:  # [x.y] after [[x]] belongs to the last x
                path += (self.table_counts[path] - 1,)
        path += (name,)
        if brackets == 2:
            self.lines.setdefault(path, line)
            index = self.table_counts.get(path, 0)
            self.table_counts[path] = index + 1
            path += (index,)
        self.lines[path] = line  # its own header outranks an earlier [x.y] that only implied x
        return path

    def pair(self, table: KeyPath) -> None:
        line = self.here()
        path = table
        for part in self.key():
            path += (part,)
            self.lines.setdefault(path, line)
        self.at += 1  # =
        self.skip(_SPACE)
        self.value(path)

    def key(self) -> list[str]:
        """Read a dotted key, with the spaces around its parts."""
        parts = []
        while True:
            self.skip(_SPACE)
            raw = self.skip(_KEY_PART)
            if "\\" in raw and raw[0] == '"':
                parts.append(tomli.loads(f"key = {raw}")["key"])
            else:
                parts.append(raw[1:-1] if raw[0] in "\"'" else raw)
            self.skip(_SPACE)
            if self.text[self.at] != ".":
                return parts
            self.at += 1

    def value(self, path: KeyPath) -> None:
        match self.text[self.at]:
            case "[":
                self.array(path)
            case "{":
                self.inline_table(path)
            case '"' | "'":
                self.skip(_STRING)
            case _:
                self.skip(_SCALAR)

    def array(self, path: KeyPath) -> None:
        index = 0
        self.open_or_comma()
        while self.text[self.at] != "]":
            element = (*path, index)
            self.lines[element] = self.here()
            self.value(element)
            self.close_item()
            index += 1
        self.at += 1

    def inline_table(self, path: KeyPath) -> None:
        self.open_or_comma()
        while self.text[self.at] != "}":
            self.pair(path)
            self.close_item()
        self.at += 1

    def close_item(self) -> None:
        self.skip(_BLANK)
        if self.text[self.at] == ",":
            self.open_or_comma()

    def open_or_comma(self) -> None:
        self.at += 1
        self.skip(_BLANK)

    def skip(self, pattern: re.Pattern[str]) -> str:
        """Move behind what `pattern` matches here, and return it."""
        match = pattern.match(self.text, self.at)
        assert match, f"not TOML at offset {self.at}"
        self.at = match.end()
        return match.group()

    def here(self) -> int:
        return bisect_left(self.newlines, self.at) + 1
