"""`before`: whether this checkout's edge costs more than that of another one, paired round by round.

Make the other with `git worktree add DIRECTORY COMMIT`. Changes of a few percent need many rounds: look at the
interval, not at the median.
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import orjson

from loadtest import compare
from loadtest.comparison import FIGURES, told_discarded, values
from loadtest.measures.load import Scale
from loadtest.pairing import estimate, ratios
from loadtest.peers.edge import edge
from loadtest.peers.peer import ROOT
from loadtest.session import Plan, Unusable

BEFORE: Final = "before"
NOW: Final = "edge"
_ROUNDS: Final = 20
_MEASURES: Final = ("small", "refused", "slope")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `before`."""
    add = parser.add_argument
    add("directory", type=Path, help="the other checkout")
    add("--rounds", type=int, default=_ROUNDS, metavar="N", help="default: %(default)s")
    add("--measures", default=",".join(_MEASURES), metavar="A,B", help="default: %(default)s")
    add("--json", type=Path, metavar="FILE", help="every round's raw numbers")
    add("--seed", type=int, default=0)


def main(arguments: argparse.Namespace) -> int:
    """Measure and print; return 0, 1 when an edge failed, or 2 for wrong usage."""
    directory = arguments.directory.absolute()
    if not (directory / "edge" / "__main__.py").is_file():
        print(f"loadtest before: {arguments.directory} is no checkout of the edge", file=sys.stderr)
        return 2
    measures = arguments.measures.split(",")
    plan = Plan(
        [edge(ROOT, NOW), edge(directory, BEFORE)],
        [],
        arguments.rounds,
        arguments.seed,
        Scale(),
        wanted=lambda peer, measure: measure in measures,
        told=compare.progress,
    )
    try:
        document = compare.run(plan)
    except Unusable as unusable:
        print(f"loadtest before: {unusable}", file=sys.stderr)
        return 2
    if arguments.json:
        arguments.json.write_bytes(orjson.dumps(document, option=orjson.OPT_INDENT_2))
    print(text(document))
    return 1 if any(about["problems"] for about in document["peers"].values()) else 0


def text(document: Mapping[str, Any]) -> str:
    """Return a line per figure that both gave: the medians, and the median of the rounds' ratios with its interval."""
    rows = [f"{'':24} {'before':>9} {'now':>9}  ratio"]
    for figure in FIGURES:
        before, now = values(document, BEFORE, figure), values(document, NOW, figure)
        if found := ratios(now, before):
            old = estimate([each for each in before if each is not None])
            new = estimate([each for each in now if each is not None])
            ratio = estimate(found)
            span = ratio.span or "too few for an interval,"
            medians = f"{figure.key:24} {old.median:9.2f} {new.median:9.2f}  {ratio.median:.3f}"
            rows.append(f"{medians} {span} of {ratio.rounds} rounds")
    rows.append(told_discarded(document))
    for name, about in document["peers"].items():
        rows += [f"FAILED: {name}: {problem}" for problem in about["problems"]]
    return "\n".join(rows)
