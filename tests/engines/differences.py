"""Where a record differs from what the engine counted, and whose doing that is.

Each difference says how the numbers look where it is the reason; a difference that none of them explains is a fault.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from tests.engines.runs import Outcome


@dataclass(frozen=True)
class Difference:
    """Why records of some cases differ.

    `engines`: their names, none for all. `applies`: whether it is about an outcome's case. `looks`: whether the numbers
    look as they do then. `mark`: of the table, for the note with `reason`.
    """

    mark: str
    engines: tuple[str, ...]
    applies: Callable[[Outcome], bool]
    looks: Callable[[Outcome], bool]
    reason: str


def is_equal(outcome: Outcome) -> bool:
    """Whether a record has what the engine counted."""
    recorded, counted = outcome.recorded, outcome.counted
    return (recorded.prompt, recorded.completion) == (counted.prompt, counted.completion)


def explained(outcome: Outcome) -> Difference | None:
    """Return the difference that explains an outcome which is not equal."""
    for each in DIFFERENCES:
        is_of = not each.engines or outcome.engine in each.engines
        if is_of and each.applies(outcome) and each.looks(outcome):
            return each
    return None


def _named(*names: str) -> Callable[[Outcome], bool]:
    return lambda outcome: outcome.case.name in names


def _was_cut(outcome: Outcome) -> bool:
    return outcome.case.goes in ("client leaves", "breaks")


def _has_less(outcome: Outcome) -> bool:
    return outcome.recorded.completion <= outcome.counted.completion


def _source(outcome: Outcome, *sources: str) -> bool:
    return set(outcome.sources) <= {*sources, "final"}


DIFFERENCES: Final = (
    Difference(
        "a", ("llamacpp",), _named("chat, n = 2"),
        lambda each: each.recorded.prompt == each.counted.prompt and _has_less(each),
        "The `usage` of a document tells the tokens of one choice, whatever `n` is. Streams tell all.",
    ),
    Difference(
        "b", ("llamacpp",), _named("two prompts"),
        lambda each: each.recorded.prompt < each.counted.prompt and _has_less(each),
        "The `usage` of a document tells one prompt and its answer, however many were sent. Streams tell all.",
    ),
    Difference(
        "c", ("llamacpp",), _named("messages, stream"),
        lambda each: each.recorded.completion == each.counted.completion,
        "A stream whose first token is half a character has no `message_start`, so that nothing tells its prompt: "
        "the edge estimates it. Answers are exact.",
    ),
    Difference(
        "d", ("vllm",), lambda each: each.case.name.startswith("chat, n = 2"),
        lambda each: each.recorded.completion == each.counted.completion
        and each.recorded.prompt * 2 == each.counted.prompt,
        "The counter of prompts counts a prompt once for each choice; the `usage` tells it once, and is recorded.",
    ),
    Difference(
        "i", ("sglang",), lambda each: each.case.name.startswith("chat, n = 2"),
        lambda each: each.recorded.completion == each.counted.completion
        and each.recorded.prompt * 3 == each.counted.prompt,
        "The counter of prompts counts a prompt once for each choice, and once for filling the cache before; the "
        "`usage` tells it once, and is recorded.",
    ),
    Difference(
        "e", (), _was_cut,
        lambda each: "running" in each.sources and _source(each, "running") and _has_less(each)
        and each.recorded.prompt == each.counted.prompt,
        "The record has what the engine told until then. The engine writes on until it notices.",
    ),
    Difference(
        "f", ("transformers",), _was_cut, lambda each: _source(each, "estimated") and not each.counted.completion,
        "The engine tells its usage at the end of a stream alone, and has no counters: there is nothing to compare.",
    ),
    Difference(
        "g", (), _was_cut, lambda each: _source(each, "estimated") and _has_less(each),
        "Nothing told the usage until then. The record estimates it: a token for each frame that came, a quarter of "
        "the request's bytes for the prompt. The engine writes on until it notices, and may put several tokens into a "
        "frame.",
    ),
    Difference(
        "h", ("transformers",), lambda each: each.case.goes == "fails",
        lambda each: set(each.sources) == {"estimated"} and not each.recorded.completion,
        "The stream fails behind its first frame, and nothing tells what it used: the record estimates the prompt, and "
        "counts no answer.",
    ),
)  # fmt: skip
