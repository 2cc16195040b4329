"""Which endpoint of a pool is asked, and how long it counts as in flight."""

import asyncio
from collections import Counter
from dataclasses import replace

import pytest

from edge.config.settings import Balance
from edge.errors import UpstreamUnavailable
from edge.upstream.endpoints import Endpoint, Endpoints, Lease, Member
from edge.upstream.health import Verdict
from edge.upstream.pools import Pool
from edge.upstream.prefixes import Prefix
from tests.upstream.conftest import pool_of


def number(endpoint: Endpoint) -> int:
    return int(endpoint.url.host.rpartition(".")[2])


async def test_round_robin_spreads_weights_smoothly(endpoints: Endpoints) -> None:
    """As nginx does: 5, 1, 1 is a a b a c a a, never five times the same in a row."""
    pool = pool_of(endpoints, 5, 1, 1, balance="round-robin")
    order = [number(pool.lease().endpoint) for _ in range(14)]
    assert order == [1, 1, 2, 1, 3, 1, 1] * 2


async def test_round_robin_takes_turns_among_equals(endpoints: Endpoints) -> None:
    pool = pool_of(endpoints, 1, 1, 1, balance="round-robin")
    assert [number(pool.lease().endpoint) for _ in range(6)] == [1, 2, 3] * 2


async def test_least_loaded_fills_endpoints_by_their_weights(endpoints: Endpoints) -> None:
    pool = pool_of(endpoints, 1, 2, 3)
    for _ in range(600):
        pool.lease().__enter__()
    loads = {number(member.endpoint): member.endpoint.in_flight for member in pool.members}
    assert all(abs(loads[at] - 100 * at) <= 10 for at in (1, 2, 3)), loads


async def test_least_loaded_counts_what_other_pools_send_there(endpoints: Endpoints) -> None:
    """Requests are counted at the address, not at its place in one pool."""
    one, two = pool_of(endpoints, 1, 1), pool_of(endpoints, 1, 1)
    with one.lease() as busy:
        assert {two.lease().endpoint is busy.endpoint for _ in range(30)} == {False}


async def test_equals_are_drawn(endpoints: Endpoints) -> None:
    """Many processes that all begin with the first endpoint would load it together."""
    pool = pool_of(endpoints, 1, 1)
    counts = Counter(number(pool.lease().endpoint) for _ in range(400))
    assert min(counts[1], counts[2]) > 100


@pytest.mark.parametrize("balance", ["least-loaded", "round-robin"])
async def test_tried_endpoints_are_not_asked_again(endpoints: Endpoints, balance: Balance) -> None:
    pool = pool_of(endpoints, 9, 1, 1, balance=balance)
    tried: list[Endpoint] = []
    for _ in range(3):
        tried.append(pool.lease(tried).endpoint)
    assert sorted(map(number, tried)) == [1, 2, 3]
    with pytest.raises(UpstreamUnavailable) as caught:
        pool.lease(tried)
    assert "10.0.0" not in caught.value.message


async def test_who_is_asked_beside_another_is_well_and_has_room(endpoints: Endpoints) -> None:
    pool = pool_of(endpoints, 1, 1, 1)
    first, second, third = (member.endpoint for member in pool.members)

    def beside(user: str = "u-a") -> set[int]:
        leases = [pool.beside(first, None, user) for _ in range(40)]
        return {number(lease.endpoint) for lease in leases if lease is not None}

    assert beside() == {2, 3}
    for _ in range(3):
        pool.lease_of(second.authority, "u-a").report(Verdict.FAULT)
    assert (beside(), beside("u-b")) == ({3}, {2, 3})
    third.health.backpressure(third.connections.loop.time(), 5.0, 0, "u-b")
    assert (beside(), beside("u-b")) == ({3}, {2})
    pool.config = replace(pool.config, max_inflight=1)
    with pool.lease_of(third.authority, "u-a"):
        assert beside() == set()
    for number_of_time in range(3):
        second.health.unreachable(-1000.0, number_of_time)
    assert beside("u-b") == set()  # it is on trial, which no request is spent on that has another


async def test_lease_counts_while_it_is_held_and_on_every_way_out(endpoints: Endpoints) -> None:
    pool = pool_of(endpoints, 1)
    endpoint = pool.members[0].endpoint
    lease = pool.lease()
    assert endpoint.in_flight == 0
    with lease:
        assert endpoint.in_flight == 1
        with pool.lease():
            assert endpoint.in_flight == 2
    assert endpoint.in_flight == 0
    for error in (ValueError, asyncio.CancelledError, KeyboardInterrupt):
        with pytest.raises(error), pool.lease():
            raise error
        assert endpoint.in_flight == 0


async def test_cancelled_request_gives_its_lease_back(endpoints: Endpoints) -> None:
    pool = pool_of(endpoints, 1)
    held = asyncio.Event()

    async def hold() -> None:
        with pool.lease():
            held.set()
            await asyncio.Event().wait()

    task = asyncio.get_running_loop().create_task(hold())
    await held.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert pool.members[0].endpoint.in_flight == 0


# --- what one user met


def failed(member: Member, user: str) -> None:
    for _ in range(3):
        with Lease(member, user) as lease:
            lease.report(Verdict.FAULT)


async def test_member_that_failed_one_user_is_asked_by_the_others(endpoints: Endpoints) -> None:
    pool = pool_of(endpoints, 1, 1)
    failed(pool.members[0], "u-1")
    assert {number(pool.lease(user="u-1").endpoint) for _ in range(40)} == {2}
    assert {number(pool.lease(user="u-2").endpoint) for _ in range(40)} == {1, 2}


async def test_user_whom_every_member_failed_is_sent_to_half_of_them(endpoints: Endpoints) -> None:
    pool = pool_of(endpoints, 1, 1, 1, 1)
    for member in pool.members:
        failed(member, "u-1")
    assert {number(pool.lease(user="u-1").endpoint) for _ in range(60)} == {1, 2}
    assert {number(pool.lease(user="u-2").endpoint) for _ in range(60)} == {1, 2, 3, 4}


async def test_a_place_that_comes_free_goes_to_the_next_whom_its_member_did_not_fail(endpoints: Endpoints) -> None:
    """A member that fails one user at once has a place at once, and would get all that this user has waiting."""
    pool = pool_of(endpoints, 1, 1)
    pool.config = replace(pool.config, max_inflight=1, queue=9)
    bad, good = pool.members
    failed(bad, "u-1")
    at_bad, at_good = Lease(bad, "u-2"), Lease(good, "u-2")
    at_bad.hold()
    at_good.hold()
    loop = asyncio.get_running_loop()
    first, second = (loop.create_task(pool.wait(user)) for user in ("u-1", "u-2"))
    await asyncio.sleep(0)
    at_bad.__exit__()
    assert (await second).member is bad
    assert not first.done()
    at_good.__exit__()
    assert (await first).member is good


async def test_place_that_nobody_who_waits_may_take_is_taken_at_once_and_whoever_fills_the_queue(
    endpoints: Endpoints,
) -> None:
    """Else one user, whom a member failed, could let the others wait for it, or be refused."""
    pool = pool_of(endpoints, 1, 1)
    pool.config = replace(pool.config, max_inflight=1, queue=1)
    bad, good = pool.members
    failed(bad, "u-1")
    at_good = Lease(good, "u-1")
    at_good.hold()
    assert pool.lease(user="u-1") is None
    waiting = asyncio.get_running_loop().create_task(pool.wait("u-1"))
    await asyncio.sleep(0)
    lease = pool.lease(user="u-2")
    assert lease is not None
    with lease:
        assert lease.member is bad
        assert pool.lease(user="u-2") is None
    at_good.__exit__()
    assert (await waiting).member is good


async def test_nobody_overtakes_who_may_take_the_same_place(endpoints: Endpoints) -> None:
    pool = pool_of(endpoints, 1, 1)
    pool.config = replace(pool.config, max_inflight=1, queue=9)
    first, second = (Lease(member, "u-1") for member in pool.members)
    first.hold()
    second.hold()
    waiting = asyncio.get_running_loop().create_task(pool.wait("u-1"))
    await asyncio.sleep(0)
    first.endpoint.in_flight -= 1  # as one that comes by DNS has room, of which nothing tells
    assert pool.lease(user="u-2") is None
    assert (await waiting).endpoint is first.endpoint


async def test_who_waits_for_limits_takes_no_room_from_who_waits_for_a_place_and_delays_nobodys_retry(
    endpoints: Endpoints,
) -> None:
    """One user over a limit would shut the others out of a pool that has nothing to do."""
    pool = pool_of(endpoints, 1)
    pool.config = replace(pool.config, max_inflight=1, queue=2)
    pool.held = 2
    assert not pool.has_room_to_wait
    loop = asyncio.get_running_loop()
    with taken(pool.lease()):
        places = [loop.create_task(pool.wait("u-1")) for _ in range(2)]
        await asyncio.sleep(0)
        assert pool.waiting == 2
        pool.held = 1
        assert pool.has_room_to_wait
        with pytest.raises(UpstreamUnavailable) as caught:
            await pool.wait("u-2")
        assert caught.value.retry_after_s == 1
    for each in places:
        with await each:
            pass


async def test_full_pool_in_which_nobody_waits_for_a_place_is_asked_again_in_a_second(endpoints: Endpoints) -> None:
    pool = pool_of(endpoints, 1)
    pool.config = replace(pool.config, max_inflight=1, queue=0)
    pool.held = 100
    with taken(pool.lease()), pytest.raises(UpstreamUnavailable) as caught:
        await pool.wait("u-2")
    assert caught.value.retry_after_s == 1


# --- `cache-aware`


MINE = Prefix(9_000, (4_000, 9_000), (1 << 55, 2 << 55), 0, b"", 0)


async def test_what_is_known_of_caches_outlives_a_reload_and_not_a_member_that_is_gone(endpoints: Endpoints) -> None:
    pool = pool_of(endpoints, 1, 1, 1, balance="cache-aware")
    with taken(pool.lease((), MINE)) as first:
        first.first_byte(streamed=True)
    renewed = Pool(replace(pool.config, idle_timeout_s=7), [each.endpoint for each in pool.members], pool)
    again = taken(renewed.lease((), MINE))
    assert again.endpoint is first.endpoint
    assert again.ticket is not None
    assert again.ticket.choice.hit_percent == 100
    health = again.endpoint.health
    with again:
        again.report(Verdict.UNREACHABLE)
    while not health.ejected_until:
        with taken(renewed.lease_of(again.member.name, "u", MINE)) as lease:
            lease.report(Verdict.UNREACHABLE)
    there = renewed.lease_of(again.member.name, "u", MINE)
    assert there.ticket is not None
    assert there.ticket.choice.hit_percent == 0


async def test_request_that_waited_is_sent_by_what_is_known_when_a_place_comes_free(endpoints: Endpoints) -> None:
    pool = pool_of(endpoints, 1, 1, balance="cache-aware")
    pool.config = replace(pool.config, max_inflight=1, queue=5)
    leases = []
    for _ in range(2):
        leases.append(taken(pool.lease((), None)))
        leases[-1].hold()
    assert pool.lease((), MINE) is None
    waiting = asyncio.get_running_loop().create_task(pool.wait("u", MINE))
    await asyncio.sleep(0)
    assert pool.caches is not None
    with leases[1]:
        pass
    with await waiting as lease:
        assert lease.ticket is not None
        assert lease.endpoint is leases[1].endpoint
        assert lease.endpoint.in_flight == lease.member.seat.prefilling == 1  # type: ignore[union-attr]
    assert lease.member.seat.pending == 0  # type: ignore[union-attr]
    with leases[0]:
        pass
    assert [each.load for each in pool.members] == [0, 0]


def taken(lease: Lease | None) -> Lease:
    assert lease is not None
    return lease
