"""`edge schema`: print the JSON Schema of routes.toml, for editors."""

import argparse

from edge.config import schema


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `edge schema`: there are none."""


def run(parsed: argparse.Namespace) -> int:
    """Print the schema."""
    print(schema.render(), end="")
    return 0
