"""Finished requests that ended alike, to be counted together: one by one they would cost twice as much."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from edge.exchange import End, Exchange


class Alike(NamedTuple):
    """Requests of one route, pool and endpoint that ended the same way within a second of `time.monotonic`.

    `is_plain`: none of them waited in a queue, was sent twice, or failed at an endpoint. `first_bytes_s` is how long
    the first byte of the body took, of those that had one; `completion_tokens` their answers had together.
    """

    route: str
    pool: str
    endpoint: str
    status: int
    end: End
    stream: bool
    is_plain: bool
    second: int
    exchanges: Sequence[Exchange]
    first_bytes_s: Sequence[float]
    completion_tokens: int


def alike(finished: Sequence[Exchange]) -> Iterator[Alike]:
    """Yield finished requests together with those that are like them."""
    groups: dict[tuple[str, str, str, int, End | None, bool, bool, float], list[Exchange]] = {}
    for each in finished:
        is_plain = each.failures is None and not each.replays and not each.queued_s
        key = (
            each.route, each.pool, each.endpoint, each.status, each.end, each.stream, is_plain, each.finished // 1
        )  # fmt: skip
        try:
            groups[key].append(each)
        except KeyError:
            groups[key] = [each]
    for (route, pool, endpoint, status, end, stream, is_plain, second), exchanges in groups.items():
        assert end is not None
        first_bytes_s = [each.first_byte - each.begun for each in exchanges if each.first_byte]
        tokens = sum([each.usage.completion_tokens for each in exchanges])
        yield Alike(
            route, pool, endpoint, status, end, stream, is_plain, int(second), exchanges, first_bytes_s, tokens
        )  # fmt: skip
