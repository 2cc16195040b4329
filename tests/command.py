"""An `edge` command in this process: to start an interpreter costs more than all that most commands do."""

import contextlib
import io
from dataclasses import dataclass
from pathlib import Path

from edge.__main__ import main


@dataclass
class Ran:
    """A command that ended."""

    code: int
    out: str
    err: str


def edge(*arguments: str | Path, cwd: Path | None = None) -> Ran:
    """Run a command that needs no event loop; what it raises would have been a traceback."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.chdir(cwd or Path.cwd()), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(each) for each in arguments])
    return Ran(code, out.getvalue(), err.getvalue())
