"""What is sent: scenarios, conversations made of them, and raw requests."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import orjson

from loadtest.dialects import DIALECTS, Message
from loadtest.pictures import Picture

_NUMBER: Final = b"[number]"  # as long as what takes its place, so that the length of the body stays


@dataclass(frozen=True, slots=True)
class Scenario:
    """One kind of request; sizes in characters of the prompt and tokens of the answer."""

    kind: str
    stream: bool
    input_len: int
    output_len: int

    def body(self, model: str, members: Mapping[str, object]) -> bytes:
        """Return the JSON body, `members` added; its prompt begins with a place for a number (see `numbered`)."""
        messages = [{"role": "user", "content": _text(_NUMBER.decode(), self.input_len)}]
        return orjson.dumps({**DIALECTS[self.kind].ask(model, messages, self.output_len, self.stream), **members})


SCENARIOS: Final = {
    "chat-stream": Scenario("chat", stream=True, input_len=200, output_len=64),
    "chat": Scenario("chat", stream=False, input_len=200, output_len=64),
    "completions-stream": Scenario("completions", stream=True, input_len=200, output_len=64),
    "completions": Scenario("completions", stream=False, input_len=200, output_len=64),
    "messages-stream": Scenario("messages", stream=True, input_len=200, output_len=64),
    "messages": Scenario("messages", stream=False, input_len=200, output_len=64),
    "responses-stream": Scenario("responses", stream=True, input_len=200, output_len=64),
    "responses": Scenario("responses", stream=False, input_len=200, output_len=64),
    "embeddings": Scenario("embeddings", stream=False, input_len=200, output_len=0),
    "long-prompt": Scenario("chat", stream=True, input_len=100_000, output_len=64),
    "body-1mb": Scenario("chat", stream=True, input_len=1_000_000, output_len=16),  # a picture in a message
    "body-10mb": Scenario("chat", stream=True, input_len=10_000_000, output_len=16),
}


@dataclass(frozen=True, slots=True)
class Turn:
    """One request of a conversation: what is said, `delay_s` after the answer before, and how long it may answer.

    `members` are added to the body; `output_len` 0 says nothing of the length.
    """

    messages: Sequence[Message]
    output_len: int = 0
    delay_s: float = 0.0
    members: Mapping[str, Any] = field(default_factory=dict)


class Source(Protocol):
    """Where conversations come from; most have one turn."""

    def conversation(self, number: int) -> Sequence[Turn]:
        """Return the turns of the conversation `number`, from 0 on."""


@dataclass(frozen=True, slots=True)
class Made:
    """Conversations that are made up: each text is its own from the first character on, or behind a shared prefix.

    `prefix_len`: characters of a system message, of which there are `prefixes`. `inputs`: texts in one request of
    embeddings. `think_time_s`: between an answer and what is asked next.
    """

    scenario: Scenario
    seed: int = 0
    prefix_len: int = 0
    prefixes: int = 1
    turns: int = 1
    think_time_s: float = 0.0
    inputs: int = 1
    picture: Picture | None = None
    pictures: int = 1

    def conversation(self, number: int) -> Sequence[Turn]:
        """Return the turns of the conversation `number`."""
        first = self._messages(number)
        if self.prefix_len:
            first.insert(0, {"role": "system", "content": _text(_hex(number % self.prefixes), self.prefix_len)})
        output_len = self.scenario.output_len
        more = [Turn(self._messages(number), output_len, self.think_time_s) for _ in range(self.turns - 1)]
        return [Turn(first, output_len), *more]

    def _messages(self, number: int) -> list[Message]:
        own = (self.seed << 20) + number * self.inputs
        texts = [_text(_hex(own + at), self.scenario.input_len) for at in range(self.inputs)]
        if self.picture is None:
            return [{"role": "user", "content": text} for text in texts]
        shown = [self.picture.part((own * self.pictures + at) & 0xFFFFFFFF) for at in range(self.pictures)]
        return [{"role": "user", "content": [{"type": "text", "text": texts[0]}, *shown]}]


@dataclass(frozen=True, slots=True)
class Same:
    """The first conversation of another source, again and again: what is asked for equal answers."""

    source: Source

    def conversation(self, number: int) -> Sequence[Turn]:
        """Return its turns."""
        return self.source.conversation(0)


def _text(begin: str, length: int) -> str:
    return (begin + " word" * (length // 5 + 1))[:length]


def _hex(number: int) -> str:
    return f"{number & 0xFFFFFFFF:08x}"


def raw_head(
    kind: str, *, host: str, key: str, base_path: str = "/v1", headers: Mapping[str, str] | None = None, query: str = ""
) -> bytes:
    """Return a request's head as an SDK of today sends it, up to the length of its body; see `whole`."""
    dialect = DIALECTS.get(kind)
    fields = {
        "Host": host,
        **(DIALECTS["chat"] if dialect is None else dialect).headers(key),
        "Content-Type": "application/json",
        "Accept": "application/json",
        "User-Agent": "OpenAI/Python 2.54.0",
        "X-Stainless-Lang": "python",
        "X-Stainless-Package-Version": "2.54.0",
        "Accept-Encoding": "identity",
    }
    own = {name.lower() for name in headers or {}}
    fields = {name: value for name, value in fields.items() if name.lower() not in own} | dict(headers or {})
    path = kind if dialect is None else dialect.path  # others are called as their path
    lines = [
        f"POST {base_path}/{path}{query} HTTP/1.1",
        *(f"{name}: {value}" for name, value in fields.items()),
        "Content-Length: ",
    ]
    return "\r\n".join(lines).encode("latin-1")


def whole(head: bytes, body: bytes) -> bytes:
    """Return the request of a head of `raw_head` and a body."""
    return b"%b%d\r\n\r\n%b" % (head, len(body), body)


def raw_request(
    kind: str, body: bytes, *, host: str, key: str, base_path: str = "/v1", headers: Mapping[str, str] | None = None
) -> bytes:
    """Return a request as an SDK of today sends it."""
    return whole(raw_head(kind, host=host, key=key, base_path=base_path, headers=headers), body)


def numbered(raw: bytes, number: int) -> bytes:
    """Return a request whose prompt is its own from the first character on, so that no prefix cache answers for it."""
    return raw.replace(_NUMBER, _hex(number).encode(), 1)
