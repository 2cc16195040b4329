"""The model server of the benchmarks: bare protocols, paced streams, and events that tell when they were sent.

It costs a few microseconds an event, so that the rig is not what is measured; `edge simulate` is the one that behaves
like an engine. A request says what it wants by the text of a `Wish` anywhere near its body's beginning or end, since
gateways that re-encode a request keep its messages and drop members they do not know.
Run it with `python -m loadtest.upstream --port N`.
"""

import argparse
import asyncio
import gc
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Self, cast

import orjson
import uvloop

from loadtest.stamped import CHAT, DIALECTS, Dialect, chat_usage
from loadtest.stamped import DONE as DONE

EVENT_BYTES: Final = CHAT.event_bytes
event: Final = CHAT.event
read_event: Final = CHAT.read
_HEAD: Final = (
    b"HTTP/1.1 200 OK\r\ndate: Sun, 22 Nov 2026 17:00:00 GMT\r\nserver: uvicorn\r\n"
    b"content-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
)
_ANSWER: Final = orjson.dumps(
    {
        "id": "chatcmpl-6f1c0c7e8f0b4a5d9d1c",
        "object": "chat.completion",
        "created": 1_763_000_000,
        "model": "deepseek-ai/DeepSeek-R1",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hello there, I am a mock."},
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 12, "total_tokens": 20, "completion_tokens": 8},
    }
)
_MODELS: Final = orjson.dumps(
    {"object": "list", "data": [{"id": "public/deepseek-r1", "object": "model", "owned_by": "public"}]}
)
_PATHS: Final = {f"POST /v1/{name}".encode(): dialect for name, dialect in DIALECTS.items()}
_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*([0-9]+)", re.IGNORECASE)
_WISH = re.compile(rb"bench\(([0-9]+),([0-9.]+),([0-9.]+),([01])\)")
_LOOKED_AT_BYTES: Final = 4096  # of a body's two ends: searching 10 MB would cost as much as relaying them


@dataclass(frozen=True, slots=True)
class Wish:
    """How a stream is to come: how many events, how far apart, when first; `aligned`: on common ticks of the clock."""

    events: int = 20
    interval_ms: float = 20.0
    ttft_ms: float = 0.0
    aligned: bool = False

    def text(self) -> str:
        """Return what a request says to get it."""
        return f"bench({self.events},{self.interval_ms:.3f},{self.ttft_ms:.3f},{self.aligned:d})"

    @classmethod
    def of(cls, body: bytes) -> Self:
        """Return the wish that a body tells, or the usual one."""
        told = _WISH.search(body)
        return cls(int(told[1]), float(told[2]), float(told[3]), told[4] == b"1") if told else cls()


def usage_event(events: int) -> bytes:
    """Return the event before the last of a chat completion, which says how many tokens there were."""
    return chat_usage(events) + b"\n\n"


def _chunk(content: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(content), content)


def _json(body: bytes) -> bytes:
    head = b"HTTP/1.1 200 OK\r\nserver: uvicorn\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    return head % len(body) + body


class Ticks:
    """Calls everybody who waits at the same instant, every interval; for streams that fire together."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiting: dict[float, list[Callable[[], None]]] = {}

    def wait(self, interval_s: float, call: Callable[[], None]) -> None:
        """Call at the next multiple of `interval_s` of the loop's clock."""
        waiting = self._waiting.setdefault(interval_s, [])
        if not waiting:
            now = self._loop.time()
            self._loop.call_at((now // interval_s + 1) * interval_s, self._fire, interval_s)
        waiting.append(call)

    def _fire(self, interval_s: float) -> None:
        for call in self._waiting.pop(interval_s):
            call()


class Upstream(asyncio.Protocol):
    """One connection to the server."""

    def __init__(self, loop: asyncio.AbstractEventLoop, ticks: Ticks, aborts: list[int]) -> None:
        self._loop = loop
        self._ticks = ticks
        self._aborts = aborts
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._wish: Wish | None = None
        self._dialect: Dialect = CHAT
        self._sent = 0
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """Note when a stream's reader left."""
        self._transport = None
        if self._wish is not None:
            self._aborts.append(time.monotonic_ns())
            self._wish = None
        if self._timer is not None:
            self._timer.cancel()

    def data_received(self, data: bytes) -> None:
        """Answer every whole request."""
        self._buffer += data
        while self._transport is not None:
            end = self._buffer.find(b"\r\n\r\n")
            if end < 0:
                return
            head = bytes(self._buffer[:end])
            body_begin = end + 4
            if b"\r\ntransfer-encoding: chunked" in head.lower():
                # The framing counts for nothing here: what is looked for stands within one chunk.
                stop = self._buffer.find(b"0\r\n\r\n", max(body_begin, len(self._buffer) - len(data) - 5))
                if stop < 0:
                    return
                stop += 5
            else:
                length = _LENGTH.search(head)
                stop = body_begin + (int(length[1]) if length else 0)
                if len(self._buffer) < stop:
                    return
            body = bytes(self._buffer[body_begin : min(stop, body_begin + _LOOKED_AT_BYTES)])
            body += bytes(self._buffer[max(body_begin + len(body), stop - _LOOKED_AT_BYTES) : stop])
            del self._buffer[:stop]
            self._answer(head, body)

    def _answer(self, head: bytes, body: bytes) -> None:
        assert self._transport is not None
        if head.startswith(b"GET /aborts "):
            self._transport.write(_json(orjson.dumps(self._aborts)))
            self._aborts.clear()
            return
        if head.startswith(b"GET "):  # health checks and catalogues of routers
            self._transport.write(_json(_MODELS))
            return
        if not head.startswith(b"POST "):  # a router that tries HTTP/2
            self._transport.close()
            self._transport = None
            return
        if b'"stream":true' not in body and b'"stream": true' not in body:
            self._transport.write(_json(_ANSWER))
            return
        self._wish, self._sent = Wish.of(body), 0
        self._dialect = _PATHS.get(head.partition(b" HTTP/")[0].partition(b"?")[0], CHAT)
        self._transport.write(_HEAD)
        for each in self._dialect.opening:
            self._transport.write(_chunk(each + b"\n\n"))
        self._timer = self._loop.call_later(self._wish.ttft_ms / 1e3, self._next)

    def _next(self) -> None:
        wish, transport = self._wish, self._transport
        if wish is None or transport is None:
            return
        if self._sent < wish.events:
            transport.write(_chunk(self._dialect.event(self._sent, time.monotonic_ns())))
            self._sent += 1
            if wish.aligned:
                self._ticks.wait(wish.interval_ms / 1e3, self._next)
            else:
                self._timer = self._loop.call_later(wish.interval_ms / 1e3, self._next)
        else:
            self._wish = None
            last = b"".join(_chunk(each + b"\n\n") for each in self._dialect.closing(wish.events))
            transport.write(last + b"0\r\n\r\n")


async def serve(port: int) -> None:
    """Serve until cancelled; prints one line when it listens."""
    gc.freeze()
    gc.set_threshold(100_000)  # a collection in the middle of a stream would be a lag that no proxy made
    loop = asyncio.get_running_loop()
    ticks, aborts = Ticks(loop), list[int]()
    server = await loop.create_server(lambda: Upstream(loop, ticks, aborts), "127.0.0.1", port, backlog=65_535)
    print(f"listening on 127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


def main() -> None:
    """Run the server."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.upstream", description=__doc__)
    parser.add_argument("--port", type=int, default=9000)
    uvloop.run(serve(parser.parse_args().port))


if __name__ == "__main__":
    main()
