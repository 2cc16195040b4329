"""`instructions`: what a request and an event cost the edge, counted instead of timed.

User instructions are counted by callgrind (https://valgrind.org/docs/manual/cl-manual.html), opcodes by the
interpreter. A count hardly depends on what else runs, so a change of one percent shows in one run. It is not time:
formatting and loops in C take many instructions and little of it, large calls into C few opcodes and much. Look at
both, and at the CPU that `before` finds.
What the edge does by itself meanwhile is counted while nobody asks, and taken off.
"""

import argparse
import asyncio
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, Protocol

import orjson

from loadtest import opcodes
from loadtest.client import Connections
from loadtest.measures.load import Failed, Target
from loadtest.peers.edge import edge as edge_of
from loadtest.peers.peer import ROOT, Scene
from loadtest.processes import Process, ProcessError, free_port
from loadtest.upstream import Wish

_SHORT: Final = 20  # events of a stream, and of a long one
_LONG: Final = 140
_INTERVAL_MS: Final = 5.0  # each event is read alone, also where counting makes the edge slow
_WARM_UP: Final = 50
_IDLE_S: Final = 2.0


class Counter(Protocol):
    """Counts what a process does."""

    name: str

    def command(self, command: list[str]) -> list[str]:
        """Return the command that runs `python -m edge ...` and counts."""

    def begin(self, pid: int) -> None:
        """Begin to count, once the process serves."""

    def read(self) -> int:
        """Return the count since the last reading."""


class Callgrind:
    """Counts user instructions."""

    name = "instructions"

    def __init__(self, directory: Path) -> None:
        self._file = directory / "callgrind"
        self._pid = 0
        self._dumps = 0

    def command(self, command: list[str]) -> list[str]:
        """Return the command under valgrind, which counts nothing yet."""
        file = f"--callgrind-out-file={self._file}"
        return ["valgrind", "--tool=callgrind", "--instr-atstart=no", file, *command]

    def begin(self, pid: int) -> None:
        """Switch counting on."""
        self._pid = pid
        self._control("--instr=on")
        self.read()

    def read(self) -> int:
        """Let it write what it counted, and begin anew."""
        self._control("--dump")
        self._dumps += 1
        text = Path(f"{self._file}.{self._dumps}").read_text(errors="replace")
        return int(text.rpartition("\ntotals:")[2].split()[0])

    def _control(self, option: str) -> None:
        done = subprocess.run(["callgrind_control", option, str(self._pid)], capture_output=True, text=True, timeout=60)
        if done.returncode or "OK." not in done.stdout:
            raise Failed(f"callgrind_control {option}: {done.stderr or done.stdout}")


class Opcodes:
    """Counts the interpreter's opcodes."""

    name = "opcodes"

    def __init__(self, directory: Path) -> None:
        self._file = directory / "opcodes"
        self._before = 0

    def command(self, command: list[str]) -> list[str]:
        """Return the command with the counting module in front of the edge."""
        program, *rest = command
        return [program, opcodes.__file__, str(self._file), *rest[rest.index("edge") + 1 :]]

    def begin(self, pid: int) -> None:
        """Forget what the start took."""
        self.read()

    def read(self) -> int:
        """Return what was counted since the last time."""
        before, self._before = self._before, opcodes.read(self._file)
        return self._before - before


_COUNTERS: Final[tuple[Callable[[Path], Counter], ...]] = (Callgrind, Opcodes)


@dataclass(frozen=True, slots=True)
class Cost:
    """What a small request and one event of a stream take."""

    request: float
    event: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `instructions`."""
    add = parser.add_argument
    add("directory", type=Path, nargs="?", default=ROOT, help="another checkout; default: this one")
    add("--requests", type=int, default=300, metavar="N", help="default: %(default)s")
    add("--streams", type=int, default=10, metavar="N", help="of each length; default: %(default)s")
    add("--json", type=Path, metavar="FILE", help="the numbers")


def main(arguments: argparse.Namespace) -> int:
    """Count and print; return 0, 1 when the edge failed, or 2 for wrong usage."""
    directory = arguments.directory.absolute()
    if not (directory / "edge" / "__main__.py").is_file():
        print(f"loadtest instructions: {arguments.directory} is no checkout of the edge", file=sys.stderr)
        return 2
    if shutil.which("callgrind_control") is None:
        print("loadtest instructions: needs valgrind: apt install valgrind", file=sys.stderr)
        return 2
    costs: dict[str, Cost] = {}
    try:
        for kind in _COUNTERS:
            with tempfile.TemporaryDirectory(prefix="loadtest-") as made:
                counter = kind(Path(made))
                costs[counter.name] = counted(counter, directory, Path(made), arguments.requests, arguments.streams)
    except (Failed, ProcessError) as failed:
        print(f"loadtest instructions: {failed}", file=sys.stderr)
        return 1
    if arguments.json:
        arguments.json.write_bytes(orjson.dumps({"interpreter": interpreter(), **costs}, option=orjson.OPT_INDENT_2))
    print(text(costs))
    return 0


def counted(counter: Counter, root: Path, directory: Path, requests: int, streams: int) -> Cost:
    """Return what the edge of a checkout costs; raises `Failed`, `ProcessError`."""
    scene = Scene(directory, free_port(), free_port(), free_port())
    launch = edge_of(root).launch(sys.executable, scene)
    command = [sys.executable, "-m", "loadtest.upstream", "--port", str(scene.upstream_port)]
    start = partial(Process, cores=os.sched_getaffinity(0))
    with (
        start("upstream", command, directory / "upstream.log", environment={"PYTHONPATH": str(ROOT)}) as model,
        start(
            "edge",
            counter.command(launch.command),
            directory / "edge.log",
            environment={**launch.environment, "PYTHONHASHSEED": "0"},
        ) as edge,
    ):
        model.wait_listening(scene.upstream_port)
        edge.wait_listening(scene.port)
        target = Target("edge", scene.port, scene.upstream_port, launch.key, (), ())
        return asyncio.run(_count(counter, edge.pid, target, requests, streams))


async def _count(counter: Counter, pid: int, target: Target, requests: int, streams: int) -> Cost:
    connections = Connections(target.address())

    async def ask(raw: bytes, count: int) -> float:
        """Return what so many requests in a row took, less what the edge does by itself."""
        begun = time.monotonic()
        for _ in range(count):
            sample = await connections.request(raw)
            if not sample.ok:
                raise Failed(sample.error or f"status {sample.status}")
        return counter.read() - idle_per_s * (time.monotonic() - begun)

    idle_per_s = 0.0
    small = target.request()
    short, long = (target.request(Wish(events, _INTERVAL_MS)) for events in (_SHORT, _LONG))
    try:
        for raw in (small, short):
            for _ in range(_WARM_UP if raw is small else 2):
                await connections.request(raw)
        counter.begin(pid)
        await asyncio.sleep(_IDLE_S)
        idle_per_s = counter.read() / _IDLE_S
        request = await ask(small, requests) / requests
        event = (await ask(long, streams) - await ask(short, streams)) / (streams * (_LONG - _SHORT))
    finally:
        connections.close()
    return Cost(request, event)


def interpreter() -> str:
    """Return which Python was measured: an optimised build takes 12 to 18 % less."""
    built = str(sysconfig.get_config_var("CONFIG_ARGS"))
    has = [name for name, option in (("PGO", "--enable-optimizations"), ("LTO", "--with-lto")) if option in built]
    how = " and ".join(has) or "no PGO or LTO"
    return f"{platform.python_implementation()} {platform.python_version()}, built with {how}"


def text(costs: dict[str, Cost]) -> str:
    """Return the table."""
    rows = [f"{'':14} {'a request':>12} {'an event':>12}"]
    rows += [f"{name:14} {cost.request:12,.0f} {cost.event:12,.0f}" for name, cost in costs.items()]
    return "\n".join((*rows, interpreter()))
