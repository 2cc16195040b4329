"""What a run must say of itself: what was asked, its numbers, and whether they are the target's at all."""

import argparse
import errno
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from loadtest.dialects import DIALECTS
from loadtest.generator import Generated
from loadtest.worker import Plan

MAX_LAG_P99_MS: Final = 10.0  # a generator later than this measures itself
MAX_BUSY: Final = 0.9  # of a core, by one generator process
MAX_WAITED: Final = 0.02  # of the time, by one generator process, for a core that somebody else has
MAX_STEAL: Final = 0.02  # of the machine, by its hypervisor
_OWN_ERRORS: Final = {f"connect: {os.strerror(each)}" for each in (errno.EMFILE, errno.ENFILE, errno.EADDRNOTAVAIL)}
_MIN_JUDGED_S: Final = 2.0  # a shorter burst always fills the generator's core


@dataclass(frozen=True, slots=True)
class Asked:
    """What the arguments ask to be told."""

    goodput: Mapping[str, float]
    percentiles: Sequence[float]
    shown: Sequence[str]


def facts_of(arguments: argparse.Namespace, plan: Plan) -> dict[str, Any]:
    """Return what a reader must know of a run, under vLLM's names where it has them."""
    backend = DIALECTS[plan.kind].backend
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "endpoint_type": backend,
        "backend": backend,
        "label": arguments.label,
        "model_id": arguments.model,
        "tokenizer_id": None,  # the server counts the tokens
        "num_prompts": plan.arrivals.count,
        **dict(arguments.metadata),
        "request_rate": plan.arrivals.rate_per_s if plan.arrivals.rate_per_s < float("inf") else "inf",
        "burstiness": arguments.burstiness,
        "max_concurrency": arguments.max_concurrency,
        "target": " ".join(arguments.target),
        "scenario": arguments.scenario,
        "prompts": str(arguments.prompts) if arguments.prompts else None,
        "asked_duration": plan.duration_s,
        "workers": arguments.workers,
        "seed": arguments.seed,
    }


def numbers_of(generated: Generated, plan: Plan, asked: Asked) -> dict[str, Any]:
    """Return the numbers of a run, what the generator took, and why they may be void."""
    numbers = generated.tally.numbers(asked.percentiles, queue=plan.max_concurrency is not None)
    numbers |= {
        "generator_busy": generated.busy,
        "generator_waited": generated.waited,
        "machine_steal": generated.steal,
        "interrupted": bool(generated.stopped),
        "unfinished": generated.unfinished,
    }
    if plan.kind == "embeddings":
        sequences = numbers["completed"] * len(plan.source.conversation(0)[0].messages)
        numbers["total_input_sequences"] = sequences
        numbers["input_sequence_throughput"] = sequences / numbers["duration"]
    numbers["void"] = void(numbers) + ([generated.problem] if generated.problem else [])
    return numbers


def void(numbers: Mapping[str, Any]) -> list[str]:
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
