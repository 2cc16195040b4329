"""`compare`: what the edge and other proxies cost, side by side.

One upstream and this generator share the first core, every proxy has the last to itself while it is under load.
Rounds go over the proxies in random order and back again, measure by measure; figures of one round are compared with
each other only. What is not installed is named as missing.
"""

import argparse
import asyncio
import contextlib
import gc
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Final

import orjson
import uvloop

from loadtest import comparison_report, measures, peers, processes
from loadtest.comparison import DIRECT, summarise
from loadtest.measures import MEASURES, Failed, Scale, Target
from loadtest.meter import Meter
from loadtest.pairing import passes
from loadtest.peers import PEERS, ROOT, Peer, Scene
from loadtest.processes import Process, ProcessError

_DIRECT_MEASURES: Final = frozenset({"small", "arrivals", "together", "beside_big", "aborts"})
_READY_TIMEOUT_S: Final = 60.0
_MEASURE_TIMEOUT_S: Final = 90.0
_SETTLE_S: Final = 0.1
QUICK: Final = Scale(
    requests=3000,
    event_counts=(10, 40, 100),
    memory_streams=(1000,),
    bodies=10,
    big_bodies=3,
    aborts=10,
)
DEFAULT_ROUNDS: Final = 6
QUICK_ROUNDS: Final = 2


class Unusable(Exception):
    """This machine or these options allow no comparison; the message says why."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is compared, and how; `wanted` says which measures a peer gets."""

    peers: Sequence[Peer]
    directories: Sequence[Path]
    rounds: int
    seed: int
    scale: Scale
    wanted: Callable[[str, str], bool] = lambda peer, measure: True
    told: Callable[[str], None] = lambda text: None


@dataclass(slots=True)
class Session:
    """A comparison under way: what runs, and what was seen."""

    plan: Plan
    targets: dict[str, Target] = field(default_factory=dict)
    about: dict[str, dict[str, Any]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    rounds: list[dict[str, Any]] = field(default_factory=list)

    def document(self) -> dict[str, Any]:
        """Return everything that was seen."""
        return {
            "about": _machine(self.plan),
            "peers": self.about,
            "missing": self.missing,
            "rounds": self.rounds,
        }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `compare`."""
    add = parser.add_argument
    add("--peers", default=",".join(PEERS), metavar="A,B", help="default: %(default)s")
    add("--rounds", type=_rounds, metavar="N", help=f"default: {DEFAULT_ROUNDS}, or {QUICK_ROUNDS} with --quick")
    add("--quick", action="store_true", help="less load, fewer rounds: wider intervals")
    add("--json", type=Path, metavar="FILE", help="every round's raw numbers, and what they come to")
    add("--html", type=Path, metavar="FILE", help="a page with plots")
    add_rig_arguments(parser)


def _rounds(text: str) -> int:
    rounds = int(text)
    if rounds < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return rounds


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
    """Compare; return 0, 1 when a proxy failed, or 2 for wrong usage."""
    names = [each for each in arguments.peers.split(",") if each]
    unknown = [each for each in names if each not in PEERS]
    if unknown or not names:
        print(f"loadtest compare: no such peer: {', '.join(unknown)}; there are {', '.join(PEERS)}", file=sys.stderr)
        return 2
    rounds = arguments.rounds or (QUICK_ROUNDS if arguments.quick else DEFAULT_ROUNDS)
    directories = peers.directories(arguments.peer_dir)
    plan = Plan(
        [PEERS[name] for name in names],
        directories,
        rounds,
        arguments.seed,
        QUICK if arguments.quick else Scale(),
        told=progress,
    )
    try:
        document = run(plan)
    except Unusable as problem:
        print(f"loadtest compare: {problem}", file=sys.stderr)
        return 2
    print(comparison_report.text(document))
    if arguments.json:
        arguments.json.write_bytes(orjson.dumps(document, option=orjson.OPT_INDENT_2))
    if arguments.html:
        arguments.html.write_text(comparison_report.html(document))
    return 1 if any(about["problems"] for about in document["peers"].values()) else 0


def progress(text: str) -> None:
    """Show what is being done, on a terminal only."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="" if text else "\n", file=sys.stderr, flush=True)


def run(plan: Plan, after: Callable[[Session], None] = lambda session: None) -> dict[str, Any]:
    """Return the document of a comparison; `after` is called while the proxies still run. Raises: `Unusable`."""
    session = Session(plan)
    with _running(session):
        uvloop.run(_measure(session))
        after(session)
    plan.told("")
    document = session.document()
    return document | {"summary": summarise(document)}


@contextlib.contextmanager
def _running(session: Session) -> Iterator[None]:
    """Start the upstream and every peer that is there; stop them at the end."""
    plan = session.plan
    before = os.sched_getaffinity(0)
    cores = sorted(before)
    if len(cores) < 2:
        raise Unusable("one core is not enough: the proxy needs one to itself")
    upstream_core, own_core, proxy_core = cores[0], cores[-2], cores[-1]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with contextlib.ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        stack.callback(os.sched_setaffinity, 0, before)
        directory = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="loadtest-", ignore_cleanup_errors=True))
        )
        port = processes.free_port()
        command = [sys.executable, "-m", "loadtest.upstream", "--port", str(port)]
        environment = {"PYTHONPATH": str(ROOT)}
        log = directory / "upstream.log"
        upstream = stack.enter_context(
            Process("upstream", command, log, cores={upstream_core}, environment=environment)
        )
        upstream.wait_listening(port)
        os.sched_setaffinity(0, {own_core})
        rig = [[upstream.pid, os.getpid()]] if own_core == upstream_core else [[upstream.pid], [os.getpid()]]
        session.targets[DIRECT] = Target(DIRECT, port, port, peers.KEY, [], rig)
        session.about[DIRECT] = _facts("the generator straight on the upstream: the rig itself", "")
        for peer in plan.peers:
            name = peer.name
            program = peer.find(plan.directories)
            if program is None:
                session.missing[name] = peer.install
                continue
            plan.told(f"starting {name}")
            about = session.about[name] = _facts(peer.text, peer.version(program), peer.load_divisor)
            try:
                process, target = _start(stack, peer, program, directory / name, port, rig, proxy_core)
            except (ProcessError, Failed, OSError, subprocess.CalledProcessError) as problem:
                about["problems"].append(str(problem))
                continue
            about["start_s"] = process.start_s
            session.targets[name] = target
        yield


def _facts(text: str, version: str, load_divisor: int = 1) -> dict[str, Any]:
    return {"text": text, "version": version, "load_divisor": load_divisor, "start_s": None, "problems": []}


def _start(
    stack: contextlib.ExitStack,
    peer: Peer,
    program: str,
    directory: Path,
    upstream: int,
    rig: list[list[int]],
    core: int,
) -> tuple[Process, Target]:
    directory.mkdir()
    directory.chmod(0o755)
    scene = Scene(directory, processes.free_port(), processes.free_port(), upstream)
    launch = peer.launch(program, scene)
    process = stack.enter_context(
        Process(peer.name, launch.command, directory / "log", cores={core}, environment=launch.environment)
    )
    process.wait_listening(scene.port)
    target = Target(peer.name, scene.port, upstream, launch.key, [], rig, peer.load_divisor)
    uvloop.run(measures.ready(target, _READY_TIMEOUT_S))
    # Only now: workers are forked after the port is open.
    return process, Target(peer.name, scene.port, upstream, launch.key, process.pids(), rig, peer.load_divisor)


async def _measure(session: Session) -> None:
    plan = session.plan
    draw = Random(plan.seed)
    names = list(session.targets)
    for name in names:
        if name != DIRECT and plan.wanted(name, "memory"):
            plan.told(f"memory of {name}")
            await _one(session, "memory", measures.memory, name, 0, draw)
    orders = passes(names, plan.rounds, plan.seed)
    for first in range(0, plan.rounds, 2):
        for measure, call in MEASURES.items():
            for index in range(first, min(first + 2, plan.rounds)):
                for name in orders[index]:
                    if _applies(plan, name, measure) and plan.wanted(name, measure):
                        plan.told(f"round {index + 1} of {plan.rounds}: {measure} of {name}")
                        await _one(session, measure, call, name, index, draw)


def _applies(plan: Plan, name: str, measure: str) -> bool:
    if name == DIRECT:
        return measure in _DIRECT_MEASURES
    return measure != "refused" or any(peer.checks_keys for peer in plan.peers if peer.name == name)


async def _one(session: Session, measure: str, call: measures.Measure, name: str, index: int, draw: Random) -> None:
    """Run one measure of one proxy and note what it gave."""
    target = session.targets[name]
    meter = Meter(target.pids, target.rig_pids)
    numbers: measures.Numbers = {}
    problem = ""
    gc.collect()
    gc.disable()  # a collection in the middle would be a lag that no proxy made
    try:
        async with asyncio.timeout(_MEASURE_TIMEOUT_S):
            numbers = await call(target, session.plan.scale, meter, Random(draw.random()))
    except* (Failed, OSError) as failures:  # a timeout is an OSError too
        problem = _first(failures)
    finally:
        gc.enable()
    if problem:
        told = session.about[name]["problems"]
        if (text := f"{measure}: {problem}") not in told:
            told.append(text)
    session.rounds.append(
        {
            "round": index,
            "measure": measure,
            "peer": name,
            "numbers": numbers,
            "problem": problem,
            "unfit": meter.unfit,
            "rig_bound": meter.rig_bound,
            "saturated": meter.saturated,
            "rig_busy": meter.rig_busy,
            "proxy_busy": meter.proxy_busy,
            "steal": meter.steal,
            "major_faults": meter.major_faults,
        }
    )
    await asyncio.sleep(_SETTLE_S)


def _first(failures: BaseExceptionGroup[BaseException]) -> str:
    failure: BaseException = failures
    while isinstance(failure, BaseExceptionGroup):
        failure = failure.exceptions[0]
    return str(failure) or f"did not end within {_MEASURE_TIMEOUT_S:g} s"


def _machine(plan: Plan) -> dict[str, Any]:
    """Return what a reader must know of the machine and the run."""
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": " ".join(
            ["python -m loadtest", *(Path(each).name if "/" in each else each for each in sys.argv[1:])]
        ),
        "machine": f"{os.cpu_count()} cores, {models[0].partition(': ')[2] if models else platform.machine()}",
        "kernel": platform.release(),
        "python": platform.python_version(),
        "commit": _commit(),
        "rounds": plan.rounds,
        "seed": plan.seed,
        "scale": asdict(plan.scale),
    }


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
