"""Whether a stream that broke may go on, and in which of two ways; `docs/resume.md` has the table with the reasons.

To replay is exact or an error, and takes an answer that comes again. To continue is exact where the delivered text,
read again by a tokenizer, is what was generated, and where nothing asked counts from the beginning of an answer.
"""

from enum import Enum
from typing import Any, Final, Literal, NamedTuple

import msgspec
import orjson

from edge.config.settings import Engine, Resume
from edge.resume.said import ANSWER, THOUGHT_BEGINS, THOUGHTS, Said

_GRAMMARS: Final = (  # only that of llama.cpp knows what stands before
    "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar",
    "guided_decoding_backend", "json_schema", "grammar", "regex", "ebnf", "structural_tag",
)  # fmt: skip
_PLAIN: Final = {"type": "text"}
_CONTINUING: Final[tuple[Engine, ...]] = ("vllm", "sglang", "llamacpp")
THINKING: Final[tuple[Engine, ...]] = ("vllm", "sglang")  # that go on with thoughts, and tell the rest as what it is
_MOST_STOPS: Final = 1024  # characters of all stop strings, each beginning of which is looked for
_LOST: Final = "\ufffd"  # of a character whose bytes are gone


class Way(Enum):
    """How the sibling is asked."""

    REPLAY = "replay"
    CONTENT = "content"


class NotResumed(Exception):
    """A stream ends as it broke; `reason` is a word for the log and the metric."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Question(NamedTuple):
    """What a body asked, as far as it matters here; `members` are those of the body, as they are written there."""

    members: dict[str, msgspec.Raw]
    is_chat: bool

    def get(self, name: str) -> Any:
        """Return a member, None for none; raises `NotResumed`."""
        written = self.members.get(name)
        try:
            return None if written is None else orjson.loads(memoryview(written))
        except orjson.JSONDecodeError:
            raise NotResumed("body") from None

    @property
    def place(self) -> str:
        """Where a choice has its text."""
        return ANSWER if self.is_chat else "text"

    @property
    def is_greedy(self) -> bool:
        """Whether the answer is the likeliest one, and so the same each time."""
        return _number(self.get("temperature")) == 0

    @property
    def is_seeded(self) -> bool:
        """Whether the chance of the answer is the same each time."""
        return self.get("seed") is not None


class _TextPart(msgspec.Struct, gc=False):
    type: Literal["text"]


class _Message(msgspec.Struct, gc=False):
    role: str | None = None
    content: str | list[_TextPart] | None = None


_NOTHING: Final = msgspec.Raw(b"[]")
_members_in: Final = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_messages_in: Final = msgspec.json.Decoder(list[_Message]).decode
_prompt_in: Final = msgspec.json.Decoder(str | list[int]).decode


def question_in(body: bytes, *, is_chat: bool) -> Question:
    """Return what a body that was read once asks; raises `NotResumed`."""
    try:
        return Question(_members_in(body), is_chat)
    except (msgspec.DecodeError, UnicodeDecodeError):  # of what was released, or of what only other parsers read
        raise NotResumed("body") from None


def ways_of(
    mode: Resume, question: Question, said: Said, engine: Engine, delivered_tokens: int, resume_at_most: int
) -> list[Way]:
    """Return how a sibling may be asked, the better way first; raises `NotResumed`."""
    if not said.is_plain:
        raise NotResumed("unreadable")
    if not said.has_text:
        return [Way.REPLAY]  # nobody has anything that the second answer has to agree with
    replayed = _against_replay(question, delivered_tokens, resume_at_most) if mode != "content" else "mode"
    continued = _against_content(question, said, engine) if mode != "replay" else "mode"
    if mode == "auto" and question.is_seeded and not question.is_greedy and not replayed:
        return [Way.REPLAY]
    reasons = {Way.CONTENT: continued, Way.REPLAY: replayed}
    ways = [way for way, reason in reasons.items() if not reason]
    if not ways:
        raise NotResumed(continued if mode != "replay" else replayed)
    return ways


def _against_replay(question: Question, delivered_tokens: int, resume_at_most: int) -> str:
    if not question.is_greedy and not question.is_seeded:
        return "sampled"
    return "too_long" if delivered_tokens > resume_at_most else ""


def _against_content(question: Question, said: Said, engine: Engine) -> str:
    """Return why the text cannot be gone on with, "" where it can."""
    if engine not in _CONTINUING:
        return "engine"
    return _of_request(question, engine) or _of_answer(question, said, engine)


def _of_request(question: Question, engine: Engine) -> str:
    if (_number(question.get("n")) or 1) != 1 or (_number(question.get("best_of")) or 1) != 1:
        return "choices"
    if question.is_seeded and not question.is_greedy:
        return "seeded"
    if question.get("echo") or question.get("suffix"):
        return "echo"
    if any(_number(question.get(name)) for name in ("frequency_penalty", "presence_penalty")):
        return "penalties"
    if engine == "sglang" and _number(question.get("repetition_penalty")) not in (None, 1):
        return "penalties"
    if engine == "vllm" and question.get("stop"):
        return "stop"
    if engine != "llamacpp" and (
        any(question.get(name) for name in _GRAMMARS) or question.get("response_format") not in (None, _PLAIN)
    ):
        return "grammar"
    if question.get("truncate_prompt_tokens") or question.get("prompt_logprobs") is not None:
        return "prompt"
    return _of_messages(question) if question.is_chat else _of_prompt(question)


def _of_messages(question: Question) -> str:
    try:
        messages = _messages_in(question.members.get("messages", _NOTHING))
    except (msgspec.DecodeError, UnicodeDecodeError):
        return "media"
    if not messages:
        return "prompt"
    if messages[-1].role == "assistant":
        return "prefill"
    if question.get("continue_final_message") or question.get("add_generation_prompt") is False:
        return "prefill"
    if question.get("include_reasoning") is False:
        return "reasoning"  # thoughts that nobody has seen
    if question.get("tool_choice") not in (None, "none", "auto"):
        return "tools"
    return ""


def _of_prompt(question: Question) -> str:
    if question.get("logprobs") is not None:
        return "logprobs"  # whose offsets count from the beginning of the text
    try:
        prompt = _prompt_in(question.members.get("prompt", _NOTHING))
    except (msgspec.DecodeError, UnicodeDecodeError):
        prompts = question.get("prompt")
        return "choices" if isinstance(prompts, list) and len(prompts) > 1 else "prompt"
    return "" if isinstance(prompt, str) or prompt else "prompt"


def _of_answer(question: Question, said: Said, engine: Engine) -> str:
    parts = said.parts.get(0, {})
    if len(said.parts) > 1:
        return "choices"
    if said.ends:
        return "finished"
    places = set(parts) - {question.place} - {place for place in parts if place.startswith("logprobs.")}
    if any("tool_calls" in place or "function_call" in place for place in places):
        return "tools"
    thoughts = places.intersection(THOUGHTS)
    if thoughts and (said.thinks_again or len(thoughts) > 1 or engine not in THINKING or not question.is_chat):
        return "reasoning"
    if places - thoughts:
        return "reasoning" if any("reasoning" in place for place in places - thoughts) else "unreadable"
    if thoughts and THOUGHT_BEGINS in said.written(question.place):
        return "reasoning"  # a parser that reads this in the prompt takes what follows for a thought
    if _stop_has_begun(question, said.written(question.place)):
        return "stop"
    return "characters" if _LOST in said.written(question.place) else ""


def _stop_has_begun(question: Question, text: str) -> bool:
    """Whether a text may end within a stop string, of which an engine sees only what it writes by itself."""
    stops = question.get("stop") or []
    stops = [stops] if isinstance(stops, str) else stops
    if question.get("stop_regex") or not isinstance(stops, list) or not all(isinstance(each, str) for each in stops):
        return True
    if sum(map(len, stops)) > _MOST_STOPS:
        return True
    return any(text.endswith(stop[:end]) for stop in stops for end in range(1, len(stop)))


def _number(value: Any) -> float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def limits_left(question: Question, tokens: int) -> dict[str, int]:
    """Return the limits of an answer less what it has; raises `NotResumed` where nothing is left."""
    left: dict[str, int] = {}
    for name in ("max_tokens", "max_completion_tokens", "n_predict", "min_tokens"):
        limit = question.get(name)
        if type(limit) is int and limit >= 0:
            left[name] = max(0, limit - tokens)
            if not left[name] and name != "min_tokens":
                raise NotResumed("at_limit")
    return left
