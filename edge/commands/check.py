"""`edge check`: list every problem of a routes.toml."""

import argparse
import os
from pathlib import Path

from edge.commands.arguments import add_config, add_json
from edge.config.problems import ConfigError, problems_json, render_problems
from edge.config.reading import load


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `edge check`."""
    parser.add_argument("file", nargs="?", type=Path, default=None, metavar="FILE", help="default: that of --config")
    add_config(parser)
    add_json(parser)


def run(parsed: argparse.Namespace) -> int:
    """Print the problems or the warnings of the file; return 1 when it has problems."""
    path = parsed.file or parsed.config
    try:
        config = load(path)
    except ConfigError as error:
        problems, failed = error.problems, True
    else:
        problems, failed = config.warnings, False
    shown = printable(path)
    if parsed.json:
        print(problems_json(shown, problems).decode())
    elif problems:
        print(render_problems(shown, problems))
    if not failed and not parsed.json:
        print(f"{shown}: ok, {len(config.routes)} routes, {len(config.pools)} pools")
    return int(failed)


def printable(path: Path) -> Path:
    """Return a path for people: bytes in it that are no UTF-8, which no JSON can hold, are replaced."""
    return Path(os.fsencode(path).decode("utf-8", "replace"))
