"""Requests that wait until their limits have room, in place of a refusal: those of one caller in their order.

Counters belong to one caller, so nobody else is held up. As many may wait at a pool as for its places, but neither
takes the room of the other: one caller over its limit would fill the queue of an idle pool.
Source of the wish: RFC 7240 section 4.3, `Prefer: wait=20`.
"""

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterable
from typing import Final, NamedTuple, Protocol, TypeVar

from edge.errors import RateLimited

T = TypeVar("T")

_LONGEST_WISH_S: Final = 60
_SHORTEST_SLEEP_S: Final = 0.02
_UNKNOWN_SLEEP_S: Final = 0.05  # nobody knows when one of the requests that run will end
_LONGEST_SLEEP_S: Final = 0.5  # a request that ends, and has used less than was reserved, may let the next one begin
_WAIT: Final = re.compile(r'wait[ \t]*=[ \t]*(?:(\d{1,9})|"(\d{1,9})")[ \t]*(?:;.*)?', re.ASCII | re.IGNORECASE)


class Room(Protocol):
    """Where those who wait are counted: a pool."""

    held: int

    @property
    def has_room_to_wait(self) -> bool:
        """Whether one more may wait."""


class Patience(NamedTuple):
    """How long a request waits for its limits, and where; `applied` is the client's preference that is followed."""

    room: Room
    wait_s: float = 0.0
    applied: str = ""

    @property
    def header(self) -> bytes:
        """The line of the head of an answer that says so, b"" for none."""
        return f"preference-applied: {self.applied}\r\n".encode() if self.applied else b""

    def tell(self, limited: RateLimited) -> None:
        """Let a refusal say so too."""
        if self.applied:
            limited.headers += (("preference-applied", self.applied),)


class _Nowhere:
    held = 0
    has_room_to_wait = False


NO_PATIENCE: Final = Patience(_Nowhere())


def patience_of(room: Room, limits: Iterable[float | None], prefer: Iterable[str]) -> Patience:
    """Return how long a request waits: as its client wishes, up to a minute, else the shortest time of its limits.

    `limits` are what each of them says, None where one says nothing. Where one says 0 none waits.
    """
    waits = [each for each in limits if each is not None]
    shortest = min(waits, default=0.0)
    if waits and not shortest:
        return NO_PATIENCE
    wish = _wish_of(prefer)
    if wish is None:
        return Patience(room, shortest)
    wait_s = min(wish, max(_LONGEST_WISH_S, int(shortest)))
    return Patience(room, wait_s, f"wait={wait_s}")


def _wish_of(prefer: Iterable[str]) -> int | None:
    """Return the seconds of the first `wait` of some `Prefer` headers, None without one."""
    for preference in ",".join(prefer).split(","):
        if found := _WAIT.fullmatch(preference.strip()):
            return int(found[1] or found[2])
    return None


class _Line:
    """Who waits for the same counters."""

    def __init__(self) -> None:
        self.turn = asyncio.Lock()  # which is given in the order in which it was asked for
        self.length = 0


class Lines:
    """All lines of the process, each by whose counters it waits for."""

    def __init__(self) -> None:
        self._lines: dict[object, _Line] = {}

    def admit(self, whose: object, patience: Patience, admit: Callable[[], T]) -> T | None:
        """Return what `admit` does; None for a request that is to `wait`, behind others or until it is refused no more.

        Raises: `RateLimited`, where the time or the room does not suffice.
        """
        has_room, has_line = patience.room.has_room_to_wait, whose in self._lines
        if has_line and has_room:
            return None
        try:
            return admit()
        except RateLimited as limited:
            if has_line or not has_room or limited.wait_s > patience.wait_s:
                patience.tell(limited)
                raise
            return None

    async def wait(
        self, whose: object, patience: Patience, admit: Callable[[], T], check: Callable[[], Awaitable[None]]
    ) -> T:
        """Return what `admit` does once it refuses no more, in line; the last try is at the end of the time.

        `check` raises, before each try, if the request may not go on by now. Raises: `RateLimited`.
        """
        line = self._lines.setdefault(whose, _Line())
        line.length += 1
        patience.room.held += 1
        try:
            return await _waited(line.turn, patience.wait_s, admit, check)
        except RateLimited as limited:
            patience.tell(limited)
            raise
        finally:
            patience.room.held -= 1
            line.length -= 1
            if not line.length:
                del self._lines[whose]


async def _waited(turn: asyncio.Lock, wait_s: float, admit: Callable[[], T], check: Callable[[], Awaitable[None]]) -> T:
    now_s = asyncio.get_running_loop().time
    until = now_s() + wait_s
    try:
        async with asyncio.timeout_at(until), turn:
            while True:
                await check()
                try:
                    return admit()
                except RateLimited as limited:
                    if now_s() + limited.wait_s > until:
                        raise
                    sleep_s = limited.wait_s or _UNKNOWN_SLEEP_S
                    await asyncio.sleep(min(max(sleep_s, _SHORTEST_SLEEP_S), _LONGEST_SLEEP_S))
    except TimeoutError:
        await check()
        return admit()
