"""How long a request waits for its limits, and in which order."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import pytest

from edge.config.settings import LimitConfig
from edge.errors import RateLimited, Unauthenticated
from edge.limits import lines as lines_module
from edge.limits.admission import Admission
from edge.limits.lines import NO_PATIENCE, Lines, Patience, patience_of


@dataclass
class Room:
    most: int = 9
    held: int = 0

    @property
    def has_room_to_wait(self) -> bool:
        return self.held < self.most


@pytest.mark.parametrize(
    ("limits", "prefer", "wait_s", "applied"),
    [
        ([], [], 0, ""),
        ([20.0], [], 20, ""),
        ([20.0, None, 5.0], [], 5, ""),
        ([], ["wait=20"], 20, "wait=20"),
        ([], ['respond-async, Wait = "20"; x=y'], 20, "wait=20"),
        ([], ["respond-async", "wait=7,wait=9"], 7, "wait=7"),
        ([], ["wait=3600"], 60, "wait=60"),
        ([90.0], ["wait=3600"], 90, "wait=90"),
        ([20.0], ["wait=0"], 0, "wait=0"),
        ([20.0, 0.0], ["wait=9"], 0, ""),
        ([], ["wait=-1", "wait", "wait=soon", "await=1", "wait=٣"], 0, ""),
    ],
)
def test_patience_is_the_clients_within_what_the_limits_say(
    limits: list[float | None], prefer: list[str], wait_s: float, applied: str
) -> None:
    found = patience_of(Room(), limits, prefer)
    assert (found.wait_s, found.applied) == (wait_s, applied)
    assert found.header == (f"preference-applied: {applied}\r\n".encode() if applied else b"")


def refusal(wait_s: float) -> RateLimited:
    error = RateLimited("full", retry_after_s=1)
    error.wait_s = wait_s
    return error


class Limit:
    """A limit with so much room, of which a test says when there is more."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.wait_s = 0.0
        self.admitted: list[str] = []

    def admit(self, name: str) -> str:
        if not self.room:
            raise refusal(self.wait_s)
        self.room -= 1
        self.admitted.append(name)
        return name


async def fine() -> None:
    """The key is good still."""


async def begin(
    lines: Lines,
    whose: str,
    patience: Patience,
    admit: Callable[[], str],
    check: Callable[[], Awaitable[None]] = fine,
) -> str:
    """Let a request begin as the proxy does, at once or after its wait."""
    return lines.admit(whose, patience, admit) or await lines.wait(whose, patience, admit, check)


async def test_those_who_wait_are_let_in_in_their_order_and_none_overtakes_them() -> None:
    lines, room, limit = Lines(), Room(), Limit(1)
    patience = Patience(room, 30.0)
    assert await begin(lines, "u", patience, lambda: limit.admit("first")) == "first"
    loop = asyncio.get_running_loop()
    tasks = [loop.create_task(begin(lines, "u", patience, lambda name=name: limit.admit(name))) for name in "abc"]  # type: ignore[misc]
    await asyncio.sleep(0)
    assert room.held == 3
    limit.room = 2
    tasks.append(loop.create_task(begin(lines, "u", patience, lambda: limit.admit("late"))))
    await asyncio.wait(tasks[:2])
    tasks[2].cancel()  # its client left
    limit.room = 1
    assert await tasks[3] == "late"
    assert limit.admitted == ["first", "a", "b", "late"]
    assert (room.held, lines._lines) == (0, {})


async def test_who_would_wait_for_too_long_or_finds_no_room_is_refused_at_once() -> None:
    lines, limit = Lines(), Limit(0)
    limit.wait_s = 21.0
    with pytest.raises(RateLimited) as caught:
        await begin(lines, "u", Patience(Room(), 20.0, "wait=20"), lambda: limit.admit("x"))
    assert caught.value.headers == (("preference-applied", "wait=20"),)
    limit.wait_s = 1.0
    with pytest.raises(RateLimited) as caught:
        await begin(lines, "u", Patience(Room(most=0), 20.0), lambda: limit.admit("x"))
    assert caught.value.headers == ()
    limit.wait_s = 0.0
    with pytest.raises(RateLimited):
        await begin(lines, "u", Patience(Room(), 0.01), lambda: limit.admit("x"))
    assert lines._lines == {}
    with pytest.raises(RateLimited):
        await begin(lines, "u", NO_PATIENCE, lambda: limit.admit("x"))


async def test_whoever_comes_when_the_room_is_full_of_those_who_wait_may_go_if_the_limit_has_room() -> None:
    lines, room, limit = Lines(), Room(most=1), Limit(0)
    patience = Patience(room, 30.0)
    waiting = asyncio.get_running_loop().create_task(begin(lines, "u", patience, lambda: limit.admit("a")))
    await asyncio.sleep(0)
    with pytest.raises(RateLimited):
        await begin(lines, "u", patience, lambda: limit.admit("b"))
    with pytest.raises(RateLimited):
        await begin(lines, "other", patience, lambda: limit.admit("c"))
    limit.room = 1
    assert await waiting == "a"
    assert room.held == 0


async def test_key_that_is_revoked_while_its_request_waits_lets_it_not_in() -> None:
    lines, room, limit = Lines(), Room(), Limit(0)
    checked: list[str] = []

    async def revoked() -> None:
        checked.append("x")
        if limit.room:
            raise Unauthenticated("unknown")

    waiting = asyncio.get_running_loop().create_task(
        begin(lines, "u", Patience(room, 30.0), lambda: limit.admit("x"), revoked)
    )
    while not checked:
        await asyncio.sleep(0)
    limit.room = 1
    with pytest.raises(Unauthenticated):
        await waiting
    assert (limit.room, limit.admitted, room.held, lines._lines) == (1, [], 0, {})


async def test_last_try_at_the_end_of_the_time_asks_for_the_key_too() -> None:
    lines, limit = Lines(), Limit(0)
    limit.wait_s = 0.0

    async def revoked_in_the_end() -> None:
        if asyncio.get_running_loop().time() >= until:
            limit.room = 1
            raise Unauthenticated("unknown")

    until = asyncio.get_running_loop().time() + 0.03 - 0.002  # timers of the loop are of whole milliseconds
    with pytest.raises(Unauthenticated):
        await begin(lines, "u", Patience(Room(), 0.03), lambda: limit.admit("x"), revoked_in_the_end)
    assert limit.admitted == []


async def test_who_waits_for_a_running_request_looks_often_and_to_the_end_of_its_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nobody knows when that one ends: the guess that callers are told is no reason to give up."""
    slept: list[float] = []
    real = asyncio.sleep

    async def sleep(delay: float) -> None:
        slept.append(delay)
        if len(slept) == 2:
            running.charge(0)
        await real(0)

    admission = Admission({"one": LimitConfig("one", concurrent_requests=1)}, lambda: 1e9)
    running = admission.admit("r", ("one",), "u", "k", 0)
    lines, patience = Lines(), Patience(Room(), 0.4)
    assert lines.admit("u", patience, lambda: admission.admit("r", ("one",), "u", "k", 0)) is None
    monkeypatch.setattr(lines_module.asyncio, "sleep", sleep)
    permit = await lines.wait("u", patience, lambda: admission.admit("r", ("one",), "u", "k", 0), fine)
    assert slept == [0.05, 0.05]
    permit.charge(0)
