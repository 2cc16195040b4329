"""The usage objects of chat and text completions in every dialect, and what engines tell of their caches and speed."""

from typing import Any

from edge.simulator.questions import Question


def whole(question: Question, *, text: bool = False) -> dict[str, Any]:
    """Return the usage of an answer that is no stream; `text`: of a text completion."""
    match question.dialect:
        case "llamacpp":  # which tells of one choice and one prompt, however many there are
            return _llamacpp(question)
        case "vllm":
            told = _vllm_details(question, text=text)
            details = told | {"multimodal_tokens": None} if told else None
            return _counts(question) | {"prompt_tokens_details": details, "completion_tokens_details": None}
        case "sglang":
            return _sglang(question, _counts(question))
        case "openai":
            return _openai(question)


def last(question: Question, *, text: bool = False) -> dict[str, Any]:
    """Return the usage at the end of a stream: vLLM leaves out what is null, SGLang in text completions too."""
    match question.dialect:
        case "vllm":
            details = _vllm_details(question, text=text)
            told = {name: value for name, value in details.items() if value is not None}
            return _counts(question) | ({"prompt_tokens_details": told} if told else {})
        case "sglang" if text:
            return {name: value for name, value in whole(question).items() if value is not None}
        case _:
            return whole(question, text=text)


def running(question: Question, tokens: int, *, text: bool = False) -> dict[str, Any]:
    """Return the usage of one choice that has `tokens` so far, as it stands in the frames of a stream."""
    counts = _prompt_and(question.prompt_tokens, tokens)
    if question.dialect == "sglang":
        return _sglang(question, counts)
    return counts if text else counts | {"completion_tokens_details": None}


def failed(question: Question, tokens: int, *, text: bool = False) -> dict[str, Any]:
    """Return the usage that SGLang sends behind an error: `tokens` of all choices."""
    told = _sglang(question, _prompt_and(question.prompt_tokens * question.prompts, tokens))
    return {name: value for name, value in told.items() if value is not None} if text else told


def prompt_only(question: Question) -> dict[str, Any]:
    """Return the usage of an answer without text: embeddings, ranks, scores."""
    counts = {"prompt_tokens": question.prompt_tokens, "total_tokens": question.prompt_tokens}
    match question.dialect:
        case "vllm":
            nothing = {"prompt_tokens_details": None, "completion_tokens_details": None}
            return counts | {"completion_tokens": 0} | nothing
        case "sglang":
            return _sglang(question, counts | {"completion_tokens": 0})
        case _:
            return counts


def timings(question: Question) -> dict[str, Any]:
    """Return what llama.cpp adds to the last frame of a stream and to a whole answer: a millisecond a token."""
    cached = question.cached_tokens or 0
    timed: dict[str, Any] = {"cache_n": cached}
    for kind, tokens in (("prompt", question.prompt_tokens - cached), ("predicted", question.tokens)):
        timed |= {f"{kind}_n": tokens, f"{kind}_ms": float(tokens)}
        timed |= {f"{kind}_per_token_ms": 1.0, f"{kind}_per_second": 1000.0}
    return timed


def _prompt_and(prompt_tokens: int, tokens: int) -> dict[str, Any]:
    return {"prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens + tokens, "completion_tokens": tokens}


def _counts(question: Question) -> dict[str, Any]:
    """Return the counts of all prompts and choices."""
    return _prompt_and(question.prompt_tokens * question.prompts, question.tokens * question.choices)


def _vllm_details(question: Question, *, text: bool) -> dict[str, int | None]:
    """Return what vLLM tells with `--enable-prompt-tokens-details`; without it, nothing."""
    if question.cached_tokens is None:
        return {}
    return {
        "cached_tokens": question.cached_tokens,
        "created_cache_tokens": None if text else question.created_cache_tokens,
    }


def _sglang(question: Question, counts: dict[str, Any]) -> dict[str, Any]:
    """Return what SGLang tells; of cached tokens only with `--enable-cache-report`."""
    cached = question.cached_tokens
    details = None if cached is None else {"cached_tokens": cached}
    told = {"prompt_tokens_details": details, "reasoning_tokens": 0, "completion_tokens_details": None}
    if question.thinks is not None:
        thoughts = _thoughts(question, counts["completion_tokens"])
        told |= {"reasoning_tokens": thoughts, "completion_tokens_details": {"reasoning_tokens": thoughts}}
    return counts | told


def _thoughts(question: Question, tokens: int) -> int:
    """Return what SGLang takes for thoughts: all tokens up to the end of a thought, also behind one in the prompt."""
    said = (question.said or ())[:tokens]
    return said.index("</think>") + 1 if "</think>" in said else len(said)


def _llamacpp(question: Question) -> dict[str, Any]:
    return {
        "completion_tokens": question.tokens,
        "prompt_tokens": question.prompt_tokens,
        "total_tokens": question.prompt_tokens + question.tokens,
        "prompt_tokens_details": {"cached_tokens": question.cached_tokens or 0},
    }


def _openai(question: Question) -> dict[str, Any]:
    return _counts(question) | {
        "prompt_tokens_details": {"cached_tokens": question.cached_tokens or 0},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }
