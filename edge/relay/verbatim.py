"""An answer in the upstream's own framing: the usual one."""

from typing import Final

from edge.metering.meters import Meter
from edge.relay.echo import EventEcho
from edge.relay.framed import Framed
from edge.relay.heads import takes_events
from edge.relay.terms import Attempt, Changes
from edge.wire.http1 import LAST_CHUNK, Chunked, Framing, Irregular, Length, Malformed, ResponseHead, UntilClose, chunk

NO_ENDING: Final = b"\0"  # which no chunk has


class Verbatim:
    """Lets what is understood pass as the same bytes; `streams` that they are events, some of which `meter` `hides`.

    `framed` is what the answer has to go on through, once it cannot pass as it is: a chunk has an extension or the body
    a trailer, or a read ends within a chunk or an event, of which the client may not have all.
    """

    __slots__ = ("_framing", "_hides", "_meter", "_streams", "broken", "ending", "framed", "left")

    def __init__(self, framing: Framing, meter: Meter, *, streams: bool, hides: bool) -> None:
        self._framing = framing
        self._meter = meter
        self._streams = streams
        self._hides = hides
        self.framed: Framed | None = None
        self.ending = NO_ENDING  # of a chunk with one event that need not be shown to the meter
        self.left = b""  # bytes that are not understood yet
        self.broken = False  # the upstream broke the rules after what was returned last

    def feed(self, data: bytes) -> bytes:
        """Return what the client gets for `data`: the same object, unless something was held back or changed."""
        if self.left:
            data = self.left + data
            self.left = b""
        framing = self._framing
        payload: list[bytes] = []
        try:
            understood = framing.scan(data, payload, plain=True)
        except Irregular:
            assert isinstance(framing, Chunked)  # no other framing has rules to break
            passed = self._metered(data[: framing.consumed], payload)
            framed = self.framed = self.framed or self._new_framed()
            return passed + framed.feed(data[framing.consumed :])
        except Malformed:
            assert isinstance(framing, Chunked)
            passed = self._metered(data[: framing.consumed], payload)
            (self.framed or self).broken = True
            return passed
        if understood != len(data):
            self.left = data[understood:]
            data = data[:understood]
        return self._metered(data, payload)

    def _metered(self, data: bytes, payload: list[bytes]) -> bytes:
        """Return what the client gets for `data`, whose content is `payload`."""
        meter, framing = self._meter, self._framing
        content = payload[0] if len(payload) == 1 else b"".join(payload)
        passed = meter.feed(content)
        if not self._streams:
            return data
        between = framing.between_chunks and not meter.holds
        ending = meter.ending if between and not self.left else b""
        self.ending = ending + b"\r\n" if ending else NO_ENDING
        if not self._hides or (between and passed is content):
            return data
        if between:
            return chunk(passed) + LAST_CHUNK if framing.done else chunk(passed)
        framed = self.framed = self._new_framed()
        framed.left = self.left
        return framed.chunk(passed) + (framed.end() if framing.done else b"")

    def _new_framed(self) -> Framed:
        return Framed(self._framing, self._meter, bare=False, whole_events=self._hides)


def body_for(
    head: ResponseHead, meter: Meter, attempt: Attempt, *, bare: bool, streams: bool, collected: bool
) -> Verbatim | Framed:
    """Return what an answer passes through: verbatim, unless that cannot be.

    `bare` is a client that knows no chunks; `collected` says that some of the content was taken out of its framing.
    """
    framing, hides, adds = head.framing, False, False
    echo: Changes | None = None
    if takes_events(head, streams):
        hides = attempt.metering.changes
        echo = attempt.seam or (EventEcho(attempt.echo) if attempt.echo is not None else None)
        adds = bool(attempt.heartbeat_s or hides) and isinstance(framing, Length)
    if isinstance(framing, UntilClose) or (bare and framing.chunked) or collected or echo is not None or adds:
        return Framed(framing, meter, bare=bare, whole_events=hides or echo is not None, echo=echo)
    return Verbatim(framing, meter, streams=streams, hides=hides)
