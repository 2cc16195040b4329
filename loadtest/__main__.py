"""`python -m loadtest`: benchmarks of the edge; exit 0 ok, 1 failed, void or over budget, 2 wrong usage."""

import argparse
import importlib
import os
import signal
import sys
from types import FrameType
from typing import Final

_COMMANDS: Final = {
    "run": "an open loop of requests against any OpenAI-compatible URL",
    "diff": "two results of run, and whether the second is worse",
    "compare": "what the edge and other proxies cost, side by side",
    "page": "the page of a saved comparison, or of two saved results beside each other",
    "soak": "many live streams for a long time, every byte checked",
    "budget": "whether the edge costs what it may cost",
    "chaos": "whether every token is accounted for while everything breaks",
    "overload": "what is served when three times as much is asked, and what a refusal costs",
    "scale": "the longest step of the loop with ten thousand routes and a hundred thousand keys",
    "console": "whether a day of a console loses a key, or lets one work after its end",
    "watched": "what streams wait because browsers and Prometheus watch",
    "stops": "what a rolling restart loses, and whether every stop ends",
    "stalls": "the longest turn of the loop for every kind of long body and answer",
    "conversations": "how long prompts wait at engines with a prefix cache, for each balance and load",
    "hedging": "how long first tokens take where a few stall, with and without a second endpoint",
    "choosing": "what it costs to choose an endpoint by what it has cached",
    "before": "whether this edge costs more than that of another checkout",
    "instructions": "what a request and an event take, counted instead of timed",
}
_MODULES: Final = {"chaos": "chaos.command"}  # where it is not of the command's name
_INTERRUPTED: Final = 130  # as a shell tells SIGINT
_TERMINATED: Final = 143  # and SIGTERM
_UNREAD: Final = 141  # and SIGPIPE


def _terminate(number: int, frame: FrameType | None) -> None:
    """End in order: what was started must not go on by itself, and spoil the next measurement."""
    sys.exit(_TERMINATED)


def main() -> int:
    """Run one command."""
    parser = argparse.ArgumentParser(prog="python -m loadtest", description="Benchmarks of the edge.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    module = None
    for name, text in _COMMANDS.items():
        command = commands.add_parser(name, help=text)
        if sys.argv[1:2] == [name]:  # the others need not even import
            module = importlib.import_module(f"loadtest.{_MODULES.get(name, name)}")
            command.description = module.__doc__
            module.add_arguments(command)
    parsed = parser.parse_args()
    assert module is not None, "a command is required, and it stands first"
    signal.signal(signal.SIGTERM, _terminate)
    try:
        code = int(module.main(parsed))
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:  # who read the output is gone, as `head` is; what was to be written to files is
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the last flush would fail again
        return _UNREAD


if __name__ == "__main__":
    sys.exit(main())
