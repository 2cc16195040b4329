"""A sweep: the same load at several rates, and what they come to together."""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from loadtest import outputs, report, results, tables
from loadtest.arrivals import Arrivals
from loadtest.generator import generate
from loadtest.judgement import Asked, facts_of, numbers_of
from loadtest.options import arrivals_for
from loadtest.outputs import RequestsFile
from loadtest.search import Step, capacity, knee, next_rate
from loadtest.worker import Plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_DURATION_S: Final = 30.0  # of a step
_ALONE: Final = 5  # requests, one after the other, that show how long one takes
_FIRST_SHARE: Final = 0.5  # of what one client alone could ask for


def run(arguments: argparse.Namespace, plan: Plan, asked: Asked, requests_file: RequestsFile) -> int:
    """Sweep; return 0, 1 when no rate is served as asked, 130 or 143 by a signal. What was seen is told in any case."""
    sweep = Sweep(arguments, plan, asked, requests_file)
    try:
        code = sweep.measure()
    except KeyboardInterrupt:  # between two steps, or a second one
        code = 130
    document = sweep.document()
    if arguments.save_result:
        outputs.save_json(arguments.save_result, document)
    if arguments.csv:
        outputs.save_csv(arguments.csv, document["steps"])
    if arguments.html:
        arguments.html.write_text(page(document))
    print("\n".join(lines(document)))
    return code or (0 if document["capacity"] is not None else 1)


class Sweep:
    """The steps of a sweep as they are measured."""

    def __init__(self, arguments: argparse.Namespace, plan: Plan, asked: Asked, requests_file: RequestsFile) -> None:
        self._arguments, self._plan, self._asked = arguments, plan, asked
        self._requests_file = requests_file
        self._duration_s = arguments.duration or _DURATION_S
        self._numbers: list[dict[str, Any]] = []
        self.steps: list[Step] = []

    def measure(self) -> int:
        """Measure all rates; return the exit code of a signal that ended it, or 0."""
        if self._arguments.rates:
            for rate in self._arguments.rates:
                if code := self._step(rate):
                    return code
            return 0
        alone = replace(self._plan, arrivals=Arrivals(_ALONE), max_concurrency=1, duration_s=None)
        generated = generate(alone, 1)
        if generated.stopped or not generated.tally.completed:
            problem = next(iter(generated.tally.errors), generated.problem)
            print(f"loadtest run: nothing to begin with: {problem or 'interrupted'}", file=sys.stderr)
            return 128 + generated.stopped if generated.stopped else 1
        first = _FIRST_SHARE / generated.tally.values["e2el"].moments()[0]
        while (rate := next_rate(first, self.steps, self._arguments.slo_share)) is not None:
            if code := self._step(rate):
                return code
        return 0

    def _step(self, rate: float) -> int:
        arguments, plan = self._arguments, self._plan
        arrivals = arrivals_for(
            rate, self._duration_s, arguments.burstiness, arguments.seed + len(self.steps), arguments.num_prompts
        )
        warmups = 0 if self.steps else plan.warmups
        plan = replace(plan, arrivals=arrivals, duration_s=self._duration_s, warmups=warmups)
        generated = generate(plan, arguments.workers, self._asked.goodput, self._requests_file.add)
        numbers = facts_of(arguments, plan) | numbers_of(generated, plan, self._asked)
        if generated.stopped:
            return 128 + generated.stopped  # a part of a step says nothing of its rate
        step = Step.of(rate, numbers)
        is_good = step.is_good(arguments.slo_share)
        self._numbers.append(numbers | {"served": step.served, "share": step.share, "is_good": is_good})
        self.steps.append(step)
        print(_told(step, arguments.slo_share), file=sys.stderr)
        return 0

    def document(self) -> dict[str, Any]:
        """Return everything that was seen: the steps by their rate, the knee and the capacity."""
        arguments = self._arguments
        bend, most = knee(self.steps), capacity(self.steps, arguments.slo_share)
        facts = facts_of(arguments, self._plan)
        facts["request_rate"] = "sweep"
        return facts | {
            "goodput": list(arguments.goodput),
            "slo_share": arguments.slo_share,
            "knee": bend and bend.rate,
            "capacity": most and most.rate,
            "steps": sorted(self._numbers, key=lambda each: float(each["request_rate"])),
        }


def _told(step: Step, slo_share: float) -> str:
    if step.void:
        return f"{step.rate:.4g}/s: void, the generator was the limit"
    return f"{step.rate:.4g}/s: {'served as asked' if step.is_good(slo_share) else 'too much'}"


def lines(document: Mapping[str, Any]) -> list[str]:
    """Return the sweep for a terminal."""
    header = ["req/s", "served", "tok/s", "P50 TTFT", "P99 TTFT", "P50 TPOT", "P99 TPOT", "P50 E2EL", "in limits", ""]
    keys = ("p50_ttft_ms", "p99_ttft_ms", "p50_tpot_ms", "p99_tpot_ms", "p50_e2el_ms")
    rows = [
        [
            f"{each['request_rate']:.4g}",
            f"{each['served']:.4g}",
            f"{each['output_throughput']:,.0f}",
            *(results.shown_ms(each.get(key)) for key in keys),
            f"{each['share']:.1%}",
            "void" if each["void"] else "" if each["is_good"] else "too much",
        ]
        for each in document["steps"]
    ]
    told = tables.columns(header, rows)
    told += [
        f"VOID at {each['request_rate']:.4g}/s: {reason}." for each in document["steps"] for reason in each["void"]
    ]
    limits = " ".join(document["goodput"]) or "no failure"
    if document["knee"] is not None:
        told.append(f"Knee: {document['knee']:.4g} requests/s, where throughput over latency is the greatest.")
    if document["capacity"] is not None:
        told.append(
            f"Capacity: {document['capacity']:.4g} requests/s, with {document['slo_share']:.0%} within {limits}."
        )
        if not any(not each["is_good"] for each in document["steps"]):
            told.append("It is more: no rate was too much. Add higher ones, or use --rates auto.")
    elif document["steps"]:
        told.append(f"Capacity: below {document['steps'][0]['request_rate']:.4g} requests/s. Add lower rates.")
    return told


def page(document: Mapping[str, Any]) -> str:
    """Return the sweep as a page."""
    steps = [each for each in document["steps"] if not each["void"]]
    head, *rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines(document) if "|" in line]
    tiles = {"knee, requests / s": document["knee"], "capacity, requests / s": document["capacity"]}
    sections = [report.tiles({name: "-" if value is None else f"{value:.4g}" for name, value in tiles.items()})]
    if steps:
        sections += [
            report.section("Latency", report.plot(_latency(steps, document), height=3.4)),
            report.section("Throughput", report.plot(_throughput(steps), height=3.0)),
        ]
    facts = {name: value for name, value in document.items() if not isinstance(value, list)}
    sections += [
        report.section("The rates", report.table(head, rows[1:])),
        report.section("The run", report.facts(facts)),
    ]
    return report.page(f"Sweep of {document['target']}", sections)


def _latency(steps: Sequence[Mapping[str, Any]], document: Mapping[str, Any]) -> "Callable[[Axes], None]":
    def draw(axes: "Axes") -> None:
        curves = ("p50_ttft_ms", "p99_ttft_ms", "p50_e2el_ms")
        for key, colour in zip(curves, report.COLOURS, strict=False):
            seen = [(each["request_rate"], each[key]) for each in steps if each.get(key) is not None]
            if seen:
                axes.plot(*zip(*seen, strict=True), "o-", color=colour, label=key[:-3].replace("_", " ").upper())
        for name, style in (("knee", ":"), ("capacity", "--")):
            if document[name] is not None:
                axes.axvline(document[name], color=report.COLOURS[8], linestyle=style, label=name)
        axes.set_yscale("log")
        axes.set_xlabel("requests / s")
        axes.set_ylabel("milliseconds")
        axes.legend(loc="upper left", frameon=False)

    return draw


def _throughput(steps: Sequence[Mapping[str, Any]]) -> "Callable[[Axes], None]":
    def draw(axes: "Axes") -> None:
        rates = [each["request_rate"] for each in steps]
        axes.plot(rates, rates, ":", color=report.COLOURS[8], label="asked")
        axes.plot(rates, [each["served"] for each in steps], "o-", color=report.COLOURS[0], label="served")
        if any(each["request_goodput"] is not None for each in steps):
            good = [each["served"] * each["share"] for each in steps]
            axes.plot(rates, good, "o-", color=report.COLOURS[2], label="within the limits")
        axes.set_xlabel("requests / s asked")
        axes.set_ylabel("requests / s")
        axes.legend(loc="upper left", frameon=False)

    return draw
