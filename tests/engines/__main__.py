"""What the edge records of real engines, against what they count themselves.

    python -m tests.engines [--engine NAME ...] [--case NAME ...] [--requests N] [--cache DIR] [--record] [--write]

It installs each engine, pinned, with a tiny random model, and asks it on the loopback of this machine through an edge.
So it runs outside CI. It exits with 1 where a record differs from the engine's own counters and nothing says why.
"""

import argparse
import asyncio
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from tests.engines import llamacpp, sglang, transformers_serve, vllm
from tests.engines.cases import CASES
from tests.engines.document import document, mark, table
from tests.engines.engine import installed
from tests.engines.recordings import record
from tests.engines.runs import Outcome, play

ENGINES: Final = (llamacpp.ENGINE, vllm.ENGINE, sglang.ENGINE, transformers_serve.ENGINE)
_ROOT: Final = Path(__file__).parents[2]
_DOCUMENT: Final = _ROOT / "docs/engines.md"
_RECORDINGS: Final = _ROOT / "tests/cases/engines"


def main(words: Sequence[str] | None = None) -> int:
    """Play the cases, or record the engines; return the exit code."""
    asked = _arguments(words)
    engines = [engine for engine in ENGINES if not asked.engine or engine.name in asked.engine]
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="engines-") as temporary:
        cache = Path(asked.cache or temporary)
        for engine in engines:  # in turn: they share the machine's cores
            home = installed(engine, cache)
            if asked.record:
                asyncio.run(record(engine, home, _RECORDINGS / f"{engine.name}.json"))
                continue
            own = asyncio.run(play(engine, home, asked.requests, set(asked.case or ())))
            print(f"{engine.title}, {engine.pins}\n\n{table(own)}\n", flush=True)
            outcomes += own
    if asked.write:
        before = _DOCUMENT.read_text() if _DOCUMENT.exists() else ""
        _DOCUMENT.write_text(document(before, ENGINES, outcomes))
    return int(any(mark(outcome) == "FAULT" for outcome in outcomes))


def _arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tests.engines", description="what the edge records of real engines")
    engines, cases = [engine.name for engine in ENGINES], [case.name for case in CASES]
    parser.add_argument(
        "--engine", action="extend", nargs="+", choices=engines, metavar="NAME", help=", ".join(engines)
    )
    parser.add_argument("--case", action="extend", nargs="+", choices=cases, metavar="NAME", help="; ".join(cases))
    parser.add_argument("--requests", type=int, default=200, metavar="N", help="of each case in each mode")
    cache = os.environ.get("ENGINES_CACHE")
    parser.add_argument("--cache", default=cache, help="where engines are kept; default $ENGINES_CACHE, else nowhere")
    parser.add_argument("--record", action="store_true", help="ask the engines alone, and keep what they send")
    parser.add_argument("--write", action="store_true", help="print it to docs/engines.md")
    asked = parser.parse_args(words)
    if asked.write and (asked.case or asked.record):
        parser.error("--write takes every case of an engine, so leave --case and --record out")
    return asked


if __name__ == "__main__":
    sys.exit(main())
