"""Streams whose engine dies in their midst: which of them go on at another one, and whether they are whole.

    python -m tests.engines.dying [--engine NAME ...] [--mode NAME ...] [--breaks N] [--kills N] [--cache DIR]

Two servers of one engine stand behind an edge whose pools resume. Each stream is asked whole first. Then it is asked
again and broken behind some event, by a relay that has counted them: its server is ended by SIGKILL and started again.
Others take half a minute to start, so there the connection is reset, and servers are killed for the last streams alone,
as many as `--kills` says. It exits with 1 where a stream is neither equal to the whole one nor ended with the error and
a reason, or where one that must be equal is not: `docs/resume.md` says which must.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import aiohttp

from loadtest.processes import free_port
from tests.engines import llamacpp, sglang, vllm
from tests.engines.cases import CHAT, COMPLETIONS
from tests.engines.edge_process import Edge, serving
from tests.engines.engine import Engine, Server, installed
from tests.engines.runs import running_at

MODES: Final = ("replay", "content")
_PROMPTS: Final = 6
_READY_WITHIN_S: Final = 900.0  # vLLM's on a busy machine
_LOGGED_WITHIN_S: Final = 30.0
_POLL_S: Final = 0.02
_READ_BYTES: Final = 65_536
_EVENT: Final = re.compile(rb"^data: (\{.*\})\r?$", re.MULTILINE)
_POOL: Final = """
[pools.{mode}]
endpoints = ["http://127.0.0.1:{first}", "http://127.0.0.1:{second}"]
engine = "{engine}"
balance = "round-robin"
resume = "{mode}"
retry_budget = 1.0
connect_timeout = "30s"
[routes."public/{mode}"]
pool = "{mode}"
model = "{model}"
metered = true
"""


def _changed(engine: Engine, words: dict[str, str], *flags: str, model: str = "tiny.gguf") -> Engine:
    """Return an engine whose first server has other words, and more."""

    def servers(home: Path) -> tuple[Server, ...]:
        write = engine.servers(home)[0]
        return (
            replace(
                write,
                command=lambda port: [*(words.get(word, word) for word in write.command(port)), *flags],
                model=model,
            ),
        )

    return replace(engine, servers=servers)


_LLAMACPP: Final = _changed(llamacpp.ENGINE, {"write": "exact"})
_VLLM: Final = _changed(vllm.ENGINE, {"bfloat16": "float32"}, model="tiny")
_SGLANG: Final = _changed(sglang.ENGINE, {"bfloat16": "float32"}, model="tiny")


def _thinking(engine: Engine, parser: str) -> Engine:
    """Return an engine whose model thinks as DeepSeek-R1 does."""
    changed = _changed(engine, {"./tiny": "./r1", "tiny": "r1"}, "--reasoning-parser", parser, model="r1")
    return replace(changed, title=f"{engine.title}, DeepSeek-R1's template", model="r1_model.py")


@dataclass(frozen=True)
class Kind:
    """What is broken: an engine, how long its answers are, what else is asked, and how many servers are killed.

    `kills` None: each time.
    """

    name: str
    engine: Engine
    tokens: int
    asked: dict[str, Any] = field(default_factory=dict)
    kills: int | None = None


KINDS: Final = (
    Kind("llamacpp", _LLAMACPP, 80),
    Kind("vllm", _VLLM, 60, {"repetition_penalty": 1.3}, 1),
    Kind("vllm-r1", _thinking(_VLLM, "deepseek_r1"), 60, {"repetition_penalty": 1.3}, 1),
    Kind("sglang", _SGLANG, 60, {}, 1),
    Kind("sglang-r1", _thinking(_SGLANG, "deepseek-r1"), 60, {}, 1),
)


class Member:
    """A server behind a relay that may break a stream behind some event, and the process with it."""

    def __init__(self, server: Server, home: Path, fate: "Fate") -> None:
        self._server, self._home, self._fate = server, home, fate
        self.own_port, self.port = free_port(), free_port()
        self._process: asyncio.subprocess.Process | None = None

    @asynccontextmanager
    async def up(self) -> AsyncIterator[None]:
        """Run the server, until this ends or it is killed."""
        with tempfile.TemporaryDirectory(prefix="engine-", ignore_cleanup_errors=True) as made:
            directory = Path(made)
            for model in (self._home / "models").iterdir():
                (directory / model.name).symlink_to(model)
            async with running_at(self.own_port, self._server, self._home, directory, _READY_WITHIN_S) as process:
                self._process = process
                yield

    async def killed(self) -> None:
        """Kill the server and whatever it started."""
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGKILL)
        await self._process.wait()

    async def relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pass a connection on to the server."""
        try:
            from_server, to_server = await asyncio.open_connection("127.0.0.1", self.own_port)
        except OSError:
            writer.transport.abort()
            return
        async with asyncio.TaskGroup() as tasks:
            asked = tasks.create_task(_copied(reader, to_server))
            await self._answered(from_server, writer)
            asked.cancel()
        to_server.transport.abort()
        writer.close()

    async def _answered(self, from_server: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pass on what the server says, until one side has closed or the stream breaks."""
        with contextlib.suppress(OSError):
            while data := await from_server.read(_READ_BYTES):
                passes, breaks = self._fate.passing(data)
                writer.write(passes)
                await writer.drain()
                if breaks:
                    self._fate.broken = self
                    if self._fate.kills:
                        await self.killed()
                    return


async def _copied(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(_READ_BYTES):
            writer.write(data)
            await writer.drain()
        writer.close()


class Fate:
    """Behind which event the next stream breaks, and what had passed of it by then."""

    def __init__(self) -> None:
        self.after: int | None = None
        self.kills = False
        self.passed = b""
        self.broken: Member | None = None

    def passing(self, data: bytes) -> tuple[bytes, bool]:
        """Return what of the data passes, and whether the connection breaks behind it."""
        if self.after is None or self.broken is not None:
            return data, False
        self.passed += data
        ends = [found.end() for found in _EVENT.finditer(self.passed)]
        if len(ends) < self.after:
            return data, False
        kept = self.passed.find(b"\n\r\n", ends[self.after - 1]) + 3  # the end of the event, and of its chunk
        cut, self.passed = len(self.passed) - kept, self.passed[:kept]
        return data[: len(data) - cut], True


@dataclass(frozen=True)
class Told:
    """What a client got of a stream, and what stands in its record."""

    thoughts: str
    text: str
    reason: str | None
    usage: Any
    failed: bool
    ids: tuple[int, ...] = ()
    bill: tuple[int, ...] = ()

    @property
    def written(self) -> str:
        """As the model wrote it."""
        return self.thoughts + ("</think>" if self.thoughts and self.text else "") + self.text

    def begins(self, whole: "Told") -> bool:
        """Whether it is the beginning of the whole one."""
        return whole.thoughts.startswith(self.thoughts) and whole.text.startswith(self.text)


def told_in(content: bytes, bill: tuple[int, ...] = ()) -> Told:
    """Return what the events of an answer tell."""
    thoughts, text, reason, usage, failed, ids = "", "", None, None, False, []
    for event in _EVENT.findall(content):
        chunk = json.loads(event)
        failed = failed or "error" in chunk
        usage = chunk.get("usage") or usage
        for choice in chunk.get("choices") or ():
            said = choice.get("delta", choice)
            thoughts += said.get("reasoning") or said.get("reasoning_content") or ""
            text += said.get("content") or said.get("text") or ""
            reason = choice.get("finish_reason") or reason
            ids += choice.get("token_ids") or []
            ids += [each["id"] for each in ((choice.get("logprobs") or {}).get("content") or ()) if "id" in each]
    if isinstance(usage, dict):
        usage = usage.get("prompt_tokens"), usage.get("completion_tokens")
    return Told(thoughts, text, reason, usage, failed, tuple(ids), bill)


class Run:
    """One kind of engine in one mode: its streams, broken one after another."""

    def __init__(self, kind: Kind, mode: str, edge: Edge, log: Path, members: list[Member], fate: Fate) -> None:
        self._kind, self._mode, self._edge, self._log = kind, mode, edge, log
        self._members, self._fate = members, fate
        self._wholes: dict[int, Told] = {}
        self._asked = 0
        self.outcomes: Counter[str] = Counter()
        self.faults: list[str] = []

    async def play(self, breaks: int, stack: list[AsyncExitStack]) -> None:
        """Break so many streams; `stack` has what keeps each member up."""
        chance = random.Random(f"{self._kind.name} {self._mode}")
        kills = breaks if self._kind.kills is None else self._kind.kills
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(300)) as session:
            for number in range(_PROMPTS):
                await self._whole(session, number)
            for at in range(breaks):
                number, self._fate.kills = at % _PROMPTS, at >= breaks - kills
                self._fate.after = chance.randint(1, self._kind.tokens - 4)
                self._fate.passed, self._fate.broken = b"", None
                told, word = await self._ask(session, number)
                broken, self._fate.after = self._fate.broken, None
                await self._judge(session, number, told, word, await self._canonical(session, number))
                if broken is not None and self._fate.kills:
                    place = self._members.index(broken)
                    await stack[place].aclose()
                    await stack[place].enter_async_context(broken.up())

    async def _whole(self, session: aiohttp.ClientSession, number: int) -> None:
        """Ask a stream whole, through the edge, and for its tokens."""
        told, word = await self._ask(session, number)
        if word or told.failed:
            raise SystemExit(f"a whole stream failed: {word} {told}")
        more = {"return_token_ids": True} if self._kind.engine.dialect == "vllm" else {"logprobs": True}
        path, body = self._body(number)
        async with session.post(self._own + path, json=body | more | {"model": self._model}) as answer:
            ids = told_in(await answer.read()).ids
        self._wholes[number] = replace(told, ids=ids)

    @property
    def _own(self) -> str:
        return f"http://127.0.0.1:{self._members[0].own_port}"

    @property
    def _model(self) -> str:
        return "r1" if self._kind.name.endswith("r1") else "tiny"

    def _body(self, number: int) -> tuple[str, dict[str, Any]]:
        draws = random.Random(number)
        prompt = " ".join(draws.choices(("river", "stone", "light", "rain", "road", "night", "salt", "wind"), k=7))
        asked = {"stream": True, "temperature": 0, "max_tokens": self._kind.tokens, **self._kind.asked}
        asked["stream_options"] = {"include_usage": True}
        if number % 3 == 2:
            return COMPLETIONS, asked | {"prompt": prompt}
        return CHAT, asked | {"messages": [{"role": "user", "content": prompt}]}

    async def _ask(self, session: aiohttp.ClientSession, number: int) -> tuple[Told, str]:
        """Return what a client got, and what became of a resume: a word, "" for none."""
        path, body = self._body(number)
        self._asked += 1
        name = f"{self._mode}.{self._asked:06}"
        headers = {"authorization": f"Bearer {self._edge.key}", "x-request-id": name}
        content = b""
        body["model"] = f"public/{self._mode}"
        with contextlib.suppress(aiohttp.ClientPayloadError):  # a stream that broke
            async with session.post(self._edge.url + path, json=body, headers=headers) as answer:
                async for piece in answer.content.iter_any():
                    content += piece
        line = await self._line(name)
        (record,) = await self._edge.records(name, 1)
        bill = record["prompt_tokens"], record["completion_tokens"], record["reasoning_tokens"]
        return told_in(content, bill), line["resume"] or ""

    async def _line(self, name: str) -> dict[str, Any]:
        """Return the log line of a request."""
        async with asyncio.timeout(_LOGGED_WITHIN_S):
            while True:
                for line in self._log.read_bytes().split(b"\n"):
                    if line.startswith(b"{") and f'"{name}"'.encode() in line and b'"resume"' in line:
                        found: dict[str, Any] = json.loads(line)
                        return found
                await asyncio.sleep(_POLL_S)

    async def _canonical(self, session: aiohttp.ClientSession, number: int) -> bool:
        """Whether what had come, tokenized, is what had been generated."""
        written = told_in(self._fate.passed).written
        dialect = self._kind.engine.dialect
        asked: dict[str, Any] = {"model": self._model, "prompt": written, "add_special_tokens": False}
        if dialect == "llamacpp":
            asked = {"content": written, "add_special": False, "parse_special": True}
        broken = self._fate.broken
        alive = next(each for each in self._members if each is not broken)
        async with session.post(f"http://127.0.0.1:{alive.own_port}/tokenize", json=asked) as answer:
            tokens = (await answer.json(content_type=None))["tokens"]
        whole = self._wholes[number].ids
        return "\ufffd" not in written and tuple(tokens) == whole[: len(tokens)]

    async def _judge(
        self, session: aiohttp.ClientSession, number: int, told: Told, word: str, is_canonical: bool
    ) -> None:
        whole = self._wholes[number]
        is_equal = replace(told, ids=()) == replace(whole, ids=())
        must = is_canonical or self._mode == "replay"
        if word in ("resumed", "finished", "") and not told.failed:
            outcome = "equal" if is_equal else "other text"
            outcome += "" if must or is_equal else ", told tokens differ"
            is_fault = must and not is_equal
        else:
            outcome = word or "not tried"
            if whole.thoughts and told.thoughts == whole.thoughts and whole.text and not told.text:
                outcome += " behind the last of its thoughts"
            is_fault = not told.failed or not told.begins(whole) or told.bill[1] == 0
        self.outcomes[outcome] += 1
        if is_fault:
            self.faults.append(
                f"{self._kind.name} {self._mode} behind event {self._fate.after}: {told} {word}; {whole}"
            )


async def played(kind: Kind, home: Path, breaks: int, modes: Sequence[str]) -> list[Run]:
    """Break streams of one engine in each mode."""
    fate, (server, *_) = Fate(), kind.engine.servers(home)
    members = [Member(server, home, fate) for _ in range(2)]
    async with AsyncExitStack() as stack:
        ups = [AsyncExitStack(), AsyncExitStack()]
        for member, up in zip(members, ups, strict=True):
            stack.push_async_callback(up.aclose)
            await up.enter_async_context(member.up())
            await stack.enter_async_context(await asyncio.start_server(member.relay, "127.0.0.1", member.port))
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="edge-")))
        first, second = (member.port for member in members)
        routes = [
            _POOL.format(mode=mode, first=first, second=second, engine=kind.engine.dialect, model=server.model)
            for mode in modes
        ]
        edge = await stack.enter_async_context(serving(directory, "".join(routes)))
        runs = [Run(kind, mode, edge, directory / "output", members, fate) for mode in modes]
        for run in runs:
            await run.play(breaks, ups)
    return runs


def main(words: Sequence[str] | None = None) -> int:
    """Break the streams; return the exit code."""
    parser = argparse.ArgumentParser(prog="tests.engines.dying", description="streams whose engine dies")
    names = [kind.name for kind in KINDS]
    parser.add_argument("--engine", action="extend", nargs="+", choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--mode", action="extend", nargs="+", choices=MODES, metavar="NAME", help=", ".join(MODES))
    parser.add_argument("--breaks", type=int, default=50, metavar="N", help="of each engine in each mode")
    parser.add_argument("--kills", type=int, metavar="N", help="of them; default all of llama.cpp's, else one")
    cache = os.environ.get("ENGINES_CACHE")
    parser.add_argument("--cache", default=cache, help="where engines are kept; default $ENGINES_CACHE, else nowhere")
    asked = parser.parse_args(words)
    modes = [mode for mode in MODES if not asked.mode or mode in asked.mode]
    faults: list[str] = []
    print("| engine | `resume` | broken | what became of them |\n| --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory(prefix="engines-") as temporary:
        for kind in KINDS:
            if asked.engine and kind.name not in asked.engine:
                continue
            home = installed(kind.engine, Path(asked.cache or temporary))
            kind = kind if asked.kills is None else replace(kind, kills=asked.kills)
            for run, mode in zip(asyncio.run(played(kind, home, asked.breaks, modes)), modes, strict=True):
                told = ", ".join(f"{count} {word}" for word, count in run.outcomes.most_common())
                print(f"| {kind.engine.title} | `{mode}` | {asked.breaks} | {told} |", flush=True)
                faults += run.faults
    for fault in faults:
        print(fault, file=sys.stderr)
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
