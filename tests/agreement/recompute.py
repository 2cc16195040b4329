"""The numbers of a run, made anew from the file of its requests by another program: numpy, and vLLM's definitions.

    python -m tests.agreement.recompute result.json requests.jsonl

It names each number that differs: by more than a millionth, or by more than 0.2 % where a histogram gave a percentile.
"""

import argparse
import itertools
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy
import orjson

_EXACT: Final = 1e-6
_OF_HISTOGRAM: Final = 2e-3


def recomputed(requests: Path) -> dict[str, float]:
    """Return the numbers of a file of requests, under the names of the result."""
    told = [orjson.loads(line) for line in requests.read_bytes().splitlines()]
    good = [each for each in told if not each["error"]]
    duration_s = max(each["end"] for each in told)
    output_tokens = sum(each["output_tokens"] for each in good)
    numbers = {
        "completed": len(good),
        "failed": len(told) - len(good),
        "duration": duration_s,
        "total_input_tokens": sum(each["input_tokens"] for each in good),
        "total_output_tokens": output_tokens,
        "request_throughput": len(good) / duration_s,
        "output_throughput": output_tokens / duration_s,
        "max_output_tokens_per_s": max(_by_second(good).values(), default=0.0),
    }
    streams = [each for each in good if each["ttft"] is not None]
    several = [each for each in streams if each["output_tokens"] > 1]
    values = {
        "ttft": [each["ttft"] for each in streams],
        "vllm_ttft": [each["vllm_ttft"] for each in streams],
        "tpot": [(each["e2el"] - each["ttft"]) / (each["output_tokens"] - 1) for each in several],
        "itl": list(itertools.chain.from_iterable(each["itls"] for each in good)),
        "e2el": [each["e2el"] for each in good],
    }
    for metric, seconds in values.items():
        if seconds:
            ms = numpy.array(seconds) * 1e3
            numbers |= {f"mean_{metric}_ms": float(ms.mean()), f"std_{metric}_ms": float(ms.std())}
            numbers |= {f"p{each}_{metric}_ms": float(numpy.percentile(ms, each)) for each in (50, 90, 99, 99.9)}
    return numbers


def _by_second(requests: list[dict[str, Any]]) -> Counter[int]:
    tokens: Counter[int] = Counter()
    for each in requests:
        at = each["start"] + each["queued"] + (each["ttft"] if each["ttft"] is not None else each["e2el"])
        share = each["output_tokens"] / (len(each["itls"]) + 1)
        for gap in (0.0, *each["itls"]):
            at += gap
            tokens[int(at)] += share  # type: ignore[assignment]  # a share of the tokens of an event
    return tokens


def differences(result: dict[str, Any], requests: Path) -> Iterator[str]:
    """Yield what the result tells otherwise; a percentile that it leaves out is none."""
    for name, ours in recomputed(requests).items():
        told = result.get(name)
        metric = name.partition("_")[2].removesuffix("_ms")
        if told is None and name.startswith("p"):
            continue
        is_rough = name.startswith("p") and result.get(f"percentiles_of_{metric}") == "histogram"
        if told is None or abs(told - ours) > (_OF_HISTOGRAM if is_rough else _EXACT) * max(abs(ours), 1e-9):
            yield f"{name}: told {told}, recomputed {ours}"


def main() -> int:
    """Compare; return 1 when something differs."""
    parser = argparse.ArgumentParser(prog="python -m tests.agreement.recompute", description=__doc__)
    parser.add_argument("result", type=Path)
    parser.add_argument("requests", type=Path)
    asked = parser.parse_args()
    found = list(differences(orjson.loads(asked.result.read_bytes()), asked.requests))
    print("\n".join(found) or "Every number is the same.")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
