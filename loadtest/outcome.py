"""One finished request, as a generator process tells it."""

import msgspec


class Outcome(msgspec.Struct, array_like=True):
    """One finished request; times in seconds, `start` and `end` from the beginning of the run.

    `start` is the intended send time, `begun` when the request or the connection for it was, `queued` the wait for
    `--max-concurrency`, `lag` what of the rest of the delay was the generator's own. Latencies count from `start` and
    `queued`. `is_counted`: the tokens are those of the usage, not of events that were counted. `target` is the URL's
    place, `turn` that in the conversation.
    """

    start: float
    end: float
    begun: float
    lag: float
    queued: float
    error: str
    ttft: float | None = None
    e2el: float = 0.0
    itls: list[float] = msgspec.field(default_factory=list)
    input_tokens: int = 0
    output_tokens: int = 0
    vllm_ttft: float | None = None
    is_counted: bool = True
    target: int = 0
    turn: int = 0

    @property
    def tpot(self) -> float | None:
        """The time per output token after the first, None for fewer than two or when nobody saw them come."""
        if self.ttft is None or self.output_tokens < 2:
            return None
        return (self.e2el - self.ttft) / (self.output_tokens - 1)
