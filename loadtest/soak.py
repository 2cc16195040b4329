"""`soak`: thousands of live streams held for a set time, every byte checked, memory and descriptors watched.

A stream that ends is followed by another at once. The soak fails when a stream broke, or when, over its second half,
the memory or the descriptors of the watched processes still grew.
"""

import argparse
import asyncio
import os
import statistics
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import orjson
import uvloop

from loadtest import processes, report
from loadtest.client import Connections
from loadtest.run import Target
from loadtest.workload import SCENARIOS, Stamps, Tokens, understand

_RAMP_PER_S: Final = 500.0
_LOOK_INTERVAL_S: Final = 1.0
# What may be left of growth between the third and the fourth quarter: allocators keep some, leaks keep going.
_MEMORY_SLACK: Final = 0.03
_DESCRIPTOR_SLACK: Final = 0.02


@dataclass(frozen=True, slots=True)
class Look:
    """What was seen at one moment, in seconds since the start."""

    at_s: float
    live: int
    memory_bytes: int
    descriptors: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `soak`."""
    add = parser.add_argument
    add("--target", default="http://127.0.0.1:8080", metavar="URL", help="default: %(default)s")
    add("--api-key", default=os.environ.get("OPENAI_API_KEY", ""), help="default: $OPENAI_API_KEY")
    add("--host", help="the Host header, when it is not the URL's")
    add("--model", default="public/deepseek-r1", help="default: %(default)s")
    add("--streams", type=int, default=2000, metavar="N", help="live at once; default: %(default)s")
    add("--duration", type=float, default=60.0, metavar="SECONDS", help="default: %(default)s")
    add("--output-len", type=int, default=100, metavar="TOKENS", help="of one stream; default: %(default)s")
    add("--interval", type=float, default=100.0, metavar="MS", help="between tokens, of the benchmark upstream")
    add("--exact", action="store_true", help="the upstream is loadtest's own: check every byte, not only the sense")
    add("--pid", type=int, action="append", default=[], help="watch this process and its children; may be repeated")
    add("--save-result", type=Path, metavar="FILE", help="the numbers as JSON")
    add("--html", type=Path, metavar="FILE", help="a page with plots")


def main(arguments: argparse.Namespace) -> int:
    """Run; return 0, or 1 when a stream broke or something grew."""
    target = Target(arguments.target, arguments.api_key, arguments.host)
    try:
        target.address()
    except ValueError as error:
        print(f"loadtest soak: {error}", file=sys.stderr)
        return 2
    soak = Soak(target, arguments)
    uvloop.run(soak.hold())
    numbers = soak.numbers()
    for name, value in numbers.items():
        print(f"{name.replace('_', ' ') + ':':<40} {value}")
    if arguments.save_result:
        looks = [asdict(look) for look in soak.looks]
        arguments.save_result.write_bytes(orjson.dumps(numbers | {"looks": looks}, option=orjson.OPT_INDENT_2))
    if arguments.html:
        arguments.html.write_text(_page(target.url, numbers, soak.looks))
    return 1 if numbers["problems"] else 0


class Soak:
    """One soak and what it saw."""

    def __init__(self, target: Target, arguments: argparse.Namespace) -> None:
        self._target = target
        self._arguments = arguments
        self.looks: list[Look] = []
        self._live = 0
        self._completed = 0
        self._events = 0
        self._errors: Counter[str] = Counter()

    async def hold(self) -> None:
        """Hold the streams for the duration, then let each come to its end."""
        arguments = self._arguments
        begun = time.monotonic()
        until = begun + arguments.streams / _RAMP_PER_S + arguments.duration
        scenario = SCENARIOS["chat-stream"]
        wish = {"events": arguments.output_len, "interval_ms": arguments.interval}
        body = scenario.body(arguments.model, max_tokens=arguments.output_len, bench=wish)
        raw = self._target.request(scenario.kind, body)
        connections = Connections(self._target.address())
        async with asyncio.TaskGroup() as group:
            watch = group.create_task(self._watch(begun), name="soak watch")
            streams = []
            for _ in range(arguments.streams):
                streams.append(group.create_task(self._stream(connections, raw, until), name="soak stream"))
                await asyncio.sleep(1 / _RAMP_PER_S)
            await asyncio.gather(*streams)
            watch.cancel()
        connections.close()

    async def _stream(self, connections: Connections, raw: bytes, until: float) -> None:
        while time.monotonic() < until:
            reader = Stamps(self._arguments.output_len) if self._arguments.exact else Tokens()
            self._live += 1
            sample = await connections.request(raw, reader)
            self._live -= 1
            error = sample.error or ("" if sample.ok else f"status {sample.status}")
            if not error and isinstance(reader, Stamps):
                error = "" if reader.exact else "the stream differs from what was sent"
            elif not error and isinstance(reader, Tokens):
                error = understand(reader, stream=True).problem
            self._events += sample.events
            if error:
                self._errors[error] += 1
                await asyncio.sleep(_LOOK_INTERVAL_S)  # a dead target is asked once a second, not in a storm
            else:
                self._completed += 1

    async def _watch(self, begun: float) -> None:
        while True:
            await asyncio.sleep(_LOOK_INTERVAL_S)
            pids = [each for pid in self._arguments.pid for each in processes.tree(pid)]
            seen = processes.pss_bytes(pids), processes.descriptors(pids)
            self.looks.append(Look(time.monotonic() - begun, self._live, *seen))

    def numbers(self) -> dict[str, Any]:
        """Return the result."""
        # Only looks at full load say whether something grows: the ramp and the end do not.
        full = [look for look in self.looks if look.live >= 0.95 * self._arguments.streams]
        problems = [f"{count} streams: {error}" for error, count in self._errors.items()]
        quarter = len(full) // 4
        if self._arguments.pid and quarter:
            for name, slack in (("memory_bytes", _MEMORY_SLACK), ("descriptors", _DESCRIPTOR_SLACK)):
                third = statistics.median(getattr(look, name) for look in full[2 * quarter : 3 * quarter])
                fourth = statistics.median(getattr(look, name) for look in full[3 * quarter :])
                if fourth > third * (1 + slack):
                    problems.append(f"{name} still grows: {third:.0f}, then {fourth:.0f}")
        return {
            "streams_completed": self._completed,
            "streams_failed": sum(self._errors.values()),
            "events": self._events,
            "live_at_most": max((look.live for look in self.looks), default=0),
            "memory_mb_at_most": round(max((look.memory_bytes for look in self.looks), default=0) / 1e6, 1),
            "descriptors_at_most": max((look.descriptors for look in self.looks), default=0),
            "problems": problems,
        }


def _page(url: str, numbers: dict[str, Any], looks: list[Look]) -> str:
    times = [look.at_s for look in looks]

    def draw(name: str, scale: float, unit: str) -> str:
        def fill(axes: Any) -> None:
            axes.plot(times, [getattr(look, name) / scale for look in looks], color=report.COLOURS[0])
            axes.set_xlabel("seconds since the start")
            axes.set_ylabel(unit)
            axes.set_ylim(bottom=0)

        return report.plot(fill, height=2.6)

    problems = [report.note(each, bad=True) for each in numbers["problems"]]
    return report.page(
        f"Soak of {url}",
        [
            *problems,
            report.facts(numbers),
            report.section("Live streams", draw("live", 1, "streams")),
            report.section("Memory of the watched processes", draw("memory_bytes", 1e6, "MB (PSS)")),
            report.section("Their descriptors", draw("descriptors", 1, "descriptors")),
        ],
    )
