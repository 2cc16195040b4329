"""From timed answers to numbers, under the names of `vllm bench serve` (vllm/benchmarks/serve.py of 0.32).

TTFT: to the first event with something that a model wrote. vLLM's own: to the first event with a choice, though it may
have a role and no text. ITL: between two events with content. TPOT: (E2EL - TTFT) / (tokens - 1). E2EL: to the last
event with a choice, or to the end of an answer that is no stream; such an answer has only this one. All from the
*intended* send time: what waits for a late generator or server is part of what a user waits.
"""

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from hdrh.histogram import HdrHistogram

METRICS: Final = ("ttft", "vllm_ttft", "tpot", "itl", "e2el")
_GOODPUT_METRICS: Final = ("ttft", "tpot", "e2el")
_MAX_US: Final = 3_600_000_000  # an hour
_DIGITS: Final = 3


@dataclass(slots=True)
class Outcome:
    """One finished request; times in seconds, `start` and `end` from the beginning of the run.

    `start` is the intended send time, `begun` when the request or the connection for it was, `queued` the wait for
    `--max-concurrency`, `lag` what of the rest of the delay was the generator's own. `is_counted`: the tokens are those
    of the usage, not of events that were counted.
    """

    start: float
    end: float
    begun: float
    lag: float
    queued: float
    error: str
    ttft: float | None = None
    e2el: float = 0.0
    itls: list[float] = field(default_factory=list)
    input_tokens: int = 0
    output_tokens: int = 0
    vllm_ttft: float | None = None
    is_counted: bool = True

    @property
    def tpot(self) -> float | None:
        """The time per output token after the first, None for fewer than two or when nobody saw them come."""
        if self.ttft is None or self.output_tokens < 2:
            return None
        return (self.e2el - self.ttft) / (self.output_tokens - 1)


def parse_goodput(pairs: Iterable[str]) -> dict[str, float]:
    """Return the limits in seconds of `ttft:200 tpot:50 e2el:1000` (ms); raises `ValueError`."""
    limits = {}
    for pair in pairs:
        name, _, value = pair.partition(":")
        if name not in _GOODPUT_METRICS:
            raise ValueError(f"goodput {pair!r}: write ttft, tpot or e2el, a colon and milliseconds")
        limits[name] = float(value) / 1e3
        if not limits[name] >= 0:
            raise ValueError(f"goodput {pair!r}: milliseconds are at least 0")
    return limits


def parse_percentiles(text: str) -> list[float]:
    """Return the percentiles of `50,99,99.9`; raises `ValueError`."""
    percentiles = [float(each) for each in text.split(",")]
    for each in percentiles:
        if not 0 < each <= 100:
            raise ValueError(f"percentile {each:g}: above 0, at most 100")
    return percentiles


def parse_metrics(text: str) -> list[str]:
    """Return the metrics of `ttft,e2el`; raises `ValueError`."""
    metrics = text.split(",")
    for each in metrics:
        if each not in METRICS:
            raise ValueError(f"metric {each!r}: one of {', '.join(METRICS)}")
    return metrics


def label(metric: str) -> str:
    """Return what a metric is called in a table."""
    return "vLLM's TTFT" if metric == "vllm_ttft" else metric.upper()


def shown_ms(number: float | None) -> str:
    """Return a percentile for a table."""
    return "-" if number is None else f"{number:,.2f}"


def values(outcomes: Sequence[Outcome], metric: str) -> list[float]:
    """Return every value of a metric among the requests that succeeded, in seconds."""
    good = [each for each in outcomes if not each.error]
    if metric == "itl":
        return [gap for each in good for gap in each.itls]
    found = [getattr(each, metric) for each in good]
    return [each for each in found if each is not None]


def histogram(seconds: Iterable[float]) -> HdrHistogram:
    """Return an HDR histogram, in microseconds, to three digits."""
    made = HdrHistogram(1, _MAX_US, _DIGITS)
    for value in seconds:
        made.record_value(max(1, round(value * 1e6)))
    return made


def percentile_ms(ordered: Sequence[float], percentile: float) -> float | None:
    """Return a percentile in milliseconds, exact, of seconds that are in order, between two of them by a straight line.

    None where so few values have no such percentile: p99 wants 100 of them, p99.9 a thousand.
    """
    count = len(ordered)
    if not count or (50 < percentile < 100 and round(count * (100 - percentile), 6) < 100):
        return None
    place = (count - 1) * percentile / 100
    below = math.floor(place)
    above = min(below + 1, count - 1)
    return (ordered[below] + (ordered[above] - ordered[below]) * (place - below)) * 1e3


def summary(
    outcomes: Sequence[Outcome], percentiles: Sequence[float], goodput: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """Return the numbers of a run; keys as `vllm bench serve` writes them.

    Beside those: `tokens`, whether they are those of the `usage`, or, in at least one answer, `events` that were
    counted; `error_counts`; `*_hdr`, each histogram in microseconds in the HdrHistogram V2 encoding (base64); a
    percentile that so few values do not have is None;
    `queue_time_*` for the wait that `--max-concurrency` made; `generator_lag_*` for the rig itself.
    """
    good = [each for each in outcomes if not each.error]
    duration_s = max((each.end for each in outcomes), default=0.0) or 1e-9
    output_tokens = sum(each.output_tokens for each in good)
    input_tokens = sum(each.input_tokens for each in good)
    limits = goodput or {}
    met = [each for each in good if all((getattr(each, name) or 0.0) <= limit for name, limit in limits.items())]
    result: dict[str, Any] = {
        "duration": duration_s,
        "completed": len(good),
        "failed": len(outcomes) - len(good),
        "total_input_tokens": input_tokens,
        "total_output_tokens": output_tokens,
        "request_throughput": len(good) / duration_s,
        "request_goodput": len(met) / duration_s if limits else None,
        "output_throughput": output_tokens / duration_s,
        "total_token_throughput": (input_tokens + output_tokens) / duration_s,
        "max_output_tokens_per_s": max((each.tokens for each in timeline(outcomes, 1.0)), default=0.0),
        "max_concurrent_requests": most_at_once(outcomes),
        "tokens": "usage" if all(each.is_counted for each in good) else "events",
        "error_counts": dict(Counter(each.error for each in outcomes if each.error).most_common()),
    }
    for metric in METRICS:
        seconds = values(outcomes, metric)
        if not seconds:
            continue
        ordered = sorted(seconds)
        result[f"mean_{metric}_ms"] = statistics.fmean(seconds) * 1e3
        result[f"median_{metric}_ms"] = statistics.median(seconds) * 1e3
        result[f"std_{metric}_ms"] = statistics.pstdev(seconds) * 1e3
        for percentile in percentiles:
            result[f"p{percentile:g}_{metric}_ms"] = percentile_ms(ordered, percentile)
        result[f"{metric}_hdr"] = histogram(seconds).encode().decode()
    result |= _spread("queue_time", [each.queued for each in outcomes])
    return result | _spread("generator_lag", [each.lag for each in outcomes])


def _spread(name: str, seconds: Sequence[float]) -> dict[str, float]:
    made = histogram(seconds or [0.0])  # of any count: what is judged is the worst that was seen
    numbers = {f"{name}_p{each}_ms": float(made.get_value_at_percentile(each)) / 1e3 for each in (50, 99)}
    return numbers | {f"{name}_max_ms": max(seconds, default=0.0) * 1e3}


def most_at_once(outcomes: Sequence[Outcome]) -> int:
    """Return how many requests were with the server at the busiest moment."""
    steps = sorted(step for each in outcomes for step in ((each.begun, 1), (each.end, -1)))
    live = most = 0
    for _, change in steps:
        live += change
        most = max(most, live)
    return most


@dataclass(slots=True)
class Interval:
    """What happened in one part of a run, `at` from its beginning; `ttfts` are those of requests that began in it."""

    at: float
    finished: int = 0
    failed: int = 0
    tokens: float = 0.0
    ttfts: list[float] = field(default_factory=list)


def timeline(outcomes: Sequence[Outcome], width_s: float) -> list[Interval]:
    """Return the run cut into intervals of `width_s`; a token counts where the event came that brought it."""
    count = int(max((each.end for each in outcomes), default=-1.0) / width_s) + 1
    intervals = [Interval(number * width_s) for number in range(count)]
    for each in outcomes:
        last = intervals[int(each.end / width_s)]
        if each.error:
            last.failed += 1
            continue
        last.finished += 1
        if each.ttft is None:
            last.tokens += each.output_tokens
            continue
        intervals[int(each.start / width_s)].ttfts.append(each.ttft)
        share = each.output_tokens / (len(each.itls) + 1)
        now = each.start + each.ttft
        for gap in (0.0, *each.itls):
            now += gap
            # Sums of floats may end a hair after the end.
            intervals[min(int(now / width_s), count - 1)].tokens += share
    return intervals


def detailed(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return what `--save-detailed` adds: every request's own numbers, under vllm's names."""
    return {
        "start_times": [each.start for each in outcomes],
        "ttfts": [each.ttft or 0.0 for each in outcomes],
        "itls": [each.itls for each in outcomes],
        "latencies": [each.e2el for each in outcomes],
        "output_lens": [each.output_tokens for each in outcomes],
        "input_lens": [each.input_tokens for each in outcomes],
        "queue_times": [each.queued for each in outcomes],
        "errors": [each.error for each in outcomes],
    }
