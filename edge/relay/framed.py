"""An answer in chunks of our own: the exception, for what cannot pass as the upstream framed it.

HTTP/1.0 clients, chunk extensions and trailers, bodies that the close ends, `model_echo`, `heartbeat` where the
upstream gave a length, and streams with events to hide whose reads end elsewhere than their chunks and events.
"""

from edge.metering.meters import Meter
from edge.relay.terms import Changes
from edge.sse import EVENT_ENDS
from edge.wire.http1 import EVENT_END_BYTES, LAST_CHUNK, Framing, Malformed, chunk


class Framed:
    """Takes the upstream's framing away and puts ours on; `bare` for a client that knows no chunks.

    `whole_events`: the client gets no others, since `meter` may hide some, or `echo` changes them.
    """

    __slots__ = ("_bare", "_echo", "_framing", "_meter", "_tail", "broken", "left")

    def __init__(
        self, framing: Framing, meter: Meter, *, bare: bool, whole_events: bool, echo: Changes | None = None
    ) -> None:
        self._framing = framing
        self._meter = meter
        self._bare = bare
        self._echo = echo
        # How what the client got ends; with whole events it stands between two from the start.
        self._tail = EVENT_ENDS[0] if whole_events else framing.tail
        self.left = b""  # bytes that are not understood yet
        self.broken = False  # the upstream broke the rules after what was returned last

    def feed(self, data: bytes) -> bytes:
        """Return what the client gets for `data`, with the last chunk when the answer ends."""
        payload: list[bytes] = []
        data = self.left + data
        try:
            self.left = data[self._framing.scan(data, payload) :]
        except Malformed:
            self.broken, self.left = True, b""
        content = self.metered(b"".join(payload))
        return self.chunk(content) + (self.end() if self._framing.done and not self.broken else b"")

    def metered(self, content: bytes) -> bytes:
        """Return what the client gets of content that the upstream sent."""
        content = self._meter.feed(content)
        if self._echo is None:
            return content
        content = self._echo.feed(content)
        self.broken = self.broken or self._echo.broken
        return content

    def end(self) -> bytes:
        """Return what completes the answer."""
        held = self._meter.close()
        if self._echo is not None:
            held = self._echo.feed(held) + self._echo.close()
            if self._echo.broken:
                self.broken = True
                return self.chunk(held)
        return self.chunk(held) if self._bare else self.chunk(held) + LAST_CHUNK

    def chunk(self, content: bytes) -> bytes:
        """Return content as the client gets it."""
        self._tail = (self._tail + content[-EVENT_END_BYTES:])[-EVENT_END_BYTES:]
        return content if self._bare else chunk(content)

    @property
    def between_events(self) -> bool:
        """Whether an event of our own can stand behind what was returned."""
        return self._tail.endswith(EVENT_ENDS)

    @property
    def within_event(self) -> bool:
        """Whether the upstream began an event that it has not ended."""
        return not self.between_events or self._meter.holds or (self._echo is not None and self._echo.holds)
