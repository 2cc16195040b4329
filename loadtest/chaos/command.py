"""`chaos`: everything around two edges breaks under mixed traffic, and in the end every token is accounted for (Linux).

Clients ask for chat, completions, messages and responses, as streams and documents; some leave, some dawdle, and some
engines fail by themselves. Meanwhile one edge is killed and stopped, and everything that both need is killed, halted,
cut off, filled or moved. It ends by itself after `--seconds`, or `--requests`. The verdict compares what the engines
gave with what was recorded and delivered, request by request (`loadtest/chaos/ledger.py` has the rules), and what the
edge that lived has at rest, before and after: memory, descriptors, tasks.
"""

import argparse
import asyncio
import contextlib
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import uvloop
from redis.exceptions import RedisError

from loadtest.chaos.faults import MORTAL, WORLD, Fault
from loadtest.chaos.ledger import compare
from loadtest.chaos.traffic import Traffic
from loadtest.chaos.world import Census, World
from loadtest.processes import ProcessError
from loadtest.target import positive

_WARM_S: Final = 8.0
_SETTLE_S: Final = 8.0  # engines close idle connections after five
_MIDDLE_FROM_S: Final = 240.0  # from here on there is a rest in the middle, and what grows shows there
_FAULT_PATIENCE_S: Final = 120.0
_PAUSES_S: Final = {"mortal": (2.0, 6.0), "world": (0.2, 1.0)}  # between two faults; a process is to serve meanwhile
# What may differ between two rests: a share, and an amount.
_SLACK: Final = {"memory_bytes": (0.05, 8e6), "descriptors": (0.0, 12.0), "tasks": (0.0, 4.0)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `chaos`."""
    add = parser.add_argument
    add("--seconds", type=positive, default=60, metavar="N", help="of faults under load; default: %(default)s")
    add("--requests", type=positive, metavar="N", help="end when so many were made")
    add("--clients", type=positive, default=32, metavar="N", help="at once; default: %(default)s")
    add("--faketime", type=Path, metavar="FILE", help="libfaketime.so.1, where it is not installed")
    add("--keep", type=Path, metavar="DIR", help="an empty directory for journals and logs, kept afterwards")
    add("--seed", type=int, default=0)


def main(arguments: argparse.Namespace) -> int:
    """Run; return 0, 1 when an equality does not hold or something grew, 2 when a part cannot be started."""
    try:
        if arguments.keep is not None:
            arguments.keep.mkdir(parents=True, exist_ok=True)
            return uvloop.run(_run(arguments.keep, arguments))
        with tempfile.TemporaryDirectory(prefix="loadtest-chaos-", ignore_cleanup_errors=True) as directory:
            return uvloop.run(_run(Path(directory), arguments))
    except ProcessError as error:
        print(f"loadtest chaos: {error}", file=sys.stderr)
        return 2


async def _run(directory: Path, arguments: argparse.Namespace) -> int:
    world = World(directory, [arguments.faketime] if arguments.faketime is not None else [])
    try:
        await world.start()
        return await Chaos(world, arguments).run()
    finally:
        await world.close()


class Chaos:
    """One run over a world that was started."""

    def __init__(self, world: World, arguments: argparse.Namespace) -> None:
        self._world = world
        self._arguments = arguments
        self._problems: list[str] = []
        self._done: Counter[str] = Counter()
        self._rests: list[Census] = []
        edges = {name: (port, world.key) for name, port in world.ports.items()}
        self._traffic = Traffic(edges, arguments.clients, arguments.seed, arguments.requests, ("mortal",))

    async def run(self) -> int:
        """Run to the end, print the ledger, and return the exit code."""
        arguments, begun = self._arguments, time.monotonic()
        collecting = asyncio.get_running_loop().create_task(self._collect(), name="collect")
        await asyncio.sleep(_WARM_S)
        await self._rest()
        seconds = float(arguments.seconds)
        halves = (seconds / 2, seconds / 2) if seconds >= _MIDDLE_FROM_S else (seconds,)
        for half_s in halves:
            self._traffic.go_on()
            await self._break_things(half_s)
            await self._rest()
        await self._traffic.end()
        collecting.cancel()
        await asyncio.gather(collecting, return_exceptions=True)
        self._problems += await self._world.deliver_all()
        return self._report(time.monotonic() - begun)

    async def _collect(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            self._world.collect()

    async def _rest(self) -> None:
        """Wait until nothing runs, and count what the edge that lives has."""
        await self._traffic.rest()
        await asyncio.sleep(_SETTLE_S)
        self._rests.append(await self._world.census("steady"))

    async def _break_things(self, seconds: float) -> None:
        until_s = time.monotonic() + seconds
        possible = {name: fault for name, fault in WORLD.items() if name not in self._world.why}
        await asyncio.gather(self._lane("mortal", MORTAL, until_s), self._lane("world", possible, until_s))

    async def _lane(self, lane: str, faults: Mapping[str, Fault], until_s: float) -> None:
        """Let one fault follow the other, all of them before any comes again."""
        chance = random.Random(f"{self._arguments.seed} {lane} {len(self._rests)}")
        waiting: list[str] = []
        while time.monotonic() < until_s and not self._traffic.is_over.is_set():
            if not waiting:
                waiting = list(faults)
                chance.shuffle(waiting)
            name = waiting.pop()
            try:
                async with asyncio.timeout(_FAULT_PATIENCE_S):
                    await faults[name](self._world, chance)
            except TimeoutError:  # of the patience, which says nothing
                self._problems.append(f"{name}: not over within {_FAULT_PATIENCE_S:g} s")
            except (ProcessError, RedisError, OSError) as error:
                self._problems.append(f"{name}: {str(error) or type(error).__name__}")
            self._done[name] += 1
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._traffic.is_over.wait(), chance.uniform(*_PAUSES_S[lane]))

    def _report(self, took_s: float) -> int:
        world, traffic = self._world, self._traffic
        ledger = compare(traffic.asked, world.given, list(world.journals.values()), self._arguments.clients)
        problems = [*self._problems, *ledger.problems, *self._growth()]
        print(f"chaos: {len(traffic.asked)} requests in {took_s:.0f} s, seed {self._arguments.seed}")
        print("faults: " + ", ".join(f"{count} x {name}" for name, count in sorted(self._done.items())))
        missing = [name for name in (*MORTAL, *WORLD) if not self._done[name] and name not in world.why]
        if missing:
            print("not reached in this time: " + ", ".join(missing))
        for name, why in world.why.items():
            print(f"left out: {name}: {why}")
        print("clients: " + ", ".join(f"{count} x {status}" for status, count in sorted(traffic.statuses.items())))
        print("\n".join(ledger.lines()))
        paths = sorted(Counter(path for path, _ in ledger.paths.elements()).items())
        whole = Counter(path for (path, end), count in ledger.paths.items() if end == "complete" for _ in range(count))
        print("records: " + ", ".join(f"{count} {path} ({whole[path]} complete)" for path, count in paths))
        resumed = Counter(
            record["end"] for each in world.journals.values() for record in each.ended if record.get("resumes")
        )
        print("went on elsewhere: " + (", ".join(f"{count} {end}" for end, count in resumed.most_common()) or "none"))
        for name, journal in world.journals.items():
            kills = f", {journal.kills} kills" if journal.kills else ""
            print(f"{name}: {len(journal.ended)} records, {len(journal.delivered)} delivered{kills}")
        for rest in self._rests:
            memory = f"{rest.memory_bytes / 1e6:.1f} MB"
            print(f"steady at rest: {memory}, {rest.descriptors} descriptors, {rest.tasks} tasks")
        for problem in problems:
            print(f"PROBLEM {problem}")
        print("verdict: " + ("does not hold" if problems else "holds"), flush=True)
        return int(bool(problems))

    def _growth(self) -> list[str]:
        before, after = self._rests[-2:]
        found = []
        for name, (share, amount) in _SLACK.items():
            earlier, later = getattr(before, name), getattr(after, name)
            if later > earlier + share * earlier + amount:
                found.append(f"{name.replace('_', ' ')} grew from rest to rest: {earlier}, then {later}")
        return found
