"""The tests that documents name as evidence exist, and no row goes without one or a reason."""

import ast
import re
from functools import cache
from pathlib import Path
from typing import Final

import pytest

from tests.test_documents import rows

ROOT: Final = Path(__file__).parent.parent
THREATS: Final = ROOT / "docs/threats.md"
RELIABILITY: Final = ROOT / "docs/reliability.md"
_NAMED: Final = re.compile(r"`((?:tests|loadtest)/[\w/]+\.py)(?:::(\w+))?`")
_TABLES: Final = (
    "Anonymous peers",
    "Key holders",
    "Instance owners",
    "Operators",
    "Upstream engines",
    "Stores and disks",
)


@cache
def functions(file: Path) -> frozenset[str]:
    """The functions of a module."""
    tree = ast.parse(file.read_text())
    return frozenset(each.name for each in ast.walk(tree) if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef))


@pytest.mark.parametrize("document", [THREATS, RELIABILITY], ids=lambda each: each.name)
def test_every_test_that_is_named_exists(document: Path) -> None:
    named = _NAMED.findall(document.read_text())
    missing = [
        f"{file}::{name}"
        for file, name in named
        if not (ROOT / file).exists() or (name and name not in functions(ROOT / file))
    ]
    assert named
    assert missing == []


def test_every_row_of_the_plan_is_held_or_says_why_not() -> None:
    table = rows(RELIABILITY, "The table")
    assert [row[0] for row in table] == [f"R{number:02}" for number in range(1, 65)]
    reasons = ("not held:", "does not apply:")
    assert [row[0] for row in table if not _NAMED.search(row[2]) and not row[2].startswith(reasons)] == []


@pytest.mark.parametrize("heading", _TABLES)
def test_every_threat_that_is_defended_names_its_test(heading: str) -> None:
    table = rows(THREATS, heading)
    assert table
    assert [row[0] for row in table if not _NAMED.search(row[2]) and "not defended:" not in row[2]] == []
