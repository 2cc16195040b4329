"""The verdict of chaos: a run in which all is equal, and each way in which it may not be."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest

from loadtest.chaos.ledger import Asked, Given, Journal, Ledger, compare

ENDS = {
    "c-1": {"end": "complete", "usage_source": "final", "prompt_tokens": 7, "completion_tokens": 20, "endpoint": "h:2"},
    "c-2": {"end": "client_gone", "usage_source": "estimated", "prompt_tokens": 9, "completion_tokens": 11},
    "c-3": {"end": "crashed", "usage_source": "none", "prompt_tokens": 0, "completion_tokens": 0},
    "c-5": {
        "end": "complete",
        "usage_source": "final",
        "prompt_tokens": 7,
        "completion_tokens": 30,
        "endpoint": "h:2",
        "resumes": 1,
        "resumed_usage": {"completion_tokens": 18},
    },
}


class Run:
    """Requests at one edge, which was killed once.

    The first was tried at two engines, at one of them in vain; the last one broke behind 12 tokens of 14 that were
    given, and went on elsewhere.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.opened = [f"r-{request}" for request in ENDS]
        self.ended: list[dict[str, Any]] = [
            {"id": f"r-{request}", "request_id": request, **facts} for request, facts in ENDS.items()
        ]
        self.delivered = {each["id"]: dict(each) for each in self.ended}
        self.asked = {each: Asked(each, "mortal", "chat", True, 30, 7) for each in ENDS}
        self.asked["c-1"].is_whole, self.asked["c-1"].told_tokens = True, 20
        self.given = {
            "c-1": [
                Given(0.0, 0, "error", "h:1"),
                Given(1.0, 20, "complete", "h:2"),
                Given(2.0, 3, "client_gone", "h:1"),
            ],
            "c-2": [Given(0.0, 12, "client_gone")],
            "c-3": [Given(0.0, 5, "client_gone")],
            "c-5": [Given(0.0, 14, "cut", "h:1", 7), Given(1.0, 18, "complete", "h:2", 19)],
        }
        self.asked["c-5"].prompt_tokens = 0  # which engines count
        self.kills = 1

    def record(self, request_id: str) -> dict[str, Any]:
        return next(each for each in self.ended if each["request_id"] == request_id)

    def change(self, request_id: str, **facts: object) -> None:
        """Change a record alike in the journal and at the sink."""
        self.record(request_id).update(facts)
        self.delivered[f"r-{request_id}"].update(facts)

    def ledger(self) -> Ledger:
        lines = [*({"id": each} for each in self.opened), *self.ended]
        (self.directory / "t.0001.jsonl").write_bytes(b"".join(orjson.dumps(each) + b"\n" for each in lines))
        journal = Journal("mortal", kills=self.kills, delivered=dict(self.delivered))
        journal.read(self.directory)
        return compare(self.asked, self.given, [journal], clients=2)


def end_twice(run: Run) -> None:
    run.ended.append(dict(run.record("c-1")))


def forget_an_end(run: Run) -> None:
    del run.ended[1], run.delivered["r-c-2"]


def lose_at_the_sink(run: Run) -> None:
    del run.delivered["r-c-3"]


def deliver_otherwise(run: Run) -> None:
    run.delivered["r-c-1"]["completion_tokens"] = 19


def deliver_what_is_not_there(run: Run) -> None:
    run.delivered["r-other"] = {"id": "r-other"}


def bill_twice(run: Run) -> None:
    again = {**run.record("c-1"), "id": "r-again"}
    run.opened.append("r-again")
    run.ended.append(again)
    run.delivered["r-again"] = again


def forget_a_request(run: Run) -> None:
    run.opened.remove("r-c-2")
    forget_an_end(run)


def crash_without_a_kill(run: Run) -> None:
    run.kills = 0


def hang(run: Run) -> None:
    run.asked["c-2"].is_hung = True


def refuse_a_good_key(run: Run) -> None:
    run.asked["c-4"] = Asked("c-4", "mortal", "chat", True, 30, 7, status=401)


def change(request_id: str, **facts: object) -> Callable[[Run], None]:
    return lambda run: run.change(request_id, **facts)


def test_a_run_in_which_all_is_equal_has_no_problem_and_a_row_for_each_end(tmp_path: Path) -> None:
    ledger = Run(tmp_path).ledger()
    assert ledger.problems == []
    row = ledger.rows["client_gone", "estimated"]
    assert (row.records, row.given, row.recorded, row.furthest) == (1, 12, 11, 1)
    assert len(ledger.lines()) == 1 + len(ENDS)


@pytest.mark.parametrize(
    ("harm", "problem"),
    [
        (end_twice, "a record ended twice"),
        (forget_an_end, "a record has no end"),
        (lose_at_the_sink, "not delivered"),
        (deliver_otherwise, "delivered otherwise"),
        (deliver_what_is_not_there, "not in the journal"),
        (bill_twice, "two records of one request"),
        (forget_a_request, "an engine was asked and there is no record"),
        (crash_without_a_kill, "1 records crashed in 0 kills"),
        (hang, "came to no end"),
        (refuse_a_good_key, "1 good requests got 401"),
        (change("c-1", completion_tokens=21), "not recorded as given"),
        (change("c-1", prompt_tokens=8), "not recorded as given"),
        (change("c-1", usage_source="estimated"), "not by the counts of the upstream"),
        (change("c-1", end="client_gone"), "not recorded as complete"),
        (change("c-5", completion_tokens=18), "not recorded as given"),
        (change("c-5", completion_tokens=32), "not recorded as given"),
        (change("c-5", prompt_tokens=19), "not recorded as given"),
        (change("c-5", resumed_usage={"completion_tokens": 30}), "a resume told otherwise than its engine gave"),
        (change("c-2", completion_tokens=31), "more recorded than the request allowed"),
        (change("c-3", completion_tokens=1), "nobody can know"),
        (change("c-3", end="internal_error"), "a defect of the edge"),
    ],
)
def test_whatever_is_not_equal_is_told(harm: Callable[[Run], None], problem: str, tmp_path: Path) -> None:
    run = Run(tmp_path)
    harm(run)
    assert any(problem in each for each in run.ledger().problems)


def test_an_estimate_of_what_no_engine_gave_is_told(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.given["c-2"] = [Given(0.0, 0, "client_gone")]
    assert any("more recorded" in each for each in run.ledger().problems)
