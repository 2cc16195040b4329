"""How a sibling is asked to go on with a text: the body of the question, and those of what its tokenizer is asked.

vLLM, SGLang and llama.cpp go on with the last message, if it is the assistant's, where both flags say so; with less
than both, some refuse and some begin a new answer under a 200. A template may change such a message: DeepSeek-R1's
leaves thoughts out. SGLang's never sees it, and vLLM takes a prompt by its ids in place of messages. As they did in a
run: vLLM 0.32, SGLang 0.5.23 and llama.cpp of October 2026.
"""

from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import msgspec
import orjson

from edge.config.settings import Engine
from edge.exchange import Usage, UsageSource
from edge.resume.rules import NotResumed, Question, limits_left
from edge.resume.said import THOUGHT_BEGINS, Said

_FLAGS: Final[dict[str, Any]] = {"continue_final_message": True, "add_generation_prompt": False}
_USAGE: Final = {"include_usage": True, "continuous_usage_stats": True}
_OF_TEMPLATES: Final = ("messages", "tools", "chat_template_kwargs", "chat_template", "documents", "add_special_tokens")
_NOT_TOKENIZED: Final = ("documents", "reasoning_effort", "kv_transfer_params")  # which vLLM's tokenizer leaves out
_STEP_BYTES: Final = 64 * 1024  # of a tokenizer's answer, read at once
_OPENING_TOKENS: Final = 16  # of the end of a prompt, that show whether it opens a thought
_THINKS: Final = f"<\uff5cAssistant\uff5c>{THOUGHT_BEGINS}\n"  # the end of DeepSeek-R1's prompts


class Behind(NamedTuple):
    """The prompt of a second question, as far as it is known before that is asked.

    `tokens` are the ids of what was said. `length`: how many tokens the prompt has if the server goes on, None where it
    cannot but do so. `ids` are all of them, where it is asked by its ids. `thoughts`: how many tokens of what
    was said are thoughts, with their end, where the engine counts them.
    """

    tokens: list[int]
    length: int | None
    ids: list[int] | None = None
    thoughts: int = 0


class _Tokens(msgspec.Struct):
    tokens: msgspec.Raw


class _Rendered(msgspec.Struct):
    prompt: str


class _Text(msgspec.Struct):
    prompt: str = ""
    text: str = ""


_tokens_in: Final = msgspec.json.Decoder(_Tokens).decode
_ids_in: Final = msgspec.json.Decoder(list[int]).decode
_rendered_in: Final = msgspec.json.Decoder(_Rendered).decode
_text_in: Final = msgspec.json.Decoder(_Text).decode


def body_of(
    engine: Engine, question: Question, said: Said, model: str, behind: Behind, dropped: tuple[str, ...]
) -> bytes:
    """Return the body of a question that goes on `behind` what was said; raises `NotResumed`."""
    kept = Question({name: each for name, each in question.members.items() if name not in dropped}, question.is_chat)
    text = said.written(question.place)
    members: dict[str, Any] = kept.members | limits_left(kept, len(behind.tokens))
    members |= {"model": model, "stream_options": _USAGE}
    if engine == "llamacpp":
        members["timings_per_token"] = True
    if behind.ids is not None:
        members |= {"kv_transfer_params": {"prompt_token_ids": behind.ids}, "return_token_ids": True}
    elif kept.is_chat:
        members |= {"messages": _longer(kept, "messages", [{"role": "assistant", "content": text}])} | _FLAGS
    elif isinstance(prompt := kept.get("prompt"), str):
        members["prompt"] = prompt + text
    else:
        members["prompt"] = _longer(kept, "prompt", behind.tokens)
    return msgspec.json.encode(members)


def _longer(question: Question, name: str, more: list[Any]) -> msgspec.Raw:
    """Return a list of the question, which is not empty, with `more` behind it."""
    return msgspec.Raw(bytes(question.members[name]).rstrip()[:-1] + b"," + orjson.dumps(more)[1:])


def text_question(engine: Engine, model: str, text: str) -> bytes:
    """Return what a tokenizer is asked of the text that was said."""
    if engine == "llamacpp":
        return orjson.dumps({"content": text, "add_special": False, "parse_special": True})
    return orjson.dumps({"model": model, "prompt": text, "add_special_tokens": False})


def prompt_question(question: Question, model: str) -> bytes:
    """Return what is asked of the first question's prompt: a tokenizer, or llama.cpp's template."""
    members: dict[str, Any] = {name: question.members[name] for name in _OF_TEMPLATES if name in question.members}
    return msgspec.json.encode(members | {"model": model})


def whole_question(question: Question, said: Said, model: str) -> bytes:
    """Return what vLLM's tokenizer is asked of the prompt of a second question, by messages and flags."""
    answer = {"role": "assistant", "content": said.written(question.place)}
    longer = question.members | {"messages": _longer(question, "messages", [answer])}
    members: dict[str, Any] = {name: longer[name] for name in _OF_TEMPLATES if name in longer}
    return msgspec.json.encode(members | _FLAGS | {"model": model})


def rendered_question(prompt: str) -> bytes:
    """Return what llama.cpp's tokenizer is asked of a prompt, which its template has made."""
    return orjson.dumps({"content": prompt, "add_special": True, "parse_special": True})


def opening_question(model: str, prompt: list[int], tokens: list[int] | None = None) -> bytes:
    """Return what is asked for the text that a prompt ends with, and for that of `tokens` behind it."""
    ids = prompt[-_OPENING_TOKENS:] + (tokens or [])
    return orjson.dumps({"model": model, "tokens": ids, "skip_special_tokens": False})


def require_thoughts(said: Said, prompt: str) -> None:
    """Raise `NotResumed` where it is not known what the model wrote, from the end of its prompt on.

    Thoughts are known where DeepSeek-R1's template has opened them: nothing but a newline is between that and what its
    parsers tell of them. And where a prompt opens thoughts, an answer without any was not told as it was written.
    """
    known = prompt.endswith(_THINKS) if said.thoughts else not prompt.rstrip().endswith(THOUGHT_BEGINS)
    if not known:
        raise NotResumed("reasoning")


def require_tokens(tokens: list[int], first: Usage) -> None:
    """Raise `NotResumed` where ids cannot be those of what was said: none, or others than the first server counted.

    One that counted more has hidden some, or has written the text in another way than its tokenizer does.
    """
    if not tokens:
        raise NotResumed("tokenizer")
    if first.source is UsageSource.RUNNING and first.completion_tokens != len(tokens):
        raise NotResumed("reasoning" if first.completion_tokens > len(tokens) else "tokenizer")


def by_messages(tokens: list[int], prompt: list[int], whole: list[int]) -> Behind | None:
    """Return the prompt that vLLM makes of messages and flags, None where its template does not make what it must."""
    return Behind(tokens, len(whole)) if whole == prompt + tokens else None


def by_ids(question: Question, tokens: list[int], prompt: list[int]) -> Behind:
    """Return a prompt by its ids, as vLLM reads it in place of messages; raises `NotResumed`."""
    if any(question.get(name) for name in _NOT_TOKENIZED):
        raise NotResumed("prompt")
    if question.get("tools") and question.get("tool_choice") == "none":
        raise NotResumed("prompt")  # which some servers leave out then
    ids = prompt + tokens
    return Behind(tokens, len(ids), ids)


def rendered_in(document: bytes) -> str:
    """Return what llama.cpp's template has made; raises `NotResumed` for what is nothing."""
    try:
        return _rendered_in(document).prompt
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise NotResumed("tokenizer") from None


def text_in(document: bytes) -> str:
    """Return the text that a tokenizer has answered, under either name; raises `NotResumed` for what is none."""
    try:
        answer = _text_in(document)
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise NotResumed("tokenizer") from None
    return answer.prompt or answer.text


def ids_in(document: bytes, ids: list[int]) -> Iterator[None]:
    """Read the ids that a tokenizer has answered into `ids`, in steps of a millisecond.

    Raises: `NotResumed` for what is none.
    """
    try:
        listed = bytes(_tokens_in(document).tokens).strip()
        if listed[:1] != b"[":
            raise NotResumed("tokenizer")
        at, end = 1, len(listed) - 1
        while at < end:
            comma = listed.find(b",", at + _STEP_BYTES, end)
            upto = end if comma < 0 else comma
            ids += _ids_in(b"[%b]" % listed[at:upto])
            at = upto + 1
            yield
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise NotResumed("tokenizer") from None
