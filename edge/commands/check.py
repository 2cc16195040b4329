"""`edge check`: list every problem of a routes.toml."""

import argparse
import os
from pathlib import Path

from edge.commands.arguments import add_config, add_json
from edge.config.positions import Positions
from edge.config.problems import ConfigError, Problem, dotted, problems_json, render_problems
from edge.config.reading import load
from edge.config.settings import Config
from edge.process.proof import prove


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `edge check`."""
    parser.add_argument("file", nargs="?", type=Path, default=None, metavar="FILE", help="default: that of --config")
    add_config(parser)
    add_json(parser)


def run(parsed: argparse.Namespace) -> int:
    """Print the problems and the warnings of the file, and of what it names; return 1 when it has problems."""
    path = parsed.file or parsed.config
    try:
        config = load(path)
    except ConfigError as error:
        problems, failed = error.problems, True
    else:
        problems = _proved(config)
        failed = any(problem.severity == "error" for problem in problems)
    shown = printable(path)
    if parsed.json:
        print(problems_json(shown, problems).decode())
    elif problems:
        print(render_problems(shown, problems))
    if not failed and not parsed.json:
        print(f"{shown}: ok, {len(config.routes)} routes, {len(config.pools)} pools")
    return int(failed)


def _proved(config: Config) -> tuple[Problem, ...]:
    """Return the warnings of a file that is sound, and what is wrong with what it names, by line."""
    found = [*config.warnings]
    if findings := list(prove(config)):
        positions = Positions(config.path.read_bytes().decode("utf-8-sig"))
        found += [Problem(positions.line(at), dotted(at), message, severity) for at, message, severity in findings]
    return tuple(sorted(found, key=lambda problem: problem.line))


def printable(path: Path) -> Path:
    """Return a path for people: bytes in it that are no UTF-8, which no JSON can hold, are replaced."""
    return Path(os.fsencode(path).decode("utf-8", "replace"))
