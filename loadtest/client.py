"""Send raw requests and time their answers: one bare protocol a connection, no task and no parsing tree per event.

Framing is checked to the byte by the edge's own tracker (`edge.wire`); what an event holds is the business of the
`Reader` that a request brings along.
"""

import asyncio
import os
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Protocol, cast

from edge.wire.http1 import Framing, Malformed, parse_head

_EVENT_END: Final = b"\n\n"
_EVENT_END_CRLF: Final = b"\r\n\r\n"


class Reader(Protocol):
    """Takes the content of one answer."""

    def event(self, event: bytes, now: float) -> None:
        """Take one event of a stream, without the empty line that ends it, at the monotonic time `now`."""

    def body(self, body: bytes) -> None:
        """Take the whole body of an answer that is no stream."""


@dataclass(slots=True)
class Sample:
    """One request and its answer; times are seconds of `time.monotonic`, 0.0 when it never came to that."""

    intended: float = 0.0
    sent: float = 0.0
    first_byte: float = 0.0
    finished: float = 0.0
    status: int = 0
    error: str = ""
    body_bytes: int = 0
    reads: int = 0
    events: int = 0
    connect_s: float = 0.0
    headers: dict[bytes, bytes] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether a whole answer of status 2xx came."""
        return not self.error and 200 <= self.status < 300


class Client(asyncio.Protocol):
    """One keep-alive connection; one request at a time."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._transport: asyncio.Transport | None = None
        self._done: asyncio.Future[None] | None = None
        self._sample = Sample()
        self._reader: Reader | None = None
        self._framing: Framing | None = None
        self._stream = False
        self._reuse = False
        self._pending = b""  # of the framing, not yet understood
        self._event_end = _EVENT_END
        self._content = b""  # of an event that has not ended
        self._body: list[bytes] = []

    @property
    def reusable(self) -> bool:
        """Whether another request can be sent."""
        return self._transport is not None and self._reuse

    async def request(self, raw: bytes, reader: Reader | None = None, intended: float = 0.0) -> Sample:
        """Send `raw` and return what became of it; failures are told by `Sample.error`, never raised."""
        sample = self._sample = Sample(intended)
        self._reader = reader
        self._framing = None
        self._pending = self._content = b""
        self._event_end = _EVENT_END
        self._body = []
        self._reuse = False
        self._done = self._loop.create_future()
        sample.sent = time.monotonic()
        if self._transport is None:
            self._end("connection lost before it was used")
        else:
            self._transport.write(raw)
        await self._done
        return sample

    def give_up(self, problem: str) -> None:
        """End the request that runs as failed, and the connection with it."""
        self._fail(problem)

    def abort(self) -> None:
        """Close at once, in the middle of whatever runs."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast(asyncio.Transport, transport)
        self._reuse = True

    def connection_lost(self, exc: Exception | None) -> None:
        """End what runs: whole, when only the close could end it."""
        self._transport = None
        framing = self._framing
        if framing is not None and not framing.self_delimited and exc is None:
            self._whole()
        else:
            self._end("connection lost")

    def data_received(self, data: bytes) -> None:
        """Take bytes of the answer."""
        if self._done is None or self._done.done():
            self._fail("bytes after the end of the answer")
            return
        now = time.monotonic()
        sample = self._sample
        sample.reads += 1
        data = self._pending + data if self._pending else data
        framing = self._framing
        try:
            if framing is None:
                end = data.find(b"\r\n\r\n")
                if end < 0:
                    self._pending = data
                    return
                head = parse_head(data[:end])
                data = data[end + 4 :]
                self._pending = b""
                if head.shape.status < 200:
                    self.data_received(data)
                    return
                sample.status, sample.headers = head.shape.status, head.shape.headers
                framing = self._framing = head.framing
                self._reuse = head.keep_alive
                self._stream = head.shape.headers.get(b"content-type", b"").startswith(b"text/event-stream")
            payload: list[bytes] = []
            understood = framing.scan(data, payload)
        except Malformed as error:
            self._fail(f"malformed answer: {error}")
            return
        self._pending = data[understood:]
        for content in payload:
            self._take(content, now)
        if framing.done:
            if self._pending:
                self._fail("bytes after the end of the answer")
            else:
                self._whole()

    def _take(self, content: bytes, now: float) -> None:
        sample = self._sample
        if not sample.first_byte:
            sample.first_byte = now
        sample.body_bytes += len(content)
        if not self._stream:
            self._body.append(content)
            return
        content = self._content + content
        *events, self._content = content.split(self._event_end)
        if not events and not sample.events and _EVENT_END_CRLF in content:  # legal too; a stream keeps to one of them
            self._event_end = _EVENT_END_CRLF
            *events, self._content = content.split(_EVENT_END_CRLF)
        sample.events += len(events)
        if self._reader is not None:
            for event in events:
                self._reader.event(event, now)

    def _whole(self) -> None:
        if self._stream and self._content.strip(b"\r\n"):  # more than one empty line may end an event
            self._end("the stream ends within an event")
            return
        if not self._stream and self._reader is not None:
            self._reader.body(b"".join(self._body))
        self._end("")

    def _fail(self, problem: str) -> None:
        self._reuse = False
        self._end(problem)
        self.abort()

    def _end(self, problem: str) -> None:
        if self._done is not None and not self._done.done():
            self._sample.finished = time.monotonic()
            self._sample.error = problem
            self._done.set_result(None)


def _reason(error: OSError) -> str:
    """Return the same text for the same reason, whichever address it was."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"certificate: {error.verify_message}"
    if isinstance(error, ssl.SSLError):  # its number is none of the system's
        return error.reason or str(error)
    return os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror or str(error)


@dataclass(frozen=True, slots=True)
class Address:
    """Where requests go."""

    host: str
    port: int
    tls: ssl.SSLContext | None = None


class Connections:
    """Connections to one address; an idle one is used before a new one is opened."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._idle: list[Client] = []
        self._loop = asyncio.get_running_loop()

    async def open(self) -> Client:
        """Return a new connection; raises `OSError`."""
        address = self._address
        _, client = await self._loop.create_connection(
            lambda: Client(self._loop), address.host, address.port, ssl=address.tls
        )
        return client

    async def warm(self, count: int) -> None:
        """Open `count` connections ahead of time."""
        self._idle += await asyncio.gather(*(self.open() for _ in range(count)))

    async def request(
        self,
        raw: bytes,
        reader: Reader | None = None,
        intended: float = 0.0,
        begun: Callable[[Client], None] = lambda client: None,
        timeout_s: float | None = None,
    ) -> Sample:
        """Send a request on an idle connection or a new one; `begun` hears which.

        An answer that is not whole `timeout_s` after the beginning, a new connection included, is a failure.
        """
        client = None
        connect_s = 0.0
        while self._idle and client is None:
            candidate = self._idle.pop()
            client = candidate if candidate.reusable else None
        if client is None:
            connecting = time.monotonic()
            try:
                async with asyncio.timeout(timeout_s):
                    client = await self.open()
            except OSError as error:
                now = time.monotonic()
                problem = f"connect: {_reason(error)}"
                if isinstance(error, TimeoutError) and error.errno is None:  # not the system's, but ours
                    problem = f"no connection within {timeout_s:g} s"
                return Sample(intended, connecting, finished=now, error=problem)
            connect_s = time.monotonic() - connecting
        begun(client)
        timer = None
        if timeout_s is not None:
            late = f"no whole answer within {timeout_s:g} s"
            timer = self._loop.call_later(timeout_s - connect_s, client.give_up, late)
        sample = await client.request(raw, reader, intended)
        sample.connect_s = connect_s
        if timer is not None:
            timer.cancel()
        if client.reusable:
            self._idle.append(client)
        return sample

    def close(self) -> None:
        """Close the idle connections."""
        while self._idle:
            self._idle.pop().abort()
