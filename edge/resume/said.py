"""What a stream of chunks has said: the text of each choice, in all the places where chunks have one.

Two servers cut one answer into chunks in different ways. So an answer is compared by its places, such as
`delta.content` or the arguments of a tool's call: of each, the texts of all chunks are one text, and the items of all
lists one list.
"""

from collections.abc import Iterator
from typing import Any, Final

import orjson

from edge.sse import EVENT_DATA, event_end, silence_end

DONE: Final = b"[DONE]"
# Of a choice: what is said elsewhere, or differs each time. An id of a tool's call is drawn anew by every server.
_NO_TEXT: Final = frozenset({"index", "id", "type", "role", "finish_reason", "stop_reason", "matched_stop"})
_OF_ALL_CHUNKS: Final = ("id", "created", "model", "system_fingerprint")
_CALLS: Final = "tool_calls"

Part = str | list[Any]


def split_events(content: bytes) -> tuple[list[bytes], bytes]:
    """Return the whole events of content, comments between them as events too, and what is left of the last one."""
    events: list[bytes] = []
    at, no_cr = 0, b"\r" not in content
    while True:
        end = silence_end(content, at)
        if end == at:
            end = event_end(content, at, no_cr)
        if not end or end == at:
            return events, content[at:]
        events.append(content[at:end])
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


def parts_of(value: dict[str, Any], place: str = "") -> Iterator[tuple[str, Part, dict[str, Any]]]:
    """Yield each text and each list of a choice that is not empty: its place, itself, and the object that has it."""
    for name, part in value.items():
        if name in _NO_TEXT or not part:
            continue
        if isinstance(part, dict):
            yield from parts_of(part, f"{place}{name}.")
        elif name == _CALLS and isinstance(part, list):
            for call in part:
                if isinstance(call, dict):
                    yield from parts_of(call, f"{place}{_CALLS}.{index_of(call)}.")
        elif isinstance(part, str | list):
            yield f"{place}{name}", part, value


class Said:
    """What a client has of an answer. `parts` are the texts and lists by their places, of each choice.

    `heads` are the members that all chunks of a choice have in common, `roles` the choices whose beginning is there,
    `ends` the reasons to finish, `usages` how many chunks had no choices. `is_plain`: all of it could be read.
    """

    def __init__(self, content: bytes = b"") -> None:
        self.parts: dict[int, dict[str, Part]] = {}
        self.heads: dict[int, dict[str, Any]] = {}
        self.roles: set[int] = set()
        self.ends: dict[int, str] = {}
        self.usages = 0
        events, left = split_events(content)
        self.is_plain = not left
        for event in events:
            self._read(event)

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
            self.heads.setdefault(index, {}).update({k: v for k, v in head.items() if k not in self.heads[index]})
            if has_role(choice):
                self.roles.add(index)
            parts = self.parts.setdefault(index, {})
            for place, part, _ in parts_of(choice):
                parts[place] = parts[place] + part if place in parts else part  # type: ignore[operator]  # of one kind
            if choice.get("finish_reason"):
                self.ends[index] = choice["finish_reason"]

    @property
    def has_text(self) -> bool:
        """Whether any choice has said something."""
        return any(self.parts.values()) or bool(self.ends)

    @property
    def is_over(self) -> bool:
        """Whether it is the text of one choice, which has ended."""
        return self.is_plain and len(self.heads) == 1 and self.ends.keys() == self.heads.keys()

    def text(self, place: str) -> str:
        """Return what the first choice has said in one place."""
        part = self.parts.get(0, {}).get(place, "")
        return part if isinstance(part, str) else ""

    def head_for(self, index: int) -> dict[str, Any]:
        """Return the members that chunks of a choice have in common."""
        return self.heads.get(index) or next(iter(self.heads.values()), {})


def has_role(choice: dict[str, Any]) -> bool:
    """Whether a choice begins with this chunk."""
    delta = choice.get("delta")
    return isinstance(delta, dict) and delta.get("role") is not None
