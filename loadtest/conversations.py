"""`conversations`: how long prompts wait at engines that keep what they have read, for each balance and load.

Four simulated engines read prompts one after another and have a prefix cache. Conversations begin at a rate and go on
turn by turn. Waits are those that the engines reckon, so a busy machine does not blur them; only the edges are
processes of their own. With `--before DIR` the edge of another checkout plays too, with its `prefix-affinity`.
"""

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import aiohttp

from edge.simulator.behaviour import Behaviour
from edge.simulator.memory import Prefixes
from edge.simulator.server import Record, Simulator
from loadtest.peers.peer import ROOT, directories
from loadtest.processes import ProcessError, cpu_s
from loadtest.routers import ROUTERS, Front, edges, routers
from loadtest.target import positive

_BALANCES: Final = ("cache-aware", "least-loaded", "round-robin")
_BEFORE: Final = "prefix-affinity"
_MODEL: Final = "public/m"
_PATH: Final = "/v1/chat/completions"  # a router may ask engines for more than the answer
_PREFILL_RATE: Final = 25_000.0  # tokens a second of one engine
_BYTES_PER_TOKEN: Final = 4.0
_ANSWER_TOKENS: Final = 16
_SLOW: Final = 0.4
_IDLE_S: Final = 3.0
_LONG_BYTES: Final = 400_000  # 100,000 tokens
_SCENARIOS: Final = {
    "turns": "conversations of several turns",
    "slow": f"the same, with one engine at {_SLOW} of the speed",
    "restart": "the same, and one engine loses its cache half-way",
    "single": "every conversation has one turn, and shares nothing",
    "no-cache": "engines that keep nothing, and say so",
    "long": "conversations that begin with 100,000 tokens",
}


@dataclass(frozen=True, slots=True)
class Turn:
    """One request of a conversation: what the user says, and how long after the answer before; both drawn."""

    text: str
    pause_s: float


@dataclass(frozen=True, slots=True)
class Conversation:
    """When it begins, in seconds, the text of its system, and its turns."""

    begins_s: float
    system: str
    turns: tuple[Turn, ...]


@dataclass(slots=True)
class Outcome:
    """What one run showed: waits in seconds, tokens by engine, CPU of what chose, and how many answers were none."""

    waits_s: list[float] = field(default_factory=list)
    cached_tokens: int = 0
    ideal_tokens: int = 0
    requests_by_member: list[int] = field(default_factory=list)
    router_cpu_s: float = 0.0
    failed: int = 0

    def wait_s(self, share: float) -> float:
        """Return the wait that a share of the prompts did not exceed."""
        waits = sorted(self.waits_s)
        return waits[min(len(waits) - 1, int(share * len(waits)))] if waits else 0.0

    @property
    def hits(self) -> float:
        """What was cached, of what one engine with room for all would have had."""
        return self.cached_tokens / self.ideal_tokens if self.ideal_tokens else 0.0

    @property
    def most(self) -> float:
        """The requests of the busiest engine, of the mean."""
        counts = self.requests_by_member
        return max(counts) * len(counts) / max(1, sum(counts))

    @property
    def cpu_ms(self) -> float:
        """The CPU of the edge, or of what took its place, for a request; what it takes when idle is left out."""
        return self.router_cpu_s * 1000 / max(1, sum(self.requests_by_member))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `conversations`."""
    add = parser.add_argument
    add("--rates", default="9", metavar="N,N", help="conversations that begin a second; default: %(default)s")
    add("--conversations", type=positive, default=150, metavar="N", help="how many; default: %(default)s")
    add("--turns", type=positive, default=6, metavar="N", help="of each; default: %(default)s")
    add("--members", type=positive, default=4, metavar="N", help="engines; default: %(default)s")
    add("--processes", type=positive, default=1, metavar="N", help="edges, each request at any of them; default: 1")
    about = "; ".join(f"{name}: {text}" for name, text in _SCENARIOS.items())
    add("--scenario", choices=tuple(_SCENARIOS), default="turns", help=about)
    add("--balances", default=",".join(_BALANCES[:2]), metavar="A,B", help="default: %(default)s")
    add("--before", type=Path, metavar="DIR", help=f"another checkout, whose {_BEFORE} is measured too")
    add("--peers", default="", metavar="A,B", help=f"routers of others that play too: {', '.join(ROUTERS)}")
    add("--peer-dir", type=Path, action="append", default=[], metavar="DIR", help="as of `compare`")
    add("--seed", type=int, default=1, metavar="N", help="another one draws another trace; default: 1")
    add("--svg", type=Path, metavar="FILE", help="draw the waits over the rates")


Setting = Callable[[Path, Sequence[str]], AbstractContextManager[Front]]  # for a directory and engines


def main(arguments: argparse.Namespace) -> int:
    """Measure each balance at each rate, and print; return 0, 1 where an answer failed, 2 where one did not start."""
    rates, runs = [float(each) for each in arguments.rates.split(",")], _runs(arguments)
    if (unknown := set(_listed(arguments.peers)) - set(ROUTERS)) or not runs:
        told = f"no router {', '.join(sorted(unknown))}" if unknown else "nothing to measure"
        print(f"loadtest conversations: {told}; there are {', '.join(ROUTERS)}", file=sys.stderr)
        return 2
    found: dict[str, list[Outcome]] = {name: [] for name in runs}
    waits = " ".join(f"{share:>7}" for share in ("p50 s", "p90 s", "p99 s"))
    print(f"{'balance':16} {'conv/s':>7} {waits} {'hits':>6} {'most':>6} {'CPU ms':>6} failed")
    try:
        for rate in rates:
            for name, setting in runs.items():
                outcome = asyncio.run(_run(arguments, rate, setting))
                found[name].append(outcome)
                waits = " ".join(f"{outcome.wait_s(share):7.3f}" for share in (0.5, 0.9, 0.99))
                shares = f"{outcome.hits:6.3f} {outcome.most:6.2f} {outcome.cpu_ms:6.2f} {outcome.failed:6}"
                print(f"{name:16} {rate:7g} {waits} {shares}", flush=True)
    except ProcessError as error:
        print(f"loadtest conversations: {error}", file=sys.stderr)
        return 2
    if arguments.svg is not None:
        _draw(arguments.svg, rates, found)
    return int(any(outcome.failed for outcomes in found.values() for outcome in outcomes))


def _listed(text: str) -> list[str]:
    return [each for each in text.split(",") if each]


def _runs(arguments: argparse.Namespace) -> dict[str, Setting]:
    """Return what is measured, by its name."""
    count, places = arguments.processes, directories(arguments.peer_dir)

    def ours(root: Path, balance: str) -> Setting:
        return lambda directory, engines: edges(count, root, directory, balance, engines)

    def theirs(name: str) -> Setting:
        return lambda directory, engines: routers(name, count, directory, engines, places)

    runs = {balance: ours(ROOT, balance) for balance in _listed(arguments.balances)}
    if arguments.before is not None:
        runs[_BEFORE] = ours(arguments.before.resolve(), _BEFORE)
    return runs | {name: theirs(name) for name in _listed(arguments.peers)}


def trace(
    rate: float, conversations: int, turns: int, seed: int, *, shares: bool = True, more_bytes: int = 0
) -> list[Conversation]:
    """Return conversations that begin at a rate; `shares`: some have the text of their system in common.

    A first turn has `more_bytes` than usual.
    """
    draw, made, begins_s = random.Random(seed), [], 0.0
    systems = [_text(draw, draw.randint(500, 6_000)) for _ in range(6)]
    for _ in range(conversations):
        begins_s += draw.expovariate(rate)
        system = draw.choice(systems) if shares else _text(draw, 3_000)
        first = Turn(_text(draw, draw.randint(1_000, 14_000) + more_bytes), 0.0)
        others = [Turn(_text(draw, draw.randint(500, 4_000)), draw.uniform(0.3, 1.5)) for _ in range(turns - 1)]
        made.append(Conversation(begins_s, system, (first, *others)))
    return made


def _text(draw: random.Random, size: int) -> str:
    return "".join(f"{draw.getrandbits(32):08x} " for _ in range(size // 9 + 1))[:size]


async def _run(arguments: argparse.Namespace, rate: float, setting: Setting) -> Outcome:
    scenario, turns = arguments.scenario, 1 if arguments.scenario == "single" else arguments.turns
    conversations = arguments.conversations * (arguments.turns if turns == 1 else 1)
    rate *= arguments.turns if turns == 1 else 1
    more_bytes = _LONG_BYTES if scenario == "long" else 0
    made = trace(rate, conversations, turns, arguments.seed, shares=scenario != "single", more_bytes=more_bytes)
    engines = [Simulator(_behaviour(scenario, number), keep_requests=100_000) for number in range(arguments.members)]
    for engine in engines:
        await engine.start()
    try:
        outcome = Outcome()
        with (
            tempfile.TemporaryDirectory(prefix="loadtest-conversations-", ignore_cleanup_errors=True) as directory,
            ExitStack() as stack,
        ):
            started = setting(Path(directory), [engine.url for engine in engines])
            front = await asyncio.to_thread(stack.enter_context, started)  # routers wait for the engines' health
            await _play(made, front, outcome, engines if scenario == "restart" else ())
    finally:
        for engine in engines:
            await engine.close()
    asked_of = [[each for each in engine.requests if each.path == _PATH] for engine in engines]
    asked = [each for of_one in asked_of for each in of_one]
    outcome.waits_s = [each.read_s for each in asked]
    outcome.cached_tokens = sum(each.cached_tokens for each in asked)
    outcome.requests_by_member = [len(of_one) for of_one in asked_of]
    outcome.ideal_tokens = _ideal(asked)
    return outcome


def _behaviour(scenario: str, number: int) -> Behaviour:
    return Behaviour(
        dialect="openai" if scenario == "no-cache" else "vllm",
        prefix_cache=scenario != "no-cache",
        cache_tokens=2_000_000,
        bytes_per_token=_BYTES_PER_TOKEN,
        prefill_rate=_PREFILL_RATE * (_SLOW if scenario == "slow" and not number else 1),
        tokens=_ANSWER_TOKENS,
        served=(_MODEL,),
        interval_ms=5,
        batch_ms=0.2,
        context_length=1_000_000,
    )


def _ideal(requests: Iterable[Record]) -> int:
    """Return what one engine with room for everything would have had cached of these prompts, as they came."""
    prefixes, ideal = Prefixes(), 0
    for record in sorted(requests, key=lambda each: each.started):
        prompt = json.dumps(json.loads(record.body)["messages"], separators=(",", ":")).encode()
        known = prefixes.known_bytes("m", prompt, 1 << 30, int(16 * _BYTES_PER_TOKEN))
        ideal += int(known / _BYTES_PER_TOKEN) // 16 * 16
    return ideal


async def _play(made: Sequence[Conversation], front: Front, outcome: Outcome, restarted: Sequence[Simulator]) -> None:
    """Play all conversations; one of the engines to be `restarted` loses its cache when half of them have begun."""
    draw, idle_share = random.Random(0), await _idle_share(front)
    begun, begun_s = time.monotonic(), cpu_s(front.pids)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, headers={"Authorization": f"Bearer {front.key}"}) as session:

        async def play(conversation: Conversation) -> None:
            await asyncio.sleep(conversation.begins_s)
            messages = [{"role": "system", "content": conversation.system}]
            for turn in conversation.turns:
                await asyncio.sleep(turn.pause_s)
                messages.append({"role": "user", "content": turn.text})
                answer = await _ask(session, draw.choice(front.urls), messages)
                outcome.failed += answer is None
                messages.append({"role": "assistant", "content": answer or ""})

        async with asyncio.TaskGroup() as group:
            for conversation in made:
                group.create_task(play(conversation))
            if restarted:
                await asyncio.sleep(made[len(made) // 2].begins_s)
                restarted[0].forget()
    idle_s = idle_share * (time.monotonic() - begun)
    outcome.router_cpu_s = max(0.0, cpu_s(front.pids) - begun_s - idle_s)


async def _idle_share(front: Front) -> float:
    """Return the CPU of the edge, or of what took its place, in a second in which nobody asks."""
    begun_s = cpu_s(front.pids)
    await asyncio.sleep(_IDLE_S)
    return (cpu_s(front.pids) - begun_s) / _IDLE_S


async def _ask(session: aiohttp.ClientSession, url: str, messages: list[dict[str, str]]) -> str | None:
    """Return the text of an answer, None for one that failed."""
    asked = {"model": _MODEL, "messages": messages, "stream": True}
    body, parts = json.dumps(asked, separators=(",", ":")), []
    try:
        async with session.post(f"{url}{_PATH}", data=body, headers={"Content-Type": "application/json"}) as answer:
            if answer.status != 200:
                return None
            async for line in answer.content:
                if line.startswith(b"data: {"):
                    choices = json.loads(line[6:])["choices"]
                    parts += [choice["delta"].get("content") or "" for choice in choices]
    except aiohttp.ClientError:
        return None
    return "".join(parts)


def _draw(file: Path, rates: Sequence[float], found: dict[str, list[Outcome]]) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for balance, outcomes in found.items():
        axes.plot(rates, [outcome.wait_s(0.9) for outcome in outcomes], marker="o", label=balance)
    axes.set(xlabel="conversations a second", ylabel="p90 of the wait for the first token, s", yscale="log")
    axes.legend()
    figure.savefig(file)
