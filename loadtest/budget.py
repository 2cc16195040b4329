"""`budget`: whether the edge costs what it may cost; a short comparison with nginx, exit 1 when a limit is missed.

The limits are those of the design (its section 11): ratios to nginx in the same rounds on the same machine, and a few
absolute ones. With py-spy installed, a flame graph says where the edge's time went.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Final

import orjson
import uvloop

from loadtest import compare, measures, peers
from loadtest.compare import Plan, Session
from loadtest.measures import Scale
from loadtest.meter import Meter

_PEERS: Final = ("edge", "nginx", "envoy", "vllm-router")
_ROUNDS: Final = 4
_FLAME_S: Final = 6
_SAMPLES_PER_S: Final = 250
_FLAME_SCALE: Final = Scale(requests=20_000, event_counts=(20, 40))


@dataclass(frozen=True, slots=True)
class Line:
    """One limit: what was measured, None when there is no number and why."""

    text: str
    measured: float | None
    limit: float
    unit: str
    missing: str = ""

    @property
    def met(self) -> bool:
        """Whether the limit holds; what could not be measured is not met."""
        return self.measured is not None and self.measured <= self.limit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `budget`."""
    add = parser.add_argument
    default = Path(tempfile.gettempdir()) / "edge-flame.svg"
    add("--rounds", type=int, default=_ROUNDS, metavar="N", help="default: %(default)s")
    add("--flame", type=Path, default=default, metavar="FILE", help="default: %(default)s")
    add("--json", type=Path, metavar="FILE", help="every round's raw numbers")
    compare.add_rig_arguments(parser)


def main(arguments: argparse.Namespace) -> int:
    """Measure; return 0, or 1 when a limit is missed."""
    plan = Plan(
        [peers.PEERS[name] for name in _PEERS],
        peers.directories(arguments.peer_dir),
        arguments.rounds,
        arguments.seed,
        compare.QUICK,
        wanted=lambda peer, measure: peer in ("edge", "nginx", "direct") or measure == "small",
        told=compare.progress,
    )
    try:
        document = compare.run(plan, after=lambda session: print(_flame(session, arguments.flame)))
    except compare.Unusable as unusable:
        print(f"loadtest budget: {unusable}", file=sys.stderr)
        return 2
    if arguments.json:
        arguments.json.write_bytes(orjson.dumps(document, option=orjson.OPT_INDENT_2))
    found = lines(document)
    print(text(found))
    for name, hint in document["missing"].items():
        print(f"missing: {name} ({hint})")
    for name, about in document["peers"].items():
        for problem in about["problems"]:
            print(f"FAILED: {name}: {problem}")
    return 0 if all(line.met for line in found) else 1


def lines(document: Mapping[str, Any]) -> list[Line]:
    """Return every limit and what was measured."""
    summary = document["summary"]
    edge = summary.get("edge", {})

    def of(key: str, *parts: str) -> tuple[float | None, str]:
        figure = edge.get(key, {"instead": "not measured"})
        for part in parts:
            figure = figure.get(part, {"instead": figure.get("instead") or "no nginx to compare with"})
        return figure.get("median"), figure.get("instead", "")

    def line(text: str, limit: float, unit: str, key: str, *parts: str) -> Line:
        measured, missing = of(key, *parts)
        return Line(text, measured, limit, unit, missing)

    found = [
        line("CPU of an event", 1.3, "x nginx", "cpu_per_event_us", "ratio"),
        line("CPU of a small request", 3.5, "x nginx", "cpu_per_request_us", "ratio"),
    ]
    for name in ("envoy", "vllm-router"):
        other = summary.get(name, {}).get("cpu_per_request_us", {}).get("median")
        if other is not None:  # a peer that is not there sets no limit; it is named as missing
            found.append(line(f"CPU of a small request, {name}'s", other, "µs", "cpu_per_request_us"))
    served, refused = of("cpu_per_request_us")[0], of("cpu_per_refusal_us")[0]
    share = refused / served if served and refused is not None else None
    return [
        *found,
        line("TTFT over nginx, p50", 0.2, "ms", "ttft_p50_ms", "minus"),
        line("TTFT over nginx, p99", 1.0, "ms", "ttft_p99_ms", "minus"),
        line("256 streams together, p99", 1.5, "x nginx", "together_p99_ms", "ratio"),
        line("memory of a live stream", 22.0, "kB", "memory_per_stream_kb"),
        line("memory without streams", 60.0, "MB", "base_mb"),
        line("CPU of a 1 MB body", 2.0, "ms", "cpu_per_megabyte_ms"),
        line("worst event lag beside 10 MB bodies, over direct", 10.0, "ms", "worst_beside_big_ms", "over_direct"),
        Line("CPU of a repeated bad key", share, 0.5, "of a request", "" if share else "not measured"),
        line("a client's leaving reaches the upstream, p50", 5.0, "ms", "abort_p50_ms"),
        Line("from start to listening", document["peers"].get("edge", {}).get("start_s"), 1.0, "s", "did not start"),
    ]


def text(found: list[Line]) -> str:
    """Return the table."""
    shown = [
        (
            line.text,
            "-" if line.measured is None else f"{line.measured:.2f}",
            f"{line.limit:.2f}",
            line.unit,
            "ok" if line.met else "MISSED" + (f" ({line.missing})" if line.measured is None and line.missing else ""),
        )
        for line in found
    ]
    rows = [("", "measured", "limit", "", ""), *shown]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]:<12}  {row[4]}".rstrip()
        for row in rows
    )


def _flame(session: Session, path: Path) -> str:
    """Record the edge under load; return what to tell."""
    program = shutil.which("py-spy", path=os.pathsep.join([str(Path(sys.executable).parent), *os.get_exec_path()]))
    target = session.targets.get("edge")
    if program is None:
        return "no flame graph: py-spy is not installed (pip install py-spy)"
    if target is None:
        return "no flame graph: the edge did not start"
    session.plan.told("flame graph")
    # Only who holds the interpreter: threads that wait for work would fill the picture.
    command = [program, "record", "--gil", "--pid", str(target.pids[0]), "--duration", str(_FLAME_S)]
    command += ["--rate", str(_SAMPLES_PER_S), "--format", "flamegraph", "--output", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as recorder:
        while recorder.poll() is None:
            for load in (measures.small, measures.slope):
                uvloop.run(_load(load, session))
        told = recorder.communicate()[0]
    if recorder.returncode or not path.exists():
        return f"no flame graph: py-spy: {told.strip().splitlines()[-1] if told.strip() else 'failed'}"
    return f"flame graph of the edge under load: {path}"


async def _load(load: measures.Measure, session: Session) -> None:
    target = session.targets["edge"]
    await load(target, _FLAME_SCALE, Meter(target.pids, target.rig_pids), Random(0))
