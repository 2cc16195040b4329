"""`edge simulate`: run the simulated model server alone."""

import argparse

from edge.commands.event_loop import run_to_end
from edge.simulator import server as simulator


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `edge simulate`."""
    simulator.add_arguments(parser)


def run(parsed: argparse.Namespace) -> int:
    """Answer as a model server until a signal ends it."""
    host, port = parsed.listen
    return run_to_end(simulator.run(host, port, simulator.behaviour_from(parsed)))
