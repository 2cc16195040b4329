"""What engines are asked, and how a request goes on."""

import random
import string
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal

CHAT: Final = "/v1/chat/completions"
COMPLETIONS: Final = "/v1/completions"
MESSAGES: Final = "/v1/messages"
RESPONSES: Final = "/v1/responses"
EMBEDDINGS: Final = "/v1/embeddings"

MOST_TOKENS: Final = 24
_LONG_ANSWER: Final = 400  # of one that is not read to its end
_PAST_THE_CONTEXT: Final = 9000  # tokens of a prompt; the models' context has 8,192

Body = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One kind of request.

    `body`: of the request with a number, without its model. `goes`: `whole`; `client leaves` after some events;
    `breaks`, between edge and engine, after some bytes; `fails`: the engine answers with
    an error, mostly since the prompt is too long.
    """

    name: str
    path: str
    body: Callable[[int], Body]
    stream: bool = False
    goes: Literal["whole", "client leaves", "breaks", "fails"] = "whole"

    def leaves_after(self, number: int) -> int:
        """Return how many events a client reads before it leaves."""
        return 2 + number % 12


def _text(number: int, words: int = 6) -> str:
    """Return a text that two requests have, so that the second finds it in the engine's cache."""
    draws = random.Random(number // 2)
    return " ".join("".join(draws.choices(string.ascii_lowercase, k=draws.randint(2, 9))) for _ in range(words))


def _most(number: int) -> int:
    return 1 + number % MOST_TOKENS


def _asked(number: int) -> Body:
    """Every other client asks for the usage of its stream itself."""
    return {"stream": True} | ({"stream_options": {"include_usage": True}} if number % 2 else {})


def _chat(number: int, **members: Any) -> Body:
    return {"messages": [{"role": "user", "content": _text(number)}], "max_tokens": _most(number)} | members


def _completion(number: int, **members: Any) -> Body:
    return {"prompt": _text(number), "max_tokens": _most(number)} | members


def _two_prompts(number: int, **members: Any) -> Body:
    return _completion(number, prompt=[_text(number), _text(number + 2, 3)], **members)


def _response(number: int, **members: Any) -> Body:
    return {"input": _text(number), "max_output_tokens": _most(number) + 1} | members


def _long(body: Callable[..., Body]) -> Callable[[int], Body]:
    return lambda number: body(number) | _asked(number) | {"max_tokens": _LONG_ANSWER}


def _long_message(number: int) -> Body:
    return _chat(number, stream=True, max_tokens=_LONG_ANSWER)


def _too_long(number: int) -> Body:
    return _asked(number) | {"messages": [{"role": "user", "content": "x" * _PAST_THE_CONTEXT}]}


CASES: Final = (
    Case("chat", CHAT, _chat),
    Case("chat, stream", CHAT, lambda number: _chat(number) | _asked(number), True),
    Case("chat, n = 2", CHAT, lambda number: _chat(number, n=2)),
    Case("chat, n = 2, stream", CHAT, lambda number: _chat(number, n=2) | _asked(number), True),
    Case("completions", COMPLETIONS, _completion),
    Case("completions, stream", COMPLETIONS, lambda number: _completion(number) | _asked(number), True),
    Case("two prompts", COMPLETIONS, _two_prompts),
    Case("two prompts, stream", COMPLETIONS, lambda number: _two_prompts(number) | _asked(number), True),
    Case("messages", MESSAGES, _chat),
    Case("messages, stream", MESSAGES, lambda number: _chat(number, stream=True), True),
    Case("responses", RESPONSES, _response),
    Case("responses, stream", RESPONSES, lambda number: _response(number, stream=True), True),
    Case("embeddings", EMBEDDINGS, lambda number: {"input": [_text(number), _text(number + 2, 3)]}),
    Case("chat, client leaves", CHAT, _long(_chat), True, "client leaves"),
    Case("completions, client leaves", COMPLETIONS, _long(_completion), True, "client leaves"),
    Case("messages, client leaves", MESSAGES, _long_message, True, "client leaves"),
    Case("chat, connection breaks", CHAT, _long(_chat), True, "breaks"),
    Case("completions, connection breaks", COMPLETIONS, _long(_completion), True, "breaks"),
    Case("chat, engine fails", CHAT, lambda number: _chat(number) | _too_long(number), True, "fails"),
)  # fmt: skip
