"""Days and months of limits, kept over restarts by the journal: for a process that shares nothing over Redis.

What other processes of the machine used, and those before, stands in files of theirs; what this one used it counts.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from typing import Final

from edge.errors import Unusable
from edge.journal.journal import Journal
from edge.journal.spent import SpentIndex
from edge.limits.admission import Admission
from edge.limits.periods import Period, Span
from edge.limits.quotas import NOTHING, Allowance, Key, Spent
from edge.outage import Outage

_log = logging.getLogger(__name__)

_INTERVAL_S: Final = 30.0
_PATIENCE_S: Final = 2.0  # of the start: a journal of which nothing is known yet is read while requests are served

_STEP_S: Final = 5.0  # of the clock, as is reported: less is not worth a step of every minute
_A_TURN: Final = 100  # sums, between which the thread lets the loop go on: a fraction of a millisecond

_Whose = tuple[bool, str, str]  # whether of a user or of a key, the route, and the user or key
_Sums = dict[_Whose, tuple[int, int]]  # plain tuples of numbers, which the collector of garbage need not look at


class JournalQuotas:
    """Brings what the journal says of the current day and month into the limits, every half a minute.

    `clock_step_s` yields how far the machine's clock was set since the start: days follow it.
    """

    def __init__(self, journal: Journal, admission: Admission, clock_step_s: Callable[[], float]) -> None:
        self._index = SpentIndex(journal.directory, lambda: admission.now)
        self._token = journal.token
        self._admission = admission
        self._clock_step_s = clock_step_s
        self._quotas = admission.quotas
        self._sums: Mapping[tuple[str, Span, float], _Sums] = {}
        self._loading: asyncio.Task[None] | None = None
        self.outage = Outage(
            _log, "limits by day and month count what this process serves", "limits by day and month count all again"
        )

    @property
    def is_used(self) -> bool:
        """Whether the journal is asked at all."""
        return bool(self._sums or self.outage)

    async def start(self) -> None:
        """Learn what was used before, if that does not take long; nothing where processes share what they count."""
        if not self._quotas.shares:
            self._quotas.past = self._past
            self._loading = asyncio.get_running_loop().create_task(self._load(), name="quotas")
            await asyncio.wait((self._loading,), timeout=_PATIENCE_S)

    async def run(self) -> None:
        """Learn what others used, until cancelled."""
        while True:
            await asyncio.sleep(_INTERVAL_S)
            if not self._quotas.shares:
                self._follow_clock()
                await self._load()

    def _follow_clock(self) -> None:
        """Let limits go by the machine's clock where it was set by far, as one that was wrong at the start."""
        step_s = self._clock_step_s()
        if abs(step_s - self._admission.clock_offset_s) > _STEP_S:
            self._admission.clock_offset_s = step_s

    async def _load(self) -> None:
        periods = self._periods()
        if not periods:
            return
        try:
            is_whole, self._sums = await asyncio.to_thread(self._read, periods)
            if is_whole:
                self.outage.up()
            else:
                self.outage.down("the journal is still being read")
        except Unusable as error:
            self.outage.down(str(error))
            return
        for number, (quota, allowance) in enumerate(self._quotas.counted(), 1):
            if (allowance.zone, allowance.span, quota.period.begins_at) in self._sums:  # else of a zone before a reload
                quota.update_remote(self._past(allowance, quota.key, quota.period))
            if number % 1000 == 0:
                await asyncio.sleep(0)

    def _periods(self) -> dict[tuple[str, Span], Period]:
        """Return the periods of now that limits have, by their time zones."""
        now, wanted = self._admission.now, set[tuple[str, Span]]()
        for each in self._admission.configs.values():
            if each.requests_per_day is not None or each.tokens_per_day is not None:
                wanted.add((each.time_zone, "day"))
            if each.tokens_per_month is not None:
                wanted.add((each.time_zone, "month"))
        return {(zone, span): self._quotas.calendar_of(zone).current(span, now) for zone, span in wanted}

    def _read(self, periods: Mapping[tuple[str, Span], Period]) -> tuple[bool, dict[tuple[str, Span, float], _Sums]]:
        """Return whether all is known, and what was used in some periods; runs in a thread."""
        is_whole = self._index.catch_up()
        self._index.forget()
        found = {}
        for (zone, span), period in periods.items():
            sums: _Sums = {}
            rows = self._index.read(period.begins_at, period.ends_at, self._token)
            for number, (route, user, key_id, requests, tokens) in enumerate(rows):
                for whose in ((True, route, user), (False, route, key_id)):
                    before = sums.get(whose, NOTHING)
                    sums[whose] = before[0] + requests, before[1] + tokens
                if number % _A_TURN == 0:
                    time.sleep(0)  # the loop's turn
            found[zone, span, period.begins_at] = sums
        return is_whole, found

    def _past(self, allowance: Allowance, key: Key, period: Period) -> Spent:
        """Return what others used of a limit."""
        sums = self._sums.get((allowance.zone, allowance.span, period.begins_at), {})
        return Spent(*sums.get((allowance.is_per_user, key[1], key[2]), NOTHING))

    async def close(self) -> None:
        """Leave the rest to the next start."""
        self._index.stop()
        if self._loading is not None:
            await self._loading
