"""When requests are sent: drawn up front, so that a slow answer never delays the next request (an open loop)."""

import random


def schedule(count: int, rate_per_s: float, burstiness: float = 1.0, seed: int = 0) -> list[float]:
    """Return when to send each of `count` requests, in seconds from the start.

    Gaps are gamma distributed with the shape `burstiness` and the mean 1 / `rate_per_s`, as `vllm bench serve` draws
    them: 1 is a Poisson process, below it arrivals come in bursts, above it they are more even. An infinite rate sends
    all at once. Raises: `ValueError` for a rate or shape that is not above 0, and for an infinite shape.
    """
    if not rate_per_s > 0 or not 0 < burstiness < float("inf"):
        raise ValueError("request rate and burstiness must be above 0, and burstiness finite")
    if rate_per_s == float("inf"):
        return [0.0] * count
    draw = random.Random(seed)
    gaps = [draw.gammavariate(burstiness, 1 / burstiness) for _ in range(count)]
    # vLLM scales to the exact length too: two seeds then offer the same load.
    total = sum(gaps)  # 0.0 for a few gaps of a tiny shape
    scale = (count / rate_per_s) / total if total else 1.0
    times, now = [], 0.0
    for gap in gaps:
        times.append(now)
        now += gap * scale
    return times
