"""Upstream connections: HTTP/1.1 on bare protocols, its framing tracked to the byte, and a LIFO pool per endpoint.

aiohttp's client is not used here: its StreamReader costs a Future, a loop turn and a task step per event, and it takes
the chunk framing away that the client has to get again. What is understood is the little that vLLM and its like send
(RFC 9112); whatever is malformed is refused, never guessed at.
"""

import asyncio
import errno
import functools
import logging
import math
import re
import socket
import ssl
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final, cast

from edge.config.settings import Url
from edge.errors import ConnectFailed, OutOfPorts, Overloaded

_log = logging.getLogger(__name__)

MAX_HEAD_BYTES: Final = 64 * 1024  # of one response head; Envoy allows 60 KiB
_MAX_LINE_BYTES: Final = 4096  # of one chunk-size line with its extensions, or one trailer
_MAX_TRAILER_BYTES: Final = 16 * 1024
DEFAULT_IDLE_S: Final = 4.0  # under the 5 s after which uvicorn, and so vLLM and SGLang, close an idle connection
_LONGEST_IDLE_S: Final = 60.0
_BACK_IN_S: Final = 5  # what a client is told that cannot be served now
_KEEP_ALIVE_SHARE: Final = 0.8  # of the time that the upstream's Keep-Alive header promises

_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-5][0-9]{2})(?: [^\r\n\x00]*)?")
_FIELD = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):([\t\x20-\x7e\x80-\xff]*)")
_TOKEN = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,256}")
_CONTROLS = bytes(each for each in range(32) if each not in b"\t") + b"\x7f"
_fields: dict[bytes, tuple[bytes, bytes]] = {}
_MAX_FIELDS: Final = 1024
_MAX_REMEMBERED_BYTES: Final = 256
_SIZE_LINE = re.compile(rb"([0-9A-Fa-f]{1,15})\r\n")
_LAST_CHUNK = re.compile(rb"0{1,15}\r\n\r\n")
_PARTIAL = re.compile(rb"[0-9A-Fa-f]{0,15}|[0-9A-Fa-f]{1,15}\r|0{1,15}\r\n\r?")
_ANY_SIZE_LINE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[\t \x21-\x7e\x80-\xff]*)?\r\n")
_KEEP_ALIVE_TIMEOUT = re.compile(rb"timeout[ \t]*=[ \t]*([0-9]{1,6})", re.IGNORECASE)


class Malformed(Exception):
    """The upstream sent what RFC 9112 does not allow."""


@dataclass(slots=True)
class ResponseHead:
    """The head of a response; `headers` has lower-case names, each value as it came (RFC 9110 section 5)."""

    status: int
    headers: dict[bytes, bytes]
    framing: "Framing"
    keep_alive: bool
    idle_s: float


def parse_head(block: bytes) -> ResponseHead:
    """Return the head of `block`, which is what stands before the empty line.

    Raises: `Malformed`, also for what two recipients could frame differently (RFC 9112 section 6.3).
    """
    first, *lines = block.split(b"\r\n")
    minor_version, status = _status_line(first)
    headers: dict[bytes, bytes] = {}
    for line in lines:
        name, value = _fields.get(line) or _field(line)
        if name in headers:
            if name in (b"content-length", b"transfer-encoding"):
                raise Malformed("framing header given twice")
            value = headers[name] + b", " + value
        headers[name] = value
    framing = _framing(status, minor_version, headers)
    keep_alive = minor_version == 1
    if b"connection" in headers:
        options = headers[b"connection"].lower()
        keep_alive = b"close" not in options if keep_alive else b"keep-alive" in options
    idle_s = DEFAULT_IDLE_S
    if b"keep-alive" in headers and (promised := _KEEP_ALIVE_TIMEOUT.search(headers[b"keep-alive"])):
        idle_s = min(int(promised[1]) * _KEEP_ALIVE_SHARE, _LONGEST_IDLE_S)
    return ResponseHead(status, headers, framing, keep_alive, idle_s)


@functools.lru_cache(maxsize=64)
def _status_line(line: bytes) -> tuple[int, int]:
    """Return the minor version and the status."""
    found = _STATUS_LINE.fullmatch(line)
    if found is None or line.translate(None, _CONTROLS) != line:
        raise Malformed("status line")
    return int(found[1]), int(found[2])


def _field(line: bytes) -> tuple[bytes, bytes]:
    """Return a header's name in lower case and its value; lines are remembered, since servers send the same ones."""
    written, colon, value = line.partition(b":")
    if not colon or not _TOKEN.fullmatch(written):
        raise Malformed("header line")
    if line.translate(None, _CONTROLS) != line:
        raise Malformed("control character")
    field = written.lower(), value.strip(b" \t")
    if len(line) <= _MAX_REMEMBERED_BYTES:
        if len(_fields) >= _MAX_FIELDS:
            _fields.clear()
        _fields[line] = field
    return field


def _framing(status: int, minor_version: int, headers: dict[bytes, bytes]) -> "Framing":
    """Return how the body ends (RFC 9112 section 6.3)."""
    coding = headers.get(b"transfer-encoding")
    length = headers.get(b"content-length")
    if coding is not None:
        if length is not None or minor_version == 0 or coding.lower() != b"chunked":
            raise Malformed("transfer coding")
        return NoBody() if status in (204, 304) else Chunked()
    if length is not None:
        if not length.isdigit() or len(length) > 15:
            raise Malformed("content length")
        return NoBody() if status in (204, 304) else Length(int(length))
    return NoBody() if status < 200 or status in (204, 304) else UntilClose()


class Framing:
    """Where a body ends.

    `scan` returns how many bytes of `data` belong to the body and are understood; the caller keeps the rest and gives
    it again before what comes next. The content without its framing is appended to `payload`. `plain` refuses what may
    not go to a client as it is.
    """

    __slots__ = ("done", "tail")
    chunked = False
    self_delimited = True

    def __init__(self) -> None:
        self.done = False
        self.tail = b""  # the last bytes of the content, as many as the end of an event may have

    def _passed(self, content: bytes) -> None:
        self.tail = (self.tail + content[-EVENT_END_BYTES:])[-EVENT_END_BYTES:]

    def scan(self, data: bytes, payload: list[bytes], plain: bool = False) -> int:
        """Return the count of bytes understood; raises `Malformed`."""
        raise NotImplementedError

    @property
    def between_chunks(self) -> bool:
        """Whether what was understood ends where a frame of our own could stand."""
        return True


class NoBody(Framing):
    """No body at all."""

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__()
        self.done = True

    def scan(self, data: bytes, payload: list[bytes], plain: bool = False) -> int:
        """Return 0: whatever follows is not part of the answer."""
        return 0


class Length(Framing):
    """`Content-Length`."""

    __slots__ = ("left", "total")

    def __init__(self, length: int) -> None:
        super().__init__()
        self.total = self.left = length
        self.done = length == 0

    def scan(self, data: bytes, payload: list[bytes], plain: bool = False) -> int:
        """Return how much of `data` is body."""
        count = min(len(data), self.left)
        self.left -= count
        self.done = self.left == 0
        if count:
            payload.append(data[:count])
        return count

    @property
    def between_chunks(self) -> bool:
        """Never: another byte would be counted as the answer's."""
        return False


class UntilClose(Framing):
    """The body ends with the connection (RFC 9112 section 6.3, rule 8)."""

    __slots__ = ()
    self_delimited = False

    def scan(self, data: bytes, payload: list[bytes], plain: bool = False) -> int:
        """Return all of it."""
        self._passed(data)
        if data:
            payload.append(data)
        return len(data)


EVENT_END_BYTES: Final = 4  # of the longest end of an event, CRLF CRLF

# How long a read is that is one whole chunk, by its first bytes: a size line that was found valid, and maybe the first
# of the content. The same few come again and again, and one look-up costs a quarter of reading the line. Only chunks
# that are long enough to show the end of an event by themselves.
SIZE_LINE_BYTES: Final = 5  # of a chunk under 4 KiB
whole_chunks: dict[bytes, int] = {}
_MAX_WHOLE_CHUNKS: Final = 4096


def _remember(beginning: bytes, count: int) -> None:
    if len(whole_chunks) >= _MAX_WHOLE_CHUNKS:
        whole_chunks.clear()
    whole_chunks[beginning] = count


LAST_CHUNK: Final = b"0\r\n\r\n"


def chunk(content: bytes) -> bytes:
    """Return content as one chunk; nothing for none, since an empty chunk would be the last."""
    return b"%x\r\n%b\r\n" % (len(content), content) if content else b""


class Irregular(Exception):
    """A chunk extension or a trailer: legal, and to be taken away by reading what is not `plain`."""


class Chunked(Framing):
    """`Transfer-Encoding: chunked` (RFC 9112 section 7.1).

    What is `plain` is chunks that may go to the client as they are: an extension or a trailer raises `Irregular`.
    Whatever raises, `consumed` bytes before it were understood. Extensions and trailers are bounded and dropped.
    """

    __slots__ = ("_ending", "_in_trailers", "_left", "_trailer_bytes", "consumed")
    chunked = True

    def __init__(self) -> None:
        super().__init__()
        self.consumed = 0
        self._left = 0  # bytes of the chunk's data that are still to come
        self._ending = False  # the CRLF after the data is still to come
        self._in_trailers = False
        self._trailer_bytes = 0

    @property
    def between_chunks(self) -> bool:
        """Whether a chunk could begin here."""
        return not self._left and not self._ending

    def scan(self, data: bytes, payload: list[bytes], plain: bool = False) -> int:
        """Return how many bytes are whole tokens: size lines, data, ends of chunks."""
        at, end = 0, len(data)
        while at < end and not self.done:
            self.consumed = at
            if self._left:
                count = min(self._left, end - at)
                content = data[at : at + count]
                self._passed(content)
                payload.append(content)
                self._left -= count
                at += count
                self._ending = not self._left
            elif self._ending:
                if end - at < 2 and data[at] == 13:
                    break
                if data[at : at + 2] != b"\r\n":
                    raise Malformed("end of chunk")
                self._ending = False
                at += 2
            elif self._in_trailers:
                after = self._trailer(data, at)
                if after < 0:
                    break
                at = after
            else:
                line = _SIZE_LINE.match(data, at)
                size = int(line[1], 16) if line is not None else 0
                if line is not None and size:
                    line_bytes = line.end() - at
                    if line_bytes <= SIZE_LINE_BYTES and size >= EVENT_END_BYTES:
                        _remember(data[at : at + SIZE_LINE_BYTES], line_bytes + size + 2)
                    stop = line.end() + size
                    if stop + 2 <= end and data[stop : stop + 2] == b"\r\n":  # a whole chunk
                        self._passed(data[max(stop - EVENT_END_BYTES, line.end()) : stop])
                        payload.append(data[line.end() : stop])
                        at = stop + 2
                        continue
                    self._left = size
                    at = line.end()
                elif (last := _LAST_CHUNK.match(data, at)) is not None:
                    self.done = True
                    at = last.end()
                elif _PARTIAL.fullmatch(data, at):
                    break
                elif plain:
                    raise Irregular
                else:
                    after = self._irregular_line(data, at)
                    if after < 0:
                        break
                    at = after
        return at

    def _irregular_line(self, data: bytes, at: int) -> int:
        line = _ANY_SIZE_LINE.match(data, at)
        if line is None:
            if data.find(b"\n", at, at + _MAX_LINE_BYTES) >= 0 or len(data) - at > _MAX_LINE_BYTES:
                raise Malformed("chunk size")
            return -1
        if line.end() - at > _MAX_LINE_BYTES:
            raise Malformed("chunk extension")
        self._left = int(line[1], 16)
        self._in_trailers = not self._left
        return line.end()

    def _trailer(self, data: bytes, at: int) -> int:
        line_end = data.find(b"\r\n", at)
        if line_end < 0:
            if len(data) - at > _MAX_LINE_BYTES:
                raise Malformed("trailer")
            return -1
        self._trailer_bytes += line_end - at
        if line_end == at:
            self.done = True
        elif (
            line_end - at > _MAX_LINE_BYTES
            or self._trailer_bytes > _MAX_TRAILER_BYTES
            or not _FIELD.fullmatch(data, at, line_end)
        ):
            raise Malformed("trailer")
        return line_end + 2


class Receiver:
    """Who a connection's bytes are for, between `lend` and `free`."""

    __slots__ = ()

    def data_received(self, data: bytes) -> None:
        """Take bytes."""

    def connection_lost(self, eof: bool) -> None:
        """Hear that the connection ended; `eof` when the upstream closed it in order."""

    def overdue(self) -> None:
        """Hear that the time of `expect_by` has come."""


# A machine that vanished sends no end: without these a request that was sent to it, or waits for its first token, would
# wait for `first_byte_timeout`. 30 s, since a host that moves to another machine is silent for some (tcp(7), RFC 5482).
_NOTICE_DEATH: Final = tuple(
    (level, getattr(socket, name), value)
    for level, name, value in (
        (socket.SOL_SOCKET, "SO_KEEPALIVE", 1),
        (socket.IPPROTO_TCP, "TCP_KEEPIDLE", 15),
        (socket.IPPROTO_TCP, "TCP_KEEPINTVL", 5),
        (socket.IPPROTO_TCP, "TCP_KEEPCNT", 3),
        (socket.IPPROTO_TCP, "TCP_USER_TIMEOUT", 30_000),  # ms
    )
    if hasattr(socket, name)  # Linux has all of them
)


class UpstreamConnection(asyncio.Protocol):
    """One connection to an endpoint: lent to one request at a time, idle in its pool in between."""

    __slots__ = (
        "_deadline",
        "_free_since",
        "_idle_s",
        "_pool",
        "_receiver",
        "_timer",
        "_timer_at",
        "closed",
        "eof",
        "receive",
        "transport",
        "uses",
    )

    def __init__(self, pool: "ConnectionPool") -> None:
        self._pool = pool
        self.receive: Callable[[bytes], None] | None = None  # what takes the bytes; the receiver may change it
        self._receiver: Receiver | None = None
        self._free_since = 0.0
        self._idle_s = DEFAULT_IDLE_S
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._deadline = 0.0
        self.uses = 0
        self.closed = False
        self.eof = False
        self.transport: asyncio.Transport | None = None

    def __repr__(self) -> str:
        state = "closed" if self.closed else "active" if self._receiver else "idle"
        return f"<UpstreamConnection {self._pool.url.authority} {state}, {self.uses} uses>"

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance

    def lend(self, receiver: Receiver) -> asyncio.Transport:
        """Give the connection to one request; its bytes go to `receiver` from now on."""
        assert self.transport is not None
        self.uses += 1
        self._receiver = receiver
        self.receive = receiver.data_received
        return self.transport

    def expect_by(self, at: float) -> None:
        """Tell the receiver at the loop's time `at` that it is overdue; a later call replaces an earlier one.

        The timer is the connection's and lazy: setting and cancelling one costs 2 us, so neither a read nor a request
        has one of its own; it fires early and is set again.
        """
        self._deadline = at
        if self._timer is not None:
            if self._timer_at <= at:
                return
            self._timer.cancel()
        self._timer_at = at
        self._timer = self._pool.loop.call_at(at, self._tick)

    def _tick(self) -> None:
        self._timer = None
        if self._receiver is None:
            return  # idle; the next request sets it
        if self._pool.loop.time() < self._deadline:
            self.expect_by(self._deadline)
        else:
            self._receiver.overdue()

    def data_received(self, data: bytes) -> None:
        """Pass the bytes on; an idle connection has nothing to say and is closed (RFC 9112 section 9.2)."""
        receive = self.receive
        if receive is None:
            self.abort()
        else:
            receive(data)

    def eof_received(self) -> bool:
        """Note the upstream's end; the transport then closes itself."""
        self.eof = True
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """Leave the pool and tell the request."""
        self.closed = True
        if self._timer is not None:
            self._timer.cancel()
        self._pool.lost(self)
        receiver, self._receiver, self.receive = self._receiver, None, None
        if receiver is not None:
            receiver.connection_lost(self.eof and exc is None)

    def free(self, idle_s: float) -> None:
        """Give the connection back to its pool, where it may be idle for `idle_s`."""
        self._receiver = self.receive = None
        self._idle_s = idle_s
        self._free_since = self._pool.loop.time()
        self._pool.keep(self)

    def is_fresh(self, now: float) -> bool:
        """Say whether the upstream is unlikely to have closed it."""
        return not self.closed and not self.eof and now - self._free_since < self._idle_s

    def abort(self) -> None:
        """Close at once, without a further word to anybody."""
        self._receiver = self.receive = None
        if self.transport is not None:
            self.transport.abort()


_NO_DESCRIPTOR: Final = (errno.EMFILE, errno.ENFILE)


def _own_lack(error: OSError) -> int | None:
    """Return the errno of what the edge itself has none left of; None: the failure is of the network or the endpoint.

    A resolver that gets no descriptor says that the name is unknown, so that one is tried for.
    """
    if isinstance(error, socket.gaierror):
        try:
            socket.socket().close()
        except OSError as lack:
            error = lack
    return error.errno if error.errno in (*_NO_DESCRIPTOR, errno.EADDRNOTAVAIL) else None


class Shortage:
    """What the pools of a process do when it has no descriptor or port left: they meet that together."""

    _TELL_S: Final = 60.0  # between two lines: each request may meet it

    def __init__(self, pools: Callable[[], Iterable["ConnectionPool"]]) -> None:
        self._pools = pools
        self._tell_at = -math.inf

    async def make_room(self) -> None:
        """Close every idle connection, and wait until their descriptors are free."""
        for pool in self._pools():
            pool.close_idle()
        await asyncio.sleep(0)  # an aborted transport closes its socket in the loop's next turn

    def failure(self, lack: int, now: float) -> Overloaded:
        """Return what the client is told; the log is told now and then."""
        if now >= self._tell_at:
            self._tell_at = now + self._TELL_S
            name = errno.errorcode[lack]
            what = "descriptor" if lack in _NO_DESCRIPTOR else "local port"
            _log.error("no %s left for a connection to an upstream (%s): such requests get 503", what, name)
        kind = Overloaded if lack in _NO_DESCRIPTOR else OutOfPorts
        return kind("The edge has no room for this request now, try again in a moment.", retry_after_s=_BACK_IN_S)


class ConnectionPool:
    """The idle connections to one address, newest first: the least likely to have been closed by the upstream."""

    _SWEEP_S: Final = 1.0

    def __init__(
        self,
        url: Url,
        tls: ssl.SSLContext | None,
        loop: asyncio.AbstractEventLoop,
        shortage: Shortage | None = None,
    ) -> None:
        self.url = url
        self.loop = loop
        self.tls = tls
        self._shortage = shortage or Shortage(lambda: (self,))
        self._idle: dict[UpstreamConnection, None] = {}
        self._sweep: asyncio.TimerHandle | None = None
        self._closed = False

    def __repr__(self) -> str:
        return f"<ConnectionPool {self.url.authority} {len(self._idle)} idle>"

    def __len__(self) -> int:
        return len(self._idle)

    def take(self) -> UpstreamConnection | None:
        """Return an idle connection, or None."""
        now = self.loop.time()
        while self._idle:
            connection, _ = self._idle.popitem()
            if connection.is_fresh(now):
                return connection
            connection.abort()
        return None

    async def connect(self, timeout_s: float) -> UpstreamConnection:
        """Return a new connection.

        Raises: `ConnectFailed`, from which nothing of the address can be read; `Overloaded` for the edge's own lack.
        """
        try:
            async with asyncio.timeout(timeout_s):
                try:
                    transport, connection = await self._open()
                except OSError as error:
                    if _own_lack(error) not in _NO_DESCRIPTOR:
                        raise
                    await self._shortage.make_room()
                    transport, connection = await self._open()
            sock = transport.get_extra_info("socket")
            for level, option, value in _NOTICE_DEATH:
                sock.setsockopt(level, option, value)
        except TimeoutError:
            raise ConnectFailed(
                "The model's server did not accept a connection in time.", retry_after_s=_BACK_IN_S
            ) from None
        except ssl.SSLError:
            raise ConnectFailed("The model's server could not be reached securely.", retry_after_s=_BACK_IN_S) from None
        except (OSError, UnicodeError) as error:
            lack = _own_lack(error) if isinstance(error, OSError) else None
            if lack is not None:
                raise self._shortage.failure(lack, self.loop.time()) from None
            raise ConnectFailed("The model's server is not reachable right now.", retry_after_s=_BACK_IN_S) from None
        return connection

    async def _open(self) -> tuple[asyncio.Transport, UpstreamConnection]:
        return await self.loop.create_connection(
            lambda: UpstreamConnection(self), self.url.host, self.url.port, ssl=self.tls
        )

    def keep(self, connection: UpstreamConnection) -> None:
        """Take a connection back."""
        if connection.closed or self._closed:
            connection.abort()
            return
        self._idle[connection] = None
        if self._sweep is None:
            self._sweep = self.loop.call_later(self._SWEEP_S, self._close_stale)

    def lost(self, connection: UpstreamConnection) -> None:
        """Forget a connection that ended."""
        self._idle.pop(connection, None)

    def _close_stale(self) -> None:
        now = self.loop.time()
        for connection in [each for each in self._idle if not each.is_fresh(now)]:
            del self._idle[connection]
            connection.abort()
        self._sweep = self.loop.call_later(self._SWEEP_S, self._close_stale) if self._idle else None

    def close(self) -> None:
        """Close the idle connections, and each lent one when it comes back."""
        self._closed = True
        self.close_idle()

    def close_idle(self) -> None:
        """Close the idle connections."""
        if self._sweep is not None:
            self._sweep.cancel()
            self._sweep = None
        while self._idle:
            self._idle.popitem()[0].abort()


def request_head(target: str, authority: str, headers: list[tuple[str, str]]) -> bytes:
    """Return the constant part of a request's head: everything but what differs from request to request."""
    lines = [f"POST {target} HTTP/1.1", f"Host: {authority}", *(f"{name}: {value}" for name, value in headers)]
    return ("\r\n".join(lines) + "\r\n").encode("ascii")
