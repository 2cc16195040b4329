"""Move the bytes: one request to one endpoint, and its answer back to the client at the client's pace.

The usual answer is verbatim: what the upstream's socket gave goes to the client's socket as the same `bytes` object,
chunk framing and all, with no task, Future, queue or decoding per event. An exact tracker (`wire/http1.py`) runs before
every write, finds the end, and lets nothing pass that is not the answer's. Usage is read in passing (`metering/`), and
all that is known of an answer is recorded before its last bytes go. A token costs nothing for that: an event that ends
as those before it did has nothing else to be counted.

Here are the sockets and the ends; `answer.py` has the states of an answer, `pace.py` its time.
"""

import asyncio
from collections.abc import Callable
from typing import Final

from edge.client.connection import ClientConnection
from edge.errors import EdgeError, UpstreamError
from edge.exchange import NO_USAGE, End, Exchange, Phase
from edge.relay.answer import ENDED, Answer
from edge.relay.delivered import Interrupted
from edge.relay.pace import POLLS, Heartbeat, Silence, SlowClient
from edge.relay.terms import Attempt, FailedInStream, Settlement, StaleConnection, UpstreamAnsweredError
from edge.upstream_errors import from_upstream
from edge.wire.connections import ConnectionPool, Receiver, UpstreamConnection

_COMPLETE, _WAIT, _STREAM = End.COMPLETE, Phase.WAIT, Phase.STREAM
_JOIN_BYTES: Final = 64 * 1024  # under this, head and body are joined for one write; over it, copying costs more
_STALE_WITHIN_S: Final = 1.0  # of a request: a connection that the upstream had closed ends at once


class Relay(Receiver):
    """One answer on its way: the receiver of an upstream connection, and the `Answering` of a client's."""

    __slots__ = (
        "_answer", "_attempt", "_begun_at", "_client", "_exchange", "_failure", "_heartbeat", "_reused",
        "_settlement", "_silence", "_slow_client", "_transport", "done", "paused",
    )  # fmt: skip

    def __init__(self, exchange: Exchange, client: ClientConnection, attempt: Attempt, settlement: Settlement) -> None:
        self._exchange = exchange
        self._client = client
        self._attempt = attempt
        self._settlement = settlement
        self.done: asyncio.Future[None] = client.loop.create_future()
        self.paused = False  # the client's buffer is full
        self._failure: FailedInStream | None = None
        self._silence: Silence | None = None
        self._heartbeat: Heartbeat | None = None
        self._slow_client: SlowClient | None = None

    def send(self, connection: UpstreamConnection) -> "asyncio.Future[None]":
        """Send the request; return what is done when its answer is over."""
        attempt, loop = self._attempt, self._client.loop
        self._reused = connection.uses > 0
        transport = self._transport = connection.lend(self)
        self._answer = Answer(self, self._exchange, self._client, attempt, connection)
        self._begun_at = loop.time()
        connection.expect_by(self._begun_at + attempt.timeouts.first_byte_timeout_s)
        if attempt.seam is None:
            self._exchange.phase = _WAIT
        self._client.attach(self)
        if attempt.body_bytes < _JOIN_BYTES:
            transport.write(b"".join((attempt.head, *attempt.body)))
        else:
            connection.send_long((attempt.head, *attempt.body))
        if attempt.heartbeat_s:
            self._heartbeat = Heartbeat(self._answer, self, attempt.heartbeat_s, loop)
        return self.done

    def close(self) -> None:
        """Let go of everything, however the request ended."""
        self._client.attach(None)
        if self._heartbeat is not None:
            self._heartbeat.stop()
        if self._slow_client is not None:
            self._stop_watching()
        if self._answer.connection is not None:
            self._drop_connection()
        self._silence = self._heartbeat = None
        del self._answer  # which has this as its owner: a circle of references lives until it is collected

    # --- what an answer makes happen: `Owner`

    def open(self, status: int) -> Callable[[bytes], None]:
        """Let the client have bytes from now on."""
        self._exchange.phase = _STREAM
        self._exchange.status = status
        transport = self._client.transport
        assert transport is not None  # else the client's leaving would have ended this
        delivered = self._attempt.delivered
        return transport.write if delivered is None else delivered.passing(transport.write, self.let_go)

    def began(self) -> None:
        """Let go of the request's body, and wait for the next bytes instead of the first ones."""
        answer, began = self._answer, self._attempt.began
        if began is not None:
            began(self._exchange.stream)
        if answer.sent_bytes:
            self.let_go()
        if answer.connection is not None:
            now = self._client.loop.time()
            self._silence = Silence(answer, now)
            answer.connection.expect_by(now + self._attempt.timeouts.idle_timeout_s / POLLS)

    def let_go(self) -> None:
        """Let go of the request's body, which nobody else is asked; what is still being sent is held to the end."""
        connection, delivered = self._answer.connection, self._attempt.delivered
        is_kept = delivered is not None and delivered.is_whole
        if not is_kept and (connection is None or not connection.is_sending):
            self._attempt.let_go()

    def settle(self, end: End) -> None:
        """Charge and record the request with what its answer used, before its last bytes go."""
        answer, usage = self._answer, NO_USAGE
        meter = answer.meter
        if self._attempt.keep is not None:
            self._attempt.note_kept(meter, whole=end is _COMPLETE)
        if meter is not None:
            meter.passed += answer.unmetered
            answer.unmetered = 0
            usage = meter.usage(end is _COMPLETE)
            if end is _COMPLETE and meter.failed:
                end = End.UPSTREAM_ERROR
        seam = self._attempt.seam
        if seam is not None:
            self._exchange.resumed_usage = usage
            usage = seam.usage(usage)
        self._settlement.settle(end, usage)

    def lose(self) -> None:
        """Close the upstream in this same call: another one's answer has begun."""
        self._release(0.0)

    def interrupt(self, end: End) -> bool:
        """End the attempt of a stream that is kept, so that another endpoint may go on with it."""
        answer, delivered = self._answer, self._attempt.delivered
        if delivered is None or not delivered.is_whole or end is End.DRAINED:
            return False
        if answer.meter is not None:  # else nothing was said
            answer.meter.passed += answer.unmetered
            answer.unmetered = 0
            self._settlement.note(answer.meter.usage(False))
        self._release(0.0)
        if not self.done.done():
            self.done.set_exception(Interrupted(end))
        return True

    def leave(self, idle_s: float) -> None:
        """Part from the upstream; an answer stays open until its client has room, so that a dead one is noticed."""
        self._release(idle_s)
        if self.paused or self.done.done():
            return
        if self._failure is None:
            self.done.set_result(None)
        else:
            self.done.set_exception(self._failure)

    def fail(self, error: Exception, idle_s: float = 0.0) -> None:
        """End an answer of which the client has no byte; behind heartbeats an event says so, or it goes on elsewhere.

        It does not where a server was too slow, or refused: that may be for what it was asked.
        """
        exchange, answer = self._exchange, self._answer
        if self._attempt.seam is not None:
            self._release(idle_s)
            if not self.done.done():
                self.done.set_exception(error)
            return
        exchange.first_byte = 0.0
        if answer.sent_bytes and isinstance(error, UpstreamError) and self.interrupt(End.UPSTREAM_CUT):
            return
        if answer.sent_bytes and isinstance(error, EdgeError | UpstreamAnsweredError):
            failure = (
                error
                if isinstance(error, EdgeError)
                else from_upstream(error.status, error.headers, error.body, is_instance=self._attempt.is_instance)
            )
            exchange.error = failure.error_code
            self.settle(End.UPSTREAM_ERROR)
            answer.write_last_event(failure)
            self._failure = FailedInStream(error)
            self.leave(idle_s)
            return
        self._release(idle_s)
        if not self.done.done():
            self.done.set_exception(error)

    def _release(self, idle_s: float) -> None:
        """Give the upstream's connection back when it can serve again, close any other."""
        answer = self._answer
        answer.state = ENDED
        self._exchange.response_bytes = answer.sent_bytes
        connection, transport = answer.connection, self._transport
        if connection is None or not idle_s or connection.is_sending or transport.get_write_buffer_size():
            self._drop_connection()
            return
        answer.connection = None
        if self.paused:
            connection.resume_reading()
        connection.free(idle_s)

    def _drop_connection(self) -> None:
        answer = self._answer
        connection, answer.connection = answer.connection, None
        if connection is not None:
            connection.abort()

    # --- the upstream: `Receiver`

    def connection_lost(self, eof: bool) -> None:
        """Take the end of the upstream's connection: in order, too early, or before it began."""
        self._answer.connection = None
        at_once = self._client.loop.time() - self._begun_at < _STALE_WITHIN_S
        self._answer.closed(in_order=eof, stale=self._reused and at_once)

    def overdue(self) -> None:
        """Take that the first byte, or the next one, may be too late."""
        answer, silence = self._answer, self._silence
        if silence is None:
            answer.overdue()
            return
        now, idle_timeout_s = self._client.loop.time(), self._attempt.timeouts.idle_timeout_s
        since = silence.poll(now, paused=self.paused)
        if now - since >= idle_timeout_s:
            answer.overdue()
        elif answer.connection is not None:
            answer.connection.expect_by(min(since + idle_timeout_s, now + idle_timeout_s / POLLS))

    # --- the client: `Answering`

    @property
    def begun(self) -> bool:
        """Whether the client has got the head."""
        return self._answer.sent_bytes > 0

    def cut(self) -> None:
        """End the answer because the edge has to stop."""
        self._answer.drain()

    def client_paused(self) -> None:
        """Stop reading the upstream."""
        if self.paused:  # told again, as it is attached anew
            return
        self.paused = True
        if self._answer.connection is not None:
            self._answer.connection.pause_reading()
        rate = self._attempt.timeouts.min_client_rate_bytes_per_s
        if rate:
            self._slow_client = SlowClient(self._client, rate, self._client_too_slow)

    def client_resumed(self) -> None:
        """Go on reading; an answer that waited for its client to read it is over."""
        self.paused = False
        self._stop_watching()
        if self._silence is not None:
            self._silence.since = self._client.loop.time()
        if self._answer.connection is not None:
            self._answer.connection.resume_reading()
        if self._answer.state is ENDED:
            self.leave(0.0)

    def client_gone(self) -> None:
        """Close the upstream in this same call: the GPU slot is what this saves.

        Who leaves behind the last event has the whole answer: some do not wait for the last chunk.
        """
        answer, meter = self._answer, self._answer.meter
        if answer.state is not ENDED:
            is_over = meter is not None and meter.ended and not self.paused
            self.settle(_COMPLETE if is_over else End.CLIENT_GONE)
        self._release(0.0)

    def _client_too_slow(self) -> None:
        """Cut the client; where its answer is recorded whole, that stays its end, and the log has this beside."""
        self.settle(End.SLOW_CLIENT)
        if self._exchange.end is not End.SLOW_CLIENT:
            self._exchange.error = End.SLOW_CLIENT.value
        self._client.last = True
        self.paused = False
        self._client.abort()
        self.leave(0.0)

    def _stop_watching(self) -> None:
        if self._slow_client is not None:
            self._slow_client.stop()
            self._slow_client = None


async def relay(
    exchange: Exchange,
    client: ClientConnection,
    pool: ConnectionPool,
    attempt: Attempt,
    settlement: Settlement,
    runs: Callable[[Exchange, ClientConnection, Attempt, Settlement], Relay] = Relay,
) -> None:
    """Pass a request to an endpoint and its answer to the client.

    A request whose reused connection dies at once, before it gave a byte, is sent again, once, on a new one. That is
    safe even for a POST, since the upstream had closed it before the request came (RFC 9112 section 9.3.1), and no
    retry, so it takes no budget. Raises: `UpstreamAnsweredError`, `UpstreamError`, `UpstreamTimeout`,
    `UpstreamUnavailable`, all of them only while the client has not got a byte of this answer; `FailedInStream` instead
    of them when it has got no more than heartbeats; `Interrupted` for a stream that may go on elsewhere. Other failures
    that come later end the answer here, and `exchange.end` names them. `runs` makes another relay than the usual one.
    """
    reused = pool.take() if attempt.seam is None else None
    while True:
        timeouts = attempt.timeouts
        connection = reused or await pool.connect(timeouts.connect_timeout_s, timeouts.max_connection_age_s)
        running = runs(exchange, client, attempt, settlement)
        try:
            await running.send(connection)
        except StaleConnection:  # never of a new one
            exchange.replays += 1
            reused = None
        else:
            return
        finally:
            running.close()
            del running  # its future has the failure, whose traceback has this frame
