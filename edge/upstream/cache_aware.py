"""`cache-aware`: the member that has least to do before a prompt's first token, with what it has cached taken off.

    score = (new x (1 + waiting / 2) + backlog + 1 KiB) x (decoding + 8) / weight        the smallest wins

`new` is what of the prompt the member has not read, in bytes; `backlog` what it was given and cannot have read yet;
`decoding` its requests whose answers have begun. Bytes stand for tokens: their ratio cancels out. The 8 is the batch at
which a step of decoding begins to take longer; with 1 in its place a warm member with one request loses to a cold one.

`waiting` is how many prompts of the pool are not read, for each member. What one prompt reads again delays those that
come behind it. Without this, turns leave full members for others, where they are read again from the start, which
fills those too: where engines queue, that doubles the waits. A weight of 1/4 to 1 does nearly as well as 1/2.

`decoding` is never less than all requests less 8: what many ask at once is read quickly, and then is a large batch.

A member reads prompts in the order in which it gets them, so the first byte of one answer says that all prompts before
it are read. No clock in here: `now` is seconds of any clock that only goes on.

Sources: the product of both loads, without a threshold, LMetric, arXiv 2603.15202; its terms here were measured with
`python -m loadtest conversations`. Where an unknown conversation belongs: weighted rendezvous hashing, Schindelhauer
and Schomaker 2005.
"""

import math
import random
from bisect import bisect_right
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from typing import Final, Protocol, TypeVar

from edge.exchange import Choice, Usage
from edge.upstream.balancing import Candidate, rank
from edge.upstream.prefix_index import SLOTS, PrefixIndex
from edge.upstream.prefixes import Prefix

_FIXED_BYTES: Final = 1024  # what any prompt costs: else all short ones would score 0
_BATCH: Final = 8
_TEACHING_BYTES: Final = 1536  # a shorter prompt shows the latency of an engine, not its rate
_RATE_SHARE: Final = 0.1  # of an average: what the newest value counts
_TRUST_SHARE: Final = 0.05
_FOREIGN_SHARE: Final = 0.02
_TRUSTING_BYTES: Final = 2048  # a shorter match may be less than a block of an engine's cache
_DISTRUST: Final = 0.5  # caches that are merely tight show more than that; then doubt makes turns wander
_MANY_FOREIGN: Final = 0.05
_FOREIGN_AT_FIRST: Final = 0.075  # until twenty turns say that there are no other processes
_BEHIND: Final = 0.5  # of the prompts that wait for each member: those that a byte more delays
_AT_HOME: Final = 0.9  # of a prompt that another process may have sent to its home


class Seat:
    """A member as the balance knows it: the prompts that it was given and has not read, and what it had cached.

    `pending` is bytes; `predicted`, `cached` and `prompt` are tokens of answers that said what was cached.
    """

    __slots__ = ("cached", "line", "pending", "predicted", "prefilling", "prompt", "rate", "since", "slot")

    def __init__(self, slot: int) -> None:
        self.slot = slot
        self.pending = 0
        self.prefilling = 0
        self.line: deque[Ticket] = deque()  # in the order in which they were sent; some of them may be read
        self.since = 0.0  # when it began with the first of them
        self.rate = 0.0  # bytes a second, averaged; 0.0: not known
        self.predicted = self.cached = self.prompt = 0

    def backlog(self, now: float) -> float:
        """Return the bytes that it was given and cannot have read yet, of a member that has not read all."""
        return self.pending - min(self.rate * (now - self.since), self.pending / self.prefilling)

    def is_read(self, ticket: "Ticket") -> None:
        """Count a prompt no more."""
        ticket.waits = False
        self.prefilling -= 1
        self.pending -= ticket.new
        while self.line and not self.line[0].waits:
            self.line.popleft()


class Seated(Candidate, Protocol):
    """A member that has a seat, unless its pool has another balance."""

    seat: Seat | None


M = TypeVar("M", bound=Seated)


class Ticket:
    """One prompt at one member, from its choice to its end; `choice` says why it is there.

    `new` is what the member has to read, in bytes, and `waits` whether it may not have yet.
    """

    __slots__ = ("_began", "_entry", "_index", "_matched", "_policy", "_prefix", "_seat", "choice", "new", "waits")

    def __init__(
        self, policy: "CacheAware", seat: Seat, prefix: Prefix, matched: int, new: int, choice: Choice
    ) -> None:
        self._policy = policy
        self._index = policy.index
        self._seat = seat
        self._prefix = prefix
        self._matched = matched
        self._entry = 0
        self._began = False
        self.new = new
        self.choice = choice
        self.waits = False

    def dispatch(self, now: float) -> None:
        """Note that the prompt is sent."""
        seat, prefix = self._seat, self._prefix
        if not seat.prefilling:
            seat.since = now
        seat.line.append(self)
        seat.prefilling += 1
        seat.pending += self.new
        self.waits = True
        if seat.slot < SLOTS:
            marks = (*prefix.digests, prefix.session) if prefix.session else prefix.digests
            self._entry = self._index.put(marks, seat.slot)

    def first_byte(self, now: float, *, streamed: bool) -> None:
        """Note that the answer begins: the prompt is read, and so is every one that was sent there before it.

        One that is not `streamed` begins when all of it is written, which says nothing of how fast a prompt is read.
        """
        self._began = True
        if not self.waits:
            return
        seat = self._seat
        took_s = now - seat.since
        if streamed and self.new > _TEACHING_BYTES and took_s > 0:
            rate = self.new / took_s
            seat.rate += (rate - seat.rate) * (_RATE_SHARE if seat.rate else 1.0)
        while self.waits:
            seat.is_read(seat.line[0])
        seat.since = now

    def end(self, now: float) -> None:
        """Note that it is over, however: a prompt that may not have been read is waited for no more."""
        seat = self._seat
        if self.waits:
            if seat.line[0] is self:
                seat.since = now
            seat.is_read(self)
        if not self._began and self._entry:
            prefix = self._prefix
            marks = prefix.digests[bisect_right(prefix.offsets, self._matched) :]
            if prefix.session and not self._matched:
                marks = (*marks, prefix.session)
            self._index.take_back(marks, self._entry)

    def learn(self, usage: Usage) -> None:
        """Compare what was predicted with what the engine says, where it says it."""
        cached, prompt = usage.cached_tokens, usage.prompt_tokens
        if cached is None or not prompt or not self._prefix.size:
            return
        seat, share = self._seat, self._matched / self._prefix.size
        seat.predicted += round(share * prompt)
        seat.cached += cached
        seat.prompt += prompt
        if self._matched > _TRUSTING_BYTES:
            self._policy.judge(cached / prompt / share)

    def forget(self) -> None:
        """Let nothing be known any more of what the member has cached: it was lost with its process."""
        self._index.forget(self._seat.slot)


class CacheAware:
    """What a pool knows of its members' caches; it outlives a reload that changes other settings of the pool."""

    __slots__ = ("_free", "foreign", "index", "seats", "trust")

    def __init__(self) -> None:
        self.index = PrefixIndex()
        self.seats: dict[object, Seat] = {}  # by what stays of a member
        self.trust = 1.0  # of what is predicted, the part that is there
        self.foreign = _FOREIGN_AT_FIRST  # of turns, those that go on with what is not known here
        self._free: list[int] = []  # slots of members that left

    def seat(self, key: object) -> Seat:
        """Return the seat of a member."""
        seat = self.seats.get(key)
        if seat is None:
            slot = self._free.pop() if self._free else len(self.seats)
            self.index.forget(slot)
            seat = self.seats[key] = Seat(slot)
        return seat

    def keep_only(self, keys: Collection[object]) -> None:
        """Forget members that are no more."""
        for key in [key for key in self.seats if key not in keys]:
            self._free.append(self.seats.pop(key).slot)

    def choose(self, members: Sequence[M], prefix: Prefix, now: float) -> tuple[M, Ticket]:
        """Return the member with the smallest score, any of several such, and the ticket of the prompt there."""
        found = self.index.match(prefix.offsets, prefix.digests)
        home = self._home(members, prefix, found)
        size, trust = prefix.size, self.trust if self.trust < _DISTRUST else 1.0
        waiting = 0
        for member in members:
            waiting += member.seat.prefilling  # type: ignore[union-attr]  # every member of such a pool has a seat
        delays = 1 + _BEHIND * waiting / len(members)
        best: list[tuple[float, M]] = []
        lowest = following = math.inf
        for member in members:
            seat = member.seat
            assert seat is not None  # of every member of a pool with this balance
            there: float = found.get(seat.slot, 0)
            if member is home:
                there = max(there, _AT_HOME * size)
            load, prefilling = member.load, seat.prefilling
            backlog = seat.backlog(now) if prefilling else 0.0
            batch = max(_BATCH, load - prefilling + _BATCH, load)  # other pools may have sent there too
            score = ((size - trust * there) * delays + backlog + _FIXED_BYTES) * batch / member.weight
            if score < lowest:
                lowest, following, best = score, lowest, [(backlog, member)]
            elif score == lowest:
                following = score
                best.append((backlog, member))
            elif score < following:
                following = score
        backlog, member = best[0] if len(best) == 1 else random.choice(best)
        seat = member.seat
        assert seat is not None
        matched = found.get(seat.slot, 0)
        there = trust * matched
        hit = int(100 * there / size) if size else 0
        if member is home and (prefix.previous or prefix.session):  # a first turn is nowhere yet
            there = max(there, _AT_HOME * size)
        next_score = int(following) if len(members) > 1 else None
        choice = Choice(hit, int(backlog), member.load, int(lowest), next_score)
        return member, Ticket(self, seat, prefix, matched, int(size - there), choice)

    @property
    def _expects_others(self) -> bool:
        """Whether so much comes from other processes that a first turn had better go where they would send it."""
        return self.foreign > _MANY_FOREIGN

    def _home(self, members: Sequence[M], prefix: Prefix, found: Mapping[int, int]) -> M | None:
        """Return the member that may have the prompt though nothing is known of it here, as other processes send too.

        It is where the caller's own name for the conversation was sent last, else the one that every process ranks
        first.
        """
        is_foreign = prefix.previous > max(found.values(), default=0)
        self.foreign += _FOREIGN_SHARE * (is_foreign - self.foreign)
        if prefix.previous and not is_foreign:
            return None
        if prefix.session:
            known = self.index.match((1,), (prefix.session,))
            for member in members:
                if member.seat is not None and member.seat.slot in known:
                    return member
        if not is_foreign and (not self._expects_others or prefix.size <= _FIXED_BYTES):
            return None
        return max(members, key=lambda member: rank(member, prefix.home))

    def judge(self, real_share: float) -> None:
        """Take how much was cached of what was predicted."""
        self.trust += _TRUST_SHARE * (min(1.0, real_share) - self.trust)
