"""What real engines sent and counted: a meter reads the same out of it, however it is cut."""

from random import Random

import pytest

from edge.exchange import Usage, UsageSource
from edge.metering.meters import Metering
from edge.operations import OPERATIONS
from tests.recordings import ANSWERS, Recording
from tests.streams import cut

# Where an engine tells its client less, or counts more, than it told: docs/engines.md.
TOLD_OTHERWISE = {
    ("llamacpp", "chat, n = 2"): "tells one choice",
    ("llamacpp", "two prompts"): "tells one prompt",
    ("vllm", "chat, n = 2"): "counts the prompt twice",
    ("vllm", "chat, n = 2, stream"): "counts the prompt twice",
}
PROMPT_ESTIMATE = 7


def tells_no_prompt(recording: Recording) -> bool:
    """As llama.cpp leaves it out where the first token of a message is half a character."""
    return recording.case == "messages, stream" and "message_start" not in recording.answer


def read(recording: Recording, parts: list[bytes], *, hide: bool) -> Usage:
    """What a meter reads of an answer; `hide`: the client did not ask for its usage."""
    running = recording.mode == "continuous"
    metering = Metering(
        OPERATIONS[recording.operation], running, hide, hide and running, PROMPT_ESTIMATE, recording.request.get("n", 1)
    )
    meter = metering.events() if recording.is_stream else metering.document()
    for part in parts:
        meter.feed(part)
    return meter.usage(True)


@pytest.mark.parametrize("recording", ANSWERS, ids=[each.name for each in ANSWERS])
def test_meter_reads_what_the_engine_counted(recording: Recording) -> None:
    content = recording.answer.encode()
    draws = Random(recording.name)
    cuts = [sorted(draws.sample(range(len(content)), draws.randint(1, 40))) for _ in range(5)]
    used = read(recording, [content], hide=False)
    if tells_no_prompt(recording):
        assert (used.prompt_tokens, used.source) == (PROMPT_ESTIMATE, UsageSource.ESTIMATED)
    elif recording.counted is not None and (recording.engine, recording.case) not in TOLD_OTHERWISE:
        assert (used.prompt_tokens, used.completion_tokens) == recording.counted
        assert used.source is UsageSource.FINAL
    elif recording.request:  # of those that fail it is not kept
        assert used.source is UsageSource.FINAL
    for positions in [[], range(len(content)), *cuts]:
        assert read(recording, cut(content, positions), hide=True) == used
