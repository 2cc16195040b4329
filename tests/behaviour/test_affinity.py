"""`prefix-affinity`: a conversation returns to the member that has its prefix cached, and nobody is crushed by it."""

import asyncio
import random
from collections import Counter

from tests.conftest import ScriptedConnection, StartEdge, StartUpstream

SYSTEM = {"role": "system", "content": "You are a helpful assistant. " * 100}  # shared by all, as in practice


async def test_a_conversation_returns_to_its_member_and_no_member_carries_over_the_bound(
    start_edge: StartEdge, start_upstream: StartUpstream
) -> None:
    """400 conversations of four turns, 200 in flight, all with one system prompt: at least 95 of 100 turns return."""
    chance, conversations, in_flight = random.Random(3), 400, 200
    turns = [(conversation, turn) for turn in range(4) for conversation in range(conversations)]
    chance.shuffle(turns)
    lines = iter(sorted(turns, key=lambda each: each[1]))  # a turn comes after the one before, in some order
    waiting: list[asyncio.Event] = []
    unanswered = len(turns)

    def answer_one() -> None:
        """Let one of those that wait go on, once all are here that can be: so many are in flight on any machine."""
        nonlocal unanswered
        if waiting and len(waiting) == min(in_flight, unanswered):
            unanswered -= 1
            waiting.pop(chance.randrange(len(waiting))).set()

    async def script(connection: ScriptedConnection) -> None:
        mine = asyncio.Event()
        waiting.append(mine)
        answer_one()
        await mine.wait()
        await connection.send(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}")
        answer_one()

    members = [await start_upstream(script) for _ in range(3)]
    endpoints = ", ".join(f'"{each.url}"' for each in members)
    edge = await start_edge(
        f'[pools.p]\nendpoints = [{endpoints}]\nbalance = "prefix-affinity"\n[routes."public/x"]\npool = "p"\n'
    )

    async def worker() -> None:
        client = await edge.connect()
        for conversation, turn in lines:
            messages = [SYSTEM, {"role": "user", "content": f"question {conversation}"}]
            messages += [{"role": "assistant", "content": "answer"}, {"role": "user", "content": "more"}] * turn
            request_id = f"x-request-id: c{conversation}.{turn}"
            client.send(edge.request({"model": "public/x", "messages": messages}, headers=(request_id,)))
            assert (await client.response())[0] == 200

    await asyncio.gather(*(worker() for _ in range(in_flight)))
    await edge.consistent()
    at = {line["request_id"]: line["endpoint"] for line in await edge.log()}
    returned = [at[f"c{conversation}.{turn}"] == at[f"c{conversation}.0"] for conversation, turn in turns if turn]
    assert sum(returned) >= 0.95 * len(returned)
    carried = Counter(at.values())
    assert len(carried) == 3
    assert max(carried.values()) <= 1.25 * len(turns) / 3
