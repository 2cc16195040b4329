"""The index of marks, against a plain one that forgets nothing by itself."""

import random
import sys

from hypothesis import given, settings
from hypothesis import strategies as st

from edge.upstream.prefix_index import MAX_ENTRIES, PrefixIndex

SLOTS = 5
MARKS = st.lists(st.integers(0, 12).map(lambda number: number << 54 | number), min_size=1, max_size=6, unique=True)
STEPS = st.lists(
    st.tuples(st.sampled_from(["put", "put", "put", "take back", "forget"]), st.integers(0, SLOTS - 1), MARKS),
    max_size=60,
)


class Plain:
    """A slow index: for each mark, who put it last, by slot."""

    def __init__(self) -> None:
        self.known: dict[int, dict[int, int]] = {}

    def match(self, offsets: list[int], digests: list[int]) -> dict[int, int]:
        found: dict[int, int] = {}
        for offset, digest in zip(offsets, digests, strict=True):
            for slot in self.known.get(digest, {}):
                found[slot] = offset
        return found


@settings(max_examples=60)
@given(STEPS)
def test_index_knows_what_a_plain_one_knows(steps: list[tuple[str, int, list[int]]]) -> None:
    index, plain = PrefixIndex(), Plain()
    put: list[tuple[int, int, list[int]]] = []
    for slot in range(SLOTS):
        index.forget(slot)
    for what, slot, digests in steps:
        if what == "put":
            entry = index.put(digests, slot)
            put.append((entry, slot, digests))
            for digest in digests:
                plain.known.setdefault(digest, {})[slot] = entry
        elif what == "forget":
            index.forget(slot)
            for known in plain.known.values():
                known.pop(slot, None)
        elif put:
            entry, slot, digests = put.pop()
            index.take_back(digests, entry)
            for digest in digests:
                if plain.known[digest].get(slot) == entry:
                    del plain.known[digest][slot]
        for _, _, asked in put[-3:]:
            offsets = list(range(1, len(asked) + 1))
            assert index.match(offsets, asked) == plain.match(offsets, asked)


def test_a_mark_is_remembered_of_the_last_eight_that_had_it() -> None:
    index = PrefixIndex()
    for slot in range(20):
        index.forget(slot)
        index.put([7], slot)
    assert set(index.match([1], [7])) == set(range(12, 20))
    index.put([7], 12)
    index.forget(19)
    assert set(index.match([1], [7])) == set(range(12, 19))


def test_index_is_bounded_and_keeps_what_came_last() -> None:
    draw, index = random.Random(1), PrefixIndex(6_400)
    index.forget(0)
    marks = [draw.getrandbits(60) for _ in range(30_000)]
    for at in range(0, len(marks), 10):
        index.put(marks[at : at + 10], 0)
        assert len(index) <= 6_400
    assert all(index.match([1], [mark]) for mark in marks[-2_000:])
    assert not any(index.match([1], [mark]) for mark in marks[:20_000])


def test_no_put_meets_more_than_a_shard_and_a_full_index_is_small() -> None:
    """A dict of 2,344 is made larger, or freed, in a part of a millisecond; one of 300,000 in ten."""
    draw, index = random.Random(1), PrefixIndex(60_000)
    index.forget(0)
    for _ in range(5_200):
        index.put([draw.getrandbits(60) for _ in range(12)], 0)
    shards = [*index._young, *index._old]
    assert 30_000 < len(index) <= 60_000
    assert max(map(len, shards)) <= 60_000 // 128
    size = sum(map(sys.getsizeof, shards)) + sys.getsizeof(1 << 59) * len(index)
    assert size * MAX_ENTRIES / len(index) < 32 * 2**20
