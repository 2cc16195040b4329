"""What a relay is given, what it asks of others, and what it raises."""

import enum
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from edge.errors import BrokenStream, EdgeError
from edge.exchange import End, Exchange, Usage
from edge.metering.meters import Meter, Metering
from edge.protocols import Begun
from edge.wire.http1 import LAST_CHUNK, chunk


class State(enum.Enum):
    """What an answer waits for: the method of `Answer` of that name receives its bytes."""

    HEAD = "head"
    OPENING = "opening"  # the first byte of the body, or the first event of a stream, which may be an error
    COLLECTING = "collecting"  # all of a JSON answer, in which `model` is changed
    REFUSED = "refused"  # the body of an error
    VERBATIM = "verbatim"
    FRAMED = "framed"
    ENDED = "ended"


@dataclass(frozen=True, slots=True)
class Timeouts:
    """How long an answer may take, in seconds, and how slowly a client may read it, in bytes a second.

    `max_connection_age_s` is how long a connection that is made may be used again.
    """

    connect_timeout_s: float
    first_byte_timeout_s: float
    idle_timeout_s: float
    min_client_rate_bytes_per_s: int
    max_connection_age_s: float = math.inf


class Delivered(Protocol):
    """Keeps what a client gets of a stream that may go on elsewhere, while `is_whole`."""

    is_whole: bool

    def passing(self, write: Callable[[bytes], None], let_go: Callable[[], None]) -> Callable[[bytes], None]:
        """Return what writes to the client as `write` does; `let_go` is called once no more is kept."""


class Changes(Protocol):
    """Changes the events of one stream; gives and holds whole ones, and `holds` tells whether it does.

    `broken`: the stream is not one that may go on.
    """

    broken: bool

    @property
    def holds(self) -> bool:
        """Whether an event has begun and not ended."""

    def feed(self, content: bytes) -> bytes:
        """Return the events that `content` completes, as the client gets them."""

    def close(self) -> bytes:
        """Return what is held: the stream has ended in order."""


class Seam(Changes, Protocol):
    """Makes one answer of a stream that broke and of the answer that goes on with it."""

    def usage(self, second: Usage) -> Usage:
        """Return what the whole answer used, by what the second one did."""


@dataclass(slots=True)
class Attempt:
    """What one endpoint is asked, and how its answer is passed on.

    `body` is in pieces, since a long one is not joined, and `body_bytes` long. `release` lets go of the client's own.
    `heartbeat_s` is the silence after which a stream gets a heartbeat, 0 for none; `echo` the model's name that the
    answer shall have, None for the upstream's own. `is_instance`: the endpoint belongs to the caller. `keep` notes the
    id of a response, which the endpoint keeps. `began` notes that the answer begins, and whether it is a stream.
    `delivered` keeps what the client gets, None where nobody goes on with it; `seam` joins the answer to one that broke
    with `broken_end`.
    """

    head: bytes
    body: Sequence[bytes | memoryview]
    body_bytes: int
    metering: Metering
    timeouts: Timeouts
    release: Callable[[], None]
    heartbeat_s: float = 0
    echo: str | None = None
    is_instance: bool = False
    keep: Callable[[str], None] | None = None
    began: Callable[[bool], None] | None = None
    delivered: Delivered | None = None
    seam: Seam | None = None
    broken_end: End = End.UPSTREAM_CUT

    @property
    def differs(self) -> bool:
        """Whether the answer is not one that could go on with the first."""
        return self.seam is not None and self.seam.broken

    def note_kept(self, meter: Meter | None, *, whole: bool) -> None:
        """Note which response the endpoint keeps, as soon as the answer says it, so that others can ask for it."""
        if self.keep is not None and meter is not None and (response_id := meter.response_id(whole)):
            self.keep(response_id)
            self.keep = None

    def let_go(self) -> None:
        """Let go of the bytes that were asked: nobody is asked them again."""
        self.body = ()
        self.release()


class Settlement(Protocol):
    """What an accepted request owes."""

    def note(self, usage: Usage) -> None:
        """Note what was used so far, of an answer that may go on elsewhere."""

    def settle(self, end: End, usage: Usage | None = None) -> None:
        """Charge and record the request, before the last bytes of its answer go out; a second call does nothing."""


class Client(Protocol):
    """The client, as an answer knows it: whether this is its connection's last answer, and whether it knows chunks."""

    last: bool
    bare: bool

    def reset(self) -> None:
        """End its connection so that nobody takes the answer for complete."""


class Owner(Protocol):
    """What an answer makes happen, in the order in which it does; `paused` while its client's buffer is full."""

    paused: bool

    def open(self, status: int) -> Callable[[bytes], None]:
        """Let the client have bytes from now on; return what writes them."""

    def began(self) -> None:
        """Note that the first bytes of the upstream's body are here."""

    def let_go(self) -> None:
        """Let go of the request's body: nobody else is asked."""

    def settle(self, end: End) -> None:
        """Charge and record the request."""

    def interrupt(self, end: End) -> bool:
        """End the attempt but not the answer; return whether another endpoint may go on with that."""

    def leave(self, idle_s: float) -> None:
        """Part from the upstream, whose connection may be idle for `idle_s`, 0 to close it; let the request end."""

    def fail(self, error: Exception, idle_s: float = 0.0) -> None:
        """End an answer of which the client has no byte, or nothing but heartbeats."""


class StaleConnection(Exception):
    """A reused connection died at once, before it gave a byte: it had been closed, and nothing was processed."""


class UpstreamAnsweredError(Exception):
    """The upstream answered with an error; `body` is what it sent, at most 64 KiB.

    `safe_elsewhere`: it was asked for no answer yet, so another endpoint may be asked, whatever the status.
    """

    def __init__(self, status: int, headers: dict[bytes, bytes], body: bytes, *, safe_elsewhere: bool = False) -> None:
        super().__init__(status)
        self.safe_elsewhere = safe_elsewhere
        self.status = status
        self.headers = headers
        self.body = body


class FailedInStream(Exception):
    """The upstream failed after a heartbeat had begun the answer, and the client got an event that says so.

    `error` is what would have been raised otherwise.
    """

    def __init__(self, error: EdgeError | UpstreamAnsweredError) -> None:
        super().__init__(error)
        self.error = error


_CUT: Final = "The connection to the model's server was lost before the answer was complete."
_BROKEN: Final = {
    End.DRAINED: "The edge had to restart before the answer was complete.",
    End.IDLE_TIMEOUT: "The model's server stopped sending before the answer was complete.",
}


def broken_stream(end: End) -> BrokenStream:
    """Return the error with which a stream that began ends."""
    return BrokenStream(_BROKEN.get(end, _CUT))


def last_event(exchange: Exchange, error: EdgeError, begun: Begun, *, bare: bool) -> bytes:
    """Return an error as the last event of a stream, and the end of the answer; `bare` for one without chunks."""
    event = exchange.operation.protocol.error_event(error, exchange.request_id, begun)
    return event if bare else chunk(event) + LAST_CHUNK
