"""What a simulator remembers is bounded, and knows prompts by how they begin."""

import pytest

from edge.simulator.memory import Memory, Prefill, Prefixes, Responses


def test_prompt_is_known_as_far_as_an_earlier_one_went() -> None:
    prefixes = Prefixes()
    assert prefixes.known_bytes("m", b"a" * 40) == 0
    assert prefixes.known_bytes("m", b"a" * 40 + b"b" * 40) == 32
    assert prefixes.known_bytes("m", b"a" * 40 + b"b" * 40) == 80
    assert prefixes.known_bytes("m", b"c" + b"a" * 39) == 0


def test_prompt_of_another_model_is_another() -> None:
    prefixes = Prefixes()
    prefixes.known_bytes("m", b"a" * 40)
    assert prefixes.known_bytes("n", b"a" * 40) == 0


def test_oldest_prompts_are_forgotten_each_from_its_end() -> None:
    prefixes = Prefixes()
    for letter in (b"a", b"b", b"c"):
        prefixes.known_bytes("m", letter * 32, max_bytes=80)
    assert prefixes.known_bytes("m", b"c" * 32, max_bytes=80) == 32
    assert prefixes.known_bytes("m", b"a" * 32, max_bytes=80) == 16


def test_prompts_are_read_one_after_another() -> None:
    prefill = Prefill()
    assert [prefill.wait_s(50, 100, now) for now in (10.0, 10.0, 10.75, 20.0)] == [0.5, 1.0, 0.75, 0.5]


def test_oldest_responses_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge.simulator.memory._MAX_RESPONSES", 2)
    responses = Responses()
    for number in range(3):
        responses.keep(str(number), number)
    assert [responses.get(str(number)) for number in range(3)] == [None, 1, 2]
    responses.drop("2")
    assert responses.get("2") is None


def test_memories_are_not_shared() -> None:
    one, other = Memory(), Memory()
    one.responses.keep("a", 1)
    assert other.responses.get("a") is None
