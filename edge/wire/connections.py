"""Upstream connections: HTTP/1.1 on bare protocols, and a LIFO pool per endpoint.

aiohttp's client is not used here: its StreamReader costs a Future, a loop turn and a task step per event, and it takes
the chunk framing away that the client has to get again.
"""

import asyncio
import errno
import logging
import math
import os
import random
import socket
import ssl
from collections.abc import Callable, Iterable
from ipaddress import ip_address
from typing import Any, Final, cast

from aiohappyeyeballs import start_connection

from edge.config.values import Url
from edge.errors import ConnectFailed, OutOfPorts, Overloaded
from edge.names import is_metadata_address
from edge.sockets import notices_of_death
from edge.wire.flow import Flow

_log = logging.getLogger(__name__)

_RETRY_AFTER_S: Final = 5  # of a client that cannot be served now
_CAUSES: Final = {errno.ECONNREFUSED: "refused", errno.ECONNRESET: "reset", errno.EPIPE: "reset"}
_PROXY_ERRORS: Final = {  # RFC 9209 section 2.3
    "timeout": "connection_timeout",
    "tls": "tls_protocol_error",
    "dns": "dns_error",
    "refused": "connection_refused",
    "reset": "connection_terminated",
    "unreachable": "destination_ip_unroutable",
}
_NO_DESCRIPTOR: Final = (errno.EMFILE, errno.ENFILE)
_LOG_INTERVAL_S: Final = 60.0  # each request may meet a shortage
_SWEEP_S: Final = 1.0
_YOUNGEST_SHARE: Final = 0.8  # of the age, at random, so that connections that were made together do not end together
# One that was used so often is made anew after a part of its age: of short requests one in so many pays a handshake, at
# most, and a server that was added behind a name gets its share at once.
_MANY_USES: Final = 64
_BUSY_SHARE: Final = 1 / 12
_ATTEMPT_DELAY_S: Final = 0.25  # before the next address of a name is tried beside the ones before (RFC 8305 section 5)
_PASSED_OVER_S: Final = 600.0  # how long an address that did not answer is tried last (RFC 6555 section 4.2)


class Receiver:
    """Who a connection's bytes are for, between `lend` and `free`."""

    __slots__ = ()

    def data_received(self, data: bytes) -> None:
        """Take bytes."""

    def connection_lost(self, eof: bool) -> None:
        """Note that the connection ended; `eof` when the upstream closed it in order."""

    def overdue(self) -> None:
        """Note that the time of `expect_by` has come."""


# Within 30 s: else a request that was sent to a machine that vanished, or waits for its first token, would wait for
# `first_byte_timeout`.
_NOTICE_DEATH: Final = notices_of_death(interval_s=5)


class UpstreamConnection(Flow):
    """One connection to an endpoint: lent to one request at a time, idle in its pool in between."""

    __slots__ = (
        "_deadline", "_fresh_until", "_pool", "_receiver", "_timer", "_timer_at",
        "closed", "eof", "receive", "retire_at", "retire_busy_at", "uses",
    )  # fmt: skip

    def __init__(self, pool: "ConnectionPool") -> None:
        super().__init__(pool.loop)
        self._pool = pool
        self.receive: Callable[[bytes], None] | None = None  # what takes the bytes; the receiver may change it
        self._receiver: Receiver | None = None
        self._fresh_until = 0.0
        self.retire_at = math.inf  # when it is too old to be used again, and when it is after many uses
        self.retire_busy_at = math.inf
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._deadline = 0.0
        self.uses = 0
        self.closed = False
        self.eof = False

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
        """Call the receiver's `overdue` at the loop's time `at`; a later call replaces an earlier one.

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
        """Pass the bytes on; an idle connection may get none and is closed (RFC 9112 section 9.2)."""
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
        """Leave the pool, and report the end to the request."""
        self.closed = True
        self.forget()
        if self._timer is not None:
            self._timer.cancel()
        self._pool.lost(self)
        receiver, self._receiver, self.receive = self._receiver, None, None
        if receiver is not None:
            receiver.connection_lost(self.eof and exc is None)

    def free(self, idle_s: float) -> None:
        """Give the connection back to its pool, where it may be idle for `idle_s` if it does not become too old."""
        self._receiver = self.receive = None
        if self._long_read:  # behind the end of the answer
            self.abort()
            return
        retire_at = self.retire_at if self.uses < _MANY_USES else self.retire_busy_at
        self._fresh_until = min(self._pool.loop.time() + idle_s, retire_at)
        self._pool.keep(self)

    def is_fresh(self, now: float) -> bool:
        """Return whether the upstream is unlikely to have closed it, and it is not too old."""
        return not self.closed and not self.eof and now < self._fresh_until

    def abort(self) -> None:
        """Close at once, and report it to nobody."""
        self._receiver = self.receive = None
        self.forget()
        if self.transport is not None:
            self.transport.abort()


def _own_lack(error: OSError) -> int | None:
    """Return the errno of what the edge itself has none left of; None: the failure is of the network or the endpoint.

    A resolver that gets no descriptor reports an unknown name, so that case is proved with a socket.
    """
    if isinstance(error, socket.gaierror):
        try:
            socket.socket().close()
        except OSError as lack:
            error = lack
    return error.errno if error.errno in (*_NO_DESCRIPTOR, errno.EADDRNOTAVAIL) else None


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def unreachable(error: OSError | UnicodeError) -> ConnectFailed:
    """Return what the failure to make a connection is for a request."""
    return _failed("The model's server is not reachable right now.", _cause_of(error))


def _failed(message: str, cause: str) -> ConnectFailed:
    failure = ConnectFailed(message, retry_after_s=_RETRY_AFTER_S)
    failure.cause = cause
    failure.proxy_error = _PROXY_ERRORS[cause.partition(":")[0]]
    if "certificate" in cause:
        failure.proxy_error = "tls_certificate_error"
    return failure


def _cause_of(error: OSError | UnicodeError) -> str:
    """Return why there is no connection, for operators: a word of a few, and more behind a colon."""
    if isinstance(error, ssl.SSLError):
        reason = getattr(error, "verify_message", "") or getattr(error, "reason", "") or "handshake failed"
        return f"tls: {reason.lower().replace('_', ' ')}"
    if isinstance(error, UnicodeError | socket.gaierror):
        return f"dns: {getattr(error, 'strerror', '') or error}"
    if error.errno is None:
        return f"unreachable: {error}"
    word = _CAUSES.get(error.errno)
    return word or f"unreachable: {os.strerror(error.errno).lower()}"


class Shortage:
    """What the pools of a process do when it has no descriptor or port left: they meet that together."""

    def __init__(self, pools: Callable[[], Iterable["ConnectionPool"]]) -> None:
        self._pools = pools
        self._log_at = -math.inf

    async def make_room(self) -> None:
        """Close every idle connection, and wait until their descriptors are free."""
        for pool in self._pools():
            pool.close_idle()
        await asyncio.sleep(0)  # an aborted transport closes its socket in the loop's next turn

    def failure(self, lack: int, now: float) -> Overloaded:
        """Return the error for the client; logged once an interval."""
        if now >= self._log_at:
            self._log_at = now + _LOG_INTERVAL_S
            name = errno.errorcode[lack]
            what = "descriptor" if lack in _NO_DESCRIPTOR else "local port"
            _log.error("no %s left for a connection to an upstream (%s): such requests get 503", what, name)
        kind = Overloaded if lack in _NO_DESCRIPTOR else OutOfPorts
        return kind("The edge has no room for this request now, try again in a moment.", retry_after_s=_RETRY_AFTER_S)


class ConnectionPool:
    """The idle connections to one address, newest first: the least likely to have been closed by the upstream."""

    def __init__(
        self, url: Url, tls: ssl.SSLContext | None, loop: asyncio.AbstractEventLoop, shortage: Shortage | None = None
    ) -> None:
        self.url = url
        self.loop = loop
        self.tls = tls
        self._shortage = shortage or Shortage(lambda: (self,))
        self._is_name = not _is_address(url.host)
        self._warn_at = -math.inf
        self._passed_over: dict[Any, float] = {}  # until when an address is tried last
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

    async def connect(self, timeout_s: float, max_age_s: float = math.inf) -> UpstreamConnection:
        """Return a new connection, which may be used again for `max_age_s`, less a share of it, or many times.

        Balancers behind a name, as those of Kubernetes, choose for a connection, not for a request: one that is kept
        for ever stays with the servers that were there when it was made.
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
            now, age_s = self.loop.time(), max_age_s * random.uniform(_YOUNGEST_SHARE, 1)
            connection.retire_at, connection.retire_busy_at = now + age_s, now + age_s * _BUSY_SHARE
        except TimeoutError:
            cause = f"timeout: no connection in {timeout_s:g} s"
            raise _failed("The model's server did not accept a connection in time.", cause) from None
        except ssl.SSLError as error:
            raise _failed("The model's server could not be reached securely.", _cause_of(error)) from None
        except (OSError, UnicodeError) as error:
            lack = _own_lack(error) if isinstance(error, OSError) else None
            if lack is not None:
                raise self._shortage.failure(lack, self.loop.time()) from None
            raise unreachable(error) from None
        return connection

    async def _open(self) -> tuple[asyncio.Transport, UpstreamConnection]:
        host = self.url.host
        if not self._is_name:
            return await self.loop.create_connection(
                lambda: UpstreamConnection(self), host, self.url.port, ssl=self.tls
            )
        sock = await self._first_to_answer()
        name = host if self.tls is not None else None
        return await self.loop.create_connection(
            lambda: UpstreamConnection(self), sock=sock, ssl=self.tls, server_hostname=name
        )

    async def _first_to_answer(self) -> socket.socket:
        """Return a connection to the first address of the name that accepts one (RFC 8305).

        The addresses of a family are tried in any order: a resolver may give them in the same one every time (RFC 6724
        section 6, rule 9), and the first would get all connections. An address that was passed over for another is
        tried last from then on: it costs its delay once.
        """
        now = self.loop.time()
        self._passed_over = {address: until for address, until in self._passed_over.items() if until > now}
        found = await self.loop.getaddrinfo(self.url.host, self.url.port, type=socket.SOCK_STREAM)
        found = self._without_metadata(found, now)
        families = [info[0] for info in found]
        random.shuffle(found)
        found.sort(key=lambda info: (info[4] in self._passed_over, families.index(info[0])))
        sock = await start_connection(found, happy_eyeballs_delay=_ATTEMPT_DELAY_S, loop=self.loop)
        first = found[0][4]
        if sock.getpeername() != first:
            self._passed_over[first] = now + _PASSED_OVER_S
        return sock

    def _without_metadata(self, found: list[Any], now: float) -> list[Any]:
        """Return the addresses of a name without those at which clouds give a machine's credentials to who asks.

        Who owns the name of an instance, or answers for it, chooses what it leads to; an operator who means such an
        address writes it himself. Raises `OSError` when no other is left.
        """
        kept = [info for info in found if not is_metadata_address(info[4][0])]
        if len(kept) < len(found) and now >= self._warn_at:
            self._warn_at = now + _LOG_INTERVAL_S
            what = "leads to an address at which clouds keep the credentials of a machine, which is not asked"
            _log.warning("upstream %s %s: write the address itself where it is meant", self.url.authority, what)
        if not kept:
            raise OSError("no address that may be asked")
        return kept

    def keep(self, connection: UpstreamConnection) -> None:
        """Take a connection back."""
        if connection.closed or self._closed:
            connection.abort()
            return
        self._idle[connection] = None
        if self._sweep is None:
            self._sweep = self.loop.call_later(_SWEEP_S, self._close_stale)

    def lost(self, connection: UpstreamConnection) -> None:
        """Forget a connection that ended."""
        self._idle.pop(connection, None)

    def _close_stale(self) -> None:
        now = self.loop.time()
        for connection in [each for each in self._idle if not each.is_fresh(now)]:
            del self._idle[connection]
            connection.abort()
        self._sweep = self.loop.call_later(_SWEEP_S, self._close_stale) if self._idle else None

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
