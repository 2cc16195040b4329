"""Whose turn it is, by tokens and by shares, and how long the queue takes."""

import heapq
import random
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.upstream.queueing import Demand, DrainRate, FairQueue, Turn


def drained(queue: FairQueue[str]) -> list[str]:
    found = []
    while (turn := queue.pop(0.0)) is not None:
        found.append(turn.item)
    return found


def popped(queue: FairQueue[str], may_go: Callable[[str], bool] = lambda name: True) -> str:
    turn = queue.pop(0.0, may_go)
    assert turn is not None
    return turn.item


def test_items_of_one_user_come_in_their_order() -> None:
    queue: FairQueue[str] = FairQueue()
    for item in "abc":
        queue.push("u-1", item)
    assert drained(queue) == ["a", "b", "c"]


def test_users_of_equal_requests_take_turns() -> None:
    queue: FairQueue[str] = FairQueue()
    for item in ("a1", "a2", "a3"):
        queue.push("a", item)
    for item in ("b1", "b2"):
        queue.push("b", item)
    assert drained(queue) == ["a1", "b1", "a2", "b2", "a3"]


def test_a_newcomer_waits_for_no_more_than_the_turn_that_has_come() -> None:
    """A hundred items of another user, of which some were served, stand in front of nobody."""
    queue: FairQueue[str] = FairQueue()
    for number in range(100):
        queue.push("a", f"a{number}")
    for _ in range(10):
        popped(queue)
    queue.push("b", "b")
    assert "b" in [popped(queue), popped(queue)]


def test_who_was_served_gains_nothing_by_coming_again() -> None:
    queue: FairQueue[str] = FairQueue()
    for user in "ab":
        for number in range(50):
            queue.push(user, f"{user}{number}")
    served = {"a": 0, "b": 0}
    for _ in range(60):
        user = popped(queue)[0]
        served[user] += 1
        queue.push(user, f"{user}again")
    assert served == {"a": 30, "b": 30}


def test_items_that_leave_hold_nobody_up_and_leave_nothing_behind() -> None:
    draw = random.Random(5)
    queue: FairQueue[object] = FairQueue()
    waiting: list[Turn[object]] = []
    for number in range(3000):
        waiting.append(queue.push(f"u-{number % 7}", object()))
        if draw.random() < 0.5:
            queue.remove(waiting.pop(draw.randrange(len(waiting))))
        elif draw.random() < 0.5:
            turn = queue.pop(0.0)
            assert turn is not None
            waiting.remove(turn)
        assert len(queue) == len(waiting)
        assert len(queue._heap) <= 100
    for turn in waiting:
        queue.remove(turn)
        queue.remove(turn)
    assert len(queue) == 0
    assert queue._active == {}


def test_drain_rate_is_the_average_of_late_intervals() -> None:
    drain = DrainRate()
    drain.begin(100.0)
    assert drain.wait_s(4, 102.0) == 8.0  # nothing came free for two seconds
    for now in (101.0, 102.0, 103.0):
        drain.note(now)
    assert drain.wait_s(4, 103.0) == 4.0
    assert drain.wait_s(4, 105.0) == 8.0
    for step in range(1, 41):
        drain.note(103.0 + step / 2)
    assert 2.0 <= drain.wait_s(4, 123.0) < 2.1


def test_who_may_not_go_is_passed_over_and_keeps_the_turn() -> None:
    queue: FairQueue[str] = FairQueue()
    for user, item in (("a", "a1"), ("a", "a2"), ("b", "b1"), ("c", "c1")):
        queue.push(user, item)
    assert popped(queue, lambda user: user != "a") == "b1"
    assert queue.pop(0.0, lambda user: user == "b") is None
    assert popped(queue) == "a1"
    assert drained(queue) == ["c1", "a2"]


@pytest.mark.parametrize("stuck", [[], ["stuck"]])
def test_users_who_ask_again_and_again_do_not_overtake_one_who_waits(stuck: list[str]) -> None:
    """Each of them asks when the other one is served; also while a user in front may not go."""
    queue: FairQueue[str] = FairQueue()
    for user in (*stuck, "x", "y", "many", "many", "many"):
        queue.push(user, user)
    order, before = [], ""
    for _ in range(9):
        order.append(popped(queue, lambda user: user != "stuck"))
        if before in ("x", "y"):
            queue.push(before, before)
        before = order[-1]
    assert order[:3] == ["x", "y", "many"]
    assert {user: order.count(user) for user in order} == {"x": 3, "y": 3, "many": 3}
    assert popped(queue) == (stuck or ["x"])[0]


# --- tokens


def test_turns_come_by_tokens_and_not_by_requests() -> None:
    queue: FairQueue[str] = FairQueue()
    for _ in range(3):
        queue.push("large", "L", Demand(prompt_tokens=1000))
    for _ in range(30):
        queue.push("small", "s", Demand(prompt_tokens=100))
    assert "".join(drained(queue)).startswith("L" + "s" * 10 + "L" + "s" * 10 + "L")


def test_a_share_of_four_gets_four_times_the_tokens() -> None:
    queue: FairQueue[str] = FairQueue()
    for _ in range(100):
        queue.push("a", "a", Demand(prompt_tokens=500, share=4))
        queue.push("b", "b", Demand(prompt_tokens=500))
    first = [popped(queue) for _ in range(50)]
    assert (first.count("a"), first.count("b")) == (40, 10)


def test_an_answer_is_expected_to_take_what_the_latest_ones_did_and_no_more_than_it_may() -> None:
    queue: FairQueue[str] = FairQueue()
    for _ in range(4):
        queue.push("u", "x", Demand(1000, 2))
    queue.push("u", "x", Demand(1000, 1, max_tokens=10))
    first, second = queue.pop(0.0), queue.pop(0.0)
    assert first is not None
    assert second is not None
    assert first.charged == 1000 + 2 * 256
    first.settle(500, 800, complete=True)
    third = queue.pop(0.0)
    assert third is not None
    assert third.charged == 500 + 2 * 400  # a prompt is half of what was estimated
    second.settle(1000, 4000, complete=True)
    fourth, fifth = queue.pop(0.0), queue.pop(0.0)
    assert fourth is not None
    assert fifth is not None
    assert fourth.charged == 625 + 2 * 800
    assert fifth.charged == 625 + 10


def test_what_was_charged_too_much_is_given_back_at_once() -> None:
    queue: FairQueue[str] = FairQueue()
    for item in ("a1", "a2"):
        queue.push("a", item, Demand(1000))
    for number in range(9):
        queue.push("b", f"b{number}", Demand(100))
    first = queue.pop(0.0)
    assert first is not None
    assert popped(queue) == "b0"
    first.cancel()
    assert popped(queue) == "a2"


@pytest.mark.parametrize("refusal", [0, 3])
def test_a_request_that_fails_at_once_costs_its_place_all_the_same(refusal: int) -> None:
    """Else a user whose requests are all refused would be the next for ever."""
    queue: FairQueue[str] = FairQueue()
    for _ in range(40):
        queue.push("a", "a", Demand(100))
        queue.push("b", "b", Demand(100))
    served = []
    for _ in range(40):
        turn = queue.pop(0.0)
        assert turn is not None
        served.append(turn.item)
        if turn.item == "a":
            turn.settle(refusal, 0, complete=False)
    assert 10 < served.count("b") < 20


def test_an_answer_that_does_not_say_what_it_used_stays_as_it_was_charged() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.push("a", "a", Demand(1000, 1))
    turn = queue.pop(0.0)
    assert turn is not None
    turn.settle(0, 0, complete=True)
    assert turn.charged == 1256


def test_who_was_idle_has_no_credit_for_it_and_who_was_refunded_none_for_before() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.push("late", "l", Demand(100, 4))
    early = queue.pop(0.0)
    assert early is not None
    for _ in range(100):
        queue.push("busy", "b", Demand(100))
    for _ in range(50):
        popped(queue)
    for _ in range(50):
        queue.push("late", "l", Demand(100))
    early.settle(100, 0, complete=True)
    assert sorted(popped(queue) for _ in range(10)) == ["b"] * 5 + ["l"] * 5


def test_a_debt_is_over_after_a_minute_of_what_others_are_given() -> None:
    """Else one answer of a million tokens would starve its user for hours."""
    queue: FairQueue[str] = FairQueue()
    now = 0.0
    for _ in range(2000):
        queue.push("others", "o", Demand(100))
        queue.push("debtor", "d", Demand(100))
    turns = []
    for _ in range(20):
        now += 1.0
        turn = queue.pop(now)
        assert turn is not None
        turns.append(turn)
    for turn in turns:
        if turn.item == "d":
            turn.settle(1_000, 0, complete=True)
    waited = 0
    while (turn := queue.pop(now)) is not None and turn.item != "d":
        now += 1.0
        waited += 1
    assert 20 <= waited <= 60  # and not 90, as they took 9,000 more
    assert len(turns) == 20


def test_while_nobody_waits_all_are_equal_again() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.push("a", "a", Demand(10**6))
    popped(queue)
    for user in "ab":
        queue.push(user, user, Demand(100))
    assert drained(queue) == ["a", "b"]


def test_answer_that_ends_while_nobody_waits_leaves_no_debt() -> None:
    """It ran on after the queue was empty, so it held nobody up."""
    queue: FairQueue[str] = FairQueue()
    queue.push("a", "a", Demand(100, 1))
    turn = queue.pop(0.0)
    assert turn is not None
    turn.settle(100, 60_000, complete=True)
    for number in range(50):
        queue.push("b", "b", Demand(100, 1, 100))
        if number == 0:
            queue.push("a", "a", Demand(100, 1, 100))
    assert "a" in drained(queue)[:2]


def test_users_who_are_gone_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge.upstream.queueing._MOST_KNOWN", 50)
    queue: FairQueue[str] = FairQueue()
    queue.push("stays", "x")
    queue.push("stays", "y", Demand(10**9))
    for number in range(1000):
        queue.push(f"u-{number}", "x", Demand(100))
        popped(queue)
    assert len(queue._idle) + len(queue._active) <= 52
    assert len(queue._heap) <= 200


# --- a pool of places, in virtual time


@dataclass
class Asking:
    """A user with so many requests at any time, each of `tokens` of which `declared` are known before."""

    name: str
    tokens: int
    at_once: int
    declared: int
    given: float = 0.0
    waits_s: list[float] = field(default_factory=list)


LARGE, SMALL, SERVICE_S, TOKENS_PER_S = 30_000, 100, 0.2, 2_000


def simulate(users: list[Asking], places: int, until_s: float) -> Iterator[tuple[float, dict[str, float]]]:
    """Yield the time, and the tokens that each user was given by then, whenever a place is given."""
    queue: FairQueue[tuple[Asking, float]] = FairQueue()
    running: list[tuple[float, int, Turn[tuple[Asking, float]]]] = []
    now, number = 0.0, 0
    for user in users:
        for _ in range(user.at_once):
            queue.push(user.name, (user, now), Demand(user.declared))
    while now < until_s:
        while len(running) < places and (turn := queue.pop(now)) is not None:
            user, asked_at = turn.item
            number += 1
            heapq.heappush(running, (now + SERVICE_S + user.tokens / TOKENS_PER_S, number, turn))
            user.given += user.tokens
            user.waits_s.append(now - asked_at)
            queue.push(user.name, (user, now), Demand(user.declared))
            yield now, {each.name: each.given for each in users}
        now, _, turn = heapq.heappop(running)
        turn.settle(turn.item[0].tokens, 0, complete=True)


def p95(values: list[float]) -> float:
    return sorted(values)[int(len(values) * 0.95)]


@pytest.mark.parametrize("declared", [LARGE, LARGE // 10, 4 * LARGE])
def test_forty_long_prompts_do_not_starve_short_ones(declared: int) -> None:
    """Also when their tokens are known only afterwards: from then on, that is, once the first of them has ended."""
    large = Asking("large", LARGE, 40, declared)
    small = Asking("small", SMALL, 40, SMALL)
    service_s = SERVICE_S + LARGE / TOKENS_PER_S
    seen: deque[tuple[float, float, float]] = deque()
    known_at = 0.0 if declared == LARGE else 3 * 60.0
    differences: list[float] = []
    difference: list[float] = []
    shares = []
    for now, given_ in simulate([large, small], 8, 1200.0):
        differences.append(given_["large"] - given_["small"])
        if now >= known_at:
            difference.append(differences[-1])
        seen.append((now, given_["large"], given_["small"]))
        while seen and seen[0][0] < now - 600.0:
            then = seen.popleft()
            shares.append((given_["large"] - then[1]) / (given_["small"] - then[2]))
    assert max(difference) - min(difference) <= 2 * LARGE
    assert max(differences) - min(differences) <= 8 * LARGE  # the places there are, at the beginning
    assert max(shares) <= 1.2
    assert min(shares) >= 1 / 1.2
    assert p95(small.waits_s) < service_s


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 5000), st.integers(1, 8), st.integers(1, 4)), min_size=2, max_size=6),
    st.integers(0, 2**32),
)
def test_what_users_who_wait_were_given_never_differs_by_more_than_twice_the_largest(
    users: list[tuple[int, int, int]], seed: int
) -> None:
    draw = random.Random(seed)
    queue: FairQueue[int] = FairQueue()
    given_ = [0.0] * len(users)
    largest = max(max(tokens, 64) / share for tokens, _, share in users)
    for user, (tokens, at_once, share) in enumerate(users):
        for _ in range(at_once):
            queue.push(str(user), user, Demand(draw.randint(1, tokens), share=share))
    for _ in range(300):
        turn = queue.pop(0.0)
        assert turn is not None
        user = turn.item
        given_[user] += turn.charged / users[user][2]
        queue.push(str(user), user, Demand(draw.randint(1, users[user][0]), share=users[user][2]))
        assert max(given_) - min(given_) <= 2 * largest


def test_a_turn_costs_little_however_many_users_wait() -> None:
    """The heap and the removal from it: with 20,000 users, some microseconds each."""
    queue: FairQueue[int] = FairQueue()
    turns = [queue.push(f"u-{number}", number, Demand(100)) for number in range(20_000)]
    begun = time.thread_time()
    for number in range(300):
        turn = queue.pop(0.0)
        assert turn is not None
        turn.settle(50, 0, complete=True)
        queue.push(turn.user.name, number, Demand(100))
        queue.remove(turns[-1 - number])
    assert time.thread_time() - begun < 0.15  # a queue that is looked through takes ten times as long
