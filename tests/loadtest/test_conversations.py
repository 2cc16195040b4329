"""The trace that `loadtest conversations` plays, and what it makes of what engines saw."""

import json

from edge.simulator.server import Record
from loadtest.conversations import Outcome, _ideal, trace


def test_trace_is_the_same_for_the_same_seed_and_begins_at_its_rate() -> None:
    made = trace(8.0, 400, 3, 1)
    assert made == trace(8.0, 400, 3, 1) != trace(8.0, 400, 3, 2)
    assert 40 < made[-1].begins_s < 60
    assert {len(each.turns) for each in made} == {3}
    assert len({each.system for each in made}) == 6
    assert len({each.system for each in trace(8.0, 400, 1, 1, shares=False)}) == 400


def test_outcome_has_the_wait_that_a_share_did_not_exceed() -> None:
    outcome = Outcome([float(each) for each in range(100)], 30, 40, [10, 20, 30, 20])
    assert (outcome.wait_s(0.5), outcome.wait_s(0.9), outcome.hits, outcome.most) == (50.0, 90.0, 0.75, 1.5)
    assert (Outcome().wait_s(0.9), Outcome().hits) == (0.0, 0.0)


def test_ideal_is_what_one_engine_would_have_cached() -> None:
    messages = [{"role": "user", "content": "x" * 4_000}]
    bodies = [json.dumps({"messages": messages * count}).encode() for count in (1, 2, 2)]
    records = [Record("POST", "/", [], float(at), body) for at, body in enumerate(bodies)]
    assert 0.95 < _ideal(records) / ((4_000 + 8_000) / 4) < 1.05
