"""From finished requests to numbers, under the names of `vllm bench serve` (vllm/benchmarks/serve.py of 0.33).

TTFT: to the first event with something that a model wrote. vLLM's own: to the first event with a choice, though it may
have a role and no text. ITL: between two events with content. TPOT: (E2EL - TTFT) / (tokens - 1). E2EL: to the last
event with a choice, or to the end of an answer that is no stream; such an answer has only this one. All from the
*intended* send time: what waits for a late generator or server is part of what a user waits. What waits for
`--max-concurrency` is told apart, as the client's queue time, and with E2EL together.
"""

import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from loadtest.outcome import Outcome
from loadtest.timeline import Interval, Live, Timeline
from loadtest.values import Values

METRICS: Final = ("ttft", "vllm_ttft", "tpot", "itl", "e2el")
QUEUE_METRICS: Final = ("client_queue_time", "e2el_including_client_queue")
_GOODPUT_METRICS: Final = ("ttft", "tpot", "e2el")
_DOTS: Final = 20_000  # first tokens that a page draws
_GROUP_VALUES: Final = 1 << 16


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


_LABELS: Final = {
    "vllm_ttft": "vLLM's TTFT",
    "client_queue_time": "client queue time",
    "e2el_including_client_queue": "E2EL incl. client queue",
}


def label(metric: str) -> str:
    """Return what a metric is called in a table."""
    return _LABELS.get(metric) or metric.upper()


def shown_ms(number: float | None) -> str:
    """Return a percentile for a table."""
    return "-" if number is None else f"{number:,.2f}"


class _Group:
    """Some of the requests: those of one URL, or of one turn."""

    def __init__(self) -> None:
        self.completed = self.failed = 0
        self._seconds = {"ttft": Values(_GROUP_VALUES), "e2el": Values(_GROUP_VALUES)}

    def add(self, outcome: Outcome) -> None:
        if outcome.error:
            self.failed += 1
            return
        self.completed += 1
        self._seconds["e2el"].add(outcome.e2el)
        if outcome.ttft is not None:
            self._seconds["ttft"].add(outcome.ttft)

    def numbers(self) -> dict[str, Any]:
        told: dict[str, Any] = {"completed": self.completed, "failed": self.failed}
        for metric, seconds in self._seconds.items():
            if seconds.count:
                told[f"mean_{metric}_ms"] = seconds.moments()[0] * 1e3
                for percentile, value in zip((50, 99), seconds.percentiles_ms((50, 99)), strict=True):
                    told[f"p{percentile}_{metric}_ms"] = value
        return told


class Tally:
    """What a run came to so far: fed with each finished request, asked at any time, in memory that stays flat.

    `goodput` has limits in seconds; `processes` is how many tell what is `live`.
    """

    def __init__(self, goodput: Mapping[str, float] | None = None, processes: int = 1) -> None:
        self._limits = goodput or {}
        self.completed = self.failed = self._met = 0
        self.input_tokens = self.output_tokens = 0
        self.duration_s = 0.0
        self.is_counted = True
        self.errors: Counter[str] = Counter()
        self.timeline, self.live = Timeline(), Live(processes)
        self.values = {metric: Values() for metric in (*METRICS, *QUEUE_METRICS)}
        self._lags = Values()
        self.dots: list[tuple[float, float]] = []  # start and TTFT; a random part of them when they are many
        self._draw = random.Random(0)
        self._targets: dict[int, _Group] = {}
        self._turns: dict[int, _Group] = {}

    def add(self, outcome: Outcome) -> None:
        """Take a finished request."""
        self.duration_s = max(self.duration_s, outcome.end)
        self.timeline.add(outcome)
        self._lags.add(outcome.lag)
        self._targets.setdefault(outcome.target, _Group()).add(outcome)
        self._turns.setdefault(outcome.turn, _Group()).add(outcome)
        if outcome.error:
            self.failed += 1
            self.errors[outcome.error] += 1
            return
        self.completed += 1
        self.input_tokens += outcome.input_tokens
        self.output_tokens += outcome.output_tokens
        self.is_counted = self.is_counted and outcome.is_counted
        self._met += all((getattr(outcome, name) or 0.0) <= limit for name, limit in self._limits.items())
        for metric in ("ttft", "vllm_ttft", "tpot", "e2el"):
            value = getattr(outcome, metric)
            if value is not None:
                self.values[metric].add(value)
        self.values["itl"].extend(outcome.itls)
        self.values["client_queue_time"].add(outcome.queued)
        self.values["e2el_including_client_queue"].add(outcome.e2el + outcome.queued)
        if outcome.ttft is not None:
            self._dot(outcome.start, outcome.ttft)

    def _dot(self, start: float, ttft: float) -> None:
        """Keep a fair part of all: algorithm R (Vitter 1985)."""
        if len(self.dots) < _DOTS:
            self.dots.append((start, ttft))
        elif (place := self._draw.randrange(self.values["ttft"].count)) < _DOTS:
            self.dots[place] = (start, ttft)

    def intervals(self) -> list[Interval]:
        """Return the run cut into intervals of `timeline.width_s`, with the first tokens that are kept."""
        intervals = self.timeline.intervals() or [Interval(0.0)]
        for start, ttft in self.dots:
            intervals[min(int(start / self.timeline.width_s), len(intervals) - 1)].ttfts.append(ttft)
        return intervals

    def numbers(self, percentiles: Sequence[float], queue: bool = False) -> dict[str, Any]:
        """Return the numbers of a run; keys as `vllm bench serve` writes them, those of the client's `queue` on demand.

        Beside those: `tokens`, whether they are those of the `usage`, or, in at least one answer, `events` that were
        counted; `error_counts`; `*_hdr`, each histogram in microseconds in the HdrHistogram V2 encoding (base64);
        `percentiles_of_*`, `values` or that `histogram`, which takes over after 131,072 values; a percentile that so
        few values do not have is None; `goodput_share` of the requests, failed ones included; `generator_lag_*` for the
        rig itself; `targets` and `turns` where there are several.
        """
        duration_s = self.duration_s or 1e-9
        requests = self.completed + self.failed
        result: dict[str, Any] = {
            "duration": duration_s,
            "completed": self.completed,
            "failed": self.failed,
            "total_input_tokens": self.input_tokens,
            "total_output_tokens": self.output_tokens,
            "request_throughput": self.completed / duration_s,
            "request_goodput": self._met / duration_s if self._limits else None,
            "goodput_share": self._met / requests if self._limits and requests else None,
            "output_throughput": self.output_tokens / duration_s,
            "total_token_throughput": (self.input_tokens + self.output_tokens) / duration_s,
            "max_output_tokens_per_s": max(self.timeline.tokens_of_second, default=0.0),
            "max_concurrent_requests": self.live.most,
            "rtfx": 0.0,  # of speech, which is not measured here
            "tokens": "usage" if self.is_counted else "events",
            "error_counts": dict(self.errors.most_common()),
        }
        for metric in (*METRICS, *(QUEUE_METRICS if queue else ())):
            result |= self._spread(metric, self.values[metric], percentiles)
        mean_s, _, highest_s = self._lags.moments()
        half, most = self._lags.histogram().get_percentile_to_value_dict([50, 99]).values() if requests else (0, 0)
        result |= {"generator_lag_mean_ms": mean_s * 1e3, "generator_lag_p50_ms": half / 1e3}
        result |= {"generator_lag_p99_ms": most / 1e3, "generator_lag_max_ms": highest_s * 1e3}
        if len(self._targets) > 1:
            result["targets"] = [group.numbers() for _, group in sorted(self._targets.items())]
        if len(self._turns) > 1:
            result["turns"] = [group.numbers() for _, group in sorted(self._turns.items())]
        return result

    @staticmethod
    def _spread(metric: str, seconds: Values, percentiles: Sequence[float]) -> dict[str, Any]:
        if not seconds.count:
            return {}
        mean, deviation, _ = seconds.moments()
        median, *asked = seconds.percentiles_ms([50.0, *percentiles])
        told = dict(zip((f"p{each:g}_{metric}_ms" for each in percentiles), asked, strict=True))
        return {
            f"mean_{metric}_ms": mean * 1e3,
            f"median_{metric}_ms": median,
            f"std_{metric}_ms": deviation * 1e3,
            **told,
            f"percentiles_of_{metric}": "values" if seconds.is_exact else "histogram",
            f"{metric}_hdr": seconds.histogram().encode().decode(),
        }


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
