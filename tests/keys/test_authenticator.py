"""Who calls: the cache between requests and the store, and what a store that is down or flooded changes."""

import asyncio
import contextlib
import gc
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.config.process_settings import KeysConfig
from edge.config.values import KeyStoreAddress
from edge.errors import EdgeError, OutOfQuota
from edge.exchange import Credential, Principal
from edge.keys.authenticator import Authenticator
from edge.keys.breaker import FAILURES_TO_OPEN
from edge.keys.stores.protocol import (
    AnswerUnusable,
    Invalidation,
    StoreFailed,
    TokenPrincipal,
    UserState,
    hash_key,
    ignore,
)
from edge.keys.tokens import TokenRefused

ME = "u-1100a15812cc"
KEY = "sk-" + "k" * 45
OTHER_KEY = "sk-" + "o" * 45


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class FakeStore:
    """A key store that answers what `keys` says when its gate is open."""

    knows_users = True

    def __init__(self) -> None:
        self.on_change: Callable[[Invalidation], object] = ignore
        self.on_outage: Callable[[str], object] = ignore
        self.users: dict[str, UserState] = {}
        self.keys: dict[bytes, Principal] = {}
        self.asked: list[bytes] = []
        self.down = False
        self.unusable: set[str] = set()  # keys of which the answer makes no sense
        self.defect: Exception | None = None
        self.gate = asyncio.Event()
        self.gate.set()
        self.before_answer: Callable[[], Awaitable[None] | None] = lambda: None

    async def open(self) -> None: ...

    def reconfigure(self, config: KeysConfig) -> None: ...

    async def close(self) -> None: ...

    async def look_up_user(self, user: str) -> UserState:
        if self.down:
            raise StoreFailed("down")
        return self.users.get(user, UserState())

    async def look_up(self, digest: bytes, key: str) -> Principal | None:
        self.asked.append(digest)
        down, answer = self.down, self.keys.get(digest)  # what the store knew when it was asked
        await self.gate.wait()
        if (waiting := self.before_answer()) is not None:
            await waiting
        if self.defect is not None:
            raise self.defect
        if key in self.unusable:
            raise AnswerUnusable("rubbish")
        if down:
            raise StoreFailed("down")
        return answer

    def put(self, key: str = KEY, **facts: Any) -> None:
        self.keys[hash_key(key)] = Principal(**{"id": "key_1", "user": ME, **facts})

    def drop(self, key: str = KEY) -> None:
        self.keys.pop(hash_key(key), None)
        self.on_change(Invalidation(frozenset({hash_key(key)})))


class Scene:
    def __init__(self, **times: float) -> None:
        self.store, self.clock, self.wall = FakeStore(), Clock(), Clock()
        config = KeysConfig(
            KeyStoreAddress(Path("keys.db")), **{"cache_ttl_s": 10, "negative_ttl_s": 2, "stale_for_s": 600, **times}
        )  # type: ignore[arg-type]
        self.auth = Authenticator(config, self.store, self.clock, self.wall)
        self.store.put()

    async def ask(self, key: str = KEY) -> int:
        """Return 200, or the status of the refusal."""
        try:
            credential = Credential("", key, hash_key(key))
            found = self.auth.recall(credential) or await self.auth.look_up(credential)
            found.check_state(self.wall())
        except EdgeError as error:
            return error.status
        assert found.principal.user == ME
        return 200

    async def waiters(self, count: int) -> list["asyncio.Task[int]"]:
        """Return requests that all wait for one look-up."""
        self.store.gate.clear()
        tasks = [asyncio.get_running_loop().create_task(self.ask()) for _ in range(count)]
        while not self.store.asked:
            await asyncio.sleep(0)
        return tasks


async def test_known_key_is_asked_of_the_store_once_until_it_is_old() -> None:
    scene = Scene()
    for _ in range(3):
        assert await scene.ask() == 200
    assert len(scene.store.asked) == 1
    scene.clock.now += 10.1
    assert await scene.ask() == 200
    assert len(scene.store.asked) == 2


async def test_unknown_key_is_asked_of_the_store_once_until_it_is_old() -> None:
    scene = Scene()
    for _ in range(3):
        assert await scene.ask(OTHER_KEY) == 401
    assert len(scene.store.asked) == 1
    scene.clock.now += 2.1
    assert await scene.ask(OTHER_KEY) == 401
    assert len(scene.store.asked) == 2


async def test_only_the_digest_leaves_the_request() -> None:
    """Neither the store nor the cache ever sees a key."""
    scene = Scene()
    await scene.ask()
    await scene.ask(OTHER_KEY)
    assert scene.store.asked == [hash_key(KEY), hash_key(OTHER_KEY)]
    assert KEY not in repr(vars(scene.auth._known)) + repr(scene.auth._known._cache)


async def test_a_thousand_requests_wait_for_one_look_up() -> None:
    scene = Scene()
    tasks = await scene.waiters(1000)
    scene.store.gate.set()
    assert await asyncio.gather(*tasks) == [200] * 1000
    assert len(scene.store.asked) == 1
    assert scene.auth._look_ups == {}


@pytest.mark.parametrize("leaving", [slice(0, 1), slice(1, 2), slice(0, 9)], ids=["first", "second", "all but one"])
async def test_request_that_leaves_takes_nobody_with_it(leaving: slice) -> None:
    scene = Scene()
    tasks = await scene.waiters(10)
    for task in tasks[leaving]:
        task.cancel()
    await asyncio.gather(*tasks[leaving], return_exceptions=True)
    scene.store.gate.set()
    stayed = [task for task in tasks if not task.cancelled()]
    assert await asyncio.gather(*stayed) == [200] * len(stayed)
    assert len(scene.store.asked) == 1


async def test_look_up_that_everybody_left_is_still_kept_and_its_failure_is_nobodys() -> None:
    """A failure without a listener must not be reported as an error that was never retrieved."""
    scene = Scene()
    unheard: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: unheard.append(context))
    for down in (False, True):
        scene.store.down = down
        scene.store.asked.clear()
        scene.auth.forget(Invalidation(everything=True))
        tasks = await scene.waiters(3)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        scene.store.gate.set()
        while scene.auth._look_ups:
            await asyncio.sleep(0)
        assert len(scene.auth._known) == 1
    gc.collect()
    assert unheard == []


async def test_store_that_is_down_is_503_never_401_and_is_not_remembered() -> None:
    scene = Scene()
    scene.store.down = True
    assert await scene.ask() == 503
    assert await scene.ask(OTHER_KEY) == 503
    scene.store.down = False
    assert await scene.ask() == 200
    assert await scene.ask(OTHER_KEY) == 401


async def test_known_key_goes_on_while_the_store_is_down_for_so_long() -> None:
    scene = Scene()
    assert await scene.ask() == 200
    scene.store.down = True
    scene.clock.now += 10.1
    assert await scene.ask() == 200
    scene.clock.now += 599
    assert await scene.ask() == 200
    scene.clock.now += 2
    assert await scene.ask() == 503
    scene.store.down = False
    scene.clock.now += 1
    assert await scene.ask() == 200


async def test_key_that_expires_while_the_store_is_down_is_out() -> None:
    scene = Scene()
    scene.store.put(expires_at=scene.wall.now + 20)
    assert await scene.ask() == 200
    scene.store.down = True
    scene.clock.now += 11
    scene.wall.now += 11
    assert await scene.ask() == 200
    scene.wall.now += 20
    assert await scene.ask() == 401


async def test_unknown_key_is_503_while_the_store_is_down_even_if_it_was_unknown_before() -> None:
    """What was unknown may have been created since; nobody can say."""
    scene = Scene()
    assert await scene.ask(OTHER_KEY) == 401
    scene.store.down = True
    scene.clock.now += 2.1
    assert await scene.ask(OTHER_KEY) == 503


async def test_no_stale_answer_after_a_revocation() -> None:
    scene = Scene()
    assert await scene.ask() == 200
    scene.store.drop()
    scene.store.down = True
    assert await scene.ask() == 503


async def test_revocation_while_the_store_is_asked_and_fails_leaves_no_stale_answer() -> None:
    scene = Scene()
    assert await scene.ask() == 200
    scene.clock.now += 10.1
    scene.store.down = True
    scene.store.asked.clear()
    [task] = await scene.waiters(1)
    scene.store.drop()
    scene.store.gate.set()
    assert await task == 503


@pytest.mark.parametrize("everything", [False, True])
async def test_revocation_during_a_look_up_asks_again(everything: bool) -> None:
    """An answer that began before a revocation arrived is neither kept nor believed; wherever between the two it is."""
    for turns in range(8):
        scene = Scene()
        pending = turns

        async def wait_then_revoke(scene: Scene = scene) -> None:
            nonlocal pending
            while pending > 0:
                pending -= 1
                await asyncio.sleep(0)
            if scene.store.keys:
                scene.store.keys.clear()
                digests = frozenset() if everything else frozenset({hash_key(KEY)})
                scene.store.on_change(Invalidation(digests, everything=everything))
            await asyncio.sleep(0)

        scene.store.before_answer = wait_then_revoke
        tasks = await scene.waiters(5)
        scene.store.gate.set()
        assert await asyncio.gather(*tasks) == [401] * 5
        assert len(scene.store.asked) == 2
        assert len(scene.auth._known) == 0
        assert await scene.ask() == 401


@given(st.lists(st.sampled_from(["ask", "revoke", "create", "turn"]), min_size=4, max_size=30))
def test_no_order_of_look_ups_and_changes_keeps_an_old_answer(steps: list[str]) -> None:
    """Once a change has been reported and nothing is in flight, the cache says what the store says."""

    async def play() -> None:
        scene = Scene()

        async def pause() -> None:
            await asyncio.sleep(0)

        scene.store.before_answer = pause
        tasks = []
        for step in steps:
            match step:
                case "ask":
                    tasks.append(asyncio.get_running_loop().create_task(scene.ask()))
                case "revoke":
                    scene.store.drop()
                case "create":
                    scene.store.put()
                    scene.store.on_change(Invalidation(frozenset({hash_key(KEY)})))
                case "turn":
                    await asyncio.sleep(0)
        assert set(await asyncio.gather(*tasks)) <= {200, 401}
        assert await scene.ask() == (200 if scene.store.keys else 401)

    asyncio.run(play())


async def test_new_key_works_at_once_although_it_was_known_to_be_unknown() -> None:
    scene = Scene()
    assert await scene.ask(OTHER_KEY) == 401
    scene.store.put(OTHER_KEY)
    scene.store.on_change(Invalidation(frozenset({hash_key(OTHER_KEY)})))
    assert await scene.ask(OTHER_KEY) == 200


async def test_change_forgets_only_what_it_names() -> None:
    scene = Scene()
    scene.store.put(OTHER_KEY)
    assert [await scene.ask(), await scene.ask(OTHER_KEY)] == [200, 200]
    scene.store.drop(OTHER_KEY)
    assert [await scene.ask(), await scene.ask(OTHER_KEY)] == [200, 401]
    assert len(scene.store.asked) == 3
    scene.store.on_change(Invalidation(everything=True))
    assert await scene.ask() == 200
    assert len(scene.store.asked) == 4


@pytest.mark.parametrize(
    ("facts", "status"),
    [
        ({"enabled": False}, 401),
        ({"suspended": True}, 401),
        ({"expires_at": 1000.0}, 401),
        ({"expires_at": 999.0}, 401),
        ({"expires_at": 1000.5}, 200),
        ({"out_of_quota": True}, 402),
        ({"out_of_quota": True, "enabled": False}, 401),
        ({"out_of_quota": True, "expires_at": 1.0}, 401),
        ({}, 200),
    ],
)
async def test_state_of_a_key_is_judged_from_the_cache_too(facts: dict[str, Any], status: int) -> None:
    scene = Scene()
    scene.store.put(**facts)
    assert [await scene.ask(), await scene.ask()] == [status, status]
    assert len(scene.store.asked) == 1


async def test_key_expires_while_it_is_cached() -> None:
    scene = Scene()
    scene.store.put(expires_at=scene.wall.now + 5)
    assert await scene.ask() == 200
    scene.wall.now += 5
    assert await scene.ask() == 401


async def test_reload_changes_the_bound_of_the_cache() -> None:
    scene = Scene(cache_entries=50)
    scene.auth.reconfigure(replace(scene.auth._config, cache_entries=5))
    for number in range(20):
        assert await scene.ask(f"bad-key-{number}") == 401
    assert len(scene.auth._unknown) == 5


async def test_bad_key_is_refused_without_a_look_up_when_it_comes_again() -> None:
    scene = Scene()
    assert await scene.ask(OTHER_KEY) == 401
    assert len(scene.store.asked) == 1
    assert await scene.ask(OTHER_KEY) == 401
    assert len(scene.store.asked) == 1
    assert scene.auth.counts.negative_hits == 1


async def test_flood_of_bad_keys_neither_grows_the_cache_nor_drives_out_good_ones() -> None:
    scene = Scene(cache_entries=50)
    assert await scene.ask() == 200
    for number in range(500):
        assert await scene.ask(f"bad-key-{number}") == 401
    assert len(scene.auth._unknown) == 50
    asked = len(scene.store.asked)
    assert await scene.ask() == 200
    assert len(scene.store.asked) == asked


async def test_flood_of_different_keys_at_once_is_bounded_and_is_no_401() -> None:
    scene = Scene()
    scene.store.gate.clear()
    tasks = [asyncio.get_running_loop().create_task(scene.ask(f"bad-key-{number}")) for number in range(1500)]
    while sum(task.done() for task in tasks) < 500:
        await asyncio.sleep(0)
    assert len(scene.store.asked) <= 1000
    scene.store.gate.set()
    statuses = await asyncio.gather(*tasks)
    assert (statuses.count(401), statuses.count(503)) == (1000, 500)


async def test_reload_changes_the_times_of_later_look_ups() -> None:
    scene = Scene()
    assert await scene.ask() == 200
    scene.auth.reconfigure(replace(scene.auth._config, cache_ttl_s=1))
    scene.clock.now += 5
    assert await scene.ask() == 200
    assert len(scene.store.asked) == 1
    scene.store.on_change(Invalidation(everything=True))
    assert await scene.ask() == 200
    scene.clock.now += 1.1
    assert await scene.ask() == 200
    assert len(scene.store.asked) == 3


async def test_close_ends_the_look_ups_that_run() -> None:
    scene = Scene()
    tasks = await scene.waiters(2)
    await scene.auth.close()
    assert all(isinstance(each, BaseException) for each in await asyncio.gather(*tasks, return_exceptions=True))


async def test_out_of_quota_and_unknown_are_told_apart() -> None:
    scene = Scene()
    scene.store.put(out_of_quota=True)
    caller = await scene.auth.look_up(Credential("", KEY, hash_key(KEY)))
    with pytest.raises(OutOfQuota):
        caller.check_state(scene.wall())


# --- ahead of need, and while the store is down


async def settled(scene: Scene) -> None:
    while scene.auth._look_ups:
        await asyncio.sleep(0)


async def test_key_in_use_is_looked_up_again_before_its_answer_is_old() -> None:
    """Nobody waits for it; a key that nobody uses is not asked for."""
    scene = Scene()
    assert await scene.ask() == 200
    scene.clock.now += 7.9
    assert await scene.ask() == 200
    assert len(scene.store.asked) == 1
    scene.clock.now += 0.2
    scene.store.gate.clear()
    assert [await scene.ask() for _ in range(5)] == [200] * 5
    scene.store.gate.set()
    await settled(scene)
    assert len(scene.store.asked) == 2
    scene.clock.now += 7.9
    assert await scene.ask() == 200
    assert len(scene.store.asked) == 2


async def test_what_the_early_look_up_finds_holds_at_once() -> None:
    scene = Scene()
    assert await scene.ask() == 200
    scene.clock.now += 9
    scene.store.keys.clear()
    assert await scene.ask() == 200
    await settled(scene)
    assert await scene.ask() == 401


async def test_dead_store_is_asked_by_one_now_and_then() -> None:
    """Three failures, then nothing but a try after each pause; known keys do not even wait for that."""
    scene = Scene()
    assert await scene.ask() == 200
    scene.clock.now += 10.1
    scene.store.down = True
    scene.store.asked.clear()
    assert [await scene.ask() for _ in range(200)] == [200] * 200
    assert [await scene.ask(f"sk-unknown-{n}") for n in range(200)] == [503] * 200
    assert len(scene.store.asked) == FAILURES_TO_OPEN
    for _ in range(2):
        scene.clock.now += 20
        assert [await scene.ask() for _ in range(50)] == [200] * 50
        await settled(scene)
    assert len(scene.store.asked) == FAILURES_TO_OPEN + 2
    scene.clock.now += 20
    scene.store.down = False
    assert await scene.ask() == 200
    await settled(scene)
    assert await scene.ask(OTHER_KEY) == 401
    assert not scene.auth._breaker.is_open


async def test_outage_is_logged_once_on_each_side(caplog: pytest.LogCaptureFixture) -> None:
    scene = Scene()
    await scene.ask()
    for _ in range(2):
        scene.store.down = True
        scene.clock.now += 20
        for _ in range(20):
            await scene.ask(OTHER_KEY)
        scene.store.down = False
        scene.clock.now += 20
        for _ in range(20):
            await scene.ask(OTHER_KEY)
    assert [record.levelname for record in caplog.records] == ["ERROR", "WARNING"] * 2
    assert "down" in caplog.records[0].getMessage()


async def test_store_that_tells_of_its_outage_is_logged_once_with_its_look_ups(
    caplog: pytest.LogCaptureFixture,
) -> None:
    scene = Scene()
    scene.store.on_outage("the file is gone")
    scene.store.down = True
    assert [await scene.ask() for _ in range(9)] == [503] * 9
    scene.store.down = False
    scene.store.on_outage("")
    assert await scene.ask() == 200, "who is back is asked at once"
    assert [record.getMessage() for record in caplog.records] == [
        "key store is unavailable: the file is gone",
        "key store answers again",
    ]


async def test_slow_store_counts_as_down() -> None:
    """Known keys go on, unknown ones are told to come back, and nobody waits longer than the store is given."""
    scene = Scene(store_timeout_s=0.01)
    assert await scene.ask() == 200
    scene.clock.now += 10.1
    scene.store.gate.clear()
    assert await scene.ask() == 200
    assert await scene.ask(OTHER_KEY) == 503


async def test_store_that_flaps_leaves_known_keys_their_allowance() -> None:
    """Each return reports everything: what was known is asked again, and goes on when the store is gone once more."""
    scene = Scene()
    assert await scene.ask() == 200
    for _ in range(3):
        scene.store.on_outage("gone")
        scene.store.down = True
        assert await scene.ask() == 200
        scene.store.on_outage("")
        scene.store.on_change(Invalidation(everything=True))
        assert await scene.ask() == 200, "still down, whatever it said"
    scene.store.down = False
    scene.store.keys.clear()
    scene.store.on_outage("")
    scene.store.on_change(Invalidation(everything=True))
    assert await scene.ask() == 401


@pytest.mark.parametrize("by", ["id", "user"])
async def test_keys_are_forgotten_by_id_and_by_user(by: str) -> None:
    scene = Scene()
    scene.store.put(OTHER_KEY, id="key_2", user="u-2200b")
    await scene.ask()
    with contextlib.suppress(AssertionError):
        await scene.ask(OTHER_KEY)
    changes = Invalidation(ids=frozenset({"key_1"})) if by == "id" else Invalidation(users=frozenset({ME}))
    assert scene.auth.forget(changes) == 1
    assert len(scene.auth._known) == 1
    scene.store.down = True
    assert await scene.ask() == 503, "what was named goes on for nobody"


async def test_answer_that_lets_nobody_in_is_old_as_soon_as_an_unknown_key() -> None:
    """A key that was enabled, or extended, must not stay out for as long as a good one is believed."""
    for facts in ({"enabled": False}, {"suspended": True}, {"expires_at": 900.0}, {"out_of_quota": True}):
        scene = Scene()
        scene.store.put(**facts)
        assert await scene.ask() in (401, 402)
        scene.store.put()
        scene.clock.now += 2.1
        assert await scene.ask() == 200


async def test_answer_is_believed_no_longer_than_its_key_lives() -> None:
    scene = Scene()
    scene.store.put(expires_at=scene.wall.now + 5)
    assert await scene.ask() == 200
    scene.store.put(expires_at=scene.wall.now + 500)  # extended
    scene.clock.now += 5.1
    scene.wall.now += 5.1
    assert await scene.ask() == 200


async def test_late_answer_never_revives_a_revoked_key() -> None:
    """A thousand times: the store answers from before the revocation, at every moment around it."""
    for round_number in range(1000):
        scene = Scene()
        if round_number % 2:
            assert await scene.ask() == 200
            scene.clock.now += 8.1 if round_number % 4 == 1 else 10.1
        scene.store.gate.clear()
        tasks = [asyncio.get_running_loop().create_task(scene.ask()) for _ in range(2)]
        for _ in range(round_number % 7):
            await asyncio.sleep(0)
        scene.store.gate.set()
        for _ in range(round_number % 5):
            await asyncio.sleep(0)
        scene.store.drop()
        await asyncio.gather(*tasks)
        await settled(scene)
        assert await scene.ask() == 401, round_number
        assert len(scene.auth._known) == 0


# --- a flood, and a store that fails for some


def guess(scene: Scene, number: int) -> "asyncio.Task[int]":
    return asyncio.get_running_loop().create_task(scene.ask(f"bad-key-{number}"))


async def test_known_key_is_looked_up_again_however_many_unknown_ones_are() -> None:
    """And when not even that has room, it goes on with what is known of it: guessing shuts out nobody."""
    scene = Scene()
    assert await scene.ask() == 200
    scene.clock.now += 10.1
    scene.store.gate.clear()
    guesses = [guess(scene, number) for number in range(1500)]
    while len(scene.store.asked) < 1001:
        await asyncio.sleep(0)
    scene.store.asked.clear()
    renewal = asyncio.get_running_loop().create_task(scene.ask())
    while not scene.store.asked:
        await asyncio.sleep(0)
    assert scene.store.asked == [hash_key(KEY)]
    scene.store.gate.set()
    assert await renewal == 200
    await asyncio.gather(*guesses)
    assert scene.auth.counts.stale == 0

    scene.clock.now += 10.1
    scene.store.gate.clear()
    await asyncio.sleep(0)
    scene.auth._look_ups.update((b"%d" % number, None) for number in range(2000))  # type: ignore[misc]
    assert await scene.ask() == 200
    assert scene.auth.counts.stale == 1
    scene.auth._look_ups.clear()


async def test_guesses_reach_the_store_only_in_part() -> None:
    """A thousand at once, then 500 a second; the rest is told to come back, and known keys notice nothing."""
    scene = Scene()
    assert await scene.ask() == 200
    statuses = [await scene.ask(f"bad-key-{number}") for number in range(2000)]
    assert set(statuses[:1000]) == {401}
    assert set(statuses[1001:]) == {503}
    assert scene.auth.counts.declined == statuses.count(503)
    for _ in range(3):
        scene.clock.now += 1
        asked = len(scene.store.asked)
        for number in range(1000):
            await scene.ask(f"again-{scene.clock.now}-{number}")
        assert 499 <= len(scene.store.asked) - asked <= 501
    assert await scene.ask() == 200
    scene.clock.now += 10.1
    assert await scene.ask() == 200


async def test_cold_keys_that_are_good_are_no_guesses() -> None:
    """A process that starts anew under full load knows nobody, and lets everybody in."""
    scene = Scene()
    for number in range(6000):
        scene.store.put(f"sk-good-{number}", id=f"key_{number}")
        assert await scene.ask(f"sk-good-{number}") == 200


async def test_answer_without_sense_is_asked_for_no_more_often_than_an_unknown_key() -> None:
    """It is 503 all the while, never 401."""
    scene = Scene()
    scene.store.unusable.add(OTHER_KEY)
    assert [await scene.ask(OTHER_KEY) for _ in range(20)] == [503] * 20
    assert len(scene.store.asked) == 1
    scene.clock.now += 2.1
    scene.store.unusable.clear()
    assert await scene.ask(OTHER_KEY) == 401


async def test_keys_that_the_store_stumbles_on_keep_no_other_key_out(caplog: pytest.LogCaptureFixture) -> None:
    """Who owns such a key, or finds one, would else open the breaker and hold it open for everybody."""
    scene = Scene()
    scene.store.put(OTHER_KEY)
    assert await scene.ask() == 200
    for number in range(50):
        poison = f"sk-poison-{number}"
        scene.store.unusable.add(poison)
        assert await scene.ask(poison) == 503
    assert await scene.ask(OTHER_KEY) == 200
    assert caplog.records == []
    # A known key of which the answer has become senseless goes on, and is asked for now and then.
    scene.store.unusable.add(KEY)
    scene.clock.now += 10.1
    scene.store.asked.clear()
    assert [await scene.ask() for _ in range(50)] == [200] * 50
    await settled(scene)
    assert scene.store.asked == [hash_key(KEY)]


async def test_store_that_never_made_sense_is_down(caplog: pytest.LogCaptureFixture) -> None:
    """A wrong address or credential shows at the first requests, when no key is known yet."""
    scene = Scene()
    for number in range(9):
        scene.store.unusable.add(f"sk-any-{number}")
        assert await scene.ask(f"sk-any-{number}") == 503
    assert len(scene.store.asked) == FAILURES_TO_OPEN
    assert [record.getMessage() for record in caplog.records] == ["key store is unavailable: rubbish"]


async def test_store_that_makes_no_sense_any_more_is_down() -> None:
    """Keys that were known tell it from one that stumbles on some."""
    scene = Scene()
    keys = [f"sk-known-{number}" for number in range(9)]
    for key in keys:
        scene.store.put(key)
        assert await scene.ask(key) == 200
    scene.clock.now += 10.1
    scene.store.unusable.update(keys)
    scene.store.asked.clear()
    assert [await scene.ask(key) for key in keys] == [200] * 9
    assert len(scene.store.asked) == FAILURES_TO_OPEN
    assert scene.auth.outage.reason == "rubbish"


async def test_known_key_waits_for_a_slow_store_once() -> None:
    """After that it goes on with what is known, and the store is asked beside it."""
    scene = Scene(store_timeout_s=0.01)
    assert await scene.ask() == 200
    scene.clock.now += 10.1
    scene.store.gate.clear()
    assert await scene.ask() == 200
    waited = scene.auth.counts.failures
    for _ in range(20):
        scene.clock.now += 0.5
        assert scene.auth.recall(Credential("", KEY, hash_key(KEY))) is not None
    assert waited == 1


async def test_defect_of_a_store_is_a_failure_like_others(caplog: pytest.LogCaptureFixture) -> None:
    """Known keys go on and unknown ones get 503; what it says may hold a key, so its name is logged and no more."""
    scene = Scene()
    assert await scene.ask() == 200
    scene.store.defect = RuntimeError(f"HGETALL {KEY}")
    scene.clock.now += 10.1
    assert [await scene.ask() for _ in range(3)] == [200] * 3
    assert [await scene.ask(f"sk-unknown-{n}") for n in range(3)] == [503] * 3
    assert [record.getMessage() for record in caplog.records] == ["key store is unavailable: RuntimeError"]


async def test_key_that_was_out_before_the_store_went_down_is_503() -> None:
    """It may have been enabled, or paid for, since; nobody can say."""
    for facts in ({"enabled": False}, {"suspended": True}, {"out_of_quota": True}):
        scene = Scene()
        scene.store.put(**facts)
        assert await scene.ask() in (401, 402)
        scene.store.down = True
        scene.clock.now += 2.1
        assert await scene.ask() == 503


async def test_late_failure_is_not_taken_for_that_of_the_one_who_tries() -> None:
    """Of requests that asked before the breaker opened; the try goes on, and nobody tries beside it."""
    scene = Scene()
    gates = [asyncio.Event() for _ in range(6)]
    waiting = iter(gates)
    scene.store.before_answer = lambda: next(waiting).wait()  # type: ignore[assignment,return-value]
    scene.store.down = True
    early = [guess(scene, number) for number in range(5)]
    while len(scene.store.asked) < 5:
        await asyncio.sleep(0)
    for gate, task in zip(gates[:4], early[:4], strict=True):
        gate.set()
        assert await task == 503
    scene.clock.now += 1.1
    trying = guess(scene, 6)
    while len(scene.store.asked) < 6:
        await asyncio.sleep(0)
    gates[4].set()
    assert await early[4] == 503
    scene.clock.now += 20
    assert await scene.ask(OTHER_KEY) == 503
    assert len(scene.store.asked) == 6
    gates[5].set()
    assert await trying == 503


# --- tokens beside keys


class FakeTokens:
    """Proves every token that begins with `ey.`."""

    def __init__(self) -> None:
        self.on_change: Callable[[Invalidation], object] = ignore
        self.refused: set[str] = set()
        self.gate = asyncio.Event()
        self.gate.set()

    def claims(self, credential: str) -> bool:
        return credential.startswith("ey.")

    async def verify(self, token: str) -> TokenPrincipal:
        await self.gate.wait()
        if token.split(".")[1] in self.refused:
            raise TokenRefused
        return TokenPrincipal(f"jwt:{ME}", ME, expires_at=5000.0, proof=token.split(".")[1])


def with_tokens(scene: Scene, *, knows_users: bool) -> FakeTokens:
    scene.store.knows_users = knows_users
    tokens = FakeTokens()
    scene.auth = Authenticator(scene.auth._config, scene.store, scene.clock, scene.wall, tokens)  # type: ignore[arg-type]
    return tokens


async def test_token_needs_no_store_that_knows_nothing_of_users(caplog: pytest.LogCaptureFixture) -> None:
    """While that is dead new tokens get in, and their success is not taken for the store's."""
    scene = Scene()
    with_tokens(scene, knows_users=False)
    scene.store.down = True
    for number in range(9):
        assert await scene.ask(f"sk-unknown-{number}") == 503
        assert await scene.ask(f"ey.{number}.xxxx") == 200
    assert len(scene.store.asked) == FAILURES_TO_OPEN
    assert [record.levelname for record in caplog.records] == ["ERROR"]


async def test_token_that_needs_no_store_takes_the_try_from_no_key() -> None:
    scene = Scene()
    tokens = with_tokens(scene, knows_users=False)
    scene.store.down = True
    assert [await scene.ask(f"sk-unknown-{number}") for number in range(9)] == [503] * 9
    scene.store.down = False
    scene.clock.now += 20
    tokens.gate.clear()
    proving = asyncio.get_running_loop().create_task(scene.ask("ey.slow.xxxx"))
    await asyncio.sleep(0)
    assert await scene.ask() == 200
    tokens.gate.set()
    assert await proving == 200


async def test_token_waits_for_a_store_that_knows_of_users() -> None:
    """Its user may be suspended."""
    scene = Scene()
    with_tokens(scene, knows_users=True)
    scene.store.down = True
    assert [await scene.ask(f"ey.{number}.xxxx") for number in range(9)] == [503] * 9
    scene.store.down = False
    scene.store.users[ME] = UserState(suspended=True)
    scene.clock.now += 20
    assert await scene.ask("ey.new.xxxx") == 401


async def test_token_of_a_withdrawn_key_does_not_go_on_while_the_store_is_down() -> None:
    """What other keys proved does, and what the store said."""
    scene = Scene()
    tokens = with_tokens(scene, knows_users=True)
    asked = ("ey.withdrawn.xxxx", "ey.other.xxxx", KEY)
    assert [await scene.ask(each) for each in asked] == [200] * 3
    scene.store.down = True
    tokens.on_change(Invalidation(proofs=frozenset(("withdrawn",))))
    assert [await scene.ask(each) for each in asked] == [503, 200, 200]
    scene.auth.forget(Invalidation(everything=True))
    assert [await scene.ask(each) for each in asked] == [503, 200, 200]


async def test_token_whose_key_is_withdrawn_while_its_user_is_looked_up_is_proved_again() -> None:
    scene = Scene()
    tokens = with_tokens(scene, knows_users=True)

    async def answer_late(user: str) -> UserState:
        tokens.refused.add("withdrawn")
        tokens.on_change(Invalidation(proofs=frozenset(("withdrawn",))))
        return UserState()

    scene.store.look_up_user = answer_late  # type: ignore[method-assign]
    assert await scene.ask("ey.withdrawn.xxxx") == 401
