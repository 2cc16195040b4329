"""`python -m loadtest`: benchmarks of the edge; exit 0 ok, 1 failed, void or over budget, 2 wrong usage."""

import argparse
import importlib
import sys
from typing import Final

_COMMANDS: Final = {
    "run": "an open loop of requests against any OpenAI-compatible URL",
    "compare": "what the edge and other proxies cost, side by side",
    "soak": "many live streams for a long time, every byte checked",
    "budget": "whether the edge costs what it may cost",
}


def main() -> int:
    """Run one command."""
    parser = argparse.ArgumentParser(prog="python -m loadtest", description="Benchmarks of the edge.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    modules = {}
    for name, text in _COMMANDS.items():
        module = modules[name] = importlib.import_module(f"loadtest.{name}")
        module.add_arguments(commands.add_parser(name, help=text, description=module.__doc__))
    parsed = parser.parse_args()
    return int(modules[parsed.command].main(parsed))


if __name__ == "__main__":
    sys.exit(main())
