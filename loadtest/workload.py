"""What is sent: scenarios as raw requests, and what is made of the events that come back."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import orjson

from loadtest.upstream import DONE, read_event

_PATHS: Final = {"chat": "chat/completions", "completions": "completions", "embeddings": "embeddings"}


@dataclass(frozen=True, slots=True)
class Scenario:
    """One kind of request; sizes in characters of the prompt and tokens of the answer."""

    kind: str
    stream: bool
    input_len: int
    output_len: int

    def body(self, model: str, **members: object) -> bytes:
        """Return the JSON body, `members` added."""
        text = "x" * self.input_len
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
        return orjson.dumps(asked | members)


SCENARIOS: Final = {
    "chat-stream": Scenario("chat", stream=True, input_len=200, output_len=64),
    "chat": Scenario("chat", stream=False, input_len=200, output_len=64),
    "completions-stream": Scenario("completions", stream=True, input_len=200, output_len=64),
    "embeddings": Scenario("embeddings", stream=False, input_len=200, output_len=0),
    "long-prompt": Scenario("chat", stream=True, input_len=100_000, output_len=64),
    "image": Scenario("chat", stream=True, input_len=10_000_000, output_len=16),
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
    lines = [f"POST {base_path}/{_PATHS[kind]} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + body


@dataclass(slots=True)
class Tokens:
    """A reader that keeps what came and when; what it means is asked after the answer's end, off the hot path."""

    times: list[float] = field(default_factory=list)
    events: list[bytes] = field(default_factory=list)
    whole: bytes = b""

    def event(self, event: bytes, now: float) -> None:
        """Keep an event."""
        self.times.append(now)
        self.events.append(event)

    def body(self, body: bytes) -> None:
        """Keep a body."""
        self.whole = body


@dataclass(slots=True)
class Told:
    """What an answer said: when its content came, how many tokens it counted, and what was wrong with it."""

    content_times: list[float]
    output_tokens: int
    input_tokens: int
    problem: str


def understand(tokens: Tokens, stream: bool) -> Told:
    """Return what an answer of any OpenAI-compatible server said; a stream is checked event by event."""
    times: list[float] = []
    usage: dict[str, int] = {}
    try:
        if not stream:
            usage = orjson.loads(tokens.whole).get("usage") or {}
            return Told([], int(usage.get("completion_tokens", 0)), int(usage.get("prompt_tokens", 0)), "")
        done = False
        for event, at in zip(tokens.events, tokens.times, strict=True):
            if done:
                return Told(times, 0, 0, "an event after [DONE]")
            if event == DONE:
                done = True
                continue
            if event.startswith(b":"):
                continue
            if not event.startswith(b"data: "):
                return Told(times, 0, 0, "an event that is no data")
            document = orjson.loads(event[6:])
            if "error" in document:
                return Told(times, 0, 0, "an error inside the stream")
            usage = document.get("usage") or usage
            if document.get("choices"):
                times.append(at)
    except (orjson.JSONDecodeError, AttributeError, TypeError, ValueError):
        return Told(times, 0, 0, "content that is not an OpenAI answer")
    problem = "" if done else "no [DONE]"
    return Told(times, int(usage.get("completion_tokens", len(times))), int(usage.get("prompt_tokens", 0)), problem)


@dataclass(slots=True)
class Stamps:
    """A reader of the benchmark upstream's events: every byte checked, and how long each event was on its way."""

    expected: int
    lags_s: list[float] = field(default_factory=list)
    count: int = 0
    done: bool = False
    changed: bool = False

    def event(self, event: bytes, now: float) -> None:
        """Check an event and note its lag."""
        if self.count < self.expected:
            try:
                number, sent_ns = read_event(event)
            except ValueError:
                self.changed = True
            else:
                self.changed = self.changed or number != self.count
                self.lags_s.append(time.monotonic() - sent_ns / 1e9)
        elif event == DONE:
            self.done = True
        self.count += 1

    def body(self, body: bytes) -> None:
        """Take what was to be a stream and is none."""
        self.changed = True

    @property
    def exact(self) -> bool:
        """Whether every event came, in order and unchanged: the tokens, the usage and the end."""
        return self.done and not self.changed and self.count == self.expected + 2
