"""`python -m loadtest run` and `soak` as a person runs them, through an edge; no duration is asserted."""

import argparse
import asyncio
import csv
import os
import re
import signal
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import orjson
import pytest

from loadtest import options
from loadtest.__main__ import main
from loadtest.channel import Batch, Told
from loadtest.processes import tree
from loadtest.upstream import Ticks, Upstream
from loadtest.worker import Worker
from tests.agreement.recompute import differences
from tests.behaviour.test_demo import Ran, run
from tests.conftest import ROUTES, Edge, ScriptedConnection, StartEdge, StartUpstream

pytestmark = pytest.mark.usefixtures("no_environment")

ROOT = Path(__file__).parents[2]


async def loadtest(*arguments: str | Path) -> Ran:
    return await run(sys.executable, "-m", "loadtest", *arguments, cwd=ROOT)


def at(edge: Edge) -> tuple[str, ...]:
    return "--target", edge.url, "--api-key", edge.key, "--model", "public/deepseek-r1"


@pytest.fixture
async def exact_edge(start_edge: StartEdge) -> AsyncIterator[Edge]:
    """An edge in front of the benchmarks' own upstream."""
    loop = asyncio.get_running_loop()
    ticks = Ticks(loop)
    server = await loop.create_server(lambda: Upstream(loop, ticks, []), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    yield await start_edge(ROUTES.replace("{upstream}", f"http://127.0.0.1:{port}"))
    server.close()


async def test_a_run_reports_under_the_names_of_vllm_in_the_terminal_in_json_and_in_a_page(
    edge: Edge, tmp_path: Path
) -> None:
    result, page, requests = tmp_path / "r.json", tmp_path / "r.html", tmp_path / "r.jsonl"
    ran = await loadtest(
        *("run", *at(edge), "--num-prompts", "30", "--request-rate", "300", "--output-len", "5", "--workers", "2"),
        *("--goodput", "ttft:60000", "e2el:60000", "--save-result", result, "--save-detailed", "--html", page),
        *("--save-requests", requests),
    )
    numbers = orjson.loads(result.read_bytes())
    # A machine that is busy with other tests may make the run void, and that alone.
    assert ran.code == bool(numbers["void"]), ran
    assert (numbers["completed"], numbers["failed"], numbers["total_output_tokens"]) == (30, 0, 150)
    assert numbers["request_goodput"] == numbers["request_throughput"]
    assert numbers["p50_ttft_ms"] > 0
    assert list(differences(numbers, requests)) == []
    assert (numbers["backend"], numbers["max_concurrency"]) == ("openai-chat", None)
    assert 0 < numbers["max_output_tokens_per_s"] <= 150
    assert numbers["p99_ttft_ms"] is None  # which 30 requests do not have
    assert numbers["tokens"] == "usage"
    assert len(numbers["ttfts"]) == len(numbers["itls"]) == len(numbers["start_times"]) == 30
    assert numbers["start_times"] == sorted(numbers["start_times"])
    assert re.search(r"Successful requests: +30\n", ran.out)
    assert re.search(r"P90 TTFT \(ms\): +[0-9.]+\n", ran.out)
    assert re.search(r"P99 TTFT \(ms\): +-\n", ran.out)
    assert "P50 vLLM's TTFT (ms)" in ran.out
    assert "Generator lag" in ran.out
    html = page.read_text()
    assert html.count("<figure") == 5
    assert not re.search(r"(?:src|href)=[\"']?https?:", html)


@pytest.mark.parametrize(
    "words",
    [
        ("--scenario", "chat", "--header", "X-Tenant: a"),
        ("--scenario", "completions"),
        ("--scenario", "completions-stream", "--prefix-len", "100"),
        ("--scenario", "messages"),
        ("--scenario", "messages-stream", "--image", "8x8"),
        ("--scenario", "responses"),
        ("--scenario", "responses-stream", "--image", "8x8"),
        ("--scenario", "embeddings", "--num-inputs", "2"),
        ("--scenario", "body-1mb"),
        ("--turns", "2", "--think-time", "1ms", "--num-prompts", "2"),
    ],
)
async def test_every_kind_of_request_is_served(edge: Edge, words: tuple[str, ...]) -> None:
    """In this process: a process of its own for each would cost more than all the rest."""
    parser = argparse.ArgumentParser()
    options.add_arguments(parser)
    asked = [*at(edge), "--num-prompts", "4", "--max-concurrency", "2", *words]
    told: list[Told] = []
    worker = Worker(options.plan_of(parser.parse_args(asked)), 0, 1, told.append)
    await worker.send_all(time.monotonic(), asyncio.Event())
    outcomes = [outcome for each in told if isinstance(each, Batch) for outcome in each.outcomes]
    assert [outcome.error for outcome in outcomes] == [""] * 4
    assert all(outcome.input_tokens and outcome.is_counted for outcome in outcomes)


async def test_a_trace_is_replayed_at_its_times_and_each_request_is_written(edge: Edge, tmp_path: Path) -> None:
    trace, requests, table = tmp_path / "t.jsonl", tmp_path / "requests.jsonl", tmp_path / "t.csv"
    trace.write_text(
        '{"timestamp": 5000, "input_length": 600, "output_length": 3, "hash_ids": [0, 1]}\n'
        '{"timestamp": 5400, "input_length": 700, "output_length": 4, "hash_ids": [0, 2]}\n'
    )
    ran = await loadtest(
        *("run", *at(edge), "--prompts", trace, "--speed", "4", "--save-requests", requests, "--csv", table),
        *("--metadata", "commit=abc"),
    )
    assert re.search(r"Successful requests: +2\n", ran.out), ran
    told = sorted(map(orjson.loads, requests.read_bytes().splitlines()), key=lambda each: float(each["start"]))
    assert [each["output_tokens"] for each in told] == [3, 4]
    assert told[1]["start"] == pytest.approx(0.1)
    [row] = csv.DictReader(table.read_text().splitlines())
    assert (row["completed"], row["commit"], row["prompts"]) == ("2", "abc", str(trace))


async def test_a_sweep_finds_what_a_server_can_do(start_upstream: StartUpstream, tmp_path: Path) -> None:
    """A server of one at a time, each 10 ms: no more than 100 a second."""
    one_at_a_time = asyncio.Lock()

    async def answer(connection: ScriptedConnection) -> None:
        async with one_at_a_time:
            await asyncio.sleep(0.01)
        await connection.send(b'HTTP/1.1 200 OK\r\nContent-Length: 16\r\n\r\n{"choices":[{}]}')

    upstream = await start_upstream(answer)
    result, page, table = tmp_path / "s.json", tmp_path / "s.html", tmp_path / "s.csv"
    ran = await loadtest(
        *("run", "--target", upstream.url, "--scenario", "chat", "--rates", "10,300", "--duration", "500ms"),
        *("--save-result", result, "--html", page, "--csv", table),
    )
    document = orjson.loads(result.read_bytes())
    assert [each["request_rate"] for each in document["steps"]] == [10, 300]
    assert [each["is_good"] for each in document["steps"]][1] is False
    assert ran.code == (0 if document["capacity"] == 10 else 1), ran
    assert "Capacity: " in ran.out
    assert "300/s: " in ran.err
    assert len(table.read_text().splitlines()) == 3
    if document["capacity"] is not None:  # as on a machine that others use
        assert "<svg" in page.read_text()


async def endless_run(start_upstream: StartUpstream, result: Path, *options: str) -> asyncio.subprocess.Process:
    """Start a run of an hour, and return it when some of its requests were told."""
    seen = asyncio.Event()

    async def answer(connection: ScriptedConnection) -> None:
        if len(upstream.requests) > 200:  # the first must have been told by now
            seen.set()
        await connection.send(b'HTTP/1.1 200 OK\r\nContent-Length: 16\r\n\r\n{"choices":[{}]}')

    upstream = await start_upstream(answer)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "loadtest", "run", "--target", upstream.url, "--scenario", "chat", "--duration", "1h"),
        *("--max-concurrency", "2", "--save-result", result, *options),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
    )
    await seen.wait()
    return process


async def test_a_run_that_is_interrupted_tells_what_it_saw(start_upstream: StartUpstream, tmp_path: Path) -> None:
    result = tmp_path / "r.json"
    process = await endless_run(start_upstream, result)
    process.send_signal(signal.SIGINT)
    out, _ = await process.communicate()
    assert process.returncode == 130
    assert b"INTERRUPTED: " in out
    numbers = orjson.loads(result.read_bytes())
    assert numbers["interrupted"]
    assert numbers["completed"] > 0


async def test_what_the_others_saw_is_told_when_a_generator_dies(start_upstream: StartUpstream, tmp_path: Path) -> None:
    result = tmp_path / "r.json"
    process = await endless_run(start_upstream, result, "--workers", "1")
    [generator] = set(tree(process.pid)) - {process.pid}
    os.kill(generator, signal.SIGKILL)
    out, _ = await process.communicate()
    assert process.returncode == 1
    assert b"VOID: a generator process died" in out
    assert orjson.loads(result.read_bytes())["completed"] > 0


async def test_results_are_kept_when_nobody_reads_the_output(edge: Edge, tmp_path: Path) -> None:
    result = tmp_path / "r.json"
    reading, writing = os.pipe()
    os.close(reading)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "loadtest", "run", *at(edge), "--num-prompts", "3", "--save-result", result),
        cwd=ROOT,
        stdout=writing,
        stderr=asyncio.subprocess.PIPE,
    )
    os.close(writing)
    _, err = await process.communicate()
    assert process.returncode == 141
    assert err == b""
    assert orjson.loads(result.read_bytes())["completed"] == 3


async def test_the_bytes_of_every_stream_are_exact_and_answers_to_one_question_equal(
    exact_edge: Edge, edge: Edge
) -> None:
    short = ("--num-prompts", "20", "--output-len", "3")
    for ran in (
        await loadtest("run", *at(exact_edge), *short, "--exact"),
        await loadtest("run", *at(edge), *short, "--equal"),
    ):
        assert ran.code == 0, ran
    other = await loadtest("run", *at(edge), *short, "--exact")
    assert other.code == 1
    assert re.search(r"an event differs from what was sent: +20\n", other.out)


async def test_failures_are_told_by_kind_and_fail_the_run(edge: Edge) -> None:
    ran = await loadtest(
        *("run", *at(edge), "--num-prompts", "6", "--num-warmups", "0"),
        *("--extra-body", '{"simulate": {"fault": "cut", "after": 2}}'),
    )
    assert ran.code == 1
    # The edge says what happened before it gives up, in an event of its own.
    assert re.search(r"Failed requests: +6\n  an error inside the stream: +6\n", ran.out)


async def test_a_wrong_key_is_told_once_with_the_servers_words(edge: Edge) -> None:
    ran = await loadtest("run", *at(edge), "--api-key", "sk-wrong")
    assert ran.code == 1
    assert ran.out == ""
    assert "does not serve: status 401 invalid_api_key" in ran.err
    assert "give one with --api-key" in ran.err
    assert ran.err.count("\n") == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ("run", "--target", "ftp://h"),
        ("run", "--target", "http://user:secret@h"),
        ("run", "--request-rate", "0"),
        ("run", "--num-prompts", "0"),
        ("run", "--goodput", "speed:1"),
        ("run", "--percentile-metrics", "speed"),
        ("run", "--scenario", "chat", "--goodput", "ttft:1"),
        ("run", "--extra-body", "[]"),
        ("run", "--html", "/no/such/directory/x.html"),
        ("run", "--save-result", "/"),
        ("run", "--target", "http://a..b"),
        ("run", "--timeout", "nan"),
        ("run", "--timeout", "-1"),
        ("run", "--num-warmups", "-1"),
        ("run", "--goodput", "e2el:nan"),
        ("run", "--burstiness", "inf"),
        ("soak", "--target", "h"),
        ("soak", "--pid", "0"),
        ("soak", "--duration", "long"),
        ("soak", "--duration", "nan"),
        ("soak", "--duration", "0"),
        ("run", "--header", "no header"),
        ("run", "--header", "X: a\r\nY: b"),
        ("run", "--prompts", "/no/such/file.jsonl"),
        ("run", "--image", "big"),
        ("run", "--scenario", "embeddings", "--image", "8x8"),
        ("run", "--scenario", "completions", "--turns", "2"),
        ("run", "--num-inputs", "2"),
        ("run", "--duration", "1m"),
        ("run", "--speed", "0"),
        ("run", "--rates", "1,0"),
        ("run", "--slo-share", "2"),
        ("run", "--metadata", "commit"),
        ("run", "--scenario", "messages-stream", "--exact"),
        ("soak", "--target", "http://h", "http://g"),
        ("diff", "/no/such/file.json", "/no/such/file.json"),
        ("fly",),
        (),
    ],
)
def test_wrong_usage_is_told_before_anything_is_sent(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process: an interpreter each would cost more than all the rest. An exception would be a traceback."""
    monkeypatch.setattr(sys, "argv", ["loadtest", *arguments])
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # the handler would stay
    try:
        code: object = main()
    except SystemExit as left:
        code = left.code
    assert code == 2
    assert capsys.readouterr().err


async def test_wrong_usage_of_the_command_is_its_exit_code_without_a_traceback() -> None:
    ran = await loadtest("run", "--request-rate", "0")
    assert ran.code == 2
    assert "request rate" in ran.err
    assert "Traceback" not in ran.err


async def test_a_soak_holds_streams_checks_them_and_watches_a_process(exact_edge: Edge, tmp_path: Path) -> None:
    result, page = tmp_path / "s.json", tmp_path / "s.html"
    ran = await loadtest(
        *("soak", *at(exact_edge), "--streams", "5", "--duration", "1500ms", "--output-len", "10", "--interval", "20"),
        *("--exact", "--pid", str(os.getpid()), "--save-result", result, "--html", page),
    )
    assert ran.code == 0, ran
    numbers = orjson.loads(result.read_bytes())
    assert numbers["streams_completed"] >= 5
    assert numbers["streams_failed"] == 0
    assert numbers["problems"] == []
    assert "too short to tell" in numbers["notes"][0]
    assert numbers["looks"][0]["memory_bytes"] > 0
    assert numbers["looks"][0]["descriptors"] > 0
    assert page.read_text().count("<figure") == 3


async def test_a_soak_fails_when_a_stream_breaks(start_edge: StartEdge, start_upstream: StartUpstream) -> None:
    async def cut(connection: ScriptedConnection) -> None:
        await connection.send(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
            b'12\r\ndata: {"choices": \r\n'
        )
        connection.reset()

    upstream = await start_upstream(cut)
    edge = await start_edge(ROUTES.replace("{upstream}", upstream.url))
    ran = await loadtest("soak", *at(edge), "--streams", "2", "--duration", "0.1")
    assert ran.code == 1
    assert re.search(r"FAILED: \d+ streams: connection lost", ran.out)


async def test_never_more_requests_are_with_the_server_than_asked_warm_ups_included(
    start_upstream: StartUpstream,
) -> None:
    live = most = 0

    async def answer(connection: ScriptedConnection) -> None:
        nonlocal live, most
        live += 1
        most = max(most, live)
        await connection.send(b'HTTP/1.1 200 OK\r\nContent-Length: 16\r\n\r\n{"choices":[{}]}')
        live -= 1

    upstream = await start_upstream(answer)
    ran = await loadtest(
        *("run", "--target", upstream.url, "--scenario", "chat", "--num-prompts", "5", "--request-rate", "200"),
        *("--max-concurrency", "1", "--num-warmups", "5", "--workers", "1"),
    )
    assert most == 1
    assert re.search(r"Peak concurrent requests: +1\n", ran.out)


async def test_a_run_that_is_terminated_takes_its_generators_along(start_upstream: StartUpstream) -> None:
    """They would go on sending, into whatever is measured next."""
    asked = asyncio.Event()

    async def silent(connection: ScriptedConnection) -> None:
        asked.set()
        await connection.reader.read()
        gone.set()

    gone = asyncio.Event()
    upstream = await start_upstream(silent)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "loadtest", "run", "--target", upstream.url, "--num-prompts", "1"),
        *("--num-warmups", "0"),
        cwd=ROOT,
    )
    await asked.wait()
    process.terminate()
    assert await process.wait() == 143
    await gone.wait()
