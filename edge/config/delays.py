"""When a pool asks a second endpoint, as routes.toml writes it: a duration, or what the pool measures."""

from typing import Final, Literal

from edge.config.values import DURATION_PATTERN, seconds, write_duration

Delay = float | Literal["p95"]  # in seconds

# Of a request's body, some 4,000 tokens. A longer prompt is slow because it is long, and dear to read twice.
HEDGED_BYTES: Final = 16 * 1024
DELAY_PATTERN: Final = rf"^(p95|{DURATION_PATTERN})$"


def parse_delay(text: str) -> Delay:
    """Return a delay; raises `ValueError` for none."""
    if text == "p95":
        return "p95"
    try:
        delay_s = seconds(text)
    except ValueError:
        delay_s = 0
    if not delay_s:
        raise ValueError(f'{text!r} is no time to wait for: write "p95", or a duration such as "800ms"')
    return delay_s


def write_delay(delay: Delay) -> str:
    """Return a delay as the file has it."""
    return delay if delay == "p95" else write_duration(delay)
