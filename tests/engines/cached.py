"""Conversations over two engines: how much of their prompts is cached, beside what one engine alone has.

    python -m tests.engines.cached [--engine NAME ...] [--conversations N] [--turns N] [--documents] [--cache DIR]

The same kind of conversations, some at once, go through an edge to one engine, and to two behind each way to balance.
An engine tells for each turn how many tokens of its prompt it had cached. It exits with 1 where `cache-aware` has, of
second and later turns, less than 0.9 of what one engine alone has.
"""

import argparse
import asyncio
import json
import os
import random
import sys
import tempfile
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import aiohttp

from tests.engines import llamacpp, vllm
from tests.engines.cases import CHAT
from tests.engines.dying import told_in
from tests.engines.edge_process import Edge, serving
from tests.engines.engine import Engine, installed
from tests.engines.runs import running_server

ENGINES: Final = (llamacpp.ENGINE, vllm.ENGINE)
_AT_ONCE: Final = 4
_SHARE: Final = 0.9
_WORDS: Final = ("river", "stone", "light", "rain", "road", "night", "salt", "wind")
_FIRST_WORDS, _MORE_WORDS = 100, 40  # of a conversation: four at once fit into the one context of llama.cpp
_ANSWER_TOKENS: Final = 24
_ALONE, _AWARE = "one", "cache-aware"
_BALANCES: Final = (_AWARE, "least-loaded", "round-robin")
_POOL: Final = """
[pools."{name}"]
endpoints = [{endpoints}]
engine = "{engine}"
{balance}
[routes."public/{name}"]
pool = "{name}"
model = "{model}"
metered = true
"""


@dataclass(frozen=True)
class Cached:
    """Tokens of the prompts of second and later turns, and how many of them were cached."""

    prompt: int
    cached: int

    @property
    def share(self) -> float:
        """How much was cached."""
        return self.cached / self.prompt


class Talk:
    """Conversations with one model of the edge, whose answers are streams or documents."""

    def __init__(self, edge: Edge, name: str, *, stream: bool) -> None:
        self._edge, self._name, self._stream = edge, name, stream

    async def play(self, conversations: int, turns: int) -> Cached:
        """Ask each conversation turn by turn, all of them in some order; return what was cached."""
        histories: list[list[dict[str, Any]]] = [[] for _ in range(conversations)]
        at_once = asyncio.Semaphore(_AT_ONCE)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(300)) as session:

            async def ask(number: int, turn: int) -> None:
                async with at_once:
                    await self._ask(session, histories[number], number, turn)

            for turn in range(turns):
                async with asyncio.TaskGroup() as tasks:
                    for number in random.Random(turn).sample(range(conversations), conversations):
                        tasks.create_task(ask(number, turn))
        records = await self._edge.records(f"{self._name}.", conversations * turns)
        later = [record for record in records if not record["request_id"].endswith(".0")]
        if any(record["cached_tokens"] is None for record in later):
            raise SystemExit("the engine does not tell what it had cached")
        return Cached(
            sum(record["prompt_tokens"] for record in later), sum(record["cached_tokens"] for record in later)
        )

    async def _ask(self, session: aiohttp.ClientSession, history: list[dict[str, Any]], number: int, turn: int) -> None:
        draws = random.Random(f"{self._name} {number} {turn}")  # no two runs ask the same
        words = draws.choices(_WORDS, k=_MORE_WORDS if turn else _FIRST_WORDS)
        history.append({"role": "user", "content": f"{number}: {' '.join(words)}"})
        body = {"model": f"public/{self._name}", "messages": history, "max_tokens": _ANSWER_TOKENS, "temperature": 0}
        body["stream"] = self._stream
        request_id = f"{self._name}.{number:03}.{turn}"
        headers = {"authorization": f"Bearer {self._edge.key}", "x-request-id": request_id}
        async with session.post(self._edge.url + CHAT, json=body, headers=headers) as answer:
            content = await answer.read()
        if answer.status != 200:
            raise SystemExit(f"{request_id} got {answer.status}: {content!r}")
        text = told_in(content).text if self._stream else json.loads(content)["choices"][0]["message"]["content"]
        history.append({"role": "assistant", "content": text})


async def played(engine: Engine, home: Path, conversations: int, turns: int, *, stream: bool) -> dict[str, Cached]:
    """Return what was cached with one engine alone, and with two by each way to balance."""
    server, *_ = engine.servers(home)
    async with AsyncExitStack() as stack:
        ports = [await stack.enter_async_context(running_server(server, home)) for _ in range(3)]
        alone, *both = (f'"http://127.0.0.1:{port}"' for port in ports)
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="edge-")))
        pools = {_ALONE: (alone, "")}
        pools |= {name: (", ".join(both), f'balance = "{name}"') for name in _BALANCES}
        routes = [
            _POOL.format(name=name, endpoints=endpoints, engine=engine.dialect, balance=balance, model=server.model)
            for name, (endpoints, balance) in pools.items()
        ]
        edge = await stack.enter_async_context(serving(directory, "".join(routes)))
        return {name: await Talk(edge, name, stream=stream).play(conversations, turns) for name in pools}


def main(words: Sequence[str] | None = None) -> int:
    """Play the conversations; return the exit code."""
    parser = argparse.ArgumentParser(prog="tests.engines.cached", description="conversations over two engines")
    names = [engine.name for engine in ENGINES]
    parser.add_argument("--engine", action="extend", nargs="+", choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--conversations", type=int, default=16, metavar="N", help="default: %(default)s")
    parser.add_argument("--turns", type=int, default=5, metavar="N", help="of each; default: %(default)s")
    parser.add_argument("--documents", action="store_true", help="ask for no streams")
    cache = os.environ.get("ENGINES_CACHE")
    parser.add_argument("--cache", default=cache, help="where engines are kept; default $ENGINES_CACHE, else nowhere")
    asked = parser.parse_args(words)
    is_less = False
    print("| engine | engines, balance | prompts of later turns | cached | beside one alone |")
    print("| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory(prefix="engines-") as temporary:
        for engine in ENGINES:
            if asked.engine and engine.name not in asked.engine:
                continue
            home = installed(engine, Path(asked.cache or temporary))
            found = asyncio.run(played(engine, home, asked.conversations, asked.turns, stream=not asked.documents))
            for name, cached in found.items():
                ratio = cached.share / found[_ALONE].share
                count = "1" if name == _ALONE else f"2, `{name}`"
                tokens = f"{cached.prompt} | {cached.cached} ({cached.share:.1%})"
                print(f"| {engine.title} | {count} | {tokens} | {ratio:.2f} |", flush=True)
            is_less = is_less or found[_AWARE].share < _SHARE * found[_ALONE].share
    return int(is_less)


if __name__ == "__main__":
    sys.exit(main())
