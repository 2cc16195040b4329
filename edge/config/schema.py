"""The JSON Schema of routes.toml, by which an editor completes and judges the file; made of the declared settings.

It is JSON Schema draft 4, in plain keywords without `$ref`: what Taplo follows (https://taplo.tamasfe.dev).
"""

import json
from typing import Any

from edge.config.kinds import Section, Setting, describe, sections_of, settings_of
from edge.config.settings import Config


def routes_schema() -> dict[str, Any]:
    """Return the JSON Schema of a routes.toml."""
    return {
        "$schema": "http://json-schema.org/draft-04/schema#",
        "title": "routes.toml",
        "description": "The routes of the edge. `edge check` finds what this schema cannot.",
        "type": "object",
        "additionalProperties": False,
        "required": ["routes"],
        "properties": {section.key: _section(section) for section in sections_of(Config)},
    }


def render() -> str:
    """Return the schema as the text of `routes.schema.json`."""
    return json.dumps(routes_schema(), indent=2, ensure_ascii=False) + "\n"


def _section(section: Section) -> dict[str, Any]:
    table = _table(section.holds)
    if not section.is_named:
        return table
    least = {"minProperties": 1} if section.key == "routes" else {}
    return {"type": "object", "description": table["description"], **least, "additionalProperties": table}


def _table(kind: type) -> dict[str, Any]:
    settings = settings_of(kind)
    schema: dict[str, Any] = {"type": "object", "description": describe(kind), "additionalProperties": False}
    if required := [setting.key for setting in settings if setting.is_required]:
        schema["required"] = required
    for keyword, among in (("oneOf", "one"), ("anyOf", "some")):
        if keys := [setting.key for setting in settings if setting.among == among]:
            schema[keyword] = [{"required": [key]} for key in keys]
    properties = {}
    for setting in settings:
        properties[setting.key] = _property(setting)
        if setting.is_secret:
            text = f"A file that holds {setting.key} and nothing else. It is read again when it changes."
            properties[f"{setting.key}_file"] = {"type": "string", "description": text}
    return {**schema, "properties": properties}


def _property(setting: Setting) -> dict[str, Any]:
    default, text = setting.written_default, setting.text
    if default is None and setting.example is not None:
        text = f"{text} For example `{json.dumps(setting.example)}`."
    if setting.holds is not None and setting.is_list:
        one = {**setting.schema, "description": describe(setting.holds)}
        schema: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"anyOf": [one, _table(setting.holds)]}}
    else:
        schema = dict(setting.schema) if setting.holds is None else _table(setting.holds)
    return {**schema, "description": text} if default is None else {**schema, "description": text, "default": default}
