"""A model server that only pretends: what stands in for an engine in tests, in `edge demo` and under load.

It speaks the APIs of vLLM, SGLang, llama.cpp or OpenAI with their heads, framings, errors and usage, at a set pace, and
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
import uuid
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

from edge.simulator import behaviour as words
from edge.simulator import dialects, errors, questions, validation
from edge.simulator.behaviour import Behaviour, Dialect, Framing, Refusal
from edge.simulator.memory import Memory, Prefill, comes_first
from edge.simulator.questions import Ask, ask_of
from edge.simulator.scripts import Script, http_chunk
from edge.simulator.speaking import counted

KEEPALIVE_TIMEOUT_S: Final = 5.0  # uvicorn's, and so vLLM's and SGLang's; llama.cpp's too
_LLAMACPP_KEPT: Final = 100  # requests on one connection
_PING: Final = b":\n\n"
_FORM: Final = "This path takes multipart/form-data."
_FLUSH_S: Final = 0.002
_RUBBISH: Final = b"\x16\x03\x01 this is no HTTP \xff\xfe\r\n\r\n"


@dataclass(slots=True)
class Record:
    """One request and what became of it.

    `path` is as on the wire, with its query. `outcome` is `open` while the answer runs, then `complete` (so are errors
    that nobody injected), `client_gone`, `closed` (by the simulator's own end) or the name of the injected fault.
    `status` is 0 when no status line was sent. `frames_sent` (running) and `tokens` (set at the end) count what was
    given to the transport. Times are seconds of the loop's clock. `read_s` is how long the prompt waited and was read,
    as the engine reckons it: no stall of the machine blurs it.
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
    prompt_tokens: int = 0
    cached_tokens: int = 0
    read_s: float = 0.0


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
    _decodes: bool = False
    _stop: int = 0  # how many frames are sent
    _due: float = 0.0
    _ping: bytes = b""  # what llama.cpp sends when a stream is silent

    def __post_init__(self) -> None:
        frames, behaviour = self._script.frames, self._behaviour
        self._ended = self._loop.create_future()
        self._stop = len(frames)
        if behaviour.fault in ("reset", "cut", "stall"):
            self._tail = (b"".join(frames[max(behaviour.after, 0) :]) + self._tail)[: behaviour.after_bytes]
            self._stop = min(self._stop, max(behaviour.after, 0))
        if behaviour.jitter:
            self._random = random.Random(zlib.crc32(self._record.body))
        if behaviour.dialect == "llamacpp" and self._script.stream:
            self._ping = http_chunk(_PING) if self._tail.endswith(b"0\r\n\r\n") else _PING

    async def send(self, head: bytes, delay_s: float) -> None:
        """Write the head of a stream now, the first frame after `delay_s`, the rest at its pace; return at the end.

        The head of an answer that is no stream goes with the body, for a server has to compute that first.
        """
        self._connection.answer = self
        self._due = self._loop.time() + delay_s
        if self._script.stream:
            self._transport.write(head)
            head = b""
        if self._ping:
            self._wait()
        else:
            self._timer = self._loop.call_at(self._due, self._tick, head)
        try:
            await self._ended
        finally:
            self.stop()

    def stop(self) -> None:
        """Write no more."""
        self._connection.answer = None
        self._connection.simulator.decoding -= self._decodes
        self._decodes = False
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
        if not self._decodes:
            self._decodes = True
            self._connection.simulator.decoding += 1
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
                if self._ping:
                    self._wait()
                else:
                    self._timer = self._loop.call_at(self._due, self._tick)
                return
        self._finish()

    def _wait(self) -> None:
        """Wait for the next frame of a stream of llama.cpp, with a comment after each `ping_ms` of silence."""
        ping = self._loop.time() + self._behaviour.ping_ms / 1000
        if ping < self._due:
            self._timer = self._loop.call_at(ping, self._say_ping)
        else:
            self._timer = self._loop.call_at(self._due, self._tick)

    def _say_ping(self) -> None:
        if not self._connection.writing_paused:
            self._transport.write(self._ping)
        self._wait()

    def _gap_s(self) -> float:
        varied = self._behaviour.jitter * self._random.uniform(-1, 1) if self._random is not None else 0
        return self._connection.simulator.interval_ms(self._behaviour) / 1000 * (1 + varied)

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

    __slots__ = ("answer", "answered", "simulator")

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
        self.answered = 0

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
    `active` counts requests that are being answered, `decoding` those of which a frame was sent.
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
        self.decoding = 0
        self.forget()
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
        request = functools.partial(web.BaseRequest, loop=loop, client_max_size=words.MAX_BODY_BYTES)
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
        behaviour, path = self.behaviour, request.rel_url.raw_path
        injected, delay_s = Behaviour(dialect=behaviour.dialect), 0.0
        try:
            record.body = await _read(request)
            self.changed()
            if request.method == "POST" and path in dialects.POSTS:
                ask = await _asked(request, record.body, behaviour)
                injected = behaviour = counted(path, ask, behaviour.steered(ask.simulate))
                if behaviour.once and path in questions.TEXTS and not comes_first(behaviour.once):
                    injected = behaviour = replace(behaviour, fault=None)
                script = self._question(request, ask, behaviour)
                delay_s = self._delay_s(record, script, behaviour)
            else:
                script = dialects.get_script(request.method, path, behaviour, self._memory, healthy=self.healthy)
        except Refusal as refused:
            missing = dialects.absent(path, behaviour) if path in dialects.POSTS else None
            script = missing or errors.refusal(behaviour.dialect, path, refused)
            injected = Behaviour(dialect=behaviour.dialect)
        return await self._send(request, record, script, injected, delay_s)

    def _delay_s(self, record: Record, script: Script, behaviour: Behaviour) -> float:
        """Return how long the first frame takes; without a stream that is the whole answer."""
        record.prompt_tokens, record.cached_tokens = script.prompt_tokens, script.cached_tokens
        if behaviour.prefill_rate:
            now = asyncio.get_running_loop().time()
            new = script.prompt_tokens - script.cached_tokens
            record.read_s = self._prefill.wait_s(new, behaviour.prefill_rate, now)
        tokens = 0 if script.stream else script.tokens
        return record.read_s + (behaviour.ttft_ms + self.interval_ms(behaviour) * tokens) / 1000

    def interval_ms(self, behaviour: Behaviour) -> float:
        """Return how long one more token takes each of the answers that are being written."""
        return behaviour.interval_ms + behaviour.batch_ms * max(0, self.decoding - 1)

    def forget(self) -> None:
        """Lose what a process has in memory, as a restart does."""
        self._memory, self._prefill = Memory(), Prefill()

    def _question(self, request: web.BaseRequest, ask: Ask, behaviour: Behaviour) -> Script:
        """Return the answer to a question to the model; a rule for request ids comes before it."""
        path, request_id = request.rel_url.raw_path, request.headers.get("x-request-id")
        if behaviour.request_ids == "uuid" and request_id is not None and not _is_uuid(request_id):
            return Script("", (b"",), status=400)
        chunked = _framing(request, behaviour, stream=True) == "chunked"
        return dialects.script_of(path, ask, behaviour, self._memory, chunked=chunked, request_id=request_id)

    async def _send(
        self, request: web.BaseRequest, record: Record, script: Script, behaviour: Behaviour, delay_s: float
    ) -> web.StreamResponse:
        connection, transport = request.protocol, request.transport
        assert isinstance(connection, _Connection)
        if transport is None:
            return _CLOSE
        connection.answered += 1
        framing = _framing(request, behaviour, stream=script.stream)
        close = not request.keep_alive or framing == "close" or _ends(script, behaviour.dialect, connection.answered)
        keep = not close and behaviour.fault not in ("cut", "reset", "rubbish")
        if behaviour.dialect == "llamacpp" and script.stream:
            keep = False  # though it announced to keep the connection
        head = _head(script, framing, behaviour.dialect, close=close)
        tail = b"0\r\n\r\n" if framing == "chunked" else b""
        if framing == "chunked" and not script.stream:
            script = replace(script, frames=(b"".join((*map(http_chunk, filter(None, script.frames)), tail)),))
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
        raise Refusal(413, f"The request is over {words.MAX_BODY_BYTES} bytes.") from None


async def _asked(request: web.BaseRequest, body: bytes, behaviour: Behaviour) -> Ask:
    """Read what a body asks for.

    Raises: `Refusal` when the body is not what this path takes; vLLM and SGLang check its content type too.
    """
    if request.rel_url.raw_path in dialects.FORMS:
        return await _asked_in_form(request, body, behaviour.dialect)
    if behaviour.dialect in words.FASTAPI and request.content_type != "application/json":
        raise validation.media_type(behaviour.dialect)
    return ask_of(request.rel_url.raw_path, body, behaviour.dialect)


async def _asked_in_form(request: web.BaseRequest, body: bytes, dialect: Dialect) -> Ask:
    path = request.rel_url.raw_path
    audio = path.startswith("/v1/audio/") and dialect in words.FASTAPI
    if request.content_type != "multipart/form-data":
        raise validation.missing(dialect, path, "file") if audio else Refusal(400, _FORM)
    # The reader wants a stream; a limit above any body keeps it from pausing the connection.
    stream = StreamReader(request.protocol, words.MAX_BODY_BYTES, loop=asyncio.get_running_loop())
    stream.feed_data(body)
    stream.feed_eof()
    form: dict[str, Any] = {}
    files = set()
    try:
        async for part in MultipartReader(request.headers, stream):
            if isinstance(part, BodyPartReader) and part.filename is not None:
                files.add(part.name)
            elif isinstance(part, BodyPartReader) and part.name:
                form[part.name] = await part.text()
        if "simulate" in form:
            form["simulate"] = orjson.loads(form["simulate"])
        own = {name: form[name] for name in ("model", "n", "simulate") if name in form}
        ask = msgspec.convert(own, Ask, strict=False)
    except ValueError as error:
        raise Refusal(400, f"The form cannot be read: {error}") from None
    if audio and "file" not in files:
        raise validation.missing(dialect, path, "file")
    return ask


def _framing(request: web.BaseRequest, behaviour: Behaviour, *, stream: bool) -> Framing:
    wanted = behaviour.framing or ("chunked" if stream else "length")
    return "close" if wanted == "chunked" and request.version < (1, 1) else wanted  # RFC 9112 section 7.1


def _ends(script: Script, dialect: Dialect, answered: int) -> bool:
    """Return whether the server says that it ends the connection: llama.cpp does so with errors, and now and then."""
    return dialect == "llamacpp" and (script.status >= 400 or answered >= _LLAMACPP_KEPT)


def _head(script: Script, framing: Framing, dialect: Dialect, *, close: bool) -> bytes:
    """Return the head of an answer, with the names and in the order of uvicorn or of llama.cpp's server."""
    status = f"HTTP/1.1 {script.status} {responses.get(script.status, '')}"
    length = sum(map(len, script.frames))
    if dialect == "llamacpp":
        lines = ["Server: llama.cpp", "Access-Control-Allow-Origin: "]
        lines += ["X-Accel-Buffering: no"] if script.stream else []
        lines += [f"Content-Type: {script.content_type}"]
        lines += {"chunked": ["Transfer-Encoding: chunked"], "length": [f"Content-Length: {length}"]}.get(framing, [])
        lines += ["Connection: close" if close else f"Keep-Alive: timeout=5, max={_LLAMACPP_KEPT}"]
    else:
        lines = [f"date: {_date(int(time.time()))}", "server: uvicorn", *script.headers]
        lines += [f"content-length: {length}"] if framing == "length" else []
        lines += [f"content-type: {script.content_type}"] if script.content_type else []
        lines += dialects.HEADERS.get(dialect, ())
        lines += ["connection: close"] if close else []
        lines += ["transfer-encoding: chunked"] if framing == "chunked" else []
    return "\r\n".join((status, *lines, "\r\n")).encode()


def _is_whole(script: Script, framing: Framing, behaviour: Behaviour, tail: bytes) -> bool:
    """Return whether a client has its whole answer before a fault: a stall would hang the next request, not this."""
    if behaviour.after < 0 or framing == "close":
        return False
    return sum(map(len, script.frames[behaviour.after :])) + len(tail) <= behaviour.after_bytes


def _is_uuid(text: str) -> bool:
    try:
        uuid.UUID(text)
    except ValueError:
        return False
    return True


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
