"""The manual of routes.toml, `docs/settings.md`, made of the declared settings."""

import json
from collections.abc import Iterator

from edge.config.kinds import Section, Setting, describe, sections_of, settings_of
from edge.config.settings import Config

_HEAD = """# The settings of routes.toml

Printed by `edge schema --manual`; the texts are in `edge/config/settings.py`.

`edge check FILE` lists every problem of a file, and `edge diff OLD NEW` what a reload would change. A running edge
reads the file again when it, or a file that it names, has changed. A file with a problem changes nothing. A file with a
change that needs a restart is refused as a whole, and the log names the settings.

- A duration is a number and `ms`, `s`, `m`, `h`, `d` or `w`: `"250ms"`, `"1.5h"`. The longest is `"365d"`.
- A size is a number and `B`, `KB`, `MB`, `GB` (thousands) or `KiB`, `MiB`, `GiB` (1024): `"64MiB"`.
- `"${NAME}"` in text is an environment variable, `"${NAME:-default}"` one that may be unset or empty, `"$$"` a dollar.
- A path is relative to the directory of the file.
- `NAME_file` in place of a secret `NAME` is a file that holds the secret and nothing else. It is read again when it
  changes.
"""


def render() -> str:
    """Return the manual as the text of `docs/settings.md`."""
    return "\n".join([_HEAD, *(line for section in sections_of(Config) for line in _section(section))])


def _section(section: Section) -> Iterator[str]:
    header = f"{section.key}.NAME" if section.is_named else section.key
    yield from _table(section.holds, f"`[{header}]`", header, section.restart == "value")
    if section.restart == "presence":
        yield "To add or remove the whole table needs a restart.\n"


def _table(kind: type, title: str, path: str, needs_restart: bool = False) -> Iterator[str]:
    yield f"## {title}\n\n{describe(kind)}\n"
    settings = settings_of(kind)
    for among, what in (("one", "exactly"), ("some", "at least")):
        if keys := [f"`{setting.key}`" for setting in settings if setting.among == among]:
            yield f"The table has {what} one of {', '.join(keys)}.\n"
    yield from (_setting(setting, needs_restart) for setting in settings)
    yield ""
    for setting in settings:
        if setting.holds is not None:
            below = f"{path}.{setting.key}"
            yield from _table(setting.holds, f"A table in `{below}`" if setting.is_list else f"`{below}`", below)


def _setting(setting: Setting, needs_restart: bool) -> str:
    default, example = setting.written_default, setting.example
    facts = [setting.kind]
    if setting.is_required:
        facts.append("required")
    elif default is not None:
        facts.append(f"default `{json.dumps(default)}`")
    if example is not None and default is None:
        facts.append(f"such as `{_toml(example)}`")
    notes = {"value": " **A change needs a restart.**", "presence": " **To add or remove it needs a restart.**"}
    restart = setting.restart or ("value" if needs_restart else "never")
    return f"- `{setting.key}` ({', '.join(facts)}): {setting.text}{notes.get(restart, '')}"


def _toml(value: object) -> str:
    """Write a value as TOML does; only a table differs from JSON."""
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{key} = {json.dumps(each)}' for key, each in value.items())} }}"
    return json.dumps(value)
