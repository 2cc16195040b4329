"""The line that shows a run on a terminal."""

import pytest

from loadtest.live import View
from loadtest.outcome import Outcome
from loadtest.results import Tally


def test_the_line_says_how_far_how_fast_how_soon_and_what_failed() -> None:
    tally = Tally()
    view = View(tally, 100, None)
    view.line(0.0)
    for number in range(50):
        outcome = Outcome(number / 10, number / 10 + 0.5, number / 10, 0, 0, "", 0.2, 0.5, [0.1] * 3, 10, 4)
        tally.add(outcome)
        view.add(outcome)
    tally.add(Outcome(0.0, 1.0, 0.0, 0, 0, "connection lost"))
    tally.live.add(0, [1.0, 2.0, -2.5], 3.0)
    line = view.line(5.0)
    assert line.startswith(
        "[############............] 51/100  5 s  10.2 req/s  40 tok/s  TTFT 200 ms  1 live  1 failed"
    )


def test_a_run_without_end_shows_no_share_and_one_of_a_time_that_of_the_time() -> None:
    assert View(Tally(), None, None).line(5.0).startswith("[........................] 0  5 s")
    assert View(Tally(), None, 10.0).line(5.0).startswith("[############............] 0  5 s")


def test_nothing_is_shown_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    View(Tally(), None, None).show(1.0, last=True)
    assert capsys.readouterr().err == ""
