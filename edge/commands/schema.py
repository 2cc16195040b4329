"""`edge schema`: print what is known of the settings of routes.toml, as JSON Schema for editors or as a manual."""

import argparse

from edge.config import manual, schema


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `edge schema`."""
    parser.add_argument("--manual", action="store_true", help="print the manual of its settings instead")


def run(parsed: argparse.Namespace) -> int:
    """Print the schema, or the manual."""
    print(manual.render() if parsed.manual else schema.render(), end="")
    return 0
