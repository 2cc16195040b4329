"""`run`: an open loop of requests against any OpenAI-compatible URL.

Send times are drawn up front and split among worker processes; an answer's slowness never delays the next request
unless `--max-concurrency` asks for it, and then the wait is part of the latency and told apart. A run whose generator
could not keep its schedule is void.
"""

import argparse
import asyncio
import multiprocessing
import os
import queue
import ssl
import sys
import time
from dataclasses import dataclass
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import orjson
import uvloop

from loadtest import report, results
from loadtest.arrivals import schedule
from loadtest.client import Address, Connections
from loadtest.results import Outcome
from loadtest.workload import SCENARIOS, Scenario, Tokens, raw_request, understand

_START_IN_S: Final = 1.0  # workers import and connect in the meantime
MAX_LAG_P99_MS: Final = 10.0  # a generator later than this measures itself
_PROGRESS_INTERVAL_S: Final = 0.2


@dataclass(frozen=True, slots=True)
class Target:
    """Where requests go, and as whom."""

    url: str
    key: str
    host: str | None

    def address(self) -> Address:
        """Return the address; raises `ValueError` for what is no URL of HTTP."""
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"target {self.url!r}: write http://host:port")
        tls = ssl.create_default_context() if parts.scheme == "https" else None
        return Address(parts.hostname, parts.port or (443 if tls else 80), tls)

    def request(self, kind: str, body: bytes) -> bytes:
        """Return a raw request; a path in the URL takes the place of `/v1`."""
        parts = urlsplit(self.url)
        return raw_request(
            kind, body, host=self.host or parts.netloc, key=self.key, base_path=parts.path.rstrip("/") or "/v1"
        )


@dataclass(frozen=True, slots=True)
class Plan:
    """What one worker does."""

    target: Target
    scenario: Scenario
    model: str
    times: list[float]
    warmups: int
    max_concurrency: int | None
    start_at: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `run`; named as `vllm bench serve` names them."""
    add = parser.add_argument
    add("--target", default="http://127.0.0.1:8080", metavar="URL", help="default: %(default)s")
    add("--api-key", default=os.environ.get("OPENAI_API_KEY", ""), help="default: $OPENAI_API_KEY")
    add("--host", help="the Host header, when it is not the URL's")
    add("--model", default="public/deepseek-r1", help="default: %(default)s")
    add("--scenario", choices=SCENARIOS, default="chat-stream", help="default: %(default)s")
    add("--input-len", type=int, metavar="CHARACTERS", help="of the prompt, instead of the scenario's")
    add("--output-len", type=int, metavar="TOKENS", help="asked for, instead of the scenario's")
    add("--request-rate", type=float, default=float("inf"), metavar="PER_SECOND", help="inf (default): all at once")
    add("--burstiness", type=float, default=1.0, help="shape of the gaps: 1 Poisson, below 1 in bursts")
    add("--max-concurrency", type=int, metavar="N", help="never more than N at once; the wait is told apart")
    add("--num-prompts", type=int, default=1000, metavar="N", help="requests; default: %(default)s")
    add("--num-warmups", type=int, default=10, metavar="N", help="before the run, not counted")
    add("--goodput", nargs="+", default=[], metavar="NAME:MS", help="such as ttft:200 tpot:50 e2el:5000")
    add("--percentile-metrics", default=",".join(results.METRICS), help="shown; default: %(default)s")
    add("--metric-percentiles", default="50,90,99,99.9", help="default: %(default)s")
    add("--workers", type=int, default=max(1, len(os.sched_getaffinity(0)) - 1), help="generator processes")
    add("--seed", type=int, default=0)
    add("--save-result", type=Path, metavar="FILE", help="the numbers as JSON, under vllm's names")
    add("--save-detailed", action="store_true", help="with every request's own numbers")
    add("--html", type=Path, metavar="FILE", help="a page with plots")


def main(arguments: argparse.Namespace) -> int:
    """Run; return 0, or 1 when a request failed or the run is void."""
    try:
        goodput = results.parse_goodput(arguments.goodput)
        percentiles = [float(each) for each in arguments.metric_percentiles.split(",")]
        shown = arguments.percentile_metrics.split(",")
        times = schedule(arguments.num_prompts, arguments.request_rate, arguments.burstiness, arguments.seed)
        target = Target(arguments.target, arguments.api_key, arguments.host)
        target.address()
    except ValueError as error:
        print(f"loadtest run: {error}", file=sys.stderr)
        return 2
    scenario = SCENARIOS[arguments.scenario]
    scenario = Scenario(
        scenario.kind,
        scenario.stream,
        scenario.input_len if arguments.input_len is None else arguments.input_len,
        scenario.output_len if arguments.output_len is None else arguments.output_len,
    )
    outcomes = generate(
        target, scenario, arguments.model, times, arguments.workers, arguments.num_warmups, arguments.max_concurrency
    )
    ends = [each.start + each.e2el for each in outcomes if not each.error] or [each.start for each in outcomes]
    duration_s = max(max(ends, default=0.0), 1e-9)
    numbers = results.summary(outcomes, duration_s, percentiles, goodput)
    numbers["void"] = numbers["generator_lag_p99_ms"] > MAX_LAG_P99_MS
    facts = {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "target": arguments.target,
        "model_id": arguments.model,
        "scenario": arguments.scenario,
        "num_prompts": arguments.num_prompts,
        "request_rate": "inf" if arguments.request_rate == float("inf") else arguments.request_rate,
        "burstiness": arguments.burstiness,
        "max_concurrency": arguments.max_concurrency,
        "workers": arguments.workers,
        "seed": arguments.seed,
    }
    print(table(numbers, shown, percentiles))
    if arguments.save_result:
        document = facts | numbers | (results.detailed(outcomes) if arguments.save_detailed else {})
        arguments.save_result.write_bytes(orjson.dumps(document, option=orjson.OPT_INDENT_2))
    if arguments.html:
        arguments.html.write_text(report.run_page(facts, numbers, outcomes, shown, percentiles))
    return 1 if numbers["failed"] or numbers["void"] else 0


def table(numbers: dict[str, Any], shown: list[str], percentiles: list[float]) -> str:
    """Return the numbers for a terminal."""
    rows = [
        ("Successful requests", f"{numbers['completed']}"),
        ("Failed requests", f"{numbers['failed']}"),
        *((f"  {error}", f"{count}") for error, count in numbers["error_counts"].items()),
        ("Benchmark duration (s)", f"{numbers['duration']:.2f}"),
        ("Request throughput (req/s)", f"{numbers['request_throughput']:.2f}"),
        ("Output token throughput (tok/s)", f"{numbers['output_throughput']:.2f}"),
    ]
    if numbers["request_goodput"] is not None:
        rows.append(("Request goodput (req/s)", f"{numbers['request_goodput']:.2f}"))
    for metric in shown:
        if f"mean_{metric}_ms" in numbers:
            rows.append((f"Mean {metric.upper()} (ms)", f"{numbers[f'mean_{metric}_ms']:.2f}"))
            rows += [
                (f"P{each:g} {metric.upper()} (ms)", f"{numbers[f'p{each:g}_{metric}_ms']:.2f}") for each in percentiles
            ]
    rows.append(("Generator lag p99 (ms)", f"{numbers['generator_lag_p99_ms']:.2f}"))
    lines = [f"{name + ':':<40} {value:>12}" for name, value in rows]
    if numbers["void"]:
        lines.append(
            f"VOID: the generator was more than {MAX_LAG_P99_MS:g} ms late for one request in a hundred. "
            "Lower the rate or add workers."
        )
    return "\n".join(lines)


def generate(
    target: Target,
    scenario: Scenario,
    model: str,
    times: list[float],
    workers: int,
    warmups: int,
    max_concurrency: int | None,
) -> list[Outcome]:
    """Send the requests from `workers` processes; return what became of each, in the order of their start."""
    context = multiprocessing.get_context("spawn")
    finished = context.Value("q", 0)
    answers: multiprocessing.Queue[list[Outcome]] = context.Queue()
    start_at = time.monotonic() + _START_IN_S
    workers = max(1, min(workers, len(times), max_concurrency or workers))
    processes = []
    for index in range(workers):
        share = None if max_concurrency is None else max_concurrency // workers + (index < max_concurrency % workers)
        plan = Plan(target, scenario, model, times[index::workers], -(-warmups // workers), share, start_at)
        processes.append(context.Process(target=_work, args=(plan, finished, answers), daemon=True))
    for process in processes:
        process.start()
    outcomes: list[Outcome] = []
    waiting = workers
    while waiting:
        try:
            outcomes += answers.get(timeout=_PROGRESS_INTERVAL_S)
            waiting -= 1
        except queue.Empty:
            _progress(finished.value, len(times))
            if any(process.exitcode for process in processes):
                raise RuntimeError("a generator process died") from None
    _progress(len(times), len(times), last=True)
    for process in processes:
        process.join()
    return sorted(outcomes, key=lambda each: each.start)


def _progress(done: int, total: int, last: bool = False) -> None:
    if sys.stderr.isatty():
        filled = 40 * done // max(total, 1)
        bar = "#" * filled + "." * (40 - filled)
        print(f"\r[{bar}] {done}/{total}", end="\n" if last else "", file=sys.stderr, flush=True)


def _work(plan: Plan, finished: "Synchronized[int]", answers: "multiprocessing.Queue[list[Outcome]]") -> None:
    answers.put(uvloop.run(_send_all(plan, finished)))


async def _send_all(plan: Plan, finished: "Synchronized[int]") -> list[Outcome]:
    connections = Connections(plan.target.address())
    body = plan.scenario.body(plan.model)
    raw = plan.target.request(plan.scenario.kind, body)
    for _ in range(plan.warmups):
        await connections.request(raw)
    outcomes: list[Outcome] = []
    places = asyncio.Semaphore(plan.max_concurrency) if plan.max_concurrency else None
    begun = max(plan.start_at, time.monotonic())

    async def one(offset: float) -> None:
        intended = begun + offset
        ready = time.monotonic()
        if places is not None:
            await places.acquire()
        queued = time.monotonic() - ready
        tokens = Tokens()
        sample = await connections.request(raw, tokens, intended)
        if places is not None:
            places.release()
        error = sample.error or ("" if sample.ok else f"status {sample.status}")
        outcome = Outcome(offset, max(0.0, ready - intended), queued, error)
        if not error:
            told = understand(tokens, plan.scenario.stream)
            outcome.error = told.problem
            seen = told.content_times or [sample.first_byte, sample.finished]
            outcome.ttft = seen[0] - intended
            outcome.e2el = seen[-1] - intended
            outcome.itls = [after - before for before, after in zip(seen, seen[1:], strict=False)]
            if not plan.scenario.stream:
                outcome.itls = []
            outcome.input_tokens, outcome.output_tokens = told.input_tokens, told.output_tokens
        outcomes.append(outcome)
        with finished.get_lock():
            finished.value += 1

    async with asyncio.TaskGroup() as group:
        for offset in plan.times:
            delay = begun + offset - time.monotonic()
            if delay > 0:
                await asyncio.sleep(delay)
            group.create_task(one(offset))
    connections.close()
    return outcomes
