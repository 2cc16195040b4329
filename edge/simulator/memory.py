"""What a simulated model server remembers: how prompts began, and the responses that can be asked for again."""

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, Final

BLOCK_BYTES: Final = 16
MAX_BYTES: Final = 1 << 20
_MAX_RESPONSES: Final = 1_000
_came: set[str] = set()


def comes_first(name: str) -> bool:
    """Whether nobody in this process has asked this by that name."""
    is_first = name not in _came
    _came.add(name)
    return is_first


class Prefixes:
    """How prompts began, in blocks, each known by all that stands before it; as the prefix cache of vLLM works."""

    def __init__(self) -> None:
        self._blocks: OrderedDict[int, None] = OrderedDict()

    def known_bytes(
        self, model: Hashable, prompt: bytes, max_bytes: int = MAX_BYTES, block_bytes: int = BLOCK_BYTES
    ) -> int:
        """Return how many bytes at the start of a prompt an earlier one for this model had too, and remember it.

        Of what is over `max_bytes` the longest unused is forgotten, of a prompt its end first.
        """
        seen, known, at = True, 0, hash((model, block_bytes))
        blocks = []
        for start in range(0, len(prompt), block_bytes):
            block = prompt[start : start + block_bytes]
            at = hash((at, block))
            seen = seen and at in self._blocks
            known += len(block) if seen else 0
            blocks.append(at)
        for at in reversed(blocks):
            self._blocks[at] = None
            self._blocks.move_to_end(at)
        while len(self._blocks) * block_bytes > max_bytes:
            self._blocks.popitem(last=False)
        return known


class Prefill:
    """When an engine has read its prompts: one after another, as they come."""

    def __init__(self) -> None:
        self._read_at = 0.0

    def wait_s(self, tokens: int, tokens_per_s: float, now: float) -> float:
        """Return how long a prompt takes from `now` until it is read, those before it included."""
        self._read_at = max(self._read_at, now) + tokens / tokens_per_s
        return self._read_at - now


class Responses:
    """The last responses that were made, by their ids."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, Any] = OrderedDict()

    def keep(self, response_id: str, question: object) -> None:
        """Remember what a response answered; the oldest goes when there are too many."""
        self._kept[response_id] = question
        self._kept.move_to_end(response_id)
        if len(self._kept) > _MAX_RESPONSES:
            self._kept.popitem(last=False)

    def get(self, response_id: str) -> Any:
        """Return what the response answered, or None when it is unknown."""
        return self._kept.get(response_id)

    def drop(self, response_id: str) -> None:
        """Forget a response that is known."""
        del self._kept[response_id]


@dataclass(frozen=True, slots=True)
class Memory:
    """All that outlives a request."""

    prefixes: Prefixes = field(default_factory=Prefixes)
    responses: Responses = field(default_factory=Responses)
