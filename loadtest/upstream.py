"""The model server of the benchmarks: bare protocols, paced streams, and events that tell when they were sent.

It costs a few microseconds an event, so that the rig is not what is measured; `edge simulate` is the one that behaves
like an engine. A request says in its body what it wants, under `bench`; nothing else of the body is read.
Run it with `python -m loadtest.upstream --port N`.
"""

import argparse
import asyncio
import re
import time
from collections.abc import Callable
from typing import Final, cast

import msgspec
import orjson
import uvloop

EVENT_BYTES: Final = 230  # of a token's event as vLLM sends it, its end included
_BEFORE_NUMBER: Final = b'data: {"id":"chatcmpl-6f1c0c7e8f0b4a5d9d1c","object":"chat.completion.chunk","n":'
_BEFORE_TIME: Final = b',"t":'
_AFTER_TIME: Final = (
    b',"model":"deepseek-ai/DeepSeek-R1","choices":[{"index":0,"delta":{"content":" token"},"finish_reason":null}]'
)
_NUMBER_DIGITS: Final = 8
_TIME_DIGITS: Final = 20
DONE: Final = b"data: [DONE]"
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
_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*([0-9]+)", re.IGNORECASE)


class Wish(msgspec.Struct):
    """How an answer is to come: how many events, how far apart, when first; `aligned`: on common ticks of the clock."""

    events: int = 20
    interval_ms: float = 20.0
    ttft_ms: float = 0.0
    aligned: bool = False


class _Asked(msgspec.Struct):
    stream: bool | None = None
    bench: Wish = msgspec.field(default_factory=Wish)


_asked = msgspec.json.Decoder(_Asked)
_PADDING: Final = b" " * (
    EVENT_BYTES
    - len(_BEFORE_NUMBER + _BEFORE_TIME + _AFTER_TIME)
    - _NUMBER_DIGITS
    - _TIME_DIGITS
    - len(b"}\n\n")
)  # fmt: skip


def event(number: int, sent_ns: int) -> bytes:
    """Return the event of the token `number` (from 0), sent at the monotonic time `sent_ns`; always as long."""
    return b"%b%*d%b%*d%b%b}\n\n" % (
        _BEFORE_NUMBER, _NUMBER_DIGITS, number, _BEFORE_TIME, _TIME_DIGITS, sent_ns, _AFTER_TIME, _PADDING,
    )  # fmt: skip


def read_event(event: bytes) -> tuple[int, int]:
    """Return the number and the time of an event without its end; raises `ValueError` unless every byte is right."""
    at = len(_BEFORE_NUMBER) + _NUMBER_DIGITS
    after = at + len(_BEFORE_TIME) + _TIME_DIGITS
    right = (
        len(event) == EVENT_BYTES - 2
        and event.startswith(_BEFORE_NUMBER)
        and event.startswith(_BEFORE_TIME, at)
        and event.startswith(_AFTER_TIME + _PADDING + b"}", after)
    )
    if not right:
        raise ValueError("an event differs from what was sent")
    return int(event[len(_BEFORE_NUMBER) : at]), int(event[at + len(_BEFORE_TIME) : after])


def usage_event(events: int) -> bytes:
    """Return the event before the last, which says how many tokens there were."""
    usage = {"prompt_tokens": 12, "total_tokens": 12 + events, "completion_tokens": events}
    return b'data: {"choices":[],"usage":%b}\n\n' % orjson.dumps(usage)


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
                stop = self._buffer.find(b"0\r\n\r\n", body_begin)
                if stop < 0:
                    return
                body, stop = _dechunked(bytes(self._buffer[body_begin:stop])), stop + 5
            else:
                length = _LENGTH.search(head)
                stop = body_begin + (int(length[1]) if length else 0)
                if len(self._buffer) < stop:
                    return
                body = bytes(self._buffer[body_begin:stop])
            del self._buffer[:stop]
            self._answer(head, body)

    def _answer(self, head: bytes, body: bytes) -> None:
        assert self._transport is not None
        if not head.startswith(b"POST"):
            path = head.split(b" ", 2)[1]
            if path == b"/aborts":
                self._transport.write(_json(orjson.dumps(self._aborts)))
                self._aborts.clear()
            else:  # health checks and catalogues of routers
                self._transport.write(_json(_MODELS))
            return
        try:
            asked = _asked.decode(body)
        except msgspec.DecodeError:
            asked = _Asked(b'"stream":true' in body or b'"stream": true' in body)
        if not asked.stream:
            self._transport.write(_json(_ANSWER))
            return
        self._wish, self._sent = asked.bench, 0
        self._transport.write(_HEAD)
        self._timer = self._loop.call_later(asked.bench.ttft_ms / 1e3, self._next)

    def _next(self) -> None:
        wish, transport = self._wish, self._transport
        if wish is None or transport is None:
            return
        if self._sent < wish.events:
            transport.write(_chunk(event(self._sent, time.monotonic_ns())))
            self._sent += 1
            if wish.aligned:
                self._ticks.wait(wish.interval_ms / 1e3, self._next)
            else:
                self._timer = self._loop.call_later(wish.interval_ms / 1e3, self._next)
        else:
            self._wish = None
            transport.write(_chunk(usage_event(wish.events)) + _chunk(DONE + b"\n\n") + b"0\r\n\r\n")


def _dechunked(body: bytes) -> bytes:
    parts = []
    while body:
        line, _, rest = body.partition(b"\r\n")
        size = int(line, 16)
        parts.append(rest[:size])
        body = rest[size + 2 :]
    return b"".join(parts)


async def serve(port: int) -> None:
    """Serve until cancelled; prints one line when it listens."""
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
