"""`run`: an open loop of requests against any OpenAI-compatible URL (Linux).

Send times are drawn up front and split among worker processes; a slow answer never delays the next request unless
`--max-concurrency` asks for it, and then the wait is part of the latency and told apart. At the rate `inf` there are no
times to keep, so latency counts from the send. A run in which the generator was late, or had no time left, is void.
"""

import argparse
import asyncio
import contextlib
import errno
import itertools
import math
import multiprocessing
import os
import queue
import resource
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Event
from typing import Any, Final

import orjson
import uvloop

from loadtest import report, results, target
from loadtest.alarm import Alarm
from loadtest.arrivals import schedule
from loadtest.client import Connections, Sample
from loadtest.results import Outcome
from loadtest.target import Target, at_least, positive
from loadtest.upstream import Wish
from loadtest.workload import SCENARIOS, Answer, Kept, Scenario, numbered, refusal

MAX_LAG_P99_MS: Final = 10.0  # a generator later than this measures itself
MAX_BUSY: Final = 0.9  # of a core, by one generator process
_OWN_ERRORS: Final = {f"connect: {os.strerror(each)}" for each in (errno.EMFILE, errno.ENFILE, errno.EADDRNOTAVAIL)}
_MIN_JUDGED_S: Final = 2.0  # a shorter burst always fills the generator's core
_PROGRESS_INTERVAL_S: Final = 0.2
_START_IN_S: Final = 0.1
_READY_INTERVAL_S: Final = 0.002
_CONNECT_AT_ONCE: Final = 100  # fewer than any listener's backlog


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run sends; `times` None asks for all at once. `equal`: every answer must be the first one's copy."""

    target: Target
    scenario: Scenario
    body: bytes
    count: int
    times: Sequence[float] | None
    seed: int
    warmups: int
    max_concurrency: int | None
    timeout_s: float | None
    exact: bool
    equal: bool


@dataclass(slots=True)
class Generated:
    """What became of the requests, by their start; `busy`: the share of its core that the busiest generator used."""

    outcomes: list[Outcome]
    busy: float


class GeneratorDied(Exception):
    """A generator process ended before its work was done."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `run`; named as `vllm bench serve` names them."""
    target.add_arguments(parser)
    add = parser.add_argument
    add("--scenario", choices=SCENARIOS, default="chat-stream", metavar="NAME", help=f"one of {', '.join(SCENARIOS)}")
    add("--input-len", type=positive, metavar="CHARACTERS", help="of the prompt, instead of the scenario's")
    add("--output-len", type=positive, metavar="TOKENS", help="asked for, instead of the scenario's")
    add("--extra-body", type=_members, default={}, metavar="JSON", help="such as '{\"ignore_eos\": true}'")
    add("--request-rate", type=float, default=float("inf"), metavar="PER_SECOND", help="inf (default): all at once")
    add("--burstiness", type=float, default=1.0, metavar="SHAPE", help="of the gaps: 1 Poisson, below 1 in bursts")
    add("--max-concurrency", type=positive, metavar="N", help="never more than N at once; the wait is told apart")
    add("--num-prompts", type=positive, default=1000, metavar="N", help="requests; default: %(default)s")
    add(
        "--num-warmups",
        type=at_least(0),
        default=10,
        metavar="N",
        help="before the run, not counted; default: %(default)s",
    )
    add(
        "--timeout",
        type=_timeout_s,
        default=600.0,
        metavar="S",
        help="of a whole answer, 0: none; default: %(default)g",
    )
    add("--goodput", nargs="+", default=[], metavar="NAME:MS", help="such as ttft:200 tpot:50 e2el:5000")
    add("--percentile-metrics", default=",".join(results.METRICS), metavar="NAMES", help="shown; default: %(default)s")
    add("--metric-percentiles", default="50,90,99,99.9", metavar="NUMBERS", help="default: %(default)s")
    workers = max(1, len(os.sched_getaffinity(0)) - 1)
    add("--workers", type=positive, default=workers, metavar="N", help="generator processes; default: %(default)s")
    add("--seed", type=int, default=0, help="of the arrivals and the prompts")
    add("--save-detailed", action="store_true", help="every request's own numbers too")
    check = parser.add_mutually_exclusive_group()
    check.add_argument("--exact", action="store_true", help="the upstream is loadtest.upstream: check every byte")
    check.add_argument("--equal", action="store_true", help="ask the same each time; every answer must be the same")


def main(arguments: argparse.Namespace) -> int:
    """Run; return 0, or 1 when a request failed or the run is void, 2 when it cannot be what was asked for."""
    try:
        goodput = results.parse_goodput(arguments.goodput)
        percentiles = results.parse_percentiles(arguments.metric_percentiles)
        shown = results.parse_metrics(arguments.percentile_metrics)
        plan = plan_of(arguments)
        if not plan.scenario.stream and (plan.exact or goodput.keys() - {"e2el"}):
            raise ValueError(f"{arguments.scenario} is no stream: it has no ttft, no tpot and no events to check")
    except ValueError as error:
        print(f"loadtest run: {error}", file=sys.stderr)
        return 2
    if plan.warmups and (problem := uvloop.run(_try(plan))):
        print(f"loadtest run: {arguments.target} does not serve: {problem}", file=sys.stderr)
        return 1
    try:
        generated = generate(plan, arguments.workers)
    except GeneratorDied as error:
        print(f"loadtest run: {error}", file=sys.stderr)
        return 1
    outcomes = generated.outcomes
    numbers = results.summary(outcomes, percentiles, goodput)
    numbers["generator_busy"] = generated.busy
    numbers["void"] = void(numbers)
    facts = {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "target": arguments.target,
        "model_id": arguments.model,
        "scenario": arguments.scenario,
        "num_prompts": arguments.num_prompts,
        "request_rate": "inf" if plan.times is None else arguments.request_rate,
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


def plan_of(arguments: argparse.Namespace) -> Plan:
    """Return what the arguments ask for; raises `ValueError`."""
    scenario = SCENARIOS[arguments.scenario]
    scenario = replace(
        scenario,
        input_len=arguments.input_len or scenario.input_len,
        output_len=arguments.output_len or scenario.output_len,
    )
    members = arguments.extra_body
    if arguments.exact:
        members = {"user": Wish(scenario.output_len).text(), **members}
    times = schedule(arguments.num_prompts, arguments.request_rate, arguments.burstiness, arguments.seed)
    return Plan(
        Target(arguments.target, arguments.api_key, arguments.host),
        scenario,
        scenario.body(arguments.model, members),
        arguments.num_prompts,
        None if arguments.request_rate == float("inf") else times,
        arguments.seed,
        arguments.num_warmups,
        arguments.max_concurrency,
        arguments.timeout or None,
        arguments.exact,
        arguments.equal,
    )


def void(numbers: dict[str, Any]) -> list[str]:
    """Return why the numbers are the generator's own and not the target's; empty when they are the target's."""
    reasons = []
    if numbers["error_counts"].keys() & _OWN_ERRORS:
        reasons.append("the generator ran out of descriptors or ports")
    if numbers["generator_lag_p99_ms"] > MAX_LAG_P99_MS:
        reasons.append(f"the generator was over {MAX_LAG_P99_MS:g} ms late for one request in a hundred")
    if numbers["generator_busy"] > MAX_BUSY and numbers["duration"] > _MIN_JUDGED_S:
        reasons.append(f"a generator process used {numbers['generator_busy']:.0%} of its core")
    return reasons


def table(numbers: dict[str, Any], shown: Sequence[str], percentiles: Sequence[float]) -> str:
    """Return the numbers for a terminal."""
    rows = [
        ("Successful requests", f"{numbers['completed']}"),
        ("Failed requests", f"{numbers['failed']}"),
        *((f"  {error}", f"{count}") for error, count in numbers["error_counts"].items()),
        ("Benchmark duration (s)", f"{numbers['duration']:.2f}"),
        ("Request throughput (req/s)", f"{numbers['request_throughput']:.2f}"),
        ("Output token throughput (tok/s)", f"{numbers['output_throughput']:.2f}"),
        ("Peak concurrent requests", f"{numbers['max_concurrent_requests']}"),
    ]
    if numbers["request_goodput"] is not None:
        rows.append(("Request goodput (req/s)", f"{numbers['request_goodput']:.2f}"))
    for metric in shown:
        if f"mean_{metric}_ms" in numbers:
            rows.append((f"Mean {metric.upper()} (ms)", f"{numbers[f'mean_{metric}_ms']:.2f}"))
            rows += [
                (f"P{each:g} {metric.upper()} (ms)", f"{numbers[f'p{each:g}_{metric}_ms']:.2f}") for each in percentiles
            ]
    spread = {"Queue time": "queue_time", "Generator lag": "generator_lag"}
    for name, key in spread.items():
        three = " / ".join(f"{numbers[f'{key}_{each}_ms']:.2f}" for each in ("p50", "p99", "max"))
        if key == "generator_lag" or numbers[f"{key}_max_ms"]:
            rows.append((f"{name} p50 / p99 / max (ms)", three))
    rows.append(("Generator busy (of a core)", f"{numbers['generator_busy']:.0%}"))
    lines = [f"{name + ':':<40} {value:>12}" for name, value in rows]
    lines += [f"VOID: {reason}. Lower the rate or add workers." for reason in numbers["void"]]
    return "\n".join(lines)


def generate(plan: Plan, workers: int) -> Generated:
    """Send the requests from so many processes; raises `GeneratorDied`."""
    _allow_descriptors()
    context = multiprocessing.get_context("spawn")
    workers = min(workers, plan.count, plan.max_concurrency or workers)
    shared = _Shared(
        context.Value("q", 0), context.Value("q", 0), context.Value("q", 0), context.Value("d", 0.0), context.Event()
    )
    answers: multiprocessing.Queue[tuple[list[Outcome], float]] = context.Queue()
    processes = [
        context.Process(target=_work, args=(plan, index, workers, shared, answers), daemon=True)
        for index in range(workers)
    ]
    for process in processes:
        process.start()
    outcomes: list[Outcome] = []
    busy, waiting = 0.0, workers
    while waiting:
        if not shared.begun.is_set() and shared.ready.value == workers:
            shared.begin_at.value = time.monotonic() + _START_IN_S
            shared.begun.set()
        try:
            some, share = answers.get(timeout=_PROGRESS_INTERVAL_S if shared.begun.is_set() else _READY_INTERVAL_S)
        except queue.Empty:
            if any(process.exitcode for process in processes):
                raise GeneratorDied("a generator process died; what it wrote stands above") from None
            _progress(shared, plan.count)
        else:
            outcomes += some
            busy = max(busy, share)
            waiting -= 1
    _progress(shared, plan.count, last=True)
    for process in processes:
        process.join()
    return Generated(sorted(outcomes, key=lambda each: each.start), busy)


@dataclass(frozen=True, slots=True)
class _Shared:
    """What the processes of a run tell each other; `begin_at` counts once `begun` is set."""

    ready: "Synchronized[int]"
    finished: "Synchronized[int]"
    failed: "Synchronized[int]"
    begin_at: "Synchronized[float]"
    begun: Event


def _progress(shared: _Shared, total: int, last: bool = False) -> None:
    if sys.stderr.isatty():
        done, failed = shared.finished.value, shared.failed.value
        filled = 40 * done // total
        bar = "#" * filled + "." * (40 - filled)
        text = f"\r[{bar}] {done}/{total}" + (f", {failed} failed" if failed else "")
        print(text, end="\n" if last else "", file=sys.stderr, flush=True)


def _work(
    plan: Plan, index: int, workers: int, shared: _Shared, answers: "multiprocessing.Queue[tuple[list[Outcome], float]]"
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it and ends its daemons
    _allow_descriptors()
    answers.put(uvloop.run(_send_share(plan, index, workers, shared)))


async def _send_share(plan: Plan, index: int, workers: int, shared: _Shared) -> tuple[list[Outcome], float]:
    return await _Worker(plan, index, workers, shared).send_all()


def _allow_descriptors() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


async def _try(plan: Plan) -> str:
    """Return what is wrong with one answer, so that a wrong key is told once and not a thousand times."""
    connections = Connections(plan.target.address())
    kept = Kept()
    request = plan.target.request(plan.scenario.kind, plan.body)
    sample = await connections.request(request, kept, timeout_s=plan.timeout_s)
    connections.close()
    if sample.error or sample.ok:
        return sample.error
    return f"{refusal(sample.status, kept.whole)}: {(kept.whole or b'')[:500].decode(errors='replace')}"


class _Worker:
    """One process's part of a run: every `workers`th request, from `index` on."""

    def __init__(self, plan: Plan, index: int, workers: int, shared: _Shared) -> None:
        self._plan = plan
        self._shared = shared
        self._numbers = range(index, plan.count, workers)
        self._warmups = len(range(index, plan.warmups, workers))
        self._raw = plan.target.request(plan.scenario.kind, plan.body)
        self._connections = Connections(plan.target.address())
        self._places: asyncio.Semaphore | None = None
        if plan.max_concurrency:
            self._places = asyncio.Semaphore(len(range(index, plan.max_concurrency, workers)))
        self._outcomes: list[Outcome] = []
        self._digest: int | None = None
        self._begun = 0.0

    async def send_all(self) -> tuple[list[Outcome], float]:
        """Return what became of the requests, and the share of a core that sending them took."""
        plan, shared = self._plan, self._shared
        alarm = Alarm()
        await self._warm()
        with shared.ready.get_lock():
            shared.ready.value += 1
        await asyncio.to_thread(shared.begun.wait)
        self._begun = shared.begin_at.value
        cpu_s = time.process_time()
        async with asyncio.TaskGroup() as group:
            for number in self._numbers:
                # Made before its time has come: numbering a body of 10 MB takes a millisecond.
                raw = self._raw if plan.equal else numbered(self._raw, (plan.seed << 20) + number)
                at = self._begun + (plan.times[number] if plan.times is not None else 0.0)
                await alarm.until(at)
                group.create_task(self._one(raw, at))
        elapsed_s = time.monotonic() - self._begun
        busy = (time.process_time() - cpu_s) / elapsed_s
        alarm.close()
        self._connections.close()
        return self._outcomes, busy

    async def _warm(self) -> None:
        if self._warmups:
            async with asyncio.TaskGroup() as group:
                for _ in range(self._warmups):
                    group.create_task(self._warm_up(), name="warm-up")
        if self._plan.times is None:  # or a thousand handshakes would be the first thing that is measured
            wanted = min(len(self._numbers), self._plan.max_concurrency or len(self._numbers))
            for first in range(self._warmups, wanted, _CONNECT_AT_ONCE):
                try:
                    await self._connections.warm(min(_CONNECT_AT_ONCE, wanted - first))
                except OSError:
                    return  # its requests will tell

    async def _warm_up(self) -> None:
        async with self._places or contextlib.nullcontext():
            await self._connections.request(self._raw, timeout_s=self._plan.timeout_s)

    async def _one(self, raw: bytes, at: float) -> None:
        plan, places = self._plan, self._places
        ready = time.monotonic()
        if places is not None:
            await places.acquire()
        queued = time.monotonic() - ready if places is not None else 0.0
        kept = Kept()
        try:
            sample = await self._connections.request(raw, kept, at, timeout_s=plan.timeout_s)
        finally:
            if places is not None:
                places.release()
        outcome = self._outcome(sample, kept, at, queued)
        self._outcomes.append(outcome)
        with self._shared.finished.get_lock():
            self._shared.finished.value += 1
            self._shared.failed.value += bool(outcome.error)

    def _outcome(self, sample: Sample, kept: Kept, at: float, queued: float) -> Outcome:
        plan = self._plan
        open_loop = plan.times is not None
        begun = sample.sent - sample.connect_s
        since = at if open_loop else begun
        lag = max(0.0, sample.sent - at - queued - sample.connect_s) if open_loop else 0.0
        outcome = Outcome(
            since - self._begun, sample.finished - self._begun, begun - self._begun, lag, queued, sample.error
        )
        if sample.error:
            return outcome
        if not sample.ok:
            outcome.error = refusal(sample.status, kept.whole)
            return outcome
        answer = Answer(plan.scenario.stream, plan.scenario.output_len if plan.exact else None)
        kept.tell(answer)
        outcome.error = answer.end()
        if plan.equal and not outcome.error:
            self._digest = answer.digest if self._digest is None else self._digest
            outcome.error = "" if answer.digest == self._digest else "an answer differs from the first"
        if answer.content_times:
            outcome.ttft = answer.content_times[0] - since
            outcome.e2el = answer.content_times[-1] - since
            outcome.itls = [after - before for before, after in itertools.pairwise(answer.content_times)]
        else:
            outcome.e2el = sample.finished - since
        outcome.input_tokens, outcome.output_tokens = answer.input_tokens, answer.output_tokens
        return outcome


def _timeout_s(text: str) -> float:
    timeout_s = float(text)
    if not 0 <= timeout_s < math.inf:
        raise argparse.ArgumentTypeError("seconds, at least 0")
    return timeout_s


def _members(text: str) -> dict[str, object]:
    document = orjson.loads(text)
    if not isinstance(document, dict):
        raise argparse.ArgumentTypeError("not a JSON object")
    return document
