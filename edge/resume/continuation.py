"""How a sibling is asked to go on with a text: the body of the question, and those of what its tokenizer is asked.

vLLM, SGLang and llama.cpp go on with the last message, if it is the assistant's, where both flags say so; with less
than both, some refuse and some begin a new answer under a 200. As they did in a run: vLLM 0.32, SGLang 0.5.23 and
llama.cpp of October 2026.
"""

from typing import Any, Final

import msgspec
import orjson

from edge.config.settings import Engine
from edge.resume.rules import NotResumed, Question, limits_left
from edge.resume.said import Said

_FLAGS: Final[dict[str, Any]] = {"continue_final_message": True, "add_generation_prompt": False}
_USAGE: Final = {"include_usage": True, "continuous_usage_stats": True}
_OF_TEMPLATES: Final = ("messages", "tools", "chat_template_kwargs", "chat_template", "documents")
_TOKENS_OFF: Final = 2  # of a prompt, where two texts meet in it


class _Tokens(msgspec.Struct):
    tokens: list[int]


class _Rendered(msgspec.Struct):
    prompt: str


_tokens_in: Final = msgspec.json.Decoder(_Tokens).decode
_rendered_in: Final = msgspec.json.Decoder(_Rendered).decode


def body_of(
    engine: Engine, question: Question, said: Said, model: str, tokens: list[int], dropped: tuple[str, ...]
) -> bytes:
    """Return the body of a question that goes on behind `tokens`, as the ids of what was said; raises `NotResumed`."""
    kept = Question({name: each for name, each in question.members.items() if name not in dropped}, question.is_chat)
    text = said.text(question.place)
    members: dict[str, Any] = kept.members | limits_left(kept, len(tokens))
    members |= {"model": model, "stream_options": _USAGE}
    if engine == "llamacpp":
        members["timings_per_token"] = True
    if kept.is_chat:
        members |= {"messages": _longer(kept, "messages", [{"role": "assistant", "content": text}])} | _FLAGS
    elif isinstance(prompt := kept.get("prompt"), str):
        members["prompt"] = prompt + text
    else:
        members["prompt"] = _longer(kept, "prompt", tokens)
    return msgspec.json.encode(members)


def _longer(question: Question, name: str, more: list[Any]) -> msgspec.Raw:
    """Return a list of the question, which is not empty, with `more` behind it."""
    return msgspec.Raw(bytes(question.members[name]).rstrip()[:-1] + b"," + orjson.dumps(more)[1:])


def text_question(engine: Engine, model: str, text: str) -> bytes:
    """Return what a tokenizer is asked of the text that was said."""
    if engine == "llamacpp":
        return orjson.dumps({"content": text, "add_special": False, "parse_special": True})
    return orjson.dumps({"model": model, "prompt": text, "add_special_tokens": False})


def prompt_question(engine: Engine, question: Question, said: Said, model: str) -> bytes:
    """Return what is asked of a chat's prompt: vLLM's tokenizer of all the second question, others' of the first.

    llama.cpp is asked for the text that its template makes of it.
    """
    members: dict[str, Any] = {name: question.members[name] for name in _OF_TEMPLATES if name in question.members}
    members["model"] = model
    if engine == "vllm":
        answer = {"role": "assistant", "content": said.text(question.place)}
        members |= {"messages": _longer(question, "messages", [answer])} | _FLAGS
    return msgspec.json.encode(members)


def rendered_question(document: bytes) -> bytes:
    """Return what llama.cpp's tokenizer is asked of what its template has made; raises `NotResumed`."""
    try:
        prompt = _rendered_in(document).prompt
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise NotResumed("tokenizer") from None
    return orjson.dumps({"content": prompt, "add_special": True, "parse_special": True})


def prompt_tokens_of(engine: Engine, tokens: list[int], prompt: list[int]) -> range:
    """Return how many tokens the second question may have, by what the tokenizer said; raises `NotResumed`.

    Of vLLM it was asked the whole second question, so the number is exact; a template that trims texts is seen by the
    end of what it makes of it. Of others it was asked two texts, which may have a token less or more where they meet:
    but a server that leaves out an answer of so few tokens must be seen.
    """
    if engine == "vllm":
        if prompt[-len(tokens) :] != tokens:
            raise NotResumed("template")
        return range(len(prompt), len(prompt) + 1)
    count, off = len(prompt) + len(tokens), _TOKENS_OFF if len(tokens) > _TOKENS_OFF else 0
    return range(count - off, count + off + 1)


def ids_in(document: bytes) -> list[int]:
    """Return the ids that a tokenizer has answered; raises `NotResumed` for what is none."""
    try:
        return _tokens_in(document).tokens
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise NotResumed("tokenizer") from None
