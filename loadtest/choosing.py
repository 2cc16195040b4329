"""`choosing`: what it costs to choose a member by what it has cached, in CPU of one thread, and how large the index is.

Prompt, marks, choice and all that is noted of one request, for bodies of several sizes; the best of many rounds counts.
Exit code 1 says that it costs more than it may.
"""

import argparse
import gc
import json
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from time import thread_time
from typing import Final

from edge.envelope.json import Envelope, read_json
from edge.envelope.prompt import prompt_of
from edge.upstream.cache_aware import CacheAware, Seat
from edge.upstream.prefix_index import MAX_ENTRIES, PrefixIndex
from edge.upstream.prefixes import Prefix, read_prefix
from loadtest.target import positive

# Bytes of a body, its messages, and the most it may cost, in us.
_KINDS: Final = ((2_000, 3, 15.0), (47_000, 20, 100.0), (400_000, 3, 500.0), (400_000, 100, 500.0))
_MEMBERS: Final = (4, 16, 64)
_MOST_BYTES: Final = 32 << 20
_MOST_MS: Final = 1.0
_MARKS: Final = 12


@dataclass(eq=False)
class _Member:
    name: str
    seat: Seat | None
    weight: int = 1
    credit: int = 0
    load: int = 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `choosing`."""
    parser.add_argument("--rounds", type=positive, default=300, metavar="N", help="of each measurement; default: 300")


def main(arguments: argparse.Namespace) -> int:
    """Measure and print; return 1 when it costs too much."""
    failed = False
    print(f"{'body':>9} {'messages':>8} {'marks':>5} {'all us':>8}   choice alone, of {_MEMBERS} members")
    for size, messages, most_us in _KINDS:
        body = _body(size, messages)
        envelope = read_json(body)
        prefix = _prefix_of(envelope, body)
        policy = CacheAware()
        members = [_Member(f"10.0.0.{at}:8000", policy.seat(at)) for at in range(max(_MEMBERS))]
        policy.index.put(prefix.digests, 0)
        whole_us = _best_us(partial(_one, envelope, body, policy, members[:4]), arguments.rounds)
        alone = [_best_us(partial(policy.choose, members[:count], prefix, 1.0), arguments.rounds) for count in _MEMBERS]
        ok = whole_us <= most_us
        failed |= not ok
        choices = " ".join(f"{each:.1f}" for each in alone)
        print(f"{len(body):9} {messages:8} {len(prefix.digests):5} {whole_us:8.1f}   {choices}   {_word(ok)}")
    size_bytes, longest_ms = _index()
    print(f"index of {MAX_ENTRIES} marks: {size_bytes / 2**20:.1f} MiB   {_word(size_bytes <= _MOST_BYTES)}")
    print(f"longest put: {longest_ms:.3f} ms   {_word(longest_ms <= _MOST_MS)}")
    return int(failed or size_bytes > _MOST_BYTES or longest_ms > _MOST_MS)


def _word(ok: bool) -> str:
    return "ok" if ok else "NOT OK"


def _body(size: int, messages: int) -> bytes:
    draw = random.Random(1)
    text = " ".join(f"{draw.getrandbits(32):x}" for _ in range(size // messages // 9))
    turns = [{"role": ("user", "assistant")[at % 2], "content": f"{at} {text}"} for at in range(messages)]
    return json.dumps({"model": "public/m", "messages": turns}, separators=(",", ":")).encode()


def _prefix_of(envelope: Envelope, body: bytes) -> Prefix:
    reading = read_prefix(prompt_of(envelope, body), b"u-loadtest")
    try:
        while True:
            reading.send(None)
    except StopIteration as done:
        prefix: Prefix = done.value
        return prefix


def _one(envelope: Envelope, body: bytes, policy: CacheAware, members: list[_Member]) -> None:
    _, ticket = policy.choose(members, _prefix_of(envelope, body), 1.0)
    ticket.dispatch(1.0)
    ticket.first_byte(2.0, streamed=True)
    ticket.end(3.0)


def _best_us(do: Callable[[], object], rounds: int) -> float:
    best_s = float("inf")
    for _ in range(rounds):
        begun = thread_time()
        for _ in range(10):
            do()
        best_s = min(best_s, (thread_time() - begun) / 10)
    return best_s * 1e6


def _index() -> tuple[float, float]:
    """Return the bytes of a full index, and the milliseconds of its longest put; garbage is collected before it."""
    draw, index, longest_s = random.Random(1), PrefixIndex(), 0.0
    index.forget(0)
    gc.collect()
    gc.disable()  # as a process does that serves: what lives long is frozen
    for _ in range(2 * MAX_ENTRIES // _MARKS):
        marks = [draw.getrandbits(60) for _ in range(_MARKS)]
        begun = thread_time()
        index.put(marks, 0)
        longest_s = max(longest_s, thread_time() - begun)
    gc.enable()
    shards = [*index._young, *index._old]
    size = sum(map(sys.getsizeof, shards)) + sys.getsizeof(1 << 59) * len(index)
    return size * MAX_ENTRIES / len(index), longest_s * 1000
