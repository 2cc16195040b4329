"""`edge diff`: list what a reload would change, or refuse."""

import argparse
from pathlib import Path

from edge.commands.check import printable
from edge.config.changes import list_changes
from edge.config.problems import ConfigError, render_problems
from edge.config.reading import load
from edge.config.settings import Config
from edge.errors import Unusable
from edge.process.reloading import refuse_what_needs_a_restart


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `edge diff`."""
    add = parser.add_argument
    add("old", type=Path, metavar="OLD", help="the file that is served")
    add("new", type=Path, metavar="NEW", help="what would stand in its place; relative paths start there")


def run(parsed: argparse.Namespace) -> int:
    """Print the changes, and why a reload would refuse them; return 1 when a file has problems."""
    configs: list[Config] = []
    for path in (parsed.old, parsed.new):
        try:
            configs.append(load(path, place=parsed.old))
        except ConfigError as error:
            print(render_problems(printable(path), error.problems))
    if len(configs) < 2:
        return 1
    old, new = configs
    print("\n".join(list_changes(old, new)) or "nothing changed")
    try:
        refuse_what_needs_a_restart(old, new)
    except Unusable as error:
        print(f"a reload would be refused: {error}")
    return 0
