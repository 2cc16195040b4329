"""The streams of the benchmarks' model server, as three protocols word them; each token tells when it was sent.

Chat completions as vLLM sends them; Anthropic's messages (https://docs.claude.com/en/api/messages-streaming); OpenAI's
responses (https://platform.openai.com/docs/api-reference/responses-streaming).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import orjson

DONE: Final = b"data: [DONE]"
_NUMBER_DIGITS: Final = 6
_TIME_DIGITS: Final = 19
_STAMP_BYTES: Final = _NUMBER_DIGITS + 1 + _TIME_DIGITS
_STAMP = re.compile(rb'"(?:content|text|delta)": ?"([0-9]{%d}) ([0-9]{%d})"' % (_NUMBER_DIGITS, _TIME_DIGITS))
_MODEL: Final = "deepseek-ai/DeepSeek-R1"
_PLACE: Final = "[stamp]"


@dataclass(frozen=True, slots=True)
class Dialect:
    """How a stream looks: the `opening` events, tokens between `before` and `after`, then what `closing` returns.

    `end` stands in the last event, however it was encoded anew. Events are without the empty line that ends them.
    """

    before: bytes
    after: bytes
    opening: Sequence[bytes]
    closing: Callable[[int], Sequence[bytes]]
    end: bytes

    @property
    def event_bytes(self) -> int:
        """How long the event of a token is, its end included; always the same."""
        return len(self.before) + _STAMP_BYTES + len(self.after) + 2

    def event(self, number: int, sent_ns: int) -> bytes:
        """Return the event of the token `number` (from 0), sent at the monotonic time `sent_ns`, with its end."""
        return b"%b%0*d %0*d%b\n\n" % (self.before, _NUMBER_DIGITS, number, _TIME_DIGITS, sent_ns, self.after)

    def read(self, event: bytes) -> tuple[int, int]:
        """Return number and time of an event without its end; raises `ValueError` unless every byte is right."""
        at = len(self.before)
        length = at + _STAMP_BYTES + len(self.after)
        if len(event) != length or not (event.startswith(self.before) and event.endswith(self.after)):
            raise ValueError("an event differs from what was sent")
        return int(event[at : at + _NUMBER_DIGITS]), int(event[at + _NUMBER_DIGITS + 1 : at + _STAMP_BYTES])


def find_stamp(event: bytes) -> tuple[int, int] | None:
    """Return the number and the time of an event that a gateway may have encoded anew, None for any other event."""
    found = _STAMP.search(event)
    return (int(found[1]), int(found[2])) if found else None


def _parted(event: bytes) -> tuple[bytes, bytes]:
    before, _, after = event.partition(_PLACE.encode())
    return before, after


def _named(name: str, members: Mapping[str, Any]) -> bytes:
    """Return an event with its name, which both newer protocols repeat as the `type` of the data."""
    return b"event: %b\ndata: %b" % (name.encode(), orjson.dumps({"type": name, **members}))


def _chunk(choices: list[Any], **members: object) -> bytes:
    head = {"id": "chatcmpl-6f1c0c7e8f0b4a5d9d1c", "object": "chat.completion.chunk", "created": 1_763_000_000}
    return b"data: " + orjson.dumps({**head, "model": _MODEL, "choices": choices, **members})


def chat_usage(tokens: int) -> bytes:
    """Return the event before the last of a chat completion, which says how many tokens there were."""
    return _chunk([], usage={"prompt_tokens": 12, "total_tokens": 12 + tokens, "completion_tokens": tokens})


def _message_closing(tokens: int) -> list[bytes]:
    return [
        _named("content_block_stop", {"index": 0}),
        _named(
            "message_delta",
            {
                "delta": {"stop_reason": "end_turn", "stop_sequence": None},
                "usage": {"input_tokens": 12, "output_tokens": tokens},
            },
        ),
        _named("message_stop", {}),
    ]


def _response(status: str, **members: object) -> dict[str, Any]:
    usual = {"id": "resp_6f1c0c7e8f0b4a5d9d1c", "object": "response", "created_at": 1_763_000_000, "model": _MODEL}
    return {"response": {**usual, "status": status, "error": None, "tools": [], **members}}


def _response_closing(tokens: int) -> list[bytes]:
    usage = {"input_tokens": 12, "output_tokens": tokens, "total_tokens": 12 + tokens}
    return [
        _named("response.output_text.done", {**_PART, "text": "", "sequence_number": 5}),
        _named("response.content_part.done", {**_PART, "part": _TEXT, "sequence_number": 6}),
        _named("response.output_item.done", {"output_index": 0, "item": _item("completed"), "sequence_number": 7}),
        _named(
            "response.completed",
            {**_response("completed", output=[_item("completed")], usage=usage), "sequence_number": 8},
        ),
    ]


def _item(status: str) -> dict[str, Any]:
    content = [_TEXT] if status == "completed" else []
    return {"id": "msg_1", "type": "message", "status": status, "role": "assistant", "content": content}


_TEXT: Final = {"type": "output_text", "text": "", "annotations": []}
_PART: Final = {"item_id": "msg_1", "output_index": 0, "content_index": 0}

CHAT: Final = Dialect(
    *_parted(_chunk([{"index": 0, "delta": {"content": _PLACE}, "logprobs": None, "finish_reason": None}])),
    opening=(),
    closing=lambda tokens: (chat_usage(tokens), DONE),
    end=DONE,
)
MESSAGES: Final = Dialect(
    *_parted(_named("content_block_delta", {"index": 0, "delta": {"type": "text_delta", "text": _PLACE}})),
    opening=(
        _named(
            "message_start",
            {
                "message": {
                    "id": "msg_6f1c0c7e8f0b4a5d9d1c", "type": "message", "role": "assistant", "model": _MODEL,
                    "content": [], "stop_reason": None, "stop_sequence": None,
                    "usage": {"input_tokens": 12, "output_tokens": 0},
                }
            },
        ),
        _named("content_block_start", {"index": 0, "content_block": {"type": "text", "text": ""}}),
    ),
    closing=_message_closing,
    end=b"message_stop",
)  # fmt: skip
RESPONSES: Final = Dialect(
    *_parted(_named("response.output_text.delta", {**_PART, "delta": _PLACE, "logprobs": [], "sequence_number": 4})),
    opening=(
        _named("response.created", {**_response("in_progress", output=[]), "sequence_number": 0}),
        _named("response.in_progress", {**_response("in_progress", output=[]), "sequence_number": 1}),
        _named("response.output_item.added", {"output_index": 0, "item": _item("in_progress"), "sequence_number": 2}),
        _named("response.content_part.added", {**_PART, "part": _TEXT, "sequence_number": 3}),
    ),
    closing=_response_closing,
    end=b"response.completed",
)

DIALECTS: Final[Mapping[str, Dialect]] = {"chat": CHAT, "messages": MESSAGES, "responses": RESPONSES}
