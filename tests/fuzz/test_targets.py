"""Mutations of what is usual: no property of any target fails."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.targets import TARGETS, seeds
from tests.profiles import examples

_PLACES = st.integers(0, 4000)  # of which a seed takes the rest of a division
_LINE_ENDS = re.compile(rb"\n")


def mutated(usual: list[bytes], words: tuple[bytes, ...]) -> st.SearchStrategy[bytes]:
    """One of the seeds with some spans replaced by words of the grammar, spans of another seed or any bytes."""
    spans = st.builds(
        lambda seed, place, length: seed[place % len(seed) :][:length],
        st.sampled_from(usual), _PLACES, st.integers(0, 60),
    )  # fmt: skip
    scraps = st.sampled_from(words) | spans | st.binary(max_size=5)
    changes = st.lists(st.tuples(_PLACES, st.booleans(), st.just(0) | st.integers(0, 30), scraps), max_size=5)
    return st.builds(changed, st.sampled_from(usual), changes)


def changed(data: bytes, changes: list[tuple[int, bool, int, bytes]]) -> bytes:
    """Replace a span by each scrap: at any place, or where a line begins."""
    for place, at_line, length, scrap in changes:
        lines = [0, *(found.end() for found in _LINE_ENDS.finditer(data))] if at_line else range(len(data) + 1)
        at = lines[place % len(lines)]
        data = data[:at] + scrap + data[at + length :]
    return data


@pytest.mark.parametrize("name", TARGETS)
def test_property_holds_for_what_is_near_the_usual(name: str) -> None:
    target = TARGETS[name]

    @examples(60)
    @given(mutated(seeds(name), target.words))
    def check(data: bytes) -> None:
        target.check(data)

    check()
