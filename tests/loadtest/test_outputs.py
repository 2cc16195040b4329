"""Where numbers go."""

import csv
from pathlib import Path

import orjson

from loadtest.outcome import Outcome
from loadtest.outputs import RequestsFile, save_csv, save_json

OUTCOME = Outcome(0.0, 0.5, 0.0, 0, 0, "", 0.2, 0.5, [0.1, 0.2], 10, 3)


def test_a_csv_has_a_row_for_each_run_and_only_what_a_cell_holds(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    save_csv(path, [{"rate": 1, "ttft_hdr": "x", "void": [], "counts": {}}, {"rate": 2, "label": "b"}])
    assert list(csv.DictReader(path.read_text().splitlines())) == [
        {"rate": "1", "label": ""},
        {"rate": "2", "label": "b"},
    ]


def test_each_request_is_written_as_json_with_its_gaps_or_as_a_row(tmp_path: Path) -> None:
    lines, rows = tmp_path / "r.jsonl", tmp_path / "r.csv"
    for path in (lines, rows):
        with RequestsFile(path) as file:
            file.add(OUTCOME)
            file.add(OUTCOME)
    told = [orjson.loads(line) for line in lines.read_bytes().splitlines()]
    assert len(told) == 2
    assert (told[0]["itls"], told[0]["tpot"]) == ([0.1, 0.2], 0.15)
    [row, _] = csv.DictReader(rows.read_text().splitlines())
    assert (row["ttft"], row["tpot"]) == ("0.2", "0.15")
    assert "itls" not in row


def test_nothing_is_written_where_no_file_is_asked_for() -> None:
    with RequestsFile(None) as file:
        file.add(OUTCOME)


def test_a_document_takes_the_place_of_the_one_before_at_once(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text("old")
    save_json(path, {"a": 1})
    assert orjson.loads(path.read_bytes()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]
