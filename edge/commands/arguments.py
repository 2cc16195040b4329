"""Arguments that several commands take."""

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from edge.config.settings import Config
from edge.config.values import Address, parse_address

T = TypeVar("T")


def add_config(parser: argparse.ArgumentParser) -> None:
    """Add `--config`, the routes.toml to use."""
    parser.add_argument(
        "--config", type=Path, default=Path("routes.toml"), metavar="FILE", help="default routes.toml in this directory"
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add `--json`."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def checked(parse: Callable[[str], T]) -> Callable[[str], T]:
    """Return `parse` for an argument's `type`: argparse shows the message of its `ValueError`, and exits with 2."""

    def read(text: str) -> T:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return read


def address(text: str) -> Address:
    """Return the address of `"host:port"` or `"unix:PATH"`, a PATH being relative to the working directory."""
    return parse_address(text, Path.cwd())


def listening_on(listen: Address | None, admin: Address | None) -> Callable[[Config], Config]:
    """Return what the command line's addresses make of a file."""

    def adapt(config: Config) -> Config:
        server = config.server
        server = replace(server, listen=(listen,) if listen else server.listen, admin=admin or server.admin)
        return replace(config, server=server)

    return adapt
