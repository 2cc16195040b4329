"""What an attempt showed of its endpoint, and whether to ask another one; the table is that of `upstream/health.py`."""

from typing import Final

from edge import errors
from edge.errors import EdgeError
from edge.exchange import End, Exchange
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
_GENERATES_NOTHING: Final = (Reads.NOTHING, Reads.STORED)  # what a server does whose model has died


def judge_answer(exchange: Exchange, lease: Lease, missing: Lease | None) -> None:
    """Report what an answer that began showed of its endpoint, and of the one before that had answered 404."""
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
    lease.report(verdict)


def judge_interruption(exchange: Exchange, lease: Lease, end: End) -> None:
    """Report what an attempt showed whose answer broke and may go on elsewhere."""
    lease.endpoint.note_fault(exchange.request_id, end.value)
    lease.report(Verdict.FAULT)


def judge_failure(
    exchange: Exchange, lease: Lease, pool: Pool | None, error: EdgeError | UpstreamAnsweredError, took_s: float
) -> tuple[EdgeError, bool]:
    """Report what a failed attempt showed; return the error for the client, and whether to ask another endpoint."""
    config = pool.config if pool is not None else None
    if isinstance(error, UpstreamAnsweredError):
        status = error.status
        failure = from_upstream(status, error.headers, error.body, is_instance=pool is None)
        elsewhere = may_pass_elsewhere(status, exchange.upstream_status)
        exchange.upstream_status, exchange.upstream_error = status, logged(error.headers, error.body)
        is_callers = status >= 500 and failure.origin is errors.Origin.CLIENT
        verdict = _NOTHING if is_callers else judge(status)
        if verdict is not _NOTHING:
            lease.endpoint.note_fault(exchange.request_id, f"answers {status}")
        lease.report(verdict, pause_of(error.headers), status)
    else:
        failure = error
        elsewhere = isinstance(error, errors.UpstreamError) and config is not None and config.retry_after_send
        if exchange.end is not End.DRAINED and not isinstance(error, errors.Overloaded):  # that is the edge's own lack
            lease.endpoint.note_fault(exchange.request_id, str(error).removeprefix("The model's server ").rstrip("."))
            lease.report(Verdict.UNREACHABLE if error.safe_elsewhere else Verdict.FAULT)
    if isinstance(error, EdgeError) and error.safe_elsewhere:  # nothing was sent, however long it took
        elsewhere = pool is not None and pool.may_retry()
    else:
        quick = config is not None and took_s <= config.retry_within_s
        elsewhere = elsewhere and quick and pool is not None and pool.may_retry()
    return failure, elsewhere
