"""Whether `loadtest run` lasts: its memory stays as it is, and what it reports is what its requests come to.

    python -m tests.agreement.lasting [--seconds 3600] [--rate 100] [--tokens 200]

A paced server that costs little sends so many tokens of so many streams a second, 20,000 as it comes. Memory of the
command and its generator processes is read every second, and judged by the rule of `soak`. Then every number of the
result is made anew from the file of requests, by `tests.agreement.recompute`.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

import orjson

from loadtest import processes
from loadtest.peers.peer import ROOT
from loadtest.processes import Process, free_port
from loadtest.soak import Look, growth
from loadtest.upstream import Wish
from tests.agreement.recompute import differences

_GAP_MS: Final = 20.0
_TTFT_MS: Final = 200.0


def main() -> int:
    """Run; return 0, or 1 when memory grows, a stream fails, or a number is told otherwise."""
    parser = argparse.ArgumentParser(prog="python -m tests.agreement.lasting", description=__doc__)
    parser.add_argument("--seconds", type=float, default=3600.0, help="default: %(default)s")
    parser.add_argument("--rate", type=float, default=100.0, help="streams a second; default: %(default)s")
    parser.add_argument("--tokens", type=int, default=200, help="of a stream; default: %(default)s")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lasting-") as made:
        return _lasted(Path(made), asked)


def _lasted(directory: Path, asked: argparse.Namespace) -> int:
    result, requests, prompts = directory / "result.json", directory / "requests.jsonl", directory / "prompts.jsonl"
    prompts.write_bytes(orjson.dumps({"text": Wish(asked.tokens, _GAP_MS, _TTFT_MS).text()}))
    port = free_port()
    serve = [sys.executable, "-m", "loadtest.upstream", "--port", str(port)]
    cores = processes.cores_of([0])
    with Process("upstream", serve, directory / "log", cores=cores, environment={"PYTHONPATH": str(ROOT)}) as model:
        model.wait_listening(port)
        with subprocess.Popen(
            [
                *(sys.executable, "-m", "loadtest", "run", "--target", f"http://127.0.0.1:{port}"),
                *("--duration", f"{asked.seconds:g}s", "--request-rate", str(asked.rate), "--prompts", str(prompts)),
                *("--output-len", str(asked.tokens), "--save-result", str(result), "--save-requests", str(requests)),
            ],
            cwd=ROOT,
            stderr=subprocess.DEVNULL,
        ) as run:
            looks = _watched(run, asked)
    told = orjson.loads(result.read_bytes())
    quarters = [looks[at * len(looks) // 4 : (at + 1) * len(looks) // 4] for at in range(4)]
    megabytes = [statistics.median(look.memory_bytes for look in quarter) / 1e6 for quarter in quarters]
    print(f"memory in MB, median of each quarter: {', '.join(f'{each:.1f}' for each in megabytes)}")
    print(f"{told['output_throughput']:.0f} tokens a second for {told['duration']:.0f} s, {told['failed']} failed")
    problems = [*growth(looks), *differences(told, requests)]
    problems += [f"{told['failed']} requests failed"] if told["failed"] else []
    print("\n".join(problems) or "Memory is flat, and every number is the same when it is made anew.")
    return int(bool(problems))


def _watched(run: subprocess.Popen[bytes], asked: argparse.Namespace) -> list[Look]:
    """Return what the command took every second while all of its streams ran: not at its ends."""
    ramp_s = (_TTFT_MS + asked.tokens * _GAP_MS) / 1e3
    begun, looks = time.monotonic(), []
    while run.poll() is None:
        at_s = time.monotonic() - begun
        if ramp_s < at_s < asked.seconds:
            pids = processes.tree(run.pid)
            looks.append(Look(at_s, 0, processes.pss_bytes(pids), processes.descriptors(pids)))
        time.sleep(1)
    return looks


if __name__ == "__main__":
    sys.exit(main())
