"""Chat and text completions, whole and as streams, as each engine writes them.

The last token's own frame has the reason to finish in vLLM's streams and in SGLang's of text; else a frame of its own.
llama.cpp writes the role, the first token and so on with the event before it, as one HTTP chunk.
"""

from typing import Any, Final

from edge.simulator import speaking, thoughts, usage
from edge.simulator.questions import Question
from edge.simulator.scripts import CREATED, DONE, Script, data, events, pieces, text_of

FINGERPRINT: Final = "vllm-0.32.0-51a00a7e"
_LLAMACPP_BUILD: Final = "b10549-51a00a7e"
_STOP_TOKEN: Final = 151_645  # Qwen's <|im_end|>; SGLang tells at which token it stopped


def chat_stream(question: Question) -> Script:
    """Return the stream of a chat completion."""
    return _stream(question, text=False)


def completion_stream(question: Question) -> Script:
    """Return the stream of a text completion."""
    return _stream(question, text=True)


def _stream(question: Question, *, text: bool) -> Script:
    match question.dialect:
        case "vllm":
            return _vllm_stream(question, text=text)
        case "sglang":
            return _sglang_stream(question, text=text)
        case "llamacpp":
            return _llamacpp_stream(question, text=text)
        case "openai":
            return _openai_stream(question, text=text)


def chat_document(question: Question) -> dict[str, Any]:
    """Return a whole chat completion."""
    return _document(question, text=False)


def completion_document(question: Question) -> dict[str, Any]:
    """Return a whole text completion."""
    return _document(question, text=True)


def usage_frame(question: Question, tokens: int, *, text: bool) -> bytes:
    """Return what SGLang sends between an error and `[DONE]` if usage was asked for; `tokens` were sent before it."""
    said = usage.failed(question, tokens, text=text)
    return data(_head(question, text=text, stream=True) | {"choices": [], "usage": said})


def _head(question: Question, *, text: bool, stream: bool, choice: int = 0) -> dict[str, Any]:
    kind = "text_completion" if text else "chat.completion.chunk" if stream else "chat.completion"
    answer_id = question.id("text" if text else "chat", choice)
    return {"id": answer_id, "object": kind, "created": CREATED, "model": question.model}


def _said(delta: dict[str, Any], *, text: bool) -> dict[str, Any]:
    return {"text": delta.get("content", "")} if text else {"delta": delta}


# --- vLLM


def _vllm_stream(question: Question, *, text: bool) -> Script:
    """Send the roles first, running usage in every frame and the fingerprint in the last."""
    head = _head(question, text=text, stream=True)

    def frame(index: int, said: dict[str, Any], tokens: int, after: dict[str, Any], **more: Any) -> bytes:
        told = {"usage": usage.running(question, tokens, text=text)} if question.running_usage else {}
        return data(head | {"choices": [{"index": index, **said, "logprobs": None, **after}]} | told | more)

    def piece(delta: dict[str, Any], tokens: int, index: int) -> bytes:
        ends = tokens == question.tokens
        finish = {"finish_reason": question.finish if ends else None}
        after: dict[str, Any] = finish | ({"stop_reason": None} if ends or text else {})
        ids = None if question.prompt_ids is None or not question.said else speaking.ids_of(question.said[tokens - 1])
        after |= {"prompt_token_ids": None, "token_ids": None} if text else {"token_ids": ids}
        more = {"system_fingerprint": FINGERPRINT} if ends and not question.usage else {}
        return frame(index, _said(delta, text=text), tokens, after, **more)

    choices = range(question.choices)
    frames = []
    if not text:
        role = {"delta": {"role": "assistant", "content": ""}}
        prompt: dict[str, Any] = {"prompt_token_ids": question.prompt_ids, "prompt_text": None}
        frames = [frame(index, role, 0, {"finish_reason": None}, **prompt) for index in choices]
    lead = len(frames)
    said = thoughts.told(question, pieces(question, empty=True))
    nothing: list[tuple[dict[str, Any], int]] = [({"content": ""}, 0)]
    frames += [piece(delta, tokens, index) for delta, tokens in said or nothing for index in choices]
    if question.usage:
        told = {"choices": [], "usage": usage.last(question, text=text), "system_fingerprint": FINGERPRINT}
        frames.append(data(head | told))
    return events([*frames, DONE], question, lead, said=said)


# --- SGLang


def _sglang_stream(question: Question, *, text: bool) -> Script:
    """Put a reasoning of null into each delta, and running usage into frames with content, whatever else is asked."""

    def frame(index: int, said: dict[str, Any], finish: str | None, tokens: int | None = None) -> bytes:
        stopped = _STOP_TOKEN if finish == "stop" else None
        choice = {"index": index, **said, "logprobs": None, "finish_reason": finish, "matched_stop": stopped}
        chunk = _head(question, text=text, stream=True, choice=index) | {"choices": [choice]}
        if question.running_usage and tokens is not None:
            chunk["usage"] = usage.running(question, tokens, text=text)
        elif text:
            chunk["usage"] = None
        return data(chunk)

    def delta(**members: Any) -> dict[str, Any]:
        return {"delta": {"reasoning_content": None, **members}}

    choices = range(question.choices)
    said = thoughts.told(question, pieces(question))
    nothing: list[tuple[dict[str, Any], int]] = [({}, 0)]
    frames: list[bytes] = []
    if text:
        for each, tokens in said or nothing:
            finish = question.finish if tokens == question.tokens else None
            frames += [frame(index, _said(each, text=True), finish, tokens) for index in choices]
    else:
        frames += [frame(index, delta(role="assistant", content=""), None) for index in choices]
        frames += [frame(index, delta(**each), None, tokens) for each, tokens in said for index in choices]
        frames += [frame(index, delta(), question.finish) for index in choices]
    if question.usage:
        told = {"choices": [], "usage": usage.last(question, text=text)}
        frames.append(data(_head(question, text=text, stream=True) | told))
    return events([*frames, DONE], question, lead=0 if text else question.choices, said=said)


# --- llama.cpp


def _llamacpp_chunk(question: Question, choices: list[dict[str, Any]], *, text: bool, **more: Any) -> bytes:
    """Return an event; text completions have their id near the end, for they are whole answers in this server."""
    head = _head(question, text=text, stream=True)
    own = {"model": head["model"], "system_fingerprint": _LLAMACPP_BUILD, "object": head["object"]}
    timed = {"timings": more.pop("timings")} if "timings" in more else {}
    if text:
        return data({"choices": choices, "created": CREATED} | own | more | {"id": head["id"]} | timed)
    return data({"choices": choices, "created": CREATED, "id": head["id"]} | own | more | timed)


def _llamacpp_stream(question: Question, *, text: bool) -> Script:
    """Join the role and the first token, the reason to finish and usage, which each choice has by itself.

    Text completions always tell usage, on the frame that finishes. Two prompts begin with an event of `null`. There is
    no role when the first token has no text by itself.
    """

    def event(index: int, said: dict[str, Any], finish: str | None = None, **more: Any) -> bytes:
        if text:
            choice = {"text": said.get("content", ""), "index": index, "logprobs": None, "finish_reason": finish}
        else:
            choice = {"finish_reason": finish, "index": index, "delta": said}
        return _llamacpp_chunk(question, [choice], text=text, **more)

    def end(index: int) -> bytes:
        timed: dict[str, Any] = {"timings": usage.timings(question)}
        if text:
            return event(index, {}, question.finish, usage=usage.last(question), **timed)
        if not question.usage:
            return event(index, {}, question.finish, **timed)
        told = _llamacpp_chunk(question, [], text=text, usage=usage.last(question), **timed)
        return event(index, {}, question.finish) + told

    choices = range(question.choices)
    said = thoughts.told(question, pieces(question))
    role = {"role": "assistant", "content": None}
    roles = [b"" if text or (said and said[0][1] > 1) else event(index, role) for index in choices]
    frames = [b"data: null\n\n"] if question.prompts > 1 else []
    lead = len(frames)
    for at, (delta, _) in enumerate(said):
        timed: dict[str, Any] = {"timings": usage.timings(question)} if question.timed else {}
        frames += [(b"" if at else roles[index]) + event(index, delta, **timed) for index in choices]
    frames += [(b"" if said else roles[index]) + end(index) for index in choices]
    return events([*frames, DONE], question, lead, said=said)


# --- OpenAI


def _openai_stream(question: Question, *, text: bool) -> Script:
    """Put the reason to finish into a frame of its own, and `"usage":null` into each when usage was asked for."""
    head = _head(question, text=text, stream=True)
    none = {"usage": None} if question.usage else {}

    def frame(index: int, said: dict[str, Any], finish: str | None = None) -> bytes:
        return data(head | {"choices": [{"index": index, **said, "logprobs": None, "finish_reason": finish}]} | none)

    choices = range(question.choices)
    frames = [] if text else [frame(index, {"delta": {"role": "assistant", "content": ""}}) for index in choices]
    lead = len(frames)
    said = thoughts.told(question, pieces(question))
    frames += [frame(index, _said(delta, text=text)) for delta, _ in said for index in choices]
    frames += [frame(index, {"text": ""} if text else {"delta": {}}, question.finish) for index in choices]
    if question.usage:
        frames.append(data(head | {"choices": [], "usage": usage.last(question)}))
    return events([*frames, DONE], question, lead, said=said)


# --- Whole answers


def _document(question: Question, *, text: bool) -> dict[str, Any]:
    head = _head(question, text=text, stream=False)
    choices = [_choice(question, index, text=text) for index in range(question.choices)]
    used = usage.whole(question, text=text)
    match question.dialect:
        case "vllm":
            own = {"service_tier": None, "system_fingerprint": FINGERPRINT, "usage": used}
            if not text:
                own |= {"prompt_logprobs": None, "prompt_token_ids": None, "prompt_text": None}
            nothing = {"kv_transfer_params": None, "ec_transfer_params": None, "metrics": None}
            return head | {"choices": choices} | own | nothing
        case "sglang":
            version = {"version": "default", "start": 0, "end": question.tokens}
            weights = {"weight_version": "default", "weight_versions": [version]}
            return head | {"choices": choices, "usage": used, "metadata": weights}
        case "llamacpp":
            own = {"model": head["model"], "system_fingerprint": _LLAMACPP_BUILD, "object": head["object"]}
            told = {"usage": used, "id": head["id"], "timings": usage.timings(question)}
            return {"choices": choices, "created": CREATED} | own | told
        case "openai":
            return head | {"choices": choices, "usage": used}


def _choice(question: Question, index: int, *, text: bool) -> dict[str, Any]:
    content, finish = text_of(question), question.finish
    message = {"role": "assistant"} | thoughts.message(question, content)
    thought = message.get("reasoning_content")
    match question.dialect:
        case "vllm":
            if text:
                after = {"stop_reason": None, "token_ids": None, "prompt_logprobs": None, "prompt_token_ids": None}
                said: dict[str, Any] = {"text": content}
            else:
                nothing = ("refusal", "annotations", "audio", "function_call", "reasoning")
                after = {"stop_reason": None, "token_ids": None}
                said = {"message": {"role": "assistant", "content": None} | dict.fromkeys(nothing) | message}
            ended = {"logprobs": None, "finish_reason": finish, **after, "routed_experts": None}
            return {"index": index, **said, **ended}
        case "sglang":
            said = {"text": content} if text else {"message": message | {"reasoning_content": thought}}
            stopped = _STOP_TOKEN if finish == "stop" else None
            return {"index": index, **said, "logprobs": None, "finish_reason": finish, "matched_stop": stopped}
        case "llamacpp":
            if text:
                return {"text": content, "index": index, "logprobs": None, "finish_reason": finish}
            return {"finish_reason": finish, "index": index, "message": message}
        case "openai":
            said = {"text": content} if text else {"message": message}
            return {"index": index, **said, "logprobs": None, "finish_reason": finish}
