"""Whatever an operator saves as routes.toml: it is read, or each problem has its line and a message."""

from pathlib import Path

from edge.config import reading
from edge.config.changes import list_changes
from edge.config.problems import ConfigError, Problem
from edge.config.settings import Config

_PATH = Path("/nowhere/routes.toml")


def check(data: bytes) -> None:
    """And what is read is the same when it is read again."""
    text = data.decode("utf-8", "replace")
    config, problems = _read(text)
    assert (config is None) == bool(problems)
    for problem in problems:
        assert 1 <= problem.line <= text.count("\n") + 1
        assert problem.message
    if config is not None:
        again, _ = _read(text)
        assert again is not None
        assert list_changes(config, again) == []


def _read(text: str) -> tuple[Config | None, tuple[Problem, ...]]:
    try:
        return reading.parse(text, _PATH, {}), ()
    except ConfigError as error:
        return None, error.problems
