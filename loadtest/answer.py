"""The check of what comes back: a stream or a whole answer of any dialect, or exactly the bytes of our upstream."""

import zlib
from dataclasses import dataclass, field
from typing import Any, Final

import orjson

from loadtest.dialects import DIALECTS, Dialect, Said
from loadtest.upstream import DONE, read_event, usage_event

_SSE_FIELDS: Final = (b"event", b"id", b"retry")


@dataclass(slots=True)
class Answer:
    """A reader that checks an answer as it comes: any server's of the dialect, or `exact` tokens of our upstream.

    `choice_times`: when each event with a choice came, `content_times`: of those, when each with something that a model
    wrote did; `last_at`: when the last one with data did. `text` is what a reader sees, `digest` that of all content.
    `problem`: what was wrong first, empty while nothing is; complete only after `end`.
    """

    stream: bool
    exact: int | None = None
    dialect: Dialect = DIALECTS["chat"]
    choice_times: list[float] = field(default_factory=list)
    content_times: list[float] = field(default_factory=list)
    usage: dict[str, int] = field(default_factory=dict)
    text: str = ""
    digest: int = 0
    done: bool = False
    problem: str = ""
    last_at: float = 0.0

    @property
    def output_tokens(self) -> int:
        """How many tokens the usage tells, else how many events had content."""
        return self.usage.get("completion_tokens", len(self.content_times))

    @property
    def is_counted(self) -> bool:
        """Whether the usage tells the tokens of the answer; else events are counted, however many tokens each has."""
        return "completion_tokens" in self.usage

    @property
    def input_tokens(self) -> int:
        """How many tokens the usage tells."""
        return self.usage.get("prompt_tokens", 0)

    def event(self, event: bytes, now: float) -> None:
        """Take an event of a stream."""
        self.digest = zlib.crc32(event, self.digest)
        if self.exact is None:
            self._any_event(event, now)
        else:
            self.last_at = now
            self._exact_event(event, now, self.exact)

    def body(self, body: bytes) -> None:
        """Take the body of an answer that is no stream."""
        self.digest = zlib.crc32(body)
        if self.stream:
            self._wrong("an answer that is no stream")
            return
        try:
            said = self.dialect.answer(orjson.loads(body))
            if said.is_error:
                self._wrong("an error with a good status")
            elif not said.is_choice:
                self._wrong("an answer without content")
            self.text, self.usage = said.text, said.usage or {}
        except (orjson.JSONDecodeError, AttributeError, TypeError):
            self._wrong("an answer that is no JSON object")

    def end(self) -> str:
        """Return what was wrong, now that the answer has come to its end."""
        if self.stream and not self.done:
            self._wrong("a stream without [DONE]" if self.dialect.ends_with_done else "a stream without its last event")
        elif self.stream and not self.choice_times:
            self._wrong("a stream without content")
        elif self.exact is not None and not self.usage:
            self._wrong("a stream without usage")
        return self.problem

    def _wrong(self, problem: str) -> None:
        self.problem = self.problem or problem

    def _any_event(self, event: bytes, now: float) -> None:
        try:
            data = _data(event)
            if data is None:  # a comment keeps a connection alive, and shows nothing of who answers
                return
            self.last_at = now
            if data == b"[DONE]":
                if self.done and self.dialect.ends_with_done:
                    self._wrong("an event after [DONE]")
                self.done = True
                return
            if self.done:
                self._wrong("an event after [DONE]" if self.dialect.ends_with_done else "an event after the last")
            self._take(self.dialect.event(orjson.loads(data)), now)
        except orjson.JSONDecodeError:
            self._wrong("an event whose data is no JSON")
        except (AttributeError, TypeError):
            self._wrong("an event whose data is no JSON object")
        except ValueError as error:
            self._wrong(str(error))

    def _take(self, said: Said, now: float) -> None:
        if said.is_error:
            self._wrong("an error inside the stream")
        if said.usage:
            self.usage |= said.usage
        if said.is_choice:
            self.choice_times.append(now)
            if said.is_content:
                self.content_times.append(now)
                self.text += said.text
        if said.is_end:
            self.done = True

    def _exact_event(self, event: bytes, now: float, exact: int) -> None:
        count = len(self.content_times)
        if self.done:
            self._wrong("an event after [DONE]")
        elif count < exact:
            try:
                number, _ = read_event(event)
            except ValueError as error:
                self._wrong(str(error))
            else:
                if number != count:
                    self._wrong("events lost, doubled or swapped")
            self.choice_times.append(now)
            self.content_times.append(now)
        elif not self.usage:
            if event + b"\n\n" != usage_event(exact):
                self._wrong("an event differs from what was sent")
            self.usage = {"completion_tokens": exact}
        elif event == DONE:
            self.done = True
        else:
            self._wrong("an event differs from what was sent")


@dataclass(slots=True)
class Kept:
    """A reader that only keeps what came and when: what it means is asked after the end, off the hot path."""

    times: list[float] = field(default_factory=list)
    events: list[bytes] = field(default_factory=list)
    whole: bytes | None = None

    def event(self, event: bytes, now: float) -> None:
        """Keep an event."""
        self.times.append(now)
        self.events.append(event)

    def body(self, body: bytes) -> None:
        """Keep a body."""
        self.whole = body

    def tell(self, answer: Answer) -> None:
        """Tell another reader all that came."""
        for event, at in zip(self.events, self.times, strict=True):
            answer.event(event, at)
        if self.whole is not None:
            answer.body(self.whole)


def refusal(status: int, body: bytes | None) -> str:
    """Return the name of an answer whose status is not 2xx, with the code of its error when it tells one."""
    try:
        error: Any = orjson.loads(body or b"")["error"]
        code = error.get("code") or error.get("type") or ""
    except (orjson.JSONDecodeError, AttributeError, KeyError, TypeError):
        code = ""
    return f"status {status} {code}".strip()


def _data(event: bytes) -> bytes | None:
    """Return the data of an event, None when it has none; raises `ValueError` for what is no event stream.

    https://html.spec.whatwg.org/multipage/server-sent-events.html#parsing-an-event-stream
    """
    if event.startswith(b"data: ") and b"\n" not in event:
        return event[6:]
    data = []
    for line in event.splitlines():
        name, _, value = line.partition(b":")
        if name == b"data":
            data.append(value.removeprefix(b" "))
        elif name and name not in _SSE_FIELDS:
            raise ValueError("a line that belongs to no event")
    return b"\n".join(data) if data else None
