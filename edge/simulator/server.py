"""A model server that only pretends: what stands in for an engine in tests, in `edge demo` and under load.

It speaks the APIs of vLLM, SGLang, llama.cpp or OpenAI with their framings, error shapes and usage, at a set pace, and
fails on request. No model runs; another `seed` in the request gives other ids.

A request steers its own answer by a `simulate` object in its JSON body (or a `simulate` part in a form) whose members
are fields of `Behaviour`: `{"model": "m", "messages": [], "simulate": {"fault": "cut", "after": 3}}`.

aiohttp parses what comes in. What goes out is written to the transport as it stands, since exact framing, resets and
cuts are the point: frames are built once per question and kept, and a stream costs one timer and one write per frame.
"""

import asyncio
import email.utils
import functools
import random
import signal
import socket
import ssl as tls
import struct
import time
import zlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from http.client import responses
from typing import Any, Final

import msgspec
import orjson
from aiohttp import BodyPartReader, MultipartReader, StreamReader, web
from aiohttp.abc import AbstractStreamWriter

from edge.simulator import dialects
from edge.simulator.dialects import Ask, Behaviour, Dialect, Framing, Refusal, Script

KEEPALIVE_TIMEOUT_S: Final = 5.0  # uvicorn's, and so vLLM's and SGLang's
_FLUSH_S: Final = 0.002
_RUBBISH: Final = b"\x16\x03\x01 this is no HTTP \xff\xfe\r\n\r\n"


@dataclass(slots=True)
class Record:
    """One request and what became of it.

    `path` is as on the wire, with its query. `outcome` is `open` while the answer runs, then `complete` (so are errors
    that nobody injected), `client_gone`, `closed` (by the simulator's own end) or the name of the injected fault.
    `status` is 0 when no status line was sent. `frames_sent` (running) and `tokens` (set at the end) count what was
    given to the transport. Times are seconds of the loop's clock.
    """

    method: str
    path: str
    headers: list[tuple[str, str]]
    started: float
    body: bytes = b""
    status: int = 0
    outcome: str = "open"
    frames_sent: int = 0
    tokens: int = 0
    ended: float = 0.0


class _Sent(web.StreamResponse):
    """Shows aiohttp that an answer is already on its way; it only has to keep or close the connection."""

    def __init__(self, *, keep_alive: bool) -> None:
        super().__init__()
        self._keep_alive = keep_alive

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        return None

    async def write_eof(self, data: bytes = b"") -> None:
        return None


_KEEP: Final = _Sent(keep_alive=True)
_CLOSE: Final = _Sent(keep_alive=False)


@dataclass(slots=True, eq=False)
class _Answer:
    """One script on its way to one client, driven by one timer."""

    _connection: "_Connection"
    _transport: asyncio.Transport
    _record: Record
    _script: Script
    _behaviour: Behaviour
    _tail: bytes
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    _ended: asyncio.Future[None] = field(init=False)
    _random: random.Random | None = None
    _timer: asyncio.TimerHandle | None = None
    _paused: bool = False
    _stop: int = 0  # how many frames are sent
    _due: float = 0.0

    def __post_init__(self) -> None:
        frames, behaviour = self._script.frames, self._behaviour
        self._ended = self._loop.create_future()
        self._stop = len(frames)
        if behaviour.fault in ("reset", "cut", "stall"):
            self._tail = (b"".join(frames[max(behaviour.after, 0) :]) + self._tail)[: behaviour.after_bytes]
            self._stop = min(self._stop, max(behaviour.after, 0))
        if behaviour.jitter:
            self._random = random.Random(zlib.crc32(self._record.body))

    async def send(self, head: bytes, delay_s: float) -> None:
        """Write the head of a stream now, the first frame after `delay_s`, the rest at its pace; return at the end.

        The head of an answer that is no stream goes with the body, for a server has to compute that first.
        """
        self._connection.answer = self
        self._due = self._loop.time() + delay_s
        if self._script.stream:
            self._transport.write(head)
            head = b""
        self._timer = self._loop.call_at(self._due, self._tick, head)
        try:
            await self._ended
        finally:
            self.stop()

    def stop(self) -> None:
        """Write no more."""
        self._connection.answer = None
        self._record.tokens = self._script.tokens_in(self._record.frames_sent)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def resume(self) -> None:
        """Go on after the client made room."""
        if self._paused:
            self._paused = False
            self._due = self._loop.time()
            self._tick()

    def _tick(self, head: bytes = b"") -> None:
        """Write every frame that is due, unless the client is behind."""
        record = self._record
        now = self._loop.time()
        if head:
            self._transport.write(head)
        while record.frames_sent < self._stop:
            if self._connection.writing_paused:
                self._paused = True
                return
            self._transport.write(self._script.frames[record.frames_sent])
            record.frames_sent += 1
            self._connection.simulator.changed()
            self._due += self._gap_s()
            if self._due > now and record.frames_sent < self._stop:
                self._timer = self._loop.call_at(self._due, self._tick)
                return
        self._finish()

    def _gap_s(self) -> float:
        varied = self._behaviour.jitter * self._random.uniform(-1, 1) if self._random is not None else 0
        return self._behaviour.interval_ms / 1000 * (1 + varied)

    def _finish(self) -> None:
        self._timer = None
        if self._tail:
            self._transport.write(self._tail)
        if self._behaviour.fault == "reset":
            self._timer = self._loop.call_later(_FLUSH_S, self._reset)
        elif self._behaviour.fault != "stall":
            self._end()

    def _end(self) -> None:
        self._record.outcome = self._behaviour.fault or "complete"
        if not self._ended.done():
            self._ended.set_result(None)

    def _reset(self) -> None:
        """End the connection by RST, once what was written has left: `abort` would drop it.

        No event says so; and uvloop writes at the end of its turn, until when its buffer looks empty.
        """
        if self._transport.get_write_buffer_size():
            self._timer = self._loop.call_later(_FLUSH_S, self._reset)
            return
        self._end()
        sock = self._transport.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._transport.abort()


class _Connection(web.RequestHandler):
    """One client's connection: aiohttp's, which also stops and resumes the answer on it."""

    __slots__ = ("answer", "simulator")

    def __init__(self, simulator: "Simulator", server: web.Server, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(
            server,
            loop=loop,
            keepalive_timeout=simulator.keepalive_timeout_s,
            access_log=None,  # type: ignore[arg-type]  # aiohttp takes None for no log, its annotation does not
            auto_decompress=False,
            max_line_size=65_536,
            max_field_size=65_536,
        )
        self.simulator = simulator
        self.answer: _Answer | None = None

    async def start(self) -> None:
        self.simulator.open_connections.add(self)
        self.simulator.changed()
        try:
            await super().start()
        finally:
            self.simulator.open_connections.discard(self)
            self.simulator.changed()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.answer is not None:
            self.answer.resume()

    def eof_received(self) -> None:
        if self.answer is not None and self.transport is not None:
            self.transport.abort()  # else a full buffer keeps the connection for as long as nobody reads it

    def connection_lost(self, exc: BaseException | None) -> None:
        if self.answer is not None:
            self.answer.stop()
        super().connection_lost(exc)


class Simulator:
    """A model server on one listening socket.

    `behaviour` and `healthy` (else `/health` is 503) may be changed at any time and hold for later requests.
    `requests` keeps the last `keep_requests` records, bodies included; under load, keep none.
    `active` counts requests that are being answered.
    """

    def __init__(
        self,
        behaviour: Behaviour | None = None,
        *,
        keepalive_timeout_s: float = KEEPALIVE_TIMEOUT_S,
        keep_requests: int = 1_000,
    ) -> None:
        self.behaviour = behaviour or Behaviour()
        self.healthy = True
        self.keepalive_timeout_s = keepalive_timeout_s
        self.requests: deque[Record] = deque(maxlen=keep_requests)
        self.active = 0
        self.open_connections: set[_Connection] = set()
        self._waiters: list[tuple[Callable[[], object], asyncio.Future[None]]] = []
        self._listener: asyncio.Server | None = None
        self._scheme = "http"
        self._closing = False

    @property
    def connections(self) -> int:
        """How many connections are open."""
        return len(self.open_connections)

    @property
    def port(self) -> int:
        """The port that is listened on."""
        return int(self._address()[1])

    @property
    def url(self) -> str:
        """The base URL, without a path."""
        host, port = self._address()[:2]
        return f"{self._scheme}://[{host}]:{port}" if ":" in host else f"{self._scheme}://{host}:{port}"

    def _address(self) -> tuple[Any, ...]:
        if self._listener is None or not self._listener.sockets:
            raise RuntimeError("the simulator does not listen: await start() first")
        address: tuple[Any, ...] = self._listener.sockets[0].getsockname()
        return address

    async def start(
        self,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        sock: socket.socket | None = None,
        ssl: tls.SSLContext | None = None,
    ) -> None:
        """Listen on `host` and `port` (0: any free one), or on `sock`; with `ssl`, speak TLS.

        Raises: `OSError` when the address is taken or not ours.
        """
        loop = asyncio.get_running_loop()
        request = functools.partial(web.BaseRequest, loop=loop, client_max_size=dialects.MAX_BODY_BYTES)
        server = web.Server(self._handle, request_factory=request, handler_cancellation=True)
        where: dict[str, Any] = {"host": host, "port": port} if sock is None else {"sock": sock}
        self._closing = False
        self._scheme = "https" if ssl else "http"
        self._listener = await loop.create_server(
            lambda: _Connection(self, server, loop),
            **where,
            ssl=ssl,
            backlog=65_535,  # the kernel lowers it to net.core.somaxconn
        )

    async def close(self) -> None:
        """Stop listening and drop every connection."""
        if self._listener is None:
            return
        self._closing = True
        self._listener.close()
        for connection in self.open_connections:
            if connection.transport is not None:
                connection.transport.abort()
        await self.wait_for(lambda: not self.open_connections)
        await self._listener.wait_closed()
        self._listener = None

    async def wait_for(self, predicate: Callable[[], object]) -> None:
        """Return when `predicate()` holds; it is asked again whenever a request, frame or connection comes or ends."""
        if predicate():
            return
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (predicate, waiter)
        self._waiters.append(entry)
        try:
            await waiter
        finally:
            self._waiters.remove(entry)

    def changed(self) -> None:
        """Ask the predicates that are waited for."""
        for predicate, waiter in self._waiters:
            if not waiter.done():
                try:
                    if predicate():
                        waiter.set_result(None)
                except Exception as error:  # the waiter's mistake, not the request's that happens to run
                    waiter.set_exception(error)

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        loop = asyncio.get_running_loop()
        record = Record(request.method, request.raw_path, list(request.headers.items()), loop.time())
        self.requests.append(record)
        self.active += 1
        self.changed()
        try:
            return await self._answer(request, record)
        except ConnectionError:
            return _CLOSE
        finally:
            if record.outcome == "open":
                record.outcome = "closed" if self._closing else "client_gone"
            record.ended = loop.time()
            self.active -= 1
            self.changed()

    async def _answer(self, request: web.BaseRequest, record: Record) -> web.StreamResponse:
        if request.headers.get("expect", "").lower() == "100-continue" and request.transport is not None:
            request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        behaviour = self.behaviour
        delay_s = 0.0
        try:
            record.body = await _read(request)
            self.changed()
            if request.method == "POST" and request.rel_url.raw_path in dialects.POSTS:
                ask = await _asked(request, record.body, behaviour)
                behaviour = behaviour.steered(ask.simulate)
                chunked = _framing(request, behaviour, stream=True) == "chunked"
                script = dialects.script_of(request.rel_url.raw_path, ask, behaviour, chunked=chunked)
                tokens = 0 if script.stream else script.tokens
                delay_s = (behaviour.ttft_ms + behaviour.interval_ms * tokens) / 1000
            else:
                script, behaviour = self._unsteered(request), Behaviour()
        except Refusal as refusal:
            document = dialects.error_document(behaviour.dialect, refusal.status, refusal.message, refusal.param)
            script, behaviour = dialects.document_script(document, status=refusal.status), Behaviour()
        return await self._send(request, record, script, behaviour, delay_s)

    def _unsteered(self, request: web.BaseRequest) -> Script:
        """Return the answer to what is no question to a model: no pace, no faults."""
        match request.method, request.rel_url.raw_path:
            case "GET", "/health":
                return Script("text/plain; charset=utf-8", (b"",), status=200 if self.healthy else 503)
            case "GET", "/v1/models":
                return dialects.document_script(dialects.models_document(self.behaviour))
            case _, path if path in dialects.POSTS or path in dialects.GETS:
                return dialects.document_script({"detail": "Method Not Allowed"}, status=405)
            case _:
                return dialects.document_script({"detail": "Not Found"}, status=404)

    async def _send(
        self, request: web.BaseRequest, record: Record, script: Script, behaviour: Behaviour, delay_s: float
    ) -> web.StreamResponse:
        connection, transport = request.protocol, request.transport
        assert isinstance(connection, _Connection)
        if transport is None:
            return _CLOSE
        framing = _framing(request, behaviour, stream=script.stream)
        keep = request.keep_alive and framing != "close" and behaviour.fault not in ("cut", "reset", "rubbish")
        head = _head(script, framing, self.behaviour.dialect, close=not request.keep_alive or framing == "close")
        tail = b"0\r\n\r\n" if framing == "chunked" else b""
        if framing == "chunked" and not script.stream:
            script = replace(script, frames=(b"".join((*map(dialects.http_chunk, filter(None, script.frames)), tail)),))
            tail = b""
        if request.method == "HEAD":  # which has no body (RFC 9110 section 9.3.2)
            script, tail = Script(script.content_type, (), status=script.status), b""
        elif behaviour.fault == "rubbish":
            head, script, tail = b"", Script("", (_RUBBISH,), status=0), b""
        elif behaviour.fault in ("cut", "reset", "stall") and behaviour.after < 0:
            head, script, tail = b"", Script("", (), status=0), b""
        if behaviour.fault == "stall" and _is_whole(script, framing, behaviour, tail):
            behaviour = replace(behaviour, fault=None)
        record.status = script.status
        await _Answer(connection, transport, record, script, behaviour, tail).send(head, delay_s)
        return _KEEP if keep else _CLOSE


async def _read(request: web.BaseRequest) -> bytes:
    try:
        return await request.read()
    except web.HTTPRequestEntityTooLarge:
        raise Refusal(413, f"The request is over {dialects.MAX_BODY_BYTES} bytes.") from None


async def _asked(request: web.BaseRequest, body: bytes, behaviour: Behaviour) -> Ask:
    """Read what a body asks for.

    Raises: `Refusal` when the body is not what this path takes; vLLM and SGLang check its content type too.
    """
    if request.rel_url.raw_path in dialects.FORMS:
        return await _asked_in_form(request, body)
    if behaviour.dialect in dialects.FASTAPI and request.content_type != "application/json":
        raise Refusal(400, "Unsupported Media Type: Only 'application/json' is allowed")
    try:
        return dialects.decode_ask(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Refusal(400, f"The body cannot be read: {error}") from None


async def _asked_in_form(request: web.BaseRequest, body: bytes) -> Ask:
    if request.content_type != "multipart/form-data":
        raise Refusal(400, "This path takes multipart/form-data.")
    # The reader wants a stream; a limit above any body keeps it from pausing the connection.
    stream = StreamReader(request.protocol, dialects.MAX_BODY_BYTES, loop=asyncio.get_running_loop())
    stream.feed_data(body)
    stream.feed_eof()
    form: dict[str, Any] = {}
    try:
        async for part in MultipartReader(request.headers, stream):
            if isinstance(part, BodyPartReader) and part.name and part.filename is None:
                form[part.name] = await part.text()
        if "simulate" in form:
            form["simulate"] = orjson.loads(form["simulate"])
        return msgspec.convert(
            {name: form[name] for name in ("model", "n", "simulate") if name in form}, Ask, strict=False
        )
    except ValueError as error:
        raise Refusal(400, f"The form cannot be read: {error}") from None


def _framing(request: web.BaseRequest, behaviour: Behaviour, *, stream: bool) -> Framing:
    wanted = behaviour.framing or ("chunked" if stream else "length")
    return "close" if wanted == "chunked" and request.version < (1, 1) else wanted  # RFC 9112 section 7.1


def _head(script: Script, framing: Framing, dialect: Dialect, *, close: bool) -> bytes:
    """Return the head of an answer, with the names and in the order of uvicorn."""
    lines = [
        f"HTTP/1.1 {script.status} {responses.get(script.status, '')}",
        f"date: {_date(int(time.time()))}",
        "server: uvicorn",
        f"content-type: {script.content_type}",
    ]
    if framing == "chunked":
        lines.append("transfer-encoding: chunked")
    elif framing == "length":
        lines.append(f"content-length: {sum(map(len, script.frames))}")
    lines += dialects.HEADERS.get(dialect, ())
    if close:
        lines.append("connection: close")
    return "\r\n".join((*lines, "\r\n")).encode()


def _is_whole(script: Script, framing: Framing, behaviour: Behaviour, tail: bytes) -> bool:
    """Return whether a client has its whole answer before a fault: a stall would hang the next request, not this."""
    if behaviour.after < 0 or framing == "close":
        return False
    return sum(map(len, script.frames[behaviour.after :])) + len(tail) <= behaviour.after_bytes


@functools.lru_cache(maxsize=2)
def _date(unix_s: int) -> str:
    return email.utils.formatdate(unix_s, usegmt=True)


async def run(listen_host: str, listen_port: int, behaviour: Behaviour) -> None:
    """Play a model server until SIGINT or SIGTERM.

    Raises: `OSError` when the address is taken or not ours.
    """
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopped.set)
    simulator = Simulator(behaviour, keep_requests=0)
    await simulator.start(listen_host, listen_port)
    try:
        print(f"simulating {behaviour.dialect} on {simulator.url}/v1", flush=True)
        await stopped.wait()
    finally:
        await simulator.close()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
