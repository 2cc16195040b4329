"""A model that thinks before it answers, as DeepSeek-R1 does, and the parsers that tell its thoughts apart.

Its template opens the thought, and the model ends it. What a prompt is that goes on with an answer, and what a parser
takes the rest for, is as in a run of vLLM 0.32.0, SGLang 0.5.23 and llama.cpp of October 2026.
"""

from typing import Any, Final

from edge.simulator.behaviour import Dialect, Refusal
from edge.simulator.questions import Question

BEGINS, ENDS = "<think>", "</think>"
OPENS: Final = f"<\uff5cAssistant\uff5c>{BEGINS}\n"
_ASKS: Final = "<\uff5cAssistant\uff5c>"
_NAMES: Final[dict[Dialect, str]] = {"vllm": "reasoning"}


def goes_on(dialect: Dialect, text: str) -> str:
    """Return what a template makes of a message that is gone on with.

    vLLM leaves out that a thought was opened, SGLang does not show the message to its template. Raises: `Refusal`.
    """
    if dialect == "sglang":
        return OPENS + text
    if dialect == "llamacpp":
        return f"{_ASKS}{BEGINS}{ENDS}{text}"
    if ENDS in text:
        raise Refusal(400, "The final message does not appear in the chat after applying the chat template.")
    return _ASKS + text


def goes_on_thinking(prompt: str) -> bool:
    """Whether what follows a prompt is a thought."""
    return prompt.rfind(ENDS) <= prompt.rfind(BEGINS)


def told(question: Question, pieces: list[tuple[str, int]]) -> list[tuple[dict[str, Any], int]]:
    """Return the deltas of pieces of an answer, thoughts apart; there is none for the mark alone that ends them."""
    if question.thinks is None:
        return [({"content": text}, tokens) for text, tokens in pieces]
    name, thinks = _NAMES.get(question.dialect, "reasoning_content"), question.thinks
    found: list[tuple[dict[str, Any], int]] = []
    for text, tokens in pieces:
        thought, mark, content = text.partition(ENDS) if thinks else ("", "", text)
        thinks = thinks and not mark
        delta = ({name: thought} if thought or thinks else {}) | ({"content": content} if content else {})
        if delta or tokens == question.tokens:
            found.append((delta, tokens))
    return found


def message(question: Question, text: str) -> dict[str, Any]:
    """Return the members of a whole message."""
    ((delta, _),) = told(question, [(text, question.tokens)])
    return {"content": None} | delta
