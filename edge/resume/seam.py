"""The seam of a stream that goes on at another server: what of the second answer is new to the client, as the first's.

A `Seam` takes the second answer's events and gives those that the client gets. It never gives what the client has
already, and nothing at all once the second answer is another one: then it is `broken`, and `outcome` says why.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

import msgspec
import orjson

from edge.exchange import NO_USAGE, Usage, UsageSource
from edge.resume.continuation import Behind
from edge.resume.said import (
    ANSWER,
    DONE,
    THOUGHT_ENDS,
    THOUGHTS,
    Part,
    Said,
    choices_in,
    chunk_in,
    data_of,
    events_in,
    has_role,
    index_of,
    parts_of,
)
from edge.sse import event_end

_ID_BYTES: Final = 16  # the most that an id of a prompt is written in, with what is between two
MAX_HELD_BYTES: Final = 64 * 1024  # of an event that has not ended, and of those that wait for what follows


class Outcome(Enum):
    """What became of a resume; the closed vocabulary of `resume` in the log and of the metric."""

    RESUMED = "resumed"  # the client got more than it had
    UNEQUAL = "unequal"  # the second answer was another one
    IGNORED = "ignored"  # the second server began anew, where it was to go on
    FAILED = "failed"  # the second server failed too before anything new came


@dataclass(slots=True)
class _Differs(Exception):
    outcome: Outcome


class Seam:
    """What both kinds share: cutting events, the first answer's name for itself, and the bill.

    `first` is the usage of what the client had. `model` is the name that was asked, where answers have to carry that.
    `usage` is what the whole answer used, by what the second server told.
    """

    def __init__(self, said: Said, first: Usage, model: str | None = None) -> None:
        self._said = said
        self.first = first
        self._model = model
        self._held = bytearray()
        self._max_held_bytes = MAX_HELD_BYTES
        self._waiting: list[dict[str, Any]] = []  # chunks of which it is not known yet whether the client gets them
        self._waiting_bytes = 0
        self.broken = False
        self.outcome = Outcome.FAILED

    @property
    def holds(self) -> bool:
        """Whether an event has begun and not ended."""
        return bool(self._held)

    def feed(self, content: bytes) -> bytes:
        """Return what of the second answer is new."""
        if self.broken:
            return b""
        given: list[bytes] = []
        try:
            for event in self._events(content):
                given.append(self._take(event))  # noqa: PERF401  # what came before a difference counts
        except _Differs as differs:
            self._break(differs)
        return b"".join(given)

    def _events(self, content: bytes) -> Iterator[bytes]:
        """Yield the events that `content` ends, and hold what is left; raises `_Differs` where that is too much."""
        held = self._held
        if not held or event_end(held[-3:] + content, 0, False):  # else none has ended, whatever is held
            content = bytes(held) + content
            held.clear()
            at = 0
            for event in events_in(content):
                yield event
                at += len(event)
            content = content[at:]
        held += content
        if len(held) > self._max_held_bytes:
            raise _Differs(Outcome.FAILED)

    def close(self) -> bytes:
        """Return what is held: the second answer has ended, in order, maybe without its last event or empty line."""
        given = self.feed(b"\n\n") if self._held else b""
        if not self.broken:
            try:
                given += self._ended()
            except _Differs as differs:
                self._break(differs)
        return given

    def _break(self, differs: _Differs) -> None:
        self.broken = True
        self._held.clear()
        self._waiting.clear()
        if self.outcome is not Outcome.RESUMED:
            self.outcome = differs.outcome

    def usage(self, second: Usage) -> Usage:
        """Return what the whole answer used, by what the second one did."""
        raise NotImplementedError

    def _take(self, event: bytes) -> bytes:
        chunk = chunk_in(event)
        if chunk is None:
            data = data_of(event)
            if not data:
                return event
            if data == DONE:
                rest = self._ended()
                self.outcome = Outcome.RESUMED
                return rest + event
            raise _Differs(Outcome.UNEQUAL)
        if (chunk.get("error") or chunk.get("object") == "error") and self.outcome is not Outcome.RESUMED:
            raise _Differs(Outcome.FAILED)
        return self._take_chunk(chunk, event)

    def _take_chunk(self, chunk: dict[str, Any], event: bytes) -> bytes:
        raise NotImplementedError

    def _ended(self) -> bytes:
        """Return what is still to be given before the end of the stream."""
        raise NotImplementedError

    def _wait(self, chunk: dict[str, Any], event: bytes) -> None:
        """Let a chunk wait for what follows; raises `_Differs` where that is too long in coming."""
        self._waiting.append(chunk)
        self._waiting_bytes += len(event)
        if self._waiting_bytes > self._max_held_bytes:
            raise _Differs(Outcome.FAILED)

    def _waited(self) -> list[dict[str, Any]]:
        waiting, self._waiting, self._waiting_bytes = self._waiting, [], 0
        return waiting

    def _written(self, chunk: dict[str, Any]) -> bytes:
        """Return a chunk as an event of the first answer; raises `_Differs` for one that cannot be written again."""
        choices = choices_in(chunk)
        head = self._said.head_for(index_of(choices[0]) if choices else 0)
        for name, value in head.items():
            if name in chunk:
                chunk[name] = value
        if self._model is not None and "model" in chunk:
            chunk["model"] = self._model
        try:
            event = b"data: %b\n\n" % orjson.dumps(chunk)
        except orjson.JSONEncodeError:  # it reads what is nested deeper than it writes
            raise _Differs(Outcome.FAILED) from None
        self.outcome = Outcome.RESUMED
        return event


class Replayed(Seam):
    """The same question asked again: what the client has is dropped, as long as it comes again.

    Nothing new passes while a choice has not said again all that it had said, of other choices neither.
    """

    def __init__(self, said: Said, first: Usage, model: str | None = None) -> None:
        super().__init__(said, first, model)
        self._left = {
            index: {place: (part, 0) for place, part in parts.items()} for index, parts in said.parts.items() if parts
        }
        self._ends = dict(said.ends)
        self._usages = said.usages  # which are to come again

    def usage(self, second: Usage) -> Usage:
        """Return the second one's, which made all of it, once it has said again what the client has."""
        return self.first if self._left or self._ends or second is NO_USAGE else second

    def _take_chunk(self, chunk: dict[str, Any], event: bytes) -> bytes:
        choices = choices_in(chunk)
        if not choices:
            if self._usages:
                self._usages -= 1
                return b""
            self._require_all()
            return self._written(chunk)
        new = [choice for choice in choices if self._is_new(choice)]
        if new:
            chunk["choices"] = new
            self._wait(chunk, event)
        return b"" if self._left or self._ends else b"".join(map(self._written, self._waited()))

    def _ended(self) -> bytes:
        self._require_all()
        return b""

    def _require_all(self) -> None:
        if self._left or self._ends:
            raise _Differs(Outcome.UNEQUAL)

    def _is_new(self, choice: dict[str, Any]) -> bool:
        """Take from a choice what the client has; return whether there is more."""
        index = index_of(choice)
        left, end = self._left.get(index, {}), choice.get("finish_reason")
        known = index in self._said.roles and has_role(choice)
        is_new = not left and index not in self._ends and not known and index not in self._said.ends
        for place, part, holder, name in list(parts_of(choice)):
            rest = holder[name] = _without(left, place, part)
            is_new = is_new or bool(rest)
        if not left:
            self._left.pop(index, None)
        if end and index in self._said.ends:
            if end != self._said.ends[index]:
                raise _Differs(Outcome.UNEQUAL)
            self._ends.pop(index, None)
        elif end:
            is_new = True
        if is_new and (left or index in self._ends):
            raise _Differs(Outcome.UNEQUAL)
        if is_new:
            _drop_what_is_known(choice, self._said, index)
        return is_new


def _without(left: dict[str, tuple[Part, int]], place: str, part: Part) -> Part:
    """Return what of a part the client has not; `left` has what it has, and where that goes on."""
    if place not in left:
        return part
    had, at = left[place]
    end = min(len(had), at + len(part))
    if type(had) is not type(part) or had[at:end] != part[: end - at]:
        raise _Differs(Outcome.UNEQUAL)
    if end == len(had):
        del left[place]
    else:
        left[place] = had, end
    return part[end - at :]


def _drop_what_is_known(choice: dict[str, Any], said: Said, index: int) -> None:
    """Take from a choice that goes on the role, and the ids and names of tools' calls that had begun."""
    delta = choice.get("delta")
    if not isinstance(delta, dict):
        return
    if index in said.roles:
        delta.pop("role", None)
    calls = delta.get("tool_calls")
    for call in calls if isinstance(calls, list) else ():
        if not isinstance(call, dict):
            continue
        begun = f"delta.tool_calls.{index_of(call)}."
        if any(place.startswith(begun) for place in said.parts.get(index, ())):
            call.pop("id", None)
            call.pop("type", None)
            function = call.get("function")
            if isinstance(function, dict) and not function.get("name"):
                function.pop("name", None)


class _Kinds:
    """What the parts of an answer that goes on may be: thoughts as the first server told them, and the answer behind.

    Nothing tells an answer behind a thought from one whose server has no parser of thoughts, and tells them as content.
    """

    def __init__(self, said: Said, place: str) -> None:
        self._names = [each for each in THOUGHTS if said.text(each)]
        self._is_thinking = bool(said.thoughts) and not said.thought_is_over(place)
        self._has_begun = False

    def take(self, choice: dict[str, Any]) -> None:
        """Raise `_Differs` for a part of another kind than what must follow."""
        parts = {place: part for place, part, _, _ in parts_of(choice)}
        thoughts, answer = [place for place in THOUGHTS if place in parts], parts.get(ANSWER, "")
        if thoughts and (not self._is_thinking or thoughts != self._names):
            raise _Differs(Outcome.UNEQUAL)
        if self._is_thinking and answer:
            if not (self._has_begun or thoughts) or THOUGHT_ENDS in answer:
                raise _Differs(Outcome.UNEQUAL)
            self._is_thinking = False
        self._has_begun = self._has_begun or bool(thoughts)


class Continued(Seam):
    """An answer that goes on behind what the client has, which stood in the second question.

    `behind` is what was asked: a server that ignores it tells another number of tokens, or other ids. `shows_usage` and
    `shows_running`: the client asked for usage at the end, and in each chunk; `hides_usage`: it gets none;
    `shows_timings`: it asked for those of llama.cpp.
    """

    def __init__(
        self,
        said: Said,
        first: Usage,
        model: str | None,
        place: str,
        behind: Behind,
        *,
        shows_usage: bool,
        shows_running: bool,
        hides_usage: bool,
        shows_timings: bool,
    ) -> None:
        super().__init__(said, first, model)
        self._places = (place, *THOUGHTS)
        self._tokens = len(behind.tokens)
        self._kinds = _Kinds(said, place)
        self._thought_is_over = said.thought_is_over(place)
        self._max_held_bytes += _ID_BYTES * len(behind.ids or ())
        self._tells_thoughts = False
        self._behind = behind
        self._shows_usage = shows_usage
        self._shows_running = shows_running
        self._hides_usage = hides_usage
        self._shows_timings = shows_timings
        self._runs = False
        self._goes_on = behind.length is None  # as far as is known
        self._is_finished = False

    def usage(self, second: Usage) -> Usage:
        """Return the prompt once, and each token once: what the second one read of the answer is no prompt."""
        if second.source is UsageSource.NONE or self.outcome is not Outcome.RESUMED:
            return self.first
        completion = self._tokens + second.completion_tokens
        if second.source is UsageSource.ESTIMATED:
            return msgspec.structs.replace(self.first, completion_tokens=completion)
        prompt = max(0, second.prompt_tokens - self._tokens)
        cached = None if second.cached_tokens is None else min(second.cached_tokens, prompt)
        created = min(second.cache_creation_tokens, prompt)
        return msgspec.structs.replace(
            second,
            reasoning_tokens=self._thoughts(second.reasoning_tokens) if self._tells_thoughts else 0,
            prompt_tokens=prompt,
            completion_tokens=completion,
            cached_tokens=cached,
            cache_creation_tokens=created,
        )

    def _thoughts(self, second: int) -> int:
        """Return how many tokens are thoughts: none of the second's where they had ended, whatever it says."""
        return self._behind.thoughts + (0 if self._thought_is_over else second)

    def _take_chunk(self, chunk: dict[str, Any], event: bytes) -> bytes:
        for choice in choices_in(chunk):
            delta = choice.get("delta")
            if isinstance(delta, dict) and index_of(choice) in self._said.roles:
                delta.pop("role", None)
            if self._behind.ids is not None and "token_ids" in choice:
                choice["token_ids"] = None  # the client did not ask
        return self._shown(chunk) if self._goes_on else self._judged(chunk, event)

    def _ended(self) -> bytes:
        if self._waiting:
            raise _Differs(Outcome.IGNORED)
        if not self._is_finished:
            raise _Differs(Outcome.FAILED)
        return b""

    def _judged(self, chunk: dict[str, Any], event: bytes) -> bytes:
        """Pass nothing until the server has told by its prompt that it goes on."""
        self._wait(chunk, event)
        told = _prompt_tokens_in(chunk)
        if told is None:
            if any(place in self._places for choice in choices_in(chunk) for place, _, _, _ in parts_of(choice)):
                raise _Differs(Outcome.IGNORED)
            return b""
        behind = self._behind
        if told != behind.length or (behind.ids and chunk.get("prompt_token_ids") != behind.ids):
            raise _Differs(Outcome.IGNORED)
        if behind.ids:
            chunk["prompt_token_ids"] = None
        self._goes_on = True
        return b"".join(map(self._shown, self._waited()))

    def _shown(self, chunk: dict[str, Any]) -> bytes:
        """Return an event with the usage of the whole answer, if the client is to see any; b"" for one of nothing."""
        usage, choices = chunk.get("usage"), choices_in(chunk)
        for choice in choices:
            self._kinds.take(choice)
        ends = any(choice.get("finish_reason") for choice in choices)
        self._is_finished = self._is_finished or ends
        if isinstance(usage, dict):
            _join(usage, self._tokens)
            for holder in (usage, usage.get("completion_tokens_details")):
                if isinstance(holder, dict) and isinstance(holder.get("reasoning_tokens"), int):
                    self._tells_thoughts = True
                    holder["reasoning_tokens"] = self._thoughts(holder["reasoning_tokens"])
            self._runs = self._runs or (bool(choices) and not ends)
            if not choices and not self._shows_usage:
                return b""
            if choices and not self._shows_running and (not ends or self._runs or self._hides_usage):
                del chunk["usage"]
        if not ends and not self._shows_timings:
            chunk.pop("timings", None)
        if choices and not ends and not any(part for choice in choices for _, part, _, _ in parts_of(choice)):
            return b""
        return self._written(chunk)


def _prompt_tokens_in(chunk: dict[str, Any]) -> int | None:
    """Return how many tokens a chunk says that its question had, of vLLM and SGLang, or of llama.cpp's timings."""
    usage, timings = chunk.get("usage"), chunk.get("timings")
    if isinstance(usage, dict) and isinstance(usage.get("prompt_tokens"), int):
        return int(usage["prompt_tokens"])
    if isinstance(timings, dict) and isinstance(timings.get("prompt_n"), int):
        cached = timings.get("cache_n")
        return int(timings["prompt_n"]) + (cached if isinstance(cached, int) else 0)
    return None


def _join(usage: dict[str, Any], tokens: int) -> None:
    """Count in a usage object as of the answer what of it stood in the second question."""
    prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if not isinstance(prompt, int) or not isinstance(completion, int):
        return
    usage["prompt_tokens"] = max(0, prompt - tokens)
    usage["completion_tokens"] = completion + tokens
    details = usage.get("prompt_tokens_details")
    if isinstance(details, dict):
        for name in ("cached_tokens", "created_cache_tokens"):
            if isinstance(details.get(name), int):
                details[name] = min(details[name], usage["prompt_tokens"])
