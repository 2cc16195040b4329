"""Whose turn it is, and how long the queue takes."""

import random

import pytest

from edge.upstream.queueing import DrainRate, FairQueue


def drained(queue: FairQueue[str]) -> list[str]:
    return [queue.pop() for _ in range(len(queue))]


def test_items_of_one_user_come_in_their_order() -> None:
    queue: FairQueue[str] = FairQueue()
    for item in "abc":
        queue.push("u-1", item)
    assert drained(queue) == ["a", "b", "c"]


def test_users_take_turns() -> None:
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
        queue.pop()
    queue.push("b", "b")
    assert "b" in [queue.pop(), queue.pop()]


def test_who_was_served_gains_nothing_by_coming_again() -> None:
    queue: FairQueue[str] = FairQueue()
    for user in "ab":
        for number in range(50):
            queue.push(user, f"{user}{number}")
    served = {"a": 0, "b": 0}
    for _ in range(60):
        user = queue.pop()[0]
        served[user] += 1
        queue.push(user, f"{user}again")
    assert served == {"a": 30, "b": 30}


def test_items_that_leave_hold_nobody_up_and_leave_nothing_behind() -> None:
    draw = random.Random(5)
    queue: FairQueue[object] = FairQueue()
    waiting = []
    for number in range(300):
        item = object()
        queue.push(f"u-{number % 7}", item)
        waiting.append(item)
        if draw.random() < 0.5:
            queue.remove(waiting.pop(draw.randrange(len(waiting))))
        elif draw.random() < 0.5:
            waiting.remove(queue.pop())
        assert len(queue) == len(waiting)
    for item in waiting:
        queue.remove(item)
        queue.remove(item)
    assert len(queue) == 0
    assert queue._next_turn == {}


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
    assert queue.pop_for(lambda user: user != "a") == "b1"
    assert queue.pop_for(lambda user: user == "b") is None
    assert queue.pop_for(lambda user: True) == "a1"
    assert drained(queue) == ["c1", "a2"]


@pytest.mark.parametrize("stuck", [[], ["stuck"]])
def test_users_who_ask_again_and_again_do_not_overtake_one_who_waits(stuck: list[str]) -> None:
    """Each of them asks when the other one is served; also while a user in front may not go."""
    queue: FairQueue[str] = FairQueue()
    for user in (*stuck, "x", "y", "many", "many", "many"):
        queue.push(user, user)
    order, before = [], ""
    for _ in range(9):
        order.append(queue.pop_for(lambda user: user != "stuck"))
        if before in ("x", "y"):
            queue.push(before, before)
        before = order[-1] or ""
    assert order == ["x", "y", "many", "many", "x", "y", "many", "x", "y"]
    assert queue.pop_for(lambda user: True) == (stuck or ["x"])[0]
