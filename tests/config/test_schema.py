"""The schema for editors: it judges a file as the edge does."""

import json
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from edge.config import schema

ROOT = Path(__file__).parents[2]
SCHEMA: Any = json.loads(schema.render())
VALIDATOR = jsonschema.Draft4Validator(SCHEMA)


def errors_of(text: str) -> list[str]:
    return [error.message for error in VALIDATOR.iter_errors(tomllib.loads(text))]


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
