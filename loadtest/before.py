"""`before`: whether this checkout's edge costs more than that of another one, paired round by round.

Make the other with `git worktree add DIRECTORY COMMIT`. Changes of a few percent need many rounds: look at the
interval, not at the median.

Two processes of one and the same build differ by 1 to 3 % for as long as they live: their memory lies elsewhere. So
each round starts both anew, and that luck is spread over the rounds instead of kept through all of them. Within a round
they take short turns, there and back again, so that what else the machine does falls on both; it is told, and no round
is left out for it.
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import orjson

from loadtest import compare
from loadtest.comparison import DIRECT, FIGURES, told_others, values
from loadtest.measures.load import Scale
from loadtest.pairing import estimate, ratios
from loadtest.peers.edge import edge
from loadtest.peers.peer import ROOT
from loadtest.session import Plan, Unusable

BEFORE: Final = "before"
NOW: Final = "edge"
_ROUNDS: Final = 20
_TURNS: Final = 12  # of each in a round: there and back; the shorter, the more alike is what the machine does to both
_MEASURES: Final = ("small", "refused", "slope")
_TURN: Final = Scale(requests=400, interval_ms=10, event_counts=(10, 40))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `before`."""
    add = parser.add_argument
    add("directory", type=Path, help="the other checkout")
    add("--rounds", type=int, default=_ROUNDS, metavar="N", help="default: %(default)s")
    add("--measures", default=",".join(_MEASURES), metavar="A,B", help="default: %(default)s")
    add("--json", type=Path, metavar="FILE", help="every turn's raw numbers, and the ratios")
    add("--seed", type=int, default=0)


def main(arguments: argparse.Namespace) -> int:
    """Measure and print; return 0, 1 when an edge failed, 2 for wrong usage, or 130 when interrupted."""
    directory = arguments.directory.absolute()
    if not (directory / "edge" / "__main__.py").is_file():
        print(f"loadtest before: {arguments.directory} is no checkout of the edge", file=sys.stderr)
        return 2
    try:
        document = measured(directory, arguments.measures.split(","), arguments.rounds, arguments.seed)
    except Unusable as unusable:
        print(f"loadtest before: {unusable}", file=sys.stderr)
        return 2
    if arguments.json:
        document["ratios"] = told_ratios(document)
        arguments.json.write_bytes(orjson.dumps(document, option=orjson.OPT_INDENT_2))
    print(text(document))
    if document["about"]["interrupted"]:
        return compare.INTERRUPTED
    return 1 if any(about["problems"] for about in document["peers"].values()) else 0


def measured(directory: Path, measures: list[str], rounds: int, seed: int) -> dict[str, Any]:
    """Return the document of a comparison with the edge of a checkout; raises `Unusable`.

    Each round is a comparison of its own, with new processes; what that calls its rounds are the turns of this one.
    """
    peers = [edge(ROOT, NOW), edge(directory, BEFORE)]
    turns: list[dict[str, Any]] = []
    problems: dict[str, list[str]] = {peer.name: [] for peer in peers}
    for index in range(rounds):
        compare.progress(f"round {index + 1} of {rounds}")
        plan = Plan(
            peers,
            [],
            _TURNS,
            seed + index,
            _TURN,
            wanted=lambda peer, measure: peer != DIRECT and measure in measures,
            shared=True,
        )
        document = compare.run(plan)
        turns += [{**each, "round": index, "turn": each["round"]} for each in document["rounds"]]
        for name, found in problems.items():
            found += [each for each in document["peers"][name]["problems"] if each not in found]
        if document["about"]["interrupted"]:
            break
    compare.progress("")
    about = document["about"] | {"rounds": rounds, "turns": _TURNS, "seed": seed}
    told = {name: document["peers"][name] | {"problems": found} for name, found in problems.items()}
    return {"about": about, "peers": told, "rounds": turns}


def told_ratios(document: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return, for each figure that both gave, `before`, `now`, and the `ratio` of the rounds with `low` and `high`."""
    told = {}
    for figure in FIGURES:
        before, now = values(document, BEFORE, figure), values(document, NOW, figure)
        if found := ratios(now, before):
            ratio = estimate(found)
            told[figure.key] = {
                "before": estimate([each for each in before if each is not None]).median,
                "now": estimate([each for each in now if each is not None]).median,
                "ratio": ratio.median,
                "low": ratio.low,
                "high": ratio.high,
                "span": ratio.span,
                "rounds": ratio.rounds,
            }
    return told


def text(document: Mapping[str, Any]) -> str:
    """Return a line per figure that both gave: the medians, and the median of the rounds' ratios with its interval."""
    rows = [f"{'':24} {'before':>9} {'now':>9}  ratio"]
    for key, told in told_ratios(document).items():
        medians = f"{key:24} {told['before']:9.2f} {told['now']:9.2f}  {told['ratio']:.3f}"
        rows.append(f"{medians} {told['span'] or 'too few for an interval,'} of {told['rounds']} rounds")
    rows.append(told_others(document))
    for name, about in document["peers"].items():
        rows += [f"FAILED: {name}: {problem}" for problem in about["problems"]]
    return "\n".join(rows)
