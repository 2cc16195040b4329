"""Measures one server with `loadtest run` and with the benchmarks of others, and names where they differ.

    python -m tests.agreement [--tool NAME=PROGRAM ...] [--scenario NAME ...] [--requests N] [--rate N]

A PROGRAM is a Python that can import vllm, or the command guidellm or aiperf, each in an environment of its own. They
are installed by hand and take minutes, so CI leaves this out. Differences beyond 2 % end it with 1, but for those that
are definitions, which loadtest/README.md states.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Final
from urllib.error import URLError
from urllib.request import urlopen

from loadtest import tables
from loadtest.processes import free_port
from tests.agreement.server import SCENARIOS
from tests.agreement.tools import ROOT, TOOLS, Load, Numbers, apart, measure, own_program

_NUMBERS: Final = ("TTFT", "TPOT", "E2EL", "tok/s", "failed")
_ALLOWED: Final = 0.02
# Where numbers differ by definition: a scenario, a tool and a number.
_DEFINED: Final = {
    ("role", "vllm", "TTFT"),  # to the role
    ("role", "vllm", "TPOT"),  # which is divided by it
    ("no-usage", "vllm", "tok/s"),  # of its tokenizer
}


def main() -> int:
    """Measure; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.agreement", description=__doc__)
    parser.add_argument("--tool", action="append", default=[], metavar="NAME=PROGRAM", help=", ".join(TOOLS))
    parser.add_argument("--scenario", action="append", choices=SCENARIOS, metavar="NAME", help=", ".join(SCENARIOS))
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--rate", type=float, default=10.0)
    parser.add_argument("--timeout", type=float, default=600.0, metavar="S", help="of one tool in one scenario")
    asked = parser.parse_args()
    programs = {"loadtest": own_program()} | dict(each.split("=", 1) for each in asked.tool)
    port = free_port()
    with subprocess.Popen([sys.executable, "-m", "tests.agreement.server", str(port)], cwd=ROOT) as server:
        try:
            _wait(f"http://127.0.0.1:{port}/health")
            seen = {
                (scenario, name): _measured(name, program, scenario, port, asked)
                for scenario in asked.scenario or SCENARIOS
                for name, program in programs.items()
            }
        finally:
            server.terminate()
    rows = [[f"{scenario}: {name}", *_cells(numbers)] for (scenario, name), numbers in seen.items()]
    print("\n".join(tables.columns(["", *_NUMBERS], rows)))
    differences = [each for scenario in asked.scenario or SCENARIOS for each in _differences(scenario, seen)]
    missing = [f"{scenario}: {name}" for (scenario, name), numbers in seen.items() if not numbers]
    void = [scenario for (scenario, _), numbers in seen.items() if numbers.get("void")]
    for word, those in (("DIFFERS", differences), ("NOT MEASURED", missing), ("VOID: the machine was busy", void)):
        for each in those:
            print(f"{word}: {each}")
    if differences or missing or void:
        return 1
    print("All agree within 2 %, or by definition.")
    return 0


def _measured(name: str, program: str, scenario: str, port: int, asked: argparse.Namespace) -> Numbers:
    with tempfile.TemporaryDirectory(prefix="agreement-") as directory:
        load = Load(f"http://127.0.0.1:{port}", scenario, asked.requests, asked.rate, Path(directory))
        try:
            numbers = measure(name, program, load, asked.timeout)
        except RuntimeError as error:
            print(f"{scenario}: {name}: {error}", file=sys.stderr)
            return {}
    print(f"{scenario}: {name}: {numbers}", file=sys.stderr)
    return numbers


def _differences(scenario: str, seen: dict[tuple[str, str], Numbers]) -> list[str]:
    ours = seen[scenario, "loadtest"]
    found = []
    for (where, name), theirs in seen.items():
        if where != scenario or name == "loadtest":
            continue
        for number in _NUMBERS:
            one, other = ours.get(number), theirs.get(number)
            if one is None or other is None or (scenario, name, number) in _DEFINED:
                continue
            if apart(one, other) > _ALLOWED:
                found.append(f"{scenario}: {number}: loadtest {one:.2f}, {name} {other:.2f}")
    return found


def _cells(numbers: Numbers) -> list[str]:
    return ["-" if numbers.get(name) is None else f"{numbers[name]:.2f}" for name in _NUMBERS]


def _wait(url: str) -> None:
    for _ in range(600):
        try:
            urlopen(url).close()
            return
        except (URLError, ConnectionError):
            time.sleep(0.1)
    raise TimeoutError(f"nobody answers at {url}")


if __name__ == "__main__":
    sys.exit(main())
