"""Streams of chunks: their usage in every dialect, and what of it the client gets."""

from typing import Any

import pytest

from edge.exchange import UsageSource
from tests.metering.test_meters import CHAT, DONE, USED, chunk, data, events, read, usage

FINAL, RUNNING, ESTIMATED, NONE = UsageSource


def given(frames: list[bytes], **options: Any) -> bytes:
    """What the client gets of frames."""
    meter = events(CHAT, **options)
    return b"".join(map(meter.feed, frames)) + meter.close()


# --- what the client did not ask for


@pytest.mark.parametrize("choices", [{}, {"choices": None}, {"choices": []}], ids=["absent", "null", "empty"])
def test_usage_frame_is_read_and_hidden_whatever_its_shape(choices: dict[str, Any]) -> None:
    frames = [chunk(), chunk({}, "stop"), data({"id": "1", **choices, "usage": usage()}), DONE]
    assert read(frames) == USED
    assert given(frames, hide_usage=True) == b"".join([*frames[:2], DONE])
    assert given(frames) == b"".join(frames)
