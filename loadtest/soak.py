"""`soak`: thousands of live streams held for a set time, every byte checked, memory and descriptors watched (Linux).

A stream that ends is followed by another at once. The soak fails when a stream broke or stood still, when a watched
process is gone, or when something still grows: over the second half of the time under full load, the median of the
later part may be above that of the earlier by 3 % and 2 MB of memory, and by 2 % and 8 descriptors.
"""

import argparse
import asyncio
import resource
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import orjson
import uvloop

from loadtest import processes, report, tables, target
from loadtest.answer import Answer, refusal
from loadtest.client import Client, Connections
from loadtest.target import Target, duration_s, positive
from loadtest.upstream import Wish
from loadtest.workload import SCENARIOS, numbered

_RAMP_PER_S: Final = 500.0
_LOOK_INTERVAL_S: Final = 1.0
_STILL_S: Final = 60.0  # without an event that holds something, a stream is broken
_FULL_SHARE: Final = 0.95  # of the streams live: the few that just ended are being followed
_MIN_LOOKS: Final = 8  # under full load: two in each quarter
_SLACK: Final = {"memory_bytes": (0.03, 2e6), "descriptors": (0.02, 8.0)}  # allocators keep some, leaks keep going


@dataclass(frozen=True, slots=True)
class Look:
    """What was seen at one moment, in seconds since the start."""

    at_s: float
    live: int
    memory_bytes: int
    descriptors: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `soak`."""
    target.add_arguments(parser)
    add = parser.add_argument
    add("--streams", type=positive, default=2000, metavar="N", help="live at once; default: %(default)s")
    add("--duration", type=duration_s, default=60.0, metavar="TIME", help="at full load, such as 60s or 10m")
    add("--output-len", type=positive, default=100, metavar="TOKENS", help="of one stream; default: %(default)s")
    add("--interval", type=float, default=100.0, metavar="MS", help="between tokens, of loadtest.upstream")
    add("--pid", type=int, action="append", default=[], help="watch this process and its children; may be repeated")
    check = parser.add_mutually_exclusive_group()
    check.add_argument("--exact", action="store_true", help="the upstream is loadtest.upstream: check every byte")
    check.add_argument("--equal", action="store_true", help="ask the same each time; every answer must be the same")


def main(arguments: argparse.Namespace) -> int:
    """Run; return 0, or 1 when a stream broke or something grew, 2 when it cannot be what was asked for."""
    try:
        targets = target.targets_of(arguments)
        if len(targets) > 1:
            raise ValueError("one --target at a time")
        soak = Soak(targets[0], arguments)
    except ValueError as error:
        print(f"loadtest soak: {error}", file=sys.stderr)
        return 2
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    uvloop.run(soak.hold())
    numbers = soak.numbers()
    shown = [
        (name.replace("_", " "), str(value)) for name, value in numbers.items() if name not in ("problems", "notes")
    ]
    print("\n".join(tables.pairs(shown)))
    for each in numbers["notes"]:
        print(f"NOTE: {each}")
    for each in numbers["problems"]:
        print(f"FAILED: {each}")
    if arguments.save_result:
        document = soak.facts() | numbers | {"looks": [asdict(look) for look in soak.looks]}
        arguments.save_result.write_bytes(orjson.dumps(document, option=orjson.OPT_INDENT_2))
    if arguments.html:
        arguments.html.write_text(_page(soak, numbers))
    return 1 if numbers["problems"] else 0


class Soak:
    """One soak and what it saw; raises `ValueError` when a process to watch is none."""

    def __init__(self, target: Target, arguments: argparse.Namespace) -> None:
        for pid in arguments.pid:
            if not processes.tree(pid):
                raise ValueError(f"no process {pid} to watch")
        self.target = target
        self._arguments = arguments
        self._date = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self.looks: list[Look] = []
        self._running: dict[Client, Answer] = {}
        self._number = 0
        self._completed = 0
        self._events = 0
        self._digest: int | None = None
        self._errors: Counter[str] = Counter()
        self._gone: set[int] = set()

    def facts(self) -> dict[str, object]:
        """Return what a reader must know of the run."""
        arguments = self._arguments
        return {
            "date": self._date,
            "target": self.target.url,
            "model_id": arguments.model,
            "streams": arguments.streams,
            "duration": arguments.duration,
            "output_len": arguments.output_len,
            "interval_ms": arguments.interval,
            "check": "every byte" if arguments.exact else "equal answers" if arguments.equal else "well-formed answers",
        }

    async def hold(self) -> None:
        """Hold the streams for the duration, then let each come to its end."""
        arguments = self._arguments
        begun = time.monotonic()
        until = begun + arguments.streams / _RAMP_PER_S + arguments.duration
        scenario = SCENARIOS["chat-stream"]
        wish = Wish(arguments.output_len, arguments.interval)
        body = scenario.body(arguments.model, {"max_tokens": arguments.output_len, "user": wish.text()})
        raw = self.target.request(scenario.kind, body)
        connections = Connections(self.target.address())
        async with asyncio.TaskGroup() as group:
            watch = group.create_task(self._watch(begun, until), name="soak watch")
            streams = []
            for number in range(arguments.streams):
                streams.append(group.create_task(self._streams(connections, raw, until), name="soak stream"))
                if (ahead := begun + number / _RAMP_PER_S - time.monotonic()) > 0:
                    await asyncio.sleep(ahead)
            await asyncio.gather(*streams)
            connections.close()
            await asyncio.sleep(_LOOK_INTERVAL_S)  # one more look, at what is left
            watch.cancel()
        if sys.stderr.isatty():
            print(file=sys.stderr)

    async def _streams(self, connections: Connections, raw: bytes, until: float) -> None:
        """Be one of the live streams: one after the other."""
        while time.monotonic() < until:
            error = await self._stream(connections, raw)
            if error:
                self._errors[error] += 1
                await asyncio.sleep(_LOOK_INTERVAL_S)  # a dead target is asked once a second, not in a storm
            else:
                self._completed += 1

    async def _stream(self, connections: Connections, raw: bytes) -> str:
        """Return what was wrong with one stream."""
        arguments = self._arguments
        self._number += 1
        answer = Answer(stream=True, exact=arguments.output_len if arguments.exact else None)
        answer.last_at = time.monotonic()
        used: list[Client] = []

        def begun(client: Client) -> None:
            used.append(client)
            self._running[client] = answer

        request = raw if arguments.equal else numbered(raw, self._number)
        sample = await connections.request(request, answer, begun=begun)
        for client in used:
            del self._running[client]
        self._events += sample.events
        if sample.error:
            return sample.error
        if not sample.ok:
            return refusal(sample.status, None)
        error = answer.end()
        if arguments.equal and not error:
            self._digest = answer.digest if self._digest is None else self._digest
            error = "" if answer.digest == self._digest else "an answer differs from the first"
        return error

    async def _watch(self, begun: float, until: float) -> None:
        while True:
            await asyncio.sleep(_LOOK_INTERVAL_S)
            memory_bytes, descriptors = await asyncio.to_thread(self._read)
            now = time.monotonic()
            self.looks.append(Look(now - begun, len(self._running), memory_bytes, descriptors))
            for client, answer in list(self._running.items()):
                if now - answer.last_at > _STILL_S:
                    client.give_up(f"no event for {_STILL_S:g} s")
            if sys.stderr.isatty():
                left = max(0.0, until - now)
                broken = sum(self._errors.values())
                text = f"\r{len(self._running)} live, {self._completed} ended well, {broken} broke, {left:.0f} s left "
                print(text, end="", file=sys.stderr, flush=True)

    def _read(self) -> tuple[int, int]:
        trees = {pid: processes.tree(pid) for pid in self._arguments.pid}
        self._gone.update(pid for pid, pids in trees.items() if not pids)
        pids = [each for tree in trees.values() for each in tree]
        return processes.pss_bytes(pids), processes.descriptors(pids)

    def numbers(self) -> dict[str, Any]:
        """Return the result; `problems` fail the soak, `notes` say what it could not tell."""
        arguments = self._arguments
        problems = [f"{count} streams: {error}" for error, count in self._errors.most_common()]
        if not self._completed:
            problems.append("no stream came to its end")
        problems += [f"the watched process {pid} is gone" for pid in sorted(self._gone)]
        notes = []
        full = [look for look in self.looks if look.live >= _FULL_SHARE * arguments.streams]
        if not arguments.pid:
            notes.append("no --pid: memory and descriptors were not watched")
        elif len(full) < _MIN_LOOKS:
            notes.append(f"under full load for {len(full)} s only: too short to tell whether something grows")
        else:
            problems += growth(full)
        return {
            "streams_completed": self._completed,
            "streams_failed": sum(self._errors.values()),
            "events": self._events,
            "live_at_most": max((look.live for look in self.looks), default=0),
            "memory_mb_at_most": round(max((look.memory_bytes for look in self.looks), default=0) / 1e6, 1),
            "memory_mb_at_the_end": round(self.looks[-1].memory_bytes / 1e6, 1) if self.looks else 0.0,
            "descriptors_at_most": max((look.descriptors for look in self.looks), default=0),
            "problems": problems,
            "notes": notes,
        }


def growth(full: Sequence[Look]) -> list[str]:
    """Return what grew over the second half of looks at full load, by the rule at the top of this module."""
    found = []
    middle, late = len(full) // 2, len(full) * 3 // 4
    for name, (share, least) in _SLACK.items():
        earlier = statistics.median(getattr(look, name) for look in full[middle:late])
        later = statistics.median(getattr(look, name) for look in full[late:])
        if later > earlier + max(share * earlier, least):
            found.append(f"{name.replace('_', ' ')} still grow: {earlier:.0f}, then {later:.0f}")
    return found


def _page(soak: Soak, numbers: dict[str, Any]) -> str:
    times = [look.at_s for look in soak.looks]

    def over_time(title: str, name: str, scale: float, unit: str) -> str:
        def draw(axes: Any) -> None:
            heights = [getattr(look, name) / scale for look in soak.looks]
            axes.plot(times, heights, color=report.COLOURS[0])
            axes.fill_between(times, heights, color=report.COLOURS[0], alpha=0.1, linewidth=0)
            axes.set_xlabel("seconds since the start")
            axes.set_ylabel(unit)
            axes.set_ylim(bottom=0)

        return report.section(title, report.plot(draw, height=2.4))

    tiles = {
        "streams ended well": f"{numbers['streams_completed']:,}",
        "streams broke": f"{numbers['streams_failed']:,}",
        "live at most": f"{numbers['live_at_most']:,}",
        "events": f"{numbers['events']:,}",
    }
    sections = [
        report.note("Failed." if numbers["problems"] else "Every stream was whole.", bad=bool(numbers["problems"])),
        *(report.note(each, bad=True) for each in numbers["problems"]),
        *(report.note(each) for each in numbers["notes"]),
        over_time("Live streams", "live", 1, "streams"),
    ]
    if any(look.memory_bytes for look in soak.looks):
        tiles["MB at most"] = f"{numbers['memory_mb_at_most']:,}"
        tiles["MB at the end"] = f"{numbers['memory_mb_at_the_end']:,}"
        sections.append(over_time("Memory of the watched processes", "memory_bytes", 1e6, "MB (PSS)"))
        sections.append(over_time("Their open descriptors", "descriptors", 1, "descriptors"))
    sections.append(report.section("The run", report.facts(soak.facts())))
    return report.page(f"Soak of {soak.target.url}", [report.tiles(tiles), *sections])
