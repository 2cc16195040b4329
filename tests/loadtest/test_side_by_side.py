"""Two saved results beside each other, and the command that draws them."""

import argparse
import re
from pathlib import Path
from typing import Any

import orjson
import pytest

from loadtest import page
from loadtest.side_by_side import html, rows
from tests.loadtest.test_comparison import document, requests


def comparison(*costs: float) -> dict[str, Any]:
    return document(*requests("edge", *costs), *requests("nginx", *[10] * len(costs)))


def test_two_comparisons_differ_where_even_the_nearest_ends_of_their_intervals_do() -> None:
    before, after = comparison(*range(100, 106)), comparison(*range(110, 116))
    [row] = rows(before, after, "edge")
    assert (row.first, row.second) == (102.5, 112.5)
    assert row.low == pytest.approx(110 / 105)
    assert row.high == pytest.approx(115 / 100)
    assert row.standing == "more"
    assert rows(before, comparison(*range(103, 109)), "edge")[0].standing == "CANNOT TELL"
    assert rows(comparison(100), after, "edge")[0].standing == "no interval"


def test_two_runs_are_compared_under_the_names_that_they_were_saved_with() -> None:
    first = {"mean_ttft_ms": 200.0, "p99_ttft_ms": 400.0, "request_throughput": 10.0, "failed": 0}
    second = {"mean_ttft_ms": 100.0, "p99_ttft_ms": 500.0, "request_throughput": 12.0, "failed": 3}
    told = {row.text: round(row.ratio, 2) for row in rows(first, second, "edge")}
    assert told == {"requests a second": 1.2, "mean TTFT, ms": 0.5, "p99 TTFT, ms": 1.25}
    assert "<svg" in html(first, second, ("a", "b"), "edge")


def test_what_cannot_be_compared_is_named() -> None:
    with pytest.raises(ValueError, match="smg is not in both"):
        rows(comparison(1), comparison(1), "smg")
    with pytest.raises(ValueError, match="one is a comparison"):
        rows(comparison(1), {"mean_ttft_ms": 1.0}, "edge")
    with pytest.raises(ValueError, match="nothing"):
        rows({"failed": 1}, {"failed": 1}, "edge")


def run(tmp_path: Path, *documents: Any) -> tuple[int, Path]:
    paths = []
    for place, each in enumerate(documents):
        path = tmp_path / f"{'ab'[place]}.json"
        path.write_bytes(orjson.dumps(each))
        paths.append(str(path))
    parser = argparse.ArgumentParser()
    page.add_arguments(parser)
    out = tmp_path / "page.html"
    return page.main(parser.parse_args([*paths, "--html", str(out)])), out


def test_a_page_needs_nothing_from_elsewhere_and_follows_the_scheme_and_width_of_its_reader(tmp_path: Path) -> None:
    code, out = run(tmp_path, comparison(*range(100, 106)), comparison(*range(110, 116)))
    assert code == 0
    text = out.read_text()
    assert "prefers-color-scheme: dark" in text
    assert "name=viewport" in text
    assert text.count("<svg") == 2, "one for a desk, one for a phone"
    assert not re.search(r"<(?:script|link|img|iframe)\b|\b(?:src|href)=\"http", text)
    drawn = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    assert "var(--ink)" in drawn
    assert not re.search(r"(?:fill|stroke): #(?:1a1a1a|000000|ffffff)", drawn), "it would be lost on a dark page"


def test_one_comparison_has_a_page_and_one_run_has_none_here(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, comparison(1))[0] == 0
    assert run(tmp_path, {"mean_ttft_ms": 1.0})[0] == 2
    assert "run --html" in capsys.readouterr().err
    assert run(tmp_path, [1])[0] == 2
