"""The schema for editors: it knows what config.py knows, and says the same of a file."""

import dataclasses
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from edge.config import schema
from edge.config import settings as config

ROOT = Path(__file__).parents[2]
SCHEMA: Any = json.loads(schema.render())
VALIDATOR = jsonschema.Draft4Validator(SCHEMA)
# A file with an unknown key in each kind of table: the answer lists the keys that are known there.
UNKNOWN = """
[server]
zzzzzz = 1
tls = { zzzzzz = 1 }
[keys]
zzzzzz = 1
[jwt]
zzzzzz = 1
[usage]
zzzzzz = 1
[shared]
zzzzzz = 1
[limits.l]
zzzzzz = 1
[pools.p]
endpoints = [{ zzzzzz = 1 }]
health = { zzzzzz = 1 }
zzzzzz = 1
[routes.r]
zzzzzz = 1
"""
SECTIONS = {
    "server": schema.SERVER,
    "server.tls": schema.TLS,
    "keys": schema.KEYS,
    "jwt": schema.JWT,
    "usage": schema.USAGE,
    "shared": schema.SHARED,
    "limits.l": schema.LIMIT,
    "pools.p": schema.POOL,
    "pools.p.endpoints[0]": schema.ENDPOINT,
    "pools.p.health": schema.HEALTH,
    "routes.r": schema.ROUTE,
}


def errors_of(text: str) -> list[str]:
    return [error.message for error in VALIDATOR.iter_errors(tomllib.loads(text))]


def test_every_setting_that_the_file_may_hold_is_described_and_no_other(tmp_path: Path) -> None:
    with pytest.raises(config.ConfigError) as caught:
        config.parse(UNKNOWN, tmp_path / "routes.toml", {})
    known = {}
    for problem in caught.value.problems:
        if problem.key.endswith(".zzzzzz"):
            listed = re.search(r"write one of (.*)$", problem.message)
            assert listed is not None
            known[problem.key.removesuffix(".zzzzzz")] = set(listed[1].split(", "))
    assert known == {name: {setting.name for setting in section.settings} for name, section in SECTIONS.items()}


@pytest.mark.parametrize("kind", schema.SECTIONS, ids=lambda kind: kind.__name__)
def test_every_value_of_a_table_has_its_setting(kind: Any) -> None:
    attributes = {setting.attribute for setting in schema.SECTIONS[kind].settings if setting.attribute}
    assert attributes == {field.name for field in dataclasses.fields(kind)} - {"name"}


@pytest.mark.parametrize(
    ("store", "is_one"),
    [
        ("sqlite:edge.db", True),
        ("https://auth.example/introspect", True),
        ("redis://127.0.0.1:6379/0", True),
        ("rediss://:${SET}@h/0", True),
        ("mysql:x", False),
    ],
)
def test_store_of_each_kind_is_one_for_the_editor_too(store: str, is_one: bool) -> None:
    text = f'[keys]\nstore = "{store}"\n[routes.r]\npool = "p"\n[pools.p]\nendpoints = ["http://p"]'
    assert (errors_of(text) == []) is is_one


def test_default_of_the_store_is_written_as_the_file_writes_it() -> None:
    assert SCHEMA["properties"]["keys"]["properties"]["store"]["default"] == "sqlite:edge.db"


def test_shipped_schema_is_the_one_that_is_made() -> None:
    """When it is not: `edge schema > edge/routes.schema.json`."""
    assert (ROOT / "edge/routes.schema.json").read_text() == schema.render()


def test_schema_is_one_that_editors_follow() -> None:
    jsonschema.Draft4Validator.check_schema(SCHEMA)
    assert "$ref" not in schema.render()


def test_shipped_file_names_the_schema_and_fits_it() -> None:
    text = (ROOT / "routes.toml").read_text()
    first = text.splitlines()[0]
    assert first == "#:schema ./edge/routes.schema.json"
    assert (ROOT / first.partition(" ")[2]).exists()
    assert errors_of(text) == []


@pytest.mark.parametrize("case", ["everything", "secrets", "variables", "warnings", "hosts"])
def test_what_the_edge_accepts_fits_the_schema(case: str) -> None:
    text, _, problems = (ROOT / f"tests/cases/config/{case}.toml").read_text().partition("-" * 10)
    if all("warning:" in line for line in problems.splitlines() if line):
        assert errors_of(text) == []


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[routes]", "{}"),
        ("[routes.a]\npool = 'p'\ninstance = 'http://x'", "is valid under each of"),
        ("[routes.a]\nhosts = ['a']", "is not valid under any of"),
        ("[routes.a]\npool = 'p'\nhost = ['a']", "'host' was unexpected"),
        ("[routes.a]\npool = 'p'\nheartbeat = '15'", "'15'"),
        ("[routes.a]\npool = 'p'\nheartbeat = 15", "15"),
        ("[routes.a]\npool = 'p'\n[pools.p]\nendpoints = []", "[]"),
        ("[routes.a]\npool = 'p'\n[pools.p]\nendpoints = ['http://a']\nbalance = 'random'", "'random'"),
        ("[routes.a]\npool = 'p'\n[pools.p]\nendpoints = ['http://a']\nretry_budget = 2", "2"),
        ("[routes.a]\npool = 'p'\n[server]\nmax_body = '1 MB'", "'1 MB'"),
        ("[routes.a]\npool = 'p'\n[limits.a]\nper = 'user'", "is not valid under any of"),
        ("[server]\nmax_body = '1MB'", "'routes' is a required property"),
    ],
)
def test_what_is_wrong_at_a_glance_does_not_fit(text: str, complaint: str) -> None:
    assert complaint in " ".join(errors_of(text))


@pytest.mark.parametrize(
    ("value_s", "written"),
    [(0.25, "250ms"), (2, "2s"), (75, "75s"), (300, "300s"), (600, "10m"), (3600, "1h"), (86400, "1d"), (0, "0s")],
)
def test_durations_are_written_as_people_write_them(value_s: float, written: str) -> None:
    assert schema.duration(value_s) == written


@pytest.mark.parametrize(
    ("value", "written"), [(64 * 2**20, "64MiB"), (2 * 10**9, "2GB"), (2**30, "1GiB"), (1500, "1500B"), (0, "0B")]
)
def test_sizes_are_written_as_people_write_them(value: int, written: str) -> None:
    assert schema.size(value) == written
