"""What is metered of a stream: the same at any cut, and no byte of it is changed."""

from edge.exchange import UsageSource
from edge.metering.meters import Metering
from edge.operations import OPERATIONS
from tests.fuzz.requests import cut_by_itself
from tests.metering.test_meters import CHAT, MESSAGES, RESPONSES, TEXT, outcome

_MOST = 5
_PROMPT = 7


def check(stream: bytes) -> None:
    """Nor does a guess exceed what the request allowed."""
    parts = cut_by_itself(stream)
    for operation in (CHAT, TEXT, MESSAGES, RESPONSES):
        whole = outcome(operation, {}, [stream])
        assert outcome(operation, {}, parts)[::2] == whole[::2]
        assert whole[0] == stream
        if operation in (CHAT, TEXT):
            hidden = {"hide_usage": True}
            assert outcome(operation, hidden, parts)[:2] == outcome(operation, hidden, [stream])[:2]
        meter = Metering(OPERATIONS[operation], prompt_estimate=_PROMPT, most=_MOST).events()
        for part in parts:
            meter.feed(part)
        for is_whole in (True, False):
            used = meter.usage(is_whole)
            assert used.source is not UsageSource.ESTIMATED or used.completion_tokens <= _MOST
