"""`diff`: two results of `run`, or of `vllm bench serve`, side by side, and whether the second is worse.

Chance is that of the requests within a run: a percentile's interval is that of its order statistics, a mean's that of
its standard error, both at 95 %, and the requests count as independent. What differs from run to run for other reasons
(another machine, another hour) is not seen by it.
"""

import argparse
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import orjson
from hdrh.histogram import HdrHistogram

from loadtest import tables

_Z: Final = 1.96  # of 95 %
_RATES: Final = ("request_throughput", "output_throughput", "request_goodput")
_METRICS: Final = ("ttft", "tpot", "itl", "e2el")
_PERCENTILES: Final = (50, 99)
_ASKED: Final = ("endpoint_type", "model_id", "scenario", "prompts", "request_rate", "burstiness", "max_concurrency",
                 "num_prompts", "goodput", "slo_share")  # fmt: skip
_CANNOT_TELL: Final = 3


@dataclass(frozen=True, slots=True)
class Number:
    """A value with what chance may have made of it; both ends are None where nothing is known of that."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class Change:
    """A number of both runs. `worse`: by which share the second is worse, below 0 when it is better; with its ends."""

    name: str
    before: float
    after: float
    worse: float
    low: float | None
    high: float | None

    def verdict(self, limit: float) -> str:
        """Return `ok`, `WORSE`, or `CANNOT TELL` where chance may explain what is over the limit."""
        if self.worse <= limit:
            return "ok"
        return "CANNOT TELL" if self.low is not None and self.low <= 0 else "WORSE"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `diff`."""
    add = parser.add_argument
    add("before", type=Path, metavar="A.json", help="of `run --save-result`, the one to compare with")
    add("after", type=Path, metavar="B.json")
    add("--fail-over", type=_limit, metavar="5%", help="exit with 1 when a number is worse by more than that")


def main(arguments: argparse.Namespace) -> int:
    """Compare; return 0, 1 when a number is worse by more than allowed, 2 for wrong usage, 3 when that is not clear."""
    try:
        before, after = _read(arguments.before), _read(arguments.after)
    except (OSError, ValueError) as error:
        print(f"loadtest diff: {error}", file=sys.stderr)
        return 2
    changes = list(compare(before, after))
    if not changes:
        print("loadtest diff: no number stands in both: compare two runs, or two sweeps", file=sys.stderr)
        return 2
    limit: float | None = arguments.fail_over
    verdicts = [each.verdict(limit) if limit is not None else "" for each in changes]
    header = ["", "before", "after", "change", "by chance", *([] if limit is None else [""])]
    rows = [
        [*_cells(each), *([] if limit is None else [verdict])] for each, verdict in zip(changes, verdicts, strict=True)
    ]
    print("\n".join(tables.columns(header, rows)))
    unclear = [f"{name} is void: {reason}" for name, each in (("A", before), ("B", after)) for reason in _void(each)]
    notes = [*unclear, *_asked_otherwise(before, after)]
    print("".join(f"NOTE: {each}.\n" for each in notes), end="")
    if limit is None:
        return 0
    if "WORSE" in verdicts and not unclear:
        return 1
    return _CANNOT_TELL if unclear or "CANNOT TELL" in verdicts else 0


def compare(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = "") -> Iterator[Change]:
    """Yield what changed between two documents, for a sweep rate by rate too."""
    for key in ("capacity", "knee", *_RATES):
        if before.get(key) and after.get(key) is not None:
            yield _change(prefix + key, Number(before[key]), Number(after[key]), less_is_worse=True)
    if "completed" in before and "completed" in after:
        if (failed := _failures(prefix, before, after)) is not None:
            yield failed
        for metric in _METRICS:
            for name, first, second in _numbers(metric, before, after):
                yield _change(prefix + name, first, second)
    steps = {each["request_rate"]: each for each in after.get("steps", ())}
    for each in before.get("steps", ()):
        if (other := steps.get(each["request_rate"])) is not None:
            yield from compare(each, other, f"{each['request_rate']:g}/s ")


def _numbers(metric: str, *documents: Mapping[str, Any]) -> Iterator[tuple[str, Number, Number]]:
    keys = [f"mean_{metric}_ms", f"median_{metric}_ms", f"p99_{metric}_ms"]
    for key, percentile in zip(keys, (None, *_PERCENTILES), strict=True):
        told = [each.get(key) for each in documents]
        if all(told):
            first, second = [_number(each, metric, key, percentile) for each in documents]
            yield key, first, second


def _number(document: Mapping[str, Any], metric: str, key: str, percentile: float | None) -> Number:
    value, count = document[key], document["completed"]
    if percentile is None:
        half = _Z * document.get(f"std_{metric}_ms", 0.0) / math.sqrt(count)
        return Number(value, max(value - half, value / 1e3), value + half)
    told = document.get(f"{metric}_hdr")
    if told is None:
        return Number(value)
    # Of the gaps of one answer none is independent of the others: there are as many as answers.
    half = _Z * math.sqrt(percentile * (100 - percentile) / count)
    histogram = HdrHistogram.decode(told)
    ends = [
        histogram.get_value_at_percentile(min(max(each, 0.0), 100.0)) / 1e3
        for each in (percentile - half, percentile + half)
    ]
    return Number(value, min(ends[0], value), max(ends[1], value))


def _change(name: str, before: Number, after: Number, less_is_worse: bool = False) -> Change:
    ratio = after.value / before.value
    worse = 1 - ratio if less_is_worse else ratio - 1
    spreads = [_spread(before), _spread(after)]
    low = high = None
    if None not in spreads:
        half = math.hypot(*(each or 0.0 for each in spreads))
        low, high = ratio * math.exp(-half) - 1, ratio * math.exp(half) - 1
    return Change(name, before.value, after.value, worse, low, high)


def _spread(number: Number) -> float | None:
    """Return half the interval of a number's logarithm."""
    if not number.low or not number.high:
        return None
    return (math.log(number.high) - math.log(number.low)) / 2


def _failures(prefix: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> Change | None:
    """Return how many more fail, in shares of all requests; what chance explains is no change for the worse."""
    counts = [(each.get("failed", 0), each.get("failed", 0) + each["completed"]) for each in (before, after)]
    if not all(total for _, total in counts) or not any(failed for failed, _ in counts):
        return None
    shares = [failed / total for failed, total in counts]
    together = sum(failed for failed, _ in counts) / sum(total for _, total in counts)
    half = _Z * math.sqrt(together * (1 - together) * sum(1 / total for _, total in counts))
    more = shares[1] - shares[0]
    worse = math.inf if more > half else min(more, 0.0)  # a failure is no matter of percents
    return Change(f"{prefix}failed share", shares[0], shares[1], worse, more - half, more + half)


def _cells(change: Change) -> list[str]:
    by_chance = "" if change.low is None or change.high is None else f"{change.low:+.1%} to {change.high:+.1%}"
    moved = (
        change.after - change.before
        if math.isinf(change.worse) or not change.before
        else change.after / change.before - 1
    )
    return [change.name, f"{change.before:.4g}", f"{change.after:.4g}", f"{moved:+.1%}", by_chance]


def _void(document: Mapping[str, Any]) -> Sequence[str]:
    own = list(document.get("void") or ())
    return own + [reason for each in document.get("steps", ()) for reason in each.get("void") or ()]


def _asked_otherwise(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    return [
        f"{name} differs: {before[name]} and {after[name]}"
        for name in _ASKED
        if name in before and name in after and before[name] != after[name]
    ]


def _read(path: Path) -> dict[str, Any]:
    try:
        document = orjson.loads(path.read_bytes())
    except orjson.JSONDecodeError:
        raise ValueError(f"{path} is no JSON: give what `run --save-result` wrote") from None
    if not isinstance(document, dict):
        raise ValueError(f"{path} is no result: give what `run --save-result` wrote")
    return document


def _limit(text: str) -> float:
    number = float(text.removesuffix("%"))
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError("a percentage of at least 0, such as 5%")
    return number / 100
