"""How each API is asked, and what its answers say: chat, completions, embeddings, Anthropic's messages, responses.

A conversation is a list of messages as chat has them; every dialect writes it in its own way. The counts of a usage are
told under chat's names. Sources: the API references of OpenAI (chat, completions, embeddings, responses) and Anthropic
(messages, and the events of its streams).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

Message = Mapping[str, Any]
Body = dict[str, Any]

# What a model writes, in a delta of any engine; the first frame of many has a role and an empty text.
_CONTENT: Final = ("content", "reasoning_content", "reasoning", "refusal", "tool_calls", "function_call", "audio")
_WRITTEN: Final = ("text", "thinking", "partial_json", "signature", "citation")  # of a delta of messages


class Said(NamedTuple):
    """What an event of a stream, or a whole answer, says.

    `is_choice`: a part of the answer, though perhaps an empty one; `is_content`: something that a model wrote, `text`
    the visible part of it. `is_end`: nothing may follow.
    """

    is_choice: bool = False
    is_content: bool = False
    text: str = ""
    usage: dict[str, int] | None = None
    is_end: bool = False
    is_error: bool = False


@dataclass(frozen=True, slots=True)
class Dialect:
    """One API: the path below `/v1`, vLLM's name of it, and how it asks, streams and answers.

    `ask` makes a body of a model, messages, the tokens to answer with (0: not said) and whether to stream; `event` and
    `answer` read the JSON of an event and of a whole answer. `ends_with_done`: a stream ends with `[DONE]`.
    """

    path: str
    backend: str
    ask: Callable[[str, Sequence[Message], int, bool], Body]
    event: Callable[[Mapping[str, Any]], Said]
    answer: Callable[[Mapping[str, Any]], Said]
    ends_with_done: bool = True
    headers: Callable[[str], dict[str, str]] = lambda key: {"Authorization": f"Bearer {key}"}


def text_of(message: Message) -> str:
    """Return the text of a message, whose content may be a text or parts."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content if part.get("type") == "text")


def _joined(messages: Sequence[Message]) -> str:
    return "\n".join(map(text_of, messages))


def _usage(told: object, names: Mapping[str, str]) -> dict[str, int] | None:
    """Return the counts of a usage under chat's names; what is no count tells nothing."""
    if not isinstance(told, dict):
        return None
    return {name: told[own] for name, own in names.items() if isinstance(told.get(own), int)} or None


_CHAT_USAGE: Final = {"prompt_tokens": "prompt_tokens", "completion_tokens": "completion_tokens"}
_OTHER_USAGE: Final = {"prompt_tokens": "input_tokens", "completion_tokens": "output_tokens"}


# --- chat, completions, embeddings


def _ask_chat(model: str, messages: Sequence[Message], tokens: int, stream: bool) -> Body:
    return _with_options({"model": model, "messages": messages}, tokens, stream)


def _ask_completions(model: str, messages: Sequence[Message], tokens: int, stream: bool) -> Body:
    return _with_options({"model": model, "prompt": _joined(messages)}, tokens, stream)


def _with_options(body: Body, tokens: int, stream: bool) -> Body:
    if tokens:
        body["max_tokens"] = tokens
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return body


def _ask_embeddings(model: str, messages: Sequence[Message], tokens: int, stream: bool) -> Body:
    texts = [text_of(each) for each in messages]
    return {"model": model, "input": texts if len(texts) > 1 else texts[0]}


def _chat_event(document: Mapping[str, Any]) -> Said:
    if document.get("error") or document.get("object") == "error":
        return Said(is_error=True)
    usage = _usage(document.get("usage"), _CHAT_USAGE)
    choices = document.get("choices")
    if not choices:
        return Said(usage=usage)
    is_content, text = False, ""
    for choice in choices:
        delta = choice.get("delta") or {}
        is_content = is_content or bool(choice.get("text")) or any(delta.get(name) for name in _CONTENT)
        text += delta.get("content") or choice.get("text") or ""
    return Said(True, is_content, text, usage)


def _chat_answer(document: Mapping[str, Any]) -> Said:
    usage = _usage(document.get("usage"), _CHAT_USAGE)
    if document.get("error"):
        return Said(is_error=True)
    choices = document.get("choices") or []
    text = "".join((each.get("message") or {}).get("content") or each.get("text") or "" for each in choices)
    return Said(bool(choices or document.get("data")), text=text, usage=usage)


# --- messages


def _ask_messages(model: str, messages: Sequence[Message], tokens: int, stream: bool) -> Body:
    system = [each for each in messages if each["role"] == "system"]
    turns = [_for_messages(each) for each in messages if each["role"] != "system"]
    body: Body = {"model": model, "messages": turns, "max_tokens": tokens or 1024}  # which it cannot do without
    if system:
        body["system"] = _joined(system)
    return body | {"stream": True} if stream else body


def _for_messages(message: Message) -> Message:
    content = message.get("content")
    if isinstance(content, str) or not content:
        return message
    return {**message, "content": [_block(part) for part in content]}


def _block(part: Mapping[str, Any]) -> Mapping[str, Any]:
    if part.get("type") != "image_url":
        return part
    url: str = part["image_url"]["url"]
    if not url.startswith("data:"):
        return {"type": "image", "source": {"type": "url", "url": url}}
    kind, _, data = url.removeprefix("data:").partition(";base64,")
    return {"type": "image", "source": {"type": "base64", "media_type": kind, "data": data}}


def _messages_event(document: Mapping[str, Any]) -> Said:
    kind = document.get("type")
    if kind == "content_block_delta":
        delta = document.get("delta") or {}
        return Said(True, any(delta.get(name) for name in _WRITTEN), delta.get("text") or "")
    if kind == "message_start":
        return Said(usage=_usage((document.get("message") or {}).get("usage"), {"prompt_tokens": "input_tokens"}))
    if kind == "message_delta":
        return Said(usage=_usage(document.get("usage"), _OTHER_USAGE))
    return Said(is_end=kind == "message_stop", is_error=kind == "error")


def _messages_answer(document: Mapping[str, Any]) -> Said:
    blocks = document.get("content") or []
    text = "".join(each.get("text") or "" for each in blocks)
    usage = _usage(document.get("usage"), _OTHER_USAGE)
    return Said(bool(blocks), text=text, usage=usage, is_error=document.get("type") == "error")


def _messages_headers(key: str) -> dict[str, str]:
    return {"x-api-key": key, "anthropic-version": "2023-06-01"}


# --- responses


def _ask_responses(model: str, messages: Sequence[Message], tokens: int, stream: bool) -> Body:
    body: Body = {"model": model, "input": [_item(each) for each in messages]}
    if tokens:
        body["max_output_tokens"] = tokens
    return body | {"stream": True} if stream else body


def _item(message: Message) -> Message:
    content = message.get("content")
    if isinstance(content, str) or not content:
        return message
    return {**message, "content": [_input(part) for part in content]}


def _input(part: Mapping[str, Any]) -> Mapping[str, Any]:
    if part.get("type") == "image_url":
        return {"type": "input_image", "image_url": part["image_url"]["url"]}
    return {**part, "type": "input_text"} if part.get("type") == "text" else part


def _responses_event(document: Mapping[str, Any]) -> Said:
    kind = document.get("type") or ""
    if kind.endswith(".delta"):
        written = document.get("delta")
        return Said(True, bool(written), written if kind == "response.output_text.delta" and written else "")
    if kind in ("response.completed", "response.incomplete"):
        return Said(usage=_usage((document.get("response") or {}).get("usage"), _OTHER_USAGE), is_end=True)
    return Said(is_error=kind in ("error", "response.failed"))


def _responses_answer(document: Mapping[str, Any]) -> Said:
    items = document.get("output") or []
    text = "".join(part.get("text") or "" for item in items for part in item.get("content") or [])
    return Said(bool(items), text=text, usage=_usage(document.get("usage"), _OTHER_USAGE),
                is_error=bool(document.get("error")))  # fmt: skip


DIALECTS: Final = {
    "chat": Dialect("chat/completions", "openai-chat", _ask_chat, _chat_event, _chat_answer),
    "completions": Dialect("completions", "openai", _ask_completions, _chat_event, _chat_answer),
    "embeddings": Dialect("embeddings", "openai-embeddings", _ask_embeddings, _chat_event, _chat_answer),
    "messages": Dialect(
        *("messages", "anthropic-messages", _ask_messages, _messages_event, _messages_answer),
        ends_with_done=False,
        headers=_messages_headers,
    ),
    "responses": Dialect(
        *("responses", "openai-responses", _ask_responses, _responses_event, _responses_answer), ends_with_done=False
    ),
}
