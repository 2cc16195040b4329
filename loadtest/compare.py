"""`compare`: what the edge and other proxies cost, side by side.

Rounds go over the proxies in random order and back again, measure by measure; figures of one round are compared with
each other only. What is not installed is named as missing.
"""

import argparse
import asyncio
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import orjson
import uvloop

from loadtest import comparison_page, comparison_tables, session
from loadtest.comparison import summarise
from loadtest.measures.load import Scale
from loadtest.measures.table import MEASURES
from loadtest.peers.peer import directories
from loadtest.peers.table import PEERS
from loadtest.session import Plan, Session, Unusable

QUICK: Final = Scale(
    requests=1500,
    new_connections=300,
    handshakes=80,
    event_counts=(10, 80),
    arrivals_s=1.0,
    memory_streams=(1000,),
    bodies=10,
    big_bodies=3,
    prompts=16,
    aborts=10,
    capacity_streams=400,
    loaded_s=1.0,
    published_s=0.5,
)
DEFAULT_ROUNDS: Final = 6
INTERRUPTED: Final = 130  # as a shell tells SIGINT
QUICK_ROUNDS: Final = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `compare`."""
    add = parser.add_argument
    add("--peers", default=",".join(PEERS), metavar="A,B", help="default: %(default)s")
    add("--work", default=",".join(MEASURES), metavar="A,B", help="what is measured; default: %(default)s")
    add("--rounds", type=_rounds, metavar="N", help=f"default: {DEFAULT_ROUNDS}, or {QUICK_ROUNDS} with --quick")
    add("--quick", action="store_true", help="less load, fewer rounds: wider intervals")
    add("--repeats", type=_share, default=1.0, metavar="SHARE", help="of the usual: 0.3 is faster and less sure")
    add(
        "--shared",
        action="store_true",
        help="count what was measured while other programs ran; the report says how much they did",
    )
    add("--json", type=Path, metavar="FILE", help="every round's raw numbers, and what they come to")
    add("--html", type=Path, metavar="FILE", help="a page with plots")
    add_rig_arguments(parser)


def _rounds(text: str) -> int:
    rounds = int(text)
    if rounds < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return rounds


def _share(text: str) -> float:
    share = float(text)
    if not 0 < share <= 100:
        raise argparse.ArgumentTypeError("above 0, at most 100")
    return share


def add_rig_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that say where peers are found and what is drawn."""
    add = parser.add_argument
    add(
        "--peer-dir",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="look for PEER/bin/PROGRAM below it; may be repeated, and is followed by $LOADTEST_PEERS",
    )
    add("--seed", type=int, default=0)


def main(arguments: argparse.Namespace) -> int:
    """Compare; return 0, 1 when a proxy failed, 2 for wrong usage, or 130 when interrupted, what was seen told."""
    names = [each for each in arguments.peers.split(",") if each]
    work = [each for each in arguments.work.split(",") if each]
    for told, known, what in ((names, PEERS, "peer"), (work, MEASURES, "work")):
        unknown = [each for each in told if each not in known]
        if unknown or not told:
            print(
                f"loadtest compare: no such {what}: {', '.join(unknown)}; there is {', '.join(known)}", file=sys.stderr
            )
            return 2
    plan = Plan(
        [PEERS[name] for name in names],
        directories(arguments.peer_dir),
        arguments.rounds or (QUICK_ROUNDS if arguments.quick else DEFAULT_ROUNDS),
        arguments.seed,
        (QUICK if arguments.quick else Scale()).repeated(arguments.repeats),
        wanted=lambda peer, measure: measure in work,
        told=progress,
        shared=arguments.shared,
    )
    try:
        document = run(plan)
    except Unusable as problem:
        print(f"loadtest compare: {problem}", file=sys.stderr)
        return 2
    print(comparison_tables.text(document))
    if arguments.json:
        arguments.json.write_bytes(orjson.dumps(document, option=orjson.OPT_INDENT_2))
    if arguments.html:
        arguments.html.write_text(comparison_page.html(document))
    if document["about"]["interrupted"]:
        return INTERRUPTED
    return 1 if any(about["problems"] for about in document["peers"].values()) else 0


def progress(text: str) -> None:
    """Show what is being done, on a terminal only."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="" if text else "\n", file=sys.stderr, flush=True)


def run(plan: Plan, after: Callable[[Session], None] = lambda session: None) -> dict[str, Any]:
    """Return the document of a comparison; `after` is called while the proxies still run. Raises: `Unusable`."""
    begun = Session(plan)
    with session.running(begun):
        try:
            uvloop.run(session.measure(begun))
        except (KeyboardInterrupt, asyncio.CancelledError):  # as which an interrupt within a group of tasks comes
            begun.interrupted = True  # what was seen so far is worth telling
        else:
            after(begun)
    plan.told("")
    document = begun.document()
    return document | {"summary": summarise(document)}
