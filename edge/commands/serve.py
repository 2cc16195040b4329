"""`edge serve`: run the edge."""

import argparse

from edge.commands.arguments import add_config, address, checked, listening_on
from edge.commands.event_loop import run_to_end
from edge.process.deadline import Deadline
from edge.process.memory import map_large_blocks
from edge.process.server import Server
from edge.telemetry.process_log import log_to_stderr


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `edge serve`."""
    add_config(parser)
    add = parser.add_argument
    add("--listen", type=checked(address), metavar="ADDR", help="instead of server.listen: host:port, unix:PATH")
    add("--admin", type=checked(address), metavar="ADDR", help="instead of server.admin")


def run(parsed: argparse.Namespace) -> int:
    """Serve until a signal ends it."""

    async def serve() -> None:
        adapt = listening_on(parsed.listen, parsed.admin)
        await Server(parsed.config, adapt, within=Deadline().within).run()

    map_large_blocks()
    with log_to_stderr():
        return run_to_end(serve())
