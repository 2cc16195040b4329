"""What is sent: scenarios as raw requests; and the check of what comes back."""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import orjson

from loadtest.upstream import DONE, read_event, usage_event

_PATHS: Final = {"chat": "chat/completions"}  # other kinds are called as their path
_NUMBER: Final = b"[number]"  # as long as what takes its place, so that the length of the body stays
_SSE_FIELDS: Final = (b"event", b"id", b"retry")
# What a model writes, in a delta of any engine; the first frame of many has a role and an empty text.
_CONTENT: Final = ("content", "reasoning_content", "reasoning", "refusal", "tool_calls", "function_call", "audio")


@dataclass(frozen=True, slots=True)
class Scenario:
    """One kind of request; sizes in characters of the prompt and tokens of the answer."""

    kind: str
    stream: bool
    input_len: int
    output_len: int

    def body(self, model: str, members: Mapping[str, object]) -> bytes:
        """Return the JSON body, `members` added; its prompt begins with a place for a number (see `numbered`)."""
        text = (_NUMBER.decode() + " word" * (self.input_len // 5 + 1))[: self.input_len]
        asked: dict[str, object] = {"model": model}
        if self.kind == "chat":
            asked["messages"] = [{"role": "user", "content": text}]
        elif self.kind == "completions":
            asked["prompt"] = text
        else:
            asked["input"] = text
        if self.kind != "embeddings":
            asked["max_tokens"] = self.output_len
        if self.stream:
            asked |= {"stream": True, "stream_options": {"include_usage": True}}
        return orjson.dumps({**asked, **members})


SCENARIOS: Final = {
    "chat-stream": Scenario("chat", stream=True, input_len=200, output_len=64),
    "chat": Scenario("chat", stream=False, input_len=200, output_len=64),
    "completions-stream": Scenario("completions", stream=True, input_len=200, output_len=64),
    "completions": Scenario("completions", stream=False, input_len=200, output_len=64),
    "embeddings": Scenario("embeddings", stream=False, input_len=200, output_len=0),
    "long-prompt": Scenario("chat", stream=True, input_len=100_000, output_len=64),
    "body-1mb": Scenario("chat", stream=True, input_len=1_000_000, output_len=16),  # a picture in a message
    "body-10mb": Scenario("chat", stream=True, input_len=10_000_000, output_len=16),
}


def raw_request(
    kind: str, body: bytes, *, host: str, key: str, base_path: str = "/v1", headers: Mapping[str, str] | None = None
) -> bytes:
    """Return a request as an SDK of today sends it."""
    fields = {
        "Host": host,
        "Authorization": f"Bearer {key}",
        "Content-Type": "application/json",
        "Accept": "application/json",
        "User-Agent": "OpenAI/Python 2.54.0",
        "X-Stainless-Lang": "python",
        "X-Stainless-Package-Version": "2.54.0",
        "Accept-Encoding": "identity",
        "Content-Length": str(len(body)),
        **(headers or {}),
    }
    lines = [
        f"POST {base_path}/{_PATHS.get(kind, kind)} HTTP/1.1",
        *(f"{name}: {value}" for name, value in fields.items()),
    ]
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + body


def numbered(raw: bytes, number: int) -> bytes:
    """Return a request whose prompt is its own from the first character on, so that no prefix cache answers for it."""
    return raw.replace(_NUMBER, b"%08x" % (number & 0xFFFFFFFF), 1)


@dataclass(slots=True)
class Answer:
    """A reader that checks an answer as it comes: any OpenAI-compatible server's, or `exact` tokens of our upstream.

    `choice_times`: when each event with a choice came, `content_times`: of those, when each with something that a model
    wrote did; `last_at`: when the last one with data did. `digest` is that of all content. `problem`: what was wrong
    first, empty while nothing is; complete only after `end`.
    """

    stream: bool
    exact: int | None = None
    choice_times: list[float] = field(default_factory=list)
    content_times: list[float] = field(default_factory=list)
    usage: dict[str, int] = field(default_factory=dict)
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
            document = orjson.loads(body)
            if document.get("error"):
                self._wrong("an error with a good status")
            elif not (document.get("choices") or document.get("data")):
                self._wrong("an answer without content")
            self.usage = _usage_in(document)
        except (orjson.JSONDecodeError, AttributeError, TypeError):
            self._wrong("an answer that is no JSON object")

    def end(self) -> str:
        """Return what was wrong, now that the answer has come to its end."""
        if self.stream and not self.done:
            self._wrong("a stream without [DONE]")
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
            if self.done:
                self._wrong("an event after [DONE]")
            if data == b"[DONE]":
                self.done = True
                return
            document = orjson.loads(data)
            if document.get("error") or document.get("object") == "error":
                self._wrong("an error inside the stream")
            self.usage = _usage_in(document) or self.usage
            if choices := document.get("choices"):
                self.choice_times.append(now)
                if any(map(_has_content, choices)):
                    self.content_times.append(now)
        except orjson.JSONDecodeError:
            self._wrong("an event whose data is no JSON")
        except (AttributeError, TypeError):
            self._wrong("an event whose data is no JSON object")
        except ValueError as error:
            self._wrong(str(error))

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


def _has_content(choice: dict[str, Any]) -> bool:
    """Return whether a choice of an event has something that a model wrote."""
    delta = choice.get("delta") or {}
    return bool(choice.get("text")) or any(delta.get(name) for name in _CONTENT)


def _usage_in(document: dict[str, Any]) -> dict[str, int]:
    """Return the counts of an answer's usage; what is no count tells nothing."""
    usage = document.get("usage")
    if not isinstance(usage, dict):
        return {}
    return {name: count for name, count in usage.items() if isinstance(count, int)}


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
