"""`run`: an open loop of requests against any OpenAI-compatible URL (Linux).

Send times are drawn up front and split among worker processes; a slow answer never delays the next request unless
`--max-concurrency` asks for it, and then the wait is part of the latency and told apart. At the rate `inf` there are no
times to keep, so latency counts from the send. A run in which the generator was late, or had no time left, is void.
"""

import argparse
import errno
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

import orjson
import uvloop

from loadtest import report, results, target
from loadtest.arrivals import schedule
from loadtest.client import Connections
from loadtest.generator import GeneratorDied, Plan, generate
from loadtest.hints import hint
from loadtest.target import Target, at_least, positive
from loadtest.upstream import Wish
from loadtest.workload import SCENARIOS, Kept, refusal

MAX_LAG_P99_MS: Final = 10.0  # a generator later than this measures itself
MAX_BUSY: Final = 0.9  # of a core, by one generator process
MAX_WAITED: Final = 0.02  # of the time, by one generator process, for a core that somebody else has
MAX_STEAL: Final = 0.02  # of the machine, by its hypervisor
_OWN_ERRORS: Final = {f"connect: {os.strerror(each)}" for each in (errno.EMFILE, errno.ENFILE, errno.EADDRNOTAVAIL)}
_MIN_JUDGED_S: Final = 2.0  # a shorter burst always fills the generator's core


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
        if meaning := hint(problem):
            print(f"loadtest run: {meaning}", file=sys.stderr)
        return 1
    try:
        generated = generate(plan, arguments.workers)
    except GeneratorDied as error:
        print(f"loadtest run: {error}", file=sys.stderr)
        return 1
    outcomes = generated.outcomes
    numbers = results.summary(outcomes, percentiles, goodput)
    numbers |= {
        "generator_busy": generated.busy,
        "generator_waited": generated.waited,
        "machine_steal": generated.steal,
    }
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
    if numbers["duration"] > _MIN_JUDGED_S:
        if numbers["generator_busy"] > MAX_BUSY:
            reasons.append(f"a generator process used {numbers['generator_busy']:.0%} of its core")
        if numbers["generator_waited"] > MAX_WAITED:
            waited = f"{numbers['generator_waited']:.0%} of the time for a core"
            reasons.append(f"a generator process waited {waited}: the server or another program had it")
        if numbers["machine_steal"] > MAX_STEAL:
            reasons.append(f"a hypervisor took {numbers['machine_steal']:.0%} of the machine")
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
        ("Tokens are those of", "the usage" if numbers["tokens"] == "usage" else "events, counted"),
        ("Peak concurrent requests", f"{numbers['max_concurrent_requests']}"),
    ]
    if numbers["request_goodput"] is not None:
        rows.append(("Request goodput (req/s)", f"{numbers['request_goodput']:.2f}"))
    for metric in shown:
        if f"mean_{metric}_ms" in numbers:
            name = results.label(metric)
            rows.append((f"Mean {name} (ms)", f"{numbers[f'mean_{metric}_ms']:.2f}"))
            rows += [
                (f"P{each:g} {name} (ms)", results.shown_ms(numbers[f"p{each:g}_{metric}_ms"])) for each in percentiles
            ]
    spread = {"Queue time": "queue_time", "Generator lag": "generator_lag"}
    for name, key in spread.items():
        three = " / ".join(f"{numbers[f'{key}_{each}_ms']:.2f}" for each in ("p50", "p99", "max"))
        if key == "generator_lag" or numbers[f"{key}_max_ms"]:
            rows.append((f"{name} p50 / p99 / max (ms)", three))
    rows.append(("Generator busy (of a core)", f"{numbers['generator_busy']:.0%}"))
    rows.append(("Generator waited for a core", f"{numbers['generator_waited']:.1%}"))
    lines = [f"{name + ':':<40} {value:>12}" for name, value in rows]
    lines += [f"{error}: {meaning}." for error in numbers["error_counts"] if (meaning := hint(error))]
    lines += [f"VOID: {reason}." for reason in numbers["void"]]
    if numbers["void"]:
        lines.append("Lower the rate, add workers, or leave the machine to the benchmark and its server.")
    return "\n".join(lines)


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
