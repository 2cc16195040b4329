"""Mixed traffic against several edges: every generating API, streams and documents, clients that leave or dawdle.

Each request has an id of its own, as its `X-Request-Id` and in its prompt, so that a simulated engine that reads the
prompt and a record of the edge can be brought together.
"""

import asyncio
import contextlib
import random
import re
import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import orjson

from loadtest.chaos.ledger import Asked
from loadtest.client import Address, Client, Connections
from loadtest.workload import raw_request

PATHS: Final = ("chat", "completions", "messages", "responses")
MODELS: Final = {"public/v": "vllm", "public/s": "sglang", "public/l": "llamacpp"}
ID: Final = re.compile(rb"\[([a-z]+-[0-9]+)\]")
_PATIENCE_S: Final = 30.0  # of a client: far beyond every timeout of the edge
_AWAY_S: Final = 0.1  # between two tries while nobody answers
_COUNTED: Final = ("chat", "completions")  # of a model whose text depends on the prompt
_COUNTING: Final = "public/v"
_CHOSEN: Final[tuple[dict[str, Any], ...]] = ({}, {"temperature": 0}, {"temperature": 0}, {"seed": 7})
FAULTS: Final = 0.12  # shares of the requests
_ONCE: Final = 0.5  # of the faults: another engine does not have it
_ABORTS, _SLOW = 0.15, 0.02
_SLOW_TOKENS: Final = 8_000  # some 2 MB, which no socket buffer holds
_LAST: Final = re.compile(rb'"type": ?"(?:message_stop|response\.completed|response\.incomplete)"')
_USAGE: Final = re.compile(rb'"(?:completion|output)_tokens": ?([0-9]+)')
_ERROR: Final = re.compile(rb'"error": ?[{"]|"type": ?"(?:error|response\.failed)"')


@dataclass(slots=True)
class _Seen:
    """Reads one answer: whether it came to its last event, an error in it, and the usage that it told last."""

    is_last: bool = False
    is_error: bool = False
    told_tokens: int | None = None

    def event(self, event: bytes, now: float) -> None:
        """Take an event of a stream."""
        self.is_last = self.is_last or b"[DONE]" in event or _LAST.search(event) is not None
        self._read(event)

    def body(self, body: bytes) -> None:
        """Take the body of an answer that is no stream."""
        self.is_last = True
        self._read(body)

    def _read(self, text: bytes) -> None:
        if _ERROR.search(text) is not None and b'"error":null' not in text:
            self.is_error = True
        if b'"usage"' in text and (found := _USAGE.findall(text)):
            self.told_tokens = int(found[-1])


@dataclass(slots=True)
class Plan:
    """One request as it is drawn: where it goes, what it asks, and what its client does.

    `chosen` is how the model chooses its words.
    """

    path: str
    model: str
    stream: bool
    tokens: int
    choices: int
    prompt_tokens: int
    simulate: dict[str, Any]
    chosen: dict[str, Any]

    def body(self, request_id: str) -> bytes:
        """Return the JSON body."""
        text = f"[{request_id}] and some words to read before the answer"
        body: dict[str, Any] = {"model": self.model, "stream": self.stream, "simulate": self.simulate}
        body |= self.chosen
        if "once" in self.simulate:
            body["simulate"] = self.simulate | {"once": request_id}
        limit = "max_output_tokens" if self.path == "responses" else "max_tokens"
        body[limit] = self.tokens
        if self.choices > 1:
            body["n"] = self.choices
        if self.path == "completions":
            body["prompt"] = text
        elif self.path == "responses":
            body["input"] = text
        else:
            body["messages"] = [{"role": "user", "content": text}]
        return orjson.dumps(body)


def draw(chance: random.Random, faults: float = FAULTS) -> Plan:
    """Draw a request; `faults` is the share of those with a fault that an engine has by itself."""
    path, model = chance.choice(PATHS), chance.choice(list(MODELS))
    tokens, prompt_tokens = chance.randrange(1, 60), chance.randrange(1, 500)
    simulate: dict[str, Any] = {"tokens": tokens, "prompt_tokens": prompt_tokens}
    simulate |= {"interval_ms": chance.choice((0, 2, 10)), "ttft_ms": chance.choice((0, 0, 20, 100))}
    if chance.random() < faults:
        after = chance.randrange(-1, tokens)
        possible: tuple[dict[str, Any], ...] = (
            {"fault": "cut", "after": after},
            {"fault": "reset", "after": after},
            {"fault": "stall", "after": after},
            {"fault": "error_mid", "after": max(after, 0)},
            {"fault": "error_first"},
            {"fault": "error", "status": chance.choice((400, 500, 503))},
        )
        simulate |= chance.choice(possible)
        if chance.random() < _ONCE:
            simulate["once"] = ""  # the request's own id, which nobody has yet
    choices = 2 if path == "chat" and model != "public/l" and chance.random() < 0.1 else 1
    chosen = chance.choice(_CHOSEN) if path in _COUNTED else {}
    return Plan(path, model, chance.random() < 0.7, tokens, choices, prompt_tokens, simulate, chosen)


class Traffic:
    """Clients in closed loops, each over kept connections; `asked` holds every request by its id."""

    def __init__(
        self,
        edges: Mapping[str, tuple[int, str]],
        clients: int,
        seed: int,
        most: int | None,
        restarted: Sequence[str] = (),
        faults: float = FAULTS,
    ) -> None:
        """Begin; `edges` gives the port and the key of each, `most` is how many requests are made at most.

        At one that is `restarted` a request may wait in the kernel until somebody takes it.
        """
        self._restarted = restarted
        self._faults = faults
        self.asked: dict[str, Asked] = {}
        self.statuses: Counter[str] = Counter()
        self.is_over = asyncio.Event()
        self._open = asyncio.Event()
        self._open.set()
        self._live = 0
        self._quiet = asyncio.Event()
        self._edges = edges
        self._most = most
        self._next = 0
        self._connections = {name: Connections(Address("127.0.0.1", port)) for name, (port, _) in edges.items()}
        loop, names = asyncio.get_running_loop(), list(edges)
        self._tasks = [
            loop.create_task(self._client(names[number % len(names)], random.Random(f"{seed} {number}")))
            for number in range(clients)
        ]

    async def rest(self) -> None:
        """Let each client have its answer, and wait; return when nothing runs."""
        self._open.clear()
        self._quiet.clear()
        if self._live:
            await self._quiet.wait()

    def go_on(self) -> None:
        """End a rest."""
        self._open.set()

    async def end(self) -> None:
        """Let each client have its answer, and stop."""
        self.is_over.set()
        self.go_on()
        await asyncio.gather(*self._tasks)
        for each in self._connections.values():
            each.close()

    async def _client(self, name: str, chance: random.Random) -> None:
        while not self.is_over.is_set():
            await self._open.wait()
            if self._most is not None and len(self.asked) >= self._most:
                self.is_over.set()
                return
            plan = draw(chance, self._faults)
            is_slow = chance.random() < _SLOW
            if is_slow:
                simulate = {"tokens": _SLOW_TOKENS, "prompt_tokens": 12}
                plan = Plan("chat", plan.model, True, _SLOW_TOKENS, 1, 12, simulate, {})
            self._next += 1
            request_id = f"chaos-{self._next}"
            allowed = plan.tokens * plan.choices
            known = 0 if plan.path in _COUNTED and plan.model == _COUNTING else plan.prompt_tokens
            asked = Asked(request_id, name, plan.path, plan.stream, allowed, known)
            self.asked[request_id] = asked
            raw = raw_request(
                plan.path,
                plan.body(request_id),
                host="127.0.0.1",
                key=self._edges[name][1],
                headers={"X-Request-Id": request_id},
            )
            self._live += 1
            try:
                await (self._dawdle(asked, raw, chance) if is_slow else self._ask(asked, raw, chance))
            finally:  # else a client that fails would hold up every rest
                self._live -= 1
                if not self._live:
                    self._quiet.set()
            if asked.status == 0 and asked.fate == "read":
                await asyncio.sleep(_AWAY_S)
            elif asked.status == 503:
                await asyncio.sleep(_AWAY_S / 2)

    async def _ask(self, asked: Asked, raw: bytes, chance: random.Random) -> None:
        seen, timers = _Seen(), list[asyncio.TimerHandle]()

        def begun(client: Client) -> None:
            if chance.random() < _ABORTS:
                asked.fate = "aborted"
                loop = asyncio.get_running_loop()
                timers.append(loop.call_later(chance.choice((0.0, 0.3)) * chance.random(), client.abort))

        sample = await self._connections[asked.edge].request(raw, seen, begun=begun, timeout_s=_PATIENCE_S)
        for timer in timers:
            timer.cancel()
        asked.status = sample.status
        asked.is_whole = sample.ok and seen.is_last and not seen.is_error
        asked.told_tokens = seen.told_tokens if asked.is_whole else None
        late = "no whole answer within" in sample.error
        asked.is_hung = late and (sample.status != 0 or asked.edge not in self._restarted)
        self.statuses["late" if late else str(sample.status) if sample.status else "no answer"] += 1

    async def _dawdle(self, asked: Asked, raw: bytes, chance: random.Random) -> None:
        """Send a request in pieces, and read its long answer slowly, to the end or until patience ends."""
        asked.fate = "slow"
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
        sock.setblocking(False)
        data, patience_s = b"", chance.uniform(0.5, 6.0)
        try:
            async with asyncio.timeout(_PATIENCE_S):
                await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", self._edges[asked.edge][0]))
                reader, writer = await asyncio.open_connection(sock=sock, limit=8192)
                for piece in _pieces(raw, chance):
                    writer.write(piece)
                    await asyncio.sleep(chance.random() * 0.05)
                begun = asyncio.get_running_loop().time()
                while piece := await reader.read(chance.randrange(1, 65_536)):
                    asked.status = asked.status or int(piece[9:12])
                    data = (data + piece)[-64:]
                    if data.endswith(b"\r\n0\r\n\r\n"):
                        break
                    if asyncio.get_running_loop().time() - begun > patience_s:
                        break
                    await asyncio.sleep(chance.random() * 0.05)
                writer.transport.abort()
        except (OSError, RuntimeError, TimeoutError, ValueError):  # uvloop: a write to a connection that was closed
            with contextlib.suppress(OSError):
                sock.close()
        asked.is_whole = asked.status == 200 and b"data: [DONE]" in data and data.endswith(b"\r\n0\r\n\r\n")
        self.statuses["slow"] += 1


def _pieces(raw: bytes, chance: random.Random) -> Sequence[bytes]:
    cuts = sorted(chance.sample(range(1, len(raw)), 4))
    return [raw[first:last] for first, last in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
