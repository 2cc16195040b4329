"""`budget`: whether the edge costs what it may cost, by a short comparison with nginx; a gate by its exit code.

The limits are those of the design (its section 11): ratios to nginx in the same rounds on the same machine, and a few
absolute ones. A limit is met where the whole interval is below it, missed where the whole interval is above it, and
else more rounds are wanted. With py-spy installed, a flame graph says where the edge's time went.
"""

import argparse
import enum
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Final

import orjson
import uvloop

from loadtest import compare
from loadtest.comparison import BASELINE, DIRECT, FIGURES, told_discarded, values
from loadtest.measures.load import Scale
from loadtest.measures.requests import small
from loadtest.measures.streams import slope
from loadtest.measures.table import Call
from loadtest.meter import Meter
from loadtest.pairing import MIN_ROUNDS, Estimate, differences, estimate, ratios
from loadtest.peers.peer import directories
from loadtest.peers.table import PEERS
from loadtest.session import Plan, Session, Unusable

_PEERS: Final = ("edge", "nginx", "envoy", "vllm-router")
_WORK: Final = (
    "small", "slope", "arrivals", "together", "megabyte", "beside_big", "refused", "aborts", "memory",
)  # fmt: skip
_ROUNDS: Final = 9  # one of which may be far off on either side
_FLAME_S: Final = 6
_SAMPLES_PER_S: Final = 250
_FLAME_SCALE: Final = Scale(requests=20_000, event_counts=(20, 40))


class Verdict(enum.Enum):
    """Whether a limit holds."""

    OK = "ok"
    MISSED = "MISSED"
    CANNOT_TELL = "CANNOT TELL"


@dataclass(frozen=True, slots=True)
class Line:
    """One limit, and what was measured: None where there is no number; `missing` says why."""

    text: str
    measured: Estimate | None
    limit: float
    unit: str
    missing: str = "not measured"

    @property
    def verdict(self) -> Verdict:
        """Whether the limit holds."""
        if self.measured is None or self.measured.low is None or self.measured.high is None:
            return Verdict.CANNOT_TELL
        if self.measured.high <= self.limit:
            return Verdict.OK
        return Verdict.MISSED if self.measured.low > self.limit else Verdict.CANNOT_TELL

    @property
    def why(self) -> str:
        """Why nothing can be told, or "" where it can."""
        if self.verdict is not Verdict.CANNOT_TELL:
            return ""
        if self.measured is None:
            return self.missing
        return "more rounds are wanted" if self.measured.low is not None else f"needs {MIN_ROUNDS} rounds"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `budget`."""
    add = parser.add_argument
    default = Path(tempfile.gettempdir()) / "edge-flame.svg"
    add("--rounds", type=int, default=_ROUNDS, metavar="N", help="default: %(default)s")
    add("--flame", type=Path, default=default, metavar="FILE", help="default: %(default)s")
    add("--json", type=Path, metavar="FILE", help="every round's raw numbers")
    compare.add_rig_arguments(parser)


def main(arguments: argparse.Namespace) -> int:
    """Measure; return 0, 1 when a limit is missed or a proxy failed, 2 for wrong usage, 3 when not all can be told."""
    plan = Plan(
        [PEERS[name] for name in _PEERS],
        directories(arguments.peer_dir),
        arguments.rounds,
        arguments.seed,
        compare.QUICK,
        wanted=lambda peer, measure: measure in (_WORK if peer in ("edge", BASELINE, DIRECT) else ("small",)),
        told=compare.progress,
    )
    try:
        document = compare.run(plan, after=lambda session: print(_flame(session, arguments.flame)))
    except Unusable as unusable:
        print(f"loadtest budget: {unusable}", file=sys.stderr)
        return 2
    if arguments.json:
        arguments.json.write_bytes(orjson.dumps(document, option=orjson.OPT_INDENT_2))
    found = lines(document)
    print(text(found))
    print(told_discarded(document))
    for name, hint in document["missing"].items():
        print(f"missing: {name} ({hint})")
    for name, about in document["peers"].items():
        for problem in about["problems"]:
            print(f"FAILED: {name}: {problem}")
    verdicts = {line.verdict for line in found}
    if Verdict.MISSED in verdicts or any(about["problems"] for about in document["peers"].values()):
        return 1
    return 3 if Verdict.CANNOT_TELL in verdicts else 0


def lines(document: Mapping[str, Any]) -> list[Line]:
    """Return every limit and what was measured: within the same rounds."""
    figures = {figure.key: figure for figure in FIGURES}

    def of(key: str, peer: str = "edge") -> list[float | None]:
        return values(document, peer, figures[key])

    def line(text: str, limit: float, unit: str, found: Sequence[float | None], missing: str = "not measured") -> Line:
        told = [each for each in found if each is not None]
        return Line(text, estimate(told) if told else None, limit, unit, missing)

    def to(peer: str, text: str, limit: float, key: str) -> Line:
        return line(text, limit, f"x {peer}", ratios(of(key), of(key, peer)), f"no {peer} to compare with")

    def over_nginx(text: str, limit: float, key: str) -> Line:
        return line(text, limit, "ms", differences(of(key), of(key, BASELINE)), f"no {BASELINE} to compare with")

    return [
        to(BASELINE, "CPU of an event", 1.3, "cpu_per_event_us"),
        to(BASELINE, "CPU of a small request", 3.5, "cpu_per_request_us"),
        # A peer that is not there sets no limit; it is named as missing.
        *(
            to(peer, "CPU of a small request", 1.0, "cpu_per_request_us")
            for peer in ("envoy", "vllm-router")
            if peer in document["summary"]
        ),
        over_nginx("TTFT over nginx, p50", 0.2, "ttft_p50_ms"),
        over_nginx("TTFT over nginx, p99", 1.0, "ttft_p99_ms"),
        to(BASELINE, "256 streams together, p99", 1.5, "together_p99_ms"),
        line("memory of a live stream", 22.0, "kB", of("memory_per_stream_kb")),
        line("memory without streams", 60.0, "MB", of("base_mb")),
        line("CPU of a 1 MB body", 2.0, "ms", of("cpu_per_megabyte_ms")),
        line(
            "worst event lag beside 10 MB bodies, over direct", 10.0, "ms",
            differences(of("worst_beside_big_ms"), of("worst_beside_big_ms", DIRECT)),
        ),
        line(
            "CPU of a repeated bad key", 0.5, "of a request",
            ratios(of("cpu_per_refusal_us"), of("cpu_per_request_us")),
        ),
        line("a client's leaving reaches the upstream, p50", 5.0, "ms", of("abort_p50_ms")),
        line("from start to listening", 1.0, "s", of("start_s")),
    ]  # fmt: skip


def text(found: list[Line]) -> str:
    """Return the table."""
    shown = [
        (
            line.text,
            "-" if line.measured is None else f"{line.measured.median:.2f}",
            "" if line.measured is None else line.measured.span,
            f"{line.limit:.2f}",
            line.unit,
            line.verdict.value + (f" ({line.why})" if line.why else ""),
        )
        for line in found
    ]
    rows = [("", "measured", "95 %", "limit", "", ""), *shown]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:<{widths[2]}}  {row[3]:>{widths[3]}}"
        f"  {row[4]:<13}  {row[5]}".rstrip()
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
            for load in (small, slope):
                uvloop.run(_load(load, session))
        told = recorder.communicate()[0]
    if recorder.returncode or not path.exists():
        return f"no flame graph: py-spy: {told.strip().splitlines()[-1] if told.strip() else 'failed'}"
    return f"flame graph of the edge under load: {path}"


async def _load(load: Call, session: Session) -> None:
    target = session.targets["edge"]
    await load(target, _FLAME_SCALE, Meter(target.pids, target.rig_pids), Random(0))
