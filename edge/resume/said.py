"""What a stream of chunks has said: the text of each choice, in all the places where chunks have one.

Two servers cut one answer into chunks in different ways. So an answer is compared by its places, such as
`delta.content` or the arguments of a tool's call: of each, the texts of all chunks are one text, and the items of all
lists one list.
"""

from collections.abc import Iterator
from itertools import chain
from typing import Any, Final

import orjson

from edge.sse import EVENT_DATA, event_end, silence_end

DONE: Final = b"[DONE]"
ANSWER: Final = "delta.content"  # where a choice of a chat has its text
THOUGHTS: Final = ("delta.reasoning_content", "delta.reasoning")  # where a choice has what its model thought
THOUGHT_BEGINS, THOUGHT_ENDS = "<think>", "</think>"  # as DeepSeek-R1 and its kind write it
# Of a choice: what is said elsewhere, or differs each time. An id of a tool's call is drawn anew by every server.
# What filters think of a chunk stands in each.
_NO_TEXT: Final = frozenset({
    "index", "id", "type", "role", "finish_reason", "stop_reason", "matched_stop", "content_filter_results"
})  # fmt: skip
_OF_ALL_CHUNKS: Final = ("id", "created", "model", "system_fingerprint")
_CALLS: Final = "tool_calls"
_STEP_BYTES: Final = 32 * 1024  # read at once, of events that each cost as much more as so many bytes would
_EVENT_COSTS_BYTES: Final = 1024

Part = str | list[Any]


def events_in(content: bytes) -> Iterator[bytes]:
    """Yield the whole events of content, comments between them as events too; what is behind them is left."""
    at, no_cr = 0, b"\r" not in content
    while True:
        end = silence_end(content, at)
        if end == at:
            end = event_end(content, at, no_cr)
        if not end or end == at:
            return
        yield content[at:end]
        at = end


def data_of(event: bytes) -> bytes:
    """Return the data of an event, b"" for a comment."""
    return b"\n".join(EVENT_DATA.findall(event)).strip()


def chunk_in(event: bytes) -> dict[str, Any] | None:
    """Return the chunk that an event carries; None for `[DONE]`, a comment, and what is no object."""
    try:
        chunk = orjson.loads(data_of(event))
    except orjson.JSONDecodeError:
        return None
    return chunk if isinstance(chunk, dict) else None


def choices_in(chunk: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the choices of a chunk."""
    choices = chunk.get("choices")
    return [each for each in choices if isinstance(each, dict)] if isinstance(choices, list) else []


def index_of(choice: dict[str, Any]) -> int:
    """Return the number of a choice, or of a tool's call."""
    index = choice.get("index")
    return index if isinstance(index, int) else 0


def parts_of(choice: dict[str, Any]) -> Iterator[tuple[str, Part, dict[str, Any], str]]:
    """Yield each text and each list of a choice that is not empty: its place, itself, who has it, and as what."""
    holders = [("", choice)]
    for place, holder in holders:  # which grows; nothing calls itself, however deep a server nests
        for name, part in holder.items():
            if name in _NO_TEXT or not part:
                continue
            if isinstance(part, dict):
                holders.append((f"{place}{name}.", part))
            elif name == _CALLS and isinstance(part, list):
                calls = (call for call in part if isinstance(call, dict))
                holders += ((f"{place}{_CALLS}.{index_of(call)}.", call) for call in calls)
            elif isinstance(part, str | list):
                yield f"{place}{name}", part, holder, name


class Said:
    """What a client has of an answer. `parts` are the texts and lists by their places, of each choice.

    `heads` are the members that all chunks of a choice have in common, `roles` the choices whose beginning is there,
    `ends` the reasons to finish, `usages` how many chunks had no choices. `is_plain`: all of it could be read.
    `thinks_again`: thoughts came behind the answer.
    """

    def __init__(self) -> None:
        self.parts: dict[int, dict[str, Part]] = {}
        self.heads: dict[int, dict[str, Any]] = {}
        self.roles: set[int] = set()
        self.ends: dict[int, str] = {}
        self.usages = 0
        self.is_plain = True
        self.thinks_again = False
        self._pieces: dict[int, dict[str, list[Part]]] = {}

    def read(self, content: bytes) -> Iterator[None]:
        """Read all that a client has, in steps of a few milliseconds; nothing is known before the last one."""
        at = step = 0
        for event in events_in(content):
            self._read(event)
            at += len(event)
            step += len(event) + _EVENT_COSTS_BYTES
            if step > _STEP_BYTES:
                step = 0
                yield
        self.is_plain = self.is_plain and at == len(content)
        for index, places in self._pieces.items():
            joined = {place: _joined(pieces) for place, pieces in places.items()}
            self.is_plain = self.is_plain and all(joined.values())
            self.parts[index] = joined
        self._pieces.clear()

    def _read(self, event: bytes) -> None:
        chunk = chunk_in(event)
        if chunk is None or chunk.get("error"):
            is_known = silence_end(event, 0) == len(event) or data_of(event) == DONE
            self.is_plain = self.is_plain and is_known
            return
        head = {name: chunk[name] for name in _OF_ALL_CHUNKS if chunk.get(name) is not None}
        choices = choices_in(chunk)
        self.usages += not choices
        for choice in choices:
            index = index_of(choice)
            self.heads[index] = head | self.heads.get(index, {})
            if has_role(choice):
                self.roles.add(index)
            places = self._pieces.setdefault(index, {})
            answers = ANSWER in places
            for place, part, _, _ in parts_of(choice):
                self.thinks_again = self.thinks_again or (answers and place in THOUGHTS)
                places.setdefault(place, []).append(part)
            if choice.get("finish_reason"):
                self.ends[index] = choice["finish_reason"]

    @property
    def has_text(self) -> bool:
        """Whether any choice has said something."""
        return any(self.parts.values()) or bool(self.ends)

    def is_over(self, choices: int) -> bool:
        """Whether it is the text of the one choice that was asked, which has ended."""
        return self.is_plain and choices == len(self.heads) == 1 and self.ends.keys() == self.heads.keys()

    def text(self, place: str) -> str:
        """Return what the first choice has said in one place."""
        part = self.parts.get(0, {}).get(place, "")
        return part if isinstance(part, str) else ""

    @property
    def thoughts(self) -> str:
        """What the first choice has said of its thoughts."""
        return "".join(map(self.text, THOUGHTS))

    def thought_is_over(self, place: str) -> bool:
        """Whether the first choice has ended its thoughts."""
        return bool(self.thoughts and self.text(place))

    def written(self, place: str) -> str:
        """Return what the first choice has said in one place, as its model wrote it: thoughts and their end first."""
        end = THOUGHT_ENDS if self.thought_is_over(place) else ""
        return self.thoughts + end + self.text(place)

    def head_for(self, index: int) -> dict[str, Any]:
        """Return the members that chunks of a choice have in common."""
        return self.heads.get(index) or next(iter(self.heads.values()), {})


def _joined(pieces: list[Any]) -> Part:
    """Return all pieces of a place as one, nothing where there are both texts and lists."""
    kinds = set(map(type, pieces))
    return "".join(pieces) if kinds == {str} else list(chain.from_iterable(pieces)) if kinds == {list} else ""


def has_role(choice: dict[str, Any]) -> bool:
    """Whether a choice begins with this chunk."""
    delta = choice.get("delta")
    return isinstance(delta, dict) and delta.get("role") is not None
