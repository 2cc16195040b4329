"""What a reload changes: by name, for the log, and value by value, for who looks before.

Pure: two configurations in, text out, values written as in the file. A secret's value is never told.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Final

from edge.config.schema import SECTIONS, Section, Setting
from edge.config.settings import Config, EndpointConfig

_NONE: Final = "none"


def describe_change(old: Config, new: Config) -> str:
    """Return what a reload adds, removes and changes, by name, on one line."""
    return ", ".join(f"{sign}{what}" for sign, what, _, _ in _changed(old, new)) or "nothing changed"


def list_changes(old: Config, new: Config) -> list[str]:
    """Return what a reload adds, removes and changes, a line for each value: `~pool r1: connect_timeout 2s -> 5s`."""
    lines = []
    for sign, what, before, after in _changed(old, new):
        match sign:
            case "+":
                lines.append(f"+{what}: {', '.join(_stated(after))}")
            case "-":
                lines.append(f"-{what}")
            case _:
                lines += [f"~{what}: {difference}" for difference in _differences(before, after)]
    return lines


def _changed(old: Config, new: Config) -> Iterator[tuple[str, str, Any, Any]]:
    """Yield `+`, `-` or `~`, the table's kind and name, and the table before and after."""
    kinds: tuple[tuple[str, Mapping[str, object], Mapping[str, object]], ...] = (
        ("route", {each.name: each for each in old.routes}, {each.name: each for each in new.routes}),
        ("pool", old.pools, new.pools),
        ("limit", old.limits, new.limits),
    )
    for kind, before, after in kinds:
        yield from (("+", f"{kind} {name}", None, after[name]) for name in after if name not in before)
        yield from (("-", f"{kind} {name}", before[name], None) for name in before if name not in after)
        for name in after:
            if name in before and before[name] != after[name]:
                yield "~", f"{kind} {name}", before[name], after[name]
    for name in ("server", "keys", "jwt", "usage", "shared"):
        was, is_now = getattr(old, name), getattr(new, name)
        if was != is_now:
            yield "+" if was is None else "-" if is_now is None else "~", name, was, is_now


def _values(section: Section, table: object) -> Iterator[tuple[Setting, Any]]:
    for setting in section.settings:
        if setting.attribute:
            yield setting, getattr(table, setting.attribute)


def _stated(table: object) -> Iterator[str]:
    """Yield the values of a table that are not what their absence means."""
    section = SECTIONS[type(table)]
    for (setting, value), (_, absent) in zip(_values(section, table), _values(section, section.absent), strict=True):
        if value != absent or setting.name in section.required:
            yield f"{setting.name} {_written(setting, value)}"


def _differences(before: object, after: object, path: str = "") -> Iterator[str]:
    """Yield the differences of two tables of one kind; `path` leads to them."""
    section = SECTIONS[type(before)]
    for (setting, old), (_, new) in zip(_values(section, before), _values(section, after), strict=True):
        name = path + setting.name
        if old == new:
            continue
        if type(old) in SECTIONS and type(old) is type(new):
            yield from _differences(old, new, f"{name}.")
        elif setting.name == "endpoints":
            yield from _endpoint_differences(old, new)
        elif isinstance(old, tuple) and old and new:
            yield f"{name} {_list_difference(list(map(str, old)), list(map(str, new)))}"
        else:
            was, is_now = _written(setting, old), _written(setting, new)
            yield f"{name} {was} -> {is_now}" if was != is_now else f"{name} changed"


def _endpoint_differences(old: tuple[EndpointConfig, ...], new: tuple[EndpointConfig, ...]) -> Iterator[str]:
    before, after = ({str(endpoint.url): endpoint for endpoint in endpoints} for endpoints in (old, new))
    if list(before) != list(after):
        yield f"endpoints {_list_difference(list(before), list(after))}"
    for url, endpoint in after.items():
        if url in before:
            yield from _differences(before[url], endpoint, f"endpoint {url} ")


def _list_difference(old: list[str], new: list[str]) -> str:
    parts = [f"+{each}" for each in new if each not in old] + [f"-{each}" for each in old if each not in new]
    return " ".join(parts) or "in another order"


def _written(setting: Setting, value: object) -> str:
    if value is None or value == ():
        return _NONE
    if type(value) in SECTIONS:
        return f"({', '.join(_stated(value))})" if any(_stated(value)) else "(defaults)"
    written = setting.kind.write(value)
    if isinstance(written, bool):
        return "true" if written else "false"
    return ", ".join(written) if isinstance(written, list) else str(written)
