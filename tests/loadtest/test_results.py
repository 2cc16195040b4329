"""From outcomes to numbers."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hdrh.histogram import HdrHistogram

from loadtest import run
from loadtest.outcome import Outcome
from loadtest.results import Tally, detailed, parse_goodput, parse_metrics, parse_percentiles
from loadtest.soak import Look, growth


def summary(
    outcomes: Sequence[Outcome],
    percentiles: Sequence[float],
    goodput: Mapping[str, float] | None = None,
    queue: bool = False,
) -> dict[str, Any]:
    tally = Tally(goodput)
    for each in outcomes:
        tally.add(each)
    return tally.numbers(percentiles, queue)


def stream(start: float, ttft: float, gap: float, count: int, *, tokens: int | None = None) -> Outcome:
    e2el = ttft + gap * (count - 1)
    outcome = Outcome(start, start + e2el + 0.001, start, 0.0001, 0.0, "", ttft, e2el, [gap] * (count - 1), 10)
    outcome.output_tokens = count if tokens is None else tokens
    return outcome


FAILED = Outcome(0.5, 4.0, 0.5, 0.0, 0.0, "connection lost")
RUN = [stream(0.0, 0.2, 0.02, 11), stream(1.0, 0.4, 0.02, 11), FAILED]


def test_the_summary_has_the_keys_and_definitions_of_vllm_bench_serve() -> None:
    numbers = summary(RUN, [50, 99.9])
    assert (numbers["completed"], numbers["failed"]) == (2, 1)
    assert numbers["duration"] == 4.0
    assert (numbers["total_input_tokens"], numbers["total_output_tokens"]) == (20, 22)
    assert numbers["request_throughput"] == 0.5
    assert numbers["output_throughput"] == 5.5
    assert numbers["total_token_throughput"] == 10.5
    assert numbers["request_goodput"] is None
    assert numbers["mean_ttft_ms"] == pytest.approx(300)
    assert numbers["median_ttft_ms"] == pytest.approx(300)
    assert numbers["std_ttft_ms"] == pytest.approx(100)
    assert numbers["p50_ttft_ms"] == pytest.approx(300)
    assert numbers["tokens"] == "usage"
    assert numbers["mean_itl_ms"] == pytest.approx(20)
    assert numbers["mean_tpot_ms"] == pytest.approx(20)
    assert numbers["mean_e2el_ms"] == pytest.approx(500)
    assert numbers["error_counts"] == {"connection lost": 1}


def test_tpot_counts_tokens_of_the_usage_and_not_events() -> None:
    assert stream(0, 0.1, 0.02, 11, tokens=21).tpot == pytest.approx(0.01)
    assert stream(0, 0.1, 0.02, 1).tpot is None


def test_a_whole_answer_has_an_end_and_neither_first_token_nor_pace() -> None:
    whole = Outcome(0.0, 0.5, 0.0, 0.0, 0.0, "", None, 0.5, [], 10, 8)
    numbers = summary([whole], [50])
    assert numbers["mean_e2el_ms"] == 500
    assert numbers["total_output_tokens"] == 8
    assert not [key for key in numbers if key.endswith(("_ttft_ms", "_tpot_ms", "_itl_ms"))]


def test_goodput_counts_requests_that_meet_every_limit() -> None:
    def within(*limits: str) -> object:
        return summary(RUN, [50], parse_goodput(limits))["request_goodput"]

    assert within("ttft:300") == 0.25
    assert within("ttft:500", "tpot:21") == 0.5
    assert within("ttft:500", "tpot:19") == 0
    assert within("e2el:450") == 0.25


@pytest.mark.parametrize("limit", ["itl:1", "ttft", "ttft:fast", ""])
def test_a_goodput_limit_that_means_nothing_is_refused(limit: str) -> None:
    with pytest.raises(ValueError, match=r"goodput|float"):
        parse_goodput([limit])


def test_metrics_and_percentiles_are_checked() -> None:
    assert parse_metrics("ttft,e2el") == ["ttft", "e2el"]
    assert parse_percentiles("50,99.9") == [50, 99.9]
    with pytest.raises(ValueError, match="one of ttft"):
        parse_metrics("latency")
    with pytest.raises(ValueError, match="at most 100"):
        parse_percentiles("101")


def test_the_histogram_in_the_result_gives_the_same_percentiles_to_another_reader() -> None:
    numbers = summary([stream(0.0, 0.1 + each / 1000, 0.02, 11) for each in range(100)], [99, 99.9])
    decoded = HdrHistogram.decode(numbers["ttft_hdr"])
    assert decoded.get_value_at_percentile(99) / 1e3 == pytest.approx(numbers["p99_ttft_ms"], rel=2e-3)
    assert numbers["p99.9_ttft_ms"] is None


def test_tokens_that_no_usage_tells_are_said_to_be_events() -> None:
    counted = stream(0.0, 0.2, 0.02, 11)
    counted.is_counted = False
    assert summary([*RUN, counted], [50])["tokens"] == "events"


def test_the_wait_for_a_place_is_told_apart_and_together_with_the_end() -> None:
    queued = stream(0.0, 0.2, 0.02, 11)
    queued.queued = 1.0
    numbers = summary([queued], [50], queue=True)
    assert numbers["mean_e2el_ms"] == pytest.approx(400)
    assert numbers["mean_client_queue_time_ms"] == 1000
    assert numbers["p50_e2el_including_client_queue_ms"] == pytest.approx(1400)
    assert not [key for key in summary([queued], [50]) if "queue" in key]


def test_the_share_that_meets_the_limits_counts_failed_requests_as_missed() -> None:
    assert summary(RUN, [50], parse_goodput(["ttft:300"]))["goodput_share"] == pytest.approx(1 / 3)
    assert summary(RUN, [50])["goodput_share"] is None


def test_urls_and_turns_have_numbers_of_their_own_where_there_are_several() -> None:
    other = stream(0.0, 0.6, 0.02, 11)
    other.target = other.turn = 1
    numbers = summary([*RUN, other], [50])
    assert [each["completed"] for each in numbers["targets"]] == [2, 1]
    assert [each["failed"] for each in numbers["targets"]] == [1, 0]
    assert numbers["targets"][1]["p50_ttft_ms"] == pytest.approx(600)
    assert [each["completed"] for each in numbers["turns"]] == [2, 1]
    assert "targets" not in summary(RUN, [50])


def test_a_page_keeps_a_fair_part_of_very_many_first_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loadtest.results._DOTS", 100)
    tally = Tally()
    for number in range(1000):
        tally.add(stream(number / 100, 0.2, 0.02, 2))
    assert len(tally.dots) == 100
    assert 30 <= sum(start < 5 for start, _ in tally.dots) <= 70
    assert sum(len(each.ttfts) for each in tally.intervals()) == 100


def test_nothing_at_all_is_summed_up_as_nothing() -> None:
    numbers = summary([], [50])
    assert (numbers["completed"], numbers["failed"], numbers["max_concurrent_requests"]) == (0, 0, 0)


def test_the_details_tell_every_request() -> None:
    details = detailed(RUN)
    assert {len(each) for each in details.values()} == {3}
    assert details["errors"] == ["", "", "connection lost"]
    assert details["start_times"] == [0.0, 1.0, 0.5]


def test_a_void_run_and_its_failures_are_said_plainly() -> None:
    numbers = summary(RUN, [50]) | {"generator_busy": 0.97, "generator_waited": 0.0, "void": ["the generator was late"]}
    numbers |= {"interrupted": True, "unfinished": 3}
    text = run.table(numbers, ["ttft"], [50])
    assert "VOID: the generator was late." in text
    assert "connection lost:" in text
    assert "INTERRUPTED: 3 requests were given up" in text
    assert "TPOT" not in text


def looks(memory: list[float], descriptors: list[int]) -> list[Look]:
    return [
        Look(float(at), 100, int(bytes_), count)
        for at, (bytes_, count) in enumerate(zip(memory, descriptors, strict=True))
    ]


def test_what_settled_does_not_count_as_growth_and_what_goes_on_does() -> None:
    count = 40
    settled = [50e6 + 50e6 * min(1, at / 10) for at in range(count)]
    leaking = [100e6 + 1e6 * at for at in range(count)]
    assert growth(looks(settled, [200] * count)) == []
    assert [each.split()[0] for each in growth(looks(leaking, [200] * count))] == ["memory"]
    assert [each.split()[0] for each in growth(looks(settled, list(range(200, 240))))] == ["descriptors"]
