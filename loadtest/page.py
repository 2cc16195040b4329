"""`page`: the page of a saved comparison, or of two saved results beside each other.

Results are those of `compare --json`, two of them also those of `run --save-result`.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import orjson

from loadtest import comparison_page, side_by_side


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `page`."""
    add = parser.add_argument
    add("results", type=Path, nargs="+", metavar="FILE.json", help="one or two")
    add("--html", type=Path, required=True, metavar="FILE", help="where the page goes")
    add("--peer", default="edge", metavar="NAME", help="whose figures of two comparisons; default: %(default)s")


def main(arguments: argparse.Namespace) -> int:
    """Write the page; return 0, or 2 for wrong usage."""
    try:
        arguments.html.write_text(_page(arguments.results, arguments.peer))
    except (OSError, ValueError) as problem:
        print(f"loadtest page: {problem}", file=sys.stderr)
        return 2
    return 0


def _page(paths: list[Path], peer: str) -> str:
    if len(paths) > 2:
        raise ValueError("one result, or two")
    documents = [_read(path) for path in paths]
    if len(documents) == 2:
        return side_by_side.html(documents[0], documents[1], (paths[0].stem, paths[1].stem), peer)
    if "summary" not in documents[0]:
        raise ValueError(f"{paths[0].name} is no comparison; the page of a run is made by run --html")
    return comparison_page.html(documents[0])


def _read(path: Path) -> dict[str, Any]:
    document = orjson.loads(path.read_bytes())
    if not isinstance(document, dict):
        raise ValueError(f"{path.name} holds no result")
    return document
