"""What an accepted request owes: its tokens to its limits, and its record to the journal; paid once."""

from typing import Any, Final

from edge.exchange import NO_USAGE, End, Exchange, Phase, Usage
from edge.journal.journal import Journal
from edge.limits.admission import Permit
from edge.upstream.queueing import Turn

# An engine that was left before it answered has read the prompt: a limit keeps that, else who leaves early has none.
_WAIT: Final = Phase.WAIT
_COMPLETE: Final = End.COMPLETE
_UNHEARD: Final = (End.CLIENT_GONE, End.FIRST_BYTE_TIMEOUT)


class Settlement:
    """The one place where a request is charged and recorded, by the end that its log line and metrics have too.

    `prompt_tokens` is the estimate that counts where the engine was left before it answered. `turn` is that of a
    request which waited for its place.
    """

    __slots__ = ("_exchange", "_journal", "_permit", "_prompt_tokens", "_record_id", "so_far", "turn")

    def __init__(self, exchange: Exchange, permit: Permit, journal: Journal, prompt_tokens: int) -> None:
        """Write that the request was accepted; raises `JournalFull`, with nothing written."""
        self._record_id = journal.open_record(exchange)
        self._exchange = exchange
        self._permit: Permit | None = permit
        self._journal = journal
        self._prompt_tokens = prompt_tokens
        self.turn: Turn[Any] | None = None
        self.so_far = NO_USAGE

    def note(self, usage: Usage) -> None:
        """Note what was used so far, of an answer that may go on elsewhere: it counts where nothing else is known."""
        self.so_far = usage

    def settle(self, end: End, usage: Usage | None = None) -> None:
        """Charge and record, before the last bytes of an answer go; a second call does nothing."""
        permit, self._permit = self._permit, None
        if permit is None:
            return
        exchange = self._exchange
        if usage is None:
            usage = self.so_far
        exchange.ended(end)
        exchange.usage = usage
        prompt_tokens, answer_tokens = usage.prompt_tokens, usage.completion_tokens
        if exchange.phase is _WAIT and exchange.end in _UNHEARD:
            prompt_tokens, answer_tokens = self._prompt_tokens, 0
        if exchange.asked_at:
            permit.charge(prompt_tokens + answer_tokens, answer_tokens)
        else:  # no endpoint was asked, since all are full or one had to wait for too long: it counts as a refusal does
            permit.cancel()
        if self.turn is not None:
            self.turn.settle(prompt_tokens, answer_tokens, complete=exchange.end is _COMPLETE)
        self._journal.close_record(exchange, self._record_id)
