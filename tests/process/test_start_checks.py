"""What the edge does not start on, as a person starts it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROUTES


@pytest.mark.parametrize(
    ("options", "environment", "told"),
    [
        (["-O"], {}, "edge: Python leaves checks out with -O or PYTHONOPTIMIZE: start the edge without them"),
        ([], {"PYTHONOPTIMIZE": "2"}, "edge: Python leaves checks out with -O or PYTHONOPTIMIZE"),
        ([], {"AIOHTTP_NO_EXTENSIONS": "1"}, "edge: aiohttp runs without its C parser"),
    ],
)
def test_interpreter_that_leaves_checks_out_is_refused(
    tmp_path: Path, options: list[str], environment: dict[str, str], told: str
) -> None:
    (tmp_path / "routes.toml").write_text(
        '[server]\nlisten = "127.0.0.1:0"\nadmin = "127.0.0.1:0"\n' + ROUTES.replace("{upstream}", "http://127.0.0.1:1")
    )
    done = subprocess.run(
        [sys.executable, *options, "-m", "edge", "serve", "--config", str(tmp_path / "routes.toml")],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )
    assert done.returncode == 1
    assert told in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["routes.toml"]
