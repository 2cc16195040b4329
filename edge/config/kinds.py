"""The kinds of settings: how each is read from the file, judged by an editor, described and written.

A setting is declared once, as metadata of its field, beside type and default:

    connect_timeout_s: Annotated[float, kinds.duration("For a connection, TLS included.")] = 2

Its text states its purpose and its hazard. The reader, the schema for editors, the manual and `edge diff` are made of
the declarations of a class, `settings_of` it.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, fields, replace
from functools import cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal, TypedDict, TypeVar, Unpack, get_args, get_type_hints

from edge.config import values
from edge.config.positions import KeyPath
from edge.config.problems import nearest
from edge.config.slips import meant_count, meant_flag
from edge.config.tables import Table

T = TypeVar("T")
Read = Callable[[Table, "Setting"], Any]
Restart = Literal["never", "presence", "value"]

_VISIBLE_ASCII: Final = re.compile(r"[!-~]+")  # what any server accepts in a header (RFC 9110 section 5.5)


class About(TypedDict, total=False):
    """What any setting may state besides its text.

    `key` is the name in the file, where it is not that of the field without its unit; `example` a value for a setting
    without default. `restart`: a running process takes over no change of it, or only none that adds or removes it.
    `among`: a table has exactly "one" of these settings, or at least "some" of them.
    """

    key: str
    example: object
    restart: Restart
    among: Literal["one", "some"]


@dataclass(frozen=True, slots=True)
class Setting:
    """One key of a table. `field`, `default` and `is_required` are those of the field it is declared at.

    `unit` ends the field's name. `holds` is the class of the table that the value is, or with `is_list` may be a list
    of. A secret may be in a file of its own, which another key names. With `reads_absent` it is read also where its key
    is absent; of all others that means the default, so that a table costs what stands in it.
    """

    kind: str
    text: str
    read: Read
    schema: Mapping[str, object]
    write: Callable[[Any], object] = lambda value: value
    unit: str = ""
    holds: type | None = None
    is_list: bool = False
    is_secret: bool = False
    reads_absent: bool = False
    key: str = ""
    example: object = None
    restart: Restart | None = None
    among: Literal["one", "some"] | None = None
    field: str = ""
    default: Any = None
    is_required: bool = False

    @property
    def written_default(self) -> object:
        """The value, as the file writes it, that is the same as none; None when there is no such value."""
        return None if self.default in (None, (), "") else self.write(self.default)


@dataclass(frozen=True, slots=True)
class Section:
    """A table at the root of the file, of tables with names when it `is_named`; `key` is the name of its field."""

    holds: type
    is_named: bool = False
    restart: Restart = "never"
    key: str = ""


@cache
def sections_of(file: type) -> tuple[Section, ...]:
    """Return the sections that the class of a whole file declares."""
    return tuple(replace(section, key=field.name) for field, section in _declared(file))


@cache
def settings_of(table: type) -> tuple[Setting, ...]:
    """Return the settings that a class declares."""
    found = []
    for field, setting in _declared(table):
        is_required = field.default is MISSING
        default = None if is_required else field.default
        key = setting.key or field.name.removesuffix(setting.unit)
        found.append(replace(setting, key=key, field=field.name, default=default, is_required=is_required))
    return tuple(found)


def _declared(table: Any) -> Iterator[tuple[Field[Any], Any]]:
    hints = get_type_hints(table, include_extras=True)
    for field in fields(table):
        for declaration in getattr(hints[field.name], "__metadata__", ()):
            yield field, declaration


def read_table(kind: Callable[..., T], table: Table, **given: object) -> T:
    """Return the values of a table; one that is missing, or wrong and noted, is its default or None."""
    data = table.data
    table.known.update(_keys_of(kind))
    table.known_below.update(_keys_below(kind))
    read = (each for each in settings_of(kind) if each.key in data or each.reads_absent or each.is_required)
    return kind(**given, **{each.field: each.read(table, each) for each in read})


@cache
def _keys_of(table: type) -> dict[str, None]:
    return {setting.key: None for setting in settings_of(table)}


@cache
def _keys_below(table: type) -> dict[str, str]:
    """Return the keys that a table within this one has, and how each is written there."""
    found = {}
    for setting in settings_of(table):
        for key in _keys_of(setting.holds) if setting.holds is not None else ():
            pairs = f"url = ..., {key} = ..." if setting.is_list and key != "url" else f"{key} = ..."
            found[key] = f"{setting.key} = [{{ {pairs} }}]" if setting.is_list else f"{setting.key} = {{ {pairs} }}"
    return found


def describe(table: type) -> str:
    """Return what a class states of its table."""
    return " ".join((table.__doc__ or "").split())


# --- numbers


def duration(text: str, *, zero: bool = False, **about: Unpack[About]) -> Setting:
    """Declare a time, in seconds, which may be 0 only with `zero`."""
    read = _measured(values.seconds, "s", '{0.key} = "{0.default:g}s" or another time', zero)
    return Setting("duration", text, read, _like(f"^{values.DURATION_PATTERN}$"), values.write_duration, "_s", **about)


def size(text: str, *, zero: bool = False, most_bytes: int | None = None, **about: Unpack[About]) -> Setting:
    """Declare a size, in bytes, which may be 0 only with `zero`."""
    read = _measured(partial(values.byte_count, most_bytes=most_bytes), "B", 'a size such as {0.key} = "64MiB"', zero)
    kind = "size" if most_bytes is None else f"size up to {values.write_size(most_bytes)}"
    return Setting(kind, text, read, _like(f"^{values.SIZE_PATTERN}$"), values.write_size, "_bytes", **about)


def count(text: str, highest: int, **about: Unpack[About]) -> Setting:
    """Declare a whole number of 1 to `highest`."""

    def is_one(value: Any) -> bool:
        return type(value) is int and 1 <= value <= highest

    what = f"a whole number of 1 to {highest}"
    read = _bare(is_one, what, lambda value: str(meant) if is_one(meant := meant_count(value)) else "1")
    schema = {"type": "integer", "minimum": 1, "maximum": highest}
    return Setting(f"number of 1 to {highest}", text, read, schema, **about)


def share(text: str, **about: Unpack[About]) -> Setting:
    """Declare a share of 0 to 1."""

    def is_one(value: Any) -> bool:
        return type(value) in (int, float) and 0 <= value <= 1

    read = _bare(is_one, "a number of 0 to 1", lambda value: None)
    return Setting("number of 0 to 1", text, read, {"type": "number", "minimum": 0, "maximum": 1}, **about)


def flag(text: str, **about: Unpack[About]) -> Setting:
    """Declare a choice of true and false."""
    read = _bare(lambda value: type(value) is bool, "true or false", lambda value: meant_flag(value) or "false")
    return Setting("true or false", text, read, {"type": "boolean"}, **about)


def _measured(parse: Callable[[str], float], unit: str, sample: str, zero: bool) -> Read:
    """Return the reader of a number with a unit, in quotes."""

    def read(table: Table, it: Setting) -> object:
        value = table.parsed(it.key, parse, it.default, unit)
        if value == 0 and not zero:
            written = f'{it.key} = "{it.example}"' if it.default is None else sample.format(it)
            table.problem(it.key, f"must be more than zero: write {written}")
        return value

    return read


def _bare(is_one: Callable[[Any], bool], what: str, sample: Callable[[object], str | None]) -> Read:
    """Return the reader of a value without quotes; `sample` is what a wrong one meant, or else the default is."""

    def read(table: Table, it: Setting) -> object:
        value = table.take(it.key)
        if value is not None and is_one(value):
            return value
        if value is not None:
            table.problem(it.key, f"must be {what}, without quotes: write {it.key} = {sample(value) or it.default}")
        return it.default

    return read


# --- text


def text(text: str, check: Callable[[str], object] = str, *, like: str = "", **about: Unpack[About]) -> Setting:
    """Declare text that `check` raises no `ValueError` for. `like` is a regular expression for editors."""
    return Setting("text", text, partial(_checked, check), _like(like), **about)


def name(text: str, check: Callable[[str], object], **about: Unpack[About]) -> Setting:
    """Declare text that is, when it is absent, the name of its table."""

    def read(table: Table, it: Setting) -> object:
        return _checked(check, table, it) if it.key in table.data else table.at[-1]

    return Setting("text", text, read, _like(""), reads_absent=True, **about)


def _checked(check: Callable[[str], object], table: Table, it: Setting) -> object:
    value = table.text(it.key)
    if value is not None:
        table.check(it.key, check, value)
    return it.default if value is None else value


def parsed(
    text: str,
    parse: Callable[[str], T],
    kind: str,
    like: str,
    write: Callable[[T], object] = str,
    **about: Unpack[About],
) -> Setting:
    """Declare text with a notation of its own, which `parse` reads and `write` writes."""
    return Setting(kind, text, lambda table, it: table.parsed(it.key, parse, it.default), _like(like), write, **about)


def placed(
    text: str, parse: Callable[[str, Path], object], kind: str, like: str = "", **about: Unpack[About]
) -> Setting:
    """Declare text in which a path may stand, relative to the directory of routes.toml."""

    def read(table: Table, it: Setting) -> object:
        base = table.reader.base
        return table.parsed(it.key, lambda text: parse(text, base), parse(str(it.default), base))

    return Setting(kind, text, read, _like(like), str, reads_absent=True, **about)


def choice(
    text: str, options: object, *, renamed: Mapping[str, str] = MappingProxyType({}), **about: Unpack[About]
) -> Setting:
    """Declare one of the `options`, a Literal; `renamed` are former names of some, by which files go on."""
    names: tuple[str, ...] = get_args(options)

    def one(value: str) -> str:
        value = renamed.get(value, value)
        if value not in names:
            near = nearest(value, names)
            hint = f"did you mean {near}?" if near else f"write one of {', '.join(names)}"
            raise ValueError(f"{value!r} is not known: {hint}")
        return value

    schema = {"type": "string", "anyOf": [{"enum": [*names, *renamed]}, {"pattern": r"\$"}]}
    kind = f"one of {', '.join(map(json.dumps, names))}"
    return replace(parsed(text, one, kind, "", **about), schema=schema)


def texts(
    text: str,
    parse: Callable[[str], object] = str,
    *,
    kind: str = "list of text",
    empty: str = "",
    options: tuple[str, ...] = (),
    **about: Unpack[About],
) -> Setting:
    """Declare a list of what `parse` makes of text; `empty` is wrong with one of none, editors offer the `options`."""

    def read(table: Table, it: Setting) -> object:
        if empty and table.data.get(it.key) == []:
            table.problem(it.key, empty)
        found = tuple(table.reader.check(at, parse, each) or each for at, each in table.texts(it.key))
        return found or it.default

    items = {"type": "string", "enum": list(options)} if options else _like("")
    schema = {"type": "array", "items": items, **({"minItems": 1} if empty else {})}
    return Setting(kind, text, read, schema, _texts, **about)


def addresses(text: str, **about: Unpack[About]) -> Setting:
    """Declare one address to listen on, or a list of such that do not collide."""

    def read(table: Table, it: Setting) -> object:
        found: list[Any] = []
        if table.data.get(it.key) == []:
            table.problem(it.key, f'an empty list: write "{it.default[0]}"')
        for at, each in table.texts(it.key, single=True):
            new = table.reader.check(at, partial(values.parse_address, base=table.reader.base), each)
            if new and any(new.collides(other) for other in found):
                table.reader.problem(at, "is listened on already: remove it, or write another port")
            elif new:
                found.append(new)
        return tuple(found) or it.default

    schema = {"anyOf": [_like(":"), {"type": "array", "items": _like(":"), "minItems": 1}]}
    return Setting("address, or list of addresses", text, read, schema, _one_or_all, **about)


# --- files and secrets


def file(text: str, **about: Unpack[About]) -> Setting:
    """Declare a file that must be there; its path is relative to routes.toml."""

    def read(table: Table, it: Setting) -> Path | None:
        name = table.text(it.key)
        return None if name is None else table.reader.file((*table.at, it.key), name)[0]

    return Setting("file", text, read, _like(""), str, **about)


def key_set(text: str, **about: Unpack[About]) -> Setting:
    """Declare the keys of an issuer: a URL, or a file that must be there."""

    def read(table: Table, it: Setting) -> object:
        value = table.text(it.key)
        if value is None or value.startswith(("http://", "https://")):
            return value and table.check(it.key, values.check_server, value)
        return table.reader.file((*table.at, it.key), value)[0]

    return Setting("URL or file", text, read, _like(""), str, **about)


def secret(text: str, **about: Unpack[About]) -> Setting:
    """Declare a secret, given as its key, or as `KEY_file`, a file that holds nothing else."""

    def read(table: Table, it: Setting) -> str | None:
        key, beside = it.key, f"{it.key}_file"
        value, name = table.text(key), table.text(beside)
        if value is not None and name is not None:
            table.problem(beside, f"{key} is given too: remove one of the two")
        elif name is not None:
            key = beside
            value = table.reader.file((*table.at, key), name)[1].strip().decode("ascii", "replace")
        if value is not None and not _VISIBLE_ASCII.fullmatch(value):
            table.problem(key, _wrong_secret(key, value))
        return value

    about.setdefault("example", "${SET}")
    return Setting(
        "secret", text, read, _like(""), lambda value: "(secret)", is_secret=True, reads_absent=True, **about
    )


def _wrong_secret(key: str, value: str) -> str:
    if value.lower().startswith("bearer "):
        return "begins with Bearer, which the edge writes before it: write the key alone"
    what = "has a character that no header can carry" if value else "is empty"
    return f"the key {what}: write its visible ASCII characters only, or remove {key}"


# --- tables


def table(kind: type, incomplete: str = "", **about: Unpack[About]) -> Setting:
    """Declare a table; `incomplete` is what is wrong with one that lacks a required setting."""

    def read(table: Table, it: Setting) -> object:
        below = table.table(it.key, it.example)
        if below is None:
            return None
        found = read_table(kind, below)
        below.close()
        if all(getattr(found, each.field) for each in settings_of(kind) if each.is_required):
            return found
        table.problem(it.key, incomplete)
        return None

    return Setting("table", describe(kind), read, {}, holds=kind, **about)


def servers(text: str, kind: type, **about: Unpack[About]) -> Setting:
    """Declare a list of servers, none twice; each is a URL, or a table with a `url` among its settings."""

    def read(table: Table, it: Setting) -> tuple[Any, ...]:
        value = table.take(it.key)
        if "dns" in table.data:  # which stands in their place: `rules.py` refuses both
            return ()
        if not isinstance(value, list) or not value:
            what = "a pool needs its servers" if not value else "must be a list, in brackets"
            table.problem(it.key, f'{what}: write endpoints = ["http://host:port"]')
            return ()
        found: dict[tuple[str, int], Any] = {}
        for index, element in enumerate(value):
            at = (*table.at, it.key, index)
            server = one(table, at, element)
            if server and (server.url.host, server.url.port) in found:
                hint = "remove one, or write its weight"
                table.reader.problem(at, f"{server.url.authority} is in this pool already: {hint}")
            elif server:
                found[server.url.host, server.url.port] = server
        return tuple(found.values())

    def one(table: Table, at: KeyPath, element: object) -> Any:
        if isinstance(element, str):
            url = table.reader.check(at, values.parse_base, element)
            return kind(url=url) if url else None
        if not isinstance(element, dict):
            hint = 'write "http://host:port" or { url = "http://host:port" }'
            table.reader.problem(at, f"must be a URL or a table: {hint}")
            return None
        below = Table(table.reader, at, element)
        if "url" not in element:
            below.problem("url", 'is missing: write url = "http://host:port"')
        server: Any = read_table(kind, below)
        below.close()
        return server if server.url else None

    return Setting(
        "list of URLs or tables", text, read, _like("://"), lambda servers: [str(each.url) for each in servers],
        holds=kind, is_list=True, reads_absent=True, **about,
    )  # fmt: skip


def _like(pattern: str) -> dict[str, object]:
    """Return the schema of text; as a string may hold `${NAME}` in place of anything, a `$` makes any text valid."""
    return {"type": "string", "pattern": rf"{pattern}|\$"} if pattern else {"type": "string"}


def _one_or_all(elements: tuple[object, ...]) -> object:
    return str(elements[0]) if len(elements) == 1 else _texts(elements)


def _texts(elements: tuple[object, ...]) -> list[str]:
    return [str(element) for element in elements]
