"""Asking a simulated model server, with every byte of its answers in sight."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import orjson

from edge.simulator.behaviour import Behaviour
from edge.simulator.server import Simulator

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
MESSAGES = "/v1/messages"
RESPONSES = "/v1/responses"
DIALECTS = ("vllm", "sglang", "llamacpp", "openai")


@asynccontextmanager
async def simulating(behaviour: Behaviour | None = None, **options: Any) -> AsyncIterator[Simulator]:
    """Run a simulator on a free port of the loopback address."""
    simulator = Simulator(behaviour, **options)
    await simulator.start()
    try:
        yield simulator
    finally:
        await simulator.close()


def request_bytes(
    body: dict[str, Any] | bytes, path: str = CHAT, version: str = "1.1", headers: str = "", method: str = "POST"
) -> bytes:
    data = body if isinstance(body, bytes) else orjson.dumps(body)
    content_type = "" if "content-type" in headers else "content-type: application/json\r\n"
    head = f"{method} {path} HTTP/{version}\r\nhost: x\r\n{content_type}content-length: {len(data)}\r\n"
    return (head + headers + "\r\n").encode() + data


class RawClient:
    """A connection on which every byte can be seen."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def ask(self, **body: Any) -> None:
        self.writer.write(request_bytes({"model": "m"} | body))

    async def head(self) -> tuple[bytes, dict[str, str]]:
        lines = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        return lines[0].encode(), dict(line.split(": ", 1) for line in lines[1:] if line)

    async def chunk(self) -> bytes:
        size = int(await self.reader.readuntil(b"\r\n"), 16)
        return (await self.reader.readexactly(size + 2))[:-2]

    async def chunks(self) -> list[bytes]:
        """Every chunk up to and without the last one."""
        found = []
        while data := await self.chunk():
            found.append(data)
        return found

    async def rest(self) -> bytes:
        return await self.reader.read()


@asynccontextmanager
async def raw(simulator: Simulator) -> AsyncIterator[RawClient]:
    reader, writer = await asyncio.open_connection("127.0.0.1", simulator.port)
    try:
        yield RawClient(reader, writer)
    finally:
        writer.transport.abort()


@dataclass(frozen=True)
class Answer:
    """A whole answer: its head, and a part of its body for each chunk; one if it has a length."""

    status: int
    headers: dict[str, str]
    chunks: list[bytes]

    @property
    def json(self) -> Any:
        return orjson.loads(b"".join(self.chunks))

    @property
    def error(self) -> Any:
        """The object of an error, which SGLang's documents are themselves."""
        return self.json.get("error", self.json)

    @property
    def events(self) -> list[dict[str, Any]]:
        """The JSON of every event with an object, in order."""
        lines = b"".join(self.chunks).splitlines()
        return [orjson.loads(line[6:]) for line in lines if line.startswith(b"data: {")]

    @property
    def text(self) -> str:
        return b"".join(self.chunks).decode()


async def ask(
    simulator: Simulator, body: dict[str, Any] | bytes, path: str = CHAT, headers: str = "", method: str = "POST"
) -> Answer:
    async with raw(simulator) as connection:
        connection.writer.write(request_bytes(body, path, headers=headers, method=method))
        line, found = await connection.head()
        lower = {name.lower(): value for name, value in found.items()}
        if "content-length" in lower:
            chunks = [await connection.reader.readexactly(int(lower["content-length"]))]
        else:
            chunks = await connection.chunks()
        return Answer(int(line.split()[1]), found, chunks)


async def asked(dialect: Any, body: dict[str, Any] | bytes, path: str = CHAT, **behaviour: Any) -> Answer:
    """Ask a simulator of its own."""
    async with simulating(Behaviour(dialect=dialect, **behaviour)) as simulator:
        return await ask(simulator, body, path)


def objects(chunks: list[bytes]) -> list[dict[str, Any]]:
    """Return the JSON of all frames but `[DONE]`."""
    return [orjson.loads(c.partition(b"data: ")[2]) for c in chunks if c != b"data: [DONE]\n\n"]


def compact(value: Any) -> str:
    """Return JSON with its members in their order."""
    return orjson.dumps(value).decode()
