"""The argument parser and the exit codes: 0 done, 1 failed or found problems, 2 wrong usage."""

import argparse
import os
import select
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, Final, NoReturn

from edge.config.problems import ConfigError
from edge.errors import Unusable

_STDOUT: Final = 1

# Each is a module of `edge.commands` with `add_arguments(parser)` and `run(parsed) -> int`, the exit code. Only the one
# that is asked for is imported: `edge serve` takes a second of CPU for that, `edge check` a fifth of it.
_COMMANDS: Final = {
    "init": "write a first routes.toml, for one pool",
    "serve": "run the edge",
    "demo": "run the edge with every upstream simulated, and a key to try it",
    "simulate": "run the simulated model server alone",
    "status": "show what a running edge does, and what is wrong with it",
    "check": "list every problem of a routes.toml",
    "explain": "say which route a model's name takes, who may use it, and why",
    "diff": "list what a reload would change, or refuse",
    "schema": "print the JSON Schema of routes.toml, for editors",
    "usage": "add up what the journal says was used",
    "keys": "create, list and revoke API keys",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    _open_standard_files()
    try:
        code = _run(sys.argv[1:] if arguments is None else arguments)
    except SystemExit as end:  # argparse has printed a help, or what is wrong with the arguments
        code = 2 if end.code else 0
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 1
    except (Unusable, ValueError, OSError) as error:
        if not isinstance(error, BrokenPipeError) or _has_reader():
            print(f"edge: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 1
    try:
        sys.stdout.flush()
    except OSError as error:
        if _has_reader():
            print(f"edge: {error}", file=sys.stderr)
            _print_nowhere()
        return code or 1
    return code or int(not _has_reader())


def _run(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="edge", description="The HTTP edge of d.run's model platform.")
    parser.add_argument("--version", action=_ShowVersion, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    named = next((each for each in arguments if each in _COMMANDS), None)
    for name, text in _COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        if name == named:
            module = import_module(f"edge.commands.{name}")
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    parsed = parser.parse_args(arguments)
    code: int = parsed.run(parsed)
    return code


class _ShowVersion(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        from importlib.metadata import version  # which takes as long to import as a small command does

        print(f"edge {version('edge')}")
        parser.exit()


def _open_standard_files() -> None:
    """Fill 0, 1 and 2 when the caller had closed them: else a socket, or one of the loop's own, takes their place.

    What is printed to a closed standard error would go to standard output.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    sys.stdout = sys.stdout or os.fdopen(1, "w")
    sys.stderr = sys.stderr or os.fdopen(2, "w")


def _has_reader() -> bool:
    """Return whether standard output is still read: a reader such as `head` may have enough."""
    output = select.poll()
    output.register(_STDOUT, 0)  # an error is reported whatever is asked for
    has_reader = not any(events & select.POLLERR for _, events in output.poll(0))
    if not has_reader:
        _print_nowhere()
    return has_reader


def _print_nowhere() -> None:
    """Let what is still printed go nowhere: else the interpreter complains at its end."""
    from edge.telemetry.process_log import send_nowhere

    send_nowhere(_STDOUT)


if __name__ == "__main__":
    sys.exit(main())
