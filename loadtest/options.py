"""The options of `run`, and what they ask for."""

import argparse
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import orjson

from loadtest import prompts, results, target
from loadtest.arrivals import Arrivals
from loadtest.generator import default_workers
from loadtest.pictures import Picture
from loadtest.target import at_least, positive
from loadtest.upstream import Wish
from loadtest.worker import Plan
from loadtest.workload import SCENARIOS, Made, Same, Scenario, Source

_NUM_PROMPTS = 1000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `run`; named as `vllm bench serve` names them, where it has them."""
    target.add_arguments(parser)
    _add_what(parser.add_argument_group("what is asked").add_argument)
    _add_when(parser.add_argument_group("when").add_argument)
    _add_sweep(parser.add_argument_group("a sweep: the same at several rates").add_argument)
    told = parser.add_argument_group("what is told").add_argument
    told("--goodput", nargs="+", default=[], metavar="NAME:MS", help="such as ttft:200 tpot:50 e2el:5000")
    told("--percentile-metrics", default=",".join(results.METRICS), metavar="NAMES", help="shown; default: %(default)s")
    told("--metric-percentiles", default="50,90,99,99.9", metavar="NUMBERS", help="default: %(default)s")
    told("--csv", type=target.output, metavar="FILE", help="the numbers, a row for each run")
    told("--save-requests", type=target.output, metavar="FILE", help="each request as it ends, .jsonl or .csv")
    told("--save-detailed", action="store_true", help="each request's numbers in --save-result too, kept in memory")
    told("--label", metavar="TEXT", help="kept with the numbers")
    told("--metadata", nargs="+", type=_pair, default=[], metavar="KEY=VALUE", help="kept with the numbers")
    check = parser.add_mutually_exclusive_group()
    check.add_argument("--exact", action="store_true", help="the upstream is loadtest.upstream: check every byte")
    check.add_argument("--equal", action="store_true", help="ask the same each time; every answer must be the same")


def _add_what(add: Callable[..., object]) -> None:
    add("--scenario", choices=SCENARIOS, default="chat-stream", metavar="NAME", help=f"one of {', '.join(SCENARIOS)}")
    add("--input-len", type=positive, metavar="CHARACTERS", help="of a prompt, five a token; default: the scenario's")
    add("--output-len", type=positive, metavar="TOKENS", help="asked for, instead of the scenario's")
    add("--prompts", type=Path, metavar="FILE", help="texts, chats, conversations or a trace: see loadtest/README.md")
    add("--prefix-len", type=at_least(0), default=0, metavar="CHARACTERS", help="of a system message that is shared")
    add("--num-prefixes", type=positive, default=1, metavar="N", help="different ones; default: %(default)s")
    add("--turns", type=positive, default=1, metavar="N", help="of a conversation; default: %(default)s")
    add("--think-time", type=target.duration_s, default=0.0, metavar="TIME", help="between an answer and the next turn")
    add("--image", type=_picture, metavar="WIDTHxHEIGHT", help="a picture of so many pixels in every turn")
    add("--num-images", type=positive, default=1, metavar="N", help="in every turn; default: %(default)s")
    add("--num-inputs", type=positive, default=1, metavar="N", help="texts in a request of embeddings")
    add("--extra-body", type=_members, default={}, metavar="JSON", help="such as '{\"ignore_eos\": true}'")


def _add_when(add: Callable[..., object]) -> None:
    add("--request-rate", type=float, metavar="PER_SECOND", help="default: the file's timestamps, or inf, all at once")
    add("--burstiness", type=float, default=1.0, metavar="SHAPE", help="of the gaps: 1 Poisson, below 1 in bursts")
    add("--speed", type=float, default=1.0, metavar="FACTOR", help="of the file's timestamps: 2 is twice as fast")
    add("--max-concurrency", type=positive, metavar="N", help="never more than N at once; the wait is told apart")
    add(
        "--num-prompts",
        type=positive,
        metavar="N",
        help=f"requests, or conversations; default: {_NUM_PROMPTS}, or as many as the file has, or --duration",
    )
    add("--duration", type=target.duration_s, metavar="TIME", help="such as 90s, 10m or 1h: nothing is sent later")
    add(
        "--num-warmups",
        type=at_least(0),
        default=10,
        metavar="N",
        help="before the run, not counted; default: %(default)s",
    )
    add("--timeout", type=_timeout_s, default=600.0, metavar="S", help="of an answer, 0: none; default: %(default)g")
    workers = default_workers(len(os.sched_getaffinity(0)))
    add("--workers", type=positive, default=workers, metavar="N", help="generator processes; default: %(default)s")
    add("--seed", type=int, default=0, help="of the arrivals and the prompts")


def _add_sweep(add: Callable[..., object]) -> None:
    add("--rates", type=_rates, metavar="1,2,4", help="requests per second, each for --duration; auto: find them")
    add(
        "--slo-share",
        type=_share,
        default=0.9,
        metavar="SHARE",
        help="of the requests that must meet --goodput at the capacity; default: %(default)s",
    )


def plan_of(arguments: argparse.Namespace) -> Plan:
    """Return what the arguments ask for; raises `ValueError` and, for a file that cannot be read, `OSError`."""
    scenario = SCENARIOS[arguments.scenario]
    scenario = replace(
        scenario,
        input_len=arguments.input_len or scenario.input_len,
        output_len=arguments.output_len or scenario.output_len,
    )
    _check(arguments, scenario)
    members = arguments.extra_body
    if arguments.exact:
        members = {"user": Wish(scenario.output_len).text(), **members}
    source, times, count = _source(arguments, scenario)
    return Plan(
        targets=target.targets_of(arguments),
        kind=scenario.kind,
        stream=scenario.stream,
        model=arguments.model,
        members=members,
        source=Same(source) if arguments.equal else source,
        arrivals=_arrivals(arguments, times, count),
        duration_s=arguments.duration,
        warmups=arguments.num_warmups,
        max_concurrency=arguments.max_concurrency,
        timeout_s=arguments.timeout or None,
        exact=scenario.output_len if arguments.exact else None,
        equal=arguments.equal,
    )


def _check(arguments: argparse.Namespace, scenario: Scenario) -> None:
    is_text = scenario.kind in ("chat", "messages", "responses")
    if arguments.exact and not (scenario.kind == "chat" and scenario.stream):
        raise ValueError(f"--exact needs a stream of chat: leave out --scenario {arguments.scenario}")
    if (arguments.turns > 1 or arguments.image) and not is_text:
        raise ValueError(f"{arguments.scenario} has no turns and no pictures: choose chat, messages or responses")
    if arguments.num_inputs > 1 and scenario.kind != "embeddings":
        raise ValueError("--num-inputs is for --scenario embeddings")
    if arguments.prompts and (arguments.prefix_len or arguments.turns > 1 or arguments.image):
        raise ValueError("--prompts says what is asked: leave out --prefix-len, --turns and --image")
    if not arguments.speed > 0:
        raise ValueError("--speed is above 0")


def _source(arguments: argparse.Namespace, scenario: Scenario) -> tuple[Source, Sequence[float] | None, int | None]:
    """Return what is asked, and when and how often a file says so."""
    if arguments.prompts is None:
        made = Made(
            scenario,
            arguments.seed,
            arguments.prefix_len,
            arguments.num_prefixes,
            arguments.turns,
            arguments.think_time,
            arguments.num_inputs,
            arguments.image,
            arguments.num_images,
        )
        return made, None, None
    try:
        told = prompts.read(arguments.prompts, scenario.output_len)
        times = told.times(arguments.speed) if arguments.request_rate is None and not arguments.rates else None
    except ValueError as error:
        raise ValueError(f"{arguments.prompts}: {error}") from None
    if times is not None and arguments.num_prompts and arguments.num_prompts > len(times):
        raise ValueError(f"the trace has {len(times)} beginnings: lower --num-prompts, or give a --request-rate")
    return told, times, len(told.conversations)


def _arrivals(arguments: argparse.Namespace, times: Sequence[float] | None, in_file: int | None) -> Arrivals:
    count: int | None = arguments.num_prompts
    rate = math.inf if arguments.request_rate is None else arguments.request_rate
    if times is not None:
        return Arrivals(count or in_file, times=times)
    duration_s = arguments.duration
    if duration_s is None:
        return Arrivals(count or in_file or _NUM_PROMPTS, rate, arguments.burstiness, arguments.seed)
    if rate == math.inf:
        if not arguments.max_concurrency and not arguments.rates:
            raise ValueError("--duration needs --request-rate or --max-concurrency: how much at a time is not said")
        return Arrivals(count, rate, arguments.burstiness, arguments.seed)
    return arrivals_for(rate, duration_s, arguments.burstiness, arguments.seed, count)


def arrivals_for(
    rate_per_s: float, duration_s: float, burstiness: float, seed: int, most: int | None = None
) -> Arrivals:
    """Return arrivals that fill a time at a rate; raises `ValueError`."""
    Arrivals(1, rate_per_s, burstiness)  # which is the one to refuse them
    count = max(1, round(rate_per_s * duration_s))
    return Arrivals(min(count, most or count), rate_per_s, burstiness, seed)


def _picture(text: str) -> Picture:
    try:
        return Picture.of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _rates(text: str) -> list[float]:
    """Return the rates, none for `auto`."""
    if text == "auto":
        return []
    rates = sorted(float(each) for each in text.split(","))
    if not 0 < rates[0] <= rates[-1] < math.inf:
        raise argparse.ArgumentTypeError("numbers above 0, or auto")
    return rates


def _share(text: str) -> float:
    share = float(text)
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError("above 0, at most 1")
    return share


def _pair(text: str) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not (name and sign):
        raise argparse.ArgumentTypeError("write KEY=VALUE")
    return name, value


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
