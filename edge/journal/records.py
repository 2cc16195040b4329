"""A usage record as lines of JSON: what stands in the files of the journal and goes to a sink.

A record is two lines: one when its request is accepted, and one, with an `end`, when that has ended. The second begins
as the first does and is the whole record; the first only says, after a crash, that there is one to write.

`v` is the version of the other members, 2 today; 1 had no `region`. A line without it is of the edge before there were
versions, with the members of 1. Both are read as well. A reader passes over a line of a version that it does not know,
and counts it; it is kept and delivered as it stands. So `v`, `id`, `time`, `end` and `duration_ms` are for every
version what they are here.
"""

import time
from functools import lru_cache
from typing import Any, Final, Literal

import msgspec
from msgspec import UNSET, UnsetType

from edge.exchange import Exchange, Unit, Usage, UsageSource

VERSION: Final = 2
READ: Final = (1, VERSION)
CRASHED: Final = "crashed"  # the `end` that a later process writes
_MILLISECONDS: Final = tuple(f".{number:03d}Z" for number in range(1000))
_STREAM_BYTES: Final = {True: len('"stream":true}\n'), False: len('"stream":false}\n')}  # at the end of a first line


class _Opened(msgspec.Struct, gc=False, kw_only=True):
    """The first line; `time` is when the request began."""

    v: Literal[1, 2] = 1
    id: str
    time: str
    request_id: str
    key_id: str | None
    user: str | None
    route: str | None
    path: str
    model: str | None
    region: str | None = None
    stream: bool


class _Ended(msgspec.Struct, gc=False):
    """What the last line has after the members of the first, the last of which moves in between.

    What is not given is that of a request of which nothing more is known.
    """

    upstream_model: str | None = None
    endpoint: str | None = None
    stream: bool = False
    status: int = 0
    end: str = CRASHED
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    cache_creation_tokens: int = 0
    reasoning_tokens: int = 0
    units: int = 0
    unit: Unit | None = None
    usage_source: str = UsageSource.NONE.value
    ttft_ms: float | None = None
    duration_ms: float = 0
    retries: int = 0


class _Further(_Ended, gc=False):
    """The same of a stream of which several endpoints were asked at once, or one after another had begun.

    It broke and went on at `endpoint`, with what that told of its part of the answer. Or it was asked of two, since the
    first was slow: `hedge` is what became of that.
    """

    resumes: int | UnsetType = UNSET
    resumed_from: str | UnsetType = UNSET
    resumed_usage: Usage | UnsetType | None = UNSET
    hedges: int | UnsetType = UNSET
    hedge: str | UnsetType = UNSET


class Head(msgspec.Struct, gc=False):
    """What every version of a line has; `end` is None in a first line."""

    id: str
    time: str = ""
    end: str | None = None
    duration_ms: float = 0
    v: Any = 1


_encoder: Final = msgspec.json.Encoder()
head_decoder: Final = msgspec.json.Decoder(Head)
_opened_decoder: Final = msgspec.json.Decoder(_Opened)


def first_line(exchange: Exchange, record_id: str, region: str | None = None) -> bytes:
    """Return the line of a request that is accepted."""
    principal = exchange.principal
    opened = _Opened(
        v=VERSION,
        id=record_id,
        time=_time(exchange.started_at),
        request_id=exchange.request_id,
        key_id=principal.id if principal is not None else None,
        user=principal.user if principal is not None else None,
        route=exchange.route or None,
        path=exchange.path,
        model=exchange.model or None,
        region=region,
        stream=exchange.stream,
    )
    return _encoder.encode(opened) + b"\n"


def last_line(first: bytes, exchange: Exchange) -> bytes:
    """Return the line of a request that has ended, by the first line of its record."""
    usage, begun, first_byte, end = exchange.usage, exchange.begun, exchange.first_byte, exchange.end
    assert end is not None
    ended = _Ended(
        exchange.upstream_model or None,
        exchange.endpoint or None,
        exchange.stream,
        exchange.status,
        end._value_,  # `value`, and msgspec's own look-up of it, cost ten times as much
        usage.prompt_tokens,
        usage.completion_tokens,
        usage.cached_tokens or 0,
        usage.cache_creation_tokens,
        usage.reasoning_tokens,
        usage.units,
        usage.unit,
        usage.source._value_,
        int((first_byte - begun) * 1e5 + 0.5) / 100 if first_byte else None,
        int((exchange.finished - begun) * 1e5 + 0.5) / 100,
        exchange.retries,
    )
    if exchange.failures is not None:  # as whatever was asked of several endpoints has
        ended = _further(ended, exchange)
    return _joined(first, ended)


def _further(ended: _Ended, exchange: Exchange) -> _Ended:
    if not exchange.resumes and not exchange.hedges:
        return ended
    further = _Further(**msgspec.structs.asdict(ended))
    if exchange.resumes:
        further.resumes, further.resumed_from = exchange.resumes, exchange.resumed_from
        further.resumed_usage = exchange.resumed_usage
    if exchange.hedge is not None and exchange.hedges:
        further.hedges, further.hedge = 1, exchange.hedge.outcome
    return further


def crashed_line(first: bytes) -> bytes:
    """Return the line of a request of which nothing more is known; raises `ValueError` for another's first line."""
    opened = _opened_decoder.decode(first)
    opened.v = VERSION
    return _joined(_encoder.encode(opened) + b"\n", _Ended(stream=opened.stream))


def _joined(first: bytes, ended: _Ended) -> bytes:
    return first[: -_STREAM_BYTES[ended.stream]] + _encoder.encode(ended)[1:] + b"\n"


def head_of(line: bytes) -> Head | None:
    """Return what every line has, None of one that is none of ours."""
    try:
        return head_decoder.decode(line)
    except (ValueError, RecursionError):
        return None


def _time(at: float) -> str:
    """Return RFC 3339 in UTC with milliseconds: of one width, so that it sorts as text."""
    second = int(at)
    return _to_the_second(second) + _MILLISECONDS[int((at - second) * 1000)]


@lru_cache(maxsize=1)
def _to_the_second(second: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
