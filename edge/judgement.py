"""What an attempt showed of its endpoint, and whether to ask another one; the table is that of `upstream/health.py`.

What came of an attempt that failed is an `End`, or one of these words: `connect_` and the cause of a `ConnectFailed`,
`no_answer` for a connection that ended without one, or a tokenizer that gave none, `no_room` for what the edge itself
has none left of, `unequal` or `ignored` for another answer than the one that was to go on, `outrun` for one that
another endpoint began before it, `displaced` for one beside another whose place a request needed.
"""

import time
from typing import Final

from edge import errors
from edge.errors import EdgeError
from edge.exchange import End, Exchange, Tried
from edge.operations import Reads
from edge.relay.terms import UpstreamAnsweredError
from edge.upstream.endpoints import Lease
from edge.upstream.health import Verdict, judge, may_pass_elsewhere
from edge.upstream.pools import Pool
from edge.upstream_errors import from_upstream, logged, pause_of

_FINE, _NOTHING = Verdict.FINE, Verdict.NOTHING
_VERDICTS: Final[dict[End | None, Verdict]] = {
    End.COMPLETE: Verdict.FINE,
    End.UPSTREAM_CUT: Verdict.FAULT,
    End.UPSTREAM_ERROR: Verdict.FAULT,
    End.IDLE_TIMEOUT: Verdict.FAULT,
}  # of an answer that began; other ends show nothing
_WITHIN: Final = {
    End.UPSTREAM_CUT: "cut within the answer",
    End.UPSTREAM_ERROR: "an error within the answer",
    End.IDLE_TIMEOUT: "silent within the answer",
}
OUTRUN: Final = ("outrun", "another endpoint began to answer")
DISPLACED: Final = ("displaced", "its place was for another request")
_GENERATES_NOTHING: Final = (Reads.NOTHING, Reads.STORED)  # what a server does whose model has died


def judge_answer(exchange: Exchange, lease: Lease, missing: Lease | None, difference: str = "") -> None:
    """Report what an answer that began showed of its endpoint, and of the one before that had answered 404.

    `difference` is a word for an answer that was well, but could not go on with another one; it shows nothing.
    """
    if difference:
        _note(exchange, lease, exchange.status, difference, "another answer", exchange.finished)
        return
    verdict = _VERDICTS.get(exchange.end, _NOTHING)
    if lease.ticket is not None:
        lease.ticket.learn(exchange.usage)
    if verdict is _FINE:
        if missing is not None:
            missing.report(Verdict.FAULT)
        if exchange.operation.reads in _GENERATES_NOTHING:
            return
    elif verdict is not _NOTHING:
        assert exchange.end is not None
        lease.endpoint.note_fault(exchange.request_id, exchange.end.value)
        _note(exchange, lease, exchange.status, exchange.end.value, _WITHIN[exchange.end], exchange.finished)
    lease.report(verdict)


def judge_interruption(exchange: Exchange, lease: Lease, end: End) -> None:
    """Report what an attempt showed whose answer broke and may go on elsewhere."""
    _note(exchange, lease, exchange.status, end.value, _WITHIN[end], time.monotonic())
    lease.endpoint.note_fault(exchange.request_id, end.value)
    lease.report(Verdict.FAULT)


def judge_failure(
    exchange: Exchange,
    lease: Lease,
    pool: Pool | None,
    error: EdgeError | UpstreamAnsweredError,
) -> tuple[EdgeError, bool]:
    """Report what a failed attempt showed; return the error for the client, and whether to ask another endpoint."""
    config, now = pool.config if pool is not None else None, time.monotonic()
    if isinstance(error, UpstreamAnsweredError):
        status = error.status
        failure = from_upstream(status, error.headers, error.body, is_instance=pool is None)
        elsewhere = may_pass_elsewhere(status, _last_status(exchange))
        _note(exchange, lease, status, End.UPSTREAM_ERROR.value, logged(error.headers, error.body), now)
        is_callers = status >= 500 and failure.origin is errors.Origin.CLIENT
        is_beside = error.safe_elsewhere and status < 500  # refused beside its answers, which it may give all the same
        verdict = _NOTHING if is_callers or is_beside else judge(status)
        if verdict is not _NOTHING:
            lease.endpoint.note_fault(exchange.request_id, f"answers {status}")
        lease.report(verdict, pause_of(error.headers), status)
    else:
        failure = error
        _note(exchange, lease, 0, *_what_befell(exchange, error, now), now)
        elsewhere = isinstance(error, errors.UpstreamError) and config is not None and config.retry_after_send
        if exchange.end is not End.DRAINED and not isinstance(error, errors.Overloaded):  # that is the edge's own lack
            lease.endpoint.note_fault(exchange.request_id, exchange.upstream_error)
            lease.report(Verdict.UNREACHABLE if isinstance(error, errors.ConnectFailed) else Verdict.FAULT)
    if error.safe_elsewhere:  # nothing was begun, however long it took
        elsewhere = pool is not None and pool.may_retry()
    else:
        quick = config is not None and now - exchange.asked_at <= config.retry_within_s
        elsewhere = elsewhere and quick and pool is not None and pool.may_retry()
    return failure, elsewhere


def is_answer(exchange: Exchange, error: BaseException) -> bool:
    """Whether an error is what the request gets: an endpoint answered, as any other one may."""
    return isinstance(error, UpstreamAnsweredError) and not may_pass_elsewhere(error.status, _last_status(exchange))


def note_cut(exchange: Exchange, lease: Lease, asked_at: float, outcome: str, words: str) -> None:
    """Note an attempt that was cut before its answer began, which shows nothing: `OUTRUN`, `DISPLACED` or an `End`."""
    _add(exchange, lease, 0, outcome, words, time.monotonic() - asked_at)


def given_up(exchange: Exchange, failure: EdgeError | None) -> EdgeError:
    """Return the failure with which a request ends that no other endpoint is asked for."""
    assert failure is not None  # else the next one would be asked
    if isinstance(failure, errors.UpstreamTimeout) and not exchange.stream:
        failure.should_retry = False  # the engine goes on with an answer that nobody waits for, and would with each try
    exchange.ended(End.REFUSED if isinstance(failure, errors.Overloaded) else End.UPSTREAM_ERROR)
    return failure


def _note(exchange: Exchange, lease: Lease, status: int, outcome: str, words: str, now: float) -> None:
    """Note an attempt that failed, for the log and the metrics; each but the first one was a retry."""
    failures = _add(exchange, lease, status, outcome, words, now - exchange.asked_at)
    exchange.retries = max(exchange.retries, len(failures) - 1 - exchange.hedges)
    exchange.upstream_status, exchange.upstream_error = status, words


def _add(exchange: Exchange, lease: Lease, status: int, outcome: str, words: str, took_s: float) -> list[Tried]:
    """Add an attempt to those of which the request did not get its answer; return them."""
    if exchange.failures is None:
        exchange.failures = []
    exchange.failures.append(Tried(lease.endpoint.authority, status, outcome, words, round(took_s * 1000, 2)))
    return exchange.failures


def _last_status(exchange: Exchange) -> int:
    """Return what was answered last, 0 for nothing yet."""
    return next((each.status for each in reversed(exchange.failures or ()) if each.status), 0)


def _what_befell(exchange: Exchange, error: EdgeError, now: float) -> tuple[str, str]:
    """Return the outcome of an attempt that has no answer, and more of it for operators."""
    words = error.cause or str(error).removeprefix("The model's server ").rstrip(".")
    if exchange.end is End.DRAINED:
        return End.DRAINED.value, "the edge stops"
    if isinstance(error, errors.Overloaded):
        return "no_room", "the edge has no descriptor or port left"
    if isinstance(error, errors.ConnectFailed):
        return f"connect_{error.cause.partition(':')[0]}", words
    if isinstance(error, errors.UpstreamTimeout) and exchange.end is not None:
        what = "further byte" if exchange.first_byte else "first byte"
        return exchange.end.value, f"no {what} in {now - exchange.asked_at:.0f} s"
    return "no_answer", words
