"""From timed answers to numbers, under the names and definitions of `vllm bench serve`.

TTFT: from the send to the first event with content. ITL: between two such events. TPOT: (E2EL - TTFT) / (tokens - 1).
E2EL: to the last event with content. All from the *intended* send time: what waits for a late generator or server is
part of what a user waits.
"""

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from hdrh.histogram import HdrHistogram

METRICS: Final = ("ttft", "tpot", "itl", "e2el")
_MAX_US: Final = 3_600_000_000  # an hour
_DIGITS: Final = 3


@dataclass(slots=True)
class Outcome:
    """One finished request; times in seconds, `start` from the beginning of the run."""

    start: float
    lag: float
    queued: float
    error: str
    ttft: float = 0.0
    e2el: float = 0.0
    itls: list[float] = field(default_factory=list)
    input_tokens: int = 0
    output_tokens: int = 0

    @property
    def tpot(self) -> float | None:
        """The time per output token after the first, None for fewer than two."""
        return (self.e2el - self.ttft) / (self.output_tokens - 1) if self.output_tokens > 1 else None


def parse_goodput(pairs: Iterable[str]) -> dict[str, float]:
    """Return the limits in seconds of `ttft:200 tpot:50 e2el:1000` (ms); raises `ValueError`."""
    limits = {}
    for pair in pairs:
        name, _, value = pair.partition(":")
        if name not in ("ttft", "tpot", "e2el"):
            raise ValueError(f"goodput {pair!r}: write ttft, tpot or e2el, a colon and milliseconds")
        limits[name] = float(value) / 1e3
    return limits


def values(outcomes: Sequence[Outcome], metric: str) -> list[float]:
    """Return every value of a metric among the requests that succeeded, in seconds."""
    good = [each for each in outcomes if not each.error]
    if metric == "itl":
        return [gap for each in good for gap in each.itls]
    if metric == "tpot":
        return [each.tpot for each in good if each.tpot is not None]
    return [getattr(each, metric) for each in good]


def histogram(seconds: Iterable[float]) -> HdrHistogram:
    """Return an HDR histogram, in microseconds, to three digits."""
    made = HdrHistogram(1, _MAX_US, _DIGITS)
    for value in seconds:
        made.record_value(max(1, round(value * 1e6)))
    return made


def percentile_ms(made: HdrHistogram, percentile: float) -> float:
    """Return a percentile in milliseconds."""
    return float(made.get_value_at_percentile(percentile)) / 1e3


def summary(
    outcomes: Sequence[Outcome], duration_s: float, percentiles: Sequence[float], goodput: Mapping[str, float]
) -> dict[str, Any]:
    """Return the numbers of a run; keys as `vllm bench serve` writes them, and `generator_lag_*` for the rig itself."""
    good = [each for each in outcomes if not each.error]
    output_tokens = sum(each.output_tokens for each in good)
    input_tokens = sum(each.input_tokens for each in good)
    met = [each for each in good if all((getattr(each, name) or 0.0) <= limit for name, limit in goodput.items())]
    result: dict[str, Any] = {
        "duration": duration_s,
        "completed": len(good),
        "failed": len(outcomes) - len(good),
        "total_input_tokens": input_tokens,
        "total_output_tokens": output_tokens,
        "request_throughput": len(good) / duration_s,
        "request_goodput": len(met) / duration_s if goodput else None,
        "output_throughput": output_tokens / duration_s,
        "total_token_throughput": (input_tokens + output_tokens) / duration_s,
        "error_counts": dict(Counter(each.error for each in outcomes if each.error)),
    }
    for metric in METRICS:
        seconds = values(outcomes, metric)
        if not seconds:
            continue
        made = histogram(seconds)
        result[f"mean_{metric}_ms"] = statistics.fmean(seconds) * 1e3
        result[f"median_{metric}_ms"] = statistics.median(seconds) * 1e3
        result[f"std_{metric}_ms"] = statistics.pstdev(seconds) * 1e3
        for percentile in percentiles:
            result[f"p{percentile:g}_{metric}_ms"] = percentile_ms(made, percentile)
        result[f"{metric}_hdr"] = made.encode().decode()
    lags = [each.lag for each in outcomes] or [0.0]
    made = histogram(lags)
    result |= {f"generator_lag_p{each:g}_ms": percentile_ms(made, each) for each in (50, 99)}
    result["generator_lag_max_ms"] = max(lags) * 1e3
    return result


def detailed(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return what `--save-detailed` adds: every request's own numbers."""
    return {
        "start_times": [each.start for each in outcomes],
        "ttfts": [each.ttft for each in outcomes],
        "itls": [each.itls for each in outcomes],
        "output_lens": [each.output_tokens for each in outcomes],
        "input_lens": [each.input_tokens for each in outcomes],
        "queue_times": [each.queued for each in outcomes],
        "errors": [each.error for each in outcomes],
    }
