"""The frames of one answer, and what they are made of: texts, events, HTTP chunks.

Texts, ids and times of creation are the same for the same question, so that answers can be compared byte for byte.
"""

import functools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import orjson

from edge.simulator.behaviour import Dialect
from edge.simulator.questions import Question

CREATED: Final = 1_763_000_000
DONE: Final = b"data: [DONE]\n\n"
_HALF, _LATE = 0, 4  # of eight tokens, when they come unevenly: one that ends within a character, one that comes late
_CONTENT_TYPES: Final[Mapping[Dialect, str]] = {"llamacpp": "application/json; charset=utf-8"}
_EVENT_STREAMS: Final[Mapping[Dialect, str]] = {"llamacpp": "text/event-stream"}


@dataclass(frozen=True, slots=True)
class Script:
    """The frames of one answer, each to be written apart; `lead` of them come before the first with content.

    An answer that is no stream is one frame with all tokens in it. `headers` are those of this answer alone. `counts`
    is how many tokens there are behind each frame with content; without it, one in each. `prompt_tokens` were asked, of
    which `cached_tokens` need not be read.
    """

    content_type: str
    frames: tuple[bytes, ...]
    tokens: int = 0
    lead: int = 0
    status: int = 200
    stream: bool = False
    headers: tuple[str, ...] = ()
    counts: tuple[int, ...] = ()
    prompt_tokens: int = 0
    cached_tokens: int = 0

    @property
    def content_frames(self) -> int:
        """How many frames of a stream have content."""
        return len(self.counts) or self.tokens

    def tokens_in(self, frames_sent: int) -> int:
        """Return how many tokens the first frames hold."""
        if not self.stream:
            return self.tokens if frames_sent else 0
        sent = min(frames_sent - self.lead, self.content_frames)
        if sent <= 0:
            return 0
        return min(self.counts[sent - 1] if self.counts else sent, self.tokens)


def token_text(index: int) -> str:
    """Return the text of one token; of eight, one is Chinese, one has quotes to escape, one has newlines."""
    match index % 8:
        case 3:
            return f"你好{index}"
        case 5:
            return f' "token{index}"'
        case 7:
            return f"\n\ntoken{index}"
        case _:
            return f" token{index}"


@functools.lru_cache(maxsize=64)
def answer_text(tokens: int) -> str:
    """Return the whole text of an answer of that many tokens."""
    return "".join(map(token_text, range(tokens)))


def text_of(question: Question) -> str:
    """Return the whole text of an answer."""
    return answer_text(question.tokens) if question.said is None else "".join(question.said[: question.tokens])


def pieces(question: Question, *, empty: bool = False) -> list[tuple[str, int]]:
    """Return the texts of the frames of one choice, each with how many tokens there are behind it.

    `empty`: where a token ends within a character, there is a frame without text.
    """
    token = token_text if question.said is None else question.said.__getitem__
    if not question.uneven:
        return [(token(index), index + 1) for index in range(question.tokens)]
    found, text = [], ""
    for index in range(question.tokens):
        text += token(index)
        if index + 1 < question.tokens and index % 8 == _HALF:
            found += [("", index + 1)] if empty else []
        elif index + 1 < question.tokens and index % 8 == _LATE and question.dialect == "vllm":
            pass
        else:
            found.append((text, index + 1))
            text = ""
    return found


def data(value: object) -> bytes:
    """Return an event that is data alone."""
    return b"data: %b\n\n" % orjson.dumps(value)


def spaced_data(value: object) -> bytes:
    """Return an event as Python's own JSON writes it: so vLLM and SGLang send errors, with spaces and escapes."""
    return b"data: %b\n\n" % json.dumps(value).encode()


def event(value: Mapping[str, Any], name: str | None = None) -> bytes:
    """Return an event with its type as its name."""
    return b"event: %b\ndata: %b\n\n" % ((name or value["type"]).encode(), orjson.dumps(value))


def events(
    frames: Iterable[bytes],
    question: Question,
    lead: int,
    headers: tuple[str, ...] = (),
    said: Iterable[tuple[object, int]] = (),
) -> Script:
    """Return the script of a stream of events, a frame for each piece of each choice behind the first `lead`.

    `said` are the pieces of one choice, if they are not one for each token.
    """
    content_type = _EVENT_STREAMS.get(question.dialect, "text/event-stream; charset=utf-8")
    tokens, counts, before = question.tokens * question.choices, [], 0
    for _, behind in said if question.uneven or question.thinks is not None else ():
        counts += [before * question.choices + (behind - before) * (index + 1) for index in range(question.choices)]
        before = behind
    return Script(content_type, tuple(frames), tokens, lead, stream=True, headers=headers, counts=tuple(counts))


def document(
    dialect: Dialect, value: object, *, status: int = 200, tokens: int = 0, headers: tuple[str, ...] = ()
) -> Script:
    """Return the script of an answer that is one JSON document."""
    content_type = _CONTENT_TYPES.get(dialect, "application/json")
    return Script(content_type, (orjson.dumps(value),), tokens, status=status, headers=headers)


def http_chunk(content: bytes) -> bytes:
    """Return bytes as one HTTP chunk; `wire.chunk` is not used, since this is what the edge is tested against."""
    return b"%x\r\n%b\r\n" % (len(content), content)
