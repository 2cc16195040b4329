"""What a reload changes: by name, for the log; value by value, for an operator who checks before; what needs a restart.

Pure: two configurations in, text out, values written as in the file. A secret's value is never written.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Final

from edge.config.kinds import Restart, Section, Setting, sections_of, settings_of
from edge.config.settings import Config, EndpointConfig

_MAX_NAMED: Final = 100  # on one line of the log


def describe_change(old: Config, new: Config) -> str:
    """Return what a reload adds, removes and changes, by name, on one line; of thousands, the first hundred."""
    changed = [f"{sign}{what}" for sign, what, _, _ in _changed(old, new)]
    more = [f"{len(changed) - _MAX_NAMED} more"] if len(changed) > _MAX_NAMED else []
    return ", ".join([*changed[:_MAX_NAMED], *more]) or "nothing changed"


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


def list_restarts(old: Config, new: Config) -> list[str]:
    """Return what differs and needs a restart: `server.listen`, or the name of a table whose every change does."""
    found = []
    for section in sections_of(Config):
        before, after = getattr(old, section.key), getattr(new, section.key)
        settings = settings_of(section.holds)
        if section.restart == "value":
            if any(_value(before, each) != _value(after, each) for each in settings if each.restart != "never"):
                found.append(section.key)
            continue
        if _needs_restart(section.restart, before, after):
            found.append(section.key)
        changed = (s for s in settings if _needs_restart(s.restart, _value(before, s), _value(after, s)))
        found += [f"{section.key}.{setting.key}" for setting in changed]
    return found


def _needs_restart(restart: Restart | None, was: object, is_now: object) -> bool:
    if restart == "presence":
        return (was is None) != (is_now is None)
    return restart == "value" and was != is_now


def _value(table: Any, setting: Setting) -> Any:
    return getattr(table, setting.field, None)


def _changed(old: Config, new: Config) -> Iterator[tuple[str, str, Any, Any]]:
    """Yield `+`, `-` or `~`, the table's kind and name, and the table before and after."""
    sections = sections_of(Config)
    named = reversed([each for each in sections if each.is_named])  # a change of a route is of most interest
    for section in (*named, *(each for each in sections if not each.is_named)):
        before, after = _by_name(old, section), _by_name(new, section)
        yield from (("+", name, None, after[name]) for name in after if name not in before)
        yield from (("-", name, before[name], None) for name in before if name not in after)
        for name in after:
            if name in before and before[name] != after[name]:
                yield "~", name, before[name], after[name]


def _by_name(config: Config, section: Section) -> Mapping[str, Any]:
    tables = getattr(config, section.key)
    if not section.is_named:
        return {} if tables is None else {section.key: tables}
    listed = tables.values() if isinstance(tables, Mapping) else tables
    return {f"{section.key.removesuffix('s')} {each.name}": each for each in listed}


def _stated(table: Any) -> Iterator[str]:
    """Yield the values of a table that are not what their absence means."""
    for setting in settings_of(table.__class__):
        value = _value(table, setting)
        if value != setting.default or setting.is_required:
            yield f"{setting.key} {_written(setting, value)}"


def _differences(before: Any, after: Any, path: str = "") -> Iterator[str]:
    """Yield the differences of two tables of one kind; `path` leads to them."""
    for setting in settings_of(before.__class__):
        old, new, name = _value(before, setting), _value(after, setting), path + setting.key
        if old == new:
            continue
        if setting.is_list:
            yield from _endpoint_differences(old, new)
        elif setting.holds and old is not None and new is not None:
            yield from _differences(old, new, f"{name}.")
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
        return "none"
    if setting.holds and not setting.is_list:
        return f"({', '.join(_stated(value))})" if any(_stated(value)) else "(defaults)"
    written = setting.write(value)
    if isinstance(written, bool):
        return "true" if written else "false"
    return ", ".join(written) if isinstance(written, list) else str(written)
