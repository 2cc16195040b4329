"""Two edges on one socket, until they are told to stop: `python -m loadtest.peers.two` where `routes.toml` is.

It stands in for systemd, which holds the socket and passes it on (`LISTEN_FDS`); `PORT` says where.
"""

import os
import signal
import socket
from pathlib import Path

from loadtest.edges import Edge
from loadtest.peers.peer import ROOT

_PATIENCE_S = 5.0


def main() -> None:
    """Run them."""
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(("127.0.0.1", int(os.environ["PORT"])))  # the edges listen: then both can be counted
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
        edges = [Edge(number, ROOT, Path.cwd(), listening) for number in (1, 2)]
        for each in edges:
            each.launch()
        for each in edges:
            each.wait_ready()
        signal.sigwait({signal.SIGTERM, signal.SIGINT})
        for each in edges:
            each.stop(_PATIENCE_S)


if __name__ == "__main__":
    main()
