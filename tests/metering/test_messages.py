"""Streams of `messages`: the beginning has the prompt, the end the rest."""

from edge.exchange import Usage, UsageSource
from tests.metering.test_meters import MESSAGES, USED, data, read

FINAL, RUNNING, ESTIMATED, NONE = UsageSource


def message(start: object, *deltas: object) -> list[bytes]:
    frames: list[dict[str, object]] = [{"type": "message_start", "message": {"model": "m", "usage": start}}]
    frames += [{"type": "content_block_delta", "delta": {"type": "text_delta", "text": "a"}}] * 3
    frames += [{"type": "message_delta", "delta": {}, "usage": delta} for delta in deltas]
    return [b"event: %b\n" % str(frame["type"]).encode() + data(frame) for frame in frames]


def test_each_value_of_a_message_is_the_latest() -> None:
    start = {"input_tokens": 2, "cache_creation_input_tokens": 3, "cache_read_input_tokens": 4, "output_tokens": 1}
    assert read(message(start, {"output_tokens": 5}), MESSAGES) == Usage(9, 5, 4, source=FINAL, cache_creation_tokens=3)
    assert read(message(start, {"output_tokens": 5}), MESSAGES, whole=False) == Usage(
        9, 5, 4, source=FINAL, cache_creation_tokens=3
    )
    both = message(start, {"output_tokens": 5}, {"output_tokens": 6, "input_tokens": 10, "cache_read_input_tokens": 0})
    assert read(both, MESSAGES) == Usage(13, 6, 0, source=FINAL, cache_creation_tokens=3)
    assert read(message(None, {"output_tokens": 5, "input_tokens": 12}), MESSAGES) == USED


def test_message_that_is_cut_used_the_prompt_it_tells_of_and_its_frames() -> None:
    start = {"input_tokens": 2, "cache_read_input_tokens": 4, "output_tokens": 1}
    for whole in (True, False):
        assert read(message(start), MESSAGES, whole) == Usage(6, 3, 4, source=ESTIMATED)
        assert read(message(start)[:1], MESSAGES, whole) == Usage(6, 1, 4, source=ESTIMATED)


def test_prompt_of_a_message_that_nothing_tells_is_estimated() -> None:
    """As llama.cpp leaves `message_start` out where the first token is half a character."""
    whole = message({"input_tokens": 2}, {"output_tokens": 5})
    for frames in (whole[1:], message({"input_tokens": -1}, {"output_tokens": 5})):
        assert read(frames, MESSAGES) == Usage(7, 5, source=ESTIMATED)
    cached = message({"input_tokens": 0, "cache_read_input_tokens": 4}, {"output_tokens": 5})
    assert read(cached, MESSAGES) == Usage(4, 5, 4, source=FINAL)
