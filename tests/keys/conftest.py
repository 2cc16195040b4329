"""A key store in a file, and who administers it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from edge.keys.stores.registry import KeyRegistry


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.db"


@pytest.fixture
def registry(path: Path) -> Iterator[KeyRegistry]:
    with KeyRegistry(path) as opened:
        yield opened
