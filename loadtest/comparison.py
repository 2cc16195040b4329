"""From the raw rounds of a comparison to its figures: medians, and ratios of paired rounds with their intervals."""

import enum
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from loadtest.pairing import Estimate, differences, estimate, ratios

BASELINE: Final = "nginx"
DIRECT: Final = "direct"  # the generator straight on the upstream: what the rig itself adds


@dataclass(frozen=True, slots=True)
class Figure:
    """One number of a proxy: where it comes from, its unit, and whether the rig's own share is taken off.

    `latency` tells numbers that mean nothing while the rig or the proxy has no time left.
    """

    key: str
    measure: str
    unit: str
    over_direct: bool = False
    latency: bool = False


FIGURES: Final = (
    Figure("cpu_per_request_us", "small", "µs"),
    Figure("requests_per_s", "small", "1/s"),
    Figure("cpu_per_refusal_us", "refused", "µs"),
    Figure("cpu_per_event_us", "slope", "µs"),
    Figure("cpu_per_stream_us", "slope", "µs"),
    Figure("events_per_read", "slope", ""),
    *(
        Figure(f"{name}_p{each}_ms", "arrivals", "ms", over_direct=name == "ttft", latency=True)
        for name in ("ttft", "lag")
        for each in ("50", "99", "99.9")
    ),
    Figure("loaded_added_p50_ms", "loaded", "ms", latency=True),
    Figure("loaded_added_p99_ms", "loaded", "ms", latency=True),
    Figure("loaded_per_s", "loaded", "1/s"),
    Figure("loaded_busy_percent", "loaded", "%"),
    Figure("together_p99_ms", "together", "ms", latency=True),
    Figure("cpu_per_messages_stream_us", "messages", "µs"),
    Figure("cpu_per_responses_stream_us", "responses", "µs"),
    Figure("published_cores", "published", "cores"),
    Figure("cpu_per_prompt_ms", "prompts", "ms"),
    Figure("cpu_per_megabyte_ms", "megabyte", "ms"),
    Figure("worst_beside_big_ms", "beside_big", "ms", over_direct=True, latency=True),
    Figure("abort_p50_ms", "aborts", "ms"),
    Figure("cpu_per_unkept_request_us", "unkept", "µs"),
    Figure("cpu_per_tls_request_us", "tls", "µs"),
    Figure("cpu_per_handshake_us", "handshakes", "µs"),
    Figure("base_mb", "memory", "MB"),
    Figure("memory_per_stream_kb", "memory", "kB"),
    Figure("idle_cpu_per_event_us", "memory", "µs"),
    Figure("start_s", "memory", "s"),
)


def values(document: Mapping[str, Any], peer: str, figure: Figure) -> list[float | None]:
    """Return a figure's value of each round, the mean of its turns; None where it gave none or does not count.

    What was measured while other programs ran counts only where the comparison was told to be `shared`.
    """
    found: dict[int, list[float]] = {}
    for each in document["rounds"]:
        number = each["numbers"].get(figure.key)
        mine = each["peer"] == peer and each["measure"] == figure.measure
        bound = figure.latency and (each["rig_bound"] or each["saturated"])
        counts = not each["unfit"] or document["about"].get("shared", False)
        if mine and number is not None and counts and not bound:
            found.setdefault(each["round"], []).append(float(number))
    return [statistics.fmean(found[index]) if index in found else None for index in range(document["about"]["rounds"])]


def summarise(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return, for every proxy and figure: `median`, `low`, `high`, and the same of `ratio` and `minus` to the baseline.

    A figure that no round gave has `instead`: "rig-bound", "saturated", "not served", or "failed". Figures over direct
    have the median of what the same round measured without any proxy taken off.
    """
    return {
        peer: {figure.key: _figure(document, peer, figure) for figure in FIGURES}
        for peer in document["peers"]
        if any(each["peer"] == peer for each in document["rounds"])
    }


def _figure(document: Mapping[str, Any], peer: str, figure: Figure) -> dict[str, Any]:
    own = values(document, peer, figure)
    told = [each for each in own if each is not None]
    if not told:
        return {"instead": _instead(document, peer, figure)}
    result: dict[str, Any] = {"values": own, **asdict(estimate(told))}
    if figure.over_direct and (over := differences(own, values(document, DIRECT, figure))):
        result["over_direct"] = asdict(estimate(over))
    theirs = values(document, BASELINE, figure)
    if found := ratios(own, theirs):
        result["ratio"] = asdict(estimate(found))
        result["minus"] = asdict(estimate(differences(own, theirs)))
    return result


def _instead(document: Mapping[str, Any], peer: str, figure: Figure) -> str:
    tried = [each for each in document["rounds"] if each["peer"] == peer and each["measure"] == figure.measure]
    words = {
        "absent": "not served",
        "problem": "failed",
        "saturated": "saturated",
        "rig_bound": "rig-bound",
        "unfit": "discarded",
    }
    if document["about"].get("shared"):
        del words["unfit"]
    return next((word for reason, word in words.items() if any(each.get(reason) for each in tried)), "")


def told_discarded(document: Mapping[str, Any]) -> str:
    """Return how many measurements do not count, and why each."""
    thrown = [
        f"{each['measure']} of {each['peer']}, round {each['round'] + 1}: {each['unfit']}"
        for each in document["rounds"]
        if each["unfit"]
    ]
    count = f"{len(thrown)} of {len(document['rounds'])} measurements"
    if document["about"].get("shared"):
        return f"{count} would be discarded: other programs ran meanwhile. They count, since this machine is shared."
    return f"{count} discarded" + (f": {'; '.join(thrown)}." if thrown else ".")


def told_others(document: Mapping[str, Any]) -> str:
    """Return how much of the cores of proxy and rig other programs took, and how much waited to run; "" if unknown."""
    shares = [each["foreign"] for each in document["rounds"] if "foreign" in each]
    if not shares:
        return ""
    often = sum(share > 0 for share in shares)
    before, after = document["about"]["load_average"]
    return (
        f"Other programs took {statistics.median(shares):.0%} of the cores of proxy and rig at the median, "
        f"{min(max(shares), 1.0):.0%} at most, and something of them in {often} of {len(shares)} measurements. "
        f"Load average {before:.1f} before and {after:.1f} after."
    )


class Standing(enum.Enum):
    """What a ratio to another proxy says."""

    LESS = "less"
    MORE = "more"
    CANNOT_TELL = "CANNOT TELL"


def beside(document: Mapping[str, Any], peer: str, other: str, figure: Figure) -> tuple[Estimate | None, Standing]:
    """Return the ratio of a figure of one proxy to another's in the same rounds, and what its interval says."""
    found = ratios(values(document, peer, figure), values(document, other, figure))
    if not found:
        return None, Standing.CANNOT_TELL
    ratio = estimate(found)
    if ratio.low is None or ratio.high is None or ratio.low <= 1 <= ratio.high:
        return ratio, Standing.CANNOT_TELL
    return ratio, Standing.LESS if ratio.high < 1 else Standing.MORE


def order(document: Mapping[str, Any]) -> Sequence[str]:
    """Return the proxies, cheapest request first; those without that figure last."""

    def cost(peer: str) -> float:
        return float(document["summary"][peer]["cpu_per_request_us"].get("median", float("inf")))

    return sorted((peer for peer in document["summary"] if peer != DIRECT), key=cost)
