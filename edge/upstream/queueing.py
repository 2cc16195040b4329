"""Whose turn it is when everybody waits for the same places, and how fast places come free.

Source of the order: start-time fair queueing, Goyal, Vin and Cheng 1996. No clock in here: `now` is seconds of the
loop's clock.
"""

import heapq
from collections.abc import Callable
from typing import Final, Generic, TypeVar

T = TypeVar("T")

_NEWEST_SHARE: Final = 0.2  # of the average: the last few intervals count most


class FairQueue(Generic[T]):
    """Items of users, who take turns: one user's hundred items delay another's single one by no more than one."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, str, T]] = []  # turn, order of arrival, user, item
        self._next_turn: dict[str, int] = {}  # of the users whose next item must wait for its turn
        self._turn = 0
        self._arrivals = 0

    def __len__(self) -> int:
        return len(self._heap)

    def push(self, user: str, item: T) -> None:
        """Add an item at the user's next turn."""
        turn = max(self._turn, self._next_turn.get(user, 0))
        self._next_turn[user] = turn + 1
        self._arrivals += 1
        heapq.heappush(self._heap, (turn, self._arrivals, user, item))

    def pop(self) -> T:
        """Remove and return the item whose turn it is; raises `IndexError` when there is none."""
        turn, _, _, item = heapq.heappop(self._heap)
        self._advance(turn)
        return item

    def pop_for(self, may_go: Callable[[str], bool]) -> T | None:
        """Remove and return the item whose turn it is among the users who may go; None: there is none."""
        if may_go(self._heap[0][2]):
            return self.pop()
        going = {user for user in {entry[2] for entry in self._heap} if may_go(user)}
        following = min((entry for entry in self._heap if entry[2] in going), default=None)
        if following is None:
            return None
        self._heap.remove(following)
        heapq.heapify(self._heap)
        self._advance(following[0])
        return following[3]

    def remove(self, item: T) -> None:
        """Remove an item that waits no more; one that is not there is no error."""
        for at, (_, _, _, other) in enumerate(self._heap):
            if other is item:
                del self._heap[at]
                heapq.heapify(self._heap)
                self._advance(self._turn)
                return

    def _advance(self, turn: int) -> None:
        """Go on to a turn; users are known as long as they have had more than that, and somebody waits."""
        if not self._heap:
            self._next_turn.clear()
        elif turn > self._turn:
            self._next_turn = {user: following for user, following in self._next_turn.items() if following > turn}
        self._turn = max(self._turn, turn)


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
