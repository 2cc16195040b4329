"""Time: how long an upstream has been silent, when a stream gets a heartbeat, and how slowly a client may read.

No clock is read per token. Each of the three polls the answer a few times in the time that it stands for, so it acts
between one and one and a quarter of that.
"""

import asyncio
from collections.abc import Callable
from typing import Final, Protocol

from edge.client.connection import ClientConnection
from edge.exchange import Exchange
from edge.relay.answer import ENDED, Answer
from edge.relay.terms import State

POLLS: Final = 4  # for a sign of life, in the time after which its absence counts
_SLOW_CLIENT_CHECK_S: Final = 5.0
_SLOW_CLIENT_PATIENCE: Final = 6  # checks in a row below the floor rate, so half a minute, before a client is cut


class Silence:
    """Since when an upstream has sent nothing, as far as polls show; `since` is the loop's time."""

    __slots__ = ("_answer", "_chunk", "_reads", "since")

    def __init__(self, answer: Answer, now: float) -> None:
        self._answer = answer
        self._reads, self._chunk, self.since = answer.reads, answer.last_chunk, now

    def poll(self, now: float, *, paused: bool) -> float:
        """Return since when; a chunk that passed since the last poll, however, has passed now."""
        answer = self._answer
        if paused or answer.reads != self._reads or answer.last_chunk is not self._chunk:
            self._reads, self._chunk, self.since = answer.reads, answer.last_chunk, now
        return self.since


class Beaten(Protocol):
    """What a client waits for, and may get heartbeats meanwhile: an answer, or a stream that looks for one."""

    @property
    def exchange(self) -> Exchange:
        """The request."""

    @property
    def state(self) -> State:
        """Whether it is over."""

    @property
    def sent_bytes(self) -> int:
        """What the client has got."""

    def may_beat(self) -> bool:
        """Whether a heartbeat can stand here."""

    def beat(self) -> None:
        """Give the client a heartbeat."""


class Pausing(Protocol):
    """Whoever knows whether the client's buffer is full."""

    paused: bool


class Heartbeat:
    """Sends a heartbeat whenever the client has got nothing for `every_s`, whoever was to send it before."""

    __slots__ = ("_answer", "_every_s", "_loop", "_owner", "_seen", "_timer")

    def __init__(self, answer: Beaten, owner: Pausing, every_s: float, loop: asyncio.AbstractEventLoop) -> None:
        self._answer = answer
        self._owner = owner
        self._every_s = every_s
        self._loop = loop
        self._seen = answer.sent_bytes or -1  # an answer that begins is waited for from now on
        self._poll()

    def _poll(self) -> None:
        now, answer = self._loop.time(), self._answer
        if answer.state is ENDED:
            return
        exchange = answer.exchange
        if self._owner.paused or answer.sent_bytes != self._seen:
            exchange.silent_since = now
        elif now - exchange.silent_since >= self._every_s and answer.may_beat():
            answer.beat()
            exchange.silent_since = now
        self._seen = answer.sent_bytes
        left_s, poll_s = exchange.silent_since + self._every_s - now, self._every_s / POLLS
        self._timer = self._loop.call_later(left_s if 0 < left_s < poll_s else poll_s, self._poll)

    def stop(self) -> None:
        """Send no more."""
        self._timer.cancel()


class SlowClient:
    """Watches a client whose buffer is full, and cuts one that reads below the floor rate for half a minute."""

    __slots__ = ("_checks", "_client", "_cut", "_floor", "_queued_bytes", "_timer")

    def __init__(self, client: ClientConnection, min_rate_bytes_per_s: int, cut: Callable[[], None]) -> None:
        self._client = client
        self._floor = min_rate_bytes_per_s * _SLOW_CLIENT_CHECK_S
        self._cut = cut
        self._checks = 0
        self._queued_bytes = client.unread_bytes()
        self._timer = client.loop.call_later(_SLOW_CLIENT_CHECK_S, self._check)

    def _check(self) -> None:
        unread = self._client.unread_bytes()
        self._checks = self._checks + 1 if self._queued_bytes - unread < self._floor else 0
        self._queued_bytes = unread
        if self._checks >= _SLOW_CLIENT_PATIENCE:
            self._cut()
        else:
            self._timer = self._client.loop.call_later(_SLOW_CLIENT_CHECK_S, self._check)

    def stop(self) -> None:
        """Watch no more: the client has room again."""
        self._timer.cancel()
