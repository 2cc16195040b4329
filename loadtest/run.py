"""`run`: an open loop of requests against any OpenAI-compatible URL (Linux).

Send times are drawn up front and split among generator processes; a slow answer never delays the next request unless
`--max-concurrency` asks for it, and then the wait is told apart. At the rate `inf` there are no times to keep, so
latency counts from the send. A run in which the generator was late, or had no time left, is void. Ctrl-C ends a run
early and keeps what it saw.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Final

import uvloop

from loadtest import options, outputs, report, results, sweep, tables
from loadtest.answer import Kept, refusal
from loadtest.client import Connections
from loadtest.generator import generate
from loadtest.hints import hint
from loadtest.judgement import Asked, facts_of, numbers_of
from loadtest.outcome import Outcome
from loadtest.worker import Plan

_BY_SIGNAL: Final = 128  # and its number: the exit code of what a signal ended

add_arguments = options.add_arguments


def main(arguments: argparse.Namespace) -> int:
    """Run; return 0, or 1 when a request failed or the run is void, 2 when it cannot be what was asked for.

    130 and 143 when SIGINT or SIGTERM ended it; the numbers are told and written all the same.
    """
    try:
        asked = Asked(
            results.parse_goodput(arguments.goodput),
            results.parse_percentiles(arguments.metric_percentiles),
            results.parse_metrics(arguments.percentile_metrics),
        )
        plan = options.plan_of(arguments)
        if not plan.stream and (plan.exact or asked.goodput.keys() - {"e2el"}):
            raise ValueError(f"{arguments.scenario} is no stream: it has no ttft, no tpot and no events to check")
        requests_file = outputs.RequestsFile(arguments.save_requests)
    except (ValueError, OSError) as error:
        print(f"loadtest run: {error}", file=sys.stderr)
        return 2
    if plan.warmups and (problem := uvloop.run(_try(plan))):
        print(f"loadtest run: {problem}", file=sys.stderr)
        if meaning := hint(problem):
            print(f"loadtest run: {meaning}", file=sys.stderr)
        return 1
    with requests_file:
        if arguments.rates is not None:
            return sweep.run(arguments, plan, asked, requests_file)
        return _run(arguments, plan, asked, requests_file)


def _run(arguments: argparse.Namespace, plan: Plan, asked: Asked, requests_file: outputs.RequestsFile) -> int:
    kept: list[Outcome] = []

    def finished(outcome: Outcome) -> None:
        requests_file.add(outcome)
        if arguments.save_detailed:
            kept.append(outcome)

    facts = facts_of(arguments, plan)
    generated = generate(plan, arguments.workers, asked.goodput, finished)
    numbers = numbers_of(generated, plan, asked)
    # Written before they are printed: who reads that may be gone.
    document = facts | numbers
    if arguments.save_detailed:
        kept.sort(key=lambda each: each.start)
        document |= results.detailed(kept)
    if arguments.save_result:
        outputs.save_json(arguments.save_result, document)
    if arguments.csv:
        outputs.save_csv(arguments.csv, [facts | numbers])
    if arguments.html:
        arguments.html.write_text(report.run_page(facts, numbers, generated.tally, asked.shown, asked.percentiles))
    print(table(numbers, asked.shown, asked.percentiles, arguments.target))
    if generated.stopped:
        return _BY_SIGNAL + generated.stopped
    return 1 if numbers["failed"] or numbers["void"] else 0


def table(
    numbers: Mapping[str, Any], shown: Sequence[str], percentiles: Sequence[float], targets: Sequence[str] = ()
) -> str:
    """Return the numbers for a terminal."""
    rows = [
        ("Successful requests", f"{numbers['completed']}"),
        ("Failed requests", f"{numbers['failed']}"),
        *((f"  {error}", f"{count}") for error, count in numbers["error_counts"].items()),
        ("Benchmark duration (s)", f"{numbers['duration']:.2f}"),
        ("Request throughput (req/s)", f"{numbers['request_throughput']:.2f}"),
        ("Output token throughput (tok/s)", f"{numbers['output_throughput']:.2f}"),
        ("Peak output token throughput (tok/s)", f"{numbers['max_output_tokens_per_s']:.2f}"),
        ("Tokens are those of", "the usage" if numbers["tokens"] == "usage" else "events, counted"),
        ("Peak concurrent requests", f"{numbers['max_concurrent_requests']}"),
    ]
    if numbers["request_goodput"] is not None:
        rows.append(("Request goodput (req/s)", f"{numbers['request_goodput']:.2f}"))
    for metric in (*shown, *results.QUEUE_METRICS):
        if f"mean_{metric}_ms" in numbers:
            name = results.label(metric)
            rows.append((f"Mean {name} (ms)", f"{numbers[f'mean_{metric}_ms']:.2f}"))
            rows += [
                (f"P{each:g} {name} (ms)", results.shown_ms(numbers[f"p{each:g}_{metric}_ms"])) for each in percentiles
            ]
    lags = " / ".join(f"{numbers[f'generator_lag_{each}_ms']:.2f}" for each in ("p50", "p99", "max"))
    rows.append(("Generator lag p50 / p99 / max (ms)", lags))
    rows.append(("Generator busy (of a core)", f"{numbers['generator_busy']:.0%}"))
    rows.append(("Generator waited for a core", f"{numbers['generator_waited']:.1%}"))
    lines = tables.pairs(rows)
    lines += _groups("URL", targets, numbers.get("targets", ()))
    lines += _groups("turn", [str(each) for each in range(1, 1000)], numbers.get("turns", ()))
    lines += [f"{error}: {meaning}." for error in numbers["error_counts"] if (meaning := hint(error))]
    lines += [f"VOID: {reason}." for reason in numbers["void"]]
    if numbers["void"]:
        lines.append("Lower the rate, add workers, or leave the machine to the benchmark and its server.")
    if numbers["interrupted"]:
        lines.append(f"INTERRUPTED: {numbers['unfinished']} requests were given up, and are no part of the numbers.")
    return "\n".join(lines)


def _groups(name: str, names: Sequence[str], groups: Sequence[Mapping[str, Any]]) -> list[str]:
    if not groups:
        return []
    keys = ("p50_ttft_ms", "p99_ttft_ms", "p50_e2el_ms", "p99_e2el_ms")
    header = [name, "ok", "failed", "P50 TTFT", "P99 TTFT", "P50 E2EL", "P99 E2EL"]
    rows = [
        [names[at], str(each["completed"]), str(each["failed"]), *(results.shown_ms(each.get(key)) for key in keys)]
        for at, each in enumerate(groups)
    ]
    return ["", *tables.columns(header, rows), ""]


async def _try(plan: Plan) -> str:
    """Return what is wrong with one answer of a URL, so that a wrong key is told once and not a thousand times."""
    turn = plan.source.conversation(0)[0]
    for target in plan.targets:
        connections = Connections(target.address())
        kept = Kept()
        sample = await connections.request(plan.raw(target, turn.messages, turn), kept, timeout_s=plan.timeout_s)
        connections.close()
        if sample.error:
            return f"{target.url} does not serve: {sample.error}"
        if not sample.ok:
            told = (kept.whole or b"")[:500].decode(errors="replace")
            return f"{target.url} does not serve: {refusal(sample.status, kept.whole)}: {told}"
    return ""
