"""Answers that read texts and write none: embeddings, ranks, scores, tokens and decisions."""

import base64
import struct
from typing import Any, Final

from edge.simulator import speaking, usage, validation
from edge.simulator.behaviour import Behaviour, Refusal
from edge.simulator.questions import Ask, Question, count, member
from edge.simulator.scripts import CREATED

_VECTOR: Final = (0.125, -0.25, 0.5, -1.0)


def embeddings(ask: Ask, question: Question) -> dict[str, Any]:
    """Return a vector for each text; llama.cpp tells usage before them, and how they are encoded."""
    coded = ask.encoding_format == "base64"
    vector: object = base64.b64encode(struct.pack("<4f", *_VECTOR)).decode() if coded else list(_VECTOR)
    indices, used = range(count(ask, "input")), usage.prompt_only(question)
    match question.dialect:
        case "llamacpp":
            encoded = {"encoding_format": "base64"} if coded else {}
            vectors = [{"embedding": vector, "index": at, "object": "embedding"} | encoded for at in indices]
            return {"model": question.model, "object": "list", "usage": used, "data": vectors}
        case "sglang":
            vectors = [{"embedding": vector, "index": at, "object": "embedding"} for at in indices]
            return {"data": vectors, "model": question.model, "object": "list", "usage": used}
        case "vllm":
            vectors = [{"index": at, "object": "embedding", "embedding": vector} for at in indices]
            return _list(question) | {"data": vectors, "usage": used}
        case "openai":
            vectors = [{"object": "embedding", "index": at, "embedding": vector} for at in indices]
            return {"object": "list", "data": vectors, "model": question.model, "usage": used}


def rerank(ask: Ask, question: Question) -> object:
    """Return the documents by their ranks, which are their places; SGLang's answer is a list."""
    given = member(ask, "documents", list[Any], [])[: ask.top_n or None]
    ranked = [(at, document, 1 / (at + 1)) for at, document in enumerate(given)]
    counts = {"prompt_tokens": question.prompt_tokens, "total_tokens": question.prompt_tokens}
    match question.dialect:
        case "sglang":
            told = ask.return_documents is not False
            return [
                {"score": score} | ({"document": each} if told else {}) | {"index": at} for at, each, score in ranked
            ]
        case "llamacpp":
            results = [{"index": at, "relevance_score": score} for at, _, score in ranked]
            return {"model": question.model, "object": "list", "usage": counts, "results": results}
        case _:
            texts = [each if isinstance(each, dict) else {"text": each, "multi_modal": None} for each in given]
            ranks = [{"index": at, "document": texts[at], "relevance_score": score} for at, _, score in ranked]
            return {"id": _id(question, "score"), "model": question.model, "usage": counts, "results": ranks}


def score(ask: Ask, question: Question) -> dict[str, Any]:
    """Return a score for each text; SGLang scores its `items`."""
    used = usage.prompt_only(question)
    if question.dialect == "sglang":
        scores = [[1 / (at + 1)] for at in range(count(ask, "items" if ask.items else "text_2"))]
        return {"scores": scores, "model": question.model, "usage": used, "object": "scoring"}
    scored = [{"index": at, "object": "score", "score": 1 / (at + 1)} for at in range(count(ask, "text_2"))]
    return _list(question) | {"data": scored, "usage": used}


def tokenize(path: str, ask: Ask, question: Question, behaviour: Behaviour) -> dict[str, Any]:
    """Return the bytes of a text as its tokens, which `detokenize` turns back; llama.cpp reads `content` alone.

    Raises: `Refusal` when vLLM or SGLang finds nothing to read.
    """
    if question.dialect != "llamacpp" and not ask.prompt and not ask.messages:
        raise _nothing_to_read(question, path)
    if behaviour.text == "prompt":
        ids = speaking.tokenized(question.dialect, path, ask, behaviour)
        return {"count": len(ids), "max_model_len": behaviour.context_length, "tokens": ids}
    if question.dialect == "llamacpp":
        return {"tokens": list(member(ask, "content", str, "").encode())}
    messages = member(ask, "messages", list[dict[str, Any]], [])
    said = "".join(str(message.get("content")) for message in messages)
    if question.dialect == "vllm":
        tokens = list(member(ask, "prompt", str, said).encode())
        context = {"max_model_len": behaviour.context_length}
        return {"count": len(tokens)} | context | {"tokens": tokens, "token_strs": None}
    prompt = member(ask, "prompt", str | list[str], said)
    if isinstance(prompt, str):
        tokens = list(prompt.encode())
        return {"tokens": tokens, "count": len(tokens), "max_model_len": behaviour.context_length}
    lists = [list(each.encode()) for each in prompt]
    return {"tokens": lists, "count": list(map(len, lists)), "max_model_len": behaviour.context_length}


def _nothing_to_read(question: Question, path: str) -> Refusal:
    if question.dialect == "vllm":
        return validation.missing(question.dialect, path, "prompt")
    said = "Value error, Exactly one of 'prompt' or 'messages' must be provided."
    return validation.invalid(question.dialect, path, "value_error", ("body",), said, {})


def detokenize(path: str, ask: Ask, question: Question, behaviour: Behaviour) -> dict[str, Any]:
    """Return the text of tokens under the dialect's own name for it.

    Raises: `Refusal` when vLLM or SGLang finds none.
    """
    if behaviour.text == "prompt":
        text = speaking.text_of(member(ask, "tokens", list[int], []))
        return {{"vllm": "prompt", "sglang": "text"}.get(question.dialect, "content"): text}
    if question.dialect == "llamacpp":
        return {"content": _text(member(ask, "tokens", list[int], []))}
    if not ask.tokens:
        raise validation.missing(question.dialect, path, "tokens")
    if question.dialect == "vllm":
        return {"prompt": _text(member(ask, "tokens", list[int], []))}
    tokens = member(ask, "tokens", list[int | list[int]], [])
    several = bool(tokens) and isinstance(tokens[0], list)
    return {"text": [_text(each) for each in tokens] if several else _text(tokens)}


def decide(ask: Ask, question: Question) -> dict[str, Any]:
    """Return the answer of SGLang's `/v1/systemone`: of equal options the first, of scores the middle, of truths half.

    Raises: `Refusal` when there are no questions, or one of another type.
    """
    asked = member(ask, "questions", dict[str, dict[str, Any]], {})
    answers = {name: _decision(name, each) for name, each in asked.items()}
    used = {"input_tokens": question.prompt_tokens, "output_tokens": 0}
    return {"model": question.model, "answers": answers, "usage": used}


def _decision(name: str, asked: dict[str, Any]) -> dict[str, Any]:
    kind, criteria, mass = asked.get("type"), asked.get("criteria") or {}, {"x_label_mass": 1.0}
    if kind == "noul":
        return {"type": "noul", "noul": 0.5} | mass
    options = [str(option) for option in (criteria if kind == "choice" else range(len(criteria)))]
    if kind not in ("choice", "score") or not options:
        raise Refusal(400, f"question '{name}': it has no type that is known, or no criteria", kind="BadRequest")
    even = {"probabilities": {option: 1 / len(options) for option in options}} | mass
    if kind == "choice":
        return {"type": "choice", "choice": options[0], "confidence": 0.0} | even
    legend = dict(zip(options, criteria, strict=True))
    return {"type": "score", "score": (len(options) - 1) / 2, "confidence": 0.0, "legend": legend} | even


def _text(tokens: Any) -> str:
    return bytes(token % 256 for token in tokens).decode(errors="replace")


def _list(question: Question) -> dict[str, Any]:
    return {"id": _id(question, "embd"), "object": "list", "created": CREATED, "model": question.model}


def _id(question: Question, prefix: str) -> str:
    return f"{prefix}-{question.id('response').removeprefix('resp_')}"
