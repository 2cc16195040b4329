"""When requests are sent: drawn up front, so that a slow answer never delays the next request (an open loop)."""

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

_BLOCK: Final = 10_000  # gaps that are drawn at once


def arrivals(rate_per_s: float, burstiness: float = 1.0, seed: int = 0, count: int | None = None) -> Iterator[float]:
    """Yield when to send each of `count` requests (None: without end), in seconds from the start.

    Gaps are gamma distributed with the shape `burstiness` and the mean 1 / `rate_per_s`, as `vllm bench serve` draws
    them: 1 is a Poisson process, below it arrivals come in bursts, above it they are more even. An infinite rate sends
    all at once. Raises: `ValueError` for a rate or shape that is not above 0, and for an infinite shape.
    """
    if not rate_per_s > 0 or not 0 < burstiness < float("inf"):
        raise ValueError("request rate and burstiness must be above 0, and burstiness finite")
    return _drawn(rate_per_s, burstiness, seed, count)


def _drawn(rate_per_s: float, burstiness: float, seed: int, count: int | None) -> Iterator[float]:
    if rate_per_s == float("inf"):
        yield from itertools.repeat(0.0) if count is None else itertools.repeat(0.0, count)
        return
    draw = random.Random(seed)
    done = 0
    while count is None or done < count:
        size = _BLOCK if count is None else min(_BLOCK, count - done)
        gaps = [draw.gammavariate(burstiness, 1 / burstiness) for _ in range(size)]
        # vLLM scales to the exact length too: two seeds then offer the same load.
        total = sum(gaps)  # 0.0 for a few gaps of a tiny shape
        scale = (size / rate_per_s) / total if total else 1.0
        now = done / rate_per_s
        for gap in gaps:
            yield now
            now += gap * scale
        done += size


def schedule(count: int, rate_per_s: float, burstiness: float = 1.0, seed: int = 0) -> list[float]:
    """Return the times of `count` requests; see `arrivals`."""
    return list(arrivals(rate_per_s, burstiness, seed, count))


@dataclass(frozen=True, slots=True)
class Arrivals:
    """When requests or conversations begin: at a rate, or at given times; `count` None is without end.

    Raises: `ValueError` as `arrivals` does.
    """

    count: int | None
    rate_per_s: float = float("inf")
    burstiness: float = 1.0
    seed: int = 0
    times: Sequence[float] | None = None

    def __post_init__(self) -> None:
        arrivals(self.rate_per_s, self.burstiness)

    @property
    def is_open(self) -> bool:
        """Whether there are times to keep: an open loop. Else all begin at once, or when one before has ended."""
        return self.times is not None or self.rate_per_s < float("inf")

    def share(self, index: int, of: int) -> Iterator[tuple[int, float]]:
        """Yield number and time of every `of`-th, from `index` on."""
        times = self.times
        if times is None:
            times_on = arrivals(self.rate_per_s, self.burstiness, self.seed, self.count)
        else:
            times_on = iter(times[: self.count])
        return itertools.islice(enumerate(times_on), index, None, of)
