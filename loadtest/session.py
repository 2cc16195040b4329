"""A comparison under way: the upstream and the proxies are started, measured in turn, and what was seen is noted.

One upstream and this generator share the first core, every proxy has the last to itself while it is under load.
"""

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

import uvloop

from loadtest import processes
from loadtest.comparison import DIRECT
from loadtest.measures.load import Failed, NotServed, Numbers, Scale, Target
from loadtest.measures.table import MEASURES, Instance, Measure
from loadtest.meter import Meter
from loadtest.pairing import passes
from loadtest.peers.peer import KEY, ROOT, Peer
from loadtest.processes import Process, ProcessError
from loadtest.rig import Rig, Started, certificate

_MEASURE_TIMEOUT_S: Final = 120.0
_SETTLE_S: Final = 0.1
_SLOW_START_S: Final = 15.0


class Unusable(Exception):
    """This machine or these options allow no comparison; the message says why."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is compared, and how; `wanted` says which measures a peer gets.

    `shared`: a measurement counts though other programs ran meanwhile; the report says how much they did.
    """

    peers: Sequence[Peer]
    directories: Sequence[Path]
    rounds: int
    seed: int
    scale: Scale
    wanted: Callable[[str, str], bool] = lambda peer, measure: True
    told: Callable[[str], None] = lambda text: None
    shared: bool = False


@dataclass(slots=True)
class Session:
    """What runs, and what was seen."""

    plan: Plan
    targets: dict[str, Target] = field(default_factory=dict)
    secure: dict[str, Target] = field(default_factory=dict)
    fresh: dict[str, Callable[[contextlib.ExitStack], Started]] = field(default_factory=dict)
    about: dict[str, dict[str, Any]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    interrupted: bool = False
    began_with_load: float = field(default_factory=lambda: os.getloadavg()[0])

    def document(self) -> dict[str, Any]:
        """Return everything that was seen."""
        return {
            "about": {
                **_machine(self.plan),
                "load_average": [self.began_with_load, os.getloadavg()[0]],
                "interrupted": self.interrupted,
            },
            "peers": self.about,
            "missing": self.missing,
            "rounds": self.rounds,
        }

    def applies(self, name: str, measure: str, index: int) -> bool:
        """Return whether a measure is taken of a proxy, or of the rig without one, in a round."""
        told = MEASURES[measure]
        if not self.plan.wanted(name, measure):
            return False
        if name == DIRECT:
            return told.direct
        [peer] = [each for each in self.plan.peers if each.name == name]
        if told.instance is Instance.TLS and name not in self.secure:
            return False
        if told.instance is Instance.FRESH and index and self.targets[name].start_s > _SLOW_START_S:
            return False  # once must do, or the rounds would be spent on its starts
        return (not told.keys or peer.checks_keys) and (not peer.only or measure in peer.only)


@contextlib.contextmanager
def running(session: Session) -> Iterator[None]:
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
        made = tempfile.TemporaryDirectory(prefix="loadtest-", ignore_cleanup_errors=True)
        directory = Path(stack.enter_context(made))
        directory.chmod(0o755)  # nginx's worker may be another user
        port = processes.free_port()
        command = [sys.executable, "-m", "loadtest.upstream", "--port", str(port)]
        log, environment = directory / "upstream.log", {"PYTHONPATH": str(ROOT)}
        upstream = Process("upstream", command, log, cores={upstream_core}, environment=environment)
        stack.enter_context(upstream)
        upstream.wait_listening(port)
        os.sched_setaffinity(0, {own_core})
        own = os.getpid()
        pids = [[upstream.pid, own]] if own_core == upstream_core else [[upstream.pid], [own]]
        rig = Rig(directory, port, pids, proxy_core, certificate(directory))
        session.targets[DIRECT] = Target(DIRECT, port, port, KEY, [], pids)
        session.about[DIRECT] = _facts("the generator straight on the upstream: the rig itself", "")
        for peer in plan.peers:
            _start(session, rig, stack, peer)
        yield


def _start(session: Session, rig: Rig, stack: contextlib.ExitStack, peer: Peer) -> None:
    """Start a peer, and another of it for TLS; note what is missing or does not serve."""
    plan, name = session.plan, peer.name
    program = peer.find(plan.directories)
    if program is None:
        session.missing[name] = peer.install
        return
    plan.told(f"starting {name}")
    about = session.about[name] = _facts(peer.text, peer.version(program), peer.load_divisor)
    secured = (
        peer.tls
        and rig.certificate
        and any(plan.wanted(name, each) for each, told in MEASURES.items() if told.instance is Instance.TLS)
    )
    try:
        started = rig.start(stack, peer, program)
        about["start_s"] = started.target.start_s
        session.targets[name] = uvloop.run(started.served())
        session.fresh[name] = lambda stack: rig.start(stack, peer, program)
        if secured:
            session.secure[name] = uvloop.run(rig.start(stack, peer, program, tls=True).served())
    except (ProcessError, Failed, OSError, subprocess.CalledProcessError) as problem:
        about["problems"].append(str(problem))


def _facts(text: str, version: str, load_divisor: int = 1) -> dict[str, Any]:
    return {"text": text, "version": version, "load_divisor": load_divisor, "start_s": None, "problems": []}


async def measure(session: Session) -> None:
    """Take every measure of every proxy, round by round: each two rounds in an order and backwards."""
    plan = session.plan
    draw = Random(plan.seed)
    orders = passes(list(session.targets), plan.rounds, plan.seed)
    for first in range(0, plan.rounds, 2):
        for name, told in MEASURES.items():
            for index in range(first, min(first + 2, plan.rounds)):
                for peer in orders[index]:
                    if session.applies(peer, name, index):
                        plan.told(f"round {index + 1} of {plan.rounds}: {name} of {peer}")
                        await _one(session, name, told, peer, index, draw)


async def _one(session: Session, name: str, told: Measure, peer: str, index: int, draw: Random) -> None:
    """Take one measure of one proxy and note what it gave."""
    with contextlib.ExitStack() as stack:
        target = (session.secure if told.instance is Instance.TLS else session.targets)[peer]
        numbers: Numbers = {}
        problem = absent = ""
        meter = Meter(target.pids, target.rig_pids)
        gc.collect()
        gc.disable()  # a collection in the middle would be a lag that no proxy made
        try:
            if told.instance is Instance.FRESH:
                target = await session.fresh[peer](stack).served()
                meter = Meter(target.pids, target.rig_pids)
            async with asyncio.timeout(_MEASURE_TIMEOUT_S):
                numbers = await told.call(target, session.plan.scale, meter, Random(draw.random()))
        except* NotServed as failures:
            absent = f"not served: {_first(failures)}"
        except* (Failed, OSError, ProcessError, subprocess.CalledProcessError) as failures:  # a timeout is an OSError
            problem = _first(failures)
        finally:
            gc.enable()
    if problem and (text := f"{name}: {problem}") not in session.about[peer]["problems"]:
        session.about[peer]["problems"].append(text)
    session.rounds.append(
        {
            "round": index,
            "measure": name,
            "peer": peer,
            "unfit": numbers.pop("unfit", "") or meter.unfit,
            "numbers": numbers,
            "problem": problem,
            "absent": absent,
            "rig_bound": meter.rig_bound,
            "saturated": meter.saturated,
            "rig_busy": meter.rig_busy,
            "proxy_busy": meter.proxy_busy,
            "foreign": meter.foreign,
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
        "shared": plan.shared,
        "scale": asdict(plan.scale),
    }


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
