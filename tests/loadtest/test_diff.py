"""Two results side by side."""

import argparse
import functools
import random
from pathlib import Path
from typing import Any

import orjson
import pytest

from loadtest import diff
from loadtest.outcome import Outcome
from loadtest.results import Tally


@functools.cache
def result(slower: float = 1.0, count: int = 600, failed: int = 0, seed: int = 1) -> dict[str, Any]:
    draw, tally = random.Random(seed), Tally()
    for number in range(count):
        ttft = draw.uniform(0.18, 0.22) * slower
        gaps = [draw.uniform(0.018, 0.022) * slower for _ in range(4)]
        e2el = ttft + sum(gaps)
        tally.add(Outcome(number / 10, number / 10 + e2el, number / 10, 0, 0, "", ttft, e2el, gaps, 10, 5))
    for number in range(failed):
        tally.add(Outcome(number / 10, number / 10 + 0.1, number / 10, 0, 0, "connection lost"))
    return tally.numbers([50, 99]) | {"request_rate": 10.0, "void": []}


def compared(
    tmp_path: Path, before: object, after: object, capsys: pytest.CaptureFixture[str], *words: str
) -> tuple[int, str]:
    parser = argparse.ArgumentParser()
    diff.add_arguments(parser)
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for file, document in zip(files, (before, after), strict=True):
        file.write_bytes(document if isinstance(document, bytes) else orjson.dumps(document))
    code = diff.main(parser.parse_args([*map(str, files), *words]))
    told = capsys.readouterr()
    return code, told.out + told.err


def test_what_is_as_good_passes_and_what_is_slower_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    limit = ("--fail-over", "5%")
    assert compared(tmp_path, result(), result(seed=2), capsys, *limit)[0] == 0
    code, told = compared(tmp_path, result(), result(1.1, seed=2), capsys, *limit)
    assert code == 1
    assert "+10.0%" in told
    assert "WORSE" in told
    assert compared(tmp_path, result(), result(0.8), capsys, *limit)[0] == 0
    assert compared(tmp_path, result(), result(1.1), capsys)[0] == 0  # without a limit it only tells


def test_what_chance_may_have_made_cannot_be_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, told = compared(tmp_path, result(count=4), result(1.02, count=4, seed=1), capsys, "--fail-over", "1%")
    assert code == 3
    assert "CANNOT TELL" in told


def test_requests_that_fail_are_worse_by_themselves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compared(tmp_path, result(), result(failed=20), capsys, "--fail-over", "50%")[0] == 1
    assert compared(tmp_path, result(failed=20), result(failed=21), capsys, "--fail-over", "5%")[0] == 0
    assert compared(tmp_path, result(failed=20), result(), capsys, "--fail-over", "5%")[0] == 0


def test_a_void_run_tells_nothing_and_other_questions_are_noted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    late = result() | {"void": ["the generator was late"], "request_rate": 20.0}
    code, told = compared(tmp_path, result(), late, capsys, "--fail-over", "5%")
    assert code == 3
    assert "NOTE: B is void: the generator was late." in told
    assert "NOTE: request_rate differs: 10.0 and 20.0." in told


def test_a_result_of_vllm_is_compared_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = {name: value for name, value in result().items() if not name.endswith("_hdr") and name != "void"}
    slower = told | {"p99_ttft_ms": told["p99_ttft_ms"] * 2}
    assert compared(tmp_path, told, slower, capsys, "--fail-over", "5%")[0] == 1


def test_sweeps_are_compared_by_capacity_and_rate_by_rate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def sweep(capacity: float, slower: float) -> dict[str, object]:
        return {"capacity": capacity, "knee": 5.0, "steps": [result(slower), result() | {"request_rate": capacity}]}

    code, told = compared(tmp_path, sweep(50.0, 1.0), sweep(40.0, 1.2), capsys, "--fail-over", "5%")
    assert code == 1
    assert "capacity" in told
    assert "-20.0%" in told
    assert "10/s median_ttft_ms" in told
    assert "40/s" not in told


@pytest.mark.parametrize("document", [b"", b"[]", {"x": 1}])
def test_what_is_no_result_is_wrong_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str], document: object) -> None:
    code, told = compared(tmp_path, result(count=2), document, capsys)
    assert code == 2
    assert told.startswith("loadtest diff: ")
