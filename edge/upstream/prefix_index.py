"""Which members had a prefix lately: a bounded index of marks, with no stall however full it is.

A digest has one integer, `stamp << 12 | slot`, where one member had it, or a tuple of them. Each of the shards has two
dicts: a full young one becomes the old one, whose entries go at once, a few thousand of them. One dict of 300,000
stalls 9 ms as it grows, and has no cheap way to drop what is oldest.
"""

from collections.abc import Iterable, Sequence
from typing import Final

MAX_ENTRIES: Final = 300_000  # 21 MB
_SLOT_BITS: Final = 12
SLOTS: Final = 1 << _SLOT_BITS  # members of a pool that are told apart
_SLOT: Final = SLOTS - 1
_SHARDS: Final = 64
_SHARD_SHIFT: Final = 54  # a digest has 60 bits; the dicts use the low ones
_MOST_SHARERS: Final = 8  # members remembered of one mark, the latest

_Entry = int | tuple[int, ...]


class PrefixIndex:
    """Marks, with the slots of the members that had them; a slot that is forgotten has none of its old ones."""

    __slots__ = ("_born", "_most", "_old", "_stamp", "_young")

    def __init__(self, max_entries: int = MAX_ENTRIES) -> None:
        self._most = max(1, max_entries // _SHARDS // 2)
        self._young: list[dict[int, _Entry]] = [{} for _ in range(_SHARDS)]
        self._old: list[dict[int, _Entry]] = [{} for _ in range(_SHARDS)]
        self._stamp = 0
        self._born: list[int] = []  # by slot: the first stamp that counts

    def __len__(self) -> int:
        return sum(map(len, self._young)) + sum(map(len, self._old))

    def forget(self, slot: int) -> None:
        """Let nothing be known of a slot, however much was."""
        self._born += [0] * (slot + 1 - len(self._born))
        self._born[slot] = self._stamp + 1

    def put(self, digests: Iterable[int], slot: int) -> int:
        """Note that a slot has these marks from now on; return the entry, to take them back."""
        self._stamp += 1
        entry = self._stamp << _SLOT_BITS | slot
        for digest in digests:
            shard = digest >> _SHARD_SHIFT
            young = self._young[shard]
            known = young.get(digest)
            if known is None:
                known = self._old[shard].get(digest)
            if known is None or (type(known) is int and known & _SLOT == slot):
                young[digest] = entry
            else:
                young[digest] = self._joined(known, entry)
            if len(young) >= self._most:
                self._old[shard], self._young[shard] = young, {}
        return entry

    def _joined(self, known: _Entry, entry: int) -> _Entry:
        if isinstance(known, int):
            return (known, entry) if self._counts(known) else entry
        others = [each for each in known if each & _SLOT != entry & _SLOT and self._counts(each)]
        return (*others[1 - _MOST_SHARERS :], entry) if others else entry

    def _counts(self, entry: int) -> bool:
        return entry >> _SLOT_BITS >= self._born[entry & _SLOT]

    def take_back(self, digests: Iterable[int], entry: int) -> None:
        """Remove marks that were put, unless the slot had them again since."""
        for digest in digests:
            shard = digest >> _SHARD_SHIFT
            for entries in (self._young[shard], self._old[shard]):
                known = entries.get(digest)
                if known == entry:
                    del entries[digest]
                elif isinstance(known, tuple) and entry in known:
                    left = tuple([each for each in known if each != entry])
                    entries[digest] = left if len(left) > 1 else left[0]

    def match(self, offsets: Sequence[int], digests: Sequence[int]) -> dict[int, int]:
        """Return how far each slot has a prefix, by the marks in ascending order: one look-up a mark."""
        found: dict[int, int] = {}
        for number in range(len(digests) - 1, -1, -1):
            digest = digests[number]
            shard = digest >> _SHARD_SHIFT
            known = self._young[shard].get(digest)
            if known is None:
                known = self._old[shard].get(digest)
                if known is None:
                    continue
            for entry in (known,) if type(known) is int else known:  # type: ignore[union-attr]  # half of isinstance's time
                if entry >> _SLOT_BITS >= self._born[entry & _SLOT]:
                    found.setdefault(entry & _SLOT, offsets[number])
        return found
