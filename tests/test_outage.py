"""Something is down: said once, and once when it is back."""

import logging

import pytest

from edge.outage import Outage

LOG = logging.getLogger("edge.somewhere")


@pytest.fixture
def outage(caplog: pytest.LogCaptureFixture) -> Outage:
    caplog.set_level(logging.INFO, LOG.name)
    return Outage(LOG, "key store is unavailable", "key store answers again")


def test_outage_is_logged_once_however_often_it_is_met(outage: Outage, caplog: pytest.LogCaptureFixture) -> None:
    outage.down("refused")
    outage.down("no answer in 2 s")
    assert (bool(outage), outage.reason) == (True, "no answer in 2 s")
    assert [(each.levelname, each.getMessage()) for each in caplog.records] == [
        ("ERROR", "key store is unavailable: refused")
    ]


def test_return_is_logged_once_behind_an_outage_only(outage: Outage, caplog: pytest.LogCaptureFixture) -> None:
    outage.up()
    assert caplog.records == []
    outage.down("refused")
    outage.up()
    outage.up()
    assert (bool(outage), outage.reason) == (False, "")
    assert [each.getMessage() for each in caplog.records][1:] == ["key store answers again"]
