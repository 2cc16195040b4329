"""Whose turn it is when everybody waits for the same places, and how fast places come free.

A user's turn comes by the tokens that were given to that user before, divided by the user's share. Tokens are charged
when a place is given, by what the request may take, and corrected by what it did take. So for two users who both wait,
what they were given differs by no more than twice the largest request, whatever each of them asks for.

Source of the order: Sheng et al., "Fairness in Serving Large Language Models", 2024 (virtual token counter), and for
the clock start-time fair queueing, Goyal, Vin and Cheng 1996. No clock in here: `now_s` is seconds of the loop's clock.
"""

import heapq
from collections.abc import Callable
from typing import Any, Final, Generic, NamedTuple, TypeVar

T = TypeVar("T")

_NEWEST_SHARE: Final = 0.2  # of the average: the last few intervals count most
_LATEST_SHARE: Final = 0.25  # of what answers of a user take, as in `limits/counters.py`
_UNKNOWN_ANSWER_TOKENS: Final = 256
_LEAST_TOKENS: Final = 64  # of a request: one that is refused at once, or has no tokens, has taken a place too
_LONGEST_DEBT_S: Final = 60.0  # how long a user may have nothing because requests took more than they were charged
_MARK_S: Final = 1.0  # between two looks at how fast the clock runs
_MOST_KNOWN: Final = 10_000  # users who do not wait now, of whom is known what answers take
_SPARE_ENTRIES: Final = 64


class Demand(NamedTuple):
    """What a request may take: tokens of its prompt, and of each of its `answers` no more than `max_tokens`."""

    prompt_tokens: int = 0
    answers: int = 0
    max_tokens: int | None = None
    share: int = 1


DEMANDS_NOTHING: Final = Demand()


class _User:
    """A user: when the next turn comes, and what waits for it.

    `clock` is tokens for a share of 1; it never falls under what it was when the user began to wait, `floor`.
    `answer_tokens` and `prompt_ratio`, real to estimated, are what requests took lately, None while nothing is known.
    """

    __slots__ = ("answer_tokens", "clock", "entry", "floor", "name", "order", "prompt_ratio", "turns")

    def __init__(self, name: str) -> None:
        self.name = name
        self.clock = self.floor = 0.0
        self.order = 0
        self.entry: _Entry | None = None
        self.turns: dict[Turn[Any], None] = {}
        self.answer_tokens: float | None = None
        self.prompt_ratio: float | None = None

    def cost_of(self, demand: Demand) -> float:
        """Return the tokens that a request may be expected to take."""
        each = _UNKNOWN_ANSWER_TOKENS if self.answer_tokens is None else self.answer_tokens
        if demand.max_tokens is not None and demand.max_tokens < each:
            each = demand.max_tokens
        ratio = 1.0 if self.prompt_ratio is None else self.prompt_ratio
        return max(demand.prompt_tokens * ratio + demand.answers * each, _LEAST_TOKENS)

    def learn(self, demand: Demand, prompt_tokens: int, answer_tokens: int) -> None:
        """Let a request count in what the next ones are expected to take."""
        if answer_tokens and demand.answers:
            self.answer_tokens = _mean(self.answer_tokens, answer_tokens / demand.answers)
        if prompt_tokens and demand.prompt_tokens:
            self.prompt_ratio = _mean(self.prompt_ratio, prompt_tokens / demand.prompt_tokens)


def _mean(mean: float | None, latest: float) -> float:
    return latest if mean is None else mean + _LATEST_SHARE * (latest - mean)


_Entry = tuple[float, int, int, _User]  # clock, order, a number that no other has, user


class Turn(Generic[T]):
    """An item of a user that waits for its turn, or had it: `charged` tokens are then to be settled, once."""

    __slots__ = ("_queue", "charged", "demand", "item", "user")

    def __init__(self, queue: "FairQueue[T]", user: _User, item: T, demand: Demand) -> None:
        self._queue: FairQueue[T] | None = queue
        self.user = user
        self.item = item
        self.demand = demand
        self.charged = 0.0

    def settle(self, prompt_tokens: int, answer_tokens: int, *, complete: bool) -> None:
        """Charge what was used in place of what was expected; an answer that is whole and says nothing changes nothing.

        Tokens are those of all answers to the request. A second call does nothing.
        """
        queue, self._queue = self._queue, None
        tokens = prompt_tokens + answer_tokens
        if queue is None or (complete and not tokens):
            return
        if complete:
            self.user.learn(self.demand, prompt_tokens, answer_tokens)
        queue.correct(self, max(tokens, _LEAST_TOKENS))

    def cancel(self) -> None:
        """Take back what was charged, in place of `settle`: the place was not used."""
        queue, self._queue = self._queue, None
        if queue is not None:
            queue.correct(self, 0)


class FairQueue(Generic[T]):
    """Items of users, by the tokens that each user was given; whoever comes has no credit for the time before.

    A heap of users, not of items, each once: to add, take or remove an item costs O(log users). While nobody waits,
    nobody has held anybody up, so then all are equal again.
    """

    def __init__(self) -> None:
        self._heap: list[_Entry] = []  # also some that count no more: of users who left, or were put further ahead
        self._active: dict[str, _User] = {}  # of whom something waits
        self._idle: dict[str, _User] = {}  # the others, the longest idle first
        self._count = 0
        self._clock = 0.0  # of the user whose turn was last
        self._latest = 0.0  # the furthest clock of all users
        self._numbers = 0
        self._rate = 0.0  # of the clock, in tokens a second: what a share of 1 is given
        self._mark: tuple[float, float] | None = None  # a time, and the clock then

    def __len__(self) -> int:
        return self._count

    def push(self, name: str, item: T, demand: Demand = DEMANDS_NOTHING) -> Turn[T]:
        """Add an item of a user."""
        user = self._active.get(name)
        if user is None:
            user = self._active[name] = self._idle.pop(name) if name in self._idle else _User(name)
            user.clock = user.floor = max(user.clock, self._clock)
            self._queue_last(user)
            if user.entry is None or user.entry[0] > user.clock:
                self._enter(user)
        turn = Turn(self, user, item, demand)
        user.turns[turn] = None
        self._count += 1
        return turn

    def pop(self, now_s: float, may_go: Callable[[str], bool] = lambda name: True) -> Turn[T] | None:
        """Remove, charge and return the item whose turn it is among the users who may go; None: there is none.

        Who may not go is passed over, and keeps the turn.
        """
        passed: list[_Entry] = []
        try:
            while (user := self._first()) is not None:
                if may_go(user.name):
                    return self._take(user, now_s)
                passed.append(heapq.heappop(self._heap))
            return None
        finally:
            for entry in passed:
                heapq.heappush(self._heap, entry)

    def remove(self, turn: Turn[T]) -> None:
        """Remove an item that waits no more; one that is not there is no error."""
        user = turn.user
        if turn in user.turns:
            del user.turns[turn]
            self._removed(user)

    def correct(self, turn: Turn[T], tokens: float) -> None:
        """Let a user have been charged `tokens` for a turn; a debt ends after a minute at most."""
        user, change = turn.user, (tokens - turn.charged) / turn.demand.share
        turn.charged = tokens
        if change > 0:
            longest = self._clock + max(_LONGEST_DEBT_S * self._rate, change)
            user.clock = max(user.clock, min(user.clock + change, longest))
            self._latest = max(self._latest, user.clock)
            if not self._count:
                self._clock = self._latest
            return  # found where the user's entry comes up
        user.clock = max(user.clock + change, user.floor)
        if user.turns and user.entry is not None and user.clock < user.entry[0]:
            self._enter(user)

    def _first(self) -> _User | None:
        """Return the user who is next, whose entry is the first of the heap; None: nobody waits."""
        heap = self._heap
        while heap:
            entry = heap[0]
            user = entry[3]
            if user.entry is not entry:
                heapq.heappop(heap)
            elif not user.turns:
                user.entry = None
                heapq.heappop(heap)
            elif entry[0] != user.clock or entry[1] != user.order:
                heapq.heapreplace(heap, self._entry_of(user))
            else:
                return user
        return None

    def _take(self, user: _User, now_s: float) -> Turn[T]:
        """Give the user who is next the turn."""
        turn: Turn[T] = next(iter(user.turns))
        del user.turns[turn]
        self._clock = max(self._clock, user.clock)
        self._note_rate(now_s)
        turn.charged = user.cost_of(turn.demand)
        user.clock += turn.charged / turn.demand.share
        self._latest = max(self._latest, user.clock)
        self._queue_last(user)
        self._removed(user)
        return turn

    def _removed(self, user: _User) -> None:
        """Note that an item is gone."""
        self._count -= 1
        if not user.turns:
            del self._active[user.name]
            self._idle[user.name] = user
            if len(self._idle) > _MOST_KNOWN:
                del self._idle[next(iter(self._idle))]
        if not self._count:
            self._clock, self._mark = self._latest, None

    def _note_rate(self, now_s: float) -> None:
        """Measure how fast the clock runs."""
        if self._mark is None:
            self._mark = now_s, self._clock
            return
        at, clock = self._mark
        if now_s - at >= _MARK_S:
            share = _NEWEST_SHARE if self._rate else 1.0
            self._rate += share * ((self._clock - clock) / (now_s - at) - self._rate)
            self._mark = now_s, self._clock

    def _queue_last(self, user: _User) -> None:
        """Let a user be the last of those whose clock is the same."""
        self._numbers += 1
        user.order = self._numbers

    def _enter(self, user: _User) -> None:
        """Put a user into the heap; an entry that is there already counts no more."""
        if len(self._heap) > 2 * len(self._active) + _SPARE_ENTRIES:
            self._clean()
        heapq.heappush(self._heap, self._entry_of(user))

    def _entry_of(self, user: _User) -> _Entry:
        self._numbers += 1
        user.entry = user.clock, user.order, self._numbers, user
        return user.entry

    def _clean(self) -> None:
        """Leave out the entries that count no more."""
        kept = []
        for entry in self._heap:
            user = entry[3]
            if user.entry is entry:
                if user.turns:
                    kept.append(entry)
                else:
                    user.entry = None
        heapq.heapify(kept)
        self._heap[:] = kept


class DrainRate:
    """How fast places come free while somebody waits."""

    def __init__(self) -> None:
        self._interval_s = 0.0  # between two of them, averaged; 0.0: none yet
        self._last = 0.0

    def begin(self, now: float) -> None:
        """Note that somebody waits from now on."""
        self._last = now

    def note(self, now: float) -> None:
        """Note that a place came free."""
        interval_s = now - self._last
        share = _NEWEST_SHARE if self._interval_s else 1.0
        self._interval_s += share * (interval_s - self._interval_s)
        self._last = now

    def wait_s(self, places: int, now: float) -> float:
        """Return the seconds until so many places have come free; more when none has for longer than usual."""
        return places * max(self._interval_s, now - self._last)
