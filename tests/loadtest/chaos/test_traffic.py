"""The clients of chaos against a simulated engine itself: what they hold for whole is whole, as each API ends it."""

import pytest

from edge.simulator.behaviour import Behaviour, Dialect
from edge.simulator.server import Simulator
from loadtest.chaos.traffic import ID, PATHS, Traffic


@pytest.mark.parametrize("dialect", ["vllm", "sglang", "llamacpp"])
async def test_clients_know_a_whole_answer_of_every_api_and_what_it_told(dialect: Dialect) -> None:
    simulator = Simulator(Behaviour(dialect))
    await simulator.start()
    try:
        traffic = Traffic({"engine": (simulator.port, "sk-chaos")}, clients=8, seed=1, most=120, faults=0.0)
        await traffic.is_over.wait()
        await traffic.end()
        await simulator.wait_for(lambda: not simulator.active)
        given = {found[1].decode(): each for each in simulator.requests if (found := ID.search(each.body))}
    finally:
        await simulator.close()
    whole = [each for each in traffic.asked.values() if each.is_whole]
    assert {(each.path, each.stream) for each in whole} == {
        (path, stream) for path in PATHS for stream in (True, False)
    }
    assert [each.id for each in whole if given[each.id].outcome != "complete"] == []
    one = [each for each in whole if dialect != "llamacpp" or each.path != "chat"]  # it tells those of one choice
    told = {each.id: each.told_tokens for each in one if each.told_tokens is not None}
    assert told == {each: given[each].tokens for each in told}
    assert all(each.told_tokens is not None for each in whole if not each.stream)
    assert [each.id for each in traffic.asked.values() if each.is_hung] == []
