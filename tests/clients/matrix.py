"""What current client SDKs make of failures: direct from a model server, and through the edge in front of it.

    python tests/clients/matrix.py [--client NAME ...] [--edge FILE] [--cache DIR] [--write]

It installs the SDKs, pinned, so it runs outside CI. It exits with 1 where the edge is worse for a client than no edge.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from document import document, summary, worse
from runs import play
from sdks import CLIENTS, Client, installed
from verdicts import Row

_DOCUMENT: Final = Path(__file__).parents[2] / "docs/clients.md"


def main(words: Sequence[str] | None = None) -> int:
    """Play the matrix; return the exit code."""
    asked = _arguments(words)
    clients = [client for client in CLIENTS if not asked.client or client.name in asked.client]
    with tempfile.TemporaryDirectory(prefix="clients-") as temporary:
        cache = Path(asked.cache or temporary)
        rows = _rows(clients, cache, asked.edge.absolute(), asked.jobs)
    print(f"\n{summary(rows)}\n\n{worse(rows)}")
    if asked.write:
        _DOCUMENT.write_text(document(rows))
    return int(any(row.verdict.rank == "worse" for row in rows))


def _rows(clients: Sequence[Client], cache: Path, edge: Path, jobs: int) -> list[Row]:
    commands = {client: installed(client, cache) for client in clients}  # in turn: some share their packages

    def rows(client: Client) -> list[Row]:
        played = play(client, commands[client], edge)
        print(f"{client.name}: played", file=sys.stderr, flush=True)
        return played

    with ThreadPoolExecutor(jobs) as pool:
        return [row for of_client in pool.map(rows, clients) for row in of_client]


def _arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="matrix.py", description="what clients make of failures")
    names = [client.name for client in CLIENTS]
    parser.add_argument("--client", action="extend", nargs="+", choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--edge", type=Path, default=Path(sys.executable).with_name("edge"), help="its command")
    cache = os.environ.get("CLIENTS_CACHE")
    parser.add_argument("--cache", default=cache, help="where SDKs are kept; default $CLIENTS_CACHE, else nowhere")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="clients at a time")
    parser.add_argument("--write", action="store_true", help="print all of it to docs/clients.md")
    asked = parser.parse_args(words)
    if asked.write and asked.client:
        parser.error("--write takes the whole matrix, so leave --client out")
    return asked


if __name__ == "__main__":
    sys.exit(main())
