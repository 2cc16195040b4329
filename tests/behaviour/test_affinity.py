"""`prefix-affinity`: a conversation returns to the member that has its prefix cached, and nobody is crushed by it."""

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator

import pytest

from edge.simulator.dialects import Behaviour
from edge.simulator.server import Simulator
from tests.conftest import StartEdge

SYSTEM = {"role": "system", "content": "You are a helpful assistant. " * 100}  # shared by all, as in practice


@pytest.fixture
async def members() -> AsyncIterator[list[Simulator]]:
    # Slow, against which the delays of a busy machine are short: they would make a member look full.
    running = [Simulator(Behaviour(ttft_ms=200, tokens=1), keep_requests=10_000) for _ in range(3)]
    for each in running:
        await each.start()
    yield running
    for each in running:
        await each.close()


async def test_a_conversation_returns_to_its_member_and_no_member_carries_over_the_bound(
    start_edge: StartEdge, members: list[Simulator]
) -> None:
    """400 conversations of four turns, 200 in flight, all with one system prompt: at least 95 of 100 turns return."""
    endpoints = ", ".join(f'"{each.url}"' for each in members)
    edge = await start_edge(
        f'[pools.p]\nendpoints = [{endpoints}]\nbalance = "prefix-affinity"\n[routes."public/x"]\npool = "p"\n'
    )
    turns = [(conversation, turn) for turn in range(4) for conversation in range(400)]
    random.Random(3).shuffle(turns)
    lines = iter(sorted(turns, key=lambda each: each[1]))  # a turn comes after the one before, in some order

    async def worker() -> None:
        client = await edge.connect()
        for conversation, turn in lines:
            messages = [SYSTEM, {"role": "user", "content": f"question {conversation}"}]
            messages += [{"role": "assistant", "content": "answer"}, {"role": "user", "content": "more"}] * turn
            request_id = f"x-request-id: c{conversation}.{turn}"
            client.send(edge.request({"model": "public/x", "messages": messages}, headers=(request_id,)))
            assert (await client.response())[0] == 200

    await asyncio.gather(*(worker() for _ in range(200)))
    await edge.consistent()
    at = {line["request_id"]: line["endpoint"] for line in await edge.log()}
    returned = [at[f"c{conversation}.{turn}"] == at[f"c{conversation}.0"] for conversation, turn in turns if turn]
    assert sum(returned) >= 0.95 * len(returned)
    carried = Counter(at.values())
    assert len(carried) == 3
    assert max(carried.values()) <= 1.25 * len(turns) / 3
